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

// Chunk is a checked chunk that has no number yet: a JSON object, as the members that the append script puts after the
// number and the time.
type Chunk struct {
	members   string // `"type":"delta","content":"…"}`: without the opening brace, on one line
	filled    int    // how many bytes of members, from the first, the server added
	messageID string
	kind      string // what it does: empty, or message, done, failed, cancelled, end
	text      string // a piece of a text body, which uses one producer number per byte; else empty
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
	TypeReasoning = "reasoning" // a model's reasoning: like delta, but not part of its answer
)

// MaxMessageID is the maximum length of a message id, in bytes. The server remembers the ids of messages that have
// ended.
const MaxMessageID = 256

// MaxDepth is the maximum nesting depth of a chunk's arrays and objects. Ruby's JSON parser stops at 100, others at 512
// or 1000. Every viewer must be able to read the chunk.
const MaxDepth = 100

// Overhead is the maximum size of a chunk's event without its members: "data: ", the opening brace, number, time, and
// the line of its id. It includes one hour of heartbeats before the event, which belong to the same block. Two common
// clients fail at a block, not a line, of 64 KiB.
const Overhead = len("data: "+`{"seq":9007199254740991,"ts":1795424741692,`+"\nid: 9007199254740991\n\n") + 240*len(":\n")

// ChunkError describes what is wrong with a chunk as posted.
type ChunkError struct {
	Code   string // invalid_json, invalid_utf8, duplicate_member, reserved_member, invalid_chunk, chunk_too_deep, chunk_too_large
	Member string // a JSON pointer; empty if no member is to blame
	Detail string
	Limit  int // the exceeded limit in bytes, if any
}

func (e *ChunkError) Error() string { return e.Detail }

// Fill contains the members that a chunk gets if it does not set them itself. Empty members fill nothing.
type Fill struct{ MessageID, Role string }

// ParseChunk checks one chunk as posted. limit is the maximum size of its event in a stream, in bytes.
//
// It compares names as RFC 8259 does: exactly, after unescaping. Duplicate names, invalid UTF-8 and text after the
// object are errors, because readers treat them differently. ParseChunk preserves the bytes of all values.
func ParseChunk(text []byte, fill Fill, limit int) (Chunk, error) {
	var c Chunk
	if !utf8.Valid(text) {
		return c, &ChunkError{Code: "invalid_utf8", Detail: "the chunk is not valid UTF-8"}
	}
	text = bytes.TrimSpace(text)
	if deep(text) {
		return c, &ChunkError{Code: "chunk_too_deep", Limit: MaxDepth, Detail: fmt.Sprintf("the chunk is nested deeper than %d arrays and objects", MaxDepth)}
	}
	if len(text) > limit { // check first, so that the names of a large object are not kept for nothing
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
		reader.of(nil) // drop the reference to text
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
	var unknown []string // the first names that have no meaning here
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
	// A chunk that only names its message or its role says that much.
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

// deep reports whether JSON is nested deeper than MaxDepth. Invalid JSON is left to another reader.
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

// mostDigits is the maximum length of a written number. A double has fewer digits, and Python stops at 4,300.
const mostDigits = 1000

// unreadable returns the first number in value, shortened, that common readers cannot read or would take for infinity
// or zero, because it is no double. It returns an empty string if none exists.
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

// double reports whether a number is a finite double, and zero only if it is written as zero.
func double(text string) bool {
	f, err := strconv.ParseFloat(text, 64)
	digits, _, _ := strings.Cut(strings.ToLower(text), "e")
	return err == nil && (f != 0 || strings.Trim(digits, "-0.") == "")
}

// assemble puts the filled members before the posted ones.
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

// reader reads one JSON text after another.
type reader struct {
	dec  jsontext.Decoder
	text bytes.Buffer // the text, which the decoder reads without a copy
}

var readers = sync.Pool{New: func() any { return new(reader) }}

func (r *reader) of(text []byte) *jsontext.Decoder {
	r.text = *bytes.NewBuffer(text)
	r.dec.Reset(&r.text)
	return &r.dec
}

// posted returns the part of the chunk that the producer sent: its members without the filled ones.
func (c Chunk) posted() string { return c.members[c.filled:] }

// Numbers returns how many of a producer's numbers the chunk uses.
func (c Chunk) Numbers() int64 {
	if c.text != "" {
		return int64(len(c.text))
	}
	return 1
}

// Opens reports whether the chunk leaves its message unfinished.
func (c Chunk) Opens() bool { return c.kind == "" }

// Ends reports whether the chunk ends its message.
func (c Chunk) Ends() bool {
	return c.kind == TypeDone || c.kind == TypeFailed || c.kind == TypeCancelled
}

// EndsLog reports whether the chunk ends the log.
func (c Chunk) EndsLog() bool { return c.kind == TypeEnd }

// MessageID returns the id of the chunk's message, or an empty string if it belongs to none.
func (c Chunk) MessageID() string { return c.messageID }

// NewChunk returns a chunk made by the server. It omits empty members.
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

// NewFailed returns the chunk that ends a message whose producer failed.
func NewFailed(messageID, role, reason string) Chunk {
	return NewChunk(TypeFailed, messageID, role, "").With("reason", reason)
}

// With returns a chunk made by the server with one more member, which is text.
func (c Chunk) With(name, text string) Chunk { return c.with(name, quote(text)) }

// WithJSON is With for a JSON member, which must satisfy the rules for posted chunks.
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

// NewEnding returns the chunk that a producer leaves to the server: done or end.
func NewEnding(typ string, fill Fill) Chunk {
	c := assemble(fill, false, `"type":`+quote(typ)+`}`)
	c.kind = kindOf(typ)
	return c
}

// NewEvent returns a chunk for an event of an event stream: its name, if it has one, and its data, byte for byte.
func NewEvent(name, data string, fill Fill, limit int) (Chunk, error) {
	posted := `"raw":` + quote(data) + `}`
	if name != "" {
		posted = `"event":` + quote(name) + `,` + posted
	}
	c := assemble(fill, true, posted)
	return c, c.check(limit)
}

// NewTexts returns the chunks for a piece of text, which must be whole characters. It returns one chunk, or more if the
// limit demands it. A producer's numbers count the bytes of the text.
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

// kindOf returns what a chunk of a type does. Types that are not named here are pieces of a message, and leave it open.
func kindOf(typ string) string {
	switch typ {
	case TypeMessage, TypeDone, TypeFailed, TypeCancelled, TypeEnd:
		return typ
	}
	return ""
}

func quote(s string) string {
	b, err := jsontext.AppendQuote(nil, s)
	if err != nil { // not UTF-8: use the replacement character
		b, _ = jsontext.AppendQuote(nil, strings.ToValidUTF8(s, "\uFFFD"))
	}
	return string(b)
}

// Text returns the value of a string, or an empty string for other values.
func Text(v jsontext.Value) string {
	if v.Kind() != '"' {
		return ""
	}
	return unquote(v)
}

func unquote(v jsontext.Value) string {
	b, _ := jsontext.AppendUnquote(nil, v) // the decoder has read it, so it is a string
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

// AppendElement appends list element number seq as viewers and pages receive it. A JSON object on one line in valid
// UTF-8 is appended as it is. For any other element, it appends an object that contains its text. So every element
// becomes a chunk. ends is what the chunk claims to end.
//
// An element that the append script wrote contains its number. If that differs because the element was written in an
// earlier epoch, or was copied from another log, seq replaces it.
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

// Ending is what a chunk claims to end.
type Ending uint8

// A chunk may be both. Its claim about its message is true. Its claim about the log is true only if the log has ended
// (Bounds.Ended), and the API checks that: any program may push such a chunk, or copy it from another log.
const (
	EndsMessage Ending = 1 << iota
	EndsLog
)

// endingOf returns what a chunk of a type claims to end.
func endingOf(typ string) Ending {
	switch typ {
	case TypeDone, TypeFailed, TypeCancelled:
		return EndsMessage
	case TypeEnd:
		return EndsLog
	}
	return 0
}

// head is the beginning of every chunk that the append script wrote.
const head = `{"seq":`

// Number reports whether the append script wrote a chunk, and returns the chunk's number. It reads only the first
// bytes.
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

// Ends returns what a chunk claims to end. The chunk must be written by AppendElement.
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

// Raw returns the event from which a chunk, as written by AppendElement, was ingested. ok is false for other chunks.
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
	if ok = ok && oneLine && !strings.Contains(data, "\r"); !ok { // a chunk that another program pushed may be no event
		return "", "", false
	}
	return name, data, true
}

// EachMember calls f for each member of a chunk or of an element, as far as it is a JSON object.
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

// Size returns the maximum size of the chunk's event in a stream, in bytes.
func (c Chunk) Size() int { return len(c.members) + Overhead }

// Members returns the chunk's members for the append script. An opening brace, a number and a time before them make an
// element.
func (c Chunk) Members() string { return c.members }
