//! A backend that has faults.

use std::io;
use std::ops::Range;
use std::panic::resume_unwind;

use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use super::engine::{Fired, PAST_BYTES};
use super::{Effect, FaultPlan, Faults, Stage};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::SECTOR;
use crate::seed::{Seed, SeededRng};

/// How many logical blocks a misdirected call is off, at most.
const BLOCKS_OFF: u64 = 8;

/// A backend with the faults of a plan. With none it costs a branch a call.
///
/// When calls come from several threads, which of them a rule fires on follows from the order in which they come.
#[derive(Debug)]
pub struct FaultBackend<B> {
    inner: B,
    faults: Faults,
    geometry: Geometry,
}

/// One call, in bytes.
#[derive(Clone, Copy)]
struct Call {
    kind: OpKind,
    offset: u64,
    len: u64,
}

impl Call {
    fn range(self) -> SectorRange {
        SectorRange::new(self.offset / SECTOR as u64, self.len.div_ceil(SECTOR as u64))
    }
}

impl<B: Backend> FaultBackend<B> {
    /// Plants the faults of `plan` in `inner`. What is drawn follows from `seed` and the order of the calls.
    pub fn new(inner: B, plan: FaultPlan, seed: Seed) -> (Self, Faults) {
        let faults = Faults::new(plan, seed);
        (faults.backend(inner), faults)
    }

    pub(super) fn with_faults(inner: B, faults: Faults) -> Self {
        let geometry = inner.geometry();
        faults.set_block_sectors(u64::from(geometry.logical_block) / SECTOR as u64);
        Self { inner, faults, geometry }
    }

    /// The backend below.
    pub const fn inner(&self) -> &B {
        &self.inner
    }

    /// The faults.
    pub const fn faults(&self) -> &Faults {
        &self.faults
    }

    fn block(&self) -> u64 {
        u64::from(self.geometry.logical_block).max(1)
    }

    /// What happens to a call, if anything does.
    fn fire(&self, call: Call) -> Option<Fired> {
        let block = self.block();
        let has_elsewhere = call.offset >= block || call.offset + call.len + block <= self.geometry.size;
        self.faults.fire(call.kind, call.range(), false, |effect, remembered| match effect {
            Effect::Stale => remembered,
            Effect::Misdirected => has_elsewhere,
            _ => true,
        })
    }

    /// Where a call that is off its mark goes.
    fn elsewhere(&self, rng: &mut SeededRng, call: Call) -> u64 {
        let block = self.block();
        let ahead = call.offset / block;
        let behind = self.geometry.size.saturating_sub(call.offset + call.len) / block;
        if ahead > 0 && (behind == 0 || rng.chance(1, 2)) {
            call.offset - rng.within(1..=ahead.min(BLOCKS_OFF)) * block
        } else {
            call.offset + rng.within(1..=behind.min(BLOCKS_OFF)) * block
        }
    }

    /// A drawn number of the first blocks, not all of them, in bytes.
    fn part(&self, rng: &mut SeededRng, call: Call) -> u64 {
        rng.below(call.len.div_ceil(self.block())) * self.block()
    }

    /// Makes a change, with what happens to it. `apply` makes a part of the change, at the given offset.
    fn change(
        &self,
        call: Call,
        fired: Option<Fired>,
        apply: impl Fn(Range<usize>, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let all = 0..call.len as usize;
        let Some(mut fired) = fired else { return apply(all, call.offset) };
        let some = |bytes: u64| if bytes == 0 { Ok(()) } else { apply(0..bytes as usize, call.offset) };
        match fired.effect {
            Effect::Error { stage: Stage::Partway, .. } | Effect::Torn => some(self.part(&mut fired.rng, call))?,
            Effect::Misdirected => apply(all, self.elsewhere(&mut fired.rng, call))?,
            Effect::Error { stage: Stage::Before, .. } | Effect::Lost | Effect::Panic => {}
            _ => apply(all, call.offset)?,
        }
        self.happened(&fired, call)
    }

    /// Records what happened to a call, and has it end the way it does.
    fn happened(&self, fired: &Fired, call: Call) -> io::Result<()> {
        self.faults.record(fired, call.kind, call.range());
        match fired.effect {
            Effect::Error { errno, .. } => Err(io::Error::from_raw_os_error(errno.number())),
            // Without the panic hook: what is planned needs no backtrace, which takes a second in an emulated guest.
            Effect::Panic => resume_unwind(Box::new(format!("a planned fault: {} {}", call.kind, call.range()))),
            _ => Ok(()),
        }
    }

    /// Before a change: keeps what is there for reads that are to be stale.
    fn remember(&self, call: Call) {
        if self.faults.needs_past() {
            let len = call.len.min(PAST_BYTES);
            let mut old = vec![0; len as usize];
            if self.inner.read_at(&mut old, call.offset).is_ok() {
                self.faults.remember(Call { len, ..call }.range(), old);
            }
        }
    }
}

fn flip(rng: &mut SeededRng, bytes: &mut [u8]) {
    let bit = rng.below(bytes.len() as u64 * 8);
    if let Some(byte) = bytes.get_mut(bit as usize / 8) {
        *byte ^= 1 << (bit % 8);
    }
}

impl<B: Backend> Backend for FaultBackend<B> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.faults.judges_calls() {
            return self.inner.read_at(buf, offset);
        }
        let call = Call { kind: OpKind::Read, offset, len: buf.len() as u64 };
        let Some(mut fired) = self.fire(call) else { return self.inner.read_at(buf, offset) };
        match fired.effect {
            Effect::Error { stage: Stage::Before, .. } | Effect::Panic => {}
            Effect::Error { stage: Stage::Partway, .. } => {
                let part = self.part(&mut fired.rng, call) as usize;
                if part > 0 {
                    self.inner.read_at(&mut buf[..part], offset)?;
                }
            }
            Effect::Misdirected => self.inner.read_at(buf, self.elsewhere(&mut fired.rng, call))?,
            _ => self.inner.read_at(buf, offset)?,
        }
        match fired.effect {
            Effect::Stale => self.faults.recall(call.range(), buf),
            Effect::Flipped => flip(&mut fired.rng, buf),
            _ => {}
        }
        self.happened(&fired, call)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if !self.faults.judges_calls() {
            return self.inner.write_at(buf, offset, flags);
        }
        let kind = if flags.fua { OpKind::WriteFua } else { OpKind::Write };
        let call = Call { kind, offset, len: buf.len() as u64 };
        self.remember(call);
        let mut fired = self.fire(call);
        if let Some(fired) = fired.as_mut().filter(|fired| fired.effect == Effect::Flipped) {
            let mut flipped = buf.to_vec();
            flip(&mut fired.rng, &mut flipped);
            self.inner.write_at(&flipped, offset, flags)?;
            return self.happened(fired, call);
        }
        self.change(call, fired, |part, at| self.inner.write_at(&buf[part], at, flags))
    }

    fn flush(&self) -> io::Result<()> {
        if !self.faults.judges_calls() {
            return self.inner.flush();
        }
        let call = Call { kind: OpKind::Flush, offset: 0, len: 0 };
        let Some(mut fired) = self.fire(call) else { return self.inner.flush() };
        let done = match fired.effect {
            Effect::Error { stage: Stage::After, .. } => true,
            // Half a flush is one that has flushed something: whether it has is not known to who sees the error.
            Effect::Error { stage: Stage::Partway, .. } => fired.rng.chance(1, 2),
            _ => false,
        };
        if done {
            self.inner.flush()?;
        }
        self.happened(&fired, call)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.faults.judges_calls() {
            return self.inner.discard(offset, len);
        }
        let call = Call { kind: OpKind::Discard, offset, len };
        self.remember(call);
        self.change(call, self.fire(call), |part, at| self.inner.discard(at, part.len() as u64))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        if !self.faults.judges_calls() {
            return self.inner.write_zeroes(offset, len, flags);
        }
        let call = Call { kind: OpKind::WriteZeroes, offset, len };
        self.remember(call);
        self.change(call, self.fire(call), |part, at| self.inner.write_zeroes(at, part.len() as u64, flags))
    }
}

#[cfg(test)]
mod tests;
