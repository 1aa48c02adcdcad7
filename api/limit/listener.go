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

// Listener returns a listener that limits the connections from another. A connection over a limit
// is reset at once: its protocol is not known yet, so no response would suit, and all clients
// reconnect after a reset. A connection that a handler takes over counts until it is closed.
func (l *Limits) Listener(from net.Listener) net.Listener { return &listener{from, l} }

type listener struct {
	net.Listener
	limits *Limits
}

// sendBuffer is the size of a connection's send buffer in the kernel. By default the kernel takes
// megabytes, and a client that reads nothing would not be noticed. It suffices for 6 MB/s over 10
// ms.
const sendBuffer = 64 << 10

// receiveBuffer is the size of the receive buffer. By default, megabytes of an unread body would wait there.
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
			setUnsent(tcp, long+10*time.Second) // later than a handler's own deadline for the write
		}
		return &conn{TCPConn: tcp, limits: l.limits, caller: caller, stranger: stranger, owes: helloCost, header: header{counts: true}}, nil
	}
}

// peer returns the caller that a connection belongs to, or the zero Caller for a trusted proxy.
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

// conn is a connection that holds a place.
type conn struct {
	*net.TCPConn
	limits *Limits
	caller Caller
	closed atomic.Bool

	mu       sync.Mutex
	stranger bool // it holds a place among the connections without a token
	owes     int  // bytes that are added to the next read's
	header   header
	answered time.Time // since when the last handler that returned had waited only for its client
}

// Read implements net.Conn. It ends the connection when a header has too many lines, because
// parsing a line costs many times as much as sending it.
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
		_, _ = c.Write([]byte(tooManyLines)) // the server waits for the header, so it writes nothing itself
		_ = c.CloseWrite()
		return 0, errLines
	}
	return n, err
}

// A new connection without a token counts as helloCost bytes. A request on it that is refused for lack of memory counts as
// refusedCost bytes. Both cost the node more than it costs to read a few bytes.
const (
	helloCost   = 4 << 10
	refusedCost = 4 << 10
	heedMost    = 5 * time.Second // the longest wait for a turn
)

// heed waits until n more bytes may be read from a connection without a token, and reports whether they may.
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

// Overdone notes that a request was refused for lack of memory. On a connection without a token, this slows down later reads.
func Overdone(c net.Conn) {
	if c := of(c); c != nil && c.isStranger() {
		c.limits.heard.penalize(c.caller, refusedCost, heedMost)
	}
}

// IsStranger reports whether a connection needs a token and has not shown one yet.
func IsStranger(c net.Conn) bool {
	of := of(c)
	return of != nil && of.isStranger()
}

func (c *conn) isStranger() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stranger
}

// Write implements net.Conn. After a write timeout, Close resets the connection: unsent data would
// keep it open for the peer, and in the kernel's memory.
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

// MostLines is the maximum number of lines in a header. Browsers send some 20, and proxies add a
// few.
const MostLines = 128

// header counts the lines of a request's header as they arrive.
type header struct {
	begun  int  // how much of HTTP/2's preface the first bytes match; -1: none
	never  bool // the connection has no such headers: it speaks TLS, or HTTP/2
	counts bool // a header is expected
	lines  int
	text   bool // the incomplete line has more than a CR
}

// preface begins an HTTP/2 connection (RFC 9113, section 3.4). HTTP/1 refuses it as a request.
const preface = "PRI * HTTP/2.0\r\n\r\n"

// read takes bytes that arrived, and reports whether the header has too many lines. It stops
// counting at the header's end.
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

// State is an http.Server's ConnState. After a response, a connection's next header is counted.
// State closes an HTTP/2 connection whose last response was not accepted: deadlines end its
// streams, but not the connection itself.
func State(c net.Conn, state http.ConnState) {
	of := of(c)
	if of == nil || state != http.StateIdle && state != http.StateNew { // a connection that was given back is new once more
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

// Arrived notes that a request's header has arrived: a body follows on its connection.
func Arrived(c net.Conn) {
	if c := of(c); c != nil {
		c.mu.Lock()
		c.header.counts = false
		c.mu.Unlock()
	}
}

// Answered notes since when a handler of a connection's request has waited only for its client.
func Answered(c net.Conn, since time.Time) {
	if c := of(c); c != nil {
		c.mu.Lock()
		c.answered = since
		c.mu.Unlock()
	}
}

// Known notes that a token was shown on a connection.
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

// Shed has an HTTP/2 connection closed as soon as it is idle, after a request on it was refused
// without a response.
func Shed(c net.Conn) { Answered(c, time.Unix(1, 0)) }

// of returns the connection as it was accepted, or nil if it was not accepted here.
func of(c net.Conn) *conn {
	for {
		switch t := c.(type) { // c is nil for a request without an accepted connection, as in tests
		case *conn:
			return t
		case interface{ NetConn() net.Conn }:
			c = t.NetConn()
		default:
			return nil
		}
	}
}

// Close closes the connection and gives its place back, once.
func (c *conn) Close() error {
	err := c.TCPConn.Close()
	if !c.closed.Swap(true) {
		c.known()
		c.limits.connections.Give(c.caller, 1)
	}
	return err
}

// Plain returns the connection itself, for code that writes to its socket. Close must still be
// called on c.
func (c *conn) Plain() *net.TCPConn { return c.TCPConn }

// NetConn returns the same, for code that looks for it under TLS.
func (c *conn) NetConn() net.Conn { return c.TCPConn }

// Reset closes a connection so that its peer notices at once, and discards unsent data.
func Reset(tcp *net.TCPConn) {
	_ = tcp.SetLinger(0)
	_ = tcp.Close()
}

func ipNet(p netip.Prefix) *net.IPNet {
	a := p.Addr()
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(p.Bits(), a.BitLen())}
}
