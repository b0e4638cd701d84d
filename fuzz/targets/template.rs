//! `tokenizer_config.json` with its chat template, rendered and searched for the assistant's turns.
//!
//! An input that begins with `{` is a config; any other is the template itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunebook::data::{ChatOptions, ChatTemplate, Tokenizer, message};

/// The smallest tokenizer: three tokens.
const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
    "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"}}"#;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let template = if text.starts_with('{') && !text.starts_with("{{") && !text.starts_with("{%") {
        let Ok(tokenizer) = Tokenizer::from_json(TOKENIZER, Some(text)) else { return };
        let _ = tokenizer.padding();
        ChatTemplate::from_tokenizer(&tokenizer)
    } else {
        ChatTemplate::new(text, Some("<s>"), Some("</s>"))
    };
    let Ok(template) = template else { return };
    let chat = [message("system", "Be kind."), message("user", "hi"), message("assistant", "hello")];
    let _ = template.render(&chat[..2], &ChatOptions::prompt());
    if let Ok(found) = template.render_with_assistant(&chat) {
        for range in found.assistant {
            // Ranges are whole characters of the text.
            assert!(found.text.get(range).is_some());
        }
    }
});
