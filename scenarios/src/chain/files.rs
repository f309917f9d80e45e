//! A file system at the top.

use std::time::Duration;

use super::stack::Chain;
use crate::context::Context;
use crate::probe::filesystem::{Mounted, compare, drop_cached, fsck, make, sync, write, write_and_fsync};
use crate::scenario::Failure;

/// How many files there are, and their length in bytes.
pub(super) const FILES: usize = 12;
const LEN: usize = 128 << 10;

pub(super) fn check(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let top = chain.top()?;
    context.step("mkfs", s(120), |context| make(context, top))?;
    let mounted = context.step("mount", s(60), |context| Mounted::mount(context, &top.path()))?;
    let used = context.step("files", s(120), |context| fill(context, chain, &mounted));
    let unmounted = context.always("unmount", s(120), |_| mounted.unmount());
    used.and(unmounted)?;
    context.step("fsck", s(120), |_| fsck(&top.path()))?;
    context.step("remount", s(120), |context| {
        let mounted = Mounted::mount(context, &top.path())?;
        for index in 0..FILES {
            compare(context.seed(), mounted.path(), &name(index), LEN)?;
        }
        mounted.unmount()?;
        context.evidence().add("files_verified_after_remount", FILES as u64);
        Ok(())
    })
}

fn name(index: usize) -> String {
    format!("file-{index}")
}

/// Every second one is synced by itself, the others with the file system.
fn fill(context: &mut Context, chain: &Chain, mounted: &Mounted) -> Result<(), Failure> {
    let mut durable = 0;
    for index in 0..FILES {
        let name = name(index);
        if index % 2 == 0 {
            write(context.seed(), mounted.path(), &name, LEN)?;
            continue;
        }
        write_and_fsync(context.seed(), mounted, &name, LEN, chain.bottom()?)?;
        durable += 1;
    }
    sync(mounted)?;
    for index in 0..FILES {
        drop_cached(&mounted.path().join(name(index)))?;
        compare(context.seed(), mounted.path(), &name(index), LEN)?;
    }
    context.evidence().add("fsyncs_at_the_bottom", durable);
    context.detail(format!("{FILES} files, {durable} of them synced one by one"));
    Ok(())
}
