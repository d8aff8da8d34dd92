//! docs/search.md: its command lines do what it says. (Those of docs/simulate.md: `cli_simulate.rs`.)

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use common::{code_block, fresh_dir, root, run};
use serde_json::json;
use std::path::Path;
use std::process::Command;

const TOOL: &str = env!("CARGO_BIN_EXE_indexcache");

/// Runs a block in `dir` with this build's tool in the path.
fn shell(dir: &Path, code: &str) -> String {
    let path = format!(
        "{}:{}",
        Path::new(TOOL).parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let mut bash = Command::new("bash");
    bash.args(["-euc", code]).current_dir(dir).env("PATH", path);
    String::from_utf8(run(&mut bash).stdout).unwrap()
}

#[test]
fn the_searched_pattern_is_checked_and_shown() {
    let dir = fresh_dir("cli_guide");
    let config = root().join("tests/data/configs/deepseek_v32.json");
    std::fs::copy(config, dir.join("config.json")).unwrap();
    let pattern = "FSSS".repeat(15) + "S";
    let result = json!({ "patterns": { "1/4": { "pattern": pattern } } });
    std::fs::write(dir.join("result.json"), result.to_string()).unwrap();
    let shown = shell(&dir, &code_block("docs/search.md", "sh", "plan check"));
    assert!(shown.starts_with("61 layers: 15 Full, 46 Shared"), "{shown}");
}

/// Running it is `cli_search.rs`'s work; here: every option that the guide names exists.
#[test]
fn the_small_model_s_command_is_understood() {
    let code = code_block("docs/search.md", "sh", "examples/tiny_dsa");
    let help = Command::new(TOOL).args(["search", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, arguments) = code.lines().next().unwrap().split_once("-- search").unwrap();
    let options = arguments.split_whitespace().filter(|word| word.starts_with("--"));
    let options: Vec<&str> = options.collect();
    assert!(options.contains(&"--model"), "{code}");
    for option in options {
        assert!(help.contains(&format!("{option} ")), "{option} is none of\n{help}");
    }
}
