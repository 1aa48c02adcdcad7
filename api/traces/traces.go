// Package traces follows requests and chunks with OpenTelemetry, if the standard variables
// (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT, …) ask for it. Otherwise Open returns nil. A
// nil *Traces does nothing and costs nothing.
//
// A chunk carries no trace, because what is stored is exactly what is sent. It needs none. A
// chunk's identity (session, epoch, seq) is known wherever it passes, and its trace's id is
// computed from that (TraceID), equally on every node. A sampler that uses the id, like those by
// ratio, decides equally everywhere, too: a chunk is followed on all nodes or on none.
//
//	chunk append     on the node that appends it, from its coming until Redis has acknowledged it
//	├─ chunk arrive  on each node that watches its log, when it comes there, live or by a read
//	└─ chunk write   for its first viewers on a node, from its arrival until their sockets have it
//
// Requests have separate traces, which contain their calls of Redis, and links to the traces of
// their chunks. A request's traceparent becomes a link, too, and not a parent: a stranger must not
// decide what is recorded here.
//
// Only attributes on a list (told) leave this process: no text of a chunk, no token, and no address
// of a client. A session appears as a hash of its id, because its caller has chosen the id, which
// may name a person. Spans may be lost. They wait in a bounded queue, and are dropped when it is
// full, or when the collector is unreachable for long.
package traces

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/redis/go-redis/extra/redisotel/v9"
	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Config says whether to trace, and names the process.
type Config struct {
	// On is the result of Wanted.
	On bool
	// Node and Version name this process in its traces.
	Node, Version string

	Logger *slog.Logger
}

// Wanted reports whether the standard variables ask for traces, and returns their mistakes. The
// exporter reads the other variables itself.
func Wanted(env func(string) (string, bool)) (bool, error) {
	value := func(name string) string {
		v, _ := env(name)
		return strings.TrimSpace(v)
	}
	on := value("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
	var errs []error
	switch exporter := value("OTEL_TRACES_EXPORTER"); exporter {
	case "":
	case "otlp":
		on = true
	case "none":
		on = false
	default:
		errs = append(errs, fmt.Errorf("OTEL_TRACES_EXPORTER: there is no %q: it is otlp or none", exporter))
	}
	if strings.EqualFold(value("OTEL_SDK_DISABLED"), "true") {
		return false, nil
	}
	if !on {
		return false, errors.Join(errs...)
	}
	for _, name := range []string{"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"} {
		if v := value(name); v != "" && v != "http/protobuf" {
			errs = append(errs, fmt.Errorf("%s: there is no %q: it is http/protobuf, which collectors take at port 4318", name, v))
		}
	}
	// The SDK would only log this, and use another sampler.
	sampler := value("OTEL_TRACES_SAMPLER")
	known := []string{"", "always_on", "always_off", "traceidratio", "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio"}
	if !slices.Contains(known, strings.ToLower(sampler)) {
		errs = append(errs, fmt.Errorf("OTEL_TRACES_SAMPLER: there is no %q: it is %s", sampler, strings.Join(known[1:], ", ")))
	}
	if arg := value("OTEL_TRACES_SAMPLER_ARG"); arg != "" && strings.HasSuffix(strings.ToLower(sampler), "traceidratio") {
		if ratio, err := strconv.ParseFloat(arg, 64); err != nil || !(ratio >= 0 && ratio <= 1) {
			errs = append(errs, fmt.Errorf("OTEL_TRACES_SAMPLER_ARG: %q is no number from 0 to 1", arg))
		}
	}
	return true, errors.Join(errs...)
}

// Traces makes spans and sends them. Its methods are safe for concurrent use. Only Close waits for
// the collector.
type Traces struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer
}

// Open begins to trace, or returns nil if that is not wanted. It does not wait for the collector.
// An unreachable collector is only logged.
func Open(ctx context.Context, cfg Config) (*Traces, error) {
	if !cfg.On {
		return nil, nil
	}
	// The library has one error handler for all its users.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		cfg.Logger.Warn("traces cannot be sent", slog.Any("err", err))
	}))
	otel.SetLogger(logr.FromSlogHandler(mistakes{cfg.Logger.Handler()}))
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("make the exporter of traces: %w", err)
	}
	// The variables (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) override these.
	of, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		attribute.String("service.name", "gapless"), attribute.String("service.version", cfg.Version),
		attribute.String("service.instance.id", cfg.Node)), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("say who is traced (OTEL_RESOURCE_ATTRIBUTES): %w", err)
	}
	return open(sdk.WithResource(of), sdk.WithBatcher(told{exporter})), nil
}

// mistakes passes only the library's errors about its configuration. Its other messages describe
// what it makes, and may contain the headers that the collector requires.
type mistakes struct{ slog.Handler }

// Enabled implements slog.Handler.
func (m mistakes) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelError && m.Handler.Enabled(ctx, level)
}

func open(options ...sdk.TracerProviderOption) *Traces {
	t := &Traces{provider: sdk.NewTracerProvider(append(options, sdk.WithIDGenerator(ids{}))...)}
	t.tracer = t.provider.Tracer("gapless")
	return t
}

// Close sends the remaining spans, for no longer than ctx.
func (t *Traces) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	return t.provider.Shutdown(ctx)
}

// Handler traces each request of next, with two exceptions. Frequent requests (health, metrics) are
// not traced. Streams use View, because their spans would last for hours, and their connections may
// be taken over from the server.
func (t *Traces) Handler(next http.Handler) http.Handler {
	if t == nil {
		return next
	}
	return otelhttp.NewHandler(next, "",
		otelhttp.WithTracerProvider(t.provider), otelhttp.WithMeterProvider(noop.NewMeterProvider()),
		otelhttp.WithPropagators(propagation.TraceContext{}),
		otelhttp.WithPublicEndpointFn(func(*http.Request) bool { return true }),
		otelhttp.WithSpanNameFormatter(func(string, *http.Request) string { return "request" }), // until Route renames it
		otelhttp.WithFilter(func(r *http.Request) bool {
			return strings.HasPrefix(r.URL.Path, "/v1/") && !strings.HasSuffix(r.URL.Path, "/stream")
		}))
}

// Route names a request's span by its route, without any data of the request.
func (t *Traces) Route(ctx context.Context, method, route string) {
	span := trace.SpanFromContext(ctx)
	span.SetName(method + " " + route)
	span.SetAttributes(attribute.String("http.route", route))
}

// View begins the span of a stream's beginning. Call ends with the response's status once the first
// bytes are on their way, or it is known that there are none.
func (t *Traces) View(r *http.Request, route, session, connection string, cursor int64) (ends func(status int)) {
	options := []trace.SpanStartOption{
		trace.WithNewRoot(), trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
			attribute.String("http.request.method", r.Method), attribute.String("http.route", route),
			attribute.String("gapless.session", Session(session)), attribute.String("gapless.connection", connection),
			attribute.Int64("gapless.cursor", cursor)),
	}
	caller := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), propagation.HeaderCarrier(r.Header)))
	if caller.IsValid() {
		options = append(options, trace.WithLinks(trace.Link{SpanContext: caller}))
	}
	_, span := t.tracer.Start(context.Background(), r.Method+" "+route, options...)
	return func(status int) {
		span.SetAttributes(attribute.Int("http.response.status_code", status))
		span.End()
	}
}

// Redis traces those commands of a client that belong to a traced request. It omits their text,
// which contains the chunks.
func (t *Traces) Redis(client redis.UniversalClient) error {
	return redisotel.InstrumentTracing(client, redisotel.WithTracerProvider(within{t.provider}),
		redisotel.WithDBStatement(false), redisotel.WithCallerEnabled(false), redisotel.WithDialFilter(true))
}

// Appended records that the chunks from..to of a log were appended for the request of ctx, or
// because of it. begun is when they came.
func (t *Traces) Appended(ctx context.Context, session, epoch string, from, to int64, begun time.Time) {
	request := trace.SpanFromContext(ctx)
	request.SetAttributes(attribute.String("gapless.session", Session(session)), attribute.String("gapless.epoch", epoch), attribute.Int64("gapless.last_seq", to))
	for seq := from; seq <= to; seq++ {
		span := t.chunk(session, epoch, seq, trace.WithTimestamp(begun), trace.WithSpanKind(trace.SpanKindProducer),
			trace.WithLinks(trace.Link{SpanContext: request.SpanContext()}))
		if span.IsRecording() {
			request.AddLink(trace.Link{SpanContext: span.SpanContext()})
		}
		span.End()
	}
}

// Arrived records that a chunk has come to this node, live or by a read of its log. It returns a
// function to call when a viewer's socket has the chunk, or nil if the chunk is not followed.
func (t *Traces) Arrived(session, epoch string, seq int64, live bool) (wrote func(connection string)) {
	arrived := time.Now()
	root := t.chunk(session, epoch, seq)
	if !root.IsRecording() {
		return nil
	}
	// Another node ends and sends this span.
	ctx := trace.ContextWithRemoteSpanContext(context.Background(), root.SpanContext())
	by := "read"
	if live {
		by = "live"
	}
	of := trace.WithAttributes(identity(session, epoch, seq)...)
	_, span := t.tracer.Start(ctx, "chunk arrive", of, trace.WithTimestamp(arrived), trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(attribute.String("gapless.by", by)))
	span.End()
	return func(connection string) {
		_, span := t.tracer.Start(ctx, "chunk write", of, trace.WithTimestamp(arrived), trace.WithAttributes(attribute.String("gapless.connection", connection)))
		span.End()
	}
}

// chunk begins the root span of a chunk's trace.
func (t *Traces) chunk(session, epoch string, seq int64, options ...trace.SpanStartOption) trace.Span {
	ctx := context.WithValue(context.Background(), idsKey{}, name(session, epoch, seq))
	_, span := t.tracer.Start(ctx, "chunk append", append(options, trace.WithAttributes(identity(session, epoch, seq)...))...)
	return span
}

func identity(session, epoch string, seq int64) []attribute.KeyValue {
	return []attribute.KeyValue{attribute.String("gapless.session", Session(session)), attribute.String("gapless.epoch", epoch), attribute.Int64("gapless.seq", seq)}
}

// name returns the hash that the ids of a chunk's trace come from.
func name(session, epoch string, seq int64) [sha256.Size]byte {
	return sha256.Sum256(fmt.Appendf(nil, "%s %s %d", session, epoch, seq))
}

// TraceID returns a chunk's trace id: the first 32 digits of the SHA-256 of "session epoch seq".
func TraceID(session, epoch string, seq int64) trace.TraceID {
	n := name(session, epoch, seq)
	return trace.TraceID(n[:16])
}

// Session returns a session's name in traces: the first 16 digits of its id's SHA-256.
func Session(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:8])
}

// ids generates a chunk's ids if the context contains its name, and random ones otherwise.
type ids struct{}

type idsKey struct{}

// NewIDs implements sdk.IDGenerator.
func (ids) NewIDs(ctx context.Context) (t trace.TraceID, s trace.SpanID) {
	if n, ok := ctx.Value(idsKey{}).([sha256.Size]byte); ok {
		return trace.TraceID(n[:16]), trace.SpanID(n[16:24])
	}
	for !t.IsValid() {
		binary.BigEndian.PutUint64(t[:8], rand.Uint64())
		binary.BigEndian.PutUint64(t[8:], rand.Uint64())
	}
	return t, ids{}.NewSpanID(ctx, t)
}

// NewSpanID implements sdk.IDGenerator.
func (ids) NewSpanID(context.Context, trace.TraceID) (s trace.SpanID) {
	for !s.IsValid() {
		binary.BigEndian.PutUint64(s[:], rand.Uint64())
	}
	return s
}
