package sse

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
)

// Ask describes what a viewer wants.
type Ask struct {
	Session    string
	Connection string // names this connection in logs, and to the client
	Cursor     int64  // the last number that it has; Latest: the log's current last number
	Epoch      string // the log's epoch a moment ago, if that is known: an older window is not used
	Unknown    bool   // its id was not a number: it begins at the start, with a reset
	UntilDone  bool   // its response ends after the next chunk that ends a message, or with the log
	Raw        bool   // it receives only chunks that were ingested as events, in their original form
	Snapshot   bool   // if it has nothing yet, it receives the existing chunks as one event
	// Expires is when its permission to view expires; zero: never.
	Expires time.Time
	// Fold, if not nil, translates the stream into another protocol. It appends to b what whole
	// events become (Chunks reads them), and reports whether that was the last output. Then the
	// response ends cleanly. Fold is called first without events, for the beginning of the
	// response. It is called last with ended set, when the log has ended. It cannot express a
	// reset: then the response is broken off.
	Fold func(b, events []byte, ended bool) (out []byte, over bool)
}

// Latest is the cursor of a viewer that wants no chunks from before it came.
const Latest = -1

// Viewer is one SSE connection: a cursor over a log. It runs in the goroutine that calls its
// methods, and starts none itself.
type Viewer struct {
	Ask
	hub      *Hub
	feed     *feed
	epoch    string // of the cursor's log; empty: none yet, and the cursor is the one that was asked for
	joined   bool   // the cursor was compared with the log, whose last number
	joinedAt int64  // was joinedAt then
	ticket   uint64 // the read that the window must come from, where that matters (fresh)

	shown atomic.Int64 // the cursor, for metrics; -1: not joined yet
	tally int          // of live writes, some of which are measured

	behind bool      // it has nothing, and must get a snapshot
	noRoom bool      // there was no memory for a snapshot, and it has received no chunks since
	snap   *snapshot // its snapshot, until it is written

	hand      *page     // a page that was read for it, until some of it is taken
	pageBytes int       // the size of the next page
	pageAt    time.Time // when the last page came

	retry time.Duration // how long to wait before the next try, after the feed did not know the log that was read

	raw []byte // Raw or Fold: the output for the last events
	got bool   // Raw: it has received something, now or on an earlier connection
	// early means that a Raw or Fold viewer, which cannot get a reset, came without a cursor and
	// has received nothing yet. It begins at the first chunk that is still kept by then.
	early bool

	pace atomic.Int64 // Slow's pause

	// Its feed's mu guards these: who writes to it, and why it must leave.
	seat    *seat // not nil if its connection was taken over
	writer  *Writer
	leaving Cause
}

// bare reports whether the viewer gets none of our own events.
func (v *Viewer) bare() bool { return v.Raw || v.Fold != nil }

// A page is small at first, because what is read for a viewer that then stalls is wasted. Pages
// grow for a viewer that is quick.
const (
	leastPage = segmentSize
	mostPage  = 64 * segmentSize
	// Each event of a bare viewer's page is decoded, and often nothing is sent, so the viewer would not notice that its
	// client has left. So its pages are smaller, and it checks more often.
	mostBare  = 4 * segmentSize
	quickPage = 250 * time.Millisecond
)

// ErrDraining means that this node takes no more viewers.
var ErrDraining = errors.New("this node is draining")

// ErrFull means that this node watches as many logs as it may (Config.Feeds), and not this one.
var ErrFull = errors.New("this node watches no more logs")

// View begins to view. The caller must call Close. Errors: ErrDraining, ErrFull.
func (h *Hub) View(a Ask) (*Viewer, error) {
	v := &Viewer{Ask: a, hub: h, pageBytes: leastPage, got: a.Cursor > 0}
	v.early = v.bare() && a.Cursor == 0 && !a.Unknown
	v.shown.Store(-1)
	if err := h.enter(v); err != nil {
		return nil, err
	}
	h.metrics.begun.Inc()
	if a.Cursor > 0 {
		h.metrics.resumed.Inc()
	}
	return v, nil
}

// Close leaves the feed.
func (v *Viewer) Close() {
	v.drop()
	v.hub.leave(v)
}

// drop releases the snapshot.
func (v *Viewer) drop() {
	if v.snap != nil {
		v.hub.snapshots.drop(v.snap)
		v.snap = nil
	}
}

// Leave breaks off the viewer's response, even one that has not begun, for a cause outside the log:
// Shutdown, Expired, Replaced or Cut.
func (v *Viewer) Leave(c Cause) {
	v.feed.mu.Lock()
	if v.leaving == "" {
		v.leaving = c
	}
	seat, w := v.seat, v.writer
	v.feed.mu.Unlock()
	switch {
	case seat != nil:
		seat.leave(c)
	case w != nil:
		w.leave(c)
	}
}

// Slow delivers one chunk at a time to the viewer, with a pause after each; 0 means full speed. It
// simulates a slow line: chunks come late, and nothing else changes.
func (v *Viewer) Slow(pause time.Duration) { v.pace.Store(int64(pause)) }

// expire makes the viewer leave when its permission expires, unless stop is called first.
func (v *Viewer) expire() (stop func() bool) {
	if v.Expires.IsZero() {
		return func() bool { return true }
	}
	return time.AfterFunc(time.Until(v.Expires), func() { v.Leave(Expired) }).Stop
}

// farewell returns the last bytes for a viewer before its response is broken off for cause c.
func (v *Viewer) farewell(c Cause) []byte {
	switch {
	case v.bare():
		return nil
	case c == Expired && v.joined:
		return appendNamed(nil, "expired", expired{"expired"}, 0, v.Cursor)
	case c == Expired:
		return appendNamed(nil, "expired", expired{"expired"}, 0, noID)
	case c == Shutdown && !v.joined: // so that it reconnects nevertheless
		return appendRetry(nil, retry())
	}
	return nil
}

// LogValue implements slog.LogValuer.
func (v *Viewer) LogValue() slog.Value {
	return slog.GroupValue(slog.String("session", v.Session), slog.String("connection", v.Connection), slog.Int64("cursor", v.Cursor))
}

// Over waits until the log is known, for at most patience, or longer if the log may have ended at
// the cursor. It returns Ended or Deleted if there is nothing to view and never will be: the cursor
// has all of a log that ended, or the log was deleted. For a Raw viewer it returns Outside if the
// chunks after the cursor are gone. It returns "" if there is something to view or patience runs
// out. Then the caller must call Serve, which counts how the stream ends.
func (v *Viewer) Over(ctx context.Context, patience time.Duration) Cause {
	cause, epoch := v.over(ctx, patience)
	if cause != "" {
		v.epoch = epoch // for Nothing
		v.hub.metrics.ended.WithLabelValues(string(cause)).Inc()
	}
	return cause
}

// Nothing returns the headers of a response without content, after Over has returned Ended or
// Deleted. They name the log's epoch and the cause. A client with another log learns from them that
// it does not have all of this one.
func (v *Viewer) Nothing(c Cause) http.Header { return nothingFollows(v.epoch, c) }

func nothingFollows(epoch string, c Cause) http.Header {
	return http.Header{"Gapless-Epoch": {epoch}, "Gapless-Reason": {string(c)}}
}

func (v *Viewer) over(ctx context.Context, patience time.Duration) (c Cause, epoch string) {
	begun, tick := time.Now(), time.NewTicker(patience)
	defer tick.Stop()
	for {
		w := v.feed.window.Load()
		if w.known() && v.fresh(w) {
			cause, cursor := v.nothing(w)
			if cause == "" && v.Raw {
				reason, to := v.misplaced(w, cursor)
				if reason != "" && !v.early {
					return Outside, w.Epoch
				}
				ctx, cancel := context.WithTimeout(ctx, patience)
				defer cancel()
				if w.Ended && !v.rawFollows(ctx, w, to) {
					return Ended, w.Epoch
				}
			}
			return cause, w.Epoch
		}
		select {
		case <-w.next:
		case <-tick.C:
			if v.feed.window.Load() == w && !v.mayHaveAll(time.Since(begun)) {
				return "", ""
			}
		case <-v.hub.leaving.Done():
			return "", ""
		case <-ctx.Done():
			return "", ""
		}
	}
}

// mayHaveAll reports whether a viewer that has waited this long should wait on, because the log may
// have ended at its cursor. It waits for a slow Redis, not for an unreachable one, and for less
// than a heartbeat interval.
func (v *Viewer) mayHaveAll(waited time.Duration) bool {
	return v.Cursor != 0 && !v.hub.trouble.within(waited) && waited < v.hub.cfg.Heartbeat*3/4
}

// nothing returns why there is nothing to view in w and never will be, or "". w is known and fresh.
func (v *Viewer) nothing(w *window) (cause Cause, cursor int64) {
	if cursor = v.Cursor; cursor == Latest {
		cursor = w.Last
	}
	switch {
	case w.Deleted:
		cause = Deleted
	case w.Ended && !v.Unknown && cursor == w.Last:
		cause = Ended
	}
	return cause, cursor
}

// rawFollows reports whether a chunk that was ingested as an event follows the cursor in a log that
// has ended. If it cannot tell before ctx ends, it returns true.
func (v *Viewer) rawFollows(ctx context.Context, w *window, cursor int64) bool {
	m := &w.memory
	for cursor < w.Last {
		events, last, _, _ := m.after(cursor, w.Last, false)
		if len(events) > 0 {
			if len(appendRaw(nil, events)) > 0 {
				return true
			}
			cursor = last
			continue
		}
		if m = &w.memory; cursor+1 >= m.firstSeq() {
			continue
		}
		select {
		case r := <-v.hub.read(v.feed, w.Epoch, cursor+1, mostPage):
			p, _ := r.Val.(*page)
			if r.Err != nil || p.Epoch != w.Epoch || p.base() > cursor || p.nextSeq() <= cursor+1 {
				return true // the viewer will find out
			}
			m = &p.memory
		case <-ctx.Done():
			return true
		}
	}
	return false
}

// fresh reports whether w can decide about a viewer that has just come. Other nodes may know more.
// The cursor may be one of theirs. An end or a deletion may be over, and a new life begun. The
// epoch in which a cursor before w was given out may be over, too. And the cursor may be the log's
// end, which this node has only heard of. In these cases, the log is read once more first.
func (v *Viewer) fresh(w *window) bool {
	within := v.Cursor <= w.Last && (v.Cursor <= 0 || v.Cursor >= w.base())
	if within && !w.Ended && !w.Deleted && (v.Epoch == "" || v.Epoch == w.Epoch) {
		if v.Cursor != Latest && v.Cursor < w.lastStop || w.lastStop == 0 {
			return true
		}
		switch settled, newest := v.feed.settled(w); {
		case settled:
			return true
		case !newest: // the newer window may decide without a read
			return false
		}
	}
	if v.ticket == 0 {
		v.ticket = v.feed.doubt()
	}
	return w.read >= v.ticket
}

// settled reports whether the log was read up to the last chunk in w that may be its end. A chunk
// that came live only looks like the end until a read confirms it. newest is false if w was
// replaced.
func (f *feed) settled(w *window) (settled, newest bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	newest = f.window.Load() == w
	return newest && f.sure >= w.lastStop, newest
}

// step is what a viewer gets next.
type step struct {
	events []byte
	cursor int64 // the viewer's cursor when the events are written
	chunks bool  // whether the events are chunks
	end    Cause // the response ends after the events, for this cause
	fetch  bool  // the next chunks are no longer in the window
}

// next decides, without waiting, what window w means for this viewer. An empty step means that the
// viewer must wait for the next window.
func (v *Viewer) next(w *window) step {
	if !w.known() {
		return step{}
	}
	var events []byte
	cursor := v.Cursor
	if !v.joined {
		if !v.fresh(w) {
			return step{}
		}
		v.behind = v.Snapshot && cursor == 0
		if cursor == Latest {
			cursor = w.Last
		}
		events = appendNamed(events, "welcome", welcome{
			Type: "welcome", Session: v.Session, Epoch: w.Epoch, First: w.First, Last: w.Last,
			Cursor: cursor, Node: v.hub.cfg.Node, Connection: v.Connection,
		}, retry(), cursor)
		if w.Deleted {
			return step{events: events, cursor: cursor, end: Deleted}
		}
	}
	if v.behind && v.snap != nil && v.snap.fits(w, cursor) {
		return v.fold(w, cursor)
	}
	reason, to := v.misplaced(w, cursor)
	if reason == resetAhead && !v.joined && w.read < v.feed.witness(cursor) {
		return step{}
	}
	switch {
	case reason == "":
	case reason == resetTrimmed && v.behind: // its snapshot may contain what was trimmed, or says where it begins
	case v.early && reason != resetDeleted:
		cursor, v.Cursor = to, to
	case v.Fold != nil, v.Raw && reason != resetDeleted:
		return step{cursor: cursor, end: Outside}
	default:
		v.hub.metrics.resets.WithLabelValues(reason).Inc()
		events = appendReset(events, reason, cursor, to, w.Bounds)
		cursor, v.behind = to, v.Snapshot && !v.noRoom
		if reason == resetDeleted {
			return step{events: events, cursor: cursor, end: Deleted}
		}
	}
	if !v.joined {
		v.joinedAt = w.Last
	}
	v.joined, v.epoch = true, w.Epoch
	v.behind = v.behind && cursor < w.Last
	if len(events) > 0 {
		return step{events: events, cursor: cursor}
	}
	if cursor == w.Last {
		if w.Ended {
			return step{cursor: cursor, end: Ended}
		}
		return step{cursor: cursor}
	}
	if v.behind {
		v.drop()
		return step{cursor: cursor, fetch: true}
	}
	last := w.Last
	if v.pace.Load() > 0 {
		last = cursor + 1
	}
	if s, ok := v.take(&w.memory, cursor, last); ok {
		return s
	}
	p := v.hand
	if v.hand = nil; p == nil || p.Epoch != w.Epoch {
		p = v.hub.pages.find(v.feed, w.Epoch, cursor)
	}
	if p == nil {
		return step{cursor: cursor, fetch: true}
	}
	if to := p.base(); to > cursor && !p.has(cursor) { // trimmed since the feed's last read
		if v.bare() && !v.early {
			return step{cursor: cursor, end: Outside}
		}
		if !v.early {
			v.behind = v.Snapshot && !v.noRoom && to < w.Last
			v.hand = p // by the next read, its beginning may be gone, too
			v.hub.metrics.resets.WithLabelValues(resetTrimmed).Inc()
			return step{cursor: to, events: appendReset(nil, resetTrimmed, cursor, to, p.Bounds)}
		}
		cursor, v.Cursor = to, to
	}
	s, _ := v.take(&p.memory, cursor, last)
	s.fetch = len(s.events) == 0
	return s
}

// fold is next for a viewer that has a snapshot which fits. If the snapshot begins later than the
// viewer wanted, the chunks before it are no longer kept.
func (v *Viewer) fold(w *window, cursor int64) step {
	s := v.snap
	if s.base > cursor {
		v.hub.metrics.resets.WithLabelValues(resetTrimmed).Inc()
		log := w.Bounds
		log.First = s.base + 1
		return step{events: appendReset(nil, resetTrimmed, cursor, s.base, log), cursor: s.base}
	}
	v.behind = false
	given := step{events: s.event, cursor: s.last}
	if s.ends && v.UntilDone {
		given.end = Done
	}
	v.hub.metrics.snapshots.Inc()
	return given
}

// take returns the events after cursor, up to last, that memory has.
func (v *Viewer) take(m *memory, cursor, last int64) (step, bool) {
	events, cursor, stopped, ok := m.after(cursor, last, v.UntilDone)
	s := step{events: events, cursor: cursor, chunks: len(events) > 0}
	v.noRoom = v.noRoom && !s.chunks
	if stopped {
		s.end = Done
	}
	return s, ok
}

// fetch begins to read the page after the cursor, or to fold the log.
func (v *Viewer) fetch(w *window) <-chan singleflight.Result {
	if v.behind {
		return v.hub.fold(v.feed, w.Epoch, v.Cursor, w.Last)
	}
	if time.Since(v.pageAt) < quickPage {
		v.pageBytes = min(2*v.pageBytes, mostPage)
		if v.bare() {
			v.pageBytes = min(v.pageBytes, mostBare)
		}
	} else {
		v.pageBytes = leastPage
	}
	return v.hub.read(v.feed, w.Epoch, v.Cursor+1, v.pageBytes)
}

// fetched takes a page or a snapshot, or returns how long to wait before the next try.
func (v *Viewer) fetched(r singleflight.Result, w *window) (pause time.Duration) {
	if r.Err == errOther {
		return v.unknown()
	}
	v.hub.found(r.Err)
	if r.Err != nil {
		return jitter(awayPause)
	}
	if s, ok := r.Val.(*snapshot); ok {
		v.retry = 0
		if v.drop(); len(s.event) > 0 && v.hub.snapshots.hold(s) {
			v.snap = s
		} else { // there is no memory for it: the chunks say the same
			v.behind, v.noRoom = false, true
		}
		return 0
	}
	p := r.Val.(*page)
	if p.Epoch != w.Epoch || p.base() > w.Last || p.Last <= v.Cursor {
		return v.unknown()
	}
	v.hand, v.pageAt, v.retry = p, time.Now(), 0
	return 0
}

// unknown handles a log that the feed does not know yet. The feed will publish a window for it.
func (v *Viewer) unknown() (pause time.Duration) {
	v.feed.doubt()
	v.retry = min(max(2*v.retry, firstRetry), v.hub.cfg.Reconcile)
	return v.retry
}

// awayPause is how long a viewer waits before it tries again after a failed read of Redis.
const awayPause = 500 * time.Millisecond

// misplaced returns the reason of a reset if window w does not continue the cursor, or "". to is
// where the cursor must go.
func (v *Viewer) misplaced(w *window, cursor int64) (reason string, to int64) {
	start := w.base()
	switch {
	case !v.joined && v.Unknown:
		return resetUnknown, start
	case v.joined && w.Deleted:
		return resetDeleted, w.Last
	case w.absent() && (cursor > 0 || v.epoch != ""):
		return resetAhead, 0
	case v.epoch != "" && v.epoch != w.Epoch,
		!v.joined && v.Cursor > 0 && v.Cursor < w.Former: // numbers below Former were chunks of another log
		return resetEpoch, start
	case cursor > w.Last:
		return resetAhead, start
	case cursor < start:
		return resetTrimmed, start
	}
	return "", cursor
}

// Head is Serve for a viewer that wants only the beginning of its response (HEAD).
func (v *Viewer) Head(to http.ResponseWriter) {
	v.hub.metrics.ended.WithLabelValues(string(Done)).Inc()
	Head(to)
}

// Serve gives the viewer everything there is, and then what comes, until the response must end. It
// returns the cause. ctx is the request's context.
func (v *Viewer) Serve(ctx context.Context, w *Writer) Cause {
	defer context.AfterFunc(v.hub.leaving, func() { time.AfterFunc(rand.N(v.hub.spread+1), func() { w.leave(Shutdown) }) })()
	v.feed.mu.Lock()
	v.writer = w
	leaving := v.leaving
	v.feed.mu.Unlock()
	if leaving != "" {
		w.leave(leaving)
	}
	defer v.expire()()
	var c Cause
	begin := v.begin()
	switch err := w.write(begin); err {
	case nil:
		c = v.serve(ctx, w, nil)
	case errLeft:
		w.last(append(begin, v.farewell(w.why)...))
		c = w.why
	default:
		c = w.cause()
	}
	v.hub.metrics.ended.WithLabelValues(string(c)).Inc()
	return c
}

// begin returns the beginning of a response.
func (v *Viewer) begin() []byte {
	begin := []byte(heartbeat)
	if v.Raw { // a raw stream has no welcome event to carry it
		begin = appendRetry(begin, retry())
	}
	if v.Fold != nil {
		begin, _ = v.Fold(begin, nil, false)
	}
	return begin
}

// serve is Serve after the response's first bytes. When the viewer has everything and wait accepts
// it, serve returns no cause.
func (v *Viewer) serve(ctx context.Context, w *Writer, wait func(*window) bool) Cause {
	beat := time.NewTimer(v.hub.cfg.Heartbeat - time.Since(w.wrote))
	defer beat.Stop()
	var reading <-chan singleflight.Result // the read that is under way
	var pause <-chan time.Time             // before the next read
	var rest <-chan time.Time              // between chunks, for a viewer that is slowed down
	for {
		window := v.feed.window.Load()
		s := v.next(window)
		more := (<-chan struct{})(window.next)
		if len(s.events) > 0 {
			events, over := s.events, false
			if v.Raw {
				v.raw = appendRaw(v.raw[:0], events)
				events = v.raw
				v.got = v.got || len(events) > 0
				v.early = v.early && !v.got
				if s.end == Done && !v.got { // the message that ended had nothing for it
					s.end = ""
				}
			}
			if v.Fold != nil {
				v.raw, over = v.Fold(v.raw[:0], events, false)
				events = v.raw
				v.early = v.early && !s.chunks
			}
			if len(events) > 0 && w.write(events) != nil {
				return v.broken(w)
			}
			v.note(s.chunks, v.Cursor, s.cursor, window)
			v.Cursor = s.cursor
			if over {
				return Done
			}
			if v.Cursor != window.Last || window.Ended {
				more = ready
			}
			if d := v.pace.Load(); d > 0 && s.chunks && s.end == "" {
				more, rest = nil, time.After(time.Duration(d))
			}
		}
		if s.end == Ended && v.Fold != nil {
			events, over := v.Fold(v.raw[:0], nil, true)
			if len(events) > 0 && w.write(events) != nil {
				return v.broken(w)
			}
			if over {
				return Done
			}
		}
		if s.end != "" {
			return s.end
		}
		if s.fetch && reading == nil && pause == nil {
			reading = v.fetch(window)
		}
		if wait != nil && more != ready && reading == nil && pause == nil && rest == nil && wait(window) {
			return ""
		}
		select { // even if more is ready, it soon notices that it must leave
		case <-more:
		case r := <-reading:
			reading = nil
			if d := v.fetched(r, v.feed.window.Load()); d > 0 {
				pause = time.After(d)
			}
		case <-pause:
			pause = nil
		case <-rest:
			rest = nil
		case <-beat.C:
			quiet := time.Since(w.wrote)
			if quiet >= v.hub.cfg.Heartbeat {
				if w.write([]byte(heartbeat)) != nil {
					return v.broken(w)
				}
				quiet = 0
			}
			beat.Reset(v.hub.cfg.Heartbeat - quiet)
		case <-w.left:
			w.last(v.farewell(w.why))
			return w.why
		case <-ctx.Done():
			return Gone
		}
	}
}

// broken returns why a write failed. A viewer that must leave gets its farewell, even while it
// catches up.
func (v *Viewer) broken(w *Writer) Cause {
	if w.err == errLeft {
		w.last(v.farewell(w.why))
	}
	return w.cause()
}

// note counts what was written: the chunks after from, up to to. w is the window that they came
// from, or nil if it is no longer current.
func (v *Viewer) note(chunks bool, from, to int64, w *window) {
	if !v.behind {
		v.drop()
	}
	if chunks {
		v.hub.metrics.delivered.Add(float64(to - from))
		const some = 16
		if v.tally++; v.tally%some == 0 && w != nil && !w.arrived.IsZero() && to == w.Last {
			v.hub.metrics.write.Observe(time.Since(w.arrived).Seconds())
		}
		if v.hub.cfg.Tracer != nil {
			v.told(from, to)
		}
	}
	v.shown.Store(to)
}

// ready stands for a window that is already there.
var ready = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// retry returns after how many ms a client should reconnect. It is random, so that clients do not
// all come at once.
func retry() int { return 1000 + rand.IntN(2000) }
