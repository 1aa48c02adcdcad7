// Package api is the HTTP face: it reads requests, chooses the status, and turns every
// error into a problem (problem.go has the one table). What a log is and how it gets to
// viewers is not decided here.
//
// Two rules come from EventSource. The stream answers transient trouble with 200 and
// holds the viewer, or breaks it off, since any other status ends an EventSource for
// good. And it ends a response cleanly only where the log has ended.
package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"gapless/api/auth"
	"gapless/api/limit"
	"gapless/api/model"
	"gapless/sse"
	"gapless/store"
)

// Config bounds what requests may ask for.
type Config struct {
	// ChunkMax bounds the event that a chunk makes in a stream, in bytes. 64 KiB, because
	// two common clients stop at longer ones by default.
	ChunkMax int
	// BodyMax bounds a body that is read whole, in bytes.
	BodyMax int
	// BodyTimeout is how long 64 KiB of such a body, or all of a shorter one, may take. It is the
	// http.Server's ReadTimeout as well.
	BodyTimeout time.Duration
	// WriteTimeout is how long a client may take nothing of a response. 0: for ever. Streams have the hub's.
	WriteTimeout time.Duration
	// URLMax and HeaderMax bound a request's URL and its header, in bytes: as most servers and
	// proxies do.
	URLMax, HeaderMax int
	// BatchMax bounds the chunks of one array, which are appended in one script call, during which Redis serves nobody
	// else: 1,000 chunks of a message each take it eight milliseconds. With a producer's numbers they take twice as long, so
	// half as many are allowed.
	BatchMax int
	// BatchBytes bounds the bytes of several of them: Redis takes some eight milliseconds for a MiB.
	BatchBytes int
	// Limits bounds what callers can make grow.
	Limits limit.Config
	// AnswerMax bounds what a model says in one answer, in bytes. 1 MiB is a book: a model that
	// does not stop is stopped.
	AnswerMax int
	// ContextMax bounds what of a conversation is sent along with a question, in bytes. 256 KiB
	// are some 60,000 tokens: what common models take.
	ContextMax int
	// Hosts are names by which a browser may call this server, beside localhost and IP
	// addresses. Nil: any, for servers that listen on other addresses than loopback.
	Hosts []string
	// UploadPatience is how long an upload, which cannot be repeated like a request, waits
	// for a Redis that is away.
	UploadPatience time.Duration
	// Look is how often an upload that says nothing asks whether it may go on. It is also
	// how it holds its messages, so it has to be well below the store's Grace.
	Look time.Duration
	// Auth says who may do what; nil: everybody may do everything. Its Close is its owner's.
	Auth *auth.Auth
	// Origins are those whose pages may call /v1, and may change something there, as
	// browsers name them: https://chat.example, with a port if it is not the scheme's own.
	Origins []string
	// Patience is how long a stream waits for Redis before it answers with a status:
	// later it cannot say 204 any more. Where that may be so, it waits until Redis is known to be away.
	Patience time.Duration
	// Demo adds the calls with which the page shows what goes wrong elsewhere (demo.go).
	Demo bool
	// Guide has the pages of /docs/guide, in Markdown (guide.go); nil: there is none.
	Guide fs.FS
	// Tracer follows requests and what they append; nil: nobody does.
	Tracer Tracer

	Logger *slog.Logger
}

// DefaultConfig is what the flags start from.
func DefaultConfig() Config {
	return Config{
		ChunkMax: 64 << 10, BodyMax: 8 << 20, BodyTimeout: 30 * time.Second, BatchMax: 1000, BatchBytes: 512 << 10, URLMax: 8 << 10, HeaderMax: 16 << 10, WriteTimeout: 45 * time.Second,
		AnswerMax: 1 << 20, ContextMax: 256 << 10,
		Limits: limit.DefaultConfig(),
		Hosts:  []string{}, Patience: 500 * time.Millisecond, UploadPatience: 10 * time.Second, Look: 2 * time.Second,
		Logger: slog.New(slog.DiscardHandler),
	}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	if least := store.Overhead + 256; c.ChunkMax < least {
		errs = append(errs, fmt.Errorf("-chunk-max: must be at least %d bytes (%d)", least, c.ChunkMax))
	}
	for _, n := range []struct {
		flag  string
		value int
		least int
	}{{"-body-max", c.BodyMax, 1 << 10}, {"-batch-max", c.BatchMax, 1}, {"-batch-bytes", c.BatchBytes, 1 << 10}, {"-url-max", c.URLMax, 512}, {"-header-max", c.HeaderMax, 1 << 10}} {
		if n.value < n.least {
			errs = append(errs, fmt.Errorf("%s: must be at least %d (%d)", n.flag, n.least, n.value))
		}
	}
	if c.BodyTimeout < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("-body-timeout: must be at least 100ms (%v)", c.BodyTimeout))
	}
	for flag, most := range map[string]int{"-bodies": c.Limits.Bodies, "-caller-bodies": c.Limits.CallerBodies} {
		if most > 0 && most < BodyCost*c.BodyMax {
			errs = append(errs, fmt.Errorf("%s: %d bytes are less than one body may need, three times %d (-body-max)", flag, most, c.BodyMax))
		}
	}
	for flag, most := range map[string]int{"-responses": c.Limits.Responses, "-caller-responses": c.Limits.CallerResponses} {
		if least := CallCost + partCost; most > 0 && most < least {
			errs = append(errs, fmt.Errorf("%s: %d bytes are less than one page may need, %d", flag, most, least))
		}
	}
	errs = append(errs, c.Limits.Validate())
	for _, o := range c.Origins {
		// A browser that names it otherwise would never be let in; * would let everybody in who has a cookie.
		if !isOrigin(o) {
			errs = append(errs, fmt.Errorf("-cors-origins: %q is not an origin: use https://host or https://host:port, without the scheme's default port; * is not allowed", o))
		}
	}
	if c.AnswerMax < 1 {
		errs = append(errs, fmt.Errorf("-model-answer-max: must be at least 1 (%d)", c.AnswerMax))
	}
	if c.ContextMax < 0 {
		errs = append(errs, fmt.Errorf("-model-context: must not be negative (%d)", c.ContextMax))
	}
	return errors.Join(errs...)
}

// Logs is what the calls need of the store. The methods' contracts are store.Store's.
type Logs interface {
	Append(ctx context.Context, session string, b store.Batch) (store.Appended, error)
	Cancel(ctx context.Context, session, message string) (store.Cancelled, error)
	Open(ctx context.Context, session string) (store.Bounds, []string, error)
	Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error)
	Create(ctx context.Context, session string) (store.Bounds, bool, error)
	Describe(ctx context.Context, session string) (store.Bounds, error)
	Delete(ctx context.Context, session string) error
	Sessions(ctx context.Context, prefix, after string, count int) ([]store.Listed, error)
	Probe(ctx context.Context) error
	Writes() string
	ListenUploads(l store.Listener) (stop func())
	MakeTicket(ctx context.Context, name, session string, until time.Time) error
	EnterTicket(ctx context.Context, name, session, connection string) (until time.Time, err error)
	RenewTicket(ctx context.Context, name, session, connection string, until time.Time) error
	ListenTickets(l store.Listener) (stop func())
	Overhear(ctx context.Context, session string, begun func(), heard func(payload string)) error
}

// API answers requests. It owns the answers of the model that are under way.
type API struct {
	cfg   Config
	logs  Logs
	hub   *sse.Hub
	model model.Model
	log   *slog.Logger
	echo  *echo.Echo

	registry *prometheus.Registry
	metrics  *metrics

	wrongTypes *rate.Sometimes           // lines of the log about keys of a wrong type
	heard      atomic.Pointer[time.Time] // when the last call of /v1 came
	limits     *limit.Limits
	// refusing is how many responses under way only say that there are too many.
	refusing atomic.Int64
	answers  underway
	folds    chan struct{} // a place for each fold of a log that is being made
	uploads  *uploads
	tickets  *tickets
	demo     *demo // nil: there is none
	// draining ends first: not ready any more. ending ends uploads and answers.
	draining, ending context.Context
	drain            context.CancelFunc
	end              context.CancelCauseFunc
}

// New wires the calls. files is the page, contract the text of openapi.yaml, registry what
// is served at /metrics: New adds the calls' own.
func New(cfg Config, logs Logs, hub *sse.Hub, m model.Model, files fs.FS, contract []byte, registry *prometheus.Registry) *API {
	a := &API{cfg: cfg, logs: logs, hub: hub, model: m, log: cfg.Logger, echo: echo.New(), registry: registry, limits: limit.New(cfg.Limits), folds: make(chan struct{}, foldsMost),
		wrongTypes: &rate.Sometimes{Interval: time.Minute}}
	a.draining, a.drain = context.WithCancel(context.Background())
	a.ending, a.end = context.WithCancelCause(context.Background())
	a.uploads = &uploads{logs: logs, api: a, all: map[string]map[*upload]struct{}{}}
	a.tickets = &tickets{logs: logs, all: map[string]map[*admission]struct{}{}}

	e := a.echo
	e.HideBanner, e.HidePort = true, true
	e.IPExtractor = a.limits.Client
	e.HTTPErrorHandler = a.problem
	a.metrics = newMetrics(a)
	e.Pre(a.partInDrain, a.metrics.observe, a.guard()) // what is refused is counted too
	if cfg.Tracer != nil {
		e.Pre(a.traceRoute)
	}
	e.Use(middleware.RecoverWithConfig(middleware.RecoverConfig{LogErrorFunc: func(_ echo.Context, err error, stack []byte) error {
		a.log.Error("panic in a request", slog.Any("err", err), slog.String("stack", string(stack)))
		return err
	}}))
	if len(cfg.Origins) > 0 {
		e.Use(a.share())
	}

	a.get("/healthz", func(c echo.Context) error { return c.JSON(http.StatusOK, map[string]string{"status": "ok"}) })
	a.get("/readyz", a.ready) // it asks Redis, but not more often than twice a second
	a.get("/openapi.yaml", func(c echo.Context) error { return c.Blob(http.StatusOK, "application/yaml", contract) })
	a.get("/metrics", echo.WrapHandler(a.serveMetrics()), a.pace, a.operate)
	a.page(files)
	a.docs(files)

	// Each route has its own check: a group's would answer every other method with 404.
	a.call("POST", "/v1/sessions", auth.Write, decode(a.createSession)) // whose body names it
	a.call("GET", "/v1/sessions", auth.Admin, a.listSessions)           // of all
	a.call("POST", onePath, auth.Write, a.createNamed)
	a.call("GET", onePath, auth.Read, a.describeSession)
	a.call("DELETE", onePath, auth.Admin, a.deleteSession)
	a.call("POST", onePath+"/chunks", auth.Write, decode(a.appendChunks))
	a.call("GET", onePath+"/chunks", auth.Read, a.readChunks)
	a.call("GET", onePath+"/digest", auth.Read, a.readDigest)
	a.call("GET", streamPath, auth.Read, a.stream)
	a.call("POST", onePath+"/tickets", auth.Read, a.createTicket)
	a.call("POST", onePath+"/messages", auth.Ask, decode(a.ask))
	a.call("GET", onePath+"/messages", auth.Read, a.readMessages)
	a.call("GET", onePath+"/messages/:message_id", auth.Read, a.readMessage)
	a.call("POST", onePath+"/cancel", auth.Cancel, decode(a.cancel))
	a.call("POST", onePath+"/messages/:message_id/stop", auth.Cancel, a.stopMessage)
	a.call("GET", onePath+"/messages/:message_id/ui-stream", auth.Read, a.uiMessage)
	a.call("GET", onePath+"/ui-stream", auth.Read, a.uiResume)
	a.call("POST", onePath+"/ui-stream", auth.Ask, decode(a.uiAsk))
	a.call("GET", onePath+"/ui-stream/:message_id/stream", auth.Read, a.uiRun)
	a.routeOpenAI()
	if cfg.Demo {
		a.demo = &demo{naive: map[string]naiveViewer{}}
		a.call("POST", onePath+"/demo", auth.Read, decode(a.disturb))
		a.call("GET", onePath+"/demo/naive", auth.Read, a.readFirst)
	}
	a.metrics.begin(e.Routes())
	return a
}

const (
	onePath    = "/v1/sessions/:id"
	streamPath = onePath + "/stream"
)

// get registers a path that can be read. HEAD is the same call: the server leaves out the body.
func (a *API) get(path string, h echo.HandlerFunc, m ...echo.MiddlewareFunc) {
	a.echo.GET(path, h, m...)
	a.echo.HEAD(path, h, m...)
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	limit.Arrived(sse.Conn(r.Context()))
	if len(r.TransferEncoding) > 0 {
		// It may have had a Content-Length as well, which a proxy in front may have believed: what follows on the
		// connection is not to be trusted (RFC 9112, section 6.1). The library does not say.
		w.Header().Set("Connection", "close")
	}
	o := a.admit(w, r)
	if o == nil {
		return
	}
	returned := false
	defer func() { o.end(r, returned) }()
	if r.ContentLength != 0 {
		r.Body = &incoming{ReadCloser: r.Body, to: w, length: r.ContentLength, timeout: a.cfg.BodyTimeout, write: a.cfg.WriteTimeout}
	}
	if strings.HasPrefix(r.URL.Path, "/v1/") || isOpenAI(r) {
		now := time.Now()
		a.heard.Store(&now)
	}
	a.echo.ServeHTTP(o, r)
	returned = true
}

// partInDrain has the client's next request come on another connection while this node
// drains: one that is closed while it lies idle may be closed just when the client sends something.
// Over HTTP/2 the same header makes a GOAWAY: what is under way on the connection goes on.
func (a *API) partInDrain(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		c.Response().Before(func() {
			if a.draining.Err() != nil {
				c.Response().Header().Set("Connection", "close")
			}
		})
		return next(c)
	}
}

// Listener bounds the connections that come from l.
func (a *API) Listener(l net.Listener) net.Listener { return a.limits.Listener(l) }

// Drain says at /readyz that this node wants no more requests.
func (a *API) Drain() { a.drain() }

// Quiet waits, until ctx ends, for a time without any call: until those who send them here
// have seen that this node is not ready.
func (a *API) Quiet(ctx context.Context, long time.Duration) {
	for ctx.Err() == nil {
		last := a.heard.Load()
		if last == nil {
			return
		}
		rest := long - time.Since(*last)
		if rest <= 0 {
			return
		}
		select {
		case <-time.After(rest):
		case <-ctx.Done():
		}
	}
}

// End ends uploads with what they have stored, and answers with a failed chunk.
func (a *API) End() {
	a.drain()
	a.end(errDraining)
}

// Wait waits, until ctx ends, for the answers that are under way.
func (a *API) Wait(ctx context.Context) { a.answers.wait(ctx) }

// readiness is what a node says of itself that is ready.
type readiness struct {
	Status string `json:"status"`
	Writes string `json:"writes"` // store.WritesOK, or the code of why Redis refuses them
}

// ready says whether this node can serve viewers, and with ?for=writes whether it can take chunks as well. A Redis that is
// full must not take every node, and with it all viewers, out of a balancer.
func (a *API) ready(c echo.Context) error {
	all := c.QueryParams()["for"]
	if len(all) > 1 || len(all) == 1 && all[0] != "writes" {
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "for", Detail: "for must be writes, or be left out"}
	}
	if a.draining.Err() != nil {
		return errDraining
	}
	ctx, cancel := context.WithTimeout(c.Request().Context(), time.Second)
	defer cancel()
	if err := a.logs.Probe(ctx); err != nil {
		if !errors.Is(err, store.ErrAway) {
			err = fmt.Errorf("%w: %w", store.ErrAway, err)
		}
		p := *problemOf(err)
		p.Writes = store.Why(err)
		return &p
	}
	if err := a.keysReady(ctx); err != nil {
		return err
	}
	writes := a.logs.Writes()
	if writes != store.WritesOK && len(all) > 0 {
		p := *problemOf(&store.AwayError{Code: writes, Err: store.ErrAway})
		p.Writes = writes
		return &p
	}
	return c.JSON(http.StatusOK, readiness{Status: "ready", Writes: writes})
}

// page serves the page and its parts under the strictest policy that lets it work.
func (a *API) page(files fs.FS) {
	server := http.FileServerFS(files)
	h := func(c echo.Context) error {
		forPeople(c.Response().Header(), "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "+
			"img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
		if name := c.Path(); strings.HasPrefix(name, "/gapless.") { // the client is for others' pages, which import it with CORS
			c.Response().Header().Set("Access-Control-Allow-Origin", "*")
			if strings.HasSuffix(name, ".ts") {
				c.Response().Header().Set("Content-Type", "application/typescript; charset=utf-8") // of this name most systems know a video
			}
		}
		server.ServeHTTP(copied{c.Response()}, c.Request())
		return nil
	}
	a.get("/", h)
	for _, pattern := range []string{"*.*", "vendor/*.*"} {
		names, err := fs.Glob(files, pattern)
		if err != nil {
			panic(err) // the patterns are constants
		}
		for _, name := range names {
			a.get("/"+name, h)
		}
	}
}

// forPeople sets what a page that is shown in a browser says beside its policy.
func forPeople(h http.Header, policy string) {
	h.Set("Content-Security-Policy", policy)
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()")
	h.Set("Referrer-Policy", "no-referrer") // the session's id is in the page's address
	h.Set("Cache-Control", "no-cache")
}

// checkHost keeps a web page from reaching a loopback server through a name of its own
// that it points here (DNS rebinding): no page can choose to be called by an address.
func (a *API) checkHost(r *http.Request) error {
	if a.cfg.Hosts == nil || r.Host == "" { // HTTP/1.0 may have none, as some health checks; browsers always send it
		return nil
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") || net.ParseIP(strings.Trim(host, "[]")) != nil || slices.Contains(a.cfg.Hosts, host) {
		return nil
	}
	return &Problem{Status: http.StatusMisdirectedRequest, Code: "host_not_allowed", Member: "Host",
		Detail: fmt.Sprintf("unknown host %q: add it to -hosts if it is a name of this server", host)}
}

const idRule = "an id must have 1 to 128 of the characters A-Z a-z 0-9 . _ ~ -, and not only dots"

// validID refuses dots alone, too: in a path, clients and proxies take them for steps.
func validID(id string) bool {
	if len(id) < 1 || len(id) > 128 || strings.Trim(id, ".") == "" {
		return false
	}
	for _, b := range []byte(id) {
		if (b < 'a' || b > 'z') && (b < 'A' || b > 'Z') && (b < '0' || b > '9') && !strings.ContainsRune("._~-", rune(b)) {
			return false
		}
	}
	return true
}

func checkID(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if !validID(session(c)) {
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_session_id", Member: "id", Limit: 128, Detail: idRule}
		}
		return next(c)
	}
}

// param is a part of the path.
func param(c echo.Context, name string) string {
	text := c.Param(name)
	if c.Request().URL.RawPath != "" { // then the router matched the escaped path
		if plain, err := url.PathUnescape(text); err == nil {
			return plain
		}
	}
	return text
}

// session is the session that the path names.
func session(c echo.Context) string { return param(c, "id") }

var errDraining = errors.New("draining")
