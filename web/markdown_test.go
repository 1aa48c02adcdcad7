package web_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/chromedp/chromedp"
)

// written are texts in which later text changes earlier text, or must not.
var written = []string{
	"1. one\n\n2. two\n\n   more of it\n\n3. three\n\nA paragraph\nof two lines\n===\n\n- a\n- b\n\n  - c\n\n    code?\n\n***\n\n> said\nlazily\n\n> again\n",
	"```js\nlet a = `b`;\n\n\n// c\n```\n\n~~~\nnever closed\n\n# no heading\n",
	"| a | b |\n|:--|--:|\n| 1 | `x|y` |\n| 2\n\nbehind\n\n    indented\n\n    more\n",
	"**bold *both* bold** _a_ `c` ~~d~~ [l](https://example.com \"t\") <https://example.com> https://example.com\n\n[r]: https://example.com\n\na\n\nb\n\nc\n\n[r] [r][r]\n",
	"- [ ] open\n- [x] done\n\n* other\n\n+ third\n\n1) x\n\n2\n",
	"# A\n## B\n### C\n###### F\n\nText\\\nbroken  \nlines\r\nof\rall kinds\r\n\r\n<div>\n\nhtml **x**\n\n</div>\n\n<!-- gone? -->\n\n&amp; &lt;b&gt; &copy;\n",
	"a\n\n\n\n\n\nb\n \n\t\nc\n\n- \n- x\n\n\n  y\n",
	strings.Join(nasty, "\n\n") + strings.Join(nasty, ""),
}

// hostile is text that a model may be made to write.
const hostile = "<script>window.pwned = 1</script>\n\n" +
	"text <img src=x onerror=\"window.pwned = 2\"> <svg onload=\"window.pwned = 3\"><style>*{display:none}</style></svg>\n\n" +
	"<style>body { display: none }</style>\n\n<form action=\"EVIL/form\"><input name=a><button>b</button></form>\n\n" +
	"<iframe src=\"EVIL/frame\"></iframe><object data=\"EVIL/object\"></object><link rel=stylesheet href=\"EVIL/css\"><base href=\"EVIL/\">\n\n" +
	"[js](javascript:window.pwned=4) [JS](JaVaScRiPt:window.pwned=5) [tab](java\tscript:window.pwned=6) [ent](&#106;avascript:window.pwned=7)\n\n" +
	"[data](data:text/html,<script>window.pwned=8</script>) [vb](vbscript:x) [ok](https://example.com/?a=1&b=2) <javascript:window.pwned=9>\n\n" +
	"![image](EVIL/image.png) ![js](javascript:window.pwned=10) ![same](/v1/sessions/evil-image)\n\n" +
	"![a\" onerror=\"window.pwned=11](EVIL/x\" onerror=\"window.pwned=12) [t](https://e.example \"x\\\" onclick=\\\"window.pwned=13\")\n\n" +
	"```\"><script>window.pwned=14</script>\n</code></pre><img src=x onerror=window.pwned=15>\n```\n\n" +
	"`</code><script>window.pwned=16</script>`\n\n<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=window.pwned=17&gt;\">\n\n" +
	"| <img src=x onerror=window.pwned=18> | b |\n|---|---|\n| <b id=form>c</b> | <a name=gapless>d</a> |\n\nthe end"

func testMarkdown(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=markdown"), chromedp.WithNewBrowserContext())
	p.run(`import('/markdown.js').then((m) => { window.Markdown = m.Markdown; })`)
	p.until(`window.Markdown !== undefined`)
	// The pieces have random lengths, from a seed.
	const inPieces = `(() => {
		const draw = (pieces) => {
			const root = document.createElement('div');
			const markdown = new Markdown(root);
			for (const piece of pieces) {
				markdown.append(piece);
				markdown.draw();
			}
			return root.innerHTML;
		};
		let seed = 7;
		const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
		const wrong = [];
		for (const text of [TEXT]) {
			const whole = draw([text]);
			for (let round = 0; round < 12; round++) {
				const pieces = [];
				for (let at = 0; at < text.length;) {
					const to = at + 1 + random(round < 2 && text.length < 2000 ? 1 : 2 + 7 * round);
					pieces.push(text.slice(at, to));
					at = to;
				}
				const got = draw(pieces);
				if (got !== whole) {
					wrong.push(JSON.stringify(pieces).slice(0, 300) + '\ngot  ' + got.slice(0, 1500) + '\nwant ' + whole.slice(0, 1500));
					break;
				}
			}
		}
		return wrong;
	})()`
	for _, text := range append(written, hostile) {
		quoted, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, wrong := range compute[[]string](p, strings.Replace(inPieces, "TEXT", string(quoted), 1)) {
			t.Errorf("drawn piece by piece it is another thing: %s", wrong)
		}
	}

	// Finished blocks are neither drawn nor read again: the last words cost what the first ones do.
	// (One run warms up. The best of four counts, because a busy machine may delay any.)
	if got := compute[string](p, `(() => {
		let answer = '', slower = Infinity;
		for (const last of [2500, 10000, 10000, 10000, 10000]) {
			const root = document.createElement('div');
			const markdown = new Markdown(root);
			let drawn = 0;
			const count = new MutationObserver(() => {});
			count.observe(root, { childList: true, subtree: true, characterData: true });
			const quarters = [performance.now()];
			for (let i = 0; i < last; i++) {
				const growing = root.lastElementChild;
				markdown.append(i % 50 === 49 ? 'word\n\n' : 'word ');
				markdown.draw();
				for (const { target } of count.takeRecords()) if (target !== root && !growing?.contains(target) && !root.lastElementChild.contains(target)) drawn++;
				if (i % (last / 4) === last / 4 - 1) quarters.push(performance.now());
			}
			if (last > 2500) slower = Math.min(slower, (quarters[4] - quarters[3]) / (quarters[1] - quarters[0]));
			answer = root.children.length + ' blocks, ' + drawn + ' drawn again';
			if (drawn > 0 || slower <= 3) break;
		}
		return answer + (slower > 3 ? ', the last ones ' + slower + ' times as slowly' : '');
	})()`); got != "200 blocks, 0 drawn again" {
		t.Error(got)
	}

	// This is nested deeper than anybody reads.
	if got := compute[[]string](p, `[['> ', 5000], ['- ', 5000], ['[', 50000], ['*a **b ', 5000], ['<div>', 20000], ['`+"`"+` ', 9999]].map(([part, times]) => {
		const root = document.createElement('div');
		const markdown = new Markdown(root);
		const text = part.repeat(times) + 'the end';
		for (let at = 0; at < text.length; at += text.length / 4) {
			markdown.append(text.slice(at, at + text.length / 4));
			markdown.draw();
		}
		return root.textContent.includes('the end') ? '' : part;
	}).filter((part) => part !== '')`); len(got) > 0 {
		t.Errorf("these hide their end: %q", got)
	}
}

func testHostile(t *testing.T, w world) {
	var asked atomic.Int64
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer evil.Close()
	text := strings.ReplaceAll(hostile, "EVIL", evil.URL)
	p := open(t, w.browser, w.node.url("/?session=hostile"), chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'live'`)
	for piece := range strings.SplitAfterSeq(text, " ") {
		w.node.post(t, "/v1/sessions/hostile/chunks", chunk{MessageID: "m", Content: piece})
	}
	w.node.post(t, "/v1/sessions/hostile/chunks", []chunk{{Type: "done", MessageID: "m"}, {Type: "message", MessageID: "u", Role: "user", Content: text}})
	p.until(`gapless.messages.length === 2 && gapless.messages[1].status === 'done'`)
	p.showsTheHistory(w.node, "hostile")
	found := eval[[]string](p, `Array.from(document.querySelectorAll('#log .text *'), (e) => [e.localName, ...Array.from(e.attributes, (a) => a.name + '=' + a.value)].join(' '))`)
	allowed := map[string]bool{"div": true, "p": true, "span": true, "button": true, "pre": true, "code": true, "a": true, "table": true, "thead": true, "tbody": true, "tr": true, "th": true, "td": true}
	links := 0
	for _, e := range found {
		name, attributes, _ := strings.Cut(e, " ")
		if !allowed[name] {
			t.Errorf("there is a %s", e)
		}
		for _, bad := range []string{" on", "style=", "src=", "name=", "id=", "javascript:", "vbscript:", "data:"} {
			if strings.Contains(" "+strings.ToLower(attributes), bad) && !strings.Contains(e, evil.URL) {
				t.Errorf("there is a %s", e)
			}
		}
		if name == "a" && strings.Contains(attributes, "href=") {
			links++
			if !strings.Contains(attributes, `rel=noopener noreferrer nofollow`) || !strings.Contains(attributes, "target=_blank") {
				t.Errorf("a link is %s", e)
			}
		}
	}
	if links < 3 {
		t.Errorf("only %d links are left", links)
	}
	// Nothing vanishes: what is not Markdown is shown as text.
	shown := eval[string](p, `document.querySelector('#log article[data-id=m] .text').innerText`)
	for _, part := range []string{"<script>window.pwned = 1</script>", "<svg onload=", "<form action=", "<iframe", "image", "the end", "<style>body"} {
		if !strings.Contains(shown, part) {
			t.Errorf("%s is not shown", part)
		}
	}
	if got := eval[string](p, `document.querySelector('#log article[data-id=u] .text').children.length + ' ' + document.querySelector('#log article[data-id=u] .text').textContent`); got != "0 "+text {
		t.Errorf("a question is shown as %q", got)
	}
	if got := eval[string](p, `String(window.pwned)`); got != "undefined" {
		t.Errorf("a script of it has run: %s", got)
	}
	if got := eval[[]string](p, `performance.getEntriesByType('resource').map((e) => e.name).filter((name) => name.includes('evil') || new URL(name).origin !== location.origin)`); len(got) > 0 || asked.Load() > 0 {
		t.Errorf("it was asked for %v; the other server had %d requests", got, asked.Load())
	}
}
