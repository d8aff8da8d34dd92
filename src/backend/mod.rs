//! What executes the operations.

pub mod cpu;
