package sse

import (
	"net"
	"sync"
	"time"
)

// Returned is a listener for connections that were taken over and whose responses have ended as
// HTTP ends one. They belong to the server again, and a client may send its next request. Many
// clients do so at once, and would lose it if the connection were closed.
type Returned struct {
	// Idle is how long a connection is kept until its next request begins, like any idle
	// connection. 0 means as long as the server keeps a new one.
	Idle   time.Duration
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}

	mu    sync.Mutex
	quiet map[*again]struct{} // connections from which the server has read nothing yet
	over  bool
}

// NewReturned returns a listener. Its Back is for Config.Back, and the hub's server must serve it.
func NewReturned(addr net.Addr) *Returned {
	return &Returned{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{}), quiet: map[*again]struct{}{}}
}

// Back gives a connection to the server, with the bytes that were already read from it.
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
	case <-r.closed: // Close has closed the connection
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

// Close implements net.Listener. It also closes the connections from which nothing has come,
// because the server would wait for their first request.
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

// again is a connection that belongs to the server again.
type again struct {
	net.Conn
	read []byte
	of   *Returned
	once sync.Once

	// The server takes it for a new connection: the time limits of its first request's header and
	// body would start at once. So those limits are moved to start when something arrives.
	mu     sync.Mutex
	came   time.Time
	quiet  bool          // nothing has arrived
	header time.Duration // the server's time limit for a header
	waited time.Duration // by how much to move the body's time limit; 0: nothing left to move
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

// begins starts the time limit of a header.
func (a *again) begins() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.quiet {
		a.quiet, a.waited = false, time.Since(a.came)
		_ = a.Conn.SetReadDeadline(time.Now().Add(a.header))
	}
}

// heard notes that something arrived, or that the connection is over.
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

// Plain returns the connection itself, for code that writes to its socket.
func (a *again) Plain() *net.TCPConn { return plainConn(a.Conn) }

// NetConn returns the wrapped connection.
func (a *again) NetConn() net.Conn { return a.Conn }
