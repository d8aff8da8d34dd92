//! The index cache against a model of it: which layer may read what, after any sequence of calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use indexcache::cache::{Cache, CacheShape};
use indexcache::context::{BackendChoice, Context, Stream};
use indexcache::error::Status;
use indexcache::layout::Workspace;
use indexcache::ops::{IndexForm, IndexerArgs, KeyMapArgs};
use indexcache::plan::{Indexers, Model, Pattern, Plan, Role, Spelling};
use indexcache::tensor::{DType, Device, F8E4M3, Tensor};
use proptest::prelude::*;
use std::sync::Arc;

const TOPK: usize = 4;
const KEYS: usize = 9; // More than topk, or every selection would be the same.

fn plan(pattern: &str, mtp: u32, shares: bool) -> Arc<Plan> {
    let mut model = Model::new(TOPK as u32);
    model.mtp_layers = mtp;
    model.mtp_shares = shares;
    let indexers = Indexers::any(pattern.len() as u64).unwrap();
    Arc::new(
        Plan::new(Pattern::new(&Spelling::Letters(pattern), &indexers).unwrap(), model).unwrap(),
    )
}

fn cache(plan: &Arc<Plan>, lanes: usize, max_rows: usize) -> Cache {
    let context = Arc::new(Context::new(BackendChoice::Cpu, 1, || ()).unwrap());
    // SAFETY: no host buffer.
    unsafe { Cache::new(context, plan.clone(), CacheShape { lanes, max_rows }, None) }.unwrap()
}

/// Selects with keys that make `favourite` and the highest positions win, so that each call's indices can be told apart.
fn select(
    cache: &mut Cache,
    lane: usize,
    layer: u32,
    rows: usize,
    favourite: usize,
) -> Result<(), Status> {
    let one = F8E4M3(0x38);
    let q = vec![one; rows * 16];
    let weights = vec![1.0f32; rows];
    let k = vec![one; KEYS * 16];
    let mut scale: Vec<f32> = (0..KEYS).map(|s| 1.0 + s as f32).collect();
    scale[favourite] = 100.0;
    let end = vec![KEYS as i32; rows];
    let args = IndexerArgs {
        q: Tensor::from_slice("q", &q, &[rows, 1, 16]).unwrap(),
        weights: Tensor::from_slice("weights", &weights, &[rows, 1]).unwrap(),
        k: Tensor::from_slice("k", &k, &[KEYS, 16]).unwrap(),
        k_scale: Some(Tensor::from_slice("k_scale", &scale, &[KEYS]).unwrap()),
        map: KeyMapArgs {
            row_end: Some(Tensor::from_slice("row_end", &end, &[rows]).unwrap()),
            ..KeyMapArgs::default()
        },
    };
    let mut workspace = vec![0u8; cache.select_workspace(args).map_err(|e| e.status)?];
    let workspace = Workspace::from(&mut workspace[..]);
    cache.select(lane, layer, || Ok(args), workspace, Stream::DEFAULT).map_err(|e| e.status)
}

fn selected(favourite: usize) -> Vec<i32> {
    let mut best: Vec<i32> = vec![favourite as i32];
    best.extend((0..KEYS as i32).rev().filter(|&s| s != favourite as i32).take(TOPK - 1));
    best.sort_unstable();
    best
}

fn rows(t: &Tensor<'_>) -> Vec<Vec<i32>> {
    let view = t.view::<i32, 2>().unwrap();
    (0..view.shape()[0]).map(|r| view.row(&[r]).to_vec()).collect()
}

#[derive(Clone, Debug)]
enum Call {
    Begin { lane: usize, rows: usize },
    Select { lane: usize, layer: u32, favourite: usize },
    Publish { lane: usize, layer: u32, value: i32 },
    Read { lane: usize, layer: u32 },
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let lane = 0..2usize;
    let layer = 0..9u32; // The plan has 8 layers: 8 is out of range.
    let call =
        prop_oneof![
            (lane.clone(), 1..4usize).prop_map(|(lane, rows)| Call::Begin { lane, rows }),
            (lane.clone(), layer.clone(), 0..KEYS)
                .prop_map(|(lane, layer, favourite)| Call::Select { lane, layer, favourite }),
            (lane.clone(), layer.clone(), 0..100i32)
                .prop_map(|(lane, layer, value)| Call::Publish { lane, layer, value }),
            (lane, layer).prop_map(|(lane, layer)| Call::Read { lane, layer }),
        ];
    proptest::collection::vec(call, 1..40)
}

/// What a lane holds: rows, and whose indices with their first row.
type Held = Option<(usize, Option<(u32, Vec<i32>)>)>;

proptest! {
    #[test]
    fn hands_out_only_the_source_layers_indices_of_this_step(calls in calls()) {
        let pattern = "FS-FSSFS";
        let plan = plan(pattern, 0, false);
        let mut cache = cache(&plan, 2, 3);
        let mut held: [Held; 2] = [None, None];
        let role = |layer: u32| pattern.as_bytes().get(layer as usize).copied();
        let source = |layer: u32| pattern[..=layer as usize].rfind('F').unwrap() as u32;
        for (step, call) in calls.into_iter().enumerate() {
            match call {
                Call::Begin { lane, rows } => {
                    cache.step_begin(lane, rows, step as u64).unwrap();
                    held[lane] = Some((rows, None));
                }
                Call::Select { lane, layer, favourite } => {
                    let rows = held[lane].as_ref().map_or(1, |h| h.0);
                    let got = select(&mut cache, lane, layer, rows, favourite);
                    let readable = held[lane].as_ref().and_then(|h| h.1.as_ref()).map(|w| w.0);
                    let want = match (role(layer), &mut held[lane]) {
                        (Some(b'F'), Some(h)) => {
                            h.1 = Some((layer, selected(favourite)));
                            Ok(())
                        }
                        (Some(b'F'), None) => Err(Status::Stale),
                        (Some(b'S'), _) if readable == Some(source(layer)) => Ok(()),
                        (Some(b'S'), _) => Err(Status::Stale),
                        _ => Err(Status::Invalid),
                    };
                    prop_assert_eq!(got, want);
                }
                Call::Publish { lane, layer, value } => {
                    let rows = held[lane].as_ref().map_or(1, |h| h.0);
                    let given = vec![value; rows * TOPK];
                    let tensor = Tensor::from_slice("indices", &given, &[rows, TOPK]).unwrap();
                    let got = cache.publish(lane, layer, Some(tensor), IndexForm::Logical, 0, Stream::DEFAULT);
                    let want = match (role(layer), &mut held[lane]) {
                        (_, None) => Err(Status::Stale),
                        (Some(b'F'), Some(h)) => {
                            h.1 = Some((layer, vec![value; TOPK]));
                            Ok(())
                        }
                        _ => Err(Status::Invalid),
                    };
                    prop_assert_eq!(got.map_err(|e| e.status), want);
                }
                Call::Read { lane, layer } => {
                    let got = cache.indices(lane, layer).map(|(t, _)| rows(&t)).map_err(|e| e.status);
                    let want = match (role(layer), &held[lane]) {
                        (None | Some(b'-'), _) => Err(Status::Invalid),
                        (_, Some((rows, Some((from, row))))) if *from == source(layer) => Ok(vec![row.clone(); *rows]),
                        _ => Err(Status::Stale),
                    };
                    prop_assert_eq!(got, want);
                }
            }
        }
    }
}

#[test]
fn refused_calls_lose_nothing() {
    let plan = plan("FS", 0, false);
    let mut cache = cache(&plan, 1, 2);
    cache.step_begin(0, 2, 1).unwrap();
    select(&mut cache, 0, 0, 2, 3).unwrap();
    let before = rows(&cache.indices(0, 1).unwrap().0);
    assert_eq!(select(&mut cache, 0, 0, 1, 5), Err(Status::Invalid)); // Another number of rows.
    assert_eq!(cache.step_begin(0, 3, 2).unwrap_err().status, Status::Invalid); // Above max_rows.
    assert_eq!(cache.step_begin(0, 2, 1).unwrap_err().status, Status::Invalid); // The same step again.
    let short = [0i32; TOPK];
    let short = Tensor::from_slice("indices", &short, &[1, TOPK]).unwrap();
    assert!(cache.publish(0, 0, Some(short), IndexForm::Logical, 0, Stream::DEFAULT).is_err());
    assert_eq!(rows(&cache.indices(0, 1).unwrap().0), before);
}

#[test]
fn host_buffer_is_used_in_place_with_its_strides() {
    let plan = plan("FS", 0, false);
    let context = Arc::new(Context::new(BackendChoice::Cpu, 1, || ()).unwrap());
    let (lanes, max_rows, stride) = (2, 3, TOPK + 3);
    let mut memory = vec![77i32; lanes * max_rows * stride];
    let shape = CacheShape { lanes, max_rows };
    // SAFETY: `memory` outlives the cache and is only read between its calls.
    let mut cache = unsafe {
        let buffer = Tensor::from_raw_parts(
            "buffer",
            memory.as_mut_ptr().cast(),
            Device::Cpu,
            DType::I32,
            &[lanes, max_rows, TOPK],
            &[max_rows * stride, stride, 1],
        )
        .unwrap();
        Cache::new(context, plan, shape, Some(buffer)).unwrap()
    };
    cache.step_begin(1, 2, 1).unwrap();
    select(&mut cache, 1, 0, 2, 3).unwrap();
    let t = cache.indices(1, 1).unwrap().0;
    assert_eq!(t.strides(), [stride, 1]);
    drop(cache);
    for (i, &v) in memory.iter().enumerate() {
        let (row, column) = (i / stride, i % stride);
        let written = (row == 3 || row == 4) && column < TOPK;
        assert_eq!(v, if written { selected(3)[column] } else { 77 }, "element {i}");
    }
}

#[test]
fn stage_hand_off_keeps_the_indices() {
    let whole = plan("FSSFSS", 0, false);
    let (first, second) =
        (Arc::new(whole.slice(0, 2, false).unwrap()), Arc::new(whole.slice(2, 6, false).unwrap()));
    let (mut a, mut b) = (cache(&first, 1, 2), cache(&second, 1, 2));
    a.step_begin(0, 2, 5).unwrap();
    b.step_begin(0, 2, 5).unwrap();
    select(&mut a, 0, 0, 2, 3).unwrap();
    let sends = first.send().unwrap().source;
    assert_eq!(Some(sends), second.receive().map(|h| h.source));
    let mut wire = vec![0i32; 2 * TOPK];
    let out = Tensor::from_slice_mut("out", &mut wire, &[2, TOPK]).unwrap();
    a.export(0, 1, out, Stream::DEFAULT).unwrap();
    // Without them, the Shared layer must not run.
    assert_eq!(b.indices(0, 2).unwrap_err().status, Status::Stale);
    let received = Tensor::from_slice("indices", &wire, &[2, TOPK]).unwrap();
    b.publish(0, sends, Some(received), IndexForm::Logical, 0, Stream::DEFAULT).unwrap();
    assert_eq!(rows(&b.indices(0, 2).unwrap().0), vec![selected(3); 2]);
    assert_eq!(whole.role(3).unwrap(), Role::Full);
    assert_eq!(b.indices(0, 4).unwrap_err().status, Status::Stale); // Its source is layer 3 of this stage.
}

#[test]
fn draft_steps_carry_their_own_indices_of_accepted_rows() {
    let shared = plan("FS", 1, true);
    let mut cache = cache(&shared, 2, 4);
    let carry = |cache: &mut Cache, lane, from: &[i32], step| {
        let t = Tensor::from_slice("from", from, &[from.len()]).unwrap();
        cache.step_carry(lane, t, step, Stream::DEFAULT).map_err(|e| e.status)
    };
    // The target model's indices never reach the draft.
    cache.step_begin(0, 4, 1).unwrap();
    select(&mut cache, 0, 0, 4, 1).unwrap();
    assert_eq!(carry(&mut cache, 0, &[0], 2), Err(Status::Invalid));

    cache.step_begin(1, 4, 1).unwrap();
    assert_eq!(carry(&mut cache, 1, &[0], 2), Err(Status::Stale)); // Nothing selected yet.
    let given: Vec<i32> = (0..4).flat_map(|r| vec![r * 10; TOPK]).collect();
    let given = Tensor::from_slice("indices", &given, &[4, TOPK]).unwrap();
    cache.publish(1, 2, Some(given), IndexForm::Logical, 0, Stream::DEFAULT).unwrap();
    for bad in [&[1, 1][..], &[2, 1], &[4], &[-1, 0], &[-2]] {
        assert_eq!(carry(&mut cache, 1, bad, 2), Err(Status::Invalid), "{bad:?}");
    }
    carry(&mut cache, 1, &[1, 3, -1], 2).unwrap();
    let want = vec![vec![10; TOPK], vec![30; TOPK], vec![-1; TOPK]];
    assert_eq!(rows(&cache.indices(1, 2).unwrap().0), want);
    // In a carried step the draft layer does not select again …
    select(&mut cache, 1, 2, 3, 7).unwrap();
    assert_eq!(rows(&cache.indices(1, 2).unwrap().0), want);
    // … and in a new one it does.
    cache.step_begin(1, 3, 3).unwrap();
    select(&mut cache, 1, 2, 3, 7).unwrap();
    assert_eq!(rows(&cache.indices(1, 2).unwrap().0), vec![selected(7); 3]);

    let unshared = plan("FS", 1, false);
    let mut cache = self::cache(&unshared, 1, 4);
    cache.step_begin(0, 4, 1).unwrap();
    select(&mut cache, 0, 2, 4, 1).unwrap();
    assert_eq!(carry(&mut cache, 0, &[0], 2), Err(Status::Invalid));
}

#[test]
fn slots_are_refused_under_another_block_table() {
    let plan = plan("FS", 0, false);
    let mut cache = cache(&plan, 1, 1);
    cache.step_begin(0, 1, 1).unwrap();
    cache.publish(0, 0, None, IndexForm::Slots, 42, Stream::DEFAULT).unwrap();
    assert_eq!(cache.indices_under(0, 1, 42).unwrap().1, IndexForm::Slots);
    assert_eq!(cache.indices_under(0, 1, 43).unwrap_err().status, Status::Form);
    assert_eq!(cache.indices_under(0, 1, 0).unwrap_err().status, Status::Form);
    assert_eq!(
        cache.publish(0, 0, None, IndexForm::Logical, 42, Stream::DEFAULT).unwrap_err().status,
        Status::Invalid
    );
}
