//! What tests share: building C and C++ programs here, the data of operations in `data`, distillation in
//! `distill`.
#![allow(dead_code)] // Each test file uses its part.

pub mod data;
pub mod distill;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An empty directory of this test's own.
pub fn fresh_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Says on the terminal, past the test harness, that something was not tested.
pub fn skip(what: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
}

/// Whether a tool can be run.
pub fn has(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success())
}

fn compiler(variable: &str, default: &str) -> Command {
    let text = std::env::var(variable).unwrap_or_else(|_| default.into());
    let mut words = text.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or(default));
    command.args(words).arg("-I").arg(root().join("include"));
    command
}

/// The C compiler, with this repository's headers.
pub fn cc() -> Command {
    compiler("CC", "cc")
}

/// The C++ compiler, with this repository's headers.
pub fn cxx() -> Command {
    compiler("CXX", "c++")
}

/// The shared library that cargo linked: beside the test programs.
pub fn cdylib() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().join("libindexcache.so")
}

/// Lets programs link `library` from `dir` and find it again by its SONAME.
pub fn link_against(command: &mut Command, library: &Path, dir: &Path) {
    for name in ["libindexcache.so", "libindexcache.so.0"] {
        let link = dir.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(library, link).unwrap();
        }
    }
    command.arg("-L").arg(dir).arg("-lindexcache").arg(format!("-Wl,-rpath,{}", dir.display()));
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// What a successful command printed.
pub fn stdout(command: &mut Command) -> String {
    String::from_utf8(run(command).stdout).unwrap()
}

/// Compares with a committed file; `INDEXCACHE_BLESS=1` writes it instead.
pub fn snapshot(name: &str, have: &str) {
    let path = root().join("tests/snapshots").join(name);
    if std::env::var_os("INDEXCACHE_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, have).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        have == want,
        "{} differs: the ABI changed. If that is meant: INDEXCACHE_BLESS=1\n--- now\n{have}",
        path.display()
    );
}

/// Function names that a shared library exports, by `nm`.
fn exports(library: &Path) -> BTreeSet<String> {
    let text = stdout(Command::new("nm").args(["-D", "--defined-only", "-P"]).arg(library));
    text.lines().map(|l| l.split([' ', '@']).next().unwrap().to_owned()).collect()
}

/// The function table and the function that gives it: nothing less, nothing more.
pub fn assert_exports(library: &Path) {
    let want: BTreeSet<String> = indexcache::capi::table::NAMES
        .iter()
        .chain(&["idxc_get_api"])
        .map(|&n| n.to_owned())
        .collect();
    assert_eq!(exports(library), want);
}

/// The name that programs record, and the flag without which a thread that exits after dlclose would crash.
pub fn assert_soname_and_nodelete(library: &Path) {
    let text = stdout(Command::new("readelf").args(["-d", "-W"]).arg(library));
    assert!(text.contains("Library soname: [libindexcache.so.0]"), "{text}");
    assert!(text.contains("NODELETE"), "{text}");
}

/// The one block of code in a Markdown file that has this language and this word.
pub fn code_block(file: &str, language: &str, word: &str) -> String {
    let text = std::fs::read_to_string(root().join(file)).unwrap();
    let fence = format!("```{language}\n");
    let blocks = text.split(&fence).skip(1);
    let blocks = blocks.filter_map(|b| b.split("```").next().filter(|code| code.contains(word)));
    let found: Vec<&str> = blocks.collect();
    let [block] = found[..] else {
        panic!("{file}: {} {language} blocks with {word:?}", found.len())
    };
    block.into()
}
