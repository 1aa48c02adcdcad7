package web_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"gapless/api/auth/authtest"
	"gapless/store/storetest"
)

// These tests run gapless.js in a browser's tabs, which share a connection.

// profile opens tabs that share a user's browser profile, separate from all others. Its first tab
// follows nothing, because all others end with it.
type profile struct {
	*tab
	n *node
}

func newProfile(t *testing.T, browser context.Context, n *node) profile {
	return profile{open(t, browser, n.url("/healthz"), chromedp.WithNewBrowserContext()), n}
}

// follows opens a tab that follows a session. before is a script that runs first; options are more
// options of follow, in JavaScript.
func (b profile) follows(session, before, options string) *tab {
	b.t.Helper()
	p := open(b.t, b.ctx, b.n.url("/healthz"))
	p.follow(session, before, options)
	return p
}

func (p *tab) follow(session, before, options string) {
	p.t.Helper()
	p.run(fmt.Sprintf(`%s; window.got = [], window.calls = [], window.sources = new Set();
		import('/gapless.js').then(({ follow }) => {
			window.f = follow('/v1/sessions/%s/stream', {
				onChunk: (c, seq, { source }) => { got.push([String(seq), JSON.stringify(c)]); sources.add(source); },
				onReset: (reason) => calls.push('reset ' + reason),
				onHole: (from, to) => calls.push('hole ' + from + '-' + to),
				onEnd: (reason) => calls.push('end ' + reason),
				%s
			});
		})`, before, session, options))
}

// gotAll checks that a tab received the list, each element once, in order, and these calls of the
// other handlers.
func (p *tab) gotAll(list []string, calls string) {
	p.t.Helper()
	p.until(fmt.Sprintf(`got.length >= %d && calls.join() === %q`, len(list), calls))
	gotAllValues(p.t, list, eval[[][2]string](p, `got`))
	if got := eval[string](p, `[f.gaps, f.doubles, f.resets].join()`); got != "0,0,0" {
		p.t.Errorf("gaps, doubles and resets are %s", got)
	}
}

// leader waits until exactly one of the tabs leads.
func leader(t *testing.T, tabs []*tab) int {
	t.Helper()
	at := -1
	eventually(t, "one tab leads", func() bool {
		count := 0
		for i, p := range tabs {
			if eval[bool](p, `f.leading && f.state === 'live'`) {
				at, count = i, count+1
			}
		}
		return count == 1
	})
	return at
}

// viewers returns how many connections to a session's stream a node has.
func (n *node) viewers(t testing.TB, session string) int {
	t.Helper()
	r, err := n.http.Get(n.url("/v1/sessions/" + session))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var s struct{ Viewers int }
	if err := json.NewDecoder(r.Body).Decode(&s); err != nil {
		t.Fatal(err)
	}
	return s.Viewers
}

// onlyOneViewer checks that so many tabs have one connection, while some chunks come.
func (n *node) onlyOneViewer(t testing.TB, session string) {
	t.Helper()
	eventually(t, "there is one viewer", func() bool { return n.viewers(t, session) == 1 })
	for last, end := 0, len(n.history(t, session))+30; last < end; last = len(n.history(t, session)) {
		if got := n.viewers(t, session); got != 1 {
			t.Fatalf("there are %d viewers", got)
		}
	}
}

func call[P, R any](p *tab, command cdp.Command[P, R], params P) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if _, err := chromedp.Call(ctx, command, params); err != nil {
		p.t.Fatalf("%s: %v", command.Method, err)
	}
}

func TestTabs(t *testing.T) {
	t.Parallel()
	w := world{browser: chromium(t), redis: storetest.Redis(t)}
	w.node = start(t, "-redis", w.redis.URL(), "-heartbeat", "300ms")
	for _, c := range []struct {
		name string
		test func(*testing.T, world)
	}{
		{"share one connection, and whichever goes, however it goes, no other misses a chunk", testHandOver},
		{"a connection that is cut at any byte costs no chunk, by EventSource and by fetch", testCutTab},
		{"seven of them work, though a browser makes six connections", testSevenTabs},
		{"a tab that loses what the leading one tells it reads the log", testDeafTab},
		{"a leading tab that says nothing more is put out of its place", testMuteLeader},
		{"a page that is put away gives up its place, and goes on when it is back", testPutAway},
		{"without locks each has its own connection", testNoLocks},
		{"only those with equal headers share", testHeaders},
		{"and those with a ticket do not", testTicketTabs},
		{"those that were refused come back with the first that is let in", testRefusedTabs},
		{"an end is the server's to say, to all of them", testEndInAll},
		{"and with a ticket, to each", testEndWithTicket},
		{"where another log has ended meanwhile, all of them take that one", testOtherLogInAll},
		{"a log that is lost, deleted and begun again is the same in all of them", testLostInAll},
		{"where the log is gone, and begins again, no tab takes the new one for the old one's rest", testLostAndAbsent},
		{"a tab whose own read stalls reads again", testStalledRead},
		{"a snapshot is each tab's own", testSnapshotTabs},
		{"a connection that died without a word is found when the network or the tab comes back", testDeadConnection},
		{"a page of another origin imports it", testOtherOrigin},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, w) }) // one by one: each has many tabs
	}
}

func testHandOver(t *testing.T, w world) {
	const session = "hand-over"
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	var tabs []*tab
	for range 4 {
		tabs = append(tabs, b.follows(session, "", ""))
	}
	for _, leave := range []struct {
		how string
		do  func(p *tab)
	}{
		{"is closed", func(p *tab) { call(p, page.Close, cdp.Empty{}) }},
		{"crashes", func(p *tab) {
			ctx, cancel := context.WithTimeout(p.ctx, time.Second) // there is no response
			defer cancel()
			_, _ = chromedp.Call(ctx, page.Crash, cdp.Empty{})
		}},
		{"goes to another page", func(p *tab) { p.do("leave", chromedp.Navigate(w.node.url("/readyz"))) }},
		{"closes its follower", func(p *tab) { p.run(`f.close()`) }},
		{"is reloaded", func(p *tab) { p.do("reload", chromedp.Reload()) }},
		{"is closed again", func(p *tab) { call(p, page.Close, cdp.Empty{}) }},
	} {
		at := leader(t, tabs)
		for _, p := range tabs {
			p.until(fmt.Sprintf(`f.state === 'live' && f.seq >= %d`, len(w.node.history(t, session))))
		}
		w.node.onlyOneViewer(t, session)
		leave.do(tabs[at])
		tabs = append(tabs[:at:at], tabs[at+1:]...)
		next := leader(t, tabs)
		t.Logf("a leading tab %s; another leads after %d chunks", leave.how, eval[int](tabs[next], `got.length`))
		tabs = append(tabs, b.follows(session, "", ""))
	}
	finish()
	w.node.post(t, "/v1/sessions/"+session+"/chunks", chunk{Type: "end"})
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	for _, p := range tabs {
		p.gotAll(list, "end ended")
		p.until(`f.state === 'ended' && !f.leading`)
	}
	eventually(t, "nobody views", func() bool { return w.node.viewers(t, session) == 0 })
}

func testCutTab(t *testing.T, w world) {
	const session = "cut"
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	finish := w.node.answers(t, session)
	tabs, lines := []*tab{}, []*proxy{}
	for i, options := range []string{"", `headers: { 'X-Me': 'ann' },`} {
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		line := newProxy(t, w.node)
		line.cuts = []cut{where(`\n()\n`), anywhere(random), where(`}\nid: \d()\d`), anywhere(random), where(`}\nid: \d+\n()\n`)}
		p := open(t, w.browser, line.url("/healthz"), chromedp.WithNewBrowserContext())
		p.follow(session, "", options)
		tabs, lines = append(tabs, p), append(lines, line)
	}
	for i, line := range lines {
		eventually(t, "all cuts are made", func() bool { return len(line.seen()) > len(line.cuts) })
		tabs[i].until(`f.state === 'live'`)
	}
	finish()
	w.node.post(t, "/v1/sessions/"+session+"/chunks", chunk{Type: "end"})
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	for i, p := range tabs {
		p.gotAll(list, "end ended")
		for n, s := range lines[i].seen() {
			t.Logf("tab %d, request %d: Last-Event-ID %q, cut %t, torn %t", i, n, s.cursor, s.cut, s.torn())
		}
	}
}

func testSevenTabs(t *testing.T, w world) {
	const session = "seven"
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	var tabs []*tab
	for range 7 {
		tabs = append(tabs, b.follows(session, "", ""))
	}
	leader(t, tabs)
	for _, p := range tabs {
		p.until(`f.state === 'live'`)
	}
	w.node.onlyOneViewer(t, session)
	finish()
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	for _, p := range tabs {
		p.gotAll(list, "")
	}
}

// The channel loses the messages that window.lost selects.
const lossy = `window.BroadcastChannel = class extends BroadcastChannel {
	set onmessage(handler) { super.onmessage = (e) => { if (!window.lost?.(e)) handler(e); }; }
}`

func testDeafTab(t *testing.T, w world) {
	const session = "deaf"
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	first := b.follows(session, "", "")
	leader(t, []*tab{first})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	second := b.follows(session, lossy+fmt.Sprintf(`; let s = %d; window.dropped = 0; window.lost = () => {
		s = (s * 1103515245 + 12345) %% 2147483648;
		if (s < 644245094) return ++dropped > 0;
	}`, seed%1000000), "")
	second.until(`dropped > 30`)
	// Nothing of the last words comes over the channel, and then it is quiet for a while.
	second.run(`lost = (e) => { dropped++; return e.data.data !== undefined; }`)
	finish()
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	first.gotAll(list, "")
	second.run(`document.dispatchEvent(new Event('visibilitychange'))`) // the tab comes back
	second.gotAll(list, "")
	if !eval[bool](first, `f.leading`) || eval[bool](second, `f.leading`) {
		t.Error("another tab leads now")
	}
	second.until(`sources.has('repaired')`)
}

// A silent leader looks to the others like a frozen one.
func testMuteLeader(t *testing.T, w world) {
	const session = "mute"
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	first := b.follows(session, `window.BroadcastChannel = class extends BroadcastChannel {
		postMessage(m) { if (!window.mute) super.postMessage(m); }
	}`, `silence: 2000,`)
	leader(t, []*tab{first})
	second := b.follows(session, "", `silence: 2000,`)
	second.until(`f.state === 'live' && !f.leading`)
	first.run(`window.mute = true`)
	second.until(`f.leading && f.state === 'live'`)
	first.until(`!f.leading && f.state === 'live'`)
	w.node.onlyOneViewer(t, session)
	finish()
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	first.gotAll(list, "")
	second.gotAll(list, "")
}

func testPutAway(t *testing.T, w world) {
	const session = "away"
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	first := b.follows(session, "", "")
	leader(t, []*tab{first})
	second := b.follows(session, "", "")
	second.until(`f.state === 'live' && !f.leading`)

	call(first, page.SetWebLifecycleState, page.SetWebLifecycleStateParams{State: page.SetWebLifecycleStateStateFrozen})
	second.until(`f.leading && f.state === 'live'`)
	w.node.onlyOneViewer(t, session)
	call(first, page.SetWebLifecycleState, page.SetWebLifecycleStateParams{State: page.SetWebLifecycleStateStateActive})
	first.until(`f.state === 'live' && !f.leading`)

	// It goes to another page, from which the user may return to it unchanged.
	second.run(`dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))`)
	first.until(`f.leading && f.state === 'live'`)
	second.until(`got.length > 0 && !f.leading`)
	w.node.onlyOneViewer(t, session)
	if lead := eval[int](first, `got.length`) - eval[int](second, `got.length`); lead < 20 {
		t.Errorf("a page that was put away is only %d chunks behind: it went on", lead)
	}
	second.run(`dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))`)
	second.until(`f.state === 'live' && !f.leading`)
	finish()
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	first.gotAll(list, "")
	second.gotAll(list, "")
}

func testNoLocks(t *testing.T, w world) {
	const session, none = "no-locks", `Object.defineProperty(navigator, 'locks', { value: undefined })` // as on http://192.168.0.7
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	tabs := []*tab{b.follows(session, none, ""), b.follows(session, none, ""), b.follows(session, "", "shared: false,")}
	for _, p := range tabs {
		p.until(`f.leading && f.state === 'live'`)
	}
	if got := w.node.viewers(t, session); got != len(tabs) {
		t.Errorf("there are %d viewers", got)
	}
	finish()
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	for _, p := range tabs {
		p.gotAll(list, "")
	}
}

func testHeaders(t *testing.T, w world) {
	const session = "headers"
	b := newProfile(t, w.browser, w.node)
	finish := w.node.answers(t, session)
	ann, bob := `headers: { 'X-Me': 'ann' },`, `headers: async () => ({ 'X-Me': 'bob' }),`
	tabs := []*tab{b.follows(session, "", ann), b.follows(session, "", ann), b.follows(session, "", bob), b.follows(session, "", bob), b.follows(session, "", "")}
	for _, p := range tabs {
		p.until(`f.state === 'live'`)
	}
	leader(t, tabs[:2])
	leader(t, tabs[2:4])
	leader(t, tabs[4:])
	eventually(t, "three views", func() bool { return w.node.viewers(t, session) == 3 })
	// The next tab continues by fetch, from its own cursor.
	gone := leader(t, tabs[:2])
	call(tabs[gone], page.Close, cdp.Empty{})
	tabs = append(tabs[:gone:gone], tabs[gone+1:]...)
	leader(t, tabs[:1])
	finish()
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	for _, p := range tabs {
		p.gotAll(list, "")
	}
}

func testTicketTabs(t *testing.T, w world) {
	issuer := authtest.New(t)
	n := start(t, "-auth", issuer.Source())
	b := newProfile(t, w.browser, n)
	token := issuer.Token(time.Hour, authtest.May{"read": {"s"}, "write": {"s"}, "ask": {"s"}, "cancel": {"s"}})
	call := fmt.Sprintf(`const call = (url, init) => fetch(url, { ...init, headers: { ...init?.headers, Authorization: 'Bearer %s' } })`, token)
	tickets := `fetch: call, ticket: async () => (await (await call('/v1/sessions/s/tickets', { method: 'POST' })).json()).ticket,`
	first, second := b.follows("s", call, tickets), b.follows("s", call, tickets)
	first.until(`f.leading && f.state === 'live'`)
	second.until(`f.leading && f.state === 'live'`)

	// Its requests carry the token that fetch adds.
	p := second
	p.run(`f.ask('Why is there a tide?').then((a) => { window.asked = a; })`)
	p.until(`asked.reply_message_id !== undefined && got.some(([, c]) => JSON.parse(c).message_id === asked.reply_message_id)`)
	p.run(`f.stop(asked.reply_message_id).then(() => f.stop('nothing')).catch((err) => { window.refused = err; })`)
	p.until(`window.refused?.status === 404 && refused.problem.code !== undefined && refused.message === refused.problem.detail`)
	first.until(`got.some(([, c]) => JSON.parse(c).type === 'cancelled')`)
}

func testRefusedTabs(t *testing.T, w world) {
	issuer := authtest.New(t)
	n := start(t, "-auth", issuer.Source(), "-auth-cookie", "who")
	b := newProfile(t, w.browser, n)
	tabs := []*tab{b.follows("s", "", ""), b.follows("s", "", "")}
	for _, p := range tabs {
		p.until(`f.state === 'disconnected' && !f.leading`)
	}
	tabs[0].run(fmt.Sprintf(`document.cookie = 'who=%s'; f.restart()`, issuer.Token(time.Hour, authtest.May{"read": {"s"}})))
	for _, p := range tabs {
		p.until(`f.state === 'live'`)
	}
	leader(t, tabs)
}

// Copies of an end come to all tabs, and end none. The last end is the server's.
func testEndInAll(t *testing.T, w world) {
	const from, session, path = "end-from", "end-in-all", "/v1/sessions/end-in-all/chunks"
	b := newProfile(t, w.browser, w.node)
	w.node.post(t, "/v1/sessions/"+from+"/chunks", []chunk{{Content: "a"}, {Content: "b"}, {Type: "end"}})
	if err := w.redis.Copy(t.Context(), "chat:history:"+from, "chat:history:"+session, 0, false).Err(); err != nil {
		t.Fatal(err)
	}
	tabs := []*tab{b.follows(session, "", ""), b.follows(session, "", ""), b.follows(session, "", `headers: { 'X-Me': 'ann' },`)}
	all := func(is string) {
		t.Helper()
		for _, p := range tabs {
			p.until(is)
		}
	}
	all(`got.length === 3 && f.state === 'live'`)
	w.node.post(t, path, chunk{Content: "c"})
	all(`got.length === 4 && f.state === 'live' && calls.length === 0`)
	eventually(t, "two views", func() bool { return w.node.viewers(t, session) == 2 })
	w.node.post(t, path, chunk{Type: "end"})
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	all(`f.state === 'ended' && !f.leading`)
	for _, p := range tabs {
		p.gotAll(list, "end ended")
	}
	eventually(t, "nobody views", func() bool { return w.node.viewers(t, session) == 0 })
	// One tab comes later, and one has the whole log.
	late := b.follows(session, "", "")
	late.gotAll(list, "end ended")
	b.follows(session, "", fmt.Sprintf(`after: %d,`, len(list))).until(`f.state === 'ended' && got.length === 0 && calls.join() === 'end ended'`)
}

// With a ticket, only the stream may be requested.
func testEndWithTicket(t *testing.T, w world) {
	issuer := authtest.New(t)
	n := start(t, "-auth", issuer.Source())
	b := newProfile(t, w.browser, n)
	token := issuer.Token(time.Hour, authtest.May{"read": {"s"}, "write": {"s"}})
	tickets := fmt.Sprintf(`ticket: async () => (await (await fetch('/v1/sessions/s/tickets', { method: 'POST', headers: { Authorization: 'Bearer %s' } })).json()).ticket,`, token)
	p := b.follows("s", "", tickets)
	p.until(`f.state === 'live'`)
	say := func(body string) {
		t.Helper()
		p.run(fmt.Sprintf(`window.posted = 0; fetch('/v1/sessions/s/chunks', { method: 'POST', body: %q, headers: { Authorization: 'Bearer %s', 'Content-Type': 'application/json' } }).then((r) => { posted = r.status; })`, body, token))
		p.until(`posted === 201`)
	}
	say(`[{"content":"a"},{"content":"b"}]`)
	p.until(`got.length === 2`)
	say(`{"type":"end"}`)
	p.until(`f.state === 'ended' && calls.join() === 'end ended' && got.length === 3`)
	b.follows("s", "", tickets+`after: 3,`).until(`f.state === 'ended' && calls.join() === 'end ended' && got.length === 0`)
}

func testOtherLogInAll(t *testing.T, w world) {
	both := make(chan struct{})
	other := func(s says) {
		if s.r.Header.Get("Last-Event-ID") == "3" || s.r.URL.Query().Get("after") == "3" {
			s.nothing("other", "ended")
			return
		}
		s.welcome("other", 0, 3)
		s.chunks(1, 2)
		s.end(3)
	}
	f := newFake(t, session("other", 3, true), append([]func(says){
		func(s says) { s.welcome("e", 0, 3); s.chunks(1, 2, 3); <-both; s.breaks() },
		func(s says) { s.welcome("e", 0, 3); s.chunks(1, 2, 3); s.hang() }, // for the second tab, until it has everything
	}, slices.Repeat([]func(says){other}, 12)...)...)
	first := open(t, w.browser, f.URL+"/style.css", chromedp.WithNewBrowserContext())
	first.follow("s", "", "")
	first.until(`f.leading && f.seq === 3`)
	second := open(t, first.ctx, f.URL+"/style.css")
	second.follow("s", "", "")
	second.until(`f.seq === 3 && f.state === 'live' && !f.leading`)
	close(both)
	for _, p := range []*tab{first, second} {
		p.until(`f.state === 'ended' && calls.join() === 'reset epoch,end ended' && f.epoch === 'other' && f.resets === 1`)
		if got := eval[string](p, `got.map(([seq]) => seq).join()`); got != "1,2,3,1,2,3" {
			t.Errorf("it got %s", got)
		}
	}
}

func testLostInAll(t *testing.T, w world) {
	const session, path = "lost", "/v1/sessions/lost"
	b := newProfile(t, w.browser, w.node)
	tabs := []*tab{b.follows(session, "", ""), b.follows(session, "", ""), b.follows(session, "", "")}
	leader(t, tabs)
	all := func(is string) {
		t.Helper()
		for _, p := range tabs {
			p.until(fmt.Sprintf(`got.map(([seq, c]) => seq + JSON.parse(c).content).join() === %q`, is))
		}
	}
	w.node.post(t, path+"/chunks", []chunk{{Content: "a"}, {Content: "b"}})
	all("1a,2b")
	for _, p := range tabs { // the session's first chunk did not contain the epoch
		p.until(`f.epoch !== ''`)
		p.run(`got = []`)
	}
	if err := w.redis.Del(t.Context(), "chat:history:lost", "chat:session:lost").Err(); err != nil {
		t.Fatal(err)
	}
	w.node.post(t, path+"/chunks", chunk{Content: "c"})
	all("1000001c")
	for _, p := range tabs {
		p.until(`f.resets >= 1 && calls.every((c) => c.startsWith('reset ')) && f.state === 'live'`)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, w.node.url(path), nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil || res.StatusCode != http.StatusNoContent {
		t.Fatalf("%v %v", res, err)
	}
	_ = res.Body.Close()
	for _, p := range tabs {
		p.until(`f.state === 'ended' && calls.slice(-2).join() === 'reset deleted,end deleted'`)
	}
	// A client that creates it and follows it again has what exists then.
	w.node.post(t, path+"/chunks", chunk{Content: "d"})
	for _, p := range tabs {
		p.run(`got = [], calls = [], f.restart()`)
	}
	all("2000001d")
	leader(t, tabs)
}

// A lost log continues where its node says, before the following log has a chunk.
func testLostAndAbsent(t *testing.T, w world) {
	const session, path = "absent", "/v1/sessions/absent"
	b := newProfile(t, w.browser, w.node)
	old := []chunk{{Content: "old"}, {Content: "old"}, {Content: "old"}}
	w.node.post(t, path+"/chunks", old)
	const forget = `onReset: (reason) => { calls.push('reset ' + reason); got = []; },
		onChunk: (c, seq) => {
			if (got.length > 0 && !got.at(-1)[1].includes(c.content)) calls.push(c.content + ' behind ' + got.at(-1)[1]);
			got.push([String(seq), JSON.stringify(c)]);
		},`
	tabs := []*tab{b.follows(session, "", forget), b.follows(session, "", forget)}
	leader(t, tabs)
	tabs = append(tabs, b.follows(session, lossy+`; window.lost = (e) => e.data.reset !== undefined`, forget))
	for _, p := range tabs {
		p.until(`got.length === 3 && f.state === 'live' && f.epoch !== ''`)
	}
	if err := w.redis.Del(t.Context(), "chat:history:"+session, "chat:session:"+session).Err(); err != nil {
		t.Fatal(err)
	}
	for _, p := range tabs[:2] {
		p.until(`f.seq === 1000000 && calls.length === 1`)
	}
	again := chunk{Content: "new"}
	w.node.post(t, path+"/chunks", []chunk{again, again, again, again, again, again}) // at once: before the epoch can be requested
	list := w.redis.LRange(t.Context(), "chat:history:"+session, 0, -1).Val()
	for _, p := range tabs {
		p.until(fmt.Sprintf(`got.length >= %d && f.epoch !== ''`, len(list)))
		gotAllValues(t, list, eval[[][2]string](p, `got.map(([seq, c]) => [String(seq - 1000000), c])`))
		if got := eval[[]string](p, `calls`); len(got) != 1 || !strings.HasPrefix(got[0], "reset ") {
			t.Errorf("it was told %q", got)
		}
	}
}

func testStalledRead(t *testing.T, w world) {
	f := newFake(t, session("e", 2, false),
		func(s says) {
			s.welcome("e", 0, 2)
			s.chunks(1, 2)
			for seq := 3; s.r.Context().Err() == nil; seq++ { // so the leading tab gives signs of life all the time
				s.chunks(seq)
				select {
				case <-time.After(100 * time.Millisecond): // the pace of the producer
				case <-s.r.Context().Done():
				}
			}
		},
		func(s says) { s.welcome("e", 0, 2); s.chunks(1); s.hang() },
		func(s says) {
			s.welcome("e", 1, 2)
			for seq := 2; s.r.Context().Err() == nil; seq++ {
				s.chunks(seq)
				select {
				case <-time.After(10 * time.Millisecond): // faster than the other, so that it catches up
				case <-s.r.Context().Done():
				}
			}
		})
	first := open(t, w.browser, f.URL+"/style.css", chromedp.WithNewBrowserContext())
	first.follow("s", "", "")
	first.until(`f.leading && f.seq > 2`)
	second := open(t, first.ctx, f.URL+"/style.css")
	second.follow("s", "", `silence: 3000,`)
	second.until(`f.seq > 30`)
	if got := eval[string](second, `got.slice(0, 30).map(([seq]) => seq).join()`); !strings.HasPrefix(got, "1,2,3,4,5,6,7,8,9,10,11,") {
		t.Errorf("it got %s", got)
	}
	f.wanted(t, "", "", "1")
}

func testSnapshotTabs(t *testing.T, w world) {
	const session = "snapshot"
	// This is what a page shows of the messages: their text, wherever it came from.
	const text = `window.text = {}, window.snapshots = 0`
	const options = `onSnapshot: (s) => { snapshots++; text = Object.fromEntries(s.messages.map((m) => [m.message_id, m.content])); },
		onChunk: (c) => { text[c.message_id] = (text[c.message_id] ?? '') + (c.content ?? ''); },`
	line := newProxy(t, w.node)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	line.cuts = []cut{where(`event: snapshot\ndata: .()`), anywhere(random), where(`}\nid: \d()\d`), anywhere(random)}
	b := newProfile(t, w.browser, w.node)
	w.node.post(t, "/v1/sessions/"+session+"/chunks", chunk{MessageID: "q", Role: "user", Type: "message", Content: question})
	finish := w.node.answers(t, session)
	cut := open(t, w.browser, line.url("/healthz"), chromedp.WithNewBrowserContext())
	cut.follow(session, text, options)
	tabs := []*tab{cut}
	for i := range 3 {
		p := b.follows(session, text, options)
		p.until(fmt.Sprintf(`snapshots === 1 && f.state === 'live' && f.seq >= %d`, 10*i))
		tabs = append(tabs, p)
	}
	leader(t, tabs[1:])
	eventually(t, "all cuts are made", func() bool { return len(line.seen()) > len(line.cuts) })
	eventually(t, "two views", func() bool { return w.node.viewers(t, session) == 2 })
	finish()
	want := map[string]string{}
	chunks := w.node.history(t, session)
	for _, c := range chunks {
		want[c.MessageID] += c.Content
	}
	for _, p := range tabs {
		p.until(fmt.Sprintf(`f.seq === %d`, len(chunks)))
		if got := eval[map[string]string](p, `text`); !maps.Equal(got, want) {
			t.Errorf("the messages are\n%q, not\n%q", got, want)
		}
		if got := eval[int](p, `snapshots`); got != 1 {
			t.Errorf("there were %d snapshots", got)
		}
	}
}

func testDeadConnection(t *testing.T, w world) {
	const path = "/v1/sessions/dead"
	line := newProxy(t, w.node)
	w.node.post(t, path+"/chunks", chunk{Content: "a"})
	p := open(t, w.browser, line.url("/healthz"), chromedp.WithNewBrowserContext())
	p.follow("dead", "", "")
	for i, comes := range []string{`dispatchEvent(new Event('online'))`, `document.dispatchEvent(new Event('visibilitychange'))`} {
		p.until(fmt.Sprintf(`got.length === %d && f.state === 'live'`, i+1))
		p.run(comes) // nothing is missing, and nothing is requested
		line.goSilent()
		w.node.post(t, path+"/chunks", chunk{Content: "b"})
		if got := len(line.seen()); got != i+1 {
			t.Fatalf("%d requests for the stream, not %d", got, i+1)
		}
		p.run(comes)
	}
	p.until(`got.length === 3 && f.state === 'live' && f.reconnects === 2`)
	// The returning tab need not be the one that holds the connection.
	second := open(t, p.ctx, line.url("/healthz"))
	second.follow("dead", "", "")
	second.until(`got.length === 3 && f.state === 'live'`)
	line.goSilent()
	w.node.post(t, path+"/chunks", chunk{Content: "c"})
	second.run(`document.dispatchEvent(new Event('visibilitychange'))`)
	second.until(`got.length === 4`)
	list := w.redis.LRange(t.Context(), "chat:history:dead", 0, -1).Val()
	p.gotAll(list, "")
	second.gotAll(list, "")
}

func testOtherOrigin(t *testing.T, w world) {
	other := newFake(t, "404") // it has another port
	n := start(t, "-redis", w.redis.URL(), "-cors-origins", strings.TrimSuffix(other.URL, "/"))
	n.post(t, "/v1/sessions/elsewhere/chunks", chunk{Content: "a"})
	p := open(t, w.browser, other.URL+"/style.css", chromedp.WithNewBrowserContext())
	p.run(fmt.Sprintf(`window.got = [];
		import('%[1]s/gapless.js').then(({ follow }) => {
			window.f = follow('%[1]s/v1/sessions/elsewhere/stream', { onChunk: (c) => got.push(c.content), headers: { Authorization: 'Bearer x' } });
			f.ask('Why?');
		})`, n.url("")))
	p.until(`got[0] === 'a' && got[1] === 'Why?'`)
}
