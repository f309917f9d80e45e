//! The raw level: requests that are completed later, elsewhere, and out of order.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use ublkit::{DataMode, DetachedRequest, Device, Geometry, Handler, Operation, Request};

use super::client::{self, KIB, MIB, assert_same, direct};
use super::runner::cases;

cases!("handlers":
    another_thread_completes_in_reverse,
    another_thread_completes_in_reverse_in_user_copy_mode,
    the_same_thread_completes_later,
    each_queue_has_a_handler_of_its_own,
    requests_say_what_they_are,
);

const HELD: usize = 4;

fn another_thread_completes_in_reverse() {
    reversed(DataMode::Copy);
}

fn another_thread_completes_in_reverse_in_user_copy_mode() {
    reversed(DataMode::UserCopy);
}

/// Writes wait until there are four, and are completed last first; reads of where they went say what each held.
fn reversed(mode: DataMode) {
    let (sender, receiver) = mpsc::channel::<DetachedRequest>();
    let order = Arc::new(Mutex::new(Vec::new()));
    let helper = std::thread::spawn({
        let order = Arc::clone(&order);
        move || {
            let mut held = Vec::new();
            let mut seen = Vec::new();
            for mut request in receiver {
                if request.operation() == Operation::Write {
                    let data = request.data().expect("data").to_vec();
                    seen.push((request.offset(), data));
                    held.push(request);
                    if held.len() == HELD {
                        for request in held.drain(..).rev() {
                            order.lock().expect("lock").push(request.offset());
                            request.complete();
                        }
                    }
                } else {
                    let offset = request.offset();
                    let stored = seen.iter().rfind(|(at, _)| *at == offset);
                    if let Some((_, data)) = stored {
                        request.buffer()[..data.len()].copy_from_slice(data);
                    } else {
                        request.buffer().fill(0);
                    }
                    request.complete();
                }
            }
            seen
        }
    });
    let device = Device::builder_with_handlers(Geometry::bytes(4 * MIB), move |_| {
        let sender = sender.clone();
        Ok(move |request: Request<'_>| sender.send(request.detach()).expect("the helper listens"))
    })
    .data_mode(mode)
    .depth(8)
    .delete_deadline(Duration::from_secs(10))
    .start()
    .expect("start");
    let file = direct(&device);
    for round in 0..3 {
        std::thread::scope(|scope| {
            for writer in 0..HELD as u64 {
                let file = &file;
                scope.spawn(move || {
                    // Far apart, so that the block layer does not make one request of two.
                    let offset = writer * MIB + round * 64 * KIB;
                    client::write(file, writer, offset, 4096).expect("write");
                });
            }
        });
    }
    for writer in 0..HELD as u64 {
        let back = client::read(&file, writer * MIB + 64 * KIB, 4096).expect("read");
        assert_same(&back, &client::pattern(writer, writer * MIB + 64 * KIB, 4096), "read");
    }
    drop(file);
    client::close(&device);
    drop(device);
    let seen = helper.join().expect("the helper ends when the handlers are gone");
    assert_eq!(seen.len(), 3 * HELD);
    for (offset, data) in &seen {
        assert_same(data, &client::pattern(offset / MIB, *offset, 4096), &format!("data of the write at {offset}"));
    }
    let arrived: Vec<u64> = seen.iter().map(|(offset, _)| *offset).collect();
    let completed = order.lock().expect("lock");
    for (arrived, completed) in arrived.chunks(HELD).zip(completed.chunks(HELD)) {
        assert!(arrived.iter().rev().eq(completed), "{arrived:?} {completed:?}");
    }
}

/// Holds each write until the next one comes, on its own thread.
#[derive(Default)]
struct Pairs {
    held: Option<DetachedRequest>,
}

impl Handler for Pairs {
    fn handle(&mut self, mut request: Request<'_>) {
        if request.operation() != Operation::Write {
            request.buffer().fill(0x11);
            request.complete();
            return;
        }
        match self.held.take() {
            None => self.held = Some(request.detach()),
            Some(first) => {
                request.complete();
                first.complete();
            }
        }
    }
}

fn the_same_thread_completes_later() {
    let device = Device::builder_with_handlers(Geometry::bytes(4 * MIB), |_| Ok(Pairs::default()))
        .depth(8)
        .delete_deadline(Duration::from_secs(10))
        .start()
        .expect("start");
    let file = direct(&device);
    for round in 0..20 {
        std::thread::scope(|scope| {
            for writer in 0..2 {
                let file = &file;
                scope.spawn(move || {
                    client::write(file, writer, writer * 2 * MIB + round * 8192, 4096).expect("write")
                });
            }
        });
        // Reads pass by while nothing is held, and while something is.
        let held = std::thread::scope(|scope| {
            let held = scope.spawn(|| client::write(&file, 7, MIB, 512).expect("write"));
            assert_same(&client::read(&file, 0, 512).expect("read"), &[0x11; 512], "read");
            client::write(&file, 8, 3 * MIB, 512).expect("write");
            held.join().is_ok()
        });
        assert!(held);
    }
    drop(file);
    client::close(&device);
}

struct Named {
    queue: u16,
    served: Arc<Mutex<Vec<(u16, String, u16)>>>,
}

impl Handler for Named {
    fn handle(&mut self, mut request: Request<'_>) {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        self.served.lock().expect("lock").push((self.queue, thread, request.io().queue()));
        request.buffer().fill(0);
        request.complete();
    }
}

fn each_queue_has_a_handler_of_its_own() {
    let served = Arc::new(Mutex::new(Vec::new()));
    let opened = Arc::new(Mutex::new(Vec::new()));
    let device = Device::builder_with_handlers(Geometry::bytes(MIB), {
        let (served, opened) = (Arc::clone(&served), Arc::clone(&opened));
        move |info| {
            let thread = std::thread::current().name().unwrap_or_default().to_owned();
            assert_eq!(info.geometry.size, MIB);
            opened.lock().expect("lock").push((info.queue, thread, info.device.queues()));
            Ok(Named { queue: info.queue, served: Arc::clone(&served) })
        }
    })
    .queues(2)
    .depth(8)
    .delete_deadline(Duration::from_secs(10))
    .start()
    .expect("start");
    let (id, queues) = (device.id(), device.info().queues());
    let mut opened = opened.lock().expect("lock").clone();
    opened.sort();
    let want: Vec<_> = (0..queues).map(|queue| (queue, format!("ublk{id}-q{queue}"), queues)).collect();
    assert_eq!(opened, want, "each opened once, on its own thread");
    client::write(&direct(&device), 1, 0, 4096).expect("write");
    client::close(&device);
    let served = served.lock().expect("lock");
    assert!(!served.is_empty());
    for (queue, thread, of_request) in &*served {
        assert_eq!((queue, thread), (of_request, &format!("ublk{id}-q{queue}")));
    }
}

fn requests_say_what_they_are() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let device = Device::builder_with_handlers(Geometry::bytes(MIB).fua(), {
        let seen = Arc::clone(&seen);
        move |_| {
            let seen = Arc::clone(&seen);
            Ok(move |mut request: Request<'_>| {
                let io = request.io();
                let (buffer, data) = (request.buffer().len(), request.data().expect("data").len());
                seen.lock().expect("lock").push((io, buffer, data));
                request.complete();
            })
        }
    })
    .depth(4)
    .delete_deadline(Duration::from_secs(10))
    .start()
    .expect("start");
    let file = direct(&device);
    client::write(&file, 1, 1024, 2048).expect("write");
    client::read(&file, 4096, 512).expect("read");
    file.sync_all().expect("fsync");
    drop(file);
    client::close(&device);
    let seen = seen.lock().expect("lock");
    let of = |operation| seen.iter().filter(move |(io, ..)| io.operation() == operation);
    let (io, buffer, data) = of(Operation::Write).next().expect("a write");
    assert_eq!((io.offset(), io.len(), *buffer, *data), (1024, 2048, 0, 2048));
    assert!(of(Operation::Read).any(|(io, ..)| (io.offset(), io.len()) == (4096, 512)));
    assert!(of(Operation::Read).all(|(io, buffer, data)| (*buffer as u64, *data) == (io.len(), 0)));
    let (io, buffer, data) = of(Operation::Flush).next().expect("a flush");
    assert_eq!((io.len(), io.is_empty(), *buffer, *data), (0, true, 0, 0));
    assert!(seen.iter().all(|(io, ..)| io.queue() == 0 && io.tag() < 4), "{seen:?}");
}
