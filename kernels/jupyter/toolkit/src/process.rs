//! What the process that runs the cells calls by name: this object's copy of the standard library is the cells' one.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::panic::{Location, PanicHookInfo};
use std::sync::{Mutex, OnceLock};
use std::thread::ThreadId;

use serde_json::json;

/// Longest message of a report, in bytes: a report is one small write, which no other can split.
const LONGEST: usize = 16 << 10;

static CHANNEL: Mutex<Option<File>> = Mutex::new(None);
static CELL_THREAD: OnceLock<ThreadId> = OnceLock::new();

/// Called once, before the first cell, by the thread that runs the cells.
///
/// # Safety
/// `channel` is an open file descriptor that nothing else uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tunebook_cells_start(channel: i32) {
    // SAFETY: as the caller promised.
    let channel = unsafe { File::from_raw_fd(channel) };
    *CHANNEL.lock().unwrap_or_else(|e| e.into_inner()) = Some(channel);
    let _ = CELL_THREAD.set(std::thread::current().id());
    std::panic::set_hook(Box::new(panicked));
}

/// Called after each cell: what it printed without a newline leaves the buffer.
#[unsafe(no_mangle)]
pub extern "C" fn tunebook_cells_flush() {
    let _ = std::io::stdout().flush();
}

/// Called by the handler of SIGINT: stores one flag. The cell ends as a whole, whatever it calls next.
#[unsafe(no_mangle)]
pub extern "C" fn tunebook_cells_interrupt() {
    tunebook::train::interrupt_until_cleared();
}

/// Forgets an interrupt. Called before and after each cell.
#[unsafe(no_mangle)]
pub extern "C" fn tunebook_cells_forget_interrupt() {
    tunebook::train::clear_interrupt();
}

fn panicked(info: &PanicHookInfo<'_>) {
    let message = info.payload_as_str().unwrap_or("a panic whose payload is no text");
    let Some(location) = info.location() else { return };
    let thread = std::thread::current();
    if CELL_THREAD.get() == Some(&thread.id()) {
        // The kernel shows it as the cell's error; if the cell catches it, on standard error.
        report("panic", "", message, location);
    } else {
        eprintln!("thread '{}' panicked at {location}:\n{message}", thread.name().unwrap_or("<unnamed>"));
    }
}

/// Tells the kernel why a cell failed.
pub(crate) fn report(op: &str, type_name: &str, message: &str, location: &Location<'_>) {
    let mut end = message.len().min(LONGEST);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let report = json!({
        "op": op,
        "type": type_name,
        "message": &message[..end],
        "file": location.file(),
        "line": location.line(),
        "column": location.column(),
    });
    // A panic within this function must not wait for its own lock.
    let Ok(mut channel) = CHANNEL.try_lock() else { return };
    if let Some(channel) = channel.as_mut() {
        let _ = channel.write_all(format!("{report}\n").as_bytes());
    }
}
