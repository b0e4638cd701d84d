//! Rotary frequencies (transformers `modeling_rope_utils.py`).

use std::f64::consts::TAU;

use super::{ModelSpec, RopeScaling};

impl ModelSpec {
    /// Radians per position of each pair of a head, `[head_dim / 2]`: `rope_theta^(-2i / head_dim)`, scaled as
    /// [`RopeScaling`] says; of texts up to the pretrained length.
    pub fn inv_freq(&self) -> Vec<f32> {
        self.frequencies(false)
    }

    /// The frequencies for texts beyond [`ModelSpec::rope_switch`], where those are others.
    pub fn long_inv_freq(&self) -> Option<Vec<f32>> {
        self.rope_switch().map(|_| self.frequencies(true))
    }

    /// The longest text, in tokens, that the first frequencies are for (LongRoPE); `None`: they are for every text.
    pub fn rope_switch(&self) -> Option<usize> {
        match self.rope_scaling {
            RopeScaling::Longrope { original_max_position_embeddings: n, .. } if n < self.max_position_embeddings => {
                Some(n)
            }
            _ => None,
        }
    }

    /// Factor of cosine and sine: YaRN and LongRoPE scale the scores by its square.
    pub fn rope_attention_factor(&self) -> f32 {
        match self.rope_scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Longrope { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        }
    }

    fn frequencies(&self, long: bool) -> Vec<f32> {
        let d = self.head_dim as f64;
        let one = |i: usize| {
            let f = self.rope_theta.powf(-2.0 * i as f64 / d);
            self.rope_scaling.apply(f, i, self.head_dim, self.rope_theta, long) as f32
        };
        (0..self.head_dim / 2).map(one).collect()
    }
}

impl RopeScaling {
    /// Frequency `i`, scaled.
    fn apply(&self, f: f64, i: usize, head_dim: usize, theta: f64, long: bool) -> f64 {
        match self {
            // No text is longer than max_position_embeddings, up to which dynamic scaling changes nothing.
            RopeScaling::Default | RopeScaling::Dynamic { .. } => f,
            RopeScaling::Linear { factor } => f / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let wavelength = TAU / f;
                let original = *original_max_position_embeddings as f64;
                if wavelength > original / low_freq_factor {
                    f / factor
                } else if wavelength < original / high_freq_factor {
                    f
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } => {
                let d = head_dim as f64;
                // The dimension at which a frequency turns `rotations` times within the pretrained length.
                let dimension = |rotations: f64| {
                    d * (*original_max_position_embeddings as f64 / (rotations * TAU)).ln() / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(d - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * divided + f * (1.0 - divided)
            }
            RopeScaling::Longrope { short_factor, long_factor, .. } => {
                f / if long { long_factor[i] } else { short_factor[i] }
            }
        }
    }
}
