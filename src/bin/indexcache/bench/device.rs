//! Where a benchmark runs: its memory, and how calls are timed there.

use super::Ceilings;
use super::cuda::{self, Gpu};
use crate::Failure;
use indexcache::context::{Backend, Context, Stream};
use indexcache::error::Result;
use indexcache::layout::Workspace;
use indexcache::tensor::{self, Element, Tensor, dense_strides};
use std::cell::RefCell;
use std::time::Instant;

/// Caches hold less than this; inputs that take turns are more, together.
const PAST_CACHES: usize = 128 << 20;

/// A context with what timing needs.
pub struct Device {
    pub context: Context,
    gpu: Option<Gpu>,
}

impl Device {
    pub fn new(context: Context) -> std::result::Result<Self, Failure> {
        let gpu = match context.backend() {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => Some(Gpu::open(cuda.ordinal())?),
        };
        Ok(Device { context, gpu })
    }

    pub fn name(&self) -> String {
        match self.context.backend() {
            Backend::Cpu(cpu) => format!("CPU, {} threads", cpu.threads()),
            Backend::Cuda(cuda) => cuda.name(),
        }
    }

    /// Whether there is a GPU to keep busy.
    pub fn is_gpu(&self) -> bool {
        self.gpu.is_some()
    }

    pub fn ceilings(&self) -> std::result::Result<Ceilings, Failure> {
        self.gpu.as_ref().map_or(Ok(Ceilings::default()), |gpu| Ok(gpu.ceilings()?))
    }

    /// How many inputs of so many bytes have to take turns; at most `most`.
    pub fn sets(&self, bytes: usize, most: usize) -> usize {
        PAST_CACHES.div_ceil(bytes.max(1)).clamp(1, most)
    }

    /// Median seconds of `call`, which takes the number of an input set and is made for each in turn.
    pub fn time(
        &self,
        sets: usize,
        call: impl Fn(usize, Stream) -> Result<()>,
    ) -> std::result::Result<f64, Failure> {
        match &self.gpu {
            Some(gpu) => gpu.time(sets, call),
            None => {
                call(0, Stream::DEFAULT)?;
                let (start, mut times) = (Instant::now(), vec![]);
                while times.len() < 5 || start.elapsed().as_secs_f64() < 0.2 {
                    let t = Instant::now();
                    call(times.len() % sets, Stream::DEFAULT)?;
                    times.push(t.elapsed().as_secs_f64());
                }
                Ok(median(times))
            }
        }
    }
}

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Memory of a device, given back together.
pub struct Memory<'a> {
    device: &'a Device,
    host: RefCell<Vec<Vec<u64>>>,
    cuda: cuda::Memory,
}

impl<'a> Memory<'a> {
    pub fn new(device: &'a Device) -> Self {
        Memory { device, host: RefCell::default(), cuda: cuda::Memory::default() }
    }

    /// So many bytes, filled with copies of `pattern`, or with anything if that is empty.
    fn bytes(&self, bytes: usize, pattern: &[u8]) -> std::result::Result<*mut u8, Failure> {
        if self.device.is_gpu() {
            return Ok(self.cuda.filled(bytes, pattern)?);
        }
        let mut memory = vec![0u64; bytes.div_ceil(8)];
        let start: *mut u8 = memory.as_mut_ptr().cast();
        // SAFETY: the vector's own bytes, which nobody else knows of yet.
        let whole = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
        if !pattern.is_empty() {
            for part in whole.chunks_mut(pattern.len()) {
                part.copy_from_slice(&pattern[..part.len()]);
            }
        }
        self.host.borrow_mut().push(memory); // The bytes stay where they are.
        Ok(start)
    }

    /// A dense tensor of copies of `pattern`.
    pub fn tensor<T: Element>(
        &self,
        name: &'static str,
        shape: &[usize],
        pattern: &[T],
    ) -> std::result::Result<Tensor<'_>, Failure> {
        // SAFETY: elements are plain numbers without padding.
        let pattern = unsafe {
            std::slice::from_raw_parts(pattern.as_ptr().cast::<u8>(), size_of_val(pattern))
        };
        let data = self.bytes(shape.iter().product::<usize>() * size_of::<T>(), pattern)?;
        let strides = &dense_strides(shape)[..shape.len()];
        let device: tensor::Device = self.device.context.device();
        // SAFETY: dense memory of that device and size, which lives as long as `self`.
        Ok(unsafe { Tensor::from_raw_parts(name, data, device, T::DTYPE, shape, strides)? })
    }

    /// Scratch of so many bytes, for calls that run one after the other.
    pub fn scratch(&self, bytes: usize) -> std::result::Result<Scratch<'_>, Failure> {
        let device = self.device.context.device();
        Ok(Scratch {
            device,
            data: self.bytes(bytes, &[])?,
            bytes,
            _memory: std::marker::PhantomData,
        })
    }
}

/// A workspace to lend again and again.
pub struct Scratch<'a> {
    device: tensor::Device,
    data: *mut u8,
    bytes: usize,
    _memory: std::marker::PhantomData<&'a ()>,
}

impl Scratch<'_> {
    pub fn lend(&self) -> Workspace<'_> {
        // SAFETY: memory that lives as long as `self`; calls run in the order of one stream, or of one thread.
        unsafe { Workspace::from_raw_parts(self.device, self.data, self.bytes) }
    }
}
