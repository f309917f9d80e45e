//! Trials: one run on the simulator, from a seed to a verdict, and from a failure to a script that fails again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ublkit::{Backend, Geometry};

use crate::fault::{FaultPlan, Faults};
use crate::mutant::{self, Planted, Plot};
use crate::plan::PlanError;
use crate::script::{Act, Action, Actions, Script, Setup, VERSION, Workload};
use crate::seed::Seed;
use crate::shrink::{ShrinkOptions, Shrunk, Signature, shrink_while};
use crate::sim::calls::{CallLog, ObservedCalls};
use crate::sim::medium::{Medium, MediumDisk};
use crate::sim::server::{PlainServer, Server};
use crate::sim::subject::geometry_of;
use crate::sim::{Open, Ran, RunOptions, Subject, run};

/// The number of the device that foreign bytes come from.
const OTHER_DEVICE: u32 = 77;

/// A run on the simulator: everything that is drawn, and what is done.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The run without its actions.
    header: Script,
    workload: Workload,
}

impl Trial {
    /// Draws the device, how it is driven, and the faults. With a bug that is planted, the device is one that can have it.
    #[must_use]
    pub fn draw(seed: Seed, planted: Option<Planted>, workload: Workload) -> Self {
        let mut setup = Setup::draw(&mut seed.derive("setup", 0).rng());
        if let Some(planted) = planted {
            planted.mutant.needs(&mut setup);
        }
        let faults = if workload.faults {
            FaultPlan::draw(&mut seed.derive("faults", 0).rng(), setup.device().sectors)
        } else {
            FaultPlan::NONE
        };
        let header = Script { version: VERSION, seed, setup, mutant: planted, faults, actions: Vec::new() };
        Self { header, workload }
    }

    /// The run without its actions: the seed, the setup, the faults and the bug.
    #[must_use]
    pub const fn header(&self) -> &Script {
        &self.header
    }

    /// Runs it.
    ///
    /// # Errors
    /// When the setup contradicts itself. One that was drawn does not.
    pub fn run(&self, options: &RunOptions) -> Result<Tried, PlanError> {
        let mut actions = self.actions()?;
        Ok(run_on_simulator(&self.header, &mut actions, options))
    }

    /// The actions, one after another.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn actions(&self) -> Result<Actions, PlanError> {
        Actions::new(self.header.seed, &self.header.setup, self.workload)
    }

    /// The run written out: its first `ops` operations and what lies between them, and a sweep in the end.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn script(&self, ops: u64) -> Result<Script, PlanError> {
        let mut left = ops;
        let mut actions: Vec<Action> = self
            .actions()?
            .take_while(|action| {
                let is_op = matches!(action.act, Act::Op { .. });
                let wanted = !is_op || left > 0;
                left = left.saturating_sub(u64::from(is_op));
                wanted
            })
            .collect();
        if !matches!(actions.last(), Some(Action { act: Act::Sweep, .. })) {
            actions.push(Action { worker: 0, act: Act::Sweep });
        }
        Ok(Script { actions, ..self.header.clone() })
    }
}

/// A run that is over, and what its planted bug did.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The run.
    pub ran: Ran,
    /// How often the planted bug struck; `None` without one.
    pub hits: Option<u64>,
}

/// Runs a script on the simulator.
#[must_use]
pub fn replay(script: &Script, options: &RunOptions) -> Tried {
    run_on_simulator(script, &mut script.actions.iter().copied(), options)
}

/// How a script fails on the simulator, if it does.
#[must_use]
pub fn failure_of(script: &Script, options: &RunOptions) -> Option<Signature> {
    let failure = replay(script, options).ran.failure?;
    Some(Signature::of(failure.oracle, &failure.event))
}

/// Makes a script that fails on the simulator small, for as long as `keep_going` says so.
#[must_use]
pub fn shrink_on_simulator(
    script: Script,
    options: &RunOptions,
    shrinking: &ShrinkOptions,
    keep_going: &mut dyn FnMut() -> bool,
) -> Shrunk {
    shrink_while(script, shrinking, &mut |script| failure_of(script, options), keep_going)
}

fn run_on_simulator(header: &Script, actions: &mut dyn Iterator<Item = Action>, options: &RunOptions) -> Tried {
    let mut subject = Planting::new(header);
    let mut options = options.clone();
    if options.foreign.is_empty() {
        options.foreign = Arc::new([header.setup.pattern(header.seed, OTHER_DEVICE)]);
    }
    let ran = run(&header.setup, header.seed, &mut subject, actions, &options);
    Tried { ran, hits: header.mutant.map(|_| subject.plot.hits.count()) }
}

/// The right server on the right disk, with a bug in one place.
#[derive(Debug)]
struct Planting {
    planted: Option<Planted>,
    plot: Plot,
    described: Geometry,
    declared: Geometry,
    reorder: u8,
    calls: CallLog,
    faults: Faults,
}

impl Planting {
    fn new(header: &Script) -> Self {
        let described = geometry_of(&header.setup);
        let declared = header.mutant.map_or(described, |planted| mutant::declared_geometry(planted, described));
        let calls = CallLog::default();
        let clock = calls.clone();
        let seed = header.seed.derive("fault backend", 0);
        let faults = Faults::with_clock(header.faults.clone(), seed, Arc::new(move || clock.tick()));
        let mut plot = Plot::new(header.seed.derive("plot", 0));
        let admitting = faults.clone();
        plot.injected = Some(Arc::new(move |kind, range, errno| admitting.admit(kind, range, errno)));
        plot.logical_block = header.setup.logical_block;
        plot.foreign = Some(Arc::new(header.setup.pattern(header.seed, OTHER_DEVICE)));
        Self { planted: header.mutant, plot, described, declared, reorder: header.setup.reorder, calls, faults }
    }
}

impl Subject for Planting {
    /// # Panics
    /// Without a medium.
    fn open(&mut self, medium: Option<&Medium>, why: Open) -> Box<dyn Server> {
        let medium = medium.expect("whoever uses a medium is given one");
        self.plot = self.plot.again(why, Some(medium.clone()));
        let disk = MediumDisk::new(medium.clone(), self.described);
        let mut backend: Arc<dyn Backend> = Arc::new(ObservedCalls::new(disk, self.calls.clone()));
        let plant = |backend| match self.planted {
            Some(planted) => mutant::plant_backend(planted, backend, &self.plot),
            None => backend,
        };
        // A bug is above the faults, so that it can hide them. What is odd but right is a kind of storage: of its own calls
        // to the disk nobody knows, and a fault in one would be nobody's.
        let odd = self.planted.is_some_and(|planted| planted.mutant.is_control());
        backend = if odd { plant(backend) } else { backend };
        backend = Arc::new(self.faults.backend(backend));
        backend = if odd { backend } else { plant(backend) };
        let server: Box<dyn Server> = Box::new(PlainServer::new(backend, self.reorder));
        match self.planted {
            Some(planted) => mutant::plant_server(planted, server, &self.plot),
            None => server,
        }
    }

    fn geometry(&self) -> Geometry {
        self.declared
    }

    fn stopping(&mut self) {
        self.plot.stopping.store(true, Ordering::Relaxed);
    }

    fn release(&mut self) -> bool {
        self.planted.is_none_or(|planted| mutant::gives_id_back(planted, &self.plot))
    }

    fn faults(&self) -> Option<&Faults> {
        Some(&self.faults)
    }

    fn calls(&self) -> Option<&CallLog> {
        Some(&self.calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::OpKind;
    use crate::range::SectorRange;
    use crate::sector::SECTOR;
    use crate::sim::MediumSubject;

    #[test]
    fn a_sound_device_passes_whatever_is_drawn() {
        let mut ops = 0;
        for seed in 0..200 {
            let trial = Trial::draw(Seed::new(seed), None, Workload::everything(500));
            let tried = trial.run(&RunOptions::default()).expect("a setup that was drawn");
            if let Some(failure) = tried.ran.failure {
                panic!("seed {seed}: {:?}: {:?}\n{}", failure.oracle, failure.event, trial.header().setup);
            }
            ops += tried.ran.ops;
        }
        assert_eq!(ops, 200 * 500);
    }

    /// How a trial ends when so much of its payloads compresses.
    fn compressed(seed: u64, mutant: Option<&str>, percent: u8) -> (u64, Option<(Signature, u64)>) {
        let planted = mutant.map(|name| name.parse::<Planted>().expect("a mutant"));
        let mut trial = Trial::draw(Seed::new(seed), planted, Workload::everything(1000));
        trial.header.setup.compressible = percent;
        let ran = trial.run(&RunOptions::default()).expect("a setup that was drawn").ran;
        let failure = ran.failure.map(|failure| (Signature::of(failure.oracle, &failure.event), failure.after_ops));
        (ran.ops, failure)
    }

    /// How many words of a sector are like its first one, on a disk that something was written to.
    fn words_alike(percent: u8) -> usize {
        let mut setup = Trial::draw(Seed::new(1), None, Workload::ops(1)).header.setup;
        (setup.compressible, setup.read_only) = (percent, false);
        let range = SectorRange::new(0, setup.block_sectors());
        let act = Act::Op { kind: OpKind::Write, range };
        let mut sector = [0; SECTOR];
        let mut disk = None;
        let mut subject = MediumSubject::new(&setup).wrap_backend(|backend, medium, _| {
            disk = Some(medium.clone());
            backend
        });
        let mut actions = [Action { worker: 0, act }].into_iter();
        let ran = run(&setup, Seed::new(1), &mut subject, &mut actions, &RunOptions::default());
        drop(subject);
        assert!(ran.failure.is_none() && ran.ops == 1);
        disk.expect("it was opened").read_at(&mut sector, 0).expect("it is there");
        let words = sector.as_chunks::<8>().0;
        words.iter().filter(|word| **word == words[0]).count()
    }

    #[test]
    fn payloads_that_compress_are_judged_like_others() {
        assert_eq!([0, 50, 100].map(words_alike), [1, 32, 57]);
        for seed in 0..60 {
            for percent in [50, 100] {
                assert_eq!(compressed(seed, None, percent), (1000, None), "seed {seed}, {percent} %");
            }
        }
        for (mutant, class) in [
            ("lost-overwrite", "lost"),
            ("misdirected-write", "misdirected"),
            ("bitflip-read:20", "bit_flip"),
            ("shifted-write:20", "shifted"),
            ("torn-below-atomic", "torn"),
            ("zeroed-buffer:20", "zero"),
            ("cross-device-bleed:20", "foreign_device"),
        ] {
            let mut named = [0; 3];
            for seed in 0..12 {
                let plain = compressed(seed, Some(mutant), 0);
                for (percent, named) in [0, 50, 100].into_iter().zip(&mut named) {
                    let (ops, failure) = compressed(seed, Some(mutant), percent);
                    let when = |failure: &Option<(Signature, u64)>| failure.as_ref().map(|(_, after_ops)| *after_ops);
                    assert_eq!(
                        (ops, when(&failure)),
                        (plain.0, when(&plain.1)),
                        "{mutant}, seed {seed}, {percent} %"
                    );
                    *named += u32::from(failure.is_some_and(|(signature, _)| signature.class == class));
                }
            }
            // Where only words are seen that are all the same, they name no distance and no place, and so not each of these.
            let few = if matches!(class, "shifted" | "torn") { 1 } else { named[0] };
            assert!(named[0] >= 3 && named[1] >= few && named[2] >= few, "{mutant}: {named:?} are {class}");
        }
    }

    #[test]
    fn what_corrupts_in_silence_is_found() {
        let (mut hit, mut missed) = (0, Vec::new());
        for seed in 0..200 {
            let workload = Workload { cuts: true, ..Workload::ops(2000) };
            let mut trial = Trial::draw(Seed::new(seed), None, workload);
            trial.header.setup.read_only = false;
            let sectors = trial.header.setup.device().sectors;
            trial.header.faults = FaultPlan::draw_silent(&mut Seed::new(seed).derive("silent", 0).rng(), sectors);
            let ran = trial.run(&RunOptions::default()).expect("a setup that was drawn").ran;
            match (ran.evidence.count("injections"), ran.failure) {
                (0, failure) => assert!(failure.is_none(), "seed {seed}: {failure:?}"),
                (_, Some(_)) => hit += 1,
                (hits, None) => missed.push((seed, hits, trial.header.faults.to_string())),
            }
        }
        // What strikes seldom may be overwritten before anybody looks, or be an order that operations in flight allow.
        let often = missed.iter().filter(|(_, hits, _)| *hits > 16).count();
        assert!(hit > 8 * missed.len() && hit > 150 && often == 0, "{hit} found, not {missed:#?}");
    }

    #[test]
    fn few_reads_are_judged_loosely() {
        let (mut loose, mut reads) = (0, 0);
        for seed in 200..500 {
            let trial = Trial::draw(Seed::new(seed), None, Workload::everything(500));
            let ran = trial.run(&RunOptions::default()).expect("a setup that was drawn").ran;
            assert!(ran.failure.is_none(), "seed {seed}: {:?}", ran.failure);
            loose += ran.evidence.count("loose_reads");
            reads += ran.evidence.count("reads");
        }
        assert!(reads > 30_000 && loose * 100 < reads, "{loose} of {reads} reads");
    }

    #[test]
    fn the_same_seed_is_the_same_run() {
        for seed in 0..20 {
            let trial = Trial::draw(Seed::new(seed), None, Workload::everything(300));
            let options = RunOptions { record: true, ..RunOptions::default() };
            let runs: Vec<_> = (0..2).map(|_| trial.run(&options).expect("a setup that was drawn").ran).collect();
            assert_eq!((&runs[0].events, runs[0].digest), (&runs[1].events, runs[1].digest));
            let script = trial.script(300).expect("a script");
            assert_eq!(replay(&script, &options).ran.digest, runs[0].digest, "written out it is the same run");
        }
    }

    #[test]
    fn a_planted_bug_is_found_and_its_script_fails_again_when_it_is_small() {
        let planted: Planted = "lost-write".parse().expect("a mutant");
        let trial = Trial::draw(Seed::new(1), Some(planted), Workload::everything(5000));
        let options = RunOptions::default();
        let tried = trial.run(&options).expect("a setup that was drawn");
        assert!(tried.hits.is_some_and(|hits| hits > 0));
        let failure = tried.ran.failure.expect("a write is lost");
        let script = trial.script(failure.after_ops).expect("a script");
        let shrunk = shrink_on_simulator(script, &options, &ShrinkOptions::default(), &mut || true);
        assert!(shrunk.script.actions.len() <= 5, "{}", shrunk.script.to_json());
        assert!(failure_of(&shrunk.script, &options).is_some());
    }
}
