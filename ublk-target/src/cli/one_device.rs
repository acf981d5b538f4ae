//! How one of our devices is named: by its number, its path, its name, or the UUID of its volume.

use super::names;
use crate::{
    daemon::state::State,
    failure::{Exit, Failure, Outcome},
    name::DeviceName,
};
use clap::Args;
use std::path::Path;

/// One of our devices.
#[derive(Args, Debug)]
#[group(id = "device", required = true, multiple = false)]
pub struct OneDevice {
    /// The device: its number, its path like /dev/ublkb0, its name, or the UUID of its volume
    #[arg(value_name = "DEVICE", value_parser = named_device)]
    named: Option<NamedDevice>,
    /// The same
    #[arg(short, long, value_name = "DEVICE", value_parser = named_device)]
    number: Option<NamedDevice>,
}

/// One of our devices, or all.
#[derive(Args, Debug)]
#[group(id = "device", multiple = false)]
pub struct AnyDevice {
    /// The device: its number, its path like /dev/ublkb0, its name, or the UUID of its volume; all where none is named
    #[arg(value_name = "DEVICE", value_parser = named_device)]
    named: Option<NamedDevice>,
    /// The same
    #[arg(short, long, value_name = "DEVICE", value_parser = named_device)]
    number: Option<NamedDevice>,
}

/// How it is named.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NamedDevice {
    Number(u32),
    Name(DeviceName),
    Volume(uuid::Uuid),
}

impl OneDevice {
    /// Its number. Of a volume, that of the one device that is made of it.
    pub fn number(&self) -> Outcome<u32> {
        self.named.as_ref().or(self.number.as_ref()).expect("one is required").number(State::all())
    }
}

/// The number of the device that is named; `None` for all of them. Where `all` is in the same group
/// there may be a device without a name.
pub fn one_or_all(device: Option<&OneDevice>, all: bool) -> Outcome<Option<u32>> {
    device.filter(|_| !all).map(OneDevice::number).transpose()
}

impl AnyDevice {
    /// The number of the one that is named.
    pub fn number(&self) -> Outcome<Option<u32>> {
        self.named.as_ref().or(self.number.as_ref()).map(|device| device.number(State::all())).transpose()
    }
}

impl NamedDevice {
    fn number(&self, all: Vec<State>) -> Outcome<u32> {
        let uuid = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => return names::of(name, all).map(|state| state.id),
            Self::Volume(uuid) => uuid,
        };
        let of_it = all.iter().filter(|state| state.volume.uuid.parse() == Ok(*uuid)).map(|state| state.id);
        match of_it.collect::<Vec<_>>()[..] {
            [number] => Ok(number),
            [] => {
                let message = format!("no device here is of volume {uuid}: `ublk-integrity list` shows them");
                Err(Failure::new(Exit::Device, message))
            }
            ref several => {
                let paths: Vec<_> = several.iter().map(|number| format!("/dev/ublkb{number}")).collect();
                let message = format!("volume {uuid} is in several devices: name one of {}", paths.join(", "));
                Err(Failure::new(Exit::Arguments, message))
            }
        }
    }
}

fn named_device(text: &str) -> Result<NamedDevice, String> {
    match uuid::Uuid::try_parse(text) {
        Ok(uuid) if text.contains('-') => Ok(NamedDevice::Volume(uuid)),
        _ => match (device_number(text), text.parse()) {
            (Ok(number), _) => Ok(NamedDevice::Number(number)),
            (Err(_), Ok(name)) => Ok(NamedDevice::Name(name)),
            (Err(e), Err(_)) => Err(format!("{e}, or its name, or the UUID of its volume")),
        },
    }
}

/// A device as its number or its path. Minor numbers have 20 bits; larger ones would reach the
/// kernel as negative, which means any number.
pub fn device_number(text: &str) -> Result<u32, String> {
    let path = text.contains('/').then(|| std::fs::canonicalize(text).ok()).flatten();
    let name = path.as_deref().and_then(Path::to_str).unwrap_or(text);
    let digits = name.strip_prefix("/dev/").unwrap_or(name);
    let digits = digits.strip_prefix("ublkb").unwrap_or(digits);
    let number = digits.parse().ok().filter(|number| *number < 1 << 20 && digits.bytes().all(|b| b.is_ascii_digit()));
    number.ok_or_else(|| "a device is a number from 0 to 1048575, or its path, like /dev/ublkb0".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    #[test]
    fn a_device_is_a_number_or_a_path() {
        for text in ["7", "ublkb7", "/dev/ublkb7"] {
            assert_eq!(device_number(text), Ok(7), "{text}");
        }
        for text in ["", "-1", "+7", "1048576", "4294967295", "/dev/sda", "/dev/ublkb0p1", "ublkc0", "ublkb"] {
            assert!(device_number(text).unwrap_err().contains("/dev/ublkb0"), "{text}");
        }
    }

    #[test]
    fn a_device_is_also_known_by_its_volume() {
        let uuid = uuid::Uuid::from_u128(7);
        assert_eq!(named_device(&uuid.to_string()), Ok(NamedDevice::Volume(uuid)));
        assert_eq!(named_device("/dev/ublkb7"), Ok(NamedDevice::Number(7)));
        assert!(named_device("/dev/sda").unwrap_err().contains("UUID"));
        let state = |id, uuid: uuid::Uuid| {
            let mut state = State::of_test(id);
            state.volume.uuid = uuid.to_string();
            state
        };
        let other = uuid::Uuid::from_u128(8);
        let all = || vec![state(1, other), state(2, uuid), state(3, other)];
        assert_eq!(NamedDevice::Volume(uuid).number(all()).unwrap(), 2);
        let name: DeviceName = "home".parse().unwrap();
        assert_eq!(named_device("home"), Ok(NamedDevice::Name(name.clone())));
        let mut named = state(4, other);
        named.settings.name = Some(name.clone());
        assert_eq!(NamedDevice::Name(name.clone()).number(vec![state(1, other), named]).unwrap(), 4);
        assert!(NamedDevice::Name(name).number(all()).unwrap_err().message.contains("home"));
        let several = NamedDevice::Volume(other).number(all()).unwrap_err();
        assert!(several.message.contains("/dev/ublkb1, /dev/ublkb3"), "{several}");
        assert_eq!(NamedDevice::Volume(uuid).number(Vec::new()).unwrap_err().exit, Exit::Device);
        for line in [
            "status",
            "status 7",
            "status -n 7",
            "recover /dev/ublkb7",
            "upgrade -n 7",
            "upgrade -a --binary x",
            "resize -n 7 --size 2T",
            "resize --data x --meta y --key-file k",
            "del 7",
            "del -n ublkb7",
            "del -a",
            "clear 7",
            "clear -a",
            "scrub 7",
            "scrub -n 7 --rate 20M --wait --json",
            "scrub 7 --status --json",
            "scrub 7 --pause",
        ] {
            let args = format!("ublk-integrity {line}");
            assert!(Cli::try_parse_from(args.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "status 7 -n 7",
            "del",
            "clear",
            "clear 7 -a",
            "del 7 -a",
            "del 7 -n 7",
            "recover",
            "upgrade",
            "upgrade 7 -a",
            "scrub",
            "scrub 7 --pause --stop",
            "scrub 7 --status --wait",
            "scrub 7 --stop --rate 1M",
            "scrub 7 --rate 0",
        ] {
            let args = format!("ublk-integrity {line}");
            assert!(Cli::try_parse_from(args.split(' ')).is_err(), "{line}");
        }
    }
}
