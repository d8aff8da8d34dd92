//! Tensors and descriptors as C sees them, and how they are read.

use crate::error::{Error, Result};
use crate::tensor::{DType, Device, MAX_NDIM, Tensor, dense_strides};
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// Device type: host memory (DLPack `kDLCPU`).
pub const IDXC_DEVICE_CPU: i32 = 1;
/// Device type: CUDA device memory (DLPack `kDLCUDA`).
pub const IDXC_DEVICE_CUDA: i32 = 2;
/// Device type: page-locked host memory (DLPack `kDLCUDAHost`); read as host memory.
pub const IDXC_DEVICE_CUDA_HOST: i32 = 3;

/// Type code of signed integers (DLPack `kDLInt`).
pub const IDXC_DTYPE_INT: u8 = 0;
/// Type code of unsigned integers (DLPack `kDLUInt`).
pub const IDXC_DTYPE_UINT: u8 = 1;
/// Type code of IEEE floats (DLPack `kDLFloat`).
pub const IDXC_DTYPE_FLOAT: u8 = 2;
/// Type code of bfloat16 (DLPack `kDLBfloat`).
pub const IDXC_DTYPE_BFLOAT: u8 = 4;
/// Type code of fp8 e4m3, finite (DLPack `kDLFloat8_e4m3fn`).
pub const IDXC_DTYPE_FLOAT8_E4M3FN: u8 = 10;

/// Where memory is. Laid out as DLPack's `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_device {
    /// One of `IDXC_DEVICE_…`.
    pub device_type: i32,
    /// Ordinal of the device; 0 for host memory.
    pub device_id: i32,
}

/// Element type. Laid out as DLPack's `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_dtype {
    /// One of `IDXC_DTYPE_…`.
    pub code: u8,
    /// Bits an element.
    pub bits: u8,
    /// Always 1.
    pub lanes: u16,
}

/// A borrowed tensor. Laid out exactly as DLPack's `DLTensor`: a `DLTensor*` can be passed as it is. Strides are in
/// elements and honoured, except that the last dimension must have stride 1; `strides` NULL means dense, row-major.
/// At most 5 dimensions.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_tensor {
    /// First byte of the allocation, on `device`.
    pub data: *mut c_void,
    /// Where `data` is.
    pub device: idxc_device,
    /// Number of dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: idxc_dtype,
    /// `ndim` extents, on the host.
    pub shape: *mut i64,
    /// `ndim` strides in elements, on the host, or NULL.
    pub strides: *mut i64,
    /// Offset of the first element from `data`, in bytes.
    pub byte_offset: u64,
}

/// Whether a call touches the tensor's elements or only asks about shapes.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Access {
    /// Elements are read or written.
    Elements,
    /// A size query: `data` is not looked at.
    ShapeOnly,
}

/// Reads a tensor argument that must be there.
///
/// # Safety
/// `ptr` is NULL or points to a tensor whose shape, strides and (for [`Access::Elements`]) data are valid during `'a`.
pub(super) unsafe fn tensor<'a>(
    ptr: *const idxc_tensor,
    name: &'static str,
    access: Access,
) -> Result<Tensor<'a>> {
    // SAFETY: by this function's contract.
    unsafe { optional_tensor(ptr, name, access) }?
        .ok_or_else(|| Error::invalid(name, "a tensor", "NULL"))
}

/// Reads a tensor argument that may be NULL.
///
/// # Safety
/// As [`tensor`].
pub(super) unsafe fn optional_tensor<'a>(
    ptr: *const idxc_tensor,
    name: &'static str,
    access: Access,
) -> Result<Option<Tensor<'a>>> {
    if ptr.is_null() {
        return Ok(None);
    }
    if !ptr.is_aligned() {
        return Err(Error::invalid(name, "an aligned tensor pointer", format_args!("{ptr:p}")));
    }
    // SAFETY: by this function's contract.
    let t = unsafe { *ptr };
    let ndim = usize::try_from(t.ndim)
        .ok()
        .filter(|&n| n <= MAX_NDIM)
        .ok_or_else(|| Error::invalid(name, format_args!("ndim from 0 to {MAX_NDIM}"), t.ndim))?;
    let device = match t.device.device_type {
        IDXC_DEVICE_CPU | IDXC_DEVICE_CUDA_HOST => Device::Cpu,
        IDXC_DEVICE_CUDA => Device::Cuda(t.device.device_id),
        other => {
            return Err(Error::invalid(
                name,
                "device_type 1 (cpu), 2 (cuda) or 3 (cuda host)",
                other,
            ));
        }
    };
    let d = t.dtype;
    let dtype = DType::from_dlpack(d.code, d.bits, d.lanes).ok_or_else(|| {
        Error::invalid(
            name,
            "a known dtype (int32, int64, uint8, float32, bfloat16, float8_e4m3fn)",
            format_args!("code {}, bits {}, lanes {}", d.code, d.bits, d.lanes),
        )
    })?;
    let extents = |p: *const i64, what: &str| -> Result<[usize; MAX_NDIM]> {
        let mut out = [0usize; MAX_NDIM];
        // SAFETY: by this function's contract `p` has `ndim` entries.
        let values = unsafe { super::slice(p, ndim, name) }?;
        for (o, &v) in out.iter_mut().zip(values) {
            *o = usize::try_from(v)
                .map_err(|_| Error::invalid(name, format_args!("{what} not negative"), v))?;
        }
        Ok(out)
    };
    let shape = extents(t.shape, "a shape")?;
    let strides = if t.strides.is_null() {
        dense_strides(&shape[..ndim])
    } else {
        extents(t.strides, "strides")?
    };
    let offset = usize::try_from(t.byte_offset)
        .map_err(|_| Error::invalid(name, "a byte_offset in range", t.byte_offset))?;
    let (shape, strides) = (&shape[..ndim], &strides[..ndim]);
    if access == Access::ShapeOnly {
        return Tensor::without_data(name, device, dtype, shape, strides).map(Some);
    }
    let data = match t.data.cast::<u8>() {
        data if data.is_null() => data,
        data if data.addr().checked_add(offset).is_some() => data.wrapping_add(offset),
        _ => return Err(Error::invalid(name, "a byte_offset within the address space", offset)),
    };
    // SAFETY: by this function's contract.
    unsafe { Tensor::from_raw_parts(name, data, device, dtype, shape, strides).map(Some) }
}

/// A C struct that starts with `uint32_t struct_size, flags` and whose all-zero value means "defaults".
///
/// # Safety
/// `repr(C)`, size a multiple of 8, valid when zeroed, `struct_size` and `flags` first; no field may straddle an
/// 8-byte boundary, so that a shorter struct of an older header ends between fields.
pub(super) unsafe trait Descriptor: Copy {
    /// The C name, for messages.
    const NAME: &'static str;
    /// Flag bits that mean something.
    const FLAGS: u32 = 0;
}

/// No descriptor will ever be longer: a larger `struct_size` is garbage.
const MAX_STRUCT_SIZE: usize = 4096;

/// Reads a descriptor of any age: a shorter one gets defaults for the tail, a longer one is accepted if what this
/// library does not know is zero.
///
/// # Safety
/// `ptr` is NULL or valid for reading `struct_size` bytes, as its first field says.
pub(super) unsafe fn descriptor<T: Descriptor>(ptr: *const T, name: &'static str) -> Result<T> {
    let size = check_struct_size(ptr, name)?;
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `known` bytes are readable by contract and fit `value`; zeroed `T` is valid by the trait's contract,
    // and so is one whose leading fields the caller filled in.
    let value = unsafe {
        std::ptr::copy_nonoverlapping(ptr.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known);
        value.assume_init()
    };
    // SAFETY: the caller vouched for `size` bytes.
    let extra = unsafe { std::slice::from_raw_parts(ptr.cast::<u8>().add(known), size - known) };
    if let Some(at) = extra.iter().position(|&b| b != 0) {
        return Err(Error::invalid(
            name,
            format_args!("zero past byte {known} of {}, which this library does not know", T::NAME),
            format_args!("a value at byte {}", known + at),
        ));
    }
    // SAFETY: the trait's contract puts `flags` at byte 4; at least 8 bytes were copied.
    let flags = unsafe { (&raw const value).cast::<u32>().add(1).read() };
    if flags & !T::FLAGS != 0 {
        return Err(Error::invalid(
            name,
            format_args!("flags within {:#x} for {}", T::FLAGS, T::NAME),
            format_args!("{flags:#x}"),
        ));
    }
    Ok(value)
}

/// Fills an output struct of any age: as much as the caller's `struct_size` has room for.
///
/// # Safety
/// `ptr` is NULL or valid for reading and writing `struct_size` bytes.
pub(super) unsafe fn give_struct<T: Descriptor>(
    ptr: *mut T,
    name: &'static str,
    value: T,
) -> Result<()> {
    let size = check_struct_size(ptr, name)?;
    let known = size.min(size_of::<T>());
    // SAFETY: `known` bytes are writable by contract; `struct_size` (the first 4) stays what the caller set, and the
    // rest of a longer struct is left alone.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (&raw const value).cast::<u8>().add(4),
            ptr.cast::<u8>().add(4),
            known - 4,
        );
    }
    Ok(())
}

fn check_struct_size<T: Descriptor>(ptr: *const T, name: &'static str) -> Result<usize> {
    if ptr.is_null() {
        return Err(Error::invalid(name, format_args!("a {}", T::NAME), "NULL"));
    }
    if !ptr.is_aligned() {
        return Err(Error::invalid(
            name,
            format_args!("an aligned {}", T::NAME),
            format_args!("{ptr:p}"),
        ));
    }
    // SAFETY: the callers' contract covers the first field.
    let size = unsafe { ptr.cast::<u32>().read() } as usize;
    if !(8..=MAX_STRUCT_SIZE).contains(&size) || !size.is_multiple_of(8) {
        return Err(Error::invalid(
            name,
            format_args!(
                "struct_size a multiple of 8 from 8 to {MAX_STRUCT_SIZE} (use the _INIT macro)"
            ),
            size,
        ));
    }
    Ok(size)
}

/// What to score with the lightning indexer. Used by `idxc_select`, `idxc_indexer_logits` and
/// `idxc_paged_indexer_logits`. Keys are contiguous or, with `block_table`, paged.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_indexer_desc {
    /// `sizeof(idxc_indexer_desc)`, set by `IDXC_INDEXER_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// e4m3 or bfloat16 `[rows, heads, dim]`.
    pub q: *const idxc_tensor,
    /// float32 `[rows, heads]`: head weights, with every scale of the query side folded in
    /// (`dim^-0.5 * heads^-0.5 * q_scale`).
    pub weights: *const idxc_tensor,
    /// Contiguous: e4m3 or bfloat16 `[keys, dim]`. Paged: uint8 pages of 64 tokens, `64 * (dim + 4)` bytes each
    /// (64 rows of e4m3, then 64 float32 scales), or bfloat16 `[pages, 64, dim]`.
    pub k: *const idxc_tensor,
    /// float32 `[keys]`: scales of contiguous e4m3 keys; otherwise NULL.
    pub k_scale: *const idxc_tensor,
    /// int32 `[requests, max_pages]`: page numbers of each request. NULL: keys are contiguous.
    pub block_table: *const idxc_tensor,
    /// int32 `[rows]`, paged only: the request of each row, -1 for a padding row. NULL: rows are split evenly over
    /// the requests, in order.
    pub row_request: *const idxc_tensor,
    /// int32 `[rows]`, contiguous only: first key that the row sees. Indices count from it. NULL: 0.
    pub row_start: *const idxc_tensor,
    /// int32 `[rows]`: one past the last key that the row sees (paged: tokens visible to the row). A row that sees
    /// nothing is a padding row: its indices are -1.
    pub row_end: *const idxc_tensor,
}

/// Sparse MLA attention, less the indices: those come from the cache (`idxc_attend`) or from an argument
/// (`idxc_sparse_attention`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_attention_desc {
    /// `sizeof(idxc_attention_desc)`, set by `IDXC_ATTENTION_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// bfloat16 or float32 `[rows, heads, d_qk]`.
    pub q: *const idxc_tensor,
    /// bfloat16 or float32 `[tokens, d_qk]`, or uint8 `[tokens, 656]` (512 e4m3, 4 float32 scales, 64 bfloat16).
    /// Paged: the same with the page axis in front, `[pages, page_size, …]`.
    pub kv: *const idxc_tensor,
    /// int32 `[requests, max_pages]`: translates logical indices of paged KV; NULL for contiguous KV and for slots.
    pub block_table: *const idxc_tensor,
    /// int32 `[rows]`: the request of each row, -1 for a padding row. NULL: rows are split evenly over the requests.
    pub row_request: *const idxc_tensor,
    /// int32 `[rows]`, contiguous KV with logical indices only: the KV row of the row's position 0. NULL: 0.
    pub row_start: *const idxc_tensor,
    /// int32 `[rows]`: only the first `row_topk[r]` indices count. NULL: all; -1 entries never count.
    pub row_topk: *const idxc_tensor,
    /// float32 `[heads]`: attention sink, a logit without a value. NULL: none.
    pub sink: *const idxc_tensor,
    /// bfloat16 or float32 `[rows, heads, d_v]`, written. Values are the first `d_v` of each KV row. Zeros for a row
    /// without any valid index.
    pub out: *const idxc_tensor,
    /// float32 `[rows, heads]`, written: natural-log sum of exponentials, the sink not counted; -inf for a row without
    /// any valid index. NULL: not wanted.
    pub lse: *const idxc_tensor,
    /// The caller's number of the block table that slot-form indices were translated with (see `idxc_publish`);
    /// `idxc_attend` refuses another. 0: not tracked.
    pub table_id: u64,
    /// Multiplies `q·k`. Must be finite and positive.
    pub softmax_scale: f32,
    /// 0.
    pub reserved: u32,
    /// float32 `[rows, topk]`, written: how much the row attends to each of its indices, summed over the heads and
    /// divided by the sum, the sink not counted: a `target` for `idxc_distill`. 0 for an index that does not count. Needs
    /// `lse`. NULL: not wanted.
    pub probs: *const idxc_tensor,
}

// SAFETY: repr(C), pointers and integers in 8-byte cells; NULL and 0 are the defaults.
unsafe impl Descriptor for idxc_indexer_desc {
    const NAME: &'static str = "idxc_indexer_desc";
}
// SAFETY: as above; `softmax_scale` and `reserved` share a cell.
unsafe impl Descriptor for idxc_attention_desc {
    const NAME: &'static str = "idxc_attention_desc";
}

/// Form of indices: positions within the request.
pub const IDXC_FORM_LOGICAL: i32 = 0;
/// Form of indices: row numbers of the KV store (`page * page_size + offset`), valid under one block table only.
pub const IDXC_FORM_SLOTS: i32 = 1;

/// Reads an `IDXC_FORM_…` number.
pub(super) fn index_form(value: i32, name: &'static str) -> Result<crate::ops::IndexForm> {
    match value {
        IDXC_FORM_LOGICAL => Ok(crate::ops::IndexForm::Logical),
        IDXC_FORM_SLOTS => Ok(crate::ops::IndexForm::Slots),
        other => Err(Error::invalid(name, "0 (logical) or 1 (slots)", other)),
    }
}
