//! `ublk-torture`: break a block device, and prove what was found.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(ublk_torture::cli::main(std::env::args_os()))
}
