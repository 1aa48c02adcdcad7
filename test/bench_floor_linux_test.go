package test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
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

	"github.com/redis/go-redis/v9"
)

// The floor is the least that a Go server of this kind on Redis must do, for comparison. It takes connections over and
// writes our wire format to them, with one script call per append and one subscription per session. It keeps all
// messages in memory, and checks nothing: it ignores the contents of posts, believes Pub/Sub, and dies with its Redis.
// It is no model.
//
// One goroutine receives messages, and writes them to all viewers of a session.

func init() { roles["floor"] = floorRole }

const floorScript = `local n = redis.call('RPUSH', KEYS[1], ARGV[1])
redis.call('PUBLISH', KEYS[1], n .. ':' .. ARGV[1])
return n`

// floor is the server.
type floor struct {
	sha      string
	appends  chan floorAppend
	ear      net.Conn // the subscription
	mu       sync.Mutex
	sessions map[string]*floorSession
}

// floorSession holds one session's messages, framed for sending, and its viewers.
type floorSession struct {
	heard   chan struct{} // closed when Redis acknowledges the subscription
	mu      sync.Mutex
	log     []byte
	viewers []*floorViewer
	behind  bool // the last message received was not written yet
}

type floorViewer struct {
	conn net.Conn
	at   int // position in the log
	gone atomic.Bool
}

// floorAppend is a message under way to Redis.
type floorAppend struct {
	session, body string
	done          chan struct{}
}

// floorRole is the process. It takes -listen and -redis like the server.
func floorRole(args []string) {
	value := func(flag string) string { // it takes the server's flags, and heeds two of them
		return args[slices.Index(args, flag)+1]
	}
	listen, address := value("-listen"), strings.TrimPrefix(value("-redis"), "redis://")
	rdb := redis.NewClient(&redis.Options{Addr: address})
	sha, err := redis.NewScript(floorScript).Load(context.Background(), rdb).Result()
	if err != nil {
		fatal("floor: load the script", err)
	}
	_ = rdb.Close()
	f := &floor{sha: sha, appends: make(chan floorAppend, 8192), sessions: map[string]*floorSession{}}
	pipe, err := net.Dial("tcp", address)
	if err != nil {
		fatal("floor", err)
	}
	if f.ear, err = net.Dial("tcp", address); err != nil {
		fatal("floor", err)
	}
	sent := make(chan []floorAppend, 64)
	go f.write(pipe, sent) // all three end with the process
	go f.acknowledge(bufio.NewReaderSize(pipe, 64<<10), sent)
	go f.receive(bufio.NewReaderSize(f.ear, 64<<10))

	listener, err := net.Listen("tcp", listen)
	if err != nil {
		fatal("floor", err)
	}
	fmt.Fprintf(os.Stderr, "page=http://%s/\n", listener.Addr())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	server := &http.Server{Handler: f}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	_ = server.Serve(listener)
}

func (f *floor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, isSession := strings.CutPrefix(r.URL.Path, "/v1/sessions/")
	session, call, _ := strings.Cut(path, "/")
	switch {
	case !isSession: // a readiness check
	case call == "chunks":
		f.append(w, r, session)
	case call == "stream":
		f.stream(w, session)
	}
}

// append responds when Redis has every line of the body.
func (f *floor) append(w http.ResponseWriter, r *http.Request, session string) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSuffix(string(body), "\n"), "\n")
	done := make(chan struct{}, len(lines))
	for _, line := range lines {
		f.appends <- floorAppend{session, line, done}
	}
	for range lines {
		<-done
	}
	w.WriteHeader(http.StatusNoContent)
}

// write sends all waiting commands in one write, and acknowledge reads the replies in the same order.
func (f *floor) write(to net.Conn, sent chan<- []floorAppend) {
	var out []byte
	for a := range f.appends {
		batch := []floorAppend{a}
		for more := true; more && len(batch) < 1024; {
			select {
			case a := <-f.appends:
				batch = append(batch, a)
			default:
				more = false
			}
		}
		out = out[:0]
		for _, a := range batch {
			out = command(out, "EVALSHA", f.sha, "1", a.session, a.body)
		}
		sent <- batch
		if _, err := to.Write(out); err != nil {
			fatal("floor: append", err)
		}
	}
}

func (f *floor) acknowledge(from *bufio.Reader, sent <-chan []floorAppend) {
	for batch := range sent {
		for _, a := range batch {
			if line, err := from.ReadSlice('\n'); err != nil || line[0] != ':' {
				fatal("floor: append", fmt.Errorf("%w: %q", err, line))
			}
			a.done <- struct{}{}
		}
	}
}

// command appends a command in the format of https://redis.io/docs/latest/develop/reference/protocol-spec.
func command(b []byte, args ...string) []byte {
	b = append(strconv.AppendInt(append(b, '*'), int64(len(args)), 10), "\r\n"...)
	for _, arg := range args {
		b = append(strconv.AppendInt(append(b, '$'), int64(len(arg)), 10), "\r\n"...)
		b = append(append(b, arg...), "\r\n"...)
	}
	return b
}

const floorHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache, no-transform\r\nTransfer-Encoding: chunked\r\n\r\n"

// stream takes the connection over, sends the existing messages, and leaves the rest to receive.
func (f *floor) stream(w http.ResponseWriter, session string) {
	f.mu.Lock()
	s := f.sessions[session]
	if s == nil {
		s = &floorSession{heard: make(chan struct{})}
		f.sessions[session] = s
		if _, err := f.ear.Write(command(nil, "SUBSCRIBE", session)); err != nil {
			fatal("floor: subscribe", err)
		}
	}
	f.mu.Unlock()
	<-s.heard
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	v := &floorViewer{conn: conn}
	go func() { // ends with the connection: nothing else notices its end
		_, _ = conn.Read(make([]byte, 1))
		v.gone.Store(true)
		_ = conn.Close()
	}()
	_, err = conn.Write([]byte(floorHead))
	for err == nil {
		s.mu.Lock()
		rest := s.log[v.at:]
		if len(rest) == 0 {
			s.viewers = append(s.viewers, v)
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		v.at += len(rest)
		_, err = conn.Write(rest)
	}
}

// receive reads published messages, and delivers them when no more are waiting.
func (f *floor) receive(from *bufio.Reader) {
	var kind, name, body []byte
	var behind []*floorSession
	for {
		f.number(from)
		kind = f.bulk(from, kind)
		name = f.bulk(from, name)
		f.mu.Lock()
		s := f.sessions[string(name)]
		f.mu.Unlock()
		if string(kind) == "subscribe" {
			f.number(from)
			close(s.heard)
		} else {
			body = f.bulk(from, body)
			s.take(body)
			if !s.behind {
				s.behind = true
				behind = append(behind, s)
			}
		}
		if from.Buffered() == 0 {
			for _, s := range behind {
				s.deliver()
			}
			behind = behind[:0]
		}
	}
}

func (f *floor) number(from *bufio.Reader) int {
	line, err := from.ReadSlice('\n')
	if err != nil {
		fatal("floor: receive", err)
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(line[1:])))
	if err != nil {
		fatal("floor: receive", err)
	}
	return n
}

func (f *floor) bulk(from *bufio.Reader, b []byte) []byte {
	n := f.number(from)
	b = slices.Grow(b[:0], n+2)[:n+2]
	if _, err := io.ReadFull(from, b); err != nil {
		fatal("floor: receive", err)
	}
	return b[:n]
}

// take frames a message, n:{…}, as an event in an HTTP chunk.
func (s *floorSession) take(body []byte) {
	n, rest, _ := bytes.Cut(body, []byte(":"))
	s.mu.Lock()
	defer s.mu.Unlock()
	now := strconv.FormatInt(time.Now().UnixMilli(), 10)
	const a, b, c, d, e = `data: {"seq":`, `,"ts":`, `,"type":"delta",`, "\nid: ", "\n\n"
	size := len(a) + len(n) + len(b) + len(now) + len(c) + len(rest) - 1 + len(d) + len(n) + len(e)
	s.log = append(strconv.AppendInt(s.log, int64(size), 16), "\r\n"...)
	s.log = append(append(append(append(append(s.log, a...), n...), b...), now...), c...)
	s.log = append(append(append(append(append(s.log, rest[1:]...), d...), n...), e...), "\r\n"...)
}

// deliver writes to every viewer what is new to it.
func (s *floorSession) deliver() {
	s.behind = false
	s.mu.Lock()
	defer s.mu.Unlock()
	s.viewers = slices.DeleteFunc(s.viewers, func(v *floorViewer) bool {
		if v.gone.Load() {
			return true
		}
		_, err := v.conn.Write(s.log[v.at:])
		v.at = len(s.log)
		return err != nil
	})
}
