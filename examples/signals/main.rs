//! Several processes are given signals for one conversation: one run at a time, no signal lost. The run's owner holds a lease; it hands
//! over to whoever has queued work; and when it is stopped and wakes up late, its stale token fences it off.
//!
//! `cargo run --example signals [URL]`. A bus without leases takes them from another, by `?leases=URL`.

mod agent;
mod memory;

use std::process::ExitCode;

use agent::{Agent, inbox, topic};
use fleet::{Fleet, Proof, Role, Worker};
use memory::Memory;
use pubsub_core::{Capability, Event, Group, Result, RetryPolicy, SubscribeOptions, Subscription};
use serde_json::json;

/// The key of a stage's conversation.
fn thread(stage: &str) -> String {
    format!("user-7/what to cook/{stage}")
}

#[tokio::main]
async fn main() -> ExitCode {
    fleet::run(&["agent"], &[Capability::Leases], direct, work).await
}

/// A process in which the conversation's agent can run.
async fn work(role: Role) -> Result<()> {
    let thread = thread(role.stage());
    let agent = Agent::new(role.bus.clone(), role.name.clone(), &thread)?;
    // However long the bus is away: a signal that it gave up would be lost.
    let keeps = SubscribeOptions::group(Group::new("agent")?).retry(RetryPolicy::new().max_attempts(0));
    let said = role.bus.subscribe_with(inbox(&role.name), keeps).await?;
    let told = role.bus.subscribe(topic(&thread)).await?;
    role.ready().await?;
    agent.live(said, told).await
}

async fn direct<W, F>(fleet: Fleet<W>) -> Result<Proof>
where
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let thread = thread(&fleet.stage);
    let told = fleet.bus.subscribe(topic(&thread)).await?;
    let mut stage = Stage { told, thread, memory: Memory::default(), said: 0, fleet };
    let mut agents = Vec::new();
    for name in ["a1", "a2", "a3"] {
        agents.push(stage.fleet.start("agent", name).await?);
    }

    for round in 0..9 {
        stage.say(&agents[round % 3], "hello").await?;
    }
    stage.all_answered().await?;

    // The owner is stopped between thinking and writing. Another takes over when the lease has run out; then it wakes up, and writes.
    stage.say(&agents[0], "think hard").await?;
    let owner = stage.thinking().await?;
    let at = agents.iter().position(|agent| agent.name() == owner).expect("one of three");
    let mut sleeper = agents.remove(at);
    sleeper.pause()?;
    stage.say(&agents[0], "hello").await?;
    stage.all_answered().await?;
    sleeper.resume()?;
    while stage.memory.refused == 0 {
        stage.listen().await?;
    }

    // The owner is killed while it thinks, with work queued by others. The one that slept takes part again.
    agents.push(sleeper);
    stage.say(&agents[1], "think hard").await?;
    let owner = stage.thinking().await?;
    let at = agents.iter().position(|agent| agent.name() == owner).expect("one of three");
    agents.remove(at).kill().await?;
    for agent in &agents {
        stage.say(agent, "hello").await?;
    }
    stage.all_answered().await?;
    drop(agents);
    for agent in ["a1", "a2", "a3"] {
        stage.fleet.bus.clear_topic(inbox(&format!("{agent}.{}", stage.fleet.stage))).await?;
    }
    stage.fleet.bus.clear_topic(topic(&stage.thread)).await?;

    let memory = &stage.memory;
    let mut proof = Proof::new();
    proof.exactly("signals answered, each once", memory.answered_once(), stage.said).exactly("signals said", stage.said, 14);
    proof.exactly("runs beside another", memory.overlaps, 0);
    proof.at_least("handed over to queued work", memory.handed_over, 1);
    proof.exactly("handed over with a gap", memory.gaps, 0);
    proof.at_least("writes of a stale owner, refused", memory.refused, 1);
    proof.tell("owners stopped and woken up", 1).tell("owners killed", 1);
    Ok(proof)
}

/// The director, who talks to agents and listens to the conversation.
struct Stage<W> {
    fleet: Fleet<W>,
    thread: String,
    told: Subscription,
    memory: Memory,
    said: usize,
}

impl<W> Stage<W> {
    /// Gives an agent a signal.
    async fn say(&mut self, agent: &Worker, text: &str) -> Result<()> {
        let signal = json!({ "id": format!("signal-{}", self.said), "text": text });
        self.said += 1;
        self.memory.thinking = None; // what was seen so far is about another signal
        self.fleet.bus.publish(inbox(agent.name()), Event::new("signal").with_run_id(&self.thread).with_data(signal)).await?;
        Ok(())
    }

    async fn listen(&mut self) -> Result<()> {
        self.memory.take(fleet::next(&mut self.told).await?.event())
    }

    async fn all_answered(&mut self) -> Result<()> {
        while self.memory.answered() < self.said {
            self.listen().await?;
        }
        Ok(())
    }

    /// Waits until a run thinks hard; whose it is.
    async fn thinking(&mut self) -> Result<String> {
        loop {
            self.listen().await?;
            if let Some(owner) = self.memory.thinking.take() {
                return Ok(owner);
            }
        }
    }
}
