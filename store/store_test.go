package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open opens a store on a real Redis, or on the embedded one.
func open(t testing.TB, change func(*store.Config)) *store.Store {
	t.Helper()
	cfg := store.DefaultConfig()
	cfg.Timeout = 30 * time.Second // Redis is slow to reply on a busy machine
	if change != nil {
		change(&cfg)
	}
	s, err := store.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// both runs a test on the embedded Redis and on a real one, which must not differ.
func both(t *testing.T, change func(*store.Config), test func(t *testing.T, s *store.Store)) {
	t.Run("embedded", func(t *testing.T) { test(t, open(t, change)) })
	t.Run("redis", func(t *testing.T) {
		r := storetest.Redis(t)
		test(t, open(t, func(c *store.Config) {
			if change != nil {
				change(c)
			}
			c.Redis = r.URL()
		}))
	})
}

func delta(text string) store.Chunk { return store.NewChunk(store.TypeDelta, "", "", text) }

func mustAppend(t testing.TB, s *store.Store, id string, chunks ...store.Chunk) store.Appended {
	t.Helper()
	a, err := s.Append(t.Context(), id, store.Batch{Chunks: chunks})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func mustRead(t testing.TB, s *store.Store, id string, from int64, bytes, count int) store.Page {
	t.Helper()
	p, err := s.Read(t.Context(), id, from, bytes, count)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const lots = 1 << 30

func TestAppend_numbersWithoutHoles(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		a := mustAppend(t, s, "s", delta("a"), delta("b"))
		b := mustAppend(t, s, "s", delta("c"))
		if a.First != 1 || a.Last != 2 || b.First != 3 || b.Last != 3 || a.Epoch == "" || a.Epoch != b.Epoch {
			t.Fatal(a, b)
		}
		p := mustRead(t, s, "s", 2, lots, lots)
		if p.From != 2 || len(p.Elements) != 2 || p.First != 1 || p.Last != 3 || p.Ended || p.CreatedAt.IsZero() || p.UpdatedAt.Before(p.CreatedAt) {
			t.Fatalf("%+v", p)
		}
		if seq, ours := store.Number(p.Elements[1]); seq != 3 || !ours || !strings.HasSuffix(p.Elements[1], `,"type":"delta","content":"c"}`) {
			t.Fatal(p.Elements[1])
		}
	})
}

// Promise: Durable. The numbers of concurrent appends are their places in the list.
func TestAppend_concurrently_eachChunkOnceAtItsNumber(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		const producers, each = 8, 25
		var mu sync.Mutex
		text := map[int64]string{}
		var wg sync.WaitGroup
		for p := range producers {
			wg.Go(func() {
				for i := range each {
					one, two := fmt.Sprint(p, "/", i), fmt.Sprint(p, "/", i, "b")
					a, err := s.Append(context.Background(), "s", store.Batch{Chunks: []store.Chunk{delta(one), delta(two)}})
					if err != nil || a.Last != a.First+1 {
						t.Error(a, err)
						return
					}
					mu.Lock()
					text[a.First], text[a.Last] = one, two
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		p := mustRead(t, s, "s", 1, lots, lots)
		if len(p.Elements) != 2*producers*each {
			t.Fatal(len(p.Elements))
		}
		for i, e := range p.Elements {
			if want := fmt.Sprintf("%q}", text[int64(i+1)]); !strings.HasSuffix(e, want) {
				t.Fatalf("chunk %d is %s, acknowledged was %s", i+1, e, want)
			}
		}
	})
}

func TestAppend_batchLargerThanUnpackTakes(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		var many []store.Chunk
		for i := range 9000 {
			many = append(many, delta(fmt.Sprint(i)))
		}
		if a := mustAppend(t, s, "s", many...); a.First != 1 || a.Last != 9000 {
			t.Fatal(a)
		}
		if p := mustRead(t, s, "s", 8999, lots, lots); len(p.Elements) != 2 || !strings.Contains(p.Elements[1], `"8999"`) {
			t.Fatalf("%+v", p)
		}
	})
}

func TestAppend_allOrNone(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		done := store.NewChunk(store.TypeDone, "m", "", "")
		mustAppend(t, s, "s", delta("a"), done)
		_, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("b"), store.NewChunk(store.TypeDelta, "m", "", "c")}})
		if e, ok := errors.AsType[*store.MessageEndedError](err); !ok || e.MessageID != "m" || e.How != "done" {
			t.Fatal(err)
		}
		if e, ok := errors.AsType[*store.RefusedError](err); !ok || e.Index != 1 {
			t.Fatal(err)
		}
		_, err = s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeFailed, "n", "", ""), store.NewChunk(store.TypeDelta, "n", "", "c")}})
		if e, ok := errors.AsType[*store.MessageEndedError](err); !ok || e.How != "failed" {
			t.Fatal(err)
		}
		_, err = s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeEnd, "", "", ""), delta("behind the end")}})
		if !errors.Is(err, store.ErrSessionEnded) {
			t.Fatal(err)
		}
		if p := mustRead(t, s, "s", 1, lots, lots); p.Last != 2 || p.Ended {
			t.Fatalf("%+v", p)
		}
	})
}

// Promise: Ends.
func TestAppend_end_isAChunkAndTheLast(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		mustAppend(t, s, "s", delta("a"), store.NewChunk(store.TypeEnd, "", "", ""))
		if p := mustRead(t, s, "s", 1, lots, lots); !p.Ended || p.Last != 2 {
			t.Fatalf("%+v", p)
		}
		if _, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("b")}}); !errors.Is(err, store.ErrSessionEnded) {
			t.Fatal(err)
		}
	})
}

func TestAppend_trimsAndSaysSo(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		both(t, func(c *store.Config) { c.HistoryMax, c.HistoryOrder = 5, order }, func(t *testing.T, s *store.Store) {
			for i := range 12 {
				mustAppend(t, s, "s", delta(fmt.Sprint("c", i+1)))
			}
			p := mustRead(t, s, "s", 1, lots, lots)
			if p.First != 8 || p.Last != 12 || p.From != 8 || len(p.Elements) != 5 || !strings.Contains(p.Elements[0], `"c8"`) {
				t.Fatalf("%s: %+v", order, p)
			}
		})
	}
}

// Property: a page contains what was requested, within any limits, from either end.
func TestRead_pagesAreConsecutiveAndWithinTheirBudget(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		both(t, func(c *store.Config) { c.HistoryOrder = order }, func(t *testing.T, s *store.Store) {
			const n = 300
			var all []string
			for i := range n {
				all = append(all, strings.Repeat("x", i%50))
				mustAppend(t, s, "s", delta(all[i]))
			}
			elements := mustRead(t, s, "s", 1, lots, lots).Elements
			rapid.Check(t, func(rt *rapid.T) {
				from := rapid.Int64Range(0, n+5).Draw(rt, "from")
				bytes := rapid.IntRange(0, 40_000).Draw(rt, "bytes")
				count := rapid.IntRange(0, n+5).Draw(rt, "count")
				p, err := s.Read(context.Background(), "s", from, bytes, count)
				if err != nil {
					rt.Fatal(err)
				}
				size := 0
				for i, e := range p.Elements {
					size += len(e)
					if want := elements[p.From+int64(i)-1]; e != want {
						rt.Fatalf("chunk %d is %s, not %s", p.From+int64(i), e, want)
					}
				}
				fits := size <= bytes || len(p.Elements) == 1
				var more int // the size of the next element
				switch {
				case from == store.Newest:
					if p.Next() != n+1 {
						rt.Fatalf("the newest end at %d", p.Next()-1)
					}
					if p.From > 1 {
						more = len(elements[p.From-2])
					}
				case p.Next() <= n:
					more = len(elements[p.Next()-1])
				}
				if from > 0 && p.From != from {
					rt.Fatalf("it begins at %d", p.From)
				}
				if len(p.Elements) > count || !fits || more > 0 && len(p.Elements) < count && size+more <= bytes {
					rt.Fatalf("%d chunks of %d bytes, and the next has %d", len(p.Elements), size, more)
				}
			})
		})
	}
}

// Every read of a log of every length, in either order, works, even if the log ends exactly where a part of the read
// does.
func TestRead_ofEveryLength(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		both(t, func(c *store.Config) { c.HistoryOrder = order }, func(t *testing.T, s *store.Store) {
			for _, n := range []int64{0, 1, 63, 64, 65, 127, 128, 320, 321} {
				id := fmt.Sprint("s", n)
				if _, _, err := s.Create(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				for range n {
					mustAppend(t, s, id, delta("x"))
				}
				for _, from := range []int64{store.Newest, 1, 2, n, n + 1, n + 5} {
					want := max(from, 1)
					if from == store.Newest {
						want = 1
					}
					p := mustRead(t, s, id, from, lots, lots)
					if p.From != want || int64(len(p.Elements)) != max(n+1-want, 0) || p.Last != n {
						t.Errorf("%s, from %d of %d: %d elements from %d on", order, from, n, len(p.Elements), p.From)
					}
				}
			}
		})
	}
}

func TestRead_waitingForASessionMakesNothing(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	if p := mustRead(t, s, "s", store.Newest, lots, lots); p.Epoch != "" || p.Last != 0 || p.First != 1 {
		t.Fatalf("%+v", p)
	}
	if keys := r.Keys(t.Context(), "*").Val(); len(keys) != 0 {
		t.Fatal(keys)
	}
}

// The Redis contract: names, types, bytes, times to live.
func TestContract_keysAndBytes(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); c.HistoryTTL = time.Hour })
	sub := r.Subscribe(t.Context(), "chat:stream:s1")
	defer sub.Close()
	if _, err := sub.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := mustAppend(t, s, "s1", delta("a\u2028\"b\\"))
	list := r.LRange(t.Context(), "chat:history:s1", 0, -1).Val()
	hash := r.HGetAll(t.Context(), "chat:session:s1").Val()
	if len(list) != 1 || hash["epoch"] != a.Epoch || hash["base"] != "0" || hash["last_seen"] != "1" || len(hash["mark"]) != 40 || hash["created_at"] == "" {
		t.Fatal(list, hash)
	}
	if m, err := sub.ReceiveMessage(t.Context()); err != nil || m.Payload != list[0] {
		t.Fatal(m, err)
	}
	if d := r.PTTL(t.Context(), "chat:history:s1").Val(); d < 59*time.Minute || d > time.Hour {
		t.Fatal(d)
	}
	if d := r.PTTL(t.Context(), "chat:session:s1").Val(); d < 29*24*time.Hour {
		t.Fatal(d)
	}
	r.PExpire(t.Context(), "chat:history:s1", time.Minute)
	mustRead(t, s, "s1", 1, 0, 0)
	if d := r.PTTL(t.Context(), "chat:history:s1").Val(); d < 59*time.Minute {
		t.Fatal("a read does not refresh the time to live", d)
	}
}

// The hash outlives the list, however long the list is kept. If the hash of an ended log were gone first, the log would
// be open again, and its numbers would restart.
func TestContract_theHashOutlivesTheList(t *testing.T) {
	for name, url := range map[string]string{"redis": storetest.Redis(t).URL(), "miniredis": "redis://" + miniredis.RunT(t).Addr()} {
		opt, err := redis.ParseURL(url)
		if err != nil {
			t.Fatal(err)
		}
		r := redis.NewClient(opt)
		defer r.Close()
		for _, ttl := range []time.Duration{time.Minute, 24 * time.Hour, 30 * 24 * time.Hour, 31 * 24 * time.Hour, 8760 * time.Hour, 876_000 * time.Hour} {
			s := open(t, func(c *store.Config) { c.Redis, c.HistoryTTL = url, ttl })
			id := fmt.Sprint(name, ttl)
			for _, c := range []struct {
				what string
				use  func()
			}{
				{"made", func() { mustAppend(t, s, id, delta("a")) }},
				{"appended", func() { mustAppend(t, s, id, delta("b")) }},
				{"read", func() { mustRead(t, s, id, 1, lots, lots) }},
				{"ended", func() { mustAppend(t, s, id, store.NewEnding(store.TypeEnd, store.Fill{})) }},
			} {
				c.use()
				list, hash := r.PTTL(t.Context(), "chat:history:"+id).Val(), r.PTTL(t.Context(), "chat:session:"+id).Val()
				if list <= 0 || list > ttl || hash <= list || hash < 29*24*time.Hour {
					t.Errorf("%s, %s, with %v: the list is kept for %v, the hash for %v", name, c.what, ttl, list, hash)
				}
			}
		}
	}
	for _, ttl := range []time.Duration{0, time.Millisecond, 876_001 * time.Hour} {
		c := store.DefaultConfig()
		if c.HistoryTTL = ttl; c.Validate() == nil {
			t.Errorf("%v is taken", ttl)
		}
	}
}

// Elements of other programs count by position, whatever they contain.
func TestContract_foreignProducers(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		r := storetest.Redis(t)
		s := open(t, func(c *store.Config) { c.Redis = r.URL(); c.HistoryOrder = order })
		push := func(element string) {
			if order == store.NewestFirst {
				r.LPush(t.Context(), "chat:history:s", element)
			} else {
				r.RPush(t.Context(), "chat:history:s", element)
			}
		}
		push(`{"seq":77,"content":"a"}`)
		push(`no JSON`)
		if a := mustAppend(t, s, "s", delta("c")); a.First != 3 {
			t.Fatal(order, a)
		}
		push(`{"content":"d"}`)
		p := mustRead(t, s, "s", 1, lots, lots)
		if p.Last != 4 || p.Elements[1] != "no JSON" || !strings.HasPrefix(p.Elements[2], `{"seq":3,"ts":`) || p.Elements[3] != `{"content":"d"}` {
			t.Fatal(order, p)
		}
	}
}

func TestIdentity_expiredLogGoesOn(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	a := mustAppend(t, s, "s", delta("a"), delta("b"))
	r.Del(t.Context(), "chat:history:s")
	if p := mustRead(t, s, "s", 1, lots, lots); p.Epoch != a.Epoch || p.First != 3 || p.Last != 2 {
		t.Fatalf("%+v", p)
	}
	r.RPush(t.Context(), "chat:history:s", `{"content":"c"}`) // elements after an empty log keep its epoch
	if p := mustRead(t, s, "s", 1, lots, lots); p.Epoch != a.Epoch || p.First != 3 || p.Last != 3 {
		t.Fatalf("%+v", p)
	}
	if b := mustAppend(t, s, "s", delta("d")); b.Epoch != a.Epoch || b.First != 4 {
		t.Fatal(b)
	}
}

func TestIdentity_anotherListIsAnotherEpoch(t *testing.T) {
	for name, rewrite := range map[string]func(r *storetest.Server){
		"longer": func(r *storetest.Server) {
			r.Del(t.Context(), "chat:history:s")
			r.RPush(t.Context(), "chat:history:s", "{}", "{}", "{}", "{}")
		},
		"as long": func(r *storetest.Server) {
			r.Del(t.Context(), "chat:history:s")
			r.RPush(t.Context(), "chat:history:s", "{}", "{}", "{}")
		},
		"shorter": func(r *storetest.Server) { r.LTrim(t.Context(), "chat:history:s", 0, -2) },
		"edited":  func(r *storetest.Server) { r.LSet(t.Context(), "chat:history:s", -1, "{}") },
	} {
		t.Run(name, func(t *testing.T) {
			r := storetest.Redis(t)
			s := open(t, func(c *store.Config) { c.Redis = r.URL() })
			a := mustAppend(t, s, "s", delta("a"), delta("b"), delta("c"))
			rewrite(r)
			length := r.LLen(t.Context(), "chat:history:s").Val()
			p := mustRead(t, s, "s", 1, lots, lots)
			if p.Epoch == a.Epoch || p.First != 1_000_001 || p.Last != 1_000_000+length || p.Former != 1_000_000 {
				t.Fatalf("%+v", p)
			}
			if again := mustRead(t, s, "s", 1, lots, lots); again.Epoch != p.Epoch || again.Last != p.Last {
				t.Fatalf("it changed twice: %+v", again)
			}
		})
	}
}

// Only one of several nodes begins the new epoch.
func TestRenew_isCompareAndSet(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		a := mustAppend(t, s, "s", delta("a"), delta("b"))
		for range 3 {
			if err := s.Renew(t.Context(), "s", a.Epoch, 9); err != nil {
				t.Fatal(err)
			}
		}
		p := mustRead(t, s, "s", 1, lots, lots)
		if p.Epoch == a.Epoch || p.First != 1_000_001 || p.Last != 1_000_002 || p.Former != 1_000_000 {
			t.Fatalf("%+v", p)
		}
	})
}

func TestSession_madeDescribedDeletedMadeAnew(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		ctx := t.Context()
		if _, err := s.Describe(ctx, "s"); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "s"); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		b, created, err := s.Create(ctx, "s")
		if err != nil || !created || b.Epoch == "" || b.First != 1 || b.Last != 0 || b.CreatedAt.IsZero() {
			t.Fatal(b, created, err)
		}
		if again, created, err := s.Create(ctx, "s"); err != nil || created || again.Epoch != b.Epoch {
			t.Fatal(again, created, err)
		}
		a := mustAppend(t, s, "s", store.NewChunk(store.TypeDone, "m", "", ""), store.NewChunk(store.TypeEnd, "", "", ""))
		for range 2 { // repeating it is harmless
			if err := s.Delete(ctx, "s"); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Describe(ctx, "s"); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		if p := mustRead(t, s, "s", 1, lots, lots); !p.Deleted || len(p.Elements) != 0 || p.Last != 2 {
			t.Fatalf("%+v", p)
		}
		// An upload that began before does not write into the new log.
		if _, err := s.Append(ctx, "s", store.Batch{Life: a.Life, Chunks: []store.Chunk{delta("late")}}); !errors.Is(err, store.ErrSessionDeleted) {
			t.Fatal(err)
		}
		n := mustAppend(t, s, "s", store.NewChunk(store.TypeDelta, "m", "", "anew"))
		if n.First != 1_000_001 || n.Epoch == a.Epoch {
			t.Fatal(n)
		}
		if _, err := s.Append(ctx, "s", store.Batch{Life: a.Life, Chunks: []store.Chunk{delta("late")}}); !errors.Is(err, store.ErrSessionDeleted) {
			t.Fatal(err)
		}
		if p := mustRead(t, s, "s", 1, lots, lots); p.Former != 1_000_000 || p.First != 1_000_001 || p.Ended || p.Deleted {
			t.Fatalf("%+v", p)
		}
	})
}

func TestEmbedded_logsExpire(t *testing.T) {
	s := open(t, func(c *store.Config) { c.HistoryTTL = time.Second })
	mustAppend(t, s, "s", delta("a"))
	deadline := time.Now().Add(storetest.Patience)
	for mustDescribe := func() store.Bounds {
		// Describe counts as a use, which would keep the log forever. So the test waits longer than the time to live.
		time.Sleep(1100 * time.Millisecond)
		b, err := s.Describe(t.Context(), "s")
		if err != nil {
			t.Fatal(err)
		}
		return b
	}; ; {
		if b := mustDescribe(); b.First == 2 && b.Last == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the log never expires")
		}
	}
}

// A key of another type causes an error before anything is written.
func TestAppend_keyOfAnotherType_writesNothing(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	r.Set(t.Context(), "chat:history:a", "x", 0)
	r.Set(t.Context(), "chat:session:b", "x", 0)
	for _, id := range []string{"a", "b"} {
		if _, err := s.Append(t.Context(), id, store.Batch{Chunks: []store.Chunk{delta("x")}}); err == nil || store.Away(err) {
			t.Fatal(err)
		}
	}
	if keys := r.Keys(t.Context(), "*").Val(); len(keys) != 2 {
		t.Fatal(keys)
	}
}

// Errors distinguish what was certainly not stored from what may have been.
func TestAway_isToldFromUnknown(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); c.Timeout = 2 * time.Second })
	mustAppend(t, s, "s", delta("a"))
	r.Signal(syscall.SIGSTOP)
	if _, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("b")}}); !errors.Is(err, store.ErrOutcomeUnknown) {
		t.Fatal(err)
	}
	r.Signal(syscall.SIGCONT)
	r.Kill()
	var err error
	for range 20 { // broken connections of the pool must be found first
		if _, err = s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("c")}}); errors.Is(err, store.ErrAway) {
			break
		}
	}
	if !errors.Is(err, store.ErrAway) {
		t.Fatal(err)
	}
	if err := s.Probe(t.Context()); !store.Away(err) {
		t.Fatal(err)
	}
}

// A restarted Redis has forgotten the scripts, which no caller notices.
func TestRun_scriptsAreLoadedAgain(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	mustAppend(t, s, "s", delta("a"))
	r.ScriptFlush(t.Context())
	if a := mustAppend(t, s, "s", delta("b")); a.First != 2 {
		t.Fatal(a)
	}
}

// ear is a Listener that records everything.
type ear struct {
	mu       sync.Mutex
	heard    []string
	resyncs  int
	notified chan struct{}
}

func newEar() *ear { return &ear{notified: make(chan struct{}, 1000)} }

func (e *ear) Live(p string) {
	e.mu.Lock()
	e.heard = append(e.heard, p)
	e.mu.Unlock()
	e.notified <- struct{}{}
}
func (e *ear) Resync() {
	e.mu.Lock()
	e.resyncs++
	e.mu.Unlock()
	e.notified <- struct{}{}
}

func (e *ear) wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	idle := time.NewTimer(storetest.Patience)
	for {
		e.mu.Lock()
		ok := done()
		e.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-e.notified:
			idle.Reset(storetest.Patience)
		case <-idle.C:
			t.Fatalf("not heard: %s", what)
		}
	}
}

func TestListen_hearsAfterTheFirstResync(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		e := newEar()
		stop := s.Listen("s", e)
		e.wait(t, "the acknowledgement", func() bool { return e.resyncs == 1 })
		mustAppend(t, s, "s", delta("a"))
		e.wait(t, "the chunk", func() bool { return len(e.heard) > 0 && strings.Contains(e.heard[len(e.heard)-1], `"a"`) })
		stop()
		again := newEar()
		stop = s.Listen("s", again)
		defer stop()
		again.wait(t, "the acknowledgement", func() bool { return again.resyncs == 1 })
		mustAppend(t, s, "s", delta("b"))
		again.wait(t, "the chunk", func() bool { return len(again.heard) == 1 })
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, p := range e.heard {
			if strings.Contains(p, `"b"`) {
				t.Fatal("heard after stop")
			}
		}
	})
}

// Promise: a hint is only a hint. Every loss of the connection is reported.
func TestListen_connectionKilled_resync(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	e := newEar()
	defer s.Listen("s", e)()
	for i := 1; i <= 4; i++ {
		e.wait(t, "an acknowledgement", func() bool { return e.resyncs >= i })
		r.ClientKillByFilter(t.Context(), "TYPE", "pubsub")
	}
}

func TestListen_redisRestarted_resync(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	e := newEar()
	defer s.Listen("s", e)()
	e.wait(t, "the acknowledgement", func() bool { return e.resyncs >= 1 })
	r.Kill()
	other := newEar() // begins to listen while Redis is away
	defer s.Listen("t", other)()
	r.Start()
	e.wait(t, "the acknowledgement after the restart", func() bool { return e.resyncs >= 2 })
	other.wait(t, "the other's", func() bool { return other.resyncs >= 1 })
}

// The listener notices a peer that vanished without a reset, which go-redis does not.
func TestListen_silentPeer_isNoticed(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); c.Ping = time.Second })
	e := newEar()
	defer s.Listen("s", e)()
	e.wait(t, "the acknowledgement", func() bool { return e.resyncs >= 1 })
	before := r.Do(t.Context(), "CLIENT", "LIST", "TYPE", "pubsub").String()
	r.Signal(syscall.SIGSTOP)
	time.Sleep(3 * time.Second) // the fault itself: Redis is silent for longer than two pings
	r.Signal(syscall.SIGCONT)
	e.wait(t, "the acknowledgement on a new connection", func() bool { return e.resyncs >= 2 })
	after := r.Do(t.Context(), "CLIENT", "LIST", "TYPE", "pubsub").String()
	if id(before) == id(after) {
		t.Fatal("it is the same connection:", before, after)
	}
}

func id(list string) string {
	_, rest, _ := strings.Cut(list, "sub=1")
	_ = rest
	i := strings.Index(list, "id=")
	return list[i : i+8]
}

// No subscription is left after its listener.
func TestListen_manySessions_noSubscriptionIsLeft(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			e := newEar()
			stop := s.Listen(fmt.Sprint("s", i), e)
			e.wait(t, "the acknowledgement", func() bool { return e.resyncs == 1 })
			stop()
		})
	}
	wg.Wait()
	for deadline := time.Now().Add(storetest.Patience); ; {
		channels := r.PubSubChannels(t.Context(), "*").Val()
		if len(channels) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(channels)
		}
	}
}
