//! Index rows: logical or slots, translation, overlap.

use super::KeyMapArgs;
use crate::tensor::Tensor;

/// What the numbers of an index row mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum IndexForm {
    /// Positions within the request.
    Logical = 0,
    /// Row numbers of the KV store, `page * page_size + offset`.
    Slots = 1,
}

/// Translate logical indices to slots; -1 stays -1.
#[derive(Clone, Copy, Debug)]
pub struct IndicesToSlotsArgs<'a> {
    /// int32 `[rows, k]`, logical.
    pub indices: Tensor<'a>,
    /// Where each row's keys are (`row_end` is not used).
    pub map: KeyMapArgs<'a>,
    /// Tokens a page.
    pub page_size: usize,
    /// int32 `[rows, k]`, written; may be `indices` itself.
    pub slots: Tensor<'a>,
}
