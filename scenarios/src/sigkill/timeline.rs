//! When servers died and others took over, and what an operation may come to in view of that.
//!
//! All times are nanoseconds of `CLOCK_MONOTONIC`, of the loading process alone: an operation is said to have begun before
//! it was submitted and to have ended after its end was seen, and the times of a death are chosen so that what is called
//! wrong was wrong for certain, whatever was slow.

use nix::libc;

use super::mode::Mode;

/// One death of a server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Death {
    /// It was alive before.
    pub(super) killed: u64,
    /// Its process is gone, and the driver has the device in the state that the mode says.
    pub(super) gone: Option<u64>,
    /// The next server may serve from here on.
    pub(super) recovering: Option<u64>,
    /// The next server serves.
    pub(super) recovered: Option<u64>,
}

/// The life of a device.
#[derive(Clone, Debug)]
pub(super) struct Timeline {
    pub(super) mode: Mode,
    pub(super) deaths: Vec<Death>,
    /// It is being stopped or deleted: what waits for a server fails.
    pub(super) ending: Option<u64>,
}

/// What an operation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// All of it was done.
    Done,
    /// It failed with this errno.
    Failed(i32),
    /// It moved less than it was to.
    Short,
}

/// What that is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judged {
    /// As on any day.
    Fine,
    /// Done after all: it was in flight, or came later, while nobody served.
    Survived,
    /// The server had it in hand, or the device is dead.
    InFlight,
    /// It came while nobody served, and was turned away.
    Refused,
    /// It should not have ended so.
    Wrong(&'static str),
}

impl Timeline {
    pub(super) const fn new(mode: Mode) -> Self {
        Self { mode, deaths: Vec::new(), ending: None }
    }

    /// The death that was not got over yet, if there is one.
    pub(super) fn open(&self) -> Option<&Death> {
        self.deaths.last().filter(|death| death.recovered.is_none())
    }

    pub(super) fn open_mut(&mut self) -> Option<&mut Death> {
        self.deaths.last_mut().filter(|death| death.recovered.is_none())
    }

    /// Judges an operation.
    pub(super) fn judge(&self, began: u64, ended: u64, how: Ended) -> Judged {
        match how {
            Ended::Done => self.judge_done(began, ended),
            Ended::Short if self.mode == Mode::None => self.judge_failed(began, ended, libc::EIO),
            // A disk that was deleted has no capacity: a read of it meets its end.
            Ended::Short => self.ended_by_the_end(ended, "it moved less than it was to"),
            Ended::Failed(errno) => self.judge_failed(began, ended, errno),
        }
    }

    fn judge_done(&self, began: u64, ended: u64) -> Judged {
        let unserved = |death: &Death| {
            death.gone.is_some_and(|gone| began > gone) && death.recovering.is_none_or(|again| ended < again)
        };
        if self.deaths.iter().any(unserved) {
            return Judged::Wrong("it succeeded while there was no server");
        }
        let across = |death: &Death| death.recovering.is_some_and(|again| began < again && ended > again);
        if self.deaths.iter().any(across) { Judged::Survived } else { Judged::Fine }
    }

    fn judge_failed(&self, began: u64, ended: u64, errno: i32) -> Judged {
        let after = |death: &&Death| ended >= death.killed;
        let Some(first) = self.deaths.first() else { return self.ended_by_the_end(ended, "no server had died") };
        let in_hand = || self.deaths.iter().filter(after).any(|death| death.gone.is_none_or(|gone| began < gone));
        let unserved = || {
            self.deaths.iter().filter(after).any(|death| death.recovered.is_none_or(|recovered| began < recovered))
        };
        match (self.mode, errno) {
            // A dead disk has no capacity either.
            (Mode::None, libc::EIO | libc::ENXIO | libc::ENODEV | libc::ENOSPC) if ended >= first.killed => {
                Judged::InFlight
            }
            (Mode::Wait | Mode::FailIo, libc::EIO) if in_hand() => Judged::InFlight,
            (Mode::FailIo, libc::EREMOTEIO) if unserved() => Judged::Refused,
            (Mode::None, _) => {
                self.ended_by_the_end(ended, "the server was alive, or a dead disk says something else")
            }
            (Mode::Wait, _) => self.ended_by_the_end(ended, "no server had it in hand: it should have waited"),
            (Mode::Reissue, _) => self.ended_by_the_end(ended, "nothing fails where requests are issued again"),
            (Mode::FailIo, _) => self.ended_by_the_end(ended, "no server had it in hand, or it is not EREMOTEIO"),
        }
    }

    fn ended_by_the_end(&self, ended: u64, otherwise: &'static str) -> Judged {
        if self.ending.is_some_and(|ending| ended >= ending) { Judged::InFlight } else { Judged::Wrong(otherwise) }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    fn timeline(mode: Mode) -> Timeline {
        let death = Death { killed: 100, gone: Some(200), recovering: Some(300), recovered: Some(400) };
        Timeline { mode, deaths: vec![death], ending: None }
    }

    fn wrong(judged: Judged) -> bool {
        matches!(judged, Judged::Wrong(_))
    }

    #[test]
    fn without_a_death_nothing_fails() {
        for mode in Mode::value_variants().iter().copied() {
            let timeline = Timeline::new(mode);
            assert_eq!(timeline.judge(1, 2, Ended::Done), Judged::Fine);
            assert!(wrong(timeline.judge(1, 2, Ended::Failed(libc::EIO))));
            assert!(wrong(timeline.judge(1, 2, Ended::Short)));
        }
    }

    #[test]
    fn what_was_in_hand_fails_and_what_came_later_waits() {
        let wait = timeline(Mode::Wait);
        assert_eq!(wait.judge(50, 150, Ended::Failed(libc::EIO)), Judged::InFlight);
        assert_eq!(wait.judge(150, 350, Ended::Failed(libc::EIO)), Judged::InFlight, "it may have been in hand");
        assert!(wrong(wait.judge(250, 350, Ended::Failed(libc::EIO))), "it came when the server was gone");
        assert!(wrong(wait.judge(50, 90, Ended::Failed(libc::EIO))), "the server was alive");
        assert!(wrong(wait.judge(50, 150, Ended::Failed(libc::EREMOTEIO))));
        assert_eq!(wait.judge(50, 350, Ended::Done), Judged::Survived);
        assert_eq!(wait.judge(450, 460, Ended::Done), Judged::Fine);
        assert!(wrong(wait.judge(250, 260, Ended::Done)), "nobody was there to do it");
    }

    #[test]
    fn where_requests_are_issued_again_nothing_fails() {
        let reissue = timeline(Mode::Reissue);
        assert!(wrong(reissue.judge(50, 150, Ended::Failed(libc::EIO))));
        assert_eq!(reissue.judge(50, 350, Ended::Done), Judged::Survived);
    }

    #[test]
    fn where_io_fails_it_fails_until_there_is_a_server() {
        let fail = timeline(Mode::FailIo);
        assert_eq!(fail.judge(50, 150, Ended::Failed(libc::EIO)), Judged::InFlight);
        assert_eq!(fail.judge(250, 260, Ended::Failed(libc::EREMOTEIO)), Judged::Refused);
        assert!(wrong(fail.judge(250, 260, Ended::Failed(libc::EIO))));
        assert!(wrong(fail.judge(450, 460, Ended::Failed(libc::EREMOTEIO))), "there is a server again");
        assert!(wrong(fail.judge(250, 260, Ended::Done)));
    }

    #[test]
    fn a_dead_disk_fails_everything_for_ever() {
        let none = Timeline {
            deaths: vec![Death { killed: 100, gone: Some(200), ..Death::default() }],
            ..Timeline::new(Mode::None)
        };
        for errno in [libc::EIO, libc::ENOSPC, libc::ENXIO] {
            assert_eq!(none.judge(500, 600, Ended::Failed(errno)), Judged::InFlight);
        }
        assert_eq!(none.judge(500, 600, Ended::Short), Judged::InFlight);
        assert!(wrong(none.judge(500, 600, Ended::Done)));
        assert!(wrong(none.judge(500, 600, Ended::Failed(libc::EINVAL))));
    }

    #[test]
    fn a_device_that_is_deleted_fails_what_waits() {
        for mode in [Mode::Wait, Mode::Reissue] {
            let mut timeline = timeline(mode);
            timeline.deaths[0].recovering = None;
            timeline.deaths[0].recovered = None;
            timeline.ending = Some(500);
            assert_eq!(timeline.judge(250, 600, Ended::Failed(libc::EIO)), Judged::InFlight);
            assert_eq!(timeline.judge(250, 600, Ended::Short), Judged::InFlight);
            assert!(wrong(timeline.judge(250, 450, Ended::Failed(libc::EIO))));
            assert!(wrong(timeline.judge(250, 450, Ended::Short)));
        }
    }
}
