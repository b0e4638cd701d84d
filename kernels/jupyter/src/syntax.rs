//! What the text of a cell is, before anything is compiled.

use ra_ap_syntax::{AstNode, Edition, SourceFile, SyntaxKind, ast};

/// Answer to `is_complete_request`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completeness {
    Complete,
    /// With the indentation of the next line.
    Incomplete(String),
    Invalid,
}

const PRELUDE: &str = "fn cell() {";

/// Leading lines for evcxr and the shell, which are no Rust.
fn is_command(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with(':') || line.starts_with('!')
}

fn rust_of(code: &str) -> String {
    let mut commands = true;
    code.lines()
        .map(|line| {
            commands &= is_command(line) || line.trim().is_empty() || line.starts_with("//");
            if commands { "" } else { line }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// Whether a console may run this.
pub fn completeness(code: &str) -> Completeness {
    let rust = rust_of(code);
    let text = format!("{PRELUDE}{rust}\n}}");
    let parsed = SourceFile::parse(&text, Edition::Edition2024);
    if parsed.errors().is_empty() {
        return Completeness::Complete;
    }
    let unterminated =
        |m: &str| m.contains("unterminated") || m.contains("Missing trailing") || m.contains("to terminate");
    if parsed.errors().iter().any(|e| unterminated(&e.to_string())) {
        return Completeness::Incomplete(String::new());
    }
    let mut open: Vec<SyntaxKind> = Vec::new();
    let rust_end = PRELUDE.len() + rust.len();
    for token in parsed.syntax_node().descendants_with_tokens().filter_map(|e| e.into_token()) {
        let start = usize::from(token.text_range().start());
        if start < PRELUDE.len() || start >= rust_end {
            continue;
        }
        use SyntaxKind::{L_BRACK, L_CURLY, L_PAREN, R_BRACK, R_CURLY, R_PAREN};
        let closes = match token.kind() {
            kind @ (L_BRACK | L_CURLY | L_PAREN) => {
                open.push(kind);
                continue;
            }
            R_BRACK => L_BRACK,
            R_CURLY => L_CURLY,
            R_PAREN => L_PAREN,
            _ => continue,
        };
        if open.pop() != Some(closes) {
            return Completeness::Invalid;
        }
    }
    let last = rust.trim_end().lines().last().unwrap_or_default();
    if !open.is_empty() {
        return Completeness::Incomplete("    ".repeat(open.len()));
    }
    // An operator, or a keyword that wants more, at the very end.
    let wants_more = ["=", "+", "-", "*", "/", ",", "(", ".", "|", "&", "->", "=>", "::", "else", "in", "return let"];
    let end = last.trim_end();
    if wants_more.iter().any(|w| end.ends_with(w)) || is_header(end) {
        return Completeness::Incomplete(String::new());
    }
    Completeness::Invalid
}

/// `for x in y`, `fn f()`, `struct S`: a block is to follow.
fn is_header(line: &str) -> bool {
    let first = line.split_whitespace().next().unwrap_or_default();
    ["for", "while", "loop", "if", "match", "fn", "pub", "impl", "trait", "mod", "enum", "unsafe"].contains(&first)
        && !line.ends_with([';', '}'])
}

/// Whether the cell's value is its last expression.
pub fn ends_in_expression(code: &str) -> bool {
    let text = format!("{PRELUDE}{}\n}}", rust_of(code));
    let parsed = SourceFile::parse(&text, Edition::Edition2024);
    let body = parsed.tree().syntax().children().next().and_then(ast::Fn::cast).and_then(|f| f.body());
    body.and_then(|b| b.stmt_list())
        .and_then(|s| s.syntax().children().last())
        .is_some_and(|n| ast::Expr::can_cast(n.kind()))
}

/// Whether a cell may have variables that outlive it: there is a `let` anywhere.
pub fn may_define_variables(code: &str) -> bool {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "let")
}

/// The end of the name that `position` (in bytes) is in or at the end of.
pub fn end_of_name(code: &str, position: usize) -> usize {
    let rest = &code[position..];
    position + rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len())
}

/// The name that `position` (in bytes) is in.
pub fn name_at(code: &str, position: usize) -> &str {
    let end = end_of_name(code, position);
    let start = code[..end].rfind(|c: char| !(c.is_alphanumeric() || c == '_'));
    let start = start.map_or(0, |i| i + code[i..].chars().next().map_or(1, char::len_utf8));
    &code[start..end]
}

/// Jupyter counts in characters, Rust in bytes.
pub fn byte_of(code: &str, character: usize) -> usize {
    code.char_indices().nth(character).map_or(code.len(), |(i, _)| i)
}

/// The other way.
pub fn character_of(code: &str, byte: usize) -> usize {
    code.char_indices().take_while(|(i, _)| *i < byte).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_incomplete_invalid() {
        let incomplete = |n: usize| Completeness::Incomplete("    ".repeat(n));
        for (code, expected) in [
            ("", Completeness::Complete),
            ("let a = 1;", Completeness::Complete),
            ("a + b", Completeness::Complete),
            (":dep regex = \"1\"\nlet a = 1;", Completeness::Complete),
            ("fn f() {}", Completeness::Complete),
            ("fn f() {", incomplete(1)),
            ("for i in 0..3 {\n    if x {", incomplete(2)),
            ("println!(", incomplete(1)),
            ("\"no end", incomplete(0)),
            ("/* no end", incomplete(0)),
            ("let a =", incomplete(0)),
            ("for i in 0..3", incomplete(0)),
            (")", Completeness::Invalid),
            ("let = ;", Completeness::Invalid),
            ("(]", Completeness::Invalid),
        ] {
            assert_eq!(completeness(code), expected, "{code:?}");
        }
    }

    #[test]
    fn the_value_of_a_cell() {
        for (code, expected) in [
            ("1 + 1", true),
            ("let a = 1;\na", true),
            ("f();", false),
            ("fn f() {}", false),
            (":vars", false),
            ("x?", true),
        ] {
            assert_eq!(ends_in_expression(code), expected, "{code:?}");
        }
    }

    #[test]
    fn characters_and_bytes() {
        let code = "let é = 1; é.abs()";
        let byte = byte_of(code, 11);
        assert_eq!(&code[byte..], "é.abs()");
        assert_eq!(character_of(code, byte), 11);
        assert_eq!(name_at(code, byte), "é");
        assert_eq!(name_at(code, byte_of(code, 14)), "abs");
        assert_eq!(byte_of(code, 1000), code.len());
    }
}
