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

// Writer writes one SSE response, in pieces that a socket takes at once. It detects a socket that
// takes nothing.
//
// A write deadline alone cannot tell a slow reader from a dead one. The kernel takes megabytes for
// a reader and then nothing for a long while, although bytes leave all the time. So the send buffer
// is small and a write is at most 16 KiB. A blocked write fails only after the peer has
// acknowledged nothing for the timeout.
type Writer struct {
	out     out
	conn    net.Conn // nil if several responses share it, as in HTTP/2
	http10  bool
	timeout time.Duration
	wrote   time.Time // when the last write ended
	err     error

	left    chan struct{} // closed by leave
	why     Cause         // the cause that leave was given, set before left is closed
	writing atomic.Uint64 // odd while a write is under way

	mu      sync.Mutex
	leaving bool
	watch   *time.Timer // runs look
	seen    uint64      // the value of writing at the last look
	acked   uint64      // the bytes that the peer had acknowledged then
	since   time.Time   // when one of the two last changed
}

// out is the destination of a response.
type out interface {
	io.Writer
	Flush() error
	SetWriteDeadline(time.Time) error
}

// response is the out of net/http.
type response struct {
	http.ResponseWriter
	*http.ResponseController
}

type connKey struct{}

// WithConn stores a request's connection in its context (http.Server.ConnContext), for
// Hub.NewWriter.
func WithConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// Conn returns the connection that a request came on, or nil.
func Conn(ctx context.Context) net.Conn {
	c, _ := ctx.Value(connKey{}).(net.Conn)
	return c
}

// sendBuffer is the size of a viewer's send buffer in the kernel. It suffices for 3 MB/s over 10
// ms, and is small enough that a viewer's pace shows.
const sendBuffer = 32 << 10

// sharedBuffer is the same for a connection of many streams (HTTP/2), where the bytes of one stream
// delay all others.
const sharedBuffer = 4 * sendBuffer

var errLeft = errors.New("the response has to end")

// NewWriter begins the response: status 200, the headers of a stream, and no buffering. The caller
// must call End.
func (h *Hub) NewWriter(to http.ResponseWriter, r *http.Request) *Writer {
	conn := Conn(r.Context())
	switch {
	case conn == nil:
	case r.ProtoMajor != 1:
		setSendBuffer(conn, sharedBuffer)
		conn = nil // the bytes that its peer acknowledges may be another stream's
	default:
		setSendBuffer(conn, sendBuffer)
	}
	ctl := http.NewResponseController(to)
	_ = ctl.SetWriteDeadline(time.Time{}) // the server's own deadline is for short responses
	w := h.newWriter(response{to, ctl}, conn)
	w.http10 = conn != nil && r.ProtoMinor == 0
	streamHeader(to.Header())
	if r.ProtoMajor == 2 && h.leaving.Err() != nil {
		to.Header().Set("Connection", "close") // net/http sends a GOAWAY for it: otherwise the viewer would reconnect on this connection
	}
	to.WriteHeader(http.StatusOK)
	return w
}

// newWriter begins to supervise the writes of a response. stop ends that.
func (h *Hub) newWriter(to out, conn net.Conn) *Writer {
	w := &Writer{out: to, conn: conn, timeout: h.cfg.WriteTimeout, wrote: time.Now(), left: make(chan struct{})}
	w.mu.Lock()
	w.watch = time.AfterFunc(w.timeout/4, w.look)
	w.mu.Unlock()
	return w
}

// Head responds to a HEAD: the headers of a stream, without the stream.
func Head(to http.ResponseWriter) {
	streamHeader(to.Header())
	to.WriteHeader(http.StatusOK)
}

// streamHeader sets the headers of every stream.
func streamHeader(header http.Header) http.Header {
	header.Set("Content-Type", "text/event-stream")
	header.Set("Cache-Control", "no-cache, no-transform")
	header.Set("X-Accel-Buffering", "no") // nginx
	header.Set("Incremental", "?1")       // RFC 10036: intermediaries should forward it as it comes
	return header
}

// write returns when the kernel has all of p, or with the error that ends the response. That is
// errLeft if the response must end and nothing of p was written.
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
			default: // finish what is half written, so that the last event can be read
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

// look runs four times per write timeout, so that a write itself sets no timer. It fails a write
// that has stayed the same, without an acknowledged byte, for the timeout.
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

// leave ends the response for one of our causes, even while the socket is blocked. The first cause
// counts. It may be called after End, when the connection serves another request. It sets a
// deadline only for a write under way: an expired deadline ends an HTTP/2 stream, and last may
// still have to write.
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
	if c == Expired { // a half-written event is finished if the socket takes it, so that the last one can be read
		now = now.Add(lastWord)
	}
	_ = w.out.SetWriteDeadline(now)
}

// lastWord is how long a viewer whose permission has expired has to take what is being written.
const lastWord = time.Second

// last writes after leave, if the socket takes it at once and no event is half written.
func (w *Writer) last(p []byte) {
	if w.err == errLeft {
		w.err = nil
	}
	if len(p) > 0 && w.err == nil {
		_ = w.out.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		w.put(p)
	}
}

// cause returns why a write failed.
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

// End ends the response as its cause demands. It returns nil for a clean end, or panics with
// http.ErrAbortHandler, which breaks the connection off.
func (w *Writer) End(c Cause) error {
	w.stop()
	if c.Clean() {
		select {
		case <-w.left: // leave may have set a deadline for a write that was just over
			if w.err == nil || w.err == errLeft {
				_ = w.out.SetWriteDeadline(time.Now().Add(w.timeout))
			}
		default:
		}
		return nil
	}
	if w.http10 { // its responses end only with the connection: a reset shows that this is no regular end
		if tcp := tcpConn(w.conn); tcp != nil {
			_ = tcp.SetLinger(0)
		}
	}
	panic(http.ErrAbortHandler)
}

// stop ends the supervision of writes, because the connection then belongs to another request.
func (w *Writer) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leaving = true
	w.watch.Stop()
}

// Refuse sends a viewer away before its first event, in the only way after which every client
// reconnects: a stream that says when, and breaks off. If the node is full (Full), clients
// reconnect later, so that refusals do not keep the node busy.
func (w *Writer) Refuse(c Cause) error {
	after := retry()
	if c == Full {
		after = 10_000 + rand.IntN(20_000)
	}
	_ = w.write(appendRetry([]byte(heartbeat), after))
	return w.End(c)
}

// tcpConn returns the TCP connection under TLS and other wrappers, or nil.
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
