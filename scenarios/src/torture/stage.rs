//! Scripts on real devices: one that this program serves as the script wants it, or somebody else's.
//!
//! The actions begin in the order of the script, each worker's on a thread of its own. What completes when is the device's:
//! a script that fails may pass the next time, and how often it fails is a part of what is known of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use ublkit_harness::event::Event;
use ublkit_harness::fault::{Effect, FaultPlan};
use ublkit_harness::mutant::OnDevice;
use ublkit_harness::script::{Act, Script};
use ublkit_harness::shrink::Signature;
use ublkit_harness::{Ledger, LedgerOptions, Oracle, Oracles, Pattern, SECTOR, SectorRange};

use super::accounts::Accounts;
use super::book::Book;
use super::crew::{Crew, Job};
use super::device::{Opened, Subject};
use super::scripted::Scripted;
use super::shared::{Orders, Shared};
use super::verify;
use crate::context::Context;
use crate::external::ExternalArgs;
use crate::refusals;
use crate::scenario::{Broken, Failure};
use crate::target::{BackendKind, Capabilities, Mode, NEIGHBOUR, Patience, Storage, TargetArgs};

/// How many workers a script may have: each is a thread.
const WORKERS_MAX: u32 = 256;
/// How long it may take to start and to close a device, until nobody else looks at it, and to compare everything. The
/// operations of the script have a clock of their own.
const START: Duration = Duration::from_secs(120);
const OPEN: Duration = Duration::from_secs(30);
const VERIFY: Duration = Duration::from_secs(300);

/// How a device is served, beside what a script says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServedBy {
    pub(crate) backend: BackendKind,
    pub(crate) mode: Mode,
    pub(crate) workers_backend: usize,
}

impl Default for ServedBy {
    /// As on the simulator: a disk that can lose its cache.
    fn default() -> Self {
        Self { backend: BackendKind::Medium, mode: Mode::Copy, workers_backend: 0 }
    }
}

impl ServedBy {
    /// As a bundle keeps it.
    pub(crate) fn told(self) -> BTreeMap<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => fields.into_iter().collect(),
            _ => BTreeMap::new(),
        }
    }

    /// From what a bundle keeps.
    pub(crate) fn of(told: &BTreeMap<String, Value>) -> Result<Self, Failure> {
        let fields = Value::Object(told.clone().into_iter().collect());
        serde_json::from_value(fields).map_err(|error| {
            Failure::Usage(format!("how the device of this bundle was served is not known here: {error}"))
        })
    }
}

/// Where a script is done.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// On a device that is served by this program.
    Served(ServedBy),
    /// On somebody else's.
    External(ExternalArgs),
}

/// Where a script is done, and how.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    pub(crate) place: Place,
    /// What tells the sectors that are written from another device's.
    pub(crate) device: u32,
    /// How long an operation may take before that is a hang.
    pub(crate) stall: Duration,
}

/// What was served last: its server can serve the next device too, and need not be started anew.
#[derive(Debug, Default)]
pub(crate) struct Last(Option<Storage>);

impl Stage {
    /// Whether the script can be done there.
    pub(crate) fn check(&self, script: &Script) -> Result<(), Failure> {
        let wrong = |text: String| Err(Failure::Usage(text));
        if script.setup.workers > WORKERS_MAX {
            return wrong(format!("{} workers: a real device takes up to {WORKERS_MAX}", script.setup.workers));
        }
        let has = |act: Act| script.actions.iter().any(|action| action.act == act);
        match &self.place {
            Place::Served(served) => {
                if let Some(planted) = script.mutant
                    && let OnDevice::No(why) = planted.mutant.spec().device
                {
                    return wrong(format!("{planted} cannot be planted in a real device: {why}; use --sim"));
                }
                if has(Act::PowerCut) && served.backend != BackendKind::Medium {
                    return wrong(
                        "the power is cut in it, which takes a disk that can lose its cache: --backend medium"
                            .to_owned(),
                    );
                }
                if script.faults.rules.iter().any(|rule| rule.effect == Effect::Short) {
                    return wrong(
                        "it has short results, and a server of a real device serves requests as a whole: use --sim"
                            .to_owned(),
                    );
                }
            }
            Place::External(_) => {
                if has(Act::PowerCut) || has(Act::Kill) {
                    return wrong("the power is cut in it, or the server dies: that takes a device of our own (--device-mode, --sim)".to_owned());
                }
                if let Some(planted) = script.mutant {
                    return wrong(format!(
                        "it has {planted} planted: that takes a device of our own (--device-mode, --sim)"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Does the script. What it did is added to the evidence of the run.
    pub(crate) fn perform(&self, context: &mut Context, script: &Script, last: &mut Last) -> Result<(), Failure> {
        // Everything that is drawn is drawn from the script's seed.
        let seed = std::mem::replace(&mut context.seed, script.seed);
        let outcome = self.perform_seeded(context, script, last);
        context.seed = seed;
        outcome
    }

    /// As [`perform`](Self::perform), for how it fails. Nothing is told, and the evidence is nobody's. An error is no
    /// failure of the device's.
    pub(crate) fn failure_of(
        &self,
        context: &mut Context,
        script: &Script,
        last: &mut Last,
    ) -> Result<Option<Event>, Failure> {
        let evidence = std::mem::take(&mut context.evidence);
        let outcome = self.perform(context, script, last);
        context.evidence = evidence;
        match outcome {
            Ok(()) => Ok(None),
            Err(Failure::DeviceBroke(Broken { event, .. })) => Ok(Some(*event)),
            Err(other) => Err(other),
        }
    }

    fn perform_seeded(&self, context: &mut Context, script: &Script, last: &mut Last) -> Result<(), Failure> {
        let counts = vec![0; script.setup.workers as usize];
        let mut performance = Performance { stage: self, script, book: None, counts };
        let mut actions = script.actions.iter().peekable();
        let mut filled = None;
        if script.setup.read_only {
            performance.fill(context, last)?;
            filled = last.0.take();
        }
        loop {
            let watched = context.watchdog().guard("start the device", context.at_most(START));
            let subject = match filled {
                Some(storage) => target(script, self.served()?).serve(context, &storage).map(Subject::Ours),
                None => self.start(context, script, last),
            }?;
            drop(watched);
            let outcome = performance.act(context, &subject, &mut actions, false);
            let storage = if let Subject::Ours(target) = &subject { Some(target.storage().clone()) } else { None };
            let closed = close(context, subject);
            last.0.clone_from(&storage);
            outcome.and(closed)?;
            if actions.peek().is_none() {
                return Ok(());
            }
            filled = storage;
        }
    }

    fn served(&self) -> Result<ServedBy, Failure> {
        match &self.place {
            Place::Served(served) => Ok(*served),
            Place::External(_) => Err(Failure::Internal("this is for devices of our own".to_owned())),
        }
    }

    /// The device, with nothing on it where it is one of our own.
    fn start(&self, context: &Context, script: &Script, last: &mut Last) -> Result<Subject, Failure> {
        if let Place::External(external) = &self.place {
            let external = external.start(context)?;
            return external.map(Subject::SomebodyElses).ok_or_else(|| {
                Failure::Internal("somebody else's device was asked for, and there is none".to_owned())
            });
        }
        let target = target(script, self.served()?);
        if let Some(storage) = last.0.take()
            && let Ok(target) = target.start_in_place_of(context, storage)
        {
            return Ok(Subject::Ours(target));
        }
        target.start(context).map(Subject::Ours)
    }
}

fn close(context: &mut Context, subject: Subject) -> Result<(), Failure> {
    let _watched = context.watchdog().guard("close the device", context.at_most(START));
    subject.close(context)
}

/// The device that a script wants.
fn target(script: &Script, served: ServedBy) -> TargetArgs {
    let setup = &script.setup;
    let ServedBy { backend, mode, workers_backend } = served;
    TargetArgs {
        backend,
        size: setup.bytes,
        queues: setup.queues,
        depth: setup.queue_depth,
        mode,
        workers_backend,
        logical_block: setup.logical_block,
        max_io: setup.max_io_bytes,
        capabilities: Capabilities::of(setup),
        discard_promises_nothing: !setup.discard_zeroes,
        read_only: setup.read_only,
        mutant: script.mutant,
        raw_server: false,
        faults: script.faults.clone(),
        patience: Patience::default(),
        lie: None,
        hang: None,
        tracing: None,
        over: None,
    }
}

/// Who says that what `event` tells of is wrong.
pub(crate) fn oracle_of(event: &Event) -> Oracle {
    match event {
        Event::Mismatch(mismatch) => mismatch.oracle,
        Event::Hang(_) => Oracle::Watchdog,
        Event::Finding(finding) if finding.oracle == "io" => Oracle::Errors,
        // What a device is, keeps and leaves, and what its kernel says.
        Event::Finding(finding) => finding.oracle.parse().unwrap_or(Oracle::Resources),
        _ => Oracle::Resources,
    }
}

/// What tells this failure from others.
pub(crate) fn signature_of(event: &Event) -> Signature {
    Signature::of(oracle_of(event), event)
}

/// A script that is being done.
struct Performance<'a> {
    stage: &'a Stage,
    script: &'a Script,
    /// What the whole device may hold, from its first opening on.
    book: Option<Arc<Book>>,
    /// How many operations of each worker were begun.
    counts: Vec<u64>,
}

impl Performance<'_> {
    /// Fills the storage of a device that is read-only, by way of one that is not, and leaves it behind.
    fn fill(&mut self, context: &mut Context, last: &mut Last) -> Result<(), Failure> {
        let mut setup = self.script.setup;
        setup.read_only = false;
        let writable = Script { setup, mutant: None, faults: FaultPlan::NONE, ..self.script.clone() };
        let subject = self.stage.start(context, &writable, last)?;
        let outcome = self.act(context, &subject, &mut std::iter::empty(), true);
        last.0 = subject.ours().ok().map(|target| target.storage().clone());
        let closed = close(context, subject);
        outcome.and(closed)
    }

    /// Does what is to be done until the device is opened anew.
    fn act<'a>(
        &mut self,
        context: &mut Context,
        subject: &Subject,
        actions: &mut impl Iterator<Item = &'a ublkit_harness::script::Action>,
        fill: bool,
    ) -> Result<(), Failure> {
        let watched = context.watchdog().guard("open the device", context.at_most(OPEN));
        let _ours_alone = subject.keep_to_ourselves()?;
        let opened = subject.open()?;
        drop(watched);
        self.fits(&opened)?;
        let ours = if let Subject::Ours(target) = subject { Some(target) } else { None };
        if let Some(target) = ours {
            target.check_reclaim()?;
        }
        let refuses = ours.filter(|target| target.geometry().read_only);
        if let Some(target) = refuses {
            refusals::check(context, target)?;
        }
        let first = self.book.is_none();
        let book = Arc::clone(self.book.get_or_insert_with(|| self.stage.book(self.script, &opened)));
        let fill = fill || first && !opened.zeroed;
        let scripted = Arc::new(Scripted::next(self.script, actions, &mut self.counts, &opened, fill));
        let errors = self.script.mutant.is_some() || !self.script.faults.is_empty();
        let workers = scripted.workers();
        let accounts = opened.ours.then(|| Accounts::new(workers, errors, opened.capabilities.flush));
        let orders = Orders {
            ops: None,
            until: None,
            passes: false,
            prefill: false,
            max_io_bytes: opened.max_io_bytes,
            stall: self.stage.stall,
            hang: false,
        };
        let shared = Arc::new(Shared::new(orders, workers, accounts, context));
        let job = Job::Follow { script: &scripted, book: &book };
        Crew { subject, opened: &opened, job }.work(context, &shared)?;
        if context.interruption().came() {
            return Err(Failure::Interrupted);
        }
        let _watched = context.watchdog().guard("verify", context.at_most(VERIFY));
        if let Some(target) = ours {
            let read = |buf: &mut [u8], offset| target.storage().read_at(buf, offset);
            context.evidence().add("storage_verified_bytes", verify::areas(&book, scripted.areas(), read)?);
        }
        if let Some(target) = refuses {
            refusals::check(context, target)?;
        }
        Ok(())
    }

    /// Whether the device, if it is somebody else's, is one for this script.
    fn fits(&self, opened: &Opened) -> Result<(), Failure> {
        let setup = &self.script.setup;
        if opened.bytes < setup.bytes {
            return Err(Failure::Usage(format!(
                "the script is for {} bytes, and the device has {}",
                setup.bytes, opened.bytes
            )));
        }
        if opened.logical_block > setup.logical_block.into() {
            return Err(Failure::Usage(format!(
                "the script is for logical blocks of {} bytes, and those of the device have {}",
                setup.logical_block, opened.logical_block
            )));
        }
        Ok(())
    }
}

impl Stage {
    fn book(&self, script: &Script, opened: &Opened) -> Arc<Book> {
        let region = SectorRange::device(script.setup.bytes);
        let cuts = script.actions.iter().any(|action| matches!(action.act, Act::PowerCut));
        Arc::new(Book::shared(Ledger::new(LedgerOptions {
            region,
            block_sectors: script.setup.logical_block / SECTOR as u32,
            pattern: Arc::new(script.setup.pattern(script.seed, self.device)),
            foreign: Arc::new([Pattern::new(script.seed, NEIGHBOUR)]),
            device_sectors: opened.bytes / SECTOR as u64,
            initially_zero: opened.zeroed,
            discard: opened.discard,
            volatile_cache: cuts && opened.capabilities.flush,
            torn_by_races: opened.torn_by_races,
            oracles: Oracles::ALL,
        })))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use ublkit_harness::Seed;
    use ublkit_harness::script::{Action, Recovery, Setup, VERSION};

    use super::*;

    /// A device of 64 MiB, and two workers.
    pub(crate) fn setup() -> Setup {
        Setup {
            bytes: 64 << 20,
            logical_block: 512,
            max_io_bytes: 64 << 10,
            queues: 1,
            queue_depth: 8,
            workers: 2,
            io_depth: 4,
            volatile_cache: true,
            fua: true,
            discard: true,
            discard_zeroes: true,
            write_zeroes: true,
            read_only: false,
            recovery: Recovery::None,
            merges: true,
            reorder: 0,
            memory_pressure: false,
            compressible: 0,
        }
    }

    fn script(acts: &[Act]) -> Script {
        let actions = acts.iter().map(|act| Action { worker: 0, act: *act }).collect();
        Script {
            version: VERSION,
            seed: Seed::new(1),
            setup: setup(),
            mutant: None,
            faults: FaultPlan::NONE,
            actions,
        }
    }

    fn check(place: &Place, script: &Script) -> Result<(), String> {
        let stage = Stage { place: place.clone(), device: 0, stall: Duration::from_secs(60) };
        stage.check(script).map_err(|failure| failure.to_string())
    }

    #[test]
    fn what_cannot_be_done_somewhere_is_refused_with_what_can() {
        let medium = Place::Served(ServedBy::default());
        let memory = Place::Served(ServedBy { backend: BackendKind::Memory, ..ServedBy::default() });
        let external = Place::External(ExternalArgs::default());
        let refused = |place: &Place, script: &Script, why: &str| {
            let error = check(place, script).expect_err(why);
            assert!(error.contains(why), "{error}");
        };
        let plain = script(&[Act::Sweep, Act::Reopen]);
        for place in [&medium, &memory, &external] {
            assert_eq!(check(place, &plain), Ok(()));
        }
        let cut = script(&[Act::PowerCut]);
        assert_eq!(check(&medium, &cut), Ok(()));
        refused(&memory, &cut, "--backend medium");
        refused(&external, &cut, "--device-mode");
        refused(&external, &script(&[Act::Kill]), "--device-mode");
        let planted = |name: &str| Script { mutant: Some(name.parse().expect("a mutant")), ..plain.clone() };
        assert_eq!(check(&memory, &planted("lost-write")), Ok(()));
        refused(&external, &planted("lost-write"), "lost-write");
        refused(&medium, &planted("zc-early-unregister"), "use --sim");
        let short = Script { faults: "read every 3: short".parse().expect("a plan"), ..plain.clone() };
        refused(&medium, &short, "short results");
        let mut many = plain;
        many.setup.workers = WORKERS_MAX + 1;
        refused(&external, &many, "256");
    }

    #[test]
    fn how_a_device_was_served_is_told_and_understood() {
        let served = ServedBy { backend: BackendKind::File, mode: Mode::UserCopy, workers_backend: 3 };
        assert_eq!(ServedBy::of(&served.told()).ok(), Some(served));
        let mut told = served.told();
        told.insert("moon".to_owned(), Value::from("full"));
        assert!(ServedBy::of(&told).is_err_and(|failure| failure.to_string().contains("moon")));
        assert!(ServedBy::of(&BTreeMap::new()).is_err());
    }

    #[test]
    fn the_device_is_as_the_script_says() {
        let target = target(&script(&[]), ServedBy::default());
        let geometry = target.geometry();
        assert_eq!((geometry.size, geometry.logical_block, geometry.fua), (64 << 20, 512, true));
        assert!(geometry.discard.is_some() && geometry.write_zeroes.is_some() && geometry.volatile_cache);
        let mut bare = script(&[]);
        let Setup { volatile_cache, fua, discard, discard_zeroes, write_zeroes, .. } = &mut bare.setup;
        for has in [volatile_cache, fua, discard, discard_zeroes, write_zeroes] {
            *has = false;
        }
        let geometry = super::target(&bare, ServedBy::default()).geometry();
        assert!(!geometry.volatile_cache && !geometry.fua);
        assert!(geometry.discard.is_none() && geometry.write_zeroes.is_none());
    }

    #[test]
    fn every_failure_has_an_oracle() {
        let of = |oracle: &str| oracle_of(&Event::finding(oracle, "something"));
        assert_eq!(of("flush"), Oracle::Flush);
        assert_eq!(of("io"), Oracle::Errors);
        assert_eq!(of("read_only"), Oracle::Resources);
        assert_eq!(signature_of(&Event::finding("io", "sector 5")).class, "sector #");
    }
}
