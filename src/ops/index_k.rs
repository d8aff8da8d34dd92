//! Quantising the indexer's keys and queries.

use super::{
    Floats, MAX_HEADS, MAX_INDEX_DIM, PAGE, Slots, byte_pages, one_device, separate, within,
};
use crate::error::{Error, Result};
use crate::tensor::{Device, F8E4M3, Tensor, View, ViewMut};

/// Quantise new indexer keys and write them to their pages.
#[derive(Clone, Copy, Debug)]
pub struct IndexKWriteArgs<'a> {
    /// f32 or bf16 `[tokens, dim]`.
    pub k: Tensor<'a>,
    /// int32 or int64 `[tokens]`: `page * 64 + offset`, -1 skips the token.
    pub slots: Tensor<'a>,
    /// Pages, as in [`super::IndexerArgs::k`].
    pub pages: Tensor<'a>,
    /// Rotate by the orthonormal Hadamard matrix first.
    pub hadamard: bool,
    /// Round scales up to a power of two.
    pub pow2_scale: bool,
}

/// Quantise indexer queries; the scale is folded into the head weights.
#[derive(Clone, Copy, Debug)]
pub struct IndexQQuantizeArgs<'a> {
    /// f32 or bf16 `[rows, heads, dim]`.
    pub q: Tensor<'a>,
    /// f32 `[rows, heads]`: raw head weights.
    pub weights: Tensor<'a>,
    /// Multiplied into the weights; usually `dim^-0.5 * heads^-0.5`.
    pub scale: f32,
    /// Rotate by the orthonormal Hadamard matrix first (as the keys were).
    pub hadamard: bool,
    /// Round scales up to a power of two.
    pub pow2_scale: bool,
    /// e4m3 `[rows, heads, dim]`, written.
    pub q_out: Tensor<'a>,
    /// f32 `[rows, heads]`, written: `weights * scale * q_scale`. May be `weights` itself.
    pub weights_out: Tensor<'a>,
}

/// Checked quantise-and-write. The scale of a token is `max(amax, 1e-4) / 448`, as servers that store these bytes
/// have it, so a token of zeros is zeros with a tiny scale. Infinite elements do not count towards `amax` and
/// saturate; NaN stays NaN. Where two tokens name one slot, the later one stays.
#[derive(Clone, Copy, Debug)]
pub struct IndexKWrite<'a> {
    /// `[tokens, dim]`.
    pub k: Floats<'a, 2>,
    /// `[tokens]`.
    pub slots: Slots<'a>,
    /// `[pages, 64 * (dim + 4)]`.
    pub pages: ViewMut<'a, u8, 2>,
    /// As in [`IndexKWriteArgs`].
    pub hadamard: bool,
    /// As in [`IndexKWriteArgs`].
    pub pow2_scale: bool,
    /// Tokens.
    pub tokens: usize,
    /// Indexer head dimension.
    pub dim: usize,
    /// Where everything is.
    pub device: Device,
}

/// Checked query quantisation; scales are chosen as for keys.
#[derive(Clone, Copy, Debug)]
pub struct IndexQQuantize<'a> {
    /// `[rows, heads, dim]`.
    pub q: Floats<'a, 3>,
    /// `[rows, heads]`.
    pub weights: View<'a, f32, 2>,
    /// As in [`IndexQQuantizeArgs`].
    pub scale: f32,
    /// As in [`IndexQQuantizeArgs`].
    pub hadamard: bool,
    /// As in [`IndexQQuantizeArgs`].
    pub pow2_scale: bool,
    /// `[rows, heads, dim]`.
    pub q_out: ViewMut<'a, F8E4M3, 3>,
    /// `[rows, heads]`.
    pub weights_out: ViewMut<'a, f32, 2>,
    /// Where everything is.
    pub device: Device,
}

fn check_dim(name: &str, dim: usize, hadamard: bool) -> Result<()> {
    let want = if hadamard {
        format!("head dimension a power of two of 16 to {MAX_INDEX_DIM} for the Hadamard rotation")
    } else {
        format!("head dimension a multiple of 16 up to {MAX_INDEX_DIM}")
    };
    let ok = (16..=MAX_INDEX_DIM).contains(&dim)
        && dim.is_multiple_of(16)
        && (!hadamard || dim.is_power_of_two());
    if ok { Ok(()) } else { Err(Error::invalid(name, want, dim)) }
}

impl<'a> IndexKWriteArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<IndexKWrite<'a>> {
        let k = Floats::<2>::of(&self.k)?;
        let [tokens, dim] = k.shape();
        check_dim(self.k.name(), dim, self.hadamard)?;
        self.slots.require_shape(&[Some(tokens)])?;
        let device = one_device(&[Some(&self.k), Some(&self.slots), Some(&self.pages)])?;
        separate(&self.pages, &[Some(&self.k), Some(&self.slots)])?;
        Ok(IndexKWrite {
            k,
            slots: Slots::of(&self.slots)?,
            pages: byte_pages(&self.pages, PAGE * (dim + 4))?.view_mut()?,
            hadamard: self.hadamard,
            pow2_scale: self.pow2_scale,
            tokens,
            dim,
            device,
        })
    }
}

impl<'a> IndexQQuantizeArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<IndexQQuantize<'a>> {
        let q = Floats::<3>::of(&self.q)?;
        let [rows, heads, dim] = q.shape();
        within(self.q.name(), "number of heads", heads, 1, MAX_HEADS)?;
        check_dim(self.q.name(), dim, self.hadamard)?;
        if !self.scale.is_finite() {
            return Err(Error::invalid("scale", "a finite number", self.scale));
        }
        self.weights.require_shape(&[Some(rows), Some(heads)])?;
        self.q_out.require_shape(&[Some(rows), Some(heads), Some(dim)])?;
        self.weights_out.require_shape(&[Some(rows), Some(heads)])?;
        let in_place = self.weights_out.as_ptr() == self.weights.as_ptr()
            && self.weights_out.strides() == self.weights.strides();
        let device = one_device(&[
            Some(&self.q),
            Some(&self.weights),
            Some(&self.q_out),
            Some(&self.weights_out),
        ])?;
        separate(&self.q_out, &[Some(&self.q), Some(&self.weights)])?;
        let apart = Some(&self.weights).filter(|_| !in_place);
        separate(&self.weights_out, &[Some(&self.q), Some(&self.q_out), apart])?;
        Ok(IndexQQuantize {
            q,
            weights: self.weights.view()?,
            scale: self.scale,
            hadamard: self.hadamard,
            pow2_scale: self.pow2_scale,
            q_out: self.q_out.view_mut()?,
            weights_out: self.weights_out.view_mut()?,
            device,
        })
    }
}
