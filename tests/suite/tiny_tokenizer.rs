//! A tokenizer made here, of the same kind as Llama's and Mistral's: BPE with byte fallback, `▁` for spaces, `<s>` in front.

use serde_json::{Value, json};
use tunebook::data::Tokenizer;

/// Merges, in order; each makes a token.
const MERGES: [(&str, &str); 12] = [
    ("t", "h"),
    ("th", "e"),
    ("▁", "the"),
    ("▁", "c"),
    ("▁c", "a"),
    ("▁ca", "t"),
    ("l", "l"),
    ("e", "ll"),
    ("▁", "h"),
    ("▁h", "ell"),
    ("▁hell", "o"),
    ("▁", "▁"),
];

/// The text of its `tokenizer.json`.
pub fn tokenizer_json() -> String {
    let mut tokens: Vec<String> =
        ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"].map(String::from).to_vec();
    tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    tokens.push("▁".into());
    tokens.extend((b'!'..=b'~').map(|c| char::from(c).to_string()));
    tokens.extend(MERGES.iter().map(|(a, b)| format!("{a}{b}")));
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, t)| (t.clone(), json!(id))).collect();
    let added: Vec<Value> = (0..6)
        .map(|id| {
            json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let single = json!([bos, {"Sequence": {"id": "A", "type_id": 0}}]);
    let pair = json!([bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": MERGES.iter().map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>()}
    })
    .to_string()
}

/// A chat template with the special tokens above.
pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

/// The tokenizer.
pub fn tiny_tokenizer() -> Tokenizer {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE});
    Tokenizer::from_json(&tokenizer_json(), Some(&config.to_string())).unwrap()
}
