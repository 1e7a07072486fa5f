//! What was measured: rows, and a table of them.

use serde::Serialize;

/// Part of whose side a party is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// This project.
    Ours,
    /// The least that a program must do: the same work with nothing of a bus around it.
    Limit,
    /// Somebody else's way.
    Peer,
}

/// What figures are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    #[serde(rename = "events/s")]
    Events,
    #[serde(rename = "deliveries/s")]
    Deliveries,
    /// Bytes of payload.
    #[serde(rename = "bytes/s")]
    Throughput,
    #[serde(rename = "us")]
    Microseconds,
    #[serde(rename = "bytes")]
    Bytes,
}

impl Unit {
    pub(crate) fn more_is_better(self) -> bool {
        matches!(self, Self::Events | Self::Deliveries | Self::Throughput)
    }

    fn shown(self, figure: f64) -> String {
        match self {
            Self::Events if figure >= 1e6 => format!("{:.2} M/s", figure / 1e6),
            Self::Deliveries if figure >= 1e6 => format!("{:.2} M/s", figure / 1e6),
            Self::Events | Self::Deliveries => format!("{:.0} k/s", figure / 1e3),
            Self::Throughput => format!("{:.0} MB/s", figure / 1e6),
            Self::Microseconds => format!("{figure:.1} us"),
            Self::Bytes => format!("{figure:.0} B"),
        }
    }
}

/// One party in one setting.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) backend: &'static str,
    pub(crate) setting: &'static str,
    pub(crate) party: &'static str,
    pub(crate) role: Role,
    pub(crate) unit: Unit,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
}

impl Row {
    pub(crate) fn of(
        backend: &'static str,
        setting: &'static str,
        party: &'static str,
        role: Role,
        unit: Unit,
        figures: &[f64],
    ) -> Self {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (sorted[0], sorted[sorted.len() - 1]);
        Self { backend, setting, party, role, unit, median: quantile(&sorted, 0.5), min, max, runs: sorted.len() }
    }
}

/// The figure below which this part of the sorted figures lies; between two of them, in proportion.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// Prints all rows: medians, the range, and how ours compares.
pub(crate) fn print(rows: &[Row]) {
    println!("\n{:<9} {:<20} {:<16} {:>11} {:>24}   ours is", "backend", "setting", "party", "median", "min to max");
    let mut before = "";
    for row in rows {
        if row.setting != before {
            println!();
            before = row.setting;
        }
        let ours =
            rows.iter().find(|other| other.setting == row.setting && other.backend == row.backend && other.role == Role::Ours);
        let ratio = match ours {
            Some(ours) if row.role != Role::Ours => format!("{:.2} x this", ours.median / row.median),
            _ => String::new(),
        };
        let range = format!("{} to {}", row.unit.shown(row.min), row.unit.shown(row.max));
        let median = row.unit.shown(row.median);
        println!("{:<9} {:<20} {:<16} {median:>11} {range:>24}   {ratio}", row.backend, row.setting, row.party);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_summed_up() {
        let row = Row::of("memory", "queued 1 to 1", "ours", Role::Ours, Unit::Events, &[3.0, 1.0, 2.0, 10.0]);
        assert_eq!((row.median, row.min, row.max, row.runs), (2.5, 1.0, 10.0, 4));
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.99), 2.98);
        assert_eq!(quantile(&[7.0], 0.5), 7.0);
    }

    #[test]
    fn rows_have_the_agreed_form() {
        let row = Row::of("memory", "latency p50", "tokio broadcast", Role::Peer, Unit::Microseconds, &[4.0]);
        let expected = serde_json::json!({
            "backend": "memory", "setting": "latency p50", "party": "tokio broadcast", "role": "peer", "unit": "us",
            "median": 4.0, "min": 4.0, "max": 4.0, "runs": 1
        });
        assert_eq!(serde_json::to_value(row).unwrap(), expected);
    }
}
