//! The files of a run: its record, a checkpoint's manifest and state, the metrics. The first byte says which.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tunebook::train::{Metrics, RunRecord, load_dataset, scan_checkpoints};

static DIR: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = TempDir::new().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("checkpoints/step-1")).expect("a directory");
    dir
});

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let name = [
        "run.json",
        "checkpoints/step-1/manifest.json",
        "checkpoints/step-1/state.json",
        "metrics.jsonl",
        "dataset.safetensors",
    ][usize::from(*first) % 5];
    fs::write(DIR.path().join(name), rest).expect("a temporary file");
    let _ = RunRecord::read(DIR.path());
    let scan = scan_checkpoints(DIR.path()).expect("a directory that can be read");
    // No file in it has the hash that its manifest says, unless the manifest lists none of them.
    assert!(scan.newest.is_none());
    let _ = Metrics::read(DIR.path());
    let _ = load_dataset(DIR.path().join("dataset.safetensors"));
});
