package sse

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"gapless/store"
)

// Every test runs twice: over a server's responses, and over connections that were taken over.
func TestMain(m *testing.M) { goleak.VerifyTestMain(twice{m}) }

type twice struct{ m *testing.M }

var takenOver bool

func (t twice) Run() (code int) {
	for _, takenOver = range []bool{false, true} {
		if takenOver && flag.Lookup("test.bench").Value.String() != "" {
			break
		}
		if code = t.m.Run(); code != 0 {
			fmt.Println("with connections taken over:", takenOver)
			break
		}
	}
	return code
}

// event is one parsed event.
type event struct {
	name, id, data string
}

// parse reads a stream as the standard specifies for EventSource. It returns the rest that is not a
// whole event.
func parse(stream []byte) (events []event, rest []byte) {
	for {
		block, after, ok := bytes.Cut(stream, []byte("\n\n"))
		if !ok {
			return events, stream
		}
		stream = after
		var e event
		var data []string
		for line := range strings.SplitSeq(string(block), "\n") {
			field, value, _ := strings.Cut(line, ":")
			value = strings.TrimPrefix(value, " ")
			switch field {
			case "event":
				e.name = value
			case "data":
				data = append(data, value)
			case "id":
				e.id = value
			}
		}
		if data != nil {
			e.data = strings.Join(data, "\n")
			events = append(events, e)
		}
	}
}

// screen is a client that keeps what it receives, as a page would.
type screen struct {
	cursor int64    // the last number
	chunks []string // since the last reset
	first  int64    // the number of chunks[0]
	resets []string
	epoch  string
	seen   int   // events parsed so far
	said   *said // from a snapshot, since the last reset
}

// take checks events that came on one connection, and returns what is wrong with them.
func (s *screen) take(events []event) error {
	for ; s.seen < len(events); s.seen++ {
		e := events[s.seen]
		id, err := strconv.ParseInt(e.id, 10, 64)
		if err != nil {
			return fmt.Errorf("event %+v has no number", e)
		}
		switch e.name {
		case "welcome":
			var w welcome
			if err := json.Unmarshal([]byte(e.data), &w); err != nil {
				return err
			}
			s.epoch, s.cursor = w.Epoch, id
			if len(s.chunks) == 0 {
				s.first = id + 1
			}
		case "reset":
			var r reset
			if err := json.Unmarshal([]byte(e.data), &r); err != nil {
				return err
			}
			if r.Cursor != s.cursor {
				return fmt.Errorf("reset gives up cursor %d, and it is %d", r.Cursor, s.cursor)
			}
			s.resets, s.epoch = append(s.resets, r.Reason), r.Epoch
			s.cursor, s.first, s.chunks, s.said = id, id+1, nil, nil
		case "snapshot":
			said, err := parseSaid(e.data)
			if err != nil {
				return err
			}
			if s.chunks != nil || s.said != nil || said.First != s.cursor+1 || said.Last != id || said.Epoch != s.epoch {
				return fmt.Errorf("snapshot %+v came behind %d chunks, up to %d", e, len(s.chunks), s.cursor)
			}
			s.cursor, s.first, s.said = id, id+1, said
		case "":
			if id != s.cursor+1 {
				return fmt.Errorf("chunk %d came behind %d", id, s.cursor)
			}
			if n, ours := store.Number(e.data); ours && n != id {
				return fmt.Errorf("chunk %d says %s", id, e.data)
			}
			s.cursor, s.chunks = id, append(s.chunks, e.data)
		default:
			return fmt.Errorf("unknown event %q", e.name)
		}
	}
	return nil
}

// sink is a response, or a connection that was taken over, that accepts what is written to it.
type sink struct {
	taken    bool
	gone     func() // is called when the peer closes its end,
	left     bool   // which it has
	closed   bool
	room     int           // bytes that fit before the socket is full, once; 0: all
	pace     time.Duration // how long a write that has to wait takes
	deadline time.Time
	stall    chan struct{} // while it is not nil and open, the socket takes nothing
	free     int           // after this many bytes
	mu       sync.Mutex
	header   http.Header
	body     []byte
	status   int
	fail     error
}

func (s *sink) Header() http.Header {
	if s.header == nil {
		s.header = http.Header{}
	}
	return s.header
}
func (s *sink) WriteHeader(status int) { s.status = status }
func (s *sink) Flush()                 {}
func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	stall := s.stall
	if len(s.body) < s.free {
		stall = nil
	}
	s.mu.Unlock()
	time.Sleep(s.pace)
	for stalled := stall != nil; stalled; {
		s.mu.Lock()
		left := time.Until(s.deadline)
		if s.deadline.IsZero() { // none
			left = time.Hour
		}
		s.mu.Unlock()
		if left <= 0 {
			return 0, os.ErrDeadlineExceeded
		}
		select {
		case <-stall:
			stalled = false
		case <-time.After(min(left, time.Second/10)): // the deadline may have been moved
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return 0, s.fail
	}
	s.body = append(s.body, p...)
	return len(p), nil
}
func (s *sink) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	return nil
}

// bytes returns the body that has arrived.
func (s *sink) bytes() (body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.taken {
		return bytes.Clone(s.body)
	}
	for rest := s.body; ; {
		size, after, ok := bytes.Cut(rest, []byte("\r\n"))
		n, err := strconv.ParseInt(string(size), 16, 32)
		if !ok {
			return body
		}
		if bytes.HasPrefix(size, []byte("Gapless-")) { // the header of a 204, which has no body
			return body
		}
		if err != nil {
			panic(fmt.Sprintf("the frame begins with %q", size))
		}
		body = append(body, after[:min(int(n), len(after))]...)
		if len(after) < int(n)+2 {
			return body
		}
		if string(after[n:n+2]) != "\r\n" {
			panic(fmt.Sprintf("a frame of %d ends with %q", n, after[n:n+2]))
		}
		rest = after[n+2:]
	}
}

// A sink is a socket, too.

func (s *sink) Read([]byte) (int, error)        { panic("nobody reads") }
func (s *sink) LocalAddr() net.Addr             { return nil }
func (s *sink) RemoteAddr() net.Addr            { return nil }
func (s *sink) SetDeadline(time.Time) error     { return nil }
func (s *sink) SetReadDeadline(time.Time) error { return nil }

func (s *sink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *sink) finish() { _ = s.Close() }

// try takes all, a part, or nothing.
func (s *sink) try(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stalled := s.stall != nil && len(s.body) >= s.free
	if stalled {
		select {
		case <-s.stall:
			stalled = false
		default:
		}
	}
	switch {
	case s.closed:
		panic("written to behind its end")
	case s.fail != nil:
		return 0, s.fail
	case stalled:
		return 0, nil
	case s.room > 0 && len(s.body)+len(p) > s.room:
		p = p[:max(s.room-len(s.body), 0)]
		s.room = 0
	case s.room == 0 && len(s.body) > 0 && rand.IntN(8) == 0: // the head of a response fits
		p = p[:rand.IntN(len(p)+1)]
	}
	s.body = append(s.body, p...)
	return len(p), nil
}

func (s *sink) tryAll(p [][]byte) (int, error) {
	if len(p) > 100 {
		panic(fmt.Sprint(len(p), " pieces in a write"))
	}
	return s.try(bytes.Join(p, nil))
}

func (s *sink) watch(gone func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = gone
	if s.left {
		go gone()
	}
	return nil
}

func (s *sink) unwatch() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = nil
}

// leave closes the peer's end.
func (s *sink) leave() {
	s.mu.Lock()
	gone := s.gone
	s.left = true
	s.mu.Unlock()
	if gone != nil {
		gone()
	}
}

func (s *sink) events() []event {
	events, _ := parse(s.bytes())
	return events
}

// watcher is a running viewer.
type watcher struct {
	*sink
	screen
	cut  func()
	done chan Cause // receives the cause when the response has ended
}

// watch runs a viewer of the hub until cut, and close or the end of the log.
func watch(t testing.TB, h *Hub, a Ask) *watcher {
	t.Helper()
	v, err := h.View(a)
	if err != nil {
		t.Fatal(err)
	}
	return view(t, h, v, &sink{taken: takenOver && !a.Raw})
}

// view writes to a sink what a viewer gets.
func view(t testing.TB, h *Hub, v *Viewer, to *sink) *watcher {
	t.Helper()
	w := &watcher{sink: to, done: make(chan Cause, 1)}
	if takenOver && !v.Raw { // Raw viewers are never taken over
		w.cut = w.sink.leave
		go h.sit(v, w.sink, []byte{}, nil, 0, Told{func() {}, func(c Cause, _ bool) { w.done <- c }})
		return w
	}
	ctx, cut := context.WithCancel(context.Background())
	w.cut = cut
	r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	out := h.NewWriter(w.sink, r)
	go func() {
		defer v.Close()
		cause := v.Serve(ctx, out)
		out.leaveQuietly()
		w.done <- cause
	}()
	return w
}

// leave cuts the viewer off and waits for it.
func (w *watcher) leave() Cause {
	w.cut()
	return <-w.done
}

// check takes what came, and compares the screen with a log.
func (w *watcher) check(first int64, elements []string) error {
	if err := w.take(w.events()); err != nil {
		return err
	}
	if w.said != nil && w.said.First >= first { // else a part of it is trimmed
		if err := w.said.check(elements[w.said.First-first : w.said.Last-first+1]); err != nil {
			return err
		}
		first, elements = w.first, elements[w.first-first:]
	}
	want := make([]string, 0, len(elements))
	for i, e := range elements {
		if seq := first + int64(i); seq >= w.first {
			want = append(want, encoded(seq, e))
		}
	}
	kept := w.chunks // without those that the log no longer keeps
	if gone := first - w.first; gone > 0 {
		kept = kept[min(gone, int64(len(kept))):]
	}
	if got := strings.Join(kept, "\n"); got != strings.Join(want, "\n") {
		return fmt.Errorf("the viewer has, from %d on:\n%s\nthe log, from %d on:\n%s", w.first, got, first, strings.Join(want, "\n"))
	}
	if len(elements) > 0 && w.first > first && len(w.chunks) > 0 && len(w.resets) == 0 && w.said == nil {
		return fmt.Errorf("the viewer began at %d, and the log at %d", w.first, first)
	}
	return nil
}

// encoded returns what viewers get for an element.
func encoded(seq int64, element string) string {
	chunk, _ := store.AppendElement(nil, seq, element)
	return string(chunk)
}

func testConfig() Config {
	c := DefaultConfig()
	c.Node = "test"
	return c
}

// leaveQuietly is End without its panic.
func (w *Writer) leaveQuietly() { _ = w.End(Done) }
