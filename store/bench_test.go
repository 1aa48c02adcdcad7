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

// The same without push.lua, for comparison.
func BenchmarkAppend_byTheScriptThatKnowsEveryCase(b *testing.B) {
	appendBy(b, (*store.Store).Thorough)
}

func appendBy(b *testing.B, way func(*store.Store)) {
	for _, at := range []int{1, 16, 128} {
		b.Run(fmt.Sprintf("%d at once", at), func(b *testing.B) {
			r := storetest.Redis(b)
			s := open(b, func(c *store.Config) { c.Redis = r.URL() })
			way(s)
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
		})
	}
}

// The cost of an append does not grow with the log.
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
