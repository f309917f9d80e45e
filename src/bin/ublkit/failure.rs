//! How a command fails: a message and an exit status.

use std::fmt;
use std::io;
use std::process::ExitCode;

use ublkit::{Error, ErrorKind};

/// Exit statuses besides 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// What was asked for makes no sense.
    Usage = 1,
    /// The command was tried and failed.
    Failed = 2,
    /// The machine lacks something; the message says what to do.
    Environment = 4,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    status: Status,
    message: Option<String>,
}

impl Failure {
    /// The command failed; `message` is a whole sentence or more.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: Status::Failed, message: Some(message.into()) }
    }

    /// What was asked for makes no sense; `message` is a whole sentence.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { status: Status::Usage, message: Some(message.into()) }
    }

    /// The command failed and the reader knows it already, or is gone.
    pub(crate) fn silent() -> Self {
        Self { status: Status::Failed, message: None }
    }

    /// A file that could not be opened, or the like.
    pub(crate) fn io(error: &io::Error, what: impl fmt::Display) -> Self {
        let status = match error.kind() {
            io::ErrorKind::InvalidInput => Status::Usage,
            _ => Status::Failed,
        };
        Self { status, message: Some(format!("failed to {what}: {error}")) }
    }

    pub(crate) fn status(&self) -> Status {
        self.status
    }

    pub(crate) fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidInput => Status::Usage,
            ErrorKind::DriverMissing | ErrorKind::PermissionDenied | ErrorKind::Unsupported => Status::Environment,
            _ => Status::Failed,
        };
        // What is wrong with a value is a sentence of its own; every other message says what could not be done.
        let message = if status == Status::Usage { error.to_string() } else { format!("failed to {error}") };
        Self { status, message: Some(message) }
    }
}
