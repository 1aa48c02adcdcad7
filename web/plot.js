// The time plot. Each chunk is a mark, at the time of its arrival and the height of its number. A
// connection that was cut is a gap in time but not in numbers. Each kind has its own shape and
// colour.

const longest = 30_000; // ms that are shown at most
const shortest = 10_000;
const most = 20_000; // marks that are kept at most

export const kinds = ['snapshot', 'history', 'live', 'repaired', 'lost'];

export class Plot {
  /** How many chunks of each kind came. `lost`: by the naive viewer. */
  counts = { snapshot: 0, history: 0, live: 0, repaired: 0, lost: 0 };

  #canvas;
  #marks = []; // {at, from, seq, kind}: the chunks from..seq, which came at once
  #away = [];  // {from, to}: periods without a connection; to is Infinity until it is over
  #begun = false; // there was a connection
  #last = 0;   // when something last came
  #timer = 0;
  #still = matchMedia('(prefers-reduced-motion: reduce)');

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.#draw()).observe(canvas);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.#draw());
  }

  /** Adds a chunk, or a snapshot of the chunks from number `from` on. */
  mark(kind, seq, from = seq) {
    const at = Date.now();
    this.counts[kind] += seq - from + 1;
    const last = this.#marks.at(-1);
    if (last?.kind === kind && kind !== 'lost' && from === last.seq + 1 && at - last.at < 20) last.seq = seq;
    else this.#marks.push({ at: kind === 'lost' ? this.#when(seq) ?? at : at, from, seq, kind });
    if (this.#marks.length > most) this.#marks.splice(0, most / 4);
    this.#moves();
  }

  /** Records whether there is a connection. */
  connected(is) {
    const open = this.#away.at(-1)?.to === Infinity;
    this.#begun ||= is;
    if (is === !open || !this.#begun) return;
    if (is) this.#away.at(-1).to = Date.now();
    else this.#away.push({ from: Date.now(), to: Infinity });
    this.#moves();
  }

  /** Removes all marks: another log begins. */
  clear() {
    this.#marks = [];
    for (const kind of kinds) this.counts[kind] = 0;
    this.#moves();
  }

  /** Describes the picture in words. */
  get words() {
    const marks = this.#shown();
    if (marks.length === 0) return 'No chunk has come lately.';
    const of = (kind) => marks.filter((m) => m.kind === kind).reduce((n, m) => n + m.seq - m.from + 1, 0);
    const parts = kinds.filter((kind) => of(kind) > 0)
      .map((kind) => (kind === 'lost' ? `${of(kind)} lost by the naive viewer` : `${of(kind)} ${kind === 'snapshot' ? 'in a snapshot' : kind === 'history' ? 'from history' : kind}`));
    const seqs = marks.map((m) => m.seq);
    return `The last 30 seconds of it: chunks up to number ${seqs.reduce((a, b) => Math.max(a, b))}; ${parts.join(', ')}.`;
  }

  #when(seq) {
    for (let i = this.#marks.length - 1; i >= 0; i--) {
      const m = this.#marks[i];
      if (m.kind !== 'lost' && m.from <= seq && seq <= m.seq) return m.at;
    }
    return undefined;
  }

  #moves() {
    this.#last = Date.now();
    this.#timer ||= setTimeout(() => this.#step(), this.#still.matches ? 1000 : 50);
  }

  // Time goes on while something happens, and a little longer.
  #step() {
    this.#timer = 0;
    this.#draw();
    if (Date.now() - this.#last < 1500 || this.#away.at(-1)?.to === Infinity) {
      this.#timer = setTimeout(() => this.#step(), this.#still.matches ? 1000 : 50);
    }
  }

  get #edge() {
    return this.#away.at(-1)?.to === Infinity ? Date.now() : Math.min(Date.now(), this.#last + 1500);
  }

  get #span() {
    return Math.min(Math.max(this.#edge - (this.#marks[0]?.at ?? 0) + 500, shortest), longest);
  }

  #shown() {
    const begin = this.#edge - longest;
    return this.#marks.filter((m) => m.at >= begin);
  }

  #draw() {
    const canvas = this.#canvas;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (width === 0) return; // not visible
    const dots = devicePixelRatio;
    if (canvas.width !== Math.round(width * dots) || canvas.height !== Math.round(height * dots)) {
      canvas.width = Math.round(width * dots);
      canvas.height = Math.round(height * dots);
    }
    const g = canvas.getContext('2d');
    g.setTransform(dots, 0, 0, dots, 0, 0);
    g.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const edge = this.#edge;
    const span = this.#span;
    const marks = this.#shown();
    const high = marks.reduce((n, m) => Math.max(n, m.seq), 0);
    const low = marks.reduce((n, m) => Math.min(n, m.from), high);
    g.font = `11px ${style.fontFamily}`;
    const box = { left: Math.max(44, g.measureText(String(high)).width + 12), right: width - 8, top: 10, bottom: height - 20 };
    const x = (at) => box.right - ((edge - at) / span) * (box.right - box.left);
    const y = (seq) => (high === low ? box.bottom : box.bottom - ((seq - low) / (high - low)) * (box.bottom - box.top));

    g.fillStyle = colour('soft');
    g.strokeStyle = colour('line');
    g.lineWidth = 1;
    g.textBaseline = 'top';
    for (let s = 0; s <= span / 1000; s += span > 15_000 ? 10 : 5) {
      const at = Math.round(x(edge - s * 1000)) + .5;
      g.beginPath();
      g.moveTo(at, box.top);
      g.lineTo(at, box.bottom);
      g.stroke();
      g.textAlign = s === 0 ? 'right' : 'center';
      g.fillText(s === 0 ? 'now' : `−${s} s`, Math.min(at, box.right + 4), box.bottom + 6);
    }
    g.textAlign = 'right';
    g.textBaseline = 'middle';
    if (high > 0) g.fillText(String(high), box.left - 8, high === low ? box.bottom : box.top + 2);
    if (high > low) g.fillText(String(low), box.left - 8, box.bottom - 2);

    g.fillStyle = colour('away');
    for (const { from, to } of this.#away) {
      const left = Math.max(x(from), box.left);
      const right = Math.min(x(Math.min(to, edge)), box.right);
      if (right > left) g.fillRect(left, box.top, Math.max(right - left, 2), box.bottom - box.top);
    }

    const paint = Object.fromEntries(kinds.map((kind) => [kind, colour(kind)]));
    for (const m of marks) {
      if (m.kind === 'snapshot') {
        shape(g, m.kind, x(m.at), y(m.seq), paint[m.kind], y(m.from));
        continue;
      }
      const step = Math.max(1, Math.floor((m.seq - m.from) / 40)); // more marks would overlap
      for (let seq = m.from; seq <= m.seq; seq += step) shape(g, m.kind, x(m.at), y(seq), paint[m.kind]);
    }
  }
}

/** Draws a mark. The legend uses the same shapes. */
export function shape(g, kind, x, y, colour, from = y) {
  g.strokeStyle = g.fillStyle = colour;
  g.lineWidth = 1.5;
  g.beginPath();
  switch (kind) {
    case 'snapshot': // a bar from its first number to its last
      g.fillRect(x - 2.5, y - 2, 5, Math.max(from - y, 0) + 4);
      break;
    case 'history': // a hollow square
      g.strokeRect(x - 2.5, y - 2.5, 5, 5);
      break;
    case 'live': // a dot
      g.arc(x, y, 2.5, 0, 2 * Math.PI);
      g.fill();
      break;
    case 'repaired': // a triangle
      g.moveTo(x, y - 4.5);
      g.lineTo(x + 4.5, y + 3.5);
      g.lineTo(x - 4.5, y + 3.5);
      g.fill();
      break;
    default: // a cross
      g.lineWidth = 2;
      g.moveTo(x - 4, y - 4);
      g.lineTo(x + 4, y + 4);
      g.moveTo(x + 4, y - 4);
      g.lineTo(x - 4, y + 4);
      g.stroke();
  }
}
