//! Walks through the states of a device, drawn from the seed, with commands of the table strewn in.
//!
//! The model is the table itself: it says what each command gives in the state that the walk has reached, and that most of
//! them change nothing. What only shows after a history of refused commands, recoveries and restarts shows here.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use ublkit::raw::RawCommand;
use ublkit::sys::ublk;
use ublkit_harness::Seed;
use ublkit_harness::seed::SeededRng;

use super::cells::Outcome;
use super::expect::{Expected, Probe, about};
use super::lab::{self, Lab, Rig, named};
use super::protocol::{Call, DEPTH, Reply};
use super::state::State;
use super::steps::{STEPS, Step};
use crate::gates::{ABANDONED_START, KernelVersion};
use crate::scenario::Failure;

/// How long an id may be taken after its device is gone.
const REUSE_DEADLINE: Duration = Duration::from_secs(20);
/// Steps of one walk at most; most end before.
const WALK: usize = 120;
/// How many shorter scripts are tried for one that fails.
const SHRINKS: usize = 24;

/// One step of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// On to another state.
    Go(Step),
    /// A command of the table that changes nothing: its number there.
    Probe(usize),
    /// A command with numbers that nobody knows, made of these bits.
    Wild(u64),
}

/// A walk: the kind of device, by the state that one is asked for, and the steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Script {
    pub(super) device: State,
    pub(super) steps: Vec<Move>,
}

/// A walk that went wrong.
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) script: Script,
}

/// The kinds of devices that walks are about.
const DEVICES: &[State] = &[State::Live, State::LiveRecoverable, State::FailIo];

/// A script as people can hand it on.
pub(super) fn write(script: &Script, probes: &[Probe]) -> String {
    let words = script.steps.iter().map(|one| match one {
        Move::Go(step) => STEPS.iter().find(|(_, it)| it == step).map_or("?", |(name, _)| name).to_owned(),
        Move::Probe(index) => probes.get(*index).map(Probe::name).unwrap_or_default(),
        Move::Wild(bits) => format!("wild:{bits}"),
    });
    std::iter::once(script.device.name().to_owned()).chain(words).collect::<Vec<_>>().join("; ")
}

/// Reads what [`write`] writes.
pub(super) fn read(text: &str, probes: &[Probe]) -> Result<Script, String> {
    let word = |word: &str| {
        if let Some((_, step)) = STEPS.iter().find(|(name, _)| *name == word) {
            return Ok(Move::Go(*step));
        }
        if let Some(bits) = word.strip_prefix("wild:").and_then(|bits| bits.parse().ok()) {
            return Ok(Move::Wild(bits));
        }
        let index = probes.iter().position(|probe| probe.name() == word);
        index.map(Move::Probe).ok_or_else(|| format!("'{word}' is no step and no command of the table"))
    };
    let mut words = text.split(';').map(str::trim).filter(|text| !text.is_empty());
    let first = words.next().unwrap_or_default();
    let device = DEVICES.iter().find(|device| device.name() == first).copied();
    let device = device
        .ok_or_else(|| format!("'{first}' is no kind of device: begin with live, live-recoverable or fail-io"))?;
    Ok(Script { device, steps: words.map(word).collect::<Result<_, _>>()? })
}

/// The ways on from a state; none where a walk ends.
fn ways(rig: &Rig, kernel: KernelVersion) -> Vec<Step> {
    let (state, open) = (rig.state, rig.client.is_some());
    let mut ways = match state {
        State::Absent => vec![Step::Add],
        State::Added => vec![Step::Configure, Step::Configure, Step::Configure, Step::Delete],
        State::Configured => vec![Step::Open],
        State::Opened => vec![Step::FetchOne, Step::FetchOne, Step::FetchOne, Step::DeleteAsync],
        State::Partly => vec![Step::FetchRest],
        State::Ready => vec![Step::Start],
        State::Live | State::LiveRecoverable if open => vec![Step::CloseBlock, Step::Stop, Step::Kill],
        State::Live => vec![Step::HoldRead, Step::OpenBlock, Step::Stop, Step::Kill],
        // A read that is held, and then let go, leads to a device without recovery.
        State::LiveRecoverable => vec![Step::OpenBlock, Step::Stop, Step::Kill, Step::Kill],
        State::Held => vec![Step::Release],
        State::Quiesced | State::FailIo => vec![Step::Recover],
        State::Recovering => vec![Step::EndRecovery],
        State::StoppedOpen => vec![Step::CloseBlock],
        State::Stopped | State::Dead | State::Deleting | State::Deleted => vec![],
    };
    // Before 7.2.12 a server that dies with tags fetched and no START leaves something dangling, or does not die.
    if matches!(state, State::Partly | State::Ready)
        && kernel >= KernelVersion(7, 2, 12)
        && !ABANDONED_START.is_shut(kernel)
    {
        ways.push(Step::Abandon);
    }
    ways
}

impl Lab {
    /// One walk, of at most `budget` steps. Adds to `steps` and `commands` what it did.
    pub(super) fn walk(
        &mut self,
        seed: Seed,
        probes: &[Probe],
        counts: &mut Counts,
    ) -> Result<Option<Wrong>, Failure> {
        let mut rng = seed.rng();
        let target = match rng.below(4) {
            0 => State::LiveRecoverable,
            1 if State::FailIo.is_of(self.kernel) => State::FailIo,
            _ => State::Live,
        };
        let mut steps = Vec::new();
        let mut rig = self.absent(target);
        let walked = self.wander(&mut rng, &mut rig, probes, &mut steps, counts);
        let undone = self.finish(rig);
        counts.walks += 1;
        let what = match (walked, undone) {
            (Ok(None), Ok(None)) => return Ok(None),
            (Ok(Some(what)), _) | (Ok(None), Ok(Some(what))) => what,
            (Err(failure @ (Failure::DeviceBroke(_) | Failure::Hang(_))), _) | (Ok(None), Err(failure)) => {
                failure.to_string()
            }
            (Err(failure), _) => return Err(failure),
        };
        Ok(Some(Wrong { what, script: Script { device: target, steps } }))
    }

    fn absent(&self, target: State) -> Rig {
        Rig {
            id: lab::ABSENT_ID,
            state: State::Absent,
            features: self.features_for(target),
            server: None,
            client: None,
            held: None,
        }
    }

    fn wander(
        &mut self,
        rng: &mut SeededRng,
        rig: &mut Rig,
        probes: &[Probe],
        script: &mut Vec<Move>,
        counts: &mut Counts,
    ) -> Result<Option<String>, Failure> {
        while script.len() < WALK {
            let ways = ways(rig, self.kernel);
            let usable: Vec<usize> = (0..probes.len()).filter(|index| self.usable(&probes[*index], rig)).collect();
            let one = match rng.below(8) {
                0 if !ways.is_empty() => Move::Go(ways[rng.below(ways.len() as u64) as usize]),
                0 => break,
                1 => Move::Wild(rng.next_u64() >> 11),
                _ => Move::Probe(usable[rng.below(usable.len() as u64) as usize]),
            };
            script.push(one);
            if let Some(what) = self.step(rig, one, probes, counts)? {
                return Ok(Some(what));
            }
        }
        Ok(None)
    }

    /// Whether a command changes nothing in this state, and does not wait.
    fn usable(&self, probe: &Probe, rig: &Rig) -> bool {
        // Rules tell devices with recovery from others by their state, and many states look the same with and without.
        let early = !matches!(
            rig.state,
            State::LiveRecoverable
                | State::Quiesced
                | State::Recovering
                | State::FailIo
                | State::Absent
                | State::Deleted
        );
        let tells = matches!(probe.command, "START_USER_RECOVERY" | "END_USER_RECOVERY" | "QUIESCE_DEV");
        if early && tells && rig.features.contains(ublk::Features::USER_RECOVERY) {
            return false;
        }
        probe.states.contains(&rig.state)
            && probe.gate(rig.state, self.kernel).is_none()
            && match probe.expected(rig.state, self.kernel) {
                Some(expected @ Expected::Err(_)) => probe.is_harmless(expected),
                // Parameters of all kinds are not what walks begin devices with.
                Some(Expected::Ok) => probe.reads && probe.command != "SET_PARAMS",
                _ => false,
            }
    }

    /// Does one step, and says what was wrong with it.
    fn step(
        &mut self,
        rig: &mut Rig,
        one: Move,
        probes: &[Probe],
        counts: &mut Counts,
    ) -> Result<Option<String>, Failure> {
        counts.steps += 1;
        let before = rig.state;
        match one {
            Move::Go(step) => {
                counts.moves += 1;
                self.advance(rig, step)?;
                let told = self.told(rig)?;
                if told != rig.told() {
                    return Ok(Some(format!("after {step:?} the device is {told:?}, not {}", rig.state)));
                }
            }
            Move::Probe(index) => {
                let Some(probe) = probes.get(index).filter(|probe| self.usable(probe, rig)) else { return Ok(None) };
                let Some(expected) = probe.expected(rig.state, self.kernel) else { return Ok(None) };
                if let Outcome::Wrong(got) = self.probe(rig, probe, expected)? {
                    return Ok(Some(format!("{} when {before}: expected {expected}, got {got}", probe.name())));
                }
            }
            Move::Wild(bits) => return self.wild(rig, bits),
        }
        Ok(None)
    }

    /// A command with a number, an id, a queue or a tag that cannot be.
    fn wild(&mut self, rig: &mut Rig, bits: u64) -> Result<Option<String>, Failure> {
        let (low, mid) = (bits as u32 & 0xffff, (bits >> 16) as u32 & 0xffff);
        if bits >> 52 & 1 == 1 && rig.server.is_some() && rig.state != State::Deleted {
            let (queue, tag) =
                if bits >> 51 & 1 == 1 { (1 + low as u16 % 4000, 0) } else { (0, DEPTH + low as u16 % 4000) };
            let operation = if bits >> 50 & 1 == 1 { ublk::IO_FETCH_REQ } else { ublk::IO_COMMIT_AND_FETCH_REQ };
            let call =
                Call::Io { io: about(operation, queue, tag), patience_ms: 10_000, elsewhere: bits >> 49 & 1 == 1 };
            let reply = rig.server()?.call(&call)?;
            let right = Reply::Result(-(Errno::EINVAL as i32));
            return Ok((reply != right).then(|| format!("{operation:#x} of queue {queue}, tag {tag}: {reply:?}")));
        }
        // Directions and sizes are of no importance; the numbers from 0x30 on are nobody's.
        let operation = (mid << 16) | (0x7530 + low % 0xd0);
        let command = RawCommand { data: bits, ..lab::command(operation, rig.id) };
        let (result, _) = self.send(Some(rig), &command)?;
        let right = if rig.state.told().is_some() { Errno::EOPNOTSUPP } else { Errno::ENODEV };
        Ok((result != -(right as i32))
            .then(|| format!("{operation:#x} when {}: expected {right:?}, got {}", rig.state, named(result))))
    }

    /// Undoes a walk, and looks whether everything is as if it had not been.
    fn finish(&mut self, rig: Rig) -> Result<Option<String>, Failure> {
        let (id, was) = (rig.id, rig.state);
        self.undo(rig)?;
        if id != lab::ABSENT_ID {
            let again = lab::add(id, self.features_for(State::Live));
            // The driver stops describing a device before it lets go of the id.
            let until = Instant::now() + REUSE_DEADLINE;
            let result = loop {
                let (result, _) = self.send(None, &lab::add_command(again))?;
                if result != -(Errno::EEXIST as i32) || Instant::now() > until {
                    break result;
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            if result != 0 {
                return Ok(Some(format!(
                    "the id of a device that was {was} cannot be used again: {}",
                    named(result)
                )));
            }
            self.must(None, &lab::command(ublk::CMD_DEL_DEV, id))?;
        }
        Ok(self.complaints().into_iter().next().map(|line| format!("the kernel says: {line}")))
    }

    /// Runs a script from the beginning.
    pub(super) fn replay(
        &mut self,
        script: &Script,
        probes: &[Probe],
        counts: &mut Counts,
    ) -> Result<Option<String>, Failure> {
        let mut rig = self.absent(script.device);
        let mut wrong = Ok(None);
        for one in &script.steps {
            wrong = self.step(&mut rig, *one, probes, counts);
            if !matches!(wrong, Ok(None)) {
                break;
            }
        }
        let undone = self.finish(rig);
        match (wrong, undone) {
            (Ok(None), undone) => undone,
            (Ok(Some(what)), _) => Ok(Some(what)),
            (Err(failure @ (Failure::DeviceBroke(_) | Failure::Hang(_))), _) => Ok(Some(failure.to_string())),
            (Err(failure), _) => Err(failure),
        }
    }

    /// Leaves out of a script that fails what it does not need to fail.
    pub(super) fn shrink(&mut self, wrong: Wrong, probes: &[Probe]) -> Result<Wrong, Failure> {
        let mut best = wrong;
        let mut counts = Counts::default();
        let mut tries = 0;
        let mut len = best.script.steps.len() / 2;
        while len > 0 && tries < SHRINKS {
            let mut at = 0;
            while at < best.script.steps.len() && tries < SHRINKS {
                let until = (at + len).min(best.script.steps.len());
                let kept = |(index, one): (usize, &Move)| {
                    (!(at..until).contains(&index) || matches!(one, Move::Go(_))).then_some(*one)
                };
                let shorter: Vec<Move> = best.script.steps.iter().enumerate().filter_map(kept).collect();
                if shorter.len() < best.script.steps.len() {
                    tries += 1;
                    let shorter = Script { steps: shorter, ..best.script };
                    if let Some(what) = self.replay(&shorter, probes, &mut counts)? {
                        best = Wrong { what, script: shorter };
                        continue;
                    }
                }
                at = until;
            }
            len /= 2;
        }
        Ok(best)
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) walks: u64,
    pub(super) steps: u64,
    pub(super) moves: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_read_as_they_were_written() {
        let probes = super::super::probes();
        let steps = vec![
            Move::Go(Step::Add),
            Move::Probe(0),
            Move::Wild(77),
            Move::Probe(probes.len() - 1),
            Move::Go(Step::Abandon),
        ];
        let script = Script { device: State::FailIo, steps };
        assert_eq!(read(&write(&script, &probes), &probes), Ok(script));
        assert!(read("live; add; nonsense", &probes).is_err());
        assert!(read("add", &probes).is_err(), "of what kind of device?");
    }
}
