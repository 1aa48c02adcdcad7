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

// CallCost is what a request takes in memory while it is under way, at most, in bytes: its header, the buffers of its
// response, and a stack. Of HTTP/2 that is some 50 KB.
const CallCost = 64 << 10

// outgoing is a response that is written in pieces, each of which has the write timeout: who takes nothing of a
// piece for so long is gone. It counts among the responses under way until it has been answered, or counts among others.
type outgoing struct {
	http.ResponseWriter
	timeout time.Duration
	places  *limit.Places
	taken   []taken
	since   time.Time // when the last piece was begun; zero: it is written
	broken  bool      // the client takes no more
}

// taken is bytes that count for a caller.
type taken struct {
	places *limit.Places
	caller limit.Caller
	bytes  int
}

// piece is how much is written at once.
const piece = 16 << 10

// Unwrap is for http.ResponseController.
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

// extend moves the deadline.
func (o *outgoing) extend() {
	if o.timeout > 0 {
		_ = http.NewResponseController(o.ResponseWriter).SetWriteDeadline(time.Now().Add(o.timeout))
	}
}

// take takes memory for the response.
func (o *outgoing) take(c limit.Caller, bytes int) error { return o.takeOf(o.places, c, bytes) }

func (o *outgoing) takeOf(places *limit.Places, c limit.Caller, bytes int) error {
	err := places.Take(c, bytes)
	if err == nil {
		o.taken = append(o.taken, taken{places, c, bytes})
	}
	return err
}

// give gives back what was taken.
func (o *outgoing) give() {
	for _, t := range o.taken {
		t.places.Give(t.caller, t.bytes)
	}
	o.taken = nil
}

// end is called when the handler has returned, or panicked. Over HTTP/2 the server would write the end of a short response
// afterwards, and wait for its client where nobody counts it.
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

// copied is a response into which a file is copied, through a small buffer that others use afterwards.
type copied struct{ *echo.Response }

var buffers = sync.Pool{New: func() any { return new([piece]byte) }}

// ReadFrom implements io.ReaderFrom.
func (c copied) ReadFrom(from io.Reader) (int64, error) {
	b := buffers.Get().(*[piece]byte)
	defer buffers.Put(b)
	return io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{from}, b[:])
}

// out is a call's response.
func out(c echo.Context) *outgoing { return c.Response().Writer.(*outgoing) }

// uncount says that a request counts among viewers or uploads now, and not among responses under way.
func uncount(c echo.Context) { out(c).give() }

// plain is a response without a deadline of its own, for those who watch over it themselves.
func plain(c echo.Context) http.ResponseWriter { return out(c).ResponseWriter }

// mostRefusing is how many responses say at once that there are too many. Nobody has to read those, either.
const mostRefusing = 64

// mostShedding is how many say so at once in a status alone. What is beyond that is broken off.
const mostShedding = 1024

// admit takes a request in: nil if there is no memory for it, which has been said then, if that was possible at once.
func (a *API) admit(w http.ResponseWriter, r *http.Request) *outgoing {
	o := &outgoing{ResponseWriter: w, timeout: a.cfg.WriteTimeout, places: a.limits.Responses}
	if r.ProtoMajor == 1 && (r.URL.Path == "/healthz" || r.URL.Path == "/readyz") {
		return o // a node that is busy is not to be taken for one that is dead
	}
	conn := sse.Conn(r.Context())
	err := a.limits.Responses.Full()
	if err == nil && limit.IsStranger(conn) {
		// Half of the memory is for those who have shown a token, whoever fills the other half. This may be the request that shows it.
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
		o.Header().Set("Connection", "close") // it may read nothing of this, and would stay for the idle timeout
	}
	o.Header().Set("X-Content-Type-Options", "nosniff") // as guard does for all others
	o.Header().Set("Cross-Origin-Resource-Policy", "same-origin")
	isView := r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/v1/sessions/") && strings.HasSuffix(r.URL.Path, "/stream") && !strings.Contains(r.URL.Path, "/ui-stream/")
	refusing := a.refusing.Add(1)
	defer a.refusing.Add(-1)
	if refusing > mostRefusing && r.ProtoMajor > 1 { // on a connection of many streams one that is refused must cost nothing
		defer limit.Shed(conn)
		if refusing > mostShedding || isView { // an EventSource comes back from a broken stream, and never from a status
			panic(http.ErrAbortHandler)
		}
		o.Header().Set("Retry-After", "5")
		o.WriteHeader(problemOf(err).Status) // without a body, for which the client would have to make room
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
