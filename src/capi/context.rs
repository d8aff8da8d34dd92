//! `idxc_context`: one backend on one device.

use super::types::{Descriptor, descriptor, give_struct};
use super::{
    IDXC_LOG_INFO, give, guard, handle, idxc_status, log, out_pointer, quiet_panics_on_this_thread,
    take,
};
use crate::context::{Backend, BackendChoice, Context};
use crate::error::{Error, Result};
use std::ffi::c_char;
use std::sync::Arc;

/// Backend: the best that the build and the machine have.
pub const IDXC_BACKEND_AUTO: i32 = 0;
/// Backend: host memory and host threads.
pub const IDXC_BACKEND_CPU: i32 = 1;
/// Backend: a CUDA device.
pub const IDXC_BACKEND_CUDA: i32 = 2;

/// Flag of `idxc_context_desc`: checked mode, to find a fault. Each CUDA call waits for its stream, copies its index arrays
/// (indices, slots, row bounds, block table) to the host and refuses what is out of range with `IDXC_ERR_INVALID`, before it
/// launches anything, as CPU calls always do. A stream that captures a graph is refused with `IDXC_ERR_UNSUPPORTED`.
/// Without the flag kernels take such an index as absent, and nothing is waited for.
pub const IDXC_CHECKED: u32 = 1;

/// One backend on one device. May be used from any number of threads at once.
pub struct idxc_context(pub(super) Arc<Context>);

/// How to open a context.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_context_desc {
    /// `sizeof(idxc_context_desc)`, set by `IDXC_CONTEXT_DESC_INIT`.
    pub struct_size: u32,
    /// `IDXC_CHECKED`.
    pub flags: u32,
    /// One of `IDXC_BACKEND_…`.
    pub backend: i32,
    /// CUDA and auto: ordinal of the device. CPU: 0.
    pub device_id: i32,
    /// CPU: worker threads, 0 for all cores. Results do not depend on it. CUDA: 0.
    pub threads: i32,
    /// 0.
    pub reserved: i32,
}

/// What a context turned out to be.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct idxc_context_info {
    /// `sizeof(idxc_context_info)`, set by `IDXC_CONTEXT_INFO_INIT`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// One of `IDXC_BACKEND_…`, never `IDXC_BACKEND_AUTO`.
    pub backend: i32,
    /// Ordinal of the device.
    pub device_id: i32,
    /// Worker threads of the CPU backend; CUDA: 0.
    pub threads: i32,
    /// 0.
    pub reserved: i32,
    /// Static string: the instruction set that the CPU backend uses, or the device's architecture, such as `sm_90`.
    pub isa: *const c_char,
}

// SAFETY: repr(C), pairs of 4-byte fields in 8-byte cells; zero is the default.
unsafe impl Descriptor for idxc_context_desc {
    const NAME: &'static str = "idxc_context_desc";
    const FLAGS: u32 = IDXC_CHECKED;
}
// SAFETY: as above, and one pointer.
unsafe impl Descriptor for idxc_context_info {
    const NAME: &'static str = "idxc_context_info";
}

/// Opens a backend. `desc` NULL means `IDXC_CONTEXT_DESC_INIT`: CUDA device 0 if it can be used, else all cores.
///
/// CUDA: uses the calling thread's current context if that is on the device (and it must then outlive this one), else
/// the device's primary context. All kernels are loaded here. Every later call leaves the calling thread's current
/// context as it was.
///
/// - Ownership: `*out` is the caller's, for `idxc_context_destroy`. Caches keep what they need of it alive themselves.
/// - Threads: any; the handle may be used from many threads at once.
/// - Stream: none.
/// - Graph capture: not allowed; starts threads and allocates.
/// - Errors: `IDXC_ERR_INVALID` (a field), `IDXC_ERR_NO_DEVICE`, `IDXC_ERR_NO_KERNEL_IMAGE` (built without CUDA, or no
///   kernels for the card), `IDXC_ERR_OUT_OF_MEMORY`. `*out` is NULL after an error.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_context_create(
    desc: *const idxc_context_desc,
    out: *mut *mut idxc_context,
) -> idxc_status {
    guard("idxc_context_create", || {
        out_pointer(out, "out")?;
        // SAFETY: checked; the caller's to write.
        unsafe { out.write(std::ptr::null_mut()) };
        let (choice, threads, checked) = if desc.is_null() {
            (BackendChoice::Auto(0), 0, false)
        } else {
            // SAFETY: by this function's contract.
            read_desc(unsafe { descriptor(desc, "desc") }?)?
        };
        let mut context = Context::new(choice, threads, quiet_panics_on_this_thread)?;
        if checked {
            context = context.checked();
        }
        if let Some(why) = context.passed_over() {
            log(IDXC_LOG_INFO, &format!("context: not cuda: {}", why.message));
        }
        log(
            IDXC_LOG_INFO,
            &match context.backend() {
                Backend::Cpu(cpu) => {
                    let isa = cpu.isa().name().to_string_lossy();
                    format!("context: cpu, {} threads, {isa}", cpu.threads())
                }
                Backend::Cuda(cuda) => {
                    let isa = cuda.isa().to_string_lossy();
                    format!("context: cuda:{}, {}, {isa}", cuda.ordinal(), cuda.name())
                }
            },
        );
        // SAFETY: checked above.
        unsafe { give(out, idxc_context(Arc::new(context))) };
        Ok(())
    })
}

fn read_desc(d: idxc_context_desc) -> Result<(BackendChoice, usize, bool)> {
    let choice = match d.backend {
        IDXC_BACKEND_AUTO => BackendChoice::Auto(d.device_id),
        IDXC_BACKEND_CPU => BackendChoice::Cpu,
        IDXC_BACKEND_CUDA => BackendChoice::Cuda(d.device_id),
        other => {
            return Err(Error::invalid("desc->backend", "0 (auto), 1 (cpu) or 2 (cuda)", other));
        }
    };
    if d.device_id < 0 || (d.device_id != 0 && choice == BackendChoice::Cpu) {
        return Err(Error::invalid("desc->device_id", "an ordinal (0 for the CPU)", d.device_id));
    }
    let threads = usize::try_from(d.threads)
        .ok()
        .filter(|&n| n <= 1024)
        .ok_or_else(|| Error::invalid("desc->threads", "0 (all cores) to 1024", d.threads))?;
    Ok((choice, threads, d.flags & IDXC_CHECKED != 0))
}

/// Closes a context. NULL is fine. Caches created from it stay usable.
///
/// - Ownership: takes `context`, which must not be used again.
/// - Threads: any, when no other thread is in a call with this handle.
/// - Stream: none.
/// - Graph capture: not allowed.
/// - Errors: none.
///
/// # Safety
/// `context` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_context_destroy(context: *mut idxc_context) {
    // SAFETY: by this function's contract.
    unsafe { take("idxc_context_destroy", context) }
}

/// What the context runs on.
///
/// - Ownership: `info` is the caller's; strings in it are static.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_INVALID`.
///
/// # Safety
/// Pointers are NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_context_get_info(
    context: *const idxc_context,
    info: *mut idxc_context_info,
) -> idxc_status {
    guard("idxc_context_get_info", || {
        // SAFETY: by this function's contract.
        let context = unsafe { handle(context, "context") }?;
        let (backend, device_id, threads, isa) = match context.0.backend() {
            Backend::Cpu(cpu) => (IDXC_BACKEND_CPU, 0, cpu.threads(), cpu.isa().name()),
            Backend::Cuda(cuda) => (IDXC_BACKEND_CUDA, cuda.ordinal(), 0, cuda.isa()),
        };
        let value = idxc_context_info {
            struct_size: 0,
            flags: 0,
            backend,
            device_id,
            threads: i32::try_from(threads).unwrap_or(i32::MAX),
            reserved: 0,
            isa: isa.as_ptr(),
        };
        // SAFETY: by this function's contract.
        unsafe { give_struct(info, "info", value) }
    })
}
