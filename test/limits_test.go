package test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

// metric returns a value of /metrics.
func (n *node) metric(t *testing.T, name string) int {
	t.Helper()
	_, rest, found := strings.Cut(n.get("/metrics").body, "\n"+name+" ")
	text, _, _ := strings.Cut(rest, "\n")
	number, err := strconv.ParseFloat(text, 64)
	if !found || err != nil {
		t.Fatalf("there is no %s", name)
	}
	return int(number)
}

// from returns a dialer at one of this machine's loopback addresses.
func from(address string) net.Dialer {
	return net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}, Timeout: patience}
}

// whole sends text unchanged on its own connection, and returns everything that comes back.
func whole(t *testing.T, n *node, text string) string {
	t.Helper()
	conn, err := net.Dial("tcp", n.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection goes on: %q", all)
	}
	return string(all)
}

// drip sends a byte now and then until the connection is closed, and returns how long that took.
func drip(t *testing.T, conn net.Conn, begin string) time.Duration {
	t.Helper()
	defer conn.Close()
	begun := time.Now()
	_ = conn.SetDeadline(begun.Add(patience))
	_, err := io.WriteString(conn, begin)
	closed := make(chan struct{})
	go func() { // ends with the connection
		_, _ = io.Copy(io.Discard, conn)
		close(closed)
	}()
	for tick := time.NewTicker(20 * time.Millisecond); err == nil; {
		select {
		case <-tick.C:
			_, err = io.WriteString(conn, "x")
		case <-closed:
			return time.Since(begun)
		}
	}
	<-closed
	return time.Since(begun)
}

// Slow senders time out: a header that drips, a body that drips, a connection without a request. Meanwhile others are
// served.
func TestLimits_slowSendersAreGivenUp(t *testing.T) {
	t.Parallel()
	n := start(t, "-body-timeout", "500ms", "-header-timeout", "500ms", "-idle-timeout", "1h")
	slow := start(t, "-body-timeout", "1h", "-header-timeout", "500ms", "-idle-timeout", "1h")
	var wg sync.WaitGroup
	for i, begin := range []string{
		"", "GET /v1/sessions/s HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
		"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET ", // its second request
		"POST /v1/sessions/s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n",
		"POST /v1/sessions/s/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n",
		"POST /v1/sessions/s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
		"DELETE /v1/sessions/s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
		"PUT /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
	} {
		n := n
		if i < 3 { // a header
			n = slow
		}
		for range 10 {
			wg.Go(func() {
				conn, err := net.Dial("tcp", n.addr)
				if err != nil {
					t.Error(err)
					return
				}
				if took := drip(t, conn, begin); took > slack {
					t.Errorf("it took %v: %q", took, begin)
				}
			})
		}
	}
	for range 20 {
		if a := n.post("/v1/sessions/other/chunks", "application/json", "{\"data\":0}"); a.status != http.StatusCreated {
			t.Errorf("meanwhile: %d %s", a.status, a.body)
		}
	}
	wg.Wait()
	idle := start(t, "-idle-timeout", "500ms")
	for addr, request := range map[string]string{slow.addr: "", idle.addr: "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"} { // and then nothing more
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(conn, request); err != nil {
			t.Error(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Errorf("%q: it ended by %v", request, err)
		}
	}
	n.http.CloseIdleConnections()
	eventually(t, "their connections are gone", func() bool { return n.metric(t, "gapless_connections") == 1 })
}

// A TLS handshake has the timeout of the header.
func TestLimits_aHandshakeThatDoesNotEndIsGivenUp(t *testing.T) {
	t.Parallel()
	cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
	n := start(t, "-tls-cert", cert, "-tls-key", key, "-header-timeout", "300ms", "-body-timeout", "1h")
	for _, hello := range []string{"", "\x16\x03\x01\x02\x00"} { // nothing, and the beginning of a hello
		conn, err := net.Dial("tcp", n.addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(conn, hello); err != nil {
			t.Error(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Errorf("it ended by %v", err)
		}
		_ = conn.Close()
	}
	if a := n.get("/healthz"); a.status != http.StatusOK {
		t.Errorf("%d (%v)", a.status, a.err)
	}
}

// The body timeout is for bodies that are read whole. Uploads and streams may be silent.
func TestLimits_uploadsAndStreamsMayBeSilent(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, append(args, "-body-timeout", "300ms", "-header-timeout", "300ms")...)
		session := newID()
		in, answered := upload(t, n, session)
		v := &viewer{session: session}
		wait := background(t, func() { v.connect(deadline(t), n.addr, nil) })
		for i := range 4 {
			fmt.Fprintf(in, `{"content":"word%d"}`+"\n", i+1)
			eventually(t, "the line is there", func() bool { return v.seen.Load() == int64(i+1) })
			<-time.After(500 * time.Millisecond)
		}
		fmt.Fprintln(in, `{"type":"end"}`)
		_ = in.(io.Closer).Close()
		if a := <-answered; a.status != http.StatusCreated {
			t.Errorf("%d %s (%v)", a.status, a.body, a.err)
		}
		wait()
		v.check(t, n.pages(t, session))
		if v.connections != 1 {
			t.Errorf("%d connections", v.connections)
		}
	})
}

// One address opens five thousand connections. It gets its share, and another address is served. Nothing remains of
// them after they have gone.
func TestLimits_fiveThousandConnectionsOfOneAddress(t *testing.T) {
	t.Parallel()
	n := start(t, "-caller-connections", "4000", "-caller-viewers", "0")
	busy := from("127.0.0.2")
	held, refused := make(chan net.Conn, 5000), make(chan struct{}, 5000)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 100 {
				conn, err := busy.Dial("tcp", n.addr)
				if err != nil {
					refused <- struct{}{}
					continue
				}
				_ = conn.SetDeadline(time.Now().Add(10 * patience)) // for the whole connection
				_, _ = io.WriteString(conn, "GET /v1/sessions/s/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
				if _, err := conn.Read(make([]byte, 1)); err != nil {
					_ = conn.Close()
					refused <- struct{}{}
					continue
				}
				held <- conn
			}
		})
	}
	wg.Wait()
	if len(held) != 4000 || len(refused) != 1000 {
		t.Errorf("%d connections are held, and %d were refused", len(held), len(refused))
	}
	v := &viewer{session: newID(), dialer: from("127.0.0.3")}
	n.append(t, v.session, words(1, 3, `{"type":"end"}`))
	v.connect(deadline(t), n.addr, nil)
	v.check(t, n.pages(t, v.session))
	if got := n.metric(t, `gapless_refused_total{limit="caller-connections"}`); got != 1000 {
		t.Errorf("%d refusals were counted", got)
	}
	if said := strings.Count(n.log.String(), "a limit is met"); said != 1 {
		t.Errorf("the log says it %d times", said)
	}
	close(held)
	for conn := range held {
		_ = conn.Close()
	}
	n.http.CloseIdleConnections()
	eventually(t, "their places are free", func() bool { return n.metric(t, "gapless_connections") == 1 && n.metric(t, "gapless_viewers") == 0 })
	again := &viewer{session: v.session, dialer: busy}
	again.connect(deadline(t), n.addr, nil)
	again.check(t, n.pages(t, v.session))
}

// A viewer that was refused because of a limit reconnects, as its EventSource does, and loses nothing.
func TestLimits_aViewerThatWasRefusedComesBack(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, append(args, "-caller-viewers", "1")...)
		session := newID()
		n.append(t, session, words(1, 3))
		first, second := &viewer{session: session}, &viewer{session: session}
		ctx, cancel := context.WithCancel(deadline(t))
		wait := background(t, func() { first.connect(ctx, n.addr, nil) })
		eventually(t, "the first one has all", func() bool { return first.seen.Load() == 3 })
		if how := second.connect(deadline(t), n.addr, nil); how != aborted || len(second.chunks) > 0 || len(second.faults) > 0 {
			t.Errorf("it was refused by %s: %q", how, second.faults)
		}
		if after, err := strconv.Atoi(second.retry); err != nil || after < 10_000 || after > 30_000 {
			t.Errorf("it is to come back after %q ms", second.retry)
		}
		cancel()
		wait()
		eventually(t, "the place is free", func() bool { return n.metric(t, "gapless_viewers") == 0 })
		n.append(t, session, words(4, 2, `{"type":"end"}`))
		second.follow(deadline(t), func() string { return n.addr }, nil)
		second.check(t, n.pages(t, session))
	})
}

// A node whose descriptors are nearly used up by strangers still reaches Redis, and serves its connected clients.
func TestLimits_descriptorsAreLeftForRedis(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	script := filepath.Join(t.TempDir(), "few")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nulimit -n 200\nexec '"+binary+"' \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	n := startProgram(t, script, "-redis", redis.URL())
	session := newID()
	n.append(t, session, words(1, 2)) // its connection stands from now on
	var held []net.Conn
	for range 400 {
		conn, err := net.Dial("tcp", n.addr)
		if err != nil {
			continue
		}
		held = append(held, conn)
	}
	eventually(t, "the node is full", func() bool {
		return n.metric(t, `gapless_refused_total{limit="connections"}`) > 100
	})
	redis.Kill() // all connections to it must be made again; its data is lost
	redis.Start()
	n.append(t, session, words(1, 4))
	if log := n.log.String(); strings.Contains(log, "too many open files") {
		t.Error("it ran out of descriptors")
	}
	for _, conn := range held {
		_ = conn.Close()
	}
	v := &viewer{session: session}
	eventually(t, "others are served again", func() bool {
		return v.connect(deadline(t), n.addr, func(event) bool { return v.cursor == 1_000_004 }) == cut
	})
}

// Requests that exceed a size limit get an error that names it, and store nothing.
func TestLimits_sizesAreSaid(t *testing.T) {
	t.Parallel()
	n := start(t, "-body-max", "64KiB", "-batch-max", "10", "-url-max", "1KiB", "-header-max", "4KiB", "-chunk-max", "8KiB", "-bodies", "192KiB", "-caller-bodies", "192KiB")
	const path = "/v1/sessions/s/chunks"
	long := func(bytes int) string { return strings.Repeat("x", bytes) }
	for _, c := range []struct {
		path, kind, body, cookie string
		status                   int
		code                     string
	}{
		{path + "?x=" + long(1100), "application/json", "{\"data\":0}", "", 414, "url_too_long"},
		{path, "application/json", "{\"data\":0}", long(5000), 431, "header_too_large"},
		{path, "application/json", "{\"data\":0}", long(20_000), 431, ""},
		{path, "application/json", `{"content":"` + long(70_000) + `"}`, "", 413, "body_too_large"},
		{path, "application/json", "[" + strings.Repeat(`{"data":0},`, 10) + "{}]", "", 413, "batch_too_large"},
		{path, "application/json", `{"content":"` + long(9000) + `"}`, "", 413, "chunk_too_large"},
		{path, "application/x-ndjson", `{"content":"` + long(9000) + `"}` + "\n", "", 413, "chunk_too_large"},
		{path, "application/x-ndjson", long(1 << 20), "", 413, "chunk_too_large"},
		{path, "text/event-stream", "data: " + long(1<<20), "", 413, "chunk_too_large"},
		{path, "application/json", `{"data":` + strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000) + "}", "", 400, "chunk_too_deep"},
		{path, "application/json", `{"data":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + "}", "", 400, "chunk_too_deep"},
		{"/v1/sessions/" + long(129), "application/json", "", "", 400, "invalid_session_id"},
		{path + "?message_id=" + long(257), "application/json", "{\"data\":0}", "", 400, "invalid_parameter"},
	} {
		r, err := http.NewRequest("POST", "http://"+n.addr+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", c.kind)
		if c.cookie != "" {
			r.Header.Set("Cookie", c.cookie)
		}
		res, err := n.http.Do(r)
		if err != nil {
			t.Errorf("%.60s: %v", c.path, err)
			continue
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != c.status || !strings.Contains(string(body), c.code) {
			t.Errorf("%.60s %.60s: %d %s, not %d %s", c.path, c.body, res.StatusCode, body, c.status, c.code)
		}
	}
	if a := n.get("/v1/sessions/s"); !strings.Contains(a.body, `"last_seq":0`) {
		t.Errorf("something was stored: %s", a.body)
	}
}

// Requests whose end is ambiguous are refused, and their connection is closed: nothing after them is served.
func TestLimits_nothingIsSmuggled(t *testing.T) {
	t.Parallel()
	n := start(t)
	const second = "POST /v1/sessions/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
	for _, header := range []string{
		"Content-Length: 2\r\nContent-Length: 3",
		"Content-Length: 2, 3",
		"Content-Length: +2",
		"Content-Length: -1",
		"Content-Length: 0x2",
		"Content-Length: 2 3",
		"Content-Length : 2",
		"Transfer-Encoding: chunked, identity",
		"Transfer-Encoding: identity, chunked",
		"Transfer-Encoding: xchunked",
		"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding : chunked",
		"Transfer-Encoding:\x0bchunked",
		"X: a\rb",
		"X: a\x00b",
		"X\x00: a",
		"X Y: a",
		": a",
		"no colon",
		"Host: other",
	} {
		all := whole(t, n, "POST /v1/sessions/first/chunks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+header+"\r\n\r\n[]"+second)
		if answers := strings.Count(all, "HTTP/1.1 "); answers != 1 || !strings.HasPrefix(all, "HTTP/1.1 4") && !strings.HasPrefix(all, "HTTP/1.1 501") {
			t.Errorf("%q: %d answers: %.200q", header, answers, all)
		}
	}
	for _, request := range []string{
		"POST /v1/sessions/first HTTP/1.1\r\n\r\n", "POST /v1/sessions/first\r\nHost: localhost\r\n\r\n", "POST /v1/sessions/first HTTP/1.1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"POST  /v1/sessions/first HTTP/1.1\r\nHost: localhost\r\n\r\n", "POST /v1/sessions/first HTTP/9.9\r\nHost: localhost\r\n\r\n",
		"POST /v1/sessions/first HTTP/1.1\r\n Host: localhost\r\nHost: localhost\r\n\r\n",
	} {
		if all := whole(t, n, request+second); strings.Count(all, "HTTP/1.1 ") != 1 || !strings.HasPrefix(all, "HTTP/1.1 4") && !strings.HasPrefix(all, "HTTP/1.1 5") {
			t.Errorf("%q: %.200q", request, all)
		}
	}
	for _, id := range []string{"first", "smuggled"} {
		if a := n.get("/v1/sessions/" + id); a.status != http.StatusNotFound {
			t.Errorf("%s was made: %s", id, a.body)
		}
	}

	// If both lengths are present, chunked wins (RFC 9112, section 6.3), and a folded line is one line.
	answer := func(header, body string) string {
		return whole(t, n, "POST /v1/sessions/both/chunks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"+header+"\r\n\r\n"+body)
	}
	if all := answer("Content-Length: 1\r\nTransfer-Encoding: chunked", "a\r\n{\"data\":0}\r\n0\r\n\r\n"); !strings.HasPrefix(all, "HTTP/1.1 201") {
		t.Errorf("%q", all)
	}
	if all := answer("X: a\r\n Content-Length: 1\r\nContent-Length: 10", "{\"data\":0}"); !strings.HasPrefix(all, "HTTP/1.1 201") {
		t.Errorf("%q", all)
	}
}

// Line breaks in any input never end a line of a response or of a stream.
func TestLimits_lineBreaksEndNoLine(t *testing.T) {
	t.Parallel()
	n := start(t, "-trusted-proxies", "127.0.0.1")
	session := newID()
	const bad = "%0d%0aX-Injected:%20yes%0d%0a%0d%0aevent:%20evil"
	for _, path := range []string{
		"/v1/sessions/a" + bad, "/v1/sessions/" + session + "/stream?after=" + bad, "/v1/sessions/" + session + "/stream?ticket=" + bad,
		"/v1/sessions/" + session + "/stream?lastEventId=" + bad + "&until=done", "/v1/sessions/" + session + "/chunks?limit=" + bad, "/" + bad,
	} {
		all := make(chan string, 1)
		v := background(t, func() {
			conn, err := net.Dial("tcp", n.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 1.2.3.4%s\r\nConnection: close\r\n\r\n", path, bad)
			r := bufio.NewReader(conn)
			res, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Error(err)
				return
			}
			first := make([]byte, 4<<10)
			k, _ := res.Body.Read(first)
			all <- fmt.Sprint(res.Header, string(first[:k]))
		})
		v()
		if said := <-all; strings.Contains(said, "X-Injected:[") || strings.Contains(said, "\nevent: evil") || strings.Contains(said, "\nX-Injected") {
			t.Errorf("%s: %s", path, said)
		}
	}
	a := n.post("/v1/sessions/"+session+"/chunks?role="+bad+"&message_id="+bad, "application/json", `{"content":"a\r\n\r\nevent: evil\ndata: x\n\n","x\r\ny":1}`)
	if a.status != http.StatusCreated {
		t.Fatalf("%d %s", a.status, a.body)
	}
	n.append(t, session, `{"type":"end"}`)
	v := &viewer{session: session}
	v.connect(deadline(t), n.addr, nil)
	v.check(t, n.pages(t, session))
}

func TestLimits_mistakesAreReportedAtTheStart(t *testing.T) {
	t.Parallel()
	reported(t, []string{"GAPLESS_CALLER_CALLS=-1"}, []string{
		"-connections", "-1", "-caller-viewers", "-2", "-trusted-proxies", "10.0.0.0/8,0.0.0.0/0,proxy", "-url-max", "1B", "-header-max", "1B", "-body-max", "1B", "-batch-max", "0",
		"-batch-bytes", "1B", "-history-bytes", "1B", "-caller-stored", "-1B", "-header-timeout", "0s", "-body-timeout", "0s", "-idle-timeout", "-1s", "-feeds", "-1", "-session-names", "0",
	}, []string{"-connections", "-caller-viewers", "-caller-calls", "-trusted-proxies", "0.0.0.0/0 would trust everybody", `"proxy" is not an address`, "-url-max", "-header-max", "-body-max", "-batch-max",
		"-header-timeout", "-body-timeout", "-idle-timeout", "-feeds", "-session-names", "-batch-bytes", "-history-bytes", "-caller-stored"})
	reported(t, nil, []string{"-bodies", "1MiB", "-caller-bodies", "2MiB"}, []string{"-bodies: 1048576 bytes are less than one body may need, three times 8388608 (-body-max)", "-caller-bodies"})
}
