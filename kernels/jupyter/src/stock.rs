//! Stock evcxr 0.22 in a workspace of its own, with the library compiled already: what notebooks must also run under, and
//! what the kernel is measured against.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::install;
use crate::template::{self, Layout};
use crate::toolchain::Toolchain;
use crate::workspace::Workspace;

/// Compiles what it needs: the library, and evcxr's programs.
///
/// # Errors
/// What does not compile.
pub fn prepare(layout: &Layout) -> Result<(), String> {
    install::library(layout)?;
    let toolchain = Toolchain::ask(&layout.repository)?;
    let mut cargo = toolchain.cargo_command();
    // With the kernel, so that both share what they depend on.
    cargo.current_dir(&layout.repository).args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "stock-evcxr",
        "-p",
        "tunebook-kernel",
    ]);
    match cargo.env("CARGO_TARGET_DIR", &layout.target).status() {
        Ok(s) if s.success() => Ok(()),
        _ => Err("stock evcxr does not compile; cargo's message is above".into()),
    }
}

/// The command that starts a kernel, but for the connection file.
///
/// # Errors
/// A program without a path.
pub fn kernel(layout: &Layout) -> Result<Command, String> {
    let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
    command.arg("stock").arg("--target").arg(&layout.target);
    Ok(command)
}

/// Runs the stock kernel for a connection file; whether it ended well.
///
/// # Errors
/// [`prepare`] has not been called.
pub fn run(layout: &Layout, connection_file: &Path) -> Result<bool, String> {
    let workspace = workspace(layout)?;
    let mut command = program(layout, "stock-evcxr-jupyter", &workspace)?;
    let status = command.arg("--control_file").arg(connection_file).status().map_err(|e| e.to_string())?;
    Ok(status.success())
}

/// Runs cells from standard input as evcxr's REPL does; whether all went well.
///
/// # Errors
/// What does not compile.
pub fn repl(layout: &Layout) -> Result<bool, String> {
    prepare(layout)?;
    let workspace = workspace(layout)?;
    let mut command = program(layout, "stock-evcxr-repl", &workspace)?;
    Ok(command.stdin(Stdio::inherit()).status().map_err(|e| e.to_string())?.success())
}

/// One of evcxr's programs, in that workspace.
///
/// # Errors
/// No Rust.
fn program(layout: &Layout, name: &str, workspace: &Workspace) -> Result<Command, String> {
    let toolchain = Toolchain::ask(&layout.repository)?;
    let program: PathBuf = layout.target.join(&toolchain.host).join("release").join(name);
    if !program.is_file() {
        return Err(format!(
            "{} is not compiled: run 'cargo build --release -p stock-evcxr -p tunebook-kernel'",
            program.display()
        ));
    }
    let config = layout.home().join("evcxr-stock");
    let io = |e: std::io::Error| format!("{}: {e}", config.display());
    fs::create_dir_all(&config).map_err(io)?;
    // One linker whatever is installed: with lld, evcxr changes the flags, and every dependency would be compiled again.
    fs::write(config.join("init.evcxr"), ":linker system\n").map_err(io)?;
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command.env("EVCXR_TMPDIR", workspace.context()).env("EVCXR_CONFIG_DIR", config);
    // A cell finds Rust's own library by a path relative to where it was linked, and evcxr moves it.
    command.env("LD_LIBRARY_PATH", toolchain.libdir);
    Ok(command)
}

/// A workspace in which evcxr finds the library compiled.
///
/// # Errors
/// A directory that cannot be written.
fn workspace(layout: &Layout) -> Result<Workspace, String> {
    let sessions = layout.sessions();
    let io = |e: std::io::Error| format!("{}: {e}", sessions.display());
    let workspace = Workspace::create(&sessions).map_err(io)?;
    template::prepare_workspace(layout)?;
    let dir = workspace.dir();
    // evcxr starts with no dependencies; alone, its crate would lose our Cargo.lock at once. A second crate keeps it.
    fs::write(dir.join("Cargo.toml"), "[workspace]\nresolver = \"3\"\nmembers = [\"ctx\", \"keep\"]\n").map_err(io)?;
    fs::copy(layout.home().join("build/Cargo.lock"), dir.join("Cargo.lock")).map_err(io)?;
    let library = toml::Value::from(layout.repository.to_string_lossy().into_owned());
    fs::create_dir_all(dir.join("keep/src")).map_err(io)?;
    fs::write(dir.join("keep/src/lib.rs"), "").map_err(io)?;
    let manifest = format!(
        "[package]\nname = \"keep\"\nversion = \"1.0.0\"\nedition = \"2024\"\n\n[lib]\npath = \"src/lib.rs\"\n\n\
         [dependencies]\ntunebook = {{ path = {library} }}\n"
    );
    fs::write(dir.join("keep/Cargo.toml"), manifest).map_err(io)?;
    template::link_artifacts(layout, &workspace.context().join("target")).map_err(io)?;
    Ok(workspace)
}
