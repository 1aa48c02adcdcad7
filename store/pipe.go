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

// pipe has the calls of many callers share the runs of a script (group commit): while one is under way, those
// that come meanwhile wait, and then go together. One that comes alone goes at once. Where half a run waits
// already, a second one is under way beside the first: then the way to Redis is what takes long.
//
// Before a run goes, whoever could go on at that moment goes on first: on a busy node those are other callers, some
// microseconds away from calling. The larger the runs, the less of Redis each call takes.
type pipe struct {
	// run runs the script for calls, and leaves with each its reply, or its error.
	run func(ctx context.Context, calls []*call)
	// A run has at most calls calls, and so many bytes: nobody else is served by Redis meanwhile, and it has
	// one time-out.
	calls, bytes int
	patience     time.Duration // how long a call waits for its turn

	turn *turn // or nil: Redis is in this process

	mu      sync.Mutex
	waiting []*call
	under   int // runs that are under way
	former  int // calls of the last run
}

// call is what one caller wants of a script, and has of it once done is closed.
type call struct {
	session string
	args    []any
	size    int             // bytes, about, of what it sends or wants
	wait    bool            // for the replicas to have it
	ctx     context.Context // of its caller: a run that several share is the first one's, to those who trace

	reply []any
	err   error
	again bool // its run was over before its turn
	done  chan struct{}
}

// do executes a call, once. It waits for its turn, and no longer than ctx: a call that had none was
// not sent (errUnsent). One that is on its way, or leads those that are, is waited for: the client's own time-outs
// bound that.
func (p *pipe) do(ctx context.Context, c *call) ([]any, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", errTurn, ctx.Err())
	}
	c.done, c.ctx = make(chan struct{}), ctx
	p.mu.Lock()
	p.waiting = append(p.waiting, c)
	leads := p.under == 0 // then all who wait came now: it goes with them
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
		<-c.done // another run may have taken it along
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

// timers are stopped ones. Each call that waits needs one.
var timers = sync.Pool{New: func() any {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}}

// lead executes those who have waited longest, and has the next run begin. It ends within the client's time-outs.
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
	defer func() { // also if the run panics
		p.mu.Lock()
		// Those that had no turn are first in the next run: in a crowd somebody would have none for long.
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
	if n > 0 { // nobody may have had the patience
		for _, c := range calls {
			c.err, c.again = errBroken, false // unless the run says something else
		}
		p.run(context.WithoutCancel(calls[0].ctx), calls)
	}
}

// order has callers take turns, where not all can go: of each the first call, then of each the second. mu is held.
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

// gather waits for those who are about to call: while there are many, for as long as each turn brings more.
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

// turn is for letting everybody go on for whom something has come from the network. The runtime looks at its sockets
// all together, and when nobody is left to go on: so who waits for a byte through a pipe goes on when the others can.
// Where somebody is always left, it looks every 10 ms: a turn that is not over soon is given up, and there is none for
// a while.
type turn struct {
	from, to *os.File
	taken    chan struct{} // one for each byte; closed at the end
	began    time.Time
	rest     atomic.Int64 // until when there is none, ns after began; 0: there are
}

const (
	turnMost = 2 * time.Millisecond // some hundred requests are answered in it
	turnRest = 100 * time.Millisecond
)

func newTurn() (*turn, error) {
	from, to, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	t := &turn{from: from, to: to, taken: make(chan struct{}, 16), began: time.Now()}
	go func() { // ends with close
		defer close(t.taken)
		var bytes [16]byte
		for {
			n, err := from.Read(bytes[:])
			for range n {
				select {
				case t.taken <- struct{}{}:
				default: // they were given up
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

// take says whether there was a turn.
func (t *turn) take() bool {
	if rest := t.rest.Load(); rest > 0 {
		if time.Since(t.began) < time.Duration(rest) {
			return false
		}
		if t.rest.CompareAndSwap(rest, 0) {
			for more := true; more; { // what was given up has come since
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
	for range t.taken { // until it is closed
	}
}
