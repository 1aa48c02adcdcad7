package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// pipe lets many callers share the runs of a script (group commit). While one run is under way, new calls
// wait, and the next run takes them together. A call that comes alone runs at once. If half a run is waiting
// already, a second run starts next to the first: then the network takes most of the time.
//
// Before a run starts, other goroutines that can run do so first. On a busy node those are callers that will call
// within microseconds. The larger the runs, the less of Redis each call takes.
type pipe struct {
	// run runs the script for calls, and stores in each its reply or its error.
	run func(ctx context.Context, calls []*call)
	// A run has at most this many calls and bytes. Redis serves no other client during a run, and the run has
	// a single timeout.
	calls, bytes int
	patience     time.Duration // how long a call waits for its turn

	turn *turn // nil if Redis is in this process

	mu      sync.Mutex
	waiting []*call
	under   int // runs that are under way
	former  int // calls of the last run
}

// call is one caller's use of a script. reply and err are valid once done is closed.
type call struct {
	session string
	args    []any
	size    int             // about how many bytes it sends or wants
	wait    bool            // until the replicas have it
	ctx     context.Context // the caller's; traces attribute a shared run to its first call

	reply []any
	err   error
	again bool // the run ended before it reached this call
	done  chan struct{}
}

// do executes a call once. It waits for its turn, but not after ctx has ended: a call that had no turn was
// not sent (errUnsent). Once a call is in a run, or leads one, do waits for it; the client's timeouts
// limit that.
func (p *pipe) do(ctx context.Context, c *call) ([]any, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", errTurn, ctx.Err())
	}
	c.done, c.ctx = make(chan struct{}), ctx
	p.mu.Lock()
	p.waiting = append(p.waiting, c)
	leads := p.under == 0 // then all waiting calls came just now, and this run takes them
	switch {
	case leads:
		p.under = 1
	case p.under == 1 && len(p.waiting) >= p.calls/2:
		p.under = 2
		go p.lead()
	}
	p.mu.Unlock()
	if leads {
		p.lead()
		<-c.done // another run may have taken the call
		return c.reply, c.err
	}
	patience := timers.Get().(*time.Timer)
	patience.Reset(p.patience)
	defer func() { patience.Stop(); timers.Put(patience) }()
	why := context.DeadlineExceeded
	select {
	case <-c.done:
		return c.reply, c.err
	case <-ctx.Done():
		why = ctx.Err()
	case <-patience.C:
	}
	p.mu.Lock()
	i := slices.Index(p.waiting, c)
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 {
		return nil, fmt.Errorf("%w: %w", errTurn, why)
	}
	<-c.done
	return c.reply, c.err
}

// timers holds stopped timers, one for each call that waits.
var timers = sync.Pool{New: func() any {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}}

// lead runs the calls that have waited longest, and starts the next run. It ends within the client's timeouts.
func (p *pipe) lead() {
	p.gather()
	p.mu.Lock()
	p.order()
	n, bytes := 0, 0
	for n < len(p.waiting) && n < p.calls && (n == 0 || bytes+p.waiting[n].size <= p.bytes) {
		bytes += p.waiting[n].size
		n++
	}
	calls := slices.Clone(p.waiting[:n])
	p.waiting = slices.Delete(p.waiting, 0, n)
	p.former = n
	p.mu.Unlock()
	defer func() { // also if run panics
		p.mu.Lock()
		// Calls that had no turn are first in the next run. Otherwise, in a crowd, a call could wait for long.
		had := func(c *call) bool { return !c.again }
		p.waiting = append(slices.DeleteFunc(slices.Clone(calls), had), p.waiting...)
		calls = slices.DeleteFunc(calls, func(c *call) bool { return c.again })
		if len(p.waiting) > 0 {
			go p.lead()
		} else {
			p.under--
		}
		p.mu.Unlock()
		for _, c := range calls {
			close(c.done)
		}
	}()
	if n > 0 { // all of them may have given up
		for _, c := range calls {
			c.err, c.again = errBroken, false // unless run sets something else
		}
		p.run(context.WithoutCancel(calls[0].ctx), calls)
	}
}

// order lets callers take turns if not all calls fit: first each caller's first call, then each caller's second. p.mu is held.
func (p *pipe) order() {
	if len(p.waiting) <= p.calls {
		return
	}
	nth := make(map[*call]int, len(p.waiting))
	had := map[string]int{}
	for _, c := range p.waiting {
		caller := callerOf(c.ctx, c.session)
		nth[c] = had[caller]
		had[caller]++
	}
	slices.SortStableFunc(p.waiting, func(a, b *call) int { return nth[a] - nth[b] })
}

var errBroken = errors.New("the run of the script broke off")

// gather waits for callers that are about to call. On a busy node it continues for as long as each turn brings more calls.
func (p *pipe) gather() {
	runtime.Gosched()
	p.mu.Lock()
	former, waiting := p.former, len(p.waiting)
	p.mu.Unlock()
	for more := former > 1 && p.turn != nil; more; {
		if !p.turn.take() {
			return
		}
		runtime.Gosched()
		p.mu.Lock()
		more = len(p.waiting) > waiting && len(p.waiting) < p.calls/2
		waiting = len(p.waiting)
		p.mu.Unlock()
	}
}

// A turn ends when the goroutines that received something from the network have run. The runtime polls all its sockets
// together, when no goroutine can run. So a goroutine that waits for a byte from a pipe runs when those goroutines can.
// If some goroutine can always run, the runtime polls only every 10 ms. So a turn that takes too long is given up, and for
// a while there are no turns.
type turn struct {
	from, to *os.File
	taken    chan struct{} // receives one for each byte; closed at the end
	began    time.Time
	rest     atomic.Int64 // no turns until then, in ns after began; 0: turns are possible
}

const (
	turnMost = 2 * time.Millisecond // about a hundred requests are served in it
	turnRest = 100 * time.Millisecond
)

func newTurn() (*turn, error) {
	from, to, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	t := &turn{from: from, to: to, taken: make(chan struct{}, 16), began: time.Now()}
	go func() { // ended by close
		defer close(t.taken)
		var bytes [16]byte
		for {
			n, err := from.Read(bytes[:])
			for range n {
				select {
				case t.taken <- struct{}{}:
				default: // the turns for these bytes were given up
				}
			}
			if err != nil {
				_ = from.Close()
				return
			}
		}
	}()
	return t, nil
}

// take waits for a turn and reports whether there was one.
func (t *turn) take() bool {
	if rest := t.rest.Load(); rest > 0 {
		if time.Since(t.began) < time.Duration(rest) {
			return false
		}
		if t.rest.CompareAndSwap(rest, 0) {
			for more := true; more; { // bytes of turns that were given up have arrived since
				select {
				case _, more = <-t.taken:
				default:
					more = false
				}
			}
		}
	}
	if _, err := t.to.Write([]byte{0}); err != nil {
		return false
	}
	patience := timers.Get().(*time.Timer)
	patience.Reset(turnMost)
	defer func() { patience.Stop(); timers.Put(patience) }()
	select {
	case <-t.taken:
		return true
	case <-patience.C:
		t.rest.Store(int64(time.Since(t.began) + turnRest))
		return false
	}
}

func (t *turn) close() {
	_ = t.to.Close()
	for range t.taken { // until the goroutine has closed it
	}
}
