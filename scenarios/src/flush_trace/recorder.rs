//! Records every call of a backend: when it began and ended, what it was, where, and on which thread.
//!
//! A call takes two looks at the clock and one slot of a buffer that is there from the beginning: an index from an atomic
//! counter, then plain stores. Nothing is locked and nothing allocated, but for the first call of a thread, which gets its
//! name entered. What finds no slot is counted.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};
use ublkit_harness::OpKind;

use crate::clock::nanoseconds;

/// Calls that the cost of recording is measured by.
const CALIBRATION_CALLS: u64 = 2_000;

/// A call of the backend that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) kind: OpKind,
    /// When it began and ended; see [`nanoseconds`].
    pub(crate) began: u64,
    pub(crate) ended: u64,
    /// Bytes; both 0 for a flush.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// The thread, as an index into the names.
    pub(crate) thread: u16,
    pub(crate) ok: bool,
}

/// Everything that was recorded.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recording {
    pub(crate) records: Vec<Record>,
    /// Names of the threads that called.
    pub(crate) threads: Vec<String>,
    /// How many records there were, those of earlier than what is looked at included.
    pub(crate) recorded_ever: u64,
    /// Calls that came, recorded or not.
    pub(crate) calls: u64,
    /// Calls that found the buffer full.
    pub(crate) overflow: u64,
    /// What recording adds to a call, in nanoseconds.
    pub(crate) cost_ns: u64,
}

/// A call, spread over words that can be stored one by one.
#[derive(Debug, Default)]
struct Slot {
    began: AtomicU64,
    /// Stored last: 0 until the rest is there.
    ended: AtomicU64,
    offset: AtomicU64,
    len: AtomicU64,
    /// Kind, success and thread, 8, 8 and 16 bits.
    what: AtomicU64,
}

/// The buffer that calls are recorded in.
#[derive(Debug)]
pub(crate) struct Recorder {
    slots: Box<[Slot]>,
    next: AtomicU64,
    calls: AtomicU64,
    threads: Mutex<Vec<String>>,
    /// One in so many records is lost without being counted: a planted bug. 0 for none.
    lose: u64,
}

thread_local! {
    /// This thread's index, once it has one: a thread serves one device.
    static THREAD: Cell<Option<u16>> = const { Cell::new(None) };
}

impl Recorder {
    /// With room for `room` calls.
    pub(crate) fn new(room: usize, lose: u64) -> Self {
        Self {
            slots: (0..room).map(|_| Slot::default()).collect(),
            next: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            threads: Mutex::default(),
            lose,
        }
    }

    #[inline]
    fn record(&self, kind: OpKind, offset: u64, len: u64, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let call_number = self.calls.fetch_add(1, Ordering::Relaxed);
        let began = nanoseconds();
        let result = call();
        let ended = nanoseconds();
        if self.lose != 0 && call_number % self.lose == self.lose - 1 {
            return result;
        }
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(slot) = self.slots.get(index as usize) {
            let thread = THREAD.get().unwrap_or_else(|| self.enter_thread());
            slot.began.store(began, Ordering::Relaxed);
            slot.offset.store(offset, Ordering::Relaxed);
            slot.len.store(len, Ordering::Relaxed);
            let what = kind as u64 | u64::from(result.is_ok()) << 8 | u64::from(thread) << 16;
            slot.what.store(what, Ordering::Relaxed);
            slot.ended.store(ended, Ordering::Release);
        }
        result
    }

    #[cold]
    fn enter_thread(&self) -> u16 {
        let name = std::thread::current().name().unwrap_or("?").to_owned();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.push(name);
        let index = (threads.len() - 1) as u16;
        THREAD.set(Some(index));
        index
    }

    /// What was recorded until now, in the order of the calls' beginnings. Calls that are under way are not in it.
    pub(crate) fn recording(&self) -> Recording {
        let calls = self.calls.load(Ordering::Relaxed);
        let taken = self.next.load(Ordering::Relaxed);
        let mut records: Vec<Record> = self.slots.iter().take(taken as usize).filter_map(Slot::record).collect();
        records.sort_unstable_by_key(|record| record.began);
        Recording {
            recorded_ever: records.len() as u64,
            records,
            threads: self.threads.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            calls,
            overflow: taken.saturating_sub(self.slots.len() as u64),
            cost_ns: 0,
        }
    }
}

impl Slot {
    fn record(&self) -> Option<Record> {
        let ended = self.ended.load(Ordering::Acquire);
        let what = self.what.load(Ordering::Relaxed);
        let kind = OpKind::ALL.into_iter().find(|kind| *kind as u64 == what & 0xff)?;
        (ended != 0).then(|| Record {
            kind,
            began: self.began.load(Ordering::Relaxed),
            ended,
            offset: self.offset.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            thread: (what >> 16) as u16,
            ok: what >> 8 & 1 == 1,
        })
    }
}

/// What recording adds to a call on this machine, in nanoseconds: the median of several rounds, each with many calls.
pub(crate) fn cost_ns() -> u64 {
    let mut rounds: Vec<u64> = (0..5)
        .map(|_| {
            let recorder = Recorder::new(CALIBRATION_CALLS as usize, 0);
            let began = Instant::now();
            for offset in 0..CALIBRATION_CALLS {
                // What is recorded succeeds.
                let _ = recorder.record(OpKind::Write, offset, 512, || Ok(()));
            }
            began.elapsed().as_nanos() as u64 / CALIBRATION_CALLS
        })
        .collect();
    // The index of this thread was one of those recorders'.
    THREAD.set(None);
    rounds.sort_unstable();
    rounds[rounds.len() / 2]
}

/// A backend whose calls are recorded.
pub(crate) struct Recorded<B> {
    inner: B,
    recorder: Arc<Recorder>,
}

impl<B> Recorded<B> {
    pub(crate) const fn new(inner: B, recorder: Arc<Recorder>) -> Self {
        Self { inner, recorder }
    }
}

impl<B: Backend> Backend for Recorded<B> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.recorder.record(OpKind::Read, offset, buf.len() as u64, || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        let kind = if flags.fua { OpKind::WriteFua } else { OpKind::Write };
        self.recorder.record(kind, offset, buf.len() as u64, || self.inner.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.recorder.record(OpKind::Flush, 0, 0, || self.inner.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.recorder.record(OpKind::Discard, offset, len, || self.inner.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.recorder.record(OpKind::WriteZeroes, offset, len, || self.inner.write_zeroes(offset, len, flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit::backends::Memory;

    fn recorded(room: usize, lose: u64) -> (Recorded<Memory>, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::new(room, lose));
        (Recorded::new(Memory::new(1 << 20), Arc::clone(&recorder)), recorder)
    }

    #[test]
    fn every_call_is_recorded_as_it_was() {
        let (backend, recorder) = recorded(16, 0);
        let mut buf = [0; 1024];
        backend.write_at(&buf, 4096, WriteFlags::NONE).expect("write");
        backend.write_at(&buf[..512], 8192, WriteFlags::FUA).expect("write");
        backend.read_at(&mut buf, 0).expect("read");
        backend.flush().expect("flush");
        assert!(backend.read_at(&mut buf, 1 << 20).is_err());
        backend.write_zeroes(0, 512, ZeroFlags::NONE).expect("zeroes");
        backend.discard(0, 4096).expect("discard");
        let recording = recorder.recording();
        let seen: Vec<_> = recording.records.iter().map(|r| (r.kind, r.offset, r.len, r.ok)).collect();
        let expected = [
            (OpKind::Write, 4096, 1024, true),
            (OpKind::WriteFua, 8192, 512, true),
            (OpKind::Read, 0, 1024, true),
            (OpKind::Flush, 0, 0, true),
            (OpKind::Read, 1 << 20, 1024, false),
            (OpKind::WriteZeroes, 0, 512, true),
            (OpKind::Discard, 0, 4096, true),
        ];
        assert_eq!(seen, expected);
        assert!(recording.records.iter().all(|r| 0 < r.began && r.began <= r.ended), "{recording:?}");
        assert_eq!((recording.calls, recording.overflow, recording.threads.len()), (7, 0, 1));
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        let (backend, recorder) = recorded(3, 0);
        (0..10).for_each(|_| backend.flush().expect("flush"));
        let recording = recorder.recording();
        assert_eq!((recording.records.len(), recording.calls, recording.overflow), (3, 10, 7));
    }

    #[test]
    fn threads_do_not_take_each_others_slots() {
        let recorder = Recorder::new(4000, 0);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let recorder = &recorder;
                scope.spawn(move || {
                    for call in 0..1000 {
                        let done = recorder.record(OpKind::Write, thread << 32 | call, 1, || Ok(()));
                        done.expect("succeeds");
                    }
                });
            }
        });
        let recording = recorder.recording();
        assert_eq!((recording.records.len(), recording.overflow, recording.threads.len()), (4000, 0, 4));
        for thread in 0..4 {
            let theirs: Vec<_> = recording.records.iter().filter(|r| r.offset >> 32 == thread).collect();
            assert_eq!(theirs.len(), 1000);
            assert!(theirs.iter().all(|r| r.thread == theirs[0].thread));
        }
    }

    #[test]
    fn a_lost_record_is_missed() {
        let (backend, recorder) = recorded(100, 10);
        (0..50).for_each(|_| backend.flush().expect("flush"));
        let recording = recorder.recording();
        assert_eq!((recording.records.len(), recording.calls, recording.overflow), (45, 50, 0));
    }
}
