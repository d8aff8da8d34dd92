//! `examples/torch/decode.py` on the CPU generates what the server generates. Visibly skipped without PyTorch.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn python() -> Command {
    let mut command = Command::new("python3");
    // Test programs and the library they were built with share a directory.
    let libraries = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    command
        .env("INDEXCACHE_LIBRARY", libraries.join("libindexcache.so"))
        .env("PYTHONPATH", format!("{ROOT}/bindings/python/src"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("OMP_NUM_THREADS", "1"); // A step's matrices are small: threads would mostly wait for each other.
    command
}

fn decode(arguments: &[&str]) -> Output {
    let script = format!("{ROOT}/examples/torch/decode.py");
    python()
        .arg(script)
        .args(["--device", "cpu", "--repeats", "1"])
        .args(arguments)
        .output()
        .unwrap()
}

/// The context passes top-k, 128, while it decodes: until then Shared layers are exact.
#[test]
fn generates_what_the_server_generates() {
    let there = python().args(["-c", "import numpy, safetensors, torch"]).output();
    if !there.is_ok_and(|o| o.status.success()) {
        // Past the test harness.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: examples/torch: python3 with numpy, safetensors and torch was not found"
        );
        return;
    }
    let load = ["--requests", "2", "--context", "100", "--decode", "64", "--chunk", "64"];
    let served = Command::new(env!("CARGO_BIN_EXE_serve"))
        .args(load)
        .args(["--json", "--repeats", "1", "--threads", "2"])
        .output()
        .unwrap();
    assert!(served.status.success(), "{}", String::from_utf8_lossy(&served.stderr));
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join("served.json");
    std::fs::write(&report, &served.stdout).unwrap();
    let report = report.to_str().unwrap();

    let output = decode(&["--chunk", "64", "--expect", report, "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ours: Value = serde_json::from_slice(&output.stdout).unwrap();
    let theirs: Value = serde_json::from_slice(&served.stdout).unwrap();
    for (ours, theirs) in
        ours["runs"].as_array().unwrap().iter().zip(theirs["runs"].as_array().unwrap())
    {
        assert_eq!(ours["pattern"], theirs["pattern"]);
        let agreement = &ours["agreement"];
        assert_eq!(agreement["tokens"], 2 * 64);
        // Sums in another order turn roundings to fp8 and bf16 the other way, which moves logits by hundredths, rarely
        // tenths: a near tie may fall either way.
        let differ = agreement["differ"].as_array().unwrap();
        for token in differ {
            assert!(token["lost"].as_f64().unwrap() < 0.3, "{token}");
        }
        assert!(differ.len() <= 2, "{agreement}");
        assert_eq!(differ.is_empty(), ours["generated"] == theirs["generated"]);
    }

    // What is not the model's choice is told.
    let mut wrong = theirs.clone();
    wrong["runs"][1]["generated"] =
        wrong["runs"][1]["generated"].as_array().unwrap().iter().rev().cloned().collect();
    std::fs::write(report, wrong.to_string()).unwrap();
    let output = decode(&["--expect", report]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("is ahead of"), "{table}{}", String::from_utf8_lossy(&output.stderr));
}
