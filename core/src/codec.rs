//! JSON bodies.

use std::cell::Cell;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind};

/// A shorter body is copied to a place of its own size: it grows where others did before it. A longer one keeps its place.
const COPIED_MAX: usize = 4096;

thread_local! {
    /// Where bodies grow. Taken out meanwhile, as a value may encode others while it is encoded.
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

pub(crate) fn encode(value: &(impl Serialize + ?Sized)) -> Result<Bytes, Error> {
    // There is none while the thread ends.
    let mut scratch = SCRATCH.try_with(Cell::take).unwrap_or_default();
    scratch.clear();
    serde_json::to_writer(&mut scratch, value).map_err(|error| {
        Error::not_executed(
            ErrorKind::Invalid,
            format!("the value has no JSON form: {error}"),
        )
        .with_source(error)
    })?;
    if scratch.len() > COPIED_MAX {
        return Ok(scratch.into());
    }
    let body = Bytes::copy_from_slice(&scratch);
    let _ = SCRATCH.try_with(|place| place.set(scratch));
    Ok(body)
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
        for length in [0, 1, COPIED_MAX - 2, COPIED_MAX - 1, 1 << 20, 3] {
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
