package web_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	r3labs "github.com/r3labs/sse/v2"
	tmaxmax "github.com/tmaxmax/go-sse"

	"gapless/store"
	"gapless/store/storetest"
)

// client is a third-party way to follow a stream, with its own way to reconnect.
type client struct {
	name string
	// run follows the stream until the client gives up or is done. It passes on each chunk with its
	// id, and returns how it ended.
	run func(ctx context.Context, url string, chunk func(id, data string)) (over string, err error)
	// over is how it should end. last is the status of the last response: 204 if the client
	// reconnects after a clean end, 200 if it takes that for the end.
	over string
	last int
	// cuts are for its first connections; nil: the usual ones.
	cuts []cut
	// check checks what arrived; nil: it must be the list, each element once, in order.
	check func(t *testing.T, list []string, events [][2]string)
}

// following is a client at work.
type following struct {
	client
	line *proxy
	done chan struct{}

	mu     sync.Mutex
	events [][2]string
	ended  string
	err    error
}

func (f *following) isOver() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// isOn reports whether the client has had its cuts, and a stream of a certain node is open.
func (f *following) isOn(node int) bool {
	streams := f.line.seen()
	if len(streams) <= len(f.cuts) {
		return false
	}
	last := streams[len(streams)-1]
	return last.node == node && last.status == http.StatusOK && len(last.body) > 0
}

// All clients follow one session at once, on two nodes of one Redis. At first, their connections
// are reset in the middle of events and they move from node to node. Then their node drains. Then
// the log ends.
func TestClients_getEveryChunkOnceThroughCutsAndADrainAndLearnTheEnd(t *testing.T) {
	t.Parallel()
	scripts := install(t)
	redis := storetest.Redis(t)
	// Short heartbeats, so that every pause contains some.
	args := []string{"-redis", redis.URL(), "-heartbeat", "300ms", "-drain", "2s"}
	a, b := start(t, args...), start(t, args...)
	const path = "/v1/sessions/followed/chunks"
	appended := 0
	produce := func(n *node) {
		text := nasty[appended%(len(nasty)-1)]
		if appended++; appended%7 > 0 {
			n.post(t, path, chunk{MessageID: "m", Content: text})
			return
		}
		// This is how programs that know only Redis do it: announced, then pushed, with any spaces.
		quoted, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		element := fmt.Sprintf(`{"message_id": "m" ,"content": %s,  "n":%d.0}`, quoted, appended)
		err = redis.Publish(t.Context(), "chat:stream:followed", element).Err()
		if err = errors.Join(err, redis.RPush(t.Context(), "chat:history:followed", element).Err()); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		produce(a)
	}

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	ctx, cancel := storetest.Watch(t.Context(), t)
	defer cancel()
	var all []*following
	for i, c := range clients(scripts, rand.New(rand.NewPCG(seed, 1))) {
		if c.cuts == nil {
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			c.cuts = []cut{
				behindWelcome,
				anywhere(r),
				where(`}\nid: \d()\d`), // in an id
				anywhere(r),
			}
		}
		f := &following{client: c, line: newProxy(t, a, b), done: make(chan struct{})}
		cuts := len(c.cuts)
		f.line.cuts = c.cuts
		f.line.route = func(streams int) int { // alternate, then the first node when no cuts are left
			return max(cuts-streams, 0) % 2
		}
		all = append(all, f)
		go func() { // ends with ctx; waited for below
			defer close(f.done)
			over, err := f.run(ctx, f.line.url("/v1/sessions/followed/stream"), func(id, data string) {
				storetest.MovedIn(ctx)
				f.mu.Lock()
				defer f.mu.Unlock()
				f.events = append(f.events, [2]string{id, data})
			})
			f.ended, f.err = over, err
		}()
	}
	defer func() {
		cancel()
		for _, f := range all {
			<-f.done
		}
	}()
	// wait appends chunks until all clients are on a node.
	wait := func(node int) {
		t.Helper()
		was, since := 0, time.Now()
		for ; ; time.Sleep(20 * time.Millisecond) { // the pace of the producer
			var missing []string
			for _, f := range all {
				if !f.isOn(node) && !f.isOver() {
					missing = append(missing, f.name)
				}
			}
			if len(missing) == 0 {
				return
			}
			if len(missing) != was {
				was, since = len(missing), time.Now()
			}
			if time.Since(since) > patience {
				t.Errorf("waited %v in vain for %s to come to node %d", patience, strings.Join(missing, ", "), node)
				return
			}
			produce(b)
		}
	}

	wait(0)
	b.post(t, path, longest("m"))
	produce(a)
	a.stop()
	wait(1)
	produce(b)
	b.post(t, path, chunk{Type: "end"})
	list := redis.LRange(t.Context(), "chat:history:followed", 0, -1).Val()

	for _, f := range all {
		t.Run(f.name, func(t *testing.T) {
			select {
			case <-f.done:
			case <-ctx.Done():
				t.Error("it does not end")
				<-f.done
			}
			if f.err != nil {
				t.Error(f.err)
			}
			streams := f.line.seen()
			for i, s := range streams {
				t.Logf("request %d: node %d, Last-Event-ID %q, %d, %d bytes, cut %t, torn %t", i, s.node, s.cursor, s.status, len(s.body), s.cut, s.torn())
			}
			check := f.check
			if check == nil {
				check = gotAll
			}
			check(t, list, f.events)
			if f.ended != f.over {
				t.Errorf("it ended by %q, not %q", f.ended, f.over)
			}
			if last := streams[len(streams)-1]; last.status != f.last {
				t.Errorf("its last request was answered with %d, not %d", last.status, f.last)
			}
			for i, s := range streams {
				if i < len(f.cuts) && !s.cut {
					t.Errorf("response %d was not cut: this proves less than it should", i)
				}
				if i > 0 && s.cursor == "" && !strings.Contains(s.url, "after=") {
					t.Errorf("request %d came without a cursor", i)
				}
			}
		})
	}
}

func clients(scripts func(script string, args ...string) runner, r *rand.Rand) []client {
	return []client{
		{name: "npm eventsource", run: scripts("eventsource.mjs"), over: "closed, 204", last: http.StatusNoContent},
		{name: "npm eventsource-parser", run: scripts("eventsource-parser.mjs"), over: "204", last: http.StatusNoContent},
		{name: "npm undici", run: scripts("undici.mjs"), over: "closed", last: http.StatusNoContent},
		{
			name: "npm fetch-event-source", run: scripts("fetch-event-source.mjs"), over: "resolved", last: http.StatusOK,
			cuts: []cut{behindWelcome, sparing(anywhere(r)), where(`}\nid: \d()\d`), sparing(anywhere(r))},
		},
		{
			// It takes an id when its line is complete, before the event is (its getMessages calls
			// onId). Then it would request what follows a chunk that it never delivered. The id is
			// an event's last line, so only a cut before the event's last byte does this. Here it
			// is cut there.
			name: "npm fetch-event-source, cut before the last byte of a chunk",
			run:  scripts("fetch-event-source.mjs"), over: "resolved", last: http.StatusOK,
			cuts: []cut{where(`}\nid: 12\n()\n`)},
			check: func(t *testing.T, list []string, events [][2]string) {
				for _, e := range events {
					if e[0] == "12" {
						t.Fatal("chunk 12 arrived: it is better than it was, and the comment above is out of date")
					}
				}
				gotAll(t, list, append(events[:11:11], append([][2]string{{"12", list[11]}}, events[11:]...)...))
			},
		},
		{name: "go tmaxmax go-sse", run: runTmaxmax, over: "response validation failed", last: http.StatusNoContent},
		{
			// It delivers the rest of a response that broke off as if it were an event (its scanner
			// takes any error for the end of the input). The id is an event's last line. So such a
			// rest has the id of the event before it, or the beginning of its own id, which is a
			// lower number. So it never moves the cursor past a chunk that did not arrive. A caller
			// that takes only the next number gets everything, once.
			name: "go r3labs sse, to a reader who takes only the next number",
			run:  runR3labs, over: "nil", last: http.StatusOK,
			cuts: []cut{where(`}\nid: \d()\d`), anywhere(r), where(`"content":"[^"]()`), anywhere(r)},
			check: func(t *testing.T, list []string, events [][2]string) {
				var taken [][2]string
				torn, again := 0, 0
				for _, e := range events {
					switch seq, _ := strconv.Atoi(e[0]); {
					case seq == len(taken)+1:
						taken = append(taken, e)
					case seq > len(taken):
						t.Fatalf("behind chunk %d came %.200q", len(taken), e)
					case !json.Valid([]byte(e[1])):
						torn++
					default:
						again++
					}
				}
				gotAll(t, list, taken)
				if torn == 0 || again == 0 {
					t.Errorf("it handed out %d torn events and %d again: it is better than it was, and the comment above is out of date", torn, again)
				}
			},
		},
		{name: "gapless.js in Node, by fetch", run: scripts("gapless.mjs"), over: "ended", last: http.StatusNoContent, check: gotAllValues},
		{name: "gapless.js in Node, by npm eventsource", run: scripts("gapless.mjs", "eventsource"), over: "ended", last: http.StatusNoContent, check: gotAllValues},
		{name: "curl", run: runCurl, over: "204", last: http.StatusNoContent},
	}
}

// gotAllValues is gotAll for a client that returns JSON values instead of their bytes.
func gotAllValues(t *testing.T, list []string, events [][2]string) {
	t.Helper()
	for i, e := range events {
		if i >= len(list) {
			break
		}
		var want, got any
		if err := errors.Join(json.Unmarshal([]byte(list[i]), &want), json.Unmarshal([]byte(e[1]), &got)); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("chunk %d arrived as\n%.300q, not as\n%.300q (%v)", i+1, e[1], list[i], err)
		}
		events[i][1] = list[i]
	}
	gotAll(t, list, events)
}

// sparing never cuts before the last byte of an event.
func sparing(c cut) cut {
	last := where(`\nid: \d+\n()$`)
	return func(body []byte) int {
		at := c(body)
		if at >= 0 && last(body[:at]) == at {
			at--
		}
		return at
	}
}

// longest is the longest chunk that is accepted by default, however long the log. The Go clients
// accept no event of more than 64 KiB.
func longest(messageID string) chunk {
	const members = len(`"type":"delta","message_id":"","content":""}`)
	return chunk{Type: "delta", MessageID: messageID, Content: strings.Repeat("x", 64<<10-store.Overhead-members-len(messageID))}
}

type runner = func(ctx context.Context, url string, chunk func(id, data string)) (string, error)

// installed returns the folder of the Node libraries that testdata/clients pins, next to a copy of
// it and of gapless.js.
var installed = sync.OnceValues(func() (string, error) {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", fmt.Errorf("npm is not installed: make test installs it (%w)", err)
	}
	to := filepath.Join(dir, "clients")
	if err := os.CopyFS(to, os.DirFS(filepath.Join("testdata", "clients"))); err != nil {
		return "", err
	}
	for _, name := range []string{"gapless.js", "react.js"} {
		module, err := os.ReadFile(name)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), module, 0o600)
		}
		if err != nil {
			return "", err
		}
	}
	ci := exec.Command(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--legacy-peer-deps", "--prefer-offline", "--loglevel=error")
	ci.Dir = to
	if out, err := ci.CombinedOutput(); err != nil {
		return "", fmt.Errorf("npm ci: %w\n%s", err, out)
	}
	return to, nil
})

// install returns a function that runs a script of testdata/clients with a URL and further
// arguments. A missing Node fails the test.
func install(t *testing.T) func(script string, args ...string) runner {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatalf("node is not installed: make test installs it (%v)", err)
	}
	dir, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	return func(script string, args ...string) runner {
		return func(ctx context.Context, url string, chunk func(id, data string)) (over string, err error) {
			cmd := exec.CommandContext(ctx, node, append([]string{"--no-warnings", filepath.Join(dir, script), url}, args...)...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				return "", err
			}
			for lines := bufio.NewReader(out); ; {
				line, err := lines.ReadBytes('\n')
				if err != nil {
					break
				}
				var event [2]string
				var last struct{ Over string }
				storetest.MovedIn(ctx)
				if json.Unmarshal(line, &event) == nil {
					chunk(event[0], event[1])
				} else if json.Unmarshal(line, &last) == nil {
					over = last.Over
				}
			}
			if err := cmd.Wait(); err != nil {
				return over, fmt.Errorf("%s: %w\n%s", script, err, &stderr)
			}
			return over, nil
		}
	}
}

func runTmaxmax(ctx context.Context, url string, chunk func(id, data string)) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	connection := (&tmaxmax.Client{HTTPClient: httpClient()}).NewConnection(r)
	connection.SubscribeMessages(func(e tmaxmax.Event) { chunk(e.LastEventID, e.Data) })
	err = connection.Connect()
	if e, ok := errors.AsType[*tmaxmax.ConnectionError](err); ok {
		return e.Reason, nil
	}
	return "", err
}

func runR3labs(ctx context.Context, url string, chunk func(id, data string)) (string, error) {
	c := r3labs.NewClient(url)
	c.Connection = httpClient()
	c.ReconnectStrategy = &backoff{ctx: ctx, next: 500 * time.Millisecond}
	err := c.SubscribeRawWithContext(ctx, func(e *r3labs.Event) {
		if len(e.Event) == 0 && len(e.Data) > 0 {
			chunk(string(e.ID), string(e.Data))
		}
	})
	if err != nil {
		return "", err
	}
	return "nil", nil
}

// backoff is r3labs's default, except that it stops when ctx ends.
type backoff struct {
	ctx  context.Context
	next time.Duration
}

func (b *backoff) NextBackOff() time.Duration {
	if b.ctx.Err() != nil {
		return -1
	}
	defer func() { b.next += b.next / 2 }()
	return b.next
}

func (b *backoff) Reset() {}

// httpClient shares its connections with no other client.
func httpClient() *http.Client {
	return &http.Client{Transport: &http.Transport{}}
}

// runCurl acts as a user who restarts curl with the last id on the screen.
func runCurl(ctx context.Context, url string, chunk func(id, data string)) (string, error) {
	cursor, ended := "", false
	for {
		args := []string{}
		if cursor != "" {
			args = []string{"-H", "Last-Event-ID: " + cursor}
		}
		out, err := curl(ctx, url, args...).Output()
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if ended {
			if len(out) > 0 || err != nil {
				return "", fmt.Errorf("after the end, curl printed %q, %w", out, err)
			}
			return "204", nil
		}
		for _, e := range whole(out) {
			if cursor = e.id; e.name == "" {
				chunk(e.id, e.data)
				ended = ended || strings.Contains(e.data, `,"type":"end"`)
			}
		}
		if (err == nil) != ended {
			return "", fmt.Errorf("curl ended with %v; the log's end has arrived: %t", err, ended)
		}
		time.Sleep(300 * time.Millisecond) // a quick typist
	}
}

// curl returns a command as a user types it: curl -N url. It shows no progress meter, like in a
// shell's background.
func curl(ctx context.Context, url string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "curl", append([]string{"-N", "-sS", url}, args...)...)
}

type event struct{ name, data, id string }

// whole returns the events that arrived completely.
func whole(out []byte) (events []event) {
	blocks := strings.Split(string(out), "\n\n")
	for _, block := range blocks[:len(blocks)-1] {
		var e event
		for line := range strings.SplitSeq(block, "\n") {
			switch name, value, _ := strings.Cut(line, ": "); name {
			case "event":
				e.name = value
			case "data":
				e.data = value
			case "id":
				e.id = value
			}
		}
		events = append(events, e)
	}
	return events
}

func TestCurl_untilDoneShowsAnAnswerAsItComesAndEndsByItself(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatalf("curl is not installed: make test installs it (%v)", err)
	}
	n := start(t)
	ctx, cancel := storetest.Watch(t.Context(), t)
	defer cancel()
	const path = "/v1/sessions/asked"
	follow := func(args ...string) (*exec.Cmd, *bufio.Reader) {
		t.Helper()
		cmd := curl(ctx, n.url(path+"/stream?until=done"), args...)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		return cmd, bufio.NewReader(out)
	}
	// next returns the data of the next chunk that curl shows.
	next := func(out *bufio.Reader) string {
		t.Helper()
		for {
			line, err := out.ReadString('\n')
			if err != nil {
				t.Fatalf("curl shows no more: %v", err)
			}
			storetest.Moved(t)
			if data, ok := strings.CutPrefix(line, "data: "); ok && !strings.Contains(data, `"type":"welcome"`) {
				return strings.TrimSuffix(data, "\n")
			}
		}
	}
	expect := func(out *bufio.Reader, seq int64, typ, content string) {
		t.Helper()
		var c chunk
		if data := next(out); json.Unmarshal([]byte(data), &c) != nil || c.Seq != seq || c.Type != typ || c.Content != content {
			t.Fatalf("curl shows %s, not %d %s %q", data, seq, typ, content)
		}
	}
	ends := func(cmd *exec.Cmd, out *bufio.Reader) {
		t.Helper()
		if rest, err := io.ReadAll(out); err != nil || strings.Contains(string(rest), "data: ") {
			t.Errorf("behind the end of the answer curl shows %q, %v", rest, err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("curl: %v", err)
		}
	}

	first, out := follow() // before the session exists
	for i := range int64(5) {
		n.post(t, path+"/chunks", chunk{MessageID: "m", Content: fmt.Sprint("word ", i)})
		expect(out, i+1, "delta", fmt.Sprint("word ", i)) // at once: nothing more is sent in the meantime
	}
	_ = first.Process.Kill() // Ctrl-C
	_ = first.Wait()
	again, out := follow("-H", "Last-Event-ID: 3")
	expect(out, 4, "delta", "word 3")
	expect(out, 5, "delta", "word 4")
	n.post(t, path+"/chunks", []chunk{{Type: "done", MessageID: "m"}, {MessageID: "next", Content: "another answer"}})
	expect(out, 6, "done", "")
	ends(again, out)

	whole, out := follow() // of a finished answer
	for i := range int64(5) {
		expect(out, i+1, "delta", fmt.Sprint("word ", i))
	}
	expect(out, 6, "done", "")
	ends(whole, out)
}
