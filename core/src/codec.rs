//! JSON bodies.

mod escape;
mod strings;

use std::cell::Cell;
use std::mem;

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind};

/// A body up to this length shares its place with others,
const SHORT: usize = 256;

/// which is so large: whoever keeps one of them keeps no more than this.
const SHARED_PLACE: usize = 1024;

/// One up to this length is copied to a place of its own size, and the place where it grew is kept for the next. A longer
/// one keeps that place itself.
///
/// Copying costs less than a place that grows: when the closing quote no longer fits it doubles, and with bodies of 64 KiB
/// the allocator asks the system for such places, and gives them back, all the time.
const COPIED_MAX: usize = 256 * 1024;

/// Where the bodies of a thread grow, and what is left of the place of short ones.
#[derive(Default)]
struct Scratch {
    growing: Vec<u8>,
    shared: BytesMut,
}

thread_local! {
    /// Taken out meanwhile, as a value may encode others while it is encoded.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

pub(crate) fn encode(value: &(impl Serialize + ?Sized)) -> Result<Bytes, Error> {
    // There is none while the thread ends.
    let kept = SCRATCH.try_with(Cell::take).ok().flatten();
    let mut scratch = kept.unwrap_or_default();
    scratch.growing.clear();
    let (growing, written) = strings::write(mem::take(&mut scratch.growing), value);
    scratch.growing = growing;
    written.map_err(|error| {
        Error::not_executed(
            ErrorKind::Invalid,
            format!("the value has no JSON form: {error}"),
        )
        .with_source(error)
    })?;
    let body = scratch.cut();
    let _ = SCRATCH.try_with(|place| place.set(Some(scratch)));
    Ok(body)
}

impl Scratch {
    /// What has grown, as a body.
    fn cut(&mut self) -> Bytes {
        let length = self.growing.len();
        if length > COPIED_MAX {
            return mem::take(&mut self.growing).into();
        }
        if length > SHORT {
            return Bytes::copy_from_slice(&self.growing);
        }
        if self.shared.capacity() < length {
            // The same one again, if nobody keeps anything of it.
            self.shared.reserve(SHARED_PLACE);
        }
        self.shared.extend_from_slice(&self.growing);
        self.shared.split().freeze()
    }
}

pub(crate) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(body)
}

/// Reads the body of a reply.
pub(crate) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    decode(body).map_err(|error| {
        crate::client::bad_reply(&format!("the reply is not of the expected type: {error}"))
            .with_source(error)
    })
}

#[cfg(test)]
mod tests {
    use serde::Serializer;

    use super::*;

    struct Nested(usize);

    impl Serialize for Nested {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let inner = encode(&"x".repeat(self.0)).map_err(serde::ser::Error::custom)?;
            serializer.collect_seq(["y", str::from_utf8(&inner).unwrap()])
        }
    }

    /// Whatever was encoded before, and while it is.
    #[test]
    fn a_body_is_what_it_says() {
        let long = [COPIED_MAX - 2, COPIED_MAX - 1, 1 << 20, 3];
        for length in (0..=SHORT).chain(long).chain(0..9) {
            let body = encode(&"z".repeat(length)).unwrap();
            assert_eq!(body, format!("\"{}\"", "z".repeat(length)));
            let nested = encode(&Nested(length)).unwrap();
            let inner = "x".repeat(length);
            assert_eq!(nested, format!("[\"y\",\"\\\"{inner}\\\"\"]"));
        }
        let no_text = std::collections::BTreeMap::from([((1, 2), 3)]);
        assert_eq!(encode(&no_text).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(encode(&1).unwrap(), "1");
    }
}
