// The JavaScript client: follow a session's log with the browser's own EventSource, and
// believe nothing but its numbers.
//
// EventSource reconnects by itself, and its Last-Event-ID is the cursor, so a page needs
// none of this to get every chunk. What is added here is the proof: each chunk's number
// is compared with the one before it. A chunk that came already is dropped and counted;
// where chunks are missing, that is counted too, and the log is asked for from the last
// good number on. And it gives the connection's state a name to show.
//
// Not promised: to notice a connection that died without a word. Heartbeats are comments,
// which EventSource keeps to itself.

export class Follower {
  /** connecting | catching up | live | waiting to reconnect | disconnected | ended */
  state = 'connecting';
  /** Which incarnation of the log this is; '' while that is not known. */
  epoch = '';
  /** The number of the last chunk that was given to `on.chunk`. */
  seq = 0;
  /** The node that serves this connection. */
  node = '';
  gaps = 0;
  doubles = 0;
  resets = 0;
  reconnects = 0;

  #url;
  #on;
  #opening = 0;    // the newest attempt to open; older ones that still wait for a ticket are over
  #proven = true;  // false: this ticket has not let us in yet
  #source;
  #welcomes = 0;
  #last = 0;       // how far the log went when we were welcomed: from there on we are live
  #repaired = -1;  // the number behind which we already asked for missing chunks

  /**
   * @param {string} url of a session's stream
   * @param {object} on  what to call, always in the order of the log:
   *   chunk(seq, chunk)  the next chunk
   *   hole(from, to)     chunks that the server did not have when asked again
   *   clear(reason)      forget every chunk; another first one follows.
   *                      trimmed | ahead | epoch | unknown | deleted | reconnect
   *   change()           state, or one of the numbers, is another
   *   ticket()           optional: a promise of a ticket for the stream, '' for none; when it is
   *                      rejected, we are disconnected
   */
  constructor(url, on) {
    this.#url = url;
    this.#on = on;
    this.#open();
  }

  /** Starts again from the first chunk. */
  reconnect() {
    this.#restart('reconnect');
  }

  #restart(reason) {
    this.seq = 0;
    this.epoch = '';
    this.#repaired = -1;
    this.#on.clear(reason);
    this.#open();
  }

  // A new EventSource, since the old one would go on with the cursor that it keeps. When
  // it reconnects later, its Last-Event-ID counts, not `after`.
  #open() {
    this.#source?.close();
    this.#enter('connecting');
    const opening = ++this.#opening;
    if (!this.#on.ticket) return this.#connect('');
    this.#on.ticket().then(
      (ticket) => { if (opening === this.#opening) this.#connect(ticket); },
      () => { if (opening === this.#opening) this.#enter('disconnected'); },
    );
  }

  #connect(ticket) {
    const query = new URLSearchParams();
    if (this.seq > 0) query.set('after', this.seq);
    if (ticket) query.set('ticket', ticket);
    const source = new EventSource(this.#url + (query.size > 0 ? `?${query}` : ''));
    this.#source = source;
    this.#proven = !ticket;
    source.addEventListener('welcome', (e) => this.#welcome(e));
    source.addEventListener('reset', (e) => this.#reset(e));
    source.addEventListener('expired', () => this.#open()); // the token may be newer by now
    source.onmessage = (e) => this.#chunk(e);
    source.onopen = () => this.#enter('connecting'); // a node whose Redis is away holds us without a welcome
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return this.#enter('waiting to reconnect');
      // A ticket that has let us in is spent when we were away for too long: another one will do.
      if (ticket && this.#proven) return this.#open();
      this.#enter('disconnected');
    };
  }

  #enter(state) {
    this.state = state;
    this.#on.change();
  }

  #close() {
    this.#source.close();
    this.#opening++;
    this.#enter('ended');
  }

  #welcome(e) {
    // WebKit puts the rest of an event that was cut off in front of the next response.
    const welcome = JSON.parse(e.data.slice(e.data.lastIndexOf('\n') + 1));
    this.node = welcome.node;
    this.#proven = true;
    if (this.#welcomes++ > 0) this.reconnects++;
    // The same numbers may mean other chunks now. A session without chunks has no epoch.
    if (this.epoch && welcome.epoch && welcome.epoch !== this.epoch) return this.#restart('epoch');
    this.epoch = welcome.epoch || this.epoch;
    this.#last = welcome.last_seq;
    // A cursor ahead of ours is a gap already, before a chunk shows it.
    if (welcome.cursor > this.seq) {
      if (!this.#closesGap(welcome.cursor)) return;
      this.seq = welcome.cursor;
    }
    this.#enter(this.#caughtUp());
  }

  #reset(e) {
    const reset = JSON.parse(e.data);
    this.resets++;
    this.seq = Number(e.lastEventId); // its data has the cursor that we came with
    this.#last = reset.last_seq;
    this.#repaired = -1;
    if (reset.reason !== 'trimmed') this.epoch = ''; // the next welcome tells
    this.#on.clear(reset.reason);
    if (reset.reason === 'deleted') return this.#close();
    this.#enter(this.#caughtUp());
  }

  #chunk(e) {
    const seq = Number(e.lastEventId);
    if (!(seq > this.seq)) {
      this.doubles++;
      return this.#on.change();
    }
    if (seq > this.seq + 1 && !this.#closesGap(seq - 1)) return;
    this.seq = seq;
    const chunk = parse(e.data);
    this.#on.chunk(seq, chunk);
    // Only the server ends a log, and its chunks begin like this; a foreign "end" is text.
    if (chunk.type === 'end' && e.data.startsWith(`{"seq":${seq},"ts":`)) return this.#close();
    this.#enter(this.#caughtUp());
  }

  // Asks for what is missing up to `to`, but only once: a log that really lacks it must
  // not make us ask for ever. Says whether to go on without.
  #closesGap(to) {
    if (this.#repaired === this.seq) {
      this.#on.hole(this.seq + 1, to);
      return true;
    }
    this.gaps++;
    this.#repaired = this.seq;
    this.#open();
    return false;
  }

  #caughtUp() {
    return this.seq < this.#last ? 'catching up' : 'live';
  }
}

// The server wraps what is no JSON object; this is for one that forgets to.
function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk !== null && typeof chunk === 'object') return chunk;
  } catch {
    // Not JSON: text, then.
  }
  return { type: 'foreign', content: data };
}
