//! Goes through the table: every command, in every state.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ublkit::raw::{Payload, RawCommand, RawOutcome};
use ublkit::sys::ublk::{self, DevInfo, Params};
use ublkit_harness::threads::stacks;

use super::Plant;
use super::expect::{Action, Expected, Probe};
use super::lab::{self, COMMAND_DEADLINE, Lab, Rig, WAITS, named};
use super::protocol::{Call, Reply};
use super::state::State;
use super::steps::Step;
use super::table::V6_16;
use crate::gates::KernelVersion;
use crate::scenario::Failure;

/// How long an I/O command that the driver keeps is watched for an answer.
const KEPT_MS: u64 = 40;

/// How long the character device may be busy after its last holder, this program included, has closed it: that is dealt
/// with in the background, and a recovery cannot begin before.
const RELEASE_DEADLINE: Duration = Duration::from_secs(20);
const BUSY: i32 = -(Errno::EBUSY as i32);

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// As expected.
    Right,
    /// Otherwise: this.
    Wrong(String),
}

impl Lab {
    /// Tries one command on a device, and says whether that came of it which was expected.
    pub(super) fn probe(&mut self, rig: &mut Rig, probe: &Probe, expected: Expected) -> Result<Outcome, Failure> {
        *self.sent.entry(probe.command).or_default() += 1;
        match (probe.action)(rig) {
            Action::Control(command) => match expected {
                Expected::Ok | Expected::Err(_) => {
                    if self.plant == Some(Plant::StopHangs) && probe.command == "STOP_DEV" && rig.state == State::Live
                    {
                        self.advance(rig, Step::HoldRead)?;
                    }
                    let until = Instant::now() + RELEASE_DEADLINE;
                    let begins = probe.command == "START_USER_RECOVERY" && expected == Expected::Ok;
                    let sent = loop {
                        match self.send(Some(rig), &command) {
                            Ok((result, _)) if begins && result == BUSY && Instant::now() < until => {
                                thread::sleep(Duration::from_millis(5));
                            }
                            sent => break sent,
                        }
                    };
                    match sent {
                        Ok((result, payload)) => match judge(expected, result) {
                            Outcome::Right if expected == Expected::Ok => {
                                self.look_at(rig, probe, &command, &payload)
                            }
                            outcome => Ok(outcome),
                        },
                        Err(Failure::Hang(_)) if self.survey => Ok(Outcome::Wrong("no end".to_owned())),
                        Err(failure) => Err(failure),
                    }
                }
                Expected::Waits => {
                    let underway = self.begin(&command);
                    if let Some(early) = underway.answer(WAITS)? {
                        return Ok(Outcome::Wrong(format!("{} at once", told(&early))));
                    }
                    underway.call_off();
                    let ended = underway.answer(COMMAND_DEADLINE)?;
                    let right = RawOutcome::Cancelled(-(Errno::EINTR as i32));
                    Ok(compare(ended.as_ref(), &right))
                }
                Expected::WaitsForServer | Expected::WaitsForHolders => {
                    let underway = self.begin(&command);
                    if let Some(early) = underway.answer(WAITS)? {
                        return Ok(Outcome::Wrong(format!("{} at once", told(&early))));
                    }
                    if expected == Expected::WaitsForServer {
                        rig.server()?.done(&Call::Release)?;
                    } else {
                        for peer in [&mut rig.server, &mut rig.client].into_iter().flatten() {
                            peer.kill();
                        }
                    }
                    match underway.answer(COMMAND_DEADLINE)? {
                        Some(RawOutcome::Answered { result: 0, payload }) => {
                            self.note(&command, 0, &payload);
                            Ok(Outcome::Right)
                        }
                        Some(other) => Ok(Outcome::Wrong(format!("{} after a wait", told(&other)))),
                        None => Err(Failure::Hang(format!("it does not end\n{}", stacks(std::process::id())))),
                    }
                }
            },
            Action::Io(io, elsewhere) => {
                let patience_ms = if expected == Expected::Ok { KEPT_MS } else { 10_000 };
                let reply = rig.server()?.call(&Call::Io { io, patience_ms, elsewhere })?;
                let reply = match reply {
                    Reply::Result(_)
                        if self.plant == Some(Plant::DoubleFetch)
                            && probe.command == "FETCH_REQ"
                            && probe.variant == "first tag"
                            && rig.state == State::Partly =>
                    {
                        Reply::Pending
                    }
                    other => other,
                };
                match reply {
                    Reply::Pending if expected == Expected::Ok => Ok(Outcome::Right),
                    Reply::Pending => Ok(Outcome::Wrong("accepted".to_owned())),
                    Reply::Result(result) => Ok(judge(expected, result)),
                    Reply::Lacking(what) => Err(Failure::Environment(what)),
                }
            }
            Action::Map(offset, len, writable) => match rig.server()?.call(&Call::Map(offset, len, writable))? {
                Reply::Result(result) => Ok(judge(expected, result)),
                Reply::Pending => Err(Failure::Internal("a mapping has no result".to_owned())),
                Reply::Lacking(what) => Err(Failure::Environment(what)),
            },
        }
    }
}

impl Lab {
    /// Whether a command that succeeded says, and has done, what it should.
    fn look_at(&mut self, rig: &Rig, probe: &Probe, command: &RawCommand, answer: &[u8]) -> Result<Outcome, Failure> {
        if let Some(what) = probe.answers.and_then(|answers| answers(answer)) {
            return Ok(Outcome::Wrong(format!("an answer with {what}")));
        }
        let (ublk::CMD_SET_PARAMS, Payload::Bytes(bytes)) = (command.operation, &command.payload) else {
            return Ok(Outcome::Right);
        };
        let set = Params::from_bytes(bytes);
        let ask = Params { len: size_of::<Params>() as u32, ..Params::default() };
        let get = RawCommand { operation: ublk::CMD_GET_PARAMS, ..lab::set_params(rig.id, &ask) };
        let got = Params::from_bytes(&self.must(Some(rig), &get)?);
        *self.sent.entry("GET_PARAMS").or_default() += 1;
        Ok(match difference(&set, &got, known_types(self.kernel)) {
            Some(what) => Outcome::Wrong(format!("parameters that are not those that were set: {what}")),
            None => Outcome::Right,
        })
    }
}

/// The kinds of parameters that a kernel knows, of those that fit into [`Params`].
fn known_types(kernel: KernelVersion) -> u32 {
    let first = ublk::PARAM_TYPE_BASIC | ublk::PARAM_TYPE_DISCARD | ublk::PARAM_TYPE_DEVT | ublk::PARAM_TYPE_ZONED;
    first | if kernel >= V6_16 { ublk::PARAM_TYPE_DMA_ALIGN | ublk::PARAM_TYPE_SEGMENT } else { 0 }
}

/// Where `GET_PARAMS` tells something else than `SET_PARAMS` was told.
fn difference(set: &Params, got: &Params, known: u32) -> Option<String> {
    // The driver adds the numbers of the nodes by itself.
    let types = (set.types & known) | ublk::PARAM_TYPE_DEVT;
    let is = |kind| types & kind != 0;
    if got.types != types {
        return Some(format!("types {:#x} and not {types:#x}", got.types));
    }
    if got.devt.char_major == 0 {
        return Some("no number of the character device".to_owned());
    }
    if got.basic != set.basic {
        return Some(format!("{:?} and not {:?}", got.basic, set.basic));
    }
    if is(ublk::PARAM_TYPE_DISCARD) && got.discard != set.discard {
        return Some(format!("{:?} and not {:?}", got.discard, set.discard));
    }
    if is(ublk::PARAM_TYPE_DMA_ALIGN) && got.dma_alignment != set.dma_alignment {
        return Some(format!("alignment {} and not {}", got.dma_alignment, set.dma_alignment));
    }
    if is(ublk::PARAM_TYPE_SEGMENT) && got.seg != set.seg {
        return Some(format!("{:?} and not {:?}", got.seg, set.seg));
    }
    None
}

fn judge(expected: Expected, result: i32) -> Outcome {
    let right = match expected {
        Expected::Ok => result >= 0,
        Expected::Err(errno) => result == -(errno as i32),
        _ => false,
    };
    if right { Outcome::Right } else { Outcome::Wrong(named(result)) }
}

fn compare(ended: Option<&RawOutcome>, right: &RawOutcome) -> Outcome {
    match ended {
        Some(outcome) if outcome == right => Outcome::Right,
        Some(other) => Outcome::Wrong(told(other)),
        None => Outcome::Wrong("no answer to being cancelled".to_owned()),
    }
}

fn told(outcome: &RawOutcome) -> String {
    match outcome {
        RawOutcome::Answered { result, .. } => named(*result),
        RawOutcome::Cancelled(result) => format!("{} when cancelled", named(*result)),
        RawOutcome::Stuck => "stuck".to_owned(),
    }
}

/// What a run through a state's commands found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) cells: u64,
    pub(super) wrong: Vec<String>,
    /// Cells that there are, gated ones left out.
    pub(super) planned: u64,
    /// Gates that were met, with what was left out.
    pub(super) gated: BTreeSet<(&'static str, String)>,
}

impl Lab {
    /// Tries every command of the table in a state.
    pub(super) fn cells(&mut self, state: State, probes: &[Probe], found: &mut Found) -> Result<(), Failure> {
        let kernel = self.kernel;
        let mut cells: Vec<(&Probe, Expected)> = Vec::new();
        for probe in probes.iter().filter(|probe| probe.states.contains(&state)) {
            if let Some(gate) = probe.gate(state, kernel) {
                found.gated.insert((gate.name, format!("{} when {state}", probe.name())));
                continue;
            }
            let expected = probe.expected(state, kernel).ok_or_else(|| {
                Failure::Internal(format!("the table does not say what {} gives when {state}", probe.name()))
            })?;
            cells.push((probe, expected));
        }
        found.planned = cells.len() as u64;
        // What changes nothing shares a device; the others have one each.
        cells.sort_by_key(|(probe, expected)| !probe.is_harmless(*expected));
        let mut rig = None;
        for (probe, expected) in cells {
            let mut current = match rig.take() {
                Some(mut shared) => {
                    // Commands that change something come last, and only this device has had all the others.
                    if !probe.is_harmless(expected) {
                        found.wrong.extend(self.unchanged(&mut shared)?);
                    }
                    shared
                }
                None => self.build(state)?,
            };
            let outcome = self.probe(&mut current, probe, expected);
            found.cells += 1;
            let outcome = match outcome {
                Ok(outcome) => outcome,
                Err(failure) => {
                    let _worse = self.undo(current);
                    return Err(match failure {
                        Failure::Hang(what) => Failure::Hang(format!("{} when {state}: {what}", probe.name())),
                        other => other,
                    });
                }
            };
            let right = outcome == Outcome::Right;
            if let Outcome::Wrong(got) = outcome {
                found.wrong.push(format!("{} when {state}: expected {expected}, got {got}", probe.name()));
            }
            if right && probe.is_harmless(expected) {
                rig = Some(current);
            } else {
                self.undo_after(current, probe)?;
            }
            found.wrong.extend(
                self.complaints().into_iter().map(|line| format!("{} when {state}: kernel: {line}", probe.name())),
            );
        }
        if let Some(mut rig) = rig {
            found.wrong.extend(self.unchanged(&mut rig)?);
            self.undo(rig)?;
        }
        Ok(())
    }

    /// After everything that should have changed nothing: has it?
    fn unchanged(&mut self, rig: &mut Rig) -> Result<Option<String>, Failure> {
        let state = rig.state;
        let told = self.told(rig)?;
        if told != rig.told() {
            return Ok(Some(format!("after commands that change nothing, a device that was {state} is {told:?}")));
        }
        if matches!(state, State::Live | State::LiveRecoverable) {
            let id = rig.id;
            rig.client()?.done(&Call::Read(id))?;
            let reply = rig.client()?.call(&Call::HasRead { patience_ms: 20_000 })?;
            if reply != Reply::Result(4096) {
                return Ok(Some(format!("after commands that change nothing, a read when {state} gives {reply:?}")));
            }
        }
        Ok(None)
    }

    /// The state as the driver tells it.
    pub(super) fn told(&mut self, rig: &Rig) -> Result<Option<ublkit::ctrl::State>, Failure> {
        use ublkit::ctrl::State as Told;
        let ask = RawCommand { payload: Payload::Bytes(vec![0; 64]), ..lab::command(ublk::CMD_GET_DEV_INFO, rig.id) };
        let (result, payload) = self.send(Some(rig), &ask)?;
        Ok((result == 0).then(|| match DevInfo::from_bytes(&payload).state {
            ublk::STATE_DEAD => Told::Dead,
            ublk::STATE_LIVE => Told::Live,
            ublk::STATE_QUIESCED => Told::Quiesced,
            ublk::STATE_FAIL_IO => Told::FailIo,
            other => Told::Unknown(other),
        }))
    }

    fn undo_after(&mut self, mut rig: Rig, probe: &Probe) -> Result<(), Failure> {
        // What was added or deleted beside the rig's own history is known from the answers.
        if matches!(probe.command, "STOP_DEV" | "TRY_STOP_DEV") && rig.state != State::Deleting {
            rig.state = State::Stopped;
        }
        self.undo(rig)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_that_are_lost_or_changed_are_told() {
        let known = known_types(KernelVersion(7, 2, 12));
        let mut set = lab::params();
        set.types |= ublk::PARAM_TYPE_DISCARD | ublk::PARAM_TYPE_DMA_ALIGN | ublk::PARAM_TYPE_SEGMENT;
        let mut got = set;
        got.types |= ublk::PARAM_TYPE_DEVT;
        got.devt.char_major = 240;
        assert_eq!(difference(&set, &got, known), None);
        let changes: [fn(&mut Params); 7] = [
            |params| params.types &= !ublk::PARAM_TYPE_DEVT,
            |params| params.types &= !ublk::PARAM_TYPE_SEGMENT,
            |params| params.devt.char_major = 0,
            |params| params.basic.dev_sectors += 1,
            |params| params.discard.discard_granularity += 1,
            |params| params.dma_alignment = 511,
            |params| params.seg.max_segments = 1,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut wrong = got;
            change(&mut wrong);
            assert!(difference(&set, &wrong, known).is_some(), "change {number}");
        }
        // What a driver does not know it does not keep.
        got.types &= !(ublk::PARAM_TYPE_DMA_ALIGN | ublk::PARAM_TYPE_SEGMENT);
        assert_eq!(difference(&set, &got, known_types(KernelVersion(6, 12, 117))), None);
    }
}
