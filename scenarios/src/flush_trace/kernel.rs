//! What the kernel asked of the device, and when: the block layer's own trace points.
//!
//! A trace instance of our own, so that nobody else's tracing is disturbed, with the clock that the processes read. A
//! request counts from the moment the driver got it (`block_rq_issue`) until the block layer was told of its end
//! (`block_rq_complete`). Times are in whole microseconds, rounded down: that is how the kernel prints them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde::Serialize;
use ublkit_harness::{OpKind, SECTOR};

use crate::scenario::Failure;

/// Where tracefs is mounted, as a rule.
const MOUNTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
const EVENTS: [&str; 3] = ["block_rq_issue", "block_rq_complete", "block_rq_requeue"];

/// A request, from when the driver got it to when it was complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Request {
    pub(super) kind: OpKind,
    /// Nanoseconds, as [`nanoseconds`](crate::clock::nanoseconds) counts them.
    pub(super) issued: u64,
    /// `None` while it is under way.
    pub(super) completed: Option<u64>,
    /// Bytes; both 0 for a flush.
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) error: i32,
}

/// Requests of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Requests {
    /// In the order in which they were issued.
    pub(super) all: Vec<Request>,
    /// Events that the kernel had no room for.
    pub(super) lost: u64,
}

/// A trace of one device's requests. Removed when dropped.
#[derive(Debug)]
pub(super) struct Trace {
    dir: PathBuf,
    device: String,
}

impl Trace {
    /// Starts tracing requests to a block device.
    pub(super) fn start(device: &Path) -> Result<Self, Failure> {
        let root = MOUNTS.map(PathBuf::from).into_iter().find(|root| root.join("instances").is_dir());
        let root = root.ok_or_else(|| {
            Failure::Environment(
                "tracefs is not mounted: `mount -t tracefs tracefs /sys/kernel/tracing` (CONFIG_FTRACE)".to_owned(),
            )
        })?;
        remove_those_of_the_dead(&root.join("instances"));
        let number = fs::metadata(device)
            .map_err(|error| Failure::io(format_args!("look at {}", device.display()), &error))?;
        let (major, minor) = (major(number.rdev()), minor(number.rdev()));
        let dir = root.join("instances").join(format!("ublk-torture-{}", std::process::id()));
        let cannot = |what: &Path, error: &io::Error| {
            Failure::Environment(format!(
                "failed to trace the block layer ({}): {error}; it takes root and CONFIG_BLK_DEV_IO_TRACE",
                what.display()
            ))
        };
        fs::create_dir(&dir).map_err(|error| cannot(&dir, &error))?;
        let this = Self { dir, device: format!("{major},{minor}") };
        // The kernel's own number of a device has 20 bits for the minor part.
        let filter = format!("dev == {}", major << 20 | minor);
        let mut settings = vec![
            ("tracing_on".to_owned(), "0".to_owned()),
            ("trace_clock".to_owned(), "mono".to_owned()),
            ("buffer_size_kb".to_owned(), "4096".to_owned()),
        ];
        for event in EVENTS {
            settings.push((format!("events/block/{event}/filter"), filter.clone()));
            settings.push((format!("events/block/{event}/enable"), "1".to_owned()));
        }
        settings.push(("tracing_on".to_owned(), "1".to_owned()));
        for (file, value) in settings {
            let file = this.dir.join(file);
            fs::write(&file, value).map_err(|error| cannot(&file, &error))?;
        }
        Ok(this)
    }

    /// Every request until now.
    pub(super) fn requests(&self) -> Result<Requests, Failure> {
        let read = |file: &Path| {
            fs::read_to_string(file)
                .map_err(|error| Failure::Environment(format!("failed to read {}: {error}", file.display())))
        };
        let all = parse(&read(&self.dir.join("trace"))?, &self.device)?;
        let mut lost = 0;
        let cpus = fs::read_dir(self.dir.join("per_cpu"))
            .map_err(|error| Failure::Environment(format!("failed to list the trace's processors: {error}")))?;
        for cpu in cpus.flatten() {
            let stats = read(&cpu.path().join("stats"))?;
            lost += stats
                .lines()
                .filter_map(|line| line.split_once(": "))
                .filter(|(name, _)| matches!(*name, "overrun" | "commit overrun" | "dropped events"))
                .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
                .sum::<u64>();
        }
        Ok(Requests { all, lost })
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Best effort; the next run removes it once this process is gone.
        let _ = fs::write(self.dir.join("tracing_on"), "0");
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Removes instances of runs that were killed.
fn remove_those_of_the_dead(instances: &Path) {
    let Ok(entries) = fs::read_dir(instances) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("ublk-torture-"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whoever keeps it busy may have it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Requests in the text of a trace, such as
/// `  kworker/0:1H-198     [000] .....    14.235332: block_rq_issue: 259,0 WFS 4096 () 2048 + 8 be,0,4 [kworker/0:1H]`.
fn parse(text: &str, device: &str) -> Result<Vec<Request>, Failure> {
    let mut all: Vec<Request> = Vec::new();
    // By kind of operation and place, those under way, oldest first.
    let mut under_way: HashMap<(OpKind, u64), Vec<usize>> = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((head, event, rest)) = EVENTS.iter().find_map(|event| {
            let (head, rest) = line.split_once(&format!(": {event}: "))?;
            Some((head, *event, rest))
        }) else {
            continue;
        };
        let unclear = || Failure::Internal(format!("a line of the kernel's trace is not understood: {line}"));
        let Some(rest) = rest.strip_prefix(device).and_then(|rest| rest.strip_prefix(' ')) else { continue };
        let at = microseconds(head).ok_or_else(unclear)? * 1000;
        let (rwbs, rest) = rest.split_once(' ').ok_or_else(unclear)?;
        let kind = kind(rwbs).ok_or_else(unclear)?;
        // The command in brackets is only there for what is no read or write.
        let (_, place) = rest.split_once(") ").ok_or_else(unclear)?;
        let mut numbers = place.split(' ');
        let sector: u64 = numbers.next().and_then(|sector| sector.parse().ok()).ok_or_else(unclear)?;
        let sectors: u64 = numbers.nth(1).and_then(|sectors| sectors.parse().ok()).ok_or_else(unclear)?;
        let sector = if kind == OpKind::Flush { 0 } else { sector };
        let those = under_way.entry((kind, sector)).or_default();
        if event == "block_rq_issue" {
            those.push(all.len());
            let (offset, len) = (sector * SECTOR as u64, sectors * SECTOR as u64);
            all.push(Request { kind, issued: at, completed: None, offset, len, error: 0 });
        } else if !those.is_empty() {
            let request = those.remove(0);
            if event == "block_rq_requeue" {
                // It will be issued again: as far as the server goes, it begins then.
                all[request].len = u64::MAX;
            } else {
                let error = place.rsplit_once('[').and_then(|(_, error)| error.trim_end_matches(']').parse().ok());
                all[request].completed = Some(at);
                all[request].error = error.unwrap_or(0);
            }
        }
    }
    all.retain(|request| request.len != u64::MAX);
    all.sort_by_key(|request| request.issued);
    Ok(all)
}

/// The time at the end of what comes before an event's name, in microseconds.
fn microseconds(head: &str) -> Option<u64> {
    let (seconds, fraction) = head.rsplit(' ').next()?.split_once('.')?;
    (fraction.len() == 6).then_some(())?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000 + fraction.parse::<u64>().ok()?)
}

/// The operation in the block layer's short form: an F for a flush before it, then the operation, then flags, among them an
/// F for FUA (`blk_fill_rwbs`, `kernel/trace/blktrace.c`).
fn kind(rwbs: &str) -> Option<OpKind> {
    if rwbs.starts_with("FF") || rwbs == "F" {
        return Some(OpKind::Flush);
    }
    let operation = rwbs.strip_prefix('F').unwrap_or(rwbs);
    let (first, flags) = operation.split_at_checked(1)?;
    match first {
        "R" => Some(OpKind::Read),
        "W" if flags.starts_with('Z') => Some(OpKind::WriteZeroes),
        "W" if flags.contains('F') => Some(OpKind::WriteFua),
        "W" => Some(OpKind::Write),
        "D" => Some(OpKind::Discard),
        // What older kernels call write-zeroes: nothing that they have a letter for.
        "N" => Some(OpKind::WriteZeroes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
    kworker/0:1H-198     [000] .....    14.193429: block_rq_issue: 259,0 WZS 1024 () 30779 + 2 be,0,4 [kworker/0:1H]
    kworker/0:1H-198     [000] .....    14.200000: block_rq_issue: 259,0 WFS 4096 () 2048 + 8 be,0,4 [a b]
        ublk0-q0-191     [000] b....    14.194243: block_rq_complete: 259,0 WZS () 30779 + 2 be,0,4 [0]
    kworker/0:1H-198     [000] .....    14.235332: block_rq_issue: 259,0 FF 0 () 0 + 0 none,0,0 [kworker/0:1H]
        ublk0-q0-191     [000] b....    14.240000: block_rq_complete: 259,0 WFS () 2048 + 8 be,0,4 [-5]
        ublk0-q0-191     [000] b....    14.374757: block_rq_complete: 259,0 FF () 18446744073709551615 + 0 none,0,0 [0]
 x-9 [001] ..... 15.000000: block_rq_issue: 8,0 R 4096 () 0 + 8 none,0,0 [x]
 x-9 [001] ..... 15.000001: block_rq_issue: 259,0 RA 4096 () 0 + 8 none,0,0 [x]
 x-9 [001] ..... 15.000002: block_rq_requeue: 259,0 RA () 0 + 8 none,0,0 [0]
 x-9 [001] ..... 15.000003: block_rq_issue: 259,0 RA 4096 () 0 + 8 none,0,0 [x]
";

    #[test]
    fn a_trace_is_read() {
        let all = parse(TRACE, "259,0").expect("understood");
        let request = |kind, issued: u64, completed: Option<u64>, offset, len, error| Request {
            kind,
            issued: issued * 1000,
            completed: completed.map(|at| at * 1000),
            offset,
            len,
            error,
        };
        let expected = [
            request(OpKind::WriteZeroes, 14_193_429, Some(14_194_243), 30779 * 512, 1024, 0),
            request(OpKind::WriteFua, 14_200_000, Some(14_240_000), 2048 * 512, 4096, -5),
            request(OpKind::Flush, 14_235_332, Some(14_374_757), 0, 0, 0),
            request(OpKind::Read, 15_000_003, None, 0, 4096, 0),
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn a_line_that_is_not_understood_is_no_silence() {
        let line = "x-9 [001] ..... 15.000001: block_rq_issue: 259,0 Q 4096 () 0 + 8 none,0,0 [x]";
        assert!(parse(line, "259,0").is_err());
    }
}
