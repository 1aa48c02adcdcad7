package store_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"gapless/store"
	"gapless/store/storetest"
)

// Twenty calls of Overhear on two sessions, each with its own beginning, share one connection.
func TestOverhear_sharesAConnection(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	pubsub := func() int {
		return strings.Count(redis.Do(t.Context(), "CLIENT", "LIST", "TYPE", "pubsub").String(), "addr=")
	}
	var before int
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	heard := make(chan string, 100)
	for i := range 20 {
		begun := make(chan struct{})
		wg.Go(func() {
			_ = s.Overhear(ctx, fmt.Sprint("s", i%2), func() { close(begun) }, func(payload string) { heard <- payload })
		})
		<-begun
		if i == 0 {
			before = pubsub()
		}
	}
	if now := pubsub(); now != before {
		t.Errorf("%d connections listen, and %d did for the first", now, before)
	}
	redis.Publish(t.Context(), "chat:stream:s0", "sesame")
	for range 10 {
		if got := <-heard; got != "sesame" {
			t.Errorf("%q", got)
		}
	}
	cancel()
	wg.Wait()
	if len(heard) > 0 {
		t.Errorf("another session's heard %q", <-heard)
	}
	storetest.Eventually(t, "nobody is subscribed", func() bool {
		return redis.PubSubNumSub(context.Background(), "chat:stream:s0", "chat:stream:s1").Val()["chat:stream:s0"] == 0
	})
}
