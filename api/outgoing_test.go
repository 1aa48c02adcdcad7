package api

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"gapless/api/auth"
	"gapless/api/auth/authtest"
	"gapless/api/limit"
)

// unread requests something large on its own connection, and reads nothing of it.
func (n *node) unread(t *testing.T, path string) net.Conn {
	t.Helper()
	c := n.raw(t)
	_ = c.Conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", path)
	return c
}

// However a response is made, if its client does not read it, it ends after the write timeout, and frees everything it
// took.
func TestResponse_thatNobodyReadsIsOver(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) {
		s.api.WriteTimeout, s.api.ChunkMax, s.sse.WriteTimeout = 300*time.Millisecond, 1<<20, 300*time.Millisecond
	})
	for range 12 {
		n.append("s", fmt.Sprintf(`[{"content":%q}]`, strings.Repeat("x", 300<<10)))
	}
	for _, path := range []string{"/docs/swagger-ui-bundle.js", "/v1/sessions/s/chunks?limit=1000", "/v1/sessions/s/stream", "/v1/sessions/s/demo/naive"} {
		n.unread(t, path)
		eventually(t, path+" has begun", func() bool { return n.api.limits.Responses.Taken() > 0 || n.api.limits.Viewers.Taken() > 0 })
	}
	eventually(t, "all connections are gone but the one of this test's own client", func() bool {
		l := n.api.limits
		return l.Connections() <= 1 && l.Responses.Taken() == 0 && l.Viewers.Taken() == 0 && l.Naive.Taken() == 0
	})
}

// A response counts until its client has it. Meanwhile other calls are refused, except health checks.
func TestResponse_countsUntilItIsRead(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.Limits.Responses = 2*CallCost + partCost })
	n.append("s", `{"content":"a"}`)
	first := n.unread(t, "/docs/swagger-ui-bundle.js")
	eventually(t, "it is under way", func() bool { return n.api.limits.Responses.Taken() == CallCost })
	if p := n.page("s", ""); len(p.Chunks) != 1 {
		t.Errorf("there is room for a page, and %+v", p)
	}
	second := n.unread(t, "/docs/swagger-ui-bundle.js")
	eventually(t, "both are under way", func() bool { return n.api.limits.Responses.Taken() == 2*CallCost })
	n.get("/v1/sessions/s/chunks").refused(t, 503, "node_limit")
	for _, path := range []string{"/healthz", "/readyz"} {
		if a := n.get(path); a.status != 200 {
			t.Errorf("%s: %d", path, a.status)
		}
	}
	if n.refusals("responses") == 0 {
		t.Error("no refusal is counted")
	}
	_ = first.Close()
	_ = second.Close()
	eventually(t, "nothing is under way", func() bool { return n.api.limits.Responses.Taken() == 0 })
}

// Viewers and uploads have their own limits, however long they take.
func TestResponse_ofAViewerOrAnUploadIsNoneUnderWay(t *testing.T) {
	t.Parallel()
	for _, plain := range []bool{false, true} {
		n := serve(t, func(s *setup) { s.api.Limits.Responses, s.sse.Plain = CallCost, plain })
		n.greeted("s")
		f := n.upload(t, "s", nil)
		f.write(line("a"))
		eventually(t, "the upload has begun", func() bool { return n.api.limits.Uploads.Taken() == 1 && n.api.limits.Responses.Taken() == 0 })
		n.greeted("s")
		eventually(t, "a call is answered", func() bool { return n.get("/v1/sessions/s").status == 200 })
		_ = f.w.Close()
		f.result()
	}
}

// If too many calls are under way, every call says so, and viewers must reconnect.
func TestResponse_tooManyUnderWayIsSaidEverywhere(t *testing.T) {
	t.Parallel()
	node := serve(t, proxied(func(s *setup) { s.api.Limits.Responses = CallCost - 1 }))
	caller := serve(t, proxied(func(s *setup) { s.api.Limits.CallerResponses = CallCost - 1 }))
	for _, q := range calls() {
		switch {
		case q.path == "/healthz", q.path == "/readyz":
			if a := node.do(q); a.status != 200 {
				t.Errorf("%s: %d", q.path, a.status)
			}
		case strings.Contains(q.path, "s/stream"):
			node.sentAway(as(q, "198.51.100.1"), "responses")
			caller.sentAway(as(q, "198.51.100.1"), "caller-responses")
		default:
			node.do(as(q, "198.51.100.1")).refused(t, 503, "node_limit")
			caller.do(as(q, "198.51.100.1")).refused(t, 429, "caller_limit")
		}
	}
}

// The limit of pages under way applies to each caller separately.
func TestResponse_pagesCountForTheirCaller(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.CallerResponses = CallCost + partCost - 1 }))
	n.append("s", `{"content":"a"}`)
	n.do(as(request{method: "GET", path: "/v1/sessions/s/chunks"}, "198.51.100.1")).refused(t, 429, "caller_limit")
	if a := n.do(as(request{method: "GET", path: "/v1/sessions/s"}, "198.51.100.1")); a.status != 200 {
		t.Errorf("%d", a.status)
	}
}

// A body that came in chunks may have had a length as well, so its connection is not reused.
func TestRequest_inChunksIsItsConnectionsLast(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, length := range []string{"", "Content-Length: 2\r\n", "Content-Length: 200\r\n"} {
		c := n.raw(t)
		fmt.Fprintf(c, "POST /v1/sessions/s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%sTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"+
			"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", length)
		all, _ := io.ReadAll(c)
		if strings.Count(string(all), "HTTP/1.1 ") != 1 || !strings.Contains(string(all), "Connection: close") {
			t.Errorf("%q: %q", length, all)
		}
	}
}

// A client that leaves during any response is no error of the server, and causes no error in its log (serve checks).
func TestResponse_toAClientThatLeavesIsNoError(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for range 20 {
		n.append("s", fmt.Sprintf(`[{"content":%q}]`, strings.Repeat("x", 60<<10)))
	}
	for _, path := range []string{"/docs/swagger-ui-bundle.js", "/", "/openapi.yaml", "/v1/sessions/s", "/v1/sessions/s/chunks?limit=1000", "/v1/sessions/s/stream", "/v1/sessions/s/demo/naive", "/nothing"} {
		for range 5 {
			c := n.unread(t, path).(conn)
			_ = c.Conn.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
			c = n.unread(t, path).(conn)
			_, _ = c.Read(make([]byte, 1))
			_ = c.Conn.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
	}
	eventually(t, "nothing is under way", func() bool { return n.api.limits.Responses.Taken() == 0 && n.api.limits.Viewers.Taken() == 0 })
}

// Callers without a token fill half of the memory. The other half is for callers with a token, even on a new connection.
func TestResponse_strangersLeaveHalfToOthers(t *testing.T) {
	t.Parallel()
	const all = 8 * CallCost
	n, issuer := locked(t, func(s *setup, _ *auth.Config) {
		s.api.Limits.Addresses, s.api.Limits.Tokens, s.api.Limits.Responses, s.api.Limits.CallerResponses = true, true, all, 0
	})
	strangers := n.api.limits.StrangerResponses
	if err := strangers.Take(limit.Caller{}, all/2-CallCost+1); err != nil {
		t.Fatal(err)
	}
	token := issuer.Token(time.Hour, authtest.May{"read": {"s"}})
	q := request{method: "GET", path: "/v1/sessions/s", header: map[string]string{"Connection": "close"}}
	for range 2 {
		n.do(q).refused(t, 503, "node_limit")
		n.do(bearing(q, "x.y.z")).refused(t, 503, "node_limit")
		if a := n.do(bearing(q, token)); a.status != 404 {
			t.Errorf("with a token: %d %s", a.status, a.body)
		}
	}
	strangers.Give(limit.Caller{}, all/2-CallCost+1)
	n.do(q).refused(t, 401, "unauthorized")
	eventually(t, "all is given back", func() bool { return strangers.Taken() == 0 && n.api.limits.Responses.Taken() == 0 })
}
