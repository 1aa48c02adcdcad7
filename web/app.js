// The page: one session's log, shown as a conversation.
//
// The log is the only source of what is shown. A question is drawn when it comes back as
// a chunk, not when it is sent, so every tab and every reload shows the same thing.

import { follow } from '/gapless.js';

const $ = (id) => document.getElementById(id);
const log = $('log');
const scroll = $('scroll');
const ask = $('ask');
const stop = $('stop');

// ---- the session, which is in the URL: so F5, a second tab or a link show the same

const url = new URL(location.href);
if (!url.searchParams.get('session')) {
  url.searchParams.set('session', newId());
  history.replaceState(null, '', url);
}
const api = `/v1/sessions/${encodeURIComponent(url.searchParams.get('session'))}`;

// ---- the token, where the server wants one: it is in this variable, and nowhere else

let token = '';

async function call(path, init = {}) {
  const response = await fetch(path, token ? { ...init, headers: { ...init.headers, Authorization: `Bearer ${token}` } } : init);
  if (response.status === 401) $('login').hidden = false;
  return response;
}

// An EventSource cannot send the token; a ticket stands for it.
async function ticket() {
  if (!token) return ''; // an open server, or a cookie
  const response = await call(`${api}/tickets`, { method: 'POST' });
  if (!response.ok) throw response;
  return (await response.json()).ticket;
}

$('login').addEventListener('submit', (e) => {
  e.preventDefault();
  token = $('token').value.trim();
  $('token').value = '';
  $('login').hidden = true;
  reconnect();
});

function newId() {
  // randomUUID exists in secure contexts only: not on http://192.168.0.7:8080.
  return crypto.randomUUID?.() ??
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
}

// ---- the conversation: chunks become messages

let messages = [];       // in the order of their first chunks
const byId = new Map();
const dirty = new Set(); // messages whose drawing is behind
let current = null;      // the message of the last chunk
let awaited = '';        // the id of an answer that we asked for and that has not begun
const wordless = new Set(); // ids of messages that were done without a word: they never begin

const endings = ['done', 'failed', 'cancelled'];

function take(seq, chunk) {
  if (chunk.type === 'end') {
    for (const m of messages) if (m.status === 'streaming') settle(m, 'unfinished');
    return;
  }
  const text = typeof chunk.content === 'string' ? chunk.content : '';
  const end = endings.includes(chunk.type) ? chunk.type : chunk.is_complete === true ? 'done' : '';
  const m = messageOf(seq, chunk, text || (end && end !== 'done'));
  if (!m) return;

  m.last = seq;
  m.text += text;
  m.undrawn += text;
  const why = chunk.detail ?? chunk.reason; // why it failed
  if (typeof why === 'string') m.reason = why;
  if (end) settle(m, end);
  else if (!m.ended) m.status = chunk.type === 'message' ? 'done' : 'streaming';
  dirty.add(m);
}

// Finds the message that a chunk belongs to, or begins one. Chunks without a message_id
// have nothing but their neighbours: consecutive ones of a role are one message.
function messageOf(seq, chunk, hasSomethingToShow) {
  const role = typeof chunk.role === 'string' ? chunk.role : 'assistant';
  const named = typeof chunk.message_id === 'string' && chunk.message_id !== '';
  let m = named ? byId.get(chunk.message_id)
    : current?.anonymous && !current.ended && role === current.role ? current : undefined;
  if (!m) {
    // Nothing begins with a chunk that has nothing to show: the `done` of an answer whose
    // text was trimmed, or what an unknown producer says to unknown clients.
    if (!hasSomethingToShow && (!named || chunk.type === 'done')) {
      if (named) wordless.add(chunk.message_id);
      return undefined;
    }
    m = begin(named ? chunk.message_id : `chunk-${seq}`, role, seq);
    m.anonymous = !named;
  }
  if (current !== m && current?.anonymous && !current.ended) settle(current, 'done'); // it cannot go on
  current = m;
  return m;
}

function begin(id, role, seq) {
  const article = element('article', { className: 'message' });
  const head = element('h2', { textContent: role === 'user' ? 'Question' : role === 'assistant' ? 'Answer' : role });
  const range = element('span', { className: 'range' });
  const body = element('div', { className: 'text' });
  const words = document.createTextNode('');
  const label = element('p', { className: 'label', hidden: true });
  body.append(words);
  head.append(range);
  article.append(head, body, label);
  Object.assign(article.dataset, { id, role });
  log.append(article);
  const m = { id, role, text: '', status: 'streaming', ended: false, anonymous: false,
    first: seq, last: seq, reason: '', undrawn: '', article, words, range, label };
  messages.push(m);
  byId.set(id, m);
  return m;
}

function settle(m, status) {
  m.status = status;
  m.ended = true;
  dirty.add(m);
}

const whyCleared = {
  trimmed: 'What was said before this is no longer kept.',
  ahead: 'The server lost a part of this conversation. This is what it has now.',
  epoch: 'The server began this conversation anew. This is what it has now.',
  deleted: 'This conversation was deleted.',
};

function clear(reason) {
  messages = [];
  byId.clear();
  wordless.clear();
  dirty.clear();
  current = null;
  awaited = '';
  log.replaceChildren();
  if (whyCleared[reason]) note(whyCleared[reason]);
}

function note(text) {
  log.append(element('p', { className: 'note', textContent: text }));
}

// The reasons that a server gives for a `failed`; a producer may give others, in words of its own.
const whyFailed = {
  __proto__: null, // theirs may be called anything
  producer_lost: 'its producer was lost',
  model_failed: 'the model failed',
  redis_away: 'Redis was away',
  shutdown: 'its node was stopped',
};

// ---- drawing: once a frame, however many chunks came

let frame = 0;
let timer = 0;

function draw() {
  if (timer) return;
  // A hidden page gets no frames, and may become hidden while one is due: whichever of
  // the two comes first.
  frame = requestAnimationFrame(flush);
  timer = setTimeout(flush, 200);
}

function flush() {
  cancelAnimationFrame(frame);
  clearTimeout(timer);
  timer = 0;

  for (const m of dirty) {
    m.words.appendData(m.undrawn);
    m.undrawn = '';
    m.article.dataset.status = m.status;
    m.article.ariaBusy = String(m.status === 'streaming');
    set(m.range, m.first === m.last ? `chunk ${m.first}` : `chunks ${m.first}–${m.last}`);
    const label = { failed: 'Failed', cancelled: 'Stopped', unfinished: 'Unfinished' }[m.status];
    m.label.hidden = !label;
    if (label) set(m.label, m.reason ? `${label}: ${whyFailed[m.reason] ?? m.reason}` : label);
  }
  dirty.clear();

  const { state } = follower;
  document.body.dataset.state = state;
  set($('state'), state);
  set($('node'), follower.node || '–');
  for (const name of ['seq', 'gaps', 'doubles', 'reconnects']) {
    set($(name), String(follower[name]));
    $(name).dataset.zero = follower[name] === 0;
  }

  const coming = state === 'connecting' || state === 'catching up';
  log.ariaBusy = String(coming); // what is only repeated is not announced
  $('empty').hidden = coming || state === 'disconnected' || log.childElementCount > 0 || awaited !== '';
  const waiting = awaited !== '' && !byId.has(awaited) && !wordless.has(awaited) && state !== 'ended';
  $('waiting').hidden = !waiting;
  $('disconnected').hidden = state !== 'disconnected';
  const ended = state === 'ended';
  $('ended').hidden = !ended;
  ask.disabled = $('send').disabled = ended;
  for (const b of $('samples').querySelectorAll('button')) b.disabled = ended;
  // What was streaming in a part of the log may have ended in the rest of it: until that is
  // here, the button stays as it was.
  if (!coming) offerStop(waiting || messages.some((m) => m.status === 'streaming' && !m.anonymous));

  if (pinned) scroll.scrollTop = scroll.scrollHeight;
  $('latest').hidden = pinned;
}

// Writing the same text again would still be announced, and laid out.
function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

// ---- scrolling: along with the text, but only for a reader who is at its end

let pinned = true;
let top = 0;

scroll.addEventListener('scroll', () => {
  const below = scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop;
  // Whoever scrolls up is let go, however short the way; text that grew is no scrolling.
  pinned = below < 4 || (pinned && scroll.scrollTop >= top);
  top = scroll.scrollTop;
  $('latest').hidden = pinned;
}, { passive: true });

$('latest').addEventListener('click', toEnd);
new ResizeObserver(draw).observe(scroll); // a phone's keyboard, or a question of many lines

function toEnd() {
  pinned = true;
  draw();
}

// ---- following

const follower = follow(`${api}/stream`, {
  onChunk: (chunk, seq) => take(seq, chunk),
  onReset: clear,
  ticket,
  fetch: call,
  onState: change,
  onHole: (from, to) => note(from === to ? `Chunk ${from} is missing.` : `Chunks ${from}–${to} are missing.`),
});

function change() {
  draw();
  if (follower.state === 'disconnected') explain();
}

// An EventSource does not say why it was refused; the session itself may.
async function explain() {
  let reason = 'The server cannot be reached.';
  try {
    const response = await call(api);
    reason = response.ok ? '' : await reasonOf(response);
  } catch {
    // Not even that.
  }
  if (follower.state === 'disconnected') complain(reason);
}

$('reconnect').addEventListener('click', reconnect);

function reconnect() {
  complain('');
  follower.restart();
}

// ---- asking

let sending = false;

$('form').addEventListener('submit', (e) => {
  e.preventDefault();
  submit();
});

ask.addEventListener('keydown', (e) => {
  // Enter may also choose a word in an input method; Safari says so only by 229.
  if (e.key !== 'Enter' || e.shiftKey || e.isComposing || e.keyCode === 229) return;
  e.preventDefault();
  submit();
});

$('samples').addEventListener('click', (e) => {
  if (e.target.tagName !== 'BUTTON') return;
  ask.value = e.target.textContent;
  submit();
});

async function submit() {
  const content = ask.value;
  if (sending || !content.trim()) return;
  // Not `disabled`, which would take the focus away.
  sending = ask.readOnly = true;
  complain('');
  try {
    const response = await call(`${api}/messages`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ content }),
    });
    if (!response.ok) return complain(await reasonOf(response));
    awaited = (await response.json()).reply_message_id ?? '';
    ask.value = '';
    toEnd();
    if (follower.state === 'disconnected') follower.restart();
  } catch {
    // It may have arrived all the same; the page must not send it twice by itself.
    complain('The server did not answer. If your question does not appear above, send it again.');
  } finally {
    sending = ask.readOnly = false;
  }
}

// ---- stopping

let stopping = false;

function offerStop(offered) {
  // A button that goes away would take the focus with it.
  if (!offered && document.activeElement === stop) (ask.disabled ? scroll : ask).focus();
  stop.hidden = !offered;
}

stop.addEventListener('click', cancel);

ask.addEventListener('keydown', (e) => {
  // Escape may also mean an input method, as Enter may.
  if (e.key === 'Escape' && !e.isComposing && e.keyCode !== 229) cancel();
});

// One button, so it stops everything: whoever presses it wants silence, also from a message
// that begins while the press is on its way, and from one that this tab does not know of yet.
// A list of what is shown would be out of date by then, and could be refused in part.
// That something was stopped is shown when the log says so.
async function cancel() {
  if (stop.hidden || stopping) return;
  stopping = true;
  stop.ariaDisabled = 'true'; // not `disabled`, as above
  complain('');
  try {
    const response = await call(`${api}/cancel`, { method: 'POST' });
    // 404 and 409 say that nothing is left to stop, which is what was wanted.
    if (!response.ok && response.status !== 404 && response.status !== 409) return complain(await reasonOf(response));
    if (follower.state === 'disconnected') reconnect(); // to the log, which says what became of it
  } catch {
    complain('The server did not answer. If more is said, press Stop again.');
  } finally {
    stopping = false;
    stop.ariaDisabled = null;
  }
}

// The text of an application/problem+json (RFC 9457).
async function reasonOf(response) {
  const problem = await response.json().catch(() => ({}));
  return problem.detail || problem.title || `The server answered with status ${response.status}.`;
}

function complain(text) {
  set($('problem'), text);
  $('problem').hidden = !text;
}

$('copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    $('copy').textContent = 'Copied';
    setTimeout(() => { $('copy').textContent = 'Copy link'; }, 1500);
  } catch {
    prompt('The link of this conversation:', location.href); // no clipboard without a secure context
  }
});

// ---- for tests, and for the curious with an open console

window.gapless = Object.freeze({
  get state() { return follower.state; },
  get epoch() { return follower.epoch; },
  get node() { return follower.node; },
  get seq() { return follower.seq; },
  get gaps() { return follower.gaps; },
  get doubles() { return follower.doubles; },
  get resets() { return follower.resets; },
  get reconnects() { return follower.reconnects; },
  get messages() { return messages.map(({ id, role, text, status }) => ({ id, role, text, status })); },
  text: (id) => byId.get(id)?.text,
});
