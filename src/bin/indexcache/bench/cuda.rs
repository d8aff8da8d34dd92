//! A GPU's memory, clock and ceilings, through the driver.

use super::Ceilings;
use super::device::median;
use crate::Failure;
use cudarc::driver::{DriverError, result, sys};
use indexcache::context::Stream;
use std::cell::RefCell;
use std::ffi::c_void;

/// What build.rs compiled, if it found a compiler.
mod images {
    /// Code, on an address that the driver likes.
    #[repr(C, align(64))]
    pub(super) struct Aligned<T: ?Sized>(pub T);

    /// One fat binary.
    pub(super) struct Image {
        /// The file in `kernels/`.
        pub name: &'static str,
        /// The only architecture it is for, as 90 for 9.0.
        pub arch: Option<u32>,
        /// The bytes.
        pub code: &'static Aligned<[u8]>,
    }

    include!(concat!(env!("OUT_DIR"), "/bench_images.rs"));
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Refused(format!("the CUDA driver answers {error:?}"))
    }
}

/// Graphs are replayed so often; the first time does not count.
const REPLAYS: usize = 8;
/// Bytes read for the memory's ceiling.
const READ: usize = 4 << 30;
/// Rounds of four products a warpgroup for the tensor cores' ceilings: some 10 ms.
const ROUNDS: i64 = 30_000;

/// A device whose primary context is current on this thread.
pub struct Gpu {
    sms: u32,
    capability: u32,
    stream: sys::CUstream,
    start: sys::CUevent,
    end: sys::CUevent,
}

impl Gpu {
    /// The library has a context open on this device, so there is a driver.
    pub fn open(ordinal: i32) -> Result<Self, DriverError> {
        use sys::CUdevice_attribute as Attribute;
        let device = result::device::get(ordinal)?;
        // SAFETY: the device is there; its context stays retained until the process ends.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device)?)? };
        // SAFETY: the device is there.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Gpu {
            sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.unsigned_abs(),
            capability: (10 * major + minor).unsigned_abs(),
            stream: result::stream::create(result::stream::StreamKind::NonBlocking)?,
            start: event()?,
            end: event()?,
        })
    }

    /// Seconds that the work takes that `submit` puts on the stream.
    fn elapsed<E: From<DriverError>>(&self, submit: impl Fn() -> Result<(), E>) -> Result<f64, E> {
        // SAFETY: events and stream of this context.
        unsafe {
            result::event::record(self.start, self.stream)?;
            submit()?;
            result::event::record(self.end, self.stream)?;
            result::event::synchronize(self.end)?;
            Ok(f64::from(result::event::elapsed(self.start, self.end)?) / 1e3)
        }
    }

    /// Median over replays of one graph that holds the calls: some 2 ms of them, or 200, and all sets.
    pub fn time(
        &self,
        sets: usize,
        call: impl Fn(usize, Stream) -> indexcache::error::Result<()>,
    ) -> Result<f64, Failure> {
        // SAFETY: it lives as long as the process.
        let stream = unsafe { Stream::from_raw(self.stream.cast()) };
        let one = || call(0, stream).map_err(Failure::from);
        self.elapsed(one)?;
        let calls = ((2e-3 / self.elapsed(one)?) as usize).clamp(1, 200).max(sets);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this context, which captures nothing yet.
        unsafe { result::stream::begin_capture(self.stream, mode)? };
        let captured = (0..calls).try_for_each(|i| call(i % sets, stream));
        // SAFETY: begun above. Ended whatever the calls answered.
        let graph = unsafe { result::stream::end_capture(self.stream) };
        captured?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: a whole graph, destroyed when the last replay is done.
        unsafe {
            let graph = graph?;
            let exec = result::graph::instantiate(graph, flags)?;
            let launch = || result::graph::launch(exec, self.stream).map_err(Failure::from);
            let times: Result<Vec<f64>, Failure> =
                (0..=REPLAYS).map(|_| self.elapsed(launch)).skip(1).collect();
            result::graph::exec_destroy(exec)?;
            result::graph::destroy(graph)?;
            Ok(median(times?) / calls as f64)
        }
    }

    /// The ceilings, as far as there are kernels to measure them with.
    pub fn ceilings(&self) -> Result<Ceilings, DriverError> {
        let mut ceilings = Ceilings::default();
        for image in images::IMAGES {
            if image.arch.is_some_and(|arch| arch != self.capability) {
                continue;
            }
            // SAFETY: a whole fat binary, aligned, that lives as long as the program.
            let module = unsafe { result::module::load_data(image.code.0.as_ptr().cast())? };
            if image.name == "peaks" {
                ceilings.read_gb_s = Some(self.read(module)?);
            } else {
                // Per SM two warpgroups, each with four products of 64 x 256 x (128 bytes) a round.
                let flop = |k: f64| 2.0 * 4.0 * 2.0 * 64.0 * 256.0 * k * ROUNDS as f64;
                let rate = |name, k| -> Result<f64, DriverError> {
                    Ok(flop(k) * f64::from(self.sms) / self.products(module, name)? / 1e12)
                };
                ceilings.fp8_tflop_s = Some(rate(c"peak_fp8", 32.0)?);
                ceilings.bf16_tflop_s = Some(rate(c"peak_bf16", 16.0)?);
            }
            // SAFETY: its kernels are done.
            unsafe { result::module::unload(module)? };
        }
        Ok(ceilings)
    }

    fn read(&self, module: sys::CUmodule) -> Result<f64, DriverError> {
        let memory = Memory::default();
        let (mut data, mut words) =
            (memory.filled(READ, &vec![0x5a; 1 << 20])?, (READ / 16) as i64);
        let mut out = memory.filled(4 * 8 * self.sms as usize, &[])?;
        let mut arguments: [*mut c_void; 3] =
            [(&raw mut data).cast(), (&raw mut words).cast(), (&raw mut out).cast()];
        // Four blocks fit an SM; twice that evens out.
        let seconds = self.launch(module, c"peak_read", (8 * self.sms, 512), &mut arguments)?;
        Ok(READ as f64 / seconds / 1e9)
    }

    fn products(&self, module: sys::CUmodule, name: &std::ffi::CStr) -> Result<f64, DriverError> {
        let memory = Memory::default();
        let (mut rounds, mut out) = (ROUNDS, memory.filled(4 * 256 * self.sms as usize, &[])?);
        let mut arguments: [*mut c_void; 2] = [(&raw mut rounds).cast(), (&raw mut out).cast()];
        self.launch(module, name, (self.sms, 256), &mut arguments)
    }

    /// Median seconds of a kernel.
    fn launch(
        &self,
        module: sys::CUmodule,
        name: &std::ffi::CStr,
        (grid, block): (u32, u32),
        arguments: &mut [*mut c_void],
    ) -> Result<f64, DriverError> {
        // SAFETY: a loaded module that has this kernel.
        let kernel = unsafe { result::module::get_function(module, name.into())? };
        let arguments = RefCell::new(arguments);
        let once = || {
            let arguments = &mut arguments.borrow_mut();
            // SAFETY: the kernel's own arguments, over memory that outlives the launch.
            unsafe {
                result::launch_kernel(
                    kernel,
                    (grid, 1, 1),
                    (block, 1, 1),
                    0,
                    self.stream,
                    arguments,
                )
            }
        };
        let times: Result<Vec<f64>, DriverError> =
            (0..=REPLAYS).map(|_| self.elapsed(once)).skip(1).collect();
        Ok(median(times?))
    }
}

/// Device memory, given back together.
#[derive(Default)]
pub struct Memory(RefCell<Vec<sys::CUdeviceptr>>);

impl Memory {
    /// So many bytes, filled with copies of `pattern`, or with anything if that is empty.
    pub fn filled(&self, bytes: usize, pattern: &[u8]) -> Result<*mut u8, DriverError> {
        // SAFETY: a context is current; freed in `drop`.
        let start = unsafe { result::malloc_sync(bytes.max(1))? };
        self.0.borrow_mut().push(start);
        let mut have = pattern.len().min(bytes);
        // SAFETY: parts of the memory just allocated, which do not overlap.
        unsafe {
            result::memcpy_htod_sync(start, &pattern[..have])?;
            while have > 0 && have < bytes {
                let part = have.min(bytes - have); // As often as it fits, then again.
                result::memcpy_dtod_sync(start + have as u64, start, part)?;
                have += part;
            }
        }
        result::ctx::synchronize()?;
        Ok(std::ptr::without_provenance_mut(start as usize))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for start in self.0.take() {
            // SAFETY: allocated by `filled`. An error here has nobody to go to.
            let _ = unsafe { result::free_sync(start) };
        }
    }
}
