//! Which control group a process is accounted for in, and ends with.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

/// Puts process `pid` where `other` is. Where it is not there then, that is an error.
pub(super) fn join(pid: u32, other: u32) -> io::Result<()> {
    let groups = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    match way(&groups(pid)?, &groups(other)?)? {
        Some(group) => OpenOptions::new()
            .write(true)
            .open(format!("/sys/fs/cgroup{group}/cgroup.procs"))?
            .write_all(pid.to_string().as_bytes()),
        None => Ok(()),
    }
}

/// A process that does nothing but be in a control group: whoever has made that takes it away when nobody is left there. It
/// ends with this.
pub(super) struct Keeper(Child);

impl Keeper {
    /// One that is where process `other` is.
    pub(super) fn beside(other: u32) -> io::Result<Self> {
        let keeper = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).spawn();
        let keeper = Self(keeper?);
        join(keeper.0.id(), other).map(|()| keeper)
    }

    /// Puts process `pid` there, too.
    pub(super) fn joined_by(&self, pid: u32) -> io::Result<()> {
        join(pid, self.0.id())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _: io::Result<_> = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// The control group to which a process must go to be where another is, if it is not there. Both as /proc/PID/cgroup has them.
fn way<'g>(ours: &str, its: &'g str) -> io::Result<Option<&'g str>> {
    match unified(its) {
        // Where systemd has a hierarchy of version 1 it goes by that, and what there is of version 2 lies elsewhere.
        _ if systemds(its).is_some() => match systemds(ours) == systemds(its) {
            true => Ok(None),
            false => Err(io::Error::other("the control groups of systemd are of version 1 here")),
        },
        group => Ok(group.filter(|group| unified(ours) != Some(*group))),
    }
}

/// The path of a control group in the one hierarchy.
fn unified(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::")).filter(|group| group.starts_with('/'))
}

/// That in the hierarchy by which systemd knows processes where there is not but one.
fn systemds(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.split_once(":name=systemd:")).map(|(_, group)| group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_goes_where_another_is_in_the_one_hierarchy() {
        assert_eq!(way("0::/a\n", "0::/b c/d.scope\n").unwrap(), Some("/b c/d.scope"));
        assert_eq!(way("0::/a\n", "0::/a\n").unwrap(), None, "it is there");
        // Without systemd and version 2 nothing of this concerns anybody.
        assert_eq!(way("4:memory:/a\n", "4:memory:/\n").unwrap(), None);
        assert_eq!(way("", "").unwrap(), None);
    }

    #[test]
    fn who_keeps_a_group_ends_with_what_it_is_kept_for() {
        let keeper = Keeper::beside(std::process::id()).unwrap();
        let folder = format!("/proc/{}", keeper.0.id());
        keeper.joined_by(std::process::id()).unwrap();
        let groups = |of: &str| fs::read_to_string(format!("{of}/cgroup")).unwrap();
        assert_eq!(groups(&folder), groups("/proc/self"));
        drop(keeper);
        assert!(!std::path::Path::new(&folder).exists());
    }

    #[test]
    fn where_nobody_is_moved_that_is_said() {
        let session = "4:memory:/\n1:name=systemd:/user.slice/session-3.scope\n";
        let scope = "4:memory:/\n1:name=systemd:/system.slice/u.scope\n";
        assert!(way(session, scope).unwrap_err().to_string().contains("version 1"));
        assert_eq!(way(scope, scope).unwrap(), None);
        // Both: what is of version 2 is not at /sys/fs/cgroup.
        let with_unified = |group: &str| format!("1:name=systemd:{group}\n0::{group}\n");
        assert!(way(&with_unified("/user.slice/s.scope"), &with_unified("/system.slice/u.scope")).is_err());
        assert_eq!(way(&with_unified("/a"), &with_unified("/a")).unwrap(), None);
    }
}
