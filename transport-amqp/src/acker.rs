//! Acknowledges many deliveries with few frames.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

use lapin::Channel;
use lapin::options::BasicAckOptions;

/// The deliveries of one channel that are not acknowledged, by their tags.
#[derive(Debug)]
pub(crate) struct Acker {
    /// The tag of the first state.
    first: u64,
    states: VecDeque<State>,
    done: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Delivered and not done; or not seen yet, as the other consumer of the channel has it.
    Open,
    /// To be acknowledged; the key of what it was.
    Done(u64),
    Acked,
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ack {
    tag: u64,
    multiple: bool,
}

impl Acker {
    pub(crate) fn new() -> Self {
        // The broker counts from 1 on each channel.
        Self {
            first: 1,
            states: VecDeque::new(),
            done: 0,
        }
    }

    /// Marks a delivery as done; `key` comes back when it is acknowledged.
    pub(crate) fn done(&mut self, tag: u64, key: u64) {
        let Some(index) = tag.checked_sub(self.first) else {
            return;
        };
        let Ok(index) = usize::try_from(index) else {
            return;
        };
        if index >= self.states.len() {
            self.states.resize(index + 1, State::Open);
        }
        if self.states[index] == State::Open {
            self.states[index] = State::Done(key);
            self.done += 1;
        }
    }

    /// True if something is done and not acknowledged.
    pub(crate) fn is_dirty(&self) -> bool {
        self.done > 0
    }

    /// Acknowledges all that is done, and gives its keys.
    pub(crate) fn flush(&mut self, channel: &Channel, keys: &mut Vec<u64>) {
        for ack in self.acks(keys) {
            let options = BasicAckOptions {
                multiple: ack.multiple,
            };
            // The first poll queues the frame; when it is written is of no interest.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = pin!(channel.basic_ack(ack.tag, options)).poll(&mut cx);
        }
    }

    /// The keys of all that is done, acknowledged or not; it will never be.
    pub(crate) fn abandon(self) -> impl Iterator<Item = u64> {
        self.states.into_iter().filter_map(|state| match state {
            State::Done(key) => Some(key),
            State::Open | State::Acked => None,
        })
    }

    /// One frame for the longest run from the front; single ones for what is done beyond a gap, so that one slow handler
    /// holds up nobody's acknowledgement.
    fn acks(&mut self, keys: &mut Vec<u64>) -> Vec<Ack> {
        let mut acks = Vec::new();
        if self.done == 0 {
            return acks;
        }
        self.done = 0;
        // The tag of a multiple acknowledgement must itself be open at the broker, or it closes the channel.
        let mut last = None;
        while let Some(&state) = self.states.front() {
            match state {
                State::Open => break,
                State::Done(key) => {
                    keys.push(key);
                    last = Some(self.first);
                }
                State::Acked => {}
            }
            self.states.pop_front();
            self.first += 1;
        }
        acks.extend(last.map(|tag| Ack {
            tag,
            multiple: true,
        }));
        for (tag, state) in (self.first..).zip(&mut self.states) {
            if let State::Done(key) = *state {
                keys.push(key);
                *state = State::Acked;
                acks.push(Ack {
                    tag,
                    multiple: false,
                });
            }
        }
        acks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flushed(acker: &mut Acker) -> (Vec<(u64, bool)>, Vec<u64>) {
        let mut keys = Vec::new();
        let acks = acker.acks(&mut keys);
        (
            acks.iter().map(|ack| (ack.tag, ack.multiple)).collect(),
            keys,
        )
    }

    #[test]
    fn a_run_takes_one_frame() {
        let mut acker = Acker::new();
        for tag in [2, 1, 3] {
            acker.done(tag, 10 + tag);
        }
        assert_eq!(flushed(&mut acker), (vec![(3, true)], vec![11, 12, 13]));
        assert!(!acker.is_dirty());
        assert_eq!(flushed(&mut acker), (vec![], vec![]));
    }

    #[test]
    fn a_slow_delivery_holds_nobody_up() {
        let mut acker = Acker::new();
        acker.done(2, 2);
        acker.done(4, 4);
        assert_eq!(
            flushed(&mut acker),
            (vec![(2, false), (4, false)], vec![2, 4])
        );
        // The run is 1 to 4, but 2 and 4 are acknowledged: 3 is the last tag that is still open.
        acker.done(1, 1);
        acker.done(3, 3);
        assert_eq!(flushed(&mut acker), (vec![(3, true)], vec![1, 3]));
        acker.done(5, 5);
        assert_eq!(flushed(&mut acker), (vec![(5, true)], vec![5]));
    }

    #[test]
    fn a_tag_is_acknowledged_once() {
        let mut acker = Acker::new();
        acker.done(1, 1);
        acker.done(1, 9);
        assert_eq!(flushed(&mut acker), (vec![(1, true)], vec![1]));
        acker.done(1, 1);
        assert_eq!(flushed(&mut acker), (vec![], vec![]));
    }
}
