//go:build linux

package test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// neighbourOrder is the neighbour's task.
type neighbourOrder struct {
	Addr, Token string
	TLS         bool
	For         time.Duration
}

// neighbourFound is what the neighbour observed.
type neighbourFound struct {
	P50, P99    time.Duration // from when a chunk was due until the neighbour's viewer received it
	Stored, Got int           // chunks
	Refused     int           // calls that were refused by a limit
	Away        int           // calls that Redis was too busy for; they were repeated
	Cut         int           // streams that broke
	Why         string        // the last refusal
}

const neighbourPace = 50 * time.Millisecond

// neighbourRole appends a chunk to its session twenty times a second, follows that session, and creates a session now and then.
func neighbourRole([]string) {
	var order neighbourOrder
	if err := json.NewDecoder(os.Stdin).Decode(&order); err != nil {
		panic(err)
	}
	fmt.Println("begun")
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.99")}, Timeout: 10 * time.Second}
	scheme := "http://"
	if order.TLS {
		scheme = "https://"
	}
	n := &neighbour{order: order, url: scheme + order.Addr + "/v1/sessions/good-",
		web: &http.Client{Transport: &http.Transport{DialContext: d.DialContext, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}} // #nosec G402
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var followed sync.WaitGroup
	followed.Go(func() { n.follow(ctx) })

	ends := time.Now().Add(order.For)
	for due := time.Now(); due.Before(ends); due = due.Add(neighbourPace) {
		time.Sleep(time.Until(due))
		for !n.call("POST", n.url+"log/chunks", fmt.Sprintf(`{"message_id":"m","content":"due %d;"}`, due.UnixNano())) && !n.lost(ends) {
		}
		n.found.Stored++
		if n.found.Stored%20 == 0 {
			for !n.call("POST", n.url+fmt.Sprint(n.found.Stored), "") || !n.call("GET", n.url+"log/chunks?limit=10", "") {
				if n.lost(ends) {
					break
				}
			}
		}
	}
	for waited := time.Now(); int(n.got.Load()) < n.found.Stored && time.Since(waited) < 20*time.Second; {
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	followed.Wait()
	slices.Sort(n.took)
	if k := len(n.took); k > 0 {
		n.found.P50, n.found.P99 = n.took[k/2], n.took[min(k-1, k*99/100)]
	}
	n.found.Got = int(n.got.Load())
	if err := json.NewEncoder(os.Stdout).Encode(n.found); err != nil {
		panic(err)
	}
}

type neighbour struct {
	order neighbourOrder
	url   string
	web   *http.Client
	found neighbourFound
	got   atomic.Int64
	took  []time.Duration // delays, as the follower observed them
}

// lost reports whether calls have been refused for so long that the neighbour gives up.
func (n *neighbour) lost(ends time.Time) bool { return time.Since(ends) > time.Minute }

// call makes a call, and reports whether it succeeded. The caller repeats a call that was not executed because Redis was away.
func (n *neighbour) call(method, url, body string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	r.Header.Set("Authorization", "Bearer "+n.order.Token)
	r.Header.Set("Content-Type", "application/json")
	res, err := n.web.Do(r)
	if err != nil {
		n.refused(err.Error())
		return false
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	switch {
	case res.StatusCode < 300:
		return true
	case strings.Contains(string(text), `"redis_away"`): // certainly not executed
		n.found.Away++
	default:
		n.refused(fmt.Sprint(res.Status, " ", string(text)))
	}
	return false
}

func (n *neighbour) refused(why string) {
	n.found.Refused++
	n.found.Why = why
	time.Sleep(neighbourPace)
}

// follow reads the stream, and reconnects as an EventSource does.
func (n *neighbour) follow(ctx context.Context) {
	last := ""
	for ctx.Err() == nil {
		r, err := http.NewRequestWithContext(ctx, "GET", n.url+"log/stream", nil)
		if err != nil {
			panic(err)
		}
		r.Header.Set("Authorization", "Bearer "+n.order.Token)
		r.Header.Set("Last-Event-ID", last)
		res, err := n.web.Do(r)
		if err == nil {
			for lines := bufio.NewScanner(res.Body); lines.Scan(); {
				line := lines.Text()
				if id, ok := strings.CutPrefix(line, "id: "); ok {
					last = id
				}
				if _, rest, ok := strings.Cut(line, `"content":"due `); ok {
					var due int64
					if _, err := fmt.Sscanf(rest, "%d;", &due); err == nil {
						n.took = append(n.took, time.Since(time.Unix(0, due)))
						n.got.Add(1)
					}
				}
			}
			_ = res.Body.Close()
		}
		if ctx.Err() == nil {
			n.found.Cut++ // the follower's goroutine writes Cut, the other one the rest
			time.Sleep(100 * time.Millisecond)
		}
	}
}
