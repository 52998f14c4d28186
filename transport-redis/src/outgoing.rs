//! What is still to be written to a connection.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use crate::command::{Part, Pipeline};

/// The most parts of one write.
pub(crate) const PARTS_MAX: usize = 32;

/// Parts in their order; large bodies are where they were.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    parts: VecDeque<Bytes>,
    text: BytesMut,
}

impl Outgoing {
    pub(crate) fn push(&mut self, pipeline: &Pipeline) {
        pipeline.encode(|part| match part {
            Part::Text(text) => self.text.extend_from_slice(text),
            Part::Body(body) => {
                self.seal();
                self.parts.push_back(body.clone());
            }
        });
        self.seal();
    }

    fn seal(&mut self) {
        if !self.text.is_empty() {
            self.parts.push_back(self.text.split().freeze());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// What one write may take.
    pub(crate) fn slices<'a>(&'a self, room: &mut [IoSlice<'a>; PARTS_MAX]) -> usize {
        let mut count = 0;
        for (place, part) in room.iter_mut().zip(&self.parts) {
            *place = IoSlice::new(part);
            count += 1;
        }
        count
    }

    pub(crate) fn written(&mut self, mut bytes: usize) {
        while let Some(first) = self.parts.front_mut() {
            if bytes < first.len() {
                first.advance(bytes);
                return;
            }
            bytes -= first.len();
            self.parts.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(body: &Bytes) -> Pipeline {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("SET").arg("key").body(body).arg("PX").arg(100);
        pipeline.cmd("GET").arg("a");
        pipeline
    }

    #[test]
    fn however_much_a_write_takes() {
        let body = Bytes::from(vec![b'x'; 10_000]);
        let mut pipeline = commands(&body);
        pipeline.cmd("SET").body(&body).body(&body);
        for taken in [1, 7, 1000, usize::MAX] {
            let mut outgoing = Outgoing::default();
            outgoing.push(&pipeline);
            outgoing.push(&pipeline);
            let mut written: Vec<u8> = Vec::new();
            while !outgoing.is_empty() {
                let mut slices = [IoSlice::new(&[]); PARTS_MAX];
                let count = outgoing.slices(&mut slices);
                let before = written.len();
                let bytes = slices[..count].iter().flat_map(|slice| slice.iter());
                written.extend(bytes.take(taken).copied());
                outgoing.written(written.len() - before);
            }
            assert_eq!(written, pipeline.packed().repeat(2));
        }
    }

    #[test]
    fn a_large_body_is_not_copied() {
        let body = Bytes::from(vec![b'x'; 10_000]);
        let mut outgoing = Outgoing::default();
        outgoing.push(&commands(&body));
        let is_it = |part: &Bytes| part.as_ptr() == body.as_ptr();
        assert!(outgoing.parts.iter().any(is_it));
    }
}
