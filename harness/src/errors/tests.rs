//! The accounts agree with a check of everything against everything; what a right device does is never found, and what a
//! wrong one does is.

use super::*;
use crate::fault::{Effect, Stage};
use crate::seed::{Seed, SeededRng};

const STRICT: ErrorOptions = ErrorOptions { allowances: &[], others: false, calls_late: false };

fn injection(kind: OpKind, range: SectorRange, errno: Errno) -> Injection {
    let effect = Effect::Error { errno, stage: Stage::Before };
    let errno = Some(errno.number());
    Injection { number: 0, rule: 0, kind, range, effect, errno, began: 0, ended: 0 }
}

fn id(index: u64) -> OpId {
    OpId { worker: 1, index }
}

fn range(first: u64, sectors: u64) -> SectorRange {
    SectorRange::new(first, sectors)
}

fn errno(name: &str) -> Errno {
    name.parse().expect("a name")
}

/// What the accounts say of one call that fails and one operation that may be behind it.
fn one(
    options: ErrorOptions,
    call: (OpKind, SectorRange, &str, Stamp, Stamp),
    op: (OpKind, SectorRange, Seen, Stamp, Stamp),
) -> Result<ErrorCounts, String> {
    let mut ledger = ErrorLedger::new(options);
    ledger.injected(&injection(call.0, call.1, errno(call.2)), call.3, call.4);
    ledger.observed(id(7), op.0, op.1, op.2, op.3, op.4);
    ledger.judge().map_err(|finding| {
        assert_eq!(finding.oracle, "errors");
        assert!(!finding.detail.is_empty());
        finding.what
    })
}

const EIO: Seen = Seen::Failed(5);

#[test]
fn what_is_made_and_seen_is_right() {
    use OpKind::{Discard, Flush, Read, Write, WriteFua, WriteZeroes};
    let (whole, part) = (range(8, 8), range(8, 4));
    for (call, op) in [
        (Read, Read),
        (Write, Write),
        (Write, WriteFua),
        (Write, WriteZeroes),
        (WriteFua, WriteFua),
        (Flush, Flush),
        (Flush, WriteFua),
        (Discard, Discard),
        (WriteZeroes, WriteZeroes),
    ] {
        let counts = one(STRICT, (call, part, "EIO", 3, 4), (op, whole, EIO, 1, 5)).expect("right");
        assert_eq!((&counts.injected, &counts.seen), (&BTreeMap::from([(Errno::EIO, 1)]), &counts.injected));
        let swallowed = one(STRICT, (call, part, "EIO", 3, 4), (op, whole, Seen::Done, 1, 5));
        assert!(swallowed.expect_err("swallowed").contains("not seen"));
        assert!(one(STRICT, (call, part, "EIO", 3, 4), (op, whole, Seen::Unknown, 1, 5)).is_ok());
    }
    for (call, op) in [(Read, Write), (Write, Read), (Flush, Write), (WriteFua, Write), (Discard, WriteZeroes)] {
        assert!(one(STRICT, (call, part, "EIO", 3, 4), (op, whole, EIO, 1, 5)).is_err(), "{call} {op}");
    }
    // What the kernel turns into EIO is seen as EIO.
    assert!(one(STRICT, (Read, part, "EROFS", 3, 4), (Read, whole, EIO, 1, 5)).is_ok());
    assert!(one(STRICT, (Read, part, "EROFS", 3, 4), (Read, whole, Seen::Failed(30), 1, 5)).is_err());
}

#[test]
fn what_cannot_be_the_cause_is_not() {
    let read = OpKind::Read;
    let call = (read, range(8, 4), "EIO", 3, 4);
    for (sectors, began, ended) in [(range(12, 4), 1, 5), (range(8, 4), 4, 5), (range(8, 4), 1, 3)] {
        let what = one(STRICT, call, (read, sectors, EIO, began, ended)).expect_err("unrelated");
        assert!(what.contains("which nothing injected"), "{what}");
    }
    let what = one(STRICT, call, (read, range(8, 2), EIO, 1, 5)).expect_err("half of it");
    assert!(what.contains("EIO on read 8+4 was injected and not") || what.contains("no operation"), "{what}");
    for wrong in [-5, 0, 28, 4096] {
        let what = one(STRICT, call, (read, range(8, 8), Seen::Failed(wrong), 1, 5)).expect_err("wrong errno");
        assert!(what.contains("where EIO was injected"), "{what}");
    }
}

#[test]
fn one_call_may_be_for_many_and_many_calls_for_one() {
    let mut ledger = ErrorLedger::new(STRICT);
    // Merged: all that it covers fail.
    ledger.injected(&injection(OpKind::Write, range(0, 12), Errno::EIO), 5, 6);
    for index in 0..3 {
        ledger.observed(id(index), OpKind::Write, range(index * 4, 4), EIO, index + 1, index + 7);
    }
    // Split: either errno will do.
    ledger.injected(&injection(OpKind::Read, range(0, 8), Errno::ENOSPC), 14, 15);
    ledger.injected(&injection(OpKind::Read, range(8, 8), Errno::EAGAIN), 16, 17);
    ledger.observed(id(4), OpKind::Read, range(0, 16), Seen::Failed(28), 11, 18);
    // One flush for two, one of which had another one to wait for.
    ledger.injected(&injection(OpKind::Flush, SectorRange::default(), Errno::EIO), 22, 23);
    ledger.observed(id(5), OpKind::Flush, SectorRange::default(), EIO, 20, 24);
    ledger.observed(id(6), OpKind::Flush, SectorRange::default(), Seen::Done, 21, 26);
    let counts = ledger.judge().expect("right");
    assert_eq!(counts.injected.values().sum::<u64>(), 4);
    assert_eq!(counts.seen, BTreeMap::from([(Errno::EIO, 4), (Errno::ENOSPC, 1)]));
    // Merged, and one of them succeeds.
    ledger.injected(&injection(OpKind::Write, range(0, 8), Errno::EIO), 35, 36);
    ledger.observed(id(7), OpKind::Write, range(0, 4), EIO, 31, 37);
    ledger.observed(id(8), OpKind::Write, range(4, 4), Seen::Done, 32, 38);
    assert!(ledger.judge().expect_err("swallowed").what.contains("not seen"));
    assert!(ledger.judge().is_ok(), "each is found once");
}

#[test]
fn errors_that_outlive_their_fault_are_named() {
    let mut ledger = ErrorLedger::new(STRICT);
    ledger.injected(&injection(OpKind::Write, range(0, 8), Errno::EIO), 2, 3);
    ledger.observed(id(0), OpKind::Write, range(0, 8), EIO, 1, 4);
    ledger.faults_off(10);
    ledger.observed(id(1), OpKind::Write, range(0, 8), EIO, 11, 12);
    let finding = ledger.judge().expect_err("sticky");
    assert!(finding.what.contains("although faults were off since 10"), "{finding:?}");
    assert!(finding.detail[0].contains("operation 1 of worker 1") && finding.detail[1].contains("(2 to 3)"));
    ledger.faults_on(20);
    ledger.observed(id(2), OpKind::Write, range(0, 8), EIO, 21, 22);
    assert!(ledger.judge().expect_err("invented").what.contains("nothing injected"));
}

#[test]
fn excuses_and_allowances_are_given_and_counted() {
    let mut ledger = ErrorLedger::new(STRICT);
    ledger.excuse(id(0), Some(Errno::EIO), "the server died");
    ledger.excuse(id(1), None, "the server died");
    ledger.excuse(id(2), Some(Errno::EIO), "beyond the end");
    for (index, seen) in [EIO, Seen::Failed(110), Seen::Failed(28), Seen::Done].into_iter().enumerate() {
        ledger.observed(id(index as u64), OpKind::Write, range(0, 8), seen, 1, 9);
    }
    ledger.observed(id(4), OpKind::Write, range(0, 8), EIO, 1, 9);
    ledger.excuse(id(4), Some(Errno::EIO), "the server died");
    assert!(ledger.judge().expect_err("another errno").what.contains("ENOSPC"));
    let counts = ledger.judge().expect("right");
    assert_eq!(counts.excused, BTreeMap::from([("the server died".to_owned(), 3)]));

    let kernel = ErrorOptions { allowances: KERNEL, ..STRICT };
    let nothing = SectorRange::default();
    for (kind, range, name) in [
        (OpKind::Discard, range(0, 8), "EOPNOTSUPP"),
        (OpKind::Flush, nothing, "EOPNOTSUPP"),
        (OpKind::WriteZeroes, range(0, 8), "EIO"),
        (OpKind::Read, range(0, 8), "EAGAIN"),
    ] {
        let told = |options| one(options, (kind, range, name, 2, 3), (kind, range, Seen::Done, 1, 4));
        assert_eq!(told(kernel).expect("allowed").dropped, 1);
        assert!(told(STRICT).is_err());
    }
    let discard = OpKind::Discard;
    assert!(one(kernel, (discard, range(0, 8), "EIO", 2, 3), (discard, range(0, 8), Seen::Done, 1, 4)).is_err());
    let others = ErrorOptions { others: true, ..STRICT };
    let call = (OpKind::Read, range(0, 8), "EIO", 2, 3);
    let counts = one(others, call, (OpKind::Read, range(8, 8), Seen::Done, 1, 4)).expect("of others");
    assert_eq!(counts.others, 1);
    assert!(one(others, call, (OpKind::Read, range(7, 2), Seen::Done, 1, 4)).is_err());
    let mut evidence = Evidence::new();
    counts.add_to(&mut evidence);
    assert_eq!((evidence.count("errors_injected_EIO"), evidence.count("errors_of_others")), (1, 1));
}

#[test]
fn what_dies_with_a_server_need_not_be_seen() {
    let told = |death: Stamp| {
        let mut ledger = ErrorLedger::new(STRICT);
        ledger.injected(&injection(OpKind::Write, range(0, 8), Errno::EIO), 3, 4);
        ledger.server_died(death);
        ledger.observed(id(0), OpKind::Write, range(0, 8), Seen::Done, 1, 9);
        ledger.judge().is_ok()
    };
    assert_eq!([2, 3, 5, 9, 10].map(told), [false, true, true, true, false]);
}

#[test]
fn nothing_is_kept_without_errors() {
    let mut ledger = ErrorLedger::new(STRICT);
    let delay =
        Injection { effect: Effect::Delay(5), errno: None, ..injection(OpKind::Read, range(0, 1), Errno::EIO) };
    ledger.injected(&delay, 1, 1);
    for index in 0..1000 {
        ledger.observed(id(index), OpKind::Write, range(index, 8), Seen::Done, index, index + 10);
        assert_eq!(ledger.pending(), 0);
        assert!(ledger.horizon(index).is_ok());
    }
    assert_eq!(ledger.judge(), Ok(ErrorCounts::default()));
}

/// A history: operations, calls that failed, and the deaths of servers.
#[derive(Debug, Default)]
struct History {
    ops: Vec<(OpId, OpKind, SectorRange, Seen, Stamp, Stamp)>,
    calls: Vec<(Injection, Stamp, Stamp)>,
    deaths: Vec<Stamp>,
}

/// How many promises were broken, by looking at everything for everything.
fn naive(history: &History, others: bool) -> usize {
    let may = |call: &(Injection, Stamp, Stamp), op: &(OpId, OpKind, SectorRange, Seen, Stamp, Stamp)| {
        let (injection, call_began, call_ended) = call;
        let (_, kind, range, _, began, ended) = op;
        leads_to(*kind, injection.kind)
            && (injection.kind == OpKind::Flush || injection.range.overlaps(*range))
            && began <= call_began
            && call_ended <= ended
    };
    let mut broken = 0;
    for op in &history.ops {
        if let Seen::Failed(errno) = op.3 {
            let seen =
                |injection: &Injection| Errno::new(injection.errno.unwrap_or(0)).map(|errno| errno.seen().number());
            broken += usize::from(!history.calls.iter().any(|call| may(call, op) && seen(&call.0) == Some(errno)));
        }
    }
    for call in &history.calls {
        let flush = call.0.kind == OpKind::Flush;
        let sectors = if flush { 0..1 } else { call.0.range.first..call.0.range.end() };
        let (mut unseen, mut only_others) = (false, true);
        for sector in sectors {
            let behind: Vec<_> =
                history.ops.iter().filter(|op| may(call, op) && (flush || op.2.contains(sector))).collect();
            let again = |ended: Stamp| history.deaths.iter().any(|death| call.1 <= *death && *death <= ended);
            if !behind.iter().any(|op| op.3 != Seen::Done || again(op.5)) {
                unseen = true;
                only_others &= behind.is_empty();
            }
        }
        broken += usize::from(unseen && !(others && only_others));
    }
    broken
}

/// The same, by the accounts. `order` says in which order ends are told.
fn streamed(history: &History, options: ErrorOptions, mut order: Vec<(bool, usize)>, rng: &mut SeededRng) -> usize {
    let mut ledger = ErrorLedger::new(options);
    history.deaths.iter().for_each(|death| ledger.server_died(*death));
    order.reverse();
    let mut broken = 0;
    while let Some((is_op, at)) = order.pop() {
        if is_op {
            let (id, kind, range, seen, began, ended) = history.ops[at];
            ledger.observed(id, kind, range, seen, began, ended);
        } else {
            let (injection, began, ended) = &history.calls[at];
            ledger.injected(injection, *began, *ended);
        }
        if rng.chance(1, 3) {
            let began = |(is_op, at): &(bool, usize)| if *is_op { history.ops[*at].4 } else { history.calls[*at].1 };
            let oldest = order.iter().map(began).min().unwrap_or(Stamp::MAX);
            broken += std::iter::from_fn(|| ledger.horizon(oldest).err()).count();
        }
    }
    broken += std::iter::from_fn(|| ledger.judge().err()).count();
    assert_eq!(ledger.pending(), 0);
    broken
}

fn draw_history(rng: &mut SeededRng) -> History {
    let mut stamps: Vec<Stamp> = (1..60).collect();
    let mut interval = |rng: &mut SeededRng| {
        let (a, b) = (rng.below(stamps.len() as u64) as usize, rng.below(stamps.len() as u64 - 1) as usize);
        let (a, b) = (stamps.swap_remove(a), stamps.swap_remove(b));
        (a.min(b), a.max(b))
    };
    let mut history = History::default();
    let kinds = &OpKind::ALL[..=rng.below(6) as usize];
    let errnos = [5, 5, 28, 30];
    for index in 0..rng.below(12) {
        let kind = *rng.pick(kinds).expect("some");
        let seen = [Seen::Done, Seen::Unknown, EIO, EIO, Seen::Failed(28), Seen::Failed(30)][rng.below(6) as usize];
        let (began, mut ended) = interval(rng);
        if seen == Seen::Unknown && rng.chance(1, 2) {
            ended = Stamp::MAX;
        }
        history.ops.push((id(index), kind, range(rng.below(8), rng.within(1..=6)), seen, began, ended));
    }
    for _ in 0..rng.below(10) {
        let kind = *rng.pick(kinds).expect("some");
        let errno = Errno::new(errnos[rng.below(4) as usize]).expect("an errno");
        let (began, ended) = interval(rng);
        // Calls are short.
        let ended = ended.min(began + rng.below(8));
        history.calls.push((injection(kind, range(rng.below(8), rng.within(1..=4)), errno), began, ended));
    }
    if rng.chance(1, 4) {
        history.deaths.push(rng.below(60));
    }
    history
}

#[test]
fn the_accounts_agree_with_the_naive_check() {
    let mut rng = Seed::new(3).rng();
    let (mut right, mut wrong) = (0, 0);
    for _ in 0..8000 {
        let history = draw_history(&mut rng);
        let mut order: Vec<_> = (0..history.ops.len()).map(|at| (true, at)).collect();
        order.extend((0..history.calls.len()).map(|at| (false, at)));
        let calls_late = rng.chance(1, 2);
        if calls_late {
            rng.shuffle(&mut order);
        } else {
            order.sort_by_key(|(is_op, at)| (if *is_op { history.ops[*at].5 } else { history.calls[*at].2 }, *is_op));
        }
        let options = ErrorOptions { others: rng.chance(1, 2), calls_late, allowances: &[] };
        let expected = naive(&history, options.others);
        assert_eq!(
            streamed(&history, options, order.clone(), &mut rng),
            expected,
            "{options:?} {order:?} {history:?}"
        );
        if expected == 0 { right += 1 } else { wrong += 1 }
    }
    assert!(right > 400 && wrong > 400, "{right} {wrong}");
}

mod device;
