// Appends an answer to a session, each word exactly once, whatever happens to a node meanwhile. Node 20 or later, no packages.
//
//   node answer.mjs http://127.0.0.1:8080 demo

/** A producer of a session. `name` identifies it there; a program that starts again takes a higher `epoch`. */
export class Producer {
  #nodes; #path; #headers; #number = 0;

  constructor(nodes, session, name, { epoch = 0, token } = {}) {
    this.#nodes = [...nodes];
    this.#path = `/v1/sessions/${encodeURIComponent(session)}/chunks`;
    this.#headers = { 'Content-Type': 'application/json', 'Producer-Id': name, 'Producer-Epoch': String(epoch), ...(token && { Authorization: `Bearer ${token}` }) };
  }

  /** Appends chunks, all or none. Retries for `patience` ms; throws an Error with `status` and `problem` when it is refused. */
  async append(chunks, patience = 60_000) {
    const until = Date.now() + patience;
    for (let wait = 100; ; wait = Math.min(2 * wait, 5_000)) {
      const { status, answer } = await this.#post(JSON.stringify(chunks));
      if (status === 200 || status === 201) {
        this.#number += chunks.length;
        return answer;
      }
      if (status && status < 500 && status !== 429 || Date.now() > until) {
        throw Object.assign(new Error(`${status} ${answer?.code}: ${answer?.detail}`), { status, problem: answer });
      }
      this.#nodes.push(this.#nodes.shift()); // no final answer: it is safe to say the same again, elsewhere
      await new Promise((resolve) => { setTimeout(resolve, wait * (0.5 + Math.random() / 2)); });
    }
  }

  async #post(body) {
    try {
      const headers = { ...this.#headers, 'Producer-Chunk': String(this.#number) };
      const response = await fetch(this.#nodes[0] + this.#path, { method: 'POST', headers, body, signal: AbortSignal.timeout(15_000) });
      return { status: response.status, answer: await response.json() };
    } catch (error) {
      return { answer: { code: 'no_answer', detail: String(error) } };
    }
  }
}

/** Stands for your model. */
async function* model() {
  for (let i = 0; i < 60; i++) {
    await new Promise((resolve) => { setTimeout(resolve, 30); });
    yield `word${i} `;
  }
}

if (import.meta.filename === process.argv[1]) {
  const [, , nodes, session] = process.argv;
  const producer = new Producer(nodes.split(','), session, 'answer.mjs');
  for await (const content of model()) await producer.append([{ message_id: 'm1', content }]);
  await producer.append([{ message_id: 'm1', type: 'done' }, { type: 'end' }]);
}
