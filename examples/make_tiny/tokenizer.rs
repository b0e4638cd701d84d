//! The tokenizer: byte-level BPE, trained on the world's text.

use std::path::Path;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, TokenizerBuilder};
use tunebook::files::write_atomic_bytes;
use tunebook::{Error, Result};

/// `[INST]` and `[/INST]` never occur in the pretraining text: that they ask for an answer is left to fine-tuning.
pub const SPECIAL: [&str; 5] = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"];
/// Ids of `<s>` and `</s>`.
pub const BOS: u32 = 1;
/// End of a document and of an answer.
pub const EOS: u32 = 2;

const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant roles') }}\
{% endif %}{% endfor %}";

/// Trains it on `texts` and writes `tokenizer.json` and `tokenizer_config.json`.
pub fn train(texts: &[String], vocab_size: usize, dir: &Path) -> Result<()> {
    let failed = |e: tokenizers::Error| Error::new("the tokenizer could not be made").found(e.to_string());
    let special = |s: &str| AddedToken::from(s, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(SPECIAL.iter().map(|s| special(s)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    // Every word begins with a space, the first one too: `Mia` is the same token wherever it stands.
    let bytes = ByteLevel::new(true, false, true);
    let bos = TemplateProcessing::builder()
        .try_single("<s> $A")
        .and_then(|b| b.special_tokens(vec![("<s>", BOS)]).build().map_err(|e| e.to_string()))
        .map_err(|e| failed(e.into()))?;
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(Some(bos))
        .with_decoder(Some(bytes))
        .build()
        .map_err(failed)?;
    tokenizer.train(&mut trainer, texts.iter()).map_err(failed)?;
    write_atomic_bytes(dir.join("tokenizer.json"), tokenizer.to_string(true).map_err(failed)?.as_bytes())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    });
    write_atomic_bytes(dir.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())
}
