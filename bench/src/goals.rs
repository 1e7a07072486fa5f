//! What ours is meant to reach, as ratios: absolute figures do not travel from one machine to the next.

use crate::report::{Role, Row};

/// Whom ours is compared with.
#[derive(Debug, Clone, Copy)]
enum Against {
    Limit,
    BestChannel,
    Party(&'static str),
    /// A fixed figure.
    Figure(f64),
}

struct Goal {
    backend: &'static str,
    setting: &'static str,
    against: Against,
    /// At least this many times the other, or at most, as the setting's unit wants it.
    ratio: f64,
}

const fn goal(setting: &'static str, against: Against, ratio: f64) -> Goal {
    Goal { backend: "memory", setting, against, ratio }
}

const fn of_cache(setting: &'static str, against: Against, ratio: f64) -> Goal {
    Goal { backend: crate::cache::BACKEND, setting, against, ratio }
}

const fn of_redis(setting: &'static str, against: Against, ratio: f64) -> Goal {
    Goal { backend: crate::redis::BACKEND, setting, against, ratio }
}

const FRED: Against = Against::Party(crate::redis::FRED);

const fn of_unix(setting: &'static str, against: Against, ratio: f64) -> Goal {
    Goal { backend: crate::unix::BACKEND, setting, against, ratio }
}

const fn of_http(setting: &'static str, ratio: f64) -> Goal {
    Goal { backend: crate::http::BACKEND, setting, against: Against::Limit, ratio }
}

const fn of_gcp(setting: &'static str, ratio: f64) -> Goal {
    Goal { backend: crate::gcp::BACKEND, setting, against: Against::Party(crate::gcp::BY_HAND), ratio }
}

const MASTRA: Against = Against::Party(crate::node::MASTRA);

const NATS: Against = Against::Party("nats");

const GOALS: &[Goal] = &[
    goal("queued 1 to 1", Against::BestChannel, 1.0),
    goal("queued 1 to 1", Against::Limit, 0.45),
    goal("queued 1 to 1", MASTRA, 3.0),
    goal("inline 1 to 1", Against::Limit, 0.8),
    goal("inline 1 to 1", MASTRA, 5.0),
    goal("queued 1 to 10", Against::BestChannel, 1.0),
    goal("queued 1 to 10", MASTRA, 2.0),
    goal("group of 4", Against::Party("tokio mpsc"), 1.0),
    goal("group of 4", MASTRA, 3.0),
    goal("latency p99", Against::Party("tokio broadcast"), 1.5),
    goal("idle memory", Against::Figure(2048.0), 1.0),
    of_cache("publish", Against::Party(crate::cache::BARE), 0.45),
    of_cache("replay", Against::Figure(10e6), 1.0),
    of_redis("1 to 1", FRED, 1.0),
    of_redis("1 to 10", Against::Figure(1e6), 1.0),
    of_redis("group of 4", FRED, 0.95),
    of_redis("latency p50", FRED, 1.1),
    of_redis("one more of 10,000", Against::Figure(5000.0), 1.0),
    of_unix("1 to 1", Against::Limit, 0.75),
    of_unix("1 to 1", NATS, 1.3),
    of_unix("1 to 1", MASTRA, 15.0),
    of_unix("1 to 10", Against::Limit, 0.8),
    of_unix("1 to 10", NATS, 1.3),
    of_unix("group of 4", Against::Limit, 0.6),
    of_unix("group of 4", NATS, 1.2),
    of_unix("64 KiB", Against::Limit, 0.75),
    of_unix("latency p50", Against::Limit, 1.3),
    of_unix("latency p50", NATS, 1.0),
    of_unix("takeover", Against::Figure(50_000.0), 1.0),
    of_http("to 1 stream", 0.8),
    of_http("to 100 streams", 0.8),
    of_http("to 1000 streams", 0.8),
    of_gcp("publish", 0.95),
    of_gcp("publish, client CPU", 1.0),
    of_gcp("pull, 1 stream", 0.95),
    of_gcp("pull, 1, client CPU", 1.0),
    of_gcp("pull, 5 streams", 0.95),
    of_gcp("pull, 5, client CPU", 1.0),
];

/// Prints every goal whose parties were measured, and whether it is reached.
pub(crate) fn print(rows: &[Row]) {
    let compared: Vec<_> = GOALS.iter().filter_map(|goal| Some((goal, compare(goal, rows)?))).collect();
    if compared.is_empty() {
        return;
    }
    println!("\n{:<9} {:<20} {:<28} {:>8} {:>9}", "backend", "setting", "goal: ours against", "goal", "measured");
    for (goal, (name, ratio, reached)) in compared {
        let verdict = if reached { "reached" } else { "NOT REACHED" };
        println!("{:<9} {:<20} {name:<28} {:>8.2} {ratio:>9.2}  {verdict}", goal.backend, goal.setting, goal.ratio);
    }
}

/// The other's name, ours over it, and whether that is enough.
fn compare(goal: &Goal, rows: &[Row]) -> Option<(String, f64, bool)> {
    let rows: Vec<_> = rows.iter().filter(|row| row.backend == goal.backend && row.setting == goal.setting).collect();
    let ours = rows.iter().find(|row| row.role == Role::Ours)?;
    let (name, other) = match goal.against {
        Against::Figure(figure) => (format!("{figure:.0}"), figure),
        Against::Limit => ("the limit".to_owned(), rows.iter().find(|row| row.role == Role::Limit)?.median),
        Against::Party(name) => (name.to_owned(), rows.iter().find(|row| row.party == name)?.median),
        Against::BestChannel => {
            let channels = rows.iter().filter(|row| row.role == Role::Peer && row.party != crate::node::MASTRA);
            let best = channels.max_by(|a, b| a.median.total_cmp(&b.median))?;
            (format!("the best channel, {}", best.party), best.median)
        }
    };
    let ratio = ours.median / other;
    Some((name, ratio, if ours.unit.more_is_better() { ratio >= goal.ratio } else { ratio <= goal.ratio }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Unit;

    #[test]
    fn goals_know_which_way_is_up() {
        let row = |party, role, unit, figure| Row::of("memory", "s", party, role, unit, &[figure]);
        let judge = |unit, ours, theirs, ratio| {
            let rows = [row("ours", Role::Ours, unit, ours), row("flume", Role::Peer, unit, theirs)];
            compare(&goal("s", Against::Party("flume"), ratio), &rows).map(|(_, _, reached)| reached)
        };
        assert_eq!(judge(Unit::Events, 30.0, 10.0, 3.0), Some(true));
        assert_eq!(judge(Unit::Events, 29.0, 10.0, 3.0), Some(false));
        assert_eq!(judge(Unit::Microseconds, 15.0, 10.0, 1.5), Some(true));
        assert_eq!(judge(Unit::Microseconds, 16.0, 10.0, 1.5), Some(false));
        assert!(compare(&goal("s", Against::Limit, 1.0), &[row("ours", Role::Ours, Unit::Events, 1.0)]).is_none());
    }
}
