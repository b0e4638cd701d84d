//! How a model's shape and its files show themselves.

use super::units::{bytes, count, percent, plain, short_count};
use super::{Card, Cell, Show, Table, Tone, shown};
use crate::model::{Base, Checkpoint, ModelSpec, RopeScaling};

impl Show for ModelSpec {
    fn card(&self) -> Card {
        let (total, dtype) = (self.total_params(), self.dtype);
        let attention = format!(
            "{} query heads, {} key/value heads of {}{}",
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            window(self)
        );
        Card::new(&self.name)
            .subtitle(format!("{}, {} parameters", self.family.label(), short_count(total)))
            .facts([
                ("layers", count(self.num_hidden_layers as u64)),
                ("hidden_size", count(self.hidden_size as u64)),
                ("intermediate_size", count(self.intermediate_size as u64)),
                ("attention", attention),
                ("vocabulary", count(self.vocab_size as u64)),
                ("rotary base", format!("{}{}", plain(self.rope_theta), scaling(&self.rope_scaling))),
                ("longest context", format!("{} tokens", count(self.max_position_embeddings as u64))),
                ("weights", format!("{} in {}", bytes(total * dtype.size_in_bytes() as u64), dtype.as_str())),
            ])
            .table(parts(self))
    }
}

fn window(spec: &ModelSpec) -> String {
    let Some(w) = spec.sliding_window else { return String::new() };
    let layers = spec.num_hidden_layers - spec.full_attention_layers.len();
    let of = if layers == spec.num_hidden_layers { String::new() } else { format!(" in {layers} layers") };
    format!(", window of {} tokens{of}", count(w as u64))
}

fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::Default => String::new(),
        RopeScaling::Linear { factor } => format!(", linear scaling x {factor}"),
        RopeScaling::Dynamic { factor } => format!(", dynamic scaling x {factor}"),
        RopeScaling::Llama3 { factor, original_max_position_embeddings, .. } => {
            format!(", llama3 scaling x {factor} of {}", count(*original_max_position_embeddings as u64))
        }
        RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
            format!(", YaRN x {factor} of {}", count(*original_max_position_embeddings as u64))
        }
        RopeScaling::Longrope { original_max_position_embeddings, .. } => {
            format!(", LongRoPE of {}", count(*original_max_position_embeddings as u64))
        }
    }
}

/// Parameters by part, and which of them NF4 quantizes.
fn parts(spec: &ModelSpec) -> Table {
    let linear = |names: &[&str]| -> u64 {
        let of = |m: &&crate::model::LinearModule| names.iter().any(|n| m.name.ends_with(n));
        spec.linears().iter().filter(of).map(|m| (m.in_features * m.out_features) as u64).sum()
    };
    let table = (spec.vocab_size * spec.hidden_size) as u64;
    let attention = linear(&["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]);
    let mlp = linear(&["gate_proj", "up_proj", "gate_up_proj", "down_proj"]);
    let of = |kind: fn(&str) -> bool| -> u64 {
        let tensors = spec.tensors().into_iter().filter(|t| kind(&t.name));
        tensors.map(|t| t.shape.iter().product::<usize>() as u64).sum()
    };
    let norms = of(|name| name.contains("norm"));
    let biases = of(|name| name.ends_with(".bias"));
    let experts = of(|name| name.contains(".block_sparse_moe."));
    let head = if spec.tie_word_embeddings { 0 } else { table };
    let total = spec.total_params().max(1);
    let mut t = Table::new().words("part").numbers("parameters", "").numbers("share", "").words("").words("in QLoRA");
    let rows = [
        ("embed_tokens", table, 7, "stays 16-bit"),
        ("attention", attention, 0, "NF4"),
        ("mlp", mlp, 0, "NF4"),
        ("experts", experts, 2, "stay 16-bit"),
        ("biases", biases, 7, "stay 16-bit"),
        ("norms", norms, 7, "stay 16-bit"),
        ("lm_head", head, 7, if head == 0 { "tied to embed_tokens" } else { "stays 16-bit" }),
    ];
    for (name, params, colour, qlora) in rows {
        if params == 0 && matches!(name, "mlp" | "experts" | "biases") {
            continue;
        }
        let share = params as f64 / total as f64;
        let cells = [
            name.into(),
            count(params).into(),
            percent(share).into(),
            Cell::bar(share, colour),
            Cell::new(qlora).tone(Tone::Muted),
        ];
        t.row(cells);
    }
    t.total([Cell::new("together"), count(spec.total_params()).into(), "100.0 %".into(), "".into(), "".into()]);
    t
}

/// Tensors that the table of a checkpoint shows.
const TENSORS: usize = 16;

impl Show for Checkpoint {
    fn card(&self) -> Card {
        let names = self.names_in_file_order();
        let mut t = Table::new().words("tensor").words("dtype").words("shape").numbers("bytes", "");
        for name in names.iter().take(TENSORS) {
            let Ok(info) = self.info(name) else { continue };
            let shape = format!("{:?}", info.shape);
            t.row([Cell::new(name).code(), info.dtype.as_str().into(), shape.into(), count(info.bytes).into()]);
        }
        let card = Card::new(format!("Checkpoint of {} tensors", count(names.len() as u64)))
            .subtitle(format!("{}, {} in {} file(s)", self.path().display(), bytes(self.bytes()), self.shards().len()))
            .table(t);
        if names.len() > TENSORS {
            card.note(format!("… {} more", count((names.len() - TENSORS) as u64)))
        } else {
            card
        }
    }
}

impl Show for Base {
    fn card(&self) -> Card {
        let stored = match self.quantization() {
            Some(q) => format!(
                "4-bit, {}{}",
                q.bnb_4bit_quant_type,
                if q.bnb_4bit_use_double_quant { " with nested absmax" } else { "" }
            ),
            None => self.spec().dtype.as_str().to_owned(),
        };
        let mut card = self.spec().card();
        card.title = format!("Base model {}", card.title);
        card.facts([
            ("directory", self.dir().display().to_string()),
            ("stored as", stored),
            ("in files", bytes(self.checkpoint().bytes())),
        ])
    }
}

shown!(+ Display Checkpoint, Base);
shown!(ModelSpec {
    name,
    family,
    vocab_size,
    hidden_size,
    intermediate_size,
    num_hidden_layers,
    num_attention_heads,
    num_key_value_heads,
    head_dim,
    max_position_embeddings,
    rms_norm_eps,
    rope_theta,
    rope_scaling,
    sliding_window,
    full_attention_layers,
    qkv_bias,
    o_bias,
    mlp_bias,
    activation,
    query_pre_attn_scalar,
    attn_logit_softcapping,
    final_logit_softcapping,
    experts,
    tie_word_embeddings,
    dtype,
    bos_token_id,
    eos_token_id,
    pad_token_id,
});
