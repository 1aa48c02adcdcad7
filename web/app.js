// The page: one session's log, shown as a conversation, and next to it how it arrived.
//
// Only the log decides what is shown. A question is drawn when it comes back as a chunk, not when
// it is sent, so every tab and every reload shows the same.

import { follow } from '/gapless.js';
import { Markdown } from '/markdown.js';
import { Naive } from '/naive.js';
import { Plot, kinds, shape } from '/plot.js';

const $ = (id) => document.getElementById(id);
const log = $('log');
const scroll = $('scroll');
const ask = $('ask');
const stop = $('stop');

// ---- the session, which is in the URL, so that a reload, a second tab or a link shows the same
// one

const url = new URL(location.href);
if (!url.searchParams.get('session')) {
  url.searchParams.set('session', newId());
  history.replaceState(null, '', url);
}
const api = `/v1/sessions/${encodeURIComponent(url.searchParams.get('session'))}`;

// ---- the token, if the server requires one: it is kept only in this variable

let token = '';

async function call(path, init = {}) {
  const response = await fetch(path, token ? { ...init, headers: { ...init.headers, Authorization: `Bearer ${token}` } } : init);
  if (response.status === 401) {
    $('login').hidden = false;
    if (document.activeElement === $('ask') && !$('ask').value) $('token').focus();
  }
  return response;
}

// An EventSource cannot send the token, so a ticket replaces it.
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
  // randomUUID exists only in secure contexts: not on http://192.168.0.7:8080.
  return crypto.randomUUID?.() ??
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
}

// ---- the conversation: chunks become messages

let messages = [];       // in the order of their first chunks
const byId = new Map();
const dirty = new Set(); // messages that must be drawn again
let current = null;      // the message of the last chunk
let holes = 0;           // how many chunks the stream left out for good
let restored = 0;        // how many chunks came as a snapshot
let awaited = '';        // the id of an answer that we asked for and that has not begun
let asked = '';          // the id of the answer that we asked for last: it is verified when it has ended
const wordless = new Set(); // ids of messages that ended without text: they never begin

const endings = ['done', 'failed', 'cancelled'];

function take(chunk, seq, { source }) {
  plot.mark(source, seq);
  showing?.had.add(seq);
  if (source === 'live' && Number.isFinite(chunk.ts)) note.latency(Date.now() - chunk.ts);
  const text = typeof chunk.content === 'string' ? chunk.content : '';
  if (chunk.type === 'end' && !text) return; // only the server knows whether the log has ended: see over
  const end = endings.includes(chunk.type) ? chunk.type : chunk.is_complete === true ? 'done' : '';
  const m = messageOf(seq, chunk, text || (end && end !== 'done'));
  if (!m) return;

  m.last = seq;
  if (chunk.type === 'reasoning') think(m, text, chunk.ts);
  else say(m, text);
  const why = chunk.detail ?? chunk.reason; // why it failed
  if (typeof why === 'string') m.reason = why;
  if (end) settle(m, end);
  else if (!m.ended) m.status = chunk.type === 'message' ? 'done' : 'streaming';
  if (m.status !== 'streaming' && source !== 'history' && m.role !== 'user') m.aloud = true;
  dirty.add(m);
}

// The log has ended: a message that has not ended by then never will.
function over() {
  for (const m of messages) if (m.status === 'streaming') settle(m, 'unfinished');
  draw();
}

// The existing chunks come as whole messages.
function restore(snapshot) {
  const due = awaited; // it may come after what is restored
  clear('');
  awaited = due;
  restored = snapshot.last_seq - snapshot.first_seq + 1;
  plot.mark('snapshot', snapshot.last_seq, snapshot.first_seq);
  if (showing) for (let seq = snapshot.first_seq; seq <= snapshot.last_seq; seq++) showing.had.add(seq);
  set($('snapshot'), `${restored} chunks in one event`);
  for (const { message_id: id, role, content, reasoning, reasoning_ms: ms, status, reason, chunks = [], first_seq: first, last_seq: last } of snapshot.messages) {
    if (!content && !reasoning && status === 'done') {
      if (id) wordless.add(id);
      continue;
    }
    const m = begin(id || `chunk-${first}`, role ?? 'assistant', first);
    Object.assign(m, { anonymous: !id, last, reason: chunks.findLast((c) => typeof c.detail === 'string')?.detail ?? reason ?? '' });
    if (reasoning) think(m, reasoning, undefined, ms);
    say(m, content);
    if (status !== 'streaming') settle(m, status);
    if (!current || last > current.last) current = m;
    dirty.add(m);
  }
}

// Finds the message that a chunk belongs to, or begins one. Chunks without a message_id belong to
// their neighbours: consecutive ones of a role are one message.
function messageOf(seq, chunk, hasSomethingToShow) {
  const role = typeof chunk.role === 'string' ? chunk.role : 'assistant';
  const named = typeof chunk.message_id === 'string' && chunk.message_id !== '';
  let m = named ? byId.get(chunk.message_id)
    : current?.anonymous && !current.ended && role === current.role ? current : undefined;
  if (!m) {
    // A chunk without anything to show begins no message. It is the `done` of an answer whose text
    // was trimmed, or a chunk from an unknown producer to unknown clients.
    if (!hasSomethingToShow && (!named || chunk.type === 'done')) {
      if (named) wordless.add(chunk.message_id);
      return undefined;
    }
    m = begin(named ? chunk.message_id : `chunk-${seq}`, role, seq);
    m.anonymous = !named;
  }
  if (current !== m && current?.anonymous && !current.ended) settle(current, 'done'); // nothing can continue it
  current = m;
  return m;
}

function nameOf(role) {
  return role === 'user' ? 'Question' : role === 'assistant' ? 'Answer' : role;
}

function begin(id, role, seq) {
  const article = element('article', { className: 'message' });
  const head = element('h2', { textContent: nameOf(role) });
  const range = element('span', { className: 'range' });
  const body = element('div', { className: 'text' });
  const label = element('p', { className: 'label', hidden: true });
  const actions = element('p', { className: 'actions', hidden: true });
  actions.append(element('button', { type: 'button', className: 'quiet copy-message', textContent: 'Copy' }));
  if (role === 'assistant') actions.append(element('button', { type: 'button', className: 'quiet again', textContent: 'Ask again' }));
  head.append(range);
  // The model's reasoning is folded, and is not part of its text.
  const thinking = element('details', { className: 'thinking', hidden: true });
  const thoughts = element('div', { className: 'thoughts' });
  thinking.append(element('summary', {}), thoughts);
  article.append(head, thinking, body, label, actions);
  Object.assign(article.dataset, { id, role });
  log.append(article);
  // Only the model's text is Markdown. Other text is shown as it was written.
  const markdown = role === 'assistant' ? new Markdown(body) : undefined;
  const words = markdown ? undefined : body.appendChild(document.createTextNode(''));
  const m = { id, role, text: '', status: 'streaming', ended: false, anonymous: false, aloud: false,
    first: seq, last: seq, reason: '', undrawn: '', thought: '', thoughtSince: 0, thoughtFor: 0, unthought: '',
    article, thinking, thoughts, markdown, words, range, label, actions };
  messages.push(m);
  byId.set(id, m);
  return m;
}

function say(m, text) {
  m.text += text;
  m.undrawn += text;
}

// ts is the chunk's time in ms; ms is the total duration.
function think(m, text, ts, ms = 0) {
  m.thought += text;
  m.unthought += text;
  m.thoughtFor = Math.max(m.thoughtFor, ms);
  if (!Number.isFinite(ts)) return;
  m.thoughtSince ||= ts - m.thoughtFor;
  m.thoughtFor = Math.max(m.thoughtFor, ts - m.thoughtSince);
}

function duration(ms) {
  const s = Math.round(ms / 1000);
  if (s < 1) return 'a moment';
  return s < 60 ? `${s} s` : `${Math.floor(s / 60)} min ${s % 60} s`;
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
  restored = 0;
  holes = 0;
  showing?.had.clear();
  plot.clear();
  log.replaceChildren();
  if (whyCleared[reason]) remark(whyCleared[reason]);
}

function remark(text) {
  log.append(element('p', { className: 'note', textContent: text }));
}

// The server's reasons for a `failed`. A producer may give others, in its own words.
const whyFailed = {
  __proto__: null, // a producer's reason may be any string
  producer_lost: 'its producer was lost',
  model_failed: 'the model failed',
  redis_away: 'Redis was away',
  shutdown: 'its node was stopped',
};

// Headings of a conversation of which nothing can be shown, by the state, or by the refusal's status.
const blanks = {
  coming: ['Connecting…', 'The conversation appears here as soon as the server answers.'],
  ended: ['This conversation has ended', 'Nothing was said in it.'],
  closed: ['No connection', 'Nothing of this conversation has come yet.'],
  400: ['This address names no conversation', 'The part after "session=" is not a valid id. Check the address, or start a new conversation.'],
  401: ['A token is needed', 'This server shows conversations only to callers with a token. Paste yours below.'],
  403: ['This conversation is not open to you', 'Your token does not allow it. Use another token, or start a new conversation.'],
};

// ---- drawing: once per frame, however many chunks came

let frame = 0;
let timer = 0;
let hadConnection = false;
let rest = 0; // until when the page should do other work than drawing

function draw() {
  if (timer) return;
  // A hidden page gets no frames, and may become hidden while one is due. So the first of a frame
  // and a timer draws. The longer drawing takes, the less often it is done.
  const wait = rest - performance.now();
  if (wait > 20) {
    timer = setTimeout(flush, wait);
    return;
  }
  frame = requestAnimationFrame(flush);
  timer = setTimeout(flush, 200);
}

function flush() {
  cancelAnimationFrame(frame);
  clearTimeout(timer);
  timer = 0;
  const begun = performance.now();

  for (const m of dirty) {
    if (m.markdown) {
      m.markdown.append(m.undrawn);
      m.markdown.draw();
    } else {
      m.words.appendData(m.undrawn);
    }
    m.undrawn = '';
    const growing = m.status === 'streaming';
    if (m.thought) {
      if (m.unthought) m.thoughts.append(m.unthought);
      m.unthought = '';
      m.thinking.hidden = false;
      set(m.thinking.firstChild, growing && !m.text ? 'Thinking…' : `Thought for ${duration(m.thoughtFor)}`);
    }
    m.article.dataset.status = m.status;
    m.article.ariaBusy = String(growing);
    m.actions.hidden = growing;
    set(m.range, m.first === m.last ? `chunk ${m.first}` : `chunks ${m.first}–${m.last}`);
    const label = { failed: 'Failed', cancelled: 'Stopped', unfinished: 'Unfinished' }[m.status];
    m.label.hidden = !label;
    if (label) set(m.label, m.reason ? `${label}: ${whyFailed[m.reason] ?? m.reason}` : label);
    if (m.aloud) {
      m.aloud = false;
      set($('said'), `${nameOf(m.role)}${label ? `, ${m.label.textContent}` : ''}: ${m.article.querySelector('.text').innerText}`);
    }
  }
  dirty.clear();
  drawNaive();

  const { state } = follower;
  document.body.dataset.state = state;
  set($('state'), state);
  note.draw();

  const coming = state === 'connecting' || state === 'catching up';
  const ended = state === 'ended';
  const closed = state === 'disconnected';
  const connected = state === 'catching up' || state === 'live' || ended;
  hadConnection ||= connected;
  // Style says so after the last word of each answer that was growing.
  const lost = hadConnection && !connected;
  document.body.classList.toggle('lost', lost);

  // A conversation of which nothing can be shown has a heading that says why.
  const silent = log.childElementCount === 0 && awaited === '';
  const blank = !silent ? undefined : ended ? blanks.ended
    : closed ? blanks[$('login').hidden ? refusal : 401] ?? blanks.closed
      : coming || !hadConnection ? blanks.coming : undefined;
  $('blank').hidden = !blank;
  $('blank').dataset.coming = blank === blanks.coming;
  if (blank) {
    set($('blank-title'), blank[0]);
    set($('blank-text'), blank[1]);
  }
  $('empty').hidden = !silent || blank !== undefined;
  const waiting = awaited !== '' && !byId.has(awaited) && !wordless.has(awaited) && !ended;
  $('waiting').hidden = !waiting;
  set($('waiting').firstChild, lost ? 'The connection is lost. The answer comes when it is back' : 'The answer is on its way');

  // What has come can be compared with the server's log when nothing is under way.
  const whole = !silent && !waiting && (state === 'live' || ended) && messages.every((m) => m.status !== 'streaming' || m.anonymous);
  if (whole && byId.get(asked)?.ended) verify();
  check.draw(whole);

  // What can be done about a refusal.
  const nowhere = closed && refusal === 400;
  $('why').hidden = $('reconnect').hidden = !closed || nowhere || refusal === 403;
  $('another').hidden = !forbidden && !(closed && refusal === 403);
  $('fresh').hidden = !closed || !nowhere && refusal !== 403;
  $('disconnected').hidden = !$('login').hidden || !closed && !forbidden;
  $('ended').hidden = !ended;
  $('form').hidden = ended || nowhere;
  ask.disabled = $('send').disabled = ended;
  document.body.classList.toggle('over', ended);
  for (const b of $('samples').querySelectorAll('button')) b.disabled = ended;
  for (const b of document.querySelectorAll('.show')) {
    b.disabled = ended;
    b.ariaDisabled = showing ? 'true' : null;
  }
  // A message that is streaming in one part of the log may have ended in the rest. Until the rest
  // is here, the button stays as it was.
  if (!coming) offerStop(waiting || messages.some((m) => m.status === 'streaming' && !m.anonymous));

  if (pinned) scroll.scrollTop = scroll.scrollHeight;
  $('latest').hidden = pinned;
  const end = performance.now();
  rest = end + 3 * (end - begun);
}

// Writing the same text again would still be announced, and laid out.
function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

// ---- is this the server's log, chunk by chunk?

const check = {
  at: '', // the log and the chunk up to which text is true
  text: '',
  wrong: false,
  digest: '–',

  draw(whole) {
    const said = this.at === `${follower.epoch} ${follower.seq}`;
    $('whole').hidden = !whole || !isSecureContext; // only there is crypto.subtle
    $('whole').dataset.wrong = said && this.wrong;
    $('verify').hidden = said;
    set($('verified'), said ? this.text : '');
    set($('digest'), said ? this.digest : '–');
  },
};

async function verify() {
  asked = '';
  const chunks = (n) => (n === 1 ? '1 chunk' : `${n} chunks`);
  const { epoch, seq } = follower;
  Object.assign(check, { at: `${epoch} ${seq}`, text: 'Verifying…', wrong: false, digest: '–' });
  draw();
  let said;
  try {
    const { ok, first_seq: first, last_seq: last, count, difference, parts } = await follower.verify();
    said = {
      at: `${epoch} ${last}`,
      wrong: !ok,
      text: !ok ? `Not what the server has: ${difference.detail}. Reload the page`
        : count === 0 ? `Complete: ${chunks(restored)}, all of them in one snapshot`
          : restored === 0 ? `Complete: ${chunks(count)}, verified`
            : `Complete: ${chunks(restored + count)}, verified from ${first} on`,
      digest: parts.length === 1 ? parts[0].sha256 : '–',
    };
  } catch (err) {
    said = { text: `Not verified: ${err.message}` };
  }
  if (check.at === `${epoch} ${seq}`) Object.assign(check, said);
  draw();
}

$('verify').addEventListener('click', verify);

// ---- scrolling: follow the text, but only for a reader who is at its end

let pinned = true;
let top = 0;

scroll.addEventListener('scroll', () => {
  const below = scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop;
  // A reader who scrolls up, even a little, is no longer followed. Text that grew is not scrolling.
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

// ---- the inspector: how the log arrived

const plot = new Plot($('plot'));

const note = {
  latencies: [], // of the last live chunks, in ms

  latency(ms) {
    this.latencies.push(ms);
    if (this.latencies.length > 50) this.latencies.shift();
  },

  draw() {
    const { state } = follower;
    plot.connected(state === 'catching up' || state === 'live' || state === 'ended');
    for (const name of ['seq', 'gaps', 'doubles', 'reconnects']) {
      set($(name), String(follower[name]));
      $(name).dataset.zero = follower[name] === 0;
    }
    set($('node'), follower.node || '–');
    set($('epoch'), follower.epoch || '–');
    set($('connection'), follower.connection || '–');
    set($('leading'), state !== 'ended' && follower.connection ? (follower.leading ? 'this tab' : 'another tab') : '–');
    for (const kind of kinds) set($(`n-${kind}`), String(kind === 'lost' ? naive.everLost.size : plot.counts[kind]));
    const sorted = this.latencies.toSorted((a, b) => a - b);
    if (sorted.length > 0) set($('latency'), `${sorted[sorted.length >> 1]} ms`.replace('-', '−'));
    if (sorted[0] < 0) set($('skew'), `This page's clock is behind the server's by ${-sorted[0]} ms or more: so much is missing from the latency.`);
    set($('our-count'), `${holes} lost`);
    $('our-count').dataset.zero = holes === 0;
    const lost = `${naive.missing} lost`;
    set($('naive-count'), naive.everLost.size > naive.missing ? `${lost} now, ${naive.everLost.size} in all` : lost);
    $('naive-count').dataset.zero = naive.missing === 0;
    this.describe();
  },

  // Words for readers who do not see the plot. They read it when they want, so it may be a little
  // late.
  described: 0,
  describe() {
    if (Date.now() - this.described < 1000) return;
    this.described = Date.now();
    set($('plot-words'), plot.words);
    setTimeout(() => set($('plot-words'), plot.words), 1000);
  },
};

function drawKeys() {
  for (const key of document.querySelectorAll('canvas.key')) {
    const dots = devicePixelRatio;
    key.width = key.height = 14 * dots;
    const g = key.getContext('2d');
    g.scale(dots, dots);
    shape(g, key.dataset.kind, 7, 7, getComputedStyle(key).getPropertyValue(`--${key.dataset.kind}`).trim(), 10);
  }
}
drawKeys();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawKeys);

// Next to the conversation if there is room, otherwise below it, in the lower half.
const wide = matchMedia('(min-width: 64rem)');

function inspect(open) {
  $('inspector').hidden = !open;
  $('inspect').ariaExpanded = String(open);
  document.body.classList.toggle('inspected', open);
  draw();
}

inspect(wide.matches);
wide.addEventListener('change', () => inspect(wide.matches));
$('inspect').addEventListener('click', () => {
  inspect($('inspector').hidden);
  if (!$('inspector').hidden && !wide.matches) $('close').focus();
});
$('close').addEventListener('click', closeInspector);
$('inspector').addEventListener('keydown', (e) => {
  if (e.key === 'Escape' && !wide.matches) closeInspector();
});

function closeInspector() {
  inspect(false);
  $('inspect').focus();
}

// ---- the demo: only for a server with -model demo

async function lookForDemo() {
  const response = await fetch(`${api}/demo`, { method: 'OPTIONS' }).catch(() => undefined);
  $('demo').hidden = $('no-model').hidden = document.querySelector('.offer').hidden = !response?.headers.get('Allow')?.includes('POST'); // CORS may cause any status
}

async function lookForMemory() {
  const is = await fetch('/readyz').then(response => response.json()).catch(() => undefined);
  $('in-memory').hidden = is?.data !== 'memory';
}

// Reports whether it was done.
async function disturb(connection, what) {
  complain(connection ? '' : 'There is no connection now.');
  if (!connection) return false;
  try {
    const response = await call(`${api}/demo`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ connection, do: what }),
    });
    if (!response.ok) complain(await reasonOf(response));
    return response.ok;
  } catch {
    complain('The server did not answer.');
    return false;
  }
}

$('cut').addEventListener('click', () => {
  disturb(follower.connection, 'cut');
  if (naive.state === 'live' || naive.state === 'reading') disturb(naive.connection, 'cut');
});

let slowed = ''; // the connection that is throttled; a new one is not

$('slow').addEventListener('click', () => {
  const on = slowed !== follower.connection;
  slowed = on ? follower.connection : '';
  disturb(follower.connection, on ? 'slow' : 'quick');
  $('slow').ariaPressed = String(on);
});

$('tabs').addEventListener('click', () => {
  let blocked = 0;
  for (let i = 0; i < 4; i++) if (!open(location.href, '_blank')) blocked++;
  $('tab-links').hidden = blocked === 0;
  $('tab-links').replaceChildren('Your browser opens one tab a click: ');
  for (let i = 1; i <= blocked; i++) {
    if (i > 1) $('tab-links').append(', ');
    $('tab-links').append(element('a', { href: location.href, target: '_blank', textContent: `tab ${i}` }));
  }
});

const naive = new Naive(`${api}/demo/naive`, {
  fetch: (path, init) => call(path, init),
  clear() {
    naiveById.clear();
    naiveLast = undefined;
    $('naive-log').replaceChildren();
  },
  chunk(chunk) {
    if (typeof chunk.content === 'string' && chunk.content !== '' && chunk.type !== 'reasoning') sayNaively(naiveWords(chunk), 'append', chunk.content);
  },
  lost(from, to) {
    for (let seq = from; seq <= to; seq++) plot.mark('lost', seq);
    // The naive viewer does not know what is missing, but where.
    sayNaively(naiveLast ?? naiveWords({}), 'miss', from === to ? `✕ ${from} lost` : `✕ ${from}–${to} lost`);
  },
  change: draw,
});
const naiveById = new Map(); // what it shows of each message
let naiveLast;

function naiveWords({ message_id: id = '', role = 'assistant' }) {
  let words = naiveById.get(id);
  if (!words) {
    const article = element('article', { className: 'message' });
    const body = element('div', { className: 'text' });
    article.dataset.role = role;
    article.append(element('h2', { textContent: nameOf(role) }), body);
    $('naive-log').append(article);
    words = { markdown: role === 'assistant' ? new Markdown(body) : undefined, body };
    naiveById.set(id, words);
  }
  naiveLast = words;
  return words;
}

function sayNaively(words, how, text) {
  if (words.markdown) words.markdown[how](text);
  else words.body.append(how === 'miss' ? element('mark', { textContent: text }) : text);
  naiveDirty.add(words);
  draw();
}

function drawNaive() {
  for (const { markdown } of naiveDirty) markdown?.draw();
  if (naiveDirty.size > 0) $('naive').scrollTop = $('naive').scrollHeight;
  naiveDirty.clear();
}
const naiveDirty = new Set();

let comparing = 0;

$('compare').addEventListener('click', () => compare($('compare').ariaChecked !== 'true'));

function compare(on) {
  $('compare').ariaChecked = String(on);
  $('naive').hidden = !on;
  scroll.querySelector('.side-label').hidden = $('lost-key').hidden = !on;
  $('views').classList.toggle('two', on);
  clearInterval(comparing);
  if (on) {
    naive.start(Number($('gap').value));
    // What has not reached it after three checks was not on its way.
    const seen = [];
    comparing = setInterval(() => {
      if (naive.state !== 'live') seen.length = 0;
      else if (seen.push(follower.seq) > 3) naive.compare(seen.shift());
    }, 500);
  } else {
    naive.stop();
    $('shown').hidden = true;
  }
  toEnd();
}

$('gap').addEventListener('change', () => {
  if ($('compare').ariaChecked === 'true') naive.start(Number($('gap').value));
});

// ---- the show: one answer, two viewers, two cuts, and then how much each of them has lost

const showQuestion = 'Why do streamed answers lose words when a page is reloaded?';
const cuts = 2;
const beforeCut = 25; // chunks that come before each cut

let showing; // {had}: the numbers of the chunks that came since the show began

for (const b of document.querySelectorAll('.show')) b.addEventListener('click', show);

async function show() {
  if (showing) return;
  const { had } = showing = { had: new Set() };
  try {
    if (!wide.matches && !$('inspector').hidden) closeInspector(); // both viewers need the room
    if (naive.state === 'idle') compare(true);
    tell('Both viewers connect.');
    await until(() => follower.state === 'live' && naive.state === 'live');
    const from = follower.seq;
    tell('The demo is asked.');
    const reply = await question(showQuestion);
    if (!reply) return tell('');
    const over = () => byId.get(reply)?.ended === true;
    let made = 0;
    for (let left = cuts; left > 0; left--) {
      const at = follower.seq;
      await until(() => over() || follower.seq >= at + beforeCut && naive.last >= at + beforeCut);
      if (over()) break; // the answer was too short for all cuts
      const [ours, theirs] = [follower.connection, naive.connection];
      tell(`Cut ${made + 1} of ${cuts}: both viewers have lost their connection, and the answer goes on.`);
      const done = await Promise.all([disturb(ours, 'cut'), disturb(theirs, 'cut')]);
      if (done.includes(false)) return tell('');
      made++;
      await until(() => follower.state === 'live' && follower.connection !== ours && naive.state === 'live' && naive.connection !== theirs);
      tell(`Cut ${made} of ${cuts}: both are back.`);
    }
    await until(over);
    tell('The answer is complete. What each viewer has is compared with the log.');
    const response = await call(api);
    if (!response.ok) throw new Error(await reasonOf(response));
    const { last_seq: last } = await response.json();
    await until(() => follower.seq >= last && naive.last >= last);
    count(from, last, made, had);
  } catch (err) {
    tell('');
    complain(`Show me: ${err.message}`);
  } finally {
    showing = undefined;
    draw();
  }
}

// Compares what came with the chunks after `from` up to `last`, all of which the log has.
function count(from, last, made, had) {
  let ours = 0;
  for (let seq = from + 1; seq <= last; seq++) if (!had.has(seq)) ours++;
  const within = (numbers) => [...numbers].filter((seq) => seq > from && seq <= last).length;
  const theirs = within(naive.everLost);
  const still = within(naive.lacks);
  tell(`Gapless: ${ours} lost, naive viewer: ${theirs} lost.`, true);
  $('to-gap').hidden = still === 0;
  const returned = theirs > still ? ` Of the ${theirs}, ${theirs - still} came back when it read the history again, and ${still} are still missing.` : '';
  set($('shown-how'), `${last - from} chunks, ${made} cuts, ${$('gap').value} ms between the naive viewer's reading and subscribing.${returned}`);
  $('shown-how').hidden = false;
  set($('said'), $('shown-what').textContent);
}

function tell(text, result = false) {
  set($('shown-what'), text);
  $('shown').classList.toggle('result', result);
  $('shown').hidden = !text;
  $('to-gap').hidden = $('shown-how').hidden = true;
}

// Waits. Fails if there is nothing to wait for any more.
function until(ok) {
  return new Promise((resolve, reject) => {
    let was = '';
    let since = 0;
    const timer = setInterval(() => {
      const is = [follower.state, follower.seq, naive.state, naive.last].join();
      if (is !== was) since = Date.now();
      was = is;
      const why = naive.state === 'idle' ? 'the naive viewer was stopped.'
        : follower.state === 'disconnected' || follower.state === 'ended' ? `the conversation is ${follower.state}.`
          : Date.now() - since > 60_000 ? 'nothing has happened for a minute.' : '';
      if (!ok() && !why) return;
      clearInterval(timer);
      if (ok()) resolve();
      else reject(new Error(why));
    }, 50);
  });
}

$('to-gap').addEventListener('click', (e) => {
  e.preventDefault(); // the address is the conversation's
  const gap = $('naive-log').querySelector('mark');
  if (!gap) return;
  gap.id = 'first-gap';
  gap.tabIndex = -1;
  gap.scrollIntoView({ block: 'center' });
  gap.focus({ preventScroll: true });
});

// ---- following

const follower = follow(`${api}/stream`, {
  onChunk: take,
  onSnapshot: restore,
  onReset: clear,
  onState: change,
  onProgress: progress,
  onEnd: over,
  onHole(from, to) {
    holes += to - from + 1;
    remark(from === to ? `Chunk ${from} is missing.` : `Chunks ${from}–${to} are missing.`);
  },
  ticket,
  fetch: call,
  verify: true,
});
lookForDemo();
lookForMemory();

function progress() {
  draw();
  if (slowed && slowed !== follower.connection) {
    slowed = '';
    $('slow').ariaPressed = 'false';
  }
}

let refusal = 0; // the status with which the session was refused; 400 for every id that cannot be one
let forbidden = false; // a call was refused with 403: another token may help

function change() {
  if (follower.state === 'disconnected') explain();
  else refusal = 0;
}

// An EventSource does not say why it was refused. A request for the session may.
async function explain() {
  let reason = 'The server cannot be reached.';
  let status = 0;
  try {
    const response = await call(api);
    ({ status } = response);
    if (status === 414 || status === 404 && (await response.clone().json().catch(() => ({}))).code !== 'session_not_found') status = 400;
    const known = response.ok || status === 404 || (status === 401 && !token); // the form says it
    reason = known ? '' : await reasonOf(response);
  } catch {
    // This is not reachable, either.
  }
  if (follower.state !== 'disconnected') return;
  refusal = status;
  complain(reason);
}

$('reconnect').addEventListener('click', reconnect);

$('another').addEventListener('click', () => {
  $('login').hidden = false;
  $('token').focus();
  complain('');
});

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
  // Enter may also choose a word in an input method. Safari shows that only by key code 229.
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
  // `disabled` would take the focus away.
  sending = ask.readOnly = true;
  if (await question(content)) ask.value = '';
  sending = ask.readOnly = false;
}

// Returns the id of the answer, or '' if the question was not accepted.
async function question(content) {
  complain('');
  try {
    const { reply_message_id: reply } = await follower.ask(content);
    awaited = asked = reply ?? '';
    toEnd();
    if (follower.state === 'disconnected') follower.restart();
    return awaited || content;
  } catch (err) {
    // It may have arrived nevertheless. The page must not send it twice by itself.
    complain(err.status ? err.message : 'The server did not answer. If your question does not appear above, send it again.', err.status);
    return '';
  }
}

// ---- what can be done with a message

log.addEventListener('click', (e) => {
  const button = e.target.closest('button');
  const m = byId.get(button?.closest('article')?.dataset.id);
  if (!m) return;
  if (button.matches('.copy-code')) copy(button, button.closest('.code').querySelector('code').textContent);
  if (button.matches('.copy-message')) copy(button, m.text);
  if (button.matches('.again')) {
    const before = messages.slice(0, messages.indexOf(m)).findLast((q) => q.role === 'user');
    if (before) question(before.text);
    else complain('The question is not there any more.');
  }
});

// ---- stopping

let stopping = false;

function offerStop(offered) {
  // A button that disappears would take the focus with it.
  if (!offered && document.activeElement === stop) (ask.disabled ? scroll : ask).focus();
  stop.hidden = !offered;
}

stop.addEventListener('click', cancel);

ask.addEventListener('keydown', (e) => {
  // Escape may also belong to an input method, like Enter.
  if (e.key === 'Escape' && !e.isComposing && e.keyCode !== 229) cancel();
});

// One button stops everything. A user who presses it also wants to stop a message that begins at
// that moment, or one that this tab does not know yet. A list of the visible messages would be out
// of date by then, and the server could refuse a part of it. The page shows that a message was
// stopped when the log says so.
async function cancel() {
  if (stop.hidden || stopping) return;
  stopping = true;
  stop.ariaDisabled = 'true'; // not `disabled`, as above
  complain('');
  try {
    await follower.stop();
    if (follower.state === 'disconnected') reconnect(); // to the log, which has the result
  } catch (err) {
    // 404 and 409 mean that nothing is left to stop, which is the user's goal.
    if (!err.status) complain('The server did not answer. If more is said, press Stop again.');
    else if (err.status !== 404 && err.status !== 409) complain(err.message, err.status);
  } finally {
    stopping = false;
    stop.ariaDisabled = null;
  }
}

// Returns the text of an application/problem+json (RFC 9457).
async function reasonOf(response) {
  const problem = await response.json().catch(() => ({}));
  return problem.detail || problem.title || `The server answered with status ${response.status}.`;
}

function complain(text, status = 0) {
  set($('problem'), text);
  $('problem').hidden = !text;
  forbidden = status === 403;
  draw();
}

$('copy').addEventListener('click', () => copy($('copy'), location.href));

async function copy(button, text) {
  button.dataset.label ??= button.textContent;
  let done = 'Copied';
  try {
    await navigator.clipboard.writeText(text);
  } catch { // the clipboard exists only in a secure context
    const area = element('textarea', { value: text, readOnly: true, className: 'unseen' });
    button.after(area);
    area.select();
    if (!document.execCommand('copy')) done = 'Not allowed';
    area.remove();
    button.focus();
  }
  button.textContent = done;
  set($('said'), done);
  setTimeout(() => { button.textContent = button.dataset.label; }, 1500);
}

// ---- for tests, and for curious users with an open console

window.gapless = Object.freeze({
  get state() { return follower.state; },
  get epoch() { return follower.epoch; },
  get node() { return follower.node; },
  get connection() { return follower.connection; },
  get leading() { return follower.leading; },
  get seq() { return follower.seq; },
  get gaps() { return follower.gaps; },
  get doubles() { return follower.doubles; },
  get resets() { return follower.resets; },
  get reconnects() { return follower.reconnects; },
  get counts() { return { ...plot.counts }; },
  get naive() { return { state: naive.state, missing: naive.missing, lost: [...naive.everLost] }; },
  get messages() { return messages.map(({ id, role, text, status }) => ({ id, role, text, status })); },
  text: (id) => byId.get(id)?.text,
  thought: (id) => byId.get(id)?.thought,
});
