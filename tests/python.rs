//! Tests that are Python's, against the library that cargo has just built: the binding's own, and the search through an
//! OpenAI-style server. Visibly skipped without numpy and pytest.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use common::{cdylib, root, skip};
use std::process::Command;

fn pytest_passes(directory: &str) {
    let there = Command::new("python3").args(["-c", "import numpy, pytest"]).output();
    if !there.is_ok_and(|o| o.status.success()) {
        skip("python3 with numpy and pytest was not found");
        return;
    }
    let output = Command::new("python3")
        .args(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"])
        .current_dir(root().join(directory))
        .env("INDEXCACHE_LIBRARY", cdylib())
        .env("PYTHONPATH", root().join("bindings/python/src"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text.lines().filter_map(|l| l.strip_prefix("SKIPPED ")).for_each(skip);
}

#[test]
fn binding() {
    pytest_passes("bindings/python");
}

#[test]
fn search_through_an_openai_style_server() {
    pytest_passes("examples/search_openai");
}
