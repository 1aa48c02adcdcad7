package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"gapless/api/auth"
	"gapless/api/auth/authtest"
	"gapless/api/limit"
	"gapless/api/model"
	"gapless/store"
)

// as returns a call from an address, through the proxy that the tests are.
func as(q request, address string) request {
	q.header = map[string]string{"X-Forwarded-For": address}
	return q
}

// proxied makes a node trust the addresses that the tests claim.
func proxied(change func(*setup)) func(*setup) {
	return func(s *setup) {
		l := &s.api.Limits
		l.TrustedProxies, l.Addresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, true
		l.CallerConnections = 0
		change(s)
	}
}

// refusals returns the metric of a limit's refusals.
func (n *node) refusals(limit string) int {
	n.t.Helper()
	line := `gapless_refused_total{limit="` + limit + `"} `
	_, rest, found := strings.Cut(string(n.get("/metrics").body), line)
	number, _, _ := strings.Cut(rest, "\n")
	count, err := strconv.Atoi(number)
	if !found || err != nil {
		n.t.Fatalf("no count of %s", limit)
	}
	return count
}

func paced429(q request) bool {
	return strings.HasPrefix(q.path, "/v1/") || strings.HasPrefix(q.path, "/openai/") || q.path == "/metrics"
}

func isStream(q request) bool { return strings.Contains(q.path, "s/stream") }

func TestLimit_ofURLAndHeaderIsSaidEverywhere(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, q := range calls() {
		long, large := q, q
		mark := "?"
		if strings.Contains(q.path, "?") {
			mark = "&"
		}
		long.path += mark + "x=" + strings.Repeat("x", 8<<10)
		if p := n.do(long).refused(t, 414, "url_too_long"); p.Limit != 8<<10 || !strings.Contains(p.Detail, "-url-max") {
			t.Errorf("%+v", p)
		}
		large.header = map[string]string{"Cookie": strings.Repeat("x", 17<<10)}
		if p := n.do(large).refused(t, 431, "header_too_large"); p.Limit != 16<<10 || !strings.Contains(p.Detail, "-header-max") {
			t.Errorf("%+v", p)
		}
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
	if a := n.do(request{method: "GET", path: "/v1/sessions/s/chunks", header: map[string]string{"Cookie": strings.Repeat("x", 15<<10)}}); a.status != 404 {
		t.Errorf("below the limit: %d", a.status)
	}
}

// clock is a clock for rates that only advance moves.
type clock struct{ at atomic.Int64 }

func stopped() *clock {
	c := &clock{}
	c.at.Store(time.Now().UnixNano())
	return c
}

func (c *clock) now() time.Time { return time.Unix(0, c.at.Load()) }

func (c *clock) advance(d time.Duration) { c.at.Add(int64(d)) }

// One caller has used up its calls. Each further response says when to retry, and no other caller is affected.
func TestLimit_ofCallsIsSaidEverywhereAndIsEachCallersOwn(t *testing.T) {
	t.Parallel()
	clock := stopped()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerCalls, s.api.Limits.Now = 1, clock.now }))
	for range 10 {
		n.do(as(request{method: "GET", path: "/v1/sessions/s"}, "198.51.100.1")).refused(t, 404, "session_not_found")
	}
	for _, q := range calls() {
		if !paced429(q) {
			continue
		}
		if isStream(q) {
			n.sentAway(as(q, "198.51.100.1"), "caller-calls")
			continue
		}
		a := n.do(as(q, "198.51.100.1"))
		p := a.refused(t, 429, "rate_limited")
		if a.header.Get("Retry-After") != "1" || p.Limit != 1 || !strings.Contains(p.Detail, "-caller-calls") {
			t.Errorf("%s %s: Retry-After %q, %+v", q.method, q.path, a.header.Get("Retry-After"), p)
		}
	}
	n.do(as(request{method: "GET", path: "/v1/sessions/s"}, "198.51.100.2")).refused(t, 404, "session_not_found")
	for _, path := range []string{"/healthz", "/readyz"} { // a load balancer may have the same address
		if a := n.do(as(request{method: "GET", path: path}, "198.51.100.1")); a.status != 200 {
			t.Errorf("%s: %d", path, a.status)
		}
	}
	clock.advance(time.Second)
	n.do(as(request{method: "GET", path: "/v1/sessions/s"}, "198.51.100.1")).refused(t, 404, "session_not_found")
	if n.refusals("caller-calls") == 0 {
		t.Error("no refusal was counted")
	}
	if !strings.Contains(n.log.String(), "level=WARN msg=\"a limit is met") {
		t.Error("the log says nothing of it")
	}
}

// sentAway requests a stream that must be refused as EventSource needs it: with 200, a retry time, and no clean end.
func (n *node) sentAway(q request, limit string) {
	n.t.Helper()
	s := n.open(q)
	defer s.stop()
	if s.status != 200 || s.header.Get("Content-Type") != "text/event-stream" || !strings.Contains(s.header.Get("Gapless-Refused"), "(-"+limit+")") {
		n.t.Fatalf("%d %v", s.status, s.header)
	}
	s.end(false)
	if s.retry < 10_000 || s.retry > 30_000 {
		n.t.Errorf("retry: %d", s.retry)
	}
}

// If a token names a subject, the limit applies to the subject, from any address; otherwise to the address.
func TestLimit_ofASubject(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(s *setup, _ *auth.Config) { proxied(func(s *setup) { s.api.Limits.CallerCalls = 1 })(s) })
	token := func(subject string) string {
		claims := jwt.MapClaims{"exp": time.Now().Add(time.Hour).Unix(), "gapless": authtest.May{"read": {"*"}}}
		if subject != "" {
			claims["sub"] = subject
		}
		return issuer.Sign(claims)
	}
	get := func(subject, address string) int {
		return n.do(bearing(as(request{method: "GET", path: "/v1/sessions/s"}, address), token(subject))).status
	}
	for i := range 10 {
		if got := get("kim", fmt.Sprint("198.51.100.", i)); got != 404 {
			t.Fatalf("%d", got)
		}
	}
	if got := get("kim", "198.51.100.77"); got != 429 {
		t.Errorf("a subject has as many calls as addresses: %d", got)
	}
	if got := get("lee", "198.51.100.1"); got != 404 {
		t.Errorf("another subject at the same address: %d", got)
	}
	for range 10 {
		get("", "198.51.100.1")
	}
	if a, b := get("", "198.51.100.1"), get("", "198.51.100.2"); a != 429 || b != 404 {
		t.Errorf("without a subject: %d, and from elsewhere %d", a, b)
	}
}

// The operator's own service acts for all users, so no caller's limit applies to it. Its token identifies it. A token
// to read everything, or to write much, is not enough.
func TestLimit_notOfTheOperatorsOwnService(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(s *setup, _ *auth.Config) {
		proxied(func(s *setup) { s.api.Limits.CallerCalls, s.api.Limits.CallerAppends = 1, 1 })(s)
	})
	for _, c := range []struct {
		may  authtest.May
		held bool
	}{
		{authtest.May{"write": {"*"}}, false}, {authtest.May{"admin": {"*"}}, false},
		{authtest.May{"write": {"s*"}}, true}, {authtest.May{"read": {"*"}, "write": {"s"}}, true},
	} {
		token, refused := issuer.Sign(jwt.MapClaims{"exp": time.Now().Add(time.Hour).Unix(), "sub": fmt.Sprint(c.may), "gapless": c.may}), 0
		for range 30 {
			q := request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"content":"x"}`}
			if n.do(bearing(as(q, "198.51.100.1"), token)).status == 429 {
				refused++
			}
		}
		if c.held != (refused > 0) {
			t.Errorf("%v: %d of 30 appends were refused", c.may, refused)
		}
	}
}

// Viewers take places. If none is free, they are refused and reconnect. They free their places however they end.
func TestLimit_ofViewers(t *testing.T) {
	t.Parallel()
	for _, plain := range []bool{false, true} {
		n := serve(t, proxied(func(s *setup) { s.sse.Plain, s.api.Limits.Viewers, s.api.Limits.CallerViewers = plain, 3, 2 }))
		watch := func(address string) *stream {
			t.Helper()
			s := n.open(as(request{path: "/v1/sessions/s/stream"}, address))
			s.welcome()
			return s
		}
		one, two := watch("198.51.100.1"), watch("198.51.100.1")
		n.sentAway(as(request{path: "/v1/sessions/s/stream"}, "198.51.100.1"), "caller-viewers")
		other := watch("198.51.100.2")
		n.sentAway(as(request{path: "/v1/sessions/s/stream"}, "198.51.100.3"), "viewers")
		one.stop()
		eventually(t, "a place is free", func() bool { return n.api.limits.Viewers.Taken() == 2 })
		three := watch("198.51.100.1")
		for _, s := range []*stream{two, three, other} {
			s.stop()
		}
		eventually(t, "all places are free", func() bool { return n.api.limits.Viewers.Taken() == 0 })
		for _, q := range []request{ // those that never begin
			{path: "/v1/sessions/s/stream?after=x", bad: true}, {path: "/v1/sessions/s/stream?ticket=none"}, {path: "/v1/sessions/s/stream?format=raw", header: map[string]string{"Last-Event-ID": "7"}},
		} {
			n.open(q).stop()
		}
		n.append("s", `{"type":"end"}`)
		for range 5 { // the log has ended: 204, or a clean end
			n.do(request{method: "GET", path: "/v1/sessions/s/stream?after=1"})
			n.do(request{method: "GET", path: "/v1/sessions/s/stream"})
		}
		eventually(t, "all places are free", func() bool { return n.api.limits.Viewers.Taken() == 0 })
		if n.refusals("viewers") != 1 || n.refusals("caller-viewers") != 1 {
			t.Errorf("%d and %d refusals were counted", n.refusals("viewers"), n.refusals("caller-viewers"))
		}
	}
}

// A view of one message counts as a view, and its refusal is a problem in JSON.
func TestLimit_ofViewersOfMessages(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) {
		s.api.Limits.Viewers, s.api.Limits.CallerViewers, s.sse.Feeds, s.sse.Linger = 3, 1, 2, time.Hour
		s.model = newPaced()
	}))
	n.append("s", `{"message_id":"m","content":"sesame"}`)
	n.append("t", `{"message_id":"m","content":"sesame"}`)
	all := []request{
		{method: "GET", path: "/v1/sessions/s/ui-stream"}, {method: "GET", path: "/v1/sessions/s/messages/m/ui-stream"}, {method: "GET", path: "/v1/sessions/s/ui-stream/m/stream"},
		{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody("sesame")},
	}
	one := n.open(as(request{path: "/v1/sessions/s/stream"}, "198.51.100.1"))
	for _, q := range all {
		n.do(as(q, "198.51.100.1")).refused(t, 429, "caller_limit")
	}
	two := n.open(as(request{path: "/v1/sessions/t/stream"}, "198.51.100.2"))
	three := n.open(as(request{path: "/v1/sessions/t/stream"}, "198.51.100.4"))
	for _, q := range all {
		n.do(as(q, "198.51.100.3")).refused(t, 503, "node_limit")
	}
	if got := n.page("s", ""); got.Last != 1 {
		t.Errorf("a question was taken that nobody can see answered: %d", got.Last)
	}
	one.stop()
	two.stop()
	three.stop()
	eventually(t, "all places are free", func() bool { return n.api.limits.Viewers.Taken() == 0 })
	n.ui(t, as(all[0], "198.51.100.1"))
	if n.api.limits.Viewers.Taken() != 1 {
		t.Errorf("%d places are taken", n.api.limits.Viewers.Taken())
	}
	defer n.open(as(request{path: "/v1/sessions/t/stream"}, "198.51.100.2")).stop()
	n.append("u", `{"message_id":"m","content":"sesame"}`) // its log cannot be watched, because both watched logs have viewers
	n.do(as(request{method: "GET", path: "/v1/sessions/u/ui-stream"}, "198.51.100.3")).refused(t, 503, "node_limit")
}

// However many logs strangers request, only a limited number is watched. Each watched log has room for all viewers.
func TestLimit_ofLogsThatAreWatched(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.sse.Feeds, s.sse.Linger = 2, 0 })
	a, b := n.watch("a", ""), n.watch("b", "")
	n.sentAway(request{path: "/v1/sessions/c/stream"}, "feeds")
	n.watch("a", "").welcome()
	a.welcome()
	b.stop()
	eventually(t, "another log is let go", func() bool {
		s := n.open(request{path: "/v1/sessions/c/stream"})
		defer s.stop()
		e, err := s.read()
		return err == nil && e.name == "welcome"
	})
	if n.refusals("feeds") == 0 {
		t.Error("no refusal was counted")
	}
}

func TestLimit_ofUploads(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.Uploads, s.api.Limits.CallerUploads = 2, 1 }))
	const path = "/v1/sessions/s/chunks"
	first := n.beginning(t, path, typeNDJSON, "X-Forwarded-For: 198.51.100.1")
	first.send(line("sesame"))
	n.until("s", 1)
	small := request{method: "POST", path: path, kind: typeNDJSON, body: line("sesame")}
	a := n.do(as(small, "198.51.100.1"))
	if p := a.refused(t, 429, "caller_limit"); a.header.Get("Retry-After") != "5" || p.Limit != 1 || !strings.Contains(p.Detail, "-caller-uploads") {
		t.Errorf("%+v", p)
	}
	into[Stored](t, n.do(as(request{method: "POST", path: path, kind: typeJSON, body: `{"data":0}`}, "198.51.100.1")), 201)
	second := n.beginning(t, path, typeText, "X-Forwarded-For: 198.51.100.2")
	second.send("sesame")
	n.until("s", 3)
	a = n.do(as(small, "198.51.100.3"))
	if p := a.refused(t, 503, "node_limit"); a.header.Get("Retry-After") != "5" || p.Limit != 2 || !strings.Contains(p.Detail, "(-uploads)") {
		t.Errorf("%+v", p)
	}
	first.send("")
	into[Stored](t, first.response(t), 201)
	_ = second.Close() // it breaks off
	eventually(t, "all places are free", func() bool { return n.api.limits.Uploads.Taken() == 0 })
	into[Stored](t, n.do(as(small, "198.51.100.1")), 201)
	into[Problem](t, n.do(as(request{method: "POST", path: path, kind: typeNDJSON, body: "sesame\n"}, "198.51.100.1")), 400)
	if got := n.api.limits.Uploads.Taken(); got != 0 {
		t.Errorf("%d places are taken", got)
	}
}

// until waits for a log to have a number of chunks.
func (n *node) until(session string, last int64) {
	n.t.Helper()
	eventually(n.t, fmt.Sprint(last, " chunks are there"), func() bool {
		b, err := n.store.Describe(context.Background(), session)
		return err == nil && b.Last >= last
	})
}

// Large bodies that wait for their rest take memory, which is limited.
func TestLimit_ofBodies(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) {
		s.api.Limits.Bodies, s.api.Limits.CallerBodies, s.api.BodyMax = 3*400<<10, 3*260<<10, 250<<10
	}))
	const path = "/v1/sessions/s/chunks"
	body := "[" + strings.Repeat(`{"content":"`+strings.Repeat("x", 1<<10)+`"},`, 140) + "{\"data\":0}]" // 142 KiB
	begin := func(address string) (rest *io.PipeWriter, answered chan answer) {
		r, w := io.Pipe()
		answered = make(chan answer, 1)
		go func() { // ends with the body
			q := n.new(as(request{method: "POST", path: path, kind: typeJSON, from: r}, address))
			q.ContentLength = int64(len(body))
			a, err := n.send(q)
			if err != nil {
				t.Error(err)
			}
			answered <- a
		}()
		if _, err := io.WriteString(w, body[:100<<10]); err != nil {
			t.Error(err)
		}
		return w, answered
	}
	all := request{method: "POST", path: path, kind: typeJSON, body: body, bad: true} // the response comes before it was sent
	one, first := begin("198.51.100.1")
	eventually(t, "one body is under way", func() bool { return n.api.limits.Bodies.Taken() == 3*len(body) })
	a := n.do(as(all, "198.51.100.1"))
	if p := a.refused(t, 429, "caller_limit"); a.header.Get("Retry-After") == "" || p.Limit != 3*260<<10 || !strings.Contains(p.Detail, "-caller-bodies") {
		t.Errorf("%+v", p)
	}
	into[Stored](t, n.do(as(request{method: "POST", path: path, kind: typeJSON, body: `{"data":0}`}, "198.51.100.1")), 201)
	two, second := begin("198.51.100.2")
	eventually(t, "two are", func() bool { return n.api.limits.Bodies.Taken() == 2*3*len(body) })
	n.do(as(all, "198.51.100.3")).refused(t, 503, "node_limit")
	for _, w := range []*io.PipeWriter{one, two} {
		if _, err := io.WriteString(w, body[100<<10:]); err != nil {
			t.Error(err)
		}
		_ = w.Close()
	}
	into[Stored](t, within(t, "the first body's answer", first), 201)
	into[Stored](t, within(t, "the second's", second), 201)
	into[Stored](t, n.do(as(request{method: "POST", path: path, kind: typeJSON, from: io.MultiReader(strings.NewReader(body))}, "198.51.100.1")), 201)
	if got := n.api.limits.Bodies.Taken(); got != 0 {
		t.Errorf("%d bytes are counted for nobody", got)
	}
}

// A body that drips times out. A body that progresses, and an upload, do not.
func TestLimit_ofABodysTime(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BodyTimeout = 2 * time.Second })
	for path, kind := range map[string]string{"/v1/sessions": typeJSON, "/v1/sessions/s/chunks": typeJSON, "/v1/sessions/s/cancel": typeJSON, "/v1/sessions/s/messages": typeJSON, "/v1/sessions/s/ui-stream": typeJSON, "/v1/sessions/s/demo": typeJSON, "/openai/v1/responses": typeJSON, "/openai/v1/chat/completions": typeJSON} {
		r, w := io.Pipe()
		stop := make(chan struct{})
		go func() { // ends with the response
			for err := error(nil); err == nil; {
				_, err = w.Write([]byte(" "))
				select {
				case <-stop:
					_ = w.Close()
				case <-time.After(10 * time.Millisecond):
				}
			}
		}()
		q := n.new(request{method: "POST", path: path, kind: kind, from: r, bad: true})
		a, err := n.send(q)
		close(stop)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if p := a.refused(t, 408, "body_too_slow"); !strings.Contains(p.Detail, "-body-timeout") {
			t.Errorf("%+v", p)
		}
	}

	// 64 KiB in each period are enough, however long the body takes.
	r, w := io.Pipe()
	go func() { // ends with the body
		piece := bytes.Repeat([]byte(" "), 16<<10)
		for range 48 {
			_, _ = w.Write(piece)
			<-time.After(100 * time.Millisecond)
		}
		_, _ = w.Write([]byte(`{"data":0}`))
		_ = w.Close()
	}()
	begun := time.Now()
	into[Stored](t, n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, from: r}), 201)
	if took := time.Since(begun); took < 4*time.Second {
		t.Errorf("it took %v: it was no slow body", took)
	}

	// An upload, and a plain stream, may be silent for longer.
	u := n.beginning(t, "/v1/sessions/s/chunks", typeNDJSON)
	u.send(line("a"))
	n.until("s", 2)
	s := n.open(request{path: "/v1/sessions/s/stream?format=raw"})
	<-time.After(4200 * time.Millisecond)
	u.send(line("b"))
	u.send("")
	into[Stored](t, u.response(t), 201)
	n.post("/v1/sessions/s/chunks", typeEvents, "data: c\n\n")
	for said := ""; said != "data: c\n"; {
		var err error
		if said, err = s.body.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
}

// A body that no handler reads has the same timeout.
func TestLimit_ofTheTimeOfABodyThatNobodyReads(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BodyTimeout = 300 * time.Millisecond })
	c := n.raw(t)
	fmt.Fprint(c, "POST /v1/sessions/s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
	if a := c.response(t); a.status != 201 {
		t.Errorf("%d", a.status)
	}
	if _, err := c.ReadByte(); err == nil {
		t.Error("the connection goes on")
	}
}

// New sessions count for the caller that creates them, in whatever way. Existing sessions accept every append.
func TestLimit_ofNewSessions(t *testing.T) {
	t.Parallel()
	clock := stopped()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerSessions, s.api.Limits.Now, s.model = 1, clock.now, says("yes") }))
	const me, other = "198.51.100.1", "198.51.100.2"
	appendTo := func(id, address, kind, body string) answer {
		return n.do(as(request{method: "POST", path: "/v1/sessions/" + id + "/chunks", kind: kind, body: body}, address))
	}
	for i := range 9 {
		into[Stored](t, appendTo(fmt.Sprint("s", i), me, typeJSON, `{"data":0}`), 201)
	}
	n.do(as(request{method: "POST", path: "/v1/sessions/s9"}, me))
	for _, q := range []request{
		{method: "POST", path: "/v1/sessions"}, {method: "POST", path: "/v1/sessions/new"},
		{method: "POST", path: "/v1/sessions/new/chunks", kind: typeJSON, body: `{"data":0}`},
		{method: "POST", path: "/v1/sessions/new/chunks", kind: typeNDJSON, body: line("a")},
		{method: "POST", path: "/v1/sessions/new/chunks", kind: typeText, body: "a"},
		{method: "POST", path: "/v1/sessions/new/messages", kind: typeJSON, body: `{"content":"why?"}`},
	} {
		a := n.do(as(q, me))
		if p := a.refused(t, 429, "rate_limited"); a.header.Get("Retry-After") != "1" || !strings.Contains(p.Detail, "-caller-sessions") {
			t.Errorf("%s %s: %+v", q.method, q.path, p)
		}
	}
	into[Stored](t, appendTo("s0", me, typeJSON, `{"data":0}`), 201)
	into[Stored](t, appendTo("s0", me, typeNDJSON, line("a")), 201)
	n.do(as(request{method: "GET", path: "/v1/sessions/new"}, other)).refused(t, 404, "session_not_found")
	into[Stored](t, appendTo("new", other, typeJSON, `{"data":0}`), 201)
	if n.api.limits.Answers.Taken() != 0 {
		t.Error("an answer that was refused has a place")
	}
	clock.advance(time.Second)
	into[Stored](t, appendTo("newer", me, typeJSON, `{"data":0}`), 201)
}

// Chunks that arrive too fast are refused if nothing of them was read, and otherwise read slowly.
func TestLimit_ofAppends(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerAppends = 20 }))
	const me = "198.51.100.1"
	begun := time.Now()
	post := func(kind, body string) answer {
		return n.do(as(request{method: "POST", path: "/v1/sessions/s/chunks", kind: kind, body: body}, me))
	}
	large := `{"content":"` + strings.Repeat("x", 50<<10) + `"}`
	for range 3 { // each costs 51
		into[Stored](t, post(typeJSON, large), 201)
	}
	into[Stored](t, post(typeJSON, "["+strings.Repeat("{\"data\":0},", 39)+"{\"data\":0}]"), 201)
	a := post(typeJSON, large)
	if p := a.refused(t, 429, "rate_limited"); p.Limit != 20 || !strings.Contains(p.Detail, "-caller-appends") {
		t.Errorf("%+v", p)
	}
	if after, _ := strconv.Atoi(a.header.Get("Retry-After")); after < 1 || after > 3 {
		t.Errorf("Retry-After: %s", a.header.Get("Retry-After"))
	}
	into[Stored](t, post(typeNDJSON, strings.Repeat(line("a"), 40)), 201)
	if took := time.Since(begun); took < 1600*time.Millisecond { // 200 at once, and 33 more
		t.Errorf("153 for large ones, 40 and 40 lines took %v, at 20 a second", took)
	}
	into[Stored](t, n.do(as(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: large}, "198.51.100.2")), 201)
}

// The decoded size of a compressed upload counts even if it makes no chunks: gzip makes blank lines a thousand times
// smaller.
func TestLimit_ofWhatIsDecoded(t *testing.T) {
	t.Parallel()
	for kind, silent := range map[string]string{typeNDJSON: "\n", typeEvents: ":\n"} {
		n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerAppends = 20 }))
		begun := time.Now()
		q := coded("/v1/sessions/s/chunks", kind, "gzip", gzipped(strings.Repeat(silent, 250*paceBytes/len(silent))+"data: x\n\n"))
		if kind == typeNDJSON {
			q.body = gzipped(strings.Repeat(silent, 250*paceBytes) + line("x"))
		}
		q.header["X-Forwarded-For"] = "198.51.100.1"
		into[Stored](t, n.do(q), 201)
		if took := time.Since(begun); took < time.Second {
			t.Errorf("%s: it took %v, at 20 a second", kind, took)
		}
	}
}

// A caller that has reached its daily limit of stored bytes cannot store more in any way, and learns when it may
// continue. Chunks that end a message are still accepted, and so are other callers.
func TestLimit_ofBytesStored(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerStored = 150 << 10 }))
	const me, other = "198.51.100.1", "198.51.100.2"
	post := func(who, kind, body string) answer {
		return n.do(as(request{method: "POST", path: "/v1/sessions/s/chunks?message_id=m", kind: kind, body: body}, who))
	}
	large := `{"content":"` + strings.Repeat("x", 50<<10) + `"}`
	for range 3 {
		into[Stored](t, post(me, typeJSON, large), 201)
	}
	for kind, body := range map[string]string{typeJSON: `{"content":"x"}`, typeNDJSON: `{"content":"x"}`, "text/plain": "x", "text/event-stream": "data: x\n\n"} {
		a := post(me, kind, body)
		p := a.refused(t, 429, "storage_limited")
		if p.Limit != 150<<10 || !strings.Contains(p.Detail, "-caller-stored") || !strings.Contains(p.Detail, "per caller and day") {
			t.Errorf("%s: %+v", kind, p)
		}
		if after, _ := strconv.Atoi(a.header.Get("Retry-After")); after < 1 || after > 24*3600 {
			t.Errorf("%s: Retry-After: %s", kind, a.header.Get("Retry-After"))
		}
	}
	a := n.do(as(request{method: "POST", path: "/v1/sessions/s/messages", kind: typeJSON, body: `{"content":"x"}`}, me))
	a.refused(t, 429, "storage_limited")
	n.do(as(request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody("x")}, me)).refused(t, 429, "storage_limited")
	into[Stored](t, post(me, typeJSON, `{"type":"done"}`), 201)
	into[Stored](t, n.do(as(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: large}, other)), 201)
	if got := n.refusals("caller-stored"); got != 6 {
		t.Errorf("%d refusals are counted", got)
	}
}

// One script stores an array whole, so the size of its chunks is limited. A single chunk may be larger.
func TestLimit_ofABatchsBytes(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BatchBytes = 2000 })
	text := `{"content":"` + strings.Repeat("x", 900) + `"}`
	p := n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: "[" + text + "," + text + "," + text + "]"}).refused(t, 413, "batch_too_large")
	if p.Limit != 2000 || !strings.Contains(p.Detail, "-batch-bytes") {
		t.Errorf("%+v", p)
	}
	n.append("s", "["+text+","+text+"]")
	n.append("s", `[{"content":"`+strings.Repeat("x", 5000)+`"}]`)
}

func TestLimit_ofTickets(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerTickets, s.api.Limits.Now = 1, stopped().now }))
	make := request{method: "POST", path: "/v1/sessions/s/tickets"}
	for range 10 {
		if a := n.do(as(make, "198.51.100.1")); a.status != 201 {
			t.Fatalf("%d", a.status)
		}
	}
	a := n.do(as(make, "198.51.100.1"))
	if p := a.refused(t, 429, "rate_limited"); a.header.Get("Retry-After") != "1" || !strings.Contains(p.Detail, "-caller-tickets") {
		t.Errorf("%+v", p)
	}
	if a := n.do(as(make, "198.51.100.2")); a.status != 201 {
		t.Errorf("%d", a.status)
	}
}

// All callers share the places for answers, and one caller leaves some to others.
func TestLimit_ofAnswers(t *testing.T) {
	t.Parallel()
	going := make(chan struct{})
	n := serve(t, proxied(func(s *setup) {
		s.api.Limits.CallerAnswers = 1
		s.model = answers(func(ctx context.Context, _ []model.Turn) iter.Seq2[model.Piece, error] {
			return func(func(model.Piece, error) bool) { <-going }
		})
	}))
	ask := request{method: "POST", path: "/v1/sessions/s/messages", kind: typeJSON, body: `{"content":"why?"}`}
	if a := n.do(as(ask, "198.51.100.1")); a.status != 202 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if p := n.do(as(ask, "198.51.100.1")).refused(t, 429, "model_busy"); p.Limit != 1 || !strings.Contains(p.Detail, "-caller-answers") {
		t.Errorf("%+v", p)
	}
	if a := n.do(as(ask, "198.51.100.2")); a.status != 202 {
		t.Errorf("%d %s", a.status, a.body)
	}
	close(going)
	eventually(t, "all places are free", func() bool { return n.api.limits.Answers.Taken() == 0 })
}

// The number of messages and producers of a session is limited. Known ones continue, and no other begins.
func TestLimit_ofASessionsNames(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.NamesMax = 3 })
	const path = "/v1/sessions/s/chunks"
	n.append("s", `[{"message_id":"m1"},{"type":"message","message_id":"q"}]`)
	n.do(numbered(request{method: "POST", path: path, kind: typeJSON, body: `{"message_id":"m1"}`}, "p", 0))
	more := 0
	for more < 20 && n.post(path, typeJSON, fmt.Sprintf(`{"message_id":"n%d","type":"done"}`, more)).status == 201 {
		more++
	}
	if more < 1 || more > 12 { // besides m1 and p; the dozen is for the hash itself
		t.Errorf("%d more messages were begun", more)
	}
	for _, c := range []struct {
		q     request
		chunk int
	}{
		{request{method: "POST", path: path, kind: typeJSON, body: `[{"message_id":"m1"},{"data":0},{"message_id":"m3"}]`}, 2},
		{request{method: "POST", path: path, kind: typeNDJSON, body: `{"message_id":"m3","type":"done"}` + "\n"}, 0},
		{request{method: "POST", path: path, kind: typeText, body: "a"}, -1},
		{request{method: "POST", path: path + "?message_id=m3&lease=5s", kind: typeJSON, body: `[]`}, -1},
		{request{method: "POST", path: "/v1/sessions/s/messages", kind: typeJSON, body: `{"content":"why?"}`}, -1},
		{request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody("why?")}, -1},
		{numbered(request{method: "POST", path: path, kind: typeJSON, body: `{"data":0}`}, "p2", 0), -1},
	} {
		p := n.do(c.q).refused(t, 409, "session_full")
		if p.Limit != 3 || !strings.Contains(p.Detail, "-session-names") || c.chunk >= 0 && (p.Chunk == nil || *p.Chunk != c.chunk) {
			t.Errorf("%s %s: %+v", c.q.path, c.q.body, p)
		}
	}
	n.append("s", `[{"message_id":"m1"},{"message_id":"m1","type":"done"},{"data":0}]`)
	if a := n.do(numbered(request{method: "POST", path: path, kind: typeJSON, body: `{"data":0}`}, "p", 1)); a.status != 201 {
		t.Errorf("the producer that it knows: %d %s", a.status, a.body)
	}
	if got := len(n.contents("s")); got != 7+more {
		t.Errorf("the log has %d chunks, not %d", got, 7+more)
	}
}

func numbered(q request, id string, number int) request {
	q.header = map[string]string{headerProducerID: id, headerProducerEpoch: "0", headerProducerChunk: strconv.Itoa(number)}
	return q
}

func TestLimit_ofDepth(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	const path = "/v1/sessions/s/chunks"
	nested := func(depth int) string {
		return `{"data":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + "}"
	}
	for _, depth := range []int{store.MaxDepth + 1, 10_000, 30_000} {
		for _, kind := range []string{typeJSON, typeNDJSON} {
			if p := n.do(request{method: "POST", path: path, kind: kind, body: nested(depth), bad: true}).refused(t, 400, "chunk_too_deep"); p.Limit != store.MaxDepth {
				t.Errorf("%+v", p)
			}
		}
		p := n.do(request{method: "POST", path: path, kind: typeJSON, body: "[{\"data\":0}," + nested(depth) + "]", bad: true})
		if depth < 10_000 {
			if p := p.refused(t, 400, "chunk_too_deep"); p.Chunk == nil || *p.Chunk != 1 {
				t.Errorf("%+v", p)
			}
		} else if p.status != 400 {
			t.Errorf("%d %s", p.status, p.body)
		}
	}
	n.append("s", nested(store.MaxDepth))
	n.append("s", `{"content":"`+strings.Repeat("[{", 200)+`\"","data":[`+strings.Repeat("[],", 200)+"1]}") // many brackets, but not deep
	for _, body := range []string{strings.Repeat("[", 10_000), strings.Repeat(`{"a":`, 3000)} {
		for _, path := range []string{"/v1/sessions", "/v1/sessions/s/messages", "/v1/sessions/s/cancel"} {
			if a := n.do(request{method: "POST", path: path, kind: typeJSON, body: body, bad: true}); a.status != http.StatusBadRequest {
				t.Errorf("%s: %d %s", path, a.status, a.body)
			}
		}
	}
}

func TestConfig_limitsThatAreNone(t *testing.T) {
	c := DefaultConfig()
	c.URLMax, c.HeaderMax, c.BatchMax, c.BodyTimeout, c.Limits.Viewers = 1, 1, 0, 0, -1
	err := c.Validate()
	for _, flag := range []string{"-url-max", "-header-max", "-batch-max", "-body-timeout", "-viewers"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("nothing of %s: %v", flag, err)
		}
	}
	if e := limit.Feeds(7).Error(); !strings.Contains(e, "limit of 7 watched logs of this node reached (-feeds)") {
		t.Error(e)
	}
}
