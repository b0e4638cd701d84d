//! 4-bit kernels against `crate::nf4` and against bitsandbytes' CUDA output (tests/golden/quant), bit for bit.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::super::nf4::{Rows, Scales, check_scales, dequantize, nest, quantize};
use super::card::{Card, Golden, Noise, bits, floats};
use crate::nf4::{self, Absmax, AbsmaxRef, Nf4Config, Nf4Tensor, QuantType};

/// A tensor in its file's dtype.
struct Source {
    dtype: DType,
    bytes: Vec<u8>,
    n: usize,
}

impl Source {
    fn new(dtype: DType, values: &[f32]) -> Self {
        let bytes = match dtype {
            DType::F32 => bytemuck::cast_slice(values).to_vec(),
            DType::BF16 => {
                bytemuck::cast_slice(&values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>()).to_vec()
            }
            _ => {
                let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(v.clamp(-65504.0, 65504.0))).collect();
                bytemuck::cast_slice(&halves).to_vec()
            }
        };
        Source { dtype, bytes, n: values.len() }
    }

    fn on_cpu(&self, config: Nf4Config) -> Nf4Tensor {
        let t = Tensor::from_raw_buffer(&self.bytes, self.dtype, &[self.n], &Device::Cpu).unwrap();
        nf4::quantize(&t, config).unwrap()
    }
}

/// Quantizes on the card, in parts of `part` elements.
fn on_card(card: &Card, source: &Source, config: Nf4Config, part: usize) -> Nf4Tensor {
    let (n, size) = (source.n, source.dtype.size_in_bytes());
    let blocks = n.div_ceil(config.blocksize);
    let (from, packed, scales) = (card.put(&source.bytes), card.out::<u8>(n.div_ceil(2)), card.out::<f32>(blocks));
    for first in (0..n).step_by(part) {
        let piece = (from + (first * size) as u64, source.dtype, part.min(n - first));
        let (packed, scales) = (packed + first as u64 / 2, scales + (first / config.blocksize * 4) as u64);
        quantize(&card.gpu, piece, config, packed, scales).unwrap();
    }
    let offset = card.out::<f32>(1);
    check_scales(&card.gpu, scales, blocks, config.blocksize, offset).unwrap();
    let absmax = if config.double_quant {
        let groups = blocks.div_ceil(config.nested_blocksize);
        let (codes, absmax) = (card.out::<u8>(blocks), card.out::<f32>(groups));
        nest(&card.gpu, (scales, blocks), config.nested_blocksize, codes, absmax, offset).unwrap();
        Absmax::Nested {
            codes: card.get(codes, blocks),
            absmax: card.get(absmax, groups),
            offset: card.get(offset, 1)[0],
            blocksize: config.nested_blocksize,
        }
    } else {
        Absmax::F32(card.get(scales, blocks))
    };
    let packed = card.get(packed, n.div_ceil(2));
    card.clear();
    Nf4Tensor {
        packed,
        absmax,
        shape: vec![n],
        dtype: source.dtype,
        quant_type: config.quant_type,
        blocksize: config.blocksize,
    }
}

fn decode_on_card<T: bytemuck::Pod>(card: &Card, q: &Nf4Tensor) -> Vec<T> {
    let scales = match &q.absmax {
        Absmax::F32(a) => Scales::Plain(card.put(a)),
        Absmax::Nested { codes, absmax, offset, .. } => {
            Scales::Nested { codes: card.put(codes), absmax: card.put(absmax), offset: card.put(&[*offset]) }
        }
    };
    let (packed, out) = (card.put(&q.packed), card.out::<T>(q.numel()));
    dequantize(&card.gpu, packed, scales, q.config(), q.numel(), out, Rows::dense(q.numel())).unwrap();
    let values = card.get(out, q.numel());
    card.clear();
    values
}

/// Decodes in both compute dtypes and compares with the CPU.
fn check_decoding(cards: &[Card; 2], q: &Nf4Tensor, what: &str) {
    let mut wide = vec![0f32; q.numel()];
    nf4::dequantize_into(&q.packed, q.absmax.borrow(), q.quant_type, q.blocksize, &mut wide);
    assert!(bits(&decode_on_card::<f32>(&cards[0], q)) == bits(&wide), "{what}: decoded to f32");
    let mut halves = vec![bf16::ZERO; q.numel()];
    nf4::dequantize_bf16_into(&q.packed, q.absmax.borrow(), q.quant_type, q.blocksize, &mut halves);
    let halves: Vec<u16> = halves.iter().map(|x| x.to_bits()).collect();
    assert!(decode_on_card::<u16>(&cards[1], q) == halves, "{what}: decoded to bf16");
}

fn assert_equal(ours: &Nf4Tensor, cpu: &Nf4Tensor, what: &str) {
    assert!(ours.packed == cpu.packed, "{what}: packed");
    match (ours.absmax.borrow(), cpu.absmax.borrow()) {
        (AbsmaxRef::F32(a), AbsmaxRef::F32(b)) => assert!(bits(a) == bits(b), "{what}: absmax"),
        (
            AbsmaxRef::Nested { codes, absmax, offset, .. },
            AbsmaxRef::Nested { codes: c2, absmax: a2, offset: o2, .. },
        ) => {
            assert!(offset.to_bits() == o2.to_bits(), "{what}: offset {offset:e}, on the CPU {o2:e}");
            assert!(bits(absmax) == bits(a2), "{what}: nested absmax");
            assert!(codes == c2, "{what}: nested codes");
        }
        _ => panic!("{what}: another kind of absmax"),
    }
}

fn cards() -> Option<[Card; 2]> {
    Some([Card::open(true)?, Card::open(false)?])
}

#[derive(serde::Deserialize)]
struct Case {
    kind: String,
    input: String,
    #[serde(default)]
    quant_type: String,
    blocksize: usize,
    #[serde(default)]
    nested: bool,
    name: String,
}

#[test]
fn golden_cases_equal_bitsandbytes_and_the_cpu() {
    let Some(cards) = cards() else { return };
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(Golden::path("quant/cases.json")).unwrap()).unwrap();
    let (inputs, golden) = (Golden::load("quant/inputs.safetensors"), Golden::load("quant/golden.cuda.safetensors"));
    let (mut quantized, mut decoded) = (0, 0);
    for c in cases.iter().filter(|c| c.kind == "4bit") {
        let (dtype, shape, bytes) = inputs.get(&c.input).unwrap();
        let source = Source { dtype, bytes, n: shape.iter().product() };
        let quant_type = if c.quant_type == "fp4" { QuantType::Fp4 } else { QuantType::Nf4 };
        let config = Nf4Config { quant_type, blocksize: c.blocksize, double_quant: c.nested, nested_blocksize: 256 };
        let get = |part: &str| golden.bytes(&format!("{}.{part}", c.name));
        let mut q = on_card(&cards[0], &source, config, source.n);
        // FP4's reference rounds a few ties in another way; tests/suite/nf4.rs compares the CPU with it.
        assert_equal(&q, &source.on_cpu(config), &c.name);
        let packed = get("packed").unwrap();
        assert!(quant_type == QuantType::Fp4 || q.packed == packed, "{}: packed", c.name);
        let scale_bytes = get("absmax").unwrap();
        match &mut q.absmax {
            Absmax::F32(a) => assert!(bytemuck::cast_slice::<_, u8>(a) == scale_bytes, "{}: absmax", c.name),
            Absmax::Nested { codes, absmax, offset, .. } => {
                assert!(*codes == scale_bytes, "{}: nested codes", c.name);
                // The mean's last digits depend on its order; the rest is exact, given the same scales.
                *absmax = floats(DType::F32, &get("nested_absmax").unwrap());
                *offset = floats(DType::F32, &get("nested_offset").unwrap())[0];
            }
        }
        q.packed = packed;
        check_decoding(&cards, &q, &c.name);
        quantized += 1;
        let Some(theirs) = get("dequant") else { continue };
        match dtype {
            // As numbers: FP4's reference has a zero of the other sign.
            DType::F32 => {
                assert!(decode_on_card::<f32>(&cards[0], &q) == floats(dtype, &theirs), "{}: decoded", c.name)
            }
            DType::BF16 => {
                let ours = decode_on_card::<u16>(&cards[1], &q);
                let ours = floats(dtype, bytemuck::cast_slice(&ours));
                assert!(ours == floats(dtype, &theirs), "{}: decoded", c.name);
            }
            _ => continue,
        }
        decoded += 1;
    }
    println!("{quantized} cases quantized, {decoded} decoded as bitsandbytes does");
    assert!(quantized > 100 && decoded > 50);
}

/// Random bits in random ranges of the exponent, zeros, denormals, tiny and huge numbers among them.
fn awkward(n: usize, seed: u64) -> Vec<f32> {
    let mut noise = Noise(seed);
    let mut out = Vec::new();
    while out.len() < n {
        let (exponent, spread) = (noise.word() >> 25, 1 + noise.word() % 8);
        for _ in 0..64 {
            let e = (2 * exponent + noise.word() % spread).min(253);
            let bits = (noise.word() & 0x807f_ffff) | e << 23;
            out.push(if exponent % 8 == 0 && out.len() % 3 > 0 { 0.0 } else { f32::from_bits(bits) });
        }
    }
    out.truncate(n);
    out
}

#[test]
fn awkward_numbers_and_sizes_equal_the_cpu() {
    let Some(cards) = cards() else { return };
    for n in [1, 2, 31, 63, 64, 65, 4097, 8 * 4096, 100_000, 1_000_003] {
        let mut weights = Noise(n as u64);
        let gaussian: Vec<f32> = (0..n).map(|_| 0.02 * (0..4).map(|_| weights.unit()).sum::<f32>()).collect();
        let awkward = awkward(n, n as u64);
        for values in [gaussian, awkward] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let source = Source::new(dtype, &values);
                for quant_type in [QuantType::Nf4, QuantType::Fp4] {
                    for (blocksize, double_quant, nested_blocksize) in
                        [(64, true, 256), (64, false, 256), (32, true, 32), (128, true, 4096), (4096, true, 256)]
                    {
                        if n == 1_000_003 && (blocksize != 64 || dtype == DType::F16) {
                            continue;
                        }
                        let config = Nf4Config { quant_type, blocksize, double_quant, nested_blocksize };
                        let what = format!("{n} {dtype:?} {config:?}");
                        let cpu = source.on_cpu(config);
                        assert_equal(&on_card(&cards[0], &source, config, 2 * 4096), &cpu, &what);
                        check_decoding(&cards, &cpu, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn the_mean_of_many_scales_has_the_order_of_the_cpu() {
    let Some(card) = Card::open(false) else { return };
    for n in [1usize, 7, 8, 9, 2047, 2048, 2049, 100_001] {
        let mut noise = Noise(n as u64);
        let values: Vec<f32> = (0..n * 32).map(|_| noise.unit() * 10f32.powi((noise.word() % 9) as i32 - 4)).collect();
        let source = Source::new(DType::F32, &values);
        let config = Nf4Config { blocksize: 32, ..Nf4Config::default() };
        assert_equal(&on_card(&card, &source, config, usize::MAX), &source.on_cpu(config), &format!("{n} scales"));
    }
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let Some(card) = Card::open(false) else { return };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = Noise(1).units(1000);
        values[700] = bad;
        let config = Nf4Config::default();
        let (from, packed) = (card.put(&values), card.out::<u8>(500));
        let (scales, mean) = (card.out::<f32>(16), card.out::<f32>(1));
        quantize(&card.gpu, (from, DType::F32, 1000), config, packed, scales).unwrap();
        let e = check_scales(&card.gpu, scales, 16, 64, mean).unwrap_err().to_string();
        assert!(e.contains("not finite") && e.contains("block 10"), "{e}");
        card.clear();
    }
}
