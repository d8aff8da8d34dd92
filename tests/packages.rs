//! The installed package: built by CMake, moved to another place, and used from there through CMake and pkg-config.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{fresh_dir, has, root, skip};
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S], environment: &[(&str, &OsStr)]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).envs(environment.iter().copied());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn installs_moves_and_links() {
    if !has("cmake") {
        return skip("the installed package: no cmake");
    }
    let dir = fresh_dir("packages");
    let path = |name: &str| dir.join(name).display().to_string();
    let source = root().display().to_string();
    // Kept between runs, so that only the first one builds everything.
    let cargo = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packages-cargo").display().to_string();

    let (build, first, moved) = (path("build"), path("first"), path("moved"));
    run(
        "cmake",
        &[
            "-S".into(),
            source.clone(),
            "-B".into(),
            build.clone(),
            format!("-DCMAKE_INSTALL_PREFIX={first}"),
            "-DCMAKE_INSTALL_LIBDIR=lib".into(),
            format!("-DINDEXCACHE_CARGO_TARGET_DIR={cargo}"),
        ],
        &[],
    );
    run("cmake", &["--build", &build], &[]);
    run("cmake", &["--install", &build], &[]);
    std::fs::rename(&first, &moved).unwrap();

    let library = format!("{moved}/lib/libindexcache.so");
    let symbols = run("nm", &["-D", "--defined-only", &library], &[]);
    let mut names: Vec<&str> =
        symbols.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
    names.sort_unstable();
    let mut want = indexcache::capi::table::NAMES.to_vec();
    want.push("idxc_get_api");
    want.sort_unstable();
    assert_eq!(names, want, "exported symbols of the installed library");
    for file in std::fs::read_dir(format!("{moved}/lib/cmake/indexcache")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        assert!(!text.contains(&first), "the package names the place it was installed to");
    }

    // A C++ server, with nothing but find_package.
    let consumer = path("serve");
    let example = format!("{source}/examples/serve");
    run("cmake", &["-S", &example, "-B", &consumer, &format!("-DCMAKE_PREFIX_PATH={moved}")], &[]);
    run("cmake", &["--build", &consumer, "-j2"], &[]);
    let program = find(Path::new(&consumer), "serve");
    let model = format!("{source}/examples/tiny_dsa");
    let small =
        ["--model", &model, "--requests", "1", "--context", "512", "--decode", "2", "--json"];
    let report = run(&program, &small, &[]);
    assert!(report.contains("bits_per_byte"), "{report}");

    if !has("pkg-config") {
        return skip("pkg-config is not installed");
    }
    let config = format!("{moved}/lib/pkgconfig");
    let search = [("PKG_CONFIG_PATH", OsStr::new(&config))];
    let flags = run("pkg-config", &["--cflags", "--libs", "indexcache"], &search);
    let code = "#include <indexcache/indexcache.h>\nint main(void) { return idxc_version() != IDXC_ABI_VERSION; }\n";
    std::fs::write(path("version.c"), code).unwrap();
    let mut arguments: Vec<String> = vec![path("version.c"), "-o".into(), path("version")];
    arguments.extend(flags.split_whitespace().map(String::from));
    run("cc", &arguments, &[]);
    let place = format!("{moved}/lib");
    run(&path("version"), &[] as &[&str], &[("LD_LIBRARY_PATH", OsStr::new(&place))]);
}

/// The executable `name` under `dir`, wherever the generator put it.
fn find(dir: &Path, name: &str) -> String {
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name() == Some(OsStr::new(name)) {
                return path.display().to_string();
            }
        }
    }
    panic!("{name} was not built");
}
