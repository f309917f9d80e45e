//! The trials, by what they are about.

mod capabilities;
mod client;
mod close;
mod control;
mod crash;
mod disk;
mod errnos;
mod faults;
mod geometry;
mod handlers;
mod io;
mod orphans;
mod queues;
pub(crate) mod runner;
mod scenarios;
pub(crate) mod server;
mod sizes;
mod start;
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
        orphans::cases(),
        scenarios::cases(),
        torture::cases(),
        crash::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
