package sse

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// A viewer that waits in its handler costs 25 KB: a goroutine with its stack, and the server's
// buffers. Where the protocol allows it, the connection is taken over (http.Hijacker) and the
// handler returns. What remains is a seat in the feed's row.
//
// A seat has one owner at a time; only the owner may touch its viewer and socket. The holder of the
// row's mutex owns a seat in the row, and one goroutine owns any other seat. When there is a new
// window, one goroutine per feed walks along the row and gives each viewer what comes next, in
// writes that never block. A viewer whose socket is full, or that needs older pages, leaves the
// row. Its own goroutine runs what a handler runs (Viewer.serve), and returns it to the row when it
// has everything.
type seat struct {
	*Viewer
	conn  socket
	told  Told
	at    int       // index in the row; -1: a goroutine owns it
	wrote time.Time // when the last write ended

	// head is the beginning of the response until it is sent, which waits for the log to be known,
	// at most for patience. none is sent instead if there is nothing to view.
	head, none []byte
	patience   time.Duration
	expiry     func() bool // cancels the timer that ends it when its permission expires

	// The rest of a write that did not fit, for the goroutine that continues it.
	start []byte // of the beginning of the response
	rest  []byte
	skip  int
	end   Cause
	since int64 // the cursor before that write
	count bool  // whether its events are chunks
	// parting means that it is the last event, and that the response breaks off after it.
	parting bool
	torn    bool // the response's last bytes were not written

	// The row's mutex guards these: what happens to a seat that a goroutine owns.
	gone   bool
	left   Cause // why it must leave
	cut    context.CancelFunc
	writer *Writer
}

// Told is called when the response on a connection that was taken over begins, and when it has
// ended. A response that never began was a 204, because there was nothing to view, or the peer went
// away.
type Told struct {
	Begins func()
	Ends   func(c Cause, begun bool)
}

// socket is a connection that also has writes that do not block.
type socket interface {
	net.Conn
	// try writes what fits at once: all of p, or less and no error. tryAll does the same with
	// several slices. An error means that the connection is broken.
	try(p []byte) (int, error)
	tryAll(p [][]byte) (int, error)
	// watch calls gone, once, when the peer has closed its end. unwatch ends that; call it before
	// Close.
	watch(gone func()) error
	unwatch()
	// finish ends the output, and closes the connection when the peer has read it.
	finish()
}

// row holds the seats of a feed.
type row struct {
	mu      sync.Mutex
	seats   []*seat // nil: free
	free    int
	walking bool // a goroutine walks along the row: no seat may be moved

	taken atomic.Int64 // seats that are not free
	busy  atomic.Bool  // a goroutine walks along the row, or is about to
}

// add puts a seat into the row. mu is held.
func (r *row) add(s *seat) {
	r.compact()
	s.at = len(r.seats)
	r.seats = append(r.seats, s)
	s.writer, s.cut, s.hand = nil, nil, nil
}

// compact moves seats together when half of them are free. mu is held.
func (r *row) compact() {
	if r.walking || r.free <= len(r.seats)/2 {
		return
	}
	kept := make([]*seat, 0, len(r.seats)-r.free+1)
	for _, s := range r.seats {
		if s != nil {
			s.at = len(kept)
			kept = append(kept, s)
		}
	}
	r.seats, r.free = kept, 0
}

// remove takes a seat out. mu is held.
func (r *row) remove(s *seat) {
	r.seats[s.at] = nil
	s.at = -1
	r.free++
	r.taken.Add(-1)
}

// Take takes over the connection of a viewer, if it can. If it returns false, nothing has happened.
// If it returns true, the response continues as with Over, with its patience, and then Serve.
func (h *Hub) Take(v *Viewer, to http.ResponseWriter, r *http.Request, patience time.Duration, told Told) bool {
	if h.cfg.Plain || v.bare() || r.ProtoMajor != 1 || r.ProtoMinor != 1 { // a Raw response may need a read before its status is known
		return false
	}
	conn, ok := h.hijack(to, r)
	if !ok {
		return false
	}
	header := to.Header() // with headers that others have set: both responses send them
	header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	none := beginHead("204 No Content", header)
	header.Set("Transfer-Encoding", "chunked")
	// Not Connection: close, although the connection may be closed at the end. Some clients (undici
	// is one) take the close for the end of the response, and would not notice that it broke off.
	h.sit(v, conn, endHead(beginHead("200 OK", streamHeader(header)), nil), none, patience, told)
	return true
}

func beginHead(status string, header http.Header) []byte {
	head := bytes.NewBufferString("HTTP/1.1 " + status + "\r\n")
	_ = header.Write(head)
	return head.Bytes()
}

func endHead(head []byte, more http.Header) []byte {
	b := bytes.NewBuffer(head)
	_ = more.Write(b)
	return append(b.Bytes(), "\r\n"...)
}

// sit serves a viewer on a connection that was taken over.
func (h *Hub) sit(v *Viewer, conn socket, head, none []byte, patience time.Duration, told Told) {
	s := &seat{Viewer: v, conn: conn, told: told, at: -1, wrote: time.Now(), head: head, none: none, patience: patience}
	v.feed.mu.Lock()
	v.seat = s
	leaving := v.leaving
	v.feed.mu.Unlock()
	if leaving != "" {
		s.leave(leaving)
	}
	s.expiry = v.expire()
	if h.leaving.Err() != nil { // Drain may not have seen it
		time.AfterFunc(rand.N(h.spread+1), func() { s.leave(Shutdown) })
	}
	if conn.watch(s.leftByPeer) != nil {
		s.close(Gone)
		return
	}
	for {
		w := v.feed.window.Load()
		switch cause, run := s.advance(w, &frame{}, time.Now()); {
		case cause != "":
			s.close(cause)
			return
		case run:
			h.wg.Go(s.run)
			return
		}
		switch sits, cause := s.wait(w); {
		case sits:
			return
		case cause == Gone:
			s.close(cause)
			return
		case cause != "":
			s.sendAway(cause)
			return
		}
	}
}

// begin returns the beginning of the response.
func (s *seat) begin() []byte {
	begin := appendFrame(s.head, s.Viewer.begin())
	s.head, s.none = nil, nil
	s.told.Begins()
	return begin
}

// greet begins the response. Its beginning usually fits: the socket is unused, or its client has
// read the former response.
func (s *seat) greet() (whole bool, err error) {
	begin := s.begin()
	n, err := s.conn.try(begin)
	s.start = begin[n:]
	return len(s.start) == 0, err
}

// wait puts the seat into the row, unless there is something to do: w was replaced, or the seat
// must leave.
func (s *seat) wait(w *window) (sits bool, over Cause) {
	r := &s.feed.row
	r.taken.Add(1) // before the window is loaded: publish uses the other order
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case s.gone:
		over = Gone
	case s.left != "":
		over = s.left
	case s.feed.window.Load() == w:
		r.add(s)
		return true, ""
	}
	r.taken.Add(-1)
	return false, over
}

// leftByPeer ends the response after the peer has gone.
func (s *seat) leftByPeer() {
	r := &s.feed.row
	r.mu.Lock()
	s.gone = true
	sits := s.at >= 0
	if sits {
		r.remove(s)
	} else if s.cut != nil {
		s.cut()
	}
	r.mu.Unlock()
	if sits {
		s.close(Gone)
	}
}

// leave ends the response for one of our causes. The first cause counts.
func (s *seat) leave(c Cause) {
	r := &s.feed.row
	r.mu.Lock()
	if s.left == "" {
		s.left = c
	}
	c = s.left
	sits := s.at >= 0
	if sits {
		r.remove(s)
	} else if s.writer != nil {
		s.writer.leave(c)
	}
	r.mu.Unlock()
	if sits {
		s.sendAway(c)
	}
}

// sendAway breaks the response off for one of our causes.
func (s *seat) sendAway(c Cause) {
	if s.head != nil {
		if whole, err := s.greet(); !whole || err != nil {
			s.close(c)
			return
		}
	}
	if b := s.farewell(c); len(b) > 0 {
		framed := appendFrame(nil, b)
		if n, err := s.conn.try(framed); err == nil && n < len(framed) {
			s.rest, s.skip, s.end, s.parting = b, n, c, true
			s.hub.wg.Go(s.run)
			return
		}
	}
	s.close(c)
}

// advance gives the viewer what window w has for it, as far as its socket takes that at once. It
// returns why the response is over, or that the seat needs a goroutine, or neither if w has nothing
// more.
func (s *seat) advance(w *window, f *frame, now time.Time) (over Cause, run bool) {
	if s.head != nil {
		if !w.known() || !s.fresh(w) {
			return "", false
		}
		if over, _ := s.nothing(w); over != "" {
			none := endHead(s.none, nothingFollows(w.Epoch, over))
			n, err := s.conn.try(none)
			s.torn = err != nil || n < len(none)
			return over, false
		}
		f.begin = s.begin()
	}
	for {
		if s.joined && s.Cursor < w.Last && s.pace.Load() > 0 {
			return "", true
		}
		step := s.next(w)
		if len(step.events) > 0 {
			f.add(step, s.Cursor)
			s.Cursor, s.wrote = step.cursor, now
		}
		over := step.end != "" || step.fetch || len(step.events) == 0 || s.Cursor == w.Last && !w.Ended
		if !over && f.size < someWrite {
			continue
		}
		whole, err := s.give(w, f)
		switch {
		case err != nil:
			return Gone, false
		case !whole || step.fetch:
			return "", true
		case step.end.Clean():
			if n, err := s.conn.try([]byte(lastFrame)); err == nil && n < len(lastFrame) {
				s.rest, s.skip, s.end = nil, n, step.end
				return "", true
			}
			return step.end, false
		case over:
			return step.end, false
		}
	}
}

// give writes what f holds, as far as the socket takes it at once. It leaves the rest to a
// goroutine, from the piece that did not fit. What comes after that piece is not given.
func (s *seat) give(w *window, f *frame) (whole bool, err error) {
	defer f.clear()
	n, err := f.write(s.conn)
	if err != nil {
		return false, err
	}
	s.start = f.begin[min(n, len(f.begin)):]
	n = max(n-len(f.begin), 0)
	for _, p := range f.parts {
		rest, size := p.events, frameSize(p.piece)
		if n >= size {
			n -= size
			if rest = rest[len(p.piece):]; len(rest) == 0 {
				s.note(p.chunks, p.since, p.cursor, w)
				continue
			}
			if !p.last {
				continue
			}
		}
		s.Cursor = p.cursor
		s.rest, s.skip, s.end, s.since, s.count = rest, n, p.end, p.since, p.chunks
		return false, nil
	}
	return len(s.start) == 0, nil
}

// run continues after a write that did not fit, until the viewer has everything or its response is
// over.
func (s *seat) run() {
	out := &framed{Conn: s.conn, skip: s.skip}
	if s.parting { // it has a moment for the rest of the last event
		_ = s.conn.SetWriteDeadline(time.Now().Add(lastWord))
		_, _ = out.Write(s.rest)
		s.close(s.end)
		return
	}
	_ = s.conn.SetWriteDeadline(time.Time{}) // a deadline may have been set at the moment when a write ended
	w := s.hub.newWriter(out, s.conn)
	w.wrote = s.wrote
	ctx, cut := context.WithCancel(context.Background())
	defer cut()
	r := &s.feed.row
	r.mu.Lock()
	s.writer, s.cut = w, cut
	if s.gone {
		cut()
	}
	if s.left != "" {
		w.leave(s.left)
	}
	r.mu.Unlock()

	start, rest, cause := s.start, s.rest, s.end
	s.start, s.rest, s.skip, s.end = nil, nil, 0, ""
	if len(start) > 0 {
		s.bare(w, start)
	}
	switch {
	case w.err != nil:
		cause = w.cause()
	case len(rest) == 0:
	case w.write(rest) != nil:
		cause = w.cause()
	default:
		s.note(s.count, s.since, s.Cursor, nil)
	}
	if cause == "" {
		cause = s.serve(ctx, w, func(now *window) bool {
			s.wrote = w.wrote
			sits, _ := s.wait(now)
			return sits
		})
	}
	if cause.Clean() {
		s.bare(w, []byte(lastFrame)[out.skip:])
		s.torn = w.err != nil
	}
	w.stop()
	if cause != "" {
		s.close(cause)
	}
}

// bare writes bytes that are in no frame.
func (s *seat) bare(w *Writer, p []byte) {
	w.writing.Add(1) // so that this write, too, is given up if it takes too long
	_, w.err = s.conn.Write(p)
	w.writing.Add(1)
}

// close ends the response. The seat is not in the row.
func (s *seat) close(c Cause) {
	s.expiry()
	s.conn.unwatch()
	if c.Clean() && !s.torn {
		s.conn.finish() // a 204 ends there, too
	} else {
		if tcp := tcpConn(s.conn); tcp != nil && c == Slow { // unsent data would keep it open for the peer
			_ = tcp.SetLinger(0)
		}
		_ = s.conn.Close()
	}
	s.hub.metrics.ended.WithLabelValues(string(c)).Inc()
	s.told.Ends(c, s.head == nil)
	s.Close()
}

// wake starts a walk along the row if it has seats. It is called after each new window.
func (f *feed) wake() {
	if f.row.taken.Load() > 0 && f.row.busy.CompareAndSwap(false, true) {
		f.hub.wg.Go(f.walk)
	}
}

// walk gives every seat in the row what is new, and repeats that until nothing is.
func (f *feed) walk() {
	for {
		w := f.window.Load()
		f.along((*seat).advance)
		f.row.busy.Store(false)
		if f.window.Load() == w || !f.row.busy.CompareAndSwap(false, true) {
			return
		}
	}
}

// beat sends a heartbeat to viewers that have received nothing for nearly a heartbeat interval.
func (f *feed) beat(least time.Duration) {
	w := f.window.Load()
	if f.row.taken.Load() == 0 || !f.row.busy.CompareAndSwap(false, true) {
		return // another walk is under way; the next beat, less than a quarter of the interval away, will do
	}
	f.along(func(s *seat, w *window, fr *frame, now time.Time) (Cause, bool) {
		quiet := now.Sub(s.wrote)
		if s.head != nil && quiet >= s.patience && !s.mayHaveAll(quiet) {
			// The answer may be in the window, and no walk has brought it yet.
			if over, run := s.advance(w, fr, now); over != "" || run || s.head == nil {
				return over, run
			}
			s.wrote = now
			whole, err := s.greet()
			if err != nil {
				return Gone, false
			}
			return "", !whole
		}
		if quiet < least || s.head != nil {
			return "", false
		}
		s.wrote = now
		beat := fr.of(beatBytes)
		switch n, err := s.conn.try(beat); {
		case err != nil:
			return Gone, false
		case n < len(beat):
			s.rest, s.skip, s.since, s.count = beatBytes, n, s.Cursor, false
			return "", true
		}
		return "", false
	})
	f.row.busy.Store(false)
	if f.window.Load() != w { // it came in the meantime, and no walk was started for it
		f.wake()
	}
}

var beatBytes = []byte(heartbeat)

// along walks along the row as it is now. It regularly releases the mutex, so that seats can leave
// and others can join at the end. Those have seen the newest window.
func (f *feed) along(do func(*seat, *window, *frame, time.Time) (over Cause, run bool)) {
	const some = 64
	type leaving struct {
		s *seat
		c Cause
	}
	var (
		r    = &f.row
		fr   frame
		outs []leaving
	)
	r.mu.Lock()
	r.walking = true
	length := len(r.seats) // seats after these have seen the window, or a newer one
	for i := 0; i < length; {
		now, w := time.Now(), f.window.Load()
		for end := min(i+some, length); i < end; i++ {
			s := r.seats[i]
			if s == nil {
				continue
			}
			over, run := do(s, w, &fr, now)
			if over == "" && !run {
				continue
			}
			r.remove(s)
			if run {
				f.hub.wg.Go(s.run)
			} else {
				outs = append(outs, leaving{s, over})
			}
		}
		r.mu.Unlock()
		for _, l := range outs {
			l.s.close(l.c)
		}
		outs = outs[:0]
		r.mu.Lock()
	}
	r.walking = false
	r.compact()
	r.mu.Unlock()
}

// someWrite is about how many bytes are gathered for one write: what a socket takes at once. A
// window has at least some ten segments, so that is at most some ten pieces. The rest of a larger
// chunk is left to a goroutine.
const someWrite = 4 * segmentSize

// frame holds events as chunks of HTTP/1.1 (RFC 9112, section 7.1), to be given to a viewer in one
// write. Usually it is one piece, which is framed once for all viewers of a row.
type frame struct {
	begin []byte // of the response, before the parts
	parts []part
	size  int
	lists [][]byte

	events, framed []byte // the last piece that was alone in its write
}

// part is a piece of a step's events. Its events begin with that piece.
type part struct {
	step
	piece []byte
	since int64 // the cursor before the step
	last  bool  // piece of the step that fits: what follows is too much for one write
}

func (f *frame) add(s step, since int64) {
	for len(s.events) > 0 && f.size < someWrite {
		piece := s.events[:min(len(s.events), segmentSize)]
		f.size += len(piece)
		f.parts = append(f.parts, part{s, piece, since, f.size >= someWrite})
		s.events = s.events[len(piece):]
	}
}

func (f *frame) clear() {
	clear(f.parts)
	clear(f.lists)
	f.begin, f.parts, f.lists, f.size = nil, f.parts[:0], f.lists[:0], 0
}

// write writes the frame as far as the socket takes it.
func (f *frame) write(to socket) (int, error) {
	switch {
	case f.begin == nil && len(f.parts) == 0:
		return 0, nil
	case len(f.parts) == 0:
		return to.try(f.begin)
	case f.begin == nil && len(f.parts) == 1:
		return to.try(f.of(f.parts[0].piece))
	}
	f.lists = append(f.lists, f.begin)
	for _, p := range f.parts {
		f.lists = append(f.lists, append(strconv.AppendInt(make([]byte, 0, 8), int64(len(p.piece)), 16), "\r\n"...), p.piece, []byte("\r\n"))
	}
	return to.tryAll(f.lists)
}

func (f *frame) of(events []byte) []byte {
	if len(f.events) != len(events) || &f.events[0] != &events[0] {
		f.events, f.framed = events, appendFrame(f.framed[:0], events)
	}
	return f.framed
}

// frameSize returns the length of events after appendFrame.
func frameSize(events []byte) int {
	digits := 1
	for n := len(events); n > 15; n >>= 4 {
		digits++
	}
	return digits + len("\r\n") + len(events) + len("\r\n")
}

func appendFrame(b, events []byte) []byte {
	b = strconv.AppendInt(b, int64(len(events)), 16)
	b = append(append(b, "\r\n"...), events...)
	return append(b, "\r\n"...)
}

const lastFrame = "0\r\n\r\n"

// framed is a connection whose writes are frames. skip bytes of the first frame were already
// written.
type framed struct {
	net.Conn
	skip int
}

// Write writes p as one frame.
func (f *framed) Write(p []byte) (int, error) {
	head := strconv.AppendInt(make([]byte, 0, 8), int64(len(p)), 16)
	parts := net.Buffers{append(head, "\r\n"...), p, []byte("\r\n")}
	for f.skip > 0 && len(parts) > 0 {
		n := min(f.skip, len(parts[0]))
		f.skip -= n
		if parts[0] = parts[0][n:]; len(parts[0]) == 0 {
			parts = parts[1:]
		}
	}
	if _, err := parts.WriteTo(f.Conn); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush does nothing, because Write does not buffer.
func (f *framed) Flush() error { return nil }
