//! A real browser opens the live page in two tabs, loses its connection again and again, and ends with the exact text.
//!
//! It needs Debian's `chromium` and `chromium-driver`. Where they are not installed, it is shown as ignored; `PUBSUB_REQUIRE=chromium`
//! makes that a failure.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};

const TEXT: &str = include_str!("../live_page/text.txt");

/// The longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the first tab loses its connection at least: the text begins when it is opened and takes seven seconds, a connection lasts at
/// most 600 ms. The second comes later, on a slow machine after the end.
const LOSSES: u64 = 5;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let required = std::env::var("PUBSUB_REQUIRE").unwrap_or_default().split(',').any(|name| name.trim() == "chromium");
    let missing = ["chromium", "chromedriver"].into_iter().find(|program| {
        let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        !version.is_ok_and(|status| status.success())
    });
    let reason = missing.map(|program| format!(" ({program} is not installed)")).unwrap_or_default();
    let trial = Trial::test(format!("a page in a browser survives its connection{reason}"), move || match missing {
        Some(program) => Err(Failed::from(format!("chromium is required, and {program} is not installed"))),
        None => page_survives(),
    });
    libtest_mimic::run(&arguments, vec![trial.with_ignored_flag(missing.is_some() && !required)]).exit_code()
}

/// A program that is asked to end when the test does, so that what it started ends with it.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().expect("it starts"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = (self.0.kill(), self.0.wait()); // ended already, as a rule
    }
}

fn page_survives() -> Result<(), Failed> {
    let test = std::env::current_exe()?;
    let example = test.ancestors().nth(2).expect("tests are built into target/PROFILE/deps").join("examples/live_page");
    let mut command = Command::new(&example);
    let mut server = Program::start(command.args(["memory:?replay=memory", "127.0.0.1:0"]).stdout(Stdio::piped()));
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().expect("it is piped")).read_line(&mut line)?;
    let address = line.trim().strip_prefix("open ").ok_or_else(|| format!("it said {line:?}"))?.to_owned();

    let profile = tempfile::tempdir()?;
    let driver = Driver::start(profile.path())?;
    let first = driver.ask("GET", "/window", None)?;
    driver.open(&address)?;
    let second = driver.ask("POST", "/window/new", Some(json!({"type": "tab"})))?["handle"].clone();
    driver.ask("POST", "/window", Some(json!({"handle": second})))?;
    driver.open(&address)?;
    for (tab, least) in [(second, 0), (first, LOSSES)] {
        driver.ask("POST", "/window", Some(json!({"handle": tab})))?;
        let page = driver.wait_for_the_end()?;
        if page["text"] != TEXT.trim_end() {
            return Err(format!("the text differs: {page}").into());
        }
        let losses = page["losses"].as_u64().unwrap_or(0);
        if page["word"] != "whole" || page["repeated"] != 0 || page["missing"] != 0 || losses < least {
            return Err(format!("{page}").into());
        }
    }
    driver.ask("DELETE", "", None)?;
    Ok(())
}

/// A browser, by the WebDriver protocol.
struct Driver {
    _driver: Program,
    port: u16,
    session: String,
}

impl Driver {
    fn start(profile: &Path) -> Result<Self, Failed> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new("chromedriver");
        let program = Program::start(command.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null()));
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > until {
                return Err("chromedriver does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut arguments = vec![format!("--user-data-dir={}", profile.display())];
        arguments.extend(
            [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ]
            .map(str::to_owned),
        );
        let wanted = json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}});
        let mut driver = Self { _driver: program, port, session: String::new() };
        let session = driver.ask("POST", "/session", Some(wanted))?;
        driver.session = format!("/session/{}", session["sessionId"].as_str().ok_or("no session")?);
        Ok(driver)
    }

    /// One command; what it answers as its value.
    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, Failed> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let (session, port, length) = (&self.session, self.port, body.len());
        write!(
            stream,
            "{method} {session}{path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )?;
        // The connection may stay open: an answer ends where its length says.
        let mut answer = BufReader::new(stream);
        let (mut head, mut length) = (String::new(), 0);
        while answer.read_line(&mut head)? > 2 {
            let last = head.lines().next_back().unwrap_or_default().to_ascii_lowercase();
            length = last.strip_prefix("content-length:").map_or(Ok(length), |length| length.trim().parse())?;
        }
        let mut body = vec![0; length];
        answer.read_exact(&mut body)?;
        let body = String::from_utf8(body)?;
        if !head.starts_with("HTTP/1.1 200") {
            return Err(format!("{method} {path}: {body}").into());
        }
        let mut answer: Value = serde_json::from_str(&body).map_err(|error| format!("{method} {path}: {error}: {body}"))?;
        Ok(answer["value"].take())
    }

    /// Opens a page, as a reader does: again if the connection was cut while it loaded.
    fn open(&self, address: &str) -> Result<(), Failed> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.ask("POST", "/url", Some(json!({"url": address}))) {
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// What the page says when it has ended.
    fn wait_for_the_end(&self) -> Result<Value, Failed> {
        let script = "const shown = (id) => document.getElementById(id).textContent;\
            return {word: shown('word'), text: shown('text'), losses: Number(shown('losses')),\
            repeated: Number(shown('repeated')), missing: Number(shown('missing'))};";
        let until = Instant::now() + PATIENCE;
        loop {
            let page = self.ask("POST", "/execute/sync", Some(json!({"script": script, "args": []})))?;
            if page["word"].as_str().is_some_and(|word| word.contains("whole")) {
                return Ok(page);
            }
            if Instant::now() > until {
                return Err(format!("it does not end: {page}").into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
