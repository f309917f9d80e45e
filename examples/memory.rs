//! Serves a RAM disk, until Ctrl-C: `cargo run --release --example memory -- [SIZE IN BYTES]`.
//!
//! It is sparse: the default of 1 TiB costs what is written to it.

use std::process::ExitCode;
use std::sync::Arc;

use ublkit::backends::Memory;
use ublkit::{Device, Result};

fn main() -> ExitCode {
    let Ok(size) = std::env::args().nth(1).map_or(Ok(1 << 40), |size| size.parse()) else {
        eprintln!("usage: memory [SIZE IN BYTES]");
        return ExitCode::FAILURE;
    };
    match serve(size) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed to {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(size: u64) -> Result<()> {
    // Shared, to look into it while the device serves it.
    let memory = Arc::new(Memory::new(size));
    let device = Device::builder(Arc::clone(&memory)).queues(2).start()?;
    println!("{}", device.path().display());
    device.wait_for_signal()?;
    println!("{}", device.close()?);
    println!("{} bytes of memory held data", memory.allocated_bytes());
    Ok(())
}
