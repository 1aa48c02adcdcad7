package sse

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"

	"github.com/go-json-experiment/json/jsontext"

	"gapless/store"
)

// Messages is a snapshot made page by page, for callers that want messages instead of a stream. It
// is the same fold of the same chunks, so it says the same. It keeps the wanted messages whole, and
// of others only what tells their chunks apart.
//
// Messages is limited by count and bytes. Over the limit, it omits the messages that began last,
// and Next returns where to continue. A single message larger than the limit is cut.
type Messages struct {
	ask   MessagesAsk
	fold  *fold
	first int64 // where the first omitted message began; 0: none is omitted
	event []byte
}

// MessagesAsk selects messages.
type MessagesAsk struct {
	After int64                // messages that began after this chunk
	Only  func(id string) bool // messages with these ids, "" for no id; nil: all
	Heads bool                 // without their content
	Count int                  // the maximum number; 0: no limit
	Bytes int                  // the maximum size, roughly
}

// NewMessages returns an empty fold. Take adds the log to it.
func NewMessages(ask MessagesAsk) *Messages { return &Messages{ask: ask} }

// Take folds a page in. It discards the earlier pages if the log was replaced since, or if chunks
// between them and this page were trimmed. Then the fold begins with this page, as for a new
// viewer.
func (m *Messages) Take(p store.Page) {
	if m.fold == nil || m.fold.epoch != p.Epoch || m.fold.last+1 != p.From {
		m.fold, m.first = newFold(p.Epoch, p.From-1), 0
		m.fold.keep = m.keep
	}
	for i, element := range p.Elements {
		m.Add(p.From+int64(i), element)
	}
}

// Add folds in an element with the number seq, after those that were folded. If chunks between them
// are omitted, chunks without a message_id on both sides are not one message.
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

// shrink omits the messages that began last until the others fit.
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

// Epoch returns the epoch of the folded chunks, which are all from First to Last.
func (m *Messages) Epoch() string { return m.fold.epoch }

// First returns the number of the first chunk that was folded.
func (m *Messages) First() int64 { return m.fold.base + 1 }

// Last returns the number of the last chunk that was folded.
func (m *Messages) Last() int64 { return m.fold.last }

// Next returns the After that continues with the omitted messages. ok is false if none are omitted.
func (m *Messages) Next() (after int64, ok bool) { return m.first - 1, m.first > 0 }

// Len returns the number of messages.
func (m *Messages) Len() int {
	if m.fold == nil {
		return 0
	}
	return len(m.fold.messages)
}

// MessageHead describes a message without its content.
type MessageHead struct {
	ID, Role    string
	Streaming   bool
	First, Last int64
}

// Heads returns the heads of the messages, in the order in which they began.
func (m *Messages) Heads() (all []MessageHead) {
	for i := range m.Len() {
		one := m.fold.messages[i]
		all = append(all, MessageHead{plain(one.id), plain(one.role), one.status == streaming, one.first, one.last})
	}
	return all
}

// Content returns the text of message i.
func (m *Messages) Content(i int) string { return plain(m.fold.messages[i].content) }

// More yields the chunks of message i that say more than text.
func (m *Messages) More(i int) iter.Seq[jsontext.Value] { return m.fold.messages[i].more() }

// AppendJSON appends message i in the form of a snapshot.
func (m *Messages) AppendJSON(b []byte, i int) []byte {
	one := m.fold.messages[i]
	if b = one.append(b); one.cut {
		b = append(b[:len(b)-1], `,"cut":true}`...)
	}
	return b
}

// UIMessage is a message in the form of the Vercel AI SDK.
type UIMessage struct {
	ID    string   `json:"id"`
	Role  string   `json:"role"`
	Parts []UIPart `json:"parts"`
}

// UIPart is a part of a UIMessage. Its type decides which of its members are set.
type UIPart struct {
	Type  string          `json:"type"`
	Text  string          `json:"text,omitempty"`
	State string          `json:"state,omitempty"`
	Data  json.RawMessage `json:"data,omitempty"`
}

// UI returns message i for the Vercel AI SDK. ok is false for a message that the SDK cannot use.
// Its role is unknown there, it has nothing to show, or it is still streaming, and the client gets
// it as a stream.
func (m *Messages) UI(i int) (u UIMessage, ok bool) {
	one := m.fold.messages[i]
	u = UIMessage{ID: plain(one.id), Role: plain(one.role)}
	if !one.named { // the SDK needs an id, and this one is stable
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

// more yields the chunks that say more than text.
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

// plain decodes a text that is kept as it stands between quotes.
func plain(inside []byte) string {
	return store.Text(append(append([]byte{'"'}, inside...), '"'))
}
