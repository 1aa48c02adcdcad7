package model

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sashabaranov/go-openai"
)

// Config says which model answers, of a service that speaks the chat-completions API.
type Config struct {
	// URL is the API's base, in front of /chat/completions: https://api.openai.com/v1.
	URL string
	// Name is the model's, as the service knows it.
	Name string
	// Key is sent as a bearer token; empty: none is. It is in no log and in no error.
	Key string
	// Options are further members of each request, a JSON object; null takes a member out.
	Options string
	// Timeout is how long the service may be silent before the first word. 2 min: a model
	// that thinks takes its time.
	Timeout time.Duration
	// Stall is how long it may be silent between two words. 30 s: then it is dead.
	Stall time.Duration

	Logger *slog.Logger
}

// DefaultConfig is what the flags start from.
func DefaultConfig() Config {
	return Config{Timeout: 2 * time.Minute, Stall: 30 * time.Second, Logger: slog.New(slog.DiscardHandler)}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	u, err := url.Parse(c.URL)
	switch {
	case c.URL == "":
		errs = append(errs, errors.New("-model-url: it is missing: the base of a chat-completions API, such as https://api.openai.com/v1"))
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Fragment != "":
		errs = append(errs, errors.New("-model-url: it is no https://… or http://… URL")) // which may have a secret in it
	case u.User != nil:
		errs = append(errs, errors.New("-model-url: leave user and password out: a key comes from the environment variable "+KeyVariable))
	}
	if c.Name == "" {
		errs = append(errs, errors.New("-model-name: it is missing: the name of a model that the service at -model-url has"))
	}
	if strings.ContainsFunc(c.Key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		errs = append(errs, errors.New(KeyVariable+": a key is visible ASCII characters, without spaces and line ends"))
	}
	if _, err := c.options(); err != nil {
		errs = append(errs, errors.New("-model-options: it is no JSON object"))
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{{"-model-timeout", c.Timeout}, {"-model-stall", c.Stall}} {
		if d.value < 10*time.Millisecond {
			errs = append(errs, fmt.Errorf("%s: %v is less than 10ms", d.flag, d.value))
		}
	}
	return errors.Join(errs...)
}

// KeyVariable is the environment variable that holds Config.Key. Not OPENAI_API_KEY: that may be
// there for another program, and would be sent to whatever the URL names.
const KeyVariable = "GAPLESS_MODEL_KEY"

func (c Config) options() (members map[string]json.RawMessage, err error) {
	if c.Options != "" {
		err = json.Unmarshal([]byte(c.Options), &members)
		if err == nil && members == nil {
			err = errors.New("null")
		}
	}
	return members, err
}

// OpenAI asks a service that speaks the chat-completions API.
//
// The library asks once, and hands out each event as it came. What it knows of errors is not used:
// its text has what the service said.
type OpenAI struct {
	cfg   Config
	query string                     // of the URL, in front of which the library puts its path
	more  map[string]json.RawMessage // members of each request, beside those that the library writes
	http  *http.Client
}

// NewOpenAI makes one of a valid Config. It connects when it is asked.
func NewOpenAI(cfg Config) *OpenAI {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64 // there is one host, and many answers at once
	o := &OpenAI{cfg: cfg, http: &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the key is for one host
	}}
	o.cfg.URL, o.query, _ = strings.Cut(cfg.URL, "?")
	name, _ := json.Marshal(cfg.Name)
	o.more = map[string]json.RawMessage{"model": name} // the library refuses some names, as of models that it takes for others
	options, _ := cfg.options()                        // Validate has seen it
	maps.Copy(o.more, options)
	return o
}

// How often a question is asked, and how long one waits in between.
const (
	tries    = 3
	pauseMin = 500 * time.Millisecond // doubled each time
	pauseMax = 20 * time.Second       // a service that asks for more has failed: somebody waits for the answer
)

// Answer implements Model.
func (o *OpenAI) Answer(ctx context.Context, conversation []Turn) iter.Seq2[Piece, error] {
	request := openai.ChatCompletionRequest{StreamOptions: &openai.StreamOptions{IncludeUsage: true}}
	for _, t := range conversation { // whose roles are the API's
		request.Messages = append(request.Messages, openai.ChatCompletionMessage{Role: t.Role, Content: t.Content})
	}
	return func(yield func(Piece, error) bool) {
		for try := 1; ; try++ {
			said := false
			failed, stopped := o.attempt(ctx, request, func(p Piece) bool {
				said = true
				return yield(p, nil)
			})
			switch {
			case stopped || failed == nil:
				return
			case ctx.Err() != nil:
				yield(Piece{}, ctx.Err())
				return
			}
			pause := pauseMin<<(try-1)/2 + rand.N(pauseMin<<(try-1))
			if s, ok := errors.AsType[*statusError](failed); ok && s.wait > 0 {
				pause = s.wait
			}
			failure := explain(failed)
			if said || try == tries || pause > pauseMax || !again(failed) {
				yield(Piece{}, failure)
				return
			}
			o.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "the model is asked again", slog.Int("try", try+1), slog.Duration("in", pause),
				slog.String("reason", failure.Reason), slog.Any("err", failure))
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				yield(Piece{}, ctx.Err())
				return
			}
		}
	}
}

// errors of an attempt, beside those of the connection.
var (
	errSilent = errors.New("silent")
	errShort  = errors.New("the answer broke off: it does not say that it is finished")
	errEmpty  = errors.New("the answer is empty")
	errLarge  = errors.New("too much at once, or without a word")
	errEvents = errors.New("no event stream")
	errSaid   = errors.New("the service says that it failed")
)

const (
	// eventMost bounds an event of the service's, in bytes: a word needs some hundred.
	eventMost = 1 << 20
	// muteMost bounds what comes between two words, in bytes. A model that thinks aloud needs
	// some hundred for a word of that, too: this is a hundred thousand.
	muteMost = 64 << 20
	// afterwards is how long what an answer cost may come behind its end.
	afterwards = 5 * time.Second
	// ending is how long the end of the response may come behind the answer's.
	ending = 100 * time.Millisecond
)

// event is one of the service's, as far as it matters here.
type event struct {
	Choices []struct {
		Index int
		Delta struct {
			Content, Refusal string
			ToolCalls        []json.RawMessage `json:"tool_calls"`
		}
		FinishReason string `json:"finish_reason"`
	}
	Usage, Error *json.RawMessage // nil: null, or not there
}

// pieces is what an event says of the answer.
func (e *event) pieces() (all []Piece) {
	for _, c := range e.Choices {
		if c.Index > 0 { // there is one, unless the options ask for more
			continue
		}
		if c.Delta.Content != "" {
			all = append(all, Piece{Text: c.Delta.Content})
		}
		if c.Delta.Refusal != "" {
			all = append(all, Piece{Text: c.Delta.Refusal, Refusal: true})
		}
		if len(c.Delta.ToolCalls) > 0 {
			calls, _ := json.Marshal(c.Delta.ToolCalls) // which were just read
			all = append(all, Piece{ToolCalls: calls})
		}
		if c.FinishReason != "" {
			all = append(all, Piece{Finish: c.FinishReason})
		}
	}
	return all
}

// attempt asks once. stopped says that nobody wants the rest.
func (o *OpenAI) attempt(ctx context.Context, request openai.ChatCompletionRequest, yield func(Piece) bool) (failed error, stopped bool) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := o.cfg.Timeout
	watch := time.AfterFunc(patience, func() { cancel(errSilent) })
	defer watch.Stop()

	g := &gate{model: o}
	cfg := openai.DefaultConfig(o.cfg.Key)
	cfg.BaseURL, cfg.HTTPClient, cfg.EmptyMessagesLimit = o.cfg.URL, g, math.MaxUint32 // the gate bounds those
	stream, err := openai.NewClientWithConfig(cfg).CreateChatCompletionStream(ctx, request)
	if err != nil {
		if context.Cause(ctx) == errSilent {
			err = errSilent
		}
		return err, false
	}
	defer stream.Close()
	var usage *json.RawMessage // some services say it in each event: the last one counts
	finish, said, mute := "", false, 0
	for {
		var raw []byte
		if raw, err = stream.RecvRaw(); err != nil {
			break
		}
		watch.Stop() // not while others take what it has said
		g.pass(len(raw))
		var e event
		if err = json.Unmarshal(raw, &e); err != nil {
			break
		}
		if mute += len(raw); mute > muteMost {
			err = errLarge
			break
		}
		if e.Error != nil {
			err = errSaid
			break
		}
		if e.Usage != nil && (*e.Usage)[0] == '{' {
			usage = e.Usage
		}
		for _, p := range e.pieces() {
			switch {
			case p.Text != "" || p.ToolCalls != nil:
				patience, said, mute = o.cfg.Stall, true, 0
			case finish != "":
				continue
			default:
				finish = p.Finish
			}
			if said && !yield(p) {
				return nil, true
			}
		}
		if finish != "" {
			patience = min(patience, afterwards)
		}
		watch.Reset(patience)
	}
	if finish != "" && errors.Is(err, io.EOF) { // a connection is good for the next answer when this one was read to its end
		watch.Reset(ending)
		_, _ = g.Read(make([]byte, 1))
	}
	silent := context.Cause(ctx) == errSilent
	switch {
	case finish != "" && said: // whatever is missing behind it
		return nil, usage != nil && !yield(Piece{Usage: *usage})
	case finish != "" && (silent || errors.Is(err, io.EOF)):
		return errEmpty, false
	case silent:
		return errSilent, false
	case !errors.Is(err, io.EOF):
		return err, false
	}
	return errShort, false
}

// statusError is an answer with another status than 200.
type statusError struct {
	status int
	wait   time.Duration // as the service asks for it
}

func (e *statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", e.status, http.StatusText(e.status)))
}

// again says whether a failure may be gone in a moment.
func again(err error) bool {
	if s, ok := errors.AsType[*statusError](err); ok {
		return s.status == http.StatusRequestTimeout || s.status == http.StatusTooManyRequests ||
			s.status >= http.StatusInternalServerError && s.status != http.StatusNotImplemented
	}
	for _, lasting := range []error{errSilent, errEmpty, errEvents, errLarge, http.ErrSchemeMismatch} {
		if errors.Is(err, lasting) {
			return false
		}
	}
	return !untrusted(err)
}

// explain says what everybody may know of a failure. What the service said is left out: it may
// repeat the key, or the question.
func explain(err error) *Error {
	if s, ok := errors.AsType[*statusError](err); ok {
		e := &Error{Reason: Rejected, Detail: "the model's service answered " + s.Error()}
		switch {
		case s.status == http.StatusUnauthorized || s.status == http.StatusForbidden:
			e.Reason = Unauthorized
		case s.status == http.StatusNotFound:
			e.Reason = NotFound
		case s.status == http.StatusTooManyRequests:
			e.Reason = RateLimited
		case s.status == http.StatusRequestTimeout || s.status >= http.StatusInternalServerError:
			e.Reason = Unavailable
		}
		if s.wait > 0 {
			e.Detail += fmt.Sprintf(", and asks to wait for %v", s.wait.Round(time.Second))
		}
		return e
	}
	_, asked := errors.AsType[*url.Error](err)
	dns, lookup := errors.AsType[*net.DNSError](err)
	switch {
	case errors.Is(err, errSilent):
		return &Error{Reason: Timeout, Detail: "the model said nothing for too long"}
	case errors.Is(err, errEmpty):
		return &Error{Reason: Empty, Detail: "the model said nothing"}
	case errors.Is(err, errEvents):
		return &Error{Reason: Rejected, Detail: "the model's service did not answer with an event stream"}
	case errors.Is(err, errLarge):
		return &Error{Reason: Broken, Detail: "the model's service sent too much at once, or without a word of the answer"}
	case errors.Is(err, http.ErrSchemeMismatch):
		return &Error{Reason: Unavailable, Detail: "the model's service speaks plain HTTP, and -model-url says https"}
	case untrusted(err):
		return &Error{Reason: Unavailable, Detail: "the certificate of the model's service is not trusted", Cause: known(err)}
	case lookup:
		return &Error{Reason: Unavailable, Detail: "the name of the model's service was not found", Cause: dns}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &Error{Reason: Unavailable, Detail: "the model's service refuses connections", Cause: known(err)}
	case asked:
		return &Error{Reason: Unavailable, Detail: "the connection to the model's service broke", Cause: known(err)}
	}
	return &Error{Reason: Broken, Detail: "the answer of the model's service broke off, or cannot be read", Cause: known(err)}
}

// known is what the log may have of an error; nil: nothing. The URL may have a secret in it, and
// what net/http says of a response that it cannot read repeats the response.
func known(err error) error {
	if c, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return c
	}
	if n, ok := errors.AsType[*net.OpError](err); ok {
		return n
	}
	return nil
}

func untrusted(err error) bool {
	_, bad := errors.AsType[*tls.CertificateVerificationError](err)
	_, none := errors.AsType[tls.RecordHeaderError](err) // it does not speak TLS
	_, alert := errors.AsType[tls.AlertError](err)
	return bad || none || alert
}

// gate is the way to the service, of one attempt. It adds what the library does not know to a
// request, lets only event streams through, and bounds them. Everything else is an error by its
// status alone: nothing reads what it says, however long that is.
type gate struct {
	model *OpenAI
	body  io.ReadCloser
	left  int // bytes that may come before pass is called again
}

// Do implements openai.HTTPDoer.
func (g *gate) Do(r *http.Request) (*http.Response, error) {
	if err := g.model.extend(r); err != nil {
		return nil, err
	}
	res, err := g.model.http.Do(r) // #nosec G704 -- where to is the operator's choice, -model-url, and redirects are not followed
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, &statusError{res.StatusCode, retryAfter(res.Header.Get("Retry-After"))}
	}
	kind, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err != nil || kind != "text/event-stream" || res.Header.Get("Content-Encoding") != "" { // but gzip, which net/http has taken off
		_ = res.Body.Close()
		return nil, errEvents
	}
	g.body, g.left = res.Body, eventMost
	res.Body = g
	return res, nil
}

// extend puts the query of the URL and the configured members into a request.
func (o *OpenAI) extend(r *http.Request) error {
	r.URL.RawQuery = o.query
	var members map[string]json.RawMessage
	if err := json.NewDecoder(r.Body).Decode(&members); err != nil {
		return err
	}
	for name, value := range o.more {
		if members[name] = value; string(value) == "null" {
			delete(members, name)
		}
	}
	body, err := json.Marshal(members)
	if err != nil {
		return err
	}
	r.ContentLength, r.Body, r.GetBody = int64(len(body)), io.NopCloser(bytes.NewReader(body)), nil
	return nil
}

func (g *gate) Read(p []byte) (int, error) {
	if g.left <= 0 {
		return 0, errLarge
	}
	n, err := g.body.Read(p[:min(len(p), g.left)])
	g.left -= n
	return n, err
}

func (g *gate) Close() error { return g.body.Close() }

// pass says that an event of n bytes was taken. Of what stands between events, which the library
// keeps as long as the answer lasts, each pays for its own lines and no more.
func (g *gate) pass(n int) {
	const lines = 128 // data:, and the event: and id: that some services send
	g.left = min(g.left+n+lines, eventMost)
}

// retryAfter is how long a header asks to wait (RFC 9110, section 10.2.3); 0: it does not say.
func retryAfter(text string) time.Duration {
	if n, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(text); err == nil {
		return max(time.Until(t), 0)
	}
	return 0
}
