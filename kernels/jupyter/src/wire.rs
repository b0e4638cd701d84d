//! Messages as they travel: multipart ZeroMQ frames, signed with HMAC-SHA256, and the connection file.
//!
//! Format: <https://jupyter-client.readthedocs.io/en/stable/messaging.html#the-wire-protocol>.

use std::collections::{HashSet, VecDeque};
use std::net::IpAddr;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use zeromq::ZmqMessage;

/// The version of the messaging protocol that the kernel speaks.
pub const PROTOCOL: &str = "5.5";

const DELIMITER: &[u8] = b"<IDS|MSG>";
/// Signatures that are remembered, so that a recorded message cannot be sent again.
const REMEMBERED: usize = 1 << 16;

/// Where the five sockets are, and the key that signs.
#[derive(Clone, Debug)]
pub struct Connection {
    pub ip: IpAddr,
    pub shell: u16,
    pub iopub: u16,
    pub stdin: u16,
    pub control: u16,
    pub heartbeat: u16,
    pub key: String,
}

impl Connection {
    /// Reads a connection file.
    ///
    /// # Errors
    /// A file that cannot be read, anything but TCP on a loopback address, an empty key.
    pub fn read(path: &Path) -> Result<Connection, String> {
        let at = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| format!("{at}: {e}"))?;
        let v: Value = serde_json::from_str(&text).map_err(|e| format!("{at}: {e}"))?;
        let port = |name: &str| {
            let found = v[name].as_u64().and_then(|p| u16::try_from(p).ok());
            found.ok_or_else(|| format!("{at}: `{name}` is {}, expected a port", v[name]))
        };
        let ip = v["ip"].as_str().unwrap_or_default();
        let ip: IpAddr =
            ip.parse().map_err(|_| format!("{at}: `ip` is {ip:?}, expected an address such as 127.0.0.1"))?;
        if !ip.is_loopback() {
            return Err(format!(
                "{at}: `ip` is {ip}, and whoever reaches it could run code here; only loopback addresses are served. \
                 Start Jupyter without --ip for kernels, or tunnel through SSH"
            ));
        }
        match v["transport"].as_str() {
            None | Some("tcp") => {}
            Some(other) => return Err(format!("{at}: transport {other:?} is not supported, use tcp")),
        }
        match v["signature_scheme"].as_str() {
            None | Some("hmac-sha256") => {}
            Some(other) => return Err(format!("{at}: signature scheme {other:?} is not supported, use hmac-sha256")),
        }
        let key = v["key"].as_str().unwrap_or_default().to_owned();
        if key.is_empty() {
            return Err(format!("{at}: an empty key; unsigned messages are not accepted"));
        }
        Ok(Connection {
            ip,
            shell: port("shell_port")?,
            iopub: port("iopub_port")?,
            stdin: port("stdin_port")?,
            control: port("control_port")?,
            heartbeat: port("hb_port")?,
            key,
        })
    }

    /// The endpoint of a port, as ZeroMQ writes it.
    pub fn endpoint(&self, port: u16) -> String {
        match self.ip {
            IpAddr::V4(ip) => format!("tcp://{ip}:{port}"),
            IpAddr::V6(ip) => format!("tcp://[{ip}]:{port}"),
        }
    }
}

/// One message.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// Routing frames in front: who it comes from or goes to; a topic on iopub.
    pub identities: Vec<Bytes>,
    pub header: Value,
    pub parent: Value,
    pub metadata: Value,
    pub content: Value,
}

impl Message {
    /// A new message of this session.
    pub fn new(session: &str, kind: &str, parent: Value, content: Value) -> Message {
        let header = json!({
            "msg_id": uuid::Uuid::new_v4().to_string(),
            "session": session,
            "username": "kernel",
            "date": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            "msg_type": kind,
            "version": PROTOCOL,
        });
        Message { identities: Vec::new(), header, parent, metadata: json!({}), content }
    }

    /// `msg_type`.
    pub fn kind(&self) -> &str {
        self.header["msg_type"].as_str().unwrap_or_default()
    }
}

/// Signs what is sent and checks what is received.
#[derive(Clone)]
pub struct Signer(Hmac<Sha256>);

impl Signer {
    pub fn new(key: &str) -> Signer {
        Signer(Hmac::new_from_slice(key.as_bytes()).expect("HMAC takes keys of any length"))
    }

    /// The frames of a message.
    pub fn encode(&self, message: &Message) -> ZmqMessage {
        let parts = [&message.header, &message.parent, &message.metadata, &message.content];
        let parts = parts.map(|p| Bytes::from(serde_json::to_vec(p).expect("JSON values have string keys")));
        let mut mac = self.0.clone();
        parts.iter().for_each(|p| mac.update(p));
        let signature = hex(&mac.finalize().into_bytes());
        let mut frames = message.identities.clone();
        frames.push(Bytes::from_static(DELIMITER));
        frames.push(Bytes::from(signature));
        frames.extend(parts);
        ZmqMessage::try_from(frames).expect("not empty")
    }

    /// # Errors
    /// Frames that are no message, a signature that is not right, parts that are not JSON objects.
    pub fn decode(&self, frames: ZmqMessage) -> Result<(Message, Vec<u8>), String> {
        let mut frames = frames.into_vec();
        let at = frames.iter().position(|f| f[..] == *DELIMITER).ok_or("no <IDS|MSG> frame")?;
        let rest = frames.split_off(at);
        let [_, signature, parts @ ..] = &rest[..] else { return Err("no signature".into()) };
        let [header, parent, metadata, content, ..] = parts else {
            return Err(format!("{} parts after the signature, expected at least 4", parts.len()));
        };
        let mut mac = self.0.clone();
        [header, parent, metadata, content].into_iter().for_each(|p| mac.update(p));
        let signature = unhex(signature).ok_or("a signature that is not hexadecimal")?;
        mac.verify_slice(&signature).map_err(|_| "a wrong signature")?;
        let object = |name: &str, bytes: &Bytes| match serde_json::from_slice(bytes) {
            Ok(v @ Value::Object(_)) => Ok(v),
            Ok(other) => Err(format!("{name}: expected a JSON object, found {other}")),
            Err(e) => Err(format!("{name}: {e}")),
        };
        let message = Message {
            identities: frames,
            header: object("header", header)?,
            parent: object("parent_header", parent)?,
            metadata: object("metadata", metadata)?,
            content: object("content", content)?,
        };
        if message.kind().is_empty() {
            return Err("a header without msg_type".into());
        }
        Ok((message, signature))
    }
}

/// Refuses a signature that was seen already.
#[derive(Default)]
pub struct Replays {
    seen: HashSet<Vec<u8>>,
    order: VecDeque<Vec<u8>>,
}

impl Replays {
    /// Whether this one is new.
    pub fn is_new(&mut self, signature: Vec<u8>) -> bool {
        if !self.seen.insert(signature.clone()) {
            return false;
        }
        self.order.push_back(signature);
        if self.order.len() > REMEMBERED
            && let Some(old) = self.order.pop_front()
        {
            self.seen.remove(&old);
        }
        true
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks(2).map(|p| Some(digit(p[0])? << 4 | digit(p[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        Message::new("s", "execute_request", json!({}), json!({"code": "1"}))
    }

    #[test]
    fn what_is_signed_is_read_back() {
        let signer = Signer::new("key");
        let (m, _) = signer.decode(signer.encode(&message())).unwrap();
        assert_eq!((m.kind(), &m.content), ("execute_request", &json!({"code": "1"})));
    }

    #[test]
    fn another_key_is_refused() {
        assert_eq!(Signer::new("a").decode(Signer::new("b").encode(&message())).unwrap_err(), "a wrong signature");
    }

    /// A known answer: Python's hmac.new(b"key", b"{}{}{}{}", "sha256").
    #[test]
    fn signature_is_hmac_sha256_of_the_four_parts() {
        let empty =
            Message { header: json!({}), parent: json!({}), metadata: json!({}), content: json!({}), ..message() };
        let frames = Signer::new("key").encode(&empty).into_vec();
        assert_eq!(&frames[1][..], b"ca767b02c5bc061ed184a9a029e7f93a7f2f7ed4e8fe74120fc1212f0b008fa3");
    }

    #[test]
    fn a_recorded_message_is_not_taken_twice() {
        let mut replays = Replays::default();
        assert!(replays.is_new(vec![1]) && replays.is_new(vec![2]) && !replays.is_new(vec![1]));
    }

    #[test]
    fn frames_that_are_no_message() {
        let signer = Signer::new("key");
        for frames in
            [vec!["x"], vec!["<IDS|MSG>"], vec!["<IDS|MSG>", "00"], vec!["<IDS|MSG>", "zz", "{}", "{}", "{}", "{}"]]
        {
            let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
            assert!(signer.decode(ZmqMessage::try_from(frames).unwrap()).is_err());
        }
    }
}
