package store

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// pipe has the calls of many callers share the runs of a script (group commit): while one is under way, those
// that come meanwhile wait, and then go together. One that comes alone goes at once. Where half a run waits
// already, a second one is under way beside the first: then the way to Redis is what takes long.
type pipe struct {
	// run runs the script for calls, and leaves with each its reply, or its error.
	run func(ctx context.Context, calls []*call)
	// A run has at most calls calls, and so many bytes: nobody else is served by Redis meanwhile, and it has
	// one time-out.
	calls, bytes int
	patience     time.Duration // how long a call waits for its turn

	mu      sync.Mutex
	waiting []*call
	under   int // runs that are under way
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
	done  chan struct{}
}

// do executes a call, once. It waits for its turn, and no longer than ctx: a call that had none was
// not sent (errUnsent). One that is on its way is waited for: the client's own time-outs bound that.
func (p *pipe) do(ctx context.Context, c *call) ([]any, error) {
	p.mu.Lock()
	if p.under == 0 {
		p.under = 1
		p.mu.Unlock()
		defer p.next()
		p.run(ctx, []*call{c})
		return c.reply, c.err
	}
	c.done, c.ctx = make(chan struct{}), ctx
	p.waiting = append(p.waiting, c)
	if p.under == 1 && len(p.waiting) >= p.calls/2 {
		p.under = 2
		p.begin()
	}
	p.mu.Unlock()
	patience := time.NewTimer(p.patience)
	defer patience.Stop()
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
		return nil, fmt.Errorf("%w: %w", errUnsent, why)
	}
	<-c.done
	return c.reply, c.err
}

// next ends a run, and begins that of those who wait.
func (p *pipe) next() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == 0 {
		p.under--
		return
	}
	p.begin()
}

// begin begins a run of those who have waited longest. mu is held.
func (p *pipe) begin() {
	n, bytes := 0, 0
	for n < len(p.waiting) && n < p.calls && (n == 0 || bytes+p.waiting[n].size <= p.bytes) {
		bytes += p.waiting[n].size
		n++
	}
	calls := slices.Clone(p.waiting[:n])
	p.waiting = slices.Delete(p.waiting, 0, n)
	go func() { // ends within the client's time-outs
		defer p.next()
		p.run(context.WithoutCancel(calls[0].ctx), calls)
		for _, c := range calls {
			close(c.done)
		}
	}()
}
