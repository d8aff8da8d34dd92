//! Decode on Hopper: `kernels/decode_sm90.cu`, and `kernels/decode_few_sm90.cu` for a few rows.

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

/// Rows that `few_scores` takes at most: for more, `decode_scores` wastes less of what memory gives.
const FEW_ROWS: usize = 4;
/// Its blocks, their threads, the bests of a row that each finds, and pages of a row that each can take.
const FEW_BLOCKS: usize = 128;
const FEW_THREADS: u32 = 128 * GROUPS as u32 + 32;
const FEW_BESTS: usize = 8 * GROUPS;
const FEW_PAGES: usize = 32;
/// Stages of its ring: with more, a block of the next kernel would less often find room beside.
const FEW_STAGES: usize = 8;
/// Rows that `few_topk` takes at most, if there is room for all their clusters at once, and the largest k.
const PICK_ROWS: usize = 8;
const PICK_TOPK: usize = 2048;
const PICK_POSITIONS: usize = 1 << 18;
/// Blocks of its clusters, their threads, and shared memory: `PickShared`, and more for every so many positions.
const PICK_BLOCKS: usize = 16;
const PICK_THREADS: u32 = 512;
const PICK_SHARED: usize = 75_696;
const PICK_ROUND: usize = 1 << 15;
const PICK_ROUND_SHARED: usize = 16 * PICK_THREADS as usize;

/// The kernels; of scores for 16, 32 and 64 heads.
#[derive(Debug)]
pub(super) struct Decode {
    scores: [Kernel; 3],
    topk: Kernel,
    few: Option<Few>,
}

/// Those for a few rows.
#[derive(Debug)]
struct Few {
    scores: [Kernel; 3],
    /// Positions of a row at most, rows that the device works on at once, and the kernel.
    topk: [(usize, usize, Kernel); 2],
}

/// The kernel for so many heads.
fn by_heads([k16, k32, k64]: &[Kernel; 3], padded: usize) -> &Kernel {
    match padded {
        ..=16 => k16,
        17..=32 => k32,
        _ => k64,
    }
}

/// Dynamic shared memory of `few_topk`, for rows of up to so many positions.
fn pick_shared(columns: usize) -> u32 {
    (PICK_SHARED + columns.div_ceil(PICK_ROUND) * PICK_ROUND_SHARED) as u32
}

impl Few {
    /// The kernels, if there are any and the device holds their clusters.
    fn load(gpu: &Gpu) -> Result<Option<Self>> {
        const FILE: &str = "decode_few_sm90";
        let scores = |name| {
            let kernel = gpu.kernel(FILE, name, SCORES_SHARED as u32)?;
            gpu.prefer_shared(&kernel)?;
            Ok(kernel)
        };
        let topk = |columns| {
            let (blocks, shared) = (PICK_BLOCKS as u32, pick_shared(columns));
            let (kernel, at_once) =
                gpu.cluster_kernel(FILE, c"few_topk", blocks, PICK_THREADS, shared)?;
            gpu.prefer_shared(&kernel)?;
            Ok((columns, at_once, kernel))
        };
        Ok(Some(Few {
            scores: [
                scores(c"few_scores_16")?,
                scores(c"few_scores_32")?,
                scores(c"few_scores_64")?,
            ],
            topk: [topk(PICK_POSITIONS / 2)?, topk(PICK_POSITIONS)?],
        }))
    }

    /// The kernel of top-k, if it is for such rows and has room for all their clusters at once.
    fn topk(&self, gpu: &Gpu, rows: usize, columns: usize, k: usize) -> Option<&Kernel> {
        let (_, at_once, kernel) = self.topk.iter().find(|(most, _, _)| columns <= *most)?;
        let pages = few_blocks(gpu) * FEW_PAGES;
        let fits = rows <= PICK_ROWS.min(*at_once) && columns <= pages * PAGE && k <= PICK_TOPK;
        fits.then_some(kernel)
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
        let kernel = by_heads(&self.scores, x.padded);
        let (blocks, rows) = (few_blocks(gpu), params.rows as usize);
        params.stages = small(FEW_STAGES);
        params.tops_row = n(blocks * FEW_BESTS);
        params.eights = 0;
        if x.ix.map.row_request != 0 {
            params.queries = 1; // Which rows follow each other is not known here.
        }
        let mut q = x.queries(rows)?;
        let (keys, q) = ((&raw mut x.keys).cast(), (&raw mut q).cast());
        let mut arguments = [(&raw mut *params).cast(), keys, q];
        let (grid, shared, stream) = ((blocks, 1), x.few_shared(rows), stream.as_raw());
        // SAFETY: the kernel's parameters; the rest passed on.
        unsafe { kernel.launch_with(grid, FEW_THREADS, shared, stream, &mut arguments, true) }
    }
}

/// Blocks of `few_scores`.
fn few_blocks(gpu: &Gpu) -> usize {
    gpu.sms.min(FEW_BLOCKS)
}

/// Scores and the best of every 8; for a few rows, what their blocks find.
struct Scratch {
    scores: Ptr,
    tops: Ptr,
}

fn lay(a: &mut Addresses, positions: usize) -> Scratch {
    let few = FEW_ROWS * FEW_BLOCKS * FEW_BESTS;
    Scratch { scores: a.take::<f32>(positions), tops: a.take::<u32>((positions / 8).max(few)) }
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
        Ok(Some(Operands { ix: params::Indexer::of(ix), keys, padded, queries, unit }))
    }

    /// The queries, by boxes of so many rows.
    fn queries(&self, rows: usize) -> Result<TensorMap> {
        let size = |x: i64| usize::try_from(x).unwrap_or(0);
        let (ix, heads, rows) = (&self.ix, self.padded as u32, rows as u32);
        let dims = [
            (DIM, 1, 128),
            (size(ix.heads.into()), size(ix.q_head), heads),
            (size(ix.rows), size(ix.q_row), rows),
        ];
        TensorMap::new(Boxes::Bytes, ix.q, dims)
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

    /// Bytes of `FewShared`.
    fn few_shared(&self, rows: usize) -> u32 {
        let fixed = 1024 + rows * (self.padded * (DIM + 4) + 4 * FEW_BESTS + 4) + 16;
        (fixed + FEW_STAGES * (PAGE * (DIM + 4) + 16 + 16)) as u32
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
                kernel(c"decode_scores_16", SCORES_SHARED as u32)?,
                kernel(c"decode_scores_32", SCORES_SHARED as u32)?,
                kernel(c"decode_scores_64", SCORES_SHARED as u32)?,
            ],
            topk: kernel(c"decode_topk", TOPK_SHARED)?,
            few: Few::load(gpu)?,
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
        let kernel = by_heads(&self.scores, x.padded);
        let mut q = x.queries(x.queries)?;
        let (keys, q) = ((&raw mut x.keys).cast(), (&raw mut q).cast());
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
                eights: 1,
                reserved: 0,
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
                eights: 1,
                reserved: 0,
            };
            let few = self.few.as_ref();
            let few = few.and_then(|few| Some((few, few.topk(gpu, rows, columns, op.topk)?)));
            let (topk, blocks, threads, shared) = match few {
                Some((_, topk)) => (topk, rows * PICK_BLOCKS, PICK_THREADS, pick_shared(columns)),
                None => (&self.topk, rows, TOPK_THREADS, TOPK_SHARED),
            };
            // SAFETY: checked tensors and scratch on this device; lengths and pages are bounded on the device.
            unsafe {
                match few {
                    Some((few, _)) if rows <= FEW_ROWS => {
                        few.score(gpu, &mut x, &mut params, stream)?;
                    }
                    _ => self.score(gpu, &mut x, &mut params, stream)?,
                }
                let (mut arguments, stream) = ([(&raw mut params).cast()], stream.as_raw());
                topk.launch_with((blocks, 1), threads, shared, stream, &mut arguments, true)?;
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
