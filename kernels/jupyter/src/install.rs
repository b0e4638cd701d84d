//! From a fresh machine to a kernel that Jupyter finds: the Python environment, the library for cells, the kernel's spec.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::template::{Layout, Template};
use crate::toolchain::{Toolchain, user_command};

/// Where the kernel's spec goes.
pub enum Place {
    /// The environment that `lab` makes.
    Environment,
    /// The user's own Jupyter directory.
    User,
    /// `DIR/share/jupyter`.
    Prefix(PathBuf),
}

/// Notebooks name it; stock evcxr's is called so too, and they open with either.
const NAME: &str = "rust";
/// In the spec's `metadata`: this program wrote it, and may replace and remove it.
const MARKER: &str = "tunebook-kernel";
const LOGO: &str = include_str!("logo.svg");

/// The Python environment with JupyterLab.
pub fn environment(layout: &Layout) -> PathBuf {
    std::env::var_os("TUNEBOOK_VENV").map_or_else(|| layout.repository.join(".venv"), PathBuf::from)
}

/// Its Python.
pub fn python(layout: &Layout) -> PathBuf {
    environment(layout).join("bin/python")
}

/// The command `install`.
///
/// # Errors
/// What is missing, with the command that installs it.
pub fn install(layout: &Layout, place: &Place) -> Result<(), String> {
    check_machine(layout)?;
    if matches!(place, Place::Environment) {
        python_environment(layout)?;
    }
    library(layout)?;
    let dir = spec_dir(layout, place)?;
    ours_or_nothing(place, &dir)?;
    write_spec(layout, &dir)?;
    println!("install: the kernel {NAME:?} in {}", dir.display());
    Ok(())
}

/// The command `uninstall`.
///
/// # Errors
/// A spec that another program has written; a directory that cannot be removed.
pub fn uninstall(layout: &Layout, place: &Place) -> Result<(), String> {
    let dir = spec_dir(layout, place)?;
    if !dir.exists() {
        println!("uninstall: nothing in {}", dir.display());
        return Ok(());
    }
    ours_or_nothing(place, &dir)?;
    fs::remove_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    println!("uninstall: removed {}", dir.display());
    Ok(())
}

/// The command `lab`: installs what is missing, and becomes JupyterLab.
///
/// # Errors
/// As [`install`].
pub fn lab(layout: &Layout, arguments: &[String]) -> Result<(), String> {
    install(layout, &Place::Environment)?;
    settings(&environment(layout).join("share/jupyter/lab/settings"));
    let mut jupyter = Command::new(environment(layout).join("bin/jupyter"));
    jupyter.arg("lab").arg(format!("--notebook-dir={}", layout.repository.join("notebooks").display()));
    // SAFETY: no arguments, no failure.
    if unsafe { libc::geteuid() } == 0 {
        // JupyterLab refuses to run as root unless told so; in a container there is often nobody else.
        jupyter.arg("--allow-root");
    }
    Err(format!("jupyter lab: {}", jupyter.args(arguments).exec()))
}

/// No question about news over the first notebook, and no look for newer versions of what is pinned here. Settings that are there already stay.
fn settings(dir: &Path) {
    let quiet =
        json!({"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}});
    let file = dir.join("overrides.json");
    if !file.exists() {
        // JupyterLab works without, and asks.
        let _ = fs::create_dir_all(dir).and_then(|()| fs::write(file, quiet.to_string()));
    }
}

/// Compiles the library for cells, if it is not.
///
/// # Errors
/// What does not compile.
pub fn library(layout: &Layout) -> Result<Template, String> {
    if let Ok(template) = Template::find(layout)? {
        return Ok(template);
    }
    let began = Instant::now();
    println!(
        "install: compiling the library for cells (about 8 minutes on 2 cores the first time, later what has changed)"
    );
    let template = Template::build(layout, None)?;
    println!("install: the library is ready ({} s)", began.elapsed().as_secs());
    Ok(template)
}

fn check_machine(layout: &Layout) -> Result<(), String> {
    if layout.target.to_string_lossy().contains(char::is_whitespace) {
        return Err(format!(
            "evcxr cannot work below a path with spaces: {}; set CARGO_TARGET_DIR",
            layout.target.display()
        ));
    }
    if !on_path("cc") {
        return Err("no C linker: run 'apt install build-essential'".into());
    }
    let (_, _, sysroot) = Toolchain::find(&layout.repository)?;
    if !sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        // Types of variables are found by reading the standard library's source.
        println!("install: the source of the standard library (rustup component add rust-src)");
        let status =
            user_command("rustup").args(["component", "add", "rust-src"]).current_dir(&layout.repository).status();
        if !status.is_ok_and(|s| s.success()) {
            return Err("the standard library's source is missing: run 'rustup component add rust-src'".into());
        }
    }
    Ok(())
}

pub(crate) fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn python_environment(layout: &Layout) -> Result<(), String> {
    let venv = environment(layout);
    let wanted = layout.repository.join("binder/requirements.txt");
    let stamp = venv.join(".tunebook-requirements");
    let wanted_text = fs::read_to_string(&wanted).map_err(|e| format!("{}: {e}", wanted.display()))?;
    if fs::read_to_string(&stamp).is_ok_and(|t| t == wanted_text) && python(layout).is_file() {
        return Ok(());
    }
    let began = Instant::now();
    let run = |command: &mut Command, otherwise: &str| match command.status() {
        Ok(s) if s.success() => Ok(()),
        _ => Err(otherwise.to_owned()),
    };
    if !python(layout).is_file() {
        run(
            Command::new("python3").args(["-m", "venv"]).arg(&venv),
            "python3 cannot make environments: run 'apt install python3 python3-venv'",
        )?;
    }
    println!("install: JupyterLab in {}", venv.display());
    run(
        Command::new(python(layout))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
            .arg(&wanted),
        "pip could not install JupyterLab; its message is above",
    )?;
    fs::write(&stamp, wanted_text).map_err(|e| format!("{}: {e}", stamp.display()))?;
    println!("install: JupyterLab is ready ({} s)", began.elapsed().as_secs());
    Ok(())
}

fn spec_dir(layout: &Layout, place: &Place) -> Result<PathBuf, String> {
    let jupyter = match place {
        Place::Environment => environment(layout).join("share/jupyter"),
        Place::Prefix(prefix) => prefix.join("share/jupyter"),
        Place::User => {
            let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
            var("JUPYTER_DATA_DIR")
                .or_else(|| var("XDG_DATA_HOME").map(|d| d.join("jupyter")))
                .or_else(|| var("HOME").map(|d| d.join(".local/share/jupyter")))
                .ok_or("HOME is not set; use --prefix")?
        }
    };
    Ok(jupyter.join("kernels").join(NAME))
}

/// A spec that somebody else has put there stays. The environment that `lab` makes is ours as a whole.
fn ours_or_nothing(place: &Place, dir: &Path) -> Result<(), String> {
    if matches!(place, Place::Environment) {
        return Ok(());
    }
    let Ok(text) = fs::read_to_string(dir.join("kernel.json")) else { return Ok(()) };
    let spec: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    if spec["metadata"][MARKER].is_string() {
        return Ok(());
    }
    Err(format!("{} belongs to another kernel; move it away, or use --prefix", dir.display()))
}

fn write_spec(layout: &Layout, dir: &Path) -> Result<(), String> {
    let io = |e: std::io::Error| format!("{}: {e}", dir.display());
    let program = std::env::current_exe().map_err(io)?;
    fs::create_dir_all(dir).map_err(io)?;
    let spec = json!({
        "argv": [program, "kernel", "--target", layout.target, "{connection_file}"],
        "display_name": "Rust",
        "language": "rust",
        "interrupt_mode": "message",
        "metadata": {"debugger": false, MARKER: env!("CARGO_PKG_VERSION")},
    });
    let text = serde_json::to_string_pretty(&spec).expect("a value is JSON");
    // A server that is reading the old one sees it whole.
    let new = dir.join("kernel.json.new");
    fs::write(&new, text + "\n").map_err(io)?;
    fs::rename(new, dir.join("kernel.json")).map_err(io)?;
    fs::write(dir.join("logo-svg.svg"), LOGO).map_err(io)
}
