//! The operations without a cache, so that a host can adopt one at a time.

use super::context::idxc_context;
use super::types::{
    Access, Descriptor, descriptor, idxc_attention_desc, idxc_indexer_desc, idxc_tensor,
    index_form, optional_tensor, tensor,
};
use super::{guard, handle, idxc_status, out_pointer};
use crate::context::Stream;
use crate::error::{Error, Result};
use crate::ops::{
    DistillArgs, IndexForm, IndexKWriteArgs, IndexQQuantizeArgs, IndexerArgs, IndicesToSlotsArgs,
    KeyMapArgs, KvWriteArgs, Overlap, SparseAttentionArgs, TopKArgs,
};
use crate::tensor::Tensor;
use std::ffi::c_void;

/// Flag of `idxc_index_k_write` and `idxc_index_q_quantize`: rotate by the orthonormal Hadamard matrix of `dim`
/// (a power of two) before quantising. Keys and queries must agree.
pub const IDXC_FLAG_HADAMARD: u32 = 1;
/// Flag of `idxc_index_k_write` and `idxc_index_q_quantize`: round scales up to a power of two.
pub const IDXC_FLAG_POW2_SCALE: u32 = 2;

/// Arguments of `idxc_index_k_write`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_index_k_write_desc {
    /// `sizeof(idxc_index_k_write_desc)`, set by `IDXC_INDEX_K_WRITE_DESC_INIT`.
    pub struct_size: u32,
    /// `IDXC_FLAG_HADAMARD`, `IDXC_FLAG_POW2_SCALE`.
    pub flags: u32,
    /// bfloat16 or float32 `[tokens, dim]`: new keys, normalised and rotated.
    pub k: *const idxc_tensor,
    /// int32 or int64 `[tokens]`: `page * 64 + offset`; -1 skips the token.
    pub slots: *const idxc_tensor,
    /// Written: uint8 pages as in `idxc_indexer_desc.k`.
    pub pages: *const idxc_tensor,
}

/// Arguments of `idxc_index_q_quantize`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_index_q_quantize_desc {
    /// `sizeof(idxc_index_q_quantize_desc)`, set by `IDXC_INDEX_Q_QUANTIZE_DESC_INIT`.
    pub struct_size: u32,
    /// `IDXC_FLAG_HADAMARD`, `IDXC_FLAG_POW2_SCALE`.
    pub flags: u32,
    /// bfloat16 or float32 `[rows, heads, dim]`.
    pub q: *const idxc_tensor,
    /// float32 `[rows, heads]`: head weights as the model gives them.
    pub weights: *const idxc_tensor,
    /// e4m3 `[rows, heads, dim]`, written.
    pub q_out: *const idxc_tensor,
    /// float32 `[rows, heads]`, written: `weights * scale * q_scale`. May be `weights` itself.
    pub weights_out: *const idxc_tensor,
    /// Folded into the weights. 0 means `dim^-0.5 * heads^-0.5`.
    pub scale: f32,
    /// 0.
    pub reserved: u32,
}

/// Arguments of `idxc_topk`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_topk_desc {
    /// `sizeof(idxc_topk_desc)`, set by `IDXC_TOPK_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// float32 or bfloat16 `[rows, columns]`.
    pub logits: *const idxc_tensor,
    /// int32 `[rows]`: first column that counts; indices count from it. NULL: 0.
    pub row_start: *const idxc_tensor,
    /// int32 `[rows]`: one past the last column that counts. NULL: all.
    pub row_end: *const idxc_tensor,
    /// int32 `[rows, k]`, written; `k` from 1 to 4096.
    pub indices: *const idxc_tensor,
}

/// Arguments of `idxc_indices_to_slots`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_indices_to_slots_desc {
    /// `sizeof(idxc_indices_to_slots_desc)`, set by `IDXC_INDICES_TO_SLOTS_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// int32 `[rows, k]`, logical positions.
    pub indices: *const idxc_tensor,
    /// int32 `[requests, max_pages]`. NULL: contiguous, `slot = row_start[r] + index`.
    pub block_table: *const idxc_tensor,
    /// int32 `[rows]`: the request of each row, -1 for a padding row. NULL: rows are split evenly over the requests.
    pub row_request: *const idxc_tensor,
    /// int32 `[rows]`, contiguous only. NULL: 0.
    pub row_start: *const idxc_tensor,
    /// int32 `[rows, k]`, written: `table[request][i / page_size] * page_size + i % page_size`; -1 stays -1. May be
    /// `indices` itself.
    pub slots: *const idxc_tensor,
    /// Tokens a page. Unused (0) without `block_table`.
    pub page_size: i64,
}

/// Arguments of `idxc_kv_write`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_kv_write_desc {
    /// `sizeof(idxc_kv_write_desc)`, set by `IDXC_KV_WRITE_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// bfloat16 or float32 `[tokens, d_qk]`: latent, then rope part.
    pub kv: *const idxc_tensor,
    /// int32 or int64 `[tokens]`: `page * page_size + offset`; -1 skips the token.
    pub slots: *const idxc_tensor,
    /// Written. uint8 `[pages, page_size, 656]` (d_qk 576: 512 e4m3, 4 float32 scales, 64 bfloat16), or bfloat16 or
    /// float32 `[pages, page_size, d_qk]`. An axis of extent 1 before the last is accepted.
    pub pages: *const idxc_tensor,
}

/// Arguments of `idxc_distill`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_distill_desc {
    /// `sizeof(idxc_distill_desc)`, set by `IDXC_DISTILL_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// bfloat16 or float32 `[rows, heads, dim]`: queries of the Full layer's indexer, as trained, not quantised.
    pub q: *const idxc_tensor,
    /// bfloat16 or float32 `[keys, dim]`: its keys.
    pub k: *const idxc_tensor,
    /// float32 `[rows, heads]`: its head weights, with every scale folded in (`dim^-0.5 * heads^-0.5`).
    pub weights: *const idxc_tensor,
    /// int32 `[rows]`: first key that the row sees; positions count from it. NULL: 0.
    pub row_start: *const idxc_tensor,
    /// int32 `[rows]`: one past the last key that the row sees. NULL: all keys. A row that sees nothing takes no part
    /// and nothing of it is read.
    pub row_end: *const idxc_tensor,
    /// int32 `[rows, topk]`, positions in any order: the loss restricted to them. -1 is skipped, a row of nothing else
    /// takes no part, and a position that is there twice counts twice. NULL: the dense loss, over all that a row sees.
    pub indices: *const idxc_tensor,
    /// float32 `[rows, columns]` by position, or `[rows, topk]` beside `indices`: what the served layer attends to,
    /// summed over its heads. Not negative, and not 0 for all that a row sees; normalised inside. NULL: computed from
    /// the next three.
    pub target: *const idxc_tensor,
    /// bfloat16 or float32 `[rows, attention_heads, d_qk]`: queries of the served layer. NULL with `target`.
    pub attention_q: *const idxc_tensor,
    /// bfloat16 or float32 `[keys, d_qk]`: its KV rows. NULL with `target`.
    pub kv: *const idxc_tensor,
    /// float32 `[rows, attention_heads]`: natural-log sum of exponentials of its scaled scores, as
    /// `idxc_sparse_attention` gives it. NULL with `target`.
    pub lse: *const idxc_tensor,
    /// float32 `[1]`, added to.
    pub loss: *const idxc_tensor,
    /// float32 `[rows, heads, dim]`, added to. NULL: not wanted.
    pub grad_q: *const idxc_tensor,
    /// float32 `[keys, dim]`, added to. NULL: not wanted.
    pub grad_k: *const idxc_tensor,
    /// float32 `[rows, heads]`, added to. NULL: not wanted.
    pub grad_weights: *const idxc_tensor,
    /// Multiplies `attention_q·kv`. Finite and positive; unused with `target`.
    pub softmax_scale: f32,
    /// The served layer's share of the loss: `1 / (m + 1)` for a Full layer and the `m` Shared ones that it serves.
    /// Finite and positive.
    pub layer_weight: f32,
}

// SAFETY: repr(C), flags at byte 4, pointers in 8-byte cells; the two numbers share the last one. NULL and 0 are the
// defaults.
unsafe impl Descriptor for idxc_distill_desc {
    const NAME: &'static str = "idxc_distill_desc";
}
// SAFETY: repr(C), flags at byte 4, pointers in 8-byte cells; NULL is the default.
unsafe impl Descriptor for idxc_index_k_write_desc {
    const NAME: &'static str = "idxc_index_k_write_desc";
    const FLAGS: u32 = IDXC_FLAG_HADAMARD | IDXC_FLAG_POW2_SCALE;
}
// SAFETY: as above; `scale` and `reserved` share the last cell.
unsafe impl Descriptor for idxc_index_q_quantize_desc {
    const NAME: &'static str = "idxc_index_q_quantize_desc";
    const FLAGS: u32 = IDXC_FLAG_HADAMARD | IDXC_FLAG_POW2_SCALE;
}
// SAFETY: repr(C), flags at byte 4, pointers in 8-byte cells; NULL is the default.
unsafe impl Descriptor for idxc_topk_desc {
    const NAME: &'static str = "idxc_topk_desc";
}
// SAFETY: as above, and one 8-byte integer.
unsafe impl Descriptor for idxc_indices_to_slots_desc {
    const NAME: &'static str = "idxc_indices_to_slots_desc";
}
// SAFETY: repr(C), flags at byte 4, pointers in 8-byte cells; NULL is the default.
unsafe impl Descriptor for idxc_kv_write_desc {
    const NAME: &'static str = "idxc_kv_write_desc";
}

/// Reads `idxc_indexer_desc`.
///
/// # Safety
/// `desc` is NULL or valid, with valid tensors.
pub(super) unsafe fn indexer_args<'a>(
    desc: *const idxc_indexer_desc,
    access: Access,
) -> Result<IndexerArgs<'a>> {
    // SAFETY: by this function's contract, here and below.
    unsafe {
        let d = descriptor(desc, "desc")?;
        Ok(IndexerArgs {
            q: tensor(d.q, "q", access)?,
            weights: tensor(d.weights, "weights", access)?,
            k: tensor(d.k, "k", access)?,
            k_scale: optional_tensor(d.k_scale, "k_scale", access)?,
            map: KeyMapArgs {
                block_table: optional_tensor(d.block_table, "block_table", access)?,
                row_request: optional_tensor(d.row_request, "row_request", access)?,
                row_start: optional_tensor(d.row_start, "row_start", access)?,
                row_end: optional_tensor(d.row_end, "row_end", access)?,
            },
        })
    }
}

/// Reads `idxc_attention_desc`; `indices` gives the indices and their form for the descriptor's block table number.
///
/// # Safety
/// `desc` is NULL or valid, with valid tensors.
pub(super) unsafe fn attention_args<'a>(
    desc: *const idxc_attention_desc,
    indices: impl FnOnce(u64) -> Result<(Tensor<'a>, IndexForm)>,
    access: Access,
) -> Result<SparseAttentionArgs<'a>> {
    // SAFETY: by this function's contract, here and below.
    unsafe {
        let d = descriptor(desc, "desc")?;
        if d.reserved != 0 {
            return Err(Error::invalid("desc->reserved", 0, d.reserved));
        }
        let (indices, form) = indices(d.table_id)?;
        Ok(SparseAttentionArgs {
            q: tensor(d.q, "q", access)?,
            kv: tensor(d.kv, "kv", access)?,
            indices,
            form,
            map: KeyMapArgs {
                block_table: optional_tensor(d.block_table, "block_table", access)?,
                row_request: optional_tensor(d.row_request, "row_request", access)?,
                row_start: optional_tensor(d.row_start, "row_start", access)?,
                row_end: None,
            },
            row_topk: optional_tensor(d.row_topk, "row_topk", access)?,
            sink: optional_tensor(d.sink, "sink", access)?,
            softmax_scale: d.softmax_scale,
            out: tensor(d.out, "out", access)?,
            lse: optional_tensor(d.lse, "lse", access)?,
            probs: optional_tensor(d.probs, "probs", access)?,
        })
    }
}

/// Quantises new indexer keys and writes them to their pages. A host calls it for Full layers only: Shared layers own
/// no index K.
///
/// Fp8 pages: per token `scale = max(max|k|, 1e-4) / 448`, as servers store it, and values `k / scale` rounded to nearest
/// even.
/// For bfloat16 pages use `idxc_kv_write`.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any; two calls must not write the same slots at once.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a slot out of range, before anything is written).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_index_k_write(
    context: *const idxc_context,
    desc: *const idxc_index_k_write_desc,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_index_k_write", || {
        // SAFETY: by this function's contract.
        let (context, op) = unsafe {
            let context = handle(context, "context")?;
            let d = descriptor(desc, "desc")?;
            let args = IndexKWriteArgs {
                k: tensor(d.k, "k", Access::Elements)?,
                slots: tensor(d.slots, "slots", Access::Elements)?,
                pages: tensor(d.pages, "pages", Access::Elements)?,
                hadamard: d.flags & IDXC_FLAG_HADAMARD != 0,
                pow2_scale: d.flags & IDXC_FLAG_POW2_SCALE != 0,
            };
            (context, args.check()?)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.index_k_write(&op, stream)
    })
}

/// Quantises indexer queries to e4m3, one scale per row and head, and folds that scale and `scale` into the head
/// weights.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_index_q_quantize(
    context: *const idxc_context,
    desc: *const idxc_index_q_quantize_desc,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_index_q_quantize", || {
        // SAFETY: by this function's contract.
        let (context, op) = unsafe {
            let context = handle(context, "context")?;
            let d = descriptor(desc, "desc")?;
            if d.reserved != 0 {
                return Err(Error::invalid("desc->reserved", 0, d.reserved));
            }
            let q = tensor(d.q, "q", Access::Elements)?;
            let scale = match (d.scale, q.shape()) {
                (0.0, &[_, heads, dim]) => 1.0 / ((heads as f32).sqrt() * (dim as f32).sqrt()),
                _ => d.scale,
            };
            let args = IndexQQuantizeArgs {
                q,
                weights: tensor(d.weights, "weights", Access::Elements)?,
                scale,
                hadamard: d.flags & IDXC_FLAG_HADAMARD != 0,
                pow2_scale: d.flags & IDXC_FLAG_POW2_SCALE != 0,
                q_out: tensor(d.q_out, "q_out", Access::Elements)?,
                weights_out: tensor(d.weights_out, "weights_out", Access::Elements)?,
            };
            (context, args.check()?)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.index_q_quantize(&op, stream)
    })
}

/// Lightning-indexer scores over contiguous keys:
/// `logits[r, s] = k_scale[j] * sum_h weights[r, h] * max(q[r, h]·k[j], 0)`, `j = row_start[r] + s`.
/// Columns past the row's end are -inf.
///
/// The same bits come out on every CPU and, but for float8 of 128 dimensions on Hopper, on every card. There tensor cores
/// multiply, which cut products some 13 bits below the largest of 32: scores are off by 1e-4 to 1e-3 of their norm. They are
/// the same on every run and whatever the other rows are, but decode calls (see `idxc_select`) may round otherwise than
/// others. `idxc_select` is exact by the scores that the same call gives here in float32.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a row range outside the keys).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_indexer_logits(
    context: *const idxc_context,
    desc: *const idxc_indexer_desc,
    logits: *const idxc_tensor,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_indexer_logits", || {
        // SAFETY: by this function's contract.
        unsafe { indexer_logits(context, desc, logits, false, Stream::from_raw(stream)) }
    })
}

/// Lightning-indexer scores over paged keys: as `idxc_indexer_logits`, with
/// `j = block_table[request, s / 64] * 64 + s % 64`. Decode with several queries a request and prefill chunks are both
/// just rows.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a page or length out of range).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_paged_indexer_logits(
    context: *const idxc_context,
    desc: *const idxc_indexer_desc,
    logits: *const idxc_tensor,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_paged_indexer_logits", || {
        // SAFETY: by this function's contract.
        unsafe { indexer_logits(context, desc, logits, true, Stream::from_raw(stream)) }
    })
}

/// # Safety
/// As [`idxc_indexer_logits`].
unsafe fn indexer_logits(
    context: *const idxc_context,
    desc: *const idxc_indexer_desc,
    logits: *const idxc_tensor,
    paged: bool,
    stream: Stream,
) -> Result<()> {
    // SAFETY: by this function's contract.
    let (context, args, logits) = unsafe {
        (
            handle(context, "context")?,
            indexer_args(desc, Access::Elements)?,
            tensor(logits, "logits", Access::Elements)?,
        )
    };
    match (paged, args.map.block_table) {
        (true, None) => return Err(Error::invalid("block_table", "a tensor", "NULL")),
        (false, Some(_)) => {
            return Err(Error::invalid("block_table", "NULL (keys are contiguous)", "a tensor"));
        }
        _ => {}
    }
    let op = args.check_logits(logits)?;
    context.0.indexer_logits(&op, stream)
}

/// Bytes of workspace that `idxc_topk` needs for these shapes, or for smaller ones. Data pointers may be NULL.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID` (argument named).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_topk_workspace(
    context: *const idxc_context,
    desc: *const idxc_topk_desc,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_topk_workspace", || {
        out_pointer(size, "size")?;
        // SAFETY: by this function's contract; `size` was checked.
        unsafe {
            let context = handle(context, "context")?;
            let op = topk_args(desc, Access::ShapeOnly)?.check()?;
            size.write(context.0.topk_workspace(&op));
        }
        Ok(())
    })
}

/// # Safety
/// `desc` is NULL or valid, with valid tensors.
unsafe fn topk_args<'a>(desc: *const idxc_topk_desc, access: Access) -> Result<TopKArgs<'a>> {
    // SAFETY: by this function's contract.
    unsafe {
        let d = descriptor(desc, "desc")?;
        Ok(TopKArgs {
            logits: tensor(d.logits, "logits", access)?,
            row_start: optional_tensor(d.row_start, "row_start", access)?,
            row_end: optional_tensor(d.row_end, "row_end", access)?,
            indices: tensor(d.indices, "indices", access)?,
        })
    }
}

/// The `k` best columns of each row: exact; ties go to the lowest column; ascending, then -1.
///
/// NaN counts as -inf, and -0 equals +0. A row of fewer than `k` columns takes them all.
///
/// - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
/// - Threads: any; each call needs its own workspace.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_topk(
    context: *const idxc_context,
    desc: *const idxc_topk_desc,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> idxc_status {
    let _ = (workspace, workspace_size); // No backend needs any so far.
    guard("idxc_topk", || {
        // SAFETY: by this function's contract.
        let (context, op) =
            unsafe { (handle(context, "context")?, topk_args(desc, Access::Elements)?.check()?) };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.topk(&op, stream)
    })
}

/// Translates logical indices to slots of a paged or contiguous KV store; -1 stays -1.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: an index past its request's pages).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_indices_to_slots(
    context: *const idxc_context,
    desc: *const idxc_indices_to_slots_desc,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_indices_to_slots", || {
        // SAFETY: by this function's contract.
        let (context, op) = unsafe {
            let context = handle(context, "context")?;
            let d = descriptor(desc, "desc")?;
            let page_size = usize::try_from(d.page_size)
                .map_err(|_| Error::invalid("page_size", "a number of tokens", d.page_size))?;
            let args = IndicesToSlotsArgs {
                indices: tensor(d.indices, "indices", Access::Elements)?,
                map: KeyMapArgs {
                    block_table: optional_tensor(d.block_table, "block_table", Access::Elements)?,
                    row_request: optional_tensor(d.row_request, "row_request", Access::Elements)?,
                    row_start: optional_tensor(d.row_start, "row_start", Access::Elements)?,
                    row_end: None,
                },
                page_size,
                slots: tensor(d.slots, "slots", Access::Elements)?,
            };
            (context, args.check()?)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.indices_to_slots(&op, stream)
    })
}

/// Writes new KV rows to their pages, quantising them for the 656-byte fp8 layout: per 128 latent values one scale,
/// `max(max|v| / 448, 1e-4)` rounded up to a power of two, as servers store it.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any; two calls must not write the same slots at once.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a slot out of range, before anything is written).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_kv_write(
    context: *const idxc_context,
    desc: *const idxc_kv_write_desc,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_kv_write", || {
        // SAFETY: by this function's contract.
        let (context, op) = unsafe {
            let context = handle(context, "context")?;
            let d = descriptor(desc, "desc")?;
            let args = KvWriteArgs {
                kv: tensor(d.kv, "kv", Access::Elements)?,
                slots: tensor(d.slots, "slots", Access::Elements)?,
                pages: tensor(d.pages, "pages", Access::Elements)?,
            };
            (context, args.check()?)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.kv_write(&op, stream)
    })
}

/// Bytes of workspace that `idxc_sparse_attention` needs for these shapes, or for smaller ones. Data pointers may be
/// NULL.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID` (argument named).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_sparse_attention_workspace(
    context: *const idxc_context,
    desc: *const idxc_attention_desc,
    indices: *const idxc_tensor,
    form: i32,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_sparse_attention_workspace", || {
        out_pointer(size, "size")?;
        // SAFETY: by this function's contract; `size` was checked.
        unsafe {
            let context = handle(context, "context")?;
            let form = index_form(form, "form")?;
            let indices = tensor(indices, "indices", Access::ShapeOnly)?;
            let op = attention_args(desc, |_| Ok((indices, form)), Access::ShapeOnly)?.check()?;
            size.write(context.0.sparse_attention_workspace(&op));
        }
        Ok(())
    })
}

/// Sparse MLA attention: each row attends to the KV rows that its indices name.
/// `out[r, h] = sum_i softmax_i(softmax_scale * q[r, h]·kv[i]) * kv[i][:d_v]`; a sink adds `exp(sink[h])` to the
/// denominator.
///
/// - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
/// - Threads: any; each call needs its own workspace.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: an index out of range), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_sparse_attention(
    context: *const idxc_context,
    desc: *const idxc_attention_desc,
    indices: *const idxc_tensor,
    form: i32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_sparse_attention", || {
        // SAFETY: by this function's contract.
        let (context, op, workspace) = unsafe {
            let context = handle(context, "context")?;
            let form = index_form(form, "form")?;
            let indices = tensor(indices, "indices", Access::Elements)?;
            let op = attention_args(desc, |_| Ok((indices, form)), Access::Elements)?.check()?;
            (context, op, super::workspace(&context.0, workspace, workspace_size)?)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.sparse_attention(&op, workspace, stream)
    })
}

/// How much of each row of `a` is also in `b`: `overlap[r] = |a[r] ∩ b[r]| / |a[r]|`, 1 for a row of `a` without any
/// index. A diagnostic of how alike two layers select; the paper found that it does not choose layers well.
///
/// `a`, `b`: int32 `[rows, k]` (widths may differ), each row ascending with a -1 tail. `overlap`: float32 `[rows]`.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU: a row that does not ascend).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_indices_overlap(
    context: *const idxc_context,
    a: *const idxc_tensor,
    b: *const idxc_tensor,
    overlap: *const idxc_tensor,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_indices_overlap", || {
        // SAFETY: by this function's contract.
        let (context, op) = unsafe {
            let context = handle(context, "context")?;
            let a = tensor(a, "a", Access::Elements)?;
            let b = tensor(b, "b", Access::Elements)?;
            let out = tensor(overlap, "overlap", Access::Elements)?;
            (context, Overlap::check(a, b, out)?)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        context.0.overlap(&op, stream)
    })
}

/// # Safety
/// `desc` is NULL or valid, with valid tensors.
unsafe fn distill_args<'a>(
    desc: *const idxc_distill_desc,
    access: Access,
) -> Result<DistillArgs<'a>> {
    // SAFETY: by this function's contract.
    unsafe {
        let d = descriptor(desc, "desc")?;
        Ok(DistillArgs {
            q: tensor(d.q, "q", access)?,
            k: tensor(d.k, "k", access)?,
            weights: tensor(d.weights, "weights", access)?,
            row_start: optional_tensor(d.row_start, "row_start", access)?,
            row_end: optional_tensor(d.row_end, "row_end", access)?,
            indices: optional_tensor(d.indices, "indices", access)?,
            target: optional_tensor(d.target, "target", access)?,
            attention_q: optional_tensor(d.attention_q, "attention_q", access)?,
            kv: optional_tensor(d.kv, "kv", access)?,
            lse: optional_tensor(d.lse, "lse", access)?,
            softmax_scale: d.softmax_scale,
            layer_weight: d.layer_weight,
            loss: tensor(d.loss, "loss", access)?,
            grad_q: optional_tensor(d.grad_q, "grad_q", access)?,
            grad_k: optional_tensor(d.grad_k, "grad_k", access)?,
            grad_weights: optional_tensor(d.grad_weights, "grad_weights", access)?,
        })
    }
}

/// Bytes of workspace that `idxc_distill` needs for these shapes, or for smaller ones. On the CPU they do not grow with
/// the number of keys; on CUDA they hold one or two float32 for each key (with `indices`: index, and key for `grad_k`) of
/// 1024 rows. Data pointers may be NULL.
///
/// - Ownership: everything stays the caller's.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID` (argument named).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_distill_workspace(
    context: *const idxc_context,
    desc: *const idxc_distill_desc,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_distill_workspace", || {
        out_pointer(size, "size")?;
        // SAFETY: by this function's contract; `size` was checked.
        unsafe {
            let context = handle(context, "context")?;
            let op = distill_args(desc, Access::ShapeOnly)?.check()?;
            size.write(context.0.distill_workspace(&op)?);
        }
        Ok(())
    })
}

/// Training-aware IndexCache: one served layer's part of the multi-layer distillation loss of a Full layer's indexer
/// (arXiv 2603.12201, Eq. 1), and its gradients.
///
/// With scores `I[t, s] = sum_h weights[t, h] * max(q[t, h]·k[s], 0)`, their softmax `Q[t] = softmax(I[t])` and the
/// served layer's attention `P[t, s] = sum_h exp(softmax_scale * attention_q[t, h]·kv[s] - lse[t, h])`, divided by its
/// sum, both over the positions that row `t` sees or over its `indices`, adds to `loss`
/// `layer_weight * mean_t sum_s P[t, s] * (ln P[t, s] - ln Q[t, s])`, where `0 ln 0 = 0`. The mean is over the rows that
/// have a position. The gradients are those of this loss by `q`, `k` and `weights`; that of `max(x, 0)` at 0 is 0.
///
/// All outputs are added to. A Full layer that serves itself and `m` Shared layers is `m + 1` calls with its own `q`, `k`
/// and `weights`, each as soon as that layer's attention is there, so memory does not grow with `m`; nor does it ever
/// hold a number for each row and key. The same bits come out every time, on the CPU with every number of threads.
///
/// - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
/// - Threads: any; each call needs its own workspace and outputs.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU: an index or range outside what the row sees, an input that is NaN
///   or infinite where a row uses it, a target below 0 or without a sum, scores that overflow; nothing was written),
///   `IDXC_ERR_BUFFER_TOO_SMALL` (workspace). CUDA cannot refuse what is in device memory, but for indices and ranges under
///   `IDXC_CHECKED`: it makes `loss` NaN, reaches no address, and the row that has it adds to no gradient.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_distill(
    context: *const idxc_context,
    desc: *const idxc_distill_desc,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_distill", || {
        // SAFETY: by this function's contract.
        let (context, op, workspace, stream) = unsafe {
            let context = handle(context, "context")?;
            let op = distill_args(desc, Access::Elements)?.check()?;
            let workspace = super::workspace(&context.0, workspace, workspace_size)?;
            (context, op, workspace, Stream::from_raw(stream))
        };
        context.0.distill(&op, workspace, stream)
    })
}
