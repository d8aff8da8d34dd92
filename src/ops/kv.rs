//! Writing KV rows to their pages.

use crate::tensor::Tensor;

/// Write (and, for the fp8 layout, quantise) new KV rows.
#[derive(Clone, Copy, Debug)]
pub struct KvWriteArgs<'a> {
    /// f32 or bf16 `[tokens, d_qk]`.
    pub kv: Tensor<'a>,
    /// int32 or int64 `[tokens]`: `page * page_size + offset`, -1 skips the token.
    pub slots: Tensor<'a>,
    /// uint8 `[pages, page_size, 656]` (V3.2 fp8, `d_qk` 576), or bf16 or f32 `[pages, page_size, d_qk]`;
    /// a unit axis before the last is accepted.
    pub pages: Tensor<'a>,
}
