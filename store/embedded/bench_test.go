package embedded

import (
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"testing"
)

// BenchmarkOpen measures how long a start takes, and how much memory chunks of 100 bytes need.
func BenchmarkOpen(b *testing.B) {
	for _, chunks := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(chunks, " chunks in 1000 sessions"), func(b *testing.B) {
			dir := b.TempDir()
			former := rewriteLeast
			rewriteLeast = 1 << 40
			defer func() { rewriteLeast = former }()
			r, _ := mustOpen(b, dir)
			text := strings.Repeat("x", 100)
			for i := range chunks {
				session := i % 1000
				element := fmt.Sprintf(`{"seq":%d,"ts":1800000000000,"type":"delta","content":"%s"}`, i/1000+1, text)
				commands := [][]string{
					{"RPUSH", fmt.Sprint("chat:history:", session), element},
					{"HSET", fmt.Sprint("chat:session:", session), "last_seen", fmt.Sprint(i), "mark", strings.Repeat("a", 40), "updated_at", "1800000000000", "sized", "1000 0 100"},
				}
				_, kept := r.execute(commands)
				if i%10_000 == 0 || i == chunks-1 {
					if err := kept.wait(); err != nil {
						b.Fatal(err)
					}
				}
			}
			mustClose(b, r)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			for b.Loop() {
				var err error
				if r, err = Open(dir, slog.New(slog.DiscardHandler)); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				runtime.GC()
				runtime.ReadMemStats(&after)
				mustClose(b, r)
				b.StartTimer()
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(chunks), "B/chunk")
		})
	}
}
