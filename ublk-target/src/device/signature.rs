//! What a device already holds, so that `format` does not destroy it unasked, and leaves nothing of
//! it when asked.
//!
//! File systems, partition tables, RAID members and the like are found by util-linux's own
//! `wipefs`, at the end of a device too: whatever `blkid` would find. It is called rather than
//! linked: it is there on every system with block devices, and its findings stay as new as the
//! system. What it does not look for, volumes of ours and images of disks, is known here.

use crate::failure::{Context, Exit, Failure, Outcome};
use nix::unistd::{Whence, lseek};
use serde::Deserialize;
use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    process::{Command, Stdio},
};
use ublk_integrity::create::{self, VolumeInfo};

/// Of a regular file, what lies in so many bytes at either end counts as somebody's, whatever it is.
const EDGE: u64 = 1 << 20;
/// Bytes between them that are looked through for more, holes not counted: a file that is all zeros
/// takes no longer than that.
const LOOKED_THROUGH: u64 = 64 << 20;
/// What is zeroed around a signature: whole pages.
const PAGE: u64 = 4096;

/// Something that a device holds.
#[derive(PartialEq, Eq, Debug)]
pub struct Found {
    what: String,
    offset: u64,
    len: u64,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.what, self.offset)
    }
}

/// Images of disks, by the bytes at an offset from the start, or from the end where that is negative.
const IMAGES: &[(i64, &[u8], &str)] = &[
    (0, b"QFI\xfb", "qcow2 image"),
    (0, b"QED\0", "QED image"),
    (0, b"KDMV", "VMDK image"),
    (0, b"COWD", "VMDK image"),
    (0, b"# Disk DescriptorFile", "VMDK descriptor"),
    (0, b"vhdxfile", "VHDX image"),
    (0, b"conectix", "VHD image"),
    (-512, b"conectix", "VHD image"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI image"),
    (0, b"WithoutFreeSpace", "Parallels image"),
    (0, b"WithouFreSpacExt", "Parallels image"),
];

/// All that the device seems to hold, in order of place.
pub fn find(device: &File, size: u64) -> Outcome<Vec<Found>> {
    let mut found = probed(device)?;
    let what = "can't read it";
    found.extend(ours(device).doing(what)?);
    found.extend(images(device, size).doing(what)?);
    if found.is_empty() && device.metadata().doing(what)?.is_file() {
        found.extend(anything(device, size).doing(what)?);
    }
    found.sort_by_key(|found| found.offset);
    Ok(found)
}

/// The same, and of a regular file whatever lies between its ends, where there is nothing else: in
/// so much of it as is looked at.
pub fn find_content(device: &File, size: u64) -> Outcome<Vec<Found>> {
    let mut found = find(device, size)?;
    let what = "can't read it";
    if found.is_empty() && device.metadata().doing(what)?.is_file() {
        found.extend(between_holes(device, size).doing(what)?);
    }
    Ok(found)
}

/// Zeroes it all, and both ends of the device, for there may be what nobody knows; durable.
pub fn wipe(device: &File, size: u64, found: &[Found]) -> io::Result<()> {
    let around = |f: &Found| f.offset / PAGE * PAGE..(f.offset + f.len).next_multiple_of(PAGE).min(size);
    for range in found.iter().map(around).chain(edges(size)) {
        let zeros = vec![0; EDGE as usize];
        for at in range.clone().step_by(EDGE as usize) {
            device.write_all_at(&zeros[..(range.end - at).min(EDGE) as usize], at)?;
        }
    }
    device.sync_all()
}

fn edges(size: u64) -> [Range<u64>; 2] {
    [0..EDGE.min(size), size.saturating_sub(EDGE)..size]
}

#[derive(Deserialize)]
struct Wipefs {
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    offset: String,
    r#type: String,
    length: u64,
}

/// What util-linux finds: all signatures of all kinds, those with a bad checksum too.
fn probed(device: &File) -> Outcome<Vec<Found>> {
    let cant = |why: &dyn fmt::Display| {
        let message = format!("can't tell what it holds: wipefs (util-linux) {why}");
        Failure::new(Exit::Device, message)
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An ordinary user's has no sbin.
    let mut places = OsString::from("/usr/sbin:/usr/bin:/sbin:/bin:");
    places.push(path);
    let output = Command::new("wipefs")
        .args(["--no-act", "--json", "--output", "OFFSET,TYPE,LENGTH", "/dev/stdin"])
        .env("PATH", places)
        .env("LC_ALL", "C")
        .stdin(Stdio::from(device.try_clone().doing("can't read it")?))
        .output()
        .map_err(|e| cant(&format_args!("can't be run: {}", crate::failure::plain(&e))))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(cant(&format_args!("failed: {}", said.lines().next().unwrap_or("without a word"))));
    }
    // Some versions print nothing where they find nothing.
    if output.stdout.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    let said: Wipefs =
        serde_json::from_slice(&output.stdout).map_err(|e| cant(&format_args!("said what makes no sense: {e}")))?;
    let found = said.signatures.into_iter().map(|Signature { offset, r#type, length }| {
        let offset = offset.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        Some(Found { what: r#type, offset: offset?, len: length })
    });
    found.collect::<Option<_>>().ok_or_else(|| cant(&"names an offset that is none"))
}

/// Of a volume of ours, whatever is left of it.
fn ours(device: &File) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for (offset, magic, what) in create::SIGNATURES {
        let mut bytes = [0; 512];
        if read_at(device, &mut bytes, offset)? && bytes.starts_with(&magic) {
            let uuid = VolumeInfo::peek(&bytes).map_or_else(String::new, |info| format!(" of volume {}", info.uuid));
            found.push(Found { what: format!("ublk-integrity {what}{uuid}"), offset, len: bytes.len() as u64 });
        }
    }
    Ok(found)
}

fn images(device: &File, size: u64) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for (at, magic, what) in IMAGES {
        let from = if *at < 0 { size } else { 0 };
        let Some(offset) = from.checked_add_signed(*at) else { continue };
        let mut bytes = vec![0; magic.len()];
        if read_at(device, &mut bytes, offset)? && bytes == *magic {
            found.push(Found { what: (*what).into(), offset, len: bytes.len() as u64 });
        }
    }
    Ok(found)
}

/// The first byte near either end that is not zero.
fn anything(device: &File, size: u64) -> io::Result<Option<Found>> {
    for range in edges(size) {
        if let Some(found) = data_in(device, range)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn data_in(device: &File, range: Range<u64>) -> io::Result<Option<Found>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    device.read_exact_at(&mut bytes, range.start)?;
    let at = bytes.iter().position(|byte| *byte != 0);
    Ok(at.map(|at| Found { what: "data".into(), offset: range.start + at as u64, len: 1 }))
}

/// The first byte that is not zero in what is no hole, as far as [`LOOKED_THROUGH`] goes.
fn between_holes(device: &File, size: u64) -> io::Result<Option<Found>> {
    let (mut at, mut left) = (0, LOOKED_THROUGH);
    while at < size && left > 0 {
        at = match lseek(device, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(nix::Error::ENXIO) => return Ok(None),
            // A file system that does not know holes.
            Err(nix::Error::EINVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let hole = lseek(device, at as i64, Whence::SeekHole).map_or(size, |hole| hole as u64);
        let end = hole.min(at + EDGE.min(left)).min(size);
        if let Some(found) = data_in(device, at..end)? {
            return Ok(Some(found));
        }
        left -= end - at;
        at = end;
    }
    Ok(None)
}

/// Whether there is so much to read.
fn read_at(device: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match device.read_exact_at(bytes, offset) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn nothing_is_found_in_zeros_or_in_nothing() {
        for size in [0, 1, 511, 4096, EDGE + 1, 3 * EDGE] {
            assert_eq!(find(&disk(size), size).unwrap(), []);
        }
    }

    #[test]
    fn every_image_is_found_and_wiped() {
        const SIZE: u64 = 3 * EDGE + 512;
        for (at, magic, name) in IMAGES {
            let (file, offset) = (disk(SIZE), if *at < 0 { SIZE - at.unsigned_abs() } else { *at as u64 });
            file.write_all_at(magic, offset).unwrap();
            let found = find(&file, SIZE).unwrap();
            assert!(found.iter().any(|f| f.what == *name && f.offset == offset), "{found:?}");
            wipe(&file, SIZE, &found).unwrap();
            assert_eq!(find(&file, SIZE).unwrap(), []);
        }
    }

    #[test]
    fn a_byte_near_either_end_is_data() {
        const SIZE: u64 = 3 * EDGE;
        for (at, is_data) in
            [(EDGE - 1, true), (EDGE, false), (2 * EDGE - 1, false), (2 * EDGE, true), (SIZE - 1, true)]
        {
            let file = disk(SIZE);
            file.write_all_at(&[1], at).unwrap();
            assert_eq!(!find(&file, SIZE).unwrap().is_empty(), is_data, "{at}");
            assert_eq!(find_content(&file, SIZE).unwrap()[0].offset, at, "between the ends, too");
        }
    }

    #[test]
    fn no_more_than_so_much_is_looked_through() {
        const SIZE: u64 = 1 << 40;
        let file = disk(SIZE);
        file.write_all_at(&[1], SIZE / 2).unwrap();
        assert_eq!(find_content(&file, SIZE).unwrap()[0].offset, SIZE / 2, "holes don't count");
        let file = disk(4 * LOOKED_THROUGH);
        let mut at = 0;
        while at <= LOOKED_THROUGH {
            file.write_all_at(&[0; EDGE as usize], at).unwrap();
            at += EDGE;
        }
        file.write_all_at(&[1], at).unwrap();
        assert_eq!(find_content(&file, 4 * LOOKED_THROUGH).unwrap(), []);
    }
}
