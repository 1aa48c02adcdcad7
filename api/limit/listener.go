package limit

import (
	"bytes"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Listener bounds the connections that come from l. One that is over a bound is reset at once: it
// is not known yet what it wants, so no answer would suit all, and all clients come back to a
// connection that broke. Those that a handler takes over count until they are closed.
func (l *Limits) Listener(from net.Listener) net.Listener { return &listener{from, l} }

type listener struct {
	net.Listener
	limits *Limits
}

// sendBuffer is what the kernel is asked to hold for a connection. Left to itself it takes megabytes, and a client
// that reads nothing would not be noticed. It is enough for 6 MB/s over 10 ms.
const sendBuffer = 64 << 10

// receiveBuffer is the same of what clients send: a body that is not read would wait there by megabytes.
const receiveBuffer = 128 << 10

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tcp, ok := c.(*net.TCPConn)
		if !ok {
			return c, nil
		}
		caller := l.limits.peer(tcp)
		stranger := l.limits.cfg.Tokens && caller != Caller{} // a trusted proxy has the connections of others
		if l.limits.connections.Take(caller, 1) != nil {
			Reset(tcp)
			continue
		}
		if stranger && l.limits.strangers.Take(caller, 1) != nil {
			l.limits.connections.Give(caller, 1)
			Reset(tcp)
			continue
		}
		_ = tcp.SetWriteBuffer(sendBuffer)
		_ = tcp.SetReadBuffer(receiveBuffer)
		if long := l.limits.cfg.WriteTimeout; long > 0 {
			setUnsent(tcp, long+10*time.Second) // who waits for a write says first that it takes too long
		}
		return &conn{TCPConn: tcp, limits: l.limits, caller: caller, stranger: stranger, owes: helloCost, header: header{counts: true}}, nil
	}
}

// peer is whose connection it is: nobody's, of a proxy that is trusted.
func (l *Limits) peer(tcp *net.TCPConn) Caller {
	at, ok := tcp.RemoteAddr().(*net.TCPAddr)
	if !ok || !l.cfg.Addresses {
		return Caller{}
	}
	a, ok := netip.AddrFromSlice(at.IP)
	if !ok || l.trusts(a) {
		return Caller{}
	}
	return Caller{Address: network(a)}
}

// conn has a place.
type conn struct {
	*net.TCPConn
	limits *Limits
	caller Caller
	closed atomic.Bool

	mu       sync.Mutex
	stranger bool // it has a place among those that have shown no token
	owes     int  // bytes that count as read from it next
	header   header
	answered time.Time // since when its last handler that returned had waited for its client alone
}

// Read implements net.Conn. It ends the connection when a header has more lines than anybody needs: read, each line costs
// many times what it cost to send.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if n > 0 && !c.heed(n) {
		Reset(c.TCPConn)
		return 0, errUnheard
	}
	c.mu.Lock()
	long := c.header.read(p[:n])
	c.mu.Unlock()
	if long {
		_, _ = c.Write([]byte(tooManyLines)) // the server is waiting for the header, so nobody else writes
		_ = c.CloseWrite()
		return 0, errLines
	}
	return n, err
}

// A connection without a token counts as helloCost bytes when it is new, and a request on it that is refused for want of memory as
// refusedCost: so much more than reading does that cost.
const (
	helloCost   = 4 << 10
	refusedCost = 4 << 10
	heedMost    = 5 * time.Second // how long it waits for its turn to be read
)

// heed waits until n bytes more may be heard of a connection on which no token was shown, and reports whether they may.
func (c *conn) heed(n int) bool {
	const step = 100 * time.Millisecond
	c.mu.Lock()
	n += c.owes
	c.owes = 0
	c.mu.Unlock()
	for waited := time.Duration(0); ; {
		if !c.isStranger() {
			return true
		}
		after := c.limits.heard.after(c.caller, n)
		switch {
		case after == 0:
			return true
		case waited+after > heedMost || c.closed.Load():
			_ = c.limits.Refuse(c.limits.heard.error(after))
			return false
		}
		after = min(after, step)
		time.Sleep(after)
		waited += after
	}
}

// Overdone says that a request was refused for want of memory. On a connection without a token that slows down what comes next.
func Overdone(c net.Conn) {
	if c := of(c); c != nil && c.isStranger() {
		c.limits.heard.penalize(c.caller, refusedCost, heedMost)
	}
}

// IsStranger reports whether a token is wanted on a connection and was not shown yet.
func IsStranger(c net.Conn) bool {
	of := of(c)
	return of != nil && of.isStranger()
}

func (c *conn) isStranger() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stranger
}

// Write implements net.Conn. A peer that took nothing for as long as it may is reset when its connection is closed: what waits
// to be sent would keep that open in the peer's eyes, and in the kernel's memory.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		_ = c.SetLinger(0)
	}
	return n, err
}

var errUnheard = errors.New("more comes from its address without a token than is read")

var errLines = errors.New("the header has too many lines")

const tooManyLines = "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/problem+json\r\nConnection: close\r\n\r\n" +
	`{"title":"Request Header Fields Too Large","status":431,"code":"header_too_large","limit":128,"detail":"the header has more than 128 lines: send fewer"}`

// MostLines is how many lines a header may have. Browsers send some 20, and proxies add a few.
const MostLines = 128

// header counts the lines of a request's header as they arrive.
type header struct {
	begun  int  // how much of what arrived first begins HTTP/2; -1: it does not
	never  bool // there are no such headers: the connection speaks TLS, or HTTP/2
	counts bool // a header is expected
	lines  int
	text   bool // the line that is not whole yet has more than a CR
}

// preface is what an HTTP/2 connection begins with (RFC 9113, section 3.4), as a request that HTTP/1 refuses.
const preface = "PRI * HTTP/2.0\r\n\r\n"

// read takes what arrived, and says whether the header has too many lines. It stops counting at the header's end.
func (h *header) read(p []byte) (long bool) {
	const handshake = 22 // no method begins with it
	for i := 0; h.begun >= 0 && !h.never && i < len(p); i++ {
		switch {
		case p[i] == preface[h.begun]:
			h.begun++
			h.never = h.begun == len(preface)
		default:
			h.never = h.begun == 0 && p[i] == handshake
			h.begun = -1
		}
	}
	if h.never {
		return false
	}
	for h.counts {
		line, rest, whole := bytes.Cut(p, []byte{'\n'})
		if !whole {
			break
		}
		empty := !h.text && (len(line) == 0 || string(line) == "\r")
		h.text, p = false, rest
		if empty {
			h.counts = false
		} else if h.lines++; h.lines > MostLines {
			return true
		}
	}
	if n := bytes.LastIndexByte(p, '\n'); n >= 0 {
		h.text, p = false, p[n+1:]
	}
	h.text = h.text || len(p) > 0 && string(p) != "\r"
	return false
}

// State is an http.Server's ConnState: a connection whose request was answered has another header next. One of HTTP/2
// whose last response nobody took is closed: each stream is over when its time is, the connection itself is not.
func State(c net.Conn, state http.ConnState) {
	of := of(c)
	if of == nil || state != http.StateIdle && state != http.StateNew { // one that was given back is new once more
		return
	}
	of.mu.Lock()
	of.header.counts, of.header.lines = true, 0
	stalled := state == http.StateIdle && of.header.never && !of.answered.IsZero() && of.limits.cfg.WriteTimeout > 0 && time.Since(of.answered) > min(of.limits.cfg.WriteTimeout, 90*time.Second)/2
	of.mu.Unlock()
	if stalled {
		_ = of.SetLinger(0)
		_ = of.Close()
	}
}

// Arrived says that a request's header has arrived: what follows on its connection is a body.
func Arrived(c net.Conn) {
	if c := of(c); c != nil {
		c.mu.Lock()
		c.header.counts = false
		c.mu.Unlock()
	}
}

// Answered says since when a handler of a connection's requests has waited for nothing but its client.
func Answered(c net.Conn, since time.Time) {
	if c := of(c); c != nil {
		c.mu.Lock()
		c.answered = since
		c.mu.Unlock()
	}
}

// Known says that a token was shown on a connection.
func Known(c net.Conn) {
	if c := of(c); c != nil {
		c.known()
	}
}

func (c *conn) known() {
	c.mu.Lock()
	stranger := c.stranger
	c.stranger = false
	c.mu.Unlock()
	if stranger {
		c.limits.strangers.Give(c.caller, 1)
	}
}

// Shed has a connection of HTTP/2 closed as soon as nothing is under way on it: a request of it was refused without a word.
func Shed(c net.Conn) { Answered(c, time.Unix(1, 0)) }

// of is the connection as it was accepted; nil: it was not accepted here.
func of(c net.Conn) *conn {
	for {
		switch t := c.(type) { // of a request without a connection that was accepted, as in tests, it is nil
		case *conn:
			return t
		case interface{ NetConn() net.Conn }:
			c = t.NetConn()
		default:
			return nil
		}
	}
}

// Close gives the place back, the first time.
func (c *conn) Close() error {
	err := c.TCPConn.Close()
	if !c.closed.Swap(true) {
		c.known()
		c.limits.connections.Give(c.caller, 1)
	}
	return err
}

// Plain is the connection itself, for those who write to its socket. Close is to be called here.
func (c *conn) Plain() *net.TCPConn { return c.TCPConn }

// NetConn is the same, for those who look for it under TLS.
func (c *conn) NetConn() net.Conn { return c.TCPConn }

// Reset closes a connection so that its peer notices at once, and nothing waits to be sent to it.
func Reset(tcp *net.TCPConn) {
	_ = tcp.SetLinger(0)
	_ = tcp.Close()
}

func ipNet(p netip.Prefix) *net.IPNet {
	a := p.Addr()
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(p.Bits(), a.BitLen())}
}
