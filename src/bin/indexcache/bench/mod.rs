//! `indexcache bench`: what the operations reach of the device's own ceilings.

mod attention;
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
    /// Sparse attention: prefill and decode, all heads and few.
    Attention(Options),
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
    /// The same of bf16 numbers.
    Bf16(f64),
    /// Bytes of the input, read once.
    Bytes(f64),
    /// Bf16 numbers and bytes: what takes longer at its ceiling counts.
    Both { bf16: f64, bytes: f64 },
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

type Measure = fn(&Device, &mut Report) -> Result<(), Failure>;

pub fn run(command: &Command) -> Result<Output, Failure> {
    let (options, measure): (_, Measure) = match command {
        Command::Indexer(options) => (options, indexer::measure),
        Command::Attention(options) => (options, attention::measure),
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
    measure(&device, &mut report)?;
    let json =
        || serde_json::to_string_pretty(&report).map_err(|e| Failure::Refused(e.to_string()));
    let stdout = if options.json { json()? + "\n" } else { report.text() };
    Ok(Output { stdout, stderr: String::new() })
}

impl Report {
    fn add(&mut self, operation: &'static str, shape: &str, seconds: f64, work: Work) {
        let Ceilings { read_gb_s, fp8_tflop_s, bf16_tflop_s } = self.ceilings;
        let (flop, fastest, bytes) = match work {
            Work::Fp8(flop) => (Some(flop), fp8_tflop_s, None),
            Work::Bf16(flop) => (Some(flop), bf16_tflop_s, None),
            Work::Bytes(bytes) => (None, None, Some(bytes)),
            Work::Both { bf16, bytes } => (Some(bf16), bf16_tflop_s, Some(bytes)),
        };
        let tflop_s = flop.map(|flop| flop / seconds / 1e12);
        let gb_s = bytes.map(|bytes| bytes / seconds / 1e9);
        let of = |rate: Option<f64>, ceiling: Option<f64>| Some(rate? / ceiling?);
        let share = match (of(tflop_s, fastest), of(gb_s, read_gb_s)) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
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
            let Run { operation, shape, microseconds, .. } = run;
            let _ = write!(text, "{operation:<8} {shape:<44} {microseconds:>12.2} us");
            for (rate, unit) in [(run.tflop_s, "TFLOP/s"), (run.gb_s, "GB/s")] {
                if let Some(rate) = rate {
                    let _ = write!(text, " {rate:>9.2} {unit}");
                }
            }
            let _ = match run.share {
                Some(share) => writeln!(text, ", {:.1} % of the ceiling", 100.0 * share),
                None => writeln!(text),
            };
        }
        text
    }
}

/// Numbers that are about normally distributed. The period is odd, so that copies do not line up with rows.
fn normals(seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..(1 << 20) + 7).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.7).collect()
}
