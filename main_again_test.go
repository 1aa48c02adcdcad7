package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// A stream that has ended leaves its connection to the next request: Node's client sends one at once, and Go's.
func TestAgain_aConnectionWhoseStreamHasEndedIsGoodForMore(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, args...)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				session := newID()
				for i := range 40 {
					if a := n.post("/v1/sessions/"+session+"/chunks", "application/json", `{"type":"done","message_id":"m`+fmt.Sprint(i)+`"}`); a.status != 201 {
						t.Errorf("%d: %d %s", i, a.status, a.body)
						return
					}
					if a := n.get(fmt.Sprintf("/v1/sessions/%s/stream?until=done&after=%d", session, i)); a.status != 200 || !strings.Contains(string(a.body), fmt.Sprintf("\nid: %d\n\n", i+1)) {
						t.Errorf("%d: %d %s", i, a.status, a.body)
						return
					}
				}
				n.append(t, session, `{"type":"end"}`)
				eventually(t, "the node knows of the end", func() bool { return n.get("/v1/sessions/"+session+"/stream?after=41").status == 204 })
				for range 5 {
					if a := n.get("/v1/sessions/" + session + "/stream?after=41"); a.status != 204 {
						t.Errorf("%d %s", a.status, a.body)
					}
					if a := n.post("/v1/sessions/"+session+"x/chunks", "application/json", `{"content":"sesame"}`); a.status != 201 {
						t.Errorf("%d %s", a.status, a.body)
					}
				}
			})
		}
		wg.Wait()
	})
}

// What a client has sent behind its stream's request, on the same connection, is answered: once, and in order. What is
// the body of that request is not taken for another one.
func TestAgain_requestsInARow(t *testing.T) {
	t.Parallel()
	n := start(t)
	session := newID()
	n.append(t, session, `[{"type":"done"},{"type":"end"}]`)
	stream := "GET /v1/sessions/" + session + "/stream HTTP/1.1\r\nHost: " + n.addr + "\r\n"
	talk := func(send string, wanted int, wait time.Duration) (all []*http.Response, over error) {
		c, err := net.Dial("tcp", n.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(c, send); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		for range wanted {
			a, err := http.ReadResponse(r, nil)
			if err != nil {
				return all, err
			}
			if _, err := io.Copy(io.Discard, a.Body); err != nil {
				return all, err
			}
			all = append(all, a)
		}
		_ = c.SetReadDeadline(time.Now().Add(wait))
		_, over = r.ReadByte()
		return all, over
	}
	all, over := talk(stream+"\r\n"+stream+"Last-Event-ID: 2\r\n\r\n"+stream+"\r\n"+"GET /v1/sessions/"+session+" HTTP/1.1\r\nHost: "+n.addr+"\r\n\r\n", 4, 300*time.Millisecond)
	if len(all) != 4 || all[0].StatusCode != 200 || all[1].StatusCode != 204 || all[2].StatusCode != 200 || all[3].StatusCode != 200 ||
		all[3].Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%d answers, %v", len(all), over)
	}
	if e, ok := over.(net.Error); !ok || !e.Timeout() {
		t.Errorf("the connection is not kept: %v", over)
	}
	smuggled := "DELETE /v1/sessions/" + session + " HTTP/1.1\r\nHost: " + n.addr + "\r\n\r\n"
	for _, header := range []string{fmt.Sprintf("Content-Length: %d\r\n\r\n", len(smuggled)), "Connection: close\r\n\r\n"} {
		if all, over := talk(stream+header+smuggled, 1, patience); len(all) != 1 || all[0].StatusCode != 200 || over == nil {
			t.Errorf("%q: %d answers, then %v", header, len(all), over)
		} else if e, ok := over.(net.Error); ok && e.Timeout() {
			t.Errorf("%q: the connection is kept", header)
		}
	}
	if a := n.get("/v1/sessions/" + session); a.status != 200 {
		t.Errorf("a body was taken for a request: %d", a.status)
	}
}

// Nobody waits for the next request of a connection when the node stops.
func TestAgain_connectionsThatAreQuietDoNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	n := start(t, "-drain", "1m")
	session := newID()
	n.append(t, session, `{"type":"end"}`)
	for range 5 {
		c, err := net.Dial("tcp", n.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /v1/sessions/"+session+"/stream HTTP/1.1\r\nHost: "+n.addr+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		a, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, a.Body); err != nil {
			t.Fatal(err)
		}
	}
	n.http.CloseIdleConnections()
	begun := time.Now()
	n.terminate()
	<-n.exited
	if took := time.Since(begun); took > slack {
		t.Errorf("it took %v", took)
	}
}
