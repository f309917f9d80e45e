//! What a command is expected to give: rules by state and kernel, the first that fits.

use std::fmt;

use nix::errno::Errno;
use ublkit::raw::{Payload, RawCommand};

use super::lab::{self, Rig};
use super::protocol::{Addr, Io};
use super::state::State;
use crate::gates::{Gate, KernelVersion};

/// The end of time.
const NEVER: KernelVersion = KernelVersion(u32::MAX, 0, 0);

/// What a command gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Success: 0, or for an I/O command that stays with the driver, no answer.
    Ok,
    /// This errno.
    Err(Errno),
    /// No answer until it is cancelled; EINTR then.
    Waits,
    /// No answer until the request in the server's hands is completed; success then.
    WaitsForServer,
    /// No answer until nobody holds the device any more; success then.
    WaitsForHolders,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Err(errno) => write!(f, "{errno:?}"),
            Self::Waits => f.write_str("waits until cancelled"),
            Self::WaitsForServer => f.write_str("waits for the server"),
            Self::WaitsForHolders => f.write_str("waits for the holders"),
        }
    }
}

/// In these states, on these kernels, that is the outcome.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    states: &'static [State],
    before: KernelVersion,
    pub(super) expected: Expected,
}

impl Rule {
    pub(super) fn fits(&self, state: State, kernel: KernelVersion) -> bool {
        self.states.contains(&state) && kernel < self.before
    }

    /// Up to this kernel, without it.
    pub(super) const fn before(mut self, kernel: KernelVersion) -> Self {
        self.before = kernel;
        self
    }
}

/// A rule for some states, on every kernel.
pub(super) const fn rule(states: &'static [State], expected: Expected) -> Rule {
    Rule { states, before: NEVER, expected }
}

/// A rule for some states: they refuse.
pub(super) const fn err(states: &'static [State], errno: Errno) -> Rule {
    rule(states, Expected::Err(errno))
}

/// A rule for some states: they do it.
pub(super) const fn ok(states: &'static [State]) -> Rule {
    rule(states, Expected::Ok)
}

/// What is tried.
#[derive(Clone, Debug)]
pub(super) enum Action {
    /// A control command.
    Control(RawCommand),
    /// An I/O command of the server's, from its own or from another thread.
    Io(Io, bool),
    /// A mapping of descriptors: offset, length, writable.
    Map(usize, usize, bool),
}

/// Says what is wrong with the payload that a command came back with.
type Answers = fn(&[u8]) -> Option<String>;

/// A command in one of its variants.
pub(super) struct Probe {
    pub(super) command: &'static str,
    pub(super) variant: &'static str,
    pub(super) action: Box<dyn Fn(&Rig) -> Action>,
    pub(super) states: &'static [State],
    pub(super) rules: Vec<Rule>,
    /// Changes nothing even when it succeeds.
    pub(super) reads: bool,
    /// Changes something even when it is refused.
    pub(super) spoils: bool,
    /// What is wrong with an answer.
    pub(super) answers: Option<Answers>,
    /// Bugs of some kernels in some states.
    pub(super) gates: Vec<(&'static Gate, &'static [State])>,
}

impl Probe {
    /// The outcome in a state on a kernel.
    pub(super) fn expected(&self, state: State, kernel: KernelVersion) -> Option<Expected> {
        self.rules.iter().find(|rule| rule.fits(state, kernel)).map(|rule| rule.expected)
    }

    pub(super) fn name(&self) -> String {
        if self.variant.is_empty() { self.command.to_owned() } else { format!("{} ({})", self.command, self.variant) }
    }

    /// Whether it leaves everything as it was.
    pub(super) fn is_harmless(&self, expected: Expected) -> bool {
        !self.spoils && (self.reads || matches!(expected, Expected::Err(_) | Expected::Waits))
    }

    /// It changes nothing even when it succeeds.
    pub(super) fn reads(mut self) -> Self {
        self.reads = true;
        self
    }

    /// It changes something even when it is refused.
    pub(super) fn spoils(mut self) -> Self {
        self.spoils = true;
        self
    }

    /// It makes sense in these states alone.
    pub(super) fn only(mut self, states: &'static [State]) -> Self {
        self.states = states;
        self
    }

    /// If it succeeds, this says what is wrong with its answer.
    pub(super) fn answers(mut self, answers: Answers) -> Self {
        self.answers = Some(answers);
        self
    }

    /// In these states it meets a kernel's own bug.
    pub(super) fn gated(mut self, gate: &'static Gate, states: &'static [State]) -> Self {
        self.gates.push((gate, states));
        self
    }

    /// The bug of this kernel's that it would meet in a state.
    pub(super) fn gate(&self, state: State, kernel: KernelVersion) -> Option<&'static Gate> {
        let met =
            |(gate, states): &&(&'static Gate, &'static [State])| gate.is_shut(kernel) && states.contains(&state);
        self.gates.iter().find(met).map(|(gate, _)| *gate)
    }

    /// What comes of it.
    pub(super) fn gives<const N: usize>(mut self, rules: [Rule; N]) -> Self {
        self.rules.extend(rules);
        self
    }
}

/// A control command with a payload.
pub(super) fn control(
    command: &'static str,
    variant: &'static str,
    operation: u32,
    shape: impl Fn(&Rig, RawCommand) -> RawCommand + 'static,
) -> Probe {
    Probe {
        command,
        variant,
        action: Box::new(move |rig| Action::Control(shape(rig, lab::command(operation, rig.id)))),
        states: State::ALL,
        rules: Vec::new(),
        reads: false,
        spoils: false,
        answers: None,
        gates: Vec::new(),
    }
}

/// A command without memory.
pub(super) fn plain(_: &Rig, command: RawCommand) -> RawCommand {
    command
}

/// A shape: with this many bytes of room.
pub(super) fn room(len: usize) -> impl Fn(&Rig, RawCommand) -> RawCommand {
    move |_, command| RawCommand { payload: Payload::Bytes(vec![0; len]), ..command }
}

/// A shape: with this argument.
pub(super) fn data(data: u64) -> impl Fn(&Rig, RawCommand) -> RawCommand {
    move |_, command| RawCommand { data, ..command }
}

/// A shape: with other memory.
pub(super) fn memory(payload: Payload) -> impl Fn(&Rig, RawCommand) -> RawCommand {
    move |_, command| RawCommand { payload: payload.clone(), ..command }
}

/// States with a server to send I/O commands.
pub(super) const SERVED: &[State] = &[
    State::Opened,
    State::Partly,
    State::Ready,
    State::Live,
    State::Held,
    State::StoppedOpen,
    State::Stopped,
    State::Recovering,
    State::Deleting,
];

/// An I/O command.
pub(super) fn io(
    command: &'static str,
    variant: &'static str,
    elsewhere: bool,
    io: impl Fn(&Rig) -> Io + 'static,
) -> Probe {
    Probe {
        command,
        variant,
        action: Box::new(move |rig| Action::Io(io(rig), elsewhere)),
        states: SERVED,
        rules: Vec::new(),
        reads: false,
        spoils: false,
        answers: None,
        gates: Vec::new(),
    }
}

/// An I/O command about a tag, with the tag's own buffer.
pub(super) fn about(operation: u32, queue: u16, tag: u16) -> Io {
    Io { operation, queue, tag, result: 0, addr: Addr::Own, batch: None }
}

/// A mapping of the descriptors.
pub(super) fn map(variant: &'static str, offset: usize, len: usize, writable: bool) -> Probe {
    Probe {
        command: "mmap",
        variant,
        action: Box::new(move |_| Action::Map(offset, len, writable)),
        states: SERVED,
        rules: Vec::new(),
        reads: true,
        spoils: false,
        answers: None,
        gates: Vec::new(),
    }
}
