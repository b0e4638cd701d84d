//! The tokenized examples of a run, kept with it so that resuming needs the run directory and the base model only.

use std::path::Path;

use safetensors::Dtype;

use super::tensor_file::{self, TensorFile, TensorSlice};
use crate::data::{Dataset, Example};
use crate::{Error, Result};

/// Writes a data set as a safetensors file: `input_ids` u32 `[N]` and `labels` i32 `[N]`, all examples one after the other,
/// and `lengths` u64 `[examples]`. Synced; an existing file is replaced only by a whole one.
///
/// # Errors
/// Input or output errors, with the path.
pub fn save_dataset(path: impl AsRef<Path>, dataset: &Dataset) -> Result<()> {
    let path = path.as_ref();
    let ids: Vec<u32> = dataset.examples().iter().flat_map(|e| e.input_ids.iter().copied()).collect();
    let labels: Vec<i32> = dataset.examples().iter().flat_map(|e| e.labels.iter().copied()).collect();
    let lengths: Vec<u64> = dataset.examples().iter().map(|e| e.input_ids.len() as u64).collect();
    fn slice<'a>(name: &str, dtype: Dtype, len: usize, data: &'a [u8]) -> TensorSlice<'a> {
        TensorSlice { name: name.into(), dtype, shape: vec![len], data: data.into() }
    }
    let tmp = path.with_extension(format!("tmp-{}", std::process::id()));
    // Left behind by a process of the same id that was killed.
    _ = std::fs::remove_file(&tmp);
    let written = tensor_file::write(
        &tmp,
        &[
            slice("lengths", Dtype::U64, lengths.len(), bytemuck::cast_slice(&lengths)),
            slice("input_ids", Dtype::U32, ids.len(), bytemuck::cast_slice(&ids)),
            slice("labels", Dtype::I32, labels.len(), bytemuck::cast_slice(&labels)),
        ],
    );
    let renamed =
        written.and_then(|()| std::fs::rename(&tmp, path).map_err(|e| Error::io("rename into place", path, e)));
    if renamed.is_err() {
        _ = std::fs::remove_file(&tmp);
    }
    renamed
}

/// Reads what [`save_dataset`] wrote.
///
/// # Errors
/// A damaged file: lengths, ids and labels that do not fit together.
pub fn load_dataset(path: impl AsRef<Path>) -> Result<Dataset> {
    let path = path.as_ref();
    let file = TensorFile::open(path)?;
    let lengths: Vec<u64> = bytemuck::pod_collect_to_vec(&column(&file, "lengths", Dtype::U64)?);
    let ids: Vec<u32> = bytemuck::pod_collect_to_vec(&column(&file, "input_ids", Dtype::U32)?);
    let labels: Vec<i32> = bytemuck::pod_collect_to_vec(&column(&file, "labels", Dtype::I32)?);
    let mut at = 0usize;
    let mut examples = Vec::with_capacity(lengths.len());
    for length in lengths {
        let end = usize::try_from(length).ok().and_then(|n| at.checked_add(n));
        let part = end.and_then(|end| Some((ids.get(at..end)?.to_vec(), labels.get(at..end)?.to_vec(), end)));
        let (input_ids, labels, end) = part.ok_or_else(|| damaged(path, "lengths beyond the tokens"))?;
        examples.push(Example { input_ids, labels });
        at = end;
    }
    if at != ids.len() || at != labels.len() {
        return Err(damaged(path, "tokens that belong to no example"));
    }
    Dataset::new(examples).map_err(|e| e.at_path(path))
}

fn column(file: &TensorFile, name: &str, dtype: Dtype) -> Result<Vec<u8>> {
    file.read(name, dtype, &file.shape(name)?)
}

fn damaged(path: &Path, found: &str) -> Error {
    Error::new("the run's data set is damaged")
        .at_path(path)
        .expected("examples whose lengths add up to the tokens")
        .found(found)
        .next("put the file of a copy in its place, or start a new run")
}
