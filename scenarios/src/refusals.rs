//! A device that is read-only: it can be read, and nothing changes it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::libc;
use ublkit::blkdev;
use ublkit_harness::observe::Counts;

use crate::aligned::AlignedBuf;
use crate::context::Context;
use crate::scenario::Failure;
use crate::sysfs::BlockDir;
use crate::target::Target;

/// How many attempts a check makes, at least.
pub(crate) const ATTEMPTS: u64 = 2 * 9;

/// The oracle's name in findings.
const ORACLE: &str = "read_only";

/// Tries to change the device in every way that there is, at its beginning, in its middle and at its end. All of it has to be
/// refused, and none of it may reach the backend.
pub(crate) fn check(context: &Context, target: &Target) -> Result<u64, Failure> {
    let path = target.path();
    let node = path.display();
    if BlockDir::of(&path).number("ro")? != 1 {
        return Err(Failure::broke(ORACLE, format!("{node} is declared read-only, and the kernel says it is not")));
    }
    let reader = target.open_direct()?;
    if !blkdev::read_only(&reader).map_err(|error| Failure::io(format_args!("ask {node} for BLKROGET"), &error))? {
        return Err(Failure::broke(ORACLE, format!("{node} is read-only in sysfs and not for BLKROGET")));
    }
    // The kernel lets it be opened for writing, or does not, by version; it may not be written in either case.
    let writer = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path) {
        Ok(file) => Some(file),
        Err(error) if is_refusal(&error) => None,
        Err(error) => return Err(Failure::io(format_args!("open {node} for writing"), &error)),
    };
    let block = target.geometry().logical_block as usize;
    let (size, len) = (target.geometry().size, block as u64);
    let mut zeroes = AlignedBuf::zeroed(block);
    reader.read_exact_at(&mut zeroes, 0).map_err(|error| Failure::io(format_args!("read {node}"), &error))?;
    zeroes.fill(0);
    // What cannot be done to it at all is refused too, and for another reason.
    let no_discard = target.geometry().discard.is_none();
    let mut attempts = 0;
    for offset in [0, size / 2 / len * len, size - len] {
        let mut refused = |what: &str, result: io::Result<()>| {
            attempts += 1;
            match result {
                Err(error) if is_refusal(&error) => Ok(()),
                Err(error) if no_discard && what.starts_with("discard") && is_unknown(&error) => Ok(()),
                Err(error) => Err(Failure::io(format_args!("be refused: {what} at {offset} of {node}"), &error)),
                Ok(()) => Err(Failure::broke(ORACLE, format!("{node} is read-only, and took a {what} at {offset}"))),
            }
        };
        let by = |act: &dyn Fn(&File) -> io::Result<()>| match &writer {
            Some(writer) => act(writer),
            None => Err(Errno::EACCES.into()),
        };
        refused("write", by(&|file| file.write_all_at(&zeroes, offset)))?;
        refused("discard", by(&|file| blkdev::discard(file, offset, len)))?;
        refused("write of zeroes", by(&|file| blkdev::zero_out(file, offset, len)))?;
        refused("write by a reader", reader.write_all_at(&zeroes, offset))?;
        refused("discard by a reader", blkdev::discard(&reader, offset, len))?;
        refused("write of zeroes by a reader", blkdev::zero_out(&reader, offset, len))?;
    }
    let Counts { writes, discards, zeroes, .. } = target.counts()?;
    if writes + discards + zeroes > 0 {
        return Err(Failure::broke(
            ORACLE,
            format!(
                "{node} is read-only, and its backend was asked for {writes} writes, {discards} discards and \
                 {zeroes} writes of zeroes"
            ),
        ));
    }
    context.evidence().add("refusals", attempts);
    Ok(attempts)
}

/// As a device that may not be written says it; `EBADF` where it is the opening that may not.
fn is_refusal(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EPERM | Errno::EACCES | Errno::EROFS | Errno::EBADF))
}

/// As a device says it that cannot do it.
fn is_unknown(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_storage_is_no_refusal() {
        let error = io::Error::from_raw_os_error;
        for errno in [libc::EPERM, libc::EACCES, libc::EROFS, libc::EBADF] {
            assert!(is_refusal(&error(errno)));
        }
        for errno in [libc::EIO, libc::ENOSPC, libc::EINVAL, libc::EOPNOTSUPP] {
            assert!(!is_refusal(&error(errno)));
        }
        assert!(!is_refusal(&io::Error::other("short")));
    }
}
