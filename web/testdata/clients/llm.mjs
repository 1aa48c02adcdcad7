// What an AI service's own client needs so that it follows a stream of ours: a fetch in
// which its request is our GET.
import { chunk, over, url } from './print.mjs';

// options are a client's: the service itself at url, or a raw stream at url, plainly or
// going on where it broke off.
export function options() {
  const common = { apiKey: 'none', maxRetries: 0 };
  switch (process.argv[3]) {
    case 'service': return { ...common, baseURL: url };
    case 'stream': return { ...common, fetch: (_, { signal }) => fetch(url, { signal }) };
    case 'resumed': return { ...common, fetch: async (_, { signal }) => resumed(signal) };
  }
}

// resumed is a response that breaks off nowhere. A client sees whole events only.
function resumed(signal) {
  const source = events(signal);
  const body = new ReadableStream({
    async pull(controller) {
      const { value, done } = await source.next();
      if (done) controller.close();
      else controller.enqueue(new TextEncoder().encode(value));
    },
  });
  return new Response(body, { headers: { 'Content-Type': 'text/event-stream' } });
}

async function* events(signal) {
  let cursor = '';
  for (let attempt = 0; attempt < 1000; attempt++) {
    let rest = '';
    try {
      const response = await fetch(url, { signal, headers: cursor ? { 'Last-Event-ID': cursor } : {} });
      if (response.status === 204) return;
      if (!response.ok) throw new Error(await response.text(), { cause: 'refused' });
      for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
        rest += text;
        for (let end; (end = rest.indexOf('\n\n') + 2) > 1; rest = rest.slice(end)) {
          const event = rest.slice(0, end);
          cursor = /^id: (.*)$/m.exec(event)?.[1] ?? cursor;
          yield event;
        }
      }
      return; // a clean end
    } catch (e) {
      if (signal.aborted || e.cause === 'refused') throw e;
      await new Promise((next) => setTimeout(next, 50)); // broken off: from the cursor on, again
    }
  }
  throw new Error('it breaks off again and again');
}

// show prints each object that a client hands out, and then what the answer is. answer
// takes the object in: names to texts.
export async function show(begin, answer) {
  const texts = new Map();
  const add = (name, text) => texts.set(name, (texts.get(name) ?? '') + text);
  let how = 'complete';
  try {
    for await (const object of await begin()) {
      chunk('object', JSON.stringify(object));
      answer(object, add);
    }
  } catch (e) {
    how = e.type ?? e.message;
  }
  for (const [name, text] of texts) chunk(name, text);
  over(how);
}
