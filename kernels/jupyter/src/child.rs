//! The process that runs the cells: it loads each compiled cell and calls it. It is this program again, started by evcxr.
//!
//! evcxr speaks to it over standard input and output (`LOAD_AND_RUN file function`, answered by
//! `EVCXR_EXECUTION_COMPLETE`). Those are moved aside; the user's standard output and error are sockets whose other ends the
//! kernel reads, so nothing is lost when this process dies, and no byte that the user prints can be taken for an answer.
//! Over a third socket go the reports of cells, and come the marker lines that the kernel found for evcxr.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::output::MARK;
use crate::{env, stdin, workspace};

type CellFunction = extern "C" fn(*mut c_void) -> *mut c_void;

/// What the toolkit does for this process, by name.
struct Toolkit {
    flush: extern "C" fn(),
    forget_interrupt: extern "C" fn(),
}

static ON_INTERRUPT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Runs cells until the kernel is gone. Does not return.
pub fn run() -> ! {
    match serve() {
        Ok(()) => std::process::exit(0),
        Err(message) => {
            eprintln!("the process that runs the cells: {message}");
            std::process::exit(99);
        }
    }
}

fn serve() -> Result<(), String> {
    let link = std::env::var_os(env::LINK).map(PathBuf::from).ok_or("not started by the kernel")?;
    let connect = |role: &str| -> Result<UnixStream, String> {
        let mut s = UnixStream::connect(&link).map_err(|e| format!("{}: {e}", link.display()))?;
        writeln!(s, "{role} {}", std::process::id()).map_err(|e| e.to_string())?;
        Ok(s)
    };
    let requests = BufReader::new(File::from(duplicate(0)?));
    let answers = File::from(duplicate(1)?);
    let reports = connect("reports")?;
    redirect(connect("stdout")?, 1)?;
    redirect(connect("stderr")?, 2)?;
    redirect(File::open("/dev/null").map_err(|e| e.to_string())?, 0)?;
    restore_environment(&link);
    stdin::ask_over(link);

    let relay = reports.try_clone().map_err(|e| e.to_string())?;
    std::thread::spawn(move || relay_markers(relay, answers));

    let toolkit = load_toolkit(&reports)?;
    let mut reports = reports;
    let mut store: *mut c_void = std::ptr::null_mut();
    let mut number = 0_u64;
    for line in requests.lines() {
        let line = line.map_err(|e| e.to_string())?;
        let (file, function) = line
            .strip_prefix("LOAD_AND_RUN ")
            .and_then(|rest| rest.rsplit_once(' '))
            .ok_or_else(|| format!("expected LOAD_AND_RUN FILE FUNCTION, found {line:?}"))?;
        let cell = dlsym(dlopen(file)?, function)?;
        // SAFETY: evcxr generates the function with this signature, and all cells share the type behind the pointer.
        let cell: CellFunction = unsafe { std::mem::transmute(cell) };
        number += 1;
        (toolkit.forget_interrupt)();
        stdin::forget();
        let _ = writeln!(reports, "{{\"op\":\"begin\"}}");
        store = cell(store);
        (toolkit.flush)();
        let mark = format!("{MARK}END {number}\n");
        for fd in [1, 2] {
            // SAFETY: a write of valid memory; the user may have closed the descriptor.
            unsafe { libc::write(fd, mark.as_ptr().cast(), mark.len()) };
        }
        let _ = writeln!(reports, "{{\"op\":\"end\",\"number\":{number}}}");
    }
    Ok(())
}

/// Passes on what the kernel found for evcxr, and ends the process when the kernel is gone, whatever the cell does.
fn relay_markers(from: UnixStream, mut answers: File) {
    for line in BufReader::new(from).lines() {
        let Ok(line) = line else { break };
        if writeln!(answers, "{line}").is_err() {
            break;
        }
    }
    if let Some(session) = std::env::var_os(env::SESSION) {
        workspace::remove(&PathBuf::from(session));
    }
    // SAFETY: ends the process at once; destructors of a cell that is running are of no use any more.
    unsafe { libc::_exit(0) }
}

/// Loads the object that all cells are linked with, and lets it take over panics and interrupts.
fn load_toolkit(reports: &UnixStream) -> Result<Toolkit, String> {
    let path = std::env::var(env::TOOLKIT).map_err(|_| format!("{} is not set", env::TOOLKIT))?;
    let object = dlopen(&path)?;
    let channel = OwnedFd::from(reports.try_clone().map_err(|e| e.to_string())?);
    // SAFETY: these are the signatures in toolkit/src/process.rs, which is built from the same repository.
    unsafe {
        let start: unsafe extern "C" fn(c_int) = std::mem::transmute(dlsym(object, "tunebook_cells_start")?);
        start(channel.into_raw_fd());
        let interrupt = dlsym(object, "tunebook_cells_interrupt")?;
        ON_INTERRUPT.store(interrupt, Ordering::SeqCst);
        let handler: extern "C" fn(c_int) = on_interrupt;
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        // A read that the cell waits in goes on.
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGINT, &action, std::ptr::null_mut());
        Ok(Toolkit {
            flush: std::mem::transmute::<*mut c_void, extern "C" fn()>(dlsym(object, "tunebook_cells_flush")?),
            forget_interrupt: std::mem::transmute::<*mut c_void, extern "C" fn()>(dlsym(
                object,
                "tunebook_cells_forget_interrupt",
            )?),
        })
    }
}

extern "C" fn on_interrupt(_signal: c_int) {
    let function = ON_INTERRUPT.load(Ordering::SeqCst);
    if !function.is_null() {
        // SAFETY: set by `load_toolkit` to a function of this signature, which only stores a flag.
        let function: extern "C" fn() = unsafe { std::mem::transmute(function) };
        function();
    }
}

/// What the user's code sees is the environment of the kernel's start, not the one in which it compiles.
fn restore_environment(link: &std::path::Path) {
    // SAFETY: no other thread runs yet.
    unsafe {
        for (name, saved) in env::REPLACED {
            match std::env::var_os(saved) {
                Some(value) => std::env::set_var(name, value),
                None => std::env::remove_var(name),
            }
            std::env::remove_var(saved);
        }
        // Of this process alone: a program that a cell starts prints plainly.
        std::env::set_var(env::DISPLAY, format!("{}:{}", std::process::id(), link.display()));
    }
}

fn duplicate(fd: c_int) -> Result<OwnedFd, String> {
    // SAFETY: returns a new descriptor, closed in programs that a cell starts, or an error.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    // SAFETY: it is open and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

fn redirect(from: impl AsRawFd, to: c_int) -> Result<(), String> {
    // SAFETY: both are descriptors; `to` is replaced.
    if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    Ok(())
}

fn dlopen(path: &str) -> Result<*mut c_void, String> {
    let c = CString::new(path).map_err(|_| format!("{path:?} has a NUL"))?;
    // SAFETY: runs the object's initialisers, which is what a cell is for. It is never unloaded: variables point into it.
    let object = unsafe { libc::dlopen(c.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if object.is_null() { Err(dlerror()) } else { Ok(object) }
}

fn dlsym(object: *mut c_void, name: &str) -> Result<*mut c_void, String> {
    let c = CString::new(name).map_err(|_| format!("{name:?} has a NUL"))?;
    // SAFETY: `object` comes from `dlopen`.
    let symbol = unsafe { libc::dlsym(object, c.as_ptr()) };
    if symbol.is_null() { Err(dlerror()) } else { Ok(symbol) }
}

fn dlerror() -> String {
    // SAFETY: a C string or null, valid until the next call of this thread.
    unsafe {
        let message: *const c_char = libc::dlerror();
        if message.is_null() {
            return "unknown error of the dynamic linker".into();
        }
        std::ffi::CStr::from_ptr(message).to_string_lossy().into_owned()
    }
}
