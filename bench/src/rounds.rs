//! Rounds: every party in turn, again and again, so that whatever else the machine does hits all of them alike.

use std::time::Duration;

use pubsub_core::BoxError;

use crate::report::{Role, Row, Unit};

/// Settings that one round measures together, and who takes part.
pub(crate) struct Contest {
    pub(crate) backend: &'static str,
    pub(crate) settings: Vec<(&'static str, Unit)>,
    /// How many rounds there are, if not as many as the user says.
    pub(crate) rounds: Option<u32>,
    pub(crate) parties: Vec<Party>,
}

/// Somebody who takes part.
pub(crate) struct Party {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    /// One round of about this length: a figure for each setting of the contest.
    pub(crate) round: Box<dyn FnMut(Duration) -> Result<Vec<f64>, BoxError>>,
}

impl Party {
    pub(crate) fn new(
        name: &'static str,
        role: Role,
        round: impl FnMut(Duration) -> Result<Vec<f64>, BoxError> + 'static,
    ) -> Self {
        Self { name, role, round: Box::new(round) }
    }
}

/// Lets everybody warm up once, then plays the rounds.
pub(crate) fn measure(contest: &mut Contest, rounds: u32, seconds: f64) -> Result<Vec<Row>, BoxError> {
    let Contest { backend, settings, rounds: own, parties } = contest;
    let (name, rounds) = (settings[0].0, own.unwrap_or(rounds));
    let mut figures = vec![vec![Vec::new(); settings.len()]; parties.len()];
    for round in 0..=rounds as usize {
        eprint!("\r\x1b[K{backend}, {name}: round {round} of {rounds}");
        for turn in 0..parties.len() {
            // Somebody else begins each time.
            let turn = (turn + round) % parties.len();
            let party = &mut parties[turn];
            let measured = (party.round)(Duration::from_secs_f64(seconds));
            let measured = measured.map_err(|error| format!("{name}, {}: {error}", party.name))?;
            if round > 0 {
                figures[turn].iter_mut().zip(measured).for_each(|(figures, figure)| figures.push(figure));
            }
        }
    }
    eprint!("\r\x1b[K");
    let row = |setting: usize, party: usize| {
        let (name, unit) = settings[setting];
        Row::of(backend, name, parties[party].name, parties[party].role, unit, &figures[party][setting])
    };
    Ok((0..settings.len())
        .flat_map(|setting| (0..parties.len()).map(move |party| (setting, party)))
        .map(|(s, p)| row(s, p))
        .collect())
}
