//! The search against brute force over made-up losses, and against being killed at every byte of its journal.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::fresh_dir;
use indexcache::error::{Error, Status};
use indexcache::plan::Pattern;
use indexcache::search::{Calibration, Method, Outcome, Search, Spec};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn spec(layers: u32) -> Spec {
    let calibration =
        Calibration { fingerprint: "rows 0-2".into(), row_lengths: vec![300, 200, 129] };
    Spec::new(layers, 128, "model a", calibration)
}

/// A loss of the set of Shared layers, bit l for layer l: a weight a layer, an interaction a pair, and noise.
#[derive(Clone, Debug)]
struct Loss {
    layers: u32,
    weights: Vec<f64>,
    pairs: Vec<f64>,
    noise: f64,
    /// Losses are multiples of this, if it is not 0: ties.
    grain: f64,
}

impl Loss {
    fn additive(weights: &[f64]) -> Self {
        let layers = weights.len() as u32;
        Self { layers, weights: weights.to_vec(), pairs: vec![], noise: 0.0, grain: 0.0 }
    }

    /// Greedy flips layer 1 first, and the best two are 2 and 3: refining at two Shared layers finds them.
    fn trap(layers: u32) -> Self {
        let n = layers as usize;
        let mut weights = vec![1.0; n];
        weights[..4].copy_from_slice(&[0.0, 0.0, 0.1, 0.1]);
        let mut pairs = vec![0.0; n * n];
        (pairs[2 * n + 1], pairs[3 * n + 1], pairs[3 * n + 2]) = (0.1, 0.1, -0.3);
        Self { layers, weights, pairs, noise: 0.01, grain: 0.0 }
    }

    fn of(&self, shared: u32) -> f64 {
        let n = self.layers as usize;
        let is = |l: usize| shared >> l & 1 == 1;
        let mut sum = 2.0;
        for l in (0..n).filter(|l| is(*l)) {
            sum += self.weights[l];
            for other in (0..l).filter(|o| is(*o)) {
                sum += self.pairs.get(l * n + other).copied().unwrap_or(0.0);
            }
        }
        // SplitMix64 of the set.
        let mut z = u64::from(shared).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        sum += self.noise * ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        if self.grain == 0.0 { sum } else { (sum / self.grain).round() * self.grain }
    }

    fn of_pattern(&self, pattern: &Pattern) -> f64 {
        self.of(mask(pattern))
    }
}

fn mask(pattern: &Pattern) -> u32 {
    pattern.to_string().chars().enumerate().map(|(l, c)| u32::from(c == 'S') << l).sum()
}

fn letters(layers: u32, shared: u32) -> String {
    (0..layers).map(|l| if shared >> l & 1 == 1 { 'S' } else { 'F' }).collect()
}

/// Asks and tells until the search is complete; gives the patterns that were asked for.
fn drive(search: &mut Search, loss: &Loss) -> Vec<String> {
    let mut asked = Vec::new();
    let before = search.progress().evaluations;
    while let Some(candidate) = search.next().cloned() {
        assert_eq!(search.next(), Some(&candidate), "the same until its loss is there");
        assert_eq!(search.progress().evaluations, asked.len() as u64 + before);
        asked.push(candidate.pattern.to_string());
        search.report(&candidate.pattern, loss.of_pattern(&candidate.pattern)).unwrap();
    }
    asked
}

fn run(spec: &Spec, loss: &Loss) -> (Outcome, Vec<String>) {
    let mut search = Search::new(spec).unwrap();
    let asked = drive(&mut search, loss);
    (search.result(), asked)
}

/// A new journal's path in a directory of the test's own.
fn journal(test: &str) -> PathBuf {
    fresh_dir(&format!("search-{test}")).join("search.jsonl")
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, argument: &str, words: &str) {
    let Err(error) = result else { panic!("accepted") };
    assert_eq!(error.status, Status::Invalid, "{error}");
    assert!(error.message.starts_with(&format!("{argument}: expected ")), "{error}");
    assert!(error.message.contains(words), "{error}");
}

/// What the search should do, said once more over sets of Shared layers.
#[derive(Default, Debug, PartialEq)]
struct Oracle {
    /// Flipped layer, set afterwards, loss.
    steps: Vec<(u32, u32, f64)>,
    /// To Shared, to Full, set afterwards, loss.
    swaps: Vec<(u32, u32, u32, f64)>,
    evaluations: usize,
    saved: u64,
    compared: u64,
    differed: u64,
}

fn oracle(spec: &Spec, loss: &Loss) -> Oracle {
    let n = spec.layers;
    let mut starts: BTreeSet<u32> = spec.stages.iter().copied().collect();
    starts.insert(0);
    let pinned: BTreeSet<u32> = spec.pinned.iter().copied().chain(starts.iter().copied()).collect();
    let stage_of = |l: u32| starts.range(..=l).count() - 1;
    let target = spec.target_full_layers.unwrap_or(pinned.len() as u32);
    let mut seen = BTreeSet::from([0u32]);
    let mut out = Oracle::default();
    let mut set = 0u32;
    let mut rank: Vec<f64> = vec![f64::NAN; n as usize];
    let mut turn_of = vec![0u32; starts.len()];
    let mut stage = 0;
    let by_loss = |a: &(f64, u32), b: &(f64, u32)| a.partial_cmp(b).unwrap();
    while n - set.count_ones() > target {
        let here = stage;
        stage = (stage + 1) % starts.len();
        let free: Vec<u32> = (0..n)
            .filter(|l| stage_of(*l) == here && !pinned.contains(l) && set >> l & 1 == 0)
            .collect();
        if free.is_empty() {
            continue;
        }
        turn_of[here] += 1;
        let all = [1, 2, 4, 8, 16].contains(&turn_of[here]);
        let few: Vec<u32> = match spec.method {
            Method::Greedy => free.clone(),
            Method::Lazy { few } => {
                let mut order: Vec<(f64, u32)> = free
                    .iter()
                    .map(|l| (if turn_of[here] == 1 { 0.0 } else { rank[*l as usize] }, *l))
                    .collect();
                order.sort_by(by_loss);
                order.iter().take(few as usize).map(|(_, l)| *l).collect()
            }
        };
        let tried = if all { free.clone() } else { few.clone() };
        out.saved += (free.len() - tried.len()) as u64;
        let mut losses: Vec<(f64, u32)> =
            tried.iter().map(|l| (loss.of(set | 1 << l), *l)).collect();
        for (after, l) in &losses {
            seen.insert(set | 1 << l);
            rank[*l as usize] = after - loss.of(set);
        }
        losses.sort_by(by_loss);
        let (after, best) = losses[0];
        if turn_of[here] > 1 && all && few.len() < free.len() {
            out.compared += 1;
            out.differed += u64::from(!few.contains(&best));
        }
        set |= 1 << best;
        out.steps.push((best, set, after));
    }
    if let Some(full) = spec.swap_full_layers {
        let mut set = out.steps.iter().find(|s| n - s.1.count_ones() == full).unwrap().1;
        loop {
            let mut options = Vec::new();
            for a in (0..n).filter(|a| set >> a & 1 == 0 && !pinned.contains(a)) {
                for b in (0..n).filter(|b| set >> b & 1 == 1 && stage_of(*b) == stage_of(a)) {
                    let changed = (set | 1 << a) & !(1 << b);
                    seen.insert(changed);
                    options.push((loss.of(changed), a, b, changed));
                }
            }
            options.sort_by(|a, b| a.partial_cmp(b).unwrap());
            let lowest = options.first().map(|o| o.0);
            if lowest.is_none_or(|lowest| lowest >= loss.of(set)) {
                break;
            }
            // Sorted by loss, then by the layers.
            let (after, a, b, changed) = options[0];
            set = changed;
            out.swaps.push((a, b, set, after));
        }
    }
    out.evaluations = seen.len();
    out
}

fn as_oracle(outcome: &Outcome) -> Oracle {
    Oracle {
        steps: outcome.steps.iter().map(|s| (s.flipped, mask(&s.pattern), s.loss)).collect(),
        swaps: outcome
            .swaps
            .iter()
            .map(|s| (s.to_shared, s.to_full, mask(&s.pattern), s.loss))
            .collect(),
        evaluations: outcome.evaluations as usize,
        saved: outcome.saved_evaluations,
        compared: outcome.lazy_differs.compared,
        differed: outcome.lazy_differs.differed,
    }
}

fn agrees(spec: &Spec, loss: &Loss) -> (Outcome, Vec<String>) {
    let (outcome, asked) = run(spec, loss);
    assert_eq!(as_oracle(&outcome), oracle(spec, loss));
    let distinct: BTreeSet<&String> = asked.iter().collect();
    assert_eq!(distinct.len(), asked.len(), "a pattern was asked for twice");
    assert_eq!(asked.len() as u64, outcome.evaluations);
    assert!(outcome.complete);
    if outcome.swaps.is_empty() {
        assert_eq!(Search::new(spec).unwrap().progress().expected, outcome.evaluations);
    }
    assert_eq!(outcome.all_full_loss, Some(loss.of(0)));
    for (before, after) in outcome.steps.iter().zip(&outcome.steps[1..]) {
        assert_eq!(mask(&before.pattern) & !mask(&after.pattern), 0, "not nested");
        assert_eq!(before.full_layers, after.full_layers + 1);
    }
    (outcome, asked)
}

fn losses(layers: u32) -> impl Strategy<Value = Loss> {
    let n = layers as usize;
    let weight = prop_oneof![4 => -0.1..1.0f64, 1 => Just(0.0), 1 => Just(0.5)];
    let pair = prop_oneof![Just(0.0), -0.5..0.5f64];
    let pairs = prop_oneof![Just(vec![]), prop::collection::vec(pair, n * n)];
    let noise = prop_oneof![Just(0.0), Just(0.3), Just(5.0)];
    let grain = prop_oneof![Just(0.0), Just(0.25), Just(1.0), Just(100.0)];
    (prop::collection::vec(weight, n), pairs, noise, grain).prop_map(
        move |(weights, pairs, noise, grain)| Loss { layers, weights, pairs, noise, grain },
    )
}

fn specs(layers: std::ops::RangeInclusive<u32>) -> impl Strategy<Value = Spec> {
    let method = prop_oneof![Just(Method::Greedy), (1..6u32).prop_map(|few| Method::Lazy { few })];
    (layers, method, any::<[prop::sample::Index; 2]>()).prop_flat_map(|(layers, method, at)| {
        let subset = prop::sample::subsequence((0..layers).collect::<Vec<_>>(), 0..=2);
        (subset.clone(), subset).prop_filter_map("nothing to search", move |(pinned, stages)| {
            let least =
                pinned.iter().chain(&stages).chain(&[0]).collect::<BTreeSet<_>>().len() as u32;
            if least >= layers {
                return None;
            }
            let pick = |at: prop::sample::Index, low: u32| {
                let i = at.index((layers - low) as usize + 1) as u32;
                (i < layers - low).then_some(low + i)
            };
            let target = pick(at[0], least);
            let low = target.unwrap_or(least).max(least + 1);
            let swap = if low < layers { pick(at[1], low) } else { None };
            Some(Spec {
                pinned,
                stages,
                method,
                target_full_layers: target,
                swap_full_layers: swap,
                ..spec(layers)
            })
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn brute_force_agrees((spec, loss) in specs(2..=14).prop_flat_map(|s| { let l = losses(s.layers); (Just(s), l) })) {
        let (outcome, _) = agrees(&spec, &loss);
        // And the result survives its own JSON, bit for bit.
        let text = serde_json::to_string(&outcome).unwrap();
        prop_assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), outcome);
    }
}

#[test]
fn the_whole_trajectory_takes_half_the_square() {
    for n in 2..=14 {
        let weights: Vec<f64> = (0..n).map(|l| f64::from(l * 7 % 5)).collect();
        let (outcome, asked) = agrees(&spec(n), &Loss::additive(&weights));
        assert_eq!(asked.len() as u32, n * (n - 1) / 2 + 1);
        assert_eq!(asked[0], "F".repeat(n as usize));
        assert_eq!(outcome.steps.last().unwrap().pattern.to_string(), letters(n, (1 << n) - 2));
        assert_eq!((outcome.saved_evaluations, outcome.lazy_differs.compared), (0, 0));
    }
}

/// The published size: 47 layers, 1081 flips, and 1/4 rounded up to 12 Full layers.
#[test]
fn forty_seven_layers() {
    let mut search = Search::new(&spec(47)).unwrap();
    while let Some(candidate) = search.next().cloned() {
        let text = candidate.pattern.to_string();
        let cost = |(l, c): (usize, char)| if c == 'S' { (l * 29 % 47) as f64 } else { 0.0 };
        search.report(&candidate.pattern, text.chars().enumerate().map(cost).sum()).unwrap();
    }
    let outcome = search.result();
    assert_eq!(outcome.evaluations, 1082);
    let full = |key: &str| outcome.patterns[&key.parse().unwrap()].full_layers;
    assert_eq!((full("1/2"), full("1/4"), full("1/8"), full("46/47")), (24, 12, 6, 46));
    assert_eq!(outcome.patterns.len(), 46 + 3);
}

#[test]
fn ties_go_to_the_lowest_layer() {
    let (outcome, _) = agrees(&spec(5), &Loss::additive(&[0.0; 5]));
    assert_eq!(outcome.steps.iter().map(|s| s.flipped).collect::<Vec<_>>(), [1, 2, 3, 4]);
}

#[test]
fn stages_take_turns_and_keep_their_first_layer() {
    let weights: Vec<f64> = (0..12).map(f64::from).collect();
    let staged = Spec { stages: vec![4, 8], ..spec(12) };
    let (outcome, asked) = agrees(&staged, &Loss::additive(&weights));
    let flipped: Vec<u32> = outcome.steps.iter().map(|s| s.flipped).collect();
    assert_eq!(flipped, [1, 5, 9, 2, 6, 10, 3, 7, 11]);
    // A third of 3 * 4 * 3 / 2, and the all-Full pattern.
    assert_eq!(asked.len(), 3 * (3 + 2 + 1) + 1);
    assert_eq!(outcome.settings.pinned, [0, 4, 8]);
    assert_eq!(outcome.settings.stages, [0, 4, 8]);
    assert_eq!(outcome.steps.last().unwrap().pattern.to_string(), "FSSSFSSSFSSS");
}

#[test]
fn stops_at_the_target() {
    let weights: Vec<f64> = (0..8).map(|l| f64::from(8 - l)).collect();
    let short = Spec { pinned: vec![0, 7], target_full_layers: Some(5), ..spec(8) };
    let (outcome, asked) = agrees(&short, &Loss::additive(&weights));
    assert_eq!(outcome.steps.last().unwrap().pattern.to_string(), "FFFFSSSF");
    assert_eq!(asked.len(), 1 + 6 + 5 + 4);
    let keys: Vec<String> = outcome.patterns.keys().map(ToString::to_string).collect();
    assert_eq!(keys, ["5/8", "3/4", "7/8"]);
}

/// Three of 13 free layers get dear once layer 1 is Shared: lazy greedy sees that only when it tries them again.
#[test]
fn lazy_saves_evaluations_and_counts_its_misses() {
    let mut loss = Loss::additive(&[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]);
    let lazy = Spec { method: Method::Lazy { few: 2 }, ..spec(8) };
    let (outcome, asked) = agrees(&lazy, &loss);
    // Steps 1, 2 and 4 try 7, 6 and 4; the others 2, 2, 2 and 1.
    assert_eq!(asked.len(), 1 + 7 + 6 + 2 + 4 + 2 + 2 + 1);
    assert_eq!(outcome.saved_evaluations, 28 - 24);
    assert_eq!((outcome.lazy_differs.compared, outcome.lazy_differs.differed), (2, 0));

    loss.pairs = vec![0.0; 64];
    for cheap in [2, 3] {
        loss.pairs[cheap * 8 + 1] = 9.0;
    }
    let (outcome, _) = agrees(&lazy, &loss);
    assert_eq!(outcome.steps[1].flipped, 4, "step 2 tries all");
    assert_eq!((outcome.lazy_differs.compared, outcome.lazy_differs.differed), (2, 1));
}

#[test]
fn swaps_repair_what_greedy_could_not_see() {
    let loss = Loss::trap(4);
    let refine = Spec { target_full_layers: Some(2), swap_full_layers: Some(2), ..spec(4) };
    let (outcome, _) = agrees(&refine, &loss);
    assert_eq!(outcome.steps[1].pattern.to_string(), "FSSF");
    assert_eq!(outcome.swaps.len(), 1);
    let swap = &outcome.swaps[0];
    assert_eq!((swap.pattern.to_string().as_str(), swap.to_shared, swap.to_full), ("FFSS", 3, 1));
    assert_eq!(outcome.patterns[&"1/2".parse().unwrap()].pattern.to_string(), "FSSF", "nested");
    let (plain, _) = agrees(&Spec { swap_full_layers: None, ..refine }, &loss);
    assert_eq!(plain.steps, outcome.steps);
}

/// What a host with cached hidden states relies on.
#[test]
fn candidates_share_the_layers_below_the_first_changed_one_with_their_base() {
    let loss = Loss::trap(9);
    let spec = Spec { swap_full_layers: Some(7), ..spec(9) };
    let mut search = Search::new(&spec).unwrap();
    let mut measured = vec![];
    while let Some(candidate) = search.next().cloned() {
        let (new, base) = (candidate.pattern.to_string(), candidate.base.to_string());
        let first = candidate.first_changed_layer as usize;
        assert_eq!(new[..first], base[..first]);
        if measured.is_empty() {
            assert_eq!((first, &new, &base), (0, &"F".repeat(9), &"F".repeat(9)));
        } else {
            assert_ne!(new[first..=first], base[first..=first]);
            assert!(measured.contains(&base), "the base's own run came before");
        }
        measured.push(new);
        search.report(&candidate.pattern, loss.of_pattern(&candidate.pattern)).unwrap();
    }
    let swaps = search.result().swaps;
    assert!(!swaps.is_empty(), "the trap should leave something to refine");
}

#[test]
fn progress_counts_a_refinement_by_its_rounds() {
    let loss = Loss::trap(9);
    let spec = Spec { swap_full_layers: Some(7), ..spec(9) };
    let mut search = Search::new(&spec).unwrap();
    // 36 flips, the all-Full pattern, and 2 * 6 exchanges, 6 of which the flips have tried.
    assert_eq!(search.progress().expected, 36 + 1 + 12 - 6);
    let asked = drive(&mut search, &loss);
    assert_eq!(search.progress().expected, asked.len() as u64);
    assert!(asked.len() > 43);
}

/// A search killed when its journal had any number of bytes: it goes on as if it had not been. After one more loss the
/// file is what it was at that point, so what follows is, too; from the middle of each line it runs to the end.
#[test]
fn killed_at_every_byte() {
    let path = journal("killed");
    let loss = Loss::trap(5);
    let spec = Spec { method: Method::Lazy { few: 2 }, swap_full_layers: Some(3), ..spec(5) };
    let (want, all) = run(&spec, &loss);
    assert!(!want.swaps.is_empty());
    let mut search = Search::new(&spec).unwrap();
    search.save(&path).unwrap();
    let mut states = vec![search.result()];
    while let Some(candidate) = search.next().cloned() {
        search.report(&candidate.pattern, loss.of_pattern(&candidate.pattern)).unwrap();
        states.push(search.result());
    }
    drop(search);
    let bytes = fs::read(&path).unwrap();
    let ends: Vec<usize> = (1..=bytes.len()).filter(|end| bytes[end - 1] == b'\n').collect();
    assert_eq!(ends.len(), all.len() + 1);
    for size in 0..=bytes.len() {
        fs::write(&path, &bytes[..size]).unwrap();
        let known = ends.iter().filter(|end| **end <= size).count().saturating_sub(1);
        let mut search = Search::resume(&path, &spec).unwrap();
        assert_eq!(search.result(), states[known], "killed at byte {size}");
        let next = search.next().map(|c| c.pattern.clone());
        assert_eq!(next.as_ref().map(ToString::to_string).as_ref(), all.get(known));
        if let Some(next) = next {
            search.report(&next, loss.of_pattern(&next)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), bytes[..ends[known + 1]], "killed at byte {size}");
        }
        if ends.contains(&(size + 30)) {
            drive(&mut search, &loss);
            assert_eq!(search.result(), want);
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
}

/// Each byte changed, removed or doubled: refused, or nothing is lost but a torn last line.
#[test]
fn damaged_at_every_byte() {
    let path = journal("damaged");
    let loss = Loss { noise: 0.7, ..Loss::additive(&[0.0; 4]) };
    let mut search = Search::new(&spec(4)).unwrap();
    search.save(&path).unwrap();
    drive(&mut search, &loss);
    let want = search.result();
    drop(search);
    let bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    for at in 0..bytes.len() {
        let mut spoiled = vec![bytes.clone(), bytes.clone(), bytes.clone(), bytes.clone()];
        spoiled[0][at] ^= 1;
        spoiled[1][at] = b'\n';
        spoiled[2].remove(at);
        spoiled[3].insert(at, bytes[at]);
        for (how, spoiled) in spoiled.into_iter().enumerate().filter(|(_, s)| *s != bytes) {
            fs::write(&path, &spoiled).unwrap();
            match Search::resume(&path, &spec(4)) {
                Err(error) => {
                    assert_eq!(error.status, Status::Invalid);
                    assert_eq!(fs::read(&path).unwrap(), spoiled, "refused, but changed");
                }
                // An end of line that is gone looks like a line that was being written.
                Ok(mut search) => {
                    assert!(at == last && how != 3, "byte {at} spoiled ({how}) and accepted");
                    assert_eq!(drive(&mut search, &loss).len(), 1);
                    assert_eq!(search.result(), want);
                }
            }
        }
    }
    // Whole lines lost, exchanged, repeated.
    let lines: Vec<&[u8]> = bytes.split_inclusive(|b| *b == b'\n').collect();
    for (a, b) in [(1, 2), (2, 3), (0, 1), (3, 6)] {
        let mut other = lines.clone();
        other.swap(a, b);
        fs::write(&path, other.concat()).unwrap();
        assert!(Search::resume(&path, &spec(4)).is_err(), "exchanged {a} and {b}");
        let mut other = lines.clone();
        other.remove(a);
        fs::write(&path, other.concat()).unwrap();
        assert!(Search::resume(&path, &spec(4)).is_err(), "lost {a}");
        let mut other = lines.clone();
        other.insert(a, lines[a]);
        fs::write(&path, other.concat()).unwrap();
        refused(Search::resume(&path, &spec(4)), "path", &format!("line {}", a + 2));
    }
    // The start of another search's journal on top of this one's losses.
    let other = Spec { model: "model b".into(), ..spec(4) };
    let pasted = String::from_utf8(bytes.clone()).unwrap().replace("model a", "model b");
    fs::write(&path, pasted).unwrap();
    refused(Search::resume(&path, &other), "path", "line 2");
    fs::write(&path, [&bytes[..], &[0; 400]].concat()).unwrap();
    refused(Search::resume(&path, &spec(4)), "path", "line 9");
}

/// FNV-1a of the text of a journal, less its checks.
fn with_checks(header: &str, losses: &[(&str, f64)]) -> String {
    let fnv = |hash: u64, text: &str| {
        text.bytes().fold(hash, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
    };
    let mut check = fnv(0xcbf2_9ce4_8422_2325, header);
    let mut text = header.to_owned();
    for (pattern, loss) in losses {
        let body = format!("{{\"pattern\":\"{pattern}\",\"loss\":{loss:?}");
        check = fnv(check, &format!("{body}}}"));
        text += &format!("{body},\"check\":\"{check:016x}\"}}\n");
    }
    text
}

/// Nothing is damaged, but it is not what this search asks for.
#[test]
fn losses_that_were_not_asked_for() {
    let path = journal("order");
    let mut search = Search::new(&spec(3)).unwrap();
    search.save(&path).unwrap();
    let header = fs::read_to_string(&path).unwrap();
    let good = [("FFF", 1.0), ("FSF", 1.5), ("FFS", 1.25), ("FSS", 2.0)];
    for (pattern, loss) in good {
        search.report(&pattern.parse().unwrap(), loss).unwrap();
    }
    drop(search);
    assert_eq!(fs::read_to_string(&path).unwrap(), with_checks(&header, &good));
    let [first, second, third, last] = good;
    for (line, other) in [
        (2, vec![second]),
        (3, vec![first, third]),
        (3, vec![first, first]),
        (5, vec![first, second, third, third]),
        (6, vec![first, second, third, last, last]),
    ] {
        fs::write(&path, with_checks(&header, &other)).unwrap();
        refused(Search::resume(&path, &spec(3)), "path", &format!("line {line} "));
    }
}

/// What a torn line left does not show behind a shorter one.
#[test]
fn a_torn_line_is_gone() {
    let path = journal("torn");
    let mut search = Search::new(&spec(3)).unwrap();
    search.save(&path).unwrap();
    let first = search.next().unwrap().pattern.clone();
    drop(search);
    let header = fs::read_to_string(&path).unwrap();
    let long = with_checks(&header, &[("FFF", -1.2345678901234567e-300)]);
    fs::write(&path, long.trim_end()).unwrap();
    Search::resume(&path, &spec(3)).unwrap().report(&first, 1.0).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), with_checks(&header, &[("FFF", 1.0)]));
}

#[test]
fn losses_come_back_bit_for_bit() {
    let values = [
        0.1 + 0.2,
        -0.0,
        f64::MIN_POSITIVE,
        f64::from_bits(1),
        f64::MAX,
        f64::MIN,
        1.0,
        9007199254740993.0,
        f64::from_bits(0x000f_ffff_ffff_ffff),
        f64::from_bits(0x3ff0_0000_0000_0001),
    ];
    let path = journal("bits");
    for value in values {
        let _ = fs::remove_file(&path);
        let mut search = Search::new(&spec(3)).unwrap();
        search.save(&path).unwrap();
        let first = search.next().unwrap().pattern.clone();
        search.report(&first, value).unwrap();
        drop(search);
        let search = Search::resume(&path, &spec(3)).unwrap();
        let got = search.result().all_full_loss.unwrap();
        assert_eq!(got.to_bits(), value.to_bits(), "{value:e}");
        let json = serde_json::to_string(&search.result()).unwrap();
        let back: Outcome = serde_json::from_str(&json).unwrap();
        assert_eq!(back.all_full_loss.unwrap().to_bits(), value.to_bits(), "{json}");
    }
}

/// The journal may start late: it gets what is known, and then the rest.
#[test]
fn saved_halfway() {
    let path = journal("halfway");
    let loss = Loss { noise: 1.0, ..Loss::additive(&[0.0; 5]) };
    let (want, all) = run(&spec(5), &loss);
    for (told, _) in all.iter().enumerate() {
        let _ = fs::remove_file(&path);
        let mut search = Search::new(&spec(5)).unwrap();
        for _ in 0..told {
            let pattern = search.next().unwrap().pattern.clone();
            search.report(&pattern, loss.of_pattern(&pattern)).unwrap();
        }
        search.save(&path).unwrap();
        let pattern = search.next().unwrap().pattern.clone();
        search.report(&pattern, loss.of_pattern(&pattern)).unwrap();
        search.save(&path).unwrap(); // Its own journal: nothing to do.
        drop(search);
        let mut search = Search::resume(&path, &spec(5)).unwrap();
        assert_eq!(drive(&mut search, &loss), all[told + 1..]);
        assert_eq!(search.result(), want);
    }
}

#[test]
fn a_journal_moves_with_the_next_save() {
    let (one, loss) = (journal("moves"), Loss::additive(&[0.0; 3]));
    let two = one.with_file_name("two.jsonl");
    let mut search = Search::new(&spec(3)).unwrap();
    search.save(&one).unwrap();
    search.save(&two).unwrap();
    drive(&mut search, &loss);
    assert!(Search::resume(&one, &spec(3)).unwrap().next().is_some(), "left as it was");
    drop(search);
    assert!(Search::resume(&two, &spec(3)).unwrap().next().is_none());
}

/// Somebody else's file in the place of the journal is not the journal.
#[test]
fn a_journal_that_was_moved_away() {
    let path = journal("moved");
    let mut search = Search::new(&spec(3)).unwrap();
    search.save(&path).unwrap();
    fs::rename(&path, path.with_file_name("elsewhere.jsonl")).unwrap();
    fs::write(&path, "something else").unwrap();
    refused(search.save(&path), "path", "which exists");
    fs::remove_file(&path).unwrap();
    search.save(&path).unwrap();
    drop(search);
    assert_eq!(Search::resume(&path, &spec(3)).unwrap().progress().evaluations, 0);
}

#[test]
fn fingerprints_are_any_text() {
    let path = journal("text");
    let odd = Spec { model: "two\nlines, \"quotes\" and \u{e9}".into(), ..spec(3) };
    let mut search = Search::new(&odd).unwrap();
    search.save(&path).unwrap();
    drive(&mut search, &Loss::trap(4));
    let want = search.result();
    drop(search);
    assert_eq!(Search::resume(&path, &odd).unwrap().result(), want);
}

/// By the system calls of a process of its own: every loss, and the new file's name, are flushed before the next loss.
#[cfg(target_os = "linux")]
#[test]
fn a_report_returns_when_the_loss_is_on_the_disk() {
    const CHILD: &str = "INDEXCACHE_TEST_FLUSH";
    if let Some(path) = std::env::var_os(CHILD) {
        let mut search = Search::new(&spec(3)).unwrap();
        search.save(path).unwrap();
        drive(&mut search, &Loss::trap(4));
        return;
    }
    if !common::has("strace") {
        return common::skip("what a report flushes: no strace");
    }
    let path = journal("flush");
    let log = path.with_file_name("calls");
    let output = std::process::Command::new("strace")
        .args(["-f", "-e", "trace=openat,write,fsync,fdatasync", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_report_returns_when_the_loss_is_on_the_disk"])
        .env(CHILD, &path)
        .output()
        .unwrap();
    if !String::from_utf8_lossy(&output.stdout).contains("running 1 test") {
        return common::skip("what a report flushes: strace may not trace");
    }
    assert!(output.status.success());
    let log = fs::read_to_string(log).unwrap();
    let (_, calls) = log.split_once("search.jsonl").unwrap();
    let calls: Vec<&str> = calls
        .lines()
        .filter_map(|line| {
            ["indexcache-search", "pattern", "fdatasync", "fsync"]
                .into_iter()
                .find(|call| line.contains(call))
        })
        .collect();
    let loss = ["pattern", "fdatasync"];
    let want =
        [["indexcache-search", "fdatasync"].as_slice(), &["fsync"], &loss, &loss, &loss, &loss];
    assert_eq!(calls, want.concat());
}

#[test]
fn two_searches_do_not_share_a_journal() {
    let path = journal("shared");
    let mut search = Search::new(&spec(3)).unwrap();
    search.save(&path).unwrap();
    refused(Search::resume(&path, &spec(3)), "path", "no other search");
    refused(Search::new(&spec(3)).unwrap().save(&path), "path", "which exists");
    drop(search);
    let _ = Search::resume(&path, &spec(3)).unwrap();
}

#[test]
fn files_that_are_no_journal() {
    let path = journal("no-journal");
    let resume = |path: &Path| Search::resume(path, &spec(3)).err().unwrap();
    let error = resume(&path);
    assert_eq!(error.status, Status::Io);
    assert!(error.message.contains("search.jsonl could not be opened: "), "{error}");
    let directory = path.parent().unwrap();
    assert_eq!(resume(directory).status, Status::Invalid);
    for text in
        ["{}\n", "hello", "hello\n", "[]\n", "{\"format\":\"indexcache-search-journal/2\"}\n"]
    {
        fs::write(&path, text).unwrap();
        refused(Search::resume(&path, &spec(3)), "path", "line 1");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    let error = Search::new(&spec(3)).unwrap().save(directory.join("none/at all")).unwrap_err();
    assert_eq!(error.status, Status::Io);
    assert!(error.message.contains("could not be created: "), "{error}");
}

/// A disk that is full: the report fails and nothing is lost; with room again it works. In a process of its own, whose
/// files may not grow.
#[cfg(target_os = "linux")]
#[test]
#[allow(clippy::undocumented_unsafe_blocks)] // Plain system calls.
fn a_write_that_fails_changes_nothing() {
    const CHILD: &str = "INDEXCACHE_TEST_FULL";
    const NAME: &str = "a_write_that_fails_changes_nothing";
    if std::env::var_os(CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", NAME, "--test-threads=1"]).env(CHILD, "1");
        common::run(&mut child);
        return;
    }
    let limit = |bytes: u64| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
    };
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let path = journal("full");
    let loss = Loss { noise: 0.0, ..Loss::trap(4) };
    let (want, all) = run(&spec(4), &loss);
    limit(100);
    let mut search = Search::new(&spec(4)).unwrap();
    assert_eq!(search.save(&path).unwrap_err().status, Status::Io);
    assert!(!path.exists(), "half a journal");
    limit(libc::RLIM_INFINITY);
    search.save(&path).unwrap();
    for told in 0..all.len() {
        let (pattern, size) =
            (search.next().unwrap().pattern.clone(), fs::read(&path).unwrap().len() as u64);
        // The longest leaves more behind than the line that then fits.
        for room in [0, 1, 30, 77] {
            limit(size + room);
            let error = search.report(&pattern, -1.2345678901234567e-300).unwrap_err();
            assert_eq!(error.status, Status::Io);
            assert_eq!(search.next().unwrap().pattern, pattern);
            assert_eq!(search.progress().evaluations, told as u64);
        }
        limit(libc::RLIM_INFINITY);
        search.report(&pattern, loss.of_pattern(&pattern)).unwrap();
    }
    drop(search);
    let search = Search::resume(&path, &spec(4)).unwrap();
    assert_eq!((search.next(), search.result()), (None, want));
}

/// What must be the same when a search goes on; each difference is named.
#[test]
fn resume_refuses_another_search() {
    let path = journal("another");
    let first = Spec { pinned: vec![3], stages: vec![5], ..spec(8) };
    Search::new(&first).unwrap().save(&path).unwrap();
    let calibration = |fingerprint: &str, rows: &[u64]| Calibration {
        fingerprint: fingerprint.into(),
        row_lengths: rows.to_vec(),
    };
    let same = first.clone();
    let others = [
        ("model", "model a", Spec { model: "model b".into(), ..same.clone() }),
        (
            "calibration",
            "rows 0-2",
            Spec { calibration: calibration("rows 3-5", &[300, 200, 129]), ..same.clone() },
        ),
        (
            "calibration",
            "129",
            Spec { calibration: calibration("rows 0-2", &[300, 200, 130]), ..same.clone() },
        ),
        (
            "calibration",
            "3",
            Spec { calibration: calibration("rows 0-2", &[300, 129]), ..same.clone() },
        ),
        ("layers", "8", Spec { layers: 9, ..same.clone() }),
        ("topk", "128", Spec { topk: 64, ..same.clone() }),
        ("method", "greedy", Spec { method: Method::Lazy { few: 3 }, ..same.clone() }),
        ("pinned", "[0,3,5]", Spec { pinned: vec![2], ..same.clone() }),
        ("stages", "[0,5]", Spec { stages: vec![], pinned: vec![3, 5], ..same.clone() }),
        ("target_full_layers", "null", Spec { target_full_layers: Some(4), ..same.clone() }),
        ("swap_full_layers", "null", Spec { swap_full_layers: Some(4), ..same.clone() }),
    ];
    for (field, was, other) in others {
        refused(Search::resume(&path, &other), field, was);
        refused(Search::resume(&path, &other), field, "as in the journal");
    }
    // The same said in another way is the same.
    let again = Spec { pinned: vec![0, 3, 5], stages: vec![0, 5], ..first };
    let _ = Search::resume(&path, &again).unwrap();
}

#[test]
fn specs_that_are_refused() {
    let check = |field: &str, words: &str, change: fn(&mut Spec)| {
        let mut spec = spec(8);
        change(&mut spec);
        refused(Search::new(&spec), field, words);
    };
    check("layers", "2 to 4096, got 1", |s| s.layers = 1);
    check("layers", "4097", |s| s.layers = 4097);
    check("topk", "got 0", |s| s.topk = 0);
    check("model", "fingerprint", |s| s.model.clear());
    check("calibration", "fingerprint", |s| s.calibration.fingerprint.clear());
    check("row_lengths", "none", |s| s.calibration.row_lengths.clear());
    check("row_lengths", "got 128 in row 1", |s| s.calibration.row_lengths[1] = 128);
    check("row_lengths", "got 0 in row 2", |s| s.calibration.row_lengths[2] = 0);
    check("pinned", "below 8, got 8", |s| s.pinned = vec![8]);
    check("pinned", "3 after 3", |s| s.pinned = vec![3, 3]);
    check("pinned", "2 after 3", |s| s.pinned = vec![3, 2]);
    check("pinned", "0 after 1", |s| s.pinned = vec![1, 0]);
    check("pinned", "all layers", |s| s.pinned = (0..8).collect());
    check("stages", "below 8, got 9", |s| s.stages = vec![4, 9]);
    check("stages", "0 after 0", |s| s.stages = vec![0, 0]);
    check("stages", "2 after 4", |s| s.stages = vec![4, 2]);
    check("few", "got 0", |s| s.method = Method::Lazy { few: 0 });
    check("target_full_layers", "1 to 7, got 0", |s| s.target_full_layers = Some(0));
    check("target_full_layers", "1 to 7, got 8", |s| s.target_full_layers = Some(8));
    check("target_full_layers", "3 to 7, got 2", |s| {
        (s.pinned, s.stages, s.target_full_layers) = (vec![2], vec![4], Some(2));
    });
    check("swap_full_layers", "2 to 7, got 1", |s| s.swap_full_layers = Some(1));
    check("swap_full_layers", "2 to 7, got 8", |s| s.swap_full_layers = Some(8));
    check("swap_full_layers", "4 to 7, got 3", |s| {
        (s.target_full_layers, s.swap_full_layers) = (Some(4), Some(3));
    });
}

#[test]
fn reports_that_are_refused() {
    let path = journal("reports");
    let mut search = Search::new(&spec(4)).unwrap();
    search.save(&path).unwrap();
    let pattern = |text: &str| text.parse::<Pattern>().unwrap();
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused(search.report(&pattern("FFFF"), bad), "loss", "a finite number");
    }
    for other in ["FSFF", "FFF", "FFFFF", "FFF-"] {
        refused(search.report(&pattern(other), 1.0), "pattern", "FFFF");
    }
    search.report(&pattern("FFFF"), 1.0).unwrap();
    search.report(&pattern("FFFF"), 1.0).unwrap();
    refused(
        search.report(&pattern("FFFF"), 1.5),
        "loss",
        "1.0 as reported before for FFFF, got 1.5",
    );
    refused(search.report(&pattern("FFFF"), f64::NAN), "loss", "finite");
    refused(search.report(&pattern("FFSF"), 1.0), "pattern", "FSFF");
    let before = fs::read(&path).unwrap();
    assert_eq!(before.iter().filter(|b| **b == b'\n').count(), 2, "the header and one loss");
    let asked = drive(&mut search, &Loss::additive(&[0.0, 1.0, 2.0, 3.0]));
    assert_eq!(asked.len(), 6);
    refused(search.report(&pattern("FFFS"), 7.0), "loss", "as reported before");
    refused(search.report(&pattern("FFF-"), 7.0), "pattern", "complete");
}

/// The keys that others read.
#[test]
fn the_result_as_json() {
    let loss = Loss::additive(&[0.0, 0.5, 0.25, 1.0]);
    let spec = Spec { method: Method::Lazy { few: 1 }, swap_full_layers: Some(2), ..spec(4) };
    let mut search = Search::new(&spec).unwrap();
    let early = serde_json::to_value(search.result()).unwrap();
    assert_eq!((&early["complete"], &early["all_full_loss"]), (&false.into(), &().into()));
    drive(&mut search, &loss);
    let want = serde_json::json!({
        "format": "indexcache-search/1", "layers": 4, "topk": 128, "model": "model a",
        "calibration": {"fingerprint": "rows 0-2", "rows": 3, "shortest_row": 129},
        "method": {"name": "lazy", "few": 1}, "pinned": [0], "stages": [0],
        "target_full_layers": null, "swap_full_layers": 2,
        "complete": true, "all_full_loss": 2.0,
        "steps": [
            {"full_layers": 3, "flipped": 2, "pattern": "FFSF", "loss": 2.25, "evaluated": [
                {"layer": 1, "loss": 2.5}, {"layer": 2, "loss": 2.25}, {"layer": 3, "loss": 3.0}]},
            {"full_layers": 2, "flipped": 1, "pattern": "FSSF", "loss": 2.75, "evaluated": [
                {"layer": 1, "loss": 2.75}, {"layer": 3, "loss": 3.25}]},
            {"full_layers": 1, "flipped": 3, "pattern": "FSSS", "loss": 3.75, "evaluated": [
                {"layer": 3, "loss": 3.75}]},
        ],
        "swaps": [], "evaluations": 8, "saved_evaluations": 0,
        "lazy_differs": {"compared": 1, "differed": 0},
        "patterns": {
            "1/8": {"full_layers": 1, "pattern": "FSSS", "loss": 3.75},
            "1/4": {"full_layers": 1, "pattern": "FSSS", "loss": 3.75},
            "1/2": {"full_layers": 2, "pattern": "FSSF", "loss": 2.75},
            "3/4": {"full_layers": 3, "pattern": "FFSF", "loss": 2.25},
        },
    });
    assert_eq!(serde_json::to_value(search.result()).unwrap(), want);
    let text = serde_json::to_string(&search.result()).unwrap();
    let places: Vec<_> = ["1/8", "1/4", "1/2", "3/4"].map(|k| text.find(k).unwrap()).into();
    assert!(places.is_sorted(), "smallest first: {text}");
}
