//! The page that a person reads after a run that was no pass.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ublkit_harness::report::Terminal;
use ublkit_harness::{Event, Reporter, Verdict};

/// Keeps the lines of a run, and writes them to a file when the verdict is no pass.
pub(crate) struct Page {
    path: PathBuf,
    lines: Lines,
    terminal: Terminal,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Page {
    /// A page at `path`. One from an earlier run is removed: it is not about this one.
    pub(crate) fn new(path: PathBuf) -> io::Result<Self> {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let lines = Lines::default();
        Ok(Self { path, terminal: Terminal::plain(lines.clone()), lines })
    }
}

impl Reporter for Page {
    fn report(&mut self, event: &Event) -> io::Result<()> {
        self.terminal.report(event)?;
        match event {
            Event::Verdict(line) if line.verdict != Verdict::Pass => {
                fs::write(&self.path, &*self.lines.0.lock().unwrap_or_else(PoisonError::into_inner))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").field("path", &self.path).finish_non_exhaustive()
    }
}
