//! [`InstructionTemplate`]: one prompt and its completion from the columns of a row.

use serde::{Deserialize, Serialize};

use crate::data::Rows;
use crate::{Error, Result};

/// Prompt and completion with the columns of a row in `{braces}`; `{{` and `}}` are braces themselves.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
///
/// ```
/// use tunebook::data::{InstructionTemplate, Rows};
/// let template = InstructionTemplate::new("Q: {question}\nA:", " {answer}");
/// let rows = Rows::from_values(vec![serde_json::json!({"question": "2 + 2?", "answer": 4})])?;
/// assert_eq!(template.prompt(&rows, 0)?, "Q: 2 + 2?\nA:");
/// assert_eq!(template.completion(&rows, 0)?, " 4");
/// # Ok::<(), tunebook::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstructionTemplate {
    /// What the model is given.
    pub prompt: String,
    /// What it learns to write.
    pub completion: String,
    /// The prompt for rows in which column `input` is empty or missing; `None`: `prompt` serves them too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_without_input: Option<String>,
    /// The optional column that `prompt_without_input` does without.
    #[serde(default = "input")]
    pub input: String,
}

fn input() -> String {
    "input".into()
}

impl Default for InstructionTemplate {
    /// The same as [`InstructionTemplate::alpaca`].
    fn default() -> Self {
        InstructionTemplate::alpaca()
    }
}

impl InstructionTemplate {
    /// A template of a prompt and a completion. End the prompt where the completion's first token begins: with `"A:"`
    /// and `" {answer}"` rather than `"A: "` and `"{answer}"`, since most tokenizers put the space into the word.
    pub fn new(prompt: impl Into<String>, completion: impl Into<String>) -> Self {
        let (prompt, completion) = (prompt.into(), completion.into());
        InstructionTemplate { prompt, completion, prompt_without_input: None, input: input() }
    }

    /// The format of Stanford Alpaca: columns `instruction`, `input` (may be empty or missing) and `output`.
    pub fn alpaca() -> Self {
        InstructionTemplate::alpaca_columns("instruction", "input", "output")
    }

    /// [`alpaca`](Self::alpaca) with other names for its three columns; Dolly has `instruction`, `context`, `response`.
    pub fn alpaca_columns(instruction: &str, input: &str, output: &str) -> Self {
        let task = "Below is an instruction that describes a task";
        let request = "Write a response that appropriately completes the request.";
        InstructionTemplate {
            prompt: format!(
                "{task}, paired with an input that provides further context. {request}\n\n\
                 ### Instruction:\n{{{instruction}}}\n\n### Input:\n{{{input}}}\n\n### Response:\n"
            ),
            prompt_without_input: Some(format!(
                "{task}. {request}\n\n### Instruction:\n{{{instruction}}}\n\n### Response:\n"
            )),
            completion: format!("{{{output}}}"),
            input: input.into(),
        }
    }

    /// The columns that every row must have, in order of appearance.
    ///
    /// # Errors
    /// Braces that do not match.
    pub fn columns(&self) -> Result<Vec<String>> {
        let mut columns: Vec<String> = vec![];
        for text in
            [Some(&self.prompt), self.prompt_without_input.as_ref(), Some(&self.completion)].into_iter().flatten()
        {
            for part in parse(text)? {
                if let Part::Column(name) = part
                    && !(self.prompt_without_input.is_some() && name == self.input)
                    && !columns.contains(&name)
                {
                    columns.push(name);
                }
            }
        }
        Ok(columns)
    }

    /// The prompt of row `i`.
    ///
    /// # Errors
    /// A column that the row has not or that is no text, with `file:line`; braces that do not match.
    pub fn prompt(&self, rows: &Rows, i: usize) -> Result<String> {
        fill(self.prompt_of(rows.text(i, &self.input).is_ok_and(|t| !t.is_empty())), |column| rows.text(i, column))
    }

    /// The completion of row `i`.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn completion(&self, rows: &Rows, i: usize) -> Result<String> {
        fill(&self.completion, |column| rows.text(i, column))
    }

    /// A prompt to generate from: `template.prompt_for(&[("instruction", "Name three trees.")])`.
    ///
    /// # Errors
    /// A column that is not given; braces that do not match.
    pub fn prompt_for(&self, values: &[(&str, &str)]) -> Result<String> {
        let find = |column: &str| values.iter().find(|(name, _)| *name == column).map(|(_, text)| *text);
        fill(self.prompt_of(find(&self.input).is_some_and(|t| !t.is_empty())), |column| {
            find(column).map(String::from).ok_or_else(|| {
                Error::new(format!("the prompt needs a value for `{column}`"))
                    .expected(format!("a value for each of {:?}", self.columns().unwrap_or_default()))
                    .found(format!("values for {:?}", values.iter().map(|v| v.0).collect::<Vec<_>>()))
            })
        })
    }

    fn prompt_of(&self, has_input: bool) -> &str {
        match &self.prompt_without_input {
            Some(without) if !has_input => without,
            _ => &self.prompt,
        }
    }
}

enum Part {
    Text(String),
    Column(String),
}

fn fill(template: &str, value: impl Fn(&str) -> Result<String>) -> Result<String> {
    let mut out = String::new();
    for part in parse(template)? {
        match part {
            Part::Text(text) => out += &text,
            Part::Column(name) => out += &value(&name)?,
        }
    }
    Ok(out)
}

fn parse(template: &str) -> Result<Vec<Part>> {
    let bad = |found: &str| {
        Err(Error::new("a template has a brace without its partner")
            .at(format!("template {template:?}"))
            .expected("column names in {braces}; {{ and }} for braces in the text")
            .found(found.to_string()))
    };
    let (mut parts, mut text, mut rest) = (vec![], String::new(), template);
    while let Some(at) = rest.find(['{', '}']) {
        let (before, brace) = rest.split_at(at);
        text += before;
        if brace.starts_with("{{") || brace.starts_with("}}") {
            text += &brace[..1];
            rest = &brace[2..];
            continue;
        }
        let Some(end) = brace.find('}').filter(|&end| end > 1) else { return bad(brace) };
        if brace[1..end].contains('{') {
            return bad(brace);
        }
        parts.push(Part::Text(std::mem::take(&mut text)));
        parts.push(Part::Column(brace[1..end].into()));
        rest = &brace[end + 1..];
    }
    text += rest;
    parts.push(Part::Text(text));
    Ok(parts)
}
