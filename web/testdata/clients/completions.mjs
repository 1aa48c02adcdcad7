// OpenAI's client on chat completions: prints the bytes of the answer to each request, and the objects that it makes of them.
import { chunk, over, url } from './print.mjs';

const [sdk, how] = process.argv.slice(3);
const { default: OpenAI } = await import(sdk);
let session = '', bytes;
const client = new OpenAI({
  baseURL: url, apiKey: 'theirs', maxRetries: 0,
  fetch: async (...args) => {
    const response = await fetch(...args);
    session = response.headers.get('gapless-session') ?? '';
    const [a, b] = response.body.tee();
    bytes = new Response(b).arrayBuffer().then((all) => chunk('bytes', Buffer.from(all).toString('base64')), () => {});
    return new Response(a, response);
  },
});
try {
  const answer = await client.chat.completions.create({ model: how, messages: [{ role: 'user', content: 'Tea?' }], stream: how !== 'whole', tools: [{ type: 'function', function: { name: 'tea' } }] });
  if (how === 'whole') chunk('object', JSON.stringify(answer));
  else for await (const one of answer) chunk('object', JSON.stringify(one));
  chunk('session', session);
  await bytes;
  over('complete');
} catch (e) {
  chunk('error', `${e.status} ${e.message}`);
  over(e.type ?? e.message);
}
