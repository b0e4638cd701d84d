//! Where the tests find their reference data.

use std::path::PathBuf;

/// The shared reference data, or `None` with a message when it is not there: the caller returns, skipped.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("TUNEBOOK_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let p = root.join(path);
    if p.exists() {
        return Some(p);
    }
    eprintln!("skipped: {} is absent (set TUNEBOOK_SHARED)", p.display());
    None
}

/// A small reference file that is kept in the repository.
pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}
