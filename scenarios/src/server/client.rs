//! The loading process's side: starts the server, talks to it, and sees to it that it ends.

use std::io::{self, BufRead, BufReader, Read};
use std::process::ChildStdout;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ublkit_harness::fault::FaultPlan;
use ublkit_harness::sim::medium::CutReport;
use ublkit_harness::{Event, EventSink, Seed};

use super::ARGUMENT;
use super::protocol::{Call, Closing, Moment, Reply, Served, Status};
use super::running::{note_gone, note_made};
use super::witness::Testimony;
use crate::context::{Context, SharedEvidence};
use crate::flush_trace::Recording;
use crate::role::Role;
use crate::runs::RunRecord;
use crate::scenario::Failure;
use crate::target::TargetArgs;
use crate::torture::outage::Outage;

/// How long a server may take to end once its pipe is closed; it has its own bounds for closing devices.
const END_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Pipes {
    role: Role,
    replies: BufReader<ChildStdout>,
}

/// The server process. It closes its devices and ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pid: u32,
    pipes: Mutex<Pipes>,
    sink: EventSink,
    evidence: SharedEvidence,
    record: RunRecord,
    /// How long it may take to end.
    patience: Duration,
}

impl Server {
    /// Starts a server.
    pub(crate) fn start(context: &Context) -> Result<Arc<Self>, Failure> {
        let (role, replies) = Role::start(ARGUMENT, "a server process")?;
        Ok(Arc::new(Self {
            pid: role.pid(),
            pipes: Mutex::new(Pipes { role, replies: BufReader::new(replies) }),
            sink: context.sink().clone(),
            evidence: context.evidence().clone(),
            record: context.record.clone(),
            patience: context.at_most(END_DEADLINE),
        }))
    }

    /// Its process id.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Serves a device, on new storage or on `storage`.
    pub(crate) fn serve(
        &self,
        args: &TargetArgs,
        seed: Seed,
        storage: Option<usize>,
    ) -> Result<(Served, usize), Failure> {
        match self.call(&Call::Serve { args: args.clone(), seed, storage })? {
            Reply::Served(served) => {
                note_made(self.pid, served.id);
                Ok((served, served.storage))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Reads a storage past the device.
    pub(crate) fn read(&self, storage: usize, buf: &mut [u8], offset: u64) -> Result<(), Failure> {
        let mut pipes = self.pipes();
        match self.exchange(&mut pipes, &Call::Read { storage, offset, len: buf.len() })? {
            Reply::Bytes(len) if len == buf.len() => {
                let Pipes { role, replies } = &mut *pipes;
                replies.read_exact(buf).map_err(|error| role.lost(&error.to_string()))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Lets no request through to a storage, calls `then`, and copies the storage. Returns the copy.
    pub(crate) fn copy<T>(&self, storage: usize, then: impl FnOnce() -> T) -> Result<(T, usize), Failure> {
        self.freeze(storage, Moment::Now, Duration::ZERO)?;
        let then = then();
        match self.call(&Call::CopyAndThaw { storage })? {
            Reply::Copied { storage } => Ok((then, storage)),
            other => Err(unexpected(&other)),
        }
    }

    /// From a moment on, lets no request through to a disk, calls `then`, and copies the disk with its cache. Returns the
    /// copy. The moment is now when `patience` is over.
    pub(crate) fn fork<T>(
        &self,
        storage: usize,
        moment: Moment,
        patience: Duration,
        then: impl FnOnce() -> T,
    ) -> Result<(T, usize), Failure> {
        self.freeze(storage, moment, patience)?;
        let then = then();
        match self.call(&Call::ForkAndThaw { storage })? {
            Reply::Copied { storage } => Ok((then, storage)),
            other => Err(unexpected(&other)),
        }
    }

    fn freeze(&self, storage: usize, moment: Moment, patience: Duration) -> Result<(), Failure> {
        let patience_ms = patience.as_millis() as u64;
        match self.call(&Call::Freeze { storage, moment, patience_ms })? {
            Reply::Frozen => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// What a power cut could leave of a disk, as another storage.
    pub(crate) fn crash(&self, storage: usize, seed: Seed) -> Result<(usize, CutReport), Failure> {
        match self.call(&Call::Crash { storage, seed })? {
            Reply::Crashed { storage, report } => Ok((storage, report)),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives back the memory of a storage that is used no more.
    pub(crate) fn forget(&self, storage: usize) -> Result<(), Failure> {
        match self.call(&Call::Forget { storage })? {
            Reply::Forgotten => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets every request fail, and drops whatever is between kernel and storage. Returns what a power cut took from a disk.
    pub(crate) fn kill(&self, served: &Served, outage: Outage) -> Result<Option<CutReport>, Failure> {
        match self.call(&Call::Kill { device: served.device, outage })? {
            Reply::Dead(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// Serves a device again.
    pub(crate) fn revive(&self, served: &Served) -> Result<(), Failure> {
        match self.call(&Call::Revive { device: served.device })? {
            Reply::Alive => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Switches the faults of a device on or off.
    pub(crate) fn faults(&self, served: &Served, on: bool) -> Result<(), Failure> {
        match self.call(&Call::Faults { device: served.device, on })? {
            Reply::Switched => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives a device other faults. They are off.
    pub(crate) fn replan(
        &self,
        served: &Served,
        plan: &FaultPlan,
        seed: ublkit_harness::Seed,
    ) -> Result<(), Failure> {
        match self.call(&Call::Replan { device: served.device, plan: plan.clone(), seed })? {
            Reply::Switched => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// How many requests are held.
    pub(crate) fn held(&self, served: &Served) -> Result<u64, Failure> {
        match self.call(&Call::Held { device: served.device })? {
            Reply::Held(count) => Ok(count),
            other => Err(unexpected(&other)),
        }
    }

    /// What happened at a device's storage since the last time.
    pub(crate) fn testimony(&self, served: &Served) -> Result<Testimony, Failure> {
        match self.call(&Call::Testify { device: served.device })? {
            Reply::Testimony(testimony) => Ok(testimony),
            other => Err(unexpected(&other)),
        }
    }

    /// The calls of a device's storage that were recorded.
    pub(crate) fn recording(&self, served: &Served) -> Result<Recording, Failure> {
        match self.call(&Call::Recording { device: served.device })? {
            Reply::Recording(recording) => Ok(recording),
            other => Err(unexpected(&other)),
        }
    }

    /// How a device is doing.
    pub(crate) fn status(&self, served: &Served) -> Result<Status, Failure> {
        match self.call(&Call::Status { device: served.device })? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Closes a device.
    pub(crate) fn close(&self, served: &Served, faults_stay: bool) -> Result<Closing, Failure> {
        match self.call(&Call::Close { device: served.device, faults_stay })? {
            Reply::Closed(closing) => {
                note_gone(self.pid, served.id);
                Ok(closing)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn pipes(&self) -> MutexGuard<'_, Pipes> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, call: &Call) -> Result<Reply, Failure> {
        self.exchange(&mut self.pipes(), call)
    }

    fn exchange(&self, pipes: &mut Pipes, call: &Call) -> Result<Reply, Failure> {
        let Pipes { role, replies } = pipes;
        role.tell(call)?;
        let mut line = String::new();
        loop {
            line.clear();
            let read = replies.read_line(&mut line).map_err(|error| role.lost(&error.to_string()))?;
            if read == 0 {
                return Err(role.lost(&io::Error::from(io::ErrorKind::UnexpectedEof).to_string()));
            }
            match serde_json::from_str(&line) {
                Ok(Reply::Note(text)) => self.sink.send(Event::note(text)),
                Ok(Reply::Made(id)) => {
                    self.record.made(id);
                    note_made(self.pid, id);
                }
                Ok(Reply::Hits(hits)) => self.evidence.add("mutant_hits", hits),
                Ok(Reply::Failed(trouble)) => return Err(trouble.into()),
                Ok(reply) => return Ok(reply),
                Err(error) => {
                    return Err(Failure::Internal(format!("the server said what cannot be understood: {error}")));
                }
            }
        }
    }
}

fn unexpected(reply: &Reply) -> Failure {
    Failure::Internal(format!("the server answered another question: {reply:?}"))
}

impl Drop for Server {
    fn drop(&mut self) {
        // What one that does not end leaves behind is in this run's record, for the next one to clean.
        self.pipes().role.end_unheard(self.patience);
    }
}
