//! Server-sent events as bytes: the format of the HTML standard, without a socket.

use std::fmt::{Display, Write};

use bytes::{BufMut, BytesMut};

/// Nothing, said so that silence can be told from a connection that is gone.
pub(crate) const HEARTBEAT: &[u8] = b":\n\n";

/// An event: what `onmessage` gets.
pub(crate) fn message(out: &mut BytesMut, id: Option<impl Display>, json: &[u8]) {
    if let Some(place) = id {
        self::id(out, place);
    }
    data(out, json);
    out.put_u8(b'\n');
}

/// Something about the stream and not of the topic: what a listener of this name gets.
pub(crate) fn notice(out: &mut BytesMut, name: &str, json: &[u8]) {
    out.put_slice(b"event: ");
    out.put_slice(name.as_bytes());
    out.put_u8(b'\n');
    data(out, json);
    out.put_u8(b'\n');
}

/// What a stream begins with: when to come again once it ends, and where it begins, which a client that loses its connection before
/// the first event gives back. An id without data is remembered and calls nobody.
pub(crate) fn opening(out: &mut BytesMut, reconnect_millis: u128, id: Option<impl Display>) {
    let _ = writeln!(out, "retry: {reconnect_millis}"); // a buffer that grows refuses nothing
    if let Some(place) = id {
        self::id(out, place);
    }
    out.put_u8(b'\n');
}

/// The line of an event or notice that says where it stands. It comes first.
pub(crate) fn id(out: &mut BytesMut, id: impl Display) {
    let _ = writeln!(out, "id: {id}"); // a buffer that grows refuses nothing
}

/// Any end of line begins another line of data. In JSON line ends stand between tokens only, so that which they are does not matter.
fn data(out: &mut BytesMut, json: &[u8]) {
    let mut line = |line: &[u8]| {
        out.put_slice(b"data: ");
        out.put_slice(line);
        out.put_u8(b'\n');
    };
    // Nearly always it is one line, and looking for a byte is faster than looking at each.
    if !json.contains(&b'\n') && !json.contains(&b'\r') {
        return line(json);
    }
    json.split(|byte| matches!(byte, b'\n' | b'\r')).for_each(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_as_the_standard_says() {
        let mut out = BytesMut::new();
        opening(&mut out, 1000, Some("a.1.0.0"));
        message(&mut out, Some("a.1.1.0"), b"{\"a\":1}");
        message(&mut out, None::<&str>, b"{\r\n\"a\":\n1}");
        notice(&mut out, "gap", b"{}");
        let expected = "retry: 1000\nid: a.1.0.0\n\nid: a.1.1.0\ndata: {\"a\":1}\n\n\
                        data: {\ndata: \ndata: \"a\":\ndata: 1}\n\nevent: gap\ndata: {}\n\n";
        assert_eq!(std::str::from_utf8(&out).unwrap(), expected);
    }
}
