//! Sends requests: one task (and one for what is said to every server) takes whatever has piled up, publishes it, and tells each sender what became of it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use antiphon_core::transport::Done;
use antiphon_core::{Error, ErrorKind, Executed, Reply, ReplyAddress, Request};
use lapin::types::ShortString;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::absent::Absent;
use crate::error::{ACCESS_REFUSED, closed};
use crate::link::{Link, Opening, open_publishing, opened};
use crate::message;
use crate::outlet::{Fate, Message, Outlet};
use crate::press::Press;
use crate::prober::{Prober, no_responder};
use crate::slip::Refusal;

/// The most messages, and about the most bytes, that wait for the broker's word at once. What is above it stays in our own queue,
/// where it can be withdrawn.
const WINDOW: usize = 4096;
const WINDOW_BYTES: usize = 64 * 1024 * 1024;

/// How often a request that the broker does not take is sent again, its queue having been looked at: that of a quorum queue which is being
/// declared is refused, and the next one is not. A queue that is full refuses that too.
const AGAIN_MAX: u8 = 2;

/// The most messages that are taken in one go, so that confirms are looked at in between.
const BATCH: usize = 256;

/// How often confirms are looked at that nobody waits for urgently.
const SWEEP: Duration = Duration::from_millis(2);

/// While nothing can be sent, withdrawn requests are thrown out this often.
const PURGE: Duration = Duration::from_millis(500);

/// One message on its way out.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) what: What,
    pub(crate) done: Done,
}

#[derive(Debug)]
pub(crate) enum What {
    Request(Box<OutgoingRequest>),
    Reply { to: ReplyAddress, reply: Arc<Reply> },
}

#[derive(Debug)]
pub(crate) struct OutgoingRequest {
    /// Empty: the broker's own.
    pub(crate) exchange: ShortString,
    pub(crate) queue: ShortString,
    pub(crate) request: Arc<Request>,
    /// By this host's clock.
    pub(crate) deadline: Option<Instant>,
    /// Kept on disk where its queue is.
    pub(crate) persistent: bool,
    pub(crate) expect_responder: bool,
    /// It counted as sent, and is with nobody all the same: its channel was closed, there was no queue for it, or the broker did not
    /// take it.
    pub(crate) came_back: bool,
    /// How often the broker did not take it.
    pub(crate) refusals: u8,
}

impl OutgoingRequest {
    /// It is with nobody: its caller may give it up, knowing that it was not executed.
    fn come_back(&mut self, done: &Done) {
        if self.refusals == 0 {
            done.reopen();
        }
        self.came_back = true;
    }

    /// If somebody may have executed it, though it is with nobody now: a broker that did not take it may have all the same.
    fn executed(&self) -> Executed {
        match self.refusals {
            0 => Executed::No,
            _ => Executed::Maybe,
        }
    }
}

/// The task's own state.
pub(crate) struct Publisher {
    link: Link<Press>,
    /// Open while inboxes are live.
    gate: watch::Receiver<bool>,
    jobs: mpsc::UnboundedReceiver<Job>,
    closing: CancellationToken,
    queue: VecDeque<Job>,
    outlet: Option<Outlet<Job>>,
    opening: Option<Opening>,
    /// Requests whose queue is not there, or may not be.
    absent: Absent,
    /// Queues that are there now.
    found: mpsc::UnboundedReceiver<ShortString>,
}

impl Publisher {
    pub(crate) fn new(
        link: Link<Press>,
        gate: watch::Receiver<bool>,
        jobs: mpsc::UnboundedReceiver<Job>,
        prober: Arc<Prober>,
        closing: CancellationToken,
    ) -> Self {
        let (sender, found) = mpsc::unbounded_channel();
        Self {
            link,
            gate,
            jobs,
            closing,
            queue: VecDeque::new(),
            outlet: None,
            opening: None,
            absent: Absent::new(prober, sender),
            found,
        }
    }

    /// Runs until the transport is closed.
    pub(crate) async fn run(mut self) {
        let closing = self.closing.clone();
        let mut incoming = Vec::with_capacity(BATCH);
        let mut fates = Vec::new();
        let mut next_sweep = None;
        loop {
            let flowing = self.prepare();
            if flowing {
                self.publish();
            }
            let pending = self.pending();
            if pending == 0 {
                next_sweep = None;
            } else if next_sweep.is_none() {
                next_sweep = Some(Instant::now() + SWEEP);
            }
            let wake = self.next_wake(next_sweep, flowing);
            let prompt = tokio::select! {
                biased;
                () = closing.cancelled() => return self.close(),
                taken = self.jobs.recv_many(&mut incoming, BATCH) => {
                    if taken == 0 {
                        return self.close();
                    }
                    self.queue.extend(incoming.drain(..));
                    false
                }
                () = prompt(&mut self.outlet) => true,
                Some(queue) = self.found.recv() => {
                    // They were here before whatever waits now.
                    for job in self.absent.take(queue).into_iter().rev() {
                        self.queue.push_front(job);
                    }
                    false
                }
                opened = opened(&mut self.opening) => {
                    self.opening = None;
                    if let Some(channel) = opened {
                        self.absent.forget_all();
                        self.outlet = Some(Outlet::new(channel));
                    }
                    false
                }
                Ok(()) = self.link.state.changed() => false,
                Ok(()) = self.link.blocked.changed() => false,
                Ok(()) = self.gate.changed() => false,
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => false,
            };
            let now = Instant::now();
            if prompt || next_sweep.is_some_and(|at| at <= now) || self.is_broken() {
                next_sweep = None;
                if let Some(outlet) = &mut self.outlet {
                    outlet.sweep(&mut fates);
                }
                for (job, fate) in fates.drain(..) {
                    self.decide(job, fate);
                }
            }
            if self.is_broken() {
                self.abandon();
            }
            self.give_up(now);
            if !flowing {
                self.purge();
            }
        }
    }

    /// Sees to it that there will be a channel to publish on; false while nothing may be sent.
    fn prepare(&mut self) -> bool {
        if !*self.gate.borrow_and_update() || self.link.blocked.borrow_and_update().is_some() {
            return false;
        }
        if self.outlet.is_none() && self.opening.is_none() {
            let session = self.link.state.borrow_and_update().session();
            self.opening = session.map(open_publishing);
        }
        self.outlet.is_some()
    }

    fn publish(&mut self) {
        let Some(outlet) = &mut self.outlet else {
            return;
        };
        for _ in 0..BATCH {
            if !has_room(outlet) {
                return;
            }
            let Some(job) = self.queue.pop_front() else {
                return;
            };
            if let Some(queue) = job.waits_for()
                && self.absent.waits(queue, job.deadline())
            {
                let queue = queue.clone();
                self.absent.park(&queue, job);
                continue;
            }
            if job.is_over(Instant::now()) {
                job.expire();
                continue;
            }
            if job.is_abandoned() {
                continue;
            }
            let Some((message, prompt)) = job.encode() else {
                continue;
            };
            if let Err(unsent) = outlet.publish(message, prompt, job) {
                return self.wait_again(unsent);
            }
        }
    }

    /// Keeps what no channel took, for the next one.
    fn wait_again(&mut self, mut unsent: Job) {
        if let What::Request(request) = &mut unsent.what {
            request.come_back(&unsent.done);
        }
        self.queue.push_front(unsent);
    }

    fn decide(&mut self, mut job: Job, fate: Fate) {
        let result = match (&mut job.what, fate) {
            (_, Fate::Accepted) => Ok(()),
            (What::Request(request), Fate::Returned) if request.expect_responder => {
                Err(no_responder(&request.queue).with_executed(request.executed()))
            }
            (What::Request(request), Fate::Returned) => {
                request.come_back(&job.done);
                let queue = request.queue.clone();
                self.absent.forget(&queue);
                return self.absent.park(&queue, job);
            }
            (What::Request(request), Fate::Refused)
                if request.refusals < AGAIN_MAX && !request.expect_responder =>
            {
                request.refusals += 1;
                request.came_back = true;
                let queue = request.queue.clone();
                self.absent.forget(&queue);
                return self.absent.park(&queue, job);
            }
            (What::Request(_), Fate::Refused) => Err(Error::maybe_executed(
                ErrorKind::Overloaded,
                "the broker did not take the request",
            )),
            (What::Request(request), Fate::Unwritable) => Err(Error::not_executed(
                ErrorKind::Invalid,
                "the request's headers do not fit into a frame that the broker takes",
            )
            .with_executed(request.executed())),
            (
                What::Request(request),
                Fate::Lost {
                    refused: Some(refusal),
                },
            ) if !request.exchange.as_str().is_empty() => {
                Err(refused(request.exchange.as_str(), &refusal))
            }
            (What::Request(_), Fate::Lost { .. }) => Err(Error::maybe_executed(
                ErrorKind::ConnectionLost,
                "the connection was lost before the broker accepted the request",
            )),
            (What::Reply { .. }, Fate::Returned) => Err(Error::not_executed(
                ErrorKind::NoResponder,
                "the inbox is gone",
            )),
            (What::Reply { .. }, Fate::Unwritable) => Err(Error::not_executed(
                ErrorKind::Invalid,
                "the reply's headers do not fit into a frame that the broker takes",
            )),
            (What::Reply { .. }, Fate::Refused) => Err(Error::maybe_executed(
                ErrorKind::Overloaded,
                "the broker did not take the reply",
            )),
            (What::Reply { .. }, Fate::Lost { .. }) => Err(Error::maybe_executed(
                ErrorKind::ConnectionLost,
                "the connection was lost before the broker accepted the reply",
            )),
        };
        job.done.tell(result);
    }

    /// Gives up what waited for its service until its deadline. None of it is with the broker.
    fn give_up(&mut self, now: Instant) {
        for job in self.absent.overdue(now) {
            job.expire();
        }
    }

    fn pending(&self) -> usize {
        self.outlet.as_ref().map_or(0, |outlet| outlet.pending().0)
    }

    fn is_broken(&self) -> bool {
        self.outlet.as_ref().is_some_and(|outlet| !outlet.is_open())
    }

    /// The channel is dead: whatever it had not confirmed may or may not have arrived.
    fn abandon(&mut self) {
        let Some(outlet) = self.outlet.take() else {
            return;
        };
        let mut fates = Vec::new();
        outlet.abandon(&mut fates);
        for (job, fate) in fates {
            self.decide(job, fate);
        }
    }

    fn purge(&mut self) {
        self.queue.retain(|job| !job.is_abandoned());
    }

    fn next_wake(&self, sweep: Option<Instant>, flowing: bool) -> Option<Instant> {
        let absent = self.absent.next_wake();
        let idle = self.queue.is_empty();
        let busy = match flowing {
            // A batch is through, and the next one waits. If the window is full, the sweep makes room.
            true => (!idle && self.outlet.as_ref().is_some_and(has_room)).then(Instant::now),
            false => (!idle).then(|| Instant::now() + PURGE),
        };
        sweep.into_iter().chain(absent).chain(busy).min()
    }

    fn close(mut self) {
        self.jobs.close();
        while let Ok(job) = self.jobs.try_recv() {
            self.queue.push_back(job);
        }
        for job in self.queue.drain(..).chain(self.absent.drain()) {
            let executed = job.executed();
            job.done.tell(Err(closed().with_executed(executed)));
        }
        let mut fates = Vec::new();
        if let Some(outlet) = self.outlet.take() {
            outlet.abandon(&mut fates);
        }
        for (job, fate) in fates {
            let result = match fate {
                Fate::Accepted => Ok(()),
                _ => {
                    let message = "the transport was closed";
                    Err(Error::maybe_executed(ErrorKind::Closed, message))
                }
            };
            job.done.tell(result);
        }
    }
}

/// The broker closed the channel on which it waited with others, which are not to blame.
fn refused(exchange: &str, refusal: &Refusal) -> Error {
    let Refusal { code, text } = refusal;
    let right = match *code {
        ACCESS_REFUSED => format!(", it takes the right to write to {exchange}"),
        _ => String::new(),
    };
    let message = format!("the broker refused this, or something beside it: {code} {text}{right}");
    Error::maybe_executed(ErrorKind::Broker, message)
}

impl Job {
    /// The message, and whether its sender waits for nothing but the confirm; `None` if it was withdrawn.
    fn encode(&self) -> Option<(Message, bool)> {
        match &self.what {
            What::Request(outgoing) => {
                let remaining = outgoing
                    .deadline
                    .map(|deadline| deadline.saturating_duration_since(Instant::now()));
                // From here on it counts as sent: nothing below may fail without saying so.
                if !self.done.commit() {
                    return None;
                }
                let mut properties = message::encode_request(&outgoing.request, remaining);
                if !outgoing.persistent {
                    properties = message::transient(properties);
                }
                let message = Message {
                    exchange: outgoing.exchange.clone(),
                    queue: outgoing.queue.clone(),
                    properties,
                    body: outgoing.request.body.clone(),
                };
                // A reply proves that its request was accepted, so only who gets none, or does not know how many, needs the confirm soon.
                let prompt =
                    outgoing.request.reply_to.is_none() || !outgoing.exchange.as_str().is_empty();
                Some((message, prompt))
            }
            What::Reply { to, reply } => {
                let correlation = reply.id.with_str(|id| ShortString::from(id));
                let (properties, body) = message::encode_reply(reply, Some(correlation), false);
                let queue = to.as_str().into();
                let message = Message {
                    exchange: ShortString::default(),
                    queue,
                    properties,
                    body,
                };
                Some((message, true))
            }
        }
    }

    /// The queue that it waits for if there is none.
    fn waits_for(&self) -> Option<&ShortString> {
        match &self.what {
            What::Request(request) => (!request.expect_responder).then_some(&request.queue),
            What::Reply { .. } => None,
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.what {
            What::Request(request) => request.deadline,
            What::Reply { .. } => None,
        }
    }

    /// True if nobody waits for it any more. Who gave it up before it came back could not withdraw it.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.what {
            What::Request(request) => {
                self.done.is_withdrawn() || (request.came_back && self.done.is_abandoned())
            }
            What::Reply { .. } => false,
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Its time is up, and it was not sent, or not taken.
    fn expire(self) {
        let message = "the request could not be sent before its deadline";
        let error = Error::not_executed(ErrorKind::DeadlineExceeded, message);
        let error = error.with_executed(self.executed());
        self.done.tell(Err(error));
    }

    /// If it may have been executed, though it is with nobody now.
    fn executed(&self) -> Executed {
        match &self.what {
            What::Request(request) => request.executed(),
            What::Reply { .. } => Executed::No,
        }
    }
}

fn has_room(outlet: &Outlet<Job>) -> bool {
    let (messages, bytes) = outlet.pending();
    messages < WINDOW && bytes < WINDOW_BYTES && outlet.is_open()
}

async fn prompt(outlet: &mut Option<Outlet<Job>>) {
    poll_fn(|cx| match outlet {
        Some(outlet) => outlet.poll_prompt(cx),
        None => Poll::Pending,
    })
    .await
}

#[cfg(test)]
mod tests {
    use antiphon_core::transport::Told;
    use antiphon_core::{Deadline, Ticket};

    use super::*;
    use crate::link::LinkState;

    fn down<S>() -> Link<S> {
        Link {
            state: watch::channel(LinkState::Down("no broker".into())).1,
            blocked: watch::channel(None).1,
        }
    }

    fn publisher() -> Publisher {
        let (_, gate) = watch::channel(true);
        let (_, jobs) = mpsc::unbounded_channel();
        let prober = Arc::new(Prober::new(down()));
        Publisher::new(down(), gate, jobs, prober, CancellationToken::new())
    }

    fn request(ticket: &Ticket) -> (Job, Told) {
        let (done, told) = Done::of_request(ticket.clone());
        let what = What::Request(Box::new(OutgoingRequest {
            exchange: ShortString::default(),
            queue: "service".into(),
            request: Request::new(Deadline::after(Duration::from_secs(60)), "body").into(),
            deadline: None,
            persistent: false,
            expect_responder: false,
            came_back: false,
            refusals: 0,
        }));
        (Job { what, done }, told)
    }

    /// It counts as sent when its channel closes, for microseconds: who gives it up then cannot withdraw it.
    #[test]
    fn what_was_given_up_while_its_channel_closed_is_not_sent_by_the_next() {
        let mut publisher = publisher();
        let (kept, given_up) = (Ticket::new(), Ticket::new());
        let ((job, _told), (other, gone)) = (request(&kept), request(&given_up));
        assert!(job.encode().is_some() && other.encode().is_some());
        assert!(!given_up.withdraw());
        drop(gone);
        for job in [job, other] {
            publisher.wait_again(job);
        }
        assert!(publisher.queue[0].is_abandoned() && !publisher.queue[1].is_abandoned());
        publisher.purge();
        assert_eq!(publisher.queue.len(), 1);
        assert!(kept.withdraw(), "nothing of it was sent");
        publisher.purge();
        assert!(publisher.queue.is_empty());
    }

    #[test]
    fn only_a_missing_right_is_called_one() {
        let told = |code, text: &str| {
            let text = text.into();
            refused("amq.direct", &Refusal { code, text }).to_string()
        };
        let right = told(403, "ACCESS_REFUSED - no");
        assert!(right.contains("403 ACCESS_REFUSED - no"), "{right}");
        assert!(right.contains("right to write to amq.direct"), "{right}");
        let other = told(406, "PRECONDITION_FAILED - too large");
        assert!(
            other.contains("406 PRECONDITION_FAILED - too large"),
            "{other}"
        );
        assert!(!other.contains("right to"), "{other}");
    }
}
