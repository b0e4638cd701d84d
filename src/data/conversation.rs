//! Conversations as data sets hold them: `{"role", "content"}`, ShareGPT's `{"from", "value"}`, either as JSON text.

use serde_json::{Map, Value};

use crate::{Error, Result, json};

/// ShareGPT's names of the speakers, and the roles that chat templates know.
const SPEAKERS: [(&str, &str); 12] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("function", "tool"),
    ("observation", "tool"),
];

/// Whether a value looks like a conversation: a list of objects of which the first has a speaker and a text.
pub(super) fn is_conversation(value: &Value) -> bool {
    let first = match value {
        Value::Array(list) => list.first().cloned(),
        Value::String(text) => as_list(text).and_then(|list| list.into_iter().next()),
        _ => None,
    };
    first.is_some_and(|m| m.get("role").is_some_and(Value::is_string) || m.get("from").is_some_and(Value::is_string))
}

/// The messages of a conversation, each with `role` and `content`; other keys, such as `tool_calls`, are kept.
///
/// # Errors
/// A value that is no list of messages; a message without a role or with an unknown speaker, with its number.
pub(super) fn messages(value: &Value) -> Result<Vec<Value>> {
    let bad = |found: String| {
        Error::new("this is not a conversation")
            .expected(
                r#"a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], or with "from" and "value""#,
            )
            .found(found)
    };
    let parsed;
    let list = match value {
        Value::Array(list) => list,
        // A CSV file has no lists.
        Value::String(text) => {
            parsed = as_list(text).ok_or_else(|| bad(start_of(value)))?;
            &parsed
        }
        other => return Err(bad(start_of(other))),
    };
    let message = |(i, m): (usize, &Value)| {
        let Value::Object(m) = m else { return Err(bad(format!("message {}: {}", i + 1, start_of(m)))) };
        if m.get("role").is_some_and(Value::is_string) {
            return Ok(Value::Object(without_nulls(m)));
        }
        match m.get("from").and_then(Value::as_str) {
            Some(from) => from_sharegpt(m, from).map_err(|e| e.at(format!("message {}", i + 1))),
            None => Err(bad(format!("message {} has no role: {}", i + 1, start_of(&Value::Object(m.clone()))))),
        }
    };
    list.iter().enumerate().map(message).collect()
}

/// Parquet gives every message every key; templates ask whether one is there. An empty `content` stays.
fn without_nulls(m: &Map<String, Value>) -> Map<String, Value> {
    m.iter()
        .filter(|(key, value)| key.as_str() == "content" || !value.is_null())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

fn from_sharegpt(m: &Map<String, Value>, from: &str) -> Result<Value> {
    let Some((_, role)) = SPEAKERS.iter().find(|(name, _)| *name == from) else {
        return Err(Error::new("a conversation has an unknown speaker")
            .expected(SPEAKERS.map(|(name, _)| name).join(", "))
            .found(format!("`{from}`"))
            .next("rename the speaker in the data"));
    };
    let mut out = Map::new();
    for (key, value) in without_nulls(m) {
        match key.as_str() {
            "from" => out.insert("role".into(), (*role).into()),
            "value" => out.insert("content".into(), value),
            _ => out.insert(key, value),
        };
    }
    Ok(Value::Object(out))
}

fn as_list(text: &str) -> Option<Vec<Value>> {
    let text = text.trim();
    if !text.starts_with('[') {
        return None;
    }
    match json::parse(text.as_bytes()) {
        Ok(Value::Array(list)) => Some(list),
        _ => None,
    }
}

fn start_of(value: &Value) -> String {
    value.to_string().chars().take(120).collect()
}
