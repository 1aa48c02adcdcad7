package limit

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A header may have as many lines as the limit says, in whatever pieces it arrives, and what
// follows it is not counted.
func TestHeader_linesAreCountedInWhateverPiecesTheyArrive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lines := rapid.IntRange(1, 2*MostLines).Draw(t, "lines")
		end := rapid.SampledFrom([]string{"\r\n", "\n"}).Draw(t, "end")
		text := "POST / HTTP/1.1" + end
		for i := 1; i < lines; i++ {
			text += fmt.Sprintf("a%d:%s", i, end)
		}
		text += end + strings.Repeat("\n", rapid.IntRange(0, 3*MostLines).Draw(t, "body"))
		h := header{counts: true}
		long := false
		for len(text) > 0 {
			n := rapid.IntRange(1, len(text)).Draw(t, "piece")
			long = long || h.read([]byte(text[:n]))
			text = text[n:]
		}
		if long != (lines > MostLines) {
			t.Errorf("%d lines: %v", lines, long)
		}
	})
}

// TLS and HTTP/2 are not counted, in whatever pieces they begin. Bytes that only look like them at first
// are counted.
func TestHeader_isNoneOfTLSAndHTTP2(t *testing.T) {
	many := strings.Repeat("a:\n", 2*MostLines)
	for begin, counted := range map[string]bool{
		"\x16\x03\x01": false, preface + "SM\r\n\r\n": false,
		"PRI / HTTP/1.1\r\n": true, "PRI * HTTP/2.0\r\nx:": true, "GET / HTTP/1.1\r\n": true, "P\x16": true,
	} {
		for _, step := range []int{1, 3, 1000} {
			h, long := header{counts: true}, false
			for text := begin + many; len(text) > 0; {
				n := min(step, len(text))
				if long = h.read([]byte(text[:n])); long {
					break
				}
				text, h.counts = text[n:], h.counts || h.never // as State does
			}
			if long != counted {
				t.Errorf("%q by %d: %v", begin, step, long)
			}
		}
	}
}

// A connection's next header may begin in the middle of a line that arrived with the previous
// request.
func TestHeader_nextOneIsCountedFromWhereItBegins(t *testing.T) {
	h := header{counts: true}
	if h.read([]byte("GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1")); h.counts {
		t.Fatal("its end was not seen")
	}
	h.counts, h.lines = true, 0
	if h.read([]byte("\r\n")); !h.counts {
		t.Error("the end of its first line was taken for its own")
	}
	if !h.read([]byte(strings.Repeat("a:\r\n", MostLines))) {
		t.Error("its lines are not counted")
	}
}

func TestListener_answersAHeaderOfTooManyLines(t *testing.T) {
	l := with(func(*Config) {})
	address := serve(t, l)
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n"+strings.Repeat("a:\r\n", MostLines))
	answer, _ := io.ReadAll(c)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 431 ") || !strings.Contains(string(answer), fmt.Sprintf(`"limit":%d`, MostLines)) {
		t.Errorf("%q", answer)
	}
	eventually(t, "its place is free", func() bool { return l.connections.Taken() == 0 })
}

// An address has fewer connections until it shows tokens on them. Each connection shows its own.
func TestListener_boundsConnectionsWithoutAToken(t *testing.T) {
	l := with(func(c *Config) { c.CallerConnections, c.CallerStrangers, c.Tokens = 5, 2, true })
	address := serve(t, l)
	var held []net.Conn
	for _, path := range []string{"/known", "/", "/known", "/"} {
		c := ask(t, address, path)
		if c == nil {
			t.Fatalf("%s is refused", path)
		}
		held = append(held, c)
	}
	if ask(t, address, "/known") != nil {
		t.Error("a third connection is served before it has shown a token")
	}
	if refusals(t, l, "caller-strangers") != 1 || l.strangers.Taken() != 2 || l.connections.Taken() != 4 {
		t.Errorf("%v refusals, %d strangers of %d connections", refusals(t, l, "caller-strangers"), l.strangers.Taken(), l.connections.Taken())
	}
	for _, c := range held {
		_ = c.Close()
	}
	eventually(t, "all places are free", func() bool { return l.connections.Taken() == 0 && l.strangers.Taken() == 0 })
}

// Input from strangers at one address is read slowly. A caller that shows a token is read at once, and so is another address.
func TestListener_readsStrangersAtAPace(t *testing.T) {
	var now atomic.Int64
	l := with(func(c *Config) {
		c.StrangerBytes, c.Tokens = 1<<10, true
		c.Now = func() time.Time { return time.Unix(now.Load(), 0) }
	})
	address := serve(t, l)
	for _, path := range []string{"/", "/"} { // each counts as 4 KiB and a little: the bucket has 10
		c := ask(t, address, path)
		if c == nil {
			t.Fatal("it is not heard at once")
		}
		defer c.Close()
	}
	heard := make(chan net.Conn)
	go func() { heard <- ask(t, address, "/known") }()
	select {
	case <-heard:
		t.Error("a third connection is heard at once")
	case <-time.After(300 * time.Millisecond):
	}
	now.Add(10)
	c := <-heard
	if c == nil {
		t.Fatal("it is not heard at all")
	}
	defer c.Close()
	for range 20 { // it has shown a token
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\nX: "+strings.Repeat("x", 2<<10)+"\r\n\r\n")
	}
	answers, got := make([]byte, 4<<10), ""
	for strings.Count(got, "HTTP/1.1 200") < 20 {
		n, err := c.Read(answers)
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		got += string(answers[:n])
	}
	if n := refusals(t, l, "stranger-bytes"); n != 0 {
		t.Errorf("%v refusals", n)
	}
}

// If an address has sent too much for long, its connections are reset.
func TestListener_doesNotWaitForEverToHearStrangers(t *testing.T) {
	l := with(func(c *Config) {
		c.StrangerBytes, c.Tokens = 100, true // a connection would wait 40 s for its turn
	})
	address := serve(t, l)
	if ask(t, address, "/") == nil {
		t.Fatal("the first one is not heard")
	}
	if ask(t, address, "/") != nil {
		t.Error("the second one is heard")
	}
	if n := refusals(t, l, "stranger-bytes"); n != 1 {
		t.Errorf("%v refusals", n)
	}
}
