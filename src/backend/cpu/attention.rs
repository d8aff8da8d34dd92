//! Sparse MLA: softmax of `scale * q·k` over the selected tokens, times their values.
//!
//! Shapes: q `[rows, heads, d_qk]`, KV rows of `d_qk` (values are the first `d_v`), out `[rows, heads, d_v]`.
//! Idea: a task is a row and a group of its heads. Selected KV rows are gathered and widened to f32, 32 at a time,
//! into a tile that all heads of the group use for scores and for values; the softmax is online, in the fixed order
//! of the indices. 4 heads x 4 keys (or x 64 value dimensions) of sums stay in registers. A head's arithmetic does
//! not depend on its group, so the cut follows the threads without changing bits. Probabilities summed over heads, where
//! they are asked for, take the scores once more: a task is a row, and its heads add up in their order.
//! Roofline: `2 * heads * (d_qk + d_v)` flop a token against the f32 FMA rate; the gather is `1 / heads` of that.
use super::Cpu;
use super::quant::put;
use super::simd::{Kernel, Simd};
use super::tile::{KEYS, Scores, Values};
use crate::error::Result;
use crate::layout::{self, Bump};
use crate::ops::{Floats, Kv, SparseAttention};
use std::ops::Range;

/// Most heads a task.
const GROUP: usize = 64;

/// How the work is cut: heads a task, tasks, workers.
#[derive(Clone, Copy, Debug)]
struct Cut {
    group: usize,
    groups: usize,
    workers: usize,
}

impl Cut {
    fn of(op: &SparseAttention<'_>, threads: usize) -> Self {
        let mut group = GROUP;
        // Halve while threads would idle; under 4 heads the registers would.
        while group > 4 && op.rows * op.heads.div_ceil(group) < 2 * threads {
            group /= 2;
        }
        let groups = op.heads.div_ceil(group);
        Cut { group, groups, workers: threads.min(op.rows * groups) }
    }
}

struct Worker<'a> {
    /// `[KEYS][stride]`, zero-padded.
    tile: &'a mut [f32],
    /// `[group][stride]`, zero-padded.
    q: &'a mut [f32],
    /// `[group][stride]`, of which `d_v` count.
    out: &'a mut [f32],
    /// `[group][KEYS]`: scores, then probabilities.
    p: &'a mut [f32],
    /// Floats from row to row of tile, q and out: `d_qk` padded to four vectors.
    stride: usize,
}

fn lay<'a>(b: &mut Bump<'a>, op: &SparseAttention<'_>, cut: Cut) -> Worker<'a> {
    let stride = op.d_qk.next_multiple_of(64);
    Worker {
        tile: b.take(KEYS * stride),
        q: b.take(cut.group * stride),
        out: b.take(cut.group * stride),
        p: b.take(cut.group * KEYS),
        stride,
    }
}

impl SparseAttention<'_> {
    /// Bytes of workspace that [`Cpu::sparse_attention`] needs with this many threads, whatever their alignment, for
    /// these shapes and all smaller ones: fewer heads or rows never make larger groups or more workers.
    pub fn workspace(&self, threads: usize) -> usize {
        let cut = Cut::of(self, threads);
        let worker = layout::measure(|b| lay(b, self, cut));
        layout::with_slack(worker.saturating_mul(cut.workers))
    }
}

pub(super) fn sparse_attention(
    cpu: &Cpu,
    op: &SparseAttention<'_>,
    workspace: &mut [u8],
) -> Result<()> {
    let cut = Cut::of(op, cpu.threads());
    let worker = layout::measure(|b| lay(b, op, cut));
    let memory = layout::aligned("workspace", workspace, worker.saturating_mul(cut.workers))?;
    cpu.run_with(op.rows * cut.groups, memory, worker, |task, scratch| {
        let (row, first) = (task / cut.groups, task % cut.groups * cut.group);
        let heads = first..(first + cut.group).min(op.heads);
        let w = lay(&mut Bump::over(scratch), op, cut);
        // SAFETY: `lay` sized the scratch for this operation, and this task alone has these heads of this row.
        unsafe { cpu.isa.run(Attend { op, row, heads, w }) };
    });
    if let (Some(probs), Some(lse)) = (op.probs, op.lse) {
        cpu.run_with(op.rows, memory, worker, |row, scratch| {
            let w = lay(&mut Bump::over(scratch), op, cut);
            // SAFETY: `lay` sized the scratch; the LSE is written, and this task alone has this row of both.
            unsafe {
                let (probs, lse) = (probs.row(&[row]), lse.row(&[row]));
                cpu.isa.run(Weigh { op, row, group: cut.group, lse, probs, w });
            }
        });
    }
    Ok(())
}

/// Queries as f32, zero-padded.
#[inline(always)]
fn widen_queries(op: &SparseAttention<'_>, row: usize, heads: Range<usize>, w: &mut Worker<'_>) {
    for (q, h) in w.q.chunks_mut(w.stride).zip(heads) {
        match op.q {
            Floats::F32(v) => q[..op.d_qk].copy_from_slice(v.row(&[row, h])),
            Floats::Bf16(v) => {
                q.iter_mut().zip(v.row(&[row, h])).for_each(|(o, x)| *o = x.to_f32());
            }
        }
        q[op.d_qk..].fill(0.0);
    }
}

/// The indices of a row that may count, with their columns.
fn candidates<'a>(
    op: &SparseAttention<'a>,
    row: usize,
) -> impl Iterator<Item = (usize, &'a i32)> + use<'a> {
    let taken = op.row_topk.map_or(op.topk, |v| v.row(&[])[row] as usize);
    op.indices.row(&[row])[..taken].iter().enumerate()
}

/// Gathers the next KV rows, up to `KEYS` of them, and notes the columns of their indices. Returns how many.
#[inline(always)]
unsafe fn gather_tile<'a, S: Simd>(
    op: &SparseAttention<'_>,
    row: usize,
    indices: &mut impl Iterator<Item = (usize, &'a i32)>,
    w: &mut Worker<'_>,
    columns: &mut [usize; KEYS],
) -> usize {
    let mut n = 0;
    for (column, &index) in indices {
        let Ok(position) = usize::try_from(index) else { continue };
        let slot = match &op.map {
            Some(map) => map.slot(row, position).map(|s| s as usize),
            None => Some(position),
        };
        let Some(slot) = slot else { continue };
        // SAFETY: the tile has `KEYS` rows.
        unsafe { gather::<S>(op, slot, &mut w.tile[n * w.stride..][..w.stride]) };
        columns[n] = column;
        n += 1;
        if n == KEYS {
            break;
        }
    }
    n
}

struct Weigh<'a> {
    op: &'a SparseAttention<'a>,
    row: usize,
    group: usize,
    lse: &'a [f32],
    probs: &'a mut [f32],
    w: Worker<'a>,
}

impl Kernel for Weigh<'_> {
    type Out = ();
    /// # Safety
    /// Scratch as [`lay`] makes it.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Weigh { op, row, group, lse, probs, mut w } = self;
        probs.fill(0.0);
        let mut columns = [0; KEYS];
        for first in (0..op.heads).step_by(group) {
            let heads = first..(first + group).min(op.heads);
            widen_queries(op, row, heads.clone(), &mut w);
            let mut indices = candidates(op, row);
            loop {
                // SAFETY: scratch as `lay` made it; scores past `n` are not looked at.
                let n = unsafe { gather_tile::<S>(op, row, &mut indices, &mut w, &mut columns) };
                if n == 0 {
                    break;
                }
                let stride = w.stride;
                // SAFETY: sizes as `lay` made them.
                unsafe {
                    Scores { q: w.q, tile: w.tile, p: w.p, stride }.run::<S>(
                        heads.len(),
                        n,
                        op.d_qk,
                    );
                }
                for (p, &lse) in w.p.chunks(KEYS).zip(&lse[heads.clone()]) {
                    if lse == f32::NEG_INFINITY {
                        continue; // All its scores are -inf.
                    }
                    for (&p, &column) in p[..n].iter().zip(&columns) {
                        // SAFETY: plain arithmetic.
                        probs[column] += unsafe { exp::<S>(p * op.softmax_scale - lse) };
                    }
                }
            }
        }
        let sum: f64 = probs.iter().map(|&p| f64::from(p)).sum();
        for p in probs.iter_mut().filter(|p| **p != 0.0) {
            *p = (f64::from(*p) / sum) as f32;
        }
    }
}

struct Attend<'a> {
    op: &'a SparseAttention<'a>,
    row: usize,
    heads: Range<usize>,
    w: Worker<'a>,
}

impl Kernel for Attend<'_> {
    type Out = ();
    /// # Safety
    /// Scratch as [`lay`] makes it; no other reference to these heads' outputs.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Attend { op, row, heads, mut w } = self;
        let (count, stride) = (heads.len(), w.stride);
        widen_queries(op, row, heads.clone(), &mut w);
        w.out[..count * stride].fill(0.0);
        let (mut max, mut sum) = ([f32::NEG_INFINITY; GROUP], [0.0f32; GROUP]);
        let mut fade = [1.0f32; GROUP];

        let (mut indices, mut columns) = (candidates(op, row), [0; KEYS]);
        loop {
            // SAFETY: scratch as `lay` made it.
            let n = unsafe { gather_tile::<S>(op, row, &mut indices, &mut w, &mut columns) };
            if n == 0 {
                break;
            }
            // SAFETY: sizes as `lay` made them; rows of the tile past `n` hold some floats, whose scores are
            // overwritten by `soften`.
            unsafe {
                let d = op.d_qk;
                Scores { q: w.q, tile: w.tile, p: w.p, stride }.run::<S>(count, n, d);
                for h in 0..count {
                    let p = &mut w.p[h * KEYS..][..KEYS];
                    fade[h] = soften::<S>(p, n, op.softmax_scale, &mut max[h], &mut sum[h]);
                }
                Values { out: w.out, p: w.p, pitch: KEYS, tile: w.tile, stride }
                    .run::<S>(count, n, op.d_v, &fade);
            }
        }
        for (i, h) in heads.enumerate() {
            let out = &mut w.out[i * stride..][..op.d_v];
            // Everything relative to the larger of row maximum and sink, so that no exponential overflows.
            let sink = op.sink.map_or(f32::NEG_INFINITY, |v| v.row(&[])[h]);
            let top = if sink > max[i] { sink } else { max[i] };
            let empty = max[i] == f32::NEG_INFINITY && sum[i] == 0.0;
            // SAFETY: plain arithmetic; this task alone has this head's outputs.
            unsafe {
                if empty {
                    out.fill(0.0);
                } else if op.sink.is_some() {
                    let own = exp::<S>(max[i] - top);
                    let whole = own * sum[i] + exp::<S>(sink - top);
                    out.iter_mut().for_each(|x| *x *= own / whole);
                } else {
                    let inverse = 1.0 / sum[i];
                    out.iter_mut().for_each(|x| *x *= inverse);
                }
                put(&op.out, &[row, h], out);
                if let Some(lse) = op.lse {
                    let p = lse.as_mut_ptr().add(row * lse.strides()[0] + h);
                    *p = if empty { f32::NEG_INFINITY } else { max[i] + sum[i].ln() };
                }
            }
        }
    }
}

/// One exponential, with the bits of the vector one.
#[inline(always)]
unsafe fn exp<S: Simd>(x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: sixteen lanes.
    unsafe { S::store(lanes.as_mut_ptr(), S::exp(S::splat(x))) };
    lanes[0]
}

/// A KV row as f32, zero-padded to the length of `out`.
#[inline(always)]
unsafe fn gather<S: Simd>(op: &SparseAttention<'_>, slot: usize, out: &mut [f32]) {
    let at = [slot / op.page_shape[1], slot % op.page_shape[1]];
    let d = op.d_qk;
    match op.kv {
        Kv::F32(v) => out[..d].copy_from_slice(v.row(&at)),
        Kv::Bf16(v) => {
            let row = v.row(&at);
            let whole = d / 16 * 16;
            for i in (0..whole).step_by(16) {
                // SAFETY: sixteen elements from `i` on, on both sides.
                unsafe {
                    let x = S::load_bf16(row.as_ptr().add(i).cast());
                    S::store(out.as_mut_ptr().add(i), x);
                }
            }
            out[whole..d].iter_mut().zip(&row[whole..]).for_each(|(o, x)| *o = x.to_f32());
        }
        Kv::Fp8(v) => {
            let row = v.row(&at);
            assert!(row.len() == 656 && out.len() >= 576);
            for tile in 0..4 {
                let s = &row[512 + 4 * tile..][..4];
                // SAFETY: 128 codes from `128 * tile` on, then 64 bf16 at byte 528; `out` holds 576.
                unsafe {
                    let scale = S::splat(f32::from_le_bytes([s[0], s[1], s[2], s[3]]));
                    for i in (128 * tile..128 * (tile + 1)).step_by(16) {
                        let x = S::mul(S::load_e4m3(row.as_ptr().add(i)), scale);
                        S::store(out.as_mut_ptr().add(i), x);
                    }
                    let i = 16 * tile;
                    let rope = S::load_bf16(row.as_ptr().add(528 + 2 * i).cast());
                    S::store(out.as_mut_ptr().add(512 + i), rope);
                }
            }
        }
    }
    out[d..].fill(0.0);
}

/// Scales `n` raw scores, updates the running maximum and sum, and leaves probabilities (0 past `n`). Returns what
/// earlier sums fade by.
#[inline(always)]
unsafe fn soften<S: Simd>(
    p: &mut [f32],
    n: usize,
    scale: f32,
    max: &mut f32,
    sum: &mut f32,
) -> f32 {
    p[n..].fill(f32::NEG_INFINITY);
    // A maximum does not depend on the order it is taken in; NaN is passed over here and shows in the sum.
    let mut top = *max;
    for x in &mut p[..n] {
        *x *= scale;
        top = if *x > top { *x } else { top };
    }
    let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
    // SAFETY: `KEYS` is two vectors.
    unsafe {
        let base = S::splat(base);
        let (a, b) = (p.as_mut_ptr(), p.as_mut_ptr().add(16));
        let (x, y) = (S::exp(S::sub(S::load(a), base)), S::exp(S::sub(S::load(b), base)));
        S::store(a, x);
        S::store(b, y);
        let fade = if *max == top { 1.0 } else { exp::<S>(*max - top) };
        *sum = sum.mul_add(fade, S::sum(S::add(x, y)));
        *max = top;
        fade
    }
}
