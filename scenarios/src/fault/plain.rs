//! Errno by errno, through plain system calls: nothing between the application and the block layer tries again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ublkit::blkdev;
use ublkit_harness::OpKind;
use ublkit_harness::fault::{Effect, Errno, FaultPlan, Ops, Rule, Stage};
use ublkit_harness::plan::Capabilities;

use super::grid::{OPS, errnos};
use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::scenario::Failure;
use crate::target::{Target, TargetArgs};

/// Where it is tried, in bytes: nowhere near the places that those look at who probe a new disk.
const AT: u64 = 4 << 20;
const LEN: usize = 4096;

/// Lets one operation fail with each errno, and looks what the application is told.
pub(super) fn check(context: &mut Context, args: &TargetArgs) -> Result<(), Failure> {
    let target = context.step("start", Duration::from_secs(60), |context| args.start(context))?;
    let checked = context.step("errno by errno", Duration::from_secs(120), |context| each(context, &target));
    let closed = context.always("close", Duration::from_secs(120), |context| target.close(context));
    checked.and(closed)
}

/// The same, on a device that is there.
pub(crate) fn each(context: &mut Context, target: &Target) -> Result<(), Failure> {
    let _ours_alone = crate::torture::device::locked(target)?;
    let file = target.open_direct()?;
    let offered = Capabilities::of(target.geometry());
    let mut tried = 0;
    for op in OPS.into_iter().filter(|op| offered.offers(*op)) {
        for errno in errnos() {
            let rule =
                Rule { times: Some(1), ..Rule::new(Ops::only(op), Effect::Error { errno, stage: Stage::Before }) };
            target.replan(&FaultPlan { rules: vec![rule] }, context.seed())?;
            target.faults(true)?;
            let seen = seen(&file, op);
            target.faults(false)?;
            let happened = target.testimony()?.injections.len();
            if happened != 1 {
                let what = format!("a {op} asked the backend {happened} times for what was to fail once");
                return Err(Failure::broke("errors", what));
            }
            let expected = told(op, errno);
            if seen != expected {
                let word = |errno: Option<Errno>| errno.map_or("success".to_owned(), |errno| errno.to_string());
                let (seen, expected) = (word(seen), word(expected));
                let what = format!("a {op} whose backend said {errno} ended in {seen}, where {expected} is right");
                return Err(Failure::broke("errors", what));
            }
            tried += 1;
        }
    }
    context.evidence().add("errnos", tried);
    context.detail(format!("{tried} pairs of operation and errno"));
    Ok(())
}

/// What the application is told.
fn told(op: OpKind, errno: Errno) -> Option<Errno> {
    let told = errno.seen();
    match op {
        // It is a hint (blkdev_issue_discard), a cache that need not be flushed (blkdev_issue_flush in blkdev_fsync), and
        // what the kernel then does by writing (blkdev_issue_zeroout).
        OpKind::Discard | OpKind::Flush | OpKind::WriteZeroes if told == Errno::EOPNOTSUPP => None,
        _ => Some(told),
    }
}

fn seen(file: &File, op: OpKind) -> Option<Errno> {
    let mut buf = AlignedBuf::zeroed(LEN);
    let result: io::Result<()> = match op {
        OpKind::Read => file.read_exact_at(&mut buf, AT),
        OpKind::Write | OpKind::WriteFua => file.write_all_at(&buf, AT),
        OpKind::Flush => file.sync_all(),
        OpKind::Discard => blkdev::discard(file, AT, LEN as u64),
        OpKind::WriteZeroes => blkdev::zero_out(file, AT, LEN as u64),
    };
    result.err().and_then(|error| error.raw_os_error().and_then(Errno::new))
}
