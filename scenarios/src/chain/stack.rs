//! Devices, each but the lowest kept on the one below.

use super::Broken;
use crate::context::Context;
use crate::scenario::Failure;
use crate::target::{Target, TargetArgs};
use crate::torture::device::Subject;

/// Devices, each but the lowest kept on the one below.
pub(super) struct Chain {
    /// The lowest first, without the top.
    below: Vec<Target>,
    top: Subject,
}

impl Chain {
    /// Starts `links` devices. The lowest proxy is planted with `plant`.
    pub(super) fn start(
        context: &Context,
        args: &TargetArgs,
        links: usize,
        processes: bool,
        plant: Option<Broken>,
    ) -> Result<Self, Failure> {
        let mut targets = vec![args.start(context)?];
        let mut plant = plant;
        while targets.len() < links {
            let proxy = match plant.take() {
                Some(broken) => broken.planted(args.clone()),
                None => args.clone(),
            };
            let started = match targets.last() {
                Some(below) => proxy.start_over(context, below, processes),
                None => return Err(Failure::Internal("a chain has no bottom".to_owned())),
            };
            match started {
                Ok(target) => targets.push(target),
                Err(failure) => {
                    // From the top: below, nobody could let go.
                    targets.into_iter().rev().for_each(|target| {
                        let _the_first_failure_counts = target.close(context);
                    });
                    return Err(failure);
                }
            }
        }
        let top = targets.pop().ok_or_else(|| Failure::Internal("a chain has no top".to_owned()))?;
        Ok(Self { below: targets, top: Subject::Ours(top) })
    }

    /// How many devices there are.
    pub(super) fn len(&self) -> usize {
        self.below.len() + 1
    }

    /// The device at the top, to be loaded.
    pub(super) const fn subject(&self) -> &Subject {
        &self.top
    }

    /// The device at the top.
    pub(super) fn top(&self) -> Result<&Target, Failure> {
        self.top.ours()
    }

    /// The device that keeps the bytes.
    pub(super) fn bottom(&self) -> Result<&Target, Failure> {
        self.below.first().ok_or_else(|| Failure::Internal("a chain has no bottom".to_owned()))
    }

    /// Fails unless every thread that serves one of them is marked as part of the I/O path. Returns how many there are.
    pub(super) fn check_reclaim(&self) -> Result<usize, Failure> {
        let below: usize = self.below.iter().map(Target::check_reclaim).sum::<Result<usize, Failure>>()?;
        Ok(below + self.top()?.check_reclaim()?)
    }

    /// The devices: those below, the lowest first, and the top.
    pub(super) fn apart(self) -> (Vec<Target>, Subject) {
        (self.below, self.top)
    }

    /// Closes them from the top. The first failure counts; all are closed.
    pub(super) fn close(self, context: &mut Context) -> Result<(), Failure> {
        let mut closed = self.top.close(context);
        for target in self.below.into_iter().rev() {
            closed = closed.and(target.close(context));
        }
        closed
    }
}
