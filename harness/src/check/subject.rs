//! A user's device on the simulator.

use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ublkit::Geometry;
use ublkit::backends::Null;

use super::Factory;
use super::watch::Remarks;
use crate::fault::{Faults, Stage};
use crate::range::SectorRange;
use crate::script::{Script, Setup};
use crate::seed::SeededRng;
use crate::sim::medium::failing::Failing;
use crate::sim::{Buffers, Commit, Medium, MediumOptions, Open, Server, Subject, TagId, Work};

/// Opens the device with the factory, again and again.
pub(super) struct Opener<'a, F, M> {
    pub(super) factory: &'a F,
    pub(super) medium_bytes: u64,
    pub(super) initially_zero: bool,
    pub(super) remarks: &'a Remarks,
    reorder: u8,
    declared: Geometry,
    faults: Faults,
    /// Whether calls to the medium may fail: neither while the device opens, nor once it is about to be closed.
    armed: Arc<AtomicBool>,
    /// Whether the server that is there now will be closed in order.
    orderly: Arc<AtomicBool>,
    marker: PhantomData<M>,
}

impl<'a, F: Factory<M>, M> Opener<'a, F, M> {
    pub(super) fn new(
        factory: &'a F,
        header: &Script,
        declared: Geometry,
        (medium_bytes, initially_zero): (u64, bool),
        remarks: &'a Remarks,
    ) -> Self {
        let seed = header.seed.derive("fault backend", 0);
        let faults = Faults::new(header.faults.clone(), seed);
        // Tells the faults how large a block is. They are faults of time, and the medium's: none is a backend's to have.
        drop(faults.backend(Null::with_geometry(declared)));
        Self {
            factory,
            medium_bytes,
            initially_zero,
            remarks,
            reorder: header.setup.reorder,
            declared,
            faults,
            armed: Arc::default(),
            orderly: Arc::default(),
            marker: PhantomData,
        }
    }

    /// A handle of the medium, whose calls fail as the plan says.
    fn connect(&self, medium: &Medium) -> Medium {
        let remarks = self.remarks.clone();
        let tell = move |kind, range: SectorRange, errno, stage| {
            let place = if range.is_empty() { String::new() } else { format!(" of sectors {range}") };
            let done = match stage {
                Stage::Before => "nothing of it was done",
                Stage::Partway => "a part of it may have been done",
                Stage::After => "all of it was done",
            };
            remarks.add_of_medium(format!("{kind}{place}: {errno}; {done}"));
        };
        let (faults, armed) = (self.faults.clone(), Arc::clone(&self.armed));
        medium.connect().failing(Failing { faults, armed, tell: Arc::new(tell) })
    }
}

impl<F: Factory<M>, M> Subject for Opener<'_, F, M> {
    fn open(&mut self, medium: Option<&Medium>, why: Open) -> Box<dyn Server> {
        self.armed.store(false, Ordering::Relaxed);
        let line = medium.map(|medium| self.connect(medium));
        self.orderly = Arc::default();
        let server = match self.factory.open(line.clone()) {
            Ok(opened) => {
                self.declared = opened.geometry();
                self.armed.store(true, Ordering::Relaxed);
                opened.serve(self.reorder, self.remarks)
            }
            Err(why_not) => {
                let when = match why {
                    Open::First => "when it is new",
                    Open::AfterPowerCut => "after a power cut",
                    Open::AfterKill => "after its server died",
                    Open::Reopen => "after it was closed",
                };
                self.remarks.add(format!("opening it {when} failed: {why_not}"));
                self.declared = Geometry::bytes(0);
                Box::new(Closed)
            }
        };
        Box::new(Mortal { server: Some(server), line, orderly: Arc::clone(&self.orderly) })
    }

    fn geometry(&self) -> Geometry {
        self.declared
    }

    fn uses_medium(&self) -> bool {
        F::ON_MEDIUM
    }

    fn medium_options(&self, setup: &Setup) -> MediumOptions {
        MediumOptions { bytes: self.medium_bytes, volatile_cache: true, atomic_bytes: setup.logical_block }
    }

    fn stopping(&mut self) {
        self.armed.store(false, Ordering::Relaxed);
        self.orderly.store(true, Ordering::Relaxed);
    }

    fn initially_zero(&self) -> bool {
        self.initially_zero
    }

    fn faults(&self) -> Option<&Faults> {
        Some(&self.faults)
    }

    fn fails_below(&self) -> bool {
        F::ON_MEDIUM
    }
}

/// A server that can die: then whatever it still does as it is dropped no longer reaches the medium.
struct Mortal {
    server: Option<Box<dyn Server>>,
    line: Option<Medium>,
    orderly: Arc<AtomicBool>,
}

impl Server for Mortal {
    fn fetches(&self, tag: TagId) -> bool {
        self.server.as_ref().is_some_and(|server| server.fetches(tag))
    }

    fn take(&mut self, work: Work, buffers: &mut Buffers) {
        if let Some(server) = &mut self.server {
            server.take(work, buffers);
        }
    }

    fn step(&mut self, buffers: &mut Buffers, rng: &mut SeededRng, commits: &mut Vec<Commit>) {
        if let Some(server) = &mut self.server {
            server.step(buffers, rng, commits);
        }
    }

    fn pending(&self) -> usize {
        self.server.as_ref().map_or(0, |server| server.pending())
    }

    fn allocates(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.allocates())
    }

    fn io_flusher(&self) -> bool {
        self.server.as_ref().is_none_or(|server| server.io_flusher())
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        if let Some(line) = &self.line
            && !self.orderly.load(Ordering::Relaxed)
        {
            line.disconnect();
        }
        let server = self.server.take();
        // Of what a backend does as it dies, only what it did to its storage matters, and that is looked at.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(server)));
    }
}

impl fmt::Debug for Mortal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.server.fmt(f)
    }
}

/// In place of a server that could not be had.
#[derive(Debug)]
struct Closed;

impl Server for Closed {
    fn take(&mut self, _work: Work, _buffers: &mut Buffers) {}

    fn step(&mut self, _buffers: &mut Buffers, _rng: &mut SeededRng, _commits: &mut Vec<Commit>) {}

    fn pending(&self) -> usize {
        0
    }
}
