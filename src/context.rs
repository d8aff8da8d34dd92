//! A backend and its device: what every operation runs on.

use crate::backend::cpu::Cpu;
use crate::error::{Error, Result, Status};
use crate::tensor::Device;

/// One backend with its resources. Shared by any number of caches and threads.
pub struct Context {
    backend: Backend,
}

/// The backends there are.
pub enum Backend {
    /// Host memory, host threads.
    Cpu(Cpu),
}

/// Which backend to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendChoice {
    /// The best one this build and machine have.
    Auto,
    /// Host.
    Cpu,
    /// CUDA device with this ordinal.
    Cuda(i32),
}

impl Context {
    /// Opens a backend. `threads` is for the CPU backend: 0 takes all cores. `on_thread_start` runs on each thread
    /// that the backend starts.
    pub fn new(
        choice: BackendChoice,
        threads: usize,
        on_thread_start: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        match choice {
            BackendChoice::Auto | BackendChoice::Cpu => {
                let cpu = Cpu::with_start_handler(threads, move |_| on_thread_start())?;
                Ok(Self { backend: Backend::Cpu(cpu) })
            }
            BackendChoice::Cuda(device) => Err(Error::new(
                Status::NoKernelImage,
                format!(
                    "backend: CUDA device {device} was asked for, but this library was built without CUDA kernels"
                ),
            )),
        }
    }

    /// The backend.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Where tensors must be.
    pub fn device(&self) -> Device {
        match self.backend {
            Backend::Cpu(_) => Device::Cpu,
        }
    }
}
