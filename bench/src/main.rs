//! `antiphon-bench`: floors, peers and ours, measured in one run. `scripts/bench` builds and starts it.
#![forbid(unsafe_code)]

mod args;
mod brokers;
mod contenders;
mod cpu;
mod load;
mod machine;
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
        None => roles::runtime(1)?.block_on(rounds::run(&args.rounds)),
    }
}
