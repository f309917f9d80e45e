//! A worker's operations, one by one: how they begin, and what their ends mean.

use std::io;
use std::time::Duration;

use ublkit::{WriteFlags, ZeroSpace, blkdev};
use ublkit_harness::{Op, OpKind, Outcome, SectorRange};

use super::Worker;
use crate::clock::nanoseconds;
use crate::in_flight::{Noted, Who};
use crate::scenario::Failure;
use crate::torture::accounts::{Accounts, End};
use crate::torture::flights::{Flight, Flights};
use crate::torture::tally::Tally;

/// How long one wait for completions lasts before the worker looks around.
const LOOK_AROUND: Duration = Duration::from_millis(500);

impl Worker {
    /// Starts one operation; nothing keeps it from beginning, and there is a slot.
    pub(super) fn begin(&mut self, flights: &mut Flights, op: Op) -> Result<(), Failure> {
        let Op { index, kind, range } = op;
        let (offset, len) = (range.offset_bytes(), range.len_bytes() as usize);
        if let Some(recorder) = &self.shared.recorder {
            recorder.op(self.index, op);
        }
        if len as u64 > self.shared.orders.max_io_bytes {
            Tally::count(&self.tally.longer_than_max_io, 1);
        }
        if kind == OpKind::Discard {
            return self.discard(flights, op);
        }
        let Some(slot) = flights.free.pop() else {
            return Err(Failure::Internal("an operation was begun without a free slot".to_owned()));
        };
        let client = &mut flights.client;
        let payload = match kind {
            OpKind::Write | OpKind::WriteFua => &mut client.buffer_mut(slot)[..len],
            _ => &mut [],
        };
        let began = nanoseconds();
        let (entry, overlaps) = self.book.begin(self.index, op, payload);
        match kind {
            OpKind::Read => client.read(slot, offset, len),
            OpKind::Write => client.write(slot, offset, len, WriteFlags::NONE),
            OpKind::WriteFua => client.write(slot, offset, len, WriteFlags::FUA),
            OpKind::WriteZeroes => {
                let unmap = self.unmap_zeroes && index.is_multiple_of(2);
                let space = if unmap { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
                client.write_zeroes(slot, offset, len as u64, space);
            }
            OpKind::Flush | OpKind::Discard => client.sync_data(slot),
        }
        Tally::count(&self.tally.overlaps, overlaps.into());
        let noted = self.note(op);
        flights.ops[usize::from(slot)] = Some(Flight { op, entry, pass: false, noted, began });
        Ok(())
    }

    /// Starts a read of a pass, in a slot that was free.
    pub(super) fn begin_pass_read(&mut self, flights: &mut Flights, slot: u16, range: SectorRange) {
        let began = nanoseconds();
        let entry = self.book.begin_pass(self.index, range);
        flights.client.read(slot, range.offset_bytes(), range.len_bytes() as usize);
        let op = Op { index: 0, kind: OpKind::Read, range };
        let noted = self.note(op);
        flights.ops[usize::from(slot)] = Some(Flight { op, entry, pass: true, noted, began });
    }

    fn note(&self, op: Op) -> Noted {
        self.shared.in_flight.begin(Who::Worker { worker: self.index, op: op.index }, op.kind, op.range)
    }

    /// Discards have no io_uring operation on all kernels that matter, so they are done at once, beside what is in flight.
    fn discard(&mut self, flights: &mut Flights, op: Op) -> Result<(), Failure> {
        let began = nanoseconds();
        let (entry, overlaps) = self.book.begin(self.index, op, &mut []);
        Tally::count(&self.tally.overlaps, overlaps.into());
        let noted = self.note(op);
        let result = blkdev::discard(flights.client.file(), op.range.offset_bytes(), op.range.len_bytes());
        self.end(flights, 0, Flight { op, entry, pass: false, noted, began }, result.map(|()| 0))
    }

    /// Waits for `want` completions and judges what came. In an outage it returns when that is over.
    pub(super) fn reap(&mut self, flights: &mut Flights, want: u32) -> Result<(), Failure> {
        self.collect(flights, want)?;
        if self.shared.outages.is_out() {
            while flights.client.in_flight() > 0 {
                self.collect(flights, 1)?;
            }
            flights.stop_clock();
            self.shared.outages.wait();
            flights.wind_up(&self.shared);
            self.sweep = true;
        }
        Ok(())
    }

    /// Sends what was begun on its way, now.
    pub(super) fn submit(&self, flights: &mut Flights) -> Result<(), Failure> {
        self.enter(flights, 0)
    }

    fn enter(&self, flights: &mut Flights, want: u32) -> Result<(), Failure> {
        flights
            .client
            .submit_and_wait(want, LOOK_AROUND)
            .map_err(|error| Failure::Internal(format!("the io_uring of worker {} failed: {error}", self.index)))
    }

    fn collect(&mut self, flights: &mut Flights, want: u32) -> Result<(), Failure> {
        if flights.client.in_flight() == 0 {
            return Ok(());
        }
        self.enter(flights, want)?;
        while let Some((slot, result)) = flights.client.next_completion() {
            flights.free.push(slot);
            flights.progressed = true;
            if let Some(flight) = flights.ops[usize::from(slot)].take() {
                self.end(flights, slot, flight, result)?;
            }
        }
        flights.rearm(&self.shared);
        if let Some(accounts) = &self.shared.accounts {
            accounts.told(self.index, flights.oldest(nanoseconds()));
        }
        Ok(())
    }

    /// Sees what is in flight to its end after something went wrong, without judging it.
    pub(super) fn settle(&mut self, flights: &mut Flights) {
        while flights.client.in_flight() > 0 && flights.client.submit_and_wait(1, LOOK_AROUND).is_ok() {
            while let Some((slot, result)) = flights.client.next_completion() {
                flights.progressed = true;
                let Some(Flight { op, entry, .. }) = flights.ops[usize::from(slot)].take() else {
                    continue;
                };
                let whole = op.kind != OpKind::Read && self.whole(op, result).is_ok();
                self.book.end(entry, if whole { Outcome::Done } else { Outcome::Failed });
            }
            flights.rearm(&self.shared);
        }
    }

    fn end(
        &mut self,
        flights: &Flights,
        slot: u16,
        flight: Flight,
        result: io::Result<usize>,
    ) -> Result<(), Failure> {
        let (op, pass) = (flight.op, flight.pass);
        let moved = op.range.len_bytes();
        if let Err(error) = &result
            && let Some((outcome, end)) = self.explained(error)
        {
            self.tell(&flight, end);
            self.book.end(flight.entry, outcome);
            let counter = if matches!(end, End::CutShort) { &self.tally.cut_short } else { &self.tally.failed };
            Tally::count(counter, 1);
            return Ok(());
        }
        if let Err(failure) = self.whole(op, result) {
            self.book.end(flight.entry, Outcome::Failed);
            return Err(failure);
        }
        self.tell(&flight, End::Done);
        let entry = flight.entry;
        let tally = &self.tally;
        if op.kind == OpKind::Read {
            let verified = self.book.end_read(entry, &flights.client.buffer(slot)[..moved as usize])?;
            if pass {
                Tally::count(&tally.compared_in_passes, verified.bytes);
            } else {
                Tally::count(&tally.reads, 1);
                Tally::count(&tally.read_bytes, moved);
                Tally::count(&tally.compared_in_reads, verified.bytes);
            }
            return Ok(());
        }
        self.book.end(entry, Outcome::Done);
        let (counter, bytes) = match op.kind {
            OpKind::Write => (&tally.writes, moved),
            OpKind::WriteFua => (&tally.fua_writes, moved),
            OpKind::WriteZeroes => (&tally.zeroes, 0),
            OpKind::Discard => (&tally.discards, 0),
            OpKind::Flush | OpKind::Read => (&tally.flushes, 0),
        };
        Tally::count(counter, 1);
        Tally::count(&tally.written_bytes, bytes);
        Ok(())
    }

    fn tell(&self, flight: &Flight, end: End) {
        if let Some(accounts) = &self.shared.accounts {
            accounts.ended(self.index, flight, end);
        }
    }

    /// How an operation ended that failed for a reason which may be no fault of the device's.
    fn explained(&self, error: &io::Error) -> Option<(Outcome, End)> {
        let errno = error.raw_os_error()?;
        // A machine without power answers nothing, which the server says as EIO.
        if errno == nix::libc::EIO
            && let Some(outcome) = self.shared.outages.explains()
        {
            return Some((outcome, End::CutShort));
        }
        // Whether something made it is found out when the accounts are settled.
        let may_be = self.shared.accounts.as_ref().is_some_and(Accounts::errors_may_be);
        may_be.then_some((Outcome::Failed, End::Failed(errno)))
    }

    /// Every other operation must succeed, and move all of its bytes.
    fn whole(&self, op: Op, result: io::Result<usize>) -> Result<(), Failure> {
        let expected = match op.kind {
            OpKind::Read | OpKind::Write | OpKind::WriteFua => op.range.len_bytes() as usize,
            _ => 0,
        };
        match result {
            Ok(moved) if moved == expected => Ok(()),
            Ok(moved) => Err(Failure::broke(
                "io",
                format!(
                    "worker {}: a {} of {expected} bytes at {} moved only {moved}",
                    self.index,
                    op.kind,
                    op.range.offset_bytes()
                ),
            )),
            Err(error) => Err(self.failed(op, &error)),
        }
    }

    fn failed(&self, op: Op, error: &io::Error) -> Failure {
        Failure::broke(
            "io",
            format!(
                "worker {}: operation {}, a {} of {} bytes at {}, failed: {error}",
                self.index,
                op.index,
                op.kind,
                op.range.len_bytes(),
                op.range.offset_bytes()
            ),
        )
    }
}
