//! The README's C++ example compiles, links and runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::Path;
use std::process::Command;

#[test]
fn example_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let code = readme.split("```cpp\n").nth(1).and_then(|c| c.split("```").next()).unwrap();
    let lines = code.lines().count();
    assert!(lines <= 45, "the example has {lines} lines");

    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, program) = (dir.join("readme.cpp"), dir.join("readme"));
    std::fs::write(&source, code).unwrap();
    // Test programs and the library they were built with share a directory.
    let libraries = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let compiled = Command::new(compiler)
        .args(["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(root.join("include"))
        .arg(&source)
        .arg("-L")
        .arg(&libraries)
        .arg("-lindexcache")
        .arg(format!("-Wl,-rpath,{}", dir.display()))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    // An installed library is found by its SONAME.
    let soname = dir.join("libindexcache.so.0");
    let _ = std::fs::remove_file(&soname);
    std::os::unix::fs::symlink(libraries.join("libindexcache.so"), &soname).unwrap();
    let ran = Command::new(&program).env("LD_LIBRARY_PATH", &libraries).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
