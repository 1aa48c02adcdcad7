package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/api/limit"
	"gapless/sse"
	"gapless/store"
)

// Problem is an error as a client sees it (RFC 9457).
type Problem struct {
	Title   string  `json:"title"`
	Status  int     `json:"status"`
	Detail  string  `json:"detail"`
	Code    string  `json:"code"`                // stable: programs may rely on it
	Member  string  `json:"member,omitzero"`     // the wrong part of the request: a JSON pointer, a parameter or a header
	Limit   int     `json:"limit,omitzero"`      // the exceeded limit
	Chunk   *int    `json:"chunk,omitempty"`     // the index of a chunk in the body, from 0
	Message string  `json:"message_id,omitzero"` // the message
	Stored  *Stored `json:"stored,omitempty"`    // what a body that failed midway has stored

	ProducerEpoch *int64 `json:"producer_epoch,omitempty"`          // the current epoch
	ExpectedChunk *int64 `json:"producer_expected_chunk,omitempty"` // the producer's next number

	// Writes is the value that /readyz shows for writes: why Redis refuses them.
	Writes string `json:"writes,omitzero"`

	retryAfter int    // seconds
	challenge  string // WWW-Authenticate
	cause      error  // for the log
}

func (p *Problem) Error() string { return p.Code + ": " + p.Detail }
func (p *Problem) Unwrap() error { return p.cause }

// Stored is what an append has stored.
type Stored struct {
	Epoch string `json:"epoch"`
	First int64  `json:"first_seq"`
	Last  int64  `json:"last_seq"`
	Count int    `json:"count"`
	// MessageID is the id of the message that a text body is.
	MessageID string `json:"message_id,omitzero"`
}

// append appends s to b as JSON. Most responses are a Stored.
func (s Stored) append(b []byte) []byte {
	b = append(b, `{"epoch":`...)
	b, _ = jsontext.AppendQuote(b, s.Epoch) // all strings are valid UTF-8
	b = append(b, `,"first_seq":`...)
	b = append(strconv.AppendInt(b, s.First, 10), `,"last_seq":`...)
	b = append(strconv.AppendInt(b, s.Last, 10), `,"count":`...)
	b = strconv.AppendInt(b, int64(s.Count), 10)
	if s.MessageID != "" {
		b = append(b, `,"message_id":`...)
		b, _ = jsontext.AppendQuote(b, s.MessageID)
	}
	return append(b, "}\n"...)
}

// problemOf is the one table from errors to responses.
func problemOf(err error) *Problem {
	if p, ok := errors.AsType[*Problem](err); ok {
		return p
	}
	if e, ok := errors.AsType[*store.ChunkError](err); ok {
		p := &Problem{Status: http.StatusBadRequest, Code: e.Code, Member: e.Member, Limit: e.Limit, Detail: e.Detail}
		if e.Code == "chunk_too_large" {
			p.Status = http.StatusRequestEntityTooLarge
		}
		return p
	}
	if e, ok := errors.AsType[*store.RefusedError](err); ok {
		p := *problemOf(e.Err)
		p.Chunk = &e.Index
		return &p
	}
	if e, ok := errors.AsType[*limit.Error](err); ok {
		p := &Problem{Status: http.StatusTooManyRequests, Code: "caller_limit", Limit: e.Most, Detail: e.Error(), retryAfter: e.Seconds()}
		switch {
		case e.Day:
			p.Code = "storage_limited"
		case e.Rate:
			p.Code = "rate_limited"
		case !e.Caller:
			p.Status, p.Code = http.StatusServiceUnavailable, "node_limit"
		}
		return p
	}
	if e, ok := errors.AsType[*store.FullError](err); ok {
		return &Problem{Status: http.StatusConflict, Code: "session_full", Limit: e.Most, Detail: e.Error()}
	}
	if e, ok := errors.AsType[*store.MessageEndedError](err); ok {
		p := &Problem{Status: http.StatusConflict, Code: "message_ended", Member: "/message_id", Message: e.MessageID, Detail: e.Error() + ": begin a message with another id"}
		if e.How == store.Stopped {
			p.Code, p.Detail = "message_cancelled", fmt.Sprintf("message %q was cancelled: stop sending it", e.MessageID)
		}
		return p
	}
	if e, ok := errors.AsType[*store.FencedError](err); ok {
		return &Problem{Status: http.StatusForbidden, Code: "producer_fenced", Member: headerProducerEpoch, ProducerEpoch: &e.Epoch,
			Detail: e.Error() + ": stop, or take over with a higher one"}
	}
	if e, ok := errors.AsType[*store.GapError](err); ok {
		return &Problem{Status: http.StatusConflict, Code: "producer_gap", Member: headerProducerChunk, ExpectedChunk: &e.Expected,
			Detail: e.Error() + ": continue from there"}
	}
	if e, ok := errors.AsType[*echo.HTTPError](err); ok {
		switch e.Code {
		case http.StatusNotFound:
			return &Problem{Status: e.Code, Code: codeNotFound, Detail: "unknown path: /openapi.yaml lists all paths"}
		case http.StatusMethodNotAllowed:
			return &Problem{Status: e.Code, Code: "method_not_allowed", Detail: "this path does not support the method: the Allow header lists those that it supports"}
		}
	}
	if e, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &Problem{Status: http.StatusRequestEntityTooLarge, Code: "body_too_large", Limit: int(e.Limit),
			Detail: fmt.Sprintf("the body is larger than %d bytes: send it in several requests, or as application/x-ndjson", e.Limit)}
	}
	if code := store.Why(err); code != "" {
		r := refusals[code]
		return &Problem{Status: http.StatusServiceUnavailable, Code: code, Detail: r.detail, retryAfter: r.after}
	}
	for _, row := range []struct {
		err error
		p   Problem
	}{
		{errDraining, Problem{Status: http.StatusServiceUnavailable, Code: "draining", Detail: "this node is shutting down: retry, or use another node", retryAfter: 1}},
		{auth.ErrAway, Problem{Status: http.StatusServiceUnavailable, Code: "keys_away", Detail: "the keys that verify tokens cannot be fetched from their issuer at the moment: retry", retryAfter: 1}},
		{store.ErrNotFound, Problem{Status: http.StatusNotFound, Code: "session_not_found", Detail: "unknown session: it was never created, or it was deleted or has expired"}},
		{store.ErrSessionEnded, Problem{Status: http.StatusConflict, Code: "session_ended", Detail: "the session has ended: nothing can be appended"}},
		{store.ErrSessionDeleted, Problem{Status: http.StatusConflict, Code: "session_deleted", Detail: "the session was deleted during this upload"}},
		{store.ErrProducerConflict, Problem{Status: http.StatusConflict, Code: "producer_conflict", Member: headerProducerChunk, Detail: "the producer has already posted something else under this number: continue counting, or begin another epoch"}},
		{store.ErrMessageUnknown, Problem{Status: http.StatusNotFound, Code: "message_not_found", Member: "/message_id", Detail: "unknown message: the session has no such message to cancel"}},
		{store.ErrOutcomeUnknown, Problem{Status: http.StatusGatewayTimeout, Code: "outcome_unknown", Detail: "Redis did not respond: the request may or may not have been stored. With producer numbers (Producer-Id, ...) repeat it unchanged; without them, read the log first"}},
		{store.ErrWrongType, Problem{Status: http.StatusInternalServerError, Code: "redis_wrong_type", Detail: "a key of this session in Redis has the wrong type, because another program has written it: rename or delete the key. Nothing was stored"}},
		{context.Canceled, Problem{Status: 499, Code: "client_gone", Detail: "the client went away"}},
	} {
		if errors.Is(err, row.err) {
			return &row.p
		}
	}
	return &Problem{Status: http.StatusInternalServerError, Code: "internal", Detail: "unexpected error: the server's log has the details"}
}

// refusals are the responses for each reason why Redis executes nothing. A refusal that only an operator can end need
// not be retried every second.
var refusals = map[string]struct {
	detail string
	after  int // seconds
}{
	store.RedisAway: {"Redis cannot be reached. Nothing was stored: retry", 1},
	store.RedisFull: {"Redis is full (maxmemory, or the disk of embedded:DIR). Nothing was stored; viewers are still served. " +
		"Retry when logs have expired, or when the operator has made room", 5},
	store.RedisReadOnly: {"Redis takes no writes at the moment (it is a replica, lacks its replicas, or cannot save to its disk). " +
		"Nothing was stored; viewers are still served. Retry", 1},
	store.RedisDenied: {"Redis rejects the user, password or rights of this server (-redis). Nothing was stored. The operator must fix it; then retry", 5},
}

// problem responds to an error. It implements echo.HTTPErrorHandler.
func (a *API) problem(err error, c echo.Context) {
	p := *problemOf(err)
	if o := out(c); p.Status == http.StatusInternalServerError && (o.broken || c.Request().Context().Err() != nil) {
		p = *problemOf(context.Canceled) // the client has gone, so the cause does not matter
	}
	if p.Title = http.StatusText(p.Status); p.Title == "" {
		p.Title = "Client Gone"
	}
	if p.Status == http.StatusInternalServerError {
		if p.cause != nil {
			err = p.cause
		}
		say := func() {
			a.log.Error("request failed", slog.String("method", c.Request().Method), slog.String("route", c.Path()), slog.Any("err", err))
		}
		if errors.Is(err, store.ErrWrongType) { // callers can repeat a request for such a key
			a.wrongTypes.Do(say)
		} else {
			say()
		}
	}
	if c.Response().Committed {
		return
	}
	body, err := json.Marshal(&p)
	if err != nil {
		panic(err) // never fails: it is a flat struct of text and numbers
	}
	h := c.Response().Header()
	if p.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(p.retryAfter))
	}
	if p.challenge != "" {
		h.Set("WWW-Authenticate", p.challenge)
	}
	if p.ProducerEpoch != nil {
		h.Set(headerProducerEpoch, strconv.FormatInt(*p.ProducerEpoch, 10))
	}
	if p.ExpectedChunk != nil {
		h.Set(headerExpectedChunk, strconv.FormatInt(*p.ExpectedChunk, 10))
	}
	h.Set("Content-Length", strconv.Itoa(len(body))) // complete with its last byte, whatever follows
	ctl := http.NewResponseController(c.Response().Writer)
	late := coming(ctl, c.Request())
	if late {
		// Otherwise the server would read to the body's end before it responds. Never do this on a connection that is
		// kept: the server panics at its next request if a body was not read to its end (golang.org/issue/68560).
		_ = ctl.EnableFullDuplex()
		h.Set("Connection", "close")
	}
	kind := "application/problem+json"
	if isOpenAI(c.Request()) {
		body, kind = openaiError(&p), typeJSON
		h.Set("Content-Length", strconv.Itoa(len(body)))
	}
	if p.Code == codeNotFound {
		h.Add("Vary", "Accept")
		if wantsHTML(c.Request().Header.Values("Accept")) {
			body, kind = a.notFound, "text/html; charset=utf-8"
			h.Set("Content-Length", strconv.Itoa(len(body)))
			forPeople(h, pagePolicy)
		}
	}
	if err := c.Blob(p.Status, kind, body); err != nil {
		a.log.Debug("problem not delivered", slog.Any("err", err))
	}
	if late {
		_ = ctl.Flush()
		linger(sse.Conn(c.Request().Context()))
	}
}

// codeNotFound is the code of a path that does not exist.
const codeNotFound = "not_found"

// wantsHTML reports whether an Accept header is that of a browser that shows a page: it names HTML, and prefers it to JSON.
// A wildcard alone, as curl and fetch send it, does not.
func wantsHTML(accepted []string) bool {
	html, json := 0.0, 0.0
	for one := range strings.SplitSeq(strings.Join(accepted, ","), ",") {
		kind, parameters, err := mime.ParseMediaType(one)
		if err != nil {
			continue
		}
		weight := 1.0
		if q, ok := parameters["q"]; ok {
			if weight, err = strconv.ParseFloat(q, 64); err != nil {
				continue
			}
		}
		switch kind {
		case "text/html", "application/xhtml+xml":
			html = max(html, weight)
		case typeJSON, "application/problem+json":
			json = max(json, weight)
		}
	}
	return html > json
}

// incoming is a request's body that knows whether all of it has arrived.
type incoming struct {
	io.ReadCloser
	whole  atomic.Bool
	length int64   // -1: unknown
	plain  *gunzip // nil: the body is not encoded

	to      http.ResponseWriter
	timeout time.Duration // for each piece; 0: no limit
	write   time.Duration // the response's time after each piece: HTTP/2 ends a stream whose response is late
	since   int           // bytes since the deadline was set, at first by the server
}

// Read implements io.Reader. It returns the decoded body.
func (b *incoming) Read(p []byte) (int, error) {
	if b.plain != nil {
		return b.plain.Read(p)
	}
	return b.arrive(p)
}

// arrive reads the body as it was sent.
func (b *incoming) arrive(p []byte) (int, error) {
	const piece = 64 << 10
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.whole.Store(true)
	}
	if b.since += n; b.since >= piece && b.timeout > 0 {
		b.since = 0
		ctl := http.NewResponseController(b.to)
		_ = ctl.SetReadDeadline(time.Now().Add(b.timeout))
		if b.write > 0 {
			_ = ctl.SetWriteDeadline(time.Now().Add(b.timeout + b.write))
		}
	}
	return n, err
}

// takeItsTime removes the deadlines of a body that may be silent while its connection lasts.
func (b *incoming) takeItsTime(ctl *http.ResponseController) {
	b.timeout = 0
	_ = ctl.SetReadDeadline(time.Time{})
	_ = ctl.SetWriteDeadline(time.Time{})
}

// coming reports whether a request's body is still arriving, and may be for long. It reads the rest of a short body if
// it is there, so that the connection can be kept.
func coming(ctl *http.ResponseController, r *http.Request) bool {
	const short, moment = 64 << 10, 100 * time.Millisecond
	b, ok := r.Body.(*incoming)
	if !ok || r.ProtoMajor != 1 || b.whole.Load() {
		return false
	}
	if b.length >= 0 && b.length <= short && r.Header.Get("Expect") == "" {
		_ = ctl.SetReadDeadline(time.Now().Add(moment))
		_, _ = io.Copy(io.Discard, &arriving{b: b})
		_ = ctl.SetReadDeadline(time.Time{})
	}
	return !b.whole.Load()
}

// linger reads for a moment what a client sends after its response. If a connection is closed with unread data, it is
// reset, and the response is lost.
func linger(conn net.Conn) {
	const moment, most = 500 * time.Millisecond, 16 << 20
	if conn == nil {
		return
	}
	_ = conn.SetReadDeadline(time.Now().Add(moment))
	_, _ = io.Copy(io.Discard, io.LimitReader(conn, most))
}
