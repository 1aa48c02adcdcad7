package sse

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"gapless/store"
)

// feed keeps one session's window up to date on this node.
//
// A feed subscribes first and reads the log only after the subscription was acknowledged. So
// whatever is pushed after the read is announced. The feed takes a live chunk that is ours (it
// begins as the append script begins one) and has the next number, while nothing is in doubt. It
// ignores a live chunk that equals, byte for byte, the window's chunk with that number. Everything
// else is a doubt: another number, a message without one, an acknowledged subscription, the time
// since the last read. Every doubt has the same remedy: read the log.
//
// A read begins at the last chunk that the feed has, not after it, and compares. After a lost
// connection, it compares the whole window. If another chunk or none has that number, the log was
// rewritten by a failover or by hand. Then a new epoch begins, and viewers get a reset.
//
// A chunk may be announced before it is pushed. If a read does not find what was announced, the
// feed reads again soon (after 10 ms, then after twice as long each time). The periodic read finds
// chunks that come even later.
type feed struct {
	hub      *Hub
	session  string
	window   atomic.Pointer[window]   // published while mu is held
	followed atomic.Pointer[followed] // published while mu is held, before the window that contains them; nil if chunks are not followed
	folded   folded                   // its mutex is held while the log is read, and is locked before any other
	rests    *list.Element            // position in Hub.idle while the feed has no viewers; guarded by Hub.mu
	row      row                      // its mutex may be held when mu is locked, but not the reverse

	mu      sync.Mutex
	reads   uint64    // reads that have begun
	done    uint64    // the newest read that has been merged
	trust   uint64    // live chunks are taken when this read, or a later one, has been merged
	awaited uint64    // somebody waits for a window from this read, or a later one
	sure    int64     // the window's chunks up to this number were also read
	pending bool      // a read is wanted and has not begun
	busy    bool      // a read is queued or under way
	want    int64     // the highest number that was announced and not yet seen
	short   time.Time // since when the list lacks chunks that were taken live
	suspect int64     // the window is compared from this number, where something else was announced; 0: none
	broken  bool      // the connection to Redis was lost: the whole window is compared
	retry   time.Duration
	timer   *time.Timer // runs ask after retry
	readAt  time.Time   // when the last read ended, or the feed began
	viewers map[*Viewer]struct{}
	idle    time.Time // when the last viewer left
	closed  bool
	stop    func()    // ends the subscription
	begun   time.Time // when the log was first read; zero once a chunk has come live
	routine bool      // the wanted read is only the periodic one
	missed  missed
	// foreign balances announcements without a number against chunks without one, by the hash of
	// their bytes. Above zero, a chunk was announced and not yet seen in the list. Below zero, it
	// was seen before its announcement came.
	foreign map[uint64]int
	// witnessed is the restart of Redis (Log.ReplacedAt) after which a cursor was last believed, and the read that followed.
	witnessed struct {
		at   int64
		read uint64
	}
}

// missed records announcements that did not come. It serves metrics only; delivery does not depend
// on it.
type missed struct {
	gap      bool  // a live chunk has shown that others are missing
	again    bool  // the subscription was renewed: announcements in between were not heard
	from, to int64 // the last routine read found chunks from+1..to, which have not been announced yet
}

// heard notes that chunk seq was announced after it had been read.
func (m *missed) heard(seq int64) {
	if seq > m.from {
		m.from = min(seq, m.to)
	}
}

// found notes what a read has found. It returns how many gaps that shows, and how many gaps it has
// repaired.
func (m *missed) found(w, n *window, want int64, trusted, routine bool) (gaps, repaired int) {
	_, ours := store.Number(n.tip)
	more := w.known() && n.Epoch == w.Epoch && n.Last > w.Last
	if routine && m.from < m.to { // one interval ago, and it is still not announced
		gaps, repaired = 1, 1
	}
	if routine {
		m.from, m.to = 0, 0
	}
	switch {
	case m.gap && n.Last >= want:
		repaired++
	case m.again && more:
		gaps, repaired = gaps+1, repaired+1
	case routine && more && ours && trusted:
		m.from, m.to = w.Last, n.Last
	}
	if m.again = false; n.Last >= want {
		m.gap = false
	}
	return gaps, repaired
}

const firstRetry = 10 * time.Millisecond

func newFeed(h *Hub, session string) *feed {
	f := &feed{hub: h, session: session, viewers: map[*Viewer]struct{}{}, trust: 1, readAt: time.Now(), idle: time.Now(), retry: firstRetry}
	f.window.Store(&window{Bounds: store.Bounds{First: 1}, memory: newMemory(1), next: make(chan struct{})})
	f.timer = time.AfterFunc(time.Hour, f.again)
	f.timer.Stop()
	return f
}

// listen subscribes. Nothing is read until the subscription is acknowledged, unless that takes
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

// close ends the subscription and drops older pages. The window stays as it is.
func (f *feed) close() {
	f.hub.pages.drop(f)
	f.mu.Lock()
	f.closed = true
	f.timer.Stop()
	stop := f.stop
	f.remember()
	f.mu.Unlock()
	f.folded.close(&f.hub.snapshots)
	if stop != nil {
		stop()
	}
}

// remember records in the store what this feed has given out, for feeds that come later. mu is
// held.
func (f *feed) remember() {
	if w := f.window.Load(); w.known() && !w.absent() {
		f.hub.data.Given(f.session, w.Epoch, w.Last)
	}
}

// publish replaces the window and wakes everyone who waits on the old one. mu is held.
func (f *feed) publish(w *window) {
	close(f.window.Swap(w).next)
	f.wake()
}

// Resync implements store.Listener: messages may have been missed.
func (f *feed) Resync() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trust, f.missed.again, f.broken = f.reads+1, f.done > 0, f.done > 0
	for key, n := range f.foreign { // chunks whose announcements may be lost
		if n < 0 {
			delete(f.foreign, key)
		}
	}
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
	trusted := f.done >= f.trust
	switch {
	case payload == store.Hint: // the next chunk may belong to another epoch
		f.trust = f.reads + 1
		f.ask()
	case !ours:
		if f.balance(payload, +1) > 0 {
			f.ask()
		}
	case trusted && seq == w.Last+1 && !w.absent() && !w.Ended && !w.Deleted:
		n := w.with(payload, f.hub.limit())
		f.follow(n, w.Last, true)
		f.publish(n)
		f.hub.metrics.live.Inc()
		if !f.begun.IsZero() {
			f.hub.metrics.firstLive.Observe(n.arrived.Sub(f.begun).Seconds())
			f.begun = time.Time{}
		}
		if n.lastStop == seq { // it may be the log's end: read the log to know
			f.ask()
		}
	default:
		known, same := w.holds(seq, payload)
		if same && trusted {
			f.missed.heard(seq)
			return
		}
		if known && !same {
			f.suspect = seq
		}
		if seq <= w.Last { // neither the next number nor a known chunk: perhaps of another log
			f.trust = f.reads + 1
		}
		if trusted && seq > w.Last+1 && !w.absent() {
			f.hub.log.LogAttrs(context.Background(), f.hub.trouble.gap(), "gap found, reading the log",
				slog.String("session", f.session), slog.Int64("seq", seq), slog.Int64("last", w.Last))
			if !f.missed.gap {
				f.missed.gap = true
				f.hub.metrics.found.Inc()
			}
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
	if len(f.foreign) > 4096 { // their announcements were lost: forgetting them costs a read
		f.foreign = nil
	}
	return n
}

var hashSeed = maphash.MakeSeed()

// owed reports whether something was announced that no read has found. mu is held.
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

// ask requests a read of the log. All requests before the read begins share it. mu is held.
func (f *feed) ask() {
	f.pending = true
	if !f.busy && !f.closed {
		f.busy = true
		f.hub.enqueue(f)
	}
}

// doubt requests a read. It returns the number of the read that a window must come from to be later
// than this call.
func (f *feed) doubt() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ask()
	f.awaited = f.reads + 1
	return f.awaited
}

// witness takes a cursor that is ahead of the log as evidence that Redis has lost chunks, if Redis was restarted or replaced a short time
// ago. Another node may know of these chunks too, and then begin another epoch; this node must begin the same one, or the viewer
// would be reset twice. A client can send any cursor, so one cursor is believed after each restart, at most. witness returns the
// read that the window must come from.
func (f *feed) witness(cursor int64) (read uint64) {
	at := f.hub.data.ReplacedAt()
	if cursor > witnessMost || time.Since(time.UnixMilli(at)) > witnessFor {
		return 0
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.witnessed.at != at {
		f.hub.data.Witness(f.session, cursor)
		f.ask()
		f.awaited = f.reads + 1
		f.witnessed.at, f.witnessed.read = at, f.awaited
	}
	return f.witnessed.read
}

const (
	// witnessFor is how long after a restart a cursor can be evidence. Clients reconnect within some seconds.
	witnessFor = time.Minute
	// witnessMost is the highest cursor that can be evidence. No log is that long, and enough numbers follow it.
	witnessMost = 1_000_000_000_000
)

func (f *feed) again() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ask()
}

// read is the only repair. A worker of the hub runs it, once at a time for each feed.
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
	f.hub.metrics.reads.WithLabelValues("feed").Inc()
	number, w, from := f.reads, f.window.Load(), int64(store.Newest)
	routine := f.routine
	f.routine = false
	if !w.absent() && w.tip != "" {
		from = w.Last
		if f.broken {
			from = min(from, w.firstSeq())
		} else if f.suspect >= w.firstSeq() {
			from = min(from, f.suspect)
		}
	}
	f.broken = false
	f.mu.Unlock()

	page, err := f.fetch(ctx, w, from)

	f.mu.Lock()
	defer f.mu.Unlock()
	f.busy = false
	if f.closed {
		return
	}
	f.readAt = time.Now()
	f.hub.found(err)
	if err != nil {
		f.broken = f.done > 0
		f.later(max(f.retry, 10*firstRetry))
		return
	}
	f.suspect = 0
	w = f.window.Load()
	trusted := f.done >= f.trust
	n := f.merge(w, page, number)
	gaps, repaired := f.missed.found(w, n, f.want, trusted, routine)
	f.hub.metrics.found.Add(float64(gaps))
	f.hub.metrics.repaired.Add(float64(repaired))
	if repaired > 0 {
		f.hub.log.LogAttrs(ctx, f.hub.trouble.gap(), "gap repaired, from the log",
			slog.String("session", f.session), slog.Int64("from", w.Last+1), slog.Int64("last", n.Last))
	}
	if !w.known() {
		f.begun = f.readAt
		f.hub.log.LogAttrs(ctx, slog.LevelInfo, "log is watched", slog.String("session", f.session), slog.String("epoch", n.Epoch),
			slog.Int64("first", n.First), slog.Int64("last", n.Last), slog.Bool("subscribed", trusted || f.trust > 1))
	}
	if n.Last > w.Last || n.Epoch != w.Epoch {
		f.retry = firstRetry
	}
	if w.known() && (w.absent() || n.Epoch == w.Epoch) {
		f.follow(n, w.Last, false)
	} else { // what was there before is not news
		f.followed.Store(nil)
	}
	// Most reads find that nothing was missed, and wake nobody.
	if f.awaited > w.read || !w.known() || !n.sameBounds(w) || n.size != w.size {
		f.publish(n)
	}
	switch {
	case f.pending:
		f.ask()
	case n.Last <= page.Last && !f.owed(n.Last):
		f.retry, f.want = firstRetry, 0
	case f.retry >= f.hub.cfg.Reconcile: // whatever was announced was never pushed
		f.retry, f.want, f.foreign = firstRetry, 0, nil
		f.missed.gap = false // found, and never repaired
	default:
		f.later(f.retry)
	}
}

// later requests a read after d, and doubles the next wait, up to the reconcile interval. mu is
// held.
func (f *feed) later(d time.Duration) {
	f.timer.Reset(jitter(d))
	f.retry = min(2*d, f.hub.cfg.Reconcile)
}

// fetch reads the log from the number from, the last that w has. The page it returns either has w's
// epoch and continues w, or is the newest page of the log as it is now.
func (f *feed) fetch(ctx context.Context, w *window, from int64) (store.Page, error) {
	log, budget := f.hub.data, max(f.hub.limit(), 1)
	for range 100 {
		page, err := log.Read(ctx, f.session, from, budget, all)
		if err != nil {
			return page, err
		}
		epoch, given, another := f.known(w, page)
		switch {
		case another:
			log.Given(f.session, epoch, given)
			// If Redis has nothing of the log, there is nothing to renew: the next read shows where
			// it continues.
			if err := log.Renew(ctx, f.session, epoch, given); err != nil && !errors.Is(err, store.ErrNotFound) {
				return page, err
			}
		case from == store.Newest, page.Epoch == w.Epoch && page.From <= w.Last+1 && page.Next() > page.Last:
			return page, nil
		case page.Epoch == w.Epoch && page.From <= from && page.Next() > from && page.Next() <= w.Last: // more to compare
			from = page.Next()
			continue
		}
		from = store.Newest
	}
	return store.Page{}, fmt.Errorf("log %s becomes another one faster than it can be read", f.session)
}

// known reports whether this feed has given out chunks of another log than the page's, which the
// page's log does not account for. given is the highest of their numbers, and epoch is the one that
// must end.
func (f *feed) known(w *window, page store.Page) (epoch string, given int64, another bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	same := page.Epoch == w.Epoch
	if !same && page.Epoch != "" && !page.Deleted && w.Last > page.Former { // begun by a node that did not know such a number
		return page.Epoch, w.Last, true
	}
	switch differs, short := rewritten(w, f.sure, page); {
	case !same || !differs && !short:
		f.short = time.Time{}
		return "", 0, false
	case !differs && f.short.IsZero():
		f.short = time.Now()
		return "", 0, false
	case !differs && time.Since(f.short) < shortPatience:
		return "", 0, false
	}
	f.short = time.Time{}
	// No more live chunks are taken, so this is the highest number given out.
	f.trust, f.pending = f.reads+1, true
	return w.Epoch, f.window.Load().Last, true
}

// shortPatience is how long a chunk that was taken live may be missing in the list. A producer that
// writes what the append script writes may publish a chunk before it pushes it.
const shortPatience = 300 * time.Millisecond

// rewritten reports whether page, of w's epoch, differs from the log that w came from. It differs
// if it has another chunk under one of w's numbers, or lacks one of those up to sure, which were
// read before. It is short if it lacks only chunks that were taken live.
func rewritten(w *window, sure int64, page store.Page) (differs, short bool) {
	if page.Deleted {
		return false, false // the page says so itself
	}
	if page.Last < w.Last {
		return page.Last < sure, true
	}
	for i, element := range page.Elements {
		switch seq := page.From + int64(i); {
		case seq > w.Last:
			return false, false
		case seq == w.Last:
			return w.tip != "" && element != w.tip, false
		default:
			if known, same := w.holds(seq, element); known && !same {
				return true, false
			}
		}
	}
	return false, false
}

// merge returns the window that follows from the current one and a page. Live chunks may have been
// taken during the read, so the page may be older than the window. mu is held.
func (f *feed) merge(w *window, page store.Page, number uint64) *window {
	n, limit := *w, f.hub.limit()
	n.Bounds, n.read, n.next = page.Bounds, number, make(chan struct{})
	n.Last = w.Last
	f.done, f.sure = number, page.Last
	same := w.known() && page.Epoch == w.Epoch
	goesOn := same && !page.Deleted && page.From <= w.Last+1
	switch {
	case same:
		n.First = max(n.First, w.First)
	case w.known():
		if f.remember(); w.Last > w.Former && !w.Deleted {
			f.hub.metrics.epochs.Inc()
			f.hub.log.LogAttrs(context.Background(), slog.LevelWarn, "the log is not the one that was delivered: another epoch",
				slog.String("session", f.session), slog.String("epoch", w.Epoch), slog.Int64("last", w.Last), slog.Int64("goes_on_after", page.Former))
		}
		if f.want > page.Last { // a number of which log? look once more
			f.pending, f.want, f.missed.gap = true, 0, false
		}
	}
	if !goesOn {
		n.memory, n.tip, n.Last = newMemory(page.From), "", page.From-1
	}
	for i, element := range page.Elements {
		seq := page.From + int64(i)
		if seq <= n.Last {
			continue
		}
		n.memory.appendFirst(page.Elements[i:], limit)
		n.tip, n.Last = element, seq
		if _, ours := store.Number(element); goesOn && !ours {
			f.balance(element, -1)
		}
	}
	n.memory.shrink(limit)
	return &n
}
