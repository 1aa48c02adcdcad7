package sse

import (
	"bytes"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"gapless/store/storetest"
)

// These benchmarks measure what a chunk costs on its way to viewers, without the kernel. make bench
// measures the whole way.

var element = `{"seq":1234567,"ts":1795424741692,"type":"delta","message_id":"m1","content":"` + strings.Repeat("x", 100) + `"}`

func BenchmarkEvent(b *testing.B) {
	b.ReportAllocs()
	var event []byte
	for b.Loop() {
		event, _ = appendEvent(event[:0], 1234567, element)
	}
	b.SetBytes(int64(len(event)))
}

func BenchmarkWindow_oneChunkMore(b *testing.B) {
	b.ReportAllocs()
	w := &window{memory: newMemory(1)}
	for b.Loop() {
		w = w.with(element, 256<<10)
	}
}

// void accepts everything that is written to it.
type void struct {
	net.Conn
	bytes int64
}

func (v *void) try(p []byte) (int, error) { v.bytes += int64(len(p)); return len(p), nil }
func (v *void) tryAll(p [][]byte) (int, error) {
	return v.try(bytes.Join(p, nil))
}
func (v *void) watch(func()) error { return nil }
func (v *void) unwatch()           {}
func (v *void) finish()            {}
func (v *void) Close() error       { return nil }

// BenchmarkLive_toARowOf measures a live chunk from the subscription to the sockets of a row, per
// chunk and per viewer.
func BenchmarkLive_toARowOf(b *testing.B) {
	for _, viewers := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprint(viewers), func(b *testing.B) {
			log := &storetest.Log{}
			log.Append("a")
			h := NewHub(testConfig(), log)
			defer h.Close()
			for range viewers {
				v, err := h.View(Ask{Session: "s", Cursor: 1})
				if err != nil {
					b.Fatal(err)
				}
				h.sit(v, &void{}, []byte{}, nil, 0, Told{func() {}, func(Cause, bool) {}})
			}
			hear(log)
			f := h.feeds["s"]
			for f.row.taken.Load() < int64(viewers) || f.window.Load().Last < 1 {
				time.Sleep(time.Millisecond)
			}
			b.ReportAllocs()
			for b.Loop() {
				w := f.window.Load()
				f.mu.Lock()
				f.publish(w.with(element, 256<<10))
				f.mu.Unlock()
				for f.row.busy.Load() {
					runtime.Gosched()
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(viewers), "ns/event")
		})
	}
}

// BenchmarkPage measures a page of the history, for a viewer that is further back than the window.
func BenchmarkPage(b *testing.B) {
	elements := slices.Repeat([]string{element}, 128)
	b.ReportAllocs()
	for b.Loop() {
		m := newMemory(1)
		for i := range elements {
			m.appendFirst(elements[i:], all)
		}
	}
}
