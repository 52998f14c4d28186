//! Whether a broker takes connections, and what it is; by a few bytes of its protocol, without a client library.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::BrokerKind;
use crate::proxy::host_and_port;

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How long to wait between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// What a broker says that it is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) kind: Option<BrokerKind>,
    pub(super) version: Option<String>,
}

/// Waits until the broker answers, or until `patience` is over; gives up at once when `alive` does.
pub(super) async fn ready(
    kind: BrokerKind,
    authority: &str,
    patience: Duration,
    mut alive: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let end = Instant::now() + patience;
    loop {
        let answer = identify_plain(kind, authority, None).await;
        alive()?;
        match answer {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= end => {
                let reason =
                    format!("{kind} at {authority} did not answer within {patience:?}: {error}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Waits until somebody listens at `authority`.
pub(super) async fn listens(authority: &str, patience: Duration) -> io::Result<()> {
    let silent = async {
        while TcpStream::connect(authority).await.is_err() {
            sleep(PAUSE).await;
        }
    };
    timeout(patience, silent).await.map_err(|_| {
        let reason = format!("nobody listens at {authority} after {patience:?}");
        io::Error::new(io::ErrorKind::TimedOut, reason)
    })
}

/// Waits until nobody listens at `authority`.
pub(super) async fn gone(authority: &str, patience: Duration) -> io::Result<()> {
    let listens = async {
        while TcpStream::connect(authority).await.is_ok() {
            sleep(PAUSE).await;
        }
    };
    timeout(patience, listens).await.map_err(|_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("somebody still listens at {authority} after {patience:?}"),
        )
    })
}

/// Asks a broker what it is. Over TLS only that somebody listens is checked.
pub(super) async fn identify(kind: BrokerKind, url: &str) -> io::Result<Identity> {
    let authority = authority(kind, url).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the broker's URL has no host")
    })?;
    let encrypted = url.starts_with("rediss:") || url.starts_with("amqps:");
    let answer = if encrypted {
        match timeout(ATTEMPT, TcpStream::connect(&authority)).await {
            Ok(connected) => connected.map(|_| Identity::default()),
            Err(elapsed) => Err(elapsed.into()),
        }
    } else {
        identify_plain(kind, &authority, credentials(url)).await
    };
    answer.map_err(|error| io::Error::new(error.kind(), format!("{kind} at {authority}: {error}")))
}

/// Host and port of a URL, the port being the broker's usual one if none is given.
pub(super) fn authority(kind: BrokerKind, url: &str) -> Option<String> {
    let authority = url
        .get(host_and_port(url)?)
        .filter(|authority| !authority.is_empty())?;
    // An IPv6 address is in brackets, so that a colon behind the last bracket starts a port.
    let has_port = authority
        .rsplit(']')
        .next()
        .is_some_and(|rest| rest.contains(':'));
    let port = match url.split_once(':').map(|(scheme, _)| scheme) {
        Some("amqps") => 5671,
        _ => kind.default_port(),
    };
    Some(if has_port {
        authority.to_owned()
    } else {
        format!("{authority}:{port}")
    })
}

/// User and password of a URL, as they are written.
fn credentials(url: &str) -> Option<(&str, &str)> {
    let start = url.find("://")? + "://".len();
    let user_info = url
        .get(start..host_and_port(url)?.start)?
        .strip_suffix('@')?;
    user_info.split_once(':')
}

async fn identify_plain(
    kind: BrokerKind,
    authority: &str,
    login: Option<(&str, &str)>,
) -> io::Result<Identity> {
    let answer = async {
        let mut socket = TcpStream::connect(authority).await?;
        match kind {
            BrokerKind::Redis | BrokerKind::Valkey => identify_redis(&mut socket, login).await,
            BrokerKind::RabbitMq => identify_amqp(&mut socket).await,
        }
    };
    timeout(ATTEMPT, answer).await?
}

/// `PING`, and if that is answered, `INFO server`.
async fn identify_redis(
    socket: &mut TcpStream,
    login: Option<(&str, &str)>,
) -> io::Result<Identity> {
    match login {
        Some(("", password)) => drop(ask(socket, &["AUTH", password]).await?),
        Some((user, password)) => drop(ask(socket, &["AUTH", user, password]).await?),
        None => {}
    }
    let pong = ask(socket, &["PING"]).await?;
    if pong.starts_with("-NOAUTH") {
        return Ok(Identity::default());
    }
    if !pong.starts_with("+PONG") {
        return Err(unexpected(&pong));
    }
    let info = ask(socket, &["INFO", "server"]).await?;
    let field = |name: &str| {
        info.lines()
            .find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
    };
    let valkey = field("valkey_version:");
    let kind = if valkey.is_some() {
        BrokerKind::Valkey
    } else {
        BrokerKind::Redis
    };
    Ok(Identity {
        kind: Some(kind),
        version: valkey.or_else(|| field("redis_version:")),
    })
}

/// Sends one command, and reads its one answer: a line, or a bulk string.
pub(super) async fn ask(socket: &mut TcpStream, command: &[&str]) -> io::Result<String> {
    let mut frame = format!("*{}\r\n", command.len());
    for part in command {
        frame.push_str(&format!("${}\r\n{part}\r\n", part.len()));
    }
    socket.write_all(frame.as_bytes()).await?;
    let line = read_line(socket).await?;
    let Some(length) = line.strip_prefix('$') else {
        return Ok(line);
    };
    let length: usize = length.parse().map_err(|_| unexpected(&line))?;
    let mut bulk = vec![0; length.saturating_add(2)];
    socket.read_exact(&mut bulk).await?;
    Ok(String::from_utf8_lossy(&bulk).into_owned())
}

async fn read_line(socket: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") && line.len() < 1024 {
        line.push(socket.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// The protocol header, answered with Connection.Start (class 10, method 10 on channel 0), which carries the version.
async fn identify_amqp(socket: &mut TcpStream) -> io::Result<Identity> {
    socket.write_all(b"AMQP\x00\x00\x09\x01").await?;
    let frame_type = socket.read_u8().await?;
    let channel = socket.read_u16().await?;
    let size = socket.read_u32().await?;
    if frame_type != 1 || channel != 0 || !(4..=64 * 1024).contains(&size) {
        return Err(unexpected(&format!(
            "a frame of type {frame_type} and {size} bytes"
        )));
    }
    let mut payload = vec![0; usize::try_from(size).unwrap_or_default()];
    socket.read_exact(&mut payload).await?;
    if !payload.starts_with(&[0, 10, 0, 10]) {
        return Err(unexpected("a method that is not Connection.Start"));
    }
    let product = table_text(&payload, "product");
    let kind = product
        .is_some_and(|product| product == "RabbitMQ")
        .then_some(BrokerKind::RabbitMq);
    Ok(Identity {
        kind,
        version: table_text(&payload, "version"),
    })
}

/// A long string in an AMQP table: the length and bytes of its name, `S`, a length of four bytes, the value.
fn table_text(table: &[u8], name: &str) -> Option<String> {
    let mut key = vec![u8::try_from(name.len()).ok()?];
    key.extend_from_slice(name.as_bytes());
    key.push(b'S');
    let start = table.windows(key.len()).position(|window| window == key)? + key.len();
    let length = u32::from_be_bytes(table.get(start..start + 4)?.try_into().ok()?);
    let value = table
        .get(start + 4..)?
        .get(..usize::try_from(length).ok()?)?;
    Some(String::from_utf8_lossy(value).into_owned())
}

fn unexpected(answer: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("an unexpected answer: {answer}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_of_a_url_has_a_port() {
        for (kind, url, expected) in [
            (BrokerKind::Redis, "redis://host", Some("host:6379")),
            (BrokerKind::Redis, "redis://u:p@host:1/2", Some("host:1")),
            (BrokerKind::RabbitMq, "amqp://[::1]", Some("[::1]:5672")),
            (BrokerKind::RabbitMq, "amqp://[::1]:7", Some("[::1]:7")),
            (
                BrokerKind::RabbitMq,
                "amqps://host/vhost",
                Some("host:5671"),
            ),
            (BrokerKind::RabbitMq, "amqp:///vhost", None),
            (BrokerKind::RabbitMq, "host", None),
        ] {
            assert_eq!(authority(kind, url).as_deref(), expected, "{url}");
        }
        assert_eq!(credentials("redis://:secret@host"), Some(("", "secret")));
        assert_eq!(credentials("amqp://u:p@host/"), Some(("u", "p")));
        assert_eq!(credentials("redis://host"), None);
    }

    #[test]
    fn a_text_is_found_in_a_table_or_not() {
        let table = b"\x07productS\x00\x00\x00\x08RabbitMQ\x07versionS\x00\x00\x00\x054.0.5";
        assert_eq!(table_text(table, "product").as_deref(), Some("RabbitMQ"));
        assert_eq!(table_text(table, "version").as_deref(), Some("4.0.5"));
        assert_eq!(table_text(table, "platform"), None);
        assert_eq!(table_text(&table[..table.len() - 1], "version"), None);
    }
}
