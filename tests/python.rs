//! The Python binding's own tests, against the library that cargo has just built. Visibly skipped without numpy and
//! pytest.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

#[test]
fn pytest_passes() {
    let python = |args: &[&str]| {
        let mut command = Command::new("python3");
        command.args(args);
        command
    };
    let there = python(&["-c", "import numpy, pytest"]).output().is_ok_and(|o| o.status.success());
    if !there {
        // Past the harness, which would swallow a line printed in the usual way.
        writeln!(std::io::stderr(), "SKIPPED: python3 with numpy and pytest was not found")
            .unwrap();
        return;
    }
    let library = std::env::current_exe().unwrap().with_file_name("libindexcache.so");
    let binding = Path::new(env!("CARGO_MANIFEST_DIR")).join("bindings/python");
    let output = python(&["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"])
        .current_dir(binding)
        .env("INDEXCACHE_LIBRARY", library)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for line in text.lines().filter(|l| l.starts_with("SKIPPED")) {
        writeln!(std::io::stderr(), "{line}").unwrap();
    }
}
