//! Compiles the server: the same C++ sources as CMakeLists.txt, with `bridge.cpp` in place of `main.cpp`.

const SOURCES: [&str; 13] = [
    "audit", "bridge", "engine", "gemm", "json", "model", "options", "pages", "report", "serve",
    "server", "threads", "weights",
];

fn main() {
    let mut build = cxx_build::bridge("src/main.rs");
    build.std("c++17").include("src").include("../../include").warnings(true).extra_warnings(true);
    // A debug build of the Rust side still wants a matrix product that is not ten times slower.
    build.opt_level(2);
    build.flag_if_supported("-Wpedantic");
    for name in SOURCES {
        build.file(format!("src/{name}.cpp"));
    }
    build.compile("serve-cxx");
    for folder in ["src", "../../include"] {
        println!("cargo:rerun-if-changed={folder}");
    }
}
