//! Fewer actions, and simpler ones.

use std::collections::BTreeSet;

use super::search::Search;
use crate::plan::OpKind;
use crate::script::{Act, Action, Script};

/// Pairs are dropped from scripts of at most so many actions.
const PAIRS_OF: usize = 10;

/// Actions are changed one by one in scripts of at most so many.
pub(super) const ONE_BY_ONE: usize = 64;

/// Whole workers, first all but one.
pub(super) fn drop_workers(search: &mut Search<'_>) {
    let workers: BTreeSet<u32> = search.best().actions.iter().filter(|action| is_op(action)).map(by).collect();
    if workers.len() > 1 {
        let alone = |search: &mut Search<'_>, worker| search.offer(|script| keep(script, |by| by == worker));
        if workers.iter().any(|worker| alone(search, *worker)) {
            return;
        }
        // From the last, so that those that were not looked at keep their numbers.
        for worker in workers.into_iter().rev() {
            search.offer(|script| keep(script, |by| by != worker));
        }
    }
}

/// Keeps the operations of some workers, and counts those from 0.
fn keep(script: &mut Script, whose: impl Fn(u32) -> bool) {
    script.actions.retain(|action| !is_op(action) || whose(action.worker));
    renumber(script);
}

fn renumber(script: &mut Script) {
    let left: BTreeSet<u32> = script.actions.iter().filter(|action| is_op(action)).map(by).collect();
    for action in &mut script.actions {
        action.worker = left.range(..action.worker).count() as u32;
        if !is_op(action) {
            action.worker = 0;
        }
    }
    script.setup.workers = left.len().max(1) as u32;
}

fn is_op(action: &Action) -> bool {
    matches!(action.act, Act::Op { .. })
}

fn by(action: &Action) -> u32 {
    action.worker
}

/// All that does the same, wherever.
pub(super) fn drop_kinds(search: &mut Search<'_>) {
    let others = [Act::PowerCut, Act::Kill, Act::Reopen, Act::FaultsOff, Act::FaultsOn, Act::Sweep];
    search.offer(|script| script.actions.retain(is_op));
    for dropped in others {
        search.offer(|script| script.actions.retain(|action| action.act != dropped));
    }
    for dropped in OpKind::ALL {
        let stays = |action: &Action| !matches!(action.act, Act::Op { kind, .. } if kind == dropped);
        search.offer(|script| script.actions.retain(stays));
    }
}

/// Cuts off the end, by halves. What was seen by something late in the tail may be seen by a sweep at the cut.
pub(super) fn cut_tail(search: &mut Search<'_>) {
    let whole = search.best().actions.clone();
    let (mut low, mut high) = (0, whole.len());
    while low < high && search.goes_on() {
        let middle = usize::midpoint(low, high);
        let head = &whole[..middle];
        let swept = [head, &[Action { worker: 0, act: Act::Sweep }]].concat();
        let shorter = swept.len() < search.best().actions.len();
        if search.offer(|script| script.actions = head.to_vec())
            || shorter && search.offer(|script| script.actions = swept)
        {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
}

/// Delta debugging: ever smaller chunks, from the end, down to single actions until none can be spared.
pub(super) fn drop_actions(search: &mut Search<'_>) {
    let mut size = search.best().actions.len();
    while size > 0 && search.goes_on() {
        let mut end = search.best().actions.len();
        let mut dropped = false;
        while end > 0 {
            let start = end.saturating_sub(size);
            dropped |= search.offer(|script| drop(script.actions.drain(start..end)));
            end = start;
        }
        if size == 1 && !dropped {
            break;
        }
        size = (size / 2).min(search.best().actions.len().div_ceil(2)).max(1);
    }
}

/// Two at once: faults that go off and on, or two writes the second of which hides that the first is gone.
pub(super) fn drop_pairs(search: &mut Search<'_>) {
    let mut first = 0;
    while first + 1 < search.best().actions.len() && search.best().actions.len() <= PAIRS_OF {
        let pairs = first + 1..search.best().actions.len();
        let dropped = pairs.rev().any(|second| {
            search.offer(|script| {
                script.actions.remove(second);
                script.actions.remove(first);
            })
        });
        first = if dropped { 0 } else { first + 1 };
    }
}

/// What is simpler than `act` and may do as well, the simplest first.
fn simpler(act: Act) -> Vec<Act> {
    let op = |kind| match act {
        Act::Op { range, .. } => Act::Op { kind, range },
        other => other,
    };
    match act {
        Act::Op { kind: OpKind::WriteFua | OpKind::WriteZeroes, .. } => vec![op(OpKind::Write)],
        Act::Op { kind: OpKind::Discard, .. } => vec![op(OpKind::Write), op(OpKind::WriteZeroes)],
        Act::PowerCut | Act::Kill => vec![Act::Reopen],
        _ => Vec::new(),
    }
}

/// Plain writes instead of anything else that changes sectors; ends in order instead of violent ones.
pub(super) fn simplify_kinds(search: &mut Search<'_>) {
    search.offer(|script| {
        for action in script.actions.iter_mut().filter(|action| is_op(action)) {
            action.act = simpler(action.act).first().copied().unwrap_or(action.act);
        }
    });
    if search.best().actions.len() > ONE_BY_ONE {
        return;
    }
    for at in 0..search.best().actions.len() {
        for act in simpler(search.best().actions[at].act) {
            if search.offer(|script| script.actions[at].act = act) {
                break;
            }
        }
    }
}

/// Every action by one worker.
pub(super) fn one_worker(script: &mut Script) {
    for action in &mut script.actions {
        action.worker = 0;
    }
    script.setup.workers = 1;
}

/// No more workers than do anything, and then what one does by another.
pub(super) fn merge_workers(search: &mut Search<'_>) {
    search.offer(renumber);
    for from in (1..search.best().setup.workers).rev() {
        (0..from).any(|to| {
            search.offer(|script| {
                for action in script.actions.iter_mut().filter(|action| action.worker == from) {
                    action.worker = to;
                }
                renumber(script);
            })
        });
    }
}
