// A parser only: the loop around it is the user's own.
import { createParser } from 'eventsource-parser';
import { chunk, over, url } from './print.mjs';

let cursor = '';
let retry = 3000;

for (;;) {
  const parser = createParser({
    onEvent(e) {
      if (e.id !== undefined) cursor = e.id;
      if (!e.event) chunk(e.id, e.data);
    },
    onRetry(ms) { retry = ms; },
  });
  try {
    const response = await fetch(url, { headers: cursor ? { 'Last-Event-ID': cursor } : {} });
    if (response.status === 204) break;
    const decoder = new TextDecoder();
    for await (const bytes of response.body) parser.feed(decoder.decode(bytes, { stream: true }));
  } catch {
    // Broken off: from the cursor on, again.
  }
  await new Promise((next) => setTimeout(next, retry));
}
over('204');
