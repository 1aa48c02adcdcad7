package sse

import (
	"net"
	"sync"
	"time"
)

// Returned is a listener on which connections come that were taken over, once their responses have ended as HTTP
// ends one: they are the server's again, and a client may send its next request. Many do so at once: to close
// such a connection would lose that.
type Returned struct {
	// Idle is how long a connection is kept until its next request begins: as long as any that waits for one. 0: as long as the
	// server keeps a new one.
	Idle   time.Duration
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}

	mu    sync.Mutex
	quiet map[*again]struct{} // those of which the server has read nothing yet
	over  bool
}

// NewReturned makes one. Its Back is a hub's (Config.Back), and it is to be served by the hub's server.
func NewReturned(addr net.Addr) *Returned {
	return &Returned{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{}), quiet: map[*again]struct{}{}}
}

// Back gives a connection to the server, of which read was read already.
func (r *Returned) Back(c net.Conn, read []byte) {
	if a, ok := c.(*again); ok {
		c = a.Conn
	}
	a := &again{Conn: c, read: read, of: r, came: time.Now(), quiet: r.Idle > 0 && len(read) == 0}
	r.mu.Lock()
	over := r.over
	if !over {
		r.quiet[a] = struct{}{}
	}
	r.mu.Unlock()
	if over {
		_ = c.Close()
		return
	}
	select {
	case r.conns <- a:
	case <-r.closed: // and Close has closed it
	}
}

// Accept implements net.Listener.
func (r *Returned) Accept() (net.Conn, error) {
	select {
	case c := <-r.conns:
		return c, nil
	case <-r.closed:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (r *Returned) Addr() net.Addr { return r.addr }

// Close implements net.Listener. It closes the connections from which nothing has come: the server would wait
// for their first request.
func (r *Returned) Close() error {
	r.mu.Lock()
	quiet := r.quiet
	over := r.over
	r.quiet, r.over = nil, true
	r.mu.Unlock()
	if !over {
		close(r.closed)
	}
	for a := range quiet {
		_ = a.Conn.Close()
	}
	return nil
}

// again is a connection that is the server's again.
type again struct {
	net.Conn
	read []byte
	of   *Returned
	once sync.Once

	// The server takes it for a new connection, and gives its first request the time of a header and of a body from then on. So those
	// times begin when something comes.
	mu     sync.Mutex
	came   time.Time
	quiet  bool          // nothing has come
	header time.Duration // that the server gives
	waited time.Duration // that the body's time is to be moved by; 0: it was, or need not be
}

// SetReadDeadline implements net.Conn.
func (a *again) SetReadDeadline(t time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case t.IsZero():
	case a.quiet:
		a.header = time.Until(t)
		t = a.came.Add(a.of.Idle)
	default:
		t = t.Add(a.waited)
		a.waited = 0
	}
	return a.Conn.SetReadDeadline(t)
}

// begins starts the time of a header.
func (a *again) begins() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.quiet {
		a.quiet, a.waited = false, time.Since(a.came)
		_ = a.Conn.SetReadDeadline(time.Now().Add(a.header))
	}
}

// heard notes that something came from it, or that it is over.
func (a *again) heard() {
	a.of.mu.Lock()
	delete(a.of.quiet, a)
	a.of.mu.Unlock()
}

// Read implements net.Conn.
func (a *again) Read(p []byte) (n int, err error) {
	if len(a.read) > 0 {
		n = copy(p, a.read)
		a.read = a.read[n:]
	} else if n, err = a.Conn.Read(p); n > 0 {
		a.begins()
	}
	a.once.Do(a.heard)
	return n, err
}

// Close implements net.Conn.
func (a *again) Close() error {
	a.once.Do(a.heard)
	return a.Conn.Close()
}

// Plain is the connection itself, for those who write to its socket.
func (a *again) Plain() *net.TCPConn { return plainConn(a.Conn) }

// NetConn is what is under it.
func (a *again) NetConn() net.Conn { return a.Conn }
