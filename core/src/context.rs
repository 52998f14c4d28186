//! What a handler may know of its request besides the body.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::call::{Call, Notify};
use crate::client::IntoServiceName;
use crate::config;
use crate::envelope::{CorrelationId, Headers, Reply, Request};
use crate::error::Error;
use crate::name::{ContentType, Method, ReplyAddress};
use crate::service::Service;
use crate::signal::{Signal, Signals};
use crate::transport::Outbound;

/// A request's circumstances, as its handler sees them, and a client that inherits its deadline.
#[derive(Clone, Debug)]
pub struct Context {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) request: Arc<Request>,
    pub(crate) attempt: u32,
    pub(crate) deadline: Instant,
    /// Made when it is first asked for, or fires: most handlers end without either.
    pub(crate) cancellation: OnceLock<CancellationToken>,
    pub(crate) service: Arc<Service>,
}

impl Inner {
    pub(crate) fn cancellation(&self) -> &CancellationToken {
        self.cancellation.get_or_init(CancellationToken::new)
    }
}

impl Context {
    /// When the caller stops waiting, by this host's monotonic clock: never early, and over RabbitMQ late by the time
    /// that the request waited in the queue.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.inner.deadline
    }

    /// What is left until the deadline; zero when it has passed.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.inner
            .deadline
            .saturating_duration_since(Instant::now())
    }

    /// Fires when the deadline has passed, when the caller has given the call up or is gone, and when another server may have the
    /// request (lost lease): the handler then has
    /// one second (see [`Server::grace`](crate::Server::grace)) to end by itself before it is dropped. It also fires when the
    /// server stops waiting for its handlers at the end of its drain timeout, or is dropped; they are then dropped at once.
    #[must_use]
    pub fn cancellation(&self) -> CancellationToken {
        self.inner.cancellation().clone()
    }

    /// Which attempt this is: 1, and one more for each server that died with this request.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.inner.attempt
    }

    /// The method that was called, if the request names one.
    #[must_use]
    pub fn method(&self) -> Option<&str> {
        self.inner.request.method.as_ref().map(Method::as_str)
    }

    /// The request's user headers.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.inner.request.headers
    }

    /// What the body is, if the caller said.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.inner
            .request
            .content_type
            .as_ref()
            .map(ContentType::as_str)
    }

    /// The id that ties the reply to its request.
    #[must_use]
    pub fn correlation_id(&self) -> &CorrelationId {
        &self.inner.request.id
    }

    /// Where the reply goes; none for a one-way request.
    #[must_use]
    pub fn reply_to(&self) -> Option<&ReplyAddress> {
        self.inner.request.reply_to.as_ref()
    }

    /// Calls another service, as [`Client::call`](crate::Client::call), within what is left of this request's deadline.
    #[cfg(feature = "json")]
    pub fn call<Out>(
        &self,
        service: impl IntoServiceName,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Call<Out>
    where
        Out: serde::de::DeserializeOwned,
    {
        Call::json(
            self.inner.service.client.clone(),
            service.into_service_name(),
            input,
        )
        .deadline(self.deadline())
    }

    /// Calls another service, as [`Client::call_raw`](crate::Client::call_raw), within what is left of this request's
    /// deadline.
    pub fn call_raw(&self, service: impl IntoServiceName, body: impl Into<Bytes>) -> Call<Reply> {
        Call::raw(
            self.inner.service.client.clone(),
            service.into_service_name(),
            body.into(),
        )
        .deadline(self.deadline())
    }

    /// Notifies another service, as [`Client::notify`](crate::Client::notify), within what is left of this request's
    /// deadline.
    #[cfg(feature = "json")]
    pub fn notify(
        &self,
        service: impl IntoServiceName,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Notify {
        Notify::one_way_json(
            self.inner.service.client.clone(),
            service.into_service_name(),
            input,
        )
        .deadline(self.deadline())
    }

    /// Notifies another service, as [`Client::notify_raw`](crate::Client::notify_raw), within what is left of this
    /// request's deadline.
    pub fn notify_raw(&self, service: impl IntoServiceName, body: impl Into<Bytes>) -> Notify {
        Notify::one_way_raw(
            self.inner.service.client.clone(),
            service.into_service_name(),
            body.into(),
        )
        .deadline(self.deadline())
    }

    /// Tells the caller how far the handler is, as JSON: its [observer](crate::Call::observe) gets it, if it has one. Nothing
    /// happens for a plain peer of the broker.
    ///
    /// **Resolves when** the broker has accepted it. **Cancel safety**: dropping the future does not unsay it.
    ///
    /// # Errors
    /// `NoResponder` if the caller is gone, where the broker can tell; others as of
    /// [`Transport::send`](crate::Transport::send). A handler may ignore them.
    #[cfg(feature = "json")]
    pub async fn progress(&self, value: &(impl serde::Serialize + ?Sized)) -> Result<(), Error> {
        self.progress_raw(crate::codec::encode(value)?).await
    }

    /// The same with a value of bytes.
    ///
    /// # Errors
    /// As of [`progress`](Self::progress).
    pub async fn progress_raw(&self, value: impl Into<Bytes>) -> Result<(), Error> {
        let Inner {
            request, service, ..
        } = &*self.inner;
        // Its caller would not understand a progress, if it wants no signals.
        let (Some(to), true) = (&request.reply_to, request.signals != Signals::None) else {
            return Ok(());
        };
        let body = value.into();
        config::check_size(body.len(), service.client.config().max_body)?;
        let signal = Signal::Progress {
            node: service.node.clone(),
        };
        let reply = Reply {
            body,
            ..Reply::signal(request.id.clone(), signal)
        };
        let (to, reply) = (to.clone(), Arc::new(reply));
        service
            .client
            .transport()
            .send(Outbound::Reply { to, reply })
            .await
    }
}
