//! The one stream of events: many senders, one thread, every reporter sees the same order.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::event::Event;

/// Shows events to someone.
pub trait Reporter: Send {
    /// Shows one event.
    ///
    /// # Errors
    /// When it cannot be shown. A reporter that failed once is asked no more; a reader who has gone away
    /// (`BrokenPipe`) is not a failure of the run.
    fn report(&mut self, event: &Event) -> io::Result<()>;

    /// Makes what was shown so far final.
    ///
    /// # Errors
    /// As [`report`](Self::report).
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where events are sent to. Cheap to clone; sending never blocks and never fails.
#[derive(Clone, Debug)]
pub struct EventSink {
    sender: Sender<Message>,
}

/// The thread behind [`EventSink`]. The verdict is the last event that it hands on.
#[derive(Debug)]
pub struct EventLoop {
    sink: EventSink,
    thread: JoinHandle<Vec<io::Error>>,
}

#[derive(Debug)]
enum Message {
    Event(Box<Event>),
    Flush(Sender<()>),
    Finish,
}

impl EventLoop {
    /// Starts the thread that hands every event to each of `reporters` in turn.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(reporters: Vec<Box<dyn Reporter>>) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name("events".to_owned()).spawn(move || run(reporters, &receiver))?;
        Ok(Self { sink: EventSink { sender }, thread })
    }

    /// A handle to send events with.
    #[must_use]
    pub fn sink(&self) -> EventSink {
        self.sink.clone()
    }

    /// Waits until everything sent so far was reported, and ends the thread. Events sent later go nowhere.
    ///
    /// # Errors
    /// The first failure of each reporter that failed, other than that its reader had gone away.
    pub fn finish(self) -> Result<(), Vec<io::Error>> {
        let _gone = self.sink.sender.send(Message::Finish);
        let failures = self
            .thread
            .join()
            .unwrap_or_else(|_panic| vec![io::Error::other("a reporter panicked; see the message above")]);
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }
}

impl EventSink {
    /// Sends one event.
    pub fn send(&self, event: impl Into<Event>) {
        // Nobody listens any more only after `finish`, when the verdict is out.
        let _gone = self.sender.send(Message::Event(Box::new(event.into())));
    }

    /// Waits until everything sent so far was reported, at most `patience`. False if it was not.
    ///
    /// For a process about to be ended: a reader that does not read must not keep it alive.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        let (sender, receiver) = mpsc::channel();
        self.sender.send(Message::Flush(sender)).is_ok()
            && !matches!(receiver.recv_timeout(patience), Err(RecvTimeoutError::Timeout))
    }
}

/// A reporter and whether it still works.
struct Listener {
    reporter: Box<dyn Reporter>,
    failed: bool,
}

fn run(reporters: Vec<Box<dyn Reporter>>, receiver: &Receiver<Message>) -> Vec<io::Error> {
    let mut listeners: Vec<_> = reporters.into_iter().map(|reporter| Listener { reporter, failed: false }).collect();
    let mut failures = Vec::new();
    let mut each = |action: &mut dyn FnMut(&mut dyn Reporter) -> io::Result<()>| {
        for listener in listeners.iter_mut().filter(|listener| !listener.failed) {
            if let Err(error) = action(listener.reporter.as_mut()) {
                listener.failed = true;
                if error.kind() != io::ErrorKind::BrokenPipe {
                    failures.push(error);
                }
            }
        }
    };
    let mut over = false;
    while let Ok(message) = receiver.recv() {
        match message {
            // What falls apart while a hanging run is ended is no news.
            Message::Event(_) if over => {}
            Message::Event(event) => {
                over = matches!(*event, Event::Verdict(_));
                each(&mut |reporter| reporter.report(&event));
            }
            Message::Flush(done) => {
                each(&mut |reporter| reporter.flush());
                let _impatient = done.send(());
            }
            Message::Finish => break,
        }
    }
    each(&mut |reporter| reporter.flush());
    failures
}
