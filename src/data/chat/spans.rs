//! Where the assistant speaks, for templates that do not say so.

use std::ops::Range;

use serde_json::Value;

use super::{ChatOptions, ChatTemplate, RenderedChat};
use crate::{Error, Result};

/// A code point that Unicode keeps out of texts.
const EOS_MARK: &str = "\u{FDD2}";

/// The turns of `roles` in `text`, the rendering of all `messages`.
pub fn find(template: &ChatTemplate, messages: &[Value], text: String, roles: &[&str]) -> Result<RenderedChat> {
    let mut assistant: Vec<Range<usize>> = vec![];
    for (i, message) in messages.iter().enumerate() {
        if !roles.contains(&role(message)) {
            continue;
        }
        let after = assistant.last().map_or(0, |r| r.end);
        let start = start_of_turn(template, messages, i, &text)?.max(after);
        let end = end_of_turn(template, messages, i, &text)?;
        if end > start {
            assistant.push(start..end);
        }
    }
    Ok(RenderedChat { text, assistant })
}

/// The turn of message `i` begins where the prompt of the messages before it ends.
fn start_of_turn(template: &ChatTemplate, messages: &[Value], i: usize, text: &str) -> Result<usize> {
    if i == 0 {
        return start_of_content(messages, i, text, 0);
    }
    if role(&messages[i]) != "assistant" {
        let before = template.render(&messages[..i], &ChatOptions::default())?;
        return start_of_content(messages, i, text, common_prefix(&before, text));
    }
    let prompt = template.render(&messages[..i], &ChatOptions::prompt())?;
    if text.starts_with(&prompt) {
        return Ok(prompt.len());
    }
    // Some prompts say more than the finished turn, such as the beginning of a thought, which is taken out later.
    let before = template.render(&messages[..i], &ChatOptions::default())?;
    start_of_content(messages, i, text, common_prefix(&before, text))
}

fn start_of_content(messages: &[Value], i: usize, text: &str, from: usize) -> Result<usize> {
    let content = content(&messages[i]);
    let found = text.get(from..).and_then(|rest| rest.find(content)).map(|at| from + at);
    found.ok_or_else(|| cannot_find(i, "its text is not in the conversation after the messages before it"))
}

/// The turn of message `i` ends where the conversation up to it ends.
fn end_of_turn(template: &ChatTemplate, messages: &[Value], i: usize, text: &str) -> Result<usize> {
    if i + 1 == messages.len() {
        return Ok(text.len());
    }
    let upto = template.render(&messages[..=i], &ChatOptions::default())?;
    if text.starts_with(&upto) {
        return Ok(upto.len());
    }
    // Many templates put eos at the end of a conversation, or only at the end. With a character of its own for eos,
    // the first difference is where the turn ends, whatever the next turn begins with.
    let eos = template.parts.eos_token.as_deref().unwrap_or_default();
    let mut marked = template.clone();
    marked.parts.eos_token = Some(EOS_MARK.into());
    let upto = marked.render(&messages[..=i], &ChatOptions::default())?;
    let whole = marked.render(messages, &ChatOptions::default())?;
    let (turn, rest) = upto.split_at(common_prefix(&upto, &whole));
    let turn = turn.replace(EOS_MARK, eos);
    if rest.starts_with(EOS_MARK) && text.starts_with(&turn) {
        Ok(turn.len())
    } else {
        Err(cannot_find(i, "it is rendered differently when messages follow"))
    }
}

fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

fn content(message: &Value) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default().trim()
}

/// Length in bytes of what two texts have in common at the beginning, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((i, _), _)| i)
}

fn cannot_find(i: usize, why: &str) -> Error {
    Error::new("cannot tell where the assistant's turn begins and ends")
        .at(format!("message {i}"))
        .found(why.to_string())
        .next("put {% generation %} and {% endgeneration %} around it in the template, or train on all tokens")
}
