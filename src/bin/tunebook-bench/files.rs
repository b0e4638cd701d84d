//! Checkpoints of random weights for benchmarks that read files.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::DType;
use half::bf16;
use tempfile::TempDir;
use tunebook::files::write_atomic_bytes;
use tunebook::model::{Base, ModelSpec, ShardedWriter, TensorHeader, pt_metadata};
use tunebook::{Error, Result};

use crate::args::Args;
use crate::nf4;
use crate::report::gib;

/// Bytes of one file of the checkpoint that is written.
const SHARD: u64 = 5 << 30;

/// Reads every file once, so that all of it is in the page cache.
pub fn warm(base: &Base) -> Result<()> {
    for path in base.checkpoint().shards() {
        let read = File::open(&path).and_then(|mut f| io::copy(&mut f, &mut io::sink()));
        read.map_err(|e| Error::io("read", &path, e))?;
    }
    Ok(())
}

/// A temporary directory below `--dir`; it goes when it is dropped.
pub fn directory(args: &Args) -> Result<TempDir> {
    let parent: PathBuf = args.text("dir").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::Builder::new().prefix("tunebook-bench-").tempdir_in(&parent);
    dir.map_err(|e| Error::io("create a directory", &parent, e))
}

/// Writes `config.json` and bf16 weights of a shape.
pub fn write_checkpoint(spec: &ModelSpec, dir: &Path, seed: u64) -> Result<()> {
    let begin = Instant::now();
    write_atomic_bytes(dir.join("config.json"), format!("{:#}\n", spec.to_config_json()).as_bytes())?;
    let header = |t: tunebook::model::TensorSpec| TensorHeader::new(t.name, DType::BF16, t.shape);
    let headers: Vec<TensorHeader> = spec.tensors().into_iter().map(header).collect();
    let values = nf4::normal(seed);
    let weights: &[u8] = bytemuck::cast_slice(&values);
    let ones = vec![bf16::ONE; spec.hidden_size];
    let mut writer = ShardedWriter::create(dir, headers.clone(), SHARD, &pt_metadata())?;
    for t in &headers {
        if t.shape.len() == 1 {
            writer.write(&t.name, bytemuck::cast_slice(&ones))?;
            continue;
        }
        let mut left = t.bytes() as usize;
        while left > 0 {
            let n = left.min(weights.len());
            writer.write(&t.name, &weights[..n])?;
            left -= n;
        }
    }
    writer.finish()?;
    let bytes = headers.iter().map(TensorHeader::bytes).sum();
    eprintln!("wrote {} in {:.1} s", gib(bytes), begin.elapsed().as_secs_f64());
    Ok(())
}
