//! bitsandbytes' files: the named tensors that stand for one 4-bit weight in a safetensors file.
//!
//! For a weight named `X`: `X` (packed, u8 `[ceil(n/2), 1]`), `X.absmax` (f32 `[blocks]`, u8 when nested),
//! `X.quant_map` (f32 `[16]`), when nested `X.nested_absmax` (f32) and `X.nested_quant_map` (f32 `[256]`), and
//! `X.quant_state.bitsandbytes__nf4` or `__fp4` (u8: JSON text).

use candle_core::DType;
use serde_json::Value;

use super::absmax::Absmax;
use super::codebook::QuantType;
use super::dynamic8;
use super::tensor::{Nf4Tensor, check_blocksize, checked_numel};
use crate::{Error, Result};

/// A tensor of a safetensors file: name, dtype, shape and little-endian bytes.
pub type BnbTensor = (String, DType, Vec<usize>, Vec<u8>);

const STATE: &str = "quant_state.bitsandbytes__";

impl Nf4Tensor {
    /// The names under which a file may hold the parts of the 4-bit weight `name` (such as
    /// `model.layers.0.self_attn.q_proj.weight`): read those that are there and give them to
    /// [`from_bnb`](Self::from_bnb). A weight is stored in 4 bits if one of the last two names is in the file.
    pub fn bnb_names(name: &str) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        for part in ["absmax", "quant_map", "nested_absmax", "nested_quant_map"] {
            names.push(format!("{name}.{part}"));
        }
        names.extend([QuantType::Nf4, QuantType::Fp4].map(|t| state_name(name, t)));
        names
    }

    /// The named tensors that bitsandbytes writes for this weight; `name` is the weight's whole name.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use tunebook::nf4::{self, Nf4Config, Nf4Tensor};
    ///
    /// let w = Tensor::randn(0f32, 1.0, (8, 64), &Device::Cpu)?;
    /// let q = nf4::quantize(&w, Nf4Config::default())?;
    /// let parts = q.to_bnb("fc.weight")?;
    /// assert_eq!(parts[0].0, "fc.weight");
    /// assert_eq!(Nf4Tensor::from_bnb("fc.weight", parts)?, q);
    /// # Ok::<(), tunebook::Error>(())
    /// ```
    ///
    /// # Errors
    /// Parts that do not fit together.
    pub fn to_bnb(&self, name: &str) -> Result<Vec<BnbTensor>> {
        self.validate()?;
        let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut out = vec![(name.to_owned(), DType::U8, vec![self.packed.len(), 1], self.packed.clone())];
        let mut push = |part: &str, dtype, len, bytes| out.push((format!("{name}.{part}"), dtype, vec![len], bytes));
        match &self.absmax {
            Absmax::F32(absmax) => push("absmax", DType::F32, absmax.len(), f32s(absmax)),
            Absmax::Nested { codes, .. } => push("absmax", DType::U8, codes.len(), codes.clone()),
        }
        push("quant_map", DType::F32, 16, f32s(&self.quant_type.code()));
        if let Absmax::Nested { absmax, .. } = &self.absmax {
            push("nested_absmax", DType::F32, absmax.len(), f32s(absmax));
            push("nested_quant_map", DType::F32, 256, f32s(dynamic8::signed_map()));
        }
        let state = self.quant_state().into_bytes();
        out.push((state_name(name, self.quant_type), DType::U8, vec![state.len()], state));
        Ok(out)
    }

    /// The JSON text that bitsandbytes stores beside the weight, with the spacing of Python's `json.dumps`.
    pub fn quant_state(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut json = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}]"#,
            self.quant_type.as_str(),
            self.blocksize,
            torch_name(self.dtype),
            shape.join(", ")
        );
        if let Absmax::Nested { offset, blocksize, .. } = &self.absmax {
            let offset = python_float(f64::from(*offset));
            json +=
                &format!(r#", "nested_blocksize": {blocksize}, "nested_dtype": "float32", "nested_offset": {offset}"#);
        }
        json + "}"
    }

    /// A 4-bit weight from the named tensors of a bitsandbytes file. Every size, table and field is checked; other
    /// tensors in the list are ignored.
    ///
    /// The packed bytes may be declared as any dtype (`bnb_4bit_quant_storage`): only their number counts.
    ///
    /// # Errors
    /// A missing part, JSON that cannot be read, an unsupported quantization, and sizes that contradict the shape.
    pub fn from_bnb(name: &str, tensors: Vec<BnbTensor>) -> Result<Self> {
        Parts { name, tensors }.read().map_err(|e| e.at(name))
    }
}

fn state_name(name: &str, quant_type: QuantType) -> String {
    format!("{name}.{STATE}{}", quant_type.as_str())
}

struct Parts<'a> {
    name: &'a str,
    tensors: Vec<BnbTensor>,
}

impl Parts<'_> {
    fn read(mut self) -> Result<Nf4Tensor> {
        let (quant_type, json) = self.state()?;
        let state = State::parse(&json)?;
        if state.quant_type != quant_type {
            return Err(Error::new("quant_state contradicts its own name")
                .at("quant_type")
                .expected(quant_type.as_str())
                .found(state.quant_type.as_str()));
        }
        self.check_table("quant_map", &quant_type.code())?;
        let packed = self.take("")?.3;
        let absmax = match state.nested {
            None => Absmax::F32(self.floats("absmax")?),
            Some((blocksize, offset)) => {
                self.check_table("nested_quant_map", dynamic8::signed_map())?;
                let codes = self.take("absmax")?;
                if codes.1 != DType::U8 {
                    return Err(wrong_dtype("absmax", DType::U8, codes.1));
                }
                Absmax::Nested { codes: codes.3, absmax: self.floats("nested_absmax")?, offset, blocksize }
            }
        };
        let q = Nf4Tensor {
            packed,
            absmax,
            shape: state.shape,
            dtype: state.dtype,
            quant_type,
            blocksize: state.blocksize,
        };
        q.validate()?;
        Ok(q)
    }

    /// Removes the tensor of that part ("" is the packed weight) from the list.
    fn take(&mut self, part: &str) -> Result<BnbTensor> {
        let key = if part.is_empty() { self.name.to_owned() } else { format!("{}.{part}", self.name) };
        let Some(i) = self.tensors.iter().position(|t| t.0 == key) else {
            return Err(Error::new("a part of the 4-bit weight is missing")
                .at(key)
                .next("check that every shard of the model is there"));
        };
        Ok(self.tensors.swap_remove(i))
    }

    fn state(&mut self) -> Result<(QuantType, String)> {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            if let Ok(t) = self.take(&format!("{STATE}{}", quant_type.as_str())) {
                let text = String::from_utf8(t.3).map_err(|e| Error::new("quant_state is not UTF-8").caused_by(e))?;
                return Ok((quant_type, text));
            }
        }
        Err(Error::new("not a 4-bit weight of bitsandbytes")
            .expected(format!("a tensor named {}.{STATE}nf4 or {STATE}fp4", self.name))
            .found("none"))
    }

    fn floats(&mut self, part: &str) -> Result<Vec<f32>> {
        let (_, dtype, _, bytes) = self.take(part)?;
        if dtype != DType::F32 {
            return Err(wrong_dtype(part, DType::F32, dtype));
        }
        let (values, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(Error::new("a tensor of broken size")
                .at(part)
                .expected("4 bytes per value")
                .found(format!("{} bytes", bytes.len())));
        }
        let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                Err(Error::new("a value that is not finite").at(format!("{part}[{i}]")).found(values[i].to_string()))
            }
            None => Ok(values),
        }
    }

    fn check_table(&mut self, part: &str, expected: &[f32]) -> Result<()> {
        // Zeros compare equal whatever their sign.
        if self.floats(part)? == expected {
            return Ok(());
        }
        Err(Error::new("an unknown code table")
            .at(part)
            .expected("the table of bitsandbytes")
            .found("other values")
            .next("quantize the original model again, with nf4 or fp4"))
    }
}

fn wrong_dtype(part: &str, expected: DType, found: DType) -> Error {
    Error::new("wrong dtype").at(part).expected(expected.as_str()).found(found.as_str())
}

/// What `quant_state` says.
struct State {
    quant_type: QuantType,
    blocksize: usize,
    dtype: DType,
    shape: Vec<usize>,
    /// Blocksize and offset.
    nested: Option<(usize, f32)>,
}

impl State {
    fn parse(json: &str) -> Result<Self> {
        let v: Value = serde_json::from_str(json)
            .map_err(|e| Error::new("quant_state cannot be read").at("quant_state").expected("JSON").caused_by(e))?;
        let quant_type = match v["quant_type"].as_str() {
            Some("nf4") => QuantType::Nf4,
            Some("fp4") => QuantType::Fp4,
            _ => return Err(bad_field("quant_type", "\"nf4\" or \"fp4\"", &v)),
        };
        let dtype = match v["dtype"].as_str() {
            Some("float32") => DType::F32,
            Some("bfloat16") => DType::BF16,
            Some("float16") => DType::F16,
            _ => return Err(bad_field("dtype", "\"float32\", \"bfloat16\" or \"float16\"", &v)),
        };
        let blocksize = size(&v["blocksize"]).ok_or_else(|| bad_field("blocksize", "a number", &v))?;
        check_blocksize("blocksize", blocksize)?;
        let shape: Option<Vec<usize>> = v["shape"].as_array().and_then(|s| s.iter().map(size).collect());
        let shape = shape.ok_or_else(|| bad_field("shape", "a list of sizes", &v))?;
        checked_numel(&shape)?;
        let nested = if v.get("nested_offset").is_some() { Some(Self::nested(&v)?) } else { None };
        Ok(State { quant_type, blocksize, dtype, shape, nested })
    }

    fn nested(v: &Value) -> Result<(usize, f32)> {
        let blocksize = size(&v["nested_blocksize"]).ok_or_else(|| bad_field("nested_blocksize", "a number", v))?;
        check_blocksize("nested_blocksize", blocksize)?;
        if v["nested_dtype"].as_str() != Some("float32") {
            return Err(bad_field("nested_dtype", "\"float32\"", v));
        }
        let offset = v["nested_offset"].as_f64().map(|o| o as f32).filter(|o| o.is_finite());
        Ok((blocksize, offset.ok_or_else(|| bad_field("nested_offset", "a finite number", v))?))
    }
}

fn size(v: &Value) -> Option<usize> {
    v.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn bad_field(field: &str, expected: &str, v: &Value) -> Error {
    let mut found = v[field].to_string();
    found.truncate(found.char_indices().nth(80).map_or(found.len(), |(i, _)| i));
    Error::new("quant_state has an unsupported value").at(field).expected(expected).found(found)
}

/// The dtype's name in torch.
fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// A float as Python's `repr` writes it: the shortest digits, with an exponent below 1e-4 and from 1e16.
fn python_float(v: f64) -> String {
    let scientific = format!("{v:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{v:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::python_float;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        // Each checked with Python's repr.
        let cases = [
            (0.20322461426258087, "0.20322461426258087"),
            (2.0, "2.0"),
            (-0.0, "-0.0"),
            (1e-4, "0.0001"),
            (9.5e-5, "9.5e-05"),
            (1.401298464324817e-45, "1.401298464324817e-45"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.2345e22, "-1.2345e+22"),
            (3.4028234663852886e38, "3.4028234663852886e+38"),
        ];
        for (v, text) in cases {
            assert_eq!(python_float(v), text);
        }
    }
}
