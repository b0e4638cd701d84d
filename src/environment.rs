//! What a notebook runs on: versions, threads, device and why.

/// The machine and the build, as the first cell of a notebook shows them.
#[derive(Clone, PartialEq, Eq)]
pub struct Environment {
    /// This crate's version.
    pub tunebook: String,
    /// Instruction set that the hot loops use: `avx512`, `avx2` or `baseline`.
    pub instructions: String,
    /// Threads that computations use (`RAYON_NUM_THREADS` changes it).
    pub threads: usize,
    /// The device that trains, and the reason for it.
    pub device: String,
    /// Memory of the machine in bytes; 0 when it is not known.
    pub memory_bytes: u64,
}

/// Reads the environment.
///
/// `notebooks/00_start_here.ipynb` explains it.
pub fn environment() -> Environment {
    Environment {
        tunebook: env!("CARGO_PKG_VERSION").into(),
        instructions: instructions().into(),
        threads: rayon::current_num_threads(),
        device: match crate::engine::cuda::device_name() {
            Ok(name) => format!("{name} in bf16"),
            Err(e) => format!("CPU in f32, because: {}", e.what()),
        },
        memory_bytes: memory_bytes(),
    }
}

fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            return "avx512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "avx2";
        }
    }
    "baseline"
}

fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    kib.map_or(0, |k| k * 1024)
}
