//! Devices in every state, made and undone; and commands to them, each with a deadline.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use ublkit::Controller;
use ublkit::raw::{Payload, RawCommand, RawOutcome};
use ublkit::sys::ublk::{self, DevInfo, Features, ParamBasic, Params};
use ublkit_harness::threads::stacks;

use super::Plant;
use super::peer::Peer;
use super::protocol::{Call, DEPTH, MAX_IO, SECTORS};
use super::state::State;
use super::steps::path;
use crate::context::Context;
use crate::gates::KernelVersion;
use crate::kernel_log::KernelLog;
use crate::runs::RunRecord;
use crate::scenario::Failure;
use crate::server;

/// How long a command may take that waits for nothing a server does.
pub(super) const COMMAND_DEADLINE: Duration = Duration::from_secs(15);
/// How long a command has to be without an answer to count as one that waits.
pub(super) const WAITS: Duration = Duration::from_millis(120);

/// An id that the driver never gives by itself before all others.
pub(super) const ABSENT_ID: u32 = (1 << 20) - 3;

/// A command that is under way.
pub(super) struct Underway {
    answer: Receiver<Result<RawOutcome, ublkit::Error>>,
    called_off: Arc<AtomicBool>,
}

impl Underway {
    /// The answer, if it comes in time.
    pub(super) fn answer(&self, patience: Duration) -> Result<Option<RawOutcome>, Failure> {
        match self.answer.recv_timeout(patience) {
            Ok(outcome) => Ok(Some(outcome?)),
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Failure::Internal("a thread is gone".to_owned())),
        }
    }

    /// Cancels the command.
    pub(super) fn call_off(&self) {
        self.called_off.store(true, Ordering::SeqCst);
    }
}

/// What there is of a device that was made here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It is there.
    There,
    /// It goes when nobody holds it any more.
    Going,
}

/// What a command that succeeded has done to a device: which one, and what there is of it now.
fn effect(command: &RawCommand, payload: &[u8]) -> Option<(u32, Option<Standing>)> {
    let is = |operation: u32| command.operation & 0xff == operation & 0xff;
    if is(ublk::CMD_ADD_DEV) && payload.len() >= size_of::<DevInfo>() {
        return Some((DevInfo::from_bytes(payload).dev_id, Some(Standing::There)));
    }
    let after = if is(ublk::CMD_DEL_DEV) {
        None
    } else if is(ublk::CMD_DEL_DEV_ASYNC) {
        Some(Standing::Going)
    } else {
        return None;
    };
    Some((command.dev_id, after))
}

/// Where devices are made.
pub(super) struct Lab {
    pub(super) controller: Arc<Controller>,
    pub(super) kernel: KernelVersion,
    pub(super) plant: Option<Plant>,
    /// How long a command may take that waits for nothing a server does.
    pub(super) deadline: Duration,
    /// What does not end counts as an outcome, so that a table for a new kernel can be drawn up in one run.
    pub(super) survey: bool,
    record: RunRecord,
    /// The devices that were made here, and whether they are there or go by themselves: no others are deleted.
    made: BTreeMap<u32, Standing>,
    log: Option<KernelLog>,
    /// Commands by name, for the evidence.
    pub(super) sent: BTreeMap<&'static str, u64>,
}

/// A device in a state, with the processes that hold it.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) id: u32,
    pub(super) state: State,
    pub(super) features: Features,
    pub(super) server: Option<Peer>,
    pub(super) client: Option<Peer>,
    /// The tag that the server keeps.
    pub(super) held: Option<u16>,
}

impl Rig {
    pub(super) fn server(&mut self) -> Result<&mut Peer, Failure> {
        self.server.as_mut().ok_or_else(|| Failure::Internal("there is no server".to_owned()))
    }

    pub(super) fn client(&mut self) -> Result<&mut Peer, Failure> {
        if self.client.is_none() {
            self.client = Some(Peer::start()?);
        }
        self.client.as_mut().ok_or_else(|| Failure::Internal("there is no client".to_owned()))
    }

    /// The state as the driver is to tell it.
    pub(super) fn told(&self) -> Option<ublkit::ctrl::State> {
        match self.state {
            State::Recovering if self.features.contains(Features::USER_RECOVERY_FAIL_IO) => State::FailIo.told(),
            state => state.told(),
        }
    }

    pub(super) fn server_pid(&self) -> u32 {
        self.server.as_ref().map_or(std::process::id(), Peer::pid)
    }

    /// Where those who hold it stand, and this process.
    pub(super) fn stacks(&self) -> String {
        let held = [&self.server, &self.client].into_iter().flatten().map(|peer| stacks(peer.pid()));
        held.chain([stacks(std::process::id())]).collect::<Vec<_>>().join("\n")
    }
}

/// A command to a device, without arguments.
pub(super) fn command(operation: u32, id: u32) -> RawCommand {
    RawCommand { operation, dev_id: id, queue_id: u16::MAX, ..RawCommand::default() }
}

/// ADD_DEV as it should be.
pub(super) fn add(id: u32, features: Features) -> DevInfo {
    DevInfo {
        nr_hw_queues: 1,
        queue_depth: DEPTH,
        max_io_buf_bytes: MAX_IO,
        dev_id: id,
        flags: (features | Features::CMD_IOCTL_ENCODE).bits(),
        ..DevInfo::default()
    }
}

pub(super) fn add_command(info: DevInfo) -> RawCommand {
    RawCommand { payload: Payload::Bytes(info.to_bytes()), ..command(ublk::CMD_ADD_DEV, info.dev_id) }
}

/// The parameters that every device here has.
pub(super) fn params() -> Params {
    Params {
        len: size_of::<Params>() as u32,
        types: ublk::PARAM_TYPE_BASIC,
        basic: ParamBasic {
            logical_bs_shift: 9,
            physical_bs_shift: 12,
            io_opt_shift: 12,
            io_min_shift: 9,
            max_sectors: MAX_IO / 512,
            dev_sectors: SECTORS,
            ..ParamBasic::default()
        },
        ..Params::default()
    }
}

pub(super) fn set_params(id: u32, params: &Params) -> RawCommand {
    RawCommand { payload: Payload::Bytes(params.to_bytes()), ..command(ublk::CMD_SET_PARAMS, id) }
}

impl Lab {
    pub(super) fn new(context: &Context, plant: Option<Plant>) -> Result<Self, Failure> {
        Ok(Self {
            controller: Arc::new(Controller::open()?),
            kernel: KernelVersion::here(),
            plant,
            deadline: COMMAND_DEADLINE,
            survey: false,
            record: context.record.clone(),
            made: BTreeMap::new(),
            log: KernelLog::from_here().ok(),
            sent: BTreeMap::new(),
        })
    }

    /// Sends a command that has to end by itself.
    pub(super) fn send(&mut self, rig: Option<&Rig>, command: &RawCommand) -> Result<(i32, Vec<u8>), Failure> {
        match self.controller.command(command, self.deadline)? {
            RawOutcome::Answered { result, mut payload } => {
                self.note(command, result, &payload);
                let result = self.lie(rig.map(|rig| rig.state), command, result, &mut payload);
                Ok((result, payload))
            }
            RawOutcome::Cancelled(_) | RawOutcome::Stuck => {
                let stacks = rig.map_or_else(|| stacks(std::process::id()), Rig::stacks);
                Err(Failure::Hang(format!(
                    "{:#x} to device {} did not end within {:?}\n{stacks}",
                    command.operation, command.dev_id, self.deadline
                )))
            }
        }
    }

    /// Keeps count of the devices that are there: whoever deletes has to know, and so has the next run, if this one is killed.
    pub(super) fn note(&mut self, command: &RawCommand, result: i32, payload: &[u8]) {
        match effect(command, payload).filter(|_| result == 0) {
            Some((id, Some(Standing::There))) => {
                self.made.insert(id, Standing::There);
                self.record.made(id);
                server::watch_over_device(id, true);
            }
            Some((id, Some(Standing::Going))) => {
                if let Some(standing) = self.made.get_mut(&id) {
                    *standing = Standing::Going;
                }
            }
            Some((id, None)) => self.gone(id),
            None => {}
        }
    }

    /// The id is free: whoever has it from here on, it is not this scenario's.
    fn gone(&mut self, id: u32) {
        self.made.remove(&id);
        self.record.gone(id);
        server::watch_over_device(id, false);
    }

    /// What a driver with a planted bug would have said.
    fn lie(&self, state: Option<State>, command: &RawCommand, result: i32, payload: &mut [u8]) -> i32 {
        let sent = || command.operation & 0xff;
        match self.plant {
            Some(Plant::EchoedFlags)
                if sent() == ublk::CMD_ADD_DEV & 0xff && result == 0 && payload.len() >= size_of::<DevInfo>() =>
            {
                let (Payload::Bytes(asked), info) = (&command.payload, DevInfo::from_bytes(payload)) else {
                    return result;
                };
                let info = DevInfo { flags: info.flags | DevInfo::from_bytes(asked).flags, ..info };
                payload[..size_of::<DevInfo>()].copy_from_slice(&info.to_bytes());
                result
            }
            Some(Plant::LostParams)
                if sent() == ublk::CMD_GET_PARAMS & 0xff && result == 0 && payload.len() >= size_of::<Params>() =>
            {
                let params = Params { dma_alignment: 0, ..Params::from_bytes(payload) };
                payload[..size_of::<Params>()].copy_from_slice(&params.to_bytes());
                result
            }
            Some(Plant::EinvalForEbusy) if result == -(Errno::EBUSY as i32) => -(Errno::EINVAL as i32),
            Some(Plant::StaleState)
                if state == Some(State::Stopped)
                    && sent() == ublk::CMD_GET_DEV_INFO & 0xff
                    && result == 0
                    && payload.len() >= 64 =>
            {
                let info = DevInfo { state: ublk::STATE_LIVE, ..DevInfo::from_bytes(payload) };
                payload[..64].copy_from_slice(&info.to_bytes());
                result
            }
            _ => result,
        }
    }

    /// Sends a command and does not wait for its end.
    pub(super) fn begin(&self, command: &RawCommand) -> Underway {
        let called_off = Arc::new(AtomicBool::new(false));
        let (sender, answer) = mpsc::channel();
        let (controller, command, flag) = (Arc::clone(&self.controller), command.clone(), Arc::clone(&called_off));
        thread::spawn(move || {
            let _unheard = sender
                .send(controller.command_until(&command, COMMAND_DEADLINE * 4, &|| flag.load(Ordering::SeqCst)));
        });
        Underway { answer, called_off }
    }

    /// Sends a command that has to succeed.
    pub(super) fn must(&mut self, rig: Option<&Rig>, command: &RawCommand) -> Result<Vec<u8>, Failure> {
        match self.send(rig, command)? {
            (result, payload) if result >= 0 => Ok(payload),
            (result, _) => {
                let at = rig.map_or_else(String::new, |rig| format!(" to the device that is {}", rig.state));
                Err(Failure::broke(
                    "control",
                    format!("command {:#x}{at} gives {}", command.operation, named(result)),
                ))
            }
        }
    }

    /// The features that a device is asked for in order to get to `state`.
    pub(super) fn features_for(&self, state: State) -> Features {
        let mut features = Features::NONE;
        if self.kernel >= KernelVersion(7, 0, 0) {
            // The scan opens the device whenever it likes, which TRY_STOP would see.
            features |= Features::NO_AUTO_PART_SCAN;
        }
        match state {
            State::LiveRecoverable | State::Quiesced | State::Recovering => features |= Features::USER_RECOVERY,
            State::FailIo => features |= Features::USER_RECOVERY | Features::USER_RECOVERY_FAIL_IO,
            _ => {}
        }
        if features.contains(Features::USER_RECOVERY) && self.kernel >= KernelVersion(6, 16, 0) {
            features |= Features::QUIESCE;
        }
        features
    }

    /// A device in `state`.
    pub(super) fn build(&mut self, state: State) -> Result<Rig, Failure> {
        let features = self.features_for(state);
        let rig = Rig { id: ABSENT_ID, state: State::Absent, features, server: None, client: None, held: None };
        let mut rig = rig;
        match self.bring(&mut rig, state) {
            Ok(()) => Ok(rig),
            Err(failure) => {
                // The first failure is the one that is told.
                let _worse = self.undo(rig);
                Err(failure)
            }
        }
    }

    fn bring(&mut self, rig: &mut Rig, state: State) -> Result<(), Failure> {
        for step in path(state) {
            self.advance(rig, *step)?;
        }
        Ok(())
    }

    /// The state as the driver tells it, past every plant.
    pub(super) fn info(&mut self, id: u32) -> Result<Option<ublkit::ctrl::State>, Failure> {
        match self.controller.get_dev_info(id) {
            Ok(info) => Ok(Some(info.state())),
            Err(error) if error.kind() == ublkit::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes a device, ends who holds it, and sees that its id is free.
    pub(super) fn undo(&mut self, rig: Rig) -> Result<(), Failure> {
        let deadline = std::mem::replace(&mut self.deadline, COMMAND_DEADLINE);
        let undone = self.undo_in_time(rig);
        self.deadline = deadline;
        undone
    }

    fn undo_in_time(&mut self, mut rig: Rig) -> Result<(), Failure> {
        let id = rig.id;
        let there = self.made.get(&id) == Some(&Standing::There);
        // A server that dies with tags fetched and no START, or in the middle of a recovery, is a case of its own.
        if there && matches!(rig.state, State::Opened | State::Partly | State::Ready | State::Recovering) {
            let _refused = self.send(Some(&rig), &command(ublk::CMD_STOP_DEV, id))?;
        }
        if self.plant == Some(Plant::IdLeak) && rig.state == State::Live {
            // Somebody holds the block device and does not let go, if it is still there to be held.
            let _opened = rig.client()?.call(&Call::OpenBlock(id))?;
            if let Some(server) = &mut rig.server {
                server.kill();
            }
        } else {
            for peer in [&mut rig.server, &mut rig.client].into_iter().flatten() {
                peer.kill();
            }
        }
        let deleted = self.delete_all(&rig);
        let ended = end(rig);
        deleted?;
        ended?;
        let going: Vec<u32> = self.made.keys().copied().collect();
        for id in going {
            self.until(&format!("the id {id} is free"), |lab| Ok(lab.info(id)?.is_none()))?;
            self.gone(id);
        }
        Ok(())
    }

    /// Deletes every device that was made here and does not go by itself: the rig's, and what commands have made beside it.
    fn delete_all(&mut self, rig: &Rig) -> Result<(), Failure> {
        let there: Vec<u32> =
            self.made.iter().filter(|(_, standing)| **standing == Standing::There).map(|(id, _)| *id).collect();
        for id in there {
            let (result, _) = self.send(Some(rig), &command(ublk::CMD_DEL_DEV, id))?;
            if result != 0 && result != -(Errno::ENODEV as i32) {
                return Err(Failure::broke("control", format!("DEL of device {id} gives {}", named(result))));
            }
        }
        Ok(())
    }

    /// What the kernel has complained of since it was asked last. I/O that fails is none: servers are killed here.
    pub(super) fn complaints(&mut self) -> Vec<String> {
        // Where the log may not be read, the end of the run says so.
        let complaints = self.log.as_mut().map(|log| log.complaints(false)).unwrap_or_default();
        complaints.into_iter().map(|complaint| complaint.what).collect()
    }
}

/// Ends the processes that hold a device.
fn end(rig: Rig) -> Result<(), Failure> {
    [rig.server, rig.client].into_iter().flatten().try_for_each(Peer::end)
}

/// A result as people know it.
pub(super) fn named(result: i32) -> String {
    if result < 0 { format!("{:?}", Errno::from_raw(-result)) } else { result.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_commands_do_to_devices_is_known() {
        // The driver says which id it chose.
        let chosen = DevInfo { dev_id: 7, ..add(7, Features::NONE) }.to_bytes();
        assert_eq!(
            effect(&add_command(add(ublk::ANY_ID, Features::NONE)), &chosen),
            Some((7, Some(Standing::There)))
        );
        assert_eq!(effect(&add_command(add(7, Features::NONE)), &chosen[..63]), None, "too short to be understood");
        assert_eq!(effect(&command(ublk::CMD_DEL_DEV, 7), &[]), Some((7, None)));
        assert_eq!(effect(&command(ublk::CMD_DEL_DEV_ASYNC, 7), &[]), Some((7, Some(Standing::Going))));
        for other in [ublk::CMD_STOP_DEV, ublk::CMD_GET_DEV_INFO, ublk::CMD_SET_PARAMS, ublk::CMD_START_DEV] {
            assert_eq!(effect(&command(other, 7), &chosen), None);
        }
    }
}
