package api

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"gapless/api/limit"
	"gapless/store"
)

// upload is one producer's way into one log. The producer is a request or the model. The upload appends its chunks one
// batch at a time, in order, and counts what it has stored.
//
// An upload that lasts is watched (begin). It then holds the messages that it has begun, so that they end if it dies
// (store.Hold). It checks regularly, and whenever the session is named on the channel of uploads, whether it may
// continue. If it may not, its context ends with the reason, whatever it is waiting for.
type upload struct {
	api     *API
	session string
	caller  limit.Caller
	token   string // identifies it among the uploads that hold a message
	lease   time.Duration
	// patience is how long it waits for a Redis that is away, in addition to doubtPatience.
	patience time.Duration
	ctx      context.Context
	stop     context.CancelCauseFunc
	// asked is the context of calls to Redis. It outlives the client, so that we always learn what was stored. It
	// carries the client's trace.
	asked context.Context

	mu       sync.Mutex     // allows one append, or one look, at a time
	producer store.Producer // Number is that of the next chunk
	life     int64
	held     []string // messages that it has begun and that have not ended
	watched  bool
	closed   bool      // it no longer needs to look
	heard    time.Time // when Redis last replied
	watch    *time.Timer
	doubtful atomic.Bool // something has happened to the session

	stored Stored
	added  bool // a part of it was not there before
}

// doubtPatience is how long an upload with numbers retries an append that may have been stored.
const doubtPatience = 5 * time.Second

// heldMost is the maximum number of messages that an upload holds. Messages that it begins beyond that do not end when
// it dies.
const heldMost = 64

// newUpload returns an upload for the request whose context is ctx. The caller must call end.
func (a *API) newUpload(ctx context.Context, session string, caller limit.Caller, p store.Producer, lease, patience time.Duration) *upload {
	u := a.newAppend(ctx, session, caller, p, lease)
	u.token, u.patience = strconv.FormatUint(rand.Uint64(), 36), patience
	u.ctx, u.stop = context.WithCancelCause(a.ending)
	return u
}

// newAppend returns an upload that arrived whole, and appends once.
func (a *API) newAppend(ctx context.Context, session string, caller limit.Caller, p store.Producer, lease time.Duration) *upload {
	u := &upload{api: a, session: session, caller: caller, producer: p, lease: lease, ctx: a.ending}
	if u.asked = context.Background(); a.cfg.Tracer != nil {
		u.asked = context.WithoutCancel(ctx)
	}
	u.asked = onBehalf(u.asked, caller)
	return u
}

// begin makes the upload watched from now on.
func (u *upload) begin() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.watched {
		return
	}
	u.watched, u.heard = true, time.Now()
	u.watch = time.AfterFunc(u.api.cfg.Look, u.look) // end stops it and waits for it
	u.api.uploads.add(u)
}

// end releases what begin acquired.
func (u *upload) end() {
	u.stop(nil)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	if u.watched {
		u.watch.Stop()
		u.api.uploads.remove(u)
	}
}

// append appends chunks after those that the upload has stored already.
func (u *upload) append(chunks []store.Chunk, hold store.Hold) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	held := slices.Clone(u.held)
	for _, c := range chunks {
		id := c.MessageID()
		switch i := slices.Index(held, id); {
		case id == "" || hold == store.HoldNone:
		case c.Opens() && i < 0 && len(held) < heldMost:
			held = append(held, id)
		case c.Ends() && i >= 0:
			held = slices.Delete(held, i, i+1)
		}
	}
	done, err := u.send(store.Batch{Chunks: chunks, Hold: hold, Messages: held})
	if err != nil {
		return err
	}
	if hold != store.HoldNone {
		u.held = held
	}
	if hold == store.HoldClosed {
		u.closed = true // a later look would hold its messages again
	}
	for _, c := range chunks {
		u.producer.Number += c.Numbers()
		u.closed = u.closed || c.EndsLog()
	}
	u.note(done)
	size := 0
	for _, c := range chunks {
		size += len(c.Members()) + storedHead
	}
	u.api.limits.Stored.Owe(u.caller, size)
	return nil
}

// storedHead is what Redis stores of a chunk besides its members: about the size of its number and its time.
const storedHead = 48

// mayStore refuses chunks of a caller that has reached its limit of stored bytes. It accepts chunks that only end
// something.
func (u *upload) mayStore(chunks []store.Chunk) error {
	if !slices.ContainsFunc(chunks, func(c store.Chunk) bool { return !c.Ends() && !c.EndsLog() }) {
		return nil
	}
	if over := u.api.limits.Stored.Over(u.caller); over != nil {
		return u.api.limits.Refuse(over)
	}
	return nil
}

// note counts what was stored. mu must be held.
func (u *upload) note(a store.Appended) {
	s := &u.stored
	s.Epoch = a.Epoch
	if a.Count == 0 {
		if s.Count == 0 {
			s.First, s.Last = a.First, a.Last
		}
		return
	}
	if s.Count == 0 {
		s.First = a.First
	} else if a.First != 0 && a.First == s.Last { // known text may now come in other pieces than are stored
		s.Count--
	}
	s.Last = a.Last
	s.Count += a.Count
	u.added = u.added || a.Known < a.Count
}

// send calls Redis, and retries if that is safe: while its patience lasts if certainly nothing was stored, and with
// producer numbers if something may have been stored. mu must be held.
func (u *upload) send(b store.Batch) (store.Appended, error) {
	b.Producer, b.Life, b.Lease, b.Token = u.producer, u.life, u.lease, u.token
	sessions := u.api.limits.Sessions
	var over *limit.Error
	if u.life == 0 {
		if over = sessions.Over(u.caller); over != nil {
			b.Life = store.NoNew
		}
	}
	unknown, patience := false, u.patience
	for begun, pause := time.Now(), 20*time.Millisecond; ; pause = min(2*pause, time.Second) {
		done, err := u.api.logs.Append(u.asked, u.session, b)
		if err == nil {
			u.life, u.heard = done.Life, time.Now()
			u.added = u.added || unknown
			u.trace(done, unknown, begun)
			if done.Made {
				sessions.Owe(u.caller, 1)
			}
			return done, nil
		}
		switch {
		case errors.Is(err, store.ErrNotMade) && over != nil:
			return done, u.api.limits.Refuse(over)
		case errors.As(err, new(*store.HalfDoneError)): // it would fail again
			return done, err
		case errors.Is(err, store.ErrOutcomeUnknown) && u.producer.ID != "":
			unknown, patience = true, max(patience, doubtPatience)
		case !errors.Is(err, store.ErrAway):
			return done, err
		}
		if time.Since(begun) < patience {
			select {
			case <-time.After(pause/2 + rand.N(pause)):
				continue
			case <-u.ctx.Done():
			}
		}
		if unknown && errors.Is(err, store.ErrAway) { // this try certainly stored nothing, but an earlier one may have
			err = store.ErrOutcomeUnknown
		}
		return done, err
	}
}

// trace traces appended chunks. Another append has traced the known ones, unless its reply was lost.
func (u *upload) trace(a store.Appended, unknown bool, begun time.Time) {
	if u.api.cfg.Tracer == nil {
		return
	}
	added := a.Count - a.Known
	if unknown {
		added = a.Count
	}
	if added > 0 && a.Last > 0 { // they are the last ones and consecutive, because one script call added them
		u.api.cfg.Tracer.Appended(u.asked, u.session, a.Epoch, a.Last-int64(added)+1, a.Last, begun)
	}
}

// leave records how an upload ended that did not end properly: its connection broke (HoldBroken), or it got its
// response before its end (HoldLeft).
func (u *upload) leave(how store.Hold) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed || len(u.held) == 0 {
		return
	}
	u.closed = true
	if _, err := u.send(store.Batch{Hold: how, Messages: u.held}); err != nil {
		// The messages' leases end them instead. A Redis that is away or refuses is logged once for all uploads.
		u.api.log.LogAttrs(context.Background(), slog.LevelDebug, "an upload's messages are left to their leases", slog.String("session", u.session), slog.Any("err", err))
	}
}

// look checks whether the upload may continue, unless Redis replied just now.
func (u *upload) look() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed || u.ctx.Err() != nil {
		return
	}
	every := u.api.cfg.Look
	if quiet := time.Since(u.heard); !u.doubtful.Swap(false) && quiet < every {
		u.watch.Reset(every - quiet)
		return
	}
	done, err := u.api.logs.Append(context.Background(), u.session, store.Batch{
		Hold: store.HoldLook, Messages: u.held, Producer: u.producer, Life: u.life, Lease: u.lease, Token: u.token,
	})
	if err == nil {
		u.life, u.heard = done.Life, time.Now()
	} else if !store.Away(err) {
		u.stop(err)
		return
	}
	u.watch.Reset(every)
}

// doubt makes the upload look soon. It may be called after the upload has ended: look checks that.
func (u *upload) doubt(after time.Duration) {
	u.doubtful.Store(true)
	u.watch.Reset(after)
}

// uploads holds the watched uploads. While there are any, it listens for sessions whose uploads must look.
type uploads struct {
	logs Logs
	api  *API

	wire sync.Mutex // held while listening begins and ends
	stop func()

	mu  sync.Mutex
	all map[string]map[*upload]struct{} // by session
}

func (l *uploads) add(u *upload) {
	l.mu.Lock()
	if l.all[u.session] == nil {
		l.all[u.session] = map[*upload]struct{}{}
	}
	l.all[u.session][u] = struct{}{}
	l.mu.Unlock()
	l.listen()
}

func (l *uploads) remove(u *upload) {
	l.mu.Lock()
	if delete(l.all[u.session], u); len(l.all[u.session]) == 0 {
		delete(l.all, u.session)
	}
	l.mu.Unlock()
	l.listen()
}

// listen starts or stops listening, depending on the number of uploads.
func (l *uploads) listen() {
	l.wire.Lock()
	defer l.wire.Unlock()
	l.mu.Lock()
	want := len(l.all) > 0
	l.mu.Unlock()
	switch {
	case want && l.stop == nil:
		l.stop = l.logs.ListenUploads(l)
	case !want && l.stop != nil:
		l.stop()
		l.stop = nil
	}
}

func (l *uploads) count() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, all := range l.all {
		n += len(all)
	}
	return n
}

// Live implements store.Listener: a session is named.
func (l *uploads) Live(session string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for u := range l.all[session] {
		u.doubt(0)
	}
}

// Resync implements store.Listener: names may have been missed. The looks of the uploads are spread over time.
func (l *uploads) Resync() {
	spread := min(l.api.cfg.Look/2, time.Second)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, all := range l.all {
		for u := range all {
			u.doubt(rand.N(spread + 1))
		}
	}
}

// interruption wakes a request that waits for its body. It belongs to one request: after over, the connection belongs
// to another.
type interruption struct {
	ctl   *http.ResponseController
	mu    sync.Mutex
	past  bool
	fired bool
}

func (i *interruption) now() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.past {
		i.fired = true
		_ = i.ctl.SetReadDeadline(time.Now())
	}
}

// over reports whether the request was interrupted. Then its connection must not be kept. If the body ended at that
// moment, the server was reading ahead for the next request. It takes the connection for broken, and would cancel every
// request on it.
func (i *interruption) over() (fired bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.past = true
	return i.fired
}
