//! The operations: what they take, which shapes and dtypes are right, how much scratch they need.
//!
//! Nothing here computes. `…Args` mirror the C descriptors one to one; `check` turns them into typed views that a
//! backend can trust, or into an error that names the argument.

mod attention;
mod distill;
mod index_k;
mod indexer;
mod indices;
mod keys;
mod kv;
mod topk;

pub use attention::{Kv, SparseAttention, SparseAttentionArgs};
pub use distill::{Distill, DistillArgs, Target};
pub use index_k::{IndexKWrite, IndexKWriteArgs, IndexQQuantize, IndexQQuantizeArgs};
pub use indexer::{Indexer, IndexerArgs, IndexerLogits, Keys, Query, Select};
pub use indices::{IndexForm, IndicesToSlots, IndicesToSlotsArgs, Overlap};
pub use keys::{KeyMap, KeyMapArgs, Store};
pub use kv::{KvPages, KvWrite, KvWriteArgs};
pub use topk::{TopK, TopKArgs};

use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor, View, ViewMut};
use half::bf16;

/// Largest number of indices a row.
pub const MAX_TOPK: usize = 4096;
/// Tokens in a page of index K, and of fp8 KV.
pub const PAGE: usize = 64;
/// Bytes of a token in the V3.2 fp8 KV layout: 512 e4m3, 4 f32 scales, 64 bf16.
pub const KV_FP8_BYTES: usize = 656;
/// Elements of such a token, and how many of them are fp8 and values.
pub const KV_FP8_DIMS: (usize, usize) = (576, 512);
/// Largest number of heads, of the indexer and of attention.
pub const MAX_HEADS: usize = 128;
/// Largest indexer head dimension.
pub const MAX_INDEX_DIM: usize = 256;
/// Largest attention head dimension.
pub const MAX_QK_DIM: usize = 1024;

/// A view whose elements are f32 or bf16.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a, const N: usize> {
    /// IEEE single.
    F32(View<'a, f32, N>),
    /// bfloat16.
    Bf16(View<'a, bf16, N>),
}

/// A writable view whose elements are f32 or bf16.
#[derive(Clone, Copy, Debug)]
pub enum FloatsMut<'a, const N: usize> {
    /// IEEE single.
    F32(ViewMut<'a, f32, N>),
    /// bfloat16.
    Bf16(ViewMut<'a, bf16, N>),
}

impl<'a, const N: usize> Floats<'a, N> {
    fn of(t: &Tensor<'a>) -> Result<Self> {
        match t.dtype() {
            DType::F32 => Ok(Floats::F32(t.view()?)),
            DType::Bf16 => Ok(Floats::Bf16(t.view()?)),
            other => Err(Error::invalid(t.name(), "float32 or bfloat16", other)),
        }
    }
    /// Extents.
    pub fn shape(&self) -> [usize; N] {
        match self {
            Floats::F32(v) => v.shape(),
            Floats::Bf16(v) => v.shape(),
        }
    }
}

impl<'a, const N: usize> FloatsMut<'a, N> {
    fn of(t: &Tensor<'a>) -> Result<Self> {
        match t.dtype() {
            DType::F32 => Ok(FloatsMut::F32(t.view_mut()?)),
            DType::Bf16 => Ok(FloatsMut::Bf16(t.view_mut()?)),
            other => Err(Error::invalid(t.name(), "float32 or bfloat16", other)),
        }
    }
}

/// Slot numbers, 32 or 64 bits wide.
#[derive(Clone, Copy, Debug)]
pub enum Slots<'a> {
    /// int32.
    I32(View<'a, i32, 1>),
    /// int64.
    I64(View<'a, i64, 1>),
}

impl<'a> Slots<'a> {
    /// How many.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match self {
            Slots::I32(v) => v.shape()[0],
            Slots::I64(v) => v.shape()[0],
        }
    }
    /// Host only: one of them.
    pub fn get(&self, i: usize) -> i64 {
        match self {
            Slots::I32(v) => i64::from(v.row(&[])[i]),
            Slots::I64(v) => v.row(&[])[i],
        }
    }
    fn of(t: &Tensor<'a>) -> Result<Self> {
        match t.dtype() {
            DType::I32 => Ok(Slots::I32(t.view()?)),
            DType::I64 => Ok(Slots::I64(t.view()?)),
            other => Err(Error::invalid(t.name(), "int32 or int64", other)),
        }
    }
}

/// The device that all tensors are on.
fn one_device(tensors: &[Option<&Tensor<'_>>]) -> Result<Device> {
    let mut all = tensors.iter().flatten();
    let device = all.next().map_or(Device::Cpu, |t| t.device());
    all.try_for_each(|t| t.require_device(device)).map(|()| device)
}

/// Bytes from the first to past the last element; and those of one step of the first dimension.
fn extents(t: &Tensor<'_>) -> (usize, usize) {
    let extent = |shape: &[usize], strides: &[usize]| {
        let steps = shape.iter().zip(strides).map(|(&n, &s)| (n - 1) * s);
        (steps.sum::<usize>() + 1) * t.dtype().size()
    };
    if t.shape().contains(&0) {
        return (0, 0);
    }
    let inner = usize::from(!t.shape().is_empty());
    (extent(t.shape(), t.strides()), extent(&t.shape()[inner..], &t.strides()[inner..]))
}

/// Refuses an output that shares memory with another argument. Columns of one wide matrix do not.
fn separate(out: &Tensor<'_>, others: &[Option<&Tensor<'_>>]) -> Result<()> {
    let (out_all, out_row) = extents(out);
    for t in others.iter().flatten() {
        let (all, row) = extents(t);
        let (a, b) = (out.as_ptr().addr(), t.as_ptr().addr());
        let none = out.as_ptr().is_null() || t.as_ptr().is_null(); // Only shapes are asked about.
        if none || out_all == 0 || all == 0 || a + out_all <= b || b + all <= a {
            continue;
        }
        let step = |t: &Tensor<'_>| t.strides().first().map_or(0, |s| s * t.dtype().size());
        let pitch = step(out);
        if pitch > 0 && pitch == step(t) {
            // Where a row of `out` starts within the rows of `t`.
            let at = (a as isize - b as isize).rem_euclid(pitch as isize) as usize;
            if at >= row && at + out_row <= pitch {
                continue;
            }
        }
        return Err(Error::invalid(
            out.name(),
            format_args!("memory apart from {}", t.name()),
            "memory that overlaps it",
        ));
    }
    Ok(())
}

/// Refuses a number outside a range.
fn within(name: &str, what: &str, n: usize, min: usize, max: usize) -> Result<()> {
    if (min..=max).contains(&n) {
        return Ok(());
    }
    Err(Error::invalid(name, format_args!("{what} of {min} to {max}"), n))
}

/// A 1-D view with one element a row.
fn per_row<'a, T: crate::tensor::Element>(
    t: Option<Tensor<'a>>,
    rows: usize,
) -> Result<Option<View<'a, T, 1>>> {
    t.map(|t| t.require_shape(&[Some(rows)]).and_then(|()| t.view())).transpose()
}

/// Pages of raw bytes, whatever the dimensions inside a page, as `[pages, bytes]`.
fn byte_pages<'a>(t: &Tensor<'a>, bytes: usize) -> Result<Tensor<'a>> {
    if t.dtype() != DType::U8 {
        return Err(Error::invalid(t.name(), DType::U8, t.dtype()));
    }
    let dense = crate::tensor::dense_strides(t.shape());
    let inner = t.shape().get(1..).unwrap_or(&[]);
    let gaps = (1..t.shape().len()).any(|d| t.shape()[d] > 1 && t.strides()[d] != dense[d]);
    let got = inner.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
    if t.shape().len() < 2 || gaps || got != Some(bytes) {
        return Err(Error::invalid(
            t.name(),
            format_args!("pages of {bytes} bytes without gaps"),
            format_args!("shape {:?} with strides {:?}", t.shape(), t.strides()),
        ));
    }
    let stride = t.strides()[0];
    if t.shape()[0] > 0 && (!t.as_ptr().addr().is_multiple_of(4) || !stride.is_multiple_of(4)) {
        return Err(Error::invalid(
            t.name(),
            "pages aligned to 4 bytes, for the scales in them",
            format_args!("{:p} with stride {stride}", t.as_ptr()),
        ));
    }
    // SAFETY: the same memory, each page's dimensions flattened; it has no gaps inside a page.
    unsafe { t.with_extents(&[t.shape()[0], bytes], &[stride, 1]) }
}
