//! `top`: a live table of all devices.

use super::{
    status::{devices, period},
    terminal::{Screen, Wake},
};
use crate::{
    failure::Outcome,
    interrupt,
    output::Output,
    watch::table::{self, Look, Room},
};
use std::{
    env,
    io::{self, IsTerminal},
    mem, thread,
    time::{Duration, Instant},
};

/// Watch what all devices do: requests and bytes a second, latencies, cache hits, log, pass, health
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: super::AnyDevice,
    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = period)]
    delay: Duration,
    /// Print one table after the other, as it is done where standard output is no terminal
    #[arg(short, long)]
    batch: bool,
    /// Print one table, of what happens in one delay
    #[arg(long)]
    once: bool,
}

pub fn run(args: &Args) -> Outcome {
    let is_dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if args.once || args.batch || is_dumb || !io::stdout().is_terminal() { batch(args) } else { live(args) }
}

fn look(args: &Args) -> Outcome<Look> {
    Ok(Look::of(devices(args.device.number()?, true)?))
}

fn batch(args: &Args) -> Outcome {
    let mut before = look(args)?;
    loop {
        thread::sleep(args.delay);
        let now = look(args)?;
        let mut out = Output::new();
        table::lines(Some(&before), &now, Room::ENDLESS).iter().for_each(|line| out.line(line));
        if args.once {
            return out.print();
        }
        // A line between two tables.
        out.line("");
        out.print()?;
        before = now;
    }
}

fn live(args: &Args) -> Outcome {
    let (mut before, mut now) = (None, look(args)?);
    let mut screen = Screen::enter()?;
    let mut next = Instant::now() + args.delay;
    loop {
        let Room { columns, lines } = screen.room();
        let mut shown =
            vec![format!("every {} s, q ends it", args.delay.as_secs_f64()).chars().take(columns).collect()];
        shown.extend(table::lines(before.as_ref(), &now, Room { columns, lines: lines.saturating_sub(1) }));
        screen.draw(&shown[..shown.len().min(lines)])?;
        match screen.wait(next)? {
            Wake::Key(b'q') => return Ok(()),
            Wake::Time | Wake::Key(b' ') => {
                before = Some(mem::replace(&mut now, look(args)?));
                next = Instant::now() + args.delay;
            }
            Wake::Key(_) | Wake::Shown => {}
            Wake::End(signal) => {
                drop(screen);
                interrupt::die_of(signal);
                return Err(interrupt::failure());
            }
        }
    }
}
