//! Running one step: say what runs, run it, say how long it took.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A step's end: nothing, or why it failed.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// A call of the cargo that runs this program.
pub(crate) fn cargo<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Does one step, announced and timed.
pub(crate) fn timed<T>(name: &str, what: &str, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    println!("\n=== {name}: {what}");
    let started = Instant::now();
    let outcome = work();
    let word = if outcome.is_ok() { "passed" } else { "FAILED" };
    println!("=== {name}: {word} in {:.1} s", started.elapsed().as_secs_f64());
    outcome
}

/// Runs a command as a step, its output passed through.
pub(crate) fn run(name: &str, command: &mut Command) -> Outcome {
    timed(name, &shown(command), || match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{name}: {status}")),
        Err(error) => Err(format!("{name}: {}: {error}", shown(command))),
    })
}

/// Runs tests as a step, their output passed through; what the failed ones said is said again at the end, where one looks first.
pub(crate) fn run_tests(name: &str, command: &mut Command) -> Outcome {
    let wrong = |error: std::io::Error| format!("{name}: {error}");
    timed(name, &shown(command), || {
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(wrong)?;
        let (mut failures, mut is_failure) = (Vec::new(), false);
        for line in BufReader::new(child.stdout.take().expect("it is piped")).split(b'\n') {
            let line = String::from_utf8_lossy(&line.map_err(wrong)?).into_owned();
            println!("{line}");
            // Every harness tells its failures between these two.
            is_failure = (is_failure || line == "failures:") && !line.starts_with("test result:");
            failures.extend(is_failure.then_some(line));
        }
        let status = child.wait().map_err(wrong)?;
        if !failures.is_empty() {
            println!("\n=== {name}: what failed\n{}", failures.join("\n"));
        }
        status.success().then_some(()).ok_or_else(|| format!("{name}: {status}"))
    })
}

/// Runs a command and returns its standard output.
pub(crate) fn read(command: &mut Command) -> Outcome<String> {
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| format!("{}: {error}", shown(command)))?;
    if !output.status.success() {
        return Err(format!("{}: {}", shown(command), output.status));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{}: {error}", shown(command)))
}

/// Runs a command with this input (none: no standard input at all) and returns what came of it; ends it if it takes longer.
pub(crate) fn feed(command: &mut Command, input: Option<&'static str>, within: Duration) -> Outcome<Output> {
    let wrong = |error: std::io::Error| error.to_string();
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(wrong)?;
    let (mut stdin, pid) = (child.stdin.take(), child.id());
    let (done, ended) = std::sync::mpsc::channel();
    // The two threads end with the child: it is ended below if it does not end by itself.
    std::thread::spawn(move || stdin.as_mut().map(|stdin| stdin.write_all(input.unwrap_or_default().as_bytes())));
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match ended.recv_timeout(within) {
        Ok(output) => output.map_err(wrong),
        Err(_) => {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            Err(format!("did not end within {within:?}"))
        }
    }
}

fn shown(command: &Command) -> String {
    let environment = command.get_envs().filter_map(|(key, value)| {
        let (key, value) = (key.to_string_lossy(), value?.to_string_lossy());
        Some(if value.contains(' ') { format!("{key}='{value}'") } else { format!("{key}={value}") })
    });
    let program = std::path::Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args()).map(|word| word.to_string_lossy().into_owned());
    environment.chain(words).collect::<Vec<_>>().join(" ")
}
