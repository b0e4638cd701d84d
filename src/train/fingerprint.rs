//! Fingerprints: SHA-256 of files, and of a model directory without reading all of it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Files up to this size are hashed whole in [`fingerprint_dir`].
const WHOLE: u64 = 64 << 20;
/// Larger ones are hashed in this many pieces of 1 MiB, evenly spread, the first and the last among them.
const PIECES: u64 = 33;
const PIECE: u64 = 1 << 20;

/// A fingerprint of a model directory: SHA-256 (hex) over its `config.json` and `*.safetensors`, by name and size; files of
/// more than 64 MiB by 33 pieces of 1 MiB, evenly spread from the header to the end. Takes well under a second for 15 GB.
///
/// It notices another model, another revision or a file cut short; it is no defence against somebody who alters single
/// weights on purpose.
///
/// # Errors
/// A directory that cannot be read, or without such files.
pub fn fingerprint_dir(dir: impl AsRef<Path>) -> Result<String> {
    let dir = dir.as_ref();
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read the directory", dir, e))? {
        let name = entry.map_err(|e| Error::io("read the directory", dir, e))?.file_name();
        if let Some(name) = name.to_str().filter(|n| *n == "config.json" || n.ends_with(".safetensors")) {
            names.push(name.to_owned());
        }
    }
    if names.is_empty() {
        return Err(Error::new("this is not a model directory")
            .at_path(dir)
            .expected("config.json and *.safetensors")
            .found("neither")
            .next("give the directory that holds the base model"));
    }
    names.sort();
    let mut hash = Sha256::new();
    for name in names {
        let path = dir.join(&name);
        hash_sampled(&name, &path, &mut hash).map_err(|e| Error::io("read", &path, e))?;
    }
    Ok(hex(hash))
}

fn hash_sampled(name: &str, path: &Path, hash: &mut Sha256) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    hash.update(format!("{name}\n{bytes}\n"));
    if bytes <= WHOLE {
        return copy_into(&mut file, hash);
    }
    for piece in 0..PIECES {
        file.seek(SeekFrom::Start((bytes - PIECE) / (PIECES - 1) * piece))?;
        copy_into(&mut (&mut file).take(PIECE), hash)?;
    }
    Ok(())
}

/// SHA-256 of a whole file, in hex.
pub(super) fn sha256_file(file: &mut File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    copy_into(file, &mut hash)?;
    Ok(hex(hash))
}

fn copy_into(from: &mut impl Read, hash: &mut Sha256) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => hash.update(&buffer[..n]),
        }
    }
}

pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
