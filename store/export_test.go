package store

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// Appends returns how many appends wait for their turn, and how many runs of append.lua are under way.
func (s *Store) Appends() (waiting, under int) { return s.pipes[scriptAppend].state() }

// Pushes returns the same for push.lua.
func (s *Store) Pushes() (waiting, under int) { return s.pipes[scriptPush].state() }

func (p *pipe) state() (waiting, under int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting), p.under
}

// Thorough makes append.lua do all appends.
func (s *Store) Thorough() { s.thorough = true }

// CountOrdinary counts in n the appends that were ordinary, and in others those that only seemed so.
func (s *Store) CountOrdinary(n, others *int) {
	run := s.pipes[scriptPush].run
	s.pipes[scriptPush].run = func(ctx context.Context, calls []*call) {
		run(ctx, calls)
		for _, c := range calls {
			if c.err == nil && c.reply[0] == other {
				*others++
			} else {
				*n++
			}
		}
	}
}

// Resting reports whether runs do not wait for the network, because a turn timed out.
func (s *Store) Resting() bool { return s.pipes[scriptPush].turn.rest.Load() > 0 }

// FlushAll makes Redis forget everything.
func (s *Store) FlushAll(ctx context.Context) { s.rdb.FlushAll(ctx) }

// Keys returns all keys of Redis.
func (s *Store) Keys(ctx context.Context) []string { return s.rdb.Keys(ctx, "*").Val() }

// Held describes what a node remembers after many sessions.
type Held struct {
	Kept   int
	Newest bool
}

// MemoryHolds makes a memory note n sessions.
func MemoryHolds(n int) Held {
	var m memory
	for i := range n {
		m.note(fmt.Sprint(i), remembered{"e", 1, ""})
	}
	return Held{len(m.newer) + len(m.older), m.get(fmt.Sprint(n-50_000)).last == 1}
}

// RefusalIn returns the code of a Redis error, or an empty string.
func RefusalIn(text string) string { return refusalIn(text) }

// Classify distinguishes "certainly not executed" from "unknown".
func Classify(err error) error { return classify(err) }

// ScriptError returns an error reply of Redis.
func ScriptError(text string) error { return scriptError(text) }

// HintFailed and WritesRefused record what scripts report.
func (s *Store) HintFailed(text string)    { s.hintFailed(text) }
func (s *Store) WritesRefused(text string) { s.writesRefused(text) }

// Scripts returns the texts of all scripts.
func Scripts() string {
	return luaLog + luaRun + luaPush + luaAppend + luaRead + luaSession + luaTicket
}

// Queue is the queue of large reads.
type Queue struct{ *queue }

func NewQueue(places int, patience time.Duration) Queue { return Queue{newQueue(places, patience)} }

func (q Queue) Enter(ctx context.Context, caller string) error { return q.enter(ctx, caller) }
func (q Queue) Leave()                                         { q.leave() }

// Order returns the order in which waiting calls run. Each is named <caller>-<call>, and at most most of them run at
// once.
func Order(most int, names []string) (order []string) {
	p := pipe{calls: most}
	for _, name := range names {
		caller, _, _ := strings.Cut(name, "-")
		p.waiting = append(p.waiting, &call{session: name, ctx: WithCaller(context.Background(), caller)})
	}
	p.order()
	for _, c := range p.waiting {
		order = append(order, c.session)
	}
	return order
}

// Client returns the client of Redis.
func (s *Store) Client() redis.UniversalClient { return s.rdb }

// Order returns Config.HistoryOrder.
func (s *Store) Order() string { return s.cfg.HistoryOrder }

// ForgetAll makes the node remember nothing.
func (s *Store) ForgetAll() {
	s.memory.mu.Lock()
	defer s.memory.mu.Unlock()
	s.memory.newer, s.memory.older = nil, nil
}

// WithClock makes the scripts read the time, in milliseconds, from the key "clock".
func (s *Store) WithClock() {
	const clock = `local redis = (function() local real = redis return {
  pcall = real.pcall, sha1hex = real.sha1hex, error_reply = real.error_reply, call = function(name, ...)
    if name ~= 'TIME' then return real.call(name, ...) end
    local now = tonumber(real.call('GET', 'clock'))
    return { string.format('%.0f', math.floor(now / 1000)), string.format('%.0f', now % 1000 * 1000) }
  end } end)() `
	for i, script := range s.scripts {
		flags, text := "", script.text
		if strings.HasPrefix(text, allowFull) {
			flags, text = allowFull, text[len(allowFull):]
		}
		text = flags + clock + text
		s.scripts[i] = newScript(text)
	}
}

// Served returns the order in which a number of consecutive calls are served if each run has time for only one of them.
func Served(count int) (order []string) {
	begun := make(chan struct{})
	p := pipe{calls: 64, bytes: 1 << 20, patience: time.Hour}
	p.run = func(_ context.Context, calls []*call) {
		<-begun
		order = append(order, calls[0].session)
		calls[0].err = nil
		for _, c := range calls[1:] {
			c.again = true
		}
	}
	var all sync.WaitGroup
	for i := range count {
		all.Go(func() { _, _ = p.do(context.Background(), &call{session: fmt.Sprint(i)}) })
		for came := false; !came; runtime.Gosched() {
			p.mu.Lock()
			came = i == 0 && p.under == 1 && len(p.waiting) == 0 || i > 0 && len(p.waiting) == i
			p.mu.Unlock()
		}
	}
	close(begun)
	all.Wait()
	return order
}

// ReadOnlyFor makes the store believe that its Redis has been read-only for a duration.
func (s *Store) ReadOnlyFor(d time.Duration) {
	s.refusals.mu.Lock()
	defer s.refusals.mu.Unlock()
	if s.refusals.elsewhereSince.IsZero() {
		panic("it has not been read-only")
	}
	s.refusals.elsewhereSince = time.Now().Add(-d)
}
