//! `detach`: the end of devices that `attach` has made.

use super::{attach::TableArgs, del, names};
use crate::{daemon::state::State, failure::Outcome, name::DeviceName};

/// End a device by its name, if nobody uses it; as `del`
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("volumes").required(true).args(["name", "all"]))]
pub struct Args {
    /// The name
    name: Option<DeviceName>,
    /// All devices whose names are in the table, the uppermost first
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    table: TableArgs,
}

pub fn run(args: &Args) -> Outcome {
    let states = match &args.name {
        Some(name) => vec![names::of(name, State::all())?],
        None => all(args)?,
    };
    del::end_all(&states, false)
}

fn all(args: &Args) -> Outcome<Vec<State>> {
    let table = args.table.read()?;
    let is_named = |state: &State| state.settings.name.as_ref().is_some_and(|name| table.get(name).is_some());
    Ok(State::all_top_down().into_iter().filter(is_named).collect())
}
