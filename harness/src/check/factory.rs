//! What is checked: closures that open a device, and what they open.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ublkit::{Backend, Geometry};

use super::watch::{Remarks, Watched, panic_words};
use crate::sim::{Medium, PlainServer, Server};

/// Marks a [`Factory`] that has its own storage.
#[derive(Clone, Copy, Debug)]
pub enum OwnStorage {}

/// Marks a [`Factory`] that is given a [`Medium`].
#[derive(Clone, Copy, Debug)]
pub enum OnMedium {}

/// Marks a [`Backend`], whose calls block.
#[derive(Clone, Copy, Debug)]
pub enum Blocking {}

/// Marks what opens only perhaps.
#[derive(Clone, Copy, Debug)]
pub enum Fallible {}

/// Whatever opens a device: a closure without arguments, or one of a [`Medium`]. `M` tells them apart and is inferred.
pub trait Factory<M> {
    /// Whether it stores its data on the medium that it is given.
    const ON_MEDIUM: bool;

    /// Opens the device, with a medium if it is [on one](Self::ON_MEDIUM).
    ///
    /// # Errors
    /// Says why it does not open.
    fn open(&self, medium: Option<Medium>) -> Result<Opened, String>;
}

/// Whatever serves a device: a [`Backend`], or a `Result` with one. `K` tells them apart and is inferred.
pub trait IntoServer<K> {
    /// What is served.
    ///
    /// # Errors
    /// Says why there is nothing.
    fn into_server(self) -> Result<Opened, String>;
}

/// A device that is open.
pub struct Opened {
    geometry: Geometry,
    kind: Kind,
}

enum Kind {
    Blocking(Arc<dyn Backend>),
    Server(Box<dyn FnOnce(u8) -> Box<dyn Server>>),
}

impl Opened {
    /// One with blocking calls, that threads can share.
    #[must_use]
    pub fn blocking(backend: Arc<dyn Backend>) -> Self {
        Self { geometry: backend.geometry(), kind: Kind::Blocking(backend) }
    }

    /// One of any other kind. `serve` makes its server, in which requests overtake each other the more often the higher
    /// the number, from 0 to 100.
    #[must_use]
    pub fn server(geometry: Geometry, serve: impl FnOnce(u8) -> Box<dyn Server> + 'static) -> Self {
        Self { geometry, kind: Kind::Server(Box::new(serve)) }
    }

    /// What it declares.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(super) fn serve(self, reorder: u8, remarks: &Remarks) -> Box<dyn Server> {
        match self.kind {
            Kind::Blocking(backend) => {
                let watched: Arc<dyn Backend> = Arc::new(Watched::new(backend, remarks.clone()));
                Box::new(PlainServer::new(watched, reorder))
            }
            Kind::Server(serve) => serve(reorder),
        }
    }

    /// The backend, if its calls block.
    pub(super) fn backend(self) -> Option<Arc<dyn Backend>> {
        match self.kind {
            Kind::Blocking(backend) => Some(backend),
            Kind::Server(_) => None,
        }
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl<B: Backend> IntoServer<Blocking> for B {
    fn into_server(self) -> Result<Opened, String> {
        Ok(Opened::blocking(Arc::new(self)))
    }
}

impl<K, S: IntoServer<K>, E: fmt::Display> IntoServer<(Fallible, K)> for Result<S, E> {
    fn into_server(self) -> Result<Opened, String> {
        self.map_err(|error| error.to_string())?.into_server()
    }
}

impl<F: Fn() -> S, S: IntoServer<K>, K> Factory<(OwnStorage, S, K)> for F {
    const ON_MEDIUM: bool = false;

    fn open(&self, _medium: Option<Medium>) -> Result<Opened, String> {
        caught(|| self().into_server())
    }
}

impl<F: Fn(Medium) -> S, S: IntoServer<K>, K> Factory<(OnMedium, S, K)> for F {
    const ON_MEDIUM: bool = true;

    fn open(&self, medium: Option<Medium>) -> Result<Opened, String> {
        let medium = medium.ok_or("it was given no medium")?;
        caught(|| self(medium).into_server())
    }
}

/// A factory may well `unwrap`.
fn caught(open: impl FnOnce() -> Result<Opened, String>) -> Result<Opened, String> {
    catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|panic| Err(format!("it panicked: {}", panic_words(&*panic))))
}
