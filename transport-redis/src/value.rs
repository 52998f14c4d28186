//! What Redis answers.

use bytes::Bytes;
use redis::ServerError;

/// One answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Value {
    #[default]
    Nil,
    Okay,
    Int(i64),
    SimpleString(String),
    /// A string, and a verbatim one.
    BulkString(Bytes),
    /// An array, and a set.
    Array(Vec<Self>),
    ServerError(ServerError),
    /// What none of our commands is about: a number that is not whole, a truth value, a map.
    Other,
}

/// As the client library reads it, for the connections that are its own.
impl From<redis::Value> for Value {
    fn from(value: redis::Value) -> Self {
        let all = |values: Vec<redis::Value>| values.into_iter().map(Self::from).collect();
        match value {
            redis::Value::Nil => Self::Nil,
            redis::Value::Okay => Self::Okay,
            redis::Value::Int(number) => Self::Int(number),
            redis::Value::SimpleString(text) => Self::SimpleString(text),
            redis::Value::BulkString(bytes) => Self::BulkString(bytes.into()),
            redis::Value::VerbatimString { text, .. } => Self::BulkString(text.into()),
            redis::Value::Array(values) | redis::Value::Set(values) => Self::Array(all(values)),
            redis::Value::ServerError(error) => Self::ServerError(error),
            _ => Self::Other,
        }
    }
}
