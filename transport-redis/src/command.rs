//! Commands, as they are written to Redis.

use std::io;

use bytes::Bytes;
use redis::{RedisWrite, ToRedisArgs};

/// A body from this size on is written from where it is; a smaller one is cheaper to copy.
const SHARED_MIN: usize = 2048;

/// What is written around an argument, at most: its length and two ends of lines.
const AROUND: usize = 25;

/// A command gets no more room at once than this, and what it needs.
const STEP_MAX: usize = 256 * 1024;

/// One command: its arguments are encoded as they come.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cmd {
    arguments: usize,
    encoded: Vec<u8>,
    /// Bodies that are not copied, each with its place in what is encoded.
    bodies: Vec<(usize, Bytes)>,
}

impl Cmd {
    pub(crate) fn new(name: &str) -> Self {
        let mut command = Self::with_capacity(name.len() + 64);
        command.arg(name);
        command
    }

    /// Without a name, and with room for so many bytes.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self {
            encoded: Vec::with_capacity(bytes),
            ..Self::default()
        }
    }

    /// Makes room for so many bytes more.
    pub(crate) fn reserve(&mut self, bytes: usize) {
        self.encoded.reserve(bytes);
    }

    pub(crate) fn arg<T: ToRedisArgs>(&mut self, argument: T) -> &mut Self {
        argument.write_redis_args(self);
        self
    }

    /// Appends a body as an argument, without copying it if it is large.
    pub(crate) fn body(&mut self, body: &Bytes) -> &mut Self {
        if body.len() < SHARED_MIN {
            return self.arg(&body[..]);
        }
        self.arguments += 1;
        put_number(&mut self.encoded, b'$', body.len());
        self.bodies.push((self.encoded.len(), body.clone()));
        self.encoded.extend_from_slice(b"\r\n");
        self
    }
}

impl RedisWrite for Cmd {
    fn write_arg(&mut self, argument: &[u8]) {
        self.arguments += 1;
        let room = argument.len() + AROUND;
        if self.encoded.capacity() - self.encoded.len() < room {
            // Commands grow to the size of a batch: not in many steps, each of which is copied.
            let step = (3 * self.encoded.len()).min(STEP_MAX);
            self.encoded.reserve(room.max(step));
        }
        put_number(&mut self.encoded, b'$', argument.len());
        self.encoded.extend_from_slice(argument);
        self.encoded.extend_from_slice(b"\r\n");
    }

    fn writer_for_next_arg(&mut self) -> impl io::Write + '_ {
        Next {
            command: self,
            argument: Vec::new(),
        }
    }
}

/// An argument that is being written, whose length is known at the end.
struct Next<'a> {
    command: &'a mut Cmd,
    argument: Vec<u8>,
}

impl io::Write for Next<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.argument.write(part)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Next<'_> {
    fn drop(&mut self) {
        self.command.write_arg(&self.argument);
    }
}

/// Commands that are written together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pipeline(Vec<Cmd>);

impl Pipeline {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a command, to which arguments are to be appended.
    pub(crate) fn cmd(&mut self, name: &str) -> &mut Cmd {
        let at = self.0.len();
        self.0.push(Cmd::new(name));
        // It was pushed just now.
        &mut self.0[at]
    }

    pub(crate) fn add_command(&mut self, command: Cmd) {
        self.0.push(command);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn commands(&self) -> impl Iterator<Item = &Cmd> {
        self.0.iter()
    }

    /// Appends what is to be written; large bodies are told apart.
    pub(crate) fn encode(&self, mut put: impl FnMut(Part<'_>)) {
        let mut head = Vec::with_capacity(16);
        for command in &self.0 {
            head.clear();
            put_number(&mut head, b'*', command.arguments);
            put(Part::Text(&head));
            let mut written = 0;
            for (at, body) in &command.bodies {
                put(Part::Text(&command.encoded[written..*at]));
                put(Part::Body(body));
                written = *at;
            }
            put(Part::Text(&command.encoded[written..]));
        }
    }

    /// All of it in one piece.
    pub(crate) fn packed(&self) -> Vec<u8> {
        let mut packed = Vec::new();
        self.encode(|part| {
            packed.extend_from_slice(match part {
                Part::Text(text) => text,
                Part::Body(body) => body,
            });
        });
        packed
    }
}

/// A part of what is to be written.
pub(crate) enum Part<'a> {
    Text(&'a [u8]),
    /// To be written from where it is.
    Body(&'a Bytes),
}

fn put_number(out: &mut Vec<u8>, sign: u8, number: usize) {
    out.push(sign);
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(body: &Bytes) -> Pipeline {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("SET").arg("key").body(body).arg("PX").arg(100);
        pipeline.cmd("GET").arg(&["a", "b"]).arg("");
        pipeline
    }

    /// The client library writes the same.
    #[test]
    fn written_as_the_client_library_does() {
        for length in [0, 1, SHARED_MIN - 1, SHARED_MIN, 100_000] {
            let body = Bytes::from(vec![b'x'; length]);
            let mut theirs = redis::pipe();
            theirs.cmd("SET").arg("key").arg(&body[..]);
            theirs.arg("PX").arg(100);
            theirs.cmd("GET").arg(&["a", "b"]).arg("");
            assert_eq!(
                commands(&body).packed(),
                theirs.get_packed_pipeline(),
                "{length}"
            );
        }
        let mut written = Cmd::new("x");
        io::Write::write_all(&mut written.writer_for_next_arg(), b"ab").unwrap();
        assert_eq!(written.encoded, b"$1\r\nx\r\n$2\r\nab\r\n");
    }
}
