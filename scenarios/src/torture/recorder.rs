//! What the workers did, in the order in which it was begun, so that a failure can be shown again.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ublkit_harness::script::{Act, Action};
use ublkit_harness::{Op, OpKind, SectorRange};

/// How many actions are kept: the last ones. What breaks breaks early, mostly, and on a device it takes seconds to do so
/// many again.
const MOST: usize = 10_000;

/// What the workers did.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    actions: VecDeque<Action>,
    /// How many actions there were, those that are not kept any more among them.
    all: u64,
    /// How many of them were operations.
    ops: u64,
}

/// What was recorded until a moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) actions: Vec<Action>,
    /// How many operations there were, those that are not kept any more among them.
    pub(crate) ops: u64,
    /// Whether the first actions are not kept any more.
    pub(crate) is_cut: bool,
}

impl Recorder {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker begins an operation.
    pub(crate) fn op(&self, worker: u32, op: Op) {
        let Op { kind, range, .. } = op;
        let mut kept = self.kept();
        kept.ops += 1;
        kept.push(Action { worker, act: Act::Op { kind, range } });
    }

    /// Something is done that is no worker's.
    pub(crate) fn act(&self, act: Act) {
        self.kept().push(Action { worker: 0, act });
    }

    /// What was done until now.
    pub(crate) fn recorded(&self) -> Recorded {
        let kept = self.kept();
        let is_cut = kept.all > kept.actions.len() as u64;
        Recorded { actions: kept.actions.iter().copied().collect(), ops: kept.ops, is_cut }
    }
}

impl Kept {
    fn push(&mut self, action: Action) {
        if self.actions.len() == MOST {
            self.actions.pop_front();
        }
        self.actions.push_back(action);
        self.all += 1;
    }
}

impl Recorded {
    /// The actions of a script that does it again: what was there before the first one that is kept is written anew, in
    /// `regions`, `longest` sectors at a time; and in the end everything is looked at.
    pub(crate) fn script(&self, regions: &[SectorRange], longest: u64) -> Vec<Action> {
        let write = |range| Action { worker: 0, act: Act::Op { kind: OpKind::Write, range } };
        let before = regions.iter().filter(|_| self.is_cut).flat_map(|region| region.chunks(longest)).map(write);
        let sweep = Action { worker: 0, act: Act::Sweep };
        let ends_so = self.actions.last() == Some(&sweep);
        before.chain(self.actions.iter().copied()).chain((!ends_so).then_some(sweep)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(index: u64) -> Op {
        Op { index, kind: OpKind::Read, range: SectorRange::new(index, 1) }
    }

    #[test]
    fn a_short_run_is_kept_whole() {
        let recorder = Recorder::default();
        recorder.op(1, read(0));
        recorder.act(Act::PowerCut);
        recorder.op(0, read(5));
        let run = recorder.recorded();
        assert_eq!((run.ops, run.is_cut), (2, false));
        let script = run.script(&[SectorRange::new(0, 64)], 8);
        let acts: Vec<_> = script.iter().map(|action| (action.worker, action.act)).collect();
        let op = |first| Act::Op { kind: OpKind::Read, range: SectorRange::new(first, 1) };
        assert_eq!(acts, [(1, op(0)), (0, Act::PowerCut), (0, op(5)), (0, Act::Sweep)]);
    }

    #[test]
    fn of_a_long_run_the_end_is_kept_and_what_it_began_with_is_written() {
        let recorder = Recorder::default();
        for index in 0..MOST as u64 + 7 {
            recorder.op(0, read(index));
        }
        recorder.act(Act::Sweep);
        let run = recorder.recorded();
        assert_eq!((run.ops, run.is_cut, run.actions.len()), (MOST as u64 + 7, true, MOST));
        let script = run.script(&[SectorRange::new(0, 20), SectorRange::new(100, 8)], 8);
        let first: Vec<_> = script.iter().take(5).map(ToString::to_string).collect();
        let writes = ["0+8", "8+8", "16+4", "100+8"].map(|range| format!("worker 0 writes sectors {range}"));
        assert_eq!(first[..4], writes);
        assert_eq!(first[4], "worker 0 reads sectors 8+1");
        assert_eq!(script.len(), 4 + MOST);
    }
}
