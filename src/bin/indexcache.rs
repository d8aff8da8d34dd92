//! Command line tool.

#[path = "indexcache/bench/mod.rs"]
mod bench;
#[path = "indexcache/plan.rs"]
mod plan;
#[path = "indexcache/search/mod.rs"]
mod search;

use clap::{Parser, Subcommand};
use std::io::{self, Write};
use std::process::ExitCode;

/// DeepSeek Sparse Attention with cross-layer index reuse.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Which layers select and which reuse, as a model's config or a pattern says.
    #[command(subcommand)]
    Plan(plan::Command),
    /// Find out by loss, on a small model, which layers can reuse the indices of another.
    Search(search::Args),
    /// Times the operations on this machine, against what it can do at most.
    #[command(subcommand)]
    Bench(bench::Command),
}

/// Why a command did not do its work.
enum Failure {
    /// The question was understood and the answer is no: exit status 1.
    Refused(String),
    /// The command line, or a file it names, cannot be used: exit status 2.
    Usage(String),
}

impl From<indexcache::error::Error> for Failure {
    fn from(error: indexcache::error::Error) -> Self {
        Self::Refused(error.message)
    }
}

/// What a command prints: the answer, and remarks that must not disturb a reader of the answer.
struct Output {
    stdout: String,
    stderr: String,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Plan(command) => plan::run(&command),
        Command::Search(args) => search::run(&args),
        Command::Bench(command) => bench::run(&command),
    };
    let (output, status) = match result {
        Ok(output) => (output, 0),
        Err(Failure::Refused(why)) => (remark(&why), 1),
        Err(Failure::Usage(why)) => (remark(&why), 2),
    };
    // A reader that has seen enough (`| head`) is no failure of ours.
    let _ = io::stderr().write_all(output.stderr.as_bytes());
    match io::stdout().write_all(output.stdout.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(1),
        _ => ExitCode::from(status),
    }
}

fn remark(why: &str) -> Output {
    Output { stdout: String::new(), stderr: format!("indexcache: {why}\n") }
}
