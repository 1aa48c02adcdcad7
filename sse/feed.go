package sse

import (
	"context"
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"gapless/store"
)

// feed keeps one session's window up to date on this node.
//
// It listens first, and reads the log only after the subscription was acknowledged, so
// that whatever is pushed after the read is announced. A live chunk is taken when it
// is ours (it begins as the append script begins one), its number is the next, and
// nothing is in doubt. It is ignored when it is byte for byte what the window has
// under its number. Everything else is a doubt: another number, a message without one,
// an acknowledged subscription, the time since the last read. Every doubt has the same
// remedy: read the log.
//
// A read begins at the last chunk that the feed has, not behind it, and compares. If
// another chunk stands there, or none, the log was rewritten by a failover or by hand,
// and a new epoch begins: viewers are told by a reset.
//
// A chunk may be announced before it is pushed. When a read does not find what was
// announced, the feed looks again soon (10 ms, then twice as long each time); the
// periodic read finds what is later than that.
type feed struct {
	hub     *Hub
	session string
	window  atomic.Pointer[window] // published by whoever holds mu

	mu      sync.Mutex
	reads   uint64 // reads that have begun
	trust   uint64 // live chunks are taken when the window rests on this read or a later one
	pending bool   // a read is wanted that has not begun
	busy    bool   // a read is queued or under way
	want    int64  // the highest number announced and not yet seen
	suspect int64  // a number under which something else was announced than the window has
	retry   time.Duration
	timer   *time.Timer // runs ask after retry
	readAt  time.Time   // when the last read ended, or the feed began
	viewers int
	idle    time.Time // since when nobody views
	closed  bool
	stop    func() // ends the subscription
	// foreign balances announcements without a number against chunks without one, by the
	// hash of their bytes: above zero it was announced and not seen in the list yet, below
	// it was seen before its announcement came.
	foreign map[uint64]int
}

const firstRetry = 10 * time.Millisecond

func newFeed(h *Hub, session string) *feed {
	f := &feed{hub: h, session: session, trust: 1, readAt: time.Now(), idle: time.Now(), retry: firstRetry}
	f.window.Store(&window{Bounds: store.Bounds{First: 1}, memory: newMemory(1), next: make(chan struct{})})
	f.timer = time.AfterFunc(time.Hour, f.again)
	f.timer.Stop()
	return f
}

// listen subscribes. Until it is acknowledged nothing is read, unless that takes
// longer than the reconcile interval.
func (f *feed) listen() {
	stop := f.hub.data.Listen(f.session, f)
	f.mu.Lock()
	f.stop = stop
	closed := f.closed
	f.mu.Unlock()
	if closed {
		stop()
	}
}

// close lets go of the subscription. The window stays as it is.
func (f *feed) close() {
	f.mu.Lock()
	f.closed = true
	f.timer.Stop()
	stop := f.stop
	f.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// limit is how many bytes of events this feed may keep now.
func (f *feed) limit() int { return int(f.hub.share.Load()) }

// publish replaces the window and wakes whoever waits on the old one. mu is held.
func (f *feed) publish(w *window) {
	close(f.window.Swap(w).next)
}

// Resync implements store.Listener: messages may have been missed.
func (f *feed) Resync() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trust = f.reads + 1
	f.ask()
}

// Live implements store.Listener.
func (f *feed) Live(payload string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	w := f.window.Load()
	seq, ours := store.Number(payload)
	trusted := w.known() && w.read >= f.trust
	switch {
	case payload == store.Hint:
		f.ask()
	case !ours:
		if f.balance(payload, +1) > 0 {
			f.ask()
		}
	case trusted && seq == w.Last+1 && !w.absent() && !w.Ended && !w.Deleted:
		n := w.with(payload, f.limit())
		f.publish(n)
		if n.lastStop == seq { // is it the end? the log says so
			f.ask()
		}
	default:
		known, same := w.holds(seq, payload)
		if same && trusted {
			return
		}
		if known && !same {
			f.suspect = seq
		}
		if trusted && seq > w.Last+1 {
			f.hub.log.LogAttrs(context.Background(), slog.LevelWarn, "gap found, reading the log",
				slog.String("session", f.session), slog.Int64("seq", seq), slog.Int64("last", w.Last))
		}
		f.want = max(f.want, seq)
		f.ask()
	}
}

// balance counts an announcement (+1) or a chunk (-1) without a number. mu is held.
func (f *feed) balance(element string, by int) int {
	if f.foreign == nil {
		f.foreign = map[uint64]int{}
	}
	key := maphash.String(hashSeed, element)
	f.foreign[key] += by
	n := f.foreign[key]
	if n == 0 {
		delete(f.foreign, key)
	}
	if len(f.foreign) > 4096 { // their announcements were lost: forgetting costs a read
		f.foreign = nil
	}
	return n
}

var hashSeed = maphash.MakeSeed()

// owed says whether something was announced that no read has found. mu is held.
func (f *feed) owed(last int64) bool {
	if f.want > last {
		return true
	}
	for _, n := range f.foreign {
		if n > 0 {
			return true
		}
	}
	return false
}

// ask has the log read: soon, and once for all who ask before the read begins. mu is held.
func (f *feed) ask() {
	f.pending = true
	if !f.busy && !f.closed {
		f.busy = true
		f.hub.enqueue(f)
	}
}

// doubt asks for a read, and answers the number that a window must rest on to be
// later than this call.
func (f *feed) doubt() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ask()
	return f.reads + 1
}

func (f *feed) again() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ask()
}

// read is the one repair path. A worker of the hub runs it, for one feed at a time.
func (f *feed) read(ctx context.Context) {
	f.mu.Lock()
	if f.closed {
		f.busy = false
		f.mu.Unlock()
		return
	}
	f.pending = false
	f.timer.Stop()
	f.reads++
	number, w, from := f.reads, f.window.Load(), int64(store.Newest)
	if !w.absent() && w.tip != "" {
		from = w.Last
		if f.suspect >= w.firstSeq() {
			from = min(from, f.suspect)
		}
	}
	f.mu.Unlock()

	page, err := f.fetch(ctx, w, from)

	f.mu.Lock()
	defer f.mu.Unlock()
	f.busy = false
	if f.closed {
		return
	}
	if err != nil {
		if ctx.Err() == nil {
			f.hub.log.LogAttrs(ctx, slog.LevelWarn, "log not read, trying again", slog.String("session", f.session), slog.Any("err", err))
		}
		f.later(max(f.retry, 10*firstRetry))
		return
	}
	f.readAt, f.suspect = time.Now(), 0
	n := f.merge(page, number)
	if n.Last > f.window.Load().Last || n.Epoch != f.window.Load().Epoch {
		f.retry = firstRetry
	}
	f.publish(n)
	switch {
	case f.pending:
		f.ask()
	case !f.owed(n.Last):
		f.retry, f.want = firstRetry, 0
	case f.retry > f.hub.cfg.Reconcile: // whatever was announced, it was not pushed
		f.retry, f.want, f.foreign = firstRetry, 0, nil
	default:
		f.later(f.retry)
	}
}

// later asks again after d, and doubles the next wait, up to the reconcile interval. mu is held.
func (f *feed) later(d time.Duration) {
	f.timer.Reset(jitter(d))
	f.retry = min(2*d, 2*f.hub.cfg.Reconcile)
}

// fetch reads the log from the last chunk of w on. What it answers has w's epoch and
// goes on where w ends, or it is the newest of the log as it now is.
func (f *feed) fetch(ctx context.Context, w *window, from int64) (page store.Page, err error) {
	log, budget := f.hub.data, max(f.limit(), 1)
	if page, err = log.Read(ctx, f.session, from, budget, all); err != nil || from == store.Newest {
		return page, err
	}
	if rewritten(w, page) {
		f.mu.Lock() // nothing live is taken any more, so that last is the highest number given out
		f.trust, f.pending = f.reads+1, true
		last := f.window.Load().Last
		f.mu.Unlock()
		f.hub.log.LogAttrs(ctx, slog.LevelWarn, "the log is not the one that was delivered: a new epoch begins",
			slog.String("session", f.session), slog.String("epoch", w.Epoch), slog.Int64("last", last), slog.Int64("found", page.Last))
		if err = log.Renew(ctx, f.session, w.Epoch, last); err != nil {
			return page, err
		}
	} else if page.Epoch == w.Epoch && page.From <= w.Last+1 && page.Next() > page.Last {
		return page, nil
	}
	return log.Read(ctx, f.session, store.Newest, budget, all)
}

// rewritten says whether page, of w's epoch, shows another log than the one w came
// from: shorter, or with another chunk under a number that w has.
func rewritten(w *window, page store.Page) bool {
	if page.Epoch != w.Epoch || page.Deleted {
		return false // that is said already
	}
	if page.Last < w.Last {
		return true
	}
	for i, element := range page.Elements {
		switch seq := page.From + int64(i); {
		case seq > w.Last:
			return false
		case seq == w.Last:
			return element != w.tip
		default:
			if known, same := w.holds(seq, element); known && !same {
				return true
			}
		}
	}
	return false
}

// merge is the window that follows from the current one and a page. Live chunks may
// have been taken while the page was read, so it may be older than the window. mu is held.
func (f *feed) merge(page store.Page, number uint64) *window {
	w, limit := f.window.Load(), f.limit()
	n := *w
	n.Bounds, n.read, n.next = page.Bounds, number, make(chan struct{})
	n.Last = w.Last
	same := w.known() && page.Epoch == w.Epoch
	goesOn := same && !page.Deleted && page.From <= w.Last+1
	if same {
		n.First = max(n.First, w.First)
	} else if w.known() && f.want > page.Last {
		f.pending, f.want = true, 0 // a number of which log? look once more
	}
	if !goesOn {
		n.memory, n.tip, n.Last = newMemory(page.From), "", page.From-1
	}
	for i, element := range page.Elements {
		seq := page.From + int64(i)
		if seq <= n.Last {
			continue
		}
		n.memory.append(element, limit)
		n.tip, n.Last = element, seq
		if _, ours := store.Number(element); goesOn && !ours {
			f.balance(element, -1)
		}
	}
	n.memory.shrink(limit)
	return &n
}
