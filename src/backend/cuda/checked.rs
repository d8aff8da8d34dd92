//! Checked mode: the CPU backend's checks of index arrays, on copies of those arrays.
//!
//! A call waits for its stream, copies what its indices, lengths and pages are in, and refuses what is out of range
//! before it launches anything. Where the mode is off nothing of this runs.

use super::driver::Gpu;
use crate::backend::check;
use crate::context::Stream;
use crate::error::Result;
use crate::ops::*;
use crate::tensor::{Device, Element, Tensor, View};
use std::cell::RefCell;

/// Copies on the host, which live as long as this.
pub(super) struct Copies<'g> {
    gpu: &'g Gpu,
    memory: RefCell<Vec<Vec<u64>>>,
}

impl<'g> Copies<'g> {
    /// Waits for what is on the stream.
    pub(super) fn after(gpu: &'g Gpu, stream: Stream) -> Result<Self> {
        gpu.wait(stream.as_raw())?;
        Ok(Copies { gpu, memory: RefCell::default() })
    }

    fn view<T: Element, const N: usize>(&self, v: &View<'_, T, N>) -> Result<View<'_, T, N>> {
        let steps = v.shape().into_iter().zip(v.strides());
        let elements = match v.shape().contains(&0) {
            true => 0,
            false => steps.map(|(n, step)| (n - 1) * step).sum::<usize>() + 1,
        };
        let mut copy = vec![0u64; (elements * size_of::<T>()).div_ceil(8)];
        let to: *mut u8 = copy.as_mut_ptr().cast();
        // SAFETY: the view's own bytes, to memory of that size; they stay where they are when the vector moves.
        unsafe { self.gpu.read(super::at(v.as_ptr()), to, elements * size_of::<T>())? };
        self.memory.borrow_mut().push(copy);
        // SAFETY: the copy has the view's extents and lives as long as `self`.
        unsafe {
            Tensor::from_raw_parts("copy", to, Device::Cpu, T::DTYPE, &v.shape(), &v.strides())?
                .view()
        }
    }

    fn maybe<T: Element, const N: usize>(
        &self,
        v: &Option<View<'_, T, N>>,
    ) -> Result<Option<View<'_, T, N>>> {
        v.as_ref().map(|v| self.view(v)).transpose()
    }

    fn map<'a>(&'a self, map: &KeyMap<'a>) -> Result<KeyMap<'a>> {
        Ok(KeyMap {
            block_table: self.maybe(&map.block_table)?,
            row_request: self.maybe(&map.row_request)?,
            row_start: self.maybe(&map.row_start)?,
            row_end: self.maybe(&map.row_end)?,
            ..*map
        })
    }

    /// Slots to write to.
    pub(super) fn slots(&self, slots: &Slots<'_>, limit: usize) -> Result<()> {
        let copy = match slots {
            Slots::I32(v) => Slots::I32(self.view(v)?),
            Slots::I64(v) => Slots::I64(self.view(v)?),
        };
        check::slots(&copy, limit)
    }

    /// Where the keys of rows are. Returns the longest row.
    pub(super) fn keys(&self, ix: &Indexer<'_>) -> Result<usize> {
        check::keys(&self.map(&ix.map)?, ix.rows)
    }

    /// Bounds of score rows.
    pub(super) fn bounds(&self, op: &TopK<'_>) -> Result<()> {
        let (row_start, row_end) = (self.maybe(&op.row_start)?, self.maybe(&op.row_end)?);
        check::bounds(&TopK { row_start, row_end, ..*op })
    }

    /// Indices to translate.
    pub(super) fn translation(&self, op: &IndicesToSlots<'_>) -> Result<()> {
        let (indices, map) = (self.view(&op.indices)?, self.map(&op.map)?);
        check::translation(&IndicesToSlots { indices, map, ..*op })
    }

    /// Old rows that rows take.
    pub(super) fn row_map(&self, from: &View<'_, i32, 1>, rows: usize) -> Result<()> {
        check::row_map(self.view(from)?.row(&[]), rows)
    }

    /// Indices to attend to.
    pub(super) fn attention(&self, op: &SparseAttention<'_>) -> Result<()> {
        let map = op.map.as_ref().map(|map| self.map(map)).transpose()?;
        let (indices, row_topk) = (self.view(&op.indices)?, self.maybe(&op.row_topk)?);
        check::attention(&SparseAttention { indices, map, row_topk, ..*op })
    }

    /// Bounds and indices of a distillation.
    pub(super) fn distill(&self, op: &Distill<'_>) -> Result<()> {
        let (map, indices) = (self.map(&op.map)?, self.maybe(&op.indices)?);
        check::distill(&Distill { map, indices, ..*op })
    }
}
