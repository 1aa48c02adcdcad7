package store_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// A log keeps its newest chunks, within its limits of bytes and chunks, and reports where they begin. The newest chunk
// is kept whatever its size.
func TestHistoryBytes_keepsTheNewest(t *testing.T) {
	const most = 4 << 10
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		t.Run(order, func(t *testing.T) {
			both(t, func(c *store.Config) { c.HistoryBytes, c.HistoryOrder = most, order }, func(t *testing.T, s *store.Store) {
				last := int64(0)
				for i, size := range []int{10, 900, 10, 900, 10, 10, 900, 10, 900, 900, 10, 3000, 10, 10, 10, 5000, 10, 2000, 1000} {
					chunk := store.NewChunk(store.TypeDelta, []string{"", "m"}[i%2], "", strings.Repeat("x", size)) // by both scripts
					last += int64(1 + i%3)
					for range 1 + i%3 {
						mustAppend(t, s, "s", chunk)
					}
					p := mustRead(t, s, "s", 1, lots, lots)
					kept := 0
					for _, element := range p.Elements {
						kept += len(element)
					}
					if p.Last != last || p.From != p.First || p.Next() != last+1 {
						t.Fatalf("%d: from %d to %d of %d to %d", i, p.From, p.Next(), p.First, p.Last)
					}
					if kept > most && len(p.Elements) > 1 {
						t.Fatalf("%d: %d bytes are kept in %d chunks", i, kept, len(p.Elements))
					}
					if p.First > 1 && len(p.Elements) > 1 && kept+1100 < most && size < 1000 && i < 10 {
						t.Fatalf("%d: only %d bytes are kept", i, kept)
					}
				}
			})
		})
	}
}

// The same holds for a list to which only other programs push, after every script.
func TestHistoryBytes_ofAForeignList(t *testing.T) {
	r := storetest.Redis(t)
	for _, c := range []struct {
		name           string
		max, bytes     int
		first, session int64
	}{{"bytes", 100_000, 100 << 10, 0, 0}, {"chunks", 3000, 0, 5001, 0}} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, func(cfg *store.Config) { cfg.Redis, cfg.HistoryMax, cfg.HistoryBytes = r.URL(), c.max, c.bytes })
			key := "chat:history:" + c.name
			for i := range 8000 {
				r.RPush(t.Context(), key, fmt.Sprintf(`{"content":"%d %s"}`, i+1, strings.Repeat("x", 30)))
			}
			var p store.Page
			eventually(t, "the list is trimmed", func() bool { // each read trims a slice
				p = mustRead(t, s, c.name, 1, lots, lots)
				kept := 0
				for _, element := range p.Elements {
					kept += len(element)
				}
				return len(p.Elements) <= c.max && (c.bytes == 0 || kept <= c.bytes)
			})
			if p.Last != 8000 || p.Next() != 8001 || c.first > 0 && p.First != c.first || !strings.Contains(p.Elements[0], fmt.Sprintf(`"%d `, p.First)) {
				t.Fatalf("from %d to %d: %s", p.First, p.Last, p.Elements[0])
			}
			if n := r.LLen(t.Context(), key).Val(); n != p.Last-p.First+1 {
				t.Fatalf("%d elements are kept", n)
			}
			if a := mustAppend(t, s, c.name, delta("next")); a.First != 8001 {
				t.Fatalf("%+v", a)
			}
		})
	}
}

// A full Redis refuses only what needs memory. What exists can be read, cancelled and deleted, and tickets work.
func TestFull_whatExistsIsServed(t *testing.T) {
	ctx := t.Context()
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.Grace = r.URL(), 100*time.Millisecond })
	for _, id := range []string{"a", "b"} {
		mustAppend(t, s, id, store.NewChunk(store.TypeDelta, "m", "", "x"), store.NewChunk(store.TypeDelta, "n", "", "x"))
	}
	if _, err := s.Append(ctx, "due", store.Batch{Chunks: messages(0, 3), Lease: time.Second}); err != nil {
		t.Fatal(err)
	}
	if err := s.MakeTicket(ctx, "before", "a", time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := r.ConfigSet(ctx, "maxmemory", "100kb").Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(ctx, "a", store.Batch{Chunks: []store.Chunk{delta("b")}}); store.Why(err) != store.RedisFull {
		t.Fatal(err)
	}
	if _, _, err := s.Create(ctx, "c"); store.Why(err) != store.RedisFull {
		t.Fatal(err)
	}
	eventually(t, "the lease is due", func() bool {
		return r.Do(ctx, "eval", "local t = redis.call('TIME') return t[1] * 1000 > tonumber(redis.call('HGET', KEYS[1], 'due')) + 1000 and 1 or 0", 1, "chat:session:due").Val() == int64(1)
	})
	if p := mustRead(t, s, "due", 1, lots, lots); len(p.Elements) != 3 {
		t.Errorf("%+v", p)
	}
	if c, err := s.Cancel(ctx, "a", "m"); err != nil || c.Last != 3 {
		t.Errorf("cancel: %+v, %v", c, err)
	}
	if c, err := s.Cancel(ctx, "b", ""); err != nil || len(c.Messages) != 2 {
		t.Errorf("cancel: %+v, %v", c, err)
	}
	if p := mustRead(t, s, "a", 1, lots, lots); len(p.Elements) != 3 || !strings.Contains(p.Elements[2], store.TypeCancelled) {
		t.Errorf("%+v", p)
	}
	if _, err := s.Cancel(ctx, "no", ""); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
	if err := s.Delete(ctx, "b"); err != nil {
		t.Error("delete:", err)
	}
	if b, err := s.Describe(ctx, "b"); !errors.Is(err, store.ErrNotFound) {
		t.Error(b, err)
	}
	if _, err := s.EnterTicket(ctx, "before", "a", "c"); err != nil {
		t.Error("enter:", err)
	}
	if err := s.MakeTicket(ctx, "after", "a", time.Time{}); err != nil {
		t.Error("make:", err)
	}
	if err := s.RenewTicket(ctx, "before", "a", "c", time.Time{}); err != nil {
		t.Error("renew:", err)
	}
	if s.Writes() != store.RedisFull {
		t.Errorf("writes are said to be %s", s.Writes())
	}
}
