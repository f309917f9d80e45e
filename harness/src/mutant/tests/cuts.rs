//! Random work with power cuts: what shows at a cut is found at its own rate, and controls are not.

use super::*;
use crate::script::Act;
use crate::seed::SeededRng;
use crate::sim::medium::{MediumDisk, MediumOptions};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 128;

/// What each block may hold after a power cut, the newest last.
struct Model {
    may_hold: Vec<Vec<u8>>,
}

impl Model {
    fn change(&mut self, block: u64, byte: u8, durable: bool) {
        let may_hold = &mut self.may_hold[block as usize];
        if durable {
            may_hold.clear();
        }
        may_hold.push(byte);
    }

    fn flush(&mut self) {
        for may_hold in &mut self.may_hold {
            may_hold.drain(..may_hold.len() - 1);
        }
    }

    /// Whether a block holds what it may hold now, or after a cut.
    fn holds(&mut self, block: u64, data: &[u8], after_cut: bool) -> bool {
        let may_hold = &mut self.may_hold[block as usize];
        let now = if after_cut { 0 } else { may_hold.len() - 1 };
        let right = data.iter().all(|byte| *byte == data[0]) && may_hold[now..].contains(&data[0]);
        if after_cut {
            *may_hold = vec![data[0]];
        }
        right
    }
}

struct Run {
    planted: Planted,
    plot: Plot,
    medium: Medium,
    model: Model,
    rng: SeededRng,
}

impl Run {
    fn open(&self, why: Open) -> Arc<dyn Backend> {
        let geometry = Geometry::bytes(BLOCKS * BLOCK).logical_block(BLOCK as u32).fua().discard(BLOCK as u32);
        let disk = MediumDisk::new(self.medium.clone(), geometry);
        plant_backend(self.planted, Arc::new(disk), &self.plot.again(why, Some(self.medium.clone())))
    }

    fn check(&mut self, backend: &dyn Backend, block: u64, after_cut: bool) -> Result<(), String> {
        let mut data = vec![0; BLOCK as usize];
        assert!(backend.read_at(&mut data, block * BLOCK).is_ok());
        if self.model.holds(block, &data, after_cut) { Ok(()) } else { Err(format!("block {block}: {}", data[0])) }
    }

    fn operation(&mut self, backend: &dyn Backend) -> Result<(), String> {
        let block = self.rng.below(BLOCKS);
        let blocks = self.rng.within(1..=4.min(BLOCKS - block));
        let len = blocks * BLOCK;
        match self.rng.below(10) {
            0..5 => {
                let byte = self.rng.within(1..=255) as u8;
                let flags = if self.rng.chance(1, 5) { WriteFlags::FUA } else { WriteFlags::NONE };
                assert!(backend.write_at(&vec![byte; len as usize], block * BLOCK, flags).is_ok());
                // Without a cache to flush, all of it has to be durable.
                let durable = flags.fua || !backend.geometry().volatile_cache;
                (block..block + blocks).for_each(|block| self.model.change(block, byte, durable));
            }
            5 => {
                assert!(backend.discard(block * BLOCK, len).is_ok());
                let durable = !backend.geometry().volatile_cache;
                (block..block + blocks).for_each(|block| self.model.change(block, 0, durable));
            }
            6 if backend.geometry().volatile_cache => {
                if backend.flush().is_ok() {
                    self.model.flush();
                }
            }
            _ => self.check(backend, block, false)?,
        }
        Ok(())
    }
}

/// How often the mutant was wrong, and after how many operations it was found.
fn run(mutant: Mutant, seed: u64) -> (u64, Option<u64>) {
    let planted = Planted::from(mutant);
    let options = MediumOptions { bytes: BLOCKS * BLOCK, volatile_cache: true, atomic_bytes: BLOCK as u32 };
    let medium = Medium::new(options);
    let rng = Seed::new(seed).rng();
    let model = Model { may_hold: vec![vec![0]; BLOCKS as usize] };
    let mut run = Run { planted, plot: Plot::new(Seed::new(seed)), medium, model, rng };
    let mut backend = run.open(Open::First);
    for op in 0..5000 {
        let found = if run.rng.chance(1, 200) {
            drop(backend);
            let _cut = run.medium.power_cut(&mut run.rng);
            backend = run.open(Open::AfterPowerCut);
            (0..BLOCKS).find_map(|block| run.check(&*backend, block, true).err())
        } else {
            run.operation(&*backend).err()
        };
        if found.is_some() {
            return (run.plot.hits.count(), Some(op));
        }
    }
    (run.plot.hits.count(), None)
}

#[test]
fn what_shows_at_a_cut_is_found_at_its_own_rate() {
    let backends = |mutant: &Mutant| {
        let spec = mutant.spec();
        mutant.shows_at() == Some(Act::PowerCut) && !mutant.is_control() && !spec.is_in_server()
    };
    for mutant in Mutant::ALL.into_iter().filter(backends) {
        for seed in 0..3 {
            let (hits, found) = run(mutant, seed);
            assert!(found.is_some() && hits > 0, "{mutant}: {hits} hits");
        }
    }
}

#[test]
fn controls_pass_cuts() {
    for mutant in [Mutant::UnflushedLost, Mutant::AnySubset, Mutant::FlushFails, Mutant::WrittenTwice] {
        for seed in 0..3 {
            let (hits, found) = run(mutant, seed);
            assert!(found.is_none() && hits > 0, "{mutant}: {found:?} after {hits} hits");
        }
    }
}
