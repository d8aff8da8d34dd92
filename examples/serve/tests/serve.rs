//! Runs the server as a user would.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tiny_dsa");
const TOPK: i64 = 128;

fn serve(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_serve")).args(arguments).output().expect("serve starts")
}

fn json(arguments: &str) -> Value {
    let words: Vec<&str> =
        arguments.split(' ').chain(["--json", "--repeats", "1", "--threads", "2"]).collect();
    let output = serve(&words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {errors}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// What must not depend on how the work was cut: each run's bits per byte and text, for the first `requests`.
fn results(report: &Value, requests: usize) -> Vec<(Vec<u64>, Vec<Value>)> {
    let first = |run: &Value, key: &str| run[key].as_array().unwrap()[..requests].to_vec();
    let bits = |run| {
        first(run, "bits_per_byte_by_request")
            .iter()
            .map(|b| b.as_f64().unwrap().to_bits())
            .collect()
    };
    let runs = report["runs"].as_array().unwrap();
    runs.iter().map(|run| (bits(run), first(run, "generated"))).collect()
}

#[test]
fn bits_per_byte_are_those_of_pytorch() {
    let report = json("--requests 4 --decode 2");
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(format!("{MODEL}/reference.json")).unwrap())
            .unwrap();
    // Weights that differ by 1e-7 move PyTorch's own value of one window by 1e-3 under the pattern, where a near tie in
    // top-k that falls the other way is reused five times. All-Full moves by 2e-4.
    for (run, name, window_tolerance) in [(0, "all_full", 1e-3), (1, "greedy_1/4", 3e-3)] {
        let run = &report["runs"][run];
        let mut expected_sum = 0.0;
        for window in 0..4 {
            let want = &reference["windows"][window][name];
            let got = run["bits_per_byte_by_request"][window].as_f64().unwrap();
            let expected = want["bits_per_byte"].as_f64().unwrap();
            let difference = (got - expected).abs();
            assert_eq!(run["pattern"], want["pattern"]);
            assert!(difference < window_tolerance, "{name}, {window}: {got}, not {expected}");
            expected_sum += expected;
        }
        let got = run["bits_per_byte"].as_f64().unwrap();
        assert!(
            (got - expected_sum / 4.0).abs() < 1e-3,
            "{name}: {got}, not {}",
            expected_sum / 4.0
        );
    }
    // Reuse was not vacuous: the two runs differ, and Shared layers would have selected something else.
    assert_ne!(report["runs"][0]["bits_per_byte"], report["runs"][1]["bits_per_byte"]);
    for layer in report["coverage"].as_array().unwrap() {
        let covered = layer["covered"].as_f64().unwrap();
        assert!((0.05..0.999).contains(&covered), "{layer}");
    }
}

#[test]
fn results_do_not_depend_on_how_the_work_is_cut() {
    let context = 2 * TOPK + 63;
    let run = |requests: usize, chunk: i64, threads: i64| {
        let load = format!("--context {context} --decode 12 --requests {requests} --chunk {chunk}");
        let words = format!("{load} --threads {threads}");
        let words: Vec<&str> = words.split(' ').chain(["--json", "--repeats", "1"]).collect();
        let output = serve(&words);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let whole = run(3, 1024, 1);
    for (requests, chunk, threads) in
        [(3, 1024, 3), (3, 64, 2), (3, 37, 1), (2, 100, 2), (1, 256, 2)]
    {
        let other = run(requests, chunk, threads);
        assert_eq!(
            results(&whole, requests),
            results(&other, requests),
            "{requests} {chunk} {threads}"
        );
    }
    // Prefill and decode really met in one step.
    let mixed = run(3, 64, 2);
    assert!(mixed["runs"][0]["mixed_steps"].as_i64().unwrap() > 0);
}

#[test]
fn shared_layers_own_no_index_k() {
    let report = json("--context 200 --decode 1 --requests 1 --pattern FSSSFSSSFSSS");
    let bytes = |run: usize, key: &str| report["runs"][run][key].as_f64().unwrap();
    assert_eq!(report["runs"][0]["pattern"], "FFFFFFFFFFFF");
    assert_eq!(report["runs"][1]["full_layers"], 3);
    assert_eq!(bytes(1, "index_k_bytes_per_token"), 3.0 * 36.0);
    assert_eq!(bytes(0, "index_k_bytes"), 4.0 * bytes(1, "index_k_bytes"));
    // 200 tokens and one more are 4 pages of 64.
    assert_eq!(bytes(1, "index_k_bytes"), 3.0 * 4.0 * 64.0 * 36.0);
}

#[test]
fn three_ways_to_say_a_pattern() {
    let pattern = |how: &str| {
        json(&format!("--context 2 --decode 1 --requests 1 {how}"))["runs"][1]["pattern"].clone()
    };
    // The rule of index_topk_freq keeps the first two layers Full.
    assert_eq!(pattern("--freq 4"), "FFSSSFSSSFSS");
    assert_eq!(pattern("--pattern FSFSFSFSFSFS"), "FSFSFSFSFSFS");
    let folder = copy_of_model("other_config", |_, _| {});
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value["index_topk_pattern"] = "FSSSSSSSSSSS".into();
    std::fs::write(&config, value.to_string()).unwrap();
    assert_eq!(pattern(&format!("--config {}", config.display())), "FSSSSSSSSSSS");
}

#[test]
fn the_table_has_what_the_readme_explains() {
    let output = serve(&["--context", "160", "--decode", "4", "--requests", "2", "--repeats", "1"]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty(), "the progress bar is for terminals");
    for word in [
        "all-Full",
        "IndexCache",
        "prefill",
        "decode",
        "in the indexer",
        "tokens/s",
        "bits per byte",
        "index K",
        "covers",
        "request 0 goes on",
    ] {
        assert!(table.contains(word), "{word} is not in\n{table}");
    }
    assert!(table.bytes().all(|b| b == b'\n' || (0x20..0x7f).contains(&b)), "escaped");
}

#[test]
fn bad_arguments_exit_with_2_and_say_why() {
    for (arguments, why) in [
        ("--nonsense", "unknown option"),
        ("--requests", "needs a value"),
        ("--requests 0", "from 1 to 1024"),
        ("--requests 1x", "from 1 to 1024"),
        ("--chunk -3", "from 1 to"),
        ("--decode 99999999999999999999", "from 1 to"),
        ("--context 4096", "more than the model's 2048"),
        ("--requests 1000", "too few for 1000 requests of 2048"),
        ("--pattern FSF --freq 2", "exclude each other"),
        ("--pattern FSF", "12"),
        ("--pattern SFFFFFFFFFFF", "layer 0 is Shared"),
        ("--pattern FXFFFFFFFFFF", "X"),
        ("--pattern FF----------", "no dense and no draft layers"),
        ("--freq 0", "from 1 to 1024"),
    ] {
        let output = serve(&arguments.split(' ').collect::<Vec<_>>());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {errors}");
        assert!(errors.contains(why), "{arguments}: {errors}");
        assert!(output.stdout.is_empty());
    }
    let help = serve(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--pattern"));
}

/// A copy of the model's folder under a name of its own, with one file changed by `edit(name, bytes)`.
fn copy_of_model(name: &str, edit: impl Fn(&str, &mut Vec<u8>)) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "heldout.txt"] {
        let mut bytes = std::fs::read(format!("{MODEL}/{file}")).unwrap();
        edit(file, &mut bytes);
        std::fs::write(folder.join(file), bytes).unwrap();
    }
    folder
}

fn serve_briefly(folder: &Path) -> Output {
    let folder = folder.to_str().unwrap();
    serve(&[
        "--model",
        folder,
        "--requests",
        "1",
        "--context",
        "2",
        "--decode",
        "1",
        "--repeats",
        "1",
    ])
}

#[test]
fn broken_files_exit_with_1_and_say_which() {
    type Edit = fn(&mut Vec<u8>);
    let cases: [(&str, &str, Edit, &str); 11] = [
        ("cut", "model.safetensors", |b| b.truncate(b.len() / 2), "safetensors: tensor"),
        ("cut_header", "model.safetensors", |b| b.truncate(100), "header is longer than the file"),
        ("empty", "model.safetensors", |b| b.clear(), "safetensors: shorter than"),
        (
            "huge_header",
            "model.safetensors",
            |b| b[..8].fill(0xff),
            "header is longer than the file",
        ),
        (
            "brackets",
            "model.safetensors",
            |b| b[8..5000].fill(b'['),
            "safetensors: header not valid JSON",
        ),
        ("not_json", "config.json", |b| b[0] = b'!', "config.json: not valid JSON"),
        (
            "no_config",
            "config.json",
            |b| *b = b"{}".to_vec(),
            "config.json: num_hidden_layers is missing",
        ),
        (
            "width",
            "config.json",
            |b| replace(b, "hidden_size\": 256", "hidden_size\": 512"),
            "expected [256, 512]",
        ),
        ("layers", "config.json", |b| replace(b, ": 12,", ": 13,"), "no tensor model.layers.12."),
        ("pattern", "config.json", |b| replace(b, "\"FF", "\"FX"), "config.json: IDXC_ERR_CONFIG"),
        ("no_text", "heldout.txt", |b| b.truncate(1), "too few for 1 requests"),
    ];
    for (name, file, edit, why) in cases {
        let folder = copy_of_model(name, |f, bytes| {
            if f == file {
                edit(bytes);
            }
        });
        let output = serve_briefly(&folder);
        let errors = String::from_utf8_lossy(&output.stderr);
        let code = if file == "heldout.txt" { 2 } else { 1 };
        assert_eq!(output.status.code(), Some(code), "{name}: {errors}");
        assert!(errors.contains(why), "{name}: {errors}");
    }
    for folder in ["/nonexistent", "/dev/null", env!("CARGO_MANIFEST_DIR")] {
        assert_eq!(serve_briefly(Path::new(folder)).status.code(), Some(1), "{folder}");
    }
}

fn replace(bytes: &mut Vec<u8>, from: &str, to: &str) {
    let text = String::from_utf8(bytes.clone()).unwrap();
    assert!(text.contains(from), "{from}");
    *bytes = text.replace(from, to).into_bytes();
}

/// Whatever a header says, the program ends by itself: with a result or with a message, never by a signal.
#[test]
fn no_header_crashes_it() {
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for case in 0..60 {
        let edits: Vec<(usize, u8)> = (0..1 + random(4))
            .map(|_| (random(9000), b"0123456789[]{}\",:xB-"[random(20)]))
            .collect();
        let file = if case % 4 == 0 { "config.json" } else { "model.safetensors" };
        let folder = copy_of_model("mutated", |name, bytes| {
            if name == file {
                for &(at, byte) in &edits {
                    let at = at % bytes.len();
                    bytes[at] = byte;
                }
            }
        });
        let output = serve_briefly(&folder);
        assert!(output.status.code().is_some(), "{edits:?} in {file}: {}", output.status);
        assert!(output.status.success() || !output.stderr.is_empty());
    }
}
