//! Lies in what is declared, and in how a server begins and ends.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use ublkit::{Backend, DiscardLimits, Geometry, WriteFlags, ZeroFlags};

use super::twist::{Disk, Turn, Twist, lock, place, twisted, twisted_as};
use super::{Mutant, Open, Planted, Plot};
use crate::plan::OpKind;
use crate::script::{Act, Recovery, Setup};
use crate::sim::medium::Medium;

/// How long a discard or zeroes may be for a backend that declares more, in bytes.
const LIMIT: u64 = 64 << 10;

/// How many writes are remembered for when the server dies, and how long they are at most.
const REMEMBERED: usize = 32;
const SHORT: usize = 64 << 10;

const EINVAL: i32 = 22;

/// What a device with this bug declares, where it should declare `geometry`. Backends with such a bug declare it by
/// themselves.
#[must_use]
pub fn declared_geometry(planted: Planted, geometry: Geometry) -> Geometry {
    let mut declared = geometry;
    match planted.mutant {
        Mutant::NoVolatileCache => (declared.volatile_cache, declared.fua) = (false, false),
        Mutant::RoNotEnforced => declared.read_only = false,
        Mutant::WrongLimits => {
            let max_bytes = Geometry::DEFAULT_MAX_DISCARD;
            declared.discard = declared.discard.map(|limits| DiscardLimits { max_bytes, ..limits });
            declared.write_zeroes = declared.write_zeroes.map(|_| max_bytes);
        }
        _ => {}
    }
    declared
}

/// Whether the id of a device that is closed is given back. Asked once each time.
#[must_use]
pub fn gives_id_back(planted: Planted, plot: &Plot) -> bool {
    let leaks = planted.mutant == Mutant::MinorLeak && Turn::new(planted, plot).comes().is_some();
    if leaks {
        plot.hits.hit();
    }
    !leaks
}

impl Mutant {
    /// Makes of a setup one in which the bug can occur.
    pub fn needs(self, setup: &mut Setup) {
        setup.read_only = self == Self::RoNotEnforced;
        match self {
            Self::TornBelowAtomic
            | Self::FlushNoop
            | Self::FlushRange
            | Self::FlushEarly
            | Self::FlushSubmitted
            | Self::FtlRollback
            | Self::ColdFlush
            | Self::MetadataNotFlushed
            | Self::ReorderAcrossFlush
            | Self::SameLbaLogRace
            | Self::NoVolatileCache
            | Self::UnflushedLost
            | Self::AnySubset
            | Self::FlushGivesUp
            | Self::FlushFails => setup.volatile_cache = true,
            Self::FuaIgnored | Self::OpFlagMask => (setup.volatile_cache, setup.fua) = (true, true),
            Self::DiscardOffByOne | Self::LatePunch | Self::DiscardRoundsOut => setup.discard = true,
            Self::DiscardResurrects => {
                (setup.volatile_cache, setup.discard, setup.discard_zeroes) = (true, true, true);
            }
            Self::DiscardGarbage => (setup.discard, setup.discard_zeroes) = (true, false),
            Self::WriteZeroesIgnored | Self::ZeroesEdgesKept => setup.write_zeroes = true,
            Self::WrongLimits => {
                (setup.discard, setup.discard_zeroes, setup.write_zeroes) = (true, true, true);
                setup.bytes = setup.bytes.max(16 * LIMIT);
                setup.max_io_bytes = setup.max_io_bytes.max(LIMIT as u32);
            }
            Self::UserCopyOffset => {
                setup.queues = setup.queues.max(2);
                setup.workers = setup.workers.max(2);
            }
            Self::SglContiguity => {
                setup.max_io_bytes = setup.max_io_bytes.max(2 * super::server::SEGMENT as u32);
                setup.bytes = setup.bytes.max(4 * u64::from(setup.max_io_bytes));
            }
            Self::RecoveryStaleState => setup.recovery = Recovery::Wait,
            Self::ReissueOldOverNew => setup.recovery = Recovery::Reissue,
            Self::NoIoFlusher => setup.memory_pressure = true,
            Self::ReadInPieces | Self::WriteInPieces => {
                setup.queue_depth = setup.queue_depth.max(4);
                setup.workers = setup.workers.max(2);
                setup.io_depth = setup.io_depth.max(4);
                // A piece of what two operations share would fail, and both of them with it.
                setup.merges = false;
            }
            Self::TagSwap | Self::BufferReuse | Self::StopWithInflight => {
                setup.queue_depth = setup.queue_depth.max(4);
                setup.workers = setup.workers.max(2);
                setup.io_depth = setup.io_depth.max(4);
            }
            _ => {}
        }
    }

    /// What beside operations has to happen for the bug to show.
    #[must_use]
    pub fn shows_at(self) -> Option<Act> {
        match self {
            Self::RecoveryStaleState | Self::ReissueOldOverNew => Some(Act::Kill),
            Self::StopWithInflight | Self::MinorLeak => Some(Act::Reopen),
            Self::TornBelowAtomic
            | Self::FlushNoop
            | Self::FlushRange
            | Self::FlushEarly
            | Self::FtlRollback
            | Self::ColdFlush
            | Self::FuaIgnored
            | Self::MetadataNotFlushed
            | Self::ReorderAcrossFlush
            | Self::SameLbaLogRace
            | Self::DiscardResurrects
            | Self::OpFlagMask
            | Self::NoVolatileCache
            | Self::UnflushedLost
            | Self::AnySubset
            | Self::FlushGivesUp
            | Self::FlushFails => Some(Act::PowerCut),
            _ => None,
        }
    }
}

pub(super) fn plant(
    mutant: Mutant,
    inner: Arc<dyn Backend>,
    turn: &Turn,
) -> Result<Arc<dyn Backend>, Arc<dyn Backend>> {
    let turn = turn.clone();
    Ok(match mutant {
        Mutant::NoVolatileCache => declaring(inner, &turn.clone(), NoVolatileCache(turn)),
        Mutant::RoNotEnforced => declaring(inner, &turn.clone(), RoNotEnforced(turn)),
        Mutant::WrongLimits => declaring(inner, &turn.clone(), WrongLimits(turn)),
        Mutant::RecoveryStaleState => match turn.plot().why {
            Open::AfterKill => {
                let old = lock(&turn.plot().past).disk.clone();
                twisted(inner, StaleState { turn, old, written: Mutex::default() })
            }
            _ => twisted(inner, StateKept(turn)),
        },
        Mutant::ReissueOldOverNew => {
            reissue(&*inner, &turn);
            twisted(inner, WritesKept(turn))
        }
        _ => return Err(inner),
    })
}

/// `inner` with a twist that declares what the bug has it declare.
fn declaring(inner: Arc<dyn Backend>, turn: &Turn, twist: impl Twist) -> Arc<dyn Backend> {
    let declared = declared_geometry(turn.planted(), inner.geometry());
    if declared != inner.geometry() {
        turn.hit();
    }
    twisted_as(inner, declared, twist)
}

/// Counts the writes that nobody will flush.
struct NoVolatileCache(Turn);

impl Twist for NoVolatileCache {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.0.hit();
        disk.write_at(buf, offset, flags)
    }
}

/// Takes writes to storage that is to be read-only.
struct RoNotEnforced(Turn);

impl Twist for RoNotEnforced {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.0.hit();
        disk.write_at(buf, offset, flags)
    }
}

/// A discard that is longer than the backend takes is cut short, and zeroes that are, are refused.
struct WrongLimits(Turn);

impl Twist for WrongLimits {
    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        if len > LIMIT && self.0.comes().is_some() {
            self.0.hit();
            return disk.discard(offset, LIMIT);
        }
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        if len > LIMIT && self.0.comes().is_some() {
            self.0.hit();
            return Err(io::Error::from_raw_os_error(EINVAL));
        }
        disk.write_zeroes(offset, len, flags)
    }
}

/// Copies the disk once, for a server that comes after a death.
struct StateKept(Turn);

impl Twist for StateKept {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let mut past = lock(&self.0.plot().past);
        if past.disk.is_none() && self.0.comes().is_some() {
            past.disk = self.0.plot().medium.as_ref().map(Medium::fork);
        }
        disk.write_at(buf, offset, flags)
    }
}

/// What was not written since the last server died is read from an old copy, or, without one, as zeroes.
struct StaleState {
    turn: Turn,
    old: Option<Medium>,
    written: Mutex<BTreeSet<u64>>,
}

impl StaleState {
    fn changed(&self, disk: &Disk, offset: u64, len: u64) {
        lock(&self.written).extend(disk.blocks(offset, len));
    }
}

impl Twist for StaleState {
    fn read(&self, disk: &Disk, buf: &mut [u8], offset: u64) -> io::Result<()> {
        disk.read_at(buf, offset)?;
        let written = lock(&self.written);
        let mut old = vec![0; disk.block() as usize];
        let mut differs = false;
        for block in disk.blocks(offset, buf.len() as u64).filter(|block| !written.contains(block)) {
            if let Some(medium) = &self.old {
                medium.read_at(&mut old, block * disk.block())?;
            }
            let data = &mut buf[place(block, disk.block(), offset)];
            differs |= *data != *old;
            data.copy_from_slice(&old);
        }
        if differs {
            self.turn.hit();
        }
        Ok(())
    }

    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.changed(disk, offset, buf.len() as u64);
        disk.write_at(buf, offset, flags)
    }

    fn discard(&self, disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
        self.changed(disk, offset, len);
        disk.discard(offset, len)
    }

    fn zeroes(&self, disk: &Disk, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.changed(disk, offset, len);
        disk.write_zeroes(offset, len, flags)
    }
}

/// Remembers writes, for a server that comes after a death.
struct WritesKept(Turn);

impl Twist for WritesKept {
    fn write(&self, disk: &Disk, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        disk.write_at(buf, offset, flags)?;
        if buf.len() <= SHORT && self.0.comes().is_some() {
            let mut past = lock(&self.0.plot().past);
            past.writes.push_back((offset, buf.to_vec()));
            if past.writes.len() > REMEMBERED {
                past.writes.pop_front();
            }
        }
        Ok(())
    }
}

/// After a death, does the first write once more that there is a newer one to the same place of. Whatever else the server
/// was started for, its past is over.
fn reissue(disk: &dyn Backend, turn: &Turn) {
    let writes: Vec<_> = lock(&turn.plot().past).writes.drain(..).collect();
    if turn.plot().why != Open::AfterKill {
        return;
    }
    let end = |write: &(u64, Vec<u8>)| write.0 + write.1.len() as u64;
    let overlap = |a: &(u64, Vec<u8>), b: &(u64, Vec<u8>)| a.0 < end(b) && b.0 < end(a);
    let older = writes.iter().enumerate().find(|(at, old)| writes[at + 1..].iter().any(|new| overlap(old, new)));
    if let Some((_, (offset, data))) = older
        && disk.write_at(data, *offset, WriteFlags::NONE).is_ok()
    {
        turn.hit();
    }
}

/// What a request of the driver is to an application.
pub(super) fn kind_of(operation: ublkit::Operation, fua: bool) -> OpKind {
    match operation {
        ublkit::Operation::Write if fua => OpKind::WriteFua,
        ublkit::Operation::Write => OpKind::Write,
        ublkit::Operation::Flush => OpKind::Flush,
        ublkit::Operation::Discard => OpKind::Discard,
        ublkit::Operation::WriteZeroes => OpKind::WriteZeroes,
        _ => OpKind::Read,
    }
}
