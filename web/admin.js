// The page for administrators: the sessions in pages, and the figures of the node that answers. It shows nothing of
// what people say.

const $ = (id) => document.getElementById(id);

let token = '';    // kept only in this variable
let prefix = '';
let pages = [''];  // the cursor of each page up to the one that is shown
let next = '';     // the cursor of the page after it
let turn = 0;      // only the latest call of load draws

function element(name, text, properties = {}) {
  return Object.assign(document.createElement(name), properties, { textContent: text });
}

// Throws { status, text } if the server refuses, or does not answer.
async function get(path, read) {
  try {
    const response = await fetch(path, { cache: 'no-store', headers: token ? { Authorization: `Bearer ${token}` } : {} });
    if (response.ok) return await read(response);
    const { detail, title } = await response.json().catch(() => ({}));
    throw { status: response.status, text: detail || title || `The server answered with status ${response.status}.` };
  } catch (err) {
    throw 'status' in err ? err : { status: 0, text: 'check the connection, then refresh' };
  }
}

// The sessions and the figures fail apart: while Redis is away, the node still has figures.
async function load() {
  const mine = ++turn;
  const query = new URLSearchParams({ limit: '50', prefix, after: pages.at(-1) });
  $('admin').ariaBusy = 'true';
  const [sessions, metrics] = await Promise.allSettled([
    get(`/v1/sessions?${query}`, (r) => r.json()),
    get('/metrics', (r) => r.text()),
  ]);
  if (mine !== turn) return;
  $('admin').ariaBusy = null;
  const refusal = [sessions, metrics].map((r) => r.reason).filter(Boolean).sort((a, b) => isAccess(b) - isAccess(a))[0];
  refuse(refusal);
  const locked = refusal && isAccess(refusal);
  $('node').hidden = locked || !metrics.value;
  $('list').hidden = locked || !sessions.value && refusal.status !== 400; // a prefix can be corrected
  $('rows').replaceChildren();
  if (!locked && metrics.value) drawFigures(metrics.value);
  if (!locked && sessions.value) drawSessions(sessions.value);
  $('back').disabled = pages.length === 1;
  $('next').disabled = !next || !sessions.value;
  $('as-of').textContent = locked ? '' : `As of ${new Date().toLocaleTimeString()}.`;
}

const isAccess = ({ status }) => status === 401 || status === 403;

const titles = { 0: 'The server did not answer', 400: 'These sessions cannot be listed', 401: 'A token is needed', 403: 'This page is not open to you' };

// Says why something is missing, and what can be done about it.
function refuse(refusal) {
  $('refused').hidden = !refusal;
  if (!refusal) return;
  const rejected = refusal.status === 401 && token;
  $('refused-title').textContent = rejected ? 'The token was not accepted' : titles[refusal.status] ?? 'Not everything could be read (refresh to try again)';
  $('refused-text').textContent = refusal.status === 401 && !token ? 'this server shows its sessions to administrators only' : refusal.text;
  $('login').hidden = !isAccess(refusal);
  if (isAccess(refusal)) $('token').focus();
}

// Returns the series of a metric in Prometheus' text format, as [labels, value].
function series(text, name) {
  return [...text.matchAll(new RegExp(`^${name}(?:\\{(.*)\\})? (\\S+)`, 'gm'))].map(([, labels, value]) => [labels ?? '', Number(value)]);
}

function drawFigures(text) {
  const one = (name) => series(text, name)[0]?.[1].toLocaleString() ?? '–';
  const started = series(text, 'process_start_time_seconds')[0]?.[1];
  const figures = [
    ['Viewers', one('gapless_viewers')], ['Feeds', one('gapless_feeds')], ['Lag of the slowest viewer, in chunks', one('gapless_slowest_viewer_lag_chunks')],
    ['Gaps found', one('gapless_gaps_found_total')], ['Gaps repaired', one('gapless_gaps_repaired_total')],
    ...series(text, 'gapless_resets_total').map(([labels, value]) => [`Resets: ${/reason="(.*?)"/.exec(labels)?.[1]}`, value.toLocaleString()]),
    ['Started', started ? new Date(started * 1000).toLocaleString() : '–'],
  ];
  $('figures').replaceChildren(...figures.map(([name, value]) => {
    const row = document.createElement('div');
    row.append(element('dt', name), element('dd', value));
    return row;
  }));
}

function drawSessions(page) {
  next = page.next_after ?? '';
  for (const s of page.sessions) {
    const row = $('rows').insertRow();
    const changed = document.createElement('td');
    changed.append(element('time', new Date(s.updated_at).toLocaleString(), { dateTime: s.updated_at }));
    row.append(element('th', s.id, { scope: 'row' }), element('td', s.viewers.toLocaleString()), element('td', s.last_seq.toLocaleString()), element('td', s.ended ? 'yes' : 'no'), changed);
  }
  if (!page.sessions.length) $('rows').insertRow().append(element('td', prefix ? 'No session begins with this.' : 'There are no sessions.', { colSpan: 5 }));
}

function on(id, event, act) {
  $(id).addEventListener(event, (e) => {
    e.preventDefault();
    act();
    load();
  });
}

on('refresh', 'click', () => {});
on('next', 'click', () => {
  if (next) pages.push(next);
  next = ''; // a second press before the page is here goes no further
});
on('back', 'click', () => {
  if (pages.length > 1) pages.pop();
});
on('filter', 'submit', () => {
  prefix = $('prefix').value.trim();
  pages = [''];
});
on('login', 'submit', () => {
  token = $('token').value.trim();
  $('token').value = '';
});
load();
