//! Writing to streams: what all publishers have handed in.
//!
//! What goes to one stream together is one call (`add.rs`). Several may be on their way, those for one stream in their order. Each says who
//! publishes and a number. When the outcome of one is unknown nothing else is written until a script has found out whether its events
//! are there and added them if not; the old connection is ended first, so that nothing of it can still arrive behind the script. So each
//! event is written once, as long as the server lets connections be ended and knows the time to ten seconds. In a cluster each stream has
//! one call on its way, and waits for its own node alone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use pubsub_core::Fate;
use tokio::sync::mpsc;

use crate::add::{Outcome, Renewed, Shared};
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::lane::{Answer, Call, Lane, Open, Part, Reply};
use crate::publish::{Job, WAITING_CALLS};

/// Where the writer's task leaves its work whenever it waits for something to do, so that publishers may do it. Empty while it waits for
/// anything else, and when it is gone.
pub(crate) type Desk = Mutex<Option<Task>>;

pub(crate) struct Task {
    shared: Arc<Shared>,
    /// What the server calls the connection that calls are sent on, and whether that may have changed.
    id: i64,
    stale: bool,
    /// Whether the server knows the script.
    known: bool,
    /// The number of the next event, and of the next job.
    next: u64,
    next_job: u64,
    open: BTreeMap<u64, Open>,
    lanes: HashMap<Arc<str>, Lane>,
    /// Lanes that may have something to send.
    ready: Vec<Arc<str>>,
    renewed: Renewed,
    /// Who waits for everything before a job.
    flushes: VecDeque<(u64, Reply)>,
    calls: FuturesUnordered<BoxFuture<'static, (Call, Outcome)>>,
    /// Calls to be looked into once nothing is on its way any more.
    doubtful: Vec<(Call, Fault)>,
    /// What has come of publishes, to be told when nobody holds the desk.
    answers: Vec<Answer>,
    /// Wakes the task.
    waker: Waker,
}

impl Task {
    pub(crate) fn new(shared: Shared, id: i64) -> Self {
        Self {
            renewed: Renewed::new(&shared.retention, shared.link.cluster().is_some()),
            shared: Arc::new(shared),
            id,
            stale: false,
            known: false,
            next: 1,
            next_job: 0,
            open: BTreeMap::new(),
            lanes: HashMap::new(),
            ready: Vec::new(),
            flushes: VecDeque::new(),
            calls: FuturesUnordered::new(),
            doubtful: Vec::new(),
            answers: Vec::new(),
            waker: Waker::noop().clone(),
        }
    }

    /// Works until nobody can hand in anything any more, and all that was handed in has its answer.
    pub(crate) async fn run(self, desk: Arc<Desk>, mut jobs: mpsc::Receiver<Job>) {
        let (desk, mut task) = (Leaving(desk), self);
        while let Some(mut work) = desk.work(task, &mut jobs).await {
            work.clear_up().await;
            work.send(true);
            task = work;
        }
    }

    /// Does what there is to do. Ready when something has to be cleared up, or nothing will ever be to do: then it says false.
    fn poll(&mut self, jobs: &mut mpsc::Receiver<Job>, cx: &mut Context<'_>) -> Poll<bool> {
        self.waker.clone_from(cx.waker());
        let mut taken = Vec::new();
        loop {
            self.proceed();
            if self.has_to_clear_up() {
                return Poll::Ready(true);
            }
            let room = WAITING_CALLS.saturating_sub(self.open.len());
            if room == 0 {
                return Poll::Pending;
            }
            match ready!(jobs.poll_recv_many(cx, &mut taken, room)) {
                0 if self.calls.is_empty() => return Poll::Ready(false),
                0 => return Poll::Pending,
                _ => taken.drain(..).for_each(|job| self.begin(job)),
            }
        }
    }

    /// Takes a job that nothing waits before, in the publisher's task and on behalf of the writer's, and sends it if its lane has nothing on
    /// its way. Returns what has come of others meanwhile; or the job, if something has to be cleared up first.
    pub(crate) fn take(&mut self, job: Job) -> Result<Vec<Answer>, Job> {
        self.look();
        let is_at_ease = self.doubtful.is_empty() && (self.is_in_cluster() || self.known && !self.stale);
        if !is_at_ease || self.open.len() >= WAITING_CALLS {
            return Err(job);
        }
        self.begin(job);
        self.proceed();
        if self.has_to_clear_up() {
            self.waker.wake_by_ref(); // what failed at once wakes nobody else
        }
        Ok(std::mem::take(&mut self.answers))
    }

    /// Whether everything has come back, and something of it is to be looked into, or waits for that.
    fn has_to_clear_up(&self) -> bool {
        self.calls.is_empty() && !(self.doubtful.is_empty() && self.ready.is_empty())
    }

    /// Begins a job.
    fn begin(&mut self, job: Job) {
        let Job { stream, events, claimed, reply } = job;
        let number = self.next_job;
        if events.is_empty() {
            self.flushes.push_back((number, reply));
            return;
        }
        self.next_job += 1;
        let count = events.len();
        let (ids, fates) = (vec![EntryId::ZERO; count], vec![Fate::NotSent; count]);
        self.open.insert(number, Open { reply, claimed, ids, fates, sent: 0, settled: 0, fault: None });
        let lane = self.lanes.entry(stream.clone()).or_default();
        lane.events += count;
        lane.waiting.push_back((number, events.into()));
        self.ready.push(stream);
    }

    fn is_in_cluster(&self) -> bool {
        self.shared.link.cluster().is_some()
    }

    /// Looks whether the connection is another. To the nodes of a cluster there are several, which look after that by themselves.
    fn look(&mut self) {
        if !self.is_in_cluster() && self.shared.link.reconnected() {
            (self.stale, self.known) = (true, false);
        }
    }

    /// Sends what may go out now; over another connection only once it was asked what that is called, or in vain.
    fn send(&mut self, was_asked: bool) {
        self.look();
        let in_cluster = self.is_in_cluster();
        // What is doubtful has to come back first.
        while self.doubtful.is_empty() {
            let Some(stream) = self.ready.pop() else { break };
            let Self { lanes, open, calls, next, shared, renewed, .. } = self;
            let Some(lane) = lanes.get_mut(&stream) else { continue };
            while lane.may_send(shared.on_their_way()) {
                let waits = if calls.is_empty() { self.stale && !was_asked } else { self.stale || !self.known };
                if waits && !in_cluster {
                    self.ready.push(stream);
                    return self.answer_flushes();
                }
                let Some(call) = lane.next_call(&stream, open, next) else { continue };
                lane.alone = self.known && lane.on_their_way == 0 && call.events.len() == 1 && renewed.is_fresh(&stream);
                lane.on_their_way += 1;
                let (shared, alone, in_full) = (shared.clone(), lane.alone, !self.known);
                let adding = async move {
                    let outcome = match (in_cluster, alone) {
                        (true, _) => shared.add_in_cluster(&call).await,
                        (false, true) => shared.add_alone(&call).await,
                        (false, false) => shared.add(&call, in_full).await,
                    };
                    (call, outcome)
                };
                calls.push(adding.boxed());
            }
            if lane.on_their_way == 0 && lane.events == 0 {
                lanes.remove(&stream);
            }
        }
        self.answer_flushes();
    }

    /// Sends what may go out, and takes what has come back.
    ///
    /// A set of futures that has asked all of them wakes its task again at once, which would send the task to the end of its worker's queue,
    /// and wake another worker. So they are asked on nobody's behalf, and then it is asked again.
    fn proceed(&mut self) {
        loop {
            self.send(false);
            let mut any = false;
            for waker in [Waker::noop(), &self.waker.clone()] {
                while let Poll::Ready(Some((call, outcome))) = self.calls.poll_next_unpin(&mut Context::from_waker(waker)) {
                    self.ended(call, outcome);
                    any = true;
                }
            }
            if !any {
                return;
            }
        }
    }

    /// A call has come back.
    fn ended(&mut self, call: Call, outcome: Outcome) {
        match outcome {
            Err(fault) if (fault.is_unknown() || fault.is("NOSCRIPT")) && !self.is_in_cluster() => {
                self.known &= !fault.is("NOSCRIPT");
                self.doubtful.push((call, fault));
            }
            outcome => {
                self.known |= outcome.is_ok();
                self.settle(call, outcome);
            }
        }
    }

    /// Finds out what became of doubtful calls, in the order they were sent in, while nothing else is on its way.
    async fn clear_up(&mut self) {
        if self.stale
            && let Ok(id) = self.shared.link.id().await
        {
            (self.id, self.stale) = (id, false);
        }
        self.doubtful.sort_by_key(|(call, _)| call.number);
        let mut doubtful = VecDeque::from(std::mem::take(&mut self.doubtful));
        while let Some((call, fault)) = doubtful.pop_front() {
            let outcome = if !fault.is("NOSCRIPT") {
                self.shared.add_missing(&call, Some(&mut self.id)).await
            } else if doubtful.iter().any(|(later, fault)| later.stream == call.stream && !fault.is("NOSCRIPT")) {
                Err(out_of_order()) // what was sent behind it may have been added
            } else {
                self.add_again(&call).await
            };
            self.settle(call, outcome);
            self.answers.drain(..).for_each(Answer::tell);
        }
    }

    /// Adds what was refused because the server had forgotten the script.
    async fn add_again(&mut self, call: &Call) -> Outcome {
        if self.lanes.get(&call.stream).is_some_and(|lane| lane.added > call.number) {
            // What was sent behind it was added: another instance has made the script known in between.
            return Err(out_of_order());
        }
        match self.shared.add(call, true).await {
            Err(fault) if fault.is_unknown() => self.shared.add_missing(call, Some(&mut self.id)).await,
            outcome => outcome,
        }
    }

    /// Tells those whose events were in a call what came of it.
    fn settle(&mut self, call: Call, outcome: Outcome) {
        let Some(lane) = self.lanes.get_mut(&call.stream) else { return };
        let by_script = !std::mem::take(&mut lane.alone);
        lane.on_their_way -= 1;
        if outcome.is_ok() {
            if by_script {
                self.renewed.note(&call.stream, call.sent);
            }
            lane.added = lane.added.max(call.number);
        }
        let mut place = 0;
        for Part { job, offset, count } in call.parts {
            let Some(open) = self.open.get_mut(&job) else { continue };
            let these = offset..offset + count;
            match &outcome {
                Ok(ids) => {
                    open.ids[these.clone()].copy_from_slice(&ids[place..place + count]);
                    open.fates[these].fill(Fate::Published);
                }
                Err(fault) => {
                    open.fates[these].fill(if fault.is_unknown() { Fate::Unknown } else { Fate::NotSent });
                    open.fault.get_or_insert_with(|| fault.clone());
                    // What would come behind it is not sent.
                    open.settled += lane.forget(job);
                }
            }
            place += count;
            open.settled += count;
            if open.settled == open.ids.len() {
                self.answers.extend(self.open.remove(&job).map(Open::answer));
            }
        }
        self.ready.push(call.stream);
    }

    /// Tells those who wait for what came before them that it has its answer.
    fn answer_flushes(&mut self) {
        let first = self.open.keys().next().copied().unwrap_or(u64::MAX);
        while self.flushes.front().is_some_and(|(before, _)| *before <= first) {
            let Some((_, reply)) = self.flushes.pop_front() else { return };
            self.answers.push(Answer::new(reply, Ok(Vec::new())));
        }
    }
}

/// Why what was refused is not added any more.
fn out_of_order() -> Fault {
    Fault::Refused("TRYAGAIN the server forgot a script, and the order would be lost".into())
}

/// The writer's side of the desk. Whatever ends it, the work goes too, and whoever waits for it is told.
struct Leaving(Arc<Desk>);

impl Leaving {
    /// Leaves the work on the desk until something of it has to be cleared up; none if all is over.
    async fn work(&self, task: Task, jobs: &mut mpsc::Receiver<Job>) -> Option<Task> {
        *self.0.lock() = Some(task);
        poll_fn(|cx| {
            let mut desk = self.0.lock();
            let Some(task) = &mut *desk else { return Poll::Ready(None) };
            let polled = task.poll(jobs, cx);
            let answers = std::mem::take(&mut task.answers);
            let work = polled.map(|goes_on| desk.take().filter(|_| goes_on));
            drop(desk);
            answers.into_iter().for_each(Answer::tell);
            work
        })
        .await
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let task = self.0.lock().take();
        drop(task);
    }
}
