package limit

import (
	"sync"
	"sync/atomic"
	"time"
)

// Places is how many of something there may be at once: on this node, and of one caller.
type Places struct {
	limits       *Limits
	what, flag   string // the caller's flag is caller-<flag>
	node, caller int    // 0: no bound

	full  atomic.Bool // none are left for anybody: those who are refused by thousands need not wait for one another
	mu    sync.Mutex
	taken int
	of    map[Caller]int // by those that have some
}

// placeAfter is when to ask for a place again. Nobody knows when one is free.
const placeAfter = 5 * time.Second

// Take takes n places for a caller, or none. What is taken is to be given back, once.
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

// Full says, without waiting for anybody, whether none are left: thousands that are refused must not queue for that.
func (p *Places) Full() error {
	if !p.full.Load() {
		return nil
	}
	return p.limits.Refuse(p.nodeError())
}

// Give gives them back.
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

// Taken is how many are taken.
func (p *Places) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

func (p *Places) counts(c Caller) bool { return p.caller > 0 && c != Caller{} }

// over is the bound that n more would pass, if any. mu is held.
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

// Feeds is the error of a viewer whose log would be one more than the node may watch.
func Feeds(most int) *Error {
	return &Error{Limit: "feeds", Most: most, What: "watched logs", After: placeAfter}
}
