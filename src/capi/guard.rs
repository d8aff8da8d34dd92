//! What stands between Rust and C: panics and errors become a status and a text, log lines go to the host.

use super::{IDXC_OK, idxc_log_callback, idxc_status};
use crate::error::{Error, Result, Status};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, Once, PoisonError};

thread_local! {
    static LAST_ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
    /// This thread is inside the library: a panic here becomes a status, and must not print.
    static QUIET: Cell<bool> = const { Cell::new(false) };
    /// Where the last quiet panic happened.
    static PANIC_PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

struct LogTarget {
    callback: unsafe extern "C" fn(i32, *const c_char, *mut c_void),
    user: *mut c_void,
}
// SAFETY: `user` is only handed back to the host, which promised in `idxc_set_log_callback` that any thread may.
unsafe impl Send for LogTarget {}

static LOG: Mutex<Option<LogTarget>> = Mutex::new(None);

pub(super) fn set_log_target(callback: idxc_log_callback, user: *mut c_void) {
    let mut target = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    *target = callback.map(|callback| LogTarget { callback, user });
}

/// Sends a line to the host's callback, if there is one.
pub(crate) fn log(level: i32, message: &str) {
    let target = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(t) = &*target {
        let text = c_string(message);
        // SAFETY: the host promised a callable function when it set it.
        unsafe { (t.callback)(level, text.as_ptr(), t.user) }
    }
}

fn c_string(text: &str) -> CString {
    let mut bytes = text.as_bytes().to_vec();
    bytes.retain(|&b| b != 0);
    CString::new(bytes).unwrap_or_default()
}

/// For threads that the library starts: their panics are caught elsewhere and must not print.
pub(crate) fn quiet_panics_on_this_thread() {
    QUIET.set(true);
}

/// The default panic hook prints. Panics outside the library still go to the hook that was there before.
fn install_quiet_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if QUIET.try_with(Cell::get).unwrap_or(false) {
                let place = info.location().map(ToString::to_string).unwrap_or_default();
                let _ = PANIC_PLACE.try_with(|p| *p.borrow_mut() = place);
            } else {
                before(info);
            }
        }));
    });
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let what = payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    let place = PANIC_PLACE.try_with(RefCell::take).unwrap_or_default();
    if place.is_empty() { what } else { format!("{what} (at {place})") }
}

/// Runs the body of an exported function: errors and panics become a status and a text.
pub(super) fn guard(function: &'static str, body: impl FnOnce() -> Result<()>) -> idxc_status {
    install_quiet_hook();
    let was_quiet = QUIET.try_with(|q| q.replace(true)).unwrap_or(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        #[cfg(debug_assertions)]
        testing::panic_if_armed();
        body()
    }));
    let _ = QUIET.try_with(|q| q.set(was_quiet));
    let error = match outcome {
        Ok(Ok(())) => return IDXC_OK,
        Ok(Err(e)) => e,
        Err(payload) => Error::new(
            Status::Panic,
            format!("internal error, please report: {}", panic_text(payload.as_ref())),
        ),
    };
    let text = c_string(&format!("{function}: {}", error.message));
    let _ = LAST_ERROR.try_with(|e| *e.borrow_mut() = Some(text));
    error.status as idxc_status
}

/// As [`guard`], for the few functions that return a value instead of a status.
pub(super) fn guard_value<T: Copy>(fallback: T, body: impl FnOnce() -> T) -> T {
    let mut value = fallback;
    guard("", || {
        value = body();
        Ok(())
    });
    value
}

/// The calling thread's last error text.
pub(super) fn last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|e| e.borrow().as_ref().map(|text| text.as_ptr()))
        .ok()
        .flatten()
        .unwrap_or(c"".as_ptr())
}

/// Lets tests make the next guarded call on this thread panic. Not in release builds.
#[cfg(debug_assertions)]
#[doc(hidden)]
pub mod testing {
    use std::cell::Cell;

    thread_local!(static ARMED: Cell<bool> = const { Cell::new(false) });

    /// The next guarded call on this thread panics.
    pub fn arm_panic() {
        ARMED.set(true);
    }

    #[allow(clippy::panic)] // That is what it is for.
    pub(super) fn panic_if_armed() {
        if ARMED.replace(false) {
            panic!("armed by a test");
        }
    }
}
