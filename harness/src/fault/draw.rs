//! Drawing plans of faults.
//!
//! Which kinds of faults there are is drawn first, and how often each happens second: a run with every fault at a middling
//! rate never gets far into anything, and never meets what one fault alone would do.

use super::{Effect, Errno, FaultPlan, Ops, Rule, Stage, Trigger};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::seed::SeededRng;

impl FaultPlan {
    /// A plan of faults that show themselves: errors, delays, requests that are held, short results. One in five is empty.
    #[must_use]
    pub fn draw(rng: &mut SeededRng, device_sectors: u64) -> Self {
        if rng.chance(1, 5) {
            return Self::NONE;
        }
        let mut rules = Vec::new();
        for ops in [
            Ops::only(OpKind::Read),
            Ops::WRITES,
            Ops::only(OpKind::Flush),
            Ops::only(OpKind::Discard).with(OpKind::WriteZeroes),
            Ops::ANY,
        ] {
            if rng.chance(1, 3) {
                let effect = draw_error(rng);
                rules.push(draw_rule(rng, device_sectors, ops, effect));
            }
        }
        if rng.chance(1, 3) {
            let effect = Effect::Delay(1 << rng.below(6));
            let ops = draw_ops(rng);
            rules.push(draw_rule(rng, device_sectors, ops, effect));
        }
        if rng.chance(1, 4) {
            let ops = draw_ops(rng);
            let mut rule = draw_rule(rng, device_sectors, ops, Effect::Hold);
            // Every slot that is held is one less to work with.
            rule.times = Some(rng.within(1..=8));
            rules.push(rule);
        }
        if rng.chance(1, 4) {
            let ops = Ops::WRITES.with(OpKind::Read);
            rules.push(draw_rule(rng, device_sectors, ops, Effect::Short));
        }
        if rng.chance(1, 5) {
            draw_outage(rng, &mut rules);
        }
        Self { rules }
    }

    /// A plan of faults that corrupt in silence, which some oracle has to find. Never empty.
    #[must_use]
    pub fn draw_silent(rng: &mut SeededRng, device_sectors: u64) -> Self {
        let silent = [Effect::Lost, Effect::Torn, Effect::Misdirected, Effect::Stale, Effect::Flipped];
        let count = rng.within(1..=2);
        let rules = (0..count).filter_map(|_| {
            let effect = *rng.pick(&silent)?;
            let ops = match effect {
                Effect::Stale => Ops::only(OpKind::Read),
                Effect::Flipped | Effect::Misdirected => Ops::WRITES.with(OpKind::Read),
                _ => Ops::WRITES,
            };
            Some(draw_rule(rng, device_sectors, ops, effect))
        });
        Self { rules: rules.collect() }
    }
}

fn draw_ops(rng: &mut SeededRng) -> Ops {
    let choices = [Ops::ANY, Ops::WRITES, Ops::only(OpKind::Read), Ops::only(OpKind::Flush)];
    rng.pick(&choices).copied().unwrap_or(Ops::ANY)
}

fn draw_error(rng: &mut SeededRng) -> Effect {
    // Half of them are what real disks say, the others whatever there is a name for.
    let errno = if rng.chance(1, 2) {
        rng.pick(&[Errno::EIO, Errno::ENOSPC]).copied()
    } else {
        let all: Vec<Errno> = Errno::named().collect();
        rng.pick(&all).copied()
    };
    let stage = rng.pick(&[Stage::Before, Stage::Partway, Stage::After]).copied();
    Effect::Error { errno: errno.unwrap_or(Errno::EIO), stage: stage.unwrap_or(Stage::Before) }
}

fn draw_rule(rng: &mut SeededRng, device_sectors: u64, ops: Ops, effect: Effect) -> Rule {
    let mut rule = Rule::new(ops, effect);
    let often = 1 << rng.within(3..=10);
    rule.trigger = match rng.below(6) {
        0 => Trigger::Nth(rng.within(1..=often)),
        1 => Trigger::Every(rng.within(8..=often.max(16))),
        2 => {
            let hits = rng.within(2..=16);
            Trigger::Burst { hits, out_of: hits * rng.within(8..=64) }
        }
        _ => Trigger::Rate { hits: 1, out_of: often },
    };
    if rng.chance(1, 4) && ops != Ops::only(OpKind::Flush) && device_sectors > 0 {
        let sectors = (device_sectors >> rng.below(8)).max(1);
        rule.range = Some(SectorRange::new(rng.below(device_sectors - sectors + 1), sectors));
    }
    if rng.chance(1, 5) && !matches!(rule.trigger, Trigger::Nth(_)) {
        let from = rng.within(1..=256);
        rule.calls = Some((from, from + rng.within(1..=1024)));
    }
    if rng.chance(1, 5) {
        rule.times = Some(rng.within(1..=32));
    }
    rule
}

/// One call fails, and from then on others do until so many have.
fn draw_outage(rng: &mut SeededRng, rules: &mut Vec<Rule>) {
    let (first, others) = (draw_error(rng), draw_error(rng));
    rules.push(Rule {
        state: Some(0),
        trigger: Trigger::Nth(rng.within(1..=500)),
        then: Some(1),
        ..Rule::new(draw_ops(rng), first)
    });
    let ops = draw_ops(rng);
    rules.push(Rule {
        state: Some(1),
        trigger: Trigger::Nth(rng.within(2..=20)),
        then: Some(2),
        ..Rule::new(ops, others)
    });
    rules.push(Rule { state: Some(1), ..Rule::new(ops, others) });
}
