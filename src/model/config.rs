//! From a Hugging Face `config.json` to a [`ModelSpec`], with every size checked.
//!
//! Defaults for absent keys are those of transformers' config classes. What would change the arithmetic and is not
//! computed here is refused by name.

use std::path::Path;

use candle_core::DType;
use serde_json::{Map, Value};

use super::rope_config;
use super::spec::{Activation, Experts, Family, ModelSpec};
use crate::{Error, Result, files};

impl ModelSpec {
    /// Reads the text of a `config.json`; old (`rope_theta`, `torch_dtype`) and new (`rope_parameters`, `dtype`) keys.
    ///
    /// `name` is shown in reports and errors. A `quantization_config` is left to [`Base`](super::Base): the shape of
    /// the model is the same with and without it.
    ///
    /// # Errors
    /// Text that is not JSON, a family that is not supported (by name), and sizes that cannot be: each names the
    /// field, what was expected and what was found.
    pub fn from_json(name: &str, json: &str) -> Result<Self> {
        parse(name, json).map_err(|e| e.at(name.to_string()))
    }

    /// Reads `config.json` in a model directory, and the stop tokens of `generation_config.json` if there is one.
    ///
    /// The spec is named after the directory.
    ///
    /// # Errors
    /// As [`ModelSpec::from_json`], and files that cannot be read.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let text = files::read_to_string(&path)
            .map_err(|e| e.next("a model directory holds config.json beside its safetensors files"))?;
        let name = std::path::absolute(dir)
            .ok()
            .and_then(|d| d.file_name().map(|n| n.to_string_lossy().into_owned()))
            .unwrap_or_else(|| dir.display().to_string());
        let mut spec = parse(&name, &text).map_err(|e| e.at_path(&path))?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let text = files::read_to_string(&path)?;
            let more = generation_eos(&text).map_err(|e| e.at_path(&path))?;
            spec.eos_token_id.extend(more);
            let mut seen = std::collections::HashSet::new();
            spec.eos_token_id.retain(|id| seen.insert(*id));
        }
        Ok(spec)
    }
}

fn generation_eos(json: &str) -> Result<Vec<u32>> {
    token_ids(&Fields { map: &object(json)?, prefix: "" }, "eos_token_id")
}

fn object(json: &str) -> Result<Map<String, Value>> {
    match crate::json::parse(json.as_bytes()) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Error::new("not a JSON object").expected("{\"model_type\": ...}").found(kind(&other))),
        Err(e) => Err(Error::new("not valid JSON").caused_by(e).next("download the file again, or correct it there")),
    }
}

fn parse(name: &str, json: &str) -> Result<ModelSpec> {
    let map = object(json)?;
    let f = Fields { map: &map, prefix: "" };
    let family = family(&f)?;
    refuse_variants(&f, family)?;
    let default = Defaults::of(family);
    let hidden_size = f.size("hidden_size", None, 1 << 20)?;
    let num_attention_heads = f.size("num_attention_heads", None, 1 << 14)?;
    let num_hidden_layers = f.size("num_hidden_layers", None, 1 << 12)?;
    // Where the key is absent the config class has a number, where it is null all heads have keys of their own.
    let kv_default = default.kv_heads.filter(|_| !map.contains_key("num_key_value_heads"));
    let max_position_embeddings = f.size("max_position_embeddings", Some(default.max_position), 1 << 30)?;
    let head_dim = head_dim(&f, hidden_size, num_attention_heads, default.head_dim)?;
    let (rope_theta, rope_scaling) = rope_config::read(&f, family, max_position_embeddings, head_dim)?;
    let (sliding_window, full_attention_layers) = sliding_window(&f, family, num_hidden_layers)?;
    let bias = f.bool("attention_bias", false)? && family != Family::Qwen2;
    let gemma2 = family == Family::Gemma2;
    let cap = |key: &str, default: f64| match f.map.get(key) {
        // null turns the cap off.
        Some(Value::Null) => Ok(None),
        _ => f.float(key, Some(default), 1e-3, 1e9).map(Some),
    };
    let spec = ModelSpec {
        name: name.to_string(),
        family,
        vocab_size: f.size("vocab_size", None, 1 << 24)?,
        hidden_size,
        intermediate_size: f.size("intermediate_size", None, 1 << 22)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: f.size("num_key_value_heads", kv_default.or(Some(num_attention_heads)), 1 << 14)?,
        head_dim,
        max_position_embeddings,
        rms_norm_eps: f.float("rms_norm_eps", Some(default.rms_norm_eps), 0.0, 1.0)?,
        rope_theta,
        rope_scaling,
        sliding_window,
        full_attention_layers,
        qkv_bias: bias || family == Family::Qwen2,
        o_bias: bias,
        mlp_bias: f.bool("mlp_bias", false)?,
        activation: activation(&f, family)?,
        query_pre_attn_scalar: match gemma2 {
            true => Some(f.float("query_pre_attn_scalar", Some(256.0), 1e-3, 1e9)?),
            false => None,
        },
        attn_logit_softcapping: if gemma2 { cap("attn_logit_softcapping", 50.0)? } else { None },
        final_logit_softcapping: if gemma2 { cap("final_logit_softcapping", 30.0)? } else { None },
        experts: match family {
            Family::Mixtral => Some(experts(&f)?),
            _ => None,
        },
        tie_word_embeddings: f.bool("tie_word_embeddings", family.is_gemma())?,
        dtype: dtype(&f)?,
        bos_token_id: token_ids(&f, "bos_token_id")?.first().copied(),
        eos_token_id: token_ids(&f, "eos_token_id")?,
        pad_token_id: pad(&f)?,
    };
    if !spec.num_attention_heads.is_multiple_of(spec.num_key_value_heads) {
        return Err(Error::new("query heads cannot be shared among key and value heads")
            .at("num_key_value_heads")
            .expected(format!("a divisor of num_attention_heads = {}", spec.num_attention_heads))
            .found(spec.num_key_value_heads.to_string())
            .next("compare config.json with the model's page"));
    }
    Ok(spec)
}

/// What a family's config class has where a key is absent.
struct Defaults {
    /// `None`: as many as query heads.
    kv_heads: Option<usize>,
    /// `None`: `hidden_size / num_attention_heads`.
    head_dim: Option<usize>,
    max_position: usize,
    rms_norm_eps: f64,
}

impl Defaults {
    fn of(family: Family) -> Self {
        let plain = Defaults { kv_heads: None, head_dim: None, max_position: 2048, rms_norm_eps: 1e-6 };
        match family {
            Family::Llama => plain,
            Family::Mistral => Defaults { kv_heads: Some(8), max_position: 32 * 4096, ..plain },
            Family::Mixtral => Defaults { kv_heads: Some(8), max_position: 32 * 4096, rms_norm_eps: 1e-5, ..plain },
            Family::Qwen2 => Defaults { kv_heads: Some(32), max_position: 32_768, ..plain },
            Family::Qwen3 => Defaults { kv_heads: Some(32), head_dim: Some(128), max_position: 32_768, ..plain },
            Family::Phi3 => Defaults { max_position: 4096, rms_norm_eps: 1e-5, ..plain },
            Family::Gemma => Defaults { kv_heads: Some(16), head_dim: Some(256), max_position: 8192, ..plain },
            Family::Gemma2 => Defaults { kv_heads: Some(4), head_dim: Some(256), max_position: 8192, ..plain },
        }
    }
}

fn family(f: &Fields<'_>) -> Result<Family> {
    let architectures: Vec<&str> = match f.map.get("architectures") {
        Some(Value::Array(a)) => a.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let by_type = f.str("model_type")?.map(str::to_string);
    let found = by_type.clone().or(architectures.first().map(|a| a.to_string()));
    let refuse = |found: String| {
        Error::new("this model family is not supported")
            .at("model_type")
            .expected(Family::ALL.map(|f| format!("`{}`", f.model_type())).join(", "))
            .found(format!("`{found}`"))
            .next("use a model of one of these families; ModelSpec::presets() lists some")
    };
    let known = match by_type.as_deref() {
        Some(name) => Family::ALL.into_iter().find(|f| f.model_type() == name),
        None => Family::ALL.into_iter().find(|f| architectures.contains(&f.architecture())),
    };
    let Some(family) = known else { return Err(refuse(found.unwrap_or_else(|| "no model_type".into()))) };
    let head = family.architecture();
    match architectures.first() {
        Some(a) if *a != head => {
            Err(refuse(a.to_string()).at("architectures").expected(format!("`{head}`: a model that predicts tokens")))
        }
        _ => Ok(family),
    }
}

/// Settings that would change the arithmetic, so that ignoring them would give a wrong model.
fn refuse_variants(f: &Fields<'_>, family: Family) -> Result<()> {
    let with_bias: &[Family] = &[Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gemma, Family::Gemma2];
    for (key, families) in [("attention_bias", with_bias), ("mlp_bias", &[Family::Llama])] {
        if f.bool(key, false)? && !families.contains(&family) {
            return Err(Error::new("this family's linear layers have no such bias")
                .at(key)
                .expected("false, or no such key")
                .found("true")
                .next("compare config.json with the model's page"));
        }
    }
    for key in ["attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"] {
        if f.float(key, Some(0.0), 0.0, 1.0)? != 0.0 {
            return Err(Error::new("dropout inside the model is not supported")
                .at(key)
                .expected("0, or no such key")
                .found(f.map.get(key).map(Value::to_string).unwrap_or_default())
                .next(
                    "set it to 0 in config.json: it takes part in training only; lora_dropout is the adapter's own",
                ));
        }
    }
    if f.bool("use_bidirectional_attention", false)? {
        return Err(Error::new("attention to later tokens is not supported")
            .at("use_bidirectional_attention")
            .expected("false, or no such key")
            .found("true")
            .next("use a model that predicts the next token"));
    }
    let rope = f.map.get("rope_parameters").or(f.map.get("rope_scaling")).and_then(Value::as_object);
    let partial = f.map.get("partial_rotary_factor").or(rope.and_then(|r| r.get("partial_rotary_factor")));
    match partial {
        Some(v) if !v.is_null() && v.as_f64() != Some(1.0) => {
            Err(Error::new("partial rotary embeddings are not supported")
                .at("partial_rotary_factor")
                .expected("1.0, or no such key")
                .found(v.to_string())
                .next("use a model that rotates whole heads"))
        }
        _ => Ok(()),
    }
}

fn activation(f: &Fields<'_>, family: Family) -> Result<Activation> {
    let (first, second) = (f.str("hidden_activation")?.map(|a| ("hidden_activation", a)), f.str("hidden_act")?);
    let named = if family.is_gemma() { first.or(second.map(|a| ("hidden_act", a))) } else { None };
    match named.or(second.filter(|_| !family.is_gemma()).map(|a| ("hidden_act", a))) {
        None if family.is_gemma() => Ok(Activation::GeluTanh),
        // What Gemma's first files call gelu is the tanh form, as transformers corrects.
        Some(("hidden_act", "gelu")) if family.is_gemma() => Ok(Activation::GeluTanh),
        None | Some((_, "silu" | "swish")) => Ok(Activation::Silu),
        Some((_, "gelu_pytorch_tanh" | "gelu_new")) => Ok(Activation::GeluTanh),
        Some((key, other)) => Err(Error::new("this activation is not supported")
            .at(key)
            .expected("`silu` (SwiGLU) or `gelu_pytorch_tanh` (GeGLU)")
            .found(format!("`{other}`"))
            .next("use a model with one of these")),
    }
}

fn experts(f: &Fields<'_>) -> Result<Experts> {
    let num_local_experts = f.size("num_local_experts", Some(8), 1 << 12)?;
    let num_experts_per_tok = f.size("num_experts_per_tok", Some(2), num_local_experts)?;
    Ok(Experts { num_local_experts, num_experts_per_tok })
}

fn head_dim(f: &Fields<'_>, hidden_size: usize, heads: usize, default: Option<usize>) -> Result<usize> {
    let derived = default.unwrap_or(hidden_size / heads);
    let given = default.is_some() || f.map.get("head_dim").is_some_and(|v| !v.is_null());
    if !given && (derived == 0 || !hidden_size.is_multiple_of(heads)) {
        return Err(Error::new("heads do not divide the hidden size")
            .at("num_attention_heads")
            .expected(format!("a divisor of hidden_size = {hidden_size}, or a head_dim of its own"))
            .found(heads.to_string())
            .next("compare config.json with the model's page"));
    }
    let d = f.size("head_dim", Some(derived), 1 << 14)?;
    if !d.is_multiple_of(2) {
        return Err(Error::new("head_dim is odd")
            .at("head_dim")
            .expected("an even number: rotary embedding turns pairs of values")
            .found(d.to_string())
            .next("compare config.json with the model's page"));
    }
    Ok(d)
}

/// The window, and the layers that do without it.
fn sliding_window(f: &Fields<'_>, family: Family, layers: usize) -> Result<(Option<usize>, Vec<usize>)> {
    let given = |default| match f.map.get("sliding_window") {
        Some(Value::Null) => Ok(None),
        None if default == 0 => Ok(None),
        _ => f.size("sliding_window", Some(default), 1 << 30).map(Some),
    };
    let window = match family {
        Family::Llama | Family::Gemma => None,
        Family::Mistral | Family::Gemma2 => given(4096)?,
        Family::Phi3 | Family::Mixtral => given(0)?,
        Family::Qwen2 | Family::Qwen3 if f.bool("use_sliding_window", false)? => given(4096)?,
        Family::Qwen2 | Family::Qwen3 => None,
    };
    let full = match (window, family, layer_types(f, layers)?) {
        (None, _, Some(types)) if types.contains(&true) && family == Family::Llama => {
            return Err(Error::new("this family has no sliding window")
                .at("layer_types")
                .expected("full_attention in every layer")
                .found("sliding_attention")
                .next("compare model_type with the model's page"));
        }
        (None, ..) => Vec::new(),
        (Some(_), Family::Gemma2 | Family::Qwen2 | Family::Qwen3, Some(types)) => {
            (0..layers).filter(|&l| !types[l]).collect()
        }
        (Some(_), _, Some(types)) if types.contains(&false) => {
            return Err(Error::new("this family has its window in every layer")
                .at("layer_types")
                .expected("sliding_attention in every layer")
                .found("full_attention")
                .next("compare model_type with the model's page"));
        }
        (Some(_), Family::Gemma2, None) => (0..layers).filter(|l| l % 2 == 1).collect(),
        (Some(_), Family::Qwen2 | Family::Qwen3, None) => {
            let first = match f.map.get("max_window_layers") {
                Some(v) if v.as_u64() == Some(0) => 0,
                _ => f.size("max_window_layers", Some(28), 1 << 30)?,
            };
            (0..layers.min(first)).collect()
        }
        (Some(_), ..) => Vec::new(),
    };
    // A window that no layer uses is none.
    if window.is_some() && full.len() == layers {
        return Ok((None, Vec::new()));
    }
    Ok((window, full))
}

/// Which layers slide, if the config lists them.
fn layer_types(f: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>> {
    let expected = "one of sliding_attention, full_attention for each layer";
    match f.map.get("layer_types") {
        None | Some(Value::Null) => Ok(None),
        v @ Some(Value::Array(types)) if types.len() == layers => types
            .iter()
            .map(|t| match t.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(f.wrong("layer_types", expected, v)),
            })
            .collect::<Result<_>>()
            .map(Some),
        v => Err(f.wrong("layer_types", expected, v)),
    }
}

fn dtype(f: &Fields<'_>) -> Result<DType> {
    let key = ["dtype", "torch_dtype"].into_iter().find(|k| f.map.get(*k).is_some_and(|v| !v.is_null()));
    let Some(key) = key else { return Ok(DType::F32) };
    match f.str(key)?.map(|s| s.trim_start_matches("torch.")) {
        Some("float32" | "float") => Ok(DType::F32),
        Some("bfloat16") => Ok(DType::BF16),
        Some("float16" | "half") => Ok(DType::F16),
        other => Err(Error::new("this dtype is not supported")
            .at(key)
            .expected("float32, bfloat16 or float16")
            .found(other.unwrap_or("null").to_string())
            .next("convert the model to bfloat16 first")),
    }
}

fn pad(f: &Fields<'_>) -> Result<Option<u32>> {
    // Early Llama conversions write -1 for "none".
    if f.map.get("pad_token_id").and_then(Value::as_i64).is_some_and(|id| id < 0) {
        return Ok(None);
    }
    Ok(token_ids(f, "pad_token_id")?.first().copied())
}

/// A token id, a list of them, or nothing.
fn token_ids(f: &Fields<'_>, key: &str) -> Result<Vec<u32>> {
    let one = |v: &Value| {
        let id = v.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| f.wrong(key, "a token id (or a list of them)", Some(v)))
    };
    match f.map.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(v) => Ok(vec![one(v)?]),
    }
}

/// One object of the config, with typed reads that name the field.
pub(super) struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    pub prefix: &'a str,
}

impl Fields<'_> {
    pub(super) fn wrong(&self, key: &str, expected: &str, found: Option<&Value>) -> Error {
        let at = if self.prefix.is_empty() { key.to_string() } else { format!("{}.{key}", self.prefix) };
        Error::new("this value of the model's config cannot be used")
            .at(at)
            .expected(expected)
            .found(found.map_or_else(|| "nothing".into(), brief))
            .next("compare config.json with the model's page")
    }

    /// A count from 1 to `max`; `default` stands for an absent or null key.
    pub(super) fn size(&self, key: &str, default: Option<usize>, max: usize) -> Result<usize> {
        let expected = || format!("a whole number from 1 to {max}");
        let n = match (self.map.get(key), default) {
            (None | Some(Value::Null), Some(d)) => d,
            (v, _) => v
                .and_then(Value::as_u64)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| self.wrong(key, &expected(), v))?,
        };
        if n == 0 || n > max {
            return Err(self.wrong(key, &expected(), Some(&Value::from(n))));
        }
        Ok(n)
    }

    pub(super) fn float(&self, key: &str, default: Option<f64>, min: f64, max: f64) -> Result<f64> {
        let v = self.map.get(key).filter(|v| !v.is_null());
        match (v, default) {
            (None, Some(d)) => Ok(d),
            _ => v
                .and_then(Value::as_f64)
                .filter(|x| (min..=max).contains(x))
                .ok_or_else(|| self.wrong(key, &format!("a number from {min} to {max}"), v)),
        }
    }

    pub(super) fn bool(&self, key: &str, default: bool) -> Result<bool> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            v => Err(self.wrong(key, "true or false", v)),
        }
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            v => Err(self.wrong(key, "a string", v)),
        }
    }
}

fn kind(v: &Value) -> &'static str {
    match v {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The value itself when it is short, its kind otherwise.
fn brief(v: &Value) -> String {
    let text = v.to_string();
    if text.chars().count() <= 60 { text } else { kind(v).into() }
}
