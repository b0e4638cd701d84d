//! Rotary frequencies.

use std::f64::consts::TAU;

use super::{ModelSpec, RopeScaling};

impl ModelSpec {
    /// Radians per position of each pair of a head, `[head_dim / 2]`: `rope_theta^(-2i / head_dim)`, scaled as
    /// [`RopeScaling`] says (transformers `modeling_rope_utils.py`).
    pub fn inv_freq(&self) -> Vec<f32> {
        let d = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|i| {
                let f = self.rope_theta.powf(-2.0 * i as f64 / d);
                self.rope_scaling.apply(f) as f32
            })
            .collect()
    }
}

impl RopeScaling {
    /// One frequency, scaled.
    fn apply(&self, f: f64) -> f64 {
        let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } = *self
        else {
            return f;
        };
        let wavelength = TAU / f;
        let original = original_max_position_embeddings as f64;
        if wavelength > original / low_freq_factor {
            f / factor
        } else if wavelength < original / high_freq_factor {
            f
        } else {
            let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * f / factor + smooth * f
        }
    }
}
