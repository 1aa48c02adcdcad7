// Texts that are made to keep a reader of Markdown busy, and how long it takes.
const r = (s, n) => s.repeat(Math.max(1, Math.floor(n / s.length)));
// Each makes a text of about n characters.
const hostile = {
  'an address that never comes': (n) => r('a', n / 2) + '@' + r('a-', n / 2),
  'addresses': (n) => r('a@a-', n), 'dots and an at': (n) => r('a.', n / 2) + '@' + r('a.', n / 2), 'www': (n) => r('www.', n), 'http': (n) => r('http://a', n),
  'url with parens': (n) => 'http://a.b/' + r('(', n), 'url with entities': (n) => 'http://a.b/' + r('&a;', n), 'url with punctuation': (n) => 'http://a.b/' + r('!', n),
  'stars': (n) => r('*', n), 'star words': (n) => r('*a ', n), 'star star words': (n) => r('**a *', n), 'closing stars': (n) => r('a*', n), 'mixed emphasis': (n) => r('*a _b ', n), 'underscores': (n) => r('_a', n), 'strong unclosed': (n) => r('a **b ', n),
  'tildes': (n) => r('~', n), 'tilde words': (n) => r('~~a ', n), 'tilde word': (n) => r('~a', n),
  'brackets': (n) => r('[', n), 'bracket pairs': (n) => r('[]', n), 'nested links': (n) => r('[a](', n), 'open links': (n) => r('[a](b', n), 'links with titles': (n) => r('[a](b "', n), 'images': (n) => r('![', n), 'closing brackets': (n) => r('[a', n / 2) + r(']', n / 2), 'link and parens': (n) => '[a](' + r('(', n), 'link to angle': (n) => r('[a](<b', n), 'escaped brackets': (n) => r('[\\', n), 'reference': (n) => r('[a][', n), 'definitions': (n) => r('[a]: b\n', n), 'definition': (n) => '[' + r('a\n', n), 'definition title': (n) => r('[a]: b "', n),
  'backticks': (n) => r('`', n), 'tick runs': (n) => { let t = ''; for (let i = 1; t.length < n; i++) t += '`'.repeat(i) + ' '; return t; }, 'ticks words': (n) => r('`a ``', n), 'brackets and ticks': (n) => r('[`', n),
  'angles': (n) => r('<', n), 'open tags': (n) => r('<a ', n), 'tag with attributes': (n) => '<a' + r(' b', n), 'tag values': (n) => '<a ' + r('b="', n), 'comments': (n) => r('<!--', n), 'comment dashes': (n) => '<!--' + r('-', n), 'instructions': (n) => r('<?', n), 'declarations': (n) => r('<!A', n), 'cdata': (n) => r('<![CDATA[', n), 'autolink': (n) => r('<a:', n), 'html blocks': (n) => r('<div>\n', n), 'html text': (n) => '<div ' + r('a', n), 'script': (n) => r('<script>', n),
  'quotes': (n) => r('>', n), 'quotes spaced': (n) => r('> ', n), 'quote lines': (n) => r('> a\n', n), 'deeper quotes': (n) => { let t = ''; for (let i = 1; t.length < n; i++) t += '>'.repeat(i) + ' a\n'; return t; }, 'quote and lazy': (n) => r('> a\nb\n', n),
  'lists': (n) => r('- ', n), 'list items': (n) => r('- a\n', n), 'deeper items': (n) => { let t = ''; for (let i = 0; t.length < n; i++) t += ' '.repeat(2 * i) + '- a\n'; return t; }, 'numbers': (n) => r('1. ', n), 'mixed lists': (n) => r('* + - ', n), 'loose items': (n) => r('- a\n\n', n), 'item and blanks': (n) => '- a' + r('\n', n) + 'b', 'item and spaces': (n) => '- ' + r(' ', n) + 'a', 'items with code': (n) => r('- ```\n', n), 'tasks': (n) => r('- [ ] ', n), 'item continued': (n) => '- ' + r('a\n  ', n), 'items of bullets': (n) => r('*\n', n),
  'table head': (n) => r('|', n), 'table cells': (n) => r('|a', n) + '\n' + r('|-', n), 'table rows': (n) => '|a|\n|-|\n' + r('|b|\n', n), 'wide table': (n) => r('|a', n / 3) + '|\n' + r('|-', n / 3) + '|\n' + r('|b', n / 3) + '|', 'no table': (n) => r('a|', n) + '\n' + r('-|', n) + 'x', 'table dashes': (n) => 'a|b\n' + r('-', n), 'table aligned': (n) => '|a|\n|' + r(':-', n), 'table spaces': (n) => 'a|b\n-|-\n' + r(' ', n) + 'x', 'wide and long table': (n) => { const k = Math.floor(Math.sqrt(n)); return '|' + r('a|', k) + '\n|' + r('-|', k) + '\n' + r('|\n', n); },
  'headings': (n) => r('#', n), 'heading spaces': (n) => '# a' + r(' ', n) + 'b', 'heading hashes': (n) => '# ' + r('a #', n), 'setext': (n) => r('a\n', n) + '===', 'setext lines': (n) => r('a\n=\n', n), 'rules': (n) => r('* ', n) + 'a', 'rule dashes': (n) => r('- ', n) + 'a', 'dashes': (n) => r('-', n) + 'a', 'equals': (n) => 'a\n' + r('=', n) + 'a',
  'fences': (n) => r('```\n', n), 'open fences': (n) => r('```a\n~~~\n', n), 'fence and spaces': (n) => '```\n' + r(' ', n), 'fence lines of spaces': (n) => '```\n' + r('   \n', n), 'indented': (n) => r('    a\n', n), 'indented blanks': (n) => r('    a\n\n', n), 'info': (n) => '```' + r(' a', n) + '`',
  'spaces': (n) => r(' ', n), 'word and spaces': (n) => 'a' + r(' ', n) + 'b', 'tabs': (n) => r('\t', n), 'blank lines': (n) => r('\n', n), 'lines of spaces': (n) => r(' \n', n), 'trailing spaces': (n) => r('a  \n', n), 'spaces before lines': (n) => r('a' + ' '.repeat(50) + '\n', n),
  'escapes': (n) => r('\\', n), 'escape words': (n) => r('\\a', n), 'entities': (n) => r('&', n), 'entity words': (n) => r('&a', n), 'words': (n) => r('a', n), 'unicode': (n) => r('é', n), 'wide spaces': (n) => r('a\u00a0', n), 'surrogates': (n) => r('😀*', n), 'punctuation': (n) => r('!', n), 'everything': (n) => r('*_`[<&\\~|#->!(@:', n), 'words and lines': (n) => r('word ', n), 'paragraph lines': (n) => r('word word word\n', n),
};

// Measured in the order of their names: [name, ms at n, ms at 2n], each the median of several.
import { Bounded } from './bounded.mjs';
import { Marked } from './marked.mjs';

const marked = new Marked();
const lexer = process.argv[2] === 'unbounded' ? (text) => marked.lexer(text) : (text) => new Bounded(marked.defaults).lex(text);

function median(text) {
  const all = [];
  for (let i = 0; i < 5; i++) {
    const begun = performance.now();
    try {
      marked.parser(lexer(text));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error; // nested too deep: it is shown as text
    }
    all.push(performance.now() - begun);
  }
  return all.sort((a, b) => a - b)[2];
}

if (process.argv[2] === 'same') { // what people write is read as marked reads it
  const texts = JSON.parse(process.argv[3]);
  console.log(JSON.stringify(texts.filter((text) => marked.parser(new Bounded(marked.defaults).lex(text)) !== marked.parser(marked.lexer(text)))));
} else {
  const names = process.argv[3] ? [process.argv[3]] : Object.keys(hostile);
  const n = Number(process.argv[4] ?? 32 * 1024);
  console.log(JSON.stringify(names.map((name) => ({ name, once: median(hostile[name](n)), twice: median(hostile[name](2 * n)) }))));
}
