//! The command line: what it prints, where, and with which exit status.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::process::{Command, Stdio};

const GLM52: &str =
    "FFFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSS";

fn run(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_indexcache"));
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

const CONFIG: &str = "tests/data/configs/glm_5_2.json";

#[test]
fn show_is_readable() {
    let (status, stdout, stderr) = run(&["plan", "show", "--config", CONFIG]);
    assert_eq!((status, stderr.as_str()), (0, ""));
    assert_eq!(
        stdout,
        "\
78 layers: 21 Full, 57 Shared; 1 draft (later draft steps reuse its own indices)

      +0         +10        +20        +30        +40
   0  FFFSSSFSSS FSSSFSSSFS SSFSSSFSSS FSSSFSSSFS SSFSSSFSSS
  50  FSSSFSSSFS SSFSSSFSSS FSSSFSSS

decided by    indexer_types
indices       top-k 2048, 8192 bytes a row
index K       2904 bytes a token in 22 layers; 7524 saved (72.2 %)
fingerprint   f62212bbcf4a04d1
note: index_topk_freq says the same as indexer_types, which decides
"
    );
}

#[test]
fn show_a_stage() {
    let show = |extra: &[&str]| {
        let args = [&["plan", "show", "--pattern", "FFSFSSSF", "--stage", "4..6"], extra].concat();
        run(&args).1
    };
    let line = "stage         layers 4..6: receives the indices of layer 3, sends the indices of layer 3\n";
    assert!(show(&[]).contains(line));
    assert!(show(&[]).contains("   0  ....SS\n"));
    let promoted = show(&["--promote"]);
    assert!(promoted.contains("   0  ....FS\n"));
    assert!(promoted.contains("layers 4..6: receives nothing, sends nothing\n"));
    assert!(promoted.contains("note: layer 4 is Shared in the model and promoted to Full"));
}

#[test]
fn show_json() {
    for args in [
        &["--config", CONFIG][..],
        &["--pattern", GLM52],
        &["--pattern", GLM52, "--layers", "78"],
        &["--freq", "4", "--offset", "3", "--layers", "78"],
        &["--freq", "4", "--offset", "2", "--layers", "78", "--dialect", "atom"],
        &["--config", "tests/data/configs/glm_5_1.json", "--pattern", GLM52],
        &["--config", "tests/data/configs/glm_5_1.json", "--freq", "4", "--offset", "3"],
    ] {
        let (status, stdout, stderr) = run(&[&["plan", "show", "--json"], args].concat());
        assert_eq!((status, stderr.as_str()), (0, ""), "{args:?}");
        let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(json["pattern"], GLM52, "{args:?}");
    }
    let (_, stdout, _) =
        run(&["plan", "show", "--json", "--freq", "2", "--layers", "4", "--topk", "64"]);
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&json["source"], &json["dialect"]), (&"argument".into(), &"hf".into()));
    assert_eq!((&json["pattern"], &json["topk"]), (&"FFSF".into(), &64.into()));
}

#[test]
fn show_in_another_spelling() {
    for (spelling, expected) in [
        ("letters", "FSS-F\n"),
        ("compact", "FSSF\n"),
        ("indexer-types", "[\"full\",\"shared\",\"shared\",\"full\",\"full\"]\n"),
        ("sources", "[0,4]\n"),
        ("freq:hf", "{\"index_skip_topk_offset\":1,\"index_topk_freq\":4}\n"),
        ("freq:m3", "{\"index_skip_topk_offset\":0,\"index_topk_freq\":3}\n"),
    ] {
        let (status, stdout, _) = run(&["plan", "show", "--pattern", "FSS-F", "--as", spelling]);
        assert_eq!((status, stdout.as_str()), (0, expected), "{spelling}");
    }
    let (status, _, stderr) = run(&["plan", "show", "--pattern", "FSFF", "--as", "freq:hf"]);
    assert_eq!(status, 1);
    assert!(
        stderr.starts_with("indexcache: no index_topk_freq means this pattern in the hf dialect")
    );
}

#[test]
fn a_config_may_come_from_standard_input() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_indexcache"))
        .args(["plan", "show", "--config", "-", "--as", "letters"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let config = br#"{"model_type": "deepseek_v32", "num_hidden_layers": 3, "index_topk": 8, "index_head_dim": 32}"#;
    child.stdin.take().unwrap().write_all(config).unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"FFF\n");
}

#[test]
fn check_is_silent_or_says_why() {
    assert_eq!(run(&["plan", "check", "--pattern", GLM52]), (0, String::new(), String::new()));
    for (args, why) in [
        (
            &["--pattern", &GLM52[..75], "--layers", "78"][..],
            "index_topk_pattern has 75 entries but the model has 78 layers: give 78 entries; nothing is filled in, because entries lost on the way shift every layer after the gap",
        ),
        (
            &["--config", CONFIG, "--pattern", &GLM52[..75]],
            "index_topk_pattern has 75 entries but the model has 78 layers: give 78 entries; nothing is filled in, because entries lost on the way shift every layer after the gap",
        ),
        (
            &["--pattern", "SFF"],
            "pattern: layer 0 is Shared, but no layer before it has selected anything; make layer 0 Full",
        ),
        (
            &["--freq", "0", "--layers", "8"],
            "index_topk_freq must be 1 or more (1 makes every layer Full), got 0",
        ),
        (
            &["--freq", "4", "--offset", "-1", "--layers", "8"],
            "index_skip_topk_offset must be 1 or more in the hf rule, got -1",
        ),
        (&["--freq", "4", "--layers", "0"], "the number of layers must be from 1 to 4096, got 0"),
        (
            &["--pattern", "FFF", "--stage", "1..4"],
            "stage: expected a range that is not empty within 0..3, got 1..4",
        ),
    ] {
        let expected = (1, String::new(), format!("indexcache: {why}\n"));
        assert_eq!(run(&[&["plan", "check"], args].concat()), expected, "{args:?}");
    }
}

/// The plan is acceptable, and not what its config asks for.
#[test]
fn configured_but_inactive_is_visible() {
    let path =
        std::env::temp_dir().join(format!("indexcache-inactive-{}.json", std::process::id()));
    let config = r#"{"model_type": "deepseek_v32", "num_hidden_layers": 4, "index_topk": 8,
        "index_head_dim": 128, "index_topk_freq": 2, "use_index_cache": false}"#;
    std::fs::write(&path, config).unwrap();
    let why =
        "configured but inactive: index_topk_freq asks for reuse, but use_index_cache is false";
    let (status, stdout, stderr) = run(&["plan", "check", "--config", path.to_str().unwrap()]);
    assert_eq!((status, stdout, stderr), (0, String::new(), format!("note: {why}\n")));
    let (_, stdout, _) = run(&["plan", "show", "--config", path.to_str().unwrap()]);
    assert!(stdout.ends_with(&format!("note: {why}\n")));
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        &["plan", "check"][..],
        &["plan", "show", "--freq", "4"],
        &["plan", "show", "--pattern", "F", "--freq", "4"],
        &["plan", "show", "--pattern", "F", "--offset", "4"],
        &["plan", "show", "--pattern", "F", "--dialect", "atom"],
        &["plan", "show", "--freq", "4", "--layers", "8", "--dialect", "HF"],
        &["plan", "show", "--pattern", "F", "--promote"],
        &["plan", "show", "--pattern", "F", "--stage", "1-4"],
        &["plan", "show", "--pattern", "F", "--topk", "0"],
        &["plan", "show", "--pattern", "F", "--as", "freq"],
        &["plan", "show", "--config", "does/not/exist.json"],
        &["plan", "show", "--config", CONFIG, "--layers", "78"],
        &["plan"],
    ] {
        let (status, stdout, stderr) = run(args);
        assert_eq!((status, stdout.as_str()), (2, ""), "{args:?}");
        assert!(!stderr.is_empty(), "{args:?}");
    }
}
