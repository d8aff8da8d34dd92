//! Launches of the distillation loss: `kernels/distill.cu`.

use super::driver::{Gpu, Kernel};
use super::params::{self, Planes, Ptr, at, n, small};
use super::{Cuda, floats};
use crate::context::Stream;
use crate::error::Result;
use crate::layout::{Addresses, Workspace, with_slack};
use crate::ops::{Distill, Floats, Target};

const THREADS: u32 = 256;
/// Rows in flight: what grows with the number of keys is scratch for so many.
const ROWS: usize = 1024;
/// Keys or columns of a tile of scores.
const COLUMNS: usize = 128;
/// Most vectors of a tile of scores.
const VECTORS: usize = 128;
/// Dimensions that a step of scores takes.
const STEP: usize = 64;
const STAGES: usize = 3;
/// Most pieces that a chunk's rows are cut into for the gradient by the keys.
const PARTS: usize = 8;
/// Most keys, restricted, whose gradients are computed at a time: of a row in shared memory (`RANGE` in
/// `kernels/distill.cu`), of a chunk's rows in L2.
const RANGE: usize = 8192;

#[derive(Debug)]
pub(super) struct Kernels {
    pack: Kernel,
    live: Kernel,
    count: Kernel,
    /// For tiles of 32, 64, 128 vectors.
    scores: [Kernel; 3],
    targets: [Kernel; 3],
    rows: Kernel,
    scatter: Kernel,
    /// By [`Shape::variant`].
    grad_q: [Kernel; 4],
    grad_k: [Kernel; 4],
    add_k: Kernel,
    loss: Kernel,
    sm90: Option<Sm90>,
}

/// The same on Hopper: bf16, and up to 128 indexer dimensions.
#[derive(Debug)]
struct Sm90 {
    /// Dense, for 32, 64, 128 padded heads.
    targets: [Kernel; 3],
    /// Dense.
    grad_q: Kernel,
    grad_k: Kernel,
}

impl Sm90 {
    fn load(gpu: &Gpu) -> Result<Option<Self>> {
        const FILE: &str = "distill_sm90";
        if !gpu.has(FILE) {
            return Ok(None);
        }
        let kernel = |name, shared| gpu.kernel(FILE, name, shared);
        let targets = |name| kernel(name, sm90_targets_shared(SM90_DIM));
        Ok(Some(Sm90 {
            targets: [
                targets(c"distill_targets_32_sm90")?,
                targets(c"distill_targets_64_sm90")?,
                targets(c"distill_targets_128_sm90")?,
            ],
            grad_q: kernel(c"distill_grad_q_sm90", SM90_GRAD_SHARED)?,
            grad_k: kernel(c"distill_grad_k_sm90", SM90_GRAD_SHARED)?,
        }))
    }
}

const fn tile_shared(vectors: usize) -> u32 {
    (STAGES * (COLUMNS + vectors) * STEP * 2) as u32
}

/// Most attention dimensions that `distill_sm90.cu` holds in shared memory.
const SM90_DIM: usize = 640;
const SM90_TARGETS_THREADS: u32 = 384;
const SM90_GRAD_THREADS: u32 = 128;
/// Vectors or keys that a gradient's block owns.
const SM90_OWN: usize = 64;

/// Vectors, two rings of four stages of 64 keys, barriers.
const fn sm90_targets_shared(dim: usize) -> u32 {
    (2 * VECTORS * dim + 2 * 4 * 64 * STEP * 2 + 16 * 8) as u32
}

/// What is owned, and twice a tile of the others with its coefficients.
const SM90_GRAD_SHARED: u32 = (3 * SM90_OWN * 128 * 2 + 2 * 3 * 64 * 4) as u32;

/// Vectors or keys that a warp of the gradients owns.
const OWN: usize = 16;

/// Sizes that a gradient kernel was compiled for.
#[derive(Clone, Copy)]
struct Variant {
    planes: usize,
    dim: usize,
    /// Warps at most, each of which owns [`OWN`] vectors.
    warps: usize,
    tile: usize,
}

const VARIANTS: [Variant; 4] = [
    Variant { planes: 1, dim: 128, warps: 8, tile: 32 },
    Variant { planes: 1, dim: 256, warps: 8, tile: 32 },
    Variant { planes: 3, dim: 128, warps: 4, tile: 32 },
    Variant { planes: 3, dim: 256, warps: 2, tile: 16 },
];

impl Variant {
    const fn shared(self, warps: usize) -> u32 {
        let own = OWN * warps;
        // Vectors as bf16, and of both tiles f32 coefficients.
        (self.planes * (own + 2 * self.tile) * self.dim * 2 + 2 * (own + self.tile) * 4) as u32
    }
}

impl Kernels {
    pub(super) fn load(gpu: &Gpu) -> Result<Self> {
        let kernel = |name, shared| gpu.kernel("distill", name, shared);
        let grad = |v: usize, name| kernel(name, VARIANTS[v].shared(VARIANTS[v].warps));
        Ok(Kernels {
            pack: kernel(c"distill_pack", 0)?,
            live: kernel(c"distill_live", 0)?,
            count: kernel(c"distill_count", 0)?,
            scores: [
                kernel(c"distill_scores_32", tile_shared(32))?,
                kernel(c"distill_scores_64", tile_shared(64))?,
                kernel(c"distill_scores_128", tile_shared(128))?,
            ],
            targets: [
                kernel(c"distill_targets_32", tile_shared(32))?,
                kernel(c"distill_targets_64", tile_shared(64))?,
                kernel(c"distill_targets_128", tile_shared(128))?,
            ],
            rows: kernel(c"distill_rows", 0)?,
            scatter: kernel(c"distill_scatter", 0)?,
            grad_q: [
                grad(0, c"distill_grad_q_128")?,
                grad(1, c"distill_grad_q_256")?,
                grad(2, c"distill_grad_q_128_f32")?,
                grad(3, c"distill_grad_q_256_f32")?,
            ],
            grad_k: [
                grad(0, c"distill_grad_k_128")?,
                grad(1, c"distill_grad_k_256")?,
                grad(2, c"distill_grad_k_128_f32")?,
                grad(3, c"distill_grad_k_256_f32")?,
            ],
            add_k: kernel(c"distill_add_k", 0)?,
            loss: kernel(c"distill_loss", 0)?,
            sm90: Sm90::load(gpu)?,
        })
    }
}

/// bf16 numbers that a float is split into.
fn planes<const N: usize>(x: &Floats<'_, N>) -> usize {
    match x {
        Floats::F32(_) => 3,
        Floats::Bf16(_) => 1,
    }
}

/// Heads as the tiles want them: a power of two, so that a tile has whole rows or a row whole tiles.
fn pad_heads(heads: usize) -> usize {
    heads.next_power_of_two().max(32)
}

/// Which planes are multiplied, for the kernels: products below the last bit of the first are left out. The smallest
/// come first, where the tensor cores' cut-off sums lose nothing by it.
fn pairs(of_q: usize, of_k: usize) -> i32 {
    let all = [(2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)];
    let used = all.into_iter().filter(|&(q, k)| q < of_q && k < of_k);
    let mut code = 0;
    for (i, (q, k)) in used.enumerate() {
        code += ((q | k << 2) << (4 * i)) + (1 << 24);
    }
    small(code)
}

/// What follows from an operation's shapes.
struct Shape {
    chunk: usize,
    /// Index into [`VARIANTS`].
    variant: usize,
    heads: usize,
    width: usize,
    /// Keys whose gradients are computed at a time.
    range: usize,
    attention_heads: usize,
    attention_dim: usize,
    attention_planes: [usize; 2],
    parts: usize,
    /// Elements of a row by key, restricted.
    by_key: usize,
    /// Elements of the gradients by the keys, all parts.
    partial: usize,
}

impl Shape {
    fn of(op: &Distill<'_>, sms: usize) -> Self {
        let f32 = planes(&op.q).max(planes(&op.k)) > 1;
        let variant = 2 * usize::from(f32) + usize::from(op.dim > VARIANTS[0].dim);
        let Variant { dim, warps, .. } = VARIANTS[variant];
        let [heads, d_qk, of_q, of_kv] = match &op.target {
            Target::Given(_) => [0; 4],
            Target::Attention { q, kv, .. } => [
                pad_heads(q.shape()[1]),
                q.shape()[2].next_multiple_of(STEP),
                planes(q),
                planes(kv),
            ],
        };
        let columns = op.indices.map_or(op.keys, |v| v.shape()[1]);
        // Ranges of nearly one length, but scratch for the longest, so that it never grows when the keys get fewer.
        let most_keys = op.indices.map_or(op.keys, |_| op.keys.min(RANGE));
        let range = op.indices.map_or(op.keys, |_| {
            op.keys.div_ceil(op.keys.div_ceil(RANGE).max(1)).next_multiple_of(COLUMNS)
        });
        // Enough blocks for the device.
        let (own, wanted) = (OWN * warps, 4 * sms);
        let parts = (wanted / range.div_ceil(own).max(1)).clamp(1, PARTS);
        let most = most_keys.saturating_mul(PARTS).min(most_keys.max(wanted * own));
        let by_key = op.grad_k.is_some();
        Shape {
            chunk: op.rows.min(ROWS),
            variant,
            heads: pad_heads(op.heads),
            width: columns.next_multiple_of(COLUMNS),
            range,
            by_key: if op.indices.is_some() && by_key {
                most_keys.next_multiple_of(COLUMNS)
            } else {
                0
            },
            attention_heads: heads,
            attention_dim: d_qk,
            attention_planes: [of_q, of_kv],
            parts,
            partial: if by_key { most.saturating_mul(dim) } else { 0 },
        }
    }
}

struct Scratch {
    live: Ptr,
    row_loss: Ptr,
    q: Ptr,
    q_flags: Ptr,
    weights: Ptr,
    k: Ptr,
    k_flags: Ptr,
    attention_q: Ptr,
    kv: Ptr,
    scores: Ptr,
    targets: Ptr,
    by_key: Ptr,
    partial: Ptr,
}

fn lay(a: &mut Addresses, op: &Distill<'_>, s: &Shape) -> Scratch {
    let Variant { planes, dim, .. } = VARIANTS[s.variant];
    let product = |n: &[usize]| n.iter().fold(1usize, |a, &b| a.saturating_mul(b));
    let [of_q, of_kv] = s.attention_planes;
    // bf16 as bytes.
    Scratch {
        live: a.take::<i32>(op.rows.saturating_add(1)),
        row_loss: a.take::<f64>(op.rows),
        q: a.take::<u8>(product(&[2, planes, s.chunk, s.heads, dim])),
        q_flags: a.take::<f32>(s.chunk * s.heads),
        weights: a.take::<f32>(s.chunk * s.heads),
        k: a.take::<u8>(product(&[2, planes, op.keys, dim])),
        k_flags: a.take::<f32>(op.keys),
        attention_q: a.take::<u8>(product(&[2, of_q, s.chunk, s.attention_heads, s.attention_dim])),
        kv: a.take::<u8>(product(&[2, of_kv, op.keys, s.attention_dim])),
        scores: a.take::<f32>(product(&[s.chunk, s.width])),
        targets: a.take::<f32>(if of_q > 0 { product(&[s.chunk, s.width]) } else { 0 }),
        by_key: a.take::<f32>(product(&[s.chunk, s.by_key])),
        partial: a.take::<f32>(s.partial),
    }
}

/// A float tensor that the tensor cores can read where it is: bf16, whole steps, 16-byte alignment.
fn in_place<const N: usize>(x: &Floats<'_, N>, [row, head]: [usize; 2]) -> Option<Planes> {
    let (data, type_, _) = floats(x);
    let whole =
        x.shape()[N - 1].is_multiple_of(STEP) && row.is_multiple_of(8) && head.is_multiple_of(8);
    (type_ == 1 && whole && data.is_multiple_of(16)).then(|| Planes {
        data,
        plane: 0,
        row: n(row),
        head: n(head),
    })
}

impl Cuda {
    /// Bytes of workspace that [`Cuda::distill`] needs for these shapes and all smaller ones.
    pub fn distill_workspace(&self, op: &Distill<'_>) -> usize {
        let mut a = Addresses::measure();
        lay(&mut a, op, &Shape::of(op, self.gpu.sms));
        with_slack(a.used())
    }

    /// A distillation loss and its gradients.
    pub fn distill(&self, op: &Distill<'_>, ws: Workspace<'_>, stream: Stream) -> Result<()> {
        self.device(op.device)?;
        if let Some(copies) = self.checked(stream)? {
            copies.distill(op)?;
        }
        let s = Shape::of(op, self.gpu.sms);
        let mut a = Addresses::measure();
        lay(&mut a, op, &s);
        let scratch = lay(&mut Addresses::over(ws.on(op.device, a.used())?), op, &s);
        let kernels = &self.distill;
        let variant = VARIANTS[s.variant];
        let vector = variant.dim;

        let (q, q_type, [q_row, q_head, _]) = floats(&op.q);
        let (k, k_type, [k_row, _]) = floats(&op.k);
        let pack_q = params::DistillPack {
            from: q,
            to: scratch.q,
            flags: scratch.q_flags,
            weights: at(op.weights.as_ptr()),
            weights_to: scratch.weights,
            weights_row: n(op.weights.strides()[0]),
            from_row: n(q_row),
            from_head: n(q_head),
            rows: n(op.rows),
            padded_rows: n(s.chunk),
            heads: small(op.heads),
            padded_heads: small(s.heads),
            dim: small(op.dim),
            padded_dim: small(vector),
            type_: q_type,
            planes: small(variant.planes),
        };
        let pack_k = params::DistillPack {
            from: k,
            to: scratch.k,
            flags: scratch.k_flags,
            weights: 0,
            from_row: n(k_row),
            from_head: 0,
            rows: n(op.keys),
            padded_rows: n(op.keys),
            heads: 1,
            padded_heads: 1,
            type_: k_type,
            ..pack_q
        };
        let packed = |p: &params::DistillPack| {
            let dim = i64::from(p.padded_dim);
            let row = dim * i64::from(p.padded_heads);
            Planes { data: p.to, plane: row * p.padded_rows, row, head: dim }
        };
        let pack = |p: params::DistillPack| {
            let vectors = (p.padded_rows * i64::from(p.padded_heads)) as usize;
            let grid = (vectors.div_ceil(THREADS as usize / 32), 1);
            // SAFETY: the kernel's struct; checked tensors and workspace on this device.
            unsafe { self.launch(&kernels.pack, grid, THREADS, 0, stream, p) }
        };

        let none = Planes { data: 0, plane: 0, row: 0, head: 0 };
        let (mut pack_attention, mut pack_kv) = (None, None);
        let mut params = params::Distill {
            map: params::KeyMap::of(&op.map),
            q: packed(&pack_q),
            k: packed(&pack_k),
            attention_q: none,
            kv: none,
            weights: scratch.weights,
            lse: 0,
            target: 0,
            indices: op.indices.map_or(0, |v| at(v.as_ptr())),
            loss: at(op.loss.as_mut_ptr()),
            grad_q: op.grad_q.map_or(0, |v| at(v.as_mut_ptr())),
            grad_k: op.grad_k.map_or(0, |v| at(v.as_mut_ptr())),
            grad_weights: op.grad_weights.map_or(0, |v| at(v.as_mut_ptr())),
            scores: scratch.scores,
            targets: scratch.targets,
            by_key: if op.indices.is_some() { scratch.by_key } else { scratch.scores },
            partial: scratch.partial,
            q_flags: scratch.q_flags,
            k_flags: scratch.k_flags,
            row_loss: scratch.row_loss,
            live: scratch.live,
            lse_row: 0,
            target_row: 0,
            indices_row: op.indices.map_or(0, |v| n(v.strides()[0])),
            grad_q_row: op.grad_q.map_or(0, |v| n(v.strides()[0])),
            grad_q_head: op.grad_q.map_or(0, |v| n(v.strides()[1])),
            grad_k_row: op.grad_k.map_or(0, |v| n(v.strides()[0])),
            grad_weights_row: op.grad_weights.map_or(0, |v| n(v.strides()[0])),
            rows: n(op.rows),
            first: 0,
            count: 0,
            keys: n(op.keys),
            columns: 0,
            topk: op.indices.map_or(0, |v| n(v.shape()[1])),
            width: n(s.width),
            first_key: 0,
            own_keys: 0,
            key_width: n(if op.indices.is_some() { s.range } else { s.width }),
            parts: n(s.parts),
            score_pairs: pairs(variant.planes, variant.planes),
            target_pairs: 0,
            heads: small(op.heads),
            padded_heads: small(s.heads),
            dim: small(op.dim),
            attention_heads: 0,
            attention_padded: small(s.attention_heads),
            attention_dim: small(s.attention_dim),
            softmax_scale: 0.0,
            layer_weight: op.layer_weight,
        };
        match &op.target {
            Target::Given(v) => {
                (params.target, params.target_row) = (at(v.as_ptr()), n(v.strides()[0]));
                params.columns = n(v.shape()[1]);
            }
            Target::Attention { q, kv, lse, scale } => {
                let [of_q, of_kv] = s.attention_planes;
                let (from, type_, [row, head, _]) = floats(q);
                let p = params::DistillPack {
                    from,
                    to: scratch.attention_q,
                    flags: 0,
                    weights: 0,
                    from_row: n(row),
                    from_head: n(head),
                    heads: small(q.shape()[1]),
                    padded_heads: small(s.attention_heads),
                    dim: small(q.shape()[2]),
                    padded_dim: small(s.attention_dim),
                    type_,
                    planes: small(of_q),
                    ..pack_q
                };
                params.attention_q = in_place(q, [row, head]).unwrap_or_else(|| {
                    pack_attention = Some(p);
                    packed(&p)
                });
                let (from, type_, [row, _]) = floats(kv);
                let p = params::DistillPack {
                    from,
                    to: scratch.kv,
                    from_row: n(row),
                    from_head: 0,
                    rows: n(op.keys),
                    padded_rows: n(op.keys),
                    heads: 1,
                    padded_heads: 1,
                    type_,
                    planes: small(of_kv),
                    ..p
                };
                params.kv = in_place(kv, [row, 0]).unwrap_or_else(|| {
                    pack_kv = Some(p);
                    packed(&p)
                });
                (params.lse, params.lse_row) = (at(lse.as_ptr()), n(lse.strides()[0]));
                params.target_pairs = pairs(of_q, of_kv);
                params.attention_heads = small(q.shape()[1]);
                params.softmax_scale = *scale;
            }
        }

        // SAFETY: the kernels' struct; checked tensors and workspace on this device; bounds and indices are clamped
        // on the device.
        let launch = |kernel: &Kernel, grid, threads, shared, params: &params::Distill| unsafe {
            self.launch(kernel, grid, threads, shared, stream, *params)
        };
        let by_warp = (op.rows.div_ceil(THREADS as usize / 32), 1);
        launch(&kernels.live, by_warp, THREADS, 0, &params)?;
        launch(&kernels.count, (1, 1), 1024, 0, &params)?;
        pack(pack_k)?;
        pack_kv.map_or(Ok(()), pack)?;

        let columns = op.indices.map_or(op.keys, |v| v.shape()[1]);
        let dense = op.indices.is_none();
        // Attention as it is in one plane; gradients that Hopper's kernels can compute.
        let whole = s.attention_planes == [1, 1];
        let sm90 = kernels.sm90.as_ref().filter(|_| s.variant == 0);
        // Vectors of a tile of scores: many rows, or one whose keys are its own.
        let tile = |padded: usize| if dense { VECTORS } else { padded };
        let of_tile = |vectors: usize| vectors.ilog2() as usize - 5;
        for first in (0..op.rows).step_by(ROWS) {
            let count = ROWS.min(op.rows - first);
            (params.first, params.count) = (n(first), n(count));
            let later = |p: params::DistillPack, size: i64| params::DistillPack {
                from: p.from + (n(first) * p.from_row * size) as Ptr,
                weights: match p.weights {
                    0 => 0,
                    at => at + (4 * n(first) * p.weights_row) as Ptr,
                },
                rows: n(count),
                ..p
            };
            let size = |type_: i32| if type_ == 1 { 2 } else { 4 };
            pack(later(pack_q, size(q_type)))?;
            let mut params = params;
            match pack_attention {
                Some(p) => pack(later(p, size(p.type_)))?,
                None => params.attention_q.data += (2 * n(first) * params.attention_q.row) as Ptr,
            }
            let score = |kernels: &[Kernel; 3], padded: usize| {
                let vectors = tile(padded);
                let grid = (columns.div_ceil(COLUMNS), (count * padded).div_ceil(vectors));
                launch(&kernels[of_tile(vectors)], grid, THREADS, tile_shared(vectors), &params)
            };
            score(&kernels.scores, s.heads)?;
            match &kernels.sm90 {
                _ if params.target != 0 => {}
                Some(sm90) if dense && whole && s.attention_dim <= SM90_DIM => {
                    let kernel = &sm90.targets[of_tile(s.attention_heads)];
                    let grid = ((count * s.attention_heads).div_ceil(VECTORS), 1);
                    let shared = sm90_targets_shared(s.attention_dim);
                    launch(kernel, grid, SM90_TARGETS_THREADS, shared, &params)?;
                }
                _ => score(&kernels.targets, s.attention_heads)?,
            }
            launch(&kernels.rows, (count, 1), THREADS, 0, &params)?;
            if params.grad_q != 0 || params.grad_weights != 0 {
                let vectors = count * s.heads;
                if let (Some(sm90), true) = (sm90, dense) {
                    let grid = (vectors.div_ceil(SM90_OWN), 1);
                    launch(&sm90.grad_q, grid, SM90_GRAD_THREADS, SM90_GRAD_SHARED, &params)?;
                } else {
                    // Keys of a row's own: one row a block.
                    let warps = variant.warps.min(tile(s.heads) / OWN);
                    let grid = (vectors.div_ceil(OWN * warps), 1);
                    let (threads, shared) = (32 * warps as u32, variant.shared(warps));
                    launch(&kernels.grad_q[s.variant], grid, threads, shared, &params)?;
                }
            }
            let keys = if params.grad_k != 0 { op.keys } else { 0 };
            for first_key in (0..keys).step_by(s.range.max(1)) {
                let own_keys = s.range.min(keys - first_key);
                (params.first_key, params.own_keys) = (n(first_key), n(own_keys));
                if !dense {
                    launch(&kernels.scatter, (count, 1), THREADS, 0, &params)?;
                }
                let grid = |own: usize| (own_keys.div_ceil(own), s.parts);
                if let Some(sm90) = sm90 {
                    let grid = grid(SM90_OWN);
                    launch(&sm90.grad_k, grid, SM90_GRAD_THREADS, SM90_GRAD_SHARED, &params)?;
                } else {
                    let grid = grid(OWN * variant.warps);
                    let (threads, shared) =
                        (32 * variant.warps as u32, variant.shared(variant.warps));
                    launch(&kernels.grad_k[s.variant], grid, threads, shared, &params)?;
                }
                let grid = ((own_keys * vector).div_ceil(THREADS as usize), 1);
                launch(&kernels.add_k, grid, THREADS, 0, &params)?;
            }
        }
        launch(&kernels.loss, (1, 1), 1024, 0, &params)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{Shape, VARIANTS, lay};
    use crate::layout::Addresses;
    use crate::ops::DistillArgs;
    use crate::tensor::{DType, Device, Tensor, dense_strides};

    fn bytes(rows: usize, keys: usize, dim: usize, topk: Option<usize>) -> usize {
        let t = |name, dtype, shape: &[usize]| {
            let strides = dense_strides(shape);
            let (device, strides) = (Device::Cuda(0), &strides[..shape.len()]);
            Tensor::without_data(name, device, dtype, shape, strides).unwrap()
        };
        let (half, float) = (DType::Bf16, DType::F32);
        let op = DistillArgs {
            q: t("q", half, &[rows, 32, dim]),
            k: t("k", half, &[keys, dim]),
            weights: t("weights", float, &[rows, 32]),
            row_start: None,
            row_end: None,
            indices: topk.map(|k| t("indices", DType::I32, &[rows, k])),
            target: None,
            attention_q: Some(t("attention_q", half, &[rows, 128, 576])),
            kv: Some(t("kv", half, &[keys, 576])),
            lse: Some(t("lse", float, &[rows, 128])),
            softmax_scale: 1.0,
            layer_weight: 1.0,
            loss: t("loss", float, &[1]),
            grad_q: Some(t("grad_q", float, &[rows, 32, dim])),
            grad_k: Some(t("grad_k", float, &[keys, dim])),
            grad_weights: Some(t("grad_weights", float, &[rows, 32])),
        }
        .check()
        .unwrap();
        let mut a = Addresses::measure();
        lay(&mut a, &op, &Shape::of(&op, 132));
        a.used()
    }

    #[test]
    fn scratch_is_for_a_chunk_of_rows_and_shrinks_with_the_shapes() {
        for topk in [None, Some(2048)] {
            let mut least = 0;
            for keys in (0..40_000).step_by(997) {
                let now = bytes(5000, keys, 128, topk);
                assert!(now >= least, "{keys} keys");
                least = now;
            }
            assert!(bytes(5000, 9000, 64, topk) <= bytes(5000, 9000, 128, topk));
            assert!(bytes(5000, 9000, 128, topk) < bytes(5000, 9000, VARIANTS[1].dim, topk));
            assert!(bytes(300, 9000, 128, topk) < bytes(5000, 9000, 128, topk));
            // Of 32K rows and keys, one number each would be 4 GiB.
            let long = bytes(32 << 10, 32 << 10, 128, topk);
            assert!(long < 700 << 20, "{long}");
        }
        // Restricted, only the packed copies of k and kv, and k's flags, grow with the keys.
        let [short, long] = [16 << 10, 128 << 10].map(|keys| bytes(5000, keys, 128, Some(2048)));
        assert_eq!(long - short, (112 << 10) * (2 * 128 + 4 + 2 * 576));
    }
}
