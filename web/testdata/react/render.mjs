// Renders examples/react for package_test.go, as an application does, in StrictMode: prints what it shows as lines of JSON,
// until the session has ended.
import { createElement as h, StrictMode } from 'react';
import { act, create } from 'react-test-renderer';
import { Chat } from './made/Chat.js';

globalThis.IS_REACT_ACT_ENVIRONMENT = true;
const [server, session] = process.argv.slice(2);
let root;
await act(async () => { root = create(h(StrictMode, null, h(Chat, { server, session }))); });
let was = '';
for (;;) {
  await act(() => new Promise((next) => { setTimeout(next, 20); }));
  const State = root.root.findByType('input').props.placeholder;
  const Messages = root.root.findAllByType('p').map((p) => `${p.props.className}: ${p.props.children}`);
  const is = JSON.stringify({ State, Messages });
  if (is !== was) process.stdout.write(`${was = is}\n`);
  if (State === 'ended') break;
}
await act(async () => root.unmount());
