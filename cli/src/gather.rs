//! `antiphon call --all`, and how the answers of many servers are shown.

use std::time::Duration;

use antiphon::{Answer, AskAll, Client, Error, ErrorKind, Executed, Gathered, Reply};
use serde::Serialize;
use tokio::time::Instant;

use crate::args::CallArgs;
use crate::call::Wanted;
use crate::exit::{self, Exit};
use crate::output;
use crate::report::{CallReport, GatherReport};
use crate::session::Session;
use crate::signals::Signals;

/// Asks every live server, and prints what each said.
pub(crate) async fn run(url: Option<String>, args: CallArgs) -> Exit {
    let json = args.json;
    let started = Instant::now();
    let result = attended(ask(url, args)).await;
    let elapsed = started.elapsed();
    if json {
        let answers = result
            .as_ref()
            .map_or(&[][..], |gathered| &gathered.answers);
        let answers = answers
            .iter()
            .map(|answer| Named {
                node: answer.node.as_str(),
                answer: CallReport::new(&answer.result, None, answer.elapsed),
            })
            .collect();
        print_json(&result, answers, elapsed)
    } else {
        let line = |answer: &Answer<Reply>| match &answer.result {
            Ok(reply) => String::from_utf8_lossy(&reply.body).into_owned(),
            Err(error) => error.to_string(),
        };
        print_lines(&result, line)
    }
}

/// Runs what a signal ends.
pub(crate) async fn attended<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        biased;
        () = signals.next() => Err(exit::interrupted(Executed::Maybe)),
        result = work => result,
    }
}

async fn ask(url: Option<String>, args: CallArgs) -> Result<Gathered<Reply>, Error> {
    let url = url.ok_or_else(exit::no_url)?;
    let timeout = args.timeout;
    let wanted = Wanted::of(args).await?;
    let ask = |client: &Client| {
        let mut asked = client.ask_all_raw(wanted.service, wanted.body);
        for (name, value) in wanted.headers.iter() {
            asked = asked.header(name, value);
        }
        if let Some(media_type) = &wanted.content_type {
            asked = asked.content_type(media_type.as_str());
        }
        asked
    };
    gather(&url, timeout, ask).await
}

/// Connects, asks and waits for the answers, all within the timeout.
pub(crate) async fn gather<Out: Send + 'static>(
    url: &str,
    timeout: Duration,
    ask: impl FnOnce(&Client) -> AskAll<Out>,
) -> Result<Gathered<Out>, Error> {
    let deadline = Instant::now() + timeout;
    let session = Session::open(url, deadline, timeout).await?;
    let left = deadline.saturating_duration_since(Instant::now());
    let result = ask(&session.client).timeout(left).await;
    session.close().await;
    result
}

/// An answer, and whose it is.
#[derive(Serialize)]
pub(crate) struct Named<'a, T> {
    pub(crate) node: &'a str,
    #[serde(flatten)]
    pub(crate) answer: T,
}

pub(crate) fn print_json<Out>(
    result: &Result<Gathered<Out>, Error>,
    answers: Vec<Named<'_, impl Serialize>>,
    elapsed: Duration,
) -> Exit {
    let failure = failure(result);
    let (silent, unheard) = match result {
        Ok(gathered) => (
            gathered.silent.iter().map(|node| node.as_str()).collect(),
            gathered.unheard,
        ),
        Err(_) => (Vec::new(), 0),
    };
    let report = GatherReport::new(failure.as_ref(), answers, silent, unheard, elapsed);
    let printed = output::write(report.to_line().as_bytes());
    ended(failure, printed)
}

/// Prints a line for each answer: its node, a tab, and `line` of it.
pub(crate) fn print_lines<Out>(
    result: &Result<Gathered<Out>, Error>,
    line: impl Fn(&Answer<Out>) -> String,
) -> Exit {
    let mut lines = String::new();
    for answer in result
        .as_ref()
        .map_or(&[][..], |gathered| &gathered.answers)
    {
        lines.push_str(answer.node.as_str());
        lines.push('\t');
        lines.push_str(line(answer).trim_end_matches('\n'));
        lines.push('\n');
    }
    let printed = output::write(lines.as_bytes());
    ended(failure(result), printed)
}

fn ended(failure: Option<Error>, printed: Result<(), Error>) -> Exit {
    match failure.map_or(Ok(()), Err).and(printed) {
        Ok(()) => Exit::Success,
        Err(error) => output::failed(&error),
    }
}

/// What is wrong with a gathering as a whole: nobody there, a fault, or somebody silent.
fn failure<Out>(result: &Result<Gathered<Out>, Error>) -> Option<Error> {
    let gathered = match result {
        Ok(gathered) => gathered,
        Err(error) => return Some(error.clone()),
    };
    let silent = gathered.silent.len() + gathered.unheard;
    if silent > 0 {
        let names = gathered.silent.iter().map(|node| node.as_str().to_owned());
        let unknown = (gathered.unheard > 0)
            .then(|| format!("{} of which nothing was heard", gathered.unheard));
        let names: Vec<_> = names.chain(unknown).collect();
        let message = format!("{silent} did not answer in time: {}", names.join(", "));
        return Some(Error::maybe_executed(ErrorKind::DeadlineExceeded, message));
    }
    if gathered.answers.is_empty() {
        return Some(Error::not_executed(
            ErrorKind::NoResponder,
            "nobody serves it",
        ));
    }
    gathered
        .answers
        .iter()
        .find_map(|answer| answer.result.as_ref().err().cloned())
}
