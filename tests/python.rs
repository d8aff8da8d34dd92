//! Tests that are Python's, against the library that cargo has just built: the binding's own, and the search through an
//! OpenAI-style server. Visibly skipped without numpy and pytest.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

fn pytest_passes(directory: &str) {
    let there = Command::new("python3").args(["-c", "import numpy, pytest"]).output();
    if !there.is_ok_and(|o| o.status.success()) {
        // Past the harness, which would swallow a line printed in the usual way.
        writeln!(std::io::stderr(), "SKIPPED: python3 with numpy and pytest was not found")
            .unwrap();
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = std::env::current_exe().unwrap().with_file_name("libindexcache.so");
    let output = Command::new("python3")
        .args(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"])
        .current_dir(root.join(directory))
        .env("INDEXCACHE_LIBRARY", library)
        .env("PYTHONPATH", root.join("bindings/python/src"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for line in text.lines().filter(|l| l.starts_with("SKIPPED")) {
        writeln!(std::io::stderr(), "{line}").unwrap();
    }
}

#[test]
fn binding() {
    pytest_passes("bindings/python");
}

#[test]
fn search_through_an_openai_style_server() {
    pytest_passes("examples/search_openai");
}
