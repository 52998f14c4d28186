//! What the floors over Redis send: the reply's list, a number, and the body. And how they connect.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, IntoConnectionInfo};
use tokio::sync::oneshot;

use crate::Failure;

/// A connection that may wait for ever.
pub(super) async fn connect(url: &str) -> Result<MultiplexedConnection, Failure> {
    let info = url
        .into_connection_info()?
        .set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let client = redis::Client::open(info)?;
    Ok(client
        .get_multiplexed_async_connection_with_config(&config)
        .await?)
}

/// A frame: one byte of length, the list for the reply, the number of the call, and the body.
pub(super) fn encode(reply_to: &str, id: u64, body: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut frame = Vec::with_capacity(1 + reply_to.len() + 8 + body.len());
    frame.push(u8::try_from(reply_to.len())?);
    frame.extend_from_slice(reply_to.as_bytes());
    frame.extend_from_slice(&id.to_be_bytes());
    frame.extend_from_slice(body);
    Ok(frame)
}

/// The list for the reply, and the reply to an echo: the number and the body.
pub(super) fn echo(frame: &[u8]) -> Result<(&[u8], &[u8]), Failure> {
    let (&length, rest) = frame.split_first().ok_or("an empty frame")?;
    rest.split_at_checked(length.into())
        .ok_or_else(|| "a short frame".into())
}

/// Calls that wait for their replies.
#[derive(Clone, Default)]
pub(super) struct Waiting(Arc<Mutex<Calls>>);

#[derive(Default)]
struct Calls {
    next: u64,
    waiting: HashMap<u64, oneshot::Sender<usize>>,
}

impl Waiting {
    pub(super) fn enter(&self) -> (u64, oneshot::Receiver<usize>) {
        let (reply, replied) = oneshot::channel();
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        calls.next += 1;
        let id = calls.next;
        calls.waiting.insert(id, reply);
        (id, replied)
    }

    pub(super) fn resolve(&self, reply: &Bytes) -> Result<(), Failure> {
        let (id, body) = reply.split_first_chunk().ok_or("a short reply")?;
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(caller) = calls.waiting.remove(&u64::from_be_bytes(*id)) {
            let _ = caller.send(body.len());
        }
        Ok(())
    }

    /// Ends all calls: whoever reads the replies has failed.
    pub(super) fn abandon(&self) {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        calls.waiting.clear();
    }
}
