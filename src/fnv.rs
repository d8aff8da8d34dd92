//! The hash behind fingerprints and the checks in journals: stable for ever, for accidents only, not for attackers.

/// FNV-1a, 64 bits.
#[derive(Clone, Copy)]
pub(crate) struct Fnv(pub u64);

impl Fnv {
    pub const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub fn bytes(self, bytes: impl IntoIterator<Item = u8>) -> Self {
        let byte = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        Self(bytes.into_iter().fold(self.0, byte))
    }

    pub fn u32(self, word: u32) -> Self {
        self.bytes(word.to_le_bytes())
    }
}
