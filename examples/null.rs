//! Serves a device that stores nothing, until Ctrl-C: `cargo run --release --example null -- [SIZE IN BYTES]`.

use std::process::ExitCode;

use ublkit::backends::Null;
use ublkit::{Device, Result};

fn main() -> ExitCode {
    let Ok(size) = std::env::args().nth(1).map_or(Ok(1 << 40), |size| size.parse()) else {
        eprintln!("usage: null [SIZE IN BYTES]");
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
    let device = Device::builder(Null::new(size)).queues(2).start()?;
    println!("{}", device.path().display());
    device.wait_for_signal()?;
    println!("{}", device.close()?);
    Ok(())
}
