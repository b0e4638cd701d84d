//! The one error type: what went wrong, where, what was expected, what was found, and what to do next.
//!
//! `Debug` prints what `Display` prints, because a notebook shows `{:?}`; `{:#?}` shows the structure.

use std::fmt;
use std::path::Path;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in a form that a reader can act on.
///
/// ```
/// use tunebook::Error;
/// let e = Error::new("target module not found")
///     .at("target_modules")
///     .expected("a module of the model")
///     .found("`q_porj`")
///     .next("did you mean `q_proj`?");
/// assert_eq!(
///     e.to_string(),
///     "target module not found\n  at:       target_modules\n  expected: a module of the model\n  found:    `q_porj`\n  next:     did you mean `q_proj`?"
/// );
/// ```
pub struct Error(Box<Inner>);

#[derive(Debug, Default)]
struct Inner {
    what: String,
    at: Option<String>,
    expected: Option<String>,
    found: Option<String>,
    next: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error that says `what` went wrong: lower case, no full stop.
    pub fn new(what: impl Into<String>) -> Self {
        Error(Box::new(Inner { what: what.into(), ..Inner::default() }))
    }

    /// Where: the file, tensor, row, field or cell.
    pub fn at(mut self, at: impl Into<String>) -> Self {
        self.0.at = Some(match self.0.at.take() {
            // An outer place goes before an inner one.
            Some(inner) => format!("{}: {inner}", at.into()),
            None => at.into(),
        });
        self
    }

    /// Where, for a file.
    pub fn at_path(self, path: impl AsRef<Path>) -> Self {
        self.at(path.as_ref().display().to_string())
    }

    /// What was expected there.
    pub fn expected(mut self, expected: impl Into<String>) -> Self {
        self.0.expected = Some(expected.into());
        self
    }

    /// What was found instead.
    pub fn found(mut self, found: impl Into<String>) -> Self {
        self.0.found = Some(found.into());
        self
    }

    /// What the reader can do about it.
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.0.next = Some(next.into());
        self
    }

    /// The error that caused this one; its text is shown as `found` when nothing else is.
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        if self.0.found.is_none() {
            self.0.found = Some(source.to_string());
        }
        self.0.source = Some(Box::new(source));
        self
    }

    /// An input or output error at a path, with the next step for the usual causes.
    pub fn io(action: &str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        use std::io::ErrorKind;
        let next = match source.kind() {
            ErrorKind::NotFound => "check the path; a relative path starts at the current directory",
            ErrorKind::PermissionDenied => "choose a directory that you may write, or change its permissions",
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space on that disk, or choose another one",
            ErrorKind::ReadOnlyFilesystem => "choose a directory on a disk that can be written",
            _ => "try again; if it repeats, check the disk",
        };
        Error::new(format!("could not {action}")).at_path(path).caused_by(source).next(next)
    }

    /// The first line of the message: what went wrong.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// The place, if it is known.
    pub fn place(&self) -> Option<&str> {
        self.0.at.as_deref()
    }

    /// The suggested next step, if there is one.
    pub fn next_step(&self) -> Option<&str> {
        self.0.next.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.what)?;
        let rows = [
            ("at:      ", &self.0.at),
            ("expected:", &self.0.expected),
            ("found:   ", &self.0.found),
            ("next:    ", &self.0.next),
        ];
        for (label, text) in rows {
            if let Some(text) = text {
                write!(f, "\n  {label} {text}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() { self.0.fmt(f) } else { fmt::Display::fmt(self, f) }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::new("a candle tensor operation failed").caused_by(e)
    }
}
