//! `indexcache plan`: show or check the plan that a config or a pattern makes.

use crate::{Failure, Output};
use clap::{Args, Subcommand};
use indexcache::plan::{
    Dialect, ExportFormat, HfOptions, Indexers, Model, Origin, Pattern, Plan, Role, Spelling,
};
use indexcache::plan::{Field, MAX_TOPK};
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub enum Command {
    /// Print the resolved plan.
    Show {
        #[command(flatten)]
        input: Input,
        /// Print everything as one JSON object.
        #[arg(long, conflicts_with = "spell")]
        json: bool,
        /// Print only the pattern: letters, compact, indexer-types, sources, or freq:DIALECT.
        #[arg(long = "as", value_name = "SPELLING", value_parser = spelling)]
        spell: Option<ExportFormat>,
    },
    /// Exit with 0 if the plan is acceptable, or with 1 and the reason.
    Check {
        #[command(flatten)]
        input: Input,
    },
}

#[derive(Args)]
#[group(id = "what", required = true, multiple = true, args = ["config", "pattern", "freq"])]
pub struct Input {
    /// A model's config.json, or - for standard input.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One letter a layer: F (Full), S (Shared), - (no sparse attention). Overrules the config's.
    #[arg(long, value_name = "LETTERS", conflicts_with = "freq", allow_hyphen_values = true)]
    pattern: Option<String>,
    /// One Full layer in so many; needs --layers or --config. Overrules the config's.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    freq: Option<i64>,
    /// Where the counting of --freq starts [default: the dialect's].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    offset: Option<i64>,
    /// Whose rule a frequency follows [default: hf, or what the config's model uses].
    #[arg(long, value_name = "NAME", value_parser = dialect)]
    dialect: Option<Dialect>,
    /// Number of decoder layers.
    #[arg(long, value_name = "N", conflicts_with = "config")]
    layers: Option<u64>,
    /// Positions selected for a row [default: the config's, or 2048].
    #[arg(long, value_name = "N")]
    topk: Option<u32>,
    /// Only these layers, as one pipeline stage: the first, and the first of the next stage.
    #[arg(long, value_name = "A..B", value_parser = stage)]
    stage: Option<(u32, u32)>,
    /// Let a stage that starts on a Shared layer run it as Full instead of receiving indices.
    #[arg(long, requires = "stage")]
    promote: bool,
}

fn spelling(text: &str) -> Result<ExportFormat, String> {
    Ok(match text {
        "letters" => ExportFormat::Letters,
        "compact" => ExportFormat::Compact,
        "indexer-types" => ExportFormat::IndexerTypes,
        "sources" => ExportFormat::SourceLayers,
        _ => match text.strip_prefix("freq:") {
            Some(name) => ExportFormat::Freq(dialect(name)?),
            None => {
                return Err(
                    "expected letters, compact, indexer-types, sources, or freq:DIALECT".into()
                );
            }
        },
    })
}

fn dialect(text: &str) -> Result<Dialect, String> {
    text.parse().map_err(|e: indexcache::error::Error| e.message)
}

fn stage(text: &str) -> Result<(u32, u32), String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    ends.ok_or_else(|| "expected two layers as in 20..40".into())
}

pub fn run(command: &Command) -> Result<Output, Failure> {
    match command {
        Command::Show { input, json: true, .. } => {
            let plan = input.plan()?;
            Ok(Output { stdout: plan.to_json()? + "\n", stderr: String::new() })
        }
        Command::Show { input, spell: Some(spell), .. } => {
            let plan = input.plan()?;
            let stdout = plan.export(*spell)?;
            Ok(Output { stdout: stdout + "\n", stderr: remarks(&plan) })
        }
        Command::Show { input, .. } => {
            let plan = input.plan()?;
            Ok(Output { stdout: described(&plan) + &remarks(&plan), stderr: String::new() })
        }
        Command::Check { input } => {
            let plan = input.plan()?;
            Ok(Output { stdout: String::new(), stderr: remarks(&plan) })
        }
    }
}

impl Input {
    fn plan(&self) -> Result<Plan, Failure> {
        if self.topk.is_some_and(|k| !(1..=MAX_TOPK).contains(&k)) {
            return Err(Failure::Usage(format!("--topk must be from 1 to {MAX_TOPK}")));
        }
        if self.offset.is_some() && self.freq.is_none() {
            return Err(Failure::Usage("--offset needs --freq".into()));
        }
        if self.pattern.is_some() && self.dialect.is_some() {
            return Err(Failure::Usage("--dialect is about a frequency, not --pattern".into()));
        }
        let plan = match &self.config {
            Some(path) => self.config_plan(path)?,
            None => self.argument_plan()?,
        };
        match self.stage {
            Some((first, last)) => Ok(plan.slice(first, last, self.promote)?),
            None => Ok(plan),
        }
    }

    fn config_plan(&self, path: &Path) -> Result<Plan, Failure> {
        let json = read(path)?;
        let plain = HfOptions { dialect: self.dialect, topk: self.topk, pattern: None };
        let pattern = match (&self.pattern, self.freq) {
            (Some(letters), _) => Some(Spelling::Letters(letters)),
            (None, Some(freq)) => {
                let dialect = match self.dialect {
                    Some(dialect) => dialect,
                    None => Plan::hf_dialect(&json)?,
                };
                Some(Spelling::Freq { freq, offset: self.offset, dialect })
            }
            (None, None) => None,
        };
        Ok(Plan::from_hf_config_with(&json, &HfOptions { pattern, ..plain })?)
    }

    fn argument_plan(&self) -> Result<Plan, Failure> {
        let mut rule = None;
        let pattern = match (&self.pattern, self.freq, self.layers) {
            (Some(letters), _, None) => letters.parse()?,
            (Some(letters), _, Some(layers)) => {
                Pattern::new(&Spelling::Letters(letters), &Indexers::any(layers)?)?
            }
            (None, Some(freq), Some(layers)) => {
                let dialect = self.dialect.unwrap_or(Dialect::Hf);
                rule = Some(dialect);
                let spelling = Spelling::Freq { freq, offset: self.offset, dialect };
                Pattern::new(&spelling, &Indexers::any(layers)?)?
            }
            _ => return Err(Failure::Usage("--freq needs --layers or --config".into())),
        };
        let plan = Plan::new(pattern, Model::new(self.topk.unwrap_or(2048)))?;

        Ok(plan.with_origin(Origin { field: Field::Argument, dialect: rule }))
    }
}

/// A file, or standard input for `-`.
pub fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().read_to_end(&mut bytes).map(|_| bytes),
        false => std::fs::read(path),
    };
    read.map_err(|e| Failure::Usage(format!("{} cannot be read: {e}", path.display())))
}

fn remarks(plan: &Plan) -> String {
    plan.notes().iter().map(|note| format!("note: {note}\n")).collect()
}

/// The plan for a person.
fn described(plan: &Plan) -> String {
    let mut text = String::new();
    let (full, shared) = (plan.count(Role::Full), plan.count(Role::Shared));
    let layers = plan.roles().len();
    let mut line = format!("{layers} layers: {full} Full, {shared} Shared");
    let none = plan.count(Role::None);
    if none != 0 {
        line += &format!(", {none} without sparse attention");
    }
    match plan.mtp_layers() {
        0 => {}
        n => line += &format!("; {n} draft"),
    }
    if plan.mtp_shares() && plan.mtp_layers() != 0 {
        line += " (later draft steps reuse its own indices)";
    }
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}\n\n{}", ruled(plan));
    let origin = plan.origin();
    let rule = origin.dialect.map(|d| format!(", {d} rule")).unwrap_or_default();
    let _ = writeln!(text, "decided by    {}{rule}", origin.field.name());
    let _ = writeln!(
        text,
        "indices       top-k {}, {} bytes a row",
        plan.model().topk,
        plan.row_bytes()
    );
    let (held, saved) = (plan.index_k_bytes_per_token(), plan.index_k_bytes_saved_per_token());
    let _ = writeln!(
        text,
        "index K       {held} bytes a token in {} layers; {saved} saved ({:.1} %)",
        plan.index_k_layers().len(),
        100.0 * saved / (held + saved).max(1.0),
    );
    if plan.is_stage() {
        let range = plan.stage();
        let from = |h: Option<indexcache::plan::Handoff>| match h {
            Some(h) => format!("the indices of layer {}", h.source),
            None => "nothing".into(),
        };
        let _ = writeln!(
            text,
            "stage         layers {}..{}: receives {}, sends {}",
            range.start,
            range.end,
            from(plan.receive()),
            from(plan.send()),
        );
        for layer in plan.index_k_layers().iter().filter(|l| **l < range.start) {
            let _ = writeln!(
                text,
                "              and reads the index K of layer {layer}, an earlier stage's"
            );
        }
    }
    let _ = writeln!(text, "fingerprint   {:016x}", plan.fingerprint());
    text
}

/// The letters in tens, fifty a line, under a ruler of layer ids.
fn ruled(plan: &Plan) -> String {
    const TENS: u32 = 5;
    let first = plan.stage().start;
    let letters: Vec<char> = plan.letters().chars().collect();
    let end = first + letters.len() as u32;
    let mut text = String::from("      ");
    for ten in 0..TENS {
        text += &format!("{:<11}", format!("+{}", ten * 10));
    }
    text.truncate(text.trim_end().len());
    for line in (first / (10 * TENS)..end.div_ceil(10 * TENS)).map(|l| l * 10 * TENS) {
        text += &format!("\n{line:>4}  ");
        for layer in line..(line + 10 * TENS).min(end) {
            if layer != line && layer % 10 == 0 {
                text.push(' ');
            }
            // Layers of other stages.
            let index = layer.checked_sub(first).map(|i| i as usize);
            text.push(index.and_then(|i| letters.get(i)).copied().unwrap_or('.'));
        }
    }
    text + "\n"
}
