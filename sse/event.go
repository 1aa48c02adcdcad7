package sse

import (
	"bytes"
	"encoding/json"
	"iter"
	"strconv"
	"strings"

	"gapless/store"
)

// The wire format (https://html.spec.whatwg.org/multipage/server-sent-events.html), with what
// clients were found to need:
//
//   - Chunks are unnamed events, so that onmessage sees every number.
//   - data is one line of JSON after "data: ". Clients remove the space.
//   - id is the last line of an event. A widely used client counts an id as soon as its line is
//     complete, and would skip a chunk that was cut after it. No event has an id without data,
//     which browsers treat in three ways.
//   - A response begins with a comment. It absorbs what WebKit kept of an earlier response that
//     was cut in the middle of an event.
//   - A heartbeat is a comment without a blank line after it. With one, some clients deliver an
//     empty message.
const heartbeat = ":\n"

// appendEvent appends chunk number seq as an event. ends is what the chunk claims to end.
func appendEvent(b []byte, seq int64, element string) (event []byte, ends store.Ending) {
	b = append(b, "data: "...)
	b, ends = store.AppendElement(b, seq, element)
	b = append(b, "\nid: "...)
	b = strconv.AppendInt(b, seq, 10)
	return append(b, "\n\n"...), ends
}

// appendRaw appends the events that were ingested as events, as they came, with our ids. It skips
// everything else: clients of an AI service's own stream fail on events that they do not know.
func appendRaw(b, events []byte) []byte {
	for len(events) > 0 {
		event, rest, _ := bytes.Cut(events, []byte("\n\n"))
		events = rest
		chunk, id, _ := bytes.Cut(event, []byte("\n"))
		chunk, ours := bytes.CutPrefix(chunk, []byte("data: "))
		if !ours { // welcome
			continue
		}
		name, data, ok := store.Raw(chunk)
		if !ok {
			continue
		}
		if name != "" {
			b = append(append(append(b, "event: "...), name...), '\n')
		}
		for line := range strings.SplitSeq(data, "\n") {
			b = append(append(append(b, "data: "...), line...), '\n')
		}
		b = append(append(b, id...), "\n\n"...)
	}
	return b
}

// Chunks yields the chunks of complete events, each with its number.
func Chunks(events []byte) iter.Seq2[int64, []byte] {
	return func(yield func(int64, []byte) bool) {
		for len(events) > 0 {
			event, rest, _ := bytes.Cut(events, []byte("\n\n"))
			events = rest
			chunk, id, _ := bytes.Cut(event, []byte("\nid: "))
			chunk, ours := bytes.CutPrefix(chunk, []byte("data: "))
			if !ours { // welcome
				continue
			}
			seq, err := strconv.ParseInt(string(id), 10, 64)
			if err == nil && !yield(seq, chunk) {
				return
			}
		}
	}
}

// welcome is the first event of a response. Its id repeats the cursor, so that a connection that
// breaks before the first chunk costs nothing.
type welcome struct {
	Type       string `json:"type"`
	Session    string `json:"session"`
	Epoch      string `json:"epoch"`
	First      int64  `json:"first_seq"`
	Last       int64  `json:"last_seq"`
	Cursor     int64  `json:"cursor"`
	Node       string `json:"node"`
	Connection string `json:"connection"`
}

// reset moves the cursor when chunks that a viewer has or waits for are no longer available. The
// viewer discards what it has and takes what follows.
type reset struct {
	Type   string `json:"type"`
	Reason string `json:"reason"`
	Epoch  string `json:"epoch"`  // of the chunks that follow
	Cursor int64  `json:"cursor"` // the old cursor; the new one is the event's id
	First  int64  `json:"first_seq"`
	Last   int64  `json:"last_seq"`
}

// Reasons of a reset.
const (
	resetTrimmed = "trimmed" // the chunks are older than what is kept
	resetAhead   = "ahead"   // the log is shorter than the cursor
	resetEpoch   = "epoch"   // the log was replaced
	resetUnknown = "unknown" // the id was not a number
	resetDeleted = "deleted" // the session was deleted
)

// appendReset appends a reset that moves a cursor.
func appendReset(b []byte, reason string, from, to int64, log store.Bounds) []byte {
	return appendNamed(b, "reset", reset{"reset", reason, log.Epoch, from, log.First, log.Last}, 0, to)
}

// expired is the last event of a viewer whose permission has expired. It is needed because a page
// cannot read the status of the refusal when it reconnects. Its id repeats the cursor.
type expired struct {
	Type string `json:"type"`
}

// noID is the id of an event that moves no cursor, because none is known yet.
const noID = -1

// appendNamed appends one of our own events. retry is in ms and goes inside the event's block; 0
// omits it.
func appendNamed(b []byte, name string, data any, retry int, id int64) []byte {
	text, err := json.Marshal(data)
	if err != nil {
		panic(err) // not possible: flat structs of text and numbers
	}
	b = append(append(append(b, "event: "...), name...), "\ndata: "...)
	b = append(append(b, text...), '\n')
	if retry > 0 {
		b = appendRetry(b, retry)
	}
	if id != noID {
		b = append(b, "id: "...)
		b = append(strconv.AppendInt(b, id, 10), '\n')
	}
	return append(b, '\n')
}

func appendRetry(b []byte, ms int) []byte {
	b = append(b, "retry: "...)
	b = strconv.AppendInt(b, int64(ms), 10)
	return append(b, '\n')
}
