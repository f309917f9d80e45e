//! What is tested on the simulator: where servers come from, and what they declare.

use std::fmt;
use std::sync::Arc;

use ublkit::{Backend, DiscardLimits, Geometry};

use crate::fault::{FaultPlan, Faults};
use crate::script::Setup;
use crate::seed::Seed;
use crate::sim::calls::{CallLog, ObservedCalls};
use crate::sim::medium::{Medium, MediumDisk, MediumOptions};
use crate::sim::server::{PlainServer, Server};

/// Why a server is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Open {
    /// The device is new.
    #[default]
    First,
    /// The power was cut, and is back.
    AfterPowerCut,
    /// The server before it died.
    AfterKill,
    /// The device was closed in order.
    Reopen,
}

/// Whatever makes servers.
pub trait Subject {
    /// A server of what is on `medium`, or on storage of its own.
    fn open(&mut self, medium: Option<&Medium>, why: Open) -> Box<dyn Server>;

    /// What the server that was opened last declares.
    fn geometry(&self) -> Geometry;

    /// Whether it stores its data on a medium. Without one a power cut takes only what the server itself holds, and
    /// what is lost beyond that is for [`open`](Self::open) to lose.
    fn uses_medium(&self) -> bool {
        true
    }

    /// The medium that it stores its data on. Without anything between, it is the disk that `setup` describes.
    fn medium_options(&self, setup: &Setup) -> MediumOptions {
        let Setup { bytes, volatile_cache, logical_block: atomic_bytes, .. } = *setup;
        MediumOptions { bytes, volatile_cache, atomic_bytes }
    }

    /// The device is about to be closed in order; requests may still be on their way.
    fn stopping(&mut self) {}

    /// Whether its storage reads as zeroes before anything is written.
    fn initially_zero(&self) -> bool {
        true
    }

    /// The device is closed, or deleted after its server died. Returns whether its id was given back.
    fn release(&mut self) -> bool {
        true
    }

    /// The faults that it has. Those of time, which are delays, requests that are held and short results, are the
    /// simulator's to make.
    fn faults(&self) -> Option<&Faults> {
        None
    }

    /// Whether the errors among its faults are made below the backend, in calls to its storage. Which of those is for which
    /// operation is known to the backend alone: operations may fail while such an error is made, and need not.
    fn fails_below(&self) -> bool {
        false
    }

    /// What reaches its storage, if that is watched.
    fn calls(&self) -> Option<&CallLog> {
        None
    }
}

/// Puts something around a backend.
pub type WrapBackend<'a> = Box<dyn FnMut(Arc<dyn Backend>, &Medium, Open) -> Arc<dyn Backend> + 'a>;

/// Puts something around a server.
pub type WrapServer<'a> = Box<dyn FnMut(Box<dyn Server>, &Medium, Open) -> Box<dyn Server> + 'a>;

/// The right server on the right backend of a medium, and whatever is put around them.
pub struct MediumSubject<'a> {
    described: Geometry,
    reorder: u8,
    calls: CallLog,
    faults: Option<Faults>,
    wrap_backend: Option<WrapBackend<'a>>,
    wrap_server: Option<WrapServer<'a>>,
    /// What the backend that was opened last declares.
    declared: Geometry,
}

impl<'a> MediumSubject<'a> {
    /// The device that `setup` describes.
    #[must_use]
    pub fn new(setup: &Setup) -> Self {
        let described = geometry_of(setup);
        let reorder = setup.reorder;
        let calls = CallLog::default();
        Self { described, reorder, calls, faults: None, wrap_backend: None, wrap_server: None, declared: described }
    }

    /// Plants the faults of `plan` above the storage, and below whatever is put around it.
    #[must_use]
    pub fn with_faults(mut self, plan: FaultPlan, seed: Seed) -> Self {
        let clock = self.calls.clone();
        self.faults = Some(Faults::with_clock(plan, seed, Arc::new(move || clock.tick())));
        self
    }

    /// Puts something around every backend.
    #[must_use]
    pub fn wrap_backend(
        mut self,
        wrap: impl FnMut(Arc<dyn Backend>, &Medium, Open) -> Arc<dyn Backend> + 'a,
    ) -> Self {
        self.wrap_backend = Some(Box::new(wrap));
        self
    }

    /// Puts something around every server.
    #[must_use]
    pub fn wrap_server(mut self, wrap: impl FnMut(Box<dyn Server>, &Medium, Open) -> Box<dyn Server> + 'a) -> Self {
        self.wrap_server = Some(Box::new(wrap));
        self
    }
}

impl Subject for MediumSubject<'_> {
    /// # Panics
    /// Without a medium.
    fn open(&mut self, medium: Option<&Medium>, why: Open) -> Box<dyn Server> {
        let medium = medium.expect("whoever uses a medium is given one");
        let disk = MediumDisk::new(medium.clone(), self.described);
        let mut backend: Arc<dyn Backend> = Arc::new(ObservedCalls::new(disk, self.calls.clone()));
        if let Some(faults) = &self.faults {
            backend = Arc::new(faults.backend(backend));
        }
        if let Some(wrap) = &mut self.wrap_backend {
            backend = wrap(backend, medium, why);
        }
        self.declared = backend.geometry();
        let server: Box<dyn Server> = Box::new(PlainServer::new(backend, self.reorder));
        match &mut self.wrap_server {
            Some(wrap) => wrap(server, medium, why),
            None => server,
        }
    }

    fn geometry(&self) -> Geometry {
        self.declared
    }

    fn faults(&self) -> Option<&Faults> {
        self.faults.as_ref()
    }

    fn calls(&self) -> Option<&CallLog> {
        Some(&self.calls)
    }
}

impl fmt::Debug for MediumSubject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MediumSubject").field("geometry", &self.described).finish_non_exhaustive()
    }
}

/// What a device as `setup` describes it declares.
///
/// Discards and zeroes of more than a few requests' length are to be split as well, so their limits are low.
#[must_use]
pub fn geometry_of(setup: &Setup) -> Geometry {
    let mut geometry = Geometry::bytes(setup.bytes).logical_block(setup.logical_block);
    let max_bytes = u64::from(setup.max_io_bytes).max(u64::from(setup.logical_block)) * 2;
    let block = u64::from(setup.logical_block.max(1));
    let max_bytes = max_bytes / block * block;
    geometry.read_only = setup.read_only;
    geometry.volatile_cache = setup.volatile_cache;
    geometry.fua = setup.volatile_cache && setup.fua;
    if setup.discard {
        geometry =
            geometry.discard_limits(DiscardLimits { granularity: setup.logical_block, alignment: 0, max_bytes });
    }
    if setup.write_zeroes {
        geometry = geometry.write_zeroes_max(max_bytes);
    }
    geometry
}

/// What a device declares that is not what `setup` describes, or contradicts itself.
#[must_use]
pub fn declared_wrong(setup: &Setup, geometry: &Geometry) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut compare = |what: &str, declared: u64, described: u64| {
        if declared != described {
            wrong.push(format!("{what}: declared {declared}, but the device has {described}"));
        }
    };
    compare("size in bytes", geometry.size, setup.bytes);
    compare("logical block", geometry.logical_block.into(), setup.logical_block.into());
    compare("read-only", geometry.read_only.into(), setup.read_only.into());
    compare("volatile cache", geometry.volatile_cache.into(), setup.volatile_cache.into());
    compare("FUA", geometry.fua.into(), (setup.volatile_cache && setup.fua).into());
    compare("discard", geometry.discard.is_some().into(), setup.discard.into());
    compare("write-zeroes", geometry.write_zeroes.is_some().into(), setup.write_zeroes.into());
    let block = u64::from(geometry.logical_block);
    let mut check = |right: bool, what: &str| {
        if !right {
            wrong.push(what.to_owned());
        }
    };
    let whole = |bytes: u64| block > 0 && bytes > 0 && bytes.is_multiple_of(block);
    check(
        block.is_power_of_two() && (512..=4096).contains(&block),
        "the logical block is not from 512 to 4096 bytes",
    );
    check(whole(geometry.size), "the size is not a whole number of logical blocks");
    check(
        geometry.physical_block.is_power_of_two() && geometry.physical_block >= geometry.logical_block,
        "the physical block is less than the logical one",
    );
    if let Some(limits) = geometry.discard {
        check(whole(limits.granularity.into()), "the discard granularity is not a multiple of the logical block");
        check(whole(limits.max_bytes), "the largest discard is not a multiple of the logical block");
    }
    if let Some(max) = geometry.write_zeroes {
        check(whole(max), "the largest write-zeroes is not a multiple of the logical block");
    }
    wrong
}
