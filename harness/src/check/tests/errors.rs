//! What errors of a medium show.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::plan::OpKind;

/// What is done about an error of the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is passed on.
    Tell,
    /// One more try, and then it is passed on.
    TryAgain,
    /// Operations of this kind succeed nevertheless.
    Swallow(OpKind),
    /// It is passed on, and everything that is written later fails too.
    GiveUp,
}

struct OnFailing {
    disk: MediumDisk,
    answer: Answer,
    gone: AtomicBool,
}

impl OnFailing {
    fn open(medium: Medium, answer: Answer) -> Self {
        let geometry = Geometry::bytes(medium.options().bytes).fua().write_zeroes().discard(4096);
        Self { disk: MediumDisk::new(medium, geometry), answer, gone: AtomicBool::new(false) }
    }

    fn call(&self, kind: OpKind, mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let result = match self.answer {
            Answer::GiveUp if kind == OpKind::Write && self.gone.load(Ordering::Relaxed) => {
                return Err(io::ErrorKind::ReadOnlyFilesystem.into());
            }
            Answer::TryAgain => call().or_else(|_| call()),
            _ => call(),
        };
        if result.is_err() {
            self.gone.store(true, Ordering::Relaxed);
        }
        if self.answer == Answer::Swallow(kind) { Ok(()) } else { result }
    }
}

impl Backend for OnFailing {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.call(OpKind::Read, || self.disk.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        self.call(OpKind::Write, || self.disk.write_at(buf, offset, flags))
    }

    fn flush(&self) -> io::Result<()> {
        self.call(OpKind::Flush, || self.disk.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(OpKind::Discard, || self.disk.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.call(OpKind::WriteZeroes, || self.disk.write_zeroes(offset, len, flags))
    }
}

fn answering(answer: Answer, errors: bool) -> Result<Checked, Box<Found>> {
    let open = move |medium: Medium| OnFailing::open(medium, answer);
    check(open).seeds(40).ops(1000).medium_bytes(256 << 10).discard_reads_zeroes().medium_errors(errors).try_run()
}

#[test]
fn who_tells_of_an_error_or_gets_over_it_is_right() {
    let checked = answering(Answer::Tell, true).expect("a right one");
    let count = |name: &str| checked.evidence().count(name);
    assert!(checked.medium_errors() > 500 && count("errors_seen_EIO") > checked.medium_errors() / 2, "{checked}");
    assert!(checked.to_string().contains(" errors of the medium"), "{checked}");
    assert!(checked.power_cuts() > 100 && count("kills") > 100 && count("reopens") > 20, "{checked}");
    let checked = answering(Answer::TryAgain, true).expect("a right one");
    let seen = checked.evidence().count("errors_seen_EIO");
    assert!(checked.medium_errors() > 500 && seen < count("errors_seen_EIO") / 2, "{checked}, {seen} seen");
}

#[test]
fn who_swallows_an_error_is_found_by_what_is_lost() {
    for kind in [OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Discard, OpKind::WriteZeroes] {
        answering(Answer::Swallow(kind), false).expect("there is nothing to swallow");
        let found = match answering(Answer::Swallow(kind), true) {
            Ok(checked) => panic!("{kind}: a failure is taken for success, and nothing is found: {checked}"),
            Err(found) => found,
        };
        let page = found.to_string();
        assert!(matches!(found.failure().event, Event::Mismatch(_)), "{kind}: {page}");
        for words in [
            "Calls to its medium that were made to fail, the last of them:",
            "Because of that an operation may fail. One that is acknowledged has to be right all the same.",
            "fault: in calls to the medium: ",
        ] {
            assert!(page.contains(words), "{kind}: {words}:\n{page}");
        }
    }
}

#[test]
fn who_fails_for_longer_than_the_medium_is_found() {
    answering(Answer::GiveUp, false).expect("there is nothing to give up for");
    let found = answering(Answer::GiveUp, true).expect_err("its medium is well again");
    assert_eq!(found.failure().oracle, Oracle::Errors, "{found}");
    assert!(found.to_string().contains("which nothing injected"), "{found}");
}

#[test]
#[should_panic(expected = "no call to the medium was made to fail")]
fn a_check_for_errors_without_any_is_no_pass() {
    let open = |medium: Medium| OnFailing::open(medium, Answer::Tell);
    check(open).seeds(2).ops(3).medium_bytes(64 << 10).medium_errors(true).run();
}
