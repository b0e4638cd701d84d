//! Several kernels, their ends, and what they leave: nothing.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::front::{Front, target};

fn workspaces() -> HashSet<PathBuf> {
    let sessions = target().join("tunebook-kernel/sessions");
    std::fs::read_dir(sessions).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

/// The workspace of a kernel, as its cells see it.
fn workspace(front: &mut Front) -> PathBuf {
    let mut cell = front.run("std::env::var(\"TUNEBOOK_KERNEL_SESSION\").unwrap()").ok();
    let text = cell.result_data()["text/plain"].as_str().unwrap().trim_matches('"').to_owned();
    drop(cell);
    text.into()
}

fn gone(dir: &std::path::Path) {
    let until = Instant::now() + Duration::from_secs(5);
    while dir.exists() {
        assert!(Instant::now() < until, "{} is left", dir.display());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn kernels_do_not_disturb_each_other_and_leave_nothing() {
    let (mut a, mut b) = (Front::start(), Front::start());
    a.run("let x = 1;").ok();
    b.run("let x = \"b\";").ok();
    a.run("x").ok().result("1");
    b.run("x").ok().result("\"b\"");
    let (of_a, of_b) = (workspace(&mut a), workspace(&mut b));
    assert!(of_a != of_b && workspaces().is_superset(&[of_a.clone(), of_b.clone()].into()));
    // Asked to.
    a.client.shut_down();
    gone(&of_a);
    b.run("x").ok().result("\"b\"");
    // Killed, while a cell runs.
    b.send("println!(\"runs\"); loop { std::thread::sleep(std::time::Duration::from_secs(1)); }");
    b.wait_for(|m| m.content["text"] == "runs\n");
    b.client.process.kill().unwrap();
    gone(&of_b);
}
