package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"

	"github.com/labstack/echo/v4"

	"gapless/store"
)

// digestJSON identifies chunks first_seq to last_seq of a log without their text. The digest is SHA-256 over the data
// of their events, each followed by a line feed.
type digestJSON struct {
	Epoch  string `json:"epoch"`
	First  int64  `json:"first_seq"`
	Last   int64  `json:"last_seq"`
	Count  int64  `json:"count"`
	SHA256 string `json:"sha256"`
}

// readDigest responds with the digest of a part of the log, so that a client can check what it received.
func (a *API) readDigest(c echo.Context) error {
	first, err := parseNumber(c.QueryParam("first"))
	if err != nil {
		return invalid("first", "first must be a chunk number: up to 16 digits")
	}
	last, err := parseNumber(c.QueryParam("last"))
	if err != nil {
		return invalid("last", "last must be a chunk number: up to 16 digits")
	}
	if last == 0 {
		last = maxNumber
	}
	if first > last {
		return invalid("first", "first must not be greater than last")
	}
	tag := func(b store.Bounds) string {
		return fmt.Sprintf(`"%s-%d-%d-%d-%d-sha256"`, b.Epoch, b.First, b.Last, first, last)
	}
	if done, err := a.unchanged(c, tag); done || err != nil {
		return err
	}
	if err := out(c).take(a.caller(c), partCost); err != nil {
		return err
	}
	d, bounds, err := a.digest(onBehalf(c.Request().Context(), a.caller(c)), session(c), max(first, 1), last)
	if err != nil {
		return err
	}
	if bounds.Ended {
		c.Response().Header().Set("ETag", tag(bounds))
	}
	return c.JSON(http.StatusOK, d)
}

// digest starts again if the log is replaced while it is read, or trimmed beyond the current position.
func (a *API) digest(ctx context.Context, session string, first, last int64) (d digestJSON, b store.Bounds, err error) {
	for {
		hash, text, whole, upto := sha256.New(), []byte(nil), true, last
		d = digestJSON{}
		for p, err := range a.parts(ctx, session, first, pagePart) {
			if err != nil {
				return d, b, err
			}
			if d.Epoch == "" {
				b, d = p.Bounds, digestJSON{Epoch: p.Epoch, First: p.From, Last: p.From - 1}
				upto = min(last, p.Last)
			}
			if whole = p.Epoch == d.Epoch && p.From == d.Last+1; !whole {
				break
			}
			for i, element := range p.Elements {
				seq := p.From + int64(i)
				if seq > upto {
					break
				}
				text, _ = store.AppendElement(text[:0], seq, element)
				hash.Write(append(text, '\n'))
				d.Last = seq
			}
			if d.Last >= upto {
				break
			}
		}
		if whole {
			d.Count, d.SHA256 = d.Last-d.First+1, hex.EncodeToString(hash.Sum(nil))
			return d, b, nil
		}
	}
}
