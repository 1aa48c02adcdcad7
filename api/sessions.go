package api

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/store"
)

// sessionJSON is a session as clients see it.
type sessionJSON struct {
	ID        string    `json:"id"`
	Epoch     string    `json:"epoch"`
	First     int64     `json:"first_seq"`
	Last      int64     `json:"last_seq"`
	Ended     bool      `json:"ended"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
	Viewers   int       `json:"viewers"` // on this node
}

func (a *API) sessionJSON(id string, b store.Bounds) sessionJSON {
	return sessionJSON{id, b.Epoch, b.First, b.Last, b.Ended, b.CreatedAt, b.UpdatedAt, a.hub.Viewers(id)}
}

func (a *API) createSession(c echo.Context) error {
	body, err := a.readBody(c, a.atMost(c, smallBody))
	if err != nil {
		return err
	}
	var id string
	if len(body) > 0 {
		if err := checkJSON(c); err != nil {
			return err
		}
		members, err := readStrings(body, "id")
		if err != nil {
			return err
		}
		id = members["id"]
		if _, given := members["id"]; given && !validID(id) {
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_session_id", Member: "/id", Limit: 128, Detail: idRule}
		}
	}
	if id == "" {
		made, err := uuid.NewV7()
		if err != nil {
			return err
		}
		id = made.String()
	}
	return a.create(c, id)
}

// createNamed creates the session that the path names. Its body is ignored.
func (a *API) createNamed(c echo.Context) error { return a.create(c, session(c)) }

func (a *API) create(c echo.Context, id string) error {
	if err := a.may(c, auth.Write, id); err != nil {
		return err
	}
	caller := a.caller(c)
	if over := a.limits.Sessions.Over(caller); over != nil {
		return a.limits.Refuse(over)
	}
	b, created, err := a.logs.Create(c.Request().Context(), id)
	if err != nil {
		return err
	}
	if created {
		a.limits.Sessions.Owe(caller, 1)
	}
	status := http.StatusOK
	if created {
		status = http.StatusCreated
	}
	c.Response().Header().Set("Location", "/v1/sessions/"+id)
	return c.JSON(status, a.sessionJSON(id, b))
}

func (a *API) describeSession(c echo.Context) error {
	b, err := a.logs.Describe(c.Request().Context(), session(c))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, a.sessionJSON(session(c), b))
}

func (a *API) deleteSession(c echo.Context) error {
	if err := a.logs.Delete(c.Request().Context(), session(c)); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

// smallBody is the maximum size, in bytes, of a body that is an object of one or two names.
const smallBody = 16 << 10

// atMost returns the body. Reading it fails after most bytes, or after BodyMax.
func (a *API) atMost(c echo.Context, most int) io.Reader {
	return http.MaxBytesReader(plain(c), c.Request().Body, int64(min(most, a.cfg.BodyMax)))
}

// readBody reads a whole body from a limited reader.
func (a *API) readBody(c echo.Context, from io.Reader) ([]byte, error) {
	body, err := readAll(from, min(c.Request().ContentLength, int64(a.cfg.BodyMax)))
	if err != nil {
		return nil, a.bodyError(err)
	}
	if expired(a.grant(c)) { // reading may take long
		return nil, errExpired
	}
	return body, nil
}

// bodyError returns the error for a body that could not be read.
func (a *API) bodyError(err error) error {
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &Problem{Status: http.StatusRequestTimeout, Code: "body_too_slow",
			Detail: fmt.Sprintf("64 KiB of the body, or all of it, did not arrive within %v (-body-timeout): send it faster, or as %s, which has no such limit", a.cfg.BodyTimeout, typeNDJSON)}
	}
	detail := "the body ended early"
	if errors.Is(err, errGzip) {
		detail = errGzip.Error()
	}
	return &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: detail}
}

// readAll reads all of from. If its length is known, it allocates exactly that.
func readAll(from io.Reader, length int64) ([]byte, error) {
	if length < 1 {
		return io.ReadAll(from)
	}
	b := make([]byte, length)
	n, err := io.ReadFull(from, b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err == nil { // a longer body fails here
		_, err = from.Read(make([]byte, 1))
		if err == io.EOF {
			err = nil
		}
	}
	return b[:n], err
}

// readStrings reads an object whose members are all strings with known names.
func readStrings(body []byte, names ...string) (map[string]string, error) {
	object := jsontext.Value(body)
	if !object.IsValid() || object.Kind() != '{' {
		return nil, &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "the body must be one JSON object in UTF-8 without duplicate members"}
	}
	members, dec := map[string]string{}, jsontext.NewDecoder(newReader(body))
	for {
		tok, err := dec.ReadToken()
		if err != nil { // the object has ended, because it is valid
			return members, nil
		}
		if tok.Kind() != '"' {
			continue
		}
		name := tok.String()
		known := false
		for _, n := range names {
			known = known || n == name
		}
		if !known {
			return nil, &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Member: "/" + name, Detail: "unknown member " + name}
		}
		if dec.PeekKind() != '"' {
			return nil, &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Member: "/" + name, Detail: "member " + name + " must be a string"}
		}
		value, err := dec.ReadToken()
		if err != nil {
			return nil, err
		}
		members[name] = value.String()
	}
}

// sessionsJSON is a page of the sessions.
type sessionsJSON struct {
	Sessions []sessionJSON `json:"sessions"`
	Next     string        `json:"next_after,omitempty"`
}

// listSessions responds with a page of all sessions, for administrators of all sessions. Redis has no index of
// sessions, so only a few of these calls run at a time.
func (a *API) listSessions(c echo.Context) error {
	if err := a.may(c, auth.Admin, auth.All); err != nil {
		return err
	}
	limit, err := parseLimit(c)
	if err != nil {
		return err
	}
	prefix, after := c.QueryParam("prefix"), c.QueryParam("after")
	for _, id := range [][2]string{{"prefix", prefix}, {"after", after}} {
		if id[1] != "" && strings.Trim(id[1], ".") != "" && !validID(id[1]) { // dots alone may begin an id, but are none
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: id[0], Limit: 128,
				Detail: id[0] + " must be up to 128 of the characters A-Z a-z 0-9 . _ ~ -"}
		}
	}
	give, err := a.fold(c.Request().Context())
	if err != nil {
		return err
	}
	defer give()
	listed, err := a.logs.Sessions(c.Request().Context(), prefix, after, limit+1)
	if err != nil {
		return err
	}
	page := sessionsJSON{Sessions: []sessionJSON{}}
	for i, l := range listed {
		if i == limit {
			page.Next = listed[i-1].ID
			linkNext(c, page.Next)
			break
		}
		page.Sessions = append(page.Sessions, a.sessionJSON(l.ID, l.Bounds))
	}
	c.Response().Header().Set("Cache-Control", "no-store")
	return c.JSON(http.StatusOK, page)
}
