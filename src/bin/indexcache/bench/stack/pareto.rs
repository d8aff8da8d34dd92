//! `--search`: the loss of each pattern of a search beside what it takes.

use super::model::{Decoder, Patterned};
use super::times::{By, Phase, Times};
use super::{Args, json};
use crate::{Failure, Output};
use indexcache::plan::Role;
use indexcache::search::Outcome;
use serde::Serialize;
use std::fmt::Write as _;

/// Its JSON keys are a promise: others read them.
#[derive(Serialize)]
struct Report<'a> {
    card: &'a str,
    commit: &'a str,
    context: u32,
    batch: u32,
    tp: u32,
    patterns: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    full_layers: u32,
    pattern: String,
    loss: f64,
    prefill_us: f64,
    prefill_gain: f64,
    decode_us: f64,
    decode_gain: f64,
    /// No other pattern has a lower loss and takes no longer, or the same loss and takes less.
    best: bool,
}

pub fn run(
    times: &Times,
    decoder: &Decoder,
    result: &[u8],
    args: &Args,
) -> Result<Output, Failure> {
    let [context] = args.context[..] else {
        return Err(Failure::Usage("--search is for one --context".into()));
    };
    let result: Outcome = serde_json::from_slice(result)
        .map_err(|e| Failure::Refused(format!("the search's result: {e}")))?;
    let all_full = decoder.all_full(&decoder.with(None)?.plan)?;
    let indexers = all_full.plan.count(Role::Full);
    if result.settings.layers != indexers {
        let searched = result.settings.layers;
        let why = format!(
            "the search was over {searched} layers, and the config has {indexers} with an indexer"
        );
        return Err(Failure::Refused(why));
    }
    let time = |patterned: &Patterned, phase| {
        let requests = if phase == Phase::Prefill { 1 } else { args.batch };
        let (context, requests) = (f64::from(context), f64::from(requests));
        patterned.estimate(times, By::Indexcache, phase, context, requests).map(|e| e.us)
    };
    let (prefill, decode) = (time(&all_full, Phase::Prefill)?, time(&all_full, Phase::Decode)?);
    let entry = |loss: f64, patterned: &Patterned| -> Result<Entry, Failure> {
        let (prefill_us, decode_us) =
            (time(patterned, Phase::Prefill)?, time(patterned, Phase::Decode)?);
        Ok(Entry {
            full_layers: patterned.plan.count(Role::Full),
            pattern: patterned.plan.letters(),
            loss,
            prefill_us,
            prefill_gain: prefill / prefill_us,
            decode_us,
            decode_gain: decode / decode_us,
            best: true,
        })
    };
    let mut patterns = vec![];
    if let Some(loss) = result.all_full_loss {
        patterns.push(entry(loss, &all_full)?);
    }
    let steps = result.steps.iter().map(|step| (step.loss, &step.pattern));
    let swapped = result.swaps.last().map(|swap| (swap.loss, &swap.pattern));
    for (loss, pattern) in steps.chain(swapped) {
        patterns.push(entry(loss, &decoder.with(Some(&pattern.to_string()))?)?);
    }
    patterns.sort_by(|a, b| b.full_layers.cmp(&a.full_layers).then(b.loss.total_cmp(&a.loss)));
    let points: Vec<(f64, f64)> = patterns.iter().map(|e| (e.loss, e.prefill_us)).collect();
    let better = |a: &(f64, f64), b: (f64, f64)| a.0 <= b.0 && a.1 <= b.1 && *a != b;
    for (entry, point) in patterns.iter_mut().zip(&points) {
        entry.best = !points.iter().any(|other| better(other, *point));
    }
    let report = Report {
        card: &times.card,
        commit: &times.commit,
        context,
        batch: args.batch,
        tp: args.tp,
        patterns,
    };
    let stdout = if args.json { json(&report)? } else { report.text() };
    Ok(Output { stdout, stderr: String::new() })
}

impl Report<'_> {
    fn text(&self) -> String {
        let Report { card, commit, context, batch, .. } = self;
        let mut text = format!(
            "Times of {card}, commit {commit}: prefill of {context}, a decode step of {batch} there, in ms.\n\
             * no other pattern has a lower loss in the same time\n\n\
             Full      loss     prefill    gain    decode    gain    pattern\n"
        );
        for e in &self.patterns {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{:4}  {:8.4}  {:>10.2}  {:>5.2}x  {:>8.2}  {:>5.2}x  {} {}",
                e.full_layers,
                e.loss,
                e.prefill_us / 1e3,
                e.prefill_gain,
                e.decode_us / 1e3,
                e.decode_gain,
                if e.best { "*" } else { " " },
                e.pattern,
            );
        }
        text
    }
}
