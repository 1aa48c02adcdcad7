package api

import (
	"context"
	"fmt"
	"net/http"

	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/api/limit"
	"gapless/store"
)

// caller returns the caller that the limits apply to: the token's subject, or else the address. With a ticket, or a
// token without a subject, it is the address. A token that may write all sessions is the operator's own
// service, which acts for many users: only the node's limits apply to it.
func (a *API) caller(c echo.Context) limit.Caller {
	g := a.grant(c)
	if a.cfg.Auth != nil && g.May(auth.Write, auth.All) {
		return limit.Caller{}
	}
	if subject := g.Subject; subject != "" {
		return limit.Caller{Subject: subject}
	}
	return a.limits.Caller(c.Request())
}

// onBehalf tells the store whom it works for, so that callers take turns. Callers that cannot be told apart take turns by session.
func onBehalf(ctx context.Context, caller limit.Caller) context.Context {
	switch {
	case caller.Subject != "":
		return store.WithCaller(ctx, "subject "+caller.Subject)
	case caller.Address.IsValid():
		return store.WithCaller(ctx, "address "+caller.Address.String())
	}
	return ctx
}

// pace refuses calls that come too fast. By then the caller is identified, if it has a token.
func (a *API) pace(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		err := a.limits.Calls.Take(a.caller(c), 1)
		switch {
		case err == nil:
			return next(c)
		case c.Path() == streamPath:
			return a.sendFull(c, err)
		}
		return err
	}
}

// checkSize refuses a URL or a header that exceeds its limit, with a problem. If one is much longer still,
// the HTTP server refuses it itself.
func (a *API) checkSize(r *http.Request) error {
	if most := a.cfg.URLMax; len(r.RequestURI) > most {
		return &Problem{Status: http.StatusRequestURITooLong, Code: "url_too_long", Limit: most,
			Detail: fmt.Sprintf("the URL has %d bytes: the limit is %d (-url-max)", len(r.RequestURI), most)}
	}
	size := len(r.Host)
	for name, values := range r.Header {
		for _, value := range values {
			size += len(name) + len(value) + len(": \r\n")
		}
	}
	if most := a.cfg.HeaderMax; size > most {
		return &Problem{Status: http.StatusRequestHeaderFieldsTooLarge, Code: "header_too_large", Limit: most,
			Detail: fmt.Sprintf("the request header has %d bytes: the limit is %d (-header-max); usually a cookie is too long", size, most)}
	}
	return nil
}
