//! The storage of a stressed device, and the ways in which it can be slow, held, or wrong.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ublkit::backends::Memory;
use ublkit::{Backend, Geometry, WriteFlags};

use super::protocol::Plant;

/// How long requests are held if nobody lets them go.
const HELD_MOST: Duration = Duration::from_secs(60);

/// Memory, and what stands before it.
#[derive(Debug)]
pub(super) struct Disk {
    memory: Arc<Memory>,
    plant: Option<Plant>,
    write_time: Duration,
    /// Writes that are held now, by a thread each.
    held: AtomicU64,
    /// The device is being closed.
    stopping: AtomicBool,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    shut: bool,
    /// A request was forgotten: one is enough.
    forgotten: bool,
}

impl Disk {
    pub(super) fn new(memory: Arc<Memory>, write_time: Duration, plant: Option<Plant>) -> Self {
        Self {
            memory,
            plant,
            write_time,
            held: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            gate: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The bytes, past everything.
    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The device is about to be stopped.
    pub(super) fn stopping(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// What is planted.
    pub(super) fn plant(&self) -> Option<Plant> {
        self.plant
    }

    /// Writes that are held now: the server has taken them and not answered them.
    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds every write from now on.
    pub(super) fn shut(&self) {
        self.gate().shut = true;
    }

    /// Lets them go.
    pub(super) fn open(&self) {
        self.gate().shut = false;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut gate = self.gate();
        if !gate.shut {
            return;
        }
        self.held.fetch_add(1, Ordering::SeqCst);
        if self.is_planted(Plant::ForgottenRequest) && !gate.forgotten {
            gate.forgotten = true;
            drop(gate);
            loop {
                std::thread::park();
            }
        }
        let until = Instant::now() + HELD_MOST;
        while gate.shut && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            gate = self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(gate);
        self.held.fetch_sub(1, Ordering::SeqCst);
    }

    fn is_planted(&self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }

    fn write(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.pass();
        let stopping = self.stopping.load(Ordering::SeqCst);
        if stopping && (self.is_planted(Plant::KillInsteadOfStop) || self.is_planted(Plant::DroppedPages)) {
            return Err(Errno::EIO.into());
        }
        if stopping && self.is_planted(Plant::LostInFlight) {
            return Ok(());
        }
        if !self.write_time.is_zero() {
            std::thread::sleep(self.write_time);
        }
        self.memory.write_at(buf, offset, flags)
    }
}

impl Backend for Disk {
    fn geometry(&self) -> Geometry {
        self.memory.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.write(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.memory.flush()
    }
}
