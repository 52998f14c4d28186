//! The command `antiphon`: serve, call and measure services over RabbitMQ, Redis or inside one process.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod call;
#[cfg(feature = "conform")]
mod conform;
mod exec;
mod exit;
mod gather;
mod handler;
mod inquiry;
mod load;
mod logging;
mod output;
mod progress;
mod report;
mod serve;
mod session;
mod signals;

use std::future::Future;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use exit::Exit;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error).into(),
    };
    logging::start(cli.verbose);
    let url = cli.url.filter(|url| !url.is_empty());
    let exit = match cli.command {
        Command::Serve(args) => on_one_thread(serve::run(url, args)),
        Command::Call(args) => on_one_thread(call::run(url, args)),
        Command::Ping(args) => on_one_thread(inquiry::run(url, args, inquiry::What::Ping)),
        Command::Info(args) => on_one_thread(inquiry::run(url, args, inquiry::What::Info)),
        Command::Stats(args) => on_one_thread(inquiry::run(url, args, inquiry::What::Stats)),
        Command::Bench(args) => on_one_thread(bench::run(url, args)),
        #[cfg(feature = "conform")]
        Command::Conform(args) => on_all_threads(conform::run(url, args)),
    };
    exit.into()
}

/// One connection keeps one thread busy, and a second one only costs the hand-over.
fn on_one_thread(command: impl Future<Output = Exit>) -> Exit {
    run(tokio::runtime::Builder::new_current_thread(), command)
}

/// Many cases run at once, each with servers and clients of its own.
#[cfg(feature = "conform")]
fn on_all_threads(command: impl Future<Output = Exit>) -> Exit {
    run(tokio::runtime::Builder::new_multi_thread(), command)
}

fn run(mut runtime: tokio::runtime::Builder, command: impl Future<Output = Exit>) -> Exit {
    match runtime.enable_all().build() {
        Ok(runtime) => {
            let exit = runtime.block_on(command);
            // A read of standard input may still block a thread; nobody waits for it.
            runtime.shutdown_background();
            exit
        }
        Err(error) => output::failed(&exit::local("no runtime", &error)),
    }
}
