//! The outbox of a server over a broker, and a store, that do as they are told.

use std::collections::HashMap;
use std::future::{pending, ready};
use std::sync::atomic::AtomicBool;
use std::task::Poll;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use super::*;
use crate::context::Context;
use crate::envelope::{Deadline, Request};
use crate::fault::Fault;
use crate::name::ServiceName;
use crate::outbox_store::StoreWrite;
use crate::server::{RunningServer, Server};
use crate::signal::Signals;
use crate::transport::{
    Capabilities, Delivery, FlaggedToken, Inbox, InboxEvent, Incoming, Later, Settle, Settled,
    Settlement, SubscribeOptions, Subscription, SubscriptionEvent, Unsettled,
};

const SECOND: Duration = Duration::from_secs(1);

/// A broker for one server.
#[derive(Debug)]
struct Broker {
    state: watch::Sender<ConnectionState>,
    /// Bodies of what was sent.
    sent: Mutex<Vec<Bytes>>,
    /// Inboxes that take nothing, and why.
    refuses: Mutex<HashMap<ReplyAddress, ErrorKind>>,
    /// The server's own inbox, and its subscription. Without them it waits.
    words: Mutex<Option<mpsc::UnboundedReceiver<Request>>>,
    deliveries: Mutex<Option<mpsc::UnboundedReceiver<Delivery>>>,
}

/// What the broker has the server hear.
struct Hearing {
    words: mpsc::UnboundedSender<Request>,
    deliveries: mpsc::UnboundedSender<Delivery>,
}

impl Broker {
    fn new() -> (Arc<Self>, Hearing) {
        let (words, heard) = mpsc::unbounded_channel();
        let (deliveries, delivered) = mpsc::unbounded_channel();
        let broker = Self {
            state: watch::Sender::new(ConnectionState::Connected),
            sent: Mutex::default(),
            refuses: Mutex::default(),
            words: Mutex::new(Some(heard)),
            deliveries: Mutex::new(Some(delivered)),
        };
        (Arc::new(broker), Hearing { words, deliveries })
    }

    fn refuse(&self, to: &ReplyAddress, kind: ErrorKind) {
        self.refuses.lock().unwrap().insert(to.clone(), kind);
    }

    fn sent(&self) -> Vec<Bytes> {
        self.sent.lock().unwrap().clone()
    }

    fn server(self: &Arc<Self>) -> Server {
        Server::new(Arc::clone(self) as Arc<dyn Transport>)
    }
}

#[async_trait]
impl Transport for Broker {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
    }

    async fn send(&self, message: Outbound) -> Result<(), Error> {
        let Outbound::Reply { to, reply } = message else {
            return Ok(());
        };
        if let Some(kind) = self.refuses.lock().unwrap().get(&to) {
            return Err(Error::maybe_executed(*kind, "as it was told"));
        }
        self.sent.lock().unwrap().push(reply.body.clone());
        Ok(())
    }

    async fn broadcast(&self, _: &ServiceName, _: Request) -> Result<Option<usize>, Error> {
        Ok(None)
    }

    async fn withdraw(&self, _: &ServiceName, _: &CorrelationId) -> Result<bool, Error> {
        Ok(false)
    }

    async fn open_inbox(&self) -> Result<Box<dyn Inbox>, Error> {
        let words = self.words.lock().unwrap().take().unwrap();
        Ok(Box::new(Words(words)))
    }

    async fn subscribe(
        &self,
        _: &ServiceName,
        _: SubscribeOptions,
    ) -> Result<Box<dyn Subscription>, Error> {
        match self.deliveries.lock().unwrap().take() {
            Some(deliveries) => Ok(Box::new(Taken(deliveries))),
            None => Err(Error::not_executed(ErrorKind::AlreadyOwned, "by another")),
        }
    }

    fn state(&self) -> watch::Receiver<ConnectionState> {
        self.state.subscribe()
    }

    async fn close(&self) {}
}

#[derive(Debug)]
struct Words(mpsc::UnboundedReceiver<Request>);

#[async_trait]
impl Inbox for Words {
    fn address(&self) -> ReplyAddress {
        to("of the server")
    }

    async fn join(&mut self, _: &ServiceName) -> Result<(), Error> {
        Ok(())
    }

    async fn recv(&mut self) -> InboxEvent {
        let Some(request) = self.0.recv().await else {
            return pending().await;
        };
        InboxEvent::Replies(vec![Incoming::Request {
            service: ServiceName::new("s").unwrap(),
            request: request.into(),
        }])
    }
}

#[derive(Debug)]
struct Taken(mpsc::UnboundedReceiver<Delivery>);

#[async_trait]
impl Subscription for Taken {
    async fn recv(&mut self) -> SubscriptionEvent {
        match self.0.recv().await {
            Some(delivery) => SubscriptionEvent::Deliveries(vec![delivery]),
            None => pending().await,
        }
    }

    async fn stop(&mut self) {}
}

/// How each settlement of a request ends.
#[derive(Debug)]
struct Ends(Option<ErrorKind>, FlaggedToken);

impl Ends {
    fn with(error: Option<ErrorKind>) -> Self {
        Self(error, FlaggedToken::new())
    }

    fn result(&self) -> Result<(), Error> {
        match self.0 {
            Some(kind) => Err(Error::maybe_executed(kind, "as it was told")),
            None => Ok(()),
        }
    }
}

impl Settlement for Ends {
    fn settle(self: Box<Self>, settle: Settle, _: Later<'_>) -> Poll<Result<(), Unsettled>> {
        Poll::Ready(self.result().map_err(|error| Unsettled::new(error, settle)))
    }

    fn lease(&self) -> &FlaggedToken {
        &self.1
    }
}

/// A store that says when, and how, what it was told is done.
#[derive(Debug, Default)]
struct Told {
    found: Mutex<Vec<KeptReply>>,
    changes: Mutex<Vec<OutboxChange>>,
    /// For the writes to come, in order; others succeed at once.
    writes: Mutex<Vec<StoreWriteEnds>>,
    opens_never: bool,
    closed: AtomicBool,
}

type StoreWriteEnds = oneshot::Receiver<Result<(), Error>>;

impl Told {
    /// The next write waits for this.
    fn holds(&self) -> oneshot::Sender<Result<(), Error>> {
        let (done, ends) = oneshot::channel();
        self.writes.lock().unwrap().push(ends);
        done
    }

    fn forgot(&self, id: u128) -> bool {
        let forget = |change: &OutboxChange| matches!(change, OutboxChange::Forget(key) if key.id == CorrelationId::from_u128(id));
        self.changes.lock().unwrap().iter().any(forget)
    }
}

#[derive(Clone, Debug)]
struct Store(Arc<Told>);

#[async_trait]
impl OutboxStore for Store {
    async fn open(&self) -> Result<Vec<KeptReply>, Error> {
        if self.0.opens_never {
            pending::<()>().await;
        }
        Ok(std::mem::take(&mut *self.0.found.lock().unwrap()))
    }

    fn write(&self, change: OutboxChange) -> StoreWrite {
        self.0.changes.lock().unwrap().push(change);
        let mut writes = self.0.writes.lock().unwrap();
        if writes.is_empty() {
            return Box::pin(ready(Ok(())));
        }
        let ends = writes.remove(0);
        Box::pin(async move { ends.await.unwrap() })
    }

    async fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
    }
}

fn to(address: &str) -> ReplyAddress {
    ReplyAddress::new(address).unwrap()
}

fn reply(id: u128, body: &'static str) -> Arc<Reply> {
    Reply::value(CorrelationId::from_u128(id), body).into()
}

async fn open(broker: &Arc<Broker>, replies: usize, store: Option<&Arc<Told>>) -> Arc<Outbox> {
    let bounds = OutboxBounds {
        replies,
        bytes: 1000,
    };
    let store = store.map(|told| Arc::new(Store(Arc::clone(told))) as Arc<dyn OutboxStore>);
    let transport = Arc::clone(broker) as Arc<dyn Transport>;
    Outbox::open(transport, bounds, store).await.unwrap()
}

fn run(outbox: &Arc<Outbox>) -> tokio_util::sync::DropGuard {
    let stop = CancellationToken::new();
    tokio::spawn(Arc::clone(outbox).run(stop.clone()));
    stop.drop_guard()
}

/// Keeps a reply for ten seconds.
async fn keep(outbox: &Arc<Outbox>, address: &str, reply: Arc<Reply>, kept_to: KeptTo) -> Keeping {
    let expires = Instant::now() + 10 * SECOND;
    outbox.keep(&to(address), reply, expires, kept_to).await
}

/// Lets everything that can go on do so; the clock is paused.
async fn settle() {
    sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_being_stored_does_not_go_for_another_one() {
    let (broker, _hearing) = Broker::new();
    let told = Arc::new(Told::default());
    let outbox = open(&broker, 1, Some(&told)).await;
    let _running = run(&outbox);
    let stored = told.holds();
    let first = tokio::spawn({
        let outbox = Arc::clone(&outbox);
        async move { keep(&outbox, "a", reply(1, "first"), KeptTo::Send).await }
    });
    settle().await;
    let second = keep(&outbox, "a", reply(2, "second"), KeptTo::Send).await;
    assert_eq!(second, Keeping::NoRoom);
    stored.send(Ok(())).unwrap();
    assert_eq!(first.await.unwrap(), Keeping::AsAsked);
    settle().await;
    assert_eq!(broker.sent(), ["first"]);
    assert!(!told.forgot(1));
}

#[tokio::test(start_paused = true)]
async fn what_only_answers_expires_too() {
    let (broker, _hearing) = Broker::new();
    let told = Arc::new(Told::default());
    let outbox = open(&broker, 10, Some(&told)).await;
    let _running = run(&outbox);
    settle().await;
    keep(&outbox, "a", reply(1, "an answer"), KeptTo::Answer).await;
    sleep(9 * SECOND).await;
    assert_eq!(outbox.count(), 1);
    sleep(2 * SECOND).await;
    assert_eq!(outbox.count(), 0);
    assert!(told.forgot(1));
}

#[tokio::test(start_paused = true)]
async fn a_full_inbox_holds_up_no_other_and_no_shutdown() {
    let (broker, _hearing) = Broker::new();
    let outbox = open(&broker, 10, None).await;
    broker.refuse(&to("full"), ErrorKind::Overloaded);
    for (id, address, body) in [(1, "full", "1"), (2, "full", "2"), (3, "other", "3")] {
        keep(&outbox, address, reply(id, body), KeptTo::Send).await;
    }
    let _running = run(&outbox);
    let began = Instant::now();
    outbox.flushed().await;
    assert!(began.elapsed() < SECOND);
    assert_eq!(broker.sent(), ["3"]);
    // There is room again, for both.
    broker.refuses.lock().unwrap().clear();
    sleep(SECOND).await;
    let mut sent = broker.sent();
    sent.sort();
    assert_eq!(sent, ["1", "2", "3"]);
}

#[tokio::test(start_paused = true)]
async fn what_the_store_does_not_take_is_sent_nevertheless() {
    let (broker, _hearing) = Broker::new();
    let told = Arc::new(Told::default());
    let outbox = open(&broker, 10, Some(&told)).await;
    let _running = run(&outbox);
    let full = told.holds();
    full.send(Err(Error::not_executed(
        ErrorKind::Outbox,
        "the disk is full",
    )))
    .unwrap();
    let failed = keep(&outbox, "a", reply(1, "full"), KeptTo::Send).await;
    assert_eq!(failed, Keeping::InMemory);
    let _hangs = told.holds();
    let began = Instant::now();
    let hung = keep(&outbox, "a", reply(2, "hangs"), KeptTo::Send).await;
    assert_eq!(hung, Keeping::InMemory);
    assert!(began.elapsed() < 5 * SECOND);
    settle().await;
    assert_eq!(broker.sent(), ["full", "hangs"]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_open_is_an_error_of_the_start() {
    let (broker, _hearing) = Broker::new();
    let told = Told {
        opens_never: true,
        ..Told::default()
    };
    let server = broker.server().outbox_store(Store(told.into()));
    let started = serve(server);
    let started = timeout_at(Instant::now() + 60 * SECOND, started).await;
    let error = started.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Outbox);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_leaves_its_store_to_the_next() {
    let (broker, _hearing) = Broker::new();
    broker.deliveries.lock().unwrap().take();
    let told = Arc::new(Told::default());
    let server = broker.server().exclusive();
    let started = serve(server.outbox_store(Store(Arc::clone(&told)))).await;
    assert_eq!(started.unwrap_err().kind(), ErrorKind::AlreadyOwned);
    assert!(told.closed.load(Ordering::SeqCst));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stands_by_sends_what_was_kept() {
    let (broker, _hearing) = Broker::new();
    broker.deliveries.lock().unwrap().take();
    let told = Told::default();
    told.found.lock().unwrap().push(KeptReply {
        to: to("a"),
        reply: reply(1, "of the last one"),
        unsent: true,
        kept_at: SystemTime::now(),
        lasts: 60 * SECOND,
    });
    let server = broker.server().standby().outbox_store(Store(told.into()));
    let standby = tokio::spawn(serve(server));
    sleep(SECOND).await;
    assert_eq!(broker.sent(), ["of the last one"]);
    assert!(!standby.is_finished());
    standby.abort();
}

async fn serve(server: Server) -> Result<RunningServer, Error> {
    let server = server
        .handle_raw("s", |body: Bytes| async move { Ok::<_, Fault>(body) })
        .method_raw("s", "waits", |body: Bytes, context: Context| async move {
            context.cancellation().cancelled().await;
            Ok::<_, Fault>(body)
        });
    server.start().await
}

fn request(method: Option<&str>) -> Request {
    Request {
        reply_to: Some(to("caller")),
        method: method.map(|name| crate::name::Method::new(name).unwrap()),
        ..Request::new(Deadline::after(60 * SECOND), "body")
    }
}

fn delivery(method: Option<&str>, ends: ErrorKind) -> Delivery {
    let expires = Some(Instant::now() + 60 * SECOND);
    let settlement = Box::new(Ends::with(Some(ends)));
    Delivery::new(request(method), 1, expires, settlement)
}

#[tokio::test(start_paused = true)]
async fn a_promise_that_nothing_ran_is_not_kept() {
    let (broker, hearing) = Broker::new();
    let server = serve(broker.server()).await.unwrap();
    broker.refuse(&to("caller"), ErrorKind::ConnectionLost);
    let deliver = |method| {
        hearing
            .deliveries
            .send(delivery(method, ErrorKind::ConnectionLost))
    };
    deliver(Some("nobodys")).unwrap();
    settle().await;
    assert_eq!(server.stats().faults, 1);
    assert_eq!(server.outbox.count(), 0);
    deliver(None).unwrap();
    settle().await;
    assert_eq!(server.outbox.count(), 1, "what was executed is");
    let stats = server.stats();
    assert_eq!((stats.unsettled, stats.not_kept), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_kept_counts_once() {
    let (broker, hearing) = Broker::new();
    let told = Arc::new(Told::default());
    let server = broker.server().outbox(0).outbox_store(Store(told));
    let server = serve(server).await.unwrap();
    broker.state.send_replace(ConnectionState::Disconnected {
        reason: "as it was told".into(),
    });
    for ends in [Some(ErrorKind::ConnectionLost), None] {
        let (delivery, end) = held_up(ends);
        hearing.deliveries.send(delivery).unwrap();
        settle().await;
        drop(end);
        settle().await;
        assert_eq!(server.stats().not_kept, 1);
    }
}

/// A request whose settlement ends when it may.
fn held_up(ends: Option<ErrorKind>) -> (Delivery, oneshot::Sender<()>) {
    let (may, end) = oneshot::channel();
    let settlement = Box::new(HeldUp(Mutex::new(end), Ends::with(ends)));
    let expires = Some(Instant::now() + 60 * SECOND);
    (Delivery::new(request(None), 1, expires, settlement), may)
}

#[derive(Debug)]
struct HeldUp(Mutex<oneshot::Receiver<()>>, Ends);

impl Settlement for HeldUp {
    fn settle(self: Box<Self>, settle: Settle, later: Later<'_>) -> Poll<Result<(), Unsettled>> {
        let Self(end, ends) = *self;
        let end = end.into_inner().unwrap();
        let settled = later.settled(&settle);
        tokio::spawn(async move {
            let _ = end.await;
            settled.tell(ends.result());
        });
        Poll::Pending
    }

    fn lease(&self) -> &FlaggedToken {
        self.1.lease()
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_kept_for_who_asked_all() {
    let (broker, hearing) = Broker::new();
    let server = serve(broker.server()).await.unwrap();
    broker.refuse(&to("caller"), ErrorKind::ConnectionLost);
    hearing.words.send(request(None)).unwrap();
    settle().await;
    assert_eq!(server.stats().handled, 1);
    assert_eq!(server.outbox.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_asked_handler_ends_when_its_caller_is_gone() {
    let (broker, hearing) = Broker::new();
    let server = serve(broker.server().heartbeat(SECOND)).await.unwrap();
    assert_eq!(request(None).signals, Signals::Running);
    hearing.words.send(request(Some("waits"))).unwrap();
    sleep(5 * SECOND).await;
    assert_eq!(server.stats().handled, 0);
    broker.refuse(&to("caller"), ErrorKind::NoResponder);
    sleep(2 * SECOND).await;
    assert_eq!(server.stats().handled, 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_no_more_is_not_told_that_it_may_have_the_service() {
    for (waits, told) in [(SECOND, 0), (60 * SECOND, 1)] {
        let (broker, hearing) = Broker::new();
        let server = broker.server().exclusive().drain_timeout(5 * SECOND);
        let _server = serve(server).await.unwrap();
        let held = Request {
            signals: Signals::None,
            ..request(Some("waits"))
        };
        let expires = Some(Instant::now() + 60 * SECOND);
        let held = Delivery::new(held, 1, expires, Box::new(Ends::with(None)));
        hearing.deliveries.send(held).unwrap();
        settle().await;
        let ask = Request {
            deadline: Some(Deadline::after(waits)),
            ..request(Some(crate::control::HAND_OVER))
        };
        hearing.words.send(ask).unwrap();
        settle().await;
        assert_eq!(broker.sent().len(), 0, "what is held is waited for");
        sleep(20 * SECOND).await;
        assert_eq!(broker.sent().len(), told);
    }
}

/// Leaves to the test how a settlement ends.
#[derive(Debug)]
struct Hands(mpsc::UnboundedSender<Settled>, FlaggedToken);

impl Settlement for Hands {
    fn settle(self: Box<Self>, settle: Settle, later: Later<'_>) -> Poll<Result<(), Unsettled>> {
        self.0.send(later.settled(&settle)).unwrap();
        Poll::Pending
    }

    fn lease(&self) -> &FlaggedToken {
        &self.1
    }
}

/// Requests whose settlements are handed to the test.
fn handed(count: usize) -> (Vec<Delivery>, mpsc::UnboundedReceiver<Settled>) {
    let (hands, settled) = mpsc::unbounded_channel();
    let expires = Some(Instant::now() + 60 * SECOND);
    let deliver = |_| {
        let settlement = Box::new(Hands(hands.clone(), FlaggedToken::new()));
        Delivery::new(request(None), 1, expires, settlement)
    };
    ((0..count).map(deliver).collect(), settled)
}

/// Has requests handled, and gives what tells the server that they are settled.
async fn under_way(hearing: &Hearing, count: usize) -> Vec<Settled> {
    let (deliveries, mut settled) = handed(count);
    for delivery in deliveries {
        hearing.deliveries.send(delivery).unwrap();
    }
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        all.push(settled.recv().await.unwrap());
    }
    all
}

fn lost(kind: ErrorKind) -> Result<(), Error> {
    Ends::with(Some(kind)).result()
}

#[tokio::test(start_paused = true)]
async fn any_thread_may_tell_how_a_settlement_ended() {
    let (broker, hearing) = Broker::new();
    let server = serve(broker.server()).await.unwrap();
    broker.refuse(&to("caller"), ErrorKind::ConnectionLost);
    let told = [
        Ok(()),
        lost(ErrorKind::ConnectionLost),
        lost(ErrorKind::LostLease),
        lost(ErrorKind::Broker),
    ];
    let all = under_way(&hearing, told.len()).await;
    // It has no runtime.
    let elsewhere = std::thread::spawn(move || {
        for (settled, told) in all.into_iter().zip(told) {
            settled.tell(told);
        }
    });
    elsewhere.join().unwrap();
    assert_eq!(server.outbox.count(), 2, "replies that were not sent");
    let stats = server.stats();
    assert_eq!((stats.unsettled, stats.lost_leases), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_settlement_of_which_nothing_is_told_is_over() {
    let (broker, hearing) = Broker::new();
    let server = serve(broker.server()).await.unwrap();
    drop(under_way(&hearing, 1).await);
    assert_eq!((server.stats().unsettled, server.outbox.count()), (1, 0));

    let (mut deliveries, settled) = handed(1);
    let reply = deliveries.remove(0).reply(None);
    let (error, ()) = tokio::join!(reply, async move {
        let mut settled = settled;
        drop(settled.recv().await);
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_settlements_and_a_kill_does_not() {
    let (broker, hearing) = Broker::new();
    let server = serve(broker.server()).await.unwrap();
    let all = under_way(&hearing, 2).await;
    let shutdown = tokio::spawn(server.shutdown());
    for settled in all {
        sleep(SECOND).await;
        assert!(!shutdown.is_finished());
        settled.tell(Ok(()));
    }
    settle().await;
    assert!(shutdown.is_finished());
    shutdown.await.unwrap().unwrap();

    let (broker, hearing) = Broker::new();
    let server = broker.server().drain_timeout(SECOND);
    let server = serve(server).await.unwrap();
    let counters = Arc::clone(&server.counters);
    let mut all = under_way(&hearing, 2).await;
    let begun = Instant::now();
    let error = server.shutdown().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    assert!(begun.elapsed() < SECOND + SECOND / 10);
    all.remove(0).tell(lost(ErrorKind::LostLease));
    drop(all);
    let stats = counters.stats();
    assert_eq!((stats.unsettled, stats.lost_leases), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_service_is_handed_over_when_what_it_replied_is_settled() {
    let (broker, hearing) = Broker::new();
    let server = broker.server().exclusive().grace(10 * SECOND);
    let _server = serve(server).await.unwrap();
    let all = under_way(&hearing, 1).await;
    let ask = request(Some(crate::control::HAND_OVER));
    hearing.words.send(ask).unwrap();
    sleep(5 * SECOND).await;
    assert_eq!(broker.sent().len(), 0);
    for settled in all {
        settled.tell(Ok(()));
    }
    settle().await;
    assert_eq!(broker.sent().len(), 1);
}
