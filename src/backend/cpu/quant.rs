//! Quantising index keys, index queries and KV rows.
//!
//! Shapes: `[tokens, dim]` to pages; `[rows, heads, dim]` to the same in fp8.
//! Idea: one pass for the largest magnitude, one to round. Tokens may name one slot twice, so a worker owns slots,
//! not tokens: it writes those that fall to it in order, and the last token stays, as it would one after the other.
//! Roofline: memory; a few operations an element.

use super::Cpu;
use crate::fp8;
use crate::ops::{
    Floats, FloatsMut, IndexKWrite, IndexQQuantize, KV_FP8_DIMS, KvPages, KvWrite, MAX_INDEX_DIM,
    MAX_QK_DIM, PAGE,
};
use crate::tensor::F8E4M3;
use half::bf16;
use half::slice::HalfFloatSliceExt;

/// Elements that are worth a thread.
const GRAIN: usize = 16 * 1024;

pub(super) fn to_f32<const N: usize>(x: &Floats<'_, N>, at: &[usize], out: &mut [f32]) {
    match x {
        Floats::F32(v) => out.copy_from_slice(v.row(at)),
        Floats::Bf16(v) => v.row(at).convert_to_f32_slice(out),
    }
}

/// Largest finite magnitude, at least `floor`.
fn amax(x: &[f32], floor: f32) -> f32 {
    x.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(floor, f32::max)
}

/// Rotation by the orthonormal Hadamard matrix, by butterflies.
fn hadamard(x: &mut [f32]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let norm = 1.0 / (x.len() as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= norm);
}

/// Rotates if asked, and gives the scale to divide by.
fn prepare(x: &mut [f32], rotate: bool, pow2: bool) -> f32 {
    if rotate {
        hadamard(x);
    }
    let scale = amax(x, 1e-4) / fp8::MAX;
    if pow2 { fp8::pow2_at_least(scale) } else { scale }
}

pub(super) fn index_k_write(cpu: &Cpu, op: &IndexKWrite<'_>) {
    let workers = (op.tokens * op.dim / GRAIN).clamp(1, cpu.threads());
    cpu.run(workers, |worker| {
        let mut x = [0.0; MAX_INDEX_DIM];
        let x = &mut x[..op.dim];
        for t in 0..op.tokens {
            let Ok(slot) = usize::try_from(op.slots.get(t)) else { continue };
            let (page, at) = (slot / PAGE, slot % PAGE);
            if page % workers != worker {
                continue;
            }
            to_f32(&op.k, &[t], x);
            let scale = prepare(x, op.hadamard, op.pow2_scale);
            // SAFETY: the page is this worker's alone.
            let (values, scales) = unsafe { op.pages.row(&[page]) }.split_at_mut(PAGE * op.dim);
            let codes = values[at * op.dim..][..op.dim].iter_mut();
            codes.zip(&*x).for_each(|(o, &x)| *o = fp8::encode(x / scale));
            scales[4 * at..][..4].copy_from_slice(&scale.to_le_bytes());
        }
    });
}

pub(super) fn index_q_quantize(cpu: &Cpu, op: &IndexQQuantize<'_>) {
    let [rows, heads, dim] = op.q.shape();
    let per_task = (GRAIN / (heads * dim)).max(1);
    cpu.run(rows.div_ceil(per_task), |task| {
        let mut x = [0.0; MAX_INDEX_DIM];
        let x = &mut x[..dim];
        for t in task * per_task..((task + 1) * per_task).min(rows) {
            for h in 0..heads {
                to_f32(&op.q, &[t, h], x);
                let scale = prepare(x, op.hadamard, op.pow2_scale);
                // SAFETY: one task a row.
                let codes = unsafe { op.q_out.row(&[t, h]) }.iter_mut();
                codes.zip(&*x).for_each(|(o, &x)| *o = F8E4M3(fp8::encode(x / scale)));
                let weight = op.weights.row(&[t])[h] * op.scale * scale;
                // SAFETY: one task a row, and no reference to `weights`, which may lie in the same place.
                unsafe { op.weights_out.row(&[t])[h] = weight };
            }
        }
    });
}

pub(super) fn kv_write(cpu: &Cpu, op: &KvWrite<'_>) {
    let workers = (op.tokens * op.d_qk / GRAIN).clamp(1, cpu.threads());
    cpu.run(workers, |worker| {
        let mut x = [0.0; MAX_QK_DIM];
        let x = &mut x[..op.d_qk];
        for t in 0..op.tokens {
            let Ok(slot) = usize::try_from(op.slots.get(t)) else { continue };
            if slot / 16 % workers != worker {
                continue;
            }
            to_f32(&op.kv, &[t], x);
            let at = [slot / op.page_shape[1], slot % op.page_shape[1]];
            // SAFETY: the slot is this worker's alone.
            unsafe {
                match op.pages {
                    KvPages::F32(v) => v.row(&at).copy_from_slice(x),
                    KvPages::Bf16(v) => v.row(&at).convert_from_f32_slice(x),
                    KvPages::Fp8(v) => pack(x, v.row(&at)),
                }
            }
        }
    });
}

/// The 656-byte row: 512 e4m3, 4 f32 scales, 64 bf16.
fn pack(x: &[f32], out: &mut [u8]) {
    let (x, rope) = x.split_at(KV_FP8_DIMS.1);
    let (codes, rest) = out.split_at_mut(KV_FP8_DIMS.1);
    let (scales, rope_out) = rest.split_at_mut(16);
    let tiles = x.chunks_exact(128).zip(codes.chunks_exact_mut(128));
    for ((x, codes), scale_out) in tiles.zip(scales.chunks_exact_mut(4)) {
        let scale = fp8::pow2_at_least((amax(x, 0.0) / fp8::MAX).max(1e-4));
        codes.iter_mut().zip(x).for_each(|(o, &x)| *o = fp8::encode(x / scale));
        scale_out.copy_from_slice(&scale.to_le_bytes());
    }
    for (o, &x) in rope_out.chunks_exact_mut(2).zip(rope) {
        o.copy_from_slice(&bf16::from_f32(x).to_le_bytes());
    }
}

/// Logical indices to slots; output may be the input.
pub(super) fn indices_to_slots(cpu: &Cpu, op: &crate::ops::IndicesToSlots<'_>) {
    let [rows, k] = op.indices.shape();
    let per_task = (GRAIN / k.max(1)).max(1);
    cpu.run(rows.div_ceil(per_task), |task| {
        for t in task * per_task..((task + 1) * per_task).min(rows) {
            let from = op.indices.as_ptr().wrapping_add(t * op.indices.strides()[0]);
            let to = op.slots.as_mut_ptr().wrapping_add(t * op.slots.strides()[0]);
            for j in 0..k {
                // SAFETY: element `[t, j]` of both, which lie apart or on each other; one task a row; no
                // references are made.
                unsafe {
                    let slot = usize::try_from(*from.add(j)).ok().and_then(|p| op.map.slot(t, p));
                    *to.add(j) = slot.map_or(-1, |s| s as i32);
                }
            }
        }
    });
}

/// Rounds one row of results to the output's type.
///
/// # Safety
/// No other reference to the row may be alive.
pub(super) unsafe fn put<const N: usize>(out: &FloatsMut<'_, N>, at: &[usize], x: &[f32]) {
    // SAFETY: passed on.
    unsafe {
        match out {
            FloatsMut::F32(v) => v.row(at).copy_from_slice(x),
            FloatsMut::Bf16(v) => v.row(at).convert_from_f32_slice(x),
        }
    }
}
