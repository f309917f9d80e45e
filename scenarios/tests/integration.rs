//! Trials of the library on a real kernel: the block layer above, a backend that is watched below.
//!
//! They need root and `ublk_drv`; without either the whole program fails and says so, it never skips. Each trial runs
//! alone (a lock file keeps other processes of this program waiting), has a deadline, and must leave no device, thread,
//! descriptor or kernel complaint behind: the runner checks that after each.

#[path = "integration/mod.rs"]
mod trials;

fn main() -> std::process::ExitCode {
    // The trials about servers that die start this program again, as such a server.
    if let Some(role) = std::env::var_os(trials::server::ROLE) {
        return trials::server::run(&role);
    }
    trials::runner::main()
}
