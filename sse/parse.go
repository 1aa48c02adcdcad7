package sse

import (
	"bytes"
	"errors"
	"unicode/utf8"
)

// Event is one event of an event stream.
type Event struct {
	Name string // empty: the event has no name
	Data string
}

// Parser reads an event stream, in whatever pieces it arrives, by the rules of the standard
// (https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream). It
// handles a byte order mark at the start, lines that end with CR, LF or CRLF, and data of several
// lines. It skips comments and unknown fields, does not dispatch an event without data unless
// NameAlone is set, and discards an event that is torn by the stream's end. It ignores retry, and id
// unless IDs is set. The standard replaces invalid UTF-8; Parser returns an error for it, unless AnyBytes is set.
//
// The zero Parser is ready for a stream's first byte.
type Parser struct {
	AnyBytes  bool // names and data may be invalid UTF-8, and are returned as they are
	NameAlone bool // an event that has a name and no data is returned, too
	IDs       bool // ID returns ids

	id      []byte
	name    []byte
	data    []byte // each line with LF after it
	begun   bool   // the stream's beginning was checked for a byte order mark
	afterCR bool   // an LF that comes next belongs to the previous line
}

// Errors returned by Next.
var (
	ErrNotUTF8  = errors.New("the event is not valid UTF-8")
	ErrTooLarge = errors.New("the event is too large")
)

var byteOrderMark = []byte("\uFEFF")

// Next takes lines from what has arrived, up to the first whole event, and returns the rest. ok is
// false if there is no whole event yet: the caller must append to rest what arrives next. An event
// whose name and data have more than limit bytes is ErrTooLarge.
func (p *Parser) Next(arrived []byte, limit int) (e Event, rest []byte, ok bool, err error) {
	rest = arrived
	if !p.begun {
		if len(rest) < len(byteOrderMark) && bytes.HasPrefix(byteOrderMark, rest) {
			return e, rest, false, nil
		}
		p.begun, rest = true, bytes.TrimPrefix(rest, byteOrderMark)
	}
	for len(rest) > 0 {
		if p.afterCR {
			p.afterCR, rest = false, bytes.TrimPrefix(rest, []byte{'\n'})
		}
		end := bytes.IndexAny(rest, "\r\n")
		if end < 0 {
			break
		}
		line := rest[:end]
		p.afterCR, rest = rest[end] == '\r', rest[end+1:]
		if len(line) > 0 {
			if p.field(line); len(p.name)+len(p.data) > limit+1 {
				return e, rest, false, ErrTooLarge
			}
			continue
		}
		if e, ok = p.dispatch(); ok {
			if !p.AnyBytes && (!utf8.ValidString(e.Name) || !utf8.ValidString(e.Data)) {
				return Event{}, rest, false, ErrNotUTF8
			}
			return e, rest, true, nil
		}
	}
	return e, rest, false, nil
}

// ID returns the id of the event that Next returned last, or of an earlier event if that one has none.
func (p *Parser) ID() string { return string(p.id) }

// Torn reports whether the stream would end inside an event if it ended now, with rest left of it.
// Such an event was not dispatched, and never will be.
func (p *Parser) Torn(rest []byte) bool {
	if p.afterCR {
		rest = bytes.TrimPrefix(rest, []byte{'\n'})
	}
	return len(p.data) > 0 || len(p.name) > 0 || len(rest) > 0 && rest[0] != ':'
}

// field reads a line that is not empty.
func (p *Parser) field(line []byte) {
	name, value, _ := bytes.Cut(line, []byte{':'})
	value = bytes.TrimPrefix(value, []byte{' '})
	switch string(name) {
	case "event":
		p.name = append(p.name[:0], value...)
	case "data":
		p.data = append(append(p.data, value...), '\n')
	case "id":
		if p.IDs && bytes.IndexByte(value, 0) < 0 {
			p.id = append(p.id[:0], value...)
		}
	}
}

// dispatch handles an empty line.
func (p *Parser) dispatch() (e Event, ok bool) {
	if ok = len(p.data) > 0 || p.NameAlone && len(p.name) > 0; ok {
		e = Event{string(p.name), string(bytes.TrimSuffix(p.data, []byte{'\n'}))}
	}
	p.name, p.data = p.name[:0], p.data[:0]
	return e, ok
}
