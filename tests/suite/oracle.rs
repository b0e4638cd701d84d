//! The references that the engine is held against: random small models, and a decoder written with candle's tensors in
//! f64, whose gradients come from candle's autograd.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tempfile::TempDir;
use tunebook::data::{Dataset, Example, IGNORE_INDEX};
use tunebook::lora::{Adapter, LoraConfig};
use tunebook::model::{Activation, Base, ModelSpec, SafetensorsWriter, TensorHeader, pt_metadata};

/// A checkpoint with random weights, in a directory that goes with it.
pub struct RandomModel {
    pub base: Base,
    pub dir: TempDir,
}

/// Numbers of standard deviation `std`, nearly normal.
pub fn random(rng: &mut ChaCha8Rng, n: usize, std: f32) -> Vec<f32> {
    (0..n).map(|_| (0..12).map(|_| rng.random_range(-0.5f32..0.5)).sum::<f32>() * std).collect()
}

impl RandomModel {
    /// Writes `config.json` and `model.safetensors` (f32): matrices of standard deviation 1.5 / sqrt(in), norms around one.
    pub fn new(config: &Value, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let spec = ModelSpec::from_dir(dir.path()).unwrap();
        let tensors = spec.tensors();
        let headers = tensors.iter().map(|t| TensorHeader::new(t.name.clone(), DType::F32, t.shape.clone())).collect();
        let path = dir.path().join("model.safetensors");
        let mut out = SafetensorsWriter::create(path, headers, &pt_metadata()).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let norm = 1.0 - spec.norm_offset();
        for t in &tensors {
            let n = t.shape.iter().product();
            let values = match t.shape[..] {
                [_] if t.name.ends_with(".bias") => random(&mut rng, n, 0.3),
                [_] => random(&mut rng, n, 0.2).into_iter().map(|x| x + norm).collect(),
                // Embeddings of about unit size: the residual stream starts there.
                _ if t.name == "model.embed_tokens.weight" => random(&mut rng, n, 0.5 / spec.embedding_scale()),
                _ => random(&mut rng, n, 1.5 / (t.shape[1] as f32).sqrt()),
            };
            out.write_f32(&t.name, &values).unwrap();
        }
        out.finish().unwrap();
        RandomModel { base: Base::from_dir(dir.path()).unwrap(), dir }
    }

    pub fn spec(&self) -> &ModelSpec {
        self.base.spec()
    }
}

/// Mistral's form: grouped heads of a size of their own, a separate `lm_head`, and a window if one is given.
pub fn mistral(layers: usize, window: Option<usize>) -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
        "vocab_size": 101, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": window, "tie_word_embeddings": false, "hidden_act": "silu"
    })
}

/// Llama's form, with tied or separate `lm_head`.
pub fn llama(layers: usize, tied: bool) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 130,
        "num_hidden_layers": layers, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 67,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "tie_word_embeddings": tied,
        "hidden_act": "silu"
    })
}

/// Qwen2's form: q, k and v with a bias, a window from the second layer on.
pub fn qwen2(layers: usize) -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 101,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "use_sliding_window": true,
        "sliding_window": 20, "max_window_layers": 1, "tie_word_embeddings": true, "hidden_act": "silu"
    })
}

/// Qwen3's form: heads of q and k normed, heads of a size of their own.
pub fn qwen3(layers: usize) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
        "vocab_size": 101, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "hidden_act": "silu"
    })
}

/// Phi-3's form: q, k, v and gate, up in one matrix each.
pub fn phi3(layers: usize) -> Value {
    json!({
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 101,
        "max_position_embeddings": 512, "original_max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 30, "tie_word_embeddings": false, "hidden_act": "silu"
    })
}

/// Gemma's form: GeGLU, norms of weight + 1, scaled embeddings, one head of keys.
pub fn gemma(layers: usize) -> Value {
    json!({
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20,
        "vocab_size": 101, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh"
    })
}

/// Gemma 2's form: four norms in a layer, soft caps, a window in every other layer.
pub fn gemma2(layers: usize) -> Value {
    json!({
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
        "vocab_size": 101, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "query_pre_attn_scalar": 9, "sliding_window": 20, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0, "hidden_activation": "gelu_pytorch_tanh"
    })
}

/// Llama's form with every bias.
pub fn llama_bias(layers: usize) -> Value {
    let mut config = llama(layers, false);
    config["attention_bias"] = json!(true);
    config["mlp_bias"] = json!(true);
    config
}

/// Examples of the given lengths; the first third of each has no labels, as a prompt has none.
pub fn dataset(spec: &ModelSpec, lengths: &[usize], seed: u64) -> Dataset {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let examples = lengths.iter().map(|&n| {
        let input_ids: Vec<u32> = (0..n).map(|_| rng.random_range(0..spec.vocab_size as u32)).collect();
        let label = |(i, id): (usize, &u32)| if i < n / 3 { IGNORE_INDEX } else { *id as i32 };
        let labels = input_ids.iter().enumerate().map(label).collect();
        Example { input_ids, labels }
    });
    Dataset::new(examples.collect()).unwrap()
}

/// An adapter whose B is not zero, so that every gradient has something to go through.
pub fn adapter(spec: &ModelSpec, config: &LoraConfig, seed: u64) -> Adapter {
    let mut adapter = Adapter::init(spec, config, seed).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 1);
    for pair in adapter.tensors.values_mut() {
        pair.b = random(&mut rng, pair.b.len(), 0.3);
    }
    adapter
}

/// A decoder of candle tensors: in f64, or in bf16 as transformers computes in it (products with f32 sums, norms, softmax
/// and loss in f32, everything else and every result rounded).
pub struct Reference {
    spec: ModelSpec,
    dtype: DType,
    pub weights: BTreeMap<String, Var>,
    /// A, B, scaling by module.
    pub lora: BTreeMap<String, (Var, Var, f64)>,
}

fn tensor(data: &[f32], shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_slice(data, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn leaf(data: &[f32], shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&tensor(data, shape, dtype)).unwrap()
}

/// bf16 as f32; f64 stays.
fn up(x: &Tensor) -> Tensor {
    if x.dtype() == DType::BF16 { x.to_dtype(DType::F32).unwrap() } else { x.clone() }
}

fn matmul(a: &Tensor, b: &Tensor) -> Tensor {
    up(a).matmul(&up(b)).unwrap().to_dtype(a.dtype()).unwrap()
}

fn split(x: &Tensor, heads: usize, dim: usize) -> Tensor {
    x.reshape((x.dims()[0], heads, dim)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
}

impl Reference {
    /// `weight` gives the values of a tensor, f32.
    pub fn new(spec: &ModelSpec, dtype: DType, weight: impl Fn(&str) -> Vec<f32>, adapter: Option<&Adapter>) -> Self {
        let weights =
            spec.tensors().into_iter().map(|t| (t.name.clone(), leaf(&weight(&t.name), &t.shape, dtype))).collect();
        let pairs = adapter.into_iter().flat_map(|a| &a.tensors);
        let lora = pairs
            .map(|(name, p)| {
                let (a, b) = (leaf(&p.a, &[p.r, p.in_features], dtype), leaf(&p.b, &[p.out_features, p.r], dtype));
                (name.clone(), (a, b, p.scaling))
            })
            .collect();
        Reference { spec: spec.clone(), dtype, weights, lora }
    }

    /// The model of a base's own values, in f64.
    pub fn of(base: &Base, adapter: Option<&Adapter>) -> Self {
        Self::new(base.spec(), DType::F64, |name| base.checkpoint().read_f32(name).unwrap(), adapter)
    }

    fn weight(&self, name: &str) -> &Tensor {
        self.weights[name].as_tensor()
    }

    fn linear(&self, x: &Tensor, module: &str) -> Tensor {
        let mut y = matmul(x, &self.weight(&format!("{module}.weight")).t().unwrap());
        if let Some(b) = self.weights.get(&format!("{module}.bias")) {
            y = y.broadcast_add(b).unwrap();
        }
        let Some((a, b, scaling)) = self.lora.get(module) else { return y };
        let low = matmul(&matmul(x, &a.t().unwrap()), &b.t().unwrap());
        (y + (low * *scaling).unwrap()).unwrap()
    }

    fn norm(&self, x: &Tensor, name: &str) -> Tensor {
        let wide = up(x);
        let mean = wide.sqr().unwrap().mean_keepdim(candle_core::D::Minus1).unwrap();
        let rstd = (mean + self.spec.rms_norm_eps).unwrap().sqrt().unwrap().recip().unwrap();
        let normed = wide.broadcast_mul(&rstd).unwrap();
        if self.spec.norm_offset() != 0.0 {
            // Gemma rounds once, after the product.
            let weight = (up(self.weight(name)) + f64::from(self.spec.norm_offset())).unwrap();
            return normed.broadcast_mul(&weight).unwrap().to_dtype(self.dtype).unwrap();
        }
        normed.to_dtype(self.dtype).unwrap().broadcast_mul(self.weight(name)).unwrap()
    }

    /// Modules side by side, or one whose columns are cut.
    fn side_by_side<const N: usize>(
        &self,
        x: &Tensor,
        at: &str,
        names: [&str; N],
        fused: &str,
        widths: [usize; N],
    ) -> [Tensor; N] {
        if !self.spec.family.is_fused() {
            return names.map(|name| self.linear(x, &format!("{at}.{name}")));
        }
        let whole = self.linear(x, &format!("{at}.{fused}"));
        let mut first = 0;
        widths.map(|n| {
            first += n;
            whole.narrow(1, first - n, n).unwrap().contiguous().unwrap()
        })
    }

    fn capped(&self, x: Tensor, cap: Option<f64>) -> Tensor {
        match cap {
            Some(cap) => ((x / cap).unwrap().tanh().unwrap() * cap).unwrap(),
            None => x,
        }
    }

    fn act(&self, x: &Tensor) -> Tensor {
        if self.spec.activation == Activation::Silu {
            return x.silu().unwrap();
        }
        let inner =
            ((x + (x.powf(3.0).unwrap() * 0.044715).unwrap()).unwrap() * (2.0 / std::f64::consts::PI).sqrt()).unwrap();
        ((x * 0.5).unwrap() * (inner.tanh().unwrap() + 1.0).unwrap()).unwrap()
    }

    /// transformers' `rotate_half` form on `[heads, T, D]`.
    fn rotary(&self, x: &Tensor) -> Tensor {
        let (t, d) = (x.dims()[1], self.spec.head_dim);
        let inv_freq = self.spec.inv_freq();
        let angles: Vec<f32> = (0..t).flat_map(|p| inv_freq.iter().map(move |f| p as f32 * f)).collect();
        let angles = tensor(&angles, &[t, d / 2], DType::F64);
        let cast = |x: Tensor| x.to_dtype(self.dtype).unwrap();
        let scaled = |x: Tensor| cast((x * f64::from(self.spec.rope_attention_factor())).unwrap());
        let (cos, sin) = (scaled(angles.cos().unwrap()), scaled(angles.sin().unwrap()));
        let (a, b) = (x.narrow(2, 0, d / 2).unwrap(), x.narrow(2, d / 2, d / 2).unwrap());
        let mul = |x: &Tensor, y: &Tensor| x.broadcast_mul(y).unwrap();
        let (first, second) = ((mul(&a, &cos) - mul(&b, &sin)).unwrap(), (mul(&b, &cos) + mul(&a, &sin)).unwrap());
        Tensor::cat(&[first, second], 2).unwrap()
    }

    fn attention(&self, x: &Tensor, l: usize) -> Tensor {
        let at = &format!("model.layers.{l}.self_attn");
        let s = &self.spec;
        let (t, h, kv, d) = (x.dims()[0], s.num_attention_heads, s.num_key_value_heads, s.head_dim);
        let names = ["q_proj", "k_proj", "v_proj"];
        let [q, k, v] = self.side_by_side(x, at, names, "qkv_proj", [h * d, kv * d, kv * d]);
        let heads = |x: &Tensor, n: usize, norm: &str| match s.has_qk_norm() {
            true => self.rotary(&self.norm(&split(x, n, d), &format!("{at}.{norm}.weight"))),
            false => self.rotary(&split(x, n, d)),
        };
        let (q, k, v) = (heads(&q, h, "q_norm"), heads(&k, kv, "k_norm"), split(&v, kv, d));
        let repeat = |x: Tensor| {
            let x = x.reshape((kv, 1, t, d)).unwrap().broadcast_as((kv, h / kv, t, d)).unwrap();
            x.reshape((h, t, d)).unwrap()
        };
        let (k, v) = (repeat(k), repeat(v));
        let scores = up(&matmul(&q, &k.transpose(1, 2).unwrap().contiguous().unwrap()));
        let sees = |i: usize, j: usize| j <= i && s.window(l).is_none_or(|w| i - j < w);
        let mask: Vec<f32> = (0..t * t).map(|n| if sees(n / t, n % t) { 0.0 } else { -1e30 }).collect();
        let mask = tensor(&mask, &[t, t], scores.dtype());
        let scores = (scores / s.query_pre_attn_scalar.unwrap_or(d as f64).sqrt()).unwrap();
        let scores = self.capped(scores, s.attn_logit_softcapping).broadcast_add(&mask).unwrap();
        let e = scores.broadcast_sub(&scores.max_keepdim(2).unwrap().detach()).unwrap().exp().unwrap();
        let p = e.broadcast_div(&e.sum_keepdim(2).unwrap()).unwrap().to_dtype(self.dtype).unwrap();
        let o = matmul(&p, &v).transpose(0, 1).unwrap().reshape((t, h * d)).unwrap();
        self.linear(&o, &format!("{at}.o_proj"))
    }

    fn mlp(&self, x: &Tensor, at: &str) -> Tensor {
        let f = self.spec.intermediate_size;
        let [gate, up] = self.side_by_side(x, at, ["gate_proj", "up_proj"], "gate_up_proj", [f, f]);
        let h = (self.act(&gate) * up).unwrap();
        self.linear(&h, &format!("{at}.down_proj"))
    }

    /// Logits of one example, `[T, V]`.
    pub fn logits(&self, tokens: &[u32]) -> Tensor {
        let ids = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu).unwrap();
        let mut x = self.weight("model.embed_tokens.weight").index_select(&ids, 0).unwrap();
        if self.spec.family.is_gemma() {
            x = (x * (self.spec.hidden_size as f64).sqrt()).unwrap();
        }
        for l in 0..self.spec.num_hidden_layers {
            let at = format!("model.layers.{l}");
            let norm = |x: &Tensor, name: &str| self.norm(x, &format!("{at}.{name}.weight"));
            let mut attn = self.attention(&norm(&x, "input_layernorm"), l);
            let four = self.spec.norms().len() == 4;
            if four {
                attn = norm(&attn, "post_attention_layernorm");
            }
            x = (x + attn).unwrap();
            let before = if four { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
            let mut mlp = self.mlp(&norm(&x, before), &format!("{at}.mlp"));
            if four {
                mlp = norm(&mlp, "post_feedforward_layernorm");
            }
            x = (x + mlp).unwrap();
        }
        let x = self.norm(&x, "model.norm.weight");
        let head = if self.spec.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        self.capped(matmul(&x, &self.weight(head).t().unwrap()), self.spec.final_logit_softcapping)
    }

    /// Sum of the cross-entropies of an example, `None` when it has no label.
    pub fn loss(&self, example: &Example) -> Option<Tensor> {
        let next = &example.labels[1..];
        let kept: Vec<u32> = (0..next.len() as u32).filter(|&t| next[t as usize] != IGNORE_INDEX).collect();
        if kept.is_empty() {
            return None;
        }
        let targets: Vec<u32> = kept.iter().map(|&t| next[t as usize] as u32).collect();
        let ids = |x: &[u32]| Tensor::from_slice(x, x.len(), &Device::Cpu).unwrap();
        let logits = up(&self.logits(&example.input_ids)).index_select(&ids(&kept), 0).unwrap();
        let top = logits.max_keepdim(1).unwrap().detach();
        let sum = logits.broadcast_sub(&top).unwrap().exp().unwrap().sum_keepdim(1).unwrap();
        let lse = (sum.log().unwrap() + top).unwrap();
        let chosen = logits.gather(&ids(&targets).unsqueeze(1).unwrap(), 1).unwrap();
        Some((lse - chosen).unwrap().sum_all().unwrap())
    }

    /// The mean loss over all labels of a data set, and the gradient of every leaf by the engine's names.
    pub fn gradients(&self, ds: &Dataset) -> (f64, BTreeMap<String, Vec<f64>>) {
        let items: usize =
            (0..ds.len()).map(|i| ds.get(i).labels[1..].iter().filter(|l| **l != IGNORE_INDEX).count()).sum();
        let losses: Vec<Tensor> = (0..ds.len()).filter_map(|i| self.loss(ds.get(i))).collect();
        let total = (Tensor::stack(&losses, 0).unwrap().sum_all().unwrap() / items as f64).unwrap();
        let grads = total.backward().unwrap();
        let numbers = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let flat = |v: &Var| grads.get(v).map(numbers);
        let mut out = BTreeMap::new();
        for (name, w) in &self.weights {
            out.extend(flat(w).map(|g| (name.clone(), g)));
        }
        for (name, (a, b, _)) in &self.lora {
            out.extend(flat(a).map(|g| (format!("{name}.lora_A.weight"), g)));
            out.extend(flat(b).map(|g| (format!("{name}.lora_B.weight"), g)));
        }
        (numbers(&total)[0], out)
    }
}
