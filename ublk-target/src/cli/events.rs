//! `events`: what the daemons had to tell since the machine has booted.

use crate::{
    event::{Class, Feed, Record},
    failure::Outcome,
    output::Output,
    run_dir::FOLDER,
};
use clap::builder::PossibleValuesParser;
use std::{path::Path, thread, time::Duration};

/// How often it looks for new ones.
const PERIOD: Duration = Duration::from_millis(500);

/// Show the last events of all volumes: mismatches, failures, ends of daemons
#[derive(clap::Args)]
pub struct Args {
    /// Go on with those that come
    #[arg(short, long)]
    follow: bool,
    /// Only those of this class; may be given several times
    #[arg(long, value_name = "CLASS", value_parser = PossibleValuesParser::new(Class::ALL.iter().map(|class| class.word())))]
    class: Vec<String>,
    /// Print JSON, an object a line
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let mut feed = Feed::of(Path::new(FOLDER));
    loop {
        let mut out = Output::new();
        let wanted = |record: &Record| args.class.is_empty() || args.class.contains(&record.class);
        for record in feed.take().into_iter().filter(wanted) {
            match args.json {
                true => out.line(serde_json::to_string(&record).expect("plain data")),
                false => out.line(line(&record)),
            }
        }
        out.print()?;
        if !args.follow {
            return Ok(());
        }
        thread::sleep(PERIOD);
    }
}

fn line(record: &Record) -> String {
    let Record { time, severity, class, message, .. } = record;
    format!("{time} {severity:<7} {class}: {message}")
}
