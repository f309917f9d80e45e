//! Planted bugs: backends, servers and declarations that are wrong in a known way, for finding out whether they are found
//! out; and legal oddities, for finding out whether they are taken for bugs.
//!
//! A harness that has never failed a device proves nothing. Each mutant stands for a bug that real storage had, and a run
//! over it has to end in a failure that names it. A control is odd but within its rights, and has to pass.
//!
//! Most are a layer between a server and its storage ([`plant_backend`]) or between the driver and a server
//! ([`plant_server`]); some are lies in what is declared ([`declared_geometry`]). Each one's [`Spec`] says which. What a
//! mutant keeps in memory is lost when its server ends, whatever ended it.

mod cache;
mod controls;
mod discard;
mod errors;
mod lifecycle;
mod pieces;
mod reads;
mod rewrites;
mod server;
mod spec;
#[cfg(test)]
pub(crate) mod tests;
mod twist;
mod writes;

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use ublkit::Backend;

pub use self::lifecycle::{declared_geometry, gives_id_back};
pub use self::spec::{Layer, Mutant, OnDevice, Spec, UnknownMutant};
pub use self::twist::Turn;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::Pattern;
use crate::seed::Seed;
use crate::sim::medium::Medium;
use crate::sim::server::Server;
pub use crate::sim::subject::Open;

/// A bug to plant: `lost-write`, or `lost-write:30` for one in 30 operations of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Planted {
    /// Which.
    pub mutant: Mutant,
    /// It errs once in so many operations of its kind.
    pub every: u64,
}

impl From<Mutant> for Planted {
    /// As often as the mutant errs unless told otherwise.
    fn from(mutant: Mutant) -> Self {
        Self { mutant, every: mutant.spec().every }
    }
}

impl fmt::Display for Planted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.mutant, self.every)
    }
}

impl FromStr for Planted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, every) = match text.split_once(':') {
            None => (text, None),
            Some((name, every)) => match every.parse() {
                Ok(every @ 1..) => (name, Some(every)),
                _ => return Err(format!("'{every}' in '{text}' is not a whole number from 1")),
            },
        };
        let planted = Self::from(name.parse::<Mutant>().map_err(|error| error.to_string())?);
        Ok(Self { every: every.unwrap_or(planted.every), ..planted })
    }
}

impl From<Planted> for String {
    fn from(planted: Planted) -> Self {
        planted.to_string()
    }
}

impl TryFrom<String> for Planted {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// How often a mutant has been wrong, and could have been. One that never was proves nothing.
#[derive(Clone, Debug, Default)]
pub struct Hits(Arc<Tally>);

#[derive(Debug, Default)]
struct Tally {
    hits: AtomicU64,
    chances: AtomicU64,
}

impl Hits {
    /// How often it was wrong, until now.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.hits.load(Ordering::Relaxed)
    }

    /// How often it could have been wrong, until now: the operations of its kind.
    #[must_use]
    pub fn chances(&self) -> u64 {
        self.0.chances.load(Ordering::Relaxed)
    }

    /// It was wrong once more: for bugs that are planted outside of this crate.
    pub fn hit(&self) {
        self.0.hits.fetch_add(1, Ordering::Relaxed);
    }

    /// The number of the next operation of its kind.
    fn chance(&self) -> u64 {
        self.0.chances.fetch_add(1, Ordering::Relaxed)
    }
}

/// What is told of an error that a mutant makes by itself: the operation, its sectors, and the errno.
pub type Injected = Arc<dyn Fn(OpKind, SectorRange, i32) + Send + Sync>;

/// What a mutant may touch. One plot goes with one device, however often its server is started anew.
#[derive(Clone)]
pub struct Plot {
    /// What the mutant draws from.
    pub seed: Seed,
    /// Counts it.
    pub hits: Hits,
    /// The disk below, where there is one.
    pub medium: Option<Medium>,
    /// Why the server is started.
    pub why: Open,
    /// The size of a logical block, in bytes: what a server may cut a request at.
    pub logical_block: u32,
    /// Another device, or another run, whose bytes can turn up on this one.
    pub foreign: Option<Arc<Pattern>>,
    /// Is told of each error that a mutant makes by itself and admits to, so that whoever accounts for errors can expect
    /// it.
    pub injected: Option<Injected>,
    /// Set by whoever is going to stop the server in order, while it has requests in hand.
    pub stopping: Arc<AtomicBool>,
    past: Arc<Mutex<Past>>,
}

/// What outlives a server: what a mutant finds when it is started again.
#[derive(Debug, Default)]
struct Past {
    /// The disk as it was at some time.
    disk: Option<Medium>,
    /// Writes that were done, the oldest first.
    writes: std::collections::VecDeque<(u64, Vec<u8>)>,
}

impl Plot {
    /// A plot with nothing but a seed.
    #[must_use]
    pub fn new(seed: Seed) -> Self {
        Self {
            seed,
            hits: Hits::default(),
            medium: None,
            why: Open::First,
            logical_block: 4096,
            foreign: None,
            injected: None,
            stopping: Arc::default(),
            past: Arc::default(),
        }
    }

    /// The same plot for a server that is started again.
    #[must_use]
    pub fn again(&self, why: Open, medium: Option<Medium>) -> Self {
        self.stopping.store(false, Ordering::Relaxed);
        Self { medium, why, ..self.clone() }
    }

    fn admit(&self, kind: OpKind, offset: u64, len: u64, errno: i32) {
        if let Some(injected) = &self.injected {
            let sector = crate::sector::SECTOR as u64;
            injected(kind, SectorRange::new(offset / sector, len / sector), errno);
        }
    }
}

impl fmt::Debug for Plot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plot")
            .field("seed", &self.seed)
            .field("hits", &self.hits)
            .field("why", &self.why)
            .finish_non_exhaustive()
    }
}

/// Puts the bug between a server and its storage. `inner` itself comes back where the bug is elsewhere.
#[must_use]
pub fn plant_backend(planted: Planted, inner: Arc<dyn Backend>, plot: &Plot) -> Arc<dyn Backend> {
    let turn = Turn::new(planted, plot);
    let planted = writes::plant(planted.mutant, inner, &turn);
    let planted = planted.or_else(|inner| rewrites::plant(turn.mutant(), inner, &turn));
    let planted = planted.or_else(|inner| reads::plant(turn.mutant(), inner, &turn));
    let planted = planted.or_else(|inner| cache::plant(turn.mutant(), inner, &turn));
    let planted = planted.or_else(|inner| discard::plant(turn.mutant(), inner, &turn));
    let planted = planted.or_else(|inner| errors::plant(turn.mutant(), inner, &turn));
    let planted = planted.or_else(|inner| lifecycle::plant(turn.mutant(), inner, &turn));
    let planted = planted.or_else(|inner| controls::plant(turn.mutant(), inner, &turn));
    planted.unwrap_or_else(|inner| inner)
}

/// Puts the bug between the driver and a server. `inner` itself comes back where the bug is elsewhere.
#[must_use]
pub fn plant_server(planted: Planted, inner: Box<dyn Server>, plot: &Plot) -> Box<dyn Server> {
    let turn = Turn::new(planted, plot);
    let planted = server::plant(planted.mutant, inner, &turn);
    planted.or_else(|inner| pieces::plant(turn.mutant(), inner, &turn)).unwrap_or_else(|inner| inner)
}
