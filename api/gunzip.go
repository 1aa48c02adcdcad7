package api

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/labstack/echo/v4"
)

// errGzip means that a body does not match its Content-Encoding.
var errGzip = errors.New("the body is not valid gzip, although its Content-Encoding says so")

// decode decodes the body of a call (RFC 9110, section 8.4). The limits of bodies apply to the decoded body, so a small
// body that becomes a huge one is refused like a huge one.
func decode(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		r := c.Request()
		switch coding := strings.Join(r.Header.Values("Content-Encoding"), ","); strings.ToLower(coding) {
		case "", "identity":
		case "gzip", "x-gzip":
			if b, ok := r.Body.(*incoming); ok { // otherwise the request has no body
				b.plain = &gunzip{from: arriving{b: b}}
				r.ContentLength = -1 // the length was that of the encoded body
			}
		default:
			c.Response().Header().Set("Accept-Encoding", "gzip")
			return &Problem{Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Member: "Content-Encoding",
				Detail: fmt.Sprintf("unsupported Content-Encoding %.40q: send the body in gzip, or uncompressed", coding)}
		}
		return next(c)
	}
}

// gunzip decodes a body while it arrives. It waits for the first byte when it is read, not before.
type gunzip struct {
	from   arriving
	reader *gzip.Reader
	// slow, if not nil, is called for each paceBytes of decoded bytes. Blank lines and comments make no chunk, so
	// otherwise nothing would slow down an upload of them, and a few KiB of it are many MB.
	slow  func(cost int)
	since int // decoded bytes since the last call of slow
}

// paceBytes is how many decoded bytes cost as much as one chunk.
const paceBytes = 1 << 10

// Read implements io.Reader.
func (g *gunzip) Read(p []byte) (n int, err error) {
	if g.reader == nil {
		if g.reader, err = gzip.NewReader(&g.from); err != nil {
			g.reader = nil
			return 0, g.fault(err)
		}
	}
	n, err = g.reader.Read(p)
	if g.since += n; g.slow != nil && g.since >= paceBytes {
		g.slow(g.since / paceBytes)
		g.since %= paceBytes
	}
	return n, g.fault(err)
}

// fault distinguishes a body that cannot be decoded, or ends too early, from a broken connection.
func (g *gunzip) fault(err error) error {
	switch {
	case err == nil, err == io.EOF:
		return err
	case g.from.err != nil:
		return g.from.err
	}
	return fmt.Errorf("%w: %w", errGzip, err)
}

// arriving is a body as it was sent.
type arriving struct {
	b   *incoming
	err error // why it broke off
}

// Read implements io.Reader.
func (a *arriving) Read(p []byte) (int, error) {
	n, err := a.b.arrive(p)
	if err != nil && err != io.EOF {
		a.err = err
	}
	return n, err
}
