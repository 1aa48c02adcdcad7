// Package api is the HTTP interface: it reads requests, chooses the status, and turns every
// error into a problem (problem.go has the only table). It does not decide what a log is, or how a log
// reaches its viewers.
//
// Two rules come from EventSource. A stream responds to transient trouble with 200 and
// holds the viewer, or breaks the connection, because any other status ends an EventSource for
// good. And it ends a response cleanly only if the log has ended.
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
	// ChunkMax limits the size of the event that a chunk becomes in a stream, in bytes. The default is 64 KiB, because
	// two common clients stop at longer events by default.
	ChunkMax int
	// BodyMax limits the size of a body that is read as a whole, in bytes.
	BodyMax int
	// BodyTimeout is how long 64 KiB of such a body, or all of a shorter one, may take. It is also the
	// http.Server's ReadTimeout.
	BodyTimeout time.Duration
	// WriteTimeout is how long a client may read nothing of a response. 0: no limit. Streams have the hub's timeout instead.
	WriteTimeout time.Duration
	// URLMax and HeaderMax limit a request's URL and its header, in bytes. The defaults are those of most servers and
	// proxies.
	URLMax, HeaderMax int
	// BatchMax limits the chunks of one array. One script call appends them, and Redis serves no other client
	// meanwhile: 1,000 chunks of a message each take eight milliseconds. With a producer's numbers they take twice as long, so
	// half as many are allowed.
	BatchMax int
	// BatchBytes limits the bytes of an array of several chunks: Redis takes about eight milliseconds per MiB.
	BatchBytes int
	// Limits limits everything that callers can make grow.
	Limits limit.Config
	// AnswerMax limits what a model says in one answer, in bytes. 1 MiB is a book: a model that
	// does not stop is stopped.
	AnswerMax int
	// ContextMax limits how much of a conversation is sent along with a question, in bytes. 256 KiB
	// are about 60,000 tokens, which common models accept.
	ContextMax int
	// Hosts are the names by which a browser may call this server, in addition to localhost and IP
	// addresses. Nil: any name, for servers that do not listen on loopback.
	Hosts []string
	// UploadPatience is how long an upload waits for a Redis that is away. Unlike a request, an upload
	// cannot be repeated.
	UploadPatience time.Duration
	// Look is how often a silent upload checks whether it may continue. The check also
	// keeps its messages open, so Look must be well below the store's Grace.
	Look time.Duration
	// Auth decides who may do what. Nil: everybody may do everything. Its owner closes it.
	Auth *auth.Auth
	// Origins are the origins whose pages may call /v1, and may change something there, in
	// the form that browsers use: https://chat.example, with a port unless it is the scheme's default.
	Origins []string
	// Patience is how long a stream waits for Redis before it sends its status. After that
	// it can no longer send 204. If 204 is possible, it waits until Redis is known to be away.
	Patience time.Duration
	// Demo adds the calls with which the page shows what goes wrong with other servers (demo.go).
	Demo bool
	// Guide has the pages of /docs/guide, in Markdown (guide.go); nil: there is none.
	Guide fs.FS
	// Tracer traces requests and what they append. Nil: no tracing.
	Tracer Tracer
	// Forgetful means that the store keeps everything in memory only. The page says so.
	Forgetful bool

	Logger *slog.Logger
}

// DefaultConfig returns the defaults of the flags.
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
		// A browser sends exactly this form, so any other would never match; * would admit every site with the user's cookie.
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

// Logs is the part of the store that the calls need. The methods' contracts are store.Store's.
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

// API serves requests. It owns the model's answers that are under way.
type API struct {
	cfg   Config
	logs  Logs
	hub   *sse.Hub
	model model.Model
	log   *slog.Logger
	echo  *echo.Echo

	registry *prometheus.Registry
	metrics  *metrics
	notFound []byte // the page for a path that does not exist

	wrongTypes *rate.Sometimes           // log lines about keys of a wrong type
	heard      atomic.Pointer[time.Time] // when the last call of /v1 arrived
	limits     *limit.Limits
	// refusing is the number of responses under way that only say that there are too many.
	refusing atomic.Int64
	answers  underway
	folds    chan struct{} // one place per fold of a log that is being made
	uploads  *uploads
	tickets  *tickets
	demo     *demo // nil without Config.Demo
	// draining ends first: the node is no longer ready. ending ends uploads and answers.
	draining, ending context.Context
	drain            context.CancelFunc
	end              context.CancelCauseFunc
}

// New registers the calls. files contains the page, contract is the text of openapi.yaml, and registry is
// served at /metrics. New adds the calls' own metrics to it.
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
	e.Pre(a.partInDrain, a.metrics.observe, a.guard()) // refused requests are counted too
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
	a.get("/readyz", a.ready) // asks Redis, but at most twice a second
	a.get("/openapi.yaml", func(c echo.Context) error { return c.Blob(http.StatusOK, "application/yaml", contract) })
	a.get("/metrics", echo.WrapHandler(a.serveMetrics()), a.pace, a.operate)
	a.page(files)
	a.docs(files)

	// Each route has its own check: a group's check would respond to every other method with 404.
	a.call("POST", "/v1/sessions", auth.Write, decode(a.createSession)) // the body names the session
	a.call("GET", "/v1/sessions", auth.Admin, a.listSessions)           // of all sessions
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

// get registers a path for reading. HEAD makes the same call: the server leaves out the body.
func (a *API) get(path string, h echo.HandlerFunc, m ...echo.MiddlewareFunc) {
	a.echo.GET(path, h, m...)
	a.echo.HEAD(path, h, m...)
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	limit.Arrived(sse.Conn(r.Context()))
	if len(r.TransferEncoding) > 0 {
		// It may also have had a Content-Length, which a proxy in front may have believed. Then nothing that follows on the
		// connection can be trusted (RFC 9112, section 6.1). The library does not tell us.
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

// partInDrain makes the client send its next request on another connection while this node
// drains. Otherwise an idle connection might be closed just when the client sends something.
// Over HTTP/2 the same header causes a GOAWAY: the requests under way on the connection continue.
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

// Listener limits the connections that l accepts.
func (a *API) Listener(l net.Listener) net.Listener { return a.limits.Listener(l) }

// Drain makes /readyz say that this node wants no more requests.
func (a *API) Drain() { a.drain() }

// Quiet waits, until ctx ends, for a period of length long without any call. By then those who send
// calls here have seen that this node is not ready.
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

// End ends uploads, which keep what they have stored, and ends answers with a failed chunk.
func (a *API) End() {
	a.drain()
	a.end(errDraining)
}

// Wait waits for the answers under way, until ctx ends.
func (a *API) Wait(ctx context.Context) { a.answers.wait(ctx) }

// readiness is the body that a ready node sends.
type readiness struct {
	Status string `json:"status"`
	Writes string `json:"writes"` // store.WritesOK, or the code of the reason for which Redis refuses writes
	// Data is "memory" if everything is lost when the process ends.
	Data string `json:"data,omitzero"`
}

// ready responds whether this node can serve viewers and, with ?for=writes, whether it can also store chunks. A full
// Redis must not take every node, and with it all viewers, out of a balancer.
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
	is := readiness{Status: "ready", Writes: writes}
	if a.cfg.Forgetful {
		is.Data = "memory"
	}
	return c.JSON(http.StatusOK, is)
}

// pagePolicy is the strictest policy with which the page works.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

const (
	notFoundPage = "404.html"   // tells people that a path does not exist
	adminPage    = "admin.html" // is at /admin
)

// page serves the page, the page for administrators, and their parts. What the latter shows needs a right
// (listSessions, serveMetrics); the page itself is open, and asks for a token.
func (a *API) page(files fs.FS) {
	var err error
	if a.notFound, err = fs.ReadFile(files, notFoundPage); err != nil {
		panic(err) // it is in the binary
	}
	admin, err := fs.ReadFile(files, adminPage)
	if err != nil {
		panic(err) // it is in the binary
	}
	a.get("/admin", doc(adminPage, pagePolicy, admin))
	server := http.FileServerFS(files)
	h := func(c echo.Context) error {
		forPeople(c.Response().Header(), pagePolicy)
		if name := c.Path(); strings.HasPrefix(name, "/gapless.") { // pages of other sites import the client with CORS
			c.Response().Header().Set("Access-Control-Allow-Origin", "*")
			if strings.HasSuffix(name, ".ts") {
				c.Response().Header().Set("Content-Type", "application/typescript; charset=utf-8") // most systems take .ts for a video
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
			if name != notFoundPage && name != adminPage {
				a.get("/"+name, h)
			}
		}
	}
}

// forPeople sets the headers, besides the policy, of a page that a browser shows.
func forPeople(h http.Header, policy string) {
	h.Set("Content-Security-Policy", policy)
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()")
	h.Set("Referrer-Policy", "no-referrer") // the session's id is in the page's address
	h.Set("Cache-Control", "no-cache")
}

// checkHost keeps a web page from reaching a loopback server through a host name that
// the page's owner points here (DNS rebinding). An IP address needs no check, because it cannot be pointed elsewhere.
func (a *API) checkHost(r *http.Request) error {
	if a.cfg.Hosts == nil || r.Host == "" { // HTTP/1.0, as some health checks use it, may have none; browsers always send it
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

// validID reports whether an id is valid. It refuses dots alone: in a path, clients and proxies resolve them as steps.
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

// param returns a parameter of the path, unescaped.
func param(c echo.Context, name string) string {
	text := c.Param(name)
	if c.Request().URL.RawPath != "" { // then the router matched the escaped path
		if plain, err := url.PathUnescape(text); err == nil {
			return plain
		}
	}
	return text
}

// session returns the session that the path names.
func session(c echo.Context) string { return param(c, "id") }

var errDraining = errors.New("draining")
