//! The library, compiled for cells: one shared object with all that it depends on, and what rustc and rust-analyzer read.
//!
//! It is built once, with the flags, the profile and into the target directory of `cargo test`, so that dependencies are
//! compiled once for all. Kernels use it where it is, read-only; it is named by a fingerprint of what it was made from.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::toolchain::{FLAGS, Toolchain, user_command};
use crate::workspace::{How, clone_tree};
use crate::{link_stub, metadata};

/// Where things are.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The repository.
    pub repository: PathBuf,
    /// cargo's target directory.
    pub target: PathBuf,
}

impl Layout {
    /// The repository that this program was compiled from, and the target directory that it was compiled into.
    pub fn here() -> Layout {
        let repository = std::env::var_os(crate::env::REPOSITORY)
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), PathBuf::from);
        let repository = fs::canonicalize(&repository).unwrap_or(repository);
        // <target>/<host>/release/tunebook-kernel
        let own = std::env::current_exe().ok().and_then(|p| Some(p.ancestors().nth(3)?.to_owned()));
        let own = own.filter(|dir| dir.join("CACHEDIR.TAG").is_file());
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from).or(own).unwrap_or_else(|| "target".into());
        Layout { target: repository.join(target), repository }
    }

    /// What belongs to kernels in the target directory.
    pub fn home(&self) -> PathBuf {
        self.target.join("tunebook-kernel")
    }

    pub fn sessions(&self) -> PathBuf {
        self.home().join("sessions")
    }

    /// A `CARGO_HOME` in whose `bin` this program stands in for cargo and rustup.
    pub fn cargo_home(&self) -> PathBuf {
        self.home().join("cargo")
    }

    pub fn toolkit_crate(&self) -> PathBuf {
        self.repository.join("kernels/jupyter/toolkit")
    }
}

/// The directory in a template of what cells are linked with.
const STUB: &str = "link";

/// A finished template.
#[derive(Clone, Debug)]
pub struct Template {
    pub dir: PathBuf,
    pub toolchain: Toolchain,
    /// The shared object.
    pub toolkit: PathBuf,
    /// What cells are linked with in its place, where it could be made: see [`link_stub`].
    pub stub: Option<PathBuf>,
    /// The library's metadata, for rustc.
    pub library: PathBuf,
}

impl Template {
    /// The one that fits the sources and the toolchain as they are now.
    ///
    /// # Errors
    /// No Rust; sources that cannot be read.
    pub fn find(layout: &Layout) -> Result<Result<Template, String>, String> {
        let fingerprint = fingerprint(layout)?;
        let dir = layout.home().join("templates").join(&fingerprint);
        Ok(Template::load(&dir).ok_or(fingerprint))
    }

    /// Reads a template.
    pub fn load(dir: &Path) -> Option<Template> {
        let v: Value = serde_json::from_slice(&fs::read(dir.join("template.json")).ok()?).ok()?;
        let toolchain = Toolchain::from_json(&v["toolchain"])?;
        let file = |name: &str| v[name].as_str().map(|f| dir.join("deps").join(f)).filter(|f| f.is_file());
        let (toolkit, library) = (file("toolkit")?, file("library")?);
        let stub = dir.join(STUB).join(toolkit.file_name()?);
        let stub = stub.is_file().then_some(stub);
        Some(Template { dir: dir.to_owned(), toolchain, toolkit, stub, library })
    }

    /// Keeps the template from being removed as long as the file lives.
    ///
    /// # Errors
    /// A directory that was removed meanwhile.
    pub fn lock(&self) -> std::io::Result<File> {
        let file = File::open(self.dir.join("template.json"))?;
        flock(&file, libc::LOCK_SH)?;
        Ok(file)
    }

    /// Builds it. `progress` gets cargo's lines; `None` leaves them to the terminal.
    ///
    /// # Errors
    /// What does not compile; a full disk.
    pub fn build(layout: &Layout, mut progress: Option<&mut dyn FnMut(&str)>) -> Result<Template, String> {
        let io = |e: std::io::Error| format!("{}: {e}", layout.home().display());
        let toolchain = Toolchain::ask(&layout.repository)?;
        fs::create_dir_all(layout.home()).map_err(io)?;
        let guard = File::create(layout.home().join(".build-lock")).map_err(io)?;
        flock(&guard, libc::LOCK_EX).map_err(io)?;
        // Another kernel may have built it while this one waited.
        let fingerprint = match Template::find(layout)? {
            Ok(template) => return Ok(template),
            Err(fingerprint) => fingerprint,
        };
        let workspace = layout.home().join("build");
        prepare_workspace(layout)?;
        write_manifest(&workspace, layout, "")?;
        fs::copy(layout.repository.join("Cargo.lock"), workspace.join("Cargo.lock")).map_err(io)?;

        let messages = compile(layout, &toolchain, &workspace, &mut progress)?;
        if let Some(template) = Template::assemble(layout, &toolchain, &workspace, &fingerprint, &messages)? {
            return Ok(template);
        }
        // Another clone of the repository has this target directory too: the shared object has one name for both.
        let mut clean = toolchain.cargo_command();
        clean.current_dir(&workspace).args(["clean", "--quiet", "-p", "tunebook-toolkit", "--target", &toolchain.host]);
        clean.env("CARGO_TARGET_DIR", &layout.target).status().map_err(|e| format!("cargo clean: {e}"))?;
        let messages = compile(layout, &toolchain, &workspace, &mut progress)?;
        Template::assemble(layout, &toolchain, &workspace, &fingerprint, &messages)?.ok_or_else(|| {
            let target = layout.target.display();
            format!("what is compiled in {target} does not fit together: remove that directory, or set CARGO_TARGET_DIR to another")
        })
    }

    /// Puts together what cargo has made; `None` when it does not fit together.
    fn assemble(
        layout: &Layout,
        toolchain: &Toolchain,
        workspace: &Path,
        fingerprint: &str,
        messages: &[String],
    ) -> Result<Option<Template>, String> {
        let io = |e: std::io::Error| format!("{}: {e}", layout.home().display());
        let templates = layout.home().join("templates");
        fs::create_dir_all(&templates).map_err(io)?;
        let new = tempfile::Builder::new().prefix(".new-").tempdir_in(&templates).map_err(io)?;
        let deps = new.path().join("deps");
        fs::create_dir(&deps).map_err(io)?;
        let (mut toolkit, mut library) = (None, None);
        for artifact in artifacts(messages) {
            for file in artifact.files.iter().filter(|f| is_artifact(f)) {
                // Next to the artifact with a hash in its name there may be a link without.
                let file = hashed(file);
                let name = file.file_name().unwrap_or_default().to_owned();
                let to = deps.join(&name);
                if !to.exists() && fs::hard_link(&file, &to).is_err() {
                    fs::copy(&file, &to).map_err(|e| format!("{}: {e}", file.display()))?;
                }
                let extension = file.extension().unwrap_or_default();
                match artifact.name.as_str() {
                    "tunebook_toolkit" if extension == "so" => toolkit = Some(name),
                    "tunebook" if extension == "rlib" => library = Some(name),
                    _ => {}
                }
            }
        }
        let found = |what: &str, name: Option<std::ffi::OsString>| {
            name.map(|n| n.to_string_lossy().into_owned()).ok_or_else(|| format!("cargo made no {what}"))
        };
        let toolkit = found("shared object of the toolkit", toolkit)?;
        let library = found("library", library)?;
        if !agree(toolchain, &deps, &toolkit, &library)? {
            return Ok(None);
        }
        if let Err(e) = link_stub::write(&deps.join(&toolkit), &new.path().join(STUB)) {
            let _ = fs::remove_dir_all(new.path().join(STUB));
            eprintln!("cells are linked with the whole library, which takes a little longer: {e}");
        }
        let description = json!({
            "toolchain": toolchain.to_json(),
            "toolkit": toolkit,
            "library": library,
        });

        // rust-analyzer reads a copy of the sources: those that were compiled, without a walk through the repository.
        let source = new.path().join("source");
        copy_sources(&layout.repository.join("src"), &source.join("src")).map_err(io)?;
        fs::copy(layout.repository.join("Cargo.toml"), source.join("Cargo.toml")).map_err(io)?;
        let full = metadata::ask(toolchain, workspace)?;
        let dir = templates.join(fingerprint);
        let filtered = metadata::for_analysis(&full, &dir.join("source"), &layout.repository, &[]);
        let write = |name: &str, v: &Value| fs::write(new.path().join(name), v.to_string()).map_err(io);
        write("metadata.json", &filtered)?;
        fs::copy(workspace.join("Cargo.lock"), new.path().join("Cargo.lock")).map_err(io)?;
        write("template.json", &description)?;

        let _ = fs::remove_dir_all(&dir);
        fs::rename(new.keep(), &dir).map_err(io)?;
        remove_others(&templates, fingerprint);
        Template::load(&dir).map(Some).ok_or_else(|| format!("{}: the template is incomplete", dir.display()))
    }
}

/// Lets cargo compile the workspace: its messages.
fn compile(
    layout: &Layout,
    toolchain: &Toolchain,
    workspace: &Path,
    progress: &mut Option<&mut dyn FnMut(&str)>,
) -> Result<Vec<String>, String> {
    let mut command = toolchain.cargo_command();
    command.current_dir(workspace).args(["build", "--message-format=json-render-diagnostics"]);
    command.args(["--target", &toolchain.host]);
    command.env("CARGO_TARGET_DIR", &layout.target).stdout(Stdio::piped());
    if progress.is_some() {
        command.stderr(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|e| format!("{}: {e}", toolchain.cargo.display()))?;
    let stdout = BufReader::new(child.stdout.take().expect("piped"));
    let messages = std::thread::spawn(move || stdout.lines().map_while(Result::ok).collect::<Vec<String>>());
    let mut said = Vec::new();
    if let (Some(stderr), Some(progress)) = (child.stderr.take(), progress.as_mut()) {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            progress(line.trim());
            said.push(line);
        }
    }
    let messages = messages.join().map_err(|_| "reading cargo's messages failed".to_owned())?;
    if !child.wait().map_err(|e| format!("{}: {e}", toolchain.cargo.display()))?.success() {
        let Some(first) = said.iter().position(|l| l.starts_with("error")) else {
            return Err("the library does not compile; cargo's message is above".into());
        };
        return Err(format!("the library does not compile:\n{}", said[first..].join("\n")));
    }
    Ok(messages)
}

/// Whether rustc takes the shared object and the library for parts of one compilation.
fn agree(toolchain: &Toolchain, deps: &Path, toolkit: &str, library: &str) -> Result<bool, String> {
    let io = |e: std::io::Error| format!("{}: {e}", toolchain.rustc.display());
    let dir = tempfile::tempdir().map_err(io)?;
    fs::write(dir.path().join("agree.rs"), "extern crate tunebook_toolkit; extern crate tunebook;").map_err(io)?;
    let mut rustc = user_command(&toolchain.rustc);
    rustc.args(["--crate-type=rlib", "--emit=metadata", "--edition=2024", FLAGS, "agree.rs"]).current_dir(dir.path());
    rustc.arg("-L").arg(format!("dependency={}", deps.display()));
    for (name, file) in [("tunebook_toolkit", toolkit), ("tunebook", library)] {
        rustc.arg("--extern").arg(format!("{name}={}", deps.join(file).display()));
    }
    Ok(rustc.output().map_err(io)?.status.success())
}

/// The directory of workspaces, with the repository's configuration of cargo: a target directory may be elsewhere.
pub fn prepare_workspace(layout: &Layout) -> Result<(), String> {
    let config = layout.home().join(".cargo");
    let io = |e: std::io::Error| format!("{}: {e}", config.display());
    fs::create_dir_all(&config).map_err(io)?;
    let (from, to) = (layout.repository.join(".cargo/config.toml"), config.join("config.toml"));
    if fs::read_link(&to).is_ok_and(|l| l == from) {
        return Ok(());
    }
    let _ = fs::remove_file(&to);
    std::os::unix::fs::symlink(&from, &to).map_err(io)
}

/// A crate that depends on the toolkit, the library, and what `more` says.
pub fn write_manifest(dir: &Path, layout: &Layout, more: &str) -> Result<(), String> {
    let quoted = |p: &Path| toml::Value::from(p.to_string_lossy().into_owned()).to_string();
    let manifest = format!(
        "[package]\nname = \"ctx\"\nversion = \"1.0.0\"\nedition = \"2024\"\n\n[lib]\npath = \"src/lib.rs\"\n\n\
         [workspace]\nresolver = \"3\"\n\n[dependencies]\ntunebook-toolkit = {{ path = {} }}\n{more}",
        quoted(&layout.toolkit_crate()),
    );
    let own = if more.lines().any(|l| l.starts_with("tunebook ")) {
        String::new()
    } else {
        format!("tunebook = {{ path = {} }}\n", quoted(&layout.repository))
    };
    let io = |e: std::io::Error| format!("{}: {e}", dir.display());
    fs::create_dir_all(dir.join("src")).map_err(io)?;
    fs::write(dir.join("src/lib.rs"), "").map_err(io)?;
    fs::write(dir.join("Cargo.toml"), manifest + &own).map_err(io)
}

/// One artifact that cargo reports.
pub struct Artifact {
    /// Name of the crate.
    pub name: String,
    pub package: String,
    pub files: Vec<PathBuf>,
}

/// Those of `cargo build --message-format=json`.
pub fn artifacts(messages: &[String]) -> Vec<Artifact> {
    let one = |line: &String| {
        let v: Value = serde_json::from_str(line).ok()?;
        if v["reason"] != "compiler-artifact" {
            return None;
        }
        let files = v["filenames"].as_array()?.iter().filter_map(|f| f.as_str().map(PathBuf::from)).collect();
        Some(Artifact {
            name: v["target"]["name"].as_str()?.replace('-', "_"),
            package: v["package_id"].as_str()?.to_owned(),
            files,
        })
    };
    messages.iter().filter_map(one).collect()
}

/// What rustc reads.
pub fn is_artifact(file: &Path) -> bool {
    matches!(file.extension().and_then(|e| e.to_str()), Some("rlib" | "rmeta" | "so"))
}

/// For `debug/libx.so`, the file in `debug/deps` with a hash in its name that it is a link to.
pub fn hashed(file: &Path) -> PathBuf {
    let Some(parent) = file.parent().filter(|p| !p.ends_with("deps")) else { return file.to_owned() };
    let (Ok(own), Ok(entries)) = (fs::metadata(file), fs::read_dir(parent.join("deps"))) else {
        return file.to_owned();
    };
    let same = |p: &PathBuf| {
        fs::metadata(p).is_ok_and(|m| (m.ino(), m.dev()) == (own.ino(), own.dev())) && p.extension() == file.extension()
    };
    entries.flatten().map(|e| e.path()).find(same).unwrap_or_else(|| file.to_owned())
}

/// Makes the compiled dependencies those of another target directory, too.
///
/// # Errors
/// A directory that cannot be written.
pub fn link_artifacts(layout: &Layout, target: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(&layout.target)?.flatten() {
        let name = entry.file_name();
        let debug = if name == "debug" { entry.path() } else { entry.path().join("debug") };
        if name == "tunebook-kernel" || !debug.join("deps").is_dir() {
            continue;
        }
        let to = if name == "debug" { target.join("debug") } else { target.join(&name).join("debug") };
        // Programs, tests above all, are large and of no use.
        let deps = |p: &Path| if is_artifact(p) { How::Link } else { How::Skip };
        let build = |p: &Path| if p.extension().is_none() { How::Link } else { How::Copy };
        clone_tree(&debug.join("deps"), &to.join("deps"), &deps)?;
        clone_tree(&debug.join("build"), &to.join("build"), &build)?;
        clone_tree(&debug.join(".fingerprint"), &to.join(".fingerprint"), &|_| How::Copy)?;
    }
    Ok(())
}

/// SHA-256 of all that the compiled library follows from, shortened.
fn fingerprint(layout: &Layout) -> Result<String, String> {
    let (rustc, _, _) = Toolchain::find(&layout.repository)?;
    let mut hash = Sha256::new();
    // What a template consists of.
    hash.update("2");
    hash.update(layout.repository.as_os_str().as_encoded_bytes());
    hash.update(rustc.as_os_str().as_encoded_bytes());
    // The compiler: a new one is a new file.
    let compiler = fs::metadata(&rustc).map_err(|e| format!("{}: {e}", rustc.display()))?;
    // Whole seconds: images of containers keep no more.
    hash.update(format!("{} {}", compiler.len(), compiler.mtime()));
    let mut files: Vec<PathBuf> = ["Cargo.toml", "Cargo.lock", ".cargo/config.toml"].map(PathBuf::from).into();
    for dir in ["src", "kernels/cuda", "kernels/jupyter/toolkit"] {
        list(&layout.repository, Path::new(dir), &mut files)
            .map_err(|e| format!("{}: {e}", layout.repository.join(dir).display()))?;
    }
    files.sort();
    for file in files {
        let content = fs::read(layout.repository.join(&file)).map_err(|e| format!("{}: {e}", file.display()))?;
        hash.update(file.as_os_str().as_encoded_bytes());
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    Ok(hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
}

fn list(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(root.join(dir))? {
        let entry = entry?;
        let path = dir.join(entry.file_name());
        if entry.file_type()?.is_dir() { list(root, &path, files)? } else { files.push(path) }
    }
    Ok(())
}

fn copy_sources(from: &Path, to: &Path) -> std::io::Result<()> {
    clone_tree(from, to, &|_| How::Copy)
}

/// Templates of earlier sources, unless a kernel uses them.
fn remove_others(templates: &Path, keep: &str) {
    for entry in fs::read_dir(templates).into_iter().flatten().flatten() {
        if entry.file_name() == keep {
            continue;
        }
        let unused = match File::open(entry.path().join("template.json")) {
            Ok(file) => flock(&file, libc::LOCK_EX | libc::LOCK_NB).is_ok(),
            Err(_) => true,
        };
        if unused {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn flock(file: &File, operation: i32) -> std::io::Result<()> {
    // SAFETY: a descriptor that is open.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
