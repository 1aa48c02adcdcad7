package api

import (
	"errors"
	"log/slog"
	"net/http"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/sse"
)

// stream gives a viewer the log from its cursor on.
func (a *API) stream(c echo.Context) error {
	r := c.Request()
	connection, err := uuid.NewV7()
	if err != nil {
		return err
	}
	view := sse.Ask{Session: session(c), Connection: connection.String()}
	if err := parseView(c, &view); err != nil {
		return err
	}
	c.Response().Header().Set("Gapless-Connection", view.Connection)

	v, err := a.hub.View(view)
	if errors.Is(err, sse.ErrDraining) {
		return a.hub.NewWriter(c.Response().Writer, r).Refuse()
	}
	if err != nil {
		return err
	}
	defer v.Close()
	switch v.Over(r.Context(), a.cfg.Patience) {
	case sse.Ended, sse.Deleted:
		return c.NoContent(http.StatusNoContent)
	case sse.Outside:
		return &Problem{Status: http.StatusGone, Code: "cursor_outside", Member: "Last-Event-ID",
			Detail: "the log has not what follows this cursor: it was trimmed, or it is another log. Begin again without a cursor, or view it without format=raw, which tells what happened"}
	}
	a.log.LogAttrs(r.Context(), slog.LevelInfo, "viewer begins", slog.Any("viewer", v))
	w := a.hub.NewWriter(c.Response().Writer, r)
	cause := v.Serve(r.Context(), w)
	a.log.LogAttrs(r.Context(), slog.LevelInfo, "viewer ends", slog.Any("viewer", v), slog.String("cause", string(cause)))
	return w.End(cause)
}

// parseView reads the cursor. The header is a browser's own and the newest; the URL
// stays what it was when the page was made.
func parseView(c echo.Context, view *sse.Ask) error {
	after := c.QueryParam("after")
	if after == "latest" {
		view.Cursor = sse.Latest
	} else {
		n, err := parseNumber(after)
		if err != nil {
			return invalid("after", "after is a chunk's number, 0 or up to 16 digits, or latest")
		}
		view.Cursor = n
	}
	switch until := c.QueryParam("until"); until {
	case "":
	case "done":
		view.UntilDone = true
	default:
		return invalid("until", "until is done, or left out")
	}
	switch format := c.QueryParam("format"); format {
	case "":
	case "raw":
		view.Raw = true
	default:
		return invalid("format", "format is raw, or left out")
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
