//! `indexcache bench indexer`: the shapes of a DeepSeek-V3.2 or GLM-5 indexer, 64 or 32 heads of 128, top-k 2048.

use super::device::{Device, Memory};
use super::{Report, Work, normals};
use crate::Failure;
use indexcache::fp8;
use indexcache::ops::*;
use indexcache::tensor::{F8E4M3, Tensor};

const DIM: usize = 128;
const TOPK: usize = 2048;

/// Shapes to measure.
struct Shapes {
    /// Rows of a prefill chunk, and its keys; whether the chunk is the end of them or sees all.
    rows: usize,
    prefill: &'static [(usize, bool)],
    requests: &'static [usize],
    context: &'static [usize],
    topk_rows: &'static [usize],
    columns: &'static [usize],
    /// Rows and columns with scores that are not random.
    hard_topk: (usize, usize),
}

const CUDA: Shapes = Shapes {
    rows: 4096,
    prefill: &[(8192, true), (32768, false), (131072, false)],
    requests: &[1, 16, 64],
    context: &[32768, 131072],
    topk_rows: &[1, 64, 4096],
    columns: &[8192, 32768, 131072],
    hard_topk: (64, 131072),
};
const CPU: Shapes = Shapes {
    rows: 16,
    prefill: &[(8192, true), (32768, false)],
    requests: &[1, 16],
    context: &[32768],
    topk_rows: &[1, 64],
    columns: &[8192, 32768],
    hard_topk: (64, 8192),
};

/// What scores are like: as a model's, or as a filter may not like them.
#[derive(Clone, Copy, PartialEq)]
enum Scores {
    Normal,
    /// Each position beats the ones before.
    Rising,
    /// All the same.
    Equal,
    /// One in a hundred above 0, the others 0.
    Zeros,
    /// Of top-k alone: 1 to 1.2.
    Narrow,
    /// 64 different ones.
    Levels,
    /// Past what half precision holds.
    Huge,
    Subnormal,
    Negative,
    /// Weighted sums over heads of what a ReLU leaves, with weights above 0.
    Indexer,
}

/// Of select, whose scores are computed, and of top-k.
const HARD_SELECT: [Scores; 3] = [Scores::Rising, Scores::Equal, Scores::Zeros];
const HARD_TOPK: [Scores; 9] = [
    Scores::Rising,
    Scores::Equal,
    Scores::Zeros,
    Scores::Narrow,
    Scores::Levels,
    Scores::Huge,
    Scores::Subnormal,
    Scores::Negative,
    Scores::Indexer,
];

impl Scores {
    /// To be put after a shape.
    fn name(self) -> &'static str {
        match self {
            Scores::Normal => "",
            Scores::Rising => ", rising",
            Scores::Equal => ", equal",
            Scores::Zeros => ", 99 % zeros",
            Scores::Narrow => ", 1 to 1.2",
            Scores::Levels => ", 64 levels",
            Scores::Huge => ", times 1e5",
            Scores::Subnormal => ", subnormal",
            Scores::Negative => ", negative",
            Scores::Indexer => ", indexer-like",
        }
    }

    /// Queries and weights, or something to repeat.
    fn queries(self) -> (Vec<F8E4M3>, Vec<f32>) {
        let (q, w) = (normals(1), normals(2));
        match self {
            Scores::Normal => (codes(&q), w),
            _ => (codes(&absolute(&q)), absolute(&w)),
        }
    }

    /// Keys and their scales.
    fn keys(self, keys: usize) -> (Vec<F8E4M3>, Vec<f32>) {
        let values = codes(&normals(3));
        let positive = codes(&absolute(&normals(3)));
        let sign = |s| if s % 100 == 0 { 0 } else { 0x80 };
        let key = |s| match self {
            Scores::Normal => values[s * DIM % (1 << 20)..][..DIM].to_vec(),
            Scores::Zeros => positive[..DIM].iter().map(|x| F8E4M3(x.0 | sign(s))).collect(),
            _ => positive[..DIM].to_vec(),
        };
        let scale = |s| if self == Scores::Rising { (s + 1) as f32 / keys as f32 } else { 1.0 };
        ((0..keys).flat_map(key).collect(), (0..keys).map(scale).collect())
    }

    /// Scores of one row, or of so many that it does not matter that they repeat.
    fn row(self, columns: usize, seed: u64) -> Vec<f32> {
        let x = normals(seed);
        let each = |f: fn(f32) -> f32| x.iter().map(|&x| f(x)).collect();
        match self {
            Scores::Normal => x,
            Scores::Rising => (0..columns).map(|s| s as f32).collect(),
            Scores::Equal => vec![1.0],
            Scores::Zeros => {
                let kept = |(s, x): (usize, &f32)| if s % 100 == 0 { x.abs() } else { 0.0 };
                x.iter().enumerate().map(kept).collect()
            }
            Scores::Narrow => each(|x| 1.0 + 0.2 * (x.abs() % 1.0)),
            Scores::Levels => each(|x| (16.0 * x).round().clamp(-32.0, 31.0)),
            Scores::Huge => each(|x| 1e5 * x),
            Scores::Subnormal => each(|x| 1e-39 * x),
            Scores::Negative => each(|x| -1.0 - x.abs()),
            Scores::Indexer => {
                let head = |s: usize, h: usize| x[(s + h * 16411) % x.len()].max(0.0);
                let weight = |h: usize| x[h].abs();
                (0..x.len()).map(|s| (0..64).map(|h| weight(h) * head(s, h)).sum()).collect()
            }
        }
    }
}

fn absolute(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x.abs()).collect()
}

fn codes(x: &[f32]) -> Vec<F8E4M3> {
    x.iter().map(|&x| F8E4M3(fp8::encode(x))).collect()
}

pub fn measure(device: &Device, report: &mut Report) -> Result<(), Failure> {
    let shapes = if device.is_gpu() { CUDA } else { CPU };
    for heads in [32, 64] {
        for &(keys, causal) in shapes.prefill {
            prefill(device, report, heads, (shapes.rows, keys, causal), Scores::Normal)?;
        }
    }
    for heads in [32, 64] {
        for &requests in shapes.requests {
            for &context in shapes.context {
                decode(device, report, heads, (requests, context), Scores::Normal)?;
            }
        }
    }
    for &rows in shapes.topk_rows {
        for &columns in shapes.columns {
            topk(device, report, (rows, columns), Scores::Normal)?;
        }
    }
    for scores in HARD_SELECT {
        prefill(device, report, 32, (shapes.rows, 32768, false), scores)?;
        decode(device, report, 32, (16, 32768), scores)?;
    }
    for scores in HARD_TOPK {
        topk(device, report, shapes.hard_topk, scores)?;
    }
    Ok(())
}

fn prefill(
    device: &Device,
    report: &mut Report,
    heads: usize,
    (rows, keys, causal): (usize, usize, bool),
    scores: Scores,
) -> Result<(), Failure> {
    let memory = Memory::new(device);
    let ends: Vec<i32> =
        (0..rows).map(|r| (if causal { keys - rows + r + 1 } else { keys }) as i32).collect();
    let (q, weights) = scores.queries();
    let (k, k_scale) = scores.keys(keys);
    let args = IndexerArgs {
        q: memory.tensor("q", &[rows, heads, DIM], &q)?,
        weights: memory.tensor("weights", &[rows, heads], &weights)?,
        k: memory.tensor("k", &[keys, DIM], &k)?,
        k_scale: Some(memory.tensor("k_scale", &[keys], &k_scale)?),
        map: KeyMapArgs {
            row_end: Some(memory.tensor("row_end", &[rows], &ends)?),
            ..KeyMapArgs::default()
        },
    };
    let pairs: f64 = ends.iter().map(|&end| f64::from(end)).sum();
    let work = Work::Fp8(2.0 * (heads * DIM) as f64 * pairs);
    let causal = if causal { " causal" } else { "" };
    let shape = format!("{rows} x {keys}{causal}, {heads} heads{}", scores.name());
    let indices = memory.tensor::<i32>("indices", &[rows, TOPK], &[])?;
    select(device, report, &memory, ("prefill", &shape), &[args], indices, work)?;
    if scores != Scores::Normal {
        return Ok(()); // Scoring does not look at the scores.
    }
    let out = memory.tensor::<f32>("out", &[rows, keys], &[])?;
    logits(device, report, &shape, &[args], out, work)
}

fn decode(
    device: &Device,
    report: &mut Report,
    heads: usize,
    (requests, context): (usize, usize),
    scores: Scores,
) -> Result<(), Failure> {
    let memory = Memory::new(device);
    let (pages, page_bytes) = (requests * context / PAGE, PAGE * (DIM + 4));
    // Random scores: pages in an order that is neither ascending nor local, out of 128 different ones.
    let normal = scores == Scores::Normal;
    let step = if normal { 7919 } else { 1 };
    let table: Vec<i32> = (0..pages).map(|i| (i * step % pages) as i32).collect();
    let (codes, scales) = scores.keys(if normal { 128 * PAGE } else { context });
    let page = |(codes, scales): (&[F8E4M3], &[f32])| -> Vec<u8> {
        let codes = codes.iter().map(|code| code.0);
        codes.chain(scales.iter().flat_map(|scale| scale.to_le_bytes())).collect()
    };
    let bytes: Vec<u8> = codes.chunks(PAGE * DIM).zip(scales.chunks(PAGE)).flat_map(page).collect();
    let map = KeyMapArgs {
        block_table: Some(memory.tensor("block_table", &[requests, context / PAGE], &table)?),
        row_end: Some(memory.tensor("row_end", &[requests], &[context as i32])?),
        ..KeyMapArgs::default()
    };
    let (q, weights) = scores.queries();
    let set = || -> Result<IndexerArgs<'_>, Failure> {
        Ok(IndexerArgs {
            q: memory.tensor("q", &[requests, heads, DIM], &q)?,
            weights: memory.tensor("weights", &[requests, heads], &weights)?,
            k: memory.tensor("k", &[pages, page_bytes], &bytes)?,
            k_scale: None,
            map,
        })
    };
    let sets: Result<Vec<_>, Failure> =
        (0..device.sets(pages * page_bytes, 16)).map(|_| set()).collect();
    let sets = sets?;
    let shape = format!("{requests} x {context}, {heads} heads{}", scores.name());
    let indices = memory.tensor::<i32>("indices", &[requests, TOPK], &[])?;
    let work = Work::Bytes((pages * page_bytes) as f64);
    select(device, report, &memory, ("decode", &shape), &sets, indices, work)?;
    if !normal {
        return Ok(());
    }
    let out = memory.tensor::<f32>("out", &[requests, context], &[])?;
    logits(device, report, &(shape + ", paged"), &sets, out, work)
}

fn select(
    device: &Device,
    report: &mut Report,
    memory: &Memory<'_>,
    (operation, shape): (&'static str, &str),
    sets: &[IndexerArgs<'_>],
    indices: Tensor<'_>,
    work: Work,
) -> Result<(), Failure> {
    let ops: Result<Vec<_>, _> = sets.iter().map(|args| args.check_select(indices)).collect();
    let ops = ops?;
    let scratch = memory.scratch(device.context.select_workspace(&ops[0]))?;
    let seconds = device
        .time(ops.len(), |set, stream| device.context.select(&ops[set], scratch.lend(), stream))?;
    report.add(operation, shape, seconds, work);
    Ok(())
}

fn logits(
    device: &Device,
    report: &mut Report,
    shape: &str,
    sets: &[IndexerArgs<'_>],
    out: Tensor<'_>,
    work: Work,
) -> Result<(), Failure> {
    let ops: Result<Vec<_>, _> = sets.iter().map(|args| args.check_logits(out)).collect();
    let ops = ops?;
    let seconds =
        device.time(ops.len(), |set, stream| device.context.indexer_logits(&ops[set], stream))?;
    report.add("logits", shape, seconds, work);
    Ok(())
}

fn topk(
    device: &Device,
    report: &mut Report,
    (rows, columns): (usize, usize),
    scores: Scores,
) -> Result<(), Failure> {
    let memory = Memory::new(device);
    let bytes = 4 * rows * columns;
    let indices = memory.tensor::<i32>("indices", &[rows, TOPK], &[])?;
    let op = |seed| -> Result<TopK<'_>, Failure> {
        let logits = memory.tensor("logits", &[rows, columns], &scores.row(columns, seed))?;
        Ok(TopKArgs { logits, row_start: None, row_end: None, indices }.check()?)
    };
    let ops: Result<Vec<_>, Failure> = (1..=device.sets(bytes, 16) as u64).map(op).collect();
    let ops = ops?;
    let seconds = device.time(ops.len(), |set, stream| device.context.topk(&ops[set], stream))?;
    let shape = format!("{rows} x {columns}{}", scores.name());
    report.add("top-k", &shape, seconds, Work::Bytes(bytes as f64));
    Ok(())
}
