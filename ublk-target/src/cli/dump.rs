//! `dump`: what can be known of a volume without its key.

use super::DeviceArgs;
use crate::{
    device::Use,
    failure::{Exit, Failure, Outcome},
    offline::Offline,
    size::Size,
};
use ublk_integrity::{
    create::VolumeInfo,
    open::{self, Dump, ScrubState, Version2},
};

/// Show what can be known of a volume without its key; nothing of it is authenticated
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    devices: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let offline = Offline::open(&args.devices, Use::Unlocked)?;
    let dump = offline.run(open::dump(&offline.io()))??;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&dump).expect("plain data"));
    } else {
        print(&dump);
    }
    if dump.volume.is_none() && dump.identity.is_none() {
        let path = args.devices.meta.as_ref().unwrap_or(&args.devices.data).display();
        let why = dump.unknown.unwrap_or_else(|| "no readable ublk-integrity superblock".into());
        return Err(Failure::new(Exit::Device, format_args!("{path}: {why}")));
    }
    Ok(())
}

fn print(dump: &Dump) {
    for (i, copy) in dump.copies.iter().enumerate() {
        let version = copy.version.map_or_else(String::new, |v| format!(", version {v}"));
        let epoch = copy.epoch.map_or_else(String::new, |e| format!(", epoch {e}"));
        let key = copy.key_id.as_ref().map_or_else(String::new, |id| format!(", key id {id}"));
        let unknown = copy.unknown.as_ref().map_or_else(String::new, |what| format!(": {what}"));
        println!("superblock {i} at {}: {}{unknown}{version}{epoch}{key}", copy.offset, copy.state);
        if !copy.features.is_empty() {
            let features: Vec<_> = copy.features.iter().map(ToString::to_string).collect();
            println!("features      {}", features.join(", "));
        }
    }
    if let Some(volume) = &dump.volume {
        print_volume(volume);
    }
    if let Some(version2) = &dump.version2 {
        print_version2(version2);
    }
    if let Some(identity) = &dump.identity {
        println!("data of       {identity}, whose metadata is on another device");
    }
}

fn print_version2(Version2 { adopted_blocks, scrub, assumed_atomic_bytes, label }: &Version2) {
    println!("label         {label}");
    if let Some(bytes) = assumed_atomic_bytes {
        println!("atomic        {bytes} bytes, as the user says");
    }
    if *adopted_blocks > 0 {
        println!("adopted       {adopted_blocks} blocks");
    }
    if scrub.state != ScrubState::None {
        println!(
            "scrub         pass {}: {:?} at block {}, {} bad",
            scrub.pass, scrub.state, scrub.cursor, scrub.bad_blocks
        );
    }
}

/// The volume's description for a person.
pub fn print_volume(volume: &VolumeInfo) {
    println!("uuid          {}", volume.uuid);
    println!("usable size   {} ({} bytes)", Size(volume.size), volume.size);
    println!("block size    {}", volume.block_size);
    println!(
        "tags          {}",
        serde_json::to_value(volume.tag).ok().as_ref().and_then(|v| v.as_str()).unwrap_or("?")
    );
    println!(
        "metadata      {} of it, on {}",
        Size(volume.metadata_bytes),
        if volume.separate_meta { "a device of its own" } else { "the data device" }
    );
    println!("tag log       {}", Size(volume.log_size));
}
