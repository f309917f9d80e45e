//! `probe`: step by step, do both sides of the stack agree?
//!
//! The one side is the block device that applications use, the other the bytes in the server's storage. The
//! device part compares them without anything between, the file-system part with ext4 and
//! the page cache, over unmounts and power cuts. At the end nothing may be left.

mod device;
pub(crate) mod filesystem;
pub(crate) mod power;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::CommonArgs;
use crate::context::Context;
use crate::inventory::Inventory;
use crate::scenario::{Failure, Needs, Scenario};
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

    fn validate(&self) -> Result<(), Failure> {
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
        self.state_minimums(context);
        let before = Inventory::take();
        let mut made = Vec::new();
        let served = self.serve(context, &mut made);
        // Whatever went wrong before, what is left is worth knowing; but the first failure is the one that is told.
        let gone = context.always("nodes-gone", Duration::from_secs(20), |context| nodes_gone(context, &made));
        served.and(gone)?;
        context.step("nothing-left", Duration::from_secs(20), |context| before.compare(context))
    }
}

impl Args {
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
    fn serve(&self, context: &mut Context, made: &mut Vec<u32>) -> Result<(), Failure> {
        let limit = Duration::from_secs(60);
        let target = context.step("start", limit, |context| {
            let target = self.target.start(context)?;
            context.detail(format!("{} of {}", target.path().display(), format_bytes(target.geometry().size)));
            Ok(target)
        })?;
        made.push(target.id());
        let checked = self.check(context, &target, made);
        let closed = context.always("close", Duration::from_secs(120), |context| target.close(context));
        checked.and(closed)
    }

    fn check(&self, context: &mut Context, target: &Target, made: &mut Vec<u32>) -> Result<(), Failure> {
        device::check(context, target)?;
        device::check_far_offsets(context, &self.target, made)?;
        filesystem::check(context, &self.target, target, made)
    }
}

/// Waits until nothing of the devices is left in `/dev` and `/sys`.
fn nodes_gone(context: &mut Context, ids: &[u32]) -> Result<(), Failure> {
    let patience = Instant::now() + Duration::from_secs(10);
    for id in ids {
        for path in [
            format!("/dev/ublkb{id}"),
            format!("/dev/ublkc{id}"),
            format!("/sys/class/block/ublkb{id}"),
            format!("/sys/class/ublk-char/ublkc{id}"),
        ] {
            while Path::new(&path).symlink_metadata().is_ok() {
                if Instant::now() > patience {
                    return Err(Failure::broke(
                        "leak",
                        format!("{path} is still there 10 s after its device was closed"),
                    ));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    context.detail(format!("{} devices", ids.len()));
    Ok(())
}
