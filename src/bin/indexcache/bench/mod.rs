//! `indexcache bench`: what the operations reach of the device's own ceilings.

mod cuda;
mod device;
mod indexer;
mod stack;

use crate::{Failure, Output};
use clap::{Args, Subcommand, ValueEnum};
use device::Device;
use indexcache::context::{BackendChoice, Context};
use serde::Serialize;
use std::fmt::Write as _;

#[derive(Subcommand)]
pub enum Command {
    /// Selection: prefill and decode, scores alone, top-k alone.
    Indexer(Options),
    /// A whole decoder, simulated: what a pattern gains, for any config, context and batch.
    Stack(stack::Args),
}

#[derive(Args)]
pub struct Options {
    /// Where to run: cuda (device 0) or cpu, which takes smaller shapes.
    #[arg(long, value_enum)]
    device: Kind,
    /// Print everything as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Cuda,
    Cpu,
}

/// What a call does, which says what its time is compared with.
#[derive(Clone, Copy)]
enum Work {
    /// Multiplications and additions of fp8 numbers.
    Fp8(f64),
    /// Bytes of the input, read once.
    Bytes(f64),
}

/// The most that simple kernels got out of the device in this run; None where nothing was measured.
#[derive(Clone, Copy, Default, Serialize)]
struct Ceilings {
    read_gb_s: Option<f64>,
    fp8_tflop_s: Option<f64>,
    bf16_tflop_s: Option<f64>,
}

/// One measured call.
#[derive(Serialize)]
struct Run {
    operation: &'static str,
    shape: String,
    microseconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tflop_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gb_s: Option<f64>,
    /// Of the ceiling, 1 for all of it.
    share: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    version: &'static str,
    ceilings: Ceilings,
    runs: Vec<Run>,
}

pub fn run(command: &Command) -> Result<Output, Failure> {
    let options = match command {
        Command::Indexer(options) => options,
        Command::Stack(args) => return stack::run(args),
    };
    let choice = match options.device {
        Kind::Cuda => BackendChoice::Cuda(0),
        Kind::Cpu => BackendChoice::Cpu,
    };
    let device = Device::new(Context::new(choice, 0, || ())?)?;
    let mut report = Report {
        device: device.name(),
        version: env!("CARGO_PKG_VERSION"),
        ceilings: device.ceilings()?,
        runs: vec![],
    };
    indexer::measure(&device, &mut report)?;
    let json =
        || serde_json::to_string_pretty(&report).map_err(|e| Failure::Refused(e.to_string()));
    let stdout = if options.json { json()? + "\n" } else { report.text() };
    Ok(Output { stdout, stderr: String::new() })
}

impl Report {
    fn add(&mut self, operation: &'static str, shape: &str, seconds: f64, work: Work) {
        let (mut tflop_s, mut gb_s) = (None, None);
        let (rate, ceiling) = match work {
            Work::Fp8(flop) => (tflop_s.insert(flop / seconds / 1e12), self.ceilings.fp8_tflop_s),
            Work::Bytes(bytes) => (gb_s.insert(bytes / seconds / 1e9), self.ceilings.read_gb_s),
        };
        let share = ceiling.map(|ceiling| *rate / ceiling);
        let microseconds = seconds * 1e6;
        let shape = shape.into();
        self.runs.push(Run { operation, shape, microseconds, tflop_s, gb_s, share });
    }

    fn text(&self) -> String {
        let mut text = format!("{}, indexcache {}\n", self.device, self.version);
        let ceilings = [
            ("read", self.ceilings.read_gb_s, "GB/s"),
            ("fp8 tensor cores", self.ceilings.fp8_tflop_s, "TFLOP/s"),
            ("bf16 tensor cores", self.ceilings.bf16_tflop_s, "TFLOP/s"),
        ];
        for (what, rate, unit) in ceilings {
            if let Some(rate) = rate {
                let _ = writeln!(text, "ceiling: {what} {rate:.0} {unit}");
            }
        }
        for run in &self.runs {
            let (rate, unit) = match (run.tflop_s, run.gb_s) {
                (Some(rate), _) => (rate, "TFLOP/s"),
                (None, rate) => (rate.unwrap_or(f64::NAN), "GB/s"),
            };
            let Run { operation, shape, microseconds, .. } = run;
            let _ = write!(
                text,
                "{operation:<8} {shape:<38} {microseconds:>12.2} us {rate:>9.2} {unit}"
            );
            let _ = match run.share {
                Some(share) => writeln!(text, ", {:.1} % of the ceiling", 100.0 * share),
                None => writeln!(text),
            };
        }
        text
    }
}
