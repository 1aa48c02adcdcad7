package storetest

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestWatch_lastsWhileSomethingHappensAndEndsWhenNothingDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := Watch(t.Context(), t)
		defer cancel()
		part, stop := context.WithCancel(ctx)
		defer stop()
		for i := range 20 {
			time.Sleep(Patience - time.Second)
			switch i % 3 {
			case 0:
				Moved(t)
			case 1:
				MovedIn(part)
			case 2:
				Eventually(t, "it is so at once", func() bool { return true })
			}
		}
		if ctx.Err() != nil {
			t.Fatal("it has ended, though something happened all the time")
		}
		MovedIn(t.Context()) // of another test
		time.Sleep(Patience)
		synctest.Wait()
		if context.Cause(ctx) != errIdle {
			t.Errorf("it ended by %v", context.Cause(ctx))
		}
	})
}
