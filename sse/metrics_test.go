package sse

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"gapless/store/storetest"
)

// sum returns a metric's current value, over all of its labels.
func sum(t *testing.T, h *Hub, name string) (total float64) {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(h.Metrics()...)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == name {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return total
}

// The alert about lost chunks is the difference of the two metrics. A chunk that was announced and
// never came must not count as repaired by the next read that finds nothing.
func TestMetrics_gapThatNoReadCloses_isNotRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		defer w.leave()
		log.Push(storetest.Element(2, "b")) // not announced
		log.Append("c")
		log.Deliver(log.Messages() - 1)
		synctest.Wait()
		if found, repaired := sum(t, h, "gapless_gaps_found_total"), sum(t, h, "gapless_gaps_repaired_total"); found != 1 || repaired != 1 {
			t.Fatalf("a gap that was closed: %v found, %v repaired", found, repaired)
		}
		log.Publish(storetest.Element(99, "never"))
		log.Deliver(log.Messages() - 1)
		time.Sleep(time.Minute)
		if found, repaired := sum(t, h, "gapless_gaps_found_total"), sum(t, h, "gapless_gaps_repaired_total"); found != 2 || repaired != 1 {
			t.Fatalf("and one that was not: %v found, %v repaired", found, repaired)
		}
	})
}

// Every stream that begins ends for exactly one cause, including a 204.
func TestMetrics_streamsBegunAreEndedOrViewers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append("a")
		log.End()
		h := started(t, testConfig(), log)
		now(t, h, log, Ask{}).leave()
		v, err := h.View(Ask{Session: "s", Cursor: 1})
		if err != nil {
			t.Fatal(err)
		}
		if cause := v.Over(t.Context(), time.Second); cause != Ended {
			t.Fatalf("over: %q", cause)
		}
		v.Close()
		time.Sleep(time.Second) // a census is cached for a moment
		if begun, ended, viewers := sum(t, h, "gapless_streams_begun_total"), sum(t, h, "gapless_streams_ended_total"), sum(t, h, "gapless_viewers"); begun != 2 || ended != 2 || viewers != 0 {
			t.Errorf("%v begun, %v ended, %v viewers", begun, ended, viewers)
		}
	})
}

// A log that begins while it is watched has no gap at its beginning.
func TestMetrics_logThatBeginsHasNoGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		h := started(t, testConfig(), log)
		w := now(t, h, log, Ask{})
		defer w.leave()
		time.Sleep(time.Second)
		log.Append("a")
		log.Append("b")
		log.Deliver(0)
		log.Deliver(0)
		time.Sleep(time.Minute)
		if found := sum(t, h, "gapless_gaps_found_total"); found != 0 {
			t.Errorf("%v gaps were found", found)
		}
		if err := w.check(log.Contents()); err != nil {
			t.Error(err)
		}
	})
}
