package api

import (
	"cmp"
	"context"
	"net/http"
	"time"

	"github.com/labstack/echo/v4"
)

// Tracer is implemented by traces.Traces, which documents the methods. Config.Tracer is nil without tracing.
type Tracer interface {
	Route(ctx context.Context, method, route string)
	View(r *http.Request, route, session, connection string, cursor int64) (ends func(status int))
	Appended(ctx context.Context, session, epoch string, from, to int64, begun time.Time)
}

// traceRoute names the request's span once its route is known.
func (a *API) traceRoute(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		defer func() { // requests that the checks refuse are named, too
			a.cfg.Tracer.Route(c.Request().Context(), method(c.Request().Method), cmp.Or(c.Path(), "none"))
		}()
		return next(c)
	}
}
