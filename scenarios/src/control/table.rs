//! Every control command in every state, and what it gives.

use nix::errno::Errno;
use ublkit::raw::{Payload, RawCommand};
use ublkit::sys::ublk::{self, DevInfo, Params};

use super::expect::{Expected, Probe, Rule, control, data, err, memory, ok, plain, room, rule};
use super::lab::{self, Rig};
use super::protocol::SECTORS;
use super::state::State::{
    self, Absent, Added, Configured, Dead, Deleted, Deleting, FailIo, Held, Live, LiveRecoverable, Opened, Partly,
    Quiesced, Ready, Recovering, Stopped, StoppedOpen,
};
use crate::gates::{KernelVersion, START_AFTER_DEATH, START_AFTER_STOP, UNBEGUN_RECOVERY, UPDATE_SIZE_UNSTARTED};

pub(super) const V6_16: KernelVersion = KernelVersion(6, 16, 0);
pub(super) const V7_1: KernelVersion = KernelVersion(7, 1, 0);
pub(super) const V7_0: KernelVersion = KernelVersion(7, 0, 0);

const ALL: &[State] = State::ALL;
const GONE: &[State] = &[Absent, Deleted];
/// No disk is there.
const UNSTARTED: &[State] = &[Added, Configured, Opened, Partly, Ready, StoppedOpen, Stopped, Dead, Deleting];

/// No device has this id.
const fn gone() -> Rule {
    err(GONE, Errno::ENODEV)
}

/// The path of the character device, and what follows it.
#[expect(clippy::needless_pass_by_value, reason = "as every shape of a command")]
fn with_path(path: &str, room: usize, command: RawCommand) -> RawCommand {
    let mut bytes = path.as_bytes().to_vec();
    bytes.push(0);
    let dev_path_len = bytes.len() as u16;
    bytes.resize(bytes.len() + room, 0);
    RawCommand { payload: Payload::Bytes(bytes), dev_path_len, ..command }
}

fn own_path(rig: &Rig) -> String {
    ublkit::ctrl::character_path(rig.id).display().to_string()
}

/// Every control command.
pub(super) fn all() -> Vec<Probe> {
    let mut all = questions();
    all.extend(parameters());
    all.extend(lifecycle());
    all.extend(recovery());
    all.extend(extras());
    all.extend(unknown());
    all
}

fn questions() -> Vec<Probe> {
    let info = ublk::CMD_GET_DEV_INFO;
    let info2 = ublk::CMD_GET_DEV_INFO2;
    let affinity = ublk::CMD_GET_QUEUE_AFFINITY;
    let features = ublk::CMD_GET_FEATURES;
    let queue = |queue, payload: Payload| {
        move |_: &Rig, command| RawCommand { data: queue, payload: payload.clone(), ..command }
    };
    vec![
        control("GET_DEV_INFO", "", info, room(64)).reads().gives([gone(), ok(ALL)]),
        control("GET_DEV_INFO", "more room", info, room(128)).reads().gives([gone(), ok(ALL)]),
        control("GET_DEV_INFO", "short", info, room(63)).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_DEV_INFO", "no memory", info, plain).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_DEV_INFO", "null", info, memory(Payload::Null(64))).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_DEV_INFO", "unreadable", info, memory(Payload::Inaccessible(64)))
            .gives([gone(), err(ALL, Errno::EFAULT)]),
        control("GET_DEV_INFO", "narrow entry", info, |_, command| RawCommand {
            narrow: true,
            payload: Payload::Bytes(vec![0; 64]),
            ..command
        })
        .gives([err(ALL, Errno::EINVAL)]),
        control("GET_DEV_INFO", "legacy number", ublk::legacy(info), room(64)).reads().gives([gone(), ok(ALL)]),
        control("GET_DEV_INFO2", "", info2, |rig, command| with_path(&own_path(rig), 64, command))
            .reads()
            // The node goes before the device does.
            .gives([gone(), err(&[Deleting], Errno::ENOENT), ok(ALL)]),
        control("GET_DEV_INFO2", "no path", info2, room(64)).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_DEV_INFO2", "another device's path", info2, |_, command| with_path("/dev/null", 64, command))
            .gives([gone(), err(ALL, Errno::EPERM)]),
        control("GET_DEV_INFO2", "no such path", info2, |_, command| with_path("/dev/no-such-node", 64, command))
            .gives([gone(), err(ALL, Errno::ENOENT)]),
        control("GET_DEV_INFO2", "path longer than the payload", info2, |rig, command| RawCommand {
            dev_path_len: 4096,
            ..with_path(&own_path(rig), 64, command)
        })
        .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_DEV_INFO2", "short", info2, |rig, command| with_path(&own_path(rig), 63, command)).gives([
            gone(),
            err(&[Deleting], Errno::ENOENT),
            err(ALL, Errno::EINVAL),
        ]),
        control("GET_QUEUE_AFFINITY", "", affinity, queue(0, Payload::Bytes(vec![0; 1024])))
            .reads()
            .gives([gone(), ok(ALL)]),
        control("GET_QUEUE_AFFINITY", "no such queue", affinity, queue(1, Payload::Bytes(vec![0; 1024])))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_QUEUE_AFFINITY", "odd length", affinity, queue(0, Payload::Bytes(vec![0; 1023])))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_QUEUE_AFFINITY", "no room", affinity, queue(0, Payload::None))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_QUEUE_AFFINITY", "null", affinity, queue(0, Payload::Null(1024)))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_QUEUE_AFFINITY", "unreadable", affinity, queue(0, Payload::Inaccessible(1024)))
            .gives([gone(), err(ALL, Errno::EFAULT)]),
        control("GET_FEATURES", "", features, room(8)).reads().gives([ok(ALL)]),
        control("GET_FEATURES", "short", features, room(7)).gives([err(ALL, Errno::EINVAL)]),
        control("GET_FEATURES", "long", features, room(16)).gives([err(ALL, Errno::EINVAL)]),
        control("GET_FEATURES", "null", features, memory(Payload::Null(8))).gives([err(ALL, Errno::EINVAL)]),
        control("GET_FEATURES", "unreadable", features, memory(Payload::Inaccessible(8)))
            .gives([err(ALL, Errno::EFAULT)]),
        control("GET_FEATURES", "legacy number", ublk::legacy(features), room(8))
            .gives([gone(), err(ALL, Errno::EOPNOTSUPP)]),
    ]
}

fn parameters() -> Vec<Probe> {
    const OPEN: &[State] = &[Added, Configured, Opened, Partly, Ready, Stopped, Dead, Deleting];
    let set = ublk::CMD_SET_PARAMS;
    let get = ublk::CMD_GET_PARAMS;
    let params = |change: fn(&mut Params)| {
        move |_: &Rig, command| {
            let mut params = lab::params();
            change(&mut params);
            RawCommand { payload: Payload::Bytes(params.to_bytes()), ..command }
        }
    };
    let room_for = |len: u32, room: usize| {
        let mut bytes = Params { len, ..Params::default() }.to_bytes();
        bytes.resize(room, 0);
        memory(Payload::Bytes(bytes))
    };
    vec![
        control("SET_PARAMS", "", set, params(|_| ())).gives([gone(), ok(OPEN), err(ALL, Errno::EACCES)]),
        control("SET_PARAMS", "no memory", set, plain).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("SET_PARAMS", "only a header", set, room(8)).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("SET_PARAMS", "null", set, memory(Payload::Null(136))).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("SET_PARAMS", "unreadable", set, memory(Payload::Inaccessible(136)))
            .gives([gone(), err(ALL, Errno::EFAULT)]),
        control("SET_PARAMS", "says more than there is", set, params(|params| params.len = 1000))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("SET_PARAMS", "says nothing", set, params(|params| params.len = 0))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("SET_PARAMS", "no types", set, params(|params| params.types = 0))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_PARAMS", "", get, room_for(136, 136)).reads().gives([gone(), ok(ALL)]),
        control("GET_PARAMS", "a part", get, room_for(40, 136)).reads().gives([gone(), ok(ALL)]),
        control("GET_PARAMS", "no memory", get, plain).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_PARAMS", "only a header", get, room_for(8, 8)).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_PARAMS", "says more than there is", get, room_for(137, 136))
            .gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_PARAMS", "says nothing", get, room_for(0, 136)).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_PARAMS", "null", get, memory(Payload::Null(136))).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("GET_PARAMS", "unreadable", get, memory(Payload::Inaccessible(136)))
            .gives([gone(), err(ALL, Errno::EFAULT)]),
    ]
}

fn lifecycle() -> Vec<Probe> {
    let pid = |rig: &Rig, command| RawCommand { data: u64::from(rig.server_pid()), ..command };
    let start = ublk::CMD_START_DEV;
    let add_again = |change: fn(&mut DevInfo)| {
        move |rig: &Rig, _| {
            let mut info = lab::add(rig.id, rig.features);
            change(&mut info);
            lab::add_command(info)
        }
    };
    let waits = |states| rule(states, Expected::Waits);
    vec![
        control("ADD_DEV", "id taken", ublk::CMD_ADD_DEV, add_again(|_| ()))
            .gives([ok(GONE), err(ALL, Errno::EEXIST)]),
        control("START_DEV", "", start, pid)
            .gives([
                gone(),
                // Without parameters it does not wait; with them it waits for every tag first, and looks then.
                err(&[Added], Errno::EINVAL),
                err(&[Live, LiveRecoverable, Held, StoppedOpen, Recovering], Errno::EEXIST),
                ok(&[Ready]),
                err(&[Quiesced], Errno::EEXIST).before(V6_16),
                // Once all tags were fetched, that counts until the server's end is dealt with for good.
                err(&[Dead, Quiesced, FailIo], Errno::EINVAL).before(V7_1),
                waits(ALL),
            ])
            .gated(&START_AFTER_STOP, &[Stopped])
            .gated(&START_AFTER_DEATH, &[Dead]),
        control("START_DEV", "pid 0", start, data(0)).gives([gone(), err(ALL, Errno::EINVAL)]),
        control("START_DEV", "pid -1", start, data(u64::from(u32::MAX))).gives([gone(), err(ALL, Errno::EINVAL)]),
        // Before 6.18 nobody asks whose pid it is.
        control("START_DEV", "somebody else's pid", start, data(1))
            .gives([
                gone(),
                err(&[Added], Errno::EINVAL),
                err(&[Quiesced], Errno::EEXIST).before(V6_16),
                err(&[Dead, Quiesced, FailIo], Errno::EINVAL).before(V7_1),
                waits(&[Configured, Opened, Partly, Dead, Quiesced, FailIo, Deleting]),
                ok(&[Ready]).before(V6_16),
                err(&[Live, LiveRecoverable, Held, StoppedOpen, Recovering], Errno::EEXIST).before(V6_16),
                err(ALL, Errno::EINVAL),
            ])
            .gated(&START_AFTER_STOP, &[Stopped])
            .gated(&START_AFTER_DEATH, &[Dead]),
        control("STOP_DEV", "", ublk::CMD_STOP_DEV, plain).gives([
            gone(),
            rule(&[Held], Expected::WaitsForServer),
            ok(ALL),
        ]),
        control("TRY_STOP_DEV", "", ublk::CMD_TRY_STOP_DEV, plain).gives([
            gone(),
            err(ALL, Errno::EOPNOTSUPP).before(V7_0),
            err(UNSTARTED, Errno::ENODEV),
            err(&[Held], Errno::EBUSY),
            ok(ALL),
        ]),
        control("DEL_DEV", "", ublk::CMD_DEL_DEV, plain).gives([
            gone(),
            ok(&[Added, Configured, Dead, Quiesced, FailIo]),
            rule(ALL, Expected::WaitsForHolders),
        ]),
        control("DEL_DEV_ASYNC", "", ublk::CMD_DEL_DEV_ASYNC, plain).gives([
            gone(),
            rule(&[Held], Expected::WaitsForServer),
            ok(ALL),
        ]),
    ]
}

fn recovery() -> Vec<Probe> {
    const UNFETCHED: &[State] = &[Added, Configured, Opened, Partly, Quiesced, FailIo, Deleting];
    const RECOVERABLE: &[State] = &[LiveRecoverable, Quiesced, Recovering, FailIo];
    let begin = ublk::CMD_START_USER_RECOVERY;
    let end = ublk::CMD_END_USER_RECOVERY;
    let pid = |rig: &Rig, command| RawCommand { data: u64::from(rig.server_pid()), ..command };
    vec![
        control("START_USER_RECOVERY", "", begin, plain).gives([
            gone(),
            ok(&[Quiesced, FailIo]),
            err(RECOVERABLE, Errno::EBUSY),
            err(ALL, Errno::EINVAL),
        ]),
        // It waits for every tag before it looks whether there is anything to end.
        control("END_USER_RECOVERY", "", end, pid)
            .gives([
                gone(),
                ok(&[Recovering]),
                err(&[Dead, Quiesced, FailIo], Errno::EINVAL).before(V7_1),
                rule(UNFETCHED, Expected::Waits),
                err(&[LiveRecoverable], Errno::EBUSY),
                rule(&[Dead], Expected::Waits),
                err(ALL, Errno::EINVAL),
            ])
            .gated(&UNBEGUN_RECOVERY, &[Quiesced]),
        control("END_USER_RECOVERY", "pid 0", end, data(0))
            .gives([
                gone(),
                err(&[Dead, Quiesced, FailIo], Errno::EINVAL).before(V7_1),
                rule(UNFETCHED, Expected::Waits),
                err(&[LiveRecoverable], Errno::EBUSY).before(V6_16),
                ok(&[Recovering]).before(V6_16),
                rule(&[Dead], Expected::Waits),
                err(ALL, Errno::EINVAL),
            ])
            .gated(&UNBEGUN_RECOVERY, &[Quiesced]),
        control("QUIESCE_DEV", "", ublk::CMD_QUIESCE_DEV, data(1000)).gives([
            gone(),
            err(ALL, Errno::EOPNOTSUPP).before(V6_16),
            ok(RECOVERABLE),
            err(ALL, Errno::EOPNOTSUPP),
        ]),
    ]
}

fn extras() -> Vec<Probe> {
    const BEFORE_START: &[State] = &[Added, Configured, Opened, Partly, Ready, StoppedOpen, Stopped, Dead, Deleting];
    vec![
        control("UPDATE_SIZE", "the same", ublk::CMD_UPDATE_SIZE, data(SECTORS))
            .gives([gone(), err(ALL, Errno::EOPNOTSUPP).before(V6_16), err(BEFORE_START, Errno::ENODEV), ok(ALL)])
            .gated(&UPDATE_SIZE_UNSTARTED, BEFORE_START),
        control("REG_BUF", "without shared memory", ublk::CMD_REG_BUF, room(24))
            .gives([gone(), err(ALL, Errno::EOPNOTSUPP)]),
        control("UNREG_BUF", "without shared memory", ublk::CMD_UNREG_BUF, data(0))
            .gives([gone(), err(ALL, Errno::EOPNOTSUPP)]),
    ]
}

fn unknown() -> Vec<Probe> {
    let numbered = |variant, operation| {
        control("unknown", variant, operation, room(64)).gives([gone(), err(ALL, Errno::EOPNOTSUPP)])
    };
    vec![
        numbered("0x7f", 0xc020_757f),
        numbered("0", 0xc020_7500),
        numbered("3", 0xc020_7503),
        numbered("an I/O command's number", ublk::IO_FETCH_REQ),
        numbered("0x7f, bare", 0x7f),
        control("unknown", "another driver's type", 0x8020_7602, room(64)).gives([err(ALL, Errno::EOPNOTSUPP)]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gates::KernelVersion;

    /// On every kernel that there is a table for, each cell has an outcome, and no rule is there for nothing.
    #[test]
    fn the_table_has_no_holes_and_nothing_idle() {
        let kernels =
            [KernelVersion(6, 12, 117), KernelVersion(6, 18, 15), KernelVersion(7, 2, 12), KernelVersion(7, 3, 0)];
        for probe in super::super::probes() {
            let mut used = vec![false; probe.rules.len()];
            for kernel in kernels {
                for &state in probe.states {
                    let rule = probe.rules.iter().position(|rule| rule.fits(state, kernel));
                    let rule = rule.unwrap_or_else(|| panic!("{} when {state} on {kernel}", probe.name()));
                    used[rule] = true;
                }
            }
            assert!(used.iter().all(|used| *used), "{}: {used:?}", probe.name());
        }
    }

    #[test]
    fn names_tell_commands_apart() {
        let mut names: Vec<_> = super::super::probes().iter().map(Probe::name).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(names.iter().all(|name| !name.contains(';')));
    }
}
