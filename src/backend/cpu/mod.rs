//! The CPU backend: a thread pool of its own, and code for the best instruction set the machine has.
//!
//! Results have the same bits on every instruction set, with every number of threads.

mod attention;
mod distill;
mod indexer;
mod quant;
#[doc(hidden)]
pub mod reference;
mod select;
mod simd;
mod tile;

use super::check;
use crate::error::{Error, Result, Status};
use crate::ops::*;
use crate::tensor::{View, ViewMut};
use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Instruction sets with code of their own. All give the same bits.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler makes of plain Rust.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VBMI and BF16.
    Avx512,
}

impl Isa {
    /// Name for people.
    pub const fn name(self) -> &'static CStr {
        match self {
            Isa::Scalar => c"scalar",
            Isa::Avx2 => c"avx2",
            Isa::Avx512 => c"avx512",
        }
    }

    /// The best one here.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512bf16");
            match (avx2, avx512) {
                (true, true) => return Isa::Avx512,
                (true, false) => return Isa::Avx2,
                _ => {}
            }
        }
        Isa::Scalar
    }
}

/// The CPU backend.
#[derive(Debug)]
pub struct Cpu {
    pool: rayon::ThreadPool,
    isa: Isa,
}

impl Cpu {
    /// A backend with its own pool of `threads` threads, 0 for one per available core.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_start_handler(threads, |_| ())
    }

    /// The same; `start` runs first on each new thread, with its number.
    pub fn with_start_handler(
        threads: usize,
        start: impl Fn(usize) + Send + Sync + 'static,
    ) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("indexcache-{i}"))
            .start_handler(start)
            .build()
            .map_err(|e| {
                Error::new(Status::OutOfMemory, format!("threads: cannot start {threads}: {e}"))
            })?;
        Ok(Cpu { pool, isa: Isa::detect() })
    }

    /// For tests: a lesser instruction set than the machine's.
    #[doc(hidden)]
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        if isa > Isa::detect() {
            return Err(Error::new(Status::Unsupported, format!("isa: {isa:?} is not here")));
        }
        Ok(Cpu { isa, ..Self::new(threads)? })
    }

    /// The instruction set in use.
    #[doc(hidden)]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in the pool.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work(task, scratch)` for each task once. Every worker has `bytes` of `scratch` to itself; workers take
    /// tasks in ascending order. One worker runs on the calling thread.
    fn run_with(
        &self,
        tasks: usize,
        scratch: &mut [u8],
        bytes: usize,
        work: impl Fn(usize, &mut [u8]) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let worker = |scratch: &mut [u8]| {
            let _env = FloatEnv::default();
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(task, scratch);
            }
        };
        fn split(n: usize, scratch: &mut [u8], bytes: usize, worker: &(impl Fn(&mut [u8]) + Sync)) {
            if n == 1 {
                return worker(&mut scratch[..bytes]);
            }
            let (a, b) = scratch.split_at_mut(n / 2 * bytes);
            rayon::join(|| split(n / 2, a, bytes, worker), || split(n - n / 2, b, bytes, worker));
        }
        match self.threads().min(tasks) {
            0 => {}
            1 => worker(&mut scratch[..bytes]),
            n => self.pool.install(|| split(n, scratch, bytes, &worker)),
        }
    }

    /// [`Cpu::run_with`] without scratch.
    fn run(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        self.run_with(tasks, &mut [], 0, |task, _| work(task));
    }

    /// Quantises new indexer keys into their pages.
    pub fn index_k_write(&self, op: &IndexKWrite<'_>) -> Result<()> {
        check::device(op.device)?;
        check::slots(&op.slots, op.pages.shape()[0].saturating_mul(PAGE))?;
        quant::index_k_write(self, op);
        Ok(())
    }

    /// Quantises indexer queries.
    pub fn index_q_quantize(&self, op: &IndexQQuantize<'_>) -> Result<()> {
        check::device(op.device)?;
        quant::index_q_quantize(self, op);
        Ok(())
    }

    /// Scores, all of them.
    pub fn indexer_logits(&self, op: &IndexerLogits<'_>) -> Result<()> {
        check::device(op.indexer.device)?;
        let longest = check::keys(&op.indexer.map, op.indexer.rows)?;
        check::columns(op, longest)?;
        indexer::indexer_logits(self, op, longest);
        Ok(())
    }

    /// Scores and selects. `workspace` holds [`Select::workspace`] bytes.
    pub fn select(&self, op: &Select<'_>, workspace: &mut [u8]) -> Result<()> {
        check::device(op.indexer.device)?;
        check::keys(&op.indexer.map, op.indexer.rows)?;
        select::select(self, op, workspace)
    }

    /// Top-k of given scores.
    pub fn topk(&self, op: &TopK<'_>) -> Result<()> {
        check::device(op.device)?;
        check::bounds(op)?;
        select::topk(self, op);
        Ok(())
    }

    /// Logical indices to slots.
    pub fn indices_to_slots(&self, op: &IndicesToSlots<'_>) -> Result<()> {
        check::device(op.device)?;
        check::translation(op)?;
        quant::indices_to_slots(self, op);
        Ok(())
    }

    /// Copies index rows; the two have one shape and share no memory.
    pub fn copy_rows(&self, from: &View<'_, i32, 2>, to: &ViewMut<'_, i32, 2>) -> Result<()> {
        for r in 0..from.shape()[0] {
            // SAFETY: each row once, and the memory is apart from `from`'s.
            unsafe { to.row(&[r]) }.copy_from_slice(from.row(&[r]));
        }
        Ok(())
    }

    /// Moves index rows in place: row `i` takes row `from[i]` of the first `old_rows`, or -1.
    pub fn carry_rows(
        &self,
        data: &ViewMut<'_, i32, 2>,
        from: &View<'_, i32, 1>,
        old_rows: usize,
    ) -> Result<()> {
        check::row_map(from.row(&[]), old_rows)?;
        for (i, &old) in from.row(&[]).iter().enumerate() {
            match usize::try_from(old) {
                Ok(old) if old == i => {}
                // SAFETY: two rows, one pair at a time; an ascending map reads each old row before it is overwritten.
                Ok(old) => unsafe { data.row(&[i]).copy_from_slice(data.row(&[old])) },
                // SAFETY: the only reference.
                Err(_) => unsafe { data.row(&[i]) }.fill(-1),
            }
        }
        Ok(())
    }

    /// Writes KV rows to their pages.
    pub fn kv_write(&self, op: &KvWrite<'_>) -> Result<()> {
        check::device(op.device)?;
        check::slots(&op.slots, op.page_shape[0].saturating_mul(op.page_shape[1]))?;
        quant::kv_write(self, op);
        Ok(())
    }

    /// Sparse MLA attention. `workspace` holds [`SparseAttention::workspace`] bytes.
    pub fn sparse_attention(&self, op: &SparseAttention<'_>, workspace: &mut [u8]) -> Result<()> {
        check::device(op.device)?;
        check::attention(op)?;
        attention::sparse_attention(self, op, workspace)
    }

    /// A distillation loss and its gradients. `workspace` holds [`Distill::workspace`] bytes.
    pub fn distill(&self, op: &Distill<'_>, workspace: &mut [u8]) -> Result<()> {
        check::device(op.device)?;
        check::distill(op)?;
        distill::distill(self, op, workspace)
    }

    /// How much of one selection another covers.
    pub fn overlap(&self, op: &Overlap<'_>) -> Result<()> {
        check::device(op.device)?;
        // SAFETY: the only row, and `out` shares no memory with the inputs.
        let out = unsafe { op.out.row(&[]) };
        for (t, out) in out.iter_mut().enumerate() {
            *out = crate::audit::overlap(op.own.row(&[t]), op.reused.row(&[t]));
        }
        Ok(())
    }
}

/// A slice that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Parts<T>(*mut T, usize);
// SAFETY: only `part` reaches the memory, and its caller keeps parts disjoint.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    fn of(slice: &mut [T]) -> Self {
        Parts(slice.as_mut_ptr(), slice.len())
    }
    /// # Safety
    /// No other live reference to these elements, and the slice is still borrowed.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.1);
        // SAFETY: in bounds; alone by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// Floating-point control as Rust assumes it, for as long as this lives: hosts may have set flush-to-zero, which
/// new threads inherit and which would change bits.
struct FloatEnv {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

#[cfg(target_arch = "x86_64")]
impl FloatEnv {
    fn swap(new: u32) -> u32 {
        let mut old = 0u32;
        // SAFETY: stores and loads the SSE control word; both are plain user-mode instructions on valid addresses.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut old, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const new, options(nostack, readonly));
        }
        old
    }
}

impl Default for FloatEnv {
    fn default() -> Self {
        FloatEnv {
            #[cfg(target_arch = "x86_64")]
            before: Self::swap(0x1f80),
        }
    }
}

impl Drop for FloatEnv {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        Self::swap(self.before);
    }
}
