package api

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// An operator sees which origin was refused, and the flag that allows it.
func TestOrigin_oneThatIsRefusedIsNamedInTheLogOnce(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.Origins = []string{friend} })
	lines := func() (said []string) {
		for line := range strings.Lines(n.log.String()) {
			if strings.Contains(line, "a page of another origin was refused") {
				said = append(said, line)
			}
		}
		return said
	}
	from := func(method, path, origin, site string) {
		q := request{method: method, path: path, header: map[string]string{"Origin": origin}, bad: true}
		if site != "" {
			q.header["Sec-Fetch-Site"] = site
		}
		if method == "POST" {
			q.kind, q.body = typeJSON, `{"content":"sesame"}`
		}
		n.do(q)
	}
	const s = "/v1/sessions/s"
	from("GET", s+"/chunks", friend, "cross-site")
	from("POST", s+"/chunks", friend, "cross-site")
	from("GET", s+"/chunks", n.server.URL, "")
	from("POST", s+"/chunks", "https://proxied.example", "same-origin") // the proxy changes Host
	from("GET", s+"/chunks", "https://proxied.example", "same-origin")
	from("GET", "/gapless.js", "https://import.example", "cross-site")
	if said := lines(); len(said) != 0 {
		t.Errorf("calls that are allowed: %q", said)
	}
	for range 3 {
		from("POST", s+"/chunks", "https://a.example", "cross-site")
		from("GET", s+"/chunks", "https://a.example", "cross-site")
		from("GET", s+"/chunks", "https://b.example:8443", "")
		from("OPTIONS", "/openai/v1/responses", "https://c.example", "cross-site")
		from("GET", s+"/chunks", "null", "cross-site")
		from("GET", s+"/chunks", "https://"+strings.Repeat("x", 400), "cross-site")
	}
	said := lines()
	for i, want := range []string{"-cors-origins " + friend + ",https://a.example", "-cors-origins " + friend + ",https://b.example:8443", "-cors-origins " + friend + ",https://c.example", "cannot be allowed"} {
		if len(said) != 4 || !strings.Contains(said[i], want) || !strings.Contains(said[i], "level=WARN") || !strings.Contains(said[i], "origin=") {
			t.Fatalf("%s: the log says %q", want, said)
		}
	}
}

func TestOrigin_linesAreLimitedByOriginAndMinute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &strangeOrigins{last: map[string]time.Time{}}
		for minute := range 3 {
			said := 0
			for i := range 1000 {
				for range 2 {
					if s.first(fmt.Sprint("https://", minute, ".", i, ".example")) {
						said++
					}
				}
			}
			if said != strangeMost || len(s.last) > strangeMost {
				t.Errorf("minute %d: %d lines, %d origins remembered", minute, said, len(s.last))
			}
			if s.first("https://2.0.example") {
				t.Error("a line too many")
			}
			time.Sleep(time.Minute)
		}
		if !s.first("https://0.0.example") || s.first("https://0.0.example") {
			t.Error("an origin is not named again after a minute, or twice")
		}
	})
}
