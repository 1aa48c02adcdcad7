// OpenAI's client, unchanged, on the Responses API: sdk is openai (version 6) or openai7. It asks in the background, follows the events, and
// when the connection breaks, retrieves the rest by their number. Prints each event, and what the whole is in the end.
import { isDeepStrictEqual } from 'node:util';
import { chunk, over, url } from './print.mjs';

const [sdk, how, input, direct] = process.argv.slice(3);
const { default: OpenAI } = await import(sdk);
const client = new OpenAI({ baseURL: url, apiKey: 'none', maxRetries: 5 });
const at = new OpenAI({ baseURL: direct, apiKey: 'none' }); // a node, without anything in between
const fail = (why, ...more) => { throw new Error(`${why}: ${JSON.stringify(more)}`); };

let id, last = -1, ended, cuts = 0;
const text = [];
async function take(stream) {
  for await (const event of stream) {
    if (event.sequence_number !== last + 1) fail('a gap', last, event);
    last = event.sequence_number;
    chunk('event', event.type);
    id ??= event.response?.id;
    if (event.type === 'response.output_text.delta') text.push(event.delta);
    if (['response.completed', 'response.failed', 'response.incomplete'].includes(event.type)) ended = event.response;
  }
}
// broken says whether an error is that of a connection that broke, perhaps inside an event: then more is to be asked for.
const broken = (e) => (e.name === 'TypeError' || e instanceof OpenAI.APIConnectionError || /terminated|aborted|premature|reset|JSON/i.test(e.message)) || fail(e.message);
try {
  await take(await client.responses.create({ model: 'demo', input, stream: true, background: how === 'background' }));
} catch (e) { broken(e); cuts++; }
while (!ended) {
  try {
    if (!id) fail('cut before its id: nothing can be known of it');
    await take(await client.responses.retrieve(id, { stream: true, starting_after: last }));
  } catch (e) { broken(e); cuts++; }
}
const whole = await at.responses.retrieve(id);
const snapshot = await at.responses.stream({ response_id: id, starting_after: 7 }).finalResponse();
const plain = (r) => JSON.parse(JSON.stringify({ ...r, output_text: undefined, output_parsed: undefined, output: r.output.map((o) => ({ ...o, parsed_arguments: undefined, content: o.content?.map((c) => ({ ...c, parsed: undefined })) })) }));
if (whole.output_text !== text.join('') || !isDeepStrictEqual(plain(whole), plain(ended)) || !isDeepStrictEqual(plain(whole), plain(snapshot))) fail('they differ', whole, ended, snapshot);
for (let n = 0; n <= last; n += Math.max(1, Math.floor(last / 20))) {
  let next = n + 1;
  for await (const event of await at.responses.retrieve(id, { stream: true, starting_after: n })) if (event.sequence_number !== next++) fail('from', n, event);
  if (next !== last + 1) fail('from', n, next, last);
}
for (let i = 0; i < 2; i++) if ((await at.responses.cancel(id)).status !== ended.status) fail('cancel');
const items = [];
for await (const item of at.responses.inputItems.list(id)) items.push(item);
if (items.length !== 1 || items[0].content[0].text !== input) fail('input', items);
const next = await at.responses.create({ model: 'demo', input: 'And now?', previous_response_id: id });
if (next.status !== 'completed' || next.conversation.id !== whole.conversation.id) fail('next', next);
const refused = await at.responses.create({ model: 'demo', input, tools: [{ type: 'web_search' }] }).catch((e) => e);
if (refused.status !== 400 || refused.param !== 'tools[0].type') fail('refused', refused.status, refused.param);
const alone = await at.responses.create({ model: 'demo', input, background: true });
if ((await at.responses.cancel(alone.id)).status !== 'cancelled' || (await at.responses.cancel(alone.id)).status !== 'cancelled') fail('cancelled');
await at.responses.delete(alone.id);
if ((await at.responses.retrieve(alone.id).catch((e) => e)).status !== 404) fail('deleted');
chunk('cuts', String(cuts));
chunk('text', text.join(''));
over(ended.status);
