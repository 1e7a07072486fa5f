//! Events from JSON lines, read by a thread of its own and handed over in batches of bounded size.

use std::io::{self, BufRead, BufReader, Read};
use std::thread;

use bytes::Bytes;
use pubsub_core::wire::{self, Stamp};
use pubsub_core::{Event, EventId, Timestamp};
use tokio::sync::mpsc;

/// The longest line in bytes.
const MAX_LINE: usize = 1 << 20;

/// A batch ends with the line that reaches one of these, or when no further line has arrived yet.
const MAX_BATCH: usize = 100;
const MAX_BATCH_BYTES: usize = 1 << 20;

/// What is published when nothing is piped in.
const FEED: &str = include_str!("feed.jsonl");

/// A line's number, from 1, and its event, or what is wrong with it.
pub(crate) type Line = (u64, Result<Event, String>);

/// Standard input if something is piped into it; the built-in feed if it is a terminal or another device, as `/dev/null` is.
pub(crate) fn open() -> io::Result<Box<dyn Read + Send>> {
    let stdin = io::stdin();
    Ok(if is_device(&stdin)? { Box::new(FEED.as_bytes()) } else { Box::new(stdin) })
}

#[cfg(unix)]
fn is_device(stdin: &io::Stdin) -> io::Result<bool> {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileTypeExt;
    let file = std::fs::File::from(stdin.as_fd().try_clone_to_owned()?);
    Ok(file.metadata()?.file_type().is_char_device())
}

#[cfg(not(unix))]
fn is_device(stdin: &io::Stdin) -> io::Result<bool> {
    Ok(io::IsTerminal::is_terminal(stdin))
}

/// Reads to the end, or until the receiver is dropped. An error is the last that is received.
pub(crate) fn read(input: impl Read + Send + 'static, max_payload: Option<usize>) -> mpsc::Receiver<io::Result<Vec<Line>>> {
    let (sender, receiver) = mpsc::channel(2);
    // Not a task of the runtime, which would wait for it at the end even if no line ever came.
    thread::spawn(move || {
        let mut lines = Lines { input: BufReader::with_capacity(64 << 10, input), number: 0, max_payload };
        loop {
            let batch = lines.batch();
            let is_last = !batch.as_ref().is_ok_and(|batch| !batch.is_empty());
            if sender.blocking_send(batch).is_err() || is_last {
                return;
            }
        }
    });
    receiver
}

struct Lines<R> {
    input: BufReader<R>,
    number: u64,
    max_payload: Option<usize>,
}

impl<R: Read> Lines<R> {
    /// The next lines that say anything; empty at the end.
    fn batch(&mut self) -> io::Result<Vec<Line>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(line) = self.line()? {
            bytes += line.as_ref().map_or(0, Vec::len);
            let blank = line.as_ref().is_ok_and(|line| line.trim_ascii().is_empty());
            if !blank {
                batch.push((self.number, line.and_then(|line| event(line, self.max_payload))));
            }
            let would_wait = !self.input.buffer().contains(&b'\n');
            if !batch.is_empty() && (would_wait || batch.len() == MAX_BATCH || bytes >= MAX_BATCH_BYTES) {
                break;
            }
        }
        Ok(batch)
    }

    /// The next line, its end included; none behind the last. Of a line that is too long nothing is kept.
    fn line(&mut self) -> io::Result<Option<Result<Vec<u8>, String>>> {
        let mut line = Vec::new();
        self.input.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        self.number += 1;
        if line.len() > MAX_LINE && line.last() != Some(&b'\n') {
            self.input.skip_until(b'\n')?;
            return Ok(Some(Err(format!("longer than {MAX_LINE} bytes"))));
        }
        if self.number == 1 && line.starts_with(b"\xEF\xBB\xBF") {
            line.drain(..3); // the mark that some editors begin a file with
        }
        Ok(Some(Ok(line)))
    }
}

/// The event of a line: the JSON form that events have on every wire, of which only the type is required.
fn event(mut line: Vec<u8>, max_payload: Option<usize>) -> Result<Event, String> {
    line.truncate(line.trim_ascii_end().len()); // an end of line would put what is missing at its end on a second one
    if let Err(error) = std::str::from_utf8(&line) {
        return Err(format!("not UTF-8 at column {}", error.valid_up_to() + 1));
    }
    let stamp = Stamp { id: EventId::random(), created_at: Timestamp::now() };
    let told = |error: pubsub_core::Error| {
        error.to_string().replace(" at line 1 column 0", "").replace(" at line 1 column ", " at column ")
    };
    let event = wire::decode(&Bytes::from(line), Some(stamp)).map_err(told)?.event;
    if event.event_type().is_empty() {
        return Err("the type is empty".to_owned());
    }
    max_payload.map_or(Ok(()), |limit| event.check_size(limit)).map_err(told)?;
    Ok(event)
}
