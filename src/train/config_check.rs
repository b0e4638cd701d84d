//! Reading a [`TrainConfig`] from TOML and checking it as a whole: every problem at once, each with its way out.

use std::path::Path;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{LrScheduler, Optim, TrainConfig};
use crate::{Error, Result, files};

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, or the unknown key.
    pub field: String,
    /// What it may be.
    pub expected: String,
    /// What it is.
    pub found: String,
    /// What to do.
    pub next: String,
}

impl Problem {
    fn new(field: &str, expected: impl Into<String>, found: impl ToString, next: impl Into<String>) -> Self {
        Problem { field: field.into(), expected: expected.into(), found: found.to_string(), next: next.into() }
    }

    pub(super) fn into_error(self) -> Error {
        Error::new("the training configuration cannot be used")
            .at(self.field)
            .expected(self.expected)
            .found(self.found)
            .next(self.next)
    }
}

/// 2^53.
const MAX_COUNT: u64 = 9_007_199_254_740_992;

/// Keys of `TrainingArguments` (and everyday names) that are not fields here, with where that choice is made.
const ELSEWHERE: [(&str, &str); 18] = [
    ("lr", "did you mean `learning_rate`?"),
    ("epochs", "did you mean `num_train_epochs`?"),
    ("batch_size", "did you mean `per_device_train_batch_size`?"),
    ("micro_batch_size", "did you mean `per_device_train_batch_size`?"),
    ("per_device_eval_batch_size", "leave it out: the plan chooses the capacity of evaluation"),
    ("output_dir", "leave it out: the run's directory is given to `Run::create`"),
    ("fp16", "leave it out: the plan chooses the compute dtype"),
    ("bf16", "leave it out: the plan chooses the compute dtype"),
    ("tf32", "leave it out: the plan chooses the compute dtype"),
    ("gradient_checkpointing", "leave it out: the plan chooses which layers are recomputed"),
    ("max_seq_length", "leave it out: the plan has the sequence length"),
    ("packing", "leave it out: batches are flat and hold no padding"),
    ("report_to", "leave it out: metrics.jsonl in the run's directory holds every step"),
    ("save_strategy", "leave it out: `save_steps` says when"),
    ("logging_strategy", "leave it out: `logging_steps` says when"),
    ("eval_strategy", "leave it out: `eval_steps` says when"),
    ("lr_scheduler", "did you mean `lr_scheduler_type`?"),
    ("r", "leave it out: `r`, `lora_alpha` and targets belong to `LoraConfig`"),
];

impl TrainConfig {
    /// Reads a TOML file; fields left out keep their defaults.
    ///
    /// # Errors
    /// As [`from_toml_str`](Self::from_toml_str), with the path.
    pub fn from_toml(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_toml_str(&files::read_to_string(path)?).map_err(|e| e.at_path(path))
    }

    /// Reads TOML text; fields left out keep their defaults. The result is valid.
    ///
    /// # Errors
    /// Text that is not TOML, and every unknown key, value of a wrong type and value out of range, all in one error.
    pub fn from_toml_str(text: &str) -> Result<Self> {
        let table: Table = text.parse().map_err(|e: toml::de::Error| {
            Error::new("the training configuration is not TOML")
                .expected("lines such as `learning_rate = 2e-4`")
                .found(e.to_string().trim_end().to_owned())
                .next("correct that line")
        })?;
        let (config, mut problems) = read_table(table);
        // Ranges of fields that could not be read would be those of the defaults.
        let bad: Vec<String> = problems.iter().map(|p| p.field.clone()).collect();
        problems.extend(config.problems().into_iter().filter(|p| !bad.contains(&p.field)));
        one_error(problems)?;
        Ok(config)
    }

    /// The whole configuration as TOML.
    ///
    /// # Errors
    /// What [`validate`](Self::validate) refuses: [`from_toml_str`](Self::from_toml_str) would not read it back.
    pub fn to_toml(&self) -> Result<String> {
        self.validate()?;
        toml::to_string(self).map_err(|e| Error::new("this configuration cannot be written as TOML").caused_by(e))
    }

    /// Checks all fields and how they go together; the error lists every problem found.
    ///
    /// # Errors
    /// See [`problems`](Self::problems).
    pub fn validate(&self) -> Result<()> {
        one_error(self.problems())
    }

    /// Everything that is wrong with this configuration; empty when it can be used.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        self.check_amounts(&mut found);
        self.check_optimizer(&mut found);
        self.check_schedule(&mut found);
        found
    }

    fn check_amounts(&self, out: &mut Vec<Problem>) {
        let epochs = self.num_train_epochs;
        if !(epochs.is_finite() && epochs > 0.0) {
            out.push(Problem::new(
                "num_train_epochs",
                "a number above 0",
                epochs,
                "1 is a good start; or give `max_steps`",
            ));
        }
        let at_least_one = "a whole number from 1";
        if self.max_steps == Some(0) {
            out.push(Problem::new("max_steps", at_least_one, 0, "leave it out to train for `num_train_epochs`"));
        }
        let limit = u32::MAX as usize;
        for (field, value) in [
            ("per_device_train_batch_size", self.per_device_train_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
        ] {
            if !(1..=limit).contains(&value) {
                out.push(Problem::new(field, format!("a whole number from 1 to {limit}"), value, "1 is the smallest"));
            }
        }
        for (field, value) in [
            ("seed", Some(self.seed)),
            ("max_steps", self.max_steps),
            ("warmup_steps", Some(self.warmup_steps)),
            ("save_steps", Some(self.save_steps)),
            ("logging_steps", Some(self.logging_steps)),
            ("eval_steps", self.eval_steps),
        ] {
            // What every reader of TOML and JSON holds exactly.
            if let Some(value) = value.filter(|&v| v > MAX_COUNT) {
                out.push(Problem::new(
                    field,
                    format!("a whole number up to 2^53 = {MAX_COUNT}"),
                    value,
                    "choose a smaller one",
                ));
            }
        }
        if self.logging_steps == 0 {
            out.push(Problem::new("logging_steps", at_least_one, 0, "give a large number for few lines"));
        }
        if self.eval_steps == Some(0) {
            out.push(Problem::new("eval_steps", at_least_one, 0, "leave it out to evaluate only when asked"));
        }
        if self.save_total_limit == Some(0) {
            out.push(Problem::new(
                "save_total_limit",
                at_least_one,
                0,
                "a run needs its last checkpoint; leave it out to keep all",
            ));
        }
        if self.group_by_length && !self.shuffle {
            let found = "group_by_length = true with shuffle = false";
            out.push(Problem::new("group_by_length", "one order of the examples", found, "drop one of the two"));
        }
    }

    fn check_optimizer(&self, out: &mut Vec<Problem>) {
        let lr = self.learning_rate;
        if !(lr > 0.0 && lr <= 1.0) {
            let next = if lr > 1.0 { "is a minus sign missing, as in 2e-4?" } else { "2e-4 is a good start for LoRA" };
            out.push(Problem::new("learning_rate", "a number above 0, at most 1", lr, next));
        }
        if !(0.0..=1.0).contains(&self.weight_decay) {
            out.push(Problem::new("weight_decay", "a number from 0 to 1", self.weight_decay, "0 turns it off"));
        }
        for (field, value, usual) in [("adam_beta1", self.adam_beta1, "0.9"), ("adam_beta2", self.adam_beta2, "0.999")]
        {
            if !((0.0..1.0).contains(&value) && (value as f32) < 1.0) {
                out.push(Problem::new(field, "a number from 0 to below 1", value, format!("{usual} is usual")));
            }
        }
        // The optimizer computes in f32, where smaller values are 0: 0 / 0 for a weight that has no gradient.
        let eps = self.adam_epsilon;
        if !((eps as f32) >= f32::MIN_POSITIVE && eps < 1.0) {
            out.push(Problem::new("adam_epsilon", "a number above 1.2e-38, below 1", eps, "1e-8 is usual"));
        }
        let norm = self.max_grad_norm;
        if !(norm.is_finite() && norm >= 0.0) {
            out.push(Problem::new("max_grad_norm", "a finite number from 0", norm, "0 turns clipping off"));
        }
    }

    fn check_schedule(&self, out: &mut Vec<Problem>) {
        let (steps, ratio) = (self.warmup_steps, self.warmup_ratio);
        if !(0.0..1.0).contains(&ratio) {
            let next = if ratio >= 1.0 { "a number of steps is `warmup_steps`" } else { "0 means no warmup" };
            out.push(Problem::new("warmup_ratio", "a share of all steps, from 0 to below 1", ratio, next));
        } else if steps > 0 && ratio > 0.0 {
            let found = format!("warmup_steps = {steps} and warmup_ratio = {ratio}");
            out.push(Problem::new("warmup_ratio", "warmup said once", found, "drop one of the two"));
        }
        if self.lr_scheduler_type == LrScheduler::Constant && (steps > 0 || ratio > 0.0) {
            let found = if steps > 0 { format!("warmup_steps = {steps}") } else { format!("warmup_ratio = {ratio}") };
            let next = "write lr_scheduler_type = \"constant_with_warmup\", or drop the warmup";
            let expected = "no warmup: `constant` has none, and transformers would ignore it silently";
            out.push(Problem::new("lr_scheduler_type", expected, found, next));
        }
        if self.max_steps.is_some_and(|max| steps > 0 && steps >= max) {
            let expected = format!("fewer than max_steps = {}", self.max_steps.unwrap_or_default());
            out.push(Problem::new("warmup_steps", expected, steps, "shorten the warmup or train longer"));
        }
    }
}

/// Reads key by key, so that one bad value does not hide the next.
fn read_table(table: Table) -> (TrainConfig, Vec<Problem>) {
    let known = known_fields();
    let mut problems = Vec::new();
    let mut good = Table::new();
    for (key, value) in table {
        if !known.contains(&key) {
            problems.push(unknown_key(&key, &known));
            continue;
        }
        let value = as_field(&key, value);
        let alone = Table::from_iter([(key.clone(), value.clone())]);
        match alone.try_into::<TrainConfig>() {
            Ok(_) => _ = good.insert(key, value),
            Err(e) => problems.push(wrong_type(&key, &value, e.message())),
        }
    }
    (good.try_into().unwrap_or_default(), problems)
}

/// TOML tells `1` from `1.0`; a reader does not.
fn as_field(key: &str, value: Value) -> Value {
    let float = Table::try_from(TrainConfig::default()).is_ok_and(|t| t.get(key).is_some_and(Value::is_float));
    match value {
        Value::Integer(i) if float => Value::Float(i as f64),
        value => value,
    }
}

/// All fields, also those that are left out when empty.
fn known_fields() -> Vec<String> {
    let full = TrainConfig::default().max_steps(1).save_total_limit(1).eval_steps(1);
    Table::try_from(full).map(|t| t.keys().cloned().collect()).unwrap_or_default()
}

fn unknown_key(key: &str, known: &[String]) -> Problem {
    let next = match ELSEWHERE.iter().find(|(name, _)| *name == key) {
        Some((_, advice)) => (*advice).to_owned(),
        None => match nearest(key, known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "drop it".to_owned(),
        },
    };
    Problem::new(key, "a field of TrainConfig", format!("unknown field `{key}`"), next)
}

fn wrong_type(key: &str, value: &Value, message: &str) -> Problem {
    let names: Vec<&str> = match key {
        "optim" => Optim::ALL.map(Optim::name).to_vec(),
        "lr_scheduler_type" => LrScheduler::ALL.map(LrScheduler::name).to_vec(),
        _ => Vec::new(),
    };
    if !names.is_empty() {
        return Problem::new(key, one_of(&names), value, nearest_advice(value, &names));
    }
    let expected = match message.rsplit_once("expected ").map_or(message, |(_, expected)| expected).trim() {
        "u64" | "usize" => "a whole number from 0",
        "f64" => "a number",
        "a boolean" => "true or false",
        other => other,
    };
    let next = match value {
        Value::Integer(i) if *i < 0 && !known_by_default(key) => format!("leave `{key}` out for no limit"),
        Value::String(_) => "write it without quotes".into(),
        _ => format!("correct `{key}`"),
    };
    Problem::new(key, expected, value, next)
}

/// Whether a field has a default value; the others mean "no limit" when they are left out.
fn known_by_default(key: &str) -> bool {
    Table::try_from(TrainConfig { save_total_limit: None, ..TrainConfig::default() }).is_ok_and(|t| t.contains_key(key))
}

fn one_of(names: &[&str]) -> String {
    format!("one of {}", names.join(", "))
}

fn nearest_advice(value: &Value, names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
    match value.as_str().and_then(|v| nearest(v, &names)) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => "choose one of these names".to_owned(),
    }
}

/// The name that a reader most likely meant, if any is near.
fn nearest(key: &str, names: &[String]) -> Option<String> {
    let score = |name: &str| strsim::jaro_winkler(&key.to_lowercase(), name);
    names.iter().max_by(|a, b| score(a).total_cmp(&score(b))).filter(|name| score(name) > 0.8).cloned()
}

/// Parses an enum by its serde names.
pub(super) fn named<T: DeserializeOwned>(field: &str, name: &str, names: &[&str]) -> Result<T> {
    let value = Value::String(name.to_owned());
    value.clone().try_into::<T>().map_err(|_| {
        Problem::new(field, one_of(names), format!("\"{name}\""), nearest_advice(&value, names)).into_error()
    })
}

fn one_error(mut problems: Vec<Problem>) -> Result<()> {
    match problems.len() {
        0 => Ok(()),
        1 => Err(problems.remove(0).into_error()),
        n => {
            let lines: Vec<String> = problems
                .iter()
                .map(|p| format!("\n    {}: expected {}; found {}; {}", p.field, p.expected, p.found, p.next))
                .collect();
            Err(Error::new("the training configuration cannot be used")
                .expected("no problem")
                .found(format!("{n} problems:{}", lines.concat()))
                .next("correct these fields"))
        }
    }
}
