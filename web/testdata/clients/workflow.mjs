// A chat with WorkflowChatTransport, unchanged, as useChat has it: asks the questions that follow, one after the other, or
// resumes as a page that is loaded. Prints each chunk that it is handed, what the page then shows, and each error that it shows.
import { chunk, over, url } from './print.mjs';
import { AbstractChat } from 'ai7';
import { WorkflowChatTransport } from '@ai-sdk/workflow/client';

const [how, ...questions] = process.argv.slice(3);
console.error = console.warn = () => {}; // the transport tells of each broken connection

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
const show = (m) => { if (m.role === 'assistant') chunk('bytes', String(Buffer.byteLength(text(m)))); };

let asked = 0;
const transport = new WorkflowChatTransport({
  api: `${url}/ui-stream`,
  initialStartIndex: how === 'tail' ? -3 : undefined,
  fetch: (...args) => { asked++; if (args[1]?.method !== 'POST') chunk('from', new URL(args[0]).searchParams.get('startIndex')); return fetch(...args); },
  onChatEnd: ({ chunkIndex }) => chunk('parts', String(chunkIndex)),
});
const chat = new Chat({
  id: decodeURIComponent(url.split('/').at(-1)),
  transport,
  onError: (e) => chunk('error', e.message),
});
if (how === 'ask') {
  for (const question of questions) await chat.sendMessage({ text: question });
} else await chat.resumeStream();
chunk('requests', String(asked));
for (const m of chat.messages) if (m.role === 'assistant') chunk(m.id, text(m));
over(chat.status);
