//! The oracle agrees with a check of everything against everything; a right device is never found, and liars are.

use super::*;
use crate::seed::Seed;

fn id(index: u64) -> OpId {
    OpId { worker: 2, index }
}

fn range(first: u64, sectors: u64) -> SectorRange {
    SectorRange::new(first, sectors)
}

type Call = (OpKind, SectorRange, Stamp, Stamp, bool);
type Acknowledged = (OpKind, SectorRange, Stamp, Stamp);

/// What is found when these calls were made for this operation.
fn one(calls: &[Call], op: Acknowledged) -> Result<(), String> {
    let mut flushes = Flushes::new(true);
    for &(kind, range, began, ended, ok) in calls {
        flushes.call(kind, range, began, ended, ok);
    }
    flushes.acknowledged(id(0), op.0, op.1, op.2, op.3);
    flushes.judge().map(drop).map_err(|finding| format!("{}: {}", finding.oracle, finding.what))
}

#[test]
fn a_flush_needs_a_flush_between_its_ends() {
    let none = SectorRange::default();
    let flush = |began, ended, ok| (OpKind::Flush, none, began, ended, ok);
    let op = (OpKind::Flush, none, 10, 20);
    assert_eq!(one(&[flush(11, 19, true)], op), Ok(()));
    assert_eq!(one(&[flush(8, 12, true), flush(11, 12, true), flush(18, 25, true)], op), Ok(()));
    for calls in [&[][..], &[flush(9, 19, true)], &[flush(11, 21, true)], &[flush(11, 19, false)]] {
        let what = one(calls, op).expect_err("no flush");
        assert_eq!(what, "flush: a flush was acknowledged, and the backend was not flushed");
    }
    let mut without_cache = Flushes::new(false);
    without_cache.acknowledged(id(0), OpKind::Flush, none, 10, 20);
    assert!(without_cache.judge().is_ok());
}

#[test]
fn a_durable_write_is_written_through_or_flushed() {
    let fua = |first, sectors| (OpKind::WriteFua, range(first, sectors), 11, 12, true);
    let plain = |first, sectors| (OpKind::Write, range(first, sectors), 11, 12, true);
    let flush = |began, ended| (OpKind::Flush, SectorRange::default(), began, ended, true);
    let op = (OpKind::WriteFua, range(0, 8), 10, 20);
    assert_eq!(one(&[fua(0, 8)], op), Ok(()));
    assert_eq!(one(&[fua(4, 8), fua(0, 4)], op), Ok(()));
    assert_eq!(one(&[plain(0, 8), flush(12, 13)], op), Ok(()));
    assert_eq!(one(&[plain(0, 8), fua(0, 2), flush(13, 14), flush(14, 21)], op), Ok(()));
    for calls in [&[plain(0, 8)][..], &[plain(0, 8), flush(11, 13)], &[plain(0, 8), flush(13, 21)]] {
        let what = one(calls, op).expect_err("not durable");
        assert_eq!(what, "flush: fua 0+8 was acknowledged, and 0+8 was neither written through nor flushed");
    }
    assert!(one(&[plain(0, 8), fua(0, 4)], op).expect_err("half").contains("and 4+4 was neither"));
    let failed = (OpKind::WriteFua, range(0, 8), 11, 12, false);
    assert!(one(&[failed], op).is_err());
}

#[test]
fn what_is_acknowledged_has_ended_in_the_backend() {
    let call = |kind, first, sectors, began, ended| (kind, range(first, sectors), began, ended, true);
    let op = (OpKind::Write, range(0, 8), 10, 20);
    assert_eq!(one(&[call(OpKind::Write, 0, 4, 11, 12), call(OpKind::Write, 4, 8, 10, 20)], op), Ok(()));
    for (calls, which) in [
        (&[][..], "0+8"),
        (&[call(OpKind::Write, 0, 8, 11, 21)], "0+8"),
        (&[call(OpKind::Write, 0, 8, 9, 12)], "0+8"),
        (&[call(OpKind::WriteZeroes, 0, 8, 11, 12)], "0+8"),
        (&[call(OpKind::Write, 2, 4, 11, 12)], "0+2, 6+2"),
    ] {
        let what = one(calls, op).expect_err("early");
        assert_eq!(what, format!("linear: write 0+8 was acknowledged before the backend had finished {which}"));
    }
    let zeroes = (OpKind::WriteZeroes, range(0, 8), 10, 20);
    assert_eq!(one(&[call(OpKind::Write, 0, 4, 11, 12), call(OpKind::WriteZeroes, 4, 4, 11, 12)], zeroes), Ok(()));
    assert_eq!(one(&[], (OpKind::Read, range(0, 8), 10, 20)), Ok(()));
    assert_eq!(one(&[], (OpKind::Discard, range(0, 8), 10, 20)), Ok(()));
}

#[test]
fn what_a_killed_process_did_not_tell_is_not_held_against_it() {
    let mut flushes = Flushes::new(true);
    flushes.acknowledged(id(0), OpKind::Write, range(0, 8), 1, 5);
    flushes.calls_lost(4);
    assert!(flushes.horizon(10).is_ok());
    flushes.acknowledged(id(1), OpKind::Write, range(0, 8), 11, 15);
    let finding = flushes.judge().expect_err("early");
    assert_eq!(finding.detail[0], "operation 1 of worker 2, in flight from 11 to 15");
    let counts = flushes.judge().expect("found once");
    let mut evidence = Evidence::new();
    counts.add_to(&mut evidence);
    assert_eq!((evidence.count("writes_checked"), flushes.pending()), (2, 0));
}

fn naive(calls: &[Call], ops: &[Acknowledged], volatile: bool) -> usize {
    let within = |call: &Call, op: &Acknowledged| call.2 >= op.2 && call.3 <= op.3;
    let wrong = |op: &&Acknowledged| {
        let flush = |from: Stamp| {
            calls.iter().any(|call| call.0 == OpKind::Flush && call.4 && within(call, op) && call.2 >= from)
        };
        let (kind, range, began, _) = **op;
        match kind {
            OpKind::Read | OpKind::Discard => false,
            OpKind::Flush => volatile && !flush(began),
            _ => (range.first..range.end()).any(|sector| {
                let own: Vec<_> = calls
                    .iter()
                    .filter(|call| call.1.contains(sector) && leads_to(kind, call.0) && within(call, op))
                    .filter(|call| call.0 != OpKind::Flush)
                    .collect();
                let durable = |call: &&Call| call.4 && (call.0 == OpKind::WriteFua || flush(call.3));
                own.is_empty() || kind == OpKind::WriteFua && volatile && !own.iter().any(durable)
            }),
        }
    };
    ops.iter().filter(wrong).count()
}

#[test]
fn the_oracle_agrees_with_the_naive_check() {
    let mut rng = Seed::new(4).rng();
    let (mut right, mut wrong) = (0, 0);
    for _ in 0..5000 {
        let kinds =
            [OpKind::Write, OpKind::WriteFua, OpKind::Flush, OpKind::Flush, OpKind::WriteZeroes, OpKind::Read];
        let mut draw = |longest: u64, sectors: u64| {
            let began = rng.below(60);
            let range = range(rng.below(6), rng.within(1..=sectors));
            (kinds[rng.below(6) as usize], range, began, began + rng.within(1..=longest), rng.chance(4, 5))
        };
        let calls: Vec<Call> = (0..draw(1, 1).2).map(|_| draw(10, 6)).collect();
        let ops: Vec<Acknowledged> =
            (0..draw(1, 1).2 % 6).map(|_| draw(40, 3)).map(|op| (op.0, op.1, op.2, op.3)).collect();
        let volatile = rng.chance(3, 4);
        let mut order: Vec<_> =
            (0..calls.len()).map(|at| (false, at)).chain((0..ops.len()).map(|at| (true, at))).collect();
        rng.shuffle(&mut order);
        let mut flushes = Flushes::new(volatile);
        let mut found = 0;
        while let Some((is_op, at)) = order.pop() {
            if is_op {
                let (kind, range, began, ended) = ops[at];
                flushes.acknowledged(id(at as u64), kind, range, began, ended);
            } else {
                let (kind, range, began, ended, ok) = calls[at];
                flushes.call(kind, range, began, ended, ok);
            }
            let began = |(is_op, at): &(bool, usize)| if *is_op { ops[*at].2 } else { calls[*at].2 };
            let oldest = order.iter().map(began).min().unwrap_or(100);
            if rng.chance(1, 3) {
                found += std::iter::from_fn(|| flushes.horizon(oldest).err()).count();
            }
        }
        found += std::iter::from_fn(|| flushes.judge().err()).count();
        let expected = naive(&calls, &ops, volatile);
        assert_eq!(found, expected, "{volatile} {calls:?} {ops:?}");
        assert_eq!(flushes.pending(), 0);
        if expected == 0 { right += 1 } else { wrong += 1 }
    }
    assert!(right > 500 && wrong > 500, "{right} {wrong}");
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Nothing,
    FlushNotDone,
    FlushEarly,
    FlushOfBefore,
    FuaAsPlain,
    WriteEarly,
}

/// Runs operations on a device that may lie: what is found, whether it lied, and the most that was kept.
fn run(seed: u64, lie: Lie) -> (Result<FlushCounts, Finding>, bool, usize) {
    struct Flying {
        id: OpId,
        kind: OpKind,
        range: SectorRange,
        began: Stamp,
        /// The call under way: when it began, and what it is.
        call: Option<(Stamp, OpKind)>,
        todo: Vec<OpKind>,
    }
    let mut rng = Seed::new(seed).rng();
    let mut flushes = Flushes::new(true);
    let (mut flying, mut now, mut next, mut told, mut most) = (Vec::<Flying>::new(), 0, 0, false, 0);
    while next < 400 || !flying.is_empty() {
        now += 1;
        if next < 400 && flying.len() < 6 && rng.chance(1, 3) {
            let kind = [OpKind::Write, OpKind::WriteFua, OpKind::Flush][rng.below(3) as usize];
            let todo = match kind {
                // A durable write is one, or is flushed.
                OpKind::WriteFua if rng.chance(1, 2) => vec![OpKind::Flush, OpKind::Write],
                kind => vec![kind],
            };
            // Operations do not overlap: the calls of one could be taken for those of the other.
            flying.push(Flying { id: id(next), kind, range: range(next * 8, 8), began: now, call: None, todo });
            next += 1;
        } else if !flying.is_empty() {
            let at = rng.below(flying.len() as u64) as usize;
            let op = &mut flying[at];
            if let Some((began, kind)) = op.call.take() {
                flushes.call(kind, op.range, began, now, true);
                if kind == OpKind::Flush {
                    // It serves whoever waited when it began.
                    for other in &mut flying {
                        if other.kind == OpKind::Flush && other.call.is_none() && other.began < began {
                            other.todo.clear();
                        }
                    }
                }
            } else {
                let now_lies = lie != Lie::Nothing && rng.chance(1, 10);
                let last = op.todo.last().copied();
                match (lie, last) {
                    (Lie::FlushNotDone | Lie::FlushEarly, Some(OpKind::Flush))
                    | (Lie::WriteEarly, Some(OpKind::Write | OpKind::WriteFua))
                        if now_lies =>
                    {
                        op.todo.clear();
                    }
                    (Lie::FlushOfBefore, Some(OpKind::Flush)) if now_lies => {
                        op.todo.clear();
                        flushes.call(OpKind::Flush, op.range, op.began - 1, now, true);
                    }
                    (Lie::FuaAsPlain, Some(OpKind::WriteFua)) if now_lies => op.todo = vec![OpKind::Write],
                    (_, Some(kind)) => {
                        op.todo.pop();
                        op.call = Some((now, kind));
                    }
                    (_, None) => {
                        let op = flying.swap_remove(at);
                        flushes.acknowledged(op.id, op.kind, op.range, op.began, now);
                        if lie == Lie::FlushEarly && rng.chance(1, 2) {
                            flushes.call(OpKind::Flush, op.range, now - 1, now + 1, true);
                            now += 1;
                        }
                    }
                }
                told |= now_lies;
            }
        }
        let oldest = flying.iter().map(|op| op.began).min().unwrap_or(now);
        if let Err(finding) = flushes.horizon(oldest) {
            return (Err(finding), told, most);
        }
        most = most.max(flushes.pending());
    }
    (flushes.judge(), told, most)
}

#[test]
fn a_right_device_is_never_found() {
    for seed in 0..200 {
        let (verdict, _, most) = run(seed, Lie::Nothing);
        let counts = verdict.unwrap_or_else(|finding| panic!("seed {seed}: {finding:#?}"));
        assert_eq!(counts.flushes + counts.durable_writes + counts.writes, 400);
        // An operation may be passed over for long, but not for ever.
        assert!(most < 200, "{most}");
    }
}

#[test]
fn every_lie_is_found() {
    for (lie, oracle) in [
        (Lie::FlushNotDone, "flush"),
        (Lie::FlushEarly, "flush"),
        (Lie::FlushOfBefore, "flush"),
        (Lie::FuaAsPlain, "flush"),
        (Lie::WriteEarly, "linear"),
    ] {
        for seed in 0..50 {
            let (verdict, lied, _) = run(seed, lie);
            let finding = verdict.expect_err("a lie in four hundred operations");
            assert!(lied && finding.oracle == oracle, "{lie:?} {seed}: {finding:?}");
        }
    }
}
