//! The driver with servers that are odd, wrong, or dead.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ublkit::{Backend, Geometry, Operation, WriteFlags, ZeroFlags};

use crate::event::Event;
use crate::oracle::{Oracle, Oracles};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Act, Action, Recovery, Setup};
use crate::seed::{Seed, SeededRng};
use crate::sim::run::tests::{Drawn, run_drawn};
use crate::sim::server::{Buffers, Commit, Server, TagId, Work};
use crate::sim::subject::{MediumSubject, Open, Subject, geometry_of};
use crate::sim::{Medium, Ran, RunOptions, run};

/// A backend that loses one in so many writes, and flushes or does not.
struct Wrong {
    inner: Arc<dyn Backend>,
    loses: u64,
    flushes: bool,
    writes: AtomicU64,
}

impl Backend for Wrong {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if (self.writes.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(self.loses) {
            return Ok(());
        }
        self.inner.write_at(buf, offset, if self.flushes { flags } else { WriteFlags::NONE })
    }
    fn flush(&self) -> io::Result<()> {
        if self.flushes { self.inner.flush() } else { Ok(()) }
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.inner.write_zeroes(offset, len, flags)
    }
}

/// A server with changes to what it is handed and what it commits.
#[derive(Debug)]
struct Odd {
    inner: Box<dyn Server>,
    what: What,
    works: Vec<Work>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Half of each read and write.
    Halves,
    /// More than was asked.
    Boasts,
    /// Everything twice.
    Twice,
    /// This result instead of the right one.
    Says(i32),
    /// Forgets what it is handed, and knows it or not.
    Forgets { knows: bool },
    /// Does not fetch its last tag.
    LeavesTag,
    /// Allocates memory in its data path.
    Allocates { flusher: bool },
}

impl Server for Odd {
    fn fetches(&self, tag: TagId) -> bool {
        self.what != What::LeavesTag || tag.tag > 0
    }

    fn take(&mut self, mut work: Work, buffers: &mut Buffers) {
        self.works.push(work);
        match self.what {
            What::Halves if work.len >= 1024 && matches!(work.operation, Operation::Read | Operation::Write) => {
                work.len = work.len / 1024 * 512;
            }
            What::Forgets { .. } => return,
            _ => {}
        }
        self.inner.take(work, buffers);
    }

    fn step(&mut self, buffers: &mut Buffers, rng: &mut SeededRng, commits: &mut Vec<Commit>) {
        self.inner.step(buffers, rng, commits);
        for at in 0..commits.len() {
            match self.what {
                What::Boasts if commits[at].result > 0 => commits[at].result = i32::MAX,
                What::Twice => commits.push(commits[at]),
                What::Says(result) => commits[at].result = result,
                _ => {}
            }
        }
    }

    fn pending(&self) -> usize {
        let forgotten = self.what == What::Forgets { knows: true } && !self.works.is_empty();
        self.inner.pending() + usize::from(forgotten)
    }

    fn allocates(&self) -> bool {
        matches!(self.what, What::Allocates { .. })
    }

    fn io_flusher(&self) -> bool {
        self.what != What::Allocates { flusher: false }
    }
}

fn odd(seed: u64, what: What, change: impl FnOnce(&mut Setup)) -> Ran {
    let mut drawn = Drawn::new(seed, 300);
    drawn.setup.read_only = false;
    change(&mut drawn.setup);
    let setup = drawn.setup;
    let wrap = |inner: Box<dyn Server>, _: &Medium, _: Open| -> Box<dyn Server> {
        Box::new(Odd { inner, what, works: Vec::new() })
    };
    let mut subject = MediumSubject::new(&setup).wrap_server(wrap);
    let options = RunOptions { record: true, patience: 5000, ..RunOptions::default() };
    run(&setup, Seed::new(seed), &mut subject, &mut drawn, &options)
}

fn count(ran: &Ran, words: &str) -> usize {
    ran.events.iter().filter(|event| event.contains(words)).count()
}

fn oracle(ran: &Ran) -> Option<Oracle> {
    ran.failure.as_ref().map(|failure| failure.oracle)
}

fn one(kind: OpKind, first: u64, sectors: u64) -> Action {
    Action { worker: 0, act: Act::Op { kind, range: SectorRange::new(first, sectors) } }
}

/// A device of 64 KiB with little to it.
fn plain() -> Setup {
    let mut setup = Drawn::new(0, 0).setup;
    (setup.bytes, setup.logical_block, setup.max_io_bytes) = (65536, 512, 8192);
    (setup.queues, setup.queue_depth, setup.workers, setup.io_depth) = (1, 4, 1, 8);
    (setup.volatile_cache, setup.fua, setup.discard, setup.write_zeroes) = (true, false, true, true);
    (setup.read_only, setup.merges, setup.reorder, setup.memory_pressure) = (false, false, 0, false);
    (setup.discard_zeroes, setup.recovery) = (true, Recovery::None);
    setup
}

fn run_plain(setup: &Setup, subject: &mut dyn Subject, actions: Vec<Action>) -> Ran {
    run_without(setup, subject, actions, Oracles::ALL)
}

fn run_without(setup: &Setup, subject: &mut dyn Subject, actions: Vec<Action>, oracles: Oracles) -> Ran {
    let options = RunOptions { record: true, patience: 2000, oracles, ..RunOptions::default() };
    run(setup, Seed::new(3), subject, &mut actions.into_iter(), &options)
}

#[test]
fn short_results_are_asked_for_again_and_boasts_are_clamped() {
    for seed in 0..100 {
        // A server does whole logical blocks: half of one would be torn.
        let ran = odd(seed, What::Halves, |setup| (setup.logical_block, setup.max_io_bytes) = (512, 4096));
        assert!(ran.failure.is_none(), "seed {seed}: {:#?}", ran.failure);
        let ran = odd(seed, What::Boasts, |_| {});
        assert!(ran.failure.is_none(), "seed {seed}: {:#?}", ran.failure);
    }
    assert!(
        odd(1, What::Halves, |setup| (setup.logical_block, setup.max_io_bytes) = (512, 4096))
            .evidence
            .count("short_results")
            > 0
    );
    assert!(odd(1, What::Boasts, |_| {}).evidence.count("clamped_results") > 0);
}

#[test]
fn a_commit_for_a_tag_that_the_server_does_not_own_is_refused() {
    let ran = odd(1, What::Twice, |_| {});
    assert!(ran.evidence.count("refused_commits") > 0 && ran.failure.is_none(), "{:#?}", ran.failure);
}

#[test]
fn errnos_arrive_as_the_kernel_maps_them() {
    for (result, arrives) in [(-28, "errno 28"), (-13, "errno 5"), (-5, "errno 5"), (-110, "errno 110")] {
        let wrap = |inner, _: &Medium, _| -> Box<dyn Server> {
            Box::new(Odd { inner, what: What::Says(result), works: Vec::new() })
        };
        let setup = plain();
        let mut subject = MediumSubject::new(&setup).wrap_server(wrap);
        let actions = vec![one(OpKind::Write, 0, 64), one(OpKind::Flush, 0, 0)];
        let ran = run_without(&setup, &mut subject, actions, Oracles::ALL.without(Oracle::Errors));
        assert_eq!(ran.evidence.count("failed_ops"), 2);
        assert!(ran.events.iter().filter(|event| event.ends_with(arrives)).count() == 2, "{:#?}", ran.events);
    }
}

#[test]
fn a_read_of_nothing_is_eio_and_a_write_of_nothing_never_ends() {
    let setup = plain();
    let wrap =
        |inner, _: &Medium, _| -> Box<dyn Server> { Box::new(Odd { inner, what: What::Says(0), works: Vec::new() }) };
    let mut subject = MediumSubject::new(&setup).wrap_server(wrap);
    let actions = vec![one(OpKind::Read, 0, 8), one(OpKind::Discard, 0, 8), one(OpKind::Flush, 0, 0)];
    let ran = run_without(&setup, &mut subject, actions, Oracles::ALL.without(Oracle::Errors));
    assert!(ran.failure.is_none());
    assert_eq!((ran.evidence.count("failed_ops"), count(&ran, "errno 5")), (1, 1));
    let ran = run_plain(&setup, &mut subject, vec![one(OpKind::Write, 0, 8)]);
    assert_eq!(oracle(&ran), Some(Oracle::Watchdog));
    assert!(ran.evidence.count("requeued") > 100);
}

#[test]
fn what_hangs_is_told_with_everything_in_flight() {
    for what in [What::Forgets { knows: false }, What::Forgets { knows: true }, What::LeavesTag] {
        let ran = odd(5, what, |_| {});
        let failure = ran.failure.expect("a hang");
        assert_eq!(failure.oracle, Oracle::Watchdog);
        let Event::Hang(hang) = failure.event else { panic!("{:?}", failure.event) };
        assert!(!hang.notes.is_empty());
        if what != What::LeavesTag {
            assert!(hang.notes.iter().any(|note| note.contains("the server has it")), "{:#?}", hang.notes);
            assert!(failure.op.is_some());
        }
    }
    let without = RunOptions { oracles: Oracles::ALL.without(Oracle::Watchdog), ..RunOptions::default() };
    let setup = plain();
    let wrap = |inner, _: &Medium, _| -> Box<dyn Server> {
        Box::new(Odd { inner, what: What::Forgets { knows: false }, works: Vec::new() })
    };
    let mut subject = MediumSubject::new(&setup).wrap_server(wrap);
    let mut actions = vec![one(OpKind::Read, 0, 8)].into_iter();
    assert!(run(&setup, Seed::new(1), &mut subject, &mut actions, &without).failure.is_none());
}

#[test]
fn a_server_that_allocates_waits_for_itself_where_memory_is_short() {
    let short = |setup: &mut Setup| setup.memory_pressure = true;
    assert_eq!(oracle(&odd(2, What::Allocates { flusher: false }, short)), Some(Oracle::Watchdog));
    assert_eq!(oracle(&odd(2, What::Allocates { flusher: true }, short)), None);
    let plenty = |setup: &mut Setup| setup.memory_pressure = false;
    assert_eq!(oracle(&odd(2, What::Allocates { flusher: false }, plenty)), None);
}

#[test]
fn each_recovery_treats_requests_as_the_kernel_does() {
    for recovery in [Recovery::None, Recovery::Wait, Recovery::Reissue, Recovery::FailIo] {
        let (mut own, mut remote, mut kills, mut reissued) = (0, 0, 0, 0);
        for seed in 0..150 {
            let mut drawn = Drawn::new(seed, 300);
            drawn.setup.recovery = recovery;
            drawn.setup.read_only = false;
            let setup = drawn.setup;
            let options = RunOptions { record: true, ..RunOptions::default() };
            let mut subject = MediumSubject::new(&setup);
            let ran = run(&setup, Seed::new(seed), &mut subject, &mut drawn, &options);
            assert!(ran.failure.is_none(), "{recovery:?}, seed {seed}: {:#?}", ran.failure);
            own += count(&ran, "errno 5, of the driver itself");
            remote += count(&ran, "errno 121, of the driver itself");
            kills += ran.evidence.count("kills_in_flight");
            reissued += ran.evidence.count("reissued");
        }
        assert!(kills > 50, "{recovery:?}");
        assert_eq!(own > 0, recovery != Recovery::Reissue, "{recovery:?}: {own}");
        assert_eq!(remote > 0, recovery == Recovery::FailIo, "{recovery:?}: {remote}");
        assert_eq!(reissued > 0, recovery == Recovery::Reissue, "{recovery:?}: {reissued}");
    }
}

#[test]
fn flushes_go_where_there_is_a_cache_and_nowhere_else() {
    let actions = || {
        let mut actions = vec![one(OpKind::Flush, 0, 0); 4];
        actions.extend([one(OpKind::WriteFua, 0, 32), one(OpKind::WriteFua, 64, 4)]);
        actions
    };
    let mut setup = plain();
    let ran = run_plain(&setup, &mut MediumSubject::new(&setup), actions());
    let flushes = count(&ran, ": flush 0+0");
    // Each write is followed by one, and those that wait together share one.
    assert!(flushes >= 1 && ran.evidence.count("flushes_shared") + flushes as u64 == 4 + 3, "{:#?}", ran.events);
    assert_eq!(count(&ran, ": write fua "), 0);
    setup.fua = true;
    let ran = run_plain(&setup, &mut MediumSubject::new(&setup), actions());
    assert_eq!(count(&ran, ": write fua "), 3, "{:#?}", ran.events);
    setup.volatile_cache = false;
    let ran = run_plain(&setup, &mut MediumSubject::new(&setup), actions());
    assert_eq!((count(&ran, ": flush 0+0"), count(&ran, ": write fua ")), (0, 0));
    assert_eq!(ran.evidence.count("failed_ops"), 0);
}

#[test]
fn the_block_layer_refuses_what_the_device_does_not_offer() {
    let mut setup = plain();
    setup.read_only = true;
    let refused = vec![one(OpKind::Write, 0, 8), one(OpKind::Discard, 0, 8), one(OpKind::Read, 0, 8)];
    let ran = run_plain(&setup, &mut MediumSubject::new(&setup), refused);
    assert_eq!((count(&ran, "errno 1, of"), ran.evidence.count("refused_ops")), (2, 2));
    assert_eq!(ran.evidence.count("requests"), 1);
    (setup.read_only, setup.discard, setup.write_zeroes) = (false, false, false);
    let lacking = vec![one(OpKind::Discard, 0, 8), one(OpKind::WriteZeroes, 0, 32)];
    let ran = run_plain(&setup, &mut MediumSubject::new(&setup), lacking);
    assert_eq!(count(&ran, "errno 95, of"), 1);
    assert_eq!(count(&ran, ": write "), 2);
}

/// Declares something else, and keeps its id.
struct Liar {
    inner: MediumSubject<'static>,
    geometry: Geometry,
    keeps_id: bool,
}

impl Subject for Liar {
    fn open(&mut self, medium: Option<&Medium>, why: Open) -> Box<dyn Server> {
        self.inner.open(medium, why)
    }
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn release(&mut self) -> bool {
        !self.keeps_id
    }
}

#[test]
fn a_device_that_is_not_what_it_should_be_or_keeps_its_id_is_found() {
    let setup = plain();
    let right = geometry_of(&setup);
    let mut liar = Liar { inner: MediumSubject::new(&setup), geometry: right, keeps_id: true };
    let reopens = vec![Action { worker: 0, act: Act::Reopen }; 70];
    let ran = run_plain(&setup, &mut liar, reopens);
    assert_eq!(oracle(&ran), Some(Oracle::Resources));
    assert_eq!(ran.evidence.count("reopens"), 64);
    assert_eq!(oracle(&run_plain(&setup, &mut liar, Vec::new())), Some(Oracle::Resources));
    liar.keeps_id = false;
    assert_eq!(oracle(&run_plain(&setup, &mut liar, Vec::new())), None);
    let changes: [fn(&mut Geometry); 5] = [
        |geometry| geometry.size -= 512,
        |geometry| geometry.logical_block = 4096,
        |geometry| geometry.volatile_cache = false,
        |geometry| geometry.read_only = true,
        |geometry| geometry.write_zeroes = Some(700),
    ];
    for change in changes {
        liar.geometry = right;
        change(&mut liar.geometry);
        assert_eq!(oracle(&run_plain(&setup, &mut liar, Vec::new())), Some(Oracle::Resources));
    }
}

#[test]
fn planted_bugs_are_found() {
    let mut found = 0;
    for seed in 0..20 {
        let mut drawn = Drawn::new(seed, 2000);
        drawn.setup.read_only = false;
        let setup = drawn.setup;
        let mut subject = MediumSubject::new(&setup).wrap_backend(|inner, _, _| {
            Arc::new(Wrong { inner, loses: 20, flushes: true, writes: AtomicU64::new(0) })
        });
        let ran = run(&setup, Seed::new(seed), &mut subject, &mut drawn, &RunOptions::default());
        found += u32::from(ran.failure.is_some_and(|failure| failure.oracle != Oracle::Watchdog));
    }
    assert!(found >= 18, "{found} of 20");
}

#[test]
fn a_power_cut_takes_what_was_acknowledged_and_not_flushed() {
    let mut setup = plain();
    (setup.discard, setup.write_zeroes) = (false, false);
    let block = |at: u64| [one(OpKind::Write, at * 8, 8), one(OpKind::WriteFua, at * 8 + 4, 2)];
    let everyone = |act| Action { worker: 0, act };
    let mut actions: Vec<_> = (0..12).flat_map(block).collect();
    actions.extend([everyone(Act::Sweep), one(OpKind::Flush, 0, 0), everyone(Act::Sweep)]);
    actions.extend([everyone(Act::PowerCut), everyone(Act::Sweep)]);
    let mut found = 0;
    for seed in 0..50 {
        let options = RunOptions::default();
        let mut right = MediumSubject::new(&setup);
        let ran = run(&setup, Seed::new(seed), &mut right, &mut actions.clone().into_iter(), &options);
        assert!(ran.failure.is_none(), "{:#?}", ran.failure);
        let mut lazy = MediumSubject::new(&setup).wrap_backend(|inner, _, _| {
            Arc::new(Wrong { inner, loses: u64::MAX, flushes: false, writes: AtomicU64::new(0) })
        });
        let ran = run(&setup, Seed::new(seed), &mut lazy, &mut actions.clone().into_iter(), &options);
        found += u32::from(oracle(&ran).is_some_and(|oracle| oracle != Oracle::Watchdog));
    }
    // What a cut leaves is everything, now and then.
    assert!(found >= 25, "{found} of 50");
}

#[test]
fn held_and_short_requests_are_no_bugs() {
    let plan = "read,write rate 1/20: delay 300; any rate 1/40: hold; write rate 1/10: short; read rate 1/10: short";
    let (mut held, mut short) = (0, 0);
    for seed in 0..100 {
        let mut drawn = Drawn::new(seed, 300);
        let setup = drawn.setup;
        let mut subject = MediumSubject::new(&setup).with_faults(plan.parse().expect("a plan"), Seed::new(seed));
        let ran = run(&setup, Seed::new(seed), &mut subject, &mut drawn, &RunOptions::default());
        assert!(ran.failure.is_none(), "seed {seed}: {:#?}", ran.failure);
        held += ran.evidence.count("held");
        short += ran.evidence.count("short_results");
    }
    assert!(held > 100 && short > 100, "{held} {short}");
}

#[test]
fn errors_are_accounted_for() {
    let plan =
        "any rate 1/50: error ENOSPC before; write rate 1/50: error EIO after; read rate 1/50: error EACCES before";
    let mut failed = 0;
    for seed in 0..200 {
        let mut drawn = Drawn::new(seed, 300);
        let setup = drawn.setup;
        let mut subject = MediumSubject::new(&setup).with_faults(plan.parse().expect("a plan"), Seed::new(seed));
        let ran = run(&setup, Seed::new(seed), &mut subject, &mut drawn, &RunOptions::default());
        assert!(ran.failure.is_none(), "seed {seed}: {:#?}", ran.failure);
        failed += ran.evidence.count("failed_ops");
    }
    assert!(failed > 1000, "{failed}");
    // Errors that nobody made, and errors that nobody sees.
    let setup = plain();
    let actions = || vec![one(OpKind::Write, 0, 8), one(OpKind::Read, 0, 8)];
    for (plan, what) in [("", What::Says(-28)), ("write: error ENOSPC before", What::Says(4096))] {
        let wrap = |inner, _: &Medium, _| -> Box<dyn Server> { Box::new(Odd { inner, what, works: Vec::new() }) };
        let plan = plan.parse().expect("a plan");
        let mut subject = MediumSubject::new(&setup).with_faults(plan, Seed::new(1)).wrap_server(wrap);
        assert_eq!(oracle(&run_plain(&setup, &mut subject, actions())), Some(Oracle::Errors));
    }
}

#[test]
fn a_drawn_run_has_no_errors_of_its_own() {
    let ran = run_drawn(8, 300, &RunOptions { record: true, ..RunOptions::default() });
    assert_eq!(count(&ran, "errno") as u64, ran.evidence.count("failed_ops"));
}
