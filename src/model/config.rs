//! From a Hugging Face `config.json` to a [`ModelSpec`], with every size checked.
//!
//! Defaults for absent keys are those of transformers' `LlamaConfig` and `MistralConfig`.

use std::path::Path;

use candle_core::DType;
use serde_json::{Map, Value};

use super::spec::{Family, ModelSpec, RopeScaling};
use crate::{Error, Result, files};

/// The families that [`ModelSpec::from_json`] accepts, for error messages.
const FAMILIES: &str = "a `mistral` or `llama` model (MistralForCausalLM, LlamaForCausalLM)";

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
    refuse_variants(&f)?;
    let hidden_size = f.size("hidden_size", None, 1 << 20)?;
    let num_attention_heads = f.size("num_attention_heads", None, 1 << 14)?;
    let kv_default = match family {
        Family::Llama => num_attention_heads,
        // MistralConfig has 8 where the key is absent, and all heads where it is null.
        Family::Mistral if map.contains_key("num_key_value_heads") => num_attention_heads,
        Family::Mistral => 8,
    };
    let max_position_default = match family {
        Family::Llama => 2048,
        Family::Mistral => 32 * 4096,
    };
    let max_position_embeddings = f.size("max_position_embeddings", Some(max_position_default), 1 << 30)?;
    let (rope_theta, rope_scaling) = rope(&f, max_position_embeddings)?;
    let spec = ModelSpec {
        name: name.to_string(),
        family,
        vocab_size: f.size("vocab_size", None, 1 << 24)?,
        hidden_size,
        intermediate_size: f.size("intermediate_size", None, 1 << 22)?,
        num_hidden_layers: f.size("num_hidden_layers", None, 1 << 12)?,
        num_attention_heads,
        num_key_value_heads: f.size("num_key_value_heads", Some(kv_default), 1 << 14)?,
        head_dim: head_dim(&f, hidden_size, num_attention_heads)?,
        max_position_embeddings,
        rms_norm_eps: f.float("rms_norm_eps", Some(1e-6), 0.0, 1.0)?,
        rope_theta,
        rope_scaling,
        sliding_window: sliding_window(&f, family)?,
        tie_word_embeddings: f.bool("tie_word_embeddings", false)?,
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
            .expected(FAMILIES)
            .found(format!("`{found}`"))
            .next("use a Mistral or Llama model; ModelSpec::presets() lists some")
    };
    let family = match by_type.as_deref() {
        Some("mistral") => Family::Mistral,
        Some("llama") => Family::Llama,
        None if architectures.contains(&"MistralForCausalLM") => Family::Mistral,
        None if architectures.contains(&"LlamaForCausalLM") => Family::Llama,
        _ => return Err(refuse(found.unwrap_or_else(|| "no model_type".into()))),
    };
    let head = match family {
        Family::Mistral => "MistralForCausalLM",
        Family::Llama => "LlamaForCausalLM",
    };
    match architectures.first() {
        Some(a) if *a != head => {
            Err(refuse(a.to_string()).at("architectures").expected(format!("`{head}`: a model that predicts tokens")))
        }
        _ => Ok(family),
    }
}

/// Settings that would change the arithmetic, so that ignoring them would give a wrong model.
fn refuse_variants(f: &Fields<'_>) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if f.bool(key, false)? {
            return Err(Error::new("linear layers with a bias are not supported")
                .at(key)
                .expected("false, or no such key")
                .found("true")
                .next("use a model without biases"));
        }
    }
    match f.str("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(Error::new("this activation is not supported")
                .at("hidden_act")
                .expected("`silu` (SwiGLU)")
                .found(format!("`{other}`"))
                .next("use a model whose MLP is SwiGLU, as every Llama and Mistral model's is"));
        }
    }
    let rope = f.map.get("rope_parameters").and_then(Value::as_object);
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

fn head_dim(f: &Fields<'_>, hidden_size: usize, heads: usize) -> Result<usize> {
    let derived = hidden_size / heads;
    let given = f.map.get("head_dim").is_some_and(|v| !v.is_null());
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

fn sliding_window(f: &Fields<'_>, family: Family) -> Result<Option<usize>> {
    match (family, f.map.get("sliding_window")) {
        (Family::Llama, _) | (Family::Mistral, Some(Value::Null)) => Ok(None),
        (Family::Mistral, _) => Ok(Some(f.size("sliding_window", Some(4096), 1 << 30)?)),
    }
}

/// Base and scaling. transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart.
fn rope(f: &Fields<'_>, max_position: usize) -> Result<(f64, RopeScaling)> {
    let section = ["rope_scaling", "rope_parameters"].into_iter().find(|k| f.map.get(*k).is_some_and(|v| !v.is_null()));
    let theta = |f: &Fields<'_>, default| f.float("rope_theta", default, 1.0, 1e18);
    let top = theta(f, Some(10_000.0))?;
    let Some(section) = section else { return Ok((top, RopeScaling::Default)) };
    let Some(Value::Object(map)) = f.map.get(section) else {
        return Err(f.wrong(section, "an object with rope_type", f.map.get(section)));
    };
    let s = Fields { map, prefix: section };
    let rope_theta = theta(&s, Some(top))?;
    let kind = match s.str("rope_type")? {
        Some(kind) => kind,
        None => s.str("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "llama3" => llama3(&s, max_position)?,
        other => {
            return Err(Error::new("this rope scaling is not supported")
                .at(format!("{section}.rope_type"))
                .expected("`default` or `llama3`")
                .found(format!("`{other}`"))
                .next("use a model with one of these"));
        }
    };
    Ok((rope_theta, scaling))
}

fn llama3(s: &Fields<'_>, max_position: usize) -> Result<RopeScaling> {
    let low_freq_factor = s.float("low_freq_factor", None, 1e-6, 1e6)?;
    let high_freq_factor = s.float("high_freq_factor", None, 1e-6, 1e6)?;
    if low_freq_factor >= high_freq_factor {
        return Err(Error::new("the band of scaled frequencies is empty")
            .at(format!("{}.high_freq_factor", s.prefix))
            .expected(format!("more than low_freq_factor = {low_freq_factor}"))
            .found(high_freq_factor.to_string())
            .next("compare config.json with the model's page"));
    }
    Ok(RopeScaling::Llama3 {
        factor: s.float("factor", None, 1.0, 1e6)?,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: s.size("original_max_position_embeddings", Some(max_position), 1 << 30)?,
    })
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
struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: &'a str,
}

impl Fields<'_> {
    fn wrong(&self, key: &str, expected: &str, found: Option<&Value>) -> Error {
        let at = if self.prefix.is_empty() { key.to_string() } else { format!("{}.{key}", self.prefix) };
        Error::new("this value of the model's config cannot be used")
            .at(at)
            .expected(expected)
            .found(found.map_or_else(|| "nothing".into(), brief))
            .next("compare config.json with the model's page")
    }

    /// A count from 1 to `max`; `default` stands for an absent or null key.
    fn size(&self, key: &str, default: Option<usize>, max: usize) -> Result<usize> {
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

    fn float(&self, key: &str, default: Option<f64>, min: f64, max: f64) -> Result<f64> {
        let v = self.map.get(key).filter(|v| !v.is_null());
        match (v, default) {
            (None, Some(d)) => Ok(d),
            _ => v
                .and_then(Value::as_f64)
                .filter(|x| (min..=max).contains(x))
                .ok_or_else(|| self.wrong(key, &format!("a number from {min} to {max}"), v)),
        }
    }

    fn bool(&self, key: &str, default: bool) -> Result<bool> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            v => Err(self.wrong(key, "true or false", v)),
        }
    }

    fn str(&self, key: &str) -> Result<Option<&str>> {
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
