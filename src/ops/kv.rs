//! Writing KV rows to their pages.

use super::{Floats, KV_FP8_BYTES, KV_FP8_DIMS, MAX_QK_DIM, Slots, one_device, separate, within};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor, ViewMut};
use half::bf16;

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

/// The pages to write.
#[derive(Clone, Copy, Debug)]
pub enum KvPages<'a> {
    /// `[pages, page_size, d_qk]`.
    F32(ViewMut<'a, f32, 3>),
    /// `[pages, page_size, d_qk]`.
    Bf16(ViewMut<'a, bf16, 3>),
    /// `[pages, page_size, 656]`.
    Fp8(ViewMut<'a, u8, 3>),
}

/// Checked KV write. fp8 scales are `max(amax / 448, 1e-4)` rounded up to a power of two, one per 128 elements, as
/// servers that store these bytes have it. Where two tokens name one slot, the later one stays.
#[derive(Clone, Copy, Debug)]
pub struct KvWrite<'a> {
    /// `[tokens, d_qk]`.
    pub kv: Floats<'a, 2>,
    /// `[tokens]`.
    pub slots: Slots<'a>,
    /// Pages.
    pub pages: KvPages<'a>,
    /// Tokens.
    pub tokens: usize,
    /// Elements a token.
    pub d_qk: usize,
    /// Pages and tokens a page.
    pub page_shape: [usize; 2],
    /// Where everything is.
    pub device: Device,
}

impl<'a> KvWriteArgs<'a> {
    /// Checks shapes, dtypes, strides and devices.
    pub fn check(self) -> Result<KvWrite<'a>> {
        let kv = Floats::<2>::of(&self.kv)?;
        let [tokens, d_qk] = kv.shape();
        within(self.kv.name(), "row length", d_qk, 1, MAX_QK_DIM)?;
        self.slots.require_shape(&[Some(tokens)])?;
        let t = if self.pages.shape().len() == 4 { self.pages.squeeze(2)? } else { self.pages };
        let width = match t.dtype() {
            DType::U8 => {
                self.kv.require_shape(&[None, Some(KV_FP8_DIMS.0)])?;
                KV_FP8_BYTES
            }
            _ => d_qk,
        };
        t.require_shape(&[None, None, Some(width)])?;
        let pages = match t.dtype() {
            DType::U8 => KvPages::Fp8(t.view_mut()?),
            DType::F32 => KvPages::F32(t.view_mut()?),
            DType::Bf16 => KvPages::Bf16(t.view_mut()?),
            other => return Err(Error::invalid(t.name(), "uint8, bfloat16 or float32", other)),
        };
        let device = one_device(&[Some(&self.kv), Some(&self.slots), Some(&self.pages)])?;
        separate(&self.pages, &[Some(&self.kv), Some(&self.slots)])?;
        let page_shape = [t.shape()[0], t.shape()[1]];
        Ok(KvWrite { kv, slots: Slots::of(&self.slots)?, pages, tokens, d_qk, page_shape, device })
    }
}
