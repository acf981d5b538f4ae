//! Commands to the driver's control device, without libublk.
//!
//! libublk asks for a device only together with the file that its maker keeps of it. What the
//! *kernel* says of a number, whichever program made the device, is asked here.

use crate::{os, threads};
use libublk::sys;
use std::{
    fs::{File, OpenOptions},
    io,
    panic::resume_unwind,
    thread,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes, KnownLayout};

/// The driver's control device.
pub(super) const CONTROL: &str = "/dev/ublk-control";

/// What the kernel knows of a device (`struct ublksrv_ctrl_dev_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct DeviceInfo {
    queues: u16,
    depth: u16,
    pub(super) state: u16,
    pad0: u16,
    max_io: u32,
    number: u32,
    /// The process that serves it, or did last; -1 where it is stopped or was never started.
    pub(super) pid: i32,
    pad1: u32,
    flags: u64,
    /// What its maker had the kernel remember.
    pub(super) mark: u64,
    owner: [u32; 2],
    reserved: [u64; 2],
}

impl DeviceInfo {
    /// Whether it is stopped or was never started, and no process serves it.
    pub(super) fn is_idle(&self) -> bool {
        u32::from(self.state) == sys::UBLK_S_DEV_DEAD && self.pid <= 0
    }
}

/// The kernel's word for the states of a device (`UBLK_S_DEV_*`).
pub(super) fn state_name(state: u16) -> &'static str {
    match u32::from(state) {
        sys::UBLK_S_DEV_DEAD => "stopped",
        sys::UBLK_S_DEV_LIVE => "live",
        sys::UBLK_S_DEV_QUIESCED => "waits for a daemon",
        _ => "fails requests",
    }
}

fn control() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(CONTROL)
}

/// Sends a command. Kernels before 6.4 know those of old by their plain number only, and say "no
/// such device" to others.
fn send(op: u32, number: u32, buf: &mut [u8]) -> io::Result<()> {
    let control = control()?;
    let plain = op & 0xff;
    match send_apart(&control, op, number, buf) {
        Err(first) if plain <= sys::UBLK_CMD_GET_DEV_INFO2 => {
            match send_apart(&control, plain, number, buf) {
                // A newer kernel may have been built without the plain ones.
                Err(second) if second.raw_os_error() == Some(libc::EOPNOTSUPP) => Err(first),
                other => other,
            }
        }
        other => other,
    }
}

/// By a thread of its own: the kernel's worker for the command ends with that. Those of the caller
/// would stay, and do what it asks of the kernel later. A daemon's would be without what it has made
/// sure of meanwhile, that it never waits for its own device.
fn send_apart(control: &File, op: u32, number: u32, buf: &mut [u8]) -> io::Result<()> {
    thread::scope(|scope| {
        let sending = threads::named("command").spawn_scoped(scope, || os::ublk_command(control, op, number, buf))?;
        sending.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// What the kernel knows of the device with this number.
pub(super) fn info(number: u32) -> io::Result<DeviceInfo> {
    let mut info = DeviceInfo::new_zeroed();
    send(sys::UBLK_U_CMD_GET_DEV_INFO, number, info.as_mut_bytes())?;
    Ok(info)
}

/// What the driver can do (Linux 6.5; none of it before).
pub(super) fn features() -> u64 {
    let mut features = 0u64;
    let asked = send(sys::UBLK_U_CMD_GET_FEATURES, u32::MAX, features.as_mut_bytes());
    asked.map_or(0, |()| features)
}

/// STOP_DEV: requests in flight end, the queues go down.
pub(super) fn stop(number: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_STOP_DEV, number, &mut [])
}

/// TRY_STOP_DEV (Linux 7.0): the same where nobody has the device open, else "busy".
pub(super) fn try_stop(number: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_TRY_STOP_DEV, number, &mut [])
}

/// START_USER_RECOVERY: "busy" as long as the kernel has not noticed that the daemon before has
/// ended.
pub(super) fn start_recovery(number: u32) -> io::Result<()> {
    send(sys::UBLK_U_CMD_START_USER_RECOVERY, number, &mut [])
}

/// DEL_DEV. The plain one waits in the kernel for the last opener, for ever if that is a mount;
/// kernels before 6.9 know only that, and nothing else is a reason to wait.
pub(super) fn delete(number: u32) -> io::Result<()> {
    match send(sys::UBLK_U_CMD_DEL_DEV_ASYNC, number, &mut []) {
        Err(e) if is_unknown(e.raw_os_error().unwrap_or(0), || info(number).is_ok()) => {
            send(sys::UBLK_U_CMD_DEL_DEV, number, &mut [])
        }
        done => done,
    }
}

/// Whether an error says that the driver does not know a command: its versions have several words
/// for it. One is "no such device", which is true where there is none.
fn is_unknown(errno: i32, is_there: impl FnOnce() -> bool) -> bool {
    /// The kernel's own, which is in no header for programs.
    const ENOTSUPP: i32 = 524;
    match errno {
        libc::EOPNOTSUPP | ENOTSUPP | libc::EINVAL => true,
        libc::ENODEV => is_there(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_is_not_one_that_is_unknown() {
        for errno in [libc::EOPNOTSUPP, 524, libc::EINVAL] {
            assert!(is_unknown(errno, || false), "{errno}");
        }
        assert!(is_unknown(libc::ENODEV, || true) && !is_unknown(libc::ENODEV, || false));
        for errno in [libc::EPERM, libc::EINTR, libc::EBUSY, libc::ENOMEM, 0] {
            assert!(!is_unknown(errno, || true), "{errno}");
        }
    }

    #[test]
    fn the_kernels_struct_has_this_shape() {
        assert_eq!(size_of::<DeviceInfo>(), size_of::<sys::ublksrv_ctrl_dev_info>());
        assert_eq!(
            std::mem::offset_of!(DeviceInfo, pid),
            std::mem::offset_of!(sys::ublksrv_ctrl_dev_info, ublksrv_pid)
        );
        let mark = std::mem::offset_of!(sys::ublksrv_ctrl_dev_info, ublksrv_flags);
        assert_eq!(std::mem::offset_of!(DeviceInfo, mark), mark);
    }
}
