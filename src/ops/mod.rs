//! The operations: what they take, which shapes and dtypes are right, how much scratch they need.
//!
//! Nothing here computes. `…Args` mirror the C descriptors one to one; `check` turns them into typed views that a
//! backend can trust, or into an error that names the argument.

mod attention;
mod index_k;
mod indexer;
mod indices;
mod keys;
mod kv;
mod topk;

pub use attention::{SparseAttention, SparseAttentionArgs};
pub use index_k::{IndexKWrite, IndexKWriteArgs, IndexQQuantize, IndexQQuantizeArgs};
pub use indexer::{IndexerArgs, IndexerLogits, Select};
pub use indices::{IndexForm, IndicesToSlots, IndicesToSlotsArgs, Overlap};
pub use keys::{KeyMap, KeyMapArgs};
pub use kv::{KvWrite, KvWriteArgs};
pub use topk::{TopK, TopKArgs};

/// Largest number of indices a row.
pub const MAX_TOPK: usize = 4096;
/// Tokens in a page of index K, and of fp8 KV.
pub const PAGE: usize = 64;
