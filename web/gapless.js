// The JavaScript client: follow a session's log, in a browser or in Node, and believe
// nothing but its numbers.
//
// A follower is a cursor over the log. Whatever brings chunks (the browser's EventSource,
// fetch where headers are needed, another tab), one rule says what is taken: the chunk
// whose number is the cursor's next. One that came already is dropped; where some are
// missing, the log is asked again from the last good number on. So no source has to be
// trusted, and two of them may be open at once.
//
// The log has ended when the server says 204 to our cursor, and names our log. A chunk of type `end` may be a
// copy: it only has us ask at once when its response ends.
//
// The tabs of an origin that follow the same URL share one connection. A Web Lock says which
// of them leads; it tells the others, by a BroadcastChannel, what it took in. That is only a
// hint: a tab that joins, or that a hint shows to be behind, opens the stream itself from its
// own cursor, and closes it when it has caught up. When the leading tab goes away the lock
// goes to the next one, which opens the stream from its own cursor: nothing is handed over.
//
// Not promised: that a chunk is shown in two tabs at the same time; that a dead connection
// is noticed at once (heartbeats are hidden by EventSource, so it takes `silence`, or the
// tab's coming back); `?format=raw` and `?until=`, which are for others.

/**
 * @typedef {'connecting' | 'catching up' | 'live' | 'waiting to reconnect' | 'disconnected' | 'ended'} State
 *   disconnected: refused for good (4xx); `restart()` begins again
 * @typedef {'trimmed' | 'ahead' | 'epoch' | 'unknown' | 'deleted' | 'restart'} ResetReason
 * @typedef {'ended' | 'deleted'} EndReason
 * @typedef {{
 *   type: string, seq?: number, ts?: number, message_id?: string, role?: string, content?: string,
 *   [member: string]: unknown,
 * }} Chunk a chunk of the log, as openapi.yaml describes it; `seq` and `ts` are there unless a program
 *   pushed it into Redis itself
 * @typedef {{ source: 'history' | 'live' | 'repaired' }} Info
 *   history: it was in the log when following began; live: it came since; repaired: it was missed, and asked for again
 * @typedef {{
 *   message_id?: string, role: string, content: string, done: boolean, reason?: string,
 *   reasoning?: string, reasoning_ms?: number,
 *   status: 'streaming' | 'done' | 'failed' | 'cancelled', first_seq: number, last_seq: number, chunks?: Chunk[],
 * }} Message
 * @typedef {{ type: 'snapshot', epoch: string, first_seq: number, last_seq: number, ended: boolean, messages: Message[] }} Snapshot
 *   all that the log holds up to `last_seq`, as messages
 * @typedef {{
 *   type?: string, title?: string, status?: number, detail?: string, code?: string, [member: string]: unknown,
 * }} Problem (RFC 9457)
 */

/**
 * What to call, always in the order of the log, and how to connect. A handler that throws is
 * reported, and changes nothing.
 *
 * @typedef {object} Options
 * @property {(chunk: Chunk, seq: number, info: Info) => void} [onChunk] the next chunk
 * @property {(snapshot: Snapshot) => void} [onSnapshot] if given, what is there already comes as one
 *   snapshot, which replaces all that was given before
 * @property {(reason: ResetReason) => void} [onReset] forget every chunk; another first one follows
 * @property {(from: number, to: number) => void} [onHole] chunks that the stream left out, and again when
 *   asked for them: they are passed over
 * @property {(state: State, follower: Follower) => void} [onState] the state, or one of the numbers, is another
 * @property {(reason: EndReason) => void} [onEnd] nothing follows; once
 * @property {() => Promise<string> | string} [ticket] a ticket for the stream, '' for none; when it throws or is rejected,
 *   we are disconnected. With a ticket each tab has its own connection
 * @property {Record<string, string> | (() => Promise<Record<string, string>> | Record<string, string>)} [headers]
 *   for each request, which then is made by fetch. Only tabs with equal ones share a connection
 * @property {number} [after] the chunk to begin behind; 0 is the start
 * @property {boolean} [shared] false: a connection of this tab's own
 * @property {number} [silence] how long nothing may come, in ms, before we look whether the connection is alive:
 *   two and a half of the server's heartbeats; Infinity: we do not look
 * @property {typeof globalThis.fetch} [fetch] instead of the global one
 * @property {new (url: string) => Pick<EventSource, 'addEventListener' | 'readyState' | 'close'>} [EventSource]
 *   instead of the global one; where there is none, fetch is used
 */

/**
 * Follows a session's stream.
 *
 * @param {string | URL} url of the stream, `…/v1/sessions/{id}/stream`; relative to the document, or to the worker's script
 * @param {Options} [options]
 * @returns {Follower}
 * @throws {TypeError} when `after`, or a parameter of the URL, cannot be followed
 */
export function follow(url, options = {}) {
  return new Follower(url, options);
}

const SILENCE = 37_500; // two and a half heartbeats of 15 s, the server's default
const LOOK = 10_000;    // how long the answer to a look may take, ms
const GRACE = 1_000;    // how long a chunk may be on its way that a look has seen, ms
const LONGEST = 2 ** 31 - 1; // of a timer, ms: with more it fires at once
const SIGN = 3_000;     // how long a leading tab may take to give a sign of life, ms

/**
 * @typedef {object} Hint what a leading tab tells the others
 * @property {'who' | 'alive'} [asks] a question instead: who leads, and is the connection alive?
 * @property {string} [deleted] the epoch that was deleted
 * @property {ResetReason} [reset] why everything up to here is to be forgotten
 * @property {string} epoch
 * @property {number} seq the leading tab's cursor
 * @property {State} state
 * @property {string} node
 * @property {string} connection
 * @property {string} [data] the text of chunk `seq`
 * @property {Info['source']} [source]
 */

export class Follower {
  /** @type {State} */
  state = 'connecting';
  /** Which incarnation of the log this is; '' while that is not known. */
  epoch = '';
  /** The cursor: the number of the last chunk that was given to a handler. */
  seq = 0;
  /** The node that serves the connection. */
  node = '';
  /** The connection's id, as the server's log has it. */
  connection = '';
  /** How often this tab's connection left chunks out. */
  gaps = 0;
  /** How many chunks came to this tab's connection again. */
  doubles = 0;
  /** How often everything had to be forgotten. */
  resets = 0;
  reconnects = 0;
  /** Whether this tab holds the connection. */
  leading = false;

  #url;                // the stream's, without what we add
  #session;            // the session's URL
  #name = '';          // of the lock and of the channel
  #options;
  /** @type {AbortController | undefined} */
  #life = new AbortController(); // ends with close() or the log: listeners and the timer
  /** @type {AbortController | undefined} */
  #turn;               // ends when we give up our place: the lock, or the wait for it
  /** @type {BroadcastChannel | undefined} */
  #channel;
  /** @type {{ close(): void } | undefined} */
  #source;
  #opening = 0;        // the newest attempt to open; what older ones still wait for is over
  #ticket = '';        // that this connection was opened with
  #proven = true;      // false: this ticket has not let us in yet
  #welcomes = 0;
  #refusals = 0;       // since we were last welcomed
  #welcomed = false;   // this connection was
  #unsure = false;     // whether the log has ended, or why we were refused: a status says it, which an EventSource hides
  #last = 0;           // how far the log went when we were welcomed: from there on we are live
  #known = 0;          // how far it goes, says the leading tab
  /** @type {State} */
  #theirs = 'live';    // the leading tab's state
  #fresh = true;       // false: from here on, what is behind #last was missed
  /** @type {Info['source']} */
  #late = 'history';
  #repaired = -1;      // the number behind which we already asked for missing chunks: what is left out again is a hole
  #given = 0;          // the last number that this connection gave
  #learned = 0;        // the opening for which we asked for the epoch
  #looking = -1;       // the opening whose connection is being looked at
  #heard = 0;          // when something last came, from the connection if there is one
  #signs = 0;          // how many hints came
  #restarting = false;
  #tried = '';         // the leading tab's connection that made us try again

  /**
   * @param {string | URL} url
   * @param {Options} options
   */
  constructor(url, options) {
    this.#options = options;
    this.#url = new URL(url, base());
    this.#session = this.#url.origin + this.#url.pathname.replace(/\/stream$/, '');
    this.#url.hash = '';
    const { searchParams: query } = this.#url;
    for (const name of ['lastEventId', 'format', 'until']) {
      if (query.has(name)) throw new TypeError(`${name} is in the URL, and what it asks for cannot be followed: take it out`);
    }
    this.seq = options.after ?? Number(query.get('after'));
    if (!Number.isSafeInteger(this.seq) || this.seq < 0) {
      throw new TypeError(`after is ${options.after ?? query.get('after')}, and not a chunk's number: make it a whole number, 0 for the start, or leave it out`);
    }
    for (const name of ['after', 'snapshot', 'ticket']) query.delete(name);
    queueMicrotask(() => { if (this.#life) this.#begin(this.#life); }); // a handler may use what follow() returns
  }

  /** Ends following; no handler is called any more. */
  close() {
    this.#end();
    this.state = 'disconnected';
  }

  /** Starts again from the first chunk, wherever it began, also after the end. */
  restart() {
    if (this.#restarting) return; // by its own onReset
    const opening = this.#opening;
    this.#restarting = true;
    this.#forget('restart');
    this.#restarting = false;
    if (opening !== this.#opening) return; // it has closed us
    if (!this.#life) this.#begin(this.#life = new AbortController());
    else if (!this.#turn) this.#join();
    else this.#open();
  }

  /**
   * Asks the model: POST …/messages.
   *
   * @param {string} content
   * @returns {Promise<{ message_id: string, reply_message_id: string }>}
   * @throws {ProblemError} when it is refused
   */
  ask(content) {
    return this.#call('/messages', { content });
  }

  /**
   * Stops a message, or every unfinished one: POST …/cancel.
   *
   * @param {string} [messageId]
   * @returns {Promise<Record<string, unknown>>}
   * @throws {ProblemError} when it is refused; 404 and 409: nothing was left to stop
   */
  stop(messageId) {
    return this.#call('/cancel', messageId === undefined ? {} : { message_id: messageId });
  }

  // ---- a life: from the beginning to the end, with pauses while the page is put away

  /** @param {AbortController} life */
  #begin({ signal }) {
    /** @type {(target: EventTarget | undefined, name: string, what: (e: Event) => void) => void} */
    const on = (target, name, what) => target?.addEventListener?.(name, what, { signal });
    const { document } = globalThis;
    on(globalThis, 'online', () => this.#online());
    on(globalThis, 'pagehide', () => this.#part());
    on(globalThis, 'pageshow', () => this.#return());
    on(document, 'freeze', () => this.#part());
    on(document, 'resume', () => this.#return());
    on(document, 'visibilitychange', () => { if (document.visibilityState === 'visible') this.#look(); });
    const silence = this.#silence();
    const timer = silence < Infinity && setInterval(() => {
      // Without a connection we hear the leading tab, which looks first and then gives a sign.
      if (Date.now() - this.#heard >= (this.#source ? silence : 1.5 * silence)) this.#look(true);
    }, silence / 4);
    signal.addEventListener('abort', () => { if (timer) clearInterval(timer); });
    this.#join();
  }

  #end() {
    this.#part();
    this.#life?.abort();
    this.#life = undefined;
  }

  /** @param {EndReason} reason */
  #finish(reason) {
    this.state = 'ended';
    if (reason === 'ended') this.#post(); // to the tabs that have all of it, too
    this.#end();
    this.#tell('onState', this.state, this);
    this.#tell('onEnd', reason);
  }

  // A page that is put away, and may come back, must not hold the lead.
  #part() {
    this.#yield();
    this.#channel?.close();
    this.#channel = undefined;
  }

  #return() {
    if (!this.#turn && this.state !== 'disconnected') this.#join();
  }

  // Gives up our place, but goes on to listen.
  #yield() {
    this.#opening++;
    this.#source?.close();
    this.#source = undefined;
    this.#turn?.abort();
    this.#turn = undefined;
    this.leading = false;
  }

  #disconnect() {
    this.#yield();
    this.#enter('disconnected');
  }

  #online() {
    // It may have been a network that lets nobody in.
    if (this.state === 'disconnected') return this.#join();
    if (this.state === 'waiting to reconnect' && this.leading) return this.#open();
    this.#look();
  }

  // ---- one connection for all tabs

  async #join() {
    this.#part();
    const turn = this.#turn = new AbortController();
    this.#heard = Date.now();
    this.#enter('connecting');
    if (turn.signal.aborted) return; // by a handler, as below
    const { ticket, shared = true } = this.#options;
    if (!shared || !globalThis.navigator?.locks || !globalThis.BroadcastChannel) return this.#lead();
    try {
      // A ticket says nothing about who else may see what it opens.
      const mine = ticket ? await ticket() : '';
      const scope = await this.#scope();
      if (turn.signal.aborted) return;
      if (mine) return this.#lead(mine);
      this.#name = `gapless 2 ${scope} ${this.#url}`; // 2: what hints are like
    } catch {
      if (!turn.signal.aborted) this.#disconnect();
      return;
    }
    const channel = this.#channel = new BroadcastChannel(this.#name);
    channel.onmessage = (e) => { if (channel === this.#channel) this.#hint(e.data); };
    this.#request(turn, { ifAvailable: true });
  }

  // Tabs with other headers are other people's.
  async #scope() {
    const headers = Object.entries(await this.#headers());
    if (headers.length === 0) return '';
    const text = new TextEncoder().encode(JSON.stringify(headers.sort()));
    return Array.from(new Uint8Array(await crypto.subtle.digest('SHA-256', text)), (b) => b.toString(16)).join('.');
  }

  /**
   * @param {AbortController} turn
   * @param {LockOptions} how
   */
  #request(turn, how) {
    const { signal } = turn;
    navigator.locks.request(this.#name, how, (lock) => {
      if (signal.aborted) return undefined;
      if (lock) {
        this.#lead();
        return new Promise((release) => { signal.addEventListener('abort', release); });
      }
      if (!this.#source) this.#open();
      this.#channel?.postMessage({ asks: 'who' });
      this.#request(turn, { signal });
      return undefined;
    }).catch(() => {
      if (signal.aborted) return;
      if (this.leading) this.#join(); // another tab has taken the lead
      else this.#lead();              // there are no locks where cookies are forbidden
    });
  }

  /** @param {string} [ticket] */
  #lead(ticket) {
    this.leading = true;
    this.#welcomes = 0;
    if (this.#source) { // it was opened to catch up, and stays
      this.#welcomes = Number(this.#welcomed);
      this.#enter(this.state);
    } else if (ticket) {
      this.#connect(ticket);
    } else {
      this.#open();
    }
  }

  /** @param {Hint} hint */
  #hint(hint) {
    if (hint.asks) {
      this.#post();
      if (hint.asks === 'alive' && this.leading) this.#look();
      return;
    }
    if (this.leading) return; // two may lead for a moment
    if (!this.#source) this.#heard = Date.now();
    this.#signs++;
    if (hint.deleted !== undefined) {
      if (!this.epoch || hint.deleted === this.epoch) this.#deleted();
      return;
    }
    if (hint.state === 'ended') { // a tab that lacks something has the lead next, and asks for itself
      if (hint.epoch === this.epoch && hint.seq === this.seq) this.#finish('ended');
      return;
    }
    if (this.state === 'disconnected') {
      // Somebody is let in; we are told so with each chunk, and try once.
      if (hint.state !== 'live' || hint.connection === this.#tried) return;
      this.#tried = hint.connection;
      this.#join();
      return;
    }
    this.node = hint.node;
    this.connection = hint.connection;
    this.#theirs = hint.state === 'catching up' ? 'live' : hint.state;
    this.#known = hint.seq;
    const { data } = hint;
    if (hint.reset && (hint.epoch === '' || hint.epoch !== this.epoch) && (this.epoch !== '' || this.seq > 0)) {
      const opening = this.#opening;
      this.#forget(hint.reset);
      if (opening !== this.#opening) return;
      if (this.#source) return this.#open();
    }
    // Equal numbers mean equal chunks in one log only. Where neither tab knows which log it has, it
    // is the same one, since resets are told.
    if (!this.epoch && (hint.seq === this.seq || this.seq === 0 && hint.seq === 1)) this.epoch = hint.epoch;
    const ours = hint.epoch === this.epoch;
    if (ours && data !== undefined && hint.seq === this.seq + 1) return this.#take(hint.seq, data, hint.source ?? 'live');
    if (!this.#source && (hint.epoch !== '' && !ours || hint.seq > this.seq)) return this.#open();
    this.#settle();
  }

  // A tab that does not lead has no connection once it has caught up.
  #settle() {
    if (this.leading || !this.#source) return this.#enter(this.leading ? this.#progress() : this.#theirs);
    if (!this.#welcomed) return this.#tell('onState', this.state, this);
    if (this.seq < Math.max(this.#last, this.#known)) return this.#enter('catching up');
    this.#opening++;
    this.#source.close();
    this.#source = undefined;
    this.#enter(this.#theirs);
  }

  #progress() {
    return this.seq < this.#last ? 'catching up' : 'live';
  }

  /** @param {State} state */
  #enter(state) {
    this.state = state;
    this.#post();
    this.#tell('onState', state, this);
  }

  /** @param {Partial<Hint>} [more] */
  #post(more) {
    if (!this.leading) return;
    const { epoch, seq, state, node, connection } = this;
    this.#channel?.postMessage({ epoch, seq, state, node, connection, ...more });
  }

  // ---- is the connection alive?

  #silence() {
    const { silence = SILENCE } = this.#options;
    return silence < Infinity ? Math.min(silence, LONGEST) : Infinity;
  }

  /** @param {boolean} [silent] whether nothing came for a long time */
  async #look(silent = false) {
    const turn = this.#turn;
    if (!turn || !this.leading && !this.#channel) return;
    this.#heard = Date.now();
    if (!this.leading) {
      if (this.#source && silent) return this.#open();
      const signs = this.#signs;
      this.#channel?.postMessage({ asks: 'alive' });
      await pause(SIGN);
      if (turn.signal.aborted || this.leading || this.#signs > signs) return;
      turn.abort(); // out of the queue
      const next = this.#turn = new AbortController();
      return this.#request(next, { steal: true }); // it is frozen, or worse
    }
    if (this.state !== 'live' && this.state !== 'catching up') return silent ? this.#open() : undefined;
    const opening = this.#opening;
    if (this.#looking === opening) return;
    this.#looking = opening;
    const { seq } = this;
    const behind = await this.#behind();
    if (opening !== this.#opening) return;
    this.#looking = -1;
    if (!behind) return this.#post(); // a sign of life
    await pause(GRACE);
    if (opening === this.#opening && seq === this.seq) this.#open();
  }

  async #behind() {
    const opening = this.#opening;
    try {
      const session = await this.#describe();
      if (opening !== this.#opening) return false;
      if (typeof session === 'number') {
        if (session === 404) return this.epoch !== '';
        return this.#ticket !== '' && (session === 401 || session === 403); // then we may not look
      }
      this.epoch ||= session.epoch;
      return session.epoch !== this.epoch || session.last_seq > this.seq || session.ended;
    } catch {
      return true; // not even this is answered
    }
  }

  /** @returns {Promise<{ epoch: string, last_seq: number, ended: boolean } | number>} the session, or the status */
  async #describe() {
    const response = await this.#fetch(this.#session, { headers: await this.#headers(), cache: 'no-store', signal: AbortSignal.timeout(LOOK) });
    return response.ok ? response.json() : response.status;
  }

  // ---- the connection

  // A new source, since the old one would go on with the cursor that it keeps. When it
  // reconnects later, its Last-Event-ID counts, not `after`.
  #open() {
    this.#source?.close();
    this.#source = undefined;
    const opening = ++this.#opening;
    this.#enter('connecting');
    if (opening !== this.#opening) return;
    const { ticket } = this.#options;
    if (!ticket) return this.#connect('');
    (async () => ticket())().then(
      (ticket) => { if (opening === this.#opening) this.#connect(ticket); },
      () => { if (opening === this.#opening) this.#disconnect(); },
    );
  }

  /** @param {string} ticket */
  #connect(ticket) {
    const url = new URL(this.#url);
    if (this.seq > 0) url.searchParams.set('after', String(this.seq));
    if (this.#options.onSnapshot) url.searchParams.set('snapshot', '1');
    if (ticket) url.searchParams.set('ticket', ticket);
    this.#ticket = ticket;
    this.#proven = !ticket;
    this.#welcomed = false;
    this.#given = this.seq;
    this.#heard = Date.now();
    const opening = this.#opening;
    /** @type {Listener} */
    const on = {
      opened: () => { if (opening === this.#opening) this.#enter('connecting'); }, // a node whose Redis is away holds us without a welcome
      event: (name, id, data) => { if (opening === this.#opening) this.#event(name, id, data); },
      broken: (refusal) => {
        if (opening !== this.#opening) return;
        if (refusal) return this.#refused(refusal);
        this.#unsure ||= refusal === null;
        if (refusal === null || this.#unsure && this.#welcomed) return this.#open();
        this.#enter('waiting to reconnect');
      },
    };
    const { EventSource = globalThis.EventSource, headers } = this.#options;
    const mine = () => this.#headers().catch((err) => {
      if (opening === this.#opening) this.#disconnect();
      throw err;
    });
    this.#source = EventSource && !headers && !this.#unsure ? listen(new EventSource(url.href), on)
      : read(url.href, (url, init) => this.#fetch(url, init), mine, this.#silence(), on);
  }

  // What was answered instead of a stream. Where that is neither an end nor for us to mend, it was a proxy whose node is
  // away, or a limit: then we try again, those who were refused together not all at once.
  /** @param {Response} response */
  #refused({ status, headers }) {
    if (status === 204) {
      if (headers.get('Gapless-Reason') === 'deleted') return this.#deleted();
      const epoch = headers.get('Gapless-Epoch');
      if (this.epoch && epoch && epoch !== this.epoch) return this.#replaced(epoch);
      this.epoch ||= epoch ?? '';
      return this.#finish('ended');
    }
    if (status >= 400 && status < 500 && status !== 429) {
      // A ticket that has let us in is spent when we were away for too long: another one will do.
      return this.#ticket && this.#proven ? this.#open() : this.#disconnect();
    }
    const wait = Math.min(1000 * 2 ** this.#refusals++, 15_000) * (1 + Math.random());
    const timer = setTimeout(() => this.#open(), Math.max(wait, 1000 * Number(headers.get('Retry-After')) || 0));
    this.#source = { close: () => clearTimeout(timer) };
    this.#enter('waiting to reconnect');
  }

  // ---- what the stream says

  /**
   * @param {string} name
   * @param {string} id
   * @param {string} data
   */
  #event(name, id, data) {
    this.#heard = Date.now();
    switch (name) {
      case 'message': return this.#chunk(Number(id), data);
      // WebKit puts the rest of an event that was cut off in front of the next response.
      case 'welcome': return this.#welcome(JSON.parse(data.slice(data.lastIndexOf('\n') + 1)));
      case 'reset': return this.#reset(Number(id), JSON.parse(data));
      case 'snapshot': return this.#snapshot(Number(id), JSON.parse(data));
      case 'expired': return this.#open(); // the token may be newer by now
    }
  }

  /** @param {{ epoch: string, first_seq: number, last_seq: number, cursor: number, node: string, connection: string }} welcome */
  #welcome(welcome) {
    this.node = welcome.node;
    this.connection = welcome.connection;
    this.#proven = this.#welcomed = true;
    this.#unsure = false;
    this.#refusals = 0;
    if (this.leading && this.#welcomes++ > 0) this.reconnects++;
    // The same numbers may mean other chunks now. A session without chunks has no epoch.
    if (this.epoch && welcome.epoch && welcome.epoch !== this.epoch) {
      const inside = welcome.cursor >= welcome.first_seq - 1 && welcome.cursor <= welcome.last_seq;
      return inside ? this.#replaced(welcome.epoch) : undefined; // else a reset follows
    }
    this.epoch = welcome.epoch || this.epoch;
    this.#last = welcome.last_seq;
    this.#late = this.#fresh ? 'history' : 'repaired';
    this.#fresh = false;
    // A cursor ahead of ours is a gap already, before a chunk shows it.
    if (welcome.cursor > this.seq) {
      if (!this.#closesGap(welcome.cursor)) return;
      this.seq = welcome.cursor;
    }
    this.#settle();
  }

  /** @param {string} epoch of the log that we do not have */
  #replaced(epoch) {
    const opening = this.#opening;
    this.#forget('epoch', epoch);
    if (opening === this.#opening) this.#open();
  }

  /**
   * @param {number} id
   * @param {{ reason: ResetReason, epoch?: string, last_seq: number }} reset
   */
  #reset(id, reset) {
    if (reset.reason === 'deleted') return this.#deleted();
    const opening = this.#opening;
    // Who has begun anew already has nothing to forget: only the cursor goes to where this log begins.
    if (this.seq === 0 && this.resets > 0 && reset.epoch && reset.epoch === this.epoch) this.seq = id;
    // Its data has the cursor that we came with. Without an epoch, the next welcome tells.
    else this.#forget(reset.reason, reset.epoch ?? (reset.reason === 'trimmed' ? this.epoch : ''), id);
    if (opening !== this.#opening) return;
    this.#given = id;
    this.#last = reset.last_seq;
    this.#late = 'history';
    this.#fresh = false;
    this.#settle();
  }

  #deleted() {
    const opening = this.#opening;
    if (this.leading) this.#channel?.postMessage({ deleted: this.epoch });
    this.#forget('deleted');
    if (opening === this.#opening) this.#finish('deleted');
  }

  /**
   * @param {number} id
   * @param {Snapshot} snapshot
   */
  #snapshot(id, snapshot) {
    const opening = this.#opening;
    this.seq = this.#given = id;
    this.epoch = snapshot.epoch;
    this.#repaired = -1;
    this.#unsure = snapshot.ended;
    this.#tell('onSnapshot', snapshot);
    if (opening === this.#opening) this.#settle();
  }

  /**
   * @param {number} seq
   * @param {string} data
   */
  #chunk(seq, data) {
    if (!(seq > this.#given)) this.doubles++; // else a hint was faster
    else this.#given = seq;
    if (!(seq > this.seq)) return this.#settle();
    if (seq > this.seq + 1 && !this.#closesGap(seq - 1)) return;
    this.#take(seq, data, seq <= this.#last ? this.#late : 'live');
  }

  /**
   * @param {number} seq
   * @param {string} data
   * @param {Info['source']} source
   */
  #take(seq, data, source) {
    const opening = this.#opening;
    this.seq = seq;
    if (this.leading) {
      this.state = this.#progress();
      this.#post({ data, source });
    }
    const chunk = parse(data);
    this.#unsure = chunk.type === 'end';
    this.#tell('onChunk', chunk, seq, { source });
    if (opening !== this.#opening) return; // it has closed or restarted us
    if (!this.epoch && this.leading) this.#learn();
    if (this.leading) this.#tell('onState', this.state, this);
    else this.#settle();
  }

  // A session has no epoch before its first chunk, and that one does not tell it.
  #learn() {
    const opening = this.#opening;
    if (this.#learned === opening) return;
    this.#learned = opening;
    const { resets } = this;
    this.#describe().then((session) => {
      if (typeof session === 'number' || opening !== this.#opening || resets !== this.resets || this.epoch) return;
      this.epoch = session.epoch;
      this.#enter(this.state);
    }, () => {}); // the next welcome tells
  }

  /**
   * Asks for what is missing up to `to`, but only once: a log that really lacks it must not
   * make us ask for ever. What the stream leaves out twice in a row is told as a hole, and passed
   * over: also where the log has it and only the stream does not. Says whether to go on without.
   *
   * @param {number} to
   */
  #closesGap(to) {
    const opening = this.#opening;
    if (this.#repaired === this.seq) {
      this.#tell('onHole', this.seq + 1, to);
      return opening === this.#opening;
    }
    this.gaps++;
    this.#repaired = this.seq;
    this.#open();
    return false;
  }

  /**
   * @param {ResetReason} reason
   * @param {string} [epoch] of the log that follows, where it is known
   * @param {number} [seq] the chunk behind which it follows
   */
  #forget(reason, epoch = '', seq = 0) {
    this.seq = seq;
    this.epoch = epoch;
    this.#last = this.#known = 0;
    this.#fresh = true;
    this.#unsure = false;
    this.#repaired = this.#learned = -1;
    if (reason !== 'restart') {
      this.resets++;
      if (reason !== 'deleted') this.#post({ reset: reason }); // which is told before, with its epoch
    }
    this.#tell('onReset', reason);
  }

  /**
   * @template {'onChunk' | 'onSnapshot' | 'onReset' | 'onHole' | 'onState' | 'onEnd'} Name
   * @param {Name} name
   * @param {Parameters<NonNullable<Options[Name]>>} args
   */
  #tell(name, ...args) {
    if (!this.#life && name !== 'onReset' && this.state !== 'ended') return;
    const handler = /** @type {((...args: unknown[]) => void) | undefined} */ (this.#options[name]);
    try {
      handler?.(...args);
    } catch (err) {
      if (typeof globalThis.reportError === 'function') reportError(err);
      else console.error(err);
    }
  }

  // ---- requests

  /**
   * @param {string} url
   * @param {RequestInit} init
   */
  #fetch(url, init) {
    const fetch = this.#options.fetch ?? globalThis.fetch;
    return fetch(url, init);
  }

  /** @returns {Promise<Record<string, string>>} */
  async #headers() {
    const { headers = {} } = this.#options;
    return typeof headers === 'function' ? headers() : headers;
  }

  /**
   * @param {string} path
   * @param {object} body
   */
  async #call(path, body) {
    const headers = { ...await this.#headers(), 'Content-Type': 'application/json' };
    const response = await this.#fetch(this.#session + path, { method: 'POST', headers, body: JSON.stringify(body) });
    if (response.ok) return response.json();
    throw new ProblemError(response.status, await response.json().catch(() => ({})));
  }
}

/** What a refused call is rejected with. Its message is for people. */
export class ProblemError extends Error {
  /**
   * @param {number} status of HTTP
   * @param {Problem} problem what the server says; {} where it was no server of ours
   */
  constructor(status, problem) {
    super(problem.detail || problem.title || `The server answered with status ${status}.`);
    this.name = 'ProblemError';
    this.status = status;
    this.problem = problem;
  }
}

/**
 * The server wraps what is no JSON object; this is for one that forgets to.
 *
 * @param {string} data
 * @returns {Chunk}
 */
function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk !== null && typeof chunk === 'object') return chunk;
  } catch {
    // Not JSON: text, then.
  }
  return { type: 'foreign', content: data };
}

/** What a relative URL is relative to: the document, or a worker's script. That of a blob is at no place, but has an origin. */
function base() {
  const { document, location } = globalThis;
  return document?.baseURI ?? (location?.protocol === 'blob:' ? location.origin : location?.href);
}

/** @param {number} ms */
function pause(ms) {
  return new Promise((next) => { setTimeout(next, ms); });
}

// ---- two ways to read a stream, both of which come back by themselves

/**
 * @typedef {object} Listener
 * @property {() => void} opened
 * @property {(name: string, id: string, data: string) => void} event
 * @property {(refusal?: Response | null) => void} broken it comes back by itself, unless it was refused: by this response,
 *   or, null, nobody knows by which
 */

/**
 * @param {Pick<EventSource, 'addEventListener' | 'readyState' | 'close'>} source
 * @param {Listener} on
 */
function listen(source, on) {
  for (const name of ['message', 'welcome', 'reset', 'snapshot', 'expired']) {
    source.addEventListener(name, (e) => {
      const { lastEventId, data } = /** @type {MessageEvent<string>} */ (e);
      on.event(name, lastEventId, data);
    });
  }
  source.addEventListener('open', () => on.opened());
  source.addEventListener('error', () => on.broken(source.readyState === 2 ? null : undefined)); // CLOSED
  return source;
}

/**
 * What an EventSource does, with headers. Unlike one, it tells how it was refused, and hears heartbeats: so it
 * notices a connection that died without a word.
 *
 * @param {string} url
 * @param {(url: string, init: RequestInit) => Promise<Response>} fetch
 * @param {() => Promise<Record<string, string>>} headers
 * @param {number} silence ms
 * @param {Listener} on
 */
function read(url, fetch, headers, silence, on) {
  let closed = false;
  let retry = 3000; // as browsers have it
  let failures = 0;
  let attempt = new AbortController();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const heard = () => {
    clearTimeout(timer);
    if (silence < Infinity) timer = setTimeout(() => attempt.abort(), silence);
  };
  const parser = makeParser((name, id, data) => {
    failures = 0;
    if (!closed) on.event(name, id, data);
  }, (ms) => { retry = ms; });

  // Says what was answered instead of a stream.
  const once = async () => {
    attempt = new AbortController();
    heard();
    /** @type {Record<string, string>} */
    const all = { ...await headers(), Accept: 'text/event-stream' };
    const cursor = parser.begin();
    if (cursor) all['Last-Event-ID'] = cursor;
    const response = await fetch(url, { headers: all, cache: 'no-store', signal: attempt.signal });
    const { status, body } = response;
    if (status !== 200 || !body || !response.headers.get('Content-Type')?.startsWith('text/event-stream')) return response;
    on.opened();
    const decoder = new TextDecoder();
    for (const reader = body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done || closed) return undefined;
      heard();
      parser.feed(decoder.decode(value, { stream: true }));
    }
  };

  (async () => {
    while (!closed) {
      let refusal;
      try {
        refusal = await once();
      } catch {
        // Broken off: from the cursor on, again.
      }
      clearTimeout(timer);
      attempt.abort(); // an answer that was not read
      if (closed) return;
      on.broken(refusal);
      if (refusal || closed) return;
      await new Promise((next) => { timer = setTimeout(next, Math.min(retry * 2 ** failures++, 30_000)); });
    }
  })();
  return {
    close() {
      closed = true;
      clearTimeout(timer);
      attempt.abort();
    },
  };
}

/**
 * Reads the format of https://html.spec.whatwg.org/multipage/server-sent-events.html.
 *
 * @param {(name: string, id: string, data: string) => void} event
 * @param {(ms: number) => void} retry
 */
function makeParser(event, retry) {
  let rest = '';   // a line that is not whole
  let cr = false;  // the last line ended by CR: an LF that follows belongs to it
  let name = '';
  let id = '';     // counts when its event is whole
  let cursor = '';
  /** @type {string[]} */
  let data = [];

  /** @param {string} line */
  const take = (line) => {
    if (line === '') {
      cursor = id;
      if (data.length > 0) event(name || 'message', id, data.join('\n'));
      name = '';
      data = [];
      return;
    }
    const colon = line.indexOf(':');
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? '' : line.slice(line[colon + 1] === ' ' ? colon + 2 : colon + 1);
    switch (field) {
      case 'event': name = value; break;
      case 'data': data.push(value); break;
      case 'id': if (!value.includes('\0')) id = value; break;
      case 'retry': if (/^\d+$/.test(value)) retry(Number(value)); break;
    }
  };

  return {
    /** Begins another response, and gives the cursor to ask for it with. */
    begin() {
      rest = name = '';
      cr = false;
      id = cursor;
      data = [];
      return cursor;
    },
    /** @param {string} text */
    feed(text) {
      const lines = (cr && text.startsWith('\n') ? text.slice(1) : text).split(/\r\n|\r|\n/);
      if (text !== '') cr = text.endsWith('\r');
      lines[0] = rest + lines[0];
      rest = lines.pop() ?? '';
      for (const line of lines) take(line);
    },
  };
}
