//! Serves block devices from the command line, and looks after the ublk devices of a machine.
//!
//! Exit status: 0 done, 1 wrong usage, 2 the command failed, 4 this machine lacks something (the message says what to do).

mod args;
mod clean;
mod failure;
mod features;
mod list;
mod output;
mod remove;
mod serve;
mod units;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::{Arguments, Command};
use crate::failure::{Failure, Status};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nobody is left to tell if the terminal is gone.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => Status::Usage.into(),
            };
        }
    };
    match run(&arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                output::complain(message);
            }
            failure.status().into()
        }
    }
}

fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Features(arguments) => features::run(arguments),
        Command::List(arguments) => list::run(arguments),
        Command::Serve(arguments) => serve::run(&arguments.backend),
        Command::Recover(arguments) => serve::recover(arguments.id, &arguments.backend),
        Command::Stop(arguments) => remove::stop(arguments),
        Command::Delete(arguments) => remove::delete(arguments),
        Command::Clean(arguments) => clean::run(arguments),
    }
}
