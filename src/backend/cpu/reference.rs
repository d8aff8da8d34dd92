//! The obvious version of every operation: one loop after the other, f64 sums. Slow, and there to be believed.
//!
//! Arguments must have passed the checks; the tests compare the fast versions with these.
#![allow(missing_docs)]

use crate::fp8;
use crate::ops::*;
use crate::tensor::F8E4M3;
use half::bf16;

fn row<const N: usize>(x: &Floats<'_, N>, at: &[usize]) -> Vec<f64> {
    match x {
        Floats::F32(v) => v.row(at).iter().map(|&x| f64::from(x)).collect(),
        Floats::Bf16(v) => v.row(at).iter().map(|x| x.to_f64()).collect(),
    }
}

fn put<const N: usize>(x: &FloatsMut<'_, N>, at: &[usize], values: &[f64]) {
    // SAFETY: this module runs on one thread and keeps no row.
    unsafe {
        match x {
            FloatsMut::F32(v) => {
                v.row(at).iter_mut().zip(values).for_each(|(o, &x)| *o = x as f32);
            }
            FloatsMut::Bf16(v) => {
                v.row(at).iter_mut().zip(values).for_each(|(o, &x)| *o = bf16::from_f32(x as f32));
            }
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn e4m3(codes: &[F8E4M3]) -> Vec<f64> {
    codes.iter().map(|c| f64::from(fp8::decode(c.0))).collect()
}

fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The key in a slot, and its scale.
fn key(ix: &Indexer<'_>, slot: usize) -> (Vec<f64>, f64) {
    let (page, at) = (slot / PAGE, slot % PAGE);
    match ix.keys {
        Keys::F8(v, scale) => (e4m3(v.row(&[slot])), f64::from(scale.row(&[])[slot])),
        Keys::Bf16(v) => (v.row(&[slot]).iter().map(|x| x.to_f64()).collect(), 1.0),
        Keys::PagedBf16(v) => (v.row(&[page, at]).iter().map(|x| x.to_f64()).collect(), 1.0),
        Keys::PagedF8(v) => {
            let (bytes, dim) = (v.row(&[page]), ix.dim);
            let values = bytes[at * dim..][..dim].iter().map(|&c| f64::from(fp8::decode(c)));
            (values.collect(), f64::from(f32_at(bytes, PAGE * dim + 4 * at)))
        }
    }
}

/// `ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])` of every position that row `t` sees.
pub fn scores(ix: &Indexer<'_>, t: usize) -> Vec<f64> {
    let q = |h| match ix.q {
        Query::F8(v) => e4m3(v.row(&[t, h])),
        Query::Bf16(v) => v.row(&[t, h]).iter().map(|x| x.to_f64()).collect(),
    };
    let q: Vec<Vec<f64>> = (0..ix.heads).map(q).collect();
    let w = ix.weights.row(&[t]);
    let score = |s| {
        let (k, scale) = key(ix, ix.map.slot(t, s).unwrap_or_default() as usize);
        let relu = |x: f64| if x < 0.0 { 0.0 } else { x };
        scale * q.iter().zip(w).map(|(q, &w)| f64::from(w) * relu(dot(q, &k))).sum::<f64>()
    };
    (0..ix.map.len(t)).map(score).collect()
}

pub fn indexer_logits(op: &IndexerLogits<'_>) {
    for t in 0..op.indexer.rows {
        let mut out = scores(&op.indexer, t);
        out.resize(op.columns(), f64::NEG_INFINITY);
        put(&op.out, &[t], &out);
    }
}

/// The k best positions, ascending, -1 tail: a full sort by score, then position.
pub fn top(scores: &[f64], out: &mut [i32]) {
    let rank = |s: f64| if s.is_nan() { f64::NEG_INFINITY } else { s + 0.0 };
    let mut order: Vec<i32> = (0..scores.len() as i32).collect();
    order.sort_by(|&a, &b| {
        rank(scores[b as usize]).total_cmp(&rank(scores[a as usize])).then(a.cmp(&b))
    });
    order.truncate(out.len());
    order.sort();
    out.fill(-1);
    out[..order.len()].copy_from_slice(&order);
}

pub fn select(op: &Select<'_>) {
    for t in 0..op.indexer.rows {
        // SAFETY: one row at a time, on one thread.
        top(&scores(&op.indexer, t), unsafe { op.indices.row(&[t]) });
    }
}

pub fn topk(op: &TopK<'_>) {
    for t in 0..op.logits.shape()[0] {
        // SAFETY: one row at a time, on one thread.
        top(&row(&op.logits, &[t])[op.columns(t)], unsafe { op.indices.row(&[t]) });
    }
}

pub fn indices_to_slots(op: &IndicesToSlots<'_>) {
    for t in 0..op.indices.shape()[0] {
        let logical = op.indices.row(&[t]).to_vec();
        let slot = |i: i32| usize::try_from(i).ok().and_then(|p| op.map.slot(t, p));
        // SAFETY: one row at a time, on one thread; what may share its memory was copied.
        let slots = unsafe { op.slots.row(&[t]) };
        slots.iter_mut().zip(logical).for_each(|(o, i)| *o = slot(i).map_or(-1, |s| s as i32));
    }
}

/// Rotation by the orthonormal Hadamard matrix: `H[i][j] = (-1)^popcount(i & j) / sqrt(n)`.
pub fn hadamard(x: &[f64]) -> Vec<f64> {
    let sign = |i: usize, j: usize| [1.0, -1.0][(i & j).count_ones() as usize % 2];
    let norm = (x.len() as f64).sqrt();
    let one = |i| x.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum::<f64>() / norm;
    (0..x.len()).map(one).collect()
}

/// Codes and scale of one quantised vector.
fn quantize(x: &[f64], rotate: bool, pow2: bool) -> (Vec<u8>, f32) {
    let x = if rotate { hadamard(x) } else { x.to_vec() };
    let amax = x.iter().filter(|x| x.is_finite()).fold(1e-4f32, |a, x| a.max(x.abs() as f32));
    let scale = if pow2 { fp8::pow2_at_least(amax / fp8::MAX) } else { amax / fp8::MAX };
    (x.iter().map(|&x| fp8::encode(x as f32 / scale)).collect(), scale)
}

pub fn index_k_write(op: &IndexKWrite<'_>) {
    for t in 0..op.tokens {
        let Ok(slot) = usize::try_from(op.slots.get(t)) else { continue };
        let (codes, scale) = quantize(&row(&op.k, &[t]), op.hadamard, op.pow2_scale);
        // SAFETY: one page at a time, on one thread.
        let page = unsafe { op.pages.row(&[slot / PAGE]) };
        page[slot % PAGE * op.dim..][..op.dim].copy_from_slice(&codes);
        page[PAGE * op.dim + slot % PAGE * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    }
}

pub fn index_q_quantize(op: &IndexQQuantize<'_>) {
    let [rows, heads, _] = op.q.shape();
    for (t, h) in (0..rows).flat_map(|t| (0..heads).map(move |h| (t, h))) {
        let (codes, scale) = quantize(&row(&op.q, &[t, h]), op.hadamard, op.pow2_scale);
        let weight = op.weights.row(&[t])[h] * op.scale * scale; // Before it may be overwritten in place.
        // SAFETY: one row at a time, on one thread.
        let (q, w) = unsafe { (op.q_out.row(&[t, h]), op.weights_out.row(&[t])) };
        q.iter_mut().zip(codes).for_each(|(o, c)| *o = F8E4M3(c));
        w[h] = weight;
    }
}

pub fn kv_write(op: &KvWrite<'_>) {
    for t in 0..op.tokens {
        let Ok(slot) = usize::try_from(op.slots.get(t)) else { continue };
        let (at, kv) = ([slot / op.page_shape[1], slot % op.page_shape[1]], row(&op.kv, &[t]));
        let v = match op.pages {
            KvPages::F32(v) => {
                put(&FloatsMut::F32(v), &at, &kv);
                continue;
            }
            KvPages::Bf16(v) => {
                put(&FloatsMut::Bf16(v), &at, &kv);
                continue;
            }
            KvPages::Fp8(v) => v,
        };
        // SAFETY: one row at a time, on one thread.
        let out = unsafe { v.row(&at) };
        for (tile, x) in kv[..512].chunks(128).enumerate() {
            let amax = x.iter().filter(|x| x.is_finite()).fold(0f32, |a, x| a.max(x.abs() as f32));
            let scale = fp8::pow2_at_least((amax / fp8::MAX).max(1e-4));
            out[512 + 4 * tile..][..4].copy_from_slice(&scale.to_le_bytes());
            for (j, &x) in x.iter().enumerate() {
                out[128 * tile + j] = fp8::encode(x as f32 / scale);
            }
        }
        for (j, &x) in kv[512..].iter().enumerate() {
            out[528 + 2 * j..][..2].copy_from_slice(&bf16::from_f32(x as f32).to_le_bytes());
        }
    }
}

/// The KV row in a slot.
fn kv_row(op: &SparseAttention<'_>, slot: usize) -> Vec<f64> {
    let at = [slot / op.page_shape[1], slot % op.page_shape[1]];
    match op.kv {
        Kv::F32(v) => row(&Floats::F32(v), &at),
        Kv::Bf16(v) => row(&Floats::Bf16(v), &at),
        Kv::Fp8(v) => {
            let b = v.row(&at);
            let scale = |j: usize| f64::from(f32_at(b, 512 + j / 128 * 4));
            let value = |j| f64::from(fp8::decode(b[j])) * scale(j);
            let rope = |j: usize| bf16::from_le_bytes([b[528 + 2 * j], b[529 + 2 * j]]).to_f64();
            (0..512).map(value).chain((0..64).map(rope)).collect()
        }
    }
}

pub fn sparse_attention(op: &SparseAttention<'_>) {
    for t in 0..op.rows {
        let count = op.row_topk.map_or(op.topk, |v| v.row(&[])[t] as usize);
        let slot = |&i: &i32| match (&op.map, usize::try_from(i)) {
            (_, Err(_)) => None,
            (None, Ok(slot)) => Some(slot),
            (Some(map), Ok(p)) => map.slot(t, p).map(|s| s as usize),
        };
        let slots = op.indices.row(&[t])[..count].iter().enumerate();
        let (columns, kv): (Vec<usize>, Vec<Vec<f64>>) =
            slots.filter_map(|(c, i)| Some((c, kv_row(op, slot(i)?)))).unzip();
        let mut weights = vec![0.0; op.topk];
        for h in 0..op.heads {
            let q = row(&op.q, &[t, h]);
            let s: Vec<f64> = kv.iter().map(|k| f64::from(op.softmax_scale) * dot(&q, k)).collect();
            let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = s.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = p.iter().sum();
            let sink = op.sink.map_or(0.0, |v| (f64::from(v.row(&[])[h]) - max).exp());
            let value = |j: usize| p.iter().zip(&kv).map(|(p, k)| p * k[j]).sum::<f64>();
            let one = |j| if kv.is_empty() { 0.0 } else { value(j) / (sum + sink) };
            put(&op.out, &[t, h], &(0..op.d_v).map(one).collect::<Vec<_>>());
            if let Some(lse) = op.lse {
                // SAFETY: one row at a time, on one thread.
                unsafe { lse.row(&[t])[h] = (max + sum.ln()) as f32 };
            }
            columns.iter().zip(&p).for_each(|(&c, p)| weights[c] += p / sum);
        }
        if let Some(probs) = op.probs {
            let sum: f64 = weights.iter().sum();
            // SAFETY: one row at a time, on one thread.
            let out = unsafe { probs.row(&[t]) };
            let share = |w: f64| if kv.is_empty() { 0.0 } else { w / sum };
            out.iter_mut().zip(weights).for_each(|(o, w)| *o = share(w) as f32);
        }
    }
}

pub fn overlap(op: &Overlap<'_>) {
    for t in 0..op.own.shape()[0] {
        let live = |row: &[i32]| row.iter().copied().take_while(|&i| i >= 0).collect::<Vec<_>>();
        let (own, reused) = (live(op.own.row(&[t])), live(op.reused.row(&[t])));
        let both = own.iter().filter(|i| reused.contains(i)).count();
        // SAFETY: one row at a time, on one thread.
        let out = unsafe { op.out.row(&[]) };
        out[t] = if own.is_empty() { 1.0 } else { both as f32 / own.len() as f32 };
    }
}
