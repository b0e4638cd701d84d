//! A Jupyter kernel for Rust on evcxr, and the commands that install it, open JupyterLab with it and run notebooks.

mod child;
mod cli;
mod client;
mod doctor;
mod env;
mod evaluator;
mod history;
mod install;
mod link;
mod link_stub;
mod metadata;
mod output;
mod publisher;
mod runner;
mod server;
mod source;
mod stand_in;
mod stdin;
mod stock;
mod syntax;
mod template;
mod toolchain;
mod traceback;
mod wire;
mod workspace;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Started by evcxr to run cells.
    if std::env::var_os("EVCXR_IS_RUNTIME").is_some() {
        child::run();
    }
    // Through a link of another name, started by evcxr or rust-analyzer.
    let mut args = std::env::args();
    let program = args.next().unwrap_or_default();
    match Path::new(&program).file_name().and_then(|n| n.to_str()) {
        Some(name @ ("cargo" | "rustup")) => stand_in::run(name, &args.collect::<Vec<_>>()),
        _ => {
            forget_cargo();
            cli::run()
        }
    }
}

/// What cargo tells a program that it runs (`cargo run`, `cargo test`) is not for the compilers that this one runs: build scripts
/// that read it, ring's above all, would be run anew, and all that depends on them compiled again.
fn forget_cargo() {
    const OTHERS: [&str; 8] = [
        "CARGO",
        "CARGO_BIN_NAME",
        "CARGO_CRATE_NAME",
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_LINKS",
        "CARGO_MANIFEST_PATH",
        "CARGO_PRIMARY_PACKAGE",
        "OUT_DIR",
    ];
    let told = |name: &str| name.starts_with("CARGO_PKG_") || OTHERS.contains(&name);
    let names: Vec<_> = std::env::vars_os().map(|(name, _)| name).collect();
    for name in names.iter().filter(|name| name.to_str().is_some_and(told)) {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::remove_var(name) };
    }
}
