//! What the operations refuse, with which words, and that nothing is written before.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use half::bf16;
use indexcache::backend::cpu::Cpu;
use indexcache::error::{Error, Status};
use indexcache::ops::*;
use indexcache::tensor::{Device, Element, F8E4M3, Tensor};
use proptest::prelude::*;

fn t<'a, T: Element>(name: &'static str, data: &'a [T], shape: &[usize]) -> Tensor<'a> {
    Tensor::from_slice(name, data, shape).unwrap()
}

fn m<'a, T: Element>(name: &'static str, data: &'a mut [T], shape: &[usize]) -> Tensor<'a> {
    Tensor::from_slice_mut(name, data, shape).unwrap()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, want: &str) {
    let e = result.expect_err(want);
    assert_eq!(e.status, Status::Invalid, "{e}");
    assert_eq!(e.message, want);
}

struct Fixture {
    q: Vec<F8E4M3>,
    w: Vec<f32>,
    k: Vec<u8>,
    table: Vec<i32>,
    request: Vec<i32>,
    end: Vec<i32>,
    indices: Vec<i32>,
}

/// 3 rows, 2 heads x 16, 5 pages, 2 requests of at most 2 pages.
fn fixture() -> Fixture {
    Fixture {
        q: vec![F8E4M3(0x38); 3 * 2 * 16],
        w: vec![1.0; 6],
        k: vec![0; 5 * PAGE * 20],
        table: vec![0, 1, 2, 3],
        request: vec![0, 1, 1],
        end: vec![100, 64, 128],
        indices: vec![-7; 3 * 8],
    }
}

impl Fixture {
    fn args(&self) -> IndexerArgs<'_> {
        IndexerArgs {
            q: t("q", &self.q, &[3, 2, 16]),
            weights: t("weights", &self.w, &[3, 2]),
            k: t("k", &self.k, &[5, PAGE * 20]),
            k_scale: None,
            map: KeyMapArgs {
                block_table: Some(t("block_table", &self.table, &[2, 2])),
                row_request: Some(t("row_request", &self.request, &[3])),
                row_start: None,
                row_end: Some(t("row_end", &self.end, &[3])),
            },
        }
    }

    /// The message of a select that must fail, having written nothing.
    fn select(&self) -> String {
        let mut out = self.indices.clone();
        let op = self.args().check_select(m("indices", &mut out, &[3, 8])).unwrap();
        let cpu = Cpu::new(2).unwrap();
        let mut workspace = vec![0; op.workspace(2)];
        let e = cpu.select(&op, &mut workspace).unwrap_err();
        assert_eq!(e.status, Status::Invalid);
        assert_eq!(out, self.indices);
        e.message
    }
}

#[test]
fn numbers_in_index_arrays() {
    let with = |change: fn(&mut Fixture)| {
        let mut f = fixture();
        change(&mut f);
        f.select()
    };
    let m = with(|f| f.table[3] = 5);
    assert_eq!(m, "block_table: expected pages of 0 to 4, got 5 as page 1 in row 2");
    let m = with(|f| f.table[0] = -1);
    assert_eq!(m, "block_table: expected pages of 0 to 4, got -1 as page 0 in row 0");
    let m = with(|f| f.end[1] = 129);
    assert_eq!(m, "row_end: expected at most 128, got 129 in row 1");
    let m = with(|f| f.request[2] = 2);
    assert_eq!(m, "row_request: expected -1 or a request below 2, got 2 in row 2");
    let m = with(|f| f.request[2] = -2);
    assert_eq!(m, "row_request: expected -1 or a request below 2, got -2 in row 2");
    // A page past a row's length is nobody's business.
    let mut f = fixture();
    (f.table[1], f.end[0]) = (-1, 64);
    let mut out = f.indices.clone();
    let op = f.args().check_select(self::m("indices", &mut out, &[3, 8])).unwrap();
    Cpu::new(1).unwrap().select(&op, &mut vec![0; op.workspace(1)]).unwrap();
    assert_eq!(out[..8], [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn shapes_dtypes_and_places_of_an_indexer_call() {
    let f = fixture();
    let mut out = f.indices.clone();
    let out = m("indices", &mut out, &[3, 8]);
    let ok = f.args();
    let check = |args: IndexerArgs<'_>| args.check_select(out).map(|_| ());
    let w = vec![0f32; 8];
    assert!(check(ok).is_ok());
    refused(
        check(IndexerArgs { q: t("q", &f.w, &[3, 2, 1]), ..ok }),
        "q: expected float8_e4m3fn or bfloat16, got float32",
    );
    refused(
        check(IndexerArgs { q: t("q", &f.q, &[3, 4, 8]), ..ok }),
        "q: expected head dimension a multiple of 16 up to 256, got 8",
    );
    refused(
        check(IndexerArgs { weights: t("weights", &w, &[4, 2]), ..ok }),
        "weights: expected shape [3, 2], got [4, 2]",
    );
    refused(
        check(IndexerArgs { k_scale: Some(t("k_scale", &f.w, &[6])), ..ok }),
        "k_scale: expected none: only contiguous float8_e4m3fn keys have separate scales, got [6]",
    );
    refused(
        check(IndexerArgs { map: KeyMapArgs { row_end: None, ..ok.map }, ..ok }),
        "row_end: expected the length of each row for paged keys, got none",
    );
    refused(
        check(IndexerArgs {
            map: KeyMapArgs { row_start: Some(t("row_start", &f.end, &[3])), ..ok.map },
            ..ok
        }),
        "row_start: expected none with a block table, got shape [3]",
    );
    refused(
        check(IndexerArgs { map: KeyMapArgs { row_request: None, ..ok.map }, ..ok }),
        "row_request: expected a request for each row, or rows that split evenly over requests, \
         got none, 3 rows and 2 requests",
    );
    refused(
        check(IndexerArgs { map: KeyMapArgs { block_table: None, ..ok.map }, ..ok }),
        "k_scale: expected a scale for each contiguous float8_e4m3fn key, got none",
    );
    let odd = vec![0u8; 5 * PAGE * 21];
    refused(
        check(IndexerArgs { k: t("k", &odd, &[5, PAGE, 1, 21]), ..ok }),
        "k: expected pages of 1280 bytes without gaps, got shape [5, 64, 1, 21] with strides [1344, 21, 21, 1]",
    );
    // SAFETY: a description that is never read.
    let cuda = unsafe {
        let p = f.w.as_ptr() as *mut u8;
        Tensor::from_raw_parts("weights", p, Device::Cuda(1), f32::DTYPE, &[3, 2], &[2, 1]).unwrap()
    };
    refused(
        check(IndexerArgs { weights: cuda, ..ok }),
        "weights: expected memory on cpu, got cuda:1",
    );
    // SAFETY: never written.
    let over = unsafe {
        let p = f.end.as_ptr() as *mut u8;
        Tensor::from_raw_parts("indices", p, Device::Cpu, i32::DTYPE, &[3, 1], &[1, 1]).unwrap()
    };
    refused(
        f.args().check_select(over),
        "indices: expected memory apart from row_end, got memory that overlaps it",
    );
    let mut wide = vec![0; 3 * 4097];
    refused(
        f.args().check_select(m("indices", &mut wide, &[3, 4097])),
        "indices: expected topk of 1 to 4096, got 4097",
    );
    let mut logits = vec![0f32; 3 * 127];
    let op = f.args().check_logits(m("logits", &mut logits, &[3, 127])).unwrap();
    refused(
        Cpu::new(1).unwrap().indexer_logits(&op),
        "logits: expected a column for each of the longest row's 128 positions, got 127",
    );
}

#[test]
fn an_output_may_be_columns_of_the_matrix_that_holds_an_input() {
    let mut wide = vec![0f32; 4 * 48];
    let p = wide.as_mut_ptr().cast::<u8>();
    let column = |name, at: usize, width, dtype| {
        // SAFETY: columns of `wide`; the two never meet unless the test says so, and then nothing runs.
        unsafe {
            let p = p.add(4 * at);
            Tensor::from_raw_parts(name, p, Device::Cpu, dtype, &[4, width], &[48, 1]).unwrap()
        }
    };
    let args = |at| TopKArgs {
        logits: column("logits", 0, 40, f32::DTYPE),
        row_start: None,
        row_end: None,
        indices: column("indices", at, 8, i32::DTYPE),
    };
    Cpu::new(1).unwrap().topk(&args(40).check().unwrap()).unwrap();
    refused(
        args(39).check(),
        "indices: expected memory apart from logits, got memory that overlaps it",
    );
}

#[test]
fn slots_and_bounds() {
    let cpu = Cpu::new(2).unwrap();
    let k = vec![1f32; 2 * 16];
    let mut pages = vec![9u8; 2 * PAGE * 20];
    let before = pages.clone();
    for (slots, want) in [
        ([0i64, 128], "slots: expected -1 or a slot below 128, got 128 in row 1"),
        ([-2, 0], "slots: expected -1 or a slot below 128, got -2 in row 0"),
        ([0, i64::MAX], "slots: expected -1 or a slot below 128, got 9223372036854775807 in row 1"),
    ] {
        let op = IndexKWriteArgs {
            k: t("k", &k, &[2, 16]),
            slots: t("slots", &slots, &[2]),
            pages: m("pages", &mut pages, &[2, PAGE * 20]),
            hadamard: true,
            pow2_scale: false,
        };
        refused(cpu.index_k_write(&op.check().unwrap()), want);
    }
    assert_eq!(pages, before);

    let k48 = vec![1f32; 48];
    let mut pages48 = vec![0u8; PAGE * 52];
    let op = IndexKWriteArgs {
        k: t("k", &k48, &[1, 48]),
        slots: t("slots", &[0i32], &[1]),
        pages: m("pages", &mut pages48, &[1, PAGE * 52]),
        hadamard: true,
        pow2_scale: false,
    };
    refused(
        op.check(),
        "k: expected head dimension a power of two of 16 to 256 for the Hadamard rotation, got 48",
    );

    let logits = vec![0f32; 20];
    for (start, end, want) in [
        ([0, -1], [5, 5], "row_start: expected 0 to 10, got -1 in row 1"),
        ([0, 0], [11, 5], "row_end: expected 0 to 10, got 11 in row 0"),
    ] {
        let mut indices = [0; 4];
        let op = TopKArgs {
            logits: t("logits", &logits, &[2, 10]),
            row_start: Some(t("row_start", &start, &[2])),
            row_end: Some(t("row_end", &end, &[2])),
            indices: m("indices", &mut indices, &[2, 2]),
        };
        refused(cpu.topk(&op.check().unwrap()), want);
    }
}

#[test]
fn indices_to_attend_to() {
    let cpu = Cpu::new(2).unwrap();
    let (q, kv, table) = (vec![1f32; 2 * 4], vec![1f32; 3 * 8 * 4], [2, 0, 7]);
    let run = |indices: [i32; 4], form, paged: bool, row_topk: [i32; 2]| {
        let mut out = vec![9f32; 8];
        let op = SparseAttentionArgs {
            q: t("q", &q, &[2, 1, 4]),
            kv: t("kv", &kv, if paged { &[3, 8, 4] } else { &[24, 4] }),
            indices: t("indices", &indices, &[2, 2]),
            form,
            map: KeyMapArgs {
                block_table: (paged && form == IndexForm::Logical)
                    .then(|| t("block_table", &table, &[1, 3])),
                ..Default::default()
            },
            row_topk: Some(t("row_topk", &row_topk, &[2])),
            sink: None,
            softmax_scale: 1.0,
            out: m("out", &mut out, &[2, 1, 4]),
            lse: None,
            probs: None,
        };
        let op = op.check().unwrap();
        let mut workspace = vec![0; op.workspace(2)];
        let result = cpu.sparse_attention(&op, &mut workspace);
        assert!(out.iter().all(|&x| x == if result.is_ok() { 1.0 } else { 9.0 }));
        result
    };
    use IndexForm::{Logical, Slots};
    run([0, 15, -1, 23], Slots, true, [2, 2]).unwrap();
    run([0, 15, 1, 99], Logical, true, [2, 1]).unwrap();
    for (indices, form, paged, want) in [
        ([0, 24, 0, 0], Slots, true, "indices: expected -1 or a slot below 24, got 24 in row 0"),
        ([0, 1, -2, 0], Slots, false, "indices: expected -1 or a slot below 24, got -2 in row 1"),
        ([0, 1, 0, -2], Logical, true, "indices: expected -1 or a position, got -2 in row 1"),
        ([0, 24, 0, 0], Logical, true, "indices: expected positions below 24, got 24 in row 0"),
        ([0, 24, 0, 0], Logical, false, "indices: expected positions below 24, got 24 in row 0"),
        (
            [0, 16, 0, 0],
            Logical,
            true,
            "block_table: expected pages of 0 to 2, got 7 as page 2 (index 16) in row 0",
        ),
    ] {
        refused(run(indices, form, paged, [2, 2]), want);
    }
    refused(run([0; 4], Slots, true, [2, 3]), "row_topk: expected 0 to 2, got 3 in row 1");

    // Shapes.
    let mut out = vec![0f32; 8];
    let ok = SparseAttentionArgs {
        q: t("q", &q, &[2, 1, 4]),
        kv: t("kv", &kv, &[24, 1, 4]),
        indices: t("indices", &[0, 1], &[2, 1]),
        form: Slots,
        map: KeyMapArgs::default(),
        row_topk: None,
        sink: None,
        softmax_scale: 1.0,
        out: m("out", &mut out, &[2, 1, 4]),
        lse: None,
        probs: None,
    };
    ok.check().unwrap();
    let none: [f32; 0] = [];
    let bytes = vec![0u8; 2 * 656];
    for (args, want) in [
        (
            SparseAttentionArgs { kv: t("kv", &none, &[3, 0, 4]), ..ok },
            "kv: expected a page size of 1 to 2147483647, got 0",
        ),
        (
            SparseAttentionArgs { kv: t("kv", &bytes, &[2, 656]), ..ok },
            "kv: expected q and out of (576, 512) for 656-byte rows, got (4, 4)",
        ),
        (
            SparseAttentionArgs { kv: t("kv", &kv, &[3, 8, 4]), form: Logical, ..ok },
            "block_table: expected a block table for paged keys, got none",
        ),
        (
            SparseAttentionArgs { lse: Some(t("lse", &q, &[2, 1, 4])), ..ok },
            "lse: expected shape [2, 1], got [2, 1, 4]",
        ),
        (
            SparseAttentionArgs { probs: Some(t("probs", &q, &[2, 4])), ..ok },
            "probs: expected shape [2, 1], got [2, 4]",
        ),
        (
            SparseAttentionArgs { probs: Some(t("probs", &q[..2], &[2, 1])), ..ok },
            "lse: expected a tensor beside probs, got NULL",
        ),
    ] {
        refused(args.check(), want);
    }
}

#[test]
fn empty_calls_do_nothing() {
    let cpu = Cpu::new(2).unwrap();
    let (none, bytes, floats): ([i32; 0], [u8; 0], [f32; 0]) = ([], [], []);
    let (codes, halves): ([F8E4M3; 0], [bf16; 0]) = ([], []);
    let mut indices: [i32; 0] = [];
    let args = IndexerArgs {
        q: t("q", &codes, &[0, 4, 32]),
        weights: t("weights", &floats, &[0, 4]),
        k: t("k", &bytes, &[0, PAGE * 36]),
        k_scale: None,
        map: KeyMapArgs {
            block_table: Some(t("block_table", &none, &[0, 3])),
            row_request: None,
            row_start: None,
            row_end: Some(t("row_end", &none, &[0])),
        },
    };
    let op = args.check_select(m("indices", &mut indices, &[0, 5])).unwrap();
    cpu.select(&op, &mut vec![0; op.workspace(2)]).unwrap();
    let mut logits: [f32; 0] = [];
    cpu.indexer_logits(&args.check_logits(m("logits", &mut logits, &[0, 9])).unwrap()).unwrap();
    let mut out: [f32; 0] = [];
    let op = SparseAttentionArgs {
        q: t("q", &halves, &[0, 2, 8]),
        kv: t("kv", &halves, &[0, 8]),
        indices: t("indices", &none, &[0, 5]),
        form: IndexForm::Slots,
        map: KeyMapArgs::default(),
        row_topk: None,
        sink: None,
        softmax_scale: 1.0,
        out: m("out", &mut out, &[0, 2, 4]),
        lse: None,
        probs: None,
    };
    let op = op.check().unwrap();
    cpu.sparse_attention(&op, &mut vec![0; op.workspace(2)]).unwrap();
    // Rows, but nothing to see.
    let mut top = [7; 4];
    let op = TopKArgs {
        logits: t("logits", &floats, &[2, 0]),
        row_start: None,
        row_end: None,
        indices: m("indices", &mut top, &[2, 2]),
    };
    cpu.topk(&op.check().unwrap()).unwrap();
    assert_eq!(top, [-1; 4]);
}

proptest! {
    /// A host sizes its workspace for the largest call: no smaller one may need more.
    #[test]
    fn workspace_shrinks_with_every_extent(
        big in (1usize..600, 1usize..70, 1usize..9, 1usize..4096, 1usize..40),
        cut in (0.0..=1.0f64, 0.0..=1.0f64, 0.0..=1.0f64, 0.0..=1.0f64, 0.0..=1.0f64),
        threads in 1usize..70,
    ) {
        let need = |(rows, heads, dim, topk, pages): (usize, usize, usize, usize, usize)| {
            let dim = 16 * dim;
            let (q, w) = (vec![F8E4M3(0); rows * heads * dim], vec![0f32; rows * heads]);
            let (k, table) = (vec![0u8; PAGE * (dim + 4)], vec![0; pages]);
            let (end, mut out) = (vec![0; rows], vec![0; rows * topk]);
            let args = IndexerArgs {
                q: t("q", &q, &[rows, heads, dim]),
                weights: t("weights", &w, &[rows, heads]),
                k: t("k", &k, &[1, PAGE * (dim + 4)]),
                k_scale: None,
                map: KeyMapArgs {
                    block_table: Some(t("block_table", &table, &[1, pages])),
                    row_end: Some(t("row_end", &end, &[rows])),
                    ..Default::default()
                },
            };
            let select =
                args.check_select(m("indices", &mut out, &[rows, topk])).unwrap().workspace(threads);
            let halves = vec![bf16::ZERO; rows * heads * dim];
            let mut values = vec![bf16::ZERO; rows * heads];
            let attention = SparseAttentionArgs {
                q: t("q", &halves, &[rows, heads, dim]),
                kv: t("kv", &halves[..dim], &[1, dim]),
                indices: t("indices", &out, &[rows, topk]),
                form: IndexForm::Slots,
                map: KeyMapArgs::default(),
                row_topk: None,
                sink: None,
                softmax_scale: 1.0,
                out: m("out", &mut values, &[rows, heads, 1]),
                lse: None,
                probs: None,
            };
            (select, attention.check().unwrap().workspace(threads))
        };
        let less = |n: usize, f: f64| (n as f64 * f).ceil().max(1.0) as usize;
        let small = (
            less(big.0, cut.0),
            less(big.1, cut.1),
            less(big.2, cut.2),
            less(big.3, cut.3),
            less(big.4, cut.4),
        );
        let (a, b) = (need(big), need(small));
        prop_assert!(b.0 <= a.0 && b.1 <= a.1, "{:?} needs {:?}, {:?} needs {:?}", big, a, small, b);
    }
}
