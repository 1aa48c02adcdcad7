/**
 * Follows a session while the component is mounted. On a server that renders pages it follows nothing.
 *
 * @param {string | null | undefined} session its id; without one, nothing is followed
 * @param {Settings} [settings]
 * @returns {View & Calls}
 */
export function useGapless(session: string | null | undefined, settings?: Settings): View & Calls;
export type Message = import("./gapless.js").Message;
export type Follower = import("./gapless.js").Follower;
/**
 * `server`: the URL of a Gapless server, by default the page's own; otherwise as for follow(). Handlers are called, too.
 * Settings of the connection count when it is opened; functions may change at any time
 */
export type Settings = {
    server?: string;
} & Omit<import("./gapless.js").Options, "onSnapshot" | "after">;
/**
 * `messages`: in the order of their first chunks; a message that has not changed is the same object. Chunks without text
 * and of a type of your own come to `onChunk` only
 */
export type View = {
    messages: readonly Message[];
    state: import("./gapless.js").State;
    seq: number;
};
/**
 * as of a Follower
 */
export type Calls = {
    ask: (content: string) => Promise<{
        message_id: string;
        reply_message_id: string;
    }>;
    stop: (messageId?: string) => Promise<Record<string, unknown>>;
    restart: () => void;
};
