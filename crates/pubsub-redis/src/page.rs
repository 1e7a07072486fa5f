//! Reading a page of a stream together with what is known of the stream at that moment, so that what is missing before it can be told.

use std::collections::HashMap;

use fred::types::Value;

use crate::entry::{Entry, EntryId};
use crate::errors::Fault;
use crate::link::{Cmd, Link};
use crate::reply;

/// What is asked for: the entries behind one, so many at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) stream: &'a str,
    pub(crate) from: EntryId,
    pub(crate) count: usize,
}

/// What there was.
#[derive(Debug, Default)]
pub(crate) struct Page {
    pub(crate) entries: Vec<Entry>,
    /// The stream as it was then; none if there was none.
    pub(crate) known: Option<Known>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    /// The id given last.
    pub(crate) last: EntryId,
    /// How many were ever added.
    pub(crate) added: u64,
    /// How many came before the oldest that is left; none if single ones were deleted.
    pub(crate) trimmed: Option<u64>,
}

/// Reads pages, each in a transaction of its own, all in one pipeline.
pub(crate) async fn read_pages(link: &Link, requests: &[Request<'_>]) -> Vec<Result<Page, Fault>> {
    let commands = requests.iter().flat_map(|Request { stream, from, count }| {
        let range = Cmd::new("XRANGE").key(stream).arg(format!("({from}")).arg("+").arg("COUNT").number(*count as u64);
        let info = Cmd::new("XINFO").arg("STREAM").key(stream);
        [Cmd::new("MULTI").beside(stream), info, range, Cmd::new("EXEC").beside(stream)]
    });
    let mut answers = link.pipeline(commands.collect()).await.into_iter();
    requests.iter().map(|_| page(reply::executed(answers.by_ref().take(4)))).collect()
}

fn page(executed: Result<Vec<Value>, Fault>) -> Result<Page, Fault> {
    let executed = match executed {
        Err(fault) if fault.is_missing_key() => return Ok(Page::default()),
        executed => executed?,
    };
    let [info, entries] = reply::tuple(Value::Array(executed))?;
    let info: HashMap<String, Value> =
        reply::pairs(info)?.into_iter().filter_map(|(name, value)| Some((name.into_string()?, value))).collect();
    let field = |name| info.get(name).ok_or(Fault::Nonsense("a stream without its length"));
    let (added, length) = (reply::number(field("entries-added")?)?, reply::number(field("length")?)?);
    let whole = reply::id(field("max-deleted-entry-id")?)? == EntryId::ZERO;
    let trimmed = whole.then(|| added.saturating_sub(length));
    let known = Known { last: reply::id(field("last-generated-id")?)?, added, trimmed };
    Ok(Page { entries: reply::entries(entries)?, known: Some(known) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(values: impl IntoIterator<Item = Value>) -> Value {
        Value::Array(values.into_iter().collect())
    }

    #[test]
    fn tells_how_many_were_trimmed() {
        let info = |deleted: &str| {
            let fields = ["length", "entries-added", "max-deleted-entry-id", "last-generated-id"];
            let values: [Value; 4] = [2.into(), 10.into(), deleted.into(), "9-0".into()];
            list(fields.into_iter().zip(values).flat_map(|(name, value)| [name.into(), value]))
        };
        let entries = || list([list(["8-0".into(), list(["event".into(), "{}".into()])])]);
        let read = page(Ok(vec![info("0-0"), entries()])).unwrap();
        let known = Known { last: "9-0".parse().unwrap(), added: 10, trimmed: Some(8) };
        assert_eq!((read.entries.len(), read.known), (1, Some(known)));
        assert_eq!(page(Ok(vec![info("3-0"), entries()])).unwrap().known.unwrap().trimmed, None);
        assert!(page(Err(Fault::Refused("ERR no such key".into()))).unwrap().known.is_none());
        assert!(page(Ok(vec![list([]), entries()])).is_err() && page(Ok(Vec::new())).is_err());
    }
}
