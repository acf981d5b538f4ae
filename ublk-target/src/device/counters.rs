//! What the kernel has counted of a block device's requests.

use std::{fs, path::Path};

/// Whether all that was ever sent to a device is one request, which is under way yet. `folder` is
/// the device's in sysfs.
///
/// Where this can't be read, or the kernel was told not to count, nothing is known: `false`.
pub fn awaits_first_answer(folder: &Path) -> bool {
    fs::read_to_string(folder.join("stat")).is_ok_and(|stat| is_first_under_way(&stat))
}

/// The same of the text (`Documentation/block/stat.rst`).
///
/// `inflight` would tell reads from writes, but counts only what is at the driver: what a dead
/// daemon has left there has gone back into the queue.
fn is_first_under_way(stat: &str) -> bool {
    /// Reads, writes, discards and flushes that have ended.
    const ENDED: [usize; 4] = [0, 4, 11, 15];
    const UNDER_WAY: usize = 8;
    let counts: Result<Vec<u64>, _> = stat.split_whitespace().map(str::parse).collect();
    let Ok(counts) = counts else { return false };
    counts.get(UNDER_WAY) == Some(&1) && ENDED.iter().all(|field| counts.get(*field) == Some(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_request_of_all_counts() {
        let sys = tempfile::tempdir().unwrap();
        let stat = |counts: &str| {
            fs::write(sys.path().join("stat"), counts).unwrap();
            awaits_first_answer(sys.path())
        };
        assert!(!awaits_first_answer(sys.path()), "it can't be read");
        assert!(stat(
            "       0        0        0        0        0        0        0        0        1      170      170        0        0        0        0        0        0\n"
        ));
        let fresh = [0, 0, 0, 0, 0, 0, 0, 0, 1, 170, 170, 0, 0, 0, 0, 0, 0];
        let with = |field: usize, count: u64| {
            let mut counts = fresh;
            counts[field] = count;
            counts.map(|count| count.to_string()).join(" ")
        };
        assert!(stat(&with(9, 7)));
        for (field, what) in [(0, "a read"), (4, "a write"), (11, "a discard"), (15, "a flush")] {
            assert!(!stat(&with(field, 1)), "{what} has ended");
        }
        assert!(!stat(&with(8, 2)), "a second one is under way");
        assert!(!stat(&with(8, 0)), "none is, or none is counted");
        // A kernel that counts no discards or flushes; and what is no such file.
        for other in ["0 0 0 0 0 0 0 0 1 0 0\n", "", "0 0 0 0 x 0 0 0 1 0 0 0 0 0 0 0 0"] {
            assert!(!stat(other), "{other:?}");
        }
    }
}
