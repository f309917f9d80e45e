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
    /// Its number since boot.
    pub sequence: u64,
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
        let (priority, sequence, microseconds) = (number()?, number()?, number()?);
        // Properties of the message stand in lines of their own, each behind a space.
        let text = rest.split('\n').take_while(|line| !line.starts_with(' ')).collect::<Vec<_>>().join("\n");
        let facility = u8::try_from(priority >> 3).ok()?;
        Some(Self { facility, sequence, microseconds, text: text.trim_end().to_owned() })
    }

    /// What it is an alarm of, if it is one.
    #[must_use]
    pub fn alarm(&self) -> Option<Alarm> {
        // Daemons, such as udev's, have warnings of their own.
        if self.facility > 1 {
            return None;
        }
        let has = |part: &&str| self.text.contains(*part);
        if LOST_WRITES.iter().any(has) {
            return Some(Alarm::LostWrite);
        }
        if IO_ERRORS.iter().any(has) {
            return Some(Alarm::IoError);
        }
        KERNEL.iter().find(|(part, _)| has(part)).map(|(_, alarm)| *alarm)
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
    /// It stopped in the middle of something: a BUG, an oops, a fault, a panic.
    Crash,
    /// Something has not gone on for long: a hung task, a lockup, a stall of RCU.
    Stuck,
    /// Locks are taken in an order that can deadlock.
    Locks,
    /// Something is not as it has to be.
    Warning,
    /// What was written to a page was lost.
    LostWrite,
    /// A device failed.
    IoError,
}

impl Alarm {
    /// Whether a device that fails as it was told to is the cause.
    #[must_use]
    pub const fn is_of_io(self) -> bool {
        matches!(self, Self::LostWrite | Self::IoError)
    }
}

const LOST_WRITES: [&str; 2] = ["lost async page write", "lost sync page write"];
const IO_ERRORS: [&str; 2] = ["Buffer I/O error", "I/O error, dev "];

/// What stands in an alarm; the first that is there says what it is.
const KERNEL: [(&str, Alarm); 22] = [
    ("possible circular locking", Alarm::Locks),
    ("possible recursive locking", Alarm::Locks),
    ("possible irq lock inversion", Alarm::Locks),
    ("inconsistent lock state", Alarm::Locks),
    ("held lock freed", Alarm::Locks),
    ("suspicious RCU usage", Alarm::Locks),
    ("sleeping function called from invalid context", Alarm::Locks),
    ("blocked for more than", Alarm::Stuck),
    ("soft lockup", Alarm::Stuck),
    ("hard LOCKUP", Alarm::Stuck),
    ("self-detected stall", Alarm::Stuck),
    ("detected stalls on CPUs", Alarm::Stuck),
    ("detected expedited stalls", Alarm::Stuck),
    ("rcu: INFO:", Alarm::Stuck),
    ("Kernel panic", Alarm::Crash),
    ("kernel BUG at", Alarm::Crash),
    ("BUG:", Alarm::Crash),
    ("Oops", Alarm::Crash),
    ("general protection fault", Alarm::Crash),
    ("Unable to handle kernel", Alarm::Crash),
    ("UBSAN:", Alarm::Warning),
    ("WARNING:", Alarm::Warning),
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
        if alarm.is_of_io() && !io || at < told_until {
            continue;
        }
        let end = end_of(records, at);
        // An I/O error is one line, and the next one is another.
        let end = if alarm.is_of_io() { at + 1 } else { end };
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
        let expected = Record {
            facility: 0,
            sequence: 1071,
            microseconds: 25_031_807,
            text: "ublk: a word; another".to_owned(),
        };
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
            ("WARNING: CPU: 1 PID: 214 at block/blk-mq.c:305 blk_mq_unquiesce_queue+0x8a/0xa0", Some(Alarm::Warning)),
            (
                "WARNING: drivers/block/ublk_drv.c:1422 at ublk_commit_completion+0x1b2/0x1c0, CPU#0: q/91",
                Some(Alarm::Warning),
            ),
            ("WARNING: possible circular locking dependency detected", Some(Alarm::Locks)),
            ("WARNING: possible recursive locking detected", Some(Alarm::Locks)),
            ("BUG: sleeping function called from invalid context at kernel/locking/mutex.c:585", Some(Alarm::Locks)),
            ("BUG: kernel NULL pointer dereference, address: 0000000000000010", Some(Alarm::Crash)),
            ("BUG: KASAN: slab-use-after-free in ublk_cancel_cmd+0x52/0x1b0", Some(Alarm::Crash)),
            ("kernel BUG at lib/list_debug.c:62!", Some(Alarm::Crash)),
            (
                "Oops: general protection fault, probably for non-canonical address 0xdead000000000122: 0000 [#1] SMP NOPTI",
                Some(Alarm::Crash),
            ),
            ("Unable to handle kernel paging request at virtual address dead000000000108", Some(Alarm::Crash)),
            ("INFO: task ublk-torture:512 blocked for more than 120 seconds.", Some(Alarm::Stuck)),
            ("watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [ublk-q0:311]", Some(Alarm::Stuck)),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", Some(Alarm::Stuck)),
            ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", Some(Alarm::Stuck)),
            ("Buffer I/O error on dev ublkb0, logical block 16383, lost async page write", Some(Alarm::LostWrite)),
            ("Buffer I/O error on dev ublkb0, logical block 0, async page read", Some(Alarm::IoError)),
            (
                "I/O error, dev ublkb0, sector 8 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2",
                Some(Alarm::IoError),
            ),
            ("EXT4-fs (ublkb0): mounted filesystem 4e1c with ordered data mode. Quota mode: none.", None),
            ("clocksource: Long readout interval, skipping watchdog check: cs_nsec: 1003 wd_nsec: 1004", None),
            ("ublkb0: detected capacity change from 0 to 131072", None),
        ];
        for (text, alarm) in samples {
            assert_eq!(records(&[text])[0].alarm(), alarm, "{text}");
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
        assert_eq!(found.iter().map(|one| one.alarm).collect::<Vec<_>>(), [Alarm::Warning, Alarm::Crash]);
        assert!(found[0].what.starts_with("WARNING: CPU: 0 PID: 9"));
        assert_eq!(found[0].excerpt.len(), 7, "two before, and up to the end of the trace");
        assert!(found[0].excerpt[0].ends_with("something before"));
        // Errors of a device count where none were injected, each by itself.
        let with_io = complaints(&log, true);
        let kinds: Vec<_> = with_io.iter().map(|one| one.alarm).collect();
        assert_eq!(kinds, [Alarm::Warning, Alarm::IoError, Alarm::IoError, Alarm::Crash]);
        assert!(complaints(&[], true).is_empty());
    }
}
