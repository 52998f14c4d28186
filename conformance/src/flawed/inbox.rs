//! An inbox that passes on what arrives, but for its flaw.

use std::sync::Arc;

use antiphon_core::transport::{Inbox, InboxEvent, Incoming};
use antiphon_core::{Error, ErrorKind, ReplyAddress, ServiceName};
use async_trait::async_trait;

use super::Flaw;
use super::transport::{LONG, Line};

#[derive(Debug)]
pub(super) struct FlawedInbox {
    line: Arc<Line>,
    /// None only while it is dropped.
    sound: Option<Box<dyn Inbox>>,
    /// The address of the first inbox there was.
    first: ReplyAddress,
    ended: bool,
}

impl FlawedInbox {
    pub(super) fn new(line: Arc<Line>, sound: Box<dyn Inbox>, first: ReplyAddress) -> Self {
        Self {
            line,
            sound: Some(sound),
            first,
            ended: false,
        }
    }
}

#[async_trait]
impl Inbox for FlawedInbox {
    fn address(&self) -> ReplyAddress {
        match &self.sound {
            Some(sound) if !self.line.has(Flaw::SharesAddresses) => sound.address(),
            _ => self.first.clone(),
        }
    }

    async fn join(&mut self, service: &ServiceName) -> Result<(), Error> {
        match &mut self.sound {
            Some(sound) => sound.join(service).await,
            None => Ok(()),
        }
    }

    async fn recv(&mut self) -> InboxEvent {
        let over = || InboxEvent::Closed(Error::not_executed(ErrorKind::Closed, "planted"));
        loop {
            let Some(sound) = &mut self.sound else {
                return over();
            };
            if self.ended {
                return over();
            }
            let event = tokio::select! {
                () = self.line.cut.cancelled(), if self.line.has(Flaw::LosesItsInbox) => std::future::pending().await,
                event = sound.recv() => event,
            };
            match event {
                InboxEvent::Replies(_) if self.line.has(Flaw::DropsReplies) => {}
                InboxEvent::Replies(mut replies) => {
                    if self.line.has(Flaw::ForgetsJoins) && self.line.cut.is_cancelled() {
                        replies.retain(|incoming| !matches!(incoming, Incoming::Request { .. }));
                    }
                    let long = |incoming: &Incoming| matches!(incoming, Incoming::Reply(reply) if reply.body.len() > LONG);
                    self.ended = self.line.has(Flaw::BadReplyEndsInbox) && replies.iter().any(long);
                    return if self.ended {
                        over()
                    } else {
                        InboxEvent::Replies(replies)
                    };
                }
                InboxEvent::Closed(_) if self.line.has(Flaw::HangsAfterClose) => {
                    std::future::pending().await
                }
                event => return event,
            }
        }
    }
}

impl Drop for FlawedInbox {
    fn drop(&mut self) {
        let Some(sound) = self.sound.take() else {
            return;
        };
        if self.line.has(Flaw::LeaksInboxes) {
            self.line
                .world
                .memory()
                .leaked_inboxes
                .push((Arc::clone(&self.line.sound), sound));
        }
        if self.line.has(Flaw::ClosesWithItsInbox) {
            let transport = Arc::clone(&self.line.sound);
            tokio::spawn(async move { transport.close().await });
        }
    }
}
