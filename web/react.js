// A hook for React: a session's messages, as they grow.

import { useCallback, useEffect, useMemo, useRef, useSyncExternalStore } from 'react';
import { follow } from './gapless.js';

/**
 * @typedef {import('./gapless.js').Message} Message
 * @typedef {import('./gapless.js').Follower} Follower
 * @typedef {{ server?: string } & Omit<import('./gapless.js').Options, 'onSnapshot' | 'after'>} Settings
 *   `server`: the URL of a Gapless server, by default the page's own; otherwise as for follow(). Handlers are called, too.
 *   Settings of the connection count when it is opened; functions may change at any time
 * @typedef {{ messages: readonly Message[], state: import('./gapless.js').State, seq: number }} View
 *   `messages`: in the order of their first chunks; a message that has not changed is the same object. Chunks without text
 *   and of a type of your own come to `onChunk` only
 * @typedef {{
 *   ask: (content: string) => Promise<{ message_id: string, reply_message_id: string }>,
 *   stop: (messageId?: string) => Promise<Record<string, unknown>>,
 *   restart: () => void,
 * }} Calls as of a Follower
 */

/** @type {View} */
const nothing = { messages: [], state: 'connecting', seq: 0 };
const endings = ['done', 'failed', 'cancelled'];
const pace = 16; // ms between two renderings

/**
 * Follows a session while the component is mounted. On a server that renders pages it follows nothing.
 *
 * @param {string | null | undefined} session its id; without one, nothing is followed
 * @param {Settings} [settings]
 * @returns {View & Calls}
 */
export function useGapless(session, settings = {}) {
  const latest = useRef(settings);
  useEffect(() => { latest.current = settings; });
  const { server = '' } = settings;
  const url = session ? `${server.replace(/\/$/, '')}/v1/sessions/${encodeURIComponent(session)}/stream` : '';
  const following = useMemo(() => new Following(url, latest), [url]);
  const view = useSyncExternalStore(following.subscribe, following.view, () => nothing);
  const ask = useCallback((/** @type {string} */ content) => following.follower().ask(content), [following]);
  const stop = useCallback(/** @type {Calls['stop']} */ ((messageId) => following.follower().stop(messageId)), [following]);
  const restart = useCallback(() => following.follower().restart(), [following]);
  return { ...view, ask, stop, restart };
}

/** A follower that exists while somebody subscribes, and what came to it. */
class Following {
  #url;
  #latest;
  /** @type {Follower | undefined} */
  #follower;
  #view = nothing;
  #wants = new Set();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {Message[]} */
  #messages = [];
  /** @type {Map<string, number>} the places of messages that have an id */
  #places = new Map();
  #last = -1; // the place of the message of the last chunk

  /**
   * @param {string} url
   * @param {{ current: Settings }} latest
   */
  constructor(url, latest) {
    this.#url = url;
    this.#latest = latest;
  }

  view = () => this.#view;

  follower() {
    if (!this.#follower) throw new Error('useGapless follows nothing: it has no session, or its component is not mounted');
    return this.#follower;
  }

  /** @param {() => void} want */
  subscribe = (want) => {
    this.#wants.add(want);
    if (this.#url && !this.#follower) this.#follower = this.#open();
    return () => {
      this.#wants.delete(want);
      if (this.#wants.size > 0) return;
      this.#follower?.close();
      this.#follower = undefined;
      clearTimeout(this.#timer);
      this.#timer = undefined;
      this.#clear();
      this.#view = nothing;
    };
  };

  #open() {
    const latest = this.#latest;
    const { ticket, headers } = latest.current;
    return follow(this.#url, {
      ...latest.current,
      ...(ticket && { ticket: () => (latest.current.ticket ?? ticket)() }),
      ...(headers && { headers: async () => { const now = latest.current.headers ?? headers; return typeof now === 'function' ? now() : now; } }),
      onSnapshot: ({ messages }) => {
        this.#clear();
        for (const m of messages) this.#add(m);
        this.#last = this.#messages.reduce((last, m, i) => (last < 0 || m.last_seq > (this.#messages[last]?.last_seq ?? 0) ? i : last), -1);
        this.#show();
      },
      onChunk: (chunk, seq, info) => {
        this.#take(chunk, seq);
        latest.current.onChunk?.(chunk, seq, info);
      },
      onReset: (reason) => {
        this.#clear();
        this.#show();
        latest.current.onReset?.(reason);
      },
      onHole: (from, to) => latest.current.onHole?.(from, to),
      onState: (state, follower) => {
        this.#show();
        latest.current.onState?.(state, follower);
      },
      onProgress: (follower) => {
        this.#show();
        latest.current.onProgress?.(follower);
      },
      onEnd: (reason) => latest.current.onEnd?.(reason),
    });
  }

  #clear() {
    this.#messages = [];
    this.#places.clear();
    this.#last = -1;
  }

  /** @param {Message} message */
  #add(message) {
    if (message.message_id) this.#places.set(message.message_id, this.#messages.length);
    return this.#messages.push(message) - 1;
  }

  /**
   * Adds a chunk to its message. Chunks without a message_id belong to their neighbours: consecutive ones of a role are one
   * message.
   *
   * @param {import('./gapless.js').Chunk} chunk
   * @param {number} seq
   */
  #take(chunk, seq) {
    const text = typeof chunk.content === 'string' ? chunk.content : '';
    const ending = endings.includes(chunk.type) ? chunk.type : chunk['is_complete'] === true ? 'done' : '';
    if (!text && !ending) return;
    const id = typeof chunk.message_id === 'string' ? chunk.message_id : '';
    const role = typeof chunk.role === 'string' ? chunk.role : 'assistant';
    const before = this.#messages[this.#last];
    let place = id ? this.#places.get(id) : before && !before.message_id && !before.done && before.role === role ? this.#last : undefined;
    if (place === undefined) {
      if (!text && ending === 'done') return; // an answer without a word, or of which nothing is kept
      place = this.#add({ ...(id && { message_id: id }), role, content: '', done: false, status: 'streaming', first_seq: seq, last_seq: seq });
    }
    if (place !== this.#last && before && !before.message_id && !before.done) this.#messages[this.#last] = { ...before, done: true, status: 'done' };
    this.#last = place;
    const m = { .../** @type {Message} */ (this.#messages[place]), last_seq: seq };
    if (chunk.type === 'reasoning') m.reasoning = (m.reasoning ?? '') + text;
    else m.content += text;
    const reason = chunk['detail'] ?? chunk['reason'];
    if (typeof reason === 'string') m.reason = reason;
    if (ending || chunk.type === 'message' && !m.done) {
      m.done = true;
      m.status = /** @type {Message['status']} */ (ending || 'done');
    }
    this.#messages[place] = m;
  }

  // Renders soon, once for all the chunks that have come by then.
  #show() {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      const follower = this.#follower;
      if (!follower) return;
      this.#view = { messages: [...this.#messages], state: follower.state, seq: follower.seq };
      for (const want of this.#wants) want();
    }, pace);
  }
}
