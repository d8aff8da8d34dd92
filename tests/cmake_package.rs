//! The CMake build, its installed tree after a move, and consumers of it: CMake, pkg-config, the source tree itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{
    WARNINGS, assert_exports, assert_soname_and_nodelete, fresh_dir, has, root, run, skip, stdout,
};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Cargo's target directory: one release build serves this test, its repetitions and whoever builds for release.
fn target_dir() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

fn cmake() -> Command {
    let mut command = Command::new("cmake");
    // What cargo sets for this test must not reach the cargo inside: it would build everything anew.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST") {
            command.env_remove(name);
        }
    }
    command
}

/// Configures and builds the consumer in `build`, and runs its programs.
fn consume(build: &Path, library: &Path, arguments: &[String]) {
    let source = root().join("tests/c/consumer");
    run(cmake().arg("-S").arg(source).arg("-B").arg(build).args(arguments));
    run(cmake().arg("--build").arg(build));
    for program in ["shared", "static", "cxx"] {
        run(&mut Command::new(build.join(program)));
    }
    run(Command::new(build.join("loading")).arg(library));
}

#[test]
fn installed_package_works_after_a_move() {
    if !has("cmake") {
        return skip("CMake package: no cmake");
    }
    let dir = fresh_dir("cmake");
    let (build, first, prefix) = (dir.join("build"), dir.join("first"), dir.join("a moved/prefix"));
    let cargo_dir = format!("-DINDEXCACHE_CARGO_TARGET_DIR={}", target_dir().display());
    run(cmake()
        .arg("-S")
        .arg(root())
        .arg("-B")
        .arg(&build)
        .arg(&cargo_dir)
        .arg("-DCMAKE_INSTALL_LIBDIR=lib"));
    run(cmake().arg("--build").arg(&build));
    run(cmake().arg("--install").arg(&build).arg("--prefix").arg(&first));
    std::fs::create_dir_all(prefix.parent().unwrap()).unwrap();
    std::fs::rename(&first, &prefix).unwrap();

    let lib = prefix.join("lib");
    let version = env!("CARGO_PKG_VERSION");
    let library = lib.join(format!("libindexcache.so.{version}"));
    assert_exports(&library);
    assert_soname_and_nodelete(&library);
    for (link, to) in [
        ("libindexcache.so.0", format!("libindexcache.so.{version}")),
        ("libindexcache.so", "libindexcache.so.0".into()),
    ] {
        assert_eq!(std::fs::read_link(lib.join(link)).unwrap(), Path::new(&to));
    }
    for header in ["indexcache.h", "indexcache.hpp", "dynload.h"] {
        let [ours, theirs] = [root().join("include/indexcache"), prefix.join("include/indexcache")]
            .map(|d| std::fs::read(d.join(header)).unwrap());
        assert_eq!(ours, theirs);
    }
    for file in ["cmake/indexcache/indexcacheConfig.cmake", "pkgconfig/indexcache.pc"] {
        let text = std::fs::read_to_string(lib.join(file)).unwrap();
        for place in [root(), &dir, &target_dir()] {
            assert!(
                !text.contains(place.to_str().unwrap()),
                "{file} knows where it was built:\n{text}"
            );
        }
        assert!(text.contains(version), "{text}");
    }

    consume(
        &dir.join("consumer"),
        &library,
        &[format!("-DCMAKE_PREFIX_PATH={}", prefix.display())],
    );
    serve(&dir.join("serve"), &prefix);
    pkg_config(&dir, &prefix);
    // The same targets without an install. The static library is there already: cargo has nothing to do.
    consume(
        &dir.join("subdirectory"),
        &library,
        &[format!("-DINDEXCACHE_SOURCE={}", root().display()), cargo_dir],
    );
}

/// The example server as a project of its own: a real host, with nothing but `find_package`.
fn serve(build: &Path, prefix: &Path) {
    let prefix = format!("-DCMAKE_PREFIX_PATH={}", prefix.display());
    run(cmake().arg("-S").arg(root().join("examples/serve")).arg("-B").arg(build).arg(prefix));
    run(cmake().arg("--build").arg(build));
    let model = root().join("examples/tiny_dsa");
    let mut command = Command::new(build.join("serve"));
    command.arg("--model").arg(model).args([
        "--requests",
        "1",
        "--context",
        "512",
        "--decode",
        "2",
        "--json",
    ]);
    let report = stdout(&mut command);
    assert!(report.contains("bits_per_byte"), "{report}");
}

fn pkg_config(dir: &Path, prefix: &Path) {
    if !has("pkg-config") {
        return skip("pkg-config consumer: no pkg-config");
    }
    // Words of a shell, as in a Makefile: pkg-config escapes the space in the path.
    let lib = prefix.join("lib");
    let compile = |flags: &str, program: &str| {
        let program = dir.join(program);
        let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let script = format!(
            "set -e; flags=$(pkg-config {flags} indexcache); eval \"{cc} -std=c99 {} tests/c/tour.c $flags -lm -o '{}'\"",
            WARNINGS.join(" "),
            program.display()
        );
        run(Command::new("sh")
            .args(["-c", &script])
            .current_dir(root())
            .env("PKG_CONFIG_PATH", lib.join("pkgconfig")));
        program
    };
    run(Command::new(compile("--cflags --libs", "pkg-shared")).env("LD_LIBRARY_PATH", &lib));
    // Without the shared library in the way, -lindexcache is the static one.
    let hidden = dir.join("hidden");
    std::fs::create_dir(&hidden).unwrap();
    let link = lib.join("libindexcache.so");
    std::fs::rename(&link, hidden.join("libindexcache.so")).unwrap();
    let program = compile("--static --cflags --libs", "pkg-static");
    run(&mut Command::new(&program));
    if has("readelf") {
        let needed = stdout(Command::new("readelf").arg("-d").arg(program));
        assert!(!needed.contains("libindexcache"), "{needed}");
    }
    std::fs::rename(hidden.join("libindexcache.so"), link).unwrap();
}
