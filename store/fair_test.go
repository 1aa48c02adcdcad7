package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// fair is a store of a Redis that notes how long each of its commands takes.
type fair struct {
	*store.Store
	redis *storetest.Server
}

func newFair(t testing.TB, change func(*store.Config)) fair {
	r := storetest.Redis(t, "--slowlog-log-slower-than", "0", "--slowlog-max-len", "1000000")
	return fair{open(t, func(c *store.Config) {
		c.Redis = r.URL()
		if change != nil {
			change(c)
		}
	}), r}
}

// longest is how long the longest script took since the last call.
func (f fair) longest(t testing.TB) time.Duration {
	all, err := f.redis.SlowLogGet(t.Context(), -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	longest := time.Duration(0)
	for _, one := range all {
		if name := strings.ToLower(one.Args[0]); name == "evalsha" || name == "eval" || name == "lrange" {
			longest = max(longest, one.Duration)
		}
	}
	f.redis.Do(t.Context(), "slowlog", "reset")
	return longest
}

// cpu is how long Redis' main thread has worked.
func (f fair) cpu(t testing.TB) (sum time.Duration) {
	for line := range strings.Lines(f.redis.Info(t.Context(), "cpu").Val()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name == "used_cpu_sys_main_thread" || name == "used_cpu_user_main_thread" {
			d, err := time.ParseDuration(value + "s")
			if err != nil {
				t.Fatal(err)
			}
			sum += d
		}
	}
	return sum
}

// messages are n chunks, each of a message of its own.
func messages(from, n int) (all []store.Chunk) {
	for i := range n {
		all = append(all, store.NewChunk(store.TypeDelta, fmt.Sprint("message-", from+i), "assistant", "x"))
	}
	return all
}

// worst are the states and calls of which a script has most to do, within the limits.
var worst = []struct {
	name  string
	build func(t testing.TB, s fair)
	call  func(ctx context.Context, s fair) error
}{
	{"a batch of messages", nil, func(ctx context.Context, s fair) error {
		_, err := s.Append(ctx, "s", store.Batch{Chunks: messages(0, 1_000)})
		return err
	}},
	{"a batch of one message", nil, func(ctx context.Context, s fair) error {
		chunks := messages(0, 1)
		for len(chunks) < 1_000 {
			chunks = append(chunks, chunks[0])
		}
		_, err := s.Append(ctx, "s", store.Batch{Chunks: chunks})
		return err
	}},
	{"a batch with numbers", nil, func(ctx context.Context, s fair) error {
		var chunks []store.Chunk
		for i := range 1_000 {
			c, err := store.ParseChunk([]byte(fmt.Sprintf(`{"type":"delta","message_id":"m%d"}`, i)), store.Fill{}, 1<<16)
			if i%2 == 0 {
				c, err = store.ParseChunk([]byte(`{"content":"x"}`), store.Fill{MessageID: fmt.Sprint("m", i)}, 1<<16)
			}
			if err != nil {
				return err
			}
			chunks = append(chunks, c)
		}
		_, err := s.Append(ctx, "s", store.Batch{Chunks: chunks, Producer: store.Producer{ID: "p"}})
		return err
	}},
	{"a body of 8 MiB", nil, func(ctx context.Context, s fair) error {
		var chunks []store.Chunk
		for range 128 {
			chunks = append(chunks, delta(strings.Repeat("x", 65_000)))
		}
		_, err := s.Append(ctx, "s", store.Batch{Chunks: chunks})
		return err
	}},
	{"a body of 1 MiB", nil, func(ctx context.Context, s fair) error {
		var chunks []store.Chunk
		for range 16 {
			chunks = append(chunks, delta(strings.Repeat("x", 65_000)))
		}
		_, err := s.Append(ctx, "s", store.Batch{Chunks: chunks})
		return err
	}},
	{"many batches at once", nil, func(ctx context.Context, s fair) error {
		var wg sync.WaitGroup
		var errs [100]error
		for k := range errs {
			wg.Go(func() { _, errs[k] = s.Append(ctx, fmt.Sprint("s", k), store.Batch{Chunks: messages(0, 200)}) })
		}
		wg.Wait()
		return errors.Join(errs[:]...)
	}},
	{"open messages", openMessages(0), func(ctx context.Context, s fair) error {
		_, ids, err := s.Open(ctx, "s")
		if err == nil && len(ids) == 0 {
			err = errors.New("none is open")
		}
		return err
	}},
	{"cancel of all", openMessages(0), func(ctx context.Context, s fair) error {
		c, err := s.Cancel(ctx, "s", "")
		if err == nil && len(c.Messages) != 20_000 {
			err = fmt.Errorf("%d are cancelled", len(c.Messages))
		}
		return err
	}},
	{"leases that are due", func(t testing.TB, s fair) {
		openMessages(time.Second)(t, s)
		time.Sleep(1100 * time.Millisecond)
	}, func(ctx context.Context, s fair) error {
		_, err := s.Describe(ctx, "s")
		return err
	}},
	{"leases that are past", func(t testing.TB, s fair) {
		openMessages(time.Second)(t, s)
		time.Sleep(1100 * time.Millisecond)
		if _, err := s.Describe(t.Context(), "s"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
	}, func(ctx context.Context, s fair) error {
		_, err := s.Describe(ctx, "s")
		return err
	}},
	{"deletion of messages", openMessages(0), func(ctx context.Context, s fair) error { return s.Delete(ctx, "s") }},
	{"deletion of a large log", largeLog(640), func(ctx context.Context, s fair) error { return s.Delete(ctx, "s") }},
	{"deletion of large chunks", largeLog(60_000), func(ctx context.Context, s fair) error { return s.Delete(ctx, "s") }},
	{"pages of a large log", largeLog(640), pages(1000)},
	{"pages of a large log, all", largeLog(640), pages(lots)},
	{"pages of small chunks", largeLog(60), pages(lots)},
	{"pages of small chunks, limited", largeLog(60), pages(1000)},
	{"pages of large chunks", largeLog(60_000), pages(1000)},
	{"a page of a skewed log", func(t testing.TB, s fair) {
		for range 10 { // 15 MB
			mustAppend(t, s.Store, "s", slices.Repeat([]store.Chunk{delta(strings.Repeat("x", 65_000))}, 23)...)
		}
		for range 20 { // 1 MB
			mustAppend(t, s.Store, "s", slices.Repeat([]store.Chunk{delta("")}, 1000)...)
		}
	}, pages(lots)},
	{"newest of small chunks", largeLog(60), newest},
	{"newest of large chunks", largeLog(60_000), newest},
	{"a foreign log", func(t testing.TB, s fair) {
		for i := 0; i < 100_000; i += 1000 {
			var all []any
			for k := range 1000 {
				all = append(all, fmt.Sprintf(`{"message_id":"m%d","content":"word"}`, i+k))
			}
			s.redis.RPush(t.Context(), "chat:history:s", all...)
		}
	}, func(ctx context.Context, s fair) error {
		_, err := s.Describe(ctx, "s")
		return err
	}},
	{"a log that shrinks", largeLog(60), func(ctx context.Context, s fair) error {
		_, err := s.Append(ctx, "s", store.Batch{Chunks: messages(0, 1)})
		return err
	}},
}

func openMessages(lease time.Duration) func(t testing.TB, s fair) {
	return func(t testing.TB, s fair) {
		for i := 0; i < 20_000; i += 500 {
			if _, err := s.Append(t.Context(), "s", store.Batch{Chunks: messages(i, 500), Lease: lease}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// largeLog is 64 MiB, or 100,000 chunks, whatever is less.
func largeLog(size int) func(t testing.TB, s fair) {
	return func(t testing.TB, s fair) {
		chunk := delta(strings.Repeat("x", size))
		for n := min(64<<20/size, 100_000); n > 0; n -= 100 {
			var chunks []store.Chunk
			for range min(n, 100) {
				chunks = append(chunks, chunk)
			}
			mustAppend(t, s.Store, "s", chunks...)
		}
	}
}

func pages(count int) func(ctx context.Context, s fair) error {
	return func(ctx context.Context, s fair) error {
		for _, from := range []int64{1, 500, 50_000} {
			if _, err := s.Read(ctx, "s", from, 4<<20, count); err != nil {
				return err
			}
		}
		return nil
	}
}

func newest(ctx context.Context, s fair) error {
	_, err := s.Read(ctx, "s", store.Newest, 256<<10, lots)
	return err
}

// warm has Redis know the scripts, and have memory.
func warm(t testing.TB, s fair) {
	for range 2 {
		mustAppend(t, s.Store, "warm", messages(0, 1000)...)
		mustAppend(t, s.Store, "warm", slices.Repeat([]store.Chunk{delta(strings.Repeat("x", 60_000))}, 16)...)
	}
	mustRead(t, s.Store, "warm", 1, 1<<20, lots)
	if _, err := s.Cancel(t.Context(), "warm", ""); err != nil {
		t.Fatal(err)
	}
}

// A run takes of each caller one call before it takes another one's second.
func TestPipe_callersTakeTurns(t *testing.T) {
	var waiting []string
	for i := range 200 {
		waiting = append(waiting, fmt.Sprint("flood-", i))
	}
	waiting = append(waiting, "quiet-0")
	if order := store.Order(64, waiting); !slices.Contains(order[:64], "quiet-0") || order[0] != "flood-0" || order[2] != "flood-1" {
		t.Fatalf("%q", order)
	}
}

// BenchmarkFair says how long Redis is kept at most by one script.
func BenchmarkFair(b *testing.B) {
	for _, w := range worst {
		b.Run(w.name, func(b *testing.B) {
			longest, used := time.Hour, time.Hour
			for b.Loop() {
				b.StopTimer()
				s := newFair(b, nil)
				warm(b, s)
				if w.build != nil {
					w.build(b, s)
				}
				s.longest(b)
				cpu := s.cpu(b)
				b.StartTimer()
				if err := w.call(b.Context(), s); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				used = min(used, s.cpu(b)-cpu)
				longest = min(longest, s.longest(b)) // a busy machine makes it longer
				s.redis.Kill()
				b.StartTimer()
			}
			b.ReportMetric(float64(longest.Microseconds())/1000, "ms-of-redis")
			b.ReportMetric(float64(used.Microseconds())/1000, "ms-cpu-of-all")
		})
	}
}
