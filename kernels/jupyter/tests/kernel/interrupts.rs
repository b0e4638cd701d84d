//! Interrupts.

use std::time::{Duration, Instant};

use crate::front::Front;

#[test]
fn a_loop_that_asks_ends_and_variables_stay() {
    let mut front = Front::start();
    front.run("let kept = 5;").ok();
    let code = "println!(\"started\");\nwhile !tunebook::train::interrupted() { std::thread::sleep(std::time::Duration::from_millis(1)); }\nlet more = 6;";
    let id = front.send(code);
    front.wait_for(|m| m.content["text"] == "started\n");
    let began = Instant::now();
    front.interrupt();
    let rest = front.wait_for(|m| m.content["execution_state"] == "idle" && m.parent["msg_id"] == id.as_str());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(rest.iter().any(|m| m.kind() == "error" && m.content["ename"] == "Interrupted"), "{rest:?}");
    assert_eq!(front.client.receive_shell(Duration::from_secs(5)).unwrap().content["status"], "error");
    front.run("kept + more").ok().result("11");
}

#[test]
fn a_loop_that_does_not_ask_is_killed_by_the_second() {
    let mut front = Front::start();
    front.run("let lost = 5;").ok();
    let id = front.send("println!(\"started\");\nlet mut n = 0_u64;\nloop { n = std::hint::black_box(n + 1); }");
    front.wait_for(|m| m.content["text"] == "started\n");
    front.interrupt();
    std::thread::sleep(Duration::from_millis(300));
    front.interrupt();
    let rest = front.wait_for(|m| m.content["execution_state"] == "idle" && m.parent["msg_id"] == id.as_str());
    let error = rest.iter().find(|m| m.kind() == "error").unwrap();
    assert_eq!(error.content["ename"], "Interrupted");
    let value = error.content["evalue"].as_str().unwrap();
    assert!(value.contains("variables are lost") && value.contains("Run::resume"), "{value}");
    assert_eq!(front.client.receive_shell(Duration::from_secs(5)).unwrap().content["status"], "error");
    front.run("1 + 1").ok().result("2");
}

#[test]
fn an_interrupt_stops_the_compiler_and_an_idle_one_does_nothing() {
    let mut front = Front::start();
    front.run("let kept = 5;").ok();
    front.interrupt();
    front.wait_for(|m| m.content["execution_state"] == "idle");
    front.run("kept").ok().result("5");
    // Thousands of functions: seconds for rustc.
    let code: String = (0..4000)
        .map(|i| format!("fn f{i}(v: &[u8]) -> Vec<String> {{ v.iter().map(|x| format!(\"{{x}}\")).collect() }}\n"))
        .collect();
    let id = front.send(&code);
    front.wait_for(|m| m.kind() == "execute_input");
    std::thread::sleep(Duration::from_millis(1500));
    let began = Instant::now();
    front.interrupt();
    let rest = front.wait_for(|m| m.content["execution_state"] == "idle" && m.parent["msg_id"] == id.as_str());
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    let error = rest.iter().find(|m| m.kind() == "error").unwrap();
    assert_eq!(error.content["ename"], "Interrupted", "{error:?}");
    assert_eq!(front.client.receive_shell(Duration::from_secs(5)).unwrap().content["status"], "error");
    front.run("kept").ok().result("5");
}
