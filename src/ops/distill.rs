//! The indexer's distillation loss and its gradients: one served layer a call.

use super::{
    Floats, KeyMap, KeyMapArgs, MAX_HEADS, MAX_INDEX_DIM, MAX_QK_DIM, MAX_TOPK, Store, one_device,
    separate, within,
};
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor, View, ViewMut};

/// Teach one Full layer's indexer the attention of one layer that it serves.
///
/// With `I[t,s] = sum_h w[t,h] * relu(q[t,h]·k[s])` and `n` rows that are not empty, adds
/// `layer_weight / n * sum_t KL(p_t || softmax(I_t))` to `loss`, and its derivatives to the gradients: Eq. 1 of arXiv
/// 2603.12201, one summand a call. Both distributions are over the positions that the row sees or, with `indices`,
/// over those.
#[derive(Clone, Copy, Debug)]
pub struct DistillArgs<'a> {
    /// f32 or bf16 `[rows, heads, dim]`.
    pub q: Tensor<'a>,
    /// f32 or bf16 `[keys, dim]`.
    pub k: Tensor<'a>,
    /// f32 `[rows, heads]`; carries every scale.
    pub weights: Tensor<'a>,
    /// int32 `[rows]`: first key that the row sees. Absent: 0.
    pub row_start: Option<Tensor<'a>>,
    /// int32 `[rows]`: one past the last key that the row sees. Absent: all keys.
    pub row_end: Option<Tensor<'a>>,
    /// int32 `[rows, topk]`, in any order; -1 is skipped, an index that is there twice counts twice. Absent: dense.
    pub indices: Option<Tensor<'a>>,
    /// f32 `[rows, columns]` by position, or `[rows, topk]` beside `indices`: not negative; normalised inside.
    pub target: Option<Tensor<'a>>,
    /// In place of `target`: f32 or bf16 `[rows, attention heads, d_qk]`.
    pub attention_q: Option<Tensor<'a>>,
    /// With `attention_q`: f32 or bf16 `[keys, d_qk]`.
    pub kv: Option<Tensor<'a>>,
    /// With `attention_q`: f32 `[rows, attention heads]`, of the scaled scores.
    pub lse: Option<Tensor<'a>>,
    /// With `attention_q`: multiplies its scores.
    pub softmax_scale: f32,
    /// The layer's share of the loss.
    pub layer_weight: f32,
    /// f32 `[1]`, added to.
    pub loss: Tensor<'a>,
    /// f32 `[rows, heads, dim]`, added to.
    pub grad_q: Option<Tensor<'a>>,
    /// f32 `[keys, dim]`, added to.
    pub grad_k: Option<Tensor<'a>>,
    /// f32 `[rows, heads]`, added to.
    pub grad_weights: Option<Tensor<'a>>,
}

/// What the served layer attends to.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// `[rows, columns]`: by position, or beside the indices.
    Given(View<'a, f32, 2>),
    /// `sum_h exp(scale * q[t,h]·kv[s] - lse[t,h])`.
    Attention {
        /// `[rows, heads, d_qk]`.
        q: Floats<'a, 3>,
        /// `[keys, d_qk]`.
        kv: Floats<'a, 2>,
        /// `[rows, heads]`.
        lse: View<'a, f32, 2>,
        /// Multiplies the scores.
        scale: f32,
    },
}

/// Checked distillation. A row without positions, or without indices, takes no part, and nothing of it is read.
#[derive(Clone, Copy, Debug)]
pub struct Distill<'a> {
    /// `[rows, heads, dim]`.
    pub q: Floats<'a, 3>,
    /// `[keys, dim]`.
    pub k: Floats<'a, 2>,
    /// `[rows, heads]`.
    pub weights: View<'a, f32, 2>,
    /// Where each row's keys are: contiguous.
    pub map: KeyMap<'a>,
    /// `[rows, topk]`.
    pub indices: Option<View<'a, i32, 2>>,
    /// As in [`Target`].
    pub target: Target<'a>,
    /// As in [`DistillArgs`].
    pub layer_weight: f32,
    /// `[1]`.
    pub loss: ViewMut<'a, f32, 1>,
    /// `[rows, heads, dim]`.
    pub grad_q: Option<ViewMut<'a, f32, 3>>,
    /// `[keys, dim]`.
    pub grad_k: Option<ViewMut<'a, f32, 2>>,
    /// `[rows, heads]`.
    pub grad_weights: Option<ViewMut<'a, f32, 2>>,
    /// Query rows.
    pub rows: usize,
    /// Indexer heads.
    pub heads: usize,
    /// Indexer head dimension.
    pub dim: usize,
    /// Keys.
    pub keys: usize,
    /// Where everything is.
    pub device: Device,
}

impl<'a> DistillArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<Distill<'a>> {
        let q = Floats::<3>::of(&self.q)?;
        let [rows, heads, dim] = q.shape();
        within(self.q.name(), "number of heads", heads, 1, MAX_HEADS)?;
        within(self.q.name(), "head dimension", dim, 1, MAX_INDEX_DIM)?;
        self.k.require_shape(&[None, Some(dim)])?;
        let keys = self.k.shape()[0];
        within(self.k.name(), "number of keys", keys, 0, i32::MAX as usize)?;
        self.weights.require_shape(&[Some(rows), Some(heads)])?;
        let map = KeyMapArgs {
            block_table: None,
            row_request: None,
            row_start: self.row_start,
            row_end: self.row_end,
        };
        let topk = match &self.indices {
            Some(t) => {
                t.require_shape(&[Some(rows), None])?;
                within(t.name(), "topk", t.shape()[1], 1, MAX_TOPK)?;
                Some(t.shape()[1])
            }
            None => None,
        };
        if !(self.layer_weight.is_finite() && self.layer_weight > 0.0) {
            let want = "a finite, positive number";
            return Err(Error::invalid("layer_weight", want, self.layer_weight));
        }
        self.loss.require_shape(&[Some(1)])?;
        for (grad, shape) in [
            (&self.grad_q, &[rows, heads, dim][..]),
            (&self.grad_k, &[keys, dim]),
            (&self.grad_weights, &[rows, heads]),
        ] {
            if let Some(t) = grad {
                t.require_shape(&shape.iter().map(|&n| Some(n)).collect::<Vec<_>>())?;
            }
        }
        let inputs = [
            Some(&self.q),
            Some(&self.k),
            Some(&self.weights),
            self.row_start.as_ref(),
            self.row_end.as_ref(),
            self.indices.as_ref(),
            self.target.as_ref(),
            self.attention_q.as_ref(),
            self.kv.as_ref(),
            self.lse.as_ref(),
        ];
        let target = self.target(rows, keys, topk)?;
        let device = one_device(&inputs)?;
        let [grad_q, grad_k, grad_weights] =
            [&self.grad_q, &self.grad_k, &self.grad_weights].map(|t| t.as_ref());
        let outputs = [Some(&self.loss), grad_q, grad_k, grad_weights];
        for (i, out) in outputs.iter().enumerate() {
            if let Some(out) = out {
                out.require_device(device)?;
                separate(out, &inputs)?;
                separate(out, &outputs[..i])?;
            }
        }
        Ok(Distill {
            q,
            k: Floats::of(&self.k)?,
            weights: self.weights.view()?,
            map: map.check(rows, Store::Contiguous(keys))?,
            indices: self.indices.map(|t| t.view()).transpose()?,
            target,
            layer_weight: self.layer_weight,
            loss: self.loss.view_mut()?,
            grad_q: self.grad_q.map(|t| t.view_mut()).transpose()?,
            grad_k: self.grad_k.map(|t| t.view_mut()).transpose()?,
            grad_weights: self.grad_weights.map(|t| t.view_mut()).transpose()?,
            rows,
            heads,
            dim,
            keys,
            device,
        })
    }

    fn target(&self, rows: usize, keys: usize, topk: Option<usize>) -> Result<Target<'a>> {
        if let Some(target) = self.target {
            if let Some(t) = [self.attention_q, self.kv, self.lse].into_iter().flatten().next() {
                let got = format_args!("shape {:?}", t.shape());
                return Err(Error::invalid(t.name(), "none with a target", got));
            }
            target.require_shape(&[Some(rows), topk])?;
            return Ok(Target::Given(target.view()?));
        }
        let Some(q) = self.attention_q else {
            // With one of its companions there it was meant; else nothing was.
            let name =
                if self.kv.is_some() || self.lse.is_some() { "attention_q" } else { "target" };
            return Err(Error::invalid(name, "a target, or attention_q, kv and lse", "none"));
        };
        let need = |t: Option<Tensor<'a>>, name| {
            t.ok_or_else(|| Error::invalid(name, "a tensor beside attention_q", "none"))
        };
        let (kv, lse) = (need(self.kv, "kv")?, need(self.lse, "lse")?);
        q.require_shape(&[Some(rows), None, None])?;
        let [_, heads, d_qk] = Floats::<3>::of(&q)?.shape();
        within(q.name(), "number of heads", heads, 1, MAX_HEADS)?;
        within(q.name(), "head dimension", d_qk, 1, MAX_QK_DIM)?;
        kv.require_shape(&[Some(keys), Some(d_qk)])?;
        lse.require_shape(&[Some(rows), Some(heads)])?;
        if !(self.softmax_scale.is_finite() && self.softmax_scale > 0.0) {
            let want = "a finite, positive number";
            return Err(Error::invalid("softmax_scale", want, self.softmax_scale));
        }
        Ok(Target::Attention {
            q: Floats::of(&q)?,
            kv: Floats::of(&kv)?,
            lse: lse.view()?,
            scale: self.softmax_scale,
        })
    }
}
