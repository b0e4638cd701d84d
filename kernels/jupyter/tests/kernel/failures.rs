//! A failure is a failure: an error reply with a name, a message, and the user's line.

use crate::front::Front;

#[test]
fn every_failure_is_an_error_at_the_users_line() {
    let mut front = Front::start();
    front.run("let kept = 5;").ok();
    let at = front.run("let x = 1;\nassert_eq!(x, 2, \"one is not two\");").error("Panic", "one is not two");
    assert!(at.contains("line 2") && at.contains("assert_eq!(x, 2"), "{at}");
    let at =
        front.run("let y = 1;\n\n\"many\".parse::<i32>()?;").error("ParseIntError", "invalid digit found in string");
    assert!(at.contains("line 3") && at.contains("\"many\".parse"), "{at}");
    let at = front.run("let z = 2;\nlet w: i32 = 1.5;").error("error[E0308]", "mismatched types");
    assert!(at.contains("line 2:14") && at.contains("^^^") && !at.contains("lib.rs"), "{at}");
    let at = front.run("let unfinished = ").error("error", "");
    assert!(!at.contains("evcxr_variable_store"), "{at}");
    // In a function of an earlier cell.
    front.run("fn fails() -> u8 {\n    panic!(\"deep\")\n}").ok();
    let at = front.run("fails()").error("Panic", "deep");
    assert!(at.contains("line 2") && at.contains("panic!(\"deep\")"), "{at}");
    // What the failing cells did not move is there.
    front.run("kept").ok().result("5");
    // A panic that is caught is told, and fails nothing.
    front
        .run("std::panic::catch_unwind(|| panic!(\"caught\")).is_err()")
        .ok()
        .result("true")
        .stderr("a panic was caught: caught\n");
}

#[test]
fn the_process_dies_and_the_next_cell_works() {
    let mut front = Front::start();
    front.run("fn two() -> u8 { 2 }\nlet lost = 5;").ok();
    for (code, how) in [
        ("println!(\"last words\"); std::process::exit(3);", "exit status: 3"),
        ("print!(\"last words\\n\"); std::process::abort();", "SIGABRT"),
        ("println!(\"last words\"); unsafe { *std::hint::black_box(8 as *mut u8) = 1 };", "SIGSEGV"),
    ] {
        let cell = front.run(code).stdout("last words\n");
        let at = cell.error("Crashed", how);
        assert!(at.contains("variables are lost"), "{at}");
        front.run("two()").ok().result("2");
    }
    front.run("lost").error("error[E0425]", "lost");
}

#[test]
fn cells_after_a_failed_one_are_not_run() {
    let mut front = Front::start();
    let ids: Vec<String> = ["panic!(\"stop\")", "println!(\"no\")"].iter().map(|c| front.send(c)).collect();
    drop(front.finish(&ids[0], "panic!(\"stop\")").error("Panic", "stop"));
    let (reply, outputs) = front.answer(&ids[1]);
    assert_eq!(reply["status"], "aborted");
    assert!(outputs.is_empty());
    front.run("println!(\"yes\")").ok().stdout("yes\n");
}
