//! How a [`Backend`] serves a queue: inline on its thread, or through a pool of workers.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::backend::Backend;
use crate::queue::Handler;
use crate::request::{DetachedRequest, Io, Operation, Request};
use crate::sys::process::set_io_flusher;

/// What [`serve`] needs of a request, wherever it is.
trait Served: Sized {
    fn io(&self) -> Io;
    fn data(&mut self) -> io::Result<&[u8]>;
    fn buffer(&mut self) -> &mut [u8];
    fn finish(self, result: io::Result<()>);
}

macro_rules! served {
    ($type:ty) => {
        impl Served for $type {
            #[inline(always)]
            fn io(&self) -> Io {
                <$type>::io(self)
            }
            #[inline(always)]
            fn data(&mut self) -> io::Result<&[u8]> {
                <$type>::data(self)
            }
            #[inline(always)]
            fn buffer(&mut self) -> &mut [u8] {
                <$type>::buffer(self)
            }
            #[inline(always)]
            fn finish(self, result: io::Result<()>) {
                <$type>::finish(self, result);
            }
        }
    };
}
served!(Request<'_>);
served!(DetachedRequest);

/// Serves one request by calling a backend.
#[inline(always)]
fn serve<B: Backend + ?Sized>(backend: &B, mut request: impl Served) {
    let io = request.io();
    let result = match io.operation() {
        Operation::Read => backend.read_at(request.buffer(), io.offset()),
        Operation::Write => match request.data() {
            Ok(data) => backend.write_at(data, io.offset(), io.write_flags()),
            Err(error) => Err(error),
        },
        Operation::Flush => backend.flush(),
        Operation::Discard => backend.discard(io.offset(), io.len()),
        Operation::WriteZeroes => backend.write_zeroes(io.offset(), io.len(), io.zero_flags()),
        Operation::Other(_) => Err(io::Error::from_raw_os_error(Errno::EOPNOTSUPP as i32)),
    };
    request.finish(result);
}

/// Serves one queue with a backend.
#[derive(Debug)]
pub(crate) struct BackendHandler<B> {
    backend: Arc<B>,
    /// The pool, and this batch's requests for it.
    offload: Option<(Arc<Pool>, Vec<DetachedRequest>)>,
}

impl<B: Backend> BackendHandler<B> {
    /// Inline without a pool; through it with one.
    pub(crate) fn new(backend: Arc<B>, pool: Option<Arc<Pool>>, depth: u16) -> Self {
        Self { backend, offload: pool.map(|pool| (pool, Vec::with_capacity(usize::from(depth)))) }
    }
}

impl<B: Backend> Handler for BackendHandler<B> {
    #[inline(always)]
    fn handle(&mut self, request: Request<'_>) {
        match &mut self.offload {
            None => serve(&*self.backend, request),
            Some((_, batch)) => batch.push(request.detach()),
        }
    }

    #[inline]
    fn batch_end(&mut self) {
        if let Some((pool, batch)) = &mut self.offload
            && !batch.is_empty()
        {
            pool.submit(batch);
        }
    }
}

/// Requests that wait for a worker. Bounded by the device's tags.
#[derive(Debug)]
pub(crate) struct Pool {
    state: Mutex<PoolState>,
    work: Condvar,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct PoolState {
    waiting: VecDeque<DetachedRequest>,
    closed: bool,
    running: usize,
}

/// The pool's threads.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` workers on `backend`, with room for `requests` requests. `prepare` runs first on each.
    pub(crate) fn start<B: Backend>(
        backend: &Arc<B>,
        count: usize,
        requests: usize,
        name: &str,
        io_flusher: bool,
    ) -> io::Result<Self> {
        let state = PoolState { waiting: VecDeque::with_capacity(requests), ..PoolState::default() };
        let pool = Arc::new(Pool { state: Mutex::new(state), work: Condvar::new(), ended: Condvar::new() });
        let mut this = Self { pool: Arc::clone(&pool), threads: Vec::with_capacity(count) };
        for index in 0..count {
            let backend = Arc::clone(backend);
            let worker_pool = Arc::clone(&pool);
            let thread = std::thread::Builder::new().name(format!("{name}-w{index}")).spawn(move || {
                if io_flusher {
                    // Told once per device by the queue's thread, where it fails in the same way.
                    let _ = set_io_flusher();
                }
                worker_pool.work(&*backend);
            })?;
            pool.lock().running += 1;
            this.threads.push(thread);
        }
        Ok(this)
    }

    pub(crate) fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.pool)
    }

    /// Ids of the workers' threads.
    pub(crate) fn thread_ids(&self) -> impl Iterator<Item = ThreadId> {
        self.threads.iter().map(|thread| thread.thread().id())
    }

    /// Whether all of them have ended.
    pub(crate) fn have_ended(&self) -> bool {
        self.pool.lock().running == 0
    }

    /// Ends the workers. Returns false if some did not end by `deadline`: they are stuck in the backend and are left.
    pub(crate) fn close(&mut self, deadline: Instant) -> bool {
        let mut state = self.pool.lock();
        state.closed = true;
        self.pool.work.notify_all();
        while state.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            state = self.pool.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        for thread in self.threads.drain(..) {
            // A worker catches its backend's panics; its own end is all there is to wait for.
            let _ = thread.join();
        }
        true
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.closed = true;
        self.pool.work.notify_all();
    }
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, PoolState> {
        // Nothing panics with the lock held; were it poisoned, its content would be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, batch: &mut Vec<DetachedRequest>) {
        let count = batch.len();
        self.lock().waiting.extend(batch.drain(..));
        if count == 1 {
            self.work.notify_one();
        } else {
            self.work.notify_all();
        }
    }

    fn work<B: Backend>(&self, backend: &B) {
        while let Some(request) = self.next() {
            let shared = Arc::clone(request.shared());
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| serve(backend, request))) {
                shared.panicked(&*payload);
            }
        }
    }

    fn next(&self) -> Option<DetachedRequest> {
        let mut state = self.lock();
        loop {
            if let Some(request) = state.waiting.pop_front() {
                return Some(request);
            }
            if state.closed {
                state.running -= 1;
                self.ended.notify_all();
                return None;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
