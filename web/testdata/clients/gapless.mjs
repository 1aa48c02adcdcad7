// gapless.js as one more client of clients_test.go.
import { EventSource } from 'eventsource';
import { follow } from './gapless.js';
import { chunk, over, url } from './print.mjs';

follow(url, {
  ...(process.argv[3] === 'eventsource' && { EventSource }),
  onChunk: (c, seq) => chunk(String(seq), JSON.stringify(c)),
  onEnd: over,
});
