//! GGUF: a model in one file, as llama.cpp and candle's quantized models read it.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{Base, Family, ModelSpec, RopeScaling};
use crate::{Error, Result, files};

/// How the matrices of a GGUF file are stored; vectors are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    /// 32 bits: exact.
    F32,
    /// 16 bits: rounded.
    F16,
    /// 8.5 bits: blocks of 32 with a 16-bit scale.
    Q8_0,
}

impl GgufType {
    fn dtype(self) -> GgmlDType {
        match self {
            GgufType::F32 => GgmlDType::F32,
            GgufType::F16 => GgmlDType::F16,
            GgufType::Q8_0 => GgmlDType::Q8_0,
        }
    }

    /// `general.file_type`.
    fn number(self) -> u32 {
        match self {
            GgufType::F32 => 0,
            GgufType::F16 => 1,
            GgufType::Q8_0 => 7,
        }
    }
}

/// Writes a dense model as a GGUF file of the architecture `llama`, without its tokenizer: give that to the program which reads
/// it, as candle does.
///
/// The rows of q_proj and k_proj are put into llama.cpp's order, in which the two numbers that a rotation turns are
/// neighbours. A sliding window has no place in this architecture: contexts longer than the window attend to everything. The
/// whole model is in memory while it is written, in the chosen type.
///
/// # Errors
/// A 4-bit model (merge it onto its dequantized base first), a family other than Llama and Mistral, scaled rotary
/// embeddings, a width that blocks of 32 do not divide; input and output errors. An existing file is replaced only by a whole
/// one.
pub fn write_gguf(base: &Base, path: impl AsRef<Path>, kind: GgufType) -> Result<()> {
    let path = path.as_ref();
    let spec = base.spec();
    refuse(base)?;
    let mut tensors = Vec::new();
    for (name, from) in names(spec) {
        tensors.push((name, tensor(base, &from, kind).map_err(|e| e.at(from))?));
    }
    let metadata = metadata(spec, kind);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    // candle's writer seeks, so it gets a file of its own beside the target.
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let tmp = tempfile::NamedTempFile::new_in(dir).map_err(|e| Error::io("create a file", dir, e))?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, tmp);
    gguf_file::write(&mut out, &metadata, &tensors).map_err(|e| Error::from(e).at_path(path))?;
    let tmp = out.into_inner().map_err(|e| Error::io("write", path, e.into_error()))?;
    tmp.as_file().sync_all().map_err(|e| Error::io("write", path, e))?;
    tmp.persist(path).map_err(|e| Error::io("rename into place", path, e.error))?;
    files::sync_dir(dir)
}

fn refuse(base: &Base) -> Result<()> {
    let spec = base.spec();
    let no = |what: &str, found: String, next: &str| {
        Err(Error::new(format!("GGUF export: {what}")).at_path(base.dir()).found(found).next(next.to_owned()))
    };
    if base.quantization().is_some() {
        let next = "merge it first: lora::merge(..).onto(MergeBase::Dequantized(..)), or export its original";
        return no("the model is in 4 bits", "a bitsandbytes checkpoint".into(), next);
    }
    if !matches!(spec.family, Family::Llama | Family::Mistral) {
        return no("only Llama and Mistral are supported", format!("{:?}", spec.family), "use llama.cpp's converter");
    }
    if spec.rope_scaling != RopeScaling::Default {
        let found = format!("{:?}", spec.rope_scaling);
        return no("scaled rotary embeddings are not supported", found, "use llama.cpp's converter");
    }
    Ok(())
}

/// GGUF's name of each tensor, and ours.
fn names(spec: &ModelSpec) -> Vec<(String, String)> {
    let mut all = vec![
        ("token_embd.weight".to_owned(), "model.embed_tokens.weight".to_owned()),
        ("output_norm.weight".into(), "model.norm.weight".into()),
    ];
    if !spec.tie_word_embeddings {
        all.push(("output.weight".into(), "lm_head.weight".into()));
    }
    let parts = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    for layer in 0..spec.num_hidden_layers {
        let name = |(to, from): (&str, &str)| {
            (format!("blk.{layer}.{to}.weight"), format!("model.layers.{layer}.{from}.weight"))
        };
        all.extend(parts.map(name));
    }
    all
}

fn tensor(base: &Base, name: &str, kind: GgufType) -> Result<QTensor> {
    let spec = base.spec();
    let shape = base.checkpoint().info(name)?.shape;
    let mut values = base.checkpoint().read_f32(name)?;
    let heads = [("q_proj.weight", spec.num_attention_heads), ("k_proj.weight", spec.num_key_value_heads)];
    if let Some((_, heads)) = heads.into_iter().find(|(end, _)| name.ends_with(end)) {
        values = interleaved(&values, heads, spec.head_dim, spec.hidden_size);
    }
    let dtype = if shape.len() == 1 { GgmlDType::F32 } else { kind.dtype() };
    let last = shape.last().copied().unwrap_or(0);
    if !last.is_multiple_of(dtype.block_size()) {
        return Err(Error::new("GGUF export: a matrix cannot be cut into blocks")
            .expected(format!("a width that {} divides", dtype.block_size()))
            .found(format!("{shape:?}"))
            .next("export it as F16"));
    }
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
    Ok(QTensor::quantize(&tensor, dtype)?)
}

/// Rows `[heads, 2, head_dim / 2]` as `[heads, head_dim / 2, 2]`: transformers rotates number i with number i + head_dim / 2,
/// llama.cpp number 2 i with number 2 i + 1.
fn interleaved(rows: &[f32], heads: usize, head_dim: usize, width: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let row = |head: usize, i: usize| {
        let from = head * head_dim + (i % 2) * half + i / 2;
        &rows[from * width..(from + 1) * width]
    };
    (0..heads).flat_map(|head| (0..head_dim).flat_map(move |i| row(head, i).iter().copied())).collect()
}

fn metadata(spec: &ModelSpec, kind: GgufType) -> Vec<(&'static str, Value)> {
    let number = |n: usize| Value::U32(n as u32);
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("general.name", Value::String(spec.name.clone())),
        ("general.file_type", Value::U32(kind.number())),
        ("llama.vocab_size", number(spec.vocab_size)),
        ("llama.context_length", number(spec.max_position_embeddings)),
        ("llama.embedding_length", number(spec.hidden_size)),
        ("llama.block_count", number(spec.num_hidden_layers)),
        ("llama.feed_forward_length", number(spec.intermediate_size)),
        ("llama.attention.head_count", number(spec.num_attention_heads)),
        ("llama.attention.head_count_kv", number(spec.num_key_value_heads)),
        ("llama.attention.key_length", number(spec.head_dim)),
        ("llama.attention.value_length", number(spec.head_dim)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(spec.rms_norm_eps as f32)),
        ("llama.rope.dimension_count", number(spec.head_dim)),
        ("llama.rope.freq_base", Value::F32(spec.rope_theta as f32)),
    ]
}
