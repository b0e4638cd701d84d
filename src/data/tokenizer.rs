//! [`Tokenizer`]: a `tokenizer.json` with what `tokenizer_config.json` says about it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::files::read_to_string;
use crate::model::ModelSpec;
use crate::{Error, Result, json};

/// The name of the chat template that is used when none is asked for.
const DEFAULT: &str = "default";

/// Text to token ids and back. Cloning shares the tables.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Where it came from, for messages.
    source: String,
    /// One more than the largest id.
    id_count: usize,
    bos: Option<Special>,
    eos: Option<Special>,
    pad: Option<Special>,
    unk: Option<Special>,
    /// `add_bos_token` where the config has it; otherwise the post-processor of `tokenizer.json` decides.
    add_bos: Option<bool>,
    /// The chat templates by name; the only one of a config without names is `default`.
    chat_templates: Arc<Vec<(String, String)>>,
}

/// Which token serves as padding in other tools, and what follows from it; see [`Tokenizer::padding`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padding {
    /// The token, when there is one to use.
    pub token: Option<(String, u32)>,
    /// Whether it is also the end-of-sequence token.
    pub is_eos: bool,
    /// Why this one, and what to mind.
    pub reason: String,
}

impl fmt::Display for Padding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.token {
            Some((text, id)) => write!(f, "padding `{text}` = {id}: {}", self.reason),
            None => write!(f, "no padding token: {}", self.reason),
        }
    }
}

#[derive(Clone, Debug)]
struct Special {
    text: String,
    id: u32,
}

/// Ids with the bytes of the text that each came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// Byte range in the text of each token, `[T]`; empty for a token that was added (bos). Tokens that
    /// share one character have the same range.
    pub offsets: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// The tokenizer of a model directory: `tokenizer.json`, and, where they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja` and `additional_chat_templates/*.jinja`.
    ///
    /// # Errors
    /// A missing or malformed `tokenizer.json`, a malformed config, or a bos or eos token that is not in the vocabulary.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let text = read_to_string(dir.join("tokenizer.json")).map_err(|e| {
            if dir.join("tokenizer.model").exists() {
                e.next("this directory has only tokenizer.model (SentencePiece): convert it to tokenizer.json first")
            } else {
                e.next("give the directory that holds tokenizer.json; it is part of every Hugging Face model")
            }
        })?;
        let mut config = read_json_object(dir.join("tokenizer_config.json"))?;
        for (key, value) in read_json_object(dir.join("special_tokens_map.json"))? {
            config.entry(key).or_insert(value);
        }
        let source = dir.join("tokenizer.json").display().to_string();
        let mut templates = chat_templates(&config, &source)?;
        for (name, text) in template_files(dir)? {
            templates.retain(|(n, _)| *n != name);
            templates.push((name, text));
        }
        config.remove("chat_template");
        let mut tokenizer = Tokenizer::build(&text, &config, source)?;
        tokenizer.chat_templates = Arc::new(templates);
        Ok(tokenizer)
    }

    /// A tokenizer from the texts of `tokenizer.json` and, if there is one, `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn from_json(tokenizer_json: &str, tokenizer_config_json: Option<&str>) -> Result<Self> {
        let config = match tokenizer_config_json {
            Some(text) => parse_object(text, "tokenizer_config.json")?,
            None => serde_json::Map::new(),
        };
        Tokenizer::build(tokenizer_json, &config, "tokenizer.json".into())
    }

    fn build(tokenizer_json: &str, config: &serde_json::Map<String, Value>, source: String) -> Result<Self> {
        let bad = |found: String| {
            Error::new("could not read the tokenizer")
                .at(source.as_str())
                .expected("a tokenizer.json of Hugging Face tokenizers")
                .found(found)
        };
        // The library trusts the file in places, and panics where it should not have.
        let read = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(tokenizer_json));
        let read = read.map_err(|_| bad("what its reader did not expect".into()))?;
        let mut inner = read.map_err(|e| bad(e.to_string()))?;
        // Some files carry the truncation and padding of their last use.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| failed("set up", &e))?;
        let id_count = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if id_count == 0 {
            return Err(Error::new("the tokenizer has no tokens").at(source.as_str()));
        }
        let special = |key: &str| special_token(&inner, config, key, &source);
        let (bos, eos) = (special("bos_token")?, special("eos_token")?);
        // A pad or unk token outside the vocabulary does no harm: batches have no padding.
        let (pad, unk) = (special("pad_token").ok().flatten(), special("unk_token").ok().flatten());
        let add_bos = config.get("add_bos_token").and_then(Value::as_bool);
        let chat_templates = Arc::new(chat_templates(config, &source)?);
        Ok(Tokenizer { inner: Arc::new(inner), source, id_count, bos, eos, pad, unk, add_bos, chat_templates })
    }

    /// One more than the largest token id, added tokens included: the vocabulary that a model needs at least.
    pub fn vocab_size(&self) -> usize {
        self.id_count
    }

    /// Id of the beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|s| s.id)
    }

    /// Id of the end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|s| s.id)
    }

    /// Id of the padding token. Nothing here pads; other tools may.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad.as_ref().map(|s| s.id)
    }

    /// Id of the unknown token.
    pub fn unk_id(&self) -> Option<u32> {
        self.unk.as_ref().map(|s| s.id)
    }

    /// Text of the beginning-of-sequence token, such as `<s>`.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_ref().map(|s| s.text.as_str())
    }

    /// Text of the end-of-sequence token, such as `</s>`.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_ref().map(|s| s.text.as_str())
    }

    /// Source of the chat template that came with the tokenizer; of several, the one named `default`.
    pub fn chat_template_source(&self) -> Option<&str> {
        self.chat_templates.iter().find(|(name, _)| name == DEFAULT).map(|(_, text)| text.as_str())
    }

    /// Name and source of each chat template that came with the tokenizer.
    pub fn chat_templates(&self) -> &[(String, String)] {
        &self.chat_templates
    }

    /// Which token to pad with in tools that pad, and why. Nothing here does: a batch is a flat list of tokens, and the loss
    /// mask goes by position, so no choice of padding can change what is learnt.
    ///
    /// The trap is padding with the end-of-sequence token, as many scripts do (`pad_token = eos_token`): where a data
    /// collator masks labels by the padding's id, every end of sequence loses its label, and the model never learns to stop.
    pub fn padding(&self) -> Padding {
        let token = |s: &Special| Some((s.text.clone(), s.id));
        let is_eos = |s: &Special| self.eos.as_ref().is_some_and(|eos| eos.id == s.id);
        let (token, is_eos, reason) = match (&self.pad, &self.unk) {
            (Some(pad), _) if is_eos(pad) => (
                token(pad),
                true,
                "it is also the end of sequence: a tool that masks labels by the padding's id hides every end, and the \
                 model never learns to stop; here labels are masked by position",
            ),
            (Some(pad), _) => (token(pad), false, "the tokenizer's own padding token, which is no other special token"),
            (None, Some(unk)) if !is_eos(unk) => (
                token(unk),
                false,
                "the tokenizer has no padding token; the unknown token is safer than the end of sequence, which must keep \
                 its label",
            ),
            (None, _) => (
                None,
                false,
                "none is needed here; a tool that pads should use a token that texts do not hold, never the end of sequence",
            ),
        };
        Padding { token, is_eos, reason: reason.into() }
    }

    /// Ids of a prompt: what the model sees before it continues.
    ///
    /// Begins with bos where the tokenizer wants that, never with two, never ends with an added eos. Special tokens
    /// written out in the text become their ids.
    ///
    /// # Errors
    /// Text that the tokenizer cannot encode.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_with_offsets(text)?.ids)
    }

    /// [`encode`](Self::encode), with the bytes that each token came from.
    ///
    /// # Errors
    /// Text that the tokenizer cannot encode.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Encoding> {
        let has_bos = self.bos_token().is_some_and(|bos| text.starts_with(bos));
        if has_bos || self.add_bos == Some(false) {
            return self.encode_plain_with_offsets(text);
        }
        let mut encoding = self.run(text, true)?;
        if let Some(bos) = self.bos_id()
            && self.add_bos == Some(true)
            && encoding.ids.first() != Some(&bos)
        {
            encoding.ids.insert(0, bos);
            encoding.offsets.insert(0, (0, 0));
        }
        let added_eos =
            encoding.ids.last().copied() == self.eos_id() && encoding.offsets.last().is_some_and(|o| o.0 == o.1);
        if added_eos && self.eos.is_some() {
            encoding.ids.pop();
            encoding.offsets.pop();
        }
        Ok(encoding)
    }

    /// Ids of text that already holds its special tokens, such as the output of a chat template: nothing is added.
    ///
    /// # Errors
    /// Text that the tokenizer cannot encode.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_plain_with_offsets(text)?.ids)
    }

    /// [`encode_plain`](Self::encode_plain), with the bytes that each token came from.
    ///
    /// # Errors
    /// Text that the tokenizer cannot encode.
    pub fn encode_plain_with_offsets(&self, text: &str) -> Result<Encoding> {
        self.run(text, false)
    }

    fn run(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let run = || self.inner.encode(text, add_special_tokens);
        let encoding = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
            .map_err(|_| failed("encode text", &"tokenizer.json describes something that cannot be done"))?
            .map_err(|e| failed("encode text", &e))?;
        Ok(Encoding { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Text of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// Ids that the tokenizer cannot decode.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| failed("decode tokens", &e))
    }

    /// Text of ids, with special tokens written out.
    ///
    /// # Errors
    /// Ids that the tokenizer cannot decode.
    pub fn decode_with_special_tokens(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| failed("decode tokens", &e))
    }

    /// The token as the vocabulary writes it, such as `▁the` or `<0x0A>`; `None` for an id that it has not.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Id of a token as the vocabulary writes it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a model can be fed by this tokenizer: every id must be a row of its embedding table.
    ///
    /// A model may have more rows than there are tokens (padding to a round number).
    ///
    /// # Errors
    /// When an id is beyond the model's `vocab_size`.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        if self.id_count <= spec.vocab_size {
            return Ok(());
        }
        let last = u32::try_from(self.id_count - 1).ok().and_then(|id| self.token(id)).unwrap_or_default();
        Err(Error::new("the tokenizer has another vocabulary than the model")
            .at(self.source.as_str())
            .expected(format!("token ids below {}, the vocab_size of {}", spec.vocab_size, spec.name))
            .found(format!("{} ids; the last, {}, is `{last}`", self.id_count, self.id_count - 1))
            .next("use the tokenizer from the model's own directory"))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer: {} ids", self.id_count)?;
        for (name, special) in [("bos", &self.bos), ("eos", &self.eos), ("pad", &self.pad), ("unk", &self.unk)] {
            if let Some(s) = special {
                write!(f, ", {name} `{}` = {}", s.text, s.id)?;
            }
        }
        match self.chat_templates.as_slice() {
            [] => f.write_str(", no chat template"),
            [_] => f.write_str(", with a chat template"),
            many => {
                let names: Vec<&str> = many.iter().map(|(name, _)| name.as_str()).collect();
                write!(f, ", with chat templates {}", names.join(", "))
            }
        }
    }
}

fn failed(action: &str, e: &dyn fmt::Display) -> Error {
    Error::new(format!("the tokenizer could not {action}")).found(e.to_string())
}

fn read_json_object(path: PathBuf) -> Result<serde_json::Map<String, Value>> {
    if !path.exists() {
        return Ok(serde_json::Map::new());
    }
    parse_object(&read_to_string(&path)?, &path.display().to_string())
}

fn parse_object(text: &str, at: &str) -> Result<serde_json::Map<String, Value>> {
    let bad = || Error::new("could not read a tokenizer's config").at(at).expected("a JSON object, no key twice");
    match json::parse(text.as_bytes()) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(bad().found("JSON that is no object")),
        Err(e) => Err(bad().caused_by(e)),
    }
}

/// A special token of the config: a string, or an object with `content`.
fn special_token(
    inner: &tokenizers::Tokenizer,
    config: &serde_json::Map<String, Value>,
    key: &str,
    source: &str,
) -> Result<Option<Special>> {
    let value = config.get(key);
    let Some(text) = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str())) else {
        return Ok(None);
    };
    match inner.token_to_id(text) {
        Some(id) => Ok(Some(Special { text: text.into(), id })),
        None => Err(Error::new("a special token is not in the vocabulary")
            .at(format!("{source}: {key}"))
            .expected("a token of tokenizer.json")
            .found(format!("`{text}`"))
            .next("use tokenizer.json and tokenizer_config.json of the same model")),
    }
}

/// `chat_template`: a string, or a list of named ones.
fn chat_templates(config: &serde_json::Map<String, Value>, source: &str) -> Result<Vec<(String, String)>> {
    let bad = |found: String| {
        Error::new("the chat template has an unknown form")
            .at(format!("{source}: chat_template"))
            .expected("a string, or a list of {name, template}")
            .found(found)
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(vec![]),
        Some(Value::String(text)) => Ok(vec![(DEFAULT.into(), text.clone())]),
        Some(Value::Array(list)) => {
            let part = |t: &Value, key: &str| t.get(key).and_then(Value::as_str).map(String::from);
            let named = |t: &Value| part(t, "name").zip(part(t, "template")).ok_or_else(|| bad(t.to_string()));
            list.iter().map(named).collect()
        }
        Some(other) => Err(bad(other.to_string())),
    }
}

/// The templates that have files of their own: `chat_template.jinja`, and more by name.
fn template_files(dir: &Path) -> Result<Vec<(String, String)>> {
    let mut found = vec![];
    let default = dir.join("chat_template.jinja");
    if default.exists() {
        found.push((DEFAULT.to_owned(), read_to_string(default)?));
    }
    let more = dir.join("additional_chat_templates");
    if let Ok(entries) = std::fs::read_dir(&more) {
        let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        paths.sort();
        for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == "jinja")) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            found.push((name, read_to_string(path)?));
        }
    }
    Ok(found)
}
