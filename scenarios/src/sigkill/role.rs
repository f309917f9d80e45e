//! The process that is killed: serves one device, and stops where it is told to.

use std::io::{self, BufRead};
use std::panic::panic_any;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ublkit::{DetachedRequest, Device, Event, Geometry, Handler, Operation, Recovery, Request};

use super::mode::Mode;
use super::protocol::{Command, Hold, Kind, Order, Stage, What, Word};
use super::store::{BLOCK, Store};
use crate::clock::nanoseconds;
use crate::role;

/// The argument with which this program becomes such a server.
pub(crate) const ARGUMENT: &str = "serve-to-be-killed";

/// Runs the server until it is told to end, its standard input ends, or it is killed.
pub(crate) fn main() -> u8 {
    let mut lines = io::BufReader::new(io::stdin()).lines();
    let order = match lines.next() {
        Some(Ok(line)) => serde_json::from_str::<Order>(&line),
        _ => return 0,
    };
    let order = match order {
        Ok(order) => order,
        Err(error) => {
            say(What::Failed(format!("the server was told what it does not understand: {error}")));
            return 1;
        }
    };
    let holds = Arc::new(Holds::new(order.hold.clone()));
    let (sender, closing) = mpsc::channel();
    let told = Arc::clone(&holds);
    let listener = std::thread::Builder::new().name("listener".to_owned()).spawn(move || {
        for line in lines.map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(Command::Hold(hold)) => told.arm(hold),
                Ok(Command::Release) => told.release(),
                Ok(Command::EndQueue) => told.end_queue(),
                Ok(Command::Close) => drop(sender.send(())),
                Err(error) => say(What::Note(format!("not understood: {error}"))),
            }
        }
        // Nobody is there any more who could kill this process.
        told.release();
    });
    let served = listener.map_err(|error| error.to_string()).and_then(|_detached| serve(&order, &holds, &closing));
    match served {
        Ok(closed) => {
            say(What::Closed(closed));
            0
        }
        Err(what) => {
            say(What::Failed(what));
            1
        }
    }
}

fn serve(order: &Order, holds: &Arc<Holds>, closing: &Receiver<()>) -> Result<Option<String>, String> {
    let store = Arc::new(Store::open(order).map_err(|error| format!("failed to open the storage: {error}"))?);
    let kept = Arc::clone(&store);
    let (jobs, queue) = mpsc::channel();
    let queue = Arc::new(Mutex::new(queue));
    // As many as there can be requests, so that every one of them can be held.
    for index in 0..order.queues * order.depth {
        let (store, holds, queue) = (Arc::clone(&store), Arc::clone(holds), Arc::clone(&queue));
        let work = move || work(&store, &holds, &queue);
        std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(work)
            .map_err(|error| format!("failed to start a thread: {error}"))?;
    }
    let geometry = Geometry::bytes(order.bytes).logical_block(BLOCK as u32).fua();
    let (told, opened, jobs) = (Arc::clone(holds), Arc::clone(holds), Mutex::new(jobs));
    let builder = Device::builder_with_handlers(geometry, move |queue| {
        opened.pass(|hold| *hold == Hold::Open(queue.queue), false);
        let jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Relay { jobs, holds: Arc::clone(&opened) })
    })
    .id(order.id)
    .queues(order.queues)
    .depth(order.depth)
    .on_event(move |event| tell(event, &told));
    let device = start(builder, order).map_err(|error| format!("failed to {error}"))?;
    say(What::Serving { queues: device.info().queues(), depth: device.info().depth() });
    // An end without a word is the end of the process that asks.
    let _ = closing.recv();
    let closed = device.close().map_err(|error| format!("failed to {error}"))?;
    kept.close().map_err(|error| format!("failed to write the cache out: {error}"))?;
    Ok(match closed.deletion {
        ublkit::Deletion::Complete => None,
        _ => Some(closed.to_string()),
    })
}

/// Makes the device, or takes over the one that is there.
fn start<S: ublkit::Serve>(builder: ublkit::DeviceBuilder<S>, order: &Order) -> ublkit::Result<Device> {
    let builder = builder.recovery(match order.mode {
        Mode::None => Recovery::None,
        Mode::Wait => Recovery::Wait,
        Mode::Reissue => Recovery::Reissue,
        Mode::FailIo => Recovery::FailIo,
    });
    if order.recover { builder.recover(order.id) } else { builder.start() }
}

fn tell(event: &Event, holds: &Holds) {
    match event {
        Event::Phase(phase) => {
            let name = phase.to_string();
            say(What::Phase(name.clone()));
            holds.pass(|hold| matches!(hold, Hold::Phase(at) if *at == name), false);
        }
        Event::QueueFailed { .. } => say(What::QueueEnded(event.to_string())),
        _ => say(What::Note(event.to_string())),
    }
}

fn say(what: What) {
    // Where nobody listens, the end of the standard input says so too, and sees to a tidy end.
    let _nobody_listens = role::say(&Word { at: nanoseconds(), what }, &[]);
}

/// Where to stop, and who has.
struct Holds {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    hold: Option<Hold>,
    held: u32,
    changes: u32,
    released: bool,
    end_queue: bool,
}

impl Holds {
    fn new(hold: Option<Hold>) -> Self {
        Self { state: Mutex::new(State { hold, ..State::default() }), released: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arm(&self, hold: Hold) {
        self.lock().hold = Some(hold);
    }

    fn end_queue(&self) {
        self.lock().end_queue = true;
    }

    fn takes_end_of_queue(&self) -> bool {
        std::mem::take(&mut self.lock().end_queue)
    }

    fn release(&self) {
        self.lock().released = true;
        self.released.notify_all();
    }

    /// Stops here if that is where to stop.
    fn pass(&self, here: impl Fn(&Hold) -> bool, changes: bool) {
        let mut state = self.lock();
        if state.released || !state.hold.as_ref().is_some_and(here) {
            return;
        }
        state.held += 1;
        state.changes += u32::from(changes);
        say(What::Holding { held: state.held, changes: state.changes });
        while !state.released {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Hands the requests of a queue to the workers.
struct Relay {
    jobs: Sender<DetachedRequest>,
    holds: Arc<Holds>,
}

impl Handler for Relay {
    fn handle(&mut self, request: Request<'_>) {
        if self.holds.takes_end_of_queue() {
            // What it has in its hands nobody answers, as after a death; the library fails what is dropped.
            std::mem::forget(request.detach());
            // The library catches a handler's panic and goes on. It cannot catch what its payload does when it is dropped: that ends
            // the queue's thread, and with it the serving of the device, while the process lives.
            panic_any(LastStraw);
        }
        // Where nobody takes it, it is dropped, and so it fails.
        let _ = self.jobs.send(request.detach());
    }
}

/// Panics when it is dropped.
struct LastStraw;

impl Drop for LastStraw {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic_any("this queue's thread is to end");
        }
    }
}

fn work(store: &Store, holds: &Holds, queue: &Mutex<Receiver<DetachedRequest>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(request) = next else { return };
        serve_one(store, holds, request);
    }
}

fn serve_one(store: &Store, holds: &Holds, mut request: DetachedRequest) {
    let (operation, offset) = (request.operation(), request.offset());
    let kind = |kind: Kind| match kind {
        Kind::Any => true,
        Kind::Writes => operation == Operation::Write,
        Kind::Flushes => operation == Operation::Flush,
    };
    let at =
        |stage: Stage| move |hold: &Hold| matches!(hold, Hold::Requests(of, when) if kind(*of) && *when == stage);
    let changes = matches!(operation, Operation::Write | Operation::Flush);
    holds.pass(at(Stage::Before), changes);
    let result = match operation {
        Operation::Read => store.read(request.buffer(), offset),
        Operation::Write => {
            let fua = request.io().fua();
            request.data().and_then(|data| store.write(data, offset, fua))
        }
        Operation::Flush => store.flush(),
        _ => Err(io::ErrorKind::Unsupported.into()),
    };
    holds.pass(at(Stage::After), changes);
    request.finish(result);
}
