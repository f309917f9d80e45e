//! The ublk user interface, written out from `include/uapi/linux/ublk_cmd.h`.
//!
//! Every structure's size and every field's offset is asserted at compile time; every command number is computed
//! the way the kernel's `_IOWR` computes it. Field names are the kernel's.

use std::fmt;
use std::mem::{offset_of, size_of};
use std::ops::{BitAnd, BitOr, BitOrAssign, Not};

/// Path of the control device.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// Asks ADD_DEV for any free id.
pub const ANY_ID: u32 = u32::MAX;
/// Largest number of queues of a device (`UBLK_MAX_NR_QUEUES`).
pub const MAX_QUEUES: u16 = 4096;
/// Largest queue depth (`UBLK_MAX_QUEUE_DEPTH`).
pub const MAX_QUEUE_DEPTH: u16 = 4096;
/// Largest I/O buffer: a user-copy offset has 25 bits for it (`UBLK_IO_BUF_BITS`).
pub const MAX_IO_BUF_BYTES: u32 = 1 << 25;

/// `_IOC(dir, 'u', nr, size)` of `asm-generic/ioctl.h`.
const fn ioc(read: bool, write: bool, nr: u32, size: usize) -> u32 {
    let direction = (write as u32) | ((read as u32) << 1);
    (direction << 30) | ((size as u32) << 16) | ((b'u' as u32) << 8) | nr
}

/// The number part of a command, which is its legacy encoding.
#[must_use]
pub const fn legacy(command: u32) -> u32 {
    command & 0xff
}

macro_rules! commands {
    ($(#[$about:meta])* $names:ident: $size:ty; $($(#[$doc:meta])* $name:ident = $dir:ident $nr:literal;)*) => {
        $($(#[$doc])* pub const $name: u32 = commands!(@ $dir $nr $size);)*
        $(#[$about])* pub const $names: &[(u32, &str)] = &[$(($name, stringify!($name))),*];
    };
    (@ r $nr:literal $size:ty) => { ioc(true, false, $nr, size_of::<$size>()) };
    (@ wr $nr:literal $size:ty) => { ioc(true, true, $nr, size_of::<$size>()) };
}

commands! {
    /// The control commands and their names here.
    CONTROL_COMMANDS: CtrlCmd;
    /// Which CPUs a queue serves.
    CMD_GET_QUEUE_AFFINITY = r 0x01;
    /// A device's [`DevInfo`].
    CMD_GET_DEV_INFO = r 0x02;
    /// Create the character device.
    CMD_ADD_DEV = wr 0x04;
    /// Stop, remove, and wait until the id is free.
    CMD_DEL_DEV = wr 0x05;
    /// Create the block device once every tag is fetched.
    CMD_START_DEV = wr 0x06;
    /// Remove the block device.
    CMD_STOP_DEV = wr 0x07;
    /// Set [`Params`].
    CMD_SET_PARAMS = wr 0x08;
    /// Get [`Params`].
    CMD_GET_PARAMS = r 0x09;
    /// Begin recovery by a new server.
    CMD_START_USER_RECOVERY = wr 0x10;
    /// End recovery.
    CMD_END_USER_RECOVERY = wr 0x11;
    /// As `CMD_GET_DEV_INFO`, permitted to the owner of an unprivileged device.
    CMD_GET_DEV_INFO2 = r 0x12;
    /// The driver's [`Features`].
    CMD_GET_FEATURES = r 0x13;
    /// As `CMD_DEL_DEV` without the wait.
    CMD_DEL_DEV_ASYNC = r 0x14;
    /// Change the size of a started device.
    CMD_UPDATE_SIZE = wr 0x15;
    /// Make a recoverable device quiescent.
    CMD_QUIESCE_DEV = wr 0x16;
    /// Stop unless somebody holds the block device.
    CMD_TRY_STOP_DEV = wr 0x17;
    /// Register memory that clients and server share.
    CMD_REG_BUF = wr 0x18;
    /// Undo `CMD_REG_BUF`.
    CMD_UNREG_BUF = wr 0x19;
}

commands! {
    /// The I/O commands and their names here.
    IO_COMMANDS: IoCmd;
    /// Hand a tag to the driver for the first time.
    IO_FETCH_REQ = wr 0x20;
    /// Complete a tag's request and hand the tag back.
    IO_COMMIT_AND_FETCH_REQ = wr 0x21;
    /// Give the buffer for a write's data.
    IO_NEED_GET_DATA = wr 0x22;
    /// Register a request's pages as an io_uring buffer.
    IO_REGISTER_IO_BUF = wr 0x23;
    /// Undo `IO_REGISTER_IO_BUF`.
    IO_UNREGISTER_IO_BUF = wr 0x24;
    /// As `IO_FETCH_REQ` for many tags, without waiting for a request.
    IO_PREP_IO_CMDS = wr 0x25;
    /// Complete the requests of many tags.
    IO_COMMIT_IO_CMDS = wr 0x26;
    /// Wait for requests of any tag, again and again.
    IO_FETCH_IO_CMDS = wr 0x27;
}

/// CQE result of an I/O command: a request is here.
pub const IO_RES_OK: i32 = 0;
/// CQE result: give a buffer by `IO_NEED_GET_DATA` first.
pub const IO_RES_NEED_GET_DATA: i32 = 1;
/// CQE result (`-ENODEV`): the tag is not coming back; the device stops.
pub const IO_RES_ABORT: i32 = -19;

/// Feature bits (`UBLK_F_*`) of the driver or of one device.
///
/// Bits that this library does not know survive a round trip.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*
            const NAMES: &'static [(u32, &'static str)] = &[$(($bit, stringify!($name))),*];
        }
    };
}

features! {
    /// Zero copy by register and unregister commands.
    SUPPORT_ZERO_COPY = 0;
    /// Completions always go through task work.
    URING_CMD_COMP_IN_TASK = 1;
    /// A write's buffer is given when its size is known.
    NEED_GET_DATA = 2;
    /// The device survives its server.
    USER_RECOVERY = 3;
    /// Requests in flight at a dead server are issued again.
    USER_RECOVERY_REISSUE = 4;
    /// Created by a user without `CAP_SYS_ADMIN`.
    UNPRIVILEGED_DEV = 5;
    /// Commands are encoded as ioctl numbers.
    CMD_IOCTL_ENCODE = 6;
    /// Data moves by `pread` and `pwrite` on the character device.
    USER_COPY = 7;
    /// A zoned device.
    ZONED = 8;
    /// I/O fails while no server is there.
    USER_RECOVERY_FAIL_IO = 9;
    /// The size can change.
    UPDATE_SIZE = 10;
    /// Zero copy with automatic registration.
    AUTO_BUF_REG = 11;
    /// The device can be made quiescent.
    QUIESCE = 12;
    /// Each tag may be served by its own task.
    PER_IO_DAEMON = 13;
    /// Buffers may be registered from any task.
    BUF_REG_OFF_DAEMON = 14;
    /// Commands for many tags at once.
    BATCH_IO = 15;
    /// Integrity metadata.
    INTEGRITY = 16;
    /// `CMD_TRY_STOP_DEV` exists.
    SAFE_STOP_DEV = 17;
    /// No partition scan at start.
    NO_AUTO_PART_SCAN = 18;
    /// Zero copy through shared memory.
    SHMEM_ZC = 19;
    /// The descriptor's size can be chosen.
    IO_DESC_SIZE = 20;
}

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);

    /// From the kernel's bits, all kept.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The kernel's bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether every bit of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Names of the set bits, an unknown one as `bit 42`.
    pub fn names(self) -> impl Iterator<Item = String> {
        (0..64).filter(move |bit| self.0 >> bit & 1 == 1).map(|bit| {
            Self::NAMES
                .iter()
                .find(|(known, _)| *known == bit)
                .map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
        })
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} [{}]", self.0, self.names().collect::<Vec<_>>().join(" "))
    }
}

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Features {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for Features {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Features {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0)
    }
}

macro_rules! layout {
    ($name:ident: $size:literal { $($field:ident @ $offset:literal),* $(,)? }) => {
        const _: () = {
            assert!(size_of::<$name>() == $size, concat!("size of ", stringify!($name)));
            $(assert!(offset_of!($name, $field) == $offset, concat!("offset of ", stringify!($name.$field)));)*
        };
    };
}

/// A control command (`struct ublksrv_ctrl_cmd`), carried in the SQE.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[expect(missing_docs)]
pub struct CtrlCmd {
    pub dev_id: u32,
    pub queue_id: u16,
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}
layout!(CtrlCmd: 32 { dev_id @ 0, queue_id @ 4, len @ 6, addr @ 8, data @ 16, dev_path_len @ 24, reserved @ 28 });

/// A device as the driver knows it (`struct ublksrv_ctrl_dev_info`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[expect(missing_docs)]
pub struct DevInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub io_desc_size: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub ublksrv_pid: i32,
    pub pad1: u32,
    pub flags: u64,
    pub ublksrv_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved1: u64,
    pub reserved2: u64,
}
layout!(DevInfo: 64 {
    nr_hw_queues @ 0, queue_depth @ 2, state @ 4, io_desc_size @ 6, max_io_buf_bytes @ 8, dev_id @ 12,
    ublksrv_pid @ 16, flags @ 24, ublksrv_flags @ 32, owner_uid @ 40, owner_gid @ 44,
});

/// A structure that goes to the kernel and comes back as its bytes.
///
/// # Safety
/// The type is `repr(C)`, has no padding, and every bit pattern is a value of it.
pub(crate) unsafe trait Plain: Copy + Default {
    /// The bytes, in a box that can be lent to the kernel.
    fn to_boxed_bytes(self) -> Box<[u8]> {
        // SAFETY: no padding, so every byte is initialised; the slice lives as long as `self` here.
        unsafe { std::slice::from_raw_parts((&raw const self).cast::<u8>(), size_of::<Self>()) }.into()
    }

    /// A value from bytes; fields beyond their end keep their defaults.
    fn from_byte_prefix(bytes: &[u8]) -> Self {
        let mut value = Self::default();
        let len = bytes.len().min(size_of::<Self>());
        // SAFETY: `len` bytes are readable on one side and writable on the other, and every bit pattern is a value.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast::<u8>(), len) };
        value
    }
}

// SAFETY: `repr(C)`, integers only, offsets asserted above: the fields leave no gap.
unsafe impl Plain for DevInfo {}
// SAFETY: as above; its parts are asserted below, and end where the next begins.
unsafe impl Plain for Params {}

/// `DevInfo::state`: no block device (yet, or any more).
pub const STATE_DEAD: u16 = 0;
/// `DevInfo::state`: started.
pub const STATE_LIVE: u16 = 1;
/// `DevInfo::state`: the server is gone; I/O waits for the next one.
pub const STATE_QUIESCED: u16 = 2;
/// `DevInfo::state`: the server is gone; I/O fails until the next one.
pub const STATE_FAIL_IO: u16 = 3;

/// One request, written by the driver into the mapped array (`struct ublksrv_io_desc`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[expect(missing_docs)]
pub struct IoDesc {
    pub op_flags: u32,
    pub nr_sectors: u32,
    pub start_sector: u64,
    pub addr: u64,
}
layout!(IoDesc: 24 { op_flags @ 0, nr_sectors @ 4, start_sector @ 8, addr @ 16 });

/// An I/O command (`struct ublksrv_io_cmd`), carried in the SQE.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[expect(missing_docs)]
pub struct IoCmd {
    pub q_id: u16,
    pub tag: u16,
    pub result: i32,
    pub addr: u64,
}
layout!(IoCmd: 16 { q_id @ 0, tag @ 2, result @ 4, addr @ 8 });

impl IoCmd {
    /// The command as it stands in the SQE, in native byte order.
    #[must_use]
    #[inline]
    pub fn to_words(self) -> [u64; 2] {
        let [q0, q1] = self.q_id.to_ne_bytes();
        let [t0, t1] = self.tag.to_ne_bytes();
        let [r0, r1, r2, r3] = self.result.to_ne_bytes();
        [u64::from_ne_bytes([q0, q1, t0, t1, r0, r1, r2, r3]), self.addr]
    }
}

impl CtrlCmd {
    /// The command as it stands in a 128-byte SQE, in native byte order.
    #[must_use]
    pub fn to_words(self) -> [u64; 4] {
        let [d0, d1, d2, d3] = self.dev_id.to_ne_bytes();
        let [q0, q1] = self.queue_id.to_ne_bytes();
        let [l0, l1] = self.len.to_ne_bytes();
        let [p0, p1] = self.dev_path_len.to_ne_bytes();
        [
            u64::from_ne_bytes([d0, d1, d2, d3, q0, q1, l0, l1]),
            self.addr,
            self.data,
            u64::from_ne_bytes([p0, p1, 0, 0, 0, 0, 0, 0]),
        ]
    }
}

/// `op_flags`: mask of the operation.
pub const IO_OP_MASK: u32 = 0xff;
/// Operation: read.
pub const IO_OP_READ: u32 = 0;
/// Operation: write.
pub const IO_OP_WRITE: u32 = 1;
/// Operation: flush.
pub const IO_OP_FLUSH: u32 = 2;
/// Operation: discard.
pub const IO_OP_DISCARD: u32 = 3;
/// Operation: write zeroes.
pub const IO_OP_WRITE_ZEROES: u32 = 5;

/// `op_flags`: give up early on device errors.
pub const IO_F_FAILFAST_DEV: u32 = 1 << 8;
/// `op_flags`: give up early on transport errors.
pub const IO_F_FAILFAST_TRANSPORT: u32 = 1 << 9;
/// `op_flags`: give up early on driver errors.
pub const IO_F_FAILFAST_DRIVER: u32 = 1 << 10;
/// `op_flags`: metadata.
pub const IO_F_META: u32 = 1 << 11;
/// `op_flags`: force unit access.
pub const IO_F_FUA: u32 = 1 << 13;
/// `op_flags`: keep the space behind zeroes.
pub const IO_F_NOUNMAP: u32 = 1 << 15;
/// `op_flags`: swap.
pub const IO_F_SWAP: u32 = 1 << 16;

/// `ParamBasic::attrs`: refuses writes.
pub const ATTR_READ_ONLY: u32 = 1 << 0;
/// `ParamBasic::attrs`: spinning disk.
pub const ATTR_ROTATIONAL: u32 = 1 << 1;
/// `ParamBasic::attrs`: flushes are needed.
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// `ParamBasic::attrs`: FUA is honoured.
pub const ATTR_FUA: u32 = 1 << 3;

/// `Params::types`: `basic` is set.
pub const PARAM_TYPE_BASIC: u32 = 1 << 0;
/// `Params::types`: `discard` is set.
pub const PARAM_TYPE_DISCARD: u32 = 1 << 1;
/// `Params::types`: `devt` is set; only ever by the driver.
pub const PARAM_TYPE_DEVT: u32 = 1 << 2;
/// `Params::types`: `zoned` is set.
pub const PARAM_TYPE_ZONED: u32 = 1 << 3;
/// `Params::types`: `dma` is set.
pub const PARAM_TYPE_DMA_ALIGN: u32 = 1 << 4;
/// `Params::types`: `seg` is set.
pub const PARAM_TYPE_SEGMENT: u32 = 1 << 5;

/// `struct ublk_param_basic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs)]
pub struct ParamBasic {
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
}
layout!(ParamBasic: 32 {
    attrs @ 0, logical_bs_shift @ 4, physical_bs_shift @ 5, io_opt_shift @ 6, io_min_shift @ 7, max_sectors @ 8,
    chunk_sectors @ 12, dev_sectors @ 16, virt_boundary_mask @ 24,
});

/// `struct ublk_param_discard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs)]
pub struct ParamDiscard {
    pub discard_alignment: u32,
    pub discard_granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_discard_segments: u16,
    pub reserved0: u16,
}
layout!(ParamDiscard: 20 {
    discard_alignment @ 0, discard_granularity @ 4, max_discard_sectors @ 8, max_write_zeroes_sectors @ 12,
    max_discard_segments @ 16,
});

/// `struct ublk_param_devt`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs)]
pub struct ParamDevt {
    pub char_major: u32,
    pub char_minor: u32,
    pub disk_major: u32,
    pub disk_minor: u32,
}
layout!(ParamDevt: 16 { char_major @ 0, char_minor @ 4, disk_major @ 8, disk_minor @ 12 });

/// `struct ublk_param_zoned`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs)]
pub struct ParamZoned {
    pub max_open_zones: u32,
    pub max_active_zones: u32,
    pub max_zone_append_sectors: u32,
    pub reserved: [u32; 5],
}
layout!(ParamZoned: 32 { max_open_zones @ 0, max_active_zones @ 4, max_zone_append_sectors @ 8 });

/// `struct ublk_param_segment`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs)]
pub struct ParamSegment {
    pub seg_boundary_mask: u64,
    pub max_segment_size: u32,
    pub max_segments: u16,
    pub pad: u16,
}
layout!(ParamSegment: 16 { seg_boundary_mask @ 0, max_segment_size @ 8, max_segments @ 12 });

/// A device's parameters (`struct ublk_params`), as far as 6.18 has them; a kernel takes any prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs)]
pub struct Params {
    pub len: u32,
    pub types: u32,
    pub basic: ParamBasic,
    pub discard: ParamDiscard,
    pub devt: ParamDevt,
    pub zoned: ParamZoned,
    pub dma_alignment: u32,
    pub dma_pad: u32,
    pub pad: u32,
    pub seg: ParamSegment,
}
layout!(Params: 136 { types @ 4, basic @ 8, discard @ 40, devt @ 60, zoned @ 76, dma_alignment @ 108, seg @ 120 });

/// Bytes from one queue's descriptors to the next in the mapping of the character device:
/// `UBLK_MAX_QUEUE_DEPTH` descriptors, rounded up to a page.
#[must_use]
pub const fn queue_map_offset(queue: u16, page: usize) -> usize {
    queue as usize * queue_map_len(MAX_QUEUE_DEPTH, page)
}

/// Length in bytes of the mapping of one queue's descriptors: the driver accepts this and no other.
#[must_use]
pub const fn queue_map_len(depth: u16, page: usize) -> usize {
    (depth as usize * size_of::<IoDesc>()).next_multiple_of(page)
}

/// Offset on the character device at which a request's data stands in user-copy mode (`UBLKSRV_IO_BUF_OFFSET`).
#[must_use]
pub const fn user_copy_offset(queue: u16, tag: u16, offset: u32) -> u64 {
    const BUFFERS: u64 = 0x8000_0000;
    BUFFERS + (((queue as u64) << 41) | ((tag as u64) << 25) | offset as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_kernels_numbers() {
        assert_eq!(CMD_GET_QUEUE_AFFINITY, 0x8020_7501);
        assert_eq!(CMD_ADD_DEV, 0xc020_7504);
        assert_eq!(CMD_GET_FEATURES, 0x8020_7513);
        assert_eq!(CMD_DEL_DEV_ASYNC, 0x8020_7514);
        assert_eq!(CMD_UPDATE_SIZE, 0xc020_7515);
        assert_eq!(IO_FETCH_REQ, 0xc010_7520);
        assert_eq!(IO_COMMIT_AND_FETCH_REQ, 0xc010_7521);
        assert_eq!(legacy(CMD_ADD_DEV), 4);
    }

    #[test]
    fn unknown_feature_bits_survive_and_are_named() {
        let features = Features::from_bits(1 << 63 | 1 << 7);
        assert_eq!((features | Features::ZONED).bits(), 1 << 63 | 1 << 7 | 1 << 8);
        assert_eq!(features.names().collect::<Vec<_>>(), ["USER_COPY", "bit 63"]);
    }

    #[test]
    fn commands_are_laid_out_as_the_structures_say() {
        let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        let io = IoCmd { q_id: 0x0102, tag: 0x0304, result: -5, addr: 0x1122_3344_5566_7788 };
        let io_bytes = bytes(&io.to_words());
        assert_eq!(io_bytes[offset_of!(IoCmd, tag)..][..2], 0x0304u16.to_ne_bytes());
        assert_eq!(io_bytes[offset_of!(IoCmd, result)..][..4], (-5i32).to_ne_bytes());
        assert_eq!(io_bytes[offset_of!(IoCmd, addr)..][..8], io.addr.to_ne_bytes());
        let ctrl =
            CtrlCmd { dev_id: 7, queue_id: 9, len: 64, addr: 1, data: 2, dev_path_len: 3, ..Default::default() };
        let ctrl_bytes = bytes(&ctrl.to_words());
        assert_eq!(ctrl_bytes.len(), size_of::<CtrlCmd>());
        assert_eq!(ctrl_bytes[offset_of!(CtrlCmd, dev_id)..][..4], 7u32.to_ne_bytes());
        assert_eq!(ctrl_bytes[offset_of!(CtrlCmd, queue_id)..][..2], 9u16.to_ne_bytes());
        assert_eq!(ctrl_bytes[offset_of!(CtrlCmd, len)..][..2], 64u16.to_ne_bytes());
        assert_eq!(ctrl_bytes[offset_of!(CtrlCmd, addr)..][..8], 1u64.to_ne_bytes());
        assert_eq!(ctrl_bytes[offset_of!(CtrlCmd, data)..][..8], 2u64.to_ne_bytes());
        assert_eq!(ctrl_bytes[offset_of!(CtrlCmd, dev_path_len)..][..2], 3u16.to_ne_bytes());
    }

    #[test]
    fn mapping_geometry_is_the_kernels() {
        assert_eq!(queue_map_offset(3, 4096), 3 * 98_304);
        assert_eq!(queue_map_len(64, 4096), 4096);
        assert_eq!(queue_map_len(171, 4096), 8192);
        assert_eq!(user_copy_offset(1, 2, 3), 0x8000_0000 + (1 << 41) + (2 << 25) + 3);
    }
}
