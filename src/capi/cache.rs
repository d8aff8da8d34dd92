//! `idxc_cache`: the index cache and the calls of the per-layer loop.

use super::context::idxc_context;
use super::ops::{attention_args, indexer_args};
use super::plan::idxc_plan;
use super::types::{
    Access, Descriptor, descriptor, give_struct, idxc_attention_desc, idxc_device, idxc_dtype,
    idxc_indexer_desc, idxc_tensor, index_form, optional_tensor, tensor,
};
use super::types::{IDXC_DEVICE_CPU, IDXC_DEVICE_CUDA};
use super::{
    IDXC_LOG_WARNING, give, guard, handle, handle_mut, idxc_status, log, out_pointer, take,
};
use crate::cache::{Cache, CacheShape};
use crate::context::Stream;
use crate::error::{Error, Result};
use crate::ops::IndexForm;
use crate::tensor::{Device, Tensor};
use std::ffi::c_void;

/// Index-cache buffers and state of all lanes. One thread at a time.
pub struct idxc_cache(Cache);

/// Size and memory of a cache.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_cache_desc {
    /// `sizeof(idxc_cache_desc)`, set by `IDXC_CACHE_DESC_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Independent copies: one a micro-batch, and one for a draft model. 0 means 1.
    pub lanes: i32,
    /// Largest number of rows a step, padding rows included.
    pub max_rows: i32,
    /// int32 `[lanes, max_rows, topk]` on the context's device, for the library to write: the host's own buffer, used
    /// without a copy. NULL: the library allocates.
    pub buffer: *const idxc_tensor,
}

/// What a lane holds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_lane_info {
    /// `sizeof(idxc_lane_info)`, set by `IDXC_LANE_INFO_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// The step's number, as given to `idxc_step_begin`.
    pub step_id: u64,
    /// Block table of slot-form indices; 0 if not tracked.
    pub table_id: u64,
    /// Rows of the step.
    pub rows: i32,
    /// The Full layer whose indices the lane holds, -1 for none yet.
    pub source_layer: i32,
    /// `IDXC_FORM_…`.
    pub form: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: repr(C), two 4-byte integers in one cell and a pointer; zero is the default.
unsafe impl Descriptor for idxc_cache_desc {
    const NAME: &'static str = "idxc_cache_desc";
}
// SAFETY: repr(C), integers in 8-byte cells.
unsafe impl Descriptor for idxc_lane_info {
    const NAME: &'static str = "idxc_lane_info";
}

fn index(value: i32, name: &'static str) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::invalid(name, "a number not negative", value))
}

fn layer_id(value: i32) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::invalid("layer", "a number not negative", value))
}

fn cache_shape(d: &idxc_cache_desc) -> Result<CacheShape> {
    Ok(CacheShape {
        lanes: index(d.lanes, "desc->lanes")?.max(1),
        max_rows: index(d.max_rows, "desc->max_rows")?,
    })
}

/// Bytes of device memory that a cache of this size holds (`desc->buffer` is not looked at).
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
pub unsafe extern "C" fn idxc_cache_size(
    plan: *const idxc_plan,
    desc: *const idxc_cache_desc,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_cache_size", || {
        out_pointer(size, "size")?;
        // SAFETY: by this function's contract; `size` was checked.
        unsafe {
            let plan = handle(plan, "plan")?;
            size.write(cache_shape(&descriptor(desc, "desc")?)?.bytes(&plan.0)?);
        }
        Ok(())
    })
}

/// Makes an index cache for one model on one rank. Layers whose selection the library's own operations cannot do (blocks
/// of tokens, pooled keys) are named to the log callback: the host's kernels serve them, through `idxc_publish`.
///
/// - Ownership: `*out` is the caller's, for `idxc_cache_destroy`. It keeps what it needs of `context` and `plan` alive.
///   `desc->buffer` stays the caller's and must outlive the cache.
/// - Threads: any; the cache itself is for one thread at a time.
/// - Stream: none.
/// - Graph capture: not allowed; allocates. Addresses never change after it.
/// - Errors: `IDXC_ERR_INVALID` (argument named), `IDXC_ERR_OUT_OF_MEMORY`. `*out` is NULL after an error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_cache_create(
    context: *const idxc_context,
    plan: *const idxc_plan,
    desc: *const idxc_cache_desc,
    out: *mut *mut idxc_cache,
) -> idxc_status {
    guard("idxc_cache_create", || {
        out_pointer(out, "out")?;
        // SAFETY: `out` was checked; the rest by this function's contract.
        unsafe {
            out.write(std::ptr::null_mut());
            let context = handle(context, "context")?;
            let plan = handle(plan, "plan")?;
            let d = descriptor(desc, "desc")?;
            let buffer = optional_tensor(d.buffer, "buffer", Access::Elements)?;
            let cache = Cache::new(context.0.clone(), plan.0.clone(), cache_shape(&d)?, buffer)?;
            if let Some(e) = cache.unsupported() {
                log(IDXC_LOG_WARNING, &e.message);
            }
            give(out, idxc_cache(cache));
        }
        Ok(())
    })
}

/// Frees a cache. NULL is fine.
///
/// - Ownership: takes `cache`, which must not be used again; a host-owned buffer stays the host's.
/// - Threads: any, when no other thread is in a call with this handle.
/// - Stream: CUDA: work that uses the cache must have finished.
/// - Graph capture: not allowed.
/// - Errors: none.
///
/// # Safety
/// `cache` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_cache_destroy(cache: *mut idxc_cache) {
    // SAFETY: by this function's contract.
    unsafe { take("idxc_cache_destroy", cache) }
}

/// Begins a forward pass of `rows` rows (padding rows included) on a lane. Whatever the lane held is stale from here
/// on. `step_id` is the host's number for the pass; it must differ from the lane's current one.
///
/// - Ownership: nothing changes hands.
/// - Threads: the cache's.
/// - Stream: none; host only.
/// - Graph capture: allowed; captured work keeps the rows of the capture, and a replay needs no call.
/// - Errors: `IDXC_ERR_INVALID` (lane, rows above `max_rows`, a repeated step number).
///
/// # Safety
/// `cache` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_step_begin(
    cache: *mut idxc_cache,
    lane: i32,
    rows: i32,
    step_id: u64,
) -> idxc_status {
    guard("idxc_step_begin", || {
        // SAFETY: by this function's contract.
        let cache = unsafe { handle_mut(cache, "cache") }?;
        cache.0.step_begin(index(lane, "lane")?, index(rows, "rows")?, step_id)
    })
}

/// Begins the next draft iteration on a lane that holds an MTP layer's indices, and keeps them: row `i` of the new step
/// uses what row `from[i]` of the last one selected. For plans with `index_share_for_mtp_iteration` only; indices never
/// pass from the target model to a draft. In this step `idxc_select` on that MTP layer does nothing (the host still
/// writes the layer's index K).
///
/// `from`: int32 `[rows]` on the context's device, strictly ascending, then -1 for padding rows: the last *accepted*
/// row of each request, not the last padded one.
///
/// - Ownership: everything stays the caller's.
/// - Threads: the cache's.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; not an MTP layer's indices; a plan that does not share),
///   `IDXC_ERR_STALE` (nothing to carry).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_step_carry(
    cache: *mut idxc_cache,
    lane: i32,
    from: *const idxc_tensor,
    step_id: u64,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_step_carry", || {
        // SAFETY: by this function's contract.
        let (cache, from) =
            unsafe { (handle_mut(cache, "cache")?, tensor(from, "from", Access::Elements)?) };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.0.step_carry(index(lane, "lane")?, from, step_id, stream)
    })
}

/// Bytes of workspace that `idxc_select` needs for these shapes, or for smaller ones. Data pointers may be NULL.
///
/// - Ownership: everything stays the caller's.
/// - Threads: the cache's.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID` (argument named).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_select_workspace(
    cache: *const idxc_cache,
    desc: *const idxc_indexer_desc,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_select_workspace", || {
        out_pointer(size, "size")?;
        // SAFETY: by this function's contract; `size` was checked.
        unsafe {
            let cache = handle(cache, "cache")?;
            size.write(cache.0.select_workspace(indexer_args(desc, Access::ShapeOnly)?)?);
        }
        Ok(())
    })
}

/// The indexer's step of one layer. On a Full layer: scores the row's tokens, writes the `topk` best to the lane, exact,
/// ties to the lowest position, ascending, then -1. On a Shared layer: does nothing but check that the indices it will
/// reuse are there; `desc` may be NULL. A row that sees at most `topk` tokens takes them all, unscored.
///
/// Never holds more than O(rows * topk) scores; on Hopper up to 8192 a row where no row can see more, and for decode (at
/// most 8 rows a request; with `row_request` on average), which has kernels of its own there, up to 128 MiB of them.
///
/// - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
/// - Threads: the cache's.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed; which layers are Full is fixed by the plan, lengths are read on the device.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: a page or length out of range, before anything is written),
///   `IDXC_ERR_STALE` (a Shared layer without indices, or no step), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace),
///   `IDXC_ERR_UNSUPPORTED` (see `idxc_cache_create`).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_select(
    cache: *mut idxc_cache,
    lane: i32,
    layer: i32,
    desc: *const idxc_indexer_desc,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_select", || {
        // SAFETY: by this function's contract.
        let (cache, workspace) = unsafe {
            let cache = handle_mut(cache, "cache")?;
            let workspace = super::workspace(cache.0.context(), workspace, workspace_size)?;
            (cache, workspace)
        };
        // SAFETY: by this function's contract.
        let args = || unsafe { indexer_args(desc, Access::Elements) };
        let (lane, layer) = (index(lane, "lane")?, layer_id(layer)?);
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.0.select(lane, layer, args, workspace, stream)
    })
}

/// Describes the lane's buffer for this step, int32 `[rows, topk]`, for the host to write before `idxc_publish`.
///
/// - Ownership: memory, shape and strides are the cache's; valid until the lane's next step.
/// - Threads: the cache's.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_STALE` (no step).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_slot(
    cache: *const idxc_cache,
    lane: i32,
    out: *mut idxc_tensor,
) -> idxc_status {
    guard("idxc_slot", || {
        out_pointer(out, "out")?;
        // SAFETY: by this function's contract.
        let cache = unsafe { handle(cache, "cache") }?;
        let lane = index(lane, "lane")?;
        let value = c_tensor(&cache.0, lane, &cache.0.slot(lane)?)?;
        // SAFETY: checked above.
        unsafe { out.write(value) };
        Ok(())
    })
}

/// Puts indices in place of an `idxc_select`: the host's own indexer computed them, or they were received from the
/// pipeline stage before (`layer` is then the Full layer that selected them). `indices`: int32 `[rows, topk]`, -1 for
/// none, any order; NULL means that the host wrote the buffer of `idxc_slot` itself.
///
/// - Ownership: everything stays the caller's; another tensor than the slot is copied.
/// - Threads: the cache's.
/// - Stream: CUDA: the copy runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; a Shared layer of this stage), `IDXC_ERR_STALE` (no step).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_publish(
    cache: *mut idxc_cache,
    lane: i32,
    layer: i32,
    indices: *const idxc_tensor,
    form: i32,
    table_id: u64,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_publish", || {
        // SAFETY: by this function's contract.
        let (cache, indices) = unsafe {
            (handle_mut(cache, "cache")?, optional_tensor(indices, "indices", Access::Elements)?)
        };
        let (lane, layer) = (index(lane, "lane")?, layer_id(layer)?);
        let form = index_form(form, "form")?;
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.0.publish(lane, layer, indices, form, table_id, stream)
    })
}

/// Describes the indices that `layer` uses, its own or reused: int32 `[rows, topk]`. Their form is in
/// `idxc_lane_get_info`.
///
/// - Ownership: memory, shape and strides are the cache's; valid until the lane's next step, and overwritten by the
///   next Full layer.
/// - Threads: the cache's.
/// - Stream: none.
/// - Graph capture: allowed; host only. The address never changes.
/// - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_STALE` (the layer's source has not written them in this step).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_indices(
    cache: *const idxc_cache,
    lane: i32,
    layer: i32,
    out: *mut idxc_tensor,
) -> idxc_status {
    guard("idxc_indices", || {
        out_pointer(out, "out")?;
        // SAFETY: by this function's contract.
        let cache = unsafe { handle(cache, "cache") }?;
        let lane = index(lane, "lane")?;
        let (indices, _) = cache.0.indices(lane, layer_id(layer)?)?;
        let value = c_tensor(&cache.0, lane, &indices)?;
        // SAFETY: checked above.
        unsafe { out.write(value) };
        Ok(())
    })
}

/// Copies the indices that `layer` uses into the host's memory, for the pipeline stage after (see
/// `idxc_plan_info.sends_from_layer`). `out`: int32 `[rows, topk]`. Their form and source are in `idxc_lane_get_info`.
///
/// - Ownership: everything stays the caller's.
/// - Threads: the cache's.
/// - Stream: CUDA: the copy runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named), `IDXC_ERR_STALE`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_export(
    cache: *const idxc_cache,
    lane: i32,
    layer: i32,
    out: *const idxc_tensor,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_export", || {
        // SAFETY: by this function's contract.
        let (cache, out) =
            unsafe { (handle(cache, "cache")?, tensor(out, "out", Access::Elements)?) };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.0.export(index(lane, "lane")?, layer_id(layer)?, out, stream)
    })
}

/// What the lane holds: step, rows, whose indices, in which form.
///
/// - Ownership: `info` is the caller's.
/// - Threads: the cache's.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`, `IDXC_ERR_STALE` (no step).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_lane_get_info(
    cache: *const idxc_cache,
    lane: i32,
    info: *mut idxc_lane_info,
) -> idxc_status {
    guard("idxc_lane_get_info", || {
        // SAFETY: by this function's contract.
        let cache = unsafe { handle(cache, "cache") }?;
        let state = cache.0.state(index(lane, "lane")?)?;
        let value = idxc_lane_info {
            struct_size: 0,
            flags: 0,
            step_id: state.step_id,
            table_id: state.written.map_or(0, |w| w.table_id),
            rows: i32::try_from(state.rows).unwrap_or(i32::MAX),
            source_layer: state.written.map_or(-1, |w| i32::try_from(w.layer).unwrap_or(i32::MAX)),
            form: state.written.map_or(0, |w| w.form as i32),
            reserved: 0,
        };
        // SAFETY: by this function's contract.
        unsafe { give_struct(info, "info", value) }
    })
}

/// Bytes of workspace that `idxc_attend` needs for these shapes, or for smaller ones. Data pointers may be NULL.
///
/// - Ownership: everything stays the caller's.
/// - Threads: the cache's.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID` (argument named).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_attend_workspace(
    cache: *const idxc_cache,
    desc: *const idxc_attention_desc,
    size: *mut usize,
) -> idxc_status {
    guard("idxc_attend_workspace", || {
        out_pointer(size, "size")?;
        // SAFETY: by this function's contract; `size` was checked.
        unsafe {
            let cache = &handle(cache, "cache")?.0;
            let d = descriptor(desc, "desc")?;
            let rows = tensor(d.q, "q", Access::ShapeOnly)?.shape().first().copied().unwrap_or(0);
            // The size does not depend on the form; what the descriptor has no map for must be slots.
            let mapped = !(d.block_table.is_null() && d.row_start.is_null());
            let form = if mapped { IndexForm::Logical } else { IndexForm::Slots };
            let op = attention_args(desc, |_| Ok((cache.rows(rows)?, form)), Access::ShapeOnly)?
                .check()?;
            size.write(cache.context().sparse_attention_workspace(&op));
        }
        Ok(())
    })
}

/// Sparse MLA attention of one layer over the indices it uses, its own or reused. See `idxc_sparse_attention`.
///
/// - Ownership: everything stays the caller's; `workspace` is scratch during the call (CUDA: until `stream` is done).
/// - Threads: the cache's.
/// - Stream: CUDA: runs on `stream`. CPU: done on return, `stream` is ignored.
/// - Graph capture: allowed.
/// - Errors: `IDXC_ERR_INVALID` (argument named; CPU, `IDXC_CHECKED`: an index out of range), `IDXC_ERR_STALE` (no indices for this
///   layer), `IDXC_ERR_FORM` (slots of another block table), `IDXC_ERR_BUFFER_TOO_SMALL` (workspace),
///   `IDXC_ERR_UNSUPPORTED` (see `idxc_cache_create`).
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_attend(
    cache: *const idxc_cache,
    lane: i32,
    layer: i32,
    desc: *const idxc_attention_desc,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> idxc_status {
    guard("idxc_attend", || {
        // SAFETY: by this function's contract.
        let (cache, op, workspace) = unsafe {
            let cache = &handle(cache, "cache")?.0;
            let (lane, layer) = (index(lane, "lane")?, layer_id(layer)?);
            let held = |table_id| cache.indices_under(lane, layer, table_id);
            let op = attention_args(desc, held, Access::Elements)?.check()?;
            let workspace = super::workspace(cache.context(), workspace, workspace_size)?;
            (cache, op, workspace)
        };
        // SAFETY: by this function's contract.
        let stream = unsafe { Stream::from_raw(stream) };
        cache.context().sparse_attention(&op, workspace, stream)
    })
}

/// The lane's tensor as C sees it.
fn c_tensor(cache: &Cache, lane: usize, t: &Tensor<'_>) -> Result<idxc_tensor> {
    let extents = cache.extents(lane)?;
    let (code, bits) = t.dtype().dlpack();
    let device = match t.device() {
        Device::Cpu => idxc_device { device_type: IDXC_DEVICE_CPU, device_id: 0 },
        Device::Cuda(id) => idxc_device { device_type: IDXC_DEVICE_CUDA, device_id: id },
    };
    Ok(idxc_tensor {
        data: t.as_ptr().cast(),
        device,
        ndim: 2,
        dtype: idxc_dtype { code, bits, lanes: 1 },
        // DLPack has no const; nobody may write these.
        shape: extents.shape.as_ptr().cast_mut(),
        strides: extents.strides.as_ptr().cast_mut(),
        byte_offset: 0,
    })
}
