// Package sse delivers logs to viewers by Server-Sent Events.
//
// A viewer is a cursor over a log and nothing else. It has one question: what comes after my
// cursor? The window of the session's feed answers it, or the history list when the cursor is older
// than the window. There is no switch from "history" to "live", so no chunk can be lost between the
// two.
//
//	Redis ── Pub/Sub, a hint ──▶ feed ── publishes immutable windows ──▶ viewer ──▶ socket
//	  └───── reads, the truth ───▶┘ └─────────── pages of older chunks ─────▲
//
// A hub has a feed for each session that is watched on this node. The feed is the only writer of
// the window. It takes a live chunk that is certainly the next one, and on any doubt it reads the
// log (feed.go). Viewers load the window without a lock. A viewer that has all of it waits until
// that window is replaced (window.go). Chunks are encoded once per node, when they enter a window.
//
// Nothing queues for a viewer. A slow viewer blocks in its own socket write, under a deadline that
// expires only if the socket takes nothing. When the write returns, the viewer takes everything new
// in one piece, or pages through the history if the window has moved on. A viewer that has
// everything waits without a goroutine if its connection can be taken over from the HTTP server
// (seat.go).
//
// Do not assume that a live chunk arrives, arrives once, or arrives in order. Do not assume that
// the log in Redis is the one that was read a moment ago: a replaced log gets a new epoch, and its
// viewers get a reset. Do not assume that a response was read to its end because it has ended.
package sse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"gapless/store"
)

// Log is the part of the store that delivery needs. store.Store documents its methods.
type Log interface {
	Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error)
	Renew(ctx context.Context, session, epoch string, last int64) error
	Given(session, epoch string, last int64)
	Witness(session string, last int64)
	ReplacedAt() int64
	Listen(session string, l store.Listener) (stop func())
}

// Config tunes delivery. No setting changes which chunks a viewer gets.
type Config struct {
	// Node names this node in welcome events.
	Node string
	// Heartbeat is the longest silence on a connection. 15 s is well below the idle
	// time-outs of common proxies, 30 s and more.
	Heartbeat time.Duration
	// Reconcile is how long a feed goes without reading the log. It limits the delay of a chunk
	// whose announcements were all lost.
	Reconcile time.Duration
	// Kept is how long the store keeps a log after a read, at least; 0 means forever. A watched
	// log is read at least three times in that period.
	Kept time.Duration
	// Window is how many bytes of events a feed keeps. WindowTotal limits all feeds together.
	Window, WindowTotal int
	// SnapshotMax is the largest snapshot in bytes (Ask.Snapshot). A snapshot of a longer log
	// covers only the log's beginning. 4 MiB holds some 50,000 words, one chunk each, with room for
	// tool data.
	SnapshotMax int
	// WriteTimeout is how long a viewer's socket may accept no bytes at all.
	WriteTimeout time.Duration
	// Linger is how long a feed outlives its last viewer, so that a reload finds it warm.
	Linger time.Duration
	// Feeds is how many logs may be watched at once; 0 means no limit. Each is a subscription and
	// one read of Redis per reconcile interval: 20,000 feeds keep half a Redis busy.
	Feeds int
	// Reads is the maximum number of concurrent Redis reads for feeds, and separately for viewers.
	// After a restart of Redis, every feed must read its log.
	Reads int
	// Plain leaves all connections to the HTTP server, even those that could be taken over.
	Plain bool
	// Back receives a connection that was taken over, after its response has ended as HTTP ends
	// one, with the bytes that were read after its request (Returned). If Back is nil, the
	// connection is closed.
	Back func(c net.Conn, read []byte)
	// Tracer follows chunks; nil means that chunks are not traced.
	Tracer Tracer

	Logger *slog.Logger
}

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{
		Heartbeat:    15 * time.Second,
		Reconcile:    2 * time.Second,
		Window:       256 << 10,
		WindowTotal:  256 << 20,
		SnapshotMax:  4 << 20,
		WriteTimeout: 2 * time.Minute,
		Linger:       10 * time.Second,
		Feeds:        20_000,
		Reads:        16,
		Logger:       slog.New(slog.DiscardHandler),
	}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	for _, d := range []struct {
		flag  string
		value time.Duration
		least time.Duration
	}{
		{"-heartbeat", c.Heartbeat, 10 * time.Millisecond},
		{"-reconcile", c.Reconcile, 10 * time.Millisecond},
		{"-write-timeout", c.WriteTimeout, 10 * time.Millisecond},
		{"-linger", c.Linger, 0},
	} {
		if d.value < d.least {
			errs = append(errs, fmt.Errorf("%s: %v is less than %v", d.flag, d.value, d.least))
		}
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"-window", c.Window}, {"-window-total", c.WindowTotal}, {"-snapshot-max", c.SnapshotMax}} {
		if n.value < 0 {
			errs = append(errs, fmt.Errorf("%s: %d bytes is less than nothing", n.flag, n.value))
		}
	}
	if c.Feeds < 0 {
		errs = append(errs, fmt.Errorf("-feeds: %d is less than none: 0 is no limit", c.Feeds))
	}
	return errors.Join(errs...)
}

// interval returns how long a feed goes without reading the log.
func (c Config) interval() time.Duration {
	if c.Kept > 0 {
		return min(c.Reconcile, c.Kept/3)
	}
	return c.Reconcile
}

// Cause names why a response ended. Every response ends for exactly one cause.
type Cause string

const (
	Ended    Cause = "ended"    // the log has ended, and the viewer has all of it
	Done     Cause = "done"     // until=done was met
	Deleted  Cause = "deleted"  // the session was deleted
	Gone     Cause = "gone"     // the client went away
	Slow     Cause = "slow"     // the socket accepted nothing for the write timeout
	Shutdown Cause = "shutdown" // this node drains
	Expired  Cause = "expired"  // the viewer's permission has expired (Ask.Expires)
	Replaced Cause = "replaced" // another connection has replaced it
	Cut      Cause = "cut"      // somebody asked for it, to show that nothing is lost
	Full     Cause = "full"     // there was no room for it
	Outside  Cause = "outside"  // the chunks after the cursor are gone, and Raw and Fold cannot say so
)

// Clean reports whether a response that ended for this cause ends as HTTP ends one. Other responses
// are aborted, because several clients take a clean end for the end of the answer.
func (c Cause) Clean() bool { return c == Ended || c == Done || c == Deleted }
