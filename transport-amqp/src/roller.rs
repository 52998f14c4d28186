//! The task of the connection that publishes: it writes what there is to write, and tells the channels what the broker says.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use amq_protocol::frame::AMQPFrame;
use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection};
use futures_io::{AsyncRead, AsyncWrite};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::error::Failure;
use crate::link::Blocked;
use crate::press::Shared;
use crate::slip::Told;
use crate::wire::{self, Frame};

/// How much is read in one go, at first.
const INPUT: usize = 16 * 1024;

/// A buffer that had to grow beyond this for large bodies is given back.
const OUTPUT_KEPT: usize = 256 * 1024;

/// A peer that is silent for so many halves of a heartbeat is dead.
const SILENT_HALVES: u32 = 4;

/// A socket, and the frames on it.
pub(crate) struct Socket<S> {
    stream: S,
    input: Vec<u8>,
    /// The largest frame, in bytes.
    frame_max: usize,
    /// What was read and not yet parsed.
    unread: std::ops::Range<usize>,
    output: Vec<u8>,
    written: usize,
}

pub(crate) struct Roller<S> {
    socket: Socket<S>,
    shared: Arc<Shared>,
    blocked: Blocked,
    pulse: Option<Pulse>,
}

impl<S> Drop for Roller<S> {
    /// However its task ends, by a panic too: nobody is to publish into the void, or to wait for what is not said any more.
    fn drop(&mut self) {
        self.shared.end();
    }
}

/// Heartbeats, both ways.
struct Pulse {
    halves: Interval,
    /// Since the last half.
    heard: bool,
    said: bool,
    silent: u32,
}

/// How long a peer may be silent.
pub(crate) fn silence(heartbeat: Duration) -> Duration {
    heartbeat / 2 * SILENT_HALVES
}

impl<S: AsyncRead + AsyncWrite + Unpin> Roller<S> {
    /// With a `heartbeat`, a peer that says nothing for two of them is given up.
    pub(crate) fn new(
        socket: Socket<S>,
        shared: Arc<Shared>,
        blocked: Blocked,
        heartbeat: Option<Duration>,
    ) -> Self {
        Self {
            socket,
            shared,
            blocked,
            pulse: heartbeat.map(Pulse::new),
        }
    }

    /// Runs until the connection is lost, closed, or cut, and says why.
    pub(crate) async fn run(mut self, cut: CancellationToken) -> String {
        let rolled = poll_fn(|cx| self.poll(cx));
        let rolled = cut.run_until_cancelled(rolled).await;
        if rolled.is_some() && self.socket.is_written() {
            // The answer to a close is worth one try.
            self.socket.start_over();
            self.shared.take_out(&mut self.socket.output);
            let _ = poll_fn(|cx| Poll::Ready(self.socket.poll_write(cx))).await;
        }
        rolled.unwrap_or_else(|| "the broker does not answer".to_owned())
    }

    /// Ready, with the reason, when it is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        match self.poll_all(cx) {
            Ok(()) => Poll::Pending,
            Err(failure) => Poll::Ready(failure.to_string()),
        }
    }

    fn poll_all(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        while let Poll::Ready(read) = self.socket.poll_read(cx) {
            read?;
            self.shared.note_heard();
            if let Some(pulse) = &mut self.pulse {
                pulse.heard = true;
            }
            while let Some(frame) = self.socket.take_frame()? {
                self.hear(frame)?;
            }
        }
        if let Some(pulse) = &mut self.pulse {
            pulse.poll(cx, &self.shared)?;
        }
        // Before it looks: what comes after wakes it.
        self.shared.task.register(cx.waker());
        loop {
            if self.socket.is_written() {
                self.socket.start_over();
                self.shared.take_out(&mut self.socket.output);
                if self.socket.is_written() {
                    return self.socket.flush(cx);
                }
            }
            let before = self.socket.written;
            if self.socket.poll_write(cx)?.is_pending() {
                return Ok(());
            }
            self.shared.note_written(self.socket.written - before);
            if let Some(pulse) = &mut self.pulse {
                pulse.said = true;
            }
        }
    }

    fn hear(&mut self, frame: Frame) -> Result<(), Failure> {
        let (id, class) = match frame {
            Frame::Ack {
                channel,
                tag,
                multiple,
            } => {
                self.tell(channel, Told::Acked { tag, multiple });
                return Ok(());
            }
            Frame::Other(AMQPFrame::Method(id, class)) => (id, class),
            Frame::Other(AMQPFrame::Header(id, header)) => {
                if let Some(slip) = self.shared.slip(id) {
                    slip.returned(&header.properties);
                }
                return Ok(());
            }
            // The body of what comes back is of no interest: its sender still has it.
            Frame::Other(_) => return Ok(()),
        };
        match class {
            AMQPClass::Basic(basic::AMQPMethod::Ack(ack)) => {
                let (tag, multiple) = (ack.delivery_tag, ack.multiple);
                self.tell(id, Told::Acked { tag, multiple });
            }
            AMQPClass::Basic(basic::AMQPMethod::Nack(nack)) => {
                let (tag, multiple) = (nack.delivery_tag, nack.multiple);
                self.tell(id, Told::Nacked { tag, multiple });
            }
            AMQPClass::Basic(basic::AMQPMethod::Return(returned)) => {
                if let Some(slip) = self.shared.slip(id) {
                    slip.returning(returned.routing_key);
                }
            }
            AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(_)) => {
                if let Some(slip) = self.shared.slip(id) {
                    slip.opened();
                }
            }
            AMQPClass::Channel(channel::AMQPMethod::Close(close)) => {
                tracing::debug!(code = close.reply_code, text = %close.reply_text, "the broker closed a channel");
                self.shared.refuse(id, &close);
            }
            AMQPClass::Channel(channel::AMQPMethod::CloseOk(_)) => self.shared.leave(id),
            AMQPClass::Connection(method) => return self.hear_connection(method),
            // What nobody waits for: the answer to a channel.open, which that to the confirm.select behind it says as well.
            _ => {}
        }
        Ok(())
    }

    fn hear_connection(&mut self, method: connection::AMQPMethod) -> Result<(), Failure> {
        match method {
            connection::AMQPMethod::Blocked(blocked) => {
                let reason = blocked.reason.to_string();
                tracing::warn!(reason, "the broker blocks");
                self.blocked.send_replace(Some(reason.into()));
            }
            connection::AMQPMethod::Unblocked(_) => {
                self.blocked.send_replace(None);
            }
            connection::AMQPMethod::Close(close) => {
                let ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
                self.shared.say(0, AMQPClass::Connection(ok));
                return Err(Failure::Refused {
                    code: close.reply_code,
                    text: close.reply_text.to_string(),
                });
            }
            connection::AMQPMethod::CloseOk(_) => {
                return Err(Failure::Lost("the connection was closed".to_owned()));
            }
            _ => {}
        }
        Ok(())
    }

    fn tell(&self, id: u16, told: Told) {
        if let Some(slip) = self.shared.slip(id) {
            slip.tell(told);
        }
    }
}

impl Pulse {
    fn new(heartbeat: Duration) -> Self {
        let mut halves = interval(heartbeat / 2);
        // A process that was stopped for a while has not listened, so that it cannot tell that the peer was silent.
        halves.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            halves,
            heard: true,
            said: true,
            silent: 0,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, shared: &Shared) -> Result<(), Failure> {
        while self.halves.poll_tick(cx).is_ready() {
            self.silent = match std::mem::take(&mut self.heard) {
                true => 0,
                false => self.silent + 1,
            };
            if self.silent >= SILENT_HALVES {
                return Err(Failure::Lost(
                    "the broker was silent for too long".to_owned(),
                ));
            }
            if !std::mem::take(&mut self.said) {
                shared.beat();
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            input: vec![0; INPUT],
            frame_max: INPUT,
            unread: 0..0,
            output: Vec::new(),
            written: 0,
        }
    }

    /// Agrees to larger frames than those of a handshake.
    pub(crate) fn tune(&mut self, frame_max: usize) {
        self.frame_max = frame_max.max(INPUT);
    }

    /// Writes what `put` puts.
    pub(crate) async fn send(
        &mut self,
        put: impl FnOnce(&mut Vec<u8>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        self.start_over();
        put(&mut self.output).map_err(Failure::Lost)?;
        poll_fn(|cx| {
            while !self.is_written() {
                match self.poll_write(cx)? {
                    Poll::Ready(()) => {}
                    Poll::Pending => return Poll::Pending,
                }
            }
            Pin::new(&mut self.stream).poll_flush(cx).map_err(lost)
        })
        .await
    }

    /// Waits for a frame.
    pub(crate) async fn receive(&mut self) -> Result<Frame, Failure> {
        loop {
            if let Some(frame) = self.take_frame()? {
                return Ok(frame);
            }
            poll_fn(|cx| self.poll_read(cx)).await?;
        }
    }

    /// Takes a frame out of what was read; `None` if there is no whole one.
    fn take_frame(&mut self) -> Result<Option<Frame>, Failure> {
        let unread = self.input.get(self.unread.clone()).unwrap_or_default();
        let Some((frame, length)) = wire::take_frame(unread).map_err(Failure::Lost)? else {
            return Ok(None);
        };
        self.unread.start += length;
        Ok(Some(frame))
    }

    /// Reads what there is.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.unread.end == self.input.len() {
            if self.unread.start > 0 {
                self.input.copy_within(self.unread.clone(), 0);
                self.unread = 0..self.unread.len();
            } else if self.input.len() < self.frame_max {
                self.input.resize(self.input.len() * 2, 0);
            } else {
                let message = "a frame that is larger than agreed".to_owned();
                return Poll::Ready(Err(Failure::Lost(message)));
            }
        }
        let free = self.input.get_mut(self.unread.end..).unwrap_or_default();
        match Pin::new(&mut self.stream).poll_read(cx, free) {
            Poll::Ready(Ok(0)) => {
                let message = "the broker closed the socket".to_owned();
                Poll::Ready(Err(Failure::Lost(message)))
            }
            Poll::Ready(Ok(count)) => {
                self.unread.end += count;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(lost(error))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_written(&self) -> bool {
        self.written == self.output.len()
    }

    /// Makes room for what is to be written next.
    fn start_over(&mut self) {
        self.written = 0;
        if self.output.capacity() > OUTPUT_KEPT {
            self.output = Vec::new();
        } else {
            self.output.clear();
        }
    }

    /// Writes some of what is to be written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Failure> {
        let rest = self.output.get(self.written..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(Poll::Ready(()));
        }
        match Pin::new(&mut self.stream).poll_write(cx, rest) {
            Poll::Ready(Ok(0)) => Err(lost(io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(count)) => {
                self.written += count;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(error)) => Err(lost(error)),
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    /// Sees to it that nothing stays in the layers below. It goes on at the next wake-up if they are not ready.
    fn flush(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        match Pin::new(&mut self.stream).poll_flush(cx) {
            Poll::Ready(Err(error)) => Err(lost(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }
}

fn lost(error: io::Error) -> Failure {
    Failure::Lost(error.to_string())
}
