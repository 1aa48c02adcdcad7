// Markdown's reader within bounds.
//
// The text is a stranger's, and marked reads Markdown by regular expressions, many of which look from each place to the
// end: 60 KB can be written that take it minutes, in which the page does nothing. So it is given only what it reads
// soon. Long paragraphs are read in pieces, and what nobody writes stays plain text: a word of hundreds of characters that
// is no link, marks without words between them, lists in lists in lists, thousands of blocks of a letter each.

import { Lexer, Tokenizer } from '/vendor/marked.js';

const mostDepth = 8;       // of lists and quotes in one another
const mostInline = 4000;   // characters that are read as one piece of a paragraph
const mostWord = 200;      // of a word that is no link
const mostLink = 4000;     // of one that is
const mostMarks = 0.3;     // of a piece that is not short, how much may be marks
const mostCells = 2000;    // of a table, those that are left out too
const mostBlock = 10000;   // characters without a blank line, unless they are code
const fewBlocks = 500;     // that a text may have, and one more for each
const leastBlock = 20;     // of its characters

const link = /^[(<]?(?:[^\]()]{0,100}\]\()?<?https?:\/\/[\w.~%/?#=+:&-]+>?\)?[.,;:]?$/;

/** Reads Markdown as marked's Lexer does, but what it would read for long. */
export class Bounded extends Lexer {
  #depth = 0;
  #left = 0;  // how many blocks there may be yet
  #crowded = false; // it has more items of lists than blocks
  #known = 0; // how long the source is when what has no blank line is over: so far it is known to fit

  constructor(options) {
    super({ ...options, tokenizer: Object.create(options.tokenizer ?? new Tokenizer(options)) });
    const { tokenizer } = this;
    const { space, table, list } = tokenizer;
    tokenizer.space = (source) => this.#skip(source) ?? space.call(tokenizer, source); // it is asked first, for each block
    tokenizer.list = (source) => (this.#crowded ? undefined : list.call(tokenizer, source));
    tokenizer.table = (source) => (fitsTable(source) ? table.call(tokenizer, source) : undefined);
  }

  lex(source) {
    this.#left = fewBlocks + source.length / leastBlock;
    this.#crowded = (source.match(/^[ \t]*(?:[*+-]|\d{1,9}[.)])(?=[ \t]|$)/gm)?.length ?? 0) > this.#left;
    return super.lex(source);
  }

  blockTokens(source, tokens = [], ...rest) {
    if (this.#depth >= mostDepth) {
      if (source) tokens.push(paragraph(source));
      return tokens;
    }
    const known = this.#known;
    this.#known = Infinity;
    this.#depth++;
    try {
      return super.blockTokens(source, tokens, ...rest);
    } finally {
      this.#depth--;
      this.#known = known;
    }
  }

  // What is not to be read, as one block.
  #skip(source) {
    if (--this.#left < 0) return paragraph(source);
    if (source.length > this.#known || /^ {0,3}(?:```|~~~)|^(?: {4}|\t)|^[ \t]*\n/.test(source)) return undefined;
    const long = paragraphOf(source.slice(0, mostBlock + 1)).length > mostBlock;
    if (long) return paragraph(paragraphOf(source));
    this.#known = source.length - paragraphOf(source.slice(0, mostBlock + 1)).length;
    return undefined;
  }

  inlineTokens(source, tokens = []) {
    for (const piece of pieces(source)) {
      if (soon(piece)) super.inlineTokens(piece, tokens);
      else tokens.push(text(piece));
    }
    return tokens;
  }
}

function text(raw) {
  return { type: 'text', raw, text: raw, escaped: false };
}

function paragraph(raw) {
  return { type: 'paragraph', raw, text: raw, tokens: [text(raw)] };
}

// A text in pieces: words that are too long are pieces of their own, and others end where a word does.
function pieces(source) {
  if (source.length <= mostWord) return [source];
  const all = [];
  let at = 0, end = 0;
  for (const { 0: word, index } of source.matchAll(/\S+/g)) {
    const long = !fitsWord(word);
    if (end > at && (long || index + word.length - at > mostInline)) {
      all.push(source.slice(at, index));
      at = index;
    }
    end = index + word.length;
    if (long) {
      all.push(source.slice(at, end));
      at = end;
    }
  }
  if (at < source.length) all.push(source.slice(at));
  return all;
}

function fitsWord(word) {
  return word.length <= mostWord || word.length <= mostLink && link.test(word);
}

function soon(piece) {
  if (piece.length <= mostWord) return true;
  if (!/\S/.test(piece)) return false;
  if (/^\S+$/.test(piece)) return fitsWord(piece);
  const marks = piece.match(/[^\p{L}\p{N}\s.,;:'"?/=-]/gu)?.length ?? 0;
  return marks <= mostMarks * piece.length;
}

// The lines from the source's beginning to the first that is blank.
function paragraphOf(source) {
  const end = source.search(/\n[ \t]*\n/);
  return end < 0 ? source : source.slice(0, end);
}

function fitsTable(source) {
  const first = source.indexOf('\n');
  if (first < 0 || !source.slice(0, first).includes('|')) return false;
  const whole = paragraphOf(source.slice(0, mostBlock + 1));
  return source.slice(0, first).split('|').length * whole.split('\n').length <= mostCells;
}
