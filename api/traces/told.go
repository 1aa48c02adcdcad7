package traces

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// told exports only the attributes on the list. The libraries would export more: the path, which
// contains the session's id, the caller, and the texts of errors.
type told struct{ sdk.SpanExporter }

// ExportSpans implements sdk.SpanExporter.
func (e told) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	all := make([]sdk.ReadOnlySpan, len(spans))
	for i, s := range spans {
		all[i] = toldSpan{s}
	}
	return e.SpanExporter.ExportSpans(ctx, all)
}

// list holds the attributes that are exported.
var list = map[attribute.Key]bool{
	"http.request.method": true, "http.route": true, "http.response.status_code": true,
	"http.request.body.size": true, "http.response.body.size": true, "network.protocol.version": true, "url.scheme": true,
	"db.system": true, "db.redis.num_cmd": true,
	"gapless.session": true, "gapless.epoch": true, "gapless.seq": true, "gapless.last_seq": true,
	"gapless.cursor": true, "gapless.connection": true, "gapless.by": true,
}

// toldSpan is a span with only the attributes on the list.
type toldSpan struct{ sdk.ReadOnlySpan }

// Attributes returns the attributes on the list.
func (s toldSpan) Attributes() (all []attribute.KeyValue) {
	for _, a := range s.ReadOnlySpan.Attributes() {
		if list[a.Key] {
			all = append(all, a)
		}
	}
	return all
}

// Events returns nil, because events are exceptions, whose texts are unknown. A status has a text, too.
func (s toldSpan) Events() []sdk.Event { return nil }

// Status returns the status without its text.
func (s toldSpan) Status() sdk.Status { return sdk.Status{Code: s.ReadOnlySpan.Status().Code} }

// within traces only calls of a recorded request. A read of the log in the background, or a
// heartbeat, would be a trace of one line.
type within struct{ trace.TracerProvider }

// Tracer implements trace.TracerProvider.
func (p within) Tracer(name string, options ...trace.TracerOption) trace.Tracer {
	return withinTracer{p.TracerProvider.Tracer(name, options...)}
}

// withinTracer starts spans only within a sampled trace.
type withinTracer struct{ trace.Tracer }

// Start implements trace.Tracer.
func (t withinTracer) Start(ctx context.Context, name string, options ...trace.SpanStartOption) (context.Context, trace.Span) {
	if !trace.SpanContextFromContext(ctx).IsSampled() {
		return ctx, noop.Span{}
	}
	return t.Tracer.Start(ctx, name, options...)
}
