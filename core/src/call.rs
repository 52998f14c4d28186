//! One call, from its builder to its one outcome.

use std::future::{Future, IntoFuture, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use crate::client::{Client, ClientSource};
use crate::config::{self, ClientConfig};
use crate::envelope::{CorrelationId, Deadline, Headers, Outcome, Reply, Request};
use crate::error::{Error, ErrorKind, Executed};
use crate::name::{ContentType, Method, ReplyAddress, ServiceName};
use crate::pending::{Ended, Slot};
use crate::ticket::Ticket;
use crate::transport::Outbound;

/// A call that is sent when it is first polled, and ends once: with its reply, or with one [`Error`].
///
/// Its clock starts at the first poll. Dropping it, or its future, leaves nothing behind: a request that was not sent
/// will not be, and a reply that comes later is discarded and counted.
#[must_use = "a call is sent when it is awaited"]
#[derive(Debug)]
pub struct Call<Out> {
    source: ClientSource,
    id: CorrelationId,
    /// What is wrong with what the user gave is told when the call is awaited, before any I/O.
    service: Result<ServiceName, Error>,
    body: Result<Bytes, Error>,
    options: Result<Options, Error>,
    finish: Finish<Out>,
}

/// A one-way request. It ends when the broker has accepted it.
pub type Notify = Call<()>;

/// The future of a [`Call`].
pub type CallFuture<Out> = Pin<Box<dyn Future<Output = Result<Out, Error>> + Send>>;

#[derive(Debug, Default)]
struct Options {
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    method: Option<Method>,
    headers: Headers,
    content_type: Option<ContentType>,
    expect_responder: bool,
}

/// What ends it well.
#[derive(Debug)]
enum Finish<Out> {
    Reply(fn(Reply) -> Result<Out, Error>),
    Accepted(fn() -> Out),
}

impl<Out> Call<Out> {
    /// How long to wait, from the first poll on. Default: the client's, 30 s.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|options| {
            config::check_timeout(timeout)?;
            options.timeout = Some(timeout);
            Ok(())
        })
    }

    /// When to stop waiting, if that is before the timeout. Default: none, but for calls from within a handler, which
    /// inherit its own.
    pub fn deadline(self, deadline: Instant) -> Self {
        self.with(|options| {
            let earlier = options
                .deadline
                .map_or(deadline, |present| present.min(deadline));
            options.deadline = Some(earlier);
            Ok(())
        })
    }

    /// Sets a header; see [`Headers`] for what is allowed.
    pub fn header(self, name: &str, value: &str) -> Self {
        self.with(|options| options.headers.insert(name, value))
    }

    /// The method to call within the service.
    pub fn method(self, name: &str) -> Self {
        self.with(|options| {
            options.method = Some(Method::new(name)?);
            Ok(())
        })
    }

    /// What the body is. Default: `application/json` for typed calls, none for raw ones.
    pub fn content_type(self, media_type: &str) -> Self {
        self.with(|options| {
            options.content_type = Some(ContentType::new(media_type)?);
            Ok(())
        })
    }

    /// Ends at once as [`ErrorKind::NoResponder`], executed `No`, if nobody serves the service, instead of waiting for a
    /// server until the deadline.
    pub fn expect_responder(self) -> Self {
        self.with(|options| {
            options.expect_responder = true;
            Ok(())
        })
    }

    /// The id that ties the reply to this call.
    #[must_use]
    pub fn correlation_id(&self) -> &CorrelationId {
        &self.id
    }

    fn new(
        source: ClientSource,
        service: Result<ServiceName, Error>,
        body: Result<Bytes, Error>,
        content_type: Option<ContentType>,
        finish: Finish<Out>,
    ) -> Self {
        let options = Ok(Options {
            content_type,
            ..Options::default()
        });
        Self {
            source,
            id: CorrelationId::random(),
            service,
            body,
            options,
            finish,
        }
    }

    fn with(mut self, set: impl FnOnce(&mut Options) -> Result<(), Error>) -> Self {
        if let Ok(options) = &mut self.options
            && let Err(error) = set(options)
        {
            self.options = Err(error);
        }
        self
    }

    /// It borrows from itself: what is moved into the future stays in its place.
    async fn run(self) -> Result<Out, Error> {
        let started = Instant::now();
        let (service, body, options) = match (&self.service, &self.body, &self.options) {
            (Ok(service), Ok(body), Ok(options)) => (service, body, options),
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => return Err(error.clone()),
        };
        let deadline = self.source.deadline(options, started);
        let (client, ready) = match &self.source {
            ClientSource::Open(client) => (client, started),
            ClientSource::Lazy(lazy) => match timeout_at(deadline, lazy.client()).await {
                Ok(client) => (client?, Instant::now()),
                Err(_) => return Err(deadline_exceeded(started, Executed::No)),
            },
        };
        config::check_size(body.len(), client.config().max_body)?;
        let exchange = Exchange {
            client,
            id: &self.id,
            service,
            body,
            options,
            started,
            ready,
            deadline,
        };
        match &self.finish {
            Finish::Reply(read) => read(exchange.call().await?),
            Finish::Accepted(done) => exchange.notify().await.map(|()| done()),
        }
    }
}

impl ClientSource {
    /// When a call that starts now must end.
    fn deadline(&self, options: &Options, started: Instant) -> Instant {
        let timeout = options.timeout.or_else(|| match self {
            Self::Open(client) => Some(client.config().timeout),
            // A handler's own deadline is enough.
            Self::Lazy(_) => options
                .deadline
                .is_none()
                .then_some(ClientConfig::default().timeout),
        });
        let timeout = timeout.map(|timeout| started + timeout);
        timeout
            .into_iter()
            .chain(options.deadline)
            .min()
            .unwrap_or(started)
    }
}

impl<Out: Send + 'static> IntoFuture for Call<Out> {
    type Output = Result<Out, Error>;
    type IntoFuture = CallFuture<Out>;

    fn into_future(self) -> CallFuture<Out> {
        Box::pin(self.run())
    }
}

impl Call<Reply> {
    pub(crate) fn raw(
        source: ClientSource,
        service: Result<ServiceName, Error>,
        body: Bytes,
    ) -> Self {
        Self::new(source, service, Ok(body), None, Finish::Reply(Ok))
    }
}

impl Notify {
    pub(crate) fn one_way_raw(
        source: ClientSource,
        service: Result<ServiceName, Error>,
        body: Bytes,
    ) -> Self {
        Self::new(source, service, Ok(body), None, Finish::Accepted(|| ()))
    }

    #[cfg(feature = "json")]
    pub(crate) fn one_way_json(
        source: ClientSource,
        service: Result<ServiceName, Error>,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Self {
        Self::new(
            source,
            service,
            crate::codec::encode(input),
            Some(ContentType::JSON),
            Finish::Accepted(|| ()),
        )
    }
}

#[cfg(feature = "json")]
impl<Out: serde::de::DeserializeOwned> Call<Out> {
    pub(crate) fn json(
        source: ClientSource,
        service: Result<ServiceName, Error>,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Self {
        let read = |reply: Reply| {
            crate::codec::decode(&reply.body).map_err(|error| {
                crate::client::bad_reply(&format!("the reply is not of the expected type: {error}"))
                    .with_source(error)
            })
        };
        Self::new(
            source,
            service,
            crate::codec::encode(input),
            Some(ContentType::JSON),
            Finish::Reply(read),
        )
    }
}

/// A valid call on its way.
struct Exchange<'a> {
    client: &'a Client,
    id: &'a CorrelationId,
    service: &'a ServiceName,
    body: &'a Bytes,
    options: &'a Options,
    started: Instant,
    /// When it could first be sent.
    ready: Instant,
    deadline: Instant,
}

type Sending<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// How one try to get a reply ended.
enum Try {
    Ended(Ended),
    SendFailed(Error),
}

impl Exchange<'_> {
    async fn call(&self) -> Result<Reply, Error> {
        let Some(id) = self.id.as_u128() else {
            return Err(Error::not_executed(
                ErrorKind::Invalid,
                "a correlation id of ours is a UUID",
            ));
        };
        let mut now = self.ready;
        loop {
            let remaining = self.remaining(now)?;
            // Entered before it is sent: a reply may be there before `send` resolves.
            let (mut slot, address) = self.client.pending().enter(id, self.deadline)?;
            let ticket = WithdrawOnDrop(Ticket::new());
            let sending = self.send(Some(address), remaining, &ticket.0);
            let tried = attempt(sending, &mut slot).await;
            return match tried {
                Try::Ended(Ended::Reply(reply)) => match reply.outcome {
                    Outcome::Value => Ok(reply),
                    Outcome::Fault { fault, executed } => Err(Error::from_fault(fault, executed)),
                },
                Try::Ended(Ended::Bad(error)) => Err(error),
                Try::SendFailed(error) => Err(self.send_failed(error, &ticket)),
                Try::Ended(Ended::TimedOut) => {
                    Err(deadline_exceeded(self.started, ticket.executed()))
                }
                Try::Ended(Ended::Closed(error)) => Err(error.with_executed(ticket.executed())),
                // The inbox was lost before this request went out: nobody has seen it, so it goes out
                // with the new address.
                Try::Ended(Ended::InboxLost(_)) if ticket.0.withdraw() => {
                    now = Instant::now();
                    continue;
                }
                Try::Ended(Ended::InboxLost(error)) => Err(error.with_executed(Executed::Maybe)),
            };
        }
    }

    async fn notify(&self) -> Result<(), Error> {
        self.client.pending().check_open()?;
        let ticket = WithdrawOnDrop(Ticket::new());
        let sending = self.send(None, self.remaining(self.ready)?, &ticket.0);
        match timeout_at(self.deadline, sending).await {
            Ok(sent) => sent.map_err(|error| self.send_failed(error, &ticket)),
            Err(_) => Err(deadline_exceeded(self.started, ticket.executed())),
        }
    }

    /// What is left of the time before the request is sent.
    fn remaining(&self, now: Instant) -> Result<Duration, Error> {
        match self.deadline.saturating_duration_since(now) {
            Duration::ZERO => Err(deadline_exceeded(self.started, Executed::No)),
            remaining => Ok(remaining),
        }
    }

    /// A transport that closes need not know of each request whether it went out; the ticket does.
    fn send_failed(&self, error: Error, ticket: &WithdrawOnDrop) -> Error {
        match error.kind() {
            ErrorKind::Closed => error.with_executed(ticket.executed()),
            _ => error,
        }
    }

    /// Not async, so that the request has no place in the future of the call.
    fn send(
        &self,
        reply_to: Option<ReplyAddress>,
        remaining: Duration,
        ticket: &Ticket,
    ) -> Sending<'_> {
        let request = Request {
            id: self.id.clone(),
            reply_to,
            deadline: Some(Deadline::after(remaining)),
            method: self.options.method.clone(),
            headers: self.options.headers.clone(),
            content_type: self.options.content_type.clone(),
            body: self.body.clone(),
        };
        self.client.transport().send(Outbound::Request {
            service: self.service.clone(),
            request,
            expect_responder: self.options.expect_responder,
            ticket: ticket.clone(),
        })
    }
}

async fn attempt(sending: Sending<'_>, slot: &mut Slot) -> Try {
    let mut sending = Some(sending);
    poll_fn(|cx| {
        // A reply proves that the request was accepted: nothing more is waited for. And what has timed out is not sent.
        if let Poll::Ready(ended) = slot.poll_ended(cx) {
            return Poll::Ready(Try::Ended(ended));
        }
        if let Some(send) = &mut sending
            && let Poll::Ready(sent) = send.as_mut().poll(cx)
        {
            sending = None;
            if let Err(error) = sent {
                return Poll::Ready(Try::SendFailed(error));
            }
        }
        Poll::Pending
    })
    .await
}

/// Withdraws a request that was not sent when its call ends, however it ends.
struct WithdrawOnDrop(Ticket);

impl WithdrawOnDrop {
    /// What is known of a request that gets no reply.
    fn executed(&self) -> Executed {
        if self.0.withdraw() {
            Executed::No
        } else {
            Executed::Maybe
        }
    }
}

impl Drop for WithdrawOnDrop {
    fn drop(&mut self) {
        // If it was sent, there is nothing to withdraw, and the answer says just that.
        let _ = self.0.withdraw();
    }
}

fn deadline_exceeded(started: Instant, executed: Executed) -> Error {
    let waited = started.elapsed();
    let message = match executed {
        Executed::No => format!("the request was not sent within {waited:.1?}"),
        Executed::Maybe | Executed::Yes => format!("no reply within {waited:.1?}"),
    };
    Error::new(ErrorKind::DeadlineExceeded, executed, message)
}
