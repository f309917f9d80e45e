//! The errnos that get through the block layer.

pub(crate) const EPERM: i32 = 1;
pub(crate) const EIO: i32 = 5;
pub(crate) const EOPNOTSUPP: i32 = 95;
pub(crate) const EREMOTEIO: i32 = 121;

/// `blk_errors[]` in `block/blk-core.c`: those that arrive as what they are.
const PRESERVED: [i32; 16] = [
    EOPNOTSUPP, 110, // ETIMEDOUT
    28,  // ENOSPC
    67,  // ENOLINK
    EREMOTEIO, 52,  // EBADE
    61,  // ENODATA
    84,  // EILSEQ
    12,  // ENOMEM
    16,  // EBUSY
    11,  // EAGAIN
    19,  // ENODEV
    109, // ETOOMANYREFS
    75,  // EOVERFLOW
    62,  // ETIME
    22,  // EINVAL
];

/// The errno that the application sees when a server commits this negative result.
#[must_use]
pub fn arrives_as(result: i32) -> i32 {
    let errno = result.checked_neg().unwrap_or(EIO);
    if PRESERVED.contains(&errno) { errno } else { EIO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_on_the_list_is_eio() {
        assert_eq!(arrives_as(-28), 28);
        assert_eq!(arrives_as(-61), 61);
        assert_eq!(arrives_as(-13), EIO);
        assert_eq!(arrives_as(-4095), EIO);
        assert_eq!(arrives_as(i32::MIN), EIO);
    }
}
