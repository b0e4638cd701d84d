//! A child process whose changes of files are counted, and of which one meets a fault.

use std::path::Path;

use crate::kill_resume::spawn_child;

/// What happens at the chosen change.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The process is killed before it.
    Kill,
    /// It fails with this number, and is not made.
    Error(i32),
}

/// How the child ended.
pub struct End {
    /// Whether it got to the chosen change.
    pub met: bool,
    /// Its exit code; `None` when it was killed.
    pub code: Option<i32>,
    /// What it printed.
    pub text: String,
}

/// In the child: from now on its changes count.
pub fn begin() {
    // SAFETY: makes the parent the tracer of this thread, and stops it until the parent goes on.
    unsafe {
        if libc::ptrace(libc::PTRACE_TRACEME, 0, 0usize, 0usize) != 0 {
            libc::_exit(9);
        }
        libc::raise(libc::SIGSTOP);
    }
}

/// In the child: the end, without the test harness's own output.
pub fn exit(code: i32) -> ! {
    use std::io::Write;
    _ = std::io::stdout().flush();
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// System calls that change files or directories.
#[cfg(target_arch = "x86_64")]
fn changes_files(r: &libc::user_regs_struct) -> bool {
    let creates = |flags: u64| flags as i32 & (libc::O_CREAT | libc::O_TRUNC) != 0;
    match r.orig_rax as i64 {
        // Not what it prints.
        libc::SYS_write | libc::SYS_writev => r.rdi > 2,
        libc::SYS_openat => creates(r.rdx),
        libc::SYS_open => creates(r.rsi),
        libc::SYS_pwrite64
        | libc::SYS_ftruncate
        | libc::SYS_fsync
        | libc::SYS_fdatasync
        | libc::SYS_rename
        | libc::SYS_renameat
        | libc::SYS_renameat2
        | libc::SYS_unlink
        | libc::SYS_unlinkat
        | libc::SYS_rmdir
        | libc::SYS_mkdir
        | libc::SYS_mkdirat
        | libc::SYS_link
        | libc::SYS_linkat
        | libc::SYS_symlink
        | libc::SYS_symlinkat
        | libc::SYS_copy_file_range
        | libc::SYS_sendfile => true,
        _ => false,
    }
}

/// Runs a child that calls [`begin`], with `fault` at its change number `n`. `None` where that is not possible.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::zombie_processes)] // Waited for by its threads, all of which are traced.
pub fn run_with_fault(test: &str, dir: &Path, n: usize, fault: Fault) -> Option<End> {
    let mut child = spawn_child(test, dir, &[]);
    let wait = || {
        let mut status = 0;
        // SAFETY: waits for any thread of the child; this thread has no other child.
        let thread = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
        (thread, status)
    };
    let end = |mut child: std::process::Child, met, status: i32| {
        use std::io::Read;
        let mut text = String::new();
        _ = child.stdout.take().unwrap().read_to_string(&mut text);
        _ = child.stderr.take().unwrap().read_to_string(&mut text);
        End { met, code: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)), text }
    };
    let (thread, status) = wait();
    if !libc::WIFSTOPPED(status) {
        let end = end(child, false, status);
        assert_eq!(end.code, Some(9), "{}", end.text);
        return None;
    }
    let (mut seen, mut met, mut entering, mut failing) = (0, false, true, None);
    // SAFETY: the thread is stopped, and traced by this one; `r` is plain data that the kernel fills and reads.
    unsafe {
        let options = (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as usize;
        libc::ptrace(libc::PTRACE_SETOPTIONS, thread, 0usize, options);
        let mut signal = 0usize;
        loop {
            libc::ptrace(libc::PTRACE_SYSCALL, thread, 0usize, signal);
            signal = 0;
            let (stopped, status) = wait();
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                // A thread's end; the process ends with its first one.
                if stopped != child.id() as i32 && child.try_wait().is_ok_and(|s| s.is_none()) {
                    let (_, status) = wait();
                    return Some(end(child, met, status));
                }
                return Some(end(child, met, status));
            }
            if libc::WSTOPSIG(status) != libc::SIGTRAP | 0x80 {
                signal = libc::WSTOPSIG(status) as usize;
                continue;
            }
            let mut r: libc::user_regs_struct = std::mem::zeroed();
            libc::ptrace(libc::PTRACE_GETREGS, thread, 0usize, &raw mut r);
            if entering && changes_files(&r) {
                if seen == n {
                    met = true;
                    match fault {
                        Fault::Kill => {
                            _ = child.kill();
                        }
                        Fault::Error(number) => {
                            // No system call has this number: the kernel does nothing.
                            r.orig_rax = u64::MAX;
                            libc::ptrace(libc::PTRACE_SETREGS, thread, 0usize, &raw const r);
                            failing = Some(number);
                        }
                    }
                }
                seen += 1;
            } else if !entering && let Some(number) = failing.take() {
                r.rax = i64::from(-number) as u64;
                libc::ptrace(libc::PTRACE_SETREGS, thread, 0usize, &raw const r);
            }
            entering = !entering;
        }
    }
}

/// Elsewhere, registers have other names.
#[cfg(not(target_arch = "x86_64"))]
pub fn run_with_fault(_: &str, _: &Path, _: usize, _: Fault) -> Option<End> {
    None
}
