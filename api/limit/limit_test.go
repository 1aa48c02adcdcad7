package limit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func with(change func(*Config)) *Limits {
	cfg := DefaultConfig()
	change(&cfg)
	return New(cfg)
}

// limitOf returns the flag of the limit that err names.
func limitOf(err error) string {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return ""
	}
	return e.Limit
}

func subject(i int) Caller { return Caller{Subject: fmt.Sprint(i)} }

// This test compares with a model that counts. What is taken is what was granted and not given
// back, no caller passes a limit, and no caller below it is refused.
func TestPlaces_areAsManyAsTheBoundsSay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		node, each := rapid.IntRange(0, 12).Draw(t, "node"), rapid.IntRange(0, 6).Draw(t, "each")
		p := with(func(c *Config) { c.Uploads, c.CallerUploads = node, each }).Uploads
		held, all := map[Caller]int{}, 0
		t.Repeat(map[string]func(*rapid.T){
			"take": func(t *rapid.T) {
				c, n := subject(rapid.IntRange(0, 3).Draw(t, "caller")), rapid.IntRange(1, 3).Draw(t, "n")
				if c.Subject == "3" {
					c = Caller{}
				}
				want := ""
				switch {
				case each > 0 && c != Caller{} && held[c]+n > each:
					want = "caller-uploads"
				case node > 0 && all+n > node:
					want = "uploads"
				}
				if got := limitOf(p.Take(c, n)); got != want {
					t.Fatalf("%v takes %d beside %d of %d: %q, not %q", c, n, held[c], all, got, want)
				}
				if want == "" {
					held[c] += n
					all += n
				}
			},
			"give": func(t *rapid.T) {
				for c, n := range held {
					if n > 0 {
						p.Give(c, 1)
						held[c]--
						all--
						return
					}
				}
			},
			"": func(t *rapid.T) {
				some := 0
				for c, n := range held {
					if n > 0 && c != (Caller{}) && each > 0 {
						some++
					}
				}
				if p.Taken() != all || len(p.of) != some {
					t.Fatalf("%d are taken, not %d; by %d callers, not %d", p.Taken(), all, len(p.of), some)
				}
			},
		})
	})
}

// A caller that waits as long as it was told is served. A caller that waits less is not.
func TestRates_sayExactlyWhenToTryAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := with(func(c *Config) { c.CallerCalls = 4 }).Calls
		for range 4 * saved {
			if err := r.Take(subject(1), 1); err != nil {
				t.Fatal(err)
			}
		}
		for range 20 {
			err := r.Take(subject(1), 3)
			e, ok := errors.AsType[*Error](err)
			if !ok || e.After != 750*time.Millisecond || e.Seconds() != 1 || e.Limit != "caller-calls" || e.Most != 4 {
				t.Fatalf("%+v", err)
			}
			time.Sleep(e.After - time.Millisecond)
			if r.Take(subject(1), 3) == nil {
				t.Fatal("it was too early")
			}
			time.Sleep(time.Millisecond)
			if err := r.Take(subject(1), 3); err != nil {
				t.Fatalf("it was told to come now: %v", err)
			}
			if err := r.Take(subject(2), 1); err != nil {
				t.Fatalf("another caller: %v", err)
			}
			time.Sleep(250 * time.Millisecond) // for the other caller
			if err := r.Take(subject(1), 1); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestRates_owedIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := with(func(c *Config) { c.CallerSessions = 2 }).Sessions
		if r.Over(subject(1)) != nil {
			t.Error("nothing was used up")
		}
		if d := r.Owe(subject(1), 1000); d != 0 { // as much as a bucket holds
			t.Errorf("%v", d)
		}
		if e := r.Over(subject(1)); e == nil || e.After != 500*time.Millisecond {
			t.Errorf("%v", e)
		}
		if d := r.Owe(subject(1), 3); d != 1500*time.Millisecond {
			t.Errorf("%v", d)
		}
		time.Sleep(1500*time.Millisecond + 500*time.Millisecond)
		if r.Over(subject(1)) != nil {
			t.Error("one is there again")
		}
		for range 3 {
			if r.Owe(Caller{}, 1000) != 0 || r.Take(Caller{}, 1000) != nil || len(r.of) != 1 {
				t.Error("nobody has a bound of its own")
			}
		}
	})
}

// However many callers come, idle ones are forgotten, and what a caller has used never is.
func TestRates_forgetIdleCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := with(func(c *Config) { c.CallerCalls = 1 }).Calls
		for i := range 20 * fewBuckets {
			if i%100 == 0 {
				time.Sleep(time.Second) // a bucket from which one was taken is full again
			}
			if err := r.Take(subject(i), 1); err != nil {
				t.Fatal(err)
			}
			if len(r.of) > fewBuckets+1 {
				t.Fatalf("%d buckets for some 100 that are not full", len(r.of))
			}
		}
		busy := subject(-1)
		for range saved {
			_ = r.Take(busy, 1)
		}
		for i := range 3 * fewBuckets {
			_ = r.Take(subject(i), 1)
		}
		if r.Take(busy, 1) == nil {
			t.Error("what a caller has used up was forgotten")
		}
	})
}

func TestRates_areBoundedThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := with(func(c *Config) { c.CallerCalls = 1 }).Calls
		defer func(many int) { manyBuckets = many }(manyBuckets)
		manyBuckets = 4 * fewBuckets
		for i := range manyBuckets + 5*saved {
			_ = r.Take(subject(i), 1)
		}
		if len(r.of) != manyBuckets+1 {
			t.Errorf("%d buckets", len(r.of))
		}
		if limitOf(r.Take(subject(-1), 1)) == "" {
			t.Error("those beyond share no bucket")
		}
	})
}

// The client's address is believed only from a trusted proxy, and an IPv6 /64 is one address.
func TestClient_isWhoATrustedProxySaysAndNobodyElse(t *testing.T) {
	proxies, err := ParseProxies("10.0.0.0/8, 192.0.2.7,2001:db8:aaaa::/48")
	if err != nil {
		t.Fatal(err)
	}
	l := with(func(c *Config) { c.TrustedProxies = proxies })
	for _, c := range []struct{ peer, header, want string }{
		{"198.51.100.1:5", "", "198.51.100.1"},
		{"198.51.100.1:5", "203.0.113.9", "198.51.100.1"},     // anybody can write that
		{"127.0.0.1:5", "203.0.113.9", "127.0.0.1"},           // loopback is not trusted by default,
		{"192.168.1.1:5", "203.0.113.9", "192.168.1.1"},       // nor is a private network
		{"10.1.2.3:5", "203.0.113.9", "203.0.113.9"},          //
		{"10.1.2.3:5", "", "10.1.2.3"},                        //
		{"10.1.2.3:5", "1.2.3.4, 203.0.113.9", "203.0.113.9"}, // what the client wrote comes first
		{"10.1.2.3:5", "203.0.113.9, 192.0.2.7", "203.0.113.9"},
		{"10.1.2.3:5", "203.0.113.9|1.2.3.4", "1.2.3.4"}, // two lines
		{"10.1.2.3:5", "sesame", "10.1.2.3"},
		{"10.1.2.3:5", "203.0.113.9, ", "10.1.2.3"},
		{"192.0.2.7:5", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"},
		{"[2001:db8:aaaa::1]:5", "[2001:db8:1:2::9]", "2001:db8:1:2::"},
		{"[2001:db8:1:2:a::1]:5", "", "2001:db8:1:2::"},
		{"[::ffff:198.51.100.1]:5", "", "198.51.100.1"},
		{"[fe80::1%eth0]:5", "", "fe80::"},
	} {
		r := &http.Request{RemoteAddr: c.peer, Header: http.Header{"Forwarded": {"for=9.9.9.9"}, "X-Real-Ip": {"9.9.9.9"}}}
		if c.header != "" {
			r.Header["X-Forwarded-For"] = strings.Split(c.header, "|")
		}
		if got := l.Caller(r); got != (Caller{Address: netip.MustParseAddr(c.want)}) {
			t.Errorf("%s, %q: %v, not %s", c.peer, c.header, got, c.want)
		}
	}
	if l := with(func(c *Config) { c.Addresses = false }); l.Caller(&http.Request{RemoteAddr: "198.51.100.1:5"}) != (Caller{}) {
		t.Error("addresses tell nobody apart here")
	}
	for _, bad := range []string{"", "10.0.0.0/8,", "10.0.0.0/33", "proxy.example", "0.0.0.0/0", "::/0", "fe80::1%eth0"} {
		if _, err := ParseProxies(bad); err == nil || !strings.Contains(err.Error(), "is not an address, or a range") && !strings.Contains(err.Error(), "would trust everybody") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

type accepted struct{} // the key of a request's connection

// serve starts an HTTP server with the limits, whose handler takes some connections over.
func serve(t *testing.T, l *Limits) string {
	t.Helper()
	from, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/known" {
			Known(r.Context().Value(accepted{}).(net.Conn))
		}
		if r.URL.Path != "/taken" {
			_, _ = io.WriteString(w, "here")
			return
		}
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		if _, ok := c.(interface{ Plain() *net.TCPConn }); !ok {
			t.Error("what is taken over is not what was accepted")
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere")
		_, _ = io.Copy(io.Discard, c) // until the client goes
		_ = c.Close()
		_ = c.Close() // once more than needed
	})}
	server.ConnState, server.ConnContext = State, func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, accepted{}, c) }
	done := make(chan struct{})
	go func() { _ = server.Serve(l.Listener(from)); close(done) }() // ended by Close
	t.Cleanup(func() { _ = server.Close(); <-done })
	return from.Addr().String()
}

// ask sends a request on a new connection. It returns nil if the connection was reset.
func ask(t *testing.T, address, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	_, _ = io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
	answer := make([]byte, 1<<10)
	n, err := c.Read(answer)
	if err != nil {
		_ = c.Close()
		return nil
	}
	if !strings.Contains(string(answer[:n]), "here") {
		for ; err == nil && !strings.Contains(string(answer[:n]), "here"); n, err = c.Read(answer) {
		}
	}
	return c
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: " + what)
		}
	}
}

func TestListener_refusesConnectionsBeyondTheBoundAndNotForLonger(t *testing.T) {
	for _, path := range []string{"/", "/taken"} {
		l := with(func(c *Config) { c.Connections, c.CallerConnections = 100, 3 })
		address := serve(t, l)
		var held []net.Conn
		for range 3 {
			held = append(held, ask(t, address, path))
		}
		for range 10 {
			if ask(t, address, path) != nil {
				t.Fatalf("%s: a fourth connection is served", path)
			}
		}
		if got := refusals(t, l, "caller-connections"); got != 10 {
			t.Errorf("%s: %v refusals were counted", path, got)
		}
		_ = held[0].Close()
		eventually(t, "a place is free", func() bool { return l.connections.Taken() == 2 })
		if held[0] = ask(t, address, path); held[0] == nil {
			t.Errorf("%s: the place that is free is not given", path)
		}
		for _, c := range held {
			_ = c.Close()
		}
		eventually(t, "all places are free", func() bool { return l.connections.Taken() == 0 && callers(l.connections) == 0 })
	}
}

// A proxy has the connections of all its clients, so only the node's limit applies to it.
func TestListener_doesNotCountATrustedProxysConnections(t *testing.T) {
	l := with(func(c *Config) {
		c.Connections, c.CallerConnections, c.TrustedProxies = 5, 1, []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	})
	address := serve(t, l)
	var held []net.Conn
	for range 5 {
		held = append(held, ask(t, address, "/"))
	}
	if ask(t, address, "/") != nil || held[4] == nil || refusals(t, l, "connections") != 1 {
		t.Error("the bounds are others")
	}
	for _, c := range held {
		_ = c.Close()
	}
}

// 10,000 connections come and go in any way, many at a time. The count includes each, and drops
// each when it closes.
func TestListener_countReturnsToZero(t *testing.T) {
	l := with(func(c *Config) { c.Connections, c.CallerConnections = 1000, 40 })
	address := serve(t, l)
	var wg sync.WaitGroup
	for range 50 { // ten more than allowed
		wg.Go(func() {
			for i := range 200 {
				path := "/"
				if i%2 == 1 {
					path = "/taken"
				}
				c := ask(t, address, path)
				if c == nil {
					continue
				}
				if i%3 == 0 {
					_ = c.(*net.TCPConn).SetLinger(0) // it resets
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	eventually(t, "all places are free", func() bool { return l.connections.Taken() == 0 })
	if callers(l.connections) != 0 {
		t.Error("callers are left")
	}
	if c := ask(t, address, "/"); c == nil {
		t.Error("nobody is served any more")
	} else {
		_ = c.Close()
	}
}

// callers returns how many callers have places.
func callers(p *Places) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.of)
}

func refusals(t *testing.T, l *Limits, limit string) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(l.Metrics()...)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "gapless_refused_total" && m.GetLabel()[0].GetValue() == limit {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no count of %s", limit)
	return 0
}

func TestConfig_reportsEveryMistake(t *testing.T) {
	err := Config{Viewers: -1, CallerTickets: -2}.Validate()
	if err == nil || !strings.Contains(err.Error(), "-viewers: must not be negative (-1)") || !strings.Contains(err.Error(), "-caller-tickets: must not be negative (-2)") || DefaultConfig().Validate() != nil {
		t.Errorf("%v", err)
	}
}
