//! A worker that does its part of a script.

use std::sync::Arc;
use std::time::Duration;

use ublkit_harness::{Op, OpKind, SECTOR, SectorRange};

use super::Worker;
use crate::scenario::Failure;
use crate::torture::flights::Flights;
use crate::torture::scripted::{Part, Scripted, Step};
use crate::torture::tally::Tally;

/// How long a worker waits for its turn before it looks at what it has in flight, and at whether the run is to end.
const MOMENT: Duration = Duration::from_millis(1);
const LOOK_AROUND: Duration = Duration::from_millis(20);

impl Worker {
    /// Does its part: each step begins when those before it in the script have begun, whoever's they are.
    pub(super) fn follow(&mut self, flights: &mut Flights, script: &Arc<Scripted>) -> Result<(), Failure> {
        let part: Part = script.part(self.index);
        for (number, step) in part {
            if !self.turn(flights, script, number, &step)? {
                break;
            }
            match step {
                // It is over when it returns: the others go on meanwhile.
                Step::Op(op) if op.kind == OpKind::Discard => {
                    script.turns().pass(self.index, flights.client.in_flight() + 1);
                    self.begin(flights, op)?;
                    script.turns().has_in_flight(self.index, flights.client.in_flight());
                    continue;
                }
                Step::Op(op) => {
                    self.begin(flights, op)?;
                    // On its way before the next one begins.
                    self.submit(flights)?;
                }
                Step::Fill => self.over_areas(flights, script, OpKind::Write)?,
                Step::Sweep => {
                    self.over_areas(flights, script, OpKind::Read)?;
                    Tally::count(&self.tally.passes, 1);
                }
            }
            script.turns().pass(self.index, flights.client.in_flight());
        }
        while flights.client.in_flight() > 0 {
            self.reap_and_tell(flights, script, 1)?;
        }
        Ok(())
    }

    /// Waits until it is the turn of step `number`, and there is what it needs. False when the run is to end before.
    fn turn(
        &mut self,
        flights: &mut Flights,
        script: &Scripted,
        number: usize,
        step: &Step,
    ) -> Result<bool, Failure> {
        loop {
            if self.shared.stopped() {
                return Ok(false);
            }
            let busy = flights.free.is_empty();
            self.reap_and_tell(flights, script, busy.into())?;
            if self.shared.outages.is_out() || flights.free.is_empty() {
                continue;
            }
            let turns = script.turns();
            let patience = if flights.client.in_flight() > 0 { MOMENT } else { LOOK_AROUND };
            let mine = match step {
                Step::Op(_) => turns.wait(number, patience),
                Step::Fill | Step::Sweep => turns.wait_alone(number, patience),
            };
            if mine {
                return Ok(true);
            }
        }
    }

    /// Writes or checks all that the script may look at, in requests that the device takes as they are.
    fn over_areas(&mut self, flights: &mut Flights, script: &Scripted, kind: OpKind) -> Result<(), Failure> {
        let chunk = self.shared.orders.max_io_bytes.min(self.slot_bytes as u64) / SECTOR as u64;
        let chunks: Vec<SectorRange> = script.areas().iter().flat_map(|area| area.chunks(chunk)).collect();
        for range in chunks {
            while flights.free.is_empty() {
                self.reap(flights, 1)?;
            }
            if self.shared.stopped() {
                break;
            }
            if kind == OpKind::Read {
                if let Some(slot) = flights.free.pop() {
                    self.begin_pass_read(flights, slot, range);
                }
            } else {
                self.begin(flights, Op { index: 0, kind, range })?;
            }
        }
        self.drain(flights)
    }

    fn reap_and_tell(&mut self, flights: &mut Flights, script: &Scripted, want: u32) -> Result<(), Failure> {
        self.reap(flights, want)?;
        script.turns().has_in_flight(self.index, flights.client.in_flight());
        Ok(())
    }
}
