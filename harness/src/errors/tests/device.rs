//! A block layer and a device that fails, to see that nothing right is found and everything wrong is.

use super::*;

/// What is wrong with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    Nothing,
    Swallows,
    WrongErrno,
    WrongSign,
    Invents,
    Sticks,
}

#[derive(Clone, Debug)]
struct Flying {
    id: OpId,
    kind: OpKind,
    range: SectorRange,
    began: Stamp,
    /// Requests that are still to be made.
    parts: Vec<SectorRange>,
    error: Option<Errno>,
}

/// Runs operations on a device that splits, merges, and fails one call in five. Whether anything was found, and whether the
/// bug had an occasion to show.
fn run(number: u64, bug: Bug) -> (Result<ErrorCounts, Finding>, bool) {
    let mut rng = Seed::new(number).rng();
    let mut ledger = ErrorLedger::new(STRICT);
    let mut flying: Vec<Flying> = Vec::new();
    let (mut now, mut next, mut showed, mut off) = (0, 0, false, None);
    // Where operations overlap, an error that is swallowed can be taken for that of another; there, nothing is planted.
    let overlap = bug == Bug::Nothing;
    while next < 300 || !flying.is_empty() {
        now += 1;
        if bug == Bug::Sticks && next == 200 && off.is_none() {
            off = Some(now);
            ledger.faults_off(now);
        }
        if next < 300 && flying.len() < 8 && rng.chance(1, 2) {
            let kind = [OpKind::Read, OpKind::Write, OpKind::WriteFua, OpKind::Flush][rng.below(4) as usize];
            let first = if overlap { rng.below(64) } else { (next % 16) * 24 };
            let op = range(first, rng.within(1..=24));
            let parts = if kind == OpKind::Flush { vec![op] } else { op.chunks(8).collect() };
            if overlap || flying.iter().all(|other| !other.range.overlaps(op)) {
                flying.push(Flying { id: id(next), kind, range: op, began: now, parts, error: None });
                next += 1;
            }
            continue;
        }
        let Some(at) = (!flying.is_empty()).then(|| rng.below(flying.len() as u64) as usize) else { continue };
        if let Some(part) = flying[at].parts.pop() {
            let kind = flying[at].kind;
            let mut call = part;
            let mut behind = vec![at];
            // A request merges with one that goes on where it ends, and a flush serves all that wait for one.
            for (other, op) in flying.iter_mut().enumerate() {
                let same = other != at && op.kind == kind && rng.chance(1, 2);
                if same && kind == OpKind::Flush && !op.parts.is_empty() {
                    op.parts.clear();
                    behind.push(other);
                } else if same && op.parts.last().is_some_and(|part| part.first == call.end()) {
                    call.sectors += op.parts.pop().map_or(0, |part| part.sectors);
                    behind.push(other);
                }
            }
            if off.is_none() && rng.chance(1, 5) {
                let errno = *rng.pick(&[Errno::EIO, Errno::ENOSPC, errno("EROFS")]).expect("some");
                ledger.injected(&injection(kind, call, errno), now, now + 1);
                now += 1;
                for op in behind {
                    flying[op].error = flying[op].error.or(Some(errno.seen()));
                }
            }
        } else {
            let op = flying.swap_remove(at);
            let mut seen = op.error.map_or(Seen::Done, |errno| Seen::Failed(errno.number()));
            let plain = op.kind != OpKind::Flush && rng.chance(1, 4);
            match (bug, op.error) {
                (Bug::Swallows, Some(_)) if plain => seen = Seen::Done,
                (Bug::WrongErrno, Some(_)) if plain => seen = Seen::Failed(110),
                (Bug::WrongSign, Some(errno)) => seen = Seen::Failed(-errno.number()),
                (Bug::Invents, None) if plain => seen = EIO,
                (Bug::Sticks, None) if off.is_some_and(|off| op.began > off) && plain => seen = EIO,
                _ => {}
            }
            showed |= seen != op.error.map_or(Seen::Done, |errno| Seen::Failed(errno.number()));
            ledger.observed(op.id, op.kind, op.range, seen, op.began, now);
        }
        let oldest = flying.iter().map(|op| op.began).min().unwrap_or(now);
        if let Err(finding) = ledger.horizon(oldest) {
            return (Err(finding), showed);
        }
        // Everything in flight, and the calls and ends since the oldest of them began.
        assert!(ledger.pending() < 200);
    }
    (ledger.judge(), showed)
}

#[test]
fn a_right_device_is_never_found() {
    let mut errors = 0;
    for seed in 0..300 {
        let (verdict, _) = run(seed, Bug::Nothing);
        let counts = verdict.unwrap_or_else(|finding| panic!("seed {seed}: {finding:#?}"));
        errors += counts.seen.values().sum::<u64>();
    }
    assert!(errors > 1000);
}

#[test]
fn every_bug_is_found() {
    for (bug, says) in [
        (Bug::Swallows, "not seen"),
        (Bug::WrongErrno, "was injected"),
        (Bug::WrongSign, "was injected"),
        (Bug::Invents, "failed with EIO"),
        (Bug::Sticks, "although faults were off"),
    ] {
        let mut shown = 0;
        for seed in 0..100 {
            let (verdict, showed) = run(seed, bug);
            assert_eq!(verdict.is_err(), showed, "{bug:?} {seed}: {verdict:?}");
            shown += u64::from(showed);
            if let Err(finding) = verdict {
                assert!(finding.what.contains(says), "{bug:?}: {finding:?}");
            }
        }
        assert!(shown > 90, "{bug:?} {shown}");
    }
}
