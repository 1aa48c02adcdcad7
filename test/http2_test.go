package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"gapless/api/server"
	"gapless/store/storetest"
)

// These tests are about the special properties of TLS and HTTP/2. The tests that run everyWay show that all promises
// hold there, too.

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// secret is a directory with a certificate and its key, mounted as Kubernetes does: the files are links into a
// directory that is itself a link, and that link is swapped.
type secret struct {
	t    *testing.T
	dir  string
	next int
}

func (s *secret) file(name string) string { return filepath.Join(s.dir, name) }

func (s *secret) put(cert, key string) {
	t := s.t
	t.Helper()
	s.next++
	version := fmt.Sprint("..version", s.next)
	if err := os.Mkdir(s.file(version), 0o700); err != nil {
		t.Fatal(err)
	}
	copyFile(t, cert, filepath.Join(s.file(version), "tls.crt"))
	copyFile(t, key, filepath.Join(s.file(version), "tls.key"))
	for _, link := range [][2]string{{version, "..data"}, {"..data/tls.crt", "tls.crt"}, {"..data/tls.key", "tls.key"}} {
		if err := errors.Join(os.Symlink(link[0], s.file("new")), os.Rename(s.file("new"), s.file(link[1]))); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTLS_aCertificateThatIsReplacedIsTakenWithoutARestart(t *testing.T) {
	t.Parallel()
	authority := storetest.NewAuthority(t)
	s := secret{t: t, dir: t.TempDir()}
	s.put(authority.Issue("127.0.0.1", "first.example"))
	n := start(t, "-tls-cert", s.file("tls.crt"), "-tls-key", s.file("tls.key"))
	session := newID()
	n.append(t, session, words(1, 3))
	v := &viewer{session: session}
	ctx, cancel := context.WithCancel(deadline(t))
	wait := background(t, func() { v.connect(ctx, n.addr, nil) })
	eventually(t, "the viewer has all", func() bool { return v.seen.Load() == 3 })
	named := func(name string) bool {
		config := authority.Config()
		config.ServerName = name
		conn, err := tls.Dial("tcp", n.addr, config)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	}
	if !named("first.example") || named("second.example") {
		t.Error("the first certificate is not what the node shows")
	}
	s.put(authority.Issue("127.0.0.1", "second.example"))
	eventually(t, "the second certificate is shown", func() bool { return named("second.example") })
	n.append(t, session, words(4, 1))
	eventually(t, "the viewer of the first one goes on", func() bool { return v.seen.Load() == 4 })
	cancel()
	wait()
	if v.connections != 1 {
		t.Errorf("the viewer made %d connections", v.connections)
	}
}

func TestTLS_aNewCertificateThatIsBadChangesNothing(t *testing.T) {
	t.Parallel()
	authority := storetest.NewAuthority(t)
	var log bytes.Buffer
	s := secret{t: t, dir: t.TempDir()}
	cert, key := authority.Issue("one.example")
	s.put(cert, key)
	c, err := server.OpenCertificate(s.file("tls.crt"), s.file("tls.key"), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	c.Every = 0
	shows := func() string {
		pair, err := c.Get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf.Subject.CommonName
	}
	otherCert, otherKey := authority.Issue("two.example")
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("-----BEGIN CERTIFICATE-----\nhalf of it"), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, files := range map[string][2]string{"half replaced": {otherCert, key}, "torn": {broken, otherKey}} {
		log.Reset()
		s.put(files[0], files[1])
		for range 3 {
			if got := shows(); got != "one.example" {
				t.Errorf("%s: it shows %s", what, got)
			}
		}
		if got := log.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, s.file("tls.crt")) {
			t.Errorf("%s: the log says %q", what, got)
		}
	}
	if err := os.Remove(s.file("tls.key")); err != nil {
		t.Fatal(err)
	}
	if got := shows(); got != "one.example" {
		t.Errorf("without a key it shows %s", got)
	}
	s.put(otherCert, otherKey)
	if got := shows(); got != "two.example" {
		t.Errorf("a good one is not taken behind a bad one: it shows %s", got)
	}
}

func TestTLS_isNotOlderThan12AndSaysThatItStays(t *testing.T) {
	t.Parallel()
	authority := storetest.NewAuthority(t)
	cert, key := authority.Issue("127.0.0.1")
	n := start(t, "-tls-cert", cert, "-tls-key", key)
	old := authority.Config()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if conn, err := tls.Dial("tcp", n.addr, old); err == nil {
		_ = conn.Close()
		t.Errorf("it speaks %s", tls.VersionName(conn.ConnectionState().Version))
	}
	session := newID()
	n.append(t, session, `{"type":"end"}`)
	for _, path := range []string{"/", "/healthz", "/none", "/v1/sessions/" + session + "/stream"} {
		if got := n.get(path).header.Get("Strict-Transport-Security"); got != "max-age=31536000" {
			t.Errorf("%s says %q", path, got)
		}
	}
	plain := start(t)
	if got := plain.get("/").header.Get("Strict-Transport-Security"); got != "" {
		t.Errorf("without TLS it says %q", got)
	}
}

func TestTLS_filesThatAreMissingOrDoNotFitAreNamedAtStart(t *testing.T) {
	t.Parallel()
	authority := storetest.NewAuthority(t)
	cert, _ := authority.Issue("127.0.0.1")
	_, other := authority.Issue("127.0.0.1")
	for _, args := range [][]string{
		{"-tls-cert", cert},
		{"-tls-key", other},
		{"-tls-cert", cert, "-tls-key", other, "-h2c"},
		{"-tls-cert", cert, "-tls-key", other, "-listen", "127.0.0.1:0"},
		{"-tls-cert", "nowhere.pem", "-tls-key", other, "-listen", "127.0.0.1:0"},
	} {
		code, out := program(t, nil, args...)
		if code == 0 || !strings.Contains(out, "-tls-cert") {
			t.Errorf("%v: exit code %d: %s", args, code, out)
		}
	}
}

// counting counts the connections that it makes.
type counting struct {
	net.Dialer
	made atomic.Int64
}

func (c *counting) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c.made.Add(1)
	return c.DialContext(ctx, network, addr)
}

// In HTTP/1.1 a browser makes at most six connections to a server.
func TestHTTP2_fiftyStreamsOfOnePageShareAConnectionAndAStalledOneStopsNoOther(t *testing.T) {
	t.Parallel()
	cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
	n := start(t, "-tls-cert", cert, "-tls-key", key)
	ctx := deadline(t)
	w, _ := ways.Load(n.addr)
	shared, connections := w.(way), &counting{}
	transport := shared.transport(&net.Dialer{Control: smallReceiveBuffer}) // a window of 64 KiB per stream
	transport.DialContext = connections.dial
	shared.client = &http.Client{Transport: transport}
	ways.Store(n.addr, shared) // all requests of a page share its connections
	t.Cleanup(transport.CloseIdleConnections)

	full := newID()
	large(t, n, full, "")
	_, done, err := (&viewer{session: full}).stream(ctx, n.addr) // none of it is read
	if err != nil {
		t.Fatal(err)
	}
	defer done(false)

	const count = 50
	viewers := make([]*viewer, count)
	var wg sync.WaitGroup
	for i := range viewers {
		viewers[i] = &viewer{session: newID()}
		n.append(t, viewers[i].session, words(1, 2))
		wg.Go(func() { viewers[i].follow(ctx, at(n.addr), nil) })
	}
	for _, v := range viewers {
		eventually(t, "the stream has begun", func() bool { return v.seen.Load() == 2 })
	}
	for i := range 5 {
		for _, v := range viewers {
			n.append(t, v.session, words(3+i, 1))
		}
	}
	for _, v := range viewers {
		n.append(t, v.session, fmt.Sprintf(`[{"content":%q},{"type":"end"}]`, strings.Repeat("x", 20_000)))
	}
	wg.Wait()
	for _, v := range viewers {
		v.check(t, n.pages(t, v.session))
		if v.unreset(t); v.connections != 1 {
			t.Errorf("a viewer came back %d times", v.connections-1)
		}
	}
	if got := connections.made.Load(); got != 1 {
		t.Errorf("%d connections were made", got)
	}
}

// frames is an HTTP/2 connection without TLS on which the test handles every frame.
type frames struct {
	*http2.Framer
	t    *testing.T
	conn net.Conn
	head bytes.Buffer
	enc  *hpack.Encoder
}

func dialFrames(t *testing.T, addr string, settings ...http2.Setting) *frames {
	t.Helper()
	conn, err := (&net.Dialer{Control: smallReceiveBuffer}).Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	f := &frames{Framer: http2.NewFramer(conn, conn), t: t, conn: conn}
	f.enc = hpack.NewEncoder(&f.head)
	_, err = io.WriteString(conn, http2.ClientPreface)
	if err = errors.Join(err, f.WriteSettings(settings...)); err != nil {
		t.Fatal(err)
	}
	return f
}

// more restarts the deadline for the next frames.
func (f *frames) more() {
	_ = f.conn.SetDeadline(time.Now().Add(patience))
	storetest.Moved(f.t)
}

// get sends a GET as a stream.
func (f *frames) get(stream uint32, path string) error {
	f.more()
	f.head.Reset()
	for _, h := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "localhost"}, {":path", path}} {
		_ = f.enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: f.head.Bytes(), EndStream: true, EndHeaders: true})
}

// until reads frames up to the first that is wanted, and acknowledges settings and pings.
func (f *frames) until(what string, is func(http2.Frame) bool) {
	f.t.Helper()
	f.more()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			f.t.Fatalf("%s: %v", what, err)
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				_ = f.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				_ = f.WritePing(true, frame.Data)
			}
		}
		if is(frame) {
			return
		}
	}
}

func TestHTTP2_aDrainResetsStreamsAndSaysGoAway(t *testing.T) {
	t.Parallel()
	n := start(t, "-h2c", "-drain", "10s")
	session := newID()
	n.append(t, session, words(1, 3))
	f := dialFrames(t, n.addr)
	if err := f.get(1, "/v1/sessions/"+session+"/stream"); err != nil {
		t.Fatal(err)
	}
	var data bytes.Buffer
	f.until("the chunks", func(frame http2.Frame) bool {
		if d, ok := frame.(*http2.DataFrame); ok {
			data.Write(d.Data())
		}
		return strings.HasSuffix(data.String(), "id: 3\n\n")
	})
	n.terminate()
	eventually(t, "the node drains", func() bool { return n.get("/readyz").status == http.StatusServiceUnavailable })
	// A new stream on the existing connection is broken off, and the client must use another connection.
	if err := f.get(3, "/v1/sessions/"+session+"/stream"); err != nil {
		t.Fatal(err)
	}
	away, broken := false, map[uint32]bool{}
	f.until("GOAWAY and the end of both streams", func(frame http2.Frame) bool {
		switch frame := frame.(type) {
		case *http2.GoAwayFrame:
			if away = true; frame.ErrCode != http2.ErrCodeNo {
				t.Errorf("GOAWAY says %v", frame.ErrCode)
			}
		case *http2.RSTStreamFrame:
			if broken[frame.StreamID] = true; frame.StreamID == 3 && !away {
				t.Error("who was sent away was not told to take another connection")
			}
		case *http2.DataFrame:
			if frame.StreamEnded() {
				t.Errorf("stream %d was ended as if its log had ended", frame.StreamID)
			}
		}
		return away && broken[1] && broken[3]
	})
	n.exits(t, 10*time.Second)
}

// CVE-2023-44487: a client that opens streams and resets them at once costs itself more than the node.
func TestHTTP2_streamsThatAreOpenedAndResetLeaveNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := startProgram(t, plainProgram(t), "-redis", redis.URL(), "-h2c", "-linger", "0s", "-pprof", "127.0.0.1:0")
	profiles := regexp.MustCompile(`flag=-pprof at=(\S+)`).FindStringSubmatch(n.log.String())
	session := newID()
	n.append(t, session, words(1, 20))
	other := &viewer{session: session}
	wait := background(t, func() { other.follow(deadline(t), at(n.addr), nil) })
	eventually(t, "the other viewer has all", func() bool { return other.seen.Load() == 20 })
	storm := func(count int) {
		var wg sync.WaitGroup
		for range 4 {
			f := dialFrames(t, n.addr)
			wg.Go(func() { _, _ = io.Copy(io.Discard, f.conn) }) // ends when the connection does
			wg.Go(func() {
				defer f.conn.Close()
				for i := range count / 4 {
					stream := uint32(2*i + 1)
					if f.get(stream, "/v1/sessions/"+session+"/stream") != nil || f.WriteRSTStream(stream, http2.ErrCodeCancel) != nil {
						return // the node has closed the connection
					}
				}
			})
		}
		wg.Wait()
	}
	quiet := func() (goroutines float64) {
		eventually(t, "all but one have left", func() bool {
			m, _ := n.scrape(t)
			goroutines = m["go_goroutines"]
			return m["gapless_viewers"] == 1
		})
		eventually(t, "goroutines have ended", func() bool {
			m, _ := n.scrape(t)
			settled := m["go_goroutines"] >= goroutines
			goroutines = m["go_goroutines"]
			return settled
		})
		return goroutines
	}
	live := func() float64 { // bytes, after a collection
		r, err := http.Get(profiles[1] + "/debug/pprof/heap?gc=1")
		if err != nil || r.Body.Close() != nil {
			t.Fatal(err)
		}
		m, _ := n.scrape(t)
		return m["go_memstats_heap_alloc_bytes"]
	}
	storm(4_000) // fills pools, once
	before, heap := quiet(), live()
	storm(40_000)
	n.append(t, session, words(21, 1))
	eventually(t, "the other viewer goes on", func() bool { return other.seen.Load() == 21 })
	after := quiet()
	t.Logf("goroutines %.0f, then %.0f", before, after)
	if after > before+10 {
		t.Errorf("%.0f goroutines are left, %.0f were there", after, before)
	}
	eventually(t, "what they took is collected", func() bool { return live() < heap+8<<20 }) // one KiB left of each would be 40 MiB
	n.append(t, session, `{"type":"end"}`)
	wait()
	other.check(t, history(t, redis, session))
	if other.connections != 1 {
		t.Errorf("the other viewer made %d connections", other.connections)
	}
}

// Its streams have open windows, so none of them waits for a window: the connection itself stands still.
func TestHTTP2_aConnectionThatTakesNothingIsClosed(t *testing.T) {
	t.Parallel()
	n := start(t, "-h2c", "-write-timeout", "500ms")
	session := newID()
	large(t, n, session, "")
	f := dialFrames(t, n.addr, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
	if err := errors.Join(f.WriteWindowUpdate(0, 1<<30), f.get(1, "/v1/sessions/"+session+"/stream")); err != nil {
		t.Fatal(err)
	}
	viewers := func() float64 {
		m, _ := n.scrape(t)
		return m["gapless_viewers"]
	}
	eventually(t, "the viewer is there", func() bool { return viewers() == 1 })
	eventually(t, "the viewer has gone", func() bool { return viewers() == 0 })
}

func TestHTTP2_anUploadIsToldAtOnceWhatIsWrong(t *testing.T) {
	t.Parallel()
	n := start(t, "-h2c")
	session := newID()
	lines, answered := upload(t, n, session)
	if _, err := io.WriteString(lines, "{\"data\":0}\n{\"data\":0}\nno JSON\n"); err != nil {
		t.Fatal(err)
	}
	select { // the body continues
	case a := <-answered:
		if p := a.problem(t); a.status != http.StatusBadRequest || p.Stored == nil || p.Stored.Count != 2 {
			t.Errorf("%d %s", a.status, a.body)
		}
	case <-time.After(patience):
		t.Fatal("no answer while the body goes on")
	}
}

// A client that opens no window for any response keeps each stream no longer than the write timeout, and then loses the
// connection, even if requests are refused meanwhile.
func TestHTTP2_aConnectionWhoseResponsesNobodyTakesIsClosed(t *testing.T) {
	t.Parallel()
	n := start(t, "-h2c", "-write-timeout", "500ms", "-idle-timeout", "1h", "-responses", "512KiB", "-caller-responses", "512KiB")
	for _, path := range []string{"/docs/swagger-ui-bundle.js", "/healthz", "/v1/sessions/s", "/nothing"} {
		f := dialFrames(t, n.addr, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		for i := range 40 { // eight are under way
			if f.get(uint32(2*i+1), path) != nil {
				break // it is closed already
			}
		}
		for {
			if _, err := f.ReadFrame(); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s: the connection goes on", path)
				}
				break
			}
		}
	}
	eventually(t, "others are served", func() bool { return n.get("/v1/sessions/s").status == http.StatusNotFound })
}
