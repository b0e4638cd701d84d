//! A front end that lets nothing pass: every message on iopub is asserted, or the test fails.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use zeromq::{SocketRecv, SocketSend, ZmqMessage};

use crate::client::{Client, Silence};
use crate::wire::Message;

/// A cell on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

pub struct Front {
    pub client: Client,
}

/// The repository's target directory, which the tests of this crate were compiled into.
pub fn target() -> PathBuf {
    // <target>/<host>/release/tunebook-kernel
    PathBuf::from(env!("CARGO_BIN_EXE_tunebook-kernel")).ancestors().nth(3).unwrap().to_owned()
}

impl Front {
    /// A new kernel. The first one of a machine compiles the library.
    pub fn start() -> Front {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunebook-kernel"));
        command.arg("kernel").arg("--target").arg(target());
        let mut front = Front { client: Client::start(command, Duration::from_secs(30)).unwrap() };
        // What a kernel shows while it starts belongs to no cell; the first one ends that.
        front.request("execute_request", json!({"code": "", "silent": true}));
        front
    }

    /// Sends a request and returns its reply; all iopub messages of it but busy and idle, too.
    pub fn request(&mut self, kind: &str, content: Value) -> (Value, VecDeque<Message>) {
        let id = self.client.send_shell(kind, content);
        self.answer(&id)
    }

    /// The answer to a request.
    pub fn answer(&mut self, id: &str) -> (Value, VecDeque<Message>) {
        let messages = self.until_idle(id);
        let reply = self.client.receive_shell(PATIENCE).unwrap();
        assert_eq!(reply.parent["msg_id"], id);
        (reply.content, messages)
    }

    /// Messages between a request's busy and idle.
    pub fn until_idle(&mut self, id: &str) -> VecDeque<Message> {
        let until = Instant::now() + PATIENCE;
        let mut messages: VecDeque<Message> = VecDeque::new();
        loop {
            match self.client.receive_iopub(Duration::from_millis(100)) {
                Ok(m) => {
                    let own = m.parent["msg_id"] == id;
                    let startup = m.kind() == "display_data" && m.parent.as_object().is_some_and(|p| p.is_empty());
                    assert!(own || startup || m.kind() == "update_display_data", "not of this request: {m:?}");
                    if own && m.kind() == "status" && m.content["execution_state"] == "idle" {
                        break;
                    }
                    if own {
                        messages.push_back(m);
                    }
                }
                Err(Silence::Timeout) => assert!(Instant::now() < until, "no idle; so far {messages:?}"),
                Err(Silence::Dead(how)) => panic!("the kernel died: {how}; so far {messages:?}"),
            }
        }
        let busy = messages.pop_front().unwrap();
        assert_eq!((busy.kind(), &busy.content["execution_state"]), ("status", &json!("busy")));
        messages
    }

    /// Sends a cell.
    pub fn send(&mut self, code: &str) -> String {
        self.client.send_shell("execute_request", cell(code))
    }

    /// Runs a cell.
    pub fn run(&mut self, code: &str) -> Cell {
        let id = self.send(code);
        self.finish(&id, code)
    }

    /// What came of a cell that was sent.
    pub fn finish(&mut self, id: &str, code: &str) -> Cell {
        let (reply, mut outputs) = self.answer(id);
        let input = outputs.pop_front().unwrap();
        assert_eq!((input.kind(), &input.content["code"]), ("execute_input", &json!(code)));
        Cell { reply, outputs, code: code.to_owned() }
    }

    /// Waits for a message of the running cell; what comes before is returned too.
    pub fn wait_for(&mut self, what: impl Fn(&Message) -> bool) -> Vec<Message> {
        let until = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        loop {
            match self.client.receive_iopub(Duration::from_millis(100)) {
                Ok(m) => {
                    let found = what(&m);
                    all.push(m);
                    if found {
                        return all;
                    }
                }
                Err(Silence::Timeout) => assert!(Instant::now() < until, "did not come; so far {all:?}"),
                Err(Silence::Dead(how)) => panic!("the kernel died: {how}"),
            }
        }
    }

    /// Interrupts; the reply comes at once, whatever runs.
    pub fn interrupt(&mut self) {
        self.client.send_control("interrupt_request", json!({}));
        let reply = self.client.receive_control(Duration::from_secs(5)).unwrap();
        assert_eq!((reply.kind(), &reply.content), ("interrupt_reply", &json!({"status": "ok"})));
    }
}

/// What only tests do.
impl Client {
    /// The next message of the control socket.
    ///
    /// # Errors
    /// None in time, or the kernel is gone.
    pub fn receive_control(&mut self, timeout: Duration) -> Result<Message, Silence> {
        let frames = self.runtime.block_on(async { tokio::time::timeout(timeout, self.control.recv()).await });
        self.decode(frames)
    }

    /// The next message of the stdin socket.
    ///
    /// # Errors
    /// None in time, or the kernel is gone.
    pub fn receive_stdin(&mut self, timeout: Duration) -> Result<Message, Silence> {
        let frames = self.runtime.block_on(async { tokio::time::timeout(timeout, self.stdin.recv()).await });
        self.decode(frames)
    }

    /// Answers a question.
    pub fn send_stdin(&mut self, kind: &str, content: Value) {
        let frames = self.signer.encode(&Message::new(&self.session, kind, json!({}), content));
        let _ = self.runtime.block_on(self.stdin.send(frames));
    }

    /// Frames as they are.
    pub fn send_raw(&mut self, frames: ZmqMessage) {
        let _ = self.runtime.block_on(self.shell.send(frames));
    }
}

pub fn cell(code: &str) -> Value {
    json!({
        "code": code, "silent": false, "store_history": true, "user_expressions": {}, "allow_stdin": true,
        "stop_on_error": true,
    })
}

/// What came of a cell. Outputs that no test asked for fail it.
pub struct Cell {
    pub reply: Value,
    outputs: VecDeque<Message>,
    code: String,
}

impl Cell {
    /// Nothing went wrong.
    pub fn ok(self) -> Cell {
        assert_eq!(self.reply["status"], "ok", "{}: {}", self.code, self.reply);
        self
    }

    fn next(&mut self, kind: &str) -> Message {
        match self.outputs.pop_front() {
            Some(m) if m.kind() == kind => m,
            other => {
                let rest = std::mem::take(&mut self.outputs);
                panic!("{}: expected {kind}, found {other:?}, then {rest:?}", self.code)
            }
        }
    }

    /// The next output is this text on `stdout` or `stderr`, in any number of pieces.
    pub fn stream(mut self, name: &str, expected: &str) -> Cell {
        let mut text = String::new();
        while text.len() < expected.len() {
            let m = self.next("stream");
            assert_eq!(m.content["name"], name);
            text.push_str(m.content["text"].as_str().unwrap());
        }
        assert_eq!(text, expected, "{}", self.code);
        self
    }

    pub fn stdout(self, expected: &str) -> Cell {
        self.stream("stdout", expected)
    }

    pub fn stderr(self, expected: &str) -> Cell {
        self.stream("stderr", expected)
    }

    /// The next output is the cell's value.
    pub fn result(mut self, expected: &str) -> Cell {
        let m = self.next("execute_result");
        assert_eq!(m.content["data"]["text/plain"], expected, "{}", self.code);
        assert_eq!(m.content["execution_count"], self.reply["execution_count"]);
        self
    }

    /// The next output is the cell's value; its data.
    pub fn result_data(&mut self) -> Value {
        self.next("execute_result").content["data"].clone()
    }

    /// The next output is a display; its content.
    pub fn display(&mut self) -> Value {
        self.next("display_data").content
    }

    /// The next output replaces a display; its content.
    pub fn update(&mut self) -> Value {
        self.next("update_display_data").content
    }

    /// The next output, whatever it is.
    pub fn any(&mut self) -> Option<Message> {
        self.outputs.pop_front()
    }

    /// The next output is the error that the reply names; its traceback without colours.
    pub fn error(mut self, name: &str, part: &str) -> String {
        let m = self.next("error");
        assert_eq!(self.reply["status"], "error", "{}", self.code);
        for field in ["ename", "evalue", "traceback"] {
            assert_eq!(m.content[field], self.reply[field]);
        }
        assert_eq!(m.content["ename"], name, "{}: {}", self.code, m.content);
        assert!(m.content["evalue"].as_str().unwrap().contains(part), "{}: {}", self.code, m.content);
        let lines: Vec<&str> = m.content["traceback"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
        let mut text = String::new();
        let joined = lines.join("\n");
        let mut chars = joined.chars();
        while let Some(c) = chars.next() {
            if c == '\x1b' {
                chars.by_ref().find(char::is_ascii_alphabetic);
            } else {
                text.push(c);
            }
        }
        text
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.outputs.is_empty(), "{}: not asserted: {:?}", self.code, self.outputs);
        }
    }
}
