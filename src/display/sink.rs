//! Where displays go: [`Sink`], and the two that are built in.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One display in its two forms; a front end takes the richest that it can show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MimeBundle {
    /// `text/html`: self-contained, no script. Empty: there is none.
    pub html: String,
    /// `text/plain`: aligned, no newline at its end.
    pub text: String,
}

/// A front end that shows what this crate displays.
///
/// Replace the built-in one with [`set_sink`], e.g. to write reports to files or to update displays live.
pub trait Sink: Send {
    /// Shows a new display.
    fn show(&mut self, bundle: &MimeBundle);

    /// Shows a display in place of the last one with the same `id`, or as a new one.
    ///
    /// Called many times a second at most by loops, and only when [`Sink::is_live`].
    fn update(&mut self, id: &str, bundle: &MimeBundle);

    /// Removes the display with that `id`, where that is possible.
    fn clear(&mut self, id: &str);

    /// Removes all that the cell has shown so far; with `wait` only when something new is shown. A sink that cannot do so does
    /// nothing.
    fn clear_output(&mut self, wait: bool) {
        let _ = wait;
    }

    /// Shows one line of text, as progress.
    fn text(&mut self, line: &str);

    /// Whether [`Sink::update`] replaces a display that is already seen; if not, loops send lines of text.
    fn is_live(&self) -> bool {
        false
    }
}

/// evcxr's protocol: content between marker lines on stdout, several MIME types one after the other.
///
/// Under stock evcxr the last `text/html` of a cell wins and appears when the cell ends; lines of text appear at once.
struct EvcxrSink;

impl Sink for EvcxrSink {
    fn show(&mut self, bundle: &MimeBundle) {
        let block = |mime: &str, content: &str| {
            format!("EVCXR_BEGIN_CONTENT {mime}\n{}\nEVCXR_END_CONTENT\n", without_markers(content))
        };
        let html = if bundle.html.is_empty() { String::new() } else { block("text/html", &bundle.html) };
        print(&(html + &block("text/plain", &bundle.text)));
    }

    fn update(&mut self, _id: &str, bundle: &MimeBundle) {
        self.show(bundle);
    }

    fn clear(&mut self, _id: &str) {}

    fn text(&mut self, line: &str) {
        print(&format!("{}\n", without_markers(line)));
    }
}

/// tunebook-kernel's protocol: each display is a line of JSON on a socket, and a mark on stdout at its place in the text.
///
/// The line comes first: the kernel shows the display when it reads the mark, so text and displays keep their order.
struct KernelSink {
    socket: UnixStream,
    number: u64,
}

impl KernelSink {
    /// The sink of this process, if the kernel has made it: `TUNEBOOK_DISPLAY` is `PID:SOCKET`. A program that a cell starts
    /// inherits the variable, but not the PID, and prints plainly.
    fn connect() -> Option<KernelSink> {
        let value = std::env::var("TUNEBOOK_DISPLAY").ok()?;
        let (pid, path) = value.split_once(':')?;
        if pid != std::process::id().to_string() {
            return None;
        }
        let mut socket = UnixStream::connect(path).ok()?;
        writeln!(socket, "displays {pid}").ok()?;
        Some(KernelSink { socket, number: 0 })
    }

    fn send(&mut self, op: &str, id: Option<&str>, bundle: Option<&MimeBundle>) {
        self.number += 1;
        let data: BTreeMap<&str, &str> = bundle
            .into_iter()
            .flat_map(|b| [("text/html", b.html.as_str()), ("text/plain", b.text.as_str())])
            .filter(|(mime, content)| *mime == "text/plain" || !content.is_empty())
            .collect();
        let line = serde_json::json!({"number": self.number, "op": op, "id": id, "data": data});
        // What was printed before, and by whatever thread, comes before.
        let mut out = std::io::stdout().lock();
        // A kernel that is gone is no reason to stop a training run.
        let _ = out.flush();
        if self.socket.write_all(format!("{line}\n").as_bytes()).is_ok() {
            let _ = writeln!(out, "\u{1e}TUNEBOOK {}", self.number).and_then(|()| out.flush());
        }
    }
}

impl Sink for KernelSink {
    fn show(&mut self, bundle: &MimeBundle) {
        self.send("display", None, Some(bundle));
    }

    fn update(&mut self, id: &str, bundle: &MimeBundle) {
        self.send("update", Some(id), Some(bundle));
    }

    fn clear(&mut self, id: &str) {
        self.send("clear", Some(id), None);
    }

    fn clear_output(&mut self, wait: bool) {
        self.send(if wait { "clear_output_later" } else { "clear_output" }, None, None);
    }

    fn text(&mut self, line: &str) {
        print(&format!("{line}\n"));
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// Plain text on stdout: a program, a test, a terminal.
struct TextSink;

impl Sink for TextSink {
    fn show(&mut self, bundle: &MimeBundle) {
        print(&format!("{}\n", bundle.text));
    }

    fn update(&mut self, _id: &str, bundle: &MimeBundle) {
        self.show(bundle);
    }

    fn clear(&mut self, _id: &str) {}

    fn text(&mut self, line: &str) {
        print(&format!("{line}\n"));
    }
}

fn print(content: &str) {
    let mut out = std::io::stdout().lock();
    // A closed stdout is no reason to stop a training run.
    let _ = out.write_all(content.as_bytes()).and_then(|()| out.flush());
}

/// Shown text may come from a file: a line that evcxr would take for one of its own is indented by a space.
fn without_markers(text: &str) -> String {
    let safe = |line: &str| if line.starts_with("EVCXR_") { format!(" {line}") } else { line.to_owned() };
    text.split('\n').map(safe).collect::<Vec<_>>().join("\n")
}

static SINK: Mutex<Option<Box<dyn Sink>>> = Mutex::new(None);

/// Sends all displays from now on to `sink`.
pub fn set_sink(sink: Box<dyn Sink>) {
    *sink_slot() = Some(sink);
}

/// Goes back to the built-in sink: tunebook-kernel's protocol or evcxr's markers when the process is theirs, else plain text
/// on stdout.
pub fn reset_sink() {
    *sink_slot() = None;
}

fn sink_slot() -> MutexGuard<'static, Option<Box<dyn Sink>>> {
    // A sink that panicked once may still show the next display.
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `f` with the sink.
pub(super) fn with_sink<T>(f: impl FnOnce(&mut dyn Sink) -> T) -> T {
    f(sink_slot().get_or_insert_with(built_in).as_mut())
}

fn built_in() -> Box<dyn Sink> {
    if let Some(sink) = KernelSink::connect() {
        return Box::new(sink);
    }
    // Set by evcxr in the process that runs the cells.
    if std::env::var_os("EVCXR_IS_RUNTIME").is_some() { Box::new(EvcxrSink) } else { Box::new(TextSink) }
}

#[cfg(test)]
mod tests {
    use super::without_markers;

    #[test]
    fn content_cannot_end_its_own_block() {
        assert_eq!(without_markers("a\nEVCXR_END_CONTENT\nb"), "a\n EVCXR_END_CONTENT\nb");
        assert_eq!(without_markers("EVCXR_PANIC_NOTIFICATION"), " EVCXR_PANIC_NOTIFICATION");
    }
}
