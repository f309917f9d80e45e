//! Toy devices that fail when certain actions meet; what is left of thousands are those.

use super::*;
use crate::fault::{Rule, Trigger};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Act, Action, Actions, Setup, VERSION, Workload};
use crate::seed::SeededRng;

/// A script of about so many actions, with everything that may be in one.
fn long(seed: u64, ops: u64) -> Script {
    let setup = Setup {
        bytes: 1 << 20,
        workers: 6,
        discard: true,
        write_zeroes: true,
        read_only: false,
        compressible: 50,
        ..Setup::draw(&mut Seed::new(seed).rng())
    };
    let actions = Actions::new(Seed::new(seed), &setup, Workload::everything(ops)).expect("a right setup").collect();
    let faults = "write rate 1/1000: error EIO after; read: delay 5".parse().expect("two rules");
    Script { version: VERSION, seed: Seed::new(seed), setup, mutant: None, faults, actions }
}

fn lost() -> Signature {
    Signature { oracle: Oracle::Linear, class: "lost".to_owned() }
}

/// One of the actions that have to come together.
#[derive(Clone, Copy, Debug)]
struct Needle {
    act: Act,
    /// By another worker than the one before.
    other_worker: bool,
}

impl Needle {
    fn is(self, action: &Action, before: Option<u32>) -> bool {
        let worker = !self.other_worker || before.is_none_or(|before| before != action.worker);
        match (self.act, action.act) {
            (Act::Op { kind, range }, Act::Op { kind: other, range: there }) => {
                worker && kind == other && (range.overlaps(there) || kind == OpKind::Flush)
            }
            (act, other) => act == other,
        }
    }
}

/// Whether the needles come in this order, with anything between them.
fn has(actions: &[Action], needles: &[Needle]) -> bool {
    let mut left = needles.iter();
    let mut next = left.next();
    let mut worker = None;
    for action in actions {
        let Some(needle) = next else { break };
        if needle.is(action, worker) {
            worker = Some(action.worker);
            next = left.next();
        }
    }
    next.is_none()
}

/// 2 to 5 actions of a script, as needles.
fn draw_needles(rng: &mut SeededRng, script: &Script) -> Vec<Needle> {
    let mut at: Vec<usize> =
        (0..rng.within(2..=5)).map(|_| rng.below(script.actions.len() as u64) as usize).collect();
    at.sort_unstable();
    at.dedup();
    at.into_iter().map(|at| Needle { act: script.actions[at].act, other_worker: false }).collect()
}

fn assert_minimal(result: &Script, fails: &mut dyn FnMut(&Script) -> bool) {
    assert!(fails(result));
    for at in 0..result.actions.len() {
        let mut less = result.clone();
        less.actions.remove(at);
        assert!(!fails(&less), "action {at} of {:?} can go", result.actions);
    }
}

#[test]
fn a_few_actions_are_found_among_thousands() {
    let (mut most, mut sum) = (0, 0);
    for seed in 0..30 {
        let script = long(seed, 5000);
        let needles = draw_needles(&mut Seed::new(seed).derive("needles", 0).rng(), &script);
        let mut fails = |script: &Script| has(&script.actions, &needles).then(lost);
        let shrunk = shrink(script.clone(), &ShrinkOptions::default(), &mut fails);
        assert_eq!(shrunk.stop, Stop::Smallest, "{} runs", shrunk.runs);
        assert!(shrunk.script.actions.len() <= needles.len(), "{needles:?} {:?}", shrunk.script.actions);
        assert_minimal(&shrunk.script, &mut |script| has(&script.actions, &needles));
        assert_eq!(shrunk.script.validate(), Ok(()));
        assert_eq!((shrunk.signature.clone(), shrunk.rate), (Some(lost()), Rate { failed: 100, of: 100 }));
        let Setup { workers, io_depth, queues, queue_depth, merges, reorder, compressible, .. } = shrunk.script.setup;
        assert_eq!((workers, io_depth, queues, queue_depth, merges, reorder), (1, 1, 1, 1, false, 0));
        assert_eq!(compressible, 0);
        assert!(shrunk.script.faults.rules.is_empty());
        assert_eq!(shrunk, shrink(script, &ShrinkOptions::default(), &mut fails), "twice the same");
        most = most.max(shrunk.runs);
        sum += shrunk.runs;
    }
    assert!(most < 1200 && sum / 30 < 600, "at most {most} runs, {} on average", sum / 30);
}

/// What crosses in one order of events out of three does not cross with every seed.
#[test]
fn what_fails_now_and_then_is_shrunk_too() {
    let block = SectorRange::new(0, 512);
    let of = |kind| Act::Op { kind, range: block };
    for seed in 0..10 {
        let needles = [
            Needle { act: of(OpKind::Write), other_worker: false },
            Needle { act: of(OpKind::Write), other_worker: true },
            Needle { act: of(OpKind::Read), other_worker: true },
        ];
        let mut fails = |script: &Script| {
            let order = script.seed.derive("order", script.actions.len() as u64).rng().below(100);
            (order < 30 && has(&script.actions, &needles)).then(lost)
        };
        let options = ShrinkOptions { tries: 4, max_runs: 4000, ..ShrinkOptions::default() };
        let shrunk = shrink(long(seed, 5000), &options, &mut fails);
        assert_eq!(shrunk.script.actions.len(), 3, "{:?}", shrunk.script.actions);
        assert_eq!(shrunk.script.setup.workers, 2);
        assert_eq!(fails(&shrunk.script), Some(lost()), "the seed that failed is kept");
        assert!((15..=45).contains(&shrunk.rate.failed) && shrunk.rate.of == 100, "{}", shrunk.rate);
    }
}

/// Once in so many writes, one is dropped; a sweep or a read of the sector sees it.
fn drops_writes(script: &Script) -> Option<Signature> {
    let planted = script.mutant?;
    let mut count = script.seed.derive("phase", 0).rng().below(planted.every);
    let mut lost_ranges: Vec<SectorRange> = Vec::new();
    for action in &script.actions {
        match action.act {
            Act::Op { kind: OpKind::Read, range } if lost_ranges.iter().any(|lost| lost.overlaps(range)) => {
                return Some(lost());
            }
            Act::Sweep if !lost_ranges.is_empty() => return Some(lost()),
            Act::Op { kind, range } if kind.changes() => {
                lost_ranges.retain(|lost| !range.covers(*lost));
                count += 1;
                if kind == OpKind::Write && count.is_multiple_of(planted.every) {
                    lost_ranges.push(range);
                }
            }
            _ => {}
        }
    }
    None
}

#[test]
fn what_strikes_once_in_500_strikes_at_once() {
    for seed in 0..20 {
        let mut script = long(seed, 5000);
        script.mutant = Some("lost-write:500".parse().expect("a mutant"));
        let shrunk = shrink(script, &ShrinkOptions::default(), &mut drops_writes);
        assert_eq!(shrunk.script.actions.len(), 2, "{:?}", shrunk.script.actions);
        assert_eq!(shrunk.script.mutant.map(|planted| planted.every), Some(1));
        assert_eq!(shrunk.rate, Rate { failed: 100, of: 100 });
        let first = shrunk.script.actions[0].act;
        let range = SectorRange::new(0, shrunk.script.setup.block_sectors());
        assert_eq!(first, Act::Op { kind: OpKind::Write, range });
        assert_eq!(shrunk.script.setup.bytes, 4096);
    }
}

/// A rule that fires once in a thousand calls is made to fire at once, and the other goes.
#[test]
fn faults_that_matter_stay() {
    let mut fails = |script: &Script| {
        let writes =
            || script.actions.iter().filter(|action| matches!(action.act, Act::Op { kind: OpKind::Write, .. }));
        let fires = |rule: &Rule| rule.trigger == Trigger::Always || writes().count() > 1000;
        let rule = script.faults.rules.iter().find(|rule| String::from((*rule).clone()).contains("EIO"));
        (rule.is_some_and(fires) && writes().count() > 0).then(lost)
    };
    let shrunk = shrink(long(1, 5000), &ShrinkOptions::default(), &mut fails);
    assert_eq!((shrunk.script.actions.len(), shrunk.script.faults.rules.len()), (1, 1));
    assert_eq!(shrunk.script.faults.rules[0].trigger, Trigger::Always);
}

/// Another bug needs fewer actions, and still the one that was seen is shown.
#[test]
fn one_bug_is_not_taken_for_another() {
    let torn = || Signature { oracle: Oracle::Tag, class: "torn".to_owned() };
    let count = |script: &Script, wanted: OpKind| {
        script.actions.iter().filter(|action| matches!(action.act, Act::Op { kind, .. } if kind == wanted)).count()
    };
    let mut fails = |script: &Script| {
        if count(script, OpKind::Write) >= 3 && count(script, OpKind::Read) >= 1 {
            Some(lost())
        } else {
            (count(script, OpKind::Write) >= 1).then(torn)
        }
    };
    let shrunk = shrink(long(1, 500), &ShrinkOptions::default(), &mut fails);
    assert_eq!((shrunk.script.actions.len(), shrunk.signature), (4, Some(lost())));
    let any = ShrinkOptions { same: Same::Any, ..ShrinkOptions::default() };
    let shrunk = shrink(long(1, 500), &any, &mut fails);
    assert_eq!((shrunk.script.actions.len(), shrunk.signature), (1, Some(torn())));
    let oracle = ShrinkOptions { same: Same::Oracle, ..ShrinkOptions::default() };
    let shrunk = shrink(long(1, 500), &oracle, &mut fails);
    assert_eq!((shrunk.script.actions.len(), shrunk.signature), (4, Some(lost())));
}

/// Ranges that have to meet, or to be long or far, stay so, and are no longer or farther than that.
#[test]
fn ranges_are_as_short_and_low_as_they_can_be() {
    let ranges = |script: &Script| -> Vec<SectorRange> {
        let acts = script.actions.iter().map(|action| action.act);
        acts.filter_map(|act| match act {
            Act::Op { kind: OpKind::Write, range } => Some(range),
            _ => None,
        })
        .collect()
    };
    let mut overlap_in_part = |script: &Script| {
        let ranges = ranges(script);
        let partly = |a: SectorRange, b: SectorRange| a.overlaps(b) && !a.covers(b) && !b.covers(a);
        ranges.iter().any(|a| ranges.iter().any(|b| partly(*a, *b))).then(lost)
    };
    let shrunk = shrink(long(3, 500), &ShrinkOptions::default(), &mut overlap_in_part);
    let block = shrunk.script.setup.block_sectors();
    let mut left = ranges(&shrunk.script);
    left.sort_unstable();
    assert_eq!(left, [SectorRange::new(0, 2 * block), SectorRange::new(block, 2 * block)]);

    let mut long_and_far = |script: &Script| {
        ranges(script).iter().any(|range| range.sectors >= 3 * block && range.end() > 1000).then(lost)
    };
    let shrunk = shrink(long(3, 500), &ShrinkOptions::default(), &mut long_and_far);
    let left = ranges(&shrunk.script);
    assert!(left.len() == 1 && left[0].sectors <= 4 * block && left[0].end() <= 1000 + block, "{left:?}");
}

#[test]
fn budgets_are_kept() {
    let mut runs = 0;
    let mut fails = |script: &Script| {
        runs += 1;
        (script.actions.len() > 100).then(lost)
    };
    let options = ShrinkOptions { max_runs: 10, rate_runs: 5, ..ShrinkOptions::default() };
    let shrunk = shrink(long(1, 500), &options, &mut fails);
    assert_eq!((shrunk.runs, shrunk.stop, runs), (10, Stop::Runs, 15));
    assert!(shrunk.script.actions.len() > 100);

    let mut left = 7;
    let mut keep_going = || {
        left -= 1;
        left > 0
    };
    let mut fails = |_: &Script| Some(lost());
    let shrunk = shrink_while(long(1, 500), &ShrinkOptions::default(), &mut fails, &mut keep_going);
    assert!(shrunk.stop == Stop::Caller || shrunk.script.actions.is_empty());
    assert!(shrunk.runs <= 8);

    let shrunk = shrink(long(1, 50), &ShrinkOptions::default(), &mut |_| None);
    assert_eq!((shrunk.script, shrunk.stop, shrunk.signature), (long(1, 50), Stop::NeverFailed, None));
    let shrunk = shrink(long(1, 50), &ShrinkOptions::default(), &mut |_| Some(lost()));
    assert!(shrunk.script.actions.is_empty() && shrunk.stop == Stop::Smallest);
}

#[test]
fn signatures_have_no_numbers() {
    let finding = |what: &str| Signature::of(Oracle::Errors, &Event::finding("errors", what));
    assert_eq!(finding("EIO at sector 17 of 200"), finding("EIO at sector 3 of 12000"));
    assert_ne!(finding("EIO at sector 17"), finding("ENOSPC at sector 17"));
    assert_eq!(finding("5 lost").to_string(), "errors: # lost");
}
