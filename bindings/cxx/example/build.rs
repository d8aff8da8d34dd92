//! Compiles the C++ program with the headers of both bridges.

fn main() {
    cxx_build::bridge("src/main.rs").file("loop.cc").std("c++17").compile("loop");
    for file in ["src/main.rs", "loop.cc", "loop.h"] {
        println!("cargo:rerun-if-changed={file}");
    }
}
