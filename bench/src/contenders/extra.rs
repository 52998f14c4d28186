//! What a server may be told besides, which a plain call should not notice, and what a call may ask for itself.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use antiphon::{Call, DiskOutbox, Server, WhenDisengaged};
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(600);

/// One option, or all of a server's, which are said to cost a call nothing.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Extra {
    #[default]
    None,
    /// The server has a node's name, and so a second queue
    Node,
    /// The server serves alone
    Exclusive,
    /// The server took over, having stood by
    Standby,
    /// The server gives up after ten minutes, and keeps up to 10,000 replies in memory
    Clutch,
    /// The server keeps replies on disk
    DiskOutbox,
    /// All of these
    All,
    /// The call ends when a token fires
    CancelOn,
    /// The call is observed
    Observe,
    /// The call ends if nobody takes it in time: documented to cost one more round trip
    PickupTimeout,
}

impl Extra {
    pub(crate) const ALL: [Self; 9] = [
        Self::Node,
        Self::Exclusive,
        Self::Standby,
        Self::Clutch,
        Self::DiskOutbox,
        Self::All,
        Self::CancelOn,
        Self::Observe,
        Self::PickupTimeout,
    ];

    pub(super) fn server(self, mut server: Server, service: &str) -> Server {
        if self.has(Self::Node) {
            server = server.node("bench");
        }
        if self == Self::Exclusive {
            server = server.exclusive();
        }
        if self.has(Self::Standby) {
            server = server.standby();
        }
        if self.has(Self::Clutch) {
            server = server
                .when_disengaged(WhenDisengaged::GiveUpAfter(LONG))
                .outbox(10_000);
        }
        if self.has(Self::DiskOutbox) {
            server = server.outbox_store(DiskOutbox::new(Self::outbox(service)));
        }
        server
    }

    pub(super) fn call<Out>(self, mut call: Call<Out>) -> Call<Out> {
        if self == Self::CancelOn {
            call = call.cancel_on(CancellationToken::new());
        }
        if self == Self::Observe {
            call = call.observe(drop);
        }
        if self == Self::PickupTimeout {
            call = call.pickup_timeout(LONG);
        }
        call
    }

    /// Where the outbox of a service is.
    pub(crate) fn outbox(service: &str) -> PathBuf {
        std::env::temp_dir().join(format!("{service}.outbox"))
    }

    /// If a server is told this.
    fn has(self, one: Self) -> bool {
        self == one || self == Self::All
    }
}

impl fmt::Display for Extra {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Node => "node",
            Self::CancelOn => "cancel-on",
            Self::Observe => "observe",
            Self::Exclusive => "exclusive",
            Self::Standby => "standby",
            Self::Clutch => "clutch",
            Self::DiskOutbox => "disk-outbox",
            Self::All => "all",
            Self::PickupTimeout => "pickup-timeout",
        })
    }
}
