package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gapless/store/storetest"
)

// numbered makes requests whose chunks have a producer's numbers, and repeats each until it gets a response, at any
// node.
type numbered struct {
	addr    func() string
	client  *http.Client
	session string
	next    int64         // the number of the next chunk
	acked   *atomic.Int64 // counts acknowledged requests, unless it is nil
}

// post appends count chunks, and retries until they are acknowledged.
func (p *numbered) post(ctx context.Context, kind string, count int, body func() io.Reader, closes bool) (s stored, err error) {
	for ctx.Err() == nil {
		addr := p.addr()
		r, err := http.NewRequestWithContext(ctx, "POST", schemeAt(addr)+"://"+addr+"/v1/sessions/"+p.session+"/chunks?message_id=m1", body())
		if err != nil {
			return s, err
		}
		r.Header.Set("Content-Type", kind)
		r.Header.Set("Producer-Id", "p")
		r.Header.Set("Producer-Epoch", "0")
		r.Header.Set("Producer-Chunk", strconv.FormatInt(p.next, 10))
		if closes {
			r.Header.Set("Stream-Closed", "true")
			count++
		}
		response, err := p.client.Do(r)
		if err != nil {
			pause(ctx, rand.N(20*time.Millisecond)) // the node or the connection is dead
			continue
		}
		b, err := io.ReadAll(response.Body)
		_ = response.Body.Close()
		switch {
		case err != nil || response.StatusCode >= 500:
			pause(ctx, rand.N(20*time.Millisecond))
			continue
		case response.StatusCode != http.StatusOK && response.StatusCode != http.StatusCreated:
			return s, fmt.Errorf("%d %s", response.StatusCode, b)
		}
		p.next += int64(count)
		if p.acked != nil {
			p.acked.Add(1)
		}
		return s, json.Unmarshal(b, &s)
	}
	return s, ctx.Err()
}

// enoughHappened waits, before the last chunks, until enough faults have happened: a busy machine may restart nodes
// more slowly than it accepts chunks.
func (g *gapcheck) enoughHappened(ctx context.Context) {
	if g.enough == nil {
		return
	}
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	select {
	case <-g.enough:
	case <-ctx.Done():
	}
}

// recovers waits after a fault until something is acknowledged again, or for ten seconds. If faults came faster than a
// busy machine recovers, the test would never end.
func (g *gapcheck) recovers(ctx context.Context) {
	was := g.acked.Load()
	for end := time.Now().Add(10 * time.Second); g.acked.Load() < was+5 && g.waiting.Load() == 0 && time.Now().Before(end) && ctx.Err() == nil; {
		pause(ctx, 5*time.Millisecond)
	}
}

// byNumberedPosts appends one chunk per request, each once or twice.
func byNumberedPosts(ctx context.Context, g *gapcheck, session string, count int) (map[int64]string, error) {
	p, acks := numbered{addr: func() string { return g.any().addr }, client: &g.client, session: session, acked: &g.acked}, map[int64]string{}
	for i := 1; i <= count; i++ {
		content := text(session, i)
		b, err := json.Marshal(map[string]string{"content": content})
		if err != nil {
			return acks, err
		}
		if i == count {
			g.enoughHappened(ctx)
		}
		again := rand.IntN(4) == 0
		s, err := p.post(ctx, "application/json", 1, func() io.Reader { return strings.NewReader(string(b)) }, i == count)
		if err != nil {
			return acks, err
		}
		acks[s.First] = content
		if again && i < count {
			p.next--
			if repeated, err := p.post(ctx, "application/json", 1, func() io.Reader { return strings.NewReader(string(b)) }, false); err != nil || repeated.First != s.First {
				return acks, fmt.Errorf("it was at %d and is at %d (%w)", s.First, repeated.First, err)
			}
		}
		tempo(ctx)
	}
	return acks, nil
}

// byNumberedUploads appends the lines of a few uploads. An upload that breaks is repeated from its first line: its
// numbers identify the stored part.
func byNumberedUploads(ctx context.Context, g *gapcheck, session string, count int) (map[int64]string, error) {
	p, acks := numbered{addr: func() string { return g.any().addr }, client: &g.client, session: session, acked: &g.acked}, map[int64]string{}
	for done := 0; done < count; {
		first, part := done+1, min(count-done, 30+rand.IntN(60))
		if done+part == count {
			g.enoughHappened(ctx)
		}
		body := func() io.Reader {
			r, w := io.Pipe()
			go func() { // ends with the body, which the request closes, perhaps after its response
				for i := first; i < first+part; i++ {
					b, err := json.Marshal(map[string]string{"content": text(session, i)})
					if err == nil {
						_, err = w.Write(append(b, '\n'))
					}
					if err != nil {
						_ = w.CloseWithError(err)
						return
					}
					tempo(ctx)
				}
				_ = w.Close()
			}()
			return r
		}
		s, err := p.post(ctx, "application/x-ndjson", part, body, done+part == count)
		if err != nil {
			return acks, err
		}
		for i := range part {
			acks[s.First+int64(i)] = text(session, done+1+i)
		}
		done += part
	}
	return acks, nil
}

// restarting kills one node after the other, like a power failure, and restarts it at its address.
func (g *gapcheck) restarting(t *testing.T, args ...string) {
	ctx, cancel := context.WithCancel(t.Context())
	const least = 3
	killed, enough := 0, make(chan struct{})
	g.enough = enough
	wait := background(t, func() {
		for i := 0; ctx.Err() == nil; i = (i + 1) % len(g.nodes) {
			pause(ctx, 150*time.Millisecond)
			g.recovers(ctx)
			old := g.node(i)
			old.kill()
			if killed++; killed == least {
				close(enough)
			}
			again := launch(t, append(args, "-listen", old.addr)...)
			again.waitReady()
			g.mu.Lock()
			g.nodes[i] = again
			g.mu.Unlock()
		}
	})
	g.calm = func() {
		cancel()
		if wait(); killed < least {
			t.Errorf("only %d nodes were killed", killed)
		}
	}
	t.Cleanup(cancel)
}

// Promise: Once, and Durable. Producers retry with their numbers if they got no response, while nodes are killed.
func TestGapcheck_producersRetryWhileNodesAreKilled(t *testing.T) {
	for name, produce := range map[string]producer{"posts": byNumberedPosts, "uploads": byNumberedUploads} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := storetest.Redis(t)
			g := gapcheck{nodes: nodes(t, 3, redis), redis: redis, chunks: gapChunks, produce: produce, ended: true}
			g.restarting(t, "-redis", redis.URL())
			g.run(t)
		})
	}
}

// The other promises, for producers that use LPUSH.
func TestGapcheck_foreignProducersThatPushNewestFirst(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	g := gapcheck{nodes: nodes(t, 2, redis, "-history-order", "newest-first"), redis: redis, chunks: gapChunks, produce: byForeign, newestFirst: true}
	g.run(t)
}

// If programs push to a session and post to it, in either order of the list, numbers stay the same.
func TestForeign_pushesAndPostsOnOneSession(t *testing.T) {
	for _, order := range []string{"oldest-first", "newest-first"} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			redis := storetest.Redis(t)
			n := nodes(t, 1, redis, "-history-order", order)[0]
			session, ctx := newID(), deadline(t)
			f := foreign{redis, session, order == "newest-first"}
			v := &viewer{session: session}
			following := background(t, func() { v.follow(ctx, at(n.addr), nil) })
			for i := range 40 {
				if i%2 == 0 {
					if err := f.say(ctx, foreignChunk(i), 2*time.Millisecond); err != nil {
						t.Fatal(err)
					}
				} else if s := n.append(t, session, fmt.Sprintf(`{"content":"word%d ","message_id":"m1"}`, i)); s.First != int64(i+1) {
					t.Fatalf("chunk %d was stored as %d", i+1, s.First)
				}
			}
			if err := f.say(ctx, `{"message_id":"m1","is_complete":true}`, 0); err != nil {
				t.Fatal(err)
			}
			a := n.post("/v1/sessions/"+session+"/chunks", "application/json", `{"message_id":"m1"}`)
			if p := a.problem(t); a.status != http.StatusConflict || p.Code != "message_ended" {
				t.Errorf("%d %s", a.status, a.body)
			}
			n.append(t, session, `{"type":"end"}`)
			following()
			list := history(t, redis, session)
			if order == "newest-first" {
				slices.Reverse(list)
			}
			v.check(t, list)
			v.unreset(t)
			for i, chunk := range v.chunks[:40] {
				if !strings.Contains(chunk, fmt.Sprintf(`"word%d "`, i)) {
					t.Errorf("chunk %d is %s", i+1, chunk)
				}
			}
		})
	}
}

// uploadWith begins an upload whose lines the test writes.
func uploadWith(t *testing.T, n *node, path string, header map[string]string) (lines io.WriteCloser, answered <-chan answer) {
	t.Helper()
	body, in := io.Pipe()
	r, err := http.NewRequest("POST", "http://"+n.addr+path, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-ndjson")
	for name, value := range header {
		r.Header.Set(name, value)
	}
	done := make(chan answer, 1)
	go func() { // ends with the request, which ends with its body
		response, err := n.http.Do(r)
		_ = body.CloseWithError(io.ErrClosedPipe)
		if err != nil {
			done <- answer{err: err}
			return
		}
		defer response.Body.Close()
		b, err := io.ReadAll(response.Body)
		done <- answer{response.StatusCode, response.Header, string(b), err}
	}()
	t.Cleanup(func() { _ = in.Close() })
	return in, done
}

// ends returns how the messages of a log ended: "type message_id reason".
func (n *node) ends(t *testing.T, session string) (all []string) {
	t.Helper()
	for _, element := range n.pages(t, session) {
		var c struct {
			Type    string
			Message string `json:"message_id"`
			Reason  string
		}
		decode(t, element, &c)
		if c.Type != "delta" {
			all = append(all, strings.TrimSpace(c.Type+" "+c.Message+" "+c.Reason))
		}
	}
	return all
}

const lost = "failed m1 producer_lost"

// A producer whose node dies has the grace period, and then its message ends, once, whichever node notices.
func TestLease_nodeKilledDuringAnUpload(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	all := nodes(t, 3, redis, "-grace", "2s", "-reconcile", "300ms")
	session, ctx := newID(), deadline(t)
	lines, _ := uploadWith(t, all[0], "/v1/sessions/"+session+"/chunks?message_id=m1", nil)
	fmt.Fprintln(lines, `{"content":"word1 "}`)
	viewers := []*viewer{{session: session}, {session: session}}
	var waits []func()
	for i, v := range viewers {
		waits = append(waits, background(t, func() {
			v.follow(ctx, at(all[1+i].addr), func(e event) bool { return strings.Contains(e.data, "producer_lost") })
		}))
	}
	for _, v := range viewers {
		eventually(t, "the first chunk", func() bool { return v.seen.Load() == 1 })
	}
	begun := time.Now()
	all[0].kill()
	for _, wait := range waits {
		wait()
	}
	if took := time.Since(begun); took < time.Second {
		t.Errorf("the message was given up after %v", took)
	}
	want := all[1].pages(t, session)
	for _, v := range viewers {
		v.check(t, want)
	}
	if got := all[2].ends(t, session); !slices.Equal(got, []string{lost}) {
		t.Errorf("%q", got)
	}
}

// With its numbers the producer continues at another node, if it is back in time.
func TestLease_producerThatComesBackFromAKilledNodeGoesOn(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	all := nodes(t, 2, redis, "-grace", "10s", "-reconcile", "300ms")
	session := newID()
	path := "/v1/sessions/" + session + "/chunks?message_id=m1"
	header := map[string]string{"Producer-Id": "p", "Producer-Epoch": "0", "Producer-Chunk": "0"}
	lines, _ := uploadWith(t, all[0], path, header)
	fmt.Fprintln(lines, `{"content":"word1 "}`)
	eventually(t, "the first chunk", func() bool { return len(history(t, redis, session)) == 1 })
	all[0].kill()
	pause(t.Context(), time.Second) // it takes a while to notice
	lines, answered := uploadWith(t, all[1], path, header)
	fmt.Fprintln(lines, `{"content":"word1 "}`)
	begun := time.Now()
	eventually(t, "a pause that is longer than the grace", func() bool { return time.Since(begun) > 12*time.Second })
	fmt.Fprintln(lines, `{"content":"word2 "}`)
	fmt.Fprintln(lines, `{"type":"done"}`)
	_ = lines.Close()
	if a := <-answered; a.status != http.StatusCreated {
		t.Errorf("%d %s (%v)", a.status, a.body, a.err)
	}
	if got := all[1].ends(t, session); !slices.Equal(got, []string{"done m1"}) {
		t.Errorf("%q", got)
	}
	if got := history(t, redis, session); len(got) != 3 {
		t.Errorf("%q", got)
	}
}

// A node is paused for longer than the grace period. When it resumes, its producer's message has ended, once.
func TestLease_nodePausedForLongerThanTheGrace(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	all := nodes(t, 2, redis, "-grace", "2s", "-reconcile", "300ms")
	session, ctx := newID(), deadline(t)
	path := "/v1/sessions/" + session + "/chunks?message_id=m1"
	lines, answered := uploadWith(t, all[0], path, nil)
	fmt.Fprintln(lines, `{"content":"word1 "}`)
	eventually(t, "the first chunk", func() bool { return len(history(t, redis, session)) == 1 })
	_ = all[0].cmd.Process.Signal(syscall.SIGSTOP)
	resume := func() { _ = all[0].cmd.Process.Signal(syscall.SIGCONT) }
	defer resume()
	v := &viewer{session: session}
	v.follow(ctx, at(all[1].addr), func(e event) bool { return strings.Contains(e.data, "producer_lost") })
	resume()
	select {
	case a := <-answered: // though its producer is silent
		if p := a.problem(t); a.status != http.StatusConflict || p.Code != "message_ended" || p.Stored == nil || p.Stored.Count != 1 {
			t.Errorf("%d %s", a.status, a.body)
		}
	case <-ctx.Done():
		t.Error("the upload is not answered")
	}
	if got := all[1].ends(t, session); !slices.Equal(got, []string{lost}) {
		t.Errorf("%q", got)
	}
}

// The answer of the built-in model ends when its node dies, too.
func TestLease_nodeKilledWhileTheModelAnswers(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	all := nodes(t, 2, redis, "-grace", "2s", "-reconcile", "300ms")
	session, ctx := newID(), deadline(t)
	a := all[0].post("/v1/sessions/"+session+"/messages", "application/json", `{"content":"Why?"}`)
	var asked struct {
		Reply string `json:"reply_message_id"`
	}
	decode(t, a.body, &asked)
	v := &viewer{session: session}
	killed := false
	v.follow(ctx, at(all[1].addr), func(e event) bool {
		if v.cursor == 4 && !killed {
			killed = true
			all[0].kill()
		}
		return strings.Contains(e.data, "producer_lost")
	})
	want := []string{"failed " + asked.Reply + " producer_lost"}
	if got := all[1].ends(t, session); len(got) != 2 || !slices.Equal(got[1:], want) { // after the question
		t.Errorf("%q", got)
	}
}

// An upload under way gets its response at once when another node cancels it (later on a busy machine), and nothing
// follows the cancelled chunk.
func TestCancel_anUploadUnderWayIsAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	all := nodes(t, 2, redis)
	session := newID()
	lines, answered := uploadWith(t, all[0], "/v1/sessions/"+session+"/chunks?message_id=m1", nil)
	stop := make(chan struct{})
	writing := background(t, func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if _, err := fmt.Fprintf(lines, "{\"content\":\"word%d \"}\n", i); err != nil {
				return
			}
		}
	})
	eventually(t, "some chunks", func() bool { return len(history(t, redis, session)) > 3 })
	begun := time.Now()
	if a := all[1].post("/v1/sessions/"+session+"/cancel", "", ""); a.status != http.StatusOK || !strings.Contains(a.body, `"message_ids":["m1"]`) {
		t.Errorf("%d %s", a.status, a.body)
	}
	a := <-answered
	if took := time.Since(begun); took > slack {
		t.Errorf("it was answered after %v", took)
	}
	if p := a.problem(t); a.status != http.StatusConflict || p.Code != "message_cancelled" {
		t.Errorf("%d %s (%v)", a.status, a.body, a.err)
	}
	close(stop)
	writing()
	list := history(t, redis, session)
	if !strings.Contains(list[len(list)-1], `"type":"cancelled"`) || strings.Contains(strings.Join(list[:len(list)-1], ""), "cancelled") {
		t.Errorf("%q", list)
	}
}

// A sender that is faster than Redis must wait: the node does not buffer what it sends.
func TestUpload_backpressureReachesTheSender(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	session := newID()
	lines, answered := uploadWith(t, n, "/v1/sessions/"+session+"/chunks", nil)
	line := fmt.Sprintf("{\"content\":%q}\n", strings.Repeat("x", 4000))
	if _, err := io.WriteString(lines, line); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first chunk", func() bool { return len(history(t, redis, session)) == 1 })
	redis.Signal(syscall.SIGSTOP)
	sent, count := make(chan int), 1
	writing := background(t, func() {
		for range 8_000 { // 32 MB
			if _, err := io.WriteString(lines, line); err != nil {
				break
			}
			sent <- 1
		}
		close(sent)
	})
	for waiting := true; waiting; {
		select {
		case n := <-sent:
			count += n
		case <-time.After(700 * time.Millisecond): // it must wait
			waiting = false
		}
	}
	if bytes := count * len(line); bytes > 20<<20 {
		t.Errorf("%d bytes were taken from a sender while Redis took none", bytes)
	}
	redis.Signal(syscall.SIGCONT)
	for n := range sent {
		count += n
	}
	writing()
	_ = lines.Close()
	a := <-answered
	var s stored
	decode(t, a.body, &s)
	if a.status != http.StatusCreated || s.Count != count {
		t.Errorf("%d lines were sent: %d %s (%v)", count, a.status, a.body, a.err)
	}
}

// rss returns the memory of a process, in bytes.
func rss(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.Atoi(string(regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b)[1]))
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// A hundred thousand lines, sent as fast as they are accepted, are all stored, and the node grows by less than 32 MiB.
// This is the plain program, because the race detector takes memory, too.
func TestUpload_aHundredThousandLinesTakeLittleMemory(t *testing.T) {
	t.Parallel()
	plain := plainProgram(t)
	redis := storetest.Redis(t)
	for name, args := range map[string][]string{"embedded": nil, "redis": {"-redis", redis.URL()}} {
		n := startProgram(t, plain, args...)
		n.append(t, "warm", words(1, 100))
		before := rss(t, n.cmd.Process.Pid)
		const count = 100_000
		r, w := io.Pipe()
		go func() { // ends with the body
			for i := range count {
				if _, err := fmt.Fprintf(w, "{\"message_id\":\"m1\",\"content\":\"word%d of many \"}\n", i); err != nil {
					return
				}
			}
			_ = w.Close()
		}()
		a := n.do(deadline(t), "POST", "/v1/sessions/s/chunks", "application/x-ndjson", r)
		grown := rss(t, n.cmd.Process.Pid) - before
		var s stored
		decode(t, a.body, &s)
		if a.status != http.StatusCreated || s.Count != count || s.Last != count {
			t.Errorf("%s: %d %s (%v)", name, a.status, a.body, a.err)
		}
		t.Logf("%s: the node has %d KiB more", name, grown>>10)
		if grown > 32<<20 {
			t.Errorf("%s: the node has %d KiB more", name, grown>>10)
		}
		for i, element := range n.pages(t, "s") {
			if !strings.Contains(element, fmt.Sprintf(`"word%d of many "`, i)) {
				t.Fatalf("%s: chunk %d is %s", name, i+1, element)
			}
		}
	}
}

// The Python producer of docs/redis.md works as described: its chunks are announced, it ends its message, and it stops
// when the message is cancelled.
func TestDocs_pythonProducer(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/redis.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?s)```python\n(.*?)```").FindSubmatch(page)
	if found == nil {
		t.Fatal("there is no Python in docs/redis.md")
	}
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	_, port, _ := strings.Cut(redis.Addr(), ":")
	program := strings.Replace(string(found[1]), "redis.Redis(", "redis.Redis(port="+port+", ", 1)
	run := func(program string) {
		t.Helper()
		if out, err := exec.CommandContext(deadline(t), "/usr/bin/python3", "-c", program).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	ctx := deadline(t)
	v := &viewer{session: "demo"}
	following := background(t, func() {
		v.follow(ctx, at(n.addr), func(e event) bool { return strings.Contains(e.data, "is_complete") })
	})
	eventually(t, "a viewer", func() bool { return v.status.Load() == http.StatusOK })
	run(program)
	following()
	list := history(t, redis, "demo")
	v.check(t, list)
	if len(list) != 5 || !strings.Contains(list[3], `"gap "`) {
		t.Errorf("%q", list)
	}
	a := n.post("/v1/sessions/demo/chunks", "application/json", `{"message_id":"m9"}`)
	if p := a.problem(t); p.Code != "message_ended" {
		t.Errorf("%d %s", a.status, a.body)
	}

	n.append(t, "demo", `{"message_id":"m10"}`)
	if a := n.post("/v1/sessions/demo/cancel", "application/json", `{"message_id":"m10"}`); a.status != http.StatusOK {
		t.Errorf("%d %s", a.status, a.body)
	}
	run(strings.ReplaceAll(program, "m9", "m10"))
	if list := history(t, redis, "demo"); len(list) != 8 { // one more word, until it noticed
		t.Errorf("%q", list)
	}
}
