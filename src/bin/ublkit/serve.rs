//! `ublkit serve` and `ublkit recover`

use std::time::Duration;

use ublkit::backends::{File, Memory, Null};
use ublkit::ctrl::State;
use ublkit::{Backend, DataMode, Device, Error, ErrorKind, Event, Geometry, Signals};

use crate::args::{Mode, ServeBackend, ServeFile, ServeSized, Shape};
use crate::failure::Failure;
use crate::output;

/// How often it is asked whether the device still works.
const LOOK: Duration = Duration::from_millis(200);
/// What of an empty page of memory can be given back.
const DISCARD_BYTES: u32 = 4096;

/// Where a device comes from.
#[derive(Clone, Copy, Debug)]
enum Origin {
    New,
    /// It is there, and its server is gone.
    Left(u32),
}

pub(crate) fn run(backend: &ServeBackend) -> Result<(), Failure> {
    serve_any(backend, Origin::New)
}

pub(crate) fn recover(id: u32, backend: &ServeBackend) -> Result<(), Failure> {
    serve_any(backend, Origin::Left(id))
}

fn serve_any(backend: &ServeBackend, origin: Origin) -> Result<(), Failure> {
    let shape = match backend {
        ServeBackend::Memory(sized) | ServeBackend::Null(sized) => &sized.shape,
        ServeBackend::File(file) => &file.shape,
    };
    if shape.detach && matches!(origin, Origin::New) && shape.recovery == Mode::None {
        return Err(Failure::usage(
            "--detach needs --recovery wait, reissue or fail-io: other devices end with their server",
        ));
    }
    if let Origin::Left(id) = origin {
        refuse_empty(id, backend)?;
    }
    match backend {
        ServeBackend::Memory(sized) => {
            serve(Memory::with_geometry(geometry(sized)), sized.workers, &sized.shape, origin)
        }
        ServeBackend::Null(sized) => serve(Null::with_geometry(geometry(sized)), sized.workers, &sized.shape, origin),
        ServeBackend::File(file) => serve_file(file, origin),
    }
}

/// Whoever uses a device that was left has data on it: it is not for a backend that begins without.
fn refuse_empty(id: u32, backend: &ServeBackend) -> Result<(), Failure> {
    let what = match backend {
        ServeBackend::Memory(_) => {
            "memory begins empty, and what was stored went with the last server: delete the device"
        }
        ServeBackend::File(ServeFile { create: Some(_), .. }) => {
            "--create makes an empty file: name the one that the device was served from, without --create"
        }
        ServeBackend::File(_) | ServeBackend::Null(_) => return Ok(()),
    };
    Err(Failure::usage(format!("device {id} cannot be recovered like this: {what}")))
}

fn geometry(sized: &ServeSized) -> Geometry {
    let geometry = Geometry::bytes(sized.size).logical_block(sized.logical_block);
    if sized.shape.read_only {
        geometry.read_only()
    } else {
        geometry.discard(sized.logical_block.max(DISCARD_BYTES)).write_zeroes()
    }
}

fn serve_file(arguments: &ServeFile, origin: Origin) -> Result<(), Failure> {
    let mut options = File::options().read_only(arguments.shape.read_only).direct(arguments.direct);
    if let Some(bytes) = arguments.logical_block {
        options = options.logical_block(bytes);
    }
    let path = &arguments.path;
    let file = match arguments.create {
        Some(size) => options.create(path, size),
        None => options.open(path),
    };
    let file = file.map_err(|error| Failure::io(&error, format_args!("open {}", path.display())))?;
    if arguments.direct && !file.is_direct() {
        output::complain(format_args!("{} cannot do direct I/O: it goes through the page cache", path.display()));
    }
    let started = start(file, arguments.workers, &arguments.shape, origin).inspect_err(|_| {
        if arguments.create.is_some() {
            // It is empty and was made for nothing.
            let _ = std::fs::remove_file(path);
        }
    })?;
    started.until_the_end()
}

fn serve<B: Backend>(backend: B, workers: usize, shape: &Shape, origin: Origin) -> Result<(), Failure> {
    start(backend, workers, shape, origin)?.until_the_end()
}

/// A device that is being served.
struct Started {
    device: Device,
    /// Caught before the device was made, so that no signal can end this program and leave the device behind.
    signals: Signals,
    detach: bool,
    origin: Origin,
}

fn start<B: Backend>(backend: B, workers: usize, shape: &Shape, origin: Origin) -> Result<Started, Failure> {
    let signals = Signals::catch()?;
    let mut builder = Device::builder(backend)
        .workers(workers)
        .queues(shape.queues)
        .depth(shape.depth)
        .data_mode(if shape.user_copy { DataMode::UserCopy } else { DataMode::Copy })
        .recovery(shape.recovery.into())
        .on_event(|event| {
            // Its own lines say how far it has come.
            if !matches!(event, Event::Phase(_)) {
                output::complain(event);
            }
        });
    if let Some(id) = shape.id {
        builder = builder.id(id);
    }
    let device = match origin {
        Origin::New => builder.start()?,
        Origin::Left(id) => builder.recover(id)?,
    };
    Ok(Started { device, signals, detach: shape.detach, origin })
}

impl Started {
    fn until_the_end(self) -> Result<(), Failure> {
        let path = self.device.path();
        // If nobody wants to know the path, nobody will use the device, unless it has been in use before.
        let printed = output::print(format_args!("{}\n", path.display()));
        let (end, failed) = match printed {
            Ok(()) => self.wait(),
            Err(_) => ("nobody reads the output", None),
        };
        let leave = self.detach || printed.is_err() && matches!(self.origin, Origin::Left(_));
        let detach = || self.device.detach().map(|detached| detached.to_string());
        let close = || self.device.close().map(|closed| closed.to_string());
        let closed = match self.device.first_error() {
            None if leave => detach(),
            // Let go of for another server, or stopped: only the first can be detached.
            Some(error) if error.kind() == ErrorKind::State => detach().or_else(|_| close()),
            // A device that has failed is nothing to hand on.
            _ => close(),
        };
        let stats = self.device.stats();
        let requests: u64 = stats.iter().map(|queue| queue.requests).sum();
        let errors: u64 = stats.iter().map(|queue| queue.failed).sum();
        printed?;
        let closed = closed?;
        let summary = format!("{}: {end}: {closed}; {requests} requests, {errors} failed", path.display());
        match failed {
            Some(error) => Err(Failure::failed(format!("{summary}; the device failed to {error}"))),
            None => output::print(format_args!("{summary}\n")),
        }
    }

    /// Waits for whatever ends the device: says what it was, and the error if it was one.
    fn wait(&self) -> (&'static str, Option<Error>) {
        loop {
            if let Some(signal) = self.signals.wait(LOOK) {
                return (signal, self.device.first_error());
            }
            match self.device.first_error() {
                None => {}
                // Somebody's decision, carried out in order: `ublkit stop` or `ublkit delete`, or a supervisor's QUIESCE.
                Some(error) if error.kind() == ErrorKind::State => {
                    let info = self.device.controller().get_dev_info(self.device.id());
                    let quiescent = info.is_ok_and(|info| info.state() != State::Dead);
                    return (if quiescent { "for another server now" } else { "somebody else stopped it" }, None);
                }
                error => return ("it failed", error),
            }
        }
    }
}
