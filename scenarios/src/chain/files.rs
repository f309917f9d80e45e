//! A file system at the top.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use super::stack::Chain;
use crate::context::Context;
use crate::probe::filesystem::{Mounted, compare, content, drop_cached, fsck, make, sync, write};
use crate::scenario::Failure;

/// How many files there are, and their length in bytes.
pub(super) const FILES: usize = 12;
const LEN: usize = 128 << 10;

pub(super) fn check(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    let s = Duration::from_secs;
    let top = chain.top()?;
    context.step("mkfs", s(120), |context| make(context, top))?;
    let mounted = context.step("mount", s(60), |_| Mounted::mount(&top.path()))?;
    let used = context.step("files", s(120), |context| fill(context, chain, &mounted));
    let unmounted = context.always("unmount", s(120), |_| mounted.unmount());
    used.and(unmounted)?;
    context.step("fsck", s(120), |_| fsck(&top.path()))?;
    context.step("remount", s(120), |context| {
        let mounted = Mounted::mount(&top.path())?;
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
        let failed = |error| Failure::io(format_args!("write and sync the file {name}"), &error);
        let mut file = File::create_new(mounted.path().join(&name)).map_err(failed)?;
        file.write_all(&content(context.seed(), &name, LEN)).map_err(failed)?;
        let before = chain.bottom()?.counts()?;
        file.sync_all().map_err(failed)?;
        let after = chain.bottom()?.counts()?;
        if after.write_bytes - before.write_bytes < LEN as u64 {
            let what = format!("fsync at the top returned when less than the file's {LEN} bytes were at the bottom");
            return Err(Failure::broke("write-back", what));
        }
        if after.flushes + after.fua_writes == before.flushes + before.fua_writes {
            return Err(Failure::broke("flush", "fsync at the top led to no flush and no FUA write at the bottom"));
        }
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
