// The JavaScript client. It follows a session's log, in a browser or in Node, and relies only on
// the log's numbers.
//
// A follower is a cursor over the log. Chunks may come from the browser's EventSource, from fetch
// where headers are needed, or from another tab. One rule decides what is taken: the chunk whose
// number is the cursor's next. A chunk that came already is dropped. If chunks are missing, the log
// is read again from the last good number. So no source must be trusted, and two may be open at
// once.
//
// The log has ended when the server responds with 204 to our cursor, and names our log. A chunk of
// type `end` may be a copy: after one, we only ask at once when its response ends.
//
// The tabs of an origin that follow the same URL share one connection. A Web Lock decides which tab
// leads. The leading tab tells the others, by a BroadcastChannel, what it took. That is only a
// hint: a tab that joins, or that a hint shows to be late, opens the stream itself from its own
// cursor, and closes it when it has caught up. When the leading tab goes away, the lock passes to
// the next one, which opens the stream from its own cursor. Nothing is handed over.
//
// The client does not promise that a chunk is shown in two tabs at the same time. It does not
// notice a dead connection at once: EventSource hides heartbeats, so it takes `silence`, or until
// the tab is visible again. It does not support `?format=raw` and `?until=`, which are for other
// clients.

/**
 * @typedef {'connecting' | 'catching up' | 'live' | 'waiting to reconnect' | 'disconnected' | 'ended'} State
 *   disconnected: refused for good (4xx); `restart()` tries again
 * @typedef {'trimmed' | 'ahead' | 'epoch' | 'unknown' | 'deleted' | 'restart'} ResetReason
 * @typedef {'ended' | 'deleted'} EndReason
 * @typedef {{
 *   type: string, seq?: number, ts?: number, message_id?: string, role?: string, content?: string,
 *   [member: string]: unknown,
 * }} Chunk a chunk of the log, as openapi.yaml describes it; `seq` and `ts` are always set, except in chunks
 *   that a program pushed into Redis itself
 * @typedef {{ source: 'history' | 'live' | 'repaired' }} Info
 *   history: it was in the log when following began; live: it came later; repaired: it was missed, and read again
 * @typedef {{
 *   message_id?: string, role: string, content: string, done: boolean, reason?: string,
 *   reasoning?: string, reasoning_ms?: number,
 *   status: 'streaming' | 'done' | 'failed' | 'cancelled', first_seq: number, last_seq: number, chunks?: Chunk[],
 * }} Message
 * @typedef {{ type: 'snapshot', epoch: string, first_seq: number, last_seq: number, ended: boolean, messages: Message[] }} Snapshot
 *   the whole log up to `last_seq`, as messages
 * @typedef {{
 *   ok: boolean, complete: boolean, epoch: string, first_seq: number, last_seq: number, count: number,
 *   parts: { first_seq: number, last_seq: number, sha256: string }[],
 *   difference?: { first_seq: number, last_seq: number, detail: string },
 * }} Verified
 *   ok: the `count` chunks `first_seq` to `last_seq` are the server's, byte by byte; complete: and the log has ended with
 *   them. Chunks that came as a snapshot, or that are no longer kept, are not among them. difference: the first part that is not
 *   the server's
 * @typedef {{
 *   type?: string, title?: string, status?: number, detail?: string, code?: string, [member: string]: unknown,
 * }} Problem (RFC 9457)
 */

/**
 * Handlers, which are called in the order of the log, and settings of the connection. A handler
 * that throws is reported; following goes on.
 *
 * @typedef {object} Options
 * @property {(chunk: Chunk, seq: number, info: Info) => void} [onChunk] the next chunk
 * @property {(snapshot: Snapshot) => void} [onSnapshot] if given, the existing chunks come as one
 *   snapshot, which replaces everything given before
 * @property {(reason: ResetReason) => void} [onReset] discard every chunk; the log starts again at its first kept chunk
 * @property {(from: number, to: number) => void} [onHole] the stream omitted these chunks, even when they
 *   were requested again; they are skipped
 * @property {(state: State, follower: Follower) => void} [onState] the state has changed
 * @property {(follower: Follower) => void} [onProgress] the state, or something else that the follower knows, such as
 *   `seq`, may have changed; called after `onChunk` and `onState`
 * @property {(reason: EndReason) => void} [onEnd] nothing follows; called once
 * @property {() => Promise<string> | string} [ticket] returns a ticket for the stream, or '' for none; if it throws or
 *   rejects, the follower is disconnected. With a ticket, each tab has its own connection
 * @property {Record<string, string> | (() => Promise<Record<string, string>> | Record<string, string>)} [headers]
 *   for each request; requests are then made by fetch. Only tabs with equal headers share a connection
 * @property {number} [after] the number of the chunk to start after; 0 is the start
 * @property {boolean} [verify] keep what `verify()` needs: up to 256 KiB of text, and 100 bytes for each 256 KiB before it
 * @property {boolean} [shared] false: this tab has its own connection
 * @property {number} [silence] how long nothing may arrive, in ms, before the connection is checked; by default
 *   two and a half of the server's heartbeats; Infinity: it is never checked
 * @property {typeof globalThis.fetch} [fetch] used instead of the global one
 * @property {new (url: string) => Pick<EventSource, 'addEventListener' | 'readyState' | 'close'>} [EventSource]
 *   used instead of the global one; if neither exists, fetch is used
 */

/**
 * Follows a session's stream.
 *
 * @param {string | URL} url of the stream, `…/v1/sessions/{id}/stream`; relative to the document, or to the worker's script
 * @param {Options} [options]
 * @returns {Follower}
 * @throws {TypeError} if `after`, or a parameter of the URL, cannot be followed
 */
export function follow(url, options = {}) {
  return new Follower(url, options);
}

const SILENCE = 37_500; // two and a half heartbeats of 15 s, the server's default
const LOOK = 10_000;    // how long a check may take, ms
const GRACE = 1_000;    // how long a chunk that a check has found may still be on its way, ms
const LONGEST = 2 ** 31 - 1; // the longest delay of a timer, ms: a longer one fires at once
const PARTING = 100;    // how long a page that is being left may run after it lost its connection, ms: it must not open another one
const SIGN = 3_000;     // how long a leading tab may take to respond, ms

/**
 * @typedef {object} Hint what a leading tab sends to the others
 * @property {'who' | 'alive'} [asks] a question instead: which tab leads, or whether the connection is alive
 * @property {string} [deleted] the epoch that was deleted
 * @property {ResetReason} [reset] why everything up to here must be discarded
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
  /** The log's incarnation; '' while it is unknown. */
  epoch = '';
  /** The cursor: the number of the last chunk that was given to a handler. */
  seq = 0;
  /** The node that serves the connection. */
  node = '';
  /** The connection's id, as in the server's log. */
  connection = '';
  /** How often this tab's connection omitted chunks. */
  gaps = 0;
  /** How many chunks came to this tab's connection a second time. */
  doubles = 0;
  /** How often everything had to be discarded. */
  resets = 0;
  reconnects = 0;
  /** Whether this tab holds the connection. */
  leading = false;

  #url;                // the stream's URL, without what we add
  #session;            // the session's URL
  #name = '';          // of the lock and of the channel
  #options;
  /** @type {AbortController | undefined} */
  #life = new AbortController(); // ends with close() or the log: stops listeners and the timer
  /** @type {AbortController | undefined} */
  #turn;               // ends when we give up our place: the lock, or the wait for it
  /** @type {BroadcastChannel | undefined} */
  #channel;
  /** @type {{ close(): void } | undefined} */
  #source;
  #opening = 0;        // the newest attempt to open; results of older ones are ignored
  #ticket = '';        // the ticket that this connection was opened with
  #proven = true;      // false: this ticket has not let us in yet
  #welcomes = 0;
  #refusals = 0;       // since the last welcome
  #welcomed = false;   // whether this connection had its welcome
  #unsure = false;     // whether we must learn by a status if the log has ended, or why we were refused; EventSource hides the status
  #last = 0;           // the log's last number at the welcome: after it we are live
  #known = 0;          // the leading tab's cursor
  /** @type {State} */
  #theirs = 'live';    // the leading tab's state
  #fresh = true;       // false: from here on, chunks up to #last were missed
  /** @type {Info['source']} */
  #late = 'history';
  #repaired = -1;      // the number after which missing chunks were requested: if they are omitted again, they are a hole
  #given = 0;          // the last number on this connection
  #learned = 0;        // the opening for which we requested the epoch
  #looking = -1;       // the opening whose connection is being checked
  #heard = 0;          // when something last came, from the connection if we have one
  #signs = 0;          // how many hints came
  #restarting = false;
  #tried = '';         // the leading tab's connection that made us try again
  /** @type {State | ''} */
  #told = '';          // the state that onState was called with
  /** @type {Receipt | undefined} */
  #receipt;            // what the handlers were given

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
    if (options.verify) this.#receipt = new Receipt(this.seq);
    queueMicrotask(() => { if (this.#life) this.#begin(this.#life); }); // a handler may use what follow() returns
  }

  /** Stops following; no handler is called afterwards. */
  close() {
    this.#end();
    this.state = 'disconnected';
  }

  /** Starts again from the first chunk that is kept, even after the end. */
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
   * @throws {ProblemError} if it is refused
   */
  ask(content) {
    return this.#call('/messages', { content });
  }

  /**
   * Stops a message, or every unfinished one: POST …/cancel.
   *
   * @param {string} [messageId]
   * @returns {Promise<Record<string, unknown>>}
   * @throws {ProblemError} if it is refused; 404 and 409: nothing was left to stop
   */
  stop(messageId) {
    return this.#call('/cancel', messageId === undefined ? {} : { message_id: messageId });
  }

  /**
   * Compares what the handlers were given, number by number, with the server's log (GET …/digest). Chunks that a faulty
   * server or proxy left out, repeated, swapped or changed are a difference.
   *
   * @returns {Promise<Verified>}
   * @throws {TypeError} without the option `verify`, or where there is no `crypto.subtle`: browsers have it only on https and localhost
   * @throws {ProblemError} if the server refuses to say
   */
  async verify() {
    if (!this.#receipt) throw new TypeError('there is nothing to compare: follow with the option verify');
    if (!globalThis.crypto?.subtle) throw new TypeError('crypto.subtle is missing: browsers have it only on https and localhost');
    const { epoch, seq } = this;
    const parts = await this.#receipt.parts();
    /** @type {Verified} */
    const found = { ok: true, complete: false, epoch, first_seq: seq + 1, last_seq: seq, count: 0, parts };
    for (const part of parts) {
      const { first_seq: first, last_seq: last } = part;
      const theirs = await this.#get(`/digest?first=${first}&last=${last}`);
      if (epoch && theirs.epoch !== epoch) return { ...found, ok: false, difference: { first_seq: first, last_seq: last, detail: `the server has another log, of epoch ${theirs.epoch}` } };
      if (theirs.first_seq > first) continue; // it was trimmed since
      if (theirs.last_seq !== last || theirs.sha256 !== part.sha256) {
        return { ...found, ok: false, difference: { first_seq: first, last_seq: last, detail: `the server's chunks ${first} to ${theirs.last_seq} are others` } };
      }
      found.first_seq = Math.min(found.first_seq, first);
      found.count = last - found.first_seq + 1;
    }
    const session = await this.#get('');
    found.complete = session.ended && session.last_seq === seq && session.epoch === epoch;
    return found;
  }

  // ---- a life: from the beginning to the end, paused while the page is in the back/forward cache

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
      // Without a connection we hear the leading tab, which checks first and then sends a sign of
      // life.
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
    if (reason === 'ended') this.#post(); // to the tabs that have the whole log, too
    this.#end();
    this.#report();
    this.#tell('onEnd', reason);
  }

  // A page that the browser may freeze and bring back must not hold the lead.
  #part() {
    this.#yield();
    this.#channel?.close();
    this.#channel = undefined;
  }

  #return() {
    if (!this.#turn && this.state !== 'disconnected') this.#join();
  }

  // Gives up our place, but keeps listening.
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
    // We may have been refused by a network that requires a login.
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
      // A ticket does not show who else may see what it opens.
      const mine = ticket ? await ticket() : '';
      const scope = await this.#scope();
      if (turn.signal.aborted) return;
      if (mine) return this.#lead(mine);
      this.#name = `gapless 2 ${scope} ${this.#url}`; // 2: the version of the hints
    } catch {
      if (!turn.signal.aborted) this.#disconnect();
      return;
    }
    const channel = this.#channel = new BroadcastChannel(this.#name);
    channel.onmessage = (e) => { if (channel === this.#channel) this.#hint(e.data); };
    this.#request(turn, { ifAvailable: true });
  }

  // Tabs with other headers belong to other users.
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
      if (this.leading) this.#join(); // another tab has taken over
      else this.#lead();              // locks do not exist where cookies are forbidden
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
    if (this.leading) return; // two tabs may lead for a moment
    if (!this.#source) this.#heard = Date.now();
    this.#signs++;
    if (hint.deleted !== undefined) {
      if (!this.epoch || hint.deleted === this.epoch) this.#deleted();
      return;
    }
    if (hint.state === 'ended') { // a tab that lacks something leads next, and asks itself
      if (hint.epoch === this.epoch && hint.seq === this.seq) this.#finish('ended');
      return;
    }
    if (this.state === 'disconnected') {
      // Another tab is accepted. Every chunk says so, but we try only once for each connection.
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
    // Equal numbers mean equal chunks only in one log. If neither tab knows its log's epoch, the
    // logs are the same, because resets are sent.
    if (!this.epoch && (hint.seq === this.seq || this.seq === 0 && hint.seq === 1)) this.epoch = hint.epoch;
    const ours = hint.epoch === this.epoch;
    if (ours && data !== undefined && hint.seq === this.seq + 1) return this.#take(hint.seq, data, hint.source ?? 'live');
    if (!this.#source && (hint.epoch !== '' && !ours || hint.seq > this.seq)) return this.#open();
    this.#settle();
  }

  // A tab that does not lead closes its connection when it has caught up.
  #settle() {
    if (this.leading || !this.#source) return this.#enter(this.leading ? this.#progress() : this.#theirs);
    if (!this.#welcomed) return this.#report();
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
    this.#report();
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
      turn.abort(); // leave the queue
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
        return this.#ticket !== '' && (session === 401 || session === 403); // then we may not ask
      }
      this.epoch ||= session.epoch;
      return session.epoch !== this.epoch || session.last_seq > this.seq || session.ended;
    } catch {
      return true; // not even this was answered
    }
  }

  /** @returns {Promise<{ epoch: string, last_seq: number, ended: boolean } | number>} the session, or the status */
  async #describe() {
    const response = await this.#fetch(this.#session, { headers: await this.#headers(), cache: 'no-store', signal: AbortSignal.timeout(LOOK) });
    return response.ok ? response.json() : response.status;
  }

  // ---- the connection

  // We open a new source, because the old one would continue with its own cursor. When the new one
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
      opened: () => { if (opening === this.#opening) this.#enter('connecting'); }, // a node that cannot reach Redis holds us without a welcome
      event: (name, id, data) => { if (opening === this.#opening) this.#event(name, id, data); },
      broken: (refusal) => {
        if (opening !== this.#opening) return;
        if (refusal) return this.#refused(refusal);
        this.#unsure ||= refusal === null;
        if (refusal !== null && !(this.#unsure && this.#welcomed)) return this.#enter('waiting to reconnect');
        this.#source?.close();
        this.#openIn(PARTING);
        this.#enter('connecting');
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

  // Handles a response that is not a stream. If it is neither an end nor an error of ours, it came
  // from a limit or from a proxy whose node is away. Then we try again, at a random time, so that
  // clients refused together do not return together.
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
      // A ticket that was accepted expires when we are away for too long. Another one helps.
      return this.#ticket && this.#proven ? this.#open() : this.#disconnect();
    }
    const wait = Math.min(1000 * 2 ** this.#refusals++, 15_000) * (1 + Math.random());
    this.#openIn(Math.max(wait, 1000 * Number(headers.get('Retry-After')) || 0));
    this.#enter('waiting to reconnect');
  }

  /** @param {number} ms */
  #openIn(ms) {
    const timer = setTimeout(() => this.#open(), ms);
    this.#source = { close: () => clearTimeout(timer) };
  }

  // ---- the stream's events

  /**
   * @param {string} name
   * @param {string} id
   * @param {string} data
   */
  #event(name, id, data) {
    this.#heard = Date.now();
    switch (name) {
      case 'message': return this.#chunk(Number(id), data);
      // WebKit prepends the rest of an event that was cut off to the next response.
      case 'welcome': return this.#welcome(JSON.parse(data.slice(data.lastIndexOf('\n') + 1)));
      case 'reset': return this.#reset(Number(id), JSON.parse(data));
      case 'snapshot': return this.#snapshot(Number(id), JSON.parse(data));
      case 'expired': return this.#open(); // by now the token may be newer
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
      return inside ? this.#replaced(welcome.epoch) : undefined; // otherwise a reset follows
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
    // A client that has already started again has nothing to discard: it only moves its cursor to
    // the log's start.
    if (this.seq === 0 && this.resets > 0 && reset.epoch && reset.epoch === this.epoch) {
      this.seq = id;
      this.#receipt?.begin(id);
    } else { // the reset's data has our old cursor; without an epoch, the next welcome gives it
      this.#forget(reset.reason, reset.epoch ?? (reset.reason === 'trimmed' ? this.epoch : ''), id);
    }
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
    this.#receipt?.begin(id);
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
    if (!(seq > this.#given)) this.doubles++; // otherwise a hint was faster
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
    this.#receipt?.add(seq, data);
    const chunk = parse(data);
    this.#unsure = chunk.type === 'end';
    this.#tell('onChunk', chunk, seq, { source });
    if (opening !== this.#opening) return; // the handler has closed or restarted us
    if (!this.epoch && this.leading) this.#learn();
    if (this.leading) this.#report();
    else this.#settle();
  }

  // A session has no epoch before its first chunk, and that chunk does not contain it.
  #learn() {
    const opening = this.#opening;
    if (this.#learned === opening) return;
    this.#learned = opening;
    const { resets } = this;
    this.#describe().then((session) => {
      if (typeof session === 'number' || opening !== this.#opening || resets !== this.resets || this.epoch) return;
      this.epoch = session.epoch;
      this.#enter(this.state);
    }, () => {}); // the next welcome gives it
  }

  /**
   * Requests what is missing up to `to`, but only once: a log that really lacks it must not make us
   * request it for ever. What the stream omits twice in a row is reported as a hole and skipped, even
   * if only the stream lacks it. Returns whether to go on without it.
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
   * @param {string} [epoch] of the log that follows, if known
   * @param {number} [seq] the chunk after which it follows
   */
  #forget(reason, epoch = '', seq = 0) {
    this.seq = seq;
    this.epoch = epoch;
    this.#receipt?.begin(seq);
    this.#last = this.#known = 0;
    this.#fresh = true;
    this.#unsure = false;
    this.#repaired = this.#learned = -1;
    if (reason !== 'restart') {
      this.resets++;
      if (reason !== 'deleted') this.#post({ reset: reason }); // a deletion is posted before, with its epoch
    }
    this.#tell('onReset', reason);
  }

  #report() {
    const { state } = this;
    if (state !== this.#told) {
      this.#told = state;
      this.#tell('onState', state, this);
    }
    this.#tell('onProgress', this);
  }

  /**
   * @template {'onChunk' | 'onSnapshot' | 'onReset' | 'onHole' | 'onState' | 'onProgress' | 'onEnd'} Name
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

  /** @param {string} path */
  async #get(path) {
    const response = await this.#fetch(this.#session + path, { headers: await this.#headers(), cache: 'no-store' });
    if (response.ok) return response.json();
    throw new ProblemError(response.status, await response.json().catch(() => ({})));
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

/**
 * What a follower's handlers were given: a SHA-256 of each part of the log, as the server's digest makes it (the data of each
 * chunk and a line feed), and the text of the newest part. Web Crypto cannot continue a hash.
 */
class Receipt {
  static #most = 256 << 10; // of a part, in UTF-16 units
  /** @type {Promise<{ first_seq: number, last_seq: number, sha256: string }>[]} */
  #whole = [];
  #text = '';          // of the newest part,
  #first = 1;          // which begins with this chunk
  #last = 0;           // and ends with this one

  /** @param {number} seq the chunk after which it begins */
  constructor(seq) {
    this.begin(seq);
  }

  /** @param {number} seq */
  begin(seq) {
    this.#whole = [];
    this.#text = '';
    this.#first = seq + 1;
    this.#last = seq;
  }

  /**
   * @param {number} seq
   * @param {string} data
   */
  add(seq, data) {
    this.#text += `${data}\n`;
    this.#last = seq;
    if (this.#text.length < Receipt.#most) return;
    if (globalThis.crypto?.subtle) this.#whole.push(this.#part());
    this.#text = '';
    this.#first = seq + 1;
  }

  async #part() {
    const part = { first_seq: this.#first, last_seq: this.#last };
    const hash = await crypto.subtle.digest('SHA-256', new TextEncoder().encode(this.#text));
    return { ...part, sha256: Array.from(new Uint8Array(hash), (b) => b.toString(16).padStart(2, '0')).join('') };
  }

  parts() {
    return Promise.all(this.#last < this.#first ? this.#whole : [...this.#whole, this.#part()]);
  }
}

/** The error of a call that was refused. Its message is for people. */
export class ProblemError extends Error {
  /**
   * @param {number} status of HTTP
   * @param {Problem} problem the server's problem; {} if something else responded
   */
  constructor(status, problem) {
    super(problem.detail || problem.title || `The server answered with status ${status}.`);
    this.name = 'ProblemError';
    this.status = status;
    this.problem = problem;
  }
}

/**
 * The server wraps everything that is not a JSON object. This handles a server that does not.
 *
 * @param {string} data
 * @returns {Chunk}
 */
function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk !== null && typeof chunk === 'object') return chunk;
  } catch {
    // Not JSON: it is text.
  }
  return { type: 'foreign', content: data };
}

/** The base of a relative URL: the document, or a worker's script. A blob's script has only an origin. */
function base() {
  const { document, location } = globalThis;
  return document?.baseURI ?? (location?.protocol === 'blob:' ? location.origin : location?.href);
}

/** @param {number} ms */
function pause(ms) {
  return new Promise((next) => { setTimeout(next, ms); });
}

// ---- two ways to read a stream, both of which reconnect by themselves

/**
 * @typedef {object} Listener
 * @property {() => void} opened
 * @property {(name: string, id: string, data: string) => void} event
 * @property {(refusal?: Response | null) => void} broken it reconnects by itself, unless it was refused: by this
 *   response, or by an unknown one if null
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
 * Does what an EventSource does, with headers. Unlike an EventSource, it reports how it was refused, and
 * sees heartbeats: so it notices a connection that died silently.
 *
 * @param {string} url
 * @param {(url: string, init: RequestInit) => Promise<Response>} fetch
 * @param {() => Promise<Record<string, string>>} headers
 * @param {number} silence ms
 * @param {Listener} on
 */
function read(url, fetch, headers, silence, on) {
  let closed = false;
  let retry = 3000; // the browsers' default
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

  // Returns the response if it is not a stream.
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
        // Broken off: read again from the cursor.
      }
      clearTimeout(timer);
      attempt.abort(); // end a response that was not read
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
  let rest = '';   // an incomplete line
  let cr = false;  // the last line ended with CR: an LF that follows belongs to it
  let name = '';
  let id = '';     // counts when its event is complete
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
    /** Begins another response. Returns the cursor to request it with. */
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
