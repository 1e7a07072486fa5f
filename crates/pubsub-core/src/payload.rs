//! The data of an event: JSON, a value shared within the process, or something that never leaves it.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, ErrorKind, Result};

/// The data of an event. Cheap to clone.
#[derive(Clone)]
pub struct Payload(Repr);

#[derive(Clone)]
enum Repr {
    Json(Bytes),
    Typed(Arc<dyn Typed>),
    Live(Arc<dyn Any + Send + Sync>),
}

/// A value that stays a value inside the process and becomes JSON once, when first asked for.
trait Typed: Send + Sync {
    fn json(&self) -> &Result<Bytes, String>;
    fn size(&self) -> Result<usize, String>;
    fn round_trip(&self) -> Result<(), String>;
    fn value(&self) -> &(dyn Any + Send + Sync);
}

struct Cell<T> {
    value: T,
    json: OnceLock<Result<Bytes, String>>,
}

thread_local! {
    /// Where values are written first: what is kept of them is then allocated once, and as long as it is.
    static DRAFT: std::cell::Cell<Vec<u8>> = const { std::cell::Cell::new(Vec::new()) };
}

/// How much of a draft's memory is kept for the next.
const KEPT_DRAFT: usize = 64 << 10;

fn encode<T: Serialize>(value: &T) -> Result<Bytes, String> {
    // A value that encodes others while it is written finds none, and makes its own.
    let mut draft = DRAFT.try_with(std::cell::Cell::take).unwrap_or_default();
    draft.clear();
    serde_json::to_writer(&mut draft, value).map_err(|error| error.to_string())?;
    if draft.capacity() > KEPT_DRAFT {
        return Ok(Bytes::from(draft));
    }
    let json = Bytes::copy_from_slice(&draft);
    let _ = DRAFT.try_with(|kept| kept.set(draft)); // an error: the thread is ending
    Ok(json)
}

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> Typed for Cell<T> {
    fn json(&self) -> &Result<Bytes, String> {
        self.json.get_or_init(|| encode(&self.value))
    }

    fn size(&self) -> Result<usize, String> {
        if let Some(Ok(json)) = self.json.get() {
            return Ok(json.len());
        }
        // What Postcard cannot write, such as a sequence that does not know its length, is measured as JSON.
        postcard::experimental::serialized_size(&self.value).or_else(|_| encode(&self.value).map(|json| json.len()))
    }

    fn round_trip(&self) -> Result<(), String> {
        let there = self.json().as_ref().map_err(Clone::clone)?;
        let back: T = serde_json::from_slice(there).map_err(|error| error.to_string())?;
        let again = encode(&back)?;
        // Compared as values: the order of keys in a map may change, and does not matter.
        let as_value = |json: &Bytes| serde_json::from_slice::<serde_json::Value>(json);
        match (as_value(there), as_value(&again)) {
            (Ok(a), Ok(b)) if a == b => Ok(()),
            _ => Err(format!("{} reads back as a different value", std::any::type_name::<T>())),
        }
    }

    fn value(&self) -> &(dyn Any + Send + Sync) {
        &self.value
    }
}

impl Payload {
    /// JSON `null`.
    pub fn null() -> Self {
        Self(Repr::Json(Bytes::from_static(b"null")))
    }

    /// A value that subscribers of the same process read without any serialisation, and all others as JSON.
    ///
    /// The value must read back from JSON as itself. In process that is not checked unless the bus has
    /// `strict_payloads` on; a backend that serialises refuses what cannot be written.
    pub fn typed<T: Serialize + DeserializeOwned + Send + Sync + 'static>(value: T) -> Self {
        Self(Repr::Typed(Arc::new(Cell { value, json: OnceLock::new() })))
    }

    /// The JSON of a value, written now.
    ///
    /// # Errors
    /// [`ErrorKind::NotSerializable`] if the value cannot be written as JSON.
    pub fn json_of<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        match serde_json::to_vec(value) {
            Ok(json) => Ok(Self(Repr::Json(json.into()))),
            Err(error) => Err(Error::new(ErrorKind::NotSerializable(error.to_string().into()))),
        }
    }

    /// Text that is JSON already.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] if it is not exactly one JSON value.
    pub fn json(json: impl Into<Bytes>) -> Result<Self> {
        let json = json.into();
        match serde_json::from_slice::<&serde_json::value::RawValue>(&json) {
            Ok(_) => Ok(Self(Repr::Json(json))),
            Err(error) => Err(Error::new(ErrorKind::Decode(error.to_string().into()))),
        }
    }

    /// Text that is known to be JSON: a decoder has just read it as such.
    pub(crate) fn json_unchecked(json: Bytes) -> Self {
        Self(Repr::Json(json))
    }

    /// A value that cannot leave the process: for events published `local_only`.
    pub fn live<T: Any + Send + Sync>(value: Arc<T>) -> Self {
        Self(Repr::Live(value))
    }

    /// Whether this payload can only be published `local_only`.
    pub fn is_live(&self) -> bool {
        matches!(self.0, Repr::Live(_))
    }

    /// About how many bytes the data has, for whoever bounds what is kept: the length of its JSON, or, of a typed value that was not
    /// written yet, of a compact binary form ([Postcard](https://postcard.jamesmunns.com/wire-format)), which costs a fraction of
    /// writing it. Nothing of that is kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotSerializable`] if it is live, or its value refuses to be written.
    pub fn size(&self) -> Result<usize> {
        match &self.0 {
            Repr::Typed(cell) => cell.size().map_err(|why| Error::new(ErrorKind::NotSerializable(why.into()))),
            _ => self.to_json().map(|json| json.len()),
        }
    }

    /// The payload as JSON; written once, then kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotSerializable`] if it is live, or its value refuses to be written.
    pub fn to_json(&self) -> Result<Bytes> {
        let refuse = |why: String| Error::new(ErrorKind::NotSerializable(why.into()));
        match &self.0 {
            Repr::Json(json) => Ok(json.clone()),
            Repr::Typed(cell) => cell.json().clone().map_err(refuse),
            Repr::Live(_) => Err(refuse("a live value never leaves its process".into())),
        }
    }

    /// The payload as a `T`: borrowed where it is one already, else decoded from its JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] if the JSON is not a `T`, or a live value is of another type.
    pub fn get<T: DeserializeOwned + 'static>(&self) -> Result<Data<'_, T>> {
        match &self.0 {
            Repr::Json(json) => decode(json).map(Data::Owned),
            Repr::Typed(cell) => match cell.value().downcast_ref() {
                Some(value) => Ok(Data::Borrowed(value)),
                None => decode(&self.to_json()?).map(Data::Owned),
            },
            Repr::Live(_) => self.get_live().map(Data::Borrowed),
        }
    }

    /// The live or typed value itself.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] if there is none of this type in the process.
    pub fn get_live<T: Any>(&self) -> Result<&T> {
        let value = match &self.0 {
            Repr::Json(_) => None,
            Repr::Typed(cell) => cell.value().downcast_ref(),
            Repr::Live(value) => value.downcast_ref(),
        };
        value.ok_or_else(|| {
            let why = format!("the payload holds no value of type {}", std::any::type_name::<T>());
            Error::new(ErrorKind::Decode(why.into()))
        })
    }

    /// Makes the payload plain JSON and proves that it reads back as itself.
    ///
    /// # Errors
    /// [`ErrorKind::NotSerializable`] if it does not.
    pub fn strict(&self) -> Result<Self> {
        if let Repr::Typed(cell) = &self.0 {
            cell.round_trip().map_err(|why| Error::new(ErrorKind::NotSerializable(why.into())))?;
        }
        Ok(Self(Repr::Json(self.to_json()?)))
    }
}

fn decode<T: DeserializeOwned>(json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| {
        let why = format!("data is not a {}: {error}", std::any::type_name::<T>());
        Error::new(ErrorKind::Decode(why.into())).caused_by(error)
    })
}

impl Default for Payload {
    fn default() -> Self {
        Self::null()
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Payloads may be large or secret: say what it is, not what it says.
        match &self.0 {
            Repr::Json(json) => write!(f, "Json({} bytes)", json.len()),
            Repr::Typed(_) => f.write_str("Typed"),
            Repr::Live(_) => f.write_str("Live"),
        }
    }
}

/// Data of an event as a `T`: borrowed from the event, or decoded for this call.
#[derive(Debug, Clone)]
pub enum Data<'a, T> {
    /// The publisher's own value.
    Borrowed(&'a T),
    /// Read from JSON.
    Owned(T),
}

impl<T> Deref for Data<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        match self {
            Self::Borrowed(value) => value,
            Self::Owned(value) => value,
        }
    }
}

impl<T: Clone> Data<'_, T> {
    /// The value itself, cloned only if it is shared.
    pub fn into_owned(self) -> T {
        match self {
            Self::Borrowed(value) => value.clone(),
            Self::Owned(value) => value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_encode_others_while_it_is_written() {
        #[derive(serde::Deserialize)]
        struct Nested(u32);

        impl Serialize for Nested {
            fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
                let inner = (self.0 > 0).then(|| Payload::typed(Nested(self.0 - 1)).to_json().unwrap().len());
                to.serialize_str(&"x".repeat(inner.unwrap_or_default() + 1))
            }
        }

        for _ in 0..2 {
            assert_eq!(Payload::typed(Nested(2)).to_json().unwrap().as_ref(), br#""xxxxxxx""#);
        }
        let long = "y".repeat(2 * KEPT_DRAFT);
        for text in [&*long, "short", ""] {
            assert_eq!(Payload::typed(text.to_owned()).to_json().unwrap(), format!("\"{text}\"").into_bytes());
        }
    }

    #[test]
    fn typed_is_shared_and_json_is_written_once() {
        let payload = Payload::typed(vec![1_u32, 2]);
        assert!(matches!(payload.get::<Vec<u32>>().unwrap(), Data::Borrowed(_)));
        assert_eq!(*payload.get::<Vec<u64>>().unwrap(), [1, 2]);
        assert_eq!(payload.to_json().unwrap().as_ptr(), payload.to_json().unwrap().as_ptr());
    }

    #[test]
    fn is_measured_without_being_written() {
        let text = "x".repeat(1000);
        for (payload, size) in [(Payload::null(), 4), (Payload::json("[1, 2]").unwrap(), 6), (Payload::typed(text), 1002)] {
            assert_eq!(payload.size().unwrap(), size);
        }
        assert!(Payload::live(Arc::new(1)).size().is_err());
    }

    #[test]
    fn what_only_json_can_write_is_measured_as_json() {
        #[derive(Serialize, serde::Deserialize)]
        struct Open {
            known: u8,
            #[serde(flatten)]
            rest: std::collections::BTreeMap<String, u8>,
        }
        let payload = Payload::typed(Open { known: 1, rest: [("more".into(), 2)].into() });
        assert_eq!(payload.size().unwrap(), payload.to_json().unwrap().len());
    }

    #[test]
    fn strict_refuses_what_does_not_come_back() {
        for payload in [Payload::typed(f64::NAN), Payload::live(Arc::new(1))] {
            assert!(matches!(payload.strict().unwrap_err().kind(), ErrorKind::NotSerializable(_)));
        }
        assert_eq!(Payload::typed(1.5).strict().unwrap().to_json().unwrap(), "1.5");
    }

    #[test]
    fn json_is_checked() {
        assert!(Payload::json(r#"{"a":[1,2,{"b":null}]}"#).is_ok());
        for bad in ["", "{", "1 2", "nul", "\u{1}"] {
            assert!(matches!(Payload::json(bad).unwrap_err().kind(), ErrorKind::Decode(_)), "{bad:?}");
        }
    }
}
