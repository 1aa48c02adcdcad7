package sse

import (
	"bytes"
	"slices"
	"sort"
	"time"

	"gapless/store"
)

// window is what a node knows of a log at one moment: its bounds, and its newest chunks
// as event bytes. A published window never changes, so viewers read it without a lock.
//
// The bytes are shared between a window and the next. Growing appends behind what older
// windows can see, in the spare capacity of the last segment; only the feed does it,
// and only to the newest window.
type window struct {
	store.Bounds
	read uint64 // the number of the read that this rests on; 0: nothing was read yet
	memory
	tip  string        // the element at Last, to be compared when the log is read again; empty: unknown
	next chan struct{} // closed when a newer window is there

	arrived time.Time // when its newest chunk came live; zero: it was read
}

func (w *window) known() bool  { return w.read > 0 }
func (w *window) absent() bool { return w.Epoch == "" }

// base is the number before the first chunk that is kept.
func (w *window) base() int64 { return w.First - 1 }

// sameBounds says whether w has nothing that a viewer would not know from other.
func (w *window) sameBounds(other *window) bool {
	return w.Epoch == other.Epoch && w.First == other.First && w.Last == other.Last && w.Former == other.Former &&
		w.Ended == other.Ended && w.Deleted == other.Deleted
}

// with is w and one more chunk, within limit bytes of memory.
func (w *window) with(element string, limit int) *window {
	n := *w
	n.next = make(chan struct{})
	n.arrived = time.Now()
	n.Last++
	n.memory.append(element, limit)
	n.tip = element
	return &n
}

// memory is the event bytes of consecutive chunks, in segments: a segment is what one
// write takes, and all that a stalled viewer can keep from being freed.
type memory struct {
	full []segment // never changed in place, except by appending
	tail segment   // the one that grows
	size int       // bytes of events

	lastStop int64 // the newest number that ends a message, or says that it ends the log, in memory or not
}

// segment is events one behind the other.
type segment struct {
	first int64    // the number of the first event
	buf   []byte   //
	ends  []uint32 // where each event ends in buf
	stops []int64  // the numbers of those that end a message
}

// segmentSize is the most that one write takes. A writer that hands larger pieces to a
// socket cannot tell a slow reader from a dead one.
const segmentSize = 16 << 10

func newMemory(next int64) memory { return memory{tail: segment{first: next}} }

// nextSeq is the number that an event appended now would have.
func (m *memory) nextSeq() int64 { return m.tail.first + int64(len(m.tail.ends)) }

// firstSeq is the number of the oldest event in memory.
func (m *memory) firstSeq() int64 {
	if len(m.full) > 0 {
		return m.full[0].first
	}
	return m.tail.first
}

// append adds a chunk and lets go of the oldest segments beyond limit bytes.
func (m *memory) append(element string, limit int) { m.appendFirst([]string{element}, limit) }

// appendFirst appends the first of chunks of which the others are going to follow.
func (m *memory) appendFirst(chunks []string, limit int) {
	element := chunks[0]
	seq, target := m.nextSeq(), min(segmentSize, limit/8)
	// Encoded at its final place when it is certain to fit; else it opens a segment.
	room := eventRoom(element)
	if len(m.tail.ends) > 0 && len(m.tail.buf)+room > target {
		m.full = append(m.full, m.tail)
		m.tail = segment{first: seq}
	}
	t := &m.tail
	if cap(t.buf)-len(t.buf) < room {
		count, coming := 0, len(t.buf)
		for ; count < len(chunks) && coming < target; count++ {
			coming += eventRoom(chunks[count])
		}
		grown := make([]byte, len(t.buf), max(min(max(2*cap(t.buf), coming, 512), target), len(t.buf)+room))
		copy(grown, t.buf)
		t.buf, t.ends = grown, slices.Grow(t.ends, count)
	}
	before := len(t.buf)
	var ends store.Ending
	t.buf, ends = appendEvent(t.buf, seq, element)
	t.ends = append(t.ends, uint32(len(t.buf)))
	if ends != 0 {
		m.lastStop = seq
	}
	if ends&store.EndsMessage != 0 {
		t.stops = append(t.stops, seq)
	}
	m.size += len(t.buf) - before
	m.shrink(limit)
}

// eventRoom is the most that a chunk's event has, in bytes, whatever number the element says. One that is no object may
// have more.
func eventRoom(element string) int {
	return len(element) + len("data: \nid: 9007199254740991\n\n") + len("9007199254740991")
}

// shrink lets go of the oldest segments beyond limit bytes.
func (m *memory) shrink(limit int) {
	drop := 0
	for m.size > limit && drop < len(m.full) {
		m.size -= len(m.full[drop].buf)
		drop++
	}
	if drop > 0 { // a copy: older windows read the old one, and it would keep the dropped segments
		m.full = slices.Clone(m.full[drop:])
	}
	if m.size > limit {
		stop := m.lastStop
		*m = newMemory(m.nextSeq())
		m.lastStop = stop
	}
}

// after is the events behind cursor, up to number upto or the end of their segment, and
// the number of the last of them; with stop, up to the first that ends a message. ok says whether memory goes back that far. Nothing and ok: there is none.
func (m *memory) after(cursor, upto int64, stop bool) (events []byte, last int64, stopped, ok bool) {
	if cursor+1 < m.firstSeq() {
		return nil, cursor, false, false
	}
	s := &m.tail
	if cursor+1 < s.first {
		s = &m.full[sort.Search(len(m.full), func(i int) bool { return m.full[i].first > cursor+1 })-1]
	}
	from, to := int(cursor+1-s.first), int(min(int64(len(s.ends)), upto+1-s.first))
	if from >= to {
		return nil, cursor, false, true
	}
	if stop {
		if i, _ := slices.BinarySearch(s.stops, cursor+1); i < len(s.stops) && s.stops[i] <= upto {
			to, stopped = int(s.stops[i]-s.first)+1, true
		}
	}
	return s.buf[s.start(from):s.ends[to-1]], s.first + int64(to) - 1, stopped, true
}

func (s *segment) start(i int) uint32 {
	if i == 0 {
		return 0
	}
	return s.ends[i-1]
}

// holds says whether event seq is in memory, and is what element would make.
func (m *memory) holds(seq int64, element string) (known, same bool) {
	events, _, _, ok := m.after(seq-1, seq, false)
	if !ok || len(events) == 0 {
		return false, false
	}
	want, _ := appendEvent(nil, seq, element)
	return true, bytes.Equal(events, want)
}
