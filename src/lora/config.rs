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
    /// Probability with which an element of x is dropped before A while training.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / sqrt(r)` (rank-stabilised) instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// The modules that get a pair.
    pub target_modules: Targets,
    /// Modules that do not, whatever `target_modules` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
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
        }
    }
}

impl LoraConfig {
    /// The factor of `B A`: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub fn scaling(&self) -> f64 {
        scaling(self.lora_alpha, self.r, self.use_rslora)
    }

    /// The modules of `spec` that this config adapts.
    ///
    /// # Errors
    /// As [`discover`](super::discover()).
    pub fn discover(&self, spec: &ModelSpec) -> Result<Discovery> {
        discover::find(spec, &self.target_modules, self.exclude_modules.as_ref())
    }

    /// Checks the numbers; targets are checked where a model is known ([`LoraConfig::discover`]).
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &str, expected: &str, found: String, next: &str| {
            Err(Error::new("this value cannot be used").at(field).expected(expected).found(found).next(next))
        };
        if self.r == 0 || self.r > 1 << 16 {
            return wrong("r", "a whole number from 1 to 65536", self.r.to_string(), "8 to 64 is usual");
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return wrong("lora_alpha", "a number above 0", self.lora_alpha.to_string(), "r or 2 r is usual");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", "from 0 to below 1", self.lora_dropout.to_string(), "0.05 is usual");
        }
        Ok(())
    }
}

pub(super) fn scaling(lora_alpha: f64, r: usize, use_rslora: bool) -> f64 {
    if use_rslora { lora_alpha / (r as f64).sqrt() } else { lora_alpha / r as f64 }
}
