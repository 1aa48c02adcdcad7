package sse

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gapless/store/storetest"
)

// seated is a viewer on a connection that was taken over.
func seated(t *testing.T, h *Hub, a Ask) *watcher {
	t.Helper()
	a.Session = "s"
	v, err := h.View(a)
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{sink: &sink{taken: true}, done: make(chan Cause, 1)}
	w.cut = w.sink.leave
	h.sit(v, w.sink, []byte{}, nil, 0, Told{func() {}, func(c Cause, _ bool) { w.done <- c }})
	return w
}

// hear waits until a log's subscription stands.
func hear(log *storetest.Log) {
	for !log.Listening() {
		time.Sleep(time.Millisecond)
	}
	log.Ack()
}

// Viewers come and find everything, while a goroutine walks along the row with a slightly older
// window. No viewer gets an older window than the one that it has seen.
func TestSeat_sittingDownWhileSomebodyGoesAlong(t *testing.T) {
	log := &storetest.Log{}
	log.Append("a")
	h := started(t, testConfig(), log)
	const rows = 200 // more than one walk serves without a pause
	var all []*watcher
	take := func(a Ask) *watcher { return seated(t, h, a) }
	for range rows {
		all = append(all, take(Ask{}))
	}
	hear(log)
	over, stop := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		for over.Err() == nil {
			log.Append("b")
			log.Deliver(0)
			time.Sleep(100 * time.Microsecond)
		}
	})
	var mu sync.Mutex
	for range 4 {
		wg.Go(func() {
			for over.Err() == nil {
				w := take(Ask{Cursor: Latest})
				time.Sleep(time.Millisecond)
				w.sink.leave()
				<-w.done
				mu.Lock()
				all = append(all, w)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, w := range all {
		if w.sink.closed {
			w.done <- Gone
		}
		w.sink.leave()
		<-w.done
		if err := w.take(w.events()); err != nil || len(w.resets) > 0 {
			t.Fatal(err, w.resets)
		}
	}
	_, elements := log.Contents()
	t.Logf("%d viewers came and went, %d chunks", len(all)-rows, len(elements))
}

// A socket that fills up at any byte changes neither what the viewer gets nor how its response
// ends.
func TestSeat_socketIsFullAtAnyByte(t *testing.T) {
	for _, a := range []Ask{{Session: "s"}, {Session: "s", UntilDone: true}, {Session: "s", Snapshot: true}} {
		begins := map[bool]string{false: "data: {\"seq", true: "event: snapshot"}[a.Snapshot]
		view := func(room int) (body string, cause Cause, raw int) {
			synctest.Test(t, func(t *testing.T) {
				log := &storetest.Log{}
				log.Append("a")
				log.Push(`{"seq":2,"ts":1795424741692,"type":"done","message_id":"m"}`)
				log.Append(strings.Repeat("long ", 4000)) // more than a piece
				log.Append("b")
				log.End()
				h := started(t, testConfig(), log)
				v, err := h.View(a)
				if err != nil {
					t.Fatal(err)
				}
				out := &sink{taken: true, room: room}
				done := make(chan Cause, 1)
				h.sit(v, out, []byte{}, nil, time.Hour, Told{func() {}, func(c Cause, _ bool) { done <- c }})
				synctest.Wait()
				log.Ack()
				synctest.Wait()
				select {
				case cause = <-done:
				default:
					t.Errorf("with room for %d bytes the response has not ended", room)
					out.leave()
					<-done
				}
				body, raw = string(out.bytes()), len(out.body)
				if !strings.HasSuffix(string(out.body), "\r\n"+lastFrame) {
					t.Errorf("with room for %d bytes it ends with %q", room, out.body[max(0, len(out.body)-20):])
				}
			})
			return body, cause, raw
		}
		want, end, length := view(1 << 20)
		chunks := want[strings.Index(want, begins):] // welcome contains another retry each time
		if wanted := map[bool]Cause{false: Ended, true: Done}[a.UntilDone]; end != wanted {
			t.Fatalf("it ended by %s", end)
		}
		for room := 7; room < length; room++ {
			if length > 2000 && room > 400 && room < length-400 && room%997 != 0 {
				continue // inside the long one
			}
			got, cause, _ := view(room)
			if got = got[max(strings.Index(got, begins), 0):]; got != chunks || cause != end {
				t.Fatalf("with room for %d bytes, %s: %d bytes, not %d", room, cause, len(got), len(chunks))
			}
		}
	}
}

// Promise: no silence on a connection is longer than a heartbeat interval. That includes a viewer
// that has just left the row for a page which does not come.
func TestSeat_waitingForAPageIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		cfg := testConfig()
		cfg.Window, cfg.WindowTotal = 0, 0
		h := started(t, cfg, log)
		w := seated(t, h, Ask{})
		synctest.Wait()
		log.Ack()
		time.Sleep(3 * time.Second)
		size, at, longest := len(w.bytes()), time.Now(), time.Duration(0)
		pass := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); {
				time.Sleep(100 * time.Millisecond)
				synctest.Wait()
				if n := len(w.bytes()); n != size {
					size, at = n, time.Now()
				}
				longest = max(longest, time.Since(at))
			}
		}
		pass(cfg.Heartbeat)                                  // one heartbeat
		pass(cfg.Heartbeat - 1*time.Second - time.Since(at)) // nearly the next
		log.Hold()                                           // Redis is slow
		log.Append("b")
		log.Deliver(0)
		pass(3 * cfg.Heartbeat)
		if longest > cfg.Heartbeat+time.Second {
			t.Errorf("it was silent for %v", longest)
		}
		log.Release()
		w.sink.leave()
		<-w.done
	})
}

// A response that lacks only the last frame is given up, too, when its peer takes nothing.
func TestSeat_lastFrameIsNotWaitedForForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		w := seated(t, h, Ask{})
		synctest.Wait()
		log.Ack()
		time.Sleep(3 * time.Second)
		w.sink.mu.Lock()
		w.sink.stall = make(chan struct{})
		w.sink.mu.Unlock()
		log.End()
		time.Sleep(3 * h.cfg.WriteTimeout)
		select {
		case <-w.done:
		default:
			t.Errorf("it is waited for for %v, and the write timeout is %v", 3*h.cfg.WriteTimeout, h.cfg.WriteTimeout)
			close(w.sink.stall)
			<-w.done
		}
	})
}

// A row in which viewers come and go all the time has at most twice as many seats as viewers.
func TestSeat_rowDoesNotGrowByComingAndGoing(t *testing.T) {
	log := &storetest.Log{}
	log.Append("a")
	h := started(t, testConfig(), log)
	for range 1000 {
		seated(t, h, Ask{})
	}
	hear(log)
	r := &h.feeds["s"].row
	over, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop()
		for range 500 { // one walk after another: what nobody waited for would be kept a thousand times
			log.Append("b")
			log.Deliver(0)
			for r.busy.Load() {
				runtime.Gosched()
			}
		}
	})
	for range 4 {
		wg.Go(func() {
			for over.Err() == nil {
				w := seated(t, h, Ask{Cursor: Latest})
				w.sink.leave()
				<-w.done
			}
		})
	}
	wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.seats) > 2*1000+200 {
		t.Errorf("there are %d seats for 1000 viewers", len(r.seats))
	}
}

// Many viewers watch a long log, some from before it is known. Each begins once and gets all of it,
// in writes of several pieces.
func TestSeat_isGivenSeveralPiecesAtOnce(t *testing.T) {
	for _, window := range []int{1000, 20_000, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			for i := range 2000 {
				log.Append(fmt.Sprint("a word, and some more of it ", i))
			}
			cfg := testConfig()
			cfg.Window = window
			h := started(t, cfg, log)
			var all []*watcher
			for i := range 20 {
				all = append(all, seated(t, h, Ask{Session: "s", Cursor: int64(100 * i)}))
			}
			synctest.Wait()
			log.Ack()
			synctest.Wait()
			for range 10 {
				all = append(all, seated(t, h, Ask{Session: "s", Cursor: 1990}))
			}
			synctest.Wait()
			log.Append("live")
			log.Deliver(0)
			synctest.Wait()
			_, list := log.Contents()
			for i, w := range all {
				cursor := 1990
				if i < 20 {
					cursor = 100 * i
				}
				if err := w.check(int64(cursor)+1, list[cursor:]); err != nil {
					t.Fatal(window, i, err)
				}
				if got := names(w.events()); strings.Count(got, "welcome") != 1 || !strings.HasSuffix(got, "chunk 2001") {
					t.Error(window, i, got[:100])
				}
				w.leave()
			}
		})
	}
}

func TestFrame_isAsLongAsItSays(t *testing.T) {
	for n := 1; n < 1<<17; n++ {
		events := make([]byte, n)
		if got, want := frameSize(events), len(appendFrame(nil, events)); got != want {
			t.Fatalf("%d events: %d, not %d", n, got, want)
		}
		if n > 5000 && n%4096 > 20 {
			n += 50
		}
	}
}
