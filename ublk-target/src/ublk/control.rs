//! Making, starting, stopping and deleting ublk devices.

use super::{
    command::{self, CONTROL, DeviceInfo},
    disk_size::follow_size,
    failed::failure,
    mark::Mark,
    queue,
    run_folder::{make_way, run_file},
    shared::Shared,
    transfer::is_asked,
};
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    wait::LONGEST,
};
use libublk::{
    UblkFlags,
    ctrl::{UblkCtrl, UblkCtrlBuilder},
    io::UblkDev,
    sys,
};
use std::{
    fs, io,
    os::fd::RawFd,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::BlockTarget;

/// The name that the device carries among ublk devices.
const TARGET_NAME: &str = "integrity";
/// Largest discard and write-zeroes request, in sectors: 1 GiB. It costs one log entry,
/// whatever its length.
const MAX_ZEROES_SECTORS: u32 = 1 << 21;
/// What is being done when a device gets a new daemon.
const TAKE_OVER: &str = "can't take the device over";
/// Between two looks whether the kernel has noticed that the daemon before has ended.
const PAUSE: Duration = Duration::from_millis(5);

/// What the kernel is told about a device.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Its number; the next free one where `None`.
    pub number: Option<u32>,
    /// Queues.
    pub queues: u16,
    /// Threads of each queue.
    pub threads: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// Slots of each thread in the write-back file.
    pub write_back: u16,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// Usable bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether discards are offered.
    pub discard: bool,
    /// Whether a write may ask to be durable by itself (FUA). Where not, the kernel sends a flush after it.
    pub fua: bool,
    /// Whether the device waits for a new daemon when this one dies.
    pub recovery: bool,
    /// What the kernel shall remember it by.
    pub mark: Option<Mark>,
}

/// A device that has been added, not yet started; or one that waits for a daemon.
pub struct Device {
    ctrl: UblkCtrl,
    shape: Shape,
    /// One that waits for a daemon: requests are in it.
    recovers: bool,
    /// What becomes of it when this is dropped. A device that waits is kept until it has been
    /// served: its next daemon may fare better.
    keep: AtomicBool,
}

impl Device {
    /// Adds a new device.
    pub fn add(shape: Shape) -> Outcome<Self> {
        let ctrl = builder(&shape)
            .id(shape.number.map_or(-1, |n| n as i32))
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
            .build()
            .map_err(|e| failure("the kernel refuses to add a ublk device", &e))?;
        let device = Self { ctrl, shape, recovers: false, keep: AtomicBool::new(false) };
        // What lies there is of a device that is gone, or nobody's.
        make_way(device.number(), true)?;
        Ok(device)
    }

    /// Device `number`, whose daemon is dead. Nothing happens to it before [`run`](Self::run).
    pub fn recover(number: u32, shape: Shape) -> Outcome<Self> {
        make_way(number, false)?;
        let ctrl = builder(&shape)
            .id(number as i32)
            .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
            .build()
            .map_err(|e| failure(TAKE_OVER, &e))?;
        Ok(Self { ctrl, shape, recovers: true, keep: AtomicBool::new(true) })
    }

    fn begin_recovery(&self) -> Outcome {
        let begun = Instant::now();
        loop {
            match command::start_recovery(self.number()) {
                // libublk would look ten times a second, and requests wait.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < LONGEST => thread::sleep(PAUSE),
                // Begun already, by a daemon that went no further.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                done => return done.doing(TAKE_OVER),
            }
        }
    }

    /// The device's number.
    pub fn number(&self) -> u32 {
        self.ctrl.dev_info().dev_id
    }

    /// Whether there was to be write-back and can't be: the next request would be fetched over the
    /// bytes of an admitted write. So it is on Linux before 6.5, and with a device whose first
    /// daemon did not ask for anything else.
    pub fn lacks_write_back(&self) -> bool {
        self.shape.write_back > 0 && !is_asked(self.ctrl.dev_info().flags)
    }

    /// Starts the device, calls `live`, with whether it is as large as the volume, and serves requests until it is stopped. `fds` get
    /// registered in each queue's ring from number 1 on.
    pub fn run<T: BlockTarget + 'static>(
        &self,
        fds: &[RawFd],
        shared: &Arc<Shared<T>>,
        live: impl FnOnce(Outcome) + Send + Sync + 'static,
    ) -> Outcome {
        if self.recovers {
            self.begin_recovery()?;
        }
        let for_queues = Arc::clone(shared);
        let (number, size) = (self.number(), self.shape.size);
        self.ctrl
            .run_target(
                |device| {
                    describe(device, &self.shape, fds, shared.shift.0);
                    Ok(())
                },
                move |id, device| queue::run(id, device, &for_queues),
                move |ctrl| live(follow_size(ctrl, number, size)),
            )
            .map_err(|e| failure("can't start the device", &e))?;
        self.keep.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.keep.load(Ordering::SeqCst) {
            // libublk would delete only what it has added, and wait for the last opener; and it
            // would do so once more when the number may be another's.
            self.ctrl.disown();
            // It may be another's already, where some tool has deleted ours. A device of an older
            // version bears no mark.
            let proof = Proof { number: self.number(), mark: self.shape.mark, pid: process::id() };
            if self.shape.mark.is_none() || proof.ours().is_ok() {
                delete_stopped(self.number());
            }
        }
    }
}

fn builder(shape: &Shape) -> UblkCtrlBuilder<'static> {
    let recovery = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;
    let mut flags = if shape.recovery { recovery } else { 0 };
    if shape.write_back > 0 {
        // A kernel that does not know it leaves it out.
        flags |= sys::UBLK_F_USER_COPY;
    }
    UblkCtrlBuilder::default()
        .name(TARGET_NAME)
        .nr_queues(shape.queues)
        .io_threads_per_queue(shape.threads)
        .depth(shape.depth)
        .io_buf_bytes(shape.max_io)
        .ctrl_flags(flags.into())
        .ctrl_target_flags(shape.mark.map_or(0, |mark| mark.0))
}

fn describe(device: &mut UblkDev, shape: &Shape, fds: &[RawFd], block_shift: u32) {
    device.set_default_params(shape.size);
    let target = &mut device.tgt;
    let basic = &mut target.params.basic;
    basic.attrs = sys::UBLK_ATTR_VOLATILE_CACHE;
    if shape.fua {
        basic.attrs |= sys::UBLK_ATTR_FUA;
    }
    if shape.read_only {
        basic.attrs |= sys::UBLK_ATTR_READ_ONLY;
    }
    basic.logical_bs_shift = block_shift as u8;
    basic.physical_bs_shift = block_shift as u8;
    basic.io_min_shift = block_shift as u8;
    basic.io_opt_shift = 0;
    if !shape.read_only {
        target.params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        target.params.discard = sys::ublk_param_discard {
            discard_granularity: 1 << block_shift,
            max_discard_sectors: if shape.discard { MAX_ZEROES_SECTORS } else { 0 },
            max_write_zeroes_sectors: MAX_ZEROES_SECTORS,
            max_discard_segments: 1,
            ..Default::default()
        };
    }
    for (i, fd) in fds.iter().enumerate() {
        target.fds[i + 1] = *fd;
    }
    target.nr_fds = fds.len() as i32 + 1;
    // A request is several operations of ours beside its fetch command.
    let requests = shape.depth.saturating_add(shape.write_back);
    target.sq_depth = (requests.saturating_mul(4)).clamp(64, 4096);
    target.cq_depth = (requests.saturating_mul(8)).clamp(128, 8192);
}

/// Says what to do where the kernel has no ublk.
pub fn need_driver() -> Outcome {
    if Path::new(CONTROL).exists() {
        return Ok(());
    }
    let message = format!(
        "this kernel has no ublk ({CONTROL} is missing): `modprobe ublk_drv` as root; it needs Linux 6.1 or later with CONFIG_BLK_DEV_UBLK"
    );
    Err(Failure::new(Exit::Device, message))
}

/// The block device's path.
pub fn block_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

/// Whether the kernel knows a ublk device of this number.
pub fn exists(number: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{number}")).exists()
        || Path::new(&format!("/dev/ublkc{number}")).exists()
}

/// What the kernel says of a device of ours, by its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// There is no device of this number.
    Nobodys,
    /// It is the one that we have made.
    Ours,
    /// It is not; this process serves it, or did last, where the kernel knows one.
    Anothers(Option<u32>),
}

/// What proves that the kernel's device of a number is the one that we have made. Without it
/// nothing is stopped or deleted.
#[derive(Clone, Copy, Debug)]
pub struct Proof {
    /// Its number, which may go to another.
    pub number: u32,
    /// What the kernel remembers it by.
    pub mark: Option<Mark>,
    /// The daemon that serves it, or did last.
    pub pid: u32,
}

impl Proof {
    /// Whose the device is. What can't be asked is an error: never "ours".
    pub fn whose(self) -> Outcome<Whose> {
        let number = self.number;
        if !exists(number) {
            return Ok(Whose::Nobodys);
        }
        match command::info(number) {
            Ok(info) => Ok(judge(&info, self.mark, self.pid)),
            Err(_) if !exists(number) => Ok(Whose::Nobodys),
            Err(e) => Err(Failure::io(format_args!("can't ask the kernel about /dev/ublkb{number}"), &e)),
        }
    }

    /// Fails unless it is ours.
    pub fn ours(self) -> Outcome {
        let number = self.number;
        match self.whose()? {
            Whose::Ours => Ok(()),
            Whose::Nobodys => Err(Failure::new(Exit::Device, format_args!("/dev/ublkb{number} is gone"))),
            Whose::Anothers(pid) => {
                let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                let message = format!("/dev/ublkb{number} is another program's by now{who}; nothing done");
                Err(Failure::new(Exit::Device, message))
            }
        }
    }

    /// Stops the device: requests in flight end, its queues go down. The daemon, if it lives,
    /// deletes it.
    pub fn stop(self) -> Outcome {
        self.ours()?;
        command::stop(self.number).doing(format_args!("can't stop /dev/ublkb{}", self.number))
    }

    /// Stops the device if nobody has it open: the kernel decides, in one step. "Busy" where
    /// somebody has; `None` where the kernel does not offer it (before Linux 7.0).
    pub fn stop_unused(self) -> Option<Outcome> {
        if command::features() & u64::from(sys::UBLK_F_SAFE_STOP_DEV) == 0 {
            return None;
        }
        let stop = || command::try_stop(self.number).doing(format_args!("can't stop /dev/ublkb{}", self.number));
        Some(self.ours().and_then(|()| stop()))
    }

    /// Asks the kernel to delete a device that has no daemon. One that is gone already is fine.
    pub fn delete(self) {
        if self.ours().is_ok() {
            // Whatever fails here fails because the device is going.
            let _ = command::stop(self.number);
            delete_stopped(self.number);
        }
    }
}

/// The mark is the proof. A device without one is an older version's, and ours only if the kernel
/// names our daemon.
fn judge(info: &DeviceInfo, mark: Option<Mark>, pid: u32) -> Whose {
    let serves = u32::try_from(info.pid).ok().filter(|pid| *pid > 0);
    let ours = match mark {
        Some(mark) => info.mark == mark.0,
        None => info.mark == 0 && serves == Some(pid),
    };
    if ours { Whose::Ours } else { Whose::Anothers(serves) }
}

/// What the kernel calls the state that a device is in; `None` where it can't be asked.
pub fn kernel_state(number: u32) -> Option<&'static str> {
    command::info(number).ok().map(|info| command::state_name(info.state))
}

/// Deletes the device that bears this mark, if there is one, which must never have been started.
pub fn delete_marked(mark: Mark) -> io::Result<()> {
    let entries = fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok());
    for number in numbers {
        match command::info(number) {
            // Of one that was started, or that somebody serves, nobody has died before that was
            // written down.
            Ok(info) if info.mark == mark.0 && info.is_idle() => {
                delete_stopped(number);
                return Ok(());
            }
            Ok(_) => {}
            Err(_) if !exists(number) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// libublk's file goes first: as long as there is the device the number is nobody else's.
fn delete_stopped(number: u32) {
    let _ = fs::remove_file(run_file(number));
    let _ = command::delete(number);
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    fn device(pid: i32, mark: u64) -> DeviceInfo {
        let mut info = DeviceInfo::new_zeroed();
        (info.pid, info.mark) = (pid, mark);
        info
    }

    #[test]
    fn ours_is_what_bears_our_mark_whoever_serves_it() {
        let mark = Some(Mark(7));
        for pid in [-1, 0, 100, 200] {
            assert_eq!(judge(&device(pid, 7), mark, 100), Whose::Ours);
        }
        assert_eq!(
            judge(&device(100, 8), mark, 100),
            Whose::Anothers(Some(100)),
            "the number of a process comes again"
        );
        assert_eq!(judge(&device(-1, 0), mark, 100), Whose::Anothers(None), "nobody serves it: that proves nothing");
    }

    #[test]
    fn an_older_versions_device_is_ours_by_its_daemon_alone() {
        assert_eq!(judge(&device(100, 0), None, 100), Whose::Ours);
        assert_eq!(judge(&device(200, 0), None, 100), Whose::Anothers(Some(200)));
        assert_eq!(judge(&device(-1, 0), None, 100), Whose::Anothers(None));
        assert_eq!(judge(&device(100, 5), None, 100), Whose::Anothers(Some(100)), "somebody's who marks his");
    }
}
