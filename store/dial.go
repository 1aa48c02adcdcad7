package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// dials makes the connections to Redis, and has them made anew when they may lead to the wrong server: an address that
// moved at a failover (a virtual IP, a name, a balancer) leads to the new master only for those who dial it again, and
// the former master keeps the connections that it has. go-redis drops the one connection that was answered READONLY; the
// others of its pool lead to the same server.
type dials struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	generation atomic.Int64
	mu         sync.Mutex
	dropped    time.Time // when generation was last raised
}

// dropEvery bounds how often connections are dropped: a Redis that stays read-only is not dialled for each command.
const dropEvery = time.Second

// drop has every connection that was made until now fail when it is used again, unless that was done just now. A command
// that is under way on it is not disturbed.
func (d *dials) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); now.Sub(d.dropped) >= dropEvery {
		d.dropped = now
		d.generation.Add(1)
	}
}

// spoil does what drop does at once, and says nothing of where the address leads: one of the connections must not be used again.
func (d *dials) spoil() { d.generation.Add(1) }

// recently reports whether drop has just had connections made anew: those that there are now lead wherever the address leads.
func (d *dials) recently() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.dropped.IsZero() && time.Since(d.dropped) < dropEvery
}

// lasting marks the context of a dial for Pub/Sub: such a connection is closed by its owner, and drop does not touch it.
type lasting struct{}

func (d *dials) connect(ctx context.Context, network, address string) (net.Conn, error) {
	generation := d.generation.Load() // before the dial: the address may move during it
	inner, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, unsent(err)
	}
	c := &conn{Conn: inner, from: d, generation: generation, lasting: ctx.Value(lasting{}) != nil}
	if sys, ok := inner.(syscall.Conn); ok {
		return sysConn{c, sys}, nil
	}
	return c, nil
}

// unsent marks an error after which no command can have been executed. What go-redis asks of an error it finds in it still.
func unsent(err error) error { return fmt.Errorf("%w: %w", errUnsent, err) }

var errStale = fmt.Errorf("%w: its connection is from before a failover", errUnsent)

// conn is a connection to Redis. It is used by one command after the other.
type conn struct {
	net.Conn
	from       *dials
	generation int64
	lasting    bool
	asking     atomic.Bool // a command was written, in part or whole, and no answer has been read
	answered   atomic.Bool // something was read: before that nothing was sent but HELLO
}

func (c *conn) stale() bool { return !c.lasting && c.generation < c.from.generation.Load() }

func (c *conn) Write(p []byte) (int, error) {
	if !c.asking.Swap(true) && c.stale() {
		return 0, errStale
	}
	n, err := c.Conn.Write(p)
	if err != nil && !c.answered.Load() {
		err = unsent(err)
	}
	return n, err
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.asking.Store(false)
		c.answered.Store(true)
	} else if err != nil && !c.answered.Load() {
		err = unsent(err) // such as by a proxy that has no Redis
	}
	return n, err
}

// sysConn is a connection whose socket go-redis looks at before it uses it.
type sysConn struct {
	*conn
	sys syscall.Conn
}

func (c sysConn) SyscallConn() (syscall.RawConn, error) {
	if c.stale() {
		return nil, errStale
	}
	return c.sys.SyscallConn()
}

// dialHook marks the errors of dials that fail before they get to ours, such as one whose Sentinels cannot be reached.
type dialHook struct{}

func (dialHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := next(ctx, network, address)
		if err != nil && !errors.Is(err, errUnsent) {
			err = unsent(err)
		}
		return c, err
	}
}

func (dialHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (dialHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
