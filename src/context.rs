//! A backend and its device: what every operation runs on, and the one place that sends operations to backends.

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda};
use crate::error::{Error, Result, Status};
use crate::layout::Workspace;
use crate::ops::*;
use crate::tensor::{Device, View, ViewMut};
use std::ffi::c_void;

/// One backend with its resources. Shared by any number of caches and threads.
#[derive(Debug)]
pub struct Context {
    backend: Backend,
    passed_over: Option<Error>,
}

/// The backends there are.
#[derive(Debug)]
pub enum Backend {
    /// Host memory, host threads.
    Cpu(Cpu),
    /// A CUDA device.
    Cuda(Box<Cuda>),
}

/// Which backend to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendChoice {
    /// CUDA device with this ordinal if it can be used, else the host.
    Auto(i32),
    /// Host.
    Cpu,
    /// CUDA device with this ordinal.
    Cuda(i32),
}

/// The host's stream that device work is put on; the CPU backend does not look at it.
#[derive(Clone, Copy, Debug)]
pub struct Stream(*mut c_void);

impl Stream {
    /// The default stream, and any stream for the CPU.
    pub const DEFAULT: Stream = Stream(std::ptr::null_mut());

    /// A stream of the host's.
    ///
    /// # Safety
    /// NULL, or a stream of the context's device that lives as long as calls use it. The CPU backend takes anything.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Stream(stream)
    }

    /// The handle.
    pub fn as_raw(self) -> *mut c_void {
        self.0
    }
}

/// Index memory of the library's own, on a context's device: int32, at first -1.
#[derive(Debug)]
pub enum Memory {
    /// Host.
    Host(Vec<i32>),
    /// CUDA device.
    Cuda(cuda::Memory),
}

impl Memory {
    /// First element.
    pub fn as_mut_ptr(&mut self) -> *mut i32 {
        match self {
            Memory::Host(v) => v.as_mut_ptr(),
            Memory::Cuda(m) => m.as_mut_ptr(),
        }
    }
}

impl Context {
    /// Opens a backend. `threads` is for the CPU backend: 0 takes all cores. `on_thread_start` runs on each thread
    /// that the backend starts.
    pub fn new(
        choice: BackendChoice,
        threads: usize,
        on_thread_start: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        let cuda = |device| Ok(Backend::Cuda(Box::new(Cuda::new(device)?)));
        let cpu = || Cpu::with_start_handler(threads, move |_| on_thread_start()).map(Backend::Cpu);
        let (backend, passed_over) = match choice {
            BackendChoice::Cuda(device) => (cuda(device)?, None),
            BackendChoice::Cpu => (cpu()?, None),
            BackendChoice::Auto(device) => match cuda(device) {
                Ok(backend) => (backend, None),
                Err(why) => (cpu()?, Some(why)),
            },
        };
        Ok(Context { backend, passed_over })
    }

    /// The same in checked mode: CUDA calls refuse indices that are out of range, as CPU calls do anyway.
    pub fn checked(mut self) -> Self {
        if let Backend::Cuda(cuda) = &mut self.backend {
            cuda.check_indices();
        }
        self
    }

    /// The backend.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Why [`BackendChoice::Auto`] did not take CUDA.
    pub fn passed_over(&self) -> Option<&Error> {
        self.passed_over.as_ref()
    }

    /// Where tensors must be.
    pub fn device(&self) -> Device {
        match &self.backend {
            Backend::Cpu(_) => Device::Cpu,
            Backend::Cuda(cuda) => Device::Cuda(cuda.ordinal()),
        }
    }

    /// Memory for `elements` indices.
    pub fn allocate(&self, elements: usize) -> Result<Memory> {
        match &self.backend {
            Backend::Cpu(_) => {
                let mut memory = Vec::new();
                memory.try_reserve_exact(elements).map_err(|_| {
                    let bytes = elements.saturating_mul(size_of::<i32>());
                    Error::new(
                        Status::OutOfMemory,
                        format!("max_rows: no memory for {bytes} bytes of indices"),
                    )
                })?;
                memory.resize(elements, -1);
                Ok(Memory::Host(memory))
            }
            Backend::Cuda(cuda) => cuda.allocate(elements).map(Memory::Cuda),
        }
    }

    /// Quantises new indexer keys into their pages.
    pub fn index_k_write(&self, op: &IndexKWrite<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.index_k_write(op),
            Backend::Cuda(cuda) => cuda.index_k_write(op, stream),
        }
    }

    /// Quantises indexer queries.
    pub fn index_q_quantize(&self, op: &IndexQQuantize<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.index_q_quantize(op),
            Backend::Cuda(cuda) => cuda.index_q_quantize(op, stream),
        }
    }

    /// Scores, all of them.
    pub fn indexer_logits(&self, op: &IndexerLogits<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.indexer_logits(op),
            Backend::Cuda(cuda) => cuda.indexer_logits(op, stream),
        }
    }

    /// Bytes of workspace that [`Context::select`] needs for these shapes or smaller ones.
    pub fn select_workspace(&self, op: &Select<'_>) -> usize {
        match &self.backend {
            Backend::Cpu(cpu) => op.workspace(cpu.threads()),
            Backend::Cuda(cuda) => cuda.select_workspace(op),
        }
    }

    /// Scores and selects.
    pub fn select(&self, op: &Select<'_>, workspace: Workspace<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.select(op, workspace.host()?),
            Backend::Cuda(cuda) => cuda.select(op, workspace, stream),
        }
    }

    /// Bytes of workspace that [`Context::topk`] needs: no backend needs any so far.
    pub fn topk_workspace(&self, _op: &TopK<'_>) -> usize {
        0
    }

    /// Top-k of given scores.
    pub fn topk(&self, op: &TopK<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.topk(op),
            Backend::Cuda(cuda) => cuda.topk(op, stream),
        }
    }

    /// Logical indices to slots.
    pub fn indices_to_slots(&self, op: &IndicesToSlots<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.indices_to_slots(op),
            Backend::Cuda(cuda) => cuda.indices_to_slots(op, stream),
        }
    }

    /// Copies index rows; the two have one shape and share no memory.
    pub fn copy_rows(
        &self,
        from: &View<'_, i32, 2>,
        to: &ViewMut<'_, i32, 2>,
        stream: Stream,
    ) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.copy_rows(from, to),
            Backend::Cuda(cuda) => cuda.copy_rows(from, to, stream),
        }
    }

    /// Moves index rows in place: row `i` takes row `from[i]` of the first `old_rows`, or -1. `from` ascends strictly,
    /// then is -1; `data` has at least `old_rows` rows, and as many as `from` is long.
    pub fn carry_rows(
        &self,
        data: &ViewMut<'_, i32, 2>,
        from: &View<'_, i32, 1>,
        old_rows: usize,
        stream: Stream,
    ) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.carry_rows(data, from, old_rows),
            Backend::Cuda(cuda) => cuda.carry_rows(data, from, old_rows, stream),
        }
    }

    /// How much of one selection another covers.
    pub fn overlap(&self, op: &Overlap<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.overlap(op),
            Backend::Cuda(cuda) => cuda.overlap(op, stream),
        }
    }

    /// Writes KV rows to their pages.
    pub fn kv_write(&self, op: &KvWrite<'_>, stream: Stream) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.kv_write(op),
            Backend::Cuda(cuda) => cuda.kv_write(op, stream),
        }
    }

    /// Bytes of workspace that [`Context::sparse_attention`] needs for these shapes or smaller ones.
    pub fn sparse_attention_workspace(&self, op: &SparseAttention<'_>) -> usize {
        match &self.backend {
            Backend::Cpu(cpu) => op.workspace(cpu.threads()),
            Backend::Cuda(cuda) => cuda.sparse_attention_workspace(op),
        }
    }

    /// Sparse MLA attention.
    pub fn sparse_attention(
        &self,
        op: &SparseAttention<'_>,
        workspace: Workspace<'_>,
        stream: Stream,
    ) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.sparse_attention(op, workspace.host()?),
            Backend::Cuda(cuda) => cuda.sparse_attention(op, workspace, stream),
        }
    }

    /// Bytes of workspace that [`Context::distill`] needs for these shapes or smaller ones.
    pub fn distill_workspace(&self, op: &Distill<'_>) -> Result<usize> {
        match &self.backend {
            Backend::Cpu(cpu) => Ok(op.workspace(cpu.threads())),
            Backend::Cuda(cuda) => Ok(cuda.distill_workspace(op)),
        }
    }

    /// A distillation loss and its gradients.
    pub fn distill(
        &self,
        op: &Distill<'_>,
        workspace: Workspace<'_>,
        stream: Stream,
    ) -> Result<()> {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.distill(op, workspace.host()?),
            Backend::Cuda(cuda) => cuda.distill(op, workspace, stream),
        }
    }
}
