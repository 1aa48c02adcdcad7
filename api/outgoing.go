package api

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"gapless/api/limit"
	"gapless/sse"
)

// CallCost is the most memory that a request takes while it is under way, in bytes: its header, the buffers of its
// response, and a stack. HTTP/2 takes about 50 KB of that.
const CallCost = 64 << 10

// outgoing is a response that is written in pieces. Each piece has the write timeout: a client that reads nothing of a
// piece for so long is gone. It counts among the responses under way until it has been written, or until uncount.
type outgoing struct {
	http.ResponseWriter
	timeout time.Duration
	places  *limit.Places
	taken   []taken
	since   time.Time // when the last piece was begun; zero: it has been written
	broken  bool      // the client takes no more
}

// taken is memory, in bytes, that counts against a caller.
type taken struct {
	places *limit.Places
	caller limit.Caller
	bytes  int
}

// piece is the maximum size of one write.
const piece = 16 << 10

// Unwrap supports http.ResponseController.
func (o *outgoing) Unwrap() http.ResponseWriter { return o.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (o *outgoing) WriteHeader(status int) {
	o.extend()
	o.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (o *outgoing) Write(p []byte) (n int, err error) {
	for {
		o.extend()
		o.since = time.Now()
		k, err := o.ResponseWriter.Write(p[:min(len(p), piece)])
		n += k
		if err == nil {
			o.since = time.Time{}
		}
		if p = p[k:]; err != nil || len(p) == 0 {
			o.broken = o.broken || err != nil
			return n, err
		}
	}
}

// extend moves the write deadline.
func (o *outgoing) extend() {
	if o.timeout > 0 {
		_ = http.NewResponseController(o.ResponseWriter).SetWriteDeadline(time.Now().Add(o.timeout))
	}
}

// take reserves memory for the response.
func (o *outgoing) take(c limit.Caller, bytes int) error { return o.takeOf(o.places, c, bytes) }

func (o *outgoing) takeOf(places *limit.Places, c limit.Caller, bytes int) error {
	err := places.Take(c, bytes)
	if err == nil {
		o.taken = append(o.taken, taken{places, c, bytes})
	}
	return err
}

// give releases what was taken.
func (o *outgoing) give() {
	for _, t := range o.taken {
		t.places.Give(t.caller, t.bytes)
	}
	o.taken = nil
}

// end is called when the handler has returned, or panicked. Over HTTP/2 the server would otherwise write the end of a short
// response after that, and wait for its client while nothing counts it.
func (o *outgoing) end(r *http.Request, returned bool) {
	if o.since.IsZero() {
		o.since = time.Now()
	}
	if returned && r.ProtoMajor > 1 {
		o.extend()
		_ = http.NewResponseController(o.ResponseWriter).Flush()
	}
	o.give()
	limit.Answered(sse.Conn(r.Context()), o.since)
}

// copied is a response into which a file is copied through a small pooled buffer.
type copied struct{ *echo.Response }

var buffers = sync.Pool{New: func() any { return new([piece]byte) }}

// ReadFrom implements io.ReaderFrom.
func (c copied) ReadFrom(from io.Reader) (int64, error) {
	b := buffers.Get().(*[piece]byte)
	defer buffers.Put(b)
	return io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{from}, b[:])
}

// out returns a call's response.
func out(c echo.Context) *outgoing { return c.Response().Writer.(*outgoing) }

// uncount stops counting a request among the responses under way; from now on it counts among viewers or uploads.
func uncount(c echo.Context) { out(c).give() }

// plain returns a response without the write timeout, for callers that set their own deadlines.
func plain(c echo.Context) http.ResponseWriter { return out(c).ResponseWriter }

// mostRefusing is how many responses at once explain that there are too many. Their clients might not read them, either.
const mostRefusing = 64

// mostShedding is how many at once say so by a status alone. Beyond that, connections are broken off.
const mostShedding = 1024

// admit admits a request. If there is no memory for it, admit returns nil and has sent a refusal, if that was possible at once.
func (a *API) admit(w http.ResponseWriter, r *http.Request) *outgoing {
	o := &outgoing{ResponseWriter: w, timeout: a.cfg.WriteTimeout, places: a.limits.Responses}
	if r.ProtoMajor == 1 && (r.URL.Path == "/healthz" || r.URL.Path == "/readyz") {
		return o // a busy node must not be taken for a dead one
	}
	conn := sse.Conn(r.Context())
	err := a.limits.Responses.Full()
	if err == nil && limit.IsStranger(conn) {
		// Half of the memory is reserved for callers that have shown a token, whoever fills the other half. This request may be the first to show one.
		if err = o.takeOf(a.limits.StrangerResponses, limit.Caller{}, CallCost); err != nil && a.showsToken(r) {
			limit.Known(conn)
			err = nil
		}
	}
	if err == nil {
		err = o.take(a.limits.Caller(r), CallCost)
	}
	if err == nil {
		return o
	}
	o.give()
	limit.Overdone(conn)
	if r.ProtoMajor == 1 && limit.IsStranger(conn) {
		o.Header().Set("Connection", "close") // the client may read nothing of this, and would stay for the idle timeout
	}
	o.Header().Set("X-Content-Type-Options", "nosniff") // as guard does for all others
	o.Header().Set("Cross-Origin-Resource-Policy", "same-origin")
	isView := r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/v1/sessions/") && strings.HasSuffix(r.URL.Path, "/stream") && !strings.Contains(r.URL.Path, "/ui-stream/")
	refusing := a.refusing.Add(1)
	defer a.refusing.Add(-1)
	if refusing > mostRefusing && r.ProtoMajor > 1 { // on a connection with many streams, a refused one must cost nothing
		defer limit.Shed(conn)
		if refusing > mostShedding || isView { // an EventSource reconnects after a broken stream, but never after such a status
			panic(http.ErrAbortHandler)
		}
		o.Header().Set("Retry-After", "5")
		o.WriteHeader(problemOf(err).Status) // without a body, which would occupy memory until the client reads it
		o.end(r, true)
		return nil
	}
	c := a.echo.NewContext(r, o)
	if isView {
		_ = a.sendFull(c, err)
	} else {
		a.problem(err, c)
	}
	o.end(r, true)
	return nil
}
