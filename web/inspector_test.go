package web_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/target"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// look describes how a tab displays a page.
type look struct {
	width, height int64
	scheme        string // light or dark
	still         bool   // prefers reduced motion
}

var looks = []look{{1440, 900, "light", false}, {1440, 900, "dark", true}, {390, 844, "light", true}, {390, 844, "dark", false}}

func (l look) String() string { return fmt.Sprintf("%d-%s", l.width, l.scheme) }

// open opens a page in a tab with this look.
func (l look) open(t *testing.T, w world, address string) *tab {
	t.Helper()
	p := open(t, w.browser, "about:blank", chromedp.WithNewBrowserContext())
	p.looks(l)
	p.do("open "+address, chromedp.Navigate(address))
	return p
}

func (p *tab) looks(l look) {
	p.t.Helper()
	motion := "no-preference"
	if l.still {
		motion = "reduce"
	}
	_, err := chromedp.Call(p.ctx, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
		Width: l.width, Height: l.height, DeviceScaleFactor: 1, Mobile: l.width < 600})
	if err == nil {
		_, err = chromedp.Call(p.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: l.scheme}, {Name: "prefers-reduced-motion", Value: motion}}})
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// text returns the text of an element.
func (p *tab) text(id string) string {
	return eval[string](p, `document.getElementById('`+id+`')?.textContent`)
}

// marks returns which kinds the plot shows, by their colours in it.
func (p *tab) marks() []string {
	return eval[[]string](p, `(() => {
		const plot = document.getElementById('plot');
		const { data } = plot.getContext('2d').getImageData(0, 0, plot.width, plot.height);
		const seen = new Set();
		for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) seen.add('rgb(' + data.slice(i, i + 3).join(', ') + ')');
		const probe = document.body.appendChild(document.createElement('i'));
		const found = ['snapshot', 'history', 'live', 'repaired', 'lost'].filter((kind) => {
			probe.style.color = 'var(--' + kind + ')';
			return seen.has(getComputedStyle(probe).color);
		});
		probe.remove();
		return found;
	})()`)
}

// last returns the last number of a session's log, or 0 if the node does not send it.
func (n *node) last(session string) int {
	r, err := n.http.Get(n.url("/v1/sessions/" + session))
	if err != nil {
		return 0
	}
	defer r.Body.Close()
	var it struct {
		Last int `json:"last_seq"`
	}
	_ = json.NewDecoder(r.Body).Decode(&it)
	return it.Last
}

// An EventSource that the server cuts reconnects by itself, and sends its cursor.
func testCut(t *testing.T, w world) {
	line := newProxy(t, w.node)
	p := looks[0].open(t, w, line.url("/?session=cut"))
	p.until(`gapless.state === 'live'`)
	finish := w.node.answers(t, "cut")
	p.until(`gapless.seq >= 10`)
	connection := p.text("connection")
	p.press("#cut")
	p.until(`gapless.state === 'waiting to reconnect'`)
	p.until(`gapless.state === 'live' && gapless.reconnects === 1 && document.getElementById('reconnects').textContent === '1'`)
	if s := line.seen(); len(s) != 2 || s[1].cursor == "" || s[1].status != http.StatusOK {
		t.Errorf("there were %d requests, and the second one had the cursor %q", len(s), s[len(s)-1].cursor)
	}
	if got := p.text("connection"); got == connection {
		t.Error("it is still called the same")
	}
	finish()
	p.showsTheHistory(w.node, "cut")
	total := len(w.node.history(t, "cut"))
	p.until(`document.getElementById('plot-words').textContent.includes('repaired')`)
	counts := eval[map[string]int](p, `gapless.counts`)
	if counts["repaired"] == 0 || counts["live"] == 0 || counts["snapshot"]+counts["history"]+counts["repaired"]+counts["live"] != total {
		t.Errorf("%v of %d chunks", counts, total)
	}
	p.until(`document.getElementById('n-live').textContent === String(gapless.counts.live)`)
	eventually(t, "the plot shows both kinds", func() bool { m := p.marks(); return slices.Contains(m, "live") && slices.Contains(m, "repaired") })
	if latency := p.text("latency"); !strings.HasSuffix(latency, " ms") {
		t.Errorf("the latency is %q", latency)
	}
}

func testThrottle(t *testing.T, w world) {
	p := looks[0].open(t, w, w.node.url("/?session=slow"))
	finish := w.node.answers(t, "slow")
	p.until(`gapless.seq >= 10`)
	p.press("#slow")
	p.until(`document.getElementById('slow').ariaPressed === 'true'`)
	eventually(t, "it falls behind", func() bool { return w.node.last("slow") > eval[int](p, `gapless.seq`)+30 })
	if got := eval[int](p, `gapless.reconnects`); got != 0 {
		t.Errorf("it has reconnected %d times", got)
	}
	p.press("#slow")
	eventually(t, "it catches up", func() bool { last := w.node.last("slow"); return last > 0 && last <= eval[int](p, `gapless.seq`)+10 })
	finish()
	p.showsTheHistory(w.node, "slow")
}

// What the naive viewer loses was never sent to it, and is marked where it is missing. Ours has it.
func testNaive(t *testing.T, w world) {
	p := looks[0].open(t, w, w.node.url("/?session=naive"))
	finish := w.node.answers(t, "naive")
	p.until(`gapless.seq >= 10`)
	p.run(`document.getElementById('gap').value = '1000'`)
	p.press("#compare")
	p.until(`gapless.naive.state === 'live' && gapless.naive.missing > 0`)
	finish()
	total := len(w.node.history(t, "naive"))
	p.until(fmt.Sprintf(`gapless.seq === %d`, total))
	p.showsTheHistory(w.node, "naive")
	lost := map[int64]bool{}
	for _, seq := range eval[[]int64](p, `gapless.naive.lost`) {
		lost[seq] = true
	}
	want := ""
	for i, c := range w.node.history(t, "naive") {
		switch {
		case !lost[c.Seq]:
			want += c.Content
		case i == 0 || !lost[c.Seq-1]:
			last := c.Seq
			for lost[last+1] {
				last++
			}
			if want += fmt.Sprintf("✕ %d–%d lost", c.Seq, last); last == c.Seq {
				want = strings.Replace(want, fmt.Sprintf("%d–%[1]d", last), fmt.Sprint(last), 1)
			}
		}
	}
	p.until(`document.getElementById('naive-count').textContent === gapless.naive.missing + ' lost'`)
	shown := ""
	eventually(t, "it shows "+want, func() bool {
		shown = eval[string](p, `document.querySelector('#naive-log .text')?.textContent`)
		return shown == want
	})
	if got := eval[int](p, `gapless.naive.missing`); got != len(lost) || got < 1 || p.text("n-lost") != fmt.Sprint(got) {
		t.Errorf("%d are missing, %d were lost, and the legend says %s", got, len(lost), p.text("n-lost"))
	}
	eventually(t, "the plot shows the losses", func() bool { return slices.Contains(p.marks(), "lost") })

	// The very last chunk is lost without a later one that could show it. On a busy machine it may
	// come when the naive viewer already listens.
	missed := false
	for try := 0; !missed; try++ {
		if try == 10 {
			t.Fatal("the naive viewer misses nothing")
		}
		p.run(`document.getElementById('gap').value = '1000'; document.getElementById('gap').dispatchEvent(new Event('change'))`)
		p.until(`gapless.naive.state === 'reading' && gapless.naive.missing === 0`)
		w.node.post(t, "/v1/sessions/naive/chunks", chunk{MessageID: "last", Content: "the last word"})
		total++
		p.until(fmt.Sprintf(`gapless.seq === %d && gapless.naive.state === 'live'`, total))
		for range 50 {
			if missed = eval[bool](p, fmt.Sprintf(`gapless.naive.missing === 1 && gapless.naive.lost.includes(%d)`, total)); missed {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	p.until(`document.getElementById('naive-count').textContent.startsWith('1 lost now')`)

	p.press("#compare")
	p.until(`gapless.naive.state === 'idle' && document.getElementById('naive').hidden`)
}

func testFourTabs(t *testing.T, w world) {
	p := looks[0].open(t, w, w.node.url("/?session=four"))
	p.until(`gapless.state === 'live'`)
	address := eval[string](p, `location.href`)
	others := func() (n int) {
		all, err := chromedp.Call(p.ctx, target.GetTargets, target.GetTargetsParams{})
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range all.TargetInfos {
			if info.Type == "page" && info.URL == address {
				n++
			}
		}
		return n
	}
	p.press("#tabs")
	eventually(t, "five tabs show the session", func() bool { return others() == 5 })
	if !eval[bool](p, `document.getElementById('tab-links').hidden`) {
		t.Error("links are offered to tabs that are open")
	}
	// This browser opens only one tab per click.
	p.run(`let opened = 0; window.open = () => (opened++ === 0 ? {} : null)`)
	p.press("#tabs")
	if got := eval[[]string](p, `Array.from(document.querySelectorAll('#tab-links a'), (a) => a.href + ' ' + a.target)`); len(got) != 3 || got[0] != address+" _blank" {
		t.Errorf("offered are %q", got)
	}
}

// A server with a real model has no demo, and the page does not offer it, whatever is between them.
func testNoDemo(t *testing.T, w world) {
	real := start(t, "-model-url", "http://127.0.0.1:9/v1", "-model-name", "m")
	if status, answer := real.send(t, "/v1/sessions/s/demo", map[string]string{"connection": "c", "do": "cut"}); status != http.StatusNotFound || strings.Contains(string(answer), "connection_not_found") {
		t.Errorf("a server with a model answers %d %s", status, answer)
	}
	without := open(t, w.browser, real.url("/?session=no-demo"), chromedp.WithNewBrowserContext())
	without.until(`gapless.state === 'live' && performance.getEntriesByType('resource').some((e) => e.name.endsWith('/demo'))`)
	if !eval[bool](without, `document.getElementById('demo').hidden && document.getElementById('no-model').hidden`) {
		t.Error("the demo is offered with a model, or the page says that there is none")
	}

	to, err := url.Parse(w.node.url("/"))
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	front := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/demo") {
			rw.WriteHeader(http.StatusNoContent) // the usual response to a CORS preflight, whatever exists
			return
		}
		proxy.ServeHTTP(rw, r)
	}))
	t.Cleanup(front.Close)
	t.Cleanup(front.CloseClientConnections)
	p := open(t, w.browser, front.URL+"/?session=no-demo", chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'live' && performance.getEntriesByType('resource').some((e) => e.name.endsWith('/demo'))`)
	if !eval[bool](p, `document.getElementById('demo').hidden`) {
		t.Error("the demo is offered")
	}
	with := open(t, w.browser, w.node.url("/?session=no-demo"), chromedp.WithNewBrowserContext())
	with.until(`document.getElementById('demo').hidden === false`)
	with.until(`document.getElementById('no-model').checkVisibility() && document.getElementById('no-model').innerText.includes('-model-url')`)
	if !eval[bool](with, `document.getElementById('in-memory').hidden`) {
		t.Error("the page of a server that keeps its data says that it does not")
	}
	forgets := open(t, w.browser, start(t, "-redis", "embedded").url("/?session=no-demo"), chromedp.WithNewBrowserContext())
	forgets.until(`document.getElementById('in-memory').checkVisibility()`)
}

func testCopyAndAgain(t *testing.T, w world) {
	const text = "Say **it**:\n\n```go\nfmt.Println(\"it\")\n```\n"
	p := open(t, w.browser, w.node.url("/?session=copy"), chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'live'`)
	w.node.post(t, "/v1/sessions/copy/chunks", []chunk{
		{Type: "message", MessageID: "q", Role: "user", Content: question},
		{MessageID: "a", Content: text}, {Type: "failed", MessageID: "a", Reason: "model_failed"}})
	p.until(`document.querySelector('.again')?.checkVisibility()`)
	p.run(`window.copied = []; Object.defineProperty(navigator, 'clipboard', { value: { writeText: async (text) => { copied.push(text); } } })`)
	for _, c := range [][2]string{{"[data-id=a] .copy-code", `fmt.Println("it")`}, {"[data-id=a] .copy-message", text}, {"[data-id=q] .copy-message", question}, {"#copy", eval[string](p, `location.href`)}} {
		p.press(c[0])
		p.until(`document.querySelector('` + c[0] + `').textContent === 'Copied'`)
		if got := eval[string](p, `copied.at(-1)`); got != c[1] {
			t.Errorf("%s copies %q", c[0], got)
		}
	}
	// Without a secure context there is no clipboard API.
	p.run(`Object.defineProperty(document, 'execCommand', { value: (what) => { copied.push(what + ' ' + document.activeElement.value); return true; } });
		navigator.clipboard.writeText = async () => { throw new Error('no'); }`)
	p.press("[data-id=a] .copy-code")
	p.until(`copied.at(-1) === 'copy fmt.Println("it")'`)

	p.press("[data-id=a] .again")
	p.until(`gapless.messages.length === 4 && gapless.messages[3].status === 'done'`)
	if got := eval[string](p, `gapless.messages[2].role + ' ' + gapless.messages[2].text`); got != "user "+question {
		t.Errorf("it asked %q again", got)
	}
}

// Whole messages are announced once each. Repeated or growing ones are not.
func testAloud(t *testing.T, w world) {
	w.node.post(t, "/v1/sessions/aloud/chunks", []chunk{{MessageID: "old", Content: "said before"}, {Type: "done", MessageID: "old"}})
	p := open(t, w.browser, w.node.url("/?session=aloud"), chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'live'`)
	p.run(`window.said = []; new MutationObserver(() => said.push(document.getElementById('said').textContent)).observe(document.getElementById('said'), { childList: true, subtree: true, characterData: true })`)
	for _, word := range []string{"one ", "**two** ", "three"} {
		w.node.post(t, "/v1/sessions/aloud/chunks", chunk{MessageID: "m", Content: word})
		p.until(`document.querySelector('[data-id=m] .text')?.textContent.includes('` + strings.Trim(word, "* ") + `')`)
	}
	w.node.post(t, "/v1/sessions/aloud/chunks", chunk{Type: "done", MessageID: "m"})
	p.until(`said.length > 0`)
	w.node.post(t, "/v1/sessions/aloud/chunks", []chunk{{MessageID: "f", Content: "half"}, {Type: "failed", MessageID: "f", Reason: "shutdown"}})
	p.until(`said.length > 1`)
	if got := eval[string](p, `said.join('; ')`); got != "Answer: one two three; Answer, Failed: its node was stopped: half" {
		t.Errorf("it said %q", got)
	}
	if got := eval[string](p, `Array.from(document.querySelectorAll('[aria-live], [role=log], [role=status], [role=alert]'), (e) => e.id).join()`); got != "state,problem,said" {
		t.Errorf("said aloud is what stands in %s", got)
	}
}

// Everything works with the keyboard alone, at both widths.
func testKeyboard(t *testing.T, w world) {
	reach := func(p *tab, id string) {
		t.Helper()
		for range 40 {
			p.do("press Tab", chromedp.KeyEvent(kb.Tab))
			if got := eval[string](p, `document.activeElement.id`); got == id {
				if eval[string](p, `getComputedStyle(document.activeElement).outlineStyle`) == "none" {
					t.Errorf("%s shows no focus", id)
				}
				return
			}
		}
		t.Fatalf("Tab does not reach %s", id)
	}
	p := looks[0].open(t, w, w.node.url("/?session=keyboard"))
	p.until(`gapless.state === 'live' && document.getElementById('demo').hidden === false`)
	if got := eval[string](p, `document.activeElement.id`); got != "ask" {
		t.Errorf("the focus is at first on %q", got)
	}
	// The question, what follows it, then around: the header, the conversation.
	for _, id := range []string{"send", "cut", "slow", "tabs", "compare", "gap", "copy", "new", "inspect", "scroll", "ask"} {
		reach(p, id)
	}
	reach(p, "compare")
	p.do("press Space", chromedp.KeyEvent(" "))
	p.until(`document.getElementById('compare').ariaChecked === 'true' && !document.getElementById('naive').hidden`)
	reach(p, "naive")

	p = looks[2].open(t, w, w.node.url("/?session=keyboard"))
	p.until(`gapless.state === 'live'`)
	if !eval[bool](p, `document.getElementById('inspector').hidden && document.getElementById('inspect').ariaExpanded === 'false'`) {
		t.Error("on a phone the inspector is open at first")
	}
	reach(p, "inspect")
	p.do("press Enter", chromedp.KeyEvent("\r"))
	p.until(`!document.getElementById('inspector').hidden && document.activeElement.id === 'close' && document.getElementById('inspect').ariaExpanded === 'true'`)
	reach(p, "ask") // nothing is covered
	reach(p, "cut")
	p.do("press Escape", chromedp.KeyEvent(kb.Escape))
	p.until(`document.getElementById('inspector').hidden && document.activeElement.id === 'inspect'`)
	p.looks(looks[0])
	p.until(`!document.getElementById('inspector').hidden`)
}

// axe finds what hinders people with screen readers or weak eyes.
func testAccessible(t *testing.T, w world) {
	at, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	axe, err := os.ReadFile(filepath.Join(at, "node_modules", "axe-core", "axe.min.js"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range looks {
		t.Run(l.String(), func(t *testing.T) {
			t.Parallel()
			session := "axe-" + l.String()
			p := l.open(t, w, w.node.url("/?session="+session))
			p.until(`gapless.state === 'live'`)
			check := func(what string) {
				t.Helper()
				p.run(string(axe))
				p.run(`window.found = undefined; axe.run(document, { resultTypes: ['violations'] }).then((r) => {
					window.found = r.violations.map((v) => v.id + ': ' + v.nodes.map((n) => n.target + ' ' + n.failureSummary).join('; ')); })`)
				p.until(`window.found !== undefined`)
				for _, v := range eval[[]string](p, `found`) {
					t.Errorf("%s: %s", what, v)
				}
				// Nothing is wider than the page.
				if got := eval[int](p, `document.documentElement.scrollWidth - innerWidth`); got > 0 {
					t.Errorf("%s: it is %d px too wide", what, got)
				}
			}
			check("empty")
			w.node.post(t, "/v1/sessions/"+session+"/chunks", []chunk{
				{Type: "message", MessageID: "q", Role: "user", Content: question + strings.Repeat("unbroken", 100)},
				{MessageID: "a", Content: "# One\n\n## Two\n\ntext [link](https://example.com) `code`\n\n```go\n" + strings.Repeat("long ", 200) + "\n```\n\n| a | b |\n|---|---|\n| " + strings.Repeat("c ", 200) + " | d |\n\n> said\n\n- [x] done\n"},
				{Type: "done", MessageID: "a"}, {MessageID: "f", Content: "half"}, {Type: "failed", MessageID: "f", Reason: "model_failed"},
				{MessageID: "c", Content: "half"}, {Type: "cancelled", MessageID: "c"}, {MessageID: "s", Content: "growing"}})
			p.until(`document.querySelector('[data-id=s]')?.dataset.status === 'streaming'`)
			if l.still && eval[string](p, `getComputedStyle(document.querySelector('[data-id=s] .block:last-child > :last-child'), '::after').animationName`) != "none" {
				t.Error("something moves that should not")
			}
			p.run(`document.getElementById('compare').click()`)
			p.until(`gapless.naive.state === 'live'`)
			check("an answer, beside the naive viewer")
			if l.width < 600 {
				p.run(`document.getElementById('inspect').click()`)
				check("the inspector")
				p.run(`document.getElementById('close').click()`)
			}
			p.run(`document.getElementById('compare').click(); document.getElementById('login').hidden = document.getElementById('disconnected').hidden = document.getElementById('problem').hidden = false;
				document.getElementById('problem').textContent = 'A problem.'`)
			check("a problem")
			w.node.post(t, "/v1/sessions/"+session+"/chunks", chunk{Type: "end"})
			p.until(`gapless.state === 'ended' && !document.getElementById('ended').hidden`)
			check("the end")
		})
	}
}

func TestPage_asksNothingInWindowsOfTheBrowser(t *testing.T) {
	files, err := filepath.Glob("*.js")
	if err != nil || len(files) == 0 {
		t.Fatal(err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range []string{"alert(", "prompt(", "confirm("} {
			if strings.Contains(string(text), call) {
				t.Errorf("%s has %s", name, call)
			}
		}
	}
}
