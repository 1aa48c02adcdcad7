package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"gapless/api/apitest"
	"gapless/api/model"
	"gapless/sse"
	"gapless/store"
	"gapless/store/storetest"
	"gapless/web"
)

// TestMain runs the tests and checks for goroutines that they left. If all tests ran, it also checks that they covered
// every response of the contract.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if code == 0 && !testing.Short() && nothingLeftOut() {
			for _, missing := range theContract().Unseen(func(o apitest.Outcome) bool {
				return o.Code == "internal" && cannotFail[o.Operation] || o.Operation == "getReadiness" && o.Code == "node_limit" /* over HTTP/2 only */
			}) {
				fmt.Fprintln(os.Stderr, "openapi.yaml lists what no test has seen:", missing)
				code = 1
			}
		}
		os.Exit(code)
	}))
}

// nothingLeftOut reports whether all tests ran.
func nothingLeftOut() bool {
	for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != "" {
			return false
		}
	}
	return true
}

// patience is how long a test waits while nothing happens.
const patience = storetest.Patience

// secret is a word in every message text of these tests. No log may contain it, at any level: every node checks that
// when its test ends.
const secret = "sesame"

// node is the API with everything that it needs, on a loopback socket.
type node struct {
	t      testing.TB
	api    *API
	hub    *sse.Hub
	store  *store.Store
	server *httptest.Server
	client *http.Client // its requests and responses are checked against the contract
	log    *logged
	active atomic.Int64 // uploads whose handler has not returned
	hushed []string     // more words that no log may contain
}

// setup contains what a test may change of a node.
type setup struct {
	store store.Config
	sse   sse.Config
	api   Config
	model model.Model
	logs  func(Logs) Logs // wraps the store
	// errors means that the test expects errors in the log.
	errors bool
}

func serve(t testing.TB, change func(*setup)) *node {
	t.Helper()
	n := &node{t: t, log: &logged{}}
	logger := slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := setup{store: store.DefaultConfig(), sse: sse.DefaultConfig(), api: DefaultConfig(), model: says("Yes, ", secret, "."), logs: func(l Logs) Logs { return l }}
	s.store.Logger, s.sse.Logger, s.api.Logger = logger, logger, logger
	s.sse.Node, s.api.Demo = "n1", true
	// Redis is slow to reply on a busy machine.
	s.store.Timeout = 30 * time.Second
	s.api.Limits.Addresses, s.api.Limits.Logger = false, logger // all tests have one address
	if change != nil {
		change(&s)
	}
	var err error
	if n.store, err = store.Open(s.store); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	returned := sse.NewReturned(listener.Addr()) // as in main: a client may reuse a stream's connection
	s.sse.Back = returned.Back
	n.hub = sse.NewHub(s.sse, n.store)
	n.api = New(s.api, s.logs(n.store), n.hub, s.model, web.Files, theContract().Text, prometheus.NewRegistry())
	n.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			n.active.Add(1)
			defer n.active.Add(-1)
		}
		n.api.ServeHTTP(w, r)
	}))
	n.server.Config.ConnContext = sse.WithConn
	n.server.Config.ReadTimeout = s.api.BodyTimeout
	n.server.Config.MaxHeaderBytes = 1 << 20
	_ = n.server.Listener.Close()
	n.server.Listener = n.api.Listener(listener)
	n.server.Config.ErrorLog = slog.NewLogLogger(logger.Handler(), slog.LevelDebug)
	n.server.Start()
	served := make(chan struct{})
	go func() { // ends below
		defer close(served)
		_ = n.server.Config.Serve(returned)
	}()
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 16}
	n.client = &http.Client{Transport: theContract().Transport(t, transport), CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(func() {
		n.api.End()
		n.hub.Drain(0)
		transport.CloseIdleConnections()
		_ = returned.Close()
		<-served
		n.server.Close()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		n.api.Wait(ctx)
		n.hub.Close()
		n.store.Close()
		text := n.log.String()
		for _, word := range append(n.hushed, secret) {
			if strings.Contains(text, word) {
				t.Errorf("%q is in the log:\n%s", word, text)
			}
		}
		if !s.errors && strings.Contains(text, "level=ERROR") {
			t.Errorf("there is an error in the log, of which nobody knows:\n%s", text)
		}
	})
	return n
}

// on puts a node on a real Redis.
func on(redis *storetest.Server) func(*setup) {
	return func(s *setup) { s.store.Redis = redis.URL() }
}

// logged collects a log.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// request is a request. All fields but method and path are optional.
type request struct {
	method, path string
	kind, body   string
	from         io.Reader // the body, instead
	header       map[string]string
	host         string
	bad          bool // the contract does not allow it, and the test is about that
}

// answer is the response to a request, read whole.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (n *node) new(q request) *http.Request {
	n.t.Helper()
	ctx := context.Background()
	if q.bad {
		ctx = apitest.Bad(ctx)
	}
	var body io.Reader
	switch {
	case q.from != nil:
		body = q.from
	case q.body != "":
		body = strings.NewReader(q.body)
	}
	r, err := http.NewRequestWithContext(ctx, q.method, n.server.URL+q.path, body)
	if err != nil {
		n.t.Fatal(err)
	}
	if q.kind != "" {
		r.Header.Set("Content-Type", q.kind)
	}
	for name, value := range q.header {
		r.Header.Set(name, value)
	}
	r.Host = q.host
	return r
}

func (n *node) do(q request) answer {
	n.t.Helper()
	r := n.new(q)
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	a, err := n.send(r.WithContext(ctx))
	if err != nil {
		n.t.Fatalf("%s %s: %v", q.method, q.path, err)
	}
	return a
}

func (n *node) send(r *http.Request) (answer, error) {
	// A stream that was taken over ends with its connection. A POST sent on it at that moment gets EOF.
	r.Close = strings.HasSuffix(r.URL.Path, "/stream")
	res, err := n.client.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, body}, err
}

func (n *node) get(path string) answer { n.t.Helper(); return n.do(request{method: "GET", path: path}) }

func (n *node) post(path, kind, body string) answer {
	n.t.Helper()
	return n.do(request{method: "POST", path: path, kind: kind, body: body})
}

// append appends JSON, and fails the test on an error.
func (n *node) append(session, body string) Stored {
	n.t.Helper()
	return into[Stored](n.t, n.post("/v1/sessions/"+session+"/chunks", typeJSON, body), 201)
}

// into decodes a response that must have a status.
func into[T any](t testing.TB, a answer, status int) (v T) {
	t.Helper()
	if a.status != status {
		t.Fatalf("%d instead of %d: %s", a.status, status, a.body)
	}
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("%s: %v", a.body, err)
	}
	return v
}

// refused checks that a response is a problem.
func (a answer) refused(t testing.TB, status int, code string) (p Problem) {
	t.Helper()
	if a.status < 400 {
		t.Fatalf("%d %s, instead of %d %s", a.status, a.body, status, code)
	}
	var openai struct {
		Error struct {
			Message, Param, Code string
			Limit                int
		}
	}
	err := json.Unmarshal(a.body, &openai)
	if p = (Problem{Code: openai.Error.Code, Detail: openai.Error.Message, Member: openai.Error.Param, Limit: openai.Error.Limit}); p.Code == "" {
		err = json.Unmarshal(a.body, &p)
	}
	if err != nil || a.status != status || p.Code != code {
		t.Fatalf("%d %s, instead of %d %s", a.status, a.body, status, code)
	}
	return p
}

// pageJSON is a page as clients see it.
type pageJSON struct {
	Epoch  string            `json:"epoch"`
	First  int64             `json:"first_seq"`
	Last   int64             `json:"last_seq"`
	Ended  bool              `json:"ended"`
	From   int64             `json:"from_seq"`
	Chunks []json.RawMessage `json:"chunks"`
}

func (n *node) page(session, query string) pageJSON {
	n.t.Helper()
	return into[pageJSON](n.t, n.get("/v1/sessions/"+session+"/chunks"+query), 200)
}

// chunk holds the members of a chunk that the tests use.
type chunk struct {
	Seq     int64  `json:"seq"`
	Type    string `json:"type"`
	Message string `json:"message_id"`
	Role    string `json:"role"`
	Content string `json:"content"`
	Reason  string `json:"reason"`
}

func decoded(t testing.TB, elements []json.RawMessage) []chunk {
	t.Helper()
	chunks := make([]chunk, len(elements))
	for i, e := range elements {
		if err := json.Unmarshal(e, &chunks[i]); err != nil {
			t.Fatalf("%s: %v", e, err)
		}
	}
	return chunks
}

// contents returns the contents of a session's chunks, in order.
func (n *node) contents(session string) (all []string) {
	n.t.Helper()
	for after := int64(0); ; {
		p := n.page(session, "?limit=1000&after="+strconv.FormatInt(after, 10))
		for _, c := range decoded(n.t, p.Chunks) {
			all = append(all, c.Content)
		}
		if after = p.From + int64(len(p.Chunks)) - 1; after >= p.Last {
			return all
		}
	}
}

// event is one event of a stream.
type event struct {
	name, data string
	id         int64
	chunk
}

// stream is a stream that is read event by event. Each event is checked against the contract.
type stream struct {
	t      testing.TB
	header http.Header
	status int
	body   *bufio.Reader
	beats  int // comment lines
	retry  int // ms
	stop   func()
}

// open begins to view. The stream is closed when the test ends, or by stop.
func (n *node) open(q request) *stream {
	n.t.Helper()
	q.method = "GET"
	r := n.new(q)
	ctx, cancel := storetest.Watch(r.Context(), n.t)
	res, err := n.client.Do(r.WithContext(ctx))
	if err != nil {
		cancel()
		n.t.Fatalf("GET %s: %v", q.path, err)
	}
	s := &stream{t: n.t, header: res.Header, status: res.StatusCode, body: bufio.NewReader(res.Body)}
	s.stop = sync.OnceFunc(func() { cancel(); _ = res.Body.Close() })
	n.t.Cleanup(s.stop)
	return s
}

func (n *node) watch(session, query string, header ...string) *stream {
	n.t.Helper()
	q := request{path: "/v1/sessions/" + session + "/stream" + query, header: map[string]string{}}
	for i := 0; i < len(header); i += 2 {
		q.header[header[i]] = header[i+1]
	}
	s := n.open(q)
	if s.status != 200 {
		n.t.Fatalf("GET %s: %d", q.path, s.status)
	}
	return s
}

// read reads the next event. It returns io.EOF if the stream ended cleanly, and not inside an event.
func (s *stream) read() (event, error) {
	e, lines := event{id: -1}, 0
	for {
		line, err := s.body.ReadString('\n')
		if err != nil {
			if err == io.EOF && (line != "" || lines > 0) {
				err = fmt.Errorf("a clean end inside an event: %q", line)
			}
			return e, err
		}
		line = strings.TrimSuffix(line, "\n")
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "":
			return e, s.check(e)
		case field == "":
			s.beats++
			continue
		case field == "event":
			e.name = value
		case field == "data":
			e.data = value
		case field == "id":
			if e.id, err = parseNumber(value); err != nil || value == "" {
				return e, fmt.Errorf("id %q", value)
			}
		case field == "retry":
			if s.retry, err = strconv.Atoi(value); err != nil {
				return e, fmt.Errorf("retry %q", value)
			}
			if e.name == "" {
				continue // outside an event: a viewer must reconnect
			}
		default:
			return e, fmt.Errorf("line %q", line)
		}
		lines++
	}
}

// check checks an event against the schema that the contract has for its name.
func (s *stream) check(e event) error {
	s.t.Helper()
	schema, ok := map[string]string{"": "Chunk", "welcome": "WelcomeEvent", "reset": "ResetEvent", "snapshot": "SnapshotEvent", "expired": "ExpiredEvent"}[e.name]
	if !ok || e.id < 0 && e.name != "expired" {
		return fmt.Errorf("no event of the contract's: %+v", e)
	}
	theContract().Holds(s.t, schema, []byte(e.data))
	theContract().Holds(s.t, "EventData", []byte(e.data))
	return json.Unmarshal([]byte(e.data), &e.chunk)
}

func (s *stream) next() event {
	s.t.Helper()
	e, err := s.read()
	if err != nil {
		s.t.Fatalf("instead of an event: %v", err)
	}
	storetest.Moved(s.t)
	if err := json.Unmarshal([]byte(e.data), &e.chunk); err != nil {
		s.t.Fatalf("%s: %v", e.data, err)
	}
	return e
}

// take reads n chunks, whose numbers must follow after, and returns their contents.
func (s *stream) take(after int64, n int) (said []string) {
	s.t.Helper()
	for i := range n {
		e := s.next()
		if want := after + int64(i) + 1; e.name != "" || e.id != want {
			s.t.Fatalf("%+v instead of chunk %d", e, want)
		}
		said = append(said, e.Content)
	}
	return said
}

// welcome reads the first event.
func (s *stream) welcome() (e event, data struct {
	Session, Epoch, Node, Connection string
	Cursor                           int64
	First                            int64 `json:"first_seq"`
	Last                             int64 `json:"last_seq"`
}) {
	s.t.Helper()
	if e = s.next(); e.name != "welcome" {
		s.t.Fatalf("%+v instead of welcome", e)
	}
	if err := json.Unmarshal([]byte(e.data), &data); err != nil {
		s.t.Fatal(err)
	}
	return e, data
}

// reset reads an event that must be a reset.
func (s *stream) reset(reason string) (e event, data struct {
	Epoch  string
	Cursor int64
	First  int64 `json:"first_seq"`
	Last   int64 `json:"last_seq"`
}) {
	s.t.Helper()
	if e = s.next(); e.name != "reset" || e.Reason != reason {
		s.t.Fatalf("%+v instead of reset %s", e, reason)
	}
	if err := json.Unmarshal([]byte(e.data), &data); err != nil {
		s.t.Fatal(err)
	}
	return e, data
}

// end reads the stream's end, and checks whether it is clean.
func (s *stream) end(clean bool) {
	s.t.Helper()
	e, err := s.read()
	switch {
	case err == nil:
		s.t.Fatalf("%+v instead of the end", e)
	case clean && err != io.EOF, !clean && (err == io.EOF || errors.Is(err, context.DeadlineExceeded)):
		s.t.Fatalf("the end is %v, clean should be %t", err, clean)
	}
}

// within waits for ch, and fails the test when that takes too long.
func within[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		t.Fatalf("waited in vain: %s", what)
	}
	return v
}

// eventually polls until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	storetest.Eventually(t, what, ok)
}

// faulty wraps Logs that fail as a test wants.
type faulty struct {
	Logs
	err    atomic.Pointer[error]
	append func(next func() (store.Appended, error)) (store.Appended, error)
}

func (f *faulty) fail(err error) { f.err.Store(&err) }

func (f *faulty) failure() error {
	if p := f.err.Load(); p != nil {
		return *p
	}
	return nil
}

func (f *faulty) Cancel(ctx context.Context, session, message string) (store.Cancelled, error) {
	if err := f.failure(); err != nil {
		return store.Cancelled{}, err
	}
	return f.Logs.Cancel(ctx, session, message)
}

func (f *faulty) MakeTicket(ctx context.Context, name, session string, until time.Time) error {
	if err := f.failure(); err != nil {
		return err
	}
	return f.Logs.MakeTicket(ctx, name, session, until)
}

func (f *faulty) EnterTicket(ctx context.Context, name, session, connection string) (time.Time, error) {
	if err := f.failure(); err != nil {
		return time.Time{}, err
	}
	return f.Logs.EnterTicket(ctx, name, session, connection)
}

func (f *faulty) Open(ctx context.Context, session string) (store.Bounds, []string, error) {
	if err := f.failure(); err != nil {
		return store.Bounds{}, nil, err
	}
	return f.Logs.Open(ctx, session)
}

func (f *faulty) Append(ctx context.Context, session string, b store.Batch) (store.Appended, error) {
	if err := f.failure(); err != nil {
		return store.Appended{}, err
	}
	next := func() (store.Appended, error) { return f.Logs.Append(ctx, session, b) }
	if f.append != nil {
		return f.append(next)
	}
	return next()
}

func (f *faulty) Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error) {
	if err := f.failure(); err != nil {
		return store.Page{}, err
	}
	return f.Logs.Read(ctx, session, from, bytes, count)
}

func (f *faulty) Create(ctx context.Context, session string) (store.Bounds, bool, error) {
	if err := f.failure(); err != nil {
		return store.Bounds{}, false, err
	}
	return f.Logs.Create(ctx, session)
}

func (f *faulty) Describe(ctx context.Context, session string) (store.Bounds, error) {
	if err := f.failure(); err != nil {
		return store.Bounds{}, err
	}
	return f.Logs.Describe(ctx, session)
}

func (f *faulty) Sessions(ctx context.Context, prefix, after string, count int) ([]store.Listed, error) {
	if err := f.failure(); err != nil {
		return nil, err
	}
	return f.Logs.Sessions(ctx, prefix, after, count)
}

func (f *faulty) Delete(ctx context.Context, session string) error {
	if err := f.failure(); err != nil {
		return err
	}
	return f.Logs.Delete(ctx, session)
}

func (f *faulty) Probe(ctx context.Context) error {
	if err := f.failure(); err != nil {
		return err
	}
	return f.Logs.Probe(ctx)
}

// says returns a model that says the same to every caller.
func says(pieces ...string) model.Model {
	return answers(func(context.Context, []model.Turn) iter.Seq2[model.Piece, error] {
		return func(yield func(model.Piece, error) bool) {
			for _, piece := range pieces {
				if !yield(model.Piece{Text: piece}, nil) {
					return
				}
			}
		}
	})
}

// answers makes a model from a function.
type answers func(context.Context, []model.Turn) iter.Seq2[model.Piece, error]

func (f answers) Answer(ctx context.Context, c []model.Turn) iter.Seq2[model.Piece, error] {
	return f(ctx, c)
}

// pageFiles returns the names of the page's files.
func pageFiles(t testing.TB) []string {
	t.Helper()
	names, err := fs.Glob(web.Files, "*.*")
	vendored, err2 := fs.Glob(web.Files, "vendor/*.*")
	if err != nil || err2 != nil || len(names) == 0 {
		t.Fatalf("%v %v %v %v", names, vendored, err, err2)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return name == "404.html" || name == "admin.html" }) // for other paths
	return append(names, vendored...)
}
