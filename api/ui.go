package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/api/limit"
	"gapless/sse"
	"gapless/store"
)

// The Vercel AI SDK's useChat, with its DefaultChatTransport, asks by POST and, when a page is
// reloaded, resumes by GET. The response is a UI message stream: the parts of one
// message (https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol#data-stream-protocol), always from
// the message's beginning. Here it is another form of a viewer's stream, with the same
// guarantees and limits, and as slow as its reader.
//
// The client takes a clean end for the end of the answer. So the response ends cleanly only after
// [DONE]; otherwise it is broken off. The SDK's WorkflowChatTransport, which reconnects by
// itself, needs the opposite (ui_run.go).

// uiAsk accepts a question from useChat, and responds with the answer.
func (a *API) uiAsk(c echo.Context) error {
	kind, err := mediaType(c.Request())
	run := kind == typeText // WorkflowChatTransport sends JSON, and lets fetch set the type
	if !run {
		err = checkJSON(c)
	}
	if err != nil {
		return err
	}
	body, give, err := a.largeBody(c)
	if err != nil {
		return err
	}
	content, member, err := uiQuestion(body)
	give()
	if _, wrong := errors.AsType[*Problem](err); err != nil && !wrong {
		return a.bodyError(err)
	}
	if err != nil {
		return err
	}
	if expired(a.grant(c)) { // a body may take long
		return errExpired
	}
	if err := a.may(c, auth.Read, session(c)); err != nil { // the response contains the answer
		return err
	}
	if a.draining.Err() != nil { // no viewer could view the answer here
		return errDraining
	}
	caller := a.caller(c)
	if err := a.limits.Viewers.Take(caller, 1); err != nil {
		return err
	}
	defer a.limits.Viewers.Give(caller, 1)
	x, err := a.begin(c, content, member)
	if err != nil {
		return err
	}
	c.Response().Header().Set(headerRun, x.reply)
	f := newUIFold(x.reply, x.seq)
	f.run = run
	return a.uiStream(c, sse.Ask{Cursor: x.seq, Epoch: x.epoch}, f)
}

// uiQuestion returns the text of the last message that useChat sent, and where the text is. All other messages are in the log.
// They are skipped as they arrive, whatever they contain: a conversation is many times larger parsed than sent.
func uiQuestion(body io.Reader) (content, member string, err error) {
	dec := jsontext.NewDecoder(body, jsontext.AllowDuplicateNames(true)) // otherwise it would keep the names
	var last uiSent
	count, twice := 0, false
	err = members(dec, func(name string) error {
		if name != "messages" {
			return dec.SkipValue()
		}
		if kind := dec.PeekKind(); kind != '[' && kind != 0 {
			return &shapeError{string(dec.StackPointer())}
		}
		if twice {
			return errTwice
		}
		twice = true
		return elements(dec, func(int) (err error) {
			count++
			last, err = readUISent(dec)
			return err
		})
	})
	if err == nil {
		if _, more := dec.ReadToken(); more == nil {
			err = errTwice
		} else if more != io.EOF {
			err = more
		}
	}
	shape, other := errors.AsType[*shapeError](err)
	if other {
		member = shape.member
	}
	if _, syntax := errors.AsType[*jsontext.SyntacticError](err); syntax || other || errors.Is(err, errTwice) {
		return "", "", &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Member: member,
			Detail: "the body must be JSON as useChat sends it: messages, each with a role and parts"}
	}
	if err != nil {
		return "", "", err
	}
	if count == 0 || last.role != roleUser {
		return "", "", &Problem{Status: http.StatusBadRequest, Code: "invalid_content", Member: "/messages", Detail: "the last message must have the role user: it is the question"}
	}
	member = fmt.Sprintf("/messages/%d/parts", count-1)
	if last.other >= 0 {
		return "", "", &Problem{Status: http.StatusBadRequest, Code: "invalid_content", Member: fmt.Sprintf("%s/%d", member, last.other),
			Detail: "a question must be text: leave out parts of other types"}
	}
	if strings.TrimSpace(last.text) == "" {
		return "", "", &Problem{Status: http.StatusBadRequest, Code: "invalid_content", Member: member, Detail: "the question has no text"}
	}
	return last.text, member, nil
}

// errTwice says that a body contains a relevant member twice, more than one object, or no object.
var errTwice = errors.New("it can be read in two ways")

// shapeError says that a member does not have the type that useChat sends.
type shapeError struct{ member string }

func (e *shapeError) Error() string { return e.member + " has another shape" }

// uiSent is the part of a message from useChat that is used.
type uiSent struct {
	role, text string
	other      int // the index of its first part that is not text; -1: none
}

func readUISent(dec *jsontext.Decoder) (uiSent, error) {
	m := uiSent{other: -1}
	if dec.PeekKind() != '{' {
		return m, dec.SkipValue()
	}
	var text strings.Builder
	roles, parts := 0, 0
	err := members(dec, func(name string) (err error) {
		switch {
		case name == "role":
			roles++
			m.role, err = readText(dec)
		case name == "parts" && dec.PeekKind() == '[':
			parts++
			err = elements(dec, func(i int) error {
				kind, said, err := readUIPart(dec)
				if kind != "text" && m.other < 0 {
					m.other = i
				}
				text.WriteString(said)
				return err
			})
		default:
			err = dec.SkipValue()
		}
		return err
	})
	if m.text = text.String(); err == nil && (roles > 1 || parts > 1) {
		err = errTwice
	}
	return m, err
}

func readUIPart(dec *jsontext.Decoder) (kind, text string, err error) {
	if dec.PeekKind() != '{' {
		return "", "", dec.SkipValue()
	}
	kinds, texts := 0, 0
	err = members(dec, func(name string) (err error) {
		switch name {
		case "type":
			kinds++
			kind, err = readText(dec)
		case "text":
			texts++
			text, err = readText(dec)
		default:
			err = dec.SkipValue()
		}
		return err
	})
	if err == nil && (kinds > 1 || texts > 1) {
		err = errTwice
	}
	return kind, text, err
}

// members calls read before the value of each member of an object. read must consume the value.
func members(dec *jsontext.Decoder, read func(name string) error) error {
	if kind := dec.PeekKind(); kind != '{' && kind != 0 {
		return errTwice
	}
	if _, err := dec.ReadToken(); err != nil {
		return err
	}
	for dec.PeekKind() != '}' {
		name, err := dec.ReadToken()
		if err != nil {
			return err
		}
		if err := read(name.String()); err != nil {
			return err
		}
	}
	_, err := dec.ReadToken()
	return err
}

// elements calls read before each element of an array. read must consume the element.
func elements(dec *jsontext.Decoder, read func(i int) error) error {
	if _, err := dec.ReadToken(); err != nil {
		return err
	}
	for i := 0; dec.PeekKind() != ']'; i++ {
		if dec.PeekKind() == 0 {
			_, err := dec.ReadToken()
			return err
		}
		if err := read(i); err != nil {
			return err
		}
	}
	_, err := dec.ReadToken()
	return err
}

// readText reads a string.
func readText(dec *jsontext.Decoder) (string, error) {
	if kind := dec.PeekKind(); kind != '"' && kind != 0 {
		return "", &shapeError{string(dec.StackPointer())}
	}
	text, err := dec.ReadToken()
	if err != nil {
		return "", err
	}
	return text.String(), nil
}

// uiResume streams the assistant's unfinished message that began last. It responds with 204 if none exists.
func (a *API) uiResume(c echo.Context) error { return a.uiView(c, "") }

// uiMessage streams an unfinished message. It responds with 204 if the message is not under way.
func (a *API) uiMessage(c echo.Context) error {
	id, err := messageID(c)
	if err != nil {
		return err
	}
	return a.uiView(c, id)
}

func (a *API) uiView(c echo.Context, message string) error {
	if a.draining.Err() != nil {
		return errDraining
	}
	b, open, err := a.logs.Open(c.Request().Context(), session(c))
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	ask, begins := sse.Ask{Epoch: b.Epoch}, b.Former
	if message == "" {
		if message, ask.Cursor, ask.Epoch, err = a.running(c.Request().Context(), session(c), open); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		begins = ask.Cursor
		if begins == b.Former { // its beginning may be gone: search from the first chunk that is kept
			ask.Cursor = 0
		}
	}
	if !slices.Contains(open, message) {
		return c.NoContent(http.StatusNoContent)
	}
	caller := a.caller(c)
	if err := a.limits.Viewers.Take(caller, 1); err != nil {
		return err
	}
	defer a.limits.Viewers.Give(caller, 1)
	return a.uiStream(c, ask, newUIFold(message, begins))
}

// running returns the assistant's unfinished message that began last. It begins after chunk number after
// of epoch. open lists the messages that the server knows to be unfinished. If none exists, message is empty.
//
// An answer of the model is a message from its question on, before its first word. So a message without chunks in the log
// began later than all that have some, if this server made its id.
func (a *API) running(ctx context.Context, session string, open []string) (message string, after int64, epoch string, err error) {
	if len(open) == 0 {
		return "", 0, "", nil
	}
	mute := make(map[string]bool, len(open)) // a session may have thousands
	for _, id := range open {
		mute[id] = true
	}
	isOpen := maps.Clone(mute)
	m, p, err := a.foldLog(ctx, session, sse.MessagesAsk{Only: func(id string) bool { return isOpen[id] }, Heads: true})
	if err != nil {
		return "", 0, "", err
	}
	var last sse.MessageHead
	for _, one := range m.Heads() {
		delete(mute, one.ID)
		if one.Role == roleAssistant && one.Streaming {
			last = one
		}
	}
	silent, made := newest(maps.Keys(mute))
	switch {
	case silent != "" && (made || last.ID == ""):
		return silent, m.Last(), m.Epoch(), nil
	case last.First == m.First() && m.First() > p.Former+1: // its first chunks may be gone
		return last.ID, p.Former, m.Epoch(), nil
	}
	return last.ID, max(last.First-1, 0), m.Epoch(), nil
}

// newest returns the newest of the messages that have nothing in the log. It compares the ids that this server made, because they
// contain the time. If there are none, it compares the others, and made is false.
func newest(open iter.Seq[string]) (message string, made bool) {
	var ours, others string
	for id := range open {
		if u, err := uuid.Parse(id); err == nil && u.Version() == 7 && u.String() == id {
			ours = max(ours, id)
		} else {
			others = max(others, id)
		}
	}
	if ours != "" {
		return ours, true
	}
	return others, false
}

func (a *API) uiStream(c echo.Context, ask sse.Ask, f *uiFold) error {
	ask.Session, ask.Fold = strings.Clone(session(c)), f.fold
	return a.foldStream(c, ask, http.Header{"X-Vercel-Ai-Ui-Message-Stream": {"v1"}}, func(cause sse.Cause) bool {
		return cause == sse.Done || f.run // WorkflowChatTransport reconnects after a clean end without finish
	})
}

// foldStream responds with a stream that ask.Fold makes. clean reports whether the response must end cleanly.
func (a *API) foldStream(c echo.Context, ask sse.Ask, header http.Header, clean func(sse.Cause) bool) error {
	uncount(c)
	connection, err := newConnection(c)
	if err != nil {
		return err
	}
	if c.Request().Method == http.MethodHead {
		maps.Copy(c.Response().Header(), header)
		sse.Head(c.Response())
		return nil
	}
	ask.Connection, ask.Expires = connection, a.grant(c).Expires
	v, err := a.hub.View(ask)
	if errors.Is(err, sse.ErrDraining) {
		return errDraining
	}
	if errors.Is(err, sse.ErrFull) {
		return a.limits.Refuse(limit.Feeds(a.hub.FeedsMax()))
	}
	if err != nil {
		return err
	}
	defer v.Close()
	maps.Copy(c.Response().Header(), header)
	a.log.LogAttrs(context.Background(), slog.LevelInfo, "viewer begins", slog.Any("viewer", v), slog.String("client", c.RealIP()))
	w := a.hub.NewWriter(plain(c), c.Request())
	cause := v.Serve(c.Request().Context(), w)
	a.log.LogAttrs(context.Background(), slog.LevelInfo, "viewer ends", slog.Any("viewer", v), slog.String("cause", string(cause)))
	if clean(cause) {
		cause = sse.Done
	} else {
		cause = sse.Outside // the end or deletion of the log does not end the message
	}
	return w.End(cause)
}

// stopMessage stops a message. It also succeeds if the message has ended: the button was pressed late.
func (a *API) stopMessage(c echo.Context) error {
	id, err := messageID(c)
	if err != nil {
		return err
	}
	_, err = a.logs.Cancel(c.Request().Context(), session(c), id)
	if _, ended := errors.AsType[*store.MessageEndedError](err); err != nil && !ended && !errors.Is(err, store.ErrSessionEnded) {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func messageID(c echo.Context) (string, error) {
	id := param(c, "message_id")
	if id == "" || len(id) > store.MaxMessageID || !utf8.ValidString(id) {
		return "", &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "message_id", Limit: store.MaxMessageID,
			Detail: fmt.Sprintf("message_id must be UTF-8 text of 1 to %d bytes", store.MaxMessageID)}
	}
	return id, nil
}

// uiFold turns the chunks of one message into parts of a UI message. The parts depend on the chunks alone, so
// each part has the same position on every connection.
type uiFold struct {
	message string
	base    int64 // the message begins somewhere after this number
	first   int64 // the first chunk received; if it is not base+1, a message that continues there has lost its beginning

	begun bool
	begin int64          // the message's first chunk; 0: none yet
	open  string         // the kind of the open part: text or reasoning; empty: none is open
	parts map[string]int // how many parts of each kind have begun
	made  int            // how many parts were made, including those that the client already has

	run   bool  // finish follows whatever ends the message
	skip  int   // how many of the next parts the client already has
	known int64 // the chunks up to this number contain all those parts
}

func newUIFold(message string, base int64) *uiFold {
	return &uiFold{message: message, base: base, parts: map[string]int{}}
}

// part is a part of a UI message stream. Its type determines which members it has.
type part struct {
	Type         string          `json:"type"`
	MessageID    string          `json:"messageId,omitempty"`
	ID           string          `json:"id,omitempty"`
	Delta        string          `json:"delta,omitempty"`
	Data         json.RawMessage `json:"data,omitempty"`
	FinishReason string          `json:"finishReason,omitempty"`
	Reason       string          `json:"reason,omitempty"`
	ErrorText    string          `json:"errorText,omitempty"`
}

// fold is the sse.Ask.Fold of such a stream.
func (f *uiFold) fold(b, events []byte, ended bool) (out []byte, over bool) {
	if !f.begun {
		f.begun = true
		b = f.part(b, part{Type: "start", MessageID: f.message})
	}
	for seq, chunk := range sse.Chunks(events) {
		if b, over = f.chunk(b, seq, chunk); over {
			return b, true
		}
	}
	if ended {
		return f.end(b, part{Type: "error", ErrorText: "the conversation was ended before the answer was"}), true
	}
	return b, false
}

// chunk appends the parts that a chunk causes.
func (f *uiFold) chunk(b []byte, seq int64, chunk []byte) (out []byte, over bool) {
	if f.first == 0 {
		f.first = seq
	}
	if f.skip > 0 && f.known > 0 && seq > f.known {
		return f.lost(b), true
	}
	if !f.mayMatter(chunk) {
		return b, false
	}
	s := store.ParseSaid(chunk)
	if s.MessageID != f.message {
		return b, false
	}
	if f.begin == 0 {
		f.begin = seq
	}
	if seq == f.first && seq > f.base+1 && s.Type != store.TypeMessage {
		f.skip = 0
		return f.end(b, part{Type: "error", ErrorText: "the beginning of the answer is no longer kept"}), true
	}
	if s.Content != "" {
		kind := "text"
		if s.Type == store.TypeReasoning {
			kind = "reasoning"
		}
		if f.open != kind {
			b = f.endPart(b)
			f.open = kind
			f.parts[kind]++
			b = f.part(b, part{Type: kind + "-start", ID: f.id()})
		}
		b = f.part(b, part{Type: kind + "-delta", ID: f.id(), Delta: s.Content})
	}
	if s.Data != nil {
		kind := s.Type
		if kind == "" {
			kind = store.TypeDelta
		}
		b = f.part(f.endPart(b), part{Type: "data-" + kind, Data: json.RawMessage(s.Data)})
	}
	switch {
	case s.Type == store.TypeDone, s.Type != store.TypeFailed && s.Type != store.TypeCancelled && s.Complete:
		return f.end(b, part{Type: "finish", FinishReason: finishReason(s.FinishReason)}), true
	case s.Type == store.TypeFailed:
		text := "the answer failed"
		if s.Detail != "" {
			text += ": " + s.Detail
		} else if s.Reason != "" {
			text += ": " + s.Reason
		}
		return f.end(b, part{Type: "error", ErrorText: text}), true
	case s.Type == store.TypeCancelled:
		return f.end(b, part{Type: "abort", Reason: "cancelled"}), true
	}
	return b, false
}

// mayMatter reports whether a chunk may belong to the message, so that most others are not parsed.
func (f *uiFold) mayMatter(chunk []byte) bool {
	return bytes.Contains(chunk, []byte(f.message)) || bytes.IndexByte(chunk, '\\') >= 0
}

func (f *uiFold) id() string { return fmt.Sprint(f.open, "-", f.parts[f.open]) }

func (f *uiFold) endPart(b []byte) []byte {
	if f.open != "" {
		b = f.part(b, part{Type: f.open + "-end", ID: f.id()})
		f.open = ""
	}
	return b
}

// part appends a part, unless the client already has it.
func (f *uiFold) part(b []byte, p part) []byte {
	out := appendPart(b, p)
	if len(out) == len(b) {
		return b
	}
	f.made++
	if f.skip > 0 {
		f.skip--
		return b
	}
	return out
}

// end appends the last part, and then the end of the stream.
func (f *uiFold) end(b []byte, last part) []byte {
	b = f.part(f.endPart(b), last)
	if f.run && last.Type != "finish" {
		b = f.part(b, part{Type: "finish"})
	}
	if f.skip > 0 {
		return f.lost(b)
	}
	return append(b, done...)
}

// lost ends the stream of a client that has more parts than exist: it received what Redis has lost since.
func (f *uiFold) lost(b []byte) []byte {
	b = appendPart(b, part{Type: "error", ErrorText: "a part of the answer was lost: load it again"})
	return append(appendPart(b, part{Type: "finish"}), done...)
}

const done = "data: [DONE]\n\n"

func appendPart(b []byte, p part) []byte {
	text, err := json.Marshal(p)
	if err != nil { // a foreign producer may accept JSON that this library refuses
		return b
	}
	return append(append(append(b, "data: "...), text...), "\n\n"...)
}

// finishReason returns the AI SDK's word for a finish_reason of the chat-completions API.
func finishReason(text string) string {
	switch text {
	case "", "stop", "length":
		return text
	case "content_filter":
		return "content-filter"
	case "tool_calls", "function_call":
		return "tool-calls"
	}
	return "other"
}
