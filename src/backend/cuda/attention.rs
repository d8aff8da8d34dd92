//! Sparse attention on Hopper: `kernels/attention_sm90.cu` (bf16 rows), `kernels/attention_fp8_sm90.cu`, and for few
//! heads `kernels/attention_few_sm90.cu` (bf16 rows) and `kernels/attention_few_fp8_sm90.cu`.

use super::KV_FP8;
use super::driver::{Gpu, Kernel};
use super::params::{self, Ptr, small};
use crate::context::Stream;
use crate::error::Result;
use crate::layout::{Addresses, Workspace, with_slack};
use crate::ops::*;
use std::sync::Arc;

/// Threads of the blocks: for many heads, and that combine.
const WIDE_THREADS: u32 = 512;
const COMBINE_THREADS: u32 = 128;
/// Heads of a block, and tokens of a tile.
const HEADS: usize = 64;
const TOKENS: usize = 64;
const D_QK: usize = 576;
const D_V: usize = 512;
/// `Shared`, for bf16 and for fp8.
const WIDE_SHARED: [u32; 2] = [222_160, 222_032];
/// Most heads of the kernels for few, and how many of their blocks share a multiprocessor where rows are split.
const FEW_HEADS: usize = 32;
const FEW_BLOCKS: usize = 2;

/// `Few` of `attention_few_sm90.cu`.
const fn bf16_shared(heads: usize) -> u32 {
    let own = if heads > 8 { heads / 2 } else { heads };
    let tile = TOKENS * D_QK * 2 + heads * D_QK * 2 + TOKENS * heads * 2;
    (tile + 4 * heads + 4 * 8 * own + TOKENS) as u32
}

/// `Few` of `attention_few_fp8_sm90.cu`; `n` is `heads` rounded up to eight.
const fn fp8_shared(heads: usize, stages: usize) -> u32 {
    let n = heads.next_multiple_of(8);
    let numbers = stages * TOKENS * 656 + D_QK * heads * 2 + TOKENS * n * 2;
    (numbers + 4 * (6 * n + 4) + 8 * TOKENS + 8 * stages) as u32
}

/// A kernel for up to `heads` heads.
#[derive(Debug)]
struct Few {
    heads: usize,
    kernel: Kernel,
    threads: u32,
    shared: u32,
}

/// The kernels, for bf16 and for fp8.
#[derive(Debug)]
pub(super) struct Attention {
    gpu: Arc<Gpu>,
    wide: [Kernel; 2],
    few: [Vec<Few>; 2],
    combine: Kernel,
}

/// What the parts of split rows leave to be combined.
struct Parts {
    out: Ptr,
    lse: Ptr,
}

fn lay(a: &mut Addresses, vectors: usize) -> Parts {
    Parts { out: a.take::<f32>(vectors.saturating_mul(D_V)), lse: a.take::<f32>(vectors) }
}

/// Shapes and types that the kernels know.
pub(super) fn takes(op: &SparseAttention<'_>) -> bool {
    let types = matches!(op.q, Floats::Bf16(_)) && !matches!(op.kv, Kv::F32(_));
    types && (op.d_qk, op.d_v) == (D_QK, D_V)
}

/// Addresses and strides that let the kernels move 16 bytes at a time.
pub(super) fn aligned(p: &params::Attention) -> bool {
    let addresses = p.q | p.kv | p.out;
    let elements = p.q_row | p.q_head | p.out_row | p.out_head;
    let bytes = p.page_bytes | p.row_bytes;
    let page = i64::from(i32::MAX); // Slots are divided by it in 32 bits.
    addresses.is_multiple_of(16) && elements % 8 == 0 && bytes % 16 == 0 && p.page <= page
}

impl Attention {
    /// The kernels, if there are any for this device.
    pub(super) fn load(gpu: &Arc<Gpu>) -> Result<Option<Self>> {
        const WIDE: &str = "attention_sm90";
        const WIDE_FP8: &str = "attention_fp8_sm90";
        const FEW: &str = "attention_few_sm90";
        const FEW_FP8: &str = "attention_few_fp8_sm90";
        if ![WIDE, WIDE_FP8, FEW, FEW_FP8].iter().all(|file| gpu.has(file)) {
            return Ok(None);
        }
        let few = |file, name, heads, threads, shared| -> Result<Few> {
            Ok(Few { heads, kernel: gpu.kernel(file, name, shared)?, threads, shared })
        };
        let bf16 = |name, heads| few(FEW, name, heads, 256, bf16_shared(heads));
        let fp8 = |name, heads, stages| few(FEW_FP8, name, heads, 128, fp8_shared(heads, stages));
        Ok(Some(Attention {
            wide: [
                gpu.kernel(WIDE, c"attention_bf16", WIDE_SHARED[0])?,
                gpu.kernel(WIDE_FP8, c"attention_fp8", WIDE_SHARED[1])?,
            ],
            few: [
                vec![
                    bf16(c"attention_few_8", 8)?,
                    bf16(c"attention_few_16", 16)?,
                    bf16(c"attention_few_32", 32)?,
                ],
                vec![
                    fp8(c"attention_few_fp8_8", 8, 1)?,
                    fp8(c"attention_few_fp8_16", 16, 1)?,
                    fp8(c"attention_few_fp8_20", 20, 2)?,
                    fp8(c"attention_few_fp8_32", 32, 1)?,
                ],
            ],
            combine: gpu.kernel(WIDE, c"attention_combine", 0)?,
            gpu: gpu.clone(),
        }))
    }

    /// Blocks that run at a time.
    fn blocks(&self, heads: usize) -> usize {
        self.gpu.sms * if heads <= FEW_HEADS { FEW_BLOCKS } else { 1 }
    }

    /// Bytes of workspace for these shapes or smaller ones. Parts of rows are no more than the blocks that run at a
    /// time, two of few heads or one of 64 on a multiprocessor.
    pub(super) fn workspace(&self, op: &SparseAttention<'_>) -> usize {
        let mut a = Addresses::measure();
        if takes(op) && op.topk > TOKENS {
            lay(&mut a, self.gpu.sms * (2 * op.heads).min(HEADS));
        }
        with_slack(a.used())
    }

    /// Attends, or answers false where the portable kernel must.
    pub(super) fn attend(
        &self,
        op: &SparseAttention<'_>,
        p: params::Attention,
        ws: Workspace<'_>,
        stream: Stream,
    ) -> Result<bool> {
        if !(takes(op) && aligned(&p)) {
            return Ok(false);
        }
        if op.rows == 0 {
            return Ok(true);
        }
        // Parts fill the device once, and have at least a tile each.
        let (tiles, head_tiles) = (op.topk.div_ceil(TOKENS), op.heads.div_ceil(HEADS));
        let wanted = self.blocks(op.heads) / op.rows.saturating_mul(head_tiles);
        let split_tiles = tiles.div_ceil(wanted.clamp(1, tiles));
        let splits = tiles.div_ceil(split_tiles);
        let mut parts = Parts { out: 0, lse: 0 };
        if splits > 1 {
            let vectors = op.rows * splits * op.heads;
            let mut a = Addresses::measure();
            lay(&mut a, vectors);
            parts = lay(&mut Addresses::over(ws.on(op.device, a.used())?), vectors);
        }
        let mut params = params::AttentionSm90 {
            a: p,
            part_out: parts.out,
            part_lse: parts.lse,
            splits: small(splits),
            split_tiles: small(split_tiles),
        };
        let fp8 = usize::from(p.kv_format == KV_FP8);
        let few = self.few[fp8].iter().find(|few| op.heads <= few.heads);
        let (kernel, threads, shared) = match few {
            Some(few) => (&few.kernel, few.threads, few.shared),
            None => (&self.wide[fp8], WIDE_THREADS, WIDE_SHARED[fp8]),
        };
        let grid = (op.rows.saturating_mul(splits * head_tiles), 1);
        let stream = stream.as_raw();
        let mut arguments = [(&raw mut params).cast()];
        let _entered = self.gpu.enter()?;
        // SAFETY: the kernels' struct; checked tensors and workspace on this device; indices are bounded on the device.
        // Both kernels wait for the one before them.
        unsafe {
            kernel.launch_with(grid, threads, shared, stream, &mut arguments, true)?;
            if splits > 1 {
                let grid = (op.rows, op.heads);
                self.combine.launch_with(grid, COMBINE_THREADS, 0, stream, &mut arguments, true)?;
            }
        }
        Ok(true)
    }
}
