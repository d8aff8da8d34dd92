//! The CPU operations against their reference versions, and against themselves: on every instruction set, with any
//! number of threads, the same bits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::data::{Rng, m, padded, t};
use half::bf16;
use indexcache::backend::cpu::{Cpu, Isa, reference};
use indexcache::fp8;
use indexcache::ops::*;
use indexcache::tensor::{Device, Element, F8E4M3, Tensor};

const ISAS: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];

/// One backend per instruction set that this machine has.
fn cpus(threads: usize) -> Vec<Cpu> {
    ISAS.into_iter().filter_map(|isa| Cpu::with_isa(threads, isa).ok()).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F8,
    Bf16,
    PagedF8,
    PagedBf16,
}
const KINDS: [Kind; 4] = [Kind::F8, Kind::Bf16, Kind::PagedF8, Kind::PagedBf16];

/// Memory of an indexer call. Rows belong to requests of different lengths, one row is padding, page order is
/// shuffled, q and k have padded rows.
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
    k_scale: Vec<f32>,
    k_pages: Vec<u8>,
    table: Vec<i32>,
    requests: usize,
    row_request: Vec<i32>,
    row_start: Vec<i32>,
    row_end: Vec<i32>,
}

const PAD: usize = 32;

impl Index {
    /// `levels`: so many different values in q and k (few give ties in bulk); 0 for a normal distribution.
    fn new(
        rng: &mut Rng,
        kind: Kind,
        lens: &[usize],
        heads: usize,
        dim: usize,
        levels: usize,
    ) -> Self {
        let rows = lens.len();
        let (mut row_request, mut row_start, mut row_end) = (vec![], vec![], vec![]);
        let longest = lens.iter().copied().max().unwrap_or(0);
        let per = longest.div_ceil(PAGE).max(1);
        let paged = matches!(kind, Kind::PagedF8 | Kind::PagedBf16);
        let requests = 3;
        for (r, &len) in lens.iter().enumerate() {
            // Runs of rows of one request, some alone.
            let request = (r / 3 + usize::from(r == 1)) % requests;
            row_request.push(if len == 0 && r % 2 == 1 { -1 } else { request as i32 });
            row_start.push(if paged { 0 } else { 7 * request as i32 });
            row_end.push(row_start[r] + len as i32);
        }
        let pages = requests * per + 2;
        let keys = pages * PAGE + 7 * requests;
        let value = |rng: &mut Rng| match levels {
            0 => rng.normal(),
            n => rng.below(n) as f32 - (n / 2) as f32,
        };
        let codes = |rng: &mut Rng, n| -> Vec<F8E4M3> {
            (0..n).map(|_| F8E4M3(fp8::encode(value(rng)))).collect()
        };
        let halves = |rng: &mut Rng, n| -> Vec<bf16> {
            (0..n).map(|_| bf16::from_f32(value(rng))).collect()
        };
        let scale = |rng: &mut Rng| if levels > 0 { 0.5 } else { rng.normal().abs() + 0.1 };
        let mut k_pages = vec![0u8; pages * (PAGE * (dim + 4) + PAD)];
        for page in k_pages.chunks_mut(PAGE * (dim + 4) + PAD) {
            let (values, rest) = page.split_at_mut(PAGE * dim);
            values.iter_mut().for_each(|b| *b = fp8::encode(value(rng)));
            for s in rest[..4 * PAGE].chunks_mut(4) {
                s.copy_from_slice(&scale(rng).to_le_bytes());
            }
        }
        Index {
            kind,
            rows,
            heads,
            dim,
            pages,
            q8: codes(rng, rows * (heads * dim + PAD)),
            q16: halves(rng, rows * (heads * dim + PAD)),
            w: (0..rows * heads).map(|_| if levels > 0 { 0.25 } else { rng.normal() }).collect(),
            k8: codes(rng, keys * (dim + PAD)),
            k16: halves(rng, keys * (dim + PAD).max(1)),
            k_scale: (0..keys).map(|_| scale(rng)).collect(),
            k_pages,
            table: rng.shuffled(pages)[..requests * per].to_vec(),
            requests,
            row_request,
            row_start,
            row_end,
        }
    }

    fn args(&self) -> IndexerArgs<'_> {
        let (rows, heads, dim) = (self.rows, self.heads, self.dim);
        let paged = matches!(self.kind, Kind::PagedF8 | Kind::PagedBf16);
        let f8 = matches!(self.kind, Kind::F8 | Kind::PagedF8);
        let keys = self.k_scale.len();
        let per_request = self.table.len() / self.requests;
        IndexerArgs {
            q: match f8 {
                true => padded("q", &self.q8, &[rows, heads, dim], PAD),
                false => padded("q", &self.q16, &[rows, heads, dim], PAD),
            },
            weights: t("weights", &self.w, &[rows, heads]),
            k: match self.kind {
                Kind::F8 => padded("k", &self.k8, &[keys, dim], PAD),
                Kind::Bf16 => padded("k", &self.k16, &[keys, dim], PAD),
                Kind::PagedF8 => padded("k", &self.k_pages, &[self.pages, PAGE, 1, dim + 4], PAD),
                Kind::PagedBf16 => padded("k", &self.k16, &[self.pages, PAGE, dim], PAD),
            },
            k_scale: (self.kind == Kind::F8).then(|| t("k_scale", &self.k_scale, &[keys])),
            map: KeyMapArgs {
                block_table: paged
                    .then(|| t("block_table", &self.table, &[self.requests, per_request])),
                row_request: paged.then(|| t("row_request", &self.row_request, &[rows])),
                row_start: (!paged).then(|| t("row_start", &self.row_start, &[rows])),
                row_end: Some(t("row_end", &self.row_end, &[rows])),
            },
        }
    }

    fn len(&self, r: usize) -> usize {
        if self.row_request[r] < 0 && self.row_end[r] == 0 {
            return 0;
        }
        (self.row_end[r] - self.row_start[r]).max(0) as usize
    }

    fn logits(&self, cpu: Option<&Cpu>, columns: usize) -> Vec<f32> {
        let mut out = vec![7.0f32; self.rows * columns];
        let op = self.args().check_logits(m("logits", &mut out, &[self.rows, columns])).unwrap();
        match cpu {
            Some(cpu) => cpu.indexer_logits(&op).unwrap(),
            None => reference::indexer_logits(&op),
        }
        out
    }

    fn select(&self, cpu: &Cpu, k: usize) -> Vec<i32> {
        let mut out = vec![-7; self.rows * k];
        let op = self.args().check_select(m("indices", &mut out, &[self.rows, k])).unwrap();
        let need = op.workspace(cpu.threads());
        // Any alignment, and whatever was there before.
        let mut ws = vec![0xa5u8; need + 3];
        let e = cpu.select(&op, &mut ws[..need.saturating_sub(1)]);
        assert!(need == 0 || e.is_err_and(|e| e.message.contains(&need.to_string())));
        cpu.select(&op, &mut ws[3..]).unwrap();
        out
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn logits_match_the_reference_and_have_the_same_bits_everywhere() {
    let mut rng = Rng(1);
    let lens = [0, 1, 63, 64, 65, 0, 200, 333, 130, 5, 320];
    for kind in KINDS {
        for (heads, dim) in
            [(1, 16), (3, 32), (8, 128), (32, 64), (64, 128), (2, 256), (5, 48), (128, 16)]
        {
            let ix = Index::new(&mut rng, kind, &lens, heads, dim, 0);
            let columns = 340;
            let want = ix.logits(None, columns);
            let mut first: Option<Vec<u32>> = None;
            for (cpu, threads) in (1..=3).flat_map(|n| cpus(n).into_iter().map(move |c| (c, n))) {
                let got = ix.logits(Some(&cpu), columns);
                for (i, (&g, &w)) in got.iter().zip(&want).enumerate() {
                    // Sums of heads * dim products of numbers about 1.
                    let near = (g - w).abs() < 3e-5 * (heads * dim) as f32;
                    assert!(
                        g == w || near,
                        "{kind:?} {heads}x{dim} {cpu:?}: row {} column {}: {g} for {w}",
                        i / columns,
                        i % columns
                    );
                }
                let got = bits(&got);
                assert!(
                    *first.get_or_insert_with(|| got.clone()) == got,
                    "{kind:?} {heads}x{dim} {threads} threads {cpu:?}"
                );
            }
        }
    }
}

#[test]
fn bf16_logits_are_the_f32_ones_rounded() {
    let mut rng = Rng(2);
    let ix = Index::new(&mut rng, Kind::PagedF8, &[100, 70, 0], 4, 64, 0);
    let cpu = Cpu::new(2).unwrap();
    let full = ix.logits(Some(&cpu), 111);
    let mut half = vec![bf16::ZERO; 3 * 111];
    let op = ix.args().check_logits(m("logits", &mut half, &[3, 111])).unwrap();
    cpu.indexer_logits(&op).unwrap();
    assert!(full.iter().zip(&half).all(|(f, h)| bf16::from_f32(*f).to_bits() == h.to_bits()));
}

#[test]
fn select_is_logits_then_topk_whatever_the_cut() {
    let mut rng = Rng(3);
    let k = 96;
    // One row, a few, more than a block; all well over k, around k, and under it.
    let many: Vec<usize> = (0..21)
        .map(|i| match i % 7 {
            0 => 0,
            1 => k - 1,
            2 => k,
            3 => k + 1,
            _ => 500 + 149 * i,
        })
        .collect();
    for lens in [&[4001][..], &[3000, 2999, 0, 97, 4100], &many] {
        for kind in KINDS {
            for (heads, levels) in [(2, 3), (7, 0)] {
                let ix = Index::new(&mut rng, kind, lens, heads, 32, levels);
                let columns = lens.iter().copied().max().unwrap();
                let logits = ix.logits(Some(&Cpu::new(1).unwrap()), columns);
                let mut want = vec![0; lens.len() * k];
                for (r, out) in want.chunks_mut(k).enumerate() {
                    let row = &logits[r * columns..][..ix.len(r)];
                    reference::top(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), out);
                }
                for threads in 1..=5 {
                    for cpu in cpus(threads) {
                        let got = ix.select(&cpu, k);
                        assert!(
                            got == want,
                            "{kind:?} {lens:?} heads {heads} levels {levels} {cpu:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn select_takes_any_k() {
    let mut rng = Rng(4);
    let ix = Index::new(&mut rng, Kind::PagedF8, &[9000, 8999, 30], 1, 16, 5);
    let logits = ix.logits(Some(&Cpu::new(2).unwrap()), 9000);
    for k in [1, 2, 63, 64, 1000, 2048, 4096] {
        let mut want = vec![0; 3 * k];
        for (r, out) in want.chunks_mut(k).enumerate() {
            let row = &logits[r * 9000..][..ix.len(r)];
            reference::top(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), out);
        }
        for threads in [1, 4] {
            assert!(ix.select(&Cpu::new(threads).unwrap(), k) == want, "k {k}");
        }
    }
}

#[test]
fn nan_ranks_lowest_and_hurts_nobody() {
    let mut rng = Rng(5);
    for kind in [Kind::F8, Kind::Bf16] {
        let mut ix = Index::new(&mut rng, kind, &[700, 650], 3, 32, 0);
        // Keys 100..700 of either row's request are NaN or infinite.
        for i in 100..690 {
            let at = i * (32 + PAD);
            ix.k8[at + i % 32] = F8E4M3(if i % 2 == 0 { 0x7f } else { 0xff });
            ix.k16[at + i % 32] = [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY][i % 3];
        }
        let want: Vec<u32> = bits(&ix.logits(Some(&Cpu::with_isa(1, Isa::Scalar).unwrap()), 700));
        assert!(want.contains(&f32::NAN.to_bits()));
        let mut selected: Option<Vec<i32>> = None;
        for cpu in cpus(2) {
            assert_eq!(bits(&ix.logits(Some(&cpu), 700)), want);
            let got = ix.select(&cpu, 128);
            let live = |r: usize| {
                (0..ix.len(r)).filter(|&s| !f32::from_bits(want[r * 700 + s]).is_nan()).count()
            };
            for (r, row) in got.chunks(128).enumerate() {
                assert!(row.windows(2).all(|w| w[0] < w[1]), "ascending");
                let finite =
                    row.iter().filter(|&&s| !f32::from_bits(want[r * 700 + s as usize]).is_nan());
                assert_eq!(finite.count(), live(r).min(128));
            }
            assert!(*selected.get_or_insert_with(|| got.clone()) == got);
        }
    }
}

#[test]
fn tiny_bf16_values_count_as_zero_on_every_instruction_set() {
    let mut rng = Rng(6);
    let mut ix = Index::new(&mut rng, Kind::Bf16, &[300], 2, 32, 0);
    for (i, x) in ix.q16.iter_mut().chain(&mut ix.k16).enumerate() {
        *x = bf16::from_f32(x.to_f32() * 2f32.powi(-((i * 7 % 140) as i32)));
    }
    let all: Vec<_> = cpus(1).iter().map(|c| bits(&ix.logits(Some(c), 300))).collect();
    assert!(all.windows(2).all(|w| w[0] == w[1]));
}

fn run_topk(
    cpu: &Cpu,
    logits: &Tensor<'_>,
    bounds: Option<(&[i32], &[i32])>,
    k: usize,
) -> Vec<i32> {
    let rows = logits.shape()[0];
    let mut out = vec![-7; rows * k];
    let op = TopKArgs {
        logits: *logits,
        row_start: bounds.map(|b| t("row_start", b.0, &[rows])),
        row_end: bounds.map(|b| t("row_end", b.1, &[rows])),
        indices: m("indices", &mut out, &[rows, k]),
    };
    cpu.topk(&op.check().unwrap()).unwrap();
    out
}

#[test]
fn topk_is_exact_on_hostile_rows() {
    let mut rng = Rng(7);
    let n = 9000;
    let mut rows: Vec<Vec<f32>> = vec![];
    let mut uniform = |lo: f32, hi: f32| -> Vec<f32> {
        (0..n).map(|_| lo + (hi - lo) * (rng.bits() >> 40) as f32 / (1u64 << 24) as f32).collect()
    };
    rows.push(uniform(1.0, 1.2));
    rows.push(uniform(1.0, 1.001));
    rows.push(uniform(-1e5, 1e5));
    rows.push(uniform(-1.2, -1.0));
    rows.push(uniform(-1e-40, 1e-40));
    rows.push(uniform(0.0, 64.0).iter().map(|x| x.floor()).collect());
    rows.push(uniform(0.0, 1.0).iter().map(|x| if *x < 0.99 { 0.0 } else { *x }).collect());
    rows.push(uniform(0.0, 1.0).iter().map(|x| if *x < 0.5 { 0.0 } else { -0.0 }).collect());
    rows.push(vec![f32::NEG_INFINITY; n]);
    rows.push(vec![3.0; n]);
    rows.push((0..n).map(|i| i as f32).collect());
    rows.push((0..n).map(|i| -(i as f32)).collect());
    rows.push((0..n).map(|i| [f32::NAN, f32::INFINITY, f32::MIN, -f32::NAN][i % 4]).collect());
    rows.push(vec![f32::NAN; n]);
    let flat: Vec<f32> = rows.concat();
    for k in [1, 100, 2048, 4096] {
        let mut want = vec![0; rows.len() * k];
        for (row, out) in rows.iter().zip(want.chunks_mut(k)) {
            reference::top(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), out);
        }
        for cpu in cpus(2) {
            let got = run_topk(&cpu, &t("logits", &flat, &[rows.len(), n]), None, k);
            for r in 0..rows.len() {
                assert!(got[r * k..][..k] == want[r * k..][..k], "row {r} k {k} {cpu:?}");
            }
        }
    }
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, ..Default::default() })]

        /// Against a full sort; few levels, so that most scores tie; both dtypes; any bounds.
        #[test]
        fn topk_is_a_full_sort(
            seed in 1u64..u64::MAX,
            rows in 1usize..5,
            columns in 1usize..1500,
            k in 1usize..300,
            levels in 1usize..40,
            half: bool,
            threads in 1usize..4,
        ) {
            let mut rng = Rng(seed);
            let x: Vec<f32> = (0..rows * columns).map(|_| match rng.below(levels + 2) {
                0 => -0.0,
                1 => 0.0,
                n => n as f32 * 0.37 - levels as f32 * 0.2,
            }).collect();
            let y: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let starts: Vec<i32> = (0..rows).map(|_| rng.below(columns + 1) as i32).collect();
            let ends: Vec<i32> = (0..rows).map(|_| rng.below(columns + 1) as i32 - 1).collect();
            let logits = match half {
                true => padded("logits", &y, &[rows, columns], 0),
                false => padded("logits", &x, &[rows, columns], 0),
            };
            for cpu in cpus(threads) {
                for bounds in [None, Some((&starts[..], &ends[..]))] {
                    let got = run_topk(&cpu, &logits, bounds, k);
                    for r in 0..rows {
                        let (a, b) = bounds.map_or((0, columns), |b| {
                            (b.0[r] as usize, b.1[r].max(b.0[r]) as usize)
                        });
                        let row: Vec<f64> = (r * columns + a..r * columns + b)
                            .map(|i| if half { y[i].to_f64() } else { f64::from(x[i]) })
                            .collect();
                        let mut want = vec![0; k];
                        reference::top(&row, &mut want);
                        prop_assert_eq!(&got[r * k..][..k], &want[..], "row {} {:?}", r, &cpu);
                    }
                }
            }
        }

        /// Any shapes: select is logits then top-k.
        #[test]
        fn select_is_logits_then_topk(
            seed in 1u64..u64::MAX,
            heads in 1usize..9,
            sixteenths in 1usize..5,
            levels in 0usize..6,
            rows in 1usize..14,
            k in 1usize..200,
            kind in 0usize..4,
            threads in 1usize..6,
        ) {
            let mut rng = Rng(seed);
            let lens: Vec<usize> = (0..rows).map(|_| rng.below(1200)).collect();
            let ix = Index::new(&mut rng, KINDS[kind], &lens, heads, 16 * sixteenths, levels);
            let columns = lens.iter().copied().max().unwrap().max(1);
            let one = Cpu::new(1).unwrap();
            let logits = ix.logits(Some(&one), columns);
            let ends: Vec<i32> = (0..rows).map(|r| ix.len(r) as i32).collect();
            let starts = vec![0; rows];
            let want = run_topk(&one, &t("logits", &logits, &[rows, columns]), Some((&starts, &ends)), k);
            for cpu in cpus(threads) {
                prop_assert_eq!(&ix.select(&cpu, k), &want);
            }
        }
    }
}

#[test]
fn index_k_bytes_are_the_reference_ones() {
    let mut rng = Rng(8);
    for (dim, hadamard, pow2) in [
        (128, false, false),
        (128, false, true),
        (16, true, true),
        (128, true, false),
        (48, false, true),
    ] {
        let (tokens, pages) = (300, 7);
        let mut k = rng.normals(tokens * dim);
        k[5 * dim..6 * dim].fill(0.0);
        k[6 * dim..7 * dim].iter_mut().for_each(|x| *x *= 1e-8);
        k[7 * dim..8 * dim].iter_mut().for_each(|x| *x *= 1e6);
        if !hadamard {
            k[8 * dim] = f32::INFINITY;
            k[9 * dim + 1] = f32::NAN;
        }
        let half: Vec<bf16> = k.iter().map(|&x| bf16::from_f32(x)).collect();
        // Shuffled, some skipped, and some slots named twice: the later token stays.
        let order = rng.shuffled(pages * PAGE);
        let mut slots: Vec<i32> = order[..tokens].to_vec();
        slots.iter_mut().step_by(17).for_each(|s| *s = -1);
        slots[200] = slots[10];
        slots[201] = slots[11];
        let wide: Vec<i64> = slots.iter().map(|&s| i64::from(s)).collect();
        for bf in [false, true] {
            let write = |cpu: Option<&Cpu>| {
                let mut out = vec![0xeeu8; pages * PAGE * (dim + 4)];
                let op = IndexKWriteArgs {
                    k: if bf { t("k", &half, &[tokens, dim]) } else { t("k", &k, &[tokens, dim]) },
                    slots: if bf {
                        t("slots", &wide, &[tokens])
                    } else {
                        t("slots", &slots, &[tokens])
                    },
                    pages: m("pages", &mut out, &[pages, PAGE * (dim + 4)]),
                    hadamard,
                    pow2_scale: pow2,
                };
                let op = op.check().unwrap();
                match cpu {
                    Some(cpu) => cpu.index_k_write(&op).unwrap(),
                    None => reference::index_k_write(&op),
                }
                out
            };
            let want = write(None);
            for threads in 1..=4 {
                let got = write(Some(&Cpu::new(threads).unwrap()));
                if !hadamard {
                    assert!(got == want, "dim {dim} bf16 {bf}");
                    continue;
                }
                // f32 butterflies and f64 sums may round a code, or a scale's last bit, the other way.
                let off = got.iter().zip(&want).filter(|(a, b)| a != b).count();
                assert!(off < got.len() / 200, "dim {dim}: {off} of {} bytes differ", got.len());
            }
            // Page-planar: code `i` of slot `s` at `64 * dim` bytes per page, its scale after all values.
            let (s, page) = (slots[20] as usize, PAGE * (dim + 4));
            let base = s / PAGE * page;
            let scale = f32::from_le_bytes(
                want[base + PAGE * dim + s % PAGE * 4..][..4].try_into().unwrap(),
            );
            assert!(!pow2 || scale.to_bits() & 0x7f_ffff == 0);
            if !hadamard {
                for i in 0..dim {
                    let back = fp8::decode(want[base + s % PAGE * dim + i]) * scale;
                    assert!(
                        (back - k[20 * dim + i]).abs()
                            <= 0.07 * k[20 * dim + i].abs() + scale * 0.01
                    );
                }
            }
        }
    }
}

#[test]
fn rotating_keys_and_queries_keeps_their_products() {
    let mut rng = Rng(9);
    let (dim, rows, heads) = (128, 5, 3);
    let q = rng.normals(rows * heads * dim);
    let w = rng.normals(rows * heads);
    let cpu = Cpu::new(2).unwrap();
    for hadamard in [false, true] {
        let run = |fast: bool| {
            let (mut codes, mut weights) = (vec![F8E4M3(0); q.len()], vec![0.0f32; w.len()]);
            let op = IndexQQuantizeArgs {
                q: t("q", &q, &[rows, heads, dim]),
                weights: t("weights", &w, &[rows, heads]),
                scale: 0.125,
                hadamard,
                pow2_scale: true,
                q_out: m("q_out", &mut codes, &[rows, heads, dim]),
                weights_out: m("weights_out", &mut weights, &[rows, heads]),
            };
            let op = op.check().unwrap();
            if fast {
                cpu.index_q_quantize(&op).unwrap()
            } else {
                reference::index_q_quantize(&op)
            }
            (codes, weights)
        };
        let ((codes, weights), (codes_ref, weights_ref)) = (run(true), run(false));
        assert_eq!(weights, weights_ref);
        let off = codes.iter().zip(&codes_ref).filter(|(a, b)| a != b).count();
        assert!(off == 0 || hadamard && off < codes.len() / 200, "{off}");
        // q·q in the rotated, quantised form is q·q.
        for i in 0..rows * heads {
            let want: f32 = q[i * dim..][..dim].iter().map(|x| x * x).sum();
            let s = weights[i] / (w[i] * 0.125);
            let got: f32 =
                codes[i * dim..][..dim].iter().map(|c| (fp8::decode(c.0) * s).powi(2)).sum();
            assert!((got / want - 1.0).abs() < 0.02, "{got} {want}");
        }
    }
}

fn kv_pack(kv: &[f32], tokens: usize, page: usize, cpu: Option<&Cpu>) -> Vec<u8> {
    let pages = tokens.div_ceil(page);
    let slots: Vec<i64> = (0..tokens as i64).rev().collect();
    let mut out = vec![0u8; pages * page * KV_FP8_BYTES];
    let op = KvWriteArgs {
        kv: t("kv", kv, &[tokens, 576]),
        slots: t("slots", &slots, &[tokens]),
        pages: m("pages", &mut out, &[pages, page, 1, KV_FP8_BYTES]),
    };
    let op = op.check().unwrap();
    match cpu {
        Some(cpu) => cpu.kv_write(&op).unwrap(),
        None => reference::kv_write(&op),
    }
    out
}

#[test]
fn kv_rows_round_trip() {
    let mut rng = Rng(10);
    let tokens = 130;
    let kv = rng.normals(tokens * 576);
    let want = kv_pack(&kv, tokens, 64, None);
    for threads in 1..=3 {
        assert!(kv_pack(&kv, tokens, 64, Some(&Cpu::new(threads).unwrap())) == want);
    }
    for token in 0..tokens {
        let row = &want[(tokens - 1 - token) * KV_FP8_BYTES..][..KV_FP8_BYTES];
        let x = &kv[token * 576..][..576];
        for i in 0..512 {
            let s = f32::from_le_bytes(row[512 + i / 128 * 4..][..4].try_into().unwrap());
            assert_eq!(s.to_bits() & 0x7f_ffff, 0);
            assert!((fp8::decode(row[i]) * s - x[i]).abs() <= 0.0626 * x[i].abs() + s * 0.001);
        }
        for i in 0..64 {
            let b = bf16::from_le_bytes([row[528 + 2 * i], row[529 + 2 * i]]);
            assert_eq!(b, bf16::from_f32(x[512 + i]));
        }
    }
    // Plain layouts: f32 and bf16 in and out.
    let half: Vec<bf16> = kv.iter().map(|&x| bf16::from_f32(x)).collect();
    let slots: Vec<i32> = rng.shuffled(tokens);
    let mut out = vec![0f32; tokens * 576];
    let op = KvWriteArgs {
        kv: t("kv", &half, &[tokens, 576]),
        slots: t("slots", &slots, &[tokens]),
        pages: m("pages", &mut out, &[tokens / 13, 13, 576]),
    };
    Cpu::new(2).unwrap().kv_write(&op.check().unwrap()).unwrap();
    for (token, &s) in slots.iter().enumerate() {
        assert_eq!(out[s as usize * 576 + 3], half[token * 576 + 3].to_f32());
    }
}

#[derive(Clone, Copy, Debug)]
enum Store {
    F32,
    Bf16,
    Fp8,
}

struct Att {
    rows: usize,
    heads: usize,
    d_qk: usize,
    d_v: usize,
    topk: usize,
    store: Store,
    pages: usize,
    page: usize,
    q: Vec<f32>,
    q16: Vec<bf16>,
    kv: Vec<f32>,
    kv16: Vec<bf16>,
    kv8: Vec<u8>,
    table: Vec<i32>,
    indices: Vec<i32>,
    row_topk: Vec<i32>,
    sink: Vec<f32>,
}

impl Att {
    fn new(
        rng: &mut Rng,
        store: Store,
        rows: usize,
        heads: usize,
        d: (usize, usize),
        topk: usize,
    ) -> Self {
        let (d_qk, d_v) = d;
        let (pages, page) = (9, 50);
        let tokens = pages * page;
        let kv = rng.normals(tokens * d_qk);
        let q = rng.normals(rows * heads * d_qk);
        let mut indices = vec![];
        for r in 0..rows {
            // Ascending with a tail; -1 in between; a row of nothing.
            let mut row = rng.shuffled(6 * page);
            row.truncate(topk);
            row.resize(topk, -1);
            row.sort_by_key(|&i| if i < 0 { i32::MAX } else { i });
            row.iter_mut().skip(3).step_by(5).for_each(|i| *i = -1);
            if r == 2 {
                row.fill(-1);
            }
            indices.extend(row);
        }
        Att {
            rows,
            heads,
            d_qk,
            d_v,
            topk,
            store,
            pages,
            page,
            q16: q.iter().map(|&x| bf16::from_f32(x)).collect(),
            q,
            kv16: kv.iter().map(|&x| bf16::from_f32(x)).collect(),
            kv8: if d_qk == 576 { kv_pack(&kv, tokens, page, None) } else { vec![] },
            kv,
            table: rng.shuffled(pages)[..6].to_vec(),
            indices,
            row_topk: (0..rows).map(|r| (topk - r.min(topk)) as i32).collect(),
            sink: rng.normals(heads),
        }
    }

    /// `form` 0: contiguous and logical, 1: paged and logical, 2: slots. Returns output, LSE and probabilities.
    fn run(&self, cpu: Option<&Cpu>, form: usize, extras: bool) -> [Vec<f32>; 3] {
        let (rows, heads, tokens) = (self.rows, self.heads, self.pages * self.page);
        let width = if matches!(self.store, Store::Fp8) { KV_FP8_BYTES } else { self.d_qk };
        let shape: &[usize] =
            if form == 0 { &[tokens, 1, width] } else { &[self.pages, self.page, 1, width] };
        let mut out = vec![9.0f32; rows * heads * self.d_v];
        let mut lse = vec![9.0f32; rows * heads];
        let mut probs = vec![9.0f32; rows * self.topk];
        let op = SparseAttentionArgs {
            q: match self.store {
                Store::F32 => t("q", &self.q, &[rows, heads, self.d_qk]),
                _ => t("q", &self.q16, &[rows, heads, self.d_qk]),
            },
            kv: match self.store {
                Store::F32 => t("kv", &self.kv, shape),
                Store::Bf16 => t("kv", &self.kv16, shape),
                Store::Fp8 => t("kv", &self.kv8, shape),
            },
            indices: t("indices", &self.indices, &[rows, self.topk]),
            form: if form == 2 { IndexForm::Slots } else { IndexForm::Logical },
            map: KeyMapArgs {
                block_table: (form == 1).then(|| t("block_table", &self.table, &[1, 6])),
                ..Default::default()
            },
            row_topk: extras.then(|| t("row_topk", &self.row_topk, &[rows])),
            sink: extras.then(|| t("sink", &self.sink, &[heads])),
            softmax_scale: 1.0 / (self.d_qk as f32).sqrt(),
            out: m("out", &mut out, &[rows, heads, self.d_v]),
            lse: Some(m("lse", &mut lse, &[rows, heads])),
            probs: Some(m("probs", &mut probs, &[rows, self.topk])),
        };
        let op = op.check().unwrap();
        match cpu {
            Some(cpu) => {
                let need = op.workspace(cpu.threads());
                let mut ws = vec![0xffu8; need + 1];
                assert!(cpu.sparse_attention(&op, &mut ws[..need - 1]).is_err());
                cpu.sparse_attention(&op, &mut ws[1..]).unwrap();
            }
            None => reference::sparse_attention(&op),
        }
        [out, lse, probs]
    }

    /// Probabilities are 0 where no index counts, and add up to 1 elsewhere.
    fn assert_normalised(&self, probs: &[f32], extras: bool) {
        for (r, row) in probs.chunks(self.topk).enumerate() {
            let indices = &self.indices[r * self.topk..][..self.topk];
            let taken = if extras { self.row_topk[r] as usize } else { self.topk };
            let mut live = 0;
            for (c, (p, i)) in row.iter().zip(indices).enumerate() {
                live += usize::from(*i >= 0 && c < taken);
                assert!(*p >= 0.0 && (*p == 0.0 || *i >= 0 && c < taken), "row {r} column {c}");
            }
            let sum: f32 = row.iter().sum();
            assert!((sum - if live > 0 { 1.0 } else { 0.0 }).abs() < 1e-5, "row {r}: {sum}");
        }
    }
}

#[test]
fn attention_matches_the_reference_and_has_the_same_bits_everywhere() {
    let mut rng = Rng(11);
    let cases = [
        (Store::F32, 3, 1, (1, 1), 7),
        (Store::F32, 2, 5, (33, 17), 100),
        (Store::Bf16, 4, 8, (576, 512), 130),
        (Store::Bf16, 1, 70, (80, 64), 200),
        (Store::Bf16, 3, 3, (1024, 1024), 33),
        (Store::Fp8, 1, 16, (576, 512), 256),
        (Store::Fp8, 5, 6, (576, 512), 64),
    ];
    for (store, rows, heads, d, topk) in cases {
        let a = Att::new(&mut rng, store, rows, heads, d, topk);
        for (form, extras) in [(0, false), (1, true), (2, true), (2, false)] {
            let want = a.run(None, form, extras);
            let mut first = None;
            for threads in 1..=3 {
                for cpu in cpus(threads) {
                    let got = a.run(Some(&cpu), form, extras);
                    for (g, w) in got.iter().flatten().zip(want.iter().flatten()) {
                        assert!(
                            g == w || (g - w).abs() < 3e-5,
                            "{store:?} {rows}x{heads} {d:?} form {form} {cpu:?}: {g} for {w}"
                        );
                    }
                    a.assert_normalised(&got[2], extras);
                    let got = got.map(|x| bits(&x));
                    assert!(
                        *first.get_or_insert_with(|| got.clone()) == got,
                        "{store:?} {d:?} {cpu:?}"
                    );
                }
            }
            if rows > 2 {
                let empty = 2 * heads * a.d_v;
                assert!(want[0][empty..empty + heads * a.d_v].iter().all(|&x| x == 0.0));
                assert!(want[1][2 * heads..3 * heads].iter().all(|&x| x == f32::NEG_INFINITY));
            }
        }
    }
}

#[test]
fn attention_survives_extreme_logits_and_sinks() {
    let mut rng = Rng(12);
    let mut a = Att::new(&mut rng, Store::F32, 2, 4, (64, 64), 90);
    a.q.iter_mut().for_each(|x| *x *= 300.0);
    a.sink = vec![1e4, -1e4, f32::NEG_INFINITY, 80.0];
    let want = a.run(None, 1, true);
    for cpu in cpus(1) {
        let got = a.run(Some(&cpu), 1, true);
        for (g, w) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((g - w).abs() <= 1e-3 * w.abs().max(1.0), "{g} for {w}");
        }
    }
}

#[test]
fn translation_and_overlap() {
    let cpu = Cpu::new(2).unwrap();
    let (table, request) = ([5, 2, 9, 0, 7, 1], [1, 0, -1]);
    let mut indices = [0, 63, 64, -1, 70, 130, -1, 5, 3, 4, 5, 6];
    let want = [0, 63, 448, -1, 134, 578, -1, 325, -1, -1, -1, -1];
    // SAFETY: the array's own elements, used as input and output of one call at a time.
    let both = unsafe {
        let p = indices.as_mut_ptr().cast();
        Tensor::from_raw_parts("indices", p, Device::Cpu, i32::DTYPE, &[3, 4], &[4, 1]).unwrap()
    };
    let mut apart = [0; 12];
    for slots in [m("slots", &mut apart, &[3, 4]), both] {
        let op = IndicesToSlotsArgs {
            indices: both,
            map: KeyMapArgs {
                block_table: Some(t("block_table", &table, &[2, 3])),
                row_request: Some(t("row_request", &request, &[3])),
                ..Default::default()
            },
            page_size: 64,
            slots,
        };
        cpu.indices_to_slots(&op.check().unwrap()).unwrap();
    }
    assert_eq!(indices, want);
    assert_eq!(apart, want);

    let (own, reused) = ([1, 2, 3, 4, 7, 9, -1, -1], [2, 4, 6, 8, 9, -1]);
    let mut out = [0.0f32; 2];
    let op = Overlap::check(
        t("own", &own, &[2, 4]),
        t("reused", &reused, &[2, 3]),
        m("out", &mut out, &[2]),
    );
    cpu.overlap(&op.unwrap()).unwrap();
    assert_eq!(out, [0.5, 0.5]);
}
