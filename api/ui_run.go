package api

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/labstack/echo/v4"

	"gapless/sse"
	"gapless/store"
)

// WorkflowChatTransport of @ai-sdk/workflow counts the parts that it has received. When a response ends without finish, it
// requests the rest by that number, at once and as often as needed. It treats an aborted body as an error,
// like every status but 200. So a response ends cleanly here wherever it ends, even in trouble.
// finish also follows an error, because without it the client would retry forever.

const (
	headerRun  = "X-Workflow-Run-Id"            // the id of the message
	headerTail = "X-Workflow-Stream-Tail-Index" // the number of the last existing part, from 0
)

// uiPause is how long a client that must reconnect is held, because it would reconnect at once.
const uiPause = time.Second

// uiRun streams a message without its first parts, whether or not it is under way.
func (a *API) uiRun(c echo.Context) error {
	id, err := messageID(c)
	if err != nil {
		return err
	}
	start, err := parseIndex(c.QueryParam("startIndex"))
	if err != nil {
		return err
	}
	caller := a.caller(c)
	if err := a.limits.Viewers.Take(caller, 1); err != nil {
		return err
	}
	defer a.limits.Viewers.Give(caller, 1)
	err = errDraining
	if a.draining.Err() == nil {
		err = a.uiFrom(c, id, start)
	}
	if c.Response().Committed || !errors.Is(err, errDraining) && !store.Away(err) {
		return err
	}
	uncount(c)
	uiHeader(c).WriteHeader(http.StatusOK)
	if c.Request().Method == http.MethodHead {
		return nil
	}
	c.Response().Flush()
	select {
	case <-time.After(uiPause):
	case <-c.Request().Context().Done():
	}
	return nil
}

// parseIndex parses the number of a part. A negative number counts parts from the end.
func parseIndex(text string) (int, error) {
	digits, negative := strings.CutPrefix(text, "-")
	n, err := parseNumber(digits)
	if err != nil || negative && n == 0 {
		return 0, invalid("startIndex", "startIndex must be the number of a part, from 0, or -N for the last N parts")
	}
	if negative {
		n = -n
	}
	return int(n), nil
}

// uiFrom streams a message from a given part on.
func (a *API) uiFrom(c echo.Context, message string, start int) error {
	ctx, session := c.Request().Context(), session(c)
	b, open, err := a.logs.Open(ctx, session)
	ask, begins := sse.Ask{Epoch: b.Epoch}, b.Former
	if message == session && !slices.Contains(open, message) { // a page that was just loaded names its chat, because it knows no message
		if err == nil {
			message, ask.Cursor, ask.Epoch, err = a.uiLatest(ctx, session, open, start > 0)
		}
		switch {
		case start <= 0 && (errors.Is(err, store.ErrNotFound) || err == nil && message == ""):
			return uiNothing(c)
		case err == nil && message == "":
			return errNoMessage
		}
		if begins = ask.Cursor; begins == b.Former { // its beginning may be gone: search from the first chunk that is kept
			ask.Cursor = 0
		}
	}
	if err != nil {
		return err
	}
	f := newUIFold(message, begins)
	f.run, f.skip, f.known = true, max(start, 0), b.Last
	if isOpen := slices.Contains(open, message); !isOpen || start < 0 {
		count, p, err := a.countParts(ctx, session, message)
		if err != nil {
			return err
		}
		if count.begin == 0 && !isOpen {
			return errNoMessage
		}
		f.base, f.known, ask.Cursor, ask.Epoch = p.Former, p.Last, 0, p.Epoch
		if count.begin > count.first {
			f.base, ask.Cursor = count.begin-1, count.begin-1
		}
		if start < 0 {
			f.skip = max(count.made+start, 0)
			c.Response().Header().Set(headerTail, strconv.Itoa(count.made-1))
		}
	}
	return a.uiStream(c, ask, f)
}

var errNoMessage = &Problem{Status: http.StatusNotFound, Code: "message_not_found", Member: "message_id", Detail: "unknown message: the session does not have it, or no longer keeps it"}

// uiLatest returns the assistant's message that began last, and after which chunk of which epoch it began. It considers unfinished
// messages only. If none exists and all is set, because the client has some of the message, it considers all messages.
func (a *API) uiLatest(ctx context.Context, session string, open []string, all bool) (message string, after int64, epoch string, err error) {
	message, after, epoch, err = a.running(ctx, session, open)
	if message != "" || err != nil || !all {
		return message, after, epoch, err
	}
	m, p, err := a.foldLog(ctx, session, sse.MessagesAsk{Only: func(string) bool { return true }, Heads: true})
	if err != nil {
		return "", 0, "", err
	}
	for _, one := range m.Heads() {
		if one.Role == roleAssistant {
			message = one.ID
		}
	}
	return message, p.Former, p.Epoch, nil // countParts finds where it begins
}

// countParts makes the parts of a message that the log has now. The result holds their number (made) and where it begins.
func (a *API) countParts(ctx context.Context, session, message string) (f *uiFold, p store.Page, err error) {
	give, err := a.fold(ctx)
	if err != nil {
		return nil, p, err
	}
	defer give()
	var scratch, element []byte
	epoch, next := "", int64(1)
	for p, err = range a.parts(ctx, session, 1, foldPage) {
		if err != nil {
			return nil, p, err
		}
		if p.Epoch != epoch || p.From != next && f.first > 0 { // the log was replaced, or its beginning was trimmed: start from here
			epoch = p.Epoch
			f = newUIFold(message, p.Former)
			f.run = true
			scratch, _ = f.fold(scratch[:0], nil, false)
		}
		for i, text := range p.Elements {
			seq := p.From + int64(i)
			element, _ = store.AppendElement(element[:0], seq, text)
			over := false
			if scratch, over = f.chunk(scratch[:0], seq, element); over {
				return f, p, nil
			}
		}
		next = p.Next()
	}
	if p.Ended && next > p.Last {
		_, _ = f.fold(scratch[:0], nil, true)
	}
	return f, p, nil
}

// uiNothing responds to a page that was loaded while nothing is under way. Its client understands no other
// response: it retries after an empty one, and any other status is an error to it.
func uiNothing(c echo.Context) error {
	b := append(appendPart(nil, part{Type: "finish"}), done...)
	_, err := uiHeader(c).Write(b)
	return err
}

// uiHeader sets the header of a UI message stream that has no viewer.
func uiHeader(c echo.Context) *echo.Response {
	h := c.Response().Header()
	h.Set("Content-Type", typeEvents)
	h.Set("Cache-Control", "no-cache, no-transform")
	h.Set("X-Vercel-Ai-Ui-Message-Stream", "v1")
	if h.Get("Gapless-Connection") == "" {
		_, _ = newConnection(c)
	}
	return c.Response()
}
