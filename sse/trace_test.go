package sse

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"gapless/store/storetest"
)

// notes is a Tracer that records the chunks with an even number.
type notes struct {
	mu             sync.Mutex
	arrived        []string
	wrote          map[int64][]string // connections, by seq
	session, epoch string
}

func (n *notes) Arrived(session, epoch string, seq int64, live bool) func(string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.session, n.epoch = session, epoch
	if seq%2 == 1 {
		return nil
	}
	n.arrived = append(n.arrived, fmt.Sprint(seq, " ", live))
	return func(connection string) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.wrote[seq] = append(n.wrote[seq], connection)
	}
}

// A tracer learns of chunks that come while somebody views, live or by a read, and of the first
// viewers that have them. It does not learn of earlier chunks, nor of a viewer that comes later and
// gets the chunk then.
func TestTracer_isToldOfWhatComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, told := &storetest.Log{}, &notes{wrote: map[int64][]string{}}
		log.Append("a")
		log.Append("b")
		cfg := testConfig()
		cfg.Tracer = told
		h := started(t, cfg, log)
		for i := range 10 {
			now(t, h, log, Ask{Connection: fmt.Sprint("early ", i)})
		}
		synctest.Wait()
		log.Append("c")
		log.Append("d")
		for range 2 {
			log.Deliver(0)
			synctest.Wait()
		}
		now(t, h, log, Ask{Connection: "late"})
		synctest.Wait()
		for range 2 {
			log.Append("e")
		}
		h.feeds["s"].Resync() // their announcements were lost
		synctest.Wait()
		told.mu.Lock()
		defer told.mu.Unlock()
		if got := fmt.Sprint(told.arrived, " ", told.session, " ", told.epoch); got != "[4 true 6 false] s e1" {
			t.Error(got)
		}
		if len(told.wrote[2]) > 0 || len(told.wrote[4]) != followedViewers || len(told.wrote[6]) != followedViewers {
			t.Errorf("viewers that have them: %v", told.wrote)
		}
		for _, c := range told.wrote[4] {
			if c == "late" {
				t.Error("a viewer that has come later is told of")
			}
		}
	})
}

// The same holds if fewer viewers exist than are reported: a later viewer gets no free place.
func TestTracer_isNotToldOfWhoComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, told := &storetest.Log{}, &notes{wrote: map[int64][]string{}}
		log.Append("a")
		cfg := testConfig()
		cfg.Tracer = told
		h := started(t, cfg, log)
		now(t, h, log, Ask{Connection: "early"})
		synctest.Wait()
		log.Append("b")
		log.Deliver(0)
		synctest.Wait()
		now(t, h, log, Ask{Connection: "late"})
		synctest.Wait()
		told.mu.Lock()
		defer told.mu.Unlock()
		if got := fmt.Sprint(told.wrote); got != "map[2:[early]]" {
			t.Error(got)
		}
	})
}
