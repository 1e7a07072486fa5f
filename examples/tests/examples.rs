//! The examples as their users run them: programs with arguments, standard input, a report and an exit status.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::timeout;

const AT_MOST: Duration = Duration::from_secs(120);

/// The built example, which cargo puts beside the directory of this test.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test.ancestors().nth(2).expect("tests are built into target/PROFILE/deps");
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is not built: run `cargo build --examples` first", path.display());
    path
}

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    /// A line of the report.
    fn line(&self, name: &str) -> &str {
        let line = self.stdout.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no `{name}` in {}{}", self.stdout, self.stderr))
    }

    #[track_caller]
    fn says(&self, status: i32, figures: &[(&str, usize)]) {
        for (name, figure) in figures.iter().chain(&[("lost", 0), ("duplicated", 0), ("unknown", 0)]) {
            assert_eq!(self.line(name), figure.to_string(), "{name}\n{}{}", self.stdout, self.stderr);
        }
        assert_eq!((self.status, self.line("closed")), (status, "nothing left behind"), "{}", self.stderr);
    }
}

/// Runs an example to its end. Without input, its standard input is the null device.
async fn run(name: &str, arguments: &[&str], input: Option<&[u8]>) -> Ran {
    let mut command = Command::new(example(name));
    command.args(arguments).kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().expect("it starts");
    let stdin = child.stdin.take();
    let feed = async move {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A program that refuses its arguments reads nothing: the pipe breaks, and its status says the rest.
            let _ = stdin.write_all(input).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()) };
    let ((), output) = timeout(AT_MOST, both).await.unwrap_or_else(|_| panic!("{name} ran for longer than {AT_MOST:?}"));
    let output = output.expect("it is ours to wait for");
    let text = |bytes| String::from_utf8(bytes).expect("it writes UTF-8");
    Ran { status: output.status.code().expect("no signal"), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn lines(count: usize) -> Vec<u8> {
    let line = |n| format!("{{\"type\":\"order.placed\",\"runId\":\"r{}\",\"data\":{{\"n\":{n},\"text\":\"ü\"}}}}\n", n % 7);
    (0..count).map(line).collect::<String>().into_bytes()
}

#[tokio::test]
async fn quickstart_has_a_feed_of_its_own() {
    let ran = run("quickstart", &[], None).await;
    // The 5th and the 18th are poison; of the others the 4th, 8th, 12th, 16th and 20th stumble.
    let figures =
        [("published", 20), ("audited", 20), ("handled", 18), ("redelivered", 9), ("dead-lettered", 2), ("bad lines", 0)];
    ran.says(0, &figures);
    assert_eq!(ran.line("dead letters"), "2 of 2");
    assert_eq!(ran.line("backend"), "memory:");
    assert_eq!(ran.stderr, "");
}

#[tokio::test]
async fn quickstart_shares_what_is_piped_in_among_its_workers() {
    let ran = run("quickstart", &[], Some(&lines(1000))).await;
    let figures = [("published", 1000), ("audited", 1000), ("handled", 1000), ("redelivered", 250), ("dead-lettered", 0)];
    ran.says(0, &figures);
    let shares: Vec<usize> = ran.line("workers").split(" + ").map(|share| share.parse().unwrap()).collect();
    assert_eq!((shares.len(), shares.iter().sum::<usize>()), (3, 1000));
    assert_eq!(ran.stderr, "");
}

#[tokio::test]
async fn quickstart_takes_an_empty_pipe_for_no_events() {
    for nothing in ["", "\n", "\n \r\n\t\n"] {
        let ran = run("quickstart", &[], Some(nothing.as_bytes())).await;
        ran.says(0, &[("published", 0), ("handled", 0), ("bad lines", 0)]);
    }
}

#[tokio::test]
async fn quickstart_skips_bad_lines_by_number_and_reason() {
    let long = format!(r#"{{"type":"long","data":"{}"}}"#, "x".repeat(1 << 20));
    let longest = format!(r#"{{"type":"long","data":"{}"}}"#, "x".repeat((1 << 20) - 25));
    assert_eq!(longest.len(), 1 << 20);
    let table: &[(&[u8], Option<&str>)] = &[
        (b"\xEF\xBB\xBF{\"type\":\"behind a byte order mark\"}", None),
        (b"not json", Some("expected ident at column 2")),
        (b"", None),
        (b"{\"runId\":\"r\",\"data\":1}", Some("an event without a type")),
        (b"{\"type\":7}", Some("expected text")),
        (b"{\"type\":\"\"}", Some("the type is empty")),
        (b"[]", Some("expected an event")),
        (b"{\"type\":\"a\"} {\"type\":\"b\"}", Some("trailing characters")),
        (b"{\"type\":\"a\",", Some("EOF while parsing a value at column 12")),
        (b"{\"type\":\"a\xFF\"}", Some("not UTF-8 at column 11")),
        (b"\0", Some("cannot decode")),
        (long.as_bytes(), Some("longer than 1048576 bytes")),
        (longest.as_bytes(), None),
        (b"{\"type\":\"a\",\"id\":\"one\"}\r", None),
        (b"{\"type\":\"a\",\"id\":\"one\"}", Some("the id \"one\" came before")),
        (b"{\"type\":\"a\",\"id\":\"\"}", Some("an event id has 1 to 255 bytes")),
        (b"{\"type\":\"a\",\"createdAt\":\"yesterday\"}", Some("cannot decode")),
        (b"{\"type\":\"a\",\"more\":{\"than\":\"is asked for\"}}", None),
        ("{\"type\":\"the last needs no end\",\"data\":\"🦀\"}".as_bytes(), None),
    ];
    let input = table.iter().map(|(line, _)| *line).collect::<Vec<_>>().join(&b"\n"[..]);
    let ran = run("quickstart", &[], Some(&input)).await;
    let bad: Vec<_> = (1..).zip(table).filter_map(|(number, (_, why))| Some((number, (*why)?))).collect();
    ran.says(2, &[("published", 5), ("audited", 5), ("handled", 5), ("redelivered", 1), ("bad lines", bad.len())]);
    assert_eq!(ran.stderr.lines().count(), bad.len(), "{}", ran.stderr);
    for (told, (number, why)) in ran.stderr.lines().zip(bad) {
        assert!(told.starts_with(&format!("line {number} skipped: ")) && told.contains(why), "{told}: {why}");
        assert!(!told.contains("column 0") && !told.contains("Wire"), "{told}");
    }
}

#[tokio::test]
async fn quickstart_dead_letters_what_keeps_failing() {
    let line = |n: usize| if n.is_multiple_of(3) { "{\"type\":\"poison\"}\n" } else { "{\"type\":\"food\"}\n" };
    let input: String = (1..=6000).map(line).collect();
    // More letters than are kept: every one of them is accounted for all the same.
    let ran = run("quickstart", &["memory:?dead_letter_retention=3"], Some(input.as_bytes())).await;
    let figures = [("published", 6000), ("audited", 6000), ("handled", 4000), ("redelivered", 5000), ("dead-lettered", 2000)];
    ran.says(0, &figures);
    assert_eq!(ran.line("dead letters"), "3 of 2000");
    assert_eq!(ran.stdout.matches("after 3 attempts: poison").count(), 3);
}

#[tokio::test]
async fn quickstart_loses_nothing_of_much() {
    let ran = run("quickstart", &[], Some(&lines(100_000))).await;
    ran.says(0, &[("published", 100_000), ("audited", 100_000), ("handled", 100_000), ("redelivered", 25_000)]);
}

#[tokio::test]
async fn quickstart_honours_the_options_of_its_bus() {
    // A publish that may not wait is refused at a full queue, and repeated.
    let ran = run("quickstart", &["memory:?publish_timeout=0s&strict_payloads=true"], Some(&lines(3000))).await;
    ran.says(0, &[("published", 3000), ("audited", 3000), ("handled", 3000)]);

    let input = "{\"type\":\"a\",\"data\":12345}\n{\"type\":\"a\",\"data\":123456}\n";
    let ran = run("quickstart", &["memory:?max_payload=5"], Some(input.as_bytes())).await;
    ran.says(2, &[("published", 1), ("bad lines", 1)]);
    assert_eq!(ran.stderr, "line 2 skipped: event of 6 bytes is over the limit of 5\n");
}

#[tokio::test]
async fn quickstart_says_what_is_wrong_with_its_arguments() {
    for (arguments, why) in [
        (&["memroy:"][..], "the nearest known one is `memory`"),
        (&["memory:?publish_timout=1s"], "the nearest known option is `publish_timeout`"),
        (&["gcp://user:s3cr3t@host"], "is written `gcp://PROJECT`"),
        (&["redis://user:s3cr3t@127.0.0.1:1?command_timeout=1s"], "unavailable"),
        (&["--help"], "begins with no scheme such as `memory:`"),
        (&["memory:", "memory:"], "takes one argument"),
    ] {
        let ran = run("quickstart", arguments, Some(b"{\"type\":\"a\"}\n")).await;
        assert!(ran.status == 1 && ran.stdout.is_empty() && ran.stderr.contains(why), "{arguments:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("s3cr3t"), "{}", ran.stderr);
    }
}

#[tokio::test]
async fn a_role_that_does_not_exist_is_no_worker() {
    for (program, roles) in [("workflow", "worker"), ("scheduler", "scheduler, hesitant"), ("signals", "agent")] {
        let ran = run(program, &["memory:", "wroker"], None).await;
        let usage = format!("usage: {program} [URL [ROLE [NAME]]]; roles: {roles}\n");
        assert_eq!((ran.status, ran.stdout, ran.stderr), (2, String::new(), usage.clone()));
        let ran = run(program, &["--help"], None).await;
        assert_eq!((ran.status, ran.stdout, ran.stderr), (0, usage, String::new()));
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn systems_do_not_disturb_each_other_on_one_bus() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}/bus.sock", directory.path().display());
    let url = [url.as_str()];
    // Two of each at once, then one more beside what they have left.
    for system in ["workflow", "scheduler", "background_tasks", "signals"] {
        let (one, other) = tokio::join!(run(system, &url, None), run(system, &url, None));
        for ran in [one, other, run(system, &url, None).await] {
            assert_eq!((ran.status, ran.line("proof")), (0, "holds"), "{system}: {}{}", ran.stdout, ran.stderr);
        }
    }
}

/// Killed while one of its workers is stopped, a director leaves nobody behind.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn workers_end_with_their_director_even_if_they_are_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}/bus.sock", directory.path().display());
    let mut command = Command::new(example("signals"));
    command.arg(&url).kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut director = command.spawn().expect("it starts");
    let mut said = BufReader::new(director.stdout.take().expect("it is piped")).lines();
    let stopped = async { while !said.next_line().await.unwrap().expect("it goes on").ends_with("is stopped") {} };
    timeout(AT_MOST, stopped).await.expect("it stops a worker");
    director.kill().await.unwrap();
    // A worker holds the other end of the pipe as long as it lives.
    let end = async { while said.next_line().await.unwrap().is_some() {} };
    timeout(AT_MOST, end).await.expect("all its workers are gone");
}

#[tokio::test]
async fn hello_is_short_and_runs() {
    assert!(include_str!("../hello.rs").lines().count() <= 15);
    for arguments in [&[][..], &["memory:greetings"]] {
        let ran = run("hello", arguments, None).await;
        assert_eq!((ran.status, ran.stdout.as_str(), ran.stderr.as_str()), (0, "(\"tea\", 3)\n", ""));
    }
}

#[tokio::test]
async fn a_custom_backend_behaves_as_a_built_in_one() {
    for arguments in [&[][..], &["tiny:?publish_timeout=1s"], &["memory:"]] {
        let ran = run("custom_backend", arguments, None).await;
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""), "{arguments:?}");
        assert_eq!(ran.stdout, "billing, attempt 1: 3\nbilling, attempt 2: 3\naudit: order.placed\nclosed cleanly\n");
    }
    let ran = run("custom_backend", &["tiny:?publish_timout=1s"], None).await;
    assert!(ran.status == 1 && ran.stderr.contains("publish_timeout"), "{}", ran.stderr);
}

#[tokio::test]
async fn a_stream_is_resumed_to_its_exact_text() {
    let ran = run("resumable_stream", &[], None).await;
    assert_eq!(ran.status, 0, "{}{}", ran.stdout, ran.stderr);
    for (name, says) in [
        ("connection dropped", "10 times, resumed 10 times"),
        ("text of the resumed", "exact, 87 tokens, 0 repeated"),
        ("text of the late", "exact, 87 tokens"),
    ] {
        assert_eq!(ran.line(name).trim(), says, "{}", ran.stdout);
    }
    let ran = run("resumable_stream", &["memory:"], None).await;
    assert!(ran.status == 1 && ran.stderr.contains("?replay=memory"), "{}", ran.stderr);
}

#[tokio::test]
async fn quickstart_runs_over_a_socket_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}/bus.sock", directory.path().display());
    for _ in 0..2 {
        let ran = run("quickstart", &[&url], None).await;
        ran.says(0, &[("published", 20), ("handled", 18), ("dead-lettered", 2)]);
    }
}

#[tokio::test]
async fn two_processes_share_the_work() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}/bus.sock", directory.path().display());
    let arguments = [url.as_str(), "10"];
    let (one, other) = tokio::join!(run("two_processes", &arguments, None), run("two_processes", &arguments, None));
    assert_eq!((one.status, other.status), (0, 0), "{}{}", one.stderr, other.stderr);
    let mut billed: Vec<&str> = one.stdout.lines().chain(other.stdout.lines()).collect();
    billed.sort_unstable();
    billed.dedup();
    assert_eq!(billed.len(), 20, "{}{}", one.stdout, other.stdout);
}

#[tokio::test]
async fn notes_are_published_and_followed_as_the_readme_says() {
    let mut command = Command::new(example("notes"));
    command.args(["memory:?replay=memory", "127.0.0.1:0"]).kill_on_drop(true).stdout(Stdio::piped());
    let mut server = command.spawn().expect("it starts");
    let mut said = BufReader::new(server.stdout.take().expect("it is piped")).lines();
    let line = timeout(AT_MOST, said.next_line()).await.expect("it says where it is").unwrap().unwrap();
    let address = line.strip_prefix("open http://").and_then(|line| line.strip_suffix('/')).expect("its address").to_owned();
    let ask = async |request: String, until: &str| {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let (mut buffer, mut answer) = ([0; 4096], String::new());
        while !answer.contains(until) {
            let read = timeout(AT_MOST, stream.read(&mut buffer)).await.expect("it answers").unwrap();
            assert!(read > 0, "{answer}");
            answer += &String::from_utf8_lossy(&buffer[..read]);
        }
        answer
    };
    let note = r#"{"type": "note", "data": "still here"}"#;
    let head =
        format!("host: x\r\ncontent-type: application/json\r\nidempotency-key: 1\r\ncontent-length: {}\r\n\r\n", note.len());
    for _ in 0..2 {
        let answer = ask(format!("POST /bus/notes/events HTTP/1.1\r\n{head}{note}"), "}]}").await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#""id":"1""#), "{answer}");
    }
    let stream = ask("GET /bus/notes/events?start=earliest HTTP/1.1\r\nhost: x\r\n\r\n".into(), "}\n\n").await;
    assert!(stream.starts_with("HTTP/1.1 200 ") && stream.matches("still here").count() == 1, "{stream}");
    let refused = ask("GET /bus/others/events HTTP/1.1\r\nhost: x\r\n\r\n".into(), "}").await;
    assert!(refused.starts_with("HTTP/1.1 403 "), "{refused}");
}
