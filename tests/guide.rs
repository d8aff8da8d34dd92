//! docs/search.md: its C++ program compiles and runs as it stands there. (Its Python is tested where Python is, its
//! command lines in `cli_guide.rs`.)
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use common::{WARNINGS, cdylib, code_block, cxx, fresh_dir, link_against, root, run, stdout};
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

const LAYERS: usize = 61;
const TARGET: usize = 16;

/// As tests/c/guide_model.cpp has it.
fn loss(pattern: &str) -> f64 {
    let (mut age, mut total) = (0, 0);
    for (layer, role) in pattern.chars().enumerate() {
        age = if role == 'F' { 0 } else { age + 1 };
        total += age * (1 + layer * 7 % 13);
    }
    2.0 + total as f64 / 1024.0
}

fn plain_greedy() -> String {
    let mut pattern = "F".repeat(LAYERS);
    while pattern.matches('F').count() > TARGET {
        let flip = |layer| format!("{}S{}", &pattern[..layer], &pattern[layer + 1..]);
        let full = (1..LAYERS).filter(|layer| pattern.as_bytes()[*layer] == b'F');
        // The first of the lowest.
        pattern = full.map(flip).min_by(|a, b| loss(a).total_cmp(&loss(b))).unwrap();
    }
    pattern
}

#[test]
fn the_program_finds_the_pattern_however_often_it_is_killed() {
    let dir = fresh_dir("guide");
    std::fs::write(dir.join("find_pattern.cpp"), code_block("docs/search.md", "cpp", "int main"))
        .unwrap();
    let mut compile = cxx();
    compile.arg("-std=c++17").args(WARNINGS).arg(dir.join("find_pattern.cpp"));
    compile.arg(root().join("tests/c/guide_model.cpp")).arg("-o").arg(dir.join("find_pattern"));
    link_against(&mut compile, &cdylib(), &dir);
    run(&mut compile);
    let program = || {
        let mut command = Command::new(dir.join("find_pattern"));
        command.current_dir(&dir).stderr(Stdio::null());
        command
    };
    for kill_at in [1, 700, 500] {
        let killed = program().env("KILL_AT", kill_at.to_string()).stdout(Stdio::null()).status();
        assert_eq!(killed.unwrap().signal(), Some(libc::SIGKILL));
    }
    let result: Value = serde_json::from_str(&stdout(&mut program())).unwrap();
    assert_eq!((&result["complete"], &result["evaluations"]), (&true.into(), &1711.into()));
    assert_eq!(result["patterns"]["1/4"]["pattern"], plain_greedy());
    // Once more: it is all there.
    let again: Value = serde_json::from_str(&stdout(&mut program())).unwrap();
    assert_eq!(again, result);
}
