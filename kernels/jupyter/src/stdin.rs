//! Standard input of the cells: a read asks the front end for a line.
//!
//! Nothing tells a kernel that a cell waits for input, so the function that waits is ours: the standard library of the cells
//! calls `read`, and the dynamic linker finds this program's one first.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use libc::{c_int, c_void, size_t, ssize_t};

static LINK: OnceLock<PathBuf> = OnceLock::new();
/// What was typed and not read yet.
static TYPED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// From now on descriptor 0 is the front end.
pub fn ask_over(link: PathBuf) {
    let _ = LINK.set(link);
}

/// A new cell does not read what an earlier one has left.
pub fn forget() {
    TYPED.lock().unwrap_or_else(|e| e.into_inner()).clear();
}

#[used]
static KEEP: unsafe extern "C" fn(c_int, *mut c_void, size_t) -> ssize_t = read;

/// As read(2).
///
/// # Safety
/// As read(2): `buffer` has room for `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t {
    if fd == 0
        && let Some(link) = LINK.get()
    {
        let mut typed = TYPED.lock().unwrap_or_else(|e| e.into_inner());
        if typed.is_empty() {
            *typed = ask(link).unwrap_or_default();
        }
        let n = typed.len().min(count);
        // SAFETY: n bytes are there, and as the caller promised there is room for them.
        unsafe { std::ptr::copy_nonoverlapping(typed.as_ptr(), buffer.cast::<u8>(), n) };
        typed.drain(..n);
        return n as ssize_t;
    }
    // SAFETY: the arguments of the caller.
    unsafe { libc::syscall(libc::SYS_read, fd, buffer, count) as ssize_t }
}

fn ask(link: &std::path::Path) -> std::io::Result<Vec<u8>> {
    // A prompt that was printed without a newline comes first.
    let mut stream = UnixStream::connect(link)?;
    writeln!(stream, "input {}", std::process::id())?;
    let mut line = Vec::new();
    stream.read_to_end(&mut line)?;
    Ok(line)
}
