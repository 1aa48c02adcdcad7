// Package sse delivers logs to viewers by Server-Sent Events.
//
// A viewer is a cursor over a log and nothing else. There is one question, "what comes
// after my cursor?", and it is answered from the window of the session's feed, or, when
// the cursor is older than the window, from the history list. "History first, then
// live" does not occur, so there is no moment between the two in which a chunk could
// be lost.
//
//	Redis ── Pub/Sub, a hint ──▶ feed ── publishes immutable windows ──▶ viewer ──▶ socket
//	  └───── reads, the truth ───▶┘ └─────────── pages of older chunks ─────▲
//
// A hub has a feed for each session that somebody on this node watches. The feed is
// the only writer of the window: it takes a live chunk when that chunk is certainly the
// next one, and on any doubt reads the log (feed.go). Viewers load the window without a
// lock, and a viewer that has all of it waits for the very window to be replaced
// (window.go). Chunks are encoded when they enter a window, once a node.
//
// Nothing queues for a viewer. A slow one blocks in its own socket write, under a
// deadline that only a socket which takes nothing can reach; by the time it comes back
// it takes all that is new in one piece, or pages through the history if the window has
// moved on. One that has all there is waits without a goroutine, where its connection can
// be taken over from the HTTP server (seat.go).
//
// What cannot be assumed: that a live chunk arrives, or arrives once, or in order; that
// the log in Redis is still the one that was read a moment ago (then there is a new
// epoch, and viewers get a reset); that a response which ends was read to its end.
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

// Log is what delivery needs of the store. Its methods' contracts are store.Store's.
type Log interface {
	Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error)
	Renew(ctx context.Context, session, epoch string, last int64) error
	Given(session, epoch string, last int64)
	Listen(session string, l store.Listener) (stop func())
}

// Config tunes delivery. No value of it changes which chunks a viewer gets.
type Config struct {
	// Node names this node in welcome events.
	Node string
	// Heartbeat is the longest silence on a connection. 15 s is well below the idle
	// time-outs of common proxies, 30 s and more.
	Heartbeat time.Duration
	// Reconcile is how long a feed goes without reading the log. It bounds the delay of
	// a chunk whose every announcement was lost.
	Reconcile time.Duration
	// Kept is how long the store keeps a log after it was read, at least; 0: for ever. A log that is viewed is
	// read three times as often, if that is more often than Reconcile says.
	Kept time.Duration
	// Window is how many bytes of events a feed keeps; WindowTotal bounds all of them.
	Window, WindowTotal int
	// SnapshotMax is how many bytes a snapshot may have (Ask.Snapshot): it says what the beginning of
	// a longer log says. 4 MiB is what some 50,000 words are, a chunk each, with room for tools' data.
	SnapshotMax int
	// WriteTimeout is how long a viewer's socket may take nothing at all. Below a minute: what a viewer that is not there holds
	// is taken from others, and one that was in a tunnel comes back and resumes.
	WriteTimeout time.Duration
	// Linger is how long a feed outlives its last viewer: a reload finds it warm.
	Linger time.Duration
	// Feeds is how many logs are watched at once; 0: no bound. Each is a subscription, and a read
	// of Redis in each reconcile interval: 20,000 of them keep half a Redis busy.
	Feeds int
	// Reads is how many reads of Redis are under way at once, at most, for feeds, and as
	// many for viewers: after a restart of Redis every feed has to read its log.
	Reads int
	// Plain leaves all connections to the HTTP server, also those that could be taken over.
	Plain bool
	// Back takes a connection that was taken over, once its response has ended as HTTP ends one, and what
	// was read behind its request (Returned); nil: it is closed.
	Back func(c net.Conn, read []byte)
	// Tracer follows chunks; nil: nobody does.
	Tracer Tracer

	Logger *slog.Logger
}

// DefaultConfig is what the flags start from.
func DefaultConfig() Config {
	return Config{
		Heartbeat:    15 * time.Second,
		Reconcile:    2 * time.Second,
		Window:       256 << 10,
		WindowTotal:  128 << 20,
		SnapshotMax:  4 << 20,
		WriteTimeout: 45 * time.Second,
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

// interval is how long a feed goes without reading the log.
func (c Config) interval() time.Duration {
	if c.Kept > 0 {
		return min(c.Reconcile, c.Kept/3)
	}
	return c.Reconcile
}

// Cause names why a response ended. Every one ends for exactly one cause.
type Cause string

const (
	Ended    Cause = "ended"    // the log has ended, and the viewer has all of it
	Done     Cause = "done"     // until=done was met
	Deleted  Cause = "deleted"  // the session was deleted
	Gone     Cause = "gone"     // the client went away
	Slow     Cause = "slow"     // the socket took nothing for the write timeout
	Shutdown Cause = "shutdown" // this node drains
	Expired  Cause = "expired"  // what allowed it has run out (Ask.Expires)
	Replaced Cause = "replaced" // another connection has taken its place
	Cut      Cause = "cut"      // it was asked for, to see that nothing is lost by it
	Full     Cause = "full"     // there was no room for it
	Outside  Cause = "outside"  // the log has not what follows the cursor, and Raw and Fold have no way to say so
)

// Clean says whether a response that ended for this cause is ended as HTTP ends one,
// or aborted. Several clients take a clean end for the end of the answer.
func (c Cause) Clean() bool { return c == Ended || c == Done || c == Deleted }
