package web_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
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
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"gapless/api/auth/authtest"
	"gapless/store/storetest"
)

// The tests of this package use the built program as its users do: in a real Chromium (this file),
// with SSE client libraries and with curl (clients_test.go). Between them and the nodes is a TCP
// proxy that can be cut at any byte (proxy).

// dir contains the built program.
var dir string

func TestMain(m *testing.M) {
	flag.Parse()
	// These tests wait for clients that wait before they reconnect, and hardly compute. But each
	// has a browser's tab, or Node, and programs with the race detector.
	_ = flag.Set("test.parallel", fmt.Sprint(max(8, 4*runtime.GOMAXPROCS(0))))
	var err error
	if dir, err = os.MkdirTemp("", "gapless-web-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	storetest.Standstill()
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// patience is how long a test waits while nothing happens.
const patience = storetest.Patience

// eventually polls until ok, and fails the test if that takes too long.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	storetest.Eventually(t, what, ok)
}

// ---- nodes

var binary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(dir, "gapless")
	build := exec.Command("go", "build", "-race", "-buildvcs=false", "-o", path, "gapless")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the program: %w\n%s", err, out)
	}
	return path, nil
})

// node is a gapless process of one test.
type node struct {
	t    testing.TB
	addr string
	cmd  *exec.Cmd
	out  bytes.Buffer // read it only after the process has stopped
	once sync.Once

	scheme string
	http   *http.Client
}

// start starts a node on a free port, and stops it when the test ends. It must stop with status 0,
// which with the race detector means that no race was found.
func start(t testing.TB, args ...string) *node { return startOver(t, nil, args...) }

// startOver starts a node that a client reaches over TLS.
func startOver(t testing.TB, secure *http.Client, args ...string) *node {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, addr: fmt.Sprintf("127.0.0.1:%d", storetest.FreePort(t)), scheme: "http", http: http.DefaultClient}
	if secure != nil {
		n.scheme, n.http = "https", secure
	}
	n.cmd = exec.Command(path, append([]string{"-listen", n.addr, "-drain", "500ms"}, args...)...)
	n.cmd.Dir = t.TempDir() // which has its data
	n.cmd.Stdout, n.cmd.Stderr = &n.out, &n.out
	if err := n.cmd.Start(); err != nil {
		t.Fatalf("start the program: %v", err)
	}
	t.Cleanup(n.stop)
	n.waitReady()
	return n
}

func (n *node) waitReady() {
	n.t.Helper()
	eventually(n.t, "a node is ready", func() bool {
		r, err := n.http.Get(n.url("/readyz"))
		if err != nil {
			return false
		}
		_ = r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
}

// stop sends SIGTERM: the node drains.
func (n *node) stop() {
	n.once.Do(func() {
		_ = n.cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(patience, func() { _ = n.cmd.Process.Kill() })
		defer kill.Stop()
		if err := n.cmd.Wait(); err != nil {
			n.t.Errorf("a node stopped with %v:\n%s", err, &n.out)
		}
	})
}

func (n *node) url(path string) string { return n.scheme + "://" + n.addr + path }

// post fails the test unless the status is 2xx.
func (n *node) post(t testing.TB, path string, body any) {
	t.Helper()
	if status, answer := n.send(t, path, body); status/100 != 2 {
		t.Errorf("POST %s: %d\n%s", path, status, answer)
	}
}

// send posts, and returns any status; 0 means no response. If a busy machine's Redis was too slow,
// it sends again, as producers do.
func (n *node) send(t testing.TB, path string, body any) (status int, answer []byte) {
	t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		t.Error(err)
		return 0, nil
	}
	for {
		r, err := n.http.Post(n.url(path), "application/json", bytes.NewReader(text))
		if err != nil {
			t.Errorf("POST %s: %v", path, err)
			return 0, nil
		}
		answer, _ = io.ReadAll(r.Body)
		_ = r.Body.Close()
		if r.StatusCode != http.StatusServiceUnavailable || !bytes.Contains(answer, []byte(`"redis_away"`)) || t.Context().Err() != nil {
			return r.StatusCode, answer
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// answers appends an answer to a session, piece by piece. The answer ends only when finish is
// called, so whatever a test does before happens in its middle.
func (n *node) answers(t testing.TB, session string) (finish func()) {
	path := "/v1/sessions/" + session + "/chunks"
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { // ended by finish, or with the test
		for i := 0; ; i++ {
			n.post(t, path, chunk{MessageID: "long", Role: "tool", Content: fmt.Sprintf("%s %d ", nasty[i%(len(nasty)-1)], i)})
			select {
			case <-time.After(30 * time.Millisecond): // the pace of the producer
			case <-stop:
				n.post(t, path, chunk{Type: "done", MessageID: "long"})
				return
			case <-t.Context().Done():
				return
			}
		}
	})
	t.Cleanup(wg.Wait)
	return func() {
		close(stop)
		wg.Wait()
	}
}

// talks appends the answer "talk" to a session, piece by piece, until the log refuses more of it.
// So a test that stops the answer stops it in the middle. told waits for the refusal, after which
// nothing can follow.
func (n *node) talks(t testing.TB, session string) (told func() string) {
	path := "/v1/sessions/" + session + "/chunks"
	codes := make(chan string, 1)
	var wg sync.WaitGroup
	wg.Go(func() { // ended by the refusal, or with the test
		for i := 0; t.Context().Err() == nil; i++ {
			status, answer := n.send(t, path, chunk{MessageID: "talk", Content: fmt.Sprintf("%s %d ", nasty[i%(len(nasty)-1)], i)})
			if status != http.StatusCreated {
				var problem struct{ Code string }
				_ = json.Unmarshal(answer, &problem)
				codes <- problem.Code
				return
			}
			select {
			case <-time.After(30 * time.Millisecond): // the pace of the producer
			case <-t.Context().Done():
			}
		}
	})
	t.Cleanup(wg.Wait)
	return func() string {
		select {
		case code := <-codes:
			return code
		case <-time.After(patience):
			return "nothing"
		}
	}
}

// chunk is a chunk of the log, with the members that these tests use.
type chunk struct {
	Seq       int64  `json:"seq,omitzero"`
	Type      string `json:"type,omitzero"`
	MessageID string `json:"message_id,omitzero"`
	Role      string `json:"role,omitzero"`
	Content   string `json:"content,omitzero"`
	Reason    string `json:"reason,omitzero"`
}

// history returns the whole log of a session.
func (n *node) history(t testing.TB, session string) (chunks []chunk) {
	t.Helper()
	for last := int64(1); int64(len(chunks)) < last; {
		path := fmt.Sprintf("/v1/sessions/%s/chunks?limit=1000&after=%d", session, len(chunks))
		r, err := http.Get(n.url(path))
		if err != nil {
			t.Fatalf("GET %s: %v", path, err)
		}
		var page struct {
			Last   int64 `json:"last_seq"`
			Chunks []chunk
		}
		err = json.NewDecoder(r.Body).Decode(&page)
		_ = r.Body.Close()
		if r.StatusCode == http.StatusServiceUnavailable && t.Context().Err() == nil { // as in send
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if err != nil || r.StatusCode != http.StatusOK || len(page.Chunks) == 0 {
			t.Fatalf("GET %s: %s, %d chunks, %v", path, r.Status, len(page.Chunks), err)
		}
		chunks, last = append(chunks, page.Chunks...), page.Last
	}
	return chunks
}

// ---- the network

// proxy is the network between a client and the nodes. It forwards bytes unchanged, and knows its
// position in a stream.
type proxy struct {
	t     testing.TB
	l     net.Listener
	nodes []*node
	wg    sync.WaitGroup

	mu      sync.Mutex
	route   func(streams int) int // returns the node for a new connection after so many streams
	offline bool
	cuts    []cut // for the first streams, one each
	conns   map[*net.TCPConn]struct{}
	streams []*stream
}

// cut returns after how many bytes of a response's body the connection is reset, given what was
// seen of it; -1: not yet.
type cut func(body []byte) int

// stream is one request for a stream that passed the proxy.
type stream struct {
	url    string
	cursor string // Last-Event-ID
	node   int
	status int
	body   []byte // with HTTP's framing
	cut    bool   // the proxy cut it
	silent bool   // no more of it passes
}

// torn reports whether the response was cut in the middle of an event.
func (s *stream) torn() bool {
	body := bytes.TrimRight(s.body, "\r\n")
	return s.cut && len(body) > 0 && bytes.Count(s.body[len(body):], []byte("\n")) < 2
}

// anywhere cuts at a random byte.
func anywhere(r *rand.Rand) cut {
	at := r.IntN(4000)
	return func(body []byte) int {
		if len(body) < at {
			return -1
		}
		return at
	}
}

// where cuts at the start of the pattern's group, when it first matches.
func where(pattern string) cut {
	re := regexp.MustCompile(pattern)
	return func(body []byte) int {
		if m := re.FindSubmatchIndex(body); m != nil {
			return m[2]
		}
		return -1
	}
}

// behindWelcome cuts before the first chunk, or before whatever follows welcome.
var behindWelcome = where(`event: welcome\n(?:.+\n)+\n()`)

// newProxy returns a proxy that at first leads to the first of the nodes.
func newProxy(t testing.TB, nodes ...*node) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, l: l, nodes: nodes, conns: map[*net.TCPConn]struct{}{}, route: func(int) int { return 0 }}
	p.wg.Go(func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c.(*net.TCPConn)) }) // ends with the connection
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.goOffline()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) url(path string) string { return "http://" + p.l.Addr().String() + path }

// goOffline resets every connection, and each new one from now on. (A port without a listener would
// refuse instead, but another test could take it in the meantime.)
func (p *proxy) goOffline() {
	p.mu.Lock()
	p.offline = true
	p.mu.Unlock()
	p.resetAll()
}

// resetAll resets every connection, once.
func (p *proxy) resetAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		reset(c)
	}
}

// goSilent discards, from now on, what the open streams send, and closes nothing.
func (p *proxy) goSilent() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.streams {
		s.silent = true
	}
}

// goOnline accepts connections again, and sends all of them to one node.
func (p *proxy) goOnline(node int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.offline, p.route = false, func(int) int { return node }
}

// seen returns a copy of the streams so far.
func (p *proxy) seen() []stream {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []stream
	for _, s := range p.streams {
		all = append(all, *s)
	}
	return all
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// serve forwards the requests of one connection, each when it is complete, and the responses as
// they come.
func (p *proxy) serve(client *net.TCPConn) {
	p.mu.Lock()
	if p.offline {
		p.mu.Unlock()
		reset(client)
		return
	}
	p.conns[client] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, client)
		p.mu.Unlock()
		_ = client.Close()
	}()

	var raw bytes.Buffer
	requests := bufio.NewReader(io.TeeReader(client, &raw))
	var up *net.TCPConn
	var node int
	last := &answer{proxy: p, client: client}
	for {
		r, err := http.ReadRequest(requests)
		if err == nil {
			_, err = io.Copy(io.Discard, r.Body)
		}
		if err != nil {
			break
		}
		if up == nil {
			if up, node = p.dial(); up == nil {
				reset(client)
				return
			}
			p.wg.Go(func() { last.pass(up) }) // ends with the connection
		}
		if strings.HasSuffix(r.URL.Path, "stream") { // or ui-stream
			last.begins(&stream{url: r.RequestURI, cursor: r.Header.Get("Last-Event-ID"), node: node})
		}
		if _, err := up.Write(raw.Bytes()); err != nil {
			break
		}
		raw.Reset()
	}
	if up != nil {
		_ = up.Close()
	}
}

// dial connects to the node whose turn it is, or to another if that one has stopped.
func (p *proxy) dial() (*net.TCPConn, int) {
	p.mu.Lock()
	to := p.route(len(p.streams))
	p.mu.Unlock()
	for i := range p.nodes {
		n := (to + i) % len(p.nodes)
		if c, err := net.Dial("tcp", p.nodes[n].addr); err == nil {
			return c.(*net.TCPConn), n
		}
	}
	return nil, 0
}

// answer is the way back of a connection.
type answer struct {
	*proxy
	client *net.TCPConn

	// For the stream that this connection carries, if any; guarded by the proxy's lock.
	stream *stream
	cut    cut
	head   []byte
}

// begins announces that the next response belongs to a request for a stream.
func (a *answer) begins(s *stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stream, a.cut, a.head = s, nil, nil
	if n := len(a.streams); n < len(a.cuts) {
		a.cut = a.cuts[n]
	}
	a.streams = append(a.streams, s)
}

// pass forwards a node's response, up to the planned cut.
func (a *answer) pass(up *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := up.Read(buf)
		passed := a.note(buf[:n])
		if passed == 0 && n > 0 && a.isSilent() {
			continue
		}
		_, werr := a.client.Write(buf[:passed])
		if err == nil && werr == nil && passed == n {
			continue
		}
		if passed < n || errors.Is(err, syscall.ECONNRESET) {
			reset(a.client)
		} else {
			_ = a.client.Close()
		}
		_ = up.Close()
		return
	}
}

func (a *answer) isSilent() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stream != nil && a.stream.silent
}

// note records what came of a stream, and returns how much of it may pass.
func (a *answer) note(piece []byte) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.stream
	if s == nil {
		return len(piece)
	}
	if s.silent {
		return 0
	}
	if s.status > 0 {
		s.body = append(s.body, piece...)
	} else {
		a.head = append(a.head, piece...)
		_, body, whole := bytes.Cut(a.head, []byte("\r\n\r\n"))
		if !whole {
			return len(piece)
		}
		_, _ = fmt.Sscanf(string(a.head), "HTTP/1.1 %d", &s.status)
		s.body = append(s.body, body...)
	}
	if a.cut == nil {
		return len(piece)
	}
	at := a.cut(s.body)
	if at < 0 {
		return len(piece)
	}
	behind := len(s.body) - at
	s.body, s.cut, a.cut = s.body[:at], true, nil
	return max(len(piece)-behind, 0)
}

// ---- Chromium

// chromium starts a browser that stops when the test ends. A missing Chromium fails the test.
func chromium(t testing.TB, more ...chromedp.ExecAllocatorOption) context.Context {
	t.Helper()
	var path string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome-stable", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	if path == "" {
		t.Fatal("chromium is not installed: make test installs it")
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], // they include a separate user data directory
		chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-quic", true))
	options = append(options, more...)
	quiet := func(string, ...any) {}
	ctx, _ := chromedp.NewContext(context.Background(), chromedp.WithAllocatorOptions(options...),
		chromedp.WithLogf(quiet), chromedp.WithErrorf(quiet))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		_ = chromedp.Cancel(ctx)
	})
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("start %s: %v", path, err)
	}
	return ctx
}

// tab is a tab of a browser.
type tab struct {
	t   *testing.T
	ctx context.Context
}

// open opens a URL in a new tab. An uncaught error of a script fails the test. If the test fails, a
// picture of the tab is kept (go test -artifacts).
func open(t *testing.T, browser context.Context, url string, options ...chromedp.ContextOption) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(browser, options...)
	p := &tab{t, ctx}
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("open a tab: %v", err)
	}
	messages := chromedp.Console(ctx)
	var console sync.WaitGroup
	console.Go(func() { // ends with the tab
		for m, err := range messages {
			if err != nil {
				return
			}
			if m.IsException() || m.Source == "security" {
				t.Errorf("in the console: %v", m)
			}
		}
	})
	t.Cleanup(func() {
		if t.Failed() {
			p.keep()
		}
		cancel()
		console.Wait()
	})
	p.do("open "+url, chromedp.Navigate(url))
	return p
}

// keep saves a picture of the tab.
func (p *tab) keep() {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	path := filepath.Join(p.t.ArtifactDir(), fmt.Sprintf("tab-%d.png", time.Now().UnixNano()))
	if err == nil {
		err = os.WriteFile(path, png, 0o644)
	}
	p.t.Logf("the tab looked like %s (go test -artifacts keeps it) %v", path, err)
}

func (p *tab) do(what string, actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.t.Fatalf("%s: %v", what, err)
	}
}

// eval returns the current value of an expression, or the zero value while it cannot be evaluated,
// as between two pages.
func eval[T any](p *tab, expression string) T {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		var zero T
		return zero
	}
	return value
}

// compute returns the value of a slow expression. The page can do nothing else in the meantime.
func compute[T any](p *tab, expression string) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, 5*patience)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		p.t.Fatal(err)
	}
	return value
}

// run runs a script.
func (p *tab) run(script string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if _, err := chromedp.Run(ctx, chromedp.Evaluate[bool](script+"; true")); err != nil {
		p.t.Fatal(err)
	}
}

// received is how far a page is: the chunks that it shows, and those that its follower has.
const received = `[globalThis.gapless?.seq, globalThis.f?.seq, document.getElementById('log')?.textContent.length].join()`

// until waits until an expression is true, or until the page has received nothing for patience.
func (p *tab) until(expression string) {
	p.t.Helper()
	was, since := "", time.Now()
	for !eval[bool](p, expression) {
		if time.Since(since) > patience {
			now := eval[string](p, received)
			if now == was {
				p.t.Fatalf("waited %v in vain for %s; the page says %s", patience, expression,
					eval[string](p, `document.getElementById('bar')?.innerText.replaceAll('\n', ' ')`))
			}
			was, since = now, time.Now()
		}
		time.Sleep(20 * time.Millisecond)
	}
	storetest.Moved(p.t)
}

// types types a question.
func (p *tab) types(question string) {
	p.t.Helper()
	p.run(`document.getElementById('ask').focus()`)
	if _, err := chromedp.Call(p.ctx, input.InsertText, input.InsertTextParams{Text: question}); err != nil {
		p.t.Fatalf("type %q: %v", question, err)
	}
}

// ask asks a question.
func (p *tab) ask(question string) {
	p.t.Helper()
	p.types(question)
	p.do("press Enter", chromedp.KeyEvent("\r"))
	p.until(`Boolean(document.querySelector('#log article[data-role=user] .text')?.textContent)`)
}

// session returns the session in the page's URL.
func (p *tab) session() string {
	p.t.Helper()
	s := eval[string](p, `new URL(location.href).searchParams.get('session')`)
	if s == "" {
		p.t.Fatal("there is no session in the page's URL")
	}
	return s
}

// shown returns the text of each message, with its id, as the document shows it. For Markdown, it
// returns the source if the pieces were drawn like the whole. Otherwise it returns the document's
// content.
func (p *tab) shown() [][2]string {
	p.t.Helper()
	p.run(`import('/markdown.js').then((m) => { window.Markdown = m.Markdown; })`)
	p.until(`window.Markdown !== undefined`)
	return eval[[][2]string](p, `Array.from(document.querySelectorAll('#log article'), (a) => {
		const text = a.querySelector('.text');
		if (a.dataset.role !== 'assistant') return [a.dataset.id, text.textContent];
		const source = gapless.text(a.dataset.id);
		const whole = document.createElement('div');
		const markdown = new Markdown(whole);
		markdown.append(source);
		markdown.draw();
		return [a.dataset.id, whole.innerHTML === text.innerHTML ? source : text.innerHTML + ' INSTEAD OF ' + whole.innerHTML];
	})`)
}

// press clicks a button with the mouse.
func (p *tab) press(button string) {
	p.t.Helper()
	p.do("press "+button, chromedp.Click(button))
}

// stoppable is true if the Stop button is visible.
const stoppable = `document.getElementById('stop')?.hidden === false`

// showsTheStop checks that a message is shown as stopped, exactly as far as the log contains it,
// that the log ends so, and that the Stop button is gone.
func (p *tab) showsTheStop(n *node, session, message string) {
	p.t.Helper()
	p.until(`document.querySelector('#log article[data-id="` + message + `"]')?.dataset.status === 'cancelled'`)
	p.until(`document.getElementById('stop').hidden`)
	if got := eval[string](p, `document.querySelector('#log article[data-status=cancelled] .label').innerText`); got != "Stopped" {
		p.t.Errorf("below it stands %q", got)
	}
	p.showsTheHistory(n, session)
	chunks := n.history(p.t, session)
	if last := chunks[len(chunks)-1]; last.Type != "cancelled" || last.MessageID != message {
		p.t.Errorf("the log ends with %+v", last)
	}
}

// answered is true if the model's answer has arrived.
const answered = `document.querySelector('#log article[data-role=assistant]')?.dataset.status === 'done'`

// showsTheHistory checks that the document shows the session's history, byte by byte, and that the
// page found no gap and no duplicate on the way.
func (p *tab) showsTheHistory(n *node, session string) {
	p.t.Helper()
	chunks := n.history(p.t, session)
	var want [][2]string
	at := map[string]int{}
	for _, c := range chunks {
		if c.MessageID == "" {
			continue
		}
		if _, ok := at[c.MessageID]; !ok {
			at[c.MessageID] = len(want)
			want = append(want, [2]string{c.MessageID, ""})
		}
		want[at[c.MessageID]][1] += c.Content
	}
	p.until(fmt.Sprintf(`gapless.seq >= %d && document.getElementById('seq').textContent === String(gapless.seq)`, len(chunks)))
	got := p.shown()
	for i := range max(len(want), len(got)) {
		switch {
		case i >= len(got):
			p.t.Fatalf("message %d of %d is not shown: %q", i+1, len(want), want[i])
		case i >= len(want):
			p.t.Fatalf("message %d is shown, but is not in the history: %q", i+1, got[i])
		case want[i] != got[i]:
			p.t.Fatalf("message %d is not the one of the history:\n got %q\nwant %q", i+1, got[i], want[i])
		}
	}
	counters := `[gapless.seq, gapless.gaps, gapless.doubles, gapless.resets].join() + ' '
		+ ['seq', 'gaps', 'doubles'].map(id => document.getElementById(id).textContent).join()`
	if got, want := eval[string](p, counters), fmt.Sprintf("%d,0,0,0 %[1]d,0,0", len(chunks)); got != want {
		p.t.Errorf("seq, gaps, doubles and resets, and what is shown of them: %s, not %s", got, want)
	}
}

// quietFor checks that no stream is requested for a while.
func (p *proxy) quietFor(d time.Duration) {
	p.t.Helper()
	n := len(p.seen())
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if all := p.seen(); len(all) > n {
			p.t.Fatalf("a request was made after the end: %s, Last-Event-ID %q", all[n].url, all[n].cursor)
		}
	}
}

// longerThanRetry is more than twice the longest retry time that a node sends.
const longerThanRetry = 7 * time.Second

const question = "What has bread to do with patience?"

// world is what the tests of the page share: a browser, a node, and two nodes of one Redis.
type world struct {
	browser context.Context
	node    *node
	redis   *storetest.Server
	a, b    *node
}

func TestPage(t *testing.T) {
	t.Parallel()
	w := world{browser: chromium(t), redis: storetest.Redis(t)}
	args := []string{"-redis", w.redis.URL(), "-heartbeat", "300ms", "-node"}
	w.node, w.a, w.b = start(t), start(t, append(args, "a")...), start(t, append(args, "b")...)
	for _, c := range []struct {
		name string
		test func(*testing.T, world)
	}{
		{"the answer to a question grows and ends as the history has it", testGrows},
		{"a reload in the middle of an answer loses nothing", testReload},
		{"a second tab shows the same", testSecondTab},
		{"a network that goes away and comes back with another node loses nothing", testNetworkChange},
		{"a browser that goes offline and online loses nothing", testOffline},
		{"after the end no request is made, not even after a reload", testEnd},
		{"an end that was copied from another log ends nothing", testCopiedEnd},
		{"numbers of a later epoch are shown as they are, and what they jump over is nothing", testLaterEpoch},
		{"ten thousand chunks of history are shown", testLongHistory},
		{"text of any kind is shown as it is", testText},
		{"Markdown that grows is drawn as if it had come at once, and what is done is not drawn again", testMarkdown},
		{"what a hostile answer says is shown, and does nothing", testHostile},
		{"what a hostile answer costs the page", testHostileIsDrawnSoon},
		{"a connection that is cut comes back by itself, and the inspector shows it", testCut},
		{"a throttled connection is late, and catches up", testThrottle},
		{"the naive viewer loses chunks where the page says so, and ours does not", testNaive},
		{"four more tabs are opened, or offered", testFourTabs},
		{"without the demo none is offered", testNoDemo},
		{"what a model thinks aloud is folded, also after a reload", testThinking},
		{"messages and code are copied, and a question is asked again", testCopyAndAgain},
		{"whole messages are said aloud, once", testAloud},
		{"everything is reached by keyboard", testKeyboard},
		{"axe finds nothing", testAccessible},
		{"Stop ends an answer in its middle, where the log ends it", testStop},
		{"Stop is there after a reload in the middle of an answer", testStopAfterReload},
		{"what one tab stops is stopped in the other", testStopFromSecondTab},
		{"an answer that has not said a word can be stopped", testStopBeforeFirstWord},
		{"an answer that ends without a word is no longer awaited", testWordless},
		{"after a stop by Escape another question is answered", testAskAfterStop},
		{"a Stop that does not reach the server says so, and stops nothing", testStopOffline},
		{"a Stop is sent once, and a refusal is shown unless nothing was left to stop", testStopRefused},
		{"an answer whose producer is lost says so in words", testProducerLost},
		{"where a token is wanted, one that is pasted will do until it expires, and another after it", testToken},
		{"an EventSource alone gets every chunk once and whole wherever connections are cut", testPlainEventSource},
		{"an EventSource that wants only what is new loses nothing when it is cut before that came", testLatest},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.test(t, w)
		})
	}
}

func testGrows(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/"), chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'live'`)
	// The page itself checks this, because this test may check too rarely.
	p.run(`window.states = [];
		new MutationObserver(() => {
			const text = document.querySelector('#log article[data-role=assistant] .text')?.textContent.trimEnd();
			if (text && text !== states.at(-1)) states.push(text);
		}).observe(document.getElementById('log'), { childList: true, subtree: true, characterData: true })`)
	p.ask(question)
	if got := p.shown(); got[0][1] != question {
		t.Fatalf("the question is shown as %q", got)
	}
	p.until(answered)
	states := eval[[]string](p, `states`)
	for i := 1; i < len(states); i++ {
		if !strings.HasPrefix(states[i], states[i-1]) {
			t.Fatalf("the answer did not grow:\nfrom %q\n  to %q", states[i-1], states[i])
		}
	}
	if len(states) < 2 { // a busy machine draws rarely
		t.Errorf("the answer grew in %d steps only", len(states))
	}
	p.showsTheHistory(w.node, p.session())
	if got := eval[int](p, `gapless.reconnects`); got != 0 {
		t.Errorf("%d reconnects, though nothing was cut", got)
	}
}

// The page keeps the token only in memory, and its EventSource uses a ticket. When the token has
// expired, the page asks for another one, and continues where it was.
func testToken(t *testing.T, w world) {
	issuer := authtest.New(t)
	n := start(t, "-auth", issuer.Source(), "-demo")
	const life = 45 * time.Second
	p := open(t, w.browser, n.url("/"), chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'disconnected' && !document.getElementById('login').hidden`)
	may := authtest.May{}
	for _, action := range []string{"read", "ask", "cancel"} {
		may[action] = []string{p.session()}
	}
	paste := func(token string) {
		p.run(fmt.Sprintf(`document.getElementById('token').value = %q; document.getElementById('login').requestSubmit()`, token))
	}
	paste("sesame")
	p.until(`gapless.state === 'disconnected' && document.getElementById('problem').textContent.includes('no token')`)
	paste(issuer.Token(life, may))
	p.until(`gapless.state === 'live' && document.getElementById('login').hidden`)
	p.run(`document.getElementById('compare').click()`) // it has the token's permissions, too
	p.until(`gapless.naive.state === 'live'`)
	p.run(`document.getElementById('cut').click()`)
	p.until(`gapless.reconnects === 1 && gapless.state === 'live'`)
	p.ask(question)
	p.until(`gapless.state === 'disconnected' && gapless.seq > 1 && !document.getElementById('login').hidden`)
	if kept := eval[string](p, `location.href + document.cookie + JSON.stringify(localStorage) + JSON.stringify(sessionStorage)`); strings.Contains(kept, "eyJ") {
		t.Errorf("the token is kept: %s", kept)
	}
	paste(issuer.Token(time.Hour, may))
	p.until(answered)
	if gaps, doubles := eval[int](p, `gapless.gaps`), eval[int](p, `gapless.doubles`); gaps+doubles > 0 {
		t.Errorf("%d gaps, %d doubles", gaps, doubles)
	}
}

func testThinking(t *testing.T, w world) {
	session := "thinking"
	path := "/v1/sessions/" + session + "/chunks"
	p := open(t, w.browser, w.node.url("/?session="+session), chromedp.WithNewBrowserContext())
	const summary = `document.querySelector('.thinking:not([hidden]):not([open]) summary')?.textContent`
	w.node.post(t, path, []chunk{{Type: "reasoning", MessageID: "m", Content: "Hm, <b>"}, {Type: "reasoning", MessageID: "m", Content: "tea."}})
	p.until(summary + ` === 'Thinking…'`)
	w.node.post(t, path, chunk{MessageID: "m", Content: "Green"})
	p.until(summary + ` === 'Thought for a moment'`)
	const folded = `document.querySelector('.thoughts').textContent === 'Hm, <b>tea.' && document.querySelector('.text').innerText.trim() === 'Green' && gapless.text('m') === 'Green'`
	p.until(folded)
	p.do("reload", chromedp.Reload())
	p.until(`window.gapless?.counts.snapshot > 0`)
	p.until(summary + ` === 'Thought for a moment'`)
	p.until(folded)
	p.press(".thinking summary")
	p.until(`document.querySelector('.thinking').open && document.querySelector('.thoughts').checkVisibility()`)
}

func testReload(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/"), chromedp.WithNewBrowserContext())
	p.ask(question)
	session := p.session()
	finish := w.node.answers(t, session)
	for _, seq := range []int{20, 80} {
		p.until(fmt.Sprintf(`gapless.seq >= %d`, seq))
		p.do("reload", chromedp.Reload())
		p.until(fmt.Sprintf(`gapless.seq > %d`, seq))
	}
	finish()
	p.until(answered)
	p.showsTheHistory(w.node, session)
	if got := p.session(); got != session {
		t.Errorf("session %s became %s", session, got)
	}
}

func testSecondTab(t *testing.T, w world) {
	first := open(t, w.browser, w.node.url("/"), chromedp.WithNewBrowserContext())
	session := first.session()
	finish := w.node.answers(t, session)
	first.until(`gapless.seq >= 20`)
	url := eval[string](first, `location.href`)
	second := open(t, first.ctx, url)                                  // in the same browser
	other := open(t, w.browser, url, chromedp.WithNewBrowserContext()) // in another browser, whose user received the link
	second.ask(question)
	tabs := []*tab{first, second, other}
	for _, p := range tabs {
		p.until(`document.querySelector('#log article[data-role=user] .text')?.textContent === '` + question + `'`)
	}
	finish()
	for _, p := range tabs {
		p.until(answered)
		p.showsTheHistory(w.node, session)
	}
}

func testNetworkChange(t *testing.T, w world) {
	line := newProxy(t, w.a, w.b)
	p := open(t, w.browser, line.url("/"), chromedp.WithNewBrowserContext())
	session := p.session()
	finish := w.a.answers(t, session)
	for i, to := range []string{"a", "b"} {
		p.until(fmt.Sprintf(`gapless.node === 'a' && gapless.seq >= %d`, 20+eval[int](p, `gapless.seq`)))
		before := len(line.seen())
		line.goOffline()
		p.until(`gapless.state === 'waiting to reconnect'`)
		// This lasts longer than the longest retry time, so that it retries in vain.
		eventually(t, "the log grows while the page is offline", func() bool {
			return len(w.a.history(t, session)) > eval[int](p, `gapless.seq`)+100
		})
		line.goOnline(i)
		p.until(fmt.Sprintf(`gapless.node === '%s' && gapless.reconnects === %d`, to, i+1))
		if s := line.seen()[before]; s.cursor == "" || s.status != http.StatusOK {
			t.Errorf("it came back with Last-Event-ID %q, and got %d", s.cursor, s.status)
		}
	}
	finish()
	p.showsTheHistory(w.b, session)
}

// Chromium's emulation refuses only what begins while it is offline. So the proxy breaks the stream
// that began before. (The browser's "online" event, which the page listens for, comes from here,
// too.)
func testOffline(t *testing.T, w world) {
	line := newProxy(t, w.node)
	p := open(t, w.browser, line.url("/"), chromedp.WithNewBrowserContext())
	session := p.session()
	finish := w.node.answers(t, session)
	p.until(`gapless.seq >= 20`)
	offline := func(is bool) {
		t.Helper()
		_, err := chromedp.Call(p.ctx, network.EmulateNetworkConditionsByRule, network.EmulateNetworkConditionsByRuleParams{
			MatchedNetworkConditions: []*network.Conditions{{Offline: is, DownloadThroughput: -1, UploadThroughput: -1}}})
		if err == nil {
			_, err = chromedp.Call(p.ctx, network.OverrideNetworkState, network.OverrideNetworkStateParams{
				Offline: is, DownloadThroughput: -1, UploadThroughput: -1})
		}
		if err != nil {
			t.Fatalf("emulate a network: %v", err)
		}
	}
	offline(true)
	line.resetAll()
	p.until(`!navigator.onLine && gapless.state === 'waiting to reconnect'`)
	eventually(t, "the log grows while the browser is offline", func() bool {
		return len(w.node.history(t, session)) > eval[int](p, `gapless.seq`)+100
	})
	if got := len(line.seen()); got != 1 {
		t.Fatalf("%d requests for the stream, not 1: the browser was not offline", got)
	}
	offline(false)
	p.until(`navigator.onLine && gapless.state === 'live' && gapless.reconnects === 1`)
	finish()
	p.showsTheHistory(w.node, session)
}

func testEnd(t *testing.T, w world) {
	line := newProxy(t, w.node)
	p := open(t, w.browser, line.url("/?session=ends"), chromedp.WithNewBrowserContext())
	p.until(`gapless.state === 'live'`)
	w.node.post(t, "/v1/sessions/ends/chunks", []chunk{{MessageID: "m", Content: "all that is to be said"}, {Type: "done", MessageID: "m"}})
	p.until(answered)
	w.node.post(t, "/v1/sessions/ends/chunks", chunk{Type: "end"})
	p.until(`gapless.state === 'ended' && document.body.dataset.state === 'ended'`)
	p.showsTheHistory(w.node, "ends")
	line.quietFor(longerThanRetry)
	if s := line.seen(); len(s) != 2 || s[1].status != http.StatusNoContent { // the 204 marks the end
		t.Errorf("%d requests for the stream, not 2", len(s))
	}

	p.do("reload", chromedp.Reload())
	p.until(`gapless.state === 'ended' && document.body.dataset.state === 'ended'`)
	p.showsTheHistory(w.node, "ends")
	if !eval[bool](p, `document.getElementById('ask').disabled`) {
		t.Error("one may still ask")
	}
	line.quietFor(longerThanRetry)
	if s := line.seen(); len(s) != 4 || s[3].status != http.StatusNoContent {
		t.Errorf("%d requests for the stream, not 4", len(s))
	}
}

// The end of another log was copied to the right place in this one. It ends nothing, neither when
// it comes nor after a reload, where it is part of a snapshot.
func testCopiedEnd(t *testing.T, w world) {
	const from, session = "copied-from", "copied-to"
	w.a.post(t, "/v1/sessions/"+from+"/chunks", []chunk{{MessageID: "m", Content: "one "}, {MessageID: "m", Content: "two "}, {Type: "end"}})
	if err := w.redis.Copy(t.Context(), "chat:history:"+from, "chat:history:"+session, 0, false).Err(); err != nil {
		t.Fatal(err)
	}
	p := open(t, w.browser, w.a.url("/?session="+session), chromedp.WithNewBrowserContext())
	goesOn := func(want string) {
		t.Helper()
		p.until(fmt.Sprintf(`document.querySelector('[data-id=m] .text')?.innerText.trim() === %q && gapless.state === 'live'`, strings.TrimSpace(want))) // it is drawn
		if !eval[bool](p, `document.getElementById('ended').hidden && !document.getElementById('ask').disabled && document.querySelector('[data-id=m]').dataset.status === 'streaming'`) {
			t.Errorf("the page says that it has ended, after %q", want)
		}
	}
	goesOn("one two ")
	w.a.post(t, "/v1/sessions/"+session+"/chunks", chunk{MessageID: "m", Content: "three "})
	goesOn("one two three ")
	end := w.redis.LIndex(t.Context(), "chat:history:"+from, -1).Val()
	forged := strings.Replace(end, `"seq":3,`, `"seq":5,`, 1)
	if err := errors.Join(w.redis.RPush(t.Context(), "chat:history:"+session, forged).Err(), w.redis.Publish(t.Context(), "chat:stream:"+session, forged).Err()); err != nil {
		t.Fatal(err)
	}
	p.until(`gapless.seq === 5`)
	w.b.post(t, "/v1/sessions/"+session+"/chunks", chunk{MessageID: "m", Content: "four "})
	goesOn("one two three four ")
	p.do("reload", chromedp.Reload())
	goesOn("one two three four ")
	w.b.post(t, "/v1/sessions/"+session+"/chunks", chunk{Type: "end"})
	p.until(`gapless.state === 'ended' && document.querySelector('[data-id=m]').dataset.status === 'unfinished' && document.getElementById('ask').disabled`)
	if got := eval[string](p, `[gapless.gaps, gapless.doubles, gapless.resets].join()`); got != "0,0,0" {
		t.Errorf("gaps, doubles and resets are %s", got)
	}
}

// In a later epoch, numbers begin after a multiple of 1,000,000. The numbers between were never
// chunks, and nothing is drawn, listed or counted for them.
func testLaterEpoch(t *testing.T, w world) {
	const base = 2_000_000
	snapshot := func(s says) {
		s.raw(fmt.Sprintf("event: snapshot\ndata: {\"type\":\"snapshot\",\"epoch\":\"later\",\"first_seq\":%d,\"last_seq\":%d,\"ended\":false,"+
			"\"messages\":[{\"message_id\":\"m\",\"role\":\"assistant\",\"content\":\"all\",\"status\":\"streaming\",\"done\":false,\"first_seq\":%[1]d,\"last_seq\":%d}]}\nid: %[2]d\n\n", base+1, base+5))
	}
	later := func(s says) { // to the reload, and to the page that is left, which may reconnect before it goes
		if s.r.Header.Get("Last-Event-ID") != "" {
			s.welcome("later", base+5, base+5)
			s.hang()
		}
		s.welcome("later", 0, base+5)
		s.reset("trimmed", "later", base, base+5)
		snapshot(s)
		s.hang()
	}
	f := newFake(t, session("later", base+5, false),
		func(s says) {
			s.welcome("first", 0, 3)
			s.chunks(1, 2, 3)
			s.reset("epoch", "later", base, base+3)
			s.chunks(base+1, base+2, base+3)
			s.breaks()
		},
		func(s says) { s.welcome("later", base+3, base+3); s.chunks(base+4, base+5); s.hang() },
		later, later, later)
	p := looks[0].open(t, w, f.URL+"/?session=s")
	shows := func(counts, text string) {
		t.Helper()
		p.until(fmt.Sprintf(`gapless.seq === %d && document.getElementById('seq').textContent === '2000005'`, base+5))
		p.until(`document.querySelector('#log .range').textContent === 'chunks 2000001–2000005'`)
		p.until(fmt.Sprintf(`gapless.messages.length === 1 && gapless.messages[0].text === %q`, text))
		if got := eval[string](p, `JSON.stringify(gapless.counts) + [gapless.gaps, gapless.doubles, gapless.resets].join()`); got != counts {
			t.Errorf("counted are %s", got)
		}
		p.until(`document.getElementById('plot-words').textContent.includes('up to number 2000005; ')`)
		// The numbers next to the plot are whole: none is cut off at its edge.
		eventually(t, "the plot is drawn, with room at its side", func() bool {
			return len(p.marks()) > 0 && eval[bool](p, `(() => {
				const plot = document.getElementById('plot');
				const { data } = plot.getContext('2d').getImageData(0, 0, 3, plot.height);
				return data.every((v) => v === 0);
			})()`)
		})
		if got := eval[int](p, `document.documentElement.scrollWidth - innerWidth`); got > 0 {
			t.Errorf("the page is %d px too wide", got)
		}
	}
	shows(`{"snapshot":0,"history":3,"live":2,"repaired":0,"lost":0}0,0,1`, "word 2000001word 2000002word 2000003word 2000004word 2000005")
	p.looks(looks[2])
	p.looks(looks[0])
	p.do("reload", chromedp.Reload())
	shows(`{"snapshot":5,"history":0,"live":0,"repaired":0,"lost":0}0,0,1`, "all")

	// The naive viewer has no resets: it sees only a jump of numbers. That is no loss.
	p.run(`import('/naive.js').then(({ Naive }) => {
		window.told = [];
		const events = [{ type: 'welcome', connection: 'c', last_seq: 0 }, { type: 'subscribed' }, { seq: 1 }, { seq: 3 }, { seq: 1000001 }, { seq: 1000003 }];
		const body = events.map((e) => 'data: ' + JSON.stringify(e) + '\n\n').join('');
		let asked = 0;
		window.n = new Naive('/naive', {
			fetch: async () => new Response(asked++ ? undefined : body, { status: asked > 1 ? 404 : 200 }),
			clear() {}, change() {}, chunk: (c) => told.push(c.seq), lost: (from, to) => told.push(from + '-' + to),
		});
		n.start(0);
	})`)
	p.until(`window.told?.at(-1) === 1000003`)
	if got := eval[string](p, `told.join() + ' ' + n.missing + ' ' + [...n.everLost].join()`); got != "1,2-2,3,1000001,1000002-1000002,1000003 2 2,1000002" {
		t.Errorf("the naive viewer says %s", got)
	}
	p.run(`n.stop(); n.state = 'live'; n.compare(3000005)`)
	if got := eval[int](p, `n.missing`); got != 2 {
		t.Errorf("the naive viewer misses %d chunks", got)
	}
}

func testLongHistory(t *testing.T, w world) {
	var chunks []chunk
	for i := range 10_000 {
		chunks = append(chunks, chunk{MessageID: fmt.Sprint("m", i/100), Content: fmt.Sprintf("word %d of many, ", i)})
	}
	for some := range slices.Chunk(chunks, 1000) {
		w.a.post(t, "/v1/sessions/long/chunks", some)
	}
	p := open(t, w.browser, w.a.url("/?session=long"), chromedp.WithNewBrowserContext())
	p.until(`gapless.seq === 10000 && gapless.state === 'live'`)
	p.showsTheHistory(w.a, "long")
	if got := eval[int](p, `gapless.reconnects`); got != 0 {
		t.Errorf("%d reconnects, though nothing was cut", got)
	}

	// A reload of a long answer costs one event.
	for some := range slices.Chunk(chunks, 1000) {
		for i := range some {
			some[i].MessageID = "one"
		}
		w.a.post(t, "/v1/sessions/long-answer/chunks", some)
	}
	line := newProxy(t, w.a)
	p.do("open", chromedp.Navigate(line.url("/?session=long-answer")))
	p.until(`gapless.seq === 10000 && gapless.state === 'live'`)
	p.do("reload", chromedp.Reload())
	p.until(`gapless.seq === 10000 && gapless.state === 'live'`)
	p.showsTheHistory(w.a, "long-answer")
	p.until(`document.getElementById('snapshot').textContent === '10000 chunks in one event'`)
	if got := eval[string](p, `JSON.stringify(gapless.counts)`); got != `{"snapshot":10000,"history":0,"live":0,"repaired":0,"lost":0}` {
		t.Errorf("it came as %s", got)
	}
	s := line.seen()
	if len(s) != 2 {
		t.Errorf("%d requests, not 2", len(s))
	}
	for _, again := range s[1:] {
		if events := bytes.Count(again.body, []byte("\nid: ")); events > 2 {
			t.Errorf("a request of a reload brought %d events", events)
		}
	}
}

// nasty are texts that have broken an event, a parser or a page somewhere.
var nasty = []string{
	" begins with a space", "ends with one ", "\n", "\r\n", "two\n\nlines", "a\rb", "\ttab", "\x00 and \x1f",
	"data: x\n\nid: 7\n\nevent: end\ndata: {}\n\n", ": comment", "\ufeffbyte order mark", "line\u2028and\u2029paragraph\u0085next",
	"<script>alert(1)</script>&amp;<!--", `"quoted" \ and \n`, "ä combined a\u0308", "🍞👩‍👩‍👧 \U0010ffff", "שלום\u202eabc",
	strings.Repeat("long ", 2000),
}

func testText(t *testing.T, w world) {
	var chunks []chunk
	for i, text := range nasty {
		chunks = append(chunks, chunk{MessageID: fmt.Sprint("m", i), Role: []string{"user", "tool"}[i%2], Content: text}, chunk{MessageID: "all", Content: text})
	}
	w.node.post(t, "/v1/sessions/text/chunks", chunks)
	p := open(t, w.browser, w.node.url("/?session=text"), chromedp.WithNewBrowserContext())
	p.showsTheHistory(w.node, "text")
	for i, m := range slices.DeleteFunc(p.shown(), func(m [2]string) bool { return m[0] == "all" }) {
		if m[1] != nasty[i] { // the history itself could be wrong
			t.Errorf("%q is shown as %q", nasty[i], m[1])
		}
	}
}

func testStop(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=stop"), chromedp.WithNewBrowserContext())
	told := w.node.talks(t, "stop")
	p.until(`gapless.seq >= 20`)
	p.press("#stop")
	p.showsTheStop(w.node, "stop", "talk")
	if got := told(); got != "message_cancelled" {
		t.Fatalf("its producer was told %s", got)
	}
	p.showsTheStop(w.node, "stop", "talk")
	if got := eval[string](p, `document.activeElement.id`); got != "ask" {
		t.Errorf("the focus went to %q with the button", got)
	}
}

func testStopAfterReload(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=stop-reload"), chromedp.WithNewBrowserContext())
	told := w.node.talks(t, "stop-reload")
	p.until(`gapless.seq >= 20 && ` + stoppable)
	p.do("reload", chromedp.Reload())
	p.until(`gapless.seq > 20 && ` + stoppable)
	p.press("#stop")
	p.showsTheStop(w.node, "stop-reload", "talk")
	if got := told(); got != "message_cancelled" {
		t.Errorf("its producer was told %s", got)
	}
	p.do("reload", chromedp.Reload())
	p.showsTheStop(w.node, "stop-reload", "talk")
}

func testStopFromSecondTab(t *testing.T, w world) {
	first := open(t, w.browser, w.node.url("/?session=stop-tabs"), chromedp.WithNewBrowserContext())
	told := w.node.talks(t, "stop-tabs")
	first.until(`gapless.seq >= 20 && ` + stoppable)
	second := open(t, first.ctx, eval[string](first, `location.href`))
	second.until(stoppable)
	second.press("#stop")
	if got := told(); got != "message_cancelled" {
		t.Fatalf("its producer was told %s", got)
	}
	for _, p := range []*tab{first, second} {
		p.showsTheStop(w.node, "stop-tabs", "talk")
	}
}

// asks makes the page ask a question, to which the server responds with that message id for the
// answer. No model answers it: the test decides when its first word comes.
func (p *tab) asks(n *node, session, reply string) {
	p.t.Helper()
	n.post(p.t, "/v1/sessions/"+session+"/chunks", chunk{Type: "message", MessageID: "q-" + reply, Role: "user", Content: question})
	p.run(`window.real ??= fetch;
		window.fetch = (url, options) => url.endsWith('/messages')
			? Promise.resolve(Response.json({ message_id: 'q-` + reply + `', reply_message_id: '` + reply + `' }, { status: 202 }))
			: real(url, options)`)
	p.types(question)
	p.press("#send")
	p.until(`document.getElementById('ask').value === ''`)
}

func testStopBeforeFirstWord(t *testing.T, w world) {
	const session = "stop-awaited"
	p := open(t, w.browser, w.a.url("/?session="+session), chromedp.WithNewBrowserContext())
	// The answer is an upload that stays silent.
	body, silence := io.Pipe()
	told := make(chan string, 1)
	var wg sync.WaitGroup
	wg.Go(func() { // ended by the stop, or with the test
		r, err := http.Post(w.a.url("/v1/sessions/"+session+"/chunks?message_id=r"), "text/plain", body)
		if err != nil {
			told <- err.Error()
			return
		}
		answer, _ := io.ReadAll(r.Body)
		_ = r.Body.Close()
		told <- string(answer)
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = silence.Close() })
	eventually(t, "the upload has begun", func() bool { return w.redis.HExists(t.Context(), "chat:session:"+session, "m:r").Val() })

	p.asks(w.a, session, "r")
	p.until(`!document.getElementById('waiting').hidden && ` + stoppable)
	if got := len(w.a.history(t, session)); got != 1 {
		t.Fatalf("the log has %d chunks, not the question alone", got)
	}
	p.press("#stop")
	p.showsTheStop(w.a, session, "r")
	if !eval[bool](p, `document.getElementById('waiting').hidden`) {
		t.Error("the answer is still awaited")
	}
	if got := <-told; !strings.Contains(got, "message_cancelled") {
		t.Errorf("its producer was told %s", got)
	}
}

func testWordless(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=wordless"), chromedp.WithNewBrowserContext())
	p.asks(w.node, "wordless", "r")
	p.until(`!document.getElementById('waiting').hidden && ` + stoppable)
	over := `document.getElementById('waiting').hidden && document.getElementById('stop').hidden`
	w.node.post(t, "/v1/sessions/wordless/chunks", chunk{Type: "done", MessageID: "r"})
	p.until(over)

	// The end may come before the page learns which answer to wait for.
	w.node.post(t, "/v1/sessions/wordless/chunks", chunk{Type: "done", MessageID: "s"})
	p.until(`gapless.seq === 3`)
	p.asks(w.node, "wordless", "s")
	w.node.post(t, "/v1/sessions/wordless/chunks", chunk{Type: "message", MessageID: "next", Content: "that is drawn behind it"})
	p.until(`document.getElementById('seq').textContent === '5'`)
	if !eval[bool](p, over) {
		t.Error("an answer is awaited that had ended when it was promised")
	}
}

func testAskAfterStop(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/"), chromedp.WithNewBrowserContext())
	p.ask(question)
	session := p.session()
	p.until(`document.querySelector('#log article[data-role=assistant]')?.dataset.status === 'streaming' && ` + stoppable)
	first := eval[string](p, `document.querySelector('#log article[data-role=assistant]').dataset.id`)
	p.do("press Escape", chromedp.KeyEvent(kb.Escape))
	p.showsTheStop(w.node, session, first)

	p.ask("And what with time?")
	p.until(`document.querySelectorAll('#log article').length === 4 && ` + stoppable)
	p.until(`Array.from(document.querySelectorAll('#log article'), a => a.dataset.status).join() === 'done,cancelled,done,done'`)
	p.until(`document.getElementById('stop').hidden`)
	p.showsTheHistory(w.node, session)
	// While the second answer came, nothing came of the first.
	var end string
	for _, c := range w.node.history(t, session) {
		if c.MessageID == first {
			end = c.Type
		}
	}
	if end != "cancelled" {
		t.Errorf("the first answer went on behind its end, with a %s", end)
	}
}

func testStopOffline(t *testing.T, w world) {
	line := newProxy(t, w.node)
	p := open(t, w.browser, line.url("/?session=stop-offline"), chromedp.WithNewBrowserContext())
	told := w.node.talks(t, "stop-offline")
	p.until(`gapless.seq >= 20 && ` + stoppable)
	line.goOffline()
	p.press("#stop")
	p.until(`document.getElementById('problem').innerText.startsWith('The server did not answer.')`)
	line.goOnline(0)
	p.until(fmt.Sprintf(`gapless.state === 'live' && gapless.seq > %d`, 20+eval[int](p, `gapless.seq`)))
	if got := eval[string](p, `gapless.messages[0].status`); got != "streaming" {
		t.Errorf("nobody has stopped it, and it is shown as %s", got)
	}
	p.press("#stop")
	p.showsTheStop(w.node, "stop-offline", "talk")
	p.until(`document.getElementById('problem').hidden`)
	if got := told(); got != "message_cancelled" {
		t.Errorf("its producer was told %s", got)
	}
}

func testStopRefused(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=stop-refused"), chromedp.WithNewBrowserContext())
	told := w.node.talks(t, "stop-refused")
	p.until(stoppable)
	p.run(`window.real = fetch, window.presses = 0;
		window.fetch = () => (presses++, new Promise((resolve) => { window.answer = resolve; }))`)
	for i, c := range []struct {
		status int
		shown  string
	}{
		{http.StatusServiceUnavailable, "Redis cannot be reached."},
		{http.StatusConflict, ""},
		{http.StatusNotFound, ""},
	} {
		p.press("#stop")
		p.press("#stop")
		if got := eval[string](p, `presses + document.getElementById('stop').ariaDisabled`); got != fmt.Sprint(i+1, "true") {
			t.Errorf("%d: after a press that is not answered, and another one: %s", c.status, got)
		}
		p.run(fmt.Sprintf(`answer(Response.json({ detail: 'Redis cannot be reached.' }, { status: %d }))`, c.status))
		p.until(`document.getElementById('stop').ariaDisabled === null`)
		if got := eval[string](p, `document.getElementById('problem').innerText`); got != c.shown {
			t.Errorf("%d: the page says %q, not %q", c.status, got, c.shown)
		}
		if got := eval[string](p, `gapless.messages[0].status`); got != "streaming" || !eval[bool](p, stoppable) {
			t.Errorf("%d: nothing was stopped, and it is shown as %s", c.status, got)
		}
	}
	p.run(`window.fetch = real`)
	p.press("#stop")
	p.showsTheStop(w.node, "stop-refused", "talk")
	if got := told(); got != "message_cancelled" {
		t.Errorf("its producer was told %s", got)
	}
}

func testProducerLost(t *testing.T, w world) {
	p := open(t, w.browser, w.node.url("/?session=lost"), chromedp.WithNewBrowserContext())
	body, line := io.Pipe()
	breakOff := func() { _ = line.CloseWithError(io.ErrUnexpectedEOF) }
	var wg sync.WaitGroup
	wg.Go(func() { // ended by breakOff
		if r, err := http.Post(w.node.url("/v1/sessions/lost/chunks"), "application/x-ndjson", body); err == nil {
			_ = r.Body.Close()
			t.Errorf("the upload was answered: %s", r.Status)
		}
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(breakOff)
	if _, err := io.WriteString(line, `{"message_id":"half","content":"half a "}`+"\n"); err != nil {
		t.Fatal(err)
	}
	p.until(`gapless.text('half') === 'half a ' && ` + stoppable)
	breakOff()
	label := `document.querySelector('#log article[data-id=half] .label').innerText`
	p.until(label + ` !== ''`)
	if got := eval[string](p, label); got != "Failed: its producer was lost" {
		t.Errorf("below it stands %q", got)
	}
	p.until(`document.getElementById('stop').hidden`)
	p.showsTheHistory(w.node, "lost")

	// Any other reason is the producer's own, and is shown unchanged.
	w.node.post(t, "/v1/sessions/lost/chunks", chunk{Type: "failed", MessageID: "half too", Reason: "constructor"})
	p.until(`document.querySelector('#log article[data-id="half too"] .label')?.innerText === 'Failed: constructor'`)
}

// This page contains no code of ours, so the test proves the wire format.
func testPlainEventSource(t *testing.T, w world) {
	line := newProxy(t, w.a, w.b)
	line.route = func(stream int) int { return stream % 2 }
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	line.cuts = []cut{
		where(`\n()\n`), // after the id line of welcome, before it is whole
		anywhere(random),
		where(`}\nid: \d()\d`), // in an id
		anywhere(random),
		where(`}\nid: \d+\n()\n`), // one byte before a chunk is whole
		anywhere(random),
	}
	for i := range 100 {
		w.a.post(t, "/v1/sessions/plain/chunks", chunk{MessageID: "m", Content: nasty[i%(len(nasty)-1)]})
	}

	p := open(t, w.browser, line.url("/healthz"), chromedp.WithNewBrowserContext())
	p.run(`window.events = [], window.others = [];
		window.source = new EventSource('/v1/sessions/plain/stream');
		source.onmessage = e => events.push([e.lastEventId, e.data]);
		for (const name of ['welcome', 'reset']) source.addEventListener(name, e => others.push(name))`)
	n := 100
	eventually(t, "all cuts are made", func() bool {
		[]*node{w.a, w.b}[n%2].post(t, "/v1/sessions/plain/chunks", chunk{MessageID: "m", Content: nasty[n%(len(nasty)-1)]})
		n++
		return len(line.seen()) > len(line.cuts)
	})
	p.until(fmt.Sprintf(`events.length >= %d`, n))
	w.a.post(t, "/v1/sessions/plain/chunks", chunk{Type: "end"})
	p.until(`source.readyState === EventSource.CLOSED`)
	line.quietFor(longerThanRetry)

	list := w.redis.LRange(t.Context(), "chat:history:plain", 0, -1).Val()
	gotAll(t, list, eval[[][2]string](p, `events`))
	streams := line.seen()
	if last := streams[len(streams)-1]; last.status != http.StatusNoContent || last.cursor != fmt.Sprint(len(list)) {
		t.Errorf("the last request was answered with %d, and came with Last-Event-ID %s of %d", last.status, last.cursor, len(list))
	}
	torn := 0
	for _, s := range streams {
		if s.torn() {
			torn++
		}
	}
	if torn < 3 {
		t.Errorf("only %d of %d cuts were in the middle of an event: this proves little", torn, len(line.cuts))
	}
	for _, name := range eval[[]string](p, `others`) {
		if name != "welcome" {
			t.Errorf("there was a %s", name)
		}
	}
}

// The id of welcome exists for this: when the page reconnects, latest is another chunk.
func testLatest(t *testing.T, w world) {
	line := newProxy(t, w.node)
	w.node.post(t, "/v1/sessions/latest/chunks", []chunk{{Content: "old"}, {Content: "old, too"}})
	p := open(t, w.browser, line.url("/healthz"), chromedp.WithNewBrowserContext())
	p.run(`window.events = [], window.welcomes = 0;
		window.source = new EventSource('/v1/sessions/latest/stream?after=latest');
		source.addEventListener('welcome', () => welcomes++);
		source.onmessage = e => events.push(e.lastEventId + ' ' + JSON.parse(e.data).content)`)
	p.until(`welcomes === 1`)
	line.resetAll()
	w.node.post(t, "/v1/sessions/latest/chunks", chunk{Content: "said meanwhile"})
	p.until(`welcomes === 2`)
	w.node.post(t, "/v1/sessions/latest/chunks", chunk{Content: "said later"})
	p.until(`events.at(-1)?.endsWith('said later')`)
	if got := eval[string](p, `events.join('; ')`); got != "3 said meanwhile; 4 said later" {
		t.Errorf("it got %q", got)
	}
}

// gotAll checks that the events, as [id, data], are the elements of the list, each once, in order,
// byte by byte.
func gotAll(t *testing.T, list []string, events [][2]string) {
	t.Helper()
	for i := range max(len(list), len(events)) {
		switch {
		case i >= len(events):
			t.Fatalf("%d of %d chunks arrived; the next was %.200q", len(events), len(list), list[i])
		case i >= len(list):
			t.Fatalf("there are %d chunks, and more arrived: %.200q", len(list), events[i])
		case events[i] != [2]string{fmt.Sprint(i + 1), list[i]}:
			t.Fatalf("chunk %d arrived as\n%.300q, not as\n%.300q", i+1, events[i], list[i])
		}
	}
}
