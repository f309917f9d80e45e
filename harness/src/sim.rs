//! The simulated device: a block layer, a ublk driver, a server and a disk with a volatile cache, in one thread.

pub mod medium;
pub mod server;
