//! One input at a time.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::Target;

/// An input that takes longer is a failure: everything here is over in milliseconds.
pub const SLOW: Duration = Duration::from_secs(2);

/// What went wrong with an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The panic's message, or how long it took.
    pub what: String,
}

/// Gives `bytes` to `target`.
///
/// # Errors
/// It panicked, or took too long.
pub fn try_input(target: Target, bytes: &[u8]) -> Result<(), Failure> {
    let start = Instant::now();
    catch_unwind(AssertUnwindSafe(|| (target.run)(bytes))).map_err(|panic| Failure { what: message(&*panic) })?;
    let elapsed = start.elapsed();
    if elapsed > SLOW {
        return Err(Failure { what: format!("took {elapsed:?}") });
    }
    Ok(())
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".to_owned())
}
