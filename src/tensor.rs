//! Strided tensors that somebody else owns.
//!
//! [`Tensor`] is a checked copy of a DLPack `DLTensor`; [`View`] and [`ViewMut`] add element type and rank.
//! The promise that the memory is there is made once, in [`Tensor::from_raw_parts`]; everything after is safe,
//! except that the caller of [`ViewMut::row`] must not hold one row twice.

use crate::error::{Error, Result};
use half::bf16;
use std::marker::PhantomData;

/// Highest rank accepted.
pub const MAX_NDIM: usize = 5;

/// Element types, as DLPack encodes them (code, bits; one lane).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit signed integer.
    I32,
    /// 64-bit signed integer.
    I64,
    /// Raw bytes.
    U8,
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// fp8 with 4 exponent and 3 mantissa bits, finite, NaN at 0x7f and 0xff.
    F8E4M3,
}

impl DType {
    const ALL: [DType; 6] =
        [DType::I32, DType::I64, DType::U8, DType::F32, DType::Bf16, DType::F8E4M3];

    /// DLPack type code and bits.
    pub const fn dlpack(self) -> (u8, u8) {
        match self {
            DType::I32 => (0, 32),
            DType::I64 => (0, 64),
            DType::U8 => (1, 8),
            DType::F32 => (2, 32),
            DType::Bf16 => (4, 16),
            DType::F8E4M3 => (10, 8),
        }
    }

    /// The type with this DLPack code, bits and lanes, if the library knows it.
    pub fn from_dlpack(code: u8, bits: u8, lanes: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.dlpack() == (code, bits) && lanes == 1)
    }

    /// Bytes an element.
    pub const fn size(self) -> usize {
        self.dlpack().1 as usize / 8
    }

    /// Name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            DType::I32 => "int32",
            DType::I64 => "int64",
            DType::U8 => "uint8",
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
            DType::F8E4M3 => "float8_e4m3fn",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An fp8 e4m3 value as its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F8E4M3(pub u8);

/// A Rust type that a tensor element can be read as.
pub trait Element: Copy + Send + Sync + 'static {
    /// The element type it stands for.
    const DTYPE: DType;
}
macro_rules! element { ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* } }
element!(i32 => I32, i64 => I64, u8 => U8, f32 => F32, bf16 => Bf16, F8E4M3 => F8E4M3);

/// Where memory lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// Memory of the CUDA device with this ordinal.
    Cuda(i32),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

/// A borrowed, checked, strided tensor of any element type. Strides are in elements.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    name: &'static str,
    ptr: *mut u8,
    device: Device,
    dtype: DType,
    ndim: usize,
    shape: [usize; MAX_NDIM],
    strides: [usize; MAX_NDIM],
    _memory: PhantomData<&'a [u8]>,
}

// SAFETY: a `Tensor` is a description; memory is reached only through views, whose rules make that sound.
unsafe impl Send for Tensor<'_> {}
// SAFETY: as above.
unsafe impl Sync for Tensor<'_> {}

impl<'a> Tensor<'a> {
    /// Describes memory that the caller vouches for. `name` is the argument's name in messages.
    ///
    /// Refuses a rank over [`MAX_NDIM`], a null pointer with elements, misalignment, and extents that overflow.
    ///
    /// # Safety
    /// For `'a`, every element reachable through `shape` and `strides` from `ptr` must be valid memory of `device`,
    /// initialised if it is read, and not written by anybody else while a view of it is in use.
    pub unsafe fn from_raw_parts(
        name: &'static str,
        ptr: *mut u8,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        if ptr.is_null() && !shape.contains(&0) {
            return Err(Error::invalid(name, "a data pointer", "NULL"));
        }
        Self::describe(name, ptr, device, dtype, shape, strides)
    }

    /// A tensor without memory, for questions about shapes. Its views refuse access.
    pub fn without_data(
        name: &'static str,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        Self::describe(name, std::ptr::null_mut(), device, dtype, shape, strides)
    }

    /// The same memory, or lack of it, under other extents.
    ///
    /// # Safety
    /// The new extents must reach only elements that the old ones reach.
    pub unsafe fn with_extents(&self, shape: &[usize], strides: &[usize]) -> Result<Self> {
        Self::describe(self.name, self.ptr, self.device, self.dtype, shape, strides)
    }

    fn describe(
        name: &'static str,
        ptr: *mut u8,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        if shape.len() > MAX_NDIM || shape.len() != strides.len() {
            return Err(Error::invalid(
                name,
                format_args!("at most {MAX_NDIM} dimensions, one stride each"),
                format_args!("{} dimensions, {} strides", shape.len(), strides.len()),
            ));
        }
        if !shape.contains(&0) {
            if !ptr.addr().is_multiple_of(dtype.size()) {
                return Err(Error::invalid(
                    name,
                    format_args!("data aligned to {} bytes", dtype.size()),
                    format_args!("{ptr:p}"),
                ));
            }
            let extent = shape
                .iter()
                .zip(strides)
                .try_fold(1usize, |e, (&n, &s)| e.checked_add((n - 1).checked_mul(s)?))
                .and_then(|e| e.checked_mul(dtype.size()))
                .filter(|&e| e <= isize::MAX as usize);
            if extent.is_none() {
                return Err(Error::invalid(
                    name,
                    "an extent that fits the address space",
                    format_args!("shape {shape:?} with strides {strides:?}"),
                ));
            }
        }
        let mut t = Tensor {
            name,
            ptr,
            device,
            dtype,
            ndim: shape.len(),
            shape: [1; MAX_NDIM],
            strides: [0; MAX_NDIM],
            _memory: PhantomData,
        };
        t.shape[..shape.len()].copy_from_slice(shape);
        t.strides[..shape.len()].copy_from_slice(strides);
        Ok(t)
    }

    /// A dense tensor over a slice.
    pub fn from_slice<T: Element>(
        name: &'static str,
        data: &'a [T],
        shape: &[usize],
    ) -> Result<Self> {
        Self::dense(name, data.as_ptr() as *mut u8, data.len(), T::DTYPE, shape)
    }

    /// A dense tensor over a slice that will be written.
    pub fn from_slice_mut<T: Element>(
        name: &'static str,
        data: &'a mut [T],
        shape: &[usize],
    ) -> Result<Self> {
        Self::dense(name, data.as_mut_ptr().cast(), data.len(), T::DTYPE, shape)
    }

    fn dense(
        name: &'static str,
        ptr: *mut u8,
        len: usize,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Self> {
        let n = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        if n != Some(len) || shape.len() > MAX_NDIM {
            return Err(Error::invalid(
                name,
                format_args!("{len} elements"),
                format_args!("shape {shape:?}"),
            ));
        }
        let strides = dense_strides(shape);
        // SAFETY: the slice the caller borrowed for 'a covers exactly these elements.
        unsafe {
            Self::from_raw_parts(name, ptr, Device::Cpu, dtype, shape, &strides[..shape.len()])
        }
    }

    /// The argument's name, for messages.
    pub fn name(&self) -> &'static str {
        self.name
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Where the memory is.
    pub fn device(&self) -> Device {
        self.device
    }
    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.ndim]
    }
    /// Steps between neighbours, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.ndim]
    }
    /// First element.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// A copy without the dimension `axis`, which must have extent 1 (the unit KV-head axis that servers keep).
    pub fn squeeze(mut self, axis: usize) -> Result<Self> {
        if axis >= self.ndim || self.shape[axis] != 1 {
            return Err(Error::invalid(
                self.name,
                format_args!("extent 1 in dimension {axis}"),
                format_args!("shape {:?}", self.shape()),
            ));
        }
        self.shape.copy_within(axis + 1.., axis);
        self.strides.copy_within(axis + 1.., axis);
        self.ndim -= 1;
        Ok(self)
    }

    /// Refuses another device.
    pub fn require_device(&self, device: Device) -> Result<()> {
        if self.device == device {
            Ok(())
        } else {
            Err(Error::invalid(self.name, format_args!("memory on {device}"), self.device))
        }
    }

    /// Refuses another shape; `None` stands for any extent.
    pub fn require_shape(&self, want: &[Option<usize>]) -> Result<()> {
        let ok = want.len() == self.ndim
            && want.iter().zip(self.shape()).all(|(w, &s)| w.is_none_or(|w| w == s));
        if ok {
            return Ok(());
        }
        let want: Vec<String> =
            want.iter().map(|w| w.map_or("any".into(), |w| w.to_string())).collect();
        Err(Error::invalid(
            self.name,
            format_args!("shape [{}]", want.join(", ")),
            format_args!("{:?}", self.shape()),
        ))
    }

    /// A typed view for reading: right dtype and rank, rows (the last dimension) without gaps.
    pub fn view<T: Element, const N: usize>(&self) -> Result<View<'a, T, N>> {
        if self.dtype != T::DTYPE {
            return Err(Error::invalid(self.name, T::DTYPE, self.dtype));
        }
        if self.ndim != N {
            return Err(Error::invalid(
                self.name,
                format_args!("{N} dimensions"),
                format_args!("{} (shape {:?})", self.ndim, self.shape()),
            ));
        }
        if N > 0 && self.shape[N - 1] > 1 && self.strides[N - 1] != 1 {
            return Err(Error::invalid(
                self.name,
                "stride 1 in the last dimension",
                format_args!("strides {:?}", self.strides()),
            ));
        }
        let mut shape = [0; N];
        let mut strides = [0; N];
        shape.copy_from_slice(self.shape());
        strides.copy_from_slice(self.strides());
        Ok(View {
            ptr: self.ptr.cast(),
            shape,
            strides,
            on_host: self.device == Device::Cpu && !self.ptr.is_null(),
            _memory: PhantomData,
        })
    }

    /// A typed view for writing. Also refuses strides with which two elements would share memory.
    pub fn view_mut<T: Element, const N: usize>(&self) -> Result<ViewMut<'a, T, N>> {
        let view = self.view::<T, N>()?;
        // Rows must not overlap: each dimension's step must clear everything inside it.
        let mut inner = 1usize;
        for d in (0..N).rev() {
            if view.shape[d] > 1 && view.strides[d] < inner {
                return Err(Error::invalid(
                    self.name,
                    "elements that do not overlap",
                    format_args!("shape {:?} with strides {:?}", self.shape(), self.strides()),
                ));
            }
            if view.shape[d] > 1 {
                inner += view.strides[d] * (view.shape[d] - 1);
            }
        }
        Ok(ViewMut(view))
    }
}

/// Strides of a dense, row-major tensor.
pub fn dense_strides(shape: &[usize]) -> [usize; MAX_NDIM] {
    let mut strides = [1usize; MAX_NDIM];
    for d in (0..shape.len().saturating_sub(1)).rev() {
        strides[d] = strides[d + 1].saturating_mul(shape[d + 1]);
    }
    strides
}

/// Typed, shaped, read-only. The last dimension has stride 1.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T, const N: usize> {
    ptr: *const T,
    shape: [usize; N],
    strides: [usize; N],
    on_host: bool,
    _memory: PhantomData<&'a [T]>,
}

// SAFETY: shared reads of `Sync` elements.
unsafe impl<T: Sync, const N: usize> Send for View<'_, T, N> {}
// SAFETY: as above.
unsafe impl<T: Sync, const N: usize> Sync for View<'_, T, N> {}

impl<'a, T: Element, const N: usize> View<'a, T, N> {
    /// Extents.
    pub fn shape(&self) -> [usize; N] {
        self.shape
    }
    /// Steps in elements.
    pub fn strides(&self) -> [usize; N] {
        self.strides
    }
    /// First element, on whatever device it is.
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    fn offset(&self, index: &[usize]) -> usize {
        assert!(self.on_host, "host access to device memory, or to none");
        assert_eq!(index.len() + 1, N);
        index.iter().zip(self.shape).zip(self.strides).fold(0, |o, ((&i, n), s)| {
            assert!(i < n, "row {i} of {n}");
            o + i * s
        })
    }

    /// The contiguous last dimension at `index` (one number for each dimension before the last).
    pub fn row(&self, index: &[usize]) -> &'a [T] {
        let n = self.shape[N - 1];
        if n == 0 {
            return &[];
        }
        // SAFETY: in bounds by the asserts; valid for 'a by the promise of `Tensor::from_raw_parts`.
        unsafe { std::slice::from_raw_parts(self.ptr.add(self.offset(index)), n) }
    }
}

/// Typed, shaped, writable; elements do not overlap. The last dimension has stride 1.
#[derive(Clone, Copy, Debug)]
pub struct ViewMut<'a, T, const N: usize>(View<'a, T, N>);

// SAFETY: rows are handed out by an unsafe function whose caller keeps them apart.
unsafe impl<T: Send, const N: usize> Send for ViewMut<'_, T, N> {}
// SAFETY: as above.
unsafe impl<T: Send, const N: usize> Sync for ViewMut<'_, T, N> {}

impl<'a, T: Element, const N: usize> ViewMut<'a, T, N> {
    /// Extents.
    pub fn shape(&self) -> [usize; N] {
        self.0.shape
    }
    /// Steps in elements.
    pub fn strides(&self) -> [usize; N] {
        self.0.strides
    }
    /// First element, on whatever device it is.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.0.ptr.cast_mut()
    }

    /// The contiguous last dimension at `index`, for writing.
    ///
    /// # Safety
    /// No other reference to this row may be alive.
    #[allow(clippy::mut_from_ref)] // Rows are disjoint; threads each take their own.
    pub unsafe fn row(&self, index: &[usize]) -> &'a mut [T] {
        let n = self.0.shape[N - 1];
        if n == 0 {
            return &mut [];
        }
        // SAFETY: in bounds by `offset`'s asserts; valid for 'a by `Tensor::from_raw_parts`; alone by this
        // function's contract, since `view_mut` checked that rows do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().add(self.0.offset(index)), n) }
    }
}
