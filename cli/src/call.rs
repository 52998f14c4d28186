//! `antiphon call`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use antiphon::{ClientConfig, ContentType, Error, Executed, Headers, Reply, ServiceName};
use bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::time::Instant;

use crate::args::CallArgs;
use crate::exit::{self, Exit};
use crate::gather;
use crate::output;
use crate::report::CallReport;
use crate::session::Session;
use crate::signals::Signals;

/// Calls once, and prints the reply.
pub(crate) async fn run(url: Option<String>, args: CallArgs) -> Exit {
    if args.all {
        return gather::run(url, args).await;
    }
    let json = args.json;
    let mut attempt = Attempt::default();
    let result = match Signals::listen() {
        Ok(mut signals) => tokio::select! {
            biased;
            () = signals.next() => Err(exit::interrupted(attempt.executed())),
            result = attempt.make(url, args) => result,
        },
        Err(error) => Err(error),
    };
    let printed = match &result {
        result if json => output::write(attempt.report(result).to_line().as_bytes()),
        Ok(reply) => output::write(&reply.body),
        Err(_) => Ok(()),
    };
    let exit = match result.and(printed) {
        Ok(()) => Exit::Success,
        Err(error) => output::failed(&error),
    };
    if let Some(session) = attempt.session {
        session.close().await;
    }
    exit
}

/// A call, as far as it has come.
#[derive(Default)]
struct Attempt {
    started: Option<Instant>,
    session: Option<Session>,
    correlation_id: Option<String>,
}

impl Attempt {
    /// The clock starts when the body is there.
    async fn make(&mut self, url: Option<String>, args: CallArgs) -> Result<Reply, Error> {
        // What is wrong with the command line is told before any I/O.
        let url = url.ok_or_else(exit::no_url)?;
        let (timeout, expect_responder) = (args.timeout, args.expect_responder);
        let wanted = Wanted::of(args).await?;

        let started = *self.started.insert(Instant::now());
        let deadline = started + timeout;
        let session = self
            .session
            .insert(Session::open(&url, deadline, timeout).await?);
        let left = deadline.saturating_duration_since(Instant::now());
        let mut call = session
            .client
            .call_raw(wanted.service, wanted.body)
            .timeout(left);
        for (name, value) in wanted.headers.iter() {
            call = call.header(name, value);
        }
        if let Some(media_type) = &wanted.content_type {
            call = call.content_type(media_type.as_str());
        }
        if expect_responder {
            call = call.expect_responder();
        }
        self.correlation_id = Some(call.correlation_id().to_string());
        call.await
    }

    /// What is known of the handler if the call is given up now.
    fn executed(&self) -> Executed {
        match self.correlation_id {
            Some(_) => Executed::Maybe,
            None => Executed::No,
        }
    }

    fn report<'a>(&'a self, result: &'a Result<Reply, Error>) -> CallReport<'a> {
        let elapsed = self
            .started
            .map_or(Duration::ZERO, |started| started.elapsed());
        CallReport::new(result, self.correlation_id.as_deref(), elapsed)
    }
}

/// What is asked for, and valid.
pub(crate) struct Wanted {
    pub(crate) service: ServiceName,
    pub(crate) headers: Headers,
    pub(crate) content_type: Option<ContentType>,
    pub(crate) body: Bytes,
}

impl Wanted {
    pub(crate) async fn of(args: CallArgs) -> Result<Self, Error> {
        let mut service = ServiceName::new(&args.service)?;
        if let Some(node) = &args.node {
            service = service.at(node)?;
        }
        let mut headers = Headers::new();
        for (name, value) in &args.headers {
            headers.insert(name, value)?;
        }
        let content_type = args
            .content_type
            .as_deref()
            .map(ContentType::new)
            .transpose()?;
        Ok(Self {
            service,
            headers,
            content_type,
            body: read_body(args.body).await?,
        })
    }
}

async fn read_body(body: Option<OsString>) -> Result<Bytes, Error> {
    let body = match body {
        None => return Ok(Bytes::new()),
        Some(body) if body == "-" => read_standard_input().await?,
        Some(body) => body.into_vec(),
    };
    exit::check_size(body.len())?;
    Ok(body.into())
}

/// All of it, or enough to see that it is too large.
async fn read_standard_input() -> Result<Vec<u8>, Error> {
    let limit = u64::try_from(ClientConfig::default().max_body).unwrap_or(u64::MAX);
    let mut body = Vec::new();
    let mut input = tokio::io::stdin().take(limit.saturating_add(1));
    match input.read_to_end(&mut body).await {
        Ok(_) => Ok(body),
        Err(error) => Err(exit::local("standard input", &error)),
    }
}
