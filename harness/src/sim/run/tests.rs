use super::*;
use crate::script::Recovery;
use crate::sim::subject::MediumSubject;

/// A device and what is done to it, drawn so that runs differ in kind and not only in order.
pub(in crate::sim) struct Drawn {
    pub(in crate::sim) setup: Setup,
    rng: SeededRng,
    left: u64,
    kinds: Vec<OpKind>,
    cuts: u64,
    kills: u64,
    reopens: u64,
    blocks: u64,
    longest: u64,
}

impl Drawn {
    pub(in crate::sim) fn new(seed: u64, ops: u64) -> Self {
        let mut rng = Seed::new(seed).derive("drawn", 0).rng();
        let logical_block = if rng.chance(1, 2) { 512 } else { 4096 };
        // Where a dozen operations that zero are in flight on one block, no order can be told any more.
        let blocks = 1 << rng.within(5..=9);
        let max_io_bytes = logical_block << rng.within(0..=5);
        let recovery = [Recovery::None, Recovery::Wait, Recovery::Reissue, Recovery::FailIo][rng.below(4) as usize];
        let setup = Setup {
            bytes: blocks * u64::from(logical_block),
            logical_block,
            max_io_bytes,
            queues: rng.within(1..=4) as u16,
            queue_depth: 1 << rng.below(5),
            workers: rng.within(1..=4) as u32,
            io_depth: 1 << rng.below(3),
            volatile_cache: rng.chance(3, 4),
            fua: rng.chance(1, 2),
            discard: rng.chance(3, 4),
            discard_zeroes: rng.chance(1, 2),
            write_zeroes: rng.chance(3, 4),
            read_only: rng.chance(1, 30),
            recovery,
            merges: rng.chance(1, 2),
            reorder: if rng.chance(1, 3) { 0 } else { rng.within(0..=100) as u8 },
            memory_pressure: rng.chance(1, 8),
            compressible: [0, 50, 90][(seed % 3) as usize],
        };
        let mut kinds: Vec<_> = OpKind::ALL.into_iter().filter(|_| rng.chance(3, 4)).collect();
        kinds.retain(|kind| *kind != OpKind::Discard || setup.discard);
        kinds.extend([OpKind::Read, OpKind::Write]);
        let mut rare = |often: u64| if rng.chance(1, 2) { often } else { 0 };
        let (cuts, kills, reopens) = (rare(10), rare(10), rare(4));
        Self { setup, left: ops, kinds, cuts, kills, reopens, blocks, longest: 1 << rng.within(0..=4), rng }
    }
}

impl Iterator for Drawn {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.left = self.left.checked_sub(1)?;
        let (cuts, kills, reopens) = (self.cuts, self.cuts + self.kills, self.cuts + self.kills + self.reopens);
        let rng = &mut self.rng;
        let drawn = rng.below(1000);
        let act = if self.left == 0 || drawn == 999 {
            Act::Sweep
        } else if drawn < cuts {
            Act::PowerCut
        } else if drawn < kills {
            Act::Kill
        } else if drawn < reopens {
            Act::Reopen
        } else {
            let kind = *rng.pick(&self.kinds).expect("there are kinds");
            let len = rng.within(1..=self.longest.min(self.blocks));
            let first = rng.within(0..=self.blocks - len);
            let sectors = u64::from(self.setup.logical_block / 512);
            let range = match kind {
                OpKind::Flush => SectorRange::default(),
                _ => SectorRange::new(first * sectors, len * sectors),
            };
            Act::Op { kind, range }
        };
        Some(Action { worker: rng.below(u64::from(self.setup.workers)) as u32, act })
    }
}

pub(in crate::sim) fn run_drawn(seed: u64, ops: u64, options: &RunOptions) -> Ran {
    let mut drawn = Drawn::new(seed, ops);
    let setup = drawn.setup;
    run(&setup, Seed::new(seed), &mut MediumSubject::new(&setup), &mut drawn, options)
}

fn right(ran: &Ran, seed: u64) {
    if let Some(failure) = &ran.failure {
        panic!("seed {seed}: {failure:#?}\n{:#?}", ran.evidence);
    }
}

#[test]
fn a_right_device_is_right_whatever_is_done_to_it() {
    let mut evidence = Evidence::new();
    for seed in 0..1500 {
        let ran = run_drawn(seed, 200, &RunOptions::default());
        right(&ran, seed);
        evidence.merge(&ran.evidence);
    }
    for name in [
        "reads",
        "writes",
        "fua_writes",
        "flushes",
        "discards",
        "zeroes",
        "refused_ops",
        "verified_bytes",
        "overlaps",
        "power_cuts_in_flight",
        "kills_in_flight",
        "reopens",
        "sweeps",
        "changes_kept",
        "changes_lost",
        "changes_torn",
        "splits",
        "merges",
        "flushes_shared",
        "reissued",
    ] {
        assert!(evidence.count(name) > 100, "{name}: {evidence:?}");
    }
    for name in ["refused_commits", "short_results", "clamped_results", "requeued"] {
        assert_eq!(evidence.count(name), 0, "{name}");
    }
}

#[test]
fn a_seed_replays_and_another_differs() {
    let options = RunOptions { record: true, ..RunOptions::default() };
    let mut digests = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let first = run_drawn(seed, 200, &options);
        let again = run_drawn(seed, 200, &options);
        assert_eq!(first.events, again.events);
        assert_eq!(first.digest, again.digest);
        assert_eq!(first.digest, run_drawn(seed, 200, &RunOptions::default()).digest);
        assert!(first.events.len() > 200);
        digests.insert(first.digest);
    }
    assert_eq!(digests.len(), 100);
}
