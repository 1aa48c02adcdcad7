package sse

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics holds the Prometheus metrics of delivery. Every repair has a counter. Everything alive
// has a gauge that returns to zero.
type metrics struct {
	begun, resumed   prometheus.Counter
	ended            *prometheus.CounterVec // by cause
	delivered        prometheus.Counter
	snapshots        prometheus.Counter
	resets           *prometheus.CounterVec // by reason
	reads            *prometheus.CounterVec // by reader
	live             prometheus.Counter
	found, repaired  prometheus.Counter
	epochs           prometheus.Counter
	firstLive, write prometheus.Histogram
	all              []prometheus.Collector
}

// newMetrics makes the metrics. The gauges ask the hub when they are read.
func newMetrics(h *Hub) *metrics {
	m := &metrics{}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "gapless_" + name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	vector := func(name, help, label string, values ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "gapless_" + name, Help: help}, []string{label})
		for _, value := range values { // so that a rate is known from the first event on
			v.WithLabelValues(value)
		}
		m.all = append(m.all, v)
		return v
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		g := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "gapless_" + name, Help: help, Buckets: buckets})
		m.all = append(m.all, g)
		return g
	}
	gauge := func(name, help string, value func() float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "gapless_" + name, Help: help}, value))
	}
	m.begun = counter("streams_begun_total", "Streams that viewers began.")
	m.resumed = counter("streams_resumed_total", "Those of them that came with a cursor: reconnects, mostly.")
	m.ended = vector("streams_ended_total", "Streams that ended, by cause: ended and deleted also where the answer was only that there is nothing more (204).", "cause",
		string(Ended), string(Done), string(Deleted), string(Gone), string(Slow), string(Shutdown), string(Expired), string(Replaced), string(Cut), string(Outside))
	m.delivered = counter("chunks_delivered_total", "Chunks written to viewers' sockets: each one as often as it has viewers.")
	m.snapshots = counter("snapshots_total", "Snapshots that viewers were given instead of the chunks that they say.")
	m.resets = vector("resets_total", "Resets that viewers were told, by reason.", "reason",
		resetTrimmed, resetAhead, resetEpoch, resetUnknown, resetDeleted)
	m.reads = vector("history_reads_total", "Reads of logs: to keep a window up to date (feed), or for a viewer that is further back (viewer).", "by", "feed", "viewer")
	m.live = counter("live_chunks_total", "Chunks that were taken live from Pub/Sub.")
	m.found = counter("gaps_found_total", "Times that a live chunk, or a read, showed that earlier ones had been missed.")
	m.repaired = counter("gaps_repaired_total", "Times that what had been missed was read from the log. One that is found and never repaired: a chunk was announced that the log does not have.")
	m.epochs = counter("logs_rewritten_total", "Times that a log in Redis was found not to be the one that had been delivered.")
	m.firstLive = histogram("first_live_seconds", "Time from the first read of a log to its first live chunk.",
		[]float64{0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300})
	m.write = histogram("live_write_seconds", "Time from a live chunk's arrival from Pub/Sub until a viewer's socket has it (one in some is measured).",
		[]float64{0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10})
	gauge("viewers", "Streams under way.", func() float64 { return float64(h.count().viewers) })
	gauge("feeds", "Logs that are watched: those with viewers, and those that had some a moment ago.", func() float64 { return float64(h.count().feeds) })
	gauge("window_bytes", "Bytes of events in memory, in windows, in pages of older ones and in snapshots.", func() float64 { return float64(h.count().bytes) })
	gauge("slowest_viewer_lag_chunks", "How many chunks the viewer that is furthest behind has still to get.", func() float64 { return float64(h.count().lag) })
	return m
}

// Metrics returns the hub's collectors for a Prometheus registry.
func (h *Hub) Metrics() []prometheus.Collector { return h.metrics.all }

// census counts what is alive on this node.
type census struct {
	at                    time.Time
	viewers, feeds, bytes int
	lag                   int64
}

// count takes a census, or returns the one that was taken for the same scrape.
func (h *Hub) count() census {
	h.census.Lock()
	defer h.census.Unlock()
	if time.Since(h.census.at) < 100*time.Millisecond {
		return h.census.census
	}
	c := census{at: time.Now()}
	h.mu.Lock()
	feeds := make([]*feed, 0, len(h.feeds))
	for _, f := range h.feeds {
		feeds = append(feeds, f)
	}
	h.mu.Unlock()
	c.feeds, c.bytes = len(feeds), h.pages.bytes()+h.snapshots.bytes()
	for _, f := range feeds {
		w := f.window.Load()
		c.bytes += w.size
		f.mu.Lock()
		c.viewers += len(f.viewers)
		for v := range f.viewers {
			if shown := v.shown.Load(); shown >= 0 {
				c.lag = max(c.lag, w.Last-shown)
			}
		}
		f.mu.Unlock()
	}
	h.census.census = c
	return c
}
