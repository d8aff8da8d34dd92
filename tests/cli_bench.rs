//! `indexcache bench` measures every operation, and says where it cannot. What it measures is no test's business.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

use indexcache::context::{BackendChoice, Context};
use serde_json::Value;
use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_indexcache"));
    command.args(["bench", "indexer"]).args(args).output().unwrap()
}

#[test]
fn the_host_needs_no_gpu() {
    let output = bench(&["--device", "cpu", "--json"]);
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let runs = report["runs"].as_array().unwrap();
    for operation in ["prefill", "decode", "logits", "top-k"] {
        assert!(runs.iter().any(|run| run["operation"] == operation), "{operation}");
    }
    for run in runs {
        assert!(run["microseconds"].as_f64().unwrap() > 0.0, "{run}");
        assert_ne!(run["gb_s"].is_number(), run["tflop_s"].is_number(), "{run}");
    }
}

#[test]
fn a_missing_gpu_is_refused() {
    let Err(why) = Context::new(BackendChoice::Cuda(0), 0, || ()) else { return };
    let output = bench(&["--device", "cuda"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]));
    assert!(String::from_utf8(output.stderr).unwrap().contains(&why.message));
}
