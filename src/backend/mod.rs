//! What executes the operations.

pub mod cpu;
pub mod cuda;
