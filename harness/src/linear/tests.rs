//! The oracle against a search through every order of the operations.

use std::collections::HashSet;

use super::*;
use crate::sector::Generation;
use crate::seed::{Seed, SeededRng};

/// One operation as one block sees it.
#[derive(Clone, Copy, Debug)]
struct Past {
    read: bool,
    content: Content,
    began: Stamp,
    /// `Stamp::MAX` if it has not ended.
    ended: Stamp,
    /// Whether it may not have happened.
    optional: bool,
}

/// Whether some order of `ops` explains all the reads, from one of the contents `initial`.
fn search(ops: &[Past], initial: &[Content]) -> bool {
    assert!(ops.len() <= 32);
    let mut seen = HashSet::new();
    initial.iter().any(|content| {
        seen.clear();
        search_from(ops, *content, 0, ops.len(), &mut seen)
    })
}

fn search_from(ops: &[Past], initial: Content, done: u32, last: usize, seen: &mut HashSet<(u32, usize)>) -> bool {
    let rest = |at: &usize| done & 1 << at == 0;
    if (0..ops.len()).filter(rest).all(|at| ops[at].optional) {
        return true;
    }
    if !seen.insert((done, last)) {
        return false;
    }
    let content = ops.get(last).map_or(initial, |op| op.content);
    // What ended before another one began comes before it, or never happens.
    let deadline = (0..ops.len()).filter(rest).filter(|at| !ops[*at].optional).map(|at| ops[at].ended).min();
    for at in (0..ops.len()).filter(rest) {
        let op = ops[at];
        if deadline.is_some_and(|deadline| deadline < op.began) {
            continue;
        }
        if op.read && op.content != content && content != Content::Unknown {
            continue;
        }
        let too_late = (0..ops.len()).filter(rest).filter(|late| ops[*late].optional && ops[*late].ended < op.began);
        let done = done | 1 << at | too_late.fold(0, |bits, late| bits | 1 << late);
        if search_from(ops, initial, done, if op.read { last } else { at }, seen) {
            return true;
        }
    }
    false
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    blocks: u64,
    ops: usize,
    depth: usize,
    /// Out of 16.
    reads: u64,
    zeroes: u64,
    unknown: u64,
    /// In percent.
    lies: u64,
    bad_ends: u64,
    resets: u64,
    horizon: u64,
    thorough: bool,
    /// How many values are remembered one by one.
    values: usize,
}

/// One block of an obedient device, and what is told of it.
#[derive(Debug)]
struct Truth {
    holds: Content,
    newest: Generation,
    initial: Vec<Content>,
    past: Vec<Past>,
    zeroed: bool,
}

#[derive(Clone, Debug)]
struct Flight {
    read: bool,
    range: Range<u64>,
    began: Stamp,
    /// What it writes or has read, for each block.
    contents: Vec<Option<Content>>,
    /// Where it did so already.
    done: Vec<bool>,
    /// Whether its end was told: it may still come to pass, for it ended in an unknown way.
    ghost: bool,
}

#[derive(Debug, Default)]
struct Tally {
    right: u64,
    wrong: u64,
    stale: u64,
    future: u64,
    foreign: u64,
    wrong_zeroes: u64,
    failed: u64,
    unknown: u64,
    resets: u64,
    anything: u64,
    ranges: u64,
    settled: u64,
    vague: u64,
    histories_right: u64,
    histories_wrong: u64,
}

struct Bench {
    rng: SeededRng,
    shape: Shape,
    now: Stamp,
    truth: Vec<Truth>,
    flights: Vec<Flight>,
    linear: Linear,
    /// Whether a read has lied; what is right from then on may be another story than the device's.
    lied: bool,
    /// Whether a lie was taken for the truth because too much was forgotten.
    vague: bool,
}

impl Bench {
    fn new(mut rng: SeededRng, shape: Shape) -> Self {
        let anything = shape.unknown > 0 && rng.chance(1, 3);
        let initial = if anything { Content::Unknown } else { Content::Zero };
        let truth = |_| Truth {
            holds: initial,
            newest: 0,
            initial: vec![initial],
            past: Vec::new(),
            zeroed: initial == Content::Zero,
        };
        let truth = (0..shape.blocks).map(truth).collect();
        let now = rng.below(2);
        let linear = Linear { values_max: shape.values, ..Linear::new(shape.blocks, initial) };
        Self { linear, rng, shape, now, truth, flights: Vec::new(), lied: false, vague: false }
    }

    fn tick(&mut self) -> Stamp {
        self.now += self.rng.within(1..=2);
        self.now
    }

    fn run(mut self, tally: &mut Tally) -> Linear {
        let wrong = tally.wrong;
        let mut begun = 0;
        loop {
            let flying = self.flights.iter().filter(|flight| !flight.ghost).count();
            if begun < self.shape.ops && flying < self.shape.depth && self.rng.chance(3, 5) {
                self.begin(tally);
                begun += 1;
            } else if flying > 0 {
                self.end(tally);
            } else if begun == self.shape.ops {
                break;
            }
            if self.vague {
                tally.vague += 1;
                return self.linear;
            }
            if self.rng.chance(self.shape.resets, 100) {
                self.reset(tally);
            }
            self.come_to_pass();
            self.tell_horizon();
            if self.shape.thorough {
                self.check_settled(tally);
            }
        }
        *if tally.wrong == wrong { &mut tally.histories_right } else { &mut tally.histories_wrong } += 1;
        self.linear
    }

    fn begin(&mut self, tally: &mut Tally) {
        let began = self.tick();
        let first = self.rng.below(self.shape.blocks);
        let range = first..self.rng.within(first + 1..=self.shape.blocks);
        tally.ranges += u64::from(range.end - range.start > 1);
        let read = self.rng.chance(self.shape.reads, 16);
        let kind = self.rng.below(16);
        let contents: Vec<_> = range
            .clone()
            .map(|block| {
                let truth = &mut self.truth[block as usize];
                if read {
                    return None;
                }
                let content = if kind < self.shape.zeroes {
                    truth.zeroed = true;
                    Content::Zero
                } else if kind < self.shape.zeroes + self.shape.unknown {
                    Content::Unknown
                } else {
                    truth.newest += 1;
                    Content::Written(truth.newest)
                };
                truth.past.push(Past { read, content, began, ended: Stamp::MAX, optional: true });
                Some(content)
            })
            .collect();
        if !read {
            let content_of = |block: u64| contents[(block - range.start) as usize].expect("a change");
            self.linear.begin_change(range.clone(), content_of, began);
        }
        let done = vec![false; contents.len()];
        self.flights.push(Flight { read, range, began, contents, done, ghost: false });
    }

    /// Some of what is in flight takes effect.
    fn come_to_pass(&mut self) {
        for at in 0..self.flights.len() {
            for index in 0..self.flights[at].contents.len() {
                if self.rng.chance(1, 3) {
                    self.effect(at, index);
                }
            }
        }
    }

    fn effect(&mut self, at: usize, index: usize) {
        let flight = &mut self.flights[at];
        if std::mem::replace(&mut flight.done[index], true) {
            return;
        }
        let truth = &mut self.truth[(flight.range.start as usize) + index];
        match flight.contents[index] {
            Some(content) => truth.holds = content,
            None if truth.holds == Content::Unknown => {
                let any = [Content::Zero, Content::Written(self.rng.below(4) as u32 + 1), Content::Unknown];
                flight.contents[index] = self.rng.pick(&any).copied();
            }
            None => flight.contents[index] = Some(truth.holds),
        }
    }

    fn end(&mut self, tally: &mut Tally) {
        let flying: Vec<_> = (0..self.flights.len()).filter(|at| !self.flights[*at].ghost).collect();
        let at = *self.rng.pick(&flying).expect("something is in flight");
        let mut outcome = Outcome::Done;
        if !self.flights[at].read && self.rng.chance(self.shape.bad_ends, 100) {
            outcome = *self.rng.pick(&[Outcome::Failed, Outcome::Unknown]).expect("two");
        }
        if outcome == Outcome::Done {
            (0..self.flights[at].contents.len()).for_each(|index| self.effect(at, index));
        }
        self.land(at, outcome, tally);
    }

    fn land(&mut self, at: usize, outcome: Outcome, tally: &mut Tally) {
        let now = self.tick();
        let flight = self.flights[at].clone();
        if outcome == Outcome::Unknown {
            self.flights[at].ghost = true;
        } else {
            self.flights.swap_remove(at);
        }
        if flight.read {
            for (block, seen) in flight.range.zip(flight.contents) {
                self.see(block, seen.expect("it was read"), flight.began, now, tally);
            }
            return;
        }
        tally.failed += u64::from(outcome == Outcome::Failed);
        tally.unknown += u64::from(outcome == Outcome::Unknown);
        for (block, content) in flight.range.clone().zip(&flight.contents) {
            tally.anything += u64::from(*content == Some(Content::Unknown));
            let same = |past: &&mut Past| !past.read && past.began == flight.began;
            let past = self.truth[block as usize].past.iter_mut().find(same).expect("it began");
            past.optional = outcome != Outcome::Done;
            past.ended = if outcome == Outcome::Unknown { Stamp::MAX } else { now };
        }
        let content_of = |block: u64| flight.contents[(block - flight.range.start) as usize].expect("a change");
        self.linear.end_change(flight.range.clone(), content_of, flight.began, now, outcome);
    }

    /// Everything there is to be seen, and some that is not.
    fn contents(&self, block: u64) -> Vec<Content> {
        let written = (1..=self.truth[block as usize].newest + 1).map(Content::Written);
        [Content::Zero].into_iter().chain(written).chain([Content::Unknown]).collect()
    }

    fn is_right(&self, block: u64, seen: Content, began: Stamp, ended: Stamp) -> bool {
        let truth = &self.truth[block as usize];
        let read = Past { read: true, content: seen, began, ended, optional: false };
        let ops: Vec<_> = truth.past.iter().copied().chain([read]).collect();
        search(&ops, &truth.initial)
    }

    fn see(&mut self, block: u64, mut seen: Content, began: Stamp, now: Stamp, tally: &mut Tally) {
        let contents = self.contents(block);
        if self.rng.chance(self.shape.lies, 100) {
            self.lied = true;
            // More often what was there once than what never was.
            let there = if self.rng.chance(3, 4) { contents.len() - 2 } else { contents.len() };
            seen = *self.rng.pick(&contents[..there]).expect("some");
        }
        if self.shape.thorough && self.linear.blurred() == 0 {
            let candidates = self.linear.candidates(block, began);
            for content in contents {
                let listed = candidates.contains(&content) || candidates.contains(&Content::Unknown);
                assert_eq!(
                    listed,
                    self.is_right(block, content, began, now),
                    "{block} {content}: {candidates:?} {self:?}"
                );
            }
        }
        let right = self.is_right(block, seen, began, now);
        assert!(right || self.lied, "what an obedient device does is right: {seen} {began} {now} {self:?}");
        let result = self.linear.read(block, seen, began, now);
        let truth = &mut self.truth[block as usize];
        match result {
            Ok(()) if !right && self.linear.blurred() > 0 => self.vague = true,
            Ok(()) => {
                assert!(right, "block {block} {seen} {began} {now}: {truth:?}");
                tally.right += 1;
                truth.past.push(Past { read: true, content: seen, began, ended: now, optional: false });
            }
            Err(disorder) => {
                assert!(!right, "{disorder} {began} {now}: {truth:?}");
                assert_eq!((disorder.block, disorder.seen), (block, seen));
                let kind = match seen {
                    Content::Written(generation) if generation > truth.newest => DisorderKind::Future,
                    Content::Zero if !truth.zeroed => DisorderKind::Foreign,
                    Content::Unknown => DisorderKind::Foreign,
                    Content::Written(_) | Content::Zero => DisorderKind::Stale,
                };
                assert_eq!(disorder.kind, kind, "{disorder}: {truth:?}");
                tally.wrong += 1;
                tally.wrong_zeroes += u64::from(seen == Content::Zero);
                match kind {
                    DisorderKind::Stale => tally.stale += 1,
                    DisorderKind::Future => tally.future += 1,
                    DisorderKind::Foreign => tally.foreign += 1,
                }
            }
        }
    }

    fn oldest(&self) -> Stamp {
        let flying = self.flights.iter().filter(|flight| !flight.ghost);
        flying.map(|flight| flight.began).min().unwrap_or(self.now + 1)
    }

    fn tell_horizon(&mut self) {
        let oldest = self.oldest();
        if self.rng.chance(self.shape.horizon, 100) {
            self.linear.horizon(oldest);
        }
    }

    fn check_settled(&mut self, tally: &mut Tally) {
        for block in 0..self.shape.blocks {
            let Some(content) = self.linear.settled(block) else { continue };
            tally.settled += 1;
            for other in self.contents(block) {
                let right = self.is_right(block, other, self.oldest(), self.now + 1);
                assert_eq!(right, content == other || content == Content::Unknown, "{other} not {content}");
            }
        }
    }

    fn reset(&mut self, tally: &mut Tally) {
        tally.resets += 1;
        self.flights.retain(|flight| !flight.read);
        while let Some(at) = self.flights.iter().position(|flight| !flight.ghost) {
            self.land(at, Outcome::Unknown, tally);
        }
        self.flights.clear();
        let now = self.tick();
        for block in 0..self.shape.blocks {
            let mut contents = self.contents(block);
            let truth = &mut self.truth[block as usize];
            contents.retain(|content| *content != Content::Written(truth.newest + 1));
            contents.retain(|content| self.shape.unknown > 0 || *content != Content::Unknown);
            let count = self.rng.within(1..=3);
            truth.initial = (0..count).filter_map(|_| self.rng.pick(&contents).copied()).collect();
            truth.holds = *self.rng.pick(&truth.initial).expect("at least one");
            truth.zeroed |= truth.initial.contains(&Content::Zero);
            truth.past.clear();
            self.linear.reset(block, &truth.initial, now);
        }
    }
}

impl fmt::Debug for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?} {:?} {:?}", self.shape, self.now, self.truth, self.linear)
    }
}

/// 120,000 short histories, each judged at every read.
#[test]
fn agrees_with_every_order_there_is() {
    let mut tally = Tally::default();
    for seed in 0..120_000 {
        let mut rng = Seed::new(seed).derive("linear", 0).rng();
        let shape = Shape {
            blocks: *rng.pick(&[1, 1, 1, 2, 3]).expect("some"),
            ops: rng.within(2..=7) as usize,
            depth: rng.within(1..=4) as usize,
            reads: rng.within(5..=11),
            zeroes: *rng.pick(&[0, 3, 6, 14]).expect("some"),
            unknown: *rng.pick(&[0, 0, 2]).expect("some"),
            lies: *rng.pick(&[0, 50, 100]).expect("some"),
            bad_ends: *rng.pick(&[0, 25, 60]).expect("some"),
            resets: *rng.pick(&[0, 0, 8]).expect("some"),
            horizon: *rng.pick(&[0, 40, 100, 100]).expect("some"),
            thorough: rng.chance(1, 8),
            values: VALUES_MAX,
        };
        Bench::new(rng, shape).run(&mut tally);
    }
    println!("{tally:?}");
    assert!(tally.histories_right > 20_000 && tally.histories_wrong > 20_000, "{tally:?}");
    assert!(tally.stale > 10_000 && tally.future > 3_000 && tally.foreign > 3_000, "{tally:?}");
    assert!(tally.failed > 10_000 && tally.unknown > 10_000 && tally.resets > 10_000, "{tally:?}");
    assert!(tally.anything > 5_000 && tally.ranges > 10_000 && tally.wrong_zeroes > 2_000, "{tally:?}");
    assert!(tally.settled > 5_000, "{tally:?}");
}

/// Longer and deeper ones, in which what was dropped and what was merged would be missed.
#[test]
fn agrees_over_longer_histories() {
    let mut tally = Tally::default();
    for seed in 0..2_500 {
        let mut rng = Seed::new(seed).derive("linear", 1).rng();
        let shape = Shape {
            blocks: 1,
            ops: 24,
            depth: rng.within(2..=5) as usize,
            reads: rng.within(5..=11),
            zeroes: *rng.pick(&[0, 3, 8, 14]).expect("some"),
            unknown: *rng.pick(&[0, 0, 1]).expect("some"),
            lies: *rng.pick(&[0, 20, 60]).expect("some"),
            bad_ends: *rng.pick(&[0, 10, 40]).expect("some"),
            resets: 0,
            horizon: *rng.pick(&[40, 100]).expect("some"),
            thorough: false,
            values: VALUES_MAX,
        };
        Bench::new(rng, shape).run(&mut tally);
    }
    println!("{tally:?}");
    assert!(tally.right > 10_000 && tally.wrong > 2_000 && tally.wrong_zeroes > 200, "{tally:?}");
}

/// What is forgotten makes nothing wrong that is right, and leaves most of what is wrong.
#[test]
fn forgetting_is_on_the_safe_side() {
    let (mut tally, mut blurred) = (Tally::default(), 0);
    for seed in 0..20_000 {
        let mut rng = Seed::new(seed).derive("linear", 3).rng();
        let shape = Shape {
            blocks: 1,
            ops: rng.within(5..=10) as usize,
            depth: rng.within(2..=4) as usize,
            reads: rng.within(4..=9),
            zeroes: *rng.pick(&[0, 3, 8]).expect("some"),
            unknown: *rng.pick(&[0, 0, 1]).expect("some"),
            lies: *rng.pick(&[0, 20, 60]).expect("some"),
            bad_ends: *rng.pick(&[0, 10, 40]).expect("some"),
            resets: *rng.pick(&[0, 0, 8]).expect("some"),
            horizon: *rng.pick(&[0, 40, 100]).expect("some"),
            thorough: rng.chance(1, 4),
            values: rng.within(1..=4) as usize,
        };
        blurred += u64::from(Bench::new(rng, shape).run(&mut tally).blurred() > 0);
    }
    println!("{blurred} blurred: {tally:?}");
    assert!(blurred > 10_000 && tally.vague > 500 && tally.wrong > 3 * tally.vague, "{blurred}: {tally:?}");
}

/// A device that does as it should under many hands: it is never called wrong, and what it takes does not grow.
#[test]
fn memory_goes_with_what_is_in_flight() {
    for (zeroes, unknown, depth) in [(2, 0, 16), (12, 0, 8), (3, 3, 12), (0, 0, 64)] {
        let mut rng = Seed::new(zeroes).derive("linear", 2).rng();
        let blocks = 64;
        let initial = if unknown > 0 { Content::Unknown } else { Content::Zero };
        let mut linear = Linear::new(blocks, initial);
        let mut holds = vec![initial; 64];
        let mut newest = [0; 64];
        let mut flights: VecDeque<(u64, Option<Content>, bool, Stamp)> = VecDeque::new();
        let mut most = 0;
        for now in 1..200_000 {
            if flights.len() < depth && now < 199_000 {
                // A quarter of it all goes to one block.
                let block = if rng.chance(1, 4) { 7 } else { rng.below(blocks) };
                let content = match rng.below(32) {
                    16.. => None,
                    kind if kind < zeroes => Some(Content::Zero),
                    kind if kind < zeroes + unknown => Some(Content::Unknown),
                    _ => {
                        newest[block as usize] += 1;
                        Some(Content::Written(newest[block as usize]))
                    }
                };
                if let Some(content) = content {
                    linear.begin_change(block..block + 1, |_| content, now);
                }
                flights.push_back((block, content, false, now));
            } else if let Some(at) = (!flights.is_empty()).then(|| rng.below(flights.len() as u64) as usize) {
                let (block, content, done, began) = flights.remove(at).expect("it is there");
                if let Some(content) = content {
                    if !done {
                        holds[block as usize] = content;
                    }
                    linear.end_change(block..block + 1, |_| content, began, now, Outcome::Done);
                } else {
                    let result = linear.read(block, holds[block as usize], began, now);
                    assert_eq!(result, Ok(()), "{zeroes} {unknown} {depth}");
                }
            }
            if let Some((block, Some(content), done, _)) =
                rng.below(flights.len() as u64 + 1).checked_sub(1).and_then(|at| flights.get_mut(at as usize))
                && !std::mem::replace(done, true)
            {
                holds[*block as usize] = *content;
            }
            linear.horizon(flights.iter().map(|flight| flight.3).min().unwrap_or(now + 1));
            most = most.max(linear.memory_bytes());
        }
        println!("{zeroes} {unknown} {depth}: {most} bytes, {} busy", linear.busy_blocks());
        let worlds = if zeroes + unknown > 4 { 512 << 10 } else { 0 };
        assert!(most < (64 << 10) + depth * 2048 + worlds, "{most} bytes");
        assert!(linear.memory_bytes() < 64 << 10);
        for block in 0..blocks {
            let candidates = linear.candidates(block, 200_000);
            assert!(candidates.contains(&holds[block as usize]) || candidates.contains(&Content::Unknown));
            assert!(linear.settled(block).is_some() || candidates.len() > 1);
        }
    }
}

/// One operation that does not end keeps alive what it could see; not more than so much of it is remembered one by one.
#[test]
fn an_operation_that_is_held_does_not_fill_memory() {
    let mut linear = Linear::new(4, Content::Zero);
    let mut now = 10;
    let mut write = |linear: &mut Linear, generation, outcome| {
        now += 2;
        linear.begin_change(0..4, |_| Content::Written(generation), now - 1);
        linear.end_change(0..4, |_| Content::Written(generation), now - 1, now, outcome);
        linear.horizon(5);
        now
    };
    let mut end = 0;
    for generation in 1..=10_000 {
        end = write(&mut linear, generation, Outcome::Done);
        assert!(linear.memory_bytes() < 128 << 10);
    }
    assert!(linear.blurred() >= 4 * 9_900);
    // The read that began at 5 may see any of it; a later one may not.
    for (block, generation) in [(0, 1), (1, 500), (2, 9_990), (3, 10_000)] {
        assert_eq!(linear.read(block, Content::Written(generation), 5, end + 1), Ok(()));
    }
    assert_eq!(linear.read(0, Content::Zero, 5, end + 2), Ok(()));
    let future = linear.read(0, Content::Written(10_001), 5, end + 3).expect_err("not begun");
    assert_eq!(future.kind, DisorderKind::Future);
    let stale = linear.read(3, Content::Written(9_999), end + 3, end + 4).expect_err("overwritten");
    assert_eq!((stale.kind, stale.candidates), (DisorderKind::Stale, vec![Content::Written(10_000)]));
    linear.horizon(end + 5);
    assert_eq!((linear.busy_blocks(), linear.settled(2)), (0, Some(Content::Written(10_000))));
    assert!(linear.memory_bytes() < 8 << 10);

    // The same with writes of which nothing was heard: any of them may still come.
    let mut linear = Linear::new(4, Content::Zero);
    for generation in 1..=10_000 {
        end = write(&mut linear, generation, Outcome::Unknown);
        linear.horizon(end + 1);
        assert!(linear.memory_bytes() < 128 << 10);
    }
    assert_eq!(linear.read(0, Content::Zero, end + 1, end + 2), Ok(()));
    assert_eq!(linear.read(0, Content::Written(10), end + 3, end + 4), Ok(()));
    assert_eq!(linear.read(0, Content::Written(9_990), end + 5, end + 6), Ok(()));
    linear.reset(0, &[Content::Written(9_990)], end + 7);
    assert_eq!(linear.settled(0), Some(Content::Written(9_990)));
}

/// A power cut leaves one of several; the first read settles which.
#[test]
fn what_a_power_cut_left_is_settled_by_the_first_read() {
    let mut linear = Linear::new(2, Content::Unknown);
    linear.begin_change(0..2, |_| Content::Written(40), 0);
    linear.end_change(0..2, |_| Content::Written(40), 0, 1, Outcome::Unknown);
    assert_eq!(linear.candidates(0, 2), [Content::Unknown, Content::Written(40)]);
    for block in 0..2 {
        linear.reset(block, &[Content::Written(1), Content::Zero, Content::Written(40)], 2);
    }
    assert_eq!(linear.read(0, Content::Written(1), 3, 4), Ok(()));
    assert_eq!(linear.read(0, Content::Zero, 5, 6).expect_err("settled").kind, DisorderKind::Stale);
    let foreign = linear.read(0, Content::Unknown, 7, 8).expect_err("known");
    assert_eq!(foreign.kind, DisorderKind::Foreign);
    assert_eq!(foreign.to_string(), "block 0: foreign: found anything, expected generation 1");
    assert_eq!(linear.read(0, Content::Written(41), 9, 10).expect_err("to come").kind, DisorderKind::Future);
    linear.begin_change(0..1, |_| Content::Written(41), 11);
    linear.end_change(0..1, |_| Content::Written(41), 11, 12, Outcome::Done);
    linear.horizon(13);
    assert_eq!(linear.settled(0), Some(Content::Written(41)));
    assert_eq!(linear.candidates(1, 13), [Content::Written(1), Content::Zero, Content::Written(40)]);
    let json = serde_json::to_string(&foreign).expect("plain data");
    assert_eq!(serde_json::from_str::<Disorder>(&json).ok(), Some(foreign));
}

/// So many writes of zeroes at once that nobody could tell which of them was seen: said so, and never called wrong.
#[test]
fn what_cannot_be_followed_is_counted() {
    let mut linear = Linear::new(1, Content::Zero);
    let mut rng = Seed::new(1).rng();
    let mut now = 0;
    let mut tick = || {
        now += 1;
        now
    };
    let mut generation = 0;
    for _ in 0..10 {
        let began: Vec<_> = (0..12)
            .map(|_| {
                let began = tick();
                linear.begin_change(0..1, |_| Content::Zero, began);
                began
            })
            .collect();
        for _ in 0..rng.within(2..=12) {
            generation += 1;
            let write = tick();
            linear.begin_change(0..1, |_| Content::Written(generation), write);
            linear.end_change(0..1, |_| Content::Written(generation), write, tick(), Outcome::Done);
            let read = tick();
            assert_eq!(linear.read(0, Content::Zero, read, tick()), Ok(()));
            let stale = linear.read(0, Content::Written(generation + 1), tick(), tick());
            assert_eq!(stale.expect_err("not written yet").kind, DisorderKind::Future);
        }
        for began in began {
            linear.end_change(0..1, |_| Content::Zero, began, tick(), Outcome::Done);
        }
        linear.horizon(tick());
    }
    assert!(linear.loose_reads() > 5, "{}", linear.loose_reads());
    assert!(linear.memory_bytes() < 4 << 20, "{} bytes", linear.memory_bytes());
}

/// A request that a dead server had done without saying so is done again by the next one, over what was written since.
#[test]
fn what_is_given_to_the_next_server_again_may_happen_twice() {
    let [old, new] = [1, 2].map(Content::Written);
    for (repeated, read_between) in [(false, true), (true, true), (true, false)] {
        let mut linear = Linear::new(1, Content::Zero);
        linear.begin_change(0..1, |_| old, 1);
        assert_eq!(linear.read(0, old, 2, 3), Ok(()));
        linear.begin_change(0..1, |_| new, 4);
        linear.end_change(0..1, |_| new, 4, 5, Outcome::Done);
        if read_between {
            assert_eq!(linear.read(0, new, 6, 7), Ok(()));
        }
        if repeated {
            linear.repeat(0..1, |_| old, 1, 8);
        }
        assert_eq!(linear.read(0, old, 9, 10).is_ok(), repeated);
        if repeated {
            assert_eq!(linear.read(0, new, 11, 12).expect_err("gone for good").kind, DisorderKind::Stale);
        }
        linear.end_change(0..1, |_| old, 1, 13, Outcome::Done);
        linear.horizon(14);
        let left = if repeated { old } else { new };
        assert_eq!((linear.settled(0), linear.busy_blocks()), (Some(left), 0));
    }
    // It may happen only once, too.
    let mut linear = Linear::new(1, Content::Zero);
    linear.begin_change(0..1, |_| old, 1);
    linear.begin_change(0..1, |_| new, 2);
    linear.end_change(0..1, |_| new, 2, 3, Outcome::Done);
    linear.repeat(0..1, |_| old, 1, 4);
    linear.end_change(0..1, |_| old, 1, 5, Outcome::Done);
    assert_eq!(linear.candidates(0, 6).len(), 2);
    assert_eq!(linear.read(0, new, 6, 7), Ok(()));
    assert_eq!(linear.read(0, old, 8, 9).expect_err("it was new").kind, DisorderKind::Stale);
}
