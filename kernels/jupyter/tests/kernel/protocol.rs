//! Requests other than cells, and messages that are none.

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use zeromq::ZmqMessage;

use crate::client::Client;
use crate::front::{Front, cell, target};
use crate::wire::{Message, Signer};

#[test]
fn requests_and_their_answers() {
    let mut front = Front::start();
    let mut ask = |kind: &str, content: Value| {
        let (reply, outputs) = front.request(kind, content);
        assert!(outputs.is_empty(), "{kind}: {outputs:?}");
        reply
    };
    let info = ask("kernel_info_request", json!({}));
    assert!(info["protocol_version"].as_str().unwrap() >= "5.4" && info["language_info"]["name"] == "rust", "{info}");
    assert_eq!(ask("comm_info_request", json!({})), json!({"status": "ok", "comms": {}}));
    assert_eq!(
        ask("is_complete_request", json!({"code": "fn f() {"})),
        json!({"status": "incomplete", "indent": "    "})
    );
    assert_eq!(ask("is_complete_request", json!({"code": "fn f() {}"}))["status"], "complete");
    assert_eq!(ask("is_complete_request", json!({"code": "fn f) {}"}))["status"], "invalid");
    let unknown = ask("dance_request", json!({}));
    assert_eq!(unknown["status"], "error");

    let code = "let é = String::new(); é.into_boxed_s";
    let complete = ask("complete_request", json!({"code": code, "cursor_pos": code.chars().count()}));
    assert_eq!(complete["matches"], json!(["into_boxed_str"]), "{complete}");
    assert_eq!((complete["cursor_start"].as_u64(), complete["cursor_end"].as_u64()), (Some(25), Some(37)));
    // In the middle of the name.
    let inspect = ask("inspect_request", json!({"code": "let s = String::new();\ns.push_str(\"\")", "cursor_pos": 28}));
    assert_eq!(inspect["found"], true, "{inspect}");
    assert!(inspect["data"]["text/plain"].as_str().unwrap().contains("push_str"), "{inspect}");
    assert_eq!(ask("inspect_request", json!({"code": "no_such_name", "cursor_pos": 3}))["found"], false);

    front.run("let n = 1;").ok();
    let (reply, _) =
        front.request("history_request", json!({"hist_access_type": "tail", "n": 1, "output": false, "raw": true}));
    assert_eq!(reply["history"][0][2], "let n = 1;");
    front.client.send_control("debug_request", json!({"type": "request", "seq": 3, "command": "initialize"}));
    let reply = front.client.receive_control(Duration::from_secs(5)).unwrap();
    assert_eq!((&reply.content["success"], &reply.content["request_seq"]), (&json!(false), &json!(3)));
    front.wait_for(|m| m.content["execution_state"] == "idle");
}

#[test]
fn silent_cells_and_cells_that_are_not_stored() {
    let mut front = Front::start();
    let (reply, outputs) = front.request("execute_request", json!({"code": "1", "silent": true}));
    assert_eq!((&reply["status"], outputs.len()), (&json!("ok"), 0));
    let before = front.run("1").ok().result("1").reply["execution_count"].as_u64().unwrap();
    let (reply, _) = front.request("execute_request", json!({"code": "2", "silent": false, "store_history": false}));
    assert_eq!(reply["execution_count"].as_u64(), Some(before));
    assert_eq!(front.run("3").ok().result("3").reply["execution_count"].as_u64(), Some(before + 1));
}

#[test]
fn a_read_of_standard_input_asks() {
    let mut front = Front::start();
    let code = "print!(\"name: \");\nstd::io::Write::flush(&mut std::io::stdout())?;\nlet mut line = String::new();\nstd::io::stdin().read_line(&mut line)?;\nline.trim().to_owned()";
    let id = front.send(code);
    let request = front.client.receive_stdin(Duration::from_secs(120)).unwrap();
    assert_eq!((request.kind(), &request.content["password"]), ("input_request", &json!(false)));
    front.client.send_stdin("input_reply", json!({"value": "Ada"}));
    front.finish(&id, code).ok().stdout("name: ").result("\"Ada\"");
    // A front end that takes no questions: the end of the input.
    let mut content = cell("let mut l = String::new(); std::io::stdin().read_line(&mut l)?");
    content["allow_stdin"] = json!(false);
    let (reply, outputs) = front.request("execute_request", content);
    assert_eq!(reply["status"], "ok");
    assert_eq!(outputs[1].content["data"]["text/plain"], "0");
}

/// Deterministic bytes.
fn noise(seed: &mut u64, n: usize) -> Bytes {
    let mut next = || {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 33) as u8
    };
    (0..n).map(|_| next()).collect::<Vec<u8>>().into()
}

#[test]
fn messages_that_are_none_are_refused_and_nothing_breaks() {
    let mut front = Front::start();
    let mut seed = 7;
    let good = |code: &str| Message::new("s", "execute_request", json!({}), cell(code));
    let mut bad: Vec<ZmqMessage> = vec![
        // Signed by another.
        Signer::new("another key").encode(&good("println!(\"forged\")")),
    ];
    // Not signed; cut; changed after it was signed.
    let frames = front.client.signer.encode(&good("println!(\"changed\")")).into_vec();
    let mut unsigned = frames.clone();
    unsigned[1] = Bytes::new();
    bad.push(ZmqMessage::try_from(unsigned).unwrap());
    for n in 1..frames.len() {
        bad.push(ZmqMessage::try_from(frames[..n].to_vec()).unwrap());
    }
    for i in 2..frames.len() {
        let mut changed = frames.clone();
        changed[i] = noise(&mut seed, 40);
        bad.push(ZmqMessage::try_from(changed).unwrap());
    }
    // Rightly signed nonsense.
    for parts in [["1", "{}", "{}", "{}"], ["{}", "{}", "{}", "{}"], ["{\"msg_type\":3}", "{}", "{}", "[]"]] {
        let mut m = good("");
        let [header, parent, metadata, content] = parts.map(|p| serde_json::from_str::<Value>(p).unwrap());
        (m.header, m.parent, m.metadata, m.content) = (header, parent, metadata, content);
        bad.push(front.client.signer.encode(&m));
    }
    for n in 0..60 {
        let frames: Vec<Bytes> = (0..1 + n % 7).map(|i| noise(&mut seed, (n * 37 + i * 11) % 300)).collect();
        bad.push(ZmqMessage::try_from(frames).unwrap());
    }
    for m in bad {
        front.client.send_raw(m);
    }
    // Contents that are not as they should be: an answer, not a panic.
    for (kind, content) in [
        ("execute_request", json!({"code": 7, "silent": "x"})),
        ("complete_request", json!({"code": "é", "cursor_pos": 99})),
        ("inspect_request", json!({"cursor_pos": -1})),
        ("history_request", json!({"hist_access_type": "range", "start": "a"})),
        ("is_complete_request", json!({})),
    ] {
        front.request(kind, content);
    }
    // The same message again.
    let once = front.client.signer.encode(&good("println!(\"once\")"));
    front.client.send_raw(once.clone());
    front.wait_for(|m| m.content["text"] == "once\n");
    front.wait_for(|m| m.content["execution_state"] == "idle");
    front.client.receive_shell(Duration::from_secs(5)).unwrap();
    front.client.send_raw(once);
    front.run("1 + 1").ok().result("2");
}

#[test]
fn a_connection_that_others_could_reach_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("k.json");
    let connection = |ip: &str, key: &str| {
        json!({"ip": ip, "key": key, "transport": "tcp", "signature_scheme": "hmac-sha256", "shell_port": 1, "iopub_port": 2,
            "stdin_port": 3, "control_port": 4, "hb_port": 5})
    };
    for (ip, key, message) in [("0.0.0.0", "k", "loopback"), ("127.0.0.1", "", "unsigned"), ("nowhere", "k", "address")]
    {
        std::fs::write(&file, connection(ip, key).to_string()).unwrap();
        let out = Command::new(env!("CARGO_BIN_EXE_tunebook-kernel")).arg("kernel").arg(&file).output().unwrap();
        assert!(!out.status.success());
        assert!(String::from_utf8_lossy(&out.stderr).contains(message), "{out:?}");
    }
}

/// Ports are chosen before a kernel binds them: another program may be faster.
#[test]
fn a_kernel_whose_port_was_taken_is_started_with_others() {
    let dir = tempfile::tempdir().unwrap();
    // A program that at its first start has the port of iopub taken from the kernel, and at its second does not.
    let program = dir.path().join("program");
    let script = format!(
        r#"#!/usr/bin/env python3
import json, os, socket, sys
file = sys.argv[-1]
if not os.path.exists("{first}"):
    taken = socket.create_server(("127.0.0.1", json.load(open(file))["iopub_port"]))
    taken.set_inheritable(True)
    open("{first}", "w").close()
os.execv("{kernel}", ["{kernel}", "kernel", "--target", "{target}", file])
"#,
        first = dir.path().join("first").display(),
        kernel = env!("CARGO_BIN_EXE_tunebook-kernel"),
        target = target().display(),
    );
    std::fs::write(&program, script).unwrap();
    let mut command = Command::new("python3");
    command.arg(&program);
    let mut client = Client::start(command, Duration::from_secs(60)).unwrap();
    assert!(dir.path().join("first").exists());
    let id = client.send_shell("kernel_info_request", json!({}));
    assert_eq!(client.receive_shell(Duration::from_secs(10)).unwrap().parent["msg_id"], id);

    // One that always ends is not started for ever.
    let starts = dir.path().join("starts");
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("echo >> '{}'; exit 7", starts.display())).arg("kernel");
    let why = Client::start(command, Duration::from_secs(60)).err().unwrap();
    assert!(why.contains("ended at its start") && why.contains('7'), "{why}");
    assert_eq!(std::fs::read_to_string(starts).unwrap(), "\n\n\n");
}
