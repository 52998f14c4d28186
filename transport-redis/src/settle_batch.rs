//! One trip of settlements: the commands, and what their answers mean.

use std::collections::HashMap;
use std::iter;
use std::sync::Arc;
use std::time::Duration;

use redis::RedisResult;

use crate::command::{Cmd, Pipeline};
use crate::completer::{ApartBody, Completer, End, FullEnd, Item, millis};
use crate::config::RedisConfig;
use crate::connection::Live;
use crate::naming::{self, InboxKeys, ServiceKeys};
use crate::session::Session;
use crate::value::Value;
use crate::{QUEUE_TTL, error, frame, scripts};

/// For how long the body of a dead letter is kept.
const DEAD_BODY_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// For how long an idle service's fencing number is kept.
const OWNER_TTL: Duration = Duration::from_secs(24 * 3600);

/// What a token takes in a command, more or less, and what another argument takes besides itself.
const TOKEN_BYTES: usize = 16;
const ARGUMENT_BYTES: usize = 8;

/// What is settled in one trip.
pub(crate) struct Batch {
    pub(crate) items: Vec<Item>,
    pub(crate) leaving: Vec<Arc<Session>>,
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
    pub(crate) async fn settle(
        self,
        live: Live,
        completer: Arc<Completer>,
        config: Arc<RedisConfig>,
    ) {
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
            let session = &item.session;
            if !probed.iter().any(|other| Arc::ptr_eq(other, session)) {
                pipeline
                    .cmd("SISMEMBER")
                    .arg(&session.keys.sessions)
                    .arg(&session.name);
                sent.push(Sent::Probe(Arc::clone(session)));
                probed.push(session);
            }
        }
        let mut groups: Vec<Group> = Vec::new();
        for item in self.items {
            match &item.end {
                End::Plain { .. } if item.alone => groups.push(Group::of(item)),
                End::Plain { .. } => match groups
                    .iter_mut()
                    .find(|group| !group.alone && Arc::ptr_eq(&group.session, &item.session))
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
                End::GiveBack { attempt } => {
                    let keys = &item.session.keys;
                    let mut command = scripts::GIVE_BACK.on(&[
                        &item.session.held_key,
                        &keys.queue,
                        &keys.returned,
                        &keys.bell,
                    ]);
                    command.arg(item.token).arg(*attempt).arg(millis(item.keep));
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
    /// It takes no second item.
    alone: bool,
    silent: Vec<Item>,
    inboxes: Vec<(InboxKeys, Vec<Item>)>,
    index: HashMap<InboxKeys, usize>,
}

impl Group {
    fn of(item: Item) -> Self {
        let session = Arc::clone(&item.session);
        let mut group = Self {
            session,
            alone: item.alone,
            silent: Vec::new(),
            inboxes: Vec::new(),
            index: HashMap::new(),
        };
        group.add(item);
        group
    }

    fn add(&mut self, item: Item) {
        let (End::Plain { reply: Some(_) }, Some(inbox)) = (&item.end, &item.reply_to) else {
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
        let replies = || self.inboxes.iter().flat_map(|(_, replies)| replies);
        let bytes = TOKEN_BYTES * self.silent.len()
            + replies()
                .map(|item| TOKEN_BYTES + ARGUMENT_BYTES + item.end.size())
                .sum::<usize>();
        let mut command;
        let mut frame = Vec::new();
        if self
            .silent
            .iter()
            .chain(replies())
            .any(|item| item.repeated)
        {
            command = scripts::DONE.on(&keys);
            command.reserve(bytes);
            command.arg(ttl).arg(self.silent.len());
            for item in &self.silent {
                command.arg(item.token);
            }
            for (_, replies) in &self.inboxes {
                command.arg(replies.len());
                for item in replies {
                    encode(item, &mut frame);
                    command.arg(item.token).arg(&frame[..]);
                }
            }
        } else {
            command = scripts::DONE_ALL.on(&keys);
            command.reserve(bytes);
            command.arg(ttl).arg(self.silent.len() + replies().count());
            for item in self.silent.iter().chain(replies()) {
                command.arg(item.token);
            }
            for (_, replies) in &self.inboxes {
                command.arg(replies.len());
                for item in replies {
                    encode(item, &mut frame);
                    command.arg(&frame[..]);
                }
            }
        }
        let mut items = self.silent;
        for (_, replies) in self.inboxes {
            items.extend(replies);
        }
        (command, items)
    }
}

/// Writes the reply of a small end in place of what was there.
fn encode(item: &Item, frame: &mut Vec<u8>) {
    frame.clear();
    if let End::Plain { reply: Some(reply) } = &item.end {
        frame::encode_reply(reply, None, frame);
    }
}

fn put(body: &ApartBody, ttl: u64) -> Cmd {
    if body.by_script {
        let mut command = scripts::PUT.on(&[&body.key]);
        command.body(&body.bytes).arg(ttl);
        return command;
    }
    let mut command = Cmd::new("SET");
    command.arg(&body.key).body(&body.bytes).arg("PX").arg(ttl);
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
        .arg(item.token)
        .arg(letters)
        .arg(reply)
        .arg(head);
    command
        .arg(config.dead_letters.max(1))
        .arg(millis(DEAD_BODY_TTL));
    command
}

/// When a session is ended.
#[derive(Clone, Copy)]
pub(crate) enum Reclaim {
    /// If its process is gone.
    IfGone = 0,
    /// At once, by its own process.
    Own = 1,
    /// At once, by another process, though its own may live; that one is told to see to its sessions.
    FencedOff = 2,
}

/// Ends a session of ours, and returns what it may still hold with the attempt counted.
pub(crate) fn leave(session: &Session) -> Cmd {
    reclaim(&session.keys, &session.name, Reclaim::Own)
}

/// Ends the session of that name, and returns what it held with the attempt counted.
pub(crate) fn reclaim(keys: &ServiceKeys, name: &str, when: Reclaim) -> Cmd {
    let held = keys.held(name);
    let sign_of_life = naming::sign_of_life(naming::process_of(name));
    let keys = [
        &keys.sessions,
        &keys.live,
        &keys.holding,
        &keys.owner,
        &held,
        &keys.returned,
        &keys.bell,
        &sign_of_life,
    ]
    .map(String::as_str);
    let mut command = scripts::RECLAIM.on(&keys);
    command
        .arg(name)
        .arg(when as u8)
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
    let mut refused = error::first_refusal(&answers).is_some();
    for (entry, answer) in sent.into_iter().zip(answers) {
        match entry {
            Sent::Body => {}
            Sent::Probe(session) => {
                if answer == Value::Int(0) {
                    session.lease.cancel();
                }
            }
            Sent::Leave(session) => match answer {
                Value::ServerError(error) if !error::is_lasting(&error) => leaving.push(session),
                // Refused for good, it may be granted another time.
                Value::ServerError(_) => session.lease.cancel(),
                _ => session.leave(),
            },
            Sent::Many(items) => match &answer {
                Value::Int(held) => settled(items, iter::repeat(*held == 1), completer),
                Value::BulkString(bits) if bits.len() == items.len() => {
                    settled(items, bits.iter().map(|&bit| bit == b'1'), completer);
                }
                other => again.extend(unsettled(items, other, completer)),
            },
            Sent::One(mut item) => match answer {
                Value::Int(2) => {
                    if let End::Full(full) = &mut item.end
                        && let Some(body) = &mut full.reply_body
                    {
                        refused |= body.by_script;
                        body.by_script = true;
                    }
                    again.push(item);
                }
                Value::Int(bit) => settled(vec![item], [bit == 1], completer),
                other => again.extend(unsettled(vec![item], &other, completer)),
            },
        }
    }
    completer.note(refused);
    if !again.is_empty() || !leaving.is_empty() {
        completer.put_back(again, leaving);
    }
}

/// Ends items of one session, each with whether the session had it.
fn settled(items: Vec<Item>, held: impl IntoIterator<Item = bool>, completer: &Completer) {
    let Some(first) = items.first() else {
        return;
    };
    let session = Arc::clone(&first.session);
    let_go(&session, items.len(), completer);
    for (mut item, held) in items.into_iter().zip(held) {
        // What was asked twice and is no longer held was settled the first time, as long as the lease stands.
        item.tell(
            if held || (item.repeated && !session.lease.is_cancelled()) {
                Ok(())
            } else {
                // Only a monitor takes what a session holds, and it takes all.
                session.lease.cancel();
                Err(error::lost_lease())
            },
        );
    }
}

/// What is to be asked of items that Redis refused to settle. None of them is let go while its session may still hold it:
/// the lease would be renewed, and the request in nobody's hands.
fn unsettled(items: Vec<Item>, answer: &Value, completer: &Completer) -> Vec<Item> {
    if let Value::ServerError(error) = answer
        && !error::is_lasting(error)
    {
        tracing::debug!(code = error.code(), "settling is tried again");
        return items;
    }
    let is_single = items.len() == 1;
    let mut again = Vec::new();
    for mut item in items {
        if !is_single {
            // One of them may be the reason.
            item.alone = true;
            again.push(item);
            continue;
        }
        let error = error::unexpected("settling", answer);
        tracing::warn!(%error, "a delivery could not be settled");
        if let End::GiveBack { .. } = item.end {
            // Only the end of the session helps: then all that it holds goes back.
            item.session.lease.cancel();
            let_go(&item.session, 1, completer);
            item.tell(Err(error));
        } else {
            item.tell(Err(error));
            item.keep = QUEUE_TTL;
            item.end = End::GiveBack {
                attempt: item.token.attempt.saturating_add(1),
            };
            again.push(item);
        }
    }
    again
}

fn let_go(session: &Arc<Session>, count: usize, completer: &Completer) {
    if session.let_go(count) {
        completer.leave(Arc::clone(session));
    }
}
