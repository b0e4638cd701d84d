//! Files of rows in each format, and what is done with rows. The first byte says the format.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tunebook::data::{DataConfig, InstructionTemplate, RowFile, Tokenizer, detect, encode};

static DIR: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary directory"));
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "unk_token": "<unk>"}}"#;
    let config = r#"{"bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }}{% endfor %}"}"#;
    Tokenizer::from_json(json, Some(config)).expect("a good tokenizer")
});

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let extension = ["jsonl", "json", "csv", "tsv", "parquet"][usize::from(*first) % 5];
    let path = DIR.path().join(format!("rows.{extension}"));
    std::fs::write(&path, rest).expect("a temporary file");
    let Ok(file) = RowFile::open(&path) else { return };
    let _ = file.clone().slice(1, 2).read();
    let Ok(rows) = file.read() else { return };
    let _ = (rows.to_string(), rows.to_frame(), rows.split(1, 0));
    if let Ok(found) = detect(&rows, &TOKENIZER) {
        if let Ok(dataset) = encode(&rows, &TOKENIZER, &found.config.max_length(16)) {
            let packed = dataset.packed(16).expect("no example is longer");
            assert_eq!(packed.total_tokens(), dataset.total_tokens());
        }
    }
    let template = InstructionTemplate::new("a {a}", "{b}");
    let _ = encode(&rows, &TOKENIZER, &DataConfig::instruction(template));
});
