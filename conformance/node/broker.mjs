// A process of Mastra that is the broker of many buses: one for each path that it reads from a line of its standard input.
// Usage: node broker.mjs PACKAGE, where PACKAGE is the directory of an installed @mastra/core.

import { webcrypto } from 'node:crypto';
import { createInterface } from 'node:readline';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

// Node 18 has it, but not here.
globalThis.crypto ??= webcrypto;
const { UnixSocketPubSub } = await import(pathToFileURL(join(process.argv[2], 'dist/events/index.js')));

createInterface({ input: process.stdin }).on('line', async (path) => {
  const bus = new UnixSocketPubSub(path);
  await bus.subscribe('of its own', () => {});
  console.log(bus.isBroker ? `serves ${path}` : `is no broker of ${path}`);
}).on('close', () => process.exit(0));
