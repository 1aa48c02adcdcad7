// The viewer that loses chunks, for comparison with ours. Its server reads the history, sends it,
// and only then subscribes. The viewer has no cursor and requests nothing again. When its
// connection breaks, it starts again. It cannot tell that chunks are missing: the marks come from
// the numbers in the chunks, which only this page compares.

const epochs = 500_000; // two epochs are at least so many numbers apart

export class Naive {
  /** idle | connecting | reading | live */
  state = 'idle';
  connection = '';
  /** The numbers of the chunks that are missing from what it shows now. */
  lacks = new Set();
  /** Chunks that were missing at some time, each once. */
  everLost = new Set();

  #url;
  #on;
  #abort;
  #last = 0; // the number of its last chunk; -1: the next chunk is the first that is kept

  /**
   * @param {string} url
   * @param {object} on fetch(url, init), clear(), chunk(chunk), change(), and lost(from, to) with the
   *   missing numbers before the next chunk
   */
  constructor(url, on) {
    this.#url = url;
    this.#on = on;
  }

  /** How many chunks are missing from what it shows now. */
  get missing() { return this.lacks.size; }

  /** The number of the last chunk that it has, or that it is known to lack. */
  get last() { return this.#last; }

  /** Starts, with a pause of gap ms between read and subscription. */
  async start(gap) {
    this.stop();
    const abort = this.#abort = new AbortController();
    while (!abort.signal.aborted) {
      this.#enter('connecting');
      try {
        const response = await this.#on.fetch(`${this.#url}?gap=${gap}`, { signal: abort.signal });
        if (response.ok) await this.#read(response.body);
        else if (response.status < 500 && response.status !== 429) return this.stop();
      } catch {
        // The response always ends by breaking off.
      }
      await new Promise((resolve) => { setTimeout(resolve, 1000); });
    }
  }

  stop() {
    this.#abort?.abort();
    this.#enter('idle');
  }

  /** Compares with the log's last number: published chunks that it lacks by now will never come. */
  compare(seq) {
    if (this.state === 'live' && this.#last >= 0 && seq > this.#last) this.#take({ seq: seq + 1 }, true);
  }

  async #read(body) {
    this.lacks.clear();
    this.#on.clear();
    let text = '';
    for (const reader = body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (text + value).split('\n\n');
      text = events.pop();
      for (const event of events) {
        const data = /^data: (.*)$/m.exec(event)?.[1];
        if (data) this.#take(JSON.parse(data));
      }
    }
  }

  #take(chunk, onlyHole = false) {
    if (chunk.type === 'welcome') {
      this.connection = chunk.connection;
      this.#last = chunk.last_seq > 0 ? -1 : 0;
      return this.#enter('reading');
    }
    if (chunk.type === 'subscribed') return this.#enter('live');
    // A larger jump means a later epoch: the numbers between do not exist.
    if (this.#last >= 0 && chunk.seq > this.#last + 1 && chunk.seq - this.#last < epochs) {
      for (let seq = this.#last + 1; seq < chunk.seq; seq++) {
        this.lacks.add(seq);
        this.everLost.add(seq);
      }
      this.#on.lost(this.#last + 1, chunk.seq - 1);
    }
    if (onlyHole) this.#last = chunk.seq - 1;
    else {
      this.#last = chunk.seq ?? this.#last;
      this.#on.chunk(chunk);
    }
    this.#on.change();
  }

  #enter(state) {
    if (this.state === state) return;
    this.state = state;
    this.#on.change();
  }
}
