package api

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"gapless/api/model"
)

// metrics holds the Prometheus metrics of the HTTP API.
type metrics struct {
	requests *prometheus.CounterVec // by method, route and status
	begun    prometheus.Histogram   // time that models took to their first word
	errors   *prometheus.CounterVec // by reason
}

func newMetrics(a *API) *metrics {
	m := &metrics{requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gapless_http_requests_total", Help: "Requests that were answered, streams included. Status 0: broken off, as a stream is whose log has not ended.",
	}, []string{"method", "route", "status"}),
		begun: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "gapless_model_seconds", Help: "From a question to the first word of the model's answer, seconds.",
			Buckets: []float64{.05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gapless_model_errors_total", Help: "Answers of the model that failed, by the reason that their failed chunk says.",
		}, []string{"reason"}),
	}
	for _, reason := range failures { // as begin does for requests
		m.errors.WithLabelValues(reason)
	}
	gauge := func(name, help string, value func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "gapless_" + name, Help: help}, func() float64 { return float64(value()) })
	}
	a.registry.MustRegister(a.limits.Metrics()...)
	a.registry.MustRegister(m.requests, m.begun, m.errors,
		gauge("uploads", "Uploads and answers under way that are watched.", a.uploads.count),
		gauge("answers", "Answers of the model under way.", func() int { return a.limits.Answers.Taken() }),
		gauge("draining", "1 while this node drains.", func() int {
			if a.draining.Err() != nil {
				return 1
			}
			return 0
		}))
	return m
}

// failures are the reasons why answers of the model fail.
var failures = []string{
	model.Unauthorized, model.NotFound, model.Rejected, model.RateLimited, model.Unavailable, model.Timeout, model.Broken, model.Empty,
	modelFailed, answerTooLarge, contextTooLarge, nothingAsked, failedShutdown, failedRedis,
}

// failed counts an answer that failed.
func (m *metrics) failed(reason string) { m.errors.WithLabelValues(reason).Inc() }

// begin sets the count of faults to zero for every route. If the first fault created its series, it would not be an
// increase, and no alert would fire.
func (m *metrics) begin(routes []*echo.Route) {
	for _, r := range routes {
		m.requests.WithLabelValues(r.Method, r.Path, strconv.Itoa(http.StatusInternalServerError))
	}
}

// observe counts each request after its response.
func (m *metrics) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) (err error) {
		status := 0
		defer func() { // a stream that is broken off panics
			if errors.Is(err, errTaken) {
				err = nil
				return
			}
			m.count(c.Request().Method, c.Path(), status)
		}()
		err = next(c)
		if status = c.Response().Status; err != nil && !c.Response().Committed {
			status = problemOf(err).Status
		}
		return err
	}
}

func (m *metrics) count(verb, route string, status int) {
	if route == "" {
		route = "none"
	}
	m.requests.WithLabelValues(method(verb), route, strconv.Itoa(status)).Inc()
}

// method returns a label that a stranger cannot multiply.
func method(m string) string {
	switch m {
	case http.MethodGet, http.MethodPost, http.MethodDelete, http.MethodHead, http.MethodOptions, http.MethodPut, http.MethodPatch:
		return m
	}
	return "other"
}

// serveMetrics responds to a scrape.
func (a *API) serveMetrics() http.Handler {
	return promhttp.HandlerFor(a.registry, promhttp.HandlerOpts{
		// Metrics that cannot be read are left out and logged. The rest is still wanted.
		ErrorHandling: promhttp.ContinueOnError,
		ErrorLog:      scrapeLog{a},
	})
}

// Metrics serves only /metrics, to every caller. It is for a separate address.
func (a *API) Metrics() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.serveMetrics())
	return mux
}

// scrapeLog logs the errors that promhttp reports.
type scrapeLog struct{ *API }

// Println implements promhttp.Logger.
func (l scrapeLog) Println(v ...any) {
	l.log.Error("metrics cannot be read", slog.String("err", fmt.Sprint(v...)))
}
