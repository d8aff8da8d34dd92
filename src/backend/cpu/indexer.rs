//! Indexer scores: `I[t,s] = ks[s] * sum_h w[t,h] * relu(q[t,h]·k[s])`.
//!
//! Shapes: q `[rows, heads, dim]`, keys in tiles of 64 (a page, or 64 contiguous keys), f32 scores.
//! Idea: a lane is a key. A tile of keys becomes a panel `[dim / 2][64]` of bf16 pairs, once for a block of rows
//! (e4m3 fits in bf16, its products in f32); a 4 heads x 64 keys block of sums stays in registers, and ReLU, weight
//! and the sum over heads are applied to it there. Each key's sum runs in one order, whatever surrounds it.
//! Roofline: `2 * heads * dim` flop a score against the bf16 dot-product rate; the panel is read from L1 once per
//! 4 heads, one load for 4 multiply-adds.
// Register blocks: one index runs over several arrays.
#![allow(clippy::needless_range_loop)]

use super::simd::{Kernel, Simd, TILE, flush};
use super::{Cpu, Isa};
use crate::fp8;
use crate::ops::{FloatsMut, Indexer, IndexerLogits, Keys, MAX_INDEX_DIM, Query};
use half::bf16;
use std::ops::Range;

/// One panel, in u32.
pub(super) const PANEL: usize = MAX_INDEX_DIM / 2 * TILE;

/// Queries of a row as bf16 pairs `[heads][dim / 2]`.
fn pack_query(ix: &Indexer<'_>, row: usize, out: &mut [u32]) {
    for h in 0..ix.heads {
        let out = out[h * ix.dim / 2..][..ix.dim / 2].iter_mut();
        let pair = |a: u16, b: u16| u32::from(a) | u32::from(b) << 16;
        let code = |c: crate::tensor::F8E4M3| fp8::TO_BF16[c.0 as usize];
        match ix.q {
            Query::F8(v) => out
                .zip(v.row(&[row, h]).chunks_exact(2))
                .for_each(|(o, c)| *o = pair(code(c[0]), code(c[1]))),
            Query::Bf16(v) => out
                .zip(v.row(&[row, h]).chunks_exact(2))
                .for_each(|(o, c)| *o = pair(flush(c[0].to_bits()), flush(c[1].to_bits()))),
        }
    }
}

/// Where a tile of keys lies: `n` rows, a fixed step apart.
enum Rows {
    F8(*const u8, usize),
    Bf16(*const bf16, usize),
}

struct PanelOf {
    rows: Rows,
    n: usize,
    dim: usize,
    panel: *mut u32,
}

impl Kernel for PanelOf {
    type Out = ();
    /// # Safety
    /// `n >= 1` rows of `dim` elements, and a panel of `dim / 2 * TILE`.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: as required above.
        unsafe {
            match self.rows {
                Rows::F8(p, stride) => S::panel_e4m3(p, stride, self.n, self.dim, self.panel),
                Rows::Bf16(p, stride) => {
                    S::panel_bf16(p.cast(), stride, self.n, self.dim, self.panel)
                }
            }
        }
    }
}

/// Makes the panel of positions `from..from + n` (within one tile) of a row; their scales too.
fn load_tile(
    ix: &Indexer<'_>,
    isa: Isa,
    row: usize,
    from: usize,
    n: usize,
    panel: &mut [u32],
    scales: &mut [f32; TILE],
) {
    assert!(panel.len() >= ix.dim / 2 * TILE && (1..=TILE).contains(&n));
    scales.fill(1.0);
    // Slots of a tile follow one another: a tile is a page. Both ends are looked up, so that all are in bounds.
    let first = ix.map.slot(row, from).unwrap_or_default() as usize;
    let (last, page, at) = (first + n - 1, first / TILE, first % TILE);
    let rows = match ix.keys {
        Keys::F8(v, s) => {
            scales[..n].copy_from_slice(&s.row(&[])[first..=last]);
            assert_eq!(v.row(&[last]).len(), ix.dim);
            Rows::F8(v.row(&[first]).as_ptr().cast(), v.strides()[0])
        }
        Keys::Bf16(v) => {
            assert_eq!(v.row(&[last]).len(), ix.dim);
            Rows::Bf16(v.row(&[first]).as_ptr(), v.strides()[0])
        }
        Keys::PagedF8(v) => {
            let bytes = v.row(&[page]);
            let (values, tail) = bytes.split_at(TILE * ix.dim);
            let tail = tail.chunks_exact(4).skip(at);
            scales[..n]
                .iter_mut()
                .zip(tail)
                .for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            Rows::F8(values[at * ix.dim..(at + n) * ix.dim].as_ptr(), ix.dim)
        }
        Keys::PagedBf16(v) => {
            assert_eq!(v.row(&[page, at + n - 1]).len(), ix.dim);
            Rows::Bf16(v.row(&[page, at]).as_ptr(), v.strides()[1])
        }
    };
    // SAFETY: rows `first` to `last` were looked up above; the panel's size was asserted.
    unsafe { isa.run(PanelOf { rows, n, dim: ix.dim, panel: panel.as_mut_ptr() }) }
}

/// Scores of one row against one panel.
struct Score<'a> {
    panel: &'a [u32],
    q: &'a [u32],
    w: &'a [f32],
    scales: &'a [f32; TILE],
    pairs: usize,
    out: &'a mut [f32; TILE],
}

impl Score<'_> {
    /// Adds `w * relu(q·k)` of `H` heads from `head` on to the sums of `J` vectors of keys from `key` on.
    #[inline(always)]
    unsafe fn heads<S: Simd, const H: usize, const J: usize>(
        &self,
        head: usize,
        key: usize,
        sum: &mut [S::F; J],
    ) {
        // SAFETY: `run` asserted the sizes; `head + H` and `key + 16 * J` are within them.
        unsafe {
            let q = self.q.as_ptr().add(head * self.pairs);
            let mut panel = self.panel.as_ptr().add(key);
            let mut acc = [[S::splat(0.0); J]; H];
            for d in 0..self.pairs {
                let mut k = [S::pairs(panel); J];
                for j in 1..J {
                    k[j] = S::pairs(panel.add(16 * j));
                }
                for h in 0..H {
                    let q = S::pair(*q.add(h * self.pairs + d));
                    for j in 0..J {
                        acc[h][j] = S::dot_pairs(acc[h][j], k[j], q);
                    }
                }
                panel = panel.add(TILE);
            }
            for h in 0..H {
                let w = S::splat(*self.w.get_unchecked(head + h));
                for j in 0..J {
                    // `max` gives its second operand for NaN, so NaN is kept.
                    sum[j] = S::fma(w, S::max(S::splat(0.0), acc[h][j]), sum[j]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn keys<S: Simd, const J: usize>(&mut self, key: usize) {
        // SAFETY: passed on; `key + 16 * J <= TILE`.
        unsafe {
            let mut sum = [S::splat(0.0); J];
            let heads = self.w.len();
            let whole = heads / 4 * 4;
            for head in (0..whole).step_by(4) {
                self.heads::<S, 4, J>(head, key, &mut sum);
            }
            match heads - whole {
                1 => self.heads::<S, 1, J>(whole, key, &mut sum),
                2 => self.heads::<S, 2, J>(whole, key, &mut sum),
                3 => self.heads::<S, 3, J>(whole, key, &mut sum),
                _ => {}
            }
            for (j, &sum) in sum.iter().enumerate() {
                let at = key + 16 * j;
                let scaled = S::mul(sum, S::load(self.scales.as_ptr().add(at)));
                S::store(self.out.as_mut_ptr().add(at), scaled);
            }
        }
    }
}

impl Kernel for Score<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        assert!(self.panel.len() >= self.pairs * TILE);
        assert!(self.q.len() >= self.pairs * self.w.len());
        // SAFETY: sizes asserted.
        unsafe {
            if S::WIDE {
                self.keys::<S, 4>(0);
            } else {
                for key in (0..TILE).step_by(16) {
                    self.keys::<S, 1>(key);
                }
            }
        }
    }
}

/// Memory that scoring a block of rows takes.
pub(super) struct Scratch<'a> {
    /// `rows * heads * dim / 2`.
    pub q: &'a mut [u32],
    /// `dim / 2 * TILE`.
    pub panel: &'a mut [u32],
}

/// Scores positions `tile * 64..` of each tile in `tiles` for each row of a block, and hands them to
/// `each(row, first position, scores, how many count)`, for every row in ascending order of positions. `len(row)`
/// says how many positions of a row to score. Rows that follow one another and see the same keys share panels.
pub(super) fn score_block(
    ix: &Indexer<'_>,
    isa: Isa,
    rows: Range<usize>,
    tiles: Range<usize>,
    scratch: &mut Scratch<'_>,
    len: impl Fn(usize) -> usize,
    mut each: impl FnMut(usize, usize, &[f32; TILE], usize),
) {
    let per_row = ix.heads * ix.dim / 2;
    let origin = |row| (ix.map.table(row).map(|t| t.as_ptr()), ix.map.start(row));
    let mut first = rows.start;
    while first < rows.end {
        let same = (first..rows.end).take_while(|&r| origin(r) == origin(first));
        let run = first..first + same.count();
        let longest = run.clone().map(&len).max().unwrap_or(0);
        let tiles = tiles.start..tiles.end.min(longest.div_ceil(TILE));
        if !tiles.is_empty() {
            for row in run.clone().filter(|&r| len(r) > tiles.start * TILE) {
                pack_query(ix, row, &mut scratch.q[(row - rows.start) * per_row..][..per_row]);
            }
        }
        let (mut scales, mut scores) = ([0.0; TILE], [0.0; TILE]);
        for tile in tiles {
            let from = tile * TILE;
            let widest = (longest - from).min(TILE);
            // The longest row's map reaches all of the tile.
            load_tile(ix, isa, first, from, widest, scratch.panel, &mut scales);
            for row in run.clone() {
                let n = len(row).saturating_sub(from).min(TILE);
                if n == 0 {
                    continue;
                }
                let score = Score {
                    panel: scratch.panel,
                    q: &scratch.q[(row - rows.start) * per_row..][..per_row],
                    w: ix.weights.row(&[row]),
                    scales: &scales,
                    pairs: ix.dim / 2,
                    out: &mut scores,
                };
                // SAFETY: `Score` checks its sizes.
                unsafe { isa.run(score) };
                each(row, from, &scores, n);
            }
        }
        first = run.end;
    }
}

/// All scores into memory: blocks of rows that fit on the stack, times ranges of keys.
pub(super) fn indexer_logits(cpu: &Cpu, op: &IndexerLogits<'_>, longest: usize) {
    const Q: usize = 16 * 1024; // u32: a row of 128 heads x 256 dimensions, 8 rows of 32 x 128
    const TILES: usize = 32;
    let ix = &op.indexer;
    let block = (Q / (ix.heads * ix.dim / 2)).clamp(1, 8);
    let ranges = longest.div_ceil(TILE * TILES).max(1);
    cpu.run(ix.rows.div_ceil(block) * ranges, |task| {
        let (first, range) = (task / ranges * block, task % ranges);
        let rows = first..(first + block).min(ix.rows);
        let tiles = range * TILES..(range + 1) * TILES;
        let (mut q, mut panel) = ([0; Q], [0; PANEL]);
        let mut scratch = Scratch { q: &mut q, panel: &mut panel };
        let put = |row, from: usize, scores: &[f32]| {
            let clean = |x: f32| if x.is_nan() { f32::NAN } else { x + 0.0 };
            // SAFETY: each element of a row is written by one task only: `from` is in this task's tiles, and the
            // tail below in its columns. The pointers stay inside the row, whose length is the column count.
            unsafe {
                match op.out {
                    FloatsMut::F32(v) => {
                        let p = v.as_mut_ptr().add(row * v.strides()[0] + from);
                        scores.iter().enumerate().for_each(|(i, &x)| *p.add(i) = clean(x));
                    }
                    FloatsMut::Bf16(v) => {
                        let p = v.as_mut_ptr().add(row * v.strides()[0] + from);
                        let round = |x| bf16::from_f32(clean(x));
                        scores.iter().enumerate().for_each(|(i, &x)| *p.add(i) = round(x));
                    }
                }
            }
        };
        for row in rows.clone() {
            // Columns past the end; the last range has those past the longest row too.
            let end = match range + 1 == ranges {
                true => op.columns(),
                false => (tiles.end * TILE).min(op.columns()),
            };
            let dead = ix.map.len(row).max(tiles.start * TILE)..end;
            for from in dead.clone().step_by(TILE) {
                put(row, from, &[f32::NEG_INFINITY; TILE][..(dead.end - from).min(TILE)]);
            }
        }
        let len = |row| ix.map.len(row);
        score_block(ix, cpu.isa, rows, tiles, &mut scratch, len, |row, from, scores, n| {
            put(row, from, &scores[..n]);
        });
    });
}
