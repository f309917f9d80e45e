//! The engine in anyone's tests: draws what is done to a backend, and says which promise it breaks.
//!
//! A crate with a backend needs one line in its `Cargo.toml`,
//!
//! ```toml
//! [dev-dependencies]
//! ublkit-harness = "0.1"
//!
//! # Ten times as many seeds in the same time.
//! [profile.dev.package.ublkit-harness]
//! opt-level = 2
//! ```
//!
//! and a test, which needs no root, no kernel and no device:
//!
//! ```
//! use std::io;
//! use std::sync::{Mutex, PoisonError};
//! use ublkit::{Backend, Geometry, WriteFlags};
//!
//! struct Disk(Mutex<Vec<u8>>);
//!
//! impl Backend for Disk {
//!     fn geometry(&self) -> Geometry {
//!         Geometry::bytes(1 << 20)
//!     }
//!     fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
//!         let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
//!         buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
//!         Ok(())
//!     }
//!     fn write_at(&self, buf: &[u8], offset: u64, _: WriteFlags) -> io::Result<()> {
//!         let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
//!         bytes[offset as usize..][..buf.len()].copy_from_slice(buf);
//!         Ok(())
//!     }
//! }
//!
//! # /*
//! #[test]
//! # */
//! fn the_disk_keeps_its_promises() {
//!     use ublkit_harness::check;
//!     check(|| Disk(Mutex::new(vec![0; 1 << 20]))).seeds(20).threads(4).run();
//! }
//! # the_disk_keeps_its_promises();
//! ```
//!
//! # What is checked
//!
//! Every seed is a run on a [simulated](crate::sim) block layer and driver, with queues, workers, request sizes, merges,
//! completions out of order, and requests that are delayed, held or only done in part; all of that is drawn. The device is
//! what the backend's [`Geometry`] says. Reads must return what was written: no old data, no data of
//! other sectors, none of it torn, and zeroes where zeroes belong. Nothing may fail or hang. On a device of more than a MiB or
//! two a run works at its beginning, its end, across a power of two and somewhere else.
//!
//! What else happens follows from what the closure takes:
//!
//! | closure | storage | also happens |
//! | --- | --- | --- |
//! | `\|\| …` | its own | nothing |
//! | `\|\| …` with [`reopens`](Check::reopens) | its own, and there again when it is called again, as in a file | the server dies; the device is closed; it is opened again |
//! | `\|medium: Medium\| …` | a simulated disk | the same, and the power is cut |
//!
//! It may return a backend, or a `Result` with one. Not to open, or to open as another device, is a failure.
//!
//! * A [`Medium`] is a disk with a volatile cache, whatever the backend declares. At a power cut any of what was not flushed
//!   may be lost, block by block. A backend that declares a volatile cache may lose what came after its last flush; one that
//!   does not may lose nothing that was acknowledged.
//! * When the server dies, or the device is closed, nothing that was acknowledged may be lost, with a volatile cache or
//!   without: the kernel and the power are still there, and nobody tells the application to write again. See
//!   [`kills`](Check::kills).
//! * What a backend does when it is dropped reaches the medium only where the device is closed in order.
//! * The medium never fails, unless [`medium_errors`](Check::medium_errors) says so.
//! * A new device reads as zeroes, see [`initially_anything`](Check::initially_anything), and what is discarded is anything
//!   until it is written again, see [`discard_reads_zeroes`](Check::discard_reads_zeroes).
//!
//! The simulator has one thread. With [`threads`](Check::threads), several call the backend at the same time
//! afterwards.
//!
//! # When it fails
//!
//! The run is made small, within a few seconds, and [`run`](Check::run) panics with a page that says which promise was
//! broken, in which few steps, and with which seed the test shows it again. Two environment variables are for that:
//! `UBLKIT_CHECK_SEED=7` runs that seed alone, and `UBLKIT_CHECK_SEEDS=10` ten times as many as the test says.
//!
//! A backend that is deterministic fails again in the same way. A check that did nothing, such as one without seeds, is no
//! pass: it panics too.

mod areas;
mod factory;
mod found;
mod page;
mod racing;
mod seeds;
mod smaller;
mod subject;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use ublkit::Geometry;

use self::areas::Areas;
pub use self::factory::{Blocking, Factory, Fallible, IntoServer, OnMedium, Opened, OwnStorage};
pub use self::found::{Checked, Found};
use self::seeds::Seeds;
use self::subject::Opener;
use self::watch::Remarks;
use crate::bundle::Failure;
use crate::event::{Event, Finding};
use crate::fault::{Effect, Errno, FaultPlan, Ops, Rule, Stage, Trigger};
use crate::oracle::Oracle;
use crate::plan::{OpKind, PlanError};
use crate::range::SectorRange;
use crate::script::{Action, Actions, Script, Setup, VERSION, Workload};
use crate::seed::{Seed, SeededRng};
use crate::sim::subject::declared_wrong;
use crate::sim::{Medium, MediumOptions, Ran, RunOptions, run};

/// How many seeds are run.
const SEEDS: u64 = 100;

/// How many operations a run has.
const OPS: u64 = 2000;

/// On how much of the device a run works at most, in bytes. Whoever tests is not to wait for bytes that are like others.
const WINDOW: u64 = 1 << 20;

/// How large a medium is, in bytes.
const MEDIUM_BYTES: u64 = 4 << 20;

/// Checks the backend that `factory` opens: see [the module](self).
#[must_use = "nothing is checked before `run`"]
pub fn check<M, F: Factory<M>>(factory: F) -> Check<F, M> {
    Check {
        factory,
        seeds: Seeds::new(SEEDS),
        ops: OPS,
        timing_faults: true,
        medium_errors: false,
        medium_bytes: MEDIUM_BYTES,
        reopens: F::ON_MEDIUM,
        kills: true,
        reset: None,
        discard_reads_zeroes: false,
        initially_anything: false,
        threads: 0,
        torn_by_races: false,
        marker: PhantomData,
    }
}

/// A check that is being put together: see [the module](self).
#[must_use = "nothing is checked before `run`"]
#[expect(clippy::struct_excessive_bools, reason = "each is asked for or not on its own")]
pub struct Check<F, M> {
    factory: F,
    seeds: Seeds,
    ops: u64,
    timing_faults: bool,
    medium_errors: bool,
    medium_bytes: u64,
    reopens: bool,
    kills: bool,
    reset: Option<Box<dyn Fn()>>,
    discard_reads_zeroes: bool,
    initially_anything: bool,
    threads: u32,
    torn_by_races: bool,
    marker: PhantomData<fn() -> M>,
}

/// One seed's run before it is done.
struct Drawn {
    /// The run without its actions.
    header: Script,
    areas: Areas,
    workload: Workload,
}

impl<F: Factory<M>, M> Check<F, M> {
    /// How many seeds are run, one after another; 100 if not said.
    pub fn seeds(mut self, count: u64) -> Self {
        self.seeds.count = count;
        self
    }

    /// The first seed; others follow. 1 if not said.
    pub fn first_seed(mut self, seed: impl Into<Seed>) -> Self {
        self.seeds.first = seed.into().get();
        self
    }

    /// This seed alone: to see a failure again.
    pub fn seed(self, seed: impl Into<Seed>) -> Self {
        self.first_seed(seed).seeds(1)
    }

    /// How many operations each seed has; 2,000 if not said.
    pub fn ops(mut self, ops: u64) -> Self {
        self.ops = ops;
        self
    }

    /// Whether requests are delayed, held back, and done in part as a server may do. They are if not said. No errors are
    /// made up, but for [`medium_errors`](Self::medium_errors).
    pub fn timing_faults(mut self, yes: bool) -> Self {
        self.timing_faults = yes;
        self
    }

    /// Whether the server dies, where that can happen at all; it does if not said.
    ///
    /// A backend that keeps acknowledged writes in its own memory until a flush loses them as it dies, although the power is
    /// on. That is a failure unless this says `false`: then nothing happens but power cuts and orderly ends.
    pub fn kills(mut self, yes: bool) -> Self {
        self.kills = yes;
        self
    }

    /// What is discarded reads as zeroes. Without this, it may be anything until it is written again.
    pub fn discard_reads_zeroes(mut self) -> Self {
        self.discard_reads_zeroes = true;
        self
    }

    /// Before the first write anything may be read. Without this, a new device must read as zeroes.
    pub fn initially_anything(mut self) -> Self {
        self.initially_anything = true;
        self
    }

    /// After the simulated runs, this many threads call the backend at the same time, some thousands of times.
    ///
    /// A block must not be torn by that: all of a racing write is there or nothing of it, as file systems expect of disks.
    /// See [`torn_by_races`](Self::torn_by_races).
    pub fn threads(mut self, threads: u32) -> Self {
        self.threads = threads;
        self
    }

    /// While a write is under way, its blocks may be partly old and partly new, as through the page cache. Only for
    /// [`threads`](Self::threads).
    pub fn torn_by_races(mut self) -> Self {
        self.torn_by_races = true;
        self
    }

    /// Checks.
    ///
    /// # Panics
    /// When a promise is broken, with a page about it; or when nothing was checked.
    pub fn run(self) -> Checked {
        self.try_run().unwrap_or_else(|found| panic!("{found}"))
    }

    /// Checks, and returns what is found.
    ///
    /// # Errors
    /// The first promise that is broken.
    ///
    /// # Panics
    /// When nothing was checked.
    pub fn try_run(mut self) -> Result<Checked, Box<Found>> {
        self.seeds = self.seeds.as_environment_says();
        let remarks = Remarks::default();
        let mut checked = Checked::default();
        let geometry = self.look(self.seeds.first())?;
        for seed in self.seeds.iter() {
            let drawn = self.draw(seed, geometry);
            let mut actions = drawn.actions().map_err(|error| misuse(seed, &error.to_string()))?;
            let ran = self.simulate(&drawn.header, geometry, drawn.areas.ranges(), &mut actions, &remarks);
            if let Some(failure) = ran.failure {
                let failure = Failure { oracle: failure.oracle, event: failure.event, after_ops: failure.after_ops };
                return Err(self.shrink(&drawn, geometry, failure, &remarks));
            }
            checked.seeds += 1;
            checked.evidence.merge(&ran.evidence);
        }
        if self.threads > 0 {
            let race = self.race(self.seeds.first(), geometry)?;
            checked.evidence.merge(&race);
        }
        assert!(
            checked.ops() > 0 && checked.verified_bytes() > 0,
            "nothing was checked: {checked}; a check needs seeds, operations, and reads of what is known"
        );
        // One seed alone may have faults that come too late.
        assert!(
            !self.medium_errors || checked.seeds < 2 || checked.medium_errors() > 0,
            "nothing was checked: no call to the medium was made to fail: {checked}; more seeds or operations have some"
        );
        Ok(checked)
    }

    /// Opens the device once, to see what it is.
    fn look(&self, seed: Seed) -> Result<Geometry, Box<Found>> {
        let opened = self.open_new().map_err(|why_not| misuse(seed, &format!("it does not open: {why_not}")))?;
        let geometry = opened.geometry();
        let wrong = declared_wrong(&self.setup_of(Setup::draw(&mut seed.rng()), &geometry), &geometry);
        if let Some(wrong) = wrong.first() {
            return Err(misuse(seed, &format!("its geometry is wrong: {wrong}")));
        }
        Ok(geometry)
    }

    /// A device that nothing was written to.
    fn open_new(&self) -> Result<Opened, String> {
        if let Some(reset) = &self.reset {
            reset();
        }
        let options = MediumOptions { bytes: self.medium_bytes, volatile_cache: true, atomic_bytes: 512 };
        self.factory.open(F::ON_MEDIUM.then(|| Medium::new(options)))
    }

    /// Whether what was not written reads as zeroes. Storage that is used again and again holds what was there before.
    fn initially_zero(&self) -> bool {
        !self.initially_anything && (F::ON_MEDIUM || !self.reopens || self.reset.is_some())
    }

    /// `setup` as the device that was declared has it, and everything else as it is.
    fn setup_of(&self, setup: Setup, geometry: &Geometry) -> Setup {
        let size = geometry.size.max(512);
        let block = geometry.logical_block.max(512);
        Setup {
            bytes: geometry.size,
            logical_block: geometry.logical_block,
            max_io_bytes: setup.max_io_bytes.min((1_u64 << size.min(1 << 31).ilog2()) as u32).max(block),
            volatile_cache: geometry.volatile_cache,
            fua: geometry.volatile_cache && geometry.fua,
            discard: geometry.discard.is_some(),
            discard_zeroes: geometry.discard.is_some() && self.discard_reads_zeroes,
            write_zeroes: geometry.write_zeroes.is_some(),
            read_only: geometry.read_only,
            ..setup
        }
    }

    fn draw(&self, seed: Seed, geometry: Geometry) -> Drawn {
        let mut drawn = Setup::draw(&mut seed.derive("setup", 0).rng());
        drawn.bytes = drawn.bytes.min(WINDOW);
        drawn.max_io_bytes = drawn.max_io_bytes.min((WINDOW / 4) as u32);
        let block = u64::from(geometry.logical_block);
        let areas = Areas::draw(&mut seed.derive("areas", 0).rng(), geometry.size, drawn.bytes, block);
        let setup = self.setup_of(drawn, &geometry);
        let mut faults = FaultPlan::NONE;
        if self.timing_faults || self.medium_errors {
            let mut rng = seed.derive("faults", 0).rng();
            faults = FaultPlan::draw(&mut rng, setup.device().sectors);
            faults.rules.retain(|rule| if rule.effect.is_timing() { self.timing_faults } else { self.medium_errors });
            if self.medium_errors {
                as_of_a_medium(&mut faults, &mut rng);
            }
        }
        let workload = Workload {
            ops: Some(self.ops),
            cuts: F::ON_MEDIUM,
            kills: self.reopens && self.kills,
            reopens: self.reopens,
            faults: !faults.is_empty(),
        };
        let header = Script { version: VERSION, seed, setup, mutant: None, faults, actions: Vec::new() };
        Drawn { header, areas, workload }
    }

    fn simulate(
        &self,
        header: &Script,
        geometry: Geometry,
        areas: Arc<[SectorRange]>,
        actions: &mut dyn Iterator<Item = Action>,
        remarks: &Remarks,
    ) -> Ran {
        if let Some(reset) = &self.reset {
            reset();
        }
        remarks.take();
        let storage = (self.medium_bytes, self.initially_zero());
        let mut opener = Opener::new(&self.factory, header, geometry, storage, remarks);
        let options = RunOptions { areas, ..RunOptions::default() };
        run(&header.setup, header.seed, &mut opener, actions, &options)
    }
}

impl<F, S, K> Check<F, (OwnStorage, S, K)>
where
    F: Factory<(OwnStorage, S, K)>,
{
    /// The closure opens the same storage whenever it is called, such as a file. Then the device is closed, its server dies,
    /// and everything that was acknowledged has to be there when it is opened again.
    ///
    /// One run finds what another left, so that nothing is known of what was not written: unless [`reset`](Self::reset)
    /// says how to begin anew.
    ///
    /// When its server dies, a backend is dropped like any value; what it does as it is dropped still happens.
    pub fn reopens(mut self) -> Self {
        self.reopens = true;
        self
    }

    /// As [`reopens`](Self::reopens), and `reset` makes the storage new, so that it reads as zeroes: before each run.
    pub fn reset(mut self, reset: impl Fn() + 'static) -> Self {
        self.reset = Some(Box::new(reset));
        self.reopens()
    }
}

impl<F, S, K> Check<F, (OnMedium, S, K)>
where
    F: Factory<(OnMedium, S, K)>,
{
    /// Whether calls to the [`Medium`] fail now and then, with `EIO` or `ENOSPC`, before, halfway through or after what they
    /// were to do; they do not if not said.
    ///
    /// While such an error is made, operations may fail, with any error; a flush may also be where an earlier one is
    /// told of. What became of an operation that failed is not known until it is read: all of it, nothing, or some of its
    /// blocks. What is acknowledged is judged as ever: a backend that takes an error for success loses
    /// data, and one that has a second try may be right. To fail without need is wrong, then and at any other time: also because
    /// of an error that was told of before.
    ///
    /// No call fails while the device opens, once it is about to be closed, or with [`threads`](Self::threads).
    pub fn medium_errors(mut self, yes: bool) -> Self {
        self.medium_errors = yes;
        self
    }

    /// How large the medium is, in bytes: 4 MiB if not said. It takes as much memory as is written to, and more.
    pub fn medium_bytes(mut self, bytes: u64) -> Self {
        self.medium_bytes = bytes;
        self
    }
}

impl<F, M> fmt::Debug for Check<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check").field("seeds", &self.seeds).field("ops", &self.ops).finish_non_exhaustive()
    }
}

impl Drawn {
    fn actions(&self) -> Result<impl Iterator<Item = Action> + use<>, PlanError> {
        let small = Setup { bytes: self.areas.bytes(), ..self.header.setup };
        let areas = self.areas.clone();
        Ok(Actions::new(self.header.seed, &small, self.workload)?.map(move |action| areas.place(action)))
    }
}

/// Errors as disks have them. What was drawn for a whole device is rare; a backend may make few calls of a kind, so in half of
/// the runs one kind fails often instead.
fn as_of_a_medium(faults: &mut FaultPlan, rng: &mut SeededRng) {
    if rng.chance(1, 2) || faults.rules.iter().all(|rule| rule.effect.is_timing()) {
        faults.rules.retain(|rule| rule.effect.is_timing());
        let zeroes = Ops::only(OpKind::WriteZeroes);
        let kinds = [Ops::ANY, Ops::WRITES, Ops::only(OpKind::Read), Ops::only(OpKind::Flush), zeroes];
        let ops = rng.pick(&kinds).copied().unwrap_or(Ops::ANY);
        let stage = rng.pick(&[Stage::Before, Stage::Partway, Stage::After]).copied().unwrap_or(Stage::Before);
        let trigger = Trigger::Rate { hits: 1, out_of: 4 << rng.below(5) };
        faults.rules.push(Rule { trigger, ..Rule::new(ops, Effect::Error { errno: Errno::EIO, stage }) });
    }
    for rule in &mut faults.rules {
        if let Effect::Error { errno, .. } = &mut rule.effect
            && *errno != Errno::ENOSPC
        {
            *errno = Errno::EIO;
        }
    }
}

/// There is nothing to run: the device is none.
fn misuse(seed: Seed, what: &str) -> Box<Found> {
    let finding = Finding { oracle: Oracle::Resources.name().to_owned(), what: what.to_owned(), detail: Vec::new() };
    let failure = Failure { oracle: Oracle::Resources, event: Event::Finding(finding), after_ops: 0 };
    Box::new(Found::new(seed, failure))
}
