//! `probe`: step by step, do both sides of the stack agree?

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::cli::CommonArgs;
use crate::context::Context;
use crate::scenario::{Failure, Needs, Scenario};
use crate::target::TargetArgs;

/// The arguments of `probe`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        self.target.options()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: true, tools: &["mkfs.ext4", "e2fsck"] }
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let target = context.step("start", Duration::from_secs(30), |context| self.target.start(context))?;
        context.always("close", Duration::from_secs(60), |context| target.close(context))
    }
}
