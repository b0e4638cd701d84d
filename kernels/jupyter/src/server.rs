//! The kernel: five sockets, and one thread that evaluates.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use zeromq::{
    RepSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketRecv, SocketSend, XPubSocket, ZmqMessage,
};

use crate::evaluator::Evaluator;
use crate::link::Link;
use crate::publisher::Publisher;
use crate::syntax::{self, Completeness};
use crate::template::Layout;
use crate::wire::{Connection, Message, PROTOCOL, Replays, Signer};
use crate::workspace::Workspace;

/// How long the kernel is idle before rust-analyzer is warmed up.
const IDLE: Duration = Duration::from_millis(300);

/// A request of the shell, with the time when it came.
struct Request {
    message: Message,
    arrived: Instant,
}

struct Shared {
    session: String,
    publisher: Publisher,
    shell: UnboundedSender<Message>,
    control: UnboundedSender<Message>,
    evaluate: Mutex<Sender<Request>>,
    /// Requests that the evaluator has not answered yet.
    waiting: AtomicUsize,
    link: Arc<Link>,
    workspace: Mutex<Option<Workspace>>,
}

/// Serves a connection until it is told to shut down.
///
/// # Errors
/// A connection file that is not right, ports that are taken.
pub fn run(connection_file: &Path, layout: &Layout) -> Result<(), String> {
    let connection = Connection::read(connection_file)?;
    let workspace =
        Workspace::create(&layout.sessions()).map_err(|e| format!("{}: {e}", layout.sessions().display()))?;
    crate::evaluator::set_environment(layout, &workspace)?;
    // SAFETY: no handler; an interrupt of the terminal is for the cells, and comes as a message.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|e| e.to_string())?.block_on(serve(connection, workspace, layout.clone()))
}

async fn serve(connection: Connection, workspace: Workspace, layout: Layout) -> Result<(), String> {
    let signer = Signer::new(&connection.key);
    let session = uuid::Uuid::new_v4().to_string();
    let (iopub_sender, iopub_receiver) = unbounded_channel();
    let (stdin_sender, stdin_receiver) = unbounded_channel();
    let (shell_sender, shell_receiver) = unbounded_channel();
    let (control_sender, control_receiver) = unbounded_channel();
    let (evaluate, requests) = channel();

    let mut shell = RouterSocket::new();
    let mut control = RouterSocket::new();
    let mut stdin = RouterSocket::new();
    let mut heartbeat = RepSocket::new();
    let mut iopub = XPubSocket::new();
    let bound = |port: u16| move |e: zeromq::ZmqError| format!("port {port} cannot be bound: {e}");
    shell.bind(&connection.endpoint(connection.shell)).await.map_err(bound(connection.shell))?;
    control.bind(&connection.endpoint(connection.control)).await.map_err(bound(connection.control))?;
    stdin.bind(&connection.endpoint(connection.stdin)).await.map_err(bound(connection.stdin))?;
    heartbeat.bind(&connection.endpoint(connection.heartbeat)).await.map_err(bound(connection.heartbeat))?;
    iopub.bind(&connection.endpoint(connection.iopub)).await.map_err(bound(connection.iopub))?;

    let publisher = Publisher::new(&session, iopub_sender, stdin_sender);
    let link = Link::listen(publisher.clone(), workspace.dir()).map_err(|e| format!("a socket for the cells: {e}"))?;
    let shared = Arc::new(Shared {
        session,
        publisher: publisher.clone(),
        shell: shell_sender,
        control: control_sender,
        evaluate: Mutex::new(evaluate),
        waiting: AtomicUsize::new(0),
        link: link.clone(),
        workspace: Mutex::new(None),
    });
    let evaluating = shared.clone();
    std::thread::Builder::new()
        .name("evaluator".into())
        // rust-analyzer recurses deeply.
        .stack_size(64 << 20)
        .spawn(move || evaluate_all(&evaluating, &requests, &layout, workspace))
        .map_err(|e| e.to_string())?;

    if std::env::var_os("JPY_PARENT_PID").is_some() {
        end_with_parent(shared.clone());
    }
    publisher.status(&json!({}), "starting");
    tokio::spawn(publish(iopub, iopub_receiver, signer.clone(), shared.clone()));
    tokio::spawn(answer_heartbeat(heartbeat));
    let (shell_out, shell_in) = shell.split();
    let (control_out, control_in) = control.split();
    let (stdin_out, stdin_in) = stdin.split();
    tokio::spawn(send_all(shell_out, shell_receiver, signer.clone()));
    tokio::spawn(send_all(control_out, control_receiver, signer.clone()));
    tokio::spawn(send_all(stdin_out, stdin_receiver, signer.clone()));
    let on_stdin = shared.clone();
    tokio::spawn(receive(stdin_in, signer.clone(), move |m| {
        if m.kind() == "input_reply" {
            on_stdin.publisher.answer(m.content["value"].as_str().map(str::to_owned));
        }
    }));
    let on_shell = shared.clone();
    tokio::spawn(receive(shell_in, signer.clone(), move |m| on_shell.shell_request(m)));
    receive(control_in, signer, move |m| shared.control_request(&m)).await;
    Ok(())
}

/// A server that is killed leaves its kernels behind: they end by themselves.
fn end_with_parent(shared: Arc<Shared>) {
    // SAFETY: no arguments, no failure.
    let parent = || unsafe { libc::getppid() };
    let first = parent();
    std::thread::spawn(move || {
        while parent() == first {
            std::thread::sleep(Duration::from_secs(1));
        }
        shared.clean_up();
        std::process::exit(0)
    });
}

async fn receive(mut socket: RouterRecvHalf, signer: Signer, mut handle: impl FnMut(Message)) {
    let mut replays = Replays::default();
    loop {
        match socket.recv().await {
            Ok(frames) => match signer.decode(frames) {
                Ok((message, signature)) => {
                    if replays.is_new(signature) {
                        handle(message);
                    } else {
                        eprintln!("tunebook-kernel: refused a message that was sent before");
                    }
                }
                Err(why) => eprintln!("tunebook-kernel: refused a message: {why}"),
            },
            // A peer that speaks something else; the socket goes on.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn send_all(mut socket: RouterSendHalf, mut messages: UnboundedReceiver<Message>, signer: Signer) {
    while let Some(message) = messages.recv().await {
        // Fails when the front end is gone.
        let _ = socket.send(signer.encode(&message)).await;
    }
}

async fn publish(
    mut socket: XPubSocket,
    mut messages: UnboundedReceiver<Message>,
    signer: Signer,
    shared: Arc<Shared>,
) {
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Some(message) => drop(socket.send(signer.encode(&message)).await),
                None => return,
            },
            event = socket.recv() => if let Ok(frames) = event {
                welcome(&mut socket, &frames, &signer, &shared).await;
            },
        }
    }
}

/// A front end that subscribes is told so: from now on it misses nothing.
async fn welcome(socket: &mut XPubSocket, frames: &ZmqMessage, signer: &Signer, shared: &Shared) {
    let Some([1, topic @ ..]) = frames.get(0).map(|f| &f[..]) else { return };
    let topic = String::from_utf8_lossy(topic).into_owned();
    let mut message = Message::new(&shared.session, "iopub_welcome", json!({}), json!({"subscription": topic}));
    message.identities = vec![topic.into()];
    let _ = socket.send(signer.encode(&message)).await;
}

async fn answer_heartbeat(mut socket: RepSocket) {
    loop {
        match socket.recv().await {
            Ok(message) => drop(socket.send(message).await),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

impl Shared {
    fn shell_request(&self, message: Message) {
        // What needs no cell is answered while the kernel starts, or is idle; else in its turn.
        if self.waiting.load(Ordering::SeqCst) == 0
            && let Some((kind, content)) = simple_answer(&message)
        {
            self.publisher.status(&message.header, "busy");
            self.reply(&self.shell, &message, kind, content);
            self.publisher.status(&message.header, "idle");
            return;
        }
        if message.kind() == "shutdown_request" {
            self.shut_down(&self.shell, &message);
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let sender = self.evaluate.lock().unwrap_or_else(|e| e.into_inner());
        let _ = sender.send(Request { message, arrived: Instant::now() });
    }

    fn control_request(&self, message: &Message) {
        if message.kind() == "shutdown_request" {
            self.shut_down(&self.control, message);
        }
        self.publisher.status(&message.header, "busy");
        match message.kind() {
            "interrupt_request" => {
                self.link.interrupt();
                self.publisher.answer(None);
                self.reply(&self.control, message, "interrupt_reply", json!({"status": "ok"}));
            }
            "debug_request" => {
                let content = json!({
                    "type": "response", "request_seq": message.content["seq"], "seq": 1, "success": false,
                    "command": message.content["command"], "message": "this kernel has no debugger",
                });
                self.reply(&self.control, message, "debug_reply", content);
            }
            _ => match simple_answer(message) {
                Some((kind, content)) => self.reply(&self.control, message, kind, content),
                None => self.refuse(&self.control, message),
            },
        }
        self.publisher.status(&message.header, "idle");
    }

    fn reply(&self, socket: &UnboundedSender<Message>, request: &Message, kind: &str, content: Value) {
        let mut reply = Message::new(&self.session, kind, request.header.clone(), content);
        reply.identities = request.identities.clone();
        let _ = socket.send(reply);
    }

    /// A request that this kernel does not know.
    fn refuse(&self, socket: &UnboundedSender<Message>, request: &Message) {
        if let Some(name) = request.kind().strip_suffix("_request") {
            let content = json!({
                "status": "error", "ename": "NotSupported", "evalue": format!("this kernel knows no {}", request.kind()),
                "traceback": [],
            });
            self.reply(socket, request, &format!("{name}_reply"), content);
        }
    }

    fn clean_up(&self) {
        self.link.kill();
        drop(self.workspace.lock().unwrap_or_else(|e| e.into_inner()).take());
    }

    fn shut_down(&self, socket: &UnboundedSender<Message>, request: &Message) -> ! {
        let content = json!({"status": "ok", "restart": request.content["restart"].as_bool().unwrap_or(false)});
        self.publisher.status(&request.header, "busy");
        self.reply(socket, request, "shutdown_reply", content.clone());
        self.publisher.send_for(&request.header, "shutdown_reply", content);
        self.publisher.status(&request.header, "idle");
        self.clean_up();
        // The sockets' tasks send what they have.
        std::thread::sleep(Duration::from_millis(150));
        std::process::exit(0)
    }
}

/// Requests that need no evaluator.
fn simple_answer(message: &Message) -> Option<(&'static str, Value)> {
    match message.kind() {
        "kernel_info_request" => Some(("kernel_info_reply", kernel_info())),
        "comm_info_request" => Some(("comm_info_reply", json!({"status": "ok", "comms": {}}))),
        "is_complete_request" => {
            let content = match syntax::completeness(message.content["code"].as_str().unwrap_or_default()) {
                Completeness::Complete => json!({"status": "complete"}),
                Completeness::Incomplete(indent) => json!({"status": "incomplete", "indent": indent}),
                Completeness::Invalid => json!({"status": "invalid"}),
            };
            Some(("is_complete_reply", content))
        }
        _ => None,
    }
}

fn kernel_info() -> Value {
    json!({
        "status": "ok",
        "protocol_version": PROTOCOL,
        "implementation": "tunebook-kernel",
        "implementation_version": env!("CARGO_PKG_VERSION"),
        "language_info": {
            "name": "rust", "version": "", "mimetype": "text/rust", "file_extension": ".rs",
            "pygments_lexer": "rust", "codemirror_mode": "rust", "nbconvert_exporter": "script",
        },
        "banner": format!(
            "tunebook {}: Rust, with the library loaded. :help lists commands, :dep NAME = \"VERSION\" adds a crate.",
            env!("CARGO_PKG_VERSION")
        ),
        "debugger": false,
        "supported_features": [],
        "help_links": [{"text": "evcxr", "url": "https://github.com/evcxr/evcxr"}],
    })
}

fn evaluate_all(shared: &Shared, requests: &Receiver<Request>, layout: &Layout, workspace: Workspace) {
    let started = Evaluator::start(layout, &workspace, &shared.link, &shared.publisher);
    *shared.workspace.lock().unwrap_or_else(|e| e.into_inner()) = Some(workspace);
    let mut evaluator = match started {
        Ok(evaluator) => evaluator,
        Err(why) => {
            refuse_all(shared, requests, &why);
            return;
        }
    };
    // After a failed cell, those that were sent before it ended are not run.
    let mut aborted_before: Option<Instant> = None;
    let mut warm = false;
    loop {
        let wait = if warm { Duration::from_secs(3600) } else { IDLE };
        let request = match requests.recv_timeout(wait) {
            Ok(request) => request,
            Err(RecvTimeoutError::Timeout) => {
                if !warm {
                    evaluator.warm_up();
                    warm = true;
                }
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let message = &request.message;
        shared.publisher.status(&message.header, "busy");
        match message.kind() {
            "execute_request" if aborted_before.is_some_and(|t| request.arrived < t) => {
                shared.reply(&shared.shell, message, "execute_reply", json!({"status": "aborted"}));
            }
            "execute_request" => {
                let content = execute(shared, &mut evaluator, message);
                let stop = message.content["stop_on_error"].as_bool().unwrap_or(true);
                if content["status"] == "error" && stop {
                    aborted_before = Some(Instant::now());
                }
                shared.reply(&shared.shell, message, "execute_reply", content);
            }
            "complete_request" => {
                let content = evaluator.complete(&message.content);
                shared.reply(&shared.shell, message, "complete_reply", content);
            }
            "inspect_request" => {
                let content = evaluator.inspect(&message.content);
                shared.reply(&shared.shell, message, "inspect_reply", content);
            }
            "history_request" => {
                let content = evaluator.history.answer(&message.content);
                shared.reply(&shared.shell, message, "history_reply", content);
            }
            "comm_open" => {
                let content = json!({"comm_id": message.content["comm_id"], "data": {}});
                shared.publisher.send_for(&message.header, "comm_close", content);
            }
            _ => match simple_answer(message) {
                Some((kind, content)) => shared.reply(&shared.shell, message, kind, content),
                None => shared.refuse(&shared.shell, message),
            },
        }
        shared.publisher.status(&message.header, "idle");
        shared.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

fn execute(shared: &Shared, evaluator: &mut Evaluator, message: &Message) -> Value {
    let silent = message.content["silent"].as_bool().unwrap_or(false);
    if !silent && message.content["store_history"].as_bool().unwrap_or(true) {
        evaluator.execution_count += 1;
    }
    shared.publisher.start(message, evaluator.execution_count);
    if !silent {
        let content = json!({"code": message.content["code"], "execution_count": evaluator.execution_count});
        shared.publisher.send("execute_input", content);
    }
    evaluator.execute(&message.content)
}

/// The kernel could not start: every request is told why.
fn refuse_all(shared: &Shared, requests: &Receiver<Request>, why: &str) {
    for request in requests.iter() {
        let message = &request.message;
        shared.publisher.status(&message.header, "busy");
        let error =
            json!({"ename": "StartError", "evalue": why, "traceback": [format!("the kernel could not start: {why}")]});
        if message.kind() == "execute_request" {
            shared.publisher.send_for(&message.header, "error", error.clone());
        }
        if let Some(name) = message.kind().strip_suffix("_request") {
            let mut content = error;
            content["status"] = json!("error");
            content["execution_count"] = json!(0);
            shared.reply(&shared.shell, message, &format!("{name}_reply"), content);
        }
        shared.publisher.status(&message.header, "idle");
        shared.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
