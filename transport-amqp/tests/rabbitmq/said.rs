//! What is said besides requests and replies: to every server of a service, to an inbox that is gone, and again and again by
//! who stands by. And that a plain call pays for none of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_core::transport::{Inbox, InboxEvent, Incoming, Outbound, SubscribeOptions};
use antiphon_core::{
    Client, ClientConfig, CorrelationId, Deadline, ErrorKind, Fault, Reply, ReplyAddress, Request,
    Server, ServiceName, Transport,
};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use crate::Verdict;
use crate::bench::{Bench, PROMPT, fresh};

fn service() -> ServiceName {
    ServiceName::new(&fresh("said")).unwrap()
}

fn word() -> Request {
    Request::new(Deadline::after(PROMPT), "word")
}

async fn heard(inbox: &mut Box<dyn Inbox>) -> InboxEvent {
    let event = tokio::time::timeout(PROMPT, inbox.recv()).await;
    event.expect("an event in time")
}

async fn hears(inbox: &mut Box<dyn Inbox>, service: &ServiceName, sent: &CorrelationId) {
    let InboxEvent::Replies(heard) = heard(inbox).await else {
        panic!("a request");
    };
    let [
        Incoming::Request {
            service: of,
            request,
        },
    ] = &heard[..]
    else {
        panic!("one request, not {heard:?}");
    };
    assert_eq!((of, &request.id), (service, sent));
    assert_eq!(&request.body[..], b"word");
    assert!(request.deadline.unwrap().budget <= PROMPT);
}

pub(crate) async fn who_has_joined_hears_it(bench: Bench) {
    let (service, other) = (service(), service());
    let transport = bench.connect().await;
    let nobody = transport.broadcast(&service, word()).await.unwrap();
    assert_eq!(nobody, Some(0));
    let mut inbox = transport.open_inbox().await.unwrap();
    inbox.join(&service).await.unwrap();
    inbox.join(&service).await.unwrap();
    let sent = word();
    let id = sent.id.clone();
    // Nobody consumes from the service's queue, so how many there are cannot be told.
    assert_eq!(transport.broadcast(&service, sent).await.unwrap(), None);
    hears(&mut inbox, &service, &id).await;
    let elsewhere = transport.broadcast(&other, word()).await.unwrap();
    assert_eq!(elsewhere, Some(0));
    drop(inbox);
    let gone = async || transport.broadcast(&service, word()).await.unwrap() == Some(0);
    crate::bench::eventually("its binding goes with it", gone).await;
}

/// The broker closes the channel of who publishes without the right to.
pub(crate) async fn who_may_not_say_it_costs_no_neighbour(bench: Bench) -> Verdict {
    let user = fresh("mute");
    bench.ctl(&["add_user", &user, "secret"]).await?;
    let everything_else = "^(?!amq\\.direct$).*";
    let rights = ["set_permissions", &user, ".*", everything_else, ".*"];
    bench.ctl(&rights).await?;
    let service = service();
    let _server = bench.fib(service.as_str()).await;
    let url = bench
        .broker
        .url()
        .replace("guest:guest", &format!("{user}:secret"));
    let config = AmqpConfig::from_url(&url).unwrap();
    let transport: Arc<dyn Transport> = Arc::new(AmqpTransport::connect(config).await.unwrap());
    let client = Client::open(Arc::clone(&transport), ClientConfig::default());
    let client = client.await.unwrap();
    for _ in 0..10 {
        let calls = (0..32).map(|_| client.call_raw(service.as_str(), "7").into_future());
        let (replies, refused) = tokio::join!(
            futures_util::future::join_all(calls),
            transport.broadcast(&service, word()),
        );
        for reply in replies {
            assert_eq!(&reply.unwrap().body[..], b"13");
        }
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Broker);
    }
    bench.ctl(&["delete_user", &user]).await?;
    Ok(())
}

pub(crate) async fn an_inbox_that_comes_back_has_joined(bench: Bench) -> Verdict {
    let (service, later) = (service(), service());
    let transport = bench.connect().await;
    let mut inbox = transport.open_inbox().await.unwrap();
    inbox.join(&service).await.unwrap();
    let delete = ["delete_queue", inbox.address().as_str()].map(str::to_owned);
    bench.ctl(&delete.each_ref().map(String::as_str)).await?;
    // Its queue is not there: it waits for the next one, and still tells what was lost.
    inbox.join(&later).await.unwrap();
    assert!(matches!(heard(&mut inbox).await, InboxEvent::Lost(_)));
    for service in [&service, &later] {
        let sent = word();
        let id = sent.id.clone();
        // Sent when the owner has heard of the loss, which it has when it asks for the next event.
        let sending = transport.broadcast(service, sent);
        let (sent, ()) = tokio::join!(sending, hears(&mut inbox, service, &id));
        assert_eq!(sent.unwrap(), None);
    }
    Ok(())
}

pub(crate) async fn a_reply_to_an_inbox_that_is_gone_is_told(bench: Bench) {
    let transport = bench.connect().await;
    let inbox = transport.open_inbox().await.unwrap();
    let say = async |to: &ReplyAddress| {
        let reply = Reply::value(CorrelationId::random(), "").into();
        let to = to.clone();
        transport.send(Outbound::Reply { to, reply }).await
    };
    say(&inbox.address()).await.unwrap();
    let nowhere = ReplyAddress::new("antiphon.inbox.nowhere").unwrap();
    let error = say(&nowhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoResponder);
}

/// More often than a connection has channels, so that none may be left behind; and in no time, for it asks but once each time.
pub(crate) async fn who_stands_by_leaves_nothing_behind(bench: Bench) {
    let service = service();
    let (owner, heir) = (bench.connect().await, bench.connect().await);
    let exclusive = SubscribeOptions::exclusive(1);
    let owned = owner.subscribe(&service, exclusive).await.unwrap();
    for _ in 0..2100 {
        let refused = heir.subscribe(&service, exclusive).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyOwned);
    }
    drop(owned);
    let takes_over = async || heir.subscribe(&service, exclusive).await.is_ok();
    crate::bench::eventually("it takes over", takes_over).await;
}

pub(crate) async fn a_plain_call_costs_no_further_command(bench: Bench) {
    const CALLS: usize = 100;
    const PUBLISH: (u16, u16) = (60, 40);
    const ACK: (u16, u16) = (60, 80);
    const QOS: (u16, u16) = (60, 10);
    let echo = |body: Bytes| async move { Ok::<_, Fault>(body) };
    let counter = Counter::start(bench.broker.authority()).await;
    let url = bench
        .broker
        .url()
        .replace(&bench.broker.authority(), &counter.address);
    let connect = async || {
        let config = AmqpConfig::from_url(&url).unwrap();
        Arc::new(AmqpTransport::connect(config).await.unwrap())
    };
    let service = service();
    let server = Server::new(connect().await).handle_raw(&service, echo);
    let _server = server.start().await.unwrap();
    let client = Client::open(connect().await, ClientConfig::default())
        .await
        .unwrap();
    client.call_raw(&service, "first").await.unwrap();
    // The first of them opened channels, and the last acknowledgement is asked about a moment later.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = counter.commands();
    for _ in 0..CALLS {
        client.call_raw(&service, "body").await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut sent = counter.commands();
    for (command, count) in before {
        *sent.entry(command).or_default() -= count;
    }
    sent.retain(|_, count| *count > 0);
    assert_eq!(sent.remove(&PUBLISH), Some(2 * CALLS), "{sent:?}");
    assert!(sent.remove(&ACK).unwrap_or_default() <= CALLS);
    // By which it is known that acknowledgements were read.
    assert!(sent.remove(&QOS).unwrap_or_default() <= CALLS);
    assert!(sent.is_empty(), "{sent:?}");
}

/// Commands sent to the broker, by the numbers of class and method.
type Commands = BTreeMap<(u16, u16), usize>;

/// A way to the broker that counts the commands on it.
struct Counter {
    address: String,
    commands: Arc<Mutex<Commands>>,
}

impl Counter {
    async fn start(broker: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let commands = Arc::<Mutex<Commands>>::default();
        let counted = Arc::clone(&commands);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&broker).await.unwrap();
                let (from_client, mut to_client) = client.into_split();
                let (mut from_server, to_server) = server.into_split();
                tokio::spawn(count(from_client, to_server, Arc::clone(&counted)));
                tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
                });
            }
        });
        Self { address, commands }
    }

    fn commands(&self) -> Commands {
        self.commands.lock().unwrap().clone()
    }
}

/// Forwards frames, and counts those that are methods.
async fn count(
    from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    counted: Arc<Mutex<Commands>>,
) -> std::io::Result<()> {
    let mut from = tokio::io::BufReader::new(from);
    let mut greeting = [0; 8];
    from.read_exact(&mut greeting).await?;
    to.write_all(&greeting).await?;
    loop {
        let mut header = [0; 7];
        from.read_exact(&mut header).await?;
        let [kind, _, _, size @ ..] = header;
        let mut payload = vec![0; u32::from_be_bytes(size) as usize + 1];
        from.read_exact(&mut payload).await?;
        if let (1, [class_high, class, method_high, method, ..]) = (kind, &payload[..]) {
            let class = u16::from_be_bytes([*class_high, *class]);
            let method = u16::from_be_bytes([*method_high, *method]);
            *counted.lock().unwrap().entry((class, method)).or_default() += 1;
        }
        to.write_all(&header).await?;
        to.write_all(&payload).await?;
    }
}
