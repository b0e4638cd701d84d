//! [`Gpu`]: known cards by name, for asking whether a run fits before renting or buying one.

use crate::{Error, Result};

const MIB: u64 = 1 << 20;

/// A graphics card as far as memory planning needs it. All sizes are bytes.
///
/// `notebooks/01_the_vram_wall.ipynb` explains it.
#[derive(Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The preset's name (`rtx-4090`) or the name that you gave.
    pub name: String,
    /// Memory of the card as `nvidia-smi` reports it under `memory.total` (MiB x 2^20), not the number on the box.
    pub total_bytes: u64,
    /// What the process holds outside our arena or PyTorch's allocator: the CUDA context and the loaded kernels.
    ///
    /// An **assumption** for a card that is not at hand: published values go from 141 MiB (T4, measured by fitcheck)
    /// to 650 MB (gpu_poor's constant); the presets take 256 MiB for compute capability 7.x, 448 MiB for 8.x and 12.x
    /// and 640 MiB for the data-centre cards 9.0 and 10.0, whose kernels are larger. [`Gpu::detect`] measures it on the
    /// card at hand.
    pub context_bytes: u64,
    /// `context_bytes` was measured with this library on such a card: predictions of process memory hold within 1 %.
    /// False: they are an *estimate*.
    pub context_measured: bool,
    /// Major and minor version; bfloat16 needs (8, 0).
    pub compute_capability: (u32, u32),
}

/// Name, `memory.total` in MiB, compute capability; by memory, then by name.
const CARDS: &[(&str, u64, (u32, u32))] = &[
    ("rtx-2060", 6144, (7, 5)),
    ("rtx-4060", 8188, (8, 9)),
    ("rtx-2080", 8192, (7, 5)),
    ("rtx-3060-ti", 8192, (8, 6)),
    ("rtx-3070", 8192, (8, 6)),
    ("rtx-3080", 10240, (8, 6)),
    ("rtx-2080-ti", 11264, (7, 5)),
    ("rtx-5070", 12227, (12, 0)),
    ("rtx-4070", 12282, (8, 9)),
    ("rtx-4070-ti", 12282, (8, 9)),
    ("rtx-3060", 12288, (8, 6)),
    ("rtx-3080-ti", 12288, (8, 6)),
    ("t4", 15360, (7, 5)),
    ("rtx-5060-ti-16gb", 16311, (12, 0)),
    ("rtx-5070-ti", 16303, (12, 0)),
    ("rtx-5080", 16303, (12, 0)),
    ("rtx-4070-ti-super", 16376, (8, 9)),
    ("rtx-4080", 16376, (8, 9)),
    ("rtx-4060-ti-16gb", 16380, (8, 9)),
    ("v100-16gb", 16384, (7, 0)),
    ("a10", 23028, (8, 6)),
    ("a10g", 23028, (8, 6)),
    ("l4", 23034, (8, 9)),
    ("rtx-4090", 24564, (8, 9)),
    ("rtx-a5000", 24564, (8, 6)),
    ("rtx-3090", 24576, (8, 6)),
    ("rtx-5090", 32607, (12, 0)),
    ("v100-32gb", 32768, (7, 0)),
    ("a100-40gb", 40960, (8, 0)),
    ("l40s", 46068, (8, 9)),
    ("rtx-6000-ada", 49140, (8, 9)),
    ("rtx-a6000", 49140, (8, 6)),
    ("h100", 81559, (9, 0)),
    ("a100-80gb", 81920, (8, 0)),
    ("h200", 143771, (9, 0)),
    ("b200", 183359, (10, 0)),
];

/// Cards on which the context was measured: name, MiB (see kernels/cuda/NOTES.md).
const MEASURED: &[(&str, u64)] = &[("h100", 526), ("h200", 526)];

/// Other spellings of one card.
const ALIASES: &[(&str, &str)] = &[
    ("a100", "a100-40gb"),
    ("a6000", "rtx-a6000"),
    ("a5000", "rtx-a5000"),
    ("h100-80gb", "h100"),
    ("tesla-t4", "t4"),
    ("v100", "v100-16gb"),
    ("rtx-4060-ti", "rtx-4060-ti-16gb"),
    ("rtx-5060-ti", "rtx-5060-ti-16gb"),
];

impl Gpu {
    /// A known card by name: case, spaces, dashes, `NVIDIA` and `GeForce` do not matter (`"RTX 4090"`).
    ///
    /// # Errors
    /// An unknown name, with the nearest known one.
    ///
    /// ```
    /// use tunebook::plan::Gpu;
    /// assert_eq!(Gpu::preset("RTX 4090")?.total_bytes, 24_564 << 20);
    /// assert!(Gpu::preset("rtx-4909").unwrap_err().to_string().contains("`rtx-4090`"));
    /// # Ok::<(), tunebook::Error>(())
    /// ```
    pub fn preset(name: &str) -> Result<Gpu> {
        let wanted = key(name);
        let alias = ALIASES.iter().find(|(alias, _)| key(alias) == wanted);
        let wanted = alias.map_or(wanted, |(_, real)| key(real));
        if let Some(&card) = CARDS.iter().find(|(known, ..)| key(known) == wanted) {
            return Ok(from_card(card));
        }
        let nearest = CARDS
            .iter()
            .map(|(known, ..)| *known)
            .max_by(|a, b| likeness(a, &wanted).total_cmp(&likeness(b, &wanted)))
            .unwrap_or("rtx-4090");
        Err(Error::new("unknown GPU")
            .at("Gpu::preset")
            .expected(CARDS.iter().map(|(known, ..)| *known).collect::<Vec<_>>().join(", "))
            .found(format!("`{name}`"))
            .next(format!(
                "did you mean `{nearest}`? for another card use Gpu::new(name, total_bytes, compute_capability)"
            )))
    }

    /// Every known card, the smallest memory first.
    pub fn presets() -> Vec<Gpu> {
        let mut cards: Vec<Gpu> = CARDS.iter().map(|&c| from_card(c)).collect();
        cards.sort_by(|a, b| a.total_bytes.cmp(&b.total_bytes).then_with(|| a.name.cmp(&b.name)));
        cards
    }

    /// A card that has no preset: `total_bytes` as `nvidia-smi --query-gpu=memory.total` says, times 2^20.
    ///
    /// `context_bytes` is assumed from the compute capability, as for the presets.
    pub fn new(name: impl Into<String>, total_bytes: u64, compute_capability: (u32, u32)) -> Gpu {
        let context_bytes = match compute_capability.0 {
            0..=7 => 256 * MIB,
            9..=11 => 640 * MIB,
            _ => 448 * MIB,
        };
        Gpu { name: name.into(), total_bytes, context_bytes, context_measured: false, compute_capability }
    }

    /// Bytes left for the allocations of a run: `total_bytes - context_bytes`.
    pub fn usable_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.context_bytes)
    }

    /// Whether the card computes in bfloat16 (compute capability 8.0 and later).
    pub fn has_bf16(&self) -> bool {
        self.compute_capability >= (8, 0)
    }
}

fn from_card((name, mib, compute_capability): (&str, u64, (u32, u32))) -> Gpu {
    let mut gpu = Gpu::new(name, mib * MIB, compute_capability);
    if let Some((_, context)) = MEASURED.iter().find(|(measured, _)| *measured == name) {
        (gpu.context_bytes, gpu.context_measured) = (context * MIB, true);
    }
    gpu
}

/// `NVIDIA GeForce RTX 4090` -> `rtx4090`.
fn key(name: &str) -> String {
    let plain: String = name.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
    plain.replace("nvidia", "").replace("geforce", "")
}

fn likeness(known: &str, wanted: &str) -> f64 {
    strsim::jaro_winkler(&key(known), wanted)
}
