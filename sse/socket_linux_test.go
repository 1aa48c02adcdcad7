package sse

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gapless/store/storetest"
)

// served is a server whose viewers' connections are taken over. taken counts them.
func served(t *testing.T, log *storetest.Log) (url string, taken *atomic.Int64) {
	t.Helper()
	h := started(t, testConfig(), log)
	taken = &atomic.Int64{}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := h.View(Ask{Session: "s"})
		if err != nil {
			t.Error(err)
			return
		}
		if h.Take(v, w, r, time.Second, Told{func() {}, func(Cause, bool) {}}) {
			taken.Add(1)
			return
		}
		v.Close()
	}))
	s.Config.ConnContext = WithConn
	s.Start()
	t.Cleanup(s.Close)
	return s.URL, taken
}

// A chunk of any size is delivered, live and from the history. It may be in more pieces than the
// kernel takes in one call, and the viewer may read slowly.
func TestSocket_chunksOfAnySize(t *testing.T) {
	log := &storetest.Log{}
	text := func(size int) string { return strings.Repeat("0123456789abcdef", size/16) }
	for _, size := range []int{6 << 20, 40 << 20, 16, 6 << 20} {
		log.Append(text(size))
	}
	url, taken := served(t, log)
	const viewers = 3
	var all [viewers]*bufio.Reader
	for i := range all {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		var body io.Reader = response.Body
		if i == 0 {
			body = &reluctant{from: body}
		}
		all[i] = bufio.NewReaderSize(body, 64<<10)
		if i == 0 {
			hear(log)
		}
	}
	next := func(i int) (id string, size int) {
		for {
			line, err := all[i].ReadString('\n')
			if err != nil {
				t.Fatalf("viewer %d: %v", i, err)
			}
			if after, ok := strings.CutPrefix(line, "id: "); ok && size > 0 {
				return strings.TrimSpace(after), size
			}
			if _, content, ok := strings.Cut(line, `"content":"`); ok {
				content, _, _ := strings.Cut(content, `"`)
				if size = len(content); content != text(size) {
					t.Fatalf("viewer %d: a chunk of %d bytes is garbled", i, size)
				}
			}
		}
	}
	for n, size := range []int{6 << 20, 40 << 20, 16, 6 << 20, 7 << 20, 16} {
		if n == 4 { // live
			log.Append(text(size))
			log.Deliver(0)
			log.Append(text(16))
			log.Deliver(0)
		}
		for i := range all {
			if id, got := next(i); id != fmt.Sprint(n+1) || got != size {
				t.Fatalf("viewer %d: chunk %s has %d bytes; chunk %d has %d", i, id, got, n+1, size)
			}
		}
	}
	if taken.Load() != viewers {
		t.Errorf("%d connections were taken over", taken.Load())
	}
}

// reluctant reads a little, and then pauses.
type reluctant struct {
	from io.Reader
	read int
}

func (r *reluctant) Read(p []byte) (int, error) {
	if r.read++; r.read%1000 == 0 {
		time.Sleep(time.Millisecond)
	}
	return r.from.Read(p[:min(len(p), 20_000)])
}

// Only an error that means that the connection is broken ends its viewer. After any other error,
// the bytes were not written, and nothing else changes.
func TestSocket_whatItDoesNotTakeIsNotGone(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	peer, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := &tcpSocket{TCPConn: conn.(*net.TCPConn), conn: conn}
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { s.fd = int(fd) })
	pieces := make([][]byte, 3000)
	for i := range pieces {
		pieces[i] = []byte{byte(i)}
	}
	for sent := 0; sent < len(pieces); {
		n, err := s.tryAll(pieces[sent:])
		if err != nil || n <= 0 || n > mostPieces {
			t.Fatal(n, err)
		}
		got := make([]byte, n)
		if _, err := io.ReadFull(peer, got); err != nil || got[n-1] != byte(sent+n-1) {
			t.Fatal(sent, n, err, got[n-1])
		}
		sent += n
	}
	full := make([]byte, 1<<20)
	for n := 1; n > 0; {
		if n, err = s.try(full); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := s.tryAll([][]byte{full}); n != 0 || err != nil {
		t.Error(n, err)
	}
	for _, errno := range []error{unix.EINVAL, unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE, unix.EAGAIN} {
		if broken(errno) != nil {
			t.Errorf("%v is taken for a broken connection", errno)
		}
	}
	_ = peer.(*net.TCPConn).SetLinger(0)
	_ = peer.Close()
	for err == nil { // until its reset arrives
		_, err = s.try(full)
	}
}
