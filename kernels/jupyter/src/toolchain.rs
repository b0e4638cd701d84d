//! The Rust toolchain that compiles cells: the one that compiles the library.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::env;

/// Flags of all that a cell is linked with.
pub const FLAGS: &str = "-Cprefer-dynamic";

/// Programs and answers of the toolchain. Asked once, kept in the template: each question costs 20 to 100 ms.
#[derive(Clone, Debug)]
pub struct Toolchain {
    pub rustc: PathBuf,
    pub cargo: PathBuf,
    pub sysroot: PathBuf,
    /// Target triple of this machine.
    pub host: String,
    /// Where the standard library's shared object is.
    pub libdir: PathBuf,
    /// `rustc -vV`.
    pub version: String,
    /// `cargo --version`.
    pub cargo_version: String,
    /// `rustc --print cfg -O`.
    pub cfg: String,
    /// `rustc --print target-spec-json`.
    pub target_spec: String,
}

impl Toolchain {
    /// The programs that the user's `rustc` stands for in the repository, and nothing more.
    ///
    /// # Errors
    /// No Rust on the path.
    pub fn find(repository: &Path) -> Result<(PathBuf, PathBuf, PathBuf), String> {
        let sysroot = PathBuf::from(ask(user_command("rustc").args(["--print", "sysroot"]).current_dir(repository))?);
        let tool = |name: &str| {
            let own = sysroot.join("bin").join(name);
            if own.is_file() { own } else { PathBuf::from(name) }
        };
        Ok((tool("rustc"), tool("cargo"), sysroot))
    }

    /// Asks all questions.
    ///
    /// # Errors
    /// No Rust, or one that gives no answer.
    pub fn ask(repository: &Path) -> Result<Toolchain, String> {
        let (rustc, cargo, sysroot) = Toolchain::find(repository)?;
        let rust = |args: &[&str]| ask(Command::new(&rustc).args(args).env("RUSTC_BOOTSTRAP", "1"));
        let version = rust(&["-vV"])?;
        let host = version
            .lines()
            .find_map(|l| l.strip_prefix("host: "))
            .ok_or_else(|| format!("{} -vV names no host", rustc.display()))?
            .to_owned();
        Ok(Toolchain {
            libdir: rust(&["--print", "target-libdir"])?.into(),
            cargo_version: ask(Command::new(&cargo).arg("--version"))?,
            cfg: rust(&["--print", "cfg", "-O"])?,
            target_spec: rust(&["-Z", "unstable-options", "--print", "target-spec-json"])?,
            rustc,
            cargo,
            sysroot,
            host,
            version,
        })
    }

    pub fn to_json(&self) -> Value {
        json!({
            "rustc": self.rustc, "cargo": self.cargo, "sysroot": self.sysroot, "host": self.host, "libdir": self.libdir,
            "version": self.version, "cargo_version": self.cargo_version, "cfg": self.cfg, "target_spec": self.target_spec,
        })
    }

    pub fn from_json(v: &Value) -> Option<Toolchain> {
        let text = |name: &str| v[name].as_str().map(str::to_owned);
        Some(Toolchain {
            rustc: text("rustc")?.into(),
            cargo: text("cargo")?.into(),
            sysroot: text("sysroot")?.into(),
            host: text("host")?,
            libdir: text("libdir")?.into(),
            version: text("version")?,
            cargo_version: text("cargo_version")?,
            cfg: text("cfg")?,
            target_spec: text("target_spec")?,
        })
    }

    /// The real cargo, as the library is built: the user's environment, this toolchain.
    pub fn cargo_command(&self) -> Command {
        let mut c = user_command(&self.cargo);
        // The flags of .cargo/config.toml, which is found twice when the target directory is in the repository, and lists add up.
        c.env("RUSTC", &self.rustc).env("RUSTFLAGS", FLAGS);
        c
    }
}

/// A program with the environment of the kernel's start, without what would change the compiled artifacts.
pub fn user_command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut c = Command::new(program);
    for (name, saved) in env::REPLACED {
        match std::env::var_os(saved) {
            Some(value) => c.env(name, value),
            None if std::env::var_os(env::SESSION).is_some() => c.env_remove(name),
            None => &mut c,
        };
    }
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "CARGO_TARGET_DIR", "CARGO_BUILD_BUILD_DIR", "CARGO", "RUSTC"] {
        c.env_remove(name);
    }
    c
}

fn ask(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().display().to_string();
    let output = command.output().map_err(|e| format!("{program}: {e}; install Rust from https://rustup.rs"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
