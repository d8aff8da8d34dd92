//! The distillation loss and its gradients against plain f64: the formula, its derivative by hand, and differences.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::data::Rng;
use common::distill::{Case, Memory, RAGGED, Values, call, kinds, wide};
use indexcache::backend::cpu::{Cpu, Isa};
use indexcache::error::Status;
use indexcache::ops::{Distill, DistillArgs};
use indexcache::tensor::{DType, Device, Tensor, dense_strides};

#[test]
fn loss_and_gradients() {
    let cpu = Cpu::new(2).unwrap();
    for case in kinds() {
        case.compare(&case.run(&cpu));
    }
}

/// A sum in f32 of these products is 0 or has the wrong sign; the derivative goes by the true one.
#[test]
fn products_that_cancel_keep_their_sign() {
    let cpu = Cpu::new(1).unwrap();
    for (i, tiny) in [1e-4f32, -1e-4].into_iter().enumerate() {
        let mut case = Case::new(60 + i as u64, &[12], Values::F32, false, true);
        for (row, key) in [(4, 0), (7, 3), (11, 11)] {
            let (q, k) = (row * 3 * 21, key * 21);
            case.q[q..q + 21].fill(0.0);
            case.k[k..k + 21].fill(0.0);
            case.q[q..q + 3].copy_from_slice(&[1e4, 1.0, 1.0]);
            case.k[k..k + 3].copy_from_slice(&[1.0, -1e4, tiny]);
        }
        // Of others, no huge scores.
        case.w.iter_mut().for_each(|w| *w *= 1e-3);
        case.compare(&case.run(&cpu));
    }
}

/// Up to the largest, and around the widths that the code works in.
#[test]
fn shapes() {
    let cpu = Cpu::new(2).unwrap();
    for (i, shape) in
        [[1, 1, 1, 1], [4, 64, 4, 64], [9, 65, 7, 33], [32, 128, 16, 576], [128, 256, 128, 1024]]
            .into_iter()
            .enumerate()
    {
        let restricted = i % 2 == 1;
        let mut case = Case::shaped(shape, 50 + i as u64, &[2, 35], Values::F32, restricted, false);
        // Scores of order 1, as models have them.
        let [heads, dim, ..] = shape;
        case.w.iter_mut().for_each(|w| *w *= 2.0 / ((heads * dim) as f32).sqrt());
        case.compare(&case.run(&cpu));
    }
}

/// Several blocks of rows and of keys.
#[test]
fn blocks() {
    let cpu = Cpu::new(2).unwrap();
    for (restricted, given) in [(false, true), (true, false)] {
        let mut case = Case::new(5, &[2300, 3], Values::F32, restricted, given);
        // Every tenth row is enough.
        let some = |v: &mut Vec<f32>, width: usize| {
            *v = v.chunks(width).step_by(10).flatten().copied().collect();
        };
        some(&mut case.q, case.heads * case.dim);
        some(&mut case.w, case.heads);
        some(&mut case.lse, case.attention_heads);
        some(&mut case.attention_q, case.attention_heads * case.d_qk);
        if let Some(target) = &mut case.target {
            some(target, case.columns);
        }
        if let Some(v) = &mut case.indices {
            *v = v.chunks(case.topk).step_by(10).flatten().copied().collect();
        }
        case.start = case.start.iter().step_by(10).copied().collect();
        case.end = case.end.iter().step_by(10).copied().collect();
        assert!(case.rows() > 128 && case.keys > 2048);
        case.compare(&case.run(&cpu));
    }
}

/// The derivative by hand is the derivative: central differences of the f64 loss, where no product is near 0.
#[test]
fn differences() {
    for case in kinds().filter(|c| c.values != Values::Ties) {
        let (_, grads) = case.reference();
        let p = case.all_p();
        let step = 1e-6;
        let mut rng = Rng(7);
        let mut tried = 0;
        for (which, grad) in grads.iter().enumerate() {
            for _ in 0..12 {
                let at = rng.below(grad.len());
                let mut x = [wide(&case.q), wide(&case.k), wide(&case.w)];
                if !x[which][at].is_finite() {
                    continue;
                }
                tried += 1;
                let middle = x[which][at];
                let mut loss = |value| {
                    x[which][at] = value;
                    case.loss(&p, &x[0], &x[1], &x[2])
                };
                let slope = (loss(middle + step) - loss(middle - step)) / (2.0 * step);
                let off = (slope - grad[at]).abs();
                assert!(off <= 1e-5 * grad[at].abs() + 1e-8, "{slope}, not {}", grad[at]);
            }
        }
        assert!(tried > 20);
    }
}

/// The paper's proposition: distilling to each served layer is distilling to their mean, but for a constant.
#[test]
fn both_forms_have_equal_gradients() {
    let cpu = Cpu::new(2).unwrap();
    for restricted in [false, true] {
        let shares = [0.5f32, 0.25, 0.25];
        let mut case = Case::new(21, &RAGGED, Values::F32, restricted, true);
        let mut each = case.zeros();
        let mut mean = vec![0.0f64; case.target.as_ref().unwrap().len()];
        for (i, &share) in shares.iter().enumerate() {
            let other = Case::new(21 + i as u64, &RAGGED, Values::F32, restricted, true).target;
            let live: Vec<bool> = case.target.as_ref().unwrap().iter().map(|&t| t >= 0.0).collect();
            let theirs = other.unwrap();
            // Where the other selects nothing, this one may.
            case.target = Some(
                live.iter()
                    .zip(&theirs)
                    .map(|(&live, &t)| if live { t.max(0.125) } else { -1.0 })
                    .collect(),
            );
            for (r, p) in case.all_p().iter().enumerate() {
                for (&(c, _), p) in case.columns_of(r).iter().zip(p) {
                    mean[r * case.columns + c] += f64::from(share) * p;
                }
            }
            case.layer_weight = share;
            case.add_to(&cpu, &mut each);
        }
        case.layer_weight = 1.0;
        case.target = Some(mean.iter().map(|&m| m as f32).collect());
        let at_once = case.run(&cpu);
        assert!(at_once.loss[0] < 0.9 * each.loss[0], "{:?} {:?}", at_once.loss, each.loss);
        for (a, b) in [(&at_once.q, &each.q), (&at_once.k, &each.k), (&at_once.w, &each.w)] {
            let largest = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(largest > 1e-4);
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 2e-6 * largest));
        }
    }
}

#[test]
fn outputs_are_added_to_and_optional() {
    let cpu = Cpu::new(1).unwrap();
    let case = Case::new(4, &RAGGED, Values::F32, false, true);
    let once = case.run(&cpu);
    let mut twice = once.clone();
    case.add_to(&cpu, &mut twice);
    for (a, b) in
        [(&once.loss, &twice.loss), (&once.q, &twice.q), (&once.k, &twice.k), (&once.w, &twice.w)]
    {
        let largest = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(largest > 0.0);
        assert!(a.iter().zip(b).all(|(a, b)| (2.0 * a - b).abs() <= 1e-6 * largest));
    }
    // Each alone is what it is beside the others.
    for which in 0..4 {
        let (mut out, mut memory) = (case.zeros(), Memory::default());
        let mut args = case.args(&mut memory, &mut out, true);
        args.grad_q = args.grad_q.filter(|_| which == 1);
        args.grad_k = args.grad_k.filter(|_| which == 2);
        args.grad_weights = args.grad_weights.filter(|_| which == 3);
        call(&cpu, args).unwrap();
        let mut want = case.zeros();
        want.loss = once.loss.clone();
        match which {
            1 => want.q = once.q.clone(),
            2 => want.k = once.k.clone(),
            3 => want.w = once.w.clone(),
            _ => {}
        }
        assert!(out == want, "{which}");
    }
}

#[test]
fn same_bits_on_every_instruction_set_with_every_number_of_threads() {
    for case in kinds() {
        let want = case.run(&Cpu::with_isa(1, Isa::Scalar).unwrap());
        for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512] {
            for threads in [1, 2, 5] {
                let Ok(cpu) = Cpu::with_isa(threads, isa) else { continue };
                assert!(case.run(&cpu) == want, "{isa:?} with {threads} threads");
            }
        }
    }
}

/// A row of one position has nothing to learn; nor has an indexer that already is its target.
#[test]
fn nothing_to_learn() {
    let cpu = Cpu::new(2).unwrap();
    let case = Case::new(8, &[1, 1, 1], Values::F32, false, true);
    let out = case.run(&cpu);
    assert!(out.loss[0].abs() < 1e-12 && out.q.iter().chain(&out.k).all(|x| x.abs() < 1e-9));

    let mut case = Case::new(8, &RAGGED, Values::F32, false, true);
    let x = (wide(&case.q), wide(&case.k), wide(&case.w));
    for r in 0..case.rows() {
        let (_, _, softmax) = case.forward(r, &x.0, &x.1, &x.2);
        for (&(c, _), q) in case.columns_of(r).iter().zip(softmax) {
            case.target.as_mut().unwrap()[r * case.columns + c] = q as f32;
        }
    }
    let out = case.run(&cpu);
    assert!(out.loss[0].abs() < 1e-10, "{:?}", out.loss);
    assert!(out.q.iter().chain(&out.k).chain(&out.w).all(|x| x.abs() < 1e-6));

    let none = Case::new(8, &[0, 0], Values::F32, false, false);
    assert_eq!(none.run(&cpu), none.zeros());
    let none = Case::new(8, &[], Values::F32, true, true);
    assert_eq!(none.run(&cpu), none.zeros());
}

/// A log-sum-exp far off is a factor, which the normalisation takes out, even where `exp` alone would give 0.
#[test]
fn targets_do_not_underflow() {
    let cpu = Cpu::new(2).unwrap();
    let mut case = Case::new(3, &RAGGED, Values::F32, false, false);
    let want = case.run(&cpu);
    case.lse.iter_mut().for_each(|x| *x += 128.0);
    let out = case.run(&cpu);
    assert!((out.loss[0] - want.loss[0]).abs() < 1e-3 * want.loss[0]);
    case.compare(&out);
}

/// Scratch is the same for any number of keys.
#[test]
fn scratch_does_not_grow_with_the_keys() {
    let bytes = |keys: usize| {
        let t = |name, dtype, shape: &[usize]| {
            let strides = dense_strides(shape);
            Tensor::without_data(name, Device::Cpu, dtype, shape, &strides[..shape.len()]).unwrap()
        };
        let f = |name, shape: &[usize]| t(name, DType::F32, shape);
        let op: Distill<'_> = DistillArgs {
            q: f("q", &[512, 32, 128]),
            k: f("k", &[keys, 128]),
            weights: f("weights", &[512, 32]),
            row_start: None,
            row_end: None,
            indices: None,
            target: None,
            attention_q: Some(f("attention_q", &[512, 128, 576])),
            kv: Some(f("kv", &[keys, 576])),
            lse: Some(f("lse", &[512, 128])),
            softmax_scale: 1.0,
            layer_weight: 1.0,
            loss: f("loss", &[1]),
            grad_q: Some(f("grad_q", &[512, 32, 128])),
            grad_k: Some(f("grad_k", &[keys, 128])),
            grad_weights: Some(f("grad_weights", &[512, 32])),
        }
        .check()
        .unwrap();
        op.workspace(4)
    };
    assert_eq!(bytes(4096), bytes(1 << 20));
    assert!(bytes(4096) < 4 << 20, "{}", bytes(4096));
}

/// The message with which a changed case is refused, nothing having been written.
fn refused(given: bool, restricted: bool, change: impl FnOnce(&mut Case)) -> String {
    let mut case = Case::new(12, &[6, 9], Values::F32, restricted, given);
    if let Some(v) = &mut case.indices {
        v[8 * 9] = 0; // The row that is changed has a position.
    }
    change(&mut case);
    let mut out = case.zeros();
    out.k.fill(7.0);
    let before = out.clone();
    let mut memory = Memory::default();
    let e = call(&Cpu::new(2).unwrap(), case.args(&mut memory, &mut out, true)).unwrap_err();
    assert_eq!(e.status, Status::Invalid, "{e}");
    assert!(out == before, "written before: {e}");
    e.message
}

#[test]
fn what_is_not_finite_is_named() {
    // Row 8 is the second of the second sequence, whose keys begin at 7.
    let m = refused(true, false, |c| c.q[8 * 63 + 2] = f32::NAN);
    assert_eq!(m, "q: expected finite numbers, got NaN in row 8");
    let m = refused(true, false, |c| c.w[8 * 3] = f32::INFINITY);
    assert_eq!(m, "weights: expected finite numbers, got inf in row 8");
    let m = refused(true, false, |c| c.k[8 * 21] = f32::NEG_INFINITY);
    assert_eq!(m, "k: expected finite numbers, got -inf in key 8, which row 8 sees");
    let m = refused(false, false, |c| c.attention_q[8 * 200] = f32::NAN);
    assert_eq!(m, "attention_q: expected finite numbers, got NaN in row 8");
    let m = refused(false, true, |c| c.lse[8 * 5 + 4] = f32::NEG_INFINITY);
    assert_eq!(m, "lse: expected finite numbers, got -inf in row 8");
    let m = refused(false, false, |c| c.kv[7 * 40] = f32::NAN);
    assert_eq!(m, "kv: expected finite numbers, got NaN in key 7, which row 7 sees");
    // A score of -inf, which alone would be a probability of 0.
    let m = refused(false, false, |c| {
        c.attention_q[8 * 200..9 * 200].fill(1.0);
        c.kv[8 * 40] = f32::NEG_INFINITY;
    });
    assert_eq!(m, "kv: expected finite numbers, got -inf in key 8, which row 8 sees");
    let m = refused(true, false, |c| {
        let row = 8 * c.columns;
        c.target.as_mut().unwrap()[row + 1] = f32::NAN;
    });
    assert_eq!(m, "target: expected finite numbers, none below 0, got NaN in column 1 of row 8");
    let m = refused(true, true, |c| c.target.as_mut().unwrap()[8 * 9] = -0.5);
    assert_eq!(m, "target: expected finite numbers, none below 0, got -0.5 in column 0 of row 8");
    let m = refused(true, false, |c| {
        let row = 8 * c.columns;
        c.target.as_mut().unwrap()[row..row + 2].fill(0.0);
    });
    assert_eq!(m, "target: expected a sum above 0, got 0 in row 8");
    let m = refused(true, false, |c| {
        c.q[8 * 63..9 * 63].fill(1e30);
        c.k[7 * 21..8 * 21].fill(1e30);
    });
    assert_eq!(m, "q: expected scores within the range of float32, got one that is not in row 8");
    let m = refused(false, false, |c| c.attention_q[8 * 200..9 * 200].fill(3e38));
    let want =
        "attention_q: expected scores within the range of float32, got one that is not in row 8";
    assert_eq!(m, want);
}

#[test]
fn numbers_in_index_arrays() {
    let m = refused(true, true, |c| c.indices.as_mut().unwrap()[8 * 9] = 2);
    assert_eq!(m, "indices: expected -1 or a position below 2, got 2 in row 8");
    let m = refused(true, true, |c| c.indices.as_mut().unwrap()[8 * 9] = -2);
    assert_eq!(m, "indices: expected -1 or a position below 2, got -2 in row 8");
    let m = refused(true, true, |c| c.indices.as_mut().unwrap()[6 * 9] = 0);
    assert_eq!(m, "indices: expected -1 or a position below 0, got 0 in row 6");
    let m = refused(true, false, |c| c.end[8] = 18);
    assert_eq!(m, "row_end: expected at most 17, got 18 in row 8");
    let m = refused(true, false, |c| c.start[8] = -1);
    assert_eq!(m, "row_start: expected 0 to 17, got -1 in row 8");
    let m = refused(true, false, |c| {
        (c.columns, c.target) = (8, Some(vec![1.0; 8 * c.rows()]));
    });
    assert_eq!(m, "target: expected a column for each of the longest row's 9 positions, got 8");
}

#[test]
fn shapes_and_places() {
    let case = Case::new(12, &[6, 9], Values::F32, true, false);
    let given = Case::new(12, &[6, 9], Values::F32, true, true);
    let (mut memory, mut out, mut other) = (Memory::default(), case.zeros(), case.zeros());
    let mut more = Memory::default();
    let ok = case.args(&mut memory, &mut out, true);
    let target = given.args(&mut more, &mut other, true).target;
    let refused = |args: DistillArgs<'_>, want: &str| {
        let e = args.check().unwrap_err();
        assert_eq!((e.status, e.message.as_str()), (Status::Invalid, want));
    };
    let zeros = vec![0f32; 4096];
    let t = |name, shape: &[usize]| {
        Tensor::from_slice(name, &zeros[..shape.iter().product()], shape).unwrap()
    };
    assert!(ok.check().is_ok());
    let either = "a target, or attention_q, kv and lse";
    refused(
        DistillArgs { attention_q: None, kv: None, lse: None, ..ok },
        &format!("target: expected {either}, got none"),
    );
    refused(
        DistillArgs { attention_q: None, ..ok },
        &format!("attention_q: expected {either}, got none"),
    );
    refused(DistillArgs { lse: None, ..ok }, "lse: expected a tensor beside attention_q, got none");
    refused(
        DistillArgs { target, ..ok },
        "attention_q: expected none with a target, got shape [17, 5, 40]",
    );
    refused(
        DistillArgs { layer_weight: 0.0, ..ok },
        "layer_weight: expected a finite, positive number, got 0",
    );
    refused(
        DistillArgs { softmax_scale: f32::NAN, ..ok },
        "softmax_scale: expected a finite, positive number, got NaN",
    );
    refused(
        DistillArgs { q: t("q", &[17, 0, 21]), ..ok },
        "q: expected number of heads of 1 to 128, got 0",
    );
    refused(
        DistillArgs { k: t("k", &[17, 20]), ..ok },
        "k: expected shape [any, 21], got [17, 20]",
    );
    refused(
        DistillArgs { kv: Some(t("kv", &[16, 40])), ..ok },
        "kv: expected shape [17, 40], got [16, 40]",
    );
    refused(DistillArgs { loss: t("loss", &[]), ..ok }, "loss: expected shape [1], got []");
    refused(
        DistillArgs { grad_k: Some(t("grad_k", &[17, 20])), ..ok },
        "grad_k: expected shape [17, 21], got [17, 20]",
    );
    refused(
        DistillArgs { grad_weights: ok.grad_q, ..ok },
        "grad_q: expected shape [17, 3], got [17, 3, 21]",
    );
    refused(
        DistillArgs { grad_weights: Some(ok.weights), ..ok },
        "weights: expected memory apart from weights, got memory that overlaps it",
    );
    let loss = t("loss", &[1]);
    refused(
        DistillArgs { loss, grad_weights: Some(t("grad_weights", &[17, 3])), ..ok },
        "grad_weights: expected memory apart from loss, got memory that overlaps it",
    );
    let op = ok.check().unwrap();
    let cpu = Cpu::new(1).unwrap();
    let e = cpu.distill(&op, &mut vec![0; op.workspace(1) - 1]).unwrap_err();
    assert_eq!(e.status, Status::BufferTooSmall);
}
