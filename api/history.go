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

// A log's text as messages: the same fold as in snapshots, for clients that want no stream. Each request folds the log
// again from its start, so that each message is whole. foldsMost limits how many folds run at a time.
const (
	foldsMost = 2
	foldBytes = 4 << 20 // of messages, in one response
	foldPage  = 1 << 20 // of the log, in one read
)

// fold waits for one of the places for calls that read whole logs.
func (a *API) fold(ctx context.Context) (give func(), err error) {
	select {
	case a.folds <- struct{}{}:
		return func() { <-a.folds }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// foldLog reads a log and folds it. The error is ErrNotFound if the session does not exist.
func (a *API) foldLog(ctx context.Context, session string, ask sse.MessagesAsk) (*sse.Messages, store.Page, error) {
	give, err := a.fold(ctx)
	if err != nil {
		return nil, store.Page{}, err
	}
	defer give()
	m := sse.NewMessages(ask)
	var last store.Page
	for p, err := range a.parts(ctx, session, 1, foldPage) {
		if err != nil {
			return nil, p, err
		}
		m.Take(p)
		last = p
	}
	return m, last, nil
}

// readMessages responds with the text of a log as messages.
func (a *API) readMessages(c echo.Context) error {
	page, err := parsePaging(c)
	if err != nil {
		return err
	}
	ui := false
	switch format := c.QueryParam("format"); format {
	case "":
	case "ui":
		ui = true
	default:
		return invalid("format", "format must be ui, or be left out")
	}
	if done, err := a.unchanged(c, page.tag); done || err != nil {
		return err
	}
	m, p, err := a.foldLog(c.Request().Context(), session(c), sse.MessagesAsk{After: page.after, Count: page.limit, Bytes: foldBytes})
	if err != nil {
		return err
	}
	ended, h := p.Ended && m.Last() == p.Last, c.Response().Header()
	if ended {
		h.Set("ETag", page.tag(p.Bounds))
	}
	next, more := m.Next()
	if more {
		linkNext(c, strconv.FormatInt(next, 10))
	}
	if ui {
		all := []sse.UIMessage{}
		for i := range m.Len() {
			if one, ok := m.UI(i); ok {
				all = append(all, one)
			}
		}
		body, err := json.Marshal(all)
		if err != nil { // another program's JSON, which this library rejects
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

// readMessage responds with one message.
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
