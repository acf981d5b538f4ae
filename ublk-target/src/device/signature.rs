//! What a device already holds, so that `format` does not destroy it unasked.

use crate::failure::{Context, Outcome};
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// Bytes that give a content away.
struct Signature {
    name: &'static str,
    offset: u64,
    magic: &'static [u8],
}

const fn at(offset: u64, magic: &'static [u8], name: &'static str) -> Signature {
    Signature { name, offset, magic }
}

/// Longest first where one place holds several.
const SIGNATURES: &[Signature] = &[
    at(0x438, b"\x53\xef", "an ext2/3/4 file system"),
    at(0, b"XFSB", "an XFS file system"),
    at(0x10040, b"_BHRfS_M", "a Btrfs file system"),
    at(0x400, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    at(0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache device"),
    at(0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9", "a bcachefs file system"),
    at(3, b"NTFS    ", "an NTFS file system"),
    at(3, b"EXFAT   ", "an exFAT file system"),
    at(0x52, b"FAT32   ", "a FAT file system"),
    at(0x36, b"FAT16   ", "a FAT file system"),
    at(0x36, b"FAT12   ", "a FAT file system"),
    at(0x8001, b"CD001", "an ISO 9660 file system"),
    at(0, b"hsqs", "a SquashFS file system"),
    at(0x400, b"\xe2\xe1\xf5\xe0", "an EROFS file system"),
    at(0, b"LUKS\xba\xbe", "a LUKS volume"),
    at(0x4000, b"SKUL\xba\xbe", "a LUKS volume (second header)"),
    at(0, b"-FVE-FS-", "a BitLocker volume"),
    at(0, b"integrt", "a dm-integrity volume"),
    at(0, b"verity\0\0", "a dm-verity volume"),
    at(0x218, b"LVM2 001", "an LVM physical volume"),
    at(0x018, b"LVM2 001", "an LVM physical volume"),
    at(0x1000, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    at(0, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    at(0xff6, b"SWAPSPACE2", "swap space"),
    at(0x3ff6, b"SWAPSPACE2", "swap space"),
    at(0xfff6, b"SWAPSPACE2", "swap space"),
    at(0x200, b"EFI PART", "a GPT partition table"),
    at(0x1000, b"EFI PART", "a GPT partition table"),
    at(0x1fe, b"\x55\xaa", "an MBR partition table or boot sector"),
];

/// ZFS labels: a ring of uberblocks from 128 KiB on, each at least 1 KiB.
const ZFS_UBERBLOCK: [u8; 8] = 0x0000_0000_00ba_b10c_u64.to_le_bytes();
const ZFS_RING: std::ops::Range<u64> = 128 << 10..256 << 10;

/// What the device at `path` seems to hold.
pub fn find(path: &Path) -> Outcome<Option<&'static str>> {
    let what = format!("can't read {}", path.display());
    let file = File::open(path).doing(&what)?;
    for signature in SIGNATURES {
        if holds(&file, signature.offset, signature.magic).doing(&what)? {
            return Ok(Some(signature.name));
        }
    }
    for offset in ZFS_RING.step_by(1024) {
        if holds(&file, offset, &ZFS_UBERBLOCK).doing(&what)? {
            return Ok(Some("a ZFS pool member"));
        }
    }
    Ok(None)
}

fn holds(file: &File, offset: u64, magic: &[u8]) -> io::Result<bool> {
    let mut bytes = [0; 16];
    let bytes = &mut bytes[..magic.len()];
    match file.read_exact_at(bytes, offset) {
        Ok(()) => Ok(bytes == magic),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signature_is_found_and_nothing_in_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let fresh = || {
            let file = File::create(&path).unwrap();
            file.set_len(1 << 20).unwrap();
            file
        };
        fresh();
        assert_eq!(find(&path).unwrap(), None);
        for signature in SIGNATURES {
            fresh().write_all_at(signature.magic, signature.offset).unwrap();
            assert_eq!(find(&path).unwrap(), Some(signature.name));
        }
        fresh().write_all_at(&ZFS_UBERBLOCK, 132 << 10).unwrap();
        assert!(find(&path).unwrap().is_some());
    }

    #[test]
    fn a_short_file_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(find(&path).unwrap(), None);
    }
}
