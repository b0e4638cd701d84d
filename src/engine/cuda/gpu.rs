//! A card: context, stream, kernels, memory in and out.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::Mutex;

use cudarc::driver::{DriverError, result, sys};

use super::compile::{Target, compile};
use super::libraries::{check, failed};
use crate::{Error, Result};

/// The kernel files: name and text.
pub(super) const KERNELS: &[(&str, &str)] = &[
    ("add_rmsnorm", include_str!("../../../kernels/cuda/add_rmsnorm.cu")),
    ("attention", include_str!("../../../kernels/cuda/attention.cu")),
    ("attention_backward", include_str!("../../../kernels/cuda/attention_backward.cu")),
    ("attention_hopper", include_str!("../../../kernels/cuda/attention_hopper.cu")),
    ("attention_backward_hopper", include_str!("../../../kernels/cuda/attention_backward_hopper.cu")),
    ("attention_plain", include_str!("../../../kernels/cuda/attention_plain.cu")),
    ("cached_attention", include_str!("../../../kernels/cuda/cached_attention.cu")),
    ("columns", include_str!("../../../kernels/cuda/columns.cu")),
    ("dora", include_str!("../../../kernels/cuda/dora.cu")),
    ("embedding", include_str!("../../../kernels/cuda/embedding.cu")),
    ("linear", include_str!("../../../kernels/cuda/linear.cu")),
    ("linear_one", include_str!("../../../kernels/cuda/linear_one.cu")),
    ("lm_head", include_str!("../../../kernels/cuda/lm_head.cu")),
    ("lora", include_str!("../../../kernels/cuda/lora.cu")),
    ("lora_dx", include_str!("../../../kernels/cuda/lora_dx.cu")),
    ("nf4", include_str!("../../../kernels/cuda/nf4.cu")),
    ("optimizer", include_str!("../../../kernels/cuda/optimizer.cu")),
    ("weights", include_str!("../../../kernels/cuda/weights.cu")),
    ("rotary", include_str!("../../../kernels/cuda/rotary.cu")),
    ("swiglu", include_str!("../../../kernels/cuda/swiglu.cu")),
];

/// The first compute capability with bf16 matrix instructions and asynchronous copies.
const MIN_CAPABILITY: (u32, u32) = (8, 0);

/// The first that launches a kernel while the one before it still runs.
const EARLY_CAPABILITY: (u32, u32) = (9, 0);

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Arg {
    Ptr(u64),
    U64(u64),
    U32(u32),
    I32(i32),
    F32(f32),
    F64(f64),
}

impl Arg {
    fn bytes(&self) -> usize {
        match self {
            Arg::Ptr(_) | Arg::U64(_) | Arg::F64(_) => 8,
            Arg::U32(_) | Arg::I32(_) | Arg::F32(_) => 4,
        }
    }
}

/// Where an argument's value lies.
fn arg_address(a: &Arg) -> *mut c_void {
    match a {
        Arg::Ptr(x) | Arg::U64(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Arg::U32(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Arg::I32(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Arg::F32(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Arg::F64(x) => std::ptr::from_ref(x).cast_mut().cast(),
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

/// A compiled function, its parameters, and the dynamic shared memory that it has been allowed.
struct Function {
    handle: sys::CUfunction,
    parameters: Parameters,
    shared: u32,
}

/// The sizes of a kernel's parameters in bytes; `None` where the driver is too old to tell (before CUDA 12.4).
pub(super) struct Parameters(Option<Vec<usize>>);

impl Parameters {
    pub fn of(function: sys::CUfunction, driver: i32) -> Self {
        if driver < 12_040 {
            return Parameters(None);
        }
        let size = |i: usize| {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: writes two numbers; says no past the last parameter.
            unsafe { sys::cuFuncGetParamInfo(function, i, &mut offset, &mut size) }.result().ok().map(|()| size)
        };
        Parameters(Some((0..).map_while(size).collect()))
    }

    /// The driver reads as many arguments as the kernel has parameters, wherever that leads.
    pub fn check(&self, kernel: &str, table: &[u8], args: &[Arg]) -> Result<()> {
        let Some(expected) = &self.0 else { return Ok(()) };
        let table = Some(table.len()).filter(|n| *n > 0);
        let given: Vec<usize> = table.into_iter().chain(args.iter().map(Arg::bytes)).collect();
        if given == *expected {
            return Ok(());
        }
        Err(Error::new("the arguments are not those of the kernel")
            .at(kernel.to_owned())
            .expected(format!("{} of {expected:?} bytes", expected.len()))
            .found(format!("{} of {given:?} bytes", given.len()))
            .next("give one argument for each parameter of its signature, in their order and of their types"))
    }
}

/// The card's primary context, kept while this lives.
pub(super) struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

impl Context {
    fn of(device: sys::CUdevice) -> Result<Self> {
        // SAFETY: released when the value is dropped.
        let handle =
            unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("cuDevicePrimaryCtxRetain", e))?;
        Ok(Context { device, handle })
    }

    /// The context of an open card.
    pub fn retain(gpu: &Gpu) -> Result<Self> {
        Self::of(gpu.context.device)
    }

    /// Makes the context this thread's.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained while `self` lives.
        unsafe { result::ctx::set_current(self.handle) }.map_err(|e| failed("cuCtxSetCurrent", e))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by this value.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A card that is ready: its primary context, one stream, every kernel loaded.
pub struct Gpu {
    target: Target,
    pub(super) stream: sys::CUstream,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: Mutex<HashMap<(&'static str, &'static str), Function>>,
    /// As the driver names it.
    pub name: String,
    /// Major and minor version.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sm_count: u32,
    /// Bytes of shared memory that a block may ask for.
    pub shared_limit: u32,
    /// Memory of the card, in bytes.
    pub total_bytes: u64,
    // Last: dropped after what lives in it.
    context: Context,
}

// SAFETY: handles of the driver may be used from any thread that has made the context current, which `bind` does.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Opens the first visible card and loads the kernels, for `elem` = float or bf16.
    ///
    /// # Errors
    /// No driver, no card, a card that is too old, libraries that are missing.
    pub fn open(f32: bool) -> Result<Self> {
        check()?;
        let count = result::device::get_count().map_err(|e| failed("cuDeviceGetCount", e))?;
        if count == 0 {
            return Err(Error::new("no GPU is visible")
                .at("CUDA_VISIBLE_DEVICES")
                .expected("at least one NVIDIA GPU")
                .next("check `nvidia-smi` and the variable, or add `.cpu()` to the plan's builder"));
        }
        let device = result::device::get(0).map_err(|e| failed("cuDeviceGet", e))?;
        use sys::CUdevice_attribute as A;
        // SAFETY: the device is valid.
        let attribute =
            |a: A| unsafe { result::device::get_attribute(device, a) }.map_err(|e| failed("cuDeviceGetAttribute", e));
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        );
        let name = result::device::get_name(device).map_err(|e| failed("cuDeviceGetName", e))?;
        if capability < MIN_CAPABILITY {
            return Err(Error::new("this card is not supported")
                .at(name)
                .expected("compute capability 8.0 or later (Ampere: RTX 30, A100), which computes in bf16")
                .found(format!("{}.{}", capability.0, capability.1))
                .next("use a newer card, or add `.cpu()` to the plan's builder"));
        }
        let sm_count = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared_limit = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // SAFETY: the device is valid.
        let total_bytes =
            unsafe { result::device::total_mem(device) }.map_err(|e| failed("cuDeviceTotalMem", e))? as u64;
        let context = Context::of(device)?;
        let mut driver = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut driver) };
        let target = Target { capability, f32, driver };
        let mut gpu = Gpu {
            target,
            stream: std::ptr::null_mut(),
            modules: HashMap::new(),
            functions: Mutex::default(),
            name,
            capability,
            sm_count,
            shared_limit,
            total_bytes,
            context,
        };
        gpu.bind()?;
        gpu.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(|e| failed("cuStreamCreate", e))?;
        for (name, source) in KERNELS {
            let code = compile(name, source, target)?;
            // SAFETY: the code is a whole image; the driver copies it.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
                .map_err(|e| failed("cuModuleLoadData", e).at(format!("kernels/cuda/{name}.cu")))?;
            gpu.modules.insert(name, module);
        }
        Ok(gpu)
    }

    /// Makes the card's context this thread's.
    ///
    /// # Errors
    /// What the driver says.
    pub fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    /// What kernels are compiled for.
    pub(super) fn target(&self) -> Target {
        self.target
    }

    /// The kernel, allowed its shared memory, its arguments checked.
    fn function(
        &self,
        file: &'static str,
        kernel: &'static str,
        shared: u32,
        table: &[u8],
        args: &[Arg],
    ) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(|e| e.into_inner());
        let entry = match functions.get_mut(&(file, kernel)) {
            Some(f) => f,
            None => {
                let module = self
                    .modules
                    .get(file)
                    .copied()
                    .ok_or_else(|| Error::new("no such kernel file").at(format!("kernels/cuda/{file}.cu")))?;
                let name = CString::new(kernel).map_err(|_| Error::new("a kernel's name has a NUL byte"))?;
                // SAFETY: the module is loaded while `self` lives.
                let handle = unsafe { result::module::get_function(module, name) }
                    .map_err(|e| failed("cuModuleGetFunction", e).at(format!("kernels/cuda/{file}.cu: {kernel}")))?;
                let parameters = Parameters::of(handle, self.target.driver);
                functions.entry((file, kernel)).or_insert(Function { handle, parameters, shared: 48 << 10 })
            }
        };
        entry.parameters.check(kernel, table, args).map_err(|e| e.at(format!("kernels/cuda/{file}.cu")))?;
        if shared > entry.shared {
            if shared > self.shared_limit {
                return Err(Error::new("a kernel needs more shared memory than this card has")
                    .at(format!("kernels/cuda/{file}.cu: {kernel}"))
                    .expected(format!("at most {} bytes", self.shared_limit))
                    .found(format!("{shared} bytes")));
            }
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(entry.handle, attribute, shared as c_int) }
                .map_err(|e| failed("cuFuncSetAttribute", e).at(kernel.to_string()))?;
            entry.shared = shared;
        }
        Ok(entry.handle)
    }

    /// Puts a kernel into the stream.
    ///
    /// # Errors
    /// A kernel that does not exist, a launch that the driver refuses.
    pub fn launch(&self, file: &'static str, kernel: &'static str, how: Launch, args: &[Arg]) -> Result<()> {
        self.launch_with(file, kernel, how, &[], args)
    }

    /// The same, with a structure of these bytes as the kernel's first argument.
    ///
    /// # Errors
    /// As [`Gpu::launch`].
    pub fn launch_with(
        &self,
        file: &'static str,
        kernel: &'static str,
        how: Launch,
        table: &[u8],
        args: &[Arg],
    ) -> Result<()> {
        let function = self.function(file, kernel, how.shared, table, args)?;
        self.launch_function(function, how, table, args, true)
            .map_err(|e| failed(&format!("kernels/cuda/{file}.cu: {kernel} {how:?}"), e))
    }

    /// `early`: the kernel begins with `after_previous()` of common.cuh, and may be launched before the one before it is done.
    pub(super) fn launch_function(
        &self,
        function: sys::CUfunction,
        how: Launch,
        table: &[u8],
        args: &[Arg],
        early: bool,
    ) -> std::result::Result<(), DriverError> {
        let table = (!table.is_empty()).then(|| table.as_ptr().cast_mut().cast());
        let mut params: Vec<*mut c_void> = table.into_iter().chain(args.iter().map(arg_address)).collect();
        let [x, y, z] = how.grid;
        if !early || self.capability < EARLY_CAPABILITY {
            // SAFETY: the arguments are those of the kernel's signature, by the launcher beside it; they are copied at once.
            return unsafe {
                result::launch_kernel(function, (x, y, z), (how.block, 1, 1), how.shared, self.stream, &mut params)
            };
        }
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: how.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: how.shared,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: as above; the attribute lives until the call returns.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }.result()
    }

    /// Allocates device memory, zeroed.
    ///
    /// # Errors
    /// More than the card has free.
    pub fn allocate(&self, bytes: u64) -> Result<u64> {
        let free = result::mem_get_info().map_err(|e| failed("cuMemGetInfo", e))?.0;
        // SAFETY: freed by the owner.
        let start = unsafe { result::malloc_sync(bytes.max(1) as usize) }.map_err(|e| {
            Error::new("the arena could not be allocated on the GPU")
                .at(self.name.clone())
                .expected(format!("{bytes} bytes"))
                .found(format!("{free} bytes free ({})", super::libraries::describe(&e)))
                .next("close other programs on the card, or ask the plan what fits: plan.fit(&gpu)")
        })?;
        self.fill(start, 0, bytes)?;
        Ok(start)
    }

    /// Frees device memory.
    pub fn free(&self, start: u64) {
        // SAFETY: allocated by `allocate`, not used again.
        let _ = unsafe { result::free_sync(start) };
    }

    /// Pinned host memory, zeroed.
    ///
    /// # Errors
    /// More than the system gives.
    pub fn allocate_host(&self, bytes: u64) -> Result<*mut u8> {
        // SAFETY: freed by the owner.
        let start = unsafe { result::malloc_host(bytes.max(1) as usize, 0) }
            .map_err(|e| failed("cuMemHostAlloc", e).expected(format!("{bytes} bytes of pinned host memory")))?;
        // SAFETY: allocated just now.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, bytes as usize) };
        Ok(start.cast())
    }

    /// Frees pinned host memory.
    pub fn free_host(&self, start: *mut u8) {
        // SAFETY: allocated by `allocate_host`, not used again.
        let _ = unsafe { result::free_host(start.cast()) };
    }

    /// Sets device memory to a byte, in the stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn fill(&self, start: u64, byte: u8, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is inside an allocation, by the plan.
        unsafe { result::memset_d8_async(start, byte, bytes as usize, self.stream) }
            .map_err(|e| failed("cuMemsetD8Async", e))
    }

    /// Copies host memory to the device, in the stream; `from` may be reused when this returns, unless it is pinned.
    ///
    /// # Errors
    /// What the driver says.
    pub fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is inside an allocation, by the plan; pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(|e| failed("cuMemcpyHtoDAsync", e))
    }

    /// Copies device memory to the host and waits for it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.bind()?;
        if !to.is_empty() {
            // SAFETY: the range is inside an allocation, by the plan; waited for below.
            unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(|e| failed("cuMemcpyDtoHAsync", e))?;
        }
        self.wait()
    }

    /// Copies inside the device, in the stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<()> {
        // SAFETY: both ranges are inside allocations, by the plan.
        unsafe { result::memcpy_dtod_async(to, from, bytes as usize, self.stream) }
            .map_err(|e| failed("cuMemcpyDtoDAsync", e))
    }

    /// Waits for the stream.
    ///
    /// # Errors
    /// What any operation in it reported.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| failed("cuStreamSynchronize", e))
    }

    /// The card's address, as NVML names it.
    pub(super) fn pci_bus_id(&self) -> Option<CString> {
        let mut text = [0u8; 32];
        // SAFETY: the buffer's length is passed.
        unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as c_int, self.context.device) }
            .result()
            .ok()?;
        Some(std::ffi::CStr::from_bytes_until_nul(&text).ok()?.to_owned())
    }

    /// Bytes of the card that no process holds.
    ///
    /// # Errors
    /// What the driver says.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(result::mem_get_info().map_err(|e| failed("cuMemGetInfo", e))?.0 as u64)
    }
}

/// Leaves this process `bytes` of the card, its CUDA context included, as if the card had no more, while the result lives.
///
/// # Errors
/// No card; less free than `bytes`.
pub fn reserve_all_but(bytes: u64) -> Result<Ballast> {
    Ballast::leaving(bytes)
}

/// Device memory that is taken away from the card while this lives: see [`reserve_all_but`].
pub struct Ballast {
    gpu: Gpu,
    start: u64,
    /// Bytes taken away.
    pub bytes: u64,
}

impl Ballast {
    fn leaving(bytes: u64) -> Result<Self> {
        let gpu = Gpu::open(false)?;
        let held = super::nvml::process_bytes(&gpu).unwrap_or(0);
        let free = gpu.free_bytes()?;
        let taken = free.checked_sub(bytes.saturating_sub(held)).ok_or_else(|| {
            Error::new("the card has less memory free than it is to be left with")
                .at(gpu.name.clone())
                .expected(format!("{bytes} bytes"))
                .found(format!("{free} bytes free"))
        })?;
        // Whole pages: a part of one would be left to others.
        let bytes = taken / PAGE * PAGE;
        let start = gpu.allocate(bytes)?;
        gpu.wait()?;
        Ok(Ballast { gpu, start, bytes })
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            self.gpu.free(self.start);
        }
    }
}

/// What the driver hands out device memory in.
pub(super) const PAGE: u64 = 2 << 20;

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: handles that this value made; nothing uses them afterwards.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for module in self.modules.values() {
                let _ = result::module::unload(*module);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
