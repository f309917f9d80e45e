//! Requests that are held, and closing while something is wrong.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ublkit::{BlockClient, WriteFlags};
use ublkit_harness::fault::FaultPlan;

use crate::context::Context;
use crate::scenario::Failure;
use crate::target::{Patience, Target, TargetArgs};

/// How many requests are held.
const HELD: u64 = 3;
/// How many are under way at once.
const SLOTS: u16 = 8;
/// How long each is, in bytes.
const LEN: usize = 4096;
/// How long closing waits for requests that do not end.
const STOP: Duration = Duration::from_secs(2);
/// How long closing may take beyond that, on a slow machine.
const SLACK: Duration = Duration::from_secs(40);
/// How long a request is held, if nobody releases it: longer than anybody waits.
const FOR_EVER: Duration = Duration::from_secs(3600);
/// How long one wait for completions lasts.
const LOOK: Duration = Duration::from_millis(200);

/// What fails under load. Not `ENOSPC`: a disk that is gone has no bytes, and a write to it lies behind its end.
const PENDING: Errno = Errno::ENOLINK;

/// Holds requests, releases them, and closes devices that have errors or held requests.
pub(super) fn check(context: &mut Context, args: &TargetArgs) -> Result<(), Failure> {
    let patience = Patience { held: FOR_EVER, stop: STOP, ..Patience::default() };
    // More threads than are held, so that the others have somebody to go to.
    let workers_backend = HELD as usize + 2;
    let args = TargetArgs { workers_backend, patience, ..args.clone() };
    for name in ["held", "released", "passed_by", "closed_with_held", "failed_by_close", "closed_with_errors"] {
        context.evidence().require(name, 1);
    }
    held_and_released(context, &args)?;
    close_with_held(context, &args)?;
    close_with_errors(context, &args)
}

fn started(context: &mut Context, args: &TargetArgs) -> Result<Target, Failure> {
    context.step("start", Duration::from_secs(60), |context| args.start(context))
}

fn plan(text: &str) -> Result<FaultPlan, Failure> {
    text.parse().map_err(|error| Failure::Internal(format!("a plan of our own, {text:?}: {error}")))
}

/// What slot `slot` writes, and where: nowhere near the places that those look at who probe a new disk.
fn place(slot: u16) -> u64 {
    (4 << 20) + u64::from(slot) * (64 << 10)
}

fn content(slot: u16) -> [u8; LEN] {
    [0x40 | slot as u8; LEN]
}

/// A client with a write under way in each slot.
fn submitted(file: File) -> Result<BlockClient, Failure> {
    let cannot = |error: io::Error| Failure::Environment(format!("failed to set up I/O: {error}"));
    let mut client = BlockClient::new(file, SLOTS, LEN).map_err(cannot)?;
    for slot in 0..SLOTS {
        client.buffer_mut(slot).copy_from_slice(&content(slot));
        client.write(slot, place(slot), LEN, WriteFlags::NONE);
    }
    Ok(client)
}

/// Takes completions until `enough` says so or nothing is under way. How each slot ended.
fn collect(
    client: &mut BlockClient,
    ends: &mut BTreeMap<u16, io::Result<usize>>,
    enough: impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    while client.in_flight() > 0 && !enough(ends.len()) {
        client.submit_and_wait(1, LOOK).map_err(|error| Failure::io("wait for completions", &error))?;
        while let Some((slot, result)) = client.next_completion() {
            ends.insert(slot, result);
        }
    }
    Ok(())
}

/// Waits until so many requests are held.
fn await_held(target: &Target) -> Result<(), Failure> {
    let until = Instant::now() + SLACK;
    while target.held()? < HELD {
        if Instant::now() > until {
            return Err(Failure::Internal(format!("only {} requests were ever held", target.held()?)));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Requests that are held keep nobody else waiting, and end when they are released.
fn held_and_released(context: &mut Context, args: &TargetArgs) -> Result<(), Failure> {
    let target = started(context, args)?;
    let checked = context.step("hold and release", SLACK * 2, |context| {
        let _ours_alone = crate::torture::device::locked(&target)?;
        target.replan(&plan(&format!("write times {HELD}: hold"))?, context.seed().derive("held", 0))?;
        target.faults(true)?;
        let mut client = submitted(target.open_direct()?)?;
        let mut ends = BTreeMap::new();
        collect(&mut client, &mut ends, |ended| ended >= usize::from(SLOTS) - HELD as usize)?;
        await_held(&target)?;
        context.evidence().add("held", target.held()?);
        context.evidence().add("passed_by", ends.len() as u64);
        target.faults(false)?;
        collect(&mut client, &mut ends, |_| false)?;
        context.evidence().add("released", HELD);
        for (slot, end) in &ends {
            expect_whole(*slot, end)?;
        }
        for slot in 0..SLOTS {
            client.buffer_mut(slot).fill(0);
            client.read(slot, place(slot), LEN);
        }
        ends.clear();
        collect(&mut client, &mut ends, |_| false)?;
        for (slot, end) in &ends {
            expect_whole(*slot, end)?;
            if client.buffer(*slot)[..LEN] != content(*slot) {
                let at = place(*slot);
                return Err(Failure::broke("content", format!("what was written at {at} and held is not there")));
            }
        }
        context.detail(format!("{HELD} requests held, {} went past them", SLOTS - HELD as u16));
        Ok(())
    });
    let closed = context.always("close", Duration::from_secs(120), |context| target.close(context));
    checked.and(closed)
}

fn expect_whole(slot: u16, end: &io::Result<usize>) -> Result<(), Failure> {
    match end {
        Ok(LEN) => Ok(()),
        Ok(moved) => Err(Failure::broke("io", format!("{moved} of {LEN} bytes were moved at {}", place(slot)))),
        Err(error) => Err(Failure::io(format_args!("write or read what was held, at {}", place(slot)), error)),
    }
}

/// Closing a device whose server holds requests is bounded, and fails them.
fn close_with_held(context: &mut Context, args: &TargetArgs) -> Result<(), Failure> {
    let target = started(context, args)?;
    let checked = context.step("close with requests held", STOP + SLACK, |context| {
        target.replan(&plan(&format!("write times {HELD}: hold"))?, context.seed().derive("held", 1))?;
        target.faults(true)?;
        let file = target.open_direct()?;
        let client = thread::spawn(move || {
            let mut client = submitted(file)?;
            let mut ends = BTreeMap::new();
            // Nobody releases them: it is the end of the device that ends them.
            collect(&mut client, &mut ends, |_| false).map(|()| ends)
        });
        await_held(&target)?;
        let begun = Instant::now();
        let closed = target.begin_to_close();
        let took = begun.elapsed();
        let ends = client.join().map_err(|_panic| Failure::Internal("the client panicked".to_owned()))??;
        let failed = ends.values().filter(|end| end.is_err()).count() as u64;
        if ends.len() != usize::from(SLOTS) || failed != HELD {
            let what = format!("of {SLOTS} requests {} ended, {failed} of them with an error: {ends:?}", ends.len());
            return Err(Failure::broke("close", what));
        }
        match closed {
            // The threads that hold them are the server's own affair; closing says that they are left.
            Err(Failure::Hang(_)) => {}
            Err(failure) => return Err(failure),
            Ok(()) => return Err(Failure::broke("close", "a device closed past requests that were held")),
        }
        context.evidence().add("failed_by_close", failed);
        context.evidence().add("closed_with_held", 1);
        context.detail(format!("{failed} requests failed, {} ms", took.as_millis()));
        Ok(())
    });
    // Once they are released, the rest ends too.
    let closed =
        context.always("close what is left", Duration::from_secs(120), |context| target.close_what_is_left(context));
    checked.and(closed)
}

/// A device that fails every write is closed under load like any other.
fn close_with_errors(context: &mut Context, args: &TargetArgs) -> Result<(), Failure> {
    let target = started(context, args)?;
    let prepared = context.step("errors under load", SLACK, |context| {
        let plan = plan(&format!("write: error {PENDING:?} after; any: delay 2"))?;
        target.replan(&plan, context.seed().derive("held", 2))?;
        target.faults(true)
    });
    if let Err(failure) = prepared {
        // It is the first failure that is told.
        let _closed = target.close(context);
        return Err(failure);
    }
    let (errors, gone) = (AtomicU64::new(0), AtomicBool::new(false));
    let file = target.open_direct();
    thread::scope(|scope| {
        let load = file.map(|file| scope.spawn(|| until_it_is_gone(file, &errors, &gone)));
        let closed = context.always("close with errors pending", STOP + SLACK, |context| {
            let until = Instant::now() + SLACK / 2;
            while errors.load(Ordering::Relaxed) < 50 && Instant::now() < until && !gone.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(2));
            }
            let pending = errors.load(Ordering::Relaxed);
            target.close_with_faults(context)?;
            context.evidence().add("closed_with_errors", u64::from(pending >= 50));
            context.detail(format!("{pending} errors before"));
            Ok(())
        });
        // Whatever became of it, nobody writes any more; and what is under way has to end.
        gone.store(true, Ordering::Relaxed);
        let ended = context.always("end of the load", SLACK, |_context| {
            load?.join().map_err(|_panic| Failure::Internal("the load panicked".to_owned()))?
        });
        closed.and(ended)
    })
}

/// Writes until the device is gone, which it says by another error than the one that is injected.
fn until_it_is_gone(file: File, errors: &AtomicU64, gone: &AtomicBool) -> Result<(), Failure> {
    let mut client = submitted(file)?;
    loop {
        client.submit_and_wait(1, LOOK).map_err(|error| Failure::io("wait for completions", &error))?;
        while let Some((slot, result)) = client.next_completion() {
            match result.map_err(|error| error.raw_os_error().map(Errno::from_raw)) {
                Err(Some(PENDING)) => drop(errors.fetch_add(1, Ordering::Relaxed)),
                Err(_) => gone.store(true, Ordering::Relaxed),
                Ok(_) => return Err(Failure::broke("errors", "a write succeeded while every write fails")),
            }
            if !gone.load(Ordering::Relaxed) {
                client.write(slot, place(slot), LEN, WriteFlags::NONE);
            }
        }
        if client.in_flight() == 0 {
            return Ok(());
        }
    }
}
