//! Rows to tokens and labels.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::conversation;
use crate::data::report::{DataReport, DroppedRow};
use crate::data::tokenizer::Encoding;
use crate::data::{ChatTemplate, Dataset, Example, IGNORE_INDEX, InstructionTemplate, Rows, Tokenizer};
use crate::{Error, Result};

/// How a row becomes text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A prompt and a completion from the row's columns.
    Instruction(InstructionTemplate),
    /// A conversation: a column with a list of `{"role", "content"}`, or of ShareGPT's `{"from", "value"}`, rendered by a
    /// chat template.
    Messages {
        /// The column, usually `messages`.
        column: String,
        /// The model's chat template.
        template: ChatTemplate,
    },
    /// A column that holds the whole text.
    Text {
        /// The column, usually `text`.
        column: String,
    },
}

/// Which tokens have a loss.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// The completion, or the assistant's turns, with their end-of-sequence tokens.
    Completion,
    /// Every token.
    All,
    /// The turns of these roles in a conversation, from their text to the end of the turn; `["assistant"]` is the same as
    /// `Completion`.
    Roles(Vec<String>),
}

/// How rows become examples.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DataConfig {
    /// How a row becomes text.
    pub format: Format,
    /// Which tokens have a loss.
    pub train_on: TrainOn,
    /// Longer examples are cut to this many tokens; `None`: no limit.
    pub max_length: Option<usize>,
    /// Whether the end-of-sequence token follows each example, where the text does not end with it already. Without it a
    /// model does not learn to stop.
    pub add_eos: bool,
}

impl DataConfig {
    /// Prompt and completion; loss on the completion; ends with eos.
    pub fn instruction(template: InstructionTemplate) -> Self {
        DataConfig {
            format: Format::Instruction(template),
            train_on: TrainOn::Completion,
            max_length: None,
            add_eos: true,
        }
    }

    /// Conversations in column `messages`; loss on the assistant's turns; ends as the chat template ends it.
    pub fn messages(template: ChatTemplate) -> Self {
        let format = Format::Messages { column: "messages".into(), template };
        DataConfig { format, train_on: TrainOn::Completion, max_length: None, add_eos: false }
    }

    /// Whole texts in a column; loss on every token; ends with eos.
    pub fn text(column: &str) -> Self {
        DataConfig {
            format: Format::Text { column: column.into() },
            train_on: TrainOn::All,
            max_length: None,
            add_eos: true,
        }
    }

    /// Sets [`train_on`](Self#structfield.train_on).
    pub fn train_on(mut self, train_on: TrainOn) -> Self {
        self.train_on = train_on;
        self
    }

    /// Sets [`max_length`](Self#structfield.max_length), in tokens.
    pub fn max_length(mut self, max_length: usize) -> Self {
        self.max_length = Some(max_length);
        self
    }

    /// Sets [`add_eos`](Self#structfield.add_eos).
    pub fn add_eos(mut self, add_eos: bool) -> Self {
        self.add_eos = add_eos;
        self
    }

    fn check(&self, rows: &Rows, tokenizer: &Tokenizer) -> Result<()> {
        if self.max_length.is_some_and(|n| n < 2) {
            return Err(Error::new("max_length is too small")
                .at("max_length")
                .expected("at least 2: a token and the one that it predicts")
                .found(format!("{:?}", self.max_length)));
        }
        if self.add_eos && tokenizer.eos_id().is_none() {
            return Err(Error::new("the tokenizer has no end-of-sequence token")
                .at("add_eos")
                .expected("`eos_token` in tokenizer_config.json")
                .next("set add_eos to false, or name the token in the config"));
        }
        match &self.format {
            Format::Instruction(_) | Format::Text { .. } if matches!(self.train_on, TrainOn::Roles(_)) => {
                Err(Error::new("only conversations have roles")
                    .at("train_on")
                    .expected("`completion` or `all`, or the format `messages`")
                    .found(format!("{:?}", self.train_on))
                    .next("train on completions, or give the rows as conversations"))
            }
            Format::Instruction(template) => rows.require(&template.columns()?),
            Format::Messages { column, .. } => rows.require(std::slice::from_ref(column)),
            Format::Text { .. } if self.train_on == TrainOn::Completion => {
                Err(Error::new("plain text has no completion")
                    .at("train_on")
                    .expected("`all` with the format `text`")
                    .found("`completion`")
                    .next("train on all tokens, or give prompt and completion as columns of their own"))
            }
            Format::Text { column } => rows.require(std::slice::from_ref(column)),
        }
    }
}

/// What one row becomes.
enum Outcome {
    /// `cut`: tokens that were cut off.
    Kept {
        example: Example,
        cut: usize,
        merged_boundary: bool,
    },
    Dropped(&'static str),
}

/// Tokenizes rows; the [`DataReport`] of what became of each is in [`Dataset::report`].
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
///
/// Prompt tokens have the label -100 where only completions are trained on. The mask goes by the bytes of the text that each
/// token came from: a token with at least one byte of the completion is trained on.
///
/// # Errors
/// Missing columns, values that are no text, a conversation that the template refuses (all with `file:line`), settings that
/// contradict each other, and rows of which none is left.
pub fn encode(rows: &Rows, tokenizer: &Tokenizer, config: &DataConfig) -> Result<Dataset> {
    config.check(rows, tokenizer)?;
    let outcomes: Vec<Result<Outcome>> =
        (0..rows.len()).into_par_iter().map(|i| encode_row(rows, i, tokenizer, config)).collect();
    let mut report = DataReport { rows: rows.len(), ..DataReport::default() };
    let mut examples = vec![];
    for (i, outcome) in outcomes.into_iter().enumerate() {
        match outcome? {
            Outcome::Dropped(reason) => report.dropped.push(DroppedRow { place: rows.place(i), reason: reason.into() }),
            Outcome::Kept { example, cut, merged_boundary } => {
                if cut > 0 {
                    report.truncated.push(rows.place(i));
                    report.truncated_tokens += cut;
                }
                report.merged_boundaries += usize::from(merged_boundary);
                examples.push(example);
            }
        }
    }
    report.count(&examples, tokenizer.unk_id());
    if examples.is_empty() {
        let reasons: Vec<String> =
            report.drop_reasons().into_iter().map(|(reason, n)| format!("{n}: {reason}")).collect();
        return Err(Error::new("no row is left to train on")
            .at(rows.source())
            .expected("at least one row with something to train on")
            .found(reasons.join("; ")));
    }
    Ok(Dataset::new(examples)?.with_report(report))
}

fn encode_row(rows: &Rows, i: usize, tokenizer: &Tokenizer, config: &DataConfig) -> Result<Outcome> {
    let (encoding, spans) = match &config.format {
        Format::Instruction(template) => {
            let (prompt, completion) = (template.prompt(rows, i)?, template.completion(rows, i)?);
            if completion.trim().is_empty() {
                return Ok(Outcome::Dropped("the completion is empty"));
            }
            let text = format!("{prompt}{completion}");
            (tokenizer.encode_with_offsets(&text)?, one(prompt.len()..text.len()))
        }
        Format::Text { column } => {
            let text = rows.text(i, column)?;
            if text.trim().is_empty() {
                return Ok(Outcome::Dropped("the text is empty"));
            }
            (tokenizer.encode_with_offsets(&text)?, one(0..text.len()))
        }
        Format::Messages { column, template } => {
            let messages = messages(rows, i, column)?;
            if messages.is_empty() {
                return Ok(Outcome::Dropped("the conversation is empty"));
            }
            let chat = match &config.train_on {
                TrainOn::Completion => template.render_with_assistant(&messages),
                TrainOn::Roles(roles) => {
                    template.render_with_roles(&messages, &roles.iter().map(String::as_str).collect::<Vec<_>>())
                }
                TrainOn::All => template.render(&messages, &Default::default()).map(|text| {
                    let assistant = one(0..text.len());
                    crate::data::RenderedChat { text, assistant }
                }),
            }
            .map_err(|e| e.at(rows.place(i)))?;
            (tokenizer.encode_plain_with_offsets(&chat.text)?, chat.assistant)
        }
    };
    label(encoding, &spans, tokenizer, config)
}

fn one(span: Range<usize>) -> Vec<Range<usize>> {
    vec![span]
}

/// The conversation of row `i`, as `{"role", "content"}`.
fn messages(rows: &Rows, i: usize, column: &str) -> Result<Vec<Value>> {
    let value = rows.get(i).and_then(|row| row.get(column)).unwrap_or(&Value::Null);
    conversation::messages(value).map_err(|e| e.at(format!("{}: column `{column}`", rows.place(i))))
}

/// Labels, end of sequence, truncation.
fn label(encoding: Encoding, spans: &[Range<usize>], tokenizer: &Tokenizer, config: &DataConfig) -> Result<Outcome> {
    let Encoding { ids: mut input_ids, offsets } = encoding;
    let overlaps = |&(start, end): &(usize, usize)| spans.iter().any(|s| start < s.end && end > s.start);
    let all = config.train_on == TrainOn::All;
    let mut labels: Vec<i32> = (input_ids.iter().zip(&offsets))
        .map(|(&id, offset)| if all || overlaps(offset) { id as i32 } else { IGNORE_INDEX })
        .collect();
    let merged_boundary =
        !all && offsets.iter().any(|&(start, end)| spans.iter().any(|s| start < s.start && s.start < end));
    if let Some(eos) = tokenizer.eos_id().filter(|&eos| config.add_eos && input_ids.last() != Some(&eos)) {
        input_ids.push(eos);
        labels.push(eos as i32);
    }
    let max_length = config.max_length.unwrap_or(usize::MAX);
    let cut = input_ids.len().saturating_sub(max_length);
    input_ids.truncate(max_length);
    labels.truncate(max_length);
    let example = Example { input_ids, labels };
    Ok(match example.trained_tokens() {
        0 if cut > 0 => Outcome::Dropped("nothing to train on is left within max_length"),
        0 => Outcome::Dropped("there is nothing to train on"),
        _ => Outcome::Kept { example, cut, merged_boundary },
    })
}
