//! JSON bodies.

use std::cell::Cell;
use std::mem;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::envelope::Reply;
use crate::error::{Error, ErrorKind};

/// A body up to this length shares its place with others,
const SHORT: usize = 256;

/// which is so large: whoever keeps one of them keeps no more than this.
const SHARED_PLACE: usize = 1024;

/// One up to this length is copied to a place of its own size, and the place where it grew is kept for the next. A longer
/// one keeps that place itself.
///
/// Copying costs less than a place that grows: when the closing quote no longer fits it doubles, and with bodies of 64 KiB
/// the allocator asks the system for such places, and gives them back, all the time. A thread keeps three times as much at most.
const COPIED_MAX: usize = 256 * 1024;

/// A body from this length on leaves its place to the next one.
const LONG: usize = 4096;

/// Where the bodies of a thread grow, what is left of the place of short ones, and the place that a long one has left.
#[derive(Default)]
struct Scratch {
    growing: Vec<u8>,
    shared: BytesMut,
    left: Vec<u8>,
}

thread_local! {
    /// Taken out meanwhile, as a value may encode others while it is encoded.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

pub(crate) fn encode(value: &(impl Serialize + ?Sized)) -> Result<Bytes, Error> {
    let mut scratch = Scratch::take();
    scratch.growing.clear();
    serde_json::to_writer(&mut scratch.growing, value).map_err(|error| {
        Error::not_executed(
            ErrorKind::Invalid,
            format!("the value has no JSON form: {error}"),
        )
        .with_source(error)
    })?;
    let body = scratch.cut();
    scratch.put_back();
    Ok(body)
}

impl Scratch {
    fn take() -> Box<Self> {
        // There is none while the thread ends.
        let kept = SCRATCH.try_with(Cell::take).ok().flatten();
        kept.unwrap_or_default()
    }

    fn put_back(self: Box<Self>) {
        let _ = SCRATCH.try_with(|place| place.set(Some(self)));
    }

    /// What has grown, as a body.
    fn cut(&mut self) -> Bytes {
        let length = self.growing.len();
        if length > COPIED_MAX {
            return mem::take(&mut self.growing).into();
        }
        if length >= LONG && (length..=2 * length).contains(&self.left.capacity()) {
            self.left.extend_from_slice(&self.growing);
            return mem::take(&mut self.left).into();
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

/// The same of a reply that nobody needs any more.
pub(crate) fn take_reply<T: DeserializeOwned>(mut reply: Arc<Reply>) -> Result<T, Error> {
    let value = read(&reply.body);
    if let Some(reply) = Arc::get_mut(&mut reply) {
        reuse(mem::take(&mut reply.body));
    }
    value
}

/// Takes a body that was decoded: if it is long, and nobody else has it, the next one can have its place. Most that are
/// decoded are soon followed by one that is encoded, and of about the same length: the reply, or the next call.
pub(crate) fn reuse(body: Bytes) {
    if !(LONG..=COPIED_MAX).contains(&body.len()) {
        return;
    }
    if let Ok(mut place) = body.try_into_mut() {
        place.clear();
        let left = Vec::from(place);
        // It may have been part of more.
        if left.capacity() <= COPIED_MAX {
            let mut scratch = Scratch::take();
            scratch.left = left;
            scratch.put_back();
        }
    }
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

    #[test]
    fn a_long_body_leaves_its_place_to_one_of_its_length_if_nobody_else_has_it() {
        let long = "z".repeat(2 * LONG);
        let body = encode(&long).unwrap();
        let place = body.as_ptr();
        let share = body.clone();
        reuse(body);
        let other = encode(&long.to_uppercase()).unwrap();
        assert_eq!(share, format!("\"{long}\""));
        reuse(share);
        let short = encode(&"y".repeat(LONG / 2)).unwrap();
        let next = encode(&"x".repeat(2 * LONG)).unwrap();
        assert_eq!(next.as_ptr(), place);
        assert_eq!(next, format!("\"{}\"", "x".repeat(2 * LONG)));
        let after = encode(&long).unwrap();
        assert_eq!(after, format!("\"{long}\""));
        let places = [&other, &short, &after].map(|body| body.as_ptr());
        assert!(!places.contains(&place));
    }

    /// Else a short value would hold it for as long as the thread lives.
    #[test]
    fn part_of_a_large_place_is_not_kept() {
        let mut large = BytesMut::with_capacity(2 * COPIED_MAX);
        large.resize(2 * LONG, b'x');
        reuse(large.freeze());
        assert_eq!(Scratch::take().left.capacity(), 0);
    }
}
