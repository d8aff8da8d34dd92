//! Quantising the indexer's keys and queries.

use crate::tensor::Tensor;

/// Quantise new indexer keys and write them to their pages.
#[derive(Clone, Copy, Debug)]
pub struct IndexKWriteArgs<'a> {
    /// f32 or bf16 `[tokens, dim]`.
    pub k: Tensor<'a>,
    /// int32 or int64 `[tokens]`: `page * 64 + offset`, -1 skips the token.
    pub slots: Tensor<'a>,
    /// Pages, as in [`super::IndexerArgs::k`].
    pub pages: Tensor<'a>,
    /// Rotate by the orthonormal Hadamard matrix first.
    pub hadamard: bool,
    /// Round scales up to a power of two.
    pub pow2_scale: bool,
}

/// Quantise indexer queries; the scale is folded into the head weights.
#[derive(Clone, Copy, Debug)]
pub struct IndexQQuantizeArgs<'a> {
    /// f32 or bf16 `[rows, heads, dim]`.
    pub q: Tensor<'a>,
    /// f32 `[rows, heads]`: raw head weights.
    pub weights: Tensor<'a>,
    /// Multiplied into the weights; usually `dim^-0.5 * heads^-0.5`.
    pub scale: f32,
    /// Rotate by the orthonormal Hadamard matrix first (as the keys were).
    pub hadamard: bool,
    /// Round scales up to a power of two.
    pub pow2_scale: bool,
    /// e4m3 `[rows, heads, dim]`, written.
    pub q_out: Tensor<'a>,
    /// f32 `[rows, heads]`, written: `weights * scale * q_scale`.
    pub weights_out: Tensor<'a>,
}
