//! JSON bodies.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind};

pub(crate) fn encode(value: &(impl Serialize + ?Sized)) -> Result<Bytes, Error> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|error| {
        Error::not_executed(
            ErrorKind::Invalid,
            format!("the value has no JSON form: {error}"),
        )
        .with_source(error)
    })
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
