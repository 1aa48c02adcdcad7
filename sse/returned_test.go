package sse

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// servedAgain serves one end of a connection that was given back.
func servedAgain(t *testing.T, read string) (client net.Conn, done func()) {
	t.Helper()
	r := NewReturned(&net.TCPAddr{})
	r.Idle = 2 * time.Minute
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: r.Idle,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Errorf("its body: %v", err)
			}
			_, _ = w.Write(body)
		})}
	served := make(chan struct{})
	go func() { _ = server.Serve(r); close(served) }() // ended by done
	client, conn := net.Pipe()
	r.Back(conn, []byte(read))
	return client, func() {
		_ = client.Close()
		_ = server.Close()
		<-served
	}
}

// A connection that was given back waits for its next request as long as any other. That request
// then has its full time.
func TestReturned_isKeptAsLongAsAnyOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, done := servedAgain(t, "")
		defer done()
		answers := bufio.NewReader(client)
		for range 3 {
			time.Sleep(100 * time.Second)
			_, _ = io.WriteString(client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n")
			time.Sleep(9 * time.Second)
			_, _ = io.WriteString(client, "\r\nses")
			time.Sleep(19 * time.Second)
			_, _ = io.WriteString(client, "ame")
			res, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(res.Body); string(body) != "sesame" || err != nil {
				t.Fatalf("%q, %v", body, err)
			}
		}
	})
}

func TestReturned_isClosedWhenNothingComesOrNotTheRest(t *testing.T) {
	for begin, want := range map[string]time.Duration{"": 2 * time.Minute, "GET / ": 10 * time.Second} {
		for _, read := range []string{"", begin} { // bytes read before the connection was given back
			if read != "" && begin == "" {
				continue
			}
			synctest.Test(t, func(t *testing.T) {
				client, done := servedAgain(t, read)
				defer done()
				begun := time.Now()
				_, _ = io.WriteString(client, strings.TrimPrefix(begin, read))
				_, _ = io.Copy(io.Discard, client)
				if took := time.Since(begun); took != want {
					t.Errorf("%q: %v", begin, took)
				}
			})
		}
	}
}
