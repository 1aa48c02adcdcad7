package api

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"gapless/api/auth/authtest"
	"gapless/store/storetest"
)

// many returns a JSON array of n chunks with the contents sesame 1 to sesame n.
func many(n int) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf(`{"message_id":"m","content":"sesame %d"}`, i+1)
	}
	return "[" + strings.Join(all, ",") + "]"
}

func TestStream_beginsBehindTheCursorThatWins(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	at := n.append("s", many(9))
	for _, c := range []struct {
		query, header string
		cursor        int64
	}{
		{"", "", 0}, {"?after=", "", 0}, {"?after=0", "", 0}, {"?after=4", "", 4}, {"?after=9", "", 9}, {"?after=latest", "", 9},
		{"?lastEventId=5", "", 5}, {"?after=2&lastEventId=5", "", 5}, {"?after=latest&lastEventId=5", "", 5}, {"?after=3&lastEventId=", "", 3},
		{"", "6", 6}, {"?after=2", "6", 6}, {"?lastEventId=5", "6", 6}, {"?after=2&lastEventId=5", "6", 6}, {"?after=latest", "6", 6},
		{"?after=4&lastEventId=5", "", 5}, {"?after=2", "0", 0}, {"?lastEventId=x", "7", 7},
	} {
		v := n.watch("s", c.query, "Last-Event-ID", c.header)
		e, w := v.welcome()
		if e.id != c.cursor || w.Cursor != c.cursor || w.Session != "s" || w.Epoch != at.Epoch || w.First != 1 || w.Last != 9 || w.Node != "n1" {
			t.Errorf("%s, header %q: %+v %+v", c.query, c.header, e, w)
		}
		if w.Connection == "" || w.Connection != v.header.Get("Gapless-Connection") {
			t.Errorf("connection %q, header %q", w.Connection, v.header.Get("Gapless-Connection"))
		}
		if v.retry < 1000 || v.retry > 3000 || v.beats != 1 {
			t.Errorf("retry %d, %d comments", v.retry, v.beats)
		}
		for i, said := range v.take(c.cursor, int(9-c.cursor)) {
			if want := fmt.Sprint("sesame ", c.cursor+int64(i)+1); said != want {
				t.Errorf("%q instead of %q", said, want)
			}
		}
		v.stop()
	}
}

func TestStream_snapshotIsWhatWasSaidAlready(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", many(3))
	v := n.watch("s", "?snapshot=1")
	v.welcome()
	e := v.next()
	if want := `"messages":[{"message_id":"m","role":"assistant","content":"sesame 1sesame 2sesame 3","status":"streaming","done":false,"first_seq":1,"last_seq":3}]`; e.name != "snapshot" || e.id != 3 || !strings.Contains(e.data, want) {
		t.Errorf("%+v", e)
	}
	n.append("s", `[{"message_id":"m","content":"sesame 4"},{"type":"end"}]`)
	v.take(3, 2)
	if e, err := v.read(); err != io.EOF { // then the node knows that the log has ended
		t.Errorf("%+v, %v behind the end", e, err)
	}
	if a := n.get("/v1/sessions/s/stream?snapshot=1&after=5"); a.status != 204 {
		t.Errorf("%+v", a)
	}
	for _, query := range []string{"snapshot=0", "snapshot=true", "snapshot=1&format=raw"} {
		if a := n.do(request{method: "GET", path: "/v1/sessions/s/stream?" + query, bad: true}); a.status != 400 || !strings.Contains(string(a.body), `"member":"snapshot"`) {
			t.Errorf("%s: %+v", query, a)
		}
	}
}

func TestStream_isNeverKeptOrCompressedOnTheWay(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	v := n.watch("s", "", "Accept-Encoding", "gzip, br")
	for name, want := range map[string]string{
		"Content-Type": "text/event-stream", "Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no", "Incremental": "?1", "Content-Encoding": "",
	} {
		if got := v.header.Get(name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
	if a := n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeText, body: "a"}); a.status != 201 || a.header.Get("Incremental") != "?1" {
		t.Errorf("an upload: %d %v", a.status, a.header)
	}
}

func TestStream_goesOnLiveAndEndsCleanlyWithTheLog(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	early := n.watch("s", "") // waits for a session that does not exist
	if _, w := early.welcome(); w.Epoch != "" || w.First != 1 || w.Last != 0 || w.Cursor != 0 {
		t.Errorf("%+v", w)
	}
	at := n.append("s", many(2))
	early.take(0, 2)
	late := n.watch("s", "?after=latest")
	late.welcome()
	n.append("s", `[{"content":"sesame 3"},{"type":"done","message_id":"m"},{"type":"end"}]`)
	for _, v := range []*stream{early, late} {
		v.take(2, 3)
		v.end(true)
	}
	// At the end, nothing follows. Before the end, the missing chunks and the same end follow.
	for _, q := range []request{
		{path: "?after=5"}, {path: "?after=5&format=raw"}, {path: "?after=latest"}, {path: "?lastEventId=5"}, {header: map[string]string{"Last-Event-ID": "5"}},
	} {
		q.path = "/v1/sessions/s/stream" + q.path
		v := n.open(q)
		body, _ := io.ReadAll(v.body)
		if v.status != 204 || len(body) > 0 || v.header.Get("Gapless-Epoch") != at.Epoch || v.header.Get("Gapless-Reason") != "ended" {
			t.Errorf("%s %v: %d %v %s", q.path, q.header, v.status, v.header, body)
		}
	}
	again := n.watch("s", "?after=3")
	again.welcome()
	again.take(3, 2)
	again.end(true)
}

func TestStream_untilDoneEndsBehindTheNextStop(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, stop := range []string{"done", "failed", "cancelled", "end"} {
		s := "s-" + stop
		n.append(s, `[{"message_id":"m"},{"type":"message","message_id":"m"}]`)
		v := n.watch(s, "?until=done")
		v.welcome()
		v.take(0, 2)
		n.append(s, `{"type":"`+stop+`","message_id":"m"}`)
		if stop != "end" {
			n.append(s, `{"content":"sesame"}`)
		}
		v.take(2, 1)
		v.end(true)
		// The same from the history, and from after it.
		v = n.watch(s, "?until=done&after=1")
		v.welcome()
		v.take(1, 2)
		v.end(true)
	}
	v := n.watch("s-done", "?until=done&after=3")
	v.welcome()
	v.take(3, 1)
	n.append("s-done", `{"type":"done","message_id":"m2"}`)
	v.take(4, 1)
	v.end(true)
}

func TestStream_cursorThatTheLogDoesNotHaveIsReset(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.store.HistoryMax = redis.URL(), 5 })
	at := n.append("s", many(8)) // 4 to 8 are kept
	for _, c := range []struct {
		session, query, header, reason string
		cursor, id                     int64
		first, last                    int64
	}{
		{"s", "", "", "trimmed", 0, 3, 4, 8}, {"s", "?after=2", "", "trimmed", 2, 3, 4, 8},
		{"s", "?after=9", "", "ahead", 9, 3, 4, 8}, {"s", "", "9999999999999999", "ahead", 9999999999999999, 3, 4, 8},
		{"s", "", "x", "unknown", 0, 3, 4, 8}, {"s", "?after=7", "-7", "unknown", 0, 3, 4, 8}, {"s", "?lastEventId=07", "", "unknown", 0, 3, 4, 8},
		{"s", "?after=latest&lastEventId=x", "", "unknown", 0, 3, 4, 8},
		{"none", "?after=7", "", "ahead", 7, 0, 1, 0}, {"none", "", "x", "unknown", 0, 0, 1, 0},
	} {
		v := n.watch(c.session, c.query, "Last-Event-ID", c.header)
		v.welcome()
		e, r := v.reset(c.reason)
		if e.id != c.id || r.Cursor != c.cursor || r.First != c.first || r.Last != c.last {
			t.Errorf("%s %s %s: %+v %+v", c.session, c.query, c.header, e, r)
		}
		if c.session == "s" {
			if r.Epoch != at.Epoch {
				t.Errorf("epoch %q", r.Epoch)
			}
			v.take(3, 5)
		} else if r.Epoch != "" {
			t.Errorf("epoch %q", r.Epoch)
		}
		v.stop()
	}
}

func TestStream_ofADeletedSessionIsToldAndEndsAndLaterOnesGet204(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	at := n.append("s", many(3))
	v := n.watch("s", "?after=1")
	v.welcome()
	v.take(1, 2)
	n.do(request{method: "DELETE", path: "/v1/sessions/s"})
	if e, r := v.reset("deleted"); e.id != 3 || r.Cursor != 3 || r.Epoch != at.Epoch || r.Last != 3 || r.First != 4 {
		t.Errorf("%+v %+v", e, r)
	}
	v.end(true)
	for _, query := range []string{"", "?after=3", "?after=latest", "?lastEventId=x", "?after=99", "?until=done", "?format=raw"} {
		v := n.open(request{path: "/v1/sessions/s/stream" + query})
		if v.status != 204 || v.header.Get("Gapless-Epoch") != at.Epoch || v.header.Get("Gapless-Reason") != "deleted" {
			t.Errorf("%s: %d %v", query, v.status, v.header)
		}
	}
	// The new session is another log, and a cursor of the old one is reset.
	n.append("s", `{"content":"sesame, anew"}`)
	v = n.watch("s", "?after=2")
	_, w := v.welcome()
	if e, r := v.reset("epoch"); e.id != 1_000_000 || r.Cursor != 2 || r.Epoch != w.Epoch || r.Epoch == at.Epoch {
		t.Errorf("%+v %+v", e, r)
	}
	v.take(1_000_000, 1)
}

func TestStream_badParametersAreRefused(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for query, member := range map[string]string{
		"after=x": "after", "after=-1": "after", "after=01": "after", "after=LATEST": "after", "after=12345678901234567": "after",
		"until=end": "until", "until=DONE": "until", "format=xml": "format",
	} {
		p := n.do(request{method: "GET", path: "/v1/sessions/s/stream?" + query, bad: true}).refused(t, 400, "invalid_parameter")
		if p.Member != member {
			t.Errorf("%s: %+v", query, p)
		}
	}
	// A bad cursor is an error even if it does not matter.
	n.do(request{method: "GET", path: "/v1/sessions/s/stream?after=x", header: map[string]string{"Last-Event-ID": "3"}, bad: true}).refused(t, 400, "invalid_parameter")
}

// Any other status would end an EventSource for good.
func TestStream_isHeldWhileRedisIsAwayAndNever503(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) {
		s.store.Redis, s.sse.Heartbeat, s.sse.Reconcile, s.api.Patience = redis.URL(), 20*time.Millisecond, 100*time.Millisecond, 50*time.Millisecond
		s.errors = true // Redis cannot be reached
	})
	redis.Kill()
	v := n.watch("s", "", "Last-Event-ID", "0")
	beats := make(chan event, 1)
	go func() { // ended by the welcome, or by the stream's end
		e, err := v.read()
		if err != nil {
			t.Errorf("while Redis is away: %v", err)
		}
		beats <- e
	}()
	select {
	case e := <-beats:
		t.Fatalf("%+v while Redis is away", e)
	case <-time.After(time.Second):
	}
	redis.Start()
	if e := within(t, "welcome", beats); e.name != "welcome" {
		t.Fatalf("%+v", e)
	}
	if v.beats < 3 {
		t.Errorf("%d heartbeats", v.beats)
	}
	eventually(t, "an append", func() bool { return n.post("/v1/sessions/s/chunks", typeJSON, `{"content":"sesame"}`).status == 201 })
	v.take(0, 1)
}

func TestStream_ofANodeThatDrainsIsBrokenOffAndNewOnesAreSentAway(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", many(2))
	v := n.watch("s", "")
	v.welcome()
	v.take(0, 2)
	n.hub.Drain(0)
	v.end(false)
	refused := n.watch("s", "")
	refused.end(false)
	if refused.retry < 1000 || refused.beats != 1 {
		t.Errorf("retry %d, %d comments", refused.retry, refused.beats)
	}
}

func TestStream_seesWhatAnotherNodeStores(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	one, two := serve(t, on(redis)), serve(t, on(redis))
	v := one.watch("s", "")
	v.welcome()
	two.append("s", many(3))
	redis.Publish(t.Context(), "chat:stream:s", `{"content":"sesame, foreign"}`)
	redis.RPush(t.Context(), "chat:history:s", `{"content":"sesame, foreign"}`)
	if got := v.take(0, 4); got[3] != "sesame, foreign" {
		t.Errorf("%q", got)
	}
	one.append("s", `{"type":"end"}`)
	v.take(4, 1)
	v.end(true)
	if v := two.open(request{path: "/v1/sessions/s/stream?after=5"}); v.status != 204 {
		t.Errorf("%d on the other node", v.status)
	}
}

func TestStream_pagesThroughMoreThanAWindowHolds(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.sse.Window = 4 << 10 })
	const chunks = 1000
	n.append("s", many(chunks))
	n.append("s", `{"type":"end"}`)
	v := n.watch("s", "?after=7")
	v.welcome()
	for i, said := range v.take(7, chunks-7) {
		if said != fmt.Sprint("sesame ", i+8) {
			t.Fatalf("chunk %d says %q", i+8, said)
		}
	}
	v.take(chunks, 1)
	v.end(true)
}

// HEAD has the same status and headers as GET. It starts no stream.
func TestHead_saysWhatEachGetWould(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `[{"message_id":"m","content":"sesame"}]`)
	n.append("ended", `[{"content":"sesame"},{"type":"end"}]`)
	header := func(method, path string) (int, http.Header) {
		r := n.new(request{method: method, path: path, header: map[string]string{"Accept-Encoding": "identity"}, bad: true})
		r.Close = true
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel() // a stream continues
		res, err := n.client.Do(r.WithContext(ctx))
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		defer res.Body.Close()
		if method == http.MethodHead {
			if body, err := io.ReadAll(res.Body); len(body) > 0 || err != nil {
				t.Errorf("HEAD %s: %q, %v", path, body, err)
			}
		}
		// These differ for each response, or say how its end is found.
		for _, name := range []string{"Date", "Gapless-Connection", "Content-Length"} {
			res.Header.Del(name)
		}
		return res.StatusCode, res.Header
	}
	paths := []string{"/v1/sessions/none", "/v1/sessions/none/chunks", "/v1/sessions/a%20b", "/v1/sessions/ended/stream?after=2", "/v1/sessions/s/stream?after=x",
		"/v1/sessions/none/ui-stream", "/v1/sessions/ended/stream?format=raw&after=9", "/nothing", "/v1/sessions/s/cancel", "/v1/sessions/s/chunks?limit=0"}
	for _, r := range n.api.echo.Routes() {
		if r.Method == http.MethodGet {
			paths = append(paths, strings.NewReplacer(":id", "s", ":message_id", "m").Replace(r.Path))
		}
	}
	for _, path := range paths {
		get, want := header(http.MethodGet, path)
		status, got := header(http.MethodHead, path)
		if status != get || !maps.EqualFunc(got, want, slices.Equal) {
			t.Errorf("%s: HEAD %d %v, GET %d %v", path, status, got, get, want)
		}
	}
	eventually(t, "nobody views", func() bool { return into[sessionJSON](t, n.get("/v1/sessions/s"), 200).Viewers == 0 })
	if a := n.do(request{method: http.MethodOptions, path: "/v1/sessions/s/chunks"}); a.status != 204 || !strings.Contains(a.header.Get("Allow"), "HEAD") {
		t.Errorf("OPTIONS: %d %v", a.status, a.header)
	}
}

// A ticket opens one grant, which belongs to the last connection. HEAD, which programs use to check links, does not use
// the ticket.
func TestHead_leavesATicketUnused(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	made := n.ticket(t, "s", issuer.Token(time.Hour, authtest.May{"read": {"s"}}))
	v := n.watch("s", "?ticket="+made.Ticket)
	v.welcome()
	if a := n.do(request{method: http.MethodHead, path: made.URL}); a.status != 200 || a.header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("%d %v", a.status, a.header)
	}
	n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"content":"sesame 1"}`}, issuer.Token(time.Hour, authtest.May{"write": {"s"}})))
	v.take(0, 1)
}
