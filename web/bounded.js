// A reader of Markdown with limits.
//
// The text comes from a stranger. marked reads Markdown by regular expressions, many of which look
// from each position to the end: a text of 60 KB can take it minutes, during which the page is
// blocked. So marked gets only what it can read soon. Long paragraphs are read in pieces. What
// nobody writes stays plain text: words of hundreds of characters that are not links, marks without
// words between them, deeply nested lists, thousands of blocks of one letter.

import { Lexer, Tokenizer } from '/vendor/marked.js';

const mostDepth = 8;       // of nested lists and quotes
const mostInline = 4000;   // characters that are read as one piece of a paragraph
const mostWord = 200;      // of a word that is not a link
const mostLink = 4000;     // of a word that is a link
const mostMarks = 0.3;     // the largest share of marks in a piece that is not short
const mostCells = 2000;    // of a table, including omitted ones
const mostBlock = 10000;   // characters without a blank line, outside code
const fewBlocks = 500;     // the blocks that a text may have, plus one
const leastBlock = 20;     // for each so many characters

const link = /^[(<]?(?:[^\]()]{0,100}\]\()?<?https?:\/\/[\w.~%/?#=+:&-]+>?\)?[.,;:]?$/;

/** Reads Markdown as marked's Lexer does, except for what would take long. */
export class Bounded extends Lexer {
  #depth = 0;
  #left = 0;  // how many more blocks are allowed
  #crowded = false; // the text has more list items than blocks are allowed
  #known = 0; // the source's remaining length after the part that is known to fit

  constructor(options) {
    super({ ...options, tokenizer: Object.create(options.tokenizer ?? new Tokenizer(options)) });
    const { tokenizer } = this;
    const { space, table, list } = tokenizer;
    tokenizer.space = (source) => this.#skip(source) ?? space.call(tokenizer, source); // it is called first for each block
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

  // Returns what must not be read, as one block.
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

// Splits a text into pieces. A word that is too long is a piece. Other pieces end with a word.
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

// Returns the lines from the source's beginning to the first blank one.
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
