package store_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"gapless/store"
	"gapless/store/storetest"
)

// between calls do before each transaction, and counts the transactions.
type between struct {
	do    func()
	count int
}

func (b *between) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (b *between) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }
func (b *between) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if slices.ContainsFunc(cmds, probes) { // the store tries its permissions when it is opened
			return next(ctx, cmds)
		}
		b.count++
		if b.do != nil {
			b.do()
		}
		return next(ctx, cmds)
	}
}

// probes reports whether a store uses a command to try its permissions.
func probes(cmd redis.Cmder) bool { return strings.Contains(fmt.Sprint(cmd.Args()), "!probe") }

// large returns a store with many chunks of random sizes in log s.
func large(t *testing.T, order string, n, most int, change func(*store.Config)) (*store.Store, *redis.Client, *between) {
	t.Helper()
	server, b := storetest.Redis(t), &between{}
	s := open(t, func(c *store.Config) {
		c.Redis, c.HistoryOrder = server.URL(), order
		c.Instrument = func(client redis.UniversalClient) error { client.AddHook(b); return nil }
		if change != nil {
			change(c)
		}
	})
	for i := 0; i < n; i += 500 {
		var chunks []store.Chunk
		if i > 0 {
			most = 801 - most // large and small ones in turn
		}
		for k := range 500 {
			chunks = append(chunks, delta(fmt.Sprint(i+k, strings.Repeat("x", rand.IntN(most)))))
		}
		mustAppend(t, s, "s", chunks...)
	}
	o, err := redis.ParseURL(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(o)
	t.Cleanup(func() { _ = client.Close() })
	return s, client, b
}

func listOf(t *testing.T, client *redis.Client, order string) []string {
	t.Helper()
	list, err := client.LRange(t.Context(), "chat:history:s", 0, -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	if order == store.NewestFirst {
		slices.Reverse(list)
	}
	return list
}

// If many chunks of a list that is not too large are wanted, Redis returns the list itself. The pages are the same.
func TestRead_manyChunksAtOnce(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		t.Run(order, func(t *testing.T) {
			s, client, b := large(t, order, 6000, 800, nil)
			list := listOf(t, client, order)
			for range 20 {
				from, bytes, pages := 1+rand.Int64N(5000), 256<<10+rand.IntN(1<<20), 0
				for next := from; next <= 6000; pages++ {
					count := 1000 + rand.IntN(6000)
					p := mustRead(t, s, "s", next, bytes, count)
					if p.From != next || len(p.Elements) == 0 || len(p.Elements) > count || p.First != 1 || p.Last != 6000 {
						t.Fatalf("from %d: %d chunks from %d on, of %d to %d", next, len(p.Elements), p.From, p.First, p.Last)
					}
					size := 0
					for i, e := range p.Elements {
						if size += len(e); e != list[int(p.From)-1+i] {
							t.Fatalf("chunk %d is %.40q", p.From+int64(i), e)
						}
					}
					if size > bytes {
						t.Fatalf("%d bytes instead of %d", size, bytes)
					}
					next = p.Next()
				}
				if most := (6000-int(from))*900/bytes*3 + 3; pages > most {
					t.Errorf("%d pages of %d bytes, from %d on", pages, bytes, from)
				}
			}
			if b.count == 0 {
				t.Error("Lua has had it all")
			}
		})
	}
}

// A change of the log between the two requests does not affect the page.
func TestRead_manyChunksAtOnce_whileTheLogChanges(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		for name, hand := range map[string]func(t *testing.T, s *store.Store, client *redis.Client){
			"trimmed":  func(t *testing.T, s *store.Store, _ *redis.Client) { mustAppend(t, s, "s", delta("a"), delta("b")) },
			"appended": func(t *testing.T, _ *store.Store, client *redis.Client) { push(t, client, order, "later") },
			"another list": func(t *testing.T, _ *store.Store, client *redis.Client) {
				client.Del(t.Context(), "chat:history:s")
				for i := range 3000 {
					push(t, client, order, fmt.Sprint("other ", i))
				}
			},
			"a shorter list": func(t *testing.T, _ *store.Store, client *redis.Client) {
				client.Del(t.Context(), "chat:history:s")
				push(t, client, order, "only")
			},
			"expired": func(t *testing.T, _ *store.Store, client *redis.Client) { client.Del(t.Context(), "chat:history:s") },
			"deleted": func(t *testing.T, s *store.Store, _ *redis.Client) {
				if err := s.Delete(t.Context(), "s"); err != nil {
					t.Fatal(err)
				}
			},
			"flushed":           func(t *testing.T, _ *store.Store, client *redis.Client) { client.FlushAll(t.Context()) },
			"scripts forgotten": func(t *testing.T, _ *store.Store, client *redis.Client) { client.ScriptFlush(t.Context()) },
		} {
			t.Run(order+"/"+name, func(t *testing.T) {
				t.Parallel()
				s, client, b := large(t, order, 3000, 100, func(c *store.Config) { c.HistoryMax = 3000 })
				b.do = func() {
					b.do = nil
					hand(t, s, client)
				}
				p := mustRead(t, s, "s", 11, 1<<20, lots)
				if b.count == 0 {
					t.Fatal("nothing was in between")
				}
				list := listOf(t, client, order)
				if name == "flushed" && p.Epoch == "" && len(list) == 0 {
					return
				}
				if p.Last-p.First+1 != int64(len(list)) || p.From != max(11, p.First) && len(list) > 0 {
					t.Errorf("%d chunks from %d on, of %d to %d; the list has %d", len(p.Elements), p.From, p.First, p.Last, len(list))
				}
				for i, e := range p.Elements {
					if e != list[p.From-p.First+int64(i)] {
						t.Fatalf("chunk %d is %.40q", p.From+int64(i), e)
					}
				}
			})
		}
	}
}

func push(t *testing.T, client *redis.Client, order, element string) {
	t.Helper()
	do := client.RPush
	if order == store.NewestFirst {
		do = client.LPush
	}
	if err := do(t.Context(), "chat:history:s", element).Err(); err != nil {
		t.Error(err)
	}
}

// The size of chunks is unknown before they are read. The script reads a list that is too large for memory, because it
// counts bytes.
func TestRead_manyLargeChunks_areCountedByTheScript(t *testing.T) {
	s, _, b := large(t, store.OldestFirst, 2000, 1, nil)
	for range 40 {
		var chunks []store.Chunk
		for range 30 {
			chunks = append(chunks, delta(strings.Repeat("x", 20_000)))
		}
		mustAppend(t, s, "s", chunks...)
	}
	p := mustRead(t, s, "s", 1000, 1<<20, lots)
	size := 0
	for _, e := range p.Elements {
		size += len(e)
	}
	if b.count > 0 || size > 1<<20 || p.From != 1000 || len(p.Elements) < 1000 {
		t.Errorf("%d transactions; %d chunks from %d on, %d bytes", b.count, len(p.Elements), p.From, size)
	}
}
