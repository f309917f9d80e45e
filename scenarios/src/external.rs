//! Devices that are not served by this program: somebody else's, or those of a server that is started by a command.
//!
//! What is on them is destroyed, so a device is taken only when nobody uses it in any way that can be seen, and when that was
//! asked for twice. Until it is let go, it is claimed exclusively.

mod checks;
mod server;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use self::server::ForeignServer;
use crate::context::Context;
use crate::scenario::Failure;

pub(crate) const SERVER_HELP: &str = "\
Have this shell command serve the device, for as long as the run lasts. With --device, {} in it stands for that path, and it \
must not be there before; without, the command prints the path on its first line. It stays in the foreground and ends, with \
its device, when its process group gets SIGTERM";

/// The options of a device of our own, which say nothing of somebody else's.
const OURS: [&str; 13] = [
    "backend",
    "size",
    "queues",
    "depth",
    "mode",
    "workers_backend",
    "logical_block",
    "max_io",
    "capabilities",
    "discard_promises_nothing",
    "read_only",
    "mutant",
    "raw_server",
];

/// Which device to take, instead of one of our own.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ExternalArgs {
    /// Use this block device, whoever serves it, instead of one of our own. Its content is destroyed
    #[arg(long, value_name = "PATH", requires = "yes_destroy_data", conflicts_with_all = OURS, help_heading = "Device of somebody else's")]
    device: Option<PathBuf>,
    #[arg(long, value_name = "COMMAND", requires = "yes_destroy_data", conflicts_with_all = OURS, help = SERVER_HELP, help_heading = "Device of somebody else's")]
    server: Option<String>,
    /// Yes, destroy what is on it
    #[arg(long, help_heading = "Device of somebody else's")]
    yes_destroy_data: bool,
}

impl ExternalArgs {
    /// For a scenario that takes no device of our own.
    pub(crate) const fn new(device: Option<PathBuf>, server: Option<String>, yes_destroy_data: bool) -> Self {
        Self { device, server, yes_destroy_data }
    }

    /// Whether a device that is not ours is asked for.
    #[must_use]
    pub const fn is_asked_for(&self) -> bool {
        self.device.is_some() || self.server.is_some()
    }

    /// Whether it is a device that was there before the run, with whatever is on it.
    pub(crate) const fn is_there_already(&self) -> bool {
        self.device.is_some() && self.server.is_none()
    }

    /// The options by name.
    #[must_use]
    pub fn options(&self) -> Vec<(String, Value)> {
        vec![("device".to_owned(), json!(self.device)), ("server".to_owned(), json!(self.server))]
    }

    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub fn validate(&self) -> Result<(), Failure> {
        let usage = |what: &str| Err(Failure::Usage(what.to_owned()));
        match (&self.device, &self.server) {
            (None, None) if self.yes_destroy_data => usage("--yes-destroy-data goes with --device or --server"),
            (None, Some(server)) if server.contains("{}") => {
                usage("--server: {} stands for the path that --device gives; add --device PATH")
            }
            (_, Some(server)) if server.trim().is_empty() => usage("--server: there is no command in it"),
            _ => Ok(()),
        }
    }

    /// Starts the server, if there is one, and claims the device. `None` if none is asked for.
    ///
    /// # Errors
    /// [`Failure::Usage`] if the device is in use or is none; [`Failure::DeviceBroke`] if its server ended, and
    /// [`Failure::Hang`] if it did not bring the device in time.
    pub fn start(&self, context: &Context) -> Result<Option<External>, Failure> {
        let (path, server) = match (&self.device, &self.server) {
            (None, None) => return Ok(None),
            (Some(path), None) => (path.clone(), None),
            (device, Some(command)) => {
                let (server, path) = ForeignServer::start(context, command, device.as_deref())?;
                (path, Some(Mutex::new(server)))
            }
        };
        let claimed = checks::claim(&path);
        match claimed {
            Ok(claim) => Ok(Some(External { path, claim: Some(claim), server })),
            Err(failure) => {
                if let Some(server) = server {
                    // The first failure is the one that is told.
                    let _ = server.into_inner().unwrap_or_else(PoisonError::into_inner).stop(context, &path);
                }
                Err(failure)
            }
        }
    }
}

/// A device that is not ours, claimed.
#[derive(Debug)]
pub struct External {
    path: PathBuf,
    claim: Option<File>,
    server: Option<Mutex<ForeignServer>>,
}

impl External {
    /// Path of the block device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if its server, where we started one, has ended.
    ///
    /// # Errors
    /// [`Failure::DeviceBroke`], with the last lines of what the server said.
    pub fn alive(&self) -> Result<(), Failure> {
        self.server.as_ref().map_or(Ok(()), |server| server.lock().unwrap_or_else(PoisonError::into_inner).alive())
    }

    /// Gives the claim up: the kernel does not mount what somebody has claimed. Its own claim takes over while it is mounted.
    pub(crate) fn unclaim(&mut self) {
        self.claim = None;
    }

    /// Lets the device go, and ends its server.
    ///
    /// # Errors
    /// The server had ended by itself, does not end, or leaves its device there.
    pub fn close(self, context: &Context) -> Result<(), Failure> {
        let Self { path, claim, server } = self;
        drop(claim);
        match server {
            None => Ok(()),
            Some(server) => server.into_inner().unwrap_or_else(PoisonError::into_inner).stop(context, &path),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::*;

    #[test]
    fn no_option_of_a_device_of_our_own_is_passed_over() {
        let command = crate::target::TargetArgs::augment_args(clap::Command::new("any"));
        let ids: Vec<_> = command.get_arguments().map(|argument| argument.get_id().as_str()).collect();
        assert_eq!(ids, OURS);
    }
}
