//! Building a device: what may be chosen.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Geometry};
use crate::ctrl::{AddDevice, Controller, DeviceInfo};
use crate::device::{Deadlines, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::launch::{Beginning, launch};
use crate::params;
use crate::queue::Handler;
use crate::recovery::{self, Recovery};
use crate::stats::{Event, EventSink, Phase};
use crate::sys::ublk::Features;
use crate::workers::{BackendHandler, Pool, Workers};

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

impl DataMode {
    fn features(self) -> Features {
        match self {
            Self::Copy => Features::NONE,
            Self::UserCopy => Features::USER_COPY,
        }
    }
}

#[derive(Clone)]
pub(crate) struct Options {
    id: Option<u32>,
    queues: u16,
    depth: u16,
    max_io_bytes: u32,
    pub(crate) data_mode: DataMode,
    recovery: Recovery,
    pub(crate) affinity: bool,
    pub(crate) io_flusher: bool,
    pub(crate) lock_buffers: bool,
    pub(crate) deadlines: Deadlines,
    pub(crate) events: EventSink,
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
pub struct WorkersHandle(pub(crate) Workers);

#[doc(hidden)]
#[derive(Debug)]
pub struct PoolHandle(pub(crate) Arc<Pool>);

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
            recovery: Recovery::None,
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

    /// What becomes of the device and its I/O when this server dies or [detaches](Device::detach); by default the device
    /// ends with its server.
    #[must_use]
    pub fn recovery(mut self, recovery: Recovery) -> Self {
        self.options.recovery = recovery;
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

    /// Calls `sink` for every [`Event`], on the thread where it happened; it must not block for long. One that panics does so
    /// for itself: the device goes on.
    #[must_use]
    pub fn on_event(mut self, sink: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        // It is called in the middle of starting, closing and serving, by threads that others wait for.
        self.options.events = Arc::new(move |event| drop(catch_unwind(AssertUnwindSafe(|| sink(event)))));
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
        let data = options.data_mode.features();
        if !controller.features().contains(data) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("use {data:?}: this kernel's ublk_drv has only {:?}", controller.features()),
            ));
        }
        options.recovery.check(controller.features())?;
        let needed = data | options.recovery.features();
        let info = controller.add(&AddDevice {
            id: options.id,
            queues: options.queues,
            depth: options.depth,
            max_io_bytes: options.max_io_bytes,
            features: needed | options.recovery.welcome(controller.features()),
        })?;
        let mut added = Added { controller: &controller, id: info.id(), armed: true };
        // The driver drops flags without a word.
        if !info.features().contains(needed) {
            let granted = info.features();
            let message = format!("use {needed:?}: the driver granted only {granted:?}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        (options.events)(&Event::Phase(Phase::Added));
        let deadline = Instant::now() + options.deadlines.start;
        let device = launch(&controller, info, geometry, &options, source, Beginning::Start, deadline)?;
        added.armed = false;
        Ok(device)
    }

    /// Takes over device `id`, whose server has died or has [detached](Device::detach), with the I/O that waits in it,
    /// instead of creating one. When this returns, I/O is served again.
    ///
    /// Queues, depth, largest request, data mode and recovery mode are the device's own, whatever was chosen here. The
    /// geometry must be the device's: it may have been mounted and cannot change. A server that has just died is waited for
    /// within the [start's deadline](Self::start_deadline), as the kernel needs a moment to take a device back. (On Linux
    /// before 6.16 that moment is up to a minute if every tag of a queue was in the server's hands when it died.)
    ///
    /// Requests can come as soon as the queues are there, and the first are often those that the last server had: with
    /// [`Recovery::Reissue`] a request can be carried out twice. [`Phase::Added`] says that the recovery has begun,
    /// [`Phase::Started`] that it is done.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such device; [`ErrorKind::State`] if it was built without [`Recovery`], or is
    /// stopped; [`ErrorKind::Busy`] if somebody serves or recovers it, naming them; [`ErrorKind::TimedOut`] if the kernel
    /// does not take it back in time; [`ErrorKind::InvalidInput`] if the geometry is not the device's, saying what
    /// differs; [`ErrorKind::Unsupported`] if it uses a feature that this library does not serve; errors of
    /// [`Controller::open`]; [`ErrorKind::Queue`] when a queue could not be set up.
    ///
    /// The device is never deleted: after an error, or when this process dies half way, it can be recovered again. (But not
    /// on Linux 6.12 when this process is killed in the microseconds in which it hands its tags to the driver, nor on 6.18;
    /// these kernels then hang or die themselves.)
    ///
    /// ```no_run
    /// use ublkit::{Controller, Device, Recovery};
    /// use ublkit::backends::File;
    ///
    /// // A first server…
    /// let device = Device::builder(File::open("disk.img")?).recovery(Recovery::Reissue).start()?;
    /// let id = device.detach()?.id; // …or it is killed
    ///
    /// // …and, mostly in another process, the next one. Applications have only waited.
    /// let device = Device::builder(File::open("disk.img")?).recover(id)?;
    /// device.wait_for_signal()?;
    /// device.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn recover(self, id: u32) -> Result<Device> {
        let Self { mut options, geometry, source } = self;
        params::check_geometry(&geometry)?;
        let controller = Arc::new(Controller::open()?);
        let deadline = Instant::now() + options.deadlines.start;
        let info = recovery::await_unserved(&controller, id, deadline)?;
        options.data_mode = recovery::data_mode(id, info.features())?;
        recovery::compare(&info, &controller.get_params(id)?, &geometry)?;
        recovery::begin(&controller, id, deadline)?;
        (options.events)(&Event::Phase(Phase::Added));
        launch(&controller, info, geometry, &options, source, Beginning::Recovery, deadline)
            .map_err(|error| recovery::say_what_is_left(&controller, id, error))
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
