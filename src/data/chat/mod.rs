//! [`ChatTemplate`]: the Jinja template by which a model's conversations become text.

mod jinja;
mod json;
mod spans;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use minijinja::Environment;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::Tokenizer;
use crate::{Error, Result};

/// A model's chat template, rendered as transformers renders it (`apply_chat_template`): blocks trimmed, Python's
/// string methods, `raise_exception`, `strftime_now`, `tojson` and `{% generation %}`.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
///
/// ```
/// use tunebook::data::{ChatOptions, ChatTemplate, message};
/// let template = ChatTemplate::new(
///     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
///     None,
///     Some("</s>"),
/// )?;
/// let text = template.render(&[message("user", "Hello!")], &ChatOptions::prompt())?;
/// assert_eq!(text, "<user>Hello!</s><assistant>");
/// # Ok::<(), tunebook::Error>(())
/// ```
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Parts", into = "Parts")]
pub struct ChatTemplate {
    parts: Parts,
    environment: Arc<Environment<'static>>,
}

/// What a template is made of, and how it is saved.
#[derive(Clone, Serialize, Deserialize)]
struct Parts {
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    variables: Map<String, Value>,
}

impl TryFrom<Parts> for ChatTemplate {
    type Error = Error;

    fn try_from(parts: Parts) -> Result<Self> {
        Ok(ChatTemplate { environment: Arc::new(jinja::environment(&parts.source)?), parts })
    }
}

impl From<ChatTemplate> for Parts {
    fn from(template: ChatTemplate) -> Self {
        template.parts
    }
}

/// How a conversation is rendered; the fields are those of transformers' `apply_chat_template`.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatOptions {
    /// Whether the text ends with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether the text ends within the last message, to be continued by the model. Not with `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Tools, as JSON schemas of functions.
    pub tools: Option<Vec<Value>>,
}

impl ChatOptions {
    /// A prompt that the assistant answers: `add_generation_prompt`.
    pub fn prompt() -> Self {
        ChatOptions { add_generation_prompt: true, ..ChatOptions::default() }
    }
}

/// One message: `{"role": role, "content": content}`.
pub fn message(role: &str, content: &str) -> Value {
    serde_json::json!({"role": role, "content": content})
}

/// A rendered conversation with the parts that the assistant wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The text, special tokens written out.
    pub text: String,
    /// Byte ranges of `text` that are the assistant's, end-of-turn tokens included, in order.
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// A template from its Jinja source.
    ///
    /// - `bos_token`, `eos_token`: what `{{ bos_token }}` and `{{ eos_token }}` stand for.
    ///
    /// # Errors
    /// A source that is not Jinja, with the line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        ChatTemplate::try_from(Parts {
            source: source.into(),
            bos_token: bos_token.map(String::from),
            eos_token: eos_token.map(String::from),
            variables: Map::new(),
        })
    }

    /// The chat template that came with a tokenizer.
    ///
    /// # Errors
    /// A tokenizer without one (a base model, usually), or a template that is not Jinja.
    pub fn from_tokenizer(tokenizer: &Tokenizer) -> Result<Self> {
        let source = tokenizer.chat_template_source().ok_or_else(|| {
            let names: Vec<&str> = tokenizer.chat_templates().iter().map(|(n, _)| n.as_str()).collect();
            if !names.is_empty() {
                return Error::new("none of the tokenizer's chat templates is the default")
                    .expected("a template named `default`")
                    .found(names.join(", "))
                    .next("choose one: ChatTemplate::named(&tokenizer, name)");
            }
            Error::new("the tokenizer has no chat template")
                .expected("`chat_template` in tokenizer_config.json, or chat_template.jinja")
                .next("base models have none: use an instruction template, or ChatTemplate::new with a source")
        })?;
        ChatTemplate::new(source, tokenizer.bos_token(), tokenizer.eos_token())
    }

    /// One of the named chat templates that came with a tokenizer, such as `tool_use`.
    ///
    /// # Errors
    /// A name that is not there, with those that are; a template that is not Jinja.
    pub fn named(tokenizer: &Tokenizer, name: &str) -> Result<Self> {
        let templates = tokenizer.chat_templates();
        let Some((_, source)) = templates.iter().find(|(n, _)| n == name) else {
            let names: Vec<&str> = templates.iter().map(|(n, _)| n.as_str()).collect();
            return Err(Error::new("the tokenizer has no chat template of this name")
                .at("chat_template")
                .expected(format!("one of: {}", if names.is_empty() { "none".into() } else { names.join(", ") }))
                .found(format!("`{name}`")));
        };
        ChatTemplate::new(source, tokenizer.bos_token(), tokenizer.eos_token())
    }

    /// Sets a variable that the template reads, such as `date_string`, which many fill with today's date otherwise.
    pub fn set(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.parts.variables.insert(name.into(), value.into());
        self
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.parts.source
    }

    /// Text of a conversation. Encode it with [`Tokenizer::encode_plain`]: it has its special tokens already.
    ///
    /// # Errors
    /// No message; a conversation that the template refuses, in its own words; an error in the template, with the line.
    pub fn render(&self, messages: &[Value], options: &ChatOptions) -> Result<String> {
        if options.continue_final_message {
            return self.render_to_be_continued(messages, options);
        }
        Ok(self.render_marked(messages, options)?.text)
    }

    /// Text of a whole conversation, and where the assistant speaks in it: what a loss on completions trains on.
    ///
    /// Where the template marks the assistant's turns (`{% generation %}`), these marks are taken. Otherwise a turn
    /// begins where a prompt made of the messages before it ends, and ends where the conversation up to it ends.
    ///
    /// # Errors
    /// As [`render`](Self::render), and a template that renders a message differently when others follow, so that
    /// turns cannot be found.
    pub fn render_with_assistant(&self, messages: &[Value]) -> Result<RenderedChat> {
        self.render_with_roles(messages, &["assistant"])
    }

    /// As [`render_with_assistant`](Self::render_with_assistant), with the turns of `roles` in the place of the
    /// assistant's. The turns of the others begin with their text: what the template puts before it is not theirs.
    ///
    /// # Errors
    /// As there; no role at all.
    pub fn render_with_roles(&self, messages: &[Value], roles: &[&str]) -> Result<RenderedChat> {
        if roles.is_empty() {
            return Err(Error::new("there is no role to train on").expected("at least one, such as `assistant`"));
        }
        let rendered = self.render_marked(messages, &ChatOptions::default())?;
        if roles == ["assistant"] && jinja::has_generation_marks(&self.parts.source) {
            return Ok(rendered);
        }
        spans::find(self, messages, rendered.text, roles)
    }

    /// Renders once; `assistant` holds the ranges of `{% generation %}`.
    fn render_marked(&self, messages: &[Value], options: &ChatOptions) -> Result<RenderedChat> {
        if messages.is_empty() {
            return Err(Error::new("a conversation has no messages").expected("at least one message"));
        }
        let mut variables = self.parts.variables.clone();
        let tools = options.tools.clone().map_or(Value::Null, Value::Array);
        for (name, value) in [
            ("messages", Value::Array(messages.to_vec())),
            ("tools", tools),
            ("documents", Value::Null),
            ("add_generation_prompt", Value::Bool(options.add_generation_prompt)),
        ] {
            variables.insert(name.into(), value);
        }
        for (name, token) in [("bos_token", &self.parts.bos_token), ("eos_token", &self.parts.eos_token)] {
            if let Some(token) = token {
                variables.insert(name.into(), Value::String(token.clone()));
            }
        }
        jinja::render(&self.environment, &Value::Object(variables))
    }

    /// As transformers does it: a tag is put behind the last message, and the text is cut there.
    fn render_to_be_continued(&self, messages: &[Value], options: &ChatOptions) -> Result<String> {
        const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
        let cannot = |what: &str| Error::new("the final message cannot be continued").found(what.to_string());
        if options.add_generation_prompt {
            return Err(cannot("add_generation_prompt, which begins another one").next("set one of the two"));
        }
        let mut messages = messages.to_vec();
        let content = messages.last_mut().and_then(|m| m.get_mut("content"));
        match content {
            Some(Value::String(content)) => content.push_str(TAG),
            _ => return Err(cannot("a last message whose content is not text")),
        }
        let text =
            self.render_marked(&messages, &ChatOptions { continue_final_message: false, ..options.clone() })?.text;
        let at = text.rfind(TAG.trim_end()).ok_or_else(|| cannot("a template that leaves the last message out"))?;
        let (kept, rest) = text.split_at(at);
        // A template that trims its messages would have trimmed this one without the tag.
        Ok(if rest.starts_with(TAG) { kept } else { kept.trim_end() }.to_string())
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate: {} characters", self.parts.source.chars().count())?;
        match self.render(&[message("user", "…")], &ChatOptions::prompt()) {
            Ok(text) => write!(f, ", e.g. {text:?}"),
            Err(_) => Ok(()),
        }
    }
}
