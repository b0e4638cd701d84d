//! Lets the standard library of the cells find this program's `read` (see `src/stdin.rs`).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=read");
}
