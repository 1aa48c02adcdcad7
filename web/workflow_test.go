package web_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

// startWorkflow has a chat with WorkflowChatTransport run: how is ask, resume or tail.
func startWorkflow(t *testing.T, base, session, how string, questions ...string) *chat {
	t.Helper()
	c := &chat{done: make(chan struct{}), lines: map[string][]string{}}
	run := install(t)("workflow.mjs", append([]string{how}, questions...)...)
	ctx, cancel := storetest.Watch(t.Context(), t)
	go func() { // ends with ctx; waited for below
		defer close(c.done)
		over, err := run(ctx, base+"/v1/sessions/"+session, func(what, data string) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.lines[what] = append(c.lines[what], data)
		})
		c.over, c.err = over, err
	}()
	t.Cleanup(func() { cancel(); <-c.done })
	return c
}

// cutter stands in front of nodes, to which it sends requests in turn, and cuts their responses.
type cutter struct {
	*httptest.Server
	mu       sync.Mutex
	nodes    []*node
	requests int
	cuts     int
}

// newCutter cuts the response to a request, counted from 0, after so many bytes (-1: not at all), as HTTP ends one or by a reset.
func newCutter(t *testing.T, nodes []*node, cut func(request int) (at int, clean bool)) *cutter {
	t.Helper()
	c := &cutter{nodes: nodes}
	out := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	broken := func(w http.ResponseWriter) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			reset(conn.(*net.TCPConn))
		}
	}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		to := c.nodes[c.requests%len(c.nodes)]
		at, clean := -1, false
		if cut != nil {
			at, clean = cut(c.requests)
		}
		c.requests++
		c.mu.Unlock()
		again := r.Clone(r.Context())
		again.URL.Scheme, again.URL.Host, again.RequestURI = "http", to.addr, ""
		res, err := out.RoundTrip(again)
		if err != nil {
			broken(w)
			return
		}
		defer res.Body.Close()
		maps.Copy(w.Header(), res.Header)
		w.WriteHeader(res.StatusCode)
		for buf := make([]byte, 4<<10); at != 0; {
			_ = http.NewResponseController(w).Flush()
			n, err := res.Body.Read(buf)
			if at >= 0 {
				n = min(n, at)
				at -= n
			}
			_, _ = w.Write(buf[:n])
			if err == io.EOF {
				return
			} else if err != nil {
				broken(w)
				return
			}
		}
		c.mu.Lock()
		c.cuts++
		c.mu.Unlock()
		if !clean {
			_ = http.NewResponseController(w).Flush()
			broken(w)
		}
	}))
	t.Cleanup(c.Close)
	return c
}

// turn sends requests to another node from now on.
func (c *cutter) turn(to *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes = []*node{to}
}

func (c *cutter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cuts
}

// kill is SIGKILL.
func (n *node) kill() {
	n.once.Do(func() {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
	})
}

// wordy is a model's service that says so many words, one at a time, when paced says so.
func wordy(t *testing.T, words int, pace func(ctx context.Context, i int)) (service *httptest.Server, text string) {
	t.Helper()
	var all []string
	for i := range words {
		all = append(all, fmt.Sprintf("word %d 🍵 ", i))
	}
	service = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i, word := range all {
			pace(r.Context(), i)
			fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":%q}}]}\n\n", word)
			_ = http.NewResponseController(w).Flush()
		}
		fmt.Fprint(w, "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
	}))
	t.Cleanup(service.Close)
	return service, strings.Join(all, "")
}

// shows checks what a chat shows in the end: no error, one answer for each question, nothing read twice.
func (c *chat) shows(t *testing.T, answers int, text string) {
	t.Helper()
	<-c.done
	if c.err != nil || c.over != "ready" || len(c.lines["error"]) > 0 {
		t.Fatalf("the chat ended %q: %v, and shows the errors %q", c.over, c.err, c.lines["error"])
	}
	shown := 0
	for id, all := range c.lines {
		if !strings.Contains(id, "-") && id != "m" {
			continue
		}
		shown++
		if !slices.Equal(all, []string{text}) {
			t.Errorf("%s shows %d bytes, not %d: %.200q", id, len(strings.Join(all, "")), len(text), all)
		}
	}
	if shown != answers {
		t.Errorf("%d answers are shown, not %d", shown, answers)
	}
	for _, from := range c.lines["from"] {
		if n, err := strconv.Atoi(from); err != nil || n == 0 {
			t.Errorf("it was read again from the start: %q", c.lines["from"])
			break
		}
	}
}

// The transport gives up after three resets in a row, whoever is on the other side. So each third response is cut cleanly.
func TestWorkflow_showsEveryAnswerThroughCutsOfBothKinds(t *testing.T) {
	t.Parallel()
	service, text := wordy(t, 150, func(ctx context.Context, _ int) {
		select {
		case <-time.After(2 * time.Millisecond): // the model's pace
		case <-ctx.Done():
		}
	})
	redis := storetest.Redis(t)
	args := []string{"-redis", redis.URL(), "-model-url", service.URL + "/v1", "-model-name", "m", "-heartbeat", "50ms"}
	a, b := start(t, args...), start(t, args...)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	const answers = 5
	line := newCutter(t, []*node{a, b}, func(request int) (at int, clean bool) { return 300 + r.IntN(600), request%3 == 2 })
	var questions []string
	for i := range answers {
		questions = append(questions, fmt.Sprint("question ", i))
	}
	c := startWorkflow(t, line.URL, "cuts", "ask", questions...)
	c.shows(t, answers, text)
	if n := line.count(); n < answers*3 {
		t.Errorf("%d cuts: this proves less than it should", n)
	}
	parts := c.lines["parts"]
	for _, p := range parts {
		if want := strconv.Itoa(150 + 4); p != want { // start, text-start, text-end, finish
			t.Errorf("it counted %q parts, not %s each", parts, want)
		}
	}
}

// The nodes behind one address drain, or die, one after the other, each while an answer comes from it. The answer itself is made elsewhere.
func TestWorkflow_showsAnAnswerThroughDrainsAndDeadNodes(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	args := []string{"-redis", redis.URL(), "-heartbeat", "100ms", "-drain", "3s"}
	maker := start(t, args...)
	const path = "/v1/sessions/ui/chunks"
	var want strings.Builder
	say := func() {
		for _, text := range nasty {
			want.WriteString(text)
			maker.post(t, path, chunk{MessageID: "m", Role: "assistant", Content: text})
		}
	}
	say()
	now := start(t, args...)
	line := newCutter(t, []*node{now}, nil)
	c := startWorkflow(t, line.URL, "ui", "resume")
	c.has(t, want.Len())
	for i := range 6 {
		next := start(t, args...)
		line.turn(next)
		if i%2 == 0 {
			now.stop()
		} else {
			now.kill()
		}
		say()
		c.has(t, want.Len())
		now = next
	}
	maker.post(t, path, chunk{Type: "done", MessageID: "m"})
	<-c.done
	c.mu.Lock()
	c.lines["from"] = c.lines["from"][1:] // a page that was just loaded has nothing
	c.mu.Unlock()
	c.shows(t, 1, want.String())
	if n := len(c.lines["from"]); n < 6 {
		t.Errorf("it came back %d times: this proves less than it should", n)
	}
}

// A page that is loaded when nothing is under way shows no error, and neither does one that reads the end alone.
func TestWorkflow_resumesNothingAndTheTail(t *testing.T) {
	t.Parallel()
	n := start(t)
	c := startWorkflow(t, "http://"+n.addr, "ui", "resume")
	if <-c.done; c.err != nil || c.over != "ready" || len(c.lines["error"]) > 0 || !slices.Equal(c.lines["requests"], []string{"1"}) {
		t.Errorf("%q %v %q", c.over, c.err, c.lines)
	}
	const path = "/v1/sessions/ui/chunks"
	for _, word := range []string{"one ", "two ", "three "} {
		n.post(t, path, chunk{MessageID: "m", Role: "assistant", Content: word})
	}
	c = startWorkflow(t, "http://"+n.addr, "ui", "tail")
	eventually(t, "it follows the end", func() bool { return n.viewers(t, "ui") == 1 })
	n.post(t, path, []chunk{{MessageID: "m", Content: "four"}, {Type: "done", MessageID: "m"}})
	c.shows(t, 0, "") // the transport itself drops pieces of a part whose beginning it was not given
	if got := c.lines["parts"]; !slices.Equal(got, []string{"8"}) {
		t.Errorf("%q", got)
	}
}

// What ends an answer otherwise is said once, and the transport does not ask on.
func TestWorkflow_showsWhyAnAnswerFailedOrThatItWasStopped(t *testing.T) {
	t.Parallel()
	n := start(t)
	for last, over := range map[string]string{"failed": "error", "cancelled": "ready"} {
		path := "/v1/sessions/" + last + "/chunks"
		n.post(t, path, chunk{MessageID: "m", Role: "assistant", Content: "half"})
		c := startWorkflow(t, "http://"+n.addr, last, "resume")
		c.has(t, len("half"))
		n.post(t, path, chunk{MessageID: "m", Type: last})
		if <-c.done; c.err != nil || c.over != over || !slices.Equal(c.lines["requests"], []string{"1"}) || !slices.Equal(c.lines["m"], []string{"half"}) {
			t.Errorf("%s: %q %v %q", last, c.over, c.err, c.lines)
		}
	}
}
