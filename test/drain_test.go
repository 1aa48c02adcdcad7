package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gapless/store/storetest"
)

// slack is what a slow or busy machine may add to a promised time, with the race detector in the program. A test must
// distinguish it only from longer times.
const slack = 20 * time.Second

// exits drains a node, waits for its end, and checks that it came in time.
func (n *node) exits(t *testing.T, within time.Duration) {
	t.Helper()
	begun := time.Now()
	n.terminate()
	select {
	case <-n.exited:
	case <-time.After(within + slack):
		t.Errorf("the node has not ended %v after SIGTERM, with a drain time of %v", time.Since(begun), within)
		n.kill()
		return
	}
	t.Logf("the node took %v of %v", time.Since(begun).Round(time.Millisecond), within)
	if code := n.state.ExitCode(); code != 0 {
		t.Errorf("the node ended with %v", n.state)
	}
}

func TestDrain_viewersAreBrokenOffOneByOneWhileTheNodeIsNotReady(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, append(args, "-drain", "8s")...)
		ctx := deadline(t)
		session := newID()
		n.append(t, session, words(1, 3))
		const count = 30
		var left atomic.Int64
		left.Store(count)
		ends := make([]time.Time, count)
		viewers := make([]*viewer, count)
		var wg sync.WaitGroup
		for i := range viewers {
			viewers[i] = &viewer{session: session}
			wg.Go(func() {
				if how := viewers[i].connect(ctx, n.addr, nil); how != aborted {
					t.Errorf("viewer %d ended %s", i, how)
				}
				ends[i] = time.Now()
				left.Add(-1)
			})
		}
		for _, v := range viewers {
			eventually(t, "the viewer has all", func() bool { return v.seen.Load() == 3 })
		}
		begun := time.Now()
		n.terminate()
		eventually(t, "not ready", func() bool { return n.get("/readyz").status == http.StatusServiceUnavailable })
		if left.Load() < count/2 {
			t.Errorf("the node was not ready only after %d of %d viewers had gone", count-left.Load(), count)
		}
		// A viewer that comes now must reconnect: it gets 200, and a broken stream.
		late := &viewer{session: session}
		if how := late.connect(ctx, n.addr, nil); how != aborted || late.retry == "" && late.cursor == 0 {
			t.Errorf("a late viewer ended %s, with retry %q", how, late.retry)
		}
		wg.Wait()
		n.exits(t, 8*time.Second)
		slices.SortFunc(ends, time.Time.Compare)
		if spread := ends[count-1].Sub(ends[0]); spread < 500*time.Millisecond {
			t.Errorf("all viewers were broken off within %v", spread)
		}
		if last := ends[count-1].Sub(begun); last > 8*time.Second+slack {
			t.Errorf("the last viewer was broken off after %v", last)
		}
		for _, v := range viewers {
			v.check(t, viewers[0].chunks)
		}
	})
}

// upload begins an upload whose lines the test writes, and returns a channel with its response.
func upload(t *testing.T, n *node, session string) (lines io.Writer, answered <-chan answer) {
	t.Helper()
	body, in := io.Pipe()
	done := make(chan answer, 1)
	go func() { // ends with the request, which ends with its body
		done <- n.do(context.Background(), "POST", "/v1/sessions/"+session+"/chunks", "application/x-ndjson", body)
	}()
	t.Cleanup(func() { _ = in.Close() })
	return in, done
}

func TestDrain_anUploadUnderWayIsToldWhatIsStored(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-drain", "4s")[0]
	session := newID()
	lines, answered := upload(t, n, session)
	for i := range 3 {
		fmt.Fprintf(lines, "{\"content\":\"%d\"}\n", i)
	}
	_, _ = io.WriteString(lines, `{"content":"half a li`)
	eventually(t, "three lines are stored", func() bool { return len(history(t, redis, session)) == 3 })
	n.exits(t, 4*time.Second)
	select {
	case a := <-answered:
		if a.err != nil {
			t.Fatalf("no answer: %v", a.err)
		}
		p := a.problem(t)
		if a.status != http.StatusServiceUnavailable || p.Stored == nil || p.Stored.Count != 3 || p.Stored.First != 1 || p.Stored.Last != 3 {
			t.Errorf("the answer is %d %s", a.status, a.body)
		}
	case <-time.After(patience):
		t.Fatal("no answer")
	}
	if got := len(history(t, redis, session)); got != 3 {
		t.Errorf("the log has %d chunks", got)
	}
}

func TestDrain_requestsUnderWayFinish(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-drain", "30s")[0]
	session := newID()
	body := words(1, 3)
	conn := dial(t, n.addr, fmt.Sprintf("POST /v1/sessions/%s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", session, len(body), body[:20]))
	eventually(t, "the node serves", func() bool { return n.get("/readyz").status == http.StatusOK })
	lines, answered := upload(t, n, session+"-upload")
	_, _ = io.WriteString(lines, "{\"data\":0}\n")
	eventually(t, "the upload is under way", func() bool { return len(history(t, redis, session+"-upload")) == 1 })
	n.terminate()
	eventually(t, "the node drains", func() bool { return n.get("/readyz").status != http.StatusOK })
	if _, err := io.WriteString(conn, body[20:]); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(lines, "{\"data\":0}\n")
	_ = lines.(io.Closer).Close()
	response, err := http.ReadResponse(conn.in, nil)
	if err != nil || response.StatusCode != http.StatusCreated {
		t.Errorf("the POST under way: %v %v", response, err)
	} else if !response.Close { // its client would send the next request on a connection that is about to close
		t.Error("the connection of a node that drains is kept")
	}
	if a := <-answered; a.status != http.StatusCreated {
		t.Errorf("the upload under way: %d %s (%v)", a.status, a.body, a.err)
	}
	n.exits(t, 30*time.Second)
	if got := len(history(t, redis, session)); got != 3 {
		t.Errorf("the log has %d chunks", got)
	}
}

func TestDrain_anAnswerOfTheModelEndsAsDoneOrFailed(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis, "-drain", "2s")
	session := newID()
	a := both[0].post("/v1/sessions/"+session+"/messages", "application/json", `{"content":"why?"}`)
	if a.status != http.StatusAccepted {
		t.Fatalf("ask: %d %s", a.status, a.body)
	}
	var asked struct {
		Reply string `json:"reply_message_id"`
	}
	decode(t, a.body, &asked)
	v := &viewer{session: session, query: "?until=done"}
	wait := background(t, func() { v.follow(deadline(t), at(both[1].addr), nil) })
	eventually(t, "the answer is under way", func() bool { return v.seen.Load() > 3 })
	both[0].exits(t, 2*time.Second)
	wait()
	v.check(t, history(t, redis, session))
	var last struct {
		Type, Reason string
		ID           string `json:"message_id"`
	}
	decode(t, v.chunks[len(v.chunks)-1], &last)
	if (last.Type != "failed" && last.Type != "done") || last.ID != asked.Reply {
		t.Errorf("the answer ended with %+v", last)
	}
}

// stalled is a viewer that reads nothing after the beginning of its stream.
func stalled(t *testing.T, n *node, session string) {
	t.Helper()
	v := &viewer{session: session, dialer: net.Dialer{Control: smallReceiveBuffer}}
	_, done, err := v.stream(t.Context(), n.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { done(false) })
}

func TestDrain_aViewerThatTakesNothingHoldsNothingUp(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, append(args, "-drain", "2s", "-write-timeout", "1h")...)
		session := newID()
		large(t, n, session, "")
		stalled(t, n, session)
		other := &viewer{session: session}
		wait := background(t, func() { other.connect(deadline(t), n.addr, nil) })
		eventually(t, "the other viewer has all", func() bool { return other.seen.Load() == largeCount })
		n.exits(t, 2*time.Second)
		wait()
		if other.check(t, other.chunks); len(other.chunks) != largeCount {
			t.Errorf("the other viewer has %d chunks", len(other.chunks))
		}
	})
}

func TestDrain_aRequestThatNeverEndsHoldsNothingUp(t *testing.T) {
	t.Parallel()
	n := start(t, "-drain", "2s", "-header-timeout", "1h", "-body-timeout", "1h")
	dial(t, n.addr, "POST /v1/sessions/x/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
	dial(t, n.addr, "GET /v1/sess")
	eventually(t, "the node serves", func() bool { return n.get("/readyz").status == http.StatusOK })
	n.exits(t, 2*time.Second)
}

// Waiting viewers do not keep a node from stopping while Redis is away, and they learn that they must reconnect.
func TestDrain_worksWhileRedisIsAway(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis := storetest.Redis(t)
		n := nodes(t, 1, redis, append(args, "-drain", "3s", "-heartbeat", "50ms")...)[0]
		session := newID()
		redis.Kill()
		v := &viewer{session: session}
		how := make(chan ending, 1)
		wait := background(t, func() { how <- v.connect(deadline(t), n.addr, nil) })
		eventually(t, "the viewer is held", func() bool { return v.beats.Load() > 3 })
		n.exits(t, 3*time.Second)
		wait()
		if how := <-how; how != aborted || v.comments == 0 {
			t.Errorf("the viewer ended %s", how)
		}
		if string(v.line) == "" && v.retry == "" {
			t.Error("the viewer was not told when to come back")
		}
	})
}
