//! What is in flight, and since when: for the report of a hang.
//!
//! It is noted for every operation and read in a hang alone, so noting is what has to be cheap: who has it is put into words
//! when it is told, and those who note at the same time do so in tables of their own.

use std::array;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ublkit_harness::sim::server::TagId;
use ublkit_harness::{OpKind, SectorRange};

use crate::clock::nanoseconds;

/// How many are told, the oldest first.
const TOLD_MAX: usize = 32;
/// How long to try for the locks, which are held for moments only.
const PATIENCE: Duration = Duration::from_millis(200);
/// How many tables there are.
const TABLES: usize = 16;

/// Operations in flight. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight(Arc<Tables>);

#[derive(Debug)]
struct Tables {
    tables: [Mutex<Table>; TABLES],
    used: AtomicBool,
}

impl Default for Tables {
    fn default() -> Self {
        Self { tables: array::from_fn(|_| Mutex::default()), used: AtomicBool::new(false) }
    }
}

#[derive(Debug, Default)]
struct Table {
    flights: Vec<Option<Flight>>,
    /// Places in it that are free.
    free: Vec<usize>,
}

/// In whose hands an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// A worker of the load, with its own number for the operation.
    Worker { worker: u32, op: u64 },
    /// A request of a queue, until it is completed.
    Tag(TagId),
    /// A thread of this process, by its id.
    Thread(i32),
}

thread_local! {
    static THREAD: i32 = nix::unistd::gettid().as_raw();
}

impl Who {
    /// This thread.
    pub(crate) fn this_thread() -> Self {
        Self::Thread(THREAD.with(|id| *id))
    }

    /// The table that it is in.
    fn table(self) -> usize {
        let number = match self {
            Self::Worker { worker, .. } => worker,
            Self::Tag(tag) => tag.queue.into(),
            Self::Thread(id) => id.cast_unsigned(),
        };
        number as usize % TABLES
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker { worker, op } => write!(f, "worker {worker}, operation {op}"),
            Self::Tag(TagId { queue, tag }) => write!(f, "tag {tag} of queue {queue}"),
            Self::Thread(id) => {
                let name = std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap_or_default();
                write!(f, "thread {id} ({})", name.trim_end())
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    who: Who,
    kind: OpKind,
    range: SectorRange,
    began: u64,
}

/// An operation, in flight until this is dropped.
#[derive(Debug)]
pub(crate) struct Noted {
    table: usize,
    place: usize,
    tables: InFlight,
}

impl InFlight {
    fn lock(&self, table: usize) -> MutexGuard<'_, Table> {
        self.0.tables[table].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins that is in the hands of `who`.
    pub(crate) fn begin(&self, who: Who, kind: OpKind, range: SectorRange) -> Noted {
        if !self.was_used() {
            self.0.used.store(true, Ordering::Relaxed);
        }
        let flight = Some(Flight { who, kind, range, began: nanoseconds() });
        let number = who.table();
        let mut table = self.lock(number);
        let place = if let Some(place) = table.free.pop() {
            table.flights[place] = flight;
            place
        } else {
            table.flights.push(flight);
            table.flights.len() - 1
        };
        drop(table);
        Noted { table: number, place, tables: self.clone() }
    }

    /// Whether there ever was one.
    pub(crate) fn was_used(&self) -> bool {
        self.0.used.load(Ordering::Relaxed)
    }

    /// A line for each, the oldest first. To be asked while anything may hang.
    pub(crate) fn tell(&self) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut flights = Vec::new();
        let mut locked = 0;
        for table in &self.0.tables {
            loop {
                match table.try_lock() {
                    Ok(table) => break flights.extend(table.flights.iter().flatten().copied()),
                    Err(TryLockError::Poisoned(poisoned)) => {
                        break flights.extend(poisoned.into_inner().flights.iter().flatten().copied());
                    }
                    Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(TryLockError::WouldBlock) => break locked += 1,
                }
            }
        }
        flights.sort_by_key(|flight| flight.began);
        let now = nanoseconds();
        let mut lines: Vec<_> = flights.iter().take(TOLD_MAX).map(|flight| flight.line(now)).collect();
        match flights.len() {
            0 if locked == 0 => lines.push("nothing in flight".to_owned()),
            all if all > TOLD_MAX => lines.push(format!("and {} younger ones", all - TOLD_MAX)),
            _ => {}
        }
        if locked > 0 {
            lines.push(format!("there may be more: {locked} of {TABLES} tables are locked for good"));
        }
        lines
    }
}

impl Flight {
    fn line(&self, now: u64) -> String {
        let Self { who, kind, range, began } = self;
        let age = Duration::from_nanos(now.saturating_sub(*began)).as_secs_f64();
        let place = if *kind == OpKind::Flush { String::new() } else { format!(" of sectors {range}") };
        format!("{kind}{place}, in flight for {age:.1} s, {who}")
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        let mut table = self.tables.lock(self.table);
        table.flights[self.place] = None;
        table.free.push(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(worker: u32) -> Who {
        Who::Worker { worker, op: 7 }
    }

    #[test]
    fn what_is_in_flight_is_told_and_what_has_ended_is_not() {
        let in_flight = InFlight::default();
        assert_eq!(in_flight.tell(), ["nothing in flight"]);
        assert!(!in_flight.was_used());
        // The older one in a later table.
        let write = in_flight.begin(worker(3), OpKind::Write, SectorRange::new(8, 4));
        let tag = Who::Tag(TagId { queue: 0, tag: 5 });
        let flush = in_flight.begin(tag, OpKind::Flush, SectorRange::new(0, 0));
        let told = in_flight.tell();
        assert!(told[0].starts_with("write of sectors 8+4, in flight for 0."), "{told:?}");
        assert!(told[0].ends_with(" s, worker 3, operation 7"), "{told:?}");
        assert!(told[1].starts_with("flush, in flight for 0.") && told[1].ends_with(&tag.to_string()), "{told:?}");
        drop(write);
        assert_eq!(in_flight.tell().len(), 1);
        drop(flush);
        assert_eq!(in_flight.tell(), ["nothing in flight"]);
        let many: Vec<_> =
            (0..40).map(|at| in_flight.begin(worker(1), OpKind::Read, SectorRange::new(at, 1))).collect();
        assert_eq!(in_flight.tell().last().map(String::as_str), Some("and 8 younger ones"));
        drop(many);
        assert!(in_flight.was_used());
    }

    #[test]
    fn places_are_taken_again() {
        let in_flight = InFlight::default();
        for at in 0..1000 {
            let _noted = in_flight.begin(worker(1), OpKind::Read, SectorRange::new(at, 1));
        }
        assert_eq!(in_flight.lock(worker(1).table()).flights.len(), 1);
    }

    #[test]
    fn a_thread_is_told_by_its_name() {
        let thread = std::thread::Builder::new().name("my-queue".to_owned()).spawn(|| Who::this_thread().to_string());
        let told = thread.expect("a thread").join().expect("its name");
        assert!(told.ends_with("(my-queue)"), "{told}");
    }

    #[test]
    fn a_lock_that_is_never_released_holds_nobody_up() {
        let in_flight = InFlight::default();
        let _noted = in_flight.begin(worker(2), OpKind::Read, SectorRange::new(0, 1));
        let _held = in_flight.lock(worker(1).table());
        let told = in_flight.tell();
        assert!(told[0].starts_with("read of sectors"), "{told:?}");
        assert_eq!(told[1], "there may be more: 1 of 16 tables are locked for good");
    }
}
