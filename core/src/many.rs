//! Many calls of one kind, some at once.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, Stream, StreamExt};

use crate::call::Call;
use crate::error::Error;

/// How many calls are under way at once, if nobody says.
const CONCURRENCY: usize = 64;

/// Calls a service with each of many inputs; see [`Client::call_many`](crate::Client::call_many).
#[must_use = "nothing is called until the outputs are asked for"]
pub struct CallMany<Out> {
    calls: BoxStream<'static, Call<Out>>,
    concurrency: usize,
    timeout: Option<Duration>,
}

impl<Out: Send + 'static> CallMany<Out> {
    pub(crate) fn new<I>(calls: I) -> Self
    where
        I: Iterator<Item = Call<Out>> + Send + 'static,
    {
        Self {
            calls: stream::iter(calls).boxed(),
            concurrency: CONCURRENCY,
            timeout: None,
        }
    }

    /// How many calls are under way at once. Default: 64. At least 1.
    pub fn concurrency(mut self, calls: usize) -> Self {
        self.concurrency = calls.max(1);
        self
    }

    /// How long each call waits for its reply, from when it is sent. Default: the client's, 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The outputs in the order of the inputs. A slow one holds up those behind it, and at most as many calls are ahead
    /// of it as may be under way.
    pub fn in_order(self) -> Outputs<Result<Out, Error>> {
        let concurrency = self.concurrency;
        let outputs = self
            .started()
            .map(|call| async { call.await.1 })
            .buffered(concurrency);
        Outputs(outputs.boxed())
    }

    /// The outputs as they come, each with the position of its input.
    pub fn as_completed(self) -> Outputs<(usize, Result<Out, Error>)> {
        let concurrency = self.concurrency;
        Outputs(self.started().buffer_unordered(concurrency).boxed())
    }

    fn started(
        self,
    ) -> impl Stream<Item = impl Future<Output = (usize, Result<Out, Error>)> + Send> + Send {
        let timeout = self.timeout;
        self.calls.enumerate().map(move |(position, call)| {
            let call = match timeout {
                Some(timeout) => call.timeout(timeout),
                None => call,
            };
            async move { (position, call.await) }
        })
    }
}

impl<Out> std::fmt::Debug for CallMany<Out> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallMany")
            .field("concurrency", &self.concurrency)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// The outputs of many calls: a [`Stream`], for which [`next`](Self::next) is enough. It works while it is polled.
///
/// **Dropping** it drops the calls that are under way, and no more are sent.
#[must_use = "nothing is called until the outputs are asked for"]
pub struct Outputs<T>(BoxStream<'static, T>);

impl<T> Outputs<T> {
    /// The next output; none after the last.
    ///
    /// **Cancel safety**: no output is lost by dropping the future.
    pub async fn next(&mut self) -> Option<T> {
        self.0.next().await
    }
}

impl<T> Stream for Outputs<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.0.poll_next_unpin(cx)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl<T> std::fmt::Debug for Outputs<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outputs").finish_non_exhaustive()
    }
}
