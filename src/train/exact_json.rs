//! JSON whose numbers come back bit for bit.
//!
//! serde_json writes a float with the fewest digits that name it, but (without a feature of its own) may read those digits
//! back one unit in the last place off. A learning rate or loss that moves by one bit breaks exact resuming, so
//! floats are read here by the standard library, which rounds correctly.

use serde::de::DeserializeOwned;
use serde_json::{Number, Value};

use crate::{Error, Result};

/// Reads a value from JSON text, floats exactly.
pub(super) fn from_str<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_value(value(text)?).map_err(damaged)
}

/// Reads any JSON value, floats exactly.
pub(super) fn value(text: &str) -> Result<Value> {
    let mut value: Value = serde_json::from_str(text).map_err(damaged)?;
    let mut exact = floats(text).into_iter();
    let complete = replace(&mut value, &mut exact) && exact.next().is_none();
    // A key given twice is read once, and then the floats no longer line up.
    if complete { Ok(value) } else { Err(Error::new("this JSON gives a key twice").next("remove one of the two")) }
}

fn damaged(e: serde_json::Error) -> Error {
    Error::new("this is not the JSON that was written")
        .expected("the fields of this format")
        .caused_by(e)
        .next("the file was changed or damaged: use a copy")
}

/// Every float of the text, in its order. The text is known to be JSON.
fn floats(text: &str) -> Vec<f64> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = string_end(bytes, at),
            b'-' | b'0'..=b'9' => {
                let end =
                    bytes[at..].iter().position(|b| !b"+-.eE0123456789".contains(b)).map_or(bytes.len(), |n| at + n);
                found.extend(float(&text[at..end]));
                at = end;
            }
            _ => at += 1,
        }
    }
    found
}

/// The index after the string that starts at `at`.
fn string_end(bytes: &[u8], mut at: usize) -> usize {
    at += 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// The number, if serde_json takes it for a float: `-0` and integers beyond 64 bits are.
fn float(token: &str) -> Option<f64> {
    let integer = token != "-0" && (token.parse::<u64>().is_ok() || token.parse::<i64>().is_ok());
    if integer { None } else { token.parse().ok() }
}

/// Puts the floats in their places; whether there were enough.
fn replace(value: &mut Value, exact: &mut impl Iterator<Item = f64>) -> bool {
    match value {
        Value::Number(n) if n.is_f64() => match exact.next().and_then(Number::from_f64) {
            Some(number) => {
                *n = number;
                true
            }
            None => false,
        },
        Value::Array(items) => items.iter_mut().all(|item| replace(item, exact)),
        Value::Object(fields) => fields.iter_mut().all(|(_, item)| replace(item, exact)),
        _ => true,
    }
}

/// `#[serde(with)]` for an `f64` that may be infinite or NaN, which JSON cannot write as a number: then it is a string.
pub(super) mod any_f64 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(in crate::train) fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        if x.is_finite() { s.serialize_f64(*x) } else { x.to_string().serialize(s) }
    }

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Text {
        Number(f64),
        Name(String),
    }

    pub(in crate::train) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        match Text::deserialize(d)? {
            Text::Number(x) => Ok(x),
            Text::Name(name) => match name.as_str() {
                "NaN" => Ok(f64::NAN),
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                _ => Err(D::Error::custom(format!("expected a number, found \"{name}\""))),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngCore, SeedableRng};
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_come_back_bit_for_bit() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut xs: Vec<f64> = (0..20_000).map(|_| f64::from_bits(rng.next_u64())).filter(|x| x.is_finite()).collect();
        xs.extend((0..20_000).map(|_| (rng.next_u32() as f64 / 3.0).recip()));
        xs.extend([0.0, -0.0, f64::MIN_POSITIVE, f64::MAX, 5e-324, 1.7026900316098216e-05]);
        let text = serde_json::to_string(&xs).unwrap();
        let back: Vec<f64> = from_str(&text).unwrap();
        assert!(xs.iter().map(|x| x.to_bits()).eq(back.iter().map(|x| x.to_bits())));
        // The reason for this module; should serde_json become exact by itself, it can go.
        let plain: Vec<f64> = serde_json::from_str(&text).unwrap();
        assert!(xs.iter().map(|x| x.to_bits()).ne(plain.iter().map(|x| x.to_bits())));
    }

    #[test]
    fn only_numbers_outside_strings_are_replaced() {
        let text = r#"{"a\"1.5":[1,"2.5\\",-0,{"b":1e2,"c":18446744073709551616}],"d":-3,"e":0.1}"#;
        let v = value(text).unwrap();
        let expected =
            json!({"a\"1.5": [1, "2.5\\", -0.0, {"b": 100.0, "c": 18446744073709551616.0}], "d": -3, "e": 0.1});
        assert_eq!(v, expected);
        assert!(value(r#"{"a":1.5,"a":2.5}"#).is_err());
        assert!(value("{\"a\":").is_err());
    }
}
