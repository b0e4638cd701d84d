//! Every operation on the GPU against the CPU backend, on awkward shapes, in f32 and in bf16.
//!
//! Inputs are rounded to bf16, so that both backends and both dtypes compute from the same numbers. Regions have room for
//! more tokens than the batch has, outputs and scratch start as NaN: an operation that reads what nobody wrote, writes
//! beyond its tokens or into its inputs, or leaves something out, shows. Everything runs twice and gives the same bits.

mod add_rmsnorm;
mod attention;
mod card;
mod columns;
mod dora;
mod embedding;
mod linear;
mod lm_head;
mod lora;
mod memory;
mod nf4;
mod optimizer;
mod rotary;
mod swiglu;
mod workbench;

use std::sync::{Mutex, OnceLock};

use candle_core::DType;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::CudaOps;
use super::gpu::Gpu;
use crate::data::{Batch, IGNORE_INDEX};
use crate::engine::backend::{Backend, StepState};
use crate::engine::cpu::CpuOps;
use crate::engine::ops::{LoadBatch, Op, TensorId};
use crate::model::ModelSpec;
use crate::plan::{DeviceKind, Lifetime, MemoryPlan, Phase, Region, Space, Stage, of_ops};

/// Tokens that the regions have room for beyond those of the batch.
const SPARE: usize = 3;

/// Token counts that are no multiple of any tile.
const TOKENS: [usize; 4] = [1, 3, 65, 130];

/// Widths that are no multiple of a tile; the last ones are not even multiples of a vector.
const WIDTHS: [usize; 5] = [48, 72, 104, 20, 33];

/// Whether a GPU is there; says so when not.
fn gpu() -> bool {
    // Kept open, so that the context is made once for all tests.
    static KEPT: OnceLock<Option<Mutex<Gpu>>> = OnceLock::new();
    let kept = KEPT.get_or_init(|| super::available().then(|| Mutex::new(Gpu::open(true).unwrap())));
    if kept.is_none() {
        println!("skipped: no GPU on this machine");
    }
    kept.is_some()
}

fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| round(*x)).collect()
}

/// The first contents of a region.
enum Contents {
    /// In the compute dtype: f32 or bf16.
    Elems(Vec<f32>),
    /// The same everywhere.
    Bytes(DType, Vec<u8>),
}

struct Field {
    name: String,
    shape: Vec<usize>,
    contents: Contents,
    /// Elements that operations may read and write; what follows stays as it is.
    used: usize,
    space: Space,
    /// What operations leave in it is not looked at, but by the operations that follow.
    unseen: bool,
}

impl Field {
    fn dtype(&self, compute: DType) -> DType {
        match &self.contents {
            Contents::Elems(_) => compute,
            Contents::Bytes(dtype, _) => *dtype,
        }
    }

    /// The region's bytes before the first operation; what is left after the contents is NaN.
    fn bytes(&self, compute: DType) -> Vec<u8> {
        let mut bytes = match &self.contents {
            Contents::Elems(values) if compute == DType::BF16 => {
                let values: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                bytemuck::cast_slice(&values).to_vec()
            }
            Contents::Elems(values) => bytemuck::cast_slice(values).to_vec(),
            Contents::Bytes(_, bytes) => bytes.clone(),
        };
        bytes.resize(self.shape.iter().product::<usize>() * self.dtype(compute).size_in_bytes(), 0xff);
        bytes
    }
}

/// The plain computation in bf16, whose error the GPU's may exceed by a factor of two at most.
enum Plain {
    /// One rounding: the CPU's result, rounded.
    Rounded,
    /// These values: the steps of the plain computation, each rounded.
    Values(Vec<f32>),
    /// Not rounded at all: the error itself has this limit.
    Within(f64),
}

/// What an output has to be. Errors are norms: `|ours - cpu| / |cpu|`.
struct Want {
    id: TensorId,
    /// The largest error in f32.
    f32: f64,
    bf16: Plain,
    /// Size of the elements that errors are measured by, where the result may be zero because large terms cancel.
    scale: f64,
}

impl Want {
    fn scale(&mut self, scale: f64) {
        self.scale = scale;
    }
}

/// Regions, operations over them, and what is wanted.
struct Bench {
    tokens: usize,
    batch: Batch,
    state: StepState,
    /// The batch's regions.
    load: LoadBatch,
    fields: Vec<Field>,
    ops: Vec<Op>,
    wants: Vec<Want>,
    /// What the fields that follow belong to: the front of their names.
    part: String,
    rng: ChaCha8Rng,
}

impl Bench {
    /// One example of `tokens` tokens.
    fn new(tokens: usize) -> Self {
        Self::examples(&[tokens])
    }

    /// Examples of these lengths.
    fn examples(lengths: &[usize]) -> Self {
        let tokens = lengths.iter().sum();
        let mut cu_seqlens = vec![0u32];
        cu_seqlens.extend(lengths.iter().scan(0, |end, n| {
            *end += *n as u32;
            Some(*end)
        }));
        let batch = Batch {
            input_ids: vec![0; tokens],
            positions: lengths.iter().flat_map(|n| 0..*n as u32).collect(),
            labels: vec![IGNORE_INDEX; tokens],
            examples: (0..lengths.len()).collect(),
            cu_seqlens,
        };
        let none = TensorId(0);
        let mut b = Bench {
            tokens,
            batch,
            state: StepState { dropout_seed: 11, micro_step: 5, training: true, ..StepState::default() },
            load: LoadBatch { tokens: none, positions: none, labels: Some(none), cu_seqlens: none },
            fields: Vec::new(),
            ops: Vec::new(),
            wants: Vec::new(),
            part: format!("{lengths:?} tokens"),
            rng: ChaCha8Rng::seed_from_u64(tokens as u64),
        };
        let ids = |b: &mut Bench, name, n, dtype| b.bytes::<u32>(name, dtype, &[n], &[]);
        b.load = LoadBatch {
            tokens: ids(&mut b, "tokens", tokens + SPARE, DType::U32),
            positions: ids(&mut b, "positions", tokens + SPARE, DType::U32),
            labels: Some(ids(&mut b, "labels", tokens + SPARE, DType::I32)),
            cu_seqlens: ids(&mut b, "cu_seqlens", tokens + SPARE + 1, DType::U32),
        };
        b.ops.push(Op::LoadBatch(b.load.clone()));
        let load = b.load.clone();
        for id in [Some(load.tokens), Some(load.positions), load.labels, Some(load.cu_seqlens)].into_iter().flatten() {
            b.fields[id.index()].used = tokens;
            b.want(id, 0.0, Plain::Within(0.0));
        }
        b.fields[load.cu_seqlens.index()].used = lengths.len() + 1;
        b
    }

    /// Names the fields that follow.
    fn part(&mut self, part: impl std::fmt::Display) {
        self.part = format!("{:?} tokens, {part}", self.tokens);
    }

    /// Random numbers of about unit size, rounded to bf16.
    fn random(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| round((0..4).map(|_| self.rng.random_range(-0.9f32..0.9)).sum())).collect()
    }

    fn field(&mut self, name: &str, shape: &[usize], contents: Contents, used: usize) -> TensorId {
        let id = TensorId(self.fields.len() as u32);
        let name = format!("{}: {name}", self.part);
        self.fields.push(Field { name, shape: shape.into(), contents, used, space: Space::Device, unseen: false });
        id
    }

    /// Elements of the compute dtype, a weight.
    fn elems(&mut self, name: &str, shape: &[usize], values: &[f32]) -> TensorId {
        assert!(values.len() <= shape.iter().product());
        self.field(name, shape, Contents::Elems(values.into()), values.len())
    }

    /// An activation `[T, width]` of the compute dtype.
    fn act(&mut self, name: &str, width: usize, values: &[f32]) -> TensorId {
        assert_eq!(values.len(), self.tokens * width);
        self.elems(name, &[self.tokens + SPARE, width], values)
    }

    /// An activation that an operation writes: NaN until then.
    fn out(&mut self, name: &str, width: usize) -> TensorId {
        let used = self.tokens * width;
        self.field(name, &[self.tokens + SPARE, width], Contents::Elems(Vec::new()), used)
    }

    /// An f32 for each token and column that an operation writes.
    fn out_f32(&mut self, name: &str, width: usize) -> TensorId {
        let id = self.bytes::<f32>(name, DType::F32, &[self.tokens + SPARE, width], &[]);
        self.fields[id.index()].used = self.tokens * width;
        id
    }

    /// f32 in both dtypes.
    fn f32s(&mut self, name: &str, shape: &[usize], values: &[f32]) -> TensorId {
        self.bytes(name, DType::F32, shape, values)
    }

    /// Any dtype, the same in both.
    fn bytes<T: bytemuck::Pod>(&mut self, name: &str, dtype: DType, shape: &[usize], values: &[T]) -> TensorId {
        assert_eq!(dtype.size_in_bytes(), size_of::<T>());
        self.field(name, shape, Contents::Bytes(dtype, bytemuck::cast_slice(values).to_vec()), values.len())
    }

    /// A region between operations.
    fn between(&mut self, name: &str, shape: &[usize], values: &[f32]) -> TensorId {
        let id = self.field(name, shape, Contents::Elems(values.into()), 0);
        self.fields[id.index()].unseen = true;
        id
    }

    /// Puts a region on the host.
    fn on_host(&mut self, id: TensorId) {
        self.fields[id.index()].space = Space::Host;
    }

    fn op(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// An output: its largest error in f32, and the plain computation in bf16.
    fn want(&mut self, id: TensorId, f32: f64, bf16: Plain) -> &mut Want {
        self.wants.push(Want { id, f32, bf16, scale: 0.0 });
        self.wants.last_mut().unwrap()
    }

    fn plan(&self, device: DeviceKind, compute: DType) -> MemoryPlan {
        let mut spec = ModelSpec::preset("mistral-7b-v0.1").unwrap();
        spec.rms_norm_eps = 1e-5;
        let regions = self.fields.iter().map(|f| Region {
            name: f.name.clone(),
            stage: Stage::Activations,
            dtype: f.dtype(compute),
            shape: f.shape.clone(),
            space: f.space,
            lifetime: Lifetime::Persistent,
            offset: 0,
        });
        of_ops(spec, regions.collect(), self.ops.clone(), device, compute)
    }

    /// Executes everything and reads every region.
    fn execute(&self, backend: &mut dyn Backend, plan: &MemoryPlan) -> Done {
        let compute = plan.config().compute_dtype;
        for (i, field) in self.fields.iter().enumerate() {
            backend.write(TensorId(i as u32), &field.bytes(compute)).unwrap();
        }
        *backend.state() = self.state.clone();
        backend.set_batch(self.batch.clone());
        backend.begin().unwrap();
        for (op, &scratch) in self.ops.iter().zip(plan.scratch(Phase::MicroStep)) {
            backend.poison(&[], scratch).unwrap();
            backend.run(op, scratch).unwrap_or_else(|e| panic!("{op:?}: {e}"));
        }
        backend.wait().unwrap();
        let ids = (0..self.fields.len()).map(|i| TensorId(i as u32));
        Done {
            regions: ids.map(|id| backend.read(id).unwrap().into_owned()).collect(),
            dtypes: self.fields.iter().map(|f| f.dtype(compute)).collect(),
            logits: backend.logits().to_vec(),
        }
    }

    fn on_cpu(&self) -> Done {
        let plan = self.plan(DeviceKind::Cpu, DType::F32);
        self.execute(&mut CpuOps::new(&plan, self.state.clone()).unwrap(), &plan)
    }

    /// Executes everything on the CPU and on the GPU and compares; what the GPU gave in f32 and in bf16. With TUNEBOOK_TEST_F32 set,
    /// in f32 alone: compute-sanitizer's racecheck cannot follow cuBLASLt's bf16 products on Hopper.
    fn check(&self) -> Vec<Done> {
        let cpu = self.on_cpu();
        let all = if std::env::var_os("TUNEBOOK_TEST_F32").is_some() { 1 } else { 2 };
        let one = |compute: DType| {
            let plan = self.plan(DeviceKind::Cuda, compute);
            let mut backend = CudaOps::new(&plan, self.state.clone()).unwrap();
            let done = self.execute(&mut backend, &plan);
            let again = self.execute(&mut backend, &plan);
            for (i, field) in self.fields.iter().enumerate() {
                let id = TensorId(i as u32);
                let (bytes, before) = (&done.regions[i], field.bytes(compute));
                assert!(*bytes == again.regions[i], "{} ({compute:?}): other bits the second time", field.name);
                if field.unseen {
                    continue;
                }
                let Some(want) = self.wants.iter().find(|w| w.id == id) else {
                    assert!(*bytes == before, "{} ({compute:?}): an input was written to", field.name);
                    continue;
                };
                let used = field.used * field.dtype(compute).size_in_bytes();
                assert!(bytes[used..] == before[used..], "{} ({compute:?}): written beyond its end", field.name);
                compare(field, want, &done.values(id)[..field.used], &cpu.values(id)[..field.used], compute);
            }
            done
        };
        [DType::F32, DType::BF16].into_iter().take(all).map(one).collect()
    }
}

/// Checks one output.
fn compare(field: &Field, want: &Want, ours: &[f64], cpu: &[f64], compute: DType) {
    let size = norm(cpu.iter().copied()).max(want.scale * (cpu.len() as f64).sqrt()).max(f64::MIN_POSITIVE);
    let error = norm(ours.iter().zip(cpu).map(|(a, b)| a - b)) / size;
    let limit = match (&want.bf16, compute) {
        (_, DType::F32) => want.f32,
        (Plain::Within(limit), _) => *limit,
        (Plain::Rounded, _) => 2.0 * plain_error(cpu, cpu.iter().map(|x| round(*x as f32)), size) + want.f32,
        (Plain::Values(plain), _) => {
            assert_eq!(plain.len(), cpu.len(), "{}", field.name);
            2.0 * plain_error(cpu, plain.iter().copied(), size) + want.f32
        }
    };
    println!("{} ({compute:?}): error {error:.2e}, limit {limit:.2e}", field.name);
    assert!(limit < 0.1, "{}: the plain computation is another one: limit {limit:.3e}", field.name);
    assert!(error <= limit, "{} ({compute:?}): error {error:.3e}, limit {limit:.3e}", field.name);
}

fn plain_error(cpu: &[f64], plain: impl Iterator<Item = f32>, size: f64) -> f64 {
    norm(plain.zip(cpu).map(|(a, b)| f64::from(a) - b)) / size
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// Root of the mean square.
fn rms(x: &[f32]) -> f64 {
    norm(x.iter().map(|x| f64::from(*x))) / (x.len() as f64).sqrt()
}

/// What a backend left in the regions.
struct Done {
    regions: Vec<Vec<u8>>,
    dtypes: Vec<DType>,
    logits: Vec<f32>,
}

impl Done {
    /// Every element of a region.
    fn values(&self, id: TensorId) -> Vec<f64> {
        fn all<T: bytemuck::Pod>(bytes: &[u8], value: impl Fn(T) -> f64) -> Vec<f64> {
            bytemuck::pod_collect_to_vec::<u8, T>(bytes).into_iter().map(value).collect()
        }
        let bytes = &self.regions[id.index()];
        match self.dtypes[id.index()] {
            DType::F32 => all(bytes, <f64 as From<f32>>::from),
            DType::BF16 => all(bytes, bf16::to_f64),
            DType::F64 => all(bytes, |x: f64| x),
            DType::U32 => all(bytes, <f64 as From<u32>>::from),
            DType::I32 => all(bytes, <f64 as From<i32>>::from),
            DType::U8 => all(bytes, <f64 as From<u8>>::from),
            dtype => panic!("{dtype:?}"),
        }
    }

    /// The first `n` elements of a region as f32.
    fn f32s(&self, id: TensorId, n: usize) -> Vec<f32> {
        self.values(id)[..n].iter().map(|x| *x as f32).collect()
    }
}

/// `a b` for a `[m, k]` and b `[k, n]`, row-major.
fn product(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0f32; m * n];
    if n * k == 0 {
        return out;
    }
    for (out, a) in out.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
        for (a, b) in a.iter().zip(b.chunks_exact(n)) {
            out.iter_mut().zip(b).for_each(|(o, b)| *o += a * b);
        }
    }
    out
}

/// `[cols, rows]` of x `[rows, cols]`.
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Element by element.
fn plus(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
