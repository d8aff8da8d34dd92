//! `indexcache bench` measures every operation, and says where it cannot. What it measures is no test's business.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

use indexcache::context::{BackendChoice, Context};
use serde_json::Value;
use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_indexcache"));
    command.arg("bench").args(args).output().unwrap()
}

fn runs(args: &[&str]) -> Vec<Value> {
    let output = bench(args);
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let runs = report["runs"].as_array().unwrap().clone();
    assert!(runs.iter().all(|run| run["microseconds"].as_f64().unwrap() > 0.0));
    runs
}

#[test]
fn the_host_needs_no_gpu() {
    let indexer = runs(&["indexer", "--device", "cpu", "--json"]);
    for operation in ["prefill", "decode", "logits", "top-k"] {
        assert!(indexer.iter().any(|run| run["operation"] == operation), "{operation}");
    }
    for run in indexer {
        assert_ne!(run["gb_s"].is_number(), run["tflop_s"].is_number(), "{run}");
    }
    let attention = runs(&["attention", "--device", "cpu", "--json"]);
    for operation in ["prefill", "decode"] {
        assert!(attention.iter().any(|run| run["operation"] == operation), "{operation}");
    }
    for run in attention {
        assert!(run["tflop_s"].is_number(), "{run}");
        assert_eq!(run["gb_s"].is_number(), run["operation"] == "decode", "{run}");
    }
}

#[test]
fn a_missing_gpu_is_refused() {
    let Err(why) = Context::new(BackendChoice::Cuda(0), 0, || ()) else { return };
    for what in ["indexer", "attention"] {
        let output = bench(&[what, "--device", "cuda"]);
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]));
        assert!(String::from_utf8(output.stderr).unwrap().contains(&why.message));
    }
}
