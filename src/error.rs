//! The one error type. Every fallible function returns it; the C layer turns it into a status and a text.

/// Result of every fallible function of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was. The numbers are the C ABI's: never reused, never renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// An argument has the wrong value, shape, dtype, stride or device; nothing was changed.
    Invalid = 1,
    /// A model config or pattern is not acceptable; the text says what to change.
    Config = 2,
    /// Indices were asked for that no Full layer wrote in this step.
    Stale = 3,
    /// Slot-form indices met another block table than the one they were translated with.
    Form = 4,
    /// The caller's buffer or workspace is too small; the text gives the size needed.
    BufferTooSmall = 5,
    /// The backend cannot do this.
    Unsupported = 6,
    /// No usable device or driver.
    NoDevice = 7,
    /// The library carries no kernels for this device.
    NoKernelImage = 8,
    /// Memory could not be had.
    OutOfMemory = 9,
    /// The device driver reported an error.
    Driver = 10,
    /// The library broke one of its own promises; please report it.
    Panic = 11,
    /// A file could not be read or written.
    Io = 12,
}

impl Status {
    /// All statuses, in numeric order.
    pub const ALL: [Status; 13] = [
        Status::Ok,
        Status::Invalid,
        Status::Config,
        Status::Stale,
        Status::Form,
        Status::BufferTooSmall,
        Status::Unsupported,
        Status::NoDevice,
        Status::NoKernelImage,
        Status::OutOfMemory,
        Status::Driver,
        Status::Panic,
        Status::Io,
    ];
}

/// A status and the sentence that explains it: which argument, what was expected, what was got.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind of failure.
    pub status: Status,
    /// One sentence for a person.
    pub message: String,
}

impl Error {
    /// An error of any kind.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// The usual form for a bad argument: `name: expected …, got …`.
    pub fn invalid(
        name: &str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::new(Status::Invalid, format!("{name}: expected {expected}, got {got}"))
    }

    /// A model config or pattern that is refused.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Status::Config, message)
    }
}
