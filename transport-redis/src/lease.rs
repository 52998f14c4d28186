//! Renews leases, on a thread and a connection of its own: a busy runtime must not cost a server its work.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use antiphon_core::{Error, ErrorKind};
use redis::{ConnectionLike, RedisResult, Value};

use crate::completer::millis;
use crate::connection::{self, Connector};
use crate::session::Session;
use crate::{QUEUE_TTL, error, scripts};

/// The sessions whose leases are renewed.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    sessions: Vec<Entry>,
    running: bool,
    closed: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    session: Arc<Session>,
    /// When its last renewal was asked for.
    renewed: Instant,
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
    /// Renews the lease of this session from now on; `since` is when it was asked for.
    pub(crate) fn add(
        self: &Arc<Self>,
        session: Arc<Session>,
        since: Instant,
        connector: &Arc<Connector>,
        lease: Duration,
    ) -> Result<(), Error> {
        let mut state = self.lock();
        if state.closed {
            return Err(error::closed());
        }
        state.sessions.push(Entry {
            session,
            renewed: since,
        });
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

    /// The sessions that are registered.
    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        let state = self.lock();
        state
            .sessions
            .iter()
            .map(|entry| &entry.session)
            .filter(|session| session.is_alive())
            .map(Arc::clone)
            .collect()
    }

    /// Ends the thread; no lease is renewed any more.
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for entry in state.sessions.drain(..) {
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
        let mut pause = lease / 3;
        while self.sleep(pause) {
            let entries = {
                let mut state = self.lock();
                state.sessions.retain(|entry| entry.session.is_alive());
                state.sessions.clone()
            };
            if entries.is_empty() {
                pause = lease / 3;
                continue;
            }
            let asked = Instant::now();
            match renew(&mut connection, connector, &entries, lease) {
                Ok(answers) => {
                    self.note(&entries, &answers, asked);
                    pause = lease / 3;
                }
                Err(error) => {
                    tracing::debug!(%error, "leases cannot be renewed");
                    connection = None;
                    pause = Duration::from_millis(50)
                        + connection::random_part((lease / 10).min(Duration::from_millis(450)));
                }
            }
            for entry in &self.lock().sessions {
                // By now the broker may have given its work to others, whether we could ask or not.
                if entry.renewed.elapsed() >= lease {
                    entry.session.lease.cancel();
                }
            }
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

    fn note(&self, asked_for: &[Entry], answers: &[Value], asked: Instant) {
        let mut state = self.lock();
        for (entry, answer) in asked_for.iter().zip(answers) {
            match answer {
                Value::Int(1) => {
                    let same = |other: &&mut Entry| Arc::ptr_eq(&other.session, &entry.session);
                    if let Some(entry) = state.sessions.iter_mut().find(same) {
                        entry.renewed = asked;
                    }
                }
                Value::Int(_) => entry.session.lease.cancel(),
                other => tracing::warn!(?other, "a lease was not renewed"),
            }
        }
    }
}

/// Renews all leases in one trip.
fn renew(
    connection: &mut Option<redis::Connection>,
    connector: &Connector,
    entries: &[Entry],
    lease: Duration,
) -> RedisResult<Vec<Value>> {
    // Two misses must fit into one lease.
    let answer = lease / 3;
    let open = match connection {
        Some(open) => open,
        None => {
            let mut open = connector.open_for_thread(answer)?;
            let loading = scripts::loading();
            open.req_packed_commands(&loading.get_packed_pipeline(), 0, loading.len())?;
            connection.insert(open)
        }
    };
    let mut pipeline = redis::Pipeline::with_capacity(entries.len());
    for Entry { session, .. } in entries {
        let mut command = scripts::BEAT.on(&[
            &session.keys.sessions,
            &session.keys.live,
            &session.held_key,
            &session.keys.owner,
        ]);
        command
            .arg(&session.name)
            .arg(millis(lease))
            .arg(millis(QUEUE_TTL));
        pipeline.add_command(command);
    }
    let answers = open.req_packed_commands(&pipeline.get_packed_pipeline(), 0, entries.len())?;
    match answers.iter().find_map(|answer| {
        if let Value::ServerError(error) = answer {
            Some(error)
        } else {
            None
        }
    }) {
        // The scripts may be gone: with a new connection they are loaded again.
        Some(error) => Err(error.clone().into()),
        None => Ok(answers),
    }
}
