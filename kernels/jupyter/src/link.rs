//! The kernel's side of the process that runs the cells: what it prints and shows, in order; why a cell failed; its end.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::output::{Bundle, Decoder, Event, Parser};
use crate::publisher::Publisher;

/// How long what may be a part of something longer waits for its rest.
const QUIET: Duration = Duration::from_millis(20);
/// How long a display waits for the end of its cell, to become the cell's result.
const RESULT: Duration = Duration::from_millis(50);
/// How long the end of a cell waits for what the cell printed, and a mark for its display.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a cell is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// No cell.
    #[default]
    Idle,
    /// Analysed, compiled, or what it printed is collected.
    Preparing,
    /// Its code runs.
    Running,
}

/// Why a cell failed, as the cell said.
#[derive(Clone, Debug)]
pub struct Report {
    /// Of an error that `?` returned; empty for a panic.
    pub type_name: String,
    pub message: String,
    pub file: String,
    pub line: usize,
    pub column: usize,
}

/// What was learnt of a cell while it ran.
#[derive(Default)]
pub struct Seen {
    /// An error that `?` returned.
    pub error: Option<Report>,
    /// The last panic, if the cell did not catch it.
    pub panic: Option<Report>,
    /// Displays, where they were to be collected and not shown.
    pub captured: Vec<Bundle>,
    /// How often it was interrupted.
    pub interrupts: u32,
    /// Whether it was killed because of that.
    pub killed: bool,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// Whether the cell's last display is its result.
    has_result: bool,
    /// Whether displays are collected and not shown.
    capture: bool,
    seen: Seen,
    /// The last panic, which the cell may have caught.
    last_panic: Option<Report>,
    /// Whether a panic ended the cell.
    panicked: bool,
    pid: Option<i32>,
    /// To the process: lines for evcxr.
    relay: Option<UnixStream>,
    /// Displays that came before their mark, by number.
    displays: HashMap<u64, Value>,
    /// Display ids that were shown, and Jupyter's name of each.
    shown: HashMap<String, String>,
    /// Number of the last cell whose end was seen, on standard output and error.
    ended: [u64; 2],
    /// Of the current process: streams at their end.
    closed: [bool; 2],
    /// Counts the processes.
    generation: u64,
    /// Prompt of the next read of standard input.
    prompt: Option<(String, bool)>,
}

/// The connection with the process that runs the cells, through its restarts.
pub struct Link {
    socket: PathBuf,
    _dir: tempfile::TempDir,
    state: Mutex<State>,
    changed: Condvar,
    publisher: Publisher,
    session: PathBuf,
}

impl Link {
    /// Waits for processes on a new socket.
    ///
    /// # Errors
    /// A directory for temporary files that cannot be written.
    pub fn listen(publisher: Publisher, session: &Path) -> std::io::Result<Arc<Link>> {
        // Not in the workspace: the path of a socket is at most 107 bytes long. The directory is the user's alone.
        let dir = tempfile::Builder::new().prefix("tunebook-kernel-").tempdir()?;
        let socket = dir.path().join("link");
        let listener = UnixListener::bind(&socket)?;
        std::fs::write(session.join(SOCKET), socket.as_os_str().as_encoded_bytes())?;
        let link = Arc::new(Link {
            socket,
            _dir: dir,
            state: Mutex::default(),
            changed: Condvar::new(),
            publisher,
            session: session.to_owned(),
        });
        let accepting = link.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let link = accepting.clone();
                std::thread::spawn(move || link.serve(stream));
            }
        });
        Ok(link)
    }

    /// Where processes connect to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Before a cell. `has_result`: whether it ends in an expression; `capture`: whether its displays are collected only.
    pub fn start_cell(&self, has_result: bool, capture: bool) {
        let mut state = self.lock();
        let _ = std::fs::remove_file(self.session.join(STOP));
        state.phase = Phase::Preparing;
        state.has_result = has_result && !capture;
        state.capture = capture;
        state.seen = Seen::default();
        state.last_panic = None;
        state.panicked = false;
    }

    /// After a cell: what was learnt. A panic that the cell caught is told on standard error.
    pub fn end_cell(&self, process_died: bool) -> Seen {
        let mut state = self.lock();
        if process_died {
            let patience = Instant::now() + Duration::from_millis(500);
            while state.closed != [true; 2] && Instant::now() < patience {
                state = self.wait(state, Duration::from_millis(50));
            }
        }
        state.phase = Phase::Idle;
        let _ = std::fs::remove_file(self.session.join(STOP));
        let panic = state.last_panic.take();
        let seen = std::mem::take(&mut state.seen);
        if state.panicked || process_died {
            return Seen { panic, ..seen };
        }
        drop(state);
        if let Some(p) = panic {
            self.publisher.stream("stderr", &format!("a panic was caught: {}\n", p.message));
        }
        seen
    }

    /// Stops what the current cell does: the compiler at once, running code by a signal that the library's loops answer, the
    /// second time by ending the process.
    pub fn interrupt(&self) {
        let mut state = self.lock();
        match state.phase {
            Phase::Idle => {}
            Phase::Preparing => {
                state.seen.interrupts += 1;
                // The stand-in for cargo looks for it when it starts.
                let _ = std::fs::write(self.session.join(STOP), "");
                stop_compiler(&self.session);
            }
            Phase::Running => {
                state.seen.interrupts += 1;
                let signal = if state.seen.interrupts == 1 { libc::SIGINT } else { libc::SIGKILL };
                state.seen.killed |= signal == libc::SIGKILL;
                self.signal(&state, signal);
            }
        }
    }

    /// Ends the process, and a compiler that runs.
    pub fn kill(&self) {
        stop_compiler(&self.session);
        self.signal(&self.lock(), libc::SIGKILL);
    }

    /// The prompt of the next read of standard input.
    pub fn take_prompt(&self) -> (String, bool) {
        self.lock().prompt.take().unwrap_or_default()
    }

    fn signal(&self, state: &State, signal: i32) {
        if let Some(pid) = state.pid {
            // SAFETY: a signal to a process of ours.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    /// One connection; its first line says what it carries.
    fn serve(&self, stream: UnixStream) {
        // Byte by byte: what follows the first line belongs to who serves it.
        let mut hello = Vec::new();
        let mut byte = [0];
        while hello.len() < 64 && matches!((&stream).read(&mut byte), Ok(1)) && byte[0] != b'\n' {
            hello.push(byte[0]);
        }
        let hello = String::from_utf8_lossy(&hello).into_owned();
        let (role, pid) = hello.split_once(' ').unwrap_or((&hello, ""));
        let pid = pid.parse().ok();
        match role {
            "reports" => self.serve_reports(stream, pid),
            "stdout" => self.serve_output(stream, 0, pid),
            "stderr" => self.serve_output(stream, 1, pid),
            "displays" => self.serve_displays(stream),
            "build" => self.serve_build(stream),
            "input" => self.serve_input(stream),
            _ => {}
        }
    }

    fn serve_reports(&self, stream: UnixStream, pid: Option<i32>) {
        {
            let mut state = self.lock();
            state.generation += 1;
            state.pid = pid;
            state.relay = stream.try_clone().ok();
            state.ended = [0; 2];
            state.closed = [false; 2];
            state.displays.clear();
            state.shown.clear();
        }
        self.changed.notify_all();
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { break };
            let Ok(v) = serde_json::from_str::<Value>(&line) else { continue };
            match v["op"].as_str() {
                Some("begin") => {
                    let mut state = self.lock();
                    state.phase = Phase::Running;
                    if state.seen.interrupts > 0 {
                        self.signal(&state, libc::SIGINT);
                    }
                }
                Some("end") => self.end_of_code(v["number"].as_u64().unwrap_or(0)),
                Some("error") => self.lock().seen.error = Some(report(&v)),
                Some("panic") => self.lock().last_panic = Some(report(&v)),
                _ => {}
            }
        }
        let mut state = self.lock();
        if state.pid == pid {
            state.pid = None;
            state.relay = None;
        }
    }

    /// The code of a cell has returned: when all that it printed was seen, evcxr may know.
    fn end_of_code(&self, number: u64) {
        let until = Instant::now() + PATIENCE;
        let mut state = self.lock();
        state.phase = Phase::Preparing;
        while state.ended.iter().any(|n| *n < number) && Instant::now() < until {
            state = self.wait(state, Duration::from_millis(100));
        }
        relay(&mut state, "EVCXR_EXECUTION_COMPLETE");
    }

    /// Standard output (0) or error (1).
    fn serve_output(&self, mut stream: UnixStream, which: usize, pid: Option<i32>) {
        let name = ["stdout", "stderr"][which];
        let (mut parser, mut decoder) = (Parser::default(), Decoder::default());
        let mut held: Option<Bundle> = None;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let timeout = if held.is_some() { Some(RESULT) } else { parser.holds().then_some(QUIET) };
            let (events, more) = match readable(&stream, timeout) {
                false => (parser.quiet(), true),
                true => match stream.read(&mut buffer) {
                    Ok(n) if n > 0 => (parser.feed(&buffer[..n]), true),
                    _ => (parser.finish(), false),
                },
            };
            if events.is_empty()
                && !parser.holds()
                && let Some(bundle) = held.take()
            {
                self.show(bundle, false);
            }
            for event in events {
                if !matches!(event, Event::End(_))
                    && let Some(bundle) = held.take()
                {
                    self.show(bundle, false);
                }
                match event {
                    Event::Text(bytes) => self.publisher.stream(name, &decoder.feed(&bytes)),
                    Event::Display(bundle) => held = Some(bundle),
                    Event::Mark(number) => {
                        self.publisher.stream(name, &decoder.finish());
                        held = self.display(number);
                    }
                    Event::Marker(line) if which == 1 => self.publisher.stream(name, &format!("{line}\n")),
                    Event::Marker(line) => {
                        let mut state = self.lock();
                        // Its report comes by another socket, perhaps later; before the end of the cell it is here.
                        state.panicked |= line == "EVCXR_PANIC_NOTIFICATION";
                        relay(&mut state, &line);
                    }
                    Event::Prompt(prompt, secret) => self.lock().prompt = Some((prompt, secret)),
                    Event::End(number) => {
                        self.publisher.stream(name, &decoder.finish());
                        if let Some(bundle) = held.take() {
                            self.show(bundle, true);
                        }
                        self.lock().ended[which] = number;
                        self.changed.notify_all();
                    }
                }
            }
            if !more {
                break;
            }
        }
        self.publisher.stream(name, &decoder.finish());
        let mut state = self.lock();
        if state.pid.is_none() || state.pid == pid {
            state.closed[which] = true;
            self.changed.notify_all();
        }
    }

    /// The display at this mark; what is to be shown as a new one without an id is returned.
    fn display(&self, number: u64) -> Option<Bundle> {
        let until = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !state.displays.contains_key(&number) && Instant::now() < until {
            state = self.wait(state, Duration::from_millis(100));
        }
        let v = state.displays.remove(&number)?;
        if let Some(op @ ("clear_output" | "clear_output_later")) = v["op"].as_str() {
            // What is shown from now on is new.
            state.shown.clear();
            drop(state);
            self.publisher.send("clear_output", json!({"wait": op == "clear_output_later"}));
            return None;
        }
        let data: Bundle = serde_json::from_value(v["data"].clone()).unwrap_or_default();
        if state.capture {
            state.seen.captured.push(data);
            return None;
        }
        let Some(id) = v["id"].as_str() else { return Some(data) };
        let known = state.shown.get(id).cloned();
        if v["op"] == "clear" {
            let name = known?;
            state.shown.remove(id);
            drop(state);
            self.publisher.update_display(&name, json!({"text/plain": ""}));
            return None;
        }
        match known {
            Some(name) => {
                drop(state);
                self.publisher.update_display(&name, json!(data));
            }
            None => {
                let name = format!("{id}-{}", uuid::Uuid::new_v4());
                state.shown.insert(id.to_owned(), name.clone());
                drop(state);
                self.publisher.display(json!(data), Some(&name));
            }
        }
        None
    }

    fn show(&self, bundle: Bundle, at_end: bool) {
        let mut state = self.lock();
        if state.capture {
            state.seen.captured.push(bundle);
            return;
        }
        let result = at_end && state.has_result;
        drop(state);
        if result {
            self.publisher.result(json!(bundle));
        } else {
            self.publisher.display(json!(bundle), None);
        }
    }

    fn serve_displays(&self, stream: UnixStream) {
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { break };
            let Ok(v) = serde_json::from_str::<Value>(&line) else { continue };
            let Some(number) = v["number"].as_u64() else { continue };
            self.lock().displays.insert(number, v);
            self.changed.notify_all();
        }
    }

    /// What cargo says while it compiles dependencies: one line, replaced by the next.
    fn serve_build(&self, stream: UnixStream) {
        let name = format!("build-{}", uuid::Uuid::new_v4());
        let mut shown = false;
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let data = json!({"text/plain": line});
            if shown {
                self.publisher.update_display(&name, data);
            } else {
                self.publisher.display(data, Some(&name));
                shown = true;
            }
        }
    }

    /// A read of standard input by the cell: asks the front end, answers with what was typed.
    fn serve_input(&self, mut stream: UnixStream) {
        // A prompt that was printed is read first.
        std::thread::sleep(QUIET * 2);
        let (prompt, secret) = self.take_prompt();
        let line = self.publisher.ask(&prompt, secret);
        let _ = stream.write_all(line.as_bytes());
    }
}

/// The file in a workspace that tells the stand-in for cargo to stop; its other file says which process group compiles.
pub const STOP: &str = "stop";
pub const COMPILING: &str = "compiling";
/// The file with the path of the kernel's socket.
pub const SOCKET: &str = "socket";

fn stop_compiler(session: &Path) {
    let group = std::fs::read_to_string(session.join(COMPILING)).ok().and_then(|t| t.trim().parse::<i32>().ok());
    if let Some(group) = group.filter(|g| *g > 1) {
        // SAFETY: a signal to a process group that the stand-in made for itself.
        unsafe { libc::kill(-group, libc::SIGKILL) };
        let _ = std::fs::remove_file(session.join(COMPILING));
    }
}

fn relay(state: &mut State, line: &str) {
    if let Some(stream) = &mut state.relay {
        let _ = stream.write_all(format!("{line}\n").as_bytes());
    }
}

fn report(v: &Value) -> Report {
    let text = |name: &str| v[name].as_str().unwrap_or_default().to_owned();
    let number = |name: &str| v[name].as_u64().unwrap_or(0) as usize;
    Report {
        type_name: text("type"),
        message: text("message"),
        file: text("file"),
        line: number("line"),
        column: number("column"),
    }
}

/// Whether there is something to read, or the stream's end, within the time.
fn readable(stream: &UnixStream, timeout: Option<Duration>) -> bool {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = timeout.map_or(-1, |t| t.as_millis() as i32);
    loop {
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&mut poll, 1, ms) } {
            0 => return false,
            n if n > 0 => return true,
            _ if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => return true,
        }
    }
}
