package store

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics holds the store's Prometheus metrics.
type metrics struct {
	seconds  *prometheus.HistogramVec // by script
	errors   *prometheus.CounterVec   // by script and kind
	appended prometheus.Counter
	known    prometheus.Counter
	lost     prometheus.Counter
	deaf     prometheus.Counter
	refuses  *prometheus.GaugeVec   // by code
	hints    *prometheus.CounterVec // by code
	all      []prometheus.Collector
}

// Kinds of error in gapless_redis_errors_total.
const (
	kindAway    = "away"    // certainly not executed: Redis cannot be reached
	kindRefused = "refused" // certainly not executed: Redis refuses it, like others
	kindUnknown = "unknown" // its reply was lost
	kindFault   = "fault"   // it failed, and will fail again
)

// hintOther is the code of a hint that failed for a reason without its own code.
const hintOther = "other"

func newMetrics(subscriptions func() int) *metrics {
	m := &metrics{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "gapless_redis_seconds", Help: "Time that a script took, with the wait for its turn, failures included.",
			Buckets: []float64{0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5},
		}, []string{"script"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gapless_redis_errors_total", Help: "Scripts that failed: away (no Redis), refused (by Redis, see gapless_redis_refuses), unknown (no answer), fault (any other error).",
		}, []string{"script", "kind"}),
		appended: prometheus.NewCounter(prometheus.CounterOpts{Name: "gapless_chunks_appended_total", Help: "Chunks that this node appended to logs."}),
		known: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "gapless_chunks_known_total", Help: "Chunks that producers sent again, and that were in their logs already.",
		}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{Name: "gapless_pubsub_lost_total", Help: "Pub/Sub connections that were lost, or could not be made."}),
		deaf: prometheus.NewCounter(prometheus.CounterOpts{Name: "gapless_subscriptions_refused_total", Help: "Subscriptions that Redis refused for want of rights."}),
		refuses: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "gapless_redis_refuses", Help: "1 while Redis executes no writes of this node, by the code that producers are told.",
		}, []string{"code"}),
		hints: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gapless_hints_failed_total", Help: "Chunks, or other changes of a log, that are stored and that Redis refused to announce.",
		}, []string{"code"}),
	}
	for _, code := range refusalCodes {
		m.refuses.WithLabelValues(code)
	}
	for _, code := range []string{RedisDenied, hintOther} {
		m.hints.WithLabelValues(code)
	}
	for _, name := range scriptNames {
		m.seconds.WithLabelValues(name)
		for _, kind := range []string{kindAway, kindRefused, kindUnknown, kindFault} { // so that a rate includes the first error
			m.errors.WithLabelValues(name, kind)
		}
	}
	m.all = []prometheus.Collector{m.seconds, m.errors, m.appended, m.known, m.lost, m.deaf, m.refuses, m.hints, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "gapless_subscriptions", Help: "Pub/Sub channels that this node listens to.",
	}, func() float64 { return float64(subscriptions()) })}
	return m
}

// ran counts one run of a script.
func (m *metrics) ran(which int, begun time.Time, err error) {
	name := scriptNames[which]
	m.seconds.WithLabelValues(name).Observe(time.Since(begun).Seconds())
	switch {
	case err == nil:
	case Why(err) == RedisAway:
		m.errors.WithLabelValues(name, kindAway).Inc()
	case errors.Is(err, ErrAway):
		m.errors.WithLabelValues(name, kindRefused).Inc()
	case errors.Is(err, ErrOutcomeUnknown):
		m.errors.WithLabelValues(name, kindUnknown).Inc()
	default:
		m.errors.WithLabelValues(name, kindFault).Inc()
	}
}

// Metrics returns the store's collectors for a Prometheus registry.
func (s *Store) Metrics() []prometheus.Collector { return s.metrics.all }
