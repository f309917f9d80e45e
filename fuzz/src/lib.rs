//! Arbitrary input for everything that reads input from elsewhere.
//!
//! A [`Target`] is a function that takes any bytes and panics when something is wrong. Inputs are the files in
//! `corpus/NAME`, and whatever a seeded [`Mutator`] makes of them. It runs wherever the tests run: coverage is not
//! looked at, so the corpus has to have something of everything. A file added to a corpus is an input from then on.
//!
//! ```text
//! make fuzz DURATION=60                              every target for a minute
//! make fuzz TARGETS='classifier script'
//! cargo run --profile fuzz -p ublkit-fuzz -- replay classifier FILE
//! ```

#![forbid(unsafe_code)]

mod input;
mod mutate;
mod run;
mod targets;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use self::input::Input;
pub use self::mutate::Mutator;
pub use self::run::{Failure, SLOW, try_input};
pub use self::targets::TARGETS;

/// Something that takes any bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Panics when the bytes are not taken as they should be.
    pub run: fn(&[u8]),
    /// How many inputs a test tries: about a second's worth.
    pub in_tests: u64,
}

impl Target {
    /// The target of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        TARGETS.into_iter().find(|target| target.name == name)
    }

    /// The committed inputs, in the order of their names.
    ///
    /// # Errors
    /// The directory or a file in it cannot be read.
    pub fn corpus(&self) -> io::Result<Vec<Vec<u8>>> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name);
        let mut files: Vec<PathBuf> =
            fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        files.sort();
        files.iter().map(fs::read).collect()
    }
}

#[cfg(test)]
mod tests;
