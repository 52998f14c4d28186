//! One call, from its builder to its one outcome.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::config;
use crate::envelope::{CorrelationId, Headers, Reply, Request};
use crate::error::Error;
use crate::exchange::{Attempt, Exchange, Try, answer};
use crate::name::{ContentType, IntoNode, Method, Node, ServiceName};
use crate::pending::Ended;
use crate::signal::Signals;

/// A call that is sent when it is first polled, and ends once: with its reply, or with one [`Error`].
///
/// Its clock starts at the first poll. Dropping it, or its future, leaves nothing behind: a request that was not sent
/// will not be, and a reply that comes later is discarded and counted.
#[must_use = "a call is sent when it is awaited"]
#[derive(Debug)]
pub struct Call<Out> {
    client: Client,
    /// What is wrong with what the user gave is told when the call is awaited, before any I/O.
    service: Result<ServiceName, Error>,
    /// Nobody else has it before it is sent.
    request: Arc<Request>,
    options: Options,
    finish: Finish<Out>,
}

/// A one-way request. It ends when the broker has accepted it.
pub type Notify = Call<()>;

/// The future of a [`Call`].
///
/// **Dropping** it gives the call up.
///
/// # Panics
/// If it is polled once more after it was ready, as the future of an `async fn`.
#[must_use = "a call is sent when it is awaited"]
pub struct CallFuture<Out>(Running<Out>);

enum Running<Out> {
    Plain(Plain<Out>),
    Other(Pin<Box<dyn Future<Output = Result<Out, Error>> + Send>>),
}

/// A call that wants nothing but its reply: most are, so it makes do without a box.
struct Plain<Out> {
    call: Call<Out>,
    read: fn(Arc<Reply>) -> Result<Out, Error>,
    stage: Stage,
}

enum Stage {
    /// Not polled yet.
    New,
    Trying {
        started: Instant,
        attempt: Attempt,
    },
    /// It has ended, however it did.
    Over,
}

#[derive(Default)]
pub(crate) struct Options {
    pub(crate) timeout: Option<Duration>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) expect_responder: bool,
    /// None for most: they want their reply and nothing else.
    pub(crate) attended: Option<Box<Attended>>,
}

/// What a call may want besides its reply.
#[derive(Default)]
pub(crate) struct Attended {
    pub(crate) pickup_timeout: Option<Duration>,
    pub(crate) cancel: Option<CancellationToken>,
    pub(crate) observer: Option<Observer>,
}

/// Called within the call's own future, which is not shared.
type Observer = Mutex<Box<dyn FnMut(CallEvent) + Send>>;

/// What a call's observer is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallEvent {
    /// A handler works on it.
    Running {
        /// Where.
        node: Node,
    },
    /// How far the handler is, by its own account.
    Progress {
        /// Where.
        node: Node,
        /// What it said: JSON, if it used [`Context::progress`](crate::Context::progress).
        body: Bytes,
    },
}

/// What ends it well.
#[derive(Debug)]
enum Finish<Out> {
    Reply(fn(Arc<Reply>) -> Result<Out, Error>),
    Accepted(fn() -> Out),
}

impl Options {
    fn attended(&mut self) -> &mut Attended {
        self.attended.get_or_insert_default()
    }

    pub(crate) fn pickup_timeout(&self) -> Option<Duration> {
        self.attended.as_ref()?.pickup_timeout
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("timeout", &self.timeout)
            .field("deadline", &self.deadline)
            .field("expect_responder", &self.expect_responder)
            .field("pickup_timeout", &self.pickup_timeout())
            .finish_non_exhaustive()
    }
}

impl<Out> Call<Out> {
    /// How long to wait, from the first poll on. Default: the client's, 30 s.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|options, _| {
            config::check_timeout(timeout)?;
            options.timeout = Some(timeout);
            Ok(())
        })
    }

    /// When to stop waiting, if that is before the timeout. Default: none, but for calls from within a handler, which
    /// inherit its own.
    pub fn deadline(self, deadline: Instant) -> Self {
        self.with(|options, _| {
            let earlier = options
                .deadline
                .map_or(deadline, |present| present.min(deadline));
            options.deadline = Some(earlier);
            Ok(())
        })
    }

    /// Sets a header; see [`Headers`] for what is allowed.
    pub fn header(self, name: &str, value: &str) -> Self {
        self.with(|_, request| request.headers.insert(name, value))
    }

    /// The method to call within the service.
    pub fn method(self, name: &str) -> Self {
        self.with(|_, request| {
            request.method = Some(Method::new(name)?);
            Ok(())
        })
    }

    /// What the body is. Default: `application/json` for typed calls, none for raw ones.
    pub fn content_type(self, media_type: &str) -> Self {
        self.with(|_, request| {
            request.content_type = Some(ContentType::new(media_type)?);
            Ok(())
        })
    }

    /// Ends at once as [`ErrorKind::NoResponder`](crate::ErrorKind::NoResponder), executed `No`, if nobody serves the service, instead of waiting for a
    /// server until the deadline.
    pub fn expect_responder(self) -> Self {
        self.with(|options, _| {
            options.expect_responder = true;
            Ok(())
        })
    }

    /// Calls the service on one node of it.
    pub fn at(mut self, node: impl IntoNode) -> Self {
        self.service = self.service.and_then(|service| service.at(node));
        self
    }

    /// How long a server may take to take the request; then it ends as [`ErrorKind::PickupTimeout`](crate::ErrorKind::PickupTimeout), executed `No`, and no server
    /// starts on it any more. Once one has taken it, only the timeout counts. Default: none.
    ///
    /// A server asks the caller before it starts on such a request, which costs one more round trip.
    pub fn pickup_timeout(self, timeout: Duration) -> Self {
        self.with(|options, _| {
            config::check_timeout(timeout)?;
            options.attended().pickup_timeout = Some(timeout);
            Ok(())
        })
    }

    /// Gives the call up when the token fires: it ends as [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled). As when its future is dropped, the request is taken
    /// back if nobody has it, where the broker can; else servers do not start on it, and the
    /// [cancellation](crate::Context::cancellation) of a handler that runs fires.
    pub fn cancel_on(self, token: CancellationToken) -> Self {
        self.with(|options, _| {
            options.attended().cancel = Some(token);
            Ok(())
        })
    }

    /// Has a function told where the call runs, after a quiet period (the server's heartbeat, 5 s), and how far it is. It
    /// is called within the call's own future; a slow one misses what is said meanwhile, beyond 1024 words.
    pub fn observe(self, observer: impl FnMut(CallEvent) + Send + 'static) -> Self {
        self.with(|options, _| {
            options.attended().observer = Some(Mutex::new(Box::new(observer)));
            Ok(())
        })
    }

    /// The id that ties the reply to this call.
    #[must_use]
    pub fn correlation_id(&self) -> &CorrelationId {
        &self.request.id
    }

    fn new(
        client: Client,
        service: Result<ServiceName, Error>,
        body: Result<Bytes, Error>,
        content_type: Option<ContentType>,
        finish: Finish<Out>,
    ) -> Self {
        let (service, body) = match body {
            Ok(body) => (service, body),
            Err(error) => (service.and(Err(error)), Bytes::new()),
        };
        let request = Request {
            id: CorrelationId::random(),
            reply_to: None,
            deadline: None,
            method: None,
            headers: Headers::new(),
            content_type,
            signals: Signals::Running,
            body,
        };
        Self {
            client,
            service,
            request: Arc::new(request),
            options: Options::default(),
            finish,
        }
    }

    fn with(mut self, set: impl FnOnce(&mut Options, &mut Request) -> Result<(), Error>) -> Self {
        if let Err(error) = set(&mut self.options, Arc::make_mut(&mut self.request)) {
            // The first error is told.
            self.service = self.service.and(Err(error));
        }
        self
    }

    /// It borrows from itself: what is moved into the future stays in its place.
    async fn run(mut self) -> Result<Out, Error> {
        let started = Instant::now();
        match self.finish {
            Finish::Reply(read) => read(self.exchange(started)?.call().await?),
            Finish::Accepted(done) => self.exchange(started)?.notify().await.map(|()| done()),
        }
    }

    /// The call on its way since `started`, if all that the user gave is valid.
    pub(crate) fn exchange(&mut self, started: Instant) -> Result<Exchange<'_>, Error> {
        let service = self.service.as_ref().map_err(Error::clone)?;
        let (config, options) = (self.client.config(), &self.options);
        config::check_size(self.request.body.len(), config.max_body)?;
        let timeout = options.timeout.unwrap_or(config.timeout);
        let ends = started + timeout;
        let (deadline, budget) = match options.deadline {
            Some(earlier) if earlier < ends => {
                (earlier, earlier.saturating_duration_since(started))
            }
            _ => (ends, timeout),
        };
        Ok(Exchange {
            client: &self.client,
            service,
            request: &mut self.request,
            options,
            started,
            deadline,
            budget,
        })
    }
}

impl<Out: Send + 'static> IntoFuture for Call<Out> {
    type Output = Result<Out, Error>;
    type IntoFuture = CallFuture<Out>;

    fn into_future(self) -> CallFuture<Out> {
        CallFuture(match self.finish {
            Finish::Reply(read) if self.options.attended.is_none() => Running::Plain(Plain {
                call: self,
                read,
                stage: Stage::New,
            }),
            _ => Running::Other(Box::pin(self.run())),
        })
    }
}

impl<Out> Future for CallFuture<Out> {
    type Output = Result<Out, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Out, Error>> {
        match &mut self.0 {
            Running::Plain(plain) => plain.poll(cx),
            Running::Other(other) => other.as_mut().poll(cx),
        }
    }
}

impl<Out> std::fmt::Debug for CallFuture<Out> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallFuture").finish_non_exhaustive()
    }
}

impl<Out> Plain<Out> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Out, Error>> {
        if let Stage::New = self.stage {
            let now = Instant::now();
            self.begin(now, now, cx)?;
        }
        loop {
            let Stage::Trying { started, attempt } = &mut self.stage else {
                panic!("a call was polled after it had ended");
            };
            let started = *started;
            let outcome = match ready!(attempt.poll(cx)) {
                // As most do.
                Ended::Reply(reply) => Some(answer(reply)),
                ended => {
                    let exchange = self.call.exchange(started)?;
                    exchange.outcome(Try::Ended(ended), attempt)
                }
            };
            // Polled again, it must not be sent again; and an attempt leaves the table before the next one enters.
            self.leave();
            match outcome {
                Some(reply) => return Poll::Ready((self.read)(reply?)),
                None => self.begin(started, Instant::now(), cx)?,
            }
        }
    }

    /// Begins an attempt. If it cannot, the call is over.
    fn begin(&mut self, started: Instant, now: Instant, cx: &Context<'_>) -> Result<(), Error> {
        self.stage = Stage::Over;
        let mut exchange = self.call.exchange(started)?;
        let attempt = exchange.begin(now, Some(cx.waker()))?;
        // In its place before it is sent: should the transport panic, it is left all the same.
        self.stage = Stage::Trying { started, attempt };
        if let Stage::Trying { attempt, .. } = &mut self.stage {
            exchange.send(attempt);
        }
        Ok(())
    }

    fn leave(&mut self) {
        if let Stage::Trying { attempt, .. } = &mut self.stage {
            attempt.leave(&self.call.client);
            self.stage = Stage::Over;
        }
    }
}

impl<Out> Drop for Plain<Out> {
    fn drop(&mut self) {
        if let Stage::Trying { started, attempt } = &self.stage
            && let Ok(exchange) = self.call.exchange(*started)
        {
            exchange.give_up(attempt);
        }
        self.leave();
    }
}

impl Call<Reply> {
    pub(crate) fn raw(client: Client, service: Result<ServiceName, Error>, body: Bytes) -> Self {
        Self::of(client, service, Ok(body), None)
    }

    /// A call for its whole reply.
    pub(crate) fn of(
        client: Client,
        service: Result<ServiceName, Error>,
        body: Result<Bytes, Error>,
        content_type: Option<ContentType>,
    ) -> Self {
        // Not `unwrap_or_clone`, which moves it twice more.
        let read = |reply: Arc<Reply>| match Arc::try_unwrap(reply) {
            Ok(reply) => Ok(reply),
            Err(shared) => Ok(Reply::clone(&shared)),
        };
        Self::new(client, service, body, content_type, Finish::Reply(read))
    }
}

impl Notify {
    pub(crate) fn one_way_raw(
        client: Client,
        service: Result<ServiceName, Error>,
        body: Bytes,
    ) -> Self {
        Self::new(client, service, Ok(body), None, Finish::Accepted(|| ()))
    }

    #[cfg(feature = "json")]
    pub(crate) fn one_way_json(
        client: Client,
        service: Result<ServiceName, Error>,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Self {
        Self::new(
            client,
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
        client: Client,
        service: Result<ServiceName, Error>,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Self {
        Self::new(
            client,
            service,
            crate::codec::encode(input),
            Some(ContentType::JSON),
            Finish::Reply(crate::codec::take_reply),
        )
    }
}
