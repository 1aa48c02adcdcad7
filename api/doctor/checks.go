package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const unbuffer = "turn the buffering of answers off for …/stream. nginx: proxy_buffering off, and no proxy_ignore_headers X-Accel-Buffering; " +
	"Apache: flushpackets=on; a CDN: no caching, no transformation, or a way around it. deploy/ has configurations that work"

const oneRedis = "let all nodes have the same -redis; with -redis embedded:DIR there can be only one node"

// events checks whether the first bytes and then a trickle of events come at once.
//
// It returns false if the other checks would only repeat its finding.
func (d *doctor) events(ctx context.Context) bool {
	const count = 5
	s := d.view(ctx, d.client, 0)
	defer s.close()
	begun := func() bool { return len(s.marks) > 0 }
	switch {
	case s.until(ctx, d.Late, begun):
		s.look(func() { d.ok("first bytes", "they come %v after the request", round(s.marks[0].at.Sub(s.asked))) })
	case s.over():
		d.problem("first bytes", fmt.Sprintf("the stream ended before its first event: %v", s.err), whyEnded(s))
		return false
	default:
		d.problem("first bytes", fmt.Sprintf("none have come within %v of the request", d.Late), unbuffer)
	}

	d.Progress("sending events, one at a time")
	acked := map[int64]time.Time{}
	var skew time.Duration
	for number := int64(1); number <= count; number++ {
		sent := time.Now()
		seq, at, err := d.append(ctx, `{"content":"Does it stream? "}`)
		if err != nil {
			d.problem("events", fmt.Sprintf("an append failed: %v", err), "look at the server's log, and whether the proxy passes POST on")
			return false
		}
		if acked[seq] = at; seq != number {
			d.problem("nodes", fmt.Sprintf("append number %d became chunk %d: appends do not reach the same log", number, seq), oneRedis)
			return false
		}
		if s.came(ctx, seq, d.Late) {
			s.look(func() { m, _ := s.chunk(seq); skew = time.UnixMilli(m.TS).Sub(sent.Add(at.Sub(sent) / 2)) })
		}
		pause(ctx, 200*time.Millisecond)
	}
	all := func() bool {
		for seq := range acked {
			if _, ok := s.chunk(seq); !ok {
				return false
			}
		}
		return true
	}
	if !s.until(ctx, d.Patience, all) && !s.over() {
		d.fill(ctx)
		s.until(ctx, d.Patience, all)
	}
	var worst time.Duration
	late, lost := 0, 0
	s.look(func() {
		for seq, at := range acked {
			m, ok := s.chunk(seq)
			if !ok {
				lost++
				continue
			}
			if took := m.at.Sub(at); took > d.Late {
				late++
			}
			worst = max(worst, m.at.Sub(at))
		}
	})
	switch {
	case lost > 0 && s.over():
		d.problem("events", fmt.Sprintf("the stream ended after %v, with %d of %d events missing: %v", round(s.ended.Sub(s.asked)), lost, count, s.err), whyEnded(s))
		return false
	case lost > 0:
		d.problem("events", fmt.Sprintf("%d of %d events did not come within %v, and not when %s more had followed", lost, count, d.Patience, fillSize), unbuffer)
	case late > 0 && d.filled:
		d.problem("events", fmt.Sprintf("%d of %d events were held back, the longest for %v: until %s more had followed. They are collected in a buffer", late, count, round(worst), fillSize), unbuffer)
	case late > 0:
		d.problem("events", fmt.Sprintf("%d of %d events were held back, the longest for %v", late, count, round(worst)), unbuffer)
	default:
		d.ok("events", "each comes at once, %v behind its acknowledgement at most", round(worst))
	}
	if far := 5 * time.Second; skew > far || skew < -far {
		d.problem("clock", fmt.Sprintf("Redis's clock differs from this one by %v", round(skew)), "keep the clocks by NTP, on both sides: tokens expire by them")
	}
	return true
}

func (s *stream) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended.IsZero()
}

// whyEnded returns the remedy for a stream that ended.
func whyEnded(s *stream) string {
	switch {
	case errors.Is(s.err, errNoStream) && s.response != nil:
		return whyStatus(s.response)
	case s.response == nil:
		return whyNot(s.err)
	}
	return "something on the way bounds how long an answer may take: let it be without bound for …/stream"
}

// compression checks whether the stream is compressed if the client accepts that, as browsers do.
func (d *doctor) compression(ctx context.Context) {
	const check = "compression"
	s := d.view(ctx, d.client, 0, "Accept-Encoding", "gzip, deflate, br, zstd")
	defer s.close()
	begun := func() bool { return s.response != nil }
	if !s.until(ctx, d.Late, begun) {
		d.fill(ctx)
		s.until(ctx, d.Patience, begun)
	}
	s.look(func() {
		switch {
		case s.response == nil:
			d.problem(check, "it cannot be told: no answer came", unbuffer)
		case s.response.Header.Get("Content-Encoding") != "":
			d.problem(check, fmt.Sprintf("the stream is compressed on its way (%s): events may wait until there is enough of them to compress", s.response.Header.Get("Content-Encoding")),
				"compress everything but text/event-stream. nginx: gzip off for …/stream, or no text/event-stream among gzip_types; Caddy: no encode for it; Apache: SetEnv no-gzip 1")
		default:
			d.ok(check, "the stream is not compressed")
		}
	})
}

// upload checks whether a line of an unfinished body is stored when it is sent.
func (d *doctor) upload(ctx context.Context) {
	const check = "uploads"
	up := d.begin(ctx)
	defer up.close()
	before, sent := d.last, time.Now()
	up.line()
	for time.Since(sent) < d.Late && !d.has(ctx, before+1) {
		pause(ctx, 20*time.Millisecond)
	}
	took := time.Since(sent)
	if took < d.Late {
		d.ok(check, "a line of an upload that goes on is stored after %v", round(took))
		d.last = before + 1
		return
	}
	status, answer, err := up.end()
	switch {
	case err != nil:
		d.problem(check, fmt.Sprintf("an upload broke off: %v", err), "let bodies of any size and duration pass for …/chunks. nginx: client_max_body_size 0, client_body_timeout 1h")
	case status != http.StatusCreated:
		d.problem(check, fmt.Sprintf("an upload was answered with %d: %.300s", status, answer), "let bodies of any size, and without a length, pass for …/chunks")
	default:
		d.last = before + 1
		d.problem(check, fmt.Sprintf("a line of an upload was not stored within %v, and was when the upload had ended: the body is held back until it is whole", d.Late),
			"turn the buffering of requests off for …/chunks. nginx: proxy_request_buffering off, proxy_http_version 1.1")
	}
}

// has reports whether the log has a chunk.
func (d *doctor) has(ctx context.Context, seq int64) bool {
	response, answer, err := d.call(ctx, "GET", d.path("/chunks")+fmt.Sprintf("?after=%d&limit=1", seq-1), "")
	return err == nil && response.StatusCode == http.StatusOK && strings.Contains(string(answer), fmt.Sprintf(`"seq":%d,`, seq))
}

// uploading is an unfinished upload.
type uploading struct {
	in     *io.PipeWriter
	done   chan struct{}
	ended  time.Time
	status int
	answer string
	err    error
}

// begin begins an upload. The caller must call close.
func (d *doctor) begin(ctx context.Context) *uploading {
	body, in := io.Pipe()
	up := &uploading{in: in, done: make(chan struct{})}
	r := d.request(ctx, "POST", d.path("/chunks"), body)
	r.Header.Set("Content-Type", "application/x-ndjson")
	client := d.HTTP() // a separate connection
	go func() {        // ends with the request, which close ends; close waits for it
		defer close(up.done)
		defer client.CloseIdleConnections()
		response, err := client.Do(r)
		if err == nil {
			var answer []byte
			answer, err = io.ReadAll(io.LimitReader(response.Body, 64<<10))
			_ = response.Body.Close()
			up.status, up.answer = response.StatusCode, string(answer)
		}
		up.err, up.ended = err, time.Now()
		_ = body.CloseWithError(io.ErrClosedPipe) // nobody will read another line
	}()
	return up
}

func (u *uploading) line() { _, _ = io.WriteString(u.in, "{\"content\":\"Does it go up? \"}\n") }

func (u *uploading) end() (status int, answer string, err error) {
	_ = u.in.Close()
	<-u.done
	return u.status, u.answer, u.err
}

func (u *uploading) close() { _, _, _ = u.end() }

// silence listens to a stream with nothing but heartbeats, next to an upload that sends nothing.
func (d *doctor) silence(ctx context.Context) {
	s := d.view(ctx, d.client, d.last)
	defer s.close()
	up := d.begin(ctx)
	defer up.close()
	quiet := time.Now()
	for step := min(d.Idle, 5*time.Second); ; {
		rest := d.Idle - time.Since(quiet)
		if rest <= 0 || s.over() {
			break
		}
		d.Progress(fmt.Sprintf("listening in silence, %v to go", rest.Round(time.Second)))
		s.until(ctx, min(step, rest), func() bool { return false })
		if ctx.Err() != nil {
			return
		}
	}
	var beats []time.Time
	s.look(func() {
		for i, m := range s.marks {
			if m.name == ":" && i > 0 { // the first comment begins the response
				beats = append(beats, m.at)
			}
		}
	})
	longest, from := time.Duration(0), quiet
	for _, at := range append(beats, time.Now()) {
		longest, from = max(longest, at.Sub(from)), at
	}
	switch {
	case s.over() && len(beats) == 0:
		d.problem("silence", fmt.Sprintf("the stream was cut after %v without a byte: %v", round(s.ended.Sub(quiet)), s.err),
			"let idle connections live longer than a heartbeat (-heartbeat 15s), a minute or more. nginx: proxy_read_timeout; HAProxy: timeout server, timeout client; AWS ALB: idle timeout; or make -heartbeat shorter")
	case s.over():
		d.problem("silence", fmt.Sprintf("the stream was cut after %v, although %d heartbeats had come: %v", round(s.ended.Sub(quiet)), len(beats), s.err),
			"something on the way bounds how long an answer may take, however lively it is: let it be without bound for …/stream. Did a node stop, or the proxy reload, just now?")
	case len(beats) == 0:
		d.problem("silence", fmt.Sprintf("no heartbeat came within %v", round(d.Idle)), "heartbeats come each -heartbeat, 15s by default: listen longer with -idle if yours is longer; else "+unbuffer)
	default:
		d.ok("silence", "the stream outlives %v, with %d heartbeats and %v of silence at most", round(d.Idle), len(beats), round(longest))
	}

	select {
	case <-up.done:
		d.problem("silent upload", fmt.Sprintf("an upload that said nothing was ended after %v: %d %.200s %v", round(up.ended.Sub(quiet)), up.status, up.answer, errText(up.err)),
			"let bodies pause for as long as models think, for …/chunks. nginx: client_body_timeout 1h; HAProxy: timeout client 1h")
		return
	default:
	}
	up.line()
	if status, answer, err := up.end(); err != nil || status != http.StatusCreated {
		d.problem("silent upload", fmt.Sprintf("an upload that said nothing for %v broke: %d %.200s %v", round(d.Idle), status, answer, errText(err)),
			"let bodies pause for as long as models think, for …/chunks. nginx: client_body_timeout 1h; HAProxy: timeout client 1h")
		return
	}
	d.last++
	d.ok("silent upload", "an upload outlives %v of saying nothing", round(d.Idle))
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// resume reconnects with a cursor, on new connections, to whichever node they reach.
func (d *doctor) resume(ctx context.Context) {
	const check, times = "resume", 6
	if _, _, err := d.append(ctx, `[{"content":"behind "},{"content":"the cursor"}]`); err != nil {
		d.problem(check, fmt.Sprintf("an append failed: %v", err), "look at the server's log")
		return
	}
	seen := map[string]bool{}
	for range times {
		client := d.HTTP()
		s := d.view(ctx, client, d.last-1)
		s.came(ctx, d.last, d.Patience)
		s.close()
		client.CloseIdleConnections()
		welcome, begun := s.named("welcome")
		reset, wrong := s.named("reset")
		first := int64(0)
		for _, m := range s.marks {
			if m.name == "" {
				first = m.id
				break
			}
		}
		switch {
		case begun && welcome.id == 0 && first == 1:
			d.problem(check, "the stream began from the start: the header Last-Event-ID does not reach the server", "let the proxy pass Last-Event-ID on")
			return
		case wrong:
			d.problem(check, fmt.Sprintf("node %q does not know the log as others do: it says reset, to %d", welcome.Node, reset.id), oneRedis)
			return
		case !begun || first != d.last:
			d.problem(check, fmt.Sprintf("a connection with Last-Event-ID %d did not get chunk %d within %v (%v)", d.last-1, d.last, d.Patience, s.err), unbuffer)
			return
		}
		seen[welcome.Node] = true
	}
	names := slices.Sorted(maps.Keys(seen))
	if len(names) > 1 {
		d.ok(check, "%d fresh connections went on behind their cursor, at %d nodes: %s", times, len(names), strings.Join(names, ", "))
	} else {
		d.ok(check, "%d fresh connections went on behind their cursor, all at node %s", times, names[0])
	}
}

// protocol checks whether streams share a connection.
func (d *doctor) protocol(ctx context.Context) {
	const check, count = "HTTP/2", 20
	switch {
	case d.proto != "HTTP/2.0" && d.URL.Scheme == "http":
		d.ok(check, "not without TLS: browsers allow six streams to this server, and a seventh tab hangs. Behind https they speak HTTP/2")
		return
	case d.proto != "HTTP/2.0":
		d.problem(check, d.proto+" was negotiated: browsers allow six streams to this server, and a seventh tab hangs",
			"let what ends TLS speak HTTP/2. nginx: listen 443 ssl http2; HAProxy: alpn h2,http/1.1")
		return
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	good := 0
	for range count {
		wg.Go(func() {
			s := d.view(ctx, d.client, d.last-1)
			defer s.close()
			if s.came(ctx, d.last, d.Patience) {
				mu.Lock()
				good++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if good < count {
		d.problem(check, fmt.Sprintf("of %d streams in one connection %d got their events", count, good), "allow a connection a hundred streams or more. nginx: http2_max_concurrent_streams")
		return
	}
	d.ok(check, "%d streams share a connection", count)
}

// cors sends the requests that a browser sends for a page of another origin.
func (d *doctor) cors(ctx context.Context) {
	const check = "CORS"
	const remedy = "name the origin in the server's list of origins, let the proxy pass OPTIONS on, and have only one of the two answer for CORS"
	var wrong []string
	ask := func(method, call string, headers ...string) {
		ctx, cancel := context.WithTimeout(ctx, d.Patience)
		defer cancel()
		r := d.request(ctx, "OPTIONS", d.path(call), nil)
		r.Header.Del("Authorization") // a preflight has none
		r.Header.Set("Origin", d.Origin)
		r.Header.Set("Access-Control-Request-Method", method)
		r.Header.Set("Access-Control-Request-Headers", strings.Join(headers, ","))
		response, err := d.client.Do(r)
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("the preflight of %s %s failed: %v", method, call, err))
			return
		}
		_ = response.Body.Close()
		h := response.Header
		if response.StatusCode/100 != 2 || !d.allowed(h) {
			wrong = append(wrong, fmt.Sprintf("the preflight of %s %s was answered with %d and Access-Control-Allow-Origin %q", method, call, response.StatusCode, h.Values("Access-Control-Allow-Origin")))
			return
		}
		if method != "GET" && method != "POST" && !lists(h, "Access-Control-Allow-Methods", method) {
			wrong = append(wrong, fmt.Sprintf("the preflight of %s does not allow %s", call, method))
		}
		for _, name := range headers {
			if !lists(h, "Access-Control-Allow-Headers", name) {
				wrong = append(wrong, fmt.Sprintf("the preflight of %s %s does not allow the header %s", method, call, name))
			}
		}
	}
	ask("GET", "/stream", "last-event-id", "authorization")
	ask("POST", "/chunks", "content-type", "authorization", "producer-id", "producer-epoch", "producer-chunk")
	ask("DELETE", "", "authorization")

	s := d.view(ctx, d.client, d.last-1, "Origin", d.Origin)
	defer s.close()
	s.until(ctx, d.Patience, func() bool { return s.response != nil })
	s.look(func() {
		switch {
		case s.response == nil:
			wrong = append(wrong, "the stream was not answered")
		case !d.allowed(s.response.Header):
			wrong = append(wrong, fmt.Sprintf("the stream has Access-Control-Allow-Origin %q", s.response.Header.Values("Access-Control-Allow-Origin")))
		case s.response.Header.Get("Access-Control-Allow-Origin") != "*" && !lists(s.response.Header, "Vary", "Origin"):
			wrong = append(wrong, "answers are for one origin and do not say Vary: Origin: a cache gives them to another")
		}
	})
	if len(wrong) > 0 {
		d.problem(check, strings.Join(wrong, "; "), remedy)
		return
	}
	d.ok(check, "pages of %s may use the server", d.Origin)
}

func (d *doctor) allowed(h http.Header) bool {
	all := h.Values("Access-Control-Allow-Origin") // two are as bad as none
	return len(all) == 1 && (all[0] == d.Origin || all[0] == "*")
}

// lists reports whether a list header contains an item.
func lists(h http.Header, name, item string) bool {
	for _, line := range h.Values(name) {
		for have := range strings.SplitSeq(line, ",") {
			if have = strings.TrimSpace(have); strings.EqualFold(have, item) || have == "*" {
				return true
			}
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
