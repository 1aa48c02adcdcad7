package web_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
	"gapless/web"
)

// These tests run gapless.js in Node, by fetch and by an EventSource, against servers that lie,
// stall and lose their data. clients_test.go runs it among the other clients, on real nodes with
// cut connections. tabs_test.go runs it in a browser's tabs.

// fake is a server whose responses a test writes: the next one for each request for the stream.
type fake struct {
	*httptest.Server
	t testing.TB

	mu      sync.Mutex
	answers []func(says)
	asked   []string // for each request for the stream: its cursor and what else matters
	session string   // the response to a GET of the session, or a status
	looks   int
	epoch   string // of the last welcome
	ended   string // the number of the end after it was sent: a request with that cursor gets 204
}

func newFake(t testing.TB, session string, answers ...func(says)) *fake {
	t.Helper()
	f := &fake{t: t, session: session, answers: answers}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/sessions/s/stream", f.stream)
	mux.HandleFunc("GET /v1/sessions/s", func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.looks++
		var status int
		if n, _ := fmt.Sscan(f.session, &status); n == 1 {
			w.WriteHeader(status)
			return
		}
		_, _ = io.WriteString(w, f.session)
	})
	mux.HandleFunc("POST /v1/sessions/s/{call}", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.PathValue("call") == "messages" {
			w.WriteHeader(http.StatusAccepted)
			_ = json.NewEncoder(w).Encode(map[string]string{"message_id": string(body), "reply_message_id": r.Header.Get("Authorization")})
			return
		}
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusConflict)
		_, _ = fmt.Fprintf(w, `{"title":"Conflict","status":409,"detail":%q,"code":"message_ended"}`, body)
	})
	mux.Handle("GET /", http.FileServerFS(web.Files))
	f.Server = httptest.NewServer(mux)
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
	})
	return f
}

func (f *fake) stream(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	line := r.Header.Get("Last-Event-ID")
	if line == "" {
		line = q.Get("after")
	}
	for _, name := range []string{"snapshot", "ticket"} {
		if q.Has(name) {
			line += " " + q.Get(name)
		}
	}
	if a := r.Header.Get("Authorization"); a != "" {
		line += " " + a
	}
	f.mu.Lock()
	n := len(f.asked)
	cursor, _, _ := strings.Cut(line, " ")
	if ended := n >= len(f.answers) && f.ended != "" && cursor == f.ended; ended {
		says{w, r, f}.nothing(f.epoch, "ended")
		f.mu.Unlock()
		return
	}
	f.asked = append(f.asked, line)
	f.mu.Unlock()
	if n >= len(f.answers) {
		f.t.Errorf("request %d for the stream, %q, was not expected", n+1, line)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	f.answers[n](says{w, r, f})
}

// wanted checks what the requests for the stream asked for.
func (f *fake) wanted(t *testing.T, want ...string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.asked, want) {
		t.Errorf("the stream was asked for with %q, not %q", f.asked, want)
	}
}

// looked returns how often the session was requested.
func (f *fake) looked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.looks
}

// says is one response of the fake.
type says struct {
	w http.ResponseWriter
	r *http.Request
	f *fake
}

// nothing sends a 204: nothing follows, in a log of this epoch.
func (s says) nothing(epoch, reason string) {
	s.w.Header().Set("Gapless-Epoch", epoch)
	s.w.Header().Set("Gapless-Reason", reason)
	s.w.WriteHeader(http.StatusNoContent)
}

func (s says) raw(text string) {
	if s.w.Header().Get("Content-Type") == "" {
		s.w.Header().Set("Content-Type", "text/event-stream")
		text = ":\n" + text
	}
	_, _ = io.WriteString(s.w, text)
	_ = http.NewResponseController(s.w).Flush()
}

// retry is short, to keep these tests short.
func (s says) welcome(epoch string, cursor, last int) {
	s.f.mu.Lock()
	s.f.epoch = epoch
	s.f.mu.Unlock()
	s.raw(fmt.Sprintf("event: welcome\ndata: {\"type\":\"welcome\",\"session\":\"s\",\"epoch\":%q,\"first_seq\":1,\"last_seq\":%d,\"cursor\":%d,\"node\":\"fake\",\"connection\":\"c\"}\nretry: 30\nid: %[3]d\n\n",
		epoch, last, cursor))
}

func (s says) chunks(seqs ...int) {
	for _, seq := range seqs {
		s.raw(fmt.Sprintf("data: {\"seq\":%d,\"ts\":1,\"type\":\"delta\",\"content\":\"word %[1]d\"}\nid: %[1]d\n\n", seq))
	}
}

// end ends the log. The response must end with it.
func (s says) end(seq int) {
	s.f.mu.Lock()
	s.f.ended = fmt.Sprint(seq)
	s.f.mu.Unlock()
	s.copied(seq)
}

// copied sends an end that a program has copied from another log. It ends nothing.
func (s says) copied(seq int) {
	s.raw(fmt.Sprintf("data: {\"seq\":%d,\"ts\":1,\"type\":\"end\"}\nid: %[1]d\n\n", seq))
}

func (s says) reset(reason, epoch string, id, last int) {
	s.raw(fmt.Sprintf("event: reset\ndata: {\"type\":\"reset\",\"reason\":%q,\"epoch\":%q,\"cursor\":9,\"first_seq\":1,\"last_seq\":%d}\nid: %d\n\n", reason, epoch, last, id))
}

// hang sends nothing more, and does not close.
func (s says) hang() { <-s.r.Context().Done() }

func (s says) breaks() { panic(http.ErrAbortHandler) }

// run is gapless.js, running in Node.
type run struct {
	t     *testing.T
	stdin io.WriteCloser
	kill  func() error
	done  chan struct{}

	mu     sync.Mutex
	lines  [][]any
	stderr bytes.Buffer
}

// followed follows a URL. by is fetch, eventsource or headers; options are those of follow and of
// follow.mjs.
func followed(t *testing.T, url, by string, options map[string]any) *run {
	t.Helper()
	dir, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]any{"url": url, "by": by}
	maps.Copy(all, options)
	arg, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	r := &run{t: t, done: make(chan struct{})}
	cmd := exec.Command("node", "--no-warnings", filepath.Join(dir, "follow.mjs"), string(arg))
	cmd.Stderr = &r.stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if r.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("node: %v (make test installs it)", err)
	}
	r.kill = cmd.Process.Kill
	go func() { // ends with the process, which stop ends
		defer close(r.done)
		for lines := bufio.NewReader(out); ; {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				break
			}
			var what []any
			if json.Unmarshal(line, &what) == nil {
				r.mu.Lock()
				r.lines = append(r.lines, what)
				r.mu.Unlock()
			}
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		r.stop()
		if t.Failed() {
			t.Logf("%s said:\n%s\n%s", by, strings.Join(r.all(), "\n"), &r.stderr)
		}
	})
	return r
}

// stop closes the follower. Then nothing of it may keep Node running.
func (r *run) stop() {
	_ = r.stdin.Close()
	select {
	case <-r.done:
	case <-time.After(patience):
		r.t.Error("a follower that is closed keeps Node alive")
		_ = r.kill()
		<-r.done
	}
}

func (r *run) call(name string, args ...any) {
	r.t.Helper()
	line, err := json.Marshal(append([]any{name}, args...))
	if err == nil {
		_, err = r.stdin.Write(append(line, '\n'))
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func text(line []any) string { return strings.TrimSuffix(fmt.Sprintln(line...), "\n") }

func (r *run) all() (all []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.lines {
		all = append(all, text(line))
	}
	return all
}

// said returns the calls of the handlers, except for states.
func (r *run) said() (all []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.lines {
		if line[0] != "state" {
			all = append(all, text(line))
		}
	}
	return all
}

// member returns one of the follower's members, as a handler last saw it.
func (r *run) member(name string) (value any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.lines {
		if line[0] != "state" {
			continue
		}
		if name == "state" {
			value = line[1]
		} else {
			value = line[2].(map[string]any)[name]
		}
	}
	return value
}

// says waits for exactly these calls of handlers.
func (r *run) says(want ...string) {
	r.t.Helper()
	eventually(r.t, strings.Join(want, "; "), func() bool { return len(r.said()) >= len(want) })
	if got := r.said(); !slices.Equal(got, want) {
		r.t.Fatalf("the handlers were called with\n  %s\nnot\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// until waits until a member has a value.
func (r *run) until(name string, want any) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%s is %v", name, want), func() bool { return fmt.Sprint(r.member(name)) == fmt.Sprint(want) })
}

func (r *run) counts(want map[string]int) {
	r.t.Helper()
	for _, name := range []string{"gaps", "doubles", "resets", "reconnects"} {
		if got := fmt.Sprint(r.member(name)); got != fmt.Sprint(want[name]) {
			r.t.Errorf("%s is %s, not %d", name, got, want[name])
		}
	}
}

// both runs a test by fetch and by an EventSource.
func both(t *testing.T, test func(t *testing.T, by string)) {
	t.Parallel()
	for _, by := range []string{"fetch", "eventsource"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			test(t, by)
		})
	}
}

const streamPath = "/v1/sessions/s/stream"

func session(epoch string, last int, ended bool) string {
	return fmt.Sprintf(`{"id":"s","epoch":%q,"first_seq":1,"last_seq":%d,"ended":%t}`, epoch, last, ended)
}

// asked is a response without a stream, for every request: an EventSource hides it, and then fetch
// gets it again.
func asked(by string, answer func(says)) []func(says) {
	if by == "eventsource" {
		return []func(says){answer, answer}
	}
	return []func(says){answer}
}

func TestGapless_dropsWhatComesTwiceAndAsksOnceForWhatIsMissing(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 0, 2); s.chunks(1, 2, 2, 1, 3, 5); s.hang() },
			func(s says) { s.welcome("e", 3, 5); s.chunks(4, 5, 8); s.hang() },
			func(s says) { s.welcome("e", 5, 8); s.chunks(8, 9); s.end(10) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 word 1 history", "chunk 2 word 2 history", "chunk 3 word 3 live",
			"chunk 4 word 4 repaired", "chunk 5 word 5 repaired", "hole 6 7", "chunk 8 word 8 repaired", "chunk 9 word 9 live",
			"chunk 10 end live", "end ended")
		r.until("state", "ended")
		r.counts(map[string]int{"gaps": 2, "doubles": 2, "reconnects": 2})
		f.wanted(t, "", "3", "5")
	})
}

// A cursor in a welcome that is ahead of ours is a gap before any chunk shows it.
func TestGapless_takesNoCursorThatIsAheadOfItsOwn(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 3, 5); s.chunks(4); s.hang() },
			func(s says) { s.welcome("e", 3, 5); s.chunks(4); s.end(5) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("hole 1 3", "chunk 4 word 4 repaired", "chunk 5 end repaired", "end ended")
		f.wanted(t, "", "")
	})
}

// An "end" that a program pushed into Redis ends nothing. Text before the first event may be the
// rest of another response (WebKit).
func TestGapless_isNotTakenInByWhatOnlyLooksLikeTheServers(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404", func(s says) {
			s.raw("data: {\"seq\":7,\"content\":\"half\n")
			s.welcome("e", 0, 1)
			s.raw("data: {\"type\":\"end\"}\nid: 1\n\ndata: {\"seq\":2,\"type\":\"end\"}\nid: 2\n\ndata: no JSON\nid: 3\n\ndata: null\nid: 4\n\n")
			s.end(5)
		})
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 end history", "chunk 2 end live", "chunk 3 no JSON live", "chunk 4 null live", "chunk 5 end live", "end ended")
	})
}

func TestGapless_mayBeRestartedByAHandler(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		answer := func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.end(2) }
		f := newFake(t, "404", answer, answer)
		r := followed(t, f.URL+streamPath, by, map[string]any{"again": 2})
		r.says("chunk 1 word 1 history", "chunk 2 end live", "reset restart", "chunk 1 word 1 history", "chunk 2 end live", "end ended")
		f.wanted(t, "", "")
	})
}

func TestGapless_mayBeRestartedAndClosedByWhatARestartCalls(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 0, 2); s.chunks(1, 2); s.reset("ahead", "e", 0, 1); s.hang() },
			func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.end(2) })
		r := followed(t, f.URL+streamPath, by, map[string]any{"resets": "restart"})
		r.says("chunk 1 word 1 history", "chunk 2 word 2 history", "reset ahead", "reset restart",
			"chunk 1 word 1 history", "chunk 2 end live", "end ended")
		f.wanted(t, "", "")

		f = newFake(t, "404", func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.hang() })
		r = followed(t, f.URL+streamPath, by, map[string]any{"resets": "close"})
		r.says("chunk 1 word 1 history")
		r.call("restart")
		r.stop()
		r.says("chunk 1 word 1 history", "reset restart")
		f.wanted(t, "")
	})
}

// With fetch, heartbeats are seen. Without them the connection is dead, whatever the log says.
func TestGapless_missesHeartbeatsByFetch(t *testing.T) {
	t.Parallel()
	f := newFake(t, session("e", 1, false),
		func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.hang() },
		func(s says) { s.welcome("e", 1, 1); s.end(2) })
	r := followed(t, f.URL+streamPath, "fetch", map[string]any{"silence": 5000})
	r.says("chunk 1 word 1 history", "chunk 2 end live", "end ended")
	f.wanted(t, "", "1")
}

func TestGapless_waitsForAsLongAsItIsToldTo(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		times := make(chan time.Time, 2)
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 0, 0); s.raw("retry: 5000\n\n"); times <- time.Now(); s.breaks() },
			func(s says) { times <- time.Now(); s.welcome("e", 0, 0); s.end(1) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 end live", "end ended")
		if wait := -(<-times).Sub(<-times); wait < 4500*time.Millisecond {
			t.Errorf("it came back after %v", wait)
		}
	})
}

func TestGapless_startsAgainWhenTheEpochHasChanged(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 0, 2); s.chunks(1, 2); s.breaks() },
			func(s says) { s.welcome("other", 2, 9); s.chunks(3); s.hang() },
			func(s says) { s.welcome("other", 0, 1); s.chunks(1); s.end(2) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 word 1 history", "chunk 2 word 2 history", "reset epoch", "chunk 1 word 1 history", "chunk 2 end live", "end ended")
		r.until("epoch", "other")
		f.wanted(t, "", "2", "")
	})
}

func TestGapless_forgetsAtAResetAndGoesOnBehindIt(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) {
				s.welcome("e", 0, 1)
				s.chunks(1)
				s.reset("trimmed", "e", 40, 41)
				s.chunks(41)
				s.reset("ahead", "other", 0, 0)
				s.chunks(1)
				s.breaks()
			},
			func(s says) { s.welcome("other", 1, 1); s.end(2) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 word 1 history", "reset trimmed", "chunk 41 word 41 history", "reset ahead", "chunk 1 word 1 live", "chunk 2 end live", "end ended")
		r.counts(map[string]int{"resets": 2, "reconnects": 1})
		f.wanted(t, "", "1")
	})
}

// A program that shows only the state need not do so for each chunk.
func TestGapless_tellsOfAStateOnce(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 0, 3); s.chunks(1, 2, 3, 4, 5); s.breaks() },
			func(s says) { s.welcome("e", 5, 5); s.end(6) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.until("state", "ended")
		r.until("seq", 6)
		want := "[connecting catching up live waiting to reconnect connecting live connecting ended]"
		if got := fmt.Sprint(r.member("entered")); got != want {
			t.Errorf("onState was called with %s, not %s", got, want)
		}
	})
}

// A deletion is reported on the connection, or by 204 to a client that was away.
func TestGapless_endsWhenTheSessionIsDeleted(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404", func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.reset("deleted", "", 1, 0) })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 word 1 history", "reset deleted", "end deleted")
		r.until("state", "ended")

		f = newFake(t, "404",
			append([]func(says){func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.breaks() }},
				asked(by, func(s says) { s.nothing("e", "deleted") })...)...)
		r = followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 word 1 history", "reset deleted", "end deleted")
		r.until("state", "ended")
	})
}

// A 204 closes an EventSource like a refusal.
func TestGapless_tellsAnEndFromARefusal(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "401", asked(by, func(s says) { s.nothing("e", "ended") })...)
		r := followed(t, f.URL+streamPath, by, map[string]any{"after": 7})
		r.says("end ended")
		r.until("state", "ended")
		r.until("epoch", "e")

		refused := asked(by, func(s says) { s.w.WriteHeader(http.StatusUnauthorized) })
		f = newFake(t, "401", slices.Concat(refused, []func(says){
			func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.end(2) },
			func(s says) { s.nothing("e", "ended") },
		}, refused)...)
		r = followed(t, f.URL+streamPath, by, nil)
		r.until("state", "disconnected")
		r.call("restart")
		r.says("reset restart", "chunk 1 word 1 history", "chunk 2 end live", "end ended")
		// It may be started again after the end, too.
		r.call("restart")
		r.until("state", "disconnected")
	})
}

// A 204 for another log than ours is no end: that log is read from its start, and then it has
// ended.
func TestGapless_takesTheOtherLogWhereThatOneHasEnded(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		for _, options := range []map[string]any{nil, {"tickets": true}} {
			f := newFake(t, "401", slices.Concat(
				[]func(says){func(s says) { s.welcome("e", 0, 2); s.chunks(1, 2); s.breaks() }},
				asked(by, func(s says) { s.nothing("other", "ended") }),
				[]func(says){func(s says) { s.welcome("other", 0, 2); s.chunks(1); s.end(2) }})...)
			r := followed(t, f.URL+streamPath, by, options)
			r.says("chunk 1 word 1 history", "chunk 2 word 2 history", "reset epoch", "chunk 1 word 1 history", "chunk 2 end history", "end ended")
			r.until("state", "ended")
			r.until("epoch", "other")
			r.counts(map[string]int{"resets": 1, "reconnects": 1})
		}
	})
}

// An end that was copied from another log is in this one, and the session continues.
func TestGapless_believesAnEndOnlyOfTheServer(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		for _, options := range []map[string]any{nil, {"tickets": true}, {"snapshot": true}} {
			f := newFake(t, "404",
				func(s says) { // whether more comes on the same response
					s.welcome("e", 0, 3)
					s.chunks(1)
					s.copied(2)
					s.chunks(3, 4)
					s.copied(5)
					s.breaks()
				},
				func(s says) { // or on the next one
					s.welcome("e", 5, 5)
					s.chunks(6)
					s.copied(7)
				},
				func(s says) { s.welcome("e", 7, 7); s.breaks() },
				func(s says) { s.welcome("e", 7, 7); s.end(8) })
			r := followed(t, f.URL+streamPath, by, options)
			r.says("chunk 1 word 1 history", "chunk 2 end history", "chunk 3 word 3 history", "chunk 4 word 4 live", "chunk 5 end live",
				"chunk 6 word 6 live", "chunk 7 end live", "chunk 8 end live", "end ended")
			r.counts(map[string]int{"reconnects": 3})
		}
	})
}

// A response may stay open after the log has ended, as with a proxy that withholds the end.
func TestGapless_asksWhetherAQuietLogHasEnded(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, session("e", 2, true), func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.end(2); s.hang() })
		r := followed(t, f.URL+streamPath, by, map[string]any{"silence": 10_000})
		r.says("chunk 1 word 1 history", "chunk 2 end live", "end ended")
	})
}

// When nodes come and go, a proxy responds with 502 for a while, which ends an EventSource.
func TestGapless_triesAgainWhereAProxyHasNoNode(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		var mu sync.Mutex
		var times []time.Time
		came := func() {
			mu.Lock()
			defer mu.Unlock()
			times = append(times, time.Now())
		}
		away := func(s says) { came(); s.w.WriteHeader(http.StatusBadGateway) }
		f := newFake(t, "502", slices.Concat([]func(says){func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.breaks() }}, asked(by, away),
			[]func(says){away, func(s says) { came(); s.welcome("e", 1, 1); s.end(2) }})...)
		r := followed(t, f.URL+streamPath, by, nil)
		r.until("state", "waiting to reconnect")
		r.says("chunk 1 word 1 history", "chunk 2 end live", "end ended")
		f.wanted(t, append(make([]string, 1, 9), slices.Repeat([]string{"1"}, len(times))...)...)
		for i, least := range []time.Duration{1, 2} {
			if n := len(times) - 2 + i; times[n].Sub(times[n-1]) < least*time.Second {
				t.Errorf("it tried again after %v", times[n].Sub(times[n-1]))
			}
		}
	})
}

// A follower does not wait for a session that never existed, nor after it was closed.
func TestGapless_triesNotAgainWhereItIsToldNotTo(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound} {
			f := newFake(t, session("e", 1, false), asked(by, func(s says) { s.w.WriteHeader(status) })...)
			r := followed(t, f.URL+streamPath, by, nil)
			r.until("state", "disconnected")
		}
		f := newFake(t, session("e", 1, false), asked(by, func(s says) { s.w.WriteHeader(http.StatusServiceUnavailable) })...)
		r := followed(t, f.URL+streamPath, by, nil)
		r.until("state", "waiting to reconnect")
		r.stop() // the fake expects no other request
	})
}

func TestGapless_opensAgainWhenAStalledConnectionIsBehind(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, session("e", 2, false),
			func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.hang() },
			func(s says) { s.welcome("e", 1, 2); s.chunks(2); s.end(3) })
		r := followed(t, f.URL+streamPath, by, map[string]any{"silence": 5000})
		r.says("chunk 1 word 1 history", "chunk 2 word 2 repaired", "chunk 3 end live", "end ended")
		f.wanted(t, "", "1")
	})
}

// A check finds a feed that is stuck on a live connection. A feed without news is left alone.
func TestGapless_looksAtAQuietLogAndLeavesItAloneWhereNothingIsMissing(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, session("e", 1, false),
			func(s says) {
				s.welcome("e", 0, 1)
				s.chunks(1)
				for s.r.Context().Err() == nil {
					s.raw(":\n")
					select {
					case <-time.After(100 * time.Millisecond): // a heartbeat
					case <-s.r.Context().Done():
					}
				}
			},
			func(s says) { s.welcome("e", 1, 2); s.chunks(2); s.end(3) })
		r := followed(t, f.URL+streamPath, by, map[string]any{"silence": 5000})
		eventually(t, "it looks again and again", func() bool { return f.looked() >= 4 })
		f.wanted(t, "")
		f.mu.Lock()
		f.session = session("e", 2, false)
		f.mu.Unlock()
		r.says("chunk 1 word 1 history", "chunk 2 word 2 repaired", "chunk 3 end live", "end ended")
		f.wanted(t, "", "1")
	})
}

// A connection that is accepted, and never gets a response, causes no event at all.
func TestGapless_triesAgainWhereNothingIsAnswered(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404",
			func(s says) { s.hang() },
			func(s says) { s.welcome("e", 0, 0); s.end(1) })
		r := followed(t, f.URL+streamPath, by, map[string]any{"silence": 5000})
		r.says("chunk 1 end live", "end ended")
	})
}

func TestGapless_saysWhatCannotBeFollowed(t *testing.T) {
	t.Parallel()
	const after, param = "not a chunk's number: make it a whole number, 0 for the start, or leave it out", "is in the URL, and what it asks for cannot be followed: take it out"
	for _, c := range []struct {
		query string
		after any
		want  string
	}{
		{"", "NaN", "after is NaN, and " + after},
		{"", "latest", "after is latest, and " + after},
		{"", "2", "after is 2, and " + after},
		{"", -1, "after is -1, and " + after},
		{"", 1.5, "after is 1.5, and " + after},
		{"?after=latest", nil, "after is latest, and " + after},
		{"?lastEventId=3", nil, "lastEventId " + param},
		{"?format=raw", nil, "format " + param},
		{"?until=done", nil, "until " + param},
	} {
		options := map[string]any{}
		if c.after != nil {
			options["after"] = c.after
		}
		r := followed(t, "http://127.0.0.1:1"+streamPath+c.query, "fetch", options)
		r.says("thrown TypeError " + c.want)
	}
	f := newFake(t, "404", func(s says) { s.welcome("e", 7, 7); s.end(8) })
	r := followed(t, f.URL+streamPath+"?after=7", "fetch", nil)
	r.says("chunk 8 end live", "end ended")
	f.wanted(t, "7")
}

// A worker has no document for a relative URL. The address of a worker made from a blob cannot be a
// base.
func TestGapless_followsARelativeURLInAWorker(t *testing.T) {
	t.Parallel()
	for url, worker := range map[string]string{
		streamPath: "/app/worker.js", "../v1/sessions/s/stream": "/app/worker.js?v=1#x", "v1/sessions/s/stream": "/",
		"/v1/sessions/s/stream?after=0": "blob:", "./v1/sessions/s/stream": "blob:",
	} {
		f := newFake(t, "404", func(s says) { s.welcome("e", 0, 0); s.end(1) })
		if worker == "blob:" {
			worker += f.URL + "/0a5c1ee4-8a64-4a2c-9d3c-1f0c4d5f0f11"
		} else {
			worker = f.URL + worker
		}
		followed(t, url, "fetch", map[string]any{"worker": worker}).says("chunk 1 end live", "end ended")
	}
}

// A timer that is set to more than 2^31-1 ms fires at once.
func TestGapless_isSilentForAsLongAsItLikes(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		for _, silence := range []any{"Infinity", 1e12} {
			f := newFake(t, session("e", 9, false), func(s says) {
				s.welcome("e", 0, 0)
				for seq := 1; seq < 10; seq++ {
					select {
					case <-time.After(50 * time.Millisecond): // the pace of the producer
						s.chunks(seq)
					case <-s.r.Context().Done():
						return
					}
				}
				s.end(10)
			})
			r := followed(t, f.URL+streamPath, by, map[string]any{"silence": silence})
			r.until("state", "ended")
			f.wanted(t, "")
			if got := f.looked(); got > 0 {
				t.Errorf("it looked %d times", got)
			}
		}
	})
}

func TestGapless_takesASnapshotForAllThatWasBefore(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		snapshot := func(s says, last int, ended bool) {
			s.raw(fmt.Sprintf("event: snapshot\ndata: {\"type\":\"snapshot\",\"epoch\":\"e\",\"first_seq\":1,\"last_seq\":%d,\"ended\":%t,\"messages\":[]}\nid: %[1]d\n\n", last, ended))
		}
		f := newFake(t, "404",
			func(s says) { s.welcome("e", 0, 9); snapshot(s, 8, false); s.chunks(9, 10); s.breaks() },
			func(s says) {
				s.welcome("e", 10, 10)
				s.chunks(11)
				s.reset("ahead", "e", 0, 3)
				snapshot(s, 3, true)
			},
			func(s says) { s.nothing("e", "ended") })
		r := followed(t, f.URL+streamPath, by, map[string]any{"snapshot": true})
		said := func(last int, ended bool) string {
			return fmt.Sprintf("snapshot map[ended:%t epoch:e first_seq:1 last_seq:%d messages:[] type:snapshot]", ended, last)
		}
		r.says(said(8, false), "chunk 9 word 9 history", "chunk 10 word 10 live", "chunk 11 word 11 live", "reset ahead", said(3, true), "end ended")
		f.wanted(t, " 1", "10 1", "3 1")
	})
}

func TestGapless_goesOnWhenAHandlerThrows(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "404", func(s says) { s.welcome("e", 0, 2); s.chunks(1, 2, 3); s.end(4) })
		r := followed(t, f.URL+streamPath, by, map[string]any{"throws": true})
		r.says("chunk 1 word 1 history", "chunk 2 word 2 history", "chunk 3 word 3 live", "chunk 4 end live", "end ended")
		r.stop()
		if got := strings.Count(r.stderr.String(), "a handler that throws"); got < 4 {
			t.Errorf("%d of 4 errors were reported:\n%s", got, &r.stderr)
		}
	})
}

// Headers are requested for each request. A 503, which ends an EventSource, is retried.
func TestGapless_sendsHeadersByFetchAndWaitsOutA503(t *testing.T) {
	t.Parallel()
	f := newFake(t, "404",
		func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.breaks() },
		func(s says) { s.w.WriteHeader(http.StatusServiceUnavailable) },
		func(s says) {
			s.welcome("e", 1, 1)
			s.chunks(2)
			s.raw("event: expired\ndata: {\"type\":\"expired\"}\nid: 2\n\n")
			s.hang()
		},
		func(s says) { s.welcome("e", 2, 2); s.end(3) })
	r := followed(t, f.URL+streamPath, "headers", nil)
	r.says("chunk 1 word 1 history", "chunk 2 word 2 live", "chunk 3 end live", "end ended")
	f.wanted(t, " Bearer 1", "1 Bearer 2", "1 Bearer 3", "2 Bearer 4")
	r.counts(map[string]int{"reconnects": 2})
	r.call("ask", "Why?")
	r.call("stop")
	r.call("stop", "m")
	r.says("chunk 1 word 1 history", "chunk 2 word 2 live", "chunk 3 end live", "end ended",
		`answer map[message_id:{"content":"Why?"} reply_message_id:Bearer 6]`,
		"problem ProblemError 409 message_ended {}", `problem ProblemError 409 message_ended {"message_id":"m"}`)
}

func TestGapless_asksForANewTicketWhereOneIsSpentAndKeepsOneThatLetItIn(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		refused := func(s says) { s.w.WriteHeader(http.StatusUnauthorized) }
		f := newFake(t, "401", append([]func(says){
			func(s says) { s.welcome("e", 0, 1); s.chunks(1); s.breaks() },
			refused, // it was away for too long
			func(s says) {
				s.welcome("e", 1, 1)
				s.chunks(2)
				s.raw("event: expired\ndata: {\"type\":\"expired\"}\nid: 2\n\n")
				s.hang()
			},
		}, asked(by, refused)...)...)
		r := followed(t, f.URL+streamPath, by, map[string]any{"tickets": true})
		r.until("state", "disconnected")
		r.says("chunk 1 word 1 history", "chunk 2 word 2 live")
		if by == "eventsource" {
			f.wanted(t, " ticket-1", "1 ticket-1", "1 ticket-2", "2 ticket-3", "2 ticket-4")
		} else {
			f.wanted(t, " ticket-1", "1 ticket-1", "1 ticket-2", "2 ticket-3")
		}
	})
}

func TestGapless_takesAPlainTicketAndIsDisconnectedWhereThereIsNone(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, "401", func(s says) { s.welcome("e", 0, 0); s.end(1) })
		r := followed(t, f.URL+streamPath, by, map[string]any{"tickets": "plain"})
		r.says("chunk 1 end live", "end ended")
		f.wanted(t, " ticket-1")

		r = followed(t, f.URL+streamPath, by, map[string]any{"tickets": "refused"})
		r.until("state", "disconnected")
	})
	f := newFake(t, session("e", 1, false))
	followed(t, f.URL+streamPath, "refusing", nil).until("state", "disconnected")
}

// This is the format in unusual but valid forms.
func TestGapless_readsTheFormatWhereverItIsCut(t *testing.T) {
	t.Parallel()
	for _, by := range []string{"fetch", "headers"} { // npm eventsource waits for what follows a CR
		const stream = "\ufeff: comment\r\nretry: 30\rid:1\r\ndata:{\"seq\":1,\"ts\":1,\r\ndata: \"type\":\"delta\",\"content\":\"ä🍞\"}\r\n\r\n" +
			"retry: 3x\nid: 7\nevent: other\ndata: {}\n\n" + // not an event of ours, and its id is not the cursor
			"id: 2\nnothing: x\ndata\r\n\r\nevent\ndata: 2, again\n\n" +
			"data: {\"seq\":3,\"ts\":1,\"type\":\"end\"}\nid: 3\rid: 9\x00\r\r"
		f := newFake(t, "404", func(s says) {
			s.w.Header().Set("Content-Type", "text/event-stream")
			for i := range len(stream) {
				_, _ = io.WriteString(s.w, stream[i:i+1])
				_ = http.NewResponseController(s.w).Flush()
				<-time.After(2 * time.Millisecond) // so that it arrives in pieces
			}
		}, func(s says) { s.nothing("e", "ended") })
		r := followed(t, f.URL+streamPath, by, nil)
		r.says("chunk 1 ä🍞 live", "chunk 2  live", "chunk 3 end live", "end ended")
	}
}

func TestGapless_learnsTheEpochOfASessionThatBegins(t *testing.T) {
	both(t, func(t *testing.T, by string) {
		f := newFake(t, session("e", 1, false), func(s says) { s.welcome("", 0, 0); s.chunks(1); s.hang() })
		r := followed(t, f.URL+streamPath, by, nil)
		r.until("epoch", "e")
		if got := f.looked(); got != 1 {
			t.Errorf("it asked %d times", got)
		}
	})
}

// On real nodes: whatever happens to the log, the follower shows the current log.
func TestGapless_followsALogThatIsLostDeletedAndEnded(t *testing.T) {
	redis := storetest.Redis(t)
	n := start(t, "-redis", redis.URL(), "-heartbeat", "300ms")
	both(t, func(t *testing.T, by string) {
		const path = "/v1/sessions/"
		lost, gone := "lost-"+by, "gone-"+by
		n.post(t, path+lost+"/chunks", []chunk{{Content: "a"}, {Content: "b"}})
		r := followed(t, n.url(path+lost+"/stream"), by, nil)
		r.says("chunk 1 a history", "chunk 2 b history")
		epoch := r.member("epoch")
		if err := redis.Del(context.Background(), "chat:history:"+lost, "chat:session:"+lost).Err(); err != nil {
			t.Fatal(err)
		}
		n.post(t, path+lost+"/chunks", chunk{Content: "c"})
		eventually(t, "it has what there is now", func() bool { s := r.said(); return strings.HasPrefix(s[len(s)-1], "chunk 1.000001e+06 c") })
		if s := r.said(); !strings.HasPrefix(s[2], "reset ") {
			t.Errorf("%q", s)
		}
		eventually(t, "another epoch", func() bool { e := r.member("epoch"); return e != "" && e != epoch })
		n.post(t, path+lost+"/chunks", chunk{Type: "end"})
		r.until("state", "ended")

		n.post(t, path+gone+"/chunks", chunk{Content: "a"})
		r = followed(t, n.url(path+gone+"/stream"), by, nil)
		r.says("chunk 1 a history")
		q, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, n.url(path+gone), nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(q)
		if err != nil || res.StatusCode != http.StatusNoContent {
			t.Fatalf("%v %v", res, err)
		}
		_ = res.Body.Close()
		r.says("chunk 1 a history", "reset deleted", "end deleted")
	})
}
