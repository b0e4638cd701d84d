//! Records of a CSV file, each with its line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};

use crate::{Error, Result};

/// A CSV file that is read record by record. Fields may be in quotes, quotes in them doubled; a byte order mark is skipped.
pub(super) struct CsvReader {
    path: PathBuf,
    file: BufReader<File>,
    core: Reader,
    /// The last byte that was read.
    last: u8,
}

/// One record.
pub(super) struct Record {
    pub fields: Vec<String>,
    /// The line on which it begins, from 1.
    pub line: usize,
}

impl CsvReader {
    pub fn open(path: &Path, separator: u8) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
        let mut file = BufReader::with_capacity(1 << 16, file);
        let mark = file.fill_buf().map_err(|e| Error::io("read", path, e))?.starts_with(b"\xEF\xBB\xBF");
        file.consume(if mark { 3 } else { 0 });
        Ok(CsvReader { path: path.into(), file, core: ReaderBuilder::new().delimiter(separator).build(), last: 0 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next record; `None` at the end. Empty lines are no records.
    ///
    /// # Errors
    /// Input errors, text that is not UTF-8.
    pub fn next(&mut self) -> Result<Option<Record>> {
        let (mut text, mut ends) = (vec![0; 1024], vec![0; 32]);
        let (mut written, mut fields) = (0, 0);
        loop {
            let input = self.file.fill_buf().map_err(|e| Error::io("read", &self.path, e))?;
            let (result, read, w, e) = self.core.read_record(input, &mut text[written..], &mut ends[fields..]);
            self.last = read.checked_sub(1).and_then(|at| input.get(at)).copied().unwrap_or(self.last);
            self.file.consume(read);
            (written, fields) = (written + w, fields + e);
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => text.resize(2 * text.len(), 0),
                ReadRecordResult::OutputEndsFull => ends.resize(2 * ends.len(), 0),
                ReadRecordResult::End => return Ok(None),
                ReadRecordResult::Record => break,
            }
        }
        let breaks = text[..written].iter().filter(|&&b| b == b'\n').count() + usize::from(self.last == b'\n');
        let line = (self.core.line() as usize).saturating_sub(breaks);
        let mut from = 0;
        let mut field = |end: &usize| {
            let bytes = text.get(from..*end).unwrap_or_default().to_vec();
            from = *end;
            String::from_utf8(bytes)
        };
        let fields = ends[..fields].iter().map(&mut field).collect::<Result<_, _>>().map_err(|e| {
            Error::new("the file is not UTF-8")
                .at(format!("{}:{line}", self.path.display()))
                .caused_by(e)
                .next("convert the file: iconv -f latin1 -t utf-8 FILE")
        })?;
        Ok(Some(Record { fields, line }))
    }
}
