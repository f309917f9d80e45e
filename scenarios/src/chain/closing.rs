//! The bottom is closed while the rest of the chain is on it.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Args;
use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::scenario::Failure;
use crate::sysfs::CharDir;
use crate::target::{Patience, TargetArgs};

/// How long the close waits for whoever holds the device, and how long it may take beyond that on a slow machine.
const DELETE: Duration = Duration::from_secs(1);
const SLACK: Duration = Duration::from_secs(30);
/// How long an id may take to become free once nobody holds the device.
const FREE: Duration = Duration::from_secs(20);

pub(super) fn check(args: &Args, context: &mut Context) -> Result<(), Failure> {
    let patience = Patience { delete: DELETE, ..Patience::default() };
    let target = TargetArgs { patience, ..args.target.clone() };
    let chain = args.start(context, &target)?;
    context.always("close the bottom first", Duration::from_secs(240), |context| {
        let (below, top) = chain.apart();
        let mut below = below.into_iter();
        let Some(bottom) = below.next() else { return Err(Failure::Internal("a chain has no bottom".to_owned())) };
        let (id, path) = (bottom.id(), bottom.path());
        let above: Vec<_> = below.collect();
        // Who holds it: the server of the device on it.
        let holder = above.first().map_or_else(|| top.ours(), Ok)?.server_pid();
        let file = top.open()?.file;
        let began = Instant::now();
        let told = bottom.close_while_held();
        let took = began.elapsed();
        let judged = told.and_then(|told| judge(context, told.as_deref(), took, holder));
        let judged = judged.and_then(|()| fails(&file, &path));
        drop(file);
        // Whatever came of it, the rest is closed, from the top.
        let mut closed = top.close(context);
        for target in above.into_iter().rev() {
            closed = closed.and(target.close(context));
        }
        judged.and(closed)?;
        becomes_free(context, id)?;
        context.detail(format!("bounded ({} ms), and its holder was named", took.as_millis()));
        Ok(())
    })
}

fn judge(context: &Context, told: Option<&str>, took: Duration, holder: u32) -> Result<(), Failure> {
    if took > DELETE + SLACK {
        return Err(Failure::Hang(format!("closing a device that another is on took {took:?}")));
    }
    let Some(told) = told else {
        return Err(Failure::broke(
            "close",
            "a device that another is on was closed, and its deletion was not said to wait for that",
        ));
    };
    let named = told.split(|sign: char| !sign.is_ascii_digit()).any(|word| word == holder.to_string());
    if !named {
        return Err(Failure::broke(
            "close",
            format!("process {holder} holds the device, and the close says: {told}"),
        ));
    }
    context.evidence().add("holders_named", 1);
    Ok(())
}

/// What is asked of the top fails, and does not wait.
fn fails(file: &std::fs::File, below: &Path) -> Result<(), Failure> {
    let mut buf = AlignedBuf::zeroed(4096);
    match file.read_exact_at(&mut buf, 16 << 20) {
        Ok(()) => Err(Failure::broke("close", format!("{} is gone, and the top can be read", below.display()))),
        Err(_) => Ok(()),
    }
}

fn becomes_free(context: &Context, id: u32) -> Result<(), Failure> {
    let until = Instant::now() + FREE;
    while CharDir::of(id).exists() {
        if Instant::now() > until {
            let what = format!("id {id} is still taken {FREE:?} after nobody holds its device any more");
            return Err(Failure::broke("leak", what));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    context.record.gone(id);
    context.evidence().add("ids_free_after_letting_go", 1);
    Ok(())
}
