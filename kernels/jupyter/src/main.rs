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
        _ => cli::run(),
    }
}
