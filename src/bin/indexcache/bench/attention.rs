//! `indexcache bench attention`: sparse MLA over 2048 selected tokens, as DeepSeek-V3.2 and GLM-5 have it: all their
//! heads, and the few that tensor parallelism leaves on a GPU.

use super::device::{Device, Memory};
use super::{Report, Work, normals};
use crate::Failure;
use half::bf16;
use indexcache::fp8;
use indexcache::ops::*;
use indexcache::tensor::Tensor;

const D_QK: usize = KV_FP8_DIMS.0;
const D_V: usize = KV_FP8_DIMS.1;
const TOPK: usize = 2048;
const ALL_HEADS: [usize; 2] = [64, 128];
const FEW_HEADS: [usize; 4] = [8, 16, 20, 32];

/// Shapes to measure.
struct Shapes {
    /// Rows of a prefill chunk, and the KV rows they select from.
    rows: usize,
    prefill: &'static [usize],
    requests: &'static [usize],
    context: usize,
    /// KV rows of all requests and sets.
    store: usize,
}

const CUDA: Shapes = Shapes {
    rows: 4096,
    prefill: &[32768, 131072],
    requests: &[1, 16, 64],
    context: 32768,
    store: 64 * 32768,
};
const CPU: Shapes =
    Shapes { rows: 2, prefill: &[8192], requests: &[1], context: 8192, store: 8192 };

/// How a row's indices come.
#[derive(Clone, Copy)]
enum Order {
    Random,
    /// As `select` gives them.
    Ascending,
    /// Ascending, nine of ten the same for 64 rows.
    Shared,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Order::Random => "random",
            Order::Ascending => "ascending",
            Order::Shared => "90 % shared",
        }
    }
}

/// Different positions for each row.
fn indices(rows: usize, positions: usize, order: Order) -> Vec<i32> {
    let (mut state, mut all) = (0x9e37_79b9_7f4a_7c15u64, Vec::with_capacity(rows * TOPK));
    let (mut taken, mut shared) = (vec![false; positions], vec![]);
    for row in 0..rows {
        if row % 64 == 0 {
            shared.clear();
        }
        let mut own = shared.clone();
        taken.fill(false);
        own.iter().for_each(|&i: &i32| taken[i as usize] = true);
        while own.len() < TOPK {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let i = (state >> 20) as usize % positions;
            if !std::mem::replace(&mut taken[i], true) {
                own.push(i as i32);
            }
        }
        if matches!(order, Order::Shared) && shared.is_empty() {
            shared.extend_from_slice(&own[..TOPK * 9 / 10]);
        }
        if !matches!(order, Order::Random) {
            own.sort_unstable();
        }
        all.extend(own);
    }
    all
}

fn halves(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Rows of 656 bytes, whose number shares no factor with a page's.
fn fp8_rows(x: &[f32]) -> Vec<u8> {
    let row = |x: &[f32]| -> Vec<u8> {
        let codes = x[..D_V].iter().map(|&x| fp8::encode(x));
        let scales = [0.5f32, 1.0, 2.0, 1.0].into_iter().flat_map(f32::to_le_bytes);
        let rope = halves(&x[D_V..]).into_iter().flat_map(bf16::to_le_bytes);
        codes.chain(scales).chain(rope).collect()
    };
    x.chunks_exact(D_QK).take(1021).flat_map(row).collect()
}

pub fn measure(device: &Device, report: &mut Report) -> Result<(), Failure> {
    let shapes = if device.is_gpu() { CUDA } else { CPU };
    for &tokens in shapes.prefill {
        for heads in ALL_HEADS {
            for order in [Order::Random, Order::Ascending, Order::Shared] {
                prefill(device, report, heads, (shapes.rows, tokens), order)?;
            }
        }
        for heads in FEW_HEADS {
            prefill(device, report, heads, (shapes.rows, tokens), Order::Ascending)?;
        }
    }
    for fp8 in [true, false] {
        for &requests in shapes.requests {
            for (heads, queries) in [(64, 1), (64, 2), (128, 1), (128, 2)] {
                decode(device, report, heads, (requests, queries), (&shapes, fp8))?;
            }
            for heads in FEW_HEADS {
                decode(device, report, heads, (requests, 1), (&shapes, fp8))?;
            }
        }
    }
    Ok(())
}

/// Products of a call over so many rows.
fn flop(rows: usize, heads: usize) -> f64 {
    2.0 * (rows * heads * TOPK * (D_QK + D_V)) as f64
}

fn prefill(
    device: &Device,
    report: &mut Report,
    heads: usize,
    (rows, tokens): (usize, usize),
    order: Order,
) -> Result<(), Failure> {
    let memory = Memory::new(device);
    let x = halves(&normals(1));
    let kv = memory.tensor("kv", &[tokens, D_QK], &x)?;
    let indices = memory.tensor("indices", &[rows, TOPK], &indices(rows, tokens, order))?;
    let args = args(&memory, &x, (rows, heads), kv, indices, KeyMapArgs::default())?;
    let shape = format!("{rows} x {heads} heads, KV {tokens}, {}", order.name());
    attend(device, report, &memory, ("prefill", &shape), &[args], Work::Bf16(flop(rows, heads)))
}

fn decode(
    device: &Device,
    report: &mut Report,
    heads: usize,
    (requests, queries): (usize, usize),
    (shapes, fp8): (&Shapes, bool),
) -> Result<(), Failure> {
    let memory = Memory::new(device);
    let (rows, pages) = (requests * queries, shapes.store / PAGE);
    let x = normals(1);
    let (kv, bytes) = if fp8 {
        let kv = memory.tensor("kv", &[pages, PAGE, KV_FP8_BYTES], &fp8_rows(&x))?;
        (kv, rows * TOPK * KV_FP8_BYTES)
    } else {
        let kv = memory.tensor("kv", &[pages, PAGE, D_QK], &halves(&x))?;
        (kv, rows * TOPK * D_QK * 2)
    };
    let q = halves(&x);
    let positions = indices(rows, shapes.context, Order::Ascending);
    let positions = memory.tensor("indices", &[rows, TOPK], &positions)?;
    let set = |i: usize| -> Result<SparseAttentionArgs<'_>, Failure> {
        // Pages in an order that is neither ascending nor local, others for each set.
        let each = shapes.context / PAGE;
        let table: Vec<i32> = (0..requests * each)
            .map(|page| ((i * requests * each + page) * 7919 % pages) as i32)
            .collect();
        let table = memory.tensor("block_table", &[requests, each], &table)?;
        let map = KeyMapArgs { block_table: Some(table), ..KeyMapArgs::default() };
        args(&memory, &q, (rows, heads), kv, positions, map)
    };
    let sets: Result<Vec<_>, Failure> = (0..device.sets(bytes, 100)).map(set).collect();
    let format = if fp8 { "fp8" } else { "bf16" };
    let shape = format!("{format}, {requests} x {queries} queries x {heads} heads");
    let work = Work::Both { bf16: flop(rows, heads), bytes: bytes as f64 };
    attend(device, report, &memory, ("decode", &shape), &sets?, work)
}

fn args<'a>(
    memory: &'a Memory<'_>,
    q: &[bf16],
    (rows, heads): (usize, usize),
    kv: Tensor<'a>,
    indices: Tensor<'a>,
    map: KeyMapArgs<'a>,
) -> Result<SparseAttentionArgs<'a>, Failure> {
    Ok(SparseAttentionArgs {
        q: memory.tensor("q", &[rows, heads, D_QK], q)?,
        kv,
        indices,
        form: IndexForm::Logical,
        map,
        row_topk: None,
        sink: None,
        softmax_scale: 1.0 / (D_QK as f32).sqrt(),
        out: memory.tensor::<bf16>("out", &[rows, heads, D_V], &[])?,
        lse: None,
        probs: None,
    })
}

fn attend(
    device: &Device,
    report: &mut Report,
    memory: &Memory<'_>,
    (operation, shape): (&'static str, &str),
    sets: &[SparseAttentionArgs<'_>],
    work: Work,
) -> Result<(), Failure> {
    let ops: Result<Vec<_>, _> = sets.iter().map(|args| args.check()).collect();
    let ops = ops?;
    let scratch = memory.scratch(device.context.sparse_attention_workspace(&ops[0]))?;
    let seconds = device.time(ops.len(), |set, stream| {
        device.context.sparse_attention(&ops[set], scratch.lend(), stream)
    })?;
    report.add(operation, shape, seconds, work);
    Ok(())
}
