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

// fair is a store on a Redis that records how long each of its commands takes.
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

// longest returns the duration of the longest script since the last call.
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

// cpu returns the CPU time of Redis' main thread.
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

// messages returns n chunks, each of its own message.
func messages(from, n int) (all []store.Chunk) {
	for i := range n {
		all = append(all, store.NewChunk(store.TypeDelta, fmt.Sprint("message-", from+i), "assistant", "x"))
	}
	return all
}

// fullBatch is as many chunks as the API takes at once (api.Config.BatchMax).
const fullBatch = 1000 // half as many with numbers

// worst lists the states and calls in which a script has most to do, within the limits.
var worst = []struct {
	name  string
	build func(t testing.TB, s fair)
	call  func(ctx context.Context, s fair) error
}{
	{"a batch of messages", nil, func(ctx context.Context, s fair) error {
		_, err := s.Append(ctx, "s", store.Batch{Chunks: messages(0, fullBatch)})
		return err
	}},
	{"a batch of one message", nil, func(ctx context.Context, s fair) error {
		chunks := messages(0, 1)
		for len(chunks) < fullBatch {
			chunks = append(chunks, chunks[0])
		}
		_, err := s.Append(ctx, "s", store.Batch{Chunks: chunks})
		return err
	}},
	{"a batch with numbers", nil, func(ctx context.Context, s fair) error {
		var chunks []store.Chunk
		for i := range fullBatch / 2 {
			c, err := store.ParseChunk(fmt.Appendf(nil, `{"type":"delta","message_id":"m%d"}`, i), store.Fill{}, 1<<16)
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

// largeLog builds a log of 64 MiB or 100,000 chunks, whichever is less.
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

// warm makes Redis load the scripts and allocate memory.
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

// A run takes one call of each caller before the second call of any caller.
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

// runs returns how many scripts Redis has run.
func (f fair) runs(t testing.TB) (n int) {
	for line := range strings.Lines(f.redis.Info(t.Context(), "commandstats").Val()) {
		calls := 0
		_, _ = fmt.Sscanf(line, "cmdstat_evalsha:calls=%d", &calls)
		n += calls
	}
	return n
}

// calls returns how many scripts Redis runs during what.
func (f fair) calls(t testing.TB, what func()) int {
	before := f.runs(t)
	what()
	return f.runs(t) - before
}

// Work that concerns many messages is done in slices, each by one script, and is complete when the call returns.
func TestFair_muchIsDoneInSlices(t *testing.T) {
	const many, slice = 2000, 250
	ctx := t.Context()
	s := newFair(t, func(c *store.Config) { c.Grace = 100 * time.Millisecond })
	fill := func(id string, lease time.Duration) {
		for i := 0; i < many; i += 500 {
			if _, err := s.Append(ctx, id, store.Batch{Chunks: messages(i, 500), Lease: lease}); err != nil {
				t.Fatal(err)
			}
		}
	}
	inSlices := func(what string, do func()) {
		t.Helper()
		if n := s.calls(t, do); n < many/(4*slice) || n > 6*many/slice {
			t.Errorf("%s: %d scripts", what, n)
		}
	}
	fill("s", 0)
	inSlices("open", func() {
		if _, ids, err := s.Open(ctx, "s"); err != nil || len(ids) != many {
			t.Errorf("%d are open, %v", len(ids), err)
		}
	})
	inSlices("cancel", func() {
		c, err := s.Cancel(ctx, "s", "")
		if err != nil || len(c.Messages) != many || c.First != many+1 || c.Last != 2*many {
			t.Errorf("%d are cancelled, from %d to %d, %v", len(c.Messages), c.First, c.Last, err)
		}
		for i, element := range mustRead(t, s.Store, "s", many+1, lots, lots).Elements {
			if !strings.Contains(element, `"type":"cancelled","message_id":"`+c.Messages[i]+`"`) {
				t.Fatalf("%d: %s is %s", i, c.Messages[i], element)
			}
		}
	})
	if c, err := s.Cancel(ctx, "s", ""); err != nil || len(c.Messages) > 0 {
		t.Errorf("%+v, %v", c, err)
	}

	fill("due", time.Second)
	var b store.Bounds
	due := func() bool {
		return s.redis.Do(ctx, "eval", "local t = redis.call('TIME') return t[1] * 1000 > tonumber(redis.call('HGET', KEYS[1], 'due') or 1e15) and 1 or 0", 1, "chat:session:due").Val() == int64(1)
	}
	for b.Last < 2*many { // asked for a sign of life, then lost: some in the same call, if it takes long
		eventually(t, "leases are due", due)
		inSlices("leases", func() {
			var err error
			if b, err = s.Describe(ctx, "due"); err != nil {
				t.Fatal(err)
			}
		})
	}
	if b.Last != 2*many {
		t.Errorf("the log has %d chunks", b.Last)
	}

	// Half of the entries in the hash are producers, which a deletion keeps.
	fill("gone", 0)
	for i := range many / 20 {
		producer := store.Producer{ID: fmt.Sprint("p", i), Epoch: 3}
		if _, err := s.Append(ctx, "gone", store.Batch{Chunks: []store.Chunk{delta("a")}, Producer: producer}); err != nil {
			t.Fatal(err)
		}
	}
	inSlices("delete", func() {
		if err := s.Delete(ctx, "gone"); err != nil {
			t.Fatal(err)
		}
	})
	for name := range s.redis.HGetAll(ctx, "chat:session:gone").Val() {
		if strings.HasPrefix(name, "m:") || strings.HasPrefix(name, "p:") || name == "sweep" {
			t.Fatalf("%s is left", name)
		}
	}
	again := store.Batch{Chunks: []store.Chunk{delta("a")}, Producer: store.Producer{ID: "p7", Epoch: 3}}
	if _, err := s.Append(ctx, "gone", again); !errors.Is(err, store.ErrSessionDeleted) {
		t.Error(err)
	}
}

// The next call for the session finishes an interrupted deletion before anything else. The new session does not contain
// its messages and producers.
func TestFair_aDeletionIsGoneOnWith(t *testing.T) {
	for name, use := range map[string]func(t *testing.T, s fair){
		"append": func(t *testing.T, s fair) {
			mustAppend(t, s.Store, "s", store.NewChunk(store.TypeDelta, "old-7", "", "x"))
		},
		"push": func(t *testing.T, s fair) {
			s.redis.RPush(t.Context(), "chat:history:s", `{"message_id":"old-7","content":"x"}`)
			eventually(t, "it is a session again", func() bool {
				b, err := s.Describe(t.Context(), "s")
				return err == nil && b.Last > b.Former
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			s := newFair(t, nil)
			mustAppend(t, s.Store, "s", messages(0, 1)...)
			if err := s.Delete(ctx, "s"); err != nil {
				t.Fatal(err)
			}
			var left []any
			for i := range 2000 {
				left = append(left, fmt.Sprint("m:old-", i), "done")
			}
			s.redis.HSet(ctx, "chat:session:s", append(left, "p:q", "5 1 1 1 c 0", "sweep", "0")...)
			if _, err := s.Describe(ctx, "s"); !errors.Is(err, store.ErrNotFound) {
				t.Fatal(err)
			}
			use(t, s)
			_, ids, err := s.Open(ctx, "s")
			if err != nil || !slices.Equal(ids, []string{"old-7"}) {
				t.Errorf("open: %q, %v", ids, err)
			}
			if n := s.redis.HLen(ctx, "chat:session:s").Val(); n > 20 {
				t.Errorf("the hash has %d fields", n)
			}
			if d := s.redis.HGet(ctx, "chat:session:s", "d:q").Val(); d != "5" {
				t.Errorf("the producer that was there is %q", d)
			}
		})
	}
}

// Concurrent calls share runs of a script. Each call completes, however few fit into one run.
func TestFair_aRunEndsInTime(t *testing.T) {
	s := newFair(t, nil)
	var wg sync.WaitGroup
	for k := range 64 {
		wg.Go(func() {
			id := fmt.Sprint("s", k%16)
			if _, err := s.Append(t.Context(), id, store.Batch{Chunks: messages(100*k, 100)}); err != nil {
				t.Error(err)
			}
			if _, err := s.Read(t.Context(), id, 1, 200<<10, lots); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for k := range 16 {
		if p := mustRead(t, s.Store, fmt.Sprint("s", k), 1, lots, lots); len(p.Elements) != 400 {
			t.Errorf("s%d has %d chunks", k, len(p.Elements))
		}
	}
}

// A page is read in slices, and equals the log, whatever the sizes of its chunks.
func TestFair_aPageOfSlices(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		t.Run(order, func(t *testing.T) {
			s := newFair(t, func(c *store.Config) { c.HistoryOrder = order })
			var all []string
			for i := range 300 {
				text := strings.Repeat(string(rune('a'+i%26)), []int{10, 60_000, 3000}[i%3])
				mustAppend(t, s.Store, "s", delta(text), delta("-"))
				all = append(all, text, "-")
			}
			for _, from := range []int64{1, 2, 77, 400, 599, 600} {
				for _, bytes := range []int{1, 100_000, 1 << 20, 3 << 20, lots} {
					for _, count := range []int{1, 20, 1000} {
						p := mustRead(t, s.Store, "s", from, bytes, count)
						size := 0
						for i, element := range p.Elements {
							if size += len(element); !strings.Contains(element, `"content":"`+all[int(from)-1+i]+`"`) {
								t.Fatalf("from %d, %d bytes: another chunk at %d", from, bytes, i)
							}
						}
						n := len(p.Elements)
						if p.From != from || n == 0 || n > count || size > bytes && n > 1 {
							t.Fatalf("from %d, %d bytes, %d chunks: %d chunks from %d, %d bytes", from, bytes, count, n, p.From, size)
						}
						if p.Next() <= p.Last && n < count && size+61_000 < min(bytes, 8<<20) {
							t.Fatalf("from %d, %d bytes, %d chunks: only %d, %d bytes", from, bytes, count, n, size)
						}
					}
				}
			}
		})
	}
}

// BenchmarkFair measures how long one script blocks Redis at most.
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

// A call that had no turn, because its run was over, is first in the next run.
func TestPipe_nobodyIsOvertakenByThoseWhoComeLater(t *testing.T) {
	if order := store.Served(9); fmt.Sprint(order) != "[0 1 2 3 4 5 6 7 8]" {
		t.Error(order)
	}
}
