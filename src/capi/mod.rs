//! The C ABI: the only exported symbols. Each function checks its pointers, calls safe Rust, and returns a status.
//!
//! `include/indexcache/indexcache.h` is generated from these files by `tests/header.rs`; doc comments become its text.
#![allow(non_camel_case_types)] // C names.

use crate::context::Context;
use crate::error::{Error, Result, Status};
use crate::layout::Workspace;
use std::ffi::{CStr, c_char, c_void};

mod guard;

// The header's order.
pub mod types;

pub mod context;

pub mod plan;

pub mod cache;

pub mod ops;

pub mod search;

pub mod table;

#[cfg(debug_assertions)]
#[doc(hidden)]
pub use guard::testing;
use guard::{guard, guard_value, last_error, set_log_target};
pub(crate) use guard::{log, quiet_panics_on_this_thread};

/// Outcome of a call: `IDXC_OK` or one of the `IDXC_ERR_…` numbers. The text is in `idxc_last_error()`.
pub type idxc_status = i32;

/// Success.
pub const IDXC_OK: idxc_status = 0;
/// An argument has the wrong value, shape, dtype, stride or device. Nothing was changed.
pub const IDXC_ERR_INVALID: idxc_status = 1;
/// A model config or pattern is refused; the text says what to change.
pub const IDXC_ERR_CONFIG: idxc_status = 2;
/// Indices were asked for that no Full layer has written in this step.
pub const IDXC_ERR_STALE: idxc_status = 3;
/// Slot-form indices met another block table than the one they were translated with.
pub const IDXC_ERR_FORM: idxc_status = 4;
/// A caller's buffer or workspace is too small; the text gives the size needed.
pub const IDXC_ERR_BUFFER_TOO_SMALL: idxc_status = 5;
/// The backend cannot do this.
pub const IDXC_ERR_UNSUPPORTED: idxc_status = 6;
/// No usable device or driver.
pub const IDXC_ERR_NO_DEVICE: idxc_status = 7;
/// The library carries no kernels for this device.
pub const IDXC_ERR_NO_KERNEL_IMAGE: idxc_status = 8;
/// Memory could not be had.
pub const IDXC_ERR_OUT_OF_MEMORY: idxc_status = 9;
/// The device driver reported an error.
pub const IDXC_ERR_DRIVER: idxc_status = 10;
/// The library broke one of its own promises; please report it with the text.
pub const IDXC_ERR_PANIC: idxc_status = 11;
/// A file could not be read or written; the text has the system's reason.
pub const IDXC_ERR_IO: idxc_status = 12;

/// ABI version of this header. A library serves every version up to its own.
pub const IDXC_ABI_VERSION: u32 = 1;

/// Receives log lines. `level` is one of `IDXC_LOG_…`; `message` is NUL-terminated and valid during the call only.
/// Must not call back into the library and must not throw.
pub type idxc_log_callback =
    Option<unsafe extern "C" fn(level: i32, message: *const c_char, user: *mut c_void)>;

/// Log level: something to look at, such as a setting that has no effect.
pub const IDXC_LOG_WARNING: i32 = 1;
/// Log level: what was decided, for the record.
pub const IDXC_LOG_INFO: i32 = 2;

// cbindgen wants literals, Rust wants an enum: hold the two together.
const _: () = {
    assert!(IDXC_OK == Status::Ok as i32);
    assert!(IDXC_ERR_INVALID == Status::Invalid as i32);
    assert!(IDXC_ERR_CONFIG == Status::Config as i32);
    assert!(IDXC_ERR_STALE == Status::Stale as i32);
    assert!(IDXC_ERR_FORM == Status::Form as i32);
    assert!(IDXC_ERR_BUFFER_TOO_SMALL == Status::BufferTooSmall as i32);
    assert!(IDXC_ERR_UNSUPPORTED == Status::Unsupported as i32);
    assert!(IDXC_ERR_NO_DEVICE == Status::NoDevice as i32);
    assert!(IDXC_ERR_NO_KERNEL_IMAGE == Status::NoKernelImage as i32);
    assert!(IDXC_ERR_OUT_OF_MEMORY == Status::OutOfMemory as i32);
    assert!(IDXC_ERR_DRIVER == Status::Driver as i32);
    assert!(IDXC_ERR_PANIC == Status::Panic as i32);
    assert!(IDXC_ERR_IO == Status::Io as i32);
};

fn check_handle<T>(ptr: *const T, name: &'static str) -> Result<()> {
    if ptr.is_null() {
        return Err(Error::invalid(name, "a handle", "NULL"));
    }
    if !ptr.is_aligned() {
        return Err(Error::invalid(name, "a handle", format_args!("{ptr:p}")));
    }
    Ok(())
}

/// A reference to a handle that the caller passed.
///
/// # Safety
/// `ptr` is NULL or a live handle of this type, not used mutably elsewhere during `'a`.
unsafe fn handle<'a, T>(ptr: *const T, name: &'static str) -> Result<&'a T> {
    check_handle(ptr, name)?;
    // SAFETY: by this function's contract and the check above.
    Ok(unsafe { &*ptr })
}

/// As [`handle`], exclusively.
///
/// # Safety
/// `ptr` is NULL or a live handle of this type, used by nobody else during `'a`.
unsafe fn handle_mut<'a, T>(ptr: *mut T, name: &'static str) -> Result<&'a mut T> {
    check_handle(ptr, name)?;
    // SAFETY: by this function's contract and the check above.
    Ok(unsafe { &mut *ptr })
}

/// Checks an output pointer before any work is done.
fn out_pointer<T>(ptr: *mut T, name: &'static str) -> Result<()> {
    if ptr.is_null() {
        return Err(Error::invalid(name, "a pointer to write to", "NULL"));
    }
    if !ptr.is_aligned() {
        return Err(Error::invalid(name, "an aligned pointer", format_args!("{ptr:p}")));
    }
    Ok(())
}

/// Elements that the caller passed with a count.
///
/// # Safety
/// `ptr` is NULL or valid for reading `len` elements during `'a`.
unsafe fn slice<'a, T>(ptr: *const T, len: usize, name: &'static str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    let fits = len.checked_mul(size_of::<T>()).is_some_and(|b| b <= isize::MAX as usize);
    if ptr.is_null() || !ptr.is_aligned() || !fits {
        let got = if ptr.is_null() { "NULL".to_owned() } else { format!("{ptr:p}") };
        return Err(Error::invalid(name, format_args!("a pointer to {len} elements"), got));
    }
    // SAFETY: by this function's contract and the checks above.
    Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
}

/// The caller's text buffer.
///
/// # Safety
/// `ptr` is NULL or valid for writing `len` bytes during `'a`, used by nobody else.
unsafe fn bytes_mut<'a>(ptr: *mut c_void, len: usize, name: &'static str) -> Result<&'a mut [u8]> {
    if len == 0 {
        return Ok(&mut []);
    }
    if ptr.is_null() || len > isize::MAX as usize {
        return Err(Error::invalid(name, format_args!("{len} bytes"), format_args!("{ptr:p}")));
    }
    // SAFETY: by this function's contract and the checks above; the bytes are written before they are read.
    Ok(unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len) })
}

/// The caller's scratch for one call, in memory of the context's device.
///
/// # Safety
/// `ptr` is NULL or good for `len` bytes during `'a` (on a device, until the call's work is done), used by nobody else.
unsafe fn workspace<'a>(context: &Context, ptr: *mut c_void, len: usize) -> Result<Workspace<'a>> {
    if len > 0 && (ptr.is_null() || len > isize::MAX as usize) {
        let want = format_args!("{len} bytes");
        return Err(Error::invalid("workspace", want, format_args!("{ptr:p}")));
    }
    // SAFETY: by this function's contract and the check above.
    Ok(unsafe { Workspace::from_raw_parts(context.device(), ptr.cast(), len) })
}

/// A C string that the caller passed.
///
/// # Safety
/// `ptr` is NULL or a NUL-terminated string that lives during `'a`.
unsafe fn text<'a>(ptr: *const c_char, name: &'static str) -> Result<&'a str> {
    if ptr.is_null() {
        return Err(Error::invalid(name, "a NUL-terminated string", "NULL"));
    }
    // SAFETY: by this function's contract.
    unsafe { CStr::from_ptr(ptr) }.to_str().map_err(|e| {
        Error::invalid(name, "UTF-8 text", format_args!("a bad byte at {}", e.valid_up_to()))
    })
}

/// Copies text out: `size` receives the bytes needed with the final NUL; nothing is copied into a shorter buffer.
///
/// # Safety
/// `buffer` is NULL or valid for `capacity` bytes; `size` is NULL or writable.
unsafe fn give_text(
    value: &str,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> Result<()> {
    out_pointer(size, "size")?;
    let need = value.len() + 1;
    // SAFETY: checked above.
    unsafe { size.write(need) };
    if buffer.is_null() && capacity == 0 {
        return Ok(()); // The size was the question.
    }
    // SAFETY: by this function's contract.
    let out = unsafe { bytes_mut(buffer.cast(), capacity, "buffer") }?;
    if capacity < need {
        return Err(Error::new(
            Status::BufferTooSmall,
            format!("buffer: expected {need} bytes, got {capacity}"),
        ));
    }
    out[..value.len()].copy_from_slice(value.as_bytes());
    out[value.len()] = 0;
    Ok(())
}

/// Hands a new handle to the caller.
///
/// # Safety
/// `out` was checked with [`out_pointer`] and is the caller's to write.
unsafe fn give<T>(out: *mut *mut T, value: T) {
    // SAFETY: by this function's contract.
    unsafe { out.write(Box::into_raw(Box::new(value))) }
}

/// Takes a handle back and drops it. NULL is fine.
///
/// # Safety
/// `ptr` is NULL or came from [`give`] and is not used again.
unsafe fn take<T>(function: &'static str, ptr: *mut T) {
    guard(function, || {
        if !ptr.is_null() {
            // SAFETY: by this function's contract.
            drop(unsafe { Box::from_raw(ptr) });
        }
        Ok(())
    });
}

/// ABI version of the library (`IDXC_ABI_VERSION` of the header it was built with).
///
/// - Ownership: nothing changes hands.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn idxc_version() -> u32 {
    guard_value(IDXC_ABI_VERSION, || IDXC_ABI_VERSION)
}

/// Short name of a status, such as `"IDXC_ERR_STALE"`; `"unknown status"` for a number that is none.
///
/// - Ownership: the string is static.
/// - Threads: any.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn idxc_status_name(status: idxc_status) -> *const c_char {
    let name = guard_value(c"unknown status", || match status {
        IDXC_OK => c"IDXC_OK",
        IDXC_ERR_INVALID => c"IDXC_ERR_INVALID",
        IDXC_ERR_CONFIG => c"IDXC_ERR_CONFIG",
        IDXC_ERR_STALE => c"IDXC_ERR_STALE",
        IDXC_ERR_FORM => c"IDXC_ERR_FORM",
        IDXC_ERR_BUFFER_TOO_SMALL => c"IDXC_ERR_BUFFER_TOO_SMALL",
        IDXC_ERR_UNSUPPORTED => c"IDXC_ERR_UNSUPPORTED",
        IDXC_ERR_NO_DEVICE => c"IDXC_ERR_NO_DEVICE",
        IDXC_ERR_NO_KERNEL_IMAGE => c"IDXC_ERR_NO_KERNEL_IMAGE",
        IDXC_ERR_OUT_OF_MEMORY => c"IDXC_ERR_OUT_OF_MEMORY",
        IDXC_ERR_DRIVER => c"IDXC_ERR_DRIVER",
        IDXC_ERR_PANIC => c"IDXC_ERR_PANIC",
        IDXC_ERR_IO => c"IDXC_ERR_IO",
        _ => c"unknown status",
    });
    name.as_ptr()
}

/// Text of the last error on the calling thread: function, argument, expected, got. Empty if there was none.
/// A successful call leaves it as it is.
///
/// - Ownership: the library's; valid until the calling thread's next failing call.
/// - Threads: any; each thread has its own text.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn idxc_last_error() -> *const c_char {
    guard_value(c"".as_ptr(), last_error)
}

/// Sends log lines of the whole library to `callback` (NULL: to nobody, which is also how it starts). The library
/// never prints.
///
/// - Ownership: `user` stays the caller's and must outlive the registration.
/// - Threads: any; `callback` may be called from any thread that calls the library, one call at a time.
/// - Stream: none.
/// - Graph capture: allowed; host only.
/// - Errors: `IDXC_ERR_PANIC` only.
///
/// # Safety
/// `callback` must be callable with `user` from any thread until it is replaced.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn idxc_set_log_callback(
    callback: idxc_log_callback,
    user: *mut c_void,
) -> idxc_status {
    guard("idxc_set_log_callback", || {
        set_log_target(callback, user);
        Ok(())
    })
}
