//! [`LoraConfig`] and [`Targets`]: what is adapted and how, in PEFT's terms.

use std::fmt;

use fancy_regex::Regex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::discover::{self, Discovery};
use crate::model::ModelSpec;
use crate::{Error, Result};

/// Which linear modules get a LoRA pair; PEFT's `target_modules` and `exclude_modules`.
///
/// `notebooks/05_find_the_targets.ipynb` explains it.
///
/// In files, as in PEFT: `"all-linear"`, a list, or any other string, which is a regular expression. From a Rust
/// string, [`Targets::from`] also takes a list with commas: `"q_proj,v_proj"`.
#[derive(Clone, PartialEq, Eq)]
pub enum Targets {
    /// Every linear module but `lm_head`.
    AllLinear,
    /// Modules whose path is one of these, or ends with a dot and one of these: `q_proj`, `layers.0.mlp.up_proj`.
    List(Vec<String>),
    /// Modules whose whole path matches this regular expression (Python's `re.fullmatch`).
    Regex(String),
}

impl Targets {
    /// The seven projections of a decoder layer by name: the same modules as [`Targets::AllLinear`] here.
    pub fn seven() -> Self {
        Self::List(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"].map(Into::into).into())
    }

    /// The matcher for module paths.
    pub(super) fn matcher(&self) -> Result<Matcher> {
        Ok(match self {
            Targets::AllLinear => Matcher::AllLinear,
            Targets::List(list) => Matcher::List(list.clone()),
            Targets::Regex(pattern) => {
                let re = Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(|e| {
                    Error::new("the regular expression is not valid")
                        .at("target_modules")
                        .expected("a regular expression over whole module paths, or a list of names")
                        .found(format!("`{pattern}`: {e}"))
                        .next("for example .*\\.layers\\.[0-3]\\.self_attn\\.(q|v)_proj")
                })?;
                Matcher::Regex(Box::new(re))
            }
        })
    }
}

/// [`Targets`] made ready to match.
pub(super) enum Matcher {
    AllLinear,
    List(Vec<String>),
    Regex(Box<Regex>),
}

impl Matcher {
    /// Whether a linear module of this path is meant.
    pub(super) fn matches(&self, path: &str) -> Result<bool> {
        Ok(match self {
            Matcher::AllLinear => path != "lm_head",
            Matcher::List(list) => list.iter().any(|entry| entry_matches(entry, path)),
            Matcher::Regex(re) => re.is_match(path).map_err(|e| {
                Error::new("the regular expression is too slow")
                    .at("target_modules")
                    .caused_by(e)
                    .next("write it without nested repetitions")
            })?,
        })
    }
}

/// PEFT's rule for one entry of a list: equal, or a suffix after a dot.
pub(super) fn entry_matches(entry: &str, path: &str) -> bool {
    path == entry || path.strip_suffix(entry).is_some_and(|head| head.ends_with('.'))
}

impl From<&str> for Targets {
    /// `"all-linear"`; a string with characters of regular expressions; otherwise names with commas between.
    fn from(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") {
            Targets::AllLinear
        } else if text.contains(['*', '+', '?', '(', '[', '{', '|', '\\', '^', '$']) {
            Targets::Regex(text.into())
        } else {
            Targets::List(text.split(',').map(|s| s.trim().to_string()).filter(|s| !s.is_empty()).collect())
        }
    }
}

impl From<String> for Targets {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<Vec<&str>> for Targets {
    fn from(names: Vec<&str>) -> Self {
        Targets::List(names.into_iter().map(Into::into).collect())
    }
}

impl From<Vec<String>> for Targets {
    fn from(names: Vec<String>) -> Self {
        Targets::List(names)
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Targets::AllLinear => f.write_str("all-linear"),
            Targets::List(list) => f.write_str(&list.join(", ")),
            Targets::Regex(pattern) => write!(f, "/{pattern}/"),
        }
    }
}

impl fmt::Debug for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Targets({self})")
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Targets::AllLinear => s.serialize_str("all-linear"),
            Targets::List(list) => list.serialize(s),
            Targets::Regex(pattern) => s.serialize_str(pattern),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "\"all-linear\", a list of module names, or a regular expression")]
        enum Raw {
            One(String),
            Many(Vec<String>),
        }
        Ok(match Raw::deserialize(d)? {
            Raw::One(s) if s.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            Raw::One(s) => Targets::Regex(s),
            Raw::Many(list) => Targets::List(list),
        })
    }
}

/// How the adapter is made: PEFT's `LoraConfig`, with its names.
///
/// `notebooks/04_lora_by_hand.ipynb` explains it.
///
/// A module computes `y = W x + scaling * B A dropout(x)`, with `A [r, in]`, `B [out, r]`, W frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank: rows of A, columns of B. More: more capacity, parameters and optimizer memory.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Probability with which an element of x is dropped before A while training: 0, or in steps of 1/65,536, at least one.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / sqrt(r)` (rank-stabilised) instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// The modules that get a pair.
    pub target_modules: Targets,
    /// Modules that do not, whatever `target_modules` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
    /// Ranks of single modules: (regular expression, r). It must match the whole path or what follows a dot of it; the
    /// first that does counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rank_pattern: Vec<(String, usize)>,
    /// `lora_alpha` of single modules, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Only these decoder layers; `None`: all. A target that is a module's whole path is adapted in spite of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the list of layers in a path, by which `layers_to_transform` counts (`layers`); empty: the first number
    /// in the path.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers_pattern: Vec<String>,
    /// DoRA (arXiv 2402.09353): the rows of `W + scaling * B A` keep their direction and get a learnt length.
    /// The lengths follow from the whole weight, so each pass computes them anew: training is slower than with plain LoRA, and
    /// decoding, which has kernels for one token otherwise, much slower; merge the adapter to generate.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub use_dora: bool,
}

impl Default for LoraConfig {
    /// r 16, lora_alpha 16, no dropout, all linear modules (as QLoRA trains).
    fn default() -> Self {
        LoraConfig {
            r: 16,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            use_dora: false,
        }
    }
}

impl LoraConfig {
    /// A configuration that has room for each of several adapters on one base, for a plan that generates with them in
    /// turn ([`Engine::use_adapter`](crate::engine::Engine::use_adapter)): all their modules, the largest rank, scaling 1.
    ///
    /// # Errors
    /// No adapter, and DoRA beside plain LoRA.
    pub fn covering(adapters: &[&super::Adapter]) -> Result<LoraConfig> {
        let dora = adapters.iter().filter(|a| a.config.lora.use_dora).count();
        let r = adapters.iter().flat_map(|a| a.tensors.values()).map(|p| p.r).max();
        let Some(r) = r.filter(|_| dora == 0 || dora == adapters.len()) else {
            return Err(Error::new("these adapters cannot share a plan")
                .at("LoraConfig::covering")
                .expected("at least one adapter, with DoRA in all of them or in none")
                .found(format!("{} adapters, {dora} with DoRA", adapters.len()))
                .next("merge the others, or make a second plan"));
        };
        let modules: std::collections::BTreeSet<&String> = adapters.iter().flat_map(|a| a.tensors.keys()).collect();
        let target_modules = Targets::List(modules.into_iter().cloned().collect());
        Ok(LoraConfig { r, lora_alpha: r as f64, target_modules, use_dora: dora > 0, ..LoraConfig::default() })
    }

    /// The factor of `B A`: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub fn scaling(&self) -> f64 {
        scaling(self.lora_alpha, self.r, self.use_rslora)
    }

    /// The modules of `spec` that this config adapts.
    ///
    /// # Errors
    /// As [`discover`](super::discover()).
    pub fn discover(&self, spec: &ModelSpec) -> Result<Discovery> {
        discover::find(spec, &self.target_modules, self.exclude_modules.as_ref(), self.layers().as_ref())
    }

    fn layers(&self) -> Option<Layers> {
        let only = self.layers_to_transform.clone()?;
        Some(Layers { only, patterns: self.layers_pattern.clone() })
    }

    /// The config of one module: `rank_pattern` and `alpha_pattern` applied, by PEFT's rule.
    ///
    /// # Errors
    /// A pattern that is not a regular expression.
    pub fn of(&self, module: &str) -> Result<LoraConfig> {
        let mut lora = self.clone();
        if let Some(r) = first(&self.rank_pattern, module, "rank_pattern")? {
            lora.r = r;
        }
        if let Some(alpha) = first(&self.alpha_pattern, module, "alpha_pattern")? {
            lora.lora_alpha = alpha;
        }
        Ok(lora)
    }

    /// Trainable parameters of these modules: `r * (in + out)` each, with DoRA also `out`.
    ///
    /// # Errors
    /// As [`LoraConfig::of`].
    pub fn params(&self, modules: &Discovery) -> Result<u64> {
        let one = |m: &crate::model::LinearModule| -> Result<u64> {
            let lengths = if self.use_dora { m.out_features } else { 0 };
            Ok((self.of(&m.name)?.r * (m.in_features + m.out_features) + lengths) as u64)
        };
        modules.matched.iter().map(one).sum()
    }

    /// Checks the numbers; targets are checked where a model is known ([`LoraConfig::discover`]).
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: String, next: &str| {
            Err(Error::new("this value cannot be used").at(field).expected(expected).found(found).next(next))
        };
        for (field, r) in [("r", self.r)].into_iter().chain(self.rank_pattern.iter().map(|(_, r)| ("rank_pattern", *r)))
        {
            if r == 0 || r > 1 << 16 {
                return wrong(field, "a whole number from 1 to 65536", r.to_string(), "8 to 64 is usual");
            }
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| ("alpha_pattern", *alpha));
        for (field, alpha) in [("lora_alpha", self.lora_alpha)].into_iter().chain(alphas) {
            if !(alpha.is_finite() && alpha > 0.0) {
                return wrong(field, "a number above 0", alpha.to_string(), "r or 2 r is usual");
            }
        }
        // The patterns' syntax; which modules they match is seen where a model is known.
        let keys = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        for (field, key) in keys.chain(self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key))) {
            first(&[(key.clone(), ())], "", field)?;
        }
        if self.layers_to_transform.is_some() && matches!(self.target_modules, Targets::Regex(_)) {
            return wrong(
                "layers_to_transform",
                "target_modules as a list of names, or \"all-linear\"",
                format!("target_modules = {}", self.target_modules),
                "write the layers into the regular expression, as .*\\.layers\\.[0-3]\\..*q_proj",
            );
        }
        if self.layers_to_transform.is_none() && !self.layers_pattern.is_empty() {
            let found = self.layers_pattern.join(", ");
            return wrong("layers_pattern", "layers_to_transform beside it", found, "say which layers, or drop it");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", "from 0 to below 1", self.lora_dropout.to_string(), "0.05 is usual");
        }
        Ok(())
    }
}

/// PEFT's rule: the first key whose `(.*\.)?(key)` matches the whole path.
fn first<T: Copy>(patterns: &[(String, T)], module: &str, field: &str) -> Result<Option<T>> {
    for (key, value) in patterns {
        let re = Regex::new(&format!(r"\A(?:.*\.)?(?:{key})\z")).and_then(|re| re.is_match(module)).map_err(|e| {
            Error::new("a pattern of the adapter's config cannot be used")
                .at(field.to_string())
                .expected("a regular expression")
                .found(format!("`{key}`: {e}"))
                .next("a module's name is one, for example q_proj or layers.0.mlp.up_proj")
        })?;
        if re {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// `layers_to_transform` with `layers_pattern`.
pub(super) struct Layers {
    pub only: Vec<usize>,
    patterns: Vec<String>,
}

impl Layers {
    /// Whether a module that a name in a list means lies in one of the layers, by PEFT's rule
    /// (`tuners_utils.check_target_module_exists`).
    pub fn holds(&self, path: &str) -> bool {
        let parts: Vec<&str> = path.split('.').collect();
        let number = |i: usize| parts.get(i).and_then(|p| p.parse::<usize>().ok());
        // A number counts between two dots.
        let inner = 1..parts.len().saturating_sub(1);
        let found = match self.patterns.is_empty() {
            true => inner.filter(|&i| i >= 2).find_map(number),
            false => inner.filter(|&i| self.patterns.iter().any(|p| p == parts[i - 1])).find_map(number),
        };
        found.is_some_and(|layer| self.only.contains(&layer))
    }
}

pub(super) fn scaling(lora_alpha: f64, r: usize, use_rslora: bool) -> f64 {
    if use_rslora { lora_alpha / (r as f64).sqrt() } else { lora_alpha / r as f64 }
}
