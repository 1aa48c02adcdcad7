package store

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Chunk is a chunk that has no number yet: a JSON object, checked, as members that
// the append script puts behind the number and the time.
type Chunk struct {
	members   string // `"type":"delta","content":"…"}`: without the opening brace, on one line
	filled    int    // how many bytes of members, from the first, were not posted
	messageID string
	kind      string // what it does: nothing, or message, done, failed, cancelled, end
	text      string // a piece of a text body, which takes a producer's number a byte; else empty
	fill      Fill   // of text
}

// The types of chunks that have a meaning for the server.
const (
	TypeDelta     = "delta"
	TypeMessage   = "message"
	TypeDone      = "done"
	TypeFailed    = "failed"
	TypeCancelled = "cancelled"
	TypeEnd       = "end"
	TypeReasoning = "reasoning" // what a model thinks aloud: as delta, but none of what it says
)

// MaxMessageID is the longest message id, in bytes. The server remembers the ids of
// messages that have ended.
const MaxMessageID = 256

// MaxDepth is how deep a chunk's arrays and objects may be in one another. Ruby's reader of JSON
// stops at 100, others at 512 or a thousand: a viewer has to be able to read what it is sent.
const MaxDepth = 100

// Overhead is what a chunk's event has beyond its members, each part at its longest:
// "data: ", the opening brace, number, time, the line of its id, and the heartbeats of an
// hour before it, which are of the same block. Two common clients give up at a block, not
// a line, of 64 KiB.
const Overhead = len("data: "+`{"seq":9007199254740991,"ts":1795424741692,`+"\nid: 9007199254740991\n\n") + 240*len(":\n")

// ChunkError says what is wrong with a chunk as posted.
type ChunkError struct {
	Code   string // invalid_json, invalid_utf8, duplicate_member, reserved_member, invalid_chunk, chunk_too_deep, chunk_too_large
	Member string // as a JSON pointer, where there is one
	Detail string
	Limit  int // in bytes, where a limit was passed
}

func (e *ChunkError) Error() string { return e.Detail }

// Fill is what a chunk says when it does not say it itself. Empty fills nothing.
type Fill struct{ MessageID, Role string }

// ParseChunk checks one chunk as posted. limit bounds its event in a stream, in bytes.
//
// Names are compared as RFC 8259 compares them: exactly, after unescaping. A name that
// stands twice, text that is not UTF-8 and text after the object are errors, since
// readers differ in what they make of them. The bytes of all values are kept.
func ParseChunk(text []byte, fill Fill, limit int) (Chunk, error) {
	var c Chunk
	if !utf8.Valid(text) {
		return c, &ChunkError{Code: "invalid_utf8", Detail: "the chunk is not valid UTF-8"}
	}
	text = bytes.TrimSpace(text)
	if deep(text) {
		return c, &ChunkError{Code: "chunk_too_deep", Limit: MaxDepth, Detail: fmt.Sprintf("the chunk is nested deeper than %d arrays and objects", MaxDepth)}
	}
	if len(text) > limit { // the names of a large object are not kept for nothing
		line := jsontext.Value(bytes.Clone(text))
		if err := line.Compact(); err != nil {
			return c, syntaxError(err)
		}
		if text = line; len(text) > limit {
			return c, tooLarge(len(text), limit)
		}
	}
	reader := readers.Get().(*reader)
	defer func() {
		reader.of(nil) // nobody keeps what was read
		readers.Put(reader)
	}()
	dec := reader.of(text)
	if dec.PeekKind() != '{' {
		if _, err := dec.ReadValue(); err != nil {
			return c, syntaxError(err)
		}
		return c, &ChunkError{Code: "invalid_chunk", Detail: "a chunk must be a JSON object"}
	}
	if _, err := dec.ReadToken(); err != nil {
		return c, syntaxError(err)
	}
	typ, members := "", 0
	hasType, hasMessage, hasRole, complete, says := false, false, false, false, false
	var unknown []string // the first of those that have no meaning here
	for dec.PeekKind() != '}' {
		name, err := dec.ReadToken()
		if err != nil {
			return c, syntaxError(err)
		}
		member := name.String()
		value, err := dec.ReadValue()
		if err != nil {
			return c, syntaxError(err)
		}
		members++
		if number := unreadable(value); number != "" {
			return c, &ChunkError{Code: "invalid_chunk", Member: "/" + member, Detail: fmt.Sprintf("member %q contains a number that many JSON readers cannot represent, %s: send it as a string", member, number)}
		}
		switch member {
		case "seq", "ts":
			return c, &ChunkError{Code: "reserved_member", Member: "/" + member, Detail: fmt.Sprintf("member %q is set by the server: leave it out", member)}
		case "type", "message_id", "role", "content", "event", "raw":
			if value.Kind() != '"' {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/" + member, Detail: fmt.Sprintf("member %q must be a string", member)}
			}
		}
		switch member {
		case "event":
			if strings.ContainsAny(unquote(value), "\r\n") {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/event", Detail: `member "event" is the name of an event: it is one line`}
			}
		case "raw":
			if strings.Contains(unquote(value), "\r") {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/raw", Detail: `member "raw" is the data of an event: its lines end with LF, without CR`}
			}
		case "is_complete":
			complete = value.Kind() == 't'
		case "type":
			if typ, hasType = unquote(value), true; typ == "" {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/type", Detail: `member "type" is empty: leave it out for "delta"`}
			}
		case "message_id":
			c.messageID, hasMessage = unquote(value), true
			if len(c.messageID) > MaxMessageID {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/message_id", Limit: MaxMessageID,
					Detail: fmt.Sprintf("member \"message_id\" has %d bytes: the limit is %d", len(c.messageID), MaxMessageID)}
			}
		case "role":
			hasRole = true
		default:
			if !saying[member] && len(unknown) < 8 {
				unknown = append(unknown, member)
			}
		}
		says = says || saying[member]
	}
	if _, err := dec.ReadToken(); err != nil {
		return c, syntaxError(err)
	}
	if rest := text[dec.InputOffset():]; len(bytes.TrimSpace(rest)) > 0 {
		return c, &ChunkError{Code: "invalid_json", Detail: fmt.Sprintf("unexpected text after the object, at byte %d", dec.InputOffset())}
	}
	if bytes.ContainsAny(text, "\n\r") { // a chunk is one line
		line := jsontext.Value(bytes.Clone(text))
		if err := line.Compact(); err != nil {
			return c, syntaxError(err)
		}
		text = line
	}

	var missing Fill
	if !hasMessage {
		missing.MessageID = fill.MessageID
	}
	if !hasRole {
		missing.Role = fill.Role
	}
	// One that only names its message, or whose it is, says that much.
	if about := hasMessage || hasRole || missing != (Fill{}); !says && (len(unknown) > 0 || !about) {
		switch typ {
		case "":
			return c, nothingSaid(TypeDelta, unknown)
		case TypeDelta, TypeReasoning, TypeMessage:
			return c, nothingSaid(typ, unknown)
		}
	}
	posted := text[1:]
	if members == 0 {
		posted = []byte("}")
	}
	message := c.messageID
	c = assemble(missing, !hasType, posted)
	if hasMessage {
		c.messageID = message
	}
	if c.kind = kindOf(typ); complete && (c.kind == "" || c.kind == TypeMessage) {
		c.kind = TypeDone
	}
	return c, c.check(limit)
}

// deep says whether JSON is deeper than MaxDepth. Of what is none, another reader says so.
func deep(text []byte) bool {
	if bytes.Count(text, []byte{'{'})+bytes.Count(text, []byte{'['}) <= MaxDepth { // nearly always
		return false
	}
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch b := text[i]; {
		case quoted && b == '\\':
			i++
		case b == '"':
			quoted = !quoted
		case quoted:
		case b == '{' || b == '[':
			if depth++; depth > MaxDepth {
				return true
			}
		case b == '}' || b == ']':
			depth--
		}
	}
	return false
}

// check refuses a chunk whose event is too large.
func (c Chunk) check(limit int) error {
	if got := c.Size(); got > limit {
		return tooLarge(got, limit)
	}
	return nil
}

func tooLarge(got, limit int) error {
	return &ChunkError{Code: "chunk_too_large", Limit: limit,
		Detail: fmt.Sprintf("the chunk becomes an event of up to %d bytes: the limit is %d (-chunk-max)", got, limit)}
}

// mostDigits is how long a number may be as it is written: a double has fewer, and Python stops at 4,300.
const mostDigits = 1000

// unreadable is the first number in JSON, shortened, that common readers cannot read, or take for infinite or nothing: those that are no double. Empty:
// there is none.
func unreadable(value []byte) string {
	for i, quoted := 0, false; i < len(value); i++ {
		switch b := value[i]; {
		case quoted && b == '\\':
			i++
		case b == '"':
			quoted = !quoted
		case quoted || b != '-' && (b < '0' || b > '9'):
		default:
			n := i + 1
			for n < len(value) && strings.IndexByte("0123456789+-.eE", value[n]) >= 0 {
				n++
			}
			text := string(value[i:n])
			if len(text) > mostDigits || (len(text) > 15 || strings.ContainsAny(text, "eE")) && !double(text) {
				return text[:min(len(text), 20)]
			}
			i = n - 1
		}
	}
	return ""
}

// double says whether a number is one that is neither infinite nor, unless it says so, zero.
func double(text string) bool {
	f, err := strconv.ParseFloat(text, 64)
	digits, _, _ := strings.Cut(strings.ToLower(text), "e")
	return err == nil && (f != 0 || strings.Trim(digits, "-0.") == "")
}

// assemble puts what is filled in before what was posted.
func assemble[text string | []byte](fill Fill, asDelta bool, posted text) Chunk {
	filled := ""
	if asDelta {
		filled = `"type":"` + TypeDelta + `",`
	}
	if fill.MessageID != "" {
		filled += `"message_id":` + quote(fill.MessageID) + `,`
	}
	if fill.Role != "" {
		filled += `"role":` + quote(fill.Role) + `,`
	}
	if string(posted) == "}" {
		filled = strings.TrimSuffix(filled, ",")
	}
	return Chunk{members: filled + string(posted), filled: len(filled), messageID: fill.MessageID}
}

// reader reads one text of JSON, and then another.
type reader struct {
	dec  jsontext.Decoder
	text bytes.Buffer // what the decoder reads without a copy
}

var readers = sync.Pool{New: func() any { return new(reader) }}

func (r *reader) of(text []byte) *jsontext.Decoder {
	r.text = *bytes.NewBuffer(text)
	r.dec.Reset(&r.text)
	return &r.dec
}

// posted is what the producer sent of the chunk: its members without those that were filled in.
func (c Chunk) posted() string { return c.members[c.filled:] }

// Numbers is how many of a producer's numbers the chunk takes.
func (c Chunk) Numbers() int64 {
	if c.text != "" {
		return int64(len(c.text))
	}
	return 1
}

// Opens says whether the chunk leaves its message unfinished.
func (c Chunk) Opens() bool { return c.kind == "" }

// Ends says whether it ends its message.
func (c Chunk) Ends() bool {
	return c.kind == TypeDone || c.kind == TypeFailed || c.kind == TypeCancelled
}

// EndsLog says whether it ends the log.
func (c Chunk) EndsLog() bool { return c.kind == TypeEnd }

// MessageID is the message that the chunk belongs to; empty: none.
func (c Chunk) MessageID() string { return c.messageID }

// NewChunk makes a chunk of the server's own. Empty members are left out.
func NewChunk(typ, messageID, role, content string) Chunk {
	var b strings.Builder
	b.WriteString(`"type":` + quote(typ))
	for _, m := range [][2]string{{"message_id", messageID}, {"role", role}, {"content", content}} {
		if m[1] != "" {
			b.WriteString(`,"` + m[0] + `":` + quote(m[1]))
		}
	}
	b.WriteByte('}')
	return Chunk{members: b.String(), messageID: messageID, kind: kindOf(typ)}
}

// NewFailed makes the chunk that ends a message whose producer failed.
func NewFailed(messageID, role, reason string) Chunk {
	return NewChunk(TypeFailed, messageID, role, "").With("reason", reason)
}

// With is a chunk of the server's own with one more member, which is text.
func (c Chunk) With(name, text string) Chunk { return c.with(name, quote(text)) }

// WithJSON is With, of a member that is JSON, of which the same is asked as of a chunk that is posted.
func (c Chunk) WithJSON(name string, value []byte) (Chunk, error) {
	line := jsontext.Value(bytes.Clone(value))
	if deep(append([]byte{'{'}, line...)) || !line.IsValid() {
		return c, &ChunkError{Code: "invalid_json", Detail: fmt.Sprintf("member %q is not valid JSON for a chunk", name)}
	}
	if number := unreadable(line); number != "" {
		return c, &ChunkError{Code: "invalid_chunk", Member: "/" + name, Detail: fmt.Sprintf("member %q contains a number that many JSON readers cannot represent, %s", name, number)}
	}
	_ = line.Compact() // a chunk is one line
	return c.with(name, string(line)), nil
}

func (c Chunk) with(name, value string) Chunk {
	c.members = strings.TrimSuffix(c.members, "}") + "," + quote(name) + ":" + value + "}"
	return c
}

// NewEnding makes the chunk that a producer leaves to the server: done or end.
func NewEnding(typ string, fill Fill) Chunk {
	c := assemble(fill, false, `"type":`+quote(typ)+`}`)
	c.kind = kindOf(typ)
	return c
}

// NewEvent makes a chunk of an event that an event stream brought: its name, if it has
// one, and its data, to the byte.
func NewEvent(name, data string, fill Fill, limit int) (Chunk, error) {
	posted := `"raw":` + quote(data) + `}`
	if name != "" {
		posted = `"event":` + quote(name) + `,` + posted
	}
	c := assemble(fill, true, posted)
	return c, c.check(limit)
}

// NewTexts makes chunks of a piece of text, which is whole characters: one, or more
// where the limit demands it. A producer's numbers count its bytes.
func NewTexts(text string, fill Fill, limit int) ([]Chunk, error) {
	if c := newText(text, fill); c.Size() <= limit {
		return []Chunk{c}, nil
	} else if len(text) <= utf8.UTFMax {
		return nil, c.check(limit)
	}
	half := len(text) / 2
	for half > 0 && !utf8.RuneStart(text[half]) {
		half--
	}
	if half == 0 {
		_, half = utf8.DecodeRuneInString(text)
	}
	first, err := NewTexts(text[:half], fill, limit)
	if err != nil {
		return nil, err
	}
	second, err := NewTexts(text[half:], fill, limit)
	return append(first, second...), err
}

func newText(text string, fill Fill) Chunk {
	c := assemble(fill, true, `"content":`+quote(text)+`}`)
	c.text, c.fill = text, fill
	return c
}

// kindOf is what a chunk of a type does: the types that are not named here are pieces of
// a message, and leave it open.
func kindOf(typ string) string {
	switch typ {
	case TypeMessage, TypeDone, TypeFailed, TypeCancelled, TypeEnd:
		return typ
	}
	return ""
}

func quote(s string) string {
	b, err := jsontext.AppendQuote(nil, s)
	if err != nil { // not UTF-8: the replacement character stands for what is not text
		b, _ = jsontext.AppendQuote(nil, strings.ToValidUTF8(s, "\uFFFD"))
	}
	return string(b)
}

// Text is what a member says that is a string; else nothing.
func Text(v jsontext.Value) string {
	if v.Kind() != '"' {
		return ""
	}
	return unquote(v)
}

func unquote(v jsontext.Value) string {
	b, _ := jsontext.AppendUnquote(nil, v) // the decoder has read it: it is a string
	return string(b)
}

func syntaxError(err error) *ChunkError {
	e := &ChunkError{Code: "invalid_json", Detail: "the chunk is not valid JSON: " + strings.TrimPrefix(err.Error(), "jsontext: ")}
	if s, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		e.Member = string(s.JSONPointer)
	}
	if errors.Is(err, jsontext.ErrDuplicateName) {
		e.Code = "duplicate_member"
		e.Detail = fmt.Sprintf("duplicate member %q", strings.TrimPrefix(e.Member, "/"))
	}
	return e
}

// AppendElement appends what viewers and pages are given of list element number seq:
// the element itself when it is one line of JSON object in valid UTF-8, and else an
// object that carries its text. Whatever is in the list is a chunk. ends is what it says that it ends.
//
// One that the append script wrote says its number, which is another one when it was written in an earlier epoch, or
// was copied from another log: then seq takes its place.
func AppendElement(b []byte, seq int64, element string) (chunk []byte, ends Ending) {
	start := len(b)
	if n, ours := Number(element); ours && n != seq {
		b = strconv.AppendInt(append(b, head...), seq, 10)
		b = append(b, element[strings.IndexByte(element, ','):]...)
	} else {
		b = append(b, element...)
	}
	e := b[start:]
	if ends, ok := flat(e); ok {
		return b, ends
	}
	if len(e) > 0 && e[0] == '{' && bytes.IndexByte(e, '\n') < 0 && bytes.IndexByte(e, '\r') < 0 &&
		utf8.Valid(e) && jsontext.Value(e).IsValid(jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) {
		return b, Ends(e)
	}
	b = append(b[:start], `{"seq":`...)
	b = strconv.AppendInt(b, seq, 10)
	b = append(b, `,"type":"foreign","content":`...)
	return append(append(b, quote(element)...), '}'), 0
}

// Ending is what a chunk says that it ends.
type Ending uint8

// A chunk may be both, and what it says of its message is so. But that it ends the log is only so where the log has ended
// (Bounds.Ended), which the API does: anybody may push what looks like that chunk, or copy it from another log.
const (
	EndsMessage Ending = 1 << iota
	EndsLog
)

// endingOf is what a chunk of a type says that it ends.
func endingOf(typ string) Ending {
	switch typ {
	case TypeDone, TypeFailed, TypeCancelled:
		return EndsMessage
	case TypeEnd:
		return EndsLog
	}
	return 0
}

// head is what a chunk begins with that the append script wrote.
const head = `{"seq":`

// Number tells a chunk that the append script wrote by its first bytes, and its number.
func Number(element string) (seq int64, ours bool) {
	rest, ok := strings.CutPrefix(element, head)
	if !ok {
		return 0, false
	}
	digits, rest, ok := strings.Cut(rest, ",")
	if !ok || !strings.HasPrefix(rest, `"ts":`) || len(digits) > 16 || digits == "" || digits[0] < '1' || digits[0] > '9' {
		return 0, false
	}
	for _, d := range []byte(digits) {
		if d < '0' || d > '9' {
			return 0, false
		}
		seq = seq*10 + int64(d-'0')
	}
	return seq, true
}

// Ends is what a chunk, as AppendElement wrote it, says that it ends.
func Ends(chunk []byte) (ends Ending) {
	if ends, ok := flat(chunk); ok {
		return ends
	}
	EachMember(chunk, func(name string, value jsontext.Value) {
		if name == "is_complete" && value.Kind() == 't' {
			ends |= EndsMessage
		}
		if name == "type" && value.Kind() == '"' {
			ends |= endingOf(unquote(value))
		}
	})
	return ends
}

// Raw is the event that a chunk, as AppendElement wrote it, was ingested from. ok is
// false for chunks of other kinds.
func Raw(chunk []byte) (name, data string, ok bool) {
	if !bytes.Contains(chunk, []byte(`"raw"`)) && !bytes.Contains(chunk, []byte(`\u`)) {
		return "", "", false
	}
	oneLine := true
	EachMember(chunk, func(member string, value jsontext.Value) {
		switch {
		case member == "raw":
			if ok = value.Kind() == '"'; ok {
				data = unquote(value)
			}
		case member == "event" && value.Kind() == '"':
			name = unquote(value)
			oneLine = !strings.ContainsAny(name, "\r\n")
		}
	})
	if ok = ok && oneLine && !strings.Contains(data, "\r"); !ok { // what other hands pushed may be no event
		return "", "", false
	}
	return name, data, true
}

// EachMember calls f for the members of a chunk or of an element, as far as it is a JSON object.
func EachMember(object []byte, f func(name string, value jsontext.Value)) {
	dec := jsontext.NewDecoder(bytes.NewBuffer(object), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	if _, err := dec.ReadToken(); err != nil {
		return
	}
	for dec.PeekKind() == '"' {
		name, err := dec.ReadToken()
		if err != nil {
			return
		}
		member := name.String()
		value, err := dec.ReadValue()
		if err != nil {
			return
		}
		f(member, value)
	}
}

// Size is the most bytes that the chunk's event in a stream has.
func (c Chunk) Size() int { return len(c.members) + Overhead }

// Members is the chunk's members as the append script gets them: a number and a time,
// an opening brace before them, make an element.
func (c Chunk) Members() string { return c.members }
