//! Building a device: what may be chosen, and the start.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::unistd::Pid;

use crate::backend::{Backend, Geometry};
use crate::ctrl::{AddDevice, Controller, DeviceInfo};
use crate::device::{Deadlines, Device, Health, QueueHandle, Serving};
use crate::error::{Error, ErrorKind, Result};
use crate::params;
use crate::queue::{Handler, Queue, setup_error};
use crate::ring::tags::{self, Copying, Tags};
use crate::stats::{Event, EventSink, Phase, QueueShared};
use crate::sys::map::{Map, page_size};
use crate::sys::process::set_io_flusher;
use crate::sys::ublk::{self, Features};
use crate::workers::{BackendHandler, Pool, Workers};

/// How long the device nodes may take to appear.
const NODE_DEADLINE: Duration = Duration::from_secs(10);

/// How a request's data moves between the kernel and the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataMode {
    /// The driver copies to and from a buffer of the server. Works everywhere.
    #[default]
    Copy,
    /// The server copies by reading and writing the character device (`UBLK_F_USER_COPY`): with workers, the copying is
    /// theirs and runs side by side. Linux 6.5 or later.
    UserCopy,
}

/// What a handler is told about the queue it will serve.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QueueInfo {
    /// The queue's number, from 0.
    pub queue: u16,
    /// The device as the driver granted it.
    pub device: DeviceInfo,
    /// The device's geometry.
    pub geometry: Geometry,
}

#[derive(Clone)]
struct Options {
    id: Option<u32>,
    queues: u16,
    depth: u16,
    max_io_bytes: u32,
    data_mode: DataMode,
    affinity: bool,
    io_flusher: bool,
    lock_buffers: bool,
    deadlines: Deadlines,
    events: EventSink,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("queues", &self.queues).field("depth", &self.depth).finish_non_exhaustive()
    }
}

/// Builds and starts a [`Device`].
///
/// Everything is checked before anything is created, and a start that fails leaves nothing behind.
#[derive(Debug)]
pub struct DeviceBuilder<S> {
    options: Options,
    geometry: Geometry,
    source: S,
}

/// What serves the queues of a device: made by the builder, not by users.
pub trait Serve: Send + Sync + 'static {
    /// What serves one queue.
    type Handler: Handler;

    #[doc(hidden)]
    fn workers(&self, name: &str, requests: usize, io_flusher: bool) -> io::Result<Option<WorkersHandle>>;

    #[doc(hidden)]
    fn open(&self, queue: &QueueInfo, pool: Option<PoolHandle>) -> io::Result<Self::Handler>;
}

#[doc(hidden)]
#[derive(Debug)]
pub struct WorkersHandle(Workers);

#[doc(hidden)]
#[derive(Debug)]
pub struct PoolHandle(Arc<Pool>);

/// Queues served by a [`Backend`].
#[derive(Debug)]
pub struct ServeBackend<B> {
    backend: Arc<B>,
    workers: usize,
}

impl<B: Backend> Serve for ServeBackend<B> {
    type Handler = BackendHandlerHandle<B>;

    fn workers(&self, name: &str, requests: usize, io_flusher: bool) -> io::Result<Option<WorkersHandle>> {
        if self.workers == 0 {
            return Ok(None);
        }
        Workers::start(&self.backend, self.workers, requests, name, io_flusher)
            .map(|workers| Some(WorkersHandle(workers)))
    }

    fn open(&self, queue: &QueueInfo, pool: Option<PoolHandle>) -> io::Result<Self::Handler> {
        let pool = pool.map(|pool| pool.0);
        Ok(BackendHandlerHandle(BackendHandler::new(Arc::clone(&self.backend), pool, queue.device.depth())))
    }
}

#[doc(hidden)]
#[derive(Debug)]
pub struct BackendHandlerHandle<B>(BackendHandler<B>);

impl<B: Backend> Handler for BackendHandlerHandle<B> {
    #[inline(always)]
    fn handle(&mut self, request: crate::request::Request<'_>) {
        self.0.handle(request);
    }
    #[inline]
    fn batch_end(&mut self) {
        self.0.batch_end();
    }
}

/// Queues served by [`Handler`]s.
pub struct ServeHandlers<F>(F);

impl<F> fmt::Debug for ServeHandlers<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServeHandlers")
    }
}

impl<H, F> Serve for ServeHandlers<F>
where
    H: Handler,
    F: Fn(&QueueInfo) -> io::Result<H> + Send + Sync + 'static,
{
    type Handler = H;

    fn workers(&self, _: &str, _: usize, _: bool) -> io::Result<Option<WorkersHandle>> {
        Ok(None)
    }

    fn open(&self, queue: &QueueInfo, _: Option<PoolHandle>) -> io::Result<H> {
        self.0(queue)
    }
}

impl<B: Backend> DeviceBuilder<ServeBackend<B>> {
    pub(crate) fn backend(backend: B) -> Self {
        let geometry = backend.geometry();
        Self::new(geometry, ServeBackend { backend: Arc::new(backend), workers: 0 })
    }

    /// Runs the backend's calls on `count` threads of their own, so that calls which block do so side by side; 0, the
    /// default, runs them on the queue's thread, one after the other.
    #[must_use]
    pub fn workers(mut self, count: usize) -> Self {
        self.source.workers = count;
        self
    }
}

impl<F> DeviceBuilder<ServeHandlers<F>> {
    pub(crate) fn handlers(geometry: Geometry, open: F) -> Self {
        Self::new(geometry, ServeHandlers(open))
    }
}

impl<S> DeviceBuilder<S> {
    fn new(geometry: Geometry, source: S) -> Self {
        let options = Options {
            id: None,
            queues: 1,
            depth: 128,
            max_io_bytes: 1 << 20,
            data_mode: DataMode::Copy,
            affinity: true,
            io_flusher: true,
            lock_buffers: false,
            deadlines: Deadlines::default(),
            events: Arc::new(|_| {}),
        };
        Self { options, geometry, source }
    }

    /// The id to ask for; by default any free one.
    #[must_use]
    pub fn id(mut self, id: u32) -> Self {
        self.options.id = Some(id);
        self
    }

    /// Number of queues, each with a thread of its own: 1 (the default) to 4096. The driver grants at most one per CPU.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.options.queues = queues;
        self
    }

    /// Requests that a queue can have in flight: 1 to 4096, by default 128.
    #[must_use]
    pub fn depth(mut self, depth: u16) -> Self {
        self.options.depth = depth;
        self
    }

    /// Largest request in bytes: a multiple of the page size up to 32 MiB, by default 1 MiB. The kernel splits longer
    /// ones. Each tag has a buffer of this size, which costs memory only as far as it is used.
    #[must_use]
    pub fn max_io_bytes(mut self, bytes: u32) -> Self {
        self.options.max_io_bytes = bytes;
        self
    }

    /// Takes another geometry than the backend's own.
    #[must_use]
    pub fn geometry(mut self, geometry: Geometry) -> Self {
        self.geometry = geometry;
        self
    }

    /// How data moves; by default the driver copies.
    #[must_use]
    pub fn data_mode(mut self, mode: DataMode) -> Self {
        self.options.data_mode = mode;
        self
    }

    /// Whether each queue's thread is kept on the CPUs whose I/O it serves; by default it is.
    #[must_use]
    pub fn affinity(mut self, on: bool) -> Self {
        self.options.affinity = on;
        self
    }

    /// Whether the server's threads declare themselves part of the I/O path (`PR_SET_IO_FLUSHER`), without which memory
    /// reclaim can wait for itself; by default they do, as far as they may (`CAP_SYS_RESOURCE`).
    #[must_use]
    pub fn io_flusher(mut self, on: bool) -> Self {
        self.options.io_flusher = on;
        self
    }

    /// Keeps the queues' buffers in memory (`mlock`): queues × depth × largest request. Off by default. When it cannot be
    /// done, the start fails.
    #[must_use]
    pub fn lock_buffers(mut self, on: bool) -> Self {
        self.options.lock_buffers = on;
        self
    }

    /// How long the start may take; by default 30 s.
    #[must_use]
    pub fn start_deadline(mut self, deadline: Duration) -> Self {
        self.options.deadlines.start = deadline;
        self
    }

    /// How long closing may wait for dirty pages to be written back and I/O in flight to end; by default 30 s. After it, what
    /// is in flight fails.
    #[must_use]
    pub fn stop_deadline(mut self, deadline: Duration) -> Self {
        self.options.deadlines.stop = deadline;
        self
    }

    /// How long closing may wait for others to let go of the block device; by default 3 s. After it, the deletion is
    /// [deferred](crate::Deletion::Deferred).
    #[must_use]
    pub fn delete_deadline(mut self, deadline: Duration) -> Self {
        self.options.deadlines.delete = deadline;
        self
    }

    /// Calls `sink` for every [`Event`], on the thread where it happened; it must not block for long.
    #[must_use]
    pub fn on_event(mut self, sink: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.options.events = Arc::new(sink);
        self
    }
}

impl<S: Serve> DeviceBuilder<S> {
    /// Creates the device and starts serving it. When this returns, [`Device::path`] can be opened.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a choice that the driver would refuse, before anything is created; errors of
    /// [`Controller::open`]; [`ErrorKind::Unsupported`] for a feature that this kernel lacks; [`ErrorKind::Queue`] when a
    /// queue could not be set up. The device is deleted again in every case.
    pub fn start(self) -> Result<Device> {
        let Self { options, geometry, source } = self;
        params::check_shape(options.queues, options.depth, options.max_io_bytes, options.id)?;
        params::check_geometry(&geometry)?;
        let controller = Arc::new(Controller::open()?);
        let features = match options.data_mode {
            DataMode::Copy => Features::NONE,
            DataMode::UserCopy => Features::USER_COPY,
        };
        if !controller.features().contains(features) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("use {features:?}: this kernel's ublk_drv has only {:?}", controller.features()),
            ));
        }
        let info = controller.add(&AddDevice {
            id: options.id,
            queues: options.queues,
            depth: options.depth,
            max_io_bytes: options.max_io_bytes,
            features,
        })?;
        let mut added = Added { controller: &controller, id: info.id(), armed: true };
        if !info.features().contains(features) {
            return Err(Error::new(ErrorKind::Unsupported, format!("use {features:?}: the driver did not grant it")));
        }
        (options.events)(&Event::Phase(Phase::Added));
        let device = launch(&controller, info, geometry, &options, source)?;
        added.armed = false;
        Ok(device)
    }
}

/// A device that was added and is not served yet: deleted again unless the start succeeds.
struct Added<'a> {
    controller: &'a Controller,
    id: u32,
    armed: bool,
}

impl Drop for Added<'_> {
    fn drop(&mut self) {
        if self.armed && self.controller.delete(self.id, Duration::from_secs(5)).is_err() {
            let _ = self.controller.delete_async(self.id);
        }
    }
}

fn launch<S: Serve>(
    controller: &Arc<Controller>,
    info: DeviceInfo,
    geometry: Geometry,
    options: &Options,
    source: S,
) -> Result<Device> {
    let deadline = Instant::now() + options.deadlines.start;
    controller.set_params(info.id(), &params::params(&geometry, info.max_io_bytes()))?;
    let character_device = Arc::new(open_character_device(&info)?);
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
    )
    .and_then(|ready| {
        // The threads have it now: when they end, the kernel must see the last of it.
        drop(character_device);
        await_queues(&ready, info.queues(), deadline)
    })
    .and_then(|()| {
        (options.events)(&Event::Phase(Phase::Fetched));
        let left = deadline.saturating_duration_since(Instant::now());
        controller.start(info.id(), std::process::id(), left, &|| health.first_error().is_some()).map_err(|error| {
            // A queue that failed is why the start was called off.
            health.first_error().unwrap_or(error)
        })
    });
    let device = Device::new(Arc::clone(controller), info, geometry, health, options.deadlines, serving);
    if let Err(error) = started {
        device.undo_start();
        return Err(error);
    }
    (options.events)(&Event::Phase(Phase::Started));
    if wait_for_node(&device.path()) {
        (options.events)(&Event::Phase(Phase::Visible));
    } else {
        (options.events)(&Event::Degraded {
            what: format!(
                "{} did not appear within {NODE_DEADLINE:?}: the device is served, but its node is not in this /dev",
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
) -> Result<Ready> {
    let (ready, all_ready) = mpsc::channel();
    for queue in 0..info.queues() {
        let tags = Arc::new(
            tags::Shared::new(info.depth(), info.max_io_bytes() as usize)
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
    let everyone: Arc<[Arc<tags::Shared>]> = serving.queues.iter().map(|queue| Arc::clone(&queue.tags)).collect();
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
    tags: Arc<tags::Shared>,
    shared: Arc<QueueShared>,
    everyone: Arc<[Arc<tags::Shared>]>,
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
            let error = Error::new(ErrorKind::State, "serve the device any longer: somebody else stopped it");
            if health.ended_by_somebody_else(&error) {
                shared.tell(&Event::QueueFailed { queue, error });
            }
        }
        if let Err(error) = served {
            // One queue less is a device that hangs: all of them end, and the kernel fails what was in flight.
            shared.tell(&Event::QueueFailed { queue, error: error.clone() });
            health.fail(error.clone());
            for other in &*everyone {
                other.abandon();
            }
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
        let page = page_size();
        let depth = self.info.device.depth();
        let descriptors = Map::shared_read_only(
            &*self.character_device,
            ublk::queue_map_offset(queue, page),
            ublk::queue_map_len(depth, page),
        )
        .map_err(|error| setup_error(queue, "map the descriptors", &error))?;
        let copying = match self.options.data_mode {
            DataMode::Copy => Copying::Driver,
            DataMode::UserCopy => Copying::User,
        };
        let tags =
            Tags::new(queue, depth, copying, self.character_device, descriptors, self.tags).map_err(|error| {
                let plain = crate::ctrl::explain_ring(&error);
                let message = format!("set up queue {queue}: {plain}");
                plain.with_message(message).with_kind(ErrorKind::Queue)
            })?;
        let mut queue = Queue::new(tags, self.shared, handler);
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

/// Opens a device's character node, which udev or devtmpfs may still be making.
fn open_character_device(info: &DeviceInfo) -> Result<File> {
    let path = info.character_path();
    let deadline = Instant::now() + NODE_DEADLINE;
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::io(&error, format_args!("open {}", path.display())).with_message(format!(
                    "open {}: the node did not appear within {NODE_DEADLINE:?}: /dev is not a devtmpfs (a container?); \
                     bind-mount the host's /dev",
                    path.display()
                )));
            }
            Err(error) => return Err(Error::io(&error, format_args!("open {}", path.display()))),
        }
    }
}

fn wait_for_node(path: &Path) -> bool {
    let deadline = Instant::now() + NODE_DEADLINE;
    while !path.exists() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}
