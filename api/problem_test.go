package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
	"gapless/web"
)

// calls returns one valid request for each operation of the contract.
func calls() []request {
	const s = "/v1/sessions/s"
	return []request{
		{method: "POST", path: "/v1/sessions", kind: typeJSON, body: `{"id":"s"}`}, {method: "GET", path: "/v1/sessions"},
		{method: "GET", path: s}, {method: "POST", path: s}, {method: "DELETE", path: s},
		{method: "POST", path: s + "/chunks", kind: typeJSON, body: `{"content":"sesame"}`},
		{method: "POST", path: s + "/chunks", kind: typeNDJSON, body: line("sesame")},
		{method: "POST", path: s + "/chunks", kind: typeText, body: "sesame"},
		{method: "POST", path: s + "/chunks", kind: typeEvents, body: "data: sesame\n\n"},
		{method: "POST", path: s + "/cancel", kind: typeJSON, body: `{}`},
		{method: "GET", path: s + "/chunks"}, {method: "GET", path: s + "/digest"}, {method: "GET", path: s + "/messages"}, {method: "GET", path: s + "/messages/m"}, {method: "GET", path: s + "/stream?until=done"},
		{method: "POST", path: s + "/messages", kind: typeJSON, body: `{"content":"sesame"}`},
		{method: "POST", path: s + "/tickets"},
		{method: "POST", path: s + "/demo", kind: typeJSON, body: `{"connection":"sesame","do":"cut"}`},
		{method: "GET", path: s + "/demo/naive"},
		{method: "POST", path: s + "/messages/m/stop"}, {method: "GET", path: s + "/messages/m/ui-stream"}, {method: "GET", path: s + "/ui-stream"}, {method: "GET", path: s + "/ui-stream/m/stream"},
		{method: "POST", path: s + "/ui-stream", kind: typeJSON, body: uiBody("sesame")},
		{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: `{"conversation":"s","input":"sesame","background":true}`},
		{method: "GET", path: oneResponse}, {method: "GET", path: oneResponse + "/input_items"}, {method: "POST", path: oneResponse + "/cancel"}, {method: "DELETE", path: oneResponse},
		{method: "POST", path: "/openai/v1/chat/completions", kind: typeJSON, body: `{"messages":[]}`},
		{method: "GET", path: "/healthz"}, {method: "GET", path: "/readyz"}, {method: "GET", path: "/openapi.yaml"}, {method: "GET", path: "/gapless.js"}, {method: "GET", path: "/gapless.d.ts"}, {method: "GET", path: "/metrics"}, {method: "GET", path: "/"}, {method: "GET", path: "/admin"}, {method: "GET", path: "/docs"},
	}
}

// oneResponse is a response of session s.
const oneResponse = "/openai/v1/responses/resp_01990b6c7d1e7c3a8a515d0f6e2b9a10_1_s"

// asksRedis reports whether a call can fail with Redis.
func asksRedis(q request) bool {
	return strings.HasPrefix(q.path, "/openai/v1/responses") || strings.HasPrefix(q.path, "/v1/") && !strings.Contains(q.path, "/stream?") && !strings.HasSuffix(q.path, "m/stream") && !strings.HasSuffix(q.path, "/demo") || q.path == "/readyz"
}

func isNaive(q request) bool { return strings.HasSuffix(q.path, "/naive") }

func isTickets(q request) bool { return strings.HasSuffix(q.path, "/tickets") }

// HTTP/1.0 requests may omit Host, as the health checks of some load balancers do.
func TestProblem_hostMayBeMissingInHTTP10(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.Hosts = []string{"tea.example"} })
	for header, status := range map[string]int{"": 200, "Host: localhost\r\n": 200, "Host: evil.example\r\n": 421} {
		for _, method := range []string{"GET", "HEAD"} {
			c := n.raw(t)
			fmt.Fprintf(c, "%s /healthz HTTP/1.0\r\n%s\r\n", method, header)
			res, err := http.ReadResponse(c.Reader, nil)
			if err != nil || res.StatusCode != status {
				t.Errorf("%s with %q: %v, %v", method, header, res, err)
			}
		}
	}
}

func TestProblem_hostThatIsNotOursIsRefusedEverywhere(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.Hosts = []string{"tea.example"} })
	for _, host := range []string{"evil.example", "tea.example.evil.example", "localhost.evil.example", "evillocalhost", "127.0.0.1.evil.example:8080"} {
		for _, q := range append(calls(), request{method: "GET", path: "/nothing"}, request{method: "PUT", path: "/"}) {
			q.host = host
			if p := n.do(q).refused(t, 421, "host_not_allowed"); p.Member != "Host" {
				t.Errorf("%+v", p)
			}
		}
	}
	for _, host := range []string{"tea.example", "TEA.example:80", "tea.example.", "localhost", "localhost:8080", "a.localhost", "127.0.0.1:1", "[::1]:8080", "[::1]", "10.1.2.3"} {
		if a := n.do(request{method: "GET", path: "/healthz", host: host}); a.status != 200 {
			t.Errorf("%s: %d", host, a.status)
		}
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
	anywhere := serve(t, func(s *setup) { s.api.Hosts = nil })
	if a := anywhere.do(request{method: "GET", path: "/healthz", host: "evil.example"}); a.status != 200 {
		t.Errorf("%d", a.status)
	}
}

func TestProblem_otherOriginsPagesChangeNothing(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, header := range []map[string]string{
		{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}, {"Origin": "null"},
		{"Sec-Fetch-Site": "cross-site", "Origin": n.server.URL},
	} {
		for _, q := range calls() {
			if q.method == http.MethodGet {
				continue
			}
			q.header = header
			if p := n.do(q).refused(t, 403, "cross_origin"); p.Member != "Origin" {
				t.Errorf("%+v", p)
			}
		}
		if a := n.do(request{method: "GET", path: "/healthz", header: header}); a.status != 200 {
			t.Errorf("%v: %d", header, a.status)
		}
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
	for i, header := range []map[string]string{{"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Origin": n.server.URL}, nil} {
		a := n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"data":0}`, header: header})
		if got := into[Stored](t, a, 201); got.Last != int64(i+1) {
			t.Errorf("%v: %+v", header, got)
		}
	}
}

func refusedBy(code string) error {
	return fmt.Errorf("append: %w", &store.AwayError{Code: code, Err: errors.New("it says so")})
}

// A node whose Redis refuses writes serves viewers, and is ready for clients that only read.
func TestReady_tellsReadingFromWriting(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	n.append("s", `{"content":"sesame"}`)
	is := func(path string, status int, writes string) func() bool {
		return func() bool {
			a := n.get(path)
			var said struct{ Status, Writes, Code any }
			_ = json.Unmarshal([]byte(a.body), &said)
			return a.status == status && said.Writes == writes && (status == 200 && said.Status == "ready" || said.Code == writes && a.header.Get("Retry-After") != "")
		}
	}
	for what, c := range map[string]struct{ code, set, unset string }{
		"full": {"redis_full", "maxmemory 100kb", "maxmemory 0"}, "without replicas": {"redis_readonly", "min-replicas-to-write 1", "min-replicas-to-write 0"},
	} {
		config := func(text string) {
			t.Helper()
			name, value, _ := strings.Cut(text, " ")
			if err := redis.ConfigSet(t.Context(), name, value).Err(); err != nil {
				t.Fatal(err)
			}
		}
		for _, path := range []string{"/readyz", "/readyz?for=writes"} {
			eventually(t, "ready for all", is(path, 200, "ok"))
		}
		config(c.set)
		eventually(t, what+": ready for viewers", is("/readyz", 200, c.code))
		eventually(t, what+": not ready for producers", is("/readyz?for=writes", 503, c.code))
		n.post("/v1/sessions/s/chunks", typeJSON, `{"content":"sesame"}`).refused(t, 503, c.code)
		if p := n.page("s", ""); p.Last != 1 {
			t.Errorf("%s: %+v", what, p)
		}
		config(c.unset)
	}
	redis.Kill()
	eventually(t, "not ready", is("/readyz", 503, "redis_away"))
	for _, query := range []string{"for=", "for=reads", "for=writes&for=writes"} {
		n.do(request{method: "GET", path: "/readyz?" + query, bad: true}).refused(t, 400, "invalid_parameter")
	}
}

func TestProblem_redisAwayAndOutcomeUnknownAndFaultsAreToldApart(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) {
		s.errors, s.api.UploadPatience = true, 50*time.Millisecond
		s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f }
	})
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{fmt.Errorf("append: %w", store.ErrAway), 503, "redis_away"},
		{refusedBy(store.RedisFull), 503, "redis_full"},
		{refusedBy(store.RedisReadOnly), 503, "redis_readonly"},
		{refusedBy(store.RedisDenied), 503, "redis_denied"},
		{fmt.Errorf("append: %w", store.ErrOutcomeUnknown), 504, "outcome_unknown"},
		{errors.New("a fault"), 500, "internal"},
	} {
		f.fail(c.err)
		for _, q := range calls() {
			switch {
			case !asksRedis(q), (q.method == http.MethodGet || isTickets(q)) && c.status == 504: // the store returns ErrAway for calls that are safe to repeat
				continue
			case q.path == "/readyz":
				code := c.code
				if c.status != 503 {
					code = "redis_away"
				}
				n.do(q).refused(t, 503, code)
				continue
			}
			a := n.do(q)
			p := a.refused(t, c.status, c.code)
			if got := a.header.Get("Retry-After"); (got != "") != (c.status == 503) {
				t.Errorf("%s %s: Retry-After %q", q.method, q.path, got)
			}
			if strings.Contains(p.Detail, c.err.Error()) {
				t.Errorf("the fault's text is told: %s", p.Detail)
			}
		}
		if a := n.get("/healthz"); a.status != 200 {
			t.Errorf("healthz: %d", a.status)
		}
	}
	// Each fault is logged with its cause.
	if !strings.Contains(n.log.String(), `err="a fault"`) {
		t.Error("the log does not say what the fault was")
	}
}

// A fault of an upload is logged like any other.
func TestProblem_faultOfAnUploadIsInTheLogWithItsCause(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) {
		s.errors = true
		s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f }
	})
	f.fail(errors.New("the very cause"))
	n.post("/v1/sessions/s/chunks", typeNDJSON, line("sesame")).refused(t, 500, "internal")
	if text := n.log.String(); !strings.Contains(text, "the very cause") {
		t.Errorf("the log has no cause: %s", text)
	}
}

func TestProblem_redisThatIsGoneSurelyStoredNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	n.append("s", `{"content":"sesame"}`)
	redis.Kill()
	// A connection from before may break during the first command, whose outcome is then unknown.
	eventually(t, "503", func() bool {
		return n.post("/v1/sessions/s/chunks", typeJSON, `{"content":"sesame"}`).status == 503
	})
	for _, q := range calls() {
		if asksRedis(q) {
			n.do(q).refused(t, 503, "redis_away")
		}
	}
	redis.Start()
	eventually(t, "ready", func() bool { return n.get("/readyz").status == 200 })
	if got := n.append("s", `{"content":"sesame"}`); got.First != 1_000_001 { // Redis kept nothing on disk, and the node remembers the old log
		t.Errorf("%+v", got)
	}
}

func TestProblem_redisThatIsSilentLeavesWritesInDoubtAndReadsAway(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.store.Timeout = redis.URL(), 2*time.Second })
	n.append("s", `{"content":"sesame 0"}`)
	redis.Signal(syscall.SIGSTOP)
	for _, q := range []request{
		{method: "GET", path: "/v1/sessions/s"}, {method: "GET", path: "/v1/sessions/s/chunks"}, {method: "GET", path: "/readyz"},
		{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: "[]"},
	} {
		if q.path == "/readyz" { // its result is cached for a moment
			eventually(t, "not ready", func() bool { return n.do(q).status == 503 })
		}
		a := n.do(q)
		a.refused(t, 503, "redis_away")
		redis.Signal(syscall.SIGCONT) // so that it dials again
		eventually(t, "ready", func() bool { return n.get("/readyz").status == 200 })
		redis.Signal(syscall.SIGSTOP)
	}
	// Connections exist: a command sent on one may take effect.
	redis.Signal(syscall.SIGCONT)
	eventually(t, "a connection is there", func() bool { return n.get("/v1/sessions/s/chunks").status == 200 })
	redis.Signal(syscall.SIGSTOP)
	n.post("/v1/sessions/s/chunks", typeJSON, `{"content":"sesame 1"}`).refused(t, 504, "outcome_unknown")
	redis.Signal(syscall.SIGCONT)
	eventually(t, "the chunk that was in doubt", func() bool { return n.page("s", "").Last == 2 })
}

func TestProblem_nodeThatDrainsIsNotReady(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	if got := into[map[string]string](t, n.get("/readyz"), 200); got["status"] != "ready" {
		t.Errorf("%v", got)
	}
	n.api.Drain()
	a := n.get("/readyz")
	a.refused(t, 503, "draining")
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if got := into[map[string]string](t, n.get("/healthz"), 200); got["status"] != "ok" {
		t.Errorf("%v", got)
	}
	// Calls under way, and new ones, are still served.
	n.append("s", `{"content":"sesame"}`)
	n.ask("s", secret)
}

func TestProblem_keyOfAnotherTypeIsAFaultWhoseTextIsNotTold(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.errors = redis.URL(), true })
	redis.Set(t.Context(), "chat:history:s", "sesame", 0)
	for _, q := range calls() {
		if asksRedis(q) && !isTickets(q) && strings.HasPrefix(q.path, "/v1/sessions") && (q.method != "GET" || q.path != "/v1/sessions") {
			if p := n.do(q).refused(t, 500, "redis_wrong_type"); strings.Contains(p.Detail, "WRONGTYPE") {
				t.Errorf("%+v", p)
			}
		}
	}
	if got := redis.Get(t.Context(), "chat:history:s").Val(); got != "sesame" {
		t.Errorf("the key is %q now", got)
	}
	if redis.Exists(t.Context(), "chat:session:s").Val() != 0 {
		t.Error("there is a session now")
	}
	if lines := strings.Count(n.log.String(), "request failed"); lines != 1 {
		t.Errorf("%d lines of log tell of it", lines)
	}
}

func TestProblem_panicIsAFaultAndTheNodeGoesOn(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) {
		s.errors = true
		s.logs = func(l Logs) Logs {
			return &faulty{Logs: l, append: func(func() (store.Appended, error)) (store.Appended, error) { panic("a bug") }}
		}
	})
	for range 2 {
		n.post("/v1/sessions/s/chunks", typeJSON, `{"content":"sesame"}`).refused(t, 500, "internal")
	}
	if !strings.Contains(n.log.String(), "a bug") {
		t.Error("the log does not say what happened")
	}
}

func TestProblem_pathsAndMethodsThatAreNoneOfTheContracts(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, path := range []string{"/doc", "/v1", "/v1/", "/v1/sessions/", "/v1/sessions/s/", "/v1/sessions/s/stop", "/v2/sessions", "/nothing", "/.git/config", "/openapi.json"} {
		for _, method := range []string{"GET", "POST"} {
			n.do(request{method: method, path: path, bad: true}).refused(t, 404, "not_found")
		}
	}
	for _, q := range []request{
		{method: "DELETE", path: "/v1/sessions"}, {method: "PUT", path: "/v1/sessions/s"}, {method: "PATCH", path: "/v1/sessions/s/chunks"},
		{method: "DELETE", path: "/v1/sessions/s/chunks"}, {method: "POST", path: "/v1/sessions/s/stream"}, {method: "GET", path: "/v1/sessions/s/cancel"},
		{method: "POST", path: "/"}, {method: "POST", path: "/healthz"}, {method: "DELETE", path: "/openapi.yaml"},
	} {
		n.do(q).refused(t, 405, "method_not_allowed")
	}
}

// A person whose browser opens an address that does not exist sees a page; a program gets the problem.
func TestProblem_unknownPathsAreAPageForPeople(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	page, err := fs.ReadFile(web.Files, "404.html")
	if err != nil {
		t.Fatal(err)
	}
	const browser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
	for _, c := range []struct {
		path   string
		accept []string
		html   bool
	}{
		{"/nothing", []string{browser}, true},
		{"/v1/nothing", []string{browser}, true},
		{"/openai/v1/nothing", []string{browser}, true},
		{"/404.html", []string{browser}, true},
		{"/nothing", []string{"application/xml", "text/html"}, true},
		{"/nothing", []string{"application/json;q=0.5, TEXT/HTML;q=0.9"}, true},
		{"/nothing", nil, false},
		{"/nothing", []string{"*/*"}, false},
		{"/nothing", []string{"text/html;q=0"}, false},
		{"/nothing", []string{"text/html;q=0.1, application/json"}, false},
		{"/nothing", []string{"application/problem+json, text/html"}, false},
		{"/nothing", []string{"text/html;q=much", ";;", ""}, false},
		{"/v1/sessions/none", []string{browser}, false}, // the contract says what this call returns
	} {
		for _, method := range []string{"GET", "HEAD"} {
			r, err := http.NewRequestWithContext(t.Context(), method, n.server.URL+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header["Accept"] = c.accept
			res, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			kind, policy := "application/problem+json", ""
			if c.html {
				kind, policy = "text/html; charset=utf-8", pagePolicy
			}
			h := res.Header
			if res.StatusCode != 404 || h.Get("Content-Type") != kind || c.html && h.Get("Content-Security-Policy") != policy ||
				method == "GET" && bytes.Equal(body, page) != c.html || c.path != "/v1/sessions/none" && !slices.Contains(h["Vary"], "Accept") {
				t.Errorf("%s %s for %q: %d %v %.80s", method, c.path, c.accept, res.StatusCode, h, body)
			}
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// Each call refuses a query that cannot be parsed, because the library might understand something else than was meant.
func TestProblem_malformedQueriesAreRefused(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `{"content":"sesame"}`)
	for _, q := range calls() {
		if !strings.HasPrefix(q.path, "/v1/") {
			continue
		}
		path, _, _ := strings.Cut(q.path, "?")
		for _, query := range []string{"?prefix=%zz", "?limit=1;after=2", "?first=%"} {
			w := httptest.NewRecorder()
			r := httptest.NewRequest(q.method, "http://127.0.0.1"+path, strings.NewReader(q.body))
			r.URL.RawQuery = query[1:]
			r.Header.Set("Content-Type", q.kind)
			n.api.ServeHTTP(w, r)
			if w.Code != 400 || !strings.Contains(w.Body.String(), `"member":"query"`) {
				t.Errorf("%s %s%s: %d %s", q.method, path, query, w.Code, w.Body)
			}
		}
	}
	if a := n.get("/v1/sessions?prefix=%2E%2e"); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
}
