// Follows with gapless.js for gapless_test.go: prints each call of a handler as a line of JSON, and
// calls what stdin says. When stdin ends it closes, and must then end by itself.
import { createInterface } from 'node:readline';
import { EventSource } from 'eventsource';
import { follow } from './gapless.js';

// JSON has no such number.
const number = (_, value) => (value === 'NaN' || value === 'Infinity' ? Number(value) : value);
let { url, by, again, resets, throws, snapshot, tickets, worker, ...options } = JSON.parse(process.argv[2], number);
const say = (...what) => process.stdout.write(JSON.stringify(what) + '\n');
const entered = []; // what onState was called with
let count = 0;
if (worker) globalThis.location = new URL(worker); // a worker has this, and no document

const handlers = {
  ...options,
  ...(by === 'eventsource' && { EventSource }),
  ...(by === 'headers' && { EventSource, headers: async () => ({ Authorization: `Bearer ${++count}` }) }),
  ...(by === 'refusing' && { headers: () => { throw new Error('no headers'); } }),
  ...(tickets && { ticket: async () => `ticket-${++count}` }),
  ...(tickets === 'plain' && { ticket: () => `ticket-${++count}` }),
  ...(tickets === 'refused' && { ticket: () => { throw new Error('no ticket'); } }),
  ...(snapshot && { onSnapshot: (s) => say('snapshot', s) }),
  onChunk(chunk, seq, { source }) {
    say('chunk', seq, chunk.content ?? chunk.type, source);
    if (seq === again) f.restart(again = 0);
    if (throws) throw new Error('a handler that throws');
  },
  onReset(reason) {
    say('reset', reason);
    if (resets) f[resets]();
  },
  onHole: (from, to) => say('hole', from, to),
  onState: (state) => entered.push(state),
  onProgress: ({ state, seq, epoch, node, connection, gaps, doubles, resets, reconnects, leading }) =>
    say('state', state, { seq, epoch, node, connection, gaps, doubles, resets, reconnects, leading, entered }),
  onEnd: (reason) => say('end', reason),
};

let f;
try {
  f = follow(url, handlers);
} catch (err) {
  say('thrown', err.name, err.message);
  process.exit();
}

for await (const line of createInterface({ input: process.stdin })) {
  const [call, ...args] = JSON.parse(line);
  try {
    const answer = await f[call](...args);
    if (answer) say('answer', answer);
  } catch (err) {
    say('problem', err.name, err.status, err.problem?.code, err.message);
  }
}
f.close();
