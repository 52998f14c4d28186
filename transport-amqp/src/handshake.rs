//! The handshake of the connection that publishes.

use std::time::Duration;

use amq_protocol::auth::Credentials;
use amq_protocol::frame::{AMQPFrame, ProtocolVersion};
use amq_protocol::protocol::{AMQPClass, connection};
use futures_io::{AsyncRead, AsyncWrite};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::AMQPUri;

use crate::error::Failure;
use crate::roller::Socket;
use crate::wire::{self, Frame};

/// What the client library asks for as well, of what concerns who publishes: all that the broker may tell us.
const CAPABILITIES: [&str; 4] = [
    "publisher_confirms",
    "basic.nack",
    "connection.blocked",
    "authentication_failure_close",
];

/// What both sides agreed on.
#[derive(Debug, PartialEq)]
pub(crate) struct Tuned {
    pub(crate) channel_max: u16,
    /// In bytes.
    pub(crate) frame_max: usize,
    pub(crate) heartbeat: Option<Duration>,
}

/// Introduces us to the broker, until it has opened the virtual host.
///
/// # Errors
/// `Refused` if it wants none of us.
pub(crate) async fn shake_hands<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut Socket<S>,
    uri: &AMQPUri,
    name: &str,
) -> Result<Tuned, Failure> {
    use connection::AMQPMethod as Method;
    let header = AMQPFrame::ProtocolHeader(ProtocolVersion::amqp_0_9_1());
    socket.send(|out| wire::put_frame(out, &header)).await?;
    let mut tuned = None;
    loop {
        let answer = match next_method(socket).await? {
            Method::Start(_) => Method::StartOk(start_ok(uri, name)),
            Method::Tune(offer) => {
                let (agreed, answer) = tune(uri, &offer);
                tuned = Some(agreed);
                socket.send(|out| say(out, Method::TuneOk(answer))).await?;
                Method::Open(connection::Open {
                    virtual_host: uri.vhost.as_str().into(),
                })
            }
            Method::OpenOk(_) => {
                let early = || Failure::Lost("the broker was not tuned".to_owned());
                return tuned.ok_or_else(early);
            }
            Method::Close(close) => return Err(refusal(close.reply_code, &close.reply_text)),
            other => {
                return Err(Failure::Lost(format!(
                    "unexpected in a handshake: {other:?}"
                )));
            }
        };
        socket.send(|out| say(out, answer)).await?;
    }
}

async fn next_method<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut Socket<S>,
) -> Result<connection::AMQPMethod, Failure> {
    loop {
        match socket.receive().await? {
            Frame::Other(AMQPFrame::Method(0, AMQPClass::Connection(method))) => return Ok(method),
            Frame::Other(AMQPFrame::Heartbeat) => {}
            other => {
                return Err(Failure::Lost(format!(
                    "unexpected in a handshake: {other:?}"
                )));
            }
        }
    }
}

fn say(out: &mut Vec<u8>, method: connection::AMQPMethod) -> Result<(), String> {
    wire::put_method(out, 0, AMQPClass::Connection(method))
}

fn start_ok(uri: &AMQPUri, name: &str) -> connection::StartOk {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut capabilities = FieldTable::default();
    for capability in CAPABILITIES {
        capabilities.insert(capability.into(), AMQPValue::Boolean(true));
    }
    let mut properties = FieldTable::default();
    for (key, value) in [
        ("connection_name", text(&format!("antiphon {name}"))),
        ("product", text(env!("CARGO_PKG_NAME"))),
        ("version", text(env!("CARGO_PKG_VERSION"))),
        ("platform", text("rust")),
        ("capabilities", AMQPValue::FieldTable(capabilities)),
    ] {
        properties.insert(key.into(), value);
    }
    let mechanism = uri.query.auth_mechanism.unwrap_or_default();
    let credentials = Credentials::from(uri.authority.userinfo.clone());
    connection::StartOk {
        client_properties: properties,
        mechanism: mechanism.name().into(),
        response: credentials.sasl_auth_string(mechanism),
        locale: "en_US".into(),
    }
}

/// The lower of what both want, where zero means: whatever the other one wants.
fn tune(uri: &AMQPUri, offer: &connection::Tune) -> (Tuned, connection::TuneOk) {
    fn lower<T: Ord + Default>(ours: T, theirs: T) -> T {
        match (ours == T::default(), theirs == T::default()) {
            (true, _) => theirs,
            (_, true) => ours,
            _ => ours.min(theirs),
        }
    }
    let answer = connection::TuneOk {
        channel_max: lower(uri.query.channel_max.unwrap_or_default(), offer.channel_max),
        frame_max: lower(uri.query.frame_max.unwrap_or_default(), offer.frame_max),
        heartbeat: lower(uri.query.heartbeat.unwrap_or_default(), offer.heartbeat),
    };
    let frame_max = usize::try_from(answer.frame_max).unwrap_or(usize::MAX);
    let tuned = Tuned {
        channel_max: match answer.channel_max {
            0 => u16::MAX,
            most => most,
        },
        frame_max: match frame_max {
            0 => usize::MAX,
            most => most,
        },
        heartbeat: (answer.heartbeat > 0).then(|| Duration::from_secs(answer.heartbeat.into())),
    };
    (tuned, answer)
}

/// What the broker says when it closes something.
fn refusal(code: u16, text: &ShortString) -> Failure {
    Failure::Refused {
        code,
        text: text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuned(url: &str, channel_max: u16, frame_max: u32, heartbeat: u16) -> Tuned {
        let offer = connection::Tune {
            channel_max,
            frame_max,
            heartbeat,
        };
        tune(&url.parse().unwrap(), &offer).0
    }

    #[test]
    fn the_lower_wish_counts_and_zero_is_none() {
        let ours = "amqp://h?frame_max=8192&heartbeat=10";
        let expected = |channel_max, frame_max, heartbeat| Tuned {
            channel_max,
            frame_max,
            heartbeat: Some(Duration::from_secs(heartbeat)),
        };
        assert_eq!(tuned(ours, 2047, 131_072, 60), expected(2047, 8192, 10));
        assert_eq!(tuned(ours, 0, 4096, 3), expected(u16::MAX, 4096, 3));
        assert_eq!(tuned(ours, 7, 0, 0), expected(7, 8192, 10));
        let none = tuned("amqp://h", 0, 0, 0);
        assert_eq!((none.frame_max, none.heartbeat), (usize::MAX, None));
    }
}
