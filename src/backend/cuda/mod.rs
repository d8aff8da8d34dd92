//! The CUDA backend: checks where memory is, sizes scratch, launches. The kernels are in `kernels/`.
//!
//! Nothing here waits, allocates or looks at device data: what the host cannot see, the kernels guard. Checked mode does
//! all of that, to name what is out of range.

mod attention;
mod checked;
mod decode;
mod distill;
mod driver;
mod images;
mod indexer_sm90;
mod params;
mod probs;

use super::check;
use crate::context::Stream;
use crate::error::{Error, Result};
use crate::layout::{Addresses, Workspace, with_slack};
use crate::ops::*;
use crate::tensor::{Device, Element, View, ViewMut};
use checked::Copies;
use decode::Decode;
use driver::{Gpu, Kernel};
use indexer_sm90::{Dense, IndexerSm90};
use params::{Ptr, at, n, per_row, small};
use std::ffi::CStr;
use std::sync::Arc;

/// Threads of a block, by kernel family.
const SCORE_THREADS: u32 = 128;
const TOPK_THREADS: u32 = 512;
const THREADS: u32 = 256;
/// Columns that a block of the Hopper top-k holds in registers, and its shared memory: `Shared` in
/// `kernels/topk_sm90.cu`.
const TOPK_HELD: usize = 8192;
const TOPK_SHARED: u32 = 65_900;
/// Tokens that a block of the writing kernels takes.
const WRITE_TOKENS: usize = 8;
/// Vectors that a block of `index_q_quantize` takes.
const WARPS: usize = THREADS as usize / 32;
/// Heads that a block of `attention` takes, and KV rows a step.
const ATTENTION_HEADS: usize = 8;
const ATTENTION_KEYS: usize = 16;

/// A CUDA device with the library's kernels.
#[derive(Debug)]
pub struct Cuda {
    gpu: Arc<Gpu>,
    /// Index arrays are looked at before each launch.
    checks: bool,
    index_k_write: Kernel,
    index_q_quantize: Kernel,
    logits: Kernel,
    select_rows: Kernel,
    select_merge: Kernel,
    topk: Kernel,
    topk_sm90: Option<TopKSm90>,
    indices_to_slots: Kernel,
    copy_rows: Kernel,
    carry_rows: Kernel,
    overlap: Kernel,
    kv_write: Kernel,
    attention: Kernel,
    attention_probs: Kernel,
    distill: distill::Kernels,
    decode: Option<Decode>,
    indexer_sm90: Option<IndexerSm90>,
    attention_sm90: Option<attention::Attention>,
    probs_sm90: Option<probs::Probs>,
}

/// Device memory of the library's own: int32, at first -1.
#[derive(Debug)]
pub struct Memory {
    gpu: Arc<Gpu>,
    address: u64,
}

impl Memory {
    /// First element.
    pub fn as_mut_ptr(&self) -> *mut i32 {
        std::ptr::without_provenance_mut(self.address as usize)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.free(self.address);
    }
}

/// Scratch of a fused select: a list of survivors for each block.
struct Lists {
    ranks: Ptr,
    positions: Ptr,
    counts: Ptr,
}

fn lay_lists(a: &mut Addresses, blocks: usize, capacity: usize) -> Lists {
    Lists {
        ranks: a.take::<u32>(blocks.saturating_mul(capacity)),
        positions: a.take::<i32>(blocks.saturating_mul(capacity)),
        counts: a.take::<i32>(blocks),
    }
}

/// Survivors of one list: the best k, as many again (or a few tiles), and a tile.
const fn capacity(k: usize) -> usize {
    k + if k > 4 * PAGE { k } else { 4 * PAGE } + PAGE
}

/// Dynamic shared memory of the scoring kernels: see `kernels/indexer.cuh`.
fn score_shared(dim: usize) -> u32 {
    (dim / 2 * PAGE * 4 + 8 * dim * 4 + 8 * PAGE * 4) as u32
}

/// Dynamic shared memory of `attention`.
const fn attention_shared(d_qk: usize) -> u32 {
    let stride = d_qk.next_multiple_of(32) + 2;
    ((ATTENTION_HEADS * d_qk + ATTENTION_KEYS * stride) * 4) as u32
}

/// Address, element type and strides of a float tensor.
fn floats<const N: usize>(x: &Floats<'_, N>) -> (Ptr, i32, [usize; N]) {
    match x {
        Floats::F32(v) => (at(v.as_ptr()), 0, v.strides()),
        Floats::Bf16(v) => (at(v.as_ptr()), 1, v.strides()),
    }
}

fn floats_mut<const N: usize>(x: &FloatsMut<'_, N>) -> (Ptr, i32, [usize; N]) {
    match x {
        FloatsMut::F32(v) => (at(v.as_mut_ptr()), 0, v.strides()),
        FloatsMut::Bf16(v) => (at(v.as_mut_ptr()), 1, v.strides()),
    }
}

fn slots(x: &Slots<'_>) -> (Ptr, i32) {
    match x {
        Slots::I32(v) => (at(v.as_ptr()), 0),
        Slots::I64(v) => (at(v.as_ptr()), 1),
    }
}

/// Address, format, and bytes between pages and rows.
fn kv_layout<T: Element>(p: *const T, format: i32, strides: [usize; 3]) -> (Ptr, i32, i64, i64) {
    let size = size_of::<T>();
    (at(p), format, n(strides[0] * size), n(strides[1] * size))
}

const KV_F32: i32 = 0;
const KV_BF16: i32 = 1;
const KV_FP8: i32 = 2;

/// What the Hadamard rotation multiplies by, rounded as on the CPU.
fn norm(dim: usize) -> f32 {
    1.0 / (dim as f32).sqrt()
}

/// The Hopper kernels of top-k.
#[derive(Debug)]
struct TopKSm90 {
    /// For rows that a block holds in registers.
    short: Kernel,
    /// For any rows: blocks that share one, rows that the device works on at once, kernel.
    clusters: [(usize, usize, Kernel); 3],
}

impl TopKSm90 {
    fn load(gpu: &Gpu) -> Result<Option<Self>> {
        const FILE: &str = "topk_sm90";
        if !gpu.has(FILE) {
            return Ok(None);
        }
        let one = |name| gpu.kernel(FILE, name, TOPK_SHARED);
        let cluster = |name, blocks: u32| {
            let found = gpu.cluster_kernel(FILE, name, blocks, TOPK_THREADS, TOPK_SHARED);
            found.map(|(kernel, at_once)| (blocks as usize, at_once, kernel))
        };
        Ok(Some(TopKSm90 {
            short: one(c"topk_short")?,
            clusters: [
                (1, usize::MAX, one(c"topk_1")?),
                cluster(c"topk_4", 4)?,
                cluster(c"topk_16", 16)?,
            ],
        }))
    }

    /// The kernel, and how many blocks take a row.
    fn choose(&self, rows: usize, p: &params::TopK) -> (&Kernel, usize) {
        // Then no row begins inside a group of four, wherever `row_start` lets it begin.
        let group = if p.type_ == 0 { 16 } else { 8 };
        let aligned = p.logits.is_multiple_of(group) && (p.logits_row % 4 == 0 || rows == 1);
        let columns = p.columns as usize;
        if columns <= TOPK_HELD && aligned {
            return (&self.short, 1);
        }
        // More blocks while they let a row stay in registers and no row waits for another.
        let [(one, _, alone), more @ ..] = &self.clusters;
        let (mut blocks, mut kernel) = (*one, alone);
        for (next, at_once, with) in more {
            if columns > blocks * TOPK_HELD && rows <= *at_once {
                (blocks, kernel) = (*next, with);
            }
        }
        (kernel, blocks)
    }
}

impl Cuda {
    /// Opens a device: the calling thread's context if it is on it, else its primary one.
    pub fn new(device: i32) -> Result<Self> {
        let gpu = Arc::new(Gpu::open(device)?);
        let kernel = |file, name, shared| gpu.kernel(file, name, shared);
        Ok(Cuda {
            checks: false,
            index_k_write: kernel("index_k", c"index_k_write", 0)?,
            index_q_quantize: kernel("index_k", c"index_q_quantize", 0)?,
            logits: kernel("logits", c"logits", score_shared(MAX_INDEX_DIM))?,
            select_rows: kernel("select", c"select_rows", score_shared(MAX_INDEX_DIM))?,
            select_merge: kernel("select", c"select_merge", 0)?,
            topk: kernel("topk", c"topk", 0)?,
            topk_sm90: TopKSm90::load(&gpu)?,
            indices_to_slots: kernel("indices", c"indices_to_slots", 0)?,
            copy_rows: kernel("indices", c"copy_rows", 0)?,
            carry_rows: kernel("indices", c"carry_rows", 0)?,
            overlap: kernel("indices", c"overlap", 0)?,
            kv_write: kernel("kv", c"kv_write", 0)?,
            attention: kernel("attention", c"attention", attention_shared(MAX_QK_DIM))?,
            attention_probs: kernel("attention", c"attention_probs", attention_shared(MAX_QK_DIM))?,
            distill: distill::Kernels::load(&gpu)?,
            decode: Decode::load(&gpu)?,
            indexer_sm90: IndexerSm90::load(&gpu)?,
            attention_sm90: attention::Attention::load(&gpu)?,
            probs_sm90: probs::Probs::load(&gpu)?,
            gpu,
        })
    }

    /// From now on in checked mode.
    pub fn check_indices(&mut self) {
        self.checks = true;
    }

    /// In checked mode: what looks at index arrays, when what the stream holds is done.
    fn checked(&self, stream: Stream) -> Result<Option<Copies<'_>>> {
        self.checks.then(|| Copies::after(&self.gpu, stream)).transpose()
    }

    /// Ordinal of the device.
    pub fn ordinal(&self) -> i32 {
        self.gpu.ordinal()
    }

    /// What the driver calls the device.
    pub fn name(&self) -> String {
        self.gpu.name()
    }

    /// The device's architecture.
    pub fn isa(&self) -> &'static CStr {
        match self.gpu.capability {
            80 => c"sm_80",
            86 => c"sm_86",
            87 => c"sm_87",
            88 => c"sm_88",
            89 => c"sm_89",
            90 => c"sm_90",
            100 => c"sm_100",
            103 => c"sm_103",
            110 => c"sm_110",
            120 => c"sm_120",
            121 => c"sm_121",
            _ => c"newer than the library",
        }
    }

    /// Memory for `elements` int32 on the device.
    pub fn allocate(&self, elements: usize) -> Result<Memory> {
        Ok(Memory { address: self.gpu.allocate(4 * elements)?, gpu: self.gpu.clone() })
    }

    fn device(&self, device: Device) -> Result<()> {
        let here = Device::Cuda(self.ordinal());
        if device == here {
            return Ok(());
        }
        Err(Error::invalid("tensors", format_args!("memory on {here} for this backend"), device))
    }

    /// # Safety
    /// As [`Kernel::launch`].
    unsafe fn launch<P: Copy>(
        &self,
        kernel: &Kernel,
        grid: (usize, usize),
        block: u32,
        shared: u32,
        stream: Stream,
        params: P,
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let _entered = self.gpu.enter()?;
        // SAFETY: passed on.
        unsafe { kernel.launch(grid, block, shared, stream.as_raw(), params) }
    }

    /// Quantises new indexer keys into their pages.
    pub fn index_k_write(&self, op: &IndexKWrite<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        let slot_limit = op.pages.shape()[0].saturating_mul(PAGE);
        if let Some(copies) = self.checked(stream)? {
            copies.slots(&op.slots, slot_limit)?;
        }
        let (k, k_type, [k_row, _]) = floats(&op.k);
        let (slots, wide_slots) = slots(&op.slots);
        let params = params::IndexKWrite {
            k,
            slots,
            pages: at(op.pages.as_mut_ptr()),
            k_row: n(k_row),
            page_bytes: n(op.pages.strides()[0]),
            slot_limit: n(slot_limit),
            tokens: n(op.tokens),
            k_type,
            wide_slots,
            dim: small(op.dim),
            hadamard: op.hadamard.into(),
            pow2_scale: op.pow2_scale.into(),
            norm: norm(op.dim),
        };
        let grid = (op.tokens.div_ceil(WRITE_TOKENS), 1);
        // SAFETY: the kernel's struct; checked tensors on this device; slots are bounded on the device.
        unsafe { self.launch(&self.index_k_write, grid, THREADS, 0, stream, params) }
    }

    /// Quantises indexer queries.
    pub fn index_q_quantize(&self, op: &IndexQQuantize<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        let (q, q_type, [q_row, q_head, _]) = floats(&op.q);
        let [rows, heads, dim] = op.q.shape();
        let [q_out_row, q_out_head, _] = op.q_out.strides();
        let params = params::IndexQQuantize {
            q,
            weights: at(op.weights.as_ptr()),
            q_out: at(op.q_out.as_mut_ptr()),
            weights_out: at(op.weights_out.as_mut_ptr()),
            q_row: n(q_row),
            q_head: n(q_head),
            weights_row: n(op.weights.strides()[0]),
            q_out_row: n(q_out_row),
            q_out_head: n(q_out_head),
            weights_out_row: n(op.weights_out.strides()[0]),
            vectors: n(rows * heads),
            heads: small(heads),
            dim: small(dim),
            q_type,
            hadamard: op.hadamard.into(),
            pow2_scale: op.pow2_scale.into(),
            norm: norm(dim),
            scale: op.scale,
            reserved: 0,
        };
        let grid = ((rows * heads).div_ceil(WARPS), 1);
        // SAFETY: the kernel's struct; checked tensors on this device.
        unsafe { self.launch(&self.index_q_quantize, grid, THREADS, 0, stream, params) }
    }

    /// Scores, all of them.
    pub fn indexer_logits(&self, op: &IndexerLogits<'_>, stream: Stream) -> Result<()> {
        let ix = &op.indexer;
        self.device(ix.device)?;
        if let Some(copies) = self.checked(stream)? {
            check::columns(op, copies.keys(ix)?)?;
        }
        if let Some(decode) = &self.decode
            && decode.logits(&self.gpu, op, stream)?
        {
            return Ok(());
        }
        if let Some(sm90) = &self.indexer_sm90
            && sm90.logits(&self.gpu, op, stream)?
        {
            return Ok(());
        }
        let (out, out_type, [out_row, _]) = floats_mut(&op.out);
        let params = params::Logits {
            ix: params::Indexer::of(ix),
            out,
            out_row: n(out_row),
            columns: n(op.columns()),
            out_type: out_type.into(),
        };
        // Tiles side by side until the device is full.
        let tiles = op.columns().div_ceil(PAGE);
        let slices = (8 * self.gpu.sms).div_ceil(ix.rows.max(1)).min(tiles).min(65535);
        // SAFETY: the kernel's struct; checked tensors on this device; lengths and pages are bounded on the device.
        unsafe {
            let grid = (ix.rows, slices);
            self.launch(&self.logits, grid, SCORE_THREADS, score_shared(ix.dim), stream, params)
        }
    }

    /// Blocks of a fused select: they fill the device, and each has a list of its own.
    fn select_blocks(&self) -> usize {
        4 * self.gpu.sms
    }

    /// Bytes of workspace that [`Cuda::select`] needs.
    pub fn select_workspace(&self, op: &Select<'_>) -> usize {
        with_slack(self.select_scratch(op))
    }

    fn select_scratch(&self, op: &Select<'_>) -> usize {
        let mut a = Addresses::measure();
        lay_lists(&mut a, self.select_blocks(), capacity(op.topk));
        let sm90 = self.indexer_sm90.as_ref().map_or(0, |x| x.scratch(&self.gpu, op));
        let decode = self.decode.as_ref().map_or(0, |_| decode::scratch(op));
        a.used().max(sm90).max(decode)
    }

    /// Scores and selects.
    pub fn select(&self, op: &Select<'_>, ws: Workspace<'_>, stream: Stream) -> Result<()> {
        let (ix, k) = (&op.indexer, op.topk);
        self.device(ix.device)?;
        if let Some(copies) = self.checked(stream)? {
            copies.keys(ix)?;
        }
        let base = ws.on(ix.device, self.select_scratch(op))?;
        if let Some(decode) = &self.decode
            && decode.select(&self.gpu, op, base, stream)?
        {
            return Ok(());
        }
        if let Some(sm90) = &self.indexer_sm90 {
            if let Some(dense) = sm90.dense(&self.gpu, op, base, stream)? {
                return self.topk_dense(op, &dense, stream);
            }
            if sm90.select(&self.gpu, op, base, stream)? {
                return Ok(());
            }
        }
        let (blocks, capacity) = (self.select_blocks(), capacity(k));
        let lists = lay_lists(&mut Addresses::over(base), blocks, capacity);
        // A range much shorter than 2k keeps most of its positions, and merging costs more than it saves. With
        // several ranges each has a list, so there are at most as many tasks as blocks.
        let useful = ix.map.max_len() / (2 * k).max(8 * PAGE);
        let ranges = (blocks / ix.rows.max(1)).min(useful).max(1);
        let params = params::Select {
            ix: params::Indexer::of(ix),
            out: at(op.indices.as_mut_ptr()),
            ranks: lists.ranks,
            positions: lists.positions,
            counts: lists.counts,
            out_row: n(op.indices.strides()[0]),
            ranges: n(ranges),
            k: small(k),
            capacity: small(capacity),
        };
        let grid = ((ix.rows * ranges).min(blocks), 1);
        // SAFETY: the kernels' struct; checked tensors and workspace on this device; lengths and pages are bounded
        // on the device.
        unsafe {
            let shared = score_shared(ix.dim);
            self.launch(&self.select_rows, grid, SCORE_THREADS, shared, stream, params)?;
            if ranges > 1 {
                self.launch(&self.select_merge, (ix.rows, 1), TOPK_THREADS, 0, stream, params)?;
            }
        }
        Ok(())
    }

    /// Top-k of scores in scratch.
    fn topk_dense(&self, op: &Select<'_>, dense: &Dense, stream: Stream) -> Result<()> {
        let params = params::TopK {
            logits: dense.scores,
            row_start: 0,
            row_end: dense.lengths,
            out: at(op.indices.as_mut_ptr()),
            logits_row: n(dense.columns),
            out_row: n(op.indices.strides()[0]),
            columns: n(dense.columns),
            k: small(op.topk),
            type_: 0,
        };
        // SAFETY: scores and lengths of all rows, checked indices.
        unsafe { self.launch_topk(op.indexer.rows, params, stream) }
    }

    /// Top-k of given scores.
    pub fn topk(&self, op: &TopK<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        if let Some(copies) = self.checked(stream)? {
            copies.bounds(op)?;
        }
        let (logits, type_, [logits_row, _]) = floats(&op.logits);
        let [rows, columns] = op.logits.shape();
        let params = params::TopK {
            logits,
            row_start: per_row(op.row_start),
            row_end: per_row(op.row_end),
            out: at(op.indices.as_mut_ptr()),
            logits_row: n(logits_row),
            out_row: n(op.indices.strides()[0]),
            columns: n(columns),
            k: small(op.indices.shape()[1]),
            type_,
        };
        // SAFETY: checked tensors on this device; bounds are clamped on the device.
        unsafe { self.launch_topk(rows, params, stream) }
    }

    /// # Safety
    /// What `params` points to must be good for so many rows.
    unsafe fn launch_topk(&self, rows: usize, params: params::TopK, stream: Stream) -> Result<()> {
        let (kernel, blocks, shared) = match &self.topk_sm90 {
            Some(sm90) => {
                let (kernel, blocks) = sm90.choose(rows, &params);
                (kernel, blocks, TOPK_SHARED)
            }
            None => (&self.topk, 1, 0),
        };
        // SAFETY: the kernels' struct; the rest by this function's contract.
        unsafe { self.launch(kernel, (blocks * rows, 1), TOPK_THREADS, shared, stream, params) }
    }

    /// Logical indices to slots.
    pub fn indices_to_slots(&self, op: &IndicesToSlots<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        if let Some(copies) = self.checked(stream)? {
            copies.translation(op)?;
        }
        let [rows, k] = op.indices.shape();
        let params = params::IndicesToSlots {
            indices: at(op.indices.as_ptr()),
            slots: at(op.slots.as_mut_ptr()),
            map: params::KeyMap::of(&op.map),
            indices_row: n(op.indices.strides()[0]),
            slots_row: n(op.slots.strides()[0]),
            k: n(k),
        };
        // SAFETY: the kernel's struct; checked tensors on this device; indices are bounded on the device.
        unsafe { self.launch(&self.indices_to_slots, (rows, 1), THREADS, 0, stream, params) }
    }

    /// Index rows to other memory.
    pub fn copy_rows(
        &self,
        from: &View<'_, i32, 2>,
        to: &ViewMut<'_, i32, 2>,
        stream: Stream,
    ) -> Result<()> {
        let [rows, k] = from.shape();
        let params = params::CopyRows {
            from: at(from.as_ptr()),
            to: at(to.as_mut_ptr()),
            from_row: n(from.strides()[0]),
            to_row: n(to.strides()[0]),
            k: n(k),
        };
        // SAFETY: the kernel's struct; two tensors of one shape, which the cache found on this device.
        unsafe { self.launch(&self.copy_rows, (rows, 1), THREADS, 0, stream, params) }
    }

    /// Row `i` takes old row `from[i]`, in place.
    pub fn carry_rows(
        &self,
        data: &ViewMut<'_, i32, 2>,
        from: &View<'_, i32, 1>,
        old_rows: usize,
        stream: Stream,
    ) -> Result<()> {
        if let Some(copies) = self.checked(stream)? {
            copies.row_map(from, old_rows)?;
        }
        let k = data.shape()[1];
        let params = params::CarryRows {
            data: at(data.as_mut_ptr()),
            from: at(from.as_ptr()),
            row: n(data.strides()[0]),
            rows: n(from.shape()[0]),
            old_rows: n(old_rows),
            k: n(k),
        };
        let grid = (k.div_ceil(THREADS as usize), 1);
        // SAFETY: the kernel's struct; `data` has `old_rows` rows and those of `from`, on this device.
        unsafe { self.launch(&self.carry_rows, grid, THREADS, 0, stream, params) }
    }

    /// How much of one selection another covers.
    pub fn overlap(&self, op: &Overlap<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        let [rows, own_k] = op.own.shape();
        let params = params::Overlap {
            own: at(op.own.as_ptr()),
            reused: at(op.reused.as_ptr()),
            out: at(op.out.as_mut_ptr()),
            own_row: n(op.own.strides()[0]),
            reused_row: n(op.reused.strides()[0]),
            own_k: n(own_k),
            reused_k: n(op.reused.shape()[1]),
        };
        // SAFETY: the kernel's struct; checked tensors on this device.
        unsafe { self.launch(&self.overlap, (rows, 1), THREADS, 0, stream, params) }
    }

    /// Writes KV rows to their pages.
    pub fn kv_write(&self, op: &KvWrite<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        let slot_limit = op.page_shape[0].saturating_mul(op.page_shape[1]);
        if let Some(copies) = self.checked(stream)? {
            copies.slots(&op.slots, slot_limit)?;
        }
        let (kv, kv_type, [kv_row, _]) = floats(&op.kv);
        let (slots, wide_slots) = slots(&op.slots);
        let (pages, format, page_bytes, row_bytes) = match op.pages {
            KvPages::F32(v) => kv_layout(v.as_mut_ptr().cast_const(), KV_F32, v.strides()),
            KvPages::Bf16(v) => kv_layout(v.as_mut_ptr().cast_const(), KV_BF16, v.strides()),
            KvPages::Fp8(v) => kv_layout(v.as_mut_ptr().cast_const(), KV_FP8, v.strides()),
        };
        let params = params::KvWrite {
            kv,
            slots,
            pages,
            kv_row: n(kv_row),
            page_bytes,
            row_bytes,
            page: n(op.page_shape[1]),
            slot_limit: n(slot_limit),
            tokens: n(op.tokens),
            kv_type,
            wide_slots,
            format,
            d_qk: small(op.d_qk),
        };
        let grid = (op.tokens.div_ceil(WRITE_TOKENS), 1);
        // SAFETY: the kernel's struct; checked tensors on this device; slots are bounded on the device.
        unsafe { self.launch(&self.kv_write, grid, THREADS, 0, stream, params) }
    }

    /// Bytes of workspace that [`Cuda::sparse_attention`] needs for these shapes or smaller ones.
    pub fn sparse_attention_workspace(&self, op: &SparseAttention<'_>) -> usize {
        self.attention_sm90.as_ref().map_or(0, |a| a.workspace(op))
    }

    /// Sparse MLA attention.
    pub fn sparse_attention(
        &self,
        op: &SparseAttention<'_>,
        ws: Workspace<'_>,
        stream: Stream,
    ) -> Result<()> {
        self.device(op.device)?;
        if let Some(copies) = self.checked(stream)? {
            copies.attention(op)?;
        }
        let (q, q_type, [q_row, q_head, _]) = floats(&op.q);
        let (out, out_type, [out_row, out_head, _]) = floats_mut(&op.out);
        let (kv, kv_format, page_bytes, row_bytes) = match op.kv {
            Kv::F32(v) => kv_layout(v.as_ptr(), KV_F32, v.strides()),
            Kv::Bf16(v) => kv_layout(v.as_ptr(), KV_BF16, v.strides()),
            Kv::Fp8(v) => kv_layout(v.as_ptr(), KV_FP8, v.strides()),
        };
        let by_slot = params::KeyMap::slots(op.page_shape[0].saturating_mul(op.page_shape[1]));
        let params = params::Attention {
            q,
            kv,
            indices: at(op.indices.as_ptr()),
            row_topk: per_row(op.row_topk),
            sink: per_row(op.sink),
            out,
            lse: op.lse.map_or(0, |v| at(v.as_mut_ptr())),
            map: op.map.as_ref().map_or(by_slot, params::KeyMap::of),
            q_row: n(q_row),
            q_head: n(q_head),
            indices_row: n(op.indices.strides()[0]),
            out_row: n(out_row),
            out_head: n(out_head),
            lse_row: op.lse.map_or(0, |v| n(v.strides()[0])),
            page_bytes,
            row_bytes,
            page: n(op.page_shape[1].max(1)),
            softmax_scale: op.softmax_scale,
            heads: small(op.heads),
            d_qk: small(op.d_qk),
            d_v: small(op.d_v),
            topk: small(op.topk),
            mapped: op.map.is_some().into(),
            q_type,
            kv_format,
            out_type,
            reserved: 0,
        };
        let shared = attention_shared(op.d_qk);
        let done = match &self.attention_sm90 {
            Some(fast) => fast.attend(op, params, ws, stream)?,
            None => false,
        };
        if !done {
            let grid = (op.rows, op.heads.div_ceil(ATTENTION_HEADS));
            // SAFETY: the kernel's struct; checked tensors on this device; indices are bounded on the device.
            unsafe { self.launch(&self.attention, grid, THREADS, shared, stream, params)? };
        }
        let Some(probs) = op.probs else { return Ok(()) };
        let params = params::AttentionProbs {
            a: params,
            probs: at(probs.as_mut_ptr()),
            probs_row: n(probs.strides()[0]),
        };
        if let Some(fast) = &self.probs_sm90
            && fast.weigh(&self.gpu, op, params, stream)?
        {
            return Ok(());
        }
        // SAFETY: as above; `lse` is there, and written by what runs before.
        unsafe { self.launch(&self.attention_probs, (op.rows, 1), THREADS, shared, stream, params) }
    }
}
