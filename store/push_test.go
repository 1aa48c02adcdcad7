package store_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// twin is a store on its own embedded Redis, whose clock the test sets.
type twin struct {
	*store.Store
	redis *miniredis.Miniredis
	heard *miniredis.Subscriber
	news  []string // the published messages
	all   chan struct{}
}

func newTwin(t testing.TB, order string, bytes int) *twin {
	w := &twin{redis: miniredis.NewMiniRedis()}
	if err := w.redis.Start(); err != nil {
		t.Fatal(err)
	}
	cfg := store.DefaultConfig()
	cfg.Timeout = 30 * time.Second // as in open
	cfg.Redis, cfg.HistoryOrder, cfg.HistoryMax, cfg.NamesMax = "redis://"+w.redis.Addr(), order, 6, 3
	if cfg.HistoryBytes = bytes; bytes > 0 {
		cfg.HistoryMax = 100
	}
	var err error
	if w.Store, err = store.Open(cfg); err != nil {
		t.Fatal(err)
	}
	w.heard, w.all = w.redis.NewSubscriber(), make(chan struct{})
	w.heard.Psubscribe("*")
	go func() { // ends with close
		defer close(w.all)
		for m := range w.heard.Pmessages() {
			if m.Channel == "all" {
				w.all <- struct{}{}
			} else {
				w.news = append(w.news, m.Channel+" "+m.Message)
			}
		}
	}()
	return w
}

func (w *twin) close() {
	w.Close()
	w.heard.Close()
	<-w.all
	w.redis.Close()
}

// state returns everything that Redis holds and has published, without the epoch's value.
func (w *twin) state() string {
	var b strings.Builder
	epoch := w.redis.HGet("chat:session:s", "epoch")
	for _, key := range w.redis.Keys() {
		fmt.Fprintf(&b, "%s (%v) ", key, w.redis.TTL(key))
		switch w.redis.Type(key) {
		case "list":
			all, _ := w.redis.List(key)
			fmt.Fprintln(&b, strings.Join(all, "\n  "))
		case "hash":
			names, _ := w.redis.HKeys(key)
			for _, name := range slices.Sorted(slices.Values(names)) {
				value := w.redis.HGet(key, name)
				if name == "epoch" {
					value = "of its own"
				}
				fmt.Fprintf(&b, "\n  %s = %s", name, value)
			}
			fmt.Fprintln(&b)
		case "zset":
			set, _ := w.redis.SortedSet(key)
			for _, name := range slices.Sorted(maps.Keys(set)) {
				fmt.Fprintf(&b, "\n  %s = %v", name, set[name])
			}
			fmt.Fprintln(&b)
		}
	}
	w.redis.Publish("all", "")
	<-w.all
	text := b.String() + strings.Join(w.news, "\n")
	if epoch != "" {
		text = strings.ReplaceAll(text, epoch, "<epoch>")
	}
	return text
}

// push.lua does what append.lua would have done. The same happens to two logs at the same times. Only in the first does
// push.lua do the ordinary appends. Everything is equal: replies, keys, times to live, and published messages.
func TestPush_isWhatTheScriptThatKnowsEveryCaseWouldDo(t *testing.T) {
	ordinary, others := 0, 0
	rapid.Check(t, func(r *rapid.T) {
		order := rapid.SampledFrom([]string{store.OldestFirst, store.NewestFirst}).Draw(r, "order")
		bytes := rapid.SampledFrom([]int{0, 1 << 10}).Draw(r, "bytes") // about fifteen chunks
		a, b := newTwin(t, order, bytes), newTwin(t, order, bytes)
		defer a.close()
		defer b.close()
		a.CountOrdinary(&ordinary, &others)
		b.Thorough()
		ctx, now, life := t.Context(), time.Unix(1_800_000_000, 0), int64(0)
		for step := range rapid.IntRange(1, 60).Draw(r, "steps") {
			passed := rapid.SampledFrom([]time.Duration{0, 0, 0, 0, time.Millisecond, time.Second, time.Second, -time.Second, 3 * time.Second, 24 * time.Second, 40 * time.Second, 25 * time.Hour}).Draw(r, "passed")
			now = now.Add(passed)
			for _, w := range []*twin{a, b} {
				w.redis.SetTime(now)
				w.redis.FastForward(max(passed, 0)) // clocks can be set back, times to live cannot
			}
			what := rapid.SampledFrom([]string{
				"append", "append", "append", "append", "append", "append", "append", "append", "append", "append", "append", "append",
				"upload", "upload", "upload", "upload", "upload", "upload", "upload", "upload", "its end", "lease", "numbers", "cancel", "direct", "only published", "edit", "list lost", "hash lost", "wrong list", "wrong hash", "delete", "end", "read", "made",
			}).Draw(r, "what")
			id := rapid.SampledFrom([]string{"", "", "m", "m", "m", "n", `"\u00e4 b%`}).Draw(r, "message")
			token := rapid.SampledFrom([]string{"t1", "t1", "t2"}).Draw(r, "token")
			lease := rapid.SampledFrom([]time.Duration{0, 0, 0, 0, time.Minute}).Draw(r, "lease")
			var chunks []store.Chunk
			for k := range rapid.IntRange(1, 3).Draw(r, "chunks") {
				chunks = append(chunks, store.NewChunk(store.TypeDelta, id, "", fmt.Sprint(step, ".", k)))
			}
			batch := store.Batch{Chunks: chunks, Life: rapid.SampledFrom([]int64{0, life, store.NoNew}).Draw(r, "life")}
			element := fmt.Sprintf(`{"type":"delta","message_id":"m","content":"%d"}`, step)
			do := func(w *twin) string {
				batch := batch
				const history, session = "chat:history:s", "chat:session:s"
				ended := func(err error) string { return fmt.Sprint(err) }
				switch what {
				case "upload", "its end":
					if batch.Hold, batch.Token = store.HoldOpen, token; what == "its end" {
						batch.Hold, batch.Chunks = store.HoldBroken, nil
					}
					if id != "" {
						batch.Messages = []string{id}
					}
					batch.Lease = lease
				case "lease":
					batch.Lease = max(lease, 10*time.Second)
				case "numbers":
					batch.Producer = store.Producer{ID: "p", Epoch: int64(step)}
				case "cancel":
					_, err := w.Cancel(ctx, "s", "")
					return ended(err)
				case "direct", "only published":
					if what == "direct" {
						if order == store.NewestFirst {
							_, _ = w.redis.Lpush(history, element)
						} else {
							_, _ = w.redis.Push(history, element)
						}
					}
					w.redis.Publish("chat:stream:s", element)
					return ""
				case "edit":
					if all, err := w.redis.List(history); err == nil {
						w.redis.Del(history)
						all[step%len(all)] = element
						_, _ = w.redis.Push(history, all...)
					}
					return ""
				case "list lost":
					w.redis.Del(history)
					return ""
				case "hash lost":
					w.redis.Del(session)
					return ""
				case "wrong list", "wrong hash":
					key := map[string]string{"wrong list": history, "wrong hash": session}[what]
					kept := w.redis.Exists(key)
					if kept {
						return ""
					}
					_ = w.redis.Set(key, "text")
					_, err := w.Append(ctx, "s", batch)
					w.redis.Del(key)
					return ended(err)
				case "delete":
					return ended(w.Delete(ctx, "s"))
				case "end":
					if step%3 > 0 { // nothing can happen after it
						return ""
					}
					batch.Chunks = append(batch.Chunks, store.NewChunk(store.TypeEnd, "", "", ""))
				case "read":
					p, err := w.Read(ctx, "s", 1, lots, lots)
					return fmt.Sprint(p.First, p.Last, p.Ended, p.Elements, err)
				case "made":
					_, _, err := w.Create(ctx, "s")
					return ended(err)
				}
				got, err := w.Append(ctx, "s", batch)
				if got.Life > 0 {
					life = got.Life
				}
				got.Epoch = ""
				return fmt.Sprintf("%+v, %v", got, err)
			}
			x, y := do(a), do(b)
			if x, y = x+"\n"+a.state(), y+"\n"+b.state(); x != y {
				r.Fatalf("step %d, %s: with push.lua:\n%s\nwithout:\n%s", step, what, x, y)
			}
		}
	})
	if t.Logf("%d ordinary appends, %d others", ordinary, others); ordinary == 0 || others == 0 {
		t.Error("one kind was missing")
	}
}

// If too few replicas reply, the appends that push.lua leaves to append.lua are stored all the same, like all others.
func TestPush_whatItLeavesIsStoredAlsoWithoutReplicas(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.WaitReplicas, c.WaitTimeout = r.URL(), 1, 20*time.Millisecond })
	for i, id := range []string{"", "", "m", "m", "n"} { // the first of the log, an ordinary one, the first of a message, …
		_, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDelta, id, "", fmt.Sprint(i))}})
		if !errors.Is(err, store.ErrOutcomeUnknown) || !strings.Contains(err.Error(), "it is stored") {
			t.Errorf("chunk %d: %v", i, err)
		}
		if n := r.LLen(t.Context(), "chat:history:s").Val(); n != int64(i+1) {
			t.Errorf("after chunk %d the log has %d", i, n)
		}
	}
}

// After a run that panics, the next one works as if nothing had happened.
func TestPipe_aRunThatPanicsIsNotTheLast(t *testing.T) {
	r := storetest.Redis(t)
	hook := &panics{}
	s := open(t, func(c *store.Config) {
		c.Redis, c.Instrument = r.URL(), func(client redis.UniversalClient) error { client.AddHook(hook); return nil }
	})
	mustAppend(t, s, "s", delta("a"))
	hook.on.Store(true)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("there was no panic")
			}
		}()
		_, _ = s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("b")}})
	}()
	hook.on.Store(false)
	mustAppend(t, s, "s", delta("c"))
}

// panics is a hook of the client that panics while it is on.
type panics struct{ on atomic.Bool }

func (*panics) DialHook(next redis.DialHook) redis.DialHook { return next }
func (*panics) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
func (p *panics) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if p.on.Load() {
			panic("a mistake in a hook")
		}
		return next(ctx, cmd)
	}
}

// A node whose processors are all busy does not wait for the network poller: a turn that takes long is given up.
func TestPipe_aBusyNodeWaitsForNobody(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	stop := make(chan struct{})
	var busy, callers sync.WaitGroup
	for range 4 * runtime.GOMAXPROCS(0) {
		busy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					for begun := time.Now(); time.Since(begun) < 20*time.Microsecond; {
					}
					runtime.Gosched()
				}
			}
		})
	}
	var givenUp atomic.Bool
	for i := range 16 {
		callers.Go(func() {
			for range 20 {
				mustAppend(t, s, fmt.Sprint("s", i), delta("x"))
				if s.Resting() {
					givenUp.Store(true)
				}
			}
		})
	}
	callers.Wait()
	close(stop)
	busy.Wait()
	if !givenUp.Load() {
		t.Error("no turn was given up")
	}
}
