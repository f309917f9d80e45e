//! One cycle: start a device, write to it, read it back, close it; and where the time of that goes.
//!
//! All of it takes place in one process. A process that waits in the kernel for I/O of a device that it serves itself cannot be
//! killed, so the I/O goes through a ring: whoever waits for that can be.

use std::collections::BTreeMap;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::libc;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use ublkit::backends::Memory;
use ublkit::{BlockClient, Closed, Controller, Deletion, Device, Event, Phase, WriteFlags};
use ublkit_harness::{Generation, Pattern, SECTOR, Seed};

use super::disk::Disk;
use super::protocol::{Plant, Trouble};
use crate::clock::nanoseconds;

/// Bytes that a cycle writes.
pub(super) const BLOCK: usize = 4096;
/// How large a cycle's device is.
pub(super) const DEVICE_BYTES: u64 = 1 << 20;
/// Where a cycle that leaves dirty pages leaves them.
const DIRTY_AT: u64 = DEVICE_BYTES - BLOCK as u64;
/// How long a read or write may take.
const IO_DEADLINE: Duration = Duration::from_secs(30);
/// How long closing waits for whoever looks at a new disk, udev above all.
const DELETE_DEADLINE: Duration = Duration::from_secs(30);
/// How many phases there are.
const PHASES: usize = Phase::Deleted as usize + 1;

/// Where the time of cycles goes: nanoseconds of all of them together, by part, in the order of a cycle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Costs {
    pub(super) cycles: u64,
    pub(super) wall: u64,
    /// At most so much of it was spent in our own code: see [`own_permille`](Self::own_permille).
    pub(super) own: u64,
    /// Processor time of this process, the kernel's on its behalf among it.
    pub(super) processor: u64,
    pub(super) parts: Vec<(String, u64)>,
    /// The shortest cycle and the longest.
    pub(super) shortest: u64,
    pub(super) longest: u64,
}

impl Costs {
    /// Adds a cycle of which the parts are known.
    fn add(&mut self, wall: u64, own: u64, processor: u64, parts: &[(&str, u64)]) {
        self.shortest = if self.cycles == 0 { wall } else { self.shortest.min(wall) };
        self.longest = self.longest.max(wall);
        self.cycles += 1;
        self.wall += wall;
        self.own += own;
        self.processor += processor;
        for (name, nanoseconds) in parts {
            match self.parts.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += nanoseconds,
                None => self.parts.push(((*name).to_owned(), *nanoseconds)),
            }
        }
    }

    /// Nanoseconds that a cycle takes.
    pub(super) fn mean(&self) -> u64 {
        self.wall / self.cycles.max(1)
    }

    /// How much of the time is our own code's, at most, in thousandths: the processor time of all that lies between the control
    /// commands and the I/O, the system calls of setting queues up and of taking them down among it. (The kernel's own
    /// accounts of time in user space are samples taken at its ticks, which is just when nothing of ours runs.)
    pub(super) fn own_permille(&self) -> u64 {
        self.own * 1000 / self.wall.max(1)
    }

    /// A table for people.
    pub(super) fn table(&self) -> Vec<String> {
        let cycles = self.cycles.max(1);
        let line = |name: &str, sum: u64| {
            let mean = sum as f64 / cycles as f64 / 1e6;
            format!("{name:<42} {mean:>9.3} ms {:>5.1} %", sum as f64 * 100.0 / self.wall.max(1) as f64)
        };
        let mut lines: Vec<String> = self.parts.iter().map(|(name, sum)| line(name, *sum)).collect();
        lines.push(line("a cycle", self.wall));
        lines.push(line("of it, processor time of our process", self.processor));
        lines.push(line("of it, our own code, set-up calls included", self.own));
        lines
    }
}

/// When the device came to each phase; and what is kept open until it is stopped.
#[derive(Debug, Default)]
struct Marks {
    at: [AtomicU64; PHASES],
    /// Processor time of this process by then.
    processor: [AtomicU64; PHASES],
    held: Mutex<Option<File>>,
    trouble: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Marks {
    fn at(&self, phase: Phase) -> u64 {
        self.at[phase as usize].load(Ordering::SeqCst)
    }

    /// When, and after how much processor time.
    fn point(&self, phase: Phase) -> Point {
        Point { at: self.at(phase), processor: self.processor[phase as usize].load(Ordering::SeqCst) }
    }

    fn hear(&self, event: &Event, disk: &Disk) {
        match event {
            Event::Phase(phase) => {
                self.at[*phase as usize].store(nanoseconds(), Ordering::SeqCst);
                self.processor[*phase as usize].store(processor_time(), Ordering::SeqCst);
                match phase {
                    Phase::Stopping => disk.stopping(),
                    // Written back by now. Whoever holds it any longer holds up its deletion.
                    Phase::Stopped => drop(lock(&self.held).take()),
                    _ => {}
                }
            }
            other => {
                lock(&self.trouble).get_or_insert_with(|| other.to_string());
            }
        }
    }
}

/// What a cycle did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cycled {
    pub(super) id: u32,
    pub(super) bytes_verified: u64,
    pub(super) deferred: bool,
}

/// What is special about a cycle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cycle {
    /// Dirty pages are left to the close.
    pub(super) dirty: bool,
    /// It is in the costs, unless it is dirty.
    pub(super) counted: bool,
}

/// Does cycles.
#[derive(Debug)]
pub(super) struct Cycler {
    pub(super) seed: Seed,
    pub(super) plant: Option<Plant>,
    pub(super) costs: Costs,
}

impl Cycler {
    /// Cycle number `number`. `made` is told the id of the device once there is one.
    pub(super) fn cycle(&mut self, number: u64, kind: Cycle, made: &dyn Fn(u32)) -> Result<Cycled, Trouble> {
        let memory = Arc::new(Memory::new(DEVICE_BYTES));
        let disk = Arc::new(Disk::new(Arc::clone(&memory), Duration::ZERO, self.plant));
        let marks = Arc::new(Marks::default());
        let pattern = Pattern::new(self.seed.derive("cycle", number), 0);
        let generation = 1 + (number % 1000) as Generation;
        let first_lba = self.seed.derive("place", number).rng().below(DEVICE_BYTES / BLOCK as u64 - 1) * 8;
        let mut expected = vec![0; BLOCK];
        pattern.fill(&mut expected, first_lba, |_| generation);

        let beginning = Point::now();
        let (told, watched) = (Arc::clone(&marks), Arc::clone(&disk));
        let device = Device::builder(Arc::clone(&disk))
            .delete_deadline(DELETE_DEADLINE)
            .on_event(move |event| told.hear(event, &watched))
            .start()?;
        let started = Point::now();
        let id = device.id();
        made(id);
        let io = write_and_read(&device.path(), first_lba * SECTOR as u64, &expected)?;
        if !io.sound {
            return Err(Trouble::broke(
                "content",
                format!("cycle {number}: sector {first_lba}: what was written is not what another opening reads"),
            ));
        }
        let left = if kind.dirty { Some(leave_dirty(&device.path(), &marks)?) } else { None };
        let close_begin = Point::now();
        let Closed { deletion, .. } = device.close()?;
        let closed = nanoseconds();
        let controller = Arc::clone(device.controller());
        drop(device);
        let ending = Point::now();
        if let Some(trouble) = lock(&marks.trouble).take() {
            return Err(Trouble::broke("server", format!("cycle {number}: {trouble}")));
        }
        let mut bytes_verified = BLOCK as u64;
        if let Some(page) = left {
            let mut stored = vec![0; BLOCK];
            ublkit::Backend::read_at(&*memory, &mut stored, DIRTY_AT)
                .map_err(|error| io_error("read the storage", &error))?;
            if stored != page {
                let what = format!(
                    "cycle {number}: a dirty page at {DIRTY_AT} was left to the close and did not reach the storage"
                );
                return Err(Trouble::broke("writeback", what));
            }
            bytes_verified += BLOCK as u64;
        } else if kind.counted {
            let times = Times { beginning, started, io, close_begin, closed, ending };
            self.count(&times, &marks, &controller);
        }
        Ok(Cycled { id, bytes_verified, deferred: deletion != Deletion::Complete })
    }

    /// Adds a cycle to the costs.
    fn count(&mut self, times: &Times, marks: &Marks, controller: &Controller) {
        let Times { beginning, started, io, close_begin, closed, ending } = times;
        let command: BTreeMap<&str, u64> =
            controller.costs().iter().map(|cost| (cost.command, cost.total.as_nanos() as u64)).collect();
        let spent = |name: &str| command.get(name).copied().unwrap_or(0);
        let between = |from: u64, to: u64| to.saturating_sub(from);
        let at = |phase| marks.at(phase);
        let parts = [
            ("GET_FEATURES", spent("GET_FEATURES")),
            ("ADD_DEV", spent("ADD_DEV")),
            ("control device and its ring", {
                between(beginning.at, at(Phase::Added)).saturating_sub(spent("ADD_DEV") + spent("GET_FEATURES"))
            }),
            ("SET_PARAMS", spent("SET_PARAMS")),
            ("character node there and open", {
                between(at(Phase::Added), at(Phase::Configured)).saturating_sub(spent("SET_PARAMS"))
            }),
            ("queue: thread, affinity, ring, maps, FETCH", between(at(Phase::Configured), at(Phase::Fetched))),
            ("START_DEV", spent("START_DEV")),
            ("block node there", between(at(Phase::Fetched), started.at).saturating_sub(spent("START_DEV"))),
            ("open past the page cache", between(started.at, io.opened)),
            ("write 4 KiB", between(io.opened, io.written)),
            ("close, open again", between(io.written, io.reopened)),
            ("read 4 KiB and compare", between(io.reopened, io.read.at)),
            ("close the second opening", between(io.read.at, close_begin.at)),
            ("sign of life of the queue", between(close_begin.at, at(Phase::Stopping))),
            ("STOP_DEV", spent("STOP_DEV")),
            ("threads, rings and maps gone", {
                between(at(Phase::Stopping), at(Phase::Joined)).saturating_sub(spent("STOP_DEV"))
            }),
            ("DEL_DEV", spent("DEL_DEV")),
            ("the rest", {
                between(at(Phase::Joined), *closed).saturating_sub(spent("DEL_DEV")) + between(*closed, ending.at)
            }),
        ];
        let point = |phase| marks.point(phase);
        let own = beginning.own_until(point(Phase::Added), spent("ADD_DEV") + spent("GET_FEATURES"))
            + point(Phase::Added).own_until(point(Phase::Configured), spent("SET_PARAMS"))
            + point(Phase::Configured).own_until(point(Phase::Fetched), 0)
            + point(Phase::Fetched).own_until(*started, spent("START_DEV"))
            + io.read.own_until(*close_begin, 0)
            + close_begin.own_until(point(Phase::Stopping), 0)
            + point(Phase::Stopping).own_until(point(Phase::Joined), spent("STOP_DEV"))
            + point(Phase::Joined).own_until(*ending, spent("DEL_DEV"));
        let processor = ending.processor.saturating_sub(beginning.processor);
        self.costs.add(ending.at - beginning.at, own, processor, &parts);
    }
}

/// The moments of a cycle that the library does not tell of.
struct Times {
    beginning: Point,
    started: Point,
    io: Io,
    close_begin: Point,
    closed: u64,
    ending: Point,
}

/// How writing and reading went.
struct Io {
    opened: u64,
    written: u64,
    reopened: u64,
    read: Point,
    /// What was read is what was written.
    sound: bool,
}

/// Writes `expected` through one opening of a device, and reads it through another.
fn write_and_read(path: &Path, offset: u64, expected: &[u8]) -> Result<Io, Trouble> {
    let mut client = open_client(path)?;
    let opened = nanoseconds();
    client.buffer_mut(0)[..BLOCK].copy_from_slice(expected);
    client.write(0, offset, BLOCK, WriteFlags::NONE);
    await_one(&mut client, "write")?;
    let written = nanoseconds();
    drop(client);
    let mut client = open_client(path)?;
    let reopened = nanoseconds();
    client.read(0, offset, BLOCK);
    await_one(&mut client, "read")?;
    let sound = client.buffer(0)[..BLOCK] == *expected;
    Ok(Io { opened, written, reopened, read: Point::now(), sound })
}

/// Dirties a page of a device, which whoever closes the device has to see to, and returns what is in it.
fn leave_dirty(path: &Path, marks: &Marks) -> Result<Vec<u8>, Trouble> {
    let page = vec![0xd1; BLOCK];
    let buffered = OpenOptions::new().read(true).write(true).open(path).map_err(|error| io_error("open", &error))?;
    buffered.write_all_at(&page, DIRTY_AT).map_err(|error| io_error("write through the page cache", &error))?;
    // Closing the last opening would write it back too.
    *lock(&marks.held) = Some(buffered);
    Ok(page)
}

/// A moment of a cycle.
#[derive(Clone, Copy)]
struct Point {
    at: u64,
    processor: u64,
}

impl Point {
    fn now() -> Self {
        Self { at: nanoseconds(), processor: processor_time() }
    }

    /// How much of the time until `end` was our own code's, at most: no more than processors worked, nor than what commands that
    /// took `commands` left of the time.
    fn own_until(self, end: Self, commands: u64) -> u64 {
        let wall = end.at.saturating_sub(self.at).saturating_sub(commands);
        end.processor.saturating_sub(self.processor).min(wall)
    }
}

/// Nanoseconds that processors have worked for this process, in the kernel too.
fn processor_time() -> u64 {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .map_or(0, |now| now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}

pub(super) fn io_error(what: &str, error: &io::Error) -> Trouble {
    Trouble::broke("io", format!("failed to {what}: {error}"))
}

/// A client of the device at `path`, past the page cache.
pub(super) fn open_client(path: &Path) -> Result<BlockClient, Trouble> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(|error| io_error(&format!("open {}", path.display()), &error))?;
    BlockClient::new(file, 1, BLOCK)
        .map_err(|error| Trouble::Environment(format!("failed to set up a ring: {error}")))
}

/// Waits for the one operation under way.
pub(super) fn await_one(client: &mut BlockClient, what: &str) -> Result<(), Trouble> {
    let until = Instant::now() + IO_DEADLINE;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Trouble::Hang(format!("a {what} of a device did not end within {IO_DEADLINE:?}")));
        }
        client.submit_and_wait(1, left).map_err(|error| io_error(what, &error))?;
        match client.next_completion() {
            Some((_, Ok(BLOCK))) => return Ok(()),
            Some((_, Ok(count))) => {
                return Err(Trouble::broke("io", format!("a {what} of {BLOCK} bytes moved {count}")));
            }
            Some((_, Err(error))) => return Err(io_error(what, &error)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_add_up_by_part() {
        let mut costs = Costs::default();
        costs.add(1000, 50, 200, &[("a", 400), ("b", 600)]);
        costs.add(3000, 150, 600, &[("a", 1400), ("b", 1600)]);
        assert_eq!((costs.mean(), costs.own_permille(), costs.shortest, costs.longest), (2000, 50, 1000, 3000));
        assert_eq!(costs.parts, [("a".to_owned(), 1800), ("b".to_owned(), 2200)]);
        assert!(costs.table()[0].contains("45.0 %"), "{:?}", costs.table());
    }
}
