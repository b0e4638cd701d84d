//! What a file must be: the hub names each by a hash of its content.

use std::fmt::Write as _;

use sha1::Digest as _;

/// The hash by which the hub knows a file, in lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// SHA-256 of the content: large files.
    Sha256(String),
    /// SHA-1 of `blob SIZE\0` and the content, as git names it: small files.
    Git(String),
}

impl Checksum {
    /// From an etag: its length tells which. `None`: neither.
    pub fn from_etag(etag: &str) -> Option<Self> {
        let hex = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        let is_hex = hex.bytes().all(|b| b.is_ascii_hexdigit());
        match hex.len() {
            64 if is_hex => Some(Checksum::Sha256(hex)),
            40 if is_hex => Some(Checksum::Git(hex)),
            _ => None,
        }
    }

    /// The hex digits; also the file's name among the cache's blobs.
    pub fn hex(&self) -> &str {
        match self {
            Checksum::Sha256(hex) | Checksum::Git(hex) => hex,
        }
    }

    /// A hasher for a file of `size` bytes.
    pub fn hasher(&self, size: u64) -> Hasher {
        match self {
            Checksum::Sha256(_) => Hasher::Sha256(sha2::Sha256::new()),
            Checksum::Git(_) => {
                let mut hasher = sha1::Sha1::new();
                hasher.update(format!("blob {size}\0"));
                Hasher::Git(hasher)
            }
        }
    }
}

/// A [`Checksum`] in the making.
#[derive(Clone)]
pub(super) enum Hasher {
    Sha256(sha2::Sha256),
    Git(sha1::Sha1),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(h) => h.update(bytes),
            Hasher::Git(h) => h.update(bytes),
        }
    }

    /// The hex digits.
    pub fn finish(self) -> String {
        match self {
            Hasher::Sha256(h) => hex(&h.finalize()),
            Hasher::Git(h) => hex(&h.finalize()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        _ = write!(out, "{byte:02x}");
        out
    })
}
