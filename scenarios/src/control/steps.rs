//! The ways from one state of a device to another, each taken as a server and its clients would take it.

use std::fs::OpenOptions;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ublkit::raw::RawCommand;
use ublkit::sys::ublk::{self, DevInfo, Features};
use ublkit_harness::threads::stacks;

use super::expect::about;
use super::lab::{Lab, Rig, add, add_command, command, named, params, set_params};
use super::peer::Peer;
use super::protocol::{Call, Reply};
use super::state::State;
use crate::scenario::Failure;

/// A way on from one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Add,
    Configure,
    Open,
    FetchOne,
    FetchRest,
    Start,
    HoldRead,
    Release,
    OpenBlock,
    CloseBlock,
    Stop,
    Kill,
    /// As `Kill`, before it was started.
    Abandon,
    Recover,
    EndRecovery,
    DeleteAsync,
    Delete,
}

/// What they are called in a script.
pub(super) const STEPS: &[(&str, Step)] = &[
    ("add", Step::Add),
    ("configure", Step::Configure),
    ("open", Step::Open),
    ("fetch-one", Step::FetchOne),
    ("fetch-rest", Step::FetchRest),
    ("start", Step::Start),
    ("hold-read", Step::HoldRead),
    ("release", Step::Release),
    ("open-block", Step::OpenBlock),
    ("close-block", Step::CloseBlock),
    ("stop", Step::Stop),
    ("kill", Step::Kill),
    ("abandon", Step::Abandon),
    ("recover", Step::Recover),
    ("end-recovery", Step::EndRecovery),
    ("delete-async", Step::DeleteAsync),
    ("delete", Step::Delete),
];

/// The shortest way to a state from nothing.
pub(super) const fn path(state: State) -> &'static [Step] {
    use Step::{
        Add, Configure, Delete, DeleteAsync, FetchOne, FetchRest, HoldRead, Kill, Open, OpenBlock, Recover, Start,
        Stop,
    };
    match state {
        State::Absent => &[],
        State::Added => &[Add],
        State::Configured => &[Add, Configure],
        State::Opened => &[Add, Configure, Open],
        State::Partly => &[Add, Configure, Open, FetchOne],
        State::Ready => &[Add, Configure, Open, FetchOne, FetchRest],
        State::Live | State::LiveRecoverable => &[Add, Configure, Open, FetchOne, FetchRest, Start],
        State::Held => &[Add, Configure, Open, FetchOne, FetchRest, Start, HoldRead],
        State::StoppedOpen => &[Add, Configure, Open, FetchOne, FetchRest, Start, OpenBlock, Stop],
        State::Stopped => &[Add, Configure, Open, FetchOne, FetchRest, Start, Stop],
        State::Dead | State::Quiesced | State::FailIo => &[Add, Configure, Open, FetchOne, FetchRest, Start, Kill],
        State::Recovering => &[Add, Configure, Open, FetchOne, FetchRest, Start, Kill, Recover],
        State::Deleting => &[Add, Configure, Open, DeleteAsync],
        State::Deleted => &[Add, Delete],
    }
}

impl Lab {
    /// Takes a device one step on.
    #[expect(clippy::too_many_lines, reason = "one short arm for each step")]
    pub(super) fn advance(&mut self, rig: &mut Rig, step: Step) -> Result<(), Failure> {
        rig.state = match step {
            Step::Add => {
                let info = add(ublk::ANY_ID, rig.features);
                let payload = self.must(None, &add_command(info))?;
                rig.id = DevInfo::from_bytes(&payload).dev_id;
                State::Added
            }
            Step::Configure => {
                self.must(Some(rig), &set_params(rig.id, &params()))?;
                State::Configured
            }
            Step::Open => {
                let mut server = Peer::start()?;
                let opened = self.open(&mut server, rig.id);
                rig.server = Some(server);
                opened?;
                State::Opened
            }
            Step::FetchOne => {
                Self::fetch(rig, 0)?;
                State::Partly
            }
            Step::FetchRest => {
                Self::fetch(rig, 1)?;
                State::Ready
            }
            Step::Start => {
                let start = command(ublk::CMD_START_DEV, rig.id);
                self.must(Some(rig), &RawCommand { data: u64::from(rig.server_pid()), ..start })?;
                settle();
                if rig.features.contains(Features::USER_RECOVERY) { State::LiveRecoverable } else { State::Live }
            }
            Step::HoldRead => {
                let id = rig.id;
                rig.server()?.done(&Call::Hold)?;
                rig.client()?.done(&Call::Read(id))?;
                match rig.server()?.call(&Call::Held { patience_ms: 20_000 })? {
                    Reply::Result(tag) => rig.held = Some(tag as u16),
                    Reply::Lacking(what) => return Err(Failure::Environment(what)),
                    Reply::Pending => {
                        return Err(Failure::Hang(format!("a read does not reach the server\n{}", rig.stacks())));
                    }
                }
                State::Held
            }
            Step::Release => {
                rig.server()?.done(&Call::Release)?;
                rig.held = None;
                let reply = rig.client()?.call(&Call::HasRead { patience_ms: 20_000 })?;
                if reply != Reply::Result(4096) {
                    return Err(Failure::broke(
                        "control",
                        format!("a read that was kept for a while gives {reply:?}"),
                    ));
                }
                // Whoever read has closed the device; nobody holds it now.
                if let Some(client) = rig.client.take() {
                    client.end()?;
                }
                State::Live
            }
            Step::Abandon => {
                if let Some(server) = rig.server.take() {
                    server.end()?;
                }
                State::Dead
            }
            Step::OpenBlock => {
                let id = rig.id;
                rig.client()?.done(&Call::OpenBlock(id))?;
                rig.state
            }
            Step::CloseBlock => {
                if let Some(client) = rig.client.take() {
                    client.end()?;
                }
                if rig.state == State::StoppedOpen { State::Stopped } else { rig.state }
            }
            Step::Stop => {
                self.must(Some(rig), &command(ublk::CMD_STOP_DEV, rig.id))?;
                if rig.client.is_some() { State::StoppedOpen } else { State::Stopped }
            }
            Step::Kill => {
                let server = rig.server.take().ok_or_else(|| Failure::Internal("no server to kill".to_owned()))?;
                server.end()?;
                let next = if rig.features.contains(Features::USER_RECOVERY_FAIL_IO) {
                    State::FailIo
                } else if rig.features.contains(Features::USER_RECOVERY) {
                    State::Quiesced
                } else {
                    State::Dead
                };
                self.wait_told(rig.id, next)?;
                self.wait_released(rig.id)?;
                next
            }
            Step::Recover => {
                // The old server's hold on the character device ends a moment after the state says that it is gone.
                let begin = command(ublk::CMD_START_USER_RECOVERY, rig.id);
                self.until("a recovery can begin", |lab| {
                    let (result, _) = lab.send(None, &begin)?;
                    Ok(result == 0)
                })?;
                let mut server = Peer::start()?;
                let opened = self.open(&mut server, rig.id);
                rig.server = Some(server);
                opened?;
                Self::fetch(rig, 0)?;
                Self::fetch(rig, 1)?;
                State::Recovering
            }
            Step::EndRecovery => {
                let end = command(ublk::CMD_END_USER_RECOVERY, rig.id);
                self.must(Some(rig), &RawCommand { data: u64::from(rig.server_pid()), ..end })?;
                settle();
                State::LiveRecoverable
            }
            Step::DeleteAsync => {
                self.must(Some(rig), &command(ublk::CMD_DEL_DEV_ASYNC, rig.id))?;
                State::Deleting
            }
            Step::Delete => {
                self.must(Some(rig), &command(ublk::CMD_DEL_DEV, rig.id))?;
                State::Deleted
            }
        };
        Ok(())
    }

    /// Opens the character device, once its last holder has let go of it: that takes the kernel a moment.
    fn open(&mut self, server: &mut Peer, id: u32) -> Result<(), Failure> {
        let busy = Reply::Result(-(Errno::EBUSY as i32));
        self.until("the character device can be opened", |_| match server.call(&Call::Open(id))? {
            Reply::Result(0) => Ok(true),
            Reply::Lacking(what) => Err(Failure::Environment(what)),
            other if other == busy => Ok(false),
            // udev has not made the node yet.
            Reply::Result(result) if result == -(Errno::ENOENT as i32) => Ok(false),
            other => Err(Failure::broke("control", format!("open of the character device gives {other:?}"))),
        })
    }

    /// Waits until the driver has put a device back in order after its server's end: the state is told before that is done.
    /// Until then the character device cannot be opened; and opening it changes nothing.
    fn wait_released(&mut self, id: u32) -> Result<(), Failure> {
        let path = ublkit::ctrl::character_path(id);
        self.until("the character device is free", |_| {
            match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(_) => Ok(true),
                Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(false),
                Err(error) => Err(Failure::io(format!("open {}", path.display()), &error)),
            }
        })?;
        // Now for the end of that opening.
        self.until("the character device is free again", |_| Ok(OpenOptions::new().read(true).open(&path).is_ok()))
    }

    fn fetch(rig: &mut Rig, tag: u16) -> Result<(), Failure> {
        let call = Call::Io { io: about(ublk::IO_FETCH_REQ, 0, tag), patience_ms: 0, elsewhere: false };
        match rig.server()?.call(&call)? {
            Reply::Pending => Ok(()),
            Reply::Lacking(what) => Err(Failure::Environment(what)),
            Reply::Result(result) => {
                Err(Failure::broke("control", format!("FETCH of tag {tag} gives {}", named(result))))
            }
        }
    }

    fn wait_told(&mut self, id: u32, state: State) -> Result<(), Failure> {
        self.until(&format!("the device is {state}"), |lab| Ok(lab.info(id)? == state.told()))
    }

    pub(super) fn until(
        &mut self,
        what: &str,
        mut is: impl FnMut(&mut Self) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        // On 6.12 a queue whose tags are all at the server is given up only when the block layer's own timeout of 30 s has passed.
        let deadline = Instant::now() + Duration::from_secs(50);
        while !is(self)? {
            if Instant::now() > deadline {
                return Err(Failure::Hang(format!("waited 50 s until {what}\n{}", stacks(std::process::id()))));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// Waits until udev has looked at a new disk, where there is udev.
fn settle() {
    // It may not be there, and what it does not wait for only makes a later command wait.
    let _ = Command::new("udevadm")
        .args(["settle", "--timeout=20"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
