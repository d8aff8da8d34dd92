//! Exact top-k of score rows.

use super::{Floats, MAX_TOPK, one_device, per_row, separate, within};
use crate::error::Result;
use crate::tensor::{Device, Tensor, View, ViewMut};

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

/// Checked top-k. NaN ranks with -inf, and zeros of either sign tie.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    /// Scores `[rows, columns]`.
    pub logits: Floats<'a, 2>,
    /// As in [`TopKArgs`].
    pub row_start: Option<View<'a, i32, 1>>,
    /// As in [`TopKArgs`].
    pub row_end: Option<View<'a, i32, 1>>,
    /// `[rows, k]`.
    pub indices: ViewMut<'a, i32, 2>,
    /// Where everything is.
    pub device: Device,
}

impl TopK<'_> {
    /// Host only: the columns that count in a row.
    pub fn columns(&self, row: usize) -> std::ops::Range<usize> {
        let at = |v: Option<View<'_, i32, 1>>, absent| {
            v.map_or(absent, |v| usize::try_from(v.row(&[])[row]).unwrap_or(0))
        };
        let start = at(self.row_start, 0);
        start..at(self.row_end, self.logits.shape()[1]).max(start)
    }
}

impl<'a> TopKArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<TopK<'a>> {
        let inputs = [Some(&self.logits), self.row_start.as_ref(), self.row_end.as_ref()];
        let logits = Floats::<2>::of(&self.logits)?;
        let [rows, columns] = logits.shape();
        within(self.logits.name(), "number of columns", columns, 0, i32::MAX as usize)?;
        self.indices.require_shape(&[Some(rows), None])?;
        let indices = self.indices.view_mut::<i32, 2>()?;
        within(self.indices.name(), "k", indices.shape()[1], 1, MAX_TOPK)?;
        let device = one_device(&inputs)?;
        self.indices.require_device(device)?;
        separate(&self.indices, &inputs)?;
        Ok(TopK {
            logits,
            row_start: per_row(self.row_start, rows)?,
            row_end: per_row(self.row_end, rows)?,
            indices,
            device,
        })
    }
}
