//! Devices that outlive their servers: what applications see meanwhile, and who can take over what from whom.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use ublkit::ctrl::{State, block_path, character_path};
use ublkit::orphan::{self, Class, Outcome};
use ublkit::sys::ublk::Features;
use ublkit::{
    Backend, Controller, Device, ErrorKind, Event, Geometry, Operation, Phase, QueueInfo, Recovery, Request, backends,
};

use super::client::{self, Aligned, MIB, assert_same, bounded, builder, eventually};
use super::disk::{Disk, Op};
use super::keeper::Keeper;
use super::runner::{cases, ids};

cases!("recovery":
    wait_fails_what_the_server_had_and_keeps_the_rest,
    reissue_keeps_everything,
    fail_io_fails_everything_at_once,
    a_server_killed_idle_is_followed_by_the_next,
    a_user_copy_device_is_recovered_as_one,
    a_second_recovery_is_told_of_the_first,
    a_recovery_killed_on_its_way_is_followed_by_the_next,
    a_recovery_that_fails_leaves_the_device_recoverable,
    a_detached_device_is_taken_over_under_load in 60 s unless DETACH_UNDER_LOAD,
    detaching_is_refused_where_it_makes_no_sense,
    a_worker_that_hangs_does_not_keep_a_device_from_being_detached,
    what_another_server_has_is_left_alone,
    what_another_server_of_this_process_has_is_left_alone,
    what_was_made_quiescent_from_outside_is_left_alone,
    what_has_failed_here_is_closed_here,
    what_has_failed_here_can_be_left_and_recovered,
    a_queue_that_hangs_lets_go_when_its_call_returns,
    what_cannot_be_recovered_is_refused_with_a_reason,
    closing_writes_dirty_pages_back_in_every_mode,
    a_recoverable_device_is_listed_and_deleted_only_by_id,
);

const SIZE: u64 = 4 * MIB;
/// Writes from here on stay in a keeper's hands, if it is told so.
const HELD: u64 = 2 * MIB;
const LONG: Duration = Duration::from_secs(15);

fn controller() -> Controller {
    Controller::open().expect("open")
}

/// The modes that this kernel has.
fn modes() -> Vec<Recovery> {
    let fail_io = controller().features().contains(Features::USER_RECOVERY_FAIL_IO);
    let all = [Recovery::Wait, Recovery::Reissue, Recovery::FailIo];
    all.into_iter().filter(|mode| *mode != Recovery::FailIo || fail_io).collect()
}

/// A file for a keeper to store things in.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().expect("a directory"));
        File::create(this.file()).and_then(|file| file.set_len(SIZE)).expect("make a file");
        this
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    fn stored(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        File::open(self.file()).and_then(|file| file.read_exact_at(&mut data, offset)).expect("read the file");
        data
    }
}

fn open(id: u32) -> File {
    client::direct_at(&block_path(id))
}

/// Deletes a device if its trial fails: what waits in it would keep the program from ending.
struct Guard(u32);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = controller().delete_async(self.0);
        }
    }
}

/// What a device's state is once its server is gone; the state and the pid as the driver tells them.
fn await_state(id: u32, mode: Recovery, dead: i32) {
    let state = if mode == Recovery::FailIo { State::FailIo } else { State::Quiesced };
    let controller = controller();
    eventually("the kernel takes the device back", || {
        controller.get_dev_info(id).is_ok_and(|info| info.state() == state)
    });
    let info = controller.get_dev_info(id).expect("info");
    assert_eq!(info.recovery(), mode);
    // Since 6.18 it is known that it is gone; before, its number stays.
    assert!(info.server_pid() == -1 || info.server_pid() == dead, "{info:?}");
    assert!(block_path(id).exists(), "the block device stays");
}

fn assert_live(id: u32, pid: i32) {
    let info = controller().get_dev_info(id).expect("info");
    assert_eq!((info.state(), info.server_pid()), (State::Live, pid));
}

/// I/O of an application that does not know what happens to its device.
struct Pending(mpsc::Receiver<io::Result<()>>);

impl Pending {
    fn write(id: u32, writer: u64, offset: u64) -> Self {
        Self::write_to(open(id), writer, offset)
    }

    fn write_to(file: File, writer: u64, offset: u64) -> Self {
        let (done, result) = mpsc::channel();
        std::thread::spawn(move || done.send(client::write(&file, writer, offset, 4096).map(drop)));
        Self(result)
    }

    fn result(&self) -> Result<(), i32> {
        let result = self.0.recv_timeout(LONG).expect("the application's I/O ends");
        result.map_err(|error| error.raw_os_error().expect("an errno"))
    }

    fn is_waiting(&self) -> bool {
        self.0.try_recv().is_err()
    }
}

fn assert_reads(id: u32, writer: u64, offset: u64) {
    let read = client::read(&open(id), offset, 4096).expect("read");
    assert_same(&read, &client::pattern(writer, offset, 4096), "read");
}

/// A keeper that has three writes in its hands, out of more than it has workers for, and the pending writes.
fn caught_with_requests(place: &Place, mode: Recovery) -> (Keeper, u32, Vec<Pending>, Guard) {
    let (keeper, id) = Keeper::serving(&place.file(), &format!("mode={mode} held_from={HELD}"));
    assert_live(id, keeper.pid());
    client::write(&open(id), 1, 0, 4096).expect("write");
    let pending: Vec<_> = (0..3).map(|n| Pending::write(id, 2, HELD + n * 4096)).collect();
    eventually("three writes are in the server's hands", || keeper.held() == 3);
    (keeper, id, pending, Guard(id))
}

/// The next server, the data, and an end with nothing left.
fn recovered(place: &Place, id: u32) -> Keeper {
    let (next, same) = Keeper::serving(&place.file(), &format!("recover={id}"));
    assert_eq!(same, id);
    assert_live(id, next.pid());
    assert_reads(id, 1, 0);
    next
}

fn ended(keeper: &Keeper, id: u32) {
    client::write(&open(id), 9, MIB, 4096).expect("write");
    assert_reads(id, 9, MIB);
    keeper.end();
    assert!(!ids().contains(&id) && !block_path(id).exists());
    let disk = Disk::new(Geometry::bytes(MIB));
    client::close(&builder(&disk).id(id).start().expect("the id can be used again"));
}

fn wait_fails_what_the_server_had_and_keeps_the_rest() {
    let place = Place::new();
    let (keeper, id, pending, _guard) = caught_with_requests(&place, Recovery::Wait);
    keeper.kill();
    for pending in &pending {
        assert_eq!(pending.result(), Err(libc::EIO), "what the server had fails");
    }
    await_state(id, Recovery::Wait, keeper.pid());
    let waiting = Pending::write(id, 3, 8192);
    std::thread::sleep(Duration::from_millis(300));
    assert!(waiting.is_waiting(), "what came later waits");
    let next = recovered(&place, id);
    assert_eq!(waiting.result(), Ok(()));
    assert_reads(id, 3, 8192);
    ended(&next, id);
    assert_same(&place.stored(8192, 4096), &client::pattern(3, 8192, 4096), "stored");
}

fn reissue_keeps_everything() {
    let place = Place::new();
    let (keeper, id, pending, _guard) = caught_with_requests(&place, Recovery::Reissue);
    // What is written twice is written by the second server even if the first had it already.
    let file = File::options().write(true).open(place.file()).expect("open");
    file.write_all_at(&[0; 3 * 4096], HELD).expect("undo");
    keeper.kill();
    await_state(id, Recovery::Reissue, keeper.pid());
    let later = Pending::write(id, 3, 8192);
    std::thread::sleep(Duration::from_millis(300));
    assert!(later.is_waiting() && pending.iter().all(Pending::is_waiting), "everything waits");
    let next = recovered(&place, id);
    for (n, pending) in (0..).zip(&pending) {
        assert_eq!(pending.result(), Ok(()));
        assert_reads(id, 2, HELD + n * 4096);
    }
    assert_eq!(later.result(), Ok(()));
    ended(&next, id);
}

fn fail_io_fails_everything_at_once() {
    let place = Place::new();
    if !modes().contains(&Recovery::FailIo) {
        let before = ids();
        let error = Device::builder(backends::File::open(place.file()).expect("open"))
            .recovery(Recovery::FailIo)
            .start()
            .expect_err("this kernel has no such mode");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("Linux 6.16") && error.to_string().contains("reissue"), "{error}");
        assert_eq!(ids(), before);
        return;
    }
    let (keeper, id, pending, _guard) = caught_with_requests(&place, Recovery::FailIo);
    keeper.kill();
    for pending in &pending {
        assert_eq!(pending.result(), Err(libc::EIO), "what the server had fails");
    }
    await_state(id, Recovery::FailIo, keeper.pid());
    let errno = bounded("an error", Duration::from_secs(5), || Pending::write(id, 3, 8192).result());
    assert_eq!(errno, Err(libc::EREMOTEIO), "what comes later fails at once");
    let next = recovered(&place, id);
    ended(&next, id);
}

fn a_server_killed_idle_is_followed_by_the_next() {
    for mode in modes() {
        let place = Place::new();
        let (keeper, id) = Keeper::serving(&place.file(), &format!("mode={mode}"));
        client::write(&open(id), 1, 0, 4096).expect("write");
        keeper.kill();
        // At once: the library waits for the kernel to notice.
        let next = recovered(&place, id);
        next.kill();
        let third = recovered(&place, id);
        ended(&third, id);
    }
}

fn a_user_copy_device_is_recovered_as_one() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), "mode=reissue user_copy=1");
    client::write(&open(id), 1, 0, 4096).expect("write");
    keeper.kill();
    let waiting = Pending::write(id, 3, 8192);
    let next = recovered(&place, id);
    assert_eq!(waiting.result(), Ok(()));
    assert_reads(id, 3, 8192);
    let info = controller().get_dev_info(id).expect("info");
    assert!(info.features().contains(Features::USER_COPY), "{info:?}");
    ended(&next, id);
}

fn a_second_recovery_is_told_of_the_first() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), "mode=reissue");
    let _guard = Guard(id);
    client::write(&open(id), 1, 0, 4096).expect("write");
    keeper.kill();
    let first = Keeper::ordered(&place.file(), &format!("recover={id} hold_at={}", Phase::Configured));
    assert_eq!(first.line(), format!("held {}", Phase::Configured));
    let second = Keeper::ordered(&place.file(), &format!("recover={id}"));
    let answer = bounded("a refusal", LONG, || second.line());
    assert!(answer.starts_with("failed to") && answer.contains(&format!("held by pid {}", first.pid())), "{answer}");
    first.kill();
    let next = recovered(&place, id);
    ended(&next, id);
}

fn a_recovery_killed_on_its_way_is_followed_by_the_next() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), "mode=reissue");
    let _guard = Guard(id);
    client::write(&open(id), 1, 0, 4096).expect("write");
    keeper.kill();
    let waiting = Pending::write(id, 3, 8192);
    for phase in [Phase::Added, Phase::Configured, Phase::Fetched] {
        let next = Keeper::ordered(&place.file(), &format!("recover={id} hold_at={phase}"));
        assert_eq!(next.line(), format!("held {phase}"));
        next.kill();
        // The last one that served it is the first one still.
        await_state(id, Recovery::Reissue, keeper.pid());
    }
    let next = recovered(&place, id);
    assert_eq!(waiting.result(), Ok(()));
    assert_reads(id, 3, 8192);
    ended(&next, id);
}

/// A device of this process that waits for another server, its backend, and somebody who has it open. To open it now may be
/// to wait: since 6.18 the kernel looks for partitions some time after the start, and nobody opens the device meanwhile.
fn detached(mode: Recovery) -> (Arc<Disk>, u32, File) {
    let disk = Disk::new(Geometry::bytes(SIZE));
    let device = builder(&disk).queues(2).recovery(mode).start().expect("start");
    let file = client::direct(&device);
    let written = client::write(&file, 1, 0, 4096).expect("write");
    let left = bounded("detaching", LONG, || device.detach()).expect("detach");
    assert_eq!(left.id, device.id());
    assert_same(&disk.stored(0, 4096), &written, "stored");
    await_state(left.id, mode, std::process::id() as i32);
    // It is not this one's any more.
    assert_eq!(device.close().expect_err("detached").kind(), ErrorKind::State);
    assert_eq!(device.detach().expect("again"), left);
    drop(device);
    await_state(left.id, mode, std::process::id() as i32);
    (disk, left.id, file)
}

fn a_recovery_that_fails_leaves_the_device_recoverable() {
    for mode in modes() {
        let (disk, id, _) = detached(mode);
        let failing = |fail: fn() -> io::Result<()>| {
            let geometry = disk.geometry();
            let open = move |info: &QueueInfo| {
                if info.queue == 1 {
                    fail()?;
                }
                Ok(|request: Request<'_>| request.complete())
            };
            // Within the default deadline: a panic's backtrace takes seconds in an emulated guest on a busy host.
            let error = Device::builder_with_handlers(geometry, open).recover(id).expect_err("it fails");
            assert!(error.to_string().contains("still there to be recovered"), "{error}");
            await_state(id, mode, std::process::id() as i32);
            error
        };
        let error = failing(|| Err(Errno::ENOSPC.into()));
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Queue, Some(libc::ENOSPC)), "{error}");
        let error = failing(|| panic!("planted: the handler panics when opened"));
        assert_eq!(error.kind(), ErrorKind::Queue, "{error}");
        let told = Arc::new(Mutex::new(Vec::new()));
        let device = builder(&disk)
            .on_event({
                let told = Arc::clone(&told);
                move |event| match event {
                    Event::Phase(phase) => told.lock().expect("lock").push(*phase),
                    other => panic!("{other}"),
                }
            })
            .recover(id)
            .expect("recover");
        assert_reads(id, 1, 0);
        device.detach().expect("detach");
        let device = builder(&disk).recover(id).expect("recover");
        client::close(&device);
        let begun = [Phase::Added, Phase::Configured, Phase::Fetched, Phase::Started, Phase::Visible];
        let told = told.lock().expect("lock");
        assert_eq!(told[..begun.len()], begun);
        assert_eq!(told[begun.len()..], [Phase::Stopping, Phase::Joined, Phase::Detached]);
    }
}

/// Applications that write and read all the time notice nothing of a handover, as far as that is promised.
fn a_detached_device_is_taken_over_under_load() {
    let whole = controller().features().contains(Features::QUIESCE);
    for mode in modes().into_iter().filter(|mode| *mode == Recovery::Reissue || *mode == Recovery::Wait && whole) {
        for workers in [0, 3] {
            let place = Place::new();
            let (mut keeper, id) = Keeper::serving(&place.file(), &format!("mode={mode} depth=4 workers={workers}"));
            let _guard = Guard(id);
            let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
            let clients: Vec<_> = (0..6_u64)
                .map(|client| {
                    let (stop, rounds, file) = (Arc::clone(&stop), Arc::clone(&rounds), open(id));
                    std::thread::spawn(move || {
                        let mut round = 0;
                        while !stop.load(Ordering::Relaxed) {
                            round += 1;
                            let (writer, offset) = (client << 32 | round, client * 8192);
                            let wrote = client::write(&file, writer, offset, 8192).expect("a write during handovers");
                            let mut read = Aligned::zeroed(8192);
                            file.read_exact_at(&mut read, offset).expect("a read during handovers");
                            assert_same(&read, &wrote, "read back");
                            rounds.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            for _ in 0..3 {
                let before = rounds.load(Ordering::Relaxed);
                eventually("there is load", || rounds.load(Ordering::Relaxed) > before + 20);
                assert_eq!(keeper.ask("detach"), "detached QUIESCED");
                let told = Keeper::serving(&place.file(), &format!("recover={id} workers={workers}"));
                assert!(keeper.wait());
                keeper = told.0;
            }
            stop.store(true, Ordering::Relaxed);
            for client in clients {
                client.join().expect("a client");
            }
            keeper.end();
        }
    }
}

fn detaching_is_refused_where_it_makes_no_sense() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = client::start(&disk);
    let error = device.detach().expect_err("no recovery");
    assert_eq!(error.kind(), ErrorKind::State, "{error}");
    assert!(error.to_string().contains("without recovery"), "{error}");
    client::write(&client::direct(&device), 1, 0, 4096).expect("and it is served as before");
    client::close(&device);
    assert_eq!(device.detach().expect_err("closed").kind(), ErrorKind::State);

    // From inside.
    let device = Arc::new(builder(&disk).recovery(Recovery::Wait).start().expect("start"));
    let (sender, receiver) = mpsc::channel();
    let weak = Arc::downgrade(&device);
    disk.hook(move |call| {
        if call.op == Op::Write
            && let Some(device) = weak.upgrade()
        {
            let _ = sender.send(device.detach().expect_err("from inside").kind());
        }
        Ok(())
    });
    client::write(&client::direct(&device), 1, 0, 4096).expect("write");
    assert_eq!(receiver.recv_timeout(LONG).expect("tried"), ErrorKind::State);
    disk.unhook();
    client::close(&device);
}

fn a_worker_that_hangs_does_not_keep_a_device_from_being_detached() {
    for mode in [Recovery::Reissue, Recovery::Wait] {
        let place = Place::new();
        let words = format!("mode={mode} held_from={HELD} stop_seconds=1");
        let (keeper, id) = Keeper::serving(&place.file(), &words);
        let _guard = Guard(id);
        client::write(&open(id), 1, 0, 4096).expect("write");
        let pending = Pending::write(id, 2, HELD);
        eventually("a write hangs", || keeper.held() == 1);
        let answer = bounded("detaching", LONG, || keeper.ask("detach"));
        assert!(answer.contains("still inside the backend: a worker"), "{answer}");
        keeper.wait();
        await_state(id, mode, keeper.pid());
        if mode != Recovery::Reissue {
            assert_eq!(pending.result(), Err(libc::EIO));
        }
        let next = recovered(&place, id);
        if mode == Recovery::Reissue {
            assert_eq!(pending.result(), Ok(()));
        }
        ended(&next, id);
    }
}

/// A server whose worker hangs while it detaches ends nothing of the next one's, whatever it is asked for afterwards.
fn what_another_server_has_is_left_alone() {
    let place = Place::new();
    let (keeper, id) = Keeper::serving(&place.file(), &format!("mode=reissue held_from={HELD} stop_seconds=1"));
    let _guard = Guard(id);
    client::write(&open(id), 1, 0, 4096).expect("write");
    let pending = Pending::write(id, 2, HELD);
    eventually("a write hangs", || keeper.held() == 1);
    let answer = bounded("detaching", LONG, || keeper.ask("detach and stay"));
    assert!(answer.contains("still inside the backend: a worker"), "{answer}");
    let next = recovered(&place, id);
    assert_eq!(pending.result(), Ok(()));
    let answer = bounded("detaching again", LONG, || keeper.ask("detach and stay"));
    assert!(answer.contains("still inside the backend: a worker"), "{answer}");
    assert_live(id, next.pid());
    let answer = bounded("closing", LONG, || keeper.ask("close and stay"));
    assert!(answer.contains("for another server now (LIVE)"), "{answer}");
    assert_live(id, next.pid());
    keeper.kill();
    assert_live(id, next.pid());
    ended(&next, id);
}

/// Holds every write at and beyond [`HELD`] until it is dropped.
struct Held {
    disk: Arc<Disk>,
    gate: Arc<(Mutex<bool>, Condvar)>,
    entered: Arc<AtomicBool>,
}

impl Held {
    fn writes(disk: &Arc<Disk>) -> Self {
        let this = Self { disk: Arc::clone(disk), gate: Arc::default(), entered: Arc::default() };
        let (gate, entered) = (Arc::clone(&this.gate), Arc::clone(&this.entered));
        disk.hook(move |call| {
            if call.op == Op::Write && call.offset >= HELD {
                entered.store(true, Ordering::SeqCst);
                let open = gate.0.lock().expect("lock");
                drop(gate.1.wait_while(open, |open| !*open).expect("lock"));
            }
            Ok(())
        });
        this
    }

    /// A write that hangs.
    fn write(&self, id: u32) -> Pending {
        let pending = Pending::write(id, 2, HELD);
        eventually("a write hangs", || self.entered.load(Ordering::SeqCst));
        pending
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.disk.unhook();
        *self.gate.0.lock().expect("lock") = true;
        self.gate.1.notify_all();
    }
}

fn what_another_server_of_this_process_has_is_left_alone() {
    let (disk, next) = (Disk::new(Geometry::bytes(SIZE)), Disk::new(Geometry::bytes(SIZE)));
    let held = Held::writes(&disk);
    let short = Duration::from_millis(500);
    let device = builder(&disk).workers(2).recovery(Recovery::Reissue).stop_deadline(short).start().expect("start");
    let id = device.id();
    let _guard = Guard(id);
    let pending = held.write(id);
    let error = bounded("detaching", LONG, || device.detach()).expect_err("a worker hangs");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    let second = builder(&next).recover(id).expect("recover");
    assert_eq!(pending.result(), Ok(()));
    drop(held);
    let left = bounded("detaching again", LONG, || device.detach()).expect("the worker has ended");
    assert_eq!(left.state, State::Live);
    assert_live(id, std::process::id() as i32);
    assert_eq!(device.close().expect_err("detached").kind(), ErrorKind::State);
    drop(device);
    assert_live(id, std::process::id() as i32);
    assert_reads(id, 2, HELD);
    client::close(&second);
}

fn what_was_made_quiescent_from_outside_is_left_alone() {
    if !controller().features().contains(Features::QUIESCE) {
        return;
    }
    let quiesced = |mode: Recovery| {
        let disk = Disk::new(Geometry::bytes(SIZE));
        let device = builder(&disk).queues(2).workers(2).recovery(mode).start().expect("start");
        client::write(&client::direct(&device), 1, 0, 4096).expect("write");
        controller().quiesce(device.id(), LONG).expect("quiesce");
        let error = device.wait_error(LONG).expect("it is told");
        assert_eq!(error.kind(), ErrorKind::State, "{error}");
        (disk, device)
    };
    for mode in modes() {
        let (disk, device) = quiesced(mode);
        let id = device.id();
        let _guard = Guard(id);
        let error = bounded("closing", LONG, || device.close()).expect_err("it is for another");
        assert_eq!(error.kind(), ErrorKind::State, "{error}");
        drop(device);
        await_state(id, mode, std::process::id() as i32);
        let device = builder(&disk).recover(id).expect("recover");
        assert_reads(id, 1, 0);
        client::close(&device);
    }
    let (disk, device) = quiesced(Recovery::Wait);
    let id = device.id();
    bounded("dropping", LONG, || drop(device));
    await_state(id, Recovery::Wait, std::process::id() as i32);
    client::close(&builder(&disk).recover(id).expect("recover"));
    let (disk, device) = quiesced(Recovery::Wait);
    let left = bounded("detaching", LONG, || device.detach()).expect("detach");
    assert_eq!(left.state, State::Quiesced);
    client::close(&builder(&disk).recover(left.id).expect("recover"));
}

/// Panics again when it is dropped, where the library does not look any more: the queue's thread ends.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("planted: the end of a queue's thread");
    }
}

/// A device whose queues have failed in this process, with a page that nobody is there to write back.
fn failed() -> (Device, File) {
    let device = Device::builder_with_handlers(Geometry::bytes(SIZE), |_| {
        Ok(|mut request: Request<'_>| {
            if request.operation() == Operation::Write {
                std::panic::panic_any(Bomb);
            }
            request.buffer().fill(0);
            request.complete();
        })
    })
    .queues(2)
    .recovery(Recovery::Wait)
    .start()
    .expect("start");
    let dirty = client::open(&device, 0);
    client::write(&dirty, 3, MIB, 4096).expect("write");
    let pending = Pending::write(device.id(), 1, 0);
    let error = device.wait_error(LONG).expect("a queue has failed");
    assert_eq!(error.kind(), ErrorKind::Queue, "{error}");
    assert_eq!(pending.result(), Err(libc::EIO));
    (device, dirty)
}

fn what_has_failed_here_is_closed_here() {
    let (device, dirty) = failed();
    let _guard = Guard(device.id());
    // It does not wait for the page.
    bounded("closing", LONG, || device.close()).expect("close");
    drop(dirty);
    eventually("it is gone", || !ids().contains(&device.id()));
}

fn what_has_failed_here_can_be_left_and_recovered() {
    for detach in [true, false] {
        let (device, dirty) = failed();
        let id = device.id();
        let _guard = Guard(id);
        if detach {
            bounded("detaching", LONG, || device.detach()).expect("detach");
            await_state(id, Recovery::Wait, std::process::id() as i32);
        }
        let next = builder(&Disk::new(Geometry::bytes(SIZE))).recover(id).expect("recover");
        if !detach {
            let error = bounded("closing", LONG, || device.close()).expect_err("the next one has it");
            assert_eq!(error.kind(), ErrorKind::State, "{error}");
        }
        drop(device);
        assert_live(id, std::process::id() as i32);
        assert_same(&client::read(&open(id), MIB, 4096).expect("read"), &client::pattern(3, MIB, 4096), "kept");
        drop(dirty);
        client::close(&next);
    }
}

fn a_queue_that_hangs_lets_go_when_its_call_returns() {
    let disk = Disk::new(Geometry::bytes(SIZE));
    let held = Held::writes(&disk);
    let short = Duration::from_millis(500);
    let device = builder(&disk).recovery(Recovery::Reissue).stop_deadline(short).start().expect("start");
    let id = device.id();
    let _guard = Guard(id);
    let pending = held.write(id);
    let error = bounded("detaching", LONG, || device.detach()).expect_err("the queue's thread hangs");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    bounded("dropping", LONG, || drop(device));
    assert_live(id, std::process::id() as i32);
    drop(held);
    await_state(id, Recovery::Reissue, std::process::id() as i32);
    let device = builder(&disk).recover(id).expect("recover");
    assert_eq!(pending.result(), Ok(()));
    assert_reads(id, 2, HELD);
    client::close(&device);
}

fn what_cannot_be_recovered_is_refused_with_a_reason() {
    let refused = |disk: &Arc<Disk>, id: u32, kind: ErrorKind, words: &[&str]| {
        let error = bounded("a refusal", LONG, || builder(disk).recover(id)).expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
    };
    let disk = Disk::new(Geometry::bytes(SIZE));
    refused(&disk, 4711, ErrorKind::NotFound, &["there is no such device"]);
    let plain = client::start(&disk);
    refused(&disk, plain.id(), ErrorKind::State, &["built without recovery", "LIVE"]);
    client::close(&plain);

    let live = builder(&disk).recovery(Recovery::Wait).start().expect("start");
    let me = format!("pid {}", std::process::id());
    refused(&disk, live.id(), ErrorKind::Busy, &["LIVE", &me]);
    client::write(&client::direct(&live), 1, 0, 4096).expect("it is served as before");
    controller().stop(live.id(), LONG).expect("stop");
    refused(&disk, live.id(), ErrorKind::State, &["DEAD"]);
    client::close(&live);

    let (disk, id, _) = detached(Recovery::Wait);
    let larger = Disk::new(Geometry::bytes(2 * SIZE));
    refused(&larger, id, ErrorKind::InvalidInput, &["size in bytes 4194304 and not 8388608"]);
    let flushing = Disk::new(Geometry::bytes(SIZE).volatile_cache());
    refused(&flushing, id, ErrorKind::InvalidInput, &["a volatile cache, which it has not and the backend has"]);
    // Somebody else is about to recover it. Before 6.16 the last server's rings may still be on their way out.
    let mut claim = None;
    eventually("the last server has let go", || {
        claim = File::options().read(true).write(true).open(character_path(id)).ok();
        claim.is_some()
    });
    refused(&disk, id, ErrorKind::Busy, &[&me]);
    drop(claim);
    let device = builder(&disk).recover(id).expect("recover");
    assert_reads(id, 1, 0);
    client::close(&device);
}

fn closing_writes_dirty_pages_back_in_every_mode() {
    for mode in modes().into_iter().chain([Recovery::None]) {
        let disk = Disk::new(Geometry::bytes(SIZE));
        let device = builder(&disk).recovery(mode).start().expect("start");
        let file = client::open(&device, 0);
        let wrote = client::write(&file, 5, 0, 256 << 10).expect("write");
        drop(file);
        client::close(&device);
        assert_same(&disk.stored(0, wrote.len()), &wrote, &format!("stored with recovery {mode}"));
    }
}

fn a_recoverable_device_is_listed_and_deleted_only_by_id() {
    const GRACE: Duration = Duration::from_millis(300);
    for mode in modes() {
        let (disk, id, file) = detached(mode);
        let _guard = Guard(id);
        // Whoever is to find it deleted at once has let go of it.
        let waiting = if mode == Recovery::FailIo {
            drop(file);
            None
        } else {
            Some(Pending::write_to(file, 1, 4096))
        };
        let controller = controller();
        let found = orphan::list(&controller, GRACE).expect("list");
        let one = found.iter().find(|device| device.id == id).expect("listed");
        assert_eq!(one.class, Class::Recoverable, "{one}");
        let cleaned = orphan::clean(&controller, &found);
        let outcome = |cleaned: &[orphan::Cleaned]| {
            cleaned.iter().find(|cleaned| cleaned.id == id).map(|cleaned| cleaned.outcome.clone())
        };
        assert!(matches!(outcome(&cleaned), Some(Outcome::Left(_))), "{cleaned:?}");
        await_state(id, mode, std::process::id() as i32);
        let begun = Instant::now();
        let cleaned = orphan::clean_ids(&controller, &[id], GRACE).expect("clean");
        if let Some(waiting) = waiting {
            // Who waited in it held it open for a moment more.
            assert!(matches!(outcome(&cleaned), Some(Outcome::Deleted | Outcome::Deleting)), "{cleaned:?}");
            assert_eq!(waiting.result(), Err(libc::EIO));
        } else {
            assert!(matches!(outcome(&cleaned), Some(Outcome::Deleted)), "{cleaned:?}");
        }
        assert!(begun.elapsed() < LONG);
        eventually("it is gone", || !ids().contains(&id));
        client::close(&builder(&disk).id(id).start().expect("the id can be used again"));
    }
}
