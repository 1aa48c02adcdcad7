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

// dials makes the connections to Redis, and replaces them when they may lead to the wrong server. At a failover an address
// may move (a virtual IP, a name, a balancer). It leads to the new master only when it is dialled again, because
// the old master keeps its connections. go-redis drops the one connection that received READONLY, and the
// others of its pool still lead to the same server.
type dials struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	generation atomic.Int64
	mu         sync.Mutex
	dropped    time.Time // when generation was last raised
}

// dropEvery limits how often connections are dropped: a Redis that stays read-only is not dialled for each command.
const dropEvery = time.Second

// drop makes every existing connection fail when it is next used, unless drop did so just now. It does not disturb a command
// that is under way.
func (d *dials) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); now.Sub(d.dropped) >= dropEvery {
		d.dropped = now
		d.generation.Add(1)
	}
}

// spoil does what drop does, without its limit, and does not count as a drop: one of the connections must not be used again.
func (d *dials) spoil() { d.generation.Add(1) }

// recently reports whether drop has just taken effect: connections made since then lead where the address now leads.
func (d *dials) recently() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.dropped.IsZero() && time.Since(d.dropped) < dropEvery
}

// lasting marks the context of a dial for Pub/Sub. The owner of such a connection closes it, and drop does not affect it.
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

// unsent marks an error after which no command can have been executed. It wraps the error, so go-redis still recognises it.
func unsent(err error) error { return fmt.Errorf("%w: %w", errUnsent, err) }

var errStale = fmt.Errorf("%w: its connection is from before a failover", errUnsent)

// conn is a connection to Redis. Commands use it one after another.
type conn struct {
	net.Conn
	from       *dials
	generation int64
	lasting    bool
	asking     atomic.Bool // a command was written, in part or whole, and no reply has been read
	answered   atomic.Bool // something was read; before that only HELLO was sent
}

func (c *conn) stale() bool { return !c.lasting && c.generation < c.from.generation.Load() }

// Write implements net.Conn. On a stale connection it returns errStale instead of beginning a command.
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

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.asking.Store(false)
		c.answered.Store(true)
	} else if err != nil && !c.answered.Load() {
		err = unsent(err) // for example closed by a proxy that has no Redis
	}
	return n, err
}

// sysConn is a connection whose socket go-redis checks before each use.
type sysConn struct {
	*conn
	sys syscall.Conn
}

// SyscallConn implements syscall.Conn. It returns errStale on a stale connection.
func (c sysConn) SyscallConn() (syscall.RawConn, error) {
	if c.stale() {
		return nil, errStale
	}
	return c.sys.SyscallConn()
}

// dialHook marks the errors of dials that fail before they reach ours, for example because no Sentinel can be reached.
type dialHook struct{}

// DialHook implements redis.Hook.
func (dialHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := next(ctx, network, address)
		if err != nil && !errors.Is(err, errUnsent) {
			err = unsent(err)
		}
		return c, err
	}
}

// ProcessHook implements redis.Hook.
func (dialHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

// ProcessPipelineHook implements redis.Hook.
func (dialHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
