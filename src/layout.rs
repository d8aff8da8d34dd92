//! Laying out typed pieces in one block of caller-owned memory.
//!
//! One function describes the pieces; run under [`measure`] it answers the size, run over [`Bump::over`] it hands
//! the pieces out. So the size that a query gives and the bytes that a call uses cannot drift apart.

use crate::error::{Error, Result, Status};
use crate::tensor::Device;
use std::marker::PhantomData;

/// Every piece starts on a cache line.
pub const ALIGN: usize = 64;

/// Element types of which any bytes are a value.
///
/// # Safety
/// Every bit pattern must be valid, alignment must divide [`ALIGN`], and there must be no drop glue.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
macro_rules! plain { ($($t:ty),*) => { $(
    // SAFETY: plain numbers.
    unsafe impl Plain for $t {}
)* } }
plain!(u8, i32, u32, i64, u64, f32, f64);

/// Scratch that a caller lends for one call.
#[derive(Debug)]
pub struct Workspace<'a> {
    device: Device,
    ptr: *mut u8,
    len: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Workspace<'a> {
    /// Describes memory that the caller vouches for.
    ///
    /// # Safety
    /// `len` bytes from `ptr` on must be memory of `device`, valid during `'a` (on a device, until the work that uses
    /// it is done), and used by nobody else.
    pub unsafe fn from_raw_parts(device: Device, ptr: *mut u8, len: usize) -> Self {
        Workspace { device, ptr, len, _memory: PhantomData }
    }

    fn require(&self, device: Device) -> Result<()> {
        // Where there is no memory, it does not matter where it is.
        if self.device == device || self.len == 0 {
            return Ok(());
        }
        Err(Error::invalid("workspace", format_args!("memory on {device}"), self.device))
    }

    /// The bytes, if they are host memory.
    pub fn host(self) -> Result<&'a mut [u8]> {
        self.require(Device::Cpu)?;
        match self.len {
            0 => Ok(&mut []),
            // SAFETY: host memory by the check above, the rest by the contract of `from_raw_parts`.
            len => Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr, len) }),
        }
    }

    /// Aligned address of `bytes` on a device. The workspace must hold [`with_slack`]`(bytes)`.
    pub fn on(self, device: Device, bytes: usize) -> Result<u64> {
        self.require(device)?;
        let need = with_slack(bytes);
        if self.len < need {
            return Err(too_small("workspace", need, self.len));
        }
        Ok(self.ptr.addr().next_multiple_of(ALIGN) as u64)
    }
}

impl<'a> From<&'a mut [u8]> for Workspace<'a> {
    fn from(memory: &'a mut [u8]) -> Self {
        let (ptr, len) = (memory.as_mut_ptr(), memory.len());
        Workspace { device: Device::Cpu, ptr, len, _memory: PhantomData }
    }
}

fn too_small(name: &str, need: usize, got: usize) -> Error {
    let text = format!("{name}: expected at least {need} bytes, got {got}");
    Error::new(Status::BufferTooSmall, text)
}

/// [`Bump`] over memory that the host cannot reach: pieces are addresses.
#[derive(Debug)]
pub struct Addresses {
    base: u64,
    used: usize,
}

impl Addresses {
    /// Only measures.
    pub fn measure() -> Self {
        Addresses { base: 0, used: 0 }
    }

    /// Hands out pieces from an [`ALIGN`]ed address on.
    pub fn over(base: u64) -> Self {
        Addresses { base, used: 0 }
    }

    /// Address of the next `n` elements.
    pub fn take<T: Plain>(&mut self, n: usize) -> u64 {
        let at = self.base.wrapping_add(self.used as u64);
        self.used = self.used.saturating_add(piece_bytes::<T>(n));
        at
    }

    /// Bytes handed out. Saturates instead of overflowing.
    pub fn used(&self) -> usize {
        self.used
    }
}

fn piece_bytes<T>(n: usize) -> usize {
    n.checked_mul(size_of::<T>())
        .and_then(|b| b.checked_next_multiple_of(ALIGN))
        .unwrap_or(usize::MAX)
}

/// A cursor over memory, or over nothing when only measuring.
#[derive(Debug)]
pub struct Bump<'a> {
    rest: Option<&'a mut [u8]>,
    used: usize,
}

/// Bytes that `lay` takes, starting from an [`ALIGN`]ed address. Saturates instead of overflowing.
pub fn measure<'a, R>(lay: impl FnOnce(&mut Bump<'a>) -> R) -> usize {
    let mut bump = Bump { rest: None, used: 0 };
    lay(&mut bump);
    bump.used
}

/// Workspace to ask of a caller for `bytes`, whatever the alignment of what he brings.
pub const fn with_slack(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { bytes.saturating_add(ALIGN - 1) }
}

/// The aligned `bytes` of a caller's workspace, which must hold [`with_slack`]`(bytes)`.
pub fn aligned<'a>(name: &str, memory: &'a mut [u8], bytes: usize) -> Result<&'a mut [u8]> {
    if bytes == 0 {
        return Ok(&mut []);
    }
    let skip = memory.as_ptr().addr().next_multiple_of(ALIGN) - memory.as_ptr().addr();
    let got = memory.len();
    let piece = memory.get_mut(skip..).and_then(|m| m.get_mut(..bytes));
    // A lucky address may do with less than the documented size; refuse it all the same, or hosts would ship it.
    piece
        .filter(|_| got >= with_slack(bytes))
        .ok_or_else(|| too_small(name, with_slack(bytes), got))
}

impl<'a> Bump<'a> {
    /// Hands out pieces of `memory`, which starts on an [`ALIGN`]ed address.
    pub fn over(memory: &'a mut [u8]) -> Self {
        debug_assert!(memory.is_empty() || memory.as_ptr().addr().is_multiple_of(ALIGN));
        Bump { rest: Some(memory), used: 0 }
    }

    /// The next `n` elements; empty when measuring. Holds whatever bytes the memory held.
    ///
    /// # Panics
    /// When the memory is smaller than [`measure`] said.
    pub fn take<T: Plain>(&mut self, n: usize) -> &'a mut [T] {
        let bytes = piece_bytes::<T>(n);
        self.used = self.used.saturating_add(bytes);
        let Some(rest) = self.rest.take() else { return &mut [] };
        let (piece, rest) = rest.split_at_mut(bytes);
        self.rest = Some(rest);
        assert!(piece.as_ptr().addr().is_multiple_of(align_of::<T>()));
        // SAFETY: `bytes >= n * size_of::<T>()` of exclusively borrowed, aligned memory; any bytes are a `T`.
        unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr().cast(), n) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn lay<'a>(b: &mut Bump<'a>) -> (&'a mut [u8], &'a mut [f32], &'a mut [u64]) {
        (b.take(3), b.take(17), b.take(0))
    }

    #[test]
    fn size_and_pieces_come_from_one_description() {
        let bytes = measure(lay);
        assert_eq!(bytes, 64 + 128);
        let mut memory = vec![0u8; with_slack(bytes) + 8];
        for skew in 0..8 {
            let m = aligned("ws", &mut memory[skew..skew + with_slack(bytes)], bytes).unwrap();
            let (a, b, c) = lay(&mut Bump::over(m));
            assert_eq!((a.len(), b.len(), c.len()), (3, 17, 0));
            assert!(b.as_ptr().addr().is_multiple_of(ALIGN));
            b.fill(1.0);
        }
        let e = aligned("ws", &mut memory[..with_slack(bytes) - 1], bytes).unwrap_err();
        assert_eq!(e.status, Status::BufferTooSmall);
        assert!(e.message.contains(&with_slack(bytes).to_string()));
        assert_eq!(measure(|b| b.take::<u64>(usize::MAX).len()), usize::MAX);
        assert_eq!(aligned("ws", &mut [], 0).unwrap().len(), 0);
    }
}
