//! Cells that work: values, text, displays.

use serde_json::json;

use crate::front::Front;

#[test]
fn values_text_and_displays_in_their_order() {
    let mut front = Front::start();
    front.run("1 + 1").ok().result("2");
    front.run("let a = vec![1, 2, 3];").ok();
    front.run("a.len()").ok().result("3");
    front.run("let b: String = \"x\".repeat(a.len()); b").ok().result("\"xxx\"");
    front.run("println!(\"line\")").ok().stdout("line\n");
    front.run("print!(\"no newline\");").ok().stdout("no newline");
    // Two streams: each in its own order.
    let mut cell = front.run("println!(\"a\"); eprintln!(\"b\");").ok();
    let mut both = [(); 2].map(|()| cell.any().map(|m| m.content.to_string()).unwrap_or_default());
    both.sort();
    assert_eq!(both, [r#"{"name":"stderr","text":"b\n"}"#, r#"{"name":"stdout","text":"a\n"}"#]);
}

#[test]
fn text_of_any_kind() {
    let mut front = Front::start();
    front.run("use std::io::Write;").ok();
    front
        .run("print!(\"50 %\\r\"); std::io::stdout().flush()?; print!(\"100 %\"); std::io::stdout().flush()?;")
        .ok()
        .stdout("50 %\r100 %");
    // Bytes that are no text, and what looks like evcxr's own.
    front.run("std::io::stdout().write_all(&[b'a', 0xff, b'b', b'\\n'])?;").ok().stdout("a\u{fffd}b\n");
    front.run("println!(\"EVCXR_NOTHING\"); print!(\"E\");").ok().stdout("EVCXR_NOTHING\nE");
    front.run("eprintln!(\"to stderr\");").ok().stderr("to stderr\n");
    front
        .run("std::process::Command::new(\"echo\").arg(\"from a program\").status()?.success()")
        .ok()
        .stdout("from a program\n")
        .result("true");
    front.run("std::thread::spawn(|| println!(\"from a thread\")).join().unwrap();").ok().stdout("from a thread\n");
    // Nothing was shifted by all that.
    front.run("2 + 2").ok().result("4");
}

#[test]
fn the_library_is_there_and_shows_itself() {
    let mut front = Front::start();
    let dep = format!(":dep tunebook = {{ path = {:?} }}\nuse tunebook::prelude::*;", repository());
    front.run(&dep).ok();
    let mut cell = front.run("let gpu = Gpu::preset(\"t4\")?;\ngpu.clone()").ok();
    let data = cell.result_data();
    assert!(data["text/plain"].as_str().unwrap().starts_with("t4"), "{data}");
    assert!(data["text/html"].as_str().unwrap().contains("<"), "{data}");
    drop(cell);
    // A variable that the last expression moves is gone, and the value shows itself all the same.
    let mut cell = front.run("let moved = gpu.clone();\nstd::convert::identity(moved)").ok();
    assert!(cell.result_data()["text/html"].is_string());
    drop(cell);
    front.run("moved").error("error[E0425]", "moved");
    // Several displays of one cell, each in its place between the text.
    let mut cell = front.run(
        "println!(\"one\");\ngpu.evcxr_display();\nprintln!(\"two\");\ngpu.evcxr_display();\nprintln!(\"three\");",
    );
    cell = cell.ok().stdout("one\n");
    assert!(cell.display()["data"]["text/html"].is_string());
    cell = cell.stdout("two\n");
    assert!(cell.display()["data"]["text/html"].is_string());
    drop(cell.stdout("three\n"));
    // In place.
    let mut cell = front.run(
        "for n in [\"t4\", \"a100-40gb\", \"t4\"] { tunebook::display::update(\"it\", &Gpu::preset(n)?); }\nprintln!(\"end\");",
    );
    cell = cell.ok();
    let first = cell.display();
    let id = first["transient"]["display_id"].clone();
    assert!(id.is_string());
    for _ in 0..2 {
        assert_eq!(cell.update()["transient"]["display_id"], id);
    }
    drop(cell.stdout("end\n"));
}

#[test]
fn other_crates_can_be_added() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("src")).unwrap();
    std::fs::write(
        dir.path().join("Cargo.toml"),
        "[package]\nname = \"little-one\"\nversion = \"1.0.0\"\nedition = \"2024\"\n",
    )
    .unwrap();
    std::fs::write(
        dir.path().join("src/lib.rs"),
        "#[derive(Debug)]\npub struct Little(pub u8);\npub fn seven() -> Little { Little(7) }\n",
    )
    .unwrap();
    let mut front = Front::start();
    front.run("use tunebook::prelude::*;\nlet gpu = Gpu::preset(\"t4\")?;").ok();
    let mut cell =
        front.run(&format!(":dep little-one = {{ path = {:?} }}\nlet l = little_one::seven();\nl.0", dir.path()));
    cell = cell.ok();
    // What was compiled is said, in one line that is replaced.
    while let Some(m) = cell.any() {
        match m.kind() {
            "execute_result" => assert_eq!(m.content["data"]["text/plain"], "7"),
            kind => assert!(kind.ends_with("display_data"), "{m:?}"),
        }
    }
    drop(cell);
    // With values that were there before.
    let mut cell = front.run("gpu.clone()").ok();
    assert!(cell.result_data()["text/html"].is_string());
    drop(cell);
    front.run("l").ok().result("Little(7)");
}

#[test]
fn what_evcxr_can_this_can() {
    let mut front = Front::start();
    front.run("fn square(x: i32) -> i32 { x * x }").ok();
    front.run("square(7)").ok().result("49");
    front.run("#[derive(Debug, Clone)]\nstruct P { x: i32 }\nlet p = P { x: 1 };").ok();
    front.run(":fmt {:#?}").ok().result("Output format: {:#?}\n");
    front.run("p.clone()").ok().result("P {\n    x: 1,\n}");
    front.run(":fmt {:?}").ok().result("Output format: {:?}\n");
    front.run("let mut n = 1; n += square(2); n").ok().result("5");
    front.run(":vars").ok().any();
    let (reply, _) = front.request(
        "execute_request",
        json!({"code": "1", "silent": false, "user_expressions": {"n": "n + 1", "bad": "no_such"}}),
    );
    assert_eq!(reply["user_expressions"]["n"]["data"]["text/plain"], "6");
    assert_eq!(reply["user_expressions"]["bad"]["status"], "error");
}

fn repository() -> std::path::PathBuf {
    std::fs::canonicalize(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap()
}
