//! A front end without a face: starts a kernel and speaks to it. `run` and the tests use it.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
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
    _dir: tempfile::TempDir,
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
    /// # Errors
    /// A program that does not start, a kernel that does not answer in `patience`.
    pub fn start(mut command: Command, patience: Duration) -> Result<Client, String> {
        let io = |e: std::io::Error| e.to_string();
        let dir = tempfile::Builder::new().prefix("tunebook-run-").tempdir().map_err(io)?;
        let file = dir.path().join("kernel.json");
        // Ports that are free now; held until all are known, so that they differ.
        let listeners: Vec<TcpListener> =
            (0..5).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>().map_err(io)?;
        let ports: Vec<u16> =
            listeners.iter().map(|l| l.local_addr().map(|a| a.port())).collect::<Result<_, _>>().map_err(io)?;
        let v = json!({
            "transport": "tcp", "ip": "127.0.0.1", "signature_scheme": "hmac-sha256",
            "key": uuid::Uuid::new_v4().to_string(), "kernel_name": "rust",
            "shell_port": ports[0], "iopub_port": ports[1], "stdin_port": ports[2], "control_port": ports[3], "hb_port": ports[4],
        });
        use std::io::Write;
        let mut f = fs::File::options().write(true).create_new(true).mode(0o600).open(&file).map_err(io)?;
        f.write_all(v.to_string().as_bytes()).map_err(io)?;
        let connection = Connection::read(&file)?;
        drop(listeners);
        // A kernel ends with who has started it.
        command.env("JPY_PARENT_PID", std::process::id().to_string());
        command.arg(&file).stdin(Stdio::null()).process_group(0);
        let process = command.spawn().map_err(|e| format!("{}: {e}", command.get_program().display()))?;

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
            _dir: dir,
        };
        client.connect(Instant::now() + patience)?;
        Ok(client)
    }

    fn connect(&mut self, until: Instant) -> Result<(), String> {
        let c = self.connection.clone();
        let ports = [c.shell, c.control, c.stdin, c.iopub];
        // A port that answers is bound.
        for port in ports {
            while std::net::TcpStream::connect((c.ip, port)).is_err() {
                if let Ok(Some(status)) = self.process.try_wait() {
                    return Err(format!("the kernel ended at its start: {status}"));
                }
                if Instant::now() > until {
                    return Err("the kernel does not listen".into());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let peer = |e: zeromq::ZmqError| e.to_string();
        // All of one front end have the same identity: the kernel's questions on stdin find it.
        let Client { runtime, shell, control, stdin, iopub, .. } = self;
        let identity: zeromq::util::PeerIdentity =
            self.session.as_bytes()[..32].to_vec().try_into().map_err(|e: zeromq::ZmqError| e.to_string())?;
        let options = || {
            let mut o = zeromq::SocketOptions::default();
            o.peer_identity(identity.clone());
            o
        };
        *shell = DealerSocket::with_options(options());
        *control = DealerSocket::with_options(options());
        *stdin = DealerSocket::with_options(options());
        runtime.block_on(async {
            shell.connect(&c.endpoint(c.shell)).await.map_err(peer)?;
            control.connect(&c.endpoint(c.control)).await.map_err(peer)?;
            stdin.connect(&c.endpoint(c.stdin)).await.map_err(peer)?;
            iopub.connect(&c.endpoint(c.iopub)).await.map_err(peer)?;
            iopub.subscribe("").await.map_err(peer)
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
                    Err(Silence::Dead(how)) => return Err(format!("the kernel ended at its start: {how}")),
                }
            }
            if Instant::now() > until {
                return Err("the kernel does not answer".into());
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
