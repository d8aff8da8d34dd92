//! The kernels that build.rs compiled, if it found a compiler.

/// Code, on an address that the driver likes.
#[repr(C, align(64))]
pub(super) struct Aligned<T: ?Sized>(pub T);

/// One fat binary.
pub(super) struct Image {
    /// The file in `kernels/`.
    pub name: &'static str,
    /// The only architecture it is for, as 90 for 9.0.
    pub arch: Option<u32>,
    /// The bytes.
    pub code: &'static Aligned<[u8]>,
}

include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));
