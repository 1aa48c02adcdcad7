package sse

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// subject is a viewer of a log that is tested in every interleaving. It begins with the log.
type subject interface {
	begin(log *storetest.Log)
	// settled lets time pass until nothing is outstanding. It returns what the viewer shows, or
	// what the viewer saw that must not happen.
	settled() ([]string, error)
	end()
}

// gapless is a viewer of the real hub.
type gapless struct {
	t      testing.TB
	window int
	hub    *Hub
	w      *watcher
}

func (g *gapless) begin(log *storetest.Log) {
	cfg := testConfig()
	cfg.Window = g.window
	g.hub = NewHub(cfg, log)
	g.w = watch(g.t, g.hub, Ask{Session: "s"})
}

func (g *gapless) settled() ([]string, error) {
	time.Sleep(2 * g.hub.cfg.Reconcile)
	err := g.w.take(g.w.events())
	if err == nil && len(g.w.resets) > 0 {
		err = fmt.Errorf("reset: %v", g.w.resets)
	}
	return g.w.chunks, err
}

func (g *gapless) end() {
	g.w.leave()
	g.hub.Close()
}

// naive is the control: the viewer that RACE.md analyses. It reads the history, sends it, and only
// then subscribes. It sends whatever it receives.
type naive struct {
	log   *storetest.Log
	shown []string
	begun chan struct{}
}

func (n *naive) begin(log *storetest.Log) {
	n.log, n.begun = log, make(chan struct{})
	go func() {
		defer close(n.begun)
		page, _ := log.Read(noContext{}, "s", 1, 1<<30, 1<<30)
		n.shown = append(n.shown, page.Elements...)
		log.Listen("s", n)
	}()
}

func (n *naive) Live(payload string) { n.shown = append(n.shown, payload) }
func (n *naive) Resync()             {}
func (n *naive) settled() ([]string, error) {
	time.Sleep(time.Minute)
	return n.shown, nil
}
func (n *naive) end() { <-n.begun }

type noContext struct{}

func (noContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (noContext) Done() <-chan struct{}       { return nil }
func (noContext) Err() error                  { return nil }
func (noContext) Value(any) any               { return nil }

// action is something that may happen next.
type action struct {
	name string
	do   func()
}

// play plays one order of events. pick chooses among what may happen next, until the producer is
// done. Then everything still held is released. play fails if the viewer does not show 1..n.
func play(s subject, producer []func(log *storetest.Log), pick func(options []action) action) (trace string, err error) {
	log := &storetest.Log{Held: true}
	var happened []string
	s.begin(log)
	defer s.end()
	defer log.Release() // before end, which waits
	synctest.Wait()
	for next := 0; next < len(producer); {
		options := []action{{fmt.Sprintf("produce%d", next), func() { producer[next](log); next++ }}}
		if log.Listening() && !log.Acked() {
			options = append(options, action{"ack", log.Ack})
		}
		if log.Asked() {
			options = append(options, action{"snapshot", log.Snapshot})
		}
		if log.Taken() {
			options = append(options, action{"reply", log.Reply})
		}
		if n := log.Messages(); n > 0 {
			options = append(options,
				action{"deliver", func() { log.Deliver(0) }},
				action{"lose", func() { log.Drop(0) }},
				action{"double", func() {
					log.Double(0)
					log.Deliver(0)
					synctest.Wait()
					log.Deliver(0)
				}})
			if n > 1 {
				options = append(options, action{"reorder", func() { log.Deliver(n - 1) }})
			}
		}
		a := pick(options)
		happened = append(happened, a.name)
		a.do()
		synctest.Wait()
	}
	log.Release()
	synctest.Wait()
	if !log.Acked() {
		log.Ack()
	}
	for log.Messages() > 0 {
		log.Drop(0) // the worst case: announcements under way are lost
	}
	shown, err := s.settled()
	_, want := log.Contents()
	if err == nil && !slices.Equal(shown, want) {
		err = fmt.Errorf("it shows %q", shown)
	}
	return strings.Join(happened, " "), err
}

// every plays all orders of events, depth first.
func every(t *testing.T, make func() subject, producer []func(*storetest.Log)) (played int, failure error) {
	var path, width []int
	for {
		at := 0
		synctest.Test(t, func(*testing.T) {
			trace, err := play(make(), producer, func(options []action) action {
				if at == len(path) {
					path, width = append(path, 0), append(width, len(options))
				}
				if width[at] != len(options) {
					t.Fatalf("after %v there are %d choices now, and %d before: %v", path[:at], len(options), width[at], options)
				}
				a := options[path[at]]
				at++
				return a
			})
			if err != nil && failure == nil {
				failure = fmt.Errorf("%s: %w", trace, err)
			}
		})
		played++
		path, width = path[:at], width[:at]
		for len(path) > 0 && path[len(path)-1]+1 >= width[len(path)-1] {
			path, width = path[:len(path)-1], width[:len(width)-1]
		}
		if len(path) == 0 || failure != nil {
			return played, failure
		}
		path[len(path)-1]++
	}
}

// producers are the ways in which n chunks come about.
func producers(n int64) map[string][]func(*storetest.Log) {
	m := map[string][]func(*storetest.Log){}
	for i := range n {
		ours, foreign := storetest.Element(i+1, fmt.Sprint("c", i+1)), fmt.Sprintf(`{"content":"f%d"}`, i+1)
		for name, element := range map[string]string{"ours": ours, "foreign": foreign} {
			push := func(l *storetest.Log) { l.Push(element) }
			publish := func(l *storetest.Log) { l.Publish(element) }
			m[name+" pushed first"] = append(m[name+" pushed first"], push, publish)
			m[name+" published first"] = append(m[name+" published first"], publish, push)
		}
		m["appended"] = append(m["appended"], func(l *storetest.Log) { l.Append(fmt.Sprint("a", i+1)) })
	}
	return m
}

// Promises: Ordered, Unique, Complete; a hint is only a hint.
func TestFeed_everyInterleaving_givesEachChunkOnce(t *testing.T) {
	for name, producer := range producers(2) {
		t.Run(name, func(t *testing.T) {
			n, err := every(t, func() subject { return &gapless{t: t, window: 1 << 20} }, producer)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d interleavings", n)
		})
	}
}

// This is the control: the same test must find the fault that this project exists to prevent.
func TestControl_naiveReadThenSubscribe_losesAChunk(t *testing.T) {
	for name, producer := range producers(2) {
		t.Run(name, func(t *testing.T) {
			if _, err := every(t, func() subject { return &naive{} }, producer); err == nil {
				t.Fatal("no interleaving lost, doubled or reordered a chunk: this test shows nothing")
			} else {
				t.Logf("as expected: %v", err)
			}
		})
	}
}

func TestFeed_randomInterleavingsOfManyChunks_atAnyWindow(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.Int64Range(1, 12).Draw(rt, "chunks")
		all := producers(n)
		names := []string{"appended", "ours pushed first", "ours published first", "foreign pushed first", "foreign published first"}
		producer := all[rapid.SampledFrom(names).Draw(rt, "producer")]
		window := rapid.SampledFrom([]int{0, 1, 200, 1 << 20}).Draw(rt, "window")
		choices := rapid.SliceOfN(rapid.IntRange(0, 1<<16), 200, 200).Draw(rt, "choices")
		var failure error
		var trace string
		synctest.Test(t, func(t *testing.T) {
			i := 0
			trace, failure = play(&gapless{t: t, window: window}, producer, func(options []action) action {
				i++
				return options[choices[i%len(choices)]%len(options)]
			})
		})
		if failure != nil {
			rt.Fatalf("%s: %v", trace, failure)
		}
	})
}

// A chunk that is announced before it is pushed is found soon, not at the next reconciliation.
func TestFeed_announcedBeforePushed_looksAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		cfg := testConfig()
		cfg.Reconcile = time.Hour
		h := NewHub(cfg, log)
		defer h.Close()
		log.Push(`{"content":"one"}`)
		w := watch(t, h, Ask{Session: "s"})
		defer w.leave()
		synctest.Wait()
		log.Ack()
		synctest.Wait()
		log.Publish(`{"content":"two"}`)
		log.Deliver(0)
		time.Sleep(5 * time.Millisecond)
		log.Push(`{"content":"two"}`)
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		if err := w.check(log.Contents()); err != nil {
			t.Fatal(err)
		}
	})
}

// The feed stops searching for an announced chunk that is never pushed.
func TestFeed_announcedAndNeverPushed_givesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := NewHub(testConfig(), log)
		defer h.Close()
		w := watch(t, h, Ask{Session: "s"})
		defer w.leave()
		synctest.Wait()
		log.Ack()
		log.Publish(`{"content":"never"}`)
		log.Publish(storetest.Element(99, "never"))
		log.Deliver(0)
		log.Deliver(0)
		time.Sleep(time.Minute)
		before := log.Reads()
		time.Sleep(time.Minute)
		if n, most := log.Reads()-before, int(time.Minute/h.cfg.Reconcile)*3/2; n > most {
			t.Fatalf("%d reads in a minute, at most %d are reconciliations", n, most)
		}
	})
}

// Promise: Complete, with every message lost. Only latency suffers.
func TestFeed_allMessagesLost_delayIsTheReconcileInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := NewHub(testConfig(), log)
		defer h.Close()
		w := watch(t, h, Ask{Session: "s"})
		defer w.leave()
		synctest.Wait()
		log.Ack()
		time.Sleep(time.Second)
		for range 5 {
			log.Push(`{"content":"x"}`)
			time.Sleep(h.cfg.Reconcile)
			synctest.Wait()
			if err := w.check(log.Contents()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// Promise: Independent of the window.
func TestViewer_sameBytesAtAnyWindow(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		texts := rapid.SliceOfN(rapid.StringN(0, 300, 3000), 1, 60).Draw(rt, "texts")
		cursor := rapid.Int64Range(0, int64(len(texts))).Draw(rt, "cursor")
		var want string
		for _, window := range []int{1 << 30, 0, 1, 300, 5000} {
			var got string
			synctest.Test(t, func(t *testing.T) {
				log := &storetest.Log{}
				cfg := testConfig()
				cfg.Window = window
				h := NewHub(cfg, log)
				defer h.Close()
				for i, text := range texts {
					if i == len(texts)/2 {
						break
					}
					log.Append(text)
				}
				w := watch(t, h, Ask{Session: "s", Cursor: min(cursor, int64(len(texts)/2))})
				synctest.Wait()
				log.Ack()
				for _, text := range texts[len(texts)/2:] {
					synctest.Wait()
					log.Append(text)
					log.Deliver(0)
				}
				log.End()
				time.Sleep(2 * h.cfg.Reconcile)
				if cause := <-w.done; cause != Ended {
					t.Errorf("ended by %s", cause)
				}
				_, got, _ = strings.Cut(string(w.bytes()), "\n\n") // welcome names the connection
			})
			if want == "" {
				want = got
			}
			if got != want {
				rt.Fatalf("window %d gives\n%s\nnot\n%s", window, got, want)
			}
		}
	})
}

var _ Log = (*storetest.Log)(nil)
var _ store.Listener = (*naive)(nil)
