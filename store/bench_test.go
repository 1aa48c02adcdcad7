package store_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"gapless/store"
	"gapless/store/storetest"
)

// These benchmarks measure an append and a read with a real Redis, for one caller and for many at once.

func BenchmarkAppend(b *testing.B) { appendBy(b, func(*store.Store) {}) }

// This benchmark does the same without push.lua, for comparison.
func BenchmarkAppend_byTheScriptThatKnowsEveryCase(b *testing.B) {
	appendBy(b, (*store.Store).Thorough)
}

func appendBy(b *testing.B, way func(*store.Store)) {
	for _, at := range []int{1, 16, 128} {
		b.Run(fmt.Sprintf("%d at once", at), func(b *testing.B) {
			r := storetest.Redis(b)
			s := open(b, func(c *store.Config) { c.Redis = r.URL() })
			way(s)
			appendTo(b, s, at)
		})
	}
}

// The cost of an append does not depend on the length of the log.
func BenchmarkAppend_toALogOf(b *testing.B) {
	for _, length := range []int{0, 1_000, 50_000} {
		b.Run(fmt.Sprint(length), func(b *testing.B) {
			r := storetest.Redis(b)
			s := open(b, func(c *store.Config) { c.Redis = r.URL() })
			chunk := delta(strings.Repeat("x", 100))
			for n := 0; n < length; n += 1000 {
				many := make([]store.Chunk, 1000)
				for i := range many {
					many[i] = chunk
				}
				mustAppend(b, s, "s", many...)
			}
			b.ReportAllocs()
			for b.Loop() {
				mustAppend(b, s, "s", chunk)
			}
		})
	}
}

func BenchmarkRead_aPageOf(b *testing.B) {
	for _, bytes := range []int{16 << 10, 1 << 20} {
		b.Run(fmt.Sprint(bytes>>10, "KiB"), func(b *testing.B) {
			r := storetest.Redis(b)
			s := open(b, func(c *store.Config) { c.Redis = r.URL() })
			many := make([]store.Chunk, 9000)
			for i := range many {
				many[i] = delta(strings.Repeat("x", 100))
			}
			mustAppend(b, s, "s", many...)
			b.SetBytes(int64(bytes))
			b.ReportAllocs()
			for b.Loop() {
				mustRead(b, s, "s", 1, bytes, lots)
			}
		})
	}
}

// BenchmarkStores compares the embedded Redis with a redis-server on this machine, both in memory and on disk.
func BenchmarkStores(b *testing.B) {
	for _, where := range []string{"redis-server", "embedded", "redis-server with AOF always", "embedded:DIR"} {
		for _, at := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s, %d at once", where, at), func(b *testing.B) {
				address := store.Embedded
				switch where {
				case "redis-server":
					address = storetest.Redis(b).URL()
				case "redis-server with AOF always":
					address = storetest.Redis(b, "--appendonly", "yes", "--appendfsync", "always").URL()
				case "embedded:DIR":
					address = store.Embedded + ":" + b.TempDir()
				}
				s := open(b, func(c *store.Config) { c.Redis = address })
				appendTo(b, s, at)
			})
		}
	}
}

// appendTo runs at callers per processor. Each appends to a separate session.
func appendTo(b *testing.B, s *store.Store, at int) {
	chunk := delta(strings.Repeat("x", 100))
	var next atomic.Int64
	b.SetParallelism(at)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		id := fmt.Sprint("s", next.Add(1))
		for pb.Next() {
			mustAppend(b, s, id, chunk)
		}
	})
}
