//! Measures ours, the limit and the peers in one run: interleaved rounds, medians, ratios.

mod cache;
mod event;
mod gcp;
mod goals;
mod http;
mod memory;
mod node;
mod redis;
mod report;
mod rounds;
mod unix;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pubsub_core::BoxError;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ALLOCATOR_NAME: &str = if cfg!(feature = "mimalloc") {
    "mimalloc"
} else if cfg!(target_env = "gnu") {
    "glibc malloc"
} else {
    "the system's malloc"
};

/// What to measure and how.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
struct Options {
    /// Measure this backend only (memory, cache, redis, unix, gcp, http).
    #[arg(long)]
    backend: Option<String>,
    /// Also measure peers that have to be installed or built first: @mastra/core's emitter, under Node, and sea-streamer.
    #[arg(long)]
    peers: bool,
    /// Write every row to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measure this setting only, such as `queued 1 to 1`.
    #[arg(long)]
    setting: Option<String>,
    /// Measure this party only, such as `ours`.
    #[arg(long)]
    party: Option<String>,
    /// How many rounds each party gets, after one to warm up.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long one round publishes, in seconds.
    #[arg(long, default_value_t = 0.7, value_parser = seconds)]
    seconds: f64,
    /// Print the resident bytes per idle subscription of one party and do nothing else; each needs a process of its own.
    #[arg(long, hide = true)]
    idle: Option<String>,
    /// Print what following many topics costs one party and do nothing else; likewise.
    #[arg(long, hide = true)]
    many: Option<String>,
    /// Play the part of a process in a round and do nothing else.
    #[arg(long, hide = true)]
    play: Option<String>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.01..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be from 0.01 to 600".into()),
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), BoxError> {
    if let Some(party) = &options.idle {
        println!("{}", memory::idle::measure_here(party)?);
        return Ok(());
    }
    if let Some(job) = &options.many {
        println!("{}", serde_json::to_string(&redis::measure_many_here(job)?)?);
        return Ok(());
    }
    if let Some(spec) = &options.play {
        return unix::child::play(spec);
    }
    let known = ["memory", cache::BACKEND, redis::BACKEND, unix::BACKEND, gcp::BACKEND, http::BACKEND];
    if let Some(other) = options.backend.as_deref().filter(|backend| !known.contains(backend)) {
        return Err(format!("there is no backend `{other}`; there is {}", known.join(", ")).into());
    }
    if cfg!(debug_assertions) {
        eprintln!("bench: built without optimisation: these figures say nothing; use `cargo xtask bench`");
    }
    let mut contests = memory::contests(options.peers);
    contests.extend(cache::contests(options.peers));
    if options.backend.as_deref().is_none_or(|backend| backend == redis::BACKEND) {
        contests.extend(redis::contests(options.peers));
    }
    contests.extend(unix::contests());
    contests.extend(http::contests());
    if options.backend.as_deref().is_none_or(|backend| backend == gcp::BACKEND) {
        contests.extend(gcp::contests());
    }
    contests.retain(|contest| options.backend.as_deref().is_none_or(|backend| backend == contest.backend));
    contests.retain_mut(|contest| {
        contest.parties.retain(|party| options.party.as_deref().is_none_or(|wanted| party.name == wanted));
        let wanted = |wanted: &str| contest.settings.iter().any(|(setting, _)| *setting == wanted);
        options.setting.as_deref().is_none_or(wanted) && !contest.parties.is_empty()
    });
    if contests.is_empty() {
        return Err("no setting and party of that name".into());
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!(
        "allocator: {ALLOCATOR_NAME}; {cores} cores; {} rounds of {} s after one to warm up",
        options.rounds, options.seconds
    );
    let mut rows = Vec::new();
    for contest in &mut contests {
        rows.extend(rounds::measure(contest, options.rounds, options.seconds)?);
    }
    report::print(&rows);
    goals::print(&rows);
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}
