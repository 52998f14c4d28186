//! `antiphon-bench`: floors, peers and ours, measured in one run. `scripts/bench` builds and starts it.
#![forbid(unsafe_code)]

mod args;
mod brokers;
mod contenders;
mod cpu;
mod features;
mod flat;
mod idle;
mod instructions;
mod load;
mod machine;
mod open_load;
mod open_loop;
mod pair;
mod process;
mod report;
mod roles;
mod rounds;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};

/// Whatever went wrong; the program only prints it.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("antiphon-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Failure> {
    match args.command {
        Some(Command::Serve(role)) => roles::runtime(role.workers)?.block_on(roles::serve(&role)),
        Some(Command::Call(role)) => roles::runtime(role.workers)?.block_on(roles::call(&role)),
        Some(Command::HotPath(path)) => roles::runtime(1)?.block_on(roles::hot_path(&path)),
        Some(Command::Idle(idle)) => roles::runtime(1)?.block_on(idle::run(&idle)),
        Some(Command::Flat(flat)) => roles::runtime(1)?.block_on(flat::run(&flat)),
        Some(Command::Features(features)) => roles::runtime(1)?.block_on(features::run(&features)),
        Some(Command::OpenLoop(open)) => roles::runtime(1)?.block_on(open_loop::run(&open)),
        Some(Command::Instructions(counts)) => instructions::run(&counts),
        None => roles::runtime(1)?.block_on(rounds::run(&args.rounds)),
    }
}
