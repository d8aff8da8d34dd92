//! DeepSeek Sparse Attention with cross-layer index reuse (IndexCache).
//!
//! The product is the C ABI in `include/indexcache/indexcache.h`; this crate is what stands behind it.

#[cfg(not(panic = "unwind"))]
compile_error!("indexcache turns panics into statuses and must be built with panic = \"unwind\"");

pub mod audit;
pub mod backend;
pub mod cache;
pub mod capi;
pub mod context;
pub mod error;
mod fnv;
pub mod fp8;
pub mod layout;
pub mod ops;
pub mod plan;
pub mod search;
pub mod tensor;
