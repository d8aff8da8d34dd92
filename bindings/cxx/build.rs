//! Compiles the C++ side of the bridge.

fn main() {
    cxx_build::bridge("src/lib.rs").std("c++17").compile("indexcache-cxx");
    println!("cargo:rerun-if-changed=src/lib.rs");
}
