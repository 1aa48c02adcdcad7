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
export function follow(url: string | URL, options?: Options): Follower;
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
    /**
     * @param {string | URL} url
     * @param {Options} options
     */
    constructor(url: string | URL, options: Options);
    /** @type {State} */
    state: State;
    /** The log's incarnation; '' while it is unknown. */
    epoch: string;
    /** The cursor: the number of the last chunk that was given to a handler. */
    seq: number;
    /** The node that serves the connection. */
    node: string;
    /** The connection's id, as in the server's log. */
    connection: string;
    /** How often this tab's connection omitted chunks. */
    gaps: number;
    /** How many chunks came to this tab's connection a second time. */
    doubles: number;
    /** How often everything had to be discarded. */
    resets: number;
    reconnects: number;
    /** Whether this tab holds the connection. */
    leading: boolean;
    /** Stops following; no handler is called afterwards. */
    close(): void;
    /** Starts again from the first chunk that is kept, even after the end. */
    restart(): void;
    /**
     * Asks the model: POST …/messages.
     *
     * @param {string} content
     * @returns {Promise<{ message_id: string, reply_message_id: string }>}
     * @throws {ProblemError} if it is refused
     */
    ask(content: string): Promise<{
        message_id: string;
        reply_message_id: string;
    }>;
    /**
     * Stops a message, or every unfinished one: POST …/cancel.
     *
     * @param {string} [messageId]
     * @returns {Promise<Record<string, unknown>>}
     * @throws {ProblemError} if it is refused; 404 and 409: nothing was left to stop
     */
    stop(messageId?: string): Promise<Record<string, unknown>>;
    /**
     * Compares what the handlers were given, number by number, with the server's log (GET …/digest). Chunks that a faulty
     * server or proxy left out, repeated, swapped or changed are a difference.
     *
     * @returns {Promise<Verified>}
     * @throws {TypeError} without the option `verify`, or where there is no `crypto.subtle`: browsers have it only on https and localhost
     * @throws {ProblemError} if the server refuses to say
     */
    verify(): Promise<Verified>;
    #private;
}
/** The error of a call that was refused. Its message is for people. */
export class ProblemError extends Error {
    /**
     * @param {number} status of HTTP
     * @param {Problem} problem the server's problem; {} if something else responded
     */
    constructor(status: number, problem: Problem);
    status: number;
    problem: Problem;
}
/**
 * disconnected: refused for good (4xx); `restart()` tries again
 */
export type State = "connecting" | "catching up" | "live" | "waiting to reconnect" | "disconnected" | "ended";
export type ResetReason = "trimmed" | "ahead" | "epoch" | "unknown" | "deleted" | "restart";
export type EndReason = "ended" | "deleted";
/**
 * a chunk of the log, as openapi.yaml describes it; `seq` and `ts` are always set, except in chunks
 * that a program pushed into Redis itself
 */
export type Chunk = {
    type: string;
    seq?: number;
    ts?: number;
    message_id?: string;
    role?: string;
    content?: string;
    [member: string]: unknown;
};
/**
 * history: it was in the log when following began; live: it came later; repaired: it was missed, and read again
 */
export type Info = {
    source: "history" | "live" | "repaired";
};
export type Message = {
    message_id?: string;
    role: string;
    content: string;
    done: boolean;
    reason?: string;
    reasoning?: string;
    reasoning_ms?: number;
    status: "streaming" | "done" | "failed" | "cancelled";
    first_seq: number;
    last_seq: number;
    chunks?: Chunk[];
};
/**
 * the whole log up to `last_seq`, as messages
 */
export type Snapshot = {
    type: "snapshot";
    epoch: string;
    first_seq: number;
    last_seq: number;
    ended: boolean;
    messages: Message[];
};
/**
 * ok: the `count` chunks `first_seq` to `last_seq` are the server's, byte by byte; complete: and the log has ended with
 * them. Chunks that came as a snapshot, or that are no longer kept, are not among them. difference: the first part that is not
 * the server's
 */
export type Verified = {
    ok: boolean;
    complete: boolean;
    epoch: string;
    first_seq: number;
    last_seq: number;
    count: number;
    parts: {
        first_seq: number;
        last_seq: number;
        sha256: string;
    }[];
    difference?: {
        first_seq: number;
        last_seq: number;
        detail: string;
    };
};
/**
 * (RFC 9457)
 */
export type Problem = {
    type?: string;
    title?: string;
    status?: number;
    detail?: string;
    code?: string;
    [member: string]: unknown;
};
/**
 * Handlers, which are called in the order of the log, and settings of the connection. A handler
 * that throws is reported; following goes on.
 */
export type Options = {
    /**
     * the next chunk
     */
    onChunk?: ((chunk: Chunk, seq: number, info: Info) => void) | undefined;
    /**
     * if given, the existing chunks come as one
     * snapshot, which replaces everything given before
     */
    onSnapshot?: ((snapshot: Snapshot) => void) | undefined;
    /**
     * discard every chunk; the log starts again at its first kept chunk
     */
    onReset?: ((reason: ResetReason) => void) | undefined;
    /**
     * the stream omitted these chunks, even when they
     * were requested again; they are skipped
     */
    onHole?: ((from: number, to: number) => void) | undefined;
    /**
     * the state has changed
     */
    onState?: ((state: State, follower: Follower) => void) | undefined;
    /**
     * the state, or something else that the follower knows, such as
     * `seq`, may have changed; called after `onChunk` and `onState`
     */
    onProgress?: ((follower: Follower) => void) | undefined;
    /**
     * nothing follows; called once
     */
    onEnd?: ((reason: EndReason) => void) | undefined;
    /**
     * returns a ticket for the stream, or '' for none; if it throws or
     * rejects, the follower is disconnected. With a ticket, each tab has its own connection
     */
    ticket?: (() => Promise<string> | string) | undefined;
    /**
     * for each request; requests are then made by fetch. Only tabs with equal headers share a connection
     */
    headers?: Record<string, string> | (() => Promise<Record<string, string>> | Record<string, string>) | undefined;
    /**
     * the number of the chunk to start after; 0 is the start
     */
    after?: number | undefined;
    /**
     * keep what `verify()` needs: up to 256 KiB of text, and 100 bytes for each 256 KiB before it
     */
    verify?: boolean | undefined;
    /**
     * false: this tab has its own connection
     */
    shared?: boolean | undefined;
    /**
     * how long nothing may arrive, in ms, before the connection is checked; by default
     * two and a half of the server's heartbeats; Infinity: it is never checked
     */
    silence?: number | undefined;
    /**
     * used instead of the global one
     */
    fetch?: typeof fetch | undefined;
    /**
     * used instead of the global one; if neither exists, fetch is used
     */
    EventSource?: (new (url: string) => Pick<EventSource, "addEventListener" | "readyState" | "close">) | undefined;
};
export type Listener = {
    opened: () => void;
    event: (name: string, id: string, data: string) => void;
    /**
     * it reconnects by itself, unless it was refused: by this
     * response, or by an unknown one if null
     */
    broken: (refusal?: Response | null) => void;
};
/**
 * what a leading tab sends to the others
 */
export type Hint = {
    /**
     * a question instead: which tab leads, or whether the connection is alive
     */
    asks?: "who" | "alive" | undefined;
    /**
     * the epoch that was deleted
     */
    deleted?: string | undefined;
    /**
     * why everything up to here must be discarded
     */
    reset?: ResetReason | undefined;
    epoch: string;
    /**
     * the leading tab's cursor
     */
    seq: number;
    state: State;
    node: string;
    connection: string;
    /**
     * the text of chunk `seq`
     */
    data?: string | undefined;
    source?: "history" | "live" | "repaired" | undefined;
};
