//! What the kernel said, and what of it a sound kernel never says.
//!
//! Records are those of `/dev/kmsg` (`Documentation/ABI/testing/dev-kmsg`): this reads their text and opens nothing.

use std::fmt;

/// Lines before the alarm, and behind it, that are kept: a trace is some thirty lines long.
const BEFORE: usize = 2;
const AFTER: usize = 40;

/// One record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Who wrote it, as syslog counts: 0 the kernel, 1 a user program, 3 a daemon, …
    pub facility: u8,
    /// When, in microseconds since boot.
    pub microseconds: u64,
    /// Its text, in one line mostly.
    pub text: String,
}

impl Record {
    /// Reads one record: `6,1234,5678901,-;text`, and lines of properties, which are left out.
    #[must_use]
    pub fn parse(record: &str) -> Option<Self> {
        let (head, rest) = record.split_once(';')?;
        let mut fields = head.split(',');
        let mut number = || fields.next()?.parse::<u64>().ok();
        let (priority, _sequence, microseconds) = (number()?, number()?, number()?);
        // Properties of the message stand in lines of their own, each behind a space.
        let text = rest.split('\n').take_while(|line| !line.starts_with(' ')).collect::<Vec<_>>().join("\n");
        let facility = u8::try_from(priority >> 3).ok()?;
        Some(Self { facility, microseconds, text: text.trim_end().to_owned() })
    }

    /// What it is an alarm of, if it is one.
    #[must_use]
    pub fn alarm(&self) -> Option<Alarm> {
        // Daemons, such as udev's, have warnings of their own.
        if self.facility > 1 {
            return None;
        }
        let has = |part: &&str| self.text.contains(*part);
        if IO.iter().any(has) {
            return Some(Alarm::Io);
        }
        KERNEL.iter().any(has).then_some(Alarm::Kernel)
    }
}

/// As `dmesg` prints it.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, rest) = (self.microseconds / 1_000_000, self.microseconds % 1_000_000);
        write!(f, "[{seconds:5}.{rest:06}] {}", self.text)
    }
}

/// What the kernel complains of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// Its own state: an oops, a hung task, locks in an order that can deadlock, a warning.
    Kernel,
    /// A device that fails, or what was written to a page and is lost. That is right where errors are made on purpose.
    Io,
}

/// What stands in a record that tells of a device.
const IO: [&str; 4] = ["lost async page write", "lost sync page write", "Buffer I/O error", "I/O error, dev "];

/// What stands in a record that a sound kernel never writes.
const KERNEL: [&str; 22] = [
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "held lock freed",
    "suspicious RCU usage",
    "sleeping function called from invalid context",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "self-detected stall",
    "detected stalls on CPUs",
    "detected expedited stalls",
    "rcu: INFO:",
    "Kernel panic",
    "kernel BUG at",
    "BUG:",
    "Oops",
    "general protection fault",
    "Unable to handle kernel",
    "UBSAN:",
    "WARNING:",
];

/// An alarm, with what stands around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// What kind it is.
    pub alarm: Alarm,
    /// The record that says so, without its time.
    pub what: String,
    /// It and its neighbours.
    pub excerpt: Vec<String>,
}

/// Every alarm in `records`, the ones of I/O only if `io` is set. What stands in the excerpt of an alarm is not one more:
/// a warning is followed by its own trace.
#[must_use]
pub fn complaints(records: &[Record], io: bool) -> Vec<Complaint> {
    let mut found: Vec<Complaint> = Vec::new();
    let mut told_until = 0;
    for (at, record) in records.iter().enumerate() {
        let Some(alarm) = record.alarm() else { continue };
        if (alarm == Alarm::Io && !io) || at < told_until {
            continue;
        }
        // An I/O error is one line, and the next one is another.
        let end = if alarm == Alarm::Io { at + 1 } else { end_of(records, at) };
        let begin = at.saturating_sub(BEFORE).max(told_until);
        let excerpt = records[begin..end].iter().map(ToString::to_string).collect();
        found.push(Complaint { alarm, what: record.text.clone(), excerpt });
        told_until = end;
    }
    found
}

/// Where the trace that begins at `at` ends.
fn end_of(records: &[Record], at: usize) -> usize {
    let last = records.len().min(at + AFTER);
    let end = records[at..last].iter().position(|record| record.text.contains("---[ end trace"));
    end.map_or(last, |end| at + end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(log: &[&str]) -> Vec<Record> {
        let parse = |(at, text): (usize, &&str)| Record::parse(&format!("6,{at},{},-;{text}\n", at * 1000));
        log.iter().enumerate().map(|record| parse(record).expect("a record")).collect()
    }

    #[test]
    fn records_are_read() {
        let record = Record::parse("4,1071,25031807,-;ublk: a word; another\n SUBSYSTEM=block\n DEVICE=b259:0\n");
        let expected = Record { facility: 0, microseconds: 25_031_807, text: "ublk: a word; another".to_owned() };
        assert_eq!(record.as_ref(), Some(&expected));
        assert_eq!(expected.to_string(), "[   25.031807] ublk: a word; another");
        let daemon = Record::parse("30,7,8,c,caller=T1;systemd[1]: WARNING: not the kernel's\n").expect("a record");
        assert_eq!((daemon.facility, daemon.alarm()), (3, None));
        for nonsense in ["", "text", ";", "a,b,c;text", "4,1;text", "99999,1,2,-;text"] {
            assert_eq!(Record::parse(nonsense), None, "{nonsense}");
        }
    }

    /// Lines that real kernels printed, and what each is.
    #[test]
    fn alarms_are_told_apart() {
        let samples = [
            ("WARNING: possible irq lock inversion dependency detected", Some(Alarm::Kernel)),
            ("WARNING: inconsistent lock state", Some(Alarm::Kernel)),
            ("WARNING: held lock freed!", Some(Alarm::Kernel)),
            ("WARNING: suspicious RCU usage", Some(Alarm::Kernel)),
            ("watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 1", Some(Alarm::Kernel)),
            ("rcu: INFO: rcu_sched detected expedited stalls on CPUs/tasks: { 1-... }", Some(Alarm::Kernel)),
            ("Kernel panic - not syncing: Fatal exception in interrupt", Some(Alarm::Kernel)),
            ("UBSAN: array-index-out-of-bounds in block/blk-mq.c:83:5", Some(Alarm::Kernel)),
            ("Buffer I/O error on dev ublkb0, logical block 9, lost sync page write", Some(Alarm::Io)),
            ("WARNING: CPU: 1 PID: 214 at block/blk-mq.c:305 blk_mq_unquiesce_queue+0x8a/0xa0", Some(Alarm::Kernel)),
            (
                "WARNING: drivers/block/ublk_drv.c:1422 at ublk_commit_completion+0x1b2/0x1c0, CPU#0: q/91",
                Some(Alarm::Kernel),
            ),
            ("WARNING: possible circular locking dependency detected", Some(Alarm::Kernel)),
            ("WARNING: possible recursive locking detected", Some(Alarm::Kernel)),
            ("BUG: sleeping function called from invalid context at kernel/locking/mutex.c:585", Some(Alarm::Kernel)),
            ("BUG: kernel NULL pointer dereference, address: 0000000000000010", Some(Alarm::Kernel)),
            ("BUG: KASAN: slab-use-after-free in ublk_cancel_cmd+0x52/0x1b0", Some(Alarm::Kernel)),
            ("kernel BUG at lib/list_debug.c:62!", Some(Alarm::Kernel)),
            (
                "Oops: general protection fault, probably for non-canonical address 0xdead000000000122: 0000 [#1] SMP NOPTI",
                Some(Alarm::Kernel),
            ),
            ("Unable to handle kernel paging request at virtual address dead000000000108", Some(Alarm::Kernel)),
            ("INFO: task ublk-torture:512 blocked for more than 120 seconds.", Some(Alarm::Kernel)),
            ("watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [ublk-q0:311]", Some(Alarm::Kernel)),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", Some(Alarm::Kernel)),
            ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", Some(Alarm::Kernel)),
            ("Buffer I/O error on dev ublkb0, logical block 16383, lost async page write", Some(Alarm::Io)),
            ("Buffer I/O error on dev ublkb0, logical block 0, async page read", Some(Alarm::Io)),
            ("I/O error, dev ublkb0, sector 8 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2", Some(Alarm::Io)),
            ("EXT4-fs (ublkb0): mounted filesystem 4e1c with ordered data mode. Quota mode: none.", None),
            ("clocksource: Long readout interval, skipping watchdog check: cs_nsec: 1003 wd_nsec: 1004", None),
            ("ublkb0: detected capacity change from 0 to 131072", None),
        ];
        for (text, alarm) in samples {
            assert_eq!(records(&[text])[0].alarm(), alarm, "{text}");
        }
        for part in KERNEL.iter().chain(&IO) {
            assert!(
                samples.iter().any(|(text, alarm)| alarm.is_some() && text.contains(part)),
                "no sample has {part:?}"
            );
        }
    }

    #[test]
    fn a_trace_is_one_complaint() {
        let log = records(&[
            "something before",
            "------------[ cut here ]------------",
            "WARNING: CPU: 0 PID: 9 at block/genhd.c:731 del_gendisk+0x5/0x9",
            "Modules linked in: ublk_drv",
            "RIP: 0010:del_gendisk+0x5/0x9",
            "WARNING: what stands in a trace is part of it",
            "---[ end trace 0000000000000000 ]---",
            "something behind",
            "I/O error, dev ublkb0, sector 8 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2",
            "I/O error, dev ublkb0, sector 16 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2",
            "BUG: unable to handle page fault for address: ffffffffdeadbeef",
        ]);
        let found = complaints(&log, false);
        assert_eq!(found.iter().map(|one| one.alarm).collect::<Vec<_>>(), [Alarm::Kernel, Alarm::Kernel]);
        assert!(found[0].what.starts_with("WARNING: CPU: 0 PID: 9"));
        assert_eq!(found[0].excerpt.len(), 7, "two before, and up to the end of the trace");
        assert!(found[0].excerpt[0].ends_with("something before"));
        // Errors of a device count where none were injected, each by itself.
        let with_io = complaints(&log, true);
        let kinds: Vec<_> = with_io.iter().map(|one| one.alarm).collect();
        assert_eq!(kinds, [Alarm::Kernel, Alarm::Io, Alarm::Io, Alarm::Kernel]);
        assert!(complaints(&[], true).is_empty());
    }
}
