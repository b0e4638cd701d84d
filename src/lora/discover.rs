//! Which modules of a model a [`Targets`] means, by PEFT's rules, and what adapting them costs.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::DType;

use super::config::{Layers, Targets, entry_matches};
use crate::model::{LinearModule, ModelSpec};
use crate::{Error, Result};

/// The linear modules of a model, sorted by what happens to them. The text form is a table by kind of module.
#[derive(Clone, PartialEq, Eq)]
pub struct Discovery {
    /// The model's name.
    pub model: String,
    /// What was asked for.
    pub targets: Targets,
    /// Modules that get a LoRA pair, in the order of the network.
    pub matched: Vec<LinearModule>,
    /// Modules that do not because no target names them.
    pub unmatched: Vec<LinearModule>,
    /// Modules that `exclude_modules` names.
    pub excluded: Vec<LinearModule>,
    /// Parameters of the model without adapters.
    pub base_params: u64,
    /// What "all-linear" adds to a mixture of experts for each rank: PEFT adapts the experts and the router, which are bare
    /// parameters and no linear modules, gate and up of an expert together at twice the rank. 0 for every other model.
    pub expert_params: u64,
}

/// What happens to a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TargetStatus {
    /// It gets a LoRA pair.
    Matched,
    /// No target names it.
    Unmatched,
    /// `exclude_modules` names it.
    Excluded,
}

/// Modules of one kind: same last name, shape and status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetGroup {
    /// Last part of the path, e.g. `q_proj`.
    pub leaf: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// How many there are.
    pub count: usize,
    /// What happens to them.
    pub status: TargetStatus,
}

impl TargetGroup {
    /// LoRA parameters of all of them: `count * r * (in + out)`; 0 when they are not matched.
    pub fn params(&self, r: usize) -> u64 {
        match self.status {
            TargetStatus::Matched => (self.count * r) as u64 * (self.in_features + self.out_features) as u64,
            _ => 0,
        }
    }
}

/// Finds the modules that `targets` means: `"all-linear"`, a list of names, or a regular expression.
///
/// `notebooks/05_find_the_targets.ipynb` explains it.
///
/// # Errors
/// A listed name that is no linear module (with the nearest that is), a regular expression that is not valid or
/// matches nothing, and `lm_head` where it is tied to the embedding table.
pub fn discover(spec: &ModelSpec, targets: impl Into<Targets>) -> Result<Discovery> {
    find(spec, &targets.into(), None, None)
}

pub(super) fn find(
    spec: &ModelSpec,
    targets: &Targets,
    exclude: Option<&Targets>,
    layers: Option<&Layers>,
) -> Result<Discovery> {
    let linears = spec.linears();
    check(targets, &linears, "target_modules")?;
    if let Some(exclude) = exclude {
        check(exclude, &linears, "exclude_modules")?;
    }
    let (target, exclude) = (targets.matcher()?, exclude.map(Targets::matcher).transpose()?);
    let mut out = Discovery {
        model: spec.name.clone(),
        targets: targets.clone(),
        matched: Vec::new(),
        unmatched: Vec::new(),
        excluded: Vec::new(),
        base_params: spec.total_params(),
        expert_params: match targets {
            Targets::AllLinear => expert_params(spec),
            _ => 0,
        },
    };
    let named = |path: &str| matches!(targets, Targets::List(list) if list.iter().any(|entry| entry == path));
    if let Some(beyond) = layers.and_then(|l| l.only.iter().find(|&&l| l >= spec.num_hidden_layers)) {
        return Err(Error::new("the model has no such layer")
            .at("layers_to_transform")
            .expected(format!("below {}", spec.num_hidden_layers))
            .found(beyond.to_string())
            .next("layers are counted from 0"));
    }
    for m in linears {
        // PEFT asks exclude_modules first.
        if let Some(exclude) = &exclude
            && exclude.matches(&m.name)?
        {
            out.excluded.push(m);
        } else if target.matches(&m.name)? && layers.is_none_or(|l| named(&m.name) || l.holds(&m.name)) {
            if m.name == "lm_head" && spec.tie_word_embeddings {
                return Err(Error::new("a tied lm_head cannot be adapted")
                    .at("target_modules")
                    .expected("modules with a weight of their own")
                    .found(format!("lm_head, which is the embedding table of {}", spec.name))
                    .next("leave lm_head out: \"all-linear\" does"));
            }
            out.matched.push(m);
        } else {
            out.unmatched.push(m);
        }
    }
    if out.matched.is_empty() {
        let e = Error::new("no linear module is to be adapted").at("target_modules").found(targets.to_string());
        return Err(if out.excluded.is_empty() {
            e.expected(format!("a match among {}", leaves(&out.unmatched).join(", ")))
                .next("a single string is a regular expression over whole paths; names go into a list: [\"q_proj\"]")
        } else {
            e.expected("at least one target left by exclude_modules").next("exclude fewer modules")
        });
    }
    Ok(out)
}

fn expert_params(spec: &ModelSpec) -> u64 {
    let Some(experts) = spec.experts else { return 0 };
    let (c, f, e) = (spec.hidden_size, spec.intermediate_size, experts.num_local_experts);
    (spec.num_hidden_layers * (e * (2 * (c + 2 * f) + (f + c)) + c + e)) as u64
}

/// Every entry of a list must name something: a slip of the pen would otherwise train fewer modules in silence.
fn check(targets: &Targets, linears: &[LinearModule], field: &str) -> Result<()> {
    let Targets::List(list) = targets else { return Ok(()) };
    if list.is_empty() {
        return Err(Error::new("the list of modules is empty")
            .at(field)
            .expected(leaves(linears).join(", "))
            .found("[]")
            .next("name at least one, or use \"all-linear\""));
    }
    for entry in list {
        if !linears.iter().any(|m| entry_matches(entry, &m.name)) {
            return Err(not_found(entry, linears).at(field.to_string()));
        }
    }
    Ok(())
}

fn not_found(entry: &str, linears: &[LinearModule]) -> Error {
    let names = leaves(linears);
    let e = Error::new("target module not found").expected(names.join(", ")).found(format!("`{entry}`"));
    let leaf = entry.rsplit('.').next().unwrap_or(entry);
    if leaf == "embed_tokens" {
        return e.next("embed_tokens is an embedding table, not a linear module; leave it out");
    }
    if leaf.contains("norm") {
        return e.next("norms are vectors, not linear modules; leave it out");
    }
    let parts = linears.iter().filter(|m| m.name.split('.').any(|p| p == leaf));
    let mut parts: Vec<_> = parts.map(LinearModule::leaf).collect();
    parts.sort_unstable();
    parts.dedup();
    if !parts.is_empty() && entry == leaf {
        return e.next(format!("`{entry}` is no linear module but holds some: {}", parts.join(", ")));
    }
    // A path is compared with paths, a name with names.
    let known: Vec<String> = if entry.contains('.') { linears.iter().map(|m| m.name.clone()).collect() } else { names };
    let near = known
        .iter()
        .map(|k| (strsim::normalized_damerau_levenshtein(entry, k), k))
        .reduce(|a, b| if b.0 > a.0 { b } else { a });
    match near {
        Some((score, name)) if score >= 0.5 => e.next(format!("did you mean `{name}`?")),
        _ => e.next("use one of the expected names, or \"all-linear\""),
    }
}

/// Last parts of the paths, each once, in the order of the network.
fn leaves(linears: &[LinearModule]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for m in linears {
        let leaf = m.leaf();
        if !out.iter().any(|l| l == leaf) {
            out.push(leaf.into());
        }
    }
    out
}

impl Discovery {
    /// Trainable parameters at rank `r`: the sum of `r * (in + out)` over the matched modules, and a mixture's experts.
    pub fn params(&self, r: usize) -> u64 {
        let linear: u64 = self.matched.iter().map(|m| (m.in_features + m.out_features) as u64).sum();
        r as u64 * (linear + self.expert_params)
    }

    /// Bytes of the adapter at rank `r` in `dtype`; PEFT's files are F32.
    pub fn bytes(&self, r: usize, dtype: DType) -> u64 {
        self.params(r) * dtype.size_in_bytes() as u64
    }

    /// PEFT's line: `trainable params: 3,407,872 || all params: 7,245,139,968 || trainable%: 0.0470`.
    pub fn trainable_parameters(&self, r: usize) -> String {
        let (trainable, all) = (self.params(r), self.params(r) + self.base_params);
        let share = 100.0 * trainable as f64 / all as f64;
        format!("trainable params: {} || all params: {} || trainable%: {share:.4}", commas(trainable), commas(all))
    }

    /// The modules by kind, in the order of the network.
    pub fn groups(&self) -> Vec<TargetGroup> {
        let mut out: Vec<TargetGroup> = Vec::new();
        let lists = [
            (TargetStatus::Matched, &self.matched),
            (TargetStatus::Unmatched, &self.unmatched),
            (TargetStatus::Excluded, &self.excluded),
        ];
        for (status, list) in lists {
            for m in list {
                let leaf = m.leaf();
                let same = |g: &&mut TargetGroup| {
                    (g.leaf.as_str(), g.out_features, g.in_features, g.status)
                        == (leaf, m.out_features, m.in_features, status)
                };
                match out.iter_mut().find(same) {
                    Some(g) => g.count += 1,
                    None => out.push(TargetGroup {
                        leaf: leaf.into(),
                        out_features: m.out_features,
                        in_features: m.in_features,
                        count: 1,
                        status,
                    }),
                }
            }
        }
        let order: BTreeMap<&str, usize> = LEAVES.into_iter().enumerate().map(|(i, l)| (l, i)).collect();
        out.sort_by_key(|g| (order.get(g.leaf.as_str()).copied().unwrap_or(usize::MAX), g.status));
        out
    }
}

/// The order of the network.
const LEAVES: [&str; 10] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "lm_head",
];

/// 1234567 as 1,234,567.
fn commas(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.matched.len() + self.unmatched.len() + self.excluded.len();
        writeln!(f, "{}: {} matches {} of {all} linear modules", self.model, self.targets, self.matched.len())?;
        writeln!(f, "  {:<10} {:>7}  {:<15} {:<10} {:>16}", "module", "count", "[out, in]", "", "params per rank")?;
        for g in self.groups() {
            let status = match g.status {
                TargetStatus::Matched => "matched",
                TargetStatus::Unmatched => "unmatched",
                TargetStatus::Excluded => "excluded",
            };
            let shape = format!("[{}, {}]", g.out_features, g.in_features);
            writeln!(f, "  {:<10} {:>7}  {shape:<15} {status:<10} {:>16}", g.leaf, g.count, commas(g.params(1)))?;
        }
        if self.expert_params > 0 {
            let params = commas(self.expert_params);
            writeln!(f, "  {:<10} {:>7}  {:<15} {:<10} {params:>16}", "experts", "", "", "matched")?;
        }
        write!(
            f,
            "  {:<10} {:>7}  {:<15} {:<10} {:>16}",
            "together",
            self.matched.len(),
            "",
            "",
            commas(self.params(1))
        )
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
