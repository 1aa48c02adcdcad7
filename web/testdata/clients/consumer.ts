// Whoever uses gapless.js with TypeScript: every member, and what must not pass.
import { follow, Follower, ProblemError } from './gapless.js';
import type { Chunk, EndReason, Info, Message, Options, Problem, ResetReason, Snapshot, State } from './gapless.js';

const options: Options = {
  onChunk(chunk: Chunk, seq: number, info: Info) {
    const text: string = chunk.content ?? '';
    const source: 'history' | 'live' | 'repaired' = info.source;
    console.log(seq, chunk.type, chunk.message_id?.length, text, source, chunk['tokens']);
  },
  onSnapshot(snapshot: Snapshot) {
    const messages: Message[] = snapshot.messages;
    const last: number = snapshot.last_seq;
    console.log(last, messages.map((m) => `${m.role} ${m.content} ${m.done}`));
  },
  onReset(reason: ResetReason) { console.log(reason === 'trimmed'); },
  onHole(from: number, to: number) { console.log(to - from); },
  onState(state: State, f: Follower) {
    const numbers: number[] = [f.seq, f.gaps, f.doubles, f.resets, f.reconnects];
    const texts: string[] = [f.epoch, f.node, f.connection];
    const leading: boolean = f.leading;
    console.log(state === 'live', numbers, texts, leading);
  },
  onProgress(f: Follower) { console.log(f.seq, f.state === 'live'); },
  onEnd(reason: EndReason) { console.log(reason === 'deleted'); },
  ticket: async () => 'ticket',
  headers: async () => ({ Authorization: 'Bearer token' }),
  after: 7,
  shared: false,
  silence: 10_000,
  fetch,
  EventSource,
};

const f = follow(new URL('https://chat.example/v1/sessions/s/stream'), options);
follow('/v1/sessions/s/stream').close();
follow('/v1/sessions/s/stream', { headers: { Authorization: 'Bearer token' }, onSnapshot: undefined }).restart();
try {
  const { message_id, reply_message_id } = await f.ask('Why?');
  await f.stop();
  await f.stop(reply_message_id || message_id);
} catch (err) {
  if (err instanceof ProblemError) {
    const problem: Problem = err.problem;
    console.log(err.status + 1, problem.code?.length, err.message.length);
  }
}

// @ts-expect-error There is no such handler.
follow('/stream', { onChunks() {} });
// @ts-expect-error It is a number.
follow('/stream', { after: 'latest' });
// @ts-expect-error It has words of its own.
if (f.state === 'open') f.close();
// @ts-expect-error It is nobody else's business.
console.log(f.connect);
