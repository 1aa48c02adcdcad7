// Package test runs the built program, with the race detector, as users meet it: with processes, sockets, signals, and a real
// redis-server. Its working directory is the root of the repository.
//
//   - main_test.go has the harness: node is a running program, viewer is a client that records what it must never see, and foreign is a program
//     that writes to Redis itself. gapcheck_test.go runs producers and viewers against several nodes, and compares.
//   - torture_test.go runs everything at once, from a seed (make torture).
//   - siege_*_test.go have one caller do its worst next to a neighbour (make siege).
//   - bench_*_test.go measure whole scenarios next to a server that checks nothing (make bench).
//   - Every other file tests what its name says.
package test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gapless/api/apitest"
	"gapless/store/storetest"
)

// binary is the path of the program, built once.
var binary string

// roles are other programs in this test binary. If its last argument names one, it runs that with the other arguments,
// instead of tests.
var roles = map[string]func(args []string){}

func TestMain(m *testing.M) {
	last := len(os.Args) - 1
	if role := roles[os.Args[last]]; role != nil {
		role(os.Args[1:last])
		return
	}
	if err := os.Chdir(".."); err != nil {
		panic(err)
	}
	dir, err := os.MkdirTemp("", "gapless-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "gapless")
	build := exec.Command("go", "build", "-race", "-o", binary, ".")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	code := 1
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the program:", err)
	} else {
		flag.Parse()
		storetest.Standstill()
		code = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// plainProgram returns the program without the race detector, which costs memory and time.
func plainProgram(t testing.TB) string {
	t.Helper()
	path := filepath.Join(filepath.Dir(binary), "plain")
	if err := buildPlain(path); err != nil {
		t.Fatal(err)
	}
	return path
}

var buildPlain = func() func(path string) error {
	var once sync.Once
	var err error
	return func(path string) error {
		once.Do(func() {
			if out, failed := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); failed != nil {
				err = fmt.Errorf("%w\n%s", failed, out)
			}
		})
		return err
	}
}()

// patience is how long a test waits while nothing happens.
const patience = storetest.Patience

// exchange limits the time of a request and its whole response. An upload may take long.
const exchange = 5 * patience

// deadline returns a context that ends with the test, or when nothing has happened for patience. Something happens when
// a viewer receives an event, a node responds, or eventually returns.
func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := storetest.Watch(t.Context(), t)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls until ok returns true, and fails the test if that takes too long.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	storetest.Eventually(t, what, ok)
}

// buffer collects a process's output while others read it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// node is a running gapless.
type node struct {
	t      testing.TB
	scheme string
	addr   string
	cmd    *exec.Cmd
	log    buffer
	http   *http.Client
	// token is sent with requests of http, unless it is empty.
	token string
	// judged means that its responses are checked against the contract. Other nodes are measured, or are not this
	// program.
	judged bool

	begun  time.Time
	exited chan struct{} // closed when the process has ended, and state is set
	state  *os.ProcessState
	told   sync.Once // sends one SIGTERM only: a second signal would stop it at once
	killed atomic.Bool
}

// start starts a node on a free port and waits until it is ready.
func start(t *testing.T, args ...string) *node {
	t.Helper()
	n := launch(t, args...)
	n.waitReady()
	return n
}

// launch starts a node and waits until it listens. At the end of the test it gets SIGTERM, and must exit with 0, which
// the race detector prevents if it found a race.
func launch(t *testing.T, args ...string) *node {
	t.Helper()
	return launchProgram(t, binary, args...)
}

// startProgram is start for a program other than the one with the race detector.
func startProgram(t testing.TB, program string, args ...string) *node {
	t.Helper()
	n := launchProgram(t, program, args...)
	n.waitReady()
	return n
}

func launchProgram(t testing.TB, program string, args ...string) *node {
	t.Helper()
	w, args := wayOf(t, args)
	n := &node{t: t, exited: make(chan struct{}), scheme: w.scheme(), judged: program == binary}
	n.http = &http.Client{Transport: &bearer{w.client.Transport.(*http.Transport), n}, Timeout: w.client.Timeout}
	n.cmd = exec.Command(program, append([]string{"-listen", "127.0.0.1:0", "-drain", "1s", "-log-level", "debug"}, args...)...)
	n.cmd.Dir = t.TempDir()
	n.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0") // otherwise it sleeps a second
	n.cmd.Stdout, n.cmd.Stderr = &n.log, &n.log
	n.begun = time.Now()
	if err := n.cmd.Start(); err != nil {
		t.Fatalf("start the program: %v", err)
	}
	go func() { // ends with the process, which cleanup ends
		_ = n.cmd.Wait()
		n.state = n.cmd.ProcessState
		close(n.exited)
	}()
	t.Cleanup(n.cleanup)
	page := regexp.MustCompile(`page=https?://([0-9.:]+)/`)
	eventually(t, "the program says its address", func() bool {
		select {
		case <-n.exited:
			t.Fatalf("the program ended at once: %v", n.state)
		default:
		}
		found := page.FindStringSubmatch(n.log.String())
		if found != nil {
			n.addr = found[1]
		}
		return found != nil
	})
	if w.tls != nil || w.h2 {
		ways.Store(n.addr, w)
		t.Cleanup(func() { ways.Delete(n.addr) })
	}
	return n
}

// contract returns openapi.yaml.
var contract = sync.OnceValue(func() []byte {
	text, err := os.ReadFile("openapi.yaml")
	if err != nil {
		panic(err)
	}
	return text
})

// theContract is the contract for every response to a node's own client.
var theContract = sync.OnceValue(func() *apitest.Contract { return apitest.New(contract()) })

// bearer sends a node's token, and checks responses against the contract.
type bearer struct {
	*http.Transport
	n *node
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.n.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+b.n.token)
	}
	response, err := b.Transport.RoundTrip(r)
	if err != nil || !b.n.judged || r.URL.Host != b.n.addr {
		return response, err
	}
	if body, err := apitest.Whole(response); err == nil { // otherwise the reader gets the error
		theContract().Judge(b.n.t, r.WithContext(apitest.Bad(r.Context())), nil, response, body)
	}
	return response, nil
}

// planted holds words that no log may contain, at any level: tokens, tickets, and what tests send besides the chunks'
// text. Every node's log is searched for them when it ends.
var planted struct {
	sync.Mutex
	words []string
}

func plant(words ...string) {
	planted.Lock()
	defer planted.Unlock()
	planted.words = append(planted.words, words...)
}

// chatText matches the contents of the chunks in these tests.
var chatText = regexp.MustCompile(`word ?[0-9]+|sesame`)

// refusedAtStart matches the line in which a node reports that it has no Redis.
var refusedAtStart = regexp.MustCompile(`(?m)^.*level=ERROR msg="redis (cannot be reached|denies access)".*$`)

func (n *node) cleanup() {
	n.http.CloseIdleConnections()
	n.terminate()
	select {
	case <-n.exited:
	case <-time.After(patience):
		n.t.Errorf("the program does not stop")
		_ = n.cmd.Process.Signal(syscall.SIGQUIT) // writes its goroutines to the log
		<-n.exited
	}
	if !n.killed.Load() && n.state.ExitCode() != 0 {
		n.t.Errorf("the program ended with %v", n.state)
	}
	log := n.log.String()
	expected := refusedAtStart.ReplaceAllString(log, "") // tests may start a node without its Redis
	for _, bad := range []string{"DATA RACE", "panic", "level=ERROR"} {
		if strings.Contains(expected, bad) {
			n.t.Errorf("%q in the program's log", bad)
		}
	}
	if said := chatText.FindString(log); said != "" {
		n.t.Errorf("what people say, %q, is in the program's log", said)
	}
	planted.Lock()
	for _, word := range planted.words {
		if strings.Contains(log, word) {
			n.t.Errorf("%q is in the program's log", word)
		}
	}
	planted.Unlock()
	if n.t.Failed() {
		const most = 8 << 10
		if len(log) > most {
			log = log[:most/2] + "\n[...]\n" + log[len(log)-most/2:]
		}
		n.t.Logf("log of node %s:\n%s", n.addr, log)
	}
}

// kill ends the node like a power failure.
func (n *node) kill() {
	n.killed.Store(true)
	_ = n.cmd.Process.Kill()
	<-n.exited
}

// terminate makes the node drain.
func (n *node) terminate() {
	n.told.Do(func() { _ = n.cmd.Process.Signal(syscall.SIGTERM) })
}

func (n *node) waitReady() {
	n.t.Helper()
	eventually(n.t, "the node is ready", func() bool { return n.get("/readyz").status == http.StatusOK })
}

// nodes starts n nodes on one Redis.
func nodes(t *testing.T, n int, redis *storetest.Server, args ...string) []*node {
	t.Helper()
	all := make([]*node, n)
	for i := range all {
		all[i] = launch(t, append([]string{"-redis", redis.URL(), "-node", fmt.Sprint("n", i+1)}, args...)...)
	}
	for _, n := range all {
		n.waitReady()
	}
	return all
}

var sessions atomic.Int64

// newID returns a session id that no other test uses.
func newID() string { return fmt.Sprint("s", sessions.Add(1)) }

// answer is a whole HTTP response.
type answer struct {
	status int
	header http.Header
	body   string
	err    error
}

func (n *node) do(ctx context.Context, method, path, contentType string, body io.Reader) (a answer) {
	r, err := http.NewRequestWithContext(ctx, method, n.url(path), body)
	if err != nil {
		return answer{err: err}
	}
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	response, err := n.http.Do(r)
	if err != nil {
		return answer{err: err}
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	storetest.Moved(n.t)
	return answer{response.StatusCode, response.Header, string(b), err}
}

func (n *node) url(path string) string { return n.scheme + "://" + n.addr + path }

func (n *node) get(path string) answer { return n.do(context.Background(), "GET", path, "", nil) }

func (n *node) post(path, contentType, body string) answer {
	return n.do(context.Background(), "POST", path, contentType, strings.NewReader(body))
}

// stored is the response to an append.
type stored struct {
	Epoch string `json:"epoch"`
	First int64  `json:"first_seq"`
	Last  int64  `json:"last_seq"`
	Count int    `json:"count"`
}

// append posts a chunk, or an array of chunks, that must be stored. If a slow Redis on a busy machine refused it,
// append retries, as producers do.
func (n *node) append(t *testing.T, session, body string) (s stored) {
	t.Helper()
	var a answer
	eventually(t, "Redis is there", func() bool {
		a = n.post("/v1/sessions/"+session+"/chunks", "application/json", body)
		return a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, `"redis_away"`)
	})
	if a.status != http.StatusCreated {
		t.Fatalf("append to %s: %d %s (%v)", session, a.status, a.body, a.err)
	}
	decode(t, a.body, &s)
	return s
}

// words returns an array of count deltas, followed by more.
func words(from, count int, more ...string) string {
	var all []string
	for i := range count {
		all = append(all, fmt.Sprintf(`{"message_id":"m1","role":"assistant","content":"word%d "}`, from+i))
	}
	return "[" + strings.Join(append(all, more...), ",") + "]"
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("not the JSON that was to come: %v: %q", err, text)
	}
}

// history returns the list in Redis.
func history(t *testing.T, redis *storetest.Server, session string) []string {
	t.Helper()
	all, err := redis.LRange(deadline(t), "chat:history:"+session, 0, -1).Result()
	if err != nil {
		t.Fatalf("LRANGE: %v", err)
	}
	return all
}

// renumbered returns a list, whose newest element is number last, as viewers receive it: elements of an earlier epoch
// get their current numbers.
func renumbered(last int64, list []string) []string {
	ours := regexp.MustCompile(`^\{"seq":[0-9]+,"ts":`)
	all := slices.Clone(list)
	for i, element := range all {
		if ours.MatchString(element) {
			_, rest, _ := strings.Cut(element, ",")
			all[i] = fmt.Sprintf(`{"seq":%d,%s`, last-int64(len(list)-1-i), rest)
		}
	}
	return all
}

// keys returns the keys in Redis that match a pattern.
func keys(t *testing.T, redis *storetest.Server, pattern string) []string {
	t.Helper()
	all, err := redis.Keys(deadline(t), pattern).Result()
	if err != nil {
		t.Errorf("KEYS: %v", err)
	}
	return all
}

// pages returns the log as the API pages it.
func (n *node) pages(t *testing.T, session string) (all []string) {
	t.Helper()
	for {
		a := n.get(fmt.Sprintf("/v1/sessions/%s/chunks?after=%d&limit=1000", session, len(all)))
		var page struct {
			Last   int `json:"last_seq"`
			Chunks []json.RawMessage
		}
		if a.status != http.StatusOK {
			t.Fatalf("page of %s: %d %s (%v)", session, a.status, a.body, a.err)
		}
		decode(t, a.body, &page)
		for _, c := range page.Chunks {
			all = append(all, string(c))
		}
		if len(all) >= page.Last || len(page.Chunks) == 0 {
			return all
		}
	}
}

// event is an event of an EventSource.
type event struct{ name, data, id string }

// parser reads a stream according to https://html.spec.whatwg.org/multipage/server-sent-events.html. It outlives a
// connection, as EventSource does, with a call of nextConnection in between.
type parser struct {
	line           []byte
	name, data, id string // of the event being read
	hasData        bool
	lastID         string // of the last whole event
	retry          string
	comments       int
}

// nextConnection forgets the received part of an event. With glue it keeps it, as WebKit does after a reset connection.
func (p *parser) nextConnection(glue bool) {
	if glue {
		return
	}
	p.line, p.name, p.data, p.hasData, p.id = p.line[:0], "", "", false, p.lastID
}

// feed parses bytes and passes on the events that they complete, until out returns false.
func (p *parser) feed(b []byte, out func(event) bool) bool {
	for _, c := range b {
		if c == '\r' {
			panic("a carriage return in the stream")
		}
		if c != '\n' {
			p.line = append(p.line, c)
			continue
		}
		line := string(p.line)
		p.line = p.line[:0]
		if line == "" {
			e := event{p.name, p.data, p.id}
			has := p.hasData
			p.lastID, p.name, p.data, p.hasData = p.id, "", "", false
			if has && !out(e) {
				return false
			}
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "":
			p.comments++
		case "event":
			p.name = value
		case "data":
			if p.hasData {
				p.data += "\n"
			}
			p.data += value
			p.hasData = true
		case "id":
			p.id = value
		case "retry":
			p.retry = value
		}
	}
	return true
}

// notice is the data of welcome and reset.
type notice struct {
	Type, Session, Epoch, Reason, Node, Connection string
	First                                          int64 `json:"first_seq"`
	Last                                           int64 `json:"last_seq"`
	Cursor                                         int64
}

// viewer is a client that reconnects with its last id, checks that numbers are consecutive, and records what it must
// not see.
type viewer struct {
	session string
	query   string // of the URL
	parser
	glue bool // keep torn events, as WebKit does
	// patient means that it reconnects even after a clean end, as an EventSource does, until 204.
	patient bool
	// proxied means that it is behind a proxy, which sends Connection: close while it is reloaded.
	proxied bool
	token   string // sent unless it is empty
	dialer  net.Dialer

	cursor   int64
	chunks   []string // data of onmessage, since the last reset or snapshot
	said     *said    // by a snapshot, since the last reset
	faults   []string
	welcomes []notice
	resets   []notice
	over     bool // 204, or a clean end

	connections int
	beats       atomic.Int64 // comments seen, for tests that watch it run
	seen        atomic.Int64 // the cursor, for tests that watch it run
	status      atomic.Int64 // of the current connection, for tests that watch it run
}

func (v *viewer) fault(format string, args ...any) {
	v.faults = append(v.faults, fmt.Sprintf(format, args...))
}

// take does what the page's code does with an event.
func (v *viewer) take(e event) {
	id, err := strconv.ParseInt(e.id, 10, 64)
	if err != nil {
		v.fault("event %q has id %q", e.name, e.id)
		return
	}
	var n notice
	if e.name != "" {
		// A torn event that WebKit kept precedes the data of welcome.
		text := e.data
		if v.glue {
			text = text[strings.LastIndexByte(text, '\n')+1:]
		}
		if err := json.Unmarshal([]byte(text), &n); err != nil {
			v.fault("%s is not JSON: %q", e.name, e.data)
		}
		if n.Type != e.name || e.name == "welcome" && n.Cursor != id || e.name == "reset" && n.Cursor != v.cursor {
			v.fault("at %d, %s says %q, with id %d", v.cursor, e.name, e.data, id)
		}
	}
	switch e.name {
	case "":
		switch {
		case id == v.cursor+1:
		case id > v.cursor+1:
			v.fault("lost: %d came after %d", id, v.cursor)
		default:
			v.fault("doubled or out of order: %d came after %d", id, v.cursor)
		}
		if !json.Valid([]byte(e.data)) {
			v.fault("chunk %d is torn: %q", id, e.data)
		}
		if strings.HasPrefix(e.data, `{"seq":`) && !strings.HasPrefix(e.data, fmt.Sprintf(`{"seq":%d,`, id)) {
			v.fault("chunk %d says %.40q", id, e.data)
		}
		v.chunks = append(v.chunks, e.data)
	case "welcome":
		v.welcomes = append(v.welcomes, n)
	case "reset":
		v.resets = append(v.resets, n)
		v.chunks, v.said = nil, nil
	case "snapshot":
		if v.said != nil || len(v.chunks) > 0 || !strings.Contains(v.query, "snapshot=1") {
			v.fault("a snapshot came at %d, behind %d chunks", v.cursor, len(v.chunks))
		}
		v.said = &said{}
		if err := json.Unmarshal([]byte(e.data), v.said); err != nil || v.said.First != v.cursor+1 || v.said.Last != id {
			v.fault("at %d, snapshot %d: %v %+v", v.cursor, id, err, v.said)
		}
	default:
		v.fault("event named %q", e.name)
	}
	v.cursor = id
	v.seen.Store(id)
}

// ending is how a connection ended.
type ending string

const (
	clean   ending = "clean"   // as HTTP ends a response
	aborted ending = "aborted" // broken off in the middle
	cut     ending = "cut"     // by the viewer itself
	refused ending = "refused" // no connection, or no response on it
	nothing ending = "204"
)

// request returns the viewer's request.
func (v *viewer) request(addr string) string {
	r := "GET /v1/sessions/" + v.session + "/stream" + v.query + " HTTP/1.1\r\nHost: " + addr + "\r\nAccept: text/event-stream\r\n"
	if v.token != "" {
		r += "Authorization: Bearer " + v.token + "\r\n"
	}
	if v.lastID != "" {
		r += "Last-Event-ID: " + v.lastID + "\r\n"
	}
	return r + "\r\n"
}

// connect makes one connection and takes events until it ends, or until stop returns true after an event and the viewer
// cuts it. A nil stop never does.
func (v *viewer) connect(ctx context.Context, addr string, stop func(event) bool) ending {
	v.connections++
	v.nextConnection(v.glue)
	first := true
	how := v.raw(ctx, addr, func(b []byte) bool {
		return v.feed(b, func(e event) bool {
			if first && e.name != "welcome" {
				v.fault("the first event is %q: %.80s", e.name, e.data)
			}
			first = false
			v.take(e)
			return stop == nil || !stop(e)
		})
	})
	if how == clean && first && v.proxied { // the proxy says that it has no node
		return refused
	}
	if how == nothing || how == clean && !v.patient {
		v.over = true
	}
	return how
}

// raw makes one connection and passes on the bytes of its body, until it ends or out returns false.
func (v *viewer) raw(ctx context.Context, addr string, out func([]byte) bool) ending {
	response, done, err := v.stream(ctx, addr)
	if err != nil {
		return refused
	}
	hard := false // cut as a network does it, not as a page does
	defer func() { done(hard) }()
	v.status.Store(int64(response.StatusCode))
	defer v.status.Store(0)
	switch {
	case response.StatusCode == http.StatusNoContent:
		return nothing
	case response.StatusCode != http.StatusOK || response.Header.Get("Content-Type") != "text/event-stream":
		v.fault("status %d, %s: an EventSource would never come back", response.StatusCode, response.Header.Get("Content-Type"))
		return refused
	}
	if response.Close && !v.proxied {
		v.fault("the stream says Connection: close: some clients take its break for its end")
	}
	b := make([]byte, 8<<10)
	for {
		n, err := response.Body.Read(b)
		if len(bytes.Trim(b[:n], ":\n")) > 0 && !bytes.Contains(b[:n], []byte("event: welcome\n")) { // a reconnection alone is no progress
			storetest.MovedIn(ctx)
		}
		wanted := out(b[:n])
		v.beats.Store(int64(v.comments))
		switch {
		case !wanted:
			hard = rand.IntN(2) == 0
			return cut
		case err == io.EOF:
			return clean
		case err != nil:
			return aborted
		}
	}
}

// follow is an EventSource: it connects to the addresses that next returns, until the log has ended, or until stop
// returns true after an event.
func (v *viewer) follow(ctx context.Context, next func() string, stop func(event) bool) {
	for stopped := false; !v.over && !stopped && ctx.Err() == nil; {
		how := v.connect(ctx, next(), func(e event) bool {
			stopped = stop != nil && stop(e)
			return stopped
		})
		if how == refused || how == aborted {
			pause(ctx, 10*time.Millisecond)
		}
	}
}

// background runs something that the test waits for.
func background(t *testing.T, run func()) (wait func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { // waited for below
		defer close(done)
		run()
	}()
	t.Cleanup(func() { <-done })
	return func() { <-done }
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// check reports the faults that the viewer recorded, and compares what it received with want, element by element.
func (v *viewer) check(t *testing.T, want []string) {
	t.Helper()
	for _, f := range v.faults {
		t.Errorf("viewer of %s: %s", v.session, f)
	}
	if v.said != nil {
		want = v.said.check(t, v.session, want)
	}
	if len(v.chunks) != len(want) {
		t.Errorf("viewer of %s got %d chunks up to %d, the log has %d", v.session, len(v.chunks), v.cursor, len(want))
	}
	for i := range min(len(v.chunks), len(want)) {
		if v.chunks[i] != want[i] {
			t.Errorf("viewer of %s, chunk %d of %d:\n got %s\nwant %s", v.session, i+1, len(want), v.chunks[i], want[i])
			break
		}
	}
}

// said is the data of a snapshot.
type said struct {
	First, Last int64
	Ended       bool
	Messages    []struct {
		ID      string `json:"message_id"`
		Content string
		Chunks  []json.RawMessage
	}
}

func (s *said) UnmarshalJSON(b []byte) error {
	type plain said
	all := struct {
		First int64 `json:"first_seq"`
		Last  int64 `json:"last_seq"`
		*plain
	}{plain: (*plain)(s)}
	err := json.Unmarshal(b, &all)
	s.First, s.Last = all.First, all.Last
	return err
}

// check compares a snapshot with the chunks up to its number, and returns the rest of the chunks.
func (s *said) check(t *testing.T, session string, all []string) (rest []string) {
	t.Helper()
	if s.Last > int64(len(all)) {
		t.Errorf("the snapshot of %s says %d chunks, the log has %d", session, s.Last, len(all))
		return nil
	}
	texts := func(of func(add func(id, content string))) string { // by message, in the order of their first chunks
		var ids []string
		by := map[string]string{}
		of(func(id, content string) {
			if _, known := by[id]; !known {
				ids = append(ids, id)
			}
			by[id] += content
		})
		var b strings.Builder
		for _, id := range ids {
			fmt.Fprintf(&b, "%q: %q\n", id, by[id])
		}
		return b.String()
	}
	got := texts(func(add func(id, content string)) {
		for _, m := range s.Messages {
			add(m.ID, m.Content)
		}
	})
	ended := false
	want := texts(func(add func(id, content string)) {
		for _, data := range all[:s.Last] {
			var c struct {
				Type, Content string
				ID            string `json:"message_id"`
			}
			if err := json.Unmarshal([]byte(data), &c); err != nil {
				t.Errorf("%v in %s", err, data)
			}
			if c.Type == "end" {
				ended = true
			} else {
				add(c.ID, c.Content)
			}
		}
	})
	if got != want || s.Ended && !ended {
		t.Errorf("the snapshot of %s, up to %d, says (ended %v)\n%s\nand its chunks (ended %v)\n%s", session, s.Last, s.Ended, got, ended, want)
	}
	return all[s.Last:]
}

// unreset fails if the viewer was reset.
func (v *viewer) unreset(t *testing.T) {
	t.Helper()
	if len(v.resets) > 0 {
		t.Errorf("viewer of %s was reset: %+v", v.session, v.resets)
	}
}

// foreign is a producer that knows nothing of this server, like the one of RACE.md: it publishes first and pushes
// later.
type foreign struct {
	redis       *storetest.Server
	session     string
	newestFirst bool // it uses LPUSH
}

func (f foreign) publish(ctx context.Context, chunk string) error {
	return f.redis.Publish(ctx, "chat:stream:"+f.session, chunk).Err()
}

func (f foreign) push(ctx context.Context, chunks ...string) error {
	all := make([]any, len(chunks))
	for i, c := range chunks {
		all[i] = c
	}
	if f.newestFirst {
		return f.redis.LPush(ctx, "chat:history:"+f.session, all...).Err()
	}
	return f.redis.RPush(ctx, "chat:history:"+f.session, all...).Err()
}

// say publishes, waits up to gap, and pushes.
func (f foreign) say(ctx context.Context, chunk string, gap time.Duration) error {
	if err := f.publish(ctx, chunk); err != nil {
		return err
	}
	if gap > 0 {
		pause(ctx, rand.N(gap))
	}
	return f.push(ctx, chunk)
}

func foreignChunk(i int) string {
	return fmt.Sprintf(`{"content":"word%d ","is_complete":false,"message_id":"m1"}`, i)
}

// balancer is one address in front of several nodes: a TCP proxy with a changeable target, whose connections can be
// broken.
type balancer struct {
	addr   string
	target atomic.Pointer[string]
	// deaf drops everything that Redis sends on Pub/Sub connections, while they stand.
	deaf atomic.Bool

	mu    sync.Mutex
	conns map[net.Conn]bool
}

func balance(t *testing.T, to string) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{addr: l.Addr().String(), conns: map[net.Conn]bool{}}
	b.target.Store(&to)
	var wg sync.WaitGroup
	wg.Go(func() { // ends with the listener
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { b.forward(in) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		b.breakAll()
		wg.Wait()
	})
	return b
}

func (b *balancer) forward(in net.Conn) {
	defer reset(in)
	out, err := net.Dial("tcp", *b.target.Load())
	if err != nil {
		return
	}
	b.mu.Lock()
	b.conns[in], b.conns[out] = true, true
	b.mu.Unlock()
	done := make(chan error, 2)
	ear := &ear{Conn: in, balancer: b}
	pipe := func(to io.Writer, from io.Reader) {
		_, err := io.Copy(to, from)
		if err == nil {
			_ = to.(interface{ CloseWrite() error }).CloseWrite()
		}
		done <- err
	}
	go pipe(ear, out) // both end when either side fails, below
	go pipe(out, ear)
	if err := <-done; err == nil {
		<-done
	} else {
		reset(in)
		reset(out)
		<-done
	}
	_ = out.Close()
	b.mu.Lock()
	delete(b.conns, in)
	delete(b.conns, out)
	b.mu.Unlock()
}

// ear is one end of a connection, which may have subscriptions.
type ear struct {
	net.Conn
	balancer   *balancer
	subscribed atomic.Bool
}

func (e *ear) Read(b []byte) (int, error) {
	n, err := e.Conn.Read(b)
	if bytes.Contains(b[:n], []byte("\r\nsubscribe\r\n")) {
		e.subscribed.Store(true)
	}
	return n, err
}

func (e *ear) Write(b []byte) (int, error) {
	if e.balancer.deaf.Load() && e.subscribed.Load() {
		return len(b), nil
	}
	return e.Conn.Write(b)
}

func (e *ear) CloseWrite() error { return e.Conn.(*net.TCPConn).CloseWrite() }

func reset(c net.Conn) {
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}

// breakAll resets the existing connections, like a changing network.
func (b *balancer) breakAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		reset(c)
	}
}

// retarget sends later connections to another address.
func (b *balancer) retarget(to string) { b.target.Store(&to) }
