package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// told returns settings with which an upload learns of events only by notifications.
func told(redis *storetest.Server) func(*setup) {
	return func(s *setup) { s.store.Redis, s.api.Look = redis.URL(), time.Hour }
}

// beginning returns an upload on its own connection that has sent nothing yet.
func (n *node) beginning(t *testing.T, path, kind string, header ...string) conn {
	t.Helper()
	c := n.raw(t)
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n%s\r\n", path, kind, strings.Join(append(header, ""), "\r\n"))
	return c
}

func (c conn) send(text string) {
	fmt.Fprintf(c, "%x\r\n%s\r\n", len(text), text)
}

// response reads the response, which must come although the body continues.
func (c conn) response(t *testing.T) answer {
	t.Helper()
	res, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.Close {
		res.Header.Set("Connection", "close")
	}
	return answer{res.StatusCode, res.Header, body}
}

// A silent upload learns of events elsewhere at once.
func TestUpload_isToldAtOnceWhatHappensElsewhere(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	a, b := serve(t, told(redis)), serve(t, on(redis))
	for name, c := range map[string]struct {
		happens func(s string)
		status  int
		code    string
	}{
		"its message is cancelled": {func(s string) { b.cancel(s, "m") }, 409, "message_cancelled"},
		"all are cancelled":        {func(s string) { b.cancel(s, "") }, 409, "message_cancelled"},
		"the session ends":         {func(s string) { b.append(s, `{"type":"end"}`) }, 409, "session_ended"},
		"the session is deleted":   {func(s string) { b.do(request{method: "DELETE", path: "/v1/sessions/" + s}) }, 409, "session_deleted"},
		"its producer is fenced": {func(s string) {
			b.do(request{method: "POST", path: "/v1/sessions/" + s + "/chunks", kind: typeJSON, body: "[]", header: numbers("p", 1, 0)})
		}, 403, "producer_fenced"},
	} {
		t.Run(name, func(t *testing.T) {
			s := strings.ReplaceAll(name, " ", "-")
			f := a.upload(t, s, numbers("p", 0, 0))
			f.write(`{"message_id":"m","content":"sesame"}` + "\n")
			eventually(t, "a chunk", func() bool {
				r := b.get("/v1/sessions/" + s + "/chunks")
				return r.status == 200 && b.page(s, "").Last == 1
			})
			c.happens(s)
			if p := f.result().refused(t, c.status, c.code); p.Stored == nil || p.Stored.Count != 1 {
				t.Errorf("%+v", p)
			}
		})
	}
	// This includes an upload that belongs to no message.
	f := a.upload(t, "anonymous", nil)
	f.write(line("sesame"))
	eventually(t, "a chunk", func() bool { return b.get("/v1/sessions/anonymous").status == 200 && b.page("anonymous", "").Last == 1 })
	b.append("anonymous", `{"type":"end"}`)
	f.result().refused(t, 409, "session_ended")
}

// A lost subscription may have missed a name.
func TestUpload_looksWhenItsSubscriptionStandsAgain(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n, other := serve(t, told(redis)), serve(t, on(redis))
	f := n.upload(t, "s", nil)
	f.write(`{"message_id":"m"}` + "\n")
	eventually(t, "a subscription", func() bool { return len(redis.PubSubChannels(t.Context(), "chat:uploads").Val()) == 1 })
	for range 50 { // until a name is lost with the connection: the node reconnects after at least 10 ms
		redis.ClientKillByFilter(t.Context(), "TYPE", "pubsub")
	}
	other.cancel("s", "m")
	f.result().refused(t, 409, "message_cancelled")
}

// An upload that has not sent its first word does not reopen a message that has ended.
func TestUpload_ofAMessageThatIsOverIsRefusedBeforeItSaysAnything(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `{"message_id":"m"}`)
	n.cancel("s", "m")
	c := n.beginning(t, "/v1/sessions/s/chunks?message_id=m", typeText)
	c.response(t).refused(t, 409, "message_cancelled")
}

// A sender that does not read while it writes gets the response all the same.
func TestUpload_answerReachesASenderThatDoesNotStop(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	client := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer client.CloseIdleConnections()
	const times = 40
	for i := range times {
		s := fmt.Sprint("s", i)
		r, w := io.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() { // ends with the body, which the response closes
			text := []byte(strings.Repeat(`{"message_id":"m","content":"sesame"}`+"\n", 100))
			for {
				if _, err := w.Write(text); err != nil {
					return
				}
			}
		})
		go func() {
			for n.cancel(s, "m").status != 200 {
			}
		}()
		res, err := client.Post(n.server.URL+"/v1/sessions/"+s+"/chunks", typeNDJSON, r)
		if err != nil {
			t.Errorf("round %d: %v", i, err)
		} else {
			body, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || res.StatusCode != 409 {
				t.Errorf("round %d: %d %s %v", i, res.StatusCode, body, err)
			}
		}
		r.Close()
		wg.Wait()
	}
}

// A connection whose upload was refused before its end serves the next requests.
func TestUpload_refusedEarlyLeavesItsConnectionInOrder(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	c := n.raw(t)
	bad := "no\n" + strings.Repeat("{\"data\":0}\n", 2_000) // more than one read takes
	for range 20 {
		for _, body := range []string{bad, "{\"data\":0}\n"} {
			fmt.Fprintf(c, "POST /v1/sessions/s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			want := map[bool]int{true: 400, false: 201}[body == bad]
			if a := c.response(t); a.status != want || a.header.Get("Connection") != "" {
				t.Fatalf("%d %s: %s", a.status, a.header, a.body)
			}
		}
	}
}

// The server does not wait for a body that is declared short, but does not arrive, either.
func TestUpload_shortAndStalledIsAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	c := n.raw(t)
	fmt.Fprintf(c, "POST /v1/sessions/s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\nContent-Length: 5000\r\n\r\nno\n")
	if a := c.response(t); a.status != 400 || a.header.Get("Connection") != "close" {
		t.Fatalf("%d %s: %s", a.status, a.header, a.body)
	}
}

// An error in a request's headers is reported before a slow body has arrived.
func TestUpload_whatIsWrongInItsHeadersIsAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for name, c := range map[string]struct {
		path, kind string
		header     []string
		status     int
		code       string
	}{
		"content type": {"/v1/sessions/s/chunks", "application/xml", nil, 415, "unsupported_media_type"},
		"lease":        {"/v1/sessions/s/chunks?lease=x", typeNDJSON, nil, 400, "invalid_parameter"},
		"producer":     {"/v1/sessions/s/chunks", typeNDJSON, []string{"Producer-Id: p"}, 400, "invalid_parameter"},
		"session":      {"/v1/sessions/a%20b/chunks", typeNDJSON, nil, 400, "invalid_session_id"},
		"origin":       {"/v1/sessions/s/chunks", typeNDJSON, []string{"Origin: https://evil.example"}, 403, "cross_origin"},
		"path":         {"/v1/nothing", typeNDJSON, nil, 404, "not_found"},
		"gap":          {"/v1/sessions/s/chunks", typeNDJSON, []string{"Producer-Id: p", "Producer-Epoch: 0", "Producer-Chunk: 3"}, 409, "producer_gap"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c1 := n.beginning(t, c.path, c.kind, c.header...)
			c1.send("{\"data\":0}\n")
			a := c1.response(t)
			a.refused(t, c.status, c.code)
			if a.header.Get("Connection") != "close" {
				t.Errorf("%v", a.header)
			}
		})
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
}

// An upload that ends the log does not react to that end.
func TestUpload_thatEndsTheLogItself(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.api.Look = redis.URL(), 50*time.Millisecond })
	f := n.uploadWith(t, "s", "?message_id=m", nil)
	f.write(`{"content":"sesame"}` + "\n" + `{"type":"end"}` + "\n")
	eventually(t, "the end", func() bool {
		r := n.get("/v1/sessions/s")
		return r.status == 200 && strings.Contains(string(r.body), `"ended":true`)
	})
	for begun := time.Now(); time.Since(begun) < 300*time.Millisecond; {
		select {
		case a := <-f.answer:
			t.Fatalf("%d %s", a.status, a.body)
		case <-time.After(10 * time.Millisecond):
		}
	}
	f.w.Close()
	if got := into[Stored](t, f.result(), 201); got.Count != 2 {
		t.Errorf("%+v", got)
	}
}

// A text that is repeated with its numbers is the same message, even without a name.
func TestProducer_aTextWithoutAMessageIDThatComesAgain(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	grace := func(s *setup) {
		s.store.Redis, s.store.Grace, s.api.Look = redis.URL(), 4*time.Second, 100*time.Millisecond
	}
	a, b := serve(t, grace), serve(t, grace)
	const text = "Hello world, all of you"
	c := a.beginning(t, "/v1/sessions/s/chunks", typeText, "Producer-Id: p", "Producer-Epoch: 0", "Producer-Chunk: 0")
	c.send(text[:9])
	eventually(t, "a part", func() bool { return b.get("/v1/sessions/s").status == 200 && len(b.contents("s")) == 1 })
	c.Close()
	again := request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeText, from: io.MultiReader(strings.NewReader(text)), header: numbers("p", 0, 0)}
	first := into[Stored](t, b.do(again), 201)
	again.from = io.MultiReader(strings.NewReader(text))
	if second := into[Stored](t, a.do(again), 200); second != first {
		t.Errorf("%+v and then %+v", first, second)
	}
	begun := time.Now()
	eventually(t, "a time that is longer than any grace", func() bool { return b.get("/v1/sessions/s").status == 200 && time.Since(begun) > 6*time.Second })
	for i, c := range b.chunks("s") {
		if c.Message != first.MessageID || c.Type != []string{"delta", "delta", "done"}[i] {
			t.Errorf("%+v", c)
		}
	}
	other := into[Stored](t, b.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeText, body: "x", header: numbers("p", 0, int64(len(text)+1))}), 201)
	if other.MessageID == first.MessageID {
		t.Error("another text is the same message")
	}
}

// A client that learned what is wrong may continue in another way.
func TestDeath_anUploadThatWasAnsweredIsNone(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.Grace, s.api.Look = 4*time.Second, 100*time.Millisecond })
	bad := func(s string) {
		f := n.upload(t, s, nil)
		f.write(`{"message_id":"m","content":"sesame"}` + "\nno JSON\n")
		f.result().refused(t, 400, "invalid_json")
	}
	bad("goes-on")
	n.append("goes-on", `{"message_id":"m","content":"sesame"}`)
	bad("gives-up")
	eventually(t, "the end of the message", func() bool { all := n.chunks("gives-up"); return all[len(all)-1].Reason == "producer_lost" })
	begun := time.Now()
	eventually(t, "a time that is longer than any grace", func() bool { return n.get("/v1/sessions/goes-on").status == 200 && time.Since(begun) > 6*time.Second })
	if all := n.chunks("goes-on"); len(all) != 2 {
		t.Errorf("%+v", all)
	}
	// A text that was refused entirely has begun nothing.
	n.postText("nothing", "?message_id=m", "\xff", nil).refused(t, 400, "invalid_utf8")
	c := n.beginning(t, "/v1/sessions/nothing/chunks?message_id=n", typeText)
	c.send("\xff")
	c.response(t).refused(t, 400, "invalid_utf8")
	n.cancel("nothing", "n").refused(t, 404, "message_not_found")
	// A stopped upload is left alone.
	f := n.upload(t, "stopped", nil)
	f.write(`{"message_id":"m"}` + "\n")
	eventually(t, "a cancel", func() bool { return n.cancel("stopped", "m").status == 200 })
	f.result().refused(t, 409, "message_cancelled")
	if all := n.chunks("stopped"); len(all) != 2 || all[1].Type != "cancelled" {
		t.Errorf("%+v", all)
	}
}

// An outage that is shorter than the grace period does not affect a silent upload.
func TestDeath_aSilentUploadOutlivesAnOutage(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) {
		s.store.Grace, s.api.Look = 5*time.Second, 50*time.Millisecond
		s.logs = func(l Logs) Logs { f = &faulty{Logs: &deaf{l}}; return f }
	})
	u := n.upload(t, "s", nil)
	u.write(`{"message_id":"m"}` + "\n")
	eventually(t, "a chunk", func() bool { return n.get("/v1/sessions/s").status == 200 })
	f.fail(store.ErrAway)
	select {
	case a := <-u.answer:
		t.Fatalf("%d %s", a.status, a.body)
	case <-time.After(500 * time.Millisecond): // the outage
	}
	f.err.Store(nil)
	select { // only the upload itself keeps it alive
	case a := <-u.answer:
		t.Fatalf("%d %s", a.status, a.body)
	case <-time.After(8 * time.Second):
	}
	u.write(`{"message_id":"m","type":"done"}` + "\n")
	u.w.Close()
	into[Stored](t, u.result(), 201)
	if all := n.chunks("s"); len(all) != 2 {
		t.Errorf("%+v", all)
	}
}

// A look during the last append does not hold the messages again that the append has released.
func TestUpload_aLookBehindItsEndHoldsNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) {
		s.store.Redis = redis.URL()
		s.logs = func(l Logs) Logs {
			return &faulty{Logs: l, append: func(next func() (store.Appended, error)) (store.Appended, error) {
				a, err := next()
				redis.Publish(context.Background(), "chat:uploads", "s")
				time.Sleep(3 * time.Millisecond) // a slow reply
				return a, err
			}}
		}
	})
	for i := range 30 {
		f := n.upload(t, "s", nil)
		f.write(fmt.Sprintf(`{"message_id":"m%d"}`+"\n", i))
		eventually(t, "a chunk", func() bool {
			r := n.get("/v1/sessions/s/chunks")
			return r.status == 200 && n.page("s", "").Last == int64(i+1)
		})
		f.w.Close()
		into[Stored](t, f.result(), 201)
	}
	for name, value := range redis.HGetAll(t.Context(), "chat:session:s").Val() {
		if strings.HasPrefix(name, "m:") && value != "open" {
			t.Errorf("%s is %s", name, value)
		}
	}
}

// An upload does not interrupt a later request on its connection.
func TestUpload_leavesItsConnectionAlone(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	var deleting atomic.Bool
	n := serve(t, func(s *setup) {
		s.store.Redis = redis.URL()
		s.logs = func(l Logs) Logs {
			return &faulty{Logs: l, append: func(next func() (store.Appended, error)) (store.Appended, error) {
				a, err := next()
				if deleting.Load() { // after the last append the session is deleted, and the upload is notified
					_ = l.Delete(context.Background(), "s")
					time.Sleep(rand.N(2 * time.Millisecond)) // or at the moment of its end, or later
				}
				return a, err
			}}
		}
	})
	for range 200 {
		deleting.Store(false)
		c := n.beginning(t, "/v1/sessions/s/chunks", typeNDJSON)
		c.send(line("sesame"))
		eventually(t, "a chunk", func() bool {
			return n.get("/v1/sessions/s").status == 200 && len(redis.PubSubChannels(t.Context(), "chat:uploads").Val()) == 1
		})
		deleting.Store(true)
		c.send(line("sesame"))
		fmt.Fprint(c, "0\r\n\r\n")
		a := c.response(t)
		if a.header.Get("Connection") == "close" {
			c.Close()
			continue // it was notified before its end
		}
		fmt.Fprint(c, "GET /v1/sessions/other/chunks HTTP/1.1\r\nHost: localhost\r\n\r\n")
		c.response(t).refused(t, 404, "session_not_found")
		c.Close()
	}
}

// The number of messages that an upload holds is limited.
func TestUpload_holdsALimitedNumberOfMessages(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	f := n.upload(t, "s", nil)
	const more = 6
	for i := range heldMost + more {
		f.write(fmt.Sprintf(`{"message_id":"m%02d"}`+"\n", i))
	}
	eventually(t, "all", func() bool {
		r := n.get("/v1/sessions/s")
		return r.status == 200 && n.page("s", "?limit=1").Last == heldMost+more
	})
	held := 0
	for name, value := range redis.HGetAll(t.Context(), "chat:session:s").Val() {
		if strings.HasPrefix(name, "m:") && value != "open" {
			held++
		}
	}
	if held != heldMost {
		t.Errorf("%d are held", held)
	}
	f.w.Close()
	into[Stored](t, f.result(), 201)
}

// If something may have been stored at first, a later error does not claim that nothing was.
func TestProducer_anOutcomeThatIsUnknownStaysSo(t *testing.T) {
	t.Parallel()
	var appends atomic.Int64
	n := serve(t, func(s *setup) {
		s.logs = func(l Logs) Logs {
			return &faulty{Logs: l, append: func(func() (store.Appended, error)) (store.Appended, error) {
				if appends.Add(1) == 1 {
					return store.Appended{}, store.ErrOutcomeUnknown
				}
				return store.Appended{}, fmt.Errorf("append: %w", store.ErrAway)
			}}
		}
	})
	n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: "{\"data\":0}", header: numbers("p", 0, 0)}).refused(t, 504, "outcome_unknown")
	if appends.Load() < 3 {
		t.Errorf("it was tried %d times", appends.Load())
	}
}

// A raw viewer that falls behind the kept chunks is broken off, because its format has no reset.
func TestRaw_viewerThatFallsBehindIsBrokenOff(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.HistoryMax, s.sse.Window, s.sse.WriteTimeout = 200, 0, time.Minute })
	big := strings.Repeat("x", 30_000)
	fill := func(count int) {
		for range count {
			n.append("s", `[`+strings.Repeat(`{"raw":"`+big+`"},`, 9)+`{"raw":"`+big+`"}]`)
		}
	}
	fill(10)
	c := n.raw(t)
	_ = c.Conn.(*net.TCPConn).SetReadBuffer(8 << 10)
	fmt.Fprint(c, "GET /v1/sessions/s/stream?format=raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
	if _, err := c.Reader.Peek(100); err != nil {
		t.Fatal(err)
	}
	fill(40) // while it does not read
	res, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err == nil || errors.Is(err, io.EOF) || strings.Contains(string(body), "reset") {
		t.Errorf("it ended with %v after %d bytes", err, len(body))
	}
	var ids []string
	for text := range strings.SplitSeq(string(body), "\n") {
		if id, ok := strings.CutPrefix(text, "id: "); ok {
			ids = append(ids, id)
		}
	}
	for i, id := range ids[:max(len(ids)-1, 0)] { // the last one may be torn
		if id != fmt.Sprint(i+1) {
			t.Fatalf("a hole: %v", ids)
		}
	}
}

// A tag belongs to the current page: after a trim the page is another.
func TestRead_tagOfAPageThatWasTrimmed(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	n.append("s", `[{"content":"sesame"},{"data":0},{"data":0},{"type":"end"}]`)
	a := n.get("/v1/sessions/s/chunks?after=2")
	redis.Del(t.Context(), "chat:history:s") // it expires
	b := n.do(request{method: "GET", path: "/v1/sessions/s/chunks?after=2", header: map[string]string{"If-None-Match": a.header.Get("ETag")}})
	if b.status != 200 || into[pageJSON](t, b, 200).First != 5 {
		t.Errorf("%d %s", b.status, b.body)
	}
	if !slices.Equal(n.contents("s"), nil) {
		t.Error(n.contents("s"))
	}
}
