//! What is in flight, and since when: for the report of a hang.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use ublkit_harness::{OpKind, SectorRange};

use crate::clock::nanoseconds;

/// How many are told, the oldest first.
const TOLD_MAX: usize = 32;
/// How long to try for the lock, which is held for moments only.
const PATIENCE: Duration = Duration::from_millis(200);

/// Operations in flight. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    flights: BTreeMap<u64, Flight>,
}

#[derive(Debug)]
struct Flight {
    who: String,
    kind: OpKind,
    range: SectorRange,
    began: u64,
}

/// An operation, in flight until this is dropped.
#[derive(Debug)]
pub(crate) struct Noted {
    number: u64,
    table: InFlight,
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins that is in the hands of `who`.
    pub(crate) fn begin(&self, who: impl Into<String>, kind: OpKind, range: SectorRange) -> Noted {
        let flight = Flight { who: who.into(), kind, range, began: nanoseconds() };
        let mut table = self.lock();
        let number = table.next;
        table.next += 1;
        table.flights.insert(number, flight);
        drop(table);
        Noted { number, table: self.clone() }
    }

    /// A line for each, the oldest first. To be asked while anything may hang.
    pub(crate) fn tell(&self) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let table = loop {
            match self.0.try_lock() {
                Ok(table) => break table,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TryLockError::WouldBlock) => return vec!["the table is locked for good".to_owned()],
            }
        };
        let now = nanoseconds();
        let mut lines: Vec<_> = table.flights.values().take(TOLD_MAX).map(|flight| flight.line(now)).collect();
        match table.flights.len() {
            0 => lines.push("nothing in flight".to_owned()),
            all if all > TOLD_MAX => lines.push(format!("and {} younger ones", all - TOLD_MAX)),
            _ => {}
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
        self.table.lock().flights.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_flight_is_told_and_what_has_ended_is_not() {
        let in_flight = InFlight::default();
        assert_eq!(in_flight.tell(), ["nothing in flight"]);
        let write = in_flight.begin("worker 1", OpKind::Write, SectorRange::new(8, 4));
        let flush = in_flight.begin("queue 0", OpKind::Flush, SectorRange::new(0, 0));
        let told = in_flight.tell();
        assert!(told[0].starts_with("write of sectors 8+4, in flight for 0."), "{told:?}");
        assert!(told[1].starts_with("flush, in flight for 0.") && told[1].ends_with(" s, queue 0"), "{told:?}");
        drop(write);
        assert_eq!(in_flight.tell().len(), 1);
        drop(flush);
        let many: Vec<_> =
            (0..40).map(|at| in_flight.begin("worker", OpKind::Read, SectorRange::new(at, 1))).collect();
        assert_eq!(in_flight.tell().last().map(String::as_str), Some("and 8 younger ones"));
        drop(many);
    }

    #[test]
    fn a_lock_that_is_never_released_holds_nobody_up() {
        let in_flight = InFlight::default();
        let _held = in_flight.lock();
        assert_eq!(in_flight.tell(), ["the table is locked for good"]);
    }
}
