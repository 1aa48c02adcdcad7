package store_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

	"gapless/store"
)

// Leases run by Redis's clock, which somebody may set. A live message that gives signs of life survives that, and a
// dead one still ends.
func TestClock_stepsEndNothingThatIsAlive(t *testing.T) {
	t.Parallel()
	redis := miniredis.RunT(t)
	redis.ClockTTL(true)
	s := open(t, func(c *store.Config) { c.Redis, c.Grace = "redis://"+redis.Addr(), 3*time.Second })
	var offset atomic.Int64
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { // ends below
		defer close(done)
		for {
			redis.SetTime(time.Now().Add(time.Duration(offset.Load())))
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	defer func() { close(stop); <-done }()
	alive := batch{Hold: store.HoldLook, Messages: []string{"m"}}
	batch{Hold: store.HoldOpen, Chunks: []store.Chunk{of("m")}}.must(t, s)
	for _, step := range []time.Duration{time.Hour, -2 * time.Hour, 20 * time.Minute, -time.Second, 4500 * time.Millisecond, 0} {
		offset.Add(int64(step))
		for begun := time.Now(); time.Since(begun) < 4500*time.Millisecond; time.Sleep(50 * time.Millisecond) {
			mustRead(t, s, "s", 1, lots, lots) // viewers read, too
			alive.must(t, s)
		}
		batch{Hold: store.HoldOpen, Chunks: []store.Chunk{of("m")}}.must(t, s)
	}
	for _, text := range saying(t, s, "s") {
		if text != "delta m" {
			t.Fatal(text)
		}
	}
	offset.Add(int64(-time.Hour))
	time.Sleep(50 * time.Millisecond)
	alive.must(t, s) // it is dead from here on
	if took := untilLost(t, s); took < 2700*time.Millisecond || took > 30*time.Second {
		t.Errorf("the death was noticed after %v", took)
	}
	ended(t, s, "failed")
}
