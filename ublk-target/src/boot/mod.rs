//! Devices that come with the machine: `/etc/ublk-integritytab`, and the units that
//! systemd starts from it.
//!
//! ```text
//!   table (lines ─> entries) ─┬─> generator ─> units (escape) ─> systemd ─> `attach NAME`
//!                             └─> `attach NAME`: find (UUID= ─> path) ─> as `add`, or `recover` where the device waits
//!   udev ─> `udev-probe` (probe) ─> properties of disks that hold a volume, and of devices that are served
//! ```

pub mod escape;
pub mod find;
pub mod generator;
pub mod probe;
pub mod table;
mod unit;
