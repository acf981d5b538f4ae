//! `dump`: what can be known of a volume without its key.

use super::DeviceArgs;
use crate::{
    device::Use,
    failure::{Exit, Failure, Outcome},
    output::Output,
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
    pub devices: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let offline = args.devices.open(Use::Unlocked)?;
    let dump = offline.run(open::dump(&offline.io()))??;
    let mut out = Output::new();
    if args.json {
        out = Output::json(&dump);
    } else {
        lines(&mut out, &dump);
    }
    let mut verdict = Ok(());
    if dump.volume.is_none() && dump.identity.is_none() {
        let path = args.devices.meta_path().display();
        let why = dump.unknown.unwrap_or_else(|| "no readable ublk-integrity superblock".into());
        verdict = Err(Failure::new(Exit::Device, format_args!("{path}: {why}")));
    }
    out.print_with(verdict)
}

fn lines(out: &mut Output, dump: &Dump) {
    for (i, copy) in dump.copies.iter().enumerate() {
        let version = copy.version.map_or_else(String::new, |v| format!(", version {v}"));
        let epoch = copy.epoch.map_or_else(String::new, |e| format!(", epoch {e}"));
        let key = copy.key_id.as_ref().map_or_else(String::new, |id| format!(", key id {id}"));
        let unknown = copy.unknown.as_ref().map_or_else(String::new, |what| format!(": {what}"));
        out.line(format_args!("superblock {i} at {}: {}{unknown}{version}{epoch}{key}", copy.offset, copy.state));
        if !copy.features.is_empty() {
            let features: Vec<_> = copy.features.iter().map(ToString::to_string).collect();
            out.line(format_args!("features      {}", features.join(", ")));
        }
    }
    if let Some(volume) = &dump.volume {
        describe(out, volume);
    }
    if let Some(version2) = &dump.version2 {
        describe_version2(out, version2);
    }
    if let Some(identity) = &dump.identity {
        out.line(format_args!("data of       {identity}, whose metadata is on another device"));
    }
}

/// Beside what [`describe`] tells of every volume.
fn describe_version2(out: &mut Output, Version2 { adopted_blocks, scrub, .. }: &Version2) {
    if *adopted_blocks > 0 {
        out.line(format_args!("adopted       {adopted_blocks} blocks"));
    }
    if scrub.state != ScrubState::None {
        out.line(format_args!(
            "scrub         pass {}: {:?} at block {}, {} bad",
            scrub.pass, scrub.state, scrub.cursor, scrub.bad_blocks
        ));
    }
}

/// The volume's description for a person.
pub fn describe(out: &mut Output, volume: &VolumeInfo) {
    out.line(format_args!("uuid          {}", volume.uuid));
    if !volume.label.is_empty() {
        out.line(format_args!("label         {}", volume.label));
    }
    out.line(format_args!("usable size   {} ({} bytes)", Size(volume.size), volume.size));
    if volume.max_size > volume.size {
        out.line(format_args!("can grow to   {} ({} bytes)", Size(volume.max_size), volume.max_size));
    }
    out.line(format_args!("block size    {}", volume.block_size));
    if let Some(bytes) = volume.assumed_atomic_bytes {
        out.line(format_args!("atomic        {bytes} bytes, as the user says"));
    }
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
