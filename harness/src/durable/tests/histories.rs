//! Random small histories: the survivors are exactly those of the enumerated device.

use std::collections::BTreeMap;

use super::model::{CHANGES, Model};
use crate::classify::Content;
use crate::durable::Durable;
use crate::outcome::Outcome;
use crate::sector::{GENERATION_MAX, next_generation};
use crate::seed::{Seed, SeededRng};
use crate::stamp::Stamp;

/// How often each thing happened, over all histories.
type Tally = BTreeMap<&'static str, u64>;

/// A change in flight.
struct Change {
    number: u8,
    blocks: std::ops::Range<u64>,
    began: Stamp,
    through: bool,
}

struct Flush {
    began: Stamp,
    /// What it covers, block by block.
    covered: Vec<u8>,
}

struct History<'a> {
    rng: SeededRng,
    tally: &'a mut Tally,
    durable: Durable,
    models: Vec<Model>,
    /// Whether the models know more than the rule: a read came after what was written since the cut.
    inexact: bool,
    generation: u32,
    changes: u8,
    now: Stamp,
    in_flight: Vec<Change>,
    flushes: Vec<Flush>,
    cuts: u32,
}

/// The same contents, in any order.
fn same(a: &[Content], b: &[Content]) -> bool {
    a.len() == b.len() && a.iter().all(|content| b.contains(content))
}

impl<'a> History<'a> {
    fn new(seed: u64, tally: &'a mut Tally) -> Self {
        let mut rng = Seed::new(seed).rng();
        let blocks = rng.within(1..=3);
        let volatile_cache = rng.chance(3, 4);
        let initial = *rng.pick(&[Content::Zero, Content::Zero, Content::Zero, Content::Unknown]).expect("some");
        *tally.entry(if volatile_cache { "volatile cache" } else { "no volatile cache" }).or_default() += 1;
        let inexact = rng.chance(1, 16);
        Self {
            tally,
            durable: Durable::new(blocks, initial, volatile_cache),
            models: vec![Model::new(initial, volatile_cache); blocks as usize],
            inexact,
            generation: if rng.chance(1, 4) { GENERATION_MAX - 3 } else { 1 },
            changes: 0,
            now: rng.below(2),
            in_flight: Vec::new(),
            flushes: Vec::new(),
            cuts: 0,
            rng,
        }
    }

    fn run(&mut self) {
        for _ in 0..self.rng.within(6..=24) {
            match self.rng.below(16) {
                0..=4 => self.begin(),
                5..=9 => self.end(),
                10 | 11 => self.submit_flush(),
                12 | 13 => self.end_flush(),
                14 => self.compare(),
                _ => self.cut_or_read(),
            }
        }
        self.compare();
        self.power_cut();
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn tick(&mut self) -> Stamp {
        self.now += 1;
        self.now
    }

    fn begin(&mut self) {
        let crowded = self.models.iter().any(|model| model.able() >= 4);
        if usize::from(self.changes) == CHANGES || crowded {
            return;
        }
        let first = self.rng.below(self.models.len() as u64);
        let blocks = first..self.rng.within(first + 1..=self.models.len() as u64);
        self.generation = next_generation(self.generation);
        let kind = self.rng.below(8);
        let of_block = |_| match kind {
            0 | 1 => Content::Zero,
            2 => Content::Unknown,
            _ => Content::Written(self.generation),
        };
        let contents: Vec<_> = blocks.clone().map(of_block).collect();
        self.count(["zero", "zero", "unknown content"].get(kind as usize).unwrap_or(&"write"));
        let (began, number, through) = (self.tick(), self.changes, self.rng.chance(1, 4));
        self.changes += 1;
        let at = |block: u64| (block - first) as usize;
        self.durable.begin_change(blocks.clone(), |block| contents[at(block)], began);
        for block in blocks.clone() {
            self.models[block as usize].begin(number, contents[at(block)]);
        }
        self.in_flight.push(Change { number, blocks, began, through });
    }

    fn end(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let at = self.rng.below(self.in_flight.len() as u64) as usize;
        let outcome = match self.rng.below(16) {
            0 | 1 => Outcome::Failed,
            2 => Outcome::Unknown,
            _ => Outcome::Done,
        };
        let change = self.in_flight.swap_remove(at);
        self.end_with(&change, outcome);
    }

    fn end_with(&mut self, change: &Change, outcome: Outcome) {
        self.count(match outcome {
            Outcome::Done if change.through => "fua",
            Outcome::Done => "done",
            Outcome::Failed => "failed",
            Outcome::Unknown => "unknown outcome",
        });
        let now = self.tick();
        let Change { number, blocks, began, through } = change;
        self.durable.end_change(blocks.clone(), *began, now, outcome, *through);
        for block in blocks.clone() {
            self.models[block as usize].end(*number, outcome, *through);
        }
        if self.rng.chance(1, 4) {
            self.durable.tidy_up();
        }
    }

    fn submit_flush(&mut self) {
        let covered = self.models.iter().map(Model::submit_flush).collect();
        let began = self.tick();
        self.flushes.push(Flush { began, covered });
    }

    fn end_flush(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let at = self.rng.below(self.flushes.len() as u64) as usize;
        let flush = self.flushes.swap_remove(at);
        self.tick();
        if self.rng.chance(1, 6) {
            return self.count("failed flush");
        }
        self.count("flush");
        self.durable.flush_done(flush.began);
        for (model, covered) in self.models.iter_mut().zip(flush.covered) {
            model.flushed(covered);
        }
    }

    fn cut_or_read(&mut self) {
        if self.inexact && self.rng.chance(1, 2) {
            self.count("late read");
            return self.read_some();
        }
        self.power_cut();
        self.read_some();
        self.compare();
    }

    fn read_some(&mut self) {
        for block in 0..self.models.len() {
            if self.rng.chance(1, 2) {
                continue;
            }
            let shown = self.models[block].readable();
            let seen = match *self.rng.pick(&shown).expect("a block shows something") {
                Content::Unknown if self.rng.chance(1, 2) => Content::Unknown,
                Content::Unknown if self.rng.chance(1, 2) => Content::Zero,
                Content::Unknown => Content::Written(self.generation),
                content => content,
            };
            self.models[block].read(seen);
            self.durable.settle(block as u64, seen);
            self.count(if shown.len() > 1 { "settled" } else { "nothing to settle" });
        }
    }

    fn power_cut(&mut self) {
        // What is in flight is either given up before the cut, or ends when nobody asks any more.
        let lost = std::mem::take(&mut self.in_flight);
        let (before, after): (Vec<_>, Vec<_>) = lost.into_iter().partition(|_| self.rng.chance(1, 2));
        for change in &before {
            self.end_with(change, Outcome::Unknown);
        }
        let now = self.tick();
        let mut left = BTreeMap::new();
        self.durable.power_cut(now, |block, contents| {
            assert!(left.last_key_value().is_none_or(|(last, _)| *last < block), "in order, and once each");
            left.insert(block, contents.to_vec());
        });
        for block in 0..self.models.len() {
            let want = self.models[block].survivors();
            match left.get(&(block as u64)) {
                Some(got) => self.check(block, got, &want),
                None => assert_eq!((want.len(), self.models[block].able()), (1, 0), "block {block}: {want:?}"),
            }
            self.models[block].power_cut();
        }
        self.cuts += 1;
        self.count(if self.cuts == 1 { "cut" } else { "cut again" });
        for change in after {
            let Change { blocks, began, through, .. } = change;
            let at = self.tick();
            self.durable.end_change(blocks.clone(), began, at, Outcome::Done, through);
            self.count("ended after the cut");
        }
    }

    fn compare(&mut self) {
        for block in 0..self.models.len() {
            let (got, want) = (self.durable.survivors(block as u64), self.models[block].survivors());
            self.check(block, &got, &want);
            let anything = got.contains(&Content::Unknown);
            let generations = (0..=CHANGES as u32 + 1)
                .map(|back| Content::Written((self.generation + GENERATION_MAX - back) % GENERATION_MAX + 1));
            for content in generations.chain([Content::Zero, Content::Unknown]) {
                let survives = self.durable.survives(block as u64, content);
                assert_eq!(survives, anything || got.contains(&content), "{content} of {got:?}");
            }
            self.count(match want.len() {
                1 => "one survivor",
                2 => "two survivors",
                _ => "three survivors or more",
            });
        }
    }

    fn check(&self, block: usize, got: &[Content], want: &[Content]) {
        if self.inexact {
            let missing = want.iter().find(|content| !got.contains(content) && !got.contains(&Content::Unknown));
            assert_eq!(missing, None, "block {block}: {got:?} of {want:?}");
        } else {
            assert!(same(got, want), "block {block}: {got:?}, and the model has {want:?}");
        }
    }
}

#[test]
fn survivors_are_those_of_the_enumerated_device() {
    const HISTORIES: u64 = 108_000;
    let mut tally = Tally::new();
    let mut exact = 0;
    for seed in 0..HISTORIES {
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut history = History::new(seed, &mut tally);
            history.run();
            !history.inexact
        }));
        exact += u64::from(run.unwrap_or_else(|_| panic!("history of seed {seed}")));
    }
    println!("{exact} exact histories; {tally:#?}");
    assert!(exact >= 100_000, "{exact}");
    let often = [
        "volatile cache",
        "no volatile cache",
        "write",
        "zero",
        "unknown content",
        "done",
        "fua",
        "failed",
        "unknown outcome",
        "flush",
        "failed flush",
        "cut",
        "cut again",
        "settled",
        "late read",
        "ended after the cut",
        "one survivor",
        "two survivors",
        "three survivors or more",
    ];
    for what in often {
        assert!(tally.get(what).is_some_and(|times| *times >= 2_000), "{what}: {:?}", tally.get(what));
    }
}
