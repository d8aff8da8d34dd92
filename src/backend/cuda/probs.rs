//! The probabilities of sparse attention on Hopper: `kernels/attention_probs_sm90.cu`.

use super::driver::{Gpu, Kernel};
use super::{KV_FP8, attention, params};
use crate::context::Stream;
use crate::error::Result;
use crate::ops::SparseAttention;

const THREADS: u32 = 384;
/// `Shared`.
const SHARED: u32 = 221_360;

/// The kernels, for bf16 and for fp8.
#[derive(Debug)]
pub(super) struct Probs([Kernel; 2]);

impl Probs {
    /// The kernels, if there are any for this device.
    pub(super) fn load(gpu: &Gpu) -> Result<Option<Self>> {
        const FILE: &str = "attention_probs_sm90";
        if !gpu.has(FILE) {
            return Ok(None);
        }
        let kernel = |name| gpu.kernel(FILE, name, SHARED);
        Ok(Some(Probs([kernel(c"attention_probs_bf16")?, kernel(c"attention_probs_fp8")?])))
    }

    /// Writes them, or answers false where the portable kernel must.
    pub(super) fn weigh(
        &self,
        gpu: &Gpu,
        op: &SparseAttention<'_>,
        p: params::AttentionProbs,
        stream: Stream,
    ) -> Result<bool> {
        if !(attention::takes(op) && attention::aligned(&p.a)) {
            return Ok(false);
        }
        if op.rows > 0 {
            let kernel = &self.0[usize::from(p.a.kv_format == KV_FP8)];
            let _entered = gpu.enter()?;
            // SAFETY: the kernel's struct; checked tensors on this device, `lse` among them; indices are bounded on the
            // device.
            unsafe { kernel.launch((op.rows, 1), THREADS, SHARED, stream.as_raw(), p)? };
        }
        Ok(true)
    }
}
