//! What a searched pattern costs and saves, beside other patterns.

use super::evaluate::{Rows, losses, overlap};
use super::model::Model;
use super::{bar, baselines};
use indexcache::error::Result;
use indexcache::plan::{Indexers, Pattern, Role};
use indexcache::search::{Outcome, Retention};
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::Duration;

/// Random patterns of each retention that has them.
const SEEDS: std::ops::RangeInclusive<u32> = 1..=5;

/// Its JSON keys are a promise: others read them.
#[derive(Serialize)]
pub struct Report {
    format: &'static str,
    result: Outcome,
    held_out: HeldOut,
    /// By Full layers, most first.
    table: Vec<Entry>,
    /// `[i][j]`: the mean share of what layer `j` selects that layer `i` selects too, with every layer Full.
    overlap: Vec<Vec<f64>>,
    sensitivity: Vec<Sensitivity>,
    time: Time,
}

/// The text that the search did not see.
#[derive(Serialize)]
struct HeldOut {
    rows: usize,
    bytes: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    AllFull,
    Greedy,
    #[serde(rename = "greedy+swaps")]
    Swaps,
    Uniform,
    Similarity,
    Random,
}

/// A pattern and its losses in bits per byte.
#[derive(Serialize)]
struct Entry {
    kind: Kind,
    full_layers: usize,
    pattern: Pattern,
    calibration_loss: f64,
    held_out_loss: f64,
    /// Share of the layers that run no indexer.
    indexer_time_saved: f64,
    seed: Option<u32>,
}

/// What one layer's indexer is worth while all others run: the calibration loss without it.
#[derive(Serialize)]
struct Sensitivity {
    layer: usize,
    loss: f64,
    rise: f64,
}

/// What a search took, or the part of it that this process did.
#[derive(Serialize)]
pub struct Time {
    seconds: f64,
    evaluations: u64,
    layers_run: usize,
    layers_skipped_by_cached_states: usize,
    /// As if layers took equally long.
    seconds_saved_estimate: f64,
}

impl Time {
    pub fn of(wall: Duration, evaluations: u64, rows: &Rows<'_>) -> Self {
        let (seconds, run, skipped) = (wall.as_secs_f64(), rows.layers_run, rows.layers_skipped);
        Time {
            seconds,
            evaluations,
            layers_run: run,
            layers_skipped_by_cached_states: skipped,
            seconds_saved_estimate: seconds * skipped as f64 / run.max(1) as f64,
        }
    }
}

impl Report {
    /// Measures what the search has not.
    pub fn new(
        model: &Model,
        calibration: &[&[u8]],
        held_out: &[&[u8]],
        result: Outcome,
        time: Time,
    ) -> Result<Self> {
        let layers = model.layers();
        let all_full = Pattern::all_full(&Indexers::exactly(vec![true; layers])?)?;
        let overlap = overlap(model, calibration, &all_full)?;
        let rows = rows(&result, &all_full, &overlap)?;
        let alone = (1..layers).map(|layer| baselines::without(layer, layers));
        let alone: Vec<Pattern> = alone.collect::<Result<_>>()?;

        let mut losses = known(&result, &all_full, &alone);
        let patterns = || rows.iter().map(|(_, pattern, _)| pattern);
        measure(model, calibration, patterns().chain(&alone), &mut losses, "calibration text")?;
        let mut unseen = HashMap::new();
        measure(model, held_out, patterns(), &mut unseen, "held-out text")?;

        let entry = |(kind, pattern, seed): &(Kind, Pattern, Option<u32>)| Entry {
            kind: *kind,
            full_layers: pattern.count(Role::Full),
            pattern: pattern.clone(),
            calibration_loss: losses[pattern],
            held_out_loss: unseen[pattern],
            indexer_time_saved: pattern.count(Role::Shared) as f64 / layers as f64,
            seed: *seed,
        };
        let sensitivity = |(layer, pattern): (usize, &Pattern)| Sensitivity {
            layer,
            loss: losses[pattern],
            rise: losses[pattern] - losses[&all_full],
        };
        Ok(Report {
            format: "indexcache-search-report/1",
            result,
            held_out: HeldOut {
                rows: held_out.len(),
                bytes: held_out.iter().map(|row| row.len()).sum(),
            },
            table: rows.iter().map(entry).collect(),
            overlap,
            sensitivity: (1..).zip(&alone).map(sensitivity).collect(),
            time,
        })
    }
}

/// The patterns of the table.
fn rows(
    result: &Outcome,
    all_full: &Pattern,
    overlap: &[Vec<f64>],
) -> Result<Vec<(Kind, Pattern, Option<u32>)>> {
    let layers = all_full.layers();
    let halves = [2, 4, 8].map(|whole| Retention::new(1, whole).map(|r| r.of(layers as u32)));
    let mut rows = vec![(Kind::AllFull, all_full.clone(), None)];
    for step in &result.steps {
        let full = step.full_layers as usize;
        rows.push((Kind::Greedy, step.pattern.clone(), None));
        if result.settings.swap_full_layers == Some(step.full_layers) {
            let refined = result.swaps.last().map_or(&step.pattern, |swap| &swap.pattern);
            rows.push((Kind::Swaps, refined.clone(), None));
        }
        rows.push((Kind::Uniform, baselines::uniform(full, layers)?, None));
        rows.push((Kind::Similarity, baselines::similarity(full, overlap)?, None));
        if halves.contains(&Some(step.full_layers)) {
            for seed in SEEDS {
                rows.push((Kind::Random, baselines::random(full, layers, seed)?, Some(seed)));
            }
        }
    }
    Ok(rows)
}

/// What the search has measured of the table and of `alone`.
fn known(result: &Outcome, all_full: &Pattern, alone: &[Pattern]) -> HashMap<Pattern, f64> {
    let first = result.steps.first().map_or(&[][..], |step| &step.evaluated);
    let alone = first.iter().map(|e| (&alone[e.layer as usize - 1], e.loss));
    let steps = result.steps.iter().map(|step| (&step.pattern, step.loss));
    let swaps = result.swaps.iter().map(|swap| (&swap.pattern, swap.loss));
    let all_full = result.all_full_loss.map(|loss| (all_full, loss));
    let all = all_full.into_iter().chain(alone).chain(steps).chain(swaps);
    all.map(|(pattern, loss)| (pattern.clone(), loss)).collect()
}

/// Adds the losses of the patterns that are not known.
fn measure<'a>(
    model: &Model,
    texts: &[&[u8]],
    patterns: impl Iterator<Item = &'a Pattern>,
    known: &mut HashMap<Pattern, f64>,
    what: &'static str,
) -> Result<()> {
    let unknown: HashSet<&Pattern> = patterns.filter(|p| !known.contains_key(*p)).collect();
    let unknown: Vec<Pattern> = unknown.into_iter().cloned().collect();
    let bar = bar(what, (unknown.len() * texts.len()) as u64);
    let measured = losses(model, texts, &unknown, || bar.inc(1))?;
    bar.finish_and_clear();
    known.extend(unknown.into_iter().zip(measured));
    Ok(())
}

/// The table for a person.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HeldOut { rows, bytes } = self.held_out;
        writeln!(
            f,
            "Bits per byte; on the right of text that the search did not see ({rows} rows, {bytes} bytes)."
        )?;
        writeln!(
            f,
            "Saved is the share of layers without an indexer, random the mean of {} patterns.\n",
            SEEDS.count()
        )?;
        let width = self.overlap.len().max(6);
        writeln!(
            f,
            "Full  saved  {:width$}  calibration  |  greedy   uniform  similarity    random",
            "greedy"
        )?;
        for e in &self.table {
            let (full, saved) = (e.full_layers, 100.0 * e.indexer_time_saved);
            let (pattern, loss) = (&e.pattern, e.calibration_loss);
            let start = format!("{full:4}  {saved:3.0} %  {pattern}  {loss:11.4}  |");
            match e.kind {
                Kind::AllFull => writeln!(f, "{start}{:8.4}", e.held_out_loss)?,
                Kind::Greedy => {
                    let [uniform, similarity, random] =
                        [Kind::Uniform, Kind::Similarity, Kind::Random]
                            .map(|k| self.held_out(k, full));
                    let others = format!("{uniform:>10}{similarity:>12}{random:>10}");
                    writeln!(f, "{start}{:8.4}{}", e.held_out_loss, others.trim_end())?;
                }
                Kind::Swaps => writeln!(f, "{start}{:8.4}  after exchanges", e.held_out_loss)?,
                _ => {}
            }
        }
        writeln!(f, "\nindex_topk_pattern for")?;
        for (retention, found) in &self.result.patterns {
            writeln!(f, "{:>6} {}", retention.to_string(), found.pattern)?;
        }
        let Time { seconds, evaluations, seconds_saved_estimate: saved, .. } = self.time;
        writeln!(
            f,
            "\n{evaluations} losses in {seconds:.0} s; kept hidden states saved about {saved:.0} s"
        )
    }
}

impl Report {
    /// Mean held-out loss of a kind's patterns with so many Full layers; nothing where there are none.
    fn held_out(&self, kind: Kind, full: usize) -> String {
        let of = |e: &&Entry| e.kind == kind && e.full_layers == full;
        let losses: Vec<f64> = self.table.iter().filter(of).map(|e| e.held_out_loss).collect();
        match losses.len() {
            0 => String::new(),
            n => format!("{:.4}", losses.iter().sum::<f64>() / n as f64),
        }
    }
}
