//! What a cell is linked with instead of the library's shared object: the same metadata and name, and none of its symbols.
//!
//! The linker reads the symbols of everything that it links with, hundreds of thousands here, for a few that a cell refers to: half of the time that
//! it takes. A shared object may leave them open. The process of the cells has loaded the real one, which the loader knows by
//! its name.

use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::toolchain::user_command;

/// Where rustc looks for the metadata of a crate in a shared object.
const METADATA: &str = ".rustc";

/// Writes the stand-in of `object` into the directory `to`, under the same file name.
///
/// # Errors
/// A file that is no shared object of rustc's; a C compiler that does not assemble or link.
pub fn write(object: &Path, to: &Path) -> Result<PathBuf, String> {
    let io = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
    let name = object.file_name().ok_or_else(|| format!("{}: not a file", object.display()))?;
    let bytes = fs::read(object).map_err(|e| io(object, e))?;
    let metadata = metadata(&bytes).map_err(|e| format!("{}: {e}", object.display()))?;
    fs::create_dir_all(to).map_err(|e| io(to, e))?;
    let (data, source) = (to.join("metadata"), to.join("metadata.s"));
    fs::write(&data, metadata).map_err(|e| io(&data, e))?;
    let text =
        format!(".section {METADATA},\"\",@progbits\n.incbin \"metadata\"\n.section .note.GNU-stack,\"\",@progbits\n");
    fs::write(&source, text).map_err(|e| io(&source, e))?;
    let stub = to.join(name);
    let mut cc = user_command("cc");
    cc.current_dir(to).args(["-shared", "-nostdlib", "-o"]).arg(name);
    cc.arg(format!("-Wl,-soname,{}", name.to_string_lossy())).arg("metadata.s");
    let done = cc.output().map_err(|e| format!("cc: {e}"))?;
    let _ = (fs::remove_file(&data), fs::remove_file(&source));
    if !done.status.success() || !stub.is_file() {
        return Err(format!("cc: {}", String::from_utf8_lossy(&done.stderr).trim()));
    }
    Ok(stub)
}

/// The section's bytes.
fn metadata(bytes: &[u8]) -> Result<&[u8], String> {
    let file = object::File::parse(bytes).map_err(|e| e.to_string())?;
    let section = file.section_by_name(METADATA).ok_or_else(|| format!("no section {METADATA}"))?;
    section.data().map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_metadata_is_refused() {
        assert!(metadata(b"no object").is_err());
        let program = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(metadata(&program).unwrap_err(), "no section .rustc");
    }

    /// rustc compiles against it, and the result asks the loader for the real one.
    #[test]
    fn it_stands_for_a_shared_object() {
        let dir = tempfile::tempdir().unwrap();
        let rustc = |args: &[&str]| {
            let done = std::process::Command::new("rustc").current_dir(dir.path()).args(args).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        fs::write(dir.path().join("a.rs"), "pub fn one() -> u64 { 1 }").unwrap();
        rustc(&["--crate-type=dylib", "-Cprefer-dynamic", "a.rs"]);
        let real = dir.path().join("liba.so");
        let stub = write(&real, &dir.path().join("link")).unwrap();
        let symbols = |path: &Path| object::File::parse(&*fs::read(path).unwrap()).unwrap().dynamic_symbols().count();
        assert!(symbols(&real) > 0 && symbols(&stub) == 0);
        fs::write(dir.path().join("b.rs"), "#[unsafe(no_mangle)] pub extern \"C\" fn two() -> u64 { 2 * a::one() }")
            .unwrap();
        let (to, from) = (format!("a={}", stub.display()), format!("-Clink-arg={}", stub.display()));
        let flags = ["--crate-type=cdylib", "-Cprefer-dynamic", "-Clink-arg=-Wl,--no-as-needed", "--extern"];
        rustc(&[&flags[..], &[&to, &from, "b.rs"]].concat());
        let bytes = fs::read(dir.path().join("libb.so")).unwrap();
        let needed = bytes.windows(8).any(|w| w == b"liba.so\0");
        assert!(needed, "libb.so does not ask for liba.so");
    }
}
