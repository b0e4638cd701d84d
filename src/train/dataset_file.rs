//! The tokenized examples of a run, kept with it so that resuming needs the run directory and the base model only.

use std::path::Path;

use safetensors::Dtype;

use super::tensor_file::{self, TensorFile, TensorSlice};
use crate::data::{Dataset, Example};
use crate::{Error, Result};

/// Writes a data set as a safetensors file: `input_ids` u32 `[N]` and `labels` i32 `[N]`, all examples one after the other,
/// and `lengths` u64 `[examples]`; of a packed one also `segments` u32, the lengths of the packed examples, and
/// `segment_counts` u64 `[examples]`, how many each sequence has. Synced; an existing file is replaced only by a whole one.
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
    let segments: Vec<u32> = dataset.segments().unwrap_or_default().concat();
    let counts: Vec<u64> = dataset.segments().unwrap_or_default().iter().map(|s| s.len() as u64).collect();
    let mut tensors = vec![
        slice("lengths", Dtype::U64, lengths.len(), bytemuck::cast_slice(&lengths)),
        slice("input_ids", Dtype::U32, ids.len(), bytemuck::cast_slice(&ids)),
        slice("labels", Dtype::I32, labels.len(), bytemuck::cast_slice(&labels)),
    ];
    if dataset.segments().is_some() {
        tensors.push(slice("segment_counts", Dtype::U64, counts.len(), bytemuck::cast_slice(&counts)));
        tensors.push(slice("segments", Dtype::U32, segments.len(), bytemuck::cast_slice(&segments)));
    }
    let tmp = path.with_extension(format!("tmp-{}", std::process::id()));
    // Left behind by a process of the same id that was killed.
    _ = std::fs::remove_file(&tmp);
    let written = tensor_file::write(&tmp, &tensors);
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
    let dataset = if file.names().iter().any(|name| name == "segments") {
        Dataset::with_segments(examples, load_segments(&file, path)?)
    } else {
        Dataset::new(examples)
    };
    dataset.map_err(|e| e.at_path(path))
}

fn load_segments(file: &TensorFile, path: &Path) -> Result<Vec<Vec<u32>>> {
    let counts: Vec<u64> = bytemuck::pod_collect_to_vec(&column(file, "segment_counts", Dtype::U64)?);
    let lengths: Vec<u32> = bytemuck::pod_collect_to_vec(&column(file, "segments", Dtype::U32)?);
    let mut rest = lengths.as_slice();
    let mut segments = Vec::with_capacity(counts.len());
    for count in counts {
        let n = usize::try_from(count).ok().filter(|&n| n <= rest.len());
        let (these, others) = rest.split_at(n.ok_or_else(|| damaged(path, "more packed examples than lengths"))?);
        segments.push(these.to_vec());
        rest = others;
    }
    if rest.is_empty() { Ok(segments) } else { Err(damaged(path, "packed examples that belong to no sequence")) }
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
