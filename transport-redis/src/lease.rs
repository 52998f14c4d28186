//! Shows that this process lives, on a thread and a connection of its own: a busy runtime must not cost a server its work.
//!
//! There is one sign of life for all sessions, so that what it costs does not grow with them. While it is there nobody ends
//! a session of this process. If it was gone for a while, any of them may have been ended, so each one asks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use antiphon_core::{Error, ErrorKind};
use redis::{ConnectionLike, RedisResult};

use crate::command::{Cmd, Pipeline};
use crate::completer::millis;
use crate::connection::{self, Connector};
use crate::session::Session;
use crate::settle_batch::leave;
use crate::value::Value;
use crate::{QUEUE_TTL, error, scripts};

/// What a renewal writes into the sign of life. If the next one finds anything else, the sign was gone, was made by another
/// step, or an owner was fenced off.
const STEADY: &str = "1";

/// The sessions of this process, and its sign of life.
#[derive(Debug)]
pub(crate) struct Leases {
    sign_of_life: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    sessions: Vec<Entry>,
    /// When the renewal was asked for that was granted last.
    renewed: Option<Instant>,
    /// The sign of life may have been gone, and not every session has asked since.
    in_doubt: bool,
    /// How often that was so.
    gone: u64,
    /// Whose turn it is to be seen to, of the sessions that hold nothing.
    turn: usize,
    running: bool,
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    session: Arc<Session>,
    /// When it was registered, or later.
    since: Instant,
    /// It may not be taken off the registry: that is tried in turn.
    refused: bool,
}

/// What is asked for in one trip, beside the sign of life.
#[derive(Default)]
struct Round {
    beaten: Vec<Arc<Session>>,
    ended: Vec<Arc<Session>>,
    all: bool,
}

/// Ends the renewals when it is dropped: also with the runtime, when nobody is left to settle what is held.
#[derive(Debug)]
pub(crate) struct LeasesGuard(pub(crate) Arc<Leases>);

impl Drop for LeasesGuard {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Leases {
    pub(crate) fn new(sign_of_life: String) -> Self {
        Self {
            sign_of_life,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn sign_of_life(&self) -> &str {
        &self.sign_of_life
    }

    /// How often the sign of life may have been gone: then what others saw of this process may be forgotten.
    pub(crate) fn gone(&self) -> u64 {
        self.lock().gone
    }

    /// Renews the sign of life from now on, until the end.
    pub(crate) fn keep(
        self: &Arc<Self>,
        connector: &Arc<Connector>,
        lease: Duration,
    ) -> Result<(), Error> {
        let mut state = self.lock();
        if state.closed {
            return Err(error::closed());
        }
        if !state.running {
            let (leases, connector) = (Arc::clone(self), Arc::clone(connector));
            let thread = thread::Builder::new().name("antiphon-lease".to_owned());
            thread
                .spawn(move || leases.run(&connector, lease))
                .map_err(|source| {
                    Error::not_executed(ErrorKind::Overloaded, "no thread for renewing leases")
                        .with_source(source)
                })?;
            state.running = true;
        }
        Ok(())
    }

    /// The sign of life is renewed, or was.
    pub(crate) fn are_kept(&self) -> bool {
        self.lock().running
    }

    /// This session was registered; `since` is when that was asked for. It is seen to until it has left.
    pub(crate) fn add(&self, session: Arc<Session>, since: Instant) {
        let mut state = self.lock();
        if state.closed {
            session.lease.cancel();
        }
        state.sessions.push(Entry {
            session,
            since,
            refused: false,
        });
    }

    /// The sessions that may be registered.
    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        let state = self.lock();
        let sessions = state.sessions.iter().map(|entry| &entry.session);
        sessions
            .filter(|session| !session.has_left())
            .map(Arc::clone)
            .collect()
    }

    /// Ends the thread, and all leases: nothing is renewed any more.
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for entry in &state.sessions {
            entry.session.lease.cancel();
        }
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, connector: &Connector, lease: Duration) {
        let mut connection = None;
        // At first the shared connection has just done it.
        let mut load = false;
        let mut pause = lease / 3;
        while self.sleep(pause) {
            let round = self.lock().round();
            let asked = Instant::now();
            match self.renew(&mut connection, load, connector, &round, lease) {
                Ok(answers) => {
                    let in_doubt = self.lock().note(&round, &answers, asked);
                    pause = if in_doubt { Duration::ZERO } else { lease / 3 };
                }
                Err(error) => {
                    tracing::debug!(%error, "leases cannot be renewed");
                    connection = None;
                    load = true;
                    // A renewal whose answer is lost may have found that the sign was gone, and made it again.
                    self.lock().doubt();
                    pause = Duration::from_millis(50)
                        + connection::random_part((lease / 10).min(Duration::from_millis(450)));
                }
            }
            self.lock().end_overdue(lease);
        }
    }

    /// Waits; false once closed.
    fn sleep(&self, pause: Duration) -> bool {
        let state = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(state, pause, |state| !state.closed);
        !waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// Asks in one trip. Gives the answers, that about the sign of life first.
    fn renew(
        &self,
        connection: &mut Option<redis::Connection>,
        load: bool,
        connector: &Connector,
        round: &Round,
        lease: Duration,
    ) -> RedisResult<Vec<Value>> {
        // Two misses must fit into one lease.
        let answer = lease / 3;
        let open = match connection {
            Some(open) => open,
            None => {
                let mut open = connector.open_for_thread(answer)?;
                if load {
                    let loading = scripts::loading();
                    open.req_packed_commands(&loading.packed(), 0, loading.len())?;
                }
                connection.insert(open)
            }
        };
        let mut pipeline = Pipeline::new();
        let mut sign = scripts::SIGN.on(&[&self.sign_of_life]);
        sign.arg(STEADY).arg(millis(lease));
        pipeline.add_command(sign);
        for session in &round.beaten {
            pipeline.add_command(beat(session));
        }
        for session in &round.ended {
            pipeline.add_command(leave(session));
        }
        let answers = open.req_packed_commands(&pipeline.packed(), 0, pipeline.len())?;
        let answers: Vec<_> = answers.into_iter().map(Value::from).collect();
        // What is refused for a while is refused for all; if scripts are gone, they are loaded again with a new connection. What
        // is refused for good, but for the sign of life, concerns one session: it must not cost the others their leases.
        for (index, answer) in answers.iter().enumerate() {
            if let Value::ServerError(error) = answer
                && (index == 0 || !error::is_lasting(error))
            {
                return Err(error.clone().into());
            }
        }
        Ok(answers)
    }
}

impl State {
    /// Those that hold work are seen to each time, and of the others one in turn.
    fn round(&mut self) -> Round {
        self.sessions.retain(|entry| !entry.session.has_left());
        let mut round = Round {
            all: self.in_doubt,
            ..Round::default()
        };
        self.turn = (self.turn + 1) % self.sessions.len().max(1);
        for (index, entry) in self.sessions.iter().enumerate() {
            let (session, in_turn) = (&entry.session, index == self.turn);
            if session.lease.is_cancelled() {
                // Whoever let it go may have been unable to take it off the registry.
                if !entry.refused || in_turn {
                    round.ended.push(Arc::clone(session));
                }
            } else if self.in_doubt || session.is_holding() || in_turn {
                round.beaten.push(Arc::clone(session));
            }
        }
        round
    }

    /// Takes the answers in; true if the sessions are in doubt.
    fn note(&mut self, round: &Round, answers: &[Value], asked: Instant) -> bool {
        let mut answers = answers.iter();
        self.renewed = Some(asked);
        if round.all {
            self.in_doubt = false;
        }
        if answers.next() != Some(&Value::BulkString(STEADY.into())) {
            self.doubt();
        }
        for (session, answer) in round.beaten.iter().zip(&mut answers) {
            if *answer != Value::Int(1) {
                session.lease.cancel();
            }
        }
        for (session, answer) in round.ended.iter().zip(answers) {
            if let Value::ServerError(_) = answer {
                let mut entries = self.sessions.iter_mut();
                if let Some(entry) = entries.find(|entry| Arc::ptr_eq(&entry.session, session)) {
                    entry.refused = true;
                }
            } else {
                session.leave();
            }
        }
        self.in_doubt
    }

    /// From here on every session has to ask for itself, once.
    fn doubt(&mut self) {
        self.in_doubt = true;
        self.gone += 1;
    }

    /// By now the broker may have given their work to others, whether we could ask or not.
    fn end_overdue(&self, lease: Duration) {
        for Entry { session, since, .. } in &self.sessions {
            let renewed = self.renewed.map_or(*since, |renewed| renewed.max(*since));
            if renewed.elapsed() >= lease {
                session.lease.cancel();
            }
        }
    }
}

fn beat(session: &Session) -> Cmd {
    let mut command = scripts::BEAT.on(&[
        &session.keys.sessions,
        &session.keys.live,
        &session.keys.holding,
        &session.held_key,
        &session.keys.owner,
    ]);
    command.arg(&session.name).arg(millis(QUEUE_TTL));
    command
}
