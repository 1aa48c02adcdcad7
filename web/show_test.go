package web_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"gapless/api/auth/authtest"
)

// The show asks, cuts both viewers twice, and says how much each has lost. This test counts that, too: from what the
// page shows, and from the log.
func TestShow_countsWhatEachViewerHasLost(t *testing.T) {
	t.Parallel()
	w := world{browser: chromium(t), node: start(t)}
	for _, l := range []look{looks[0], looks[2]} {
		t.Run(l.String(), func(t *testing.T) {
			t.Parallel()
			line := newProxy(t, w.node)
			session := "show-" + l.String()
			w.node.post(t, "/v1/sessions/"+session+"/chunks", []chunk{{MessageID: "old", Content: "said before"}, {Type: "done", MessageID: "old"}})
			p := l.open(t, w, line.url("/?session="+session))
			p.until(`gapless.state === 'live' && !document.getElementById('demo').hidden`)
			p.run(`window.told = []; new MutationObserver(() => {
				const what = document.getElementById('shown-what').textContent;
				if (what !== told.at(-1)) told.push(what);
			}).observe(document.getElementById('shown'), { childList: true, subtree: true, characterData: true })`)
			if l.width < 600 {
				p.press("#inspect")
				p.until(`!document.getElementById('inspector').hidden`)
			}
			p.press("#inspector .show")
			p.until(`document.getElementById('shown').classList.contains('result')`)
			chunks := w.node.history(t, session)
			p.showsTheHistory(w.node, session)
			asked, last := chunks[2].Seq, chunks[len(chunks)-1].Seq
			if chunks[2].Role != "user" || last < 100 {
				t.Fatalf("after %+v there are %d chunks", chunks[2], last)
			}

			// What the naive viewer shows is short of exactly what it says.
			lost, still := eval[[]int64](p, `gapless.naive.lost`), eval[int](p, `gapless.naive.missing`)
			want := fmt.Sprintf("Gapless: 0 lost, naive viewer: %d lost.", len(lost))
			if got := p.text("shown-what"); got != want || len(lost) == 0 || still == 0 {
				t.Errorf("it says %q, not %q; %d are missing", got, want, still)
			}
			for _, seq := range lost {
				if seq < asked || seq > last {
					t.Errorf("%d is counted, of the chunks %d to %d", seq, asked, last)
				}
			}
			how := p.text("shown-how")
			if !strings.HasPrefix(how, fmt.Sprintf("%d chunks, 2 cuts, 300 ms between", last-asked+1)) ||
				len(lost) > still && !strings.HasSuffix(how, fmt.Sprintf(" Of the %d, %d came back when it read the history again, and %d are still missing.", len(lost), len(lost)-still, still)) {
				t.Errorf("it says %q", how)
			}
			gap := regexp.MustCompile(`✕ (\d+)(?:–(\d+))? lost`).FindStringSubmatch(eval[string](p, `document.querySelector('#naive-log mark').textContent`))
			shown := eval[string](p, `document.getElementById('naive-log').textContent`)
			var from, to int64
			if gap == nil {
				t.Fatalf("there is no gap in %q", shown)
			}
			_, _ = fmt.Sscan(gap[1], &from)
			if _, err := fmt.Sscan(gap[2], &to); err != nil {
				to = from
			}
			if from < asked || to > last || int(to-from)+1 > still {
				t.Errorf("the first gap is %v, of %d", gap, still)
			}

			// Both connections were really cut, twice.
			if got := eval[string](p, `told.join('\n')`); strings.Count(got, "have lost their connection") != 2 || strings.Count(got, "both are back") != 2 {
				t.Errorf("it said %q", got)
			}
			if streams, reconnects := len(line.seen()), eval[int](p, `gapless.reconnects`); streams != 3 || reconnects != 2 {
				t.Errorf("%d streams, %d reconnects", streams, reconnects)
			}

			// The link leads to the gap.
			p.press("#to-gap")
			p.until(`(() => {
				const gap = document.querySelector('#naive-log mark').getBoundingClientRect();
				const view = document.getElementById('naive').getBoundingClientRect();
				return document.activeElement === document.querySelector('#naive-log mark') && gap.top >= view.top && gap.bottom <= view.bottom;
			})()`)
			p.run(`document.getElementById('compare').click()`)
			p.until(`document.getElementById('shown').hidden`)
		})
	}
}

// Without a connection the page says so where the reader is: after the last word.
func TestPage_saysAtTheCursorThatTheConnectionIsLost(t *testing.T) {
	w := world{browser: chromium(t), node: start(t)}
	line := newProxy(t, w.node)
	p := looks[2].open(t, w, line.url("/?session=cursor"))
	p.until(`gapless.state === 'live'`)
	path := "/v1/sessions/cursor/chunks"
	for i, c := range []struct{ id, role, text, at string }{
		{"tool", "tool", "plain", `[data-id=tool] .text`},
		{"p", "assistant", "a paragraph", `[data-id=p] .block > p`},
		{"l", "assistant", "- a list\n- of two", `[data-id=l] .block li:last-child`},
		{"c", "assistant", "```js\ncode", `[data-id=c] .block code`},
	} {
		w.node.post(t, path, chunk{MessageID: c.id, Role: c.role, Content: c.text})
		cursor := fmt.Sprintf(`(getComputedStyle(document.querySelector('#log article%s'), '::after').content)`, c.at)
		p.until(fmt.Sprintf(`gapless.state === 'live' && gapless.reconnects === %d && document.querySelector('#log article%s') !== null`, i, c.at))
		p.until(cursor + ` === '""'`)
		line.goOffline()
		p.until(`gapless.state === 'waiting to reconnect'`)
		p.until(cursor + ` === '"connection lost, reconnecting…"'`)
		line.goOnline(0)
		p.until(cursor + ` === '""'`)
		w.node.post(t, path, chunk{Type: "done", MessageID: c.id})
		p.until(cursor + ` === 'none'`)
	}
	p.asks(w.node, "cursor", "r")
	line.goOffline()
	p.until(`document.getElementById('waiting').innerText.startsWith('The connection is lost.')`)
	line.goOnline(0)
	p.until(`document.getElementById('waiting').innerText.startsWith('The answer is on its way')`)
}

// Whatever the server refuses, the page says what can be done, and offers it.
func TestPage_hasNoDeadEnd(t *testing.T) {
	issuer := authtest.New(t)
	w := world{browser: chromium(t), node: start(t, "-auth", issuer.Source(), "-demo")}
	public := start(t)
	token := func(action, session string) string { return issuer.Token(time.Hour, authtest.May{action: {session}}) }
	paste := func(p *tab, token string) {
		p.run(fmt.Sprintf(`document.getElementById('token').value = %q; document.getElementById('login').requestSubmit()`, token))
	}
	// offers checks the heading, and what can be pressed.
	offers := func(p *tab, heading string, want ...string) {
		t.Helper()
		p.until(fmt.Sprintf(`!document.getElementById('blank').hidden && document.getElementById('blank-title').innerText === %q`, heading))
		all := `['reconnect', 'another', 'fresh', 'login', 'ask'].filter((id) => document.getElementById(id).checkVisibility()).join()`
		p.until(all + fmt.Sprintf(` === %q`, strings.Join(want, ",")))
	}
	for _, l := range []look{looks[0], looks[2]} {
		t.Run(l.String(), func(t *testing.T) {
			p := l.open(t, w, w.node.url("/?session=mine"))
			offers(p, "A token is needed", "login", "ask")
			paste(p, "sesame")
			p.until(`document.getElementById('problem').checkVisibility()`)
			offers(p, "A token is needed", "login", "ask")

			paste(p, token("read", "other"))
			offers(p, "This conversation is not open to you", "another", "fresh", "ask")
			p.press("#another")
			p.until(`document.activeElement.id === 'token'`)
			paste(p, token("read", "mine"))
			p.until(`gapless.state === 'live' && document.getElementById('disconnected').hidden && document.getElementById('blank').hidden`)

			// The token allows reading, and no question.
			p.types(question)
			p.press("#send")
			p.until(`document.getElementById('problem').checkVisibility() && document.getElementById('another').checkVisibility() && !document.getElementById('reconnect').checkVisibility()`)
			p.press("#another")
			paste(p, issuer.Token(time.Hour, authtest.May{"read": {"mine"}, "ask": {"mine"}}))
			p.until(`gapless.state === 'live'`)
			p.press("#send")
			p.until(`document.getElementById('ask').value === '' && document.getElementById('disconnected').hidden`)

			for _, id := range []string{"a%20b", "..", "a%2Fb", strings.Repeat("x", 129), strings.Repeat("x", 8180)} {
				p = l.open(t, w, public.url("/?session="+id))
				offers(p, "This address names no conversation", "fresh")
			}
			p.press("#fresh")
			p.until(`gapless.state === 'live' && gapless.seq === 0 && document.getElementById('ask').checkVisibility()`)

			// A conversation without a word has a heading, whatever its state.
			p.until(`document.querySelector('#empty:not([hidden]) h2').checkVisibility()`)
			session := "ended-" + l.String()
			public.post(t, "/v1/sessions/"+session+"/chunks", chunk{Type: "end"})
			p = l.open(t, w, public.url("/?session="+session))
			offers(p, "This conversation has ended")
		})
	}
}

// On a phone the inspector leaves the upper half to the conversation, so that a cut is seen in both.
func TestPage_theInspectorIsHalfASheetOnAPhone(t *testing.T) {
	w := world{browser: chromium(t), node: start(t)}
	line := newProxy(t, w.node)
	p := looks[3].open(t, w, line.url("/?session=sheet"))
	p.until(`gapless.state === 'live' && !document.getElementById('demo').hidden`)
	w.node.post(t, "/v1/sessions/sheet/chunks", chunk{MessageID: "m", Content: "It grows, and a long line of it is broken."})
	p.until(`document.querySelector('[data-id=m]') !== null`)
	if !eval[bool](p, `!document.querySelector('.range').checkVisibility()`) {
		t.Error("the label of the chunks is shown without the inspector")
	}
	p.press("#inspect")
	p.until(`document.querySelector('.range').checkVisibility()`)
	seen := func(selector, in string) {
		t.Helper()
		p.until(fmt.Sprintf(`(() => {
			const it = document.querySelector('%s').getBoundingClientRect();
			const view = document.querySelector('%s').getBoundingClientRect();
			return it.height > 0 && it.top >= view.top && it.bottom <= view.bottom && it.bottom <= innerHeight;
		})()`, selector, in))
	}
	for _, id := range []string{"plot", "cut"} {
		seen("#"+id, "#inspector")
	}
	seen("[data-id=m] .text", "#scroll")
	seen("#ask", "#chat")
	if got := eval[float64](p, `document.getElementById('inspector').getBoundingClientRect().height / innerHeight`); got < 0.4 || got > 0.55 {
		t.Errorf("the inspector has %.2f of the height", got)
	}
	if got := eval[float64](p, `document.getElementById('inspector').getBoundingClientRect().top - document.getElementById('chat').getBoundingClientRect().bottom`); got < 0 {
		t.Errorf("the inspector covers %v px of the conversation", -got)
	}
	p.press("#cut")
	p.until(`gapless.state === 'waiting to reconnect' && document.body.classList.contains('lost')`)
	p.until(`gapless.state === 'live' && gapless.reconnects === 1`)
	p.press("#compare")
	p.until(`gapless.naive.state === 'live'`)
	p.do("press Escape", chromedp.KeyEvent("\u001b"))
	p.until(`document.getElementById('inspector').hidden && !document.querySelector('.range').checkVisibility()`)
}

// The reference is one press away, and an address that does not exist is a page, too.
func TestPage_leadsToTheReference(t *testing.T) {
	w := world{browser: chromium(t), node: start(t)}
	p := looks[0].open(t, w, w.node.url("/?session=reference"))
	p.until(`gapless.state === 'live'`)
	p.press("#reference")
	p.until(`location.pathname === '/docs'`)
	for _, l := range looks[1:3] {
		p = l.open(t, w, w.node.url("/?session=reference"))
		for _, page := range []string{"/docs", "/docs/guide"} {
			link := `#empty .more a[href="` + page + `"]`
			p.do("open the page", chromedp.Navigate(w.node.url("/?session=reference")))
			p.until("document.querySelector('" + link + "')?.checkVisibility()")
			p.press(link)
			p.until(`location.pathname === '` + page + `'`)
		}
		p.do("open an unknown address", chromedp.Navigate(w.node.url("/nothing")))
		p.until(`document.querySelector('#lost h2')?.innerText === 'There is no page at this address' && getComputedStyle(document.querySelector('#lost .button')).borderStyle === 'solid'`)
		p.press("#lost .button")
		p.until(`location.pathname === '/' && gapless.state === 'live'`)
	}
}
