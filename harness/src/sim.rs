//! The simulated device: a block layer, a ublk driver, a server and a disk with a volatile cache, in one thread.
//!
//! Everything that may happen in one order or another is drawn from a seed, one step at a time. The same seed and
//! actions give the same run, event for event; there is no clock and no thread.

pub mod calls;
mod driver;
mod ids;
pub mod medium;
mod oracles;
pub mod run;
pub mod server;
pub mod subject;
mod trace;

pub use self::driver::arrives_as;
pub use self::medium::{Medium, MediumDisk, MediumOptions};
pub use self::run::{Ran, RunOptions, SimFailure, run};
pub use self::server::{Buffers, Commit, PlainServer, Server, TagId, Work};
pub use self::subject::{MediumSubject, Open, Subject};
