package limit

import (
	"sync"
	"sync/atomic"
	"time"
)

// Places limits how many of something may exist at once: on this node, and for each caller.
type Places struct {
	limits       *Limits
	what, flag   string // the caller's flag is caller-<flag>
	node, caller int    // 0: no limit

	full  atomic.Bool // none are left for any caller: thousands of refused calls need not wait for one another
	mu    sync.Mutex
	taken int
	of    map[Caller]int // by callers that hold some
}

// placeAfter is when to ask for a place again. Nobody knows when one becomes free.
const placeAfter = 5 * time.Second

// Take takes n places for a caller, or none. The caller must give them back, once.
func (p *Places) Take(c Caller, n int) error {
	p.mu.Lock()
	e := p.over(c, n)
	if e == nil {
		p.taken += n
		if p.counts(c) {
			p.of[c] += n
		}
		p.full.Store(p.node > 0 && p.taken == p.node)
	}
	p.mu.Unlock()
	if e != nil {
		return p.limits.Refuse(e)
	}
	return nil
}

// Full returns an error if no places are left. It never blocks, so that thousands that are refused
// do not queue.
func (p *Places) Full() error {
	if !p.full.Load() {
		return nil
	}
	return p.limits.Refuse(p.nodeError())
}

// Give gives n places back.
func (p *Places) Give(c Caller, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken -= n
	p.full.Store(false)
	if !p.counts(c) {
		return
	}
	if p.of[c] -= n; p.of[c] == 0 {
		delete(p.of, c)
	}
	if len(p.of) == 0 { // a map keeps the room that it had at its largest
		p.of = map[Caller]int{}
	}
}

// Taken returns how many places are taken.
func (p *Places) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

func (p *Places) counts(c Caller) bool { return p.caller > 0 && c != Caller{} }

// over returns the limit that n more would exceed, or nil. mu is held.
func (p *Places) over(c Caller, n int) *Error {
	if p.counts(c) && p.of[c]+n > p.caller {
		return &Error{Limit: "caller-" + p.flag, Most: p.caller, What: p.what, Caller: true, After: placeAfter}
	}
	if p.node > 0 && p.taken+n > p.node {
		return p.nodeError()
	}
	return nil
}

func (p *Places) nodeError() *Error {
	return &Error{Limit: p.flag, Most: p.node, What: p.what, After: placeAfter}
}

// Feeds returns the error for a viewer whose log is one more than the node may watch.
func Feeds(most int) *Error {
	return &Error{Limit: "feeds", Most: most, What: "watched logs", After: placeAfter}
}
