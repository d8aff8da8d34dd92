//! The indexer on Hopper for many rows: `kernels/indexer_sm90.cu`.

use super::driver::{Boxes, Gpu, Kernel, TensorMap};
use super::params::{self, Ptr, at, n, small};
use crate::context::Stream;
use crate::error::Result;
use crate::layout::Addresses;
use crate::ops::*;

const DIM: usize = 128;
/// Threads of a block that scores, of the plan, and of a block that works on one row.
const SCORE_THREADS: u32 = 384;
const PLAN_THREADS: u32 = 512;
const ROW_THREADS: u32 = 256;
/// Dynamic shared memory: `SCORE_SHARED` and `FINISH_SHARED` of the kernels.
const SCORE_SHARED: u32 = 210_704;
const FINISH_SHARED: u32 = 42_496;
/// Rows of a block with up to 32 heads; half as many with up to 64.
const BLOCK_ROWS: usize = 8;
/// Sampled keys of a row, at most.
const SAMPLES: usize = 2048;
/// Entries of a list beyond which it is cut, and what may come before it is looked at: `MARGIN` of the kernels.
const MARGIN: usize = 3072;
/// Rows that see no more positions are scored as a whole, and their top-k taken from memory.
const DENSE: usize = 8192;

/// The kernels for up to 32 heads, and for up to 64.
#[derive(Debug)]
pub(super) struct IndexerSm90 {
    logits: [Kernel; 2],
    sample: [Kernel; 2],
    filter: [Kernel; 2],
    plan: Kernel,
    threshold: Kernel,
    finish: Kernel,
    tail: Kernel,
}

/// What `indexer_plan` writes.
#[derive(Debug, Clone, Copy)]
struct Plan {
    prefix: Ptr,
    sample_prefix: Ptr,
    size: Ptr,
    lead: Ptr,
    again: Ptr,
    lengths: Ptr,
}

impl Plan {
    fn lay(a: &mut Addresses, rows: usize) -> Self {
        let more = rows.saturating_add(1);
        Plan {
            prefix: a.take::<i32>(more),
            sample_prefix: a.take::<i32>(more),
            size: a.take::<i32>(rows),
            lead: a.take::<i32>(rows),
            again: a.take::<i32>(more),
            lengths: a.take::<i32>(rows),
        }
    }

    fn tell(&self, params: &mut params::IndexerSm90) {
        (params.prefix, params.sample_prefix) = (self.prefix, self.sample_prefix);
        (params.size, params.lead) = (self.size, self.lead);
        (params.again, params.lengths) = (self.again, self.lengths);
    }
}

/// Scratch of a select.
#[derive(Debug, Clone, Copy)]
struct Scratch {
    plan: Plan,
    thresholds: Ptr,
    counts: Ptr,
    lists: Ptr,
}

/// Entries of a survivors' list.
const fn capacity(k: usize) -> usize {
    2 * k + k / 2 + MARGIN
}

fn lay(a: &mut Addresses, rows: usize, k: usize, ctas: usize) -> Scratch {
    // A list for each row and CTA that scores it, and the next row's do not overlap: see the kernels.
    let lists = rows.saturating_add(BLOCK_ROWS * ctas);
    let entries = lists.saturating_mul(capacity(k));
    // Samples go where the lists will be.
    let entries = entries.max(rows.saturating_mul(SAMPLES / 2));
    Scratch {
        plan: Plan::lay(a, rows),
        thresholds: a.take::<f32>(rows),
        counts: a.take::<i32>(lists),
        lists: a.take::<u64>(entries),
    }
}

/// Scores of a dense select, and the rows' lengths.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense {
    plan: Plan,
    pub scores: Ptr,
    pub lengths: Ptr,
    pub columns: usize,
}

fn lay_dense(a: &mut Addresses, rows: usize, max_len: usize) -> Dense {
    let columns = max_len.min(DENSE).next_multiple_of(4);
    let plan = Plan::lay(a, rows);
    let scores = a.take::<f32>(rows.saturating_mul(columns));
    Dense { plan, scores, lengths: plan.lengths, columns }
}

/// Operands as the kernels want them.
#[derive(Clone, Copy)]
struct Operands {
    ix: params::Indexer,
    maps: Maps,
    /// Which of the kernels: for up to 32 heads, or 64.
    wide: usize,
}

/// `Maps` of the kernels.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct Maps([TensorMap; 3]);

impl Operands {
    /// `None`: shapes or a layout that these kernels do not read.
    fn of(ix: &Indexer<'_>) -> Result<Option<Self>> {
        let Query::F8(q) = ix.q else { return Ok(None) };
        let (keys, scales, page, row, scale_page) = match ix.keys {
            Keys::F8(k, s) => (at(k.as_ptr()), at(s.as_ptr()), 0, k.strides()[0], 0),
            Keys::PagedF8(k) => {
                let (first, page) = (at(k.as_ptr()), k.strides()[0]);
                (first, first + (PAGE * DIM) as Ptr, page, DIM, page)
            }
            _ => return Ok(None),
        };
        let [q_row, q_head, _] = q.strides();
        let even = |x: usize| x.is_multiple_of(16) && x < 1 << 40;
        let wide = usize::from(ix.heads > 32);
        let (inside, pages) = match ix.map.store {
            Store::Contiguous(keys) => (keys, 1),
            Store::Paged { pages, .. } => (PAGE, pages),
        };
        let fits = ix.dim == DIM
            && ix.heads <= 64
            && (wide == 0 || ix.heads.is_multiple_of(2))
            && [ix.rows, inside, pages].into_iter().all(|x| x > 0 && x < 1 << 31)
            && [q_row, q_head, row, page].into_iter().all(even)
            && (q_row > 0 || ix.rows == 1)
            && (q_head > 0 || ix.heads == 1)
            && row >= DIM
            && [at(q.as_ptr()), keys, scales].into_iter().all(|x| x % 16 == 0);
        if !fits {
            return Ok(None);
        }
        // Strides of dimensions of size 1 are never used, but must not be 0.
        let stride = |x: usize| x.max(DIM);
        let (q_row, q_head) = (stride(q_row), stride(q_head));
        let queries = if wide == 1 {
            let dims = [
                (DIM, 1, 128),
                (2, q_head, 2),
                (ix.rows, q_row, 4),
                (ix.heads / 2, 2 * q_head, 32),
            ];
            TensorMap::new(Boxes::Bytes, at(q.as_ptr()), dims)?
        } else {
            let dims = [(DIM, 1, 128), (ix.rows, q_row, 8), (ix.heads, q_head, 32)];
            TensorMap::new(Boxes::Bytes, at(q.as_ptr()), dims)?
        };
        let dims = [(DIM, 1, 128), (inside, row, 64), (pages, stride(page), 1)];
        let tiles = TensorMap::new(Boxes::Bytes, keys, dims)?;
        let dims = [(inside, 4, 64), (pages, stride(scale_page), 1)];
        let scales = TensorMap::new(Boxes::Floats, scales, dims)?;
        Ok(Some(Operands {
            ix: params::Indexer::of(ix),
            maps: Maps([queries, tiles, scales]),
            wide,
        }))
    }

    fn block_rows(&self) -> usize {
        BLOCK_ROWS >> self.wide
    }

    /// Parameters without scratch and output.
    fn params(&self, ctas: usize) -> params::IndexerSm90 {
        params::IndexerSm90 {
            ix: self.ix,
            out: 0,
            out_row: 0,
            columns: 0,
            prefix: 0,
            sample_prefix: 0,
            size: 0,
            lead: 0,
            again: 0,
            samples: 0,
            thresholds: 0,
            lists: 0,
            counts: 0,
            lengths: 0,
            out_type: 0,
            k: 0,
            capacity: 0,
            retry: 0,
            block_rows: small(self.block_rows()),
            splits: 1,
            ctas: small(ctas),
            reserved: 0,
        }
    }
}

impl IndexerSm90 {
    /// The kernels, if the device is one for which there are any.
    pub(super) fn load(gpu: &Gpu) -> Result<Option<Self>> {
        const FILE: &str = "indexer_sm90";
        if !gpu.has(FILE) {
            return Ok(None);
        }
        let score = |name| gpu.kernel(FILE, name, SCORE_SHARED);
        let row = |name, shared| gpu.kernel(FILE, name, shared);
        Ok(Some(IndexerSm90 {
            logits: [score(c"indexer_logits_32")?, score(c"indexer_logits_64")?],
            sample: [score(c"indexer_sample_32")?, score(c"indexer_sample_64")?],
            filter: [score(c"indexer_filter_32")?, score(c"indexer_filter_64")?],
            plan: row(c"indexer_plan", 0)?,
            threshold: row(c"indexer_threshold", 0)?,
            finish: row(c"indexer_finish", FINISH_SHARED)?,
            tail: row(c"indexer_logits_tail", 0)?,
        }))
    }

    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn score(
        &self,
        kernel: &Kernel,
        x: &mut Operands,
        params: &mut params::IndexerSm90,
        stream: Stream,
    ) -> Result<()> {
        let mut arguments = [(&raw mut x.maps).cast(), (&raw mut *params).cast()];
        let (grid, stream) = ((params.ctas.unsigned_abs() as usize, 1), stream.as_raw());
        // SAFETY: the kernel's two parameters; the rest passed on.
        unsafe {
            kernel.launch_with(grid, SCORE_THREADS, SCORE_SHARED, stream, &mut arguments, false)
        }
    }

    /// Scores of all rows into `params.out`, up to each row's end.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn score_all(
        &self,
        x: &mut Operands,
        params: &mut params::IndexerSm90,
        stream: Stream,
    ) -> Result<()> {
        // Some 16 parts for each CTA, none of fewer than 8 tiles.
        let (ctas, columns) = (params.ctas.unsigned_abs() as usize, params.columns as usize);
        let blocks = (x.ix.rows as usize).div_ceil(x.block_rows()).max(1);
        let parts = (16 * ctas / blocks).min(columns.div_ceil(8 * PAGE)).max(1);
        params.splits = small(parts);
        let kernel = &self.logits[x.wide];
        // SAFETY: passed on.
        unsafe { self.score(kernel, x, params, stream) }
    }

    /// Scores into memory; false if the shapes are not for these kernels.
    pub(super) fn logits(&self, gpu: &Gpu, op: &IndexerLogits<'_>, stream: Stream) -> Result<bool> {
        let Some(mut x) = Operands::of(&op.indexer)? else { return Ok(false) };
        let (out, out_type, [out_row, _]) = super::floats_mut(&op.out);
        let mut params = x.params(gpu.sms);
        (params.out, params.out_row, params.out_type) = (out, n(out_row), out_type);
        params.columns = n(op.columns());
        let _entered = gpu.enter()?;
        // SAFETY: the kernels' parameters; checked tensors on this device; lengths and pages are bounded on the device.
        unsafe {
            self.score_all(&mut x, &mut params, stream)?;
            let grid = (op.indexer.rows, 1);
            self.tail.launch(grid, ROW_THREADS, 0, stream.as_raw(), params)?;
        }
        Ok(true)
    }

    /// Bytes of scratch for a select of these shapes or smaller ones.
    pub(super) fn scratch(&self, gpu: &Gpu, op: &Select<'_>) -> usize {
        let (rows, max_len) = (op.indexer.rows, op.indexer.map.max_len());
        let mut dense = Addresses::measure();
        lay_dense(&mut dense, rows, max_len);
        let mut lists = Addresses::measure();
        if max_len > DENSE {
            lay(&mut lists, rows, op.topk, gpu.sms);
        }
        dense.used().max(lists.used())
    }

    /// Scores of rows that are short, in scratch at `base`, for a top-k. `None` if they are not short, or the shapes are
    /// not for these kernels.
    pub(super) fn dense(
        &self,
        gpu: &Gpu,
        op: &Select<'_>,
        base: u64,
        stream: Stream,
    ) -> Result<Option<Dense>> {
        let ix = &op.indexer;
        if ix.map.max_len() > DENSE {
            return Ok(None);
        }
        let Some(mut x) = Operands::of(ix)? else { return Ok(None) };
        let dense = lay_dense(&mut Addresses::over(base), ix.rows, ix.map.max_len());
        let mut params = x.params(gpu.sms);
        (params.out, params.out_row) = (dense.scores, n(dense.columns));
        (params.columns, params.k) = (n(dense.columns), small(op.topk));
        dense.plan.tell(&mut params);
        let _entered = gpu.enter()?;
        // SAFETY: as in `logits`; the scratch is laid out for these rows.
        unsafe {
            self.plan.launch((1, 1), PLAN_THREADS, 0, stream.as_raw(), params)?;
            self.score(&self.logits[x.wide], &mut x, &mut params, stream)?;
        }
        Ok(Some(dense))
    }

    /// Scores and selects; false if the shapes are not for these kernels. `base`: [`IndexerSm90::scratch`] bytes.
    pub(super) fn select(
        &self,
        gpu: &Gpu,
        op: &Select<'_>,
        base: u64,
        stream: Stream,
    ) -> Result<bool> {
        let ix = &op.indexer;
        let Some(mut x) = Operands::of(ix)? else { return Ok(false) };
        let scratch = lay(&mut Addresses::over(base), ix.rows, op.topk, gpu.sms);
        let mut params = params::IndexerSm90 {
            out: at(op.indices.as_mut_ptr()),
            out_row: n(op.indices.strides()[0]),
            samples: scratch.lists,
            thresholds: scratch.thresholds,
            lists: scratch.lists,
            counts: scratch.counts,
            k: small(op.topk),
            capacity: small(capacity(op.topk)),
            ..x.params(gpu.sms)
        };
        scratch.plan.tell(&mut params);
        let (rows, raw) = ((ix.rows, 1), stream.as_raw());
        let _entered = gpu.enter()?;
        // SAFETY: as in `logits`; the scratch is laid out for these rows.
        unsafe {
            self.plan.launch((1, 1), PLAN_THREADS, 0, raw, params)?;
            self.score(&self.sample[x.wide], &mut x, &mut params, stream)?;
            self.threshold.launch(rows, ROW_THREADS, 0, raw, params)?;
            for retry in [0, 1] {
                params.retry = retry;
                self.score(&self.filter[x.wide], &mut x, &mut params, stream)?;
                self.finish.launch(rows, ROW_THREADS, FINISH_SHARED, raw, params)?;
            }
        }
        Ok(true)
    }
}
