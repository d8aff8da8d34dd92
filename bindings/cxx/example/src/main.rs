//! Runs `loop.cc`.

use indexcache_cxx as _; // Links the bridge that the C++ side calls.

#[cxx::bridge(namespace = "example")]
mod ffi {
    unsafe extern "C++" {
        include!("indexcache-cxx-example/loop.h");
        fn run_loop() -> Result<()>;
    }
}

fn main() -> Result<(), cxx::Exception> {
    ffi::run_loop()
}

#[test]
fn the_loop_runs_in_cpp() -> Result<(), cxx::Exception> {
    ffi::run_loop()
}
