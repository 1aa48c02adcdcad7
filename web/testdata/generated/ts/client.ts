// What a program does with the types that openapi-typescript makes of openapi.yaml, and
// openapi-fetch: each call, typed. It is given the server's URL, and throws at the first that is
// not as it should be. tsc --strict reads it first.
import createClient from 'openapi-fetch';
import type { components, paths } from './gapless.d.ts';

type Schemas = components['schemas'];

// These do not compile where a shape of the contract has become `any`, which takes everything.
type IsAny<T> = 0 extends 1 & T ? true : false;
type None<T extends false> = T;
export type NothingIsAny = [
  None<IsAny<Schemas['Session']>>, None<IsAny<Schemas['Session']['last_seq']>>, None<IsAny<Schemas['Page']['chunks']>>,
  None<IsAny<Schemas['Chunk']['content']>>, None<IsAny<Schemas['Chunk']['data']>>, None<IsAny<Schemas['NewChunk']['content']>>,
  None<IsAny<Schemas['NewChunks']>>, None<IsAny<Schemas['Appended']['count']>>, None<IsAny<Schemas['Cancelled']['message_ids']>>,
  None<IsAny<Schemas['Asked']['reply_message_id']>>, None<IsAny<Schemas['Problem']['code']>>, None<IsAny<Schemas['EventData']>>,
  None<IsAny<Schemas['WelcomeEvent']['epoch']>>, None<IsAny<Schemas['ResetEvent']['reason']>>, None<IsAny<Schemas['Ticket']['url']>>,
];

declare const process: { argv: string[] };
const server = process.argv[2] ?? '';
const session = 'generated-ts';
const path = { id: session };
const api = createClient<paths>({ baseUrl: server });

function must(ok: boolean, what: string, ...seen: unknown[]): asserts ok {
  if (!ok) throw new Error(`${what}: ${JSON.stringify(seen)}`);
}

const created = await api.POST('/v1/sessions', { body: { id: session } });
must(created.data?.id === session && created.response.status === 201, 'create', created);

const chunk: Schemas['NewChunk'] = { message_id: 'm1', role: 'assistant', content: 'Tea ', trace: '4bf92f35' };
const appended = await api.POST('/v1/sessions/{id}/chunks', { params: { path }, body: [chunk, { message_id: 'm1', content: 'is ready.' }] });
must(appended.data?.count === 2, 'append JSON', appended);

const asIs = (body: unknown) => body as string;
const lines = await api.POST('/v1/sessions/{id}/chunks', {
  params: { path, header: { 'Producer-Id': 'generated', 'Producer-Epoch': 0, 'Producer-Chunk': 0 } },
  headers: { 'Content-Type': 'application/x-ndjson' },
  body: '{"message_id":"m1","content":" At"}\n{"message_id":"m1","content":" last."}\n', bodySerializer: asIs,
});
must(lines.data?.first_seq === 3 && lines.data.count === 2, 'append NDJSON', lines);

const text = await api.POST('/v1/sessions/{id}/chunks', {
  params: { path, query: { message_id: 'm2' } }, headers: { 'Content-Type': 'text/plain' }, body: 'Grüße aus Huế', bodySerializer: asIs,
});
must(text.data?.message_id === 'm2' && text.data.count === 2, 'append text', text);

const page = await api.GET('/v1/sessions/{id}/chunks', { params: { path, query: { after: 0, limit: 1 } } });
const first = page.data?.chunks[0];
must(first?.content === 'Tea ' && first['trace'] === '4bf92f35' && page.data?.last_seq === 6, 'page', page);

const stopped = await api.POST('/v1/sessions/{id}/cancel', { params: { path }, body: { message_id: 'm1' } });
must(stopped.data?.message_ids[0] === 'm1', 'cancel', stopped);

const late = await api.POST('/v1/sessions/{id}/chunks', { params: { path }, body: chunk });
// @ts-expect-error: such a code there is not
late.error?.code === 'message_canceled';
must(late.error?.code === 'message_cancelled' && late.error.status === 409, 'append to what is cancelled', late);

const asked = await api.POST('/v1/sessions/{id}/messages', { params: { path }, body: { content: 'How long does tea steep?' } });
must(asked.data !== undefined, 'ask', asked);

// From behind the cancelled chunk on: the question, and the answer as it comes.
const stream = await api.GET('/v1/sessions/{id}/stream', {
  params: { path, query: { after: String(stopped.data.last_seq), until: 'done' } }, parseAs: 'stream',
});
must(stream.data !== undefined && stream.data !== null, 'stream', stream);
let said = '', name = '', rest = '', done = false;
for await (const piece of stream.data.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + piece).split('\n');
  rest = lines.pop() ?? '';
  for (const line of lines) {
    if (line === '') name = '';
    if (line.startsWith('event: ')) name = line.slice(7);
    if (!line.startsWith('data: ')) continue;
    if (name === 'welcome') {
      const welcome: Schemas['WelcomeEvent'] = JSON.parse(line.slice(6));
      must(welcome.session === session && welcome.cursor === stopped.data.last_seq, 'welcome', welcome);
      continue;
    }
    const chunk: Schemas['Chunk'] = JSON.parse(line.slice(6));
    if (chunk.message_id !== asked.data.reply_message_id) continue;
    if (chunk.type === 'done') done = true;
    else said += chunk.content;
  }
}
must(done && said !== '', 'stream', said);

const deleted = await api.DELETE('/v1/sessions/{id}', { params: { path } });
must(deleted.response.status === 204, 'delete', deleted);
const gone = await api.GET('/v1/sessions/{id}', { params: { path } });
must(gone.error?.code === 'session_not_found', 'get what is deleted', gone);

console.log('all calls work');
