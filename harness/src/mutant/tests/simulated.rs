//! On the simulator: each mutant is found by one of those that are expected to find it.

use super::*;
use crate::oracle::Oracles;
use crate::script::{Act, Action, Recovery, Setup};
use crate::seed::SeededRng;
use crate::sim::calls::CallLog;
use crate::sim::run::{Ran, RunOptions, run};
use crate::sim::subject::{MediumSubject, Subject};

struct Wrong<'a> {
    subject: MediumSubject<'a>,
    planted: Planted,
    plot: Plot,
}

impl Subject for Wrong<'_> {
    fn open(&mut self, medium: Option<&Medium>, why: Open) -> Box<dyn Server> {
        self.subject.open(medium, why)
    }

    fn geometry(&self) -> Geometry {
        self.subject.geometry()
    }

    fn release(&mut self) -> bool {
        gives_id_back(self.planted, &self.plot)
    }

    fn calls(&self) -> Option<&CallLog> {
        self.subject.calls()
    }
}

struct Actions {
    rng: SeededRng,
    setup: Setup,
    shows_at: Option<Act>,
    stopping: Arc<AtomicBool>,
    left: u32,
}

impl Iterator for Actions {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.left = self.left.checked_sub(1)?;
        let rng = &mut self.rng;
        let act = match self.shows_at {
            _ if self.left == 0 => Act::Sweep,
            Some(act) if rng.chance(1, 100) => {
                self.stopping.store(act == Act::Reopen, Ordering::Relaxed);
                act
            }
            _ => {
                let block = u64::from(self.setup.logical_block) / 512;
                let blocks = self.setup.bytes / 512 / block;
                let longest = if rng.chance(1, 8) { blocks / 4 } else { 16 };
                let len = rng.within(1..=longest);
                let first = rng.within(0..=blocks - len);
                let range = SectorRange::new(first * block, len * block);
                let kinds = [OpKind::Read, OpKind::Read, OpKind::Write, OpKind::Write, OpKind::Write];
                let kind = if rng.chance(1, 2) { rng.pick(&OpKind::ALL) } else { rng.pick(&kinds) };
                match kind.copied() {
                    Some(OpKind::Flush) | None => Act::Op { kind: OpKind::Flush, range: SectorRange::default() },
                    Some(OpKind::Discard) if !self.setup.discard => Act::Op { kind: OpKind::Read, range },
                    Some(kind) => Act::Op { kind, range },
                }
            }
        };
        Some(Action { worker: rng.below(u64::from(self.setup.workers)) as u32, act })
    }
}

fn simulate(mutant: Mutant, seed: u64, ops: u32) -> (Ran, Plot) {
    let mut setup = Setup {
        bytes: 2 << 20,
        logical_block: 512,
        max_io_bytes: 64 << 10,
        queues: 2,
        queue_depth: 8,
        workers: 4,
        io_depth: 4,
        volatile_cache: true,
        fua: true,
        discard: true,
        discard_zeroes: true,
        write_zeroes: true,
        read_only: false,
        recovery: Recovery::Wait,
        merges: true,
        reorder: 30,
        memory_pressure: false,
        compressible: 0,
    };
    mutant.needs(&mut setup);
    let planted = Planted::from(mutant);
    let seed = Seed::new(seed);
    let mut plot = Plot::new(seed);
    plot.logical_block = setup.logical_block;
    let foreign = Pattern::new(Seed::new(99), 1);
    plot.foreign = Some(Arc::new(foreign.clone()));
    let (below, above) = (plot.clone(), plot.clone());
    let subject = MediumSubject::new(&setup)
        .wrap_backend(move |inner, medium, why| {
            plant_backend(planted, inner, &below.again(why, Some(medium.clone())))
        })
        .wrap_server(move |inner, medium, why| plant_server(planted, inner, &above.again(why, Some(medium.clone()))));
    let mut wrong = Wrong { subject, planted, plot: plot.clone() };
    let mut actions = Actions {
        rng: seed.derive("actions", 0).rng(),
        setup,
        shows_at: mutant.shows_at(),
        stopping: Arc::clone(&plot.stopping),
        left: ops,
    };
    // Errors that the mutant admits to are nobody's here.
    let admits = mutant.is_control() || mutant == Mutant::FlushGivesUp;
    let oracles = if admits { Oracles::ALL.without(Oracle::Errors) } else { Oracles::ALL };
    let options = RunOptions { oracles, foreign: Arc::new([foreign]), ..RunOptions::default() };
    (run(&setup, seed, &mut wrong, &mut actions, &options), plot)
}

#[test]
fn every_mutant_is_found_by_whom_it_is_expected_to_be() {
    let mut wrong = Vec::new();
    for mutant in Mutant::ALL.into_iter().filter(|mutant| !mutant.is_control()) {
        // What is rare may be missed once.
        let found = (0..3).find_map(|seed| {
            let (ran, plot) = simulate(mutant, seed, 10_000);
            ran.failure.map(|failure| (failure, plot.hits.count()))
        });
        // The error that sticks is admitted to, and found all the same: nobody listens here.
        let expected = found.as_ref().is_some_and(|(failure, hits)| {
            (*hits > 0 || mutant == Mutant::ErrorSticky) && mutant.spec().oracles.contains(&failure.oracle)
        });
        if !expected {
            wrong.push((mutant, found.map(|(failure, hits)| (failure.oracle, failure.after_ops, hits))));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn no_control_is() {
    for mutant in Mutant::ALL.into_iter().filter(|mutant| mutant.is_control()) {
        let (ran, plot) = simulate(mutant, 0, 3000);
        assert!(ran.failure.is_none() && plot.hits.count() > 0, "{mutant}: {:?}", ran.failure);
    }
}
