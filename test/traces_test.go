package test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	collected "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"gapless/api/traces"
	"gapless/store/storetest"
)

// collector is an OpenTelemetry collector that stores what it receives.
type collector struct {
	*httptest.Server
	calls atomic.Int64

	mu    sync.Mutex
	spans []span
	raw   bytes.Buffer // everything received, uncompressed
}

// span is a received span, with its sender.
type span struct {
	*otlp.Span
	node, service string
}

func (s span) text(key string) string {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.GetStringValue()
		}
	}
	return ""
}

func (s span) number(key string) int64 {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.GetIntValue()
		}
	}
	return -1
}

func (s span) trace() string { return hex.EncodeToString(s.TraceId) }

// linked reports whether s has a link to other.
func (s span) linked(other span) bool {
	for _, l := range s.Links {
		if bytes.Equal(l.TraceId, other.TraceId) && bytes.Equal(l.SpanId, other.SpanId) {
			return true
		}
	}
	return false
}

func collect(t *testing.T) *collector {
	t.Helper()
	c := &collector{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.calls.Add(1)
		var body io.Reader = r.Body
		if r.Header.Get("Content-Encoding") == "gzip" {
			plain, err := gzip.NewReader(r.Body)
			if err != nil {
				t.Errorf("the exporter's body: %v", err)
				return
			}
			body = plain
		}
		b, err := io.ReadAll(body)
		var request collected.ExportTraceServiceRequest
		if err = errors.Join(err, proto.Unmarshal(b, &request)); err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("the exporter sent to %s: %v", r.URL.Path, err)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw.Write(b)
		for _, of := range request.ResourceSpans {
			whose := span{}
			for _, a := range of.Resource.Attributes {
				switch a.Key {
				case "service.instance.id":
					whose.node = a.Value.GetStringValue()
				case "service.name":
					whose.service = a.Value.GetStringValue()
				}
			}
			for _, scope := range of.ScopeSpans {
				for _, s := range scope.Spans {
					c.spans = append(c.spans, span{s, whose.node, whose.service})
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(c.Close)
	return c
}

// find returns the spans with a name, of one node or of all nodes.
func (c *collector) find(node, name string) (all []span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.Name == name && (node == "" || s.node == node) {
			all = append(all, s)
		}
	}
	return all
}

// traced makes the nodes that this test starts send their traces, at once. The test must not be parallel.
func (c *collector) traced(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.URL)
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
}

// A chunk is posted on one node. One trace contains that append, its arrival at another node, and the write to a viewer
// there. The trace links to the request that posted the chunk. Anyone who knows the chunk can compute the trace's id.
// The trace does not reveal the session's id, the text, or the caller.
func TestTraces_followAChunkAcrossNodes(t *testing.T) {
	c := collect(t)
	c.traced(t)
	redis := storetest.Redis(t)
	n := nodes(t, 2, redis)
	const session, secret = "ann.example-~session", "the-secret-text"

	v := &viewer{session: session}
	ctx, cut := context.WithCancel(deadline(t))
	gone := background(t, func() { v.connect(ctx, n[1].addr, func(e event) bool { return e.name == "" && e.id == "3" }) })
	eventually(t, "the viewer is connected", func() bool { return v.status.Load() == http.StatusOK })
	r, _ := http.NewRequest("POST", "http://"+n[0].addr+"/v1/sessions/"+session+"/chunks?message_id="+secret, strings.NewReader(`[{"content":"`+secret+`"},{"content":"b"},{"content":"c"}]`))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", secret)
	r.Header.Set("X-Forwarded-For", "203.0.113.7")
	r.Header.Set("Authorization", "Bearer "+secret)
	r.Header.Set("traceparent", "00-11111111111111111111111111111111-2222222222222222-01")
	response, err := n[0].http.Do(r)
	if err != nil || response.StatusCode != http.StatusCreated {
		t.Fatalf("append: %v %v", response, err)
	}
	var s stored
	body, _ := io.ReadAll(response.Body)
	_ = response.Body.Close()
	decode(t, string(body), &s)
	gone()
	cut()
	v.check(t, history(t, redis, session))

	for seq := s.First; seq <= s.Last; seq++ {
		of := func(node, name string) (found span) {
			eventually(t, fmt.Sprintf("%s of chunk %d by %s is told", name, seq, node), func() bool {
				for _, s := range c.find(node, name) {
					if s.number("gapless.seq") == seq {
						found = s
					}
				}
				return found.Span != nil
			})
			return found
		}
		root, arrive, write := of("n1", "chunk append"), of("n2", "chunk arrive"), of("n2", "chunk write")
		trace := traces.TraceID(session, s.Epoch, seq).String()
		for _, one := range []span{root, arrive, write} {
			if one.trace() != trace || one.text("gapless.epoch") != s.Epoch || one.text("gapless.session") != traces.Session(session) || one.service != "gapless" {
				t.Errorf("%s of chunk %d is in trace %s, and says %v of %s; want trace %s", one.Name, seq, one.trace(), one.Attributes, one.service, trace)
			}
		}
		if len(root.ParentSpanId) > 0 || !bytes.Equal(arrive.ParentSpanId, root.SpanId) || !bytes.Equal(write.ParentSpanId, root.SpanId) {
			t.Errorf("chunk %d: arrive has parent %x, write %x; append is %x, with parent %x", seq, arrive.ParentSpanId, write.ParentSpanId, root.SpanId, root.ParentSpanId)
		}
		if write.StartTimeUnixNano > write.EndTimeUnixNano || root.StartTimeUnixNano > write.EndTimeUnixNano {
			t.Errorf("chunk %d is written at %d, before it came at %d", seq, write.EndTimeUnixNano, root.StartTimeUnixNano)
		}
		var request []span
		eventually(t, "the request is told", func() bool {
			request = c.find("n1", "POST /v1/sessions/:id/chunks")
			return len(request) > 0
		})
		if len(request) != 1 || !root.linked(request[0]) || !request[0].linked(root) {
			t.Fatalf("request and chunk %d have no links to each other: %v and %v", seq, request, root.Links)
		}
		if request[0].trace() == strings.Repeat("1", 32) || !request[0].linked(span{Span: &otlp.Span{TraceId: bytes.Repeat([]byte{0x11}, 16), SpanId: bytes.Repeat([]byte{0x22}, 8)}}) {
			t.Errorf("the caller's trace is no link: the request is in trace %s, with links %v", request[0].trace(), request[0].Links)
		}
		if request[0].number("http.response.status_code") != 201 {
			t.Errorf("the request says %v", request[0].Attributes)
		}
		eventually(t, "the call of Redis is told, in the request's trace", func() bool {
			for _, s := range append(c.find("n1", "evalsha"), c.find("n1", "eval")...) {
				if bytes.Equal(s.ParentSpanId, request[0].SpanId) {
					return true
				}
			}
			return false
		})
	}
	var streams []span
	eventually(t, "the stream's beginning is told", func() bool {
		streams = c.find("n2", "GET /v1/sessions/:id/stream")
		return len(streams) > 0
	})
	if len(streams) != 1 || streams[0].number("http.response.status_code") != 200 {
		t.Errorf("the stream's beginning: %v", streams)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, word := range []string{session, secret, "203.0.113.7", "127.0.0.1", "Bearer"} {
		if strings.Contains(c.raw.String(), word) {
			t.Errorf("the traces tell %q", word)
		}
	}
	for _, s := range c.spans {
		if len(s.ParentSpanId) == 0 && (strings.HasPrefix(s.Name, "eval") || s.Name == "ping") {
			t.Errorf("a trace of nothing but %s", s.Name)
		}
	}
}

// A chunk that another program pushes is traced from its arrival.
func TestTraces_followForeignChunks(t *testing.T) {
	c := collect(t)
	c.traced(t)
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)
	session := newID()
	v := &viewer{session: session}
	gone := background(t, func() { v.connect(deadline(t), n[0].addr, func(e event) bool { return e.id == "1" }) })
	eventually(t, "the viewer is connected", func() bool { return v.status.Load() == http.StatusOK })
	if err := (foreign{redis: redis, session: session}).say(deadline(t), foreignChunk(1), 0); err != nil {
		t.Fatal(err)
	}
	gone()
	eventually(t, "it is told", func() bool { return len(c.find("n1", "chunk write")) == 1 && len(c.find("n1", "chunk arrive")) == 1 })
	arrive, write := c.find("n1", "chunk arrive")[0], c.find("n1", "chunk write")[0]
	if arrive.text("gapless.by") != "read" || arrive.trace() != write.trace() || write.trace() != traces.TraceID(session, arrive.text("gapless.epoch"), 1).String() {
		t.Errorf("it arrived %v in trace %s, and was written in trace %s", arrive.Attributes, arrive.trace(), write.trace())
	}
}

// With a sampling ratio, a chunk is traced on all nodes or on none.
func TestTraces_areSampledAlikeOnAllNodes(t *testing.T) {
	c := collect(t)
	c.traced(t)
	t.Setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
	t.Setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000") // so that all of it is sent at the end
	n := nodes(t, 2, storetest.Redis(t))
	session := newID()
	const all = 200
	v := &viewer{session: session}
	gone := background(t, func() { v.connect(deadline(t), n[1].addr, func(e event) bool { return e.id == fmt.Sprint(all) }) })
	eventually(t, "the viewer is connected", func() bool { return v.status.Load() == http.StatusOK })
	for i := range all / 20 {
		n[0].append(t, session, words(20*i, 20))
	}
	gone()
	for _, one := range n { // they send the rest when they stop
		one.terminate()
		<-one.exited
	}
	seqs := func(node, name string) map[int64]bool {
		found := map[int64]bool{}
		for _, s := range c.find(node, name) {
			found[s.number("gapless.seq")] = true
		}
		return found
	}
	appended, arrived, written := seqs("n1", "chunk append"), seqs("n2", "chunk arrive"), seqs("n2", "chunk write")
	if len(appended) < all/10 || len(appended) > all/2 {
		t.Errorf("%d of %d chunks are followed", len(appended), all)
	}
	if fmt.Sprint(appended) != fmt.Sprint(arrived) || fmt.Sprint(arrived) != fmt.Sprint(written) {
		t.Errorf("appended %v\narrived %v\nwritten %v", appended, arrived, written)
	}
}

// With traces, connections are taken over as without.
func TestTraces_leaveStreamsTakenOver(t *testing.T) {
	for _, plain := range []bool{false, true} {
		c := collect(t)
		c.traced(t)
		n := start(t, "-pprof", "127.0.0.1:0", fmt.Sprintf("-plain=%t", plain))
		session := newID()
		n.append(t, session, words(0, 3))
		v := &viewer{session: session}
		ctx, cut := context.WithCancel(deadline(t))
		gone := background(t, func() { v.connect(ctx, n.addr, nil) })
		eventually(t, "the viewer has all there is", func() bool { return v.seen.Load() == 3 })
		eventually(t, "the stream's beginning is told while it lasts", func() bool { return len(c.find("", "GET /v1/sessions/:id/stream")) == 1 })
		waits := func() bool { return strings.Contains(n.goroutines(t), "(*Viewer).serve") }
		if plain {
			eventually(t, "it waits in its handler", waits)
		} else {
			eventually(t, "no goroutine waits for it", func() bool { return !waits() })
		}
		if v.status.Load() != http.StatusOK {
			t.Error("its stream has ended")
		}
		cut()
		gone()
	}
}

// goroutines returns the stacks of all goroutines.
func (n *node) goroutines(t *testing.T) string {
	t.Helper()
	at := regexp.MustCompile(`flag=-pprof at=(\S+)`).FindStringSubmatch(n.log.String())
	if at == nil {
		t.Fatal("it serves no profiles")
	}
	response, err := n.http.Get(at[1] + "/debug/pprof/goroutine?debug=2")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil || !bytes.Contains(b, []byte("goroutine ")) {
		t.Fatalf("goroutines: %v %.100q", err, b)
	}
	return string(b)
}

// Without traces, a node has no connection and no goroutine for them.
func TestTraces_areOffUnlessAskedFor(t *testing.T) {
	c := collect(t)
	for _, env := range []map[string]string{
		{"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
		{"OTEL_EXPORTER_OTLP_ENDPOINT": c.URL, "OTEL_SDK_DISABLED": "true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT": c.URL, "OTEL_TRACES_EXPORTER": "none"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT": c.URL},
	} {
		t.Run(fmt.Sprint(env), func(t *testing.T) {
			c.traced(t)
			for name, value := range env {
				t.Setenv(name, value)
			}
			on := len(env) == 1 && env["OTEL_EXPORTER_OTLP_ENDPOINT"] != ""
			calls := c.calls.Load()
			n := start(t, "-pprof", "127.0.0.1:0")
			n.append(t, newID(), words(0, 3))
			if runs := strings.Contains(n.goroutines(t), "opentelemetry"); runs != on {
				t.Errorf("a goroutine of traces runs: %t", runs)
			}
			n.terminate()
			<-n.exited // by then everything would have been sent
			if sent := c.calls.Load() > calls; sent != on {
				t.Errorf("something was sent: %t", sent)
			}
		})
	}
}

// A collector that is away is logged. It affects nothing else, and does not delay the end.
func TestTraces_areNoMatterOfLife(t *testing.T) {
	c := collect(t)
	c.traced(t)
	c.Close()
	n := start(t)
	n.append(t, newID(), words(0, 3))
	n.terminate()
	<-n.exited
	if log := n.log.String(); !strings.Contains(log, "traces") || !strings.Contains(log, "gapless has drained") {
		t.Errorf("its log does not say that traces cannot be sent:\n%s", log)
	}
}

// Unsupported variables are refused, all at once, and the error names the supported values.
func TestTraces_mistakesAreSaid(t *testing.T) {
	env := []string{"OTEL_TRACES_EXPORTER=zipkin", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
		"OTEL_TRACES_SAMPLER=often", "OTEL_TRACES_SAMPLER_ARG=2"}
	mistakes := func() string {
		code, said := program(t, env, "-drain", "-1s") // so that there is a mistake in any case
		if code != 2 {
			t.Errorf("exit status %d", code)
		}
		return said
	}
	said := mistakes()
	for _, part := range []string{`"zipkin"`, "otlp or none", `"grpc"`, "http/protobuf", `"often"`, "parentbased_traceidratio"} {
		if !strings.Contains(said, part) {
			t.Errorf("it does not say %s:\n%s", part, said)
		}
	}
	env = append(env, "OTEL_TRACES_SAMPLER=traceidratio")
	if said := mistakes(); !strings.Contains(said, `OTEL_TRACES_SAMPLER_ARG: "2"`) {
		t.Error(said)
	}
	env = append(env, "OTEL_SDK_DISABLED=TRUE")
	if said := mistakes(); strings.Contains(said, "OTEL") {
		t.Errorf("nothing is wanted, and it says %s", said)
	}
}
