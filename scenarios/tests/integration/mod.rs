//! The trials, by what they are about.

mod capabilities;
mod chain;
mod client;
mod close;
mod commands;
mod control;
mod crash;
mod disk;
mod errnos;
mod fault;
mod faults;
mod flush_trace;
mod geometry;
mod handlers;
mod handover;
mod hangs;
mod io;
mod keeper;
mod kernel_log;
mod notes;
mod orphans;
mod queues;
mod rawserver;
mod recoverable;
mod recovery;
pub(crate) mod runner;
mod scenarios;
pub(crate) mod server;
mod sigkill;
mod sizes;
mod start;
mod stress;
mod suite;
mod torture;

pub(crate) fn all() -> Vec<runner::Case> {
    [
        geometry::cases(),
        sizes::cases(),
        io::cases(),
        errnos::cases(),
        faults::cases(),
        capabilities::cases(),
        handlers::cases(),
        queues::cases(),
        close::cases(),
        start::cases(),
        control::cases(),
        chain::cases(),
        commands::cases(),
        orphans::cases(),
        recovery::cases(),
        handover::cases(),
        scenarios::cases(),
        fault::cases(),
        suite::cases(),
        stress::cases(),
        sigkill::cases(),
        torture::cases(),
        rawserver::cases(),
        hangs::cases(),
        kernel_log::cases(),
        flush_trace::cases(),
        crash::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
