// A page of the guide. The server sends its Markdown as text, which can be read without this script. The text is part of
// the binary, so it needs no cleaning.

import { Marked } from '/vendor/marked.js';

const used = new Map();

// The anchor of a heading, as GitHub makes it.
function anchor(text) {
  const slug = text.toLowerCase().replace(/[^\p{L}\p{N}\p{M}\p{Pc}\- ]/gu, '').replaceAll(' ', '-');
  const n = used.get(slug) ?? 0;
  used.set(slug, n + 1);
  return n ? `${slug}-${n}` : slug;
}

// Where a link of a file in docs/ leads here; undefined: to a file of the repository that is not served.
function target(href) {
  if (/^(https?:|#)/.test(href)) return href;
  if (href === '../openapi.yaml') return '/openapi.yaml';
  const page = /^(README|[\w-]+)\.md(#.*)?$/.exec(href);
  return page ? `/docs/guide${page[1] === 'README' ? '' : `/${page[1]}`}${page[2] ?? ''}` : undefined;
}

const main = document.getElementById('guide');
const page = document.createElement('template');
page.innerHTML = new Marked().parse(main.textContent.trim());
for (const heading of page.content.querySelectorAll('h1, h2, h3, h4')) heading.id = anchor(heading.textContent);
for (const link of page.content.querySelectorAll('a[href]')) {
  const to = target(link.getAttribute('href'));
  if (to) link.setAttribute('href', to);
  else link.replaceWith(...link.childNodes);
}
for (const wide of page.content.querySelectorAll('table, pre')) { // they scroll, also with the keyboard
  const box = document.createElement('div');
  box.className = 'wide';
  box.tabIndex = 0;
  box.role = 'group';
  box.ariaLabel = wide.tagName === 'PRE' ? 'Code' : 'Table';
  wide.replaceWith(box);
  box.append(wide);
}
main.replaceChildren(page.content);
document.querySelector(`nav a[href="${location.pathname}"]`)?.setAttribute('aria-current', 'page');
const roomy = matchMedia('(min-width: 56.01rem)');
const unfold = () => { document.querySelector('nav details').open = roomy.matches; };
roomy.addEventListener('change', unfold);
unfold();
if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
