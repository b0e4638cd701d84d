//! What this process holds on the card, as `nvidia-smi` shows it: asked of NVML, the library behind it.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libloading::Library;

use super::gpu::Gpu;

/// `nvmlProcessInfo_t`, version 2 and 3.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProcessInfo {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

type Device = *mut c_void;

/// Bytes of device memory of this process; `None` where NVML is missing or does not say.
///
/// In a container the process numbers are the host's: a card with one process is then taken as ours.
pub(super) fn process_bytes(gpu: &Gpu) -> Option<u64> {
    // SAFETY: NVML's documented signatures; buffers have the sizes that are passed.
    unsafe {
        let nvml = ["libnvidia-ml.so.1", "libnvidia-ml.so"].iter().find_map(|name| Library::new(*name).ok())?;
        let init = nvml.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2\0").ok()?;
        let shutdown = nvml.get::<unsafe extern "C" fn() -> c_int>(b"nvmlShutdown\0").ok()?;
        let by_bus = nvml
            .get::<unsafe extern "C" fn(*const c_char, *mut Device) -> c_int>(b"nvmlDeviceGetHandleByPciBusId_v2\0")
            .ok()?;
        let processes = nvml
            .get::<unsafe extern "C" fn(Device, *mut c_uint, *mut ProcessInfo) -> c_int>(
                b"nvmlDeviceGetComputeRunningProcesses_v3\0",
            )
            .ok()?;
        if init() != 0 {
            return None;
        }
        let bus = gpu.pci_bus_id()?;
        let mut device = std::ptr::null_mut();
        let mut list = [ProcessInfo::default(); 64];
        let mut count = list.len() as c_uint;
        let ok = by_bus(bus.as_ptr(), &mut device) == 0 && processes(device, &mut count, list.as_mut_ptr()) == 0;
        shutdown();
        if !ok {
            return None;
        }
        let list = &list[..(count as usize).min(64)];
        let ours = list.iter().find(|p| p.pid == std::process::id());
        let only = (list.len() == 1).then(|| &list[0]);
        // All bits set: the driver does not know.
        ours.or(only).map(|p| p.used).filter(|used| *used != u64::MAX)
    }
}
