package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"

	"gapless/api/auth"
	"gapless/api/limit"
	"gapless/sse"
)

// call registers a call of /v1 with its action on the session that it names; every call
// has one. The checks come in this order: who calls, then which session, then
// whether that is allowed. All of them come before Redis is asked about the session, so a caller
// without permission cannot learn what exists. A call that names no session in its path
// checks permission itself (may).
func (a *API) call(method, path string, action auth.Action, h echo.HandlerFunc) {
	h = checkQuery(h)
	if strings.Contains(path, "/:id") {
		h = checkID(a.permit(action)(h))
	}
	h = a.identify(a.pace(h)) // assembled here, once: Echo would do it for each request
	if method == http.MethodGet {
		a.get(path, h)
		return
	}
	a.echo.Add(method, path, h)
}

// checkQuery refuses a query that cannot be parsed: the library would silently drop the parts that it does not understand.
func checkQuery(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if query := c.Request().URL.RawQuery; strings.ContainsAny(query, "%;") {
			if _, err := url.ParseQuery(query); err != nil {
				return invalid("query", "the query is malformed: escape % as %25 and ; as %3B")
			}
		}
		return next(c)
	}
}

// identify reads the request's credential into a grant. It leaves a ticket to the stream, which
// accepts it.
func (a *API) identify(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if a.cfg.Auth == nil || ticketOf(c) != "" {
			return next(c)
		}
		g, err := a.credential(c.Request())
		if errors.Is(err, auth.ErrAway) && c.Path() == streamPath {
			return a.sendAway(c)
		}
		if err != nil {
			if over := a.limits.Calls.Take(a.limits.Caller(c.Request()), 1); over != nil { // the caller is known by its address only
				return over
			}
			return err
		}
		limit.Known(sse.Conn(c.Request().Context()))
		c.Set("grant", g)
		return next(c)
	}
}

// credential returns what a request may do by its Authorization header or, without one, by its cookie.
func (a *API) credential(r *http.Request) (auth.Grant, error) {
	token, member := "", "Authorization"
	switch headers := r.Header.Values("Authorization"); {
	case len(headers) > 1:
		return auth.Grant{}, unauthorized(member, "Authorization is given twice: send one token")
	case len(headers) == 1:
		scheme, rest, _ := strings.Cut(headers[0], " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return auth.Grant{}, unauthorized(member, "the scheme of Authorization must be Bearer: send a token as Authorization: Bearer TOKEN")
		}
		token = strings.Trim(rest, " ")
	case a.cfg.Auth.Cookie() != "":
		cookies := r.CookiesNamed(a.cfg.Auth.Cookie())
		if len(cookies) > 1 { // another host of the domain may have set one
			return auth.Grant{}, unauthorized("Cookie", "the cookie "+a.cfg.Auth.Cookie()+" is given twice: log out and in again")
		}
		if len(cookies) == 1 {
			token, member = cookies[0].Value, "Cookie"
		}
	}
	if token == "" {
		return auth.Grant{}, &Problem{Status: http.StatusUnauthorized, Code: "unauthorized", Member: member, challenge: "Bearer realm=\"gapless\"",
			Detail: "this server needs a token: send it as Authorization: Bearer TOKEN" + a.otherWays()}
	}
	g, err := a.cfg.Auth.Read(token)
	if bad, ok := errors.AsType[*auth.InvalidError](err); ok {
		return g, unauthorized(member, bad.Detail)
	}
	return g, err
}

// showsToken reports whether a request has a valid credential.
func (a *API) showsToken(r *http.Request) bool {
	if a.cfg.Auth == nil {
		return false
	}
	_, err := a.credential(r)
	return err == nil
}

func (a *API) otherWays() string {
	if name := a.cfg.Auth.Cookie(); name != "" {
		return " (in a browser: log in, which sets the cookie " + name + "); a stream also accepts a ?ticket="
	}
	return "; a stream also accepts a ?ticket="
}

// unauthorized returns the refusal of a credential (RFC 6750, section 3).
func unauthorized(member, detail string) *Problem {
	return &Problem{Status: http.StatusUnauthorized, Code: "unauthorized", Member: member, Detail: detail,
		challenge: `Bearer realm="gapless", error="invalid_token", error_description="the body says what is wrong"`}
}

// permit refuses callers that may not do this to the session that the path names.
func (a *API) permit(action auth.Action) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			if ticketOf(c) == "" {
				if err := a.may(c, action, session(c)); err != nil {
					return err
				}
			}
			return next(c)
		}
	}
}

// may returns an error if the caller may not do this to a session.
func (a *API) may(c echo.Context, action auth.Action, id string) error {
	g := a.grant(c)
	if g.May(action, id) {
		return nil
	}
	claim := ""
	if a.cfg.Auth != nil {
		claim = a.cfg.Auth.Claim()
	}
	what, under := fmt.Sprintf("session %q", id), fmt.Sprintf("%q or %q", action, auth.Admin)
	if id == auth.All {
		what = "all sessions, *"
	}
	if action == auth.Admin {
		under = fmt.Sprintf("%q", action)
	}
	return &Problem{Status: http.StatusForbidden, Code: "forbidden",
		Detail:    fmt.Sprintf("the token does not allow %s on %s: its claim %q must name it under %s", action, what, claim, under),
		challenge: `Bearer realm="gapless", error="insufficient_scope", error_description="the body says what is missing"`}
}

// grant returns what the request's credential allows; without a credential, nothing.
func (a *API) grant(c echo.Context) auth.Grant {
	if a.cfg.Auth == nil {
		return everything
	}
	g, _ := c.Get("grant").(auth.Grant)
	return g
}

var everything = auth.Everything()

// errExpired refuses the rest of a request that began in time.
var errExpired = unauthorized("Authorization", "the token expired while the request was under way: get a new one from its issuer, and go on with that")

func expired(g auth.Grant) bool { return !g.Expires.IsZero() && !time.Now().Before(g.Expires) }

// ticketOf returns the ticket of a request for a stream, or "" if the request has a token.
func ticketOf(c echo.Context) string {
	if c.Path() != streamPath || c.Request().Header.Get("Authorization") != "" {
		return ""
	}
	return c.QueryParam("ticket")
}

// operate admits only callers that may do everything to all sessions.
func (a *API) operate(next echo.HandlerFunc) echo.HandlerFunc {
	return a.identify(func(c echo.Context) error {
		if err := a.may(c, auth.Admin, auth.All); err != nil {
			return err
		}
		return next(c)
	})
}

// guard sets the headers that every response has for browsers, and refuses requests that must have no effect. No
// response may serve another site's page as a script, a style or a picture.
func (a *API) guard() echo.MiddlewareFunc {
	checks := []func(*http.Request) error{a.checkSize, a.checkHost, checkOrigin(a.cfg.Origins)}
	noSniffing, ours := []string{"nosniff"}, []string{"same-origin"} // shared, because no handler changes a header's values in place
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			h := c.Response().Header()
			h["X-Content-Type-Options"] = noSniffing
			h["Cross-Origin-Resource-Policy"] = ours
			for _, check := range checks {
				if err := check(c.Request()); err != nil {
					return err
				}
			}
			return next(c)
		}
	}
}

// share lets pages of the configured origins call /v1, with and without cookies
// (https://fetch.spec.whatwg.org/#http-cors-protocol). It sets its headers before anything can
// fail, so that such a page can also read problems. A stream whose connection is taken
// over has them, too.
func (a *API) share() echo.MiddlewareFunc {
	return middleware.CORSWithConfig(middleware.CORSConfig{
		Skipper: func(c echo.Context) bool {
			return !strings.HasPrefix(c.Request().URL.Path, "/v1/") && !isOpenAI(c.Request())
		},
		// Exact matches only: the library's own list allows patterns.
		AllowOriginFunc:  func(origin string) (bool, error) { return slices.Contains(a.cfg.Origins, origin), nil },
		AllowCredentials: true,
		AllowHeaders: []string{"Authorization", "Content-Type", "Last-Event-ID", "If-None-Match", "Cache-Control", headerProducerID, headerProducerEpoch, headerProducerChunk,
			"Stream-Closed", "Content-Encoding",
			"X-Stainless-Lang", "X-Stainless-Package-Version", "X-Stainless-OS", "X-Stainless-Arch", "X-Stainless-Runtime", "X-Stainless-Runtime-Version", "X-Stainless-Retry-Count",
			"X-Stainless-Timeout", "X-Stainless-Helper-Method", "OpenAI-Organization", "OpenAI-Project", "Idempotency-Key", // OpenAI's clients
			"traceparent", "tracestate", "baggage"}, // instrumented pages add these to each request (https://www.w3.org/TR/trace-context/)
		ExposeHeaders: []string{"Location", "Link", "ETag", "Retry-After", "WWW-Authenticate", "Gapless-Connection", "Gapless-Epoch", "Gapless-Reason", "Gapless-Refused", headerRun, headerTail, headerSession, headerProducerEpoch, headerExpectedChunk},
		MaxAge:        7200, // no browser caches it for longer
	})
}

// until ends an upload when its credential expires. The response says what was stored.
func (u *upload) until(g auth.Grant) (stop func() bool) {
	if g.Expires.IsZero() {
		return func() bool { return true }
	}
	return time.AfterFunc(time.Until(g.Expires), func() { u.stop(errExpired) }).Stop
}

// keysReady returns an error if tokens cannot be verified.
func (a *API) keysReady(ctx context.Context) error {
	if a.cfg.Auth == nil {
		return nil
	}
	return a.cfg.Auth.Ready(ctx)
}
