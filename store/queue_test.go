package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gapless/store"
)

// Many reads of one caller wait for each other, and the next turn goes to another caller.
func TestQueue_callersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := store.NewQueue(1, time.Minute)
		if err := q.Enter(t.Context(), "first"); err != nil {
			t.Fatal(err)
		}
		var order []string
		for i, caller := range strings.Fields("a a a b a b c") {
			go func() {
				if err := q.Enter(t.Context(), caller); err != nil {
					t.Error(err)
				}
				order = append(order, fmt.Sprint(caller, i))
				q.Leave()
			}()
			synctest.Wait()
		}
		q.Leave()
		synctest.Wait()
		if want := strings.Fields("a0 b3 c6 a1 b5 a2 a4"); !slices.Equal(order, want) {
			t.Fatalf("%q, not %q", order, want)
		}
		if err := q.Enter(t.Context(), "last"); err != nil { // the place is free again
			t.Fatal(err)
		}
	})
}

// A read whose caller has gone takes no turn, and leaves no trace.
func TestQueue_dropsWhatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := store.NewQueue(1, time.Minute)
		gone, leave := context.WithCancel(t.Context())
		_ = q.Enter(t.Context(), "first")
		refused := make(chan error, 3)
		for range 2 {
			go func() { refused <- q.Enter(gone, "a") }()
		}
		synctest.Wait()
		leave()
		synctest.Wait()
		go func() { refused <- q.Enter(t.Context(), "b") }()
		time.Sleep(2 * time.Minute) // of the bubble
		for range 3 {
			if err := <-refused; !errors.Is(store.Classify(err), store.ErrAway) {
				t.Fatal(err)
			}
		}
		if err := q.Enter(gone, "a"); !errors.Is(store.Classify(err), store.ErrAway) {
			t.Fatal(err)
		}
		q.Leave()
		if err := q.Enter(t.Context(), "c"); err != nil {
			t.Fatal(err)
		}
	})
}
