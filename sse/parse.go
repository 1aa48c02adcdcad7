package sse

import (
	"bytes"
	"errors"
	"unicode/utf8"
)

// Event is an event as an event stream brings it.
type Event struct {
	Name string // empty: it has none
	Data string
}

// Parser reads an event stream, in whatever pieces it arrives, by the rules of the
// standard (https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream):
// a byte order mark at its start, lines that end with CR, LF or CRLF, data of several
// lines, comments and unknown fields passed over, an event without data not dispatched,
// one that is torn by the stream's end discarded. What becomes of ids and retry is not
// its business. The standard replaces what is not UTF-8; here it is an error, unless AnyBytes.
//
// The zero Parser is ready for a stream's first byte.
type Parser struct {
	AnyBytes bool // names and data are handed out as they are, also those that are not UTF-8

	name    []byte
	data    []byte // each line with LF behind it
	begun   bool   // the stream's first line has been seen, or that it begins with no byte order mark
	afterCR bool   // an LF that comes next belongs to the line before it
}

// Errors of Next.
var (
	ErrNotUTF8  = errors.New("the event is not valid UTF-8")
	ErrTooLarge = errors.New("the event is too large")
)

var byteOrderMark = []byte("\uFEFF")

// Next takes lines from what has arrived, up to the first event that is whole, and
// answers what it left. ok is false when there is none yet: more has to arrive behind
// rest. An event whose name and data have more than limit bytes is ErrTooLarge.
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

// Torn says whether the stream would end inside an event if it ended now, with rest left
// of it: that event was not dispatched, and never will be.
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
	}
}

// dispatch is what an empty line does.
func (p *Parser) dispatch() (e Event, ok bool) {
	if ok = len(p.data) > 0; ok {
		e = Event{string(p.name), string(p.data[:len(p.data)-1])}
	}
	p.name, p.data = p.name[:0], p.data[:0]
	return e, ok
}
