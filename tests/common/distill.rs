//! Distillation cases, and the loss with its gradients in plain f64.

use super::data::Rng;
use half::bf16;
use indexcache::backend::cpu::Cpu;
use indexcache::ops::DistillArgs;
use indexcache::tensor::Tensor;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values {
    F32,
    Bf16,
    /// Small whole numbers: products that are 0, and equal ones, in bulk.
    Ties,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub values: Values,
    pub heads: usize,
    pub dim: usize,
    pub keys: usize,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub w: Vec<f32>,
    pub start: Vec<i32>,
    pub end: Vec<i32>,
    pub topk: usize,
    pub indices: Option<Vec<i32>>,
    pub columns: usize,
    pub target: Option<Vec<f32>>,
    pub attention_heads: usize,
    pub d_qk: usize,
    pub attention_q: Vec<f32>,
    pub kv: Vec<f32>,
    pub lse: Vec<f32>,
    pub scale: f32,
    pub layer_weight: f32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Out {
    pub loss: Vec<f32>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub w: Vec<f32>,
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

impl Case {
    /// Causal rows of sequences of these lengths, one after the other; after each, a row that sees nothing and a key
    /// that nobody sees. What nobody uses is NaN.
    pub fn new(
        seed: u64,
        lengths: &[usize],
        values: Values,
        restricted: bool,
        given: bool,
    ) -> Self {
        Self::shaped([3, 21, 5, 40], seed, lengths, values, restricted, given)
    }

    /// The same of so many heads, dimensions, attention heads and dimensions.
    pub fn shaped(
        [heads, dim, attention_heads, d_qk]: [usize; 4],
        seed: u64,
        lengths: &[usize],
        values: Values,
        restricted: bool,
        given: bool,
    ) -> Self {
        let mut rng = Rng(seed);
        let (mut start, mut end) = (vec![], vec![]);
        let mut at = 0;
        for &n in lengths {
            start.extend(std::iter::repeat_n(at as i32, n + 1));
            end.extend((1..=n).map(|i| (at + i) as i32));
            end.push(at as i32 - 1);
            at += n + 1;
        }
        let (rows, keys) = (start.len(), at);
        let mut floats = |n: usize| -> Vec<f32> {
            match values {
                Values::F32 => rng.normals(n),
                Values::Bf16 => {
                    rng.normals(n).iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
                }
                Values::Ties => (0..n).map(|_| rng.below(3) as f32 - 1.0).collect(),
            }
        };
        let (q, k) = (floats(rows * heads * dim), floats(keys * dim));
        let (attention_q, kv) = (floats(rows * attention_heads * d_qk), floats(keys * d_qk));
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let topk = 9;
        let indices = restricted.then(|| {
            let mut all = vec![-1; rows * topk];
            for (r, row) in all.chunks_exact_mut(topk).enumerate() {
                let len = (end[r] - start[r]).max(0) as usize;
                // Any order, some missing, some twice; a live row that selects nothing.
                for i in row.iter_mut() {
                    if len > 0 && rng.below(8) > 0 && r % 11 != 5 {
                        *i = rng.below(len) as i32;
                    }
                }
            }
            all
        });
        let columns = if restricted { topk } else { longest + 2 };
        let target = given.then(|| {
            let some = |x: f32| if x < -0.5 { 0.0 } else { 3.0 * x.exp() };
            rng.normals(rows * columns).into_iter().map(some).collect::<Vec<_>>()
        });
        let mut case = Case {
            values,
            heads,
            dim,
            keys,
            q,
            k,
            w: rng.normals(rows * heads).iter().map(|x| x * 0.4).collect(),
            start,
            end,
            topk,
            indices,
            columns,
            target,
            attention_heads,
            d_qk,
            attention_q,
            kv,
            lse: vec![0.0; rows * attention_heads],
            scale: 0.21,
            layer_weight: 0.3,
        };
        for r in 0..rows {
            for h in 0..attention_heads {
                let seen = (0..(case.end[r] - case.start[r]).max(0) as usize)
                    .map(|p| case.attention_score(r, h, p).exp());
                case.lse[r * attention_heads + h] = seen.sum::<f64>().ln() as f32;
            }
        }
        for r in 0..rows {
            if let Some(target) = &mut case.target
                && case.indices.as_ref().is_none_or(|v| v[r * topk..][..topk] != [-1; 9])
            {
                target[r * columns] = 1.0; // A sum above 0.
            }
            if case.columns_of(r).is_empty() {
                case.q[r * heads * dim..][..heads * dim].fill(f32::NAN);
                case.w[r * heads..][..heads].fill(f32::INFINITY);
                case.lse[r * attention_heads..][..attention_heads].fill(f32::NAN);
                if let Some(target) = &mut case.target {
                    target[r * columns..][..columns].fill(-1.0);
                }
            }
        }
        let mut first = 0;
        for &n in lengths {
            first += n + 1;
            case.k[(first - 1) * dim..first * dim].fill(f32::NAN);
            case.kv[(first - 1) * d_qk..first * d_qk].fill(f32::INFINITY);
        }
        case
    }

    pub fn rows(&self) -> usize {
        self.start.len()
    }

    /// Column of the target and key of all that takes part in a row.
    pub fn columns_of(&self, r: usize) -> Vec<(usize, usize)> {
        let start = self.start[r] as usize;
        match &self.indices {
            None => {
                (0..(self.end[r] - self.start[r]).max(0) as usize).map(|p| (p, start + p)).collect()
            }
            Some(v) => (0..self.topk)
                .filter(|c| v[r * self.topk + c] >= 0)
                .map(|c| (c, start + v[r * self.topk + c] as usize))
                .collect(),
        }
    }

    pub fn attention_score(&self, r: usize, h: usize, p: usize) -> f64 {
        let d = self.d_qk;
        let q = wide(&self.attention_q[(r * self.attention_heads + h) * d..][..d]);
        let kv = wide(&self.kv[(self.start[r] as usize + p) * d..][..d]);
        f64::from(self.scale) * dot(&q, &kv)
    }

    /// The target of a row, normalised.
    pub fn p(&self, r: usize) -> Vec<f64> {
        let start = self.start[r] as usize;
        let one = |&(column, key): &(usize, usize)| match &self.target {
            Some(t) => f64::from(t[r * self.columns + column]),
            None => (0..self.attention_heads)
                .map(|h| {
                    let lse = f64::from(self.lse[r * self.attention_heads + h]);
                    (self.attention_score(r, h, key - start) - lse).exp()
                })
                .sum(),
        };
        let p: Vec<f64> = self.columns_of(r).iter().map(one).collect();
        let sum: f64 = p.iter().sum();
        p.iter().map(|p| p / sum).collect()
    }

    pub fn live(&self) -> usize {
        (0..self.rows()).filter(|&r| !self.columns_of(r).is_empty()).count()
    }

    /// `q·k` of a row, by position and head, the scores, and their softmax.
    pub fn forward(
        &self,
        r: usize,
        q: &[f64],
        k: &[f64],
        w: &[f64],
    ) -> (Vec<Vec<f64>>, Vec<f64>, Vec<f64>) {
        let (heads, dim) = (self.heads, self.dim);
        let products: Vec<Vec<f64>> = self
            .columns_of(r)
            .iter()
            .map(|&(_, key)| {
                (0..heads)
                    .map(|h| dot(&q[(r * heads + h) * dim..][..dim], &k[key * dim..][..dim]))
                    .collect()
            })
            .collect();
        let scores: Vec<f64> = products
            .iter()
            .map(|d| d.iter().enumerate().map(|(h, d)| w[r * heads + h] * d.max(0.0)).sum())
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let z: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        let softmax = scores.iter().map(|s| (s - top).exp() / z).collect();
        (products, scores, softmax)
    }

    pub fn loss(&self, p: &[Vec<f64>], q: &[f64], k: &[f64], w: &[f64]) -> f64 {
        let mut sum = 0.0;
        for (r, p) in p.iter().enumerate() {
            let (_, _, softmax) = self.forward(r, q, k, w);
            for (p, q) in p.iter().zip(softmax) {
                sum += if *p > 0.0 { p * (p.ln() - q.ln()) } else { 0.0 };
            }
        }
        f64::from(self.layer_weight) * sum / self.live() as f64
    }

    pub fn all_p(&self) -> Vec<Vec<f64>> {
        (0..self.rows()).map(|r| self.p(r)).collect()
    }

    /// Loss, and its gradients by q, k and w.
    pub fn reference(&self) -> (f64, [Vec<f64>; 3]) {
        let (q, k, w) = (wide(&self.q), wide(&self.k), wide(&self.w));
        let (heads, dim) = (self.heads, self.dim);
        let mut grads = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; w.len()]];
        let scale = f64::from(self.layer_weight) / self.live() as f64;
        let all = self.all_p();
        for (r, p) in all.iter().enumerate() {
            let (products, _, softmax) = self.forward(r, &q, &k, &w);
            for (j, &(_, key)) in self.columns_of(r).iter().enumerate() {
                let by_score = scale * (softmax[j] - p[j]);
                for h in 0..heads {
                    let (d, weight, at) = (products[j][h], w[r * heads + h], (r * heads + h) * dim);
                    if d > 0.0 {
                        grads[2][r * heads + h] += by_score * d;
                        for i in 0..dim {
                            grads[0][at + i] += by_score * weight * k[key * dim + i];
                            grads[1][key * dim + i] += by_score * weight * q[at + i];
                        }
                    }
                }
            }
        }
        (self.loss(&all, &q, &k, &w), grads)
    }

    pub fn args<'a>(
        &'a self,
        memory: &'a mut Memory,
        out: &'a mut Out,
        grads: bool,
    ) -> DistillArgs<'a> {
        let (rows, heads, dim, keys) = (self.rows(), self.heads, self.dim, self.keys);
        let half = self.values == Values::Bf16;
        let float = |name, x: &'a [f32], halves: &'a mut Vec<bf16>, shape: &[usize]| {
            if !half {
                return Tensor::from_slice(name, x, shape).unwrap();
            }
            *halves = x.iter().map(|&x| bf16::from_f32(x)).collect();
            Tensor::from_slice(name, halves.as_slice(), shape).unwrap()
        };
        let given = self.target.is_some();
        let Memory { q, k, attention_q, kv } = memory;
        let a = (self.attention_heads, self.d_qk);
        DistillArgs {
            q: float("q", &self.q, q, &[rows, heads, dim]),
            k: float("k", &self.k, k, &[keys, dim]),
            weights: Tensor::from_slice("weights", &self.w, &[rows, heads]).unwrap(),
            row_start: Some(Tensor::from_slice("row_start", &self.start, &[rows]).unwrap()),
            row_end: Some(Tensor::from_slice("row_end", &self.end, &[rows]).unwrap()),
            indices: self
                .indices
                .as_ref()
                .map(|v| Tensor::from_slice("indices", v, &[rows, self.topk]).unwrap()),
            target: self
                .target
                .as_ref()
                .map(|v| Tensor::from_slice("target", v, &[rows, self.columns]).unwrap()),
            attention_q: (!given)
                .then(|| float("attention_q", &self.attention_q, attention_q, &[rows, a.0, a.1])),
            kv: (!given).then(|| float("kv", &self.kv, kv, &[keys, a.1])),
            lse: (!given).then(|| Tensor::from_slice("lse", &self.lse, &[rows, a.0]).unwrap()),
            softmax_scale: self.scale,
            layer_weight: self.layer_weight,
            loss: Tensor::from_slice_mut("loss", &mut out.loss, &[1]).unwrap(),
            grad_q: grads.then(|| {
                Tensor::from_slice_mut("grad_q", &mut out.q, &[rows, heads, dim]).unwrap()
            }),
            grad_k: grads
                .then(|| Tensor::from_slice_mut("grad_k", &mut out.k, &[keys, dim]).unwrap()),
            grad_weights: grads.then(|| {
                Tensor::from_slice_mut("grad_weights", &mut out.w, &[rows, heads]).unwrap()
            }),
        }
    }

    pub fn zeros(&self) -> Out {
        Out {
            loss: vec![0.0],
            q: vec![0.0; self.q.len()],
            k: vec![0.0; self.k.len()],
            w: vec![0.0; self.w.len()],
        }
    }

    pub fn add_to(&self, cpu: &Cpu, out: &mut Out) {
        let mut memory = Memory::default();
        call(cpu, self.args(&mut memory, out, true)).unwrap();
    }

    pub fn run(&self, cpu: &Cpu) -> Out {
        let mut out = self.zeros();
        self.add_to(cpu, &mut out);
        out
    }

    /// Against the reference: loss to 1e-5; gradients to 1e-4 of each number, or 2e-6 of the largest.
    #[track_caller]
    pub fn compare(&self, out: &Out) {
        self.compare_with(2e-6, out);
    }

    /// The same with another part of the largest.
    #[track_caller]
    pub fn compare_with(&self, part: f64, out: &Out) {
        let (loss, grads) = self.reference();
        let got = f64::from(out.loss[0]);
        assert!((got - loss).abs() <= 1e-5 * loss.abs() + 1e-9, "loss {got}, not {loss}");
        for (name, got, want) in
            [("q", &out.q, &grads[0]), ("k", &out.k, &grads[1]), ("w", &out.w, &grads[2])]
        {
            let largest = want.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            for (i, (&got, want)) in got.iter().zip(want).enumerate() {
                let off = (f64::from(got) - want).abs();
                assert!(
                    off <= 1e-4 * want.abs() + part * largest,
                    "{name}[{i}]: {got}, not {want}"
                );
            }
        }
    }
}

/// bf16 copies of a case's inputs.
#[derive(Default)]
pub struct Memory {
    pub q: Vec<bf16>,
    pub k: Vec<bf16>,
    pub attention_q: Vec<bf16>,
    pub kv: Vec<bf16>,
}

pub fn call(cpu: &Cpu, args: DistillArgs<'_>) -> indexcache::error::Result<()> {
    let op = args.check()?;
    // Scratch holds whatever it held.
    let mut workspace = vec![0xff; op.workspace(cpu.threads())];
    cpu.distill(&op, &mut workspace)
}

pub const RAGGED: [usize; 5] = [1, 40, 0, 17, 70];

pub fn kinds() -> impl Iterator<Item = Case> {
    let values = [Values::F32, Values::Bf16, Values::Ties];
    values.into_iter().enumerate().flat_map(|(i, values)| {
        [(false, true), (true, true), (false, false), (true, false)].into_iter().map(
            move |(restricted, given)| Case::new(99 + i as u64, &RAGGED, values, restricted, given),
        )
    })
}
