package model

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// key is in every request, and in everything that the service says in these tests. No error and no
// log may contain it.
const key = "sk-open-sesame"

// service is a fake service with the public API, as far as a test needs it.
type service struct {
	*httptest.Server
	asked atomic.Int64
	body  atomic.Pointer[string]
	gone  chan struct{} // receives when a request's context has ended
	log   strings.Builder
}

// serve handles the nth request, from 1, with turn.
func serve(t *testing.T, turn func(n int64, w http.ResponseWriter, r *http.Request)) *service {
	t.Helper()
	s := &service{gone: make(chan struct{}, 8)}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		text := string(b)
		s.body.Store(&text)
		if r.URL.Path != "/v1/chat/completions" || r.URL.RawQuery != "secret="+key || r.Header.Get("Authorization") != "Bearer "+key {
			t.Errorf("%s %s, %q", r.Method, r.URL, r.Header.Get("Authorization"))
		}
		turn(s.asked.Add(1), w, r)
		if r.Context().Err() != nil {
			s.gone <- struct{}{}
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// events begins an event stream with some events.
func events(w http.ResponseWriter, all ...string) {
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	for _, e := range all {
		fmt.Fprintf(w, "data: %s\n\n", e)
	}
	_ = http.NewResponseController(w).Flush()
}

func delta(content string) string {
	b, _ := json.Marshal(content)
	return `{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":` + string(b) + `},"finish_reason":null}],"usage":null}`
}

const (
	role   = `{"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"finish_reason":null}]}`
	finish = `{"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`
	usage  = `{"id":"c","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}`
)

// failure is how some services report in an answer that it failed.
const failure = `{"choices":[{"index":0,"delta":{"content":"` + key + `"},"finish_reason":"error"}],"error":{"code":502,"message":"` + key + `"}}`

// raw responds with these bytes, and closes the connection.
func raw(w http.ResponseWriter, text string) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	_, _ = io.WriteString(conn, text)
	_ = conn.Close()
}

// says sends pieces, and a finish.
func says(w http.ResponseWriter, pieces ...string) {
	all := []string{role}
	for _, p := range pieces {
		all = append(all, delta(p))
	}
	events(w, append(all, finish, usage, "[DONE]")...)
}

func (s *service) config() Config {
	cfg := DefaultConfig()
	cfg.Kind = "openai"
	cfg.URL, cfg.Name, cfg.Key = s.URL+"/v1?secret="+key, "davinci", key // a name that the library knows
	cfg.Logger = slog.New(slog.NewTextHandler(&s.log, nil))
	return cfg
}

// ask asks the service, and collects its answer.
func (s *service) ask(t *testing.T, ctx context.Context, change func(*Config)) (text string, all []Piece, err error) {
	t.Helper()
	cfg := s.config()
	if change != nil {
		change(&cfg)
	}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	o := NewOpenAI(cfg)
	for p, failed := range o.Answer(ctx, []Turn{{Role: RoleSystem, Content: "be brief"}, {Role: RoleUser, Content: "a"}, {Role: RoleAssistant, Content: "b"}, {Role: RoleUser, Content: "sesame?"}}) {
		if failed != nil {
			err = failed
			break
		}
		text += p.Text
		all = append(all, p)
	}
	o.http.CloseIdleConnections()
	said := s.log.String()
	if err != nil {
		said += err.Error()
	}
	for _, secret := range []string{key, "sesame"} {
		if strings.Contains(said, secret) {
			t.Errorf("a secret is told: %s", said)
		}
	}
	return text, all, err
}

func TestOpenAI_conversationGoesThereAndTheAnswerComesAsItIs(t *testing.T) {
	t.Parallel()
	s := serve(t, func(_ int64, w http.ResponseWriter, _ *http.Request) {
		events(w, role, delta("Ja, "), delta("\u2028\n🍞"),
			`{"choices":[{"index":1,"delta":{"content":"another"}},{"index":0,"delta":{"refusal":"not that"}}],"usage":{"total_tokens":2}}`,
			`{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","arguments":"{"}}]}}]}`,
			finish, finish, usage, `{"choices":[],"usage":7}`, "[DONE]", delta("behind its end"))
	})
	text, all, err := s.ask(t, t.Context(), func(c *Config) {
		c.Options = `{"temperature":0.5,"a.b":[9007199254740993],"stream_options":null,"messages.0":null}`
	})
	if text != "Ja, \u2028\n🍞not that" || err != nil {
		t.Errorf("%q %v", text, err)
	}
	if len(all) != 5 || !all[2].Refusal || !strings.Contains(string(all[3].ToolCalls), `"name":"f"`) || all[4].Finish != "stop" || !strings.Contains(string(all[4].Usage), `"total_tokens":5`) {
		t.Errorf("%+v", all)
	}
	var sent, want any
	_ = json.Unmarshal([]byte(*s.body.Load()), &sent)
	_ = json.Unmarshal([]byte(`{"model":"davinci","stream":true,"temperature":0.5,"a.b":[9007199254740993],"messages":[{"role":"system","content":"be brief"},
		{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"sesame?"}]}`), &want)
	if fmt.Sprint(sent) != fmt.Sprint(want) || !strings.Contains(*s.body.Load(), "[9007199254740993]") {
		t.Errorf("%s", *s.body.Load())
	}
}

func TestOpenAI_asksAgainOnlyBeforeTheFirstWord(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first  func(w http.ResponseWriter, r *http.Request)
		again  bool
		reason string // if the question is not sent again
		within time.Duration
	}{
		"busy": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, key, http.StatusServiceUnavailable) }, true, "", 0},
		"rate limited": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			http.Error(w, key, http.StatusTooManyRequests)
		}, true, "", time.Second},
		"cut before a word":  {func(w http.ResponseWriter, _ *http.Request) { events(w, role); panic(http.ErrAbortHandler) }, true, "", 0},
		"ends before a word": {func(w http.ResponseWriter, _ *http.Request) { events(w, role) }, true, "", 0},
		"error before a word": {func(w http.ResponseWriter, _ *http.Request) {
			events(w, role, `{"error":{"message":"`+key+`"}}`, finish)
		}, true, "", 0},
		"error beside it": {func(w http.ResponseWriter, _ *http.Request) { events(w, failure) }, true, "", 0},
		"no response":     {func(w http.ResponseWriter, _ *http.Request) { raw(w, "") }, true, "", 0},
		"no HTTP":         {func(w http.ResponseWriter, _ *http.Request) { raw(w, key+"\r\n\r\n") }, true, "", 0},
		"a bad header": {func(w http.ResponseWriter, _ *http.Request) {
			raw(w, "HTTP/1.1 200 OK\r\n"+key+"\r\n\r\n")
		}, true, "", 0},
		"a bad chunk": {func(w http.ResponseWriter, _ *http.Request) {
			raw(w, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"+key+"\r\n")
		}, true, "", 0},
		"alive before a word": {func(w http.ResponseWriter, _ *http.Request) {
			events(w)
			fmt.Fprint(w, strings.Repeat(": alive\n\n", 10_000))
			says(w, "whole")
		}, false, "", 0},
		"a status in its own words": {func(w http.ResponseWriter, _ *http.Request) {
			raw(w, "HTTP/1.1 401 "+key+"\r\nWWW-Authenticate: "+key+"\r\nContent-Length: 0\r\n\r\n")
		}, false, Unauthorized, 0},
		"for long": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "60")
			http.Error(w, key, http.StatusTooManyRequests)
		}, false, RateLimited, 0},
		"401": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, key, http.StatusUnauthorized) }, false, Unauthorized, 0},
		"403": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, key, http.StatusForbidden) }, false, Unauthorized, 0},
		"404": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, key, http.StatusNotFound) }, false, NotFound, 0},
		"400": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, key, http.StatusBadRequest) }, false, Rejected, 0},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		}, false, Rejected, 0},
		"no events": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"error":%q}`, key) }, false, Rejected, 0},
		"the whole at once": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"choices":[{"index":0,"message":{"role":"assistant","content":"whole"},"finish_reason":"stop"}]}`)
		}, false, Rejected, 0},
		"another encoding": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "br")
			says(w, "whole")
		}, false, Rejected, 0},
		"error beside a word":  {func(w http.ResponseWriter, _ *http.Request) { events(w, delta("x"), failure) }, false, Broken, 0},
		"empty":                {func(w http.ResponseWriter, _ *http.Request) { says(w) }, false, Empty, 0},
		"empty without an end": {func(w http.ResponseWriter, r *http.Request) { events(w, finish, "[DONE]"); <-r.Context().Done() }, false, Empty, 0},
		"a huge line":          {func(w http.ResponseWriter, _ *http.Request) { says(w, strings.Repeat("x", 2<<20)) }, false, Broken, 0},
		"cut behind a word":    {func(w http.ResponseWriter, _ *http.Request) { events(w, delta("x")); panic(http.ErrAbortHandler) }, false, Broken, 0},
		"ends behind a word":   {func(w http.ResponseWriter, _ *http.Request) { events(w, delta("x")) }, false, Broken, 0},
		"no JSON":              {func(w http.ResponseWriter, _ *http.Request) { events(w, delta("x"), "sesame {"+key, finish) }, false, Broken, 0},
		"error behind a word": {func(w http.ResponseWriter, _ *http.Request) {
			events(w, delta("x"), `{"error":{"message":"`+key+`"}}`, finish)
		}, false, Broken, 0},
		"silent":             {func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, false, Timeout, 0},
		"silent in its head": {func(w http.ResponseWriter, r *http.Request) { events(w, role); <-r.Context().Done() }, false, Timeout, 0},
		"stalls":             {func(w http.ResponseWriter, r *http.Request) { events(w, delta("x")); <-r.Context().Done() }, false, Timeout, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, func(n int64, w http.ResponseWriter, r *http.Request) {
				if n == 1 {
					c.first(w, r)
					return
				}
				says(w, "whole")
			})
			begun := time.Now()
			text, _, err := s.ask(t, t.Context(), func(cfg *Config) { cfg.Timeout, cfg.Stall = 10*time.Second, 5*time.Second })
			if c.again {
				if text != "whole" || err != nil || s.asked.Load() != 2 || time.Since(begun) < max(c.within, pauseMin/2) {
					t.Errorf("%q, %v: asked %d times in %v", text, err, s.asked.Load(), time.Since(begun))
				}
				return
			}
			e, ok := errors.AsType[*Error](err)
			if !ok {
				e = &Error{}
			}
			if e.Reason != c.reason || e.Reason == "" && (text != "whole" || err != nil) || s.asked.Load() != 1 {
				t.Errorf("%q, %v: asked %d times", text, err, s.asked.Load())
			}
			if c.reason == Timeout {
				<-s.gone // the request does not stay open
			}
		})
	}
}

func TestOpenAI_givesUpAndSaysWhy(t *testing.T) {
	t.Parallel()
	s := serve(t, func(_ int64, w http.ResponseWriter, _ *http.Request) {
		http.Error(w, key, http.StatusInternalServerError)
	})
	_, _, err := s.ask(t, t.Context(), nil)
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != Unavailable || s.asked.Load() != tries {
		t.Errorf("%v after %d tries", err, s.asked.Load())
	}
	if n := strings.Count(s.log.String(), "the model is asked again"); n != tries-1 {
		t.Errorf("%d tries are in the log", n)
	}
	s.Close()
	if _, _, err = s.ask(t, t.Context(), nil); err == nil || !strings.Contains(err.Error(), "refuses connections") {
		t.Errorf("%v", err)
	}
	strange := &service{Server: httptest.NewUnstartedServer(nil)}
	strange.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	strange.StartTLS()
	defer strange.Close()
	if _, _, err = strange.ask(t, t.Context(), nil); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v", err)
	}
	strange.URL = strings.Replace(serve(t, nil).URL, "http:", "https:", 1)
	if _, _, err = strange.ask(t, t.Context(), nil); err == nil || !strings.Contains(err.Error(), "plain HTTP") {
		t.Errorf("%v", err)
	}
	if strings.Contains(strange.log.String(), "asked again") {
		t.Errorf("what no try can mend was tried again: %s", strange.log.String())
	}
	strange.URL = "https://" + s.hang(t)
	if _, _, err = strange.ask(t, t.Context(), func(c *Config) { c.Timeout = 100 * time.Millisecond }); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("%v", err)
	}
}

// The key is only for one host.
func TestOpenAI_followsNoRedirect(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("it was followed: %s %s, %q", r.Method, r.URL, r.Header.Get("Authorization"))
	}))
	defer other.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		s := serve(t, func(_ int64, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL+"/v1/"+key, status)
		})
		_, _, err := s.ask(t, t.Context(), nil)
		if e, ok := errors.AsType[*Error](err); !ok || e.Reason != Rejected || !strings.Contains(e.Detail, fmt.Sprint(status)) || s.asked.Load() != 1 {
			t.Errorf("%d: %v, asked %d times", status, err, s.asked.Load())
		}
	}
}

func TestOpenAI_readsWhatIsCompressedWordByWord(t *testing.T) {
	t.Parallel()
	first := make(chan struct{})
	s := serve(t, func(_ int64, w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			t.Error("gzip is not asked for, and none has to come")
		}
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		fmt.Fprintf(z, "data: %s\n\n", delta("a"))
		_ = z.Flush()
		_ = http.NewResponseController(w).Flush()
		select {
		case <-first:
		case <-r.Context().Done():
			return
		}
		fmt.Fprintf(z, "data: %s\n\ndata: %s\n\ndata: [DONE]\n\n", delta("b"), finish)
		_ = z.Close()
	})
	o := NewOpenAI(s.config())
	defer o.http.CloseIdleConnections()
	var text strings.Builder
	for p, err := range o.Answer(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		if text.WriteString(p.Text); p.Text == "a" {
			close(first)
		}
	}
	if text.String() != "ab" {
		t.Errorf("%q", text.String())
	}
	// Data that is small on the wire is limited by its decompressed size.
	s = serve(t, func(_ int64, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Type", "text/event-stream")
		z := gzip.NewWriter(w)
		fmt.Fprintf(z, "data: %s\n\n", delta(strings.Repeat("x", 2*eventMost)))
		_ = z.Close()
	})
	_, _, err := s.ask(t, t.Context(), nil)
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != Broken {
		t.Errorf("%v", err)
	}
}

// Headers that do not follow the letter do not refuse a good stream.
func TestOpenAI_readsAStreamUnderAnyHeaderThatMayMeanIt(t *testing.T) {
	t.Parallel()
	const kind = "text/event-stream"
	plain := "data: " + delta("sesame") + "\n\ndata: " + finish + "\n\ndata: [DONE]\n\n"
	var b strings.Builder
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, plain)
	_ = z.Close()
	zipped := b.String()
	for _, c := range []struct{ kind, coding, body, reason string }{
		{kind, "none", plain, ""}, {kind, "utf-8", plain, ""}, {kind, "UTF8", plain, ""}, {kind, "Identity", plain, ""}, {kind, ", ", plain, ""},
		{kind, "x-gzip", zipped, ""}, {kind, "GZIP", zipped, ""}, {kind, "identity, X-Gzip", zipped, ""}, {kind, "gzip, none", zipped, ""},
		{kind, "x-gzip", zipped[:20], Broken}, {kind, "x-gzip", plain, Broken}, {kind, "x-gzip", "", Broken},
		{kind, "br", plain, Rejected}, {kind, "deflate", plain, Rejected}, {kind, "none, zstd", plain, Rejected},
		{kind + "; charset", "", plain, ""}, {kind + ";", "", plain, ""}, {kind + "; charset=a; charset=b", "", plain, ""}, {kind + ", " + kind, "", plain, ""},
		{"Text/Event-Stream ;=;", "", plain, ""}, {kind + "s", "", plain, Rejected}, {"text/plain; x=" + kind, "", plain, Rejected}, {"", "", plain, Rejected},
	} {
		s := serve(t, func(_ int64, w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = []string{c.kind}
			if c.coding != "" {
				w.Header()["Content-Encoding"] = []string{c.coding}
			}
			_, _ = io.WriteString(w, c.body)
		})
		o := NewOpenAI(s.config())
		text := ""
		failed, _ := o.attempt(t.Context(), nil, func(p Piece) bool { text += p.Text; return true })
		o.http.CloseIdleConnections()
		reason := ""
		if failed != nil {
			reason = explain(failed).Reason
		}
		if reason != c.reason || reason == "" && text != "sesame" {
			t.Errorf("%q, %q: %q, %v", c.kind, c.coding, text, failed)
		}
	}
}

// hang returns the address of a listener that never responds.
func (*service) hang(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

// The service notices a stop at once, at any point of an answer.
func TestOpenAI_endOfTheContextEndsTheRequest(t *testing.T) {
	t.Parallel()
	for name, turn := range map[string]func(w http.ResponseWriter, r *http.Request){
		"before its header": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"before its words":  func(w http.ResponseWriter, r *http.Request) { events(w, role); <-r.Context().Done() },
		"between two":       func(w http.ResponseWriter, r *http.Request) { events(w, delta("x")); <-r.Context().Done() },
		"before another try": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "15")
			http.Error(w, "", http.StatusTooManyRequests)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			s := serve(t, func(_ int64, w http.ResponseWriter, r *http.Request) {
				time.AfterFunc(50*time.Millisecond, cancel)
				turn(w, r)
			})
			_, _, err := s.ask(t, ctx, nil)
			if !errors.Is(err, context.Canceled) || s.asked.Load() != 1 {
				t.Errorf("%v, asked %d times", err, s.asked.Load())
			}
			if !strings.Contains(name, "another") {
				<-s.gone
			}
		})
	}
}

// While the caller handles content, no timeout runs: a slow caller is not a slow model.
func TestOpenAI_slowReaderIsNoStall(t *testing.T) {
	t.Parallel()
	taken := make(chan struct{})
	s := serve(t, func(_ int64, w http.ResponseWriter, _ *http.Request) {
		events(w, delta("a"), delta("b"))
		<-taken
		says(w, "c")
	})
	cfg := s.config()
	cfg.Stall, cfg.Timeout = 50*time.Millisecond, time.Minute
	o := NewOpenAI(cfg)
	defer o.http.CloseIdleConnections()
	var said []string
	for p, err := range o.Answer(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		if said = append(said, p.Text); p.Text == "b" {
			time.Sleep(4 * cfg.Stall) // the slow caller
			close(taken)
		}
	}
	if !slices.Equal(said, []string{"a", "b", "c", ""}) {
		t.Errorf("%q", said)
	}
}

func TestConfig_reportsEveryMistakeAndNoSecret(t *testing.T) {
	t.Parallel()
	err := Config{Kind: "openai", URL: "https://u:" + key + "@h/v1", Key: key + "\n", Options: `["` + key + `"]`, Timeout: -1}.Validate()
	for _, want := range []string{"-model-url", KeyVariable, "-model-name", "-model-options", "-model-timeout", "-model-stall"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not reported: %v", want, err)
		}
	}
	for _, bad := range []string{"", "ftp://h", "https:// " + key, "h:80", "https://", "https://h/v1#" + key} {
		c := Config{Kind: "openai", URL: bad, Name: "m", Timeout: time.Second, Stall: time.Second, Options: "null"}
		if got := c.Validate(); got == nil || strings.Contains(got.Error(), key) || !strings.Contains(got.Error(), "-model-url") {
			t.Errorf("%q: %v", bad, got)
		}
	}
	if strings.Contains(err.Error(), key) {
		t.Errorf("the key is told: %v", err)
	}
	good := DefaultConfig()
	good.Kind, good.URL, good.Name = "openai", "http://127.0.0.1:11434/v1", "llama"
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	if good.Kind = "demo"; good.Validate() == nil {
		t.Error("the demo has no URL")
	}
	if good.Kind = "oracle"; good.Validate() == nil {
		t.Error("there is no such model")
	}
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
}

// One connection is used for many answers, over HTTP/1.1 and HTTP/2.
func TestOpenAI_keepsItsConnection(t *testing.T) {
	t.Parallel()
	for major, most := range map[int]int64{1: 3, 2: 1} { // more if the end of a response comes late
		var made atomic.Int64
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor != major {
				t.Errorf("it is asked by %s", r.Proto)
			}
			says(w, "a", "b")
		}))
		s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				made.Add(1)
			}
		}
		s.EnableHTTP2 = major == 2
		s.StartTLS()
		cfg := DefaultConfig()
		cfg.URL, cfg.Name = s.URL, "m"
		o := NewOpenAI(cfg)
		o.http.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, MinVersion: tls.VersionTLS12}
		for range 10 {
			for _, err := range o.Answer(t.Context(), nil) {
				if err != nil {
					t.Error(err)
				}
			}
		}
		if got := made.Load(); got > most {
			t.Errorf("HTTP/%d: %d connections for ten answers", major, got)
		}
		o.http.CloseIdleConnections()
		s.Close()
	}
}
