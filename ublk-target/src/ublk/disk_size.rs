//! How large the kernel takes a device to be.

use super::failed::failure;
use crate::failure::Outcome;
use libublk::ctrl::UblkCtrl;
use std::fs;

/// Has the kernel know the size of a volume that grew since the device was made. One that is live has
/// a disk: before Linux 7.0 the kernel would not ask.
pub(super) fn follow_size(ctrl: &UblkCtrl, number: u32, size: u64) -> Outcome {
    match disk_size(number) {
        Some(now) if now < size => ctrl.update_size(size).map(drop).map_err(|e| {
            let what = format!(
                "/dev/ublkb{number} keeps its {now} bytes, its volume has {size} (Linux 6.16 resizes devices in use): `del` and `add` make one of that size"
            );
            failure(&what, &e)
        }),
        _ => Ok(()),
    }
}

/// Bytes of a block device, as the kernel has it.
pub fn disk_size(number: u32) -> Option<u64> {
    const SECTOR: u64 = 512;
    let sectors = fs::read_to_string(format!("/sys/block/ublkb{number}/size")).ok()?;
    sectors.trim_end().parse::<u64>().ok()?.checked_mul(SECTOR)
}
