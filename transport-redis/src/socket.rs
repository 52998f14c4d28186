//! A connection on which commands are written and answers read.
//!
//! Whoever has commands writes them, if the socket takes them at once; what it does not take is written by the connection's task,
//! which reads the answers too. Answers come in the order of the commands.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::command::Pipeline;
use crate::outgoing::{Outgoing, PARTS_MAX};
use crate::value::Value;
use crate::wire::Reader;

/// The most pipelines that wait for their answers; more wait to be written. It bounds what is kept for a server that is slow.
const WAITING_MAX: usize = 128;

/// The most bytes that are read before others have a turn: those who wait for the lock to write, and other tasks.
const TURN: usize = 256 * 1024;

/// What a connection is made of: a socket, or TLS over one.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// A connection; closed when it is dropped.
pub(crate) struct Socket {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    _task: AbortOnDropHandle<()>,
}

struct Shared(Mutex<State>);

struct State {
    /// `None` once it failed,
    stream: Option<Box<dyn Duplex>>,
    /// and why it did, if that is known.
    failure: Option<io::Error>,
    /// When bytes were last written or read.
    moved: Instant,
    outgoing: Outgoing,
    /// Something was written that the stream may still keep for itself.
    unflushed: bool,
    reader: Reader,
    waiting: VecDeque<Waiting>,
    /// Of the connection's task, which is told of everything that happens to the stream.
    waker: Option<Waker>,
}

/// Ends the connection with its task, whatever ends that.
struct Ending {
    shared: Arc<Shared>,
    broken: CancellationToken,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.shared.lock().end();
        self.broken.cancel();
    }
}

/// A pipeline that was written, or is about to be.
struct Waiting {
    expected: usize,
    answers: Vec<Value>,
    done: oneshot::Sender<Vec<Value>>,
    _room: OwnedSemaphorePermit,
}

impl Socket {
    /// Takes over a stream on which the greeting is done; `broken` is cancelled when it fails.
    pub(crate) fn new(stream: Box<dyn Duplex>, broken: CancellationToken) -> Self {
        let shared = Arc::new(Shared(Mutex::new(State {
            stream: Some(stream),
            failure: None,
            moved: Instant::now(),
            outgoing: Outgoing::default(),
            unflushed: false,
            reader: Reader::default(),
            waiting: VecDeque::new(),
            waker: None,
        })));
        let ending = Ending {
            shared: Arc::clone(&shared),
            broken,
        };
        let task = tokio::spawn(async move {
            let error = poll_fn(|context| ending.shared.lock().poll(context)).await;
            tracing::debug!(%error, "a connection to Redis ended");
            ending.shared.lock().failure = Some(error);
        });
        Self {
            shared,
            room: Arc::new(Semaphore::new(WAITING_MAX)),
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// Runs commands in one trip.
    ///
    /// **Cancel safety**: dropped before it is written, nothing is; after that, all of it is, if the connection stays, and its answers
    /// are ignored.
    ///
    /// # Errors
    /// Why the connection failed.
    pub(crate) async fn execute(&self, pipeline: &Pipeline) -> io::Result<Vec<Value>> {
        if pipeline.is_empty() {
            return Ok(Vec::new());
        }
        let room = Arc::clone(&self.room).acquire_owned().await;
        let room = room.map_err(|_| self.shared.lock().closed())?;
        let (done, answers) = oneshot::channel();
        self.shared.lock().begin(pipeline, done, room)?;
        answers.await.map_err(|_| self.shared.lock().closed())
    }

    /// When bytes were last written or read.
    pub(crate) fn moved(&self) -> Instant {
        self.shared.lock().moved
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Enters a pipeline, and writes as much as is taken at once.
    fn begin(
        &mut self,
        pipeline: &Pipeline,
        done: oneshot::Sender<Vec<Value>>,
        room: OwnedSemaphorePermit,
    ) -> io::Result<()> {
        if self.stream.is_none() {
            return Err(self.closed());
        }
        // Together, so that answers find who waits for them, whoever is dropped in between.
        self.outgoing.push(pipeline);
        self.waiting.push_back(Waiting {
            expected: pipeline.len(),
            answers: Vec::with_capacity(pipeline.len()),
            done,
            _room: room,
        });
        // Before the task has run for the first time, it is about to.
        let Some(waker) = self.waker.clone() else {
            return Ok(());
        };
        // On behalf of the task, which goes on where this stops. What fails here fails there again, once it has read what had come.
        if let Poll::Ready(Err(_)) = self.poll_write(&mut Context::from_waker(&waker)) {
            waker.wake();
        }
        Ok(())
    }

    /// Reads and writes; ready when the connection is over.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        match &mut self.waker {
            Some(waker) => waker.clone_from(context.waker()),
            None => self.waker = Some(context.waker().clone()),
        }
        // Both, always: a server that nobody reads from does not read either.
        let written = self.poll_write(context);
        match (self.poll_read(context), written) {
            (Poll::Ready(error), _) | (_, Poll::Ready(Err(error))) => Poll::Ready(error),
            (Poll::Pending, _) => Poll::Pending,
        }
    }

    /// Reads what is there, for a turn.
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        let mut taken = 0;
        loop {
            if taken >= TURN {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let Some(stream) = &mut self.stream else {
                return Poll::Ready(self.closed());
            };
            match ready!(self.reader.poll_fill(stream, context)) {
                Ok(0) => return Poll::Ready(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => taken += bytes,
                Err(error) => return Poll::Ready(error),
            }
            self.moved = Instant::now();
            loop {
                match self.reader.next() {
                    Ok(Some(answer)) => self.answered(answer),
                    Ok(None) => break,
                    Err(error) => return Poll::Ready(error),
                }
            }
        }
    }

    fn answered(&mut self, answer: Value) {
        let Some(first) = self.waiting.front_mut() else {
            // Such as an error before the server hangs up.
            tracing::debug!(?answer, "Redis said what nobody had asked");
            return;
        };
        first.answers.push(answer);
        if first.answers.len() == first.expected
            && let Some(Waiting { answers, done, .. }) = self.waiting.pop_front()
        {
            // Nobody waits for a pipeline whose future was dropped.
            let _ = done.send(answers);
        }
    }

    /// Writes all that there is; ready when nothing is left.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(stream) = &mut self.stream else {
            return Poll::Ready(Err(self.closed()));
        };
        let mut stream = Pin::new(stream);
        while !self.outgoing.is_empty() {
            let mut slices = [IoSlice::new(&[]); PARTS_MAX];
            let count = self.outgoing.slices(&mut slices);
            let written = ready!(
                stream
                    .as_mut()
                    .poll_write_vectored(context, &slices[..count])
            )?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.moved = Instant::now();
            self.outgoing.written(written);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(stream.poll_flush(context))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Closes the connection, and tells all who wait.
    fn end(&mut self) {
        self.stream = None;
        self.outgoing = Outgoing::default();
        self.waiting.clear();
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Why it failed, for each who asks.
    fn closed(&self) -> io::Error {
        match &self.failure {
            Some(failure) => io::Error::new(failure.kind(), failure.to_string()),
            None => io::ErrorKind::BrokenPipe.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;

    /// A connection whose other end is ours, and takes so many bytes before it is read.
    fn connected(room: usize) -> (Arc<Socket>, DuplexStream, CancellationToken) {
        let (near, far) = duplex(room);
        let broken = CancellationToken::new();
        let socket = Socket::new(Box::new(near), broken.clone());
        (Arc::new(socket), far, broken)
    }

    fn get(key: &str) -> Pipeline {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("GET").arg(key);
        pipeline
    }

    fn set(size: usize) -> Pipeline {
        let mut pipeline = Pipeline::new();
        let body = Bytes::from(vec![b'x'; size]);
        pipeline.cmd("SET").arg("key").body(&body);
        pipeline
    }

    async fn expect(far: &mut DuplexStream, pipeline: &Pipeline) {
        let expected = pipeline.packed();
        let mut written = vec![0; expected.len()];
        far.read_exact(&mut written).await.unwrap();
        assert_eq!(written, expected);
    }

    #[tokio::test]
    async fn answers_find_who_asked() {
        let (socket, mut far, _) = connected(1 << 16);
        let mut two = get("a");
        two.add_command(crate::command::Cmd::new("PING"));
        let (one, other) = (get("b"), Pipeline::new());
        let server = async {
            expect(&mut far, &two).await;
            expect(&mut far, &one).await;
            far.write_all(b":1\r\n>1\r\n+x\r\n-ERR 2\r\n:")
                .await
                .unwrap();
            tokio::task::yield_now().await;
            far.write_all(b"3\r\n").await.unwrap();
        };
        let (first, second, third, ()) = tokio::join!(
            socket.execute(&two),
            socket.execute(&one),
            socket.execute(&other),
            server
        );
        let first = first.unwrap();
        assert!(matches!(
            first.as_slice(),
            [Value::Int(1), Value::ServerError(_)]
        ));
        assert_eq!(second.unwrap(), [Value::Int(3)]);
        assert_eq!(third.unwrap(), []);
    }

    /// Dropped with half of it written, it is written to its end, and its answer is nobody else's.
    #[tokio::test]
    async fn dropped_in_the_middle() {
        let (socket, mut far, _) = connected(1000);
        let large = set(100_000);
        let dropped = timeout(Duration::from_millis(50), socket.execute(&large));
        dropped.await.unwrap_err();
        let next = get("next");
        let server = async {
            expect(&mut far, &large).await;
            far.write_all(b"+OK\r\n").await.unwrap();
            expect(&mut far, &next).await;
            far.write_all(b"$1\r\nn\r\n").await.unwrap();
        };
        let (answers, ()) = tokio::join!(socket.execute(&next), server);
        assert_eq!(answers.unwrap(), [Value::BulkString("n".into())]);
    }

    /// A server that is slow to read is still read from: or both would wait for each other for ever.
    #[tokio::test]
    async fn both_ways_at_once() {
        let (socket, mut far, _) = connected(1000);
        let large = set(100_000);
        let many = get("many");
        let answer = format!("$100000\r\n{}\r\n", "y".repeat(100_000));
        let server = async {
            expect(&mut far, &many).await;
            far.write_all(answer.as_bytes()).await.unwrap();
            expect(&mut far, &large).await;
            far.write_all(b"+OK\r\n").await.unwrap();
        };
        let both = async { tokio::join!(socket.execute(&many), socket.execute(&large), server) };
        let (many, large, ()) = timeout(Duration::from_secs(10), both).await.unwrap();
        assert_eq!(
            many.unwrap(),
            [Value::BulkString("y".repeat(100_000).into())]
        );
        assert_eq!(large.unwrap(), [Value::Okay]);
    }

    #[tokio::test]
    async fn a_failed_connection_tells_everybody() {
        for goodbye in [&b""[..], b"HTTP/1.1 400\r\n", b":1\r\n$9\r\nabc"] {
            let (socket, mut far, broken) = connected(1 << 16);
            let (one, other) = (get("a"), get("b"));
            let server = async move {
                far.write_all(goodbye).await.unwrap();
                drop(far);
            };
            let (first, second, ()) =
                tokio::join!(socket.execute(&one), socket.execute(&other), server);
            assert_eq!(first.is_ok(), goodbye.starts_with(b":"));
            let malformed = goodbye.starts_with(b"HTTP");
            let reason = second.unwrap_err().to_string();
            assert_eq!(reason.contains("no known kind"), malformed, "{reason}");
            let told = timeout(Duration::from_secs(10), broken.cancelled()).await;
            told.unwrap();
            socket.execute(&one).await.unwrap_err();
        }
    }

    /// What a server does not answer is bounded, and what was dropped before it was written never is.
    #[tokio::test]
    async fn there_is_an_end_to_what_waits() {
        let (socket, mut far, _) = connected(1 << 20);
        let one = get("a");
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..WAITING_MAX {
            let (socket, one) = (Arc::clone(&socket), one.clone());
            waiting.spawn(async move { socket.execute(&one).await.unwrap() });
        }
        for _ in 0..WAITING_MAX {
            expect(&mut far, &one).await;
        }
        let late = get("late");
        let refused = timeout(Duration::from_millis(50), socket.execute(&late));
        refused.await.unwrap_err();
        far.write_all(&b":1\r\n".repeat(WAITING_MAX)).await.unwrap();
        assert_eq!(waiting.join_all().await.len(), WAITING_MAX);
        let last = get("last");
        let server = async {
            expect(&mut far, &last).await;
            far.write_all(b":2\r\n").await.unwrap();
        };
        let (answers, ()) = tokio::join!(socket.execute(&last), server);
        assert_eq!(answers.unwrap(), [Value::Int(2)]);
    }

    /// Takes all that is written, and cannot be read.
    struct Faulty;

    impl AsyncRead for Faulty {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            panic!("on purpose")
        }
    }

    impl AsyncWrite for Faulty {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_panic_ends_the_connection() {
        let broken = CancellationToken::new();
        let socket = Socket::new(Box::new(Faulty), broken.clone());
        let one = get("a");
        let ended = async {
            socket.execute(&one).await.unwrap_err();
            broken.cancelled().await;
        };
        timeout(Duration::from_secs(10), ended).await.unwrap();
    }

    #[tokio::test]
    async fn dropped_it_is_closed() {
        let (socket, mut far, _) = connected(1 << 16);
        let one = get("a");
        let asked = timeout(Duration::from_millis(50), socket.execute(&one)).await;
        asked.unwrap_err();
        drop(socket);
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, one.packed());
    }
}
