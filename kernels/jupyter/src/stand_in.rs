//! This program in the place of cargo and rustup, for evcxr and the rust-analyzer in it.
//!
//! evcxr runs `cargo build` for each cell, which looks at hundreds of dependencies before it calls rustc. Here rustc is called
//! at once, with the library's shared object; cargo itself is run only for dependencies that a cell adds. Questions whose
//! answers are known are answered from the template.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::template::{self, Layout, Template};
use crate::toolchain::FLAGS;
use crate::{env, link, metadata, source};

/// The file in a workspace that says that values are shown by evcxr's own means.
pub const PLAIN: &str = "plain";
/// The link in a workspace to its template.
pub const TEMPLATE: &str = "template";
/// Set by evcxr: the file into which the path of the compiled object goes.
const OBJECT_PATH_FILE: &str = "EVCXR_EXECUTION_SO_PATH";

/// The stand-in's own exit code, as rustc's for errors.
const FAILED: u8 = 101;

/// Runs as `rustup` or `cargo`.
pub fn run(name: &str, args: &[String]) -> ExitCode {
    let result = match (name, Session::open()) {
        ("rustup", Some(session)) => session.rustup(args),
        (_, Some(session)) => session.cargo(args),
        (_, None) => Err("this program stands in for cargo in a kernel only".into()),
    };
    match result {
        Ok(code) => code,
        Err(message) => {
            // In cargo's form: evcxr shows what it can parse.
            println!("{}", json!({"reason": "compiler-message", "message": diagnostic(&message)}));
            eprintln!("error: {message}");
            ExitCode::from(FAILED)
        }
    }
}

fn diagnostic(message: &str) -> Value {
    json!({"message": message, "level": "error", "spans": [], "children": [], "code": null, "rendered": message})
}

/// The optimisation level in evcxr's manifest before the first cell with a `let`: until then rust-analyzer is told of the cell's
/// crate alone. Reading the standard library takes it seconds, and no cell without variables asks for a type. When the
/// manifest changes, evcxr lets it load everything anew.
pub const UNREAD: &str = "0 # types are unread";

/// The kernel on whose behalf it runs.
struct Session {
    dir: PathBuf,
    template: Template,
    layout: Layout,
}

/// What a cell is compiled against.
struct Externs {
    /// Name of each crate and its file.
    crates: Vec<(String, PathBuf)>,
    /// Where the crates that these depend on are.
    deps: Vec<PathBuf>,
    /// [`Template::stub`], where it takes the toolkit's place.
    stub: Option<PathBuf>,
}

/// Bytes of source, indentation aside, up to which a cell is compiled as a whole: to keep for the next cell what does not change takes longer
/// than it saves.
const WHOLE: usize = 12 << 10;

impl Session {
    fn open() -> Option<Session> {
        let dir = PathBuf::from(std::env::var_os(env::SESSION)?);
        let template = Template::load(&fs::canonicalize(dir.join(TEMPLATE)).ok()?)?;
        // <target>/tunebook-kernel/sessions/<this>
        let target = dir.ancestors().nth(3)?.to_owned();
        Some(Session { dir, template, layout: Layout { target, ..Layout::here() } })
    }

    fn rustup(&self, args: &[String]) -> Result<ExitCode, String> {
        let toolchain = &self.template.toolchain;
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        match args[..] {
            ["which", "cargo"] => println!("{}", self.layout.cargo_home().join("bin/cargo").display()),
            ["which", "rustc"] => println!("{}", toolchain.rustc.display()),
            _ => return hand_over(template_command("rustup").args(args)),
        }
        Ok(ExitCode::SUCCESS)
    }

    fn cargo(&self, args: &[String]) -> Result<ExitCode, String> {
        let toolchain = &self.template.toolchain;
        let has = |what: &str| args.iter().any(|a| a == what);
        let after = |what: &str| args.iter().skip_while(|a| *a != what).nth(1);
        let command = args.iter().find(|a| !a.starts_with('-')).map(String::as_str).unwrap_or_default();
        match command {
            _ if has("--version") => println!("{}", toolchain.cargo_version),
            "locate-project" => println!("{}", json!({"root": after("--manifest-path")})),
            "rustc" if after("--print").is_some_and(|p| p == "cfg") => println!("{}", toolchain.cfg),
            "rustc" if after("--print").is_some_and(|p| p == "target-spec-json") => {
                println!("{}", toolchain.target_spec)
            }
            // rust-analyzer asks cargo for its configuration, and does without.
            "unstable-options" if has("config") => return Ok(ExitCode::FAILURE),
            "config" => return Ok(ExitCode::FAILURE),
            "metadata" => return self.metadata(after("--manifest-path").map(Path::new), has("--no-deps")),
            "build" => return self.build(),
            "check" => return self.compile(&["--emit=metadata"], None),
            "clean" => {}
            _ => return hand_over(toolchain.cargo_command().args(args)),
        }
        Ok(ExitCode::SUCCESS)
    }

    /// With a manifest it is rust-analyzer that asks, without one evcxr.
    fn metadata(&self, manifest: Option<&Path>, no_deps: bool) -> Result<ExitCode, String> {
        let context = self.dir.join("ctx");
        let answer = match manifest {
            Some(m) if m.starts_with(&context) => {
                let own = self.own_dependencies()?;
                let base =
                    if own.is_empty() { self.read_template("metadata.json")? } else { self.full_metadata(&own)? };
                let mut answer = metadata::at(base, &context);
                if no_deps {
                    let root = answer["workspace_members"][0].clone();
                    if let Some(all) = answer["packages"].as_array_mut() {
                        all.retain(|p| p["id"] == root);
                    }
                    answer["resolve"] = Value::Null;
                }
                answer
            }
            Some(m) if m.starts_with(&self.template.toolchain.sysroot) => self.sysroot_metadata(m, no_deps)?,
            Some(m) => metadata::ask(&self.template.toolchain, m.parent().unwrap_or(Path::new(".")))?,
            // Of a new dependency, or of the crates that `extern crate` may name.
            None => {
                let own = self.own_dependencies()?;
                let dir = self.dir.join("check");
                self.write_workspace(&dir, &own)?;
                metadata::ask(&self.template.toolchain, &dir)?
            }
        };
        let unread = || fs::read_to_string(context.join("Cargo.toml")).is_ok_and(|text| text.contains(UNREAD));
        let answer = if manifest.is_some() && unread() { metadata::of_root(answer) } else { answer };
        println!("{answer}");
        Ok(ExitCode::SUCCESS)
    }

    fn read_template(&self, name: &str) -> Result<Value, String> {
        let path = self.template.dir.join(name);
        let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn full_metadata(&self, own: &[Dependency]) -> Result<Value, String> {
        let dir = self.dir.join("deps");
        self.write_workspace(&dir, own)?;
        let full = metadata::ask(&self.template.toolchain, &dir)?;
        let names: Vec<String> = own.iter().map(|d| d.name.clone()).collect();
        Ok(metadata::for_analysis(&full, &self.template.dir.join("source"), &self.layout.repository, &names))
    }

    /// The same for every session of a toolchain: kept beside the template.
    fn sysroot_metadata(&self, manifest: &Path, no_deps: bool) -> Result<Value, String> {
        let name = if no_deps { "sysroot-no-deps.json" } else { "sysroot.json" };
        if let Ok(known) = self.read_template(name) {
            return Ok(known);
        }
        let toolchain = &self.template.toolchain;
        let mut command = toolchain.cargo_command();
        // Without its dependencies, which are not on this machine and need not be.
        command.args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path"]).arg(manifest);
        // The manifests of the standard library use unstable features.
        command.env("__CARGO_TEST_CHANNEL_OVERRIDE_DO_NOT_USE_THIS", "nightly").env("RUSTC_BOOTSTRAP", "1");
        let output = command.output().map_err(|e| e.to_string())?;
        let full: Value = serde_json::from_slice(&output.stdout)
            .map_err(|e| format!("{e}: {}", String::from_utf8_lossy(&output.stderr)))?;
        let answer = metadata::of_sysroot(full, no_deps);
        let _ = fs::write(self.template.dir.join(name), answer.to_string());
        Ok(answer)
    }

    /// Dependencies in the manifest that evcxr wrote, but for the library as the kernel has it.
    fn own_dependencies(&self) -> Result<Vec<Dependency>, String> {
        let path = self.dir.join("ctx/Cargo.toml");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(Vec::new()) };
        let manifest: toml::Table = text.parse().map_err(|e| format!("{}: {e}", path.display()))?;
        let mut own = Vec::new();
        for (name, value) in manifest.get("dependencies").and_then(toml::Value::as_table).into_iter().flatten() {
            let library = name == "tunebook"
                && value.as_table().is_some_and(|t| {
                    let path = t.get("path").and_then(toml::Value::as_str).map(Path::new);
                    t.len() == 1 && path.is_some_and(|p| fs::canonicalize(p).is_ok_and(|p| p == self.layout.repository))
                });
            if !library {
                own.push(Dependency { name: name.clone(), value: value.to_string() });
            }
        }
        own.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(own)
    }

    fn write_workspace(&self, dir: &Path, own: &[Dependency]) -> Result<(), String> {
        template::prepare_workspace(&self.layout)?;
        let more: String = own.iter().map(|d| format!("{} = {}\n", d.name, d.value)).collect();
        template::write_manifest(dir, &self.layout, &more)?;
        let lock = dir.join("Cargo.lock");
        if !lock.exists() {
            // The library's dependencies in the versions that are compiled.
            fs::copy(self.template.dir.join("Cargo.lock"), &lock).map_err(|e| format!("{}: {e}", lock.display()))?;
        }
        Ok(())
    }

    fn build(&self) -> Result<ExitCode, String> {
        let out = self.dir.join("ctx/out");
        fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
        let code = self.compile(&["--emit=link"], Some(&out))?;
        if code == ExitCode::SUCCESS
            && let Some(file) = std::env::var_os(OBJECT_PATH_FILE)
        {
            let object = out.join("libctx.so");
            fs::write(&file, object.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
        }
        Ok(code)
    }

    /// Compiles the cell that evcxr wrote.
    fn compile(&self, emit: &[&str], out: Option<&Path>) -> Result<ExitCode, String> {
        let _group = Group::start(&self.dir)?;
        let externs = self.externs()?;
        let context = self.dir.join("ctx");
        let written = context.join("src/lib.rs");
        let code = fs::read_to_string(&written).map_err(|e| format!("{}: {e}", written.display()))?;
        let cell = context.join("cell");
        fs::create_dir_all(&cell).map_err(|e| e.to_string())?;
        let code = source::with_toolkit(&code, self.dir.join(PLAIN).exists());
        fs::write(cell.join("lib.rs"), &code).map_err(|e| e.to_string())?;

        let mut rustc = template_command(&self.template.toolchain.rustc);
        rustc.current_dir(&context).args(["--crate-name", "ctx", "--edition=2024", "cell/lib.rs"]);
        rustc.args(["--error-format=json", "--crate-type=cdylib", FLAGS, "-Cpanic=unwind", "-Cdebuginfo=0"]);
        // Not shown by evcxr.
        rustc.arg("-Awarnings");
        rustc.args(emit).arg("--out-dir").arg(out.unwrap_or(&cell));
        rustc.arg(format!("-Copt-level={}", self.opt_level()));
        // One object file: a cell is too small to be shared out.
        rustc.arg("-Ccodegen-units=1");
        if code.lines().map(|line| line.trim().len()).sum::<usize>() > WHOLE {
            rustc.arg(format!("-Cincremental={}", context.join("incremental").display()));
        }
        if let Some(stub) = &externs.stub {
            // Needed, although it has no symbol that the cell refers to.
            rustc.arg("-Clink-arg=-Wl,--no-as-needed").arg(format!("-Clink-arg={}", stub.display()));
        }
        for (name, file) in &externs.crates {
            rustc.arg("--extern").arg(format!("{name}={}", file.display()));
        }
        for dir in &externs.deps {
            rustc.arg("-L").arg(format!("dependency={}", dir.display()));
        }
        run_rustc(&mut rustc, &code)
    }

    /// `:opt` of evcxr writes it into the manifest. The default is the fastest to compile.
    fn opt_level(&self) -> String {
        let text = fs::read_to_string(self.dir.join("ctx/Cargo.toml")).unwrap_or_default();
        let manifest: toml::Table = text.parse().unwrap_or_default();
        manifest
            .get("profile")
            .and_then(|p| p.get("dev")?.get("opt-level").cloned())
            .map_or_else(|| "0".to_owned(), |v| v.to_string().trim_matches('"').to_owned())
    }

    fn externs(&self) -> Result<Externs, String> {
        let own = self.own_dependencies()?;
        if own.is_empty() {
            let Template { toolkit, stub, library, dir, .. } = &self.template;
            let toolkit = ("tunebook_toolkit".to_owned(), stub.as_ref().unwrap_or(toolkit).clone());
            let library = ("tunebook".to_owned(), library.clone());
            return Ok(Externs { crates: vec![toolkit, library], deps: vec![dir.join("deps")], stub: stub.clone() });
        }
        let key: String = own.iter().map(|d| format!("{} = {}\n", d.name, d.value)).collect();
        let key: String = Sha256::digest(key).iter().take(8).map(|b| format!("{b:02x}")).collect();
        let known = self.dir.join("deps").join(format!("externs-{key}.json"));
        let v: Value = match fs::read(&known).ok().and_then(|b| serde_json::from_slice(&b).ok()) {
            Some(v) => v,
            None => {
                let v = self.build_dependencies(&own)?;
                fs::write(&known, v.to_string()).map_err(|e| format!("{}: {e}", known.display()))?;
                v
            }
        };
        let crates = v["crates"].as_object().into_iter().flatten();
        let crates = crates.filter_map(|(name, file)| Some((name.clone(), PathBuf::from(file.as_str()?)))).collect();
        let deps = v["deps"].as_array().into_iter().flatten().filter_map(|d| d.as_str().map(PathBuf::from)).collect();
        Ok(Externs { crates, deps, stub: None })
    }

    /// Compiles what cells have added, beside what the library is made of, which is there already.
    fn build_dependencies(&self, own: &[Dependency]) -> Result<Value, String> {
        let dir = self.dir.join("deps");
        self.write_workspace(&dir, own)?;
        let target = dir.join("target");
        let host = &self.template.toolchain.host;
        if !target.exists() {
            template::link_artifacts(&self.layout, &target).map_err(|e| format!("{}: {e}", target.display()))?;
        }
        let mut cargo = self.template.toolchain.cargo_command();
        cargo.current_dir(&dir).args(["build", "--message-format=json", "--target", host]);
        cargo.env("CARGO_TARGET_DIR", &target);
        cargo.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = cargo.spawn().map_err(|e| format!("cargo: {e}"))?;
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let told = std::thread::spawn(move || {
            let mut progress = Progress::connect();
            let mut lines = Vec::new();
            for line in stderr.lines().map_while(Result::ok) {
                progress.say(&line);
                lines.push(line);
            }
            progress.end();
            lines
        });
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let messages: Vec<String> = stdout.lines().map_while(Result::ok).collect();
        let lines = told.join().unwrap_or_default();
        if !child.wait().map_err(|e| e.to_string())?.success() {
            let first = lines.iter().position(|l| l.starts_with("error")).unwrap_or(0);
            return Err(lines[first..].join("\n"));
        }
        // Under which name the crate sees each package.
        let full = metadata::ask(&self.template.toolchain, &dir)?;
        let root = &full["workspace_members"][0];
        let node = full["resolve"]["nodes"].as_array().into_iter().flatten().find(|n| n["id"] == *root);
        let artifacts = template::artifacts(&messages);
        let mut crates = serde_json::Map::new();
        for dep in node.and_then(|n| n["deps"].as_array()).into_iter().flatten() {
            let (Some(name), Some(package)) = (dep["name"].as_str(), dep["pkg"].as_str()) else { continue };
            let mut files = artifacts.iter().filter(|a| a.package == package).flat_map(|a| &a.files);
            let best = files.clone().find(|f| f.extension().is_some_and(|e| e == "rlib"));
            let file = best.or_else(|| files.find(|f| f.extension().is_some_and(|e| e == "so")));
            if let Some(file) = file {
                crates.insert(name.to_owned(), json!(template::hashed(file)));
            }
        }
        let deps = [target.join(host).join("debug/deps"), target.join("debug/deps")];
        // The library that this process's cells are linked with already is that of the template; the files are the same.
        Ok(json!({"crates": crates, "deps": deps}))
    }
}

struct Dependency {
    name: String,
    /// As TOML.
    value: String,
}

/// The process group of a compilation, which an interrupt ends.
struct Group(PathBuf);

impl Group {
    fn start(session: &Path) -> Result<Group, String> {
        // SAFETY: this process becomes the leader of a new group, with the compilers that it starts.
        unsafe { libc::setpgid(0, 0) };
        let file = session.join(link::COMPILING);
        fs::write(&file, std::process::id().to_string()).map_err(|e| format!("{}: {e}", file.display()))?;
        let group = Group(file);
        if session.join(link::STOP).exists() {
            return Err("interrupted".into());
        }
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Tells the kernel what is compiled.
struct Progress {
    stream: Option<UnixStream>,
    count: usize,
    began: std::time::Instant,
}

impl Progress {
    fn connect() -> Progress {
        let socket =
            std::env::var_os(env::SESSION).and_then(|s| fs::read_to_string(Path::new(&s).join(link::SOCKET)).ok());
        let mut stream = socket.and_then(|path| UnixStream::connect(path).ok());
        if let Some(s) = &mut stream {
            let _ = writeln!(s, "build {}", std::process::id());
        }
        Progress { stream, count: 0, began: std::time::Instant::now() }
    }

    fn say(&mut self, line: &str) {
        let Some(what) = line.trim_start().strip_prefix("Compiling ") else { return };
        self.count += 1;
        let what = what.split(" (").next().unwrap_or(what);
        self.write(&format!("compiling dependencies: {what} ({}, {} s)", self.count, self.began.elapsed().as_secs()));
    }

    fn end(&mut self) {
        if self.count > 0 {
            self.write(&format!("{} dependencies compiled in {} s", self.count, self.began.elapsed().as_secs()));
        }
    }

    fn write(&mut self, line: &str) {
        if let Some(s) = &mut self.stream {
            let _ = writeln!(s, "{line}");
        }
    }
}

/// A program in the user's own environment.
fn template_command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    crate::toolchain::user_command(program)
}

/// Runs rustc on a cell as [`hand_over`] does; what it says is [made fit for evcxr](fit_for_evcxr).
fn run_rustc(rustc: &mut Command, source: &str) -> Result<ExitCode, String> {
    let mut child = rustc.stderr(Stdio::piped()).spawn().map_err(|e| format!("rustc: {e}"))?;
    let said = BufReader::new(child.stderr.take().expect("piped"));
    for line in said.lines().map_while(Result::ok) {
        match serde_json::from_str::<Value>(&line) {
            Ok(message) => eprintln!("{}", fit_for_evcxr(message, source)),
            Err(_) => eprintln!("{line}"),
        }
    }
    child.wait().map(exit_code).map_err(|e| format!("rustc: {e}"))
}

/// evcxr corrects the code that it has generated by the lines that an error points at, and takes two kinds of them wrongly.
///
/// Advice to bring the toolkit's trait into scope points at a line of the user's: it would be shown as the user's error. A variable
/// that the cell's last expression moves cannot be kept; the error points at that expression too, so evcxr would show its value
/// by `Debug`, and not as the value shows itself.
fn fit_for_evcxr(mut message: Value, source: &str) -> Value {
    let own = |c: &Value| c["message"].as_str().is_some_and(|m| m.starts_with("trait `Shown` which provides"));
    if let Some(children) = message["children"].as_array_mut() {
        children.retain(|c| !own(c));
    }
    let keeps_variable = |span: &Value| {
        let line = span["line_start"].as_u64().and_then(|n| source.lines().nth((n as usize).checked_sub(1)?));
        span["is_primary"] == true && line.is_some_and(|l| l.starts_with("evcxr_variable_store.put_variable"))
    };
    if message["code"]["code"] == "E0382" && message["spans"].as_array().is_some_and(|s| s.iter().any(keeps_variable)) {
        if let Some(spans) = message["spans"].as_array_mut() {
            spans.retain(|s| s["is_primary"] == true);
        }
        message["children"] = json!([]);
    }
    message
}

/// Runs a program with this one's streams, and ends as it does.
fn hand_over(command: &mut Command) -> Result<ExitCode, String> {
    let program = command.get_program().display().to_string();
    command.status().map(exit_code).map_err(|e| format!("{program}: {e}"))
}

fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    match status.code() {
        Some(0) => ExitCode::SUCCESS,
        Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(FAILED)),
        None => ExitCode::from(FAILED),
    }
}
