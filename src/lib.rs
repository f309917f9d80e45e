//! Serve Linux block devices from user space through ublk.

pub mod backend;
pub mod backends;
pub mod blkdev;
mod builder;
pub mod ctrl;
mod device;
#[cfg(feature = "driverless")]
pub mod driverless;
mod error;
pub mod holders;
pub mod orphan;
mod params;
mod queue;
mod request;
mod ring;
mod signals;
mod stats;
pub mod sys;
mod workers;

pub use backend::{Backend, DiscardLimits, Geometry, SECTOR_SIZE, WriteFlags, ZeroFlags, result_code};
pub use builder::{DataMode, DeviceBuilder, QueueInfo, Serve, ServeBackend, ServeHandlers};
pub use ctrl::Controller;
pub use device::{Closed, Deletion, Device};
pub use error::{Error, ErrorKind, Result};
pub use queue::Handler;
pub use request::{DetachedRequest, Io, Operation, Request};
pub use ring::client::{BlockClient, ZeroSpace};
pub use signals::Signals;
pub use stats::{Event, QueueStats};
