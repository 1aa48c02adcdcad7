//go:build linux

package test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// siegeOrder is an attacker's task.
type siegeOrder struct {
	Attack, Addr, Token string
	TLS                 bool
	Small               bool     // there is only a moment
	Said                []string // responses that must have come before it ends
}

// siegeOutcome is what an attacker observed.
type siegeOutcome struct {
	Said map[string]int // responses, by status and code
	Kept time.Duration  // the longest time that a connection without progress was kept
}

// attacker makes one attack, in a separate process, until it is told to stop.
type attacker struct {
	siegeOrder
	ctx context.Context // ends with the attack
	web *http.Client    // HTTP/1.1, with as many connections as needed

	mu  sync.Mutex
	out siegeOutcome
}

func init() {
	roles["attacker"] = func([]string) {
		a := &attacker{out: siegeOutcome{Said: map[string]int{}}}
		if err := json.NewDecoder(os.Stdin).Decode(&a.siegeOrder); err != nil {
			panic(err)
		}
		i := slices.IndexFunc(siegeAttacks, func(s siegeAttack) bool { return s.name == a.Attack })
		run := func(a *attacker) { <-a.ctx.Done() }
		if i >= 0 {
			run = siegeAttacks[i].run
		}
		var cancel context.CancelFunc
		a.ctx, cancel = context.WithCancel(context.Background())
		told := make(chan os.Signal, 1)
		signal.Notify(told, syscall.SIGTERM)
		fmt.Println("begun")
		go func() { // ended by the end of the process
			<-told
			for waited := 0; waited < 600 && !a.heard(); waited++ {
				time.Sleep(100 * time.Millisecond)
			}
			cancel()
		}()
		a.web = a.client()
		run(a)
		<-a.ctx.Done()
		a.mu.Lock() // later calls are not counted
		if err := json.NewEncoder(os.Stdout).Encode(a.out); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
}

func (a *attacker) said(what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.out.Said[what]++
}

// heard reports whether all required responses have come.
func (a *attacker) heard() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !slices.ContainsFunc(a.siegeOrder.Said, func(what string) bool { return a.out.Said[what] == 0 })
}

// few returns n, or less if there is only a moment.
func (a *attacker) few(n int) int {
	if a.Small {
		return max(1, n/5)
	}
	return n
}

func (a *attacker) over() bool { return a.ctx.Err() != nil }

// rest waits, and reports whether the attack continues.
func (a *attacker) rest(d time.Duration) bool {
	select {
	case <-a.ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// many runs n goroutines that repeat something until the attack is over.
func (a *attacker) many(n int, do func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for !a.over() {
				do(i)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-a.ctx.Done():
		select { // some goroutines wait for a socket
		case <-done:
		case <-time.After(2 * time.Second):
		}
	}
}

// dial connects from one of this machine's addresses, with a small receive buffer.
func (a *attacker) dial(from string, protocols ...string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second, Control: smallReceiveBuffer}
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", a.Addr)
	if err != nil || !a.TLS || len(protocols) > 0 && protocols[0] == "tcp" {
		return conn, err
	}
	secure := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: protocols}) // #nosec G402 -- it is our own server
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secure, nil
}

const evil = "127.0.0.2"

// client returns an HTTP client with the attacker's address.
func (a *attacker) client() *http.Client {
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(evil)}, Timeout: 10 * time.Second}
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: d.DialContext, MaxIdleConnsPerHost: 256, DisableCompression: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // #nosec G402
}

func (a *attacker) url(path string) string {
	if a.TLS {
		return "https://" + a.Addr + path
	}
	return "http://" + a.Addr + path
}

// call makes a call, and counts the response. It returns the status, or 0 without a response, and the beginning of the body.
func (a *attacker) call(method, path, kind, body string, headers ...string) (int, string) {
	r, err := http.NewRequestWithContext(a.ctx, method, a.url(path), strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	if a.Token != "" {
		r.Header.Set("Authorization", "Bearer "+a.Token)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	res, err := a.web.Do(r)
	if err != nil {
		if !a.over() {
			a.said("no answer")
			a.rest(10 * time.Millisecond)
		}
		return 0, ""
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 32<<20))
	what := strconv.Itoa(res.StatusCode)
	var problem struct{ Code string }
	if res.StatusCode >= 400 && json.Unmarshal(text, &problem) == nil && problem.Code != "" {
		what += " " + problem.Code
	}
	if limit := res.Header.Get("Gapless-Refused"); limit != "" {
		what += " refused " + limit
	}
	a.said(what)
	if res.StatusCode == http.StatusTooManyRequests || res.StatusCode == http.StatusServiceUnavailable {
		a.rest(20 * time.Millisecond) // thousands a second would only measure the machine
	}
	return res.StatusCode, string(text)
}

// request returns a request as text.
func (a *attacker) request(path string, headers ...string) string {
	var text strings.Builder
	text.WriteString("GET " + path + " HTTP/1.1\r\nHost: localhost\r\n")
	if a.Token != "" {
		text.WriteString("Authorization: Bearer " + a.Token + "\r\n")
	}
	for _, line := range headers {
		text.WriteString(line + "\r\n")
	}
	return text.String() + "\r\n"
}

// hold keeps n connections open, and replaces those that are closed. open opens one. drip, if not nil, continues it five times a
// second. hold records how long the node kept a connection.
func (a *attacker) hold(n int, open func(i int) (net.Conn, error), drip func(c net.Conn) error) {
	opening := make(chan struct{}, 50)
	a.many(n, func(i int) {
		opening <- struct{}{}
		c, err := open(i)
		<-opening
		if err != nil {
			if !a.over() {
				a.said("connection refused")
			}
			a.rest(300 * time.Millisecond)
			return
		}
		defer c.Close()
		begun := time.Now()
		for a.rest(200*time.Millisecond) && !closed(c) {
			if drip == nil {
				continue
			}
			_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
			if drip(c) != nil {
				break
			}
		}
		if !a.over() {
			a.said("closed by the node")
		}
		a.mu.Lock()
		a.out.Kept = max(a.out.Kept, time.Since(begun))
		a.mu.Unlock()
	})
}

// closed reports whether the peer has ended a connection that nobody reads.
func closed(c net.Conn) bool {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn()
	}
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return true
	}
	const established = 1
	ended := true
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
		ended = err != nil || info.State != established
	})
	return ended
}

// say opens a connection and sends a text.
func (a *attacker) say(from, text string, protocols ...string) (net.Conn, error) {
	c, err := a.dial(from, protocols...)
	if err != nil {
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// two is a connection of HTTP/2 that is written frame by frame.
type two struct {
	*http2.Framer
	net.Conn
	to   *bufio.Writer
	head bytes.Buffer
	enc  *hpack.Encoder
	next uint32
}

func (a *attacker) two(from string, settings ...http2.Setting) (*two, error) {
	c, err := a.say(from, http2.ClientPreface, "h2")
	if err != nil {
		return nil, err
	}
	h := &two{Conn: c, to: bufio.NewWriterSize(c, 32<<10), next: 1}
	h.Framer = http2.NewFramer(h.to, c)
	h.enc = hpack.NewEncoder(&h.head)
	_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_ = h.WriteSettings(settings...)
	_ = h.WriteSettingsAck()
	return h, h.to.Flush()
}

// NetConn returns the underlying connection, for closed.
func (h *two) NetConn() net.Conn {
	if t, ok := h.Conn.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return h.Conn
}

// ask opens a stream, and returns its number.
func (h *two) ask(token, method, path string, end bool, more ...string) uint32 {
	h.head.Reset()
	field := func(name, value string) { _ = h.enc.WriteField(hpack.HeaderField{Name: name, Value: value}) }
	field(":method", method)
	field(":scheme", "https")
	field(":authority", "localhost")
	field(":path", path)
	if token != "" {
		field("authorization", "Bearer "+token)
	}
	for i := 0; i < len(more); i += 2 {
		field(more[i], more[i+1])
	}
	_ = h.WriteHeaders(http2.HeadersFrameParam{StreamID: h.next, BlockFragment: h.head.Bytes(), EndStream: end, EndHeaders: true})
	h.next += 2
	return h.next - 2
}

// discard reads everything, so that the kernel's acknowledgements do not end the connection.
func discard(c net.Conn) { go func() { _, _ = io.Copy(io.Discard, c) }() }

const (
	bundle = "/docs/swagger-ui-bundle.js" // the largest file that is public
	logID  = "evil-log"
	// fullBatch is the number of chunks in a full array.
	fullBatch = 500
)

// siegeAttack is one attack.
type siegeAttack struct {
	name    string
	most    int    // MiB of memory; this also determines the attacker: stranger, reader or writer
	who     string // the attacker, if most does not determine it
	tls     bool
	node    []string // additional flags of the node,
	redis   []string // and of its Redis
	refused []string // limits that must have been met
	said    []string // responses that must have come
	least   time.Duration
	long    bool // a moment is too short for it
	prepare func(b *besieged)
	run     func(a *attacker)
}

// fill returns a function that appends that many MiB of chunks to the evil log.
func fill(mib, size int) func(b *besieged) {
	return func(b *besieged) {
		chunk := `{"message_id":"m","content":"` + strings.Repeat("x", size) + `"}`
		n := min(fullBatch, max(1, (480<<10)/len(chunk)))
		body := "[" + strings.TrimSuffix(strings.Repeat(chunk+",", n), ",") + "]"
		for sent := 0; sent < mib<<20; sent += len(body) {
			if a := b.node.post("/v1/sessions/"+logID+"/chunks", "application/json", body); a.status != http.StatusCreated {
				b.t.Fatalf("fill: %d %s (%v)", a.status, a.body, a.err)
			}
		}
	}
}

// pieces returns n chunks as JSON, each of a different message.
func pieces(from, n int, text string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `,{"message_id":"m%d","content":"%s"}`, from+i, text)
	}
	return "[" + b.String()[1:] + "]"
}

// twentyThousand begins as many messages as a session may have.
func twentyThousand(a *attacker, id, query string) {
	for i := 0; i < 19_500 && !a.over(); i += 500 {
		a.call("POST", "/v1/sessions/"+id+"/chunks"+query, "application/json", pieces(i, 500, "x"))
	}
}

// evilChunks is the path of the evil log's chunks.
const evilChunks = "/v1/sessions/" + logID + "/chunks"

var noWindow = http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}

// windowZero opens connections whose streams request large files, and does not let the node send them.
func windowZero(addresses int) func(a *attacker) {
	return func(a *attacker) {
		n := a.few(1000)
		if addresses > 1 {
			n = 500 * addresses
		}
		a.hold(n, func(i int) (net.Conn, error) {
			h, err := a.two(fmt.Sprint("127.0.0.", 2+i%addresses), noWindow)
			if err != nil {
				return nil, err
			}
			for range 100 {
				h.ask("", "GET", bundle, true)
			}
			discard(h.Conn)
			return h, h.to.Flush()
		}, nil)
	}
}

// floods writes frames on HTTP/2 connections as fast as the node reads them.
func floods(n int, write func(a *attacker, h *two) error) func(a *attacker) {
	return func(a *attacker) {
		a.many(n, func(int) {
			h, err := a.two(evil)
			if err != nil {
				a.rest(100 * time.Millisecond)
				return
			}
			defer h.Close()
			discard(h.Conn)
			for !a.over() && err == nil {
				_ = h.SetWriteDeadline(time.Now().Add(5 * time.Second))
				if err = write(a, h); err == nil {
					err = h.to.Flush()
				}
			}
			if !a.over() {
				a.said("closed by the node")
				a.rest(50 * time.Millisecond)
			}
		})
	}
}

// calls repeats a call on n connections, as fast as the responses come.
func calls(n int, method, path, kind, body string, headers ...string) func(a *attacker) {
	return func(a *attacker) {
		a.many(n, func(int) { a.call(method, path, kind, body, headers...) })
	}
}

// abandon sends requests from n connections, reads a little, and disconnects.
func abandon(n int, path string, headers ...string) func(a *attacker) {
	return func(a *attacker) {
		a.many(n, func(int) {
			c, err := a.say(evil, a.request(path, headers...))
			if err != nil {
				a.rest(50 * time.Millisecond)
				return
			}
			_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
			line, _ := bufio.NewReaderSize(c, 16).ReadString('\n')
			if fields := strings.Fields(line); len(fields) > 1 {
				a.said(fields[1])
			}
			_ = c.Close()
			a.rest(5 * time.Millisecond)
		})
	}
}

// unread holds n connections that send a request and read nothing of the response.
func unread(n int, path string, headers ...string) func(a *attacker) {
	return func(a *attacker) {
		a.hold(n, func(int) (net.Conn, error) { return a.say(evil, a.request(path, headers...)) }, nil)
	}
}

// slowly holds n connections that send a beginning, and then a small piece now and then.
func slowly(n int, begin func(a *attacker) string, piece string, protocols ...string) func(a *attacker) {
	return func(a *attacker) {
		a.hold(n, func(int) (net.Conn, error) {
			c, err := a.say(evil, begin(a), protocols...)
			if err == nil {
				discard(c)
			}
			return c, err
		}, func(c net.Conn) error {
			_, err := io.WriteString(c, piece)
			return err
		})
	}
}

func always(s string) func(a *attacker) string { return func(*attacker) string { return s } }

// postOf returns a POST without its body.
func postOf(path, kind, length string) func(a *attacker) string {
	return func(a *attacker) string {
		return strings.Replace(a.request(path, "Content-Type: "+kind, length), "GET", "POST", 1)
	}
}

const header = "GET / HTTP/1.1\r\nHost: localhost\r\n"

// siegeAttacks are all attacks. Some repeat earlier ones; the others were designed without knowledge of the defence.
var siegeAttacks = []siegeAttack{
	// Attacks without a token.
	{name: "files that nobody reads", most: stranger, refused: []string{"caller-strangers"}, run: unread(1000, bundle)},
	{name: "HTTP/2 with window 0", most: stranger, tls: true, refused: []string{"caller-responses"}, run: windowZero(1)},
	{name: "HTTP/2 with window 0 from ten addresses", most: writer, who: "no token", tls: true, long: true, run: windowZero(10)},
	{name: "HTTP/2 windows of one byte", most: stranger, tls: true, run: func(a *attacker) {
		a.hold(a.few(250), func(int) (net.Conn, error) {
			h, err := a.two(evil, noWindow)
			if err != nil {
				return nil, err
			}
			for range 100 {
				h.ask("", "GET", bundle, true)
			}
			discard(h.Conn)
			return h, h.to.Flush()
		}, func(c net.Conn) error {
			h := c.(*two)
			for stream := uint32(1); stream < h.next; stream += 2 {
				_ = h.WriteWindowUpdate(stream, 1)
			}
			return h.to.Flush()
		})
	}},
	{name: "headers that never end", most: stranger, refused: []string{"caller-strangers"}, run: func(a *attacker) {
		slowly(1000, always(header+strings.Repeat("a:\r\n", 120)), "b:\r\n")(a)
	}},
	{name: "header lines of nothing, as many as fit", most: stranger, run: func(a *attacker) {
		slowly(a.few(1000), always(header+strings.Repeat("a:\r\n", 5000)), "b:\r\n")(a)
	}},
	{name: "the same over TLS", most: stranger, tls: true, run: func(a *attacker) {
		slowly(a.few(1000), always(header+strings.Repeat("a:\r\n", 5000)), "b:\r\n", "http/1.1")(a)
	}},
	{name: "one long header line", most: stranger, run: func(a *attacker) {
		slowly(a.few(1000), always(header+"x: "+strings.Repeat("x", 20<<10)), "x")(a)
	}},
	{name: "silent connections", most: stranger, refused: []string{"caller-strangers"}, run: func(a *attacker) {
		a.hold(a.few(3000), func(int) (net.Conn, error) { return a.dial(evil) }, nil)
	}},
	{name: "silent handshakes", most: stranger, tls: true, refused: []string{"caller-strangers"}, run: func(a *attacker) {
		a.hold(a.few(3000), func(i int) (net.Conn, error) {
			return a.say(evil, []string{"", "\x16\x03\x01\x02\x00", "\x16\x03\x01\x40\x00" + strings.Repeat("x", 8<<10)}[i%3], "tcp")
		}, nil)
	}},
	{name: "handshakes, one after another", most: stranger, tls: true, run: func(a *attacker) {
		a.many(4, func(int) {
			if c, err := a.dial(evil, "h2"); err == nil {
				_ = c.Close()
			}
			a.rest(2 * time.Millisecond)
		})
	}},
	{name: "connections, one after another", most: stranger, run: func(a *attacker) {
		a.many(4, func(int) {
			if c, err := a.say(evil, "GET / HTTP/1.1\r\n"); err == nil {
				_ = c.Close()
			}
		})
	}},
	{name: "HTTP/2 headers that never end", most: stranger, tls: true, run: func(a *attacker) {
		a.hold(a.few(1000), func(int) (net.Conn, error) {
			h, err := a.two(evil)
			if err != nil {
				return nil, err
			}
			_ = h.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
			discard(h.Conn)
			return h, h.to.Flush()
		}, func(c net.Conn) error {
			h := c.(*two)
			_ = h.WriteContinuation(1, false, append([]byte{0, 1, 'a', 127, 129, 7}, make([]byte, 1024)...))
			return h.to.Flush()
		})
	}},
	{name: "HTTP/2 streams opened and reset", most: stranger, tls: true, run: floods(8, func(a *attacker, h *two) error {
		for range 50 {
			_ = h.WriteRSTStream(h.ask("", "GET", bundle, true), http2.ErrCodeCancel)
		}
		a.rest(5 * time.Millisecond)
		return nil
	})},
	{name: "HTTP/2 pings and settings", most: stranger, tls: true, run: func(a *attacker) {
		a.hold(a.few(200), func(int) (net.Conn, error) { return a.two(evil) }, func(c net.Conn) error { // the client does not read
			h := c.(*two)
			for range 100 {
				_ = h.WritePing(false, [8]byte{1})
				_ = h.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: rand.Uint32N(1 << 20)})
			}
			return h.to.Flush()
		})
	}},
	{name: "HTTP/2 headers that unfold", most: stranger, tls: true, run: floods(8, func(a *attacker, h *two) error {
		value := strings.Repeat("x", 3900) // the table holds the value, and each reference is one byte
		more := []string{}
		for range 200 {
			more = append(more, "x-a", value)
		}
		h.ask("", "GET", "/", true, more...)
		a.rest(2 * time.Millisecond)
		return nil
	})},
	{name: "HTTP/2 frames of nothing", most: stranger, tls: true, run: func(a *attacker) {
		floods(8, func(a *attacker, h *two) error {
			stream := h.ask("", "POST", "/v1/sessions/evil/chunks", false, "content-type", "application/json", "content-length", "1000")
			for range 500 {
				_ = h.WriteData(stream, false, nil)
				_ = h.WritePriority(stream, http2.PriorityParam{Weight: 3})
			}
			_ = h.WriteRSTStream(stream, http2.ErrCodeCancel)
			a.rest(5 * time.Millisecond)
			return nil
		})(a)
	}},
	{name: "requests in one packet that nobody reads the answers of", most: stranger, run: func(a *attacker) {
		many := strings.Repeat(a.request("/openapi.yaml"), 300)
		a.hold(a.few(500), func(int) (net.Conn, error) { return a.say(evil, many) }, nil)
	}},
	{name: "bodies without a token", most: stranger, said: []string{"401 unauthorized"}, run: func(a *attacker) {
		huge := "[" + strings.Repeat("{},", 1<<20)
		a.many(8, func(int) { a.call("POST", evilChunks, "application/json", huge) })
	}},
	{name: "slow bodies without a token", most: stranger, run: func(a *attacker) {
		slowly(a.few(1000), postOf(evilChunks, "application/json", "Content-Length: 8000000"), "x")(a)
	}},
	{name: "forged tokens", most: stranger, said: []string{"401 unauthorized"}, run: func(a *attacker) {
		a.many(16, func(int) {
			a.call("GET", evilChunks, "", "", "Authorization", "Bearer eyJhbGciOiJIUzI1NiIsImtpZCI6Im4ifQ."+strings.Repeat("e30", rand.IntN(2000))+".x")
		})
	}},
	{name: "ranges of files", most: stranger, run: func(a *attacker) {
		ranges := "bytes=" + strings.TrimSuffix(strings.Repeat("0-,", 1000), ",")
		a.many(8, func(int) { a.call("GET", bundle, "", "", "Range", ranges) })
	}},
	{name: "files, as fast as they are sent", most: stranger, run: calls(8, "GET", bundle, "", "")},
	{name: "preflights", most: stranger, run: calls(8, "OPTIONS", evilChunks, "", "", "Origin", "https://evil.example", "Access-Control-Request-Method", "POST")},

	// Attacks with a token that may read.
	{name: "pages that nobody reads", most: reader, prepare: fill(40, 4000), refused: []string{"caller-responses"}, run: unread(400, evilChunks+"?limit=1000")},
	{name: "pages read slowly", most: reader, prepare: fill(40, 4000), run: func(a *attacker) {
		a.hold(a.few(400), func(int) (net.Conn, error) { return a.say(evil, a.request(evilChunks+"?limit=1000")) }, func(c net.Conn) error {
			_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := c.Read(make([]byte, 200)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
			return nil
		})
	}},
	{name: "pages abandoned", most: reader, prepare: fill(40, 4000), run: abandon(50, evilChunks+"?limit=1000")},
	{name: "pages, as fast as they come", most: reader, prepare: fill(40, 400), run: calls(8, "GET", evilChunks+"?limit=1000", "", "")},
	{name: "streams of absent sessions", most: reader, run: func(a *attacker) {
		var n atomic.Int64
		a.many(100, func(int) {
			c, err := a.say(evil, a.request(fmt.Sprintf("/v1/sessions/evil-%d/stream", n.Add(1))))
			if err != nil {
				a.rest(50 * time.Millisecond)
				return
			}
			_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
			_, _ = c.Read(make([]byte, 200))
			_ = c.Close()
		})
	}},
	{name: "naive viewers of the demo", most: reader, node: []string{"-demo"}, prepare: fill(40, 4000), refused: []string{"caller-naive"}, run: unread(400, "/v1/sessions/"+logID+"/demo/naive")},
	{name: "streams that nobody reads", most: reader, prepare: fill(40, 4000), run: unread(1500, "/v1/sessions/"+logID+"/stream")},
	{name: "streams that nobody reads, over TLS", most: reader, tls: true, prepare: fill(40, 4000), run: unread(1500, "/v1/sessions/"+logID+"/stream")},
	{name: "streams from the start, abandoned", most: reader, prepare: fill(40, 4000), run: abandon(50, "/v1/sessions/"+logID+"/stream")},
	{name: "streams of HTTP/2 that nobody reads", most: reader, tls: true, prepare: fill(40, 4000), run: func(a *attacker) {
		a.hold(a.few(100), func(int) (net.Conn, error) {
			h, err := a.two(evil, noWindow)
			if err != nil {
				return nil, err
			}
			for range 100 {
				h.ask(a.Token, "GET", "/v1/sessions/"+logID+"/stream", true)
			}
			discard(h.Conn)
			return h, h.to.Flush()
		}, nil)
	}},
	{name: "snapshots", most: reader, prepare: fill(40, 400), run: abandon(50, "/v1/sessions/"+logID+"/stream?snapshot=1")},
	{name: "raw streams", most: reader, prepare: fill(40, 400), run: abandon(50, "/v1/sessions/"+logID+"/stream?format=raw")},
	{name: "conversations", most: reader, prepare: fill(40, 400), run: calls(16, "GET", "/v1/sessions/"+logID+"/messages?limit=1000", "", "")},
	{name: "conversations that nobody reads", most: reader, prepare: fill(40, 400), run: unread(400, "/v1/sessions/"+logID+"/messages?format=ui")},
	{name: "one message as a stream of parts", most: reader, prepare: fill(40, 400), run: abandon(50, "/v1/sessions/"+logID+"/messages/m/ui-stream")},
	{name: "cursors of nonsense", most: reader, prepare: fill(4, 400), run: func(a *attacker) {
		a.many(50, func(int) {
			c, err := a.say(evil, a.request("/v1/sessions/"+logID+"/stream", "Last-Event-ID: "+strconv.FormatUint(rand.Uint64N(1<<53), 10)))
			if err != nil {
				a.rest(50 * time.Millisecond)
				return
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = c.Read(make([]byte, 2000))
			_ = c.Close()
		})
	}},
	{name: "requests half closed", most: reader, prepare: fill(4, 400), run: func(a *attacker) {
		a.hold(a.few(1500), func(int) (net.Conn, error) {
			c, err := a.say(evil, a.request("/v1/sessions/"+logID+"/stream"))
			if err == nil {
				_ = c.(*net.TCPConn).CloseWrite()
			}
			return c, err
		}, nil)
	}},
	{name: "tickets", most: reader, said: []string{"429 rate_limited"}, refused: []string{"caller-tickets"}, run: calls(16, "POST", "/v1/sessions/"+logID+"/tickets", "", "")},
	{name: "calls of nothing", most: reader, run: calls(32, "HEAD", "/v1/sessions/"+logID, "", "")},

	// Attacks with a token that may write to the attacker's sessions.
	{name: "bodies of 8 MiB for ui-stream", most: writer, refused: []string{"caller-bodies"}, run: func(a *attacker) {
		huge := `{"messages":[` + strings.Repeat(`{"a":[{}]},`, 700_000) + `{"role":"user","parts":[{"type":"text","text":"x"}]}]}`
		a.many(16, func(int) { a.call("POST", "/v1/sessions/evil-ui/ui-stream", "application/json", huge) })
	}},
	{name: "arrays of four million members", most: writer, run: func(a *attacker) {
		huge := `{"data":[` + strings.TrimSuffix(strings.Repeat("0,", 3<<20), ",") + `]}`
		many := "[" + strings.TrimSuffix(strings.Repeat("{},", 2<<20), ",") + "]"
		a.many(16, func(i int) { a.call("POST", evilChunks, "application/json", []string{huge, many}[i%2]) })
	}},
	{name: "slow bodies", most: writer, run: func(a *attacker) {
		slowly(a.few(1000), postOf(evilChunks, "application/json", "Content-Length: 8000000"), strings.Repeat("x", 16<<10))(a)
	}},
	{name: "chunked bodies with long extensions", most: writer, run: func(a *attacker) {
		slowly(a.few(500), postOf(evilChunks, "application/x-ndjson", "Transfer-Encoding: chunked"), "1;"+strings.Repeat("x", 2000)+"\r\n{\r\n")(a)
	}},
	{name: "a line that never ends", most: writer, said: []string{"413 chunk_too_large"}, run: calls(16, "POST", evilChunks, "application/x-ndjson", strings.Repeat("x", 16<<20))},
	{name: "compressed bodies", most: writer, run: func(a *attacker) {
		calls(16, "POST", evilChunks, "application/json", bomb(64<<20), "Content-Encoding", "gzip")(a)
	}},
	{name: "uploads of a byte at a time", most: writer, refused: []string{"caller-uploads"}, run: func(a *attacker) {
		a.hold(600, func(i int) (net.Conn, error) {
			c, err := a.say(evil, postOf(fmt.Sprintf("/v1/sessions/evil-%d/chunks", i), "text/plain", "Transfer-Encoding: chunked")(a))
			if err == nil {
				discard(c)
			}
			return c, err
		}, func(c net.Conn) error {
			_, err := io.WriteString(c, "1\r\nx\r\n")
			return err
		})
	}},
	{name: "full batches of messages", most: writer, run: func(a *attacker) {
		var n atomic.Int64
		a.many(4, func(int) {
			k := int(n.Add(1))
			a.call("POST", fmt.Sprintf("/v1/sessions/evil-%d/chunks", k), "application/json", pieces(0, fullBatch, "x"))
			a.rest(20 * time.Millisecond)
		})
	}},
	{name: "full batches of messages with numbers", most: writer, run: func(a *attacker) {
		var n atomic.Int64
		a.many(4, func(int) {
			k := int(n.Add(1))
			var all []string
			for i := range fullBatch { // each begins a new run
				all = append(all, []string{fmt.Sprintf(`{"type":"delta","message_id":"m%d"}`, i), fmt.Sprintf(`{"message_id":"m%d","content":"x"}`, i)}[i%2])
			}
			a.call("POST", fmt.Sprintf("/v1/sessions/evil-%d/chunks", k), "application/json", "["+strings.Join(all, ",")+"]",
				"Producer-Id", "p", "Producer-Epoch", "0", "Producer-Chunk", "0")
			a.rest(20 * time.Millisecond)
		})
	}},
	{name: "the same full batch again and again", most: writer, run: func(a *attacker) {
		all := pieces(0, fullBatch, "x")
		a.many(4, func(int) {
			a.call("POST", evilChunks, "application/json", all, "Producer-Id", "p", "Producer-Epoch", "0", "Producer-Chunk", "0")
		})
	}},
	{name: "full batches that end messages", most: writer, run: func(a *attacker) {
		var n atomic.Int64
		ends := strings.ReplaceAll(pieces(0, fullBatch, "x"), `{"message`, `{"type":"done","message`)
		a.many(2, func(int) {
			path := fmt.Sprintf("/v1/sessions/evil-%d/chunks", n.Add(1))
			a.call("POST", path, "application/json", pieces(0, fullBatch, "x"))
			a.call("POST", path, "application/json", ends)
		})
	}},
	{name: "a thousand producers in a session", most: writer, run: func(a *attacker) {
		var n atomic.Int64
		a.many(8, func(int) {
			a.call("POST", evilChunks, "application/json", `{"content":"x"}`, "Producer-Id", fmt.Sprint("p", n.Add(1)), "Producer-Epoch", "0", "Producer-Chunk", "0")
		})
	}},
	{name: "chunks as large as may be", most: writer, run: func(a *attacker) {
		chunk := `{"content":"` + strings.Repeat(`\u0001`, 10_000) + `"}`
		all := "[" + strings.TrimSuffix(strings.Repeat(chunk+",", 7), ",") + "]"
		a.many(8, func(i int) { a.call("POST", fmt.Sprintf("/v1/sessions/evil-%d/chunks", i), "application/json", all) })
	}},
	{name: "20,000 open messages and ui-stream", most: writer, run: func(a *attacker) {
		twentyThousand(a, logID, "")
		abandon(8, "/v1/sessions/"+logID+"/ui-stream")(a)
	}},
	{name: "20,000 messages, and all are cancelled", most: writer, run: func(a *attacker) {
		var n atomic.Int64
		a.many(2, func(int) {
			id := fmt.Sprint("evil-", n.Add(1))
			twentyThousand(a, id, "")
			a.call("POST", "/v1/sessions/"+id+"/cancel", "application/json", "{}")
			a.call("DELETE", "/v1/sessions/"+id, "", "")
		})
	}},
	{name: "20,000 leases that end at once", most: writer, run: func(a *attacker) {
		var n atomic.Int64
		a.many(2, func(int) {
			id := fmt.Sprint("evil-", n.Add(1))
			twentyThousand(a, id, "?lease=1s")
			a.rest(time.Second)
			a.call("GET", "/v1/sessions/"+id, "", "")
		})
	}},
	{name: "cancels of what is not there", most: writer, prepare: fill(4, 400), run: calls(16, "POST", "/v1/sessions/"+logID+"/cancel", "application/json", `{"message_id":"none"}`)},
	{name: "questions on a log of 40 MiB", most: writer, prepare: fill(40, 4000), run: func(a *attacker) {
		a.many(16, func(int) {
			a.call("POST", "/v1/sessions/"+logID+"/messages", "application/json", `{"content":"x"}`)
			a.rest(50 * time.Millisecond)
		})
	}},
	{name: "questions on small chunks", most: writer, prepare: fill(8, 1), run: func(a *attacker) {
		a.many(16, func(int) {
			a.call("POST", "/v1/sessions/"+logID+"/messages", "application/json", `{"content":"x"}`)
			a.rest(50 * time.Millisecond)
		})
	}},
	{name: "sessions", most: writer, refused: []string{"caller-sessions"}, run: func(a *attacker) {
		a.many(16, func(int) {
			a.call("POST", "/v1/sessions", "application/json", fmt.Sprintf(`{"id":"evil-%d"}`, rand.Uint64()))
		})
	}},
	{name: "a log deleted and begun again", most: writer, run: func(a *attacker) {
		large := pieces(0, fullBatch, strings.Repeat("x", 200))
		a.many(4, func(i int) {
			id := fmt.Sprint("/v1/sessions/evil-", i)
			for range 5 {
				a.call("POST", id+"/chunks", "application/json", large)
			}
			a.call("DELETE", id, "", "")
		})
	}},
	{name: "a log that is trimmed at each append", most: writer, prepare: fill(64, 60_000), run: func(a *attacker) {
		a.many(4, func(int) { a.call("POST", evilChunks, "application/json", pieces(0, fullBatch, "x")) })
	}},
	{name: "a log that grows under readers that stand still", most: writer, run: func(a *attacker) {
		go unread(900, "/v1/sessions/"+logID+"/stream")(a)
		big := `[` + strings.TrimSuffix(strings.Repeat(`{"content":"`+strings.Repeat("x", 60_000)+`"},`, 8), ",") + `]`
		a.many(2, func(int) {
			a.call("POST", evilChunks, "application/json", big)
			a.rest(50 * time.Millisecond)
		})
	}},
	{name: "a thousand logs with a viewer each", most: writer, run: func(a *attacker) {
		big := `{"content":"` + strings.Repeat("x", 60_000) + `"}`
		a.hold(a.few(1000), func(i int) (net.Conn, error) {
			id := fmt.Sprint("/v1/sessions/evil-", i)
			for range 5 {
				a.call("POST", id+"/chunks", "application/json", big)
			}
			return a.say(evil, a.request(id+"/stream"))
		}, nil)
	}},
	{name: "a writer that never stops", most: writer, least: 75 * time.Second, long: true, refused: []string{"caller-stored"}, run: func(a *attacker) {
		var n atomic.Int64
		big := `[` + strings.TrimSuffix(strings.Repeat(`{"content":"`+strings.Repeat("x", 60_000)+`"},`, 8), ",") + `]`
		a.many(8, func(int) {
			a.call("POST", fmt.Sprintf("/v1/sessions/evil-%d/chunks", n.Add(1)/20), "application/json", big)
		})
	}},
}

// bomb returns n zeroes, compressed.
func bomb(n int) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = io.CopyN(w, zeroes{}, int64(n))
	_ = w.Close()
	return b.String()
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { clear(p); return len(p), nil }
