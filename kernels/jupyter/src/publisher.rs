//! What front ends see: messages on the iopub socket, and questions on the stdin socket.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use crate::wire::Message;

/// Sends to all front ends, on behalf of the request that is answered.
#[derive(Clone)]
pub struct Publisher {
    session: Arc<str>,
    iopub: UnboundedSender<Message>,
    stdin: UnboundedSender<Message>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Header of the request whose output this is.
    parent: Value,
    /// Who asked, if it takes questions.
    asker: Option<Vec<Bytes>>,
    execution_count: u64,
    /// Waits for the answer to a question.
    answer: Option<Sender<String>>,
    /// Whether the output is cleared by the next.
    silent: bool,
}

impl Publisher {
    pub fn new(session: &str, iopub: UnboundedSender<Message>, stdin: UnboundedSender<Message>) -> Publisher {
        Publisher { session: session.into(), iopub, stdin, state: Arc::default() }
    }

    /// From now on output belongs to this request.
    pub fn start(&self, request: &Message, execution_count: u64) {
        let mut state = self.lock();
        state.parent = request.header.clone();
        let asks = request.content["allow_stdin"].as_bool().unwrap_or(false);
        state.asker = asks.then(|| request.identities.clone());
        state.execution_count = execution_count;
        state.silent = request.content["silent"].as_bool().unwrap_or(false);
    }

    /// A message that belongs to another request than the current one.
    pub fn send_for(&self, parent: &Value, kind: &str, content: Value) {
        let mut message = Message::new(&self.session, kind, parent.clone(), content);
        message.identities = vec![Bytes::from(format!("kernel.{}.{kind}", self.session))];
        // Without a receiver the kernel is going down.
        let _ = self.iopub.send(message);
    }

    /// A message that belongs to the current request.
    pub fn send(&self, kind: &str, content: Value) {
        let parent = self.lock().parent.clone();
        let parent = if parent.is_null() { json!({}) } else { parent };
        self.send_for(&parent, kind, content);
    }

    /// `busy` or `idle`, and `starting`.
    pub fn status(&self, parent: &Value, state: &str) {
        self.send_for(parent, "status", json!({"execution_state": state}));
    }

    /// Text on `stdout` or `stderr`.
    pub fn stream(&self, name: &str, text: &str) {
        if !text.is_empty() {
            self.send("stream", json!({"name": name, "text": text}));
        }
    }

    /// A display, which can be updated if it has an id.
    pub fn display(&self, data: Value, id: Option<&str>) {
        let transient = id.map_or_else(|| json!({}), |id| json!({"display_id": id}));
        self.send("display_data", json!({"data": data, "metadata": {}, "transient": transient}));
    }

    /// Replaces a display.
    pub fn update_display(&self, id: &str, data: Value) {
        self.send("update_display_data", json!({"data": data, "metadata": {}, "transient": {"display_id": id}}));
    }

    /// The value of a cell.
    pub fn result(&self, data: Value) {
        let (count, silent) = {
            let state = self.lock();
            (state.execution_count, state.silent)
        };
        if !silent {
            self.send("execute_result", json!({"execution_count": count, "data": data, "metadata": {}}));
        }
    }

    /// Asks the front end for a line; empty when it takes no questions, or is gone.
    pub fn ask(&self, prompt: &str, secret: bool) -> String {
        let (message, answer): (Message, Receiver<String>) = {
            let mut state = self.lock();
            let Some(asker) = state.asker.clone() else { return String::new() };
            let (sender, receiver) = channel();
            state.answer = Some(sender);
            let content = json!({"prompt": prompt, "password": secret});
            let mut message = Message::new(&self.session, "input_request", state.parent.clone(), content);
            message.identities = asker;
            (message, receiver)
        };
        if self.stdin.send(message).is_err() {
            return String::new();
        }
        answer.recv().map(|line| line + "\n").unwrap_or_default()
    }

    /// The answer to the question that waits; `None` ends the wait.
    pub fn answer(&self, line: Option<String>) {
        let sender = self.lock().answer.take();
        if let (Some(sender), Some(line)) = (sender, line) {
            let _ = sender.send(line);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
