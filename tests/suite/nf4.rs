//! NF4 and FP4 against bitsandbytes' CUDA output (tests/golden/quant), and against bitsandbytes' files.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use tunebook::nf4::{self, Absmax, FP4_THRESHOLDS, Nf4Config, Nf4Tensor, QuantType, dynamic8};

use crate::support::golden;

#[derive(Deserialize)]
struct Case {
    kind: String,
    input: String,
    #[serde(default)]
    quant_type: String,
    #[serde(default)]
    code: String,
    blocksize: usize,
    #[serde(default)]
    nested: bool,
    name: String,
}

struct Golden {
    cases: Vec<Case>,
    inputs: Vec<u8>,
    outputs: Vec<u8>,
}

impl Golden {
    fn load() -> Self {
        let read = |f: &str| std::fs::read(golden("quant").join(f)).unwrap();
        Golden {
            cases: serde_json::from_slice(&read("cases.json")).unwrap(),
            inputs: read("inputs.safetensors"),
            outputs: read("golden.cuda.safetensors"),
        }
    }
}

fn floats(v: &TensorView<'_>) -> Vec<f32> {
    let b = v.data();
    match v.dtype() {
        Dtype::F32 => b.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect(),
        Dtype::BF16 => b.chunks(2).map(|c| bf16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
        Dtype::F16 => b.chunks(2).map(|c| f16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
        other => panic!("{other:?}"),
    }
}

fn tensor(v: &TensorView<'_>) -> Tensor {
    let dtype = match v.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::BF16 => DType::BF16,
        _ => DType::F16,
    };
    Tensor::from_raw_buffer(v.data(), dtype, v.shape(), &Device::Cpu).unwrap()
}

fn quant_type(s: &str) -> QuantType {
    if s == "fp4" { QuantType::Fp4 } else { QuantType::Nf4 }
}

fn close(a: f32, b: f32, relative: f32) -> bool {
    (a - b).abs() <= relative * b.abs()
}

/// FP4's reference uses an approximate reciprocal: a code may differ where `x / absmax` is within 2 ulp of a threshold.
fn fp4_tie(x: f32, absmax: f32) -> bool {
    let s = (x / absmax).abs();
    FP4_THRESHOLDS.iter().any(|t| (s.to_bits() as i64 - t.to_bits() as i64).abs() < 2)
}

#[test]
fn code_tables_equal_bitsandbytes() {
    let g = Golden::load();
    let out = SafeTensors::deserialize(&g.outputs).unwrap();
    let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
    let table = |name| bits(&floats(&out.tensor(name).unwrap()));
    assert_eq!(table("code.nf4"), bits(&QuantType::Nf4.code()));
    assert_eq!(table("code.fp4"), bits(&QuantType::Fp4.code()));
    assert_eq!(table("code.dynamic_signed"), bits(dynamic8::signed_map()));
    assert_eq!(table("code.dynamic_unsigned"), bits(dynamic8::unsigned_map()));
}

#[test]
fn four_bit_cases_equal_bitsandbytes() {
    let g = Golden::load();
    let inputs = SafeTensors::deserialize(&g.inputs).unwrap();
    let out = SafeTensors::deserialize(&g.outputs).unwrap();
    let (mut nf4_codes, mut fp4_codes, mut fp4_ties, mut dequantized) = (0, 0, 0, 0);
    for c in g.cases.iter().filter(|c| c.kind == "4bit") {
        let get = |part: &str| out.tensor(&format!("{}.{part}", c.name)).unwrap();
        let input = inputs.tensor(&c.input).unwrap();
        let cfg = Nf4Config {
            quant_type: quant_type(&c.quant_type),
            blocksize: c.blocksize,
            double_quant: c.nested,
            nested_blocksize: 256,
        };
        let mut q = nf4::quantize(&tensor(&input), cfg).unwrap();
        let expected = get("packed").data().to_vec();
        let x = floats(&input);
        match cfg.quant_type {
            QuantType::Nf4 => {
                assert_eq!(q.packed, expected, "{}", c.name);
                nf4_codes += x.len();
            }
            QuantType::Fp4 => {
                let absmax: Vec<f32> =
                    x.chunks(c.blocksize).map(|b| b.iter().fold(0f32, |m, v| m.max(v.abs()))).collect();
                let expected = Nf4Tensor { packed: expected.clone(), ..q.clone() };
                for (i, (a, b)) in q.codes().into_iter().zip(expected.codes()).enumerate() {
                    if a != b {
                        assert!(fp4_tie(x[i], absmax[i / c.blocksize]), "{} at {i}: {a} {b}", c.name);
                        fp4_ties += 1;
                    }
                }
                fp4_codes += x.len();
            }
        }
        match &mut q.absmax {
            Absmax::F32(a) => assert_eq!(*a, floats(&get("absmax")), "{}", c.name),
            Absmax::Nested { codes, absmax, offset, .. } => {
                assert_eq!(codes, get("absmax").data(), "{}", c.name);
                let (theirs, their_offset) = (floats(&get("nested_absmax")), floats(&get("nested_offset"))[0]);
                assert!(close(*offset, their_offset, 1e-6), "{}: {offset} {their_offset}", c.name);
                assert_eq!(absmax.len(), theirs.len());
                assert!(absmax.iter().zip(&theirs).all(|(a, b)| close(*a, *b, 1e-6)), "{}", c.name);
                // The rest is exact, given the same scales.
                (*absmax, *offset) = (theirs, their_offset);
                assert_eq!(q.absmax.to_f32().unwrap(), floats(&get("absmax_dequant")), "{}", c.name);
            }
        }
        if let Ok(theirs) = out.tensor(&format!("{}.dequant", c.name)) {
            q.packed = expected;
            let ours = q.dequantize().unwrap().flatten_all().unwrap();
            let ours = ours.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(ours, floats(&theirs), "{}", c.name);
            dequantized += 1;
        }
    }
    println!("nf4 {nf4_codes} codes equal; fp4 {fp4_codes} with {fp4_ties} ties; {dequantized} dequantized");
    assert!(nf4_codes > 300_000 && fp4_codes > 300_000 && dequantized > 50);
}

#[test]
fn eight_bit_cases_equal_bitsandbytes() {
    let g = Golden::load();
    let inputs = SafeTensors::deserialize(&g.inputs).unwrap();
    let out = SafeTensors::deserialize(&g.outputs).unwrap();
    let (mut total, mut off_by_one) = (0, 0);
    for c in g.cases.iter().filter(|c| c.kind == "8bit") {
        let get = |part: &str| out.tensor(&format!("{}.{part}", c.name)).unwrap();
        let map = if c.code == "unsigned" { dynamic8::Map::Unsigned } else { dynamic8::Map::Signed };
        let x = floats(&inputs.tensor(&c.input).unwrap());
        let (codes, absmax) = dynamic8::quantize_blocks(&x, map, c.blocksize);
        assert_eq!(absmax, floats(&get("absmax")), "{}", c.name);
        let theirs = get("q").data().to_vec();
        for (a, b) in codes.iter().zip(&theirs) {
            assert!(a.abs_diff(*b) <= 1, "{}: {a} {b}", c.name);
            off_by_one += usize::from(a != b);
        }
        total += x.len();
        if get("dequant").dtype() == Dtype::F32 {
            let back = dynamic8::dequantize_blocks(&theirs, &absmax, map, c.blocksize);
            assert_eq!(back, floats(&get("dequant")), "{}", c.name);
        }
    }
    println!("8-bit: {off_by_one} of {total} codes off by one");
    assert!(total > 100_000 && off_by_one * 2000 <= total);
}

/// The named tensors of a safetensors file.
fn file_tensors(path: &Path) -> Vec<nf4::BnbTensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let dtype = |d| if d == Dtype::U8 { DType::U8 } else { DType::F32 };
    file.iter().map(|(name, v)| (name.to_owned(), dtype(v.dtype()), v.shape().to_vec(), v.data().to_vec())).collect()
}

#[test]
fn bitsandbytes_files_are_read_and_written_with_the_same_bytes() {
    let mut weights = 0;
    for file in [
        "tiny-mistral/bnb_nf4/model.safetensors",
        "tiny-mistral/bnb_fp4/model.safetensors",
        "tiny-mistral/bnb_nf4_dq/model.safetensors",
        "tiny-mistral/bnb_nf4_dq/model.cuda.safetensors",
        "tiny-llama/bnb_nf4_dq/model.safetensors",
    ] {
        let all = file_tensors(&golden("tiny").join(file));
        let names = all.iter().filter_map(|t| t.0.split_once(".quant_state").map(|(name, _)| name.to_owned()));
        for name in names.collect::<Vec<_>>() {
            let parts = Nf4Tensor::bnb_names(&name);
            let parts: Vec<_> = all.iter().filter(|t| parts.contains(&t.0)).cloned().collect();
            let q = Nf4Tensor::from_bnb(&name, parts.clone()).unwrap();
            let mut written = q.to_bnb(&name).unwrap();
            assert_eq!(written.len(), parts.len(), "{file} {name}");
            written.sort_by(|a, b| a.0.cmp(&b.0));
            let mut parts = parts;
            parts.sort_by(|a, b| a.0.cmp(&b.0));
            assert_eq!(written, parts, "{file} {name}");
            weights += 1;
        }
    }
    assert!(weights >= 4 * 14 + 21, "{weights}");
}

#[test]
fn quantizing_the_tiny_model_gives_the_bytes_that_bitsandbytes_saved_on_a_gpu() {
    let base = file_tensors(&golden("tiny/tiny-mistral/base/model.safetensors"));
    let saved = file_tensors(&golden("tiny/tiny-mistral/bnb_nf4_dq/model.cuda.safetensors"));
    let mut weights = 0;
    for (name, dtype, shape, bytes) in &base {
        let parts = Nf4Tensor::bnb_names(name);
        let parts: Vec<_> = saved.iter().filter(|t| parts.contains(&t.0)).cloned().collect();
        if parts.len() < 2 {
            continue;
        }
        let theirs = Nf4Tensor::from_bnb(name, parts).unwrap();
        let w = Tensor::from_raw_buffer(bytes, *dtype, shape, &Device::Cpu).unwrap();
        let ours = nf4::quantize(&w, Nf4Config::default()).unwrap();
        assert_eq!(ours.packed, theirs.packed, "{name}");
        assert_eq!((&ours.shape, ours.dtype), (&theirs.shape, theirs.dtype), "{name}");
        let (Absmax::Nested { codes, offset, .. }, Absmax::Nested { codes: c2, offset: o2, .. }) =
            (&ours.absmax, &theirs.absmax)
        else {
            panic!("{name} is not nested")
        };
        assert_eq!(codes, c2, "{name}");
        assert!(close(*offset, *o2, 1e-6), "{name}");
        weights += 1;
    }
    assert_eq!(weights, 14);
}
