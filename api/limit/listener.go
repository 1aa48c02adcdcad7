package limit

import (
	"net"
	"net/netip"
	"sync/atomic"
)

// Listener bounds the connections that come from l. One that is over a bound is reset at once: it
// is not known yet what it wants, so no answer would suit all, and all clients come back to a
// connection that broke. Those that a handler takes over count until they are closed.
func (l *Limits) Listener(from net.Listener) net.Listener { return &listener{from, l} }

type listener struct {
	net.Listener
	limits *Limits
}

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
		if l.limits.connections.Take(caller, 1) != nil {
			_ = tcp.SetLinger(0)
			_ = tcp.Close()
			continue
		}
		return &conn{TCPConn: tcp, places: l.limits.connections, caller: caller}, nil
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
	places *Places
	caller Caller
	closed atomic.Bool
}

// Close gives the place back, the first time.
func (c *conn) Close() error {
	err := c.TCPConn.Close()
	if !c.closed.Swap(true) {
		c.places.Give(c.caller, 1)
	}
	return err
}

// Plain is the connection itself, for those who write to its socket. Close is to be called here.
func (c *conn) Plain() *net.TCPConn { return c.TCPConn }

// NetConn is the same, for those who look for it under TLS.
func (c *conn) NetConn() net.Conn { return c.TCPConn }

func ipNet(p netip.Prefix) *net.IPNet {
	a := p.Addr()
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(p.Bits(), a.BitLen())}
}
