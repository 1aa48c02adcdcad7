package api

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"gapless/store"
)

const (
	typeJSON   = "application/json"
	typeNDJSON = "application/x-ndjson"
)

func (a *API) appendChunks(c echo.Context) error {
	fill := store.Fill{MessageID: c.QueryParam("message_id"), Role: c.QueryParam("role")}
	for _, p := range [][2]string{{"message_id", fill.MessageID}, {"role", fill.Role}} {
		if len(p[1]) > store.MaxMessageID || !utf8.ValidString(p[1]) {
			return invalid(p[0], fmt.Sprintf("%s is text in UTF-8, of %d bytes at most", p[0], store.MaxMessageID))
		}
	}
	var closes bool
	switch v := c.Request().Header.Get("Stream-Closed"); v {
	case "", "false":
	case "true":
		closes = true
	default:
		return invalid("Stream-Closed", "Stream-Closed is true, or left out")
	}
	kind, _, err := mime.ParseMediaType(c.Request().Header.Get("Content-Type"))
	switch {
	case err == nil && kind == typeJSON:
		return a.appendJSON(c, fill, closes)
	case err == nil && kind == typeNDJSON:
		return a.appendLines(c, fill, closes)
	}
	return &Problem{Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Member: "Content-Type",
		Detail: "Content-Type must be " + typeJSON + " (an object, or an array of them) or " + typeNDJSON + " (an object a line)"}
}

// checkJSON refuses a body that does not say that it is JSON.
func checkJSON(c echo.Context) error {
	if kind, _, err := mime.ParseMediaType(c.Request().Header.Get("Content-Type")); err == nil && kind == typeJSON {
		return nil
	}
	return &Problem{Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Member: "Content-Type", Detail: "Content-Type must be " + typeJSON}
}

func invalid(parameter, detail string) *Problem {
	return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: parameter, Detail: detail}
}

// appendJSON appends an object, or an array of them: all or none.
func (a *API) appendJSON(c echo.Context, fill store.Fill, closes bool) error {
	body, err := a.readBody(c)
	if err != nil {
		return err
	}
	chunks, err := a.parseBatch(body, fill)
	if err != nil {
		return err
	}
	u := upload{api: a, session: session(c)}
	if closes {
		chunks = append(chunks, store.NewChunk(store.TypeEnd, "", "", ""))
	}
	if len(chunks) == 0 {
		return a.appendNothing(c)
	}
	if err := u.append(c.Request().Context(), chunks); err != nil {
		return err
	}
	return c.JSON(http.StatusCreated, u.stored)
}

func (a *API) parseBatch(body []byte, fill store.Fill) ([]store.Chunk, error) {
	if trimmed := bytes.TrimLeft(body, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '[' {
		chunk, err := store.ParseChunk(body, fill, a.cfg.ChunkMax)
		return []store.Chunk{chunk}, err
	}
	// Split first, and only that: what is wrong inside a chunk is said by its own parser,
	// with its index.
	dec := jsontext.NewDecoder(newReader(body), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	broken := func(err error) error {
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "the array is not valid JSON: " + err.Error()}
	}
	if _, err := dec.ReadToken(); err != nil {
		return nil, broken(err)
	}
	var chunks []store.Chunk
	for dec.PeekKind() != ']' {
		value, err := dec.ReadValue()
		if err != nil {
			return nil, broken(err)
		}
		i := len(chunks)
		if i == a.cfg.BatchMax {
			return nil, &Problem{Status: http.StatusRequestEntityTooLarge, Code: "batch_too_large", Limit: i,
				Detail: fmt.Sprintf("the array has more than %d chunks: send it in several requests, or as %s", i, typeNDJSON)}
		}
		chunk, err := store.ParseChunk(value, fill, a.cfg.ChunkMax)
		if err != nil {
			p := problemOf(err)
			p.Chunk = &i
			return nil, p
		}
		chunks = append(chunks, chunk)
	}
	if _, err := dec.ReadToken(); err != nil {
		return nil, broken(err)
	}
	if rest := bytes.TrimSpace(body[dec.InputOffset():]); len(rest) > 0 {
		return nil, &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "there is text after the array"}
	}
	return chunks, nil
}

// newReader is what jsontext reads without a copy.
func newReader(b []byte) *bytes.Buffer { return bytes.NewBuffer(b) }

// upload is one request's appends.
type upload struct {
	api     *API
	session string
	stored  Stored
}

// append adds chunks behind those that the upload has stored already.
func (u *upload) append(ctx context.Context, chunks []store.Chunk) error {
	if len(chunks) == 0 {
		return nil
	}
	// A client that goes away does not leave us in doubt about what was stored.
	done, err := u.api.logs.Append(context.WithoutCancel(ctx), u.session, u.stored.Last, chunks)
	if err != nil {
		return err
	}
	if u.stored.Count == 0 {
		u.stored.First = done.First
	}
	u.stored.Epoch, u.stored.Last = done.Epoch, done.Last
	u.stored.Count += len(chunks)
	return nil
}

// batchLines is how many lines that are there already are appended in one script call.
const batchLines = 256

// appendLines appends an object a line, each as it arrives.
func (a *API) appendLines(c echo.Context, fill store.Fill, closes bool) error {
	ctl := http.NewResponseController(c.Response().Writer)
	// Without this, an answer to an upload that goes on waits until the upload ends.
	_ = ctl.EnableFullDuplex()
	stop := context.AfterFunc(a.ending, func() { _ = ctl.SetReadDeadline(time.Now()) })
	defer stop()

	u := upload{api: a, session: session(c)}
	err := a.copyLines(c.Request(), &u, fill)
	if err == nil && closes {
		err = u.append(c.Request().Context(), []store.Chunk{store.NewChunk(store.TypeEnd, "", "", "")})
		if refused, ok := errors.AsType[*store.RefusedError](err); ok {
			err = refused.Err // no chunk of the body is to blame
		}
	}
	if err == nil {
		if u.stored.Count == 0 {
			return a.appendNothing(c)
		}
		return c.JSON(http.StatusCreated, u.stored)
	}
	if a.ending.Err() != nil {
		err = errDraining
	}
	p := *problemOf(err)
	p.cause = err
	if u.stored.Count > 0 {
		p.Stored = &u.stored
	}
	c.Response().Header().Set("Connection", "close")
	a.problem(&p, c)
	_ = ctl.Flush()
	_ = ctl.SetReadDeadline(time.Now()) // the rest of the body is not wanted
	return nil
}

// copyLines appends what arrives until the body ends. What arrived whole before an
// error is stored.
func (a *API) copyLines(r *http.Request, u *upload, fill store.Fill) error {
	in := bufio.NewReaderSize(r.Body, a.cfg.ChunkMax+1024)
	for line := 0; ; {
		var batch []store.Chunk
		var failed error
		for len(batch) < batchLines {
			text, err := in.ReadSlice('\n')
			if err == io.EOF && len(bytes.TrimSpace(text)) > 0 {
				err = nil // the last line may lack its end; EOF comes again
			}
			switch {
			case err != nil && err != io.EOF && !errors.Is(err, bufio.ErrBufferFull):
				err = &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "the body broke off", cause: err}
			case errors.Is(err, bufio.ErrBufferFull):
				err = &store.ChunkError{Code: "chunk_too_large", Limit: a.cfg.ChunkMax,
					Detail: fmt.Sprintf("a line has more than %d bytes (-chunk-max)", a.cfg.ChunkMax)}
			}
			if err == nil && len(bytes.TrimSpace(text)) > 0 {
				var chunk store.Chunk
				if chunk, err = store.ParseChunk(text, fill, a.cfg.ChunkMax); err == nil {
					batch = append(batch, chunk)
				}
			}
			if failed = err; err != nil {
				break
			}
			if there, _ := in.Peek(in.Buffered()); bytes.IndexByte(there, '\n') < 0 {
				break // the next line is not whole yet: what is here goes out now
			}
		}
		err := u.append(r.Context(), batch)
		if refused, ok := errors.AsType[*store.RefusedError](err); ok && refused.Index > 0 {
			// What a body stores does not depend on how its lines arrived: those before it are taken.
			if first := u.append(r.Context(), batch[:refused.Index]); first != nil {
				err = first
			}
		}
		if err != nil {
			return atLine(err, line)
		}
		line += len(batch)
		if failed == io.EOF {
			return nil
		}
		if failed != nil {
			return atLine(failed, line)
		}
	}
}

// atLine says which chunk of the body an error is about, if it is about one.
func atLine(err error, line int) error {
	_, bad := errors.AsType[*store.ChunkError](err)
	_, broken := errors.AsType[*Problem](err)
	refused, late := errors.AsType[*store.RefusedError](err)
	if late {
		line += refused.Index
	}
	if !bad && !broken && !late {
		return err
	}
	p := *problemOf(err)
	p.Chunk = &line
	return &p
}

// appendNothing answers a body without chunks.
func (a *API) appendNothing(c echo.Context) error {
	b, err := a.logs.Describe(c.Request().Context(), session(c))
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return c.JSON(http.StatusCreated, Stored{Epoch: b.Epoch, First: b.Last + 1, Last: b.Last})
}

// readChunks answers a page of the log: the elements as they are, and the number of the
// first, since those of foreign producers do not say theirs.
func (a *API) readChunks(c echo.Context) error {
	const most, bytesMost = 1000, 4 << 20
	after, err := parseNumber(c.QueryParam("after"))
	if err != nil {
		return invalid("after", "after is a chunk's number, 0 or up to 16 digits")
	}
	limit := 100
	if text := c.QueryParam("limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil || limit < 1 || limit > most {
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "limit", Limit: most, Detail: fmt.Sprintf("limit is 1 to %d", most)}
		}
	}
	p, err := a.logs.Read(c.Request().Context(), session(c), after+1, bytesMost, limit)
	if err != nil {
		return err
	}
	if p.Epoch == "" || p.Deleted {
		return store.ErrNotFound
	}
	b := fmt.Appendf(nil, `{"epoch":%q,"first_seq":%d,"last_seq":%d,"ended":%t,"from_seq":%d,"chunks":[`, p.Epoch, p.First, p.Last, p.Ended, p.From)
	for i, element := range p.Elements {
		if i > 0 {
			b = append(b, ',')
		}
		b = store.AppendElement(b, p.From+int64(i), element)
	}
	return c.Blob(http.StatusOK, typeJSON, append(b, "]}"...))
}

// parseNumber reads a cursor: 0|[1-9][0-9]{0,15}. Empty is 0.
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

var errNumber = errors.New("not a number of a chunk")
