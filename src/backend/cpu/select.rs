//! Exact top-k, of given scores and fused into scoring.
//!
//! Shapes: scores come in tiles of 64 in ascending order of position; out int32 `[rows, k]`, ascending, -1 tail.
//! Idea: keep a threshold that at least k positions seen so far reach; only scores strictly above it can matter, since
//! positions only grow and ties go to the lowest. Survivors are appended in order to a buffer of about 2k; when it is
//! full, a radix select finds the k-th best and a stable filter keeps the best k, so the order never has to be
//! restored. About k·ln(L/k) of L scores survive; no L of scores is ever held.
//! Roofline: one compare per score, hidden under scoring; alone it reads each score once.

use super::indexer::{Scratch, score_block};
use super::simd::{Kernel, Simd, TILE};
use super::{Cpu, Isa, Parts};
use crate::error::Result;
use crate::layout::{self, Bump};
use crate::ops::{Floats, MAX_TOPK, Select, TopK};

/// Room for the survivors of one row: the best k, as many again (or a few tiles), one tile, one vector of slack.
const fn capacity(k: usize) -> usize {
    k + spare(k) + TILE + 16
}

const fn spare(k: usize) -> usize {
    if k > 4 * TILE { k } else { 4 * TILE }
}

/// The survivors of one row, by ascending position.
struct Survivors<'a> {
    ranks: &'a mut [i32],
    positions: &'a mut [i32],
    len: &'a mut usize,
    threshold: &'a mut i32,
    k: usize,
}

struct Append<'a, 'b> {
    scores: &'a [f32; TILE],
    n: usize,
    first: i32,
    to: &'a mut Survivors<'b>,
}

impl Kernel for Append<'_, '_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let room = self.to.ranks.len().min(self.to.positions.len());
        assert!(room >= *self.to.len + TILE + 16);
        for i in (0..self.n).step_by(16) {
            let live = if self.n - i >= 16 { u16::MAX } else { (1 << (self.n - i)) - 1 };
            // SAFETY: sixteen scores from `i` on; at most `TILE` more survivors, room for a vector after them.
            unsafe {
                *self.to.len = S::append(
                    self.scores.as_ptr().add(i),
                    live,
                    *self.to.threshold,
                    self.first + i as i32,
                    self.to.ranks.as_mut_ptr(),
                    self.to.positions.as_mut_ptr(),
                    *self.to.len,
                );
            }
        }
    }
}

impl Survivors<'_> {
    /// Offers positions `first..first + n`, all above those offered before.
    #[inline]
    fn push(&mut self, isa: Isa, scores: &[f32; TILE], first: usize, n: usize) {
        // SAFETY: `Append` checks its sizes.
        unsafe { isa.run(Append { scores, n, first: first as i32, to: self }) };
        if *self.len > self.k + spare(self.k) {
            self.compact();
        }
    }

    /// Keeps the best k and raises the threshold to the k-th best.
    fn compact(&mut self) {
        if *self.len > self.k {
            *self.threshold = keep_best(self.ranks, self.positions, *self.len, self.k);
            *self.len = self.k;
        }
    }
}

/// Keeps the `k` best of `len > k` entries, in their order, the first of equals; returns the k-th best rank.
fn keep_best(ranks: &mut [i32], positions: &mut [i32], len: usize, k: usize) -> i32 {
    let (kth, mut ties) = kth_best(&ranks[..len], k);
    let mut to = 0;
    for i in 0..len {
        let (rank, position) = (ranks[i], positions[i]);
        ranks[to] = rank;
        positions[to] = position;
        let tie = usize::from(rank == kth && ties > 0);
        ties -= tie;
        to += tie + usize::from(rank > kth);
    }
    kth
}

/// The k-th best rank (1 <= k <= len), and how many entries equal to it are among the k best.
fn kth_best(ranks: &[i32], k: usize) -> (i32, usize) {
    const BITS: [u32; 3] = [11, 11, 10];
    let (mut prefix, mut known, mut want) = (0u32, 0u32, k as u32);
    for bits in BITS {
        let mut count = [0u32; 1 << 11];
        let shift = 32 - known - bits;
        for &r in ranks {
            let r = r as u32 ^ 1 << 31;
            // The bits known so far must match; none are in the first round.
            if u64::from(r) >> (32 - known) == u64::from(prefix) {
                count[(r >> shift) as usize & ((1 << bits) - 1)] += 1;
            }
        }
        let mut bin = (1usize << bits) - 1;
        while bin > 0 && count[bin] < want {
            want -= count[bin];
            bin -= 1;
        }
        prefix = prefix << bits | bin as u32;
        known += bits;
    }
    ((prefix ^ 1 << 31) as i32, want as usize)
}

/// Everything, when a row has no more than k positions.
fn all(out: &mut [i32], len: usize) {
    for (i, o) in out.iter_mut().enumerate() {
        *o = if i < len { i as i32 } else { -1 };
    }
}

/// Top-k of given scores: rows side by side.
pub(super) fn topk(cpu: &Cpu, op: &TopK<'_>) {
    cpu.run(op.logits.shape()[0], |row| {
        // SAFETY: one task a row.
        let out = unsafe { op.indices.row(&[row]) };
        let (columns, k) = (op.columns(row), out.len());
        if columns.len() <= k {
            return all(out, columns.len());
        }
        const ROOM: usize = capacity(MAX_TOPK);
        let (mut ranks, mut positions) = ([0; ROOM], [0; ROOM]);
        let (mut len, mut threshold) = (0, i32::MIN);
        let mut best = Survivors {
            ranks: &mut ranks,
            positions: &mut positions,
            len: &mut len,
            threshold: &mut threshold,
            k,
        };
        let mut tile = [0.0; TILE];
        for from in (0..columns.len()).step_by(TILE) {
            let n = (columns.len() - from).min(TILE);
            let at = columns.start + from;
            match op.logits {
                Floats::F32(v) => tile[..n].copy_from_slice(&v.row(&[row])[at..at + n]),
                Floats::Bf16(v) => tile
                    .iter_mut()
                    .zip(&v.row(&[row])[at..at + n])
                    .for_each(|(o, x)| *o = x.to_f32()),
            }
            best.push(cpu.isa, &tile, from, n);
        }
        best.compact();
        out.copy_from_slice(&best.positions[..k]);
    });
}

/// How a fused select is cut up: blocks of rows that share key panels, times ranges of keys when there are few
/// blocks. Results do not depend on it.
#[derive(Clone, Copy, Debug)]
struct Cut {
    block: usize,
    blocks: usize,
    ranges: usize,
}

/// Most rows a block.
const BLOCK: usize = 8;

impl Cut {
    fn of(op: &Select<'_>, threads: usize) -> Self {
        let rows = op.indexer.rows;
        let block = rows.clamp(1, BLOCK);
        let blocks = rows.div_ceil(block);
        // A range much shorter than 2k would keep most of its positions, and merging would cost more than it saves.
        let useful = op.indexer.map.max_len() / (2 * op.topk).max(8 * TILE);
        let wanted = if threads > 1 { 2 * threads / blocks.max(1) } else { 1 };
        Cut { block, blocks, ranges: wanted.clamp(1, useful.max(1)) }
    }
}

/// Scratch of one worker.
struct Worker<'a> {
    scoring: Scratch<'a>,
    ranks: &'a mut [i32],
    positions: &'a mut [i32],
    lens: [usize; BLOCK],
    thresholds: [i32; BLOCK],
}

fn lay_worker<'a>(b: &mut Bump<'a>, op: &Select<'_>) -> Worker<'a> {
    let ix = &op.indexer;
    let block = ix.rows.min(BLOCK);
    Worker {
        scoring: Scratch {
            q: b.take(block * ix.heads * ix.dim / 2),
            panel: b.take(ix.dim / 2 * TILE),
        },
        ranks: b.take(block * capacity(op.topk)),
        positions: b.take(block * capacity(op.topk)),
        lens: [0; BLOCK],
        thresholds: [i32::MIN; BLOCK],
    }
}

/// The whole workspace: the workers' bytes, and each range's best of each row, if there are several ranges.
///
/// Sizes are bounds that shrink with every extent, not what [`Cut`] makes of the shapes: a host sizes its workspace
/// once, for the largest call it will make, and fewer rows mean more ranges.
struct Shared<'a> {
    workers: &'a mut [u8],
    ranks: &'a mut [i32],
    positions: &'a mut [i32],
    lens: &'a mut [i32],
}

fn lay_shared<'a>(b: &mut Bump<'a>, op: &Select<'_>, threads: usize) -> Shared<'a> {
    let rows = op.indexer.rows;
    let worker = layout::measure(|b| lay_worker(b, op));
    // `rows * ranges` is at most `BLOCK * blocks * (2 * threads / blocks)`, and `ranges * topk` half of a row.
    let parts = if threads > 1 { 2 * threads * rows.min(BLOCK) } else { 0 };
    let half = op.indexer.map.max_len() / 2;
    let entries = parts.saturating_mul(op.topk).min(rows.saturating_mul(half));
    Shared {
        workers: b.take(threads.saturating_mul(worker)),
        ranks: b.take(entries),
        positions: b.take(entries),
        lens: b.take(parts),
    }
}

impl Select<'_> {
    /// Bytes of workspace that [`Cpu::select`] needs with this many threads, whatever their alignment, for these
    /// shapes and all smaller ones.
    pub fn workspace(&self, threads: usize) -> usize {
        layout::with_slack(layout::measure(|b| lay_shared(b, self, threads)))
    }
}

/// Scores and selects.
pub(super) fn select(cpu: &Cpu, op: &Select<'_>, workspace: &mut [u8]) -> Result<()> {
    let (ix, k, isa) = (&op.indexer, op.topk, cpu.isa);
    let cut = Cut::of(op, cpu.threads());
    let bytes = layout::measure(|b| lay_shared(b, op, cpu.threads()));
    let memory = layout::aligned("workspace", workspace, bytes)?;
    let shared = lay_shared(&mut Bump::over(memory), op, cpu.threads());
    let [ranks, positions, lens] = [shared.ranks, shared.positions, shared.lens].map(Parts::of);
    // Rows that take everything are not scored.
    let scored = |row| match ix.map.len(row) {
        n if n <= k => 0,
        n => n,
    };
    let worker = shared.workers.len() / cpu.threads();
    cpu.run_with(cut.blocks * cut.ranges, shared.workers, worker, |task, scratch| {
        let (first, range) = (task / cut.ranges * cut.block, task % cut.ranges);
        let rows = first..(first + cut.block).min(ix.rows);
        let mut w = lay_worker(&mut Bump::over(scratch), op);
        let tiles = rows.clone().map(scored).max().unwrap_or(0).div_ceil(TILE);
        let tiles = tiles * range / cut.ranges..tiles * (range + 1) / cut.ranges;
        let room = capacity(k);
        fn survivors<'a>(w: &'a mut Worker<'_>, i: usize, room: usize, k: usize) -> Survivors<'a> {
            Survivors {
                ranks: &mut w.ranks[i * room..][..room],
                positions: &mut w.positions[i * room..][..room],
                len: &mut w.lens[i],
                threshold: &mut w.thresholds[i],
                k,
            }
        }
        let mut scoring = Scratch {
            q: std::mem::take(&mut w.scoring.q),
            panel: std::mem::take(&mut w.scoring.panel),
        };
        score_block(ix, isa, rows.clone(), tiles, &mut scoring, scored, |row, from, scores, n| {
            survivors(&mut w, row - first, room, k).push(isa, scores, from, n);
        });
        for row in rows {
            let mut best = survivors(&mut w, row - first, room, k);
            best.compact();
            let len = *best.len;
            if cut.ranges > 1 {
                let part = row * cut.ranges + range;
                // SAFETY: one task for each row and range.
                unsafe {
                    lens.part(part..part + 1)[0] = len as i32;
                    ranks.part(part * k..part * k + len).copy_from_slice(&best.ranks[..len]);
                    positions
                        .part(part * k..part * k + len)
                        .copy_from_slice(&best.positions[..len]);
                }
                continue;
            }
            // SAFETY: the only task of the row.
            let out = unsafe { op.indices.row(&[row]) };
            match scored(row) {
                0 => all(out, ix.map.len(row)),
                _ => out.copy_from_slice(&best.positions[..k]),
            }
        }
    });
    if cut.ranges == 1 {
        return Ok(());
    }
    // Every range's best k hold the row's best k: put them side by side, ascending, and keep those.
    cpu.run(ix.rows, |row| {
        // SAFETY: one task a row; the tasks above are done.
        let (out, lens, ranks, positions) = unsafe {
            let parts = row * cut.ranges..(row + 1) * cut.ranges;
            let entries = parts.start * k..parts.end * k;
            let (ranks, positions) = (ranks.part(entries.clone()), positions.part(entries));
            (op.indices.row(&[row]), lens.part(parts), ranks, positions)
        };
        if scored(row) == 0 {
            return all(out, ix.map.len(row));
        }
        let mut len = 0;
        for (range, &n) in lens.iter().enumerate() {
            let n = n as usize;
            ranks.copy_within(range * k..range * k + n, len);
            positions.copy_within(range * k..range * k + n, len);
            len += n;
        }
        if len > k {
            keep_best(ranks, positions, len, k);
        }
        out.copy_from_slice(&positions[..k]);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kth_best_counts_ties() {
        let ranks = [5, -3, 5, i32::MIN, i32::MAX, 5, 0];
        assert_eq!(kth_best(&ranks, 1), (i32::MAX, 1));
        assert_eq!(kth_best(&ranks, 2), (5, 1));
        assert_eq!(kth_best(&ranks, 4), (5, 3));
        assert_eq!(kth_best(&ranks, 5), (0, 1));
        assert_eq!(kth_best(&ranks, 7), (i32::MIN, 1));
        let (mut r, mut p) = (ranks, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(keep_best(&mut r, &mut p, 7, 3), 5);
        assert_eq!(&p[..3], [0, 2, 4]);
    }
}
