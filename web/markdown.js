// Markdown, drawn while it grows.
//
// A text is a sequence of blocks (paragraph, list, code, ...), and new text can change only the
// last ones: "1. a", a blank line and "2" is a list and a paragraph, until "2" turns out to be "2.
// b". So the last two blocks are open, and all earlier ones are final. An open block is drawn again
// only if its source has changed. Ten thousand chunks cost no more than their last blocks.
//
// The text comes from a stranger. HTML in it is shown as text, so that no part of an answer
// vanishes. marked's output passes through DOMPurify, with the few elements that Markdown needs.
// Pictures become links: a page that shows an answer sends no request to other servers.

import { Bounded } from '/bounded.js';
import { Marked } from '/vendor/marked.js';
import DOMPurify from '/vendor/purify.js';

const marked = new Marked({
  tokenizer: {
    def: () => undefined, // [name]: url. A block's link must not depend on another block
  },
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text)}</p>` : escape(text)),
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || 'image')}</a>`;
    },
    checkbox: ({ checked }) => (checked ? '☑ ' : '☐ '),
    heading({ tokens, depth }) { // below the page's own headings
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

const allowed = {
  ALLOWED_TAGS: ['p', 'br', 'hr', 'h3', 'h4', 'h5', 'h6', 'ul', 'ol', 'li', 'blockquote', 'pre', 'code', 'em', 'strong', 'del',
    'a', 'table', 'thead', 'tbody', 'tr', 'th', 'td'],
  ALLOWED_ATTR: ['href', 'start', 'align', 'class'], // class: the language of code
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

function escape(text) {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}

export class Markdown {
  #root;
  #open = [];  // {type, raw, element}: the last two blocks, or fewer
  #source = ''; // the source of the open blocks, and newer text
  #held = '';  // a CR at the end, because an LF may follow it

  /** @param {Element} root holds the blocks, and nothing else */
  constructor(root) {
    this.#root = root;
  }

  /** Adds text. Call draw to show it. */
  append(text) {
    this.#add(text.replaceAll(hole, '\uFFFD'));
  }

  /** Adds a mark that describes what is missing here. */
  miss(text) {
    this.#add(hole + text + hole);
  }

  #add(text) {
    text = this.#held + text;
    this.#held = text.endsWith('\r') ? '\r' : '';
    this.#source += text.slice(0, text.length - this.#held.length).replace(/\r\n?/g, '\n');
  }

  /** Draws new text. */
  draw() {
    const blocks = split(this.#source);
    for (const [i, block] of blocks.entries()) {
      const old = this.#open[i];
      block.element = old?.element ?? this.#root.appendChild(newBlock());
      if (old?.raw === block.raw) continue;
      if (old?.type === 'code' && block.type === 'code' && old.token.lang === block.token.lang && !block.raw.includes(hole)) {
        grow(block.element.querySelector('code').firstChild, unended(block.token.text));
      } else {
        block.element.replaceChildren(render(block));
      }
    }
    for (const old of this.#open.slice(blocks.length)) old.element.remove();
    this.#open = blocks.slice(-2);
    if (blocks.length > 0) this.#source = this.#open.map((block) => block.raw).join('');
  }
}

// Splits a source into blocks. Each includes the blank lines after it.
function split(source) {
  let tokens;
  try {
    tokens = new Bounded(marked.defaults).lex(source);
  } catch {
    return [{ type: 'plain', raw: source }]; // nested too deeply to be read
  }
  const blocks = [];
  let at = 0; // marked omits some blanks from a token's raw
  for (const token of tokens) {
    const start = Math.max(source.indexOf(token.raw, at), at);
    at = start + token.raw.length;
    if (token.type !== 'space') blocks.push({ type: token.type, start, token });
  }
  for (const [i, block] of blocks.entries()) {
    block.raw = source.slice(i === 0 ? 0 : block.start, blocks[i + 1]?.start);
  }
  return blocks;
}

function newBlock() {
  const element = document.createElement('div');
  element.className = 'block';
  return element;
}

// Code without the line end after its last line, like marked's.
function unended(text) {
  return text.replace(/\n$/, '');
}

function grow(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

function render({ type, raw, token }) {
  let fragment;
  try {
    if (type === 'plain') throw new RangeError('too deep');
    fragment = DOMPurify.sanitize(marked.parser([token]), allowed);
  } catch {
    const p = document.createElement('p');
    p.className = 'plain';
    p.textContent = raw;
    fragment = document.createDocumentFragment();
    fragment.append(p);
  }
  for (const pre of fragment.querySelectorAll('pre')) frame(pre);
  for (const table of fragment.querySelectorAll('table')) wrap(table, 'table', 'Table');
  for (const link of fragment.querySelectorAll('a[href]')) {
    link.target = '_blank';
    link.rel = 'noopener noreferrer nofollow';
  }
  if (raw.includes(hole)) markHoles(fragment);
  return fragment;
}

/** Text between two of these describes what is missing there, and is drawn as a mark. */
export const hole = '\uE000';

function markHoles(fragment) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (walker.currentNode.data.includes(hole)) found.push(walker.currentNode);
  for (const node of found) {
    node.replaceWith(...node.data.split(hole).map((text, i) => {
      if (i % 2 === 0) return text;
      const mark = document.createElement('mark');
      mark.textContent = text;
      return mark;
    }));
  }
}

// Frames code, with its language and a button that copies it.
function frame(pre) {
  const code = pre.querySelector('code');
  code.textContent = unended(code.textContent);
  if (!code.firstChild) code.append('');
  const language = /^language-(\S+)$/.exec(code.className)?.[1] ?? '';
  code.removeAttribute('class');
  const head = document.createElement('div');
  head.className = 'code-head';
  const name = document.createElement('span');
  name.textContent = language;
  const copy = document.createElement('button');
  copy.type = 'button';
  copy.className = 'quiet copy-code';
  copy.textContent = 'Copy code';
  head.append(name, copy);
  const box = document.createElement('div');
  box.className = 'code';
  pre.replaceWith(box);
  box.append(head, pre);
  scrolls(pre, language ? `Code, ${language}` : 'Code');
}

function wrap(element, className, label) {
  const box = document.createElement('div');
  box.className = className;
  element.replaceWith(box);
  box.append(element);
  scrolls(box, label);
}

// Content that may be wider than the page must be scrollable with the keyboard, too.
function scrolls(element, label) {
  element.tabIndex = 0;
  element.setAttribute('role', 'group');
  element.setAttribute('aria-label', label);
}
