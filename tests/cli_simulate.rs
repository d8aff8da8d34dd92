//! `indexcache bench stack --simulate`: sums and interpolations against ones done here by hand, on invented times.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use common::{code_block, fresh_dir, has, root, run, skip};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::process::Command;

/// Bytes a microsecond, fp8 and bf16 operations a microsecond.
const BYTES: f64 = 1e6;
const FP8: f64 = 1e9;
const BF16: f64 = 5e8;
const STAGES: [&str; 7] =
    ["indexer", "select", "attend", "projections", "moe", "dense_mlp", "head"];

fn config() -> Map<String, Value> {
    let config = json!({
        "model_type": "glm_moe_dsa", "num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 4096,
        "moe_intermediate_size": 512, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "num_attention_heads": 16, "q_lora_rank": 256, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 50000,
        "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048
    });
    config.as_object().unwrap().clone()
}

/// Invented: what a stage takes grows with its rows and its context.
fn us(stage: &str, rows: f64, context: f64) -> f64 {
    match stage {
        "select" => 15.0 + rows * context * 3e-4,
        "attend" => 9.0 + rows * 4.0 + context * 1e-5,
        "indexer" => 6.0 + rows * 0.02,
        "projections" => 11.0 + rows * 0.08,
        "moe" => 30.0 + rows * 0.2,
        "dense_mlp" => 12.0 + rows * 0.1,
        _ => 90.0 + rows,
    }
}

/// A file of times at these rows and contexts.
fn times(prefill: &[(u32, u32)], decode: &[(u32, u32)]) -> Value {
    let mut times: Vec<Value> = vec![];
    for (phase, calls) in [("prefill", prefill), ("decode", decode)] {
        for stage in STAGES {
            let over_context = ["select", "attend"].contains(&stage);
            let mut seen = vec![];
            for &(rows, context) in calls {
                let rows = if (stage, phase) == ("head", "prefill") { 1 } else { rows };
                if !over_context && seen.contains(&rows) {
                    continue;
                }
                seen.push(rows);
                let heads = if stage == "select" { 32 } else { 16 };
                let slower = [("indexcache", 1.0), ("public", 2.0)];
                let bys =
                    if over_context || stage == "indexer" { &slower[..] } else { &slower[..1] };
                for (by, factor) in bys {
                    let us = factor * us(stage, rows.into(), context.into());
                    let mut time =
                        json!({ "stage": stage, "phase": phase, "rows": rows, "us": us });
                    if over_context || stage == "indexer" {
                        time["by"] = json!(by);
                    }
                    if over_context {
                        time["context"] = json!(context);
                        time["heads"] = json!(heads);
                        time["topk"] = json!(2048);
                    }
                    times.push(time);
                }
            }
        }
    }
    json!({
        "card": "none", "commit": "none", "command": "none", "times": times, "config": config(),
        "ceilings": { "read_gb_s": BYTES / 1e3, "fp8_tflop_s": FP8 / 1e6, "bf16_tflop_s": BF16 / 1e6 },
    })
}

fn grid() -> Value {
    let prefill =
        [(8192, 8192), (8192, 65536), (8192, 262144), (2048, 8192), (2048, 65536), (2048, 262144)];
    let decode = [1, 16, 64].map(|rows| [1024, 16384, 262144].map(|context| (rows, context)));
    times(&prefill, &decode.concat())
}

struct Files(PathBuf);

impl Files {
    fn new(name: &str, times: &Value, config: &Value) -> Self {
        let files = Files(fresh_dir(name));
        files.write("times.json", times);
        files.write("config.json", config);
        files
    }

    fn write(&self, name: &str, value: &Value) {
        std::fs::write(self.0.join(name), value.to_string()).unwrap();
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_indexcache"));
        command.current_dir(&self.0).args([
            "bench",
            "stack",
            "--simulate",
            "--times",
            "times.json",
        ]);
        let output = command.args(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, args: &[&str]) -> Value {
        let (status, stdout, stderr) = self.run(&[args, &["--json"]].concat());
        assert_eq!((status, stderr.as_str()), (0, ""), "{stdout}");
        serde_json::from_str(&stdout).unwrap()
    }

    fn estimate(&self, args: &[&str]) -> Value {
        self.json(&[&["--config", "config.json"], args].concat())
    }

    fn refusal(&self, args: &[&str]) -> String {
        let (status, stdout, stderr) = self.run(args);
        assert!(status == 1 || status == 2, "{stdout}");
        stderr
    }
}

/// The arm of a context's first phase that says so.
fn arm<'a>(report: &'a Value, phase: &str, by: &str, layers: &str) -> &'a Value {
    let is = |value: &Value, key: &str, want: &str| value[key] == want;
    let phases = report["estimates"].as_array().unwrap();
    let phase = phases.iter().find(|p| is(p, "phase", phase)).unwrap();
    let arms = phase["arms"].as_array().unwrap();
    arms.iter().find(|a| is(a, "by", by) && is(a, "layers", layers)).unwrap()
}

fn stage(arm: &Value, name: &str, key: &str) -> f64 {
    let stages = arm["stages"].as_array().unwrap();
    let found = stages.iter().find(|s| s["stage"] == name);
    found.map_or(0.0, |s| s[key].as_f64().unwrap())
}

fn near(got: f64, want: f64) {
    assert!((got / want - 1.0).abs() < 1e-9, "{got} instead of {want}");
}

#[test]
fn measured_calls_are_summed_over_layers() {
    let files = Files::new("simulate_sum", &grid(), &config().into());
    let args = ["--pattern", "FSFS", "--context", "8192", "--batch", "16"];
    let report = files.estimate(&args);
    assert_eq!((&report["pattern"], &report["full_layers"]), (&json!("FSFS"), &json!(2)));
    // Layer 0 is dense.
    for (phase, context, rows) in [("prefill", 8192.0, 8192.0), ("decode", 8192.0, 16.0)] {
        let one = |stage: &str| us(stage, rows, context);
        for (by, slower) in [("indexcache", 1.0), ("public", 2.0)] {
            for (layers, full) in [("all-full", 4.0), ("pattern", 2.0)] {
                let arm = arm(&report, phase, by, layers);
                near(stage(arm, "indexer", "us"), slower * full * one("indexer"));
                near(stage(arm, "projections", "us"), 4.0 * one("projections"));
                near(stage(arm, "moe", "us"), 3.0 * one("moe"));
                near(stage(arm, "dense_mlp", "us"), one("dense_mlp"));
                let heads = if phase == "prefill" { 1.0 } else { 16.0 };
                near(stage(arm, "head", "us"), us("head", heads, 0.0));
                if phase == "prefill" {
                    // In decode 8192 lies between two contexts.
                    near(stage(arm, "select", "us"), slower * full * one("select"));
                    near(stage(arm, "attend", "us"), slower * 4.0 * one("attend"));
                    assert_eq!(stage(arm, "attend", "measured_us"), stage(arm, "attend", "us"));
                }
                let sum: f64 = STAGES.iter().map(|name| stage(arm, name, "us")).sum();
                near(arm["us"].as_f64().unwrap(), sum);
                let first = self::arm(&report, phase, "public", "all-full")["us"].as_f64().unwrap();
                near(arm["gain"].as_f64().unwrap(), first / sum);
            }
        }
    }
}

/// An indexer whose time says not whose it is is everybody's.
#[test]
fn the_indexer_may_be_the_same_for_all() {
    let mut times = grid();
    times["times"].as_array_mut().unwrap().retain_mut(|time| {
        let public = time["by"] == "public";
        if time["stage"] == "indexer" {
            time.as_object_mut().unwrap().remove("by");
        }
        time["stage"] != "indexer" || !public
    });
    let files = Files::new("simulate_by", &times, &config().into());
    let report = files.estimate(&["--context", "8192"]);
    for by in ["public", "indexcache"] {
        let got = stage(arm(&report, "prefill", by, "all-full"), "indexer", "us");
        near(got, 4.0 * us("indexer", 8192.0, 0.0));
    }
}

/// Bytes of a decode step's index K, queries and indices.
fn select_bytes(requests: f64, context: f64) -> f64 {
    requests * (context * 132.0 + 32.0 * 128.0 + 4.0 * 2048.0)
}

#[test]
fn between_measured_calls_times_are_linear() {
    let files = Files::new("simulate_between", &grid(), &config().into());
    let select = |requests: f64, context: f64| {
        let (requests, context) = (format!("{requests}"), format!("{context}"));
        let report = files.estimate(&["--context", &context, "--batch", &requests]);
        let arm = arm(&report, "decode", "indexcache", "all-full").clone();
        let all = stage(&arm, "select", "us");
        let kinds = ["measured_us", "interpolated_us", "scaled_us"];
        (all / 4.0, kinds.map(|kind| stage(&arm, "select", kind) / all))
    };
    let time = |requests, context| us("select", requests, context);
    let (got, kinds) = select(16.0, 16384.0);
    near(got, time(16.0, 16384.0));
    assert_eq!(kinds, [1.0, 0.0, 0.0]);
    // A quarter of the way from 1024 to 16384, and a third of the way from 16 rows to 64.
    let quarter = |rows| 0.75 * time(rows, 1024.0) + 0.25 * time(rows, 16384.0);
    let (got, kinds) = select(16.0, 4864.0);
    near(got, quarter(16.0));
    assert_eq!(kinds, [0.0, 1.0, 0.0]);
    let (got, kinds) = select(32.0, 4864.0);
    near(got, quarter(16.0) * 2.0 / 3.0 + quarter(64.0) / 3.0);
    assert_eq!(kinds, [0.0, 1.0, 0.0]);
    // Fewer rows than were timed at that context, as many bytes: on the line over bytes of all calls.
    let w = |requests, context| select_bytes(requests, context) / BYTES;
    let rise = |a: (f64, f64), b: (f64, f64)| {
        (time(b.0, b.1) - time(a.0, a.1)) / (w(b.0, b.1) - w(a.0, a.1))
    };
    let (got, kinds) = select(4.0, 524288.0);
    let (less, more) = ((64.0, 16384.0), (16.0, 262144.0));
    near(got, time(64.0, 16384.0) + rise(less, more) * (w(4.0, 524288.0) - w(64.0, 16384.0)));
    assert_eq!(kinds, [0.0, 1.0, 0.0]);
    // Past the most bytes: on, at the rate of the last two.
    for (requests, context) in [(64.0, 1048576.0), (128.0, 262144.0), (128.0, 1048576.0)] {
        let (got, kinds) = select(requests, context);
        let more = w(requests, context) - w(64.0, 262144.0);
        near(got, time(64.0, 262144.0) + rise((16.0, 262144.0), (64.0, 262144.0)) * more);
        assert_eq!(kinds, [0.0, 0.0, 1.0]);
    }
}

#[test]
fn beyond_what_was_timed_rates_are_bounded() {
    let select = |calls: &[(u32, u32)], us: Option<f64>, requests: &str| {
        let mut times = times(&[(8192, 8192)], calls);
        for time in times["times"].as_array_mut().unwrap() {
            if let Some(us) = us.filter(|_| time["stage"] == "select") {
                time["us"] = json!(us);
            }
        }
        let files = Files::new("simulate_bounds", &times, &config().into());
        let report = files.estimate(&["--context", "262144", "--batch", requests]);
        let arm = arm(&report, "decode", "indexcache", "all-full");
        assert_eq!(stage(arm, "select", "scaled_us"), stage(arm, "select", "us"));
        stage(arm, "select", "us") / 4.0
    };
    let w = |requests, context| select_bytes(requests, context) / BYTES;
    // Of one call nothing says what is latency: in proportion.
    let alone = us("select", 4.0, 65536.0) * w(4.0, 262144.0) / w(4.0, 65536.0);
    near(select(&[(4, 65536)], None, "4"), alone);
    near(select(&[(4, 262144)], None, "12"), 3.0 * us("select", 4.0, 262144.0));
    // No time is for free, even if two calls took the same.
    let flat = select(&[(4, 16384), (4, 65536)], Some(1000.0), "4");
    near(flat, 1000.0 + w(4.0, 262144.0) - w(4.0, 65536.0));
}

/// Four rows were timed at a short context only: what one and 16 take at longer ones says more about four there.
#[test]
fn rows_timed_elsewhere_do_not_count() {
    let calls = [(1, 1024), (1, 65536), (4, 1024), (16, 1024), (16, 65536)];
    let files = Files::new("simulate_gaps", &times(&[(8192, 8192)], &calls), &config().into());
    let report = files.estimate(&["--context", "65536", "--batch", "4"]);
    let got = stage(arm(&report, "decode", "indexcache", "all-full"), "select", "us") / 4.0;
    near(got, 0.8 * us("select", 1.0, 65536.0) + 0.2 * us("select", 16.0, 65536.0));
}

#[test]
fn prefill_is_the_sum_of_its_chunks() {
    let files = Files::new("simulate_chunks", &grid(), &config().into());
    let prefill = |context: &str| {
        let report = files.estimate(&["--context", context]);
        arm(&report, "prefill", "indexcache", "all-full").clone()
    };
    // Three whole chunks, of which the first two are a prefill of their own; the last ends at 24576.
    let (two, three) = (prefill("16384"), prefill("24576"));
    near(stage(&three, "projections", "us"), 12.0 * us("projections", 8192.0, 0.0));
    let last = stage(&three, "select", "us") - stage(&two, "select", "us");
    near(last, 4.0 * us("select", 8192.0, 24576.0));
    // Past what was measured: in proportion to the pairs of a row and a key, which the last two chunks grew more than.
    let far = stage(&prefill("524288"), "select", "us") - stage(&prefill("516096"), "select", "us");
    let pairs = |end: u32| (end - 8191..=end).map(f64::from).sum::<f64>();
    near(far, 4.0 * us("select", 8192.0, 262144.0) * pairs(524288) / pairs(262144));
    // A chunk of 2048 rows after one of 8192; 10240 is no measured context.
    let rest = prefill("10240");
    near(stage(&rest, "moe", "us"), 3.0 * (us("moe", 8192.0, 0.0) + us("moe", 2048.0, 0.0)));
    assert_eq!(stage(&rest, "moe", "measured_us"), stage(&rest, "moe", "us"));
    assert!(stage(&rest, "select", "interpolated_us") > 0.0);
    assert_eq!(stage(&rest, "select", "scaled_us"), 0.0);
}

#[test]
fn other_dimensions_are_scaled_by_operations_or_bytes() {
    let mut other = config();
    other["hidden_size"] = json!(2048);
    other["num_attention_heads"] = json!(32);
    other["index_n_heads"] = json!(64);
    let files = Files::new("simulate_dims", &grid(), &other.into());
    let report = files.estimate(&["--context", "8192", "--batch", "1"]);
    let prefill = arm(&report, "prefill", "indexcache", "all-full");
    // As many operations per row as weights, in the same rows: work and time grow alike.
    let projections = |hidden: f64, heads: f64| {
        let per_head = 256.0 * 192.0 + 512.0 * (128.0 + 128.0) + 128.0 * hidden;
        hidden * 256.0 + hidden * 576.0 + heads * per_head
    };
    let more = projections(2048.0, 32.0) / projections(1024.0, 16.0);
    near(stage(prefill, "projections", "us"), 4.0 * us("projections", 8192.0, 0.0) * more);
    assert_eq!(stage(prefill, "projections", "scaled_us"), stage(prefill, "projections", "us"));
    // fp8 operations of the scores, bf16 operations of attention: twice the heads, twice the time.
    near(stage(prefill, "select", "us"), 4.0 * 2.0 * us("select", 8192.0, 8192.0));
    near(stage(prefill, "attend", "us"), 4.0 * 2.0 * us("attend", 8192.0, 8192.0));
    // Early rows attend to all they see, later ones to the top-k.
    let mut half = config();
    half["index_topk"] = json!(1024);
    let fewer = Files::new("simulate_topk", &grid(), &half.into());
    let fewer = fewer.estimate(&["--context", "8192"]);
    let fewer = stage(arm(&fewer, "prefill", "indexcache", "all-full"), "attend", "us");
    let pairs = |topk: u32| (1..=8192).map(|seen: u32| f64::from(seen.min(topk))).sum::<f64>();
    near(fewer, 4.0 * us("attend", 8192.0, 8192.0) * pairs(1024) / pairs(2048));
    // Two GPUs: half the heads again, the indexer as it was.
    let tp = files.estimate(&["--context", "8192", "--tp", "2"]);
    let divided = arm(&tp, "prefill", "indexcache", "all-full");
    near(stage(divided, "attend", "us"), 4.0 * us("attend", 8192.0, 8192.0));
    near(stage(divided, "select", "us"), stage(prefill, "select", "us"));
    near(stage(divided, "indexer", "us"), stage(prefill, "indexer", "us"));
    assert!(stage(divided, "moe", "us") < stage(prefill, "moe", "us"));
    assert!(
        files
            .refusal(&["--config", "config.json", "--context", "9", "--tp", "3"])
            .contains("--tp 3")
    );
}

/// A decode step reads the experts that its rows choose: the fewer, the less.
#[test]
fn decode_reads_the_experts_that_are_touched() {
    let mut more = config();
    more["n_routed_experts"] = json!(64);
    let step = |name, config: Map<String, Value>| {
        let files = Files::new(name, &grid(), &config.into());
        let report = files.estimate(&["--context", "16384", "--batch", "64"]);
        stage(arm(&report, "decode", "indexcache", "pattern"), "moe", "us")
    };
    let expert = 3.0 * 1024.0 * 512.0;
    let bytes = |experts: f64| {
        let touched = experts * (1.0 - (1.0 - 4.0 / experts).powi(64));
        2.0 * (touched * expert + expert + 1024.0 * experts) + 4.0 * 64.0 * 1024.0
    };
    near(step("simulate_few", config()), 3.0 * us("moe", 64.0, 0.0));
    near(step("simulate_many", more), 3.0 * us("moe", 64.0, 0.0) * bytes(64.0) / bytes(32.0));
}

#[test]
fn more_work_never_takes_less() {
    let files = Files::new("simulate_monotone", &grid(), &config().into());
    let us = |pattern: &str, context: u32, batch: u32, phase: &str, by: &str| {
        let (context, batch) = (context.to_string(), batch.to_string());
        let args = ["--pattern", pattern, "--context", &context, "--batch", &batch];
        arm(&files.estimate(&args), phase, by, "pattern")["us"].as_f64().unwrap()
    };
    for phase in ["prefill", "decode"] {
        let contexts = [512, 4096, 8192, 9000, 20000, 65536, 100000, 262144, 1000000];
        let over: Vec<f64> = contexts.map(|c| us("FSSF", c, 7, phase, "indexcache")).into();
        assert!(over.is_sorted(), "{phase}: {over:?}");
        let patterns = ["FSSS", "FSSF", "FFSF", "FFFF"];
        let over: Vec<f64> = patterns.map(|p| us(p, 30000, 7, phase, "indexcache")).into();
        assert!(over.is_sorted() && over[0] < over[3], "{phase}: {over:?}");
        assert!(us("FSSF", 30000, 7, phase, "public") > us("FSSF", 30000, 7, phase, "indexcache"));
    }
    let batches = [1, 2, 5, 16, 40, 64, 200];
    let over: Vec<f64> = batches.map(|b| us("FSSF", 30000, b, "decode", "indexcache")).into();
    assert!(over.is_sorted(), "{over:?}");
}

/// A published config, with sizes for those of tests/data/configs that leave them out.
fn published(name: &str) -> Value {
    let path = root().join("tests/data/configs").join(name);
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let home = match config.get("text_config") {
        Some(_) => &mut config["text_config"],
        None => &mut config,
    };
    let sizes = json!({
        "hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 128,
        "num_experts_per_tok": 4, "vocab_size": 200064, "q_lora_rank": 1536, "qk_nope_head_dim": 256,
        "v_head_dim": 256,
    });
    if home.get("hidden_size").is_none() {
        home.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
    }
    config
}

#[test]
fn every_dialect_is_simulated() {
    for (name, keep, note) in [
        ("deepseek_v32.json", "1/4", "draft layers"),
        ("glm_5_1.json", "1/4", "draft layers"),
        ("glm_5_2.json", "", "Shared layers have no indexer"),
        ("hy4_preview.json", "", "Shared layers have no indexer"),
        ("glm_5_3_flash.json", "1/4", "linear"),
        ("deepseek_v4_flash.json", "1/4", "experts are fp4"),
        ("deepseek_v4_1_flash.json", "", "experts are fp4"),
        ("minimax_m3.json", "1/4", "without sparse attention"),
    ] {
        let files = Files::new("simulate_dialects", &grid(), &published(name));
        let keep = if keep.is_empty() { vec![] } else { vec!["--keep", keep] };
        let report = files.estimate(&[&["--context", "100000"], &keep[..]].concat());
        for phase in ["prefill", "decode"] {
            let all_full = arm(&report, phase, "indexcache", "all-full");
            let shared = arm(&report, phase, "indexcache", "pattern");
            // What a Shared layer saves is its indexer, and nothing else.
            for stage in STAGES.iter().filter(|s| !["indexer", "select"].contains(s)) {
                let us = |arm| self::stage(arm, stage, "us");
                assert!((us(all_full) - us(shared)).abs() <= 1e-9 * us(shared), "{name} {stage}");
            }
            let us = |arm: &Value| arm["us"].as_f64().unwrap();
            assert!(us(shared) < us(all_full) && us(shared).is_finite(), "{name}: {shared}");
        }
        let notes = report["notes"].to_string();
        assert!(notes.contains(note), "{name}: {notes}");
    }
}

/// What a compressed or pooled cache spares: the same model with fewer rows to score takes less.
#[test]
fn pools_and_candidates_are_counted() {
    let select = |name, config: &Value| {
        let files = Files::new(name, &grid(), config);
        let keep = if name == "simulate_pool" { &["--keep", "1/2"][..] } else { &[] };
        let report = files.estimate(&[&["--context", "262144"], keep].concat());
        stage(arm(&report, "decode", "indexcache", "pattern"), "select", "us")
    };
    // One index K row for 4 positions: as a layer without, at a quarter of the context, with 64 heads and top-k 512.
    let flash = published("deepseek_v4_flash.json");
    let bytes = |keys: f64, heads: f64, topk: f64| keys * 132.0 + heads * 128.0 + 4.0 * topk;
    let as_measured = |keys: f64, heads: f64| {
        us("select", 1.0, keys) * bytes(keys, heads, 512.0) / bytes(keys, 32.0, 2048.0)
    };
    near(select("simulate_pool", &flash), 11.0 * as_measured(65536.0, 64.0));
    // Layers 24, 28, 32 and 36 score 16384 candidates; 2, 8 and 14 every other position, 20 all.
    let v41 = published("deepseek_v4_1_flash.json");
    let part = |keys: f64| as_measured(keys, 32.0);
    let want = 4.0 * part(16384.0) + 3.0 * part(131072.0) + part(262144.0);
    near(select("simulate_candidates", &v41), want);
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    let files = Files::new("simulate_refused", &grid(), &config().into());
    let says = |times: &Value, config: &Map<String, Value>, words: &str| {
        files.write("times.json", times);
        files.write("config.json", &config.clone().into());
        let why = files.refusal(&["--config", "config.json", "--context", "4096"]);
        assert!(why.contains(words), "{why}");
    };
    for key in
        ["hidden_size", "vocab_size", "v_head_dim", "num_experts_per_tok", "intermediate_size"]
    {
        let mut config = config();
        config.remove(key);
        says(&grid(), &config, &format!("{key} is missing"));
    }
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut times = grid();
        edit(&mut times);
        times
    };
    let again = edited(&|t| {
        let first = t["times"][0].clone();
        t["times"].as_array_mut().unwrap().push(first);
    });
    says(&again, &config(), "there already");
    let without = |stage: &str| {
        edited(&|t| {
            let times = t["times"].as_array_mut().unwrap();
            let time = times.iter_mut().find(|time| time["stage"] == stage).unwrap();
            time["by"] = if time["by"].is_null() { json!("public") } else { Value::Null };
        })
    };
    says(&without("select"), &config(), "by is missing: select");
    says(&without("moe"), &config(), "by must not be there: moe");
    says(&edited(&|t| t["times"][0]["us"] = json!(0)), &config(), "above 0");
    says(&edited(&|t| t["times"][0]["heads"] = json!(3)), &config(), "must not be there");
    says(&edited(&|t| t["times"][0]["color"] = json!(3)), &config(), "color");
    let no_experts = edited(&|t| {
        t["config"].as_object_mut().unwrap().remove("n_routed_experts");
    });
    says(&no_experts, &config(), "config has no moe");
    says(&edited(&|t| t["ceilings"]["read_gb_s"] = json!(0)), &config(), "ceilings");
    let no_moe = edited(&|t| t["times"].as_array_mut().unwrap().retain(|t| t["stage"] != "moe"));
    says(&no_moe, &config(), "no time of moe in prefill");
    files.write("times.json", &grid());
    let base = ["--config", "config.json", "--context", "4096"];
    let why = files.refusal(&[&base[..], &["--keep", "0/4"]].concat());
    assert!(why.contains("--keep 0/1 of 4 layers is 0"), "{why}");
    let why = files.refusal(&[&base[..], &["--pattern", "FSF"]].concat());
    assert!(why.contains("3 entries but the model has 4 layers"), "{why}");
    assert!(files.refusal(&["--check"]).contains("no arms"));
}

/// Arms that take what the times say, but for one.
#[test]
fn the_check_compares_times_and_gains() {
    let mut times = grid();
    let sum = |full: f64, slower: f64| {
        let one = |stage: &str| us(stage, 8192.0, 8192.0);
        slower * (full * (one("indexer") + one("select")) + 3.0 * one("attend"))
            + 3.0 * one("projections")
            + 2.0 * one("moe")
            + one("dense_mlp")
    };
    let arm = |by: &str, pattern: &str, us: f64| {
        json!({
            "by": by, "pattern": pattern, "phase": "prefill", "context": 8192, "rows": 8192, "head": false,
            "us": us,
        })
    };
    // Three of the four layers ran, without a head.
    times["arms"] = json!([
        arm("public", "FFF", sum(3.0, 2.0)),
        arm("indexcache", "FFF", sum(3.0, 1.0)),
        arm("indexcache", "FSS", 2.0 * sum(1.0, 1.0)),
    ]);
    let files = Files::new("simulate_check", &times, &config().into());
    let report = files.json(&["--check"]);
    let arms = report["arms"].as_array().unwrap();
    let of = |key: &str| -> Vec<f64> { arms.iter().map(|a| a[key].as_f64().unwrap()).collect() };
    for (error, want) in of("error").into_iter().zip([0.0, 0.0, -0.5]) {
        assert!((error - want).abs() < 1e-9, "{error}");
    }
    near(of("simulated_gain")[1], sum(3.0, 2.0) / sum(3.0, 1.0));
    near(of("simulated_gain")[2], 2.0 * of("measured_gain")[2]);
    let (_, text, _) = files.run(&["--check"]);
    assert!(text.ends_with("largest error: 50.0 % of a time, 100.0 % of a gain\n"), "{text}");
}

#[test]
fn a_search_is_shown_with_what_its_patterns_take() {
    let tiny = std::fs::read(root().join("examples/tiny_dsa/config.json")).unwrap();
    let tiny: Value = serde_json::from_slice(&tiny).unwrap();
    let files = Files::new("simulate_search", &grid(), &tiny);
    let report = std::fs::read(root().join("docs/measured/search/set-0.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    files.write("result.json", &report["result"]);
    let args = ["--search", "result.json", "--context", "65536"];
    let table = files.estimate(&args);
    let patterns = table["patterns"].as_array().unwrap();
    let steps = report["result"]["steps"].as_array().unwrap();
    assert_eq!(patterns.len(), 1 + steps.len());
    assert_eq!(patterns[0]["prefill_gain"], 1.0);
    for (entry, step) in patterns[1..].iter().zip(steps) {
        for key in ["pattern", "loss", "full_layers"] {
            assert_eq!(entry[key], step[key]);
        }
        let pattern = step["pattern"].as_str().unwrap();
        let alone = files.estimate(&["--pattern", pattern, "--context", "65536"]);
        for phase in ["prefill", "decode"] {
            assert_eq!(
                entry[format!("{phase}_us")],
                arm(&alone, phase, "indexcache", "pattern")["us"],
            );
        }
    }
    // Best are those that nothing after them, which takes less, beats.
    let losses: Vec<f64> = patterns.iter().map(|p| p["loss"].as_f64().unwrap()).collect();
    for (n, entry) in patterns.iter().enumerate() {
        assert_eq!(entry["best"], losses[n + 1..].iter().all(|loss| *loss > losses[n]), "{n}");
    }
    files.write("config.json", &config().into());
    let why = files.refusal(&[&["--config", "config.json"], &args[..]].concat());
    assert!(why.contains("over 12 layers, and the config has 4"), "{why}");
}

#[test]
fn the_text_says_the_same() {
    let files = Files::new("simulate_text", &grid(), &config().into());
    let args = ["--config", "config.json", "--keep", "1/2", "--context", "8192"];
    let (status, text, stderr) = files.run(&args);
    assert_eq!((status, stderr.as_str()), (0, ""));
    let report = files.json(&args);
    assert!(text.contains("4 layers, 2 Full: FSFS\n"), "{text}");
    let shown = arm(&report, "prefill", "indexcache", "pattern");
    let (ms, gain) = (shown["us"].as_f64().unwrap() / 1e3, shown["gain"].as_f64().unwrap());
    let line = format!("indexcache  2 Full    {ms:>10.2}  {gain:>5.2}x");
    assert!(text.contains(&line), "{line}\n{text}");
}

/// benches/stack/kernels.py: other heads, from benches/peers.py.
#[test]
fn public_kernels_timed_alone_are_added() {
    if !has("python3") {
        return skip("python3 was not found");
    }
    let mut times = grid();
    times["arms"] = json!([]);
    let mut other = config();
    other["index_n_heads"] = json!(64);
    other["num_attention_heads"] = json!(64);
    let files = Files::new("simulate_kernels", &times, &other.into());
    let timed = |section: &str, case: &str, peer: &str, us: f64, wrong: u32| json!({ "section": section, "case": case, "peer": peer, "us": us, "wrong": wrong, "note": "" });
    let (scores, attend) = ("4096 x 8192, 64 heads", "4096 x 64 heads, KV 10240, ascending");
    let peers = json!({ "commit": "none", "command": "none", "runs": [
        timed("prefill", scores, "DeepGEMM + fast and wrong", 100.0, 3),
        timed("prefill", scores, "DeepGEMM + right", 700.0, 0),
        timed("prefill", scores, "DeepGEMM + slow", 900.0, 0),
        timed("prefill", scores, "indexcache", 600.0, 0),
        timed("attend", attend, "indexcache", 500.0, 0),
        timed("attend decode", "fp8 16 x 1 queries x 64 heads", "indexcache", 30.0, 0),
        // Heads that are there, another order, no stage of a decoder.
        timed("prefill", "4096 x 8192, 32 heads", "indexcache", 1.0, 0),
        timed("attend", "4096 x 64 heads, KV 10240, random", "indexcache", 1.0, 0),
        timed("top-k", "4096 x 8192", "indexcache", 1.0, 0),
    ]});
    files.write("peers.json", &peers);
    let script = root().join("benches/stack/kernels.py");
    run(Command::new("python3")
        .current_dir(&files.0)
        .arg(script)
        .args(["times.json", "peers.json"]));
    // A chunk of 8192 rows at 8192 has as many pairs as 4096 rows that see 8192 keys have, but for a rounding.
    let report = files.estimate(&["--context", "8192", "--batch", "16"]);
    for (by, select) in [("indexcache", 600.0), ("public", 700.0)] {
        let got = stage(arm(&report, "prefill", by, "all-full"), "select", "us") / 4.0;
        assert!((got / select - 1.0).abs() < 1e-3, "{got} instead of {select}");
    }
    let shown = arm(&report, "prefill", "indexcache", "all-full");
    let pairs =
        |first: u32, last: u32| (first..=last).map(|seen| f64::from(seen.min(2048))).sum::<f64>();
    let want = 500.0 * pairs(1, 8192) / pairs(6145, 10240);
    near(stage(shown, "attend", "us") / 4.0, want);
    let decode = files.estimate(&["--context", "32768", "--batch", "16"]);
    near(stage(arm(&decode, "decode", "indexcache", "all-full"), "attend", "us"), 4.0 * 30.0);
}

#[test]
fn the_guide_s_commands_run() {
    let tiny = std::fs::read(root().join("examples/tiny_dsa/config.json")).unwrap();
    let tiny = serde_json::from_slice(&tiny).unwrap();
    let files = Files::new("simulate_guide", &Value::Null, &tiny);
    let report = std::fs::read(root().join("docs/measured/search/set-0.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    files.write("result.json", &report["result"]);
    let tool = PathBuf::from(env!("CARGO_BIN_EXE_indexcache"));
    let path = format!("{}:{}", tool.parent().unwrap().display(), std::env::var("PATH").unwrap());
    for (word, shown) in [
        ("--keep 1/4", "12 layers, 3 Full: FSSSFSSSFSSS"),
        ("--check", "largest error"),
        ("--search", "* FFSSSSSFSSSS"),
    ] {
        let mut bash = Command::new("bash");
        bash.args(["-euc", &code_block("docs/simulate.md", "sh", word)]);
        let output = run(bash.current_dir(&files.0).env("PATH", &path));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(shown), "{text}");
    }
}

fn guide() -> String {
    std::fs::read_to_string(root().join("docs/simulate.md")).unwrap()
}

fn measured() -> Value {
    let path = root().join("docs/measured/stack/times.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The last line of `--check`.
fn largest_error(files: &Files, times: &Value) -> String {
    files.write("times.json", times);
    let (status, text, _) = files.run(&["--check"]);
    assert_eq!(status, 0);
    text.lines().last().unwrap().to_owned()
}

#[test]
fn the_guide_states_the_error_against_the_measured_arms() {
    let files = Files::new("simulate_error", &Value::Null, &Value::Null);
    let all = largest_error(&files, &measured());
    assert!(guide().contains(&all), "{all}");
    // Most chunks and contexts left out: what is between them is interpolated.
    let mut fewer = measured();
    fewer["times"].as_array_mut().unwrap().retain(|time| {
        let context = time["context"].as_u64().unwrap_or(1);
        match time["phase"].as_str() {
            Some("decode") => ![61440, 122880].contains(&context),
            _ => context % 8192 != 0 || (context / 8192).is_power_of_two(),
        }
    });
    let fewer = largest_error(&files, &fewer);
    assert!(guide().contains(&fewer), "{fewer}");
}

#[test]
fn the_guide_s_table_is_what_the_committed_times_give() {
    let mut table = String::new();
    for (model, config, pattern, gpus) in [
        ("DeepSeek-V3.2", "deepseek_v32", "1/4", "8"),
        ("GLM-5.1", "glm_5_1", "1/4", "8"),
        ("GLM-5.2", "glm_5_2", "its own", "8"),
        ("DeepSeek-V4-Flash", "deepseek_v4_flash", "1/2", "4"),
        ("DeepSeek-V4.1-Flash", "deepseek_v4_1_flash", "its own", "8"),
    ] {
        let config = root().join(format!("tests/data/configs/{config}.json"));
        let mut tool = Command::new(env!("CARGO_BIN_EXE_indexcache"));
        tool.args([
            "bench",
            "stack",
            "--simulate",
            "--json",
            "--batch",
            "16",
            "--context",
            "131072",
        ]);
        tool.arg("--config").arg(config).args(["--tp", gpus]);
        if pattern != "its own" {
            tool.args(["--keep", pattern]);
        }
        let report: Value = serde_json::from_slice(&run(&mut tool).stdout).unwrap();
        let us = |phase, by, layers| arm(&report, phase, by, layers)["us"].as_f64().unwrap();
        let cells = |phase, unit: f64, digits: usize| {
            let public = us(phase, "public", "all-full");
            let [full, shared] = ["all-full", "pattern"].map(|l| us(phase, "indexcache", l));
            let [a, b, c] = [public, full, shared].map(|us| format!("{:.digits$}", us / unit));
            format!("{a} | {b} | {c} | {:.2}x", full / shared)
        };
        let full = &report["full_layers"];
        let (prefill, decode) = (cells("prefill", 1e6, 2), cells("decode", 1e3, 1));
        table += &format!("| {model} | {pattern}, {full} Full | {gpus} | {prefill} | {decode} |\n");
    }
    assert!(guide().contains(&table), "{table}");
}
