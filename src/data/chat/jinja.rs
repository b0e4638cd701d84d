//! minijinja set up as transformers sets up Jinja for chat templates (`utils/chat_template_utils.py`).

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use fancy_regex::Regex;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value};

use super::RenderedChat;
use super::json::{Style, to_json};
use crate::{Error, Result};

/// Stand around the text of a `{% generation %}` block until it is rendered: two code points that Unicode keeps out of texts.
const MARKS: (char, char) = ('\u{FDD0}', '\u{FDD1}');

/// What one rendering may use up: about so many instructions, or 64 bytes of text for each (640 MB). The longest conversations
/// with the most involved templates take a thousandth of it; a template that never ends is stopped within seconds. What is not
/// counted: lists that a template doubles with `+` again and again, which minijinja 3.1 joins lazily and then walks through.
const FUEL: u64 = 10_000_000;
/// `{% generation %}` and `{% endgeneration %}`, with their whitespace control.
static GENERATION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());

/// Whether the template marks the assistant's turns.
pub fn has_generation_marks(source: &str) -> bool {
    let blocks = GENERATION.as_ref().map(|r| r.captures_iter(source).flatten().filter(|c| c.get(2).is_some()).count());
    blocks.is_some_and(|n| n > 0)
}

/// An environment with the template `chat` in it.
pub fn environment(source: &str) -> Result<Environment<'static>> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| failed(&e))?);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    env.add_filter("tunebook_generation", |text: String| format!("{}{text}{}", MARKS.0, MARKS.1));
    env.add_template_owned("chat", generation_as_filter(source)).map_err(|e| failed(&e))?;
    Ok(env)
}

/// A filter block has the whitespace rules and the scope of a generation block, and can mark its text.
fn generation_as_filter(source: &str) -> String {
    let Some(regex) = GENERATION.as_ref() else { return source.into() };
    let replaced = regex.replace_all(source, |c: &fancy_regex::Captures<'_>| {
        let group = |i| c.get(i).map_or("", |m| m.as_str());
        let tag = if group(2).is_empty() { "filter tunebook_generation" } else { "endfilter" };
        format!("{{%{} {tag} {}%}}", group(1), group(3))
    });
    replaced.into_owned()
}

/// Renders the template `chat`; the marks become ranges.
pub fn render(env: &Environment<'static>, variables: &serde_json::Value) -> Result<RenderedChat> {
    if contains_mark(variables) {
        return Err(Error::new("a message holds a character that is not text")
            .expected("no U+FDD0 and no U+FDD1 (Unicode noncharacters)"));
    }
    let template = env.get_template("chat").map_err(|e| failed(&e))?;
    let marked = template.render(to_value(variables)).map_err(|e| failed(&e))?;
    let mut text = String::with_capacity(marked.len());
    let (mut assistant, mut start): (Vec<Range<usize>>, usize) = (vec![], 0);
    for c in marked.chars() {
        match c {
            c if c == MARKS.0 => start = text.len(),
            c if c == MARKS.1 => assistant.push(start..text.len()),
            c => text.push(c),
        }
    }
    assistant.retain(|range| !range.is_empty());
    Ok(RenderedChat { text, assistant })
}

fn contains_mark(value: &serde_json::Value) -> bool {
    use serde_json::Value as J;
    match value {
        J::String(s) => s.contains([MARKS.0, MARKS.1]),
        J::Array(list) => list.iter().any(contains_mark),
        J::Object(map) => map.values().any(contains_mark),
        _ => false,
    }
}

/// What the template itself said by `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn failed(e: &minijinja::Error) -> Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Error::new("the chat template refused the conversation")
                .found(message.clone())
                .next("change the messages, or use another template");
        }
        source = error.source();
    }
    let error = Error::new("the chat template failed").found(e.to_string());
    let error = match e.kind() {
        ErrorKind::OutOfFuel => error.next("the template does not end, or makes far too much text: use another one"),
        ErrorKind::TemplateNotFound => error.next("a chat template cannot use other files: put their text into it"),
        _ => error,
    };
    match e.line() {
        Some(line) => error.at(format!("chat template, line {line}")),
        None => error,
    }
}

/// Python's `json.dumps(x, ensure_ascii=False, ...)`; not minijinja's filter, which escapes for HTML.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut style =
        Style { indent, sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false), ..Style::default() };
    style.ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    if indent.is_some() {
        style.item_separator = ",".into();
    }
    if let Some([item, key]) = separators.as_deref() {
        (style.item_separator, style.key_separator) = (item.clone(), key.clone());
    }
    kwargs.assert_all_used()?;
    Ok(Value::from_safe_string(to_json(value, &style)?))
}

/// The local time by `strftime`.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let bad = || minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot format {format:?}"));
    let format_c = std::ffi::CString::new(format.as_str()).map_err(|_| bad())?;
    let mut out = vec![0u8; 256 + 16 * format.len()];
    // SAFETY: `tm` is plain data that localtime_r fills; strftime writes at most `out.len()` bytes and says how many.
    let written = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        let now = libc::time(std::ptr::null_mut());
        if libc::localtime_r(&now, &mut tm).is_null() {
            return Err(bad());
        }
        libc::strftime(out.as_mut_ptr().cast(), out.len(), format_c.as_ptr(), &tm)
    };
    out.truncate(written);
    String::from_utf8(out).map_err(|_| bad())
}

/// A JSON object with its keys in order, as a Python dict has them.
#[derive(Debug)]
struct Dict(Vec<(Value, Value)>);

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(k, _)| k.clone()).collect())
    }
}

fn to_value(json: &serde_json::Value) -> Value {
    use serde_json::Value as J;
    match json {
        J::Null => Value::from(()),
        J::Bool(b) => Value::from(*b),
        J::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        J::String(s) => Value::from(s.as_str()),
        J::Array(list) => list.iter().map(to_value).collect(),
        J::Object(map) => {
            Value::from_object(Dict(map.iter().map(|(k, v)| (Value::from(k.as_str()), to_value(v))).collect()))
        }
    }
}
