//! The limit: a length and JSON over plain sockets, through one process that copies what it reads.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use pubsub_core::{BoxError, Event, wire};

use super::child::{self, Send, Tally};
use super::spec::{Role, Spec};
use crate::event::read;

const CHUNK: usize = 64 << 10;

const PUBLISHER: u8 = b'p';
const RECEIVER: u8 = b'r';

fn connect(spec: &Spec, who: u8) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(&spec.address)?;
    stream.write_all(&[who])?;
    stream.read_exact(&mut [0])?; // it is known there
    Ok(stream)
}

pub(crate) fn relay(spec: &Spec) -> Result<(), BoxError> {
    let listener = UnixListener::bind(&spec.address)?;
    let group = spec.group;
    std::thread::spawn(move || {
        let mut receivers = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().expect("it is bound");
            let mut who = [0];
            stream.read_exact(&mut who).expect("it says who it is");
            stream.write_all(&who).expect("it waits for that");
            match who[0] {
                RECEIVER => receivers.push(stream),
                _ => break copy(stream, &mut receivers, group).expect("nobody goes before the end"),
            }
        }
    });
    child::say("ready");
    child::until_the_end();
    Ok(())
}

/// Copies to everybody, or whole frames to one after the other.
fn copy(mut from: UnixStream, to: &mut [UnixStream], group: bool) -> io::Result<()> {
    let (mut buffer, mut turn) = (BytesMut::new(), 0);
    while read_more(&mut from, &mut buffer)? {
        if !group {
            to.iter_mut().try_for_each(|to| to.write_all(&buffer))?;
            buffer.clear();
            continue;
        }
        let mut whole = 0;
        while let Some(header) = buffer.get(whole..whole + 4) {
            let end = whole + 4 + u32::from_le_bytes(header.try_into().expect("four bytes")) as usize;
            if end > buffer.len() {
                break;
            }
            whole = end;
        }
        to[turn].write_all(&buffer.split_to(whole))?;
        turn = (turn + 1) % to.len();
    }
    Ok(())
}

fn read_more(from: &mut UnixStream, buffer: &mut BytesMut) -> io::Result<bool> {
    let length = buffer.len();
    buffer.resize(length + CHUNK, 0);
    let count = from.read(&mut buffer[length..])?;
    buffer.truncate(length + count);
    Ok(count > 0)
}

pub(crate) fn receive(spec: &Spec) -> Result<(), BoxError> {
    let mut from = connect(spec, RECEIVER)?;
    let tally = Tally::of(spec);
    tally.start();
    let mut buffer = BytesMut::new();
    while read_more(&mut from, &mut buffer)? {
        while let Some(header) = buffer.first_chunk::<4>() {
            let length = u32::from_le_bytes(*header) as usize;
            if buffer.len() < 4 + length {
                break;
            }
            buffer.advance(4);
            let event = wire::decode(&buffer.split_to(length).freeze(), None)?.event;
            tally.add(read(&event)?);
        }
    }
    child::until_the_end();
    Ok(())
}

struct Publisher {
    to: UnixStream,
    buffer: Vec<u8>,
    at_once: bool,
}

impl Send for Publisher {
    async fn send(&mut self, events: Vec<Arc<Event>>) -> Result<(), BoxError> {
        for event in events {
            let json = Bytes::from(wire::encode(&event)?);
            self.buffer.extend_from_slice(&(json.len() as u32).to_le_bytes());
            self.buffer.extend_from_slice(&json);
            if self.at_once || self.buffer.len() >= CHUNK {
                self.to.write_all(&self.buffer)?;
                self.buffer.clear();
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), BoxError> {
        Ok(self.to.write_all(&self.buffer)?)
    }
}

pub(crate) fn publish(spec: &Spec) -> Result<(), BoxError> {
    let at_once = matches!(spec.role, Role::Pace { .. });
    let publisher = Publisher { to: connect(spec, PUBLISHER)?, buffer: Vec::new(), at_once };
    super::runtime()?.block_on(child::publish(spec, publisher))?;
    child::until_the_end();
    Ok(())
}
