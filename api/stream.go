package api

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"strings"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/api/limit"
	"gapless/sse"
	"gapless/store"
)

// stream sends a viewer the log after its cursor.
func (a *API) stream(c echo.Context) error {
	r := c.Request()
	connection, err := newConnection(c)
	if err != nil {
		return err
	}
	view := sse.Ask{Session: strings.Clone(session(c)), Connection: connection}
	if err := parseView(c, &view); err != nil {
		return err
	}
	head := r.Method == http.MethodHead
	if head && ticketOf(c) != "" { // a HEAD does not use the ticket up, so it admits nobody, and Redis is not asked
		sse.Head(c.Response())
		return nil
	}
	caller := a.caller(c)
	if err := a.limits.Viewers.Take(caller, 1); err != nil {
		return a.sendFull(c, err)
	}
	uncount(c)
	leave := func() { a.limits.Viewers.Give(caller, 1) } // and the ticket's admission
	mine := true
	defer func() {
		if mine {
			leave()
		}
	}()
	g := a.grant(c)
	var in *admission
	if ticket := ticketOf(c); ticket != "" {
		g, in, err = a.enter(r.Context(), ticket, view.Session, view.Connection)
		if errors.Is(err, store.ErrAway) {
			return a.sendAway(c)
		}
		if err != nil {
			return err
		}
		limit.Known(sse.Conn(r.Context()))
		leave = func() { in.end(); a.limits.Viewers.Give(caller, 1) }
	}
	view.Expires = g.Expires

	v, err := a.hub.View(view)
	if errors.Is(err, sse.ErrDraining) {
		return a.sendAway(c)
	}
	if errors.Is(err, sse.ErrFull) {
		return a.sendFull(c, a.limits.Refuse(limit.Feeds(a.hub.FeedsMax())))
	}
	if err != nil {
		return err
	}
	defer func() {
		if mine {
			v.Close()
		}
	}()
	if in != nil {
		in.view(v)
	}
	client := strings.Clone(c.RealIP())
	method, route := method(r.Method), c.Path() // when a connection that was taken over ends, c belongs to another request
	answered := func(int) {}
	if a.cfg.Tracer != nil {
		answered = a.cfg.Tracer.View(r, route, view.Session, view.Connection, view.Cursor)
	}
	begins := func() {
		answered(http.StatusOK)
		a.log.LogAttrs(context.Background(), slog.LevelInfo, "viewer begins", slog.Any("viewer", v), slog.String("client", client))
	}
	ends := func(cause sse.Cause) {
		a.log.LogAttrs(context.Background(), slog.LevelInfo, "viewer ends", slog.Any("viewer", v), slog.String("cause", string(cause)))
	}
	if !head && a.hub.Take(v, plain(c), r, a.cfg.Patience, sse.Told{Begins: begins, Ends: func(cause sse.Cause, begun bool) {
		leave()
		status := 0
		switch {
		case !begun && cause.Clean():
			status = http.StatusNoContent
			answered(status)
		case !begun:
			answered(0) // its client has gone
		case begun:
			ends(cause)
			if cause.Clean() {
				status = http.StatusOK
			}
		}
		a.metrics.count(method, route, status)
	}}) {
		mine, c.Response().Committed = false, true
		return errTaken
	}
	switch over := v.Over(r.Context(), a.cfg.Patience); over {
	case sse.Ended, sse.Deleted:
		maps.Copy(c.Response().Header(), v.Nothing(over))
		answered(http.StatusNoContent)
		return c.NoContent(http.StatusNoContent)
	case sse.Outside:
		answered(http.StatusGone)
		return &Problem{Status: http.StatusGone, Code: "cursor_outside", Member: "Last-Event-ID",
			Detail: "the chunks after this cursor are gone: the log was trimmed or replaced. Start again without a cursor, or without format=raw, where a reset event says what happened"}
	}
	if head {
		answered(http.StatusOK)
		v.Head(c.Response())
		return nil
	}
	begins()
	w := a.hub.NewWriter(plain(c), r)
	cause := v.Serve(r.Context(), w)
	ends(cause)
	return w.End(cause)
}

// newConnection makes a name for the connection, and sets it in the response header.
func newConnection(c echo.Context) (string, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return "", err
	}
	c.Response().Header().Set("Gapless-Connection", id.String())
	return id.String(), nil
}

// sendAway makes a viewer reconnect, to this node or another. An error status would end its EventSource for good.
func (a *API) sendAway(c echo.Context) error {
	if c.Response().Header().Get("Gapless-Connection") == "" {
		if _, err := newConnection(c); err != nil {
			return err
		}
	}
	return a.refuse(c, sse.Shutdown)
}

// sendFull makes a viewer reconnect later, because it exceeds a limit. A header names the limit, because the stream has
// no place for it.
func (a *API) sendFull(c echo.Context, why error) error {
	if _, err := newConnection(c); err != nil {
		return err
	}
	c.Response().Header().Set("Gapless-Refused", why.Error())
	return a.refuse(c, sse.Full)
}

// refuse breaks a stream off before its first event. A HEAD ends as usual.
func (a *API) refuse(c echo.Context, why sse.Cause) error {
	if c.Request().Method == http.MethodHead {
		sse.Head(c.Response())
		return nil
	}
	return a.hub.NewWriter(plain(c), c.Request()).Refuse(why)
}

// errTaken means that the server no longer owns a request's connection. The request is counted when its response ends.
var errTaken = errors.New("taken over")

// parseView reads the cursor. The browser sets the header, which is newer. The URL is as old as the page.
func parseView(c echo.Context, view *sse.Ask) error {
	after := c.QueryParam("after")
	if after == "latest" {
		view.Cursor = sse.Latest
	} else {
		n, err := parseNumber(after)
		if err != nil {
			return invalid("after", "after must be a chunk number (0, or up to 16 digits) or latest")
		}
		view.Cursor = n
	}
	switch until := c.QueryParam("until"); until {
	case "":
	case "done":
		view.UntilDone = true
	default:
		return invalid("until", "until must be done, or be left out")
	}
	switch format := c.QueryParam("format"); format {
	case "":
	case "raw":
		view.Raw = true
	default:
		return invalid("format", "format must be raw, or be left out")
	}
	switch snapshot := c.QueryParam("snapshot"); {
	case snapshot == "":
	case snapshot != "1":
		return invalid("snapshot", "snapshot must be 1, or be left out")
	case view.Raw:
		return invalid("snapshot", "snapshot cannot be combined with format=raw: leave one of them out")
	default:
		view.Snapshot = true
	}
	id := c.Request().Header.Get("Last-Event-ID")
	if id == "" {
		id = c.QueryParam("lastEventId")
	}
	if id != "" {
		n, err := parseNumber(id)
		view.Cursor, view.Unknown = n, err != nil
	}
	return nil
}
