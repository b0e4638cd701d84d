//! A front end without a face: starts a kernel and speaks to it. `run` and the tests use it.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Runtime;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket};

use crate::wire::{Connection, Message, Signer};

/// A kernel's process and the sockets to it.
pub struct Client {
    pub runtime: Runtime,
    pub shell: DealerSocket,
    pub control: DealerSocket,
    pub stdin: DealerSocket,
    pub iopub: SubSocket,
    pub signer: Signer,
    pub session: String,
    pub connection: Connection,
    pub process: Child,
    /// Holds the connection file.
    _dir: Option<tempfile::TempDir>,
}

/// How often a kernel is started before its failure is reported.
const ATTEMPTS: u32 = 3;
/// For a connection to a port that has answered.
const CONNECT: Duration = Duration::from_secs(5);

/// Why a kernel that was started cannot be spoken to.
enum NotStarted {
    /// It ended, or a connection to it did: a port may have been taken.
    Lost(String),
    Other(String),
}

impl NotStarted {
    fn ended(how: impl std::fmt::Display) -> NotStarted {
        NotStarted::Lost(format!("the kernel ended at its start: {how}"))
    }
}

/// Writes a connection file with five ports that are free now.
fn choose_ports(file: &Path) -> Result<Connection, String> {
    let io = |e: std::io::Error| format!("{}: {e}", file.display());
    // Held until all are known, so that they differ.
    let listeners: Vec<TcpListener> =
        (0..5).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>().map_err(io)?;
    let ports: Vec<u16> =
        listeners.iter().map(|l| l.local_addr().map(|a| a.port())).collect::<Result<_, _>>().map_err(io)?;
    let v = json!({
        "transport": "tcp", "ip": "127.0.0.1", "signature_scheme": "hmac-sha256",
        "key": uuid::Uuid::new_v4().to_string(), "kernel_name": "rust",
        "shell_port": ports[0], "iopub_port": ports[1], "stdin_port": ports[2], "control_port": ports[3], "hb_port": ports[4],
    });
    let mut f = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(file).map_err(io)?;
    f.write_all(v.to_string().as_bytes()).map_err(io)?;
    Connection::read(file)
}

/// Why a message did not come.
#[derive(Debug)]
pub enum Silence {
    /// Not within the time.
    Timeout,
    /// The process has ended.
    Dead(String),
}

impl Client {
    /// Starts `command` with the path of a connection file as its last argument, and connects.
    ///
    /// The ports are free when they are chosen, and a kernel binds them a moment later: another program may have taken one by
    /// then. A kernel that ends at its start, or a connection that breaks off, is therefore tried again with other ports.
    ///
    /// # Errors
    /// A program that does not start, a kernel that ends at its start three times, one that does not answer in `patience`.
    pub fn start(mut command: Command, patience: Duration) -> Result<Client, String> {
        let until = Instant::now() + patience;
        let dir = tempfile::Builder::new().prefix("tunebook-run-").tempdir().map_err(|e| e.to_string())?;
        let file = dir.path().join("kernel.json");
        // A kernel ends with who has started it.
        command.env("JPY_PARENT_PID", std::process::id().to_string());
        command.arg(&file).stdin(Stdio::null()).process_group(0);
        let mut attempt = 0;
        loop {
            attempt += 1;
            match Client::start_once(&mut command, &file, until) {
                Ok(mut client) => {
                    client._dir = Some(dir);
                    return Ok(client);
                }
                Err(NotStarted::Lost(why)) if attempt < ATTEMPTS => {
                    eprintln!("tunebook-kernel: {why}; it is started once more, with other ports");
                }
                Err(NotStarted::Lost(why) | NotStarted::Other(why)) => return Err(why),
            }
        }
    }

    fn start_once(command: &mut Command, file: &Path, until: Instant) -> Result<Client, NotStarted> {
        let connection = choose_ports(file).map_err(NotStarted::Other)?;
        let io = |e: std::io::Error| NotStarted::Other(e.to_string());
        let spawned = command.spawn();
        let process = spawned.map_err(|e| NotStarted::Other(format!("{}: {e}", command.get_program().display())))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(io)?;
        let mut client = Client {
            shell: DealerSocket::new(),
            control: DealerSocket::new(),
            stdin: DealerSocket::new(),
            iopub: SubSocket::new(),
            signer: Signer::new(&connection.key),
            session: uuid::Uuid::new_v4().to_string(),
            runtime,
            process,
            connection,
            _dir: None,
        };
        client.connect(until)?;
        Ok(client)
    }

    fn connect(&mut self, until: Instant) -> Result<(), NotStarted> {
        let c = self.connection.clone();
        let ports = [c.shell, c.control, c.stdin, c.iopub];
        // A port that answers is bound.
        for port in ports {
            while std::net::TcpStream::connect((c.ip, port)).is_err() {
                if let Ok(Some(status)) = self.process.try_wait() {
                    return Err(NotStarted::ended(status));
                }
                if Instant::now() > until {
                    return Err(NotStarted::Other("the kernel does not listen".into()));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let lost = |e: zeromq::ZmqError| NotStarted::Lost(format!("the kernel's connection: {e}"));
        // All of one front end have the same identity: the kernel's questions on stdin find it.
        let Client { runtime, shell, control, stdin, iopub, .. } = self;
        let identity: zeromq::util::PeerIdentity = self.session.as_bytes()[..32].to_vec().try_into().map_err(lost)?;
        // A kernel that ends meanwhile refuses, and a socket would go on asking for half a minute.
        let patient = || {
            let mut o = zeromq::SocketOptions::default();
            o.connect_timeout(CONNECT);
            o
        };
        let options = || {
            let mut o = patient();
            o.peer_identity(identity.clone());
            o
        };
        *iopub = SubSocket::with_options(patient());
        *shell = DealerSocket::with_options(options());
        *control = DealerSocket::with_options(options());
        *stdin = DealerSocket::with_options(options());
        runtime.block_on(async {
            shell.connect(&c.endpoint(c.shell)).await.map_err(lost)?;
            control.connect(&c.endpoint(c.control)).await.map_err(lost)?;
            stdin.connect(&c.endpoint(c.stdin)).await.map_err(lost)?;
            iopub.connect(&c.endpoint(c.iopub)).await.map_err(lost)?;
            iopub.subscribe("").await.map_err(lost)
        })?;
        // Until an answer's status is seen on iopub, the subscription may not have arrived.
        loop {
            let id = self.send_shell("kernel_info_request", json!({}));
            let step = Instant::now() + Duration::from_secs(2);
            while Instant::now() < step {
                match self.receive_iopub(Duration::from_millis(200)) {
                    Ok(m) if m.parent["msg_id"] == id && m.content["execution_state"] == "idle" => {
                        while self.receive_shell(Duration::from_millis(100)).is_ok() {}
                        while self.receive_iopub(Duration::from_millis(50)).is_ok() {}
                        return Ok(());
                    }
                    Ok(_) | Err(Silence::Timeout) => {}
                    Err(Silence::Dead(how)) => return Err(NotStarted::ended(how)),
                }
            }
            if Instant::now() > until {
                return Err(NotStarted::Other("the kernel does not answer".into()));
            }
        }
    }

    /// Sends a request on the shell socket; returns its id.
    pub fn send_shell(&mut self, kind: &str, content: Value) -> String {
        let message = Message::new(&self.session, kind, json!({}), content);
        let frames = self.signer.encode(&message);
        let _ = self.runtime.block_on(self.shell.send(frames));
        message.header["msg_id"].as_str().unwrap_or_default().to_owned()
    }

    /// Sends a request on the control socket; returns its id.
    pub fn send_control(&mut self, kind: &str, content: Value) -> String {
        let message = Message::new(&self.session, kind, json!({}), content);
        let frames = self.signer.encode(&message);
        let _ = self.runtime.block_on(self.control.send(frames));
        message.header["msg_id"].as_str().unwrap_or_default().to_owned()
    }

    /// The next message of the shell socket.
    ///
    /// # Errors
    /// None in time, or the kernel is gone.
    pub fn receive_shell(&mut self, timeout: Duration) -> Result<Message, Silence> {
        let frames = self.runtime.block_on(async { tokio::time::timeout(timeout, self.shell.recv()).await });
        self.decode(frames)
    }

    /// The next message of the iopub socket.
    ///
    /// # Errors
    /// None in time, or the kernel is gone.
    pub fn receive_iopub(&mut self, timeout: Duration) -> Result<Message, Silence> {
        let frames = self.runtime.block_on(async { tokio::time::timeout(timeout, self.iopub.recv()).await });
        self.decode(frames)
    }

    /// What a socket gave, read.
    ///
    /// # Errors
    /// None in time, or the kernel is gone.
    pub fn decode(
        &mut self,
        frames: Result<zeromq::ZmqResult<zeromq::ZmqMessage>, tokio::time::error::Elapsed>,
    ) -> Result<Message, Silence> {
        match frames {
            Ok(Ok(frames)) => match self.signer.decode(frames) {
                Ok((message, _)) => Ok(message),
                Err(_) => Err(Silence::Timeout),
            },
            _ => match self.process.try_wait() {
                Ok(Some(status)) => Err(Silence::Dead(status.to_string())),
                _ => Err(Silence::Timeout),
            },
        }
    }

    /// Asks the kernel to end, and ends it.
    pub fn shut_down(mut self) {
        self.send_control("shutdown_request", json!({"restart": false}));
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !matches!(self.process.try_wait(), Ok(Some(_))) {
            // SAFETY: a signal to the group that was made for this process.
            unsafe { libc::kill(-(self.process.id() as i32), libc::SIGKILL) };
            let _ = self.process.wait();
        }
    }
}
