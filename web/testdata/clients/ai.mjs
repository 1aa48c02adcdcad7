// The Vercel AI SDK's chat, as useChat has it, without React: asks (with a question), or resumes.
import { AbstractChat, DefaultChatTransport } from 'ai';
import { chunk, over, url } from './print.mjs';

const [how, question] = process.argv.slice(3);

class State {
  status = 'ready';
  error = undefined;
  messages = [];
  pushMessage = (m) => { this.messages.push(m); show(m); };
  popMessage = () => { this.messages.pop(); };
  replaceMessage = (i, m) => { this.messages[i] = m; show(m); };
  snapshot = structuredClone;
}

class Chat extends AbstractChat {
  constructor(init) { super({ ...init, state: new State() }); }
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
  transport: new DefaultChatTransport({ api, prepareReconnectToStreamRequest: () => ({ api }) }),
  onError: (e) => chunk('error', e.message),
  onFinish: ({ isAbort, isError, finishReason }) => chunk('finish', `${isAbort} ${isError} ${finishReason}`),
});

if (how === 'ask') await chat.sendMessage({ text: question });
else await chat.resumeStream();
// A page that has lost its connection, and is loaded again.
for (let i = 0; how === 'resume' && chat.status === 'error' && i < 20; i++) await chat.resumeStream();

const last = chat.messages.at(-1);
if (last) chunk(last.id, text(last));
if (stop) chunk('stop', String((await stop).status));
over(chat.status);
