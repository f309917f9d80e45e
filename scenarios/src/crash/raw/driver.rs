//! Operations at depth on a device, by one thread, each told to the ledger before it begins and when its end was seen.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ublkit::{BlockClient, WriteFlags, ZeroSpace, blkdev};
use ublkit_harness::ledger::Ticket;
use ublkit_harness::{Ledger, LedgerOptions, OpId, OpKind, Oracles, Outcome, Pattern, SECTOR, SectorRange};

use crate::context::Context;
use crate::scenario::Failure;
use crate::target::Target;

/// How long an operation may take. The watchdog ends what is longer; this only bounds one wait.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// How long operations may take to end once nothing new begins.
const DRAIN_LOOKS: u32 = 240;
/// How much is read at once to judge it, and how long an operation is at most: four times the largest that is drawn in one
/// request.
pub(super) const CHUNK: u64 = 256 << 10;
/// Whose the reads are that judge: one more than there are workers.
const JUDGE: u32 = super::WORKERS;

/// An operation in flight.
struct Flight {
    kind: OpKind,
    range: SectorRange,
    ticket: Ticket,
}

/// What drives the device.
pub(super) struct Driver<'a> {
    context: &'a Context,
    ledger: Ledger,
    client: BlockClient,
    free: Vec<u16>,
    flights: Vec<Option<Flight>>,
    begun: u64,
    /// The power is out: what fails has an end that nobody knows.
    out: bool,
}

fn lacking(error: &io::Error) -> Failure {
    Failure::Environment(format!("failed to set up I/O: {error}"))
}

impl<'a> Driver<'a> {
    pub(super) fn new(context: &'a Context, target: &Target, slots: u32) -> Result<Self, Failure> {
        let geometry = target.geometry();
        let ledger = Ledger::new(LedgerOptions {
            region: SectorRange::device(geometry.size),
            block_sectors: geometry.logical_block / SECTOR as u32,
            pattern: Arc::new(Pattern::new(context.seed(), target.id())),
            foreign: Arc::new([]),
            device_sectors: geometry.size / SECTOR as u64,
            initially_zero: true,
            discard: target.discard_promise(),
            volatile_cache: geometry.volatile_cache,
            torn_by_races: false,
            oracles: Oracles::ALL,
        });
        let slots = slots as u16;
        let client =
            BlockClient::new(target.open_direct()?, slots, CHUNK as usize).map_err(|error| lacking(&error))?;
        let flights = (0..slots).map(|_| None).collect();
        Ok(Self { context, ledger, client, free: (0..slots).collect(), flights, begun: 0, out: false })
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.client.in_flight()
    }

    /// Begins an operation as soon as there is a slot for it.
    pub(super) fn begin(&mut self, worker: u32, kind: OpKind, range: SectorRange) -> Result<(), Failure> {
        while self.free.is_empty() {
            self.reap(1)?;
        }
        let (offset, len) = (range.offset_bytes(), range.len_bytes() as usize);
        let op = OpId { worker, index: self.begun };
        self.begun += 1;
        self.context.evidence().add("raw_operations", 1);
        if kind == OpKind::Discard {
            let ticket = self.ledger.begin(op, kind, range, &mut []);
            let done = blkdev::discard(self.client.file(), offset, range.len_bytes());
            self.ledger.end(ticket, if done.is_ok() { Outcome::Done } else { Outcome::Failed });
            return done.map_err(|error| Failure::io(format_args!("discard {len} bytes at {offset}"), &error));
        }
        let Some(slot) = self.free.pop() else { return Ok(()) };
        let client = &mut self.client;
        let payload = match kind {
            OpKind::Write | OpKind::WriteFua => &mut client.buffer_mut(slot)[..len],
            _ => &mut [],
        };
        let ticket = self.ledger.begin(op, kind, range, payload);
        match kind {
            OpKind::Read => client.read(slot, offset, len),
            OpKind::Write => client.write(slot, offset, len, WriteFlags::NONE),
            OpKind::WriteFua => client.write(slot, offset, len, WriteFlags::FUA),
            OpKind::WriteZeroes => client.write_zeroes(slot, offset, len as u64, ZeroSpace::Keep),
            OpKind::Flush | OpKind::Discard => client.sync_data(slot),
        }
        self.flights[usize::from(slot)] = Some(Flight { kind, range, ticket });
        // In batches, as many under way as there is room for.
        if self.free.is_empty() { self.reap(1) } else { Ok(()) }
    }

    /// Hands what was begun to the kernel, without waiting for it.
    pub(super) fn submit(&mut self) -> Result<(), Failure> {
        self.client
            .submit_and_wait(0, Duration::ZERO)
            .map_err(|error| Failure::Internal(format!("the io_uring failed: {error}")))
    }

    /// Sees everything to its end.
    pub(super) fn drain(&mut self) -> Result<(), Failure> {
        let mut looks = 0;
        while self.client.in_flight() > 0 {
            let before = self.client.in_flight();
            self.reap(1)?;
            looks = if self.client.in_flight() < before { 0 } else { looks + 1 };
            if looks > DRAIN_LOOKS {
                return Err(Failure::Hang(format!(
                    "{before} operations did not end within {:?}",
                    LOOK_AROUND * looks
                )));
            }
        }
        Ok(())
    }

    fn reap(&mut self, want: u32) -> Result<(), Failure> {
        self.client
            .submit_and_wait(want, LOOK_AROUND)
            .map_err(|error| Failure::Internal(format!("the io_uring failed: {error}")))?;
        let mut first = None;
        while let Some((slot, result)) = self.client.next_completion() {
            self.free.push(slot);
            if let Some(flight) = self.flights[usize::from(slot)].take()
                && let Err(failure) = self.end(slot, flight, result)
            {
                first.get_or_insert(failure);
            }
        }
        first.map_or(Ok(()), Err)
    }

    fn end(&mut self, slot: u16, flight: Flight, result: io::Result<usize>) -> Result<(), Failure> {
        let Flight { kind, range, ticket } = flight;
        let len = range.len_bytes() as usize;
        let has_data = matches!(kind, OpKind::Read | OpKind::Write | OpKind::WriteFua);
        let whole = match result {
            Ok(moved) if has_data && moved != len => Err(format!("moved only {moved} bytes")),
            Ok(_) => Ok(()),
            Err(_) if self.out => {
                self.ledger.end(ticket, Outcome::Unknown);
                self.context.evidence().add("operations_cut_short", 1);
                return Ok(());
            }
            Err(error) => Err(format!("failed: {error}")),
        };
        if let Err(how) = whole {
            self.ledger.end(ticket, Outcome::Failed);
            let offset = range.offset_bytes();
            return Err(Failure::broke("io", format!("a {kind} of {len} bytes at {offset} {how}")));
        }
        if kind == OpKind::Read {
            let verified = self.ledger.end_read(ticket, &self.client.buffer(slot)[..len])?;
            self.context.evidence().add("verified_bytes", verified.bytes);
        } else {
            self.ledger.end(ticket, Outcome::Done);
        }
        Ok(())
    }

    /// What may be there if the power went now. What has ended by now is seen first.
    pub(super) fn crashed(&mut self) -> Result<Ledger, Failure> {
        self.reap(0)?;
        Ok(self.ledger.crashed())
    }

    /// The power is about to go.
    pub(super) fn goes_out(&mut self) {
        self.out = true;
    }

    /// The power was out and is back, and nothing is in flight: reads the whole device, and goes on from what it finds.
    /// Returns how many bytes were judged.
    pub(super) fn power_cut(&mut self) -> Result<u64, Failure> {
        self.out = false;
        self.ledger.power_cut();
        let Self { ledger, client, free, .. } = self;
        let Some(&slot) = free.last() else { return Err(Failure::Internal("no slot is free".to_owned())) };
        let read = |buf: &mut [u8], offset| {
            client.read(slot, offset, buf.len());
            let cannot = |error: io::Error| Failure::io(format_args!("read {} bytes at {offset}", buf.len()), &error);
            loop {
                client.submit_and_wait(1, LOOK_AROUND).map_err(cannot)?;
                if let Some((_, result)) = client.next_completion() {
                    let moved = result.map_err(cannot)?;
                    if moved != buf.len() {
                        return Err(Failure::broke("io", format!("a read at {offset} moved only {moved} bytes")));
                    }
                    buf.copy_from_slice(&client.buffer(slot)[..moved]);
                    return Ok(());
                }
            }
        };
        judge_with(ledger, read)
    }
}

/// Holds everything that `read` returns against what may be there after a cut. Returns how many bytes that were.
pub(super) fn judge(
    mut crashed: Ledger,
    read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    judge_with(&mut crashed, read)
}

fn judge_with(
    ledger: &mut Ledger,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let mut bytes = 0;
    let region = ledger.options().region;
    let mut buf = vec![0; CHUNK as usize];
    for (index, range) in (0..).zip(region.chunks(CHUNK / SECTOR as u64)) {
        let part = &mut buf[..range.len_bytes() as usize];
        read(part, range.offset_bytes())?;
        let ticket = ledger.begin(OpId { worker: JUDGE, index }, OpKind::Read, range, &mut []);
        bytes += ledger.end_read(ticket, part)?.bytes;
    }
    Ok(bytes)
}
