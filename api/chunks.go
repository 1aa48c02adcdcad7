package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/store"
)

const (
	typeJSON   = "application/json"
	typeNDJSON = "application/x-ndjson"
	typeText   = "text/plain"
	typeEvents = "text/event-stream"
)

// posting holds what a request to append says besides its body.
type posting struct {
	kind     string // of the body
	fill     store.Fill
	ends     bool // append done for the body's message after the body
	closes   bool // append end after the body
	lease    time.Duration
	producer store.Producer
}

// appendChunks appends the chunks of a body: all at once, or as they arrive.
func (a *API) appendChunks(c echo.Context) error {
	p, err := parsePosting(c)
	if err != nil {
		return err
	}
	if p.kind == typeJSON {
		return a.appendJSON(c, p)
	}
	if p.kind != typeNDJSON && p.fill.MessageID == "" { // such a body is one message
		if p.fill.MessageID, err = makeUp(session(c), p.producer); err != nil {
			return err
		}
	}
	return a.appendStream(c, p)
}

// makeUp makes an id for a message without one. A request that is repeated with its producer numbers gets the same id.
func makeUp(session string, p store.Producer) (string, error) {
	if p.ID != "" {
		return uuid.NewSHA1(uuid.Nil, fmt.Appendf(nil, "%s %s %d %d", session, p.ID, p.Epoch, p.Number)).String(), nil
	}
	id, err := uuid.NewV7()
	return id.String(), err
}

// subject is the message that a body is about: the one that its request names, or else that of the body's last chunk.
type subject struct {
	store.Fill
	named  bool // by its request
	known  bool // there is such a message: it is named, or the body has a chunk
	over   bool // the body has ended it
	closed bool // the body has ended the log
}

func (p posting) about() subject {
	named := p.fill.MessageID != ""
	return subject{Fill: p.fill, named: named, known: named}
}

// see updates s for chunks of the body, and returns what to append for them. No done can come after a chunk that ends
// the log, so it comes before that chunk: own is its index then, and otherwise -1.
func (s *subject) see(chunks []store.Chunk, p posting) (all []store.Chunk, own int) {
	for i, c := range chunks {
		if s.closed {
			break
		}
		if c.EndsLog() {
			if own = -1; s.due(p) {
				chunks, own = slices.Insert(chunks, i, store.NewEnding(store.TypeDone, s.Fill)), i
			}
			s.closed = true
			return chunks, own
		}
		s.known = true
		if !s.named && c.MessageID() != s.MessageID {
			s.MessageID, s.over = c.MessageID(), false
		}
		if c.MessageID() == s.MessageID {
			s.over = c.Ends()
		}
	}
	return chunks, -1
}

// due reports whether the request's done is still to be appended.
func (s *subject) due(p posting) bool { return p.ends && s.known && !s.over && !s.closed }

// endings returns the chunks to append after a body.
func (s *subject) endings(p posting) (chunks []store.Chunk) {
	if s.due(p) || p.kind == typeText || p.kind == typeEvents {
		chunks = append(chunks, store.NewEnding(store.TypeDone, s.Fill))
	}
	if p.closes {
		chunks = append(chunks, store.NewEnding(store.TypeEnd, store.Fill{}))
	}
	return chunks
}

func parsePosting(c echo.Context) (p posting, err error) {
	p.fill = store.Fill{MessageID: c.QueryParam("message_id"), Role: c.QueryParam("role")}
	for _, q := range [][2]string{{"message_id", p.fill.MessageID}, {"role", p.fill.Role}} {
		if len(q[1]) > store.MaxMessageID || !utf8.ValidString(q[1]) {
			return p, invalid(q[0], fmt.Sprintf("%s must be UTF-8 text of at most %d bytes", q[0], store.MaxMessageID))
		}
	}
	switch v := c.Request().Header.Get("Stream-Closed"); v {
	case "", "false":
	case "true":
		p.closes = true
	default:
		return p, invalid("Stream-Closed", "Stream-Closed must be true, or be left out")
	}
	switch end := c.QueryParam("end"); end {
	case "":
	case "done":
		p.ends = true
	default:
		return p, invalid("end", "end must be done, or be left out")
	}
	if text := c.QueryParam("lease"); text != "" {
		const least, most = time.Second, 24 * time.Hour
		if p.lease, err = time.ParseDuration(text); err != nil || p.lease < least || p.lease > most {
			return p, invalid("lease", "lease must be a duration from 1s to 24h, such as 30s or 5m")
		}
	}
	if p.producer, err = parseProducer(c.Request().Header); err != nil {
		return p, err
	}
	p.kind, err = mediaType(c.Request())
	switch p.kind {
	case typeJSON, typeNDJSON, typeText, typeEvents:
		return p, err
	}
	return p, &Problem{Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Member: "Content-Type",
		Detail: "Content-Type must be " + typeJSON + " (an object, or an array of objects), " + typeNDJSON + " (one object per line), " +
			typeText + " or " + typeEvents}
}

// Headers for producer numbers.
const (
	headerProducerID    = "Producer-Id"
	headerProducerEpoch = "Producer-Epoch"
	headerProducerChunk = "Producer-Chunk"
	headerExpectedChunk = "Producer-Expected-Chunk"
)

// maxNumber is the largest integer that is exact in every program that reads JSON, and in Redis's scripts.
const maxNumber = 1<<53 - 1

func parseProducer(h http.Header) (p store.Producer, err error) {
	names := []string{headerProducerID, headerProducerEpoch, headerProducerChunk}
	given := 0
	for _, name := range names {
		switch len(h.Values(name)) {
		case 0:
		case 1:
			given++
		default:
			return p, invalid(name, name+" is given twice")
		}
	}
	if given == 0 {
		return p, nil
	}
	for _, name := range names {
		if h.Get(name) == "" {
			return p, invalid(name, name+" is missing: send "+strings.Join(names, ", ")+" together, or none of them")
		}
	}
	p.ID = h.Get(headerProducerID)
	if len(p.ID) > 128 || strings.ContainsFunc(p.ID, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return p, &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: headerProducerID, Limit: 128,
			Detail: "Producer-Id must have 1 to 128 visible ASCII characters"}
	}
	number := func(name string) int64 {
		n, bad := parseNumber(h.Get(name))
		if (bad != nil || n > maxNumber) && err == nil {
			err = invalid(name, fmt.Sprintf("%s must be a number from 0 to %d", name, int64(maxNumber)))
		}
		return n
	}
	p.Epoch, p.Number = number(headerProducerEpoch), number(headerProducerChunk)
	return p, err
}

// mediaType returns the media type of a request's body. All names for lines of JSON become one. The error is about a
// charset.
func mediaType(r *http.Request) (kind string, err error) {
	kind, parameters, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) {
		return "", nil
	}
	switch kind {
	case "application/ndjson", "application/jsonl", "application/x-jsonl", "application/jsonlines", "application/x-jsonlines", "application/json-lines":
		kind = typeNDJSON
	}
	switch charset := parameters["charset"]; strings.ToLower(charset) {
	case "", "utf-8", "utf8", "us-ascii", "ascii": // ASCII is UTF-8
		return kind, nil
	default:
		return kind, &Problem{Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Member: "Content-Type",
			Detail: fmt.Sprintf("unsupported charset %.40q: send the body in UTF-8, without charset or with charset=utf-8", charset)}
	}
}

// checkJSON refuses a body whose Content-Type is not JSON.
func checkJSON(c echo.Context) error {
	kind, err := mediaType(c.Request())
	if kind == typeJSON {
		return err
	}
	return &Problem{Status: http.StatusUnsupportedMediaType, Code: "unsupported_media_type", Member: "Content-Type", Detail: "Content-Type must be " + typeJSON}
}

func invalid(parameter, detail string) *Problem {
	return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: parameter, Detail: detail}
}

// appendJSON appends an object, or an array of objects: all or none.
func (a *API) appendJSON(c echo.Context, p posting) error {
	caller := a.caller(c)
	body, give, err := a.readLarge(c)
	if err != nil {
		return err
	}
	defer give()
	chunks, err := a.parseBatch(body, p)
	if err != nil {
		return err
	}
	if err := a.limits.Appends.Take(caller, cost(chunks)); err != nil {
		return err
	}
	u := a.newAppend(c.Request().Context(), session(c), caller, p.producer, p.lease)
	if err := u.mayStore(chunks); err != nil {
		return err
	}
	ofMessages := p.fill.MessageID != ""
	for _, chunk := range chunks {
		ofMessages = ofMessages || chunk.MessageID() != ""
	}
	if p.lease > 0 && !ofMessages {
		return invalid("lease", "a lease needs a message: name it with message_id, in the query or in a chunk")
	}
	if p.fill.MessageID != "" && len(chunks) == 0 && !p.ends {
		u.held = []string{p.fill.MessageID}
	}
	inBody := len(chunks)
	about := p.about()
	chunks, own := about.see(chunks, p)
	chunks = append(chunks, about.endings(p)...)
	if len(chunks) == 0 && len(u.held) == 0 && p.producer.ID == "" {
		return a.appendNothing(c)
	}
	if err := u.append(chunks, store.HoldNone); err != nil {
		return blame(err, 0, inBody, own)
	}
	return u.answer(c)
}

// readLarge reads a largeBody whole.
func (a *API) readLarge(c echo.Context) (body []byte, give func(), err error) {
	from, give, err := a.largeBody(c)
	if err != nil {
		return nil, give, err
	}
	if body, err = a.readBody(c, from); err != nil {
		give()
	}
	return body, give, err
}

// largeBody returns a body that may be long. The memory for all long bodies is limited. The caller must call give when
// it no longer needs the body.
func (a *API) largeBody(c echo.Context) (body io.Reader, give func(), err error) {
	give = func() {}
	caller := a.caller(c)
	from, length := a.atMost(c, a.cfg.BodyMax), c.Request().ContentLength
	if length >= 0 && length < shortBody {
		return from, give, nil
	}
	begin, err := io.ReadAll(io.LimitReader(from, shortBody)) // the body may not say how long it is
	if err != nil {
		return nil, give, a.bodyError(err)
	}
	if len(begin) < shortBody {
		return bytes.NewReader(begin), give, nil
	}
	cost := BodyCost * a.cfg.BodyMax // there may be more
	if length >= 0 {
		cost = BodyCost * int(min(length, int64(a.cfg.BodyMax)))
	}
	if err := a.limits.Bodies.Take(caller, cost); err != nil {
		return nil, give, err
	}
	return io.MultiReader(bytes.NewReader(begin), from), func() { a.limits.Bodies.Give(caller, cost) }, nil
}

// BodyCost is how many times its length a large body takes in memory: the body, its chunks, and their copies on the way
// to Redis.
const BodyCost = 3

// shortBody is the maximum length of a body, in bytes, that does not count as large. The limit of connections limits
// these, too.
const shortBody = 64 << 10

// cost returns how much chunks count towards the limit of appends: one for each chunk, and one for each KiB after its
// first.
func cost(chunks []store.Chunk) (n int) {
	for _, c := range chunks {
		n += 1 + (c.Size()-store.Overhead)>>10
	}
	return n
}

func (a *API) parseBatch(body []byte, p posting) ([]store.Chunk, error) {
	fill, most := p.fill, a.cfg.BatchMax
	if p.producer.ID != "" { // a chunk with a number takes Redis twice as long
		most = max(most/2, 1)
	}
	if trimmed := bytes.TrimLeft(body, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '[' {
		chunk, err := store.ParseChunk(body, fill, a.cfg.ChunkMax)
		return []store.Chunk{chunk}, err
	}
	// Only split the array here: the chunk's own parser reports errors inside a chunk, with its index.
	dec := jsontext.NewDecoder(newReader(body), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	broken := func(err error) error {
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "the array is not valid JSON: " + err.Error()}
	}
	if _, err := dec.ReadToken(); err != nil {
		return nil, broken(err)
	}
	var chunks []store.Chunk
	size := 0
	for dec.PeekKind() != ']' {
		value, err := dec.ReadValue()
		if err != nil {
			return nil, broken(err)
		}
		i := len(chunks)
		if i == most {
			return nil, &Problem{Status: http.StatusRequestEntityTooLarge, Code: "batch_too_large", Limit: i,
				Detail: fmt.Sprintf("the array has more than %d chunks (-batch-max): send it in several requests, or as %s", i, typeNDJSON)}
		}
		chunk, err := store.ParseChunk(value, fill, a.cfg.ChunkMax)
		if err != nil {
			bad := problemOf(err)
			bad.Chunk = &i
			return nil, bad
		}
		if size += len(chunk.Members()); size > a.cfg.BatchBytes && i > 0 {
			return nil, &Problem{Status: http.StatusRequestEntityTooLarge, Code: "batch_too_large", Limit: a.cfg.BatchBytes,
				Detail: fmt.Sprintf("the array's chunks have more than %d bytes together (-batch-bytes): send it in several requests, or as %s", a.cfg.BatchBytes, typeNDJSON)}
		}
		chunks = append(chunks, chunk)
	}
	if _, err := dec.ReadToken(); err != nil {
		return nil, broken(err)
	}
	if rest := bytes.TrimSpace(body[dec.InputOffset():]); len(rest) > 0 {
		return nil, &Problem{Status: http.StatusBadRequest, Code: "invalid_json", Detail: "unexpected text after the array"}
	}
	return chunks, nil
}

// newReader returns a reader of b that jsontext uses without a copy.
func newReader(b []byte) *bytes.Buffer { return bytes.NewBuffer(b) }

// answer responds with what was stored: 200 if all of it was there before, otherwise 201.
func (u *upload) answer(c echo.Context) error {
	status := http.StatusCreated
	if u.stored.Count > 0 && !u.added {
		status = http.StatusOK
	}
	r := c.Response()
	r.Header()["Content-Type"] = jsonType
	r.WriteHeader(status)
	_, err := r.Write(u.stored.append(make([]byte, 0, 256)))
	return err
}

var jsonType = []string{"application/json"}

// appendStream appends chunks as they arrive, for as long as the connection lasts. Chunks that arrived whole before an
// error are stored. The response to an error comes at once, although the body may continue.
func (a *API) appendStream(c echo.Context, p posting) error {
	r, caller := c.Request(), a.caller(c)
	if err := a.limits.Uploads.Take(caller, 1); err != nil {
		return err
	}
	defer a.limits.Uploads.Give(caller, 1)
	uncount(c)
	c.Response().Header().Set("Incremental", "?1") // the response may come before the body has ended
	ctl := http.NewResponseController(c.Response().Writer)
	if b, ok := r.Body.(*incoming); ok {
		b.takeItsTime(ctl)
	}
	u := a.newUpload(c.Request().Context(), session(c), caller, p.producer, p.lease, a.cfg.UploadPatience)
	defer u.end()
	defer u.until(a.grant(c))()
	if b, ok := r.Body.(*incoming); ok && b.plain != nil {
		b.plain.slow = u.slow
	}
	if p.kind != typeNDJSON {
		u.stored.MessageID = p.fill.MessageID
	}
	wake := &interruption{ctl: ctl}
	defer context.AfterFunc(u.ctx, wake.now)()

	err := u.copy(a.source(p, r.Body), p, r.ContentLength, func() { wake.over() })
	if wake.over() && r.ProtoMajor == 1 {
		c.Response().Header().Set("Connection", "close")
	}
	if err == nil {
		if u.stored.Epoch == "" { // nothing arrived, and Redis was not asked
			return a.appendNothing(c)
		}
		return u.answer(c)
	}
	if !store.Away(err) {
		u.leave(store.HoldLeft)
	}
	problem := *problemOf(err)
	problem.cause = err
	if u.stored.Count > 0 {
		problem.Stored = &u.stored
	}
	return &problem
}

func (a *API) source(p posting, from io.Reader) source {
	b, limit := body{from: from, most: a.cfg.ChunkMax + 1024}, a.cfg.ChunkMax
	switch p.kind {
	case typeText:
		return &text{body: b, fill: p.fill, limit: limit}
	case typeEvents:
		return &events{body: b, fill: p.fill, limit: limit, some: p.producer.Number > 0}
	}
	return &lines{body: b, fill: p.fill, limit: limit}
}

// copy appends the chunks of a source until it ends, and then the endings of the request. It calls arrived when the
// whole body has arrived.
func (u *upload) copy(src source, p posting, length int64, arrived func()) error {
	const soon = 64 << 10 // a body sent in one piece does not take long
	if length < 0 || length > soon {
		if p.kind != typeNDJSON || p.lease > 0 && p.fill.MessageID != "" {
			u.held = []string{p.fill.MessageID} // it begins now, though its first chunk may take long
		}
		if len(u.held) > 0 || p.producer.ID != "" {
			u.begin()
			if err := u.append(nil, store.HoldLook); err != nil {
				return err
			}
		}
	}
	number := 0 // the index of the next chunk in the body; the sender of a text does not know any
	blamed := func(err error, now, own int) error {
		if refused, ok := errors.AsType[*store.RefusedError](err); ok && p.kind == typeText {
			return refused.Err
		}
		if p.kind == typeText {
			return err
		}
		return blame(err, number, now, own)
	}
	about := p.about()
	for {
		chunks, err := src.next()
		hold := store.HoldOpen
		body := len(chunks)
		chunks, own := about.see(chunks, p)
		if err == io.EOF {
			arrived()
			hold = store.HoldClosed
			chunks = append(chunks, about.endings(p)...)
		}
		if len(chunks) > 0 {
			u.slow(cost(chunks))
		}
		if len(chunks) > 0 || hold == store.HoldClosed && len(u.held) > 0 {
			if failed := u.appendAll(chunks, hold); failed != nil {
				return blamed(failed, body, own)
			}
			number += body
		}
		cause := context.Cause(u.ctx)
		switch {
		case err == io.EOF:
			return nil
		case cause != nil:
			return cause
		case errors.Is(err, errBroken):
			u.leave(store.HoldBroken)
			if torn, ok := errors.AsType[*Problem](err); ok {
				return torn
			}
			detail := "the body ended early"
			if errors.Is(err, errGzip) {
				detail = errGzip.Error()
			}
			return &Problem{Status: http.StatusBadRequest, Code: "body_broken", Detail: detail, cause: err}
		case err != nil:
			return blamed(err, 0, -1)
		}
		u.begin()
	}
}

// slow makes an upload wait if it exceeds its rate. Meanwhile its body is not read, so its sender waits, too.
func (u *upload) slow(cost int) {
	if pause := u.api.limits.Appends.Owe(u.caller, cost); pause > 0 {
		select {
		case <-time.After(pause):
		case <-u.ctx.Done():
		}
	}
}

// appendAll appends chunks that arrived together as if each had come alone: it stores those before a refused one.
func (u *upload) appendAll(chunks []store.Chunk, hold store.Hold) error {
	if err := u.mayStore(chunks); err != nil {
		return err
	}
	err := u.append(chunks, hold)
	if refused, ok := errors.AsType[*store.RefusedError](err); ok && refused.Index > 0 {
		if first := u.append(chunks[:refused.Index], store.HoldOpen); first != nil {
			return first
		}
	}
	return err
}

// blame adds to an error the index of the chunk that caused it, if a chunk of the body did. before is the number of
// earlier chunks of the body, and now is how many of the appended chunks belong to the body. The others are endings, and
// own is the index of one that comes before a chunk of the body, or -1.
func blame(err error, before, now, own int) error {
	refused, late := errors.AsType[*store.RefusedError](err)
	_, bad := errors.AsType[*store.ChunkError](err)
	at := before
	switch {
	case late && (own < 0 || refused.Index < own) && refused.Index < now:
		at += refused.Index
	case late && own >= 0 && refused.Index > own && refused.Index <= now:
		at += refused.Index - 1
	case late:
		return refused.Err // the server added that chunk after the body
	case !bad:
		return err
	}
	p := *problemOf(err)
	p.Chunk = &at
	return &p
}

// appendNothing responds to a body without chunks.
func (a *API) appendNothing(c echo.Context) error {
	b, err := a.logs.Describe(c.Request().Context(), session(c))
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return c.JSON(http.StatusCreated, Stored{Epoch: b.Epoch, First: b.Last + 1, Last: b.Last})
}

// readChunks responds with a page of the log: the unchanged elements, and the number of the first, because elements of
// other programs do not contain theirs.
func (a *API) readChunks(c echo.Context) error {
	const bytesMost = 4 << 20
	page, err := parsePaging(c)
	if err != nil {
		return err
	}
	if done, err := a.unchanged(c, page.tag); done || err != nil {
		return err
	}
	// The page is written while it is read: only a part of it is in memory, waiting for its client.
	if err := out(c).take(a.caller(c), partCost); err != nil {
		return err
	}
	ctx, id := onBehalf(c.Request().Context(), a.caller(c)), session(c)
	p, err := a.logs.Read(ctx, id, page.after+1, pagePart, page.limit)
	if err != nil {
		return err
	}
	if !p.Exists() {
		return store.ErrNotFound
	}
	tagged := p.Ended
	if tagged {
		c.Response().Header().Set("ETag", page.tag(p.Bounds))
	}
	r := c.Response()
	r.Header().Set("Content-Type", typeJSON)
	r.WriteHeader(http.StatusOK)
	b := fmt.Appendf(make([]byte, 0, 2*piece), `{"epoch":%q,"first_seq":%d,"last_seq":%d,"ended":%t,"from_seq":%d,"chunks":[`, p.Epoch, p.First, p.Last, p.Ended, p.From)
	first, epoch, last := p.From, p.Epoch, p.Last
	for size, full := 0, false; ; {
		for i, element := range p.Elements {
			seq := p.From + int64(i)
			size += len(element)
			if full = seq > last || size > bytesMost && seq > first; full { // chunks after last were appended while the page was written
				break
			}
			if seq > first {
				b = append(b, ',')
			}
			b, _ = store.AppendElement(b, seq, element)
			if len(b) >= piece {
				if _, err := r.Write(b); err != nil {
					return nil // the client has gone
				}
				b = b[:0]
			}
		}
		next, more := p.Next(), page.limit-int(p.Next()-first)
		if full || more <= 0 || next > last || size >= bytesMost {
			break
		}
		// If the next part does not continue this one, the page ends, like a full one, and the next page reports what
		// happened. Only a page with a tag must be complete.
		p, err = a.logs.Read(ctx, id, next, min(pagePart, bytesMost-size), more)
		if err != nil || p.Epoch != epoch || p.From != next || len(p.Elements) == 0 {
			if tagged {
				panic(http.ErrAbortHandler)
			}
			break
		}
	}
	_, _ = r.Write(append(b, "]}"...)) // a client that has gone is no error
	return nil
}

const (
	// pagePart is how much of a page is read at once: so many bytes, but at least one chunk.
	pagePart = 128 << 10
	// partCost is its size in memory: the reply of Redis, the parsed part, and the bytes to write.
	partCost = 3 * pagePart
)
