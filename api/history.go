package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	"github.com/labstack/echo/v4"

	"gapless/sse"
	"gapless/store"
)

// What a log says as messages: the fold that snapshots are, for those who want no stream. It is made anew for each
// request, from the log's start, so that each message is whole; foldsMost bounds how many are made at a time.
const (
	foldsMost    = 2
	messagesMost = 1000
	foldBytes    = 4 << 20 // of messages, in one answer
	foldPage     = 1 << 20 // of the log, in one read
)

// foldLog reads a log and folds it. ErrNotFound: there is no such session.
func (a *API) foldLog(ctx context.Context, session string, ask sse.MessagesAsk) (*sse.Messages, store.Page, error) {
	select {
	case a.folds <- struct{}{}:
		defer func() { <-a.folds }()
	case <-ctx.Done():
		return nil, store.Page{}, ctx.Err()
	}
	m, epoch := sse.NewMessages(ask), ""
	for from, upto := int64(1), int64(0); ; {
		p, err := a.logs.Read(ctx, session, from, foldPage, 1<<20)
		if err != nil {
			return nil, p, err
		}
		if !p.Exists() {
			return nil, p, store.ErrNotFound
		}
		if p.Epoch != epoch { // the log as it is now; what comes while it is read, a stream tells
			epoch, upto = p.Epoch, p.Last
		}
		m.Take(p)
		if from = p.Next(); from > upto || len(p.Elements) == 0 {
			return m, p, nil
		}
	}
}

// readMessages answers what a log says as messages.
func (a *API) readMessages(c echo.Context) error {
	after, err := parseNumber(c.QueryParam("after"))
	if err != nil {
		return invalid("after", "after is a chunk's number, 0 or up to 16 digits")
	}
	limit := 100
	if text := c.QueryParam("limit"); text != "" {
		n, err := parseNumber(text)
		if limit = int(n); err != nil || n < 1 || n > messagesMost {
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "limit", Limit: messagesMost, Detail: fmt.Sprintf("limit is 1 to %d", messagesMost)}
		}
	}
	ui := false
	switch format := c.QueryParam("format"); format {
	case "":
	case "ui":
		ui = true
	default:
		return invalid("format", "format is ui, or left out")
	}
	h := c.Response().Header()
	h.Set("Cache-Control", "no-cache")
	if have := c.Request().Header.Get("If-None-Match"); have != "" {
		b, err := a.logs.Describe(c.Request().Context(), session(c))
		if err != nil {
			return err
		}
		if tag := pageTag(b, after, limit); b.Ended && matches(have, tag) {
			h.Set("ETag", tag)
			return c.NoContent(http.StatusNotModified)
		}
	}
	m, p, err := a.foldLog(c.Request().Context(), session(c), sse.MessagesAsk{After: after, Count: limit, Bytes: foldBytes})
	if err != nil {
		return err
	}
	ended := p.Ended && m.Last() == p.Last
	if ended {
		h.Set("ETag", pageTag(p.Bounds, after, limit))
	}
	next, more := m.Next()
	if more {
		q := c.Request().URL.Query()
		q.Set("after", strconv.FormatInt(next, 10))
		h.Set("Link", "<?"+q.Encode()+`>; rel="next"`)
	}
	if ui {
		all := []sse.UIMessage{}
		for i := range m.Len() {
			if one, ok := m.UI(i); ok {
				all = append(all, one)
			}
		}
		body, err := json.Marshal(all)
		if err != nil { // what a foreign producer takes for JSON, and this library does not
			return err
		}
		return c.Blob(http.StatusOK, typeJSON, body)
	}
	b := fmt.Appendf(nil, `{"epoch":%q,"first_seq":%d,"last_seq":%d,"ended":%t,"messages":[`, m.Epoch(), m.First(), m.Last(), ended)
	for i := range m.Len() {
		if i > 0 {
			b = append(b, ',')
		}
		b = m.AppendJSON(b, i)
	}
	if b = append(b, ']'); more {
		b = fmt.Appendf(b, `,"next_after":%d`, next)
	}
	return c.Blob(http.StatusOK, typeJSON, append(b, '}'))
}

// readMessage answers one message.
func (a *API) readMessage(c echo.Context) error {
	id, err := messageID(c)
	if err != nil {
		return err
	}
	m, _, err := a.foldLog(c.Request().Context(), session(c), sse.MessagesAsk{Only: func(name string) bool { return name == id }, Bytes: foldBytes})
	if err != nil {
		return err
	}
	if m.Len() == 0 {
		return errNoMessage
	}
	h, one := c.Response().Header(), m.Heads()[0]
	h.Set("Cache-Control", "no-cache")
	if !one.Streaming {
		tag := fmt.Sprintf(`"%s-%d-%d"`, m.Epoch(), one.First, one.Last)
		h.Set("ETag", tag)
		if matches(c.Request().Header.Get("If-None-Match"), tag) {
			return c.NoContent(http.StatusNotModified)
		}
	}
	return c.Blob(http.StatusOK, typeJSON, m.AppendJSON(nil, 0))
}
