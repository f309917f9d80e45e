//! Printing that ends a command, and never a process, when nobody reads any more.

use std::fmt;
use std::io::{self, Write};

use crate::failure::Failure;

/// Prints text to standard output, as it is, and at once: a pipe's reader may be waiting for it.
pub(crate) fn print(text: impl fmt::Display) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::silent(),
        _ => Failure::failed(format!("failed to write to standard output: {error}")),
    })
}

/// Prints a line to standard error. If that is gone there is nobody to tell.
pub(crate) fn complain(message: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "ublkit: {message}");
}
