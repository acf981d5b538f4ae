//! `dump`: what can be known of a volume without its key.

use super::DeviceArgs;
use crate::{
    device::Use,
    failure::{Exit, Failure, Outcome},
    offline::Offline,
    output::Output,
    size::Size,
};
use ublk_integrity::{create::VolumeInfo, open};

/// Show what can be known of a volume without its key; nothing of it is authenticated
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let offline = Offline::open(&args.devices, Use::Unlocked)?;
    let dump = offline.run(open::dump(&offline.io()))??;
    let mut out = Output::new();
    if args.json {
        out = Output::json(&dump);
    } else {
        for (i, copy) in dump.copies.iter().enumerate() {
            let epoch = copy.epoch.map_or_else(String::new, |e| format!(", epoch {e}"));
            let key = copy.key_id.as_ref().map_or_else(String::new, |id| format!(", key id {id}"));
            out.line(format_args!("superblock {i} at {}: {}{epoch}{key}", copy.offset, copy.state));
        }
        if let Some(volume) = &dump.volume {
            describe(&mut out, volume);
        }
        if let Some(identity) = &dump.identity {
            out.line(format_args!("data of       {identity}, whose metadata is on another device"));
        }
    }
    let mut verdict = Ok(());
    if dump.volume.is_none() && dump.identity.is_none() {
        let path = args.devices.meta.as_ref().unwrap_or(&args.devices.data).display();
        let message = format!("no readable ublk-integrity superblock on {path}");
        verdict = Err(Failure::new(Exit::Device, message));
    }
    out.print_with(verdict)
}

/// The volume's description for a person.
pub fn describe(out: &mut Output, volume: &VolumeInfo) {
    out.line(format_args!("uuid          {}", volume.uuid));
    out.line(format_args!("usable size   {} ({} bytes)", Size(volume.size), volume.size));
    out.line(format_args!("block size    {}", volume.block_size));
    out.line(format_args!(
        "tags          {}",
        serde_json::to_value(volume.tag).ok().as_ref().and_then(|v| v.as_str()).unwrap_or("?")
    ));
    out.line(format_args!(
        "metadata      {} of it, on {}",
        Size(volume.metadata_bytes),
        if volume.separate_meta { "a device of its own" } else { "the data device" }
    ));
    out.line(format_args!("tag log       {}", Size(volume.log_size)));
}
