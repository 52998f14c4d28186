//! `antiphon bench`.

use antiphon::{Error, Executed, RunningServer, ServiceName};
use bytes::Bytes;
use tokio::time::Instant;

use crate::args::BenchArgs;
use crate::exit::{self, Exit};
use crate::load::{Limit, Load, Plan};
use crate::output;
use crate::progress::Progress;
use crate::report::BenchReport;
use crate::session::Session;
use crate::signals::Signals;

/// How many calls there are if nobody says.
const CALLS: u64 = 10_000;

/// Calls many times, and prints what was measured.
pub(crate) async fn run(url: Option<String>, args: BenchArgs) -> Exit {
    let json = args.json;
    let (report, exit) = match measure(url, args).await {
        Ok(measured) => measured,
        // Nothing was measured, but a program that reads the output gets its object.
        Err(error) if json => (BenchReport::of_failure(&error), output::failed(&error)),
        Err(error) => return output::failed(&error),
    };
    let text = if json {
        report.to_line()
    } else {
        report.to_text()
    };
    match output::write(text.as_bytes()) {
        Ok(()) => exit,
        Err(error) => output::failed(&error),
    }
}

async fn measure(url: Option<String>, args: BenchArgs) -> Result<(BenchReport, Exit), Error> {
    let url = url.ok_or_else(exit::no_url)?;
    let plan = plan(&args)?;
    let mut signals = Signals::listen()?;
    let (session, server) = tokio::select! {
        biased;
        () = signals.next() => return Err(exit::interrupted(Executed::No)),
        opened = open(&url, &plan) => opened?,
    };
    let progress = Progress::towards(plan.limit);
    let mut load = Load::start(session.client.clone(), plan);
    let interrupted = tokio::select! {
        biased;
        () = signals.next() => Some(exit::interrupted(Executed::Maybe)),
        () = progress.follow(&mut load) => None,
    };
    drop(progress);
    let (report, first_error) = load.stop();
    let exit = match (interrupted, first_error) {
        (Some(interrupted), _) => output::failed(&interrupted),
        (None, Some(first)) => {
            output::complain(&first);
            Exit::Remote
        }
        (None, None) => Exit::Success,
    };
    drop(server);
    session.close().await;
    Ok((report, exit))
}

fn plan(args: &BenchArgs) -> Result<Plan, Error> {
    exit::check_size(args.size)?;
    let limit = match (args.calls, args.duration) {
        (_, Some(duration)) => Limit::Duration(duration),
        (calls, None) => Limit::Calls(calls.unwrap_or(CALLS)),
    };
    Ok(Plan {
        service: ServiceName::new(&args.service)?,
        body: Bytes::from(vec![b'x'; args.size]),
        timeout: args.timeout,
        concurrency: args.concurrency,
        limit,
    })
}

/// On `memory://` nobody else can serve, so this process does.
async fn open(url: &str, plan: &Plan) -> Result<(Session, Option<RunningServer>), Error> {
    let deadline = Instant::now() + plan.timeout;
    let session = Session::open(url, deadline, plan.timeout).await?;
    if !url.starts_with("memory://") {
        return Ok((session, None));
    }
    let server = session
        .connection
        .server()
        .handle_raw(plan.service.clone(), |body: Bytes| async move { Ok(body) })
        .prefetch(plan.concurrency.into());
    let running = server.start().await?;
    Ok((session, Some(running)))
}
