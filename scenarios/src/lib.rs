//! Scenarios that try to break a block device, and the program `ublk-torture` that runs them.
//!
//! A [`Scenario`] is its own command-line arguments plus a `run` function. The [registry](scenario::SCENARIOS) lists
//! them; [`cli`] builds the command line from it; [`runner`] gives each a [`Context`] and turns what comes back into a
//! verdict, an exit status and a report. A scenario is written against `Context` alone:
//!
//! - [`Context::step`] for everything that can be told apart: it has a name, a deadline, and ends in an event;
//! - [`Context::evidence`] for the work that makes the run meaningful;
//! - [`TargetArgs::start`](target::TargetArgs::start) for a device to try it on, with a look into its storage;
//! - [`Failure`] for everything that can end a run early.

#![forbid(unsafe_code)]

pub mod aligned;
mod backtrace;
pub mod chain;
pub mod cli;
mod clock;
pub mod context;
pub mod control;
pub mod crash;
mod dump;
pub mod environment;
pub mod external;
pub mod fault;
pub mod flush_trace;
mod footprint;
pub mod gates;
mod in_flight;
mod inventory;
mod junit;
mod kept;
pub mod kernel_log;
mod matrix;
pub mod mutants;
mod page;
mod parts;
pub mod probe;
mod reclaim;
mod refusals;
pub mod replay;
mod role;
pub mod runner;
mod runs;
pub mod scenario;
mod server;
pub mod sigkill;
pub mod simulated;
pub mod soak;
pub mod stress;
pub mod suite;
pub mod sysfs;
mod table;
pub mod target;
pub mod torture;
pub mod units;

pub use context::{Context, SharedEvidence};
pub use scenario::{Failure, Scenario};
pub use target::{Target, TargetArgs};
