package api

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"
)

// docsPolicy is the strictest policy with which Swagger UI works.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// docs serves the API reference and the guide from the folder docs, with their parts.
func (a *API) docs(files fs.FS) {
	names, err := fs.Glob(files, "docs/*.*")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for _, name := range names {
		text, err := fs.ReadFile(files, name)
		if err != nil {
			panic(err) // it is in the binary
		}
		switch {
		case name == "docs/index.html":
			a.get("/docs", doc(name, docsPolicy, text))
			continue
		case name == "docs/guide.html":
			if a.cfg.Guide != nil {
				a.guide(a.cfg.Guide, string(text))
			}
			continue
		}
		a.get("/"+strings.TrimSuffix(name, ".gz"), doc(name, docsPolicy, text))
	}
}

// doc serves one file under a policy. A large file is stored compressed (.gz), and sent compressed to clients that accept it, as
// browsers do.
func doc(name, policy string, text []byte) echo.HandlerFunc {
	name, packed := strings.CutSuffix(path.Base(name), ".gz")
	tag := fmt.Sprintf("%x", sha256.Sum256(text))[:16]
	plain := sync.OnceValue(func() []byte { return unpack(text) })
	return func(c echo.Context) error {
		h := c.Response().Header()
		forPeople(h, policy)
		body, etag := text, tag
		switch {
		case !packed:
		case takesGzip(c.Request().Header.Get("Accept-Encoding")):
			h.Set("Content-Encoding", "gzip")
			etag += "-gzip"
		default:
			body = plain()
		}
		if packed {
			h.Set("Vary", "Accept-Encoding")
		}
		h.Set("ETag", `"`+etag+`"`)
		http.ServeContent(copied{c.Response()}, c.Request(), name, time.Time{}, bytes.NewReader(body))
		return nil
	}
}

// takesGzip reports whether an Accept-Encoding accepts gzip (RFC 9110, section 12.5.3).
func takesGzip(accepted string) bool {
	for one := range strings.SplitSeq(accepted, ",") {
		coding, weight, _ := strings.Cut(strings.TrimSpace(one), ";")
		if strings.EqualFold(strings.TrimSpace(coding), "gzip") {
			weight = strings.ReplaceAll(weight, " ", "")
			return strings.Trim(strings.TrimPrefix(weight, "q="), "0.") != "" || weight == ""
		}
	}
	return false
}

// unpack uncompresses a file of the binary.
func unpack(packed []byte) []byte {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		panic(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		panic(err)
	}
	return text
}
