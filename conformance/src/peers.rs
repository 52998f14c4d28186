//! Bare peers: a client and a server without core above them, so that a case can misbehave.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use antiphon_core::transport::{
    Delivery, InboxEvent, Incoming, Outbound, SubscribeOptions, Subscription, SubscriptionEvent,
};
use antiphon_core::{
    Deadline, Error, Reply, ReplyAddress, Request, ServiceName, Ticket, Transport,
};
use tokio::time::timeout;

use crate::bench::{PROMPT, ok, within};
use crate::case::{Stop, Verdict};

/// A bare subscription, one delivery at a time.
#[derive(Debug)]
pub(crate) struct Requests {
    subscription: Box<dyn Subscription>,
    buffer: VecDeque<Delivery>,
}

impl Requests {
    pub(crate) async fn shared(
        transport: &Arc<dyn Transport>,
        service: &ServiceName,
        prefetch: usize,
    ) -> Verdict<Self> {
        Self::subscribe(transport, service, SubscribeOptions::shared(prefetch)).await
    }

    pub(crate) async fn subscribe(
        transport: &Arc<dyn Transport>,
        service: &ServiceName,
        options: SubscribeOptions,
    ) -> Verdict<Self> {
        Ok(Self::new(
            ok("subscribe", transport.subscribe(service, options)).await?,
        ))
    }

    pub(crate) fn new(subscription: Box<dyn Subscription>) -> Self {
        Self {
            subscription,
            buffer: VecDeque::new(),
        }
    }

    /// The next delivery, which comes promptly.
    pub(crate) async fn next(&mut self, step: &str) -> Verdict<Delivery> {
        self.next_within(step, PROMPT).await
    }

    pub(crate) async fn next_within(&mut self, step: &str, limit: Duration) -> Verdict<Delivery> {
        match within(
            &format!("{step}: wait for a delivery"),
            limit,
            self.receive(),
        )
        .await?
        {
            Ok(delivery) => Ok(delivery),
            Err(error) => Err(Stop::failed(
                step,
                format!("the subscription goes on, but it ended: {error}"),
            )),
        }
    }

    /// Checks that nothing is delivered for a while.
    pub(crate) async fn none_for(&mut self, step: &str, pause: Duration) -> Verdict {
        match timeout(pause, self.receive()).await {
            Err(_) | Ok(Err(_)) => Ok(()),
            Ok(Ok(delivery)) => {
                let (id, attempt) = (delivery.request.id.clone(), delivery.attempt);
                Err(Stop::failed(
                    step,
                    format!("nothing is delivered, but {id}, attempt {attempt}, was"),
                ))
            }
        }
    }

    /// The next delivery, or how the subscription ended.
    pub(crate) async fn receive(&mut self) -> Result<Delivery, Error> {
        loop {
            if let Some(delivery) = self.buffer.pop_front() {
                return Ok(delivery);
            }
            match self.subscription.recv().await {
                SubscriptionEvent::Deliveries(deliveries) => self.buffer.extend(deliveries),
                SubscriptionEvent::Closed(error) => return Err(error),
            }
        }
    }

    /// Stops taking; what was received and not looked at stays in hand.
    pub(crate) async fn stop(&mut self) -> Verdict {
        within("stop the subscription", PROMPT, self.subscription.stop()).await
    }
}

/// A bare inbox, one reply at a time.
#[derive(Debug)]
pub(crate) struct Inbox {
    inbox: Box<dyn antiphon_core::transport::Inbox>,
    buffer: VecDeque<Incoming>,
}

impl Inbox {
    pub(crate) async fn open(transport: &Arc<dyn Transport>) -> Verdict<Self> {
        Ok(Self {
            inbox: ok("open an inbox", transport.open_inbox()).await?,
            buffer: VecDeque::new(),
        })
    }

    pub(crate) fn address(&self) -> ReplyAddress {
        self.inbox.address()
    }

    /// The next reply, which comes promptly.
    pub(crate) async fn next(&mut self, step: &str) -> Verdict<Reply> {
        self.next_within(step, PROMPT).await
    }

    pub(crate) async fn next_within(&mut self, step: &str, limit: Duration) -> Verdict<Reply> {
        let received = within(&format!("{step}: wait at the inbox"), limit, self.receive()).await?;
        received.map_err(|event| Stop::failed(step, format!("a reply arrives, not: {event}")))
    }

    /// The next reply, or what came instead.
    async fn receive(&mut self) -> Result<Reply, String> {
        loop {
            match self.buffer.pop_front() {
                Some(Incoming::Reply(reply)) => return Ok(Arc::unwrap_or_clone(reply)),
                Some(other) => return Err(format!("{other:?}")),
                None => {}
            }
            match self.inbox.recv().await {
                InboxEvent::Replies(replies) => self.buffer.extend(replies),
                other => return Err(format!("{other:?}")),
            }
        }
    }
}

/// A request with a deadline.
pub(crate) fn request(
    budget: Duration,
    body: impl Into<bytes::Bytes>,
    reply_to: Option<ReplyAddress>,
) -> Request {
    let mut request = Request::new(Deadline::after(budget), body);
    request.reply_to = reply_to;
    request
}

/// The request on its way, as a client would send it.
pub(crate) fn outbound(service: &ServiceName, request: Request) -> Outbound {
    Outbound::Request {
        service: service.clone(),
        request: Arc::new(request),
        expect_responder: false,
        ticket: Ticket::new(),
    }
}

/// Sends a request by the bare transport.
pub(crate) async fn send(
    transport: &Arc<dyn Transport>,
    service: &ServiceName,
    request: Request,
) -> Verdict {
    ok("send a request", transport.send(outbound(service, request))).await
}

/// Sends a reply by the bare transport.
pub(crate) async fn send_reply(
    transport: &Arc<dyn Transport>,
    to: ReplyAddress,
    reply: Reply,
) -> Verdict {
    ok(
        "send a reply",
        transport.send(Outbound::Reply {
            to,
            reply: Arc::new(reply),
        }),
    )
    .await
}

/// Answers a delivery with a body.
pub(crate) async fn answer(delivery: Delivery, body: impl Into<bytes::Bytes>) -> Verdict {
    let reply = delivery
        .request
        .reply_to
        .is_some()
        .then(|| Reply::value(delivery.request.id.clone(), body));
    ok("reply to a delivery", delivery.reply(reply)).await
}

/// The address that a delivery's caller gave.
pub(crate) fn caller(delivery: &Delivery) -> Verdict<ReplyAddress> {
    let address = delivery.request.reply_to.clone();
    address.ok_or_else(|| {
        Stop::failed(
            "read the request",
            "a call's request carries its reply address",
        )
    })
}
