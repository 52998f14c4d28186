//! A client on a connection of its own, in time.

use std::time::Duration;

use antiphon::{Client, Connection, Error, ErrorKind};
use tokio::time::{Instant, timeout, timeout_at};

/// How long a command that is done may be kept from ending, to say goodbye to the broker.
const GOODBYE: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: Connection,
    pub(crate) client: Client,
}

impl Session {
    /// Connects and opens a client, both before the deadline; it lies `given` behind the start, for the message.
    pub(crate) async fn open(url: &str, deadline: Instant, given: Duration) -> Result<Self, Error> {
        let open = async {
            let connection = antiphon::connect(url).await?;
            let client = connection.client().await?;
            Ok(Self { connection, client })
        };
        timeout_at(deadline, open).await.unwrap_or_else(|_| {
            let message = format!("not connected within {given:?}");
            Err(Error::not_executed(ErrorKind::Connect, message))
        })
    }

    pub(crate) async fn close(self) {
        // A broker that hangs must not hold up whoever waits for the command.
        let _ = timeout(GOODBYE, self.connection.close()).await;
    }
}
