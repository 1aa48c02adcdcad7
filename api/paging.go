package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strconv"
	"strings"

	"github.com/labstack/echo/v4"

	"gapless/store"
)

// paging is the part of a log that a request asks for.
type paging struct {
	after int64
	limit int
}

// pageMost is the maximum limit of a page, and pageUsual is the default.
const pageMost, pageUsual = 1000, 100

func parsePaging(c echo.Context) (p paging, err error) {
	if p.after, err = parseNumber(c.QueryParam("after")); err != nil {
		return p, invalid("after", "after must be a chunk number: 0, or up to 16 digits")
	}
	p.limit, err = parseLimit(c)
	return p, err
}

func parseLimit(c echo.Context) (int, error) {
	text := c.QueryParam("limit")
	if text == "" {
		return pageUsual, nil
	}
	if n, err := parseNumber(text); err == nil && n >= 1 && n <= pageMost {
		return int(n), nil
	}
	return 0, &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "limit", Limit: pageMost, Detail: fmt.Sprintf("limit must be 1 to %d", pageMost)}
}

// tag returns the entity tag of a page of a log that has ended. These numbers determine its bytes until the log is
// trimmed, expires or is replaced.
func (p paging) tag(b store.Bounds) string {
	return fmt.Sprintf(`"%s-%d-%d-%d-%d"`, b.Epoch, b.First, b.Last, p.after, p.limit)
}

// unchanged responds with 304 if the log has ended and If-None-Match contains its current tag.
func (a *API) unchanged(c echo.Context, tag func(store.Bounds) string) (done bool, err error) {
	c.Response().Header().Set("Cache-Control", "no-cache")
	have := c.Request().Header.Get("If-None-Match")
	if have == "" {
		return false, nil
	}
	b, err := a.logs.Describe(c.Request().Context(), session(c))
	if err != nil {
		return false, err
	}
	if now := tag(b); b.Ended && matches(have, now) {
		c.Response().Header().Set("ETag", now)
		return true, c.NoContent(http.StatusNotModified)
	}
	return false, nil
}

// matches reports whether If-None-Match contains a tag (RFC 9110, section 13.1.2).
func matches(header, tag string) bool {
	for one := range strings.SplitSeq(header, ",") {
		if one = strings.TrimSpace(one); one == "*" || strings.TrimPrefix(one, "W/") == tag {
			return true
		}
	}
	return false
}

// linkNext sets the link to the next page (RFC 8288).
func linkNext(c echo.Context, after string) {
	q := c.Request().URL.Query()
	q.Set("after", after)
	c.Response().Header().Set("Link", "<?"+q.Encode()+`>; rel="next"`)
}

// parts reads a log in parts of a number of bytes, up to the chunk that is the newest at the first read. The log may be
// trimmed or replaced meanwhile. Then a part does not begin where the one before it ended, or has another epoch, and
// the end is the newest chunk of the new epoch. The error is ErrNotFound if the session does not exist.
func (a *API) parts(ctx context.Context, session string, from int64, bytes int) iter.Seq2[store.Page, error] {
	return func(yield func(store.Page, error) bool) {
		for epoch, upto := "", int64(0); ; {
			p, err := a.logs.Read(ctx, session, from, bytes, 1<<20)
			if err == nil && !p.Exists() {
				err = store.ErrNotFound
			}
			if err == nil && p.Epoch != epoch {
				epoch, upto = p.Epoch, p.Last
			}
			if !yield(p, err) || err != nil {
				return
			}
			if from = p.Next(); from > upto || len(p.Elements) == 0 {
				return
			}
		}
	}
}

// parseNumber parses a cursor: 0|[1-9][0-9]{0,15}. An empty text is 0.
func parseNumber(text string) (int64, error) {
	if text == "" || text == "0" {
		return 0, nil
	}
	if len(text) > 16 || text[0] < '1' || text[0] > '9' {
		return 0, errNumber
	}
	for _, d := range []byte(text) {
		if d < '0' || d > '9' {
			return 0, errNumber
		}
	}
	return strconv.ParseInt(text, 10, 64)
}

var errNumber = errors.New("not a chunk number")
