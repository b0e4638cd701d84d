//! The rotary part of a `config.json`: base and scaling.

use serde_json::Value;

use super::config::Fields;
use super::spec::{Family, RopeScaling};
use crate::{Error, Result};

/// Base and scaling. transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart.
pub(super) fn read(f: &Fields<'_>, family: Family, max_position: usize, head_dim: usize) -> Result<(f64, RopeScaling)> {
    let section = ["rope_scaling", "rope_parameters"].into_iter().find(|k| f.map.get(*k).is_some_and(|v| !v.is_null()));
    let theta = |f: &Fields<'_>, default| f.float("rope_theta", default, 1.0, 1e18);
    let top = theta(f, Some(if family == Family::Mixtral { 1e6 } else { 10_000.0 }))?;
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
    // The pretrained length: beside the section (Phi-3, which always has it), in it, or the longest position.
    let beside = match family {
        Family::Phi3 => Some(4096),
        _ => None,
    };
    let key = "original_max_position_embeddings";
    let original = match f.map.get(key).is_some_and(|v| !v.is_null()) || beside.is_some() {
        true => f.size(key, beside, 1 << 30)?,
        false => s.size(key, Some(max_position), 1 << 30)?,
    };
    let factor = |s: &Fields<'_>| s.float("factor", None, 1.0, 1e6);
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor(&s)? },
        "dynamic" => RopeScaling::Dynamic { factor: factor(&s)? },
        "llama3" => llama3(&s, original)?,
        // Phi-3's first files call LongRoPE `su` or `yarn`.
        "longrope" | "su" => longrope(&s, max_position, original, head_dim)?,
        "yarn" if family == Family::Phi3 => longrope(&s, max_position, original, head_dim)?,
        "yarn" => yarn(&s, max_position, original)?,
        other => {
            return Err(Error::new("this rope scaling is not supported")
                .at(format!("{section}.rope_type"))
                .expected("`default`, `linear`, `dynamic`, `llama3`, `yarn` or `longrope`")
                .found(format!("`{other}`"))
                .next("use a model with one of these"));
        }
    };
    Ok((rope_theta, scaling))
}

fn llama3(s: &Fields<'_>, original_max_position_embeddings: usize) -> Result<RopeScaling> {
    let low_freq_factor = s.float("low_freq_factor", None, 1e-6, 1e6)?;
    let high_freq_factor = s.float("high_freq_factor", None, 1e-6, 1e6)?;
    if low_freq_factor >= high_freq_factor {
        return Err(Error::new("the band of scaled frequencies is empty")
            .at(format!("{}.high_freq_factor", s.prefix))
            .expected(format!("more than low_freq_factor = {low_freq_factor}"))
            .found(high_freq_factor.to_string())
            .next("compare config.json with the model's page"));
    }
    let factor = s.float("factor", None, 1.0, 1e6)?;
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings })
}

/// transformers `_compute_yarn_parameters`: what the config leaves out.
fn yarn(s: &Fields<'_>, max_position: usize, original_max_position_embeddings: usize) -> Result<RopeScaling> {
    let ratio = (max_position as f64 / original_max_position_embeddings as f64).max(1.0);
    let factor = s.float("factor", Some(ratio), 1.0, 1e6)?;
    let (mscale, all) = (s.float("mscale", Some(0.0), 0.0, 1e6)?, s.float("mscale_all_dim", Some(0.0), 0.0, 1e6)?);
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let inferred = if mscale > 0.0 && all > 0.0 { scale(mscale) / scale(all) } else { scale(1.0) };
    let (beta_fast, beta_slow) =
        (s.float("beta_fast", Some(32.0), 1e-6, 1e6)?, s.float("beta_slow", Some(1.0), 1e-6, 1e6)?);
    if beta_fast <= beta_slow {
        return Err(Error::new("YaRN's ramp is empty")
            .at(format!("{}.beta_fast", s.prefix))
            .expected(format!("more than beta_slow = {beta_slow}"))
            .found(beta_fast.to_string())
            .next("compare config.json with the model's page"));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        truncate: s.bool("truncate", true)?,
        attention_factor: s.float("attention_factor", Some(inferred), 1e-6, 1e6)?,
        original_max_position_embeddings,
    })
}

/// transformers `_compute_longrope_parameters`: what the config leaves out.
fn longrope(
    s: &Fields<'_>,
    max_position: usize,
    original_max_position_embeddings: usize,
    head_dim: usize,
) -> Result<RopeScaling> {
    let list = |key: &str| -> Result<Vec<f64>> {
        let expected = format!("a list of head_dim / 2 = {} numbers above 0", head_dim / 2);
        let v = s.map.get(key);
        let numbers: Option<Vec<f64>> = v
            .and_then(Value::as_array)
            .filter(|a| a.len() == head_dim / 2)
            .and_then(|a| a.iter().map(|x| x.as_f64().filter(|x| (1e-6..=1e9).contains(x))).collect());
        numbers.ok_or_else(|| s.wrong(key, &expected, v))
    };
    let original = original_max_position_embeddings as f64;
    let factor = s.float("factor", Some((max_position as f64 / original).max(1.0)), 1.0, 1e6)?;
    let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
    if original_max_position_embeddings < 2 {
        return Err(s.wrong("original_max_position_embeddings", "at least 2 tokens", None));
    }
    Ok(RopeScaling::Longrope {
        short_factor: list("short_factor")?,
        long_factor: list("long_factor")?,
        attention_factor: s.float("attention_factor", Some(inferred), 1e-6, 1e6)?,
        original_max_position_embeddings,
    })
}
