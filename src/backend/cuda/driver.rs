//! The CUDA driver: a device, a context on it, the kernels loaded into it.
//!
//! Only the driver API, through a libcuda that is looked for at run time: without one there is an error, no panic.

use super::images::{IMAGES, Image};
use crate::error::{Error, Result, Status};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};
use std::ffi::{CStr, c_void};
use std::sync::OnceLock;

/// Oldest driver that has all the functions used, as CUDA counts.
const DRIVER: i32 = 12000;
/// Oldest driver that can capture a launch which does not wait for the end of the one before.
const EARLY_DRIVER: i32 = 12030;

/// A status for a driver's answer.
fn check(what: &str, result: CUresult) -> Result<()> {
    let status = match result {
        CUresult::CUDA_SUCCESS => return Ok(()),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Status::OutOfMemory,
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_INVALID_PTX
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Status::NoKernelImage,
        CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_INVALID_DEVICE => Status::NoDevice,
        _ => Status::Driver,
    };
    let mut name = std::ptr::null();
    // SAFETY: writes a pointer to a static string, or NULL for a number it does not know.
    unsafe { sys::cuGetErrorName(result, &raw mut name) };
    let name = if name.is_null() {
        format!("error {}", result as u32)
    } else {
        // SAFETY: the driver's static string.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    };
    Err(Error::new(status, format!("{what}: the CUDA driver answers {name}")))
}

/// The driver, once for the process: which CUDA it serves.
fn initialise() -> Result<i32> {
    static DONE: OnceLock<Result<i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let no_device = |text: String| Error::new(Status::NoDevice, text);
        // SAFETY: opens a library by name; libcuda's initialisers are the driver's own business.
        if !unsafe { sys::is_culib_present() } {
            return Err(no_device("there is no CUDA driver (libcuda.so.1) on this machine".into()));
        }
        // SAFETY: takes no pointers.
        check("cuInit", unsafe { sys::cuInit(0) }).map_err(|e| no_device(e.message))?;
        let mut version = 0;
        // SAFETY: writes one integer.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
        if version < DRIVER {
            let cuda = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            let (has, needs) = (cuda(version), cuda(DRIVER));
            return Err(no_device(format!("the driver serves CUDA {has}; {needs} is needed")));
        }
        Ok(version)
    });
    done.clone()
}

/// A context on one device, with the library's kernels in it.
#[derive(Debug)]
pub(super) struct Gpu {
    ordinal: i32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// The context is the device's primary one, which this keeps alive.
    primary: bool,
    /// By the file in `kernels/`.
    modules: Vec<(&'static str, sys::CUmodule)>,
    /// Multiprocessors.
    pub sms: usize,
    /// Compute capability, as 90 for 9.0.
    pub capability: u32,
    /// Kernels may start before the one in front of them has ended.
    early: bool,
}

// SAFETY: CUDA contexts and modules may be used from any thread; each call makes the context current first.
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing is changed after `open`.
unsafe impl Sync for Gpu {}

/// Keeps a context current on this thread for as long as it lives.
pub(super) struct Entered {
    pushed: bool,
    /// Stays on its thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = std::ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this thread.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
        }
    }
}

impl Gpu {
    /// Uses the calling thread's context if it is on this device, else the device's primary one. Loads all kernels.
    pub(super) fn open(ordinal: i32) -> Result<Self> {
        if IMAGES.is_empty() {
            return Err(Error::new(
                Status::NoKernelImage,
                format!(
                    "backend: CUDA device {ordinal} was asked for, but this library was built without CUDA kernels: \
                     set CUDA_HOME, put nvcc on PATH or install the Python package nvidia-cuda-nvcc, and build it \
                     again with INDEXCACHE_CUDA=require"
                ),
            ));
        }
        let version = initialise().map_err(|e| {
            let text = format!("backend: CUDA device {ordinal} was asked for, but {}", e.message);
            Error::new(e.status, text)
        })?;
        let early = version >= EARLY_DRIVER;
        let mut count = 0;
        // SAFETY: writes one integer.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
        if !(0..count).contains(&ordinal) {
            return Err(Error::new(
                Status::NoDevice,
                format!("backend: CUDA device {ordinal} was asked for, but there are {count}"),
            ));
        }
        let mut device = 0;
        // SAFETY: writes one handle.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: writes one integer; the device is there.
            let r = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
            check("cuDeviceGetAttribute", r).map(|()| value.unsigned_abs())
        };
        let (major, minor) = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if major < 8 {
            return Err(Error::new(
                Status::NoKernelImage,
                format!(
                    "backend: CUDA device {ordinal} has compute capability {major}.{minor}; the kernels need 8.0"
                ),
            ));
        }
        let sms = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let (context, primary) = choose_context(device)?;
        let capability = 10 * major + minor;
        // From here on, dropping it gives back what it holds.
        let mut gpu =
            Gpu { ordinal, device, context, primary, modules: vec![], sms, capability, early };
        let entered = gpu.enter()?;
        for image in IMAGES {
            // Code for one architecture stays out of others.
            if image.arch.is_none_or(|arch| arch == capability) {
                gpu.modules.push((image.name, load(image)?));
            }
        }
        drop(entered);
        Ok(gpu)
    }

    /// Ordinal of the device.
    pub(super) fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// Makes the context current on this thread until the guard is dropped.
    pub(super) fn enter(&self) -> Result<Entered> {
        let mut current = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut current) })?;
        let pushed = current != self.context;
        if pushed {
            // SAFETY: the context lives as long as this, or as long as its owner promised.
            check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        }
        Ok(Entered { pushed, _thread: std::marker::PhantomData })
    }

    /// Whether this library has kernels of a file for the device.
    pub(super) fn has(&self, file: &str) -> bool {
        self.modules.iter().any(|(of, _)| *of == file)
    }

    /// A kernel of one file. `shared`: most dynamic shared memory that it will be launched with.
    pub(super) fn kernel(&self, file: &str, name: &'static CStr, shared: u32) -> Result<Kernel> {
        let _entered = self.enter()?;
        let module = self.modules.iter().find(|(of, _)| *of == file).map(|(_, module)| *module);
        let module = module.ok_or_else(|| {
            let text = format!("backend: this library has no kernels of {file} for the device");
            Error::new(Status::NoKernelImage, text)
        })?;
        let mut function = std::ptr::null_mut();
        // SAFETY: a loaded module, a C string; writes one handle.
        let r = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        check(&name.to_string_lossy(), r)?;
        let mut registers = 0;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: writes one integer. Asking makes the driver load the code now, and not at the first launch.
        let r = unsafe { sys::cuFuncGetAttribute(&raw mut registers, attribute, function) };
        check("cuFuncGetAttribute", r)?;
        if shared > 0 {
            // With what the kernel declares itself it may be more than a block gets unasked.
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of ours.
            let r = unsafe { sys::cuFuncSetAttribute(function, attribute, shared.cast_signed()) };
            check("cuFuncSetAttribute", r)?;
        }
        Ok(Kernel { function, name, early: self.early })
    }

    /// Has the kernel run with as much shared memory on its multiprocessor as there is, so that blocks of another kernel
    /// find room beside its own.
    pub(super) fn prefer_shared(&self, kernel: &Kernel) -> Result<()> {
        let _entered = self.enter()?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: a function of ours; percent.
        let r = unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, 100) };
        check("cuFuncSetAttribute", r)
    }

    /// A kernel compiled for clusters of `blocks`, and how many clusters the device holds at once; maybe none.
    pub(super) fn cluster_kernel(
        &self,
        file: &str,
        name: &'static CStr,
        blocks: u32,
        block: u32,
        shared: u32,
    ) -> Result<(Kernel, usize)> {
        let kernel = self.kernel(file, name, shared)?;
        let _entered = self.enter()?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        // SAFETY: a function of ours.
        let r = unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, 1) };
        check("cuFuncSetAttribute", r)?;
        let config = sys::CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: std::ptr::null_mut(),
            attrs: std::ptr::null_mut(),
            numAttrs: 0,
        };
        let mut clusters = 0;
        // SAFETY: writes one integer; a function of ours, no attributes.
        let r = unsafe {
            sys::cuOccupancyMaxActiveClusters(&raw mut clusters, kernel.function, &raw const config)
        };
        let fits = r == CUresult::CUDA_SUCCESS;
        Ok((kernel, if fits { clusters.unsigned_abs() as usize } else { 0 }))
    }

    /// Waits for what is on a stream.
    pub(super) fn wait(&self, stream: *mut c_void) -> Result<()> {
        let _entered = self.enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: writes one number; the caller's stream.
        let r = unsafe { sys::cuStreamIsCapturing(stream.cast(), &raw mut status) };
        check("cuStreamIsCapturing", r)?;
        if status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Err(Error::new(
                Status::Unsupported,
                "stream: checked mode waits for it, which a stream that captures a graph cannot: open the context \
                 without IDXC_CHECKED",
            ));
        }
        // SAFETY: the caller's stream.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.cast()) })
    }

    /// Copies device memory to the host.
    ///
    /// # Safety
    /// Both must be good for so many bytes.
    pub(super) unsafe fn read(&self, address: u64, to: *mut u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: by this function's contract.
        check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(to.cast(), address, bytes) })
    }

    /// Device memory, every byte 0xff.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let _entered = self.enter()?;
        let mut address = 0;
        // SAFETY: writes one address.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) })?;
        // SAFETY: memory just allocated.
        let filled = match unsafe { sys::cuMemsetD8_v2(address, 0xff, bytes) } {
            // Streams that do not wait for the default one may use it next.
            // SAFETY: takes no pointers but the default stream.
            CUresult::CUDA_SUCCESS => check("cuStreamSynchronize", unsafe {
                sys::cuStreamSynchronize(std::ptr::null_mut())
            }),
            e => check("cuMemsetD8", e),
        };
        if let Err(e) = filled {
            self.free(address);
            return Err(e);
        }
        Ok(address)
    }

    /// Gives memory of [`Gpu::allocate`] back.
    pub(super) fn free(&self, address: u64) {
        if let Ok(_entered) = self.enter() {
            // SAFETY: allocated by `allocate`, freed once. An error here has nobody to go to.
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }

    /// What the driver calls the device.
    pub(super) fn name(&self) -> String {
        let mut name = [0u8; 128];
        let size = i32::try_from(name.len()).unwrap_or(0);
        // SAFETY: writes at most `size` bytes, a NUL at their end.
        let r = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), size, self.device) };
        match (r, CStr::from_bytes_until_nul(&name)) {
            (CUresult::CUDA_SUCCESS, Ok(name)) => name.to_string_lossy().into_owned(),
            _ => "unknown".into(),
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // At process exit the driver may be gone already; then every call fails and there is nothing to free.
        if let Ok(_entered) = self.enter() {
            for &(_, module) in &self.modules {
                // SAFETY: loaded by `open`, unloaded once.
                let _ = unsafe { sys::cuModuleUnload(module) };
            }
        }
        if self.primary {
            // SAFETY: retained by `choose_context`.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

/// The calling thread's context if it is on this device, else the primary one; and whether that was retained.
fn choose_context(device: sys::CUdevice) -> Result<(sys::CUcontext, bool)> {
    let (mut current, mut on) = (std::ptr::null_mut(), -1);
    // SAFETY: writes one handle.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut current) })?;
    if !current.is_null() {
        // SAFETY: writes one integer; there is a current context.
        check("cuCtxGetDevice", unsafe { sys::cuCtxGetDevice(&raw mut on) })?;
    }
    let (mut flags, mut active) = (0, 0);
    // SAFETY: writes two integers.
    let r = unsafe { sys::cuDevicePrimaryCtxGetState(device, &raw mut flags, &raw mut active) };
    check("cuDevicePrimaryCtxGetState", r)?;
    let callers = on == device;
    if callers && active == 0 {
        return Ok((current, false)); // One of the caller's own making; he keeps it alive.
    }
    let mut primary = std::ptr::null_mut();
    // SAFETY: writes one handle.
    let r = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut primary, device) };
    check("cuDevicePrimaryCtxRetain", r)?;
    if callers && current != primary {
        // SAFETY: retained just above.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(device) };
        return Ok((current, false));
    }
    Ok((primary, true))
}

fn load(image: &Image) -> Result<sys::CUmodule> {
    let mut module = std::ptr::null_mut();
    let code: *const c_void = image.code.0.as_ptr().cast();
    // SAFETY: a whole fat binary, aligned, that lives as long as the program.
    let r = unsafe { sys::cuModuleLoadData(&raw mut module, code) };
    check(&format!("backend: kernels of {}", image.name), r).map(|()| module)
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    function: sys::CUfunction,
    name: &'static CStr,
    early: bool,
}

// SAFETY: a handle of the driver's, which any thread may use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Launches over `grid` blocks with one parameter struct. The context must be current.
    ///
    /// # Safety
    /// `params` must be the kernel's own struct, and what it points to good for what the kernel does.
    pub(super) unsafe fn launch<P: Copy>(
        &self,
        grid: (usize, usize),
        block: u32,
        shared: u32,
        stream: *mut c_void,
        mut params: P,
    ) -> Result<()> {
        let mut arguments = [(&raw mut params).cast()];
        // SAFETY: one argument, passed on.
        unsafe { self.launch_with(grid, block, shared, stream, &mut arguments, false) }
    }

    /// Launches with pointers to each parameter. `early`: the kernel waits by itself for the one before in the stream,
    /// and may be set up meanwhile. The context must be current.
    ///
    /// # Safety
    /// As [`Kernel::launch`]; `arguments` must point to all the kernel's parameters, in order.
    pub(super) unsafe fn launch_with(
        &self,
        grid: (usize, usize),
        block: u32,
        shared: u32,
        stream: *mut c_void,
        arguments: &mut [*mut c_void],
        early: bool,
    ) -> Result<()> {
        let (Ok(x), Ok(y)) = (u32::try_from(grid.0), u32::try_from(grid.1)) else {
            return Err(Error::invalid("rows", "a number that a grid can have", grid.0));
        };
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: 1,
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: stream.cast(),
            attrs: &raw mut attribute,
            numAttrs: (early && self.early).into(),
        };
        let nothing = std::ptr::null_mut();
        // SAFETY: the driver copies configuration and parameters before it returns; the rest by the contract.
        let r = unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.function, arguments.as_mut_ptr(), nothing)
        };
        match r {
            CUresult::CUDA_SUCCESS => Ok(()),
            e => check(&self.name.to_string_lossy(), e),
        }
    }
}

/// How the copy engine finds boxes of a tensor: `kernels/sm90.cuh`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorMap(sys::CUtensorMap);

/// What a tensor map's elements are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Boxes {
    /// Bytes, 128 innermost, stored with the 128-byte swizzle; 0 outside the tensor.
    Bytes,
    /// f32, stored as they are; NaN outside the tensor.
    Floats,
}

impl TensorMap {
    /// `dims`: size, stride in bytes and size of a box for each dimension, innermost first, whose stride does not count.
    /// The address and the other strides must be multiples of 16.
    pub(super) fn new<const N: usize>(
        boxes: Boxes,
        address: u64,
        dims: [(usize, usize, u32); N],
    ) -> Result<Self> {
        let (kind, swizzle, outside) = match boxes {
            Boxes::Bytes => (
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ),
            Boxes::Floats => (
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA,
            ),
        };
        let shape = dims.map(|(size, ..)| size as u64);
        let strides = dims.map(|(_, stride, _)| stride as u64);
        let (box_shape, steps) = (dims.map(|(.., size)| size), [1; N]);
        let mut map = TensorMap(sys::CUtensorMap { opaque: [0; 16] });
        // SAFETY: writes the map, reads N numbers of each array (N - 1 strides); the address is only noted.
        let r = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                kind,
                N as u32,
                std::ptr::without_provenance_mut(address as usize),
                shape.as_ptr(),
                strides[1..].as_ptr(),
                box_shape.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                outside,
            )
        };
        check("cuTensorMapEncodeTiled", r).map(|()| map)
    }
}
