package sse

import (
	"bytes"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hijack takes over a connection if it is plain TCP.
func (h *Hub) hijack(to http.ResponseWriter, r *http.Request) (socket, bool) {
	conn := Conn(r.Context())
	tcp := plainConn(conn)
	if tcp == nil || !h.gone.start(h) {
		return nil, false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, false
	}
	_, buffered, err := http.NewResponseController(to).Hijack()
	if err != nil {
		return nil, false
	}
	setSendBuffer(tcp, sendBuffer)
	// On descriptor -1 all calls fail: the connection is already closed. Bytes after an unread body
	// are no request.
	s := &tcpSocket{TCPConn: tcp, conn: conn, hub: h, last: r.Close || r.Body != http.NoBody, fd: -1}
	if n := buffered.Reader.Buffered(); n > 0 { // the next request was already sent
		s.read, _ = buffered.Reader.Peek(n)
		s.read = bytes.Clone(s.read)
	}
	_ = raw.Control(func(fd uintptr) { s.fd = int(fd) })
	return s, true
}

// tcpSocket has the descriptor of its connection, which stays open and non-blocking until Close.
// Only the owner of the seat may write to it.
type tcpSocket struct {
	*net.TCPConn
	conn net.Conn // as it was accepted: its wrappers must see the Close
	fd   int
	hub  *Hub
	read []byte // bytes after the request
	last bool   // no other request follows
}

func (s *tcpSocket) try(p []byte) (n int, err error) {
	for n < len(p) {
		k, err := unix.Write(s.fd, p[n:])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, broken(err)
		default:
			n += k
			return n, nil // less than all: the socket is full
		}
	}
	return n, nil
}

func (s *tcpSocket) tryAll(p [][]byte) (int, error) {
	for {
		switch n, err := unix.Writev(s.fd, p[:min(len(p), mostPieces)]); err {
		case nil:
			return n, nil
		case unix.EINTR:
		default:
			return 0, broken(err)
		}
	}
}

// mostPieces is IOV_MAX (writev(2)). Further pieces count as not fitting.
const mostPieces = 1024

// broken returns err if it means that the connection is broken, so that the viewer has gone. Any
// other error means that nothing fits now. The goroutine that waits for room sees it again.
func broken(err error) error {
	switch err {
	case unix.EPIPE, unix.ECONNRESET, unix.ECONNABORTED, unix.ENOTCONN, unix.ETIMEDOUT, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EBADF:
		return err
	}
	return nil
}

// Close implements net.Conn.
func (s *tcpSocket) Close() error { return s.conn.Close() }

// plainConn returns the TCP connection if it is nothing more than that, or nil.
func plainConn(c net.Conn) *net.TCPConn {
	if p, ok := c.(interface{ Plain() *net.TCPConn }); ok {
		return p.Plain()
	}
	tcp, _ := c.(*net.TCPConn)
	return tcp
}

// NetConn lets Writer ask how far the peer has got.
func (s *tcpSocket) NetConn() net.Conn { return s.TCPConn }

func (s *tcpSocket) watch(gone func()) error { return s.hub.gone.add(s.fd, gone) }
func (s *tcpSocket) unwatch()                { s.hub.gone.remove(s.fd) }

// finish gives the connection back to the server, for the next request. If it cannot, it closes the
// connection after the peer had time to read the end. Closing with unread input resets a
// connection, and the reset may discard what was sent last.
func (s *tcpSocket) finish() {
	if back := s.hub.cfg.Back; back != nil && !s.last && s.hub.leaving.Err() == nil && s.SetDeadline(time.Time{}) == nil {
		back(s.conn, s.read)
		return
	}
	_ = s.CloseWrite()
	time.AfterFunc(500*time.Millisecond, func() { _ = s.Close() })
}

// departures notices when peers close their connections, for all viewers of a node. It uses epoll,
// so that no goroutine per viewer waits in a read.
type departures struct {
	once  sync.Once
	ready bool
	epoll int
	stop  int // an eventfd

	mu    sync.Mutex
	calls map[int32]departure // by descriptor
	count int32
}

type departure struct {
	number int32 // a descriptor may be reused by the time that its event is read
	call   func()
}

// start begins to watch, and reports whether that works.
func (d *departures) start(h *Hub) bool {
	d.once.Do(func() {
		var err error
		if d.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
			return
		}
		if d.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			_ = unix.Close(d.epoll)
			return
		}
		if unix.EpollCtl(d.epoll, unix.EPOLL_CTL_ADD, d.stop, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(d.stop)}) != nil {
			_, _ = unix.Close(d.epoll), unix.Close(d.stop)
			return
		}
		d.calls, d.ready = map[int32]departure{}, true
		h.wg.Go(d.wait) // ended by close
	})
	return d.ready
}

func (d *departures) add(fd int, call func()) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.count++
	d.calls[int32(fd)] = departure{d.count, call}
	e := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(fd), Pad: d.count}
	err := unix.EpollCtl(d.epoll, unix.EPOLL_CTL_ADD, fd, &e)
	if err != nil {
		delete(d.calls, int32(fd))
	}
	return err
}

func (d *departures) remove(fd int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.calls[int32(fd)]; ok {
		delete(d.calls, int32(fd))
		_ = unix.EpollCtl(d.epoll, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

func (d *departures) wait() {
	defer unix.Close(d.epoll)
	defer unix.Close(d.stop)
	events := make([]unix.EpollEvent, 128)
	for {
		n, err := unix.EpollWait(d.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			return
		}
		for _, e := range events[:max(n, 0)] {
			if e.Fd == int32(d.stop) {
				return
			}
			d.mu.Lock()
			c, ok := d.calls[e.Fd]
			d.mu.Unlock()
			if ok && c.number == e.Pad {
				c.call()
			}
		}
	}
}

func (d *departures) close() {
	if d.ready {
		_, _ = unix.Write(d.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}
