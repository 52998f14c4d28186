//! Servers one after another over one outbox.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use antiphon_core::transport::{InboxEvent, Incoming};
use antiphon_core::{
    Client, ClientConfig, CorrelationId, ErrorKind, Fault, KeptReply, OutboxChange, OutboxStore,
    Reply, ReplyAddress, RunningServer, Server, Transport,
};
use antiphon_memory::{MemoryConfig, MemoryTransport};
use antiphon_outbox::DiskOutbox;
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// No step takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

struct File(PathBuf);

impl File {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("antiphon-outbox-{}", CorrelationId::random())))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[derive(Clone, Default)]
struct Work {
    started: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
    gate: Arc<Gate>,
}

struct Gate(Semaphore);

impl Default for Gate {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Work {
    async fn serve(&self, transport: &MemoryTransport, file: &File) -> RunningServer {
        let work = self.clone();
        let handler = move |body: Bytes| {
            let work = work.clone();
            async move {
                work.started.fetch_add(1, Ordering::SeqCst);
                let _ = work.gate.0.acquire().await;
                work.ended.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Fault>(body)
            }
        };
        let server = Server::new(Arc::new(transport.clone()))
            .outbox_store(DiskOutbox::new(&file.0))
            .handle_raw("work", handler);
        server.start().await.unwrap()
    }
}

async fn connect(broker: &str) -> MemoryTransport {
    let config = MemoryConfig::from_url(&format!("memory://{broker}")).unwrap();
    MemoryTransport::connect(config).await.unwrap()
}

async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let seen = async {
        while !condition().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, seen).await.is_ok(), "{what}");
}

fn is(counter: &AtomicUsize, count: usize) -> impl AsyncFn() -> bool {
    async move || counter.load(Ordering::SeqCst) == count
}

#[tokio::test]
async fn the_next_server_answers_what_the_last_one_finished() {
    let (file, work) = (File::new(), Work::default());
    let broker = CorrelationId::random().to_string();
    let (first, second) = (connect(&broker).await, connect(&broker).await);
    let client = Client::open(Arc::new(connect(&broker).await), ClientConfig::default());
    let client = client.await.unwrap();
    let server = work.serve(&first, &file).await;
    let calls: Vec<_> = (0..20)
        .map(|number| {
            let call = client.call_raw("work", number.to_string());
            tokio::spawn(call.into_future())
        })
        .collect();
    eventually("all start", is(&work.started, 20)).await;
    first.cut();
    work.gate.0.add_permits(1000);
    // Whose lease was lost is asked for nothing more, so that the server drains at once.
    timeout(PATIENCE, server.shutdown()).await.unwrap().unwrap();
    assert_eq!(work.ended.load(Ordering::SeqCst), 20);

    let server = work.serve(&second, &file).await;
    for (number, call) in calls.into_iter().enumerate() {
        let reply = timeout(PATIENCE, call).await.unwrap().unwrap().unwrap();
        assert_eq!(reply.body, number.to_string());
    }
    assert_eq!(work.started.load(Ordering::SeqCst), 20, "none runs again");
    // What its caller has is not kept any longer.
    let kept = async || {
        let stats = client.node_stats("work").at_most(1).await.unwrap();
        stats.answers[0].result.as_ref().unwrap().kept_replies
    };
    eventually("nothing is kept", async || kept().await == 0).await;
    timeout(PATIENCE, server.shutdown()).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_outbox_in_use_is_told_before_it_serves() {
    let (file, work) = (File::new(), Work::default());
    let broker = CorrelationId::random().to_string();
    let transport = connect(&broker).await;
    let server = work.serve(&transport, &file).await;
    let second = Server::new(Arc::new(transport.clone()))
        .outbox_store(DiskOutbox::new(&file.0))
        .handle_raw("other", async |body: Bytes| Ok::<_, Fault>(body));
    let error = second.start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Outbox, "{error}");
    let client = Client::open(Arc::new(transport.clone()), ClientConfig::default());
    let call = client
        .await
        .unwrap()
        .call_raw("other", "")
        .expect_responder();
    assert_eq!(call.await.unwrap_err().kind(), ErrorKind::NoResponder);

    // After a shutdown the file is free at once; and a server that is only dropped leaves it soon.
    server.shutdown().await.unwrap();
    let server = work.serve(&transport, &file).await;
    drop(server);
    let server = work.serve(&transport, &file).await;
    server.shutdown().await.unwrap();
}

/// What is in the file, without a server.
async fn contents(file: &File) -> Vec<KeptReply> {
    let store = DiskOutbox::new(&file.0);
    let mut found = store.open().await.unwrap();
    store.close().await;
    found.sort_by_key(|kept| kept.kept_at);
    found
}

async fn fill(file: &File, replies: Vec<KeptReply>) {
    let store = DiskOutbox::new(&file.0);
    store.open().await.unwrap();
    for kept in replies {
        store
            .write(OutboxChange::Keep(Box::new(kept)))
            .await
            .unwrap();
    }
    store.close().await;
}

fn kept(to: &ReplyAddress, body: &'static str, age: Duration, lasts: Duration) -> KeptReply {
    KeptReply {
        to: to.clone(),
        reply: Reply::value(CorrelationId::random(), body).into(),
        unsent: true,
        kept_at: SystemTime::now() - age,
        lasts,
    }
}

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn what_was_to_be_sent_is_sent_and_what_expired_is_not() {
    let file = File::new();
    let broker = CorrelationId::random().to_string();
    let (transport, caller) = (connect(&broker).await, connect(&broker).await);
    let mut inbox = caller.open_inbox().await.unwrap();
    let to = inbox.address();
    let gone = ReplyAddress::new(&to.as_str().replace(|c: char| c.is_ascii_digit(), "0")).unwrap();
    fill(
        &file,
        vec![
            kept(&to, "first", 3 * MINUTE, 4 * MINUTE),
            kept(&to, "expired", 2 * MINUTE, MINUTE),
            kept(&gone, "of a caller that is gone", MINUTE, 4 * MINUTE),
            kept(&to, "last", Duration::ZERO, MINUTE),
        ],
    )
    .await;
    let work = Work::default();
    let server = work.serve(&transport, &file).await;
    let mut heard = Vec::new();
    while heard.len() < 2 {
        match timeout(PATIENCE, inbox.recv()).await.unwrap() {
            InboxEvent::Replies(replies) => heard.extend(replies),
            other => panic!("{other:?}"),
        }
    }
    let body = |incoming: &Incoming| match incoming {
        Incoming::Reply(reply) => reply.body.clone(),
        other => panic!("{other:?}"),
    };
    let heard: Vec<_> = heard.iter().map(body).collect();
    assert_eq!(heard, ["first", "last"]);
    server.shutdown().await.unwrap();

    let left = contents(&file).await;
    let left: Vec<_> = left
        .iter()
        .map(|kept| (kept.reply.body.clone(), kept.unsent))
        .collect();
    let sent = |body: &'static str| (Bytes::from(body), false);
    assert_eq!(
        left,
        [
            sent("first"),
            sent("of a caller that is gone"),
            sent("last")
        ],
        "none is sent by the next server, and each answers its request until it expires"
    );
}

#[tokio::test]
async fn the_bounds_hold_on_disk() {
    let file = File::new();
    let transport = connect(&CorrelationId::random().to_string()).await;
    let to = ReplyAddress::new("of nobody").unwrap();
    let replies = ["1", "2", "3", "4"].map(|body| kept(&to, body, Duration::ZERO, MINUTE));
    fill(&file, replies.to_vec()).await;
    let server = Server::new(Arc::new(transport.clone()))
        .outbox_store(DiskOutbox::new(&file.0))
        .outbox(2)
        .handle_raw("work", async |body: Bytes| Ok::<_, Fault>(body));
    server.start().await.unwrap().shutdown().await.unwrap();
    assert_eq!(contents(&file).await.len(), 2);
}
