// A process of Mastra on the bus: does what it is told in lines on its standard input, and says in lines what comes of it.
// Usage: node peer.mjs PACKAGE SOCKET, where PACKAGE is the directory of an installed @mastra/core.

import { webcrypto } from 'node:crypto';
import { createInterface } from 'node:readline';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

// Node 18 has it, but not here.
globalThis.crypto ??= webcrypto;

const [, , directory, socket] = process.argv;
const events = await import(pathToFileURL(join(directory, 'dist/events/index.js')));
const bus = new events.UnixSocketPubSub(socket);

// Values as JSON that says of what kind each is: {"Date": "..."}, {"Map": [[key, value], ...]}, and so on; the rest is itself.
function describe(value) {
  if (value === undefined) return { Undefined: null };
  if (value === null || typeof value === 'string' || typeof value === 'boolean' || typeof value === 'number') return value;
  if (typeof value === 'bigint') return { BigInt: value.toString() };
  if (value instanceof Date) return { Date: value.toISOString() };
  if (value instanceof RegExp) return { RegExp: [value.source, value.flags] };
  if (value instanceof URL) return { URL: value.toString() };
  if (value instanceof Map) return { Map: [...value].map(([key, of]) => [describe(key), describe(of)]) };
  if (value instanceof Set) return { Set: [...value].map(describe) };
  if (value instanceof Error) {
    const { name, message, cause } = value;
    const fields = Object.fromEntries(Object.keys(value).filter((key) => key !== 'name').map((key) => [key, describe(value[key])]));
    return { Error: { name, message, cause: describe(cause), fields, stack: typeof value.stack === 'string' } };
  }
  if (Array.isArray(value)) return value.map(describe);
  const plain = Object.fromEntries(Object.entries(value).map(([key, of]) => [key, describe(of)]));
  return value.constructor?.name && value.constructor.name !== 'Object' ? { Class: [value.constructor.name, plain] } : { Object: plain };
}

function build(description) {
  if (description === null || typeof description !== 'object') return description;
  if (Array.isArray(description)) return description.map(build);
  const [[kind, of]] = Object.entries(description);
  switch (kind) {
    case 'Undefined': return undefined;
    case 'BigInt': return BigInt(of);
    case 'Date': return new Date(of);
    case 'RegExp': return new RegExp(...of);
    case 'URL': return new URL(of);
    case 'Map': return new Map(of.map(([key, value]) => [build(key), build(value)]));
    case 'Set': return new Set(of.map(build));
    case 'Error': {
      const error = new Error(of.message, build(of.cause) === undefined ? undefined : { cause: build(of.cause) });
      error.name = of.name;
      return Object.assign(error, Object.fromEntries(Object.entries(of.fields ?? {}).map(([key, value]) => [key, build(value)])));
    }
    case 'Object': return Object.fromEntries(Object.entries(of).map(([key, value]) => [key, build(value)]));
  }
  throw new Error(`cannot build ${kind}`);
}

// A subscribe whose connection ends while it is being sent is rejected before anybody waits for it, which would end the process. If it was
// sent by a start, the sending waits for that same start to end (`#start`, `#resubscribeClient`, `#sendToBroker`, `#ensureStarted`), and the
// bus does nothing more for good: then the process ends as one that was killed, and whoever runs it starts another.
process.on('unhandledRejection', async (error) => {
  console.error(`a rejection that nobody waited for: ${error}`);
  const settled = bus.publish('alive', { type: 'alive', runId: '', data: null }).catch(() => {});
  const stuck = new Promise((resolve) => setTimeout(resolve, 3000, true));
  if (await Promise.race([settled, stuck])) process.exit(3);
});

const say = (what) => process.stdout.write(`${JSON.stringify(what)}\n`);
const subscriptions = new Map();

async function act({ what, topic, group, data, type, runId, extra, nacks = 0, count = 1 }) {
  switch (what) {
    case 'subscribe': {
      const callback = async (event, ack, nack) => {
        const { data, createdAt, id, type, runId, deliveryAttempt, ...rest } = event;
        say({ event: type, topic, group, id, runId, attempt: deliveryAttempt, dated: createdAt instanceof Date, data: describe(data), rest: describe(rest) });
        await (deliveryAttempt <= nacks ? nack?.() : ack?.());
      };
      subscriptions.set(`${topic} ${group}`, callback);
      return bus.subscribe(topic, callback, group === undefined ? undefined : { group });
    }
    case 'answer': // says its name in `pong` to whatever comes in `ping`
      for (const answer = () => bus.publish('pong', { type, runId: '', data: null }).catch(() => {}); ; ) {
        try {
          return await bus.subscribe('ping', answer);
        } catch {
          await new Promise((resolve) => setTimeout(resolve, 20)); // the broker is changing, and with it goes a subscribe on its way
        }
      }
    case 'unsubscribe':
      return bus.unsubscribe(topic, subscriptions.get(`${topic} ${group}`));
    case 'publish':
      for (let number = 0; number < count; number++) {
        await bus.publish(topic, { type: count > 1 ? `${type}-${number}` : type, runId: runId ?? '', data: build(data), ...build(extra ?? { Object: {} }) });
      }
      return;
    case 'close':
      return bus.close();
  }
  throw new Error(`cannot ${what}`);
}

let last = Promise.resolve();
createInterface({ input: process.stdin }).on('line', (line) => {
  last = last.then(() => act(JSON.parse(line))).then(
    () => say({ done: true, broker: bus.isBroker }),
    (error) => say({ failed: String(error) }),
  );
}).on('close', () => last.finally(() => process.exit(0)));
say({ done: true, broker: false });
