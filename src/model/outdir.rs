//! A model directory that appears whole: written beside its place, then renamed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tempfile::TempDir;

use super::Base;
use crate::{Error, Result, files};

/// A directory in the making. Dropped before [`commit`](OutDir::commit), it vanishes.
pub(crate) struct OutDir {
    tmp: TempDir,
    target: PathBuf,
}

impl OutDir {
    /// Starts a directory that will be `target`, which must not exist or be empty.
    pub(crate) fn create(target: impl AsRef<Path>) -> Result<Self> {
        let target = std::path::absolute(target.as_ref()).map_err(|e| Error::io("find", target.as_ref(), e))?;
        refuse_occupied(&target)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        files::create_dir_all(parent)?;
        let tmp = tempfile::Builder::new()
            .prefix(".tunebook-")
            .permissions(fs::Permissions::from_mode(0o777))
            .tempdir_in(parent)
            .map_err(|e| Error::io("create a directory", parent, e))?;
        Ok(OutDir { tmp, target })
    }

    /// Where to write now.
    pub(crate) fn path(&self) -> &Path {
        self.tmp.path()
    }

    /// Copies what a model directory holds besides weights and `config.json`: generation config, tokenizer, chat
    /// template, licence. Returns the names.
    pub(crate) fn copy_side_files(&self, from: &Path) -> Result<Vec<String>> {
        let entries = fs::read_dir(from).map_err(|e| Error::io("read the directory", from, e))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read the directory", from, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Follows links: the hub's cache is made of them.
            if is_side_file(&name) && entry.path().is_file() {
                refuse_foreign(from, &entry.path())?;
                let bytes = fs::read(entry.path()).map_err(|e| Error::io("read", entry.path(), e))?;
                files::write_atomic_bytes(self.path().join(&name), &bytes)?;
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Writes the base's `config.json` with this `quantization_config`, or without any; unchanged, it is a copy.
    pub(crate) fn write_config(&self, base: &Base, quantization: Option<Value>) -> Result<()> {
        let path = base.dir().join("config.json");
        let text = files::read_to_string(&path)?;
        let mut map: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| Error::new("not a JSON object").at_path(&path).caused_by(e))?;
        let sorted = map.keys().is_sorted();
        let before = map.shift_remove("quantization_config");
        if before == quantization {
            return files::write_atomic_bytes(self.path().join("config.json"), text.as_bytes());
        }
        if let Some(q) = quantization {
            map.insert("quantization_config".into(), q);
        }
        if sorted {
            map.sort_keys();
        }
        let text = format!("{:#}\n", Value::Object(map));
        files::write_atomic_bytes(self.path().join("config.json"), text.as_bytes())
    }

    /// Renames the directory into place.
    pub(crate) fn commit(self) -> Result<()> {
        files::sync_dir(self.path())?;
        // Somebody may have written there since.
        refuse_occupied(&self.target)?;
        let tmp = self.tmp.keep();
        if let Err(e) = fs::rename(&tmp, &self.target) {
            // Best effort: the error to report is the first.
            let _ = fs::remove_dir_all(&tmp);
            return Err(Error::io("rename into place", &self.target, e));
        }
        files::sync_dir(self.target.parent().unwrap_or(Path::new("/")))
    }
}

/// Refuses a link out of the model directory: what it names would be copied beside a model that others will get. Links into the
/// blobs of the hub's cache, of which snapshots are made, lead nowhere else.
fn refuse_foreign(dir: &Path, path: &Path) -> Result<()> {
    let find = |path: &Path| fs::canonicalize(path).map_err(|e| Error::io("find", path, e));
    let (file, inside) = (find(path)?, find(dir)?);
    let blobs = inside.parent().and_then(Path::parent).map(|repo| repo.join("blobs"));
    let is_snapshot = inside.parent().and_then(Path::file_name).is_some_and(|name| name == "snapshots");
    if file.starts_with(&inside) || (is_snapshot && blobs.is_some_and(|blobs| file.starts_with(blobs))) {
        return Ok(());
    }
    Err(Error::new("a link leads out of the model directory")
        .at_path(path)
        .expected("a file in the same directory")
        .found(file.display().to_string())
        .next("if it belongs to the model, put a copy in the place of the link"))
}

fn refuse_occupied(target: &Path) -> Result<()> {
    let occupied = match fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::io("use as the output directory", target, e)),
    };
    if occupied {
        return Err(Error::new("the output directory is not empty")
            .at_path(target)
            .expected("a directory that does not exist or is empty")
            .found("files in it")
            .next("choose another name; nothing is ever overwritten"));
    }
    Ok(())
}

pub(super) fn is_side_file(name: &str) -> bool {
    let starts = [
        "generation_config.json",
        "tokenizer",
        "special_tokens_map",
        "added_tokens",
        "vocab",
        "merges.txt",
        "chat_template",
        "LICENSE",
        "NOTICE",
        "USE_POLICY",
    ];
    let ends = [".model", ".jinja"];
    starts.iter().any(|s| name.starts_with(s)) || ends.iter().any(|e| name.ends_with(e))
}
