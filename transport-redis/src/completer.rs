//! Settles deliveries: whatever has piled up, in one trip.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon_core::Error;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::{Cmd, Pipeline, RedisResult, Value};
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use crate::config::RedisConfig;
use crate::connection::{Link, Live};
use crate::naming::{InboxKeys, ServiceKeys};
use crate::session::{Session, Token};
use crate::{QUEUE_TTL, error, scripts};

/// The most settlements of one batch. Lua unpacks no more than about 8,000 values.
const BATCH_MAX: usize = 512;

/// The most bytes of replies in one batch, more or less.
const BATCH_BYTES: usize = 1 << 20;

/// The most batches under way at once.
const WAVES: usize = 2;

/// For how long the body of a dead letter is kept.
const DEAD_BODY_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// For how long an idle service's fencing number is kept.
pub(crate) const OWNER_TTL: Duration = Duration::from_secs(24 * 3600);

/// One request to settle.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) session: Arc<Session>,
    pub(crate) token: Token,
    pub(crate) end: End,
    pub(crate) done: Option<oneshot::Sender<Result<(), Error>>>,
    /// It was written before, and nobody knows if it was executed.
    repeated: bool,
}

impl Item {
    pub(crate) fn new(
        session: Arc<Session>,
        token: Token,
        end: End,
        done: Option<oneshot::Sender<Result<(), Error>>>,
    ) -> Self {
        Self {
            session,
            token,
            end,
            done,
            repeated: false,
        }
    }

    fn finish(self, result: Result<(), Error>) {
        if let Some(done) = self.done {
            // Nobody waits for a settlement whose future was dropped.
            let _ = done.send(result);
        }
    }

    fn size(&self) -> usize {
        match &self.end {
            End::Plain {
                reply: Some((_, frame)),
            } => frame.len(),
            End::Plain { reply: None } | End::GiveBack { .. } => 0,
            End::Full(full) => full.reply_body.as_ref().map_or(0, |body| body.bytes.len()),
        }
    }
}

/// How a request ends.
#[derive(Debug)]
pub(crate) enum End {
    /// With a small reply or none: moved in batches.
    Plain { reply: Option<(InboxKeys, Vec<u8>)> },
    /// With more to it.
    Full(Box<FullEnd>),
    /// Back to the service, for this attempt, to be kept there this long.
    GiveBack { attempt: u32, keep: Duration },
}

/// An end with bodies in their own keys, or in the dead letters.
#[derive(Debug, Default)]
pub(crate) struct FullEnd {
    pub(crate) reply: Option<(InboxKeys, Vec<u8>)>,
    pub(crate) reply_body: Option<ApartBody>,
    /// The key of the request's body.
    pub(crate) request_body: Option<String>,
    /// The head of the dead letter.
    pub(crate) dead: Option<Vec<u8>>,
}

/// A body in its own key.
#[derive(Debug)]
pub(crate) struct ApartBody {
    pub(crate) key: String,
    pub(crate) bytes: Bytes,
    /// The plain SET was refused, for lack of memory.
    by_script: bool,
}

impl ApartBody {
    pub(crate) fn new(key: String, bytes: Bytes) -> Self {
        Self {
            key,
            bytes,
            by_script: false,
        }
    }
}

/// The queue of settlements.
#[derive(Debug, Default)]
pub(crate) struct Completer {
    queue: Mutex<Queue>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    items: Vec<Item>,
    leaving: Vec<Arc<Session>>,
    closed: bool,
}

impl Completer {
    /// Settles, soon.
    pub(crate) fn push(&self, item: Item) {
        let mut queue = self.lock();
        if queue.closed {
            drop(queue);
            item.session.let_go();
            item.finish(Err(error::closed()));
            return;
        }
        queue.items.push(item);
        drop(queue);
        self.arrived.notify_one();
    }

    /// Takes a session that is over off the registry.
    pub(crate) fn leave(&self, session: Arc<Session>) {
        self.lock().leaving.push(session);
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        let queue = self.lock();
        queue.items.is_empty() && queue.leaving.is_empty()
    }

    /// Takes the next batch.
    fn take(&self) -> Batch {
        let mut queue = self.lock();
        let mut bytes = 0;
        let count = queue
            .items
            .iter()
            .take(BATCH_MAX)
            .take_while(|item| {
                let fits = bytes < BATCH_BYTES;
                bytes += item.size();
                fits
            })
            .count();
        let rest = queue.items.split_off(count);
        let items = mem::replace(&mut queue.items, rest);
        Batch {
            items,
            leaving: mem::take(&mut queue.leaving),
        }
    }

    /// Puts back what may not have been executed.
    fn put_back(&self, mut items: Vec<Item>, leaving: Vec<Arc<Session>>) {
        for item in &mut items {
            item.repeated = true;
        }
        let mut queue = self.lock();
        items.append(&mut queue.items);
        queue.items = items;
        queue.leaving.extend(leaving);
    }

    /// Ends the queue: what is still in it was not settled.
    fn close(&self) {
        let items = {
            let mut queue = self.lock();
            queue.closed = true;
            mem::take(&mut queue.items)
        };
        for item in items {
            item.session.let_go();
            item.finish(Err(error::closed()));
        }
    }

    /// Settles until `ending`, then what is there if there is a connection, and no more.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut link: Link,
        config: Arc<RedisConfig>,
        ending: CancellationToken,
    ) {
        let mut waves = FuturesUnordered::new();
        loop {
            let room = waves.len() < WAVES;
            if room && !self.is_empty() {
                self.drop_lost();
                let live = match link.now() {
                    Some(live) => Some(live),
                    None if ending.is_cancelled() => None,
                    // Leases may end while there is no connection, so this does not wait for ever.
                    None => tokio::time::timeout(Duration::from_millis(100), link.ready(&ending))
                        .await
                        .ok()
                        .flatten(),
                };
                match live {
                    Some(live) => waves.push(self.take().settle(
                        live,
                        Arc::clone(&self),
                        Arc::clone(&config),
                    )),
                    None if ending.is_cancelled() => break,
                    None => {}
                }
                continue;
            }
            if ending.is_cancelled() && waves.is_empty() {
                break;
            }
            tokio::select! {
                Some(()) = waves.next() => {}
                () = self.arrived.notified(), if room => {}
                () = ending.cancelled(), if !ending.is_cancelled() => {}
            }
        }
        self.close();
    }

    /// Ends what belongs to lost leases, without asking.
    fn drop_lost(&self) {
        let mut lost = Vec::new();
        {
            let mut queue = self.lock();
            if queue
                .items
                .iter()
                .any(|item| item.session.lease.is_cancelled())
            {
                let items = mem::take(&mut queue.items);
                let (gone, kept) = items
                    .into_iter()
                    .partition(|item| item.session.lease.is_cancelled());
                queue.items = kept;
                lost = gone;
            }
            queue
                .leaving
                .retain(|session| !session.lease.is_cancelled());
        }
        for item in lost {
            item.session.let_go();
            item.finish(Err(error::lost_lease()));
        }
    }
}

/// What is settled in one trip.
struct Batch {
    items: Vec<Item>,
    leaving: Vec<Arc<Session>>,
}

/// One command of the pipeline, and the items that it settles, in the order of its answer.
enum Sent {
    /// A body; its item follows by itself.
    Body,
    /// Is the session still registered? Asked for what may have been settled before.
    Probe(Arc<Session>),
    Many(Vec<Item>),
    One(Item),
    Leave(Arc<Session>),
}

impl Batch {
    async fn settle(self, mut live: Live, completer: Arc<Completer>, config: Arc<RedisConfig>) {
        let (pipeline, sent) = self.commands(&config);
        if pipeline.is_empty() {
            return;
        }
        let answers = live.execute(&pipeline).await;
        conclude(answers, sent, &completer);
    }

    fn commands(self, config: &RedisConfig) -> (Pipeline, Vec<Sent>) {
        let mut pipeline = Pipeline::new();
        let mut sent = Vec::new();
        let ttl = millis(config.inbox_ttl);
        let mut probed: Vec<&Arc<Session>> = Vec::new();
        for item in self.items.iter().filter(|item| item.repeated) {
            let Item { session, .. } = item;
            if !probed.iter().any(|other| Arc::ptr_eq(other, session)) {
                pipeline
                    .cmd("ZSCORE")
                    .arg(&session.keys.sessions)
                    .arg(&session.name);
                sent.push(Sent::Probe(Arc::clone(session)));
                probed.push(session);
            }
        }
        let mut groups: Vec<Group> = Vec::new();
        for item in self.items {
            match &item.end {
                End::Plain { .. } => match groups
                    .iter_mut()
                    .find(|group| Arc::ptr_eq(&group.session, &item.session))
                {
                    Some(group) => group.add(item),
                    None => groups.push(Group::of(item)),
                },
                End::Full(full) => {
                    if let Some(body) = &full.reply_body {
                        pipeline.add_command(put(body, ttl));
                        sent.push(Sent::Body);
                    }
                    pipeline.add_command(settle(&item, full, ttl, config));
                    sent.push(Sent::One(item));
                }
                End::GiveBack { attempt, keep } => {
                    let keys = &item.session.keys;
                    let mut command = scripts::GIVE_BACK.on(&[
                        &item.session.held_key,
                        &keys.queue,
                        &keys.returned,
                        &keys.bell,
                    ]);
                    command
                        .arg(item.token.to_string())
                        .arg(*attempt)
                        .arg(millis(*keep));
                    pipeline.add_command(command);
                    sent.push(Sent::One(item));
                }
            }
        }
        for group in groups {
            let (command, items) = group.into_command(ttl);
            pipeline.add_command(command);
            sent.push(Sent::Many(items));
        }
        for session in self.leaving {
            pipeline.add_command(leave(&session));
            sent.push(Sent::Leave(session));
        }
        (pipeline, sent)
    }
}

/// The small ends of one session.
struct Group {
    session: Arc<Session>,
    silent: Vec<Item>,
    inboxes: Vec<(InboxKeys, Vec<Item>)>,
    index: HashMap<InboxKeys, usize>,
}

impl Group {
    fn of(item: Item) -> Self {
        let session = Arc::clone(&item.session);
        let mut group = Self {
            session,
            silent: Vec::new(),
            inboxes: Vec::new(),
            index: HashMap::new(),
        };
        group.add(item);
        group
    }

    fn add(&mut self, item: Item) {
        let End::Plain {
            reply: Some((inbox, _)),
        } = &item.end
        else {
            self.silent.push(item);
            return;
        };
        // Most batches are for one client, whose index is the last one.
        if let Some((last, items)) = self.inboxes.last_mut()
            && last == inbox
        {
            items.push(item);
            return;
        }
        let next = self.inboxes.len();
        let at = *self.index.entry(inbox.clone()).or_insert(next);
        match self.inboxes.get_mut(at) {
            Some((_, items)) => items.push(item),
            None => self.inboxes.push((inbox.clone(), vec![item])),
        }
    }

    fn into_command(self, ttl: u64) -> (Cmd, Vec<Item>) {
        let bells: Vec<String> = self.inboxes.iter().map(|(inbox, _)| inbox.bell()).collect();
        let mut keys: Vec<&str> = vec![&self.session.held_key];
        for ((inbox, _), bell) in self.inboxes.iter().zip(&bells) {
            keys.extend([inbox.list(), bell]);
        }
        let mut command = scripts::DONE.on(&keys);
        command.arg(ttl).arg(self.silent.len());
        for item in &self.silent {
            command.arg(item.token.to_string());
        }
        let mut items = self.silent;
        for (_, replies) in self.inboxes {
            command.arg(replies.len());
            for item in &replies {
                command.arg(item.token.to_string());
                if let End::Plain {
                    reply: Some((_, frame)),
                } = &item.end
                {
                    command.arg(frame.as_slice());
                }
            }
            items.extend(replies);
        }
        (command, items)
    }
}

fn put(body: &ApartBody, ttl: u64) -> Cmd {
    if body.by_script {
        let mut command = scripts::PUT.on(&[&body.key]);
        command.arg(&body.bytes[..]).arg(ttl);
        return command;
    }
    let mut command = redis::cmd("SET");
    command
        .arg(&body.key)
        .arg(&body.bytes[..])
        .arg("PX")
        .arg(ttl);
    command
}

fn settle(item: &Item, full: &FullEnd, ttl: u64, config: &RedisConfig) -> Cmd {
    let bell = full.reply.as_ref().map(|(inbox, _)| inbox.bell());
    let mut letters = String::new();
    let mut keys: Vec<&str> = vec![&item.session.held_key];
    if let (Some((inbox, _)), Some(bell)) = (&full.reply, &bell) {
        letters.push('i');
        keys.extend([inbox.list(), bell]);
    }
    if let Some(body) = &full.reply_body {
        letters.push('b');
        keys.push(&body.key);
    }
    if let Some(key) = &full.request_body {
        letters.push('q');
        keys.push(key);
    }
    if full.dead.is_some() {
        letters.push('d');
        keys.push(&item.session.keys.dead);
    }
    let mut command = scripts::SETTLE.on(&keys);
    let reply = full.reply.as_ref().map_or(&[][..], |(_, frame)| frame);
    let head = full.dead.as_deref().unwrap_or_default();
    command
        .arg(ttl)
        .arg(item.token.to_string())
        .arg(letters)
        .arg(reply)
        .arg(head);
    command
        .arg(config.dead_letters.max(1))
        .arg(millis(DEAD_BODY_TTL));
    command
}

/// Ends a session, and returns what it may still hold with the attempt counted.
pub(crate) fn leave(session: &Session) -> Cmd {
    reclaim(&session.keys, &session.name, true)
}

/// Ends the session of that name if its lease is over, or if `at_once`.
pub(crate) fn reclaim(keys: &ServiceKeys, name: &str, at_once: bool) -> Cmd {
    let held = keys.held(name);
    let keys = [
        &keys.sessions,
        &keys.live,
        &keys.owner,
        &held,
        &keys.returned,
        &keys.bell,
    ]
    .map(String::as_str);
    let mut command = scripts::RECLAIM.on(&keys);
    command
        .arg(name)
        .arg(u8::from(at_once))
        .arg(millis(QUEUE_TTL))
        .arg(millis(OWNER_TTL));
    command
}

/// Tells everybody how it ended.
fn conclude(answers: RedisResult<Vec<Value>>, sent: Vec<Sent>, completer: &Completer) {
    let mut again = Vec::new();
    let mut leaving = Vec::new();
    let answers = match answers {
        Ok(answers) => answers,
        Err(error) => {
            // Nobody knows what of it was executed. It is asked again until the lease is over: what is no longer held
            // then had been settled.
            tracing::debug!(%error, "settling is tried again");
            for entry in sent {
                match entry {
                    Sent::Body | Sent::Probe(_) => {}
                    Sent::Many(items) => again.extend(items),
                    Sent::One(item) => again.push(item),
                    Sent::Leave(session) => leaving.push(session),
                }
            }
            completer.put_back(again, leaving);
            return;
        }
    };
    for (entry, answer) in sent.into_iter().zip(answers) {
        match entry {
            Sent::Body => {}
            Sent::Probe(session) => {
                if answer == Value::Nil {
                    session.lease.cancel();
                }
            }
            Sent::Leave(session) => session.leave(),
            Sent::Many(items) => match &answer {
                Value::BulkString(bits) if bits.len() == items.len() => {
                    for (item, &bit) in items.into_iter().zip(bits) {
                        settled(item, bit == b'1', completer);
                    }
                }
                other => {
                    for item in items {
                        failed(item, error::unexpected("DONE", other), completer);
                    }
                }
            },
            Sent::One(mut item) => match answer {
                Value::Int(2) => {
                    if let End::Full(full) = &mut item.end
                        && let Some(body) = &mut full.reply_body
                    {
                        body.by_script = true;
                    }
                    again.push(item);
                }
                Value::Int(bit) => settled(item, bit == 1, completer),
                other => failed(item, error::unexpected("SETTLE", &other), completer),
            },
        }
    }
    if !again.is_empty() {
        completer.put_back(again, leaving);
    }
}

fn settled(item: Item, held: bool, completer: &Completer) {
    // What was asked twice and is no longer held was settled the first time, as long as the lease stands.
    let result = if held || (item.repeated && !item.session.lease.is_cancelled()) {
        Ok(())
    } else {
        // Only a monitor takes what a session holds, and it takes all.
        item.session.lease.cancel();
        Err(error::lost_lease())
    };
    let_go(item, result, completer);
}

fn failed(item: Item, error: Error, completer: &Completer) {
    tracing::warn!(%error, "a delivery could not be settled");
    let_go(item, Err(error), completer);
}

fn let_go(item: Item, result: Result<(), Error>, completer: &Completer) {
    if item.session.let_go() {
        completer.leave(Arc::clone(&item.session));
    }
    item.finish(result);
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
