//! Which form rows have, by their columns.

use std::fmt;

use crate::data::conversation::is_conversation;
use crate::data::{ChatTemplate, DataConfig, Format, InstructionTemplate, Rows, Tokenizer};
use crate::{Error, Result};

/// Names of the three columns of instruction data: what is asked, its optional input, the answer. Alpaca, Dolly, and others.
const INSTRUCTIONS: [(&str, &str, &str); 6] = [
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", "input", "response"),
    ("prompt", "input", "completion"),
    ("question", "context", "answer"),
    ("query", "input", "response"),
];

/// What [`detect`] found: a configuration, and why it is this one.
#[derive(Clone)]
pub struct Detected {
    /// How these rows become examples.
    pub config: DataConfig,
    /// Which columns decided.
    pub reason: String,
}

impl fmt::Debug for Detected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match &self.config.format {
            Format::Instruction(_) => "instruction",
            Format::Messages { .. } => "messages",
            Format::Text { .. } => "text",
        };
        write!(f, "{format}, trained on {:?}: {}", self.config.train_on, self.reason)
    }
}

/// A configuration for rows in one of the usual forms: conversations (`messages`, ShareGPT's `conversations`), instruction
/// data (Alpaca's and Dolly's columns, `prompt`/`completion`, `question`/`answer`), or one column `text`. Looked for in this
/// order.
///
/// `notebooks/06_data_and_templates.ipynb` explains it.
///
/// # Errors
/// Rows of another form, with their columns; conversations without a chat template.
pub fn detect(rows: &Rows, tokenizer: &Tokenizer) -> Result<Detected> {
    let first = rows.get(0);
    let conversation = rows.columns().iter().find(|c| first.and_then(|r| r.get(*c)).is_some_and(is_conversation));
    if let Some(column) = conversation {
        let template = ChatTemplate::from_tokenizer(tokenizer)
            .map_err(|e| e.at(format!("{}: column `{column}` holds conversations", rows.source())))?;
        let mut config = DataConfig::messages(template.clone());
        config.format = Format::Messages { column: column.clone(), template };
        return Ok(Detected { config, reason: format!("column `{column}` holds conversations") });
    }
    let has = |column: &str| rows.columns().iter().any(|c| c == column);
    if let Some((ask, input, answer)) = INSTRUCTIONS.iter().find(|(ask, _, answer)| has(ask) && has(answer)) {
        let config = DataConfig::instruction(InstructionTemplate::alpaca_columns(ask, input, answer));
        let with = if has(input) { format!(", `{input}` where it is not empty") } else { String::new() };
        return Ok(Detected { config, reason: format!("columns `{ask}` and `{answer}`{with}, in Alpaca's template") });
    }
    if has("text") {
        return Ok(Detected { config: DataConfig::text("text"), reason: "column `text` holds the whole text".into() });
    }
    let pairs: Vec<String> = INSTRUCTIONS.iter().map(|(ask, _, answer)| format!("`{ask}` and `{answer}`")).collect();
    Err(Error::new("the form of these rows is not known")
        .at(rows.source())
        .expected(format!("a conversation, or columns {}, or `text`", pairs.join(", ")))
        .found(format!("columns {}", rows.columns().join(", ")))
        .next("rename columns with Rows::rename, or write a template: InstructionTemplate::new(\"{question}\", \"{answer}\")"))
}
