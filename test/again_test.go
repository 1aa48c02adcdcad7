package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gapless/store/storetest"
)

// A connection whose stream has ended serves the next request. Node's client and Go's send one at once.
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

// A viewer that reached the end of a log and asks again at once gets 204. It gets that from another node, and from the
// node that sent the end, which may not have read the log since.
func TestAgain_aThousandViewersAskAgainAtTheEndAndAreTold204(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	for name, all := range map[string][]*node{
		"two nodes":   nodes(t, 2, redis),
		"embedded":    {start(t)},
		"left alone":  nodes(t, 1, redis, "-plain"),
		"over HTTP/2": nodes(t, 1, redis, "-h2c"),
	} {
		t.Run(name, func(t *testing.T) {
			const viewers = 1000
			ctx, session := t.Context(), newID()
			all[0].append(t, session, words(1, 3))
			var waiting, over sync.WaitGroup
			waiting.Add(viewers)
			var told [3]atomic.Int64 // 204, another ending, a fault
			for i := range viewers {
				over.Go(func() {
					v := &viewer{session: session}
					waits := sync.OnceFunc(waiting.Done)
					defer waits()
					v.connect(ctx, all[i%len(all)].addr, func(e event) bool {
						if e.id == "3" {
							waits()
						}
						return e.id == "4"
					})
					switch how := v.connect(ctx, all[i/2%len(all)].addr, nil); {
					case v.cursor != 4 || len(v.faults) > 0:
						told[2].Add(1)
					case how == nothing:
						told[0].Add(1)
					default:
						told[1].Add(1)
					}
				})
			}
			waiting.Wait()
			all[0].append(t, session, `{"type":"end"}`)
			over.Wait()
			if n := told[0].Load(); n != viewers {
				t.Errorf("%d of %d are told 204; %d ended in another way, %d saw what they must not", n, viewers, told[1].Load(), told[2].Load())
			}
		})
	}
}

// Requests that a client sends after its stream's request, on the same connection, get their responses once, and in
// order. The body of that request is not taken for another one.
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

// A node that stops does not wait for the next request of a connection.
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
