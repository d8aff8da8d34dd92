//! Sparse MLA attention over selected tokens.

use super::{IndexForm, KeyMapArgs};
use crate::tensor::Tensor;

/// Attend from each row to the KV rows its indices name.
#[derive(Clone, Copy, Debug)]
pub struct SparseAttentionArgs<'a> {
    /// bf16 or f32 `[rows, heads, d_qk]`.
    pub q: Tensor<'a>,
    /// Contiguous: bf16 or f32 `[tokens, d_qk]`, or uint8 `[tokens, 656]`. Paged: the same with a page axis in front,
    /// `[pages, page_size, …]`. A unit axis before the last is accepted.
    pub kv: Tensor<'a>,
    /// int32 `[rows, topk]`; -1 anywhere is skipped.
    pub indices: Tensor<'a>,
    /// What the indices mean.
    pub form: IndexForm,
    /// How logical indices become slots; unused (all absent) for the slots form. `row_end` is not used.
    pub map: KeyMapArgs<'a>,
    /// int32 `[rows]`: only the first `row_topk[r]` indices of a row count. Absent: all.
    pub row_topk: Option<Tensor<'a>>,
    /// f32 `[heads]`: a logit that takes part in the softmax and has no value. Absent: none.
    pub sink: Option<Tensor<'a>>,
    /// Multiplies `q·k`.
    pub softmax_scale: f32,
    /// bf16 or f32 `[rows, heads, d_v]`, written; `d_v <= d_qk`: values are the first `d_v` of the KV row.
    pub out: Tensor<'a>,
    /// f32 `[rows, heads]`, written: natural-log sum of exponentials without the sink; -inf for an empty row.
    pub lse: Option<Tensor<'a>>,
}
