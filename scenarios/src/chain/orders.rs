//! One write at a time, made durable by a flush or by FUA: it is durable at the bottom when the top says so.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::libc;
use ublkit_harness::OpKind;
use ublkit_harness::observe::Counts;

use super::stack::Chain;
use crate::aligned::AlignedBuf;
use crate::clock::nanoseconds;
use crate::context::Context;
use crate::scenario::Failure;

/// Where, in bytes: nowhere near the places that those look at who probe a new disk.
const AT: u64 = 8 << 20;
const LEN: usize = 4096;
const ROUNDS: u64 = 8;

pub(super) fn check(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    context.step("flushes reach the bottom", Duration::from_secs(60), |context| flushes(context, chain))?;
    context.step("FUA reaches the bottom", Duration::from_secs(60), |context| fua(context, chain))
}

fn flushes(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    let _ours_alone = crate::torture::device::locked(chain.top()?)?;
    let file = chain.top()?.open_direct()?;
    let flushed = each(context, chain, OpKind::Flush, &file, |counts| counts.flushes)?;
    context.evidence().add("flushes_at_the_bottom", flushed);
    context.detail(format!("{flushed} at the bottom for {ROUNDS} at the top"));
    Ok(())
}

fn fua(context: &mut Context, chain: &Chain) -> Result<(), Failure> {
    let top = chain.top()?;
    let _ours_alone = crate::torture::device::locked(top)?;
    // What is written so is a write with FUA, and a flush behind it (blkdev_write_iter).
    let file = top.open_with(libc::O_DIRECT | libc::O_DSYNC)?;
    let written = each(context, chain, OpKind::WriteFua, &file, |counts| counts.fua_writes)?;
    context.evidence().add("fua_writes_at_the_bottom", written);
    context.detail(format!("{written} at the bottom for {ROUNDS} at the top"));
    Ok(())
}

/// Writes and makes durable, again and again. Each time the bottom has to have been asked for it meanwhile, after the bytes
/// were there. Returns how often it was asked.
fn each(
    context: &Context,
    chain: &Chain,
    kind: OpKind,
    file: &File,
    count: impl Fn(&Counts) -> u64,
) -> Result<u64, Failure> {
    let (top, bottom) = (chain.top()?, chain.bottom()?);
    let mut buf = AlignedBuf::zeroed(LEN);
    let mut asked = 0;
    for round in 0..ROUNDS {
        let at = AT + round * LEN as u64;
        context.seed().derive(&kind.to_string(), round).rng().fill(&mut buf);
        let _of_others = top.testimony()?;
        let before = count(&bottom.counts()?);
        let mut began = nanoseconds();
        file.write_all_at(&buf, at).map_err(|error| Failure::io("write at the top", &error))?;
        if kind == OpKind::Flush {
            began = nanoseconds();
            file.sync_data().map_err(|error| Failure::io("flush at the top", &error))?;
        }
        let ended = nanoseconds();
        let after = count(&bottom.counts()?);
        let calls = top.testimony()?.calls;
        let first = at / ublkit_harness::SECTOR as u64;
        let there = calls.iter().any(|call| {
            let same = call.kind == kind && (kind == OpKind::Flush || call.range.first == first);
            same && call.ok && call.began >= began && call.ended <= ended
        });
        if !there || after == before {
            let what = format!(
                "a {kind} at the top ended, and none was done at the bottom meanwhile ({} in all)",
                after - before
            );
            return Err(Failure::broke("flush", what));
        }
        let mut stored = vec![0; LEN];
        top.storage().read_at(&mut stored, at)?;
        if stored != buf[..] {
            return Err(Failure::broke("storage", format!("what a {kind} at the top was for is not at the bottom")));
        }
        asked += after - before;
    }
    Ok(asked)
}
