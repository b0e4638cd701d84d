//! What a cell prints, taken apart: text, displays, and evcxr's own marker lines.
//!
//! On standard output travel, besides the user's bytes: evcxr's markers (they must reach evcxr, or its table of variables
//! is wrong), displays between `EVCXR_BEGIN_CONTENT` and `EVCXR_END_CONTENT`, and our marks, which say where a display that
//! came over the private channel belongs, and where a cell ends.

use std::collections::BTreeMap;

/// The start of our own marks; record separator, which no text has by chance.
pub const MARK: &str = "\u{1e}TUNEBOOK ";
const EVCXR: &str = "EVCXR_";
const BEGIN_CONTENT: &str = "EVCXR_BEGIN_CONTENT ";
const END_CONTENT: &str = "\nEVCXR_END_CONTENT\n";
/// Those that evcxr acts upon.
const FOR_EVCXR: [&str; 3] = ["EVCXR_PANIC_NOTIFICATION", "EVCXR_ERROR_OCCURRED", "EVCXR_VARIABLE_CHANGED_TYPE:"];
/// `evcxr_input`: the prompt of what is read next.
const INPUT: [&str; 2] = ["EVCXR_INPUT_REQUEST_PASSWORD:", "EVCXR_INPUT_REQUEST:"];
/// A marker line longer than this is no marker.
const LONGEST_LINE: usize = 4096;

/// A display: MIME types and their data.
pub type Bundle = BTreeMap<String, String>;

/// What was found in the stream, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The user's own bytes.
    Text(Vec<u8>),
    /// A display that was printed.
    Display(Bundle),
    /// The place of the display with this number, which came over the private channel.
    Mark(u64),
    /// A line for evcxr.
    Marker(String),
    /// The prompt of the next read of standard input, and whether what is typed is secret.
    Prompt(String, bool),
    /// The end of the cell with this number.
    End(u64),
}

/// Takes a stream apart that comes in pieces of any size.
#[derive(Default)]
pub struct Parser {
    buffer: Vec<u8>,
    bundle: Bundle,
}

impl Parser {
    /// Takes the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.buffer.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(event) = self.next() {
            self.take_bundle_before(&event, &mut events);
            events.extend(event);
        }
        events
    }

    /// Whether something is held back that may be the start of a marker, or a display whose other MIME types may follow.
    pub fn holds(&self) -> bool {
        !self.buffer.is_empty() || !self.bundle.is_empty()
    }

    /// What is held back, after a while in which nothing came. A display that has begun is still held.
    pub fn quiet(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        if !self.bundle.is_empty() && self.buffer.is_empty() {
            events.push(Event::Display(std::mem::take(&mut self.bundle)));
        }
        if !self.buffer.is_empty() && !self.buffer.starts_with(BEGIN_CONTENT.as_bytes()) {
            let text = Some(Event::Text(std::mem::take(&mut self.buffer)));
            self.take_bundle_before(&text, &mut events);
            events.extend(text);
        }
        events
    }

    /// All that is held back, at the end of the stream.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = self.quiet();
        if !self.buffer.is_empty() {
            events.push(Event::Text(std::mem::take(&mut self.buffer)));
        }
        events
    }

    /// Blocks of different MIME types that follow each other are one display.
    fn take_bundle_before(&mut self, event: &Option<Event>, events: &mut Vec<Event>) {
        if event.is_some() && !self.bundle.is_empty() {
            events.push(Event::Display(std::mem::take(&mut self.bundle)));
        }
    }

    /// The next event; `Some(None)` is progress without one.
    #[allow(clippy::option_option)]
    fn next(&mut self) -> Option<Option<Event>> {
        let start = find(&self.buffer, EVCXR.as_bytes()).into_iter().chain(find(&self.buffer, MARK.as_bytes())).min();
        let Some(start) = start else {
            let keep = partial(&self.buffer, EVCXR.as_bytes()).max(partial(&self.buffer, MARK.as_bytes()));
            let text = self.take(self.buffer.len() - keep);
            return if text.is_empty() { None } else { Some(Some(Event::Text(text))) };
        };
        if start > 0 {
            return Some(Some(Event::Text(self.take(start))));
        }
        let Some(end) = find(&self.buffer, b"\n") else {
            return if self.buffer.len() > LONGEST_LINE { Some(Some(self.as_text())) } else { None };
        };
        let line = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        if let Some(mime) = line.strip_prefix(BEGIN_CONTENT) {
            // The newline before the end marker may be the one after the MIME type: empty content.
            let stop = find(&self.buffer[end..], END_CONTENT.as_bytes())?;
            let content = String::from_utf8_lossy(&self.buffer[(end + 1).min(end + stop)..end + stop]).into_owned();
            let before = self.bundle.contains_key(mime).then(|| Event::Display(std::mem::take(&mut self.bundle)));
            self.take(end + stop + END_CONTENT.len());
            self.bundle.insert(mime.to_owned(), content);
            return Some(before);
        }
        let event = if let Some(rest) = line.strip_prefix(MARK) {
            match rest.strip_prefix("END ") {
                Some(n) => n.parse().ok().map(Event::End),
                None => rest.parse().ok().map(Event::Mark),
            }
        } else if let Some(prompt) = INPUT.iter().find_map(|p| line.strip_prefix(p)) {
            Some(Event::Prompt(prompt.to_owned(), line.starts_with(INPUT[0])))
        } else {
            FOR_EVCXR.iter().any(|m| line.starts_with(m)).then(|| Event::Marker(line.clone()))
        };
        match event {
            Some(event) => {
                self.take(end + 1);
                Some(Some(event))
            }
            None => Some(Some(self.as_text())),
        }
    }

    /// What looked like a marker is text: its first byte, so that the rest is looked at again.
    fn as_text(&mut self) -> Event {
        Event::Text(self.take(1))
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(n);
        std::mem::replace(&mut self.buffer, rest)
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|w| w == what)
}

/// The length of the longest end of `text` that is a beginning of `what`.
fn partial(text: &[u8], what: &[u8]) -> usize {
    (1..what.len()).rev().find(|&n| text.ends_with(&what[..n])).unwrap_or(0)
}

/// Bytes that come in pieces, as text: what is cut within a character waits for its rest, what is no UTF-8 is replaced.
#[derive(Default)]
pub struct Decoder(Vec<u8>);

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) -> String {
        self.0.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.0) {
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            // An error in the middle may be followed by a character cut at the end.
            Err(_) => self.0.len() - cut_character(&self.0),
            Ok(_) => self.0.len(),
        };
        let rest = self.0.split_off(whole);
        let text = String::from_utf8_lossy(&self.0).into_owned();
        self.0 = rest;
        text
    }

    /// What is left when nothing will follow.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned()
    }
}

/// Bytes at the end that are the start of a character.
fn cut_character(bytes: &[u8]) -> usize {
    for n in 1..=3.min(bytes.len()) {
        let lead = bytes[bytes.len() - n];
        let width = match lead {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            0x80..=0xbf => continue,
            _ => return 0,
        };
        return if width > n { n } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> Event {
        Event::Text(s.as_bytes().to_vec())
    }

    /// Neighbouring texts joined: where the stream was cut does not matter.
    fn joined(events: Vec<Event>) -> Vec<Event> {
        let mut out: Vec<Event> = Vec::new();
        for event in events {
            match (out.last_mut(), event) {
                (Some(Event::Text(a)), Event::Text(b)) => a.extend(b),
                (_, event) => out.push(event),
            }
        }
        out
    }

    fn parse_in_pieces(stream: &str, size: usize) -> Vec<Event> {
        let mut parser = Parser::default();
        let mut events: Vec<Event> = stream.as_bytes().chunks(size).flat_map(|c| parser.feed(c)).collect();
        events.extend(parser.finish());
        joined(events)
    }

    #[test]
    fn a_stream_cut_anywhere_says_the_same() {
        let stream = "a\nno newlineEVCXR_PANIC_NOTIFICATION\n\u{1e}TUNEBOOK 7\nb EVCXR_OTHER\nEVCXR_BEGIN_CONTENT text/html\n<b>\n1\
                      \nEVCXR_END_CONTENT\nEVCXR_BEGIN_CONTENT text/plain\n\nEVCXR_END_CONTENT\nEVCXR_INPUT_REQUEST:name: \n\
                      \u{1e}TUNEBOOK END 3\ntail EVC";
        let bundle = Bundle::from([("text/html".into(), "<b>\n1".into()), ("text/plain".into(), String::new())]);
        let expected = vec![
            text("a\nno newline"),
            Event::Marker("EVCXR_PANIC_NOTIFICATION".into()),
            Event::Mark(7),
            text("b EVCXR_OTHER\n"),
            Event::Display(bundle),
            Event::Prompt("name: ".into(), false),
            Event::End(3),
            text("tail EVC"),
        ];
        for size in 1..stream.len() {
            assert_eq!(parse_in_pieces(stream, size), expected, "pieces of {size} bytes");
        }
    }

    #[test]
    fn the_same_type_again_is_another_display() {
        let block = "EVCXR_BEGIN_CONTENT text/plain\nx\nEVCXR_END_CONTENT\n";
        assert_eq!(parse_in_pieces(&block.repeat(2), 1000).len(), 2);
    }

    #[test]
    fn text_is_not_held_back_but_for_the_start_of_a_marker() {
        let mut parser = Parser::default();
        assert_eq!(parser.feed(b"50 %\r"), [text("50 %\r")]);
        assert_eq!(parser.feed(b"x E"), [text("x ")]);
        assert!(parser.holds());
        assert_eq!(parser.quiet(), [text("E")]);
    }

    #[test]
    fn characters_cut_in_two_and_bytes_that_are_none() {
        let mut d = Decoder::default();
        assert_eq!(d.feed(&"é".as_bytes()[..1]), "");
        assert_eq!(d.feed(&"é".as_bytes()[1..]), "é");
        assert_eq!(d.feed(&[b'a', 0xff, b'b', 0xe2, 0x82]), "a\u{fffd}b");
        assert_eq!(d.feed(&[0xac]), "€");
        assert_eq!(d.feed(&[0xe2]), "");
        assert_eq!(d.finish(), "\u{fffd}");
    }
}
