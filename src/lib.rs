//! Serve Linux block devices from user space through ublk.
//!
//! Implement [`Backend`] and you have `/dev/ublkbN`, driven by the kernel's own block layer, over io_uring:
//!
//! ```no_run
//! use std::io;
//! use std::sync::Mutex;
//! use ublkit::{Backend, Device, Geometry, WriteFlags};
//!
//! struct Disk(Mutex<Vec<u8>>);
//!
//! impl Backend for Disk {
//!     fn geometry(&self) -> Geometry {
//!         Geometry::bytes(64 << 20)
//!     }
//!     fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
//!         let disk = self.0.lock().unwrap();
//!         buf.copy_from_slice(&disk[offset as usize..][..buf.len()]);
//!         Ok(())
//!     }
//!     fn write_at(&self, buf: &[u8], offset: u64, _: WriteFlags) -> io::Result<()> {
//!         let mut disk = self.0.lock().unwrap();
//!         disk[offset as usize..][..buf.len()].copy_from_slice(buf);
//!         Ok(())
//!     }
//! }
//!
//! fn main() -> ublkit::Result<()> {
//!     let device = Device::builder(Disk(Mutex::new(vec![0; 64 << 20]))).queues(2).start()?;
//!     println!("{}", device.path().display()); // /dev/ublkb0
//!     device.wait_for_signal()?; // Ctrl-C
//!     println!("{}", device.close()?);
//!     Ok(())
//! }
//! ```
//!
//! # Two levels
//!
//! * [`Backend`]: blocking calls. They run on the queue's own thread, or, with
//!   [`workers`](DeviceBuilder::workers), on a pool of threads, so that calls which wait do so side by side.
//! * [`Handler`]: the raw level. One per queue, on the queue's thread; each [`Request`] is a token that is completed
//!   exactly once, now or later, in any order, here or, [detached](Request::detach), on any thread:
//!
//! ```no_run
//! use ublkit::{Device, Geometry, Operation, Request};
//!
//! fn main() -> ublkit::Result<()> {
//!     // Reads as zeroes, swallows writes.
//!     let device = Device::builder_with_handlers(Geometry::bytes(1 << 30), |_queue| {
//!         Ok(|mut request: Request<'_>| {
//!             if request.operation() == Operation::Read {
//!                 request.buffer().fill(0);
//!             }
//!             request.complete();
//!         })
//!     })
//!     .start()?;
//!     device.wait_for_signal()?;
//!     device.close()?;
//!     Ok(())
//! }
//! ```
//!
//! # What the library takes care of
//!
//! * A start is all or nothing: every choice is checked with the driver's own rules before anything is created, and a
//!   queue that cannot be set up takes the device with it.
//! * What a backend can do is declared in its [`Geometry`]; the kernel is told that and nothing else. A backend's errno
//!   reaches the application ([`result_code`]); its panic becomes `EIO` and an [`Event`].
//! * [`Device::close`] stops the device while it is still served, so that dirty pages are written back; it is bounded, and
//!   says who holds the device open if somebody does.
//! * With [`Recovery`], a device outlives its server: [`DeviceBuilder::recover`] takes it over from one that was killed, or
//!   that has [detached](Device::detach) itself, say to be replaced by a newer version.
//! * Devices that a killed server left behind are found and removed by [`orphan`], and nothing that is alive is touched.
//!
//! # What it needs
//!
//! Linux 6.0 or later with `ublk_drv` (tested on 6.12 and 7.2), and root: ublk asks for `CAP_SYS_ADMIN`. There is no
//! build script and nothing is generated.

pub mod backend;
pub mod backends;
pub mod blkdev;
mod builder;
mod close;
pub mod ctrl;
mod detach;
mod device;
#[cfg(feature = "driverless")]
pub mod driverless;
mod error;
pub mod holders;
mod launch;
pub mod orphan;
mod params;
mod queue;
#[cfg(feature = "raw")]
pub mod raw;
mod recovery;
mod request;
mod ring;
mod signals;
mod stats;
pub mod sys;
mod turn;
mod workers;
mod writeback;

pub use backend::{Backend, DiscardLimits, Geometry, SECTOR_SIZE, WriteFlags, ZeroFlags, result_code};
pub use builder::{DataMode, DeviceBuilder, QueueInfo, Serve, ServeBackend, ServeHandlers};
pub use close::{Closed, Deletion};
pub use ctrl::Controller;
pub use detach::DetachedDevice;
pub use device::Device;
pub use error::{Error, ErrorKind, Result};
pub use queue::Handler;
pub use recovery::Recovery;
pub use request::{DetachedRequest, Io, Operation, Request};
pub use ring::client::{BlockClient, ZeroSpace};
pub use signals::Signals;
pub use stats::{Event, Phase, QueueStats};
