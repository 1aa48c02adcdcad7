package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Chunk is a chunk that has no number yet: a JSON object, checked, as members that
// the append script puts behind the number and the time.
type Chunk struct {
	members   string // `"type":"delta","content":"…"}`: without the opening brace, on one line
	messageID string
	ends      string // done, failed, cancelled: ends the message; end: ends the log
}

// The types of chunk that mean something to the server.
const (
	TypeDelta     = "delta"
	TypeMessage   = "message"
	TypeDone      = "done"
	TypeFailed    = "failed"
	TypeCancelled = "cancelled"
	TypeEnd       = "end"
)

// MaxMessageID is the longest message id, in bytes. The server remembers the ids of
// messages that have ended.
const MaxMessageID = 256

// Overhead is what a chunk's event has beyond its members, each part at its longest:
// "data: ", the opening brace, number, time, the line of its id, and the heartbeats of an
// hour before it, which are of the same block. Two common clients give up at a block, not
// a line, of 64 KiB.
const Overhead = len("data: "+`{"seq":9007199254740991,"ts":1795424741692,`+"\nid: 9007199254740991\n\n") + 240*len(":\n")

// ChunkError says what is wrong with a chunk as posted.
type ChunkError struct {
	Code   string // invalid_json, invalid_utf8, duplicate_member, reserved_member, invalid_chunk, chunk_too_large
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
	dec := jsontext.NewDecoder(bytes.NewBuffer(text))
	if dec.PeekKind() != '{' {
		if _, err := dec.ReadValue(); err != nil {
			return c, syntaxError(err)
		}
		return c, &ChunkError{Code: "invalid_chunk", Detail: "a chunk is a JSON object"}
	}
	if _, err := dec.ReadToken(); err != nil {
		return c, syntaxError(err)
	}
	typ, members := "", 0
	hasType, hasMessage, hasRole := false, false, false
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
		switch member {
		case "seq", "ts":
			return c, &ChunkError{Code: "reserved_member", Member: "/" + member, Detail: fmt.Sprintf("member %q is the server's to set: leave it out", member)}
		case "type", "message_id", "role", "content", "event", "raw":
			if value.Kind() != '"' {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/" + member, Detail: fmt.Sprintf("member %q must be a string", member)}
			}
		}
		switch member {
		case "type":
			if typ, hasType = unquote(value), true; typ == "" {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/type", Detail: `member "type" is empty: leave it out for "delta"`}
			}
		case "message_id":
			c.messageID, hasMessage = unquote(value), true
			if len(c.messageID) > MaxMessageID {
				return c, &ChunkError{Code: "invalid_chunk", Member: "/message_id", Limit: MaxMessageID,
					Detail: fmt.Sprintf("member \"message_id\" has %d bytes: at most %d are allowed", len(c.messageID), MaxMessageID)}
			}
		case "role":
			hasRole = true
		}
	}
	if _, err := dec.ReadToken(); err != nil {
		return c, syntaxError(err)
	}
	if rest := text[dec.InputOffset():]; len(bytes.TrimSpace(rest)) > 0 {
		return c, &ChunkError{Code: "invalid_json", Detail: fmt.Sprintf("there is text after the object, from byte %d on", dec.InputOffset())}
	}
	if bytes.ContainsAny(text, "\n\r") { // a chunk is one line
		line := jsontext.Value(bytes.Clone(text))
		if err := line.Compact(); err != nil {
			return c, syntaxError(err)
		}
		text = line
	}

	var b strings.Builder
	b.Grow(len(text) + 64)
	sep := ""
	add := func(name, value string) {
		b.WriteString(sep + `"` + name + `":` + quote(value))
		sep = ","
	}
	if !hasType {
		typ = TypeDelta
		add("type", typ)
	}
	if !hasMessage && fill.MessageID != "" {
		c.messageID = fill.MessageID
		add("message_id", fill.MessageID)
	}
	if !hasRole && fill.Role != "" {
		add("role", fill.Role)
	}
	if members == 0 {
		b.WriteByte('}')
	} else {
		b.WriteString(sep)
		b.Write(text[1:])
	}
	c.members, c.ends = b.String(), ending(typ)
	if got := c.Size(); got > limit {
		return c, &ChunkError{Code: "chunk_too_large", Limit: limit,
			Detail: fmt.Sprintf("the chunk makes an event of up to %d bytes in a stream: at most %d are allowed (-chunk-max)", got, limit)}
	}
	return c, nil
}

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
	return Chunk{members: b.String(), messageID: messageID, ends: ending(typ)}
}

// NewFailed makes the chunk that ends a message whose producer failed.
func NewFailed(messageID, role, reason string) Chunk {
	c := NewChunk(TypeFailed, messageID, role, "")
	c.members = strings.TrimSuffix(c.members, "}") + `,"reason":` + quote(reason) + `}`
	return c
}

func ending(typ string) string {
	switch typ {
	case TypeDone, TypeFailed, TypeCancelled, TypeEnd:
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
		e.Detail = fmt.Sprintf("member %q stands twice", strings.TrimPrefix(e.Member, "/"))
	}
	return e
}

// AppendElement appends what viewers and pages are given of list element number seq:
// the element itself when it is one line of JSON object in valid UTF-8, and else an
// object that carries its text. Whatever is in the list is a chunk.
func AppendElement(b []byte, seq int64, element string) []byte {
	start := len(b)
	b = append(b, element...)
	if e := b[start:]; len(e) > 0 && e[0] == '{' && bytes.IndexByte(e, '\n') < 0 && bytes.IndexByte(e, '\r') < 0 &&
		utf8.Valid(e) && json.Valid(e) {
		return b
	}
	b = append(b[:start], `{"seq":`...)
	b = strconv.AppendInt(b, seq, 10)
	b = append(b, `,"type":"foreign","content":`...)
	return append(append(b, quote(element)...), '}')
}

// Number tells a chunk that the append script wrote by its first bytes, and its number.
func Number(element string) (seq int64, ours bool) {
	rest, ok := strings.CutPrefix(element, `{"seq":`)
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

// Ends says whether a chunk, as AppendElement wrote it, ends its message or the log.
func Ends(chunk []byte) bool {
	// Most chunks hold none of the words, in any spelling: they are not parsed again.
	if !bytes.Contains(chunk, []byte(`"done"`)) && !bytes.Contains(chunk, []byte(`"failed"`)) && !bytes.Contains(chunk, []byte(`"cancelled"`)) &&
		!bytes.Contains(chunk, []byte(`"end"`)) && !bytes.Contains(chunk, []byte(`"is_complete"`)) && !bytes.Contains(chunk, []byte(`\u`)) {
		return false
	}
	dec := jsontext.NewDecoder(bytes.NewBuffer(chunk), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	if _, err := dec.ReadToken(); err != nil {
		return false
	}
	for dec.PeekKind() == '"' {
		name, err := dec.ReadToken()
		if err != nil {
			return false
		}
		member := name.String()
		value, err := dec.ReadValue()
		if err != nil {
			return false
		}
		if member == "is_complete" && value.Kind() == 't' || member == "type" && value.Kind() == '"' && ending(unquote(value)) != "" {
			return true
		}
	}
	return false
}

// Size is the most bytes that the chunk's event in a stream has.
func (c Chunk) Size() int { return len(c.members) + Overhead }

// Members is the chunk's members as the append script gets them: a number and a time,
// an opening brace before them, make an element.
func (c Chunk) Members() string { return c.members }
