//! [`Adapter`]: the matrices A and B of every adapted module, in PEFT's files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::DType;
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::adapter_config::AdapterConfig;
use super::config::{LoraConfig, Targets};
use crate::model::{Checkpoint, LinearModule, ModelSpec, SafetensorsWriter, TensorHeader, pt_metadata};
use crate::{Error, Result, files};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// A and B of one module: it adds `scaling * B A x` to `W x`.
#[derive(Clone, PartialEq)]
pub struct LoraPair {
    /// A, row-major `[r, in_features]`.
    pub a: Vec<f32>,
    /// B, row-major `[out_features, r]`.
    pub b: Vec<f32>,
    /// Rank.
    pub r: usize,
    /// Columns of the weight that is adapted.
    pub in_features: usize,
    /// Rows of the weight that is adapted.
    pub out_features: usize,
    /// Factor of `B A`.
    pub scaling: f64,
}

impl fmt::Debug for LoraPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, i, o, s) = (self.r, self.in_features, self.out_features, self.scaling);
        write!(f, "LoraPair(A [{r}, {i}], B [{o}, {r}], scaling {s})")
    }
}

/// A LoRA adapter in memory, in f32.
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
#[derive(Clone, PartialEq)]
pub struct Adapter {
    /// What `adapter_config.json` says.
    pub config: AdapterConfig,
    /// Module path (`model.layers.0.self_attn.q_proj`) to its matrices.
    pub tensors: BTreeMap<String, LoraPair>,
}

impl Adapter {
    /// A fresh adapter for every module that `config` targets: A uniform in `±1/sqrt(in)` (PEFT's default,
    /// `kaiming_uniform_` with a = sqrt 5), B zero, so that it changes nothing yet.
    ///
    /// The same seed gives the same numbers, module by module, whatever else is targeted.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`] and [`LoraConfig::discover`].
    pub fn init(spec: &ModelSpec, config: &LoraConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let mut tensors = BTreeMap::new();
        let index: BTreeMap<String, u64> = spec.linears().into_iter().map(|m| m.name).zip(0..).collect();
        for m in config.discover(spec)?.matched {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(index.get(&m.name).copied().unwrap_or_default());
            let bound = 1.0 / (m.in_features as f32).sqrt();
            let a = (0..config.r * m.in_features).map(|_| rng.random_range(-bound..bound)).collect();
            let pair = LoraPair {
                a,
                b: vec![0.0; m.out_features * config.r],
                r: config.r,
                in_features: m.in_features,
                out_features: m.out_features,
                scaling: config.scaling(),
            };
            tensors.insert(m.name, pair);
        }
        Ok(Adapter { config: AdapterConfig::new(config.clone(), Some(spec.name.clone())), tensors })
    }

    /// Reads `adapter_config.json` and `adapter_model.safetensors`, as PEFT and this library write them.
    ///
    /// Keys may hold the adapter's name (`lora_A.default.weight`); F32, BF16 and F16 are read.
    ///
    /// # Errors
    /// Files that are missing or damaged, a variant of LoRA that is not supported (with the reason), a pair of which
    /// one half is missing, and shapes or ranks that do not fit together.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        AdapterFiles::open(dir)?.read()
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` (F32) in PEFT's form; the directory is created.
    ///
    /// Each file appears whole or not at all; the weights come first, the config last.
    ///
    /// # Errors
    /// Matrices whose length is not their shape's, and a directory that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        files::create_dir_all(dir)?;
        let mut headers = Vec::with_capacity(2 * self.tensors.len());
        for (module, p) in &self.tensors {
            for (half, data, shape) in p.halves() {
                if Some(data.len()) != shape[0].checked_mul(shape[1]) {
                    return Err(Error::new("a matrix of the adapter has the wrong length")
                        .at(format!("{module}.lora_{half}"))
                        .expected(format!("{shape:?}"))
                        .found(format!("{} values", data.len())));
                }
                headers.push(TensorHeader::new(key(module, half), DType::F32, shape));
            }
        }
        crate::model::canonical_order(&mut headers);
        let mut data: BTreeMap<String, &[f32]> = BTreeMap::new();
        for (module, p) in &self.tensors {
            data.extend(p.halves().map(|(half, d, _)| (key(module, half), d)));
        }
        let mut w = SafetensorsWriter::create(dir.join(WEIGHTS), headers.clone(), &pt_metadata())?;
        for h in &headers {
            w.write_f32(&h.name, data.get(&h.name).copied().unwrap_or_default())?;
        }
        w.finish()?;
        let mut config = self.config.clone();
        if config.lora.target_modules == Targets::AllLinear {
            // PEFT writes the names that it stands for.
            let leaves: BTreeSet<_> = self.tensors.keys().filter_map(|m| m.rsplit('.').next()).collect();
            config.lora.target_modules = Targets::List(leaves.into_iter().map(Into::into).collect());
        }
        files::write_atomic_bytes(dir.join(CONFIG), config.to_json().as_bytes())
    }

    /// Checks that every module is a linear module of this model with this shape.
    ///
    /// # Errors
    /// The first module that is not: the adapter belongs to another model.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        let shapes = self.tensors.iter().map(|(m, p)| (m.as_str(), p.out_features, p.in_features));
        check_modules(spec, shapes, self.config.base_model_name_or_path.as_deref())
    }

    /// Trainable parameters: all elements of A and B.
    pub fn params(&self) -> u64 {
        self.tensors.values().map(|p| (p.a.len() + p.b.len()) as u64).sum()
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({} modules, {} parameters, {:?})", self.tensors.len(), self.params(), self.config)
    }
}

impl LoraPair {
    fn halves(&self) -> [(char, &[f32], Vec<usize>); 2] {
        [('A', &self.a[..], vec![self.r, self.in_features]), ('B', &self.b[..], vec![self.out_features, self.r])]
    }
}

fn key(module: &str, half: char) -> String {
    format!("{PREFIX}{module}.lora_{half}.weight")
}

fn check_modules<'a>(
    spec: &ModelSpec,
    modules: impl Iterator<Item = (&'a str, usize, usize)>,
    trained_on: Option<&str>,
) -> Result<()> {
    let linears: BTreeMap<String, LinearModule> = spec.linears().into_iter().map(|m| (m.name.clone(), m)).collect();
    let wrong = |what: &str, expected: String, found: String| {
        Err(Error::new(what).at(spec.name.clone()).expected(expected).found(found).next(match trained_on {
            Some(base) => format!("the adapter says that it was trained on `{base}`: use that base model"),
            None => "use the base model that the adapter was trained on".into(),
        }))
    };
    for (module, out_features, in_features) in modules {
        let Some(m) = linears.get(module) else {
            let layers = format!("a module of {} layers", spec.num_hidden_layers);
            return wrong("the adapter belongs to another model", layers, format!("`{module}`"));
        };
        if (m.out_features, m.in_features) != (out_features, in_features) {
            return wrong(
                "the adapter belongs to another model",
                format!("{module} [{}, {}]", m.out_features, m.in_features),
                format!("B A of shape [{out_features}, {in_features}]"),
            );
        }
        if module == "lm_head" && spec.tie_word_embeddings {
            return wrong(
                "a tied lm_head cannot be adapted",
                "modules with a weight of their own".into(),
                module.into(),
            );
        }
    }
    Ok(())
}

/// An adapter's files with only headers read: merging takes one pair at a time.
#[derive(Clone)]
pub(super) struct AdapterFiles {
    pub config: AdapterConfig,
    weights: Checkpoint,
    modules: BTreeMap<String, Entry>,
}

/// Keys and shape of one module's pair.
#[derive(Clone)]
struct Entry {
    a: String,
    b: String,
    r: usize,
    in_features: usize,
    out_features: usize,
    scaling: f64,
}

impl AdapterFiles {
    pub(super) fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join(CONFIG);
        let text = files::read_to_string(&path)
            .map_err(|e| e.next("an adapter directory holds adapter_config.json and adapter_model.safetensors"))?;
        let config = AdapterConfig::from_json(&text).map_err(|e| e.at_path(&path))?;
        let path = weights_path(dir)?;
        let weights = Checkpoint::open(&path)?;
        let modules = entries(&config, &weights).map_err(|e| e.at_path(&path))?;
        Ok(AdapterFiles { config, weights, modules })
    }

    pub(super) fn check(&self, spec: &ModelSpec) -> Result<()> {
        let shapes = self.modules.iter().map(|(m, e)| (m.as_str(), e.out_features, e.in_features));
        check_modules(spec, shapes, self.config.base_model_name_or_path.as_deref())
    }

    /// Module paths, sorted.
    pub(super) fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// The pair of a module, if it is adapted.
    pub(super) fn pair(&self, module: &str) -> Result<Option<LoraPair>> {
        let Some(e) = self.modules.get(module) else { return Ok(None) };
        Ok(Some(LoraPair {
            a: self.weights.read_f32(&e.a)?,
            b: self.weights.read_f32(&e.b)?,
            r: e.r,
            in_features: e.in_features,
            out_features: e.out_features,
            scaling: e.scaling,
        }))
    }

    fn read(self) -> Result<Adapter> {
        let mut tensors = BTreeMap::new();
        for module in self.modules.keys() {
            if let Some(pair) = self.pair(module)? {
                tensors.insert(module.clone(), pair);
            }
        }
        Ok(Adapter { config: self.config, tensors })
    }
}

fn weights_path(dir: &Path) -> Result<PathBuf> {
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join("adapter_model.bin").exists() {
        return Err(Error::new("the adapter is not in safetensors form")
            .at_path(dir)
            .expected(WEIGHTS)
            .found("adapter_model.bin")
            .next("load it with PEFT and save it again: save_pretrained writes safetensors"));
    }
    Ok(path)
}

/// Sorts the keys of the file into pairs, and checks each against the config.
fn entries(config: &AdapterConfig, weights: &Checkpoint) -> Result<BTreeMap<String, Entry>> {
    let mut halves: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
    for name in weights.names() {
        let Some((module, half)) = parse_key(&name)? else { continue };
        let slot = &mut halves.entry(module.to_string()).or_default()[half];
        if let Some(other) = slot.replace(name.clone()) {
            return Err(Error::new("the adapter holds a matrix twice").found(format!("{other} and {name}")));
        }
    }
    if halves.is_empty() {
        return Err(Error::new("the adapter holds no LoRA matrices")
            .expected(key("model.layers.0.self_attn.q_proj", 'A'))
            .found(format!("{} tensors", weights.names().len()))
            .next("check that the adapter was saved by PEFT's save_pretrained"));
    }
    let mut out = BTreeMap::new();
    for (module, [a, b]) in halves {
        let (Some(a), Some(b)) = (a, b) else {
            return Err(Error::new("half of a LoRA pair is missing")
                .at(module)
                .expected("lora_A and lora_B")
                .found("one of them")
                .next("save the adapter again"));
        };
        let shape = |key: &str| -> Result<[usize; 2]> {
            let info = weights.info(key)?;
            <[usize; 2]>::try_from(info.shape.as_slice()).ok().filter(|s| !s.contains(&0)).ok_or_else(|| {
                Error::new("a LoRA matrix has the wrong number of dimensions")
                    .at(key.to_string())
                    .expected("[r, in] or [out, r]")
                    .found(format!("{:?}", info.shape))
            })
        };
        let ([r, in_features], [out_features, r_of_b]) = (shape(&a)?, shape(&b)?);
        let lora = config.of(&module)?;
        if r != r_of_b || r != lora.r {
            return Err(Error::new("the rank of a LoRA pair is not what the config says")
                .at(module)
                .expected(format!("r = {}", lora.r))
                .found(format!("A [{r}, {in_features}], B [{out_features}, {r_of_b}]"))
                .next("adapter_config.json and adapter_model.safetensors belong to different adapters"));
        }
        out.insert(module, Entry { a, b, r, in_features, out_features, scaling: lora.scaling() });
    }
    Ok(out)
}

/// Module path and 0 for A or 1 for B; `None` for a key that may be passed over.
fn parse_key(name: &str) -> Result<Option<(&str, usize)>> {
    let refuse = |reason: &str| {
        Err(Error::new("the adapter holds a tensor that is not supported")
            .at(name.to_string())
            .expected("only lora_A and lora_B of linear modules")
            .found(reason.to_string())
            .next("merge it with PEFT, and use the merged model here"))
    };
    let Some(path) = name.strip_prefix(PREFIX) else {
        return refuse(&format!("a key that does not start with {PREFIX}"));
    };
    for (half, mark) in [".lora_A", ".lora_B"].into_iter().enumerate() {
        for end in [".weight", ".default.weight"] {
            if let Some(module) = path.strip_suffix(end).and_then(|p| p.strip_suffix(mark)) {
                return Ok(Some((module, half)));
            }
        }
    }
    // PEFT stores a copy of the base weight beside an adapted lm_head or embedding.
    if path.ends_with(".base_layer.weight") {
        return Ok(None);
    }
    refuse(match path {
        p if p.contains("lora_magnitude_vector") => "the magnitudes of DoRA",
        p if p.contains("lora_embedding_") => "LoRA on an embedding table",
        p if p.ends_with("lora_B.bias") => "a bias of B (lora_bias)",
        p if p.contains("token_adapter") => "trained token rows",
        p if p.contains(".lora_A.") || p.contains(".lora_B.") => "an adapter with a name other than default",
        _ => "a whole weight (modules_to_save or bias)",
    })
}
