//! JSON lines: one event, one line.

use std::fmt;
use std::io::{self, Write};

use super::Reporter;
use crate::event::Event;

/// Writes each event as one line of JSON, flushed at once so that a reader at the other end of a pipe follows.
pub struct JsonLines<W> {
    to: W,
}

impl<W: Write + Send> JsonLines<W> {
    /// Writes to `to`: a locked stdout, a file.
    pub const fn new(to: W) -> Self {
        Self { to }
    }
}

impl<W> fmt::Debug for JsonLines<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonLines").finish_non_exhaustive()
    }
}

impl<W: Write + Send> Reporter for JsonLines<W> {
    fn report(&mut self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.to.write_all(&line)?;
        self.to.flush()
    }
}
