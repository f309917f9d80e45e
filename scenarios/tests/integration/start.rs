//! Starting is all or nothing. What a start leaves behind fails a trial by itself: see the runner.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use ublkit::ctrl::{State, block_path};
use ublkit::{Controller, DataMode, Device, ErrorKind, Geometry, QueueInfo, Request};

use super::client::{self, MIB, bounded, builder, direct};
use super::disk::Disk;
use super::runner::{Footprint, cases, ids};

cases!("start":
    a_handler_that_cannot_be_opened,
    a_handler_that_panics_when_opened,
    a_handler_that_hangs_when_opened_is_bounded unless ABANDONED_START,
    every_phase_is_told_in_its_order,
    an_id_that_is_taken,
    an_id_of_ones_own,
    every_data_mode_is_granted_as_asked,
    locked_buffers,
    fifty_cycles_leave_nothing in 120 s,
    eight_devices_side_by_side in 60 s,
);

type Serving = Box<dyn FnMut(Request<'_>)>;

fn failing_start(queue: u16, fail: fn() -> io::Result<Serving>) -> ublkit::Error {
    let before = Footprint::now();
    let opened = Arc::new(AtomicUsize::new(0));
    let error = Device::builder_with_handlers(Geometry::bytes(MIB), {
        let opened = Arc::clone(&opened);
        move |info: &QueueInfo| -> io::Result<Serving> {
            opened.fetch_add(1, Ordering::SeqCst);
            if info.queue == queue { fail() } else { Ok(Box::new(|request: Request<'_>| request.complete())) }
        }
    })
    .queues(2)
    .depth(8)
    .start()
    .expect_err("the start fails");
    assert!(opened.load(Ordering::SeqCst) >= 1);
    assert_eq!(before.left_behind(), None, "{error}");
    error
}

fn a_handler_that_cannot_be_opened() {
    for queue in [0, 1] {
        let error = bounded("the start", Duration::from_secs(8), || {
            failing_start(queue, || Err(io::Error::from_raw_os_error(Errno::ENOSPC as i32)))
        });
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Queue, Some(Errno::ENOSPC as i32)), "{error}");
        assert!(error.to_string().contains(&format!("queue {queue}")), "{error}");
    }
}

fn a_handler_that_panics_when_opened() {
    for queue in [0, 1] {
        let error = bounded("the start", Duration::from_secs(8), || {
            failing_start(queue, || panic!("planted: the handler panics when opened"))
        });
        assert_eq!(error.kind(), ErrorKind::Queue, "{error}");
        assert!(error.to_string().contains("panicked"), "{error}");
    }
}

/// It comes back after the start has been given up, and then ends at once: it once went on to wait for requests, because
/// it took the call to give up for one of the wake-ups of its own beginning.
fn a_handler_that_hangs_when_opened_is_bounded() {
    let before = ids();
    let error = bounded("the start", Duration::from_secs(4), || {
        Device::builder_with_handlers(Geometry::bytes(MIB), |info: &QueueInfo| {
            if info.queue == 1 {
                std::thread::sleep(Duration::from_secs(2));
            }
            Ok(|request: Request<'_>| request.complete())
        })
        .queues(2)
        .depth(8)
        .start_deadline(Duration::from_millis(500))
        .start()
        .expect_err("the start fails")
    });
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    client::eventually("the device is gone", || ids() == before);
}

fn every_phase_is_told_in_its_order() {
    use ublkit::{Event, Phase};
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let device = builder(&Disk::new(Geometry::bytes(MIB)))
        .on_event({
            let told = Arc::clone(&told);
            move |event| {
                if let Event::Phase(phase) = event {
                    told.lock().expect("lock").push(*phase);
                }
            }
        })
        .start()
        .expect("start");
    let begun = [Phase::Added, Phase::Configured, Phase::Fetched, Phase::Started, Phase::Visible];
    assert_eq!(*told.lock().expect("lock"), begun);
    device.close().expect("close");
    let ended = [Phase::Stopping, Phase::Stopped, Phase::Joined, Phase::Deleted];
    assert_eq!(told.lock().expect("lock")[begun.len()..], ended);
}

fn an_id_that_is_taken() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = client::start(&disk);
    let before = Footprint::now();
    let other = Disk::new(Geometry::bytes(MIB));
    let error = builder(&other).id(device.id()).start().expect_err("taken");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Busy, Some(Errno::EEXIST as i32)), "{error}");
    assert_eq!(before.left_behind(), None);
    assert_eq!(Arc::strong_count(&other), 1);
    client::write(&direct(&device), 1, 0, 4096).expect("the first one is not disturbed");
    client::close(&device);
}

fn an_id_of_ones_own() {
    // The last one is the highest there is: minor numbers have 20 bits.
    for id in [7, 4711, (1 << 20) - 1] {
        let disk = Disk::new(Geometry::bytes(MIB));
        let device = builder(&disk).id(id).start().expect("start");
        assert_eq!((device.id(), device.path()), (id, block_path(id)));
        let info = Controller::open().expect("open").get_dev_info(id).expect("info");
        assert_eq!((info.id(), info.state()), (id, State::Live));
        let wrote = client::write(&direct(&device), u64::from(id), 0, 4096).expect("write");
        client::assert_same(&disk.stored(0, 4096), &wrote, "stored");
        client::close(&device);
        assert!(!ids().contains(&id));
    }
}

fn every_data_mode_is_granted_as_asked() {
    use ublkit::sys::ublk::Features;
    for (mode, user_copy) in [(DataMode::Copy, false), (DataMode::UserCopy, true)] {
        let device = builder(&Disk::new(Geometry::bytes(MIB))).data_mode(mode).start().expect("start");
        assert_eq!(device.info().features().contains(Features::USER_COPY), user_copy, "{:?}", device.info());
        client::close(&device);
    }
}

fn locked_buffers() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let locked = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("VmLck").to_owned();
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    let before = locked();
    let device = builder(&disk).depth(16).lock_buffers(true).start().expect("start");
    assert!(locked() >= before + 16 * 64, "{} kB are locked, were {before}", locked());
    client::write(&direct(&device), 1, 0, 65536).expect("write");
    client::close(&device);
    drop(device);
    client::eventually("it is unlocked again", || locked() == before);
}

fn maps() -> usize {
    std::fs::read_to_string("/proc/self/maps").expect("maps").lines().count()
}

fn cycle(round: u64) {
    let disk = Disk::new(Geometry::bytes(MIB));
    let mode = if round.is_multiple_of(2) { DataMode::Copy } else { DataMode::UserCopy };
    let device = client::start_with(&disk, |builder| {
        builder.queues(1 + (round % 2) as u16).workers((round % 3) as usize).data_mode(mode)
    });
    let file = direct(&device);
    let wrote = client::write(&file, round, round * 4096, 4096).expect("write");
    client::assert_same(&client::read(&file, round * 4096, 4096).expect("read"), &wrote, "read");
    drop(file);
    client::close(&device);
    assert!(!device.path().exists());
}

fn fifty_cycles_leave_nothing() {
    // The first ones may leave what a process needs once: stacks that are kept, the allocator's arenas.
    (0..4).for_each(cycle);
    let (footprint, maps_before) = (Footprint::now(), maps());
    (0..50).for_each(cycle);
    assert_eq!(footprint.left_behind(), None);
    client::eventually("the memory maps are gone", || maps() <= maps_before + 8);
}

fn eight_devices_side_by_side() {
    let disks: Vec<_> = (0..8).map(|_| Disk::new(Geometry::bytes(MIB))).collect();
    let devices: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = disks.iter().map(|disk| scope.spawn(|| client::start(disk))).collect();
        threads.into_iter().map(|thread| thread.join().expect("start")).collect()
    });
    std::thread::scope(|scope| {
        for (writer, device) in (0..).zip(&devices) {
            scope.spawn(move || client::write(&direct(device), writer, 8192, 65536).expect("write"));
        }
    });
    for (writer, disk) in (0..).zip(&disks) {
        client::assert_same(&disk.stored(8192, 65536), &client::pattern(writer, 8192, 65536), "each has its own");
    }
    std::thread::scope(|scope| devices.iter().for_each(|device| drop(scope.spawn(|| client::close(device)))));
}
