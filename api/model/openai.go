package model

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config describes the model that answers, at a service with the chat-completions API.
type Config struct {
	// Kind is what answers: demo, or openai, a service with the chat-completions API.
	Kind string
	// URL is the base URL of the API, without /chat/completions: https://api.openai.com/v1.
	URL string
	// Name is the service's name for the model.
	Name string
	// Key is sent as a bearer token; empty: none is sent. It appears in no log and in no error.
	Key string
	// Options is a JSON object with further members of each request; null removes a member.
	Options string
	// Timeout is how long the service may be silent before the first word. 2 min, because a model
	// may think for a while.
	Timeout time.Duration
	// Stall is how long it may be silent between two words. After 30 s it is dead.
	Stall time.Duration

	Logger *slog.Logger
}

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{Kind: "demo", Timeout: 2 * time.Minute, Stall: 30 * time.Second, Logger: slog.New(slog.DiscardHandler)}
}

// Open returns what c describes.
func Open(c Config) Model {
	if c.Kind == "demo" {
		return NewDemo()
	}
	return NewOpenAI(c)
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	switch {
	case c.Kind == "demo" && c.URL == "":
		return nil
	case c.Kind == "demo":
		return errors.New("-model-url: cannot be combined with -model demo")
	case c.Kind != "openai":
		return fmt.Errorf("-model: must be demo or openai (%q)", c.Kind)
	}
	var errs []error
	u, err := url.Parse(c.URL)
	switch {
	case c.URL == "":
		errs = append(errs, errors.New("-model-url: it is missing: the base of a chat-completions API, such as https://api.openai.com/v1"))
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Fragment != "":
		errs = append(errs, errors.New("-model-url: it is no https://… or http://… URL")) // the URL may contain a secret
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

// KeyVariable is the environment variable for Config.Key. It is not OPENAI_API_KEY, which may be
// set for another program, and would be sent to any host that the URL names.
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

// OpenAI asks a service that has the chat-completions API, and reads its stream (stream.go).
type OpenAI struct {
	cfg  Config
	url  string
	more map[string]json.RawMessage // members of each request, next to the conversation
	http *http.Client
}

// NewOpenAI returns an OpenAI for a valid Config. It connects when a question comes.
func NewOpenAI(cfg Config) *OpenAI {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64 // there is one host, and many answers at once
	o := &OpenAI{cfg: cfg, http: &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the key is for one host
	}}
	base, query, _ := strings.Cut(cfg.URL, "?")
	if o.url = strings.TrimRight(base, "/") + "/chat/completions"; query != "" {
		o.url += "?" + query
	}
	name, _ := json.Marshal(cfg.Name)
	o.more = map[string]json.RawMessage{"model": name, "stream": json.RawMessage("true"), "stream_options": json.RawMessage(`{"include_usage":true}`)}
	options, _ := cfg.options() // Validate has checked them
	maps.Copy(o.more, options)
	return o
}

// How often a question is sent, and how long to wait in between.
const (
	tries    = 3
	pauseMin = 500 * time.Millisecond // doubled each time
	pauseMax = 20 * time.Second       // a longer wait counts as a failure, because a user is waiting
)

// Answer implements Model.
func (o *OpenAI) Answer(ctx context.Context, conversation []Turn) iter.Seq2[Piece, error] {
	request := o.request(conversation, more(ctx))
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

// request returns the body of a question.
func (o *OpenAI) request(conversation []Turn, more map[string]json.RawMessage) []byte {
	messages, _ := json.Marshal(conversation) // text is always valid JSON
	members := map[string]json.RawMessage{"messages": messages}
	maps.Copy(members, o.more)
	maps.Copy(members, more)
	maps.DeleteFunc(members, func(_ string, value json.RawMessage) bool { return string(value) == "null" })
	body, _ := json.Marshal(members) // each is valid JSON
	return body
}

// Pass sends a request to the service unchanged, and returns its response, whatever its status.
func (o *OpenAI) Pass(ctx context.Context, request []byte) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	watch := time.AfterFunc(o.cfg.Timeout, func() { cancel(errSilent) })
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, o.url, bytes.NewReader(request))
	if err != nil {
		cancel(nil)
		return nil, &Error{Reason: Rejected, Detail: "the request cannot be sent"}
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept-Encoding", "identity") // the bytes of the response are passed on
	if o.cfg.Key != "" {
		r.Header.Set("Authorization", "Bearer "+o.cfg.Key)
	}
	res, err := o.http.Do(r) // #nosec G704 -- the operator chooses the destination (-model-url), and redirects are not followed
	if err != nil {
		silent := context.Cause(ctx) == errSilent
		cancel(nil)
		if silent {
			err = errSilent
		}
		return nil, explain(err)
	}
	res.Body = &watched{res.Body, watch, o.cfg.Timeout, cancel}
	return res, nil
}

// watched is the body of a response that is given up when nothing has arrived for too long.
type watched struct {
	io.ReadCloser
	watch   *time.Timer
	timeout time.Duration
	cancel  context.CancelCauseFunc
}

// Read implements io.Reader. It restarts the timeout.
func (w *watched) Read(p []byte) (int, error) {
	w.watch.Reset(w.timeout)
	return w.ReadCloser.Read(p)
}

// Close implements io.Closer.
func (w *watched) Close() error {
	w.watch.Stop()
	w.cancel(nil)
	return w.ReadCloser.Close()
}

// send sends a question once. The response is an event stream.
func (o *OpenAI) send(ctx context.Context, request []byte) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, o.url, bytes.NewReader(request))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", eventStream)
	if o.cfg.Key != "" {
		r.Header.Set("Authorization", "Bearer "+o.cfg.Key)
	}
	res, err := o.http.Do(r) // #nosec G704 -- the operator chooses the destination (-model-url), and redirects are not followed
	if err != nil {
		return nil, err
	}
	switch {
	case res.StatusCode != http.StatusOK: // the body is ignored, however long it is
		err = &statusError{res.StatusCode, retryAfter(res.Header.Get("Retry-After"))}
	case !isEvents(res.Header.Get("Content-Type")):
		err = errEvents
	default:
		err = decode(res)
	}
	if err != nil {
		_ = res.Body.Close()
		return nil, err
	}
	return res, nil
}

const eventStream = "text/event-stream"

// isEvents reports whether a Content-Type is that of an event stream. Its parameters do not matter,
// however malformed they are, and neither does what a proxy added after a comma.
func isEvents(contentType string) bool {
	kind, _, _ := strings.Cut(contentType, ";")
	kind, _, _ = strings.Cut(kind, ",")
	return strings.EqualFold(strings.TrimSpace(kind), eventStream)
}

// codings are the content codings that we never ask for and cannot decode
// (https://www.iana.org/assignments/http-parameters). Every other name is no coding: some gateways
// send none or utf-8.
var codings = map[string]bool{
	"aes128gcm": true, "br": true, "compress": true, "dcb": true, "dcz": true, "deflate": true, "exi": true, "pack200-gzip": true, "x-compress": true, "zstd": true,
}

// decode makes the body of a response plain. net/http has done so already, and removed the header,
// if the coding is gzip.
func decode(res *http.Response) error {
	all := strings.Split(strings.Join(res.Header.Values("Content-Encoding"), ","), ",")
	for _, coding := range slices.Backward(all) { // the last one was applied last
		switch coding = strings.ToLower(strings.TrimSpace(coding)); {
		case codings[coding]:
			return errEvents
		case coding == "gzip" || coding == "x-gzip":
			res.Body, res.Uncompressed = &unzipped{ReadCloser: res.Body}, true
		}
	}
	return nil
}

// unzipped decodes a body as it comes.
type unzipped struct {
	io.ReadCloser // the compressed body
	plain         *gzip.Reader
	err           error
}

func (u *unzipped) Read(p []byte) (int, error) {
	if u.plain == nil && u.err == nil { // which waits for the header
		u.plain, u.err = gzip.NewReader(u.ReadCloser)
	}
	if u.err != nil {
		return 0, u.err
	}
	return u.plain.Read(p)
}

// Errors of an attempt, besides those of the connection.
var (
	errSilent = errors.New("silent")
	errShort  = errors.New("the answer does not say that it is finished")
	errEmpty  = errors.New("the answer is empty")
	errLarge  = errors.New("too much at once, or without a word")
	errEvents = errors.New("no event stream")
	errJSON   = errors.New("an event is no JSON")
	errSaid   = errors.New("the service says that it failed")
)

// statusError is a response with another status than 200.
type statusError struct {
	status int
	wait   time.Duration // from Retry-After
}

func (e *statusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", e.status, http.StatusText(e.status)))
}

// again reports whether a failure may be temporary.
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

// explain returns what everybody may know of a failure. It omits what the service said, which may
// repeat the key or the question.
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
	case errors.Is(err, errSaid):
		return &Error{Reason: Broken, Detail: "the model's service says that the answer failed"}
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

// known returns the part of an error that may be logged, or nil. The URL may contain a secret, and
// an error of net/http about an unreadable response repeats the response.
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

// retryAfter returns how long a header asks to wait (RFC 9110, section 10.2.3); 0: it does not.
func retryAfter(text string) time.Duration {
	if n, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(text); err == nil {
		return max(time.Until(t), 0)
	}
	return 0
}
