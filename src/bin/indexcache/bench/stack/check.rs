//! `--check`: the model against whole prefills and steps that were measured beside the times.

use super::json;
use super::model::Decoder;
use super::times::{Arm, By, Phase, Times};
use crate::{Failure, Output};
use indexcache::plan::Role;
use serde::Serialize;
use serde_json::{Value, json as object};
use std::fmt::Write as _;

/// Its JSON keys are a promise: others read them.
#[derive(Serialize)]
struct Checked {
    by: By,
    full_layers: u32,
    layers: usize,
    phase: Phase,
    context: f64,
    rows: f64,
    measured_us: f64,
    simulated_us: f64,
    /// Of the simulated time: 0.1 is a tenth too long.
    error: f64,
    /// Over the first arm with the same layers, phase, context and rows.
    measured_gain: f64,
    simulated_gain: f64,
}

pub fn run(times: &Times, as_json: bool) -> Result<Output, Failure> {
    let mut all: Vec<Checked> = vec![];
    for arm in &times.arms {
        let mut checked = check(times, arm)?;
        let like = |c: &&Checked| {
            (c.phase, c.layers) == (checked.phase, checked.layers)
                && (c.context, c.rows) == (checked.context, checked.rows)
        };
        if let Some(first) = all.iter().find(like) {
            checked.measured_gain = first.measured_us / checked.measured_us;
            checked.simulated_gain = first.simulated_us / checked.simulated_us;
        }
        all.push(checked);
    }
    if all.is_empty() {
        return Err(Failure::Refused("the file has no arms to check against".into()));
    }
    let stdout = if as_json { json(&object!({ "arms": all }))? } else { text(&all) };
    Ok(Output { stdout, stderr: String::new() })
}

fn check(times: &Times, arm: &Arm) -> Result<Checked, Failure> {
    // The layers that ran, of the decoder that was timed.
    let mut config = times.config.clone();
    config.insert("num_hidden_layers".into(), arm.pattern.len().into());
    let decoder = Decoder::new(Value::Object(config).to_string().into_bytes(), 1)?;
    let mut patterned = decoder.with(Some(&arm.pattern))?;
    patterned.head = arm.head;
    let requests = if arm.phase == Phase::Prefill { 1.0 } else { arm.rows };
    let estimate = patterned.estimate(times, arm.by, arm.phase, arm.context, requests)?;
    Ok(Checked {
        by: arm.by,
        full_layers: patterned.plan.count(Role::Full),
        layers: arm.pattern.len(),
        phase: arm.phase,
        context: arm.context,
        rows: arm.rows,
        measured_us: arm.us,
        simulated_us: estimate.us,
        error: estimate.us / arm.us - 1.0,
        measured_gain: 1.0,
        simulated_gain: 1.0,
    })
}

fn text(all: &[Checked]) -> String {
    let mut text = String::from(
        "                                               measured             simulated\n\
         kernels     Full     phase    context  rows        ms    gain        ms    gain   error\n",
    );
    for c in all {
        let (phase, by) = (c.phase.name(), c.by.name());
        let rows = if c.phase == Phase::Prefill { 1.0 } else { c.rows };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{by:<10}  {:>2} of {:<2}  {phase:<7}  {:>7}  {rows:>4}  {:>8.2}  {:>5.2}x  {:>8.2}  {:>5.2}x  {:>+5.1} %",
            c.full_layers,
            c.layers,
            c.context,
            c.measured_us / 1e3,
            c.measured_gain,
            c.simulated_us / 1e3,
            c.simulated_gain,
            100.0 * c.error,
        );
    }
    let most = |errors: &dyn Fn(&Checked) -> f64| {
        100.0 * all.iter().map(|c| errors(c).abs()).fold(0.0, f64::max)
    };
    let _ = writeln!(
        text,
        "largest error: {:.1} % of a time, {:.1} % of a gain",
        most(&|c| c.error),
        most(&|c| c.simulated_gain / c.measured_gain - 1.0),
    );
    text
}
