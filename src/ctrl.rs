//! The control device: one method per command.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::ring::command::{CommandRing, Outcome};
use crate::sys::ublk::{self, CtrlCmd, DevInfo, Features, Params, Plain};

/// How long a command that has nothing to wait for may take.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// What state a device is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// No block device: not started yet, stopped, or its server died.
    Dead,
    /// Started and served.
    Live,
    /// The server is gone; I/O waits for a new one.
    Quiesced,
    /// The server is gone; I/O fails until there is a new one.
    FailIo,
    /// A state that this library does not know.
    Unknown(u16),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dead => f.write_str("DEAD"),
            Self::Live => f.write_str("LIVE"),
            Self::Quiesced => f.write_str("QUIESCED"),
            Self::FailIo => f.write_str("FAIL_IO"),
            Self::Unknown(number) => write!(f, "state {number}"),
        }
    }
}

/// A device as the driver describes it.
#[derive(Clone, Copy)]
pub struct DeviceInfo(DevInfo);

impl DeviceInfo {
    /// The device's id: the N of `/dev/ublkbN` and `/dev/ublkcN`.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.0.dev_id
    }

    /// Number of queues, as granted.
    #[must_use]
    pub const fn queues(&self) -> u16 {
        self.0.nr_hw_queues
    }

    /// Tags per queue, as granted.
    #[must_use]
    pub const fn depth(&self) -> u16 {
        self.0.queue_depth
    }

    /// Largest request in bytes, as granted.
    #[must_use]
    pub const fn max_io_bytes(&self) -> u32 {
        self.0.max_io_buf_bytes
    }

    /// The state.
    #[must_use]
    pub const fn state(&self) -> State {
        match self.0.state {
            ublk::STATE_DEAD => State::Dead,
            ublk::STATE_LIVE => State::Live,
            ublk::STATE_QUIESCED => State::Quiesced,
            ublk::STATE_FAIL_IO => State::FailIo,
            other => State::Unknown(other),
        }
    }

    /// The server's process id as the driver tells it: since Linux 6.18 as seen from the caller's pid namespace and -1
    /// when the server is gone; before that, the number that the server gave of itself.
    #[must_use]
    pub const fn server_pid(&self) -> i32 {
        self.0.ublksrv_pid
    }

    /// The device's features, unknown bits included.
    #[must_use]
    pub const fn features(&self) -> Features {
        Features::from_bits(self.0.flags)
    }

    /// Path of the block device.
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        block_path(self.id())
    }

    /// Path of the character device.
    #[must_use]
    pub fn character_path(&self) -> PathBuf {
        character_path(self.id())
    }

    /// The driver's own structure.
    #[must_use]
    pub const fn raw(&self) -> DevInfo {
        self.0
    }
}

impl fmt::Debug for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceInfo")
            .field("id", &self.id())
            .field("state", &self.state())
            .field("queues", &self.queues())
            .field("depth", &self.depth())
            .field("max_io_bytes", &self.max_io_bytes())
            .field("server_pid", &self.server_pid())
            .field("features", &self.features())
            .finish()
    }
}

/// Path of a device's block node.
#[must_use]
pub fn block_path(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

/// Path of a device's character node.
#[must_use]
pub fn character_path(id: u32) -> PathBuf {
    format!("/dev/ublkc{id}").into()
}

/// What ADD_DEV is asked for.
#[derive(Clone, Copy, Debug)]
pub struct AddDevice {
    /// The id, or `None` for any free one.
    pub id: Option<u32>,
    /// Queues, 1 to 4096; the driver grants at most one per CPU.
    pub queues: u16,
    /// Tags per queue, 1 to 4096.
    pub depth: u16,
    /// Largest request in bytes.
    pub max_io_bytes: u32,
    /// Features to ask for.
    pub features: Features,
}

/// How commands are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// As ioctl numbers, since Linux 6.4.
    Ioctl,
    /// By their bare number.
    Legacy,
}

/// The control device. Any thread may use it; commands of several threads run side by side.
///
/// Every command has a deadline, and keeps the kernel's errno in its error.
#[derive(Debug)]
pub struct Controller {
    control: File,
    encoding: Encoding,
    features: Features,
    /// Rings that no command is using: one, unless several commands ran at once.
    idle: Mutex<Vec<CommandRing>>,
}

impl Controller {
    /// Opens `/dev/ublk-control` and asks the driver what it can do.
    ///
    /// # Errors
    /// [`ErrorKind::DriverMissing`] without `ublk_drv`, [`ErrorKind::PermissionDenied`] without root, or what the kernel
    /// says.
    pub fn open() -> Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(ublk::CONTROL_PATH).map_err(|error| {
            let what = format_args!("open {}", ublk::CONTROL_PATH);
            let plain = Error::io(&error, what);
            match plain.kind() {
                ErrorKind::NotFound => {
                    let hint = format!(
                        "{plain}: ublk_drv is not loaded: run `modprobe ublk_drv` (Linux 6.0 or later built with \
                         CONFIG_BLK_DEV_UBLK; on Ubuntu it is in linux-modules-extra-$(uname -r))"
                    );
                    plain.with_message(hint).with_kind(ErrorKind::DriverMissing)
                }
                ErrorKind::PermissionDenied => {
                    let hint = format!("{plain}: ublk needs CAP_SYS_ADMIN: run as root");
                    plain.with_message(hint)
                }
                _ => plain,
            }
        })?;
        let mut this = Self { control, encoding: Encoding::Ioctl, features: Features::NONE, idle: Mutex::default() };
        let payload = vec![0; size_of::<u64>()].into_boxed_slice();
        match this.run("ask for the driver's features", ublk::CMD_GET_FEATURES, CtrlCmd::default(), payload) {
            Ok((_, payload)) => {
                let mut bits = [0; size_of::<u64>()];
                bits.copy_from_slice(&payload[..size_of::<u64>()]);
                this.features = Features::from_bits(u64::from_ne_bytes(bits));
            }
            // Before 6.5 there is no such command, and before 6.4 no such numbering: the bare numbers work on both.
            Err(error) if error.kind() == ErrorKind::Unsupported => this.encoding = Encoding::Legacy,
            Err(error) => return Err(error),
        }
        Ok(this)
    }

    /// What the driver can do; nothing on kernels before 6.5, which cannot say.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// Creates a device (`UBLK_U_CMD_ADD_DEV`). What the driver granted is in the answer and may be less than asked.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] (`EEXIST`) when the id is taken, [`ErrorKind::PermissionDenied`], or what the kernel says.
    pub fn add(&self, add: &AddDevice) -> Result<DeviceInfo> {
        let id = add.id.unwrap_or(ublk::ANY_ID);
        // Everything else, the state and the pid among it, must be zero: 6.18 takes a state from here for real.
        let info = DevInfo {
            nr_hw_queues: add.queues,
            queue_depth: add.depth,
            max_io_buf_bytes: add.max_io_bytes,
            dev_id: id,
            flags: (add.features | Features::CMD_IOCTL_ENCODE).bits(),
            ..DevInfo::default()
        };
        let command = CtrlCmd { dev_id: id, queue_id: u16::MAX, ..CtrlCmd::default() };
        let (_, payload) =
            self.run("add a ublk device", ublk::CMD_ADD_DEV, command, info.to_boxed_bytes()).map_err(explain_add)?;
        Ok(DeviceInfo(DevInfo::from_byte_prefix(&payload)))
    }

    /// Starts a device (`UBLK_U_CMD_START_DEV`), waiting until every tag has been fetched.
    ///
    /// `called_off` is asked every 20 ms; once it says yes the command is cancelled.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] at the deadline or when called off; [`ErrorKind::Kernel`] (`EINVAL`) for parameters that
    /// the block layer refuses; or what the kernel says.
    pub fn start(&self, id: u32, server_pid: u32, deadline: Duration, called_off: &dyn Fn() -> bool) -> Result<()> {
        let command = CtrlCmd { data: u64::from(server_pid), ..device_command(id) };
        self.run_bounded("start", ublk::CMD_START_DEV, command, Box::default(), deadline, called_off).map(drop)
    }

    /// Stops a device (`UBLK_U_CMD_STOP_DEV`): the kernel writes back dirty pages through the server, waits for I/O in
    /// flight, and removes the block device. Must not be called from a thread that serves one of its queues.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::NotFound`], or what the kernel says.
    pub fn stop(&self, id: u32, deadline: Duration) -> Result<()> {
        self.simple("stop", ublk::CMD_STOP_DEV, id, deadline)
    }

    /// Deletes a device (`UBLK_U_CMD_DEL_DEV`) and waits until its id is free, that is, until nobody has either of its
    /// nodes open.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when somebody still holds it; it then goes when they let go. [`ErrorKind::NotFound`].
    pub fn delete(&self, id: u32, deadline: Duration) -> Result<()> {
        self.simple("delete", ublk::CMD_DEL_DEV, id, deadline)
    }

    /// Deletes a device without waiting for whoever holds it (`UBLK_U_CMD_DEL_DEV_ASYNC`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what the kernel says.
    pub fn delete_async(&self, id: u32) -> Result<()> {
        self.simple("delete", ublk::CMD_DEL_DEV_ASYNC, id, COMMAND_DEADLINE)
    }

    /// Describes a device (`UBLK_U_CMD_GET_DEV_INFO`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none with this id.
    pub fn get_dev_info(&self, id: u32) -> Result<DeviceInfo> {
        let payload = DevInfo::default().to_boxed_bytes();
        let (_, payload) =
            self.run(&format!("describe device {id}"), ublk::CMD_GET_DEV_INFO, device_command(id), payload)?;
        Ok(DeviceInfo(DevInfo::from_byte_prefix(&payload)))
    }

    /// As [`get_dev_info`](Self::get_dev_info), permitted by the character node's own permissions
    /// (`UBLK_U_CMD_GET_DEV_INFO2`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`].
    pub fn get_dev_info2(&self, id: u32) -> Result<DeviceInfo> {
        let path = character_path(id).into_os_string().into_encoded_bytes();
        let path_len = path.len() + 1;
        let mut payload = path;
        payload.push(0);
        payload.extend_from_slice(&DevInfo::default().to_boxed_bytes());
        let command = CtrlCmd { dev_path_len: path_len as u16, ..device_command(id) };
        let (_, payload) =
            self.run(&format!("describe device {id}"), ublk::CMD_GET_DEV_INFO2, command, payload.into())?;
        Ok(DeviceInfo(DevInfo::from_byte_prefix(&payload[path_len..])))
    }

    /// Sets a device's parameters (`UBLK_U_CMD_SET_PARAMS`), before it is started.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`] (`EINVAL`) for parameters that the driver refuses.
    pub fn set_params(&self, id: u32, params: &Params) -> Result<()> {
        let params = Params { len: size_of::<Params>() as u32, ..*params };
        let what = format!("set the parameters of device {id}");
        self.run(&what, ublk::CMD_SET_PARAMS, device_command(id), params.to_boxed_bytes()).map(drop)
    }

    /// A device's parameters (`UBLK_U_CMD_GET_PARAMS`). The driver adds `PARAM_TYPE_DEVT` to the types: mask it out
    /// before setting them again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn get_params(&self, id: u32) -> Result<Params> {
        let params = Params { len: size_of::<Params>() as u32, ..Params::default() };
        let what = format!("get the parameters of device {id}");
        let (_, payload) = self.run(&what, ublk::CMD_GET_PARAMS, device_command(id), params.to_boxed_bytes())?;
        Ok(Params::from_byte_prefix(&payload))
    }

    /// The CPUs whose I/O comes through a queue (`UBLK_U_CMD_GET_QUEUE_AFFINITY`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Kernel`] (`EINVAL`) when there is no such queue.
    pub fn get_queue_affinity(&self, id: u32, queue: u16) -> Result<Vec<usize>> {
        // Room for 8192 CPUs, the most that Linux is built for on any machine.
        const MASK_BYTES: usize = 1024;
        let command = CtrlCmd { data: u64::from(queue), ..device_command(id) };
        let what = format!("get the affinity of queue {queue} of device {id}");
        let payload = vec![0; MASK_BYTES].into_boxed_slice();
        let (_, payload) = self.run(&what, ublk::CMD_GET_QUEUE_AFFINITY, command, payload)?;
        let mut cpus = Vec::new();
        for (word, bytes) in payload.chunks_exact(size_of::<usize>()).enumerate() {
            // The mask is an array of native longs.
            let mut native = [0; size_of::<usize>()];
            native.copy_from_slice(bytes);
            let bits = usize::from_ne_bytes(native);
            cpus.extend(
                (0..usize::BITS as usize)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| word * usize::BITS as usize + bit),
            );
        }
        Ok(cpus)
    }

    /// The control device itself.
    #[cfg(feature = "raw")]
    pub(crate) fn control(&self) -> &File {
        &self.control
    }

    fn simple(&self, verb: &str, operation: u32, id: u32, deadline: Duration) -> Result<()> {
        self.run_bounded(verb, operation, device_command(id), Box::default(), deadline, &|| false).map(drop)
    }

    fn run_bounded(
        &self,
        verb: &str,
        operation: u32,
        command: CtrlCmd,
        payload: Box<[u8]>,
        deadline: Duration,
        called_off: &dyn Fn() -> bool,
    ) -> Result<(i32, Box<[u8]>)> {
        let what = format!("{verb} device {}", command.dev_id);
        self.run_until(&what, operation, command, payload, deadline, called_off)
    }

    fn run(&self, what: &str, operation: u32, command: CtrlCmd, payload: Box<[u8]>) -> Result<(i32, Box<[u8]>)> {
        self.run_until(what, operation, command, payload, COMMAND_DEADLINE, &|| false)
    }

    fn run_until(
        &self,
        what: &str,
        operation: u32,
        command: CtrlCmd,
        payload: Box<[u8]>,
        deadline: Duration,
        called_off: &dyn Fn() -> bool,
    ) -> Result<(i32, Box<[u8]>)> {
        let operation = match self.encoding {
            Encoding::Ioctl => operation,
            Encoding::Legacy => ublk::legacy(operation),
        };
        let idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        let ring = match idle {
            Some(ring) => ring,
            None => CommandRing::new().map_err(|error| explain_ring(&error))?,
        };
        let (outcome, ring) = ring
            .run(&self.control, operation, command, payload, Instant::now() + deadline, called_off)
            .map_err(|error| Error::io(&error, what))?;
        if let Some(ring) = ring {
            self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(ring);
        }
        match outcome {
            Outcome::Answered(result, payload) if result >= 0 => Ok((result, payload)),
            // A command that finished while it was being called off is finished.
            Outcome::CalledOff(result) if result >= 0 => Ok((result, Box::default())),
            Outcome::Answered(result, _) => Err(Error::kernel(Errno::from_raw(-result), what)),
            Outcome::CalledOff(_) => Err(Error::new(
                ErrorKind::TimedOut,
                format!("{what}: not done within {deadline:?}; the command was cancelled"),
            )),
            Outcome::Stuck => Err(Error::new(
                ErrorKind::TimedOut,
                format!("{what}: not done within {deadline:?}, and the kernel does not let the command be cancelled"),
            )),
        }
    }
}

fn device_command(id: u32) -> CtrlCmd {
    CtrlCmd { dev_id: id, queue_id: u16::MAX, ..CtrlCmd::default() }
}

fn explain_add(error: Error) -> Error {
    let hint = match error.errno().map(Errno::from_raw) {
        Some(Errno::EACCES) => {
            let limit = std::fs::read_to_string("/sys/module/ublk_drv/parameters/ublks_max").unwrap_or_default();
            format!(
                "{error}: the driver's limit of devices (ublks_max = {}) is reached: delete devices that nobody serves, \
                 or raise /sys/module/ublk_drv/parameters/ublks_max",
                limit.trim()
            )
        }
        Some(Errno::EPERM) => format!("{error}: adding a ublk device needs CAP_SYS_ADMIN: run as root"),
        Some(Errno::EEXIST) => format!("{error}: a device with this id exists: choose another, or none for any"),
        _ => return error,
    };
    error.with_message(hint)
}

pub(crate) fn explain_ring(error: &io::Error) -> Error {
    let plain = Error::io(error, "set up an io_uring");
    let hint = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => {
            "io_uring is switched off here (sysctl kernel.io_uring_disabled, or a container's seccomp)"
        }
        Some(Errno::ENOSYS) => "this kernel is built without io_uring",
        Some(Errno::ENOMEM) => "the locked-memory limit is too low: raise it (ulimit -l)",
        Some(Errno::EMFILE) => "this process has too many open files: raise the limit (ulimit -n)",
        _ => return plain,
    };
    let message = format!("{plain}: {hint}");
    plain.with_message(message)
}
