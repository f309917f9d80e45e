//! `probe`: step by step, do both sides of the stack agree?
//!
//! The one side is the block device that applications use, the other the bytes in the server's storage. The
//! device part compares them without anything between, the file-system part with ext4 and
//! the page cache, over unmounts and power cuts. At the end nothing may be left.

mod device;
mod external;
pub(crate) mod filesystem;
pub(crate) mod power;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ublkit::ctrl::{block_path, character_path};

use crate::cli::{CommonArgs, name_of};
use crate::context::Context;
use crate::external::ExternalArgs;
use crate::inventory::Inventory;
use crate::scenario::{Failure, Needs, Plant, Scenario};
use crate::server::Lie;
use crate::sysfs::CharDir;
use crate::target::{Target, TargetArgs};
use crate::units::format_bytes;

/// The smallest device that the file system and the files on it have room on.
const SIZE_MIN: u64 = 64 << 20;
/// The largest whose file system can be made at once and copied at each power cut. Offsets far beyond are tried on a
/// device of their own.
const SIZE_MAX: u64 = 64 << 30;

/// The arguments of `probe`, and so the scenario.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    external: ExternalArgs,
    /// Plant a bug in the server that no other scenario looks for
    #[arg(
        long,
        value_enum,
        value_name = "NAME",
        conflicts_with_all = ["device", "server"],
        help_heading = "Device"
    )]
    plant: Option<Lie>,
}

/// What no other scenario looks for: what the device says of itself, and what lies far out.
pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "size-lie",
        about: "the device is one block smaller than its storage",
        arguments: &["--plant", "size-lie"],
    },
    Plant {
        name: "block-lie",
        about: "the device claims larger physical blocks than were asked for",
        arguments: &["--plant", "block-lie"],
    },
    Plant {
        name: "offset-31",
        about: "byte offsets are kept in a signed number of 32 bits",
        arguments: &["--plant", "offset-31"],
    },
    Plant {
        name: "ro-not-enforced",
        about: "a device that is to be read-only takes writes",
        arguments: &["--mutant", "ro-not-enforced"],
    },
    Plant {
        name: "no-volatile-cache",
        about: "the device does not say that it has a volatile cache, and is never flushed",
        arguments: &["--mutant", "no-volatile-cache"],
    },
];

impl Scenario for Args {
    fn common(&self) -> &CommonArgs {
        &self.common
    }

    fn options(&self) -> BTreeMap<String, Value> {
        if self.external.is_asked_for() {
            return self.external.options().into_iter().collect();
        }
        let plant = ("plant".to_owned(), json!(self.plant.as_ref().map(name_of)));
        self.target.options().into_iter().chain([plant]).collect()
    }

    fn needs(&self) -> Needs {
        Needs { ublk: !self.external.is_asked_for(), tools: &["mkfs.ext4", "e2fsck"] }
    }

    fn meets_kernel_device(&self) -> bool {
        // Somebody else's device too.
        true
    }

    fn validate(&self) -> Result<(), Failure> {
        self.external.validate()?;
        if !(SIZE_MIN..=SIZE_MAX).contains(&self.target.size) {
            return Err(Failure::Usage(format!(
                "--size {}: probe makes a file system on the device; choose a size from {} to {}",
                self.target.size,
                format_bytes(SIZE_MIN),
                format_bytes(SIZE_MAX)
            )));
        }
        Ok(())
    }

    fn run(&self, context: &mut Context) -> Result<(), Failure> {
        if self.external.is_asked_for() {
            return self.somebody_elses(context);
        }
        self.state_minimums(context);
        let before = Inventory::take();
        let mut made = Vec::new();
        let target = TargetArgs { lie: self.plant, ..self.target.clone() };
        let served = Self::serve(&target, context, &mut made);
        // Whatever went wrong before, what is left is worth knowing; but the first failure is the one that is told.
        let gone = context.always("nodes-gone", Duration::from_secs(20), |context| nodes_gone(context, &made));
        served.and(gone)?;
        context.step("nothing-left", Duration::from_secs(20), |context| before.compare(context))
    }
}

impl Args {
    /// A device into whose storage there is no look.
    fn somebody_elses(&self, context: &mut Context) -> Result<(), Failure> {
        for (name, minimum) in external::MINIMUMS {
            context.evidence().require(name, minimum);
        }
        let claimed = context.step("start", Duration::from_secs(120), |context| self.external.start(context))?;
        let Some(mut device) = claimed else { return Ok(()) };
        let checked = external::check(context, &mut device);
        let closed = context.always("close", Duration::from_secs(120), |context| device.close(context));
        checked.and(closed)
    }

    /// The least work that proves something.
    fn state_minimums(&self, context: &Context) {
        let evidence = context.evidence();
        let zero_read = device::window_bytes(self.target.size);
        for (name, minimum) in [
            ("zero_read_bytes", zero_read),
            ("mapped_writes", 100),
            ("storage_verified_bytes", zero_read),
            ("file_bytes_found_in_storage", 64 << 10),
            ("cold_read_bytes", 8 << 20),
            ("concurrent_files_verified", 128),
            ("journals_replayed", u64::from(power::CUTS)),
            ("synced_files_after_power_cuts", 3 * u64::from(power::CUTS)),
            ("files_verified_after_remount", 128),
        ] {
            evidence.require(name, minimum);
        }
    }

    /// Everything that takes place while the device exists.
    fn serve(args: &TargetArgs, context: &mut Context, made: &mut Vec<u32>) -> Result<(), Failure> {
        let limit = Duration::from_secs(60);
        let target = context.step("start", limit, |context| {
            let target = args.start(context)?;
            context.detail(format!("{} of {}", target.path().display(), format_bytes(target.geometry().size)));
            Ok(target)
        })?;
        made.push(target.id());
        let checked = Self::check(args, context, &target, made);
        let closed = context.always("close", Duration::from_secs(120), |context| target.close(context));
        checked.and(closed)
    }

    fn check(args: &TargetArgs, context: &mut Context, target: &Target, made: &mut Vec<u32>) -> Result<(), Failure> {
        device::check(context, target)?;
        device::check_read_only(context, args, made)?;
        device::check_far_offsets(context, args, made)?;
        filesystem::check(context, args, target, made)
    }
}

/// Waits until nothing of the devices is left in `/dev` and `/sys`.
fn nodes_gone(context: &mut Context, ids: &[u32]) -> Result<(), Failure> {
    let patience = Instant::now() + Duration::from_secs(10);
    for id in ids {
        for path in [
            block_path(*id),
            character_path(*id),
            format!("/sys/class/block/ublkb{id}").into(),
            CharDir::of(*id).path().to_owned(),
        ] {
            while path.symlink_metadata().is_ok() {
                if Instant::now() > patience {
                    return Err(Failure::broke(
                        "leak",
                        format!("{} is still there 10 s after its device was closed", path.display()),
                    ));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    context.detail(format!("{} devices", ids.len()));
    Ok(())
}
