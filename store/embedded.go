package store

import (
	"context"
	"net"
	"sync"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// embedded is a Redis inside this process, so that one command runs everything and
// there is one code path for storage. It keeps nothing on disk and listens nowhere:
// connections are pipes.
type embedded struct {
	redis *miniredis.Miniredis
	wg    sync.WaitGroup // the flushes of its connections
}

func openEmbedded() (*embedded, error) {
	e := &embedded{redis: miniredis.NewMiniRedis()}
	e.redis.ClockTTL(true) // expiry follows the clock
	first, err := e.redis.Dial()
	if err != nil {
		return nil, err
	}
	return e, first.Close()
}

func (e *embedded) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	eager := &eager{Conn: server, wake: make(chan struct{}, 1), done: make(chan struct{})}
	e.wg.Go(eager.flush) // ended by Close of either end
	e.redis.Server().ServeConn(eager)
	return client, nil
}

func (e *embedded) close() {
	e.redis.Close()
	e.wg.Wait()
}

// eager is a server's end of a pipe on which writing never waits for the client. A
// pipe has no buffer, and the server answers each command before it reads the next: a
// client that writes a command while an answer is on its way would wait for ever, and
// everybody else with it.
type eager struct {
	net.Conn
	wake chan struct{}
	done chan struct{}
	once sync.Once

	mu      sync.Mutex
	pending []byte
}

func (e *eager) Write(p []byte) (int, error) {
	e.mu.Lock()
	e.pending = append(e.pending, p...)
	e.mu.Unlock()
	select {
	case e.wake <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (e *eager) Close() error {
	e.once.Do(func() { close(e.done) })
	return e.Conn.Close()
}

func (e *eager) flush() {
	for {
		select {
		case <-e.wake:
		case <-e.done:
			return
		}
		e.mu.Lock()
		p := e.pending
		e.pending = nil
		e.mu.Unlock()
		if _, err := e.Conn.Write(p); err != nil {
			return
		}
	}
}

// Asking whether a server announces maintenance costs a command at each connect.
var noMaintNotifications = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
