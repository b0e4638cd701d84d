//! A model as GGUF, loaded back by candle's quantized Llama, computes the same.

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use tunebook::data::{Batch, Dataset, Example};
use tunebook::engine::Engine;
use tunebook::lora::{self, MergeBase};
use tunebook::model::{Base, GgufType, write_gguf};
use tunebook::plan::MemoryPlan;

use crate::support::golden;

/// Logits that follow the last token.
fn by_candle(path: &std::path::Path, ids: &[u32]) -> Vec<f32> {
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let input = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&input, 0).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn by_us(base: &Base, ids: &[u32]) -> Vec<f32> {
    let plan = MemoryPlan::lora(base.spec()).cpu().batch(1).seq(ids.len()).build().unwrap();
    let mut engine = Engine::new(&plan).unwrap();
    engine.load(base).unwrap();
    let ds = Dataset::new(vec![Example::all_trained(ids.to_vec())]).unwrap();
    let all = engine.logits(Batch::new(&ds, &[0])).unwrap();
    all[all.len() - base.spec().vocab_size..].to_vec()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_merged_model_is_the_same_as_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % 250).collect();
    for (model, adapter) in [("tiny-mistral", "all_linear_r8"), ("tiny-llama", "all_linear_r8")] {
        let merged = dir.path().join(model);
        let (base, adapter) = (golden(&format!("tiny/{model}/base")), golden(&format!("tiny/{model}/peft/{adapter}")));
        lora::merge(base, adapter).unwrap().onto(MergeBase::Original).save(&merged).unwrap();
        let merged = Base::from_dir(&merged).unwrap();
        let expected = by_us(&merged, &ids);
        for (kind, tolerance) in [(GgufType::F32, 1e-4), (GgufType::F16, 5e-3), (GgufType::Q8_0, 0.2)] {
            let path = dir.path().join(format!("{model}.{kind:?}.gguf"));
            write_gguf(&merged, &path, kind).unwrap();
            let off = worst(&by_candle(&path, &ids), &expected);
            println!("{model} {kind:?}: logits differ by at most {off:.1e}");
            assert!(off < tolerance, "{model} {kind:?}: {off}");
        }
    }
}

#[test]
fn what_has_no_place_in_gguf_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    let four = Base::from_dir(golden("tiny/tiny-mistral/bnb_nf4")).unwrap();
    let e = write_gguf(&four, &path, GgufType::F16).unwrap_err().to_string();
    assert!(e.contains("4 bits") && e.contains("merge it first"), "{e}");
    let base = Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let e = write_gguf(&base, dir.path().join("no/such/x.gguf"), GgufType::F32).unwrap_err().to_string();
    assert!(e.contains("no/such"), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
