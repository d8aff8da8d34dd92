//! `indexcache search`: which layers of a small model can do without their indexer.

pub mod baselines;
mod evaluate;
mod model;
mod report;

use crate::{Failure, Output};
use evaluate::Rows;
use indexcache::plan::Pattern;
use indexcache::search::{Calibration, Candidate, Method, Search, Spec};
use indicatif::{ProgressBar, ProgressStyle};
use model::Model;
use report::{Report, Time};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model: config.json and model.safetensors, as in examples/tiny_dsa.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to search with, in rows of a context's length [default: calibration.txt in the model's folder].
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Its rows to take. Each takes 35 MB of memory for a context of 2048.
    #[arg(long, value_name = "A..B", default_value = "0..32", value_parser = rows)]
    rows: Range<usize>,
    /// Text to compare patterns on that the search does not see [default: heldout.txt in the model's folder].
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    /// How many of its rows to take, evenly spaced.
    #[arg(long, value_name = "N", default_value = "48", value_parser = clap::value_parser!(u32).range(1..))]
    held_out_rows: u32,
    /// Full layers to stop at [default: go on until only the pinned ones are left].
    #[arg(long, value_name = "N")]
    target_full_layers: Option<u32>,
    /// Layers that stay Full, besides layer 0.
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    pinned: Vec<u32>,
    /// First layers of pipeline stages, which stay Full; the stages take turns.
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    stages: Vec<u32>,
    /// At most steps, try only the FEW layers that raised the loss least when they were last tried.
    #[arg(long, value_name = "FEW", value_parser = clap::value_parser!(u32).range(1..))]
    lazy: Option<u32>,
    /// Refine the pattern with N Full layers by exchanging layers.
    #[arg(long, value_name = "N")]
    swap_full_layers: Option<u32>,
    /// Folder of the results: journal.jsonl, result.json, report.json. The same command again goes on from the journal.
    #[arg(long, value_name = "DIR", default_value = "indexcache-search")]
    out: PathBuf,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
}

fn rows(text: &str) -> Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let range = ends.map(|(a, b)| a..b).filter(|range: &Range<usize>| !range.is_empty());
    range.ok_or_else(|| "expected rows as in 0..32".into())
}

pub fn run(args: &Args) -> Result<Output, Failure> {
    let (config, weights) = (args.model.join("config.json"), args.model.join("model.safetensors"));
    let weights = read(&weights)?;
    let model = Model::load(&read(&config)?, &weights)?;
    let in_folder = |file: &Option<PathBuf>, name| match file {
        Some(path) => path.clone(),
        None => args.model.join(name),
    };
    let calibration_text = Text::read(in_folder(&args.calibration, "calibration.txt"), &model)?;
    let held_out_text = Text::read(in_folder(&args.held_out, "heldout.txt"), &model)?;
    let calibration = calibration_text.rows(args.rows.clone())?;
    let held_out = held_out_text.rows(held_out_text.spaced(args.held_out_rows as usize))?;

    let mut search = open(&args.spec(&model, &weights, &calibration)?, &args.out)?;
    let time = complete(&mut search, &model, &calibration)?;
    let result = search.result();
    write_json(&args.out.join("result.json"), &result)?;
    let report = Report::new(&model, &calibration, &held_out, result, time)?;
    let json = write_json(&args.out.join("report.json"), &report)?;
    let stdout = if args.json { json } else { report.to_string() };
    Ok(Output { stdout, stderr: String::new() })
}

impl Args {
    fn spec(&self, model: &Model, weights: &[u8], rows: &[&[u8]]) -> Result<Spec, Failure> {
        // What only says which pattern to use, as config.json may, is no other model.
        let config = serde_json::to_vec(model.config())
            .map_err(|e| Failure::Refused(format!("config.json: {e}")))?;
        let calibration = Calibration {
            fingerprint: sha256(rows),
            // The last byte is predicted and not read.
            row_lengths: rows.iter().map(|row| row.len() as u64 - 1).collect(),
        };
        let (layers, topk) = (model.layers() as u32, model.topk() as u32);
        Ok(Spec {
            pinned: self.pinned.clone(),
            stages: self.stages.clone(),
            method: self.lazy.map_or(Method::Greedy, |few| Method::Lazy { few }),
            target_full_layers: self.target_full_layers,
            swap_full_layers: self.swap_full_layers,
            ..Spec::new(layers, topk, sha256(&[&config, weights]), calibration)
        })
    }
}

/// The same as `sha256sum` of the pieces in one file.
fn sha256(pieces: &[&[u8]]) -> String {
    let hash = pieces.iter().fold(Sha256::new(), |hash, piece| hash.chain_update(piece)).finalize();
    hash.iter().fold(String::from("sha256:"), |text, byte| text + &format!("{byte:02x}"))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|e| Failure::Usage(format!("{} cannot be read: {e}", path.display())))
}

/// A file cut into rows of a context's length.
struct Text {
    path: PathBuf,
    bytes: Vec<u8>,
    length: usize,
}

impl Text {
    fn read(path: PathBuf, model: &Model) -> Result<Self, Failure> {
        Ok(Text { bytes: read(&path)?, path, length: model.context_length() })
    }

    fn rows(&self, numbers: impl Iterator<Item = usize>) -> Result<Vec<&[u8]>, Failure> {
        let row = |number| {
            self.bytes.chunks_exact(self.length).nth(number).ok_or_else(|| {
                let (path, length, count) = (self.path.display(), self.length, self.count());
                let want = format!("a row {number} of {length} bytes");
                Failure::Usage(format!("{path}: expected {want}, got {count} rows"))
            })
        };
        numbers.map(row).collect()
    }

    fn count(&self) -> usize {
        self.bytes.len() / self.length
    }

    /// The numbers of `some` of its rows, or of more than it has.
    fn spaced(&self, some: usize) -> impl Iterator<Item = usize> {
        let count = self.count().max(some);
        (0..some).map(move |i| i * count / some)
    }
}

/// Goes on with the search in `folder`, or begins it.
fn open(spec: &Spec, folder: &Path) -> Result<Search, Failure> {
    let failed = |e| Failure::Refused(format!("{} cannot be made: {e}", folder.display()));
    let journal = folder.join("journal.jsonl");
    if journal.exists() {
        return Ok(Search::resume(journal, spec)?);
    }
    let mut search = Search::new(spec)?;
    fs::create_dir_all(folder).map_err(failed)?;
    search.save(journal)?;
    Ok(search)
}

/// Asks and tells until the search is complete.
fn complete(search: &mut Search, model: &Model, texts: &[&[u8]]) -> Result<Time, Failure> {
    let (start, mut rows) = (Instant::now(), Rows::new(model, texts));
    let before = search.progress();
    let bar = bar("search", before.expected).with_position(before.evaluations);
    bar.reset_eta();
    // Of the candidates that one pattern has got.
    let mut best: Option<(Pattern, f64)> = None;
    while let Some(Candidate { pattern, base, first_changed_layer }) = search.next().cloned() {
        let lowest = best.filter(|(of, _)| *of == base).map(|(_, loss)| loss);
        let shown = lowest.map_or(String::new(), |loss| format!("best {loss:.4}, now "));
        bar.set_message(format!("{shown}{pattern}"));
        let loss = rows.loss(&pattern, first_changed_layer as usize)?;
        search.report(&pattern, loss)?;
        best = Some((base, lowest.map_or(loss, |lowest| lowest.min(loss))));
        bar.set_length(search.progress().expected);
        bar.set_position(search.progress().evaluations);
    }
    bar.finish_and_clear();
    let evaluations = search.progress().evaluations - before.evaluations;
    Ok(Time::of(start.elapsed(), evaluations, &rows))
}

/// Drawn if standard error is a terminal.
fn bar(what: &'static str, length: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{prefix} {bar:16} {pos}/{len}, {eta} left  {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(length).with_style(style).with_prefix(what);
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

/// Writes a whole file or none, and gives what it wrote.
fn write_json(path: &Path, value: &impl Serialize) -> Result<String, Failure> {
    let failed = |e: &dyn Display| Failure::Refused(format!("{}: {e}", path.display()));
    let text = serde_json::to_string_pretty(value).map_err(|e| failed(&e))? + "\n";
    let beside = path.with_extension("json.new");
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|e: io::Error| failed(&e))?;
    Ok(text)
}
