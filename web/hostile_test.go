package web_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
)

type drawn struct {
	Name  string
	MS    float64 // the longest draw
	Nodes int
}

// hostileTexts is the object of testdata/hostile.mjs.
func hostileTexts(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("testdata/hostile.mjs")
	if err != nil {
		t.Fatal(err)
	}
	texts, _, found := strings.Cut(string(text), "// Measured")
	if !found {
		t.Fatal("testdata/hostile.mjs has another shape")
	}
	return texts
}

// How long the page is busy with a text: reading, cleaning and laying out. The texts are hostile.mjs' and those that make much of DOM.
func testHostileIsDrawnSoon(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=soon"), chromedp.WithNewBrowserContext())
	p.run(`import('/markdown.js').then((m) => { window.Markdown = m.Markdown; })`)
	p.until(`window.Markdown !== undefined`)
	all := compute[[]drawn](p, `(() => {
		`+hostileTexts(t)+`
		Object.assign(hostile, {
			'links': (n) => r('[a](//b) ', n), 'links of blocks': (n) => r('[a](//b)\n\n', n), 'pictures': (n) => r('![a](b) ', n), 'strong words': (n) => r('**a** ', n), 'codes': (n) => r('\x60a\x60 ', n),
			'code blocks': (n) => r('\x60\x60\x60a\nb\n\x60\x60\x60\n', n), 'deep and wide lists': (n) => r('- a\n  - b\n    - c\n      - d\n', n), 'tables': (n) => r('|a|b|\n|-|-|\n|c|d|\n\n', n), 'cells of links': (n) => '|a|b|\n|-|-|\n' + r('|[a](//b)|**c**|\n', n),
			'lines broken': (n) => r('a\\\n', n), 'rules of lines': (n) => r('***\n', n), 'headings of words': (n) => r('# a\n', n), 'quotes of quotes': (n) => r('> > > > a\n\n', n), 'marks of holes': (n) => r('\uE000a', n), 'html as text': (n) => r('<b>a</b> ', n), 'wide characters': (n) => r('\u{1F468}\u200D\u{1F469}\u200D\u{1F467} ', n), 'right to left': (n) => r('\u202Ea ', n), 'combining': (n) => r('a\u0301\u0302\u0303', n), 'everything of everything': (n) => r('- **a** [b](//c) \x60d\x60 ~~e~~ <https://f> ![g](h)\n\n| i | j |\n|---|---|\n| k | l |\n\n> m\n\n', n),
			'usual': (n) => r('Words, **some of them bold**, with [a link](https://example.com).\n\n- an item\n- another\n\n', n),
		});
		const size = 60000, found = [];
		for (const [name, make] of Object.entries(hostile)) {
			const text = make(size);
			let best = Infinity, nodes = 0;
			for (let round = 0; round < 3 && best > 100; round++) {
				const root = document.createElement('div');
				root.className = 'text';
				document.body.append(root);
				const markdown = new Markdown(root);
				let longest = 0;
				for (const piece of [text, 'and ', 'more\n']) {
					markdown.append(piece);
					for (let drawn = false; !drawn;) {
						const begun = performance.now();
						drawn = markdown.draw(begun + 30);
						root.getBoundingClientRect();
						longest = Math.max(longest, performance.now() - begun);
					}
				}
				nodes = root.querySelectorAll('*').length;
				root.remove();
				best = Math.min(best, longest);
			}
			found.push({ Name: name, MS: best, Nodes: nodes });
		}
		return found.sort((a, b) => b.MS - a.MS);
	})()`)
	if len(all) < 20 {
		t.Fatalf("%d texts", len(all))
	}
	usual := all[slices.IndexFunc(all, func(d drawn) bool { return d.Name == "usual" })].MS
	for i, d := range all {
		if i < 5 {
			t.Logf("%+v", d)
		}
		if d.MS > 50+10*usual { // on an idle machine a usual text of 60 KB takes 10 to 20 ms
			t.Errorf("the page is busy for %.0f ms with %q, and for %.0f ms with a usual text", d.MS, d.Name, usual)
		}
	}
}
