//! This program as a server that can be killed, put into namespaces, or told to end.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use ublkit::{Device, Geometry};

use super::disk::Disk;

/// The environment's word for what to be, instead of the trials.
pub(crate) const ROLE: &str = "UBLKIT_TRIAL_ROLE";

/// Serves a small disk, prints its id, and ends well when its input ends.
pub(crate) fn run(role: &OsStr) -> ExitCode {
    assert_eq!(role, "serve", "the only role there is");
    let device = match Device::builder(Disk::new(Geometry::bytes(1 << 20))).depth(8).start() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("failed to {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut out = io::stdout();
    let told = writeln!(out, "{}", device.id()).and_then(|()| out.flush());
    let waited = io::stdin().read_to_end(&mut Vec::new());
    let closed = device.close();
    if told.is_ok() && waited.is_ok() && closed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
