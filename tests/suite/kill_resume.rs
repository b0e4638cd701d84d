//! Children of this test binary that are killed: the same executable, filtered to one ignored test.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Starts `test` (its full name in this binary, an ignored test) in a process of its own, with `TUNEBOOK_CHILD` set to `dir`.
pub fn spawn_child(test: &str, dir: &Path, env: &[(&str, &str)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.env("TUNEBOOK_CHILD", dir).envs(env.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Runs a child to its end; its exit status and what it printed.
pub fn run_child(test: &str, dir: &Path, env: &[(&str, &str)]) -> (ExitStatus, String) {
    let output = spawn_child(test, dir, env).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status, text)
}

/// Lets a child live for `life` from the moment at which `ready` exists, then kills it (SIGKILL). Whether it had already
/// ended by itself; a child that fails by itself fails the test.
pub fn kill_child_after(mut child: Child, ready: &Path, life: Duration) -> bool {
    let start = Instant::now();
    let mut since_ready: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            let mut text = String::new();
            _ = child.stdout.take().unwrap().read_to_string(&mut text);
            _ = child.stderr.take().unwrap().read_to_string(&mut text);
            assert!(status.success(), "the child failed by itself:\n{text}");
            return true;
        }
        if since_ready.is_none() && ready.exists() {
            since_ready = Some(Instant::now());
        }
        if since_ready.is_some_and(|t| t.elapsed() >= life) {
            child.kill().unwrap();
            child.wait().unwrap();
            return false;
        }
        assert!(start.elapsed() < Duration::from_secs(300), "the child never made {}", ready.display());
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The directory that a child was given; panics in a process that is no child.
pub fn child_dir() -> std::path::PathBuf {
    std::env::var_os("TUNEBOOK_CHILD").expect("started by another test").into()
}
