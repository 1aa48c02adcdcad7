package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/api/auth/authtest"
	"gapless/store"
	"gapless/store/storetest"
)

// locked returns a node that requires tokens of an issuer.
func locked(t testing.TB, change func(*setup, *auth.Config)) (*node, *authtest.Issuer) {
	t.Helper()
	issuer := authtest.New(t)
	cfg := auth.DefaultConfig()
	cfg.Source = issuer.Source()
	return serve(t, func(s *setup) {
		cfg.Logger = s.api.Logger
		if change != nil {
			change(s, &cfg)
		}
		a, err := auth.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(a.Close)
		s.api.Auth = a
	}), issuer
}

// bearing returns a request with a token.
func bearing(q request, token string) request {
	all := map[string]string{"Authorization": "Bearer " + token}
	maps.Copy(all, q.header)
	q.header = all
	return q
}

// needs returns the action that a call of the contract needs, as in the contract's table.
func needs(q request) string {
	path, _, _ := strings.Cut(q.path, "?")
	switch {
	case q.path == "/openai/v1/responses", isCompletion(q): // these calls also read
		return "ask"
	case q.method == "GET", isTickets(q), strings.HasSuffix(path, "/demo"):
		return "read"
	case q.method == "DELETE":
		return "admin"
	case strings.HasSuffix(path, "/messages"), strings.HasSuffix(path, "/ui-stream"): // this call also reads
		return "ask"
	case strings.HasSuffix(path, "/cancel"), strings.HasSuffix(path, "/stop"):
		return "cancel"
	}
	return "write"
}

// isCompletion reports whether a call makes its own session.
func isCompletion(q request) bool { return strings.HasSuffix(q.path, "/completions") }

var everyAction = []string{"read", "write", "ask", "cancel", "admin"}

// guardedCalls returns the calls that need a permission.
func guardedCalls() (all []request) {
	for _, q := range calls() {
		if (strings.HasPrefix(q.path, "/v1/") || strings.HasPrefix(q.path, "/openai/")) && (q.method != "GET" || q.path != "/v1/sessions") { // the list belongs to no session
			all = append(all, q)
		}
	}
	return all
}

func TestAccess_everyRouteOfV1IsGuarded(t *testing.T) {
	t.Parallel()
	n, _ := locked(t, nil)
	found := 0
	for _, r := range n.api.echo.Routes() {
		if !strings.HasPrefix(r.Path, "/v1") && !strings.HasPrefix(r.Path, "/openai/") {
			continue
		}
		if r.Method != http.MethodHead { // HEAD repeats GET
			found++
		}
		for _, id := range []string{"s", "a%20b"} {
			a := n.do(request{method: r.Method, path: strings.ReplaceAll(r.Path, ":id", id), bad: true})
			if r.Method == http.MethodHead && a.status == 401 { // the body, which HEAD does not have, says why
				continue
			}
			a.refused(t, 401, "unauthorized")
		}
	}
	for _, q := range guardedCalls() {
		path, _, _ := strings.Cut(q.path, "?")
		if !slices.ContainsFunc(n.api.echo.Routes(), func(r *echo.Route) bool {
			return r.Method == q.method && strings.NewReplacer(":id", "s", ":message_id", "m", responsePath, oneResponse).Replace(r.Path) == path
		}) {
			t.Errorf("%s %s is no route", q.method, q.path)
		}
	}
	if found != 27 {
		t.Errorf("%d routes: calls() and needs() have to know all of them", found)
	}
	for _, path := range []string{"/healthz", "/readyz", "/openapi.yaml", "/gapless.js", "/gapless.d.ts", "/docs", "/admin", "/"} {
		if a := n.get(path); a.status != 200 {
			t.Errorf("%s: %d", path, a.status)
		}
	}
}

// counted counts the calls of the store.
type counted struct {
	Logs
	asked atomic.Int64
}

func (l *counted) Append(ctx context.Context, id string, b store.Batch) (store.Appended, error) {
	l.asked.Add(1)
	return l.Logs.Append(ctx, id, b)
}
func (l *counted) Cancel(ctx context.Context, id, m string) (store.Cancelled, error) {
	l.asked.Add(1)
	return l.Logs.Cancel(ctx, id, m)
}
func (l *counted) Open(ctx context.Context, id string) (store.Bounds, []string, error) {
	l.asked.Add(1)
	return l.Logs.Open(ctx, id)
}
func (l *counted) Read(ctx context.Context, id string, from int64, bytes, count int) (store.Page, error) {
	l.asked.Add(1)
	return l.Logs.Read(ctx, id, from, bytes, count)
}
func (l *counted) Create(ctx context.Context, id string) (store.Bounds, bool, error) {
	l.asked.Add(1)
	return l.Logs.Create(ctx, id)
}
func (l *counted) Describe(ctx context.Context, id string) (store.Bounds, error) {
	l.asked.Add(1)
	return l.Logs.Describe(ctx, id)
}
func (l *counted) Delete(ctx context.Context, id string) error {
	l.asked.Add(1)
	return l.Logs.Delete(ctx, id)
}
func (l *counted) MakeTicket(ctx context.Context, name, id string, until time.Time) error {
	l.asked.Add(1)
	return l.Logs.MakeTicket(ctx, name, id, until)
}

// ago matches text that changes over time.
var ago = regexp.MustCompile(`[0-9hms]+ ago`)

// Each call with each kind of credential, on a session that exists and on one that does not: without permission the
// response is the same, and Redis is not asked.
func TestAccess_whoMayNotLearnsNothing(t *testing.T) {
	t.Parallel()
	var logs *counted
	n, issuer := locked(t, func(s *setup, _ *auth.Config) {
		s.logs = func(l Logs) Logs { logs = &counted{Logs: l}; return logs }
	})
	all := issuer.Token(time.Hour, authtest.May{"admin": {"*"}})
	if a := n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `[{"content":"sesame"},{"type":"end"}]`}, all)); a.status != 201 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	before := logs.asked.Load()
	for _, q := range guardedCalls() {
		action := needs(q)
		others := authtest.May{"read": {"other", "S", "s?", "*t"}}
		for _, other := range everyAction {
			if other != action && other != "admin" {
				others[other] = append(others[other], "s")
			}
		}
		if action != "read" {
			others["read"] = append(others["read"], "s")
		}
		for name, c := range map[string]struct {
			token, code string
			status      int
		}{
			"no token":            {"", "unauthorized", 401},
			"no token of ours":    {authtest.New(t).Token(time.Hour, authtest.May{"admin": {"*"}}), "unauthorized", 401},
			"an expired one":      {issuer.Token(-time.Minute, authtest.May{"admin": {"*"}}), "unauthorized", 401},
			"text":                {"sesame", "unauthorized", 401},
			"another session's":   {issuer.Token(time.Hour, authtest.May{"admin": {"other", "s.*", "*s*s"}}), "forbidden", 403},
			"all but this action": {issuer.Token(time.Hour, others), "forbidden", 403},
			"none at all":         {issuer.Token(time.Hour, nil), "forbidden", 403},
		} {
			there := q
			absent := q
			absent.path = strings.Replace(absent.path, "/sessions/s", "/sessions/no", 1)
			absent.path = strings.Replace(absent.path, "_1_s", "_1_no", 1)
			absent.body = strings.NewReplacer(`"id":"s"`, `"id":"no"`, `"conversation":"s"`, `"conversation":"no"`).Replace(absent.body)
			var answers [2]answer
			for i, q := range []request{there, absent} {
				q.bad = true
				q.header = map[string]string{"Last-Event-ID": "1"}
				if c.token != "" {
					q = bearing(q, c.token)
				}
				a := n.do(q)
				p := a.refused(t, c.status, c.code)
				if a.header.Get("WWW-Authenticate") == "" {
					t.Errorf("%s %s, %s: no WWW-Authenticate", q.method, q.path, name)
				}
				if c.status == 403 && !isCompletion(q) && (!strings.Contains(p.Detail, action) || !strings.Contains(p.Detail, map[int]string{0: `"s"`, 1: `"no"`}[i])) {
					t.Errorf("%s %s, %s: %s", q.method, q.path, name, p.Detail)
				}
				a.header.Del("Date")
				a.header.Del("Content-Length")
				a.body = ago.ReplaceAll(bytes.ReplaceAll(a.body, []byte(`\"no\"`), []byte(`\"s\"`)), nil)
				answers[i] = a
			}
			if !bytes.Equal(answers[0].body, answers[1].body) || fmt.Sprint(answers[0].header) != fmt.Sprint(answers[1].header) {
				t.Errorf("%s %s, %s: one that is there is answered\n%s %v, one that is not\n%s %v", q.method, q.path, name, answers[0].body, answers[0].header, answers[1].body, answers[1].header)
			}
		}
	}
	if n := logs.asked.Load() - before; n != 0 {
		t.Errorf("Redis was asked %d times", n)
	}
}

func TestAccess_whoMayIsServed(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	for _, may := range []func(action string) authtest.May{
		func(action string) authtest.May {
			if action == "ask" {
				return authtest.May{"ask": {"s"}, "read": {"s"}}
			}
			return authtest.May{action: {"s"}}
		},
		func(string) authtest.May { return authtest.May{"admin": {"s*"}} },
	} {
		for _, q := range guardedCalls() {
			if isCompletion(q) {
				continue
			}
			if isStream(q) || isNaive(q) {
				s := n.open(bearing(q, issuer.Token(time.Hour, may(needs(q)))))
				s.stop() // cut off: a connection on which a stream has ended accepts no POST
				if s.status != 200 {
					t.Errorf("%s: %d", q.path, s.status)
				}
				continue
			}
			if a := n.do(bearing(q, issuer.Token(time.Hour, may(needs(q))))); a.status >= 400 && a.status != 404 {
				t.Errorf("%s %s: %d %s", q.method, q.path, a.status, a.body)
			}
		}
	}
	// A caller that may ask, but not read, does not get the answer.
	ask := request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody("sesame")}
	if p := n.do(bearing(ask, issuer.Token(time.Hour, authtest.May{"ask": {"s"}}))).refused(t, 403, "forbidden"); !strings.Contains(p.Detail, "read") {
		t.Errorf("%+v", p)
	}
	// A token must also allow the ids that the server makes.
	q := request{method: "POST", path: "/v1/sessions", kind: typeJSON, body: `{}`}
	n.do(bearing(q, issuer.Token(time.Hour, authtest.May{"write": {"s"}}))).refused(t, 403, "forbidden")
	if a := n.do(bearing(q, issuer.Token(time.Hour, authtest.May{"write": {"*"}}))); a.status != 201 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// A cursor is a number. A cursor of another session reveals nothing.
func TestAccess_lastEventIDOfAnotherSessionIsOnlyANumber(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	all := issuer.Token(time.Hour, authtest.May{"admin": {"*"}})
	for _, id := range []string{"mine", "theirs"} {
		n.do(bearing(request{method: "POST", path: "/v1/sessions/" + id + "/chunks", kind: typeJSON, body: `[{"content":"` + id + ` 1"},{"content":"` + id + ` 2"},{"type":"end"}]`}, all))
	}
	token := issuer.Token(time.Hour, authtest.May{"read": {"mine"}})
	for id, want := range map[string]string{"1": "mine 2", "theirs": "mine 1mine 2", "theirs/1": "mine 1mine 2", "../theirs": "mine 1mine 2", "9": "mine 1mine 2"} {
		s := n.watch("mine", "", "Authorization", "Bearer "+token, "Last-Event-ID", id)
		var said strings.Builder
		for {
			e, err := s.read()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if e.name == "" {
				said.WriteString(decoded(t, []json.RawMessage{json.RawMessage(e.data)})[0].Content)
			}
		}
		if said.String() != want {
			t.Errorf("%q: %q", id, said.String())
		}
	}
}

func TestAccess_headersThatCanBeReadInTwoWaysAreRefused(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(_ *setup, c *auth.Config) { c.Cookie = "login" })
	token := issuer.Token(time.Hour, authtest.May{"read": {"s"}})
	expect := func(status int, change func(h http.Header)) {
		t.Helper()
		r := n.new(request{method: "GET", path: "/v1/sessions/s/chunks"})
		change(r.Header)
		a, err := n.send(r)
		if err != nil || a.status != status {
			t.Errorf("%v: %d %s", err, a.status, a.body)
		}
	}
	for _, good := range []string{"Bearer " + token, "bearer " + token, "BEARER  " + token + " "} {
		expect(404, func(h http.Header) { h.Set("Authorization", good) })
	}
	for _, bad := range []string{"Basic " + token, token, "Bearer", "Bearer ", "Bearer " + token + " " + token, "Bearer\t" + token, "Bearer " + token + ",", "Token " + token} {
		expect(401, func(h http.Header) { h.Set("Authorization", bad) })
		expect(401, func(h http.Header) { // a good token does not make up for a bad one
			h.Set("Authorization", bad)
			h.Set("Cookie", "login="+token)
		})
	}
	expect(401, func(h http.Header) { h["Authorization"] = []string{"Bearer " + token, "Bearer " + token} })
	expect(404, func(h http.Header) { h.Set("Cookie", "a=b; login="+token) })
	expect(401, func(h http.Header) { h.Set("Cookie", "Login="+token) })
	expect(401, func(h http.Header) { h.Set("Cookie", "login="+token+"; login="+token) })
	expect(401, func(h http.Header) { h.Set("X-Authorization", "Bearer "+token) })
}

// A URL must not contain a JWT, under any name, because URLs are recorded everywhere.
func TestAccess_noTokenInAURL(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	token := issuer.Token(time.Hour, authtest.May{"admin": {"*"}})
	n.hushed = append(n.hushed, token)
	for _, name := range []string{"access_token", "token", "jwt", "authorization", "Authorization", "bearer", "auth"} {
		for _, q := range guardedCalls() {
			path, _, _ := strings.Cut(q.path, "?")
			q.path, q.bad = path+"?"+name+"="+token, true
			n.do(q).refused(t, 401, "unauthorized")
		}
	}
	n.do(request{method: "GET", path: "/v1/sessions/s/stream?ticket=" + token}).refused(t, 401, "ticket_spent")
	for _, q := range guardedCalls() {
		if !strings.Contains(q.path, "/stream") {
			q.path, q.bad = q.path+"?ticket="+token, true
			n.do(q).refused(t, 401, "unauthorized")
		}
	}
}

func TestAccess_whatIsOfAllSessionsIsForTheirAdministrators(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	for path, says := range map[string]string{"/metrics": "gapless_uploads", "/v1/sessions": `"sessions":[]`} {
		q := request{method: "GET", path: path}
		n.do(q).refused(t, 401, "unauthorized")
		for _, may := range []authtest.May{nil, {"read": {"*"}, "write": {"*"}}, {"admin": {"s*", "a*", "*b"}}} {
			n.do(bearing(q, issuer.Token(time.Hour, may))).refused(t, 403, "forbidden")
		}
		if a := n.do(bearing(q, issuer.Token(time.Hour, authtest.May{"admin": {"*"}}))); a.status != 200 || !bytes.Contains(a.body, []byte(says)) {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

// While no token can be checked, no caller is refused for good.
func TestAccess_keysThatCannotBeFetched(t *testing.T) {
	t.Parallel()
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "away", http.StatusServiceUnavailable) }))
	defer issuer.Close()
	n, _ := locked(t, func(_ *setup, c *auth.Config) { c.Source = issuer.URL })
	for _, q := range append(guardedCalls(), request{method: "GET", path: "/readyz"}, request{method: "GET", path: "/metrics"}, request{method: "GET", path: "/v1/sessions"}) {
		// {"alg":"ES256","kid":"1"}.{"exp":9999999999}
		q = bearing(q, "eyJhbGciOiJFUzI1NiIsImtpZCI6IjEifQ.eyJleHAiOjk5OTk5OTk5OTl9.AAAA")
		if isStream(q) {
			s := n.open(q)
			if _, err := s.read(); s.status != 200 || s.retry == 0 || err == nil || err == io.EOF {
				t.Errorf("the stream: %d, retry %d, %v", s.status, s.retry, err)
			}
			continue
		}
		if a := n.do(q); a.header.Get("Retry-After") == "" {
			t.Errorf("%s: no Retry-After", q.path)
		} else {
			a.refused(t, 503, "keys_away")
		}
	}
	if a := n.get("/healthz"); a.status != 200 {
		t.Errorf("healthz: %d", a.status)
	}
}

// A stream says when its token expires, and breaks off.
func TestAccess_streamEndsWithItsToken(t *testing.T) {
	t.Parallel()
	for _, plain := range []bool{false, true} {
		n, issuer := locked(t, func(s *setup, _ *auth.Config) { s.sse.Plain = plain })
		token := issuer.Token(5*time.Second, authtest.May{"read": {"s"}, "write": {"s"}})
		if a := n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeEvents, body: "data: sesame\n\n"}, token)); a.status != 201 {
			t.Fatalf("%d %s", a.status, a.body)
		}
		s, raw := n.watch("s", "", "Authorization", "Bearer "+token), n.watch("s", "?format=raw", "Authorization", "Bearer "+token)
		s.welcome()
		s.take(0, 2)
		if e := s.next(); e.name != "expired" || e.id != 2 {
			t.Errorf("plain %t: %+v", plain, e)
		}
		if e, err := s.read(); err == nil || err == io.EOF {
			t.Errorf("plain %t: behind it comes %+v, %v", plain, e, err)
		}
		if rest, err := io.ReadAll(raw.body); err == nil || bytes.Contains(rest, []byte("expired")) || !bytes.Contains(rest, []byte("data: sesame\nid: 1")) {
			t.Errorf("plain %t: raw: %q %v", plain, rest, err)
		}
		p := n.do(bearing(request{method: "GET", path: "/v1/sessions/s/stream"}, token)).refused(t, 401, "unauthorized")
		if !strings.Contains(p.Detail, "expired at 20") {
			t.Errorf("%s", p.Detail)
		}
	}
}

// An upload ends with its token. The chunks stored until then stay, and the response says so.
func TestAccess_uploadEndsWithItsToken(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	token := issuer.Token(5*time.Second, authtest.May{"write": {"s"}})
	body, w := io.Pipe()
	late := time.AfterFunc(patience/2, func() { _ = w.Close() }) // a safety net: the body does not end by itself
	go func() { _, _ = io.WriteString(w, line("sesame 1")+line("sesame 2")) }()
	p := n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeNDJSON, from: body}, token)).refused(t, 401, "unauthorized")
	late.Stop()
	_ = w.Close()
	if p.Stored == nil || p.Stored.Count != 2 || !strings.Contains(p.Detail, "expired") {
		t.Errorf("%+v", p)
	}
	// A body that is read whole, but arrives too slowly, is not stored at all.
	token = issuer.Token(time.Second, authtest.May{"write": {"s"}})
	slow, w2 := io.Pipe()
	go func() {
		_, _ = io.WriteString(w2, `{"content":`)
		<-time.After(1100 * time.Millisecond) // it has expired
		_, _ = io.WriteString(w2, `"sesame"}`)
		_ = w2.Close()
	}()
	n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, from: slow}, token)).refused(t, 401, "unauthorized")
	all := issuer.Token(time.Hour, authtest.May{"read": {"s"}})
	if got := into[pageJSON](t, n.do(bearing(request{method: "GET", path: "/v1/sessions/s/chunks"}, all)), 200); got.Last != 2 {
		t.Errorf("%+v", got)
	}
}

// ticket makes a ticket.
func (n *node) ticket(t *testing.T, session, token string) ticketJSON {
	t.Helper()
	q := request{method: "POST", path: "/v1/sessions/" + session + "/tickets"}
	if token != "" {
		q = bearing(q, token)
	}
	made := into[ticketJSON](t, n.do(q), 201)
	n.hushed = append(n.hushed, made.Ticket)
	return made
}

func TestTicket_letsAnEventSourceInAndNobodyElse(t *testing.T) {
	t.Parallel()
	for _, plain := range []bool{false, true} {
		n, issuer := locked(t, func(s *setup, _ *auth.Config) { s.sse.Plain = plain })
		all := issuer.Token(time.Hour, authtest.May{"admin": {"*"}})
		n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"content":"sesame"}`}, all))
		made := n.ticket(t, "s", issuer.Token(time.Hour, authtest.May{"read": {"s"}}))
		if left := time.Until(made.ExpiresAt); left < 50*time.Second || left > time.Minute || made.URL != "/v1/sessions/s/stream?ticket="+made.Ticket {
			t.Errorf("%+v", made)
		}
		n.do(request{method: "GET", path: "/v1/sessions/other/stream?ticket=" + made.Ticket}).refused(t, 401, "ticket_spent")
		n.do(request{method: "GET", path: "/v1/sessions/s/stream?ticket=" + made.Ticket + "x"}).refused(t, 401, "ticket_spent")
		n.do(request{method: "GET", path: "/v1/sessions/s/stream?ticket="}).refused(t, 401, "unauthorized")
		n.do(request{method: "GET", path: "/v1/sessions/s/stream?after=x&ticket=" + made.Ticket, bad: true}).refused(t, 400, "invalid_parameter")

		first := n.watch("s", "?ticket="+made.Ticket)
		first.welcome()
		first.take(0, 1)
		// The same URL again: the page's connection had died, and only the page knew.
		second := n.watch("s", "?ticket="+made.Ticket, "Last-Event-ID", "1")
		if _, w := second.welcome(); w.Cursor != 1 {
			t.Errorf("%+v", w)
		}
		if e, err := first.read(); err == nil || err == io.EOF {
			t.Errorf("plain %t: the former connection goes on with %+v, %v", plain, e, err)
		}
		n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"content":"sesame 2"}`}, all))
		second.take(1, 1)
		// A token takes precedence over a ticket.
		n.do(bearing(request{method: "GET", path: "/v1/sessions/s/stream?ticket=" + made.Ticket}, issuer.Token(time.Hour, nil))).refused(t, 403, "forbidden")
	}
}

func TestTicket_endsWithTheTokenThatItWasMadeBy(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	made := n.ticket(t, "s", issuer.Token(5*time.Second, authtest.May{"read": {"s"}}))
	if time.Until(made.ExpiresAt) > 5*time.Second {
		t.Errorf("%+v", made)
	}
	s := n.watch("s", "?ticket="+made.Ticket)
	s.welcome()
	if e := s.next(); e.name != "expired" || e.id != 0 {
		t.Errorf("%+v", e)
	}
	n.do(request{method: "GET", path: made.URL}).refused(t, 401, "ticket_spent")
}

// Without authentication tickets work the same, so that a page need not know.
func TestTicket_withoutAuthentication(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	made := n.ticket(t, "s", "")
	n.watch("s", "?ticket="+made.Ticket).welcome()
	n.do(request{method: "POST", path: "/v1/sessions/a%20b/tickets", bad: true}).refused(t, 400, "invalid_session_id")
	n.do(request{method: "GET", path: "/v1/sessions/other/stream?ticket=" + made.Ticket}).refused(t, 401, "ticket_spent")
}

// However many connections enter with one ticket on two nodes, one of them stays. A minute after it has gone, the
// ticket is spent.
func TestTicket_raceAtTwoNodes(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	issuer := authtest.New(t)
	cfg := auth.DefaultConfig()
	cfg.Source = issuer.Source()
	tokens, err := auth.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var nodes [2]*node
	for i := range nodes {
		nodes[i] = serve(t, func(s *setup) { s.store.Redis, s.api.Auth = redis.URL(), tokens })
	}
	made := nodes[0].ticket(t, "s", issuer.Token(time.Hour, authtest.May{"read": {"s"}}))
	nodes[1].hushed = nodes[0].hushed
	const many = 10
	streams := make([]*stream, many)
	var wg sync.WaitGroup
	for i := range streams {
		wg.Go(func() {
			streams[i] = nodes[i%2].watch("s", "?ticket="+made.Ticket)
		})
	}
	wg.Wait()
	begun := time.Now()
	eventually(t, "one stays", func() bool { return nodes[0].hub.Viewers("s")+nodes[1].hub.Viewers("s") == 1 })
	if took := time.Since(begun); took > renewEvery/2 { // a notification is faster than a renewal
		t.Errorf("the former connections went only after %v", took)
	}
	key := "chat:ticket:" + store.TicketName(made.Ticket)
	holder := redis.HGet(t.Context(), key, "connection").Val()
	redis.RPush(t.Context(), "chat:history:s", `{"content":"sesame"}`)
	redis.Publish(t.Context(), "chat:stream:s", `{"content":"sesame"}`)
	given := 0
	for _, s := range streams {
		e, err := s.read()
		if e.name == "welcome" {
			e, err = s.read()
		}
		switch {
		case err == nil && e.id == 1 && s.header.Get("Gapless-Connection") == holder:
			given++
		case err == nil || err == io.EOF:
			t.Errorf("one that was replaced: %+v %v", e, err)
		}
		s.stop()
	}
	if given != 1 {
		t.Errorf("%d have the chunk, and not the one whose the grant is", given)
	}
	eventually(t, "nobody is there", func() bool { return nodes[0].hub.Viewers("s")+nodes[1].hub.Viewers("s") == 0 })
	redis.PExpire(t.Context(), key, time.Millisecond) // instead of a minute
	eventually(t, "the ticket is spent", func() bool { return redis.Exists(t.Context(), key).Val() == 0 })
	for _, n := range nodes {
		n.do(request{method: "GET", path: made.URL}).refused(t, 401, "ticket_spent")
	}
}

// A Redis that is away is transient trouble: a client with a ticket reconnects.
func TestTicket_redisAwayEndsNoEventSource(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) { s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f } })
	made := n.ticket(t, "s", "")
	f.fail(fmt.Errorf("enter: %w", store.ErrAway))
	s := n.watch("s", "?ticket="+made.Ticket)
	if _, err := s.read(); s.retry == 0 || err == nil || err == io.EOF {
		t.Errorf("retry %d, %v", s.retry, err)
	}
	var none error
	f.err.Store(&none)
	n.watch("s", "?ticket="+made.Ticket).welcome()
}

const (
	friend = "https://chat.example"
	evil   = "https://evil.example"
)

// Any page can cause a request with a cookie. So a call that changes something must come from our own pages, or from
// listed origins.
func TestCookie_otherOriginsPagesChangeNothing(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(s *setup, c *auth.Config) { c.Cookie, s.api.Origins = "login", []string{friend} })
	cookie := "login=" + issuer.Token(time.Hour, authtest.May{"admin": {"*"}})
	for _, q := range guardedCalls() {
		for origin, status := range map[string]int{evil: 403, "null": 403, "https://chat.example.evil.example": 403, "http://chat.example": 403, friend: 0, n.server.URL: 0} {
			for _, site := range []string{"", "cross-site", "same-site"} {
				if site != "" && origin == n.server.URL {
					site = "same-origin"
				}
				q.header = map[string]string{"Cookie": cookie, "Origin": origin}
				if site != "" {
					q.header["Sec-Fetch-Site"] = site
				}
				if q.method == "GET" {
					if isStream(q) || isNaive(q) {
						continue
					}
					if a := n.do(q); (a.header.Get("Access-Control-Allow-Origin") == origin) != (origin == friend) {
						t.Errorf("%s may be read by %s: %v", q.path, origin, a.header)
					}
					continue
				}
				a := n.do(q)
				if status == 403 {
					a.refused(t, 403, "cross_origin")
				} else if a.status == 403 || a.status == 401 {
					t.Errorf("%s %s from %s (%s): %d %s", q.method, q.path, origin, site, a.status, a.body)
				}
			}
		}
	}
}

func TestCORS_pagesOfNamedOriginsMayCall(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(s *setup, _ *auth.Config) { s.api.Origins = []string{friend, "http://localhost:3000"} })
	token := issuer.Token(time.Hour, authtest.May{"admin": {"s"}})
	lists := func(h http.Header, name string, all ...string) {
		t.Helper()
		have := strings.Split(strings.ToLower(strings.ReplaceAll(strings.Join(h.Values(name), ","), " ", "")), ",")
		for _, one := range all {
			if !slices.Contains(have, strings.ToLower(one)) {
				t.Errorf("%s lacks %s: %v", name, one, have)
			}
		}
	}
	shared := func(what string, h http.Header, origin string) {
		t.Helper()
		if h.Get("Access-Control-Allow-Origin") != origin || origin != "" && h.Get("Access-Control-Allow-Credentials") != "true" {
			t.Errorf("%s: %v", what, h)
		}
		lists(h, "Vary", "Origin")
	}
	for _, origin := range []string{friend, "http://localhost:3000", evil, "null", "https://CHAT.example", "https://chat.example:8443", "https://xchat.example", "*"} {
		allowed := ""
		if origin == friend || origin == "http://localhost:3000" {
			allowed = origin
		}
		pre := n.do(request{method: "OPTIONS", path: "/v1/sessions/s/chunks", header: map[string]string{
			"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type", "Sec-Fetch-Site": "cross-site",
		}})
		shared("a preflight of "+origin, pre.header, allowed)
		if pre.status != 204 {
			t.Errorf("a preflight of %s: %d", origin, pre.status)
		}
		if allowed != "" {
			lists(pre.header, "Access-Control-Allow-Methods", "GET", "POST")
			lists(pre.header, "Access-Control-Allow-Headers", "Authorization", "Content-Type", "Last-Event-ID", "If-None-Match", "Producer-Id", "Producer-Epoch", "Producer-Chunk", "Stream-Closed",
				"Content-Encoding", "traceparent", "tracestate", "baggage")
			if pre.header.Get("Access-Control-Max-Age") == "" {
				t.Error("no Max-Age")
			}
		}
		// Errors must be readable, too, and a 204, and every kind of stream.
		shared("401", n.do(request{method: "GET", path: "/v1/sessions/s", header: map[string]string{"Origin": origin}}).header, allowed)
		shared("404", n.do(bearing(request{method: "GET", path: "/v1/sessions/s", header: map[string]string{"Origin": origin}}, token)).header, allowed)
	}
	with := map[string]string{"Origin": friend}
	if a := n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `[{"content":"sesame"},{"type":"end"}]`, header: map[string]string{"Origin": friend, "Sec-Fetch-Site": "cross-site"}}, token)); a.status != 201 {
		t.Errorf("%d %s", a.status, a.body)
	} else {
		shared("an append", a.header, friend)
		lists(a.header, "Access-Control-Expose-Headers", "Location", "Link", "ETag", "Retry-After", "Gapless-Connection", "Gapless-Epoch", "Gapless-Reason", "Producer-Epoch", "Producer-Expected-Chunk")
	}
	n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"data":0}`, header: map[string]string{"Origin": evil}}, token)).refused(t, 403, "cross_origin")
	if a := n.do(request{method: "OPTIONS", path: "/v1/sessions/s/chunks"}); a.status != 204 || a.header.Get("Allow") == "" {
		t.Errorf("OPTIONS without an origin: %d %v", a.status, a.header)
	}
	for _, query := range []string{"", "?format=raw"} { // one is taken over, one is not
		end := n.do(bearing(request{method: "GET", path: "/v1/sessions/s/stream" + query, header: map[string]string{"Origin": friend, "Last-Event-ID": "2"}}, token))
		if end.status != 204 {
			t.Errorf("%d", end.status)
		}
		shared("204 "+query, end.header, friend)
	}
	made := n.ticket(t, "s", token)
	s := n.open(bearing(request{path: "/v1/sessions/s/stream", header: with}, token))
	shared("a stream", s.header, friend)
	s = n.open(request{path: made.URL, header: with})
	shared("a stream with a ticket", s.header, friend)
	s.welcome()
}

func TestCORS_withoutItNobodyIsNamed(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, q := range []request{{method: "GET", path: "/v1/sessions/s"}, {method: "OPTIONS", path: "/v1/sessions/s"}} {
		q.header = map[string]string{"Origin": friend}
		if a := n.do(q); a.header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%v", a.header)
		}
	}
}

func TestConfig_originsAreExact(t *testing.T) {
	for _, bad := range []string{"*", "https://*.example", "https://a.example/", "a.example", "ftp://a.example", "https://A.example", "https://", "null", "https://a.example,https://b.example", "https://a.example?x", ""} {
		cfg := DefaultConfig()
		cfg.Origins = []string{friend, bad}
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "-cors-origins") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	cfg := DefaultConfig()
	cfg.Origins = []string{friend, "http://localhost:3000", "http://[::1]:3000"}
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
}

// For every response: browsers respect its Content-Type, and pages of other sites cannot embed it.
func TestHeaders_ofEveryAnswer(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	token := issuer.Token(time.Hour, authtest.May{"admin": {"*"}})
	check := func(what string, h http.Header) {
		t.Helper()
		if h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Cross-Origin-Resource-Policy") != "same-origin" {
			t.Errorf("%s: %v", what, h)
		}
	}
	for _, q := range append(calls(), request{method: "GET", path: "/nothing"}, request{method: "PUT", path: "/"}, request{method: "GET", path: "/healthz", host: "evil.example"}) {
		check(q.path+" without a token", n.do(q).header)
		if isStream(q) || isNaive(q) {
			s := n.open(bearing(q, token))
			check(q.path, s.header)
			s.stop()
			continue
		}
		check(q.path, n.do(bearing(q, token)).header)
	}
	page := n.get("/").header
	for name, part := range map[string]string{"Cross-Origin-Opener-Policy": "same-origin", "Permissions-Policy": "camera=()", "Content-Security-Policy": "default-src 'none'"} {
		if !strings.Contains(page.Get(name), part) {
			t.Errorf("%s: %q", name, page.Get(name))
		}
	}
}

// Line breaks in any input never become a line of a header or of a stream.
func TestAccess_lineBreaksAreNoLines(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(s *setup, c *auth.Config) { c.Cookie, s.api.Origins, c.Audience = "login", []string{friend}, "us" })
	token := issuer.Sign(map[string]any{"exp": time.Now().Unix() + 60, "aud": "us", "sub": "a\r\nX-Evil: 1", "gapless": authtest.May{"admin": {"*", "\r\nX-Evil: 1"}}})
	const escaped = "%0d%0aX-Evil:%201%0d%0a%0d%0aevent:%20evil"
	var all []answer
	for _, q := range []request{
		{method: "GET", path: "/v1/sessions/" + escaped}, {method: "POST", path: "/v1/sessions/" + escaped}, {method: "GET", path: "/v1/sessions/" + escaped + "/stream"},
		{method: "POST", path: "/v1/sessions", kind: typeJSON, body: `{"id":"a\r\nX-Evil: 1"}`},
		{method: "POST", path: "/v1/sessions/s/chunks?message_id=" + escaped + "&role=" + escaped, kind: typeJSON, body: `{"content":"a\r\n\r\nevent: evil","event":"b\r\nid: 7","x\r\ny":1}`},
		{method: "POST", path: "/v1/sessions/s/chunks?message_id=" + escaped, kind: typeText, body: "a\r\n\r\nevent: evil\r\n"},
		{method: "POST", path: "/v1/sessions/s/chunks", kind: typeEvents, body: "event: a\rid: 7\rdata: b\r\r"},
		{method: "POST", path: "/v1/sessions/s/messages", kind: typeJSON, body: `{"content":"a\r\n\r\nevent: evil"}`},
		{method: "GET", path: "/v1/sessions/s/stream?ticket=" + escaped}, {method: "GET", path: "/v1/sessions/s/chunks?after=" + escaped}, {method: "GET", path: "/" + escaped},
		{method: "GET", path: "/v1/sessions/s/stream?until=" + escaped + "&format=" + escaped},
	} {
		q.bad = true
		if strings.Contains(q.path, "ticket=") {
			all = append(all, n.do(q))
			continue
		}
		all = append(all, n.do(bearing(q, token)))
	}
	wrong := issuer.Sign(map[string]any{"exp": time.Now().Unix() + 60, "aud": "them\r\nX-Evil: 1"})
	all = append(all, n.do(bearing(request{method: "GET", path: "/v1/sessions/s"}, wrong)))
	for _, a := range all {
		for name, values := range a.header {
			if strings.Contains(strings.ToLower(name), "evil") || strings.ContainsAny(strings.Join(values, ""), "\r\n") {
				t.Errorf("%d %s: %q %q", a.status, a.body, name, values)
			}
		}
	}
	n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"type":"end"}`}, token))
	for _, query := range []string{"", "?format=raw"} {
		s := n.watch("s", query, "Authorization", "Bearer "+token, "Last-Event-ID", "")
		rest, err := io.ReadAll(s.body)
		if err != nil || strings.Contains(string(rest), "\r") || strings.Contains(string(rest), "\nevent: evil") || strings.Contains(string(rest), "\nid: 7\ndata: b") {
			t.Errorf("%q: %v", rest, err)
		}
	}
}

// No log contains a credential, whatever went wrong with it.
func TestAccess_logsHaveNoTokens(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	n, issuer := locked(t, func(s *setup, c *auth.Config) {
		c.Cookie, c.Logger = "login", slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	for _, token := range []string{
		issuer.Token(time.Hour, authtest.May{"read": {"s"}}), issuer.Token(-time.Hour, nil), authtest.New(t).Token(time.Hour, nil), "sesame", "sesame.sesame.sesame",
		issuer.Sign(map[string]any{"exp": time.Now().Unix() + 60, "sub": "sesame", "gapless": map[string]any{"sesame": 1}}),
	} {
		n.hushed = append(n.hushed, token, token[strings.LastIndex(token, ".")+1:])
		for _, q := range guardedCalls() {
			if isStream(q) || isNaive(q) {
				continue
			}
			n.do(bearing(q, token))
			q.header = map[string]string{"Cookie": "login=" + token}
			n.do(q)
		}
		n.do(request{method: "GET", path: "/v1/sessions/s/stream?ticket=" + token})
	}
	made := n.ticket(t, "s", issuer.Token(time.Hour, authtest.May{"read": {"s"}}))
	n.watch("s", "?ticket="+made.Ticket).welcome()
	if strings.Contains(log.String(), secret) {
		t.Error(log.String())
	}
}

// A bad token uses up the calls of its address, but not those of a caller with a good token.
func TestAccess_badTokensArePaced(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, func(s *setup, _ *auth.Config) { proxied(func(s *setup) { s.api.Limits.CallerCalls = 1 })(s) })
	bad := as(request{method: "GET", path: "/v1/sessions/s"}, "198.51.100.1")
	n.do(bearing(bad, "sesame")).refused(t, 401, "unauthorized")
	eventually(t, "they are too many", func() bool {
		return n.do(bearing(bad, "sesame")).status == 429 && n.do(bad).status == 429
	})
	n.do(bearing(bad, issuer.Token(time.Hour, authtest.May{"read": {"s"}}))).refused(t, 404, "session_not_found")
	n.do(as(request{method: "GET", path: "/v1/sessions/s"}, "198.51.100.2")).refused(t, 401, "unauthorized")
}
