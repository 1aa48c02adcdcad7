package sse

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Writer writes one SSE response, in pieces that a socket takes at once, and notices a
// socket that takes nothing.
//
// A write deadline alone cannot tell a slow reader from a dead one: the kernel takes
// megabytes for a reader, and then nothing for a long while, although bytes leave all
// the time. So the send buffer is small, a write is at most 16 KiB, and one that is
// blocked is given up only when the peer has acknowledged nothing for the time-out.
type Writer struct {
	out     out
	conn    net.Conn // nil where several responses share it, as in HTTP/2
	http10  bool
	timeout time.Duration
	wrote   time.Time // when the last write ended
	err     error

	left    chan struct{} // closed by leave
	why     Cause         // given to leave, before left is closed
	writing atomic.Uint64 // odd while a write is under way

	mu      sync.Mutex
	leaving bool
	watch   *time.Timer // runs look
	seen    uint64      // what look saw last: writing,
	acked   uint64      // the bytes that the peer had acknowledged,
	since   time.Time   // and when that changed
}

// out is where a response goes.
type out interface {
	io.Writer
	Flush() error
	SetWriteDeadline(time.Time) error
}

// response is a server's own.
type response struct {
	http.ResponseWriter
	*http.ResponseController
}

type connKey struct{}

// WithConn gives a request's context the connection that it came on
// (http.Server.ConnContext), for Hub.NewWriter.
func WithConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// Conn is the connection that a request came on, or nil.
func Conn(ctx context.Context) net.Conn {
	c, _ := ctx.Value(connKey{}).(net.Conn)
	return c
}

// sendBuffer is what the kernel is asked to hold for a viewer: enough for 3 MB/s over
// 10 ms, little enough that a viewer's pace shows.
const sendBuffer = 32 << 10

// sharedBuffer is the same for a connection of many streams (HTTP/2): what one of them has
// put into it is in front of all others.
const sharedBuffer = 4 * sendBuffer

var errLeft = errors.New("the response has to end")

// NewWriter begins the response: status 200, the headers of a stream, nothing of it
// kept back. End must be called.
func (h *Hub) NewWriter(to http.ResponseWriter, r *http.Request) *Writer {
	conn := Conn(r.Context())
	switch {
	case conn == nil:
	case r.ProtoMajor != 1:
		setSendBuffer(conn, sharedBuffer)
		conn = nil // what its peer acknowledges is perhaps another stream's
	default:
		setSendBuffer(conn, sendBuffer)
	}
	ctl := http.NewResponseController(to)
	_ = ctl.SetWriteDeadline(time.Time{}) // the server's own is for responses that end soon
	w := h.newWriter(response{to, ctl}, conn)
	w.http10 = conn != nil && r.ProtoMinor == 0
	streamHeader(to.Header())
	if r.ProtoMajor == 2 && h.leaving.Err() != nil {
		to.Header().Set("Connection", "close") // it makes a GOAWAY of it: else the viewer would come back on this connection
	}
	to.WriteHeader(http.StatusOK)
	return w
}

// newWriter begins to watch over the writes of a response. stop ends that.
func (h *Hub) newWriter(to out, conn net.Conn) *Writer {
	w := &Writer{out: to, conn: conn, timeout: h.cfg.WriteTimeout, wrote: time.Now(), left: make(chan struct{})}
	w.mu.Lock()
	w.watch = time.AfterFunc(w.timeout/4, w.look)
	w.mu.Unlock()
	return w
}

// Head is the response to a HEAD: what a stream begins with, and no stream.
func Head(to http.ResponseWriter) {
	streamHeader(to.Header())
	to.WriteHeader(http.StatusOK)
}

// streamHeader is the header of every stream.
func streamHeader(header http.Header) http.Header {
	header.Set("Content-Type", "text/event-stream")
	header.Set("Cache-Control", "no-cache, no-transform")
	header.Set("X-Accel-Buffering", "no") // nginx
	header.Set("Incremental", "?1")       // RFC 10036: to be passed on as it comes
	return header
}

// write returns when the kernel has all of p, or with the error that ends the response: errLeft
// if that has to end and nothing of p was written.
func (w *Writer) write(p []byte) error {
	var until time.Time
	for begun := false; len(p) > 0 && w.err == nil; begun = true {
		piece := p[:min(len(p), segmentSize)]
		p = p[len(piece):]
		w.writing.Add(1)
		select {
		case <-w.left: // leave may have seen no write under way
			switch {
			case !begun:
				w.err = errLeft
			case w.why != Expired:
				w.err = os.ErrDeadlineExceeded
			default: // what is half written is finished: the last event is to be read
				if until.IsZero() {
					until = time.Now().Add(lastWord)
				}
				_ = w.out.SetWriteDeadline(until)
				w.put(piece)
			}
		default:
			w.put(piece)
		}
		w.writing.Add(1)
	}
	w.wrote = time.Now()
	return w.err
}

func (w *Writer) put(p []byte) {
	if _, w.err = w.out.Write(p); w.err == nil {
		w.err = w.out.Flush()
	}
}

// look runs four times in the write timeout, so that a write itself sets no timer. A
// write is over when it is the same one, and no byte of it was acknowledged, for that long.
func (w *Writer) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leaving {
		return
	}
	w.watch.Reset(w.timeout / 4)
	writing := w.writing.Load()
	if writing%2 == 0 {
		return
	}
	acked := uint64(0)
	if w.conn != nil {
		acked = acknowledged(w.conn)
	}
	if writing != w.seen || acked != w.acked {
		w.seen, w.acked, w.since = writing, acked, time.Now()
	} else if time.Since(w.since) >= w.timeout {
		_ = w.out.SetWriteDeadline(time.Now())
	}
}

// leave has the response end now for a cause of ours, even if its socket takes nothing. The
// first cause counts. It may come late: behind End the connection is another request's. The deadline
// is for a write that is under way, and no other: HTTP/2 ends a stream by it, and last has still something to say.
func (w *Writer) leave(c Cause) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.leaving {
		return
	}
	w.leaving, w.why = true, c
	w.watch.Stop()
	close(w.left)
	if w.writing.Load()%2 == 0 {
		return
	}
	now := time.Now()
	if c == Expired { // an event that is half written is finished, if the socket takes it: the last one is to be read
		now = now.Add(lastWord)
	}
	_ = w.out.SetWriteDeadline(now)
}

// lastWord is how long a viewer whose right has run out has to take what is being written.
const lastWord = time.Second

// last writes after leave, if the socket takes it at once and nothing is half written.
func (w *Writer) last(p []byte) {
	if w.err == errLeft {
		w.err = nil
	}
	if len(p) > 0 && w.err == nil {
		_ = w.out.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		w.put(p)
	}
}

// cause names why a write failed.
func (w *Writer) cause() Cause {
	select {
	case <-w.left:
		return w.why
	default:
	}
	if errors.Is(w.err, os.ErrDeadlineExceeded) {
		return Slow
	}
	return Gone
}

// End ends the response as its cause demands: by returning nil, which ends it as HTTP
// ends one, or by a panic with http.ErrAbortHandler, which breaks the connection off.
func (w *Writer) End(c Cause) error {
	w.stop()
	if c.Clean() {
		if w.err == nil || w.err == errLeft { // leave may have set a deadline for a write that was just over
			_ = w.out.SetWriteDeadline(time.Now().Add(w.timeout))
		}
		return nil
	}
	if w.http10 { // its responses have no end but that of the connection: a reset says it was none
		if tcp := tcpConn(w.conn); tcp != nil {
			_ = tcp.SetLinger(0)
		}
	}
	panic(http.ErrAbortHandler)
}

// stop ends the watch over writes: behind it the connection is another's.
func (w *Writer) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leaving = true
	w.watch.Stop()
}

// Refuse sends a viewer away before its first event, in the only way after which every
// client comes back: a stream that says when, and breaks off. Where there was no room for it
// (Full), that is later: those who are refused are not to be all that a node does.
func (w *Writer) Refuse(c Cause) error {
	after := retry()
	if c == Full {
		after = 10_000 + rand.IntN(20_000)
	}
	_ = w.write(appendRetry([]byte(heartbeat), after))
	return w.End(c)
}

// tcpConn is what is under TLS, and under whoever counts connections.
func tcpConn(c net.Conn) *net.TCPConn {
	for {
		t, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = t.NetConn()
	}
	tcp, _ := c.(*net.TCPConn)
	return tcp
}

func setSendBuffer(c net.Conn, bytes int) {
	if tcp := tcpConn(c); tcp != nil {
		_ = tcp.SetWriteBuffer(bytes)
	}
}
