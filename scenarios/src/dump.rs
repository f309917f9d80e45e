//! What is told of a hang, beside where every thread stands: what is in flight, what the devices say of themselves, who
//! holds them, who else sleeps uninterruptibly, and what the kernel said.
//!
//! Each part is asked on a thread of its own, all at once, and left behind if it does not come back: a device whose
//! driver's lock is held answers nothing, and the others are told all the same. None of them takes a lock that is held
//! for longer than moments.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ublkit::Controller;
use ublkit_harness::Watchdog;
use ublkit_harness::kernel_log::{Record, complaints};
use ublkit_harness::threads::dump_uninterruptible;

use crate::context::SharedEvidence;
use crate::kernel_log::KernelLog;
use crate::server::{Told, ask, pids, running_now};

/// How long a server may take to answer.
const ANSWER: Duration = Duration::from_secs(3);
/// How long it may take to look at every thread of the machine.
const LOOK: Duration = Duration::from_secs(3);
/// Lines of the kernel's log that are told.
const TAIL: usize = 40;
/// Requests of a hardware queue that are told.
const REQUESTS_MAX: usize = 16;

/// Has `watchdog` ask for all of it. `log` is the kernel's, from the beginning of the run; with `report`, a file in that
/// directory has all of it. How often a planted bug struck is added to the `evidence`: its server, that would say so when
/// its device is closed, may be past saying anything then.
pub(crate) fn ask_for_all(
    watchdog: &Watchdog,
    log: Option<KernelLog>,
    report: Option<PathBuf>,
    evidence: SharedEvidence,
) {
    watchdog.ask("in flight", move || pids().into_iter().flat_map(|pid| in_flight(pid, &evidence)).collect());
    watchdog.ask("driver", || ids().into_iter().map(describe).collect());
    watchdog.ask("block layer", || ids().into_iter().flat_map(|id| block_layer(Path::new("/sys"), id)).collect());
    watchdog.ask("holders", || {
        ids().into_iter().map(|id| format!("device {id} is held by {}", ublkit::holders::of_ublk(id))).collect()
    });
    watchdog.ask("uninterruptible", || {
        let (threads, complete) = dump_uninterruptible(Path::new("/proc"), Instant::now() + LOOK);
        let mut lines: Vec<_> = threads.iter().map(|thread| thread.to_string().replace('\n', "\n  ")).collect();
        if lines.is_empty() {
            lines.push("no thread of this machine".to_owned());
        }
        if !complete {
            lines.push("there may be more: this machine has many threads".to_owned());
        }
        lines
    });
    let log = Mutex::new(log);
    watchdog.ask("kernel log", move || {
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(log) = log.as_mut() else { return vec!["it may not be read".to_owned()] };
        let records = log.read();
        if let Some(report) = &report {
            let _ = keep(report, &records);
        }
        said(&records)
    });
}

/// What server `pid` has in flight.
fn in_flight(pid: u32, evidence: &SharedEvidence) -> Vec<String> {
    let mut lines = match ask(pid, ANSWER) {
        Ok(Told { mut in_flight, struck }) => {
            if let Some(count) = struck {
                evidence.add("mutant_hits", count);
                in_flight.push(format!("the planted bug struck {count} times"));
            }
            in_flight
        }
        Err(error) => vec![format!("no answer: {error}")],
    };
    for line in &mut lines {
        line.insert_str(0, &format!("server {pid}: "));
    }
    lines
}

/// Keeps `records` in the report directory.
///
/// # Errors
/// Those of writing a file.
pub(crate) fn keep(report: &Path, records: &[Record]) -> std::io::Result<()> {
    let mut lines: Vec<_> = records.iter().map(ToString::to_string).collect();
    // The last line ends too.
    lines.push(String::new());
    fs::write(report.join("kernel.log"), lines.join("\n"))
}

fn said(records: &[Record]) -> Vec<String> {
    let mut lines: Vec<_> =
        complaints(records, true).into_iter().map(|complaint| format!("alarm: {}", complaint.what)).collect();
    if records.is_empty() {
        lines.push("the kernel said nothing since the run began".to_owned());
    }
    lines.extend(records[records.len().saturating_sub(TAIL)..].iter().map(ToString::to_string));
    lines
}

/// The ids of this run's devices.
fn ids() -> Vec<u32> {
    running_now().ids()
}

fn describe(id: u32) -> String {
    match Controller::open().and_then(|controller| controller.get_dev_info(id)) {
        Ok(info) => format!("{info:?}"),
        Err(error) => format!("device {id}: failed to {error}"),
    }
}

/// What the block layer has in hand of device `id`: counts from sysfs, and the requests themselves from debugfs, where that
/// is mounted. It has no clock for them.
fn block_layer(sys: &Path, id: u32) -> Vec<String> {
    let name = format!("ublkb{id}");
    let Ok(counts) = fs::read_to_string(sys.join("block").join(&name).join("inflight")) else {
        return vec![format!("{name} does not exist")];
    };
    let mut counts = counts.split_whitespace();
    let (reads, writes) = (counts.next().unwrap_or("?"), counts.next().unwrap_or("?"));
    let mut lines = vec![format!("{name}: {reads} reads and {writes} writes in flight")];
    let debug = sys.join("kernel/debug/block").join(&name);
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    let state = read(debug.join("state"));
    if !state.is_empty() {
        lines.push(format!("{name}: state {}", state.trim()));
    }
    let mut queues: Vec<_> = fs::read_dir(&debug)
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    queues.retain(|queue: &String| queue.starts_with("hctx"));
    queues.sort();
    for queue in queues {
        let busy = read(debug.join(&queue).join("busy"));
        // The address before the bracket is no use to anybody.
        let requests = busy.lines().filter_map(|line| line.find('{').map(|at| &line[at..]));
        lines.extend(requests.take(REQUESTS_MAX).map(|request| format!("{name}: {queue}: {request}")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_block_layer_has_in_hand_is_told() {
        let sys = tempfile::tempdir().expect("a directory");
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent"))
                .and_then(|()| fs::write(&path, text))
                .expect("write");
        };
        assert_eq!(block_layer(sys.path(), 3), ["ublkb3 does not exist"]);
        write("block/ublkb3/inflight", "       2        1\n");
        assert_eq!(block_layer(sys.path(), 3), ["ublkb3: 2 reads and 1 writes in flight"]);
        write("kernel/debug/block/ublkb3/state", "SAME_COMP|INIT_DONE\n");
        write("kernel/debug/block/ublkb3/hctx0/busy", "00000000a1a5ea56 {.op=READ, .tag=96}\n");
        let told = block_layer(sys.path(), 3);
        assert_eq!(told[1..], ["ublkb3: state SAME_COMP|INIT_DONE", "ublkb3: hctx0: {.op=READ, .tag=96}"]);
    }

    #[test]
    fn alarms_come_before_the_tail_of_the_log() {
        let record = |text: &str| Record { text: text.to_owned(), ..Record::default() };
        let mut records: Vec<_> = (0..100).map(|at| record(&format!("line {at}"))).collect();
        records[3] = record("BUG: kernel NULL pointer dereference");
        let lines = said(&records);
        assert_eq!(lines.len(), 41);
        assert_eq!(lines[0], "alarm: BUG: kernel NULL pointer dereference");
        assert!(lines[40].ends_with("line 99"));
        assert_eq!(said(&[]).len(), 1);
    }
}
