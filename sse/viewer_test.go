package sse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// started returns a hub on a log whose subscriptions are acknowledged.
func started(t *testing.T, cfg Config, log *storetest.Log) *Hub {
	h := NewHub(cfg, log)
	t.Cleanup(h.Close)
	return h
}

// now watches, with the subscription acknowledged.
func now(t *testing.T, h *Hub, log *storetest.Log, a Ask) *watcher {
	a.Session = "s"
	w := watch(t, h, a)
	synctest.Wait()
	if !log.Acked() {
		log.Ack()
		synctest.Wait()
	}
	return w
}

func names(events []event) string {
	var s []string
	for _, e := range events {
		name := e.name
		if name == "" {
			name = "chunk"
		}
		s = append(s, name+" "+e.id)
	}
	return strings.Join(s, ", ")
}

// This test compares the wire byte by byte.
func TestWire_isAsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		log.Push("not\nJSON")
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{Connection: "c1"})
		got := string(w.bytes())
		head, rest, _ := strings.Cut(got, "retry: ")
		retry, rest, _ := strings.Cut(rest, "\n")
		want := ":\nevent: welcome\n" +
			`data: {"type":"welcome","session":"s","epoch":"e1","first_seq":1,"last_seq":2,"cursor":0,"node":"test","connection":"c1"}` + "\n"
		if head != want || len(retry) != 4 {
			t.Errorf("it begins\n%s%q\nnot\n%s", head, retry, want)
		}
		want = "id: 0\n\n" +
			"data: {\"seq\":1,\"ts\":1795424741692,\"type\":\"delta\",\"content\":\"a\"}\nid: 1\n\n" +
			"data: {\"seq\":2,\"type\":\"foreign\",\"content\":\"not\\nJSON\"}\nid: 2\n\n"
		if rest != want {
			t.Errorf("it goes on\n%s\nnot\n%s", rest, want)
		}
		before := len(w.bytes())
		time.Sleep(h.cfg.Heartbeat)
		synctest.Wait()
		if beat := string(w.bytes()[before:]); beat != ":\n" {
			t.Errorf("a heartbeat is %q", beat)
		}
		w.leave()
	})
}

func TestViewer_heartbeats_onlyWhenSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		for range 10 {
			time.Sleep(h.cfg.Heartbeat - time.Second)
			log.Append("x")
			log.Deliver(0)
		}
		synctest.Wait()
		if n := bytes.Count(w.bytes(), []byte("\n:\n")); n != 0 {
			t.Errorf("%d heartbeats beside chunks", n)
		}
		time.Sleep(10*h.cfg.Heartbeat + time.Second)
		synctest.Wait()
		if n := strings.Count(string(w.bytes()), "\n:\n") + strings.Count(string(w.bytes()), ":\n:\n"); n < 9 {
			t.Errorf("%d heartbeats in ten intervals", n)
		}
		w.leave()
	})
}

// If the cursor is not in the log, the viewer gets a reset, and then what there is.
func TestViewer_cursorOutsideTheLog_isReset(t *testing.T) {
	for name, c := range map[string]struct {
		ask  Ask
		log  func(l *storetest.Log)
		want string
	}{
		"inside":                {Ask{Cursor: 2}, nil, "welcome 2, chunk 3, chunk 4"},
		"at the edge":           {Ask{Cursor: 4}, nil, "welcome 4"},
		"latest":                {Ask{Cursor: Latest}, nil, "welcome 4"},
		"ahead":                 {Ask{Cursor: 9}, nil, "welcome 9, reset 0, chunk 1, chunk 2, chunk 3, chunk 4"},
		"far ahead":             {Ask{Cursor: 9999999999999999}, nil, "welcome 9999999999999999, reset 0, chunk 1, chunk 2, chunk 3, chunk 4"},
		"unknown":               {Ask{Unknown: true}, nil, "welcome 0, reset 0, chunk 1, chunk 2, chunk 3, chunk 4"},
		"trimmed":               {Ask{Cursor: 1}, func(l *storetest.Log) { l.Trim(3) }, "welcome 1, reset 3, chunk 4"},
		"trimmed, at the start": {Ask{}, func(l *storetest.Log) { l.Trim(3) }, "welcome 0, reset 3, chunk 4"},
		"trimmed, just inside":  {Ask{Cursor: 3}, func(l *storetest.Log) { l.Trim(3) }, "welcome 3, chunk 4"},
		"all trimmed":           {Ask{Cursor: 3}, func(l *storetest.Log) { l.Trim(4) }, "welcome 3, reset 4"},
		"unknown and trimmed":   {Ask{Unknown: true}, func(l *storetest.Log) { l.Trim(3) }, "welcome 0, reset 3, chunk 4"},
	} {
		for _, window := range []int{0, 1 << 20} {
			t.Run(fmt.Sprint(name, "/", window), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					log := &storetest.Log{}
					for range 4 {
						log.Append("x")
					}
					if c.log != nil {
						c.log(log)
					}
					cfg := testConfig()
					cfg.Window = window
					w := now(t, started(t, cfg, log), log, c.ask)
					if got := names(w.events()); got != c.want {
						t.Errorf("%s, not %s", got, c.want)
					}
					w.leave()
				})
			})
		}
	}
}

func TestViewer_sessionThatDoesNotExist(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := started(t, testConfig(), log)
		fresh, ahead := now(t, h, log, Ask{}), now(t, h, log, Ask{Cursor: 5})
		log.Append("a")
		log.Deliver(0)
		synctest.Wait()
		if got := names(fresh.events()); got != "welcome 0, chunk 1" {
			t.Error(got)
		}
		if got := names(ahead.events()); got != "welcome 5, reset 0, chunk 1" {
			t.Error(got)
		}
		fresh.leave()
		ahead.leave()
	})
}

// A cursor from a node that is ahead of this one is not ahead of the log.
func TestViewer_nodeIsBehind_looksBeforeItSaysAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		first := now(t, h, log, Ask{})
		log.Append("b") // announced to other nodes, and not yet to this one
		w := now(t, h, log, Ask{Cursor: 2})
		if got := names(w.events()); got != "welcome 2" {
			t.Error(got)
		}
		w.leave()
		first.leave()
	})
}

// Promise: Ends, once and for good.
// A Raw viewer waits for the end of a message of which it received something, not for an earlier
// end.
func TestViewer_untilDone_ofEventsAlone(t *testing.T) {
	for _, window := range []int{0, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			for _, e := range []string{`{"content":"a"}`, `{"type":"done"}`, `{"raw":"x"}`, `{"content":"b"}`, `{"type":"done"}`, `{"raw":"y"}`} {
				log.Push(e)
			}
			cfg := testConfig()
			cfg.Window = window
			h := started(t, cfg, log)
			for cursor, want := range map[int64]string{0: "chunk 3", 3: "", 5: "chunk 6"} {
				w := now(t, h, log, Ask{Cursor: cursor, UntilDone: true, Raw: true})
				if got := names(w.events()); got != want {
					t.Errorf("from %d: %s, not %s", cursor, got, want)
				}
				if cursor == 5 {
					w.leave()
				} else if cause := <-w.done; cause != Done {
					t.Error(cursor, cause)
				}
			}
		})
	}
}

// A viewer does not get a log from before the epoch that its caller knows of, either.
func TestViewer_nodeDoesNotKnowTheEpoch_looksFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		now(t, h, log, Ask{}).leave()
		log.Replace(storetest.Element(1, "b")) // another epoch begins, and this node has not heard of it
		if err := log.Renew(t.Context(), "s", "e1", 1); err != nil {
			t.Fatal(err)
		}
		p, err := log.Read(t.Context(), "s", 0, all, all)
		if err != nil || p.Epoch == "e1" {
			t.Fatal(p.Epoch, err)
		}
		w := now(t, h, log, Ask{Epoch: p.Epoch})
		if got, want := names(w.events()), fmt.Sprintf("welcome 0, reset %d, chunk %d", p.First-1, p.First); got != want || w.take(w.events()) != nil || len(w.resets) != 1 || w.resets[0] != "trimmed" {
			t.Errorf("%s, not %s: %v", got, want, w.resets)
		}
		w.leave()
	})
}

func TestViewer_endOfTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		end := `{"seq":2,"ts":1795424741692,"type":"end"}`
		log.Push(end)
		log.End()
		log.Publish(end)
		log.Deliver(0)
		if cause := <-w.done; cause != Ended || !cause.Clean() {
			t.Error(cause)
		}
		if got := names(w.events()); got != "welcome 0, chunk 1, chunk 2" {
			t.Error(got)
		}
		for cursor, want := range map[int64]Cause{0: "", 1: "", 2: Ended, 3: "", Latest: Ended} {
			v, err := h.View(Ask{Session: "s", Cursor: cursor})
			if err != nil {
				t.Fatal(err)
			}
			if got := v.Over(t.Context(), time.Minute); got != want {
				t.Errorf("over at %d: %q", cursor, got)
			}
			v.Close()
		}
	})
}

// A chunk that looks like the end, and was copied or forged, ends nothing. The log has ended when
// the store says so.
func TestViewer_whatLooksLikeTheEnd_endsNothing(t *testing.T) {
	for _, window := range []int{0, 1 << 20} {
		for _, live := range []bool{false, true} {
			t.Run(fmt.Sprint(window, live), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					log := &storetest.Log{}
					log.Append("a")
					end := `{"seq":2,"ts":1795424741692,"type":"end"}`
					if !live {
						log.Push(end)
						log.Append("b")
					}
					cfg := testConfig()
					cfg.Window = window
					h := started(t, cfg, log)
					ended := false
					fold := func(b, events []byte, end bool) ([]byte, bool) {
						ended = ended || end
						return append(b, events...), end
					}
					all := map[string]*watcher{}
					view := func() {
						all["until done"] = now(t, h, log, Ask{UntilDone: true})
						all["snapshot"] = now(t, h, log, Ask{Snapshot: true})
						all["snapshot, until done"] = now(t, h, log, Ask{Snapshot: true, UntilDone: true})
						all["fold"] = plainly(t, h, log, Ask{Fold: fold})
					}
					view()
					if live {
						log.Push(end)
						log.Publish(end)
						log.Deliver(0)
						log.Append("b")
						log.Deliver(0)
					}
					time.Sleep(time.Minute)
					check := func(over bool, last string) {
						t.Helper()
						for name, w := range all {
							select {
							case cause := <-w.done:
								if !over || !cause.Clean() {
									t.Errorf("%s is over by %s", name, cause)
								}
								w.done <- cause
							default:
								if over {
									t.Errorf("%s is not over", name)
								}
							}
							if got := w.events(); len(got) == 0 || got[len(got)-1].id != last {
								t.Errorf("%s has %s", name, names(got))
							}
							if err := w.take(w.events()); err != nil || w.said != nil && w.said.Ended {
								t.Errorf("%s: %v, or a snapshot says that the log has ended", name, err)
							}
						}
					}
					if check(false, "3"); ended {
						t.Error("the fold is told that the log has ended")
					}
					log.Push(`{"seq":4,"ts":1795424741692,"type":"end"}`)
					log.End()
					time.Sleep(time.Minute)
					if check(true, "4"); !ended {
						t.Error("the fold is not told that the log has ended")
					}
					w := now(t, h, log, Ask{Snapshot: true})
					if err := w.take(w.events()); err != nil || w.said == nil || !w.said.Ended {
						t.Errorf("%v, or no snapshot says that the log has ended: %+v", err, w.said)
					}
					<-w.done
				})
			})
		}
	}
}

// A viewed log is read before it expires, however soon that is, and no more often than needed.
func TestHub_logThatIsViewedIsReadBeforeItExpires(t *testing.T) {
	for _, c := range []struct{ kept, reconcile time.Duration }{
		{time.Second, 2 * time.Second}, {time.Second, 10 * time.Second}, {3 * time.Second, 2 * time.Second}, {24 * time.Hour, 2 * time.Second}, {0, 2 * time.Second},
		{876_000 * time.Hour, time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			log := &timed{Log: &storetest.Log{}}
			cfg := testConfig()
			cfg.Kept, cfg.Reconcile = c.kept, c.reconcile
			h := NewHub(cfg, log)
			defer h.Close()
			log.Append("a")
			w := watch(t, h, Ask{Session: "s"})
			synctest.Wait()
			log.Ack()
			time.Sleep(time.Minute)
			w.leave()
			least, most := c.reconcile/2, c.reconcile
			if c.kept > 0 && c.kept < 3*c.reconcile {
				least, most = c.kept/6, c.kept/2
			}
			longest := time.Duration(0)
			log.mu.Lock()
			defer log.mu.Unlock()
			for i := range len(log.at) - 1 {
				longest = max(longest, log.at[i+1].Sub(log.at[i]))
			}
			if n := len(log.at); longest > most || n > int(time.Minute/least)+3 {
				t.Errorf("%+v: it is read %d times in a minute, after %v at the latest", c, n, longest)
			}
		})
	}
}

// timed is a log that records when it was read.
type timed struct {
	*storetest.Log
	mu sync.Mutex
	at []time.Time
}

func (l *timed) Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error) {
	l.mu.Lock()
	l.at = append(l.at, time.Now())
	l.mu.Unlock()
	return l.Log.Read(ctx, session, from, bytes, count)
}

// A viewer that cannot get a reset begins at the first chunk that is kept, while it has received
// nothing. That holds in any epoch, after a trim, and during one.
func TestViewer_thatCannotBeTold_beginsWhereTheLogDoes(t *testing.T) {
	push := func(log *storetest.Log, n int) {
		for range n {
			first, list := log.Contents()
			log.Push(fmt.Sprintf(`{"seq":%d,"ts":1795424741692,"raw":"x"}`, first+int64(len(list)))) // not announced: it is read when all is there
		}
	}
	another := func(log *storetest.Log) {
		log.Replace()
		push(log, 3)
		if err := log.Renew(t.Context(), "s", "e1", 9); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		before func(log *storetest.Log) // runs while it views
		after  func(log *storetest.Log) // runs after it has received everything
		more   bool                     // whether it also gets what comes after
	}{
		"trimmed":                     {func(log *storetest.Log) { push(log, 6); log.Trim(3) }, nil, true},
		"all trimmed":                 {func(log *storetest.Log) { push(log, 6); log.Trim(6) }, func(log *storetest.Log) { push(log, 2) }, true},
		"another epoch":               {func(log *storetest.Log) { push(log, 6); another(log) }, nil, true},
		"another epoch, trimmed":      {func(log *storetest.Log) { push(log, 6); another(log); log.Trim(2) }, nil, true},
		"nothing yet, then trimmed":   {func(*storetest.Log) {}, func(log *storetest.Log) { push(log, 6); log.Trim(3) }, true},
		"nothing yet, then trimmed 2": {func(*storetest.Log) {}, func(log *storetest.Log) { push(log, 1); log.Trim(1); push(log, 2); log.Trim(1); push(log, 2) }, true},
		"nothing of it, then another": {func(log *storetest.Log) { push(log, 1); log.Trim(1) }, another, true},
		"something, then another":     {func(log *storetest.Log) { push(log, 6) }, another, false},
	} {
		for _, window := range []int{0, 1, 1 << 20} {
			for _, raw := range []bool{false, true} {
				t.Run(fmt.Sprint(name, "/", window, "/", raw), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						log := &storetest.Log{}
						c.before(log)
						cfg := testConfig()
						cfg.Window = window
						h := started(t, cfg, log)
						ask := Ask{Raw: raw}
						if !raw {
							ask.Fold = func(b, events []byte, _ bool) ([]byte, bool) {
								for seq, chunk := range Chunks(events) {
									b = fmt.Appendf(b, "data: %s\nid: %d\n\n", chunk, seq)
								}
								return b, false
							}
						}
						w := plainly(t, h, log, ask)
						if c.after != nil {
							synctest.Wait() // nothing is being read
							c.after(log)
							log.Ack() // read it
							time.Sleep(time.Minute)
						}
						first, list := log.Contents()
						want := make([]string, len(list))
						for i := range list {
							want[i] = fmt.Sprint("chunk ", first+int64(i))
						}
						got := names(w.events())
						if ok := got == strings.Join(want, ", "); ok != c.more {
							t.Errorf("it was given %s of %s", got, want)
						}
						if cause := w.leave(); (cause == Gone) != c.more {
							t.Error(cause)
						}
					})
				})
			}
		}
	}
}

// A viewer that receives nothing is overtaken by a log that is trimmed as fast as it grows, and
// still begins.
func TestViewer_thatCannotBeTold_isNotOvertakenForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		seq := 0
		grow := func(n int) {
			for range n {
				seq++
				log.Push(fmt.Sprintf(`{"seq":%d,"ts":1795424741692,"raw":%q}`, seq, strings.Repeat("x", 1000)))
			}
		}
		grow(100)
		cfg := testConfig()
		cfg.Window, cfg.WindowTotal = 0, 0
		h := started(t, cfg, log)
		log.Hold()
		w := plainly(t, h, log, Ask{Raw: true})
		for i := range 20 { // whenever it has learned where the log begins, that part is trimmed
			for log.Asked() {
				log.Snapshot()
				log.Reply()
				synctest.Wait()
			}
			if i < 10 {
				grow(10)
				log.Trim(10)
			}
			time.Sleep(time.Second)
		}
		log.Release()
		time.Sleep(time.Minute)
		events := w.events()
		if len(events) == 0 || events[len(events)-1].id != fmt.Sprint(seq) {
			t.Errorf("it was given %d events of %d", len(events), seq)
		}
		for i := range events {
			if events[i].id != fmt.Sprint(seq-len(events)+1+i) {
				t.Fatalf("there is a hole: %s", names(events))
			}
		}
		if cause := w.leave(); cause != Gone {
			t.Error(cause)
		}
	})
}

// plainly is now for a viewer whose connection is never taken over.
func plainly(t *testing.T, h *Hub, log *storetest.Log, a Ask) *watcher {
	t.Helper()
	a.Session = "s"
	v, err := h.View(a)
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{sink: &sink{}, done: make(chan Cause, 1)}
	ctx, cut := context.WithCancel(t.Context())
	w.cut = cut
	r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	out := h.NewWriter(w.sink, r)
	go func() {
		defer v.Close()
		cause := v.Serve(ctx, out)
		out.leaveQuietly()
		w.done <- cause
	}()
	synctest.Wait()
	if !log.Acked() {
		log.Ack()
	}
	time.Sleep(time.Minute)
	return w
}

// Promise: Ends. A viewer that reconnects with the end's number gets a 204 as soon as the end was
// given out, although the log has not been read since. A viewer that reconnects in the middle of an
// answer costs no read.
func TestViewer_endThatWasOnlyHeard_isTheEnd(t *testing.T) {
	for name, c := range map[string]struct {
		last   string // heard live
		ends   bool   // whether it ends the log
		more   bool   // whether another chunk is heard after it
		cursor int64
		want   Cause
		reads  int // reads that the viewer costs, besides the one that the feed makes anyway
	}{
		"the end":                   {`{"seq":3,"ts":1795424741692,"type":"end"}`, true, false, 3, Ended, 1},
		"the end, by latest":        {`{"seq":3,"ts":1795424741692,"type":"end"}`, true, false, Latest, Ended, 1},
		"a chunk after the end":     {`{"seq":3,"ts":1795424741692,"type":"end"}`, true, true, 4, Ended, 1},
		"before the end":            {`{"seq":3,"ts":1795424741692,"type":"end"}`, true, false, 2, "", 0},
		"what looks like the end":   {`{"seq":3,"ts":1795424741692,"type":"end"}`, false, false, 3, "", 1},
		"the end of a message":      {`{"seq":3,"ts":1795424741692,"type":"done"}`, false, false, 3, "", 1},
		"in the middle":             {storetest.Element(3, "c"), false, false, 3, "", 0},
		"in the middle, by latest":  {storetest.Element(3, "c"), false, false, Latest, "", 0},
		"in the middle, and behind": {storetest.Element(3, "c"), false, true, 3, "", 0},
	} {
		for _, window := range []int{0, 1 << 20} {
			t.Run(fmt.Sprint(name, "/", window), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					log := &storetest.Log{}
					log.Append("a")
					log.Push(`{"seq":2,"ts":1795424741692,"type":"done","message_id":"m"}`)
					cfg := testConfig()
					cfg.Window = window
					h := started(t, cfg, log)
					w := now(t, h, log, Ask{Cursor: Latest})
					log.Hold()
					push := func(element string) {
						log.Push(element)
						log.Publish(element)
						log.Deliver(0)
						synctest.Wait()
					}
					if push(c.last); c.ends {
						log.End()
					}
					if c.more {
						push(storetest.Element(4, "d"))
					}
					if got := h.feeds["s"].window.Load().Last; got != map[bool]int64{false: 3, true: 4}[c.more] {
						t.Fatalf("the node knows of %d chunks", got)
					}
					own := log.Reads()
					v, err := h.View(Ask{Session: "s", Cursor: c.cursor})
					if err != nil {
						t.Fatal(err)
					}
					defer v.Close()
					over := make(chan Cause, 1)
					go func() { over <- v.Over(t.Context(), time.Second) }()
					synctest.Wait()
					log.Release()
					if got := <-over; got != c.want {
						t.Errorf("over by %q, not %q", got, c.want)
					}
					synctest.Wait()
					if got := log.Reads() - own; got > c.reads && window > 0 {
						t.Errorf("it costs %d reads, not %d", got, c.reads)
					}
					w.leave()
				})
			})
		}
	}
}

func TestViewer_untilDone_endsBehindTheNextEndOfAMessage(t *testing.T) {
	for _, window := range []int{0, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			for _, e := range []string{`{"content":"a"}`, `{"type":"done"}`, `{"content":"b"}`, `{"content":"c","is_complete":true}`, `{"content":"d"}`} {
				log.Push(e)
			}
			cfg := testConfig()
			cfg.Window = window
			h := started(t, cfg, log)
			for cursor, want := range map[int64]string{0: "welcome 0, chunk 1, chunk 2", 2: "welcome 2, chunk 3, chunk 4"} {
				w := now(t, h, log, Ask{Cursor: cursor, UntilDone: true})
				if cause := <-w.done; cause != Done || !cause.Clean() || names(w.events()) != want {
					t.Error(window, cause, names(w.events()))
				}
			}
			w := now(t, h, log, Ask{Cursor: 4, UntilDone: true})
			if got := names(w.events()); got != "welcome 4, chunk 5" {
				t.Error(got)
			}
			w.leave()
		})
	}
}

// Viewers leave one by one, and none by a clean end.
func TestHub_drain_spreadsViewers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := NewHub(testConfig(), log)
		defer h.Close()
		const n = 100
		var all []*watcher
		for range n {
			all = append(all, now(t, h, log, Ask{}))
		}
		begun := time.Now()
		go h.Drain(10 * time.Second)
		synctest.Wait()
		if _, err := h.View(Ask{Session: "s"}); !errors.Is(err, ErrDraining) {
			t.Error("a new viewer was let in")
		}
		var tenths [11]int
		for range n {
			time.Sleep(10 * time.Second / n)
			synctest.Wait()
			for i, w := range all {
				if w == nil {
					continue
				}
				select {
				case cause := <-w.done:
					if cause != Shutdown || cause.Clean() {
						t.Error(cause)
					}
					tenths[int(time.Since(begun)/time.Second)]++
					all[i] = nil
				default:
				}
			}
		}
		left := 0
		for _, k := range tenths {
			left += k
			if k > n/3 {
				t.Errorf("not spread: %v", tenths)
			}
		}
		if left != n {
			t.Errorf("%d of %d have left in time", left, n)
		}
	})
}

// A viewer is held while Redis is unreachable, even from the beginning.
func TestViewer_redisAway_isHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &flaky{Log: &storetest.Log{}}
		log.Append("a")
		log.set(true)
		cfg := testConfig()
		cfg.Window = 0 // every chunk comes from a read
		h := NewHub(cfg, log)
		defer h.Close()
		v, err := h.View(Ask{Session: "s"})
		if err != nil {
			t.Fatal(err)
		}
		if v.Over(t.Context(), time.Second) != "" {
			t.Error("over, without knowing")
		}
		v.Close()
		w := watch(t, h, Ask{Session: "s"})
		synctest.Wait()
		log.Ack()
		time.Sleep(time.Hour)
		if got := string(w.bytes()); strings.Trim(got, ":\n") != "" || len(got) < 100 {
			t.Errorf("held, it got %q", got)
		}
		log.set(false)
		time.Sleep(5 * time.Second)
		if got := names(w.events()); got != "welcome 0, chunk 1" {
			t.Error(got)
		}
		log.set(true)
		log.Append("b")
		time.Sleep(time.Hour)
		log.set(false)
		time.Sleep(5 * time.Second)
		if got := names(w.events()); got != "welcome 0, chunk 1, chunk 2" {
			t.Error(got)
		}
		w.leave()
	})
}

// Feeds outlive their last viewer a little, and are then dropped.
func TestFeed_lingers_thenLetsGoOfItsSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		now(t, h, log, Ask{}).leave()
		time.Sleep(h.cfg.Linger / 2)
		w := now(t, h, log, Ask{})
		if got := names(w.events()); got != "welcome 0, chunk 1" {
			t.Error(got)
		}
		time.Sleep(3 * h.cfg.Linger)
		if !log.Listening() || h.Viewers("s") != 1 {
			t.Error("let go under a viewer")
		}
		w.leave()
		time.Sleep(h.cfg.Linger + time.Second)
		synctest.Wait()
		if log.Listening() || len(h.feeds) != 0 {
			t.Error("never let go")
		}
	})
}

// At the limit of feeds, the longest idle one makes room. A feed with viewers does not.
func TestHub_idleFeedsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		cfg := testConfig()
		cfg.Feeds = 3
		h := started(t, cfg, log)
		view := func(session string) *watcher {
			w := watch(t, h, Ask{Session: session})
			synctest.Wait()
			log.Ack()
			synctest.Wait()
			return w
		}
		stays := view("stays")
		view("b").leave()
		time.Sleep(h.cfg.Linger / 10)
		view("a").leave()
		w := view("c")
		synctest.Wait()
		if h.feeds["b"] != nil || h.feeds["a"] == nil || len(h.feeds) != 3 {
			t.Errorf("the feeds are %v", slices.Sorted(maps.Keys(h.feeds)))
		}
		again := view("a") // no longer idle
		if v, err := h.View(Ask{Session: "d"}); !errors.Is(err, ErrFull) {
			t.Errorf("%v, %v", v, err)
		}
		again.leave()
		view("d").leave()
		stays.leave()
		w.leave()
	})
}

// The feed of a session that does not exist is dropped with its last viewer.
func TestHub_nothingLingersForAnAbsentLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := started(t, testConfig(), log)
		one, other := now(t, h, log, Ask{}), now(t, h, log, Ask{})
		one.leave()
		if synctest.Wait(); len(h.feeds) != 1 {
			t.Error("let go under a viewer")
		}
		other.leave()
		if synctest.Wait(); len(h.feeds) != 0 || log.Listening() {
			t.Error("it lingers")
		}
	})
}

// One read of the history serves all viewers that come at once.
func TestHub_storm_oneHistoryRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for range 500 {
			log.Append("a few words")
		}
		h := started(t, testConfig(), log)
		var all []*watcher
		for range 200 {
			all = append(all, watch(t, h, Ask{Session: "s"}))
		}
		synctest.Wait()
		log.Ack()
		synctest.Wait()
		if n := log.Reads(); n != 1 {
			t.Errorf("%d reads", n)
		}
		for _, w := range all {
			if err := w.check(log.Contents()); err != nil {
				t.Fatal(err)
			}
			w.leave()
		}
	})
}

// Promise: Independent. A stalled viewer holds one segment, and delays nobody.
func TestViewer_stalled_delaysNobodyAndGetsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		cfg := testConfig()
		cfg.Window = 4 << 10
		h := started(t, cfg, log)
		fast, slow := now(t, h, log, Ask{}), now(t, h, log, Ask{})
		stall := make(chan struct{})
		slow.sink.mu.Lock()
		slow.sink.stall, slow.sink.deadline = stall, time.Now().Add(time.Hour)
		slow.sink.mu.Unlock()
		for i := range 500 {
			log.Append(fmt.Sprint("chunk ", i))
			log.Deliver(0)
			time.Sleep(time.Millisecond)
			if events, _ := parse(fast.bytes()); len(events) != i+2 {
				t.Fatalf("the fast one has %d events after %d chunks", len(events), i+1)
			}
		}
		close(stall)
		time.Sleep(time.Second)
		if err := slow.check(log.Contents()); err != nil {
			t.Fatal(err)
		}
		fast.leave()
		slow.leave()
	})
}

func TestWriter_namesWhyAWriteFailed(t *testing.T) {
	for err, want := range map[error]Cause{os.ErrDeadlineExceeded: Slow, errors.New("broken pipe"): Gone} {
		w := &Writer{left: make(chan struct{}), err: fmt.Errorf("write: %w", err)}
		if got := w.cause(); got != want {
			t.Errorf("%v: %s", err, got)
		}
	}
}

// A socket that takes nothing for the write timeout is given up.
func TestWriter_socketTakesNothing_isSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		w.sink.mu.Lock()
		w.sink.stall, w.sink.deadline = make(chan struct{}), time.Now().Add(time.Hour)
		w.sink.mu.Unlock()
		log.Append("a")
		log.Deliver(0)
		begun := time.Now()
		if cause := <-w.done; cause != Slow || cause.Clean() {
			t.Error(cause)
		}
		if took := time.Since(begun); took < h.cfg.WriteTimeout || took > 2*h.cfg.WriteTimeout {
			t.Errorf("after %v", took)
		}
	})
}

// flaky is a log that is unreachable at times.
type flaky struct {
	*storetest.Log
	away atomic.Bool
}

func (f *flaky) set(away bool) { f.away.Store(away) }

func (f *flaky) Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error) {
	if f.away.Load() {
		return store.Page{}, store.ErrAway
	}
	return f.Log.Read(ctx, session, from, bytes, count)
}

// Property: memory returns exactly what was put in, within its limit, from any cursor.
func TestMemory_givesWhatWasPutIn(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		limit := rapid.SampledFrom([]int{0, 1, 100, 1000, 50_000, 1 << 30}).Draw(rt, "limit")
		texts := rapid.SliceOfN(rapid.StringN(0, 2000, 20000), 1, 80).Draw(rt, "texts")
		m, older, events := newMemory(1), []memory{}, [][]byte{}
		for i, text := range texts {
			m.append(text, limit)
			older = append(older, m)
			e, _ := appendEvent(nil, int64(i+1), text)
			events = append(events, e)
			if m.size > limit && limit > 0 && len(m.full) > 0 {
				rt.Fatalf("%d bytes are kept, %d allowed", m.size, limit)
			}
		}
		for n, m := range older { // older ones, too: they do not see what was appended later
			for cursor := int64(0); cursor <= int64(n+1); cursor++ {
				got, last, _, ok := m.after(cursor, 1<<40, false)
				if ok != (cursor+1 >= m.firstSeq()) {
					rt.Fatalf("memory from %d has what follows %d: %t", m.firstSeq(), cursor, ok)
				}
				if !ok {
					continue
				}
				if want := bytes.Join(events[cursor:last], nil); !bytes.Equal(got, want) || last > int64(n+1) || cursor < int64(n+1) && last == cursor {
					rt.Fatalf("after %d up to %d of %d: %q", cursor, last, n+1, got)
				}
			}
		}
	})
}

// Whatever an element contains, its event is one event, and says what the element says.
func FuzzEvent(f *testing.F) {
	for _, s := range []string{`{"a":1}`, "x\n\nid: 9\ndata: y", "\r", "data: \xff", "", "{\"a\":\"\u2028\"}", "\x00", "\ufeff{}"} {
		f.Add(int64(7), s)
	}
	f.Fuzz(func(t *testing.T, seq int64, element string) {
		if seq < 0 {
			return
		}
		before, _ := appendEvent(nil, 1, `{"before":1}`)
		b, _ := appendEvent(bytes.Clone(before), seq, element)
		if bytes.ContainsRune(b, '\r') {
			t.Fatalf("%q", b)
		}
		events, rest := parse(b)
		if len(events) != 2 || len(rest) != 0 || events[1].id != fmt.Sprint(seq) || events[1].name != "" {
			t.Fatalf("%q became %q", element, b)
		}
		if want := encoded(seq, element); events[1].data != want {
			t.Fatalf("%q became %q", element, events[1].data)
		}
		if !bytes.HasSuffix(b, fmt.Appendf(nil, "\nid: %d\n\n", seq)) {
			t.Fatalf("id is not the last line: %q", b)
		}
	})
}

// A stalled viewer leaves on time nevertheless.
func TestHub_drain_stalledViewer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := NewHub(testConfig(), log)
		defer h.Close()
		w := now(t, h, log, Ask{})
		w.sink.mu.Lock()
		w.sink.stall, w.sink.deadline = make(chan struct{}), time.Now().Add(time.Hour)
		w.sink.mu.Unlock()
		log.Append("a")
		log.Deliver(0)
		synctest.Wait()
		begun := time.Now()
		h.Drain(5 * time.Second)
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
		if cause := <-w.done; cause != Shutdown {
			t.Error(cause)
		}
	})
}

// The log was trimmed, and a node heard nothing of it. The viewer gets one reset, not an endless
// exchange between what the feed knows and what the log says.
func TestViewer_trimmedBeyondTheWindow_oneReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for range 10 {
			log.Append("a")
		}
		cfg := testConfig()
		cfg.Window = 0
		h := started(t, cfg, log)
		w := now(t, h, log, Ask{Cursor: 10})
		log.Disconnect()
		for range 50 {
			log.Append("b")
		}
		log.Trim(40)
		back := now(t, h, log, Ask{Cursor: 5})
		time.Sleep(2 * h.cfg.Reconcile)
		for _, v := range []*watcher{w, back} {
			if err := v.check(log.Contents()); err != nil || len(v.resets) != 1 {
				t.Error(err, v.resets)
			}
			v.leave()
		}
	})
}

// A viewer that has caught up holds nothing of the history.
func TestViewer_caughtUp_keepsNoPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for range 3000 {
			log.Append("some words")
		}
		cfg := testConfig()
		cfg.Window = 4 << 10
		h := started(t, cfg, log)
		v, err := h.View(Ask{Session: "s"})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		ctx, cut := context.WithCancel(t.Context())
		out := &sink{}
		r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
		done := make(chan Cause)
		go func() {
			w := h.NewWriter(out, r)
			defer w.leaveQuietly()
			done <- v.Serve(ctx, w)
		}()
		synctest.Wait()
		log.Ack()
		synctest.Wait()
		cut()
		<-done
		if v.Cursor != 3000 || v.hand != nil {
			t.Errorf("at %d it keeps %v", v.Cursor, v.hand != nil)
		}
	})
}

// A read that finds nothing new wakes nobody.
func TestFeed_reconciles_wakesNobodyForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		before, reads := h.feeds["s"].window.Load(), log.Reads()
		time.Sleep(time.Minute)
		if n := log.Reads() - reads; n < 25 {
			t.Errorf("only %d reads in a minute", n)
		}
		if h.feeds["s"].window.Load() != before {
			t.Error("there is a new window, and nothing new in it")
		}
		w.leave()
	})
}

// After the end of a response, its connection belongs to another request. A node that drains leaves
// it alone.
func TestWriter_leaveBehindTheEnd_touchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := started(t, testConfig(), &storetest.Log{})
		out := &sink{}
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		w := h.NewWriter(out, r)
		if err := w.End(Done); err != nil {
			t.Fatal(err)
		}
		w.leave(Shutdown)
		if !out.deadline.IsZero() {
			t.Error("a deadline was set on a connection that is not its own any more")
		}
	})
}
