//! The process that serves the devices under test.
//!
//! Not the one that loads them: a process that waits for I/O on a device that it serves itself cannot be killed. Its
//! thread waits for the request, the request for the server's character device to be released, and that, being mapped,
//! for the process to end. Two processes end each other: when the loading one dies, its pipe closes, and the server
//! closes its devices and ends; when the server dies, the kernel fails what it had in hand.

mod bridge;
mod child;
mod client;
mod flattened;
mod freezer;
mod hang;
mod lies;
mod noted;
mod protocol;
mod raw;
mod running;
mod socket;
mod stack;
mod teller;
mod timed;
mod witness;

pub(crate) use child::main;
pub(crate) use client::Server;
pub(crate) use hang::{Hang, never_returns};
pub(crate) use lies::Lie;
pub(crate) use protocol::{Moment, Served, Status};
pub(crate) use raw::{STOP_ARGUMENT, stop};
pub(crate) use running::{
    adopt, adopt_group, forget, kill_all, lives, note_gone, note_made, pids, running_now, watch_over_device,
};
pub(crate) use teller::{Told, ask};
pub(crate) use witness::Testimony;

/// The argument with which this program becomes a server.
pub(crate) const ARGUMENT: &str = "serve-for-parent";
