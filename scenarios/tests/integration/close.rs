//! Closing: with the kernel's dirty pages, with I/O in flight, with somebody holding on, from many sides at once.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, umount};
use ublkit::ctrl::block_path;
use ublkit::holders::How;
use ublkit::{Controller, DataMode, Deletion, Device, ErrorKind, Geometry, Recovery};

use super::client::{self, KIB, MIB, assert_same, bounded, builder, direct, eventually, open, start, start_with};
use super::disk::{Disk, Op};
use super::runner::{cases, ids};

cases!("close":
    a_held_descriptor_is_named_and_defers_the_deletion,
    a_mount_is_named_and_defers_the_deletion,
    eight_threads_close_at_once,
    closing_twice_says_the_same_twice,
    dropping_without_closing_leaves_nothing,
    dropping_while_held_is_bounded,
    a_queue_thread_may_not_close_its_device,
    a_worker_may_not_close_its_device,
    dirty_pages_reach_the_backend,
    files_reach_the_backend_in_every_mode,
    no_acknowledged_write_is_lost_while_closing in 60 s,
    a_backend_call_that_never_returns_inline in 60 s,
    a_backend_call_that_never_returns_in_a_worker in 60 s,
    a_detached_request_that_is_never_completed,
    a_sink_that_panics_keeps_nobody_from_closing,
    a_device_that_somebody_else_stopped,
    a_device_that_somebody_else_deleted,
);

fn deferred(device: &Device) -> Vec<ublkit::holders::Holder> {
    let closed = bounded("closing", Duration::from_secs(10), || device.close()).expect("close");
    match closed.deletion {
        Deletion::Deferred { holders } => holders,
        other => panic!("held, and {other:?}"),
    }
}

fn gone(id: u32) -> bool {
    let controller = Controller::open().expect("open");
    controller.get_dev_info(id).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

fn a_held_descriptor_is_named_and_defers_the_deletion() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start_with(&disk, |builder| builder.delete_deadline(Duration::from_millis(300)));
    let (id, held) = (device.id(), direct(&device));
    let holders = deferred(&device);
    let mine = |how: &How| *how == How::Fd(held.as_raw_fd());
    assert!(
        holders.iter().any(|holder| holder.pid == Some(std::process::id() as i32) && mine(&holder.how)),
        "{holders:?}"
    );
    let told = device.close().expect("again").to_string();
    assert!(told.contains(&format!("pid {}", std::process::id())), "{told}");
    assert!(!block_path(id).exists(), "the device itself is gone");
    assert!(client::read(&held, 0, 512).is_err(), "and fails what is still sent to it");
    assert!(!gone(id), "its id is taken");
    let error = builder(&disk).id(id).start().expect_err("the id is taken");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    drop(held);
    eventually("the id is free once the descriptor is closed", || gone(id));
    // The driver forgets an id a moment later than it stops describing the device.
    let device = std::cell::RefCell::new(None);
    eventually("a device of the same id", || {
        *device.borrow_mut() = builder(&disk).id(id).start().ok();
        device.borrow().is_some()
    });
    client::close(&device.into_inner().expect("there is one"));
}

fn a_mount_is_named_and_defers_the_deletion() {
    let disk = Disk::new(Geometry::bytes(8 * MIB).volatile_cache().discard(4096));
    let device = start_with(&disk, |builder| builder.delete_deadline(Duration::from_millis(300)));
    let id = device.id();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(device.path()).status().expect("run mkfs.ext4");
    assert!(made.success(), "{made}");
    let at = tempfile::tempdir().expect("a directory");
    nix::mount::mount(Some(&device.path()), at.path(), Some("ext4"), MsFlags::empty(), None::<&str>).expect("mount");
    // On the device, and never synced by anybody but the closing.
    std::fs::write(at.path().join("file"), client::pattern(1, 0, 65536)).expect("write a file");
    let holders = deferred(&device);
    let unmounted = umount(at.path());
    assert!(holders.iter().any(|holder| holder.how == How::Mount(at.path().to_owned())), "{holders:?}");
    unmounted.expect("umount");
    eventually("the id is free once it is unmounted", || gone(id));
}

fn eight_threads_close_at_once() {
    for held in [false, true] {
        let disk = Disk::new(Geometry::bytes(MIB));
        let patience = if held { Duration::from_millis(200) } else { Duration::from_secs(10) };
        let device = start_with(&disk, |builder| builder.queues(2).delete_deadline(patience));
        let file = held.then(|| direct(&device));
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| device.close())).collect();
            threads.into_iter().map(|thread| thread.join().expect("join").expect("close")).collect::<Vec<_>>()
        });
        assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
        assert_eq!(matches!(results[0].deletion, Deletion::Deferred { .. }), held, "{results:?}");
        drop(file);
    }
}

fn closing_twice_says_the_same_twice() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start(&disk);
    client::close(&device);
    let second = bounded("closing again", Duration::from_millis(100), || device.close()).expect("close again");
    assert_eq!(second.deletion, Deletion::Complete);
    assert!(!device.path().exists());
    drop(device);
    assert_eq!(Arc::strong_count(&disk), 1, "the backend is free again");
}

fn dropping_without_closing_leaves_nothing() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start_with(&disk, |builder| builder.queues(2).workers(2));
    let (id, path) = (device.id(), device.path());
    client::write(&direct(&device), 1, 0, 4096).expect("write");
    bounded("dropping", Duration::from_secs(6), || drop(device));
    assert!(!path.exists());
    eventually("the id is free", || gone(id));
    assert_eq!(Arc::strong_count(&disk), 1, "the backend is free again");
}

fn dropping_while_held_is_bounded() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start(&disk);
    let (id, held) = (device.id(), direct(&device));
    bounded("dropping", Duration::from_secs(8), || drop(device));
    drop(held);
    eventually("the id is free", || gone(id));
}

/// What closing says inside the backend, on whichever thread serves a write.
fn close_from_within(workers: usize) {
    let disk = Disk::new(Geometry::bytes(MIB));
    let (slot, said) = (Arc::new(OnceLock::<Weak<Device>>::new()), Arc::new(Mutex::new(None)));
    disk.hook({
        let (slot, said) = (Arc::clone(&slot), Arc::clone(&said));
        move |call| {
            if call.op == Op::Write {
                let device = slot.get().and_then(Weak::upgrade).expect("it is served");
                *said.lock().expect("lock") = Some(device.close());
            }
            Ok(())
        }
    });
    let device =
        Arc::new(start_with(&disk, |builder| builder.workers(workers).stop_deadline(Duration::from_secs(3))));
    slot.set(Arc::downgrade(&device)).expect("once");
    bounded("the write", Duration::from_secs(2), || client::write(&direct(&device), 1, 0, 512)).expect("write");
    let error = said.lock().expect("lock").take().expect("asked").expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::State, "{error}");
    client::write(&direct(&device), 1, 4096, 512).expect("the device lives on");
    client::close(&device);
}

fn a_queue_thread_may_not_close_its_device() {
    close_from_within(0);
}

/// A worker that closes its own device waits for its own request: once, until the deadline, with the I/O lost.
fn a_worker_may_not_close_its_device() {
    close_from_within(2);
}

fn dirty_pages_reach_the_backend() {
    let disk = Disk::new(Geometry::bytes(4 * MIB).volatile_cache());
    let device = start_with(&disk, |builder| builder.queues(2).delete_deadline(Duration::from_millis(300)));
    // Kept open: the last close of a descriptor would write the pages back by itself.
    let file = open(&device, 0);
    let wrote = client::write(&file, 1, 4096, 3 << 20).expect("write");
    deferred(&device);
    assert_same(&disk.stored(4096, 3 << 20), &wrote, "stored when close() has returned");
    drop(file);
    eventually("the id is free", || gone(device.id()));
}

/// Files that nobody has synced, of a file system that stays mounted.
fn files_reach_the_backend_in_every_mode() {
    let mount = |device: &Device, at: &Path| {
        nix::mount::mount(Some(&device.path()), at, Some("ext4"), MsFlags::empty(), None::<&str>).expect("mount");
    };
    for mode in [Recovery::None, Recovery::Wait, Recovery::Reissue] {
        let disk = Disk::new(Geometry::bytes(8 * MIB).volatile_cache());
        let device = start_with(&disk, |builder| builder.recovery(mode).delete_deadline(Duration::from_millis(300)));
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(device.path()).status().expect("run mkfs.ext4");
        assert!(made.success(), "{made}");
        let at = tempfile::tempdir().expect("a directory");
        mount(&device, at.path());
        let wrote = client::pattern(1, 0, 256 << 10);
        std::fs::write(at.path().join("file"), &wrote).expect("write a file");
        let holders = deferred(&device);
        umount(at.path()).expect("umount");
        assert!(holders.iter().any(|holder| matches!(holder.how, How::Mount(_))), "{holders:?}");
        eventually("the id is free once it is unmounted", || gone(device.id()));

        let device = start(&disk);
        mount(&device, at.path());
        let read = std::fs::read(at.path().join("file"));
        umount(at.path()).expect("umount");
        assert_same(&read.expect("the file is there"), &wrote, &format!("the file, with recovery {mode}"));
        client::close(&device);
    }
}

fn no_acknowledged_write_is_lost_while_closing() {
    for (mode, workers) in
        [(DataMode::Copy, 0), (DataMode::Copy, 4), (DataMode::UserCopy, 0), (DataMode::UserCopy, 4)]
    {
        let what = format!("{mode:?}, {workers} workers");
        let disk = Disk::new(Geometry::bytes(8 * MIB));
        let device = start_with(&disk, |builder| builder.queues(2).data_mode(mode).workers(workers));
        let begun = AtomicU64::new(0);
        let acknowledged: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4u64)
                .map(|writer| {
                    let (file, begun) = (direct(&device), &begun);
                    scope.spawn(move || {
                        let mut done = Vec::new();
                        for round in 0.. {
                            let offset = writer * 2 * MIB + round % 250 * 8 * KIB;
                            begun.fetch_add(1, Ordering::Relaxed);
                            match client::write(&file, writer + 10 * (round / 250), offset, 4096) {
                                Ok(_) => done.push(round),
                                Err(_) => break,
                            }
                        }
                        done
                    })
                })
                .collect();
            while begun.load(Ordering::Relaxed) < 100 {
                std::thread::sleep(Duration::from_millis(1));
            }
            bounded("closing", Duration::from_secs(20), || device.close()).expect("close");
            writers.into_iter().map(|writer| writer.join().expect("join")).collect()
        });
        let mut checked = 0;
        for (writer, rounds) in (0u64..).zip(&acknowledged) {
            // Each place holds the last write to it that was acknowledged, or the one after that was not.
            let Some(&last) = rounds.last() else { continue };
            assert_eq!(rounds.len() as u64, last + 1, "{what}: nothing fails before the end");
            for &round in rounds.iter().rev().take(249) {
                let offset = writer * 2 * MIB + round % 250 * 8 * KIB;
                let want = client::pattern(writer + 10 * (round / 250), offset, 4096);
                assert_same(&disk.stored(offset, 4096), &want, &format!("{what}: writer {writer}, round {round}"));
                checked += 1;
            }
        }
        assert!(checked >= 90, "{what}: {checked} acknowledged writes were checked");
        eventually("the id is free", || gone(device.id()));
    }
}

/// Holds every write until told otherwise.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    entered: AtomicBool,
}

impl Gate {
    fn pass(&self) {
        self.entered.store(true, Ordering::SeqCst);
        let open = self.open.lock().expect("lock");
        drop(self.opened.wait_while(open, |open| !*open).expect("lock"));
    }

    fn open(&self) {
        *self.open.lock().expect("lock") = true;
        self.opened.notify_all();
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Opens the gate when the trial ends, however it ends.
struct Opened<'a>(&'a Gate);

fn blocked_device(workers: usize) -> (Arc<Disk>, Arc<Gate>, Device) {
    let (disk, gate) = (Disk::new(Geometry::bytes(MIB)), Arc::new(Gate::default()));
    disk.hook({
        let gate = Arc::clone(&gate);
        move |call| {
            if call.op == Op::Write {
                gate.pass();
            }
            Ok(())
        }
    });
    let device = start_with(&disk, |builder| {
        builder.workers(workers).stop_deadline(Duration::from_millis(500)).delete_deadline(Duration::from_secs(2))
    });
    (disk, gate, device)
}

/// The write that hangs in the backend, sent from a thread of its own: its result, once there is one.
fn hanging_write(file: File, gate: &Gate) -> std::sync::mpsc::Receiver<std::io::Result<()>> {
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let wrote = client::write(&file, 1, 0, 512).map(drop);
        drop(file);
        let _ = done.send(wrote);
    });
    eventually("the write is in the backend", || gate.entered.load(Ordering::SeqCst));
    result
}

/// A queue's own thread is stuck in the backend. The kernel lets nobody else give up its requests: the client waits
/// until the call returns (or the process ends). Then everything ends by itself, and closing again finishes.
fn a_backend_call_that_never_returns_inline() {
    let (disk, gate, device) = blocked_device(0);
    let _opened = Opened(&gate);
    let result = hanging_write(direct(&device), &gate);
    let error = bounded("closing", Duration::from_secs(20), || device.close()).expect_err("stuck");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(device.first_error().is_some());
    gate.open();
    let wrote = result.recv_timeout(Duration::from_secs(10)).expect("the client's write ends");
    if wrote.is_ok() {
        assert_same(&disk.stored(0, 512), &client::pattern(1, 0, 512), "what was acknowledged");
    }
    let closed = bounded("closing again", Duration::from_secs(10), || device.close()).expect("close");
    assert_eq!(closed.deletion, Deletion::Complete);
    drop(device);
    eventually("the backend is free again", || Arc::strong_count(&disk) == 1);
}

fn a_backend_call_that_never_returns_in_a_worker() {
    let (disk, gate, device) = blocked_device(2);
    let _opened = Opened(&gate);
    let id = device.id();
    let result = hanging_write(direct(&device), &gate);
    let begun = Instant::now();
    let error = bounded("closing", Duration::from_secs(15), || device.close()).expect_err("stuck");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("worker"), "{error}");
    let left = Duration::from_secs(15).saturating_sub(begun.elapsed());
    let wrote = result.recv_timeout(left).expect("the client's write ends while the call still hangs");
    assert!(wrote.is_err(), "{wrote:?}");
    eventually("the device is gone while the call still hangs", || gone(id));
    gate.open();
    bounded("dropping", Duration::from_secs(5), || drop(device));
    eventually("the backend is free again", || Arc::strong_count(&disk) == 1);
}

fn a_detached_request_that_is_never_completed() {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let device = Device::builder_with_handlers(Geometry::bytes(MIB), {
        let kept = Arc::clone(&kept);
        move |_| {
            let kept = Arc::clone(&kept);
            Ok(move |mut request: ublkit::Request<'_>| {
                if request.operation() == ublkit::Operation::Write {
                    kept.lock().expect("lock").push(request.detach());
                } else {
                    request.buffer().fill(0);
                    request.complete();
                }
            })
        }
    })
    .depth(8)
    .data_mode(DataMode::UserCopy)
    .stop_deadline(Duration::from_millis(500))
    .delete_deadline(Duration::from_millis(300))
    .start()
    .expect("start");
    let id = device.id();
    let file = direct(&device);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| client::write(&file, 1, 0, 4096).map(drop));
        eventually("it is kept", || !kept.lock().expect("lock").is_empty());
        let closed = bounded("closing", Duration::from_secs(15), || device.close());
        assert!(writer.join().expect("join").is_err(), "the write was never completed");
        assert!(closed.is_ok(), "{closed:?}");
    });
    drop(file);
    eventually("the device is gone", || gone(id));
    assert!(device.first_error().is_some(), "that requests were given up is told");
    // What is left of the request is still sound.
    let mut request = kept.lock().expect("lock").pop().expect("kept");
    assert!(request.data().is_err(), "its data went with the device");
    request.complete();
}

/// Whatever is told, and on whichever thread.
fn a_sink_that_panics_keeps_nobody_from_closing() {
    for workers in [0, 2] {
        let disk = Disk::new(Geometry::bytes(MIB));
        disk.hook(|call| if call.op == Op::Write { panic!("planted: the backend panics") } else { Ok(()) });
        let told = Arc::new(AtomicU64::new(0));
        let device = start_with(&disk, |builder| {
            let told = Arc::clone(&told);
            builder.workers(workers).on_event(move |event| {
                told.fetch_add(1, Ordering::SeqCst);
                panic!("planted: the sink panics at {event}");
            })
        });
        assert!(client::write(&direct(&device), 1, 0, 512).is_err(), "the backend panicked");
        client::read(&direct(&device), 0, 512).expect("the device goes on");
        bounded("closing", Duration::from_secs(15), || client::close(&device));
        assert!(told.load(Ordering::SeqCst) >= 9, "each phase and the backend's panic");
    }
}

fn a_device_that_somebody_else_stopped() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start_with(&disk, |builder| builder.queues(2));
    let controller = Controller::open().expect("open");
    controller.stop(device.id(), Duration::from_secs(10)).expect("stop");
    controller.stop(device.id(), Duration::from_secs(10)).expect("stopping again is no error");
    assert!(!device.path().exists());
    assert!(!gone(device.id()));
    assert_told(&device);
    client::close(&device);
}

/// A server that waits for a signal, or for an error, learns that it serves nothing any more.
fn assert_told(device: &Device) {
    let error = device.wait_error(Duration::from_secs(5)).expect("told");
    assert_eq!(error.kind(), ErrorKind::State, "{error}");
}

fn a_device_that_somebody_else_deleted() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start_with(&disk, |builder| builder.queues(2).workers(2));
    let controller = Controller::open().expect("open");
    controller.delete(device.id(), Duration::from_secs(10)).expect("the server lets go by itself");
    assert!(gone(device.id()));
    assert_told(&device);
    let closed = bounded("closing", Duration::from_secs(5), || device.close()).expect("close");
    assert_eq!(closed.deletion, Deletion::Complete);
    assert!(ids().is_empty() || !ids().contains(&device.id()));
}
