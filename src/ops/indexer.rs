//! The lightning indexer: `I[t,s] = ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])`.

use super::KeyMapArgs;
use crate::tensor::Tensor;

/// What to score. Used by `indexer_logits`, `paged_indexer_logits` and `select` alike.
#[derive(Clone, Copy, Debug)]
pub struct IndexerArgs<'a> {
    /// e4m3 or bf16 `[rows, heads, dim]`.
    pub q: Tensor<'a>,
    /// f32 `[rows, heads]`; carries every scale of the query side.
    pub weights: Tensor<'a>,
    /// Contiguous: e4m3 or bf16 `[keys, dim]`. Paged: uint8 `[pages, 64 * (dim + 4)]` (page-planar fp8 + f32 scales;
    /// any shape with that many bytes a page is accepted, such as `[pages, 64, 1, dim + 4]`) or bf16 `[pages, 64, dim]`.
    pub k: Tensor<'a>,
    /// f32 `[keys]`; with contiguous e4m3 keys only, and then required.
    pub k_scale: Option<Tensor<'a>>,
    /// Where each row's keys are.
    pub map: KeyMapArgs<'a>,
}
