//! Publishing with confirms: what happened to each message, told to the one who published it.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::ShortString;

use crate::press::{PressChannel, Unsent};
use crate::slip::{Refusal, Told};
use crate::wire::Destination;

/// Plain peers that have no inbox give addresses that begin so.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// A message for one queue, or for all that are bound to an exchange by the key in its place.
#[derive(Debug)]
pub(crate) struct Message {
    /// Empty: the broker's own, which knows every queue by its name.
    pub(crate) exchange: ShortString,
    pub(crate) queue: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is in its queue.
    Accepted,
    /// The broker has no room for it.
    Refused,
    /// It fits into no frame that this broker takes, and was not sent.
    Unwritable,
    /// There is no such queue.
    Returned,
    /// The channel died before the broker's word; with `refused`, the broker closed the channel alone, so that some message on it
    /// may be the reason.
    Lost { refused: Option<Refusal> },
}

/// So many confirmed messages may stand behind one that is not.
const EMPTY_MAX: usize = 1024;

/// A channel on which all is confirmed, owned by one task.
#[derive(Debug)]
pub(crate) struct Outlet<T> {
    channel: PressChannel,
    /// The tag of the next message.
    next: u64,
    /// What was published and not confirmed, in the order of its tags. Without a slot: confirmed before what was published before it.
    waiting: VecDeque<Waiting<T>>,
    /// How many of them have no slot. They go when they are the most: the broker may never speak of the one in front of them.
    empty: usize,
    /// What no channel would take.
    unwritable: Vec<T>,
    /// How many of both there are, their bytes, and how many of them are to wake who waits.
    pending: usize,
    bytes: usize,
    prompt: usize,
}

#[derive(Debug)]
struct Waiting<T> {
    tag: u64,
    slot: Option<Slot<T>>,
}

#[derive(Debug)]
struct Slot<T> {
    token: T,
    /// By these the broker's return is known.
    queue: ShortString,
    properties: BasicProperties,
    bytes: usize,
    prompt: bool,
    returned: bool,
}

impl<T> Outlet<T> {
    pub(crate) fn new(channel: PressChannel) -> Self {
        Self {
            channel,
            // The broker counts from 1 on each channel.
            next: 1,
            waiting: VecDeque::new(),
            empty: 0,
            unwritable: Vec::new(),
            pending: 0,
            bytes: 0,
            prompt: 0,
        }
    }

    /// False once nothing can be published any more.
    pub(crate) fn is_open(&self) -> bool {
        self.channel.is_open()
    }

    /// How many messages wait for the broker's word, and their bytes.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.pending, self.bytes)
    }

    /// Publishes a message; what became of it comes from [`sweep`](Self::sweep), with the token. With `prompt`,
    /// [`poll_prompt`](Self::poll_prompt) wakes as soon as it is known.
    ///
    /// # Errors
    /// The token, if certainly nothing was sent.
    pub(crate) fn publish(&mut self, message: Message, prompt: bool, token: T) -> Result<(), T> {
        let Message {
            exchange,
            queue,
            properties,
            body,
        } = message;
        let to = Destination {
            exchange: exchange.as_str(),
            routing_key: queue.as_str(),
            // The broker hands what is for a pseudo-queue over by itself, and then finds that no queue took it.
            mandatory: !queue.as_str().starts_with(DIRECT_REPLY_TO),
        };
        match self.channel.publish(to, &properties, &body) {
            Ok(()) => {}
            Err(Unsent::Closed) => return Err(token),
            Err(Unsent::Unwritable(reason)) => {
                tracing::error!(reason, "a message that cannot be written");
                self.pending += 1;
                self.unwritable.push(token);
                return Ok(());
            }
        }
        self.pending += 1;
        self.bytes += body.len();
        self.prompt += usize::from(prompt);
        let slot = Slot {
            token,
            queue,
            properties,
            bytes: body.len(),
            prompt,
            returned: false,
        };
        self.waiting.push_back(Waiting {
            tag: self.next,
            slot: Some(slot),
        });
        self.next += 1;
        Ok(())
    }

    /// Ready when there may be news of a prompt message, or the channel is closed: time for a sweep.
    pub(crate) fn poll_prompt(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.prompt {
            0 => Poll::Pending,
            _ => self.channel.poll_told(cx),
        }
    }

    /// Takes out all messages whose fate is known.
    pub(crate) fn sweep(&mut self, fates: &mut Vec<(T, Fate)>) {
        self.pending -= self.unwritable.len();
        let unwritable = self.unwritable.drain(..);
        fates.extend(unwritable.map(|token| (token, Fate::Unwritable)));
        for told in self.channel.take_told() {
            match told {
                Told::Acked { tag, multiple } => self.confirm(tag, multiple, true, fates),
                Told::Nacked { tag, multiple } => self.confirm(tag, multiple, false, fates),
                Told::Returned {
                    routing_key,
                    correlation,
                } => self.come_back(&routing_key, correlation.as_ref()),
            }
        }
    }

    /// Takes out all messages; what is not known by now never will be. For a channel that is dead, or not needed any more.
    pub(crate) fn abandon(mut self, fates: &mut Vec<(T, Fate)>) {
        // Confirms that came just before the channel died.
        self.sweep(fates);
        let refused = self.channel.refusal();
        let left = self.waiting.into_iter().filter_map(|waiting| waiting.slot);
        fates.extend(left.map(|slot| {
            let fate = match slot.returned {
                true => Fate::Returned,
                false => Fate::Lost {
                    refused: refused.clone(),
                },
            };
            (slot.token, fate)
        }));
    }

    fn confirm(&mut self, tag: u64, multiple: bool, accepted: bool, fates: &mut Vec<(T, Fate)>) {
        let first = match multiple {
            true => 0,
            false => self.waiting.partition_point(|waiting| waiting.tag < tag),
        };
        let end = self.waiting.partition_point(|waiting| waiting.tag <= tag);
        for waiting in self.waiting.range_mut(first.min(end)..end) {
            if let Some(slot) = waiting.slot.take() {
                self.empty += 1;
                self.pending -= 1;
                self.bytes -= slot.bytes;
                self.prompt -= usize::from(slot.prompt);
                fates.push(slot.into_fate(accepted));
            }
        }
        while let Some(Waiting { slot: None, .. }) = self.waiting.front() {
            self.waiting.pop_front();
            self.empty -= 1;
        }
        if self.empty > EMPTY_MAX.max(self.waiting.len() / 2) {
            self.waiting.retain(|waiting| waiting.slot.is_some());
            self.empty = 0;
        }
    }

    /// The broker does not say which message it was, but what was in it. It comes before its confirm.
    fn come_back(&mut self, routing_key: &ShortString, correlation: Option<&ShortString>) {
        let slots = self.waiting.iter_mut();
        let slot = slots
            .filter_map(|waiting| waiting.slot.as_mut())
            .find(|slot| {
                !slot.returned
                    && slot.queue == *routing_key
                    && slot.properties.correlation_id().as_ref() == correlation
            });
        match slot {
            Some(slot) => slot.returned = true,
            None => tracing::warn!("a returned message that nobody sent"),
        }
    }
}

impl<T> Slot<T> {
    fn into_fate(self, accepted: bool) -> (T, Fate) {
        let fate = match (self.returned, accepted) {
            (true, _) => Fate::Returned,
            (false, true) => Fate::Accepted,
            (false, false) => Fate::Refused,
        };
        (self.token, fate)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame};
    use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection};
    use lapin::types::{AMQPValue, FieldTable};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::watch;
    use tokio::time::timeout;

    use super::*;
    use crate::config::AmqpConfig;
    use crate::dial::Dialler;
    use crate::error::Failure;
    use crate::link::Life;
    use crate::press::Press;
    use crate::wire::{self, Frame};

    const LIMIT: Duration = Duration::from_secs(10);

    /// The other end, which says what it is told to.
    struct Broker {
        stream: TcpStream,
        input: Vec<u8>,
    }

    impl Broker {
        async fn accept(listener: TcpListener) -> Self {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut header = [0; 8];
            stream.read_exact(&mut header).await.unwrap();
            assert_eq!(&header, b"AMQP\0\0\x09\x01");
            let input = Vec::new();
            let mut broker = Self { stream, input };
            let start = connection::Start {
                version_major: 0,
                version_minor: 9,
                mechanisms: "PLAIN".into(),
                locales: "en_US".into(),
                ..connection::Start::default()
            };
            broker.say_here(connection::AMQPMethod::Start(start)).await;
            let method = broker.method().await;
            let AMQPClass::Connection(connection::AMQPMethod::StartOk(ok)) = method else {
                panic!("{method:?}");
            };
            assert_eq!(ok.response.as_bytes(), b"\0guest\0guest");
            broker
        }

        async fn open(listener: TcpListener) -> Self {
            Self::open_with(listener, 1).await
        }

        /// With a heartbeat of so many seconds.
        async fn open_with(listener: TcpListener, heartbeat: u16) -> Self {
            let mut broker = Self::accept(listener).await;
            let tune = connection::Tune {
                channel_max: 8,
                frame_max: 4096,
                heartbeat,
            };
            broker.say_here(connection::AMQPMethod::Tune(tune)).await;
            for _ in ["connection.tune-ok", "connection.open"] {
                broker.method().await;
            }
            let ok = connection::AMQPMethod::OpenOk(connection::OpenOk {});
            broker.say_here(ok).await;
            broker
        }

        async fn open_channel(&mut self, id: u16) {
            for _ in ["channel.open", "confirm.select"] {
                self.method().await;
            }
            let ok = channel::AMQPMethod::OpenOk(channel::OpenOk {});
            self.say(id, AMQPClass::Channel(ok)).await;
            let ok = confirm::AMQPMethod::SelectOk(confirm::SelectOk {});
            self.say(id, AMQPClass::Confirm(ok)).await;
        }

        async fn say_here(&mut self, method: connection::AMQPMethod) {
            self.say(0, AMQPClass::Connection(method)).await;
        }

        async fn say(&mut self, id: u16, method: AMQPClass) {
            self.say_frame(&AMQPFrame::Method(id, method)).await;
        }

        async fn say_frame(&mut self, frame: &AMQPFrame) {
            let mut out = Vec::new();
            wire::put_frame(&mut out, frame).unwrap();
            self.stream.write_all(&out).await.unwrap();
        }

        /// All that was said until the end.
        async fn heard(&mut self) -> Vec<u8> {
            // A connection that is cut may end in an error.
            let _ = self.stream.read_to_end(&mut self.input).await;
            std::mem::take(&mut self.input)
        }

        /// The next method that is heard, whatever else comes before it.
        async fn method(&mut self) -> AMQPClass {
            loop {
                if let Some((frame, length)) = wire::take_frame(&self.input).unwrap() {
                    self.input.drain(..length);
                    match frame {
                        Frame::Other(AMQPFrame::Method(_, method)) => return method,
                        _ => continue,
                    }
                }
                let read = self.stream.read_buf(&mut self.input).await.unwrap();
                assert!(read > 0, "nothing more is said");
            }
        }
    }

    /// Connects to a broker that is played by `play`.
    async fn connect<F: Future<Output = Broker>>(
        play: impl FnOnce(TcpListener) -> F,
    ) -> (Result<Press, Failure>, Broker) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = AmqpConfig::from_url(&format!("amqp://{address}")).unwrap();
        let dialler = Dialler::new(&config).await.unwrap();
        let press = Press::begin(&dialler, "publish", 1, watch::Sender::new(None));
        timeout(LIMIT, async { tokio::join!(press, play(listener)) })
            .await
            .expect("a handshake")
    }

    async fn outlet(press: &Press, broker: &mut Broker, id: u16) -> Outlet<u32> {
        let (channel, ()) = tokio::join!(press.channel(), broker.open_channel(id));
        Outlet::new(channel.unwrap())
    }

    fn publish(outlet: &mut Outlet<u32>, tokens: impl IntoIterator<Item = u32>) {
        for token in tokens {
            let message = Message {
                exchange: ShortString::default(),
                queue: "inbox".into(),
                properties: BasicProperties::default()
                    .with_correlation_id(token.to_string().into()),
                body: Bytes::from_static(b"body"),
            };
            outlet.publish(message, true, token).unwrap();
        }
    }

    /// More than a frame holds.
    fn large_headers() -> FieldTable {
        let mut table = FieldTable::default();
        let large = AMQPValue::LongString("x".repeat(4096).into());
        table.insert("large".into(), large);
        table
    }

    async fn fates(outlet: &mut Outlet<u32>, count: usize) -> Vec<(u32, Fate)> {
        let mut fates = Vec::new();
        let all = async {
            while fates.len() < count {
                poll_fn(|cx| outlet.poll_prompt(cx)).await;
                outlet.sweep(&mut fates);
            }
        };
        timeout(LIMIT, all).await.expect("the broker's word");
        fates
    }

    /// RabbitMQ may never speak of a message to a quorum queue that has no majority.
    #[tokio::test]
    async fn a_message_of_which_the_broker_never_speaks_keeps_no_place_for_the_others() {
        let (press, mut broker) = connect(Broker::open).await;
        let press = press.unwrap();
        let mut outlet = outlet(&press, &mut broker, 1).await;
        let last = 2 * u32::try_from(EMPTY_MAX).unwrap();
        publish(&mut outlet, 1..=last);
        for delivery_tag in 2..=last {
            broker.method().await;
            let ack = basic::Ack {
                delivery_tag: delivery_tag.into(),
                multiple: false,
            };
            broker
                .say(1, AMQPClass::Basic(basic::AMQPMethod::Ack(ack)))
                .await;
        }
        assert_eq!(
            fates(&mut outlet, EMPTY_MAX * 2 - 1).await.len(),
            EMPTY_MAX * 2 - 1
        );
        assert_eq!(outlet.pending().0, 1);
        assert!(
            outlet.waiting.len() <= EMPTY_MAX + 1,
            "{}",
            outlet.waiting.len()
        );
    }

    #[tokio::test]
    async fn the_word_of_the_broker_finds_its_message() {
        let (press, mut broker) = connect(Broker::open).await;
        let press = press.unwrap();
        let mut outlet = outlet(&press, &mut broker, 1).await;
        publish(&mut outlet, 1..=5);
        for _ in 1..=5 {
            broker.method().await;
        }
        let nack = basic::Nack {
            delivery_tag: 2,
            multiple: false,
            requeue: false,
        };
        let ack = |delivery_tag, multiple| {
            let ack = basic::Ack {
                delivery_tag,
                multiple,
            };
            AMQPClass::Basic(basic::AMQPMethod::Ack(ack))
        };
        let nack = AMQPClass::Basic(basic::AMQPMethod::Nack(nack));
        broker.say(1, nack).await;
        broker.say(1, ack(3, true)).await;
        assert_eq!(
            fates(&mut outlet, 3).await,
            [(2, Fate::Refused), (1, Fate::Accepted), (3, Fate::Accepted)]
        );
        assert_eq!(outlet.pending(), (2, 8));
        // Out of order, and the last one comes back first.
        let returned = basic::Return {
            routing_key: "inbox".into(),
            ..basic::Return::default()
        };
        let returned = AMQPClass::Basic(basic::AMQPMethod::Return(returned));
        broker.say(1, returned).await;
        let header = AMQPContentHeader {
            class_id: 60,
            body_size: 4,
            properties: BasicProperties::default().with_correlation_id("5".into()),
        };
        broker.say_frame(&AMQPFrame::Header(1, header)).await;
        broker
            .say_frame(&AMQPFrame::Body(1, b"body".to_vec()))
            .await;
        broker.say(1, ack(5, false)).await;
        assert_eq!(fates(&mut outlet, 1).await, [(5, Fate::Returned)]);
        broker.say(1, ack(4, false)).await;
        assert_eq!(fates(&mut outlet, 1).await, [(4, Fate::Accepted)]);
        assert_eq!((outlet.pending(), outlet.waiting.len()), ((0, 0), 0));
        let long = Message {
            exchange: ShortString::default(),
            queue: "inbox".into(),
            properties: BasicProperties::default().with_headers(large_headers()),
            body: Bytes::new(),
        };
        outlet.publish(long, true, 7).unwrap();
        publish(&mut outlet, [6]);
        let mut known = Vec::new();
        outlet.sweep(&mut known);
        assert_eq!(known, [(7, Fate::Unwritable)]);
        broker.say(1, ack(6, true)).await;
        assert_eq!(fates(&mut outlet, 1).await, [(6, Fate::Accepted)]);
    }

    #[tokio::test]
    async fn a_channel_that_the_broker_closes_is_the_only_one() {
        let (press, mut broker) = connect(Broker::open).await;
        let press = press.unwrap();
        let mut first = outlet(&press, &mut broker, 1).await;
        let mut second = outlet(&press, &mut broker, 2).await;
        publish(&mut first, [1]);
        publish(&mut second, [2]);
        let close = channel::Close {
            reply_code: 406,
            reply_text: "PRECONDITION_FAILED".into(),
            class_id: 60,
            method_id: 40,
        };
        let close = AMQPClass::Channel(channel::AMQPMethod::Close(close));
        broker.say(1, close).await;
        // It wakes who waits for the word on what was published.
        let woken = poll_fn(|cx| first.poll_prompt(cx));
        timeout(LIMIT, woken).await.expect("the end of the channel");
        assert!(!first.is_open() && second.is_open());
        let mut known = Vec::new();
        first.abandon(&mut known);
        let refused = Some(Refusal {
            code: 406,
            text: "PRECONDITION_FAILED".into(),
        });
        assert_eq!(known, [(1, Fate::Lost { refused })]);
        loop {
            let method = broker.method().await;
            if let AMQPClass::Channel(channel::AMQPMethod::CloseOk(_)) = method {
                break;
            }
        }

        drop(broker);
        timeout(LIMIT, press.over())
            .await
            .expect("the end of the connection");
        let late = Message {
            exchange: ShortString::default(),
            queue: "inbox".into(),
            properties: BasicProperties::default(),
            body: Bytes::new(),
        };
        assert_eq!(second.publish(late, true, 3), Err(3));
        known.clear();
        second.abandon(&mut known);
        assert_eq!(known, [(2, Fate::Lost { refused: None })]);
        press.channel().await.unwrap_err();
    }

    /// What stands before it is with the system, and nobody can say how much of it has arrived.
    #[tokio::test]
    async fn a_broker_that_speaks_has_longer_to_open_a_channel() {
        let (press, mut broker) = connect(|listener| Broker::open_with(listener, 4)).await;
        let press = press.unwrap();
        let begun = tokio::time::Instant::now();
        let slow = async {
            for _ in ["channel.open", "confirm.select"] {
                broker.method().await;
            }
            // Longer than a silent one has.
            while begun.elapsed() < Duration::from_secs(6) {
                broker.say_frame(&AMQPFrame::Heartbeat).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let ok = confirm::AMQPMethod::SelectOk(confirm::SelectOk {});
            broker.say(1, AMQPClass::Confirm(ok)).await;
        };
        let (opened, ()) = tokio::join!(press.channel(), slow);
        opened.unwrap();
        // But not for ever, and that is the end of the connection.
        let never = async {
            loop {
                broker.say_frame(&AMQPFrame::Heartbeat).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let given_up = timeout(2 * LIMIT, async {
            tokio::select! {
                opened = press.channel() => opened,
                () = never => unreachable!("it goes on"),
            }
        });
        let failure = given_up.await.expect("an end").unwrap_err();
        assert!(matches!(failure, Failure::TimedOut(_)), "{failure}");
        assert!(timeout(LIMIT, press.over()).await.is_ok());
    }

    #[tokio::test]
    async fn who_is_not_wanted_is_told_why() {
        let (refused, _broker) = connect(async |listener| {
            let mut broker = Broker::accept(listener).await;
            let close = connection::Close {
                reply_code: 403,
                reply_text: "ACCESS_REFUSED".into(),
                class_id: 0,
                method_id: 0,
            };
            broker.say_here(connection::AMQPMethod::Close(close)).await;
            broker
        })
        .await;
        assert!(refused.unwrap_err().is(403));
    }

    #[tokio::test]
    async fn a_broker_that_falls_silent_is_given_up() {
        let (press, mut broker) = connect(Broker::open).await;
        let press = press.unwrap();
        // Two heartbeats, of a second each.
        let over = timeout(LIMIT, press.over());
        let reason = over.await.expect("the end of the connection");
        assert!(reason.contains("silent"), "{reason}");
        // It was not silent itself.
        assert_eq!(
            wire::take_frame(&broker.heard().await).unwrap().unwrap().0,
            Frame::Other(AMQPFrame::Heartbeat)
        );
    }
}
