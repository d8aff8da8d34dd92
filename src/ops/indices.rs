//! Index rows: logical or slots, translation, overlap.

use super::{KeyMap, KeyMapArgs, Store, one_device, separate, within};
use crate::error::Result;
use crate::tensor::{Device, Tensor, View, ViewMut};

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

/// Checked translation. Every index of a padding row becomes -1.
#[derive(Clone, Copy, Debug)]
pub struct IndicesToSlots<'a> {
    /// `[rows, k]`.
    pub indices: View<'a, i32, 2>,
    /// Where each row's keys are. How many pages the store has is not known here.
    pub map: KeyMap<'a>,
    /// `[rows, k]`; the same memory as `indices` in the same layout, or memory apart from it.
    pub slots: ViewMut<'a, i32, 2>,
    /// Where everything is.
    pub device: Device,
}

impl<'a> IndicesToSlotsArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<IndicesToSlots<'a>> {
        let indices = self.indices.view::<i32, 2>()?;
        let [rows, k] = indices.shape();
        let store = match self.map.block_table {
            Some(_) => {
                within("page_size", "a page size", self.page_size, 1, i32::MAX as usize)?;
                Store::Paged { pages: i32::MAX as usize / self.page_size, page: self.page_size }
            }
            None => Store::Contiguous(i32::MAX as usize),
        };
        self.slots.require_shape(&[Some(rows), Some(k)])?;
        let [a, b, c, d] = self.map.tensors();
        let device = one_device(&[Some(&self.indices), Some(&self.slots), a, b, c, d])?;
        let in_place = self.slots.as_ptr() == self.indices.as_ptr()
            && self.slots.strides() == self.indices.strides();
        separate(&self.slots, &[Some(&self.indices).filter(|_| !in_place), a, b, c, d])?;
        Ok(IndicesToSlots {
            indices,
            map: self.map.check(rows, store)?,
            slots: self.slots.view_mut()?,
            device,
        })
    }
}

/// Checked overlap of two selections: how much of `own` the `reused` one covers, row by row.
#[derive(Clone, Copy, Debug)]
pub struct Overlap<'a> {
    /// `[rows, k]`, ascending, -1 tail.
    pub own: View<'a, i32, 2>,
    /// `[rows, k']`, ascending, -1 tail.
    pub reused: View<'a, i32, 2>,
    /// `[rows]`, written: `|own ∩ reused| / |own|`; 1 where `own` is empty.
    pub out: ViewMut<'a, f32, 1>,
    /// Where everything is.
    pub device: Device,
}

impl<'a> Overlap<'a> {
    /// Checks int32 `own [rows, k]`, int32 `reused [rows, k']` and f32 `out [rows]`.
    pub fn check(own: Tensor<'a>, reused: Tensor<'a>, out: Tensor<'a>) -> Result<Self> {
        let own_view = own.view::<i32, 2>()?;
        let rows = own_view.shape()[0];
        reused.require_shape(&[Some(rows), None])?;
        out.require_shape(&[Some(rows)])?;
        let device = one_device(&[Some(&own), Some(&reused), Some(&out)])?;
        separate(&out, &[Some(&own), Some(&reused)])?;
        Ok(Overlap { own: own_view, reused: reused.view()?, out: out.view_mut()?, device })
    }
}
