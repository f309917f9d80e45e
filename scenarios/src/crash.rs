//! `crash`: power cuts on a real device, and what is left by them.
//!
//! The storage is a disk with a volatile cache. A power cut leaves of what was not flushed some changes, parts of some, or
//! nothing, as is drawn; everything else has to be there. The raw part asks sector by sector. The others ask a file
//! system, which is made of nothing but such promises: its journal is replayed, what `fsync` promised has to be there,
//! and its own checker may find nothing.

mod cut;
mod files;
mod raw;
mod simulated;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::{Value, json};
use ublkit_harness::Seed;

use crate::cli::CommonArgs;
use crate::context::Context;
use crate::scenario::{Failure, Needs, Scenario};
use crate::target::{BackendKind, TargetArgs};
use crate::units::format_bytes;

pub(crate) use self::simulated::CRASH;

/// The largest raw device: after each cut all of it is read.
const SIZE_MAX: u64 = 1 << 30;
/// The smallest: less than that is no device to work on.
const SIZE_MIN: u64 = 256 << 10;

/// What is asked after a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The device itself, sector by sector.
    Raw,
    /// An ext4 as it is by default.
    Ext4,
    /// An ext4 that writes data to its journal first.
    Ext4Journal,
    /// An XFS.
    Xfs,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Ext4 => files::EXT4.name,
            Self::Ext4Journal => files::EXT4_JOURNAL.name,
            Self::Xfs => files::XFS.name,
        }
    }
}

/// The arguments of `crash`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// What is asked after the cuts
    #[arg(
        long,
        value_enum,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "raw,ext4,ext4-journal,xfs",
        overrides_with = "on"
    )]
    on: Vec<Part>,
    /// How often the power is cut in each part; of the raw device four times as often
    #[arg(
        long,
        value_name = "N",
        default_value_t = 6,
        value_parser = clap::value_parser!(u64).range(1..=10_000),
        overrides_with = "cuts"
    )]
    cuts: u64,
    /// How many of the states that a cut could leave are looked at
    #[arg(
        long,
        value_name = "N",
        default_value_t = 3,
        value_parser = clap::value_parser!(u64).range(1..=1000),
        overrides_with = "images"
    )]
    images: u64,
}

/// How often, in one round, and from which seed.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: Seed,
    cuts: u64,
    images: u64,
}

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        let mut options = self.target.options();
        let on: Vec<_> = self.on.iter().map(|part| part.name()).collect();
        options.insert("on".to_owned(), json!(on));
        options.insert("cuts".to_owned(), json!(self.cuts));
        options.insert("images".to_owned(), json!(self.images));
        options
    }

    fn needs(&self) -> Needs {
        let ext4 = self.on.contains(&Part::Ext4) || self.on.contains(&Part::Ext4Journal);
        let tools: &[&str] = match (ext4, self.on.contains(&Part::Xfs)) {
            (true, true) => &["mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair"],
            (true, false) => &["mkfs.ext4", "e2fsck"],
            (false, true) => &["mkfs.xfs", "xfs_repair"],
            (false, false) => &[],
        };
        Needs { ublk: true, tools }
    }

    fn validate(&self) -> Result<(), Failure> {
        self.common.refuse_ops("crash", "--cuts and --duration say how much is done")?;
        if self.target.read_only {
            return Err(Failure::Usage(
                "--read-only: what nobody writes no power cut loses; leave it out".to_owned(),
            ));
        }
        if self.target.backend != BackendKind::Medium {
            return Err(Failure::Usage(
                "only --backend medium can lose what was not flushed; leave --backend out".to_owned(),
            ));
        }
        if !self.target.geometry().volatile_cache {
            return Err(Failure::Usage(
                "a disk without a volatile cache has nothing to lose: add flush to --capabilities; for a device that \
                 hides its cache there is --mutant no-volatile-cache"
                    .to_owned(),
            ));
        }
        if !(SIZE_MIN..=SIZE_MAX).contains(&self.target.size) {
            return Err(Failure::Usage(format!(
                "--size {}: the raw device is read as a whole after each cut; choose a size from {} to {}",
                self.target.size,
                format_bytes(SIZE_MIN),
                format_bytes(SIZE_MAX)
            )));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        self.require(context);
        let until = context.duration().map(|duration| Instant::now() + duration);
        for round in 0.. {
            for part in &self.on {
                self.one(context, *part, context.seed().derive("round", round))?;
            }
            // Each round is a whole: one at least, and none that begins when the time is up.
            if until.is_none_or(|until| Instant::now() >= until) {
                break;
            }
        }
        Ok(())
    }
}

impl Args {
    /// The least work that proves something: in each part, states that had truly lost something.
    fn require(&self, context: &Context) {
        let evidence = context.evidence();
        for part in &self.on {
            let name = part.name();
            evidence.require(&format!("cuts_{name}"), self.cuts * self.images);
            evidence.require(&format!("lost_sectors_{name}"), 1);
            evidence.require(&format!("bytes_judged_{name}"), 4096);
        }
        if self.on.iter().any(|part| *part != Part::Raw) {
            for (name, least) in
                [("files_promised", 1), ("bytes_promised", 4096), ("fscks", 1), ("journals_replayed", 1)]
            {
                evidence.require(name, least);
            }
        }
        evidence.require("mutant_hits", u64::from(self.target.mutant.is_some()));
    }

    fn one(&self, context: &mut Context, part: Part, seed: Seed) -> Result<(), Failure> {
        let plan = Plan { seed, cuts: self.cuts, images: self.images };
        match part {
            Part::Raw => raw::check(context, &self.target, &Plan { cuts: plan.cuts * 4, ..plan }),
            Part::Ext4 => files::check(context, &self.target, &files::EXT4, &plan),
            Part::Ext4Journal => files::check(context, &self.target, &files::EXT4_JOURNAL, &plan),
            Part::Xfs => files::check(context, &self.target, &files::XFS, &plan),
        }
    }
}

/// What a whole part may take beside its cuts.
const PART_DEADLINE: Duration = Duration::from_secs(120);
