//! [`Check`]: two values that should be equal, shown together.

use std::fmt;

use crate::display::units;
use crate::{Error, Result};

/// A comparison of a value with the one that it should be. Lessons check their claims with [`check`], which fails, and
/// readers their answers with [`attempt`], which does not.
#[derive(Clone, PartialEq)]
pub struct Check {
    /// What is compared.
    pub what: String,
    /// The value that was found or guessed.
    pub yours: String,
    /// The value that it should be.
    pub expected: String,
    /// How close it has to be, or that it has to be equal.
    pub rule: String,
    /// Whether it is.
    pub passed: bool,
}

/// Compares for equality.
///
/// ```
/// use tunebook::lesson::check;
/// assert!(check("bytes", 2 * 2048, 4096)?.passed);
/// assert!(check("bytes", 2 * 2048, 4095).is_err());
/// # Ok::<(), tunebook::Error>(())
/// ```
///
/// # Errors
/// Values that differ, with both.
pub fn check<T: PartialEq + fmt::Debug>(what: &str, yours: T, expected: T) -> Result<Check> {
    attempt(what, yours, expected).or_error()
}

/// Compares two numbers: they may differ by the share `tolerance` of the expected one.
///
/// # Errors
/// Values that differ by more, with both.
pub fn check_close(what: &str, yours: f64, expected: f64, tolerance: f64) -> Result<Check> {
    attempt_close(what, yours, expected, tolerance).or_error()
}

/// [`check`] without an error: an answer that is still wrong is shown as such.
pub fn attempt<T: PartialEq + fmt::Debug>(what: &str, yours: T, expected: T) -> Check {
    Check {
        what: what.to_owned(),
        passed: yours == expected,
        yours: written(&yours),
        expected: written(&expected),
        rule: "equal".to_owned(),
    }
}

/// [`check_close`] without an error.
pub fn attempt_close(what: &str, yours: f64, expected: f64, tolerance: f64) -> Check {
    Check {
        what: what.to_owned(),
        passed: (yours - expected).abs() <= tolerance * expected.abs(),
        yours: units::number(yours, 6),
        expected: units::number(expected, 6),
        rule: if tolerance > 0.0 {
            format!("within {} %", units::number(100.0 * tolerance, 1))
        } else {
            "equal".into()
        },
    }
}

impl Check {
    fn or_error(self) -> Result<Self> {
        if self.passed {
            return Ok(self);
        }
        Err(Error::new("a check does not hold")
            .at(self.what)
            .expected(format!("{} ({})", self.expected, self.rule))
            .found(self.yours)
            .next("run the notebook from its first cell; if a cell was changed, this is what it changed"))
    }
}

/// A value as text: quotes of strings left out, thousands of whole numbers separated.
fn written(value: &dyn fmt::Debug) -> String {
    let text = format!("{value:?}");
    if let Ok(n) = text.parse::<u64>() {
        return units::count(n);
    }
    text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).map_or_else(|| text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_passes_and_different_says_both() {
        let c = check("bytes", 1_234_567_u64, 1_234_567).unwrap();
        assert_eq!((c.yours.as_str(), c.expected.as_str(), c.passed), ("1,234,567", "1,234,567", true));
        let e = check("the answer", "a", "b").unwrap_err().to_string();
        assert!(e.contains("at:       the answer") && e.contains("b (equal)") && e.contains("found:    a"), "{e}");
        assert!(!attempt("x", [1.0, f32::NAN], [1.0, f32::NAN]).passed, "NaN equals nothing");
    }

    #[test]
    fn close_is_relative_to_what_is_expected() {
        assert!(check_close("gb", 4.1, 4.125, 0.01).is_ok());
        assert!(check_close("gb", 4.0, 4.125, 0.01).is_err());
        assert!(!attempt_close("gb", f64::NAN, 1.0, 0.5).passed);
        assert_eq!(attempt_close("gb", 1.0, 1.0, 0.005).rule, "within 0.5 %");
    }
}
