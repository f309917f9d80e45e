//! A script, made ready for workers on a real device.

use ublkit_harness::script::{Act, Script};
use ublkit_harness::{Op, OpKind, SECTOR, SectorRange};

use super::device::Opened;
use super::turns::Turns;

/// How many operations a worker keeps in flight at most, whatever the script says.
const DEPTH_MAX: u32 = 1024;
/// What lies so near to what a script touches is looked at too: a write that goes astray mostly does not go far.
const AROUND_BYTES: u64 = 128 << 10;

/// What a worker does when it is its turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Begins an operation.
    Op(Op),
    /// Writes all that the script may look at, while nobody else does anything.
    Fill,
    /// Reads and checks all that, while nobody else does anything.
    Sweep,
}

/// A worker's steps, with their numbers in the whole.
pub(crate) type Part = Vec<(usize, Step)>;

/// A part of a script between two openings of the device, made ready.
#[derive(Debug)]
pub(crate) struct Scripted {
    turns: Turns,
    parts: Vec<Part>,
    /// What is no worker's.
    cues: Vec<(usize, Act)>,
    areas: Vec<SectorRange>,
    depth: u16,
    longest_bytes: usize,
}

impl Scripted {
    /// The actions of `script` that are left of `actions`, up to the next opening, which is taken too. With `fill`, all that
    /// is looked at is written first. What the device does not offer is left out.
    pub(crate) fn next<'a>(
        script: &Script,
        actions: &mut impl Iterator<Item = &'a ublkit_harness::script::Action>,
        counts: &mut [u64],
        opened: &Opened,
        fill: bool,
    ) -> Self {
        let workers = script.setup.workers;
        let mut parts: Vec<Part> = vec![Part::new(); workers as usize];
        let mut cues = Vec::new();
        let mut owners = Vec::new();
        if fill {
            parts[0].push((0, Step::Fill));
            owners.push(Some(0));
        }
        for action in actions.take_while(|action| action.act != Act::Reopen) {
            let number = owners.len();
            match action.act {
                Act::Op { kind, range } => {
                    let worker = action.worker as usize;
                    let op = Op { index: counts[worker], kind, range };
                    counts[worker] += 1;
                    if !offers(opened, script.setup.read_only, kind) {
                        continue;
                    }
                    parts[worker].push((number, Step::Op(op)));
                    owners.push(Some(action.worker));
                }
                Act::Sweep => {
                    parts[0].push((number, Step::Sweep));
                    owners.push(Some(0));
                }
                act => {
                    cues.push((number, act));
                    owners.push(None);
                }
            }
        }
        let lengths = script.actions.iter().map(|action| match action.act {
            Act::Op { range, .. } => range.len_bytes(),
            _ => 0,
        });
        // Sweeps have requests of their own length.
        let longest = lengths.max().unwrap_or(0).max(opened.max_io_bytes);
        Self {
            turns: Turns::new(workers, owners),
            parts,
            cues,
            areas: areas(script),
            depth: script.setup.io_depth.min(DEPTH_MAX) as u16,
            longest_bytes: longest as usize,
        }
    }

    pub(crate) const fn turns(&self) -> &Turns {
        &self.turns
    }

    pub(crate) const fn workers(&self) -> u32 {
        self.parts.len() as u32
    }

    /// What a worker does.
    pub(crate) fn part(&self, worker: u32) -> Part {
        self.parts[worker as usize].clone()
    }

    /// What is no worker's, with its number in the whole.
    pub(crate) fn cues(&self) -> &[(usize, Act)] {
        &self.cues
    }

    /// What sweeps read.
    pub(crate) fn areas(&self) -> &[SectorRange] {
        &self.areas
    }

    pub(crate) const fn depth(&self) -> u16 {
        self.depth
    }

    pub(crate) const fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }
}

fn offers(opened: &Opened, read_only: bool, kind: OpKind) -> bool {
    match kind {
        OpKind::Read | OpKind::Flush => true,
        _ if read_only => false,
        OpKind::Write | OpKind::WriteFua => true,
        OpKind::Discard => opened.capabilities.discard,
        OpKind::WriteZeroes => opened.capabilities.write_zeroes,
    }
}

/// What a script touches, and what lies around it, in order and apart from each other.
fn areas(script: &Script) -> Vec<SectorRange> {
    let device = script.setup.device();
    let around = AROUND_BYTES / SECTOR as u64;
    let mut touched: Vec<SectorRange> = script
        .actions
        .iter()
        .filter_map(|action| match action.act {
            Act::Op { range, .. } if !range.is_empty() => Some(range),
            _ => None,
        })
        .map(|range| {
            let first = range.first.saturating_sub(around);
            SectorRange::new(first, (range.end() + around).min(device.end()) - first)
        })
        .collect();
    touched.sort_unstable_by_key(|range| range.first);
    let mut areas: Vec<SectorRange> = Vec::new();
    for range in touched {
        match areas.last_mut() {
            Some(last) if range.first <= last.end() => last.sectors = last.end().max(range.end()) - last.first,
            _ => areas.push(range),
        }
    }
    if areas.is_empty() {
        areas.push(SectorRange::new(device.first, device.sectors.min(around)));
    }
    areas
}

#[cfg(test)]
mod tests {
    use ublkit_harness::fault::FaultPlan;
    use ublkit_harness::plan::Capabilities;
    use ublkit_harness::script::{Action, VERSION};
    use ublkit_harness::{DiscardPromise, Seed};

    use super::*;
    use crate::torture::stage::tests::setup;

    fn op(worker: u32, kind: OpKind, first: u64, sectors: u64) -> Action {
        Action { worker, act: Act::Op { kind, range: SectorRange::new(first, sectors) } }
    }

    fn nobodys(act: Act) -> Action {
        Action { worker: 0, act }
    }

    fn script(actions: Vec<Action>) -> Script {
        let (setup, faults) = (setup(), FaultPlan::NONE);
        Script { version: VERSION, seed: Seed::new(1), setup, mutant: None, faults, actions }
    }

    fn opened(discard: bool) -> Opened {
        Opened {
            file: tempfile::tempfile().expect("a file"),
            bytes: 64 << 20,
            logical_block: 512,
            max_io_bytes: 64 << 10,
            capabilities: Capabilities { discard, ..Capabilities::ALL },
            discard: DiscardPromise::Zeroes,
            unmap_zeroes: true,
            torn_by_races: false,
            zeroed: true,
            ours: true,
            device_id: 0,
        }
    }

    #[test]
    fn everybody_gets_a_part_and_the_order_is_kept_until_the_device_is_opened_anew() {
        let script = script(vec![
            op(1, OpKind::Write, 8, 8),
            nobodys(Act::PowerCut),
            op(0, OpKind::Discard, 0, 8),
            op(1, OpKind::Read, 8, 300),
            nobodys(Act::Reopen),
            op(1, OpKind::Flush, 0, 0),
            nobodys(Act::Sweep),
        ]);
        let mut actions = script.actions.iter();
        let mut counts = [0; 2];
        let at = |index, kind, first, sectors| Step::Op(Op { index, kind, range: SectorRange::new(first, sectors) });
        let first = Scripted::next(&script, &mut actions, &mut counts, &opened(true), true);
        assert_eq!(first.part(0), [(0, Step::Fill), (3, at(0, OpKind::Discard, 0, 8))]);
        assert_eq!(first.part(1), [(1, at(0, OpKind::Write, 8, 8)), (4, at(1, OpKind::Read, 8, 300))]);
        assert_eq!(first.cues(), [(2, Act::PowerCut)]);
        assert_eq!((first.workers(), first.depth(), first.longest_bytes()), (2, 4, 300 * SECTOR));
        let second = Scripted::next(&script, &mut actions, &mut counts, &opened(true), false);
        assert_eq!(second.part(0), [(1, Step::Sweep)]);
        assert_eq!(second.part(1), [(0, at(2, OpKind::Flush, 0, 0))]);
        assert!(second.cues().is_empty() && actions.next().is_none());
    }

    #[test]
    fn what_the_device_does_not_offer_is_left_out() {
        let actions = vec![op(0, OpKind::Write, 8, 8), op(0, OpKind::Discard, 0, 8), op(0, OpKind::Read, 8, 8)];
        let script = script(actions);
        let kinds = |script: &Script, discard| {
            let scripted = Scripted::next(script, &mut script.actions.iter(), &mut [0; 2], &opened(discard), false);
            let part = scripted.part(0);
            assert!(part.iter().map(|(number, _)| *number).eq(0..part.len()), "no turn is nobody's: {part:?}");
            part.iter().map(|(_, step)| matches!(step, Step::Op(op) if op.kind == OpKind::Read)).collect::<Vec<_>>()
        };
        assert_eq!(kinds(&script, true), [false, false, true]);
        assert_eq!(kinds(&script, false), [false, true]);
        let mut read_only = script;
        read_only.setup.read_only = true;
        assert_eq!(kinds(&read_only, true), [true]);
    }

    #[test]
    fn what_is_looked_at_lies_around_what_is_touched() {
        let around = AROUND_BYTES / SECTOR as u64;
        let end = (64 << 20) / SECTOR as u64;
        let ranges = |actions| areas(&script(actions));
        let near = vec![op(0, OpKind::Write, 2000, 8), op(1, OpKind::Read, 2300, 1), op(0, OpKind::Flush, 0, 0)];
        assert_eq!(ranges(near), [SectorRange::new(2000 - around, 301 + 2 * around)]);
        let edges = vec![op(0, OpKind::Write, end - 1, 1), op(0, OpKind::Read, 3, 1)];
        assert_eq!(ranges(edges), [SectorRange::new(0, 4 + around), SectorRange::new(end - 1 - around, 1 + around)]);
        assert_eq!(ranges(Vec::new()), [SectorRange::new(0, around)]);
    }
}
