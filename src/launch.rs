//! From a device that the driver knows to one that is served: its queues' threads, and the start.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::unistd::Pid;

use crate::backend::Geometry;
use crate::builder::{DataMode, Options, PoolHandle, QueueInfo, Serve};
use crate::ctrl::{Controller, DeviceInfo, character_path};
use crate::device::{Device, Health, QueueHandle, Serving};
use crate::error::{Error, ErrorKind, Result};
use crate::params;
use crate::queue::{Queue, setup_error};
use crate::recovery::Patience;
use crate::ring::descriptors::Descriptors;
use crate::ring::loans;
use crate::ring::tags::{AtEnd, Copying, Tags};
use crate::stats::{Event, Phase, QueueShared};
use crate::sys::process::set_io_flusher;
use crate::sys::ublk::Features;
use crate::turn::Turn;
use crate::workers::{Pool, Workers};

/// How long the device nodes may take to appear, if the start may take that long.
const NODE_DEADLINE: Duration = Duration::from_secs(10);

/// How a device comes to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// It is new.
    Start,
    /// Another server had it.
    Recovery,
}

/// Whether the queues may hand their tags to the driver: they do when all of them are set up, or none does.
///
/// Kernels cope badly with a server that gives up, or dies, when only some tags are fetched. Linux 6.18 then keeps the
/// device for good; 6.12 does if it was a recovery.
#[derive(Debug, Default)]
pub(crate) struct Fetching {
    decision: Mutex<Option<bool>>,
    decided: Condvar,
}

impl Fetching {
    /// The first decision counts.
    pub(crate) fn decide(&self, go: bool) {
        self.decision.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(go);
        self.decided.notify_all();
    }

    /// Waits for the decision, which comes within the start's deadline.
    fn wait(&self) -> bool {
        let decision = self.decision.lock().unwrap_or_else(PoisonError::into_inner);
        let decision = self.decided.wait_while(decision, |decision| decision.is_none());
        decision.unwrap_or_else(PoisonError::into_inner).unwrap_or(false)
    }
}

/// Sets up the queues of a device that was added, or whose recovery has begun, and has the kernel start it.
pub(crate) fn launch<S: Serve>(
    controller: &Arc<Controller>,
    info: DeviceInfo,
    geometry: Geometry,
    options: &Options,
    source: S,
    beginning: Beginning,
    deadline: Instant,
) -> Result<Device> {
    if beginning == Beginning::Start {
        controller.set_params(info.id(), &params::params(&geometry, info.max_io_bytes()))?;
    }
    let character_device = Arc::new(open_character_device(info.id(), beginning, deadline)?);
    (options.events)(&Event::Phase(Phase::Configured));
    let health = Arc::new(Health::default());
    let source = Arc::new(source);
    let name = format!("ublk{}", info.id());
    let requests = usize::from(info.queues()) * usize::from(info.depth());
    let workers = source
        .workers(&name, requests, options.io_flusher)
        .map_err(|error| Error::io(&error, "start worker threads"))?
        .map(|handle| handle.0);
    let pool = workers.as_ref().map(Workers::pool);
    let mut serving = Serving { queues: Vec::with_capacity(usize::from(info.queues())), workers };
    let fetching = Arc::new(Fetching::default());
    let started = spawn_queues(
        &mut serving,
        controller,
        info,
        geometry,
        options,
        &source,
        pool.as_ref(),
        &health,
        &character_device,
        &fetching,
    )
    .and_then(|ready| {
        // The threads have it now: when they end, the kernel must see the last of it.
        drop(character_device);
        await_queues(&ready, info.queues(), deadline)?;
        fetching.decide(true);
        await_queues(&ready, info.queues(), deadline)
    })
    .and_then(|()| {
        (options.events)(&Event::Phase(Phase::Fetched));
        let left = deadline.saturating_duration_since(Instant::now());
        let (id, pid) = (info.id(), std::process::id());
        let called_off = || health.first_error().is_some();
        let done = match beginning {
            Beginning::Start => controller.start(id, pid, left, &called_off),
            Beginning::Recovery => controller.end_user_recovery(id, pid, left, &called_off),
        };
        // A queue that failed is why the start was called off.
        done.map_err(|error| health.first_error().unwrap_or(error))
    });
    let turn = started.is_ok().then(|| Turn::take(info.id()));
    let device = Device::new(Arc::clone(controller), info, geometry, health, options.deadlines, serving, turn);
    if let Err(error) = started {
        device.undo_start(&fetching);
        return Err(error);
    }
    (options.events)(&Event::Phase(Phase::Started));
    if wait_for_node(&device.path(), deadline) {
        (options.events)(&Event::Phase(Phase::Visible));
    } else {
        (options.events)(&Event::Degraded {
            what: format!(
                "{} did not appear in time: the device is served, but its node is not in this /dev",
                device.path().display()
            ),
        });
    }
    Ok(device)
}

type Ready = mpsc::Receiver<Result<()>>;

#[expect(clippy::too_many_arguments, reason = "one caller; a structure of these would have no other use")]
fn spawn_queues<S: Serve>(
    serving: &mut Serving,
    controller: &Arc<Controller>,
    info: DeviceInfo,
    geometry: Geometry,
    options: &Options,
    source: &Arc<S>,
    pool: Option<&Arc<Pool>>,
    health: &Arc<Health>,
    character_device: &Arc<File>,
    fetching: &Arc<Fetching>,
) -> Result<Ready> {
    let (ready, all_ready) = mpsc::channel();
    for queue in 0..info.queues() {
        let tags = Arc::new(
            loans::Shared::new(info.depth(), info.max_io_bytes() as usize)
                .map_err(|error| setup_error(queue, "allocate buffers", &error))?,
        );
        if options.lock_buffers {
            tags.lock_buffers().map_err(|error| {
                let error = setup_error(queue, "lock the buffers", &error);
                let hint = format!("{error}: raise the limit (ulimit -l), or take fewer or smaller buffers");
                error.with_message(hint)
            })?;
        }
        serving.queues.push(QueueHandle {
            shared: Arc::new(QueueShared::new(queue, Arc::clone(&options.events))),
            tags,
            thread: None,
        });
    }
    let everyone: Arc<[Arc<loans::Shared>]> = serving.queues.iter().map(|queue| Arc::clone(&queue.tags)).collect();
    for queue in 0..info.queues() {
        let handle = &mut serving.queues[usize::from(queue)];
        let setup = QueueSetup {
            info: QueueInfo { queue, device: info, geometry },
            controller: Arc::clone(controller),
            options: options.clone(),
            source: Arc::clone(source),
            pool: pool.map(Arc::clone),
            health: Arc::clone(health),
            character_device: Arc::clone(character_device),
            tags: Arc::clone(&handle.tags),
            shared: Arc::clone(&handle.shared),
            everyone: Arc::clone(&everyone),
            fetching: Arc::clone(fetching),
        };
        let ready = ready.clone();
        health.began();
        let spawned =
            std::thread::Builder::new().name(format!("ublk{}-q{queue}", info.id())).spawn(move || setup.run(&ready));
        match spawned {
            Ok(thread) => handle.thread = Some(thread),
            Err(error) => {
                health.ended();
                return Err(setup_error(queue, "start a thread", &error));
            }
        }
    }
    Ok(all_ready)
}

fn await_queues(ready: &Ready, queues: u16, deadline: Instant) -> Result<()> {
    for _ in 0..queues {
        match ready.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => result?,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    "set up the queues: not done within the start's deadline",
                ));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::new(ErrorKind::Queue, "set up the queues: a queue's thread ended early"));
            }
        }
    }
    Ok(())
}

/// Everything a queue's thread starts with.
struct QueueSetup<S> {
    info: QueueInfo,
    controller: Arc<Controller>,
    options: Options,
    source: Arc<S>,
    pool: Option<Arc<Pool>>,
    health: Arc<Health>,
    character_device: Arc<File>,
    tags: Arc<loans::Shared>,
    shared: Arc<QueueShared>,
    everyone: Arc<[Arc<loans::Shared>]>,
    fetching: Arc<Fetching>,
}

impl<S: Serve> QueueSetup<S> {
    /// The life of a queue's thread.
    fn run(self, ready: &mpsc::Sender<Result<()>>) {
        let (health, shared, everyone) =
            (Arc::clone(&self.health), Arc::clone(&self.shared), Arc::clone(&self.everyone));
        let queue = self.info.queue;
        let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.serve(ready)));
        let served = served.unwrap_or_else(|payload| {
            shared.panicked(&*payload);
            Err(Error::new(ErrorKind::Queue, format!("serve queue {queue}: its thread panicked")))
        });
        if served.is_ok() {
            let error = Error::new(
                ErrorKind::State,
                "serve the device any longer: somebody else stopped it, or made it quiescent",
            );
            if health.ended_by_somebody_else(&error) {
                shared.tell(&Event::QueueFailed { queue, error });
            }
        }
        if let Err(error) = served {
            // One queue less is a device that hangs: all of them end, and the kernel fails what was in flight.
            health.fail(error.clone());
            for other in &*everyone {
                other.abandon();
            }
            shared.tell(&Event::QueueFailed { queue, error: error.clone() });
            // Nobody listens any more if the start is over.
            let _ = ready.send(Err(error));
        }
        health.ended();
    }

    fn serve(self, ready: &mpsc::Sender<Result<()>>) -> Result<()> {
        let queue = self.info.queue;
        // Signals are for the program's own threads: here they would only interrupt the wait.
        let _ = pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None);
        self.place();
        let handler = self
            .source
            .open(&self.info, self.pool.clone().map(PoolHandle))
            .map_err(|error| setup_error(queue, "open the handler", &error))?;
        let depth = self.info.device.depth();
        let descriptors = Descriptors::map(&self.character_device, queue, depth)
            .map_err(|error| setup_error(queue, "map the descriptors", &error))?;
        let copying = match self.options.data_mode {
            DataMode::Copy => Copying::Driver,
            DataMode::UserCopy => Copying::User,
        };
        // Linux 6.16 brought QUIESCE, and loses no requests any more.
        let safe = self.controller.features().contains(Features::QUIESCE);
        let at_end = if safe { AtEnd::Leave } else { AtEnd::Keep };
        let tags = Tags::new(queue, depth, copying, at_end, self.character_device, descriptors, self.tags);
        let tags = tags.map_err(|error| {
            let plain = crate::ctrl::explain_ring(&error);
            let message = format!("set up queue {queue}: {plain}");
            plain.with_message(message).with_kind(ErrorKind::Queue)
        })?;
        let mut queue = Queue::new(tags, self.shared, handler);
        let _ = ready.send(Ok(()));
        if !self.fetching.wait() {
            return Ok(());
        }
        queue.fetch()?;
        // Nobody listens only if the start has failed; then the queue is abandoned and ends by itself.
        let _ = ready.send(Ok(()));
        queue.serve()
    }

    /// Puts the thread where its I/O comes from, and tells the kernel what it is for. Neither is needed to work.
    fn place(&self) {
        if self.options.affinity {
            let moved = self.controller.get_queue_affinity(self.info.device.id(), self.info.queue).and_then(|cpus| {
                let mut set = CpuSet::new();
                for cpu in cpus.into_iter().filter(|cpu| *cpu < CpuSet::count()) {
                    let _ = set.set(cpu);
                }
                sched_setaffinity(Pid::from_raw(0), &set).map_err(|errno| Error::kernel(errno, "set the affinity"))
            });
            if let Err(error) = moved {
                self.shared
                    .tell(&Event::Degraded { what: format!("queue {} runs on any CPU: {error}", self.info.queue) });
            }
        }
        if self.options.io_flusher
            && let Err(error) = set_io_flusher()
        {
            self.shared.tell(&Event::Degraded {
                what: format!("queue {} is not marked as an I/O flusher: {error}", self.info.queue),
            });
        }
    }
}

/// Opens a device's character node, which udev or devtmpfs may still be making, or which a server that died may still be
/// letting go.
fn open_character_device(id: u32, beginning: Beginning, deadline: Instant) -> Result<File> {
    let path = character_path(id);
    let begun = Instant::now();
    let node_deadline = deadline.min(begun + NODE_DEADLINE);
    let mut patience = Patience::new(id, deadline);
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < node_deadline => {}
            // Before 6.16 this is where it shows that somebody else recovers the device.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && beginning == Beginning::Recovery => {
                patience.wait("not free yet")?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::io(&error, format_args!("open {}", path.display())).with_message(format!(
                    "open {}: the node did not appear within {:.1?}: /dev is not a devtmpfs (a container?); bind-mount the \
                     host's /dev",
                    path.display(),
                    begun.elapsed()
                )));
            }
            Err(error) => return Err(Error::io(&error, format_args!("open {}", path.display()))),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_for_node(path: &Path, deadline: Instant) -> bool {
    let deadline = deadline.min(Instant::now() + NODE_DEADLINE);
    while !path.exists() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_not_waited_for_past_the_starts_deadline() {
        let (begun, soon) = (Instant::now(), Duration::from_millis(50));
        // An id that no device has.
        let error = open_character_device(u32::MAX, Beginning::Start, begun + soon).expect_err("no such node");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(!wait_for_node(Path::new("/dev/none-such"), Instant::now() + soon));
        assert!(begun.elapsed() < NODE_DEADLINE, "{:?}", begun.elapsed());
    }
}
