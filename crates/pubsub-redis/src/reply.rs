//! Taking answers apart. Pure: no socket, and no answer makes it panic.

use bytes::Bytes;
use fred::types::Value;

use crate::entry::{Entry, EntryId};
use crate::errors::Fault;

type Parsed<T> = Result<T, Fault>;

pub(crate) fn bytes(value: Value) -> Parsed<Bytes> {
    value.into_bytes().ok_or(Fault::Nonsense("text was expected"))
}

pub(crate) fn text(value: Value) -> Parsed<String> {
    value.into_string().ok_or(Fault::Nonsense("text was expected"))
}

pub(crate) fn number(value: &Value) -> Parsed<u64> {
    value.as_u64().ok_or(Fault::Nonsense("a number was expected"))
}

pub(crate) fn id(value: &Value) -> Parsed<EntryId> {
    let id = value.as_str().and_then(|text| text.parse().ok());
    id.ok_or(Fault::Nonsense("the id of an entry was expected"))
}

pub(crate) fn array(value: Value) -> Parsed<Vec<Value>> {
    match value {
        Value::Array(values) => Ok(values),
        Value::Null => Ok(Vec::new()),
        _ => Err(Fault::Nonsense("an array was expected")),
    }
}

/// So many values.
pub(crate) fn tuple<const N: usize>(value: Value) -> Parsed<[Value; N]> {
    array(value)?.try_into().map_err(|_| Fault::Nonsense("an array of another length was expected"))
}

/// What the commands of a transaction were answered: the answer to its end, if that is a list; else why it is none.
pub(crate) fn executed(answers: impl Iterator<Item = Result<Value, Fault>>) -> Parsed<Vec<Value>> {
    let mut last = Err(Fault::Nonsense("a transaction without an answer"));
    let mut refused = None;
    for answer in answers {
        if let Err(fault) = &answer
            && !fault.is("EXECABORT")
        {
            refused.get_or_insert_with(|| fault.clone());
        }
        last = answer;
    }
    match (last, refused) {
        (Ok(Value::Array(answers)), None) => Ok(answers),
        // A command that was refused when it was queued says why; the end of the transaction only that there was one.
        (Err(fault), Some(refused)) if fault.is("EXECABORT") => Err(refused),
        (Err(fault), _) => Err(fault),
        (Ok(_), Some(fault)) => Err(Fault::Unknown(fault.to_string())),
        (Ok(_), None) => Err(Fault::Nonsense("a transaction with another answer")),
    }
}

/// A map, or what stands for one in the older protocol: a flat array, or an array of pairs.
pub(crate) fn pairs(value: Value) -> Parsed<Vec<(Value, Value)>> {
    match value {
        Value::Map(map) => Ok(map.inner().into_iter().map(|(key, value)| (Value::Bytes(key.into_bytes()), value)).collect()),
        Value::Array(values) if values.iter().all(|value| matches!(value, Value::Array(pair) if pair.len() == 2)) => {
            values.into_iter().map(|pair| tuple(pair).map(|[key, value]| (key, value))).collect()
        }
        other => {
            let mut values = array(other)?.into_iter();
            let mut pairs = Vec::with_capacity(values.len() / 2);
            while let Some(key) = values.next() {
                pairs.push((key, values.next().ok_or(Fault::Nonsense("a map was expected"))?));
            }
            Ok(pairs)
        }
    }
}

/// An entry: its id and its fields.
pub(crate) fn entry(value: Value) -> Parsed<Entry> {
    let [id, fields] = tuple(value)?;
    self::fields(self::id(&id)?, fields)
}

pub(crate) fn fields(id: EntryId, fields: Value) -> Parsed<Entry> {
    let mut values = array(fields)?.into_iter();
    let mut fields = Vec::with_capacity(values.len() / 2);
    while let (Some(name), Some(value)) = (values.next(), values.next()) {
        fields.push((bytes(name)?, bytes(value)?));
    }
    Ok(Entry::read(id, fields))
}

pub(crate) fn entries(value: Value) -> Parsed<Vec<Entry>> {
    array(value)?.into_iter().map(entry).collect()
}

/// What was read from several streams, by their keys; nothing if the time was over.
pub(crate) fn streams(value: Value) -> Parsed<Vec<(String, Vec<Entry>)>> {
    let read = |(key, found)| Ok((text(key)?, entries(found)?));
    pairs(value)?.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(values: impl IntoIterator<Item = Value>) -> Value {
        Value::Array(values.into_iter().collect())
    }

    #[test]
    fn streams_come_as_maps_and_as_pairs() {
        let entry = || list([list(["5-1".into(), list(["event".into(), "{}".into()])])]);
        for answer in [list([list(["a".into(), entry()])]), list(["a".into(), entry()])] {
            let read = streams(answer).unwrap();
            assert_eq!((read[0].0.as_str(), read[0].1[0].id.to_string().as_str()), ("a", "5-1"));
        }
        assert!(streams(Value::Null).unwrap().is_empty());
    }

    #[test]
    fn nonsense_is_an_error() {
        for nonsense in
            [Value::Integer(1), list([1.into()]), list(["x".into(), Value::Null]), list([list(["1".into(), Value::Null])])]
        {
            assert!(entries(nonsense).is_err());
        }
        assert!(tuple::<2>(list([])).is_err() && pairs(list(["a".into()])).is_err() && number(&"x".into()).is_err());
    }
}
