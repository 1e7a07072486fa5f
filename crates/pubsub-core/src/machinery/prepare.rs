//! What every publish checks before anything is sent.

use std::sync::Arc;

use crate::{Capabilities, Error, ErrorKind, Event, PublishOptions, Result};

/// Refuses what must not be published, in the order in which all backends do, and makes payloads plain JSON where
/// `strict_payloads` is declared. `None` leaves the events as they are, as `local_only` ones always are.
///
/// # Errors
/// `InvalidOption`; `NotSerializable` and `TooLarge`, naming the event.
pub fn prepare(
    events: &[Arc<Event>],
    options: &PublishOptions,
    capabilities: &Capabilities,
) -> Result<Option<Vec<Arc<Event>>>> {
    options.validate()?;
    if options.local_only {
        return Ok(None);
    }
    for event in events {
        if event.payload().is_live() {
            let why = "a live value is published only with `local_only`";
            return Err(Error::new(ErrorKind::NotSerializable(why.into())).on(event.id()));
        }
        if let Some(limit) = capabilities.max_payload {
            event.check_size(limit).map_err(|error| error.on(event.id()))?;
        }
    }
    if !capabilities.strict_payloads {
        return Ok(None);
    }
    let strict = |event: &Arc<Event>| {
        let payload = event.payload().strict().map_err(|error| error.on(event.id()))?;
        Ok(Arc::new(Event::clone(event).with_payload(payload)))
    };
    events.iter().map(strict).collect::<Result<_>>().map(Some)
}
