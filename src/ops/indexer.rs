//! The lightning indexer: `I[t,s] = ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])`.

use super::{
    FloatsMut, KeyMap, KeyMapArgs, MAX_HEADS, MAX_INDEX_DIM, MAX_TOPK, PAGE, Store, byte_pages,
    one_device, separate, within,
};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, F8E4M3, Tensor, View, ViewMut};
use half::bf16;

/// What to score. Used by `indexer_logits`, `paged_indexer_logits` and `select` alike.
#[derive(Clone, Copy, Debug)]
pub struct IndexerArgs<'a> {
    /// e4m3 or bf16 `[rows, heads, dim]`.
    pub q: Tensor<'a>,
    /// f32 `[rows, heads]`; carries every scale of the query side.
    pub weights: Tensor<'a>,
    /// Contiguous: e4m3 or bf16 `[keys, dim]`. Paged: uint8 `[pages, 64 * (dim + 4)]` (page-planar fp8 + f32 scales;
    /// any shape with that many bytes a page is accepted, such as `[pages, 64, 1, dim + 4]`) or bf16 `[pages, 64, dim]`.
    pub k: Tensor<'a>,
    /// f32 `[keys]`; with contiguous e4m3 keys only, and then required.
    pub k_scale: Option<Tensor<'a>>,
    /// Where each row's keys are.
    pub map: KeyMapArgs<'a>,
}

/// Indexer queries `[rows, heads, dim]`.
#[derive(Clone, Copy, Debug)]
pub enum Query<'a> {
    /// fp8, for fp8 keys.
    F8(View<'a, F8E4M3, 3>),
    /// bf16, for bf16 keys. Magnitudes under 2^-56 count as zero, here and in the keys: then no intermediate
    /// result is subnormal, and every instruction set computes the same bits.
    Bf16(View<'a, bf16, 3>),
}

/// Indexer keys.
#[derive(Clone, Copy, Debug)]
pub enum Keys<'a> {
    /// `[keys, dim]` and their scales.
    F8(View<'a, F8E4M3, 2>, View<'a, f32, 1>),
    /// `[keys, dim]`.
    Bf16(View<'a, bf16, 2>),
    /// `[pages, 64 * (dim + 4)]`, page-planar.
    PagedF8(View<'a, u8, 2>),
    /// `[pages, 64, dim]`.
    PagedBf16(View<'a, bf16, 3>),
}

/// Checked scoring.
#[derive(Clone, Copy, Debug)]
pub struct Indexer<'a> {
    /// Queries.
    pub q: Query<'a>,
    /// `[rows, heads]`.
    pub weights: View<'a, f32, 2>,
    /// Keys.
    pub keys: Keys<'a>,
    /// Where each row's keys are.
    pub map: KeyMap<'a>,
    /// Query rows.
    pub rows: usize,
    /// Indexer heads.
    pub heads: usize,
    /// Indexer head dimension.
    pub dim: usize,
    /// Where everything is.
    pub device: Device,
}

/// Checked scoring into memory. Column `s` of row `r` is logical position `s`; columns past a row's end get -inf.
/// A score that is NaN is written as the one quiet NaN, zero as +0.
#[derive(Clone, Copy, Debug)]
pub struct IndexerLogits<'a> {
    /// What to score.
    pub indexer: Indexer<'a>,
    /// `[rows, columns]`, at least as many columns as the longest row has positions.
    pub out: FloatsMut<'a, 2>,
}

/// Checked scoring and selection in one. NaN scores rank with -inf, and zeros of either sign tie.
#[derive(Clone, Copy, Debug)]
pub struct Select<'a> {
    /// What to score.
    pub indexer: Indexer<'a>,
    /// `[rows, topk]`, logical positions, ascending, -1 tail.
    pub indices: ViewMut<'a, i32, 2>,
    /// Indices a row.
    pub topk: usize,
}

impl IndexerLogits<'_> {
    /// Columns of the output.
    pub fn columns(&self) -> usize {
        match self.out {
            FloatsMut::F32(v) => v.shape()[1],
            FloatsMut::Bf16(v) => v.shape()[1],
        }
    }
}

impl<'a> IndexerArgs<'a> {
    fn inputs(&self) -> [Option<&Tensor<'a>>; 8] {
        let [a, b, c, d] = self.map.tensors();
        [Some(&self.q), Some(&self.weights), Some(&self.k), self.k_scale.as_ref(), a, b, c, d]
    }

    fn check(&self) -> Result<Indexer<'a>> {
        let q = match self.q.dtype() {
            DType::F8E4M3 => Query::F8(self.q.view()?),
            DType::Bf16 => Query::Bf16(self.q.view()?),
            other => return Err(Error::invalid(self.q.name(), "float8_e4m3fn or bfloat16", other)),
        };
        let [rows, heads, dim] = match q {
            Query::F8(v) => v.shape(),
            Query::Bf16(v) => v.shape(),
        };
        within(self.q.name(), "number of heads", heads, 1, MAX_HEADS)?;
        if dim == 0 || dim > MAX_INDEX_DIM || !dim.is_multiple_of(16) {
            let want = format_args!("head dimension a multiple of 16 up to {MAX_INDEX_DIM}");
            return Err(Error::invalid(self.q.name(), want, dim));
        }
        self.weights.require_shape(&[Some(rows), Some(heads)])?;
        let (keys, store) = self.keys(&q, dim)?;
        if matches!(store, Store::Paged { .. }) && self.map.row_end.is_none() {
            return Err(Error::invalid("row_end", "the length of each row for paged keys", "none"));
        }
        let map = self.map.check(rows, store)?;
        within(self.k.name(), "number of positions", map.max_len(), 0, i32::MAX as usize)?;
        Ok(Indexer {
            q,
            weights: self.weights.view()?,
            keys,
            map,
            rows,
            heads,
            dim,
            device: one_device(&self.inputs())?,
        })
    }

    fn keys(&self, q: &Query<'_>, dim: usize) -> Result<(Keys<'a>, Store)> {
        let k = &self.k;
        let scale = match (self.k_scale, q, self.map.block_table) {
            (Some(t), Query::F8(_), None) => Some(t),
            (Some(t), ..) => {
                let want = "none: only contiguous float8_e4m3fn keys have separate scales";
                return Err(Error::invalid(t.name(), want, format_args!("{:?}", t.shape())));
            }
            (None, Query::F8(_), None) => {
                let want = "a scale for each contiguous float8_e4m3fn key";
                return Err(Error::invalid("k_scale", want, "none"));
            }
            _ => None,
        };
        let (keys, store) = match (q, self.map.block_table, scale) {
            (Query::F8(_), None, Some(scale)) => {
                k.require_shape(&[None, Some(dim)])?;
                let values = k.view::<F8E4M3, 2>()?;
                scale.require_shape(&[Some(values.shape()[0])])?;
                (Keys::F8(values, scale.view()?), Store::Contiguous(values.shape()[0]))
            }
            (Query::Bf16(_), None, _) => {
                k.require_shape(&[None, Some(dim)])?;
                let values = k.view::<bf16, 2>()?;
                (Keys::Bf16(values), Store::Contiguous(values.shape()[0]))
            }
            (Query::F8(_), ..) => {
                let pages = byte_pages(k, PAGE * (dim + 4))?.view::<u8, 2>()?;
                (Keys::PagedF8(pages), Store::Paged { pages: pages.shape()[0], page: PAGE })
            }
            (Query::Bf16(_), Some(_), _) => {
                let k = if k.shape().len() == 4 { k.squeeze(2)? } else { *k };
                k.require_shape(&[None, Some(PAGE), Some(dim)])?;
                let pages = k.view::<bf16, 3>()?;
                (Keys::PagedBf16(pages), Store::Paged { pages: pages.shape()[0], page: PAGE })
            }
        };
        Ok((keys, store))
    }

    /// Scores into `out`, f32 or bf16 `[rows, columns]`.
    pub fn check_logits(self, out: Tensor<'a>) -> Result<IndexerLogits<'a>> {
        let indexer = self.check()?;
        out.require_device(indexer.device)?;
        out.require_shape(&[Some(indexer.rows), None])?;
        separate(&out, &self.inputs())?;
        Ok(IndexerLogits { indexer, out: FloatsMut::of(&out)? })
    }

    /// Selects into `indices`, int32 `[rows, topk]`.
    pub fn check_select(self, indices: Tensor<'a>) -> Result<Select<'a>> {
        let indexer = self.check()?;
        indices.require_device(indexer.device)?;
        indices.require_shape(&[Some(indexer.rows), None])?;
        let view = indices.view_mut::<i32, 2>()?;
        let topk = view.shape()[1];
        within(indices.name(), "topk", topk, 1, MAX_TOPK)?;
        separate(&indices, &self.inputs())?;
        Ok(Select { indexer, indices: view, topk })
    }
}
