//! A safetensors file: its header, its tensors, and the 4-bit weights that bitsandbytes' quant states describe in it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tunebook::model::Checkpoint;
use tunebook::nf4::{BnbTensor, Nf4Tensor};
use tunebook::train::TensorFile;

static DIR: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary directory"));

fuzz_target!(|data: &[u8]| {
    let path = DIR.path().join("model.safetensors");
    std::fs::write(&path, data).expect("a temporary file");
    let _ = TensorFile::open(&path);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    for name in checkpoint.names() {
        let _ = checkpoint.read_f32(&name);
        let _ = checkpoint.read_tensor(&name);
        let parts: Vec<BnbTensor> = Nf4Tensor::bnb_names(&name)
            .into_iter()
            .filter_map(|part| {
                let info = checkpoint.info(&part).ok()?;
                Some((part.clone(), info.dtype, info.shape, checkpoint.read_bytes(&part).ok()?))
            })
            .collect();
        if let Ok(tensor) = Nf4Tensor::from_bnb(&name, parts) {
            let _ = tensor.dequantize_f32();
        }
    }
});
