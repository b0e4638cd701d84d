//! What the linker is told: the standard library of the cells finds this program's `read` (see `src/stdin.rs`), and this
//! program the shared standard library, wherever it is started from.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=read");
    // cargo's own rpath is relative, and right for `deps/` only.
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).args(["--print", "target-libdir"]).output().expect("rustc runs: it compiled this");
    let libraries = String::from_utf8(output.stdout).expect("a path of text");
    println!("cargo:rustc-link-arg-bins=-Wl,-rpath,{}", libraries.trim());
}
