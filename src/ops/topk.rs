//! Exact top-k of score rows.

use crate::tensor::Tensor;

/// Row-wise top-k. Ties go to the lowest position; output ascends, -1 tail; positions are relative to `row_start`.
#[derive(Clone, Copy, Debug)]
pub struct TopKArgs<'a> {
    /// f32 or bf16 `[rows, columns]`.
    pub logits: Tensor<'a>,
    /// int32 `[rows]`: first column that counts. Absent: 0.
    pub row_start: Option<Tensor<'a>>,
    /// int32 `[rows]`: one past the last column that counts. Absent: all.
    pub row_end: Option<Tensor<'a>>,
    /// int32 `[rows, k]`, written.
    pub indices: Tensor<'a>,
}
