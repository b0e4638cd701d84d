//! Runs cells, one after the other, and answers what needs to know them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evcxr::{CommandContext, Error, EvalContext, EvalOutputs};
use serde_json::{Value, json};

use crate::link::{Link, Report, Seen};
use crate::output::Bundle;
use crate::publisher::Publisher;
use crate::source::{self, Place};
use crate::stand_in::{PLAIN, TEMPLATE, UNREAD};
use crate::syntax;
use crate::template::{Layout, Template};
use crate::traceback::Failure;
use crate::workspace::Workspace;
use crate::{env, history};

/// The first cell of each session, which the user does not see: afterwards cells that use `?` are compiled once, not twice.
const FIRST_CELL: &str = "Ok::<(), String>(())?;";

/// evcxr with the process of its cells.
pub struct Evaluator {
    context: CommandContext,
    link: Arc<Link>,
    publisher: Publisher,
    workspace: PathBuf,
    layout: Layout,
    /// Keeps the template in use.
    _template: std::fs::File,
    /// Cells that were executed, for places in errors.
    cells: Vec<(Option<u64>, String)>,
    /// Whether rust-analyzer has been told of the standard library and ours.
    knows_types: bool,
    pub history: history::History,
    pub execution_count: u64,
}

/// How a cell ended.
pub enum Outcome {
    Ok,
    Failed(Failure),
}

impl Evaluator {
    /// Starts evcxr in a workspace, with the library as it is now; compiles the library first when its sources have changed.
    ///
    /// # Errors
    /// No toolchain, a library that does not compile, a process that does not start.
    pub fn start(
        layout: &Layout,
        workspace: &Workspace,
        link: &Arc<Link>,
        publisher: &Publisher,
    ) -> Result<Evaluator, String> {
        let template = match Template::find(layout)? {
            Ok(template) => template,
            Err(_) => rebuild(layout, publisher)?,
        };
        let lock = template.lock().map_err(|e| format!("{}: {e}", template.dir.display()))?;
        let to = workspace.dir().join(TEMPLATE);
        std::os::unix::fs::symlink(&template.dir, &to).map_err(|e| format!("{}: {e}", to.display()))?;
        // evcxr tries itself with a cell of its own, whose value is nobody's.
        link.start_cell(false, true);
        let context = start_evcxr(&template, link, publisher)?;
        link.end_cell(false);
        let mut evaluator = Evaluator {
            context,
            link: link.clone(),
            publisher: publisher.clone(),
            workspace: workspace.dir().to_owned(),
            layout: layout.clone(),
            _template: lock,
            cells: Vec::new(),
            knows_types: false,
            history: history::History::default(),
            execution_count: 0,
        };
        if let Outcome::Failed(f) = evaluator.run(FIRST_CELL, true).0 {
            return Err(f.traceback.join("\n"));
        }
        Ok(evaluator)
    }

    /// Answers an `execute_request`: output on iopub, the reply's content.
    pub fn execute(&mut self, content: &Value) -> Value {
        let code = content["code"].as_str().unwrap_or_default();
        let silent = content["silent"].as_bool().unwrap_or(false);
        let store = content["store_history"].as_bool().unwrap_or(true) && !silent;
        if store {
            self.history.push(self.execution_count, code);
        }
        self.cells.push((Some(self.execution_count), code.to_owned()));
        let (outcome, _) = self.run(code, false);
        match outcome {
            Outcome::Ok => {
                let expressions = self.user_expressions(&content["user_expressions"]);
                json!({
                    "status": "ok", "execution_count": self.execution_count,
                    "user_expressions": expressions, "payload": [],
                })
            }
            Outcome::Failed(f) => {
                let error = json!({"ename": f.name, "evalue": f.value, "traceback": f.traceback});
                if !silent {
                    self.publisher.send("error", error.clone());
                }
                let mut reply = error;
                reply["status"] = json!("error");
                reply["execution_count"] = json!(self.execution_count);
                reply
            }
        }
    }

    fn user_expressions(&mut self, expressions: &Value) -> Value {
        let mut out = serde_json::Map::new();
        for (name, code) in expressions.as_object().into_iter().flatten() {
            let (outcome, displays) = self.run(code.as_str().unwrap_or_default(), true);
            let value = match outcome {
                Outcome::Ok => {
                    let data = displays.into_iter().next_back().unwrap_or_default();
                    json!({"status": "ok", "data": data, "metadata": {}})
                }
                Outcome::Failed(f) => {
                    json!({"status": "error", "ename": f.name, "evalue": f.value, "traceback": f.traceback})
                }
            };
            out.insert(name.clone(), value);
        }
        Value::Object(out)
    }

    /// Runs code. `capture`: its displays are returned and not shown.
    fn run(&mut self, code: &str, capture: bool) -> (Outcome, Vec<Bundle>) {
        let code = source::without_own_dep(code, &self.layout.repository);
        if source::sets_format(&code) {
            let _ = std::fs::write(self.workspace.join(PLAIN), "");
        }
        if syntax::may_define_variables(&code) {
            self.learn_types();
        }
        self.link.start_cell(syntax::ends_in_expression(&code), capture);
        let result = catch_unwind(AssertUnwindSafe(|| self.context.execute(&code)));
        let died = matches!(&result, Ok(Err(Error::SubprocessTerminated(_))));
        let mut seen = self.link.end_cell(died);
        let captured = std::mem::take(&mut seen.captured);
        let outcome = match result {
            Ok(result) => self.judge(result, seen, &code, capture),
            Err(panic) => {
                let message = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).into()));
                Outcome::Failed(Failure::new(
                    "InternalError",
                    format!("evcxr stopped at this cell: {}; the next cell can be run", message.unwrap_or_default()),
                ))
            }
        };
        (outcome, captured)
    }

    /// From the next cell or question on, rust-analyzer knows what it may be asked for.
    fn learn_types(&mut self) {
        // `:opt` of the user has the same effect: the level is no longer that of the start.
        let asked = |(_, code): &(Option<u64>, String)| code.lines().any(|l| l.trim_start().starts_with(":opt"));
        if !self.knows_types && !self.cells.iter().any(asked) {
            let _ = self.context.set_opt_level("0");
            // evcxr writes it for a cell, and not before a question.
            let manifest = self.workspace.join("ctx/Cargo.toml");
            if let Ok(text) = std::fs::read_to_string(&manifest) {
                let _ = std::fs::write(&manifest, text.replace(UNREAD, "0"));
            }
        }
        self.knows_types = true;
    }

    fn judge(&mut self, result: Result<EvalOutputs, Error>, seen: Seen, code: &str, capture: bool) -> Outcome {
        let cell = (!capture).then_some(self.execution_count);
        match result {
            Ok(outputs) => {
                if let Some(report) = &seen.panic {
                    return Outcome::Failed(Failure::panic(report, self.place(report).as_ref()));
                }
                if let Some(report) = &seen.error {
                    return Outcome::Failed(Failure::question_mark(report, self.place(report).as_ref()));
                }
                if !outputs.is_empty() && !capture {
                    self.publisher.result(json!(outputs.content_by_mime_type));
                }
                if seen.interrupts > 0 {
                    return Outcome::Failed(Failure::new(
                        "Interrupted",
                        "the cell was interrupted; all variables are kept",
                    ));
                }
                Outcome::Ok
            }
            Err(_) if seen.interrupts > 0 && !seen.killed => {
                Outcome::Failed(Failure::new("Interrupted", "interrupted before the cell ran; all variables are kept"))
            }
            Err(Error::CompilationErrors(errors)) => Outcome::Failed(Failure::compilation(&errors, cell, code)),
            Err(Error::SubprocessTerminated(_)) if seen.killed => Outcome::Failed(Failure::new(
                "Interrupted",
                "the cell did not answer the first interrupt and was killed: all variables are lost, definitions are kept. \
                 A training run goes on from its last checkpoint with Run::resume(\"its directory\")?",
            )),
            Err(Error::SubprocessTerminated(why)) => Outcome::Failed(crashed(&why, seen.panic.as_ref())),
            Err(Error::TypeRedefinedVariablesLost(names)) => Outcome::Failed(Failure::new(
                "error",
                format!(
                    "the type of these variables was defined anew, so they are lost: {}; run the cell again",
                    names.join(", ")
                ),
            )),
            Err(other) => Outcome::Failed(Failure::new("error", other.to_string())),
        }
    }

    fn place(&self, report: &Report) -> Option<Place> {
        if !report.file.ends_with("cell/lib.rs") {
            return None;
        }
        let generated = std::fs::read_to_string(self.workspace.join("ctx/cell/lib.rs")).ok()?;
        source::locate(&generated, report.line, &self.cells)
    }

    /// Content of a `complete_reply`.
    pub fn complete(&mut self, content: &Value) -> Value {
        self.learn_types();
        let code = content["code"].as_str().unwrap_or_default();
        let position = content["cursor_pos"].as_u64().map_or(code.chars().count(), |p| p as usize);
        let byte = syntax::byte_of(code, position);
        let found = catch_unwind(AssertUnwindSafe(|| self.context.completions(code, byte)));
        let Ok(Ok(found)) = found else {
            return json!({
                "status": "ok", "matches": [], "cursor_start": position, "cursor_end": position, "metadata": {},
            });
        };
        let start = syntax::character_of(code, found.start_offset);
        let end = syntax::character_of(code, found.end_offset);
        let (mut matches, mut types) = (Vec::new(), Vec::new());
        for c in &found.completions {
            // rust-analyzer fills in arguments; a name is what the user completes.
            let text = match c.kind {
                "function" => c.code.split('(').next().unwrap_or(&c.code),
                _ => c.code.as_str(),
            };
            if text.is_empty() || text.contains(['$', '\n']) || matches.iter().any(|m| m == text) {
                continue;
            }
            matches.push(text.to_owned());
            types.push(json!({"text": text, "type": c.kind, "start": start, "end": end, "signature": c.label}));
        }
        json!({
            "status": "ok", "matches": matches, "cursor_start": start, "cursor_end": end,
            "metadata": {"_jupyter_types_experimental": types},
        })
    }

    /// Content of an `inspect_reply`.
    pub fn inspect(&mut self, content: &Value) -> Value {
        self.learn_types();
        let code = content["code"].as_str().unwrap_or_default();
        let position = content["cursor_pos"].as_u64().map_or(code.chars().count(), |p| p as usize);
        let byte = syntax::byte_of(code, position);
        let end = syntax::end_of_name(code, byte);
        let name = syntax::name_at(code, byte);
        let own = self.context.variables_and_types().find(|(n, _)| *n == name).map(|(n, t)| format!("{n}: {t}"));
        let found = catch_unwind(AssertUnwindSafe(|| self.context.hover_at(code, end)));
        let data = match found {
            Ok(Ok((plain, html))) if !plain.starts_with("No documentation found") => {
                Some(json!({"text/plain": plain, "text/html": html}))
            }
            _ => own.map(|o| json!({"text/plain": o})),
        };
        json!({
            "status": "ok", "found": data.is_some(), "data": data.unwrap_or_else(|| json!({})), "metadata": {},
        })
    }

    /// Lets rust-analyzer look at the standard library and ours before the user's first `let` needs it.
    pub fn warm_up(&mut self) {
        self.learn_types();
        let code =
            "let plan = tunebook::plan::MemoryPlan::qlora(&tunebook::model::ModelSpec::preset(\"\").unwrap()); plan.";
        let _ = catch_unwind(AssertUnwindSafe(|| self.context.completions(code, code.len())));
    }
}

/// The process that ran the cell is gone.
fn crashed(why: &str, panic: Option<&Report>) -> Failure {
    let how = why.split_once("terminated with status: ").map_or(why, |(_, how)| how).trim();
    let hint = if how.contains("SIGKILL") {
        " (killed: often the system was out of memory)"
    } else if how.contains("SIGABRT") {
        " (aborted: standard error says why)"
    } else {
        ""
    };
    let mut value =
        format!("the process of the cells ended with {how}{hint}: all variables are lost, definitions are kept");
    if let Some(p) = panic {
        value += &format!("; last panic: {}", p.message);
    }
    Failure::new("Crashed", value)
}

fn rebuild(layout: &Layout, publisher: &Publisher) -> Result<Template, String> {
    let began = Instant::now();
    let id = format!("library-{}", uuid::Uuid::new_v4());
    let text = |what: &str| json!({"text/plain": format!("the library has changed: {what} ({} s)", began.elapsed().as_secs())});
    publisher.display(text("compiling"), Some(&id));
    let mut last = Instant::now();
    let mut progress = |line: &str| {
        if last.elapsed() > Duration::from_millis(200) {
            publisher.update_display(&id, text(line));
            last = Instant::now();
        }
    };
    let template = Template::build(layout, Some(&mut progress))?;
    publisher.update_display(&id, text("compiled"));
    Ok(template)
}

fn start_evcxr(template: &Template, link: &Arc<Link>, publisher: &Publisher) -> Result<CommandContext, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut child = Command::new(program);
    child.env(env::LINK, link.socket()).env(env::TOOLKIT, &template.toolkit);
    // The toolkit finds the standard library by a path relative to where it was linked, and it was moved.
    let mut libraries = vec![template.toolchain.libdir.clone()];
    libraries.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    child.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).map_err(|e| e.to_string())?);
    let (context, outputs) = EvalContext::with_subprocess_command(child).map_err(|e| e.to_string())?;
    for (name, receiver) in [("stdout", outputs.stdout), ("stderr", outputs.stderr)] {
        let publisher = publisher.clone();
        std::thread::spawn(move || receiver.iter().for_each(|line| publisher.stream(name, &format!("{line}\n"))));
    }
    let mut context = CommandContext::with_eval_context(context);
    // Whatever is installed: the stand-in chooses.
    context.execute(":linker system").map_err(|e| e.to_string())?;
    Ok(context)
}

/// The environment in which evcxr works. Called before any thread exists.
pub fn set_environment(layout: &Layout, workspace: &Workspace) -> Result<(), String> {
    let bin = layout.cargo_home().join("bin");
    let io = |e: std::io::Error| format!("{}: {e}", bin.display());
    std::fs::create_dir_all(&bin).map_err(io)?;
    let program = std::env::current_exe().map_err(io)?;
    for name in ["cargo", "rustup"] {
        replace_link(&program, &bin.join(name)).map_err(io)?;
    }
    // Speed of compilation is all that counts for a cell; `:opt 2` is for those that loop themselves.
    let config = layout.home().join("evcxr");
    std::fs::create_dir_all(&config).map_err(io)?;
    std::fs::write(config.join("evcxr.toml"), format!("[evcxr]\nopt_level = \"{UNREAD}\"\n")).map_err(io)?;

    // SAFETY: no other thread runs yet.
    unsafe {
        for (name, saved) in env::REPLACED {
            if let Some(value) = std::env::var_os(name) {
                std::env::set_var(saved, value);
            }
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(bin).chain(std::env::split_paths(&path));
        std::env::set_var("PATH", std::env::join_paths(paths).map_err(|e| e.to_string())?);
        std::env::set_var("CARGO_HOME", layout.cargo_home());
        std::env::set_var("EVCXR_TMPDIR", workspace.context());
        std::env::set_var("EVCXR_CONFIG_DIR", config);
        std::env::set_var(env::SESSION, workspace.dir());
        std::env::set_var(env::REPOSITORY, &layout.repository);
        for name in ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTC_WRAPPER", "EVCXR_IS_RUNTIME"] {
            std::env::remove_var(name);
        }
    }
    Ok(())
}

fn replace_link(to: &Path, at: &Path) -> std::io::Result<()> {
    if std::fs::read_link(at).is_ok_and(|l| l == to) {
        return Ok(());
    }
    let new = at.with_extension(format!("new-{}", std::process::id()));
    let _ = std::fs::remove_file(&new);
    std::os::unix::fs::symlink(to, &new)?;
    std::fs::rename(new, at)
}
