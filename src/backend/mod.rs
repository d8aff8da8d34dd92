//! What executes the operations.

mod check;
pub mod cpu;
pub mod cuda;
