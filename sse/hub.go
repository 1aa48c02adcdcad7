package sse

import (
	"container/list"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
)

// Hub owns the feeds of a node, the workers that read for them, and the clock that triggers
// reads. A viewer belongs to the caller that asked for it.
type Hub struct {
	cfg  Config
	data Log
	log  *slog.Logger

	ctx  context.Context // ends reads that are under way
	quit context.CancelFunc
	wg   sync.WaitGroup // workers and the clock

	// leaving ends when the hub drains. Each viewer then leaves within spread.
	leaving context.Context
	drain   context.CancelFunc
	spread  time.Duration

	trouble   trouble
	pages     pages
	snapshots snapshots
	gone      departures
	reading   singleflight.Group
	pageReads chan struct{} // one place for each concurrent read of pages

	// mu is locked before a feed's mutex, never after it.
	mu      sync.Mutex
	feeds   map[string]*feed
	idle    list.List // feeds without viewers, the longest idle first
	viewers sync.WaitGroup

	share atomic.Int64 // how many bytes of events one feed may keep now

	metrics *metrics
	census  struct {
		sync.Mutex
		census
	}

	// line holds the feeds that wait for a worker, each once. Its mutex may be locked while a
	// feed's is held.
	line struct {
		sync.Mutex
		feeds   []*feed
		workers int
		closed  bool
	}
}

// NewHub starts the hub's clock. Close stops it.
func NewHub(cfg Config, data Log) *Hub {
	h := &Hub{
		cfg: cfg, data: data, log: cfg.Logger, feeds: map[string]*feed{},
		pageReads: make(chan struct{}, max(cfg.Reads, 1)),
	}
	h.metrics = newMetrics(h)
	h.pages = pages{budget: cfg.WindowTotal / 4, of: map[*feed][]*page{}}
	h.snapshots = snapshots{budget: max(cfg.WindowTotal/8, 2*cfg.SnapshotMax), making: make(chan struct{}, max(cfg.Reads, 1))}
	h.share.Store(int64(cfg.Window))
	h.ctx, h.quit = context.WithCancel(context.Background())
	h.leaving, h.drain = context.WithCancel(context.Background())
	h.wg.Go(h.clock) // ended by Close
	return h
}

// Drain sends the viewers away one by one, spread evenly over the given time, so that they do not
// all arrive at the other nodes at once. It returns when the last has left. New viewers are sent
// away at once.
func (h *Hub) Drain(over time.Duration) {
	h.mu.Lock()
	if h.leaving.Err() == nil {
		h.spread = over
		h.drain()
		for _, f := range h.feeds {
			f.mu.Lock()
			for v := range f.viewers {
				if v.seat != nil {
					time.AfterFunc(rand.N(over+1), func() { v.seat.leave(Shutdown) })
				}
			}
			f.mu.Unlock()
		}
	}
	h.mu.Unlock()
	h.viewers.Wait()
}

// Close drains at once, then stops everything that the hub runs.
func (h *Hub) Close() {
	h.Drain(0)
	h.quit()
	h.gone.close()
	h.line.Lock()
	h.line.closed = true
	h.line.Unlock()
	h.mu.Lock()
	feeds := h.feeds
	h.feeds = nil
	h.mu.Unlock()
	for _, f := range feeds {
		f.close()
	}
	h.wg.Wait()
}

// FeedsMax returns how many logs may be watched at once.
func (h *Hub) FeedsMax() int { return h.cfg.Feeds }

// Viewers returns how many viewers a session has on this node.
func (h *Hub) Viewers(session string) int {
	h.mu.Lock()
	f := h.feeds[session]
	h.mu.Unlock()
	if f == nil {
		return 0
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.viewers)
}

// Viewer returns the viewer of a session with the given connection on this node, or nil.
func (h *Hub) Viewer(session, connection string) *Viewer {
	h.mu.Lock()
	f := h.feeds[session]
	h.mu.Unlock()
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for v := range f.viewers {
		if v.Connection == connection {
			return v
		}
	}
	return nil
}

// divide shares the memory of the node among the feeds. mu is held.
func (h *Hub) divide() {
	h.share.Store(int64(min(h.cfg.Window, (h.cfg.WindowTotal-h.pages.budget-h.cfg.WindowTotal/8)/max(len(h.feeds), 1))))
}

// enter finds or begins the feed of a viewer's session and counts the viewer in. leave counts it
// out. While the hub drains, enter refuses. At the limit of feeds, an idle one makes room. So the
// limit on a caller's viewers also limits the feeds that it takes from others.
func (h *Hub) enter(v *Viewer) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leaving.Err() != nil {
		return ErrDraining
	}
	f := h.feeds[v.Session]
	if f == nil {
		if h.cfg.Feeds > 0 && len(h.feeds) >= h.cfg.Feeds {
			if h.idle.Len() == 0 {
				return ErrFull
			}
			h.drop(h.idle.Front().Value.(*feed))
		}
		f = newFeed(h, v.Session)
		h.feeds[v.Session] = f
		h.divide()
		h.wg.Go(f.listen) // a write to Redis, which may be slow
	}
	h.busy(f)
	f.mu.Lock()
	f.viewers[v] = struct{}{}
	f.mu.Unlock()
	v.feed = f
	h.viewers.Add(1)
	return nil
}

func (h *Hub) leave(v *Viewer) {
	f := v.feed
	h.mu.Lock()
	f.mu.Lock()
	delete(f.viewers, v)
	f.idle = time.Now()
	empty, w := len(f.viewers) == 0, f.window.Load()
	f.mu.Unlock()
	switch {
	case !empty || h.feeds[f.session] != f:
	case !w.known() || w.absent(): // nothing is kept warm for a session that does not exist
		h.drop(f)
	default:
		f.rests = h.idle.PushBack(f)
	}
	h.mu.Unlock()
	h.viewers.Done()
}

// busy removes a feed from the idle ones, if it is one. mu is held.
func (h *Hub) busy(f *feed) {
	if f.rests != nil {
		h.idle.Remove(f.rests)
		f.rests = nil
	}
}

// drop closes a feed without viewers. mu is held.
func (h *Hub) drop(f *feed) {
	h.busy(f)
	delete(h.feeds, f.session)
	h.divide()
	h.wg.Go(f.close) // a write to Redis, which may be slow
}

// limit returns how many bytes of events one feed may keep now.
func (h *Hub) limit() int { return int(h.share.Load()) }

// trouble decides what is logged about reads that fail. Some may fail while others succeed, for
// example at a key of another type. So failures are logged once per troubleEvery at most, and their
// end is logged when none has failed for troubleOver.
type trouble struct {
	told atomic.Bool // it was logged that reads fail

	mu       sync.Mutex
	failed   time.Time // when a read last failed
	saidLast time.Time
	gaps     int // how many gaps were logged since gapsFrom
	gapsFrom time.Time
}

const (
	troubleEvery = 30 * time.Second
	// gapsMost is how many gaps are logged in each troubleEvery. While no announcements arrive,
	// every log has gaps all the time.
	gapsMost    = 4
	troubleOver = 3 * time.Second
)

// gap returns the level for logging a gap. Metrics count all gaps; an operator needs to see a few.
func (t *trouble) gap() slog.Level {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := time.Now(); now.Sub(t.gapsFrom) >= troubleEvery {
		t.gaps, t.gapsFrom = 0, now
	}
	if t.gaps++; t.gaps > gapsMost {
		return slog.LevelDebug
	}
	return slog.LevelWarn
}

// within reports whether a read has failed in the last d.
func (t *trouble) within(d time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.failed.IsZero() && time.Since(t.failed) <= d
}

// found notes the result of a read.
func (h *Hub) found(err error) {
	t := &h.trouble
	if err == nil && !t.told.Load() || err != nil && h.ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	switch {
	case err == nil && t.told.Load() && now.Sub(t.failed) >= troubleOver:
		t.told.Store(false)
		h.log.Info("redis is back")
	case err != nil:
		t.failed = now
		if t.saidLast.IsZero() || now.Sub(t.saidLast) >= troubleEvery {
			t.saidLast = now
			t.told.Store(true)
			h.log.Warn("logs cannot be read, viewers are held", slog.Any("err", err))
		}
	}
}

// enqueue hands f to a worker that reads its log. f.mu is held, and f is not in line.
func (h *Hub) enqueue(f *feed) {
	h.line.Lock()
	defer h.line.Unlock()
	if h.line.closed {
		return
	}
	h.line.feeds = append(h.line.feeds, f)
	if h.line.workers < max(h.cfg.Reads, 1) {
		h.line.workers++
		h.wg.Go(h.work) // ends when the line is empty
	}
}

func (h *Hub) work() {
	for {
		h.line.Lock()
		if len(h.line.feeds) == 0 || h.line.closed {
			h.line.workers--
			h.line.Unlock()
			return
		}
		f := h.line.feeds[0]
		h.line.feeds[0] = nil
		h.line.feeds = h.line.feeds[1:]
		h.line.Unlock()
		f.read(h.ctx)
	}
}

// clock has each feed read its log once per interval, and drops feeds that have been idle for
// Linger.
func (h *Hub) clock() {
	interval := h.cfg.interval()
	every := max(min(interval/8, h.cfg.Heartbeat/4), time.Millisecond)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-h.ctx.Done():
			return
		}
		now := time.Now()
		h.mu.Lock()
		feeds := make([]*feed, 0, len(h.feeds))
		for _, f := range h.feeds {
			feeds = append(feeds, f)
		}
		h.mu.Unlock()
		for _, f := range feeds {
			f.mu.Lock()
			idle := len(f.viewers) == 0 && now.Sub(f.idle) >= h.cfg.Linger
			if !idle && now.Sub(f.readAt) >= interval*3/4 { // ticks and the read itself use up the rest
				f.routine = !f.pending && !f.busy
				f.ask()
			}
			f.mu.Unlock()
			if idle {
				h.forget(f)
			}
			f.folded.idle(now.Add(-h.cfg.Linger), &h.snapshots)
			f.beat(h.cfg.Heartbeat - every)
		}
	}
}

// forget drops a feed, unless a viewer has come in the meantime.
func (h *Hub) forget(f *feed) {
	h.mu.Lock()
	f.mu.Lock()
	idle := len(f.viewers) == 0 && h.feeds[f.session] == f
	f.mu.Unlock()
	if idle {
		h.drop(f)
	}
	h.mu.Unlock()
}

// read reads chunks that are no longer in any window, and returns a *page. Viewers that want the
// same chunks at the same time share one read and its events.
func (h *Hub) read(f *feed, epoch string, from int64, bytes int) <-chan singleflight.Result {
	return h.reading.DoChan(fmt.Sprint(f.session, " ", epoch, " ", from, " ", bytes), func() (any, error) {
		select {
		case h.pageReads <- struct{}{}:
			defer func() { <-h.pageReads }()
		case <-h.ctx.Done():
			return nil, h.ctx.Err()
		}
		h.metrics.reads.WithLabelValues("viewer").Inc()
		p, err := h.data.Read(h.ctx, f.session, from, bytes, all)
		if err != nil {
			return nil, err
		}
		events := &page{Bounds: p.Bounds, memory: newMemory(p.From), feed: f}
		for i := range p.Elements {
			events.appendFirst(p.Elements[i:], all)
		}
		if len(p.Elements) > 0 {
			h.pages.put(events)
			f.mu.Lock()
			closed := f.closed
			f.mu.Unlock()
			if closed { // while it was read
				h.pages.drop(f)
			}
		}
		return events, nil
	})
}

// all asks for as many chunks as the bytes allow.
const all = 1 << 30

func jitter(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2+1) }
