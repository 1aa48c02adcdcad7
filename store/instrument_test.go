package store_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"

	"gapless/store"
	"gapless/store/storetest"
)

// who is the context key of a caller.
type who struct{}

// spy sees each command.
type spy struct {
	calls, nobodys atomic.Int64
}

func (s *spy) DialHook(next redis.DialHook) redis.DialHook { return next }

func (s *spy) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (s *spy) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if (cmd.Name() == "eval" || cmd.Name() == "evalsha") && !probes(cmd) {
			s.calls.Add(1)
			if ctx.Value(who{}) == nil {
				s.nobodys.Add(1)
			}
		}
		return next(ctx, cmd)
	}
}

// A hook on the client's commands knows the caller of each command, even of a command that several callers share.
func TestInstrument_knowsWhoseACommandIs(t *testing.T) {
	redisServer, told := storetest.Redis(t), &spy{}
	s := open(t, func(c *store.Config) {
		c.Redis = redisServer.URL()
		c.Instrument = func(client redis.UniversalClient) error { client.AddHook(told); return nil }
	})
	const callers, each = 50, 20
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			ctx := context.WithValue(t.Context(), who{}, i)
			for k := range each {
				if _, err := s.Append(ctx, fmt.Sprint("s", i), store.Batch{Chunks: []store.Chunk{delta(fmt.Sprint(k))}}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if calls := told.calls.Load(); calls == 0 || calls >= callers*each {
		t.Errorf("%d commands: %d appends have not met", calls, callers*each)
	}
	if n := told.nobodys.Load(); n > 0 {
		t.Errorf("%d commands are nobody's", n)
	}
}
