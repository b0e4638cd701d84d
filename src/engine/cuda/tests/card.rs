//! Arrays on the card for tests of a kernel by itself.

use std::cell::RefCell;
use std::path::PathBuf;

use bytemuck::Pod;
use candle_core::DType;
use half::{bf16, f16};
use safetensors::SafeTensors;

use super::super::gpu::Gpu;

/// A card and the arrays that a test puts there, freed with it.
pub struct Card {
    pub gpu: Gpu,
    /// Address and length in bytes.
    arrays: RefCell<Vec<(u64, usize)>>,
}

/// Bytes after an array that nobody may write to.
const GUARD: usize = 64;

impl Card {
    /// `None`, with a message, where there is no GPU. `f32`: the compute dtype, instead of bf16.
    pub fn open(f32: bool) -> Option<Card> {
        if !super::super::available() {
            println!("skipped: no GPU on this machine");
            return None;
        }
        Some(Card { gpu: Gpu::open(f32).unwrap(), arrays: RefCell::default() })
    }

    /// An array of `n` elements that a kernel writes: all bits set until then.
    pub fn out<T: Pod>(&self, n: usize) -> u64 {
        let bytes = n * size_of::<T>();
        let ptr = self.gpu.allocate((bytes + GUARD) as u64).unwrap();
        self.gpu.fill(ptr, 0xff, (bytes + GUARD) as u64).unwrap();
        self.arrays.borrow_mut().push((ptr, bytes));
        ptr
    }

    pub fn put<T: Pod>(&self, values: &[T]) -> u64 {
        let ptr = self.out::<T>(values.len());
        self.gpu.upload(ptr, bytemuck::cast_slice(values)).unwrap();
        ptr
    }

    pub fn get<T: Pod>(&self, ptr: u64, n: usize) -> Vec<T> {
        let mut bytes = vec![0u8; n * size_of::<T>()];
        self.gpu.read(ptr, &mut bytes).unwrap();
        bytemuck::pod_collect_to_vec(&bytes)
    }

    /// Frees every array, after a look at what follows it.
    pub fn clear(&self) {
        for (ptr, bytes) in self.arrays.borrow_mut().drain(..) {
            let mut guard = [0u8; GUARD];
            self.gpu.read(ptr + bytes as u64, &mut guard).unwrap();
            assert!(guard == [0xff; GUARD], "written beyond the end of an array of {bytes} bytes");
            self.gpu.free(ptr);
        }
    }
}

/// Compared by their bits.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A file of reference tensors.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn path(path: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
    }

    pub fn load(path: &str) -> Self {
        Golden(std::fs::read(Self::path(path)).unwrap())
    }

    /// Dtype, shape and bytes.
    pub fn get(&self, name: &str) -> Option<(DType, Vec<usize>, Vec<u8>)> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let t = file.tensor(name).ok()?;
        let dtype = match t.dtype() {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::BF16 => DType::BF16,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::U8 => DType::U8,
            other => panic!("{name}: {other:?}"),
        };
        Some((dtype, t.shape().to_vec(), t.data().to_vec()))
    }

    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        self.get(name).map(|t| t.2)
    }

    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        self.get(name).map(|(dtype, _, bytes)| floats(dtype, &bytes))
    }
}

pub fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytemuck::pod_collect_to_vec(bytes),
        DType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes).into_iter().map(bf16::to_f32).collect(),
        DType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).into_iter().map(f16::to_f32).collect(),
        other => panic!("{other:?}"),
    }
}

/// Deterministic numbers.
pub struct Noise(pub u64);

impl Noise {
    /// 32 random bits.
    pub fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Between -1 and 1.
    pub fn unit(&mut self) -> f32 {
        (self.word() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}
