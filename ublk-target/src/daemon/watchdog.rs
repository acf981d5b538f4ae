//! A kernel that does not come back from a command.

use super::launch::Reporter;
use crate::{
    failure::{Exit, Failure},
    notice::Notice,
};
use std::{collections::BTreeSet, fs, path::Path, process, sync::Arc, time::Duration};

/// How long the kernel may take to add or start a device: some kernels never come back.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ends the process when the kernel does not come back from a command.
pub struct Watchdog(Notice);

impl Watchdog {
    /// `clean_up` runs before the process ends.
    pub fn start(command: &'static str, reporter: &Arc<Reporter>, clean_up: impl FnOnce() + Send + 'static) -> Self {
        let reporter = Arc::clone(reporter);
        Self(Notice::after(PATIENCE, move || {
            reporter.failed(&Failure::new(Exit::Device, why(command, &standing(Path::new("/proc/self/task")))));
            clean_up();
            process::exit(Exit::Device as i32);
        }))
    }

    /// It has come back.
    pub fn disarm(self) {
        drop(self.0);
    }
}

fn why(command: &str, standing: &BTreeSet<String>) -> String {
    let seconds = PATIENCE.as_secs();
    let places = standing.iter().map(String::as_str).collect::<Vec<_>>().join("; ");
    let places = if places.is_empty() { places } else { format!(", where it stands in {places}") };
    format!(
        "the kernel has not come back from {command} within {seconds} s{places} (a bug of some 6.17 kernels): see dmesg, use another kernel"
    )
}

/// Where in the kernel our threads stand that run a driver's code, innermost function first (`proc_pid_stack(5)`). Only root may see that, and
/// not every kernel tells.
fn standing(tasks: &Path) -> BTreeSet<String> {
    let tasks = fs::read_dir(tasks).into_iter().flatten().flatten();
    let stacks = tasks.filter_map(|task| fs::read_to_string(task.path().join("stack")).ok());
    stacks.filter_map(|stack| in_driver(&stack)).collect()
}

/// The functions of a stack, up to the driver's own.
fn in_driver(stack: &str) -> Option<String> {
    // "[<0>] ublk_ctrl_add_dev+0x1c2/0x5f0 [ublk_drv]"
    let functions = stack.lines().filter_map(|line| line.split_whitespace().nth(1)?.split('+').next());
    let functions: Vec<&str> = functions.collect();
    let own = functions.iter().position(|function| function.starts_with("ublk_"))?;
    Some(functions[..=own].join(" < "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STACK: &str = "[<0>] __flush_work+0x1/0x2\n[<0>] blk_mq_free+0x10/0x20\n[<0>] ublk_ctrl_add_dev+0x1c2/0x5f0 [ublk_drv]\n[<0>] io_wq_worker+0x1/0x2\n";

    #[test]
    fn it_is_said_where_the_driver_stands() {
        let folder = tempfile::tempdir().unwrap();
        for (task, stack) in [("1", STACK), ("2", "[<0>] futex_wait+0x1/0x2\n"), ("3", "")] {
            fs::create_dir(folder.path().join(task)).unwrap();
            fs::write(folder.path().join(task).join("stack"), stack).unwrap();
        }
        fs::create_dir(folder.path().join("4")).unwrap();
        let places = standing(folder.path());
        let said = why("ADD_DEV", &places);
        assert!(
            said.contains("30 s, where it stands in __flush_work < blk_mq_free < ublk_ctrl_add_dev (a bug"),
            "{said}"
        );
        let nowhere = why("ADD_DEV", &standing(&folder.path().join("none")));
        assert!(nowhere.contains("within 30 s (a bug"), "{nowhere}");
    }
}
