package store

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// queue admits a few large reads at a time. Callers take turns: between two reads of one caller, the others get a turn.
// A read whose context has ended is not sent.
type queue struct {
	patience time.Duration // the maximum wait for a turn

	mu      sync.Mutex
	free    int // free places
	callers []string
	waiting map[string][]chan struct{} // by caller; each waiting caller is in callers once, in order
}

func newQueue(places int, patience time.Duration) *queue {
	return &queue{patience: patience, free: places, waiting: map[string][]chan struct{}{}}
}

// enter waits for a place. leave returns the place.
func (q *queue) enter(ctx context.Context, caller string) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errTurn, ctx.Err())
	}
	q.mu.Lock()
	if q.free > 0 { // then nobody waits
		q.free--
		q.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	if len(q.waiting[caller]) == 0 {
		q.callers = append(q.callers, caller)
	}
	q.waiting[caller] = append(q.waiting[caller], mine)
	q.mu.Unlock()
	patience := time.NewTimer(q.patience)
	defer patience.Stop()
	why := context.DeadlineExceeded
	select {
	case <-mine:
		return nil
	case <-ctx.Done():
		why = ctx.Err()
	case <-patience.C:
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.waiting[caller], mine)
	if i < 0 { // its turn came at the same moment
		q.pass()
		return fmt.Errorf("%w: %w", errTurn, why)
	}
	if q.waiting[caller] = slices.Delete(q.waiting[caller], i, i+1); len(q.waiting[caller]) == 0 {
		delete(q.waiting, caller)
		q.callers = slices.DeleteFunc(q.callers, func(other string) bool { return other == caller })
	}
	return fmt.Errorf("%w: %w", errTurn, why)
}

// leave returns a place.
func (q *queue) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pass()
}

// pass gives a place to the next caller. mu must be held.
func (q *queue) pass() {
	if len(q.callers) == 0 {
		q.free++
		return
	}
	caller := q.callers[0]
	q.callers = q.callers[1:]
	all := q.waiting[caller]
	close(all[0])
	if all = all[1:]; len(all) == 0 {
		delete(q.waiting, caller)
		return
	}
	q.waiting[caller] = all
	q.callers = append(q.callers, caller)
}

type callerKey struct{}

// WithCaller names the caller of the store's methods. Callers take turns in a queue. The default is the session.
func WithCaller(ctx context.Context, caller string) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// callerOf returns the caller that takes turns with others.
func callerOf(ctx context.Context, session string) string {
	if caller, ok := ctx.Value(callerKey{}).(string); ok {
		return caller
	}
	return session
}
