//! The CUDA backend against the CPU backend: the same bits where both promise them, the same numbers elsewhere.
//!
//! Without a GPU each test says so and passes. INDEXCACHE_GPU_SMALL=1 leaves out what takes long under a sanitizer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::data::{Rng, m, padded, t};
use common::distill::{self, Case, Out, Values};
use cudarc::driver::{result, sys};
use half::bf16;
use indexcache::cache::{Cache, CacheShape};
use indexcache::context::{BackendChoice, Context, Stream};
use indexcache::error::{Error, Status};
use indexcache::fp8;
use indexcache::layout::Workspace;
use indexcache::ops::*;
use indexcache::plan::{Indexers, Model, Pattern, Plan, Spelling};
use indexcache::tensor::{DType, Device, Element, F8E4M3, Tensor};
use std::cell::RefCell;
use std::io::Write;
use std::sync::Arc;

fn small() -> bool {
    std::env::var_os("INDEXCACHE_GPU_SMALL").is_some()
}

/// Both backends, and device memory that lives as long as this.
struct Gpu {
    cpu: Context,
    gpu: Arc<Context>,
    memory: RefCell<Vec<u64>>,
}

impl Gpu {
    fn open(test: &str) -> Option<Self> {
        let gpu = match Context::new(BackendChoice::Cuda(0), 0, || ()) {
            Ok(c) => Arc::new(c),
            Err(e) => {
                // Past the test harness, which would swallow it.
                let _ = writeln!(std::io::stderr(), "{test}: SKIPPED, no GPU run: {}", e.message);
                return None;
            }
        };
        // SAFETY: the device is there; the primary context stays retained until the process ends.
        unsafe {
            let device = result::device::get(0).unwrap();
            let context = result::primary_ctx::retain(device).unwrap();
            result::ctx::set_current(context).unwrap();
        }
        let cpu = Context::new(BackendChoice::Cpu, 0, || ()).unwrap();
        Some(Gpu { cpu, gpu, memory: RefCell::default() })
    }

    fn bytes(&self, n: usize) -> u64 {
        // SAFETY: a context is current; freed in `drop`.
        let p = unsafe { result::malloc_sync(n.max(1)) }.unwrap();
        self.memory.borrow_mut().push(p);
        p
    }

    fn extent(t: &Tensor<'_>) -> usize {
        if t.shape().contains(&0) {
            return 0;
        }
        let last: usize = t.shape().iter().zip(t.strides()).map(|(&n, &s)| (n - 1) * s).sum();
        (last + 1) * t.dtype().size()
    }

    /// A copy on the device with the same extents.
    fn up(&self, t: &Tensor<'_>) -> Tensor<'static> {
        let n = Self::extent(t);
        let p = self.bytes(n);
        // SAFETY: the tensor's own bytes, to memory of that size, which lives as long as `self`.
        unsafe {
            if n > 0 {
                result::memcpy_htod_sync(p, std::slice::from_raw_parts(t.as_ptr(), n)).unwrap();
            }
            let p = std::ptr::without_provenance_mut(p as usize);
            Tensor::from_raw_parts(t.name(), p, Device::Cuda(0), t.dtype(), t.shape(), t.strides())
                .unwrap()
        }
    }

    fn up_maybe(&self, t: &Option<Tensor<'_>>) -> Option<Tensor<'static>> {
        t.as_ref().map(|t| self.up(t))
    }

    fn up_map(&self, m: &KeyMapArgs<'_>) -> KeyMapArgs<'static> {
        KeyMapArgs {
            block_table: self.up_maybe(&m.block_table),
            row_request: self.up_maybe(&m.row_request),
            row_start: self.up_maybe(&m.row_start),
            row_end: self.up_maybe(&m.row_end),
        }
    }

    fn up_indexer(&self, a: &IndexerArgs<'_>) -> IndexerArgs<'static> {
        IndexerArgs {
            q: self.up(&a.q),
            weights: self.up(&a.weights),
            k: self.up(&a.k),
            k_scale: self.up_maybe(&a.k_scale),
            map: self.up_map(&a.map),
        }
    }

    fn sync(&self) {
        result::ctx::synchronize().unwrap();
    }

    /// The bytes of a device tensor, when all work is done.
    fn down(&self, t: &Tensor<'_>) -> Vec<u8> {
        self.sync();
        let mut out = vec![0u8; Self::extent(t)];
        if !out.is_empty() {
            // SAFETY: that many bytes are there.
            unsafe { result::memcpy_dtoh_sync(&mut out, t.as_ptr().addr() as u64) }.unwrap();
        }
        out
    }

    fn up_attention(&self, a: &SparseAttentionArgs<'_>) -> SparseAttentionArgs<'static> {
        SparseAttentionArgs {
            q: self.up(&a.q),
            kv: self.up(&a.kv),
            indices: self.up(&a.indices),
            form: a.form,
            map: self.up_map(&a.map),
            row_topk: self.up_maybe(&a.row_topk),
            sink: self.up_maybe(&a.sink),
            softmax_scale: a.softmax_scale,
            out: self.up(&a.out),
            lse: self.up_maybe(&a.lse),
            probs: self.up_maybe(&a.probs),
        }
    }

    /// Replaces a device tensor's elements.
    fn set<T: Element>(&self, t: &Tensor<'_>, data: &[T]) {
        self.sync();
        // SAFETY: dense tensors of that many elements.
        unsafe { result::memcpy_htod_sync(t.as_ptr().addr() as u64, data) }.unwrap();
    }

    fn workspace(&self, n: usize) -> Workspace<'static> {
        let p = std::ptr::without_provenance_mut(self.bytes(n) as usize);
        // SAFETY: memory of that size, which lives as long as `self`.
        unsafe { Workspace::from_raw_parts(Device::Cuda(0), p, n) }
    }

    fn attend(&self, op: &SparseAttention<'_>) {
        let ws = self.workspace(self.gpu.sparse_attention_workspace(op));
        self.gpu.sparse_attention(op, ws, Stream::DEFAULT).unwrap();
    }

    fn select(&self, a: IndexerArgs<'_>, out: Tensor<'_>, stream: Stream) {
        let op = a.check_select(out).unwrap();
        let ws = self.workspace(self.gpu.select_workspace(&op));
        self.gpu.select(&op, ws, stream).unwrap();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        for p in self.memory.take() {
            // SAFETY: allocated by `bytes`.
            unsafe { result::free_sync(p) }.unwrap();
        }
    }
}

fn raw_stream(s: sys::CUstream) -> Stream {
    // SAFETY: the tests destroy a stream when its work is done.
    unsafe { Stream::from_raw(s.cast()) }
}

fn raw<T: Copy>(x: &[T]) -> &[u8] {
    // SAFETY: plain numbers without padding.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F8,
    Bf16,
    PagedF8,
    PagedBf16,
}
const KINDS: [Kind; 4] = [Kind::F8, Kind::Bf16, Kind::PagedF8, Kind::PagedBf16];
const PAD: usize = 32;
const REQUESTS: usize = 3;

/// An indexer call: rows of three requests, some padding, pages in any order, padded strides.
#[derive(Clone)]
struct Index {
    kind: Kind,
    rows: usize,
    heads: usize,
    dim: usize,
    pages: usize,
    q8: Vec<F8E4M3>,
    q16: Vec<bf16>,
    w: Vec<f32>,
    k8: Vec<F8E4M3>,
    k16: Vec<bf16>,
    scale: Vec<f32>,
    planar: Vec<u8>,
    table: Vec<i32>,
    row_request: Vec<i32>,
    row_start: Vec<i32>,
    row_end: Vec<i32>,
    requests: usize,
    /// Rows go to requests evenly, without `row_request`.
    even: bool,
}

impl Index {
    /// `levels`: so many values in q and k (few tie in bulk); 0 for a normal distribution.
    fn new(
        rng: &mut Rng,
        kind: Kind,
        lens: &[usize],
        heads: usize,
        dim: usize,
        levels: usize,
    ) -> Self {
        let rows = lens.len();
        let paged = matches!(kind, Kind::PagedF8 | Kind::PagedBf16);
        let f8 = matches!(kind, Kind::F8 | Kind::PagedF8);
        let per = lens.iter().max().unwrap().div_ceil(PAGE).max(1);
        let (mut row_request, mut row_start, mut row_end) = (vec![], vec![], vec![]);
        for (r, &len) in lens.iter().enumerate() {
            let request = r % REQUESTS;
            row_request.push(if len == 0 && r % 2 == 1 { -1 } else { request as i32 });
            row_start.push(if paged { 0 } else { 7 * request as i32 });
            row_end.push(row_start[r] + len as i32);
        }
        let pages = REQUESTS * per + 2;
        let keys = per * PAGE + 7 * REQUESTS;
        // A table of values drawn once: long rows would spend their time in the generator.
        let pool: Vec<f32> = (0..4096)
            .map(|_| match levels {
                0 => rng.normal(),
                n => rng.below(n) as f32 - (n / 2) as f32,
            })
            .collect();
        let value = |rng: &mut Rng| pool[rng.below(4096)];
        let scale = |rng: &mut Rng| if levels > 0 { 0.5 } else { rng.normal().abs() + 0.1 };
        let n = |yes: bool, n: usize| if yes { n } else { 0 };
        let mut planar = vec![0u8; n(kind == Kind::PagedF8, pages * (PAGE * (dim + 4) + PAD))];
        for page in planar.chunks_mut(PAGE * (dim + 4) + PAD) {
            let (values, rest) = page.split_at_mut(PAGE * dim);
            values.iter_mut().for_each(|b| *b = fp8::encode(value(rng)));
            for s in rest[..4 * PAGE].chunks_mut(4) {
                s.copy_from_slice(&scale(rng).to_le_bytes());
            }
        }
        let rows16 = if paged { pages * (PAGE * dim + PAD) } else { keys * (dim + PAD) };
        let mut code = |n: usize| (0..n).map(|_| F8E4M3(fp8::encode(value(rng)))).collect();
        let (q8, k8) = (
            code(n(f8, rows * (heads * dim + PAD))),
            code(n(kind == Kind::F8, keys * (dim + PAD))),
        );
        let mut half = |n: usize| (0..n).map(|_| bf16::from_f32(value(rng))).collect();
        let (q16, k16) = (half(n(!f8, rows * (heads * dim + PAD))), half(n(!f8, rows16)));
        Index {
            kind,
            rows,
            heads,
            dim,
            pages,
            q8,
            q16,
            w: (0..rows * heads).map(|_| if levels > 0 { 0.25 } else { rng.normal() }).collect(),
            k8,
            k16,
            scale: (0..keys).map(|_| scale(rng)).collect(),
            planar,
            table: rng.shuffled(pages)[..REQUESTS * per].to_vec(),
            row_request,
            row_start,
            row_end,
            requests: REQUESTS,
            even: false,
        }
    }

    /// Decode: fp8 pages of 128 dimensions, rows split evenly over requests, block tables of `per` pages.
    fn decode(
        rng: &mut Rng,
        requests: usize,
        lens: &[usize],
        heads: usize,
        levels: usize,
        per: usize,
    ) -> Self {
        let mut ix = Index::new(rng, Kind::PagedF8, lens, heads, 128, levels);
        ix.table = (0..requests * per).map(|_| rng.below(ix.pages) as i32).collect();
        (ix.requests, ix.even) = (requests, true);
        ix
    }

    fn args(&self) -> IndexerArgs<'_> {
        let (rows, heads, dim, keys) = (self.rows, self.heads, self.dim, self.scale.len());
        let paged = matches!(self.kind, Kind::PagedF8 | Kind::PagedBf16);
        let per = self.table.len() / self.requests;
        IndexerArgs {
            q: match self.kind {
                Kind::F8 | Kind::PagedF8 => padded("q", &self.q8, &[rows, heads, dim], PAD),
                _ => padded("q", &self.q16, &[rows, heads, dim], PAD),
            },
            weights: t("weights", &self.w, &[rows, heads]),
            k: match self.kind {
                Kind::F8 => padded("k", &self.k8, &[keys, dim], PAD),
                Kind::Bf16 => padded("k", &self.k16, &[keys, dim], PAD),
                Kind::PagedF8 => padded("k", &self.planar, &[self.pages, PAGE, 1, dim + 4], PAD),
                Kind::PagedBf16 => padded("k", &self.k16, &[self.pages, PAGE, dim], PAD),
            },
            k_scale: (self.kind == Kind::F8).then(|| t("k_scale", &self.scale, &[keys])),
            map: KeyMapArgs {
                block_table: paged.then(|| t("block_table", &self.table, &[self.requests, per])),
                row_request: (paged && !self.even)
                    .then(|| t("row_request", &self.row_request, &[rows])),
                row_start: (!paged).then(|| t("row_start", &self.row_start, &[rows])),
                row_end: Some(t("row_end", &self.row_end, &[rows])),
            },
        }
    }

    /// Rows of a request one after the other, as in a prefill chunk.
    fn grouped(mut self) -> Self {
        for r in 0..self.rows {
            let request = (r * REQUESTS / self.rows) as i32;
            let paged = self.row_start[r] == 0 && matches!(self.kind, Kind::PagedF8);
            let len = self.row_end[r] - self.row_start[r];
            self.row_request[r] = request;
            self.row_start[r] = if paged { 0 } else { 7 * request };
            self.row_end[r] = self.row_start[r] + len;
        }
        self
    }

    /// Kernels on tensor cores may round scores otherwise than the CPU.
    fn own_scores(&self) -> bool {
        self.dim == 128 && matches!(self.kind, Kind::F8 | Kind::PagedF8)
    }

    /// Scores by the device, up to the longest row's end; what `args` describe is there already.
    fn scored(&self, g: &Gpu, args: IndexerArgs<'_>) -> (Vec<f32>, usize) {
        let longest = match self.kind {
            Kind::F8 | Kind::Bf16 => self.scale.len(),
            _ => self.table.len() / self.requests * PAGE,
        };
        let mut logits = vec![7f32; self.rows * longest];
        let dev = g.up(&m("logits", &mut logits, &[self.rows, longest]));
        g.gpu.indexer_logits(&args.check_logits(dev).unwrap(), Stream::DEFAULT).unwrap();
        (floats(&g.down(&dev)), longest)
    }

    /// The exact selection: by the CPU's scores or, where the device's may differ from them, by those.
    fn selected(&self, g: &Gpu, args: IndexerArgs<'_>, k: usize) -> Vec<i32> {
        if !self.own_scores() {
            return self.select_on_cpu(g, k);
        }
        let (logits, columns) = self.scored(g, args);
        let ends: Vec<i32> = (0..self.rows)
            .map(|r| {
                let paged = self.kind == Kind::PagedF8;
                let padding = paged && !self.even && self.row_request[r] < 0;
                // What the CPU would refuse, a device treats as the nearest length.
                let len = (self.row_end[r] - self.row_start[r]).clamp(0, columns as i32);
                if padding { 0 } else { len }
            })
            .collect();
        let mut best = vec![-9i32; self.rows * k];
        let topk = TopKArgs {
            logits: t("logits", &logits, &[self.rows, columns]),
            row_start: None,
            row_end: Some(t("row_end", &ends, &[self.rows])),
            indices: m("indices", &mut best, &[self.rows, k]),
        };
        g.cpu.topk(&topk.check().unwrap(), Stream::DEFAULT).unwrap();
        best
    }

    fn select_on_cpu(&self, g: &Gpu, k: usize) -> Vec<i32> {
        let mut out = vec![-7; self.rows * k];
        let op = self.args().check_select(m("indices", &mut out, &[self.rows, k])).unwrap();
        let mut ws = vec![0u8; g.cpu.select_workspace(&op)];
        g.cpu.select(&op, Workspace::from(&mut ws[..]), Stream::DEFAULT).unwrap();
        out
    }
}

#[test]
fn of_many_tokens_for_a_slot_the_last_stays() {
    let Some(g) = Gpu::open("last stays") else { return };
    let mut rng = Rng(12);
    let (tokens, pages, page, width) = (6001, 40, 64, 3);
    let kv = rng.normals(tokens * width);
    // Twice as many tokens as slots; far apart, near, and in one block.
    let slots: Vec<i32> = (0..tokens)
        .map(|i| if i % 7 == 3 { (i / 40) as i32 } else { rng.below(pages * page) as i32 })
        .collect();
    let (kv, slots) = (t("kv", &kv, &[tokens, width]), t("slots", &slots, &[tokens]));
    let mut out = vec![-1f32; pages * page * width];
    let start = m("pages", &mut out, &[pages, page, width]);
    let dev = g.up(&start);
    let args = KvWriteArgs { kv, slots, pages: start };
    g.cpu.kv_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
    let args = KvWriteArgs { kv: g.up(&kv), slots: g.up(&slots), pages: dev };
    g.gpu.kv_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
    assert!(g.down(&dev) == raw(&out));
}

#[test]
fn writes_have_the_same_bits() {
    let Some(g) = Gpu::open("writes") else { return };
    let mut rng = Rng(11);
    let (tokens, pages) = (77, 3);
    // Some slots twice, some tokens skipped.
    let wide: Vec<i64> =
        (0..tokens).map(|i| if i % 9 == 4 { -1 } else { rng.below(pages * PAGE) as i64 }).collect();
    let narrow: Vec<i32> = wide.iter().map(|&s| s as i32).collect();
    let slots = [t("slots", &wide, &[tokens]), t("slots", &narrow, &[tokens])];
    for (i, dim) in [16, 48, 64, 128, 256].into_iter().enumerate() {
        for flags in 0..4 {
            let (hadamard, pow2_scale) = (flags & 1 == 1 && dim != 48, flags & 2 == 2);
            let mut k = rng.normals(tokens * dim);
            k[..dim].fill(0.0);
            k[dim] = f32::INFINITY;
            if hadamard {
                k[dim] = 1e30; // Infinity minus infinity is a NaN whose sign is the machine's.
            }
            let k16: Vec<bf16> = k.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut out = vec![0x5au8; pages * PAGE * (dim + 4)];
            let start = m("pages", &mut out, &[pages, PAGE, dim + 4]);
            let on_gpu = g.up(&start);
            for k in [t("k", &k, &[tokens, dim]), t("k", &k16, &[tokens, dim])] {
                let slots = slots[i % 2];
                let args = IndexKWriteArgs { k, slots, pages: start, hadamard, pow2_scale };
                g.cpu.index_k_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
                let args =
                    IndexKWriteArgs { k: g.up(&k), slots: g.up(&slots), pages: on_gpu, ..args };
                g.gpu.index_k_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
                let got = g.down(&on_gpu);
                // SAFETY: `start` describes `out`, which nobody else uses.
                let want = unsafe { std::slice::from_raw_parts(start.as_ptr(), got.len()) };
                assert!(got == want, "index k, dim {dim}, hadamard {hadamard}, pow2 {pow2_scale}");
            }
            let (rows, heads) = (5, 7);
            let (q, w) = (rng.halves(rows * (heads * dim + PAD)), rng.normals(rows * heads));
            let (mut codes, mut weights) = (vec![F8E4M3(1); rows * heads * dim], w.clone());
            let args = IndexQQuantizeArgs {
                q: padded("q", &q, &[rows, heads, dim], PAD),
                weights: t("weights", &w, &[rows, heads]),
                scale: 0.37,
                hadamard,
                pow2_scale,
                q_out: m("q_out", &mut codes, &[rows, heads, dim]),
                weights_out: m("weights_out", &mut weights, &[rows, heads]),
            };
            g.cpu.index_q_quantize(&args.check().unwrap(), Stream::DEFAULT).unwrap();
            let dev = IndexQQuantizeArgs {
                q: g.up(&args.q),
                weights: g.up(&args.weights),
                q_out: g.up(&args.q_out),
                weights_out: g.up(&args.weights_out),
                ..args
            };
            g.gpu.index_q_quantize(&dev.check().unwrap(), Stream::DEFAULT).unwrap();
            assert!(g.down(&dev.q_out) == raw(&codes), "q codes, dim {dim}, {hadamard}");
            assert!(g.down(&dev.weights_out) == raw(&weights), "weights, dim {dim}, {hadamard}");
        }
    }
    let (pages, page) = (5, 64);
    for width in [576, 37] {
        let kv = rng.normals(tokens * width);
        let kv16 = rng.halves(tokens * width);
        for kv in [t("kv", &kv, &[tokens, width]), t("kv", &kv16, &[tokens, width])] {
            let mut f = vec![0f32; pages * page * width];
            let mut h = vec![bf16::ONE; pages * page * width];
            let mut b = vec![9u8; pages * page * 656];
            let mut outs = vec![
                m("pages", &mut f, &[pages, page, width]),
                m("pages", &mut h, &[pages, page, 1, width]),
            ];
            if width == 576 {
                outs.push(m("pages", &mut b, &[pages, page, 656]));
            }
            for out in outs {
                let dev = g.up(&out);
                let args = KvWriteArgs { kv, slots: slots[0], pages: out };
                g.cpu.kv_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
                let args = KvWriteArgs { kv: g.up(&kv), slots: g.up(&slots[0]), pages: dev };
                g.gpu.kv_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
                let got = g.down(&dev);
                // SAFETY: `out` describes a vector that nobody else uses.
                let want = unsafe { std::slice::from_raw_parts(out.as_ptr(), got.len()) };
                assert!(got == want, "kv {} of {width} from {}", out.dtype(), kv.dtype());
            }
        }
    }
}

/// KV rows of every bf16 there is, of f32 of every exponent, and of what lies between two codes and at the edges of scales.
#[test]
fn kv_rows_of_special_values_have_the_same_bits() {
    let Some(g) = Gpu::open("special KV rows") else { return };
    let mut rng = Rng(15);
    let width = 576;
    let every: Vec<bf16> =
        (0..114 * width).map(|i| bf16::from_bits((i % (1 << 16)) as u16)).collect();
    let mut mixed = every.clone(); // Neighbours of one magnitude, and of all.
    for i in (1..mixed.len()).rev() {
        mixed.swap(i, rng.below(i + 1));
    }
    let signs = [0, 1 << 31];
    let mantissas = [0, 1, 0x3f_ffff, 0x40_0000, 0x40_0001, 0x7f_ffff];
    let mut wide: Vec<f32> = vec![];
    for exponent in 0..256u32 {
        for bits in mantissas {
            wide.extend(signs.map(|sign| f32::from_bits(sign | exponent << 23 | bits)));
        }
    }
    let some: Vec<f32> = (0..40 * width).map(|_| wide[rng.below(wide.len())]).collect();
    wide.resize(6 * width, 0.0);
    wide.extend(some);
    // Groups of 128 with a largest value at, or next to, what makes the scale 2^k; else halves between codes, or nearly.
    let next = |x: f32, by: i32| f32::from_bits(x.to_bits().wrapping_add_signed(by));
    let halves: Vec<f32> = (0..0x7e).map(|c| (fp8::decode(c) + fp8::decode(c + 1)) / 2.0).collect();
    for _ in 0..60 {
        for at in 0..width {
            let k = rng.below(44) as i32 - 20;
            let scale = f32::from_bits(((127 + k) << 23) as u32);
            let x = if at % 128 == 0 { 448.0 } else { halves[rng.below(halves.len())] };
            let x = next(x * scale, rng.below(3) as i32 - 1);
            wide.push(if rng.below(2) == 0 { x } else { -x });
        }
    }
    for kv in [t("kv", &every, &[114, width]), t("kv", &mixed, &[114, width])]
        .into_iter()
        .chain([t("kv", &wide, &[wide.len() / width, width])])
    {
        let (tokens, pages, page) = (kv.shape()[0], 9, 16);
        let slots = &rng.shuffled(pages * page)[..tokens];
        let (mut f, mut h) = (vec![0f32; 83_000], vec![bf16::ZERO; 83_000]);
        let mut b = vec![9u8; pages * (page * 656 + 5)];
        let strides = [page * 656 + 5, 656, 1]; // No page but the first is aligned to more than a byte.
        // SAFETY: all of `b`, which nobody else uses.
        let loose = unsafe {
            let shape = [pages, page, 656];
            Tensor::from_raw_parts(
                "pages",
                b.as_mut_ptr(),
                Device::Cpu,
                DType::U8,
                &shape,
                &strides,
            )
        };
        let loose = loose.unwrap();
        for out in [
            loose,
            m("pages", &mut f[..pages * page * width], &[pages, page, width]),
            m("pages", &mut h[..pages * page * width], &[pages, page, width]),
        ] {
            let slots = t("slots", slots, &[tokens]);
            let dev = g.up(&out);
            let args = KvWriteArgs { kv, slots, pages: out };
            g.cpu.kv_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
            let args = KvWriteArgs { kv: g.up(&kv), slots: g.up(&slots), pages: dev };
            g.gpu.kv_write(&args.check().unwrap(), Stream::DEFAULT).unwrap();
            let got = g.down(&dev);
            // SAFETY: `out` describes a vector that nobody else uses.
            let want = unsafe { std::slice::from_raw_parts(out.as_ptr(), got.len()) };
            let wrong = got.iter().zip(want).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{} from {}: first differing byte", out.dtype(), kv.dtype());
        }
    }
}

/// Tensor cores cut fp8 products to some 13 bits below the largest: 2e-3 of the norm is more than they lose.
fn near(got: &[f32], want: &[f32], name: &str) {
    let (mut off, mut norm) = (0.0, 0.0);
    for (&x, &y) in got.iter().zip(want) {
        assert!((x == f32::NEG_INFINITY) == (y == f32::NEG_INFINITY), "{name}: {x} for {y}");
        if x != f32::NEG_INFINITY {
            off += f64::from(x - y) * f64::from(x - y);
            norm += f64::from(y) * f64::from(y);
        }
    }
    assert!(off <= 4e-6 * norm, "{name}: off by {off} of {norm}");
}

#[test]
fn logits_have_the_same_bits() {
    let Some(g) = Gpu::open("logits") else { return };
    let mut rng = Rng(1);
    let lens = [0, 1, 63, 64, 65, 0, 200, 333, 130, 5, 320];
    let columns = 340;
    for kind in KINDS {
        for (heads, dim) in
            [(1, 128), (8, 128), (32, 128), (64, 128), (3, 16), (5, 48), (128, 16), (2, 256)]
        {
            if small() && heads * dim > 1024 {
                continue;
            }
            let ix = Index::new(&mut rng, kind, &lens, heads, dim, 0);
            let args = g.up_indexer(&ix.args());
            let mut full = vec![7f32; lens.len() * columns];
            let mut half = vec![bf16::ONE; lens.len() * columns];
            for out in [
                m("logits", &mut full, &[lens.len(), columns]),
                m("logits", &mut half, &[lens.len(), columns]),
            ] {
                let dev = g.up(&out);
                g.cpu
                    .indexer_logits(&ix.args().check_logits(out).unwrap(), Stream::DEFAULT)
                    .unwrap();
                g.gpu.indexer_logits(&args.check_logits(dev).unwrap(), Stream::DEFAULT).unwrap();
                let got = g.down(&dev);
                // SAFETY: `out` describes a vector that nobody else uses.
                let want = unsafe { std::slice::from_raw_parts(out.as_ptr(), got.len()) };
                if !ix.own_scores() {
                    assert!(got == want, "{kind:?} {heads}x{dim} {}", out.dtype());
                } else {
                    let values = |bytes: &[u8]| match out.dtype() {
                        indexcache::tensor::DType::F32 => floats(bytes),
                        _ => bytes
                            .chunks_exact(2)
                            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                            .collect(),
                    };
                    near(
                        &values(&got),
                        &values(want),
                        &format!("{kind:?} {heads} {}", out.dtype()),
                    );
                }
            }
        }
    }
}

/// Inputs on which public kernels return wrong or moving sets, and random ones.
fn scores(rng: &mut Rng, n: usize) -> Vec<(&'static str, Vec<f32>)> {
    let base = rng.normals(n);
    let map = |f: &dyn Fn(f32) -> f32| base.iter().map(|&x| f(x)).collect::<Vec<f32>>();
    vec![
        ("random", base.clone()),
        ("narrow", map(&|x| 1.0 + (x.abs() * 0.05) % 0.2)),
        ("64 levels", map(&|x| (x * 16.0).floor())),
        ("mostly zero", map(&|x| if x > 2.2 { x } else { 0.0 })),
        ("zeros of both signs", map(&|x| if x > 0.0 { 0.0 } else { -0.0 })),
        ("all equal", map(&|_| 3.5)),
        ("large", map(&|x| x * 1e5)),
        ("denormal", map(&|x| x * 1e-40)),
        ("negative", map(&|x| -x.abs() - 1.0)),
        ("rising", (0..n).map(|i| i as f32).collect()),
        (
            "NaN and infinity",
            map(&|x| match x {
                x if x > 1.5 => f32::NAN,
                x if x < -1.5 => f32::NEG_INFINITY,
                x => x,
            }),
        ),
    ]
}

#[test]
fn topk_is_exact() {
    let Some(g) = Gpu::open("topk") else { return };
    let mut rng = Rng(2);
    let check = |rows: usize, columns: usize, k: usize, data: &[f32], name: &str| {
        let half: Vec<bf16> = data.iter().map(|&x| bf16::from_f32(x)).collect();
        let start: Vec<i32> = (0..rows).map(|r| (r * 13 % 50).min(columns) as i32).collect();
        let end: Vec<i32> =
            (0..rows).map(|r| (columns - (r * 31) % (columns / 2 + 1)) as i32).collect();
        for (logits, bounded) in [
            (t("logits", data, &[rows, columns]), false),
            (t("logits", data, &[rows, columns]), true),
            (t("logits", &half, &[rows, columns]), true),
        ] {
            let mut out = vec![-9i32; rows * k];
            let args = TopKArgs {
                logits,
                row_start: bounded.then(|| t("row_start", &start, &[rows])),
                row_end: bounded.then(|| t("row_end", &end, &[rows])),
                indices: m("indices", &mut out, &[rows, k]),
            };
            let dev = TopKArgs {
                logits: g.up(&logits),
                row_start: g.up_maybe(&args.row_start),
                row_end: g.up_maybe(&args.row_end),
                indices: g.up(&args.indices),
            };
            g.cpu.topk(&args.check().unwrap(), Stream::DEFAULT).unwrap();
            g.gpu.topk(&dev.check().unwrap(), Stream::DEFAULT).unwrap();
            let got = g.down(&dev.indices);
            assert!(got == raw(&out), "{name}: {rows} x {columns}, k {k}, {}", logits.dtype());
        }
    };
    for k in [1, 7, 512, 2048, 4096] {
        if small() && k > 512 {
            continue;
        }
        for columns in [0, 1, k - 1, k, k + 1, 2 * k + 77, if small() { 2001 } else { 40_001 }] {
            for (name, data) in scores(&mut rng, 3 * columns) {
                check(3, columns, k, &data, name);
            }
        }
    }
    // Rows that a block takes and rows that 2 to 16 share, held in registers or not, on any address.
    let shared: &[_] = if small() {
        &[(5, 4_096), (133, 8_201), (3, 30_001), (1, 140_001)]
    } else {
        &[
            (5, 8_000),
            (9, 8_192),
            (150, 9_001),
            (60, 20_001),
            (30, 30_001),
            (30, 40_001),
            (16, 131_077),
            (7, 70_001),
            (1, 140_001),
        ]
    };
    for &(rows, columns) in shared {
        for (name, data) in scores(&mut rng, rows * columns) {
            for k in [2048, 4096] {
                check(rows, columns, k, &data, name);
            }
        }
    }
    if !small() {
        for (name, data) in scores(&mut rng, 1_000_000) {
            check(1, 1_000_000, 2048, &data, name);
            check(2, 500_000, 4096, &data, name);
        }
    }
}

#[test]
fn topk_has_the_same_bits_on_streams_and_in_graphs() {
    let Some(g) = Gpu::open("topk streams") else { return };
    let mut rng = Rng(10);
    let (rows, k) = (5, 512);
    for columns in [7_003, 50_001] {
        let data: Vec<f32> =
            rng.normals(rows * columns).iter().map(|x| (x * 8.0).floor()).collect();
        let mut row_end = vec![columns as i32; rows];
        let mut want = vec![-7i32; rows * k];
        let blank = want.clone();
        let mut on_cpu = |row_end: &[i32]| {
            let args = TopKArgs {
                logits: t("logits", &data, &[rows, columns]),
                row_start: None,
                row_end: Some(t("row_end", row_end, &[rows])),
                indices: m("indices", &mut want, &[rows, k]),
            };
            g.cpu.topk(&args.check().unwrap(), Stream::DEFAULT).unwrap();
            want.clone()
        };
        let args = TopKArgs {
            logits: g.up(&t("logits", &data, &[rows, columns])),
            row_start: None,
            row_end: Some(g.up(&t("row_end", &row_end, &[rows]))),
            indices: g.up(&t("indices", &blank, &[rows, k])),
        };
        let streams = [(); 2]
            .map(|()| result::stream::create(result::stream::StreamKind::NonBlocking).unwrap());
        let expected = on_cpu(&row_end);
        let outs: Vec<_> = (0..20)
            .map(|run| {
                let indices = g.up(&t("indices", &blank, &[rows, k]));
                let args = TopKArgs { indices, ..args };
                g.gpu.topk(&args.check().unwrap(), raw_stream(streams[run % 2])).unwrap();
                indices
            })
            .collect();
        assert!(outs.iter().all(|out| g.down(out) == raw(&expected)), "{columns}");
        let op = args.check().unwrap();
        let graph = Graph::capture(|stream| g.gpu.topk(&op, stream).unwrap());
        for lens in [[7_003, 513, 0, 1, 512], [600, 7_000, 6_999, 100, 7_003], [-1; 5]] {
            row_end = lens.map(|n| if n > 5_000 { n - 7_003 + columns as i32 } else { n }).to_vec();
            g.set(&args.row_end.unwrap(), &row_end);
            graph.replay();
            assert!(g.down(&args.indices) == raw(&on_cpu(&row_end)), "{columns}, {row_end:?}");
        }
        for stream in streams {
            // SAFETY: created above, idle.
            unsafe { result::stream::destroy(stream) }.unwrap();
        }
    }
}

#[test]
fn select_is_exact() {
    let Some(g) = Gpu::open("select") else { return };
    let mut rng = Rng(3);
    let mut check = |kind, lens: &[usize], heads, dim, levels, k: usize| {
        let ix = Index::new(&mut rng, kind, lens, heads, dim, levels);
        let all = if ix.own_scores() { vec![false, true] } else { vec![false] };
        for grouped in all {
            let ix = if grouped { ix.clone().grouped() } else { ix.clone() };
            let mut out = vec![-7i32; lens.len() * k];
            let dev = g.up(&m("indices", &mut out, &[lens.len(), k]));
            let args = g.up_indexer(&ix.args());
            g.select(args, dev, Stream::DEFAULT);
            let want = ix.selected(&g, args, k);
            assert!(
                g.down(&dev) == raw(&want),
                "{kind:?} {lens:?} {heads}x{dim} levels {levels} k {k} grouped {grouped}"
            );
        }
    };
    let k = 96;
    let long = if small() { 1100 } else { 4100 };
    let lens = [long, 0, 1, k - 1, k, k + 1, 2999.min(long), 0, 777];
    for kind in KINDS {
        for heads in [1, 8, 32, 64] {
            if small() && heads > 8 {
                continue;
            }
            for levels in [0, 3] {
                check(kind, &lens, heads, 128, levels, k);
                check(kind, &[long - 1], heads, 128, levels, k); // Ranges, merged.
            }
        }
    }
    for k in [1, 512, 2048, 4096] {
        if !small() || k < 2048 {
            check(Kind::PagedF8, &[2 * long + 801, k - 1, k, k + 1], 4, 64, 3, k);
        }
    }
    let many: Vec<usize> = (0..700).map(|i| 40 + 5 * i % if small() { 100 } else { 900 }).collect(); // More rows than lists.
    check(Kind::PagedF8, &many, 4, 64, 0, k);
    if !small() {
        let long = [200_000, 199_999, 2048, 131_072];
        for (heads, levels) in [(1, 0), (8, 2), (32, 0), (64, 0)] {
            check(Kind::PagedF8, &long, heads, 128, levels, 2048);
        }
        check(Kind::F8, &[200_003, 150_001], 32, 128, 0, 2048);
    }
    // Longer than what is scored as a whole: filtered by a sample. Few values tie in bulk, one value always.
    let (long, k) = if small() { (8_300, 40) } else { (21_000, 512) };
    let lens = [long, long - 1, 0, k - 1, k, k + 1, 8_193, 3 * k, long - 7, long, 0, 1_500, 9_001];
    for kind in [Kind::F8, Kind::PagedF8] {
        for heads in [4, 32, 48, 64] {
            for levels in [0, 3, 1] {
                if !small() || heads % 32 == 0 {
                    check(kind, &lens, heads, 128, levels, k);
                }
            }
        }
    }
    if !small() {
        check(Kind::PagedF8, &[30_000, 29_999, 4097, 4096, 4095], 64, 128, 0, 4096);
        check(Kind::PagedF8, &[30_000, 9_999, 2], 32, 128, 0, 1);
    }
}

/// Kernels for decode may round scores otherwise than the CPU: they select exactly by their own, which are near.
#[test]
fn decode_is_exact_by_its_own_scores() {
    let Some(g) = Gpu::open("decode") else { return };
    let mut rng = Rng(21);
    let mut check = |requests, lens: &[usize], heads, levels, per, k| {
        let ix = Index::decode(&mut rng, requests, lens, heads, levels, per);
        let args = g.up_indexer(&ix.args());
        let ((logits, _), want) = (ix.scored(&g, args), ix.selected(&g, args, k));
        let mut blank = vec![-7i32; ix.rows * k];
        let dev = g.up(&m("indices", &mut blank, &[ix.rows, k]));
        g.select(args, dev, Stream::DEFAULT);
        let name = format!("{requests} requests, {lens:?}, heads {heads}, levels {levels}, k {k}");
        assert!(g.down(&dev) == raw(&want), "{name}");

        let columns = per * PAGE;
        let mut near = vec![7f32; ix.rows * columns];
        let out = m("logits", &mut near, &[ix.rows, columns]);
        g.cpu.indexer_logits(&ix.args().check_logits(out).unwrap(), Stream::DEFAULT).unwrap();
        for (row, &len) in lens.iter().enumerate() {
            let (a, b) = (&logits[row * columns..][..columns], &near[row * columns..][..columns]);
            let square = |x: f32| f64::from(x) * f64::from(x);
            let norm: f64 = b[..len].iter().map(|&x| square(x)).sum();
            let off: f64 = a[..len].iter().zip(b).map(|(&x, &y)| square(x - y)).sum();
            // A norm over a few positions may be all cancellation.
            assert!(
                len < PAGE || off <= 2.5e-7 * norm,
                "{name}: row {row} is off by {off} of {norm}"
            );
            assert!(a[len..].iter().all(|&x| x == f32::NEG_INFINITY), "{name}: row {row}");
        }
    };
    let long = if small() { 1_100 } else { 40_000 };
    for heads in [4, 16, 24, 32, 64] {
        for levels in [0, 3] {
            let lens = [long, 0, 1, 95, 96, 97, long - 1, 777, 64];
            check(9, &lens, heads, levels, long.div_ceil(PAGE) + 2, 96);
            check(3, &lens, heads, levels, long.div_ceil(PAGE), 96);
            // A few rows.
            check(2, &[long, 0, 777, long - 1], heads, levels, long.div_ceil(PAGE) + 1, 96);
            check(1, &lens[3..4], heads, levels, 3, 96);
        }
        if small() {
            return;
        }
    }
    for (requests, queries) in [(2, 1), (1, 2), (2, 5), (3, 8)] {
        let lens: Vec<usize> =
            (0..requests * queries).map(|i| 2_040 + 3 * i + i % 3 * 9_000).collect();
        check(requests, &lens, 64, 0, 500, 2048);
    }
    check(1, &[200_001], 64, 0, 3_200, 2048);
    // One value, few values: more candidates than a block's list takes.
    for levels in [1, 2] {
        check(3, &[70_001, 50_000, 2_049], 32, levels, 1_100, 2048);
    }
    check(1, &[150_000], 4, 1, 4_096, 700);
    for n in [2_049, 8_193, 16_500] {
        check(1, &[n], 64, 0, 260, 2048);
    }
    check(2, &[131_072, 70_000], 32, 4, 2_048, 4096);
    // More requests than a launch takes; more scores than scratch holds, by the width of the table.
    let lens: Vec<usize> = (0..700).map(|i| i * 37 % 900).collect();
    check(700, &lens, 8, 0, 15, 64);
    let lens: Vec<usize> = (0..20).map(|i| i * 2_711 % 5_000).collect();
    check(20, &lens, 4, 0, 31_250, 64);
}

#[test]
fn decode_does_not_depend_on_other_rows() {
    let Some(g) = Gpu::open("decode, rows apart") else { return };
    let mut rng = Rng(22);
    let (k, per, queries) = (64, 40, 2);
    let lens = [2_500, 2_499, 64, 70, 1_300, 1_301];
    let mut ix = Index::decode(&mut rng, 3, &lens, 32, 0, per);
    // Pages that are not there, and lengths past the table's end and below zero.
    ix.table[3] = -1;
    ix.table[per + 1] = ix.pages as i32;
    ix.row_end[1] = 1 << 30;
    ix.row_end[4] = -5;
    let args = g.up_indexer(&ix.args());
    let mut blank = vec![-7i32; ix.rows * k];
    let out = g.up(&m("indices", &mut blank, &[ix.rows, k]));
    let ((logits, _), want) = (ix.scored(&g, args), ix.selected(&g, args, k));
    for _ in 0..20 {
        g.select(args, out, Stream::DEFAULT);
        assert!(g.down(&out) == raw(&want));
    }
    for request in 0..3 {
        let rows = request * queries..(request + 1) * queries;
        let mut one = Index::decode(&mut rng, 1, &lens[rows.clone()], 32, 0, per);
        let each = ix.q8.len() / ix.rows;
        one.q8 = ix.q8[rows.start * each..rows.end * each].to_vec();
        one.w = ix.w[rows.start * 32..rows.end * 32].to_vec();
        one.planar.clone_from(&ix.planar);
        one.pages = ix.pages;
        one.table = ix.table[request * per..][..per].to_vec();
        one.row_end = ix.row_end[rows.clone()].to_vec();
        let (alone, _) = one.scored(&g, g.up_indexer(&one.args()));
        let columns = per * PAGE;
        assert!(raw(&alone) == raw(&logits[rows.start * columns..rows.end * columns]), "{request}");
    }
}

/// Rows of any requests, in any order, some padding: as if the table had been written out for each row.
#[test]
fn decode_of_mapped_rows_has_the_same_bits() {
    let Some(g) = Gpu::open("decode, mapped rows") else { return };
    let mut rng = Rng(24);
    let mut check = |rows: usize, requests: usize, heads, per: usize, k| {
        let lens: Vec<usize> = (0..rows).map(|_| rng.below(per * PAGE + 1)).collect();
        let mut ix = Index::decode(&mut rng, requests, &lens, heads, 0, per);
        ix.even = false;
        // Runs of 1 to 11 rows of a request, of padding, of no request.
        ix.row_request.clear();
        while ix.row_request.len() < rows {
            let request = match rng.below(6) {
                0 => -1,
                1 => requests as i32,
                _ => rng.below(requests) as i32,
            };
            let n = 1 + rng.below(11.min(rows - ix.row_request.len()));
            ix.row_request.extend(std::iter::repeat_n(request, n));
        }
        let mut plain = ix.clone();
        (plain.even, plain.requests) = (true, rows);
        plain.table.clear();
        for (row, &request) in ix.row_request.iter().enumerate() {
            let request = usize::try_from(request).ok().filter(|&r| r < requests);
            if request.is_none() {
                plain.row_end[row] = 0;
            }
            plain.table.extend(&ix.table[request.unwrap_or(0) * per..][..per]);
        }
        let run = |ix: &Index| {
            let args = g.up_indexer(&ix.args());
            let mut blank = vec![-7i32; rows * k];
            let out = g.up(&m("indices", &mut blank, &[rows, k]));
            g.select(args, out, Stream::DEFAULT);
            (g.down(&out), raw(&ix.scored(&g, args).0).to_vec())
        };
        let name = format!("{rows} rows of {requests} requests, {heads} heads");
        let ((got, got_scores), (want, want_scores)) = (run(&ix), run(&plain));
        assert!(got_scores == want_scores, "{name}: scores");
        assert!(got == want, "{name}: indices");
    };
    check(23, 7, 64, 40, 96);
    if small() {
        return;
    }
    for heads in [4, 16, 32, 64] {
        for (rows, requests) in [(1, 1), (2, 1), (3, 40), (70, 9)] {
            check(rows, requests, heads, 200, 512);
        }
    }
    check(1, 1, 64, 2048, 2048);
    check(1300, 200, 32, 12, 64); // More rows than a launch takes.
}

#[test]
fn a_captured_decode_serves_other_lengths_and_tables() {
    let Some(g) = Gpu::open("decode, capture") else { return };
    let mut rng = Rng(23);
    let (k, per) = (64, 50);
    let mut ix = Index::decode(&mut rng, 5, &[3000, 60, 65, 2000, 0], 64, 0, per);
    for mapped in [false, true] {
        ix.even = !mapped;
        let args = g.up_indexer(&ix.args());
        let mut blank = vec![-7i32; ix.rows * k];
        let out = g.up(&m("indices", &mut blank, &[ix.rows, k]));
        let op = args.check_select(out).unwrap();
        let ws = || g.workspace(g.gpu.select_workspace(&op));
        let (first, second) = (ws(), ws());
        let graph = Graph::capture(|stream| {
            // Another kind of node in front, and a select right behind a select.
            let (address, n) = (out.as_ptr().addr() as u64, 4 * ix.rows * k);
            // SAFETY: the indices' own memory.
            unsafe { result::memset_d8_async(address, 0x77, n, stream.as_raw().cast()) }.unwrap();
            g.gpu.select(&op, first, stream).unwrap();
            g.gpu.select(&op, second, stream).unwrap();
        });
        for lens in [[3000, 60, 65, 2000, 0], [64, 3001, 0, 1, 2900], [0, 0, 0, 0, 0], [2999; 5]] {
            ix.row_end = lens.to_vec();
            ix.table = (0..5 * per).map(|_| rng.below(ix.pages) as i32).collect();
            g.set(&args.map.row_end.unwrap(), &ix.row_end);
            g.set(&args.map.block_table.unwrap(), &ix.table);
            if let Some(row_request) = args.map.row_request {
                ix.row_request = (0..5).map(|_| rng.below(6) as i32 - 1).collect();
                g.set(&row_request, &ix.row_request);
            }
            graph.replay();
            let want = ix.selected(&g, args, k);
            assert!(g.down(&out) == raw(&want), "mapped {mapped} {lens:?}");
        }
    }
}

#[test]
fn twenty_runs_on_two_streams_have_the_same_bits() {
    let Some(g) = Gpu::open("determinism") else { return };
    let mut rng = Rng(4);
    let k = 512;
    let long = if small() { 2_000 } else { 20_000 };
    let lens = [long, long - 10, 0, 513, long / 3];
    let heads = if small() { 2 } else { 32 };
    let ix = Index::new(&mut rng, Kind::PagedF8, &lens, heads, 128, 2); // Ties in bulk.
    let args = g.up_indexer(&ix.args());
    let want = ix.selected(&g, args, k);
    let streams =
        [(); 2].map(|()| result::stream::create(result::stream::StreamKind::NonBlocking).unwrap());
    let mut blank = vec![-7i32; lens.len() * k];
    let blank = m("indices", &mut blank, &[lens.len(), k]);
    let outs: Vec<_> = (0..20)
        .map(|run| {
            let out = g.up(&blank);
            g.select(args, out, raw_stream(streams[run % 2]));
            out
        })
        .collect();
    assert!(outs.iter().all(|out| g.down(out) == raw(&want)));
    for s in streams {
        // SAFETY: created above, idle.
        unsafe { result::stream::destroy(s) }.unwrap();
    }
}

/// What was launched on a stream, to be launched again.
struct Graph {
    stream: sys::CUstream,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    fn capture(work: impl FnOnce(Stream)) -> Self {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut exec = std::ptr::null_mut();
        // SAFETY: a stream of ours, from begin to end on this thread; then a whole graph.
        unsafe {
            result::stream::begin_capture(stream, mode).unwrap();
            work(raw_stream(stream));
            let graph = result::stream::end_capture(stream).unwrap();
            sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0).result().unwrap();
            Graph { stream, graph, exec }
        }
    }

    /// Everything that the work used must be alive.
    fn replay(&self) {
        // SAFETY: as said.
        unsafe { result::graph::launch(self.exec, self.stream) }.unwrap();
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours; what runs is waited for.
        unsafe {
            result::stream::synchronize(self.stream).unwrap();
            result::graph::exec_destroy(self.exec).unwrap();
            result::graph::destroy(self.graph).unwrap();
            result::stream::destroy(self.stream).unwrap();
        }
    }
}

#[test]
fn a_captured_step_serves_other_lengths_and_tables() {
    let Some(g) = Gpu::open("capture") else { return };
    let mut rng = Rng(5);
    let k = 64;
    let mut ix = Index::new(&mut rng, Kind::PagedF8, &[3000, 60, 65, 2000, 0], 8, 128, 0);
    let args = g.up_indexer(&ix.args());
    let mut blank = vec![-7i32; ix.rows * k];
    let out = g.up(&m("indices", &mut blank, &[ix.rows, k]));
    let slots = g.up(&m("slots", &mut blank, &[ix.rows, k]));
    let op = args.check_select(out).unwrap();
    let ws = g.workspace(g.gpu.select_workspace(&op));
    let map = KeyMapArgs { row_end: None, ..args.map };
    let translate =
        IndicesToSlotsArgs { indices: out, map, page_size: PAGE, slots }.check().unwrap();
    let graph = Graph::capture(|stream| {
        g.gpu.select(&op, ws, stream).unwrap();
        g.gpu.indices_to_slots(&translate, stream).unwrap();
    });
    for lens in [[3000, 60, 65, 2000, 0], [64, 3001, 0, 1, 2900], [0, 0, 0, 0, 0], [2999; 5]] {
        ix.row_end = lens.to_vec();
        ix.table = rng.shuffled(ix.pages)[..ix.table.len()].to_vec();
        ix.row_request.rotate_left(1);
        g.set(&args.map.row_end.unwrap(), &ix.row_end);
        g.set(&args.map.block_table.unwrap(), &ix.table);
        g.set(&args.map.row_request.unwrap(), &ix.row_request);
        graph.replay();
        let want = ix.selected(&g, args, k);
        assert!(g.down(&out) == raw(&want), "{lens:?}");
        let mut host = vec![-7i32; ix.rows * k];
        let a = ix.args();
        let map = KeyMapArgs { row_end: None, ..a.map };
        let indices = t("indices", &want, &[ix.rows, k]);
        let op = IndicesToSlotsArgs {
            indices,
            map,
            page_size: PAGE,
            slots: m("slots", &mut host, &[ix.rows, k]),
        };
        g.cpu.indices_to_slots(&op.check().unwrap(), Stream::DEFAULT).unwrap();
        assert!(g.down(&slots) == raw(&host), "slots {lens:?}");
    }
}

/// Numbers that no host would write: nothing is out of reach of a kernel that trusts them.
#[test]
fn garbage_in_index_arrays_reaches_no_address() {
    let Some(g) = Gpu::open("garbage") else { return };
    let mut rng = Rng(6);
    let (rows, k) = (9, 32);
    let wild = |rng: &mut Rng, n: usize| -> Vec<i32> {
        (0..n)
            .map(|i| match i % 5 {
                0 => i32::MAX,
                1 => i32::MIN,
                2 => -1,
                _ => rng.bits() as i32 >> rng.below(31),
            })
            .collect()
    };
    for kind in KINDS {
        let mut ix = Index::new(&mut rng, kind, &[500; 9], 3, 32, 0);
        ix.table = wild(&mut rng, ix.table.len());
        ix.row_end = wild(&mut rng, rows);
        ix.row_request = wild(&mut rng, rows);
        ix.row_request[3] = 1;
        ix.row_start = wild(&mut rng, rows);
        ix.row_start[3] = 0;
        ix.row_end[3] = i32::MAX;
        let args = g.up_indexer(&ix.args());
        let mut indices = vec![5i32; rows * k];
        let mut logits = vec![0f32; rows * 100];
        let out = g.up(&m("indices", &mut indices, &[rows, k]));
        g.select(args, out, Stream::DEFAULT);
        for row in g.down(&out).chunks_exact(4 * k) {
            let row: Vec<i32> =
                row.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
            let live = row.iter().take_while(|&&i| i >= 0).count();
            assert!(row[..live].is_sorted() && row[live..].iter().all(|&i| i == -1));
        }
        let logits = g.up(&m("logits", &mut logits, &[rows, 100]));
        g.gpu.indexer_logits(&args.check_logits(logits).unwrap(), Stream::DEFAULT).unwrap();
        g.sync();
    }
    let slots = wild(&mut rng, 40);
    let k_rows = rng.normals(40 * 64);
    let mut pages = vec![0u8; 2 * 64 * 68];
    let op = IndexKWriteArgs {
        k: g.up(&t("k", &k_rows, &[40, 64])),
        slots: g.up(&t("slots", &slots, &[40])),
        pages: g.up(&m("pages", &mut pages, &[2, 64 * 68])),
        hadamard: true,
        pow2_scale: true,
    };
    g.gpu.index_k_write(&op.check().unwrap(), Stream::DEFAULT).unwrap();
    g.sync();
    let (topk, table) = (wild(&mut rng, rows), wild(&mut rng, 6));
    // Shapes for the portable kernel and for those of Hopper.
    for (heads, d_qk, d_v, k) in [(3, 40, 40, 32), (8, 576, 512, 700), (64, 576, 512, 700)] {
        let indices = wild(&mut rng, rows * k);
        let mut out = vec![0f32; rows * heads * d_v];
        let (q, kv) = (rng.normals(rows * heads * d_qk), rng.normals(4 * 8 * d_qk));
        let narrow = |x: &[f32]| -> Vec<bf16> { x.iter().map(|&x| bf16::from_f32(x)).collect() };
        let (q16, kv16) = (narrow(&q), narrow(&kv));
        for form in [IndexForm::Slots, IndexForm::Logical] {
            let block_table =
                (form == IndexForm::Logical).then(|| g.up(&t("block_table", &table, &[3, 2])));
            let op = SparseAttentionArgs {
                q: g.up(&t("q", &q16, &[rows, heads, d_qk])),
                kv: g.up(&t("kv", &kv16, &[4, 8, d_qk])),
                indices: g.up(&t("indices", &indices, &[rows, k])),
                form,
                map: KeyMapArgs { block_table, ..KeyMapArgs::default() },
                row_topk: Some(g.up(&t("row_topk", &topk, &[rows]))),
                sink: None,
                softmax_scale: 0.1,
                out: g.up(&m("out", &mut out, &[rows, heads, d_v])),
                lse: None,
                probs: None,
            };
            let checked = op.check().unwrap();
            g.attend(&checked);
            assert!(floats(&g.down(&op.out)).iter().all(|x| x.is_finite()), "{form:?}");
        }
    }
}

/// Checked mode answers as the CPU does, before anything is written; without it a call goes through.
#[test]
fn checked_mode_refuses_what_the_cpu_refuses() {
    let Some(g) = Gpu::open("checked mode") else { return };
    let checked = Context::new(BackendChoice::Cuda(0), 0, || ()).unwrap().checked();
    let on_host = |result: Result<(), Error>| result.map_err(|e| (e.status, e.message));
    let same = |cpu, gpu, name: &str| {
        let (cpu, gpu) = (on_host(cpu), on_host(gpu));
        assert_eq!(cpu, gpu, "{name}");
        gpu.is_ok()
    };
    let (q, kv) = (vec![1f32; 2 * 4], vec![1f32; 3 * 8 * 4]);
    // Rows of three entries in a table of four columns: a copy has to honour the stride.
    let table = [2, 0, 7, -9, 1, 1, 1, -9];
    use IndexForm::{Logical, Slots};
    let mut passed = 0;
    for (indices, form, request, row_topk) in [
        ([0, 15, -1, 23], Slots, [0, 0], [2, 2]),
        ([0, 15, 1, 99], Logical, [0, 0], [2, 1]),
        ([0, 1, 16, 23], Logical, [0, 1], [2, 2]),
        ([0, 24, 0, 0], Slots, [0, 0], [2, 2]),
        ([0, 1, -2, 0], Slots, [0, 0], [2, 2]),
        ([0, 24, 0, 0], Logical, [0, 0], [2, 2]),
        ([0, 16, 0, 0], Logical, [0, 0], [2, 2]),
        ([0, 0, 0, 0], Logical, [0, 2], [2, 2]),
        ([0, 0, 0, 0], Slots, [0, 0], [2, 3]),
    ] {
        let (mut out, name) = (vec![9f32; 8], format!("{indices:?} {form:?} {request:?}"));
        let logical = form == Logical;
        let args = SparseAttentionArgs {
            q: t("q", &q, &[2, 1, 4]),
            kv: t("kv", &kv, &[3, 8, 4]),
            indices: t("indices", &indices, &[2, 2]),
            form,
            map: KeyMapArgs {
                block_table: logical.then(|| padded("block_table", &table, &[2, 3], 1)),
                row_request: logical.then(|| t("row_request", &request, &[2])),
                ..KeyMapArgs::default()
            },
            row_topk: Some(t("row_topk", &row_topk, &[2])),
            sink: None,
            softmax_scale: 1.0,
            out: m("out", &mut out, &[2, 1, 4]),
            lse: None,
            probs: None,
        };
        let dev = g.up_attention(&args);
        let (op, on_gpu) = (args.check().unwrap(), dev.check().unwrap());
        let mut ws = vec![0u8; g.cpu.sparse_attention_workspace(&op)];
        let cpu = g.cpu.sparse_attention(&op, Workspace::from(&mut ws[..]), Stream::DEFAULT);
        let ws = g.workspace(checked.sparse_attention_workspace(&on_gpu));
        let gpu = checked.sparse_attention(&on_gpu, ws, Stream::DEFAULT);
        let ok = same(cpu, gpu, &name);
        passed += usize::from(ok);
        let got = floats(&g.down(&dev.out));
        assert!(got.iter().all(|&x| x == if ok { 1.0 } else { 9.0 }), "{name}: {got:?}");
        g.attend(&on_gpu); // An index out of range is as good as none.
        assert!(floats(&g.down(&dev.out)).iter().all(|&x| x == 0.0 || x == 1.0), "{name}");
    }
    assert_eq!(passed, 3);

    let mut pages = vec![0f32; 24 * 4];
    for slots in [[23i64, -1], [24, 0], [0, -2]] {
        let args = KvWriteArgs {
            kv: t("kv", &q, &[2, 4]),
            slots: t("slots", &slots, &[2]),
            pages: m("pages", &mut pages, &[3, 8, 4]),
        };
        let dev =
            KvWriteArgs { kv: g.up(&args.kv), slots: g.up(&args.slots), pages: g.up(&args.pages) };
        let cpu = g.cpu.kv_write(&args.check().unwrap(), Stream::DEFAULT);
        same(cpu, checked.kv_write(&dev.check().unwrap(), Stream::DEFAULT), "kv_write");
    }
    let (logits, mut taken) = (vec![1f32; 8], [0i32; 2]);
    for end in [[4, 3], [4, 5]] {
        let args = TopKArgs {
            logits: t("logits", &logits, &[2, 4]),
            row_start: None,
            row_end: Some(t("row_end", &end, &[2])),
            indices: m("indices", &mut taken, &[2, 1]),
        };
        let dev = TopKArgs {
            logits: g.up(&args.logits),
            row_end: g.up_maybe(&args.row_end),
            indices: g.up(&args.indices),
            ..args
        };
        let cpu = g.cpu.topk(&args.check().unwrap(), Stream::DEFAULT);
        same(cpu, checked.topk(&dev.check().unwrap(), Stream::DEFAULT), "topk");
    }
    let mut rng = Rng(14);
    for kind in KINDS {
        for wrong in [false, true] {
            let mut ix = Index::new(&mut rng, kind, &[100; 4], 2, 32, 0);
            if wrong {
                ix.row_end[2] = 1 << 20;
            }
            let mut indices = vec![0i32; 4 * 16];
            let on_host = ix.args().check_select(m("indices", &mut indices, &[4, 16])).unwrap();
            let on_gpu = g.up_indexer(&ix.args());
            let on_gpu = on_gpu.check_select(g.up(&m("indices", &mut [0i32; 64], &[4, 16])));
            let on_gpu = on_gpu.unwrap();
            let mut ws = vec![0u8; g.cpu.select_workspace(&on_host)];
            let cpu = g.cpu.select(&on_host, Workspace::from(&mut ws[..]), Stream::DEFAULT);
            let ws = g.workspace(checked.select_workspace(&on_gpu));
            let gpu = checked.select(&on_gpu, ws, Stream::DEFAULT);
            assert_ne!(same(cpu, gpu, &format!("select of {kind:?}")), wrong);
        }
    }

    // A stream that captures cannot be waited for; the capture goes on.
    let (slots, out) = ([0i64, 1], g.up(&m("pages", &mut pages, &[3, 8, 4])));
    let args = KvWriteArgs {
        kv: g.up(&t("kv", &q, &[2, 4])),
        slots: g.up(&t("slots", &slots, &[2])),
        pages: out,
    };
    let op = args.check().unwrap();
    let graph = Graph::capture(|stream| {
        let e = checked.kv_write(&op, stream).unwrap_err();
        assert!(e.status == Status::Unsupported && e.message.contains("IDXC_CHECKED"), "{e}");
        g.gpu.kv_write(&op, stream).unwrap();
    });
    graph.replay();
    drop(graph);
    assert_eq!(floats(&g.down(&out))[..8], [1.0; 8]);
}

#[test]
fn attention_agrees() {
    let Some(g) = Gpu::open("attention") else { return };
    let mut rng = Rng(7);
    for (heads, d_qk, d_v, topk) in [
        (1, 576, 512, 100),
        (8, 576, 512, 256),
        (16, 48, 32, 33),
        (20, 576, 512, 700),
        (64, 576, 512, 1700),
        (100, 576, 512, 130),
        (128, 576, 512, 64),
        (128, 576, 512, 1500),
        (5, 1024, 1000, 17),
    ] {
        let (rows, pages, page) = (6, 9, 64);
        for format in 0..3 {
            if format == 2 && d_qk != 576 {
                continue;
            }
            let kv = rng.normals(pages * page * d_qk);
            let kv16: Vec<bf16> = kv.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut kv8 = vec![0u8; pages * page * 656];
            let every: Vec<i32> = (0..(pages * page) as i32).collect();
            if format == 2 {
                let op = KvWriteArgs {
                    kv: t("kv", &kv, &[pages * page, d_qk]),
                    slots: t("slots", &every, &[pages * page]),
                    pages: m("pages", &mut kv8, &[pages, page, 656]),
                };
                g.cpu.kv_write(&op.check().unwrap(), Stream::DEFAULT).unwrap();
            }
            let q = rng.normals(rows * heads * d_qk);
            let q16: Vec<bf16> = q.iter().map(|&x| bf16::from_f32(x)).collect();
            let table = rng.shuffled(pages)[..3 * 3].to_vec();
            let indices: Vec<i32> = (0..rows * topk)
                .map(|i| if i / topk == 2 || i % 7 == 3 { -1 } else { rng.below(3 * page) as i32 })
                .collect();
            let request = [0, 0, 1, 2, -1, 1];
            let row_topk: Vec<i32> = (0..rows).map(|r| (topk - r * topk / 10) as i32).collect();
            let sink = rng.normals(heads);
            for logical in [false, true] {
                let mut out = vec![9f32; rows * heads * d_v];
                let mut lse = vec![9f32; rows * heads];
                let mut probs = vec![9f32; rows * topk];
                let args = SparseAttentionArgs {
                    q: if logical {
                        t("q", &q16, &[rows, heads, d_qk])
                    } else {
                        t("q", &q, &[rows, heads, d_qk])
                    },
                    kv: match format {
                        0 => t("kv", &kv, &[pages, page, d_qk]),
                        1 => t("kv", &kv16, &[pages, page, 1, d_qk]),
                        _ => t("kv", &kv8, &[pages, page, 656]),
                    },
                    indices: t("indices", &indices, &[rows, topk]),
                    form: if logical { IndexForm::Logical } else { IndexForm::Slots },
                    map: KeyMapArgs {
                        block_table: logical.then(|| t("block_table", &table, &[3, 3])),
                        row_request: logical.then(|| t("row_request", &request, &[rows])),
                        ..KeyMapArgs::default()
                    },
                    row_topk: logical.then(|| t("row_topk", &row_topk, &[rows])),
                    sink: logical.then(|| t("sink", &sink, &[heads])),
                    softmax_scale: 1.0 / (d_qk as f32).sqrt(),
                    out: m("out", &mut out, &[rows, heads, d_v]),
                    lse: Some(m("lse", &mut lse, &[rows, heads])),
                    probs: Some(m("probs", &mut probs, &[rows, topk])),
                };
                let op = args.check().unwrap();
                let mut ws = vec![0u8; g.cpu.sparse_attention_workspace(&op)];
                g.cpu.sparse_attention(&op, Workspace::from(&mut ws[..]), Stream::DEFAULT).unwrap();
                let dev = g.up_attention(&args);
                let op = dev.check().unwrap();
                g.attend(&op);
                let (bits, probs_bits) = (g.down(&dev.out), g.down(&dev.probs.unwrap()));
                g.attend(&op);
                assert!(
                    g.down(&dev.out) == bits && g.down(&dev.probs.unwrap()) == probs_bits,
                    "{heads}x{d_qk} format {format}: not the same bits twice"
                );
                let (got, got_lse) = (floats(&bits), floats(&g.down(&dev.lse.unwrap())));
                let got_probs = floats(&g.down(&dev.probs.unwrap()));
                // Tensor cores take probabilities, and widened fp8 rows, as bf16; with few heads fp8 rows as they are.
                let (most, most_lse) = match format {
                    1 if logical && d_qk == 576 => (3e-3, 2e-5),
                    2 if logical && heads <= 32 => (1e-3, 2e-5),
                    2 if logical => (5e-3, 1e-2),
                    _ => (2e-6, 2e-5),
                };
                let norm = out.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let off =
                    got.iter().zip(&out).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
                assert!(
                    off < most * norm,
                    "{heads}x{d_qk} format {format} {logical}: {}",
                    off / norm
                );
                for (a, b) in got_lse.iter().zip(&lse) {
                    assert!(a == b || (a - b).abs() < most_lse, "lse {a} for {b}");
                }
                for (i, (a, b)) in got_probs.iter().zip(&probs).enumerate() {
                    let close = (a - b).abs() < most_lse * b + 1e-7 && (*a == 0.0) == (*b == 0.0);
                    assert!(close, "{heads}x{d_qk} format {format} probability {i}: {a} for {b}");
                }
            }
        }
    }
}

/// Rows of `captured_attention_…` on the host; `numbers`: indices, block table, requests, lengths.
fn fp8_rows<'a>(
    q: &'a [bf16],
    kv: &'a [u8],
    numbers: [&'a [i32]; 4],
    [out, lse, probs]: [&'a mut [f32]; 3],
) -> SparseAttentionArgs<'a> {
    let [indices, table, request, row_topk] = numbers;
    let (rows, topk) = (request.len(), indices.len() / request.len());
    let heads = lse.len() / rows;
    SparseAttentionArgs {
        q: t("q", q, &[rows, heads, 576]),
        kv: t("kv", kv, &[kv.len() / 656 / PAGE, PAGE, 656]),
        indices: t("indices", indices, &[rows, topk]),
        form: IndexForm::Logical,
        map: KeyMapArgs {
            block_table: Some(t("block_table", table, &[3, table.len() / 3])),
            row_request: Some(t("row_request", request, &[rows])),
            ..KeyMapArgs::default()
        },
        row_topk: Some(t("row_topk", row_topk, &[rows])),
        sink: None,
        softmax_scale: 0.05,
        out: m("out", out, &[rows, heads, 512]),
        lse: Some(m("lse", lse, &[rows, heads])),
        probs: Some(m("probs", probs, &[rows, topk])),
    }
}

/// Attention that is split over its indices and combined: the parts are of the captured shapes, not of the lengths.
#[test]
fn captured_attention_serves_other_lengths_and_tables() {
    let Some(g) = Gpu::open("captured attention") else { return };
    let mut rng = Rng(8);
    let (rows, pages, page, topk, d_qk, d_v) = (5, 40, 64, 700, 576, 512);
    let kv = rng.normals(pages * page * d_qk);
    let mut kv8 = vec![0u8; pages * page * 656];
    let every: Vec<i32> = (0..(pages * page) as i32).collect();
    let op = KvWriteArgs {
        kv: t("kv", &kv, &[pages * page, d_qk]),
        slots: t("slots", &every, &[pages * page]),
        pages: m("pages", &mut kv8, &[pages, page, 656]),
    };
    g.cpu.kv_write(&op.check().unwrap(), Stream::DEFAULT).unwrap();
    for heads in [8, 20, 64, 128] {
        let q: Vec<bf16> =
            rng.normals(rows * heads * d_qk).into_iter().map(bf16::from_f32).collect();
        let (mut out, mut lse) = (vec![9f32; rows * heads * d_v], vec![9f32; rows * heads]);
        let mut probs = vec![9f32; rows * topk];
        let mut table = rng.shuffled(pages)[..3 * 12].to_vec();
        let mut request = vec![0, 1, 2, -1, 1];
        let mut row_topk = vec![700, 0, 64, 300, 699];
        let mut indices: Vec<i32> = (0..rows * topk).map(|_| rng.below(12 * page) as i32).collect();
        let numbers = [&indices[..], &table, &request, &row_topk];
        let args = fp8_rows(&q, &kv8, numbers, [&mut out, &mut lse, &mut probs]);
        let dev = g.up_attention(&args);
        let op = dev.check().unwrap();
        let ws = g.workspace(g.gpu.sparse_attention_workspace(&op));
        let graph = Graph::capture(|stream| g.gpu.sparse_attention(&op, ws, stream).unwrap());
        for step in 0..3 {
            g.set(&dev.indices, &indices);
            g.set(&dev.map.block_table.unwrap(), &table);
            g.set(&dev.map.row_request.unwrap(), &request);
            g.set(&dev.row_topk.unwrap(), &row_topk);
            graph.replay();
            let got = floats(&g.down(&dev.out));
            let got_lse = floats(&g.down(&dev.lse.unwrap()));
            let got_probs = floats(&g.down(&dev.probs.unwrap()));
            let numbers = [&indices[..], &table, &request, &row_topk];
            let args = fp8_rows(&q, &kv8, numbers, [&mut out, &mut lse, &mut probs]);
            let op = args.check().unwrap();
            let mut ws = vec![0u8; g.cpu.sparse_attention_workspace(&op)];
            g.cpu.sparse_attention(&op, Workspace::from(&mut ws[..]), Stream::DEFAULT).unwrap();
            for (a, b) in got.iter().zip(&out) {
                assert!((a - b).abs() < 0.03, "{heads} heads, step {step}: {a} for {b}");
            }
            for (a, b) in got_lse.iter().zip(&lse) {
                assert!(
                    a == b || (a - b).abs() < 0.02,
                    "{heads} heads, step {step}: lse {a} for {b}"
                );
            }
            for (a, b) in got_probs.iter().zip(&probs) {
                let close = (a - b).abs() < 0.03 * b + 1e-7 && (*a == 0.0) == (*b == 0.0);
                assert!(close, "{heads} heads, step {step}: probability {a} for {b}");
            }
            indices.iter_mut().for_each(|i| *i = rng.below(12 * page + 1) as i32 - 1);
            table = rng.shuffled(pages)[..3 * 12].to_vec();
            request.rotate_left(1);
            row_topk = vec![1, 700, 700, 65, 0];
        }
    }
}

#[test]
fn the_loop_runs_on_the_device() {
    let Some(g) = Gpu::open("loop") else { return };
    let mut rng = Rng(8);
    let (k, rows) = (16, 4);
    let plan = |topk: u32| {
        let mut model = Model::new(topk);
        model.mtp_layers = 1;
        model.mtp_shares = true;
        let pattern = Pattern::new(&Spelling::Letters("FSFS"), &Indexers::any(4).unwrap()).unwrap();
        Arc::new(Plan::new(pattern, model).unwrap())
    };
    let shape = CacheShape { lanes: 2, max_rows: 6 };
    // SAFETY: no host buffer.
    let mut cache = unsafe { Cache::new(g.gpu.clone(), plan(k as u32), shape, None) }.unwrap();
    cache.step_begin(1, rows, 1).unwrap();
    assert!(g.down(&cache.slot(1).unwrap()).iter().all(|&b| b == 0xff));
    let ix = Index::new(&mut rng, Kind::PagedF8, &[300, 290, 10, 17], 4, 64, 0);
    let args = g.up_indexer(&ix.args());
    let want = ix.select_on_cpu(&g, k);
    let ws = g.workspace(cache.select_workspace(args).unwrap());
    cache.select(1, 0, || Ok(args), ws, Stream::DEFAULT).unwrap();
    cache
        .select(1, 1, || panic!("a Shared layer has no work"), g.workspace(0), Stream::DEFAULT)
        .unwrap();
    assert!(g.down(&cache.indices(1, 1).unwrap().0) == raw(&want));
    let host = t("indices", &want, &[rows, k]);
    assert!(cache.publish(1, 2, Some(host), IndexForm::Logical, 0, Stream::DEFAULT).is_err());
    // Publish, export, carry.
    let given: Vec<i32> = (0..rows * k).map(|i| i as i32).collect();
    let given_dev = g.up(&t("indices", &given, &[rows, k]));
    cache.publish(1, 4, Some(given_dev), IndexForm::Logical, 0, Stream::DEFAULT).unwrap();
    let out = g.up(&host);
    cache.export(1, 4, out, Stream::DEFAULT).unwrap();
    assert!(g.down(&out) == raw(&given));
    let from = g.up(&t("from", &[1, 3, -1, -1, -1], &[5]));
    cache.step_carry(1, from, 2, Stream::DEFAULT).unwrap();
    let mut moved = vec![-1i32; 5 * k];
    moved[..k].copy_from_slice(&given[k..2 * k]);
    moved[k..2 * k].copy_from_slice(&given[3 * k..]);
    assert!(g.down(&cache.indices(1, 4).unwrap().0) == raw(&moved));
    // Overlap.
    let (mut near, mut far) = ([0f32; 4], [0f32; 4]);
    let other = [&want[..k], &given[..3 * k]].concat();
    let other = t("b", &other, &[rows, k]);
    let op = Overlap::check(host, other, m("overlap", &mut near, &[rows])).unwrap();
    g.cpu.overlap(&op, Stream::DEFAULT).unwrap();
    let dev = g.up(&m("overlap", &mut far, &[rows]));
    let op = Overlap::check(g.up(&host), g.up(&other), dev).unwrap();
    g.gpu.overlap(&op, Stream::DEFAULT).unwrap();
    assert!(g.down(&dev) == raw(&near));
    assert_eq!(near[0], 1.0);
}

#[test]
fn the_callers_context_is_restored() {
    let Some(g) = Gpu::open("context") else { return };
    let mut rng = Rng(9);
    let data = rng.normals(1000);
    let mut out = vec![0i32; 8];
    let args = TopKArgs {
        logits: g.up(&t("logits", &data, &[1, 1000])),
        row_start: None,
        row_end: None,
        indices: g.up(&m("indices", &mut out, &[1, 8])),
    };
    let op = args.check().unwrap();
    let before = result::ctx::get_current().unwrap();
    // SAFETY: no context is a fine state for the driver.
    unsafe { result::ctx::set_current(std::ptr::null_mut()) }.unwrap();
    g.gpu.topk(&op, Stream::DEFAULT).unwrap();
    assert_eq!(result::ctx::get_current().unwrap(), None);
    // SAFETY: the context that was current.
    unsafe { result::ctx::set_current(before.unwrap()) }.unwrap();
    g.gpu.topk(&op, Stream::DEFAULT).unwrap();
    assert_eq!(result::ctx::get_current().unwrap(), before);
    g.sync();
    // Memory of another place is refused.
    let host = t("logits", &data, &[1, 1000]);
    let wrong = TopKArgs { logits: host, indices: m("indices", &mut out, &[1, 8]), ..args };
    assert!(g.gpu.topk(&wrong.check().unwrap(), Stream::DEFAULT).is_err());
}

/// Part of the largest number that coefficients of 16 bits and the tensor cores' sums may cost.
const CUT_OFF: f64 = 5e-6;

/// A distillation on the device: what its outputs hold then.
struct DistillOnGpu {
    op: DistillArgs<'static>,
    size: usize,
}

impl DistillOnGpu {
    fn new(g: &Gpu, case: &Case) -> Self {
        let (mut memory, mut out) = (distill::Memory::default(), case.zeros());
        let a = case.args(&mut memory, &mut out, true);
        let op = DistillArgs {
            q: g.up(&a.q),
            k: g.up(&a.k),
            weights: g.up(&a.weights),
            row_start: g.up_maybe(&a.row_start),
            row_end: g.up_maybe(&a.row_end),
            indices: g.up_maybe(&a.indices),
            target: g.up_maybe(&a.target),
            attention_q: g.up_maybe(&a.attention_q),
            kv: g.up_maybe(&a.kv),
            lse: g.up_maybe(&a.lse),
            softmax_scale: a.softmax_scale,
            layer_weight: a.layer_weight,
            loss: g.up(&a.loss),
            grad_q: g.up_maybe(&a.grad_q),
            grad_k: g.up_maybe(&a.grad_k),
            grad_weights: g.up_maybe(&a.grad_weights),
        };
        let size = g.gpu.distill_workspace(&op.check().unwrap()).unwrap();
        DistillOnGpu { op, size }
    }

    fn add(&self, g: &Gpu, workspace: Workspace<'_>, stream: Stream) {
        g.gpu.distill(&self.op.check().unwrap(), workspace, stream).unwrap();
    }

    fn out(&self, g: &Gpu) -> Out {
        let of = |t: Option<Tensor<'_>>| floats(&g.down(&t.unwrap()));
        let op = &self.op;
        Out { loss: of(Some(op.loss)), q: of(op.grad_q), k: of(op.grad_k), w: of(op.grad_weights) }
    }
}

fn distill_on_gpu(g: &Gpu, case: &Case) -> Out {
    let on_gpu = DistillOnGpu::new(g, case);
    on_gpu.add(g, g.workspace(on_gpu.size), Stream::DEFAULT);
    on_gpu.out(g)
}

#[test]
fn distillation_against_plain_f64() {
    let Some(g) = Gpu::open("distillation") else { return };
    for case in distill::kinds() {
        if small() && case.values == Values::Ties {
            continue; // Kernels of the others.
        }
        let out = distill_on_gpu(&g, &case);
        case.compare_with(CUT_OFF, &out);
        assert!(small() || distill_on_gpu(&g, &case) == out, "other bits");
    }
    // Up to the largest, around the widths that the code works in, and more than one chunk of rows.
    let shapes: &[([usize; 4], &[usize])] = &[
        ([1, 1, 1, 1], &[2, 35]),
        ([4, 64, 4, 64], &[150, 1]),
        ([9, 65, 7, 33], &[2, 35]),
        ([32, 128, 16, 576], &[2, 35]),
        ([33, 129, 65, 192], &[40, 9]),
        ([128, 256, 128, 1024], &[2, 35]),
        ([2, 16, 3, 64], &[700]),
        // And more than one range of keys.
        ([2, 16, 3, 64], &[100; 91]),
    ];
    for (i, &(shape, lengths)) in shapes.iter().enumerate() {
        if small() && i > 1 {
            break;
        }
        for (values, restricted) in
            [(Values::F32, false), (Values::Bf16, false), (Values::F32, true), (Values::Bf16, true)]
        {
            let mut case = Case::shaped(shape, 50 + i as u64, lengths, values, restricted, false);
            // Scores of order 1, as models have them.
            let [heads, dim, ..] = shape;
            case.w.iter_mut().for_each(|w| *w *= 2.0 / ((heads * dim) as f32).sqrt());
            case.compare_with(CUT_OFF, &distill_on_gpu(&g, &case));
        }
    }
}

/// Outputs are added to and optional, and one captured graph serves other lengths and values.
#[test]
fn distillation_outputs_and_graphs() {
    let Some(g) = Gpu::open("distillation outputs") else { return };
    let lengths = distill::RAGGED;
    for restricted in [false, true] {
        let case = Case::new(4, &lengths, Values::F32, restricted, true);
        let once = DistillOnGpu::new(&g, &case);
        let workspace = || g.workspace(once.size);
        once.add(&g, workspace(), Stream::DEFAULT);
        let first = once.out(&g);
        // Each alone is what it is beside the others.
        for which in 0..4 {
            let mut alone = DistillOnGpu::new(&g, &case);
            let all = alone.op;
            alone.op.grad_q = all.grad_q.filter(|_| which == 1);
            alone.op.grad_k = all.grad_k.filter(|_| which == 2);
            alone.op.grad_weights = all.grad_weights.filter(|_| which == 3);
            alone.add(&g, workspace(), Stream::DEFAULT);
            alone.op = all;
            let (out, mut want) = (alone.out(&g), case.zeros());
            want.loss = first.loss.clone();
            match which {
                1 => want.q = first.q.clone(),
                2 => want.k = first.k.clone(),
                3 => want.w = first.w.clone(),
                _ => {}
            }
            assert!(out == want, "{which}");
        }
        once.add(&g, workspace(), Stream::DEFAULT);
        let twice = once.out(&g);
        for (a, b) in [
            (&first.loss, &twice.loss),
            (&first.q, &twice.q),
            (&first.k, &twice.k),
            (&first.w, &twice.w),
        ] {
            let largest = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(largest > 0.0);
            assert!(a.iter().zip(b).all(|(a, b)| (2.0 * a - b).abs() <= 1e-6 * largest));
        }

        let captured = DistillOnGpu::new(&g, &case);
        let memory = workspace();
        let graph = Graph::capture(|stream| captured.add(&g, memory, stream));
        graph.replay();
        assert!(captured.out(&g) == first);
        // Other lengths: the same rows, half of them shorter.
        let mut other = Case::new(4, &lengths, Values::F32, restricted, true);
        for (r, (end, &start)) in other.end.iter_mut().zip(&other.start).enumerate() {
            let least =
                1 + other.indices.as_ref().map_or(0, |v| *v[r * 9..][..9].iter().max().unwrap());
            if r % 2 == 0 && *end - start > least {
                *end -= (*end - start - least) / 2;
            }
        }
        assert!(other.end != case.end);
        g.set(&captured.op.row_end.unwrap(), &other.end);
        for t in [
            captured.op.loss,
            captured.op.grad_q.unwrap(),
            captured.op.grad_k.unwrap(),
            captured.op.grad_weights.unwrap(),
        ] {
            g.set(&t, &vec![0.0f32; t.shape().iter().product()]);
        }
        graph.replay();
        other.compare_with(CUT_OFF, &captured.out(&g));
    }
}

/// Rows further apart: read where they are if 16 bytes at a time can, packed else; the same bits.
#[test]
fn distillation_of_strided_tensors() {
    let Some(g) = Gpu::open("distillation strides") else { return };
    for restricted in [false, true] {
        let case =
            Case::shaped([3, 21, 5, 64], 31, &distill::RAGGED, Values::Bf16, restricted, false);
        let (rows, keys) = (case.rows(), case.keys);
        let want = distill_on_gpu(&g, &case);
        for pad in [PAD, 3] {
            let up = |name, x: &[f32], shape: &[usize]| {
                let width = shape[1..].iter().product();
                let row = |x: &[f32]| -> Vec<bf16> {
                    let gap = std::iter::repeat_n(f32::NAN, pad);
                    x.iter().copied().chain(gap).map(bf16::from_f32).collect()
                };
                let data: Vec<bf16> = x.chunks(width).flat_map(row).collect();
                g.up(&padded(name, &data, shape, pad))
            };
            let mut on_gpu = DistillOnGpu::new(&g, &case);
            on_gpu.op = DistillArgs {
                q: up("q", &case.q, &[rows, 3, 21]),
                k: up("k", &case.k, &[keys, 21]),
                attention_q: Some(up("attention_q", &case.attention_q, &[rows, 5, 64])),
                kv: Some(up("kv", &case.kv, &[keys, 64])),
                ..on_gpu.op
            };
            on_gpu.add(&g, g.workspace(on_gpu.size), Stream::DEFAULT);
            assert!(on_gpu.out(&g) == want, "{pad}");
        }
    }
}

/// What the CPU refuses makes the loss NaN here, and reaches no address.
#[test]
fn distillation_reports_what_it_cannot_use() {
    let Some(g) = Gpu::open("distillation reports") else { return };
    let reported = |given: bool, restricted: bool, change: &dyn Fn(&mut Case)| {
        let mut case = Case::new(12, &[6, 9], Values::F32, restricted, given);
        if let Some(v) = &mut case.indices {
            v[8 * 9] = 0; // The row that is changed has a position.
        }
        change(&mut case);
        assert!(
            distill_on_gpu(&g, &case).loss[0].is_nan(),
            "given {given} restricted {restricted}"
        );
    };
    // Row 8 is the second of the second sequence, whose keys begin at 7.
    reported(true, false, &|c| c.q[8 * 63 + 2] = f32::NAN);
    reported(true, false, &|c| c.w[8 * 3] = f32::INFINITY);
    reported(true, false, &|c| c.k[8 * 21] = f32::NEG_INFINITY);
    reported(false, false, &|c| c.attention_q[8 * 200] = f32::NAN);
    reported(false, true, &|c| c.lse[8 * 5 + 4] = f32::NEG_INFINITY);
    reported(false, false, &|c| c.kv[7 * 40] = f32::NAN);
    reported(false, false, &|c| {
        c.attention_q[8 * 200..9 * 200].fill(1.0);
        c.kv[8 * 40] = f32::NEG_INFINITY;
    });
    reported(true, false, &|c| {
        let row = 8 * c.columns;
        c.target.as_mut().unwrap()[row + 1] = f32::NAN;
    });
    reported(true, true, &|c| c.target.as_mut().unwrap()[8 * 9] = -0.5);
    reported(true, false, &|c| {
        let row = 8 * c.columns;
        c.target.as_mut().unwrap()[row..row + 2].fill(0.0);
    });
    reported(true, false, &|c| {
        c.q[8 * 63..9 * 63].fill(1e30);
        c.k[7 * 21..8 * 21].fill(1e30);
    });
    reported(false, false, &|c| c.attention_q[8 * 200..9 * 200].fill(3e38));
    for wrong in [2, -2, i32::MAX, i32::MIN] {
        reported(true, true, &|c| c.indices.as_mut().unwrap()[8 * 9 + 1] = wrong);
    }
    for wrong in [18, i32::MAX] {
        reported(true, false, &|c| c.end[8] = wrong);
    }
    for wrong in [-1, 18, i32::MIN, i32::MAX] {
        reported(true, false, &|c| c.start[8] = wrong);
    }
    reported(true, false, &|c| {
        (c.columns, c.target) = (8, Some(vec![1.0; 8 * c.rows()]));
    });
}

/// Whatever this machine and build have: never a panic, and a text that says what is missing.
#[test]
fn asking_for_cuda_is_answered_clearly() {
    use indexcache::error::Status;
    let auto = Context::new(BackendChoice::Auto(0), 1, || ()).unwrap();
    match Context::new(BackendChoice::Cuda(0), 1, || ()) {
        Ok(c) => {
            assert_eq!(c.device(), Device::Cuda(0));
            assert_eq!(auto.device(), Device::Cuda(0));
            let e = Context::new(BackendChoice::Cuda(4096), 1, || ()).unwrap_err();
            assert_eq!(e.status, Status::NoDevice);
        }
        Err(e) => {
            assert!(matches!(e.status, Status::NoDevice | Status::NoKernelImage), "{e}");
            assert!(e.message.contains("driver") || e.message.contains("nvcc"), "{e}");
            assert_eq!(auto.passed_over(), Some(&e));
            assert_eq!(auto.device(), Device::Cpu);
        }
    }
}
