//! `indexcache bench stack --simulate`: what a pattern would gain, from measured times of a decoder's stages.

mod check;
mod model;
mod pareto;
mod shape;
mod times;

use crate::plan::read;
use crate::search::baselines::uniform;
use crate::{Failure, Output};
use indexcache::plan::{Field, Plan, Role};
use indexcache::search::Retention;
use model::{Decoder, Estimate, Patterned};
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::PathBuf;
use times::{By, Phase, Times};

const MEASURED: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/measured/stack/times.json"));

#[derive(clap::Args)]
pub struct Args {
    /// Estimate from measured times. (Measuring is done by benches/stack.)
    #[arg(long, required = true)]
    simulate: bool,
    /// The decoder's config.json, or - for standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    config: Option<PathBuf>,
    /// The pattern to estimate: one letter a layer, or one for each layer with an indexer [default: the config's].
    #[arg(long, value_name = "LETTERS", allow_hyphen_values = true)]
    pattern: Option<String>,
    /// Or so many of the layers Full, evenly spread.
    #[arg(long, value_name = "N/M", conflicts_with = "pattern")]
    keep: Option<Retention>,
    /// Or each pattern of a search's result.json, beside its loss.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pattern", "keep"])]
    search: Option<PathBuf>,
    /// Positions of a request: the prompt that is prefilled, and what a decode step attends to.
    #[arg(
        long, value_name = "N", value_delimiter = ',', required_unless_present = "check",
        value_parser = clap::value_parser!(u32).range(1..=1 << 24)
    )]
    context: Vec<u32>,
    /// Requests of a decode step.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: u32,
    /// GPUs that share attention heads, experts and MLPs; what they send each other is not counted.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    tp: u32,
    /// Measured times, as docs/simulate.md describes them [default: an H100's, of docs/measured/stack].
    #[arg(long, value_name = "FILE")]
    times: Option<PathBuf>,
    /// Compare with the whole prefills and steps that were measured beside the times.
    #[arg(long, conflicts_with_all = ["config", "pattern", "keep", "search", "context", "batch", "tp"])]
    check: bool,
    /// Print everything as one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<Output, Failure> {
    let times = match &args.times {
        Some(path) => Times::read(&read(path)?, &path.display().to_string())?,
        None => Times::read(MEASURED, "docs/measured/stack/times.json")?,
    };
    if args.check {
        return check::run(&times, args.json);
    }
    let Some(config) = &args.config else { return Err(Failure::Usage("--config".into())) };
    let decoder = Decoder::new(read(config)?, args.tp)?;
    if let Some(result) = &args.search {
        return pareto::run(&times, &decoder, &read(result)?, args);
    }
    let own = decoder.with(args.pattern.as_deref())?;
    let patterned = match args.keep {
        Some(keep) => decoder.with(Some(&evenly(&own.plan, keep)?))?,
        None => own,
    };
    let all_full = decoder.all_full(&patterned.plan)?;
    let mut report = Report {
        card: &times.card,
        commit: &times.commit,
        pattern: patterned.plan.letters(),
        full_layers: patterned.plan.count(Role::Full),
        batch: args.batch,
        tp: args.tp,
        estimates: vec![],
        notes: notes(&decoder, &patterned, args),
    };
    for &context in &args.context {
        for phase in [Phase::Prefill, Phase::Decode] {
            let requests = if phase == Phase::Prefill { 1 } else { args.batch };
            let mut arms = vec![];
            for by in [By::Public, By::Indexcache].into_iter().filter(|by| times.has(*by)) {
                for (name, decoder) in [("all-full", &all_full), ("pattern", &patterned)] {
                    let (context, requests) = (f64::from(context), f64::from(requests));
                    let estimate = decoder.estimate(&times, by, phase, context, requests)?;
                    arms.push(Arm { by, layers: name, gain: 1.0, estimate });
                }
            }
            let first = arms.first().map_or(f64::NAN, |arm| arm.estimate.us);
            arms.iter_mut().for_each(|arm| arm.gain = first / arm.estimate.us);
            report.estimates.push(Phases { context, phase, arms });
        }
    }
    let stdout = if args.json { json(&report)? } else { report.text() };
    Ok(Output { stdout, stderr: String::new() })
}

fn json(report: &impl Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(report);
    text.map(|text| text + "\n").map_err(|e| Failure::Refused(e.to_string()))
}

/// As many of the layers with an indexer as `keep` says Full, evenly spread: one letter for each.
fn evenly(plan: &Plan, keep: Retention) -> Result<String, Failure> {
    let layers = plan.count(Role::Full) + plan.count(Role::Shared);
    let full = keep.of(layers);
    if !(1..=layers).contains(&full) {
        return Err(Failure::Usage(format!("--keep {keep} of {layers} layers is {full}")));
    }
    Ok(uniform(full as usize, layers as usize)?.to_string())
}

/// What a reader of the figures should know.
fn notes(decoder: &Decoder, patterned: &Patterned, args: &Args) -> Vec<String> {
    let (plan, fields) = (&patterned.plan, decoder.fields());
    let mut notes = plan.notes().to_vec();
    let native = matches!(plan.origin().field, Field::IndexerTypes | Field::SourceLayerIds);
    if native && plan.count(Role::Shared) != 0 {
        notes.push("the checkpoint's Shared layers have no indexer: all Full is what it would take with one on each".into());
    }
    if plan.mtp_layers() != 0 {
        notes.push("draft layers are not counted".into());
    }
    match shape::weights(fields) {
        None => {}
        Some("fp8") => notes
            .push("weights are fp8, and their products scaled from those that were timed".into()),
        Some(other) => notes.push(format!("weights are {other}, and taken to be bf16")),
    }
    let quantised = fields.get("quantization_config").and_then(|q| q.get("expert_dtype"));
    if let Some(dtype) = fields.get("expert_dtype").or(quantised).and_then(Value::as_str) {
        notes.push(format!("experts are {dtype}, and taken to be as the other weights"));
    }
    if fields.contains_key("compress_ratios") {
        notes.push(
            "compressing KV, and connections between layers beside the residual, are not counted"
                .into(),
        );
    }
    if fields.contains_key("linear_attn_config") || plan.roles().contains(&Role::None) {
        notes.push("layers without sparse attention are scaled from those with it; a linear one's state is not counted".into());
    }
    if args.tp > 1 {
        notes.push(format!("one of {} GPUs, without what they send each other", args.tp));
    }
    notes
}

/// Its JSON keys are a promise: others read them.
#[derive(Serialize)]
struct Report<'a> {
    card: &'a str,
    commit: &'a str,
    pattern: String,
    full_layers: u32,
    batch: u32,
    tp: u32,
    estimates: Vec<Phases>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Phases {
    context: u32,
    phase: Phase,
    arms: Vec<Arm>,
}

#[derive(Serialize)]
struct Arm {
    by: By,
    layers: &'static str,
    /// Over the first arm.
    gain: f64,
    #[serde(flatten)]
    estimate: Estimate,
}

impl Report<'_> {
    fn text(&self) -> String {
        let full = format!("{} Full", self.full_layers);
        let mut text = format!("Times of {}, commit {}.\n", self.card, self.commit);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{} layers, {full}: {}\n\ncontext  phase    requests  kernels     layers            ms    gain",
            self.pattern.len(),
            self.pattern,
        );
        for Phases { context, phase, arms } in &self.estimates {
            for arm in arms {
                let requests = if *phase == Phase::Prefill { 1 } else { self.batch };
                let layers = if arm.layers == "pattern" { &full } else { "all Full" };
                let _ = writeln!(
                    text,
                    "{context:>7}  {:<7}  {requests:>8}  {:<10}  {layers:<8}  {:>10.2}  {:>5.2}x",
                    phase.name(),
                    arm.by.name(),
                    arm.estimate.us / 1e3,
                    arm.gain,
                );
            }
        }
        for Phases { context, phase, arms } in &self.estimates {
            let arms: Vec<&Arm> = arms.iter().filter(|arm| arm.by == By::Indexcache).collect();
            let [all_full, pattern] = arms.as_slice() else { continue };
            let _ = writeln!(
                text,
                "\n{:<24}  all Full  {full:<8}  of that measured, interpolated, scaled",
                format!("{} {context}, share", phase.name()),
            );
            let total = pattern.estimate.us;
            for spent in &all_full.estimate.stages {
                let there = |s: &&model::Spent| s.stage == spent.stage;
                let Some(with) = pattern.estimate.stages.iter().find(there) else { continue };
                let _ = writeln!(
                    text,
                    "{:<24}  {:>6.1} %  {:>6.1} %  {:>14.0} % {:>10.0} % {:>6.0} %",
                    spent.stage.name(),
                    100.0 * spent.us / all_full.estimate.us,
                    100.0 * with.us / total,
                    100.0 * with.measured_us / with.us,
                    100.0 * with.interpolated_us / with.us,
                    100.0 * with.scaled_us / with.us,
                );
            }
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        self.notes.iter().for_each(|note| text += &format!("note: {note}\n"));
        text
    }
}
