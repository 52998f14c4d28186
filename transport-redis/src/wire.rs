//! Reads answers of Redis (RESP3) from a connection: large strings arrive in their own place.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use redis::ServerError;
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

use crate::value::Value;

/// How much is read at once,
const READ: usize = 32 * 1024;

/// of how much at the least is read into a string's own place: shorter rests are copied there,
const OWN_PLACE: usize = 8 * 1024;

/// and how much is read behind a string that had its own place: if another one follows, little of it has to be copied.
const READ_BEHIND: usize = 2 * 1024;

/// A string up to this length shares its place with others,
const SHORT: usize = 256;

/// which is so large: whoever keeps one of them keeps no more than this.
const SHARED_PLACE: usize = 1024;

/// The longest line: of an error, a status or a number.
const LINE_MAX: usize = 64 * 1024;

/// The longest string: Redis stores no longer one.
const STRING_MAX: usize = 512 << 20;

/// The most items of one array.
const ITEMS_MAX: usize = 1 << 24;

/// The deepest array in an array. Our scripts answer with arrays in an array.
const DEPTH_MAX: usize = 16;

/// What is announced gets room for no more than this before it arrives.
const ROOM_MAX: usize = 1 << 20;

/// Reads answers as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    buffer: BytesMut,
    /// Arrays of which items are still to come, the innermost last.
    open: Vec<Open>,
    /// The string that is arriving.
    arriving: Option<Arriving>,
    /// A string had its own place right before what is read now.
    behind_string: bool,
    /// What is left of the place of short strings.
    shared: BytesMut,
}

#[derive(Debug)]
struct Open {
    kind: Kind,
    left: usize,
    items: Vec<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Array,
    /// Pairs, which we never ask for.
    Map,
    /// Said without being asked.
    Push,
    /// Said about the value that follows.
    Attribute,
}

#[derive(Debug)]
struct Arriving {
    kind: Text,
    bytes: BytesMut,
    left: usize,
    /// The rest is read into it, not into the buffer.
    in_place: bool,
}

#[derive(Clone, Copy, Debug)]
enum Text {
    Plain,
    Verbatim,
    Error,
}

/// What the first line of a value says.
enum Begun {
    /// All of it.
    Value(Value),
    /// How long it is.
    String(Text, i64),
    /// How many it has.
    Array(Kind, i64),
}

enum Step {
    /// There is not enough yet.
    Wait,
    /// An array begins.
    Opened,
    Value(Value),
}

impl Reader {
    /// Reads what is there, once; zero is the end.
    pub(crate) fn poll_fill<S: AsyncRead + Unpin + ?Sized>(
        &mut self,
        mut stream: &mut S,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut stream);
        if let Some(arriving) = &mut self.arriving
            && arriving.in_place
            && arriving.left > 0
        {
            // All that was read before is in it already.
            let bytes = &mut arriving.bytes;
            if bytes.len() == bytes.capacity() {
                bytes.reserve(arriving.left.min(bytes.len().max(ROOM_MAX)));
            }
            let room = (bytes.capacity() - bytes.len()).min(arriving.left);
            let read = ready!(poll_read_buf(stream, context, &mut bytes.limit(room)))?;
            arriving.left -= read;
            return Poll::Ready(Ok(read));
        }
        let room = if self.behind_string {
            READ_BEHIND
        } else {
            READ
        };
        self.buffer.reserve(room);
        let read = ready!(poll_read_buf(
            stream,
            context,
            &mut (&mut self.buffer).limit(room)
        ))?;
        self.behind_string = false;
        Poll::Ready(Ok(read))
    }

    /// The next whole answer, if it has arrived.
    ///
    /// # Errors
    /// It is none: the connection is of no more use.
    pub(crate) fn next(&mut self) -> io::Result<Option<Value>> {
        loop {
            let step = match self.arriving.take() {
                Some(arriving) => self.finish_string(arriving)?,
                None => self.begin_value()?,
            };
            let value = match step {
                Step::Wait => return Ok(None),
                Step::Opened => self.close(None),
                Step::Value(value) => self.close(Some(value)),
            };
            if value.is_some() {
                return Ok(value);
            }
        }
    }

    /// Puts a value where it belongs, and closes what is complete by it. Gives the answer, if it is complete.
    fn close(&mut self, mut value: Option<Value>) -> Option<Value> {
        loop {
            let Some(innermost) = self.open.last_mut() else {
                return value;
            };
            if let Some(value) = value.take() {
                innermost.items.push(value);
                innermost.left -= 1;
            }
            if innermost.left > 0 {
                return None;
            }
            let open = self.open.pop()?;
            value = match open.kind {
                Kind::Array => Some(Value::Array(open.items)),
                Kind::Map => Some(Value::Other),
                // The value that it is about follows, and counts in its place.
                Kind::Push | Kind::Attribute => return None,
            };
        }
    }

    fn begin_value(&mut self) -> io::Result<Step> {
        let Some(end) = self.line_end()? else {
            return Ok(Step::Wait);
        };
        let Some((&sign, rest)) = self.buffer[..end].split_first() else {
            return Err(malformed("an empty line"));
        };
        let begun = match sign {
            b':' => Begun::Value(Value::Int(number(rest)?)),
            b'$' => Begun::String(Text::Plain, number(rest)?),
            b'*' | b'~' => Begun::Array(Kind::Array, number(rest)?),
            b'+' if rest == b"OK" => Begun::Value(Value::Okay),
            b'+' => Begun::Value(Value::SimpleString(
                String::from_utf8_lossy(rest).into_owned(),
            )),
            b'-' => Begun::Value(Value::ServerError(server_error(rest)?)),
            b'_' => Begun::Value(Value::Nil),
            b',' | b'#' | b'(' => Begun::Value(Value::Other),
            b'=' => Begun::String(Text::Verbatim, number(rest)?),
            b'!' => Begun::String(Text::Error, number(rest)?),
            b'%' => Begun::Array(Kind::Map, number(rest)?),
            b'|' => Begun::Array(Kind::Attribute, number(rest)?),
            b'>' if self.open.is_empty() => Begun::Array(Kind::Push, number(rest)?),
            _ => return Err(malformed("an answer of no known kind")),
        };
        self.buffer.advance(end + 2);
        match begun {
            Begun::Value(value) => Ok(Step::Value(value)),
            Begun::String(kind, length) => self.begin_string(kind, length),
            Begun::Array(kind, count) => self.open(kind, count),
        }
    }

    /// Where the first line ends, if it is whole.
    fn line_end(&self) -> io::Result<Option<usize>> {
        match self.buffer.iter().position(|&byte| byte == b'\r') {
            Some(end) if end > LINE_MAX => Err(malformed("a line that is too long")),
            Some(end) => match self.buffer.get(end + 1) {
                Some(b'\n') => Ok(Some(end)),
                Some(_) => Err(malformed("a line that does not end as one")),
                None => Ok(None),
            },
            None if self.buffer.len() > LINE_MAX => Err(malformed("a line that is too long")),
            None => Ok(None),
        }
    }

    fn open(&mut self, kind: Kind, count: i64) -> io::Result<Step> {
        if count == -1 && kind == Kind::Array {
            return Ok(Step::Value(Value::Nil));
        }
        let values = match kind {
            Kind::Map | Kind::Attribute => 2,
            Kind::Array | Kind::Push => 1,
        };
        let left = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(values))
            .filter(|count| *count <= ITEMS_MAX)
            .ok_or_else(|| malformed("an array of an impossible size"))?;
        if self.open.len() >= DEPTH_MAX {
            return Err(malformed("arrays that are too deep"));
        }
        self.open.push(Open {
            kind,
            left,
            items: Vec::with_capacity(left.min(ROOM_MAX / 1024)),
        });
        Ok(Step::Opened)
    }

    fn begin_string(&mut self, kind: Text, length: i64) -> io::Result<Step> {
        if length == -1 && matches!(kind, Text::Plain) {
            return Ok(Step::Value(Value::Nil));
        }
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= STRING_MAX)
            .ok_or_else(|| malformed("a string of an impossible size"))?;
        // Most are here in one piece.
        if let Text::Plain = kind
            && let Some((string, [b'\r', b'\n', ..])) = self.buffer.split_at_checked(length)
        {
            let string = if length > SHORT {
                Bytes::copy_from_slice(string)
            } else {
                if self.shared.capacity() < length {
                    // The same one again, if nobody keeps anything of it.
                    self.shared.reserve(SHARED_PLACE);
                }
                self.shared.extend_from_slice(string);
                self.shared.split().freeze()
            };
            self.buffer.advance(length + 2);
            return Ok(Step::Value(Value::BulkString(string)));
        }
        let arrived = self.buffer.len().min(length);
        let in_place = length - arrived >= OWN_PLACE;
        self.behind_string = in_place;
        self.finish_string(Arriving {
            kind,
            bytes: BytesMut::with_capacity(length.min(ROOM_MAX.max(arrived))),
            left: length,
            in_place,
        })
    }

    fn finish_string(&mut self, mut arriving: Arriving) -> io::Result<Step> {
        let arrived = self.buffer.len().min(arriving.left);
        arriving.bytes.extend_from_slice(&self.buffer[..arrived]);
        self.buffer.advance(arrived);
        arriving.left -= arrived;
        if arriving.left > 0 || self.buffer.len() < 2 {
            self.arriving = Some(arriving);
            return Ok(Step::Wait);
        }
        if !self.buffer.starts_with(b"\r\n") {
            return Err(malformed("a string that does not end as one"));
        }
        self.buffer.advance(2);
        let bytes = arriving.bytes.freeze();
        Ok(Step::Value(match arriving.kind {
            Text::Plain => Value::BulkString(bytes),
            // Behind three letters that say what kind of text it is.
            Text::Verbatim if bytes.get(3) == Some(&b':') => Value::BulkString(bytes.slice(4..)),
            Text::Verbatim => return Err(malformed("a text of no kind")),
            Text::Error => Value::ServerError(server_error(&bytes)?),
        }))
    }
}

fn number(text: &[u8]) -> io::Result<i64> {
    let (sign, digits) = match text {
        [b'-', digits @ ..] => (-1, digits),
        [b'+', digits @ ..] => (1, digits),
        digits => (1, digits),
    };
    let mut value = 0_i64;
    for digit in digits {
        let next = match digit {
            b'0'..=b'9' => value.checked_mul(10),
            _ => None,
        };
        // With its sign: the lowest number is lower than the highest is high.
        let with_digit = |next: i64| next.checked_add(sign * i64::from(digit - b'0'));
        let Some(next) = next.and_then(with_digit) else {
            return Err(malformed("no number where one was due"));
        };
        value = next;
    }
    if digits.is_empty() {
        return Err(malformed("no number where one was due"));
    }
    Ok(value)
}

/// Read by the client library, which knows the codes.
fn server_error(text: &[u8]) -> io::Result<ServerError> {
    let text = String::from_utf8_lossy(text).replace(['\r', '\n'], " ");
    match redis::parse_redis_value(format!("-{text}\r\n").as_bytes()) {
        Ok(redis::Value::ServerError(error)) => Ok(error),
        _ => Err(malformed("an error that cannot be read")),
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("Redis answered with {what}"),
    )
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Reads what comes in such pieces.
    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Vec<Value>> {
        let mut reader = Reader::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut answers = Vec::new();
        for mut piece in pieces {
            while !piece.is_empty() {
                let Poll::Ready(read) = reader.poll_fill(&mut piece, &mut context) else {
                    panic!("a slice is always ready");
                };
                assert_ne!(read?, 0);
                while let Some(answer) = reader.next()? {
                    answers.push(answer);
                }
            }
        }
        assert!(reader.open.is_empty() && reader.arriving.is_none() && reader.buffer.is_empty());
        Ok(answers)
    }

    fn one(text: &[u8]) -> Value {
        let mut answers = read([text]).unwrap();
        assert_eq!(answers.len(), 1, "{answers:?}");
        answers.remove(0)
    }

    fn string(text: &str) -> Value {
        Value::BulkString(text.to_owned().into())
    }

    fn error(text: &str) -> Value {
        redis::parse_redis_value(text.as_bytes()).unwrap().into()
    }

    #[test]
    fn every_kind() {
        assert_eq!(one(b":-17\r\n"), Value::Int(-17));
        assert_eq!(one(b":+17\r\n"), Value::Int(17));
        for number in [0, 10, i64::MAX, i64::MIN] {
            assert_eq!(one(format!(":{number}\r\n").as_bytes()), Value::Int(number));
        }
        assert_eq!(one(b"+OK\r\n"), Value::Okay);
        assert_eq!(one(b"+zset\r\n"), Value::SimpleString("zset".into()));
        assert_eq!(one(b"$0\r\n\r\n"), string(""));
        assert_eq!(one(b"$4\r\na\r\nb\r\n"), string("a\r\nb"));
        assert_eq!(one(b"=7\r\ntxt:abc\r\n"), string("abc"));
        for nil in [&b"_\r\n"[..], b"$-1\r\n", b"*-1\r\n"] {
            assert_eq!(one(nil), Value::Nil);
        }
        for other in [
            &b",1.5\r\n"[..],
            b"#t\r\n",
            b"(99\r\n",
            b"%1\r\n+a\r\n:1\r\n",
        ] {
            assert_eq!(one(other), Value::Other);
        }
        assert_eq!(one(b"*0\r\n"), Value::Array(Vec::new()));
        let nested = Value::Array(vec![
            Value::Array(vec![Value::Int(1), Value::Array(Vec::new())]),
            string("a"),
            Value::Nil,
        ]);
        assert_eq!(one(b"*3\r\n*2\r\n:1\r\n~0\r\n$1\r\na\r\n_\r\n"), nested);
        let refused = one(b"-NOSCRIPT No matching script\r\n");
        assert_eq!(refused, error("-NOSCRIPT No matching script\r\n"));
        assert_eq!(one(b"!9\r\nERR a\r\nbc\r\n"), error("-ERR a  bc\r\n"));
        let inside = Value::Array(vec![error("-WRONGTYPE x\r\n"), Value::Int(1)]);
        assert_eq!(one(b"*2\r\n-WRONGTYPE x\r\n:1\r\n"), inside);
    }

    #[test]
    fn what_nobody_asked_for_is_no_answer() {
        let said = b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n:1\r\n>0\r\n|1\r\n+ttl\r\n:9\r\n*2\r\n|0\r\n:2\r\n:3\r\n";
        let pair = Value::Array(vec![Value::Int(2), Value::Int(3)]);
        assert_eq!(read([&said[..]]).unwrap(), [Value::Int(1), pair]);
    }

    /// Wherever what arrives is cut, and however often.
    #[test]
    fn cut_anywhere() {
        let large = "x".repeat(300);
        let mut text = b"*4\r\n:1\r\n$-1\r\n-ERR no\r\n$300\r\n".to_vec();
        text.extend_from_slice(large.as_bytes());
        text.extend_from_slice(b"\r\n+OK\r\n>1\r\n+x\r\n=5\r\ntxt:a\r\n$2\r\n\r\n\r\n");
        let expected = [
            Value::Array(vec![
                Value::Int(1),
                Value::Nil,
                error("-ERR no\r\n"),
                string(&large),
            ]),
            Value::Okay,
            string("a"),
            string("\r\n"),
        ];
        for cut in 0..text.len() {
            let (front, back) = text.split_at(cut);
            assert_eq!(read([front, back]).unwrap(), expected, "{cut}");
        }
        for length in 1..text.len() {
            assert_eq!(read(text.chunks(length)).unwrap(), expected, "{length}");
        }
    }

    #[test]
    fn strings_longer_than_what_is_read_at_once() {
        for length in [
            READ - 8,
            READ,
            READ + 1,
            3 * READ,
            ROOM_MAX,
            3 * ROOM_MAX + 7,
        ] {
            let large: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let mut text = format!("*3\r\n${length}\r\n").into_bytes();
            text.extend_from_slice(&large);
            text.extend_from_slice(format!("\r\n:7\r\n${length}\r\n").as_bytes());
            text.extend_from_slice(&large);
            text.extend_from_slice(b"\r\n");
            let string = Value::BulkString(large.into());
            let expected = Value::Array(vec![string.clone(), Value::Int(7), string]);
            assert_eq!(read([&text[..]]).unwrap(), [expected], "{length}");
        }
    }

    /// Many are read, in any order of lengths, and each is what it was.
    #[test]
    fn short_strings_share_a_place() {
        let lengths = (0..=SHORT + 2).chain((0..=SHORT + 2).rev());
        let strings: Vec<String> = lengths
            .map(|length| {
                char::from(b'a' + (length % 26) as u8)
                    .to_string()
                    .repeat(length)
            })
            .collect();
        let mut reader = Reader::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut kept = Vec::new();
        for text in &strings {
            let answer = format!("${}\r\n{text}\r\n", text.len());
            let filled = reader.poll_fill(&mut answer.as_bytes(), &mut context);
            assert!(filled.is_ready());
            kept.extend(reader.next().unwrap());
            assert!(reader.shared.capacity() <= SHARED_PLACE);
        }
        let expected: Vec<_> = strings.iter().map(|text| string(text)).collect();
        assert_eq!(kept, expected);
    }

    #[test]
    fn small_strings_are_read_many_at_once() {
        let string = format!("$300\r\n{}\r\n", "x".repeat(300));
        let text = format!("*500\r\n{}", string.repeat(500));
        let mut rest = text.as_bytes();
        let mut reader = Reader::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut reads = 0;
        while reader.next().unwrap().is_none() {
            assert!(reader.poll_fill(&mut rest, &mut context).is_ready());
            reads += 1;
        }
        assert_eq!(reads, text.len().div_ceil(READ));
    }

    #[test]
    fn what_is_announced_gets_no_room_before_it_comes() {
        let mut reader = Reader::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut announced = &b"*16777216\r\n$536870912\r\nabc"[..];
        assert!(reader.poll_fill(&mut announced, &mut context).is_ready());
        assert_eq!(reader.next().unwrap(), None);
        let arriving = reader.arriving.as_ref().unwrap();
        assert!(arriving.bytes.capacity() <= ROOM_MAX);
        assert!(reader.open[0].items.capacity() <= 1024);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let long = format!("+{}", "x".repeat(LINE_MAX + 1));
        let long_and_whole = format!("{long}\r\n");
        let deep = "*1\r\n".repeat(DEPTH_MAX + 1);
        for text in [
            "\r\n",
            "HTTP/1.1 400\r\n",
            "?1\r\n",
            ":\r\n",
            ":x\r\n",
            ":-\r\n",
            ":--1\r\n",
            ":9223372036854775808\r\n",
            ":-9223372036854775809\r\n",
            ":1\rx",
            ":99999999999999999999\r\n",
            "$-2\r\n",
            "$536870913\r\n",
            "$x\r\n",
            "$1\r\nabc",
            "*-2\r\n",
            "*16777217\r\n",
            "%9223372036854775807\r\n",
            "=-1\r\n",
            "=3\r\nabc\r\n",
            "*1\r\n>1\r\n",
            &long,
            &long_and_whole,
            &deep,
        ] {
            let refused = read([text.as_bytes()]).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{text:.30}");
        }
    }
}
