//! Starts the C++ server. `cargo run --release -p serve -- --help`

// The C++ side calls the library's C functions: this keeps them in the link.
use indexcache as _;

#[cxx::bridge(namespace = "serve")]
mod ffi {
    unsafe extern "C++" {
        include!("bridge.hpp");

        fn run(arguments: &Vec<String>, default_model: &str) -> i32;
    }
}

fn main() {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tiny_dsa");
    std::process::exit(ffi::run(&arguments, model));
}
