//! Every operation against candle's autograd in f64, one at a time, on awkward shapes.
//!
//! Each region has room for more tokens than the batch has, outputs and scratch start as NaN: an operation that reads
//! what nobody wrote, or leaves out what it should write, shows.

mod attention;
mod linear;
mod lm_head;
mod pointwise;

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::CpuOps;
use crate::engine::backend::{Backend, StepState};
use crate::engine::ops::{Op, Ops, TensorId};
use crate::engine::optimizer::AdamWHyper;
use crate::model::ModelSpec;
use crate::plan::{DeviceKind, Lifetime, Phase, Region, Space, Stage, of_ops};

/// Tokens that the regions have room for beyond those of the batch.
const SPARE: usize = 3;

/// Token counts that are no multiple of any tile.
const TOKENS: [usize; 4] = [1, 7, 65, 130];

impl CpuOps {
    fn read<T: bytemuck::Pod>(&self, id: TensorId) -> Vec<T> {
        // SAFETY: copied at once.
        unsafe { self.slice::<T>(id) }.to_vec()
    }
}

fn state() -> StepState {
    StepState {
        loss_scale: 1.0,
        dropout_seed: 11,
        micro_step: 5,
        training: true,
        adapter: true,
        long_text: false,
        adamw: AdamWHyper::default(),
        max_grad_norm: 0.0,
    }
}

/// Regions with their first contents.
struct Bench {
    tokens: usize,
    regions: Vec<Region>,
    contents: Vec<Vec<u8>>,
    state: StepState,
    cu_seqlens: Vec<u32>,
    rng: ChaCha8Rng,
}

impl Bench {
    fn new(tokens: usize) -> Self {
        Bench {
            tokens,
            regions: Vec::new(),
            contents: Vec::new(),
            state: state(),
            cu_seqlens: vec![0, tokens as u32],
            rng: ChaCha8Rng::seed_from_u64(tokens as u64),
        }
    }

    /// Random numbers of about unit size.
    fn random(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (0..4).map(|_| self.rng.random_range(-0.9f32..0.9)).sum()).collect()
    }

    /// A region of `shape` that starts with `data`; what is left is filled with NaN.
    fn region<T: bytemuck::Pod>(&mut self, dtype: DType, shape: &[usize], data: &[T]) -> TensorId {
        let id = TensorId(self.regions.len() as u32);
        self.regions.push(Region {
            name: format!("region {}", id.0),
            stage: Stage::Activations,
            dtype,
            shape: shape.into(),
            space: Space::Device,
            lifetime: Lifetime::Persistent,
            offset: 0,
        });
        assert!(data.len() <= self.regions[id.index()].numel());
        self.contents.push(bytemuck::cast_slice(data).to_vec());
        id
    }

    /// f32 of exactly this shape.
    fn weight(&mut self, shape: &[usize], data: &[f32]) -> TensorId {
        assert_eq!(shape.iter().product::<usize>(), data.len());
        self.region(DType::F32, shape, data)
    }

    /// An activation `[T, width]` in a region with room for more.
    fn act(&mut self, width: usize, data: &[f32]) -> TensorId {
        assert_eq!(data.len(), self.tokens * width);
        self.region(DType::F32, &[self.tokens + SPARE, width], data)
    }

    /// An activation that an operation writes: NaN until then.
    fn out(&mut self, width: usize) -> TensorId {
        self.region::<f32>(DType::F32, &[self.tokens + SPARE, width], &[])
    }

    fn u32s(&mut self, data: &[u32]) -> TensorId {
        self.region(DType::U32, &[data.len() + SPARE], data)
    }

    /// Executes the operations.
    fn run(self, ops: &[Op]) -> CpuOps {
        let mut spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
        spec.rms_norm_eps = 1e-5;
        let plan = of_ops(spec, self.regions, ops.to_vec(), DeviceKind::Cpu, DType::F32);
        let mut cpu = CpuOps::new(&plan, self.state).unwrap();
        for (i, bytes) in self.contents.iter().enumerate() {
            let all = cpu.bytes_mut(TensorId(i as u32));
            all.fill(0xff);
            all[..bytes.len()].copy_from_slice(bytes);
        }
        cpu.tokens = self.tokens;
        cpu.cu_seqlens = self.cu_seqlens;
        for (op, &scratch) in ops.iter().zip(plan.scratch(Phase::MicroStep)) {
            cpu.poison(&[], scratch).unwrap();
            cpu.run(op, scratch).unwrap();
        }
        cpu
    }
}

/// The rows of the batch of an activation.
fn rows(cpu: &CpuOps, id: TensorId) -> Vec<f32> {
    let all = cpu.read::<f32>(id);
    let r = &cpu.plan.regions()[id.index()];
    let width = r.numel() / r.shape[0];
    let (used, unused) = all.split_at(cpu.tokens * width);
    assert!(unused.iter().all(|x| x.is_nan()), "an operation wrote beyond its tokens");
    used.to_vec()
}

/// f64 constants.
fn tensor(data: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(data, shape, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

/// An f64 leaf of the graph.
fn var(data: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&tensor(data, shape)).unwrap()
}

fn ids(data: &[u32]) -> Tensor {
    Tensor::from_slice(data, data.len(), &Device::Cpu).unwrap()
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_vec1::<f64>().unwrap()
}

/// The gradients of `sum(out * dout)`.
fn gradients(out: &Tensor, dout: &Tensor, of: &[&Var]) -> Vec<Vec<f64>> {
    let grads = (out * dout).unwrap().sum_all().unwrap().backward().unwrap();
    of.iter().map(|v| flat(grads.get(v).unwrap())).collect()
}

/// Equal to within `tolerance` times the largest element.
#[track_caller]
fn close(what: &str, ours: &[f32], theirs: &[f64], tolerance: f64) {
    close_to(what, ours, theirs, tolerance, theirs.iter().fold(1e-6f64, |m, x| m.max(x.abs())));
}

/// Equal to within `tolerance` times `scale`: for what may be zero because large terms cancel.
#[track_caller]
fn close_to(what: &str, ours: &[f32], theirs: &[f64], tolerance: f64, scale: f64) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let error = (f64::from(*a) - b).abs() / scale;
        assert!(error <= tolerance, "{what}: element {i} is {a}, candle has {b} (scale {scale})");
    }
}

/// What was in an accumulator before, plus the gradient.
fn plus(before: &[f32], gradient: &[f64]) -> Vec<f64> {
    before.iter().zip(gradient).map(|(a, b)| f64::from(*a) + b).collect()
}
