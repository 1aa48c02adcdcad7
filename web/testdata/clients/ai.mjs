// The Vercel AI SDK's chat, as useChat has it, without React: asks (with a question), or resumes. sdk is the package: ai is
// version 6, ai7 version 7. A chat
// that resumes begins as a page that is loaded again, with the messages that the server has.
import { chunk, over, url } from './print.mjs';

const [sdk, how, question] = process.argv.slice(3);
const { AbstractChat, DefaultChatTransport } = await import(sdk);
const history = how === 'resume' ? await fetch(`${url}/messages?format=ui`) : undefined;

class State {
  status = 'ready';
  error = undefined;
  constructor(messages) { this.messages = messages ?? []; }
  pushMessage = (m) => { this.messages.push(m); show(m); };
  popMessage = () => { this.messages.pop(); };
  replaceMessage = (i, m) => { this.messages[i] = m; show(m); };
  snapshot = structuredClone;
}

class Chat extends AbstractChat {
  constructor(init) { super({ ...init, state: new State(init.messages) }); }
}

const text = (m) => m.parts.filter((p) => p.type === 'text').map((p) => p.text).join('');

// show prints how much there is, for the test to keep step.
function show(m) {
  if (m.role === 'assistant') chunk('bytes', String(Buffer.byteLength(text(m))));
  if (how === 'stop' && text(m) !== '') stop ??= fetch(`${url}/messages/${encodeURIComponent(m.id)}/stop`, { method: 'POST' });
}
let stop;

const api = `${url}/ui-stream`;
const chat = new Chat({
  messages: history?.ok ? await history.json() : [],
  transport: new DefaultChatTransport({ api, prepareReconnectToStreamRequest: () => ({ api }) }),
  onError: (e) => chunk('error', e.message),
  onFinish: ({ isAbort, isError, finishReason }) => chunk('finish', `${isAbort} ${isError} ${finishReason}`),
});

if (how === 'ask') await chat.sendMessage({ text: question });
else await chat.resumeStream();
// A page that has lost its connection, and is loaded again.
for (let i = 0; how === 'resume' && chat.status === 'error' && i < 20; i++) await chat.resumeStream();

chunk('roles', chat.messages.map((m) => m.role).join(' '));
const last = chat.messages.at(-1);
if (last) chunk(last.id, text(last));
for (const p of last?.parts ?? []) if (p.type === 'reasoning') chunk('reasoning', `${p.state}: ${p.text}`);
if (stop) chunk('stop', String((await stop).status));
over(chat.status);
