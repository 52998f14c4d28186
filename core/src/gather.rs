//! One request to every live server of a service, and the replies of all.

use std::collections::BTreeMap;
use std::future::IntoFuture;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::call::Call;
use crate::client::Client;
use crate::envelope::{CorrelationId, Deadline, Outcome, Reply, Request};
use crate::error::{Error, ErrorKind, Executed};
use crate::exchange::{Exchange, deadline_exceeded};
use crate::given_up::Lost;
use crate::listeners::{Listening, Wants};
use crate::name::{Node, ServiceName};
use crate::pending::{Ended, Entered, Slot};
use crate::signal::Signal;

/// A request to every live server of a service; see [`Client::ask_all`](crate::Client::ask_all).
///
/// Dropping it, or its future, gives it up, as a call: the [cancellation](crate::Context::cancellation) of the handlers that run
/// for it fires. So does that of those who have not answered when enough have.
///
/// # Errors
/// A server's fault is its [`Answer`], and one that says nothing in time is [silent](Gathered::silent). As a whole it ends as
/// - `DeadlineExceeded` only if the broker has not accepted it in time, such as without a connection;
/// - `ConnectionLost`, executed `Maybe`, if the inbox is lost while answers are awaited: some may have gone there;
/// - `Closed` when its client's connection is closed;
/// - `Invalid` for what cannot be sent, before any I/O; others as of [`Transport::broadcast`](crate::Transport::broadcast).
#[must_use = "nobody is asked before it is awaited"]
#[derive(Debug)]
pub struct AskAll<Out> {
    call: Call<Reply>,
    read: fn(Reply) -> Result<Out, Error>,
    at_most: usize,
}

/// What came of asking every live server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gathered<Out> {
    /// What each said, in the order of their coming.
    pub answers: Vec<Answer<Out>>,
    /// Those that took the request and had not answered when it ended: in time, or when enough had.
    pub silent: Vec<Node>,
    /// How many more there are, by the broker's account, of which nothing was heard: perhaps they have just died.
    pub unheard: usize,
}

/// What one server said.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Answer<Out> {
    /// Who.
    pub node: Node,
    /// The answer, or its fault.
    pub result: Result<Out, Error>,
    /// How long it took.
    pub elapsed: Duration,
}

impl<Out> AskAll<Out> {
    pub(crate) fn new(call: Call<Reply>, read: fn(Reply) -> Result<Out, Error>) -> Self {
        Self {
            call,
            read,
            at_most: usize::MAX,
        }
    }

    /// How long to wait for the last of them. Default: the client's, 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.call = self.call.timeout(timeout);
        self
    }

    /// Ends when so many have answered. Default: when all have.
    pub fn at_most(mut self, answers: usize) -> Self {
        self.at_most = answers;
        self
    }

    /// Sets a header; see [`Headers`](crate::Headers) for what is allowed.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.call = self.call.header(name, value);
        self
    }

    /// What the body is. Default: `application/json` for typed ones, none for raw ones.
    pub fn content_type(mut self, media_type: &str) -> Self {
        self.call = self.call.content_type(media_type);
        self
    }

    /// The method to call within the service.
    pub fn method(mut self, name: &str) -> Self {
        self.call = self.call.method(name);
        self
    }

    async fn run(mut self) -> Result<Gathered<Out>, Error> {
        Gathering {
            exchange: self.call.exchange(Instant::now())?,
            read: self.read,
            at_most: self.at_most,
            answers: Vec::new(),
            heard: BTreeMap::new(),
            expected: None,
        }
        .run()
        .await
    }
}

impl<Out: Send + 'static> IntoFuture for AskAll<Out> {
    type Output = Result<Gathered<Out>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Gathered<Out>, Error>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

struct Gathering<'a, Out> {
    exchange: Exchange<'a>,
    read: fn(Reply) -> Result<Out, Error>,
    at_most: usize,
    answers: Vec<Answer<Out>>,
    heard: BTreeMap<Node, Heard>,
    expected: Option<usize>,
}

impl<Out> Gathering<'_, Out> {
    async fn run(mut self) -> Result<Gathered<Out>, Error> {
        let id = self.exchange.number()?;
        let client = self.exchange.client;
        let (started, ends) = (self.exchange.started, self.exchange.deadline);
        let budget = self.exchange.remaining(started)?;
        // Listening before it is sent: a reply may be faster than the broker's word.
        let mut listening = client.listeners().listen(id, Wants::SignalsAndReplies);
        let pending = client.pending();
        let Entered {
            place,
            address,
            wall,
        } = pending.enter(id, started, ends, None)?;
        let mut slot = Slot { pending, place };
        let deadline = Deadline::of(wall, budget);
        self.exchange.address(Some(address), deadline);
        let mut asked = Asked {
            client,
            service: self.exchange.service.clone(),
            id: self.exchange.request.id.clone(),
            deadline: ends,
            is_unwanted: true,
        };
        let result = self.gather(&mut listening, &mut slot).await;
        asked.is_unwanted = match &result {
            Ok(()) => !self.is_complete(),
            Err(error) => error.kind() == ErrorKind::Closed,
        };
        result.map(|()| self.finish())
    }

    /// Asks, and hears who answers, until there is nothing more to wait for.
    async fn gather(
        &mut self,
        listening: &mut Listening,
        slot: &mut Slot<'_>,
    ) -> Result<(), Error> {
        let request = Request::clone(self.exchange.request);
        let transport = self.exchange.client.transport();
        let sent = transport.broadcast(self.exchange.service, request);
        let Ok(sent) = timeout_at(self.exchange.deadline, sent).await else {
            return Err(deadline_exceeded(self.exchange.started, Executed::Maybe));
        };
        self.expected = sent?;
        while !self.is_complete() && self.answers.len() < self.at_most {
            tokio::select! {
                biased;
                reply = listening.recv() => self.hear(reply),
                ended = slot.ended() => match ended {
                    Ended::Closed(error) => return Err(error),
                    // Answers may have gone to an inbox that is no more: those who are not heard are not silent.
                    Ended::InboxLost(error) => return Err(error.with_executed(Executed::Maybe)),
                    // Those that were to come are silent.
                    _ => break,
                },
            }
        }
        Ok(())
    }

    /// True if all have answered that are there.
    fn is_complete(&self) -> bool {
        let heard = self.heard.values().map(Heard::count).sum::<usize>();
        self.expected.is_some_and(|expected| heard >= expected)
            && self.heard.values().all(|heard| heard.silent() == 0)
    }

    fn hear(&mut self, reply: Arc<Reply>) {
        let (node, is_answer) = match (&reply.outcome, &reply.node) {
            (Outcome::Signal(Signal::Running { node, .. }), _) => (node.clone(), false),
            (Outcome::Value | Outcome::Fault { .. }, Some(node)) => (node.clone(), true),
            _ => return,
        };
        let heard = self.heard.entry(node.clone()).or_default();
        if !is_answer {
            heard.took += 1;
            return;
        }
        // A server that takes it says so first: more answers than that are duplicates.
        if heard.took > 0 && heard.silent() == 0 {
            return;
        }
        heard.answered += 1;
        let result = match &reply.outcome {
            Outcome::Fault { fault, executed } => Err(Error::from_fault(fault.clone(), *executed)),
            _ => (self.read)(Arc::unwrap_or_clone(reply)),
        };
        self.answers.push(Answer {
            node,
            result,
            elapsed: self.exchange.started.elapsed(),
        });
    }

    fn finish(self) -> Gathered<Out> {
        let heard = self.heard.values().map(Heard::count).sum::<usize>();
        let unheard = self
            .expected
            .map_or(0, |expected| expected.saturating_sub(heard));
        let silent = self
            .heard
            .into_iter()
            .flat_map(|(node, heard)| std::iter::repeat_n(node, heard.silent()))
            .collect();
        Gathered {
            answers: self.answers,
            silent,
            unheard,
        }
    }
}

/// A request that not all have answered yet. If nobody waits for the rest any more, those that run it are told.
struct Asked<'a> {
    client: &'a Client,
    service: ServiceName,
    id: CorrelationId,
    deadline: Instant,
    is_unwanted: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.is_unwanted {
            self.client.given_up().add(Lost {
                service: self.service.clone(),
                id: self.id.clone(),
                deadline: self.deadline,
            });
        }
    }
}

/// What was heard of the servers of one name.
#[derive(Default)]
struct Heard {
    /// How many said that they have the request.
    took: usize,
    answered: usize,
}

impl Heard {
    fn count(&self) -> usize {
        self.took.max(self.answered)
    }

    fn silent(&self) -> usize {
        self.took.saturating_sub(self.answered)
    }
}
