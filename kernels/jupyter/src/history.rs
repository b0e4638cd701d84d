//! What was executed in this session.

use serde_json::{Value, json};

/// Inputs, by the number of their execution.
#[derive(Default)]
pub struct History(Vec<(u64, String)>);

impl History {
    pub fn push(&mut self, number: u64, code: &str) {
        self.0.push((number, code.to_owned()));
    }

    /// Content of a `history_reply`: `tail`, `range` (of this session, 0) and `search` (a glob).
    pub fn answer(&self, content: &Value) -> Value {
        let output = content["output"].as_bool().unwrap_or(false);
        let n = content["n"].as_u64().map_or(usize::MAX, |n| n as usize);
        let mut chosen: Vec<&(u64, String)> = match content["hist_access_type"].as_str() {
            Some("range") => {
                let session = content["session"].as_i64().unwrap_or(0);
                let start = content["start"].as_u64().unwrap_or(0);
                let stop = content["stop"].as_u64().unwrap_or(u64::MAX);
                self.0.iter().filter(|(i, _)| session == 0 && (start..stop).contains(i)).collect()
            }
            Some("search") => {
                let pattern = content["pattern"].as_str().unwrap_or("*");
                let mut found: Vec<_> = self.0.iter().filter(|(_, code)| glob(pattern, code)).collect();
                if content["unique"].as_bool().unwrap_or(false) {
                    let mut seen = std::collections::HashSet::new();
                    found.reverse();
                    found.retain(|(_, code)| seen.insert(code.as_str()));
                    found.reverse();
                }
                found
            }
            _ => self.0.iter().collect(),
        };
        if content["hist_access_type"] != "range" {
            chosen.drain(..chosen.len().saturating_sub(n));
        }
        let rows: Vec<Value> = chosen
            .into_iter()
            .map(|(i, code)| if output { json!([0, i, [code, null]]) } else { json!([0, i, code]) })
            .collect();
        json!({"status": "ok", "history": rows})
    }
}

/// `*` is any text, `?` one character.
fn glob(pattern: &str, text: &str) -> bool {
    let (p, t): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // Whether the pattern up to here matches the text up to each place.
    let mut row: Vec<bool> = (0..=t.len()).map(|i| i == 0).collect();
    for c in p {
        let mut next = vec![false; t.len() + 1];
        next[0] = c == '*' && row[0];
        for i in 1..=t.len() {
            next[i] = match c {
                '*' => next[i - 1] || row[i],
                '?' => row[i - 1],
                _ => row[i - 1] && t[i - 1] == c,
            };
        }
        row = next;
    }
    row[t.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(content: Value) -> Vec<String> {
        let mut h = History::default();
        for (i, code) in ["a = 1", "b = 2", "a = 1", "c"].into_iter().enumerate() {
            h.push(i as u64 + 1, code);
        }
        let answer = h.answer(&content);
        answer["history"].as_array().unwrap().iter().map(|r| format!("{} {}", r[1], r[2].as_str().unwrap())).collect()
    }

    #[test]
    fn tail_range_search() {
        assert_eq!(codes(json!({"hist_access_type": "tail", "n": 2})), ["3 a = 1", "4 c"]);
        assert_eq!(
            codes(json!({"hist_access_type": "range", "session": 0, "start": 1, "stop": 3})),
            ["1 a = 1", "2 b = 2"]
        );
        assert_eq!(
            codes(json!({"hist_access_type": "search", "pattern": "?*=*", "n": 9})),
            ["1 a = 1", "2 b = 2", "3 a = 1"]
        );
        let unique = json!({"hist_access_type": "search", "pattern": "*=*", "n": 9, "unique": true});
        assert_eq!(codes(unique), ["2 b = 2", "3 a = 1"]);
    }
}
