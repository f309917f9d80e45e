//! Real requests for a [`Server`]: whatever is planted between the driver and a server in the simulator is planted between
//! the kernel and the same server here.
//!
//! Each queue's handler detaches its requests and hands them to one thread, which runs the server. A commit for a slot
//! that is not in hand is ignored, for a request is completed once and by whoever holds it; a slot that is never committed
//! stays in hand. Reads and writes succeed as a whole or fail: other lengths cannot be expressed.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use nix::libc;
use ublkit::{DetachedRequest, Handler, Io, Operation, Request};
use ublkit_harness::SeededRng;
use ublkit_harness::mutant::Open;
use ublkit_harness::sim::server::{Buffers, Commit, Server, TagId, Work};
use ublkit_harness::{OpKind, SECTOR, SectorRange};

use super::hang::Plant;
use crate::in_flight::{InFlight, Noted, Who};

/// Makes servers, on the thread that runs them.
pub(super) type Make = Box<dyn FnMut(Open) -> Box<dyn Server> + Send>;

/// How much there is of a device.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) max_io_bytes: u32,
}

enum Message {
    Request(TagId, DetachedRequest, Noted),
    /// Begin anew, and say when that is done.
    Restart(Open, Sender<()>),
    End,
}

/// The thread that runs a server, and the way to it.
pub(super) struct Bridge {
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

/// What hands the requests of one queue over.
pub(super) struct Forward {
    queue: u16,
    sender: Sender<Message>,
    in_flight: InFlight,
    hang: Plant,
}

impl Handler for Forward {
    fn handle(&mut self, request: Request<'_>) {
        let tag = TagId { queue: self.queue, tag: request.io().tag() };
        let noted = note(&self.in_flight, tag, &request);
        self.hang.handled();
        // Where nobody takes it, it is dropped, and so it fails.
        let _ = self.sender.send(Message::Request(tag, request.detach(), noted));
    }
}

/// What a request of the driver is to an application.
pub(super) fn kind_of(io: &Io) -> OpKind {
    match io.operation() {
        Operation::Write if io.fua() => OpKind::WriteFua,
        Operation::Write => OpKind::Write,
        Operation::Flush => OpKind::Flush,
        Operation::Discard => OpKind::Discard,
        Operation::WriteZeroes => OpKind::WriteZeroes,
        _ => OpKind::Read,
    }
}

fn note(in_flight: &InFlight, tag: TagId, request: &Request<'_>) -> Noted {
    let io = request.io();
    let kind = kind_of(&io);
    let sector = SECTOR as u64;
    let range = SectorRange::new(io.offset() / sector, io.len() / sector);
    in_flight.begin(Who::Tag(tag), kind, range)
}

impl Bridge {
    /// Starts the thread, and the first server on it.
    pub(super) fn start(shape: Shape, make: Make, rng: SeededRng) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let thread =
            std::thread::Builder::new().name("bridge".to_owned()).spawn(move || run(shape, make, rng, &receiver))?;
        Ok(Self { sender, thread: Some(thread) })
    }

    /// What makes the handler of each queue.
    pub(super) fn opener(&self, in_flight: InFlight, hang: Plant) -> impl Fn(u16) -> Forward + Send + Sync + use<> {
        let sender = std::sync::Mutex::new(self.sender.clone());
        move |queue| {
            let sender = sender.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
            hang.opened();
            Forward { queue, sender, in_flight: in_flight.clone(), hang: hang.clone() }
        }
    }

    /// Fails what the server has in hand, ends it, and starts another.
    pub(super) fn restart(&self, why: Open) {
        let (done, wait) = mpsc::channel();
        if self.sender.send(Message::Restart(why, done)).is_ok() {
            // The thread ends only when told, or by a panic, after which nothing is served any more.
            let _ = wait.recv();
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = self.sender.send(Message::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shape: Shape, mut make: Make, mut rng: SeededRng, receiver: &Receiver<Message>) {
    let mut buffers = Buffers::new(shape.queues, shape.depth, shape.max_io_bytes as usize);
    let mut in_hand: HashMap<TagId, (DetachedRequest, Noted)> = HashMap::new();
    let mut server = make(Open::First);
    let mut commits = Vec::new();
    loop {
        let message = if server.pending() == 0 {
            receiver.recv().ok().or(Some(Message::End))
        } else {
            receiver.try_recv().ok()
        };
        match message {
            Some(Message::Request(tag, mut request, noted)) => match take(tag, &mut request, &mut buffers) {
                Ok(work) => {
                    in_hand.insert(tag, (request, noted));
                    server.take(work, &mut buffers);
                    // All that are there are taken before the first is served.
                    continue;
                }
                Err(error) => request.fail(&error),
            },
            Some(Message::Restart(why, done)) => {
                drop(server);
                for (_, (request, _noted)) in in_hand.drain() {
                    request.fail(&io::Error::from_raw_os_error(libc::EIO));
                }
                server = make(why);
                // Whoever asked may have given up.
                let _ = done.send(());
            }
            Some(Message::End) => return,
            None => {}
        }
        server.step(&mut buffers, &mut rng, &mut commits);
        for commit in commits.drain(..) {
            if let Some((request, _noted)) = in_hand.remove(&commit.tag) {
                complete(request, commit, &mut buffers);
            }
        }
    }
}

/// Copies the data of a write in, and says what is asked.
fn take(tag: TagId, request: &mut DetachedRequest, buffers: &mut Buffers) -> io::Result<Work> {
    let data = request.data()?;
    if !data.is_empty() {
        buffers.get_mut(tag)[..data.len()].copy_from_slice(data);
    }
    let io = request.io();
    Ok(Work {
        tag,
        operation: io.operation(),
        offset: io.offset(),
        len: io.len(),
        fua: io.fua(),
        no_unmap: io.no_unmap(),
    })
}

/// Copies the data of a read out, and completes the request.
fn complete(mut request: DetachedRequest, Commit { tag, result }: Commit, buffers: &mut Buffers) {
    if result < 0 {
        request.fail(&io::Error::from_raw_os_error(-result));
        return;
    }
    if request.operation() == Operation::Read {
        let buffer = request.buffer();
        buffer.copy_from_slice(&buffers.get_mut(tag)[..buffer.len()]);
    }
    request.complete();
}
