package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/api/model"
	"gapless/api/openai"
	"gapless/sse"
	"gapless/store"
)

// The OpenAI Responses API, for unmodified OpenAI clients. Package openai translates; this file authorises and sends. These
// paths name a session in a response's id or in the body, so each call checks permission itself (may).

const (
	openaiPath   = "/openai/v1"
	responsePath = openaiPath + "/responses/:response_id"
)

func (a *API) routeOpenAI() {
	a.call("POST", openaiPath+"/responses", auth.Ask, decode(a.createResponse))
	a.call("GET", responsePath, auth.Read, a.getResponse)
	a.call("DELETE", responsePath, auth.Admin, a.deleteResponse)
	a.call("POST", responsePath+"/cancel", auth.Cancel, a.cancelResponse)
	a.call("GET", responsePath+"/input_items", auth.Read, a.inputItems)
	a.call("POST", openaiPath+"/chat/completions", auth.Ask, decode(a.complete))
}

func isOpenAI(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, openaiPath+"/") }

// openaiError returns a problem in the form that OpenAI's clients read.
func openaiError(p *Problem) []byte {
	kind := "invalid_request_error"
	switch {
	case p.Status == http.StatusUnauthorized:
		kind = "authentication_error"
	case p.Status == http.StatusForbidden:
		kind = "permission_error"
	case p.Status == http.StatusTooManyRequests:
		kind = "rate_limit_error"
	case p.Status >= http.StatusInternalServerError:
		kind = "server_error"
	}
	var e struct {
		Error struct {
			Message string  `json:"message"`
			Type    string  `json:"type"`
			Param   *string `json:"param"`
			Code    string  `json:"code"`
			Limit   int     `json:"limit,omitzero"`
		} `json:"error"`
	}
	e.Error.Message, e.Error.Type, e.Error.Code, e.Error.Limit = p.Detail, kind, p.Code, p.Limit
	if p.Member != "" {
		e.Error.Param = &p.Member
	}
	body, err := json.Marshal(e)
	if err != nil {
		panic(err) // only flat text
	}
	return body
}

var errNoResponse = &Problem{Status: http.StatusNotFound, Code: "response_not_found", Member: "response_id", Detail: "unknown response: it does not exist, or its beginning is no longer kept"}

// response identifies the response that a path names.
type response struct {
	session, message string
	seq              int64
}

func (a *API) responseOf(c echo.Context, action auth.Action) (r response, err error) {
	return a.responseNamed(c, param(c, "response_id"), action)
}

func (a *API) responseNamed(c echo.Context, id string, action auth.Action) (r response, err error) {
	var ok bool
	if r.session, r.message, r.seq, ok = openai.ParseID(id); !ok || !validID(r.session) {
		if err := a.may(c, action, auth.All); err != nil { // the id names no session whose permission could be checked
			return r, err
		}
		return r, errNoResponse
	}
	return r, a.may(c, action, r.session)
}

// foldResponse folds a response as far as it is in the log. p has the epoch and the last number of the log.
func (a *API) foldResponse(ctx context.Context, r response) (f *openai.Fold, p store.Page, err error) {
	give, err := a.fold(ctx)
	if err != nil {
		return nil, p, err
	}
	defer give()
	f = openai.NewFold(r.session, r.message, r.seq).Quiet()
	next := r.seq
	var element []byte
	for p, err = range a.parts(ctx, r.session, r.seq, foldPage) {
		if errors.Is(err, store.ErrNotFound) {
			err = errNoResponse
		}
		if err != nil {
			return nil, p, err
		}
		if p.From != next {
			return nil, p, errNoResponse
		}
		for i, text := range p.Elements {
			seq := p.From + int64(i)
			element, _ = store.AppendElement(element[:0], seq, text)
			if _, over := f.Chunk(nil, seq, element); over || !isBegun(f) {
				break
			}
		}
		if !isBegun(f) {
			return nil, p, errNoResponse
		}
		if f.Over() {
			return f, p, nil
		}
		next = p.Next()
	}
	if p.Ended && next > p.Last {
		_, _ = f.Events(nil, nil, true)
	}
	return f, p, nil
}

func isBegun(f *openai.Fold) bool { _, ok := f.Begun(); return ok }

// createResponse asks the model, and returns the response.
func (a *API) createResponse(c echo.Context) error {
	if err := checkJSON(c); err != nil {
		return err
	}
	body, give, err := a.readLarge(c)
	if err != nil {
		return err
	}
	defer give()
	q, err := openai.Parse(body)
	if e, ok := errors.AsType[*openai.Error](err); ok {
		return &Problem{Status: http.StatusBadRequest, Code: e.Code, Member: e.Param, Detail: e.Message}
	}
	if err != nil {
		return err
	}
	id, alone := q.Conversation, false
	switch {
	case q.Previous != "":
		previous, err := a.responseNamed(c, q.Previous, auth.Ask)
		if err == nil {
			err = a.may(c, auth.Read, previous.session) // before anything is said about the response
		}
		if err == nil {
			err = a.mayFollow(c, previous)
		}
		if errors.Is(err, errNoResponse) {
			unknown := *errNoResponse
			unknown.Member = "previous_response_id"
			err = &unknown
		}
		if err != nil {
			return err
		}
		id = previous.session
	case id == "":
		made, err := uuid.NewV7()
		if err != nil {
			return err
		}
		id, alone = made.String(), true
	case !validID(id):
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_session_id", Member: "conversation", Limit: 128, Detail: idRule}
	}
	named := id
	if alone { // the session may have any name
		named = auth.All
	}
	for _, action := range []auth.Action{auth.Ask, auth.Read} { // the response contains the answer
		if err := a.may(c, action, named); err != nil {
			return err
		}
	}
	if expired(a.grant(c)) {
		return errExpired
	}
	reply, err := uuid.NewV7()
	if err != nil {
		return err
	}
	chunks, err := q.Chunks(reply.String(), alone)
	if err != nil {
		return err
	}
	size := 0
	for _, chunk := range chunks {
		size += chunk.Size()
	}
	if len(chunks) > a.cfg.BatchMax || size > a.cfg.BatchBytes {
		return &Problem{Status: http.StatusRequestEntityTooLarge, Code: "content_too_large", Member: "input", Limit: a.cfg.BatchBytes,
			Detail: "the input is longer than one append may be (-batch-max, -batch-bytes): send the conversation's new items alone, with previous_response_id"}
	}
	caller := a.caller(c)
	if q.Stream {
		if a.draining.Err() != nil { // no viewer could view the answer here
			return errDraining
		}
		if err := a.limits.Viewers.Take(caller, 1); err != nil {
			return err
		}
		defer a.limits.Viewers.Give(caller, 1)
	}
	x, err := a.put(c, asking{id, reply.String(), chunks, "input", func(ctx context.Context, seq int64) (context.Context, []model.Turn, error) {
		turns, err := a.conversation(ctx, question{id, seq - int64(len(chunks)) + 1, seq, q.Instructions, true})
		return model.With(ctx, q.Service), turns, err
	}})
	if err != nil {
		return err
	}
	r := response{id, x.reply, x.seq}
	if q.Stream {
		return a.streamResponse(c, r, x.epoch, openai.NewFold(r.session, r.message, r.seq))
	}
	if !q.Background {
		select {
		case <-x.done:
		case <-c.Request().Context().Done(): // the answer continues
			return c.Request().Context().Err()
		}
	}
	return a.sendResponse(c, r)
}

// mayFollow refuses to continue a response that is not over, or that another one follows: a log has no branches.
func (a *API) mayFollow(c echo.Context, r response) error {
	f, _, err := a.foldResponse(c.Request().Context(), r)
	if err != nil {
		return err
	}
	if !f.Over() {
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_value", Member: "previous_response_id", Detail: "the previous response is still in progress: wait for it, or cancel it"}
	}
	return a.onlyResponse(c, r, r.seq+1, &Problem{Status: http.StatusBadRequest, Code: "unsupported_parameter", Member: "previous_response_id",
		Detail: "the previous response is not the last one of its conversation, and branches are not supported: continue the last one, or send the whole input without previous_response_id"})
}

// onlyResponse returns the error no if another response begins at or after chunk number from.
func (a *API) onlyResponse(c echo.Context, r response, from int64, no error) error {
	for {
		p, err := a.logs.Read(c.Request().Context(), r.session, from, foldPage, 1<<20)
		if err != nil {
			return err
		}
		for i, element := range p.Elements {
			if p.From+int64(i) != r.seq && strings.Contains(element, openai.TypeResponse) && store.ParseSaid([]byte(element)).Type == openai.TypeResponse {
				return no
			}
		}
		if from = p.Next(); from > p.Last || len(p.Elements) == 0 {
			return nil
		}
	}
}

func (a *API) sendResponse(c echo.Context, r response) error {
	f, _, err := a.foldResponse(c.Request().Context(), r)
	if err != nil {
		return err
	}
	c.Response().Header().Set("Cache-Control", "no-cache")
	return c.JSON(http.StatusOK, f.Response())
}

func (a *API) streamResponse(c echo.Context, r response, epoch string, f *openai.Fold) error {
	caller, taken := a.caller(c), 0
	defer func() { a.limits.Bodies.Give(caller, taken) }()
	f.Grow = func(bytes int) bool { // the fold keeps its text, to repeat it when it is complete
		if a.limits.Bodies.Take(caller, bytes) != nil {
			return false
		}
		taken += bytes
		return true
	}
	ask := sse.Ask{Session: r.session, Cursor: r.seq - 1, Epoch: epoch, Fold: f.Events}
	return a.foldStream(c, ask, nil, func(cause sse.Cause) bool { return cause == sse.Done && f.Over() })
}

// getResponse responds with a response, or with its events from a number on.
func (a *API) getResponse(c echo.Context) error {
	r, err := a.responseOf(c, auth.Read)
	if err != nil {
		return err
	}
	after, stream := int64(-1), false
	for name, values := range c.QueryParams() {
		switch value := values[0]; {
		case name == "stream" && (value == "true" || value == "false"):
			stream = value == "true"
		case name == "starting_after":
			if after, err = parseNumber(value); err != nil || value == "" {
				return invalid(name, "starting_after must be the sequence_number of an event")
			}
		case name == "include_obfuscation" && value == "false":
		default:
			return &Problem{Status: http.StatusBadRequest, Code: "unsupported_parameter", Member: name, Detail: fmt.Sprintf("%.40q with this value is not supported here", name)}
		}
	}
	if c.Request().ContentLength != 0 { // openai-go sends stream in a body
		body, err := a.readBody(c, a.atMost(c, smallBody))
		if err != nil {
			return err
		}
		said := struct{ Stream bool }{stream}
		if len(body) > 0 && json.Unmarshal(body, &said) != nil {
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "a body must be {\"stream\": true}, or absent"}
		}
		stream = said.Stream
	}
	if !stream {
		return a.sendResponse(c, r)
	}
	if a.draining.Err() != nil {
		return errDraining
	}
	known, p, err := a.foldResponse(c.Request().Context(), r)
	if err != nil {
		return err
	}
	caller := a.caller(c)
	if err := a.limits.Viewers.Take(caller, 1); err != nil {
		return err
	}
	defer a.limits.Viewers.Give(caller, 1)
	f := openai.NewFold(r.session, r.message, r.seq)
	if f.After = after; !known.Over() {
		f.Known = p.Last
	}
	return a.streamResponse(c, r, p.Epoch, f)
}

// cancelResponse stops a response. A response that has ended stays as it is.
func (a *API) cancelResponse(c echo.Context) error {
	r, err := a.responseOf(c, auth.Cancel)
	if err != nil {
		return err
	}
	if _, _, err := a.foldResponse(c.Request().Context(), r); err != nil {
		return err
	}
	_, err = a.logs.Cancel(c.Request().Context(), r.session, r.message)
	if _, ended := errors.AsType[*store.MessageEndedError](err); err != nil && !ended && !errors.Is(err, store.ErrSessionEnded) {
		return err
	}
	return a.sendResponse(c, r)
}

// deleteResponse deletes a response together with its session, if the session was made for it and has no other response.
func (a *API) deleteResponse(c echo.Context) error {
	r, err := a.responseOf(c, auth.Admin)
	if err != nil {
		return err
	}
	f, _, err := a.foldResponse(c.Request().Context(), r)
	if err != nil {
		return err
	}
	no := &Problem{Status: http.StatusBadRequest, Code: "unsupported_parameter", Member: "response_id",
		Detail: "a response of a conversation cannot be deleted alone: delete the conversation, DELETE /v1/sessions/{id}"}
	if begin, _ := f.Begun(); !begin.Alone {
		return no
	}
	if err := a.onlyResponse(c, r, 1, no); err != nil {
		return err
	}
	if err := a.logs.Delete(c.Request().Context(), r.session); err != nil {
		return err
	}
	return c.JSON(http.StatusOK, map[string]any{"id": openai.ID(r.session, r.message, r.seq), "object": "response", "deleted": true})
}

// inputItems lists the input of a response.
func (a *API) inputItems(c echo.Context) error {
	r, err := a.responseOf(c, auth.Read)
	if err != nil {
		return err
	}
	limit, ascending, after := 20, false, ""
	for name, values := range c.QueryParams() {
		switch value := values[0]; {
		case name == "limit":
			if limit, err = strconv.Atoi(value); err != nil || limit < 1 || limit > 100 {
				return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: name, Limit: 100, Detail: "limit must be 1 to 100"}
			}
		case name == "order" && (value == "asc" || value == "desc"):
			ascending = value == "asc"
		case name == "after":
			after = value
		default:
			return &Problem{Status: http.StatusBadRequest, Code: "unsupported_parameter", Member: name, Detail: fmt.Sprintf("%.40q with this value is not supported here", name)}
		}
	}
	f, _, err := a.foldResponse(c.Request().Context(), r)
	if err != nil {
		return err
	}
	begin, _ := f.Begun()
	all := []map[string]any{}
	for from := max(r.seq-int64(begin.Inputs), 1); from < r.seq; {
		p, err := a.logs.Read(c.Request().Context(), r.session, from, foldPage, int(r.seq-from))
		if err != nil {
			return err
		}
		if p.From != from || len(p.Elements) == 0 {
			return errNoResponse
		}
		for _, element := range p.Elements {
			if item := openai.InputItem([]byte(element)); item != nil {
				all = append(all, item)
			}
		}
		from = p.Next()
	}
	if !ascending {
		slices.Reverse(all)
	}
	if at := slices.IndexFunc(all, func(i map[string]any) bool { return i["id"] == after }); at >= 0 {
		all = all[at+1:]
	} else if after != "" {
		return invalid("after", "after must be the id of an item of this input")
	}
	more := len(all) > limit
	all = all[:min(len(all), limit)]
	list := map[string]any{"object": "list", "data": all, "has_more": more, "first_id": nil, "last_id": nil}
	if len(all) > 0 {
		list["first_id"], list["last_id"] = all[0]["id"], all[len(all)-1]["id"]
	}
	return c.JSON(http.StatusOK, list)
}

// passer is a model with a service.
type passer interface {
	Pass(ctx context.Context, request []byte) (*http.Response, error)
}

const headerSession = "Gapless-Session"

// complete passes a request for a chat completion to the model's service, and returns its response byte for byte. Events are recorded
// as they came, in a new session. The recording continues if the client goes away.
func (a *API) complete(c echo.Context) error {
	if err := checkJSON(c); err != nil {
		return err
	}
	body, give, err := a.readLarge(c)
	if err != nil {
		return err
	}
	defer give()
	made, err := uuid.NewV7()
	if err != nil {
		return err
	}
	id := made.String()
	for _, action := range []auth.Action{auth.Ask, auth.Read} {
		if err := a.may(c, action, auth.All); err != nil { // the session may have any name
			return err
		}
	}
	service, ok := a.model.(passer)
	if !ok {
		return &Problem{Status: http.StatusBadRequest, Code: "unsupported_parameter", Detail: "chat completions need a model's service (-model-url): the demo has none. Its answers are at /openai/v1/responses"}
	}
	a.answers.add() // before checking whether all must end
	defer a.answers.done()
	if a.draining.Err() != nil {
		return errDraining
	}
	caller := a.caller(c)
	if err := a.limits.Answers.Take(caller, 1); err != nil {
		p := *problemOf(err)
		p.Status, p.Code = http.StatusTooManyRequests, "model_busy"
		return &p
	}
	defer a.limits.Answers.Give(caller, 1)
	u := a.newUpload(c.Request().Context(), id, caller, store.Producer{ID: id}, 0, answerPatience)
	defer u.stop(nil)
	if err := u.mayStore([]store.Chunk{store.NewChunk(store.TypeDelta, id, "", "x")}); err != nil {
		return err
	}
	res, err := service.Pass(u.ctx, body)
	if failed, ok := errors.AsType[*model.Error](err); ok {
		a.metrics.failed(failed.Reason)
		return &Problem{Status: http.StatusBadGateway, Code: "model_failed", Detail: failed.Detail}
	}
	if err != nil {
		return err
	}
	defer res.Body.Close()
	h := c.Response().Header()
	for _, name := range []string{"Content-Type", "Content-Encoding", "Retry-After", "X-Request-Id"} {
		if v := res.Header.Get(name); v != "" {
			h.Set(name, v)
		}
	}
	h.Set("Cache-Control", "no-cache, no-transform")
	if res.StatusCode != http.StatusOK || !strings.HasPrefix(res.Header.Get("Content-Type"), typeEvents) {
		c.Response().WriteHeader(res.StatusCode)
		_, err := io.Copy(c.Response(), io.LimitReader(res.Body, int64(a.cfg.BodyMax)))
		return err
	}
	h.Set(headerSession, id)
	u.held = []string{id}
	u.begin()
	defer u.end()
	return a.record(c, u, res.Body)
}

// record appends the events of a response, and sends the client those that are stored.
func (a *API) record(c echo.Context, u *upload, from io.Reader) error {
	c.Response().WriteHeader(http.StatusOK)
	c.Response().Flush()
	fill := store.Fill{MessageID: u.session, Role: roleAssistant}
	piece := &seen{from: from}
	src := a.source(posting{kind: typeEvents, fill: fill}, piece)
	broken := false
	for {
		chunks, err := src.next()
		if len(chunks) > 0 {
			if failed := u.append(chunks, store.HoldOpen); failed != nil {
				err = failed
			}
		}
		if !broken {
			_, bad := c.Response().Write(piece.take())
			c.Response().Flush()
			broken = bad != nil
		}
		if err == io.EOF {
			break
		}
		if err != nil { // what cannot be recorded is still passed on
			a.log.Warn("a response of the model's service cannot be recorded", "session", u.session, "err", err)
			if u.append([]store.Chunk{store.NewFailed(u.session, roleAssistant, model.Broken)}, store.HoldClosed) != nil {
				u.leave(store.HoldBroken)
			}
			if _, bad := io.Copy(c.Response(), from); broken || bad != nil || errors.Is(err, errBroken) {
				panic(http.ErrAbortHandler)
			}
			return nil
		}
	}
	return u.append([]store.Chunk{store.NewChunk(store.TypeDone, u.session, roleAssistant, "")}, store.HoldClosed)
}

// seen keeps what was read until it is taken.
type seen struct {
	from io.Reader
	buf  bytes.Buffer
}

// Read implements io.Reader.
func (s *seen) Read(p []byte) (int, error) {
	n, err := s.from.Read(p)
	s.buf.Write(p[:n])
	return n, err
}

func (s *seen) take() []byte {
	b := bytes.Clone(s.buf.Bytes())
	s.buf.Reset()
	return b
}
