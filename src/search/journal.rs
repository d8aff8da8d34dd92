//! The file that makes a search durable.
//!
//! JSON lines: the settings, then one line per reported loss, in the order in which the search asked. Every prefix of a
//! journal is good to go on from, so a process may die at any moment: what its last write left without an end of line
//! is dropped. Each line carries a hash of itself and of all before it, so that any other damage is noticed.

use super::Settings;
use crate::error::{Error, Result, Status};
use crate::fnv::Fnv;
use crate::plan::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::Display;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const FORMAT: &str = "indexcache-search-journal/1";

/// Bytes of a line besides the pattern: less than this.
const LINE_REST: usize = 128;

#[derive(Serialize)]
struct Header<'a> {
    format: &'static str,
    #[serde(flatten)]
    settings: &'a Settings,
}

/// A reported loss. Its line also has the check, which only [`line`] writes.
#[derive(Serialize, Deserialize)]
struct Entry {
    pattern: Pattern,
    loss: f64,
}

/// An open journal. No other process writes it.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    /// Bytes that are whole lines.
    end: u64,
    /// There may be more bytes than that: a torn line, or what a failed write left.
    tail: bool,
    /// Hash of the whole lines, less their own checks.
    check: Fnv,
}

impl Journal {
    /// Starts the file `path`, which must not exist, with the losses known so far.
    pub fn create<'a>(
        path: &Path,
        settings: &Settings,
        known: impl IntoIterator<Item = (&'a Pattern, f64)>,
    ) -> Result<Self> {
        let (mut text, mut check) = header(settings)?;
        for (pattern, loss) in known {
            let (next, after) = line(check, pattern, loss)?;
            text.push_str(&next);
            check = after;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path);
        let file = file.map_err(|e| match e.kind() {
            ErrorKind::AlreadyExists => Error::invalid(
                "path",
                "a new file (to go on with a search, resume its journal)",
                format_args!("{}, which exists", path.display()),
            ),
            _ => cannot("be created", path, e),
        })?;
        lock(&file, path)?;
        let start = || {
            let path = path.canonicalize().map_err(|e| cannot("be found", path, e))?;
            let mut journal = Self { file, path, end: 0, tail: false, check };
            journal.write(&text)?;
            journal.sync_directory()?;
            Ok(journal)
        };
        start().inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })
    }

    /// Opens the journal of a search with these settings, and gives the losses in it. Changes nothing: a torn line goes
    /// when the next is written.
    pub fn open(path: &Path, settings: &Settings) -> Result<(Self, Vec<(Pattern, f64)>)> {
        let fail = |e| cannot("be opened", path, e);
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::invalid("path", "a file", path.display()));
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
        lock(&file, path)?;
        let path = path.canonicalize().map_err(fail)?;
        let (want, check) = header(settings)?;
        let mut journal = Self { file, path, end: 0, tail: false, check };
        let mut bytes = Vec::new();
        journal.file.read_to_end(&mut bytes).map_err(|e| cannot("be read", &journal.path, e))?;

        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let (lines, torn) = bytes.split_at(whole);
        journal.tail = !torn.is_empty();
        let mut lines = lines.split_inclusive(|b| *b == b'\n');
        match lines.next() {
            Some(first) if first == want.as_bytes() => {}
            Some(first) => return Err(journal.other_header(first, settings)),
            // Stopped while it was created, with nothing in it: `begin` starts again.
            None if want.as_bytes().starts_with(torn) => return Ok((journal, Vec::new())),
            None => return Err(journal.other_header(torn, settings)),
        }
        let mut known = Vec::new();
        let mut number = 1;
        for bytes in lines {
            number += 1;
            let read = serde_json::from_slice::<Entry>(bytes);
            let Entry { pattern, loss } =
                read.map_err(|_| journal.damaged(number, "a pattern, its loss and its check"))?;
            let (want, after) = line(journal.check, &pattern, loss)?;
            if want.as_bytes() != bytes {
                return Err(journal.damaged(number, "a loss that matches its check"));
            }
            journal.check = after;
            known.push((pattern, loss));
        }
        // A longer one is more than a line that was being written.
        if torn.len() > settings.layers as usize + LINE_REST {
            return Err(journal.damaged(number + 1, "an end of line"));
        }
        journal.end = whole as u64;
        Ok((journal, known))
    }

    /// Writes the first line of an opened journal that has none.
    pub fn begin(&mut self, settings: &Settings) -> Result<()> {
        if self.end > 0 {
            return Ok(());
        }
        self.write(&header(settings)?.0)?;
        self.sync_directory()
    }

    /// Adds a loss. It is on the disk when this returns.
    pub fn append(&mut self, pattern: &Pattern, loss: f64) -> Result<()> {
        let (text, check) = line(self.check, pattern, loss)?;
        self.write(&text)?;
        self.check = check;
        Ok(())
    }

    /// Whether `path` is this file.
    pub fn is_at(&self, path: &Path) -> bool {
        let id = |m: Metadata| (m.dev(), m.ino());
        let ids = (std::fs::metadata(path).map(id), self.file.metadata().map(id));
        matches!(ids, (Ok(there), Ok(here)) if there == here)
    }

    /// Writes behind the whole lines, over whatever is there.
    fn write(&mut self, text: &str) -> Result<()> {
        let mut steps = || {
            if self.tail {
                self.file.set_len(self.end)?;
            }
            self.tail = true; // Until all of it is there.
            self.file.seek(SeekFrom::Start(self.end))?;
            self.file.write_all(text.as_bytes())?;
            self.file.sync_data()
        };
        steps().map_err(|e| cannot("be written", &self.path, e))?;
        self.tail = false;
        self.end += text.len() as u64;
        Ok(())
    }

    /// A new file is only safe once its name is. Some network file systems see to that themselves and refuse to be told.
    fn sync_directory(&self) -> Result<()> {
        let directory = self.path.parent().unwrap_or(&self.path);
        match File::open(directory).and_then(|directory| directory.sync_all()) {
            Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                Err(cannot("be written", directory, e))
            }
            _ => Ok(()),
        }
    }

    /// An error about line `number`, counted from 1.
    pub fn damaged(&self, number: usize, expected: impl Display) -> Error {
        Error::invalid(
            "path",
            format_args!("{expected} in line {number} of {}", self.path.display()),
            "something else: the journal was damaged or changed",
        )
    }

    /// Why the first line is not the one of these settings.
    fn other_header(&self, first: &[u8], settings: &Settings) -> Error {
        let ours = serde_json::to_value(Header { format: FORMAT, settings });
        let theirs = serde_json::from_slice::<Value>(first);
        let (Ok(Value::Object(ours)), Ok(Value::Object(theirs))) = (ours, theirs) else {
            return self.damaged(1, format_args!("the settings of a search ({FORMAT})"));
        };
        for (name, value) in ours {
            match theirs.get(&name) {
                Some(other) if *other == value => {}
                Some(other) if name != "format" => {
                    let journal = self.path.display();
                    let expected = format_args!("{other} as in the journal {journal}");
                    return Error::invalid(&name, expected, value);
                }
                _ => break,
            }
        }
        self.damaged(1, format_args!("the settings of a search ({FORMAT})"))
    }
}

fn header(settings: &Settings) -> Result<(String, Fnv)> {
    let text = json(&Header { format: FORMAT, settings })? + "\n";
    let check = Fnv::new().bytes(text.bytes());
    Ok((text, check))
}

/// The line of a loss, and the check after it.
fn line(check: Fnv, pattern: &Pattern, loss: f64) -> Result<(String, Fnv)> {
    let entry = json(&Entry { pattern: pattern.clone(), loss })?;
    let check = check.bytes(entry.bytes());
    let open = entry.strip_suffix('}').unwrap_or(&entry);
    Ok((format!("{open},\"check\":\"{:016x}\"}}\n", check.0), check))
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| not_json(&e))
}

pub(super) fn not_json(error: &serde_json::Error) -> Error {
    Error::new(Status::Io, format!("the search could not be written as JSON: {error}"))
}

/// Two searches that write one file would both be lost. File systems without locks go unguarded.
fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            Err(Error::invalid("path", "a journal that no other search is writing", path.display()))
        }
        _ => Ok(()),
    }
}

fn cannot(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::new(Status::Io, format!("path: {} could not {what}: {error}", path.display()))
}
