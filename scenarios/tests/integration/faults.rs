//! Backends and handlers that misbehave cost one request each, not the device.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use ublkit::{Device, Event, Geometry, Operation, Request};

use super::client::{self, MIB, assert_same, builder, direct, errno};
use super::disk::{Disk, Op};
use super::runner::cases;

cases!("faults":
    a_panic_inline_fails_one_request,
    a_panic_in_a_worker_fails_one_request,
    a_panic_in_user_copy_mode_fails_one_request,
    a_dropped_request_fails_and_is_told,
    a_dropped_detached_request_fails_and_is_told,
    a_healthy_device_has_no_first_error,
);

#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Event>>>);

impl Told {
    fn sink(&self) -> impl Fn(&Event) + Send + Sync + 'static {
        let told = self.clone();
        move |event| {
            if !matches!(event, Event::Phase(_)) {
                told.0.lock().expect("lock").push(event.clone());
            }
        }
    }

    fn all(&self) -> Vec<Event> {
        self.0.lock().expect("lock").clone()
    }
}

fn a_panic_inline_fails_one_request() {
    a_panic(|builder| builder);
}

fn a_panic_in_a_worker_fails_one_request() {
    a_panic(|builder| builder.workers(2));
}

fn a_panic_in_user_copy_mode_fails_one_request() {
    a_panic(|builder| builder.data_mode(ublkit::DataMode::UserCopy));
    a_panic(|builder| builder.data_mode(ublkit::DataMode::UserCopy).workers(2));
}

fn a_panic(choose: fn(client::Builder) -> client::Builder) {
    let disk = Disk::new(Geometry::bytes(MIB).volatile_cache().discard(4096));
    let told = Told::default();
    let device = choose(builder(&disk)).on_event(told.sink()).start().expect("start");
    let file = direct(&device);
    client::write(&file, 1, 0, 4096).expect("write");
    for (op, act) in [
        // Of an odd length, so that udev, which reads the device too, does not take the panic.
        (Op::Read, (|file| client::read(file, 512, 1536).map(drop)) as fn(&std::fs::File) -> io::Result<()>),
        (Op::Write, |file| client::write(file, 2, 4096, 4096).map(drop)),
        (Op::Flush, |file| file.sync_all()),
        (Op::Discard, |file| ublkit::blkdev::discard(file, 0, 4096)),
    ] {
        disk.hook(move |call| {
            assert!(call.op != op || (op == Op::Read && call.len != 1536), "planted: the backend panics on {op:?}");
            Ok(())
        });
        let before = told.all().len();
        assert_eq!(errno(act(&file)), Some(Errno::EIO as i32), "{op:?}");
        disk.unhook();
        client::eventually("the panic is told", || told.all().len() > before);
        let events = told.all();
        let [Event::Panicked { queue: 0, message }] = &events[before..] else {
            panic!("{op:?}: one panic is told: {events:?}");
        };
        assert!(message.contains("planted") && message.contains(&format!("{op:?}")), "{message}");
        act(&file).unwrap_or_else(|error| panic!("{op:?} works again: {error}"));
    }
    client::write(&file, 3, 8192, 65536).expect("write");
    assert_same(&disk.stored(8192, 65536), &client::pattern(3, 8192, 65536), "stored afterwards");
    let stats = device.stats()[0];
    assert_eq!((stats.panicked, stats.failed, stats.dropped), (4, 4, 0), "{stats:?}");
    assert!(device.first_error().is_none());
    drop(file);
    client::close(&device);
}

fn a_dropped_request_fails_and_is_told() {
    dropped(false);
}

fn a_dropped_detached_request_fails_and_is_told() {
    dropped(true);
}

/// A handler that loses the requests to the second half of its disk.
fn dropped(detached: bool) {
    let told = Told::default();
    let device = Device::builder_with_handlers(Geometry::bytes(MIB), move |_| {
        Ok(move |mut request: Request<'_>| {
            if request.offset() >= MIB / 2 && request.operation() == Operation::Write {
                if detached {
                    let detached = request.detach();
                    std::thread::spawn(move || drop(detached));
                }
                return;
            }
            request.buffer().fill(0x5a);
            request.complete();
        })
    })
    .on_event(told.sink())
    .depth(8)
    .delete_deadline(Duration::from_secs(10))
    .start()
    .expect("start");
    let file = direct(&device);
    for round in 1..=3u64 {
        let offset = MIB / 2 + round * 4096;
        assert_eq!(errno(client::write(&file, 1, offset, 1024)), Some(Errno::EIO as i32));
        client::eventually("it is told", || told.all().len() as u64 == round);
        let Some(Event::RequestDropped { io }) = told.all().pop() else { panic!("{:?}", told.all()) };
        assert_eq!((io.operation(), io.offset(), io.len()), (Operation::Write, offset, 1024));
        client::write(&file, 1, 0, 1024).expect("write elsewhere");
        assert_same(&client::read(&file, offset, 512).expect("read"), &[0x5a; 512], "read");
    }
    let stats = device.stats()[0];
    assert_eq!((stats.dropped, stats.failed, stats.panicked), (3, 3, 0), "{stats:?}");
    drop(file);
    client::close(&device);
}

fn a_healthy_device_has_no_first_error() {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = client::start(&disk);
    client::write(&direct(&device), 1, 0, 4096).expect("write");
    assert!(device.first_error().is_none());
    let waited = client::bounded("waiting for an error", Duration::from_secs(5), || {
        device.wait_error(Duration::from_millis(50))
    });
    assert!(waited.is_none(), "{waited:?}");
    client::close(&device);
    assert!(device.first_error().is_none(), "closing is no error");
}
