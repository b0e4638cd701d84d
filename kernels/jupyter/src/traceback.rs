//! How errors look: in the colours and the form of rustc, at the user's line, without our frames.

use evcxr::CompilationError;

use crate::link::Report;
use crate::source::Place;

const RED: &str = "\x1b[1;31m";
const BLUE: &str = "\x1b[1;34m";
const CYAN: &str = "\x1b[1;36m";
const BOLD: &str = "\x1b[1m";
const OFF: &str = "\x1b[0m";

/// What a front end is told of a failed cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub name: String,
    pub value: String,
    pub traceback: Vec<String>,
}

impl Failure {
    /// One without a place.
    pub fn new(name: &str, value: impl Into<String>) -> Failure {
        let value = value.into();
        let traceback = vec![format!("{RED}{name}{OFF}: {value}")];
        Failure { name: name.into(), value, traceback }
    }

    /// A panic.
    pub fn panic(report: &Report, place: Option<&Place>) -> Failure {
        let mut traceback = vec![format!("{RED}panicked{OFF}: {}", report.message)];
        traceback.extend(at(place, report));
        Failure { name: "Panic".into(), value: report.message.clone(), traceback }
    }

    /// An error that `?` returned.
    pub fn question_mark(report: &Report, place: Option<&Place>) -> Failure {
        let name = short_type(&report.type_name);
        let mut traceback = vec![format!("{RED}{name}{OFF}: {}", report.message)];
        traceback.extend(at(place, report));
        Failure { name, value: report.message.clone(), traceback }
    }

    /// What rustc refused.
    pub fn compilation(errors: &[CompilationError], cell: Option<u64>, code: &str) -> Failure {
        let shown: Vec<&CompilationError> = {
            let only_errors: Vec<_> = errors.iter().filter(|e| e.level() != "warning").collect();
            if only_errors.is_empty() { errors.iter().collect() } else { only_errors }
        };
        let first = shown.first();
        let value = first.map_or_else(|| "the cell does not compile".into(), |e| e.message());
        let name = match first.and_then(|e| e.code()) {
            Some(code) => format!("error[{code}]"),
            None => "error".into(),
        };
        Failure { name, value, traceback: shown.iter().map(|e| one_error(e, cell, code)).collect() }
    }
}

/// `alloc::string::FromUtf8Error` is `FromUtf8Error`; of type arguments too.
fn short_type(name: &str) -> String {
    let mut out = String::new();
    for part in name.split_inclusive(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')) {
        out.push_str(part.rsplit("::").next().unwrap_or(part));
    }
    out
}

fn cell_name(cell: Option<u64>) -> String {
    cell.map_or_else(|| "cell".into(), |n| format!("[{n}]"))
}

fn at(place: Option<&Place>, report: &Report) -> Vec<String> {
    match place {
        Some(p) => vec![
            format!("{BLUE} -->{OFF} {} line {}", cell_name(p.cell), p.line),
            format!("{BLUE}{:>3} |{OFF} {}", p.line, p.text),
        ],
        // Somewhere in a library.
        None if !report.file.ends_with("lib.rs") || report.file.contains('/') && !report.file.starts_with("cell/") => {
            vec![format!("{BLUE} -->{OFF} {}:{}:{}", report.file, report.line, report.column)]
        }
        None => Vec::new(),
    }
}

fn one_error(error: &CompilationError, cell: Option<u64>, code: &str) -> String {
    let lines: Vec<&str> = code.lines().collect();
    let code = error.code().map(|c| format!("[{c}]")).unwrap_or_default();
    let mut out = vec![format!("{RED}error{code}{OFF}{BOLD}: {}{OFF}", error.message())];
    let spans: Vec<_> = error.spanned_messages().iter().filter_map(|m| Some((m, m.span?))).collect();
    if let Some((_, span)) = spans.iter().find(|(m, _)| m.is_primary).or(spans.first()) {
        out.push(format!("{BLUE} -->{OFF} {} line {}:{}", cell_name(cell), span.start_line, span.start_column));
    }
    let mut last = 0;
    let mut sorted = spans;
    sorted.sort_by_key(|(_, s)| (s.start_line, s.start_column));
    for (message, span) in sorted {
        let Some(text) = lines.get(span.start_line - 1) else { continue };
        if last != 0 && span.start_line > last + 1 {
            out.push(format!("{BLUE}...{OFF}"));
        }
        if span.start_line != last {
            out.push(format!("{BLUE}{:>3} |{OFF} {text}", span.start_line));
        }
        last = span.start_line;
        let width = if span.end_line == span.start_line {
            span.end_column.saturating_sub(span.start_column)
        } else {
            text.chars().count().saturating_sub(span.start_column - 1)
        };
        let (colour, sign) = if message.is_primary { (RED, "^") } else { (BLUE, "-") };
        let pad = " ".repeat(span.start_column - 1);
        let label = if message.label == format!("error: {}", error.message()) { "" } else { &message.label };
        out.push(format!("{BLUE}    |{OFF} {pad}{colour}{} {label}{OFF}", sign.repeat(width.max(1))));
    }
    for help in error.help() {
        out.push(format!("{BLUE}    = {CYAN}help{OFF}: {}", help.replace('\n', "\n      ")));
    }
    if let Some(hint) = error.evcxr_extra_hint() {
        out.push(format!("{BLUE}    = {CYAN}note{OFF}: {hint}"));
    }
    out.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_named_as_written() {
        assert_eq!(short_type("core::num::error::ParseIntError"), "ParseIntError");
        assert_eq!(short_type("alloc::boxed::Box<dyn core::error::Error>"), "Box<dyn Error>");
        assert_eq!(short_type("tunebook::error::Error"), "Error");
    }

    #[test]
    fn a_panic_points_at_the_users_line() {
        let report =
            Report { type_name: String::new(), message: "no".into(), file: "cell/lib.rs".into(), line: 90, column: 1 };
        let place = Place { cell: Some(3), line: 2, text: "assert!(x);".into() };
        let failure = Failure::panic(&report, Some(&place));
        assert_eq!((failure.name.as_str(), failure.value.as_str()), ("Panic", "no"));
        assert!(failure.traceback[1].contains("[3] line 2") && failure.traceback[2].contains("assert!(x);"));
        assert_eq!(Failure::panic(&report, None).traceback.len(), 1);
    }
}
