//! The source that evcxr generates for a cell, made smaller before it is compiled; and the way back from a line of it to
//! the cell that the user wrote. No line is added or removed before the end, so evcxr's own mapping of errors holds.

use std::fmt::Write as _;

/// Where evcxr puts its copy of the variable store.
const RUNTIME_MODULE: &str = "mod evcxr_internal_runtime {\n";
const AFTER_RUNTIME_MODULE: &str = "\n}\n#[unsafe(no_mangle)]\npub extern \"C\" fn run_user_code_";

/// Uses the toolkit: its variable store instead of a copy in each cell, its report of a `?`, its display of any value.
///
/// `plain`: the user asked evcxr for another output format, so values are displayed by evcxr's own means.
pub fn with_toolkit(source: &str, plain: bool) -> String {
    let mut out = source.to_owned();
    if let Some(start) = out.find(RUNTIME_MODULE)
        && let Some(length) = out[start..].find(AFTER_RUNTIME_MODULE)
    {
        let end = start + length;
        let lines = out[start..end].matches('\n').count();
        let module =
            format!("mod evcxr_internal_runtime {{ pub use ::tunebook_toolkit::cell::*;{}", "\n".repeat(lines));
        out.replace_range(start..end, &module);
    }
    report_errors(&mut out);
    out.push_str("\nextern crate tunebook_toolkit as _;\n");
    if !plain {
        out.push_str("#[allow(unused_imports)] use ::tunebook_toolkit::cell::Shown as _;\n");
    }
    out
}

/// In the conversion that `?` calls: a report to the kernel, with the place of the `?`, instead of a line on standard error.
fn report_errors(source: &mut String) {
    const HEAD: &str = "fn from(error: T) -> Self {";
    const PRINT: &str = "eprintln!(";
    const ARGUMENT: &str = ", error);";
    let Some(implementation) = source.find("From<T> for EvcxrUserCodeError") else { return };
    let Some(head) = source[implementation..].find(HEAD).map(|at| implementation + at) else { return };
    let Some(print) = source[head..].find(PRINT).map(|at| head + at) else { return };
    let Some(end) = source[print..].find(ARGUMENT).map(|at| print + at) else { return };
    let format = source[print + PRINT.len()..end].to_owned();
    let mut call = String::new();
    let _ = write!(
        call,
        "::tunebook_toolkit::cell::failed(::std::any::type_name::<T>(), ::std::format!({format}, error));"
    );
    source.replace_range(print..end + ARGUMENT.len(), &call);
    source.insert_str(head, "#[track_caller] ");
}

/// A place in what the user wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `In [n]`; `None` for a cell that has no number.
    pub cell: Option<u64>,
    /// From 1.
    pub line: usize,
    pub text: String,
}

/// Finds which line of which cell a line of the generated source is.
///
/// The user's lines stand in the generated source as they were written, statements in their order; items of earlier cells
/// stand there too. `cells` are those that were executed, oldest first, the current one last.
pub fn locate(generated: &str, line: usize, cells: &[(Option<u64>, String)]) -> Option<Place> {
    let lines: Vec<&str> = generated.lines().collect();
    let text = *lines.get(line.checked_sub(1)?)?;
    if text.trim().is_empty() {
        return None;
    }
    for (cell, code) in cells.iter().rev() {
        let own: Vec<&str> = code.lines().collect();
        // A statement after another on its line is cut off there: the end of the user's line.
        let candidates: Vec<usize> =
            (0..own.len()).filter(|i| own[*i] == text || own[*i].trim_end().ends_with(text.trim())).collect();
        // Of equal lines, the one whose neighbours are the same.
        let best = candidates.into_iter().max_by_key(|&i| {
            let alike = |step: isize| {
                (1..50)
                    .take_while(|n| {
                        let at = |lines: &[&str], from: usize| -> Option<String> {
                            let index = from.checked_add_signed(step * n)?;
                            Some((*lines.get(index)?).to_owned())
                        };
                        let (a, b) = (at(&own, i), at(&lines, line - 1));
                        a.is_some() && a == b
                    })
                    .count()
            };
            alike(-1) + alike(1)
        });
        if let Some(i) = best {
            return Some(Place { cell: *cell, line: i + 1, text: own[i].to_owned() });
        }
    }
    None
}

/// Takes the notebook's `:dep` of the library out of a cell, line for line: the kernel has the library already. A `:dep` of
/// another path, with features, or of a published version, stays and is treated as in stock evcxr.
pub fn without_own_dep(code: &str, repository: &std::path::Path) -> String {
    let mut out: Vec<&str> = Vec::new();
    let mut commands = true;
    for line in code.split('\n') {
        let trimmed = line.trim();
        commands &= trimmed.is_empty() || trimmed.starts_with([':', '!']) || line.starts_with("//");
        out.push(if commands && is_own_dep(trimmed, repository) { "" } else { line });
    }
    out.join("\n")
}

fn is_own_dep(line: &str, repository: &std::path::Path) -> bool {
    let Some(rest) = line.strip_prefix(":dep ") else { return false };
    let Ok(table) = rest.parse::<toml::Table>() else { return false };
    let Some(toml::Value::Table(dep)) = table.get("tunebook").filter(|_| table.len() == 1) else { return false };
    let Some(path) = dep.get("path").and_then(toml::Value::as_str).filter(|_| dep.len() == 1) else { return false };
    match (std::fs::canonicalize(path), std::fs::canonicalize(repository)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Whether a cell asks evcxr for another way of showing values.
pub fn sets_format(code: &str) -> bool {
    code.lines().any(|l| matches!(l.split_whitespace().next(), Some(":fmt" | ":types")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATED: &str = "#![allow(unused_imports)]\nfn earlier() {\n    panic!()\n}\n\
struct EvcxrUserCodeError {}\nimpl<T: std::fmt::Display> From<T> for EvcxrUserCodeError {\nfn from(error: T) -> Self {\n\
eprintln!(\"{}\", error);\nEvcxrUserCodeError {}\n}}\n\
mod evcxr_internal_runtime {\npub struct VariableStore {\n}\npub fn create() {\n}\n\n}\n#[unsafe(no_mangle)]\n\
pub extern \"C\" fn run_user_code_1(\nlet a = 1;\nx(a)?;\nlet b = 2;\nx(a)?;\n";

    #[test]
    fn lines_keep_their_numbers() {
        let out = with_toolkit(GENERATED, false);
        for (i, line) in GENERATED.lines().enumerate() {
            if line.contains("x(a)") || line.starts_with("pub extern") || line.contains("panic!") {
                assert_eq!(out.lines().nth(i), Some(line));
            }
        }
        assert!(out.contains("#[track_caller] fn from(error: T)"));
        assert!(out.contains("failed(::std::any::type_name::<T>(), ::std::format!(\"{}\", error));"));
        assert!(!out.contains("pub struct VariableStore") && out.contains("pub use ::tunebook_toolkit::cell::*;"));
        assert!(out.contains("Shown as _") && !with_toolkit(GENERATED, true).contains("Shown"));
    }

    #[test]
    fn equal_lines_are_told_apart_by_their_neighbours() {
        let cells = vec![
            (Some(1), "fn earlier() {\n    panic!()\n}".to_owned()),
            (Some(2), "let a = 1;\nx(a)?;\nlet b = 2;\nx(a)?;".to_owned()),
        ];
        let find = |what: &str, nth: usize| {
            let line = GENERATED.lines().enumerate().filter(|(_, l)| l.contains(what)).nth(nth).unwrap().0;
            locate(GENERATED, line + 1, &cells).map(|p| (p.cell, p.line))
        };
        assert_eq!(find("x(a)", 0), Some((Some(2), 2)));
        assert_eq!(find("x(a)", 1), Some((Some(2), 4)));
        assert_eq!(find("panic!", 0), Some((Some(1), 2)));
        assert_eq!(find("EvcxrUserCodeError {}", 0), None);
    }

    #[test]
    fn the_own_dep_is_taken_out_and_no_other() {
        let repository = std::env::temp_dir();
        let own = format!(":dep tunebook = {{ path = \"{}\" }}", repository.display());
        let other = ":dep regex = \"1\"";
        assert_eq!(
            without_own_dep(&format!("{own}\n{other}\nlet a = 1;"), &repository),
            format!("\n{other}\nlet a = 1;")
        );
        for kept in [":dep tunebook = \"1\"", ":dep tunebook = { path = \"/\" }", "let s = \":dep tunebook\";"] {
            assert_eq!(without_own_dep(kept, &repository), kept);
        }
    }
}
