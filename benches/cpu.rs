//! What the CPU operations reach of this machine's measured peak: `cargo bench --bench cpu`.
//!
//! Medians over warm repetitions. Peaks are measured first, in the same run and with the same threads. The last
//! column counts CPU time instead of wall time: on a machine that others use too, it is the one that means something.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use half::bf16;
use indexcache::backend::cpu::{Cpu, Isa};
use indexcache::fp8;
use indexcache::ops::*;
use indexcache::tensor::{Element, F8E4M3, Tensor};
use std::hint::black_box;
use std::time::Instant;

/// Median seconds of a call.
struct Time {
    wall: f64,
    /// Of all threads.
    cpu: f64,
}

fn cpu_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

/// After one call to warm up: at least five, for at least half a second.
fn median(mut call: impl FnMut()) -> Time {
    call();
    let (start, mut wall, mut cpu) = (Instant::now(), vec![], vec![]);
    while wall.len() < 5 || start.elapsed().as_secs_f64() < 0.5 {
        let (t, c) = (Instant::now(), cpu_seconds());
        call();
        wall.push(t.elapsed().as_secs_f64());
        cpu.push(cpu_seconds() - c);
    }
    let middle = |mut v: Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    Time { wall: middle(wall), cpu: middle(cpu) }
}

/// Runs `work` on each thread for half a second and gives all threads' best units a second: a peak is a best case.
fn rate(threads: usize, units: f64, work: impl Fn() + Sync) -> f64 {
    let best = || {
        let (start, mut best) = (Instant::now(), f64::MAX);
        while start.elapsed().as_secs_f64() < 0.5 {
            let t = Instant::now();
            work();
            best = best.min(t.elapsed().as_secs_f64());
        }
        units / best
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..threads).map(|_| s.spawn(best)).collect();
        all.into_iter().map(|t| t.join().unwrap()).sum()
    })
}

/// Peaks in GFLOP/s: f32 FMA and bf16 dot products (0 where there are none).
fn peaks(threads: usize) -> (f64, f64) {
    const ROUNDS: usize = 400_000;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f")]
        fn fma512() {
            let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
            let mut x = [b; 12];
            for _ in 0..ROUNDS {
                x.iter_mut().for_each(|x| *x = _mm512_fmadd_ps(*x, a, b));
            }
            black_box(x);
        }
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn dot512() {
            // SAFETY: any bits are bf16 pairs.
            let a: __m512bh =
                unsafe { std::mem::transmute(_mm512_set1_epi32(black_box(0x3f80_3f80))) };
            let mut x = [_mm512_set1_ps(black_box(1.0)); 12];
            for _ in 0..ROUNDS {
                x.iter_mut().for_each(|x| *x = _mm512_dpbf16_ps(*x, a, a));
            }
            black_box(x);
        }
        #[target_feature(enable = "avx2,fma")]
        fn fma256() {
            let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
            let mut x = [b; 12];
            for _ in 0..ROUNDS {
                x.iter_mut().for_each(|x| *x = _mm256_fmadd_ps(*x, a, b));
            }
            black_box(x);
        }
        let flop = |lanes: f64| 2.0 * 12.0 * lanes * ROUNDS as f64;
        match Isa::detect() {
            // SAFETY: detected.
            Isa::Avx512 => unsafe {
                return (
                    rate(threads, flop(16.0), || fma512()) / 1e9,
                    rate(threads, flop(32.0), || dot512()) / 1e9,
                );
            },
            // SAFETY: detected.
            Isa::Avx2 => unsafe { return (rate(threads, flop(8.0), || fma256()) / 1e9, 0.0) },
            Isa::Scalar => {}
        }
    }
    let flop = 2.0 * 16.0 * ROUNDS as f64 / 16.0;
    let scalar = || {
        let mut x = [black_box(1.0f32); 16];
        for _ in 0..ROUNDS / 16 {
            x.iter_mut().for_each(|x| *x = *x * 0.5 + 1.0);
        }
        black_box(x);
    };
    (rate(threads, flop, scalar) / 1e9, 0.0)
}

/// Read bandwidth in GB/s, well past the caches.
fn bandwidth(threads: usize) -> f64 {
    let data = vec![1u64; 64 << 20 >> 3 << 2];
    let part = data.len() / threads;
    let time = median(|| {
        std::thread::scope(|s| {
            for chunk in data.chunks(part) {
                s.spawn(move || black_box(chunk.iter().fold(0u64, |a, &x| a.wrapping_add(x))));
            }
        });
    });
    data.len() as f64 * 8.0 / time.wall / 1e9
}

fn t<'a, T: Element>(name: &'static str, data: &'a [T], shape: &[usize]) -> Tensor<'a> {
    Tensor::from_slice(name, data, shape).unwrap()
}

fn m<'a, T: Element>(name: &'static str, data: &'a mut [T], shape: &[usize]) -> Tensor<'a> {
    Tensor::from_slice_mut(name, data, shape).unwrap()
}

fn normals(n: usize, mut seed: u64) -> Vec<f32> {
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| next()).sum::<f32>() * 1.7).collect()
}

struct Report {
    threads: usize,
    fma: f64,
    dot: f64,
}

impl Report {
    /// Work against a peak.
    fn flops(&self, what: &str, time: &Time, flop: f64, dots: bool) {
        let peak = if dots && self.dot > 0.0 { self.dot } else { self.fma };
        let rate = flop / time.wall / 1e9;
        let of_cpu = flop / time.cpu / 1e9 * self.threads as f64;
        println!(
            "{what:<56} {:>9.3} ms {rate:>7.1} GFLOP/s {:>5.1} % of peak {:>5.1} %",
            time.wall * 1e3,
            100.0 * rate / peak,
            100.0 * of_cpu / peak,
        );
    }
    /// Bytes read.
    fn bytes(&self, what: &str, time: &Time, bytes: usize) {
        println!(
            "{what:<56} {:>9.3} ms {:>7.2} GB/s    ({:.3} ms of CPU time)",
            time.wall * 1e3,
            bytes as f64 / time.wall / 1e9,
            time.cpu * 1e3,
        );
    }
}

fn main() {
    // `cargo test --benches` runs this too: then there is nothing to measure.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let cpu = Cpu::new(0).unwrap();
    let threads = cpu.threads();
    let (fma, dot) = peaks(threads);
    println!("{threads} threads, {:?}", Isa::detect());
    println!(
        "peak: f32 FMA {fma:.0} GFLOP/s, bf16 dot products {dot:.0} GFLOP/s, read {:.1} GB/s",
        bandwidth(threads)
    );
    let report = Report { threads, fma, dot };

    let (dim, k, keys) = (128, 2048, 32768);
    let pages = keys / PAGE;
    for (heads, rows) in [(32, 256), (64, 256), (32, 1), (64, 1), (8, 1)] {
        let q: Vec<F8E4M3> =
            normals(rows * heads * dim, 1).iter().map(|&x| F8E4M3(fp8::encode(x))).collect();
        let w: Vec<f32> = normals(rows * heads, 2).iter().map(|x| x.abs()).collect();
        let mut store: Vec<u8> = vec![0; pages * PAGE * (dim + 4)];
        let key_values = normals(keys * dim, 3);
        let slots: Vec<i32> = (0..keys as i32).collect();
        let write = IndexKWriteArgs {
            k: t("k", &key_values, &[keys, dim]),
            slots: t("slots", &slots, &[keys]),
            pages: m("pages", &mut store, &[pages, PAGE * (dim + 4)]),
            hadamard: true,
            pow2_scale: true,
        };
        let write = write.check().unwrap();
        let time = median(|| cpu.index_k_write(&write).unwrap());
        if (heads, rows) == (32, 256) {
            report.bytes(&format!("index_k_write, {keys} keys, Hadamard"), &time, keys * dim * 4);
        }
        let table: Vec<i32> = (0..pages as i32).map(|i| (i * 5) % pages as i32).collect();
        let end = vec![keys as i32; rows];
        let args = IndexerArgs {
            q: t("q", &q, &[rows, heads, dim]),
            weights: t("weights", &w, &[rows, heads]),
            k: t("k", &store, &[pages, PAGE, 1, dim + 4]),
            k_scale: None,
            map: KeyMapArgs {
                block_table: Some(t("block_table", &table, &[1, pages])),
                row_end: Some(t("row_end", &end, &[rows])),
                ..Default::default()
            },
        };
        let flop = 2.0 * (rows * heads * dim * keys) as f64;
        let mut indices = vec![0i32; rows * k];
        let op = args.check_select(m("indices", &mut indices, &[rows, k])).unwrap();
        let mut workspace = vec![0u8; op.workspace(threads)];
        let time = median(|| cpu.select(&op, &mut workspace).unwrap());
        let what = format!("select, {rows} x {heads} heads x {keys} keys, k {k}");
        report.flops(&what, &time, flop, true);
        let mut logits = vec![0f32; rows * keys];
        let op = args.check_logits(m("logits", &mut logits, &[rows, keys])).unwrap();
        let time = median(|| cpu.indexer_logits(&op).unwrap());
        report.flops(&format!("logits, {rows} x {heads} heads x {keys} keys"), &time, flop, true);
        let op = TopKArgs {
            logits: t("logits", &logits, &[rows, keys]),
            row_start: None,
            row_end: None,
            indices: m("indices", &mut indices, &[rows, k]),
        };
        let op = op.check().unwrap();
        let time = median(|| cpu.topk(&op).unwrap());
        report.bytes(&format!("topk, {rows} x {keys}, k {k}"), &time, rows * keys * 4);
    }

    let (heads, d_qk, d_v) = (64, 576, 512);
    let tokens = 16384;
    let kv = normals(tokens * d_qk, 4);
    let slots: Vec<i32> = (0..tokens as i32).collect();
    let mut packed = vec![0u8; tokens * KV_FP8_BYTES];
    let half: Vec<bf16> = kv.iter().map(|&x| bf16::from_f32(x)).collect();
    let write = KvWriteArgs {
        kv: t("kv", &half, &[tokens, d_qk]),
        slots: t("slots", &slots, &[tokens]),
        pages: m("pages", &mut packed, &[tokens / PAGE, PAGE, KV_FP8_BYTES]),
    };
    let write = write.check().unwrap();
    let time = median(|| cpu.kv_write(&write).unwrap());
    report.bytes(&format!("kv_write, {tokens} rows of {KV_FP8_BYTES} B"), &time, tokens * d_qk * 2);
    for rows in [16, 1] {
        let q: Vec<bf16> =
            normals(rows * heads * d_qk, 5).iter().map(|&x| bf16::from_f32(x)).collect();
        let indices: Vec<i32> =
            (0..rows).flat_map(|r| (0..k as i32).map(move |i| i * 8 + r as i32 % 8)).collect();
        for (name, store) in [
            ("bf16", t("kv", &half, &[tokens, d_qk])),
            ("656 B", t("kv", &packed, &[tokens, KV_FP8_BYTES])),
        ] {
            let mut out = vec![bf16::ZERO; rows * heads * d_v];
            let op = SparseAttentionArgs {
                q: t("q", &q, &[rows, heads, d_qk]),
                kv: store,
                indices: t("indices", &indices, &[rows, k]),
                form: IndexForm::Slots,
                map: KeyMapArgs::default(),
                row_topk: None,
                sink: None,
                softmax_scale: (d_qk as f32).sqrt().recip(),
                out: m("out", &mut out, &[rows, heads, d_v]),
                lse: None,
                probs: None,
            };
            let op = op.check().unwrap();
            let mut workspace = vec![0u8; op.workspace(threads)];
            let time = median(|| cpu.sparse_attention(&op, &mut workspace).unwrap());
            let flop = 2.0 * (rows * heads * k * (d_qk + d_v)) as f64;
            let what = format!("attention, {rows} x {heads} heads, {d_qk}/{d_v}, topk {k}, {name}");
            report.flops(&what, &time, flop, false);
        }
    }
}
