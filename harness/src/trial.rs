//! One run on the simulator: from a seed to a verdict, and from a failure to a script that fails again.

use std::sync::Arc;

use ublkit::Backend;

use crate::fault::FaultPlan;
use crate::mutant::Planted;
use crate::oracle::Oracles;
use crate::plan::PlanError;
use crate::script::{Action, Actions, Script, Setup, VERSION, Workload};
use crate::seed::Seed;
use crate::sim::{self, Ran, RunOptions};

/// What a run on the simulator is drawn from.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// Everything is drawn from this.
    pub seed: Seed,
    /// The bug that is planted.
    pub planted: Option<Planted>,
    /// What is done.
    pub workload: Workload,
    /// Who judges.
    pub oracles: Oracles,
}
