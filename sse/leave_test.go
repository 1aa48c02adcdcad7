package sse

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gapless/store/storetest"
)

// ended returns why a response has ended. It fails if the response has not ended.
func (w *watcher) ended(t *testing.T) Cause {
	t.Helper()
	synctest.Wait()
	select {
	case c := <-w.done:
		return c
	default:
		t.Error("the response has not ended")
		return w.leave()
	}
}

// A viewer whose permission expires gets an event, keeps its cursor, and is broken off.
func TestViewer_expires_isToldAndBrokenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		log.Append("b")
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{Expires: time.Now().Add(time.Minute)})
		time.Sleep(time.Minute - time.Millisecond)
		synctest.Wait()
		if got := names(w.events()); got != "welcome 0, chunk 1, chunk 2" {
			t.Error(got)
		}
		time.Sleep(2 * time.Second) // a socket that is full then gets a moment
		cause := w.ended(t)
		if cause != Expired || cause.Clean() {
			t.Errorf("it ended by %q", cause)
		}
		if got := names(w.events()); got != "welcome 0, chunk 1, chunk 2, expired 2" {
			t.Error(got)
		}
		if !strings.HasSuffix(string(w.bytes()), "event: expired\ndata: {\"type\":\"expired\"}\nid: 2\n\n") {
			t.Errorf("%q", w.bytes())
		}
		if strings.HasSuffix(string(w.sink.body), lastFrame) {
			t.Error("it ends as one ends that is finished")
		}
		log.Append("c")
		log.Deliver(0)
		synctest.Wait()
		if strings.Contains(string(w.bytes()), "id: 3") {
			t.Error("it was given more")
		}
	})
}

// Before the viewer knows its position, it keeps the cursor that it came with: the event has no id.
func TestViewer_expires_beforeWelcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &flaky{Log: &storetest.Log{}}
		log.set(true)
		h := NewHub(testConfig(), log)
		defer h.Close()
		for _, cursor := range []int64{7, Latest} {
			w := watch(t, h, Ask{Session: "s", Cursor: cursor, Expires: time.Now().Add(time.Second)})
			time.Sleep(3 * time.Second)
			if cause := w.ended(t); cause != Expired {
				t.Errorf("it ended by %q", cause)
			}
			if got := string(w.bytes()); got != ":\nevent: expired\ndata: {\"type\":\"expired\"}\n\n" {
				t.Errorf("%q", got)
			}
		}
	})
}

// A viewer whose permission has already expired gets nothing.
func TestViewer_expires_beforeItBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := started(t, testConfig(), log)
		now(t, h, log, Ask{}).leave() // the log is known, and its window is current
		w := now(t, h, log, Ask{Expires: time.Now().Add(-time.Hour)})
		time.Sleep(2 * time.Second)
		if cause := w.ended(t); cause != Expired {
			t.Errorf("it ended by %q", cause)
		}
	})
}

// Raw streams contain none of our events: they break off.
func TestViewer_expires_rawIsOnlyBrokenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Push(`{"seq":1,"ts":1795424741692,"type":"delta","raw":"x"}`)
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{Raw: true, Expires: time.Now().Add(time.Minute)})
		time.Sleep(2 * time.Minute)
		if cause := w.ended(t); cause != Expired {
			t.Errorf("it ended by %q", cause)
		}
		if got := string(w.sink.body); strings.Contains(got, "expired") || !strings.Contains(got, "data: x\nid: 1\n\n") {
			t.Errorf("%q", got)
		}
	})
}

// A socket that takes nothing gets a moment and no more. A socket that resumes gets the rest of its
// current event and the last one.
func TestViewer_expires_whileItsSocketIsFull(t *testing.T) {
	for _, goesOn := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			log.Append("a")
			h := started(t, testConfig(), log)
			expires := time.Now().Add(30 * time.Second)
			w := now(t, h, log, Ask{Expires: expires})
			stall := make(chan struct{})
			w.sink.mu.Lock()
			w.sink.stall = stall
			w.sink.mu.Unlock()
			log.Append(strings.Repeat("long ", 1000))
			log.Deliver(0)
			time.Sleep(time.Until(expires) + lastWord/2)
			if goesOn {
				close(stall)
			}
			time.Sleep(lastWord)
			if cause := w.ended(t); cause != Expired {
				t.Errorf("it ended by %q", cause)
			}
			want := "welcome 0, chunk 1"
			if goesOn {
				want = "welcome 0, chunk 1, chunk 2, expired 2"
			}
			if got := names(w.events()); got != want {
				t.Error(got)
			}
		})
	}
}

// A viewer that another replaces is broken off without an event, whenever that happens.
func TestViewer_leave_isBrokenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		var v *Viewer
		f := h.feeds["s"]
		f.mu.Lock()
		for one := range f.viewers {
			v = one
		}
		f.mu.Unlock()
		v.Leave(Replaced)
		v.Leave(Expired) // the first cause counts
		if cause := w.ended(t); cause != Replaced || cause.Clean() {
			t.Errorf("it ended by %q", cause)
		}
		if got := names(w.events()); got != "welcome 0, chunk 1" {
			t.Error(got)
		}
		v.Leave(Replaced) // it is over
		late, err := h.View(Ask{Session: "s"})
		if err != nil {
			t.Fatal(err)
		}
		late.Leave(Replaced) // it has not begun
		out := &watcher{sink: &sink{taken: true}, done: make(chan Cause, 1)}
		out.cut = out.sink.leave
		h.sit(late, out.sink, []byte{}, nil, 0, Told{func() {}, func(c Cause, _ bool) { out.done <- c }})
		if cause := out.ended(t); cause != Replaced {
			t.Errorf("it ended by %q", cause)
		}
		if h.Viewers("s") != 0 {
			t.Errorf("%d are still counted", h.Viewers("s"))
		}
	})
}

// A viewer that is catching up gets the event, too, whatever is being written then.
func TestViewer_expires_whileItCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for range 300 {
			log.Append(strings.Repeat("long ", 200))
		}
		h := started(t, testConfig(), log)
		now(t, h, log, Ask{}).leave()
		for ms := range 80 {
			v, err := h.View(Ask{Session: "s", Expires: time.Now().Add(time.Duration(ms)*5*time.Millisecond + time.Microsecond)})
			if err != nil {
				t.Fatal(err)
			}
			w := view(t, h, v, &sink{taken: takenOver, room: 5000, pace: 20 * time.Millisecond})
			time.Sleep(time.Minute)
			if cause := w.ended(t); cause != Expired {
				t.Errorf("it ended by %q", cause)
			}
			events := w.events()
			last := events[len(events)-1]
			if last.name != "expired" || len(events) > 1 && last.id != events[len(events)-2].id {
				t.Fatalf("after %d ms its last events are %s", ms*5, names(events[max(0, len(events)-2):]))
			}
		}
	})
}

// The last event waits a moment when it does not fit at once.
func TestViewer_expires_whereItsLastEventDoesNotFit(t *testing.T) {
	for room := 1; room < 60; room += 7 {
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			log.Append("a")
			h := started(t, testConfig(), log)
			w := now(t, h, log, Ask{Expires: time.Now().Add(time.Minute)})
			time.Sleep(time.Second)
			w.sink.mu.Lock()
			w.sink.room = len(w.sink.body) + room
			w.sink.mu.Unlock()
			time.Sleep(2 * time.Minute)
			if cause := w.ended(t); cause != Expired {
				t.Errorf("it ended by %q", cause)
			}
			if got := names(w.events()); got != "welcome 0, chunk 1, expired 1" {
				t.Errorf("with room for %d bytes: %s", room, got)
			}
		})
	}
}
