//! [`Adapter`]: the matrices A and B of every adapted module, in PEFT's files.

use std::borrow::Cow;
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
/// The module whose adapter is of its transpose.
pub(super) const EMBEDDING: &str = "model.embed_tokens";

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
    /// DoRA's lengths of the rows, `[out_features]`: the weight is `magnitude / |W + scaling * B A| * (W + scaling * B A)`,
    /// row by row.
    pub magnitude: Option<Vec<f32>>,
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
    /// Module path (`model.layers.0.self_attn.q_proj`) to its matrices. The embedding table's (`model.embed_tokens`) are
    /// those of its transpose: `b` `[V, r]`, `a` `[r, C]`.
    pub tensors: BTreeMap<String, LoraPair>,
    /// Biases that were trained beside the adapter (PEFT's `bias`), whole: module path to `[out_features]`.
    pub biases: BTreeMap<String, Vec<f32>>,
}

impl Adapter {
    /// A fresh adapter for every module that `config` targets: A uniform in `±1/sqrt(in)` (PEFT's default,
    /// `kaiming_uniform_` with a = sqrt 5), B zero, so that it changes nothing yet.
    ///
    /// The same seed gives the same numbers, module by module, whatever else is targeted. DoRA's magnitudes are those of the
    /// base's rows, which are not known here: [`Engine::init_adapter`](crate::engine::Engine::init_adapter) adds them.
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
            let own = config.of(&m.name)?;
            let a = (0..own.r * m.in_features).map(|_| rng.random_range(-bound..bound)).collect();
            let pair = LoraPair {
                a,
                b: vec![0.0; m.out_features * own.r],
                r: own.r,
                in_features: m.in_features,
                out_features: m.out_features,
                scaling: own.scaling(),
                magnitude: None,
            };
            tensors.insert(m.name, pair);
        }
        Ok(Adapter {
            config: AdapterConfig::new(config.clone(), Some(spec.name.clone())),
            tensors,
            biases: BTreeMap::new(),
        })
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
        let mut data: BTreeMap<String, Cow<'_, [f32]>> = BTreeMap::new();
        for (module, p) in &self.tensors {
            for (name, values, shape) in p.parts(module) {
                if Some(values.len()) != shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) {
                    return Err(Error::new("a matrix of the adapter has the wrong length")
                        .at(name)
                        .expected(format!("{shape:?}"))
                        .found(format!("{} values", values.len())));
                }
                headers.push(TensorHeader::new(name.clone(), DType::F32, shape));
                data.insert(name, values);
            }
        }
        for (module, values) in &self.biases {
            let name = format!("{PREFIX}{module}.bias");
            headers.push(TensorHeader::new(name.clone(), DType::F32, vec![values.len()]));
            data.insert(name, Cow::Borrowed(values));
        }
        crate::model::canonical_order(&mut headers);
        let mut w = SafetensorsWriter::create(dir.join(WEIGHTS), headers.clone(), &pt_metadata())?;
        for h in &headers {
            w.write_f32(&h.name, data.get(&h.name).map(AsRef::as_ref).unwrap_or_default())?;
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

    /// Trainable parameters: all elements of A and B, of DoRA's magnitudes, of trained biases.
    pub fn params(&self) -> u64 {
        let pair = |p: &LoraPair| p.a.len() + p.b.len() + p.magnitude.as_ref().map_or(0, Vec::len);
        let biases: usize = self.biases.values().map(Vec::len).sum();
        (self.tensors.values().map(pair).sum::<usize>() + biases) as u64
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({} modules, {} parameters, {:?})", self.tensors.len(), self.params(), self.config)
    }
}

impl LoraPair {
    /// The same change of the weight at a higher rank and another scaling: zeros fill up A and B.
    pub(crate) fn padded(&self, r: usize, scaling: f64) -> Result<LoraPair> {
        if self.r > r {
            return Err(Error::new("the adapter's rank is above the plan's")
                .expected(format!("at most {r}"))
                .found(self.r.to_string())
                .next("plan with .adapter(LoraConfig::covering(&[..])) of all adapters"));
        }
        let mut a = self.a.clone();
        a.resize(r * self.in_features, 0.0);
        let factor = (self.scaling / scaling) as f32;
        let row = |row: &[f32]| {
            row.iter().map(|b| b * factor).chain(std::iter::repeat_n(0.0, r - self.r)).collect::<Vec<_>>()
        };
        let b = self.b.chunks_exact(self.r).flat_map(row).collect();
        Ok(LoraPair { a, b, r, scaling, ..self.clone() })
    }

    /// What the file holds of a module: name, values, shape.
    fn parts(&self, module: &str) -> Vec<(String, Cow<'_, [f32]>, Vec<usize>)> {
        let (r, i, o) = (self.r, self.in_features, self.out_features);
        if module == EMBEDDING {
            let name = |half: char| format!("{PREFIX}{module}.lora_embedding_{half}");
            let (a, b) = (transposed(&self.b, r), transposed(&self.a, i));
            return vec![(name('A'), Cow::Owned(a), vec![r, o]), (name('B'), Cow::Owned(b), vec![i, r])];
        }
        let mut out = vec![
            (key(module, 'A'), Cow::Borrowed(&self.a[..]), vec![r, i]),
            (key(module, 'B'), Cow::Borrowed(&self.b[..]), vec![o, r]),
        ];
        out.extend(self.magnitude.as_ref().map(|m| (magnitude_key(module), Cow::Borrowed(&m[..]), vec![o])));
        out
    }
}

/// Of a matrix with rows of `width`.
fn transposed(x: &[f32], width: usize) -> Vec<f32> {
    let rows = x.len() / width.max(1);
    (0..x.len()).map(|n| x[n % rows * width + n / rows]).collect()
}

fn magnitude_key(module: &str) -> String {
    format!("{PREFIX}{module}.lora_magnitude_vector")
}

fn key(module: &str, half: char) -> String {
    format!("{PREFIX}{module}.lora_{half}.weight")
}

fn check_modules<'a>(
    spec: &ModelSpec,
    modules: impl Iterator<Item = (&'a str, usize, usize)>,
    trained_on: Option<&str>,
) -> Result<()> {
    let linears: BTreeMap<String, LinearModule> = spec.matrices().into_iter().map(|m| (m.name.clone(), m)).collect();
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
    }
    Ok(())
}

/// An adapter's files with only headers read: merging takes one pair at a time.
#[derive(Clone)]
pub(super) struct AdapterFiles {
    pub config: AdapterConfig,
    weights: Checkpoint,
    modules: BTreeMap<String, Entry>,
    /// Key of each module's trained bias.
    biases: BTreeMap<String, String>,
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
    magnitude: Option<String>,
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
        let (modules, biases) = entries(&config, &weights).map_err(|e| e.at_path(&path))?;
        Ok(AdapterFiles { config, weights, modules, biases })
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
        let (mut a, mut b) = (self.weights.read_f32(&e.a)?, self.weights.read_f32(&e.b)?);
        if module == EMBEDDING {
            (a, b) = (transposed(&b, e.r), transposed(&a, e.out_features));
        }
        Ok(Some(LoraPair {
            a,
            b,
            magnitude: e.magnitude.as_ref().map(|key| self.weights.read_f32(key)).transpose()?,
            r: e.r,
            in_features: e.in_features,
            out_features: e.out_features,
            scaling: e.scaling,
        }))
    }

    /// The trained bias of a module, whole.
    pub(super) fn bias(&self, module: &str) -> Result<Option<Vec<f32>>> {
        self.biases.get(module).map(|key| self.weights.read_f32(key)).transpose()
    }

    /// Modules with a trained bias.
    pub(super) fn biased(&self) -> impl Iterator<Item = &str> {
        self.biases.keys().map(String::as_str)
    }

    fn read(self) -> Result<Adapter> {
        let mut tensors = BTreeMap::new();
        for module in self.modules.keys() {
            if let Some(pair) = self.pair(module)? {
                tensors.insert(module.clone(), pair);
            }
        }
        let mut biases = BTreeMap::new();
        for module in self.biases.keys() {
            biases.extend(self.bias(module)?.map(|b| (module.clone(), b)));
        }
        Ok(Adapter { config: self.config, tensors, biases })
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

/// Modules with their pairs, and the keys of trained biases.
type Entries = (BTreeMap<String, Entry>, BTreeMap<String, String>);

/// Sorts the keys of the file into pairs, and checks each against the config.
fn entries(config: &AdapterConfig, weights: &Checkpoint) -> Result<Entries> {
    let mut found: BTreeMap<String, [Option<String>; 3]> = BTreeMap::new();
    let mut biases = BTreeMap::new();
    for name in weights.names() {
        let (part, module) = parse_key(&name)?;
        let slot = match part {
            Part::Copy => continue,
            Part::Bias => {
                biases.insert(module.to_string(), name.clone());
                continue;
            }
            Part::A => 0,
            Part::B => 1,
            Part::Magnitude => 2,
        };
        if let Some(other) = found.entry(module.to_string()).or_default()[slot].replace(name.clone()) {
            return Err(Error::new("the adapter holds a matrix twice").found(format!("{other} and {name}")));
        }
    }
    if found.is_empty() {
        return Err(Error::new("the adapter holds no LoRA matrices")
            .expected(key("model.layers.0.self_attn.q_proj", 'A'))
            .found(format!("{} tensors", weights.names().len()))
            .next("check that the adapter was saved by PEFT's save_pretrained"));
    }
    let mut out = BTreeMap::new();
    for (module, parts) in found {
        let entry = entry(config, weights, &module, parts)?;
        out.insert(module, entry);
    }
    for (module, key) in &biases {
        if weights.info(key)?.shape.len() != 1 {
            return Err(Error::new("a bias of the adapter is not a vector").at(module.clone()));
        }
    }
    Ok((out, biases))
}

fn entry(config: &AdapterConfig, weights: &Checkpoint, module: &str, parts: [Option<String>; 3]) -> Result<Entry> {
    let [Some(a), Some(b), magnitude] = parts else {
        return Err(Error::new("half of a LoRA pair is missing")
            .at(module.to_string())
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
    let ([r, mut in_features], [mut out_features, r_of_b]) = (shape(&a)?, shape(&b)?);
    let lora = config.of(module)?;
    if r != r_of_b || r != lora.r {
        return Err(Error::new("the rank of a LoRA pair is not what the config says")
            .at(module.to_string())
            .expected(format!("r = {}", lora.r))
            .found(format!("A [{r}, {in_features}], B [{out_features}, {r_of_b}]"))
            .next("adapter_config.json and adapter_model.safetensors belong to different adapters"));
    }
    if module == EMBEDDING {
        (in_features, out_features) = (out_features, in_features);
    }
    let dora = config.lora.use_dora;
    let length = magnitude.as_ref().map(|key| Ok::<_, Error>(weights.info(key)?.shape)).transpose()?;
    let fits = |shape: &Vec<usize>| shape.iter().product::<usize>() == out_features;
    if dora != length.as_ref().is_some_and(fits) || (length.is_some() && !dora) {
        return Err(Error::new("the magnitudes of DoRA are not what the config says")
            .at(magnitude_key(module))
            .expected(if dora { format!("[{out_features}]") } else { "none: use_dora is false".into() })
            .found(length.map_or("none".into(), |s| format!("{s:?}")))
            .next(if module == EMBEDDING {
                "DoRA on an embedding table is not supported: merge it with PEFT"
            } else {
                "adapter_config.json and adapter_model.safetensors belong to different adapters"
            }));
    }
    Ok(Entry { a, b, r, in_features, out_features, scaling: lora.scaling(), magnitude })
}

/// What a tensor of the file is.
#[derive(Clone, Copy)]
enum Part {
    A,
    B,
    Magnitude,
    /// Of a linear module, whole, in place of the base's.
    Bias,
    /// The base's own weight, which PEFT stores beside an adapted `lm_head` or embedding.
    Copy,
}

/// What a tensor is, and the path of its module.
fn parse_key(name: &str) -> Result<(Part, &str)> {
    let refuse = |reason: &str| {
        Err(Error::new("the adapter holds a tensor that is not supported")
            .at(name.to_string())
            .expected("LoRA matrices, DoRA magnitudes and biases of linear modules, or LoRA on the embedding table")
            .found(reason.to_string())
            .next("merge it with PEFT, and use the merged model here"))
    };
    let Some(path) = name.strip_prefix(PREFIX) else {
        return refuse(&format!("a key that does not start with {PREFIX}"));
    };
    // Keys may hold the adapter's name.
    let plain = |mark: &str, ends: &[&str]| {
        ends.iter().find_map(|end| path.strip_suffix(end)).and_then(|p| p.strip_suffix(mark))
    };
    let weight: &[&str] = &[".default.weight", ".weight"];
    let bare: &[&str] = &[".default.weight", ".weight", ".default", ""];
    let marks: [(&str, &[&str], Part); 5] = [
        (".lora_A", weight, Part::A),
        (".lora_B", weight, Part::B),
        (".lora_magnitude_vector", bare, Part::Magnitude),
        (".lora_embedding_A", &[".default", ""], Part::A),
        (".lora_embedding_B", &[".default", ""], Part::B),
    ];
    for (mark, ends, part) in marks {
        if let Some(module) = plain(mark, ends) {
            if mark.contains("embedding") && module != EMBEDDING {
                return refuse("LoRA on a table other than the token embeddings");
            }
            return Ok((part, module));
        }
    }
    if let Some(module) = path.strip_suffix(".base_layer.weight") {
        return Ok((Part::Copy, module));
    }
    if let Some(module) = path.strip_suffix(".bias").filter(|m| !m.contains(".lora_")) {
        return Ok((Part::Bias, module.strip_suffix(".base_layer").unwrap_or(module)));
    }
    refuse(match path {
        p if p.ends_with("lora_B.bias") || p.ends_with("lora_B.default.bias") => "a bias of B (lora_bias)",
        p if p.contains("token_adapter") => "trained token rows",
        p if p.contains(".lora_A.") || p.contains(".lora_B.") => "an adapter with a name other than default",
        _ => "a whole weight (modules_to_save)",
    })
}
