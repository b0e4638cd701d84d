//! `adapter_config.json` as PEFT writes it: read with the parts that change the arithmetic understood or refused.

use std::fmt;

use serde_json::{Map, Value, json};

use super::config::{LoraConfig, Targets};
use crate::{Error, Result};

/// PEFT's `adapter_config.json`.
#[derive(Clone, PartialEq)]
pub struct AdapterConfig {
    /// The model that the adapter was trained on, as it was named then.
    pub base_model_name_or_path: Option<String>,
    /// Rank, scaling, dropout and targets.
    pub lora: LoraConfig,
    /// `CAUSAL_LM` for the models of this library.
    pub task_type: Option<String>,
    /// All other keys as they were read; they are written again.
    pub extra: Map<String, Value>,
}

/// What PEFT 0.21.2 writes for a plain LoRA: the keys that this library does not set itself.
const DEFAULTS: &str = r#"{
"alora_invocation_tokens": null, "arrow_config": null, "auto_mapping": null, "bias": "none", "corda_config": null,
"ensure_weight_tying": false, "eva_config": null, "fan_in_fan_out": false, "inference_mode": true,
"init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
"layers_to_transform": null, "loftq_config": {}, "lora_bias": false, "lora_ga_config": null, "megatron_config": null,
"megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA",
"peft_version": "0.21.2", "qalora_group_size": 16, "revision": null, "target_parameters": null,
"trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false, "velora_config": null
}"#;

/// Keys that change what the adapter computes, with the reason why another value than "off" is refused.
const REFUSED: [(&str, &str); 17] = [
    ("lora_bias", "B with a bias is not supported"),
    ("modules_to_save", "whole modules stored in the adapter are not supported"),
    ("trainable_token_indices", "trained token rows are not supported"),
    ("target_parameters", "adapters on bare parameters are not supported"),
    ("layer_replication", "replicated layers are not supported"),
    ("fan_in_fan_out", "transposed weights are not supported"),
    ("use_qalora", "QA-LoRA is not supported"),
    ("use_bdlora", "BD-LoRA is not supported"),
    ("alora_invocation_tokens", "activated LoRA is not supported"),
    ("arrow_config", "Arrow is not supported"),
    ("corda_config", "CorDA changes the base weights"),
    ("lora_ga_config", "LoRA-GA changes the base weights"),
    ("kasa_config", "KaSA is not supported"),
    ("monteclora_config", "MonteCLoRA is not supported"),
    ("megatron_config", "Megatron layers are not supported"),
    ("loftq_config", "LoftQ changes the base weights"),
    ("ensure_weight_tying", "adapters that keep weights tied are not supported"),
];

impl AdapterConfig {
    /// A config for an adapter that was trained here.
    pub fn new(lora: LoraConfig, base_model_name_or_path: Option<String>) -> Self {
        AdapterConfig { base_model_name_or_path, lora, task_type: Some("CAUSAL_LM".into()), extra: Map::new() }
    }

    /// Reads the text of an `adapter_config.json`.
    ///
    /// # Errors
    /// Text that is not JSON, another method than LoRA, a variant of LoRA that computes something else (each with the
    /// reason), and numbers that cannot be.
    pub fn from_json(json: &str) -> Result<Self> {
        let mut map: Map<String, Value> =
            crate::json::parse(json.as_bytes()).and_then(serde_json::from_value).map_err(|e| {
                Error::new("the adapter's config is not a JSON object").caused_by(e).next("save the adapter again")
            })?;
        refuse(&map)?;
        // Written again in the form that they were read in.
        let layers_to_transform = one_or_many("layers_to_transform", map.get("layers_to_transform"))?;
        let layers_pattern = one_or_many("layers_pattern", map.get("layers_pattern"))?.unwrap_or_default();
        let mut get = |key: &str| map.remove(key).filter(|v| !v.is_null());
        let pattern = |key: &str, v: Option<Value>| -> Result<Vec<(String, Value)>> {
            Ok(field::<Map<String, Value>>(key, v)?.unwrap_or_default().into_iter().collect())
        };
        let rank_pattern = pattern("rank_pattern", get("rank_pattern"))?
            .into_iter()
            .map(|(k, v)| Ok((k, field::<usize>("rank_pattern", Some(v))?.unwrap_or_default())))
            .collect::<Result<_>>()?;
        let alpha_pattern = pattern("alpha_pattern", get("alpha_pattern"))?
            .into_iter()
            .map(|(k, v)| Ok((k, field::<f64>("alpha_pattern", Some(v))?.unwrap_or_default())))
            .collect::<Result<_>>()?;
        let default = LoraConfig { r: 8, lora_alpha: 8.0, ..LoraConfig::default() };
        let lora = LoraConfig {
            r: field("r", get("r"))?.unwrap_or(default.r),
            lora_alpha: field("lora_alpha", get("lora_alpha"))?.unwrap_or(default.lora_alpha),
            lora_dropout: field("lora_dropout", get("lora_dropout"))?.unwrap_or(0.0),
            use_rslora: field("use_rslora", get("use_rslora"))?.unwrap_or(false),
            // PEFT's own default for Llama and Mistral.
            target_modules: field("target_modules", get("target_modules"))?.unwrap_or("q_proj,v_proj".into()),
            exclude_modules: field("exclude_modules", get("exclude_modules"))?,
            rank_pattern,
            alpha_pattern,
            layers_to_transform,
            layers_pattern,
            use_dora: field("use_dora", get("use_dora"))?.unwrap_or(false),
        };
        lora.validate()?;
        Ok(AdapterConfig {
            base_model_name_or_path: field("base_model_name_or_path", get("base_model_name_or_path"))?,
            lora,
            task_type: field("task_type", get("task_type"))?,
            extra: map,
        })
    }

    /// The text of `adapter_config.json`, with all keys that PEFT 0.21 writes, in its order and form.
    pub fn to_json(&self) -> String {
        let mut map: Map<String, Value> = serde_json::from_str(DEFAULTS).unwrap_or_default();
        map.extend(self.extra.clone());
        let number = |x: f64| if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) };
        let l = &self.lora;
        let own = [
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            ("r", json!(l.r)),
            ("lora_alpha", number(l.lora_alpha)),
            ("lora_dropout", json!(l.lora_dropout)),
            ("use_rslora", json!(l.use_rslora)),
            ("target_modules", json!(l.target_modules)),
            ("exclude_modules", json!(l.exclude_modules)),
            ("rank_pattern", l.rank_pattern.iter().map(|(k, r)| (k.clone(), json!(r))).collect()),
            ("alpha_pattern", l.alpha_pattern.iter().map(|(k, a)| (k.clone(), number(*a))).collect()),
            ("use_dora", json!(l.use_dora)),
            ("task_type", json!(self.task_type)),
        ];
        map.extend(own.map(|(k, v)| (k.to_string(), v)));
        if !self.extra.contains_key("layers_to_transform") && l.layers_to_transform.is_some() {
            map.insert("layers_to_transform".into(), json!(l.layers_to_transform));
            let patterns = (!l.layers_pattern.is_empty()).then_some(&l.layers_pattern);
            map.insert("layers_pattern".into(), json!(patterns));
        }
        map.sort_keys();
        format!("{:#}", Value::Object(map))
    }

    /// The config of one module: `rank_pattern` and `alpha_pattern` applied.
    ///
    /// # Errors
    /// A pattern that is not a regular expression.
    pub fn of(&self, module: &str) -> Result<LoraConfig> {
        self.lora.of(module)
    }

    /// The scaling of one module.
    ///
    /// # Errors
    /// As [`AdapterConfig::of`].
    pub fn scaling_of(&self, module: &str) -> Result<f64> {
        Ok(self.of(module)?.scaling())
    }

    /// Keys that are kept in the file but not understood by this library.
    pub fn unknown_keys(&self) -> Vec<String> {
        let known: Map<String, Value> = serde_json::from_str(DEFAULTS).unwrap_or_default();
        self.extra.keys().filter(|k| !known.contains_key(*k)).cloned().collect()
    }
}

/// One value or a list of them.
fn one_or_many<T: serde::de::DeserializeOwned>(key: &str, v: Option<&Value>) -> Result<Option<Vec<T>>> {
    match v.filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(v @ Value::Array(_)) => field(key, Some(v.clone())),
        Some(v) => Ok(field(key, Some(v.clone()))?.map(|one| vec![one])),
    }
}

fn field<T: serde::de::DeserializeOwned>(key: &str, v: Option<Value>) -> Result<Option<T>> {
    let Some(v) = v else { return Ok(None) };
    let text = v.to_string();
    serde_json::from_value(v).map(Some).map_err(|e| {
        Error::new("this value of the adapter's config cannot be used")
            .at(key.to_string())
            .expected(e.to_string())
            .found(text.chars().take(80).collect::<String>())
            .next("compare adapter_config.json with the program that wrote it")
    })
}

fn refuse(map: &Map<String, Value>) -> Result<()> {
    let next = "merge it with PEFT, and use the merged model here";
    let kind = map.get("peft_type").and_then(Value::as_str).unwrap_or("nothing");
    if !kind.eq_ignore_ascii_case("LORA") {
        return Err(Error::new("this adapter is not a LoRA adapter")
            .at("peft_type")
            .expected("LORA")
            .found(kind.to_string())
            .next(next));
    }
    let off = |v: &Value| match v {
        Value::Null | Value::Bool(false) => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    };
    for (key, reason) in REFUSED {
        if let Some(v) = map.get(key).filter(|v| !off(v)) {
            return Err(Error::new("this variant of LoRA is not supported")
                .at(key)
                .expected(format!("no {key}: {reason}"))
                .found(v.to_string().chars().take(80).collect::<String>())
                .next(next));
        }
    }
    // Some initialisations subtract the adapter's start from the base, which the file does not hold.
    match map.get("init_lora_weights") {
        Some(Value::String(s)) if !matches!(s.to_lowercase().as_str(), "gaussian" | "eva" | "orthogonal") => {
            Err(Error::new("this adapter needs a changed base model")
                .at("init_lora_weights")
                .expected("true, false, gaussian, eva or orthogonal")
                .found(s.clone())
                .next("convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"))
        }
        _ => Ok(()),
    }
}

impl fmt::Debug for AdapterConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let l = &self.lora;
        let base = self.base_model_name_or_path.as_deref().unwrap_or("an unnamed base");
        write!(
            f,
            "AdapterConfig(r {}, lora_alpha {}, lora_dropout {}, use_rslora {}, targets {}, on {base})",
            l.r, l.lora_alpha, l.lora_dropout, l.use_rslora, l.target_modules
        )
    }
}

impl Default for AdapterConfig {
    fn default() -> Self {
        AdapterConfig::new(LoraConfig { target_modules: Targets::AllLinear, ..LoraConfig::default() }, None)
    }
}
