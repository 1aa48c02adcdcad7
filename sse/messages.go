package sse

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"

	"github.com/go-json-experiment/json/jsontext"

	"gapless/store"
)

// Messages is a snapshot that is made page by page, for those who want messages and no stream: the same fold of the
// same chunks, so it says the same. It keeps the messages that were asked for, each whole, and of all others nothing but
// what tells their chunks apart.
//
// It is bounded by messages and bytes. When they are too many, those that began last are left out, and Next says
// where they are to be asked for. A single message that is larger than the bound is cut.
type Messages struct {
	ask   MessagesAsk
	fold  *fold
	first int64 // where the first message began that is left out; 0: none is
	event []byte
}

// MessagesAsk says which messages are wanted.
type MessagesAsk struct {
	After int64                // those that began after this chunk
	Only  func(id string) bool // of these names, "" for none; nil: all
	Heads bool                 // nothing of what they say
	Count int                  // at most; 0: as many as there are
	Bytes int                  // about, at most
}

// NewMessages begins a fold. Take gives it the log.
func NewMessages(ask MessagesAsk) *Messages { return &Messages{ask: ask} }

// Take folds a page in. What the pages before it said is forgotten where the log has become another one since, or
// where chunks between them were trimmed: then it begins with this one, as a viewer would that came now.
func (m *Messages) Take(p store.Page) {
	if m.fold == nil || m.fold.epoch != p.Epoch || m.fold.last+1 != p.From {
		m.fold, m.first = newFold(p.Epoch, p.From-1), 0
		m.fold.keep = m.keep
	}
	for i, element := range p.Elements {
		m.Add(p.From+int64(i), element)
	}
}

// Add folds an element in: number seq of the log, after those that were folded. Where chunks between them are left out,
// those that have no message_id are not one message.
func (m *Messages) Add(seq int64, element string) {
	if m.fold == nil {
		m.fold = newFold("", seq-1)
		m.fold.keep = m.keep
	}
	if seq != m.fold.last+1 {
		m.fold.unnamed = nil
	}
	m.event, _ = store.AppendElement(m.event[:0], seq, element)
	m.fold.add(seq, m.event)
	m.fold.last = seq
	m.shrink()
}

func (m *Messages) keep(seq int64, id string) kept {
	switch {
	case seq <= m.ask.After, m.ask.Only != nil && !m.ask.Only(id):
		return keptOut
	case m.first > 0, m.ask.Count > 0 && len(m.fold.messages) == m.ask.Count:
		if m.first == 0 {
			m.first = seq
		}
		return keptOut
	case m.ask.Heads:
		return keptHead
	}
	return keptWhole
}

// shrink leaves out the messages that began last until the others fit.
func (m *Messages) shrink() {
	f := m.fold
	for m.ask.Bytes > 0 && f.size > m.ask.Bytes && len(f.messages) > 0 {
		at := len(f.messages) - 1
		last := f.messages[at]
		if at == 0 {
			last.kept, last.cut = keptHead, true
			return
		}
		m.first = last.first
		f.size -= last.size()
		last.kept, last.content, last.thought, last.chunks = keptOut, nil, nil, nil
		f.messages[at] = nil
		f.messages = f.messages[:at]
	}
}

// Epoch is the epoch of the chunks that were folded: all of it from First to Last.
func (m *Messages) Epoch() string { return m.fold.epoch }

// First is the number of the first chunk that was folded.
func (m *Messages) First() int64 { return m.fold.base + 1 }

// Last is the number of the last one.
func (m *Messages) Last() int64 { return m.fold.last }

// Next is After of those that were left out; ok is false when none were.
func (m *Messages) Next() (after int64, ok bool) { return m.first - 1, m.first > 0 }

// Len is how many there are.
func (m *Messages) Len() int {
	if m.fold == nil {
		return 0
	}
	return len(m.fold.messages)
}

// MessageHead is what a message is, beside what it says.
type MessageHead struct {
	ID, Role    string
	Streaming   bool
	First, Last int64
}

// Heads are those of the messages, in the order in which they began.
func (m *Messages) Heads() (all []MessageHead) {
	for i := range m.Len() {
		one := m.fold.messages[i]
		all = append(all, MessageHead{plain(one.id), plain(one.role), one.status == streaming, one.first, one.last})
	}
	return all
}

// Content is the text of message i.
func (m *Messages) Content(i int) string { return plain(m.fold.messages[i].content) }

// AppendJSON appends message i as a snapshot has it.
func (m *Messages) AppendJSON(b []byte, i int) []byte {
	one := m.fold.messages[i]
	if b = one.append(b); one.cut {
		b = append(b[:len(b)-1], `,"cut":true}`...)
	}
	return b
}

// UIMessage is a message as the Vercel AI SDK has it.
type UIMessage struct {
	ID    string   `json:"id"`
	Role  string   `json:"role"`
	Parts []UIPart `json:"parts"`
}

// UIPart is a part of one. Which of its members it has follows from its type.
type UIPart struct {
	Type  string          `json:"type"`
	Text  string          `json:"text,omitempty"`
	State string          `json:"state,omitempty"`
	Data  json.RawMessage `json:"data,omitempty"`
}

// UI is message i for the Vercel AI SDK. ok is false for one that has no place among its messages: of a role that it
// does not know, without anything that it could show, or under way, which its client is given as a stream.
func (m *Messages) UI(i int) (u UIMessage, ok bool) {
	one := m.fold.messages[i]
	u = UIMessage{ID: plain(one.id), Role: plain(one.role)}
	if !one.named { // it has to have an id, and this one stays
		u.ID = fmt.Sprint("seq-", one.first)
	}
	switch u.Role {
	case "developer":
		u.Role = "system"
	case "system", "user", "assistant":
	default:
		return u, false
	}
	if one.status == streaming {
		return u, false
	}
	if len(one.thought) > 0 {
		u.Parts = append(u.Parts, UIPart{Type: "reasoning", Text: plain(one.thought), State: "done"})
	}
	if len(one.content) > 0 {
		u.Parts = append(u.Parts, UIPart{Type: "text", Text: plain(one.content), State: "done"})
	}
	for chunk := range one.more() {
		kind, data := store.TypeDelta, json.RawMessage(nil)
		store.EachMember(chunk, func(name string, value jsontext.Value) {
			switch {
			case name == "type" && value.Kind() == '"':
				kind = store.Text(value)
			case name == "data":
				data = json.RawMessage(value.Clone())
			}
		})
		if data != nil {
			u.Parts = append(u.Parts, UIPart{Type: "data-" + kind, Data: data})
		}
	}
	return u, len(u.Parts) > 0
}

// more is the chunks that say more than text.
func (m *message) more() iter.Seq[jsontext.Value] {
	return func(yield func(jsontext.Value) bool) {
		all := jsontext.NewDecoder(bytes.NewBuffer(append(append([]byte{'['}, m.chunks...), ']')), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
		if _, err := all.ReadToken(); err != nil {
			return
		}
		for all.PeekKind() == '{' {
			chunk, err := all.ReadValue()
			if err != nil || !yield(chunk) {
				return
			}
		}
	}
}

// plain is a text that is kept as it stands between quotes.
func plain(inside []byte) string {
	return store.Text(append(append([]byte{'"'}, inside...), '"'))
}
