package sse

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/sync/singleflight"

	"gapless/store"
)

// A viewer that has nothing yet may want the existing chunks as one event (Ask.Snapshot): the
// messages, each with its text so far, instead of a chunk for every word. A snapshot is a fold over
// the log, so it says the same as the chunks up to its id, and the cursor continues from there.
//
// It is only a shortcut. Where there is no memory for it, the viewer gets the chunks, or a snapshot
// of the log's beginning and the chunks after that.

// snapshot is an encoded snapshot event. It never changes.
type snapshot struct {
	epoch      string
	base, last int64  // it stands for the chunks base+1 to last
	ends       bool   // one of them ends a message
	ended      bool   // the last of them ends the log
	event      []byte // empty: last is base

	users int // how many viewers hold it; guarded by snapshots.mu
}

// fits reports whether a viewer of w at cursor that has nothing yet may get the snapshot: it begins
// at the cursor or later, and kept chunks continue it.
func (s *snapshot) fits(w *window, cursor int64) bool {
	return s.epoch == w.Epoch && !w.Deleted && s.base >= cursor && s.last >= w.base() && s.last <= w.Last
}

// fold is the content of a log's chunks after base, up to last.
type fold struct {
	epoch      string
	base, last int64
	messages   []*message
	named      map[string]*message
	unnamed    *message // the last chunk's, if that chunk had no message_id
	ends       bool
	full       bool // the next chunk does not fit
	size       int  // about the size of the event in bytes
	// keep returns what to keep of a message that begins with chunk seq; nil: keep everything.
	keep func(seq int64, id string) kept
}

// kept is what a fold keeps of a message.
type kept int

const (
	keptWhole kept = iota
	keptHead       // everything except its content
	keptOut        // the fold omits it, and knows it only to tell its chunks from those of others
)

// message is one message of a fold. Names and texts are kept as they stand between quotes in JSON,
// so that pieces of a text can simply be joined.
type message struct {
	named            bool
	kept             kept
	id, role, reason []byte
	status           string
	over             bool // a message that has ended stays so, whatever is pushed after it
	cut              bool // it is larger than the limit
	first, last      int64
	content          []byte
	thought          []byte // the content of its chunks of type reasoning,
	from, to         int64  // and the times in ms of the first and the last of them
	chunks           []byte // the chunks that say more than text, with commas between
}

// messageSize is the size of a message in an event without the content of its chunks.
const messageSize = 256

const streaming = "streaming"

func newFold(epoch string, base int64) *fold {
	return &fold{epoch: epoch, base: base, last: base, named: map[string]*message{}, size: messageSize}
}

// take folds in the chunks of events while they fit in most bytes. The first has number last+1.
func (f *fold) take(events []byte, most int) {
	for seq, chunk := range Chunks(events) {
		if f.full = f.size+len(chunk)+messageSize > most; f.full {
			return
		}
		f.add(seq, chunk)
		f.last = seq
	}
}

func (f *fold) add(seq int64, chunk []byte) {
	var id string
	var rawID, role, content, reason jsontext.Value
	kind, complete, more := store.TypeDelta, false, false
	ts := int64(0)
	store.EachMember(chunk, func(name string, value jsontext.Value) {
		text := value.Kind() == '"'
		switch {
		case name == "ts":
			if n, err := strconv.ParseInt(string(value), 10, 64); err == nil && n > 0 {
				ts = n
			}
		case name == "seq":
		case name == "is_complete":
			complete = value.Kind() == 't'
		case name == "type" && text:
			kind = store.Text(value)
		case name == "message_id" && text:
			id, rawID = store.Text(value), inside(value)
		case name == "role" && text:
			role = inside(value)
		case name == "content" && text:
			content = inside(value)
		case name == "reason" && text:
			reason = inside(value)
		default:
			more = true
		}
	})
	f.ends = f.ends || store.Ends(chunk)&store.EndsMessage != 0
	status, over := streaming, complete
	switch kind {
	case store.TypeDelta, store.TypeReasoning:
	case store.TypeMessage:
		status = store.TypeDone
	case store.TypeDone, store.TypeFailed, store.TypeCancelled:
		status, over = kind, true
	case store.TypeEnd:
		if _, ours := store.Number(string(chunk[:min(len(chunk), 64)])); !ours {
			more = true
		} else if id == "" && len(content) == 0 && !more {
			return // this chunk alone does not prove that the log has ended
		}
	default:
		more = true
	}
	if over && status == streaming {
		status = store.TypeDone
	}
	if len(role) == 0 {
		role = jsontext.Value("assistant")
	}
	m := f.named[id]
	if id == "" { // chunks without an id belong to their neighbours
		if m = f.unnamed; m != nil && (m.status != streaming || !bytes.Equal(m.role, role)) {
			m = nil
		}
		if m == nil && len(content) == 0 && !more {
			f.unnamed = nil
			return
		}
	}
	if m == nil {
		m = &message{named: id != "", id: bytes.Clone(rawID), role: bytes.Clone(role), first: seq}
		if f.keep != nil {
			m.kept = f.keep(seq, id)
		}
		if m.kept != keptOut {
			f.messages = append(f.messages, m)
			f.size += m.size()
		}
		if m.named {
			f.named[id] = m
		}
	}
	if f.unnamed = nil; !m.named {
		f.unnamed = m
	}
	if !m.over {
		m.status, m.over = status, over
	}
	if m.kept == keptOut {
		return
	}
	if m.last = seq; m.kept == keptHead {
		return
	}
	if kind != store.TypeReasoning {
		m.content = append(m.content, content...)
	} else if m.thought = append(m.thought, content...); len(content) > 0 && ts > 0 {
		if m.from == 0 {
			m.from = ts
		}
		m.to = max(m.to, ts)
	}
	f.size += len(content)
	if len(reason) > 0 {
		f.size += len(reason) - len(m.reason)
		m.reason = bytes.Clone(reason)
	}
	if more {
		if len(m.chunks) > 0 {
			m.chunks = append(m.chunks, ',')
		}
		m.chunks = append(m.chunks, chunk...)
		f.size += len(chunk) + 1
	}
}

// size returns about the size of the message in an event, in bytes.
func (m *message) size() int {
	return messageSize + len(m.id) + len(m.role) + len(m.reason) + len(m.content) + len(m.thought) + len(m.chunks)
}

// inside returns the text between a string's quotes.
func inside(text jsontext.Value) jsontext.Value { return text[1 : len(text)-1] }

// snapshot returns the fold as an event. ended means that the log has ended with its last chunk.
func (f *fold) snapshot(ended bool) *snapshot {
	s := &snapshot{epoch: f.epoch, base: f.base, last: f.last, ends: f.ends, ended: ended}
	if f.last == f.base {
		return s
	}
	b := make([]byte, 0, f.size+messageSize)
	b = append(b, `event: snapshot`+"\n"+`data: {"type":"snapshot","epoch":`...)
	b = strconv.AppendQuote(b, f.epoch)
	b = strconv.AppendInt(append(b, `,"first_seq":`...), f.base+1, 10)
	b = strconv.AppendInt(append(b, `,"last_seq":`...), f.last, 10)
	b = strconv.AppendBool(append(b, `,"ended":`...), ended)
	b = append(b, `,"messages":[`...)
	for i, m := range f.messages {
		if i > 0 {
			b = append(b, ',')
		}
		b = m.append(b)
	}
	b = strconv.AppendInt(append(b, "]}\nid: "...), f.last, 10)
	s.event = append(b, "\n\n"...)
	return s
}

// append appends the message as JSON.
func (m *message) append(b []byte) []byte {
	b = append(b, '{')
	if m.named {
		b = append(append(append(b, `"message_id":"`...), m.id...), `",`...)
	}
	b = append(append(b, `"role":"`...), m.role...)
	b = append(append(b, `","content":"`...), m.content...)
	if b = append(b, '"'); len(m.thought) > 0 {
		b = append(append(append(b, `,"reasoning":"`...), m.thought...), '"')
		b = strconv.AppendInt(append(b, `,"reasoning_ms":`...), m.to-m.from, 10)
	}
	b = append(append(append(b, `,"status":"`...), m.status...), '"')
	b = strconv.AppendBool(append(b, `,"done":`...), m.status != streaming)
	if len(m.reason) > 0 {
		b = append(append(append(b, `,"reason":"`...), m.reason...), '"')
	}
	b = strconv.AppendInt(append(b, `,"first_seq":`...), m.first, 10)
	b = strconv.AppendInt(append(b, `,"last_seq":`...), m.last, 10)
	if len(m.chunks) > 0 {
		b = append(append(append(b, `,"chunks":[`...), m.chunks...), ']')
	}
	return append(b, '}')
}

// snapshots limits the memory of all snapshots and of the folds that they are made from.
type snapshots struct {
	mu           sync.Mutex
	budget, held int
	making       chan struct{} // one place for each concurrent fold
}

// hold adds a user of s. It returns false if there is no memory for it.
func (b *snapshots) hold(s *snapshot) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.users == 0 {
		if b.held+len(s.event) > b.budget {
			return false
		}
		b.held += len(s.event)
	}
	s.users++
	return true
}

func (b *snapshots) drop(s *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.users--; s.users == 0 {
		b.held -= len(s.event)
	}
}

// resize counts bytes of a fold. It returns false if there is no memory for more.
func (b *snapshots) resize(by int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if by > 0 && b.held+by > b.budget {
		return false
	}
	b.held += by
	return true
}

func (b *snapshots) bytes() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held
}

// folded is a feed's fold, kept for a while. Many clients reload at the same time, and a client
// that reloads twice gets the earlier fold and the rest.
type folded struct {
	mu   sync.Mutex
	fold *fold
	snap *snapshot
	size int // as it was counted in snapshots
	used time.Time
}

// keep keeps f, if there is memory for it. mu is held.
func (k *folded) keep(f *fold, s *snapshot, all *snapshots) {
	if k.snap != s && k.snap != nil {
		all.drop(k.snap)
		k.snap = nil
	}
	k.used = time.Now()
	if !all.resize(f.size - k.size) {
		k.forget(all)
		return
	}
	k.fold, k.size = f, f.size
	if k.snap == nil && all.hold(s) {
		k.snap = s
	}
}

// forget drops the fold. mu is held.
func (k *folded) forget(all *snapshots) {
	if k.snap != nil {
		all.drop(k.snap)
	}
	all.resize(-k.size)
	k.fold, k.snap, k.size = nil, nil, 0
}

// close drops the fold, and waits for one that is being made.
func (k *folded) close(all *snapshots) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.forget(all)
}

// idle drops a fold that was last used before t, unless it is in use now.
func (k *folded) idle(t time.Time, all *snapshots) {
	if k.mu.TryLock() {
		if k.fold != nil && k.used.Before(t) {
			k.forget(all)
		}
		k.mu.Unlock()
	}
}

// errOther means that a log was replaced while it was folded, or trimmed further than the feed
// knows.
var errOther = errors.New("not the log that the feed knows")

// fold folds a log after a cursor, up to the number upto or further. Its result is a *snapshot,
// which is empty with an error. If chunks after the cursor are no longer kept, the fold begins with
// the first kept one. Viewers that want the same share it. Errors: errOther, and those of a read.
func (h *Hub) fold(f *feed, epoch string, cursor, upto int64) <-chan singleflight.Result {
	return h.reading.DoChan(fmt.Sprint("snapshot ", f.session, " ", epoch, " ", cursor, " ", upto), func() (any, error) {
		k := &f.folded
		k.mu.Lock()
		defer k.mu.Unlock()
		select {
		case h.snapshots.making <- struct{}{}:
			defer func() { <-h.snapshots.making }()
		case <-h.ctx.Done():
			return &snapshot{}, h.ctx.Err()
		}
		n, start := k.fold, cursor
		if w := f.window.Load(); w.Epoch == epoch {
			start = max(start, w.base())
		}
		if n == nil || n.epoch != epoch || n.base < cursor || n.last < start {
			k.forget(&h.snapshots)
			n = newFold(epoch, start)
		}
		n, err := h.extend(n, f, upto)
		if err != nil {
			k.forget(&h.snapshots) // it has grown, and the growth was not counted
			return &snapshot{}, err
		}
		w := f.window.Load()
		ended := w.Ended && w.Epoch == n.epoch && w.Last == n.last
		if s := k.snap; s != nil && s.base == n.base && s.last == n.last && s.ended == ended {
			k.used = time.Now()
			return s, nil
		}
		s := n.snapshot(ended)
		f.mu.Lock()
		closed := f.closed
		f.mu.Unlock()
		if k.keep(n, s, &h.snapshots); closed {
			k.forget(&h.snapshots)
		}
		return s, nil
	})
}

// extend folds in the following chunks, up to number upto, from the window, from pages, or from
// Redis. If those were trimmed in the meantime, it returns a fold of what is kept. In a log that is
// full and grows, the beginning is always about to go.
func (h *Hub) extend(n *fold, f *feed, upto int64) (*fold, error) {
	for !n.full && n.last < upto {
		w := f.window.Load()
		if w.Epoch != n.epoch {
			return n, errOther
		}
		events, _, _, _ := w.after(n.last, upto, false)
		if len(events) > 0 {
			n.take(events, h.cfg.SnapshotMax)
			continue
		}
		p := h.pages.find(f, n.epoch, n.last)
		if p == nil {
			r := <-h.read(f, n.epoch, n.last+1, mostPage)
			if r.Err != nil {
				return n, r.Err
			}
			p = r.Val.(*page)
		}
		if p.Epoch != n.epoch {
			return n, errOther
		}
		if start := p.base(); start > n.last && !p.has(n.last) && start < w.Last { // its viewers can go no further than the feed knows
			n, upto = newFold(n.epoch, start), w.Last
		}
		if events, _, _, _ = p.after(n.last, upto, false); len(events) == 0 {
			return n, errOther
		}
		n.take(events, h.cfg.SnapshotMax)
	}
	return n, nil
}
