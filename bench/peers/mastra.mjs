// @mastra/core's emitter and its caching decorator: reads {"setting", "seconds"} a line, plays a round, and answers with a list of figures.

import { createInterface } from 'node:readline';
import { InMemoryServerCache } from '@mastra/core/cache';
import { CachingPubSub, EventEmitterPubSub } from '@mastra/core/events';

const TOPIC = 'orders';
const BETWEEN_LOOKS = 256;
const payload = 'x'.repeat(256);

// The emitter stamps id and createdAt itself.
const build = number => ({ type: 'order.placed', runId: 'run-1', data: { number, payload } });

let sum = 0;
const read = event => {
  sum += event.data.payload.length;
  return event.data.number;
};

const until = async reached => {
  while (!reached()) await new Promise(resolve => setImmediate(resolve));
};

// One publisher as fast as it can; the clock stops when everything has been handled.
async function throughput(subscribers, group, seconds, bus = new EventEmitterPubSub()) {
  let received = 0;
  for (let i = 0; i < subscribers; i++) {
    const handler = (event, ack) => {
      read(event);
      received++;
      if (group) return ack();
    };
    await bus.subscribe(TOPIC, handler, group ? { group } : undefined);
  }
  let published = 0;
  const started = performance.now();
  const end = started + seconds * 1000;
  do {
    for (let i = 0; i < BETWEEN_LOOKS; i++) await bus.publish(TOPIC, build(published++));
  } while (performance.now() < end);
  const deliveries = published * (group ? 1 : subscribers);
  await until(() => received >= deliveries);
  const rate = deliveries / ((performance.now() - started) / 1000);
  if (received !== deliveries) throw new Error(`${received} deliveries arrived of ${deliveries}`);
  await bus.close?.(); // the caching decorator has none
  return [rate];
}

// A thousand events a second; median and 99th percentile in microseconds.
async function latency(seconds) {
  const bus = new EventEmitterPubSub();
  const count = Math.max(2000, Math.round(seconds * 1000));
  const sent = new Float64Array(count);
  const taken = [];
  await bus.subscribe(TOPIC, event => {
    const arrived = performance.now();
    taken.push((arrived - sent[read(event)]) * 1000);
  });
  let number = 0;
  await new Promise((resolve, reject) => {
    const started = performance.now();
    const tick = async () => {
      // Timers here are late by up to a millisecond: whatever has become due is published, one by one.
      while (number < count && performance.now() - started >= number) {
        const event = build(number);
        sent[number] = performance.now();
        await bus.publish(TOPIC, event);
        number++;
      }
      if (number === count) resolve();
      else setTimeout(() => tick().catch(reject), 1);
    };
    tick().catch(reject);
  });
  await until(() => taken.length === count);
  await bus.close?.();
  taken.sort((a, b) => a - b);
  const quantile = part => {
    const place = part * (count - 1);
    const below = taken[Math.floor(place)];
    return below + (taken[Math.ceil(place)] - below) * (place % 1);
  };
  return [quantile(0.5), quantile(0.99)];
}

const KEPT = 10_000;

const cached = () => new CachingPubSub(new EventEmitterPubSub(), new InMemoryServerCache());

// A whole topic, again and again.
async function replay(seconds) {
  const bus = cached();
  for (let number = 0; number < KEPT; number++) await bus.publish(TOPIC, build(number));
  const started = performance.now();
  let seen = 0;
  while (performance.now() - started < seconds * 1000) {
    let due = 0;
    const handler = event => {
      if (read(event) !== due++) throw new Error('a replay out of order');
    };
    await bus.subscribeWithReplay(TOPIC, handler);
    await until(() => due === KEPT);
    await bus.unsubscribe(TOPIC, handler);
    seen += due;
  }
  const rate = seen / ((performance.now() - started) / 1000);
  await bus.close?.();
  return [rate];
}

const settings = {
  publish: seconds => throughput(1, undefined, seconds, cached()),
  replay,
  'queued 1 to 1': seconds => throughput(1, undefined, seconds),
  'inline 1 to 1': seconds => throughput(1, undefined, seconds),
  'queued 1 to 10': seconds => throughput(10, undefined, seconds),
  'group of 4': seconds => throughput(4, 'workers', seconds),
  'latency p50': latency,
};

for await (const line of createInterface({ input: process.stdin })) {
  const { setting, seconds } = JSON.parse(line);
  console.log(JSON.stringify(await settings[setting](seconds)));
}
