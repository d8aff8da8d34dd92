//! Rows, and where the keys that a row sees are stored.

use crate::tensor::Tensor;

/// How logical position `p` of a row becomes a row number ("slot") of the key or KV store.
///
/// With `block_table`: `slot = table[request(r)][p / page] * page + p % page`. Without: `slot = row_start[r] + p`.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyMapArgs<'a> {
    /// int32 `[requests, max_pages]`: page number of each page of a request. Absent: keys lie contiguously.
    pub block_table: Option<Tensor<'a>>,
    /// int32 `[rows]`: the block-table row of each row, -1 for a padding row. Absent: rows are split evenly,
    /// row `r` belongs to request `r / (rows / requests)`.
    pub row_request: Option<Tensor<'a>>,
    /// int32 `[rows]`, contiguous only: first key row that the row may see. Absent: 0.
    pub row_start: Option<Tensor<'a>>,
    /// int32 `[rows]`: one past the last key row that the row may see (paged: its number of visible tokens).
    /// `row_end <= row_start` is an empty (padding) row.
    pub row_end: Option<Tensor<'a>>,
}
