package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"gapless/sse"
)

// greeted views a session, and reads the welcome.
func (n *node) greeted(session string, header ...string) *stream {
	n.t.Helper()
	s := n.watch(session, "", header...)
	s.next()
	return s
}

func (n *node) disturb(session, connection, do string) answer {
	n.t.Helper()
	return n.post("/v1/sessions/"+session+"/demo", typeJSON, fmt.Sprintf(`{"connection":%q,"do":%q}`, connection, do))
}

// naively views a session with a naive viewer.
func (n *node) naively(session, query string) *naive {
	n.t.Helper()
	return &naive{n.open(request{path: "/v1/sessions/" + session + "/demo/naive" + query})}
}

type naive struct{ *stream }

// line returns the next line that is not empty.
func (s *naive) line() string {
	s.t.Helper()
	for {
		text, err := s.body.ReadString('\n')
		if err != nil {
			s.t.Fatal(err)
		}
		if text = strings.TrimSuffix(text, "\n"); text != "" && text != ":" {
			return text
		}
	}
}

// until reads up to a line, and returns the contents of the chunks before it.
func (s *naive) until(end string) (said []string) {
	s.t.Helper()
	for {
		text := s.line()
		if content, ok := strings.CutPrefix(text, `data: {"seq":`); ok {
			_, content, _ = strings.Cut(content, `"content":"`)
			said = append(said, strings.TrimSuffix(content, `"}`))
		}
		if strings.Contains(text, end) {
			return said
		}
	}
}

func TestDemo_isNoPartOfAnotherServer(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.Demo = false })
	s := n.greeted("s")
	n.append("s", `{"content":"sesame"}`)
	plain := &http.Transport{DisableKeepAlives: true}
	for _, q := range []request{
		{method: "POST", path: "/v1/sessions/s/demo", kind: typeJSON, body: fmt.Sprintf(`{"connection":%q,"do":"cut"}`, s.header.Get("Gapless-Connection"))},
		{method: "GET", path: "/v1/sessions/s/demo/naive"}, {method: "OPTIONS", path: "/v1/sessions/s/demo"},
	} {
		r := n.new(q)
		res, err := plain.RoundTrip(r) // the contract says which servers have it
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != 404 {
			t.Errorf("%s %s: %d", q.method, q.path, res.StatusCode)
		}
	}
	s.take(0, 1)
}

// A cut connection resumes where it was, however it is served.
func TestDemo_cutConnectionComesBackToWhereItWas(t *testing.T) {
	t.Parallel()
	for name, plain := range map[string]bool{"taken over": false, "the server's": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := serve(t, func(s *setup) { s.sse.Plain = plain })
			n.append("s", `[{"content":"1"},{"content":"2"}]`)
			s := n.greeted("s")
			other := n.greeted("s")
			s.take(0, 2)
			other.take(0, 2)
			connection := s.header.Get("Gapless-Connection")
			n.disturb("another", connection, "cut").refused(t, 404, "connection_not_found") // a caller that may read another session may not cut this connection
			if a := n.disturb("s", connection, "cut"); a.status != 204 {
				t.Fatalf("%d %s", a.status, a.body)
			}
			if e, err := s.read(); err == nil || err == io.EOF {
				t.Errorf("the response was not broken off: %+v %v", e, err)
			}
			n.append("s", `{"content":"3"}`)
			if got := n.greeted("s", "Last-Event-ID", "2").take(2, 1); !slices.Equal(got, []string{"3"}) {
				t.Errorf("%q", got)
			}
			if got := other.take(2, 1); !slices.Equal(got, []string{"3"}) {
				t.Errorf("the other one: %q", got)
			}
			eventually(t, "it is not known any more", func() bool { return n.disturb("s", connection, "cut").status == 404 })
			if !strings.Contains(n.log.String(), "cause="+string(sse.Cut)) {
				t.Error("the log does not say that it was cut")
			}
		})
	}
}

// Its chunks are late, but complete. Afterwards it is as fast as the others.
func TestDemo_connectionThatIsSlowedDownLosesNothing(t *testing.T) {
	t.Parallel()
	for name, plain := range map[string]bool{"taken over": false, "the server's": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := serve(t, func(s *setup) { s.sse.Plain = plain })
			n.append("s", `{"content":"1"}`)
			s, other := n.greeted("s"), n.greeted("s")
			s.take(0, 1)
			other.take(0, 1)
			connection := s.header.Get("Gapless-Connection")
			n.disturb("s", connection, "slow")
			begun := time.Now()
			var said []string
			for i := range 20 {
				said = append(said, fmt.Sprint(i+2))
			}
			n.append("s", `[{"content":"`+strings.Join(said, `"},{"content":"`)+`"}]`)
			if got := other.take(1, 20); len(got) != 20 {
				t.Errorf("the other one: %q", got)
			}
			quick := time.Since(begun)
			if got := s.take(1, 20); !slices.Equal(got, said) {
				t.Errorf("%q", got)
			}
			if took := time.Since(begun); took < 19*slowPause || quick >= 15*slowPause {
				t.Errorf("twenty chunks took %v, and %v without that", took, quick)
			}
			n.append("s", strings.Replace("["+strings.Repeat(`,{"content":"6"}`, 200)+"]", ",", "", 1))
			n.disturb("s", connection, "quick")
			begun = time.Now()
			s.take(21, 200)
			if took := time.Since(begun); took > 100*slowPause {
				t.Errorf("it was slow for another %v", took)
			}
			n.append("s", `{"content":"7"}`) // it is synced again
			s.take(221, 1)
		})
	}
}

// The race, as RACE.md tells it: read, publish, subscribe.
func TestDemo_naiveViewerLosesWhatIsPublishedBeforeItSubscribes(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `[{"content":"1"},{"content":"2"}]`)
	ours, naive := n.greeted("s"), n.naively("s", "?gap=1000")
	if got := naive.until(`"seq":2`); !slices.Equal(got, []string{"1", "2"}) {
		t.Fatalf("the history: %q", got)
	}
	n.append("s", `{"content":"3"}`)
	if got := naive.until("event: subscribed"); len(got) > 0 {
		t.Errorf("before it subscribed it was given %q", got)
	}
	n.append("s", `{"content":"4"}`)
	if got := naive.until(`"seq":4`); !slices.Equal(got, []string{"4"}) {
		t.Errorf("behind that it was given %q", got)
	}
	if got := ours.take(0, 4); !slices.Equal(got, []string{"1", "2", "3", "4"}) {
		t.Errorf("ours was given %q", got)
	}
	connection := naive.header.Get("Gapless-Connection")
	if a := n.disturb("s", connection, "slow"); a.status != 204 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := n.disturb("s", connection, "cut"); a.status != 204 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if rest, err := io.ReadAll(naive.body); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it was not broken off: %q %v", rest, err)
	}
	again := n.naively("s", "")
	if got := again.until(`"seq":4`); len(got) != 4 {
		t.Errorf("when it came back it was given %q", got)
	}
	again.until("event: subscribed")
	n.api.Drain()
	if rest, err := io.ReadAll(again.body); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a node that drains did not send it away: %q %v", rest, err)
	}
}

func TestDemo_naiveViewerGetsALongHistory(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BodyMax = 1 << 20 })
	for range 3 {
		n.append("s", strings.Replace("["+strings.Repeat(`,{"content":"a"}`, 900)+"]", ",", "", 1))
	}
	if got := n.naively("s", "").until("event: subscribed"); len(got) != 2700 {
		t.Errorf("%d chunks", len(got))
	}
}

func TestDemo_refusesWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	n := serve(t, proxied(func(s *setup) { s.api.Limits.Naive, s.api.Limits.CallerNaive = 2, 1 }))
	bad := func(method, path, kind, body string) answer {
		return n.do(request{method: method, path: path, kind: kind, body: body, bad: true})
	}
	connection := n.greeted("s").header.Get("Gapless-Connection")
	const demo = "/v1/sessions/s/demo"
	bad("POST", demo, typeJSON, `{"connection":"`+connection+`","do":"sesame"}`).refused(t, 400, "invalid_parameter")
	bad("POST", demo, typeJSON, `{"connection":"`+connection+`"}`).refused(t, 400, "invalid_parameter")
	bad("POST", demo, typeJSON, `{"sesame":"cut"}`).refused(t, 400, "invalid_json")
	bad("POST", demo, typeText, `sesame`).refused(t, 415, "unsupported_media_type")
	bad("POST", demo, typeJSON, `{"do":"`+strings.Repeat("x", 17<<10)+`"}`).refused(t, 413, "body_too_large")
	bad("POST", "/v1/sessions/a%20b/demo", typeJSON, `{}`).refused(t, 400, "invalid_session_id")
	bad("GET", "/v1/sessions/a%20b/demo/naive", "", "").refused(t, 400, "invalid_session_id")
	for _, gap := range []string{"-1", "2001", "sesame", "1.5"} {
		bad("GET", demo+"/naive?gap="+gap, "", "").refused(t, 400, "invalid_parameter")
	}
	n.naively("s", "").until("event: subscribed")
	n.do(request{method: "GET", path: demo + "/naive"}).refused(t, 429, "caller_limit")
	n.open(as(request{path: demo + "/naive"}, "198.51.100.1"))
	n.do(as(request{method: "GET", path: demo + "/naive"}, "198.51.100.2")).refused(t, 503, "node_limit")
}
