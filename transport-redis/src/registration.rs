//! How the sessions of a subscription come on the registry of their service, and off it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use antiphon_core::transport::SubscribeMode;
use antiphon_core::{Error, ErrorKind};
use tokio::time::sleep_until;

use crate::command::Pipeline;
use crate::completer::{Item, millis};
use crate::connection::{self, Backoff};
use crate::session::{Session, Token};
use crate::settle_batch::{Reclaim, leave, reclaim};
use crate::settlement::RedisSettlement;
use crate::taker::Taker;
use crate::transport::Shared;
use crate::value::Value;
use crate::{QUEUE_TTL, error, scripts};

/// The most rounds of returning dead servers' work before an owner can be registered.
const JOIN_ROUNDS: usize = 16;

/// How long a registration may be on its way. What arrives later is refused: the session may be over by then, and nobody would
/// take it off the registry.
const JOIN_LIFE: Duration = Duration::from_secs(2);

/// Why a session could not be registered.
pub(crate) enum Refusal {
    /// It will not be, as things are.
    Final(Error),
    /// It may be, if it is tried again.
    ForNow(Error),
}

impl Taker {
    /// Takes a session off the registry that may be there and is not used.
    pub(crate) async fn undo(&self, session: &Arc<Session>) {
        session.lease.cancel();
        let mut pipeline = Pipeline::new();
        pipeline.add_command(leave(session));
        let answers = self.shared.link.try_execute(&pipeline).await;
        match answers.as_deref() {
            Some([Value::Int(_)]) => {}
            // Whoever may not even take it off could not put it on.
            Some([Value::ServerError(error)]) if error::is_lasting(error) => {}
            _ => self.shared.leases.add(Arc::clone(session), Instant::now()),
        }
    }

    /// Registers a session; as the successor of another one if that still owns the service.
    pub(crate) async fn join(
        &self,
        session: &Arc<Session>,
        follows: Option<&Session>,
    ) -> Result<(), Refusal> {
        let (exclusive, takes_over) = match self.options.mode {
            SubscribeMode::Shared => (false, false),
            SubscribeMode::Exclusive => (true, false),
            SubscribeMode::TakeOver => (true, true),
            other => {
                let message = format!("the mode {other:?} is not known to this transport");
                return Err(Refusal::Final(Error::not_executed(
                    ErrorKind::Unsupported,
                    message,
                )));
            }
        };
        let Shared {
            leases,
            connector,
            config,
            ..
        } = &*self.shared;
        leases
            .keep(connector, config.lease)
            .map_err(Refusal::ForNow)?;
        // The owner that is there at first: nobody who comes in between is fenced off.
        let mut fenced_off: Option<String> = None;
        for _ in 0..JOIN_ROUNDS {
            let live = self
                .shared
                .link
                .clone()
                .ready(&self.stopping)
                .await
                .ok_or_else(|| Refusal::Final(error::closed()))?;
            let mut pipeline = Pipeline::new();
            pipeline.cmd("TYPE").arg(&self.keys.queue);
            pipeline.cmd("HGET").arg(&self.keys.owner).arg("session");
            pipeline.cmd("TIME");
            let Ok(answers) = live.execute(&pipeline).await else {
                continue;
            };
            let [kind, owner, time] = answers.as_slice() else {
                continue;
            };
            if let Value::ServerError(error) = kind {
                return Err(Refusal::ForNow(error::refused(error)));
            }
            if !matches!(kind, Value::SimpleString(kind) if kind == "list" || kind == "none") {
                let message = format!("{} is not a list", self.keys.queue);
                return Err(Refusal::Final(Error::not_executed(
                    ErrorKind::Broker,
                    message,
                )));
            }
            let Some(micros) = connection::time_of(time) else {
                return Err(Refusal::ForNow(error::unexpected("TIME", time)));
            };
            if takes_over && fenced_off.is_none() {
                fenced_off = Some(match owner {
                    Value::BulkString(owner) => String::from_utf8_lossy(owner).into_owned(),
                    _ => String::new(),
                });
            }
            let fenced_off = fenced_off.as_deref().unwrap_or_default();
            let mut command = scripts::JOIN.on(&[
                &self.keys.sessions,
                &self.keys.live,
                &self.keys.owner,
                leases.sign_of_life(),
            ]);
            command
                .arg(&session.name)
                .arg(if exclusive { "exclusive" } else { "shared" })
                .arg(follows.map_or("", |follows| &follows.name))
                .arg(fenced_off);
            command.arg(millis(QUEUE_TTL)).arg(millis(config.lease));
            command.arg(micros / 1000 + millis(JOIN_LIFE));
            let mut pipeline = Pipeline::new();
            pipeline.add_command(command);
            let asked = Instant::now();
            let answers = live.execute(&pipeline).await;
            let Some(answer) = answers.ok().and_then(|mut answers| answers.pop()) else {
                // Nobody knows if the session was registered; asking again does no harm. But it may still be on its way: until
                // that is over the session can not be taken off the registry.
                let over = sleep_until((asked + JOIN_LIFE).into());
                self.shared.ending.run_until_cancelled(over).await;
                continue;
            };
            match answer {
                Value::Int(0..) => {
                    leases.add(Arc::clone(session), asked);
                    return Ok(());
                }
                // It was too long on its way.
                Value::Int(-2) => {}
                Value::Int(_) => {
                    let message = if exclusive {
                        "the service is served or owned by others"
                    } else {
                        "the service has an exclusive owner"
                    };
                    return Err(Refusal::Final(Error::not_executed(
                        ErrorKind::AlreadyOwned,
                        message,
                    )));
                }
                Value::Array(over) => {
                    let mut pipeline = Pipeline::new();
                    for name in over {
                        if let Value::BulkString(name) = name {
                            let name = String::from_utf8_lossy(&name);
                            let when = if name == fenced_off {
                                Reclaim::FencedOff
                            } else {
                                Reclaim::IfGone
                            };
                            pipeline.add_command(reclaim(&self.keys, &name, when));
                        }
                    }
                    // If it breaks, the next round finds out.
                    let _ = live.execute(&pipeline).await;
                }
                other => return Err(Refusal::ForNow(error::unexpected("JOIN", &other))),
            }
        }
        Err(Refusal::ForNow(Error::not_executed(
            ErrorKind::AlreadyOwned,
            "the service's former owner is still being cleared away",
        )))
    }

    /// Ends the taking of a session. What it holds stays settleable; what it took without our knowing goes back.
    pub(crate) async fn retire(&self, session: &Arc<Session>) {
        let mut pipeline = Pipeline::new();
        let keys = &self.keys;
        let mut command = scripts::QUIT.on(&[
            &keys.live,
            &session.held_key,
            &keys.queue,
            &keys.returned,
            &keys.bell,
        ]);
        command.arg(&session.name).arg(millis(QUEUE_TTL));
        pipeline.add_command(command);
        let mut backoff = Backoff::default();
        let tokens = loop {
            if session.lease.is_cancelled() {
                self.reclaim_own(session).await;
                return;
            }
            // At close the registry is cleared for all sessions at once, whether this succeeds or not.
            let ended = self.shared.ending.is_cancelled();
            let ready = async {
                if ended {
                    self.shared.link.now()
                } else {
                    self.shared.link.clone().ready(&self.shared.ending).await
                }
            };
            let Some(ready) = session.lease.run_until_cancelled(ready).await else {
                continue;
            };
            let Some(live) = ready else {
                return;
            };
            match live
                .execute(&pipeline)
                .await
                .map(|mut answers| answers.pop())
            {
                Ok(Some(Value::ServerError(error))) if !error::is_lasting(&error) && !ended => {
                    session.lease.run_until_cancelled(backoff.pause()).await;
                }
                Ok(answer) => break answer,
                Err(_) if ended => return,
                Err(_) => {}
            }
        };
        let tokens = match tokens {
            Some(Value::Array(tokens)) => tokens,
            _ => Vec::new(),
        };
        let parse = |token: &Value| match token {
            Value::BulkString(token) => Token::parse(token),
            _ => None,
        };
        let mut unknown: Vec<Token> = tokens
            .iter()
            .filter_map(parse)
            .filter(|token| token.number >= self.next)
            .collect();
        unknown.sort_by_key(|token| std::cmp::Reverse(token.number));
        session.hold(unknown.len());
        for token in unknown {
            let session = Arc::clone(session);
            let back = RedisSettlement::returned(session, token, token.attempt, QUEUE_TTL);
            self.shared.completer.push(Item::new(back));
        }
        if !session.retire() {
            return;
        }
        // At once and not by the completer: whoever waits for the end of a subscription may subscribe again.
        let mut pipeline = Pipeline::new();
        pipeline.add_command(leave(session));
        match self.shared.link.try_execute(&pipeline).await.as_deref() {
            Some([Value::Int(_)]) => session.leave(),
            _ => self.shared.completer.leave(Arc::clone(session)),
        }
    }

    /// Returns what a session of ours held whose lease is over by our clock. The broker may not think so.
    async fn reclaim_own(&self, session: &Session) {
        let mut pipeline = Pipeline::new();
        pipeline.add_command(leave(session));
        let mut backoff = Backoff::default();
        loop {
            let answers = self.shared.link.try_execute(&pipeline).await;
            if matches!(answers.as_deref(), Some([Value::Int(_)])) {
                session.leave();
                return;
            }
            // Once stopped this is left to the renewals.
            let pause = backoff.pause();
            if self.stopping.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }
}
