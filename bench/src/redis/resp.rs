//! The limit: the protocol written by hand, with nothing around it.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use pubsub_core::{BoxError, Event, wire};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{BLOCK, IN_FLIGHT, KEPT, Progress, READ, STREAM, TOGETHER};
use crate::memory::parties::{Publish, Receive};

/// One value of an answer.
#[derive(Debug)]
pub(crate) enum Value {
    Text(Bytes),
    List(Vec<Value>),
    Nothing,
}

impl Value {
    pub(crate) fn list(self) -> Vec<Value> {
        match self {
            Self::List(values) => values,
            _ => Vec::new(),
        }
    }

    pub(crate) fn text(self) -> Bytes {
        match self {
            Self::Text(text) => text,
            _ => Bytes::new(),
        }
    }
}

pub(crate) struct Connection {
    stream: TcpStream,
    out: Vec<u8>,
    read: BytesMut,
}

impl Connection {
    pub(crate) async fn open(address: std::net::SocketAddr) -> Result<Self, BoxError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, out: Vec::with_capacity(64 << 10), read: BytesMut::with_capacity(64 << 10) })
    }

    pub(crate) fn write(&mut self, words: &[&[u8]]) {
        let number = |out: &mut Vec<u8>, sign: u8, number: usize| {
            out.push(sign);
            let (mut digits, mut rest, mut at) = ([0; 20], number, 20);
            loop {
                at -= 1;
                digits[at] = b'0' + (rest % 10) as u8;
                rest /= 10;
                if rest == 0 {
                    break;
                }
            }
            out.extend_from_slice(&digits[at..]);
            out.extend_from_slice(b"\r\n");
        };
        number(&mut self.out, b'*', words.len());
        for word in words {
            number(&mut self.out, b'$', word.len());
            self.out.extend_from_slice(word);
            self.out.extend_from_slice(b"\r\n");
        }
    }

    pub(crate) async fn flush(&mut self) -> Result<(), BoxError> {
        self.stream.write_all(&self.out).await?;
        self.out.clear();
        Ok(())
    }

    pub(crate) async fn answer(&mut self) -> Result<Value, BoxError> {
        loop {
            let mut at = 0;
            if is_whole(&self.read, &mut at) {
                let mut whole = self.read.split_to(at).freeze();
                return parse(&mut whole);
            }
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err("the server has hung up".into());
            }
        }
    }

    pub(crate) async fn ask(&mut self, words: &[&[u8]]) -> Result<Value, BoxError> {
        self.write(words);
        self.flush().await?;
        self.answer().await
    }
}

/// The number in the line that starts here, and where the next one starts.
fn line(read: &[u8], at: usize) -> Option<(i64, usize)> {
    let end = at + read[at..].iter().position(|byte| *byte == b'\n')?;
    let digits = read[at + 1..end - 1].iter();
    let number = digits.fold((0, 1), |(number, sign), digit| match digit {
        b'0'..=b'9' => (number * 10 + i64::from(digit - b'0'), sign),
        _ => (number, -1),
    });
    Some((number.0 * number.1, end + 1))
}

/// Moves `at` behind the value that starts there, if it is here to its end.
fn is_whole(read: &[u8], at: &mut usize) -> bool {
    if *at >= read.len() {
        return false;
    }
    let kind = read[*at];
    let Some((number, next)) = line(read, *at) else { return false };
    *at = next;
    match kind {
        b'$' if number >= 0 => {
            *at += number as usize + 2;
            *at <= read.len()
        }
        b'*' => (0..number.max(0)).all(|_| is_whole(read, at)),
        _ => true,
    }
}

fn parse(whole: &mut Bytes) -> Result<Value, BoxError> {
    let kind = whole[0];
    let (number, next) = line(whole, 0).ok_or("an answer without an end")?;
    let first = whole.split_to(next);
    match kind {
        b'-' => Err(String::from_utf8_lossy(&first).into_owned().into()),
        b'$' | b'*' if number < 0 => Ok(Value::Nothing),
        b'$' => {
            let text = whole.split_to(number as usize);
            whole.advance(2);
            Ok(Value::Text(text))
        }
        b'*' => Ok(Value::List((0..number).map(|_| parse(whole)).collect::<Result<_, _>>()?)),
        _ => Ok(Value::Text(first.slice(1..first.len() - 2))),
    }
}

/// Writes events, so many commands at once and so many without an answer.
pub(crate) struct Publisher {
    pub(crate) connection: Connection,
    pub(crate) together: usize,
    pub(crate) written: usize,
    pub(crate) unanswered: usize,
    pub(crate) progress: Arc<Progress>,
}

impl Publisher {
    pub(crate) async fn open(
        address: std::net::SocketAddr,
        together: usize,
        progress: Arc<Progress>,
    ) -> Result<Self, BoxError> {
        Ok(Self { connection: Connection::open(address).await?, together, written: 0, unanswered: 0, progress })
    }
}

impl Publish for Publisher {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        let json = wire::encode(&event)?;
        self.connection.write(&[b"XADD", STREAM.as_bytes(), b"MAXLEN", b"~", KEPT.as_bytes(), b"*", b"event", &json]);
        self.written += 1;
        if self.written == self.together {
            self.connection.flush().await?;
            self.unanswered += std::mem::take(&mut self.written);
            while self.unanswered > IN_FLIGHT - TOGETHER {
                self.connection.answer().await?;
                self.unanswered -= 1;
            }
        }
        Ok(())
    }

    async fn finish(&mut self, published: u64) -> Result<(), BoxError> {
        self.connection.flush().await?;
        for _ in 0..self.unanswered + self.written {
            self.connection.answer().await?;
        }
        self.progress.finish(published);
        Ok(())
    }
}

/// Reads events, each handed over so many times: read once, decoded once.
pub(crate) struct Receiver {
    connection: Connection,
    from: Bytes,
    waiting: VecDeque<Arc<Event>>,
    copies: usize,
    handed: usize,
    received: u64,
    progress: Arc<Progress>,
    /// The consumer's name, if it is of a group.
    consumer: Option<String>,
    unacknowledged: Vec<Bytes>,
}

impl Receiver {
    pub(crate) async fn open(
        address: std::net::SocketAddr,
        copies: usize,
        consumer: Option<String>,
        progress: Arc<Progress>,
    ) -> Result<Self, BoxError> {
        let connection = Connection::open(address).await?;
        Ok(Self {
            connection,
            from: Bytes::from_static(b"0-0"),
            waiting: VecDeque::new(),
            copies,
            handed: 0,
            received: 0,
            progress,
            consumer,
            unacknowledged: Vec::new(),
        })
    }

    async fn read(&mut self) -> Result<(), BoxError> {
        let stream = STREAM.as_bytes();
        let (read, block) = (READ.to_string(), BLOCK.as_millis().to_string());
        let (read, block) = (read.as_bytes(), block.as_bytes());
        let answer = match &self.consumer {
            None => {
                let words: [&[u8]; 8] = [b"XREAD", b"COUNT", read, b"BLOCK", block, b"STREAMS", stream, &self.from];
                self.connection.ask(&words).await?
            }
            Some(consumer) => {
                if !self.unacknowledged.is_empty() {
                    let mut words: Vec<&[u8]> = vec![b"XACK", stream, b"g"];
                    words.extend(self.unacknowledged.iter().map(|id| &**id));
                    self.connection.write(&words);
                }
                let consumer = consumer.as_bytes();
                self.connection.write(&[
                    b"XREADGROUP",
                    b"GROUP",
                    b"g",
                    consumer,
                    b"COUNT",
                    read,
                    b"BLOCK",
                    block,
                    b"STREAMS",
                    stream,
                    b">",
                ]);
                self.connection.flush().await?;
                if !std::mem::take(&mut self.unacknowledged).is_empty() {
                    self.connection.answer().await?;
                }
                self.connection.answer().await?
            }
        };
        let Some(of_stream) = answer.list().pop() else { return Ok(()) };
        for entry in of_stream.list().pop().map(Value::list).unwrap_or_default() {
            let mut entry = entry.list().into_iter();
            let (id, fields) = (entry.next().ok_or("no id")?.text(), entry.next().ok_or("no fields")?.list());
            let json = fields.into_iter().nth(1).ok_or("no event")?.text();
            self.waiting.push_back(Arc::new(wire::decode(&json, None)?.event));
            if self.consumer.is_some() {
                self.unacknowledged.push(id);
            } else {
                self.from = id;
            }
        }
        Ok(())
    }
}

impl Receive for Receiver {
    type Item = Arc<Event>;

    async fn receive(&mut self) -> Result<Option<Arc<Event>>, BoxError> {
        loop {
            if let Some(event) = self.waiting.front() {
                let event = event.clone();
                self.handed += 1;
                if self.handed == self.copies {
                    self.handed = 0;
                    self.waiting.pop_front();
                    self.received += 1;
                    self.progress.handled(self.consumer.is_some());
                }
                return Ok(Some(event));
            }
            if self.progress.is_over(self.received, self.consumer.is_some()) {
                return Ok(None);
            }
            self.read().await?;
        }
    }

    fn done(&mut self, event: Arc<Event>) {
        drop(event);
    }
}
