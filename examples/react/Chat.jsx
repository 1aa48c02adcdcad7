import { useGapless } from 'gapless/react';

export function Chat({ session, server }) {
  const { messages, state, ask, stop } = useGapless(session, { server });
  return (
    <form action={(form) => ask(form.get('question'))}>
      {messages.map((m) => <p key={m.first_seq} className={m.role}>{m.content}</p>)}
      <input name="question" placeholder={state} />
      <button>Ask</button> <button type="button" onClick={() => stop()}>Stop</button>
    </form>
  );
}
