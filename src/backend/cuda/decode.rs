//! Decode on Hopper: `kernels/decode_sm90.cu`.

use super::driver::{Boxes, Gpu, Kernel, TensorMap};
use super::params::{self, Ptr, at, n, small};
use crate::context::Stream;
use crate::error::Result;
use crate::layout::Addresses;
use crate::ops::*;

/// Warpgroups of a block that score, and threads of a block.
const GROUPS: usize = 4;
const SCORES_THREADS: u32 = 128 * GROUPS as u32 + 64;
const TOPK_THREADS: u32 = 1024;
/// Dynamic shared memory of a block: all there is for scores, `SelectShared` for top-k.
const SCORES_SHARED: usize = 227 * 1024;
const TOPK_SHARED: u32 = 209_568;
/// Stages of the ring: more do not make it faster.
const STAGES: usize = 8;
/// Groups of a launch, and queries of a request, at most. A group: rows that follow each other, of one request.
const DECODE_GROUPS: usize = 512;
const QUERIES: usize = 8;
const DIM: usize = 128;
/// Bytes of scores, and of the best of every 8, that a launch leaves in memory, at most.
const SCRATCH: usize = 128 << 20;

/// The kernels, by padded number of heads.
#[derive(Debug)]
pub(super) struct Decode {
    scores: [(usize, Kernel); 3],
    topk: Kernel,
}

/// Scores and the best of every 8.
struct Scratch {
    scores: Ptr,
    tops: Ptr,
}

fn lay(a: &mut Addresses, positions: usize) -> Scratch {
    Scratch { scores: a.take::<f32>(positions), tops: a.take::<u32>(positions / 8) }
}

/// Positions that scratch has room for: those of all rows that decode can have. Never less for larger shapes.
fn room(ix: &Indexer<'_>) -> usize {
    let requests = ix.map.block_table.map_or(0, |t| t.shape()[0]);
    let rows = ix.rows.min(requests.saturating_mul(QUERIES));
    rows.saturating_mul(columns(&ix.map)).min(SCRATCH / 36 * 8)
}

/// Positions of a row, in whole pages.
fn columns(map: &KeyMap<'_>) -> usize {
    map.max_len().next_multiple_of(PAGE)
}

/// Bytes of scratch for a select of these shapes or smaller ones.
pub(super) fn scratch(op: &Select<'_>) -> usize {
    let mut a = Addresses::measure();
    lay(&mut a, room(&op.indexer));
    a.used()
}

/// Whether the copy engine takes tensors at these addresses, with these strides in bytes.
fn copyable(addresses: [Ptr; 2], strides: [usize; 3]) -> bool {
    addresses.iter().all(|x| x.is_multiple_of(16))
        && strides.iter().all(|&x| x > 0 && x.is_multiple_of(16) && x < 1 << 40)
}

/// Operands as the kernels want them.
#[derive(Clone, Copy)]
struct Operands {
    ix: params::Indexer,
    keys: TensorMap,
    q: TensorMap,
    padded: usize,
    /// Rows of a group; with `row_request`, at most.
    queries: usize,
    /// Rows to start a launch at are multiples of this.
    unit: usize,
}

impl Operands {
    /// `None`: not decode, or not a layout that the copy engine can read.
    fn of(ix: &Indexer<'_>) -> Result<Option<Self>> {
        let (Query::F8(q), Keys::PagedF8(k)) = (ix.q, ix.keys) else { return Ok(None) };
        let padded = ix.heads.next_power_of_two().max(16);
        let requests = ix.map.block_table.map_or(0, |t| t.shape()[0]);
        let (queries, unit) = match ix.map.row_request {
            None => (ix.map.rows_per_request, ix.map.rows_per_request),
            // Longer groups would leave too little of shared memory for keys.
            Some(_) => (ix.rows.min(if padded > 32 { QUERIES / 2 } else { QUERIES }), 1),
        };
        let [q_row, q_head, _] = q.strides();
        let (page, pages) = (k.strides()[0], k.shape()[0]);
        let fits = ix.rows > 0
            && ix.dim == DIM
            && ix.heads <= 64
            && ix.rows <= requests.saturating_mul(QUERIES)
            && pages > 0
            && copyable([at(q.as_ptr()), at(k.as_ptr())], [q_row, q_head, page]);
        if !fits {
            return Ok(None);
        }
        let dims = [(DIM, 1, 128), (PAGE, DIM, PAGE as u32), (pages, page, 1)];
        let keys = TensorMap::new(Boxes::Bytes, at(k.as_ptr()), dims)?;
        let dims =
            [(DIM, 1, 128), (ix.heads, q_head, padded as u32), (ix.rows, q_row, queries as u32)];
        let q = TensorMap::new(Boxes::Bytes, at(q.as_ptr()), dims)?;
        let ix = params::Indexer::of(ix);
        Ok(Some(Operands { ix, keys, q, padded, queries, unit }))
    }

    /// Stages of the ring of pages that shared memory has room for, and the bytes of it all: `Shared` of the kernel.
    fn ring(&self) -> (usize, usize) {
        let slot = self.padded * (DIM + 4) + 4;
        let plan = 4 * DECODE_GROUPS + 2 + SCORES_THREADS as usize / 32;
        let fixed = 1024 + 2 * self.queries * slot + 32 + 4 * plan;
        let stage = 2 * PAGE * (DIM + 4) + 16 + 16;
        let stages = ((SCORES_SHARED - fixed) / stage).min(STAGES) / GROUPS * GROUPS;
        (stages, fixed + stages * stage)
    }
}

impl Decode {
    /// The kernels, if the device is one for which there are any.
    pub(super) fn load(gpu: &Gpu) -> Result<Option<Self>> {
        if !gpu.has("decode_sm90") {
            return Ok(None);
        }
        let kernel = |name, shared| gpu.kernel("decode_sm90", name, shared);
        Ok(Some(Decode {
            scores: [
                (16, kernel(c"decode_scores_16", SCORES_SHARED as u32)?),
                (32, kernel(c"decode_scores_32", SCORES_SHARED as u32)?),
                (64, kernel(c"decode_scores_64", SCORES_SHARED as u32)?),
            ],
            topk: kernel(c"decode_topk", TOPK_SHARED)?,
        }))
    }

    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn score(
        &self,
        gpu: &Gpu,
        x: &mut Operands,
        params: &mut params::Decode,
        stream: Stream,
    ) -> Result<()> {
        let (stages, shared) = x.ring();
        params.stages = small(stages);
        let kernel = self.scores.iter().find(|(heads, _)| *heads == x.padded).map(|(_, k)| k);
        let Some(kernel) = kernel else { return Ok(()) };
        let (keys, q) = ((&raw mut x.keys).cast(), (&raw mut x.q).cast());
        let mut arguments = [(&raw mut *params).cast(), keys, q];
        let (grid, threads, stream) = ((gpu.sms, 1), SCORES_THREADS, stream.as_raw());
        // SAFETY: the kernel's parameters; the rest passed on.
        unsafe { kernel.launch_with(grid, threads, shared as u32, stream, &mut arguments, true) }
    }

    /// Scores into f32; false if the shapes are not for these kernels.
    pub(super) fn logits(&self, gpu: &Gpu, op: &IndexerLogits<'_>, stream: Stream) -> Result<bool> {
        let (Some(mut x), FloatsMut::F32(out)) = (Operands::of(&op.indexer)?, op.out) else {
            return Ok(false);
        };
        let row = out.strides()[0];
        let _entered = gpu.enter()?;
        // The kernel counts pages in 32 bits.
        let groups = i32::MAX as usize / op.columns().div_ceil(PAGE).max(1);
        let chunk = x.unit * groups.clamp(1, DECODE_GROUPS);
        for first in (0..op.indexer.rows).step_by(chunk) {
            let mut params = params::Decode {
                ix: x.ix,
                scores: at(out.as_mut_ptr()) + (4 * first * row) as Ptr,
                tops: 0,
                out: 0,
                scores_row: n(row),
                tops_row: 0,
                out_row: 0,
                columns: n(op.columns()),
                first: n(first),
                rows: small(chunk.min(op.indexer.rows - first)),
                queries: small(x.queries),
                k: 0,
                stages: 0,
            };
            // SAFETY: checked tensors on this device; lengths and pages are bounded on the device.
            unsafe { self.score(gpu, &mut x, &mut params, stream)? };
        }
        Ok(true)
    }

    /// Scores and selects; false if the shapes are not for these kernels. `base`: [`scratch`] bytes.
    pub(super) fn select(
        &self,
        gpu: &Gpu,
        op: &Select<'_>,
        base: u64,
        stream: Stream,
    ) -> Result<bool> {
        let Some(mut x) = Operands::of(&op.indexer)? else { return Ok(false) };
        let columns = columns(&op.indexer.map);
        let room = room(&op.indexer);
        // Rows that fit into scratch together; their positions are few enough for 32 bits, too.
        let chunk = x.unit * (room / (x.unit * columns).max(1)).min(DECODE_GROUPS);
        if chunk == 0 {
            return Ok(false);
        }
        let scratch = lay(&mut Addresses::over(base), room);
        let _entered = gpu.enter()?;
        for first in (0..op.indexer.rows).step_by(chunk) {
            let rows = chunk.min(op.indexer.rows - first);
            let mut params = params::Decode {
                ix: x.ix,
                scores: scratch.scores,
                tops: scratch.tops,
                out: at(op.indices.as_mut_ptr()),
                scores_row: n(columns),
                tops_row: n(columns / 8),
                out_row: n(op.indices.strides()[0]),
                columns: n(columns),
                first: n(first),
                rows: small(rows),
                queries: small(x.queries),
                k: small(op.topk),
                stages: 0,
            };
            let (grid, threads) = ((rows, 1), TOPK_THREADS);
            // SAFETY: checked tensors and scratch on this device; lengths and pages are bounded on the device.
            unsafe {
                self.score(gpu, &mut x, &mut params, stream)?;
                let mut arguments = [(&raw mut params).cast()];
                let stream = stream.as_raw();
                self.topk.launch_with(grid, threads, TOPK_SHARED, stream, &mut arguments, true)?;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::copyable;

    #[test]
    fn what_drivers_allocate_is_copyable() {
        let address = 0x7f12_3456_7800;
        assert!(copyable([address; 2], [32 * 128, 128, 8448]));
        assert!(!copyable([address, address + 8], [32 * 128, 128, 8448]));
        assert!(!copyable([address; 2], [32 * 128, 120, 8448]));
        assert!(!copyable([address; 2], [32 * 128, 0, 8448]));
        assert!(!copyable([address; 2], [32 * 128, 128, 1 << 40]));
    }
}
