//! Command-line options: a list of known ones for each command, and typed access to their values.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use lexopt::Arg;
use tunebook::{Error, Result};

/// A known option.
#[derive(Clone, Copy)]
pub struct Opt {
    /// Without the dashes.
    pub name: &'static str,
    /// What its value is called; `None`: a switch.
    pub value: Option<&'static str>,
    /// What it does, and its default.
    pub help: &'static str,
}

/// An option with a value.
pub const fn opt(name: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { name, value: Some(value), help }
}

/// A switch.
pub const fn switch(name: &'static str, help: &'static str) -> Opt {
    Opt { name, value: None, help }
}

impl Opt {
    /// Its line in the command's help.
    pub fn usage(&self) -> String {
        format!("  {:<32} {}", format!("--{} {}", self.name, self.value.unwrap_or_default()), self.help)
    }
}

/// The options that were given.
pub struct Args {
    command: &'static str,
    values: BTreeMap<&'static str, String>,
}

impl Args {
    /// Reads `--name value`, `--name=value` and switches; `None` when help is asked for.
    ///
    /// # Errors
    /// An option that the command does not know, one without its value, one that is given twice.
    pub fn parse(command: &'static str, known: &[Opt], raw: impl Iterator<Item = String>) -> Result<Option<Args>> {
        let refuse = |what: &str, found: String| {
            let names: Vec<String> = known.iter().map(|o| format!("--{}", o.name)).collect();
            Err(Error::new(what).at(format!("tunebook-bench {command}")).expected(names.join(" ")).found(found))
        };
        let mut values = BTreeMap::new();
        let mut parser = lexopt::Parser::from_args(raw);
        loop {
            let name = match parser.next().map_err(|e| unreadable(command, e))? {
                None => return Ok(Some(Args { command, values })),
                Some(Arg::Short('h')) => return Ok(None),
                Some(Arg::Long("help")) => return Ok(None),
                Some(Arg::Long(name)) => name.to_string(),
                Some(Arg::Short(c)) => return refuse("unknown option", format!("`-{c}`")),
                Some(Arg::Value(v)) => return refuse("a value without an option", format!("`{}`", v.display())),
            };
            let Some(option) = known.iter().find(|o| o.name == name) else {
                return refuse("unknown option", format!("`--{name}`"));
            };
            let value = match option.value {
                None => String::new(),
                Some(_) => parser.value().map_err(|e| unreadable(command, e))?.to_string_lossy().into_owned(),
            };
            if values.insert(option.name, value).is_some() {
                return refuse("an option is given twice", format!("`--{name}`"));
            }
        }
    }

    /// Whether the option was given.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The value as it was written.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The value; `None` when the option was not given.
    ///
    /// # Errors
    /// A value that is not a `T`, with the option's name.
    pub fn maybe<T: FromStr<Err: Display>>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|e| self.bad(name, "a valid value", format!("`{text}`: {e}")))
    }

    /// The value, or `default`.
    ///
    /// # Errors
    /// As [`Args::maybe`].
    pub fn or<T: FromStr<Err: Display>>(&self, name: &str, default: T) -> Result<T> {
        Ok(self.maybe(name)?.unwrap_or(default))
    }

    /// A number of at least one, or `default`.
    ///
    /// # Errors
    /// As [`Args::maybe`], and zero.
    pub fn at_least_one(&self, name: &str, default: usize) -> Result<usize> {
        match self.or(name, default)? {
            0 => Err(self.bad(name, "at least 1", "0".into())),
            n => Ok(n),
        }
    }

    /// One of several words, or the first of them.
    ///
    /// # Errors
    /// Any other word.
    pub fn one_of(&self, name: &str, words: &[&'static str]) -> Result<&'static str> {
        let text = self.text(name).unwrap_or(words[0]);
        match words.iter().find(|w| **w == text) {
            Some(word) => Ok(word),
            None => Err(self.bad(name, &words.join(", "), format!("`{text}`"))),
        }
    }

    /// A size in bytes: `6GiB`, `500MB`, `1024`; `None` when the option was not given.
    ///
    /// # Errors
    /// Any other form.
    pub fn size(&self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let bad = || self.bad(name, "a size such as 6GiB, 500MB or 1024", format!("`{text}`"));
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1u64,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            _ => return Err(bad()),
        };
        let number: f64 = number.parse().map_err(|_| bad())?;
        Ok(Some((number * factor as f64) as u64))
    }

    /// An error about the value of an option.
    pub fn bad(&self, name: &str, expected: &str, found: String) -> Error {
        Error::new("an option cannot be used")
            .at(format!("tunebook-bench {} --{name}", self.command))
            .expected(expected)
            .found(found)
    }
}

fn unreadable(command: &str, e: lexopt::Error) -> Error {
    Error::new("the options cannot be read").at(format!("tunebook-bench {command}")).caused_by(e)
}
