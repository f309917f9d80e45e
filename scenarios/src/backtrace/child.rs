//! The helper: the process that looks at others.

use std::ffi::OsString;
use std::io::{self, Write};

use super::Told;

/// Tells where the threads of the processes that are named in `arguments` stand, on standard output; returns the exit
/// status.
pub(crate) fn main(arguments: &[OsString]) -> u8 {
    let pids: Option<Vec<u32>> = arguments.iter().map(|argument| argument.to_str()?.parse().ok()).collect();
    let Some(pids) = pids else { return 1 };
    look(&pids);
    tell(&Told::End);
    0
}

fn tell(told: &Told) {
    let Ok(mut line) = serde_json::to_vec(told) else { return };
    line.push(b'\n');
    // Who does not read any more has given up.
    let _ = io::stdout().lock().write_all(&line);
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn look(pids: &[u32]) {
    use std::sync::mpsc;
    use std::thread;

    use super::{image, names, stop};

    // Each by a thread of its own: what cannot be looked at holds up none of the others.
    let (sender, receiver) = mpsc::channel();
    for &pid in pids {
        let sender = sender.clone();
        let started = thread::Builder::new().spawn(move || {
            let images = match image::Images::of(pid) {
                Ok(images) => images,
                Err(error) => {
                    return tell(&Told::Remark(format!("the maps of process {pid} cannot be read: {error}")));
                }
            };
            let mut unwinding = image::Unwinding::new(&images);
            let (mut taken, remarks) = stop::take(pid);
            for remark in remarks {
                tell(&Told::Remark(format!("process {pid}: {remark}")));
            }
            taken.sort_by_cached_key(|thread| rank(pid, thread.tid));
            let stacks = taken.iter().map(|thread| (thread.tid, unwinding.addresses(thread)));
            // The kernel's own threads of a process, such as an io_uring's, have no user space.
            let stacks: Vec<_> =
                stacks.filter(|(_, addresses)| addresses.iter().any(|address| *address != 0)).collect();
            drop(unwinding);
            let _ = sender.send((pid, images, stacks));
        });
        if let Err(error) = started {
            tell(&Told::Remark(format!("failed to start a thread: {error}")));
        }
    }
    drop(sender);
    let mut looked_at = Vec::new();
    // Most of them are one program: its tables are read once.
    let mut names = names::Names::default();
    for (pid, images, stacks) in receiver {
        // This process ends soon: it frees nothing.
        let images: &'static _ = Box::leak(Box::new(images));
        for (tid, addresses) in &stacks {
            tell(&Told::Thread { pid, tid: *tid, frames: names.functions(images, addresses) });
        }
        looked_at.push((pid, images, stacks));
    }
    let all =
        looked_at.iter().flat_map(|(pid, images, stacks)| stacks.iter().map(move |stack| (*pid, *images, stack)));
    let mut all: Vec<_> = all.collect();
    all.sort_by_cached_key(|(pid, _, (tid, _))| rank(*pid, *tid));
    for (pid, images, (tid, addresses)) in all {
        tell(&Told::Thread { pid, tid: *tid, frames: names.lines(images, addresses) });
    }
}

/// Which threads are told of first, for time may run out: those that serve a device, then those that do the work, last
/// those that are there for reports and signals.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn rank(pid: u32, tid: u32) -> u8 {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
    match comm.trim() {
        "events" | "watchdog" | "signals" | "teller" | "asked" | "look" | "backtraces" | "last-resort" => 2,
        // `ublk0-q0`, `ublk0-w1`, but not `ublk-torture` or `ublkit-sync`.
        name if name
            .strip_prefix("ublk")
            .is_some_and(|rest| rest.starts_with(|next: char| next.is_ascii_digit())) =>
        {
            0
        }
        _ => 1,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn look(_pids: &[u32]) {
    tell(&Told::Remark("stacks can be unwound on x86-64 and arm64 only".to_owned()));
}
