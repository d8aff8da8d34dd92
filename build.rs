//! Link arguments of the cdylib that the manifest has no words for.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // The name that programs record. The number changes when the C ABI breaks.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libindexcache.so.0");
        // Threads that called the library run its thread-local destructors when they exit, maybe after dlclose.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
