//! How many questions a model answers exactly as the rows do.

use serde_json::Value;

use super::{Decoder, Generation, Sampling, StopReason, generate_chat};
use crate::data::{ChatTemplate, Rows, Tokenizer, message};
use crate::{Error, Result, interrupt};

/// One question with the answer that was wanted and the one that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the user asks.
    pub question: String,
    /// What the row answers.
    pub wanted: String,
    /// What the model wrote, without white space around it.
    pub wrote: String,
}

impl Answer {
    /// Whether the two are the same text.
    pub fn is_exact(&self) -> bool {
        self.wanted == self.wrote
    }
}

/// The answers to all rows of a test set.
#[derive(Clone, PartialEq, Eq)]
pub struct ExactMatch {
    /// One for each row, in the rows' order.
    pub answers: Vec<Answer>,
}

impl ExactMatch {
    /// Number of exact answers.
    pub fn exact(&self) -> usize {
        self.answers.iter().filter(|a| a.is_exact()).count()
    }

    /// Share of exact answers, from 0 to 1.
    pub fn share(&self) -> f64 {
        self.exact() as f64 / self.answers.len().max(1) as f64
    }
}

/// Asks one question through the chat template and lets the model answer greedily.
///
/// `notebooks/08_merge_and_generate.ipynb` explains it.
///
/// # Errors
/// As [`generate_chat`](super::generate_chat()).
pub fn answer(
    model: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    question: &str,
    max_new_tokens: usize,
) -> Result<Generation> {
    let sampling = Sampling::greedy().max_new_tokens(max_new_tokens);
    generate_chat(model, tokenizer, template, &[message("user", question)], &sampling, &mut |_| {})
}

/// Asks every row's first user message, greedily with at most 32 new tokens, and compares with its assistant message.
///
/// `notebooks/08_merge_and_generate.ipynb` explains it.
///
/// # Errors
/// A row without `messages` of a user and an assistant, with its place; errors of the model.
pub fn exact_match(
    model: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    rows: &Rows,
) -> Result<ExactMatch> {
    let mut answers = Vec::with_capacity(rows.len());
    for i in 0..rows.len() {
        let (question, wanted) = turns(rows, i)?;
        let wrote = answer(model, tokenizer, template, &question, 32)?;
        if wrote.stop_reason == StopReason::Interrupted {
            return Err(interrupt::taken(format!("answering row {} of {}", i + 1, rows.len())));
        }
        let wrote = wrote.text.trim().to_owned();
        answers.push(Answer { question, wanted, wrote });
    }
    Ok(ExactMatch { answers })
}

/// The first user message of a row and the first assistant message.
fn turns(rows: &Rows, i: usize) -> Result<(String, String)> {
    let messages = rows.get(i).and_then(|row| row.get("messages")).and_then(Value::as_array);
    let content = |role: &str| {
        let found = messages.into_iter().flatten().find(|m| m["role"] == role)?;
        found["content"].as_str().map(|text| text.trim().to_owned())
    };
    content("user").zip(content("assistant")).ok_or_else(|| {
        Error::new("a row has no question with an answer")
            .at(rows.place(i))
            .expected("`messages` with a user and an assistant message")
            .next("use rows in the form of chat messages")
    })
}
