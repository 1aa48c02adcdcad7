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
export function follow(url: string | URL, options?: Options): Follower;
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
    /**
     * @param {string | URL} url
     * @param {Options} options
     */
    constructor(url: string | URL, options: Options);
    /** @type {State} */
    state: State;
    /** Which incarnation of the log this is; '' while that is not known. */
    epoch: string;
    /** The cursor: the number of the last chunk that was given to a handler. */
    seq: number;
    /** The node that serves the connection. */
    node: string;
    /** The connection's id, as the server's log has it. */
    connection: string;
    /** How often this tab's connection left chunks out. */
    gaps: number;
    /** How many chunks came to this tab's connection again. */
    doubles: number;
    /** How often everything had to be forgotten. */
    resets: number;
    reconnects: number;
    /** Whether this tab holds the connection. */
    leading: boolean;
    /** Ends following; no handler is called any more. */
    close(): void;
    /** Starts again from the first chunk, wherever it began, also after the end. */
    restart(): void;
    /**
     * Asks the model: POST …/messages.
     *
     * @param {string} content
     * @returns {Promise<{ message_id: string, reply_message_id: string }>}
     * @throws {ProblemError} when it is refused
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
     * @throws {ProblemError} when it is refused; 404 and 409: nothing was left to stop
     */
    stop(messageId?: string): Promise<Record<string, unknown>>;
    #private;
}
/** What a refused call is rejected with. Its message is for people. */
export class ProblemError extends Error {
    /**
     * @param {number} status of HTTP
     * @param {Problem} problem what the server says; {} where it was no server of ours
     */
    constructor(status: number, problem: Problem);
    status: number;
    problem: Problem;
}
/**
 * disconnected: refused for good (4xx); `restart()` begins again
 */
export type State = "connecting" | "catching up" | "live" | "waiting to reconnect" | "disconnected" | "ended";
export type ResetReason = "trimmed" | "ahead" | "epoch" | "unknown" | "deleted" | "restart";
export type EndReason = "ended" | "deleted";
/**
 * a chunk of the log, as openapi.yaml describes it; `seq` and `ts` are there unless a program
 * pushed it into Redis itself
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
 * history: it was in the log when following began; live: it came since; repaired: it was missed, and asked for again
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
 * all that the log holds up to `last_seq`, as messages
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
 * What to call, always in the order of the log, and how to connect. A handler that throws is
 * reported, and changes nothing.
 */
export type Options = {
    /**
     * the next chunk
     */
    onChunk?: ((chunk: Chunk, seq: number, info: Info) => void) | undefined;
    /**
     * if given, what is there already comes as one
     * snapshot, which replaces all that was given before
     */
    onSnapshot?: ((snapshot: Snapshot) => void) | undefined;
    /**
     * forget every chunk; another first one follows
     */
    onReset?: ((reason: ResetReason) => void) | undefined;
    /**
     * chunks that the stream left out, and again when
     * asked for them: they are passed over
     */
    onHole?: ((from: number, to: number) => void) | undefined;
    /**
     * the state, or one of the numbers, is another
     */
    onState?: ((state: State, follower: Follower) => void) | undefined;
    /**
     * nothing follows; once
     */
    onEnd?: ((reason: EndReason) => void) | undefined;
    /**
     * a ticket for the stream, '' for none; when it throws or is rejected,
     * we are disconnected. With a ticket each tab has its own connection
     */
    ticket?: (() => Promise<string> | string) | undefined;
    /**
     * for each request, which then is made by fetch. Only tabs with equal ones share a connection
     */
    headers?: Record<string, string> | (() => Promise<Record<string, string>> | Record<string, string>) | undefined;
    /**
     * the chunk to begin behind; 0 is the start
     */
    after?: number | undefined;
    /**
     * false: a connection of this tab's own
     */
    shared?: boolean | undefined;
    /**
     * how long nothing may come, in ms, before we look whether the connection is alive:
     * two and a half of the server's heartbeats; Infinity: we do not look
     */
    silence?: number | undefined;
    /**
     * instead of the global one
     */
    fetch?: typeof fetch | undefined;
    /**
     * instead of the global one; where there is none, fetch is used
     */
    EventSource?: (new (url: string) => Pick<EventSource, "addEventListener" | "readyState" | "close">) | undefined;
};
export type Listener = {
    opened: () => void;
    event: (name: string, id: string, data: string) => void;
    /**
     * it comes back by itself, unless it was refused: by this response,
     * or, null, nobody knows by which
     */
    broken: (refusal?: Response | null) => void;
};
/**
 * what a leading tab tells the others
 */
export type Hint = {
    /**
     * a question instead: who leads, and is the connection alive?
     */
    asks?: "who" | "alive" | undefined;
    /**
     * the epoch that was deleted
     */
    deleted?: string | undefined;
    /**
     * why everything up to here is to be forgotten
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
