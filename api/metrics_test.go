package api

import (
	"strings"
	"testing"
)

// Responses are counted by route, not by the path that a stranger wrote.
func TestMetrics_countRequestsByRoute(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("a", `{"content":"x"}`)
	n.append("b", `{"content":"x"}`)
	n.do(request{method: "GET", path: "/nowhere"})
	n.do(request{method: "BREW", path: "/v1/sessions"})
	a := n.get("/metrics")
	if a.status != 200 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") {
		t.Fatalf("%d %s", a.status, a.header)
	}
	for _, line := range []string{
		`gapless_http_requests_total{method="POST",route="/v1/sessions/:id/chunks",status="201"} 2`,
		`gapless_http_requests_total{method="GET",route="none",status="404"} 1`,
		`gapless_http_requests_total{method="other",route="/v1/sessions",status="405"} 1`,
		"gapless_draining 0",
	} {
		if !strings.Contains(string(a.body), line+"\n") {
			t.Errorf("it does not say %s", line)
		}
	}
}
