//! Free loopback ports.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, TcpListener};

/// Below the ports that systems give to outgoing connections (from 32768 on Linux, 49152 elsewhere): among those, a
/// client that tries again and again while nobody listens would one day be given that very port, and be connected to
/// itself.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A loopback port that is free now. Somebody else may take it before it is used, so its user has to be able to try again.
pub(crate) fn free_port() -> io::Result<u16> {
    let mut random = RandomState::new().build_hasher();
    for attempt in 0..200_u16 {
        random.write_u16(attempt);
        let offset = random.finish() % u64::from(PORTS.end - PORTS.start);
        // The remainder is below 12,000.
        let port = PORTS.start + u16::try_from(offset).unwrap_or_default();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        "no free loopback port",
    ))
}
