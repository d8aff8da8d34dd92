//! The C ABI as C and C++ programs see it: headers, layout, exported symbols, linking and loading.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{
    WARNINGS, assert_exports, assert_soname_and_nodelete, cc, cdylib, cxx, fresh_dir, has,
    link_against, root, run, skip, snapshot, stdout,
};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const C: [&str; 3] = ["-std=c99", "-std=c11", "-std=c17"];
const CXX: [&str; 4] = ["-std=c++11", "-std=c++14", "-std=c++17", "-std=c++20"];

fn source(name: &str) -> PathBuf {
    root().join("tests/c").join(name)
}

fn header() -> String {
    std::fs::read_to_string(root().join("include/indexcache/indexcache.h")).unwrap()
}

/// For C, and for C++.
type CompilerPair = (fn() -> Command, fn() -> Command);

/// The default compilers with the headers, and clang if it is there.
fn compilers() -> Vec<CompilerPair> {
    fn with_headers(name: &str) -> Command {
        let mut command = Command::new(name);
        command.arg("-I").arg(root().join("include"));
        command
    }
    let mut found: Vec<CompilerPair> = vec![(cc, cxx)];
    if has("clang") && has("clang++") {
        found.push((|| with_headers("clang"), || with_headers("clang++")));
    } else {
        skip("headers with clang: not installed");
    }
    found
}

#[test]
fn headers_compile_without_warnings() {
    // What strict hosts add, for C++: the macros of a C header expand in their sources.
    let strict =
        ["-Wconversion", "-Wshadow", "-Wold-style-cast", "-Wzero-as-null-pointer-constant"];
    let bare = ["-fno-exceptions", "-fno-rtti"];
    for (cc, cxx) in compilers() {
        for standard in C {
            let mut command = cc();
            command.args([standard, "-Wconversion", "-fsyntax-only"]).args(WARNINGS);
            run(command.arg(source("header.c")));
        }
        for standard in CXX {
            let mut command = cxx();
            command.args([standard, "-fsyntax-only", "-x", "c++"]).args(WARNINGS).args(strict);
            run(command.arg(source("header.c")));
        }
        for standard in &CXX[2..] {
            for loaded in [&[][..], &["-DLOADED"]] {
                let mut command = cxx();
                command.args([standard, "-fsyntax-only"]).args(WARNINGS).args(strict).args(bare);
                run(command.args(loaded).arg(source("loop.cpp")).arg(source("search.cpp")));
            }
        }
    }
}

#[test]
fn every_initialiser_is_tried() {
    let program = std::fs::read_to_string(source("header.c")).unwrap();
    for line in header().lines().filter_map(|l| l.strip_prefix("#define IDXC_")) {
        let name = line.split(' ').next().unwrap();
        if name.ends_with("_INIT") {
            assert!(
                program.contains(&format!("= IDXC_{name};")),
                "header.c does not use IDXC_{name}"
            );
        }
    }
}

#[test]
fn every_function_is_in_the_tour_and_in_the_cxx_header() {
    let tour = std::fs::read_to_string(source("tour.c")).unwrap();
    let hpp = std::fs::read_to_string(root().join("include/indexcache/indexcache.hpp")).unwrap();
    for name in indexcache::capi::table::NAMES {
        assert!(tour.contains(&format!("F({name})")), "tour.c does not call {name}");
        assert!(hpp.contains(&format!("INDEXCACHE_CALL({name})")), "indexcache.hpp has no {name}");
    }
}

/// Name and fields of each public struct, from the header; the function table last.
fn structs() -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut current: Option<(String, Vec<String>)> = None;
    let mut in_comment = false;
    for line in header().lines() {
        let t = line.trim();
        if t.starts_with("/*") {
            in_comment = true;
        }
        if in_comment {
            in_comment = !t.ends_with("*/");
            continue;
        }
        let name = t
            .trim_start_matches("typedef ")
            .strip_prefix("struct ")
            .and_then(|r| r.strip_suffix(" {"));
        if let Some(name) = name {
            current = Some((name.to_owned(), Vec::new()));
        } else if t.starts_with('}') {
            found.extend(current.take());
        } else if let (Some((_, fields)), Some(field)) = (&mut current, t.strip_suffix(';')) {
            let name = match field.split_once("(*") {
                Some((_, function)) => function.split(')').next().unwrap(),
                None => field.rsplit([' ', '*']).next().unwrap(),
            };
            fields.push(name.to_owned());
        }
    }
    found
}

#[test]
fn struct_layout_is_what_it_was() {
    let dir = fresh_dir("layout");
    let mut program =
        String::from("#include <indexcache/indexcache.h>\n#include <stdio.h>\nint main(void) {\n");
    for (name, fields) in structs() {
        writeln!(program, "  printf(\"{name}: %zu bytes\\n\", sizeof({name}));").unwrap();
        for field in fields {
            writeln!(
                program,
                "  printf(\"  %zu: {field}, %zu\\n\", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));"
            )
            .unwrap();
        }
    }
    program.push_str("  return 0;\n}\n");
    let (file, binary) = (dir.join("layout.c"), dir.join("layout"));
    std::fs::write(&file, program).unwrap();
    run(cc().arg(&file).arg("-o").arg(&binary));
    snapshot("layout.txt", &stdout(&mut Command::new(binary)));
}

/// Numbers are promises too: statuses, flags, roles, dialects …
#[test]
fn constants_are_what_they_were() {
    let mut lines = String::new();
    for line in header().lines().filter_map(|l| l.strip_prefix("#define IDXC_")) {
        let (name, value) = line.split_once(' ').unwrap();
        if !name.ends_with("_INIT") {
            writeln!(lines, "IDXC_{name} {value}").unwrap();
        }
    }
    assert!(lines.contains("IDXC_ERR_PANIC 11"));
    snapshot("constants.txt", &lines);
}

/// `dlpack.h` of some installed package: the first include directory of Python's packages that has one.
fn dlpack_header() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("DLPACK_H") {
        return Some(path.into());
    }
    let script = "import sys, pathlib\n\
                  for place in filter(None, sys.path):\n\
                  \x20   for pattern in ('*/include/dlpack/dlpack.h', '*/include/ATen/dlpack.h', '*/3rdparty/dlpack/include/dlpack/dlpack.h', '*/*/*/dlpack/include/dlpack/dlpack.h'):\n\
                  \x20       for path in pathlib.Path(place).glob(pattern):\n\
                  \x20           sys.exit(print(path))\n";
    let output = Command::new("python3").args(["-c", script]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    let path = path.lines().next()?;
    Path::new(path).is_file().then(|| path.into())
}

#[test]
fn tensor_is_dltensor() {
    let Some(path) = dlpack_header() else {
        return skip(
            "idxc_tensor against DLTensor: no Python package with dlpack.h (apache-tvm-ffi, torch)",
        );
    };
    let define = format!("-DDLPACK_H=\"{}\"", path.display());
    run(cxx().args(["-std=c++11", "-fsyntax-only", &define]).arg(source("dlpack.cpp")));
}

#[test]
fn cdylib_exports_the_table_and_nothing_else() {
    if !has("nm") {
        return skip("exported symbols: no nm");
    }
    assert_exports(&cdylib());
    snapshot("symbols.txt", &(indexcache::capi::table::NAMES.join("\n") + "\nidxc_get_api\n"));
}

#[test]
fn cdylib_has_its_soname_and_stays_loaded() {
    if !has("readelf") {
        return skip("SONAME and NODELETE: no readelf");
    }
    assert_soname_and_nodelete(&cdylib());
}

/// Builds a program of `tests/c` twice, linked and loading, and gives both ways to run it.
fn both_ways(name: &str, compiler: fn() -> Command, flags: &[&str]) -> [Command; 2] {
    let dir = fresh_dir(name);
    let (linked, loaded) = (dir.join("linked"), dir.join("loaded"));
    let mut build = compiler();
    build.args(flags).args(WARNINGS).arg(source(name)).arg("-o").arg(&linked);
    link_against(&mut build, &cdylib(), &dir);
    run(build.arg("-lm"));
    let mut build = compiler();
    build.args(flags).args(WARNINGS).arg("-DLOADED").arg(source(name)).arg("-o").arg(&loaded);
    run(build.args(["-ldl", "-lm"]));
    let mut load = Command::new(loaded);
    load.arg(cdylib());
    [Command::new(linked), load]
}

#[test]
fn tour_of_all_functions_runs_valgrind_clean() {
    let valgrind = has("valgrind");
    if !valgrind {
        skip("the tour under valgrind: not installed");
    }
    for mut command in both_ways("tour.c", cc, &["-std=c99", "-g"]) {
        run(&mut command);
        if valgrind {
            // "Possibly lost" is not counted: glibc's blocks of pool threads that are still on their way out at exit.
            let mut checked = Command::new("valgrind");
            checked.args([
                "--quiet",
                "--error-exitcode=9",
                "--leak-check=full",
                "--errors-for-leak-kinds=definite,indirect",
            ]);
            checked.args(["--show-leak-kinds=definite,indirect"]);
            run(checked.arg(command.get_program()).args(command.get_args()));
        }
    }
}

#[test]
fn cxx_loop_agrees_with_plain_f64() {
    for mut command in
        both_ways("loop.cpp", cxx, &["-std=c++17", "-O1", "-fno-exceptions", "-fno-rtti"])
    {
        run(&mut command);
    }
}

#[test]
fn cxx_search_survives_being_killed() {
    let dir = fresh_dir("search.cpp-journals");
    for mut command in both_ways("search.cpp", cxx, &["-std=c++17", "-O1"]) {
        run(command.arg(&dir));
    }
}

#[test]
fn loader_survives_cycles_late_threads_and_other_libraries() {
    let dir = fresh_dir("dlopen");
    let program = dir.join("dlopen");
    let mut build = cc();
    build.args(["-std=c99", "-g", "-pthread"]).args(WARNINGS).arg(source("dlopen.c"));
    run(build.arg("-o").arg(&program).arg("-ldl"));
    let old = |version: &str| {
        let library = dir.join(format!("old{version}.so"));
        let define = format!("-DVERSION={version}");
        run(cc()
            .args(["-shared", "-fPIC", &define])
            .arg(source("old_library.c"))
            .arg("-o")
            .arg(&library));
        library
    };
    run(Command::new(program).arg(cdylib()).arg(old("1")).arg(old("0")));
}
