//! Every I/O command in every state in which somebody can send one, and what it gives.

use nix::errno::Errno;
use ublkit::sys::ublk;

use super::expect::{Probe, Rule, SERVED, about, err, io, map, ok};
use super::lab::Rig;
use super::protocol::{Addr, DEPTH, Io};
use super::state::State::{self, Deleting, Held, Live, Opened, Partly, Ready, Recovering, Stopped, StoppedOpen};
use super::table::V6_16;
use crate::gates::PARTLY_FETCHED_DEATH;

const ALL: &[State] = SERVED;
/// Nothing was fetched.
const UNFETCHED: &[State] = &[Opened, Deleting];
/// The tag in question is not the driver's: it was not fetched, or the server keeps it.
const NOT_THE_DRIVERS: &[State] = &[Opened, Held, Deleting];

/// The tag that the server keeps, where it keeps one.
fn held(rig: &Rig) -> u16 {
    rig.held.unwrap_or(0)
}

/// A tag that is the driver's.
fn idle(rig: &Rig) -> u16 {
    u16::from(held(rig) == 0)
}

/// Every I/O command.
pub(super) fn all() -> Vec<Probe> {
    let mut all = fetches();
    all.extend(commits());
    all.extend(others());
    all.extend(maps());
    all
}

fn fetches() -> Vec<Probe> {
    let fetch = ublk::IO_FETCH_REQ;
    let no_buffer = || {
        [
            err(&[Opened, Partly, Deleting], Errno::EINVAL),
            err(ALL, Errno::EBUSY).before(V6_16),
            // The buffer is looked at first.
            err(ALL, Errno::EINVAL),
        ]
    };
    vec![
        io("FETCH_REQ", "first tag", false, move |_| about(fetch, 0, 0))
            .gives([
                ok(UNFETCHED),
                err(&[Partly], Errno::EBUSY).before(V6_16),
                err(&[Partly], Errno::EINVAL),
                err(ALL, Errno::EBUSY),
            ])
            .gated(&PARTLY_FETCHED_DEATH, &[Deleting]),
        io("FETCH_REQ", "second tag", false, move |_| about(fetch, 0, 1))
            .gives([ok(&[Opened, Partly, Deleting]), err(ALL, Errno::EBUSY)])
            .gated(&PARTLY_FETCHED_DEATH, &[Deleting]),
        io("FETCH_REQ", "second tag, another thread", true, move |_| about(fetch, 0, 1))
            .gives([
                ok(&[Opened, Partly, Deleting]),
                // The queue is the thread's that fetched its last tag.
                err(ALL, Errno::EINVAL).before(V6_16),
                err(ALL, Errno::EBUSY),
            ])
            .gated(&PARTLY_FETCHED_DEATH, &[Deleting]),
        io("FETCH_REQ", "no such queue", false, move |_| about(fetch, 1, 0)).gives([err(ALL, Errno::EINVAL)]),
        io("FETCH_REQ", "queue 65535", false, move |_| about(fetch, u16::MAX, 0)).gives([err(ALL, Errno::EINVAL)]),
        io("FETCH_REQ", "no such tag", false, move |_| about(fetch, 0, DEPTH)).gives([err(ALL, Errno::EINVAL)]),
        io("FETCH_REQ", "tag 65535", false, move |_| about(fetch, 0, u16::MAX)).gives([err(ALL, Errno::EINVAL)]),
        io("FETCH_REQ", "no buffer", false, move |_| Io { addr: Addr::None, ..about(fetch, 0, 1) })
            .gives(no_buffer()),
        io("FETCH_REQ", "legacy number, no buffer", false, move |_| Io {
            addr: Addr::None,
            ..about(ublk::legacy(fetch), 0, 1)
        })
        .gives(no_buffer()),
    ]
}

fn commits() -> Vec<Probe> {
    let commit = ublk::IO_COMMIT_AND_FETCH_REQ;
    let not_fetched = err(UNFETCHED, Errno::EINVAL);
    vec![
        io("COMMIT_AND_FETCH_REQ", "a tag of the driver's", false, move |rig| about(commit, 0, idle(rig)))
            .gives([err(&[Opened, Partly, Deleting], Errno::EINVAL), err(ALL, Errno::EBUSY)]),
        io("COMMIT_AND_FETCH_REQ", "the tag that is kept", false, move |rig| Io {
            result: 4096,
            ..about(commit, 0, held(rig))
        })
        .gives([ok(&[Held]), not_fetched.clone(), err(ALL, Errno::EBUSY)]),
        io("COMMIT_AND_FETCH_REQ", "the tag that is kept, another thread", true, move |rig| {
            about(commit, 0, held(rig))
        })
        // Before its last tag is fetched, a queue is nobody's there.
        .gives([err(&[Partly], Errno::EBUSY).before(V6_16), err(ALL, Errno::EINVAL)]),
        io("COMMIT_AND_FETCH_REQ", "the tag that is kept, no buffer", false, move |rig| Io {
            addr: Addr::None,
            ..about(commit, 0, held(rig))
        })
        .gives([err(NOT_THE_DRIVERS, Errno::EINVAL), err(ALL, Errno::EBUSY)]),
        io("COMMIT_AND_FETCH_REQ", "no such queue", false, move |_| about(commit, 1, 0))
            .gives([err(ALL, Errno::EINVAL)]),
        io("COMMIT_AND_FETCH_REQ", "no such tag", false, move |_| about(commit, 0, DEPTH))
            .gives([err(ALL, Errno::EINVAL)]),
    ]
}

/// Who owns the tag comes before what is asked for; an operation that is not for this device, or not known, is invalid.
fn owned_then_invalid() -> [Rule; 2] {
    [err(NOT_THE_DRIVERS, Errno::EINVAL), err(ALL, Errno::EBUSY)]
}

fn others() -> Vec<Probe> {
    let numbered =
        |variant, operation| io("unknown I/O command", variant, false, move |rig| about(operation, 0, held(rig)));
    let buffer = |operation| move |rig: &Rig| Io { addr: Addr::Number(0), ..about(operation, 0, held(rig)) };
    let batch = |operation| {
        // Its flags stand where another command has its tag.
        move |rig: &Rig| Io { batch: Some((held(rig), DEPTH, 8)), ..about(operation, 0, 0) }
    };
    vec![
        io("NEED_GET_DATA", "not asked for", false, |rig| about(ublk::IO_NEED_GET_DATA, 0, held(rig)))
            .gives(owned_then_invalid()),
        io("REGISTER_IO_BUF", "without zero copy", false, buffer(ublk::IO_REGISTER_IO_BUF))
            .gives(owned_then_invalid()),
        io("UNREGISTER_IO_BUF", "without zero copy", false, buffer(ublk::IO_UNREGISTER_IO_BUF)).gives([
            err(&[Partly, Ready, Live, StoppedOpen, Stopped, Recovering], Errno::EBUSY).before(V6_16),
            err(ALL, Errno::EINVAL),
        ]),
        io("PREP_IO_CMDS", "without batches", false, batch(ublk::IO_PREP_IO_CMDS)).gives(owned_then_invalid()),
        io("COMMIT_IO_CMDS", "without batches", false, batch(ublk::IO_COMMIT_IO_CMDS)).gives(owned_then_invalid()),
        io("FETCH_IO_CMDS", "without batches", false, batch(ublk::IO_FETCH_IO_CMDS)).gives(owned_then_invalid()),
        numbered("0x7f", 0xc010_757f).gives(owned_then_invalid()),
        numbered("0", 0xc010_7500).gives(owned_then_invalid()),
        numbered("a control command's number", ublk::CMD_STOP_DEV).gives(owned_then_invalid()),
        numbered("another driver's type", 0xc010_7620).gives([
            err(&[Partly, Ready, Live, StoppedOpen, Stopped, Recovering], Errno::EBUSY).before(V6_16),
            err(ALL, Errno::EOPNOTSUPP),
        ]),
    ]
}

fn maps() -> Vec<Probe> {
    let len = ublk::queue_map_len(DEPTH, 4096);
    let next = ublk::queue_map_offset(1, 4096);
    vec![
        map("", 0, len, false).gives([ok(ALL)]),
        map("to be written", 0, len, true).gives([err(ALL, Errno::EPERM)]),
        map("too long", 0, 2 * len, false).gives([err(ALL, Errno::EINVAL)]),
        map("of no queue", next, len, false).gives([err(ALL, Errno::EINVAL)]),
        // Any offset in a queue's share gives that queue's descriptors from their beginning.
        map("in the middle of a queue's share", 4096, len, false).gives([ok(ALL)]),
    ]
}
