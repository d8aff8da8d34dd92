//! Sparse MLA attention over selected tokens.

use super::{
    Floats, FloatsMut, IndexForm, KV_FP8_BYTES, KV_FP8_DIMS, KeyMap, KeyMapArgs, MAX_HEADS,
    MAX_QK_DIM, MAX_TOPK, Store, one_device, per_row, separate, within,
};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor, View, ViewMut};
use half::bf16;

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
    /// f32 `[rows, topk]`, written: what the row attends to, without the sink, summed over its heads and divided by
    /// its sum; 0 for an index that does not count. Needs `lse`.
    pub probs: Option<Tensor<'a>>,
}

/// KV rows, always with a page axis; a contiguous store is one page.
#[derive(Clone, Copy, Debug)]
pub enum Kv<'a> {
    /// `[pages, page_size, d_qk]`.
    F32(View<'a, f32, 3>),
    /// `[pages, page_size, d_qk]`.
    Bf16(View<'a, bf16, 3>),
    /// `[pages, page_size, 656]`.
    Fp8(View<'a, u8, 3>),
}

/// Checked sparse attention. A row without any valid index gives zeros, whatever the sink.
#[derive(Clone, Copy, Debug)]
pub struct SparseAttention<'a> {
    /// `[rows, heads, d_qk]`.
    pub q: Floats<'a, 3>,
    /// KV rows.
    pub kv: Kv<'a>,
    /// `[rows, topk]`.
    pub indices: View<'a, i32, 2>,
    /// How logical indices become slots; `None` for the slots form.
    pub map: Option<KeyMap<'a>>,
    /// `[rows]`.
    pub row_topk: Option<View<'a, i32, 1>>,
    /// `[heads]`.
    pub sink: Option<View<'a, f32, 1>>,
    /// Multiplies `q·k`.
    pub softmax_scale: f32,
    /// `[rows, heads, d_v]`.
    pub out: FloatsMut<'a, 3>,
    /// `[rows, heads]`.
    pub lse: Option<ViewMut<'a, f32, 2>>,
    /// `[rows, topk]`; only with `lse`.
    pub probs: Option<ViewMut<'a, f32, 2>>,
    /// Query rows.
    pub rows: usize,
    /// Attention heads.
    pub heads: usize,
    /// Dimension of queries and keys.
    pub d_qk: usize,
    /// Dimension of values.
    pub d_v: usize,
    /// Indices a row.
    pub topk: usize,
    /// Pages and tokens a page.
    pub page_shape: [usize; 2],
    /// Where everything is.
    pub device: Device,
}

impl<'a> SparseAttentionArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<SparseAttention<'a>> {
        let q = Floats::<3>::of(&self.q)?;
        let [rows, heads, d_qk] = q.shape();
        within(self.q.name(), "number of heads", heads, 1, MAX_HEADS)?;
        within(self.q.name(), "head dimension", d_qk, 1, MAX_QK_DIM)?;
        self.out.require_shape(&[Some(rows), Some(heads), None])?;
        let d_v = self.out.shape()[2];
        within(self.out.name(), "value dimension", d_v, 1, d_qk)?;
        // 0 is what a descriptor says that nobody filled in.
        if !(self.softmax_scale.is_finite() && self.softmax_scale > 0.0) {
            return Err(Error::invalid(
                "softmax_scale",
                "a finite, positive number",
                self.softmax_scale,
            ));
        }
        let (kv, page_shape, paged) = self.kv(d_qk, d_v)?;
        self.indices.require_shape(&[Some(rows), None])?;
        let indices = self.indices.view::<i32, 2>()?;
        within(self.indices.name(), "topk", indices.shape()[1], 1, MAX_TOPK)?;
        if let Some(sink) = self.sink {
            sink.require_shape(&[Some(heads)])?;
        }
        if let Some(lse) = self.lse {
            lse.require_shape(&[Some(rows), Some(heads)])?;
        }
        if let Some(probs) = self.probs {
            probs.require_shape(&[Some(rows), Some(indices.shape()[1])])?;
            if self.lse.is_none() {
                return Err(Error::invalid("lse", "a tensor beside probs", "NULL"));
            }
        }
        let [pages, page] = page_shape;
        let map = match self.form {
            IndexForm::Logical => {
                let store =
                    if paged { Store::Paged { pages, page } } else { Store::Contiguous(page) };
                Some(self.map.check(rows, store)?)
            }
            IndexForm::Slots => match self.map.tensors().into_iter().flatten().next() {
                Some(t) => {
                    let got = format_args!("shape {:?}", t.shape());
                    return Err(Error::invalid(t.name(), "none with slots", got));
                }
                None => None,
            },
        };
        let [a, b, c, d] = self.map.tensors();
        let (row_topk, sink) = (self.row_topk.as_ref(), self.sink.as_ref());
        let inputs =
            [Some(&self.q), Some(&self.kv), Some(&self.indices), row_topk, sink, a, b, c, d];
        let device = one_device(&inputs)?;
        let (lse, probs) = (self.lse.as_ref(), self.probs.as_ref());
        for out in [Some(&self.out), lse, probs].into_iter().flatten() {
            out.require_device(device)?;
            separate(out, &inputs)?;
        }
        separate(&self.out, &[lse, probs])?;
        if let Some(probs) = probs {
            separate(probs, &[lse])?;
        }
        Ok(SparseAttention {
            q,
            kv,
            topk: indices.shape()[1],
            indices,
            map,
            row_topk: per_row(self.row_topk, rows)?,
            sink: self.sink.map(|t| t.view()).transpose()?,
            softmax_scale: self.softmax_scale,
            out: FloatsMut::of(&self.out)?,
            lse: self.lse.map(|t| t.view_mut()).transpose()?,
            probs: self.probs.map(|t| t.view_mut()).transpose()?,
            rows,
            heads,
            d_qk,
            d_v,
            page_shape,
            device,
        })
    }

    /// The KV rows with a page axis, their pages and page size, and whether the caller meant pages.
    fn kv(&self, d_qk: usize, d_v: usize) -> Result<(Kv<'a>, [usize; 2], bool)> {
        let t = &self.kv;
        let t = if t.shape().len() == 4 { t.squeeze(2)? } else { *t };
        // `[tokens, 1, …]` is a contiguous store with a unit KV-head axis, unless a block table says pages of one.
        let unit = t.shape().len() == 3 && t.shape()[1] == 1 && self.map.block_table.is_none();
        let t = if unit { t.squeeze(1)? } else { t };
        let paged = t.shape().len() == 3;
        if paged {
            within(t.name(), "a page size", t.shape()[1], 1, i32::MAX as usize)?;
        }
        let t = if let (&[tokens, width], &[step, inner]) = (t.shape(), t.strides()) {
            let (shape, strides) = ([1, tokens, width], [0, step, inner]);
            // SAFETY: the same elements behind one more dimension of extent 1.
            unsafe { t.with_extents(&shape, &strides)? }
        } else {
            t
        };
        let width = if t.dtype() == DType::U8 { KV_FP8_BYTES } else { d_qk };
        t.require_shape(&[None, None, Some(width)])?;
        let kv = match t.dtype() {
            DType::F32 => Kv::F32(t.view()?),
            DType::Bf16 => Kv::Bf16(t.view()?),
            DType::U8 if (d_qk, d_v) == KV_FP8_DIMS => Kv::Fp8(t.view()?),
            DType::U8 => {
                let want = format_args!("q and out of {KV_FP8_DIMS:?} for 656-byte rows");
                return Err(Error::invalid(t.name(), want, format_args!("({d_qk}, {d_v})")));
            }
            other => {
                return Err(Error::invalid(t.name(), "uint8, bfloat16 or float32", other));
            }
        };
        Ok((kv, [t.shape()[0], t.shape()[1]], paged))
    }
}
