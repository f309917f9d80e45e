//! The grid: which faults there are to try, and the part of it that a run does.

use std::fmt;

use nix::errno::Errno as Number;
use ublkit_harness::fault::{Effect, Errno, FaultPlan, Ops, Rule, Stage, Trigger};
use ublkit_harness::{Mix, OpKind, SectorRange, SeededRng};

/// The operations that faults happen to. A write is so with and without FUA.
pub(super) const OPS: [OpKind; 5] =
    [OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Discard, OpKind::WriteZeroes];

/// Some that the kernel makes an `EIO` of, beside those that it keeps: a permission, an interruption, a missing device, a
/// read-only one, a quota, a lost connection.
const TURNED: [Number; 6] =
    [Number::EPERM, Number::EINTR, Number::ENXIO, Number::EROFS, Number::EDQUOT, Number::ECONNRESET];

/// How often a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Often {
    /// To one call in a thousand.
    Rarely,
    /// To one call in ten.
    Tenth,
    /// To every call.
    Always,
    /// To five calls in a row, of fifty.
    Bursts,
    /// To every call that touches one part of the region.
    Place,
    /// After the third call, to every second, eight times; then never again.
    Schedule,
}

impl Often {
    pub(super) const ALL: [Self; 6] =
        [Self::Rarely, Self::Tenth, Self::Always, Self::Bursts, Self::Place, Self::Schedule];

    /// How many operations a worker does of a cell, until it happens.
    pub(super) const fn ops(self) -> u64 {
        match self {
            Self::Rarely => 500,
            _ => 30,
        }
    }
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum What {
    /// The call fails.
    Error(Errno, Stage),
    /// The backend panics.
    Panic,
    /// The request is late.
    Delay,
}

/// One fault to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Cell {
    pub(crate) op: OpKind,
    pub(crate) what: What,
    pub(crate) often: Often,
}

/// `write: ENOSPC after, tenth`.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.op)?;
        match self.what {
            What::Error(errno, stage) => write!(f, "{errno} {stage}")?,
            What::Panic => f.write_str("panic")?,
            What::Delay => f.write_str("delay")?,
        }
        f.write_str(match self.often {
            Often::Rarely => ", 1 in 1000",
            Often::Tenth => ", 1 in 10",
            Often::Always => ", always",
            Often::Bursts => ", in bursts",
            Often::Place => ", at one place",
            Often::Schedule => ", by schedule",
        })
    }
}

/// Every errno of the grid.
pub(super) fn errnos() -> Vec<Errno> {
    Errno::kept().chain(TURNED.into_iter().filter_map(|number| Errno::new(number as i32))).collect()
}

/// Every cell there is.
pub(super) fn whole() -> Vec<Cell> {
    let mut cells = Vec::new();
    for op in OPS {
        let mut whats = Vec::new();
        for errno in errnos() {
            whats.extend(STAGES.map(|stage| What::Error(errno, stage)));
        }
        whats.extend([What::Panic, What::Delay]);
        for what in whats {
            cells.extend(Often::ALL.map(|often| Cell { op, what, often }).into_iter().filter(Cell::can_be));
        }
    }
    cells
}

const STAGES: [Stage; 3] = [Stage::Before, Stage::Partway, Stage::After];

/// Some cells of one operation, for servers that are special in how they answer it.
pub(super) fn in_pieces(op: OpKind) -> Vec<Cell> {
    let error = |stage| What::Error(Errno::ENOSPC, stage);
    let whats =
        [(error(Stage::Before), Often::Tenth), (error(Stage::After), Often::Bursts), (What::Delay, Often::Tenth)];
    whats.map(|(what, often)| Cell { op, what, often }).to_vec()
}

/// Cells, drawn from the seed, in which every errno meets every operation, every operation every stage and every rate, and
/// every stage every rate, at least once.
pub(super) fn sample(rng: &mut SeededRng) -> Vec<Cell> {
    let mut cells = Vec::new();
    let pairs: Vec<(Stage, Often)> =
        STAGES.into_iter().flat_map(|stage| Often::ALL.map(|often| (stage, often))).collect();
    for op in OPS {
        let mut order = pairs.clone();
        rng.shuffle(&mut order);
        let mut turns = order.into_iter().cycle();
        for errno in errnos() {
            // There are fewer pairs than errnos, so that each pair has its turn.
            let cell = turns.by_ref().take(2 * pairs.len()).map(|(stage, often)| Cell {
                op,
                what: What::Error(errno, stage),
                often,
            });
            // What is rare takes long, and is the same for every errno.
            let mut rare = cells.iter().filter(|cell: &&Cell| cell.op == op && cell.often == Often::Rarely).count();
            let fits = cell.into_iter().find(|cell| {
                let again = cell.often == Often::Rarely && rare > 0;
                rare += usize::from(again);
                cell.can_be() && !again
            });
            cells.extend(fits);
        }
        for what in [What::Panic, What::Delay] {
            cells.push(Cell { op, what, often: Often::Tenth });
        }
    }
    rng.shuffle(&mut cells);
    cells
}

impl Cell {
    /// Whether there is such a fault. A flush has no place, and is done or not; what is submitted again until it does not fail
    /// may not fail always, nor always where it is; and a discard or flush that the device cannot do has succeeded to the
    /// application, though nothing was discarded or flushed.
    pub(super) fn can_be(&self) -> bool {
        let flush = self.op == OpKind::Flush;
        let partway = matches!(self.what, What::Error(_, Stage::Partway));
        let for_ever = self.is_submitted_again() && matches!(self.often, Often::Always | Often::Place);
        let untold = match (self.op, self.what) {
            (OpKind::Discard, What::Error(Errno::EOPNOTSUPP, stage)) => stage != Stage::After,
            (OpKind::Flush, What::Error(Errno::EOPNOTSUPP, _)) => true,
            _ => false,
        };
        !(flush && (partway || self.often == Often::Place) || for_ever || untold)
    }

    /// Whether io_uring may submit it again, by itself, when it fails so: it does with `EAGAIN`, and since some version
    /// between 6.12 and 7.2 with `EOPNOTSUPP`. Both are tried through plain system calls as well.
    fn is_submitted_again(&self) -> bool {
        let again = matches!(self.what, What::Error(errno, _) if [Errno::EAGAIN, Errno::EOPNOTSUPP].contains(&errno));
        again && matches!(self.op, OpKind::Read | OpKind::Write | OpKind::WriteFua)
    }

    /// The plan for it, where operations overlap in the region `shared` and not in `own`.
    pub(super) fn plan(&self, shared: SectorRange, own: SectorRange) -> FaultPlan {
        // A write that is done twice may come back over another one that was done meanwhile.
        let (region, within) = if self.is_submitted_again() { (own, Some(own)) } else { (shared, None) };
        let ops = if self.op == OpKind::Write { Ops::WRITES } else { Ops::only(self.op) };
        let effect = match self.what {
            What::Error(errno, stage) => Effect::Error { errno, stage },
            What::Panic => Effect::Panic,
            What::Delay => Effect::Delay(3),
        };
        let rule = Rule { range: within, ..Rule::new(ops, effect) };
        let rule = match self.often {
            Often::Rarely => Rule { trigger: Trigger::Rate { hits: 1, out_of: 1000 }, ..rule },
            Often::Tenth => Rule { trigger: Trigger::Rate { hits: 1, out_of: 10 }, ..rule },
            Often::Always => rule,
            Often::Bursts => Rule { trigger: Trigger::Burst { hits: 5, out_of: 50 }, ..rule },
            Often::Place => {
                let part = (region.sectors / 8).max(1);
                Rule { range: Some(SectorRange::new(region.first + part, part)), ..rule }
            }
            Often::Schedule => {
                let calls = Some((3, u64::MAX));
                Rule { trigger: Trigger::Every(2), calls, times: Some(8), ..rule }
            }
        };
        FaultPlan { rules: vec![rule] }
    }

    /// What the workers do: much of what the fault is for, and something of everything else.
    pub(super) fn mix(&self) -> Mix {
        let mut mix = Mix { read: 20, write: 20, fua: 2, flush: 2, discard: 2, zeroes: 2 };
        match self.op {
            OpKind::Read => mix.read = 60,
            OpKind::Write | OpKind::WriteFua => (mix.write, mix.fua) = (60, 6),
            OpKind::Flush => mix.flush = 40,
            OpKind::Discard => mix.discard = 40,
            OpKind::WriteZeroes => mix.zeroes = 40,
        }
        mix
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use ublkit_harness::Seed;

    fn names<T: fmt::Debug>(of: impl Iterator<Item = T>) -> BTreeSet<String> {
        of.map(|one| format!("{one:?}")).collect()
    }

    #[test]
    fn a_sample_has_every_pair() {
        for seed in 0..50 {
            let cells = sample(&mut Seed::new(seed).rng());
            assert!(cells.iter().all(Cell::can_be) && cells.len() < 150, "{}", cells.len());
            let errors: Vec<_> = cells
                .iter()
                .filter_map(|cell| match cell.what {
                    What::Error(errno, stage) => Some((cell.op, errno, stage, cell.often)),
                    _ => None,
                })
                .collect();
            assert_eq!(
                names(errors.iter().map(|(op, errno, _, _)| (op, errno))).len(),
                OPS.len() * errnos().len() - 1
            );
            // A flush is not done in part, and has no place.
            assert_eq!(names(errors.iter().map(|(op, _, stage, _)| (op, stage))).len(), OPS.len() * 3 - 1);
            assert_eq!(names(errors.iter().map(|(op, _, _, often)| (op, often))).len(), OPS.len() * 6 - 1);
        }
    }

    /// An operation that the kernel tries again for as long as it fails would never end.
    #[test]
    fn what_is_submitted_again_is_done_some_time() {
        let again = whole().into_iter().filter(Cell::is_submitted_again);
        let mut count = 0;
        for cell in again {
            let plan = cell.plan(SectorRange::new(0, 2048), SectorRange::new(4096, 2048));
            assert!(plan.rules.iter().all(|rule| rule.trigger != Trigger::Always), "{cell}");
            count += 1;
        }
        assert!(count > 20, "{count}");
    }

    #[test]
    fn every_plan_is_right() {
        let cells = whole();
        assert_eq!(cells.len(), 1898);
        for cell in cells {
            let plan = cell.plan(SectorRange::new(0, 2048), SectorRange::new(4096, 2048));
            plan.validate().unwrap_or_else(|error| panic!("{cell}: {error}"));
            assert_eq!(plan.to_string().parse(), Ok(plan), "{cell}");
        }
    }
}
