//! Runs notebooks without a front end, strictly: a cell that went wrong in any way fails the notebook.
//!
//! A cell fails on an error reply or an error output, on anything at all on standard error, on a time-out, on the death of the
//! kernel. A cell tagged `raises-exception` fails when it does not fail. A notebook without code fails. Stock evcxr answers
//! "ok" to a panic, a failing `?` and a failing `assert!`, which show on standard error alone: so the rule about it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Client, Silence};
use crate::template::Layout;
use crate::wire::Message;
use crate::{install, stock};

/// What `run` was asked.
pub struct Options {
    pub notebooks: Vec<PathBuf>,
    /// Where executed notebooks go.
    pub out: PathBuf,
    /// Under stock evcxr.
    pub stock: bool,
    /// For one cell.
    pub timeout: Duration,
    /// For the start of a kernel.
    pub start_timeout: Duration,
    /// Keep the outputs in notebooks that passed.
    pub save: bool,
}

/// Output on standard error travels beside the reply, under stock evcxr: the reply can win by this much.
const GRACE: Duration = Duration::from_millis(300);
const SHOWN_LINES: usize = 40;

/// A cell, or the notebook as a whole, went wrong.
struct Failed {
    cell: Option<usize>,
    source: String,
    message: String,
}

/// Runs all; whether all passed.
///
/// # Errors
/// What prevents any from running.
pub fn run(options: &Options, layout: &Layout) -> Result<bool, String> {
    let mut names: Vec<_> = options.notebooks.iter().map(|p| p.file_stem().unwrap_or_default()).collect();
    names.sort();
    if names.windows(2).any(|w| w[0] == w[1]) {
        return Err("two notebooks of the same name would overwrite each other's output".into());
    }
    if options.stock {
        stock::prepare(layout)?;
    } else {
        install::library(layout)?;
    }
    let passed = options.notebooks.iter().filter(|path| run_one(path, options, layout)).count();
    println!("{passed} passed, {} failed", options.notebooks.len() - passed);
    Ok(passed == options.notebooks.len())
}

fn run_one(path: &Path, options: &Options, layout: &Layout) -> bool {
    println!("{}", path.display());
    let began = Instant::now();
    let mut notebook = None;
    let result = read(path).and_then(|mut nb| {
        let result = execute(&mut nb, path, options, layout);
        notebook = Some(nb);
        result
    });
    if let Some(nb) = &notebook
        && let Err(message) = save(nb, path, options, layout)
    {
        println!("{}: not saved: {message}", path.display());
        return false;
    }
    let seconds = began.elapsed().as_secs_f64();
    match result {
        Ok(()) => {
            println!("ok {} ({seconds:.1} s)", path.display());
            match (options.save, notebook) {
                (true, Some(nb)) => save_in_place(nb, path),
                _ => true,
            }
        }
        Err(failed) => {
            println!("FAIL {} ({seconds:.1} s)", path.display());
            println!("--- {}{}", path.display(), failed.cell.map_or_else(String::new, |i| format!(", cell {i}")));
            failed.source.lines().for_each(|l| println!("    | {l}"));
            let message = without_colours(&failed.message);
            let lines: Vec<&str> = message.trim().lines().collect();
            lines.iter().take(SHOWN_LINES).for_each(|l| println!("    {l}"));
            if lines.len() > SHOWN_LINES {
                println!("    ... {} more lines", lines.len() - SHOWN_LINES);
            }
            false
        }
    }
}

fn whole(message: impl Into<String>) -> Failed {
    Failed { cell: None, source: String::new(), message: message.into() }
}

fn read(path: &Path) -> Result<Value, Failed> {
    let text = fs::read_to_string(path).map_err(|e| whole(format!("{}: {e}", path.display())))?;
    let nb: Value = serde_json::from_str(&text).map_err(|e| whole(format!("{}: {e}", path.display())))?;
    if nb["nbformat"] != 4 || !nb["cells"].is_array() {
        return Err(whole(format!("{}: expected a notebook of format 4", path.display())));
    }
    Ok(nb)
}

/// A notebook's text is a string or a list of lines.
fn text_of(v: &Value) -> String {
    match v {
        Value::Array(lines) => lines.iter().filter_map(Value::as_str).collect(),
        other => other.as_str().unwrap_or_default().to_owned(),
    }
}

fn execute(nb: &mut Value, path: &Path, options: &Options, layout: &Layout) -> Result<(), Failed> {
    let cells = nb["cells"].as_array_mut().ok_or_else(|| whole("no cells"))?;
    let mut code = 0;
    for cell in cells.iter_mut().filter(|c| c["cell_type"] == "code") {
        cell["outputs"] = json!([]);
        cell["execution_count"] = Value::Null;
        code += usize::from(!text_of(&cell["source"]).trim().is_empty());
    }
    if code == 0 {
        return Err(whole("no code cells"));
    }
    let began = Instant::now();
    let mut command = if options.stock { stock::kernel(layout) } else { own_kernel(layout) }.map_err(whole)?;
    let directory = fs::canonicalize(path).ok().and_then(|p| p.parent().map(Path::to_owned)).unwrap_or_default();
    command.current_dir(directory);
    let mut kernel = Client::start(command, options.start_timeout).map_err(whole)?;
    println!("  start {:8.2} s", began.elapsed().as_secs_f64());
    let result = cells.iter_mut().enumerate().filter(|(_, c)| c["cell_type"] == "code").try_for_each(|(i, cell)| {
        let source = text_of(&cell["source"]);
        if source.trim().is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let message = run_cell(&mut kernel, cell, &source, options);
        let first: String = source.trim().lines().next().unwrap_or_default().chars().take(80).collect();
        println!("  [{i:3}] {:8.2} s  {first}", began.elapsed().as_secs_f64());
        match message {
            Some(message) => Err(Failed { cell: Some(i), source, message }),
            None => Ok(()),
        }
    });
    kernel.shut_down();
    result
}

/// This program as a kernel, but for the connection file.
fn own_kernel(layout: &Layout) -> Result<Command, String> {
    let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
    command.arg("kernel").arg("--target").arg(&layout.target);
    Ok(command)
}

/// Runs a cell and keeps its outputs; what is wrong with it, if anything is.
fn run_cell(kernel: &mut Client, cell: &mut Value, source: &str, options: &Options) -> Option<String> {
    let content = json!({
        "code": source, "silent": false, "store_history": true, "user_expressions": {}, "allow_stdin": false,
        "stop_on_error": false,
    });
    let id = kernel.send_shell("execute_request", content);
    let until = Instant::now() + options.timeout;
    let (mut reply, mut idle): (Option<Value>, Option<Instant>) = (None, None);
    let mut outputs = Outputs::default();
    loop {
        let wait = match (&reply, idle) {
            // Ours says that it is idle after everything else.
            (_, Some(_)) if !options.stock => Duration::from_millis(1),
            (Some(_), Some(_)) => GRACE,
            _ => Duration::from_millis(50),
        };
        match kernel.receive_iopub(wait) {
            Ok(m) if m.parent["msg_id"] == id.as_str() => {
                if m.kind() == "status" && m.content["execution_state"] == "idle" {
                    idle = Some(Instant::now());
                }
                outputs.take(&m);
                continue;
            }
            Ok(_) => continue,
            Err(Silence::Dead(how)) => return judge(cell, outputs, None, Some(format!("the kernel died: {how}"))),
            Err(Silence::Timeout) if reply.is_some() && idle.is_some() => break,
            Err(Silence::Timeout) => {}
        }
        if reply.is_none()
            && let Ok(m) = kernel.receive_shell(Duration::from_millis(1))
            && m.parent["msg_id"] == id.as_str()
        {
            reply = Some(m.content);
        }
        if Instant::now() > until {
            let message = format!("not finished after {} s", options.timeout.as_secs());
            return judge(cell, outputs, None, Some(message));
        }
    }
    judge(cell, outputs, reply, None)
}

fn judge(cell: &mut Value, outputs: Outputs, reply: Option<Value>, fatal: Option<String>) -> Option<String> {
    let errors = outputs.all.iter().filter(|o| o["output_type"] == "error");
    let mut wrong: Vec<String> = errors
        .map(|o| {
            let lines: Vec<&str> = o["traceback"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            if lines.is_empty() {
                format!("{}: {}", text_of(&o["ename"]), text_of(&o["evalue"]))
            } else {
                lines.join("\n")
            }
        })
        .collect();
    if wrong.is_empty()
        && let Some(reply) = reply.filter(|r| r["status"] != "ok")
    {
        wrong.push(format!("the reply's status is {}. {}", text_of(&reply["status"]), text_of(&reply["evalue"])));
    }
    let stderr: String = outputs.all.iter().filter(|o| o["name"] == "stderr").map(|o| text_of(&o["text"])).collect();
    if !stderr.is_empty() {
        wrong.push(format!("on stderr:\n{stderr}"));
    }
    let expected = cell["metadata"]["tags"].as_array().is_some_and(|t| t.iter().any(|t| t == "raises-exception"));
    cell["execution_count"] = outputs.count;
    cell["outputs"] = Value::Array(outputs.all);
    match (fatal, expected) {
        (Some(fatal), _) => Some(fatal),
        (None, true) if wrong.is_empty() => Some("tagged raises-exception, but nothing went wrong".into()),
        (None, true) => None,
        (None, false) => (!wrong.is_empty()).then(|| wrong.join("\n")),
    }
}

/// Outputs of a cell, as notebooks store them.
#[derive(Default)]
struct Outputs {
    all: Vec<Value>,
    ids: Vec<(String, usize)>,
    count: Value,
}

impl Outputs {
    fn take(&mut self, m: &Message) {
        let c = &m.content;
        match m.kind() {
            "execute_input" => self.count = c["execution_count"].clone(),
            "stream" => {
                let text = text_of(&c["text"]);
                match self.all.last_mut().filter(|o| o["output_type"] == "stream" && o["name"] == c["name"]) {
                    Some(last) => last["text"] = json!(text_of(&last["text"]) + &text),
                    None => self.all.push(json!({"output_type": "stream", "name": c["name"], "text": text})),
                }
            }
            "display_data" => {
                if let Some(id) = c["transient"]["display_id"].as_str() {
                    self.ids.push((id.to_owned(), self.all.len()));
                }
                self.all.push(json!({"output_type": "display_data", "data": c["data"], "metadata": c["metadata"]}));
            }
            "update_display_data" => {
                let id = c["transient"]["display_id"].as_str().unwrap_or_default();
                for (_, i) in self.ids.iter().filter(|(known, _)| known == id) {
                    self.all[*i]["data"] = c["data"].clone();
                }
            }
            "execute_result" => self.all.push(json!({
                "output_type": "execute_result", "data": c["data"], "metadata": c["metadata"],
                "execution_count": c["execution_count"],
            })),
            "error" => self.all.push(json!({
                "output_type": "error", "ename": c["ename"], "evalue": c["evalue"], "traceback": c["traceback"],
            })),
            "clear_output" => self.all.clear(),
            _ => {}
        }
    }
}

/// Writes the executed notebook and its HTML.
fn save(nb: &Value, path: &Path, options: &Options, layout: &Layout) -> Result<(), String> {
    let io = |e: std::io::Error| format!("{}: {e}", options.out.display());
    fs::create_dir_all(&options.out).map_err(io)?;
    let name = path.file_stem().unwrap_or_default();
    let to = options.out.join(name).with_extension("ipynb");
    fs::write(&to, pretty(nb)).map_err(io)?;
    let python = install::python(layout);
    if !python.is_file() {
        return Err(format!(
            "{} is missing, which makes the HTML: run the command `lab` or `install` first",
            python.display()
        ));
    }
    let output = Command::new(python)
        .args(["-m", "nbconvert", "--log-level=WARN", "--to", "html"])
        .arg(&to)
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Keeps the outputs in the notebook itself, without what differs from run to run.
fn save_in_place(mut nb: Value, path: &Path) -> bool {
    for cell in nb["cells"].as_array_mut().into_iter().flatten().filter(|c| c["cell_type"] == "code") {
        cell["execution_count"] = Value::Null;
        for output in cell["outputs"].as_array_mut().into_iter().flatten() {
            if output["output_type"] == "execute_result" {
                output["execution_count"] = Value::Null;
            }
        }
    }
    fs::write(path, pretty(&nb)).inspect_err(|e| println!("{}: {e}", path.display())).is_ok()
}

/// As Jupyter writes notebooks: texts as lists of lines, keys in order, one space of indentation.
fn pretty(nb: &Value) -> String {
    let mut nb = nb.clone();
    let lines = |v: &mut Value| {
        if let Some(text) = v.as_str() {
            *v = text.split_inclusive('\n').collect();
        }
    };
    // Cells of text have no outputs, and get none.
    let cells = nb["cells"].as_array_mut().into_iter().flatten();
    for output in cells.filter_map(|cell| cell.get_mut("outputs")?.as_array_mut()).flatten() {
        if output["output_type"] == "stream" {
            lines(&mut output["text"]);
        }
        output.get_mut("data").and_then(Value::as_object_mut).into_iter().flatten().for_each(|(_, data)| lines(data));
    }
    nb.sort_all_objects();
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    serde::Serialize::serialize(&nb, &mut serializer).expect("a value is JSON");
    out.push(b'\n');
    String::from_utf8(out).expect("JSON is UTF-8")
}

fn without_colours(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\x1b' {
            out.push(c);
        } else if chars.next() == Some('[') {
            chars.by_ref().find(|c| c.is_ascii_alphabetic());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notebook_is_written_as_jupyter_writes_it() {
        let result = json!({
            "output_type": "execute_result", "data": {"text/plain": "1\n2"}, "metadata": {}, "execution_count": null,
        });
        let stream = json!({"output_type": "stream", "name": "stdout", "text": "a\n"});
        let nb = json!({"nbformat": 4, "cells": [
            {"cell_type": "markdown", "source": [], "metadata": {}},
            {"source": [], "cell_type": "code", "outputs": [result, stream]},
        ]});
        let text = pretty(&nb);
        let again: Value = serde_json::from_str(&text).unwrap();
        let [words, code] = again["cells"].as_array().unwrap().as_slice() else { panic!("{text}") };
        assert!(words.get("outputs").is_none(), "{text}");
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&code["outputs"][0]), ["data", "execution_count", "metadata", "output_type"]);
        assert_eq!(code["outputs"][0]["data"]["text/plain"], json!(["1\n", "2"]));
        assert!(code["outputs"][1].get("data").is_none(), "{text}");
        assert!(text.starts_with("{\n \"cells\": [\n") && text.ends_with("}\n"), "{text}");
    }
}
