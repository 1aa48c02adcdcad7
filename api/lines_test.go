package api

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

func line(content string) string { return fmt.Sprintf("{\"content\":%q}\n", content) }

func TestLines_endInAnyWayThatLinesEnd(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for i, body := range []string{
		"{\"content\":\"a\"}\n{\"content\":\"b\"}\n",
		"{\"content\":\"a\"}\n{\"content\":\"b\"}",
		"{\"content\":\"a\"}\r\n{\"content\":\"b\"}\r\n",
		"\n\n{\"content\":\"a\"}\n\r\n  \n{\"content\":\"b\"}\n\n\n",
		" {\"content\" : \"a\"} \n\t{\"content\":\"b\"}\r",
	} {
		s := fmt.Sprint("s", i)
		if got := into[Stored](t, n.post("/v1/sessions/"+s+"/chunks", typeNDJSON, body), 201); got.Count != 2 || got.First != 1 || got.Last != 2 {
			t.Errorf("%q: %+v", body, got)
		}
		if got := n.contents(s); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("%q: %q", body, got)
		}
	}
}

func TestLines_tenThousandInOneRequest(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	const many = 10_000
	var body strings.Builder
	for i := range many {
		body.WriteString(line("sesame " + strconv.Itoa(i)))
	}
	got := into[Stored](t, n.post("/v1/sessions/s/chunks", typeNDJSON, body.String()), 201)
	if got.First != 1 || got.Last != many || got.Count != many {
		t.Fatalf("%+v", got)
	}
	if kept := redis.LLen(t.Context(), "chat:history:s").Val(); kept != many {
		t.Errorf("%d chunks in the list", kept)
	}
	for i, content := range n.contents("s") {
		if content != "sesame "+strconv.Itoa(i) {
			t.Fatalf("chunk %d says %q", i+1, content)
		}
	}
}

// flow is an upload that the test writes line by line.
type flow struct {
	t      *testing.T
	w      *io.PipeWriter
	answer chan answer
	failed chan error
}

func (n *node) upload(t *testing.T, session string, header map[string]string) *flow {
	t.Helper()
	return n.uploadWith(t, session, "", header)
}

func (n *node) uploadWith(t *testing.T, session, query string, header map[string]string) *flow {
	t.Helper()
	r, w := io.Pipe()
	f := &flow{t, w, make(chan answer, 1), make(chan error, 1)}
	q := n.new(request{method: "POST", path: "/v1/sessions/" + session + "/chunks" + query, kind: typeNDJSON, from: r, header: header})
	ctx, cancel := storetest.Watch(q.Context(), t)
	t.Cleanup(cancel)
	go func() { // ends with the response, or by its context
		a, err := n.send(q.WithContext(ctx))
		_ = r.CloseWithError(io.ErrClosedPipe)
		if err != nil {
			f.failed <- err
			return
		}
		f.answer <- a
	}()
	return f
}

func (f *flow) write(text string) {
	f.t.Helper()
	if _, err := io.WriteString(f.w, text); err != nil {
		f.t.Fatalf("write: %v", err)
	}
}

func (f *flow) result() answer {
	f.t.Helper()
	select {
	case a := <-f.answer:
		return a
	case err := <-f.failed:
		f.t.Fatalf("the upload failed: %v", err)
	case <-time.After(patience):
		f.t.Fatal("the upload is not answered")
	}
	panic("not reached")
}

func TestLines_areStoredAndAnnouncedAsTheyArrive(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	v := n.watch("s", "")
	f := n.upload(t, "s", map[string]string{"Stream-Closed": "true"})
	f.write(line("sesame 1"))
	v.welcome()
	for i := range 5 {
		if got := v.take(int64(i), 1)[0]; got != fmt.Sprint("sesame ", i+1) {
			t.Fatalf("%q", got)
		}
		half := line(fmt.Sprint("sesame ", i+2)) // a line is stored when it is whole
		f.write(half[:5])
		f.write(half[5:])
	}
	f.w.Close()
	if got := into[Stored](t, f.result(), 201); got.Count != 7 || got.Last != 7 {
		t.Errorf("%+v", got)
	}
	v.take(5, 2)
	v.end(true)
}

// The last line of a broken body is not stored without its line end: it may be incomplete.
func TestLines_tornByABrokenConnectionAreNotStoredAndEarlierOnesAre(t *testing.T) {
	t.Parallel()
	for name, breakOff := range map[string]func(*net.TCPConn){
		"closed":     func(c *net.TCPConn) { _ = c.Close() },
		"half":       func(c *net.TCPConn) { _ = c.CloseWrite() },
		"by a reset": func(c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := serve(t, nil)
			for i, torn := range []string{`{"content":"sesame 3"}`, `{"content":"ses`, `{}`} {
				s := fmt.Sprint("s", i)
				c := n.raw(t)
				fmt.Fprintf(c, "POST /v1/sessions/%s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n", s)
				for _, text := range []string{line("sesame 1") + line("sesame 2"), torn} {
					fmt.Fprintf(c, "%x\r\n%s\r\n", len(text), text)
				}
				eventually(t, "two chunks", func() bool { a := n.get("/v1/sessions/" + s); return a.status == 200 })
				breakOff(c.Conn.(*net.TCPConn))
				if name == "half" {
					res, err := http.ReadResponse(c.Reader, nil)
					if err != nil {
						t.Fatal(err)
					}
					body, _ := io.ReadAll(res.Body)
					p := answer{res.StatusCode, res.Header, body}.refused(t, 400, "body_broken")
					if p.Stored == nil || p.Stored.Count != 2 {
						t.Errorf("%s", body)
					}
					q := n.new(request{method: "POST", path: "/v1/sessions/" + s + "/chunks", kind: typeNDJSON})
					theContract().Judge(t, q, []byte("{}"), &http.Response{StatusCode: res.StatusCode, Header: res.Header, Request: q}, body)
				}
				// The node has noticed when no upload is left in a handler.
				eventually(t, "the request's end", func() bool { return n.active.Load() == 0 })
				if got := n.contents(s); !slices.Equal(got, []string{"sesame 1", "sesame 2"}) {
					t.Errorf("torn %q: %q", torn, got)
				}
			}
		})
	}
}

// conn is a connection on which the test writes HTTP by hand.
type conn struct {
	net.Conn
	*bufio.Reader
}

func (c conn) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func (n *node) raw(t *testing.T) conn {
	t.Helper()
	c, err := net.Dial("tcp", n.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return conn{c, bufio.NewReader(c)}
}

func TestLines_badOneInTheMiddleOfAnUploadThatGoesOnIsAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.ChunkMax = 2 << 10 })
	for name, c := range map[string]struct {
		bad    string
		status int
		code   string
	}{
		"no JSON":                          {"sesame\n", 400, "invalid_json"},
		"seq":                              {"{\"seq\":1}\n", 400, "reserved_member"},
		"too long, and without an end yet": {strings.Repeat("x", 8<<10), 413, "chunk_too_large"},
	} {
		t.Run(name, func(t *testing.T) {
			session := strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), ",", "")
			f := n.upload(t, session, nil)
			f.write("\n" + line("sesame 1"))
			f.write("\r\n" + line("sesame 2") + "\n")
			eventually(t, "two chunks", func() bool {
				a := n.get("/v1/sessions/" + session)
				return a.status == 200 && into[sessionJSON](t, a, 200).Last == 2
			})
			f.write(c.bad)
			p := f.result().refused(t, c.status, c.code) // the upload has not ended
			if p.Chunk == nil || *p.Chunk != 2 {
				t.Errorf("chunk %v", p.Chunk)
			}
			if p.Stored == nil || p.Stored.Count != 2 || p.Stored.First != 1 || p.Stored.Last != 2 || p.Stored.Epoch == "" {
				t.Errorf("stored %+v", p.Stored)
			}
			if got := n.contents(session); !slices.Equal(got, []string{"sesame 1", "sesame 2"}) {
				t.Errorf("%q", got)
			}
		})
	}
}

// The response must reach a client that keeps writing. Closing a socket with unread data resets it.
func TestLines_refusalReachesAClientThatGoesOnWriting(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	lost := 0
	const times = 30
	for i := range times {
		c := n.raw(t)
		fmt.Fprintf(c, "POST /v1/sessions/s%d/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n", i)
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() { // ended by stop, or by the connection's end
			defer close(stopped)
			text := line("sesame")
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				default:
				}
				if k == 20 {
					text = "no JSON\n"
				}
				if _, err := fmt.Fprintf(c, "%x\r\n%s\r\n", len(text), text); err != nil {
					return
				}
			}
		}()
		time.Sleep(time.Duration(i%5) * time.Millisecond) // a client that reads slowly
		res, err := http.ReadResponse(c.Reader, nil)
		var body []byte
		if err == nil {
			body, err = io.ReadAll(res.Body)
		}
		close(stop)
		c.Close()
		<-stopped
		if err != nil {
			lost++
			t.Logf("round %d: %v", i, err)
			continue
		}
		if p := (answer{res.StatusCode, res.Header, body}).refused(t, 400, "invalid_json"); p.Stored == nil || p.Stored.Count != 20 {
			t.Errorf("%s", body)
		}
		if !res.Close {
			t.Error("the connection is to be used again")
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d refusals were lost", lost, times)
	}
}

// The lines of one packet are appended together, with the same result as if each had come alone.
func TestLines_beforeARefusedOneStayAlsoWhenAllCameTogether(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for i, c := range []struct {
		body         string
		code         string
		chunk, count int
	}{
		{line("sesame 1") + "{\"type\":\"done\",\"message_id\":\"m\"}\n{\"message_id\":\"m\"}\n" + line("sesame 2"), "message_ended", 2, 2},
		{line("sesame 1") + "{\"type\":\"end\"}\n" + line("sesame 2"), "session_ended", 2, 2},
		{line("sesame 1") + "no JSON\n" + line("sesame 2"), "invalid_json", 1, 1},
	} {
		s := fmt.Sprint("s", i)
		a := n.post("/v1/sessions/"+s+"/chunks", typeNDJSON, c.body)
		p := a.refused(t, a.status, c.code)
		if p.Chunk == nil || *p.Chunk != c.chunk {
			t.Errorf("%s: chunk %v", c.code, p.Chunk)
		}
		if p.Stored == nil || p.Stored.Count != c.count {
			t.Errorf("%s: stored %+v, not the %d lines before it", c.code, p.Stored, c.count)
		}
	}
}

func TestLines_ofAnUploadUnderWayAreRefusedWhenTheSessionIsDeleted(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, anew := range []bool{false, true} {
		s := fmt.Sprint("s", anew)
		f := n.upload(t, s, nil)
		f.write(line("sesame 1"))
		eventually(t, "a chunk", func() bool { return n.get("/v1/sessions/"+s).status == 200 })
		if a := n.do(request{method: "DELETE", path: "/v1/sessions/" + s}); a.status != 204 {
			t.Fatal(a.status)
		}
		if anew { // later chunks are not the upload's, either
			n.append(s, `{"content":"sesame, anew"}`)
		}
		p := f.result().refused(t, 409, "session_deleted") // at once, not at its next line
		if p.Stored == nil || p.Stored.Count != 1 || p.Stored.Last != 1 {
			t.Errorf("%+v", p.Stored)
		}
		if !anew {
			n.get("/v1/sessions/"+s).refused(t, 404, "session_not_found")
		} else if got := n.contents(s); !slices.Equal(got, []string{"sesame, anew"}) {
			t.Errorf("%q", got)
		}
	}
}

func TestLines_ofAnUploadUnderWayEndWithTheNode(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	f := n.upload(t, "s", map[string]string{"Stream-Closed": "true"})
	f.write(line("sesame 1"))
	eventually(t, "a chunk", func() bool { return n.get("/v1/sessions/s").status == 200 })
	n.api.Drain() // draining alone lets it continue
	f.write(line("sesame 2"))
	eventually(t, "two chunks", func() bool { return n.page("s", "").Last == 2 })
	n.api.End()
	a := f.result()
	if p := a.refused(t, 503, "draining"); p.Stored == nil || p.Stored.Count != 2 || a.header.Get("Retry-After") == "" {
		t.Errorf("%+v", p)
	}
	if p := n.page("s", ""); p.Last != 2 || p.Ended {
		t.Errorf("%+v", p)
	}
}

func TestLines_thatRedisRefusesInTheMiddleSayWhatIsStored(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) {
		s.api.UploadPatience = 100 * time.Millisecond
		s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f }
	})
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{{store.ErrAway, 503, "redis_away"}, {store.ErrOutcomeUnknown, 504, "outcome_unknown"}} {
		f.err.Store(nil)
		u := n.upload(t, c.code, nil)
		u.write(line("sesame 1"))
		eventually(t, "a chunk", func() bool { return n.get("/v1/sessions/"+c.code).status == 200 })
		f.fail(c.err)
		u.write(line("sesame 2"))
		if p := u.result().refused(t, c.status, c.code); p.Stored == nil || p.Stored.Count != 1 || p.Stored.Last != 1 {
			t.Errorf("%+v", p)
		}
	}
}

// An upload cannot be repeated like a request, so it waits for some time for a Redis that is away, and so does its
// sender.
func TestLines_waitForARedisThatIsAwayForAWhile(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) { s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f } })
	u := n.upload(t, "s", nil)
	u.write(line("sesame 1"))
	eventually(t, "a chunk", func() bool { return n.get("/v1/sessions/s").status == 200 })
	f.fail(store.ErrAway)
	u.write(line("sesame 2"))
	select {
	case a := <-u.answer:
		t.Fatalf("%d %s", a.status, a.body)
	case <-time.After(300 * time.Millisecond): // the outage
	}
	f.err.Store(nil)
	u.w.Close()
	if got := into[Stored](t, u.result(), 201); got.Count != 2 || got.Last != 2 {
		t.Errorf("%+v", got)
	}
}

// A refused ending after the body is not an error of any chunk of the body.
func TestLines_endThatIsRefusedBehindTheBodyBlamesNoneOfItsChunks(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	a := n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeNDJSON, body: "{\"data\":0}\n{\"type\":\"end\"}\n", header: map[string]string{"Stream-Closed": "true"}})
	p := a.refused(t, 409, "session_ended")
	if p.Stored == nil || p.Stored.Count != 2 || p.Chunk != nil && *p.Chunk < 2 {
		t.Errorf("chunk %v, stored %+v", *p.Chunk, p.Stored)
	}
}
