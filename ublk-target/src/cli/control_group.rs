//! Which control group a process is accounted for in, and ends with.

use std::{fs, io};

/// Puts process `pid` where `other` is.
pub(super) fn join(pid: u32, other: u32) -> io::Result<()> {
    let groups = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    let (its, ours) = (groups(other)?, groups(pid)?);
    match unified(&its) {
        Some(group) if unified(&ours) != Some(group) => {
            fs::write(format!("/sys/fs/cgroup{group}/cgroup.procs"), pid.to_string())
        }
        _ => Ok(()),
    }
}

/// The path of a control group in the one hierarchy, out of a process's /proc/PID/cgroup.
fn unified(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::")).filter(|group| group.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_is_that_of_the_one_hierarchy() {
        assert_eq!(unified("1:name=systemd:/a\n0::/b c/d.scope\n"), Some("/b c/d.scope"));
        assert_eq!(unified("4:memory:/a\n"), None);
    }
}
