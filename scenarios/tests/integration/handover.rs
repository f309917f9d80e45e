//! Whose a device is: servers that leave it to others, and what those that hang or have failed may still do to it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use nix::libc;
use ublkit::ctrl::State;
use ublkit::sys::ublk::Features;
use ublkit::{Device, ErrorKind, Geometry, Operation, Recovery, Request};

use super::client::{self, Aligned, MIB, assert_same, bounded, builder, eventually};
use super::disk::{Disk, Op};
use super::keeper::Keeper;
use super::recoverable::{
    Guard, HELD, LONG, Pending, Place, SIZE, assert_live, assert_reads, await_state, controller, ended, modes, open,
    recovered,
};
use super::runner::{cases, ids};

cases!("handover":
    a_detached_device_is_taken_over_under_load in 60 s unless DETACH_UNDER_LOAD,
    detaching_is_refused_where_it_makes_no_sense,
    a_worker_that_hangs_does_not_keep_a_device_from_being_detached,
    what_another_server_has_is_left_alone,
    what_another_server_of_this_process_has_is_left_alone,
    what_was_made_quiescent_from_outside_is_left_alone,
    what_has_failed_here_is_closed_here,
    what_has_failed_here_can_be_left_and_recovered,
    a_queue_that_hangs_lets_go_when_its_call_returns,
    closing_writes_dirty_pages_back_in_every_mode,
);

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
    // Since 6.18 the kernel looks for partitions some time after the start, and first writes back what is dirty.
    for _ in 0..20 {
        let written_back = Arc::new(AtomicBool::new(false));
        let is_written_back = Arc::clone(&written_back);
        let device = Device::builder_with_handlers(Geometry::bytes(SIZE), move |_| {
            let written_back = Arc::clone(&is_written_back);
            Ok(move |mut request: Request<'_>| {
                if request.operation() == Operation::Write {
                    if request.offset() != MIB {
                        std::panic::panic_any(Bomb);
                    }
                    written_back.store(true, Ordering::Relaxed);
                } else {
                    request.buffer().fill(0);
                }
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
        if !written_back.load(Ordering::Relaxed) {
            return (device, dirty);
        }
        bounded("closing", LONG, || device.close()).expect("close");
    }
    panic!("the page is written back each time");
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
