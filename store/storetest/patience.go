package storetest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Patience is how long a test waits while nothing happens. It does not limit how long a test may take: a slow or busy
// machine takes longer for everything, and only a test that stands still has failed. go test -timeout ends a test that
// never stands still.
const Patience = 2 * time.Minute

var errIdle = errors.New("nothing has happened for " + Patience.String())

// watch holds the time of the last progress of a test and its subtests.
type watch struct{ last atomic.Int64 }

func (w *watch) moved() { w.last.Store(time.Now().UnixNano()) }

func (w *watch) idle() time.Duration { return time.Since(time.Unix(0, w.last.Load())) }

var watches sync.Map // by the name of the test

func watchOf(t testing.TB) *watch {
	name, _, _ := strings.Cut(t.Name(), "/")
	w, _ := watches.LoadOrStore(name, &watch{})
	return w.(*watch)
}

type watchKey struct{}

// Watch returns a context that ends with its parent, or when the test has made no progress for Patience. Progress is a
// call of Moved or MovedIn, and each wait of Eventually that ends.
func Watch(parent context.Context, t testing.TB) (context.Context, context.CancelFunc) {
	w := watchOf(t)
	w.moved()
	ctx, cancel := context.WithCancelCause(context.WithValue(parent, watchKey{}, w))
	go func() { // ends with the context
		for {
			left := Patience - w.idle()
			if left <= 0 {
				cancel(errIdle)
				return
			}
			select {
			case <-time.After(left):
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// Moved records that the test has made progress.
func Moved(t testing.TB) { watchOf(t).moved() }

// MovedIn records progress of the test whose Watch made the context, or a parent of it.
func MovedIn(ctx context.Context) {
	if w, ok := ctx.Value(watchKey{}).(*watch); ok {
		w.moved()
	}
}

// Eventually polls until ok returns true, and fails the test if that takes too long. It counts its polls, not the time,
// because a busy machine polls more slowly, too. Time limits only polls that each take long.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	const pace = 5 * time.Millisecond
	begun := time.Now()
	for polls := 0; !ok(); polls++ {
		if polls > int(Patience/pace) || polls > 0 && time.Since(begun) > 5*Patience {
			t.Fatal("waited in vain: ", what)
		}
		time.Sleep(pace)
	}
	Moved(t)
}
