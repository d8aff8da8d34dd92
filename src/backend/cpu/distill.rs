//! The indexer's distillation loss `KL(p || softmax(I))` and its gradients.
//!
//! Shapes: q `[rows, heads, dim]`, k `[keys, dim]`, weights `[rows, heads]`; attention `[rows, heads, d_qk]` and
//! `[keys, d_qk]`; gradients as q, k and weights.
//! Idea: a first pass over tiles of keys gives each row its loss and the two normalisers, and finds what is not finite
//! before anything is written. A second one, over blocks of rows and of keys, computes `g = q̂ - p̂` of a block; rows
//! take their gradients from it at once, then keys take theirs, each in the order of the rows. Blocks have a fixed
//! size, so no sum depends on the threads, and scratch does not grow with the number of keys. Sums over keys are f64
//! where a number a key goes in, f32 by blocks where a vector does.
//! Roofline: `2 * heads * dim` flop a row and key for the first pass, 4 for each gradient of q and k; attention
//! targets add theirs to both passes.

use super::quant::to_f32;
use super::simd::{Kernel, Simd};
use super::tile::{KEYS, Scores, Values};
use super::{Cpu, Parts};
use crate::error::{Error, Result};
use crate::layout::{self, Bump};
use crate::ops::{Distill, Floats, MAX_HEADS, Target};
use std::ops::Range;

/// Rows in flight in the second pass.
const ROWS: usize = 128;
/// Keys of a block of the second pass.
const BLOCK: usize = 2048;
const ONES: [f32; MAX_HEADS] = [1.0; MAX_HEADS];

/// What the first pass leaves of a row.
#[derive(Clone, Copy)]
struct Row {
    /// Whether it has any position.
    live: bool,
    /// Its divergence; NaN if an input or a score is not finite.
    loss: f64,
    /// `ln sum_s exp(I[s])`.
    log_z: f64,
    /// What attention scores are relative to.
    shift: f32,
    /// `1 / sum_s p[s]`, of unnormalised `p`; NaN if the target is what is not finite.
    inverse: f64,
}

const NUMBERS: usize = 5;

impl Row {
    fn pack(self) -> [f64; NUMBERS] {
        let live = f64::from(u8::from(self.live));
        [live, self.loss, self.log_z, f64::from(self.shift), self.inverse]
    }

    fn unpack(x: &[f64]) -> Self {
        Row { live: x[0] != 0.0, loss: x[1], log_z: x[2], shift: x[3] as f32, inverse: x[4] }
    }
}

struct Shared<'a> {
    /// `[rows][NUMBERS]`.
    rows: &'a mut [f64],
    /// `[ROWS][BLOCK]`: derivatives of the loss by the scores.
    g: &'a mut [f32],
    workers: &'a mut [u8],
}

struct Worker<'a> {
    /// `[heads][stride]`, zero-padded, as all that have a stride.
    q: &'a mut [f32],
    /// `[heads]`: lengths of the queries.
    lengths: &'a mut [f32],
    /// `[KEYS][stride]`.
    tile: &'a mut [f32],
    /// `[heads][KEYS]`: products, then coefficients of keys.
    d: &'a mut [f32],
    /// `[KEYS][MAX_HEADS]`: coefficients of heads.
    c: &'a mut [f32],
    /// `[heads or KEYS][stride]`: the gradient of a row or of a tile of keys.
    grad: &'a mut [f32],
    /// `[KEYS][stride]`: keys in place, and gradients of those that a row takes.
    keys: &'a mut [f32],
    some: &'a mut [f32],
    /// Attention's `q`, `tile` and `d`.
    attention: [&'a mut [f32]; 3],
    stride: usize,
    attention_stride: usize,
}

fn lay_worker<'a>(b: &mut Bump<'a>, op: &Distill<'_>) -> Worker<'a> {
    let stride = op.dim.next_multiple_of(64);
    let [_, heads, d_qk] = match &op.target {
        Target::Given(_) => [0; 3],
        Target::Attention { q, .. } => q.shape(),
    };
    let attention_stride = d_qk.next_multiple_of(64);
    Worker {
        q: b.take(op.heads * stride),
        lengths: b.take(op.heads),
        tile: b.take(KEYS * stride),
        d: b.take(op.heads * KEYS),
        c: b.take(KEYS * MAX_HEADS),
        grad: b.take(op.heads.max(KEYS) * stride),
        keys: b.take(KEYS * stride),
        some: b.take(KEYS * stride),
        attention: [
            b.take(heads * attention_stride),
            b.take(KEYS * attention_stride),
            b.take(heads * KEYS),
        ],
        stride,
        attention_stride,
    }
}

fn lay<'a>(b: &mut Bump<'a>, op: &Distill<'_>, threads: usize) -> Shared<'a> {
    Shared {
        rows: b.take(op.rows.saturating_mul(NUMBERS)),
        g: b.take(ROWS.min(op.rows) * BLOCK),
        workers: b.take(layout::measure(|b| lay_worker(b, op)).saturating_mul(threads)),
    }
}

impl Distill<'_> {
    /// Bytes of workspace that [`Cpu::distill`] needs with this many threads, whatever their alignment, for these
    /// shapes and all smaller ones.
    pub fn workspace(&self, threads: usize) -> usize {
        layout::with_slack(layout::measure(|b| lay(b, self, threads)))
    }
}

pub(super) fn distill(cpu: &Cpu, op: &Distill<'_>, workspace: &mut [u8]) -> Result<()> {
    let bytes = layout::measure(|b| lay(b, op, cpu.threads()));
    let memory = layout::aligned("workspace", workspace, bytes)?;
    let Shared { rows, g, workers } = lay(&mut Bump::over(memory), op, cpu.threads());
    let worker = workers.len() / cpu.threads();

    let parts = Parts::of(rows);
    cpu.run_with(op.rows, workers, worker, |row, scratch| {
        let w = lay_worker(&mut Bump::over(scratch), op);
        // SAFETY: `lay_worker` sized the scratch for this operation; this task alone has this row.
        unsafe {
            let found = cpu.isa.run(Measure { op, row, w });
            parts.part(row * NUMBERS..(row + 1) * NUMBERS).copy_from_slice(&found.pack());
        }
    });
    let (mut live, mut loss) = (0usize, 0.0f64);
    for (r, found) in rows.chunks_exact(NUMBERS).map(Row::unpack).enumerate() {
        if !found.loss.is_finite() {
            return Err(not_finite(op, r, found));
        }
        live += usize::from(found.live);
        loss += found.loss;
    }
    if live == 0 {
        return Ok(());
    }
    let scale = f64::from(op.layer_weight) / live as f64;
    // SAFETY: the only reference; outputs share no memory.
    let out = unsafe { op.loss.row(&[]) };
    out[0] = (f64::from(out[0]) + scale * loss) as f32;
    if op.grad_q.is_none() && op.grad_k.is_none() && op.grad_weights.is_none() {
        return Ok(());
    }

    let rows = &*rows;
    let parts = Parts::of(g);
    for first in (0..op.rows).step_by(ROWS) {
        let count = ROWS.min(op.rows - first);
        for start in (0..op.keys).step_by(BLOCK) {
            let keys = start..(start + BLOCK).min(op.keys);
            cpu.run_with(count, workers, worker, |i, scratch| {
                let w = lay_worker(&mut Bump::over(scratch), op);
                let row = first + i;
                let found = Row::unpack(&rows[row * NUMBERS..][..NUMBERS]);
                // SAFETY: as above; this task alone has this row of `g` and of the gradients.
                unsafe {
                    let g = parts.part(i * BLOCK..i * BLOCK + keys.len());
                    cpu.isa.run(OfRow { op, row, found, scale, keys: keys.clone(), g, w });
                }
            });
            let Some(grad_k) = &op.grad_k else { continue };
            cpu.run_with(keys.len().div_ceil(KEYS), workers, worker, |tile, scratch| {
                let w = lay_worker(&mut Bump::over(scratch), op);
                let at = tile * KEYS;
                let n = KEYS.min(keys.len() - at);
                // SAFETY: as above; nobody writes `g` now, and this task alone has these keys' gradients.
                unsafe {
                    let g = |i: usize| &*parts.part(i * BLOCK + at..i * BLOCK + at + n);
                    let keys = start + at..start + at + n;
                    cpu.isa.run(OfKeys { op, rows: first..first + count, keys, g, grad_k, w });
                }
            });
        }
    }
    Ok(())
}

/// Columns (of the target) and keys of a row, some at a time.
struct Positions<'a> {
    indices: Option<&'a [i32]>,
    start: usize,
    keys: Range<usize>,
    columns: Range<usize>,
    column: [usize; KEYS],
    key: [usize; KEYS],
}

impl<'a> Positions<'a> {
    /// Those of a row whose keys are in a range.
    fn of(op: &Distill<'a>, row: usize, keys: Range<usize>) -> Self {
        let start = op.map.start(row) as usize;
        let indices = op.indices.map(|v| v.row(&[row]));
        let columns = match indices {
            Some(v) => 0..v.len(),
            None => {
                let end = op.map.len(row).min(keys.end.saturating_sub(start));
                keys.start.saturating_sub(start)..end
            }
        };
        Positions { indices, start, keys, columns, column: [0; KEYS], key: [0; KEYS] }
    }

    /// Reads the next ones; how many.
    fn advance(&mut self) -> usize {
        let mut n = 0;
        while n < KEYS
            && let Some(column) = self.columns.next()
        {
            let position = match self.indices {
                Some(v) => usize::try_from(v[column]).ok(),
                None => Some(column),
            };
            let key = position.map(|p| self.start + p).filter(|key| self.keys.contains(key));
            if let Some(key) = key {
                (self.column[n], self.key[n]) = (column, key);
                n += 1;
            }
        }
        n
    }
}

/// A row of floats as f32, zero-padded.
fn widen<const N: usize>(x: &Floats<'_, N>, at: &[usize], out: &mut [f32]) {
    let (values, pad) = out.split_at_mut(x.shape()[N - 1]);
    to_f32(x, at, values);
    pad.fill(0.0);
}

/// Whether all are finite, without a branch for each.
fn finite(x: &[f32]) -> bool {
    x.iter().fold(true, |ok, x| ok & x.is_finite())
}

impl Worker<'_> {
    /// Reads a row's queries.
    fn load_row(&mut self, op: &Distill<'_>, row: usize, attention: bool) {
        for (h, q) in self.q.chunks_exact_mut(self.stride).enumerate() {
            widen(&op.q, &[row, h], q);
        }
        if let (true, Target::Attention { q, .. }) = (attention, &op.target) {
            let rows = self.attention[0].chunks_exact_mut(self.attention_stride);
            for (h, out) in rows.enumerate() {
                widen(q, &[row, h], out);
            }
        }
    }

    /// Products of the row's queries and of these keys, and the scores; whether all are finite.
    ///
    /// # Safety
    /// Scratch as [`lay_worker`] makes it.
    #[inline(always)]
    unsafe fn scores<S: Simd>(
        &mut self,
        op: &Distill<'_>,
        row: usize,
        keys: &[usize],
    ) -> ([f32; KEYS], bool) {
        for (out, &key) in self.tile.chunks_exact_mut(self.stride).zip(keys) {
            widen(&op.k, &[key], out);
        }
        let (n, stride) = (keys.len(), self.stride);
        // SAFETY: by contract.
        unsafe {
            Scores { q: self.q, tile: self.tile, p: self.d, stride }.run::<S>(op.heads, n, op.dim);
        }
        let (mut scores, mut ok) = ([0.0f32; KEYS], true);
        for (d, &weight) in self.d.chunks_exact(KEYS).zip(op.weights.row(&[row])) {
            ok &= finite(&d[..n]);
            for (score, &d) in scores[..n].iter_mut().zip(d) {
                *score = weight.mul_add(relu(d), *score);
            }
        }
        (scores, ok & finite(&scores[..n]))
    }

    /// Measures the row's queries, for [`Worker::settle`].
    ///
    /// # Safety
    /// As [`Worker::scores`].
    #[inline(always)]
    unsafe fn measure<S: Simd>(&mut self) {
        for (q, out) in self.q.chunks_exact(self.stride).zip(&mut *self.lengths) {
            // SAFETY: whole vectors.
            *out = unsafe { length::<S>(q) };
        }
    }

    /// Computes products of the first `n` keys again where rounding may have taken their sign: the derivative jumps
    /// at 0, so there a last bit would be worth a whole term.
    ///
    /// # Safety
    /// As [`Worker::scores`], after the products and [`Worker::measure`].
    #[inline(always)]
    unsafe fn settle<S: Simd>(&mut self, n: usize) {
        // Twice what as many roundings come to.
        let roundings = (self.stride / 16 + 5) as f32;
        let mut limits = [0.0f32; KEYS];
        for (limit, key) in limits[..n].iter_mut().zip(self.tile.chunks_exact(self.stride)) {
            // SAFETY: whole vectors.
            *limit = roundings * f32::EPSILON * unsafe { length::<S>(key) };
        }
        let rows = self.q.chunks_exact(self.stride).zip(&*self.lengths);
        for ((q, &length), d) in rows.zip(self.d.chunks_exact_mut(KEYS)) {
            let near = |d: f32, limit: f32| d.abs() < length * limit;
            let any = d[..n].iter().zip(&limits).fold(false, |any, (&d, &l)| any | near(d, l));
            if any {
                let keys = self.tile.chunks_exact(self.stride);
                for ((d, &limit), key) in d[..n].iter_mut().zip(&limits).zip(keys) {
                    if near(*d, limit) {
                        let terms = q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b));
                        *d = terms.sum::<f64>() as f32;
                    }
                }
            }
        }
    }

    /// Attention's scores less the row's log-sum-exp for these keys (-inf after them); the largest, and whether all
    /// are finite. Nothing for a given target.
    ///
    /// # Safety
    /// As [`Worker::scores`].
    #[inline(always)]
    unsafe fn attend<S: Simd>(
        &mut self,
        op: &Distill<'_>,
        row: usize,
        keys: &[usize],
    ) -> (f32, bool) {
        let Target::Attention { q, kv, lse, scale } = &op.target else { return (0.0, true) };
        let [_, heads, d_qk] = q.shape();
        let stride = self.attention_stride;
        let [q, tile, d] = &mut self.attention;
        for (out, &key) in tile.chunks_exact_mut(stride).zip(keys) {
            widen(kv, &[key], out);
        }
        // SAFETY: by contract.
        unsafe { Scores { q, tile, p: d, stride }.run::<S>(heads, keys.len(), d_qk) };
        let (mut top, mut ok) = (f32::NEG_INFINITY, true);
        for (d, &lse) in d.chunks_exact_mut(KEYS).zip(lse.row(&[row])) {
            let (d, pad) = d.split_at_mut(keys.len());
            for x in &mut *d {
                *x = x.mul_add(*scale, -lse);
                top = if *x > top { *x } else { top };
            }
            ok &= finite(d);
            pad.fill(f32::NEG_INFINITY);
        }
        (top, ok)
    }

    /// The target of these columns, not normalised; attention's is relative to `shift`.
    ///
    /// # Safety
    /// Attention: after [`Worker::attend`] of the same keys.
    #[inline(always)]
    unsafe fn target<S: Simd>(
        &self,
        op: &Distill<'_>,
        row: usize,
        columns: &[usize],
        shift: f32,
    ) -> [f32; KEYS] {
        let mut p = [0.0f32; KEYS];
        match &op.target {
            Target::Given(v) => {
                let row = v.row(&[row]);
                p.iter_mut().zip(columns).for_each(|(p, &c)| *p = row[c]);
            }
            // SAFETY: rows of `KEYS` scores.
            Target::Attention { .. } => unsafe {
                let shift = S::splat(shift);
                for j in (0..KEYS).step_by(16) {
                    let mut sum = S::splat(0.0);
                    for d in self.attention[2].chunks_exact(KEYS) {
                        sum = S::add(sum, S::exp(S::sub(S::load(d.as_ptr().add(j)), shift)));
                    }
                    S::store(p.as_mut_ptr().add(j), sum);
                }
            },
        }
        p
    }
}

/// Length of a vector of whole sixteens.
///
/// # Safety
/// The instruction set is there.
#[inline(always)]
unsafe fn length<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: sixteen elements from each of these.
    unsafe {
        let mut sum = S::splat(0.0);
        for x in x.chunks_exact(16) {
            let x = S::load(x.as_ptr());
            sum = S::fma(x, x, sum);
        }
        S::sum(sum).sqrt()
    }
}

fn relu(x: f32) -> f32 {
    if x > 0.0 { x } else { 0.0 }
}

/// The first pass over one row.
struct Measure<'a> {
    op: &'a Distill<'a>,
    row: usize,
    w: Worker<'a>,
}

impl Kernel for Measure<'_> {
    type Out = Row;
    /// # Safety
    /// Scratch as [`lay_worker`] makes it.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Row {
        let Measure { op, row, mut w } = self;
        let mut found =
            Row { live: false, loss: 0.0, log_z: 0.0, shift: f32::NEG_INFINITY, inverse: 0.0 };
        // Of the scores, and of the target.
        let mut ok = [true; 2];
        // `z = sum exp(I - top)`; `sum p`, `sum p ln p` and `sum p I` of unnormalised p.
        let (mut top, mut z) = (f64::NEG_INFINITY, 0.0f64);
        let (mut sum, mut entropy, mut cross) = (0.0f64, 0.0f64, 0.0f64);
        let mut positions = Positions::of(op, row, 0..op.keys);
        loop {
            let n = positions.advance();
            if n == 0 {
                break;
            }
            if !found.live {
                w.load_row(op, row, true);
                found.live = true;
            }
            // SAFETY: by contract.
            let (scores, p) = unsafe {
                let (scores, finite) = w.scores::<S>(op, row, &positions.key[..n]);
                let (highest, also) = w.attend::<S>(op, row, &positions.key[..n]);
                ok[0] &= finite;
                ok[1] &= also;
                if highest > found.shift {
                    // Everything so far was relative to less. The first time there is nothing.
                    if sum > 0.0 {
                        let step = f64::from(highest) - f64::from(found.shift);
                        let fade = (-step).exp();
                        entropy = fade * (entropy - step * sum);
                        (sum, cross) = (fade * sum, fade * cross);
                    }
                    found.shift = highest;
                }
                (scores, w.target::<S>(op, row, &positions.column[..n], found.shift))
            };
            for (&score, &p) in scores[..n].iter().zip(&p) {
                let (score, p) = (f64::from(score), f64::from(p));
                if score > top {
                    z *= (top - score).exp();
                    top = score;
                }
                z += (score - top).exp();
                ok[1] &= p >= 0.0;
                if p > 0.0 {
                    sum += p;
                    entropy += p * p.ln();
                    cross += p * score;
                }
            }
        }
        if found.live {
            found.log_z = top + z.ln();
            let target = ok[1] && sum > 0.0;
            found.inverse = if target { sum.recip() } else { f64::NAN };
            found.loss = (entropy - cross) / sum - sum.ln() + found.log_z;
            if !(ok[0] && target) {
                found.loss = f64::NAN;
            }
        }
        found
    }
}

/// The second pass over one row and a block of keys: `g`, and the gradients by the row's queries and weights.
struct OfRow<'a> {
    op: &'a Distill<'a>,
    row: usize,
    found: Row,
    scale: f64,
    keys: Range<usize>,
    /// By key of the block.
    g: &'a mut [f32],
    w: Worker<'a>,
}

impl Kernel for OfRow<'_> {
    type Out = ();
    /// # Safety
    /// Scratch as [`lay_worker`] makes it; no other reference to this row's gradients.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let OfRow { op, row, found, scale, keys, g, mut w } = self;
        let stride = w.stride;
        let first = keys.start;
        g.fill(0.0);
        let mut positions = Positions::of(op, row, keys);
        let mut by_weight = [0.0f32; MAX_HEADS];
        let mut any = false;
        loop {
            let n = positions.advance();
            if n == 0 {
                break;
            }
            if !any {
                w.load_row(op, row, true);
                // SAFETY: by contract.
                unsafe { w.measure::<S>() };
                w.grad[..op.heads * stride].fill(0.0);
                any = true;
            }
            // SAFETY: by contract.
            let (scores, p) = unsafe {
                let (scores, _) = w.scores::<S>(op, row, &positions.key[..n]);
                w.settle::<S>(n);
                w.attend::<S>(op, row, &positions.key[..n]);
                (scores, w.target::<S>(op, row, &positions.column[..n], found.shift))
            };
            let mut by_score = [0.0f32; KEYS];
            for j in 0..n {
                let q = (f64::from(scores[j]) - found.log_z).exp();
                by_score[j] = (scale * (q - f64::from(p[j]) * found.inverse)) as f32;
                // An index that is there twice counts twice.
                g[positions.key[j] - first] += by_score[j];
            }
            let rows = w.d.chunks_exact_mut(KEYS).zip(op.weights.row(&[row]));
            for ((d, &weight), by_weight) in rows.zip(&mut by_weight) {
                let mut sum = 0.0f32;
                for (d, &g) in d[..n].iter_mut().zip(&by_score) {
                    sum = g.mul_add(relu(*d), sum);
                    *d = if *d > 0.0 { g * weight } else { 0.0 };
                }
                *by_weight += sum;
            }
            if op.grad_q.is_some() {
                // SAFETY: by contract.
                unsafe {
                    Values { out: w.grad, p: w.d, pitch: KEYS, tile: w.tile, stride }
                        .run::<S>(op.heads, n, op.dim, &ONES);
                }
            }
        }
        if !any {
            return;
        }
        if let Some(grad) = &op.grad_q {
            for (h, by_query) in w.grad[..op.heads * stride].chunks_exact(stride).enumerate() {
                // SAFETY: by contract.
                add(unsafe { grad.row(&[row, h]) }, by_query);
            }
        }
        if let Some(grad) = &op.grad_weights {
            // SAFETY: by contract.
            add(unsafe { grad.row(&[row]) }, &by_weight);
        }
    }
}

/// The second pass over a tile of keys and the rows in flight: the gradients by the keys.
struct OfKeys<'a, G> {
    op: &'a Distill<'a>,
    rows: Range<usize>,
    keys: Range<usize>,
    /// By number of the row in flight and key of the tile.
    g: G,
    grad_k: &'a crate::tensor::ViewMut<'a, f32, 2>,
    w: Worker<'a>,
}

impl<'g, G: Fn(usize) -> &'g [f32]> Kernel for OfKeys<'_, G> {
    type Out = ();
    /// # Safety
    /// Scratch as [`lay_worker`] makes it; no other reference to these keys' gradients.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let OfKeys { op, rows, keys, g, grad_k, mut w } = self;
        let stride = w.stride;
        let mut any = false;
        for (i, row) in rows.enumerate() {
            let g = g(i);
            let (mut at, mut n) = ([0usize; KEYS], 0);
            for (j, _) in g.iter().enumerate().filter(|(_, g)| **g != 0.0) {
                at[n] = j;
                n += 1;
            }
            if n == 0 {
                continue;
            }
            if !any {
                any = true;
                w.grad[..KEYS * stride].fill(0.0);
                for (out, key) in w.keys.chunks_exact_mut(stride).zip(keys.clone()) {
                    widen(&op.k, &[key], out);
                }
            }
            w.load_row(op, row, false);
            for (i, &j) in at[..n].iter().enumerate() {
                let (a, b) = (i * stride..(i + 1) * stride, j * stride..(j + 1) * stride);
                w.tile[a.clone()].copy_from_slice(&w.keys[b.clone()]);
                w.some[a].copy_from_slice(&w.grad[b]);
            }
            // SAFETY: by contract.
            unsafe {
                Scores { q: w.q, tile: w.tile, p: w.d, stride }.run::<S>(op.heads, n, op.dim);
                w.measure::<S>();
                w.settle::<S>(n);
            }
            for (h, (d, weight)) in w.d.chunks_exact(KEYS).zip(op.weights.row(&[row])).enumerate() {
                for (i, &j) in at[..n].iter().enumerate() {
                    w.c[i * MAX_HEADS + h] = if d[i] > 0.0 { g[j] * weight } else { 0.0 };
                }
            }
            // SAFETY: by contract.
            unsafe {
                Values { out: w.some, p: w.c, pitch: MAX_HEADS, tile: w.q, stride }
                    .run::<S>(n, op.heads, op.dim, &ONES);
            }
            for (i, &j) in at[..n].iter().enumerate() {
                let from = &w.some[i * stride..(i + 1) * stride];
                w.grad[j * stride..(j + 1) * stride].copy_from_slice(from);
            }
        }
        if any {
            for (by_key, key) in w.grad.chunks_exact(stride).zip(keys) {
                // SAFETY: by contract.
                add(unsafe { grad_k.row(&[key]) }, by_key);
            }
        }
    }
}

fn add(to: &mut [f32], x: &[f32]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
}

/// Names the argument for which a row's loss is no number.
#[cold]
fn not_finite(op: &Distill<'_>, row: usize, found: Row) -> Error {
    fn bad(x: &[f32]) -> Option<f32> {
        x.iter().copied().find(|x| !x.is_finite())
    }
    fn bad_in<const N: usize>(x: &Floats<'_, N>, at: &[usize]) -> Option<f32> {
        let mut values = vec![0.0; x.shape()[N - 1]];
        to_f32(x, at, &mut values);
        bad(&values)
    }
    let any_head = |x: &Floats<'_, 3>| (0..x.shape()[1]).find_map(|h| bad_in(x, &[row, h]));
    let by_row = |name: &str, x: Option<f32>| {
        x.map(|x| Error::invalid(name, "finite numbers", format_args!("{x} in row {row}")))
    };
    let by_key = |name: &str, x: Option<f32>, key: usize| {
        let got = |x| format!("{x} in key {key}, which row {row} sees");
        x.map(|x| Error::invalid(name, "finite numbers", got(x)))
    };
    let by_column = |p: f32, column: usize| {
        let got = format_args!("{p} in column {column} of row {row}");
        let ok = p >= 0.0 && p.is_finite();
        (!ok).then(|| Error::invalid("target", "finite numbers, none below 0", got))
    };
    let overflows = if found.inverse.is_nan() { "attention_q" } else { "q" };
    let mut found = by_row("q", any_head(&op.q));
    found = found.or_else(|| by_row("weights", bad(op.weights.row(&[row]))));
    if let Target::Attention { q, lse, .. } = &op.target {
        found = found.or_else(|| by_row("attention_q", any_head(q)));
        found = found.or_else(|| by_row("lse", bad(lse.row(&[row]))));
    }
    let mut sum = 0.0;
    let mut positions = Positions::of(op, row, 0..op.keys);
    while found.is_none() {
        let n = positions.advance();
        if n == 0 {
            break;
        }
        for (&key, &column) in positions.key[..n].iter().zip(&positions.column) {
            found = found.or_else(|| by_key("k", bad_in(&op.k, &[key]), key));
            found = found.or_else(|| match &op.target {
                Target::Attention { kv, .. } => by_key("kv", bad_in(kv, &[key]), key),
                Target::Given(v) => {
                    let p = v.row(&[row])[column];
                    sum += p;
                    by_column(p, column)
                }
            });
        }
    }
    found.unwrap_or_else(|| match op.target {
        Target::Given(_) if sum == 0.0 => {
            Error::invalid("target", "a sum above 0", format_args!("0 in row {row}"))
        }
        _ => {
            let want = "scores within the range of float32";
            Error::invalid(overflows, want, format_args!("one that is not in row {row}"))
        }
    })
}
